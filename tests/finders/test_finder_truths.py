"""What is planted, and that claims are judged by it."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lib.finders import scores, truths
from lib.finders.claims import SIDES, Claims
from lib.finders.truths import DRIFT, EASY, REAL, REGIME, TRUTHS, Budget, Rare, Rarest, Reweighted
from lib.models.pairs import Pair, load_pair
from lib.settings import UserError
from lib.study.planted import KINDS, PlantedStore

TOKENS = 40_000
ONE_SIDED = [KINDS.index("base_only"), KINDS.index("distilled_only")]


@pytest.mark.parametrize("store, often", [(Rare, 0.005), (Rarest, 0.0005)])
def test_rare_features_are_rare_and_the_others_as_before(store, often):
    planted = replace(REGIME, tokens=TOKENS)
    plain, rare = PlantedStore(planted), store(planted)
    own = np.isin(rare.kinds, ONE_SIDED)
    share = np.diff(rare.codes.tocsc().indptr) / TOKENS
    assert share[own].mean() == pytest.approx(often, rel=0.25)
    assert rare.frequencies[~own] == pytest.approx(plain.frequencies[~own])
    assert rare.fingerprint != plain.fingerprint


def test_reweighted_features_stand_in_both_models_and_are_used_by_one():
    store = Reweighted(replace(REGIME, tokens=TOKENS, noise=0.0))
    for side, other in (("base", "distilled"), ("distilled", "base")):
        own = np.flatnonzero(store.kinds == KINDS.index(f"{side}_only"))
        rows = [store.directions[m][own] * store.scales[m] for m in (side, other)]
        cosine = (rows[0] * rows[1]).sum(1) / np.prod([np.linalg.norm(r, axis=1) for r in rows], axis=0)
        assert cosine == pytest.approx(1.0)
        used = [(store.used(m)[:, own] > 0).sum() for m in (side, other)]
        assert used[1] / used[0] == pytest.approx(truths.USED, abs=0.05)
    shared = np.flatnonzero(store.kinds == KINDS.index("shared"))
    assert (store.used("base")[:, shared] != store.used("distilled")[:, shared]).nnz == 0


def test_whatever_both_models_have_drifts_and_the_others_are_as_in_the_regime():
    planted, drift = (PlantedStore(replace(p, tokens=TOKENS)) for p in (REGIME, DRIFT))
    for kind in ONE_SIDED:
        assert (drift.kinds == kind).sum() == (planted.kinds == kind).sum()
    base, distilled = (drift.directions[m] / ratio for m, ratio in (("base", 1), ("distilled", 0.916)))
    lengths = np.linalg.norm(base, axis=1), np.linalg.norm(distilled, axis=1)
    rotated, rescaled = (drift.kinds == KINDS.index(kind) for kind in ("rotated", "rescaled"))
    assert rotated.sum() + rescaled.sum() + 16 == len(drift.kinds) == REGIME.features
    assert (base * distilled).sum(1)[rotated] == pytest.approx(np.cos(np.radians(70)))
    assert lengths[0][rotated] == pytest.approx(lengths[1][rotated])
    ratio = lengths[1][rescaled] / lengths[0][rescaled]
    assert np.sort(ratio) == pytest.approx([1 / 3] * 6 + [3] * 6)
    assert (base * distilled).sum(1)[rescaled] == pytest.approx(np.prod(lengths, axis=0)[rescaled])


def test_who_takes_drift_for_something_new_loses_precision(tmp_path):
    """Claims of all features, by how much their rows differ."""
    precision = {}
    for name in ("planted", "drift"):
        truth = TRUTHS[name]
        data = truth.open(Budget(planted_tokens=TOKENS), 0, tmp_path)
        rows = [data.store.directions[m] * data.store.scales[m] for m in SIDES]
        side = np.where(np.linalg.norm(rows[1], axis=1) > np.linalg.norm(rows[0], axis=1), *SIDES[::-1])
        differ = np.linalg.norm(rows[1] - rows[0], axis=1)
        claims = Claims.of(*rows, side, differ / differ.max())
        precision[name] = scores.score(truth, data, claims, 0)["precision"]
    assert precision["drift"] < precision["planted"] - 0.2


@pytest.fixture(scope="module")
def easy(tmp_path_factory):
    truth, budget = TRUTHS["easy"], Budget(planted_tokens=TOKENS)
    return truth, truth.open(budget, 0, tmp_path_factory.mktemp("easy"))


def of_features(store, side, numbers, confidence=1.0):
    rows = [store.directions[m][numbers] for m in ("base", "distilled")]
    return Claims.of(*rows, [side] * len(numbers), np.full(len(numbers), confidence))


def test_the_planted_directions_themselves_are_right(easy):
    truth, data = easy
    store = data.store
    own = np.flatnonzero(store.kinds == KINDS.index("distilled_only"))
    right, recall = truth.judge(data, of_features(store, "distilled", own))
    assert right.all() and recall(np.ones(len(own), bool)) == 0.5  # the other half is the base's
    twice = of_features(store, "distilled", np.repeat(own[:1], 3))
    right, recall = truth.judge(data, twice)
    assert right.all() and recall(np.ones(3, bool)) == pytest.approx(1 / (2 * len(own)))
    assert recall(np.zeros(3, bool)) == 0


def test_shared_features_and_the_wrong_side_are_wrong(easy):
    truth, data = easy
    shared = np.flatnonzero(data.store.kinds == KINDS.index("shared"))
    right, _ = truth.judge(data, of_features(data.store, "base", shared))
    assert not right.any()
    own = np.flatnonzero(data.store.kinds == KINDS.index("distilled_only"))
    rows = data.store.directions["distilled"][own]
    right, _ = truth.judge(data, Claims.of(rows, rows, ["base"] * len(own), np.ones(len(own))))
    assert not right.any()


def test_with_another_seed_the_data_are_the_same_and_a_null_has_nothing_to_find(easy, tmp_path):
    truth, data = easy
    again = truth.open(Budget(planted_tokens=TOKENS), 1, tmp_path)
    assert again.store is data.store and again.config.seed == 1 and again.folder.name == "seed_1"
    null = truth.open(Budget(planted_tokens=TOKENS), 0, tmp_path, null=True)
    assert not np.isin(null.store.kinds, ONE_SIDED).any() and null.store.planted.features == EASY.features


def test_the_control_is_judged_by_its_dimensions():
    x = torch.zeros(100, 6)
    x[:, 4] = torch.arange(100.0)  # of the last two dimensions one carries nine tenths of the variance
    x[:, 5] = torch.arange(100.0).flip(0) / 3
    x[:, 5] = x[torch.randperm(100, generator=torch.Generator().manual_seed(0)), 5]
    store = SimpleNamespace(rows=lambda split: np.arange(100), activations=lambda rows: [x, x])
    rows = np.array([[0, 0, 0, 0, 1, 0], [1, 0, 0, 0, 0, 1.1], [3, 0, 0, 0, 1, 0], [0, 0, 0, 0, 1, 1.0]])
    sides = ["distilled", "distilled", "distilled", "base"]
    right, recall = truths._judge_control(
        SimpleNamespace(store=store), Claims.of(0 * rows, rows, sides, [1] * 4), 2
    )
    assert right.tolist() == [True, True, False, False]
    assert recall(np.array([True, False, False, False])) == pytest.approx(0.9, abs=0.01)
    assert recall(np.ones(4, bool)) == pytest.approx(1.0)
    assert recall(np.array([False, False, True, True])) == 0


def test_widths_are_those_of_weights_that_are_not_loaded(monkeypatch):
    expected = {
        name: load_pair(one.pair).load("base").get_input_embeddings().weight.shape[1] if one.pair else 24
        for name, one in TRUTHS.items()
    }
    monkeypatch.setattr(Pair, "load", None)
    assert {name: one.width for name, one in TRUTHS.items()} == expected
    assert REAL.width == 576  # of SmolLM2-135M, whose configuration may have to be fetched


def test_an_unknown_truth_is_named():
    with pytest.raises(UserError, match="truth is 'hard': it must be one of planted"):
        truths.truth("hard")
