"""The ladder of sizes: numbers by hand, a whole rung of toys, and nothing measured twice."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from toys import toy_model, toy_pair

from lib.activations.harvest import harvest_activations
from lib.crosscoder.training import train
from lib.models.pairs import load_pair
from lib.settings import ROOT, UserError
from lib.study import ladder
from lib.text.corpus import build
from lib.tools.notebooks import parameters_of

BUDGET = replace(
    ladder.Budget.smoke(),
    tokens=5_000,
    n_features=32,
    train_tokens=3_000,
    max_tokens=1_500,
    acts_tokens=300,
    puzzles=4,
    probed=3,
    choose_puzzles=2,
    report_puzzles=2,
    max_new_tokens=5,
    boots=20,
)


def features(nrn, other="distilled", seed=0, alive=None):
    nrn = np.asarray(nrn, dtype=float)
    return pd.DataFrame(
        {
            "feature": np.arange(len(nrn)),
            "alive": True if alive is None else alive,
            "nrn": nrn,
            "nrn_p2": nrn / 2,
            "cosine": nrn,
            "other": other,
            "seed": seed,
        }
    )


# --- numbers by hand ----------------------------------------------------------------------------------------


def test_over_seeds_is_students_interval():
    value, (low, high), n = ladder.over_seeds([1.0, 2.0, 3.0, np.nan])
    assert (value, n) == (2.0, 3) and high - value == pytest.approx(4.3026527 / 3**0.5) == value - low
    value, (low, high), n = ladder.over_seeds([0.5])
    assert (value, n) == (0.5, 1) and np.isnan(low) and np.isnan(high), "one seed tells nothing of the next"
    assert ladder.over_seeds([])[2] == 0


def test_unique_means_above_the_99th_percentile_of_the_rungs_own_null():
    null = pd.concat(
        [features(np.arange(51) / 100, "null_a"), features(np.arange(50, 101) / 100, "null_a", 1)]
    )
    assert ladder.thresholds(null)["nrn"] == pytest.approx(
        np.quantile([*range(51), *range(50, 101)], 0.99) / 100
    )
    dead = features([0.2, 5.0], "null_a", 2, alive=[True, False])
    assert ladder.thresholds(pd.concat([null, dead]))["nrn"] < 1, "what is dead has no say"
    own = features([0.3, 0.98, 0.995, 1.0, 1.0], alive=[True, True, True, True, False])
    everything = pd.concat([null, own], ignore_index=True)
    assert ladder.above(everything, "distilled", 0).tolist() == [2, 3]
    assert ladder.above(everything, "distilled", 0, level=0.9).tolist() == [1, 2, 3]
    row = ladder.uniqueness(everything).set_index(["other", "seed"]).loc[("distilled", 0)]
    assert (row["alive"], row["unique"], row["share"]) == (4, 2, 0.5) and row["nrn_mean"] == pytest.approx(
        (0.3 + 0.98 + 0.995 + 1) / 4
    )
    assert row["unique_p2"] == 2 and row["nrn_mean_p2"] == pytest.approx(row["nrn_mean"] / 2)
    assert row["cosine"] == pytest.approx(0.3), "only shared features have a cosine that means something"


def test_quantiles_leave_the_dead_out():
    frame = ladder.quantiles(features([0.0, 0.1, 0.2, 0.9], alive=[True, True, True, False])).set_index(
        "quantile"
    )["nrn"]
    assert frame[0] == 0 and frame[0.5] == pytest.approx(0.1) and frame[1] == pytest.approx(0.2)


def test_the_budget_is_that_of_notebooks_01_and_02():
    """So that stores and crosscoders which they have made are used again."""
    harvested, trained = (
        parameters_of(ROOT / "notebooks" / f"{stem}.ipynb")
        for stem in ("01_harvest_activations", "02_train_crosscoder")
    )
    config = ladder.Budget().config(0)
    assert (ladder.Budget().tokens, harvested["trace_share"]) == (harvested["tokens"], 0.5)
    same = {name: name for name in ("n_features", "k", "tokens", "batch_size", "variant", "precision")}
    same |= {"rate": "learning_rate", "l1": "l1_coefficient"}
    assert {name: getattr(config, name) for name in same} == {
        name: trained[source] for name, source in same.items()
    }
    assert ladder.Budget().config(2) == replace(config, seed=2)


def test_impossible_budgets_and_pairs_without_nulls_are_refused(tmp_path, monkeypatch):
    for wrong in ({"seeds": 1}, {"puzzles": 0}, {"strength": -1.0}, {"tokens": 0.5}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            ladder.Budget(**wrong)
    pair = toy_pair(tmp_path)
    monkeypatch.setattr(ladder, "load_pair", lambda name: pair)
    with pytest.raises(UserError, match="lacks null_a and null_b"):
        ladder.Rung("toy", tmp_path, BUDGET)


def test_every_rung_of_the_registry_has_what_it_needs():
    for name in ladder.PAIRS:
        pair = load_pair(name)
        assert {"null_a", "null_b"} <= set(pair.others) and pair.tokenizer_source == load_pair(
            "tiny"
        ).tokenizer_source
        if name != "tiny":
            assert not {"control", "style"} & set(pair.others), "those of tiny are not theirs"
            assert all(name in str(source) for source in (*pair.models.values(), *pair.others.values()))


# --- a whole rung of toys -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    """Random models; null_a *is* the base, so that every comparison with it has a known answer."""
    folder = tmp_path_factory.mktemp("toys")
    pair = toy_pair(folder, (24, 24))
    for name, seed in (("null_a", 0), ("null_b", 7)):
        toy_model(24, seed).save_pretrained(folder / name)
    return replace(pair, others={name: folder / name for name in ("null_a", "null_b")})


@pytest.fixture(scope="module")
def measured(toys, tmp_path_factory):
    root = tmp_path_factory.mktemp("ladder")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ladder, "load_pair", lambda name: toys)
        metrics, tables = ladder.measure(("toy",), "test", BUDGET, root)
    return root, metrics, tables


def test_a_rung_has_every_table_and_every_number(measured):
    _, metrics, tables = measured
    for name in (
        "nrn_mean",
        "unique_above_null",
        "parallelogram_difference",
        "gain",
        "cka_trace",
        "nrn_mean_null_b",
    ):
        assert np.isfinite(metrics[f"{name}_toy"]["value"]), name
    assert all((frame["pair"] == "toy").all() for frame in tables.values())
    seeds = tables["uniqueness"][["other", "seed"]].to_numpy().tolist()
    assert seeds == [["distilled", 0], ["distilled", 1], ["null_a", 0], ["null_b", 1]]
    own = tables["uniqueness"].query("other == 'distilled'")
    assert (
        metrics["nrn_mean_toy"]["value"] == pytest.approx(own["nrn_mean"].mean())
        and metrics["nrn_mean_toy"]["n"] == 2
    )
    assert metrics["parameters_toy"] == {"value": toy_model(24, 0).num_parameters(), "ci": None, "n": None}
    roles = tables["steering"]["role"].value_counts().to_dict()
    assert roles == {"none": 1, "chosen": 2, "random": 2}, "at two strengths"
    gentle = (
        tables["steering"]
        .query("role == 'chosen' and strength == @BUDGET.strength / 2")["length_ratio"]
        .item()
    )
    assert (
        metrics["length_ratio_toy"]["value"] == pytest.approx(gentle)
        and "random_length_ratio_strong_toy" in metrics
    )


def test_a_null_that_is_the_base_shows_no_difference(measured):
    _, metrics, tables = measured
    assert metrics["nrn_mean_null_a_toy"]["value"] == pytest.approx(0.5) and metrics["cka_null_a_toy"][
        "value"
    ] == pytest.approx(1)
    assert (
        metrics["parallelogram_difference_null_a_toy"]["value"]
        == 0
        == metrics["offset_unexplained_difference_null_a_toy"]["value"]
    )
    assert metrics["procrustes_unexplained_null_a_toy"]["value"] == pytest.approx(0, abs=1e-6)
    assert metrics["effective_rank_base_toy"]["value"] == pytest.approx(
        metrics["effective_rank_null_a_toy"]["value"]
    )
    assert metrics["cka_toy"]["value"] < 0.9, "two random models are not alike"
    above = tables["uniqueness"].query("other == 'distilled'")
    assert (above["threshold"].sub(0.5).abs() < 1e-6).all() and (above["unique"] > 0).all()


def test_what_was_measured_is_read_again_and_other_budgets_are_measured_anew(measured, toys, monkeypatch):
    root, metrics, _ = measured
    monkeypatch.setattr(ladder, "load_pair", lambda name: toys)
    for name in ("harvest", "train", "codes", "health"):
        monkeypatch.setattr(
            ladder, name, lambda *args, name=name, **options: pytest.fail(f"{name} was called again")
        )
    again, _ = ladder.measure(("toy",), "test", BUDGET, root)
    assert again == metrics
    rung = ladder.Rung(
        "toy", root / "data" / "runs" / "toy" / "test" / "ladder" / "toy", replace(BUDGET, puzzles=5)
    )
    with pytest.raises(RuntimeError, match="asked again"):
        rung.kept("gates", lambda: (_ for _ in ()).throw(RuntimeError("asked again")))


def test_what_notebooks_made_is_used_where_it_lies(toys, tmp_path, monkeypatch):
    monkeypatch.setattr(ladder, "load_pair", lambda name: toys)
    store = harvest_activations(toys, build(toys, BUDGET.tokens), tmp_path / "run" / "store")
    train(store, BUDGET.config(0), tmp_path / "run" / "crosscoder")
    rung = ladder.Rung("toy", tmp_path / "ladder", BUDGET, tmp_path / "run")
    assert rung.store("distilled").path == tmp_path / "run" / "store"
    with monkeypatch.context() as patch:
        patch.setattr(ladder, "train", lambda *args: pytest.fail("trained again"))
        rung.crosscoder("distilled", 0)
    assert not (tmp_path / "ladder").exists()
    other = ladder.Rung("toy", tmp_path / "ladder", replace(BUDGET, tokens=6_000), tmp_path / "run")
    assert other.store("distilled").path == tmp_path / "ladder" / "store_distilled", (
        "made from another corpus: not used, and left alone"
    )
