"""Where single features do not recur, what they span together may.

    subspaces.record_all(here, inspections, nrn_over)

A category's *group* are its N best detectors of one crosscoder, chosen on the choose split. Two crosscoders
may spread the same directions over different features; then no feature of one is like a feature of the other,
but the subspaces that the groups span are alike. The cosines of the principal angles between two subspaces
are the singular values of A^T B, with orthonormal bases A, B (Bjorck & Golub 1973); their mean is 1 for the
same subspace. In few dimensions all subspaces are somewhat alike: hence random groups of the same size."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from ..labels import CATEGORIES
from ..results import Results
from ..stats import pooled
from .table import PLACES, Inspection, over_crosscoders, usable

GROUP = 5  # features
DRAWS = 50  # random groups
COLUMNS = ["category", "mean cosine", "low", "high", "random groups", "best single match"]


def principal_cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Cosines of the principal angles between the spans of the rows a [n, d] and b [m, d], largest first,
    [min(rank a, rank b)]."""
    return np.clip(np.linalg.svd(_basis(a) @ _basis(b).T, compute_uv=False), 0, 1)


def _basis(rows: np.ndarray) -> np.ndarray:
    """Orthonormal basis [rank, d] of the span of some rows."""
    _, values, right = np.linalg.svd(np.asarray(rows, dtype=np.float64), full_matrices=False)
    return right[values > 1e-8 * max(values.max(initial=0), 1e-300)]


def groups(inspection: Inspection, nrn_over: float = 0.5, size: int = GROUP) -> dict[str, np.ndarray]:
    """{category: numbers of its best detectors on choose, at the place of the best one}: among usable
    features, recurrent or not."""
    table = inspection.table.drop(columns="recurrent", errors="ignore")
    rows, found = table[usable(table, nrn_over)].set_index("feature"), {}
    for c in CATEGORIES:
        merits = [(rows[f"{name}_{c}_choose"].dropna() - 0.5).abs() for name in PLACES.values()]
        if all(len(m) >= size for m in merits):
            found[c] = max(merits, key=lambda m: m.max()).nlargest(size).index.to_numpy()
    return found


def record(
    results: Results,
    inspection: Inspection,
    others: Sequence[Inspection],
    nrn_over: float = 0.5,
    seed: int = 0,
) -> pd.DataFrame:
    """One crosscoder against the ``others``, put into ``results``: metrics subspace_<c>, the mean cosine of
    the principal angles with their groups, subspace_random_<c>, of random groups in place of theirs, and
    subspace_gain_<c>, the difference. A row per category: the three, and the mean over its group of the
    highest cosine with any feature of the others' groups."""
    rng, name, lines = np.random.default_rng(seed), inspection.crosscoder.names[-1], []
    own = groups(inspection, nrn_over)
    theirs = [(i.crosscoder.rows(name).numpy(), groups(i, nrn_over), _pool(i, nrn_over)) for i in others]
    rows = inspection.crosscoder.rows(name).numpy()
    for c, features in own.items():
        there = [(rows_b, group[c], pool) for rows_b, group, pool in theirs if c in group]
        if not there:
            continue
        cosines = [principal_cosines(rows[features], b[group]).mean() for b, group, _ in there]
        random = [
            principal_cosines(rows[features], b[rng.choice(pool, len(features), replace=False)]).mean()
            for b, _, pool in there
            for _ in range(max(1, DRAWS // len(there)))
        ]
        own_unit = _unit(rows[features])
        single = [np.abs(own_unit @ _unit(b[group]).T).max(axis=1).mean() for b, group, _ in there]
        values = float(np.mean(cosines)), float(np.mean(random))
        results.add(f"subspace_{c}", values[0], n=len(cosines))
        results.add(f"subspace_random_{c}", values[1], n=len(random))
        results.add(f"subspace_gain_{c}", values[0] - values[1], n=len(cosines))
        lines.append((c, *values, float(np.mean(single))))
    return pd.DataFrame(lines, columns=["category", "mean cosine", "random groups", "best single match"])


def record_all(
    results: Results, inspections: Sequence[Inspection], nrn_over: float = 0.5, seed: int = 0
) -> pd.DataFrame:
    """``record`` of all crosscoders, pooled into ``results``, and table subspaces: ``COLUMNS``, with the
    interval over crosscoders (each one's mean over the others). Empty for a single crosscoder."""
    if len(inspections) == 1:
        return pd.DataFrame(columns=COLUMNS)
    items = [(i, [other for other in inspections if other is not i]) for i in inspections]
    parts = pd.concat(over_crosscoders(results, record, items, nrn_over, seed))
    lines = []
    for c, part in parts.groupby("category", sort=False):
        cosine = pooled(part["mean cosine"])
        lines.append((c, *cosine, part["random groups"].mean(), part["best single match"].mean()))
    return results.table("subspaces", pd.DataFrame(lines, columns=COLUMNS).round(4))


def _pool(inspection: Inspection, nrn_over: float) -> np.ndarray:
    return np.flatnonzero(usable(inspection.table.drop(columns="recurrent", errors="ignore"), nrn_over))


def _unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
