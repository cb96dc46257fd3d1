"""Crosscoders of others: files built from the published layouts, against the formulas of the code that reads
them there.
"""

import json
import os
import pickle

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from lib.crosscoder.exchange import export_dictionary_learning, export_replication, read_foreign
from lib.crosscoder.model import CrossCoder
from lib.settings import UserError

M, D, F, B = 2, 6, 20, 64
ORDER = ("base", "distilled")
SCALES = {"base": 0.37, "distilled": 2.4}
KINDS = ("CROSSCODER", "SAE", "MIXED", "NONE", "DECOUPLED")


def draw(seed=0):
    """Weights [M, D, F], [M, F, D], biases, and raw activations [B, M, D] of unlike sizes, away from 0."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=g)

    x = normal(B, M, D) / torch.tensor([0.37, 2.4])[:, None] + torch.tensor([3.0, -0.5])[:, None]
    return (
        normal(M, D, F) * 0.5,
        normal(M, F, D) * torch.rand(F, 1, generator=g) * 0.6,
        normal(F) * 0.3,
        normal(M, D),
        x,
    )


def raw(x):
    return [x[:, m] for m in range(M)]


# --- the replication ----------------------------------------------------------------------------------------


def published(folder, cfg=None, weights="cc_weights.pt", config="cfg.json", dtype=torch.float32, **also):
    W_enc, W_dec, b_enc, b_dec, x = draw()
    state = {"W_enc": W_enc, "W_dec": W_dec.permute(1, 0, 2), "b_enc": b_enc, "b_dec": b_dec}
    state = {k: v.to(dtype).contiguous() for k, v in state.items()} | also
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(state, folder / weights)
    base = {
        "seed": 49,
        "d_in": D,
        "dict_size": F,
        "enc_dtype": "fp32",
        "hook_point": "blocks.14.hook_resid_pre",
        "l1_coeff": 2,
    }
    (folder / config).write_text(json.dumps(base | (cfg or {})))
    return state, x


def replication(state, x, scales):
    """Its formulas, in float64: [B, F], [B, M, D]; activations are multiplied before and divided after."""
    s = torch.tensor(scales, dtype=torch.float64)[None, :, None]
    state = {k: v.double() for k, v in state.items()}
    f = torch.relu(torch.einsum("bmd,mdf->bf", x.double() * s, state["W_enc"]) + state["b_enc"])
    if "threshold" in state:
        f = f * (f * state["W_dec"].norm(dim=2).sum(1) > state["threshold"])
    return f, (torch.einsum("bf,fmd->bmd", f, state["W_dec"]) + state["b_dec"]) / s


def same(crosscoder, x, f, x_hat):
    torch.testing.assert_close(crosscoder.encode(raw(x)).double(), f, rtol=1e-4, atol=1e-4)
    assert ((crosscoder.encode(raw(x)) > 0) == (f > 0)).all()
    torch.testing.assert_close(
        torch.stack(crosscoder.decode(f.float()), 1).double(), x_hat, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(
    "weights, config",
    [("cc_weights.pt", "cfg.json"), ("0.pt", "0_cfg.json"), ("qwen_13.pt", "qwen_13_cfg.json")],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_replication_is_the_same_function(tmp_path, weights, config, dtype):
    state, x = published(tmp_path, weights=weights, config=config, dtype=dtype)
    found = read_foreign(tmp_path, ORDER, SCALES)
    same(found.crosscoder, x, *replication(state, x, [0.37, 2.4]))
    assert found.layers == {"base": 13, "distilled": 13}  # the input of block 14 is the output of block 13
    norms = state["W_dec"].float().norm(dim=2)
    torch.testing.assert_close(found.crosscoder.nrn(2), norms[:, 1] / norms.sum(1))


def test_which_model_comes_first_decides_whose_a_feature_is(tmp_path):
    state, x = published(tmp_path)
    straight, turned = (
        read_foreign(tmp_path, o, SCALES, names=ORDER).crosscoder for o in (ORDER, ORDER[::-1])
    )
    torch.testing.assert_close(straight.nrn(2) + turned.nrn(2), torch.ones(F))
    f, x_hat = replication(state, x, [2.4, 0.37])  # the file's first is now "distilled", with its scale
    same(turned, x.flip(1), f, x_hat.flip(1))


def test_the_replications_variant_with_a_threshold(tmp_path):
    state, x = published(tmp_path, {"batch_topk_init": 5}, threshold=torch.tensor(2.5), k=torch.tensor(5))
    f, x_hat = replication(state, x, [0.37, 2.4])
    without, _ = replication({k: v for k, v in state.items() if k != "threshold"}, x, [0.37, 2.4])
    assert 0.1 < (f > 0).sum() / (without > 0).sum() < 0.9  # the threshold decides something here
    crosscoder = read_foreign(tmp_path, ORDER, SCALES).crosscoder
    assert (crosscoder.variant, crosscoder.k) == ("batchtopk", 5)
    same(crosscoder, x, f, x_hat)


@pytest.mark.parametrize("threshold", [None, 0.0, 2.5])
def test_features_that_write_nothing_never_fire(tmp_path, threshold):
    also = {} if threshold is None else {"threshold": torch.tensor(threshold), "k": torch.tensor(5)}
    state, x = published(tmp_path, **also)
    state["W_dec"][[3, 8]] = 0
    torch.save(state, tmp_path / "cc_weights.pt")
    f, x_hat = replication(state, x, [0.37, 2.4])
    crosscoder = read_foreign(tmp_path, ORDER, SCALES).crosscoder
    assert not crosscoder.encode(raw(x))[:, [3, 8]].any() and crosscoder.encode(raw(x)).any()
    f[:, [3, 8]] = 0
    same(crosscoder, x, f, x_hat)


@pytest.mark.parametrize("kind", KINDS[:-1])
def test_features_that_write_nothing_never_fire_under_any_normalisation(tmp_path, kind):
    W_dec = draw(1)[1]
    W_dec[:, [3, 8]] = 0
    state, x = saved(tmp_path, kind, 1.0, **{"decoder.weight": W_dec})
    found, (f, x_hat) = read_foreign(tmp_path, ORDER, layer=2).crosscoder, dictionary_learning(state, x, kind)
    f[:, [3, 8]] = 0  # without a normalisation they would fire there, and change nothing
    same(found, x, f, x_hat)


def test_what_the_file_does_not_say_is_asked_for(tmp_path):
    published(tmp_path, {"hook_point": None, "model_name_A": "org/base"})
    with pytest.raises(
        UserError, match="which of its 2 models is which.*model_name_A = org/base.*give order"
    ):
        read_foreign(tmp_path, scales=SCALES, layer=3)
    with pytest.raises(UserError, match=r"needs scales.*1 for each if they were folded"):
        read_foreign(tmp_path, ORDER, layer=3)
    with pytest.raises(UserError, match="at which layer"):
        read_foreign(tmp_path, ORDER, SCALES)
    assert read_foreign(tmp_path, ORDER, SCALES, 3).layers == {"base": 3, "distilled": 3}


@pytest.mark.fault("bad input")
@pytest.mark.parametrize(
    "order, scales, layer, says",
    [
        (("base",), SCALES, None, "has 2 models"),
        (("base", "base"), SCALES, None, "a name of its own"),
        (ORDER, {"base": 1.0}, None, "one positive number for each"),
        (ORDER, {"base": 1.0, "distilled": 0.0}, None, "one positive number"),
        (ORDER, SCALES, 14, "trained on the output of .*13.*one of them is wrong"),
        ("base,distilled", SCALES, None, "order is 'base,distilled': it must be a list"),
        (ORDER, [1.0, 1.0], None, "scales is .1.0, 1.0.: it must be a mapping, every entry a number"),
        (ORDER, 2.0, None, "scales is 2.0: it must be a mapping"),
        (ORDER, SCALES | {"base": "one"}, None, "scales is .*'one'.*: it must be a mapping"),
        (ORDER, SCALES | {"base": None}, None, "scales is .*None.*: it must be a mapping"),
        (ORDER, SCALES | {"base": float("nan")}, None, "scales is .*nan.*: it must be a mapping"),
        (ORDER, SCALES, "13", "layer is '13': it must be an integer"),
        (ORDER, SCALES, 13.5, "layer is 13.5: it must be an integer"),
        (ORDER, SCALES, True, "layer is True: it must be an integer"),
        (ORDER, SCALES, [13, 13], "layer is .13, 13.: it must be an integer of at least 0 or a mapping"),
        (ORDER, SCALES, {"base": 13}, "one for each of base, distilled"),
    ],
)
def test_what_contradicts_the_file_is_refused(tmp_path, order, scales, layer, says):
    published(tmp_path)
    with pytest.raises(UserError, match=says):
        read_foreign(tmp_path, order, scales, layer)


@pytest.mark.fault("bad input")
@pytest.mark.parametrize(
    "cfg, says",
    [
        (
            {"sparsity_type": "batch_top_k", "k_sparsity": 100},
            "not trained with ReLU alone.*k_sparsity = 100",
        ),
        ({"batch_topk_init": 9}, "no threshold"),
        ({"trainer": "BatchTopKTrainer"}, "trainer_class = BatchTopKTrainer.*no threshold"),
        ({"activation": "JumpReLU", "l0": 20}, "activation = JumpReLU, l0 = 20"),
        ({"dictionary": {"kind": "BatchTopK"}}, "kind = BatchTopK"),
        ({"act_fn": "gelu"}, "act_fn = gelu"),
        ({"activation": "Softplus"}, "activation = Softplus"),
        ({"hook_point": "blocks.3.attn.hook_z"}, "trained at blocks.3.attn.hook_z"),
        ({"hook_point": "blocks.0.hook_resid_pre"}, "output of a decoder layer"),
    ],
)
def test_another_rule_or_another_place_is_refused(tmp_path, cfg, says):
    published(tmp_path, cfg)
    with pytest.raises(UserError, match=says):
        read_foreign(tmp_path, ORDER, SCALES)


@pytest.mark.fault("bad input")
@pytest.mark.parametrize(
    "also, says",
    [
        ({"log_threshold": torch.zeros(F)}, "also holds log_threshold"),
        ({"b_enc": torch.full((F,), np.nan)}, "b_enc has .* not finite"),
        ({"b_dec": torch.zeros(M, D + 1)}, r"b_dec has shape \[2, 7\].*\[2, 6\]"),
        ({"W_enc": torch.zeros(D, F)}, "must have 3 dimensions, one of them the models"),
        ({"W_dec": torch.zeros(M, F, D)}, r"W_dec has shape .* the encoder's weights ask for"),
        ({"W_enc": torch.zeros(M, D, F, dtype=torch.int8)}, "W_enc is torch.int8.*floating-point numbers"),
        ({"W_enc": torch.zeros(M, D, F).to(torch.float8_e4m3fn)}, "W_enc is torch.float8_e4m3fn"),
        ({"W_dec": torch.zeros(F, M, D) > 0}, "W_dec is torch.bool"),
        ({"W_enc": torch.zeros(M, D, F).to_sparse()}, "W_enc is torch.float32, torch.sparse_coo"),
        ({"threshold": torch.ones(F)}, "one for all can"),
        ({"threshold": torch.tensor(-1.0), "k": torch.tensor(5)}, "never set in training"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(tmp_path, also, says):
    published(tmp_path, **also)
    with pytest.raises(UserError, match=says):
        read_foreign(tmp_path, ORDER, SCALES)


class Malicious:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.mkdir, (str(self.file),)


def test_a_file_that_would_run_code_is_refused_and_runs_none(tmp_path):
    trap = tmp_path / "was_run"
    state, _ = published(tmp_path / "a")
    torch.save(state | {"extra": Malicious(trap)}, tmp_path / "a" / "cc_weights.pt")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "cc_weights.pt").write_bytes(pickle.dumps(Malicious(trap)))
    for folder in ("a", "b"):
        with pytest.raises(UserError, match="could run code"):
            read_foreign(tmp_path / folder, ORDER, SCALES)
    assert not trap.exists()
    pickle.loads((tmp_path / "b" / "cc_weights.pt").read_bytes())
    assert trap.exists()  # it was no empty threat


@pytest.mark.parametrize(
    "name, content",
    [("w.pt", b""), ("w.pt", b"PK\x03\x04 half a zip"), ("w.safetensors", b"\x10\0\0\0\0\0\0\0{")],
)
def test_a_damaged_file_is_one_sentence(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match="damaged"):
        read_foreign(tmp_path, ORDER, SCALES)


def test_several_weights_none_or_other_ones(tmp_path):
    with pytest.raises(UserError, match="no weights"):
        read_foreign(tmp_path, ORDER, SCALES)
    published(tmp_path, weights="0.pt")
    published(tmp_path, weights="1.pt", config="1_cfg.json", cfg={"hook_point": "blocks.3.hook_resid_post"})
    with pytest.raises(UserError, match="several files of weights.*0.pt, 1.pt"):
        read_foreign(tmp_path, ORDER, SCALES)
    # its own configuration comes first
    assert read_foreign(tmp_path / "1.pt", ORDER, SCALES).layers["base"] == 3
    save_file({"weight": torch.zeros(3)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="in no format that is known here: it holds weight"):
        read_foreign(tmp_path / "x.safetensors", ORDER, SCALES)


# --- dictionary_learning ------------------------------------------------------------------------------------


def saved(folder, kind="CROSSCODER", threshold=None, normalised=True, config=None, **also):
    """What the fork's CrossCoder (no threshold) or BatchTopKCrossCoder saves to the hub."""
    W_enc, W_dec, b_enc, b_dec, x = draw(1)
    mean, std = (
        x.mean(0),
        torch.rand(M, D, generator=torch.Generator().manual_seed(2)) + torch.tensor([[4.0], [0.2]]),
    )
    nothing = torch.full((M, D), torch.nan)
    state = {
        "encoder.weight": W_enc,
        "encoder.bias": b_enc,
        "decoder.weight": W_dec,
        "decoder.bias": b_dec,
        "code_normalization_id": torch.tensor(KINDS.index(kind) + 1),
        "target_rms": torch.tensor(3.0),
        "activation_mean": mean if normalised else nothing,
        "activation_std": std if normalised else nothing,
        "activation_global_scale": (
            3.0 / (std.square().sum(-1) + 1e-8).sqrt() if normalised else torch.ones(M)
        ),
    }
    if threshold is not None:
        state |= {"threshold": torch.tensor(threshold), "k": torch.tensor(7, dtype=torch.int32)}
    state |= also
    content = {
        "activation_dim": D,
        "dict_size": F,
        "num_layers": M,
        "code_normalization": kind,
        "encoder_layers": None,
        "latent_processor": None,
        "num_decoder_layers": None,
        "code_normalization_alpha_sae": 0.7,
        "code_normalization_alpha_cc": 0.3,
        "target_rms": 3.0,
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.clone().contiguous() for k, v in state.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(content | (config or {})))
    return state, x


