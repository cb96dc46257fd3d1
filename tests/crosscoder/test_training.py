"""Training on small stores: what it must find and refuse, and that an interruption changes nothing."""

import numpy as np
import pandas as pd
import pytest
import torch

from lib.activations.store import open_store
from lib.crosscoder import health
from lib.crosscoder.codes import firing_frequency
from lib.crosscoder.health import cross_entropies, health_card
from lib.crosscoder.model import CrossCoder
from lib.crosscoder.norms import census, tails
from lib.crosscoder.training import TrainConfig, Trainer, read_log, train
from lib.models.pairs import half_depth
from lib.runs import Run
from lib.settings import UserError
from tests.toys import Interrupted, StopAt, toy_model, toy_pair, toy_store


class MemoryStore:
    """A stand-in for the store: arrays in memory, documents of ten tokens, the last tenth of them to
    report on.
    """

    fingerprint = "memory"

    def __init__(self, *arrays: np.ndarray, names=("base", "distilled", "third")):
        self.arrays = [torch.as_tensor(a, dtype=torch.float32) for a in arrays]
        self.models = names[: len(arrays)]
        self.widths = {n: a.shape[1] for n, a in zip(self.models, self.arrays)}
        self.scales = {
            n: a.shape[1] ** 0.5 / a.norm(dim=1).mean().item() for n, a in zip(self.models, self.arrays)
        }
        self.means = {n: a.double().mean(0) for n, a in zip(self.models, self.arrays)}
        self.documents = np.arange(len(arrays[0])) // 10

    def rows(self, split):
        border = len(self.arrays[0]) * 9 // 10
        return np.arange(border) if split == "train" else np.arange(border, len(self.arrays[0]))

    def __len__(self):
        return len(self.arrays[0])

    def count(self, split):
        return len(self.rows(split))

    def activations(self, rows):
        return [a[torch.as_tensor(rows)] for a in self.arrays]

    def order(self, split, seed, epoch):
        return np.random.default_rng([seed, epoch]).permutation(self.rows(split))

    def reader(self, split, batch_size, seed, epoch=0, start=0, memory=None, part=(0, 1)):
        order = self.order(split, seed, epoch)
        for first in range(start * batch_size, len(order), batch_size):
            rows = order[first : first + batch_size][part[0] :: part[1]]
            yield rows, self.activations(rows)


def planted(n=20_000, d=24, per_side=(16, 8, 8), active=3, seed=0):
    """Activations with a known dictionary: shared, base-only and distilled-only unit directions, each rarely
    active.
    """
    rng = np.random.default_rng(seed)
    total = sum(per_side)
    directions = rng.standard_normal((2, total, d))
    directions /= np.linalg.norm(directions, axis=-1, keepdims=True)
    shared, base_only, _ = per_side
    directions[1, shared : shared + base_only] = 0
    directions[0, shared + base_only :] = 0
    codes = (rng.random((n, total)) < active / total) * rng.uniform(1, 2, (n, total))
    return MemoryStore(codes @ directions[0], codes @ directions[1]), directions, codes


def gaussian(n=600, widths=(6, 6), seed=0) -> MemoryStore:
    rng = np.random.default_rng(seed)
    return MemoryStore(*(rng.standard_normal((n, w)) + 1 for w in widths))


TIMES = ("tokens_per_second", "waiting")  # of a line of the log: they differ from run to run
SMALL = TrainConfig(n_features=24, k=4, tokens=3000, batch_size=64, aux_k=8)


def test_a_planted_dictionary_is_found(tmp_path):
    store, directions, codes = planted()
    config = TrainConfig(n_features=48, k=3, tokens=160_000, batch_size=256, rate=3e-3, aux_k=8)
    crosscoder = train(store, config, tmp_path)
    card = health_card(crosscoder, store)
    assert card["fve_base"]["value"] > 0.95 and card["fve_distilled"]["value"] > 0.95
    alive = firing_frequency(crosscoder, store) > 0
    joined = np.concatenate(directions, axis=1)
    joined /= np.linalg.norm(joined, axis=1, keepdims=True)
    rows = torch.cat([crosscoder.rows(n, raw=True) for n in crosscoder.names], dim=1).numpy()
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    similarity = joined @ rows[alive].T
    assert np.mean(similarity.max(axis=1) > 0.95) > 0.9  # nearly every planted direction has its feature
    nrn = crosscoder.nrn(p=2).numpy()[alive][similarity.argmax(axis=1)]
    found = similarity.max(axis=1) > 0.95
    for side, where in ((0.5, slice(0, 16)), (0.0, slice(16, 24)), (1.0, slice(24, 32))):
        assert np.abs(nrn[where][found[where]] - side).max() < 0.1
    assert card["l0"]["value"] == pytest.approx(3, abs=0.5) and card["l0_target"]["value"] == 3


