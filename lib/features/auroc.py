"""How well does a sparse code, or a token, tell some positions from others? AUROC, precision and recall for
all features at once, from codes and label arrays; no model and no store is needed.

The AUROC of a feature is the probability that it is more active at a random positive position than at a
random negative one, ties counting half: with R the sum of the positives' ranks (1..n, ties averaged) it is

    AUROC = (R - P (P + 1) / 2) / (P N)          P positives, N negatives  (Mann & Whitney 1947)

Codes are sparse: in a column with z zeros all zeros share the rank (z + 1) / 2, and only the nonzero entries
need to be sorted.

Token-only predictors are the control that most detectors in the literature lack: they see the current token's
id and nothing else, and are fitted on other documents than they are judged on."""

from collections.abc import Callable, Sequence
from itertools import islice

import numpy as np
from scipy import sparse

from ..stats import group_samples, ratio

BOOT_CELLS = 4_000_000  # of a bootstrap at a time: bounds the memory


def auroc(codes: sparse.spmatrix, positive: np.ndarray) -> np.ndarray:
    """AUROC of every feature: codes [n, F] >= 0, positive [n] bool -> [F], or positive [n, C] -> [F, C].

    A feature that never fires has 0.5. NaN where there is no positive, or no negative, position."""
    data, rows, columns, starts, n = _entries(codes)
    order = np.lexsort((data, columns))
    rows, columns = rows[order], columns[order]
    zeros = n - np.diff(starts)
    ranks = _tied_ranks(data[order], columns) - starts[columns] + zeros[columns]

    def one(positive: np.ndarray) -> np.ndarray:
        hit, positives = positive[rows], int(positive.sum())
        at_zero = positives - np.bincount(columns[hit], minlength=len(zeros))
        rank_sum = np.bincount(columns[hit], weights=ranks[hit], minlength=len(zeros))
        rank_sum = rank_sum + at_zero * (zeros + 1) / 2
        pairs = positives * (n - positives)
        return (rank_sum - positives * (positives + 1) / 2) / (pairs or np.nan)

    return _by_column(one, positive)


def best_thresholds(codes: sparse.spmatrix, positive: np.ndarray) -> np.ndarray:
    """For every feature the threshold t > 0 at which "f >= t" has the highest F1: shapes as for ``auroc``.

    Among equals the highest. NaN for a feature that never fires, and where there is no positive position."""
    data, rows, columns, starts, n = _entries(codes)
    order = np.lexsort((-data, columns))
    data, rows, columns = data[order], rows[order], columns[order]
    # positions that this threshold and all higher ones admit
    taken = np.arange(len(data)) - starts[columns] + 1
    # a threshold admits all equal values
    last = np.append((columns[1:] != columns[:-1]) | (data[1:] != data[:-1]), True)[: len(data)]
    fires, first = np.unique(columns, return_index=True)

    def one(positive: np.ndarray) -> np.ndarray:
        thresholds, best = np.full((2, len(starts) - 1), np.nan)
        if positive.any() and len(data):
            total = np.concatenate([[0], np.cumsum(positive[rows])])
            f1 = np.where(last, 2 * (total[1:] - total[starts[columns]]) / (taken + positive.sum()), -1.0)
            best[fires] = np.maximum.reduceat(f1, first)
            at = np.flatnonzero(f1 == best[columns])
            which, index = np.unique(columns[at], return_index=True)
            thresholds[which] = data[at[index]]
        return thresholds

    return _by_column(one, positive)


