"""The predictions asked of one crosscoder at a time and of all, against numbers worked out by hand."""

import pytest

from lib.labels import CATEGORIES
from lib.results import Results
from lib.runs import Run
from lib.study import verdicts
from lib.study.verdicts import PREDICTIONS, answers, judged, single
from lib.verdicts import DEPENDS, NO, UNDECIDED, YES


def over_crosscoders(tmp_path, **values) -> Results:
    """Five crosscoders with quantities (value, half the width of its interval) by hand; all others on the
    side of their prediction."""
    pooled = Results("18", Run("tiny", "r", tmp_path), {})
    for seed, (own, _) in enumerate(pooled.over(range(5))):
        for _, c in PREDICTIONS.values():
            own.add(c.metric, c.limit + 0.04 * c.side)
        for name, each in values.items():
            value, half = each[seed]
            own.add(name, value, (value - half, value + half))
    return pooled


@pytest.mark.parametrize(
    "each, holds, fails, verdict",
    (
        ([(0.1, 0.02)] * 5, 5, 0, YES),
        ([(-0.1, 0.02)] * 5, 0, 5, NO),
        ([(0.1, 0.02), (0.12, 0.02), (0.11, 0.02), (-0.2, 0.02), (-0.1, 0.02)], 3, 2, DEPENDS),
        ([(0.1, 0.02), (0.12, 0.02), (0.11, 0.02), (0.1, 0.02), (-0.2, 0.02)], 4, 1, DEPENDS),
        ([(0.01, 0.03)] * 5, 0, 0, UNDECIDED),
    ),
)
def test_what_each_says_and_what_all_of_them_say(tmp_path, each, holds, fails, verdict):
    row = judged(over_crosscoders(tmp_path, gain_reflection=each)).set_index("prediction")
    row = row.loc["reflection, predicted"]
    assert (row["holds"], row["fails"], row["verdict"]) == (holds, fails, verdict)
    assert row["value"] == pytest.approx(sum(value for value, _ in each) / 5)


def test_a_limit_from_above_turns_the_side_round(tmp_path):
    pooled = over_crosscoders(
        tmp_path, ablate_reflection_distilled=[(-1.0 - 0.01 * s, 0.1) for s in range(5)]
    )
    row = judged(pooled).set_index("prediction").loc["reflection, needed"]
    assert row["verdict"] == YES and row["holds"] == 5 and row["low"] < -1.02 < row["high"]
    assert (answers(single(pooled)).loc["reflection, needed"] == 1).all()


def test_a_value_that_depends_on_the_weights_alone_is_its_own_interval(tmp_path):
    table = single(over_crosscoders(tmp_path))
    rows = table[table["quantity"] == "nrn_over_0_9"]
    assert rows["seed"].tolist() == list(range(5)) and (rows["low"] == rows["high"]).all()


def test_every_prediction_is_about_a_quantity_of_its_own():
    metrics = [c.metric for _, c in PREDICTIONS.values()]
    assert len(set(metrics)) == len(metrics) == 18
    assert {f"gain_{c}" for c in CATEGORIES} < set(metrics) and len(verdicts.DICTIONARIES) == 2
