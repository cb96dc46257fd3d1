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
    known = table(x=[(5, 4.5, 5.5), 4.0, 6.0])
    assert sizes.text(sizes.series(known, "x"), 1) == "4.0, 5.0 [4.5, 5.5], 6.0"
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
    assert len({t.marker.symbol for t in (first, second, null, base)}) == 4, (
        "a legend entry has its own symbol"
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


def limits(**thresholds):
    """Thresholds of NRN (p = 1) by seed, seed_0=0.7, and 0.25 to either side; of p = 2 they are 0.3 lower."""
    rows = []
    for seed, value in thresholds.items():
        for score, limit in (("nrn", value), ("nrn_p2", value - 0.3)):
            ends = limit - 0.25, limit + 0.25
            rows.append((score, "distilled", 0.01, limit, *ends, int(seed.removeprefix("seed_"))))
    return pd.DataFrame(rows, columns=["score", "side", "level", "threshold", "low", "high", "seed"])


def test_unique_means_above_the_threshold_of_the_own_null_and_what_is_dead_has_no_say():
    own = scores([0.3, 0.75, 0.9, 1.0, 1.0], pair="base, distilled", seed=0)
    own.loc[4, "alive"] = False
    null = [scores([0.5, 0.71], pair="base, null_a", seed=0), scores([0.2, 0.8], pair="base, null_b", seed=1)]
    tables = {"scores": own, "null_scores": pd.concat(null), "thresholds": limits(seed_0=0.7, seed_1=0.9)}
    found = sizes.uniqueness(tables).set_index(["other", "seed"])
    row = found.loc[("distilled", 0)]
    assert (row["alive"], row["unique"], row["share"], row["unique_p2"]) == (4, 3, 0.75, 2)
    assert (row["unique_low"], row["unique_high"]) == (1, 3), "above 0.95 and above 0.45"
    assert row["nrn_mean"] == pytest.approx((0.3 + 0.75 + 0.9 + 1) / 4) and row["nrn_q50"] == pytest.approx(
        0.825
    )
    assert found["unique"].tolist() == [3, 1, 0] and found["threshold"].tolist() == [0.7, 0.7, 0.9]


def test_means_over_seeds_have_students_interval():
    own = pd.DataFrame({"other": "distilled", "unique": [1.0, 2.0, 3.0]})
    own = own.assign(
        **dict.fromkeys(("unique_p2", "share", "nrn_mean", "nrn_mean_p2", "nrn_sd", "alive"), 1.0)
    )
    row = next(r for r in sizes.over_seeds(own) if r["quantity"] == "unique_above_null")
    assert (row["value"], row["n"]) == (2.0, 3) and row["high"] - 2 == pytest.approx(4.3026527 / 3**0.5)
    alone = next(r for r in sizes.over_seeds(own[:1]) if r["quantity"] == "unique_above_null")
    assert np.isnan(alone["low"]), "one seed tells nothing of the next"
    # the threshold's interval is as wide again: both at right angles
    wide = own.assign(unique_low=own["unique"] - 4.3026527 / 3**0.5, unique_high=own["unique"] + 7)
    row = next(r for r in sizes.over_seeds(wide) if r["quantity"] == "unique_above_null")
    assert (
        row["low"] == pytest.approx(2 - 4.3026527 * (2 / 3) ** 0.5) and row["over"] == "seeds and thresholds"
    )


def a_run(root, name, shift, old=False):
    """A run of a pair with all that ``collect`` reads, in numbers by hand; ``old``: of one crosscoder, as
    they were before there were several."""
    run = Run(name, "default", root)
    for number, metrics in {
        "02": {"l0": 24 + shift},
        "05": {"parallelogram_change_distilled": -shift, "parallelogram_base": 1.0},
    }.items():
        results = Results(number, run, {})
        for metric, value in metrics.items():
            results.add(metric, value, (value - 1, value + 1), 5)
        if number == "02" and not old:
            results.metrics["l0"]["seeds"] = [[24.0, 23.0, 25.0]] * 2
        results.write()
    null = [scores([0.5], pair=f"base, {other}", seed=s) for other in ("null_a", "null_b") for s in (0, 1)]
    own = pd.concat([scores([0.6 + shift + s / 100], pair="base, distilled", seed=s) for s in (0, 1)])
    by_seed = pd.DataFrame({"seed": [0, 1], **{f"auroc_{c}": [0.8, 0.9] for c in CATEGORIES}})
    alike = {"statistic": ["cka", "effective_rank_x"], "value": [0.5 + shift, 3.0], "low": 0.0, "high": 1.0}
    tables = {
        "nulls": {
            "thresholds": limits(seed_0=0.7, seed_1=0.7),
            "null_scores": pd.concat(null),
            "scores": own,
        },
        "seeds": {"by_seed": by_seed},
        "similarity": {"similarity": pd.DataFrame(alike | {"n": 9, "other": "distilled", "text": "trace"})},
    }
    if old:
        tables["nulls"] = {name: t.drop(columns="seed") for name, t in tables["nulls"].items()}
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
    assert value("nrn_mean") == pytest.approx([0.605, 0.805]) and value("unique_above_null") == [0, 1]
    assert value("l0") == [24, 24.2] and value("parallelogram_difference") == pytest.approx([0, -0.2])
    assert value("cka_trace") == pytest.approx([0.5, 0.7]) and value("effective_rank_base_trace") == [3, 3]
    assert value("auroc_contrast") == pytest.approx([0.85, 0.85])
    over = lambda quantity: set(sizes.series(table, quantity)["over"])  # noqa: E731
    assert over("l0") == {"crosscoders and documents"} and over("parallelogram_difference") == {"words"}
    assert sizes.series(table, "nrn_mean_null_a")["n"].tolist() == [2, 2]
    assert len(thoughts) == 6 and crosscoders.groupby("pair").size().tolist() == [6, 6]
    assert "length_ratio" not in set(table["quantity"]), "notebook 04 has not run"


def test_pairs_without_results_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(sizes, "ask", asked)
    a_run(tmp_path, "tiny", 0.0)
    with pytest.raises(UserError, match="tiny_small has no results"):
        sizes.collect(["tiny_small", "tiny"], "default", 3, tmp_path, root=tmp_path)


def test_results_of_one_crosscoder_are_named_and_not_compared(tmp_path, monkeypatch):
    monkeypatch.setattr(sizes, "ask", asked)
    a_run(tmp_path, "tiny_small", 0.0, old=True)
    a_run(tmp_path, "tiny", 0.0)
    with pytest.raises(UserError, match="of tiny_small is from before a run had several crosscoders"):
        sizes.collect(["tiny_small", "tiny"], "default", 3, tmp_path, root=tmp_path)


def test_a_difference_between_pairs_by_hand():
    frame = table(nrn_mean=[(0.6, 0.57, 0.64), (0.5, 0.46, 0.53), 0.7])
    frame = pd.concat([frame, frame[frame.quantity == "nrn_mean"].assign(quantity="cka")])
    crosscoders = pd.DataFrame(
        [("b", "distilled", s, v) for s, v in ((0, 0.59), (1, 0.61))]
        + [("a", "distilled", s, v) for s, v in ((0, 0.52), (1, 0.48))]
        + [("b", "null_b", 0, 0.9)],
        columns=["pair", "other", "seed", "nrn_mean"],
    )
    results = Results("06", Run("toy"), {})
    sizes.compare(results, "step", frame, crosscoders, ("nrn_mean", "b"), ("nrn_mean", "a"))
    step = results.metrics["step"]
    # 0.03 and 0.03 below, 0.04 and 0.04 above, at right angles
    assert step["value"] == pytest.approx(0.1) and step["n"] == 3
    assert step["ci"] == pytest.approx([0.1 - 0.03 * 2**0.5, 0.1 + 0.04 * 2**0.5])
    assert [value for value, _, _ in step["seeds"]] == pytest.approx([0.07, 0.13])
    sizes.compare(results, "likeness", frame, crosscoders, ("cka", "b"), ("cka", "a"))
    assert "seeds" not in results.metrics["likeness"], "no crosscoder is in it"
    sizes.compare(results, "unknown", frame, crosscoders, ("cka", "c"), ("cka", "a"))
    assert results.metrics["unknown"]["ci"] is None, "an interval is not known"


def test_how_well_distillation_worked_is_asked_of_the_models(tmp_path):
    rows, thought = sizes.ask(load_pair("tiny"), 4, tmp_path)
    values = {row["quantity"]: row["value"] for row in rows}
    assert values["gain"] == pytest.approx(values["acc_distilled_think"] - values["acc_base_direct"])
    assert len(thought) == 4 and values["width"] == 96 and 0 <= values["p_reflect_given_correct"] <= 1
