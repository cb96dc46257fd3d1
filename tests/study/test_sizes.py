"""Pairs of several sizes: their results in one table, orders and ranks by hand, figures that show it."""

import numpy as np
import pandas as pd
import pytest

from lib.figures import COLOURS
from lib.labels import CATEGORIES
from lib.models.pairs import load_pair
from lib.results import Results
from lib.runs import Run
from lib.settings import UserError
from lib.study import sizes
from lib.study.variants import write_part


def table(**quantities):
    """A table of the pairs "b", "a", "c" (by size: a, b, c); each quantity is given in this order, as numbers
    or as (value, low, high).
    """
    rows = []
    for quantity, values in {"parameters": [200, 100, 300], **quantities}.items():
        for pair, value in zip("bac", values):
            value, low, high = value if isinstance(value, tuple) else (value, np.nan, np.nan)
            rows.append(
                {
                    "pair": pair,
                    "quantity": quantity,
                    "value": value,
                    "low": low,
                    "high": high,
                    "n": 3,
                    "over": "seeds",
                }
            )
    return pd.DataFrame(rows)


def test_a_series_is_in_the_order_of_size():
    line = sizes.series(table(x=[5.0, 4.0, 6.0]), "x")
    assert (
        line.index.tolist() == ["a", "b", "c"]
        and line["value"].tolist() == [4, 5, 6]
        and line["parameters"].tolist() == [100, 200, 300]
    )
    assert sizes.text(line, 1) == "4.0, 5.0, 6.0"
    part = table(x=[5.0, 4.0, 6.0]).query("not (quantity == 'x' and pair == 'b')")
    assert sizes.text(sizes.series(part, "x")) == "4.00, n/a, 6.00"
    with pytest.raises(UserError, match="'y': there are parameters, x"):
        sizes.series(table(x=[1.0, 2.0, 3.0]), "y")


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([2.0, 1.0, 3.0], ("rises", False)),
        ([2.0, 3.0, 1.0], ("falls", False)),
        ([3.0, 1.0, 2.0], ("mixed", False)),
        ([1.0, 1.0, 2.0], ("mixed", False)),
        ([np.nan, 1.0, 2.0], ("mixed", False)),
        ([(2, 1.6, 2.4), (1, 0.6, 1.4), (3, 2.6, 3.4)], ("rises", True)),
        ([(2, 1.3, 2.7), (1, 0.6, 1.4), (3, 2.8, 3.2)], ("rises", False)),
        ([(2, 1.6, 2.4), (3, 2.5, 3.5), (1, 0.5, 1.5)], ("falls", True)),
    ],
)
def test_order(values, expected):
    assert sizes.order(sizes.series(table(x=values), "x")) == expected


def test_ranks_are_by_value_and_columns_by_size():
    found = sizes.ranks(table(x=[0.5, 0.9, 0.1], y=[1.0, 1.0, 2.0]), ("parameters", "x", "y"))
    assert found.columns.tolist() == ["a", "b", "c"]
    assert found.loc["parameters"].tolist() == [1, 2, 3] and found.loc["x"].tolist() == [3, 2, 1]
    assert found.loc["y"].tolist() == [1.5, 1.5, 3]


def test_curves_against_size():
    frame = table(x=[(2, 1.5, 2.75), (1, 0.5, 1.5), (3, 2, 4)], y=[0.1, 0.2, 0.3])
    fig = sizes.plot(
        frame,
        {"one": {"distilled, x": "x", "distilled, y": "y", "null a": "y"}, "two": {"base": "x"}},
        flat={"two": 0.5},
    )
    first, second, null, base = fig.data
    assert list(first.x) == [100, 200, 300] and list(first.y) == [1, 2, 3]
    assert (first.error_y.array[1], first.error_y.arrayminus[1]) == (0.75, 0.5)
    assert (
        first.line.color == second.line.color == COLOURS["distilled"] and base.line.color == COLOURS["base"]
    )
    assert (first.line.dash, second.line.dash, null.line.dash) == ("solid", "dash", "dot"), (
        "told apart without colour"
    )
    assert fig.layout.xaxis.type == "log" and [s.y0 for s in fig.layout.shapes] == [0.5]


def test_against_another_quantity_points_are_named_and_not_joined():
    frame = table(gain=[0.5, 0.9, 0.1], x=[1.0, 2.0, 3.0])
    fig = sizes.plot(frame, {"x": {"distilled": "x", "null a": "gain"}}, x="gain")
    assert (
        list(fig.data[0].x) == [0.9, 0.5, 0.1]
        and list(fig.data[0].text) == ["a", "b", "c"]
        and fig.data[0].mode == "markers+text"
    )
    assert fig.data[1].mode == "markers" and fig.layout.xaxis.range[0] < 0.1 < 0.9 < fig.layout.xaxis.range[1]


# --- collecting ---------------------------------------------------------------------------------------------


def scores(nrn, **columns):
    nrn = np.asarray(nrn, float)
    frame = {"feature": np.arange(len(nrn)), "alive": True, "nrn": nrn, "nrn_p2": nrn / 2}
    return pd.DataFrame(frame | columns)


LIMITS = pd.DataFrame(
    {"score": ["nrn", "nrn_p2"], "side": "distilled", "level": 0.01, "threshold": [0.7, 0.4]}
)


