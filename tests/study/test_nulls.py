"""Thresholds from nulls, false-positive rates, and matching over seeds."""

import itertools
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from toys import toy_store

from lib.crosscoder.model import CrossCoder
from lib.crosscoder.norms import record_beyond
from lib.crosscoder.plots import nrn_histogram
from lib.labels import CATEGORIES
from lib.results import Part, Results
from lib.runs import Run
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
    """Each crosscoder about its own median, against what all of the null's are about theirs."""
    spread = np.linspace(-0.05, 0.05, 201)
    scores, null_scores, roles, widths = [], [], [], {3: 1, 4: 2}
    for seed, width in widths.items():  # the second null lies elsewhere and is twice as wide
        null = scored(0.5 + seed / 100 + width * spread)
        again = scored(0.6 + 1.1 * width * spread)  # wider by a tenth, wherever it lies
        own = scored(np.r_[0.1 * seed + spread, 0.9, 0.9], alive=np.r_[np.ones(202, bool), False])
        tables = {"base, null_a": null, "base, null_b": again, "base, distilled": own}
        for role, (pair, table) in zip(
            ("sets the thresholds", "false positives", "the pair"), tables.items()
        ):
            (scores if role == "the pair" else null_scores).append(table.assign(pair=pair, seed=seed))
            roles += [{"pair": pair, "seed": seed, "role": role}] * 2  # one per score, side and level
    found = nulls.centred_rates(pd.concat(null_scores), pd.concat(scores), pd.DataFrame(roles))
    found = found.set_index(["role", "seed"])
    limit = np.quantile(np.r_[spread, 2 * spread], 0.99)
    for seed, width in widths.items():
        hits = {
            role: found.hits[role, seed] for role in ("sets the thresholds", "false positives", "the pair")
        }
        assert hits == {
            "sets the thresholds": (width * spread > limit).sum(),
            "false positives": (1.1 * width * spread > limit).sum(),
            "the pair": 1,  # the one at 0.9; all others are no wider than a null
        }
        assert found.n["the pair", seed] == 202
    assert len(found) == 6 and found.hits["sets the thresholds"].tolist() == [0, 5]
    assert (found.low <= found.rate).all() and (found.rate < found.high).all()


# --- the part "nulls" ---------------------------------------------------------------------------------------

SEEDS = range(7, 12)  # of five crosscoders
MEANS = {"null_a": 0.5, "null_b": 0.55, "distilled": 0.7}


@pytest.fixture
def computed(monkeypatch):
    """``computed(others)``: the part "nulls" of five crosscoders over made-up scores, (metrics, tables,
    trained null crosscoders, scores by (model, seed))."""

    def make(names):
        trained, made, rng = [], {}, np.random.default_rng(0)

        def score_table(crosscoder, store, max_tokens, name, base, n_boot):
            assert crosscoder[0] == store == name and base == "base", "a crosscoder on another's activations"
            nrn = rng.normal(MEANS[name] + 0.01 * (crosscoder[1] - 7), 0.05, 400)
            made[crosscoder] = scored(nrn, nu_eps=1 - nrn).assign(frequency=0.1)
            return made[crosscoder]

        def use_table(solo, n_boot, model):
            change = rng.normal(0, 5 if model == "distilled" else 1, 400)
            return pd.DataFrame({"feature": range(400), "alive": True, "change": change})

        def train(store, config, folder):
            assert folder == f"{store}_seed{config.seed}", "another crosscoder lies in this folder"
            trained.append((store, config.seed))
            return trained[-1]

        class Fake:
            pair = SimpleNamespace(name="toy", others=dict.fromkeys(names), planted=0)
            crosscoders, seed, seeds = [("distilled", s) for s in SEEDS], SEEDS[0], SEEDS
            store, max_tokens = "distilled", 10
            config = staticmethod(lambda seed: SimpleNamespace(seed=seed))
            harvested = staticmethod(lambda base, name: (None, name))
            folder = staticmethod(lambda name: name)

        for name, fake in {"train": train, "score_table": score_table, "use_table": use_table}.items():
            monkeypatch.setattr(nulls, name, fake)
        monkeypatch.setattr(nulls, "solo_codes", lambda *args: None)
        monkeypatch.setattr(nulls, "sample_rows", lambda *args: None)
        return *nulls.compute_nulls.__wrapped__(Fake(), 10), trained, made

    return make