def dictionary_learning(state, x, kind="CROSSCODER", alphas=(0.7, 0.3)):
    """Its formulas in float64: normalise, encode, keep what is above the threshold once normalised, decode,
    denormalise.
    """
    s = {k: v.double() for k, v in state.items()}
    x, normalised = x.double(), not torch.isnan(s["activation_mean"]).any()
    if normalised:
        x = (x - s["activation_mean"]) * s["activation_global_scale"][None, :, None]
    f = torch.relu(torch.einsum("bld,ldf->bf", x, s["encoder.weight"]) + s["encoder.bias"])
    if "threshold" in s:
        w = s["decoder.weight"]
        n = {
            "CROSSCODER": w.norm(dim=2).sum(0),
            "SAE": w.norm(dim=(0, 2)),
            "NONE": torch.ones(F, dtype=torch.float64),
            "MIXED": alphas[0] * w.norm(dim=(0, 2)) + alphas[1] * w.norm(dim=2).sum(0),
        }[kind]
        f = f * (f * n > s["threshold"])
    x_hat = torch.einsum("bf,lfd->bld", f, s["decoder.weight"]) + s["decoder.bias"]
    if normalised:
        x_hat = x_hat / (s["activation_global_scale"][None, :, None] + 1e-8) + s["activation_mean"]
    return f, x_hat


