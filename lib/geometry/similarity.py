"""How alike are two models' activations, and where in them do features lie?

X [n, d_X] and Y [n, d_Y]: the same n tokens in two models. Four questions, each with a number that a rotation
of either space leaves alone:

- *Do they see the same tokens as alike?* **Linear CKA** (Kornblith et al. 2019, arXiv 1905.00414)::

      CKA = HSIC(K, L) / sqrt(HSIC(K, K) HSIC(L, L))            K = X X', L = Y Y'

  with the unbiased estimator of HSIC (Song et al. 2012): with K~, L~ the matrices without their diagonals
  and 1 a vector of ones::

      HSIC = [ tr K~L~ + (1'K~1)(1'L~1) / ((n-1)(n-2)) - 2 (1'K~L~1) / (n-2) ] / (n (n-3))

  The usual (biased) estimator calls unrelated activations alike when tokens are few for the width.
- *Is one a rotation of the other?* **Procrustes**: with X and Y centred and of Frobenius norm 1, the best
  orthogonal Q leaves ||XQ - Y||^2 = 2 (1 - s), s = ||X'Y||_* ; rescaled too, it leaves the share 1 - s^2 of
  Y's variance unexplained.
- *How many directions do they use?* **Effective rank** exp(-sum p log p), p = eigenvalues of the covariance
  over their sum (after Roy & Vetterli 2007), and beside it the participation ratio (sum l)^2 / sum l^2, which
  counts large directions more.
- *Where do some features write?* **Principal angles** between the span of their decoder rows and the leading
  principal components of a model's activations, against random sets of as many features.

Intervals come from a jackknife over blocks of documents, not from a bootstrap: a resample holds a token
twice, and two copies of one token are a similarity that no estimator without diagonal can know to leave out
(and a covariance of fewer distinct tokens has a lower rank)."""

from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np
import pandas as pd
from scipy.linalg import orthogonal_procrustes, subspace_angles

from ..activations.store import open_store
from ..crosscoder.codes import sample_rows
from ..crosscoder.model import CrossCoder
from ..models.pairs import load_pair
from ..results import Results
from ..runs import MANIFEST, Run
from ..settings import UserError, check
from ..stats import interval, jackknife


def hsic(x: np.ndarray, y: np.ndarray) -> float:
    """Unbiased estimate of HSIC with linear kernels, x [n, d_x], y [n, d_y], n > 3, in O(n d^2)."""
    x, y = _pair(x, y)
    n = len(x)
    if n < 4:
        raise UserError(f"{n} tokens for an unbiased HSIC: there must be at least 4")
    diagonal_x, diagonal_y = (x**2).sum(1), (y**2).sum(1)
    sums_x, sums_y = x @ x.sum(0) - diagonal_x, y @ y.sum(0) - diagonal_y  # K~1 and L~1
    traced = ((x.T @ y) ** 2).sum() - diagonal_x @ diagonal_y
    apart = sums_x.sum() * sums_y.sum() / ((n - 1) * (n - 2))
    return float((traced + apart - 2 * (sums_x @ sums_y) / (n - 2)) / (n * (n - 3)))


def cka(x: np.ndarray, y: np.ndarray) -> float:
    """Linear CKA of x [n, d_x] and y [n, d_y] from unbiased HSIC: 1 the same up to rotation and scale, 0 (or
    a little below) nothing in common. NaN where a model does not vary."""
    # HSIC does not change; its rounding does, where the mean is large
    x, y = (v - v.mean(0) for v in _pair(x, y))
    own = hsic(x, x) * hsic(y, y)
    return hsic(x, y) / own**0.5 if own > 0 else float("nan")


def procrustes(x: np.ndarray, y: np.ndarray) -> dict[str, float]:
    """How far x [n, d_x] is from y [n, d_y] when it may be moved, rotated (or mirrored) and scaled; the
    narrower one gets coordinates of 0.

    ``distance`` ||XQ - Y||_F with both centred and of norm 1 (0 to sqrt 2); ``unexplained`` the share of y's
    variance that remains after the best rotation and scale; ``unexplained_unrotated`` with the axes as they
    are (NaN for unlike widths). NaN where a model does not vary."""
    x, y = (v - v.mean(0) for v in _pair(x, y))
    norms = np.linalg.norm(x), np.linalg.norm(y)
    if min(norms) == 0:
        return dict.fromkeys(("distance", "unexplained", "unexplained_unrotated"), float("nan"))
    x, y = x / norms[0], y / norms[1]
    width = max(x.shape[1], y.shape[1])
    wide = [np.pad(v, ((0, 0), (0, width - v.shape[1]))) for v in (x, y)]
    alike = min(float(orthogonal_procrustes(*wide)[1]), 1.0)
    still = float((x * y).sum()) if x.shape == y.shape else float("nan")
    unexplained = {"unexplained": 1 - alike**2, "unexplained_unrotated": 1 - max(still, 0.0) ** 2}
    return {"distance": (2 * (1 - alike)) ** 0.5, **unexplained}


