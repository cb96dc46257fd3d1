"""How often does a "unique" feature appear where there is nothing to find, and does it come back with another
seed?

**Null calibration.** ``null_a`` and ``null_b`` are the base trained on, on its own data, for as many tokens
and on the same schedule as the distilled model. Between the base and such a continuation nothing was learnt
that deserves a name, so what a crosscoder calls unique there is noise of training. Base against null_a sets
thresholds::

    NRN_i  > quantile_{1 - level} of NRN over the null's alive features        (side "distilled"; < quantile_level: side "base")
    nu_i   < quantile_level of nu over the null's features of that side

Base against null_b, with another crosscoder seed, was not looked at for that: the share of its features
beyond the thresholds is the false-positive rate that a threshold really has. (A model against itself gives
NRN 0.5 exactly: a unit test, not a null.)

**Seeds.** Features of two crosscoders are matched one to one by the cosine of their decoder rows (all models'
rows side by side, in scaled space) such that the sum of cosines is largest (Hungarian algorithm). A feature's
*stability* is its mean cosine with its matches in crosscoders of other seeds. What the same matching finds in
rows whose coordinates were permuted is the chance level.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from scipy.optimize import linear_sum_assignment
from torch.nn import functional

from ..crosscoder.model import CrossCoder
from ..features.uniqueness import LEVELS, SCORES, SIDES, beyond, extremity, sign
from ..features.uniqueness import score_table as score_table
from ..settings import check
from ..stats import bootstrap, wilson


def thresholds(
    null: pd.DataFrame, levels: Sequence[float] = LEVELS, n_boot: int = 1000, seed: int = 0
) -> pd.DataFrame:
    """Thresholds that a share ``level`` of the null's features exceed: score, side, level, threshold, low,
    high (95%, over features), n.

    ``null`` is a ``score_table``. A threshold is in the units of its score: NRN above it (side base: below
    it), nu below it.
    """
    check("levels", list(levels), list, low=0, high=0.5)
    rows = []
    for score in SCORES:
        for side in SIDES:
            values = extremity(null, score, side).to_numpy()
            direction = sign(score, side)
            for level in levels:
                at = lambda x, level=level: np.quantile(x, 1 - level) if len(x) else np.nan  # noqa: E731
                bounds = sorted(direction * b for b in bootstrap(values, at, n_boot=n_boot, seed=seed))
                rows.append(
                    {
                        "score": score,
                        "side": side,
                        "level": level,
                        "threshold": direction * at(values),
                        "low": bounds[0],
                        "high": bounds[1],
                        "n": len(values),
                    }
                )
    return pd.DataFrame(rows)


def rates(table: pd.DataFrame, limits: pd.DataFrame, levels: Sequence[float] = LEVELS) -> pd.DataFrame:
    """Share of the features beyond each threshold: score, side, level, rate, low, high (Wilson), hits, n.

    On a null that set no threshold this is the false-positive rate; on a pair, what is left of its unique
    features. ``n`` are the alive features (for nu: those of the side).
    """
    rows = []
    for score in SCORES:
        for side in SIDES:
            n = len(extremity(table, score, side))
            for level in levels:
                hits = int(beyond(table, limits, score, side, level).sum())
                rows.append({"score": score, "side": side, "level": level, **_share(hits, n)})
    return pd.DataFrame(rows)


def _share(hits: int, n: int) -> dict[str, float]:
    low, high = wilson(hits, n)
    return {"rate": hits / n if n else np.nan, "low": low, "high": high, "hits": hits, "n": n}


def centred_rates(
    null_scores: pd.DataFrame, scores: pd.DataFrame, rates: pd.DataFrame, level: float = LEVELS[0]
) -> pd.DataFrame:
    """Share of alive features whose NRN lies further above its own crosscoder's median than the null's limit:
    role, rate, low, high, hits, n.

    NRN compares rows after each model was brought to the same mean norm. If one model's variance is then
    larger, all of its rows are longer, and the whole distribution moves: a matter of scale, which ``rates``
    counts as uniqueness of every feature. Here only what stands out from its own pair counts. The tables are
    those of the study's part "nulls", the roles those in its ``rates``.
    """
    roles = rates.drop_duplicates(["pair", "seed"]).set_index(["pair", "seed"])["role"]
    every = {
        key: part[part["alive"].astype(bool)]["nrn"] for key, part in null_scores.groupby(["pair", "seed"])
    }
    own = next(key for key, role in roles.items() if role == "the pair")
    every[own] = scores[scores["alive"].astype(bool)]["nrn"]
    above = {roles[key]: nrn - nrn.median() for key, nrn in every.items() if roles[key] != "spread"}
    limit = np.quantile(above["sets the thresholds"], 1 - level)
    return pd.DataFrame(
        [
            {"role": role, **_share(int((distance > limit).sum()), len(distance))}
            for role, distance in above.items()
        ]
    )


# --- seeds --------------------------------------------------------------------------------------------------


def match(
    a: CrossCoder, b: CrossCoder, alive_a: np.ndarray, alive_b: np.ndarray, shuffle: int | None = None
) -> pd.DataFrame:
    """One-to-one matches between the alive features of two crosscoders: feature, match, cosine; one row per
    alive feature of ``a``.

    Features of ``a`` that are left over, if ``b`` has fewer, get match -1 and cosine NaN. ``shuffle`` (a
    seed) permutes the coordinates of b's rows, the same way for all features: the chance level. Source: Kuhn
    1955; scipy's linear_sum_assignment.
    """
    ours, theirs = np.flatnonzero(alive_a), np.flatnonzero(alive_b)
    rows_a, rows_b = (functional.normalize(c.W_dec.detach()[i], dim=-1) for c, i in ((a, ours), (b, theirs)))
    if shuffle is not None:
        rows_b = rows_b[:, torch.randperm(rows_b.shape[1], generator=torch.Generator().manual_seed(shuffle))]
    cosines = (rows_a @ rows_b.T).numpy()
    left, right = linear_sum_assignment(cosines, maximize=True)
    table = pd.DataFrame({"feature": ours, "match": -1, "cosine": np.nan})
    table.loc[left, "match"], table.loc[left, "cosine"] = theirs[right], cosines[left, right]
    return table


def stability(crosscoders: Sequence[CrossCoder], alive: Sequence[np.ndarray], seed: int = 0) -> pd.DataFrame:
    """Stability of the features of the first crosscoder over the others: one row per alive feature.

    feature, match_<s> and cosine_<s> for the other crosscoders s = 1, 2, ...; stability, stability_low (mean
    and lowest of the cosines), chance (mean cosine of its matches in permuted rows).
    """
    first, *others = crosscoders
    table = pd.DataFrame({"feature": np.flatnonzero(alive[0])})
    cosines, chance = [], []
    for s, other in enumerate(others, start=1):
        found = match(first, other, alive[0], alive[s])
        table[f"match_{s}"], table[f"cosine_{s}"] = found["match"], found["cosine"]
        cosines.append(found["cosine"])
        chance.append(match(first, other, alive[0], alive[s], shuffle=seed + s)["cosine"])
    table["stability"], table["stability_low"] = (
        pd.concat(cosines, axis=1).mean(axis=1),
        pd.concat(cosines, axis=1).min(axis=1),
    )
    table["chance"] = pd.concat(chance, axis=1).mean(axis=1)
    return table