def test_l1_learns_sparse_codes(tmp_path):
    store, _, _ = planted(n=8000)
    config = TrainConfig(n_features=48, variant="l1", l1=1.0, tokens=80_000, batch_size=256, rate=3e-3)
    crosscoder = train(store, config, tmp_path)
    card = health_card(crosscoder, store)
    assert card["fve_base"]["value"] > 0.7 and card["l0"]["value"] < 12 and "l0_target" not in card
    assert float(crosscoder.threshold) == 0


def test_dead_features_come_back_through_the_auxiliary_loss(tmp_path):
    store, _, _ = planted(n=4000)
    shares = {}
    for aux in (0.0, 1.0):
        trainer = Trainer(
            store, TrainConfig(n_features=48, k=3, tokens=40_000, batch_size=128, rate=3e-3, aux=aux, aux_k=8)
        )
        with torch.no_grad():
            trainer.crosscoder.W_dec[24:] *= 1e-3  # of no strength: they lose every selection
        trainer.run_until(40_000)
        shares[aux] = trainer.log[-1]["dead"]
    assert shares[0.0] > 0.4 and shares[1.0] < shares[0.0] - 0.2


@pytest.mark.parametrize("variant,dedicated", [("batchtopk", 0.0), ("l1", 0.0), ("jumprelu", 0.1)])
def test_resumed_equals_uninterrupted(tmp_path, variant, dedicated):
    store = gaussian()
    config = TrainConfig(
        n_features=24,
        k=4,
        variant=variant,
        tokens=3000,
        batch_size=64,
        aux_k=8,
        dead_after=0.01,
        dedicated=dedicated,
    )
    straight = train(store, config, tmp_path / "straight", StopAt(1e9))
    for at in (500, 1080, 2000):  # 540 training tokens: the second is the end of an epoch
        with pytest.raises(Interrupted):
            train(store, config, tmp_path / "broken", StopAt(at), checkpoint_seconds=0)
    assert list((tmp_path / "broken").glob("checkpoint-*.pt"))
    resumed = train(store, config, tmp_path / "broken", StopAt(1e9))
    for name, tensor in straight.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
    logs = [read_log(tmp_path / f) for f in ("straight", "broken")]
    for a, b in zip(*logs, strict=True):
        assert {k: v for k, v in a.items() if k not in TIMES} == {
            k: v for k, v in b.items() if k not in TIMES
        }
    assert not list((tmp_path / "broken").glob("checkpoint-*"))


def test_jumprelu_reaches_the_l0_that_it_is_told(tmp_path):
    """Far from where BatchTopK's common threshold would leave it: thresholds have parted."""
    store, _, _ = planted(n=4000)
    config = TrainConfig(
        n_features=48, variant="jumprelu", k=3, tokens=40_000, batch_size=128, rate=3e-3, aux_k=8
    )
    crosscoder = train(store, config, tmp_path)
    card = health_card(crosscoder, store, n_boot=20)
    assert card["l0"]["value"] == pytest.approx(3, rel=0.1) and card["fve_base"]["value"] > 0.8
    theta = crosscoder.log_theta.exp()
    assert theta.std() > 0.05 * theta.mean() and len(set(theta.tolist())) > 40
    log = read_log(tmp_path)
    assert log[-1]["threshold"] == pytest.approx(theta.mean().item(), rel=1e-3) and log[-1][
        "l0"
    ] == pytest.approx(3, rel=0.1)


