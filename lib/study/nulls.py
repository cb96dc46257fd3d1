"""How often is a feature "unique" where there is nothing to find, and does it recur with another seed?

**Nulls.** ``null_a`` and ``null_b`` are the base trained further on its own data, on the same schedule as the
distilled model: what a crosscoder calls unique there is noise of training. Base against null_a sets
thresholds, quantiles of a score over the null's alive features; base against null_b, with another crosscoder
seed, was not used for that: the share of its features beyond them is their false-positive rate.

**Seeds.** Features of two crosscoders are matched one to one by the cosine of their decoder rows (all models'
rows side by side, in scaled space) such that the sum of cosines is largest (Hungarian algorithm). A feature's
*stability* is its mean cosine with its matches in crosscoders of other seeds; the chance level is what the
same matching finds in rows whose coordinates were permuted.

**Likeness.** How alike the activations of base and distilled model are (CKA, Procrustes, ranks), beside the
same numbers of the base and null_a; and whether unique features write where activations vary.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import numpy as np
import pandas as pd
import plotly.express as px
import plotly.graph_objects as go

from ..crosscoder.codes import codes, sample_rows
from ..crosscoder.model import CrossCoder
from ..crosscoder.training import train
from ..features import plots
from ..features.recurrence import stability
from ..features.table import category_features, feature_table
from ..features.uniqueness import LEVELS, SCORES, SIDES, beyond, extremity, score_table, sign
from ..features.use import change_limit, reweighted, solo_codes, use_table
from ..figures import COLOURS
from ..geometry import similarity
from ..labels import CATEGORIES
from ..results import Part
from ..settings import UserError, check
from ..stats import bootstrap, jackknife, wilson
from .variants import Variant, metric, part_of_study

# --- the part "nulls" ---------------------------------------------------------------------------------------

RATES = {  # score: the name of its false-positive rate among the metrics
    "nrn": "null_false_positive_rate",
    "nrn_p2": "null_false_positive_rate_p2",
    "nu_eps": "null_false_positive_rate_nu_eps",
    "nu_r": "null_false_positive_rate_nu_r",
}


@part_of_study("nulls", 1)
def compute_nulls(variant: Variant, boots: int = 300) -> tuple[dict, dict]:
    """The part "nulls": thresholds, rates beyond them, scores of the pair and of the nulls, changes of use.

    ``boots``: resamples of documents behind an interval of nu. Base against null_a sets the thresholds, base
    against null_b with another crosscoder seed tests them; both orders of models and seeds are computed, the
    second for the spread alone. The same two crosscoders say how much the *use* of features changes where
    nothing was distilled. A pair without a null_b has null_a in its place: then the false-positive rate
    covers the crosscoder's seed, but not another training of the null.
    """
    if "null_a" not in variant.pair.others:
        raise UserError(
            f"the pair {variant.pair.name!r} has no null_a among its others: nothing says how unique features"
            " look by chance"
        )
    seed, test = variant.seed, "null_b" if "null_b" in variant.pair.others else "null_a"
    roles = {("null_a", seed): "sets the thresholds", (test, seed + 1): "false positives"}
    if test == "null_b":
        roles |= {("null_b", seed): "spread", ("null_a", seed + 1): "spread"}
    tables, changes, null_scores, beyond_null = {}, [], [], []

    def change_of_use(crosscoder: CrossCoder, store, model: str, s: int) -> pd.DataFrame:
        tokens = sample_rows(store, "report", variant.max_tokens)
        table = use_table(solo_codes(crosscoder, store, tokens), n_boot=10, model=model)
        columns = ["pair", "feature", "alive", "change", "seed"]
        return table.assign(pair=f"base, {model}", seed=s)[columns]

    for (name, s), role in roles.items():
        _, store = variant.harvested("base", name)
        crosscoder = train(store, variant.config(s), variant.folder(f"{name}_seed{s}"))
        tables[name, s] = score_table(crosscoder, store, variant.max_tokens, name, "base", n_boot=boots)
        if role != "spread":
            changes.append(change_of_use(crosscoder, store, name, s))
    changes.append(change_of_use(variant.crosscoder, variant.store, "distilled", seed))
    own = score_table(variant.crosscoder, variant.store, variant.max_tokens, n_boot=boots)
    limits = thresholds(tables["null_a", seed])
    for (name, s), table in tables.items():
        which = {"pair": f"base, {name}", "seed": s}
        null_scores.append(table.assign(**which))
        beyond_null.append(rates(table, limits).assign(**which, role=roles[name, s]))
    beyond_null.append(rates(own, limits).assign(pair="base, distilled", seed=seed, role="the pair"))
    beyond_null = pd.concat(beyond_null, ignore_index=True)
    tested = beyond_null.query("role == 'false positives' and side == 'distilled'")
    metrics = {}
    for row in tested.itertuples():
        if row.score in RATES:
            end = {0.01: "", 0.05: "_at_5_percent"}[row.level]
            metrics[RATES[row.score] + end] = metric(row.rate, (row.low, row.high), row.n)
    limit = change_limit(changes[0])
    metrics["use_limit"] = metric(limit, n=int(changes[0].alive.sum()))
    for name, table in zip(("use_false_positive_rate", "use_reweighted_rate"), changes[1:]):
        hits, n = int(reweighted(table, limit).sum()), int(table.alive.sum())
        metrics[name] = metric(hits / n, wilson(hits, n), n)
    return metrics, {
        "thresholds": limits,
        "rates": beyond_null,
        "scores": own,
        "null_scores": pd.concat(null_scores, ignore_index=True),
        "use": pd.concat(changes, ignore_index=True),
    }


def thresholds(
    null: pd.DataFrame, levels: Sequence[float] = LEVELS, n_boot: int = 1000, seed: int = 0
) -> pd.DataFrame:
    """Thresholds that a share ``level`` of the null's features exceed: score, side, level, threshold, low,
    high (95%, over features), n.

    ``null`` is a ``score_table``. A threshold is in the units of its score: NRN above it (side base: below
    it), nu below it.
    """
    check("levels", list(levels), list, low=0, high=0.5)
    rows = []
    for score, side, level in product(SCORES, SIDES, levels):
        values, direction = extremity(null, score, side).to_numpy(), sign(score, side)
        at = lambda x, level=level: np.quantile(x, 1 - level) if len(x) else np.nan  # noqa: E731
        low, high = sorted(direction * b for b in bootstrap(values, at, n_boot=n_boot, seed=seed))
        rows.append((score, side, level, direction * at(values), low, high, len(values)))
    return pd.DataFrame(rows, columns=["score", "side", "level", "threshold", "low", "high", "n"])


def rates(table: pd.DataFrame, limits: pd.DataFrame) -> pd.DataFrame:
    """Share of the features beyond each threshold: score, side, level, rate, low, high (Wilson), hits, n.

    On a null that set no threshold this is the false-positive rate; on a pair, what is left of its unique
    features. ``n`` are the alive features (for nu: those of the side).
    """
    rows = []
    for score, side, level in product(SCORES, SIDES, LEVELS):
        hits = int(beyond(table, limits, score, side, level).sum())
        share = _share(hits, len(extremity(table, score, side)))
        rows.append({"score": score, "side": side, "level": level, **share})
    return pd.DataFrame(rows)


def _share(hits: int, n: int) -> dict[str, float]:
    low, high = wilson(hits, n)
    return {"rate": hits / n if n else np.nan, "low": low, "high": high, "hits": hits, "n": n}


def centred_rates(null_scores: pd.DataFrame, scores: pd.DataFrame, rates: pd.DataFrame) -> pd.DataFrame:
    """Share of alive features whose NRN lies further above its own crosscoder's median than the null's limit:
    role, rate, low, high, hits, n.

    NRN compares rows after each model was brought to the same mean norm. If one model's variance is then
    larger, all of its rows are longer, and the whole distribution moves: a matter of scale, which ``rates``
    counts as uniqueness of every feature. Here only what stands out from its own pair counts. The tables are
    those of the study's part "nulls", the roles those in its ``rates``.
    """
    roles = rates.drop_duplicates(["pair", "seed"]).set_index(["pair", "seed"])["role"]
    tables = dict(list(null_scores.groupby(["pair", "seed"])))
    tables[roles.index[roles == "the pair"][0]] = scores
    above = {}
    for key, table in tables.items():
        nrn = table["nrn"][table["alive"].astype(bool)]
        above[roles[key]] = nrn - nrn.median()
    above.pop("spread", None)
    limit = np.quantile(above["sets the thresholds"], 1 - LEVELS[0])
    rows = [{"role": role, **_share(int((d > limit).sum()), len(d))} for role, d in above.items()]
    return pd.DataFrame(rows)


def plot_nulls(part: Part) -> tuple[go.Figure, pd.DataFrame]:
    """(figure, its data): distributions of NRN of the pair and of its nulls, and the thresholds."""
    kinds = {"this pair": part.tables["scores"]}
    for (pair, seed), table in part.tables["null_scores"].groupby(["pair", "seed"]):
        kinds[f"{pair}, seed {seed}"] = table
    curves = []
    for name, table in kinds.items():
        nrn = np.sort(table[table["alive"].astype(bool)]["nrn"])
        share = (np.arange(len(nrn)) + 0.5) / len(nrn)
        curves.append(pd.DataFrame({"crosscoder": name, "NRN": nrn, "share": share}))
    curves = pd.concat(curves, ignore_index=True)
    fig = px.line(
        *(curves, "NRN", "share", "crosscoder"),
        line_dash="crosscoder",
        line_dash_map=dict(zip(kinds, ("solid", "dash", "dot", "dashdot", "longdash"))),
        color_discrete_map=dict.fromkeys(kinds, COLOURS["null"]) | {"this pair": COLOURS["distilled"]},
        title="NRN of the pair and of pairs that learnt no thinking",
    )
    for row in part.tables["thresholds"].query("score == 'nrn' and level == 0.01").itertuples():
        fig.add_vline(row.threshold, line_dash="dot", line_color="#444444", annotation_text="the null's 1%")
    fig.update_xaxes(range=[0, 1], title_text="NRN (p = 1)")
    return fig.update_yaxes(title_text="share of alive features below", range=[0, 1]), curves


def plot_scaling(part: Part) -> tuple[go.Figure, pd.DataFrame]:
    """(figure, its data): NRN against nu of every alive feature of the pair; a unique one is low in nu."""
    table, limits = part.tables["scores"].assign(label=""), part.tables["thresholds"]
    limit = limits.query("score == 'nrn' and side == 'distilled' and level == 0.01")["threshold"].item()
    return plots.scaling(table, beyond(table, limits, "nrn"), limit)


# --- the part "seeds" ---------------------------------------------------------------------------------------


@part_of_study("seeds", 1)
def compute_seeds(variant: Variant, seeds: int = 3) -> tuple[dict, dict]:
    """The part "seeds": the run's crosscoder and others that differ in their seed alone, ``seeds`` in all.
    Matches of their features, and what each of them alone would have said of the categories.
    """
    limits, store, first = variant.needed("nulls").tables["thresholds"], variant.store, variant.seed
    more = range(first + 1, first + seeds)
    others = [train(store, variant.config(s), variant.folder(f"seed{s}")) for s in more]
    crosscoders, tables, rows, alive = [variant.crosscoder, *others], [], [], []
    for s, crosscoder in enumerate(crosscoders, start=first):
        splits = [codes(crosscoder, store, split, variant.max_tokens) for split in ("choose", "report")]
        table = feature_table(crosscoder, store, *splits)
        scores = score_table(crosscoder, store, variant.max_tokens, n_boot=10)
        chosen, lives = category_features(table, variant.nrn_over), table["alive"].to_numpy(bool)
        unique, nrn = {score: beyond(scores, limits, score) for score in SCORES}, table.loc[lives, "nrn"]
        row = {"seed": s, "alive": int(lives.sum()), "nrn_mean": nrn.mean(), "nrn_sd": nrn.std()}
        row |= {f"unique_{score}": int(hits.sum()) for score, hits in unique.items()}
        for c in CATEGORIES:
            f = chosen.get(c)
            known = f is not None
            row |= {
                f"feature_{c}": f,
                f"nrn_{c}": table["nrn"][f] if known else np.nan,
                f"auroc_{c}": table[f"auroc_{c}"][f] if known else np.nan,
                f"above_null_{c}": known and bool(unique["nrn"][f]),
            }
        rows.append(row)
        alive.append(lives)
        columns = ["seed", "feature", "alive", "frequency", "nrn", "nrn_p2", "side", "nu_eps", "nu_r"]
        tables.append(scores.assign(seed=s)[columns])
    stable = stability(crosscoders, alive)
    unique = stable["feature"].isin(np.flatnonzero(beyond(tables[0].reset_index(drop=True), limits, "nrn")))
    metrics = {
        "stability_median": metric(stable["stability"].median(), n=len(stable)),
        "stability_chance": metric(stable["chance"].median(), n=len(stable)),
        "stability_unique_median": metric(stable.loc[unique, "stability"].median(), n=int(unique.sum())),
    }
    for c in CATEGORIES:
        row = stable[stable["feature"] == rows[0][f"feature_{c}"]]
        cosines = row.filter(regex=r"^cosine_").to_numpy().ravel()
        # beside the mean the lowest and the highest, not an interval
        known = (cosines.mean(), (cosines.min(), cosines.max())) if len(cosines) else (np.nan, None)
        metrics[f"stable_{c}"] = metric(*known, n=len(cosines))
    by_seed, scores = pd.DataFrame(rows), pd.concat(tables, ignore_index=True)
    return metrics, {"stability": stable, "by_seed": by_seed, "scores": scores}


def plot_stability(stable: pd.DataFrame) -> go.Figure:
    """Distribution of ``stability`` over the features, beside the chance level."""
    names = {"stability": "other seeds", "chance": "permuted coordinates (chance)"}
    rows = stable.melt(["feature"], list(names), var_name="matched with", value_name="cosine")
    fig = px.histogram(
        rows.replace({"matched with": names}), x="cosine", color="matched with", nbins=60, barmode="overlay",
        histnorm="percent", title="Do features recur with another seed?",
        color_discrete_map=dict(zip(names.values(), (COLOURS["distilled"], COLOURS["null"]))),
    )  # fmt: skip
    fig.update_xaxes(title_text="mean cosine with the matched features", range=[0, 1.02])
    return fig.update_yaxes(title_text="% of features")


# --- the part "similarity" ----------------------------------------------------------------------------------


@part_of_study("similarity", 1)
def compute_similarity(variant: Variant, tokens: int = 8000) -> tuple[dict, dict]:
    """The part "similarity", on ``tokens`` of the report split.

    similarity   ``geometry.similarity.compare`` of the base with the distilled model and with null_a, on all
    tokens, on traces and on general text: statistic, value, low, high, n, other, text
    angles       do unique features write where the activations vary? Overlap of their rows in the distilled
    model with the leading quarter of each model's principal components, against random sets of alive features
    directions   cosines between the rows of the categories' features
    """
    stores, rows = {"distilled": variant.store, "null_a": variant.harvested("base", "null_a")[1]}, []
    for other, store in stores.items():
        numbers = sample_rows(store, "report", tokens)
        acts = [a.numpy() for a in store.activations(numbers)]
        kind, documents = store.labels["kind"][numbers], store.documents[numbers]
        for text, wanted in (("all", kind >= 0), ("trace", kind == 1), ("general", kind == 0)):
            found = jackknife(similarity.compare, [a[wanted] for a in acts], documents[wanted])
            rows.append(found.assign(other=other, text=text))
    table = pd.concat(rows, ignore_index=True)
    crosscoder, store, null = variant.crosscoder, variant.store, variant.needed("nulls").tables
    alive = null["scores"]["alive"].to_numpy(bool)
    unique = np.flatnonzero(beyond(null["scores"], null["thresholds"], "nrn"))
    decoder, dims, angles = crosscoder.rows("distilled").numpy(), store.widths["distilled"] // 4, []
    for name, acts in zip(store.models, store.activations(sample_rows(store, "report", tokens))):
        basis = similarity.components(acts.numpy(), dims)
        overlap = similarity.feature_overlap(decoder, unique, basis, np.flatnonzero(alive), dims, 300)
        angles.append({"components_of": name, "dims": dims, **overlap})
    chosen = {c: f for c, f in variant.inspection().chosen.items() if c in CATEGORIES}
    cka = table.query("statistic == 'cka' and text == 'all'")
    metrics = {f"cka_{row.other}": metric(row.value, (row.low, row.high), row.n) for row in cka.itertuples()}
    directions = similarity.category_cosines(crosscoder, chosen, alive)
    return metrics, {"similarity": table, "angles": pd.DataFrame(angles), "directions": directions}
