"""Steps with shapes known beforehand, as a GPU takes them, against the CPU's; nothing asks the device."""

import copy
from dataclasses import replace
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lib.crosscoder import codes, fixed, sparse, training
from lib.crosscoder.model import CrossCoder, auxiliary_loss, forward, sparsity_loss, squared_error
from lib.crosscoder.sparse import encode
from lib.crosscoder.training import TrainConfig, Trainer, doubts, read_log, train
from tests.crosscoder.test_training import SMALL, gaussian, planted

B, D, F = 37, 24, 130


class Asked(TorchDispatchMode):
    """Counts what makes a processor wait for its GPU: values read, and shapes that depend on them."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "unique", "equal.default")

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        places = args[1] if name.startswith("aten.index") and isinstance(args[1], list | tuple) else ()
        by_mask = any(isinstance(i, torch.Tensor) and i.dtype == torch.bool for i in places)
        if by_mask or any(word in name for word in self.WAITS):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def weights():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=generator) for shape in ((F, D), (F,), (F, D), (B, D))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("hint", [0.0, 0.05, 0.7, 1.0, 1.4])
@pytest.mark.parametrize("wanted", [1, 4 * B, B * F])
def test_the_batch_keeps_what_the_cpu_keeps(weights, dtype, hint, wanted):
    W_enc, b_enc, _, x = weights
    per_unit = torch.linspace(0.1, 2, F)
    there = sparse.select_batch(encode(x, W_enc, b_enc, dtype), per_unit, wanted)
    guess = torch.tensor(hint) * there.floor if hint else 0.0
    code = fixed.select_batch(encode(x, W_enc, b_enc, dtype), per_unit, wanted, guess)
    assert len(code.features) == wanted and code.entries == there.entries
    # a bad guess may leave no room, which is said, and is no matter for a good one
    assert code.short == False or hint == 0.05  # noqa: E712
    if not code.short:
        assert torch.allclose(code.dense(), there.dense(), atol=1e-5)
        assert code.floor.item() == pytest.approx(there.floor.item(), rel=1e-5)
        assert torch.equal(code.fired(), there.fired())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_keep_what_the_cpu_keeps(weights, dtype):
    W_enc, b_enc, _, x = weights
    per_unit, among = torch.linspace(0.1, 2, F), torch.arange(3, F, 4)
    allowed = among % 3 > 0
    for features, flags in ((None, None), (among, None), (among, allowed)):
        encoded = encode(x, W_enc, b_enc, dtype)
        left = features if flags is None else features[flags]
        there = sparse.select_rows(encoded, per_unit, 5, left)
        code = fixed.select_rows(encoded, per_unit, 5, features, flags)
        assert torch.allclose(code.dense(), there.dense(), atol=1e-5)
        assert code.floor.item() == pytest.approx(there.floor.item(), rel=1e-5)


def step_of(crosscoder, acts, dead, known, monkeypatch, precision="float32"):
    monkeypatch.setattr(sparse, "COMPILED", not known)
    options = {"among": dead.nonzero()[:, 0]} if known else {}
    out = forward(crosscoder, acts, dead, 4 if crosscoder.variant != "l1" else 0, precision, **options)
    extra = sparsity_loss(crosscoder, out) if crosscoder.variant == "l1" else auxiliary_loss(out)
    crosscoder.zero_grad()
    (squared_error(out) + 0.3 * extra).backward()
    return out, [squared_error(out).item(), extra.item()], [p.grad.clone() for p in crosscoder.parameters()]


@pytest.mark.parametrize("variant", ["batchtopk", "topk", "l1"])
def test_losses_and_gradients_are_those_of_the_cpu(variant, monkeypatch):
    torch.manual_seed(0)
    crosscoder, acts = (
        CrossCoder((8, 12), 64, variant=variant, k=4),
        [torch.randn(33, 8), torch.randn(33, 12)],
    )
    dead = torch.arange(64) % 5 == 0
    _, losses, gradients = step_of(crosscoder, acts, dead, False, monkeypatch)
    out, found, ours = step_of(crosscoder, acts, dead, True, monkeypatch)
    assert isinstance(out.code, fixed.FixedBatch | fixed.DenseBatch)
    assert found == pytest.approx(losses, rel=1e-4)
    for a, b in zip(ours, gradients):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.fixture
def elsewhere(monkeypatch):
    """The CPU takes the steps of a GPU."""
    monkeypatch.setattr(sparse, "COMPILED", False)


@pytest.mark.parametrize("variant", ["batchtopk", "topk", "l1"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_step_asks_the_device_nothing(variant, precision, elsewhere, monkeypatch):
    store = gaussian()
    trainer = Trainer(store, replace(SMALL, variant=variant, precision=precision, dedicated=0.1))
    assert trainer.known
    acts, trainer.among = store.activations(range(64)), torch.arange(3)
    trainer.last_fired[:3] = -1000  # dead
    trainer.train_step(acts)
    for name in ("tolist", "cpu", "numpy", "__float__", "__int__", "__bool__"):
        monkeypatch.setattr(torch.Tensor, name, lambda *_, name=name: pytest.fail(f"{name} of a tensor"))
    for hint in (0.0, trainer.floor):  # without and with a known threshold
        trainer.floor = hint
        with Asked() as asked:
            trainer.train_step(acts)
        assert asked.found == []


@pytest.mark.parametrize("variant", ["batchtopk", "topk", "l1"])
def test_a_run_ends_where_that_of_the_cpu_ends(variant, tmp_path, monkeypatch):
    store, _, _ = planted(n=4000)
    config = TrainConfig(48, variant, k=3, l1=1.0, tokens=40_000, batch_size=256)
    there = train(store, config, tmp_path / "cpu")
    monkeypatch.setattr(sparse, "COMPILED", False)
    here = train(store, config, tmp_path / "known")
    fves = [read_log(tmp_path / name)[-1]["fve"] for name in ("cpu", "known")]
    assert fves[0] == pytest.approx(fves[1], abs=0.01)
    assert here.threshold.item() == pytest.approx(there.threshold.item(), rel=0.05)
    assert read_log(tmp_path / "known")[-1]["short"] == 0
    narrow = train(store, replace(config, precision="bfloat16"), tmp_path / "narrow")
    assert read_log(tmp_path / "narrow")[-1]["fve"] == pytest.approx(fves[0], abs=0.02), narrow


def test_a_resumed_run_ends_with_the_same_bits(elsewhere):
    store = gaussian()
    whole = Trainer(store, SMALL)
    whole.run_until(1200)
    state = copy.deepcopy(whole.state())
    whole.run_until(3000)
    whole.close()
    resumed = Trainer(store, SMALL)
    resumed.restore(state)
    resumed.run_until(3000)
    resumed.close()
    for a, b in zip(whole.crosscoder.state_dict().values(), resumed.crosscoder.state_dict().values()):
        assert torch.equal(a, b)


def test_a_run_that_goes_wrong_is_doubted():
    good = {"step": 600, "tokens": 50_000, "fve": 0.8, "dead": 0.1, "waiting": 0.0}
    config = TrainConfig(tokens=100_000)
    assert doubts(good, config) == []
    bad = {"fve": 0.1, "dead": 0.7, "waiting": 0.9, "short": 60}
    for name, value in bad.items():
        (sentence,) = doubts(good | {name: value}, config)
        assert str(value) in sentence or f"{value:.0%}" in sentence or f"{value:.2f}" in sentence
    early = good | bad | {"step": 10}
    assert len(doubts(early, config)) == 1  # only a reader that starves is known at once


def test_a_run_tells_how_it_is_every_minute_and_writes_a_table(tmp_path, monkeypatch):
    told, file = [], tmp_path / "log.csv"

    class Told:
        def update(self, done, note=""):
            told.append((done, note))

        def close(self):
            pass

    monkeypatch.setattr(training, "MINUTE", 0.0)
    monkeypatch.setattr(training, "LEAST_FVE", 2.0)
    monkeypatch.setattr(training, "SETTLED", 10)
    monkeypatch.setenv("TRAINING_CSV", str(file))
    train(gaussian(), SMALL, tmp_path / "run", Told(), "cpu")
    log = read_log(tmp_path / "run")
    assert len(told) == log[-1]["step"] + len(log)  # after every step, and at every line of the log
    assert "FVE is" in told[-1][1] and "FVE is" not in told[0][1]
    rows = pd.read_csv(file)
    assert rows["tokens"].tolist() == [line["tokens"] for line in log] and rows["fve"].notna().all()


def test_codes_taken_elsewhere_are_those_of_the_crosscoder(monkeypatch):
    store = gaussian(n=300)
    crosscoder, acts = CrossCoder((6, 6), 24, k=4), store.activations(range(300))
    monkeypatch.setattr(codes, "CHUNK", 64)
    f = codes.encoder(crosscoder)(acts)
    assert torch.equal(f, crosscoder.encode(acts)) and f.any()
    assert crosscoder.on("cpu") is crosscoder and crosscoder.on("meta").W_dec.is_meta
    assert not crosscoder.W_dec.is_meta


def test_a_pause_between_checkpoints_grows_with_their_time(tmp_path, monkeypatch):
    written, now = [], iter(range(0, 10**9, 10))  # every look at the clock is 10 seconds later

    monkeypatch.setattr(training, "time", SimpleNamespace(monotonic=lambda: float(next(now))))
    monkeypatch.setattr(training, "write_state", lambda file, state: written.append(state["step"]))
    monkeypatch.setattr(training, "MINUTE", 1e12)
    train(gaussian(), SMALL, tmp_path, device="cpu", checkpoint_seconds=0)
    assert 1 < len(written) < 10 and written[1] - written[0] >= 5