@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize(
    "kind, threshold",
    [
        ("CROSSCODER", None),
        ("CROSSCODER", 1.5),
        ("SAE", 1.0),
        ("MIXED", 1.2),
        ("NONE", 1.0),
        ("DECOUPLED", None),
    ],
)
def test_dictionary_learning_is_the_same_function(tmp_path, kind, threshold, normalised):
    state, x = saved(tmp_path, kind, threshold, normalised)
    found = read_foreign(tmp_path, ORDER, layer=13)
    f, x_hat = dictionary_learning(state, x, kind)
    same(found.crosscoder, x, f, x_hat)
    # NRN is exactly theirs
    torch.testing.assert_close(found.crosscoder.norms(), state["decoder.weight"].norm(dim=2), rtol=0, atol=0)
    assert found.has_means == normalised
    if normalised:
        means = torch.stack([found.crosscoder.mean(n, raw=True) for n in ORDER])
        torch.testing.assert_close(means, state["activation_mean"], rtol=1e-5, atol=1e-5)
    if threshold is not None:
        plain = (dictionary_learning({k: v for k, v in state.items() if k != "threshold"}, x)[0] > 0).sum()
        assert 0.05 < (f > 0).sum() / plain < 0.95


def test_code_normalisations_are_told_apart(tmp_path):
    """The same threshold keeps other features under another normalisation: reading them all as one would
    show.
    """
    fired = {}
    for kind in ("CROSSCODER", "SAE", "MIXED", "NONE"):
        _, x = saved(tmp_path / kind, kind, 1.2)
        fired[kind] = read_foreign(tmp_path / kind, ORDER, layer=1).crosscoder.encode(raw(x)) > 0
    for kind in ("SAE", "MIXED", "NONE"):
        assert (fired[kind] != fired["CROSSCODER"]).any()