def test_what_the_rule_finds_in_the_null_recurs_and_lies_beyond_the_limit(monkeypatch):
    table = pd.DataFrame({"feature": range(4), "alive": True, "side": "distilled"})
    low = {5: [0.0, 0.0, 0.5, 0.5], 6: [0.0, 0.5, 0.0, 0.5]}  # nu by crosscoder: below .1 is beyond
    scored_tables = {("false positives", s): table.assign(nu_eps=nu) for s, nu in low.items()}
    limits = pd.DataFrame({"score": ["nu_eps"], "side": "distilled", "level": 0.01, "threshold": 0.1})
    clusters = pd.DataFrame(
        {"crosscoder": [0, 0, 1, 1], "feature": [0, 3, 0, 2], "recurrent": [True, True, True, False]}
    )
    monkeypatch.setattr(nulls, "recurrent", lambda crosscoders, alive: clusters)
    monkeypatch.setattr(nulls, "null_crosscoder", lambda variant, name, seed: (name, seed))
    variant = SimpleNamespace(seeds=range(5, 7))
    metric = nulls._found_in_null(variant, "null_a", 2, limits, scored_tables)
    # the first crosscoder has 0 (1 recurs nowhere, 3 is not beyond), the second 0 (2 does not recur)
    assert metric["value"] == 1.0 and [s[0] for s in metric["seeds"]] == [1, 1]


@pytest.mark.parametrize("names", [("null_a", "null_b"), ("null_a",)])
def test_who_sets_the_thresholds_does_not_test_them(computed, names):
    metrics, tables, trained, made = computed(names)
    later = 0 if "null_b" in names else 5  # one null: another five of its crosscoders test
    testers = [(names[-1], s + later) for s in SEEDS]
    assert trained == [("null_a", s) for s in SEEDS] + testers
    every = pd.concat([tables["null_scores"], tables["scores"]])
    pair_of = tables["rates"].drop_duplicates(["seed", "role"]).set_index(["seed", "role"])["pair"]
    limits = tables["thresholds"].query("score == 'nrn' and side == 'distilled' and level == 0.01")
    limit = np.quantile(np.concatenate([made["null_a", s]["nrn"] for s in SEEDS]), 0.99)
    assert limits["seed"].tolist() == list(SEEDS) and limits["threshold"].tolist() == pytest.approx(
        [limit] * 5
    )
    assert (limits["n"] == 2000).all() and limits["low"].nunique() == limits["high"].nunique() == 1
    rates = tables["rates"].query("score == 'nrn' and side == 'distilled' and level == 0.01")
    rates = rates.set_index(["seed", "role"])
    for s, tester in zip(SEEDS, testers):
        who = {"sets the thresholds": ("null_a", s), "false positives": tester, "the pair": ("distilled", s)}
        for role, key in who.items():
            nrn, row = made[key]["nrn"], rates.loc[(s, role)]
            found = every[(every["seed"] == s) & (every["pair"] == pair_of[s, role])]["nrn"]
            assert found.tolist() == nrn.tolist(), f"{role}: not the scores of {key}"
            assert row["rate"] == pytest.approx((nrn > limit).mean())
            # at the ends of the threshold's interval
            ends = [(nrn > limits[end].iloc[0]).mean() for end in ("high", "low")]
            assert [row["low"], row["high"]] == pytest.approx(ends)
    assert rates["rate"][:, "sets the thresholds"].mean() == pytest.approx(0.01)
    assert rates["rate"][:, "the pair"].min() > 0.8
    use = tables["use"].groupby(["seed", "pair"]).size()
    assert len(use) == 15 and (use == 400).all()
    assert metrics["use_reweighted_rate"]["value"] > 0.3 > metrics["use_false_positive_rate"]["value"]


