"""Whole thoughts under intervention: is the answer lost with the features, and do behaviours cross over?

``lib.steering.experiments`` runs both models token by token and changes the residual stream of the one that
writes; ``lib.steering.effects`` says what that did. Here is the experiment on a run: which features are
removed, exchanged, used as the other model uses them, and placed, and at which strengths.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from ..distil.trials import puzzles
from ..features.uniqueness import SIDES, beyond
from ..features.use import reweighted
from ..results import Part
from ..runs import fingerprint
from ..settings import UserError
from ..steering import effects, experiments
from ..steering.effects import plot_ablations as plot_ablations
from ..steering.effects import plot_gap_shares as plot_gap_shares
from ..steering.effects import plot_placement as plot_placement
from ..steering.effects import plot_specificity as plot_specificity
from .variants import Variant, metric


def compute_thoughts(
    variant: Variant,
    features_per_category: int = 5,
    choose_puzzles: int = 60,
    report_puzzles: int = 200,
    max_new_tokens: int = 250,
) -> Part:
    """The part "causal": ``features_per_category`` are removed together. Strengths are chosen on validation
    puzzles, everything is reported on test puzzles.

    *Unique* are the features whose NRN lies beyond the null's 1% threshold on either side; *reweighted* are
    others whose use changes more than that of 99% of the null's features. UserError for a pair that was not
    made for puzzles.
    """
    budget = {
        "features_per_category": features_per_category,
        "choose_puzzles": choose_puzzles,
        "report_puzzles": report_puzzles,
        "max_new_tokens": max_new_tokens,
    }
    return variant.part("causal", 2, budget, lambda: _thoughts(variant, **budget))


def _thoughts(
    variant: Variant,
    features_per_category: int,
    choose_puzzles: int,
    report_puzzles: int,
    max_new_tokens: int,
) -> tuple[dict, dict]:
    pair, store, crosscoder, seed = variant.pair, variant.store, variant.crosscoder, variant.seed
    if pair.corpus != "generated":
        raise UserError(
            f"whole thoughts are followed on puzzles, which the pair {pair.name!r} was not made for: leave"
            " notebook 13 out"
        )
    table, null = variant.inspection().table, variant.needed("nulls").tables
    unique = np.any([beyond(null["scores"], null["thresholds"], "nrn", side) for side in SIDES], axis=0)
    use = {
        name: null["use"][null["use"]["pair"] == f"base, {name}"].reset_index(drop=True)
        for name in ("distilled", "null_a")
    }
    changed = reweighted(use["distilled"], use["null_a"]) & ~unique
    models, norm = {name: pair.load(name) for name in crosscoder.names}, store.mean_norms["distilled"]
    sets = experiments.category_sets(table, features_per_category)
    vectors, own_use = experiments.mean_differences(store), experiments.measure_use(crosscoder, store)
    weights = fingerprint(
        variant.crosscoder_fingerprint, *(pair.fingerprint(name) for name in crosscoder.names)
    )

    def run(split: str, n: int, conditions: list) -> pd.DataFrame:
        return experiments.run(
            *(pair, models, crosscoder, store, puzzles(n, split), conditions),
            *(variant.folder(f"causal_{split}"), weights, max_new_tokens, seed),
        )

    tried = run(
        "validation", choose_puzzles, experiments.strengthenings(crosscoder, sets, vectors, norm, seed=seed)
    )
    strengths = experiments.matching_strengths(tried)
    placed = experiments.strengthenings(crosscoder, sets, vectors, norm, strengths, seed=seed)
    conditions = experiments.conditions(
        *(crosscoder, table, sets, own_use, vectors, np.flatnonzero(unique), np.flatnonzero(changed)),
        seed=seed,
    )
    rows = run("test", report_puzzles, list(dict.fromkeys([*conditions, *placed])))
    rows = pd.concat([rows, *(effects.pooled(rows, kind) for kind in effects.CONTROLS)], ignore_index=True)
    summary, shares = effects.summarise(rows, seed=seed), effects.gap_shares(rows, seed=seed)
    metrics = effects.metrics(summary, shares)
    metrics |= {f"fve_alone_{name}": metric(value) for name, value in own_use.fve.items()}
    metrics["unique_features"] = metric(unique.sum(), n=len(table))
    metrics["reweighted_features"] = metric(changed.sum(), n=len(table))
    columns = {"nrn": table["nrn"], "unique": unique, "reweighted": changed}
    removed = [
        {"category": c, "feature": f, **{name: column[f] for name, column in columns.items()}}
        for c, features in sets.items()
        for f in features
    ]
    return metrics, {
        "summary": summary,
        "shares": shares,
        "placement": effects.extra_placed(rows, seed=seed),
        "sets": pd.DataFrame(removed),
        "specificity": effects.specificity(summary).reset_index(),
    }


def verdict(metrics: dict[str, dict]) -> str:
    """What carries the gap in thinking rate when the base's use is imposed? A set of features counts if its
    share of the gap lies above 0 and above that of matched features, with intervals that do not touch."""

    def interval(name: str) -> tuple[float, float]:
        return tuple((metrics.get(name) or {}).get("ci") or (-np.inf, -np.inf))

    floor = max(0.0, interval("impose_random")[1])
    new, old = (interval(f"impose_{name}")[0] > floor for name in ("unique", "shared"))
    if new and old:
        return "both"
    if new:
        return "unique features"
    if old:
        return "shared features, reweighted"
    return "neither: scaling the features that the base has does not make it think"
