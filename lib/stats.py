"""Every interval, of 95% by default: of a share, of resampled groups, of a few numbers, of blocks left out.

Whole groups (documents, puzzles, pairs of words) are resampled: what stands in one group is not independent.
"""

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import pandas as pd
from scipy import stats

from .settings import check

NO_INTERVAL = (math.nan, math.nan)


def wilson(successes: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a proportion; NaN for n = 0. It holds its level at 0 and 1, p ± 1.96 se not.

    Source: Wilson 1927, "Probable inference, the law of succession, and statistical inference"."""
    if not 0 <= successes <= n:
        raise ValueError(f"{successes} successes of {n}: must be from 0 to n")
    if n == 0:
        return NO_INTERVAL
    interval = stats.binomtest(int(successes), int(n)).proportion_ci(level, method="wilson")
    return float(interval.low), float(interval.high)


def bootstrap(
    values, statistic: Callable = np.mean, groups=None, n_boot: int = 1000, seed: int = 0, level: float = 0.95
) -> tuple[float, float]:
    """Percentile interval of ``statistic(values)``, values [n] or [n, columns], resampled by row.

    ``groups`` [n] (document numbers, say) resamples whole groups: tokens of one document are not independent,
    and an interval over tokens would be far too narrow. Resamples in which the statistic is NaN are left out.
    """
    values = np.asarray(values)
    if len(values) == 0:
        return NO_INTERVAL
    if groups is not None and len(groups) != len(values):
        raise ValueError(f"{len(groups)} groups for {len(values)} values: must be one each")
    group = np.arange(len(values)) if groups is None else _numbered(groups)
    counts = np.bincount(group)
    samples = group_samples(len(counts), n_boot, seed)
    if statistic is np.mean and values.ndim == 1:  # sums and counts of the groups suffice: nothing is copied
        sums = np.bincount(group, weights=values.astype(float))
        resampled = [sums[sample].sum() / counts[sample].sum() for sample in samples]
    elif groups is None:
        resampled = [statistic(values[sample]) for sample in samples]
    else:
        members = np.split(np.argsort(group, kind="stable"), np.cumsum(counts)[:-1])
        resampled = [statistic(values[np.concatenate([members[g] for g in sample])]) for sample in samples]
    return interval(resampled, level)


def group_samples(n_groups: int, n_boot: int = 1000, seed: int = 0) -> Iterator[np.ndarray]:
    """Which groups each resample draws, with repeats: ``n_boot`` times [n_groups] numbers of groups."""
    rng = np.random.default_rng(seed)
    return (rng.integers(n_groups, size=n_groups) for _ in range(n_boot))


def group_weights(n_groups: int, n_boot: int = 1000, seed: int | np.random.Generator = 0) -> np.ndarray:
    """How often each group is drawn in each resample: counts [n_boot, n_groups], rows sum to ``n_groups``.

    A statistic that is a function of sums over groups needs no copies: ``group_weights(...) @ sums``. Several
    statistics with the same weights are paired, so that their differences can be taken resample by resample.
    """
    return np.random.default_rng(seed).multinomial(n_groups, np.full(n_groups, 1 / n_groups), size=n_boot)


def percentiles(resampled, level: float = 0.95, axis: int = 0) -> np.ndarray:
    """(low, high) of resampled values [n_boot, ...] along ``axis``, without NaN; NaN if nothing is left."""
    ends = [(1 - level) / 2, (1 + level) / 2]
    if not np.isnan(resampled).any():
        return np.quantile(resampled, ends, axis=axis)  # the same, twenty times as fast
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "All-NaN slice encountered", RuntimeWarning)
        return np.nanquantile(resampled, ends, axis=axis)


def interval(resampled, level: float = 0.95) -> tuple[float, float]:
    """``percentiles`` of the resampled values [n_boot] of one number, as two floats."""
    resampled = np.asarray(resampled, dtype=float)
    low, high = percentiles(resampled, level) if len(resampled) else NO_INTERVAL
    return float(low), float(high)


def ratio(a: np.ndarray, b: np.ndarray, least: float = 0.0) -> np.ndarray:
    """a / b, entry by entry; NaN where b is not above ``least``."""
    return np.divide(a, b, out=np.full(np.shape(a), np.nan), where=np.asarray(b) > least)


def t_interval(values, level: float = 0.95) -> tuple[float, float]:
    """Student's interval of the mean of a few numbers, one a seed say, without NaN; it takes at least two."""
    values = np.asarray(values, dtype=float)
    values = values[~np.isnan(values)]
    if len(values) < 2:
        return NO_INTERVAL
    half = stats.t.ppf(0.5 + level / 2, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5
    return float(values.mean() - half), float(values.mean() + half)


def pooled(values, intervals=None, level: float = 0.95) -> tuple[float, float, float]:
    """(mean, low, high) of a number that was measured with several crosscoders: values [S], without NaN.

    The interval covers the crosscoders, by Student's t over their values, and the documents (or puzzles) on
    which all were measured: ``intervals`` [S, 2], each crosscoder's own over documents. All saw the same
    documents, so that their errors are taken to be the same, which is the widest they can be: the mean's is
    the mean of theirs. Both kinds are independent; their distances from the mean add up as squares (MOVER:
    Zou & Donner 2008, "Construction of confidence limits about effect measures"). NaN with fewer than two
    crosscoders."""
    values = np.asarray(values, dtype=float)
    known = ~np.isnan(values)
    if not known.any():
        return math.nan, *NO_INTERVAL
    mean = float(values[known].mean())
    low, high = t_interval(values[known], level)
    if intervals is not None:
        distances = np.abs(np.asarray(intervals, dtype=float)[known] - values[known, None])
        below, above = np.nan_to_num(distances).mean(axis=0)
        low, high = mean - math.hypot(mean - low, below), mean + math.hypot(high - mean, above)
    return mean, low, high


def pooled_table(
    tables: Sequence[pd.DataFrame], keys: Sequence[str], values: Mapping[str, tuple[str, str]]
) -> pd.DataFrame:
    """The tables of several crosscoders in one: a row per combination of ``keys``, in the order in which they
    are met, with the columns of ``values`` {value: (its low, its high)} ``pooled``. A combination that a
    crosscoder lacks is pooled over the others. Of one crosscoder: its own rows."""
    columns = [*keys, *(name for value, ends in values.items() for name in (value, *ends))]
    if len(tables) == 1:
        return tables[0][columns].reset_index(drop=True)
    rows = []
    for key, group in pd.concat(tables, ignore_index=True).groupby(list(keys), sort=False, dropna=False):
        row = dict(zip(keys, key))
        for value, ends in values.items():
            row |= dict(zip((value, *ends), pooled(group[value], group[list(ends)])))
        rows.append(row)
    return pd.DataFrame(rows, columns=columns)


def difference(a: tuple, b: tuple) -> tuple[float, tuple[float, float] | None]:
    """a - b of two independent numbers (value, (low, high) or None), with an interval from both of theirs
    (MOVER: Zou & Donner 2008); NaN and None for what is missing."""
    (x, one), (y, other) = a, b
    if x is None or y is None:
        return math.nan, None
    if one is None or other is None or None in (*one, *other):
        return x - y, None
    (low, high), (other_low, other_high) = np.abs(np.subtract(one, x)), np.abs(np.subtract(other, y))
    return x - y, (x - y - np.hypot(low, other_high), x - y + np.hypot(high, other_low))


def jackknife(
    statistic: Callable[..., Mapping[str, float]],
    arrays: Sequence[np.ndarray],
    groups: np.ndarray,
    blocks: int = 20,
    seed: int = 0,
) -> pd.DataFrame:
    """``statistic(*arrays)`` with 95% intervals from leaving out blocks of documents: one row per number:
    statistic, value, low, high, n.

    ``arrays`` [n, ...], ``groups`` [n] document numbers. The documents are dealt into ``blocks``; se^2 = (b -
    1) / b sum (t_i - mean t)^2, and the interval takes Student's t with b - 1 degrees of freedom (Efron &
    Tibshirani 1993, ch. 11). n is the number of documents; with fewer than two there is no interval."""
    check("blocks", blocks, int, low=2)
    value, document = statistic(*arrays), _numbered(groups)
    documents = int(document.max()) + 1
    b = min(blocks, documents)
    block = (np.random.default_rng(seed).permutation(documents) % b)[document]
    half = dict.fromkeys(value, math.nan)
    if b > 1:
        left_out = pd.DataFrame([statistic(*(a[block != i] for a in arrays)) for i in range(b)])
        se = ((b - 1) / b * ((left_out - left_out.mean()) ** 2).sum(skipna=False)) ** 0.5
        half = (stats.t.ppf(0.975, b - 1) * se).to_dict()
    rows = [(name, v, v - half[name], v + half[name], documents) for name, v in value.items()]
    return pd.DataFrame(rows, columns=["statistic", "value", "low", "high", "n"])


def _numbered(groups) -> np.ndarray:
    """Names of groups as numbers from 0."""
    return np.unique(np.asarray(groups), return_inverse=True)[1].ravel()
