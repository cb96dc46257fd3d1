"""E7: did distillation change the geometry of words? Parallelograms, what they hide, and how sure we are.

If a relation (france -> paris, italy -> rome) is one common offset in the residual stream, then any two of
its pairs (a, b), (c, d) span a parallelogram, and e_a + e_d - e_b - e_c = 0. The loss measures the distance
from that::

    score = ||e_a + e_d - e_b - e_c||_2^2 / sigma^2          sigma^2: mean squared norm of the words

(Baek, Li & Tegmark 2025, arXiv 2502.01628, whose Eq. 3 is the unsquared form; used on R1 pairs in
2503.03730.) With Delta = e_b - e_a and S its sample covariance (n - 1), the mean over all pairs of distinct
rows is **2 tr S / sigma^2**, exactly: sampling quadruples only adds noise to it. Three things make the loss
easy to misread, so each has its own number:

- a copy map (b = a) has the perfect score 0 and no parallelogram: see ``step``, the length of the arrows, and
  the **unexplained-offset fraction** tr Cov(Delta) / E||Delta||^2;
- words of two tight clusters have a low score however they are paired: compare with the **shuffled-pairs
  null**, the same words paired at random, whose exact mean is 2 (tr S_in + tr S_out) / sigma^2. ``relative``
  is score / that mean;
- quadruples share words, so 10,000 of them are not 10,000 observations: intervals come from a **bootstrap
  over pairs**.

Shapes: vectors [n_words, d] (``words``); points [n_words, dims] after PCA; a and b [n_pairs, dims] are inputs
and outputs of a relation."""

import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from ..results import Results
from ..settings import UserError, check
from ..stats import group_weights, interval, ratio
from .words import Relation

DIMS = 20  # of the PCA, as in the paper
QUADRUPLES = 10_000  # as in the paper


def pca(vectors: np.ndarray, dims: int = DIMS) -> tuple[np.ndarray, float]:
    """Centre vectors [n_words, d] and project them on the ``dims`` directions of largest variance: (points
    [n_words, dims], share of the variance kept).

    UserError unless there are more distinct vectors than dimensions: n of them span n - 1 at most."""
    check("dims", dims, int, low=1)
    vectors = np.asarray(vectors, dtype=np.float64)
    centred = vectors - vectors.mean(0)
    scale = np.sqrt((centred**2).sum(1).mean())
    distinct = len(np.unique(np.round(centred / scale, 5), axis=0)) if scale > 0 else 1
    if distinct <= dims or vectors.shape[1] < dims:
        raise UserError(
            f"{distinct} distinct vectors of width {vectors.shape[1]} for a PCA to {dims} dimensions: there"
            f" must be at least {dims + 1} vectors and {dims} dimensions; use more words or a smaller dims"
        )
    u, s, _ = np.linalg.svd(centred, full_matrices=False)
    return u[:, :dims] * s[:dims], float((s[:dims] ** 2).sum() / (s**2).sum())


def mean_square(points: np.ndarray) -> float:
    """sigma^2, the unit of the scores: mean squared norm of centred points."""
    return float((points**2).sum(1).mean())


def sample_rows(n_pairs: int, n: int = QUADRUPLES, seed: int | np.random.Generator = 0) -> np.ndarray:
    """[n, 2] rows of a relation, uniform over ordered pairs of distinct rows (never the same row twice)."""
    rng = np.random.default_rng(seed)
    first = rng.integers(n_pairs, size=n)
    return np.stack([first, (first + rng.integers(1, n_pairs, size=n)) % n_pairs], axis=1)


def parallelogram_scores(a: np.ndarray, b: np.ndarray, rows: np.ndarray, sigma2: float) -> np.ndarray:
    """Score [n] of each quadruple: ||e_a + e_d - e_b - e_c||^2 / sigma^2; rows [n, 2] (``sample_rows``)."""
    i, j = rows.T
    return ((a[i] + b[j] - b[i] - a[j]) ** 2).sum(1) / sigma2


def trace_cov(x: np.ndarray) -> float:
    """tr of the sample covariance (n - 1) of rows [n, dims]: their total variance."""
    return float(((x - x.mean(0)) ** 2).sum() / (len(x) - 1))


def parallelogram_exact(a: np.ndarray, b: np.ndarray, sigma2: float) -> float:
    """Mean score over *all* pairs of distinct rows, 2 tr S / sigma^2: what sampled quadruples estimate."""
    return 2 * trace_cov(b - a) / sigma2


