"""Whole thoughts are for puzzles. What they say is tested in tests/steering/test_experiments.py."""

import pytest

from lib.settings import UserError
from lib.study import thoughts


def test_a_pair_without_puzzles_is_told_so():
    class Fake:
        class pair:
            name, generated = "real", False

        store = crosscoder = None
        seed = 0

    for part in (thoughts.compute_thoughts, thoughts.compute_transplants):
        with pytest.raises(UserError, match="leave notebook 13 out"):
            part.__wrapped__(Fake())
