"""How often is a feature "unique" where there is nothing to find, and does it recur with another seed?

**Nulls.** ``null_a`` and ``null_b`` are the base trained further on its own data, on the same schedule as the
distilled model: what a crosscoder calls unique there is noise of training. Base against null_a sets
thresholds, quantiles of a score over the null's alive features, one for each of the run's crosscoders, from
the null's crosscoder of the same seed: so the scatter of a threshold is in whatever is said with it. Base
against null_b was not used for that: the share of its features beyond them is their false-positive rate, and
its ratio to the pair's share the *false-discovery rate*.

**Seeds.** Features of several crosscoders are matched and followed (``crosscoder.recurrence``), for several
k; the chance level is what the same matching finds in rows whose coordinates were permuted.

**Likeness.** How alike the activations of base and distilled model are (CKA, Procrustes, ranks), beside the
same numbers of the base and null_a; and whether unique features write where activations vary.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import product

import numpy as np
import pandas as pd
import plotly.express as px
import plotly.graph_objects as go

from ..crosscoder.codes import codes, firing_frequency, sample_rows
from ..crosscoder.health import health_card
from ..crosscoder.model import CrossCoder
from ..crosscoder.recurrence import metrics as metrics_of_recurrence
from ..crosscoder.recurrence import recurrent
from ..crosscoder.training import train
from ..features import plots
from ..features.table import category_features, feature_table
from ..features.uniqueness import LEVELS, SCORES, SIDES, beyond, extremity, score_table, sign
from ..features.use import change_limit, reweighted, solo_codes, use_table
from ..figures import COLOURS
from ..geometry import similarity
from ..labels import CATEGORIES
from ..results import Part, pooled_metric
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


@part_of_study("nulls", 2)
def compute_nulls(variant: Variant, boots: int = 300) -> tuple[dict, dict]:
    """The part "nulls": thresholds, rates beyond them, scores of the pair and of the nulls, changes of use;
    all tables have a column seed, that of the crosscoder.

    ``boots``: resamples of documents behind an interval of nu. For each of the run's crosscoders one on base
    against null_a sets thresholds, and one on base against null_b tests them. The same crosscoders say how
    much the *use* of features changes where nothing was distilled. A pair without a null_b has null_a's next
    crosscoder in its place: then the false-positive rate does not cover another training of the null.
    """
    if "null_a" not in variant.pair.others:
        raise UserError(
            f"the pair {variant.pair.name!r} has no null_a among its others: nothing says how unique features"
            " look by chance"
        )
    test, tables = "null_b" if "null_b" in variant.pair.others else "null_a", []
    stores = {name: variant.harvested("base", name)[1] for name in dict.fromkeys(("null_a", test))}
    stores["distilled"] = variant.store

    @cache  # the null's crosscoders of a pair without null_b set thresholds and test them
    def measured(name: str, s: int) -> tuple[pd.DataFrame, pd.DataFrame]:
        """(scores, changes of use) of the crosscoder of seed ``s`` on the base and another model."""
        own = name == "distilled"
        crosscoder = variant.crosscoders[s - variant.seed] if own else null_crosscoder(variant, name, s)
        scores = score_table(crosscoder, stores[name], variant.max_tokens, name, "base", n_boot=boots)
        tokens = sample_rows(stores[name], "report", variant.max_tokens)
        use = use_table(solo_codes(crosscoder, stores[name], tokens), n_boot=10, model=name)
        return scores, use[["feature", "alive", "change"]]

    each = []
    for s in variant.seeds:
        tested_by = test, s if test == "null_b" else s + 1
        which = {
            "null_a": ("null_a", s),
            f"{test}, testing" if test == "null_a" else test: tested_by,
            "distilled": ("distilled", s),
        }
        (null, use_null), (tester, use_test), (own, use_own) = (
            tuple(table.assign(pair=f"base, {name}") for table in measured(*key))
            for name, key in which.items()
        )
        limits, limit = thresholds(null), change_limit(use_null)
        roles = {"sets the thresholds": null, "false positives": tester, "the pair": own}
        beyond_null = [
            rates(table, limits).assign(pair=table["pair"].iloc[0], seed=s, role=role)
            for role, table in roles.items()
        ]
        changes = [use_null, use_test, use_own]
        tables.append(
            {
                "thresholds": limits.assign(seed=s),
                "rates": pd.concat(beyond_null),
                "scores": own.assign(seed=s),
                "null_scores": pd.concat([null, tester]).assign(seed=s),
                "use": pd.concat(changes).assign(seed=s),
            }
        )
        each.append(_null_metrics(tables[-1]["rates"], limit, changes))
    metrics = {name: pooled_metric([m[name] for m in each]) for name in each[0]}
    return metrics, {name: pd.concat([t[name] for t in tables], ignore_index=True) for name in tables[0]}


def null_crosscoder(variant: Variant, name: str, seed: int) -> CrossCoder:
    """The crosscoder of the base and another checkpoint with the run's configuration."""
    return train(
        variant.harvested("base", name)[1], variant.config(seed), variant.folder(f"{name}_seed{seed}")
    )