@pytest.mark.parametrize("variant", ["batchtopk", "topk", "l1", "jumprelu"])
def test_dedicated_features_have_nothing_in_another_model(variant):
    """Bitwise: weights, moments, whatever fires, in blocks for three models of unlike widths."""
    store = gaussian(n=600, widths=(8, 12, 16))
    config = TrainConfig(
        n_features=40,
        k=6,
        variant=variant,
        tokens=2000,
        batch_size=64,
        aux_k=8,
        dead_after=0.02,
        dedicated=0.1,
    )
    trainer = Trainer(store, config)
    began = trainer.crosscoder.W_dec.detach().clone()
    trainer.run_until(1200)
    state = trainer.state()
    resumed = Trainer(store, config)
    resumed.restore(state)
    resumed.run_until(2000)
    # dead ones took part
    assert variant == "l1" or max(line["auxiliary"] for line in trainer.log + resumed.log) > 0
    for trained in (trainer, resumed):
        crosscoder, trained_by = trained.crosscoder, trained.optimizer.state
        trained.close()
        for m, name in enumerate(store.models):
            own = crosscoder.owner == m
            foreign = [
                i
                for other in store.models
                if other != name
                for i in range(*crosscoder.columns(other).indices(36))
            ]
            for weights in (crosscoder.W_enc, crosscoder.W_dec):
                moments = [trained_by[weights][key] for key in ("exp_avg", "exp_avg_sq")]
                for tensor in (weights.detach(), *moments):
                    block = tensor[own][:, foreign].contiguous()
                    assert (
                        own.sum() == 4
                        and block.shape == (4, len(foreign))
                        and not block.view(torch.int32).any()
                    )
                    assert tensor[own][:, crosscoder.columns(name)].count_nonzero() > 0
        assert (crosscoder.W_dec - began).abs().max() > 0.01
    nrn = resumed.crosscoder.nrn(p=2, model="third", reference="base")
    owner = resumed.crosscoder.owner
    assert (nrn[owner == 0] == 0).all() and (nrn[owner == 2] == 1).all() and nrn[owner == 1].isnan().all()


def test_three_models_of_unlike_widths_from_end_to_end(tmp_path):
    store = gaussian(n=600, widths=(8, 12, 16))
    crosscoder = train(
        store, TrainConfig(n_features=40, k=6, tokens=3000, batch_size=64, aux_k=8, dedicated=0.1), tmp_path
    )
    norms = crosscoder.norms(2)
    for i, of in enumerate(store.models):
        for j, against in enumerate(store.models):
            wanted = norms[i] / (norms[i] + norms[j])
            assert torch.equal(crosscoder.nrn(2, of, against).nan_to_num(-1), wanted.nan_to_num(-1))
            if i != j:
                with pytest.raises(
                    UserError, match=r"differ in width \(base \(8\), distilled \(12\), third \(16\)\)"
                ):
                    crosscoder.cosine(of, against)
    acts = store.activations(np.arange(5))
    for m, name in enumerate(store.models):  # the others at their means
        at_means = [
            a if m == n else crosscoder.mean(other, raw=True).expand_as(a)
            for n, (other, a) in enumerate(zip(store.models, acts))
        ]
        assert torch.allclose(crosscoder.encode_from(name, acts[m]), crosscoder.encode(at_means), atol=1e-5)
    decoded = crosscoder.decode(crosscoder.encode(acts))
    assert [d.shape for d in decoded] == [(5, 8), (5, 12), (5, 16)] and [a.shape for a in acts] == [
        d.shape for d in decoded
    ]
    card = health_card(crosscoder, store, n_boot=20)
    assert all(0 < card[f"fve_{name}"]["value"] < 1 for name in store.models)


def test_an_option_that_does_nothing_makes_no_run_stale():
    store, plain = gaussian(n=100), TrainConfig()
    mark = plain.fingerprint(store)
    assert mark == TrainConfig(bandwidth=0.3, l0=2.0).fingerprint(store)
    assert mark != TrainConfig(dedicated=0.1).fingerprint(store) and mark != TrainConfig(seed=1).fingerprint(
        store
    )
    assert (
        len(
            {
                TrainConfig(variant="jumprelu", **option).fingerprint(store)
                for option in ({}, {"bandwidth": 0.3}, {"l0": 2.0})
            }
        )
        == 3
    )


