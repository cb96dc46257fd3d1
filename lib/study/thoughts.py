"""Whole thoughts under intervention: is the answer lost with the features, and do behaviours cross over?

``lib.steering.experiments`` runs both models token by token and changes the residual stream of the one that
writes; ``lib.steering.effects`` says what that did. Here is the experiment on a run, with each of its
crosscoders (``compute_thoughts``); and, without a crosscoder, the most that anything at a layer can carry
over: one model's layers on top of the other's (``compute_transplants``)."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from ..distil.trials import puzzles
from ..features.uniqueness import SIDES, beyond, of_seed
from ..features.use import reweighted
from ..models.pairs import Pair, decoder_layers
from ..results import Results
from ..runs import fingerprint
from ..settings import UserError
from ..stats import pooled_table
from ..steering import ablation, effects, experiments, plots  # noqa: F401, plots: for the notebook
from ..steering.artefacts import RunArtefacts, open_run
from .variants import Variant, metric, part_of_study

TARGETS = 200  # positions of each category to which features are attributed, as in notebook 04
BOOTS = 1000  # resamples of puzzles
ENDS = {name: (f"{name}_low", f"{name}_high") for name in ("change", "rate", "met", "strays", "advantage")}
KEYS = [name for name in effects.HEAD if name not in ("condition", "strength")]
TABLES = {  # name: (what identifies a row, its numbers)
    "summary": ([*KEYS, "measure"], {"value": ("low", "high"), "change": ENDS["change"]}),
    "shares": ([*KEYS, "measure"], {"share": ("low", "high")}),
    "placement": (KEYS, {name: ENDS[name] for name in ("rate", "met", "strays", "advantage")}),
}


SINGLE = (("summary", "accuracy", ("value", "change")), ("shares", "thinking", ("share",)))  # by crosscoder


@part_of_study("causal", 4)
def compute_thoughts(
    variant: Variant,
    features_per_category: int = 5,
    choose_puzzles: int = 30,
    report_puzzles: int = 100,
    max_new_tokens: int = 250,
) -> tuple[dict, dict]:
    """The part "causal", with each crosscoder of the run: ``features_per_category`` are removed together.
    Strengths are chosen on validation puzzles, everything is reported on test puzzles.

    *Foretelling* features are chosen among recurrent ones; *attributed* ones as in notebook 04 (table
    ``sets``). *Unique* are recurrent features whose nu_eps lies beyond the null's 1% threshold on either
    side; *reweighted* are others whose use changes more than that of 99% of the null's. Tables ``summary``,
    ``shares``, ``placement`` (of all crosscoders together), ``single_summary``, ``single_shares`` (with a
    column seed), ``specificity`` (mean). UserError for a pair that was not made for puzzles."""
    _need_puzzles(variant.pair)
    opened, nulls = open_run(variant.run), variant.needed("nulls")
    store, seed = opened.store, variant.seed
    targets = ablation.sample_targets(store, TARGETS, "choose", seed=seed)
    vectors = experiments.mean_differences(store)
    tasks = [puzzles(choose_puzzles, "validation"), puzzles(report_puzzles, "test")]
    plans = opened.sets(targets, features_per_category, nulls)
    results, tables = Results("13", variant.run, {}), []
    for own, one in results.over(opened.each):
        use = experiments.measure_use(one.crosscoder, store)
        sets = {"foretelling": experiments.category_sets(one.table, features_per_category)}
        sets["attributed"] = {
            removal.category: removal.features
            for removal in plans[one.number]
            if (removal.rule, removal.kind) == ("attributed", "features")
        }
        null = {name: of_seed(nulls.tables[name], one.number) for name in ("thresholds", "use")}
        unique = np.any([beyond(one.table, null["thresholds"], "nu_eps", side) for side in SIDES], axis=0)
        unique &= one.table.get("recurrent", pd.Series(True, one.table.index)).to_numpy()
        changes = null["use"][null["use"]["pair"] == "base, distilled"].reset_index(drop=True)
        changed = reweighted(changes, nulls.metrics["use_limit"]["value"]) & ~unique
        groups = [np.flatnonzero(which) for which in (unique, changed)]
        rows = _written(variant, one, sets, use, vectors, groups, tasks, max_new_tokens)
        own.metrics |= effects.metrics(rows, BOOTS, seed)
        for name, value in use.fve.items():
            own.metrics[f"fve_alone_{name}"] = metric(value)
        for name, group in zip(("unique", "reweighted"), groups):
            own.metrics[f"{name}_features"] = metric(len(group), n=len(one.table))
        made = {"summary": effects.summarise(rows, BOOTS, seed)}
        made["shares"] = effects.gap_shares(rows, n_boot=BOOTS, seed=seed)
        made["placement"] = effects.extra_placed(rows, BOOTS, seed)
        made["specificity"] = effects.specificity(made["summary"]).astype(float)
        made["sets"] = _sets(one, sets, unique, changed)
        tables.append(made)

    def of_seeds(name: str) -> pd.DataFrame:
        return pd.concat([t[name].assign(seed=s) for s, t in zip(variant.seeds, tables)])

    found = {name: pooled_table([t[name] for t in tables], *how) for name, how in TABLES.items()}
    for name, measure, values in SINGLE:
        single = of_seeds(name)
        columns = ["seed", *TABLES[name][0], *values]
        found[f"single_{name}"] = single.loc[single["measure"] == measure, columns]
    found["specificity"] = (sum(t["specificity"] for t in tables) / len(tables)).reset_index()
    found["sets"] = of_seeds("sets")
    return results.metrics, found


def _need_puzzles(pair: Pair) -> None:
    if not pair.generated:
        raise UserError(
            f"whole thoughts are followed on puzzles, which the pair {pair.name!r} was not made for: leave"
            " notebook 13 out"
        )


def _written(
    variant: Variant, one: RunArtefacts, sets: dict, use, vectors: dict, groups, tasks, max_new_tokens: int
) -> pd.DataFrame:
    """``experiments.run`` of everything with one crosscoder, on the puzzles for reporting. What no crosscoder
    is asked for is written once for all."""
    pair, store, seed, crosscoder = one.pair, one.store, variant.seed, one.crosscoder
    models = [pair.fingerprint(name) for name in crosscoder.names]

    def run(name: str, puzzles: Sequence, conditions: Sequence) -> pd.DataFrame:
        frames, opened = [], (pair, one.models, crosscoder, store)
        for asked, place in ((False, name), (True, f"{name}_{one.number}")):
            some = [c for c in dict.fromkeys(conditions) if c.of_crosscoder is asked]
            weights = fingerprint(*models, one.fingerprint) if asked else fingerprint(*models)
            kept = variant.folder("thoughts") / place, weights, max_new_tokens, seed
            frames.append(experiments.run(*opened, puzzles, some, *kept))
        return pd.concat(frames, ignore_index=True)

    def placed(strengths: dict | None = None) -> list:
        norm = store.mean_norms["distilled"]
        return experiments.strengthenings(crosscoder, sets["foretelling"], vectors, norm, strengths, seed)

    strengths = experiments.matching_strengths(run("choose", tasks[0], placed()))
    of_categories = sets["foretelling"], sets["attributed"]
    conditions = experiments.conditions(one.table, *of_categories, use, vectors, *groups, seed)
    return run("report", tasks[1], [*conditions, *placed(strengths)])


def _sets(one: RunArtefacts, sets: dict, unique: np.ndarray, changed: np.ndarray) -> pd.DataFrame:
    rows = [(rule, c, f) for rule, named in sets.items() for c, features in named.items() for f in features]
    frame = pd.DataFrame(rows, columns=["set", "category", "feature"])
    for name, column in {"nrn": one.table["nrn"].to_numpy(), "unique": unique, "reweighted": changed}.items():
        frame[name] = column[frame["feature"]]
    return frame


@part_of_study("transplants", 2)
def compute_transplants(
    variant: Variant, report_puzzles: int = 100, max_new_tokens: int = 250
) -> tuple[dict, dict]:
    """The part "transplants": each model's upper layers on the other's embedding and lower layers
    (``experiments.transplanted``), from none to all, on test puzzles. No crosscoder is in it.

    Table ``curve``: ``effects.by_layers``. Metrics share_<upper>_<layers>: how much of the gap in thinking,
    from the question alone, is closed; share_base_below_last: the largest of the base's with 1 to all but one
    layer; layers_half: up to the crosscoders' place."""
    _need_puzzles(variant.pair)
    pair, store = variant.pair, variant.store
    models = {name: pair.load(name) for name in effects.OTHER}
    weights = fingerprint("transplants", *(pair.fingerprint(name) for name in models))
    depth, curve, metrics = len(decoder_layers(models["base"])), [], {}
    todo = [experiments.untouched(writer, mode) for writer in models for mode in ("free", "think")]
    for layers in range(depth + 1):
        lower = {name: models[effects.OTHER[name]] for name in models}
        writers = {name: experiments.transplanted(lower[name], models[name], layers) for name in models}
        opened, folder = (pair, writers, variant.crosscoder, store), variant.folder(f"transplants/{layers}")
        tasks, key = puzzles(report_puzzles, "test"), fingerprint(weights, layers)
        rows = experiments.run(*opened, tasks, todo, folder, key, max_new_tokens, variant.seed)
        curve.append(rows.assign(kind=layers, condition=rows["condition"] + f" / {layers} layers"))
    rows = pd.concat(curve, ignore_index=True)
    table = effects.by_layers(rows)
    for row in table[(table["mode"] == "free") & (table["measure"] == "thinking")].itertuples():
        ci = None if np.isnan(row.share_low) else [row.share_low, row.share_high]
        metrics[f"share_{row.upper}_{row.layers}"] = metric(row.share, ci, row.n)
    metrics["layers_half"] = metric(store.layers["base"] + 1)
    below = [metrics[f"share_base_{layers}"] for layers in range(1, depth)]
    known = [m for m in below if m["value"] is not None]
    metrics["share_base_below_last"] = max(known, key=lambda m: m["value"], default=metric(None))
    return metrics, {"curve": table}