def parallelogram_null(a: np.ndarray, b: np.ndarray, sigma2: float) -> float:
    """Mean of ``parallelogram_exact`` over all ways to pair the same words, 2 (tr S_in + tr S_out) / sigma^2.

    The variance of b - a is var(a) + var(b) - 2 cov(a, b), and over all pairings the mean of the covariance
    is 0. About 4 where inputs and outputs share a mean, less where they are two clusters."""
    return 2 * (trace_cov(a) + trace_cov(b)) / sigma2


def offset_unexplained(a: np.ndarray, b: np.ndarray) -> float:
    """tr Cov(Delta) / E||Delta||^2 (population moments): 0 one common arrow, 1 none, NaN all arrows 0."""
    delta = b - a
    total = mean_square(delta)
    if total <= 1e-12 * max(mean_square(a), mean_square(b)) or total == 0:
        return float("nan")
    return mean_square(delta - delta.mean(0)) / total


def shuffled(
    a: np.ndarray, b: np.ndarray, sigma2: float, n: int = 1000, seed: int | np.random.Generator = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Score [n] and unexplained-offset fraction [n] of the same words, outputs dealt to inputs at random."""
    rng, rows = np.random.default_rng(seed), len(a)
    gram = (a - a.mean(0)) @ (b - b.mean(0)).T  # covariance of a pairing = sum of the entries it picks
    pairings = rng.permuted(np.tile(np.arange(rows), (n, 1)), axis=1)
    cross = gram[np.arange(rows), pairings].sum(1) / (rows - 1)
    variance = np.maximum(trace_cov(a) + trace_cov(b) - 2 * cross, 0)
    spread = variance * (rows - 1) / rows
    # the mean arrow does not depend on the pairing
    return 2 * variance / sigma2, ratio(spread, spread + ((b.mean(0) - a.mean(0)) ** 2).sum())


def bootstrap_scores(a: np.ndarray, b: np.ndarray, sigma2: float, draws: np.ndarray) -> dict[str, np.ndarray]:
    """Bootstrap replicates [n] of ``score``, ``relative`` and ``offset_unexplained``; draws from
    ``stats.group_weights``.

    A bootstrap sample draws the same pair twice, which makes variances low by (n - 1) / n: corrected here.
    The PCA and sigma^2, with which the words are measured, stay as they are."""
    n, share = len(a), draws / len(a)

    def variance(x: np.ndarray) -> np.ndarray:  # population variance of each sample, total over dimensions
        x = x - x.mean(0)
        return np.maximum(share @ (x**2).sum(1) - ((share @ x) ** 2).sum(1), 0)

    delta = b - a
    spread, total = variance(delta), share @ (delta**2).sum(1)
    least = 1e-12 * max(mean_square(a), mean_square(b))
    return {
        "score": 2 * spread * (n / (n - 1)) ** 2 / sigma2,
        "relative": ratio(spread, variance(a) + variance(b)),
        "offset_unexplained": np.minimum(ratio(spread * n / (n - 1), total, least), 1),
    }


@dataclass
class Geometry:
    """What ``analyse`` measured.

    table        one row per relation and model: score and its parts (columns explained in ``COLUMNS``)
    differences  one row per relation and other model, and one for the mean: model minus reference, paired
    means        one row per model: means over relations, intervals from the bootstrap
    points       {model: [n_words, dims]}, centred and projected over the whole vocabulary; ``sigma2`` their
                 mean square
    warnings     sentences about relations whose score does not mean what it seems to mean
    """

    table: pd.DataFrame
    differences: pd.DataFrame
    means: pd.DataFrame
    words: tuple[str, ...]
    points: dict[str, np.ndarray]
    sigma2: dict[str, float]
    warnings: list[str]


LABELS = {
    "score": "parallelogram loss",
    "relative": "relative loss",
    "offset_unexplained": "unexplained-offset fraction",
}
STATISTICS = tuple(LABELS)
COLUMNS = {
    "score": "parallelogram loss, exact mean over all quadruples, in units of sigma^2; lower is more regular",
    "sampled": "the same from sampled quadruples, which is the paper's procedure",
    "unsquared": "mean of the unsquared form (Eq. 3 of 2502.01628), same quadruples",
    "null": "score of the same words paired at random: mean, and 95% of shuffles from null_low to null_high",
    "p_shuffled": "share of random pairings with a score at most as low (one is counted in)",
    "relative": "score / exact mean of the null: 1 the pairing does not matter, 0 perfect parallelograms",
    "offset_unexplained": (
        "share of E||Delta||^2 that the common offset leaves unexplained: 0 one offset, 1 none"
    ),
    "step": "root mean square length of the arrows, in units of sigma; near 0 the relation is a copy",
    "copies": "share of pairs whose two vectors coincide",
}


def analyse(
    vectors: Mapping[str, np.ndarray],
    words: Sequence[str],
    relations: Sequence[Relation],
    reference: str = "base",
    dims: int = DIMS,
    scope: str = "vocabulary",
    quadruples: int = QUADRUPLES,
    shuffles: int = 1000,
    boots: int = 2000,
    seed: int = 0,
) -> Geometry:
    """Measure every relation in every model, on the same words, quadruples, shuffles and bootstrap samples.

    vectors: model -> [n_words, d_m], rows in the order of ``words`` (widths may differ). ``scope`` is what
    PCA and sigma^2 are taken over: "vocabulary", the words of all relations together, or "relation", the
    relation's own words. The papers do not say which. UserError as in ``pca``."""
    check("scope", scope, str, choices=("vocabulary", "relation"))
    for name, value in (("quadruples", quadruples), ("shuffles", shuffles), ("boots", boots)):
        check(name, value, int, low=1)
    check("reference", reference, str, choices=tuple(vectors))
    if wrong := [f"{m}: {len(v)}" for m, v in vectors.items() if len(v) != len(words)]:
        raise UserError(
            f"there are {len(words)} words but other numbers of vectors ({', '.join(wrong)}): "
            "every model must be read on the same words"
        )
    index = {word: i for i, word in enumerate(words)}
    points = {model: pca(v, dims)[0] for model, v in vectors.items()}
    rows, draws, warnings = [], {}, []
    for relation in relations:
        name, n = relation.name, len(relation.pairs)
        own = np.array([index[word] for word in relation.words])
        sides = [[relation.words.index(pair[side]) for pair in relation.pairs] for side in (0, 1)]
        quads = sample_rows(n, quadruples, _rng(seed, name, 1))
        boot = group_weights(n, boots, _rng(seed, name, 2))
        for model, v in vectors.items():
            p = points[model] if scope == "vocabulary" else pca(v[own], dims)[0]
            a, b = ((p[own] if scope == "vocabulary" else p)[side] for side in sides)
            how = mean_square(p), quads, boot, shuffles, _rng(seed, name, 3)
            row, draws[name, model] = _measure(a, b, *how)
            rows.append({"relation": name, "model": model, "pairs": n, "words": len(own), **row})
            if row["step"] < 0.1:
                warnings.append(
                    f"{name} in {model} is close to a copy map (arrows of {row['step']:.3f} sigma): "
                    "its low score is no parallelogram"
                )
            elif row["copies"] > 0:
                warnings.append(
                    f"{name} in {model}: {row['copies']:.0%} of its pairs are copies (both words"
                    " have one vector), which lowers its score"
                )
    table = pd.DataFrame(rows)
    means, differences = _summaries(table, draws, reference)
    sigma2 = {model: mean_square(p) for model, p in points.items()}
    return Geometry(table, differences, means, tuple(words), points, sigma2, warnings)


def _with_interval(name: str, value: float, draws: np.ndarray) -> dict[str, float]:
    return dict(zip((name, f"{name}_low", f"{name}_high"), (float(value), *interval(draws))))


def _measure(a, b, sigma2, quads, boot, shuffles, rng) -> tuple[dict, dict[str, np.ndarray]]:
    """One relation in one model: columns of the table, and the bootstrap replicates of its intervals."""
    scores = parallelogram_scores(a, b, quads, sigma2)
    null, offset_null = shuffled(a, b, sigma2, shuffles, rng)
    lengths = ((b - a) ** 2).sum(1) / sigma2
    score, null_mean = parallelogram_exact(a, b, sigma2), parallelogram_null(a, b, sigma2)
    relative = score / null_mean if null_mean > 0 else float("nan")
    replicates, row = bootstrap_scores(a, b, sigma2, boot), {}
    for name, value in zip(STATISTICS, (score, relative, offset_unexplained(a, b))):
        row |= _with_interval(name, value, replicates[name])
    row |= {"sampled": scores.mean(), "unsquared": np.sqrt(scores).mean()}
    row |= _with_interval("null", null_mean, null)
    row["p_shuffled"] = (1 + (null <= score * (1 + 1e-9)).sum()) / (1 + len(null))
    row |= _with_interval("offset_null", np.mean(offset_null), offset_null)
    row |= {"step": float(np.sqrt(lengths.mean())), "copies": float((lengths < 1e-8).mean())}
    return row, replicates


def _summaries(table: pd.DataFrame, draws: dict, reference: str) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Means over relations, and paired differences from the reference model, each with its bootstrap
    interval.

    The relations are taken as given: the interval of a mean says how it depends on the words, not on which
    relations."""
    relations, means, differences = list(table["relation"].unique()), [], []
    values = {model: part.set_index("relation") for model, part in table.groupby("model", sort=False)}
    for model in values:
        mean = {"model": model, "relations": len(relations)}
        rows = [{"relation": name, "model": model} for name in (*relations, "mean")]
        for statistic in STATISTICS:
            of_all = lambda m, statistic=statistic: np.stack([draws[r, m][statistic] for r in relations])
            own, other = (values[m][statistic].to_numpy() for m in (model, reference))
            own_draws, other_draws = of_all(model), of_all(reference)
            mean |= _with_interval(statistic, _nanmean(own), _nanmean(own_draws))
            changes, change_draws = own - other, own_draws - other_draws
            changes = (*changes, _nanmean(changes))
            for row, change, replicates in zip(rows, changes, (*change_draws, _nanmean(change_draws))):
                row |= _with_interval(statistic, change, replicates)
        means.append(mean)
        differences += rows if model != reference else []
    return pd.DataFrame(means), pd.DataFrame(differences)


def verdict(low: float, high: float) -> str:
    """What an interval of a difference says, in words."""
    if np.isnan(low) or np.isnan(high):
        return "undefined"
    return "lower" if high < 0 else "higher" if low > 0 else "not distinguishable"


def shown(row: Mapping, statistic: str = "score") -> str:
    """A row of ``differences`` as text: ``+0.13 [+0.04, +0.25], higher``."""
    value, low, high = (row[statistic + end] for end in ("", "_low", "_high"))
    return f"{value:+.3f} [{low:+.3f}, {high:+.3f}], {verdict(low, high)}"


def is_higher(found: Geometry, model: str, statistic: str = "score") -> tuple[str, bool | None]:
    """(mean difference of the loss from the reference as text, whether it is higher; None if undecided)."""
    rows = found.differences[found.differences["relation"] == "mean"].set_index("model")
    row = rows.loc[model]
    held = {"lower": False, "higher": True}.get(verdict(row[f"{statistic}_low"], row[f"{statistic}_high"]))
    return shown(row, statistic), held


def answer(found: Geometry, beyond: Geometry | None = None) -> str:
    """What distillation did to the arrows, in words. ``beyond``: the same with null_a as the reference."""
    rows = found.differences[found.differences["relation"] == "mean"].set_index("model")
    words = {True: "less parallel", False: "more parallel", None: "neither clearly more nor less parallel"}
    text = f"Distillation leaves arrows **{words[is_higher(found, 'distilled')[1]]}**."
    for statistic in ("score", "relative"):
        own = is_higher(found, "distilled", statistic)
        text += f" {LABELS[statistic].capitalize()}: {own[0]}"
        if beyond:
            null = is_higher(found, "null_a", statistic)
            text += f"; null_a {null[0]}; beyond null_a {is_higher(beyond, 'distilled', statistic)[0]}"
            if null[1] is not None and null[1] == own[1]:
                change, part = (rows.loc[model, statistic] for model in ("distilled", "null_a"))
                text += f": {part:+.3f} of the {change:+.3f} is what further training does"
        text += "."
    return text


def choices(
    readings: Mapping[str, np.ndarray],
    words: Sequence[str],
    relations: Sequence[Relation],
    carriers: Sequence[str],
    reference: str = "base",
    **options,
) -> pd.DataFrame:
    """Does the answer hang on a choice? Means over relations and their differences, with one choice changed
    at a time: the dimensions, the scope, the carriers.

    readings: model -> [n_words, n_carriers, d_m], as from ``read_models``. One row per choice and model; what
    the words are too few for is left out."""
    average = {model: read.mean(1) for model, read in readings.items()}
    largest = min(len(words) - 1, *(v.shape[1] for v in average.values()))
    tried = [(f"PCA to {k} dimensions", average, {"dims": k}) for k in (5, 10, 20, 40) if k <= largest]
    if min(len(r.words) for r in relations) > options.get("dims", DIMS):
        tried.append(("PCA of each relation alone", average, {"scope": "relation"}))
    for i, carrier in enumerate(carriers):
        tried.append((f"only: {carrier}", {m: read[:, i] for m, read in readings.items()}, {}))
    frames = []
    for name, vectors, changed in tried:
        found = analyse(vectors, words, relations, reference, **{**options, **changed})
        mean = found.differences[found.differences["relation"] == "mean"]
        mean = mean.merge(found.means[["model", "score"]], on="model", suffixes=("_change", ""))
        frames.append(mean.assign(choice=name))
    columns = ["choice", "model", "score", "score_change", "score_low", "score_high"]
    columns += ["relative", "relative_low", "relative_high"]
    return pd.concat(frames, ignore_index=True)[columns].rename(columns={"relative": "relative_change"})


def _nanmean(x: np.ndarray):
    """Mean over the first axis of what is defined; NaN where nothing is."""
    defined = (~np.isnan(x)).sum(0)
    return np.where(defined > 0, np.nansum(x, axis=0) / np.maximum(defined, 1), np.nan)[()]


def _rng(seed: int, name: str, stream: int = 0) -> np.random.Generator:
    """Random numbers of one relation, the same whatever other relations are measured with it."""
    return np.random.default_rng([seed, stream, zlib.crc32(name.encode())])


NAMES = {  # of metrics and their meaning
    "score": ("parallelogram", "Mean parallelogram loss"),
    "relative": ("parallelogram_relative", "As a share of what random pairings give"),
    "offset_unexplained": ("offset_unexplained", "Share left unexplained by the common offset"),
}


def add_metrics(results: Results, found: Geometry, reference: str = "base") -> None:
    """Metrics <NAMES>_<model> (means over relations) and <NAMES>_change_<model>, and the tables."""
    results.table("relations", found.table)
    changes = results.table("differences", found.differences).set_index(["model", "relation"])
    n_pairs = int(found.table.drop_duplicates("relation")["pairs"].sum())
    for mean in found.means.to_dict("records"):
        model = mean["model"]
        rows = {"": mean} | ({} if model == reference else {"_change": changes.loc[(model, "mean")]})
        for statistic, (name, _) in NAMES.items():
            for kind, row in rows.items():
                ends = row[f"{statistic}_low"], row[f"{statistic}_high"]
                results.add(f"{name}{kind}_{model}", row[statistic], ends, n_pairs)


def _shows(lines: Iterable[str], note: str = "") -> str:
    return f"**What this run shows.**{note}\n" + "\n".join(f"- {line}" for line in lines)


def relation_shows(found: Geometry, relation: str, models: Sequence[str]) -> str:
    one = found.table[found.table["relation"] == relation].set_index("model")
    return _shows(
        f"{m}: the common offset leaves {one.loc[m, 'offset_unexplained']:.0%} of the arrows' squared"
        f" length unexplained; the arrows spread {one.loc[m, 'relative']:.2f} times as much as if the same"
        " words were paired at random."
        for m in models
    )


def scores_show(found: Geometry) -> str:
    """In how many relations the true pairing beats 95% of the random ones, by model."""
    parts = found.table.groupby("model", sort=False)
    return _shows(
        f"{model}: {(part['score'] < part['null_low']).sum()} of {len(part)} relations lie left of their bar"
        for model, part in parts
    )


def changes_show(found: Geometry) -> str:
    means = found.differences[found.differences["relation"] == "mean"].to_dict("records")
    lines = (f"{row['model']}, {LABELS[s]}: {shown(row, s)}" for row in means for s in STATISTICS)
    return _shows(lines, " Against the base, mean over relations:")


def choices_show(tried: pd.DataFrame, model: str) -> str:
    lines, rows = [], tried[tried["model"] == model]
    for label, statistic in (("loss", "score"), ("relative loss", "relative")):
        verdicts = list(map(verdict, rows[f"{statistic}_low"], rows[f"{statistic}_high"]))
        counts = ", ".join(f"{verdicts.count(v)} times *{v}*" for v in dict.fromkeys(verdicts))
        lines.append(f"mean {label} of {model} against the base, under {len(rows)} choices: {counts}")
    return _shows(lines)