def test_a_compiled_checkpoint_with_its_trainers_configuration(tmp_path):
    state, x = saved(tmp_path / "hub", threshold=1.5)
    folder = tmp_path / "trainer"
    folder.mkdir()
    torch.save({f"_orig_mod.{k}": v for k, v in state.items()}, folder / "model_final.pt")
    trainer = {
        "dict_class": "BatchTopKCrossCoder",
        "layer": 13,
        "k": 7,
        "lm_name": "org/pair",
        "code_normalization": "CROSSCODER",
    }
    (folder / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": None}))
    with pytest.raises(UserError, match="lm_name = org/pair"):
        read_foreign(folder)
    found = read_foreign(folder, ORDER)
    assert found.layers == {"base": 13, "distilled": 13} and found.crosscoder.k == 7
    same(found.crosscoder, x, *dictionary_learning(state, x))


def test_an_old_file_without_buffers_on_activations_scaled_elsewhere(tmp_path):
    state, x = saved(tmp_path, normalised=False)
    old = {k: v for k, v in state.items() if k.startswith(("encoder", "decoder"))}
    save_file({k: v.contiguous() for k, v in old.items()}, tmp_path / "model.safetensors")
    s = torch.tensor([0.37, 2.4])[None, :, None]
    f, x_hat = dictionary_learning(state, x * s)
    same(read_foreign(tmp_path, ORDER, SCALES, 2).crosscoder, x, f, x_hat / s)


@pytest.mark.fault("bad input")
@pytest.mark.parametrize(
    "options, says",
    [
        (dict(kind="DECOUPLED", threshold=1.0), "DECOUPLED"),
        (dict(threshold=[1.0, 2.0]), "2 thresholds"),
        (dict(threshold=-1.0), "never set"),
        (dict(k=torch.tensor(7)), "not trained with ReLU alone .k = 7., but has no threshold"),
        (dict(config={"trainer": {"dict_class": "BatchTopKCrossCoder"}}), "BatchTopKCrossCoder., but has no"),
        (dict(config={"trainer": {"k": 50}}), "k = 50.*cannot be known from it"),
        (dict(config={"encoder_layers": [0]}), "encoder_layers = "),
        (dict(config={"latent_processor": "f"}), "latent_processor"),
        (dict(config={"num_decoder_layers": 3}), "num_decoder_layers = 3"),
        (
            dict(threshold=1.0, config={"code_normalization": "SAE"}),
            "normalisation CROSSCODER, and its configuration says SAE",
        ),
        (
            dict(threshold=1.0, kind="MIXED", config={"trainer": {"code_normalization_alpha_sae": 0.5}}),
            "alpha_sae = 0.5, .* says 0.7",
        ),
        (dict(activation_global_scale=torch.tensor([1.0, 0.0])), "2 positive numbers"),
        (dict(activation_mean=torch.zeros(D)), r"must be \[2, 6\]"),
        (dict(activation_mean=torch.full((M, D), np.inf)), "positive numbers, all finite"),
        (dict(threshold=1.0, code_normalization_id=torch.tensor(9)), "the code normalisation 9: known are"),
        (dict(config={"trainer": {"layer": "two"}}), "layer is 'two': it must be an integer"),
    ],
)
def test_what_no_crosscoder_here_can_express_is_refused(tmp_path, options, says):
    saved(tmp_path, **options)
    with pytest.raises(UserError, match=says):
        read_foreign(tmp_path, ORDER, layer=2)


def test_scales_are_not_given_twice(tmp_path):
    saved(tmp_path)
    with pytest.raises(UserError, match="scales must not be given"):
        read_foreign(tmp_path, ORDER, SCALES, 2)


# --- ours, for others ---------------------------------------------------------------------------------------


def ours(variant="batchtopk", widths=(D, D)):
    crosscoder = CrossCoder(widths, F, ORDER, variant, 5, [0.37, 2.4], seed=3)
    W_enc, W_dec, b_enc, b_dec, x = draw(4)
    with torch.no_grad():
        crosscoder.W_enc.copy_(W_enc.permute(2, 0, 1).reshape(F, -1))
        crosscoder.W_dec.copy_(W_dec.permute(1, 0, 2).reshape(F, -1))
        crosscoder.b_dec.copy_(b_dec.flatten())
        crosscoder.b_enc.copy_(b_enc)
        crosscoder.threshold.fill_(1.5 if variant == "batchtopk" else 0)
        crosscoder.means.copy_(torch.linspace(-1, 2, sum(widths)))
    return crosscoder.eval().requires_grad_(False), x


def test_exported_for_the_replication(tmp_path):
    crosscoder, x = ours("l1")
    export_replication(crosscoder, tmp_path, layer=4)
    state = torch.load(tmp_path / "cc_weights.pt", weights_only=True)
    cfg = json.loads((tmp_path / "cfg.json").read_text())
    assert {k: tuple(v.shape) for k, v in state.items()} == {
        "W_enc": (M, D, F),
        "W_dec": (F, M, D),
        "b_enc": (F,),
        "b_dec": (M, D),
    }
    assert {"dict_size", "d_in", "enc_dtype", "seed", "dec_init_norm", "device"} <= cfg.keys()
    assert cfg["hook_point"] == "blocks.4.hook_resid_post"
    f, x_hat = replication(state, x, [0.37, 2.4])  # as their code computes it
    same(crosscoder, x, f, x_hat)
    back = read_foreign(tmp_path)  # our own file says all that is needed
    same(back.crosscoder, x, f, x_hat)
    assert back.layers == {"base": 4, "distilled": 4}
    torch.testing.assert_close(back.crosscoder.nrn(), crosscoder.nrn(), rtol=0, atol=0)


@pytest.mark.parametrize("variant", ["l1", "batchtopk"])
def test_exported_for_dictionary_learning(tmp_path, variant):
    crosscoder, x = ours(variant)
    export_dictionary_learning(crosscoder, tmp_path, layer=4)
    state = load_file(tmp_path / "model.safetensors")
    assert (
        ("threshold" in state)
        == ("k" in json.loads((tmp_path / "config.json").read_text()))
        == (variant == "batchtopk")
    )
    std, g = state["activation_std"].double(), state["activation_global_scale"].double()
    # as it is computed there
    torch.testing.assert_close(
        state["target_rms"] / (std.square().sum(-1) + 1e-8).sqrt(), g, rtol=1e-5, atol=0
    )
    f, x_hat = dictionary_learning(state, x)
    same(crosscoder, x, f, x_hat)
    back = read_foreign(tmp_path).crosscoder
    same(back, x, f, x_hat)
    torch.testing.assert_close(back.nrn(), crosscoder.nrn(), rtol=0, atol=0)
    torch.testing.assert_close(back.means, crosscoder.means, rtol=1e-5, atol=1e-6)


def test_a_scale_so_small_that_the_1e_8_there_counts(tmp_path):
    """Activations of norm 1e5: what is added to the scale in decoding alone would be a thousandth."""
    crosscoder, x = ours()
    crosscoder.scales[0] = 1e-5
    x[:, 0] *= 0.37 / 1e-5
    export_dictionary_learning(crosscoder, tmp_path, layer=4)
    f, x_hat = dictionary_learning(load_file(tmp_path / "model.safetensors"), x)
    s = crosscoder.scales[:, None]
    for made in (crosscoder, read_foreign(tmp_path).crosscoder):
        torch.testing.assert_close(made.encode(raw(x)).double(), f, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(
            torch.stack(made.decode(f.float()), 1).double() * s, x_hat * s, rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize(
    "export, variant, widths, says",
    [
        (export_replication, "batchtopk", (D, D), "ReLU alone.*export_dictionary_learning"),
        (export_replication, "topk", (D, D), "ReLU alone"),
        (export_dictionary_learning, "topk", (D, D), "not the k largest"),
        (export_dictionary_learning, "jumprelu", (D, D), "not one for each"),
        (export_replication, "l1", (D, D + 2), "widths 6, 8"),
        (export_dictionary_learning, "l1", (D, D + 2), "widths 6, 8"),
    ],
)
def test_what_a_format_cannot_express_is_refused(tmp_path, export, variant, widths, says):
    with pytest.raises(UserError, match=says):
        export(CrossCoder(widths, F, ORDER, variant, 5), tmp_path / "out", layer=1)
    assert not (tmp_path / "out").exists()


def test_an_export_contradicted_is_refused(tmp_path):
    crosscoder, _ = ours("l1")
    export_replication(crosscoder, tmp_path, layer=4)
    with pytest.raises(UserError, match="origin.json.*one of them is wrong"):
        read_foreign(tmp_path, ORDER[::-1])