def test_rates_are_means_over_the_crosscoders_with_what_each_of_them_says(computed):
    metrics, tables, *_ = computed(("null_a", "null_b"))
    rates = tables["rates"].query("side == 'distilled' and level == 0.01").set_index(["score", "role"])
    names = {"null_false_positive_rate": "false positives", "beyond_null_nrn_distilled": "the pair"}
    for name, role in names.items():
        found, each = metrics[name], rates.loc[("nrn", role)].sort_values("seed")["rate"]
        assert found["value"] == pytest.approx(each.mean()) and found["n"] == 400
        assert [value for value, _, _ in found["seeds"]] == pytest.approx(each.tolist())
        assert found["ci"][0] < found["value"] < found["ci"][1]
    assert {len(m["seeds"]) for m in metrics.values()} == {5}


def test_counts_beyond_the_null_are_of_all_features_of_a_crosscoder(computed):
    metrics, tables, *_ = computed(("null_a", "null_b"))
    results, part = Results("02", Run("toy", "test"), {}), Part("nulls", "", metrics, tables)
    record_beyond(results, part)
    rates = tables["rates"].query("level == 0.01").set_index(["score", "side", "role"])["hits"]
    for name, role in (("beyond", "the pair"), ("null", "false positives")):
        for score, side in (("nrn", "distilled"), ("nu_eps", "base")):
            found = results.metrics[f"{name}_count_{score}_{side}"]
            assert found["value"] == pytest.approx(rates[score, side, role].mean()) and found["n"] == 400
    scores = tables["scores"].rename(columns={"nrn": "nrn_p1"})
    _, histogram = nrn_histogram(scores[scores["alive"]], part)
    assert histogram.groupby("norm")["null"].sum().eq(5 * 400).all(), "the null that tests the thresholds"


def test_the_scatter_of_the_nulls_crosscoders_is_in_the_interval_of_their_threshold():
    rng = np.random.default_rng(0)
    each = [scored(rng.normal(0.5 + shift, 0.01, 100)) for shift in (-0.1, 0.0, 0.1)]
    together = pd.concat([t.assign(seed=s) for s, t in enumerate(each)], ignore_index=True)
    pooled, plain = (
        nulls.thresholds(t, n_boot=200).set_index(["score", "side", "level"]).loc[("nrn", "distilled", 0.01)]
        for t in (together, together.drop(columns="seed"))
    )
    assert pooled.threshold == plain.threshold and pooled.n == 300
    # without the third crosscoder it would lie at that of the second, a tenth lower
    assert pooled.low < 0.55 < plain.low < pooled.threshold


def test_the_false_discovery_rate_by_hand():
    """2 of 100 features of a null beyond the threshold, and 10 of 50 of the pair: a tenth of these is
    chance."""
    change = pd.DataFrame({"alive": True, "change": [0.0, 1.0]})

    def table(hits, n):
        share = {"rate": hits / n, "low": 0.0, "high": 1.0, "hits": hits, "n": n}
        rows = itertools.product(nulls.SCORES, nulls.SIDES, nulls.LEVELS)
        return pd.DataFrame(rows, columns=["score", "side", "level"]).assign(**share)

    def found(test_hits, own_hits):
        tables = {"false positives": table(test_hits, 100), "the pair": table(own_hits, 50)}
        return nulls._null_metrics(tables, 2.0, [change] * 3)

    usual = found(2, 10)
    assert usual["null_false_positive_rate_nu_eps"]["value"] == 0.02
    assert usual["beyond_null_nu_eps_distilled"]["value"] == 0.2
    for score, end in itertools.product(nulls.SCORES, ("", "_at_5_percent")):
        assert usual[f"false_discovery_{score}{end}"]["value"] == pytest.approx(0.1)
    assert found(0, 10)["false_discovery_nrn"]["value"] == 0
    assert found(100, 10)["false_discovery_nrn"]["value"] == 1, "more than all cannot be false"
    assert found(2, 0)["false_discovery_nrn"]["value"] is None, "nothing was discovered"