def _null_metrics(
    beyond_null: pd.DataFrame, limit: float, changes: Sequence[pd.DataFrame]
) -> dict[str, dict]:
    """What one crosscoder and its nulls say: the metrics of the part."""
    table = beyond_null.query("side == 'distilled'").set_index(["role", "score", "level"])
    metrics = {}
    for score, name in RATES.items():
        for level, end in ((0.01, ""), (0.05, "_at_5_percent")):
            row, own = (table.loc[role, score, level] for role in ("false positives", "the pair"))
            metrics[name + end] = metric(row.rate, (row.low, row.high), row.n)
            metrics[f"beyond_null_{score}_distilled{end}"] = metric(own.rate, (own.low, own.high), own.n)
            found = row.rate / own.rate if own.rate else np.nan
            metrics[f"false_discovery_{score}{end}"] = metric(min(found, 1.0), n=own.hits)
    metrics["use_limit"] = metric(limit, n=int(changes[0].alive.sum()))
    for name, use in zip(("use_false_positive_rate", "use_reweighted_rate"), changes[1:]):
        hits, n = int(reweighted(use, limit).sum()), int(use.alive.sum())
        metrics[name] = metric(hits / n, wilson(hits, n), n)
    return metrics


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
    role, seed, rate, low, high, hits, n.

    NRN compares rows after each model was brought to the same mean norm. If one model's variance is then
    larger, all of its rows are longer, and the whole distribution moves: a matter of scale, which ``rates``
    counts as uniqueness of every feature. Here only what stands out from its own pair counts. The tables are
    those of the study's part "nulls", the roles those in its ``rates``.
    """
    roles = rates.drop_duplicates(["pair", "seed", "role"]).set_index("pair")["role"].to_dict()
    rows = []
    for seed, tables in pd.concat([null_scores, scores]).groupby("seed"):
        above = {}
        for pair, table in tables[tables["alive"].astype(bool)].groupby("pair", sort=False):
            above[roles[pair]] = table["nrn"] - table["nrn"].median()
        limit = np.quantile(above["sets the thresholds"], 1 - LEVELS[0])
        shares = {role: _share(int((d > limit).sum()), len(d)) for role, d in above.items()}
        rows += [{"role": role, "seed": seed, **share} for role, share in shares.items()]
    return pd.DataFrame(rows)


def plot_scaling(part: Part) -> tuple[go.Figure, pd.DataFrame]:
    """(figure, its data): NRN against nu of every alive feature of the first crosscoder of the pair; a unique
    one is low in nu."""
    first = lambda name: part.tables[name].query("seed == seed.min()").reset_index(drop=True)
    table, limits = first("scores").assign(label=""), first("thresholds")
    limit = limits.query("score == 'nrn' and side == 'distilled' and level == 0.01")["threshold"].item()
    return plots.scaling(table, beyond(table, limits, "nrn"), limit)


# --- the part "seeds" ---------------------------------------------------------------------------------------


@part_of_study("seeds", 2)
def compute_seeds(variant: Variant, ks: Sequence[int] = (), ce_tokens: int = 10_000) -> tuple[dict, dict]:
    """The part "seeds": do the features of the run's crosscoders recur, and how does that depend on k?

    ``ks``: numbers of features per token for which as many crosscoders are trained, beside the run's own;
    ``ce_tokens``: tokens on which each model is run on its reconstruction. Tables: clusters
    (``crosscoder.recurrence.recurrent``), by_seed (what each crosscoder alone says of the categories), by_k
    (a row per k: recurrence, and how well the crosscoders describe the models, means and 95% over them).
    """
    store, limits = variant.store, variant.needed("nulls").tables["thresholds"]
    models = {name: variant.pair.load(name) for name in store.models}
    rows, clusters, by_k, own_k = [], None, [], variant.config().k
    for k in sorted({*ks, own_k}):
        trained = (
            variant.crosscoders
            if k == own_k
            else [
                train(store, variant.config(s, k=k), variant.folder(f"k{k}_seed{s}")) for s in variant.seeds
            ]
        )
        alive = [firing_frequency(c, store) > 0 for c in trained]
        found = recurrent(trained, alive)
        cards = [health_card(c, store, models, ce_tokens, n_boot=1) for c in trained]
        quality = {
            name: pooled_metric([metric(card[name]["value"]) for card in cards])
            for name in cards[0]
            if name.startswith(("fve_", "ce_recovered_", "dead_"))
        }
        again = metrics_of_recurrence(found, trained, alive)
        quality |= {"stability": again["stability_median"], "recurrent": again["recurrent_share"]}
        row = {"k": k, "chance": again["stability_chance"]["value"]}
        for name, m in quality.items():
            low, high = m["ci"] or (None, None)
            row |= {name: m["value"], f"{name}_low": low, f"{name}_high": high}
        by_k.append(row)
        if k == own_k:
            clusters, metrics = found, again
    for s, crosscoder in zip(variant.seeds, variant.crosscoders):
        splits = [codes(crosscoder, store, split, variant.max_tokens) for split in ("choose", "report")]
        table = feature_table(crosscoder, store, *splits)
        scores = score_table(crosscoder, store, variant.max_tokens, n_boot=10)
        chosen, lives = category_features(table, variant.nrn_over), table["alive"].to_numpy(bool)
        unique = {score: beyond(scores, limits.query("seed == @s"), score) for score in SCORES}
        nrn, row = table.loc[lives, "nrn"], {"seed": s, "alive": int(lives.sum())}
        row |= {"nrn_mean": nrn.mean(), "nrn_sd": nrn.std()}
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
        number = clusters["crosscoder"] == s - variant.seed
        clusters.loc[number, "unique"] = unique["nu_eps"][clusters.loc[number, "feature"]]
    unique = clusters["unique"].astype(bool)
    medians = clusters[unique].groupby("crosscoder")["stability"].median()
    if len(medians):
        metrics["stability_unique_median"] = pooled_metric([metric(v, n=unique.sum()) for v in medians])
    metrics |= {f"stability_median_k{row['k']}": metric(row["stability"], _bounds(row)) for row in by_k}
    by_seed = pd.DataFrame(rows)
    for c in CATEGORIES:
        chosen = by_seed.set_index(by_seed["seed"] - variant.seed)[f"feature_{c}"].dropna()
        stable = (
            clusters.set_index(["crosscoder", "feature"])["stability"].reindex(list(chosen.items())).dropna()
        )
        if len(stable):
            metrics[f"stable_{c}"] = pooled_metric([metric(value) for value in stable])
    return metrics, {"clusters": clusters, "by_seed": by_seed, "by_k": pd.DataFrame(by_k)}


def _bounds(row: dict) -> tuple | None:
    ends = row["stability_low"], row["stability_high"]
    return None if None in ends else ends


def plot_stability(clusters: pd.DataFrame) -> go.Figure:
    """Distribution of the features' mean cosine with their matches in the other crosscoders."""
    fig = px.histogram(
        clusters, x="stability", color="recurrent", nbins=50, histnorm="percent", barmode="stack",
        title="Do features recur with another seed?",
        color_discrete_map={True: COLOURS["distilled"], False: COLOURS["null"]},
    )  # fmt: skip
    fig.update_xaxes(title_text="mean cosine with the matched features", range=[0, 1.02])
    return fig.update_yaxes(title_text="% of features")


# --- the part "similarity" ----------------------------------------------------------------------------------


@part_of_study("similarity", 2)
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
    scores = null["scores"].query("seed == @variant.seed").reset_index(drop=True)
    alive = scores["alive"].to_numpy(bool)
    unique = np.flatnonzero(beyond(scores, variant.null_limits(), "nrn"))
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