def precision_recall(
    codes: sparse.spmatrix, positive: np.ndarray, thresholds: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Precision and recall of "f >= threshold", shapes as for ``auroc``. NaN where nothing is predicted, or
    nothing positive. With a threshold of NaN nothing is predicted: recall is 0."""
    data, rows, columns, starts, n = _entries(codes)

    def one(positive: np.ndarray, limits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        predicted = data >= limits[columns]
        taken = np.bincount(columns[predicted], minlength=len(limits))
        hits = np.bincount(columns[predicted], weights=positive[rows[predicted]], minlength=len(limits))
        return ratio(hits, taken), hits / (positive.sum() or np.nan)

    return tuple(_by_column(one, positive, np.asarray(thresholds, dtype=float)))


def _by_column(one: Callable[..., np.ndarray], positive: np.ndarray, *more: np.ndarray) -> np.ndarray:
    """``one`` of positive [n] (and of ``more``), or of each column of [n, C], stacked along the last axis."""
    positive = np.asarray(positive, dtype=bool)
    if positive.ndim == 1:
        return one(positive, *more)
    return np.stack([one(*columns) for columns in zip(positive.T, *(x.T for x in more))], axis=-1)


def _entries(codes: sparse.spmatrix) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, int]:
    """(values, rows, columns, start of each column [F + 1], n) of the nonzero entries, column by column."""
    columns = sparse.csc_matrix(codes)
    if columns is codes:
        columns = columns.copy()
    columns.eliminate_zeros()
    if columns.nnz and not columns.data.min() > 0:  # NaN too
        raise ValueError("codes must be finite and not negative")
    which = np.repeat(np.arange(columns.shape[1]), np.diff(columns.indptr))
    return columns.data, columns.indices, which, columns.indptr.astype(np.int64), columns.shape[0]


def _tied_ranks(data: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Ranks 1.. of entries that are sorted by (column, value), counted through all columns; equal values of a
    column share their mean."""
    if len(data) == 0:
        return np.zeros(0)
    first = np.flatnonzero(np.append(True, (columns[1:] != columns[:-1]) | (data[1:] != data[:-1])))
    sizes = np.diff(np.append(first, len(data)))
    return np.repeat(first + (sizes + 1) / 2, sizes)


def weighted_auroc(
    scores: np.ndarray, positive_weight: np.ndarray, negative_weight: np.ndarray
) -> np.ndarray:
    """AUROC of scores [n] under weights [..., n] -> [...]; NaN where either side weighs nothing."""
    order = np.argsort(scores, kind="stable")
    ordered = np.asarray(scores)[order]
    first = np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1]))
    up = np.add.reduceat(np.asarray(positive_weight, dtype=float)[..., order], first, axis=-1)
    down = np.add.reduceat(np.asarray(negative_weight, dtype=float)[..., order], first, axis=-1)
    return _mann_whitney(up, down)


def _mann_whitney(up: np.ndarray, down: np.ndarray) -> np.ndarray:
    """AUROC from the weights of positives and negatives at every distinct score, ascending (last axis)."""
    below = np.cumsum(down, axis=-1) - down / 2  # negatives below, and half of those at the same score
    pairs = up.sum(-1) * down.sum(-1)
    return ratio((up * below).sum(-1), pairs)


def auroc_of(scores: np.ndarray, positive: np.ndarray) -> float:
    """AUROC of one score [n] against positive [n]; NaN without both kinds."""
    if len(scores) == 0:
        return np.nan
    positive = np.asarray(positive, dtype=bool)
    return float(weighted_auroc(scores, positive, ~positive))