def test_a_finished_run_is_loaded_and_another_config_is_not(tmp_path):
    store = gaussian()
    first = train(store, SMALL, tmp_path)
    written = (tmp_path / "crosscoder.safetensors").stat().st_mtime_ns
    again = train(store, SMALL, tmp_path, StopAt(0))
    assert (
        torch.equal(first.W_dec, again.W_dec)
        and (tmp_path / "crosscoder.safetensors").stat().st_mtime_ns == written
    )
    other = TrainConfig(n_features=24, k=4, tokens=3000, batch_size=64, aux_k=8, seed=1)
    with pytest.raises(Interrupted):
        train(store, other, tmp_path, StopAt(0))
    assert not torch.equal(train(store, other, tmp_path).W_dec, first.W_dec)


def test_distinct_tokens_are_counted_and_a_repeating_store_is_refused(tmp_path):
    store = gaussian()
    crosscoder = train(store, SMALL, tmp_path / "whole")
    assert crosscoder.seen[0] >= 3000 and crosscoder.seen[1] == 540
    part = TrainConfig(n_features=24, k=4, tokens=300, batch_size=50, aux_k=8)
    assert train(store, part, tmp_path / "part").seen.tolist() == [300, 300]
    store.order = lambda split, seed, epoch: np.arange(100).repeat(6)
    with pytest.raises(UserError, match="repeats itself before it has shown all"):
        train(store, SMALL, tmp_path / "repeats")


def test_non_finite_activations_are_named(tmp_path):
    store = gaussian()
    store.arrays[1][17, 2] = float("nan")
    with pytest.raises(UserError, match=r"activations of distilled are not finite \(store rows 17, "):
        train(store, SMALL, tmp_path)


def test_a_loss_that_explodes_is_refused(tmp_path):
    with pytest.raises(UserError, match="lower the learning rate"):
        train(
            gaussian(),
            TrainConfig(n_features=24, k=4, tokens=3000, batch_size=64, rate=1e30, warmup=0.0),
            tmp_path,
        )


def test_schedules():
    config = TrainConfig(rate=2.0, warmup=0.1, decay=0.2, l1=4.0, l1_warmup=0.05)
    assert [config.learning_rate(t) for t in (0, 0.05, 0.1, 0.5, 0.8, 0.9, 1)] == pytest.approx(
        [0, 1, 2, 2, 2, 1, 0]
    )
    assert [config.sparsity_weight(t) for t in (0, 0.025, 0.05, 1)] == pytest.approx([0, 2, 4, 4])
    with pytest.raises(UserError, match="k is 0: it must be an integer of at least 1"):
        TrainConfig(k=0)
    with pytest.raises(UserError, match="k is 1025: it must be an integer from 1 to 1024"):
        TrainConfig(k=1025)
    with pytest.raises(UserError, match="variant is 'relu'"):
        TrainConfig(variant="relu")


def test_fve_and_l0_by_hand():
    """One feature that is the sum of two coordinates; everything else is arithmetic."""
    rng = np.random.default_rng(0)
    store = gaussian(n=400, widths=(2, 3))
    crosscoder = CrossCoder((2, 3), 2, k=1)
    with torch.no_grad():
        for p in crosscoder.parameters():
            p.copy_(torch.as_tensor(rng.standard_normal(p.shape)))
    card = health_card(crosscoder, store, n_boot=50)
    rows = store.rows("report")
    x = [a[rows].double().numpy() for a in store.arrays]
    f = np.maximum(
        np.concatenate(x, 1) @ crosscoder.W_enc.detach().double().numpy().T
        + crosscoder.b_enc.detach().double().numpy(),
        0,
    )
    for m, name in enumerate(("base", "distilled")):
        x_hat = f @ crosscoder.rows(name).double().numpy() + crosscoder.bias(name).double().numpy()
        expected = 1 - ((x[m] - x_hat) ** 2).sum() / ((x[m] - x[m].mean(0)) ** 2).sum()
        assert (
            card[f"fve_{name}"]["value"] == pytest.approx(expected, rel=1e-4)
            and card[f"fve_{name}"]["n"] == 4
        )
    assert card["l0"]["value"] == pytest.approx((f > 0).sum(1).mean())
    assert card["l0"]["ci"][0] <= card["l0"]["value"] <= card["l0"]["ci"][1]
    assert firing_frequency(crosscoder, store).tolist() == pytest.approx((f > 0).mean(0).tolist())


