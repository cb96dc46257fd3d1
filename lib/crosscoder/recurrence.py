"""Does a feature come back when the crosscoder is trained again?

    clusters = recurrent(crosscoders, alive)      # which features of several crosscoders are one and the same
    clusters.query("recurrent")                   # found in at least 4 of 5

Two crosscoders that differ in their seed have their features in another order, and not all of them are the
same. Features of two crosscoders are matched one to one by the cosine of their decoder rows (all models' rows
side by side, in scaled space) such that the sum of cosines is largest (Hungarian algorithm: Kuhn 1955). A
match counts with a cosine of at least LIMIT; features that are connected by such matches make a *cluster*."""

import itertools
import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from scipy import sparse
from scipy.optimize import linear_sum_assignment
from scipy.sparse.csgraph import connected_components
from torch.nn import functional

from ..results import pooled_metric
from ..verdicts import SHARE
from .model import CrossCoder

LIMIT = 0.7  # cosine; matches in permuted rows have .15 to .25
MEMBERS = ["feature", "crosscoder", "match", "cosine"]  # of ``members_of``


def match(
    a: CrossCoder, b: CrossCoder, alive_a: np.ndarray, alive_b: np.ndarray, shuffle: int | None = None
) -> pd.DataFrame:
    """One-to-one matches between the alive features of two crosscoders: feature, match, cosine; one row per
    alive feature of ``a``.

    Features of ``a`` that are left over, if ``b`` has fewer, get match -1 and cosine NaN. ``shuffle`` (a
    seed) permutes the coordinates of b's rows, the same way for all features: the chance level."""
    numbers = [np.flatnonzero(alive) for alive in (alive_a, alive_b)]
    rows_a, rows_b = (functional.normalize(c.W_dec.detach()[i], dim=-1) for c, i in zip((a, b), numbers))
    if shuffle is not None:
        rows_b = rows_b[:, torch.randperm(rows_b.shape[1], generator=torch.Generator().manual_seed(shuffle))]
    cosines = (rows_a @ rows_b.T).numpy()
    left, right = linear_sum_assignment(cosines, maximize=True)
    table = pd.DataFrame({"feature": numbers[0], "match": -1, "cosine": np.nan})
    table.loc[left, "match"], table.loc[left, "cosine"] = numbers[1][right], cosines[left, right]
    return table


def stability(crosscoders: Sequence[CrossCoder], alive: Sequence[np.ndarray], seed: int = 0) -> pd.DataFrame:
    """Stability of the features of the first crosscoder over the others: one row per alive feature.

    feature, match_<s> and cosine_<s> for the other crosscoders s = 1, 2, ...; stability, stability_low (mean
    and lowest of the cosines), chance (mean cosine of its matches in permuted rows)."""
    first, *others = crosscoders
    table, chance = pd.DataFrame({"feature": np.flatnonzero(alive[0])}), []
    for s, other in enumerate(others, start=1):
        matches = match(first, other, alive[0], alive[s])
        table[f"match_{s}"], table[f"cosine_{s}"] = matches["match"], matches["cosine"]
        chance.append(match(first, other, alive[0], alive[s], shuffle=seed + s)["cosine"])
    cosines = table.filter(regex=r"^cosine_")
    table["stability"], table["stability_low"] = cosines.mean(axis=1), cosines.min(axis=1)
    table["chance"] = pd.concat(chance, axis=1).mean(axis=1)
    return table


