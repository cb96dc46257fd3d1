"""Moved: lib.crosscoder.recurrence."""

from ..crosscoder.recurrence import LIMIT, SHARE, chance, match, recurrent, stability  # noqa: F401