@pytest.fixture(scope="module")
def harvested(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    store = toy_store(folder)
    pair = toy_pair(folder)
    return store, {name: pair.load(name) for name in store.models}


class Perfect(CrossCoder):
    """A stand-in that reconstructs exactly: features are the activations, shifted to be positive."""

    def encode(self, acts):
        return torch.cat([a + 1000 for a in acts], dim=-1)

    def decode(self, f):
        return [part - 1000 for part in f.split(self.widths, dim=-1)]


def test_cross_entropy_of_an_exact_reconstruction_is_the_models_own(harvested):
    store, models = harvested
    crosscoder = Perfect([store.widths[n] for n in store.models], 40, store.models, k=1)
    crosscoder.centre([store.means[n] for n in store.models])
    poor = CrossCoder([store.widths[n] for n in store.models], 40, store.models, k=1)
    poor.centre([store.means[n] for n in store.models])
    for name, model in models.items():
        (alone,) = cross_entropies([poor], store, name, model, max_tokens=2000)
        other, ce = cross_entropies([poor, crosscoder], store, name, model, max_tokens=2000)
        for kind, sums in alone.items():  # the same beside another crosscoder
            assert sums == pytest.approx(other[kind], rel=1e-4)
        # the store keeps float16
        assert ce["reconstruction"].sum() == pytest.approx(ce["own"].sum(), rel=2e-3)
        assert abs(ce["mean"].sum() - ce["own"].sum()) > 0.01 * ce["own"].sum()
        document = int(store.documents[store.rows("report")[0]])
        of_it = np.flatnonzero(store.documents == document)
        ids = torch.as_tensor(store.tokens[of_it].astype(np.int64))[None]
        with torch.no_grad():
            by_hand = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None]).sum()
        # transformers alone, without padding or nnsight
        assert np.isclose(ce["own"], -by_hand.item(), rtol=1e-4).any()


def test_the_mean_replaces_kept_positions_only(harvested):
    """Against a plain hook: BOS keeps its own activation, every kept position gets the mean."""
    store, models = harvested
    model = models["distilled"]
    crosscoder = Perfect([store.widths[n] for n in store.models], 40, store.models, k=1)
    crosscoder.centre([store.means[n] for n in store.models])
    (ce,) = cross_entropies([crosscoder], store, "distilled", model, max_tokens=1)  # one document
    assert len(ce["own"]) == 1
    mean = store.means["distilled"].float()
    sums = []
    for document in np.unique(store.documents[store.rows("report")]):
        of_it = np.flatnonzero(store.documents == document)
        ids = torch.as_tensor(store.tokens[of_it].astype(np.int64))[None]
        kept = torch.as_tensor(store.kept[of_it])[None, :, None]
        handle = model.model.layers[half_depth(model)].register_forward_hook(
            lambda _, __, h, kept=kept: torch.where(kept, mean, h)
        )
        with torch.no_grad():
            sums.append(-model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None]).sum().item())
        handle.remove()
    assert np.isclose(sums, ce["mean"][0], rtol=1e-4).any()


@pytest.mark.parametrize(
    ("lost", "value"), [([2.0, 3.0, 1.0], 0.5), ([2.0, -3.0, 1.5], np.nan), ([-2.0] * 3, np.nan)]
)
def test_recovered_is_not_defined_where_the_mean_is_as_good_as_the_model(lost, value, tmp_path, monkeypatch):
    store = toy_store(tmp_path, tokens=1500)
    own, lost = np.array([5.0, 7.0, 6.0]), np.array(lost)
    ce = {"own": own, "mean": own + lost, "reconstruction": own + lost / 2, "tokens": np.ones(3)}
    monkeypatch.setattr(health, "cross_entropies", lambda *args: [ce])
    card = health_card(
        CrossCoder((16, 24), 8, k=2, names=tuple(store.models)), store, {"base": None}, n_boot=20
    )
    assert np.isclose(card["ce_recovered_base"]["value"], value, equal_nan=True)
    assert card["ce_mean_base"]["value"] == pytest.approx((own + lost).mean())