def auroc_resamples(
    scores: np.ndarray, positive: np.ndarray, groups: np.ndarray, n_boot: int = 1000, seed: int = 0
) -> np.ndarray:
    """AUROC in ``n_boot`` resamples of whole groups (documents), [n_boot]. The same seed and groups give the
    same resamples, so that the difference of two predictors can be taken pair by pair."""
    if len(scores) == 0:
        return np.full(n_boot, np.nan)
    positive = np.asarray(positive, dtype=bool)
    values, tie = np.unique(np.asarray(scores), return_inverse=True)
    ids = np.unique(np.asarray(groups), return_inverse=True)[1].ravel()
    n_groups = int(ids.max()) + 1
    # how many positives, and negatives, each document has at each score: a resample only weighs the documents
    at, shape = (tie.ravel(), ids), (len(values), n_groups)
    up_of, down_of = (sparse.csr_matrix((x.astype(float), at), shape=shape) for x in (positive, ~positive))
    draws, at_once = [], max(1, BOOT_CELLS // max(len(values), n_groups))
    samples = group_samples(n_groups, n_boot, seed)
    while part := list(islice(samples, at_once)):
        weights = np.stack([np.bincount(s, minlength=n_groups) for s in part], axis=1).astype(float)
        draws.append(_mann_whitney((up_of @ weights).T, (down_of @ weights).T))
    return np.concatenate(draws)


def symbol_scores(fit_symbols: np.ndarray, fit_positive: np.ndarray, symbols: np.ndarray) -> np.ndarray:
    """P(positive | symbol), from other data, for each of ``symbols`` [n] (integers >= 0, such as token ids):
    the best that a predictor can do that sees only the symbol.

    Smoothed towards the overall rate p: (positives + weight p) / (count + weight), so that a symbol never
    seen in the fit gets p."""
    size = int(max(fit_symbols.max(initial=-1), symbols.max(initial=-1))) + 1
    counts = np.bincount(fit_symbols, minlength=size)
    hits = np.bincount(fit_symbols, weights=np.asarray(fit_positive, dtype=float), minlength=size)
    rate = hits.sum() / max(counts.sum(), 1)
    return ((hits + rate) / (counts + 1))[symbols]


def token_r2(
    fit_codes: sparse.spmatrix, fit_tokens: np.ndarray, codes: sparse.spmatrix, tokens: np.ndarray
) -> np.ndarray:
    """Share of each feature's variance that the current token's identity explains out of sample, [F].

    The prediction is the feature's mean at that token in the fit (0 at a token that the fit does not have);
    R^2 = 1 - sum of squared errors / sum of squares about the mean. 1: a token detector; near 0: the token
    says nothing; below 0: worse than the mean (too rare to tell). NaN for a constant."""
    size = int(max(fit_tokens.max(initial=-1), tokens.max(initial=-1))) + 1
    counts = np.bincount(tokens, minlength=size).astype(float)
    inverse = sparse.diags_array(1 / np.maximum(np.bincount(fit_tokens, minlength=size), 1))
    means, sums = inverse @ sum_by(fit_tokens, fit_codes, size), sum_by(tokens, codes, size)
    squares = _column_sums(codes.multiply(codes))
    expected = sparse.diags_array(counts) @ means.multiply(means)
    error = squares - 2 * _column_sums(means.multiply(sums)) + _column_sums(expected)
    total = squares - _column_sums(codes) ** 2 / max(codes.shape[0], 1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(total > 1e-12 * np.maximum(squares, 1e-300), 1 - error / total, np.nan)


def token_fires_auroc(
    fit_codes: sparse.spmatrix,
    fit_tokens: np.ndarray,
    codes: sparse.spmatrix,
    tokens: np.ndarray,
    features: Sequence[int],
) -> np.ndarray:
    """AUROC with which the current token's identity, fitted on other data, predicts that a feature fires; one
    per ``features``."""
    features = np.asarray(features, dtype=int)
    size = int(max(fit_tokens.max(initial=-1), tokens.max(initial=-1))) + 1
    fit_counts, counts = np.bincount(fit_tokens, minlength=size), np.bincount(tokens, minlength=size)
    fit_fired = sum_by(fit_tokens, sparse.csc_matrix(fit_codes)[:, features] > 0, size).toarray()
    fired = sum_by(tokens, sparse.csc_matrix(codes)[:, features] > 0, size).toarray()
    rates = (fit_fired + fit_fired.sum(0) / max(len(fit_tokens), 1)) / (fit_counts[:, None] + 1)
    columns = zip(rates.T, fired.T, (counts[:, None] - fired).T)
    return np.array([weighted_auroc(*each) for each in columns])


def sum_by(symbols: np.ndarray, codes: sparse.spmatrix, size: int) -> sparse.csr_matrix:
    """Sum of the rows of codes [n, F] for every symbol 0 .. size - 1 -> [size, F], without negative ones."""
    keep = np.flatnonzero(symbols >= 0)
    which = sparse.csr_matrix((np.ones(len(keep)), (symbols[keep], keep)), shape=(size, len(symbols)))
    return sparse.csr_matrix(which @ codes.astype(np.float64))


def _column_sums(matrix: sparse.spmatrix) -> np.ndarray:
    return np.asarray(matrix.sum(axis=0), dtype=float).ravel()
