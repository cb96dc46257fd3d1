"""Thresholds from nulls, false-positive rates, and matching over seeds."""

import itertools
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from toys import toy_store

from lib.crosscoder.model import CrossCoder
from lib.labels import CATEGORIES
from lib.settings import UserError
from lib.study import nulls


def scored(nrn, nu_eps=None, side=None, alive=True):
    """A ``score_table`` by hand; all other scores are NaN."""
    n = len(nrn)
    nu = np.full(n, np.nan) if nu_eps is None else np.asarray(nu_eps, float)
    side = np.where(np.asarray(nrn) >= 0.5, "distilled", "base") if side is None else side
    return pd.DataFrame(
        {
            "feature": np.arange(n),
            "alive": alive,
            "nrn": nrn,
            "nrn_p2": nrn,
            "side": side,
            "nu_eps": nu,
            "nu_r": nu,
        }
    )


def limit(limits, score, side, level):
    row = limits[(limits.score == score) & (limits.side == side) & (limits.level == level)]
    return row.threshold.item()


def test_thresholds_leave_the_level_beyond_them_on_both_sides():
    null = scored(np.linspace(0, 1, 101))  # quantiles are the values themselves
    limits = nulls.thresholds(null, n_boot=20)
    assert limit(limits, "nrn", "distilled", 0.01) == pytest.approx(0.99)
    assert limit(limits, "nrn", "base", 0.05) == pytest.approx(0.05)
    # 0.96 to 1.00, 0.95 being the threshold itself
    assert nulls.beyond(null, limits, "nrn", "distilled", 0.05).sum() == 5
    assert nulls.beyond(null, limits, "nrn", "base", 0.05).sum() == 5
    assert (limits.low <= limits.threshold + 1e-12).all() or limits.threshold.isna().any()


def test_nu_is_judged_among_the_features_of_its_side_and_low_is_unique():
    null = scored([0.6] * 100 + [0.4] * 100, nu_eps=np.r_[np.arange(100) / 100, 1 + np.arange(100) / 100])
    limits = nulls.thresholds(null, n_boot=20)
    assert limit(limits, "nu_eps", "distilled", 0.01) == pytest.approx(0.0099)
    assert limit(limits, "nu_eps", "base", 0.01) == pytest.approx(1.0099)
    pair = scored([0.7, 0.7, 0.3], nu_eps=[0.005, 0.5, 0.005])
    assert nulls.beyond(pair, limits, "nu_eps", "distilled").tolist() == [True, False, False]
    assert nulls.beyond(pair, limits, "nu_eps", "base").tolist() == [False, False, True]


def test_a_negative_nu_is_no_absence():
    null = scored([0.6] * 100, nu_eps=np.r_[-0.9, np.arange(1, 100) / 100])
    limits = nulls.thresholds(null, n_boot=20)
    assert limit(limits, "nu_eps", "distilled", 0.01) == pytest.approx(0.0199)
    pair = scored([0.7] * 3, nu_eps=[-0.8, -0.01, 0.01])
    assert nulls.beyond(pair, limits, "nu_eps").tolist() == [False, True, True]


def test_dead_features_and_nan_are_never_beyond():
    null = scored(np.linspace(0, 1, 101))
    pair = scored([0.999, 0.999, np.nan], alive=[True, False, True])
    limits = nulls.thresholds(null, n_boot=20)
    assert nulls.beyond(pair, limits, "nrn").tolist() == [True, False, False]
    rate = nulls.rates(pair, limits).query("score == 'nrn' and side == 'distilled' and level == 0.01").iloc[0]
    assert (rate.hits, rate.n) == (1, 1)


def test_a_second_draw_of_the_same_null_is_beyond_about_as_often_as_the_level_says():
    rng = np.random.default_rng(0)
    draw = lambda: scored(rng.beta(20, 20, size=20_000))  # noqa: E731
    limits = nulls.thresholds(draw(), n_boot=20)
    found = nulls.rates(draw(), limits).query("score == 'nrn'").set_index(["side", "level"]).rate
    for side, level in itertools.product(nulls.SIDES, nulls.LEVELS):
        assert found[side, level] == pytest.approx(level, abs=4 * (2 * level / 20_000) ** 0.5)


def test_levels_must_be_shares():
    with pytest.raises(UserError, match="levels"):
        nulls.thresholds(scored([0.5, 0.6]), levels=(0.7,))


def test_a_shift_of_the_whole_null_is_not_uniqueness_of_every_feature():
    spread = np.linspace(-0.05, 0.05, 201)
    # the second is wider by a tenth, wherever it lies
    null, again = scored(0.53 + spread), scored(0.60 + 1.1 * spread)
    pair = scored(np.r_[0.4 + spread, 0.9, 0.9], alive=np.r_[np.ones(202, bool), False])
    tables = [
        null.assign(pair="base, null_a", seed=0),
        again.assign(pair="base, null_a", seed=1),
        again.assign(pair="base, null_b", seed=0),
    ]
    roles = {
        ("base, null_a", 0): "sets the thresholds",
        ("base, null_a", 1): "false positives",
        ("base, null_b", 0): "spread",
        ("base, distilled", 0): "the pair",
    }
    rates = pd.DataFrame([{"pair": name, "seed": s, "role": role} for (name, s), role in roles.items()])
    found = nulls.centred_rates(pd.concat(tables), pair, rates).set_index("role")
    assert list(found.index) == [
        "sets the thresholds",
        "false positives",
        "the pair",
    ] and found.n.tolist() == [201, 201, 202]
    limit = np.quantile(spread, 0.99)
    assert found.hits.tolist() == [
        (spread > limit + 1e-9).sum(),
        (1.1 * spread > limit).sum(),
        1 + (spread > limit + 0.0003).sum(),
    ]
    assert (found.low < found.rate).all() and (found.rate < found.high).all()