def test_what_else_the_tables_say_by_hand():
    """Two crosscoders: above the threshold of NRN, 0.6, the first has three features, of which two have an
    interval of nu within 0.2 of zero; the second has none above it."""
    null = scored([0.5] * 5 + [0.4] * 5, nu_eps=np.full(10, 0.5))
    null = pd.concat([null.assign(seed=s) for s in (0, 1)])
    limits = nulls.thresholds(null.reset_index(drop=True), n_boot=20)
    limits.loc[(limits["score"] == "nrn") & (limits["side"] == "distilled"), "threshold"] = 0.6
    first = scored([0.7, 0.7, 0.8, 0.9, 0.4, 0.3], nu_eps=[0.0, 0.1, -0.5, 0.0, 0.3, 0.9])
    first["alive"] = [True, True, True, False, True, True]
    first["nu_eps_low"], first["nu_eps_high"] = first["nu_eps"] - 0.05, first["nu_eps"] + 0.05
    own = [first.assign(seed=0), first.assign(seed=1, nrn=0.5)]
    roles = {"sets the thresholds": null.query("seed == 0"), "false positives": null, "the pair": None}
    rates = pd.concat(
        nulls.rates((table if role == "the pair" else roles[role]).reset_index(drop=True), limits).assign(
            pair=f"base, {role}", role=role, seed=s
        )
        for role in roles
        for s, table in enumerate(own)
    )
    part = Part("nulls", "")
    part.tables = {
        "scores": pd.concat(own).assign(pair="base, the pair"),
        "null_scores": pd.concat(null.assign(pair=f"base, {role}") for role in list(roles)[:2]),
        "rates": rates,
        "thresholds": pd.concat([limits.assign(seed=s) for s in (0, 1)]),
    }
    results = Results("10", Run("toy"), {})
    nulls.record(results, part)
    each = {name: [value for value, _, _ in m["seeds"]] for name, m in results.metrics.items()}
    assert each["unique_nu_eps_low"] == [pytest.approx(2 / 3), None]
    assert each["null_false_positive_rate_centred"] == [0, 0]
    # only 0.8 lies further above 0.7, the median of those alive, than 0.5 above 0.45, the null's
    assert each["beyond_null_nrn_centred_distilled"] == [1 / 5, 0]
    assert each["beyond_null_nrn_base"] == [1 / 5, 0]  # 0.3 lies below 0.4
    # of 0.3 and 0.9 on the base's side one lies nearer to zero than the null's 0.5
    assert each["beyond_null_nu_eps_base"][0] == 1 / 2


def test_a_pair_without_a_null_is_told_so():
    class Fake:
        pair = SimpleNamespace(name="toy", others={})
        seed = 0

    with pytest.raises(UserError, match="'toy' has no null_a"):
        nulls.compute_nulls.__wrapped__(Fake(), 10)


# --- the part "seeds" ---------------------------------------------------------------------------------------