def spectrum(x: np.ndarray) -> np.ndarray:
    """Eigenvalues [d] of the covariance of x [n, d], the largest first; as shares of their sum. NaN where x
    does not vary."""
    x = x.astype(np.float64) - x.mean(0, dtype=np.float64)
    values = np.clip(np.linalg.eigvalsh(x.T @ x)[::-1], 0, None)
    return values / values.sum() if values.sum() > 0 else np.full(len(values), np.nan)


def effective_rank(shares: np.ndarray) -> float:
    """exp of the entropy of a ``spectrum``: d if all directions are alike, 1 if there is one."""
    present = shares[shares > 0]
    return float(np.exp(-(present * np.log(present)).sum())) if len(present) else float("nan")


def participation_ratio(shares: np.ndarray) -> float:
    """1 / sum of squares of a ``spectrum``: never above the effective rank."""
    return float(1 / (shares**2).sum())


def compare(x: np.ndarray, y: np.ndarray) -> dict[str, float]:
    """All numbers of two models on the same tokens: cka, procrustes_<...>, effective_rank_x, participation_x,
    and of y."""
    numbers = {"cka": cka(x, y)} | {f"procrustes_{name}": value for name, value in procrustes(x, y).items()}
    for name, shares in (("x", spectrum(x)), ("y", spectrum(y))):
        numbers[f"effective_rank_{name}"] = effective_rank(shares)
        numbers[f"participation_{name}"] = participation_ratio(shares)
    return numbers