# --- the part "nulls" ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "names, runs",
    [
        (("null_a", "null_b"), [("null_a", 0), ("null_b", 1), ("null_b", 0), ("null_a", 1)]),
        (("null_a",), [("null_a", 0), ("null_a", 1)]),  # one null: only the crosscoder's seed is another
    ],
)
def test_who_sets_the_thresholds_of_a_null_does_not_test_them(monkeypatch, names, runs):
    trained, rng = [], np.random.default_rng(0)

    def scores(crosscoder, store, *args, **options):
        mean = {("null_a", 0): 0.5, "own": 0.9}.get(crosscoder, 0.55)
        nrn = rng.normal(mean, 0.05, 400)
        return pd.DataFrame(
            {
                "feature": range(400),
                "alive": True,
                "frequency": 0.1,
                "nrn": nrn,
                "nrn_p2": nrn,
                "nu_eps": 1 - nrn,
                "nu_r": 1 - nrn,
                "side": np.where(nrn > 0.5, "distilled", "base"),
            }
        )

    def use_table(solo, n_boot, model):
        change = rng.normal(0, 1 if model != "distilled" else 5, 400)
        return pd.DataFrame({"feature": range(400), "alive": True, "change": change})

    class Fake:
        pair, crosscoder, store, max_tokens = (
            SimpleNamespace(name="toy", others=dict.fromkeys(names)),
            "own",
            None,
            10,
        )
        seed = 0
        config = staticmethod(lambda seed=None: SimpleNamespace(seed=0 if seed is None else seed))
        harvested = staticmethod(lambda base, name: (None, name))
        folder = staticmethod(lambda name: name)

    def train(store, config, folder):
        trained.append((store, config.seed))
        return store, config.seed

    monkeypatch.setattr(nulls, "train", train)
    monkeypatch.setattr(nulls, "score_table", scores)
    monkeypatch.setattr(nulls, "use_table", use_table)
    monkeypatch.setattr(nulls, "solo_codes", lambda *args: None)
    monkeypatch.setattr(nulls, "sample_rows", lambda *args: None)
    metrics, tables = nulls.compute_nulls.__wrapped__(Fake(), 10)
    assert trained == runs
    roles = tables["rates"].drop_duplicates(["pair", "seed"]).set_index(["pair", "seed"]).role
    assert (
        roles["base, null_a", 0] == "sets the thresholds"
        and roles[f"base, {names[-1]}", 1] == "false positives"
    )
    # the other's NRN is shifted by one deviation: 9% beyond 1%
    assert 0.02 < metrics["null_false_positive_rate"]["value"] < 0.3
    of = (
        tables["rates"]
        .query("score == 'nrn' and side == 'distilled' and level == 0.01")
        .set_index(["pair", "seed"])
        .rate
    )
    assert of["base, null_a", 0] == 0.01 and of["base, distilled", 0] == 1
    assert metrics["use_reweighted_rate"]["value"] > 0.3 > metrics["use_false_positive_rate"]["value"]


def test_a_pair_without_a_null_is_told_so():
    class Fake:
        pair = SimpleNamespace(name="toy", others={})
        seed = 0

    with pytest.raises(UserError, match="'toy' has no null_a"):
        nulls.compute_nulls.__wrapped__(Fake(), 10)


# --- the part "similarity" ----------------------------------------------------------------------------------


def test_a_null_that_is_the_pair_is_as_alike_as_the_pair(tmp_path):
    store = toy_store(tmp_path, widths=(16, 16))
    crosscoder = CrossCoder([16, 16], 32, names=list(store.models), k=4, seed=0)
    chosen = dict(zip(CATEGORIES, range(4)))
    table = scored(np.linspace(0, 1, 32))

    class Fake:
        harvested = staticmethod(lambda *names: (None, store))
        inspection = staticmethod(lambda: SimpleNamespace(chosen=chosen))
        needed = staticmethod(
            lambda part: SimpleNamespace(tables={"scores": table, "thresholds": nulls.thresholds(table)})
        )

    Fake.store, Fake.crosscoder = store, crosscoder
    metrics, tables = nulls.compute_similarity.__wrapped__(Fake(), 200)
    assert metrics["cka_distilled"] == metrics["cka_null_a"] and metrics["cka_distilled"]["value"] < 1
    alike = tables["similarity"].pivot_table(index=["statistic", "text"], columns="other", values="value")
    assert alike["distilled"].equals(alike["null_a"].rename("distilled"))
    assert tables["angles"]["components_of"].tolist() == list(store.models)
    assert set(tables["directions"]["a"]) <= set(CATEGORIES)