def test_three_models_of_unlike_width_from_a_harvested_store(tmp_path):
    store = toy_store(tmp_path, tokens=1500, widths=(16, 24, 8))
    crosscoder = train(
        store, TrainConfig(n_features=64, k=8, tokens=6000, batch_size=128, aux_k=8), tmp_path / "crosscoder"
    )
    card = health_card(crosscoder, store, n_boot=20)
    assert {"fve_base", "fve_distilled", "fve_third"} <= set(card)
    assert all(np.isfinite(card[f"fve_{n}"]["value"]) for n in store.models)
    assert crosscoder.nrn(p=2, model="third", reference="base").shape == (64,)
    with pytest.raises(UserError, match="they must be the same models"):
        health_card(CrossCoder((16, 24), 8, k=2), store)


def test_census_and_tails(tmp_path):
    store, _, _ = planted(n=4000)
    crosscoder = train(
        store, TrainConfig(n_features=48, k=3, tokens=40_000, batch_size=256, aux_k=8), tmp_path
    )
    frame = census(crosscoder, store)
    assert (
        list(frame.feature) == list(range(48))
        and (frame.alive == (firing_frequency(crosscoder, store) > 0)).all()
    )
    assert frame.nrn_p2.to_numpy() == pytest.approx(crosscoder.nrn(p=2).numpy())
    assert frame.cosine.to_numpy() == pytest.approx(crosscoder.cosine().numpy(), abs=1e-6)
    by_hand = torch.nn.functional.cosine_similarity(
        crosscoder.rows("base")[0], crosscoder.rows("distilled")[24], dim=0
    )
    assert frame.cosine_shuffled[0] == pytest.approx(by_hand.item(), abs=1e-6)
    counted = tails(pd.DataFrame({"nrn": [0.05, 0.2, 0.5, 0.95, np.nan]})).set_index("cut-off")
    assert counted.features.to_dict() == {"< 0.1": 1, "< 0.3": 2, "> 0.7": 1, "> 0.9": 1}
    assert counted.share["< 0.3"] == 0.5 and counted.low["< 0.3"] < 0.5 < counted.high["< 0.3"]


def test_a_store_of_other_weights_is_refused(tmp_path):
    run = Run("toy", "t", root=tmp_path)
    toy_store(run.folder, tokens=800)
    pair = toy_pair(run.folder)
    assert open_store(run, pair).models == ("base", "distilled")
    toy_model(16, seed=99).save_pretrained(run.folder / "base")
    with pytest.raises(
        UserError, match="other weights of 'base' .* run notebook 01_harvest_activations again"
    ):
        open_store(run, pair)
    with pytest.raises(UserError, match="run notebook 01_harvest_activations first"):
        open_store(Run("toy", "empty", root=tmp_path), pair)


def test_gradients_live_in_memory_that_is_kept():
    trainer = Trainer(gaussian(), TrainConfig(n_features=128, k=2, tokens=3000, batch_size=64, aux=0))
    trainer.run_until(64)
    places = {name: trainer.buffers[name].data_ptr() for name in ("grad_enc", "grad_dec")}
    trainer.run_until(192)
    assert (
        trainer.crosscoder.W_enc.grad.data_ptr() == places["grad_enc"]
        and trainer.crosscoder.W_dec.grad.data_ptr() == places["grad_dec"]
    )


def test_a_bfloat16_encoder_learns_as_much():
    """It only screens: explained variance after equal steps is within 0.2 points of float32's."""
    store, *_ = planted(n=4000)
    found = []
    for precision in ("float32", "bfloat16"):
        trainer = Trainer(
            store, TrainConfig(n_features=48, k=4, tokens=20_000, batch_size=128, precision=precision)
        )
        found.append(trainer.run_until(20_000)["fve"])
    assert found[0] > 0.5 and abs(found[0] - found[1]) < 0.002
