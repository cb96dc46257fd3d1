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
from ..runs import fingerprint
from ..settings import UserError
from ..steering import effects, experiments
from ..steering.effects import plot_ablations as plot_ablations
from ..steering.effects import plot_gap_shares as plot_gap_shares
from ..steering.effects import plot_placement as plot_placement
from ..steering.effects import plot_specificity as plot_specificity
from .variants import Variant, metric, part_of_study


@part_of_study("causal", 2)
def compute_thoughts(
    variant: Variant,
    features_per_category: int = 5,
    choose_puzzles: int = 60,
    report_puzzles: int = 200,
    max_new_tokens: int = 250,
) -> tuple[dict, dict]:
    """The part "causal": ``features_per_category`` are removed together. Strengths are chosen on validation
    puzzles, everything is reported on test puzzles.

    *Unique* are the features whose NRN lies beyond the null's 1% threshold on either side; *reweighted* are
    others whose use changes more than that of 99% of the null's features. UserError for a pair that was not
    made for puzzles.
    """
    pair, store, crosscoder, seed = variant.pair, variant.store, variant.crosscoder, variant.seed
    if pair.corpus != "generated":
        raise UserError(
            f"whole thoughts are followed on puzzles, which the pair {pair.name!r} was not made for: leave"
            " notebook 13 out"
        )
    table = variant.inspection().table
    nulls = variant.needed("nulls")
    null = {
        name: part[part["seed"] == seed].reset_index(drop=True) for name, part in nulls.tables.items()
    }  # what it says of the first crosscoder
    unique = np.any([beyond(null["scores"], null["thresholds"], "nrn", side) for side in SIDES], axis=0)
    use = null["use"][null["use"]["pair"] == "base, distilled"].reset_index(drop=True)
    changed = reweighted(use, nulls.metrics["use_limit"]["value"]) & ~unique
    models, norm = {name: pair.load(name) for name in crosscoder.names}, store.mean_norms["distilled"]
    sets = experiments.category_sets(table, features_per_category)
    vectors, own_use = experiments.mean_differences(store), experiments.measure_use(crosscoder, store)
    fingerprints = [pair.fingerprint(name) for name in crosscoder.names]
    weights = fingerprint(variant.crosscoder_fingerprint, *fingerprints)

    def run(split: str, n: int, conditions: list) -> pd.DataFrame:
        opened, folder = (pair, models, crosscoder, store), variant.folder(f"causal_{split}")
        return experiments.run(*opened, puzzles(n, split), conditions, folder, weights, max_new_tokens, seed)

    def placed(strengths: dict | None = None) -> list:
        return experiments.strengthenings(crosscoder, sets, vectors, norm, strengths, seed)

    strengths = experiments.matching_strengths(run("validation", choose_puzzles, placed()))
    chosen = (np.flatnonzero(unique), np.flatnonzero(changed))
    conditions = experiments.conditions(crosscoder, table, sets, own_use, vectors, *chosen, seed)
    rows = run("test", report_puzzles, list(dict.fromkeys([*conditions, *placed(strengths)])))
    rows = pd.concat([rows, *(effects.pooled(rows, kind) for kind in effects.CONTROLS)], ignore_index=True)
    summary, shares = effects.summarise(rows, seed=seed), effects.gap_shares(rows, seed=seed)
    metrics = effects.metrics(summary, shares)
    metrics |= {f"fve_alone_{name}": metric(value) for name, value in own_use.fve.items()}
    metrics["unique_features"] = metric(unique.sum(), n=len(table))
    metrics["reweighted_features"] = metric(changed.sum(), n=len(table))
    removed = pd.DataFrame(
        [(c, f) for c, features in sets.items() for f in features], columns=["category", "feature"]
    )
    for name, column in {"nrn": table["nrn"].to_numpy(), "unique": unique, "reweighted": changed}.items():
        removed[name] = column[removed["feature"]]
    return metrics, {
        "summary": summary,
        "shares": shares,
        "placement": effects.extra_placed(rows, seed=seed),
        "sets": removed,
        "specificity": effects.specificity(summary).reset_index(),
    }


def verdict(metrics: dict[str, dict]) -> str:
    """What carries the gap in thinking rate when the base's use is imposed? A set of features counts if its
    share of the gap lies above 0 and above that of matched features, with intervals that do not touch."""

    def interval(name: str) -> tuple[float, float]:
        return tuple((metrics.get(f"impose_{name}") or {}).get("ci") or (-np.inf, -np.inf))

    floor = max(0.0, interval("random")[1])
    names = {"unique": "unique features", "shared": "shared features, reweighted"}
    carriers = [words for name, words in names.items() if interval(name)[0] > floor]
    if not carriers:
        return "neither: scaling the features that the base has does not make it think"
    return carriers[0] if len(carriers) == 1 else "both"
