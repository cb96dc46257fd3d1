"""Whose is a feature? The lengths of all decoder rows: the census of experiment E1."""

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
from torch.nn.functional import cosine_similarity

from ..stats import bootstrap, pooled, wilson
from .codes import firing_frequency
from .model import CrossCoder

CUTOFFS = (0.1, 0.3, 0.7, 0.9)
SHARED = (0.3, 0.7)  # features with an NRN within are called shared


def census(crosscoder: CrossCoder, store) -> pd.DataFrame:
    """One row per feature: feature, frequency (share of the split "report"), alive, nrn_p1, nrn_p2, cosine,
    and the null cosine_shuffled: the row in base with *another* feature's in distilled."""
    frequency = firing_frequency(crosscoder, store)
    columns = {"frequency": frequency, "alive": frequency > 0}
    frame = pd.DataFrame({"feature": np.arange(crosscoder.n_features), **columns})
    for p in (1, 2):
        frame[f"nrn_p{p}"] = crosscoder.nrn(p).numpy()
    first, second = crosscoder.rows("base"), crosscoder.rows("distilled")
    shifted = second.roll(crosscoder.n_features // 2, dims=0)
    comparable = first.shape == second.shape
    frame["cosine"] = cosine_similarity(first, second).numpy() if comparable else np.nan
    frame["cosine_shuffled"] = cosine_similarity(first, shifted).numpy() if comparable else np.nan
    return frame


def tails(nrn: pd.DataFrame) -> pd.DataFrame:
    """How many features lie beyond fixed cut-offs, for every column of ``nrn``, with Wilson intervals."""
    rows = []
    for measure in nrn:
        values = nrn[measure].dropna()
        for cutoff in CUTOFFS:
            count = int((values < cutoff).sum() if cutoff < 0.5 else (values > cutoff).sum())
            share = count / len(values) if len(values) else np.nan
            beyond = f"{'<' if cutoff < 0.5 else '>'} {cutoff}"
            rows.append((measure, beyond, count, share, *wilson(count, len(values))))
    return pd.DataFrame(rows, columns=["measure", "cut-off", "features", "share", "low", "high"])


def over_crosscoders(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """``tails`` of several crosscoders: their mean share, the lowest and the highest."""
    shares = pd.concat(tables).groupby(["measure", "cut-off"], sort=False)["share"]
    return shares.agg(share="mean", lowest="min", highest="max").reset_index()


def summary(alive: pd.DataFrame, seed: int = 0) -> dict[str, dict]:
    """{metric: {value, ci, n}} of the alive features of a ``census``: the median of NRN and the shares beyond
    0.1 and 0.9; medians of shared features' cosines; the share of features that are not shared; how alike p =
    1 and p = 2 order them. Intervals are over features."""
    within, metrics = alive.nrn_p1.between(*SHARED), {}
    shared = alive[within].assign(cosine_gain=lambda t: t.cosine - t.cosine_shuffled)

    def add(name: str, values: pd.Series, statistic: Callable = np.median) -> None:
        ci = bootstrap(values, statistic, seed=seed)
        metrics[name] = {"value": float(statistic(values)), "ci": ci, "n": len(values)}

    for name in ("cosine", "cosine_shuffled", "cosine_gain"):
        add(f"{name}_shared_median", shared[name])
    add("nrn_median", alive.nrn_p1)
    add("nrn_outside_0_3_0_7", ~within, np.mean)
    for name, hits in (("over_0_9", alive.nrn_p1 > 0.9), ("under_0_1", alive.nrn_p1 < 0.1)):
        ci = wilson(int(hits.sum()), len(hits))
        metrics[f"nrn_{name}"] = {"value": hits.mean(), "ci": ci, "n": len(hits)}
    spearman = alive.nrn_p1.corr(alive.nrn_p2, method="spearman")
    metrics["nrn_p1_p2_spearman"] = {"value": spearman, "ci": None, "n": len(alive)}
    return metrics


RATES = ("score", "side", "level", "rate", "low", "high", "hits", "n", "pair", "seed", "role")


def null_rates(null) -> pd.DataFrame:
    """Shares of features beyond the null's thresholds, of the part "nulls"; empty if not computed."""
    return null.tables.get("rates", pd.DataFrame(columns=list(RATES)))


def record_beyond(results, null) -> None:
    """How many features of a crosscoder lie beyond the null's 1% thresholds, and how many of the null's that
    tests them, put into ``results``: beyond_count_<score>_<side>, null_count_<score>_<side>; n: all its alive
    features, so that scores can be compared (a rate of nu is one of its side's). Intervals cover crosscoders
    and thresholds."""
    first = null_rates(null).query("level == 0.01")
    n = first.query("score == 'nrn'")["n"].mean()
    for (score, side, role), rows in first.groupby(["score", "side", "role"]):
        if name := {"the pair": "beyond", "false positives": "null"}.get(role):
            value, *ci = pooled(rows["hits"], rows[["low", "high"]].mul(rows["n"], axis=0))
            results.add(f"{name}_count_{score}_{side}", value, ci, n)
