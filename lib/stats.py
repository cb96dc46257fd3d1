"""Intervals: of a share, of a mean over groups, of percentiles."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pandas as pd
from scipy import stats
from scipy.stats import norm

from .settings import check

BLOCKS = 20  # of documents, for the jackknife


def wilson(successes: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a proportion; (nan, nan) for n = 0. Holds its level at 0 and 1, unlike p ±
    1.96 se.

    Source: Wilson 1927, "Probable inference, the law of succession, and statistical inference".
    """
    if not 0 <= successes <= n:
        raise ValueError(f"{successes} successes of {n}: must be from 0 to n")
    if n == 0:
        return math.nan, math.nan
    z = float(norm.ppf(0.5 + level / 2))
    p, scale = successes / n, 1 + z * z / n
    middle = (p + z * z / (2 * n)) / scale
    half = z / scale * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    # exact at the ends, whatever rounding says
    return 0.0 if successes == 0 else middle - half, 1.0 if successes == n else middle + half


def bootstrap(
    values, statistic: Callable = np.mean, groups=None, n_boot: int = 1000, seed: int = 0, level: float = 0.95
) -> tuple[float, float]:
    """Percentile bootstrap interval of ``statistic(values)``; values [n] or [n, columns], resampled by row.

    ``groups`` [n] (document ids, say) resamples whole groups: tokens of one document are not independent, and
    an interval over tokens would be far too narrow. Resamples in which the statistic is NaN are left out.
    """
    values = np.asarray(values)
    if len(values) == 0:
        return math.nan, math.nan
    if groups is not None and len(groups) != len(values):
        raise ValueError(f"{len(groups)} groups for {len(values)} values: must be one each")
    rng = np.random.default_rng(seed)
    ids = (
        np.arange(len(values))
        if groups is None
        else np.unique(np.asarray(groups), return_inverse=True)[1].ravel()
    )
    n_groups = int(ids.max()) + 1
    # sums and counts of the groups suffice: no copying of tokens
    if statistic is np.mean and values.ndim == 1:
        sums, counts = (
            np.bincount(ids, weights=values.astype(float), minlength=n_groups),
            np.bincount(ids, minlength=n_groups),
        )
        draws = (rng.integers(n_groups, size=n_groups) for _ in range(n_boot))
        found = [sums[draw].sum() / counts[draw].sum() for draw in draws]
    else:
        order = np.argsort(ids, kind="stable")
        members = np.split(order, np.cumsum(np.bincount(ids, minlength=n_groups))[:-1])
        draws = (rng.integers(n_groups, size=n_groups) for _ in range(n_boot))
        found = [statistic(values[np.concatenate([members[g] for g in draw])]) for draw in draws]
    found = np.asarray(found, dtype=float)
    if np.isnan(found).all():
        return math.nan, math.nan
    low, high = np.nanquantile(found, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def group_weights(n_groups: int, n_boot: int = 1000, seed: int = 0) -> np.ndarray:
    """How often each group is drawn in each resample, [n_boot, n_groups] counts: a bootstrap as weights.

    A statistic that is a function of sums over groups needs no copies: ``group_weights(...) @ sums``.
    """
    return np.random.default_rng(seed).multinomial(n_groups, np.full(n_groups, 1 / n_groups), size=n_boot)


def percentiles(draws: np.ndarray, level: float = 0.95, axis: int = 0) -> np.ndarray:
    """(low, high) of resampled values [n_boot, ...] along ``axis``, without NaN; NaN where nothing is left."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "All-NaN slice encountered", RuntimeWarning)
        return np.nanquantile(draws, [(1 - level) / 2, (1 + level) / 2], axis=axis)


def interval(draws: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """Percentile interval of one number's resampled values, without NaN; (nan, nan) if nothing is left."""
    low, high = percentiles(np.asarray(draws, dtype=float), level)
    return float(low), float(high)


def jackknife(
    statistic: Callable[..., Mapping[str, float]],
    arrays: Sequence[np.ndarray],
    groups: np.ndarray,
    blocks: int = BLOCKS,
    seed: int = 0,
) -> pd.DataFrame:
    """``statistic(*arrays)`` with 95% intervals from leaving out blocks of documents: one row per number:
    statistic, value, low, high, n.

    ``arrays`` [n, ...], ``groups`` [n] document numbers. The documents are dealt into ``blocks``; se^2 = (b -
    1) / b sum (t_i - mean t)^2, and the interval takes Student's t with b - 1 degrees of freedom (Efron &
    Tibshirani 1993, ch. 11). n is the number of documents; with fewer than two there is no interval.
    """
    check("blocks", blocks, int, low=2)
    value = statistic(*arrays)
    number = np.unique(np.asarray(groups), return_inverse=True)[1].ravel()
    documents = int(number.max()) + 1
    b = min(blocks, documents)
    block = (np.random.default_rng(seed).permutation(documents) % b)[number]
    half = {name: float("nan") for name in value}
    if b > 1:
        left_out = pd.DataFrame([statistic(*(a[block != i] for a in arrays)) for i in range(b)])
        half = (
            stats.t.ppf(0.975, b - 1)
            * ((b - 1) / b * ((left_out - left_out.mean()) ** 2).sum(skipna=False)) ** 0.5
        ).to_dict()
    return pd.DataFrame(
        [
            {"statistic": name, "value": v, "low": v - half[name], "high": v + half[name], "n": documents}
            for name, v in value.items()
        ]
    )