def recurrent(crosscoders: Sequence[CrossCoder], alive: Sequence[np.ndarray]) -> pd.DataFrame:
    """One row per alive feature of each crosscoder: crosscoder (its place in the list), feature, stability
    (mean cosine with its matches in the others), cluster, members (crosscoders with a feature in the
    cluster), recurrent (these are at least the ``SHARE``: as many as must agree on a verdict).

    A cluster has at most one feature of a crosscoder: of several connected ones the most stable stays, and
    the others are clusters of their own."""
    sizes = [c.n_features for c in crosscoders]
    first = np.cumsum([0, *sizes])
    pairs, edges, n = list(itertools.combinations(range(len(sizes)), 2)), [], len(sizes)
    cosines = np.full((first[-1], n), np.nan)
    for a, b in pairs:
        matches = match(crosscoders[a], crosscoders[b], alive[a], alive[b]).query("match >= 0")
        left, right = first[a] + matches["feature"].to_numpy(), first[b] + matches["match"].to_numpy()
        cosines[left, b] = cosines[right, a] = matches["cosine"]
        edges.append(np.stack([left, right])[:, matches["cosine"] >= LIMIT])
    left, right = np.concatenate(edges, axis=1) if edges else np.empty((2, 0), dtype=int)
    graph = sparse.coo_matrix((np.ones(len(left)), (left, right)), shape=(first[-1], first[-1]))
    rows = np.flatnonzero(np.concatenate(alive))
    table = pd.DataFrame({"crosscoder": np.searchsorted(first, rows, side="right") - 1})
    table["feature"] = rows - first[table["crosscoder"]]
    # a feature that the smaller dictionary has no match for recurs there with a cosine of 0
    table["stability"] = np.nan_to_num(cosines[rows]).sum(axis=1) / max(n - 1, 1)
    table["cluster"] = connected_components(graph, directed=False)[1][rows].astype(np.int64)
    by_stability = table.sort_values("stability", ascending=False)
    second = by_stability.duplicated(["cluster", "crosscoder"]).sort_index()
    table.loc[second, "cluster"] = table["cluster"].max() + 1 + np.arange(second.sum())
    table["members"] = table.groupby("cluster")["crosscoder"].transform("size")
    return table.assign(recurrent=table["members"] >= math.ceil(SHARE * n))


def chance(crosscoders: Sequence[CrossCoder], alive: Sequence[np.ndarray], seed: int = 0) -> float:
    """Median cosine of the first two crosscoders' matches, the coordinates of one permuted."""
    return float(match(*crosscoders[:2], *alive[:2], shuffle=seed)["cosine"].median())


def metrics(
    clusters: pd.DataFrame, crosscoders: Sequence[CrossCoder], alive: Sequence[np.ndarray]
) -> dict[str, dict]:
    """{metric: {value, ci, n}}, over the crosscoders of ``recurrent``: stability_median, recurrent_share, and
    stability_chance; None where there is one crosscoder, which cannot recur."""
    if len(crosscoders) == 1:
        nothing = {"value": None, "ci": None, "n": len(clusters)}
        return dict.fromkeys(("stability_median", "recurrent_share", "stability_chance"), nothing)
    by_crosscoder = clusters.groupby("crosscoder")
    metric = lambda value: {"value": value, "ci": None, "n": len(clusters)}
    return {
        "stability_median": pooled_metric([*map(metric, by_crosscoder["stability"].median())]),
        "recurrent_share": pooled_metric([*map(metric, by_crosscoder["recurrent"].mean())]),
        "stability_chance": metric(chance(crosscoders, alive)),
    }


def members_of(crosscoders: Sequence[CrossCoder], clusters: pd.DataFrame, number: int = 0) -> pd.DataFrame:
    """Where the features of one crosscoder are in the others, from the clusters of ``recurrent``: a row per
    feature and other member of its cluster: feature, crosscoder, match (its number there), cosine."""
    own = clusters["crosscoder"] == number
    there = clusters.loc[~own, ["crosscoder", "feature", "cluster"]].rename(columns={"feature": "match"})
    pairs = clusters.loc[own, ["feature", "cluster"]].merge(there, on="cluster")
    rows = [functional.normalize(c.W_dec.detach(), dim=-1) for c in crosscoders]
    cosines = [float(rows[number][p.feature] @ rows[p.crosscoder][p.match]) for p in pairs.itertuples()]
    return pairs.assign(cosine=cosines)[MEMBERS].sort_values(MEMBERS[:2], ignore_index=True)