def test_planted_copies_recur_and_crosscoders_of_another_k_are_asked_too(tmp_path, monkeypatch):
    """Two crosscoders at k = 4 that are one, its features in another order; at k = 2 two unlike ones. The
    null of the first seed calls every feature of the distilled side unique, that of the second none."""
    store, trained = toy_store(tmp_path, widths=(16, 16)), []
    make = lambda k, seed: CrossCoder([16, 16], 32, names=list(store.models), k=k, seed=seed)  # noqa: E731
    made = {(k, s): make(k, s) for k in (2, 4) for s in (5, 6)}
    order = torch.randperm(32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        made[4, 5].W_dec[:, :16] *= 0.5  # all features are on the distilled model's side
    state = made[4, 5].state_dict()
    for name in ("W_enc", "b_enc", "W_dec"):
        axis = list(state[name].shape).index(32)
        state[name] = state[name].index_select(axis, order)
    made[4, 6].load_state_dict(state)
    rows = itertools.product(nulls.SCORES, nulls.SIDES, nulls.LEVELS)
    limits = pd.DataFrame(rows, columns=["score", "side", "level"])
    limits = pd.concat([limits.assign(seed=5, threshold=100.0), limits.assign(seed=6, threshold=-100.0)])
    limits.loc[limits["score"].str.startswith("nrn"), "threshold"] *= -1

    def train(store, config, folder):
        assert folder == f"k{config.k}_seed{config.seed}"
        trained.append((config.k, config.seed))
        return made[trained[-1]]

    class Fake:
        pair, max_tokens, nrn_over = SimpleNamespace(load=lambda name: name), None, 0.0
        seed, seeds, crosscoders = 5, range(5, 7), [made[4, 5], made[4, 6]]
        config = staticmethod(lambda seed=5, k=4: SimpleNamespace(seed=seed, k=k))
        folder = staticmethod(lambda name: name)
        needed = staticmethod(lambda part: SimpleNamespace(tables={"thresholds": limits}))

    Fake.store = store
    cards = lambda crosscoders, *args, **options: [  # noqa: E731
        {"fve_base": {"value": c.k / 10}, "l0": {"value": 99.0}} for c in crosscoders
    ]
    monkeypatch.setattr(nulls, "train", train)
    monkeypatch.setattr(nulls, "health_cards", cards)
    metrics, tables = nulls.compute_seeds.__wrapped__(Fake(), [2])
    assert trained == [(2, 5), (2, 6)], "those of the run are there already"
    by_k = tables["by_k"].set_index("k")
    assert by_k["fve_base"].to_dict() == {2: 0.2, 4: 0.4} and "l0" not in by_k
    assert by_k["stability"][4] == pytest.approx(1, abs=1e-5) and by_k["recurrent"][4] == 1
    assert by_k["stability"][2] < 0.7 and by_k["chance"].between(0, 0.7).all()
    for k in (2, 4):
        found = metrics[f"stability_median_k{k}"]
        assert found["value"] == by_k["stability"][k] and len(found["seeds"]) == 2
    assert metrics["recurrent_share"]["value"] == 1 and len(metrics["recurrent_share"]["seeds"]) == 2
    clusters, by_seed = tables["clusters"], tables["by_seed"].set_index("seed")
    assert clusters["crosscoder"].unique().tolist() == [0, 1] and by_seed.index.tolist() == [5, 6]
    unique = clusters[clusters["unique"].astype(bool)]
    assert set(unique["crosscoder"]) == {0} and len(unique) == by_seed["unique_nu_eps"][5] > 0
    assert by_seed["unique_nu_eps"][6] == 0 and by_seed["unique_nrn"].tolist() == [by_seed["alive"][5], 0]
    for c in CATEGORIES:  # both crosscoders choose the same feature, by its number in each
        one, other = by_seed[f"feature_{c}"].dropna().astype(int).reindex([5, 6])
        assert int(order[other]) == one and metrics[f"stable_{c}"]["value"] == pytest.approx(1, abs=1e-5)


# --- the part "similarity" ----------------------------------------------------------------------------------


def test_a_null_that_is_the_pair_is_as_alike_as_the_pair(tmp_path):
    store = toy_store(tmp_path, widths=(16, 16))
    crosscoder = CrossCoder([16, 16], 32, names=list(store.models), k=4, seed=0)
    chosen = dict(zip(CATEGORIES, range(4)))
    table = scored(np.linspace(0, 1, 32))
    # another crosscoder's scores and thresholds, which do not count here
    other = scored(np.full(32, 0.5)).assign(seed=1)
    limits = nulls.thresholds(table).assign(seed=0)

    class Fake:
        seed = 0
        harvested = staticmethod(lambda *names: (None, store))
        inspection = staticmethod(lambda: SimpleNamespace(chosen=chosen))
        needed = staticmethod(
            lambda part: SimpleNamespace(tables={"scores": pd.concat([other, table.assign(seed=0)])})
        )
        null_limits = staticmethod(lambda: limits)

    Fake.store, Fake.crosscoder = store, crosscoder
    metrics, tables = nulls.compute_similarity.__wrapped__(Fake(), 200)
    assert metrics["cka_distilled"] == metrics["cka_null_a"] and metrics["cka_distilled"]["value"] < 1
    alike = tables["similarity"].pivot_table(index=["statistic", "text"], columns="other", values="value")
    assert alike["distilled"].equals(alike["null_a"].rename("distilled"))
    assert tables["angles"]["components_of"].tolist() == list(store.models)
    assert set(tables["angles"]["features"]) == {1}, "the one above the threshold of its own null"
    assert set(tables["directions"]["a"]) <= set(CATEGORIES)
