"""What carries the gap between the models: the verdict by hand."""

import pytest

from lib.settings import UserError
from lib.study import thoughts


@pytest.mark.parametrize(
    "unique, shared, matched, answer",
    [
        ((0.2, 0.4), (0.3, 0.5), (0.0, 0.1), "both"),
        ((0.2, 0.4), (0.0, 0.5), (0.0, 0.1), "unique features"),
        ((0.05, 0.4), (0.3, 0.5), (0.0, 0.1), "shared features, reweighted"),
        ((0.0, 0.0), (0.0, 0.0), (0.0, 0.0), "neither"),
        ((0.2, 0.4), (0.3, 0.5), (0.2, 0.4), "neither"),  # matched features do as much
        (None, (0.3, 0.5), None, "shared features, reweighted"),  # nothing is unique
    ],
)
def test_a_set_carries_the_gap_if_it_beats_nothing_and_matched_features(unique, shared, matched, answer):
    given = {"impose_unique": unique, "impose_shared": shared, "impose_random": matched}
    metrics = {name: {"value": 0.0, "ci": ci, "n": 9} for name, ci in given.items()}
    assert thoughts.verdict(metrics).startswith(answer)


def test_a_pair_without_puzzles_is_told_so():
    class Fake:
        class pair:
            name, corpus = "real", [{"path": "text.txt"}]

        store = crosscoder = None
        seed = 0

    with pytest.raises(UserError, match="leave notebook 13 out"):
        thoughts.compute_thoughts.__wrapped__(Fake(), 5, 2, 2, 10)