def test_unique_means_above_the_threshold_of_the_own_null_and_what_is_dead_has_no_say():
    seeds = scores([0.3, 0.75, 0.9, 1.0, 1.0], seed=0)
    seeds.loc[4, "alive"] = False
    null = pd.concat(
        [scores([0.5, 0.71], pair="base, null_a", seed=0), scores([0.2, 0.3], pair="base, null_b", seed=1)]
    )
    own = sizes.uniqueness({"thresholds": LIMITS, "null_scores": null}, seeds).set_index(["other", "seed"])
    row = own.loc[("distilled", 0)]
    assert (row["alive"], row["unique"], row["share"], row["unique_p2"]) == (4, 3, 0.75, 2)
    assert row["nrn_mean"] == pytest.approx((0.3 + 0.75 + 0.9 + 1) / 4) and row["nrn_q50"] == pytest.approx(
        0.825
    )
    assert own["unique"].tolist() == [3, 1, 0] and (own["threshold"] == 0.7).all()


def test_means_over_seeds_have_students_interval():
    own = pd.DataFrame({"other": "distilled", "unique": [1.0, 2.0, 3.0]})
    own = own.assign(
        **dict.fromkeys(("unique_p2", "share", "nrn_mean", "nrn_mean_p2", "nrn_sd", "alive"), 1.0)
    )
    row = next(r for r in sizes.over_seeds(own) if r["quantity"] == "unique_above_null")
    assert (row["value"], row["n"]) == (2.0, 3) and row["high"] - 2 == pytest.approx(4.3026527 / 3**0.5)
    alone = next(r for r in sizes.over_seeds(own[:1]) if r["quantity"] == "unique_above_null")
    assert np.isnan(alone["low"]), "one seed tells nothing of the next"


def a_run(root, name, shift):
    """A run of a pair with all that ``collect`` reads, in numbers by hand."""
    run = Run(name, "default", root)
    for number, metrics in {
        "02": {"l0": 24 + shift},
        "05": {"parallelogram_change_distilled": -shift, "parallelogram_base": 1.0},
    }.items():
        results = Results(number, run, {})
        for metric, value in metrics.items():
            results.add(metric, value, (value - 1, value + 1), 5)
        results.write()
    null = pd.concat([scores([0.5], pair="base, null_a", seed=0), scores([0.5], pair="base, null_b", seed=1)])
    by_seed = pd.DataFrame({"seed": [0, 1], **{f"auroc_{c}": [0.8, 0.9] for c in CATEGORIES}})
    alike = {"statistic": ["cka", "effective_rank_x"], "value": [0.5 + shift, 3.0], "low": 0.0, "high": 1.0}
    tables = {
        "nulls": {"thresholds": LIMITS, "null_scores": null},
        "seeds": {"scores": pd.concat([scores([0.6 + shift], seed=s) for s in (0, 1)]), "by_seed": by_seed},
        "similarity": {"similarity": pd.DataFrame(alike | {"n": 9, "other": "distilled", "text": "trace"})},
    }
    for part, frames in tables.items():
        write_part(run, part, "mark", {}, frames, {})


def asked(pair, n, folder, seed):
    size = {"tiny_small": 100, "tiny": 200}[pair.name]
    return [{"quantity": "parameters", "value": size}], pd.DataFrame({"chain_correct": [True] * n})


def test_the_results_of_every_pair_come_into_one_table(tmp_path, monkeypatch):
    monkeypatch.setattr(sizes, "ask", asked)
    for name, shift in (("tiny_small", 0.0), ("tiny", 0.2)):
        a_run(tmp_path, name, shift)
    table, crosscoders, thoughts = sizes.collect(
        ["tiny_small", "tiny"], "default", 3, tmp_path, root=tmp_path
    )
    value = lambda quantity: sizes.series(table, quantity)["value"].tolist()  # noqa: E731
    assert value("nrn_mean") == pytest.approx([0.6, 0.8]) and value("unique_above_null") == [0, 1]
    assert value("l0") == [24, 24.2] and value("parallelogram_difference") == pytest.approx([0, -0.2])
    assert value("cka_trace") == pytest.approx([0.5, 0.7]) and value("effective_rank_base_trace") == [3, 3]
    assert value("auroc_contrast") == pytest.approx([0.85, 0.85])
    assert sizes.series(table, "nrn_mean_null_a")["n"].tolist() == [1, 1]
    assert len(thoughts) == 6 and crosscoders.groupby("pair").size().tolist() == [4, 4]
    assert "length_ratio" not in set(table["quantity"]), "notebook 04 has not run"


def test_pairs_without_results_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(sizes, "ask", asked)
    a_run(tmp_path, "tiny", 0.0)
    with pytest.raises(UserError, match="tiny_small has no results"):
        sizes.collect(["tiny_small", "tiny"], "default", 3, tmp_path, root=tmp_path)


def test_how_well_distillation_worked_is_asked_of_the_models(tmp_path):
    rows, thought = sizes.ask(load_pair("tiny"), 4, tmp_path)
    values = {row["quantity"]: row["value"] for row in rows}
    assert values["gain"] == pytest.approx(values["acc_distilled_think"] - values["acc_base_direct"])
    assert len(thought) == 4 and values["width"] == 96 and 0 <= values["p_reflect_given_correct"] <= 1
