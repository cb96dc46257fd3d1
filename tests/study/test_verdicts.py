"""Verdicts over several crosscoders, against numbers worked out by hand and features that were planted."""

import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from lib.study import verdicts
from lib.study.verdicts import (
    DEPENDS,
    FAILS,
    HOLDS,
    PREDICTIONS,
    UNDECIDED,
    Measured,
    answers,
    best_of_places,
    judge,
    single,
)


def measured(**values) -> Measured:
    """Quantities by hand, all others on the side of their prediction; a number beside it: half the width of
    its interval over documents."""
    numbers = {q: limit + (0.04 if side == "above" else -0.04) for _, q, side, limit in PREDICTIONS.values()}
    draws = {}
    for name, given in values.items():
        numbers[name], half = given if isinstance(given, tuple) else (given, None)
        if half is not None:
            draws[name] = numbers[name] + half * np.linspace(-1, 1, 1001) / 0.95
    return Measured(numbers, draws, np.ones(3, bool), 0)


def verdict_of(values: list) -> pd.Series:
    return (
        judge([measured(gain_reflection=v) for v in values])
        .set_index("prediction")
        .loc["reflection, predicted"]
    )


def test_all_crosscoders_far_on_one_side():
    row = verdict_of([(0.1, 0.02)] * 5)
    assert row["verdict"] == HOLDS and row["agree"] == 1 and row["holds"] == 5 and row["fails"] == 0
    assert (row["value"], row["low"], row["high"]) == pytest.approx((0.1, 0.08, 0.12), abs=1e-3)
    assert verdict_of([(-0.1, 0.02)] * 5)["verdict"] == FAILS


def test_crosscoders_that_contradict_each_other_have_no_verdict():
    row = verdict_of([(0.1, 0.02), (0.12, 0.02), (0.11, 0.02), (-0.2, 0.02), (-0.1, 0.02)])
    assert (row["holds"], row["fails"], row["agree"]) == (3, 2, 0.6) and row["verdict"] == DEPENDS


def test_four_of_five_are_not_enough_if_the_fifth_is_far_off():
    row = verdict_of([(0.1, 0.02), (0.12, 0.02), (0.11, 0.02), (0.1, 0.02), (-0.2, 0.02)])
    assert row["agree"] == 0.8 and row["low"] < 0 < row["high"] and row["verdict"] == DEPENDS


def test_without_an_answer_of_any_crosscoder_it_is_undecided():
    row = verdict_of([(0.01, 0.03)] * 5)
    assert row["agree"] == 1 and row["verdict"] == UNDECIDED and row["holds"] == 0


def test_a_limit_from_below_turns_the_side_round():
    assert PREDICTIONS["reflection, needed"][2:] == ("below", 0.0)
    values = [measured(loss_reflection=(-1.0 - 0.01 * s, 0.1)) for s in range(5)]
    row = judge(values).set_index("prediction").loc["reflection, needed"]
    assert row["verdict"] == HOLDS and row["holds"] == 5
    assert (answers(single(values)).loc["reflection, needed"] == 1).all()


def test_a_crosscoder_without_the_category_takes_no_part():
    row = verdict_of([(0.1, 0.02)] * 4 + [(np.nan, 0.0)])
    assert row["value"] == pytest.approx(0.1)


def test_the_best_place_and_direction():
    """Feature 1 falls silent at the value exactly where the answer is yes; feature 2 knows it, but may not be
    taken."""
    yes = np.array([1, 1, 0, 0, 0], bool)
    silent = np.where(yes, 0.0, 1.0)
    value = sparse.csr_matrix(np.c_[[1, 0, 1, 0, 1], silent, yes].astype(float))
    before = sparse.csr_matrix(np.c_[[0, 1, 0, 1, 1], [1, 1, 1, 0, 1], yes].astype(float))
    usable = np.array([True, True, False])
    found = best_of_places({"before": before, "value": value}, {"before": yes, "value": yes}, usable)
    assert found == (1, "value", -1)
    assert best_of_places({"before": value[:, [0, 2, 2]]}, {"before": yes}, usable) == (1, "before", 1)


def test_what_was_measured_is_read_back(tmp_path):
    written = measured(gain_reflection=(0.1, 0.02), error_nu_eps=0.05)
    written.write(tmp_path)
    read = Measured.read(tmp_path)
    assert read.values == written.values and read.error_feature == 0 and read.alive.tolist() == [True] * 3
    assert np.array_equal(read.draws["gain_reflection"], written.draws["gain_reflection"])


def test_every_prediction_is_about_a_quantity_with_a_side():
    assert len({q for _, q, _, _ in PREDICTIONS.values()}) == len(PREDICTIONS)
    assert {side for _, _, side, _ in PREDICTIONS.values()} == {"above", "below"}
    assert len(verdicts.DICTIONARIES) == 2
