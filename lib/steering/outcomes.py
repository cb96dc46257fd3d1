"""What an intervention did to the model's thinking: lengths, answers and kinds of sentences, against the same
tasks untouched.

    rows = outcomes(tasks, transcripts, max_new_tokens)    # one row per task
    table = compare(rows of several conditions)            # one row per condition, with 95% intervals
    best = choose(table, "shorter", {"deduction": 1})      # on the split for choosing; report on another

Differences are paired: the bootstrap resamples tasks. A ratio is one of mean lengths. Over-thinking is length
without better answers, incisive thinking brevity without worse ones; so length is never reported alone."""

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
STEERED = ("length_ratio", "accuracy_change", "chain_change", "runaway", "redundant_ratio", "needed_ratio")


def outcomes(
    tasks: Sequence[Task], transcripts: Sequence[Sequence[str]], max_new_tokens: int
) -> pd.DataFrame:
    """``trials.transcript_table`` and what follows from it, one row per task.

    - ``length``: tokens up to the end of thinking. If the thought is not closed but the model goes over to an
      answer or stops, up to there; if it never ends, ``max_new_tokens``, and ``runaway`` is True.
    - ``redundant``: sentences that check what was right already (verification, and reflection after a correct
      step); ``needed``: all others of the categories; ``redundant_tokens`` and ``needed_tokens`` likewise
      (tokens of reflections are shared out by their number).
    """
    frame = transcript_table(tasks, transcripts)
    length, runaway = zip(*(_end_of_thought(words, max_new_tokens) for words in transcripts))
    closed = frame["closed"].astype(bool)
    frame["length"] = np.where(closed, frame["thinking_tokens"], length).astype(float)
    frame["runaway"] = ~closed & np.array(runaway, dtype=bool)
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


def compare(outcomes: pd.DataFrame, n_boot: int = 1000, seed: int = 0) -> pd.DataFrame:
    """Every condition against the unsteered model, on the same tasks: one row per direction and strength.

    With 95% intervals (``_low``, ``_high``) of a paired bootstrap over tasks: length (mean), length_ratio (of
    mean lengths), accuracy, chain (answer and every step right), accuracy_change, chain_change, runaway
    (share), redundant_ratio and needed_ratio (of tokens; NaN where the unsteered model has none), and for
    every c of RATES rate_c (sentences per 100 tokens of thought) and rate_ratio_c (against the unsteered
    model). Then n. The unsteered model is the first row."""
    columns = ["length", "correct", "chain_correct", "runaway", "redundant_tokens", "needed_tokens"]
    columns += [f"n_{c}" for c in RATES]
    names = ["length", "accuracy", "chain", "runaway", "redundant", "needed", *RATES]
    keys = ["direction", "label", "strength"]
    groups = outcomes.groupby(keys, sort=False)
    cells = {key: group.sort_values("task")[columns].to_numpy(dtype=float) for key, group in groups}
    base = next(values for key, values in cells.items() if key[0] == NO_STEERING)
    n = len(base)
    # row 0: the data itself
    weights = np.concatenate([np.ones((1, n)), group_weights(n, n_boot, seed)]) / n

    def means(values: np.ndarray) -> dict[str, np.ndarray]:
        return dict(zip(names, (weights @ values).T))

    before, rows = means(base), []
    for key, values in cells.items():
        after = means(values)
        ratio = {name: after[name] / _nan_if_zero(before[name]) for name in ("length", "redundant", "needed")}
        drawn = {"length": after["length"], "length_ratio": ratio["length"]}
        drawn |= {name: after[name] for name in ("accuracy", "chain", "runaway")}
        drawn |= {f"{name}_change": after[name] - before[name] for name in ("accuracy", "chain")}
        drawn |= {f"{name}_ratio": ratio[name] for name in ("redundant", "needed")}
        for c in RATES:
            drawn[f"rate_{c}"] = 100 * after[c] / np.maximum(after["length"], 1e-9)
            unsteered = 100 * before[c] / before["length"]
            drawn[f"rate_ratio_{c}"] = drawn[f"rate_{c}"] / _nan_if_zero(unsteered)
        row = dict(zip(keys, key))
        for name, draws in drawn.items():
            row[name] = float(draws[0])
            row[f"{name}_low"], row[f"{name}_high"] = interval(draws[1:])
        rows.append({**row, "n": n})
    return pd.DataFrame(rows)


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
    The row gets ``within_limits``."""
    check("aim", aim, str, choices=("longer", "shorter"))
    signs = dict(labels) if isinstance(labels, Mapping) else dict.fromkeys(labels, 0)
    usable = comparison[comparison["label"].isin(signs)]
    usable = usable[usable["label"].map(signs).astype(float) * usable["strength"] >= 0]
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


def at(comparison: pd.DataFrame, condition: Mapping) -> pd.Series:
    """The row of ``comparison`` with the direction and strength of ``condition``."""
    keys = ["direction", "strength"]
    return comparison[(comparison[keys] == [condition[key] for key in keys]).all(axis=1)].iloc[0]


def estimate(row: Mapping, value: str) -> tuple[float, tuple[float, float]]:
    """(value, interval) of a row of ``compare``."""
    return row[value], (row[f"{value}_low"], row[f"{value}_high"])


def rivals(comparison: pd.DataFrame, chosen: Mapping, way: str, accuracy_loss: float = 0.05) -> int:
    """How many random directions of ``comparison``, at the chosen strength, do as well as what was chosen:
    lengthen thinking as much (``way`` "longer"), or shorten it as much without losing more accuracy than
    ``accuracy_loss`` ("shorter")."""
    noise = comparison[comparison["label"] == "random"]
    noise = noise[noise["strength"] == abs(chosen["strength"])]
    length = at(comparison, chosen)["length_ratio"]
    if way == "longer":
        return int((noise["length_ratio"] >= length).sum())
    return int(((noise["length_ratio"] <= length) & (noise["accuracy_change"] >= -accuracy_loss)).sum())