def _pair(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if x.ndim != 2 or y.ndim != 2 or len(x) != len(y):
        raise UserError(
            f"activations have shapes {x.shape} and {y.shape}: both must be [tokens, width], on the same"
            " tokens"
        )
    return x, y


TEXTS = {"all": (0, 1), "general": (0,), "traces": (1,)}  # label arrays' ``kind``
LABELS = {"cka": "CKA", "procrustes_unexplained": "Procrustes, unexplained"}


def of_run(run: Run, max_tokens: int = 8_000, seed: int = 0) -> pd.DataFrame:
    """``compare`` of a pair's two models on tokens of the run's store (split "report"), by kind of text, with
    intervals from a jackknife over documents: text, statistic, value, low, high, n. Empty without a store."""
    columns = ["text", "statistic", "value", "low", "high", "n"]
    if not (run.path("store") / MANIFEST).is_file():
        return pd.DataFrame(columns=columns)
    store = open_store(run, load_pair(run.pair))
    rows = sample_rows(store, "report", max_tokens, seed)
    acts, documents = [a.numpy() for a in store.activations(rows)[:2]], store.documents[rows]
    kind = store.labels["kind"][rows] if "kind" in store.labels else np.zeros(len(rows), dtype=int)
    frames = []
    for text, kinds in TEXTS.items():
        chosen = np.isin(kind, kinds)
        if len(np.unique(documents[chosen])) > 1:
            found = jackknife(compare, [a[chosen] for a in acts], documents[chosen], seed=seed)
            frames.append(found.assign(text=text))
    return pd.concat(frames, ignore_index=True)[columns]


def add_metrics(results: Results, table: pd.DataFrame) -> str:
    """Metrics cka_<text> and procrustes_unexplained_<text> of ``of_run``, the table ``similarity``, and a
    sentence."""
    results.table("similarity", table)
    if table.empty:
        return "Not measured: it needs the activations of notebook 01."
    lines = []
    for text in table["text"].unique():
        for statistic in LABELS:
            row = table[(table["text"] == text) & (table["statistic"] == statistic)].iloc[0]
            results.add(f"{statistic}_{text}", row["value"], (row["low"], row["high"]), row["n"])
        parts = (f"{label} {results.text(f'{statistic}_{text}')}" for statistic, label in LABELS.items())
        lines.append(f"- {text}: " + ", ".join(parts))
    return "**What this run shows.** Base against distilled:\n" + "\n".join(lines)


def components(x: np.ndarray, dims: int) -> np.ndarray:
    """The ``dims`` leading principal components of x [n, d], orthonormal columns [d, dims]."""
    check("dims", dims, int, low=1, high=np.shape(x)[1])
    x = x.astype(np.float64) - x.mean(0, dtype=np.float64)
    return np.linalg.eigh(x.T @ x)[1][:, ::-1][:, :dims]


def span(rows: np.ndarray, dims: int) -> np.ndarray:
    """An orthonormal basis [d, k], k <= dims, of the leading directions of the rows [m, d] at unit length;
    rows of length 0 are left out."""
    rows = np.asarray(rows, dtype=np.float64)
    norms = np.linalg.norm(rows, axis=1)
    rows = rows[norms > 0] / norms[norms > 0, None]
    if not len(rows):
        raise UserError("there is no row of a length above 0: a subspace needs at least one")
    _, s, directions = np.linalg.svd(rows, full_matrices=False)
    return directions[: min(dims, int((s > 1e-9 * s[0]).sum()))].T


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    """Mean squared cosine of the principal angles between two subspaces (orthonormal columns [d, k]): 1 one
    holds the other, 0 orthogonal; k_b / d on average for a random one (k_a <= k_b)."""
    return float((np.cos(subspace_angles(a, b)) ** 2).mean())


def _against_null(value: float, null: np.ndarray) -> dict[str, float]:
    """null_low and null_high (95%); p, two-sided: the share of the null at least as far out, one counted in
    and doubled."""
    low, high = interval(null)
    tail = min((null <= value).sum(), (null >= value).sum())
    p = min(1.0, 2 * float(1 + tail) / (1 + len(null))) if np.isfinite(value) else float("nan")
    return {"null_low": low, "null_high": high, "p": p}


def feature_overlap(
    rows: np.ndarray,
    chosen: Sequence[int],
    basis: np.ndarray,
    pool: Sequence[int],
    dims: int,
    n_null: int = 500,
    seed: int = 0,
) -> dict[str, float]:
    """Do the features ``chosen`` write inside a subspace, more or less than as many others do?

    rows [F, d] decoder rows, basis [d, k] orthonormal, ``pool`` the features from which the null's sets are
    drawn (with ``chosen`` in it or not). features, overlap (of the ``dims`` leading directions of the set,
    see ``span``), smallest_angle and largest_angle in degrees, null (mean over ``n_null`` random sets of like
    size), null_low, null_high and p (``_against_null``). All NaN if nothing is chosen, or the pool is too
    small."""
    chosen, pool = np.asarray(chosen, dtype=int), np.asarray(pool, dtype=int)
    if not 0 < len(chosen) <= len(pool):
        names = ("overlap", "smallest_angle", "largest_angle", "null", "null_low", "null_high", "p")
        return {"features": len(chosen)} | dict.fromkeys(names, float("nan"))
    rng, own = np.random.default_rng(seed), span(rows[chosen], dims)
    angles, value = np.degrees(subspace_angles(own, basis)), overlap(own, basis)
    samples = (rng.choice(pool, len(chosen), replace=False) for _ in range(n_null))
    null = np.array([overlap(span(rows[sample], dims), basis) for sample in samples])
    return {
        "features": len(chosen),
        "overlap": value,
        "smallest_angle": float(angles.min()),
        "largest_angle": float(angles.max()),
        "null": float(null.mean()),
        **_against_null(value, null),
    }


def category_cosines(
    crosscoder: CrossCoder, chosen: Mapping[str, int], alive: np.ndarray, n_null: int = 2000
) -> pd.DataFrame:
    """Do the categories' features write in like directions? One row per pair of categories and model: cosine
    of their decoder rows.

    ``chosen`` {category: feature}. Columns model, a, b, feature_a, feature_b, cosine, and null_low, null_high
    and p (``_against_null``) of random pairs of different alive features. Two categories with one feature
    have cosine NaN: it would be 1 by construction."""
    rng, living, records = np.random.default_rng(0), np.flatnonzero(alive), []
    if len(living) < 2:
        raise UserError(f"{len(living)} features are alive: cosines of different features need at least two")
    first = rng.integers(len(living), size=n_null)
    second = (first + rng.integers(1, len(living), size=n_null)) % len(living)
    for name in crosscoder.names:
        rows = crosscoder.rows(name).double().numpy()
        unit = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-300)
        null = (unit[living[first]] * unit[living[second]]).sum(1)
        for a, b in combinations(chosen, 2):
            f, g = chosen[a], chosen[b]
            cosine = float(unit[f] @ unit[g]) if f != g else float("nan")
            record = {"model": name, "a": a, "b": b, "feature_a": f, "feature_b": g, "cosine": cosine}
            records.append(record | _against_null(cosine, null))
    columns = ["model", "a", "b", "feature_a", "feature_b", "cosine", "null_low", "null_high", "p"]
    return pd.DataFrame(records, columns=columns)
