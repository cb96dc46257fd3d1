"""Responses to steering: outcomes, comparison and choice against hand-made transcripts and tables."""

import random

import numpy as np
import pandas as pd
import pytest

from lib.settings import UserError
from lib.steering import outcomes as responses
from lib.text.puzzles import Question, Teacher


def test_outcomes_of_hand_written_transcripts():
    question = Question(5, "- 1")
    solved = [
        w for s in Teacher(random.Random(0), error_rate=0, verify_rate=1).solve(question) for w in s.words
    ]
    needless = "think : start : 5 - 1 = 4 . wait , 5 - 1 = 4 . done . answer : 4 .".replace(
        "- 1", "-_1"
    ).split()
    needless = [w.replace("_", " ") for w in needless]
    unclosed = ["think", ":", "start", ":", "5", "- 1", "=", "4", ".", "answer", ":", "4", "."]
    endless = ["think", ":"] + ["so"] * 20
    frame = responses.outcomes([question] * 4, [solved, needless, unclosed, endless], max_new_tokens=20)
    thought = solved.index("done")
    assert frame["length"].tolist() == [thought, 16, 9, 20]
    assert frame["runaway"].tolist() == [False, False, False, True]
    assert frame["closed"].tolist() == [True, True, False, False]
    assert frame["redundant"].tolist() == [1, 1, 0, 0]
    assert frame["redundant_tokens"].tolist()[1:3] == [7, 0]
    assert frame["correct"].tolist() == [True, True, True, False]
    np.testing.assert_allclose(frame["needed_tokens"] + frame["redundant_tokens"], frame["length"])


def table(**conditions):
    """Rows of ``outcomes`` from {"name strength": (lengths, corrects)}."""
    frames = []
    for key, (lengths, corrects) in conditions.items():
        label, strength = key.rsplit("_", 1)
        frames.append(
            pd.DataFrame(
                {
                    "direction": label,
                    "label": label,
                    "strength": float(strength),
                    "task": range(len(lengths)),
                    "length": lengths,
                    "correct": corrects,
                    "chain_correct": corrects,
                    "runaway": [x >= 100 for x in lengths],
                    "redundant_tokens": 2.0,
                    "needed_tokens": 8.0,
                    **{f"n_{c}": 1 for c in responses.RATES},
                }
            )
        )
    return pd.concat(frames, ignore_index=True)


def test_compare_by_hand():
    outcomes = table(**{"none_0": ([10, 20, 30], [1, 1, 0]), "reflection_1": ([20, 40, 60], [1, 0, 0])})
    shuffled = outcomes.sample(frac=1, random_state=0)  # the order of rows does not matter
    found = responses.compare(shuffled).set_index("direction").loc["reflection"]
    assert found["length_ratio"] == pytest.approx(2)
    # paired: each thought doubled
    assert (found["length_ratio_low"], found["length_ratio_high"]) == pytest.approx((2, 2))
    assert found["accuracy_change"] == pytest.approx(-1 / 3)
    assert found["accuracy_change_low"] < -1 / 3 < found["accuracy_change_high"] <= 0
    assert found["rate_deduction"] == pytest.approx(100 / 40)
    assert found["rate_ratio_deduction"] == pytest.approx(0.5)
    assert found["redundant_ratio"] == 1 and found["n"] == 3


def test_choose_keeps_to_its_limits():
    comparison = responses.compare(
        table(
            **{
                "none_0": ([10] * 4, [1] * 4),
                "reflection_1": ([20] * 4, [1] * 4),
                "reflection_2": ([100] * 4, [0] * 4),
                "deduction_1": ([8] * 4, [1] * 4),
                "deduction_2": ([4] * 4, [1, 0, 0, 0]),
                "deduction_-1": ([5] * 4, [1] * 4),
            }
        )
    )
    longest = responses.choose(comparison, "longer", ["reflection"], runaway=0.5)
    assert (longest["label"], longest["strength"], longest["within_limits"]) == ("reflection", 1.0, True)
    assert responses.choose(comparison, "longer", ["reflection"])["strength"] == 2.0
    shortest = responses.choose(comparison, "shorter", {"deduction": 1}, accuracy_loss=0.05)
    assert (shortest["strength"], shortest["within_limits"]) == (1.0, True)
    assert responses.choose(comparison, "shorter", {"deduction": 0}, accuracy_loss=0.05)["strength"] == -1.0
    worse = responses.compare(
        table(
            **{
                "none_0": ([10] * 4, [1] * 4),
                "deduction_1": ([8] * 4, [0] * 4),
                "deduction_2": ([7] * 4, [1, 1, 0, 0]),
            }
        )
    )
    fallback = responses.choose(worse, "shorter", {"deduction": 1}, accuracy_loss=0.05)
    assert (fallback["strength"], fallback["within_limits"]) == (2.0, False)
    with pytest.raises(UserError, match="no condition steers one of contrast"):
        responses.choose(comparison, "longer", ["contrast"])


def test_rivals_counts_random_directions_that_do_as_well():
    def row(name, label, strength, ratio, change=0.0):
        return {
            "direction": name,
            "label": label,
            "strength": strength,
            "length_ratio": ratio,
            "accuracy_change": change,
        }

    longer, shorter = row("reflection 1", "reflection", 1.0, 1.6), row("deduction 2", "deduction", -0.5, 0.8)
    noise = [
        row("random 0", "random", 1.0, 1.7),
        row("random 0", "random", 0.5, 0.7, -0.3),
        row("random 1", "random", 1.0, 1.1),
        row("random 1", "random", 0.5, 0.75, -0.01),
        row("random 2", "random", 1.0, 0.2),
        row("random 2", "random", 0.5, 0.9),
    ]
    table = pd.DataFrame([longer, shorter, *noise])
    assert responses.rivals(table, longer, "longer") == 1  # 0
    assert responses.rivals(table, shorter, "shorter") == 1  # 1; 0 is as short, and loses accuracy
