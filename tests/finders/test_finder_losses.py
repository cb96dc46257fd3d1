"""What finders are made of, against data whose answer is known by construction."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from lib.crosscoder.model import CrossCoder
from lib.crosscoder.training import TrainConfig, Trainer, train
from lib.finders import bench
from lib.finders.dictionary import View, by_nrn, features
from lib.finders.finder import FINDERS, Data, fit, sided
from lib.finders.methods.bridge import Bridge
from lib.finders.methods.delta import Delta
from lib.settings import UserError
from lib.study.planted import Planted, PlantedStore

SMALL = Planted(
    width=12, shared=10, rotated=4, rescaled=2, base_only=2, distilled_only=2, l0=3, tokens=20_000,
    norm_ratio=2.0, noise=0.0, correlation=0.0,
)  # fmt: skip
CONFIG = TrainConfig(n_features=24, k=3, tokens=2_000, batch_size=64, aux_k=4)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return Data(PlantedStore(SMALL), CONFIG, tmp_path_factory.mktemp("finders") / "seed_0")


def unit(x):
    return x / np.linalg.norm(x)


def test_a_direction_of_the_difference_is_given_to_the_model_that_has_it(data):
    """Strengths are the planted ones, directions of the difference what two of them add to it."""
    store, rows = data.store, data.chosen
    of = {
        kind: np.flatnonzero(store.kinds == i)[0]
        for kind, i in (("base", 3), ("distilled", 4), ("rotated", 1))
    }
    scaled = {m: store.directions[m] * store.scales[m] for m in store.models}
    v = np.stack([scaled["distilled"][f] - scaled["base"][f] for f in of.values()])
    f = torch.from_numpy(store.codes[rows][:, list(of.values())].toarray())
    claims = sided(data, rows, torch.from_numpy(v).float(), f)
    assert sorted(claims.side[:2]) == ["base", "distilled"] and claims.confidence[:2].min() > 0.7
    assert claims.confidence[2] < 0.4  # the rotated one is in both
    for side in ("base", "distilled"):
        assert claims.own(side)[0] @ unit(store.directions[side][of[side]]) > 0.99  # and the sign is right
        other = {"base": "distilled", "distilled": "base"}[side]
        assert not claims.directions[other][np.flatnonzero(claims.side == side)[0]].any()


def test_mean_differences_by_hand(data):
    store, rows = data.store, data.store.rows("train")
    base, other = (a.numpy() * store.scales[m] for m, a in zip(store.models, store.activations(rows)))
    expected = (other - base).mean(0)
    (found,) = fit("mean difference", data).own("distilled")
    assert found == pytest.approx(unit(expected), abs=1e-4)
    targets = pd.DataFrame({"category": ["reflection"] * 40, "row": data.chosen[:40]})
    (found,) = fit("mean difference before behaviours", replace(data, targets=targets)).own("distilled")
    base, other = (a.numpy() * store.scales[m] for m, a in zip(store.models, store.activations(data.chosen)))
    difference = other - base
    assert found == pytest.approx(unit(difference[:40].mean(0) - difference.mean(0)), abs=1e-4)


def test_principal_components_of_differences_against_a_singular_value_decomposition(data):
    claims = fit("PCA of differences", data)
    base, other = (x.numpy() for x in data.scaled(data.store.rows("train")))
    difference = other - base
    first = np.linalg.svd(difference - difference.mean(0))[2][0]
    rows = np.concatenate([claims.own(side) for side in ("base", "distilled")])
    assert len(claims) == 12 and np.abs(rows @ first).max() == pytest.approx(1, abs=1e-3)


def test_a_view_is_a_sum_of_scaled_activations(data):
    view = View(data.store, "difference", (-1, 1))
    rows, (acts,) = next(view.reader("train", 32, 0))
    base, other = data.scaled(rows)
    assert torch.allclose(acts, other - base, atol=1e-5)
    assert view.scales["difference"] * view.mean_norms["difference"] == pytest.approx(12**0.5)
    assert view.count("train") == data.store.count("train") and view.fingerprint != data.store.fingerprint
    crosscoder = train(view, CONFIG, data.folder / "view")
    assert crosscoder.names == ("difference",) and crosscoder.seen[0] >= 2_000


def losses_of(data, kind, **changes):
    """(loss without and with the term of a trainer, dense x, code, rows) on its first batch."""
    found = {}

    class Kept(kind):
        def losses(self, out, done):
            found["out"], found["plain"] = out, Trainer.losses(self, out, done)[0]
            found["rows"] = self.crosscoder.W_dec.detach().clone()
            found["bias"], found["owner"] = self.crosscoder.b_dec.detach().clone(), self.crosscoder.owner
            found["loss"], *rest = super().losses(out, done)
            return found["loss"], *rest

    trainer = Kept(data.store, replace(CONFIG, **changes))
    trainer.run_until(64)
    trainer.close()
    return found


def test_the_bridge_at_minus_one_is_the_error_of_the_difference(data, monkeypatch):
    monkeypatch.setattr(Bridge, "weight", -1.0)
    found = losses_of(data, Bridge)
    base, other = (found["out"].x - found["out"].x_hat).detach().split(12, dim=1)
    extra = found["plain"] - (base.square() + other.square()).sum() / 64
    assert found["loss"].item() == pytest.approx(float((other - base).square().sum() / 64 + extra), rel=1e-4)


def test_the_second_loss_of_delta_asks_dedicated_features_alone(data):
    found = losses_of(data, Delta, dedicated=0.25)
    own = found["owner"] >= 0
    f = found["out"].code.dense()[:, own]
    assert own.sum() == 12 and float(f.sum()) > 0
    left = found["out"].x - found["bias"] - f @ found["rows"][own]
    base, other = left.split(12, dim=1)
    expected = (other - base).square().sum() / 64
    assert (found["loss"] - found["plain"]).item() == pytest.approx(float(expected), rel=1e-4)


def test_features_are_claimed_by_the_lengths_of_their_rows(data):
    scales = list(data.store.scales.values())
    crosscoder = CrossCoder([12, 12], 20, data.store.models, "l1", scales=scales).requires_grad_(False)
    crosscoder.W_dec[:, 12:] *= 0.5
    crosscoder.W_dec[:5, :12] = 0
    crosscoder.W_enc[7], crosscoder.b_enc[7] = 0, -1  # dead
    claims = by_nrn(data, crosscoder)
    assert len(claims) <= 19 and (claims.side[claims.confidence > 0.9] == "distilled").all()
    confident = (claims.confidence > 0.9).sum()
    assert 0 < confident <= 5 and claims.confidence[confident:] == pytest.approx(1 / 3, abs=1e-5)
    assert (claims.side[confident:] == "base").all()
    raw = crosscoder.rows("distilled", raw=True).numpy()
    assert min(np.abs(raw - row).sum(1).min() for row in claims.directions["distilled"]) < 1e-5
    alone = features(data, crosscoder, np.ones(20, bool), np.zeros(20))
    assert (alone.side == "distilled").all()


def test_every_finder_without_labels_gives_claims(data):
    for name, finder in FINDERS.items():
        if finder.labels:
            with pytest.raises(UserError, match="needs a text with labels"):
                fit(name, data)
            continue
        claims = fit(name, data)
        assert len(claims) and np.isfinite(claims.confidence).all(), name
        for side in ("base", "distilled"):
            rows = claims.own(side)
            assert np.linalg.norm(rows, axis=1) == pytest.approx(1.0), name
    assert len(FINDERS) == 14 and bench


def test_an_unknown_finder_is_named(data):
    with pytest.raises(UserError, match="unknown finder 'sae': there are .*diff-SAE"):
        fit("sae", data)
