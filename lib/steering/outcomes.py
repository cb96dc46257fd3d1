"""What an intervention did to the model's thinking: lengths, answers and kinds of sentences, against the same
tasks untouched.

    rows = outcomes(tasks, transcripts, max_new_tokens)    # one row per task
    table = compare(rows of several conditions)            # one row per condition, with 95% intervals
    best = choose(table, "shorter", {"deduction": 1})      # on the split for choosing; report on another

Differences are paired: each task is compared with itself, and the bootstrap resamples tasks. A ratio is one
of mean lengths, so that long thoughts count by their length. Over-thinking is length without better answers,
incisive thinking brevity without worse ones; so length is never reported without accuracy, the share of
thoughts that never end, and what kinds of sentences were gained or lost.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from ..distil.trials import MODES, Task, transcript_table
from ..labels import CATEGORIES, REDUNDANT
from ..settings import UserError, check
from ..stats import group_weights, interval
from ..text.puzzles import sentences_of

RATES = (*CATEGORIES, REDUNDANT)
NO_STEERING = "none"


def outcomes(
    tasks: Sequence[Task], transcripts: Sequence[Sequence[str]], max_new_tokens: int
) -> pd.DataFrame:
    """``trials.transcript_table`` and what follows from it, one row per task.

    - ``length``: tokens up to the end of thinking. If the thought is not closed but the model goes over to an
      answer
      or stops, up to there; if it never ends, ``max_new_tokens``, and ``runaway`` is True.
    - ``redundant``: sentences that check what was right already (verification, and reflection after a correct
      step);
      ``needed``: all others of the categories; ``redundant_tokens`` and ``needed_tokens`` likewise (tokens of
      reflections are shared out by their number).
    """
    frame = transcript_table(tasks, transcripts)
    ended = [_end_of_thought(words, max_new_tokens) for words in transcripts]
    frame["length"] = np.where(
        frame["closed"], frame["thinking_tokens"], [length for length, _ in ended]
    ).astype(float)
    frame["runaway"] = ~frame["closed"].astype(bool) & np.array([runaway for _, runaway in ended], dtype=bool)
    idle = (frame["n_reflection"] - frame["errors_reflected"]).clip(lower=0)
    idle_tokens = frame["t_reflection"] * idle / frame["n_reflection"].clip(lower=1)
    frame["redundant"] = frame[f"n_{REDUNDANT}"] + idle
    frame["needed"] = sum(frame[f"n_{c}"] for c in CATEGORIES) - idle
    frame["redundant_tokens"] = frame[f"t_{REDUNDANT}"] + idle_tokens
    frame["needed_tokens"] = frame["length"] - frame["redundant_tokens"]
    return frame


def _end_of_thought(words: Sequence[str], max_new_tokens: int) -> tuple[int, bool]:
    """(length, runaway) of a thought that is not closed."""
    length = 0
    for sentence in sentences_of(list(words)):
        if sentence[0] == "answer":
            return length, False
        length += len(sentence)
    runaway = len(words) - len(MODES["think"]) >= max_new_tokens
    return (max_new_tokens if runaway else length), runaway


# --- comparing and choosing ---------------------------------------------------------------------------------


def compare(outcomes: pd.DataFrame, n_boot: int = 1000, seed: int = 0) -> pd.DataFrame:
    """Every condition against the unsteered model, on the same tasks: one row per direction and strength.

    With 95% intervals (``_low``, ``_high``) of a paired bootstrap over tasks: length (mean), length_ratio (of
    mean lengths), accuracy, chain (answer and every step right), accuracy_change, chain_change, runaway
    (share), redundant_ratio and needed_ratio (of tokens; NaN where the unsteered model has none), and for
    every c of RATES rate_c (sentences per 100 tokens of thought) and rate_ratio_c (against the unsteered
    model). Then n. The unsteered model is the first row.
    """
    wanted = {
        "length": "length",
        "correct": "accuracy",
        "chain_correct": "chain",
        "runaway": "runaway",
        "redundant_tokens": "redundant",
        "needed_tokens": "needed",
        **{f"n_{c}": c for c in RATES},
    }
    keys = ["direction", "label", "strength"]
    cells = {
        key: group.sort_values("task")[list(wanted)].to_numpy(dtype=float)
        for key, group in outcomes.groupby(keys, sort=False)
    }
    base = next(values for key, values in cells.items() if key[0] == NO_STEERING)
    n = len(base)
    # row 0: the data itself
    weights = np.concatenate([np.ones((1, n)), group_weights(n, n_boot, seed)]) / n
    column = {name: i for i, name in enumerate(wanted.values())}
    before = weights @ base
    rows = []
    for key, values in cells.items():
        after = weights @ values
        drawn = {
            "length": after[:, column["length"]],
            "length_ratio": _ratio(after, before, column["length"]),
        }
        for name in ("accuracy", "chain", "runaway"):
            drawn[name] = after[:, column[name]]
        for name in ("accuracy", "chain"):
            drawn[f"{name}_change"] = after[:, column[name]] - before[:, column[name]]
        for name in ("redundant", "needed"):
            drawn[f"{name}_ratio"] = _ratio(after, before, column[name])
        for c in RATES:
            drawn[f"rate_{c}"] = 100 * after[:, column[c]] / np.maximum(after[:, column["length"]], 1e-9)
            drawn[f"rate_ratio_{c}"] = drawn[f"rate_{c}"] / _nan_if_zero(
                100 * before[:, column[c]] / before[:, column["length"]]
            )
        row = dict(zip(keys, key))
        for name, draws in drawn.items():
            row[name] = float(draws[0])
            row[f"{name}_low"], row[f"{name}_high"] = interval(draws[1:])
        rows.append({**row, "n": n})
    return pd.DataFrame(rows)


def _ratio(after: np.ndarray, before: np.ndarray, column: int) -> np.ndarray:
    return after[:, column] / _nan_if_zero(before[:, column])


def _nan_if_zero(values: np.ndarray) -> np.ndarray:
    return np.where(values > 0, values, np.nan)


def choose(
    comparison: pd.DataFrame,
    aim: str,
    labels: Mapping[str, int] | Sequence[str],
    accuracy_loss: float = 1.0,
    runaway: float = 1.0,
) -> pd.Series:
    """The condition that makes thinking longest (``aim`` "longer") or shortest ("shorter"), within limits.

    ``labels``: the labels that may be used, as a list, or with a sign each ({"deduction": 1, "verification":
    -1}). Limits: the share of tasks by which accuracy or the chain of steps may fall, and the share of
    thoughts that may never end. Where no condition keeps to them, the one that exceeds them least is taken.
    The row gets ``within_limits``.
    """
    check("aim", aim, str, choices=("longer", "shorter"))
    signs = dict(labels) if isinstance(labels, Mapping) else {label: 0 for label in labels}
    usable = comparison[comparison["label"].isin(signs)]
    usable = usable[
        [signs[label] * strength >= 0 for label, strength in zip(usable["label"], usable["strength"])]
    ]
    if usable.empty:
        raise UserError(
            f"no condition steers one of {', '.join(signs)} with the wanted sign: add strengths or candidates"
        )
    loss = -usable[["accuracy_change", "chain_change"]].min(axis=1)
    excess = (loss - accuracy_loss).clip(lower=0) + (usable["runaway"] - runaway).clip(lower=0)
    within = usable[excess <= 1e-9]
    ratio = (within if len(within) else usable[excess == excess.min()])["length_ratio"]
    row = usable.loc[ratio.idxmax() if aim == "longer" else ratio.idxmin()].copy()
    row["within_limits"] = bool(len(within))
    return row


def rivals(comparison: pd.DataFrame, longer: Mapping, shorter: Mapping, accuracy_loss: float = 0.05) -> int:
    """How many random directions, at the chosen strengths, do as well as what was chosen.

    That is, lengthen thinking as much as ``longer`` (rows of ``comparison`` or of ``choose``), or shorten it
    as much as ``shorter`` does without losing more accuracy than ``accuracy_loss``.
    """
    found = set()
    for row, sign in ((longer, 1), (shorter, -1)):
        mine = comparison[
            (comparison["direction"] == row["direction"]) & (comparison["strength"] == row["strength"])
        ].iloc[0]
        noise = comparison[
            (comparison["label"] == "random") & (comparison["strength"] == abs(row["strength"]))
        ]
        as_good = sign * noise["length_ratio"] >= sign * mine["length_ratio"]
        if sign < 0:
            as_good &= noise["accuracy_change"] >= -accuracy_loss
        found |= set(noise.loc[as_good, "direction"])
    return len(found)
