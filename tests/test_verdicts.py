"""Verdicts over several crosscoders, by hand."""

import math

import pytest

from lib.results import Results
from lib.runs import Run
from lib.verdicts import DEPENDS, NO, UNDECIDED, YES, above, below, judge, least_agreement


@pytest.fixture
def here(tmp_path):
    return Results("02", Run("tiny", "r", tmp_path), {})


def pooled_of(here, name, values, half=0.0):
    each = [here.apart() for _ in values]
    for results, value in zip(each, values):
        results.add(name, value, None if value is None else (value - half, value + half), 10)
    here.pool(each)


def test_pool_is_the_mean_with_an_interval_over_crosscoders_and_documents(here):
    pooled_of(here, "x", [1, 2, 3, 4, 5], half=4)
    metric = here.metrics["x"]
    assert (metric["value"], metric["n"]) == (3, 10)
    assert metric["ci"] == pytest.approx([3 - math.hypot(1.96324, 4), 3 + math.hypot(1.96324, 4)], abs=1e-4)
    assert metric["seeds"][0] == [1, -3, 5]


def test_a_crosscoder_without_the_number_is_left_out_and_one_alone_keeps_its_own_interval(here):
    pooled_of(here, "x", [1, 2, 3, 4, 5, None])
    assert here.values["x"] == 3 and here.metrics["x"]["seeds"][5] == [None] * 3
    pooled_of(here, "y", [0.5], half=0.1)
    assert here.metrics["y"] == {"value": 0.5, "ci": [0.4, 0.6], "n": 10}


@pytest.mark.parametrize(
    "values, half, verdict, agree",
    (
        ([1.0, 1.1, 0.9, 1.0, 1.05], 0.1, YES, 1.0),
        ([-1.0, -1.1, -0.9, -1.0, -1.05], 0.1, NO, 1.0),
        ([1.0, 1.1, 0.9, 1.0, -0.2], 0.1, YES, 0.8),
        ([1.0, 1.1, 0.9, 1.0, -0.2], 0.5, DEPENDS, 0.8),  # 4 of 5, but the interval contains 0
        ([1.0, 1.0, 1.0, -0.01, -0.01], 0.001, DEPENDS, 0.6),
        ([0.0] * 5, 0.0, UNDECIDED, 1.0),  # exactly at the limit, as each of them
        ([0.1, -0.1, 0.2, 0.0, 0.1], 3.0, UNDECIDED, 0.6),  # nobody alone has an answer
    ),
)
def test_verdicts(here, values, half, verdict, agree):
    pooled_of(here, "x", values, half)
    row = judge(here, {"p": "x is positive"}, {"p": [above("x")]}).iloc[0]
    assert (row["held"], row["agree"]) == (verdict, pytest.approx(agree))
    opposite = {YES: NO, NO: YES}.get(verdict, verdict)
    assert judge(here, {"p": ""}, {"p": [below("x")]})["held"].item() == opposite


def test_one_condition_that_fails_decides_and_what_cannot_be_tested_is_no_success(here):
    pooled_of(here, "x", [1.0, 1.1, 0.9, 1.0, 1.05])
    here.add("y", 3, (2, 4))
    here.add("z", None)
    meanings = dict.fromkeys("abcd", "")
    predictions = {
        "a": [above("x"), above("y", 1)],
        "b": [above("x"), above("y", 5)],
        "c": [above("x"), above("z")],
        "d": "the model never does it",
    }
    board = judge(here, meanings, predictions)
    assert board["held"].tolist() == [YES, NO, UNDECIDED, "not testable, because the model never does it"]
    assert least_agreement(board) == 1.0 and here.tables["scoreboard"]["columns"][2] == "held"
