"""Reading the ladder: orders and ranks by hand, and figures that show what they say."""

import numpy as np
import pandas as pd
import pytest

from lib.figures import COLOURS
from lib.settings import UserError
from lib.study import sizes as rungs


def table(**quantities):
    """A table of the rungs "b", "a", "c" (by size: a, b, c); each quantity is given in this order, as numbers
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
    line = rungs.series(table(x=[5.0, 4.0, 6.0]), "x")
    assert (
        line.index.tolist() == ["a", "b", "c"]
        and line["value"].tolist() == [4, 5, 6]
        and line["parameters"].tolist() == [100, 200, 300]
    )
    assert rungs.text(line, 1) == "4.0, 5.0, 6.0"
    part = table(x=[5.0, 4.0, 6.0]).query("not (quantity == 'x' and pair == 'b')")
    assert rungs.text(rungs.series(part, "x")) == "4.00, n/a, 6.00"
    with pytest.raises(UserError, match="'y': there are parameters, x"):
        rungs.series(table(x=[1.0, 2.0, 3.0]), "y")


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
    assert rungs.order(rungs.series(table(x=values), "x")) == expected


def test_ranks_are_by_value_and_columns_by_size():
    found = rungs.ranks(table(x=[0.5, 0.9, 0.1], y=[1.0, 1.0, 2.0]), ("parameters", "x", "y"))
    assert found.columns.tolist() == ["a", "b", "c"]
    assert found.loc["parameters"].tolist() == [1, 2, 3] and found.loc["x"].tolist() == [3, 2, 1]
    assert found.loc["y"].tolist() == [1.5, 1.5, 3]


def test_curves_against_size():
    frame = table(x=[(2, 1.5, 2.75), (1, 0.5, 1.5), (3, 2, 4)], y=[0.1, 0.2, 0.3])
    fig = rungs.plot(
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
    fig = rungs.plot(frame, {"x": {"distilled": "x", "null a": "gain"}}, x="gain", intervals=False)
    assert (
        list(fig.data[0].x) == [0.9, 0.5, 0.1]
        and list(fig.data[0].text) == ["a", "b", "c"]
        and fig.data[0].mode == "markers+text"
    )
    assert fig.data[1].mode == "markers" and fig.layout.xaxis.range[0] < 0.1 < 0.9 < fig.layout.xaxis.range[1]


def test_every_crosscoder_is_a_point():
    uniqueness = pd.DataFrame(
        {
            "pair": [*"aabcc"],
            "other": ["distilled"] * 4 + ["null_a"],
            "seed": [0, 1, 0, 0, 0],
            "unique": [1.0, 3, 5, 6, 2],
        }
    )
    fig = rungs.plot_seeds(uniqueness, table(), {"features": "unique"})
    lines, points = fig.data[::2], fig.data[1::2]
    assert (
        list(lines[0].y) == [2, 5, 6]
        and list(points[0].x) == [100, 100, 200, 300]
        and list(points[0].y) == [1, 3, 5, 6]
    )
    assert list(points[1].x) == [300] and len(points[2].x) == 0, "null_b is not there"


def test_overlaps_show_the_random_sets_beside_them():
    angles = pd.DataFrame(
        {
            "pair": ["a", "b"],
            "seed": [0, 0],
            "components_of": ["base", "base"],
            "overlap": [0.2, 0.5],
            "features": [3, 4],
            "null_low": [0.4, 0.4],
            "null_high": [0.6, 0.6],
        }
    )
    bars, points = rungs.plot_overlaps(angles, {"base": "of the base"}).data
    assert list(points.y) == [0.2, 0.5] and list(points.x) == ["a, seed 0", "b, seed 0"]
    assert list(bars.y[:2]) == [0.4, 0.6] and np.isnan(bars.y[2])
