"""How often is a feature "unique" where there is nothing to find, and does it recur with another seed?

**Nulls.** ``null_a`` and ``null_b`` are the base trained further on its own data, on the same schedule as the
distilled model: what a crosscoder calls unique there is noise of training. Base against null_a sets
thresholds, quantiles of a score over the alive features of as many crosscoders as the run has; their scatter
is in the threshold's interval, and in whatever is said with it. Base against null_b was not used for that:
the share of its features beyond them is their false-positive rate, and its ratio to the pair's share the
*false-discovery rate*.

**Seeds.** Features of several crosscoders are matched and followed (``crosscoder.recurrence``), for several
k; the chance level is what the same matching finds in rows whose coordinates were permuted.

**Likeness.** How alike the activations of base and distilled model are (CKA, Procrustes, ranks), beside the
same numbers of the base and null_a; and whether unique features write where activations vary."""

from collections.abc import Mapping, Sequence
from itertools import product

import numpy as np
import pandas as pd
import plotly.express as px
import plotly.graph_objects as go

from ..crosscoder.codes import codes, firing_frequency, sample_rows
from ..crosscoder.health import health_cards
from ..crosscoder.model import CrossCoder
from ..crosscoder.plots import by_k as by_k
from ..crosscoder.plots import nrn_beside_null as nrn_beside_null
from ..crosscoder.recurrence import metrics as metrics_of_recurrence
from ..crosscoder.recurrence import recurrent
from ..crosscoder.training import train
from ..features import plots
from ..features.table import auroc_of, category_detectors, feature_table
from ..features.uniqueness import LEVELS, SCORES, SIDES, beyond, extremity, score_table, sign
from ..features.use import change_limit, reweighted, solo_codes, use_table
from ..figures import COLOURS
from ..geometry import similarity
from ..labels import CATEGORIES
from ..results import Part, Results, pooled_metric
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
NEAR = 0.2  # a nu so near to zero says that the other model has next to nothing of the feature


@part_of_study("nulls", 2)
def compute_nulls(variant: Variant, boots: int = 300) -> tuple[dict, dict]:
    """The part "nulls": thresholds, rates beyond them, scores of the pair and of the nulls, changes of use;
    tables have a column seed, that of the crosscoder.

    ``boots``: resamples of documents behind an interval of nu. As many crosscoders as the run has, on base
    against null_a, set thresholds together; as many on base against null_b test them. The same crosscoders
    say how much the *use* of features changes where nothing was distilled. A pair without a null_b has
    null_a's next crosscoders in its place: then the false-positive rate does not cover another training of
    the null."""
    if "null_a" not in variant.pair.others:
        raise UserError(
            f"the pair {variant.pair.name!r} has no null_a among its others: nothing says how unique features"
            " look by chance"
        )
    test = "null_b" if "null_b" in variant.pair.others else "null_a"
    later = 0 if test == "null_b" else len(variant.seeds)
    stores = {name: variant.harvested("base", name)[1] for name in dict.fromkeys(("null_a", test))}
    stores["distilled"] = variant.store
    roles = {"sets the thresholds": ("null_a", 0), "false positives": (test, later)}
    roles["the pair"] = ("distilled", 0)
    scored, used = {}, {}
    for role, (name, after) in roles.items():
        for s in variant.seeds:
            if name == "distilled":
                crosscoder = variant.crosscoders[s - variant.seed]
            else:
                crosscoder = null_crosscoder(variant, name, s + after)
            store = stores[name]
            which = {"pair": f"base, {name}" + (", other seeds" if after else ""), "seed": s}
            scores = score_table(crosscoder, store, variant.max_tokens, name, "base", n_boot=boots)
            tokens = sample_rows(store, "report", variant.max_tokens)
            use = use_table(solo_codes(crosscoder, store, tokens), n_boot=10, model=name)
            scored[role, s] = scores.assign(**which)
            used[role, s] = use[["feature", "alive", "change"]].assign(**which)
    null = pd.concat([scored["sets the thresholds", s] for s in variant.seeds], ignore_index=True)
    limits = thresholds(null)
    limit = change_limit(pd.concat([used["sets the thresholds", s] for s in variant.seeds]))
    beyond_null, each = [], []
    for s in variant.seeds:
        own = {role: rates(scored[role, s], limits).assign(pair=scored[role, s]["pair"][0]) for role in roles}
        beyond_null += [table.assign(seed=s, role=role) for role, table in own.items()]
        each.append(_null_metrics(own, limit, [used[role, s] for role in roles]))
    tables = {
        "thresholds": pd.concat([limits.assign(seed=s) for s in variant.seeds]),
        "rates": pd.concat(beyond_null),
        "scores": pd.concat([scored["the pair", s] for s in variant.seeds]),
        "null_scores": pd.concat([table for (role, _), table in scored.items() if role != "the pair"]),
        "use": pd.concat(used.values()),
    }
    metrics = {name: pooled_metric([m[name] for m in each]) for name in each[0]}
    if variant.pair.planted:
        metrics["control_null_found"] = _found_in_null(variant, test, later, limits, scored)
    return metrics, {name: table.reset_index(drop=True) for name, table in tables.items()}


def _found_in_null(variant: Variant, name: str, after: int, limits: pd.DataFrame, scored: Mapping) -> dict:
    """How many features of a crosscoder that tests the thresholds recur among these and lie beyond the limit
    of nu: what the rule of the positive control finds where nothing was planted."""
    tables = [scored["false positives", s].reset_index(drop=True) for s in variant.seeds]
    crosscoders = [null_crosscoder(variant, name, s + after) for s in variant.seeds]
    clusters = recurrent(crosscoders, [t["alive"].to_numpy(bool) for t in tables])
    recur = set(map(tuple, clusters.loc[clusters["recurrent"], ["crosscoder", "feature"]].to_numpy()))
    each = []
    for i, table in enumerate(tables):
        found = table.loc[beyond(table, limits, "nu_eps"), "feature"]
        each.append(metric(sum((i, f) in recur for f in found), n=len(table)))
    return pooled_metric(each)


def null_crosscoder(variant: Variant, name: str, seed: int) -> CrossCoder:
    """The crosscoder of the base and another checkpoint with the run's configuration."""
    store = variant.harvested("base", name)[1]
    return train(store, variant.config(seed), variant.folder(f"{name}_seed{seed}"))


def _null_metrics(
    beyond_null: Mapping[str, pd.DataFrame], limit: float, changes: Sequence[pd.DataFrame]
) -> dict[str, dict]:
    """What one crosscoder of the pair and its nulls say: the metrics of the part. ``beyond_null`` {role:
    ``rates``}."""
    of_side = lambda table: table.query("side == 'distilled'").set_index(["score", "level"])
    rows, metrics = {role: of_side(table) for role, table in beyond_null.items()}, {}
    for score, name in RATES.items():
        for level, end in ((0.01, ""), (0.05, "_at_5_percent")):
            test, own = (rows[role].loc[(score, level)] for role in ("false positives", "the pair"))
            metrics[name + end] = metric(test.rate, (test.low, test.high), test.n)
            metrics[f"beyond_null_{score}_distilled{end}"] = metric(own.rate, (own.low, own.high), own.n)
            ratio = min(test.rate / own.rate, 1.0) if own.rate else np.nan
            metrics[f"false_discovery_{score}{end}"] = metric(ratio, n=own.hits)
    metrics["use_limit"] = metric(limit, n=int(changes[0].alive.sum()))
    for name, use in zip(("use_false_positive_rate", "use_reweighted_rate"), changes[1:]):
        hits, n = int(reweighted(use, limit).sum()), int(use.alive.sum())
        metrics[name] = metric(hits / n, wilson(hits, n), n)
    return metrics


def thresholds(null: pd.DataFrame, levels: Sequence[float] = LEVELS, n_boot: int = 1000) -> pd.DataFrame:
    """Thresholds that a share ``level`` of the null's features exceed: score, side, level, threshold, low,
    high (95%), n.

    ``null`` is a ``score_table``; with a column seed it is those of several crosscoders, which set one
    threshold together, and whose scatter is in the interval: whole crosscoders are resampled. Else the
    interval is over features. A threshold is in the units of its score: NRN above it (side base: below it),
    nu below it."""
    check("levels", list(levels), list, low=0, high=0.5)
    rows, groups = [], null["seed"].to_numpy() if "seed" in null else None
    for score, side, level in product(SCORES, SIDES, levels):
        usable, direction = extremity(null, score, side), sign(score, side)
        values, which = usable.to_numpy(), None if groups is None else groups[usable.index]
        at = lambda x, level=level: np.quantile(x, 1 - level) if len(x) else np.nan  # noqa: E731
        low, high = sorted(direction * b for b in bootstrap(values, at, which, n_boot))
        rows.append((score, side, level, direction * at(values), low, high, len(values)))
    return pd.DataFrame(rows, columns=["score", "side", "level", "threshold", "low", "high", "n"])


def rates(table: pd.DataFrame, limits: pd.DataFrame) -> pd.DataFrame:
    """Share of the features of one crosscoder beyond each threshold: score, side, level, rate, low, high,
    hits, n. The interval is that of the threshold: the shares beyond its two ends.

    On a null that set no threshold this is the false-positive rate; on a pair, what is left of its unique
    features. ``n`` are the alive features (for nu: those of the side)."""
    rows = []
    for score, side, level in product(SCORES, SIDES, LEVELS):
        n = len(extremity(table, score, side))
        hits, *ends = (
            int(beyond(table, limits.assign(threshold=limits[at]), score, side, level).sum())
            for at in ("threshold", "low", "high")
        )
        low, high = (end / n if n else np.nan for end in (min(*ends, hits), max(*ends, hits)))
        row = {"rate": hits / n if n else np.nan, "low": low, "high": high, "hits": hits, "n": n}
        rows.append({"score": score, "side": side, "level": level, **row})
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
    those of the study's part "nulls", the roles those in its ``rates``."""
    roles, above = rates.drop_duplicates("pair").set_index("pair")["role"], {}
    alive = pd.concat([null_scores, scores]).query("alive")
    for (pair, seed), table in alive.groupby(["pair", "seed"], sort=False):
        above[roles[pair], seed] = table["nrn"] - table["nrn"].median()
    setting = pd.concat([d for (role, _), d in above.items() if role.startswith("sets")])
    limit = np.quantile(setting, 1 - LEVELS[0])
    rows = [{"role": r, "seed": s, **_share(int((d > limit).sum()), len(d))} for (r, s), d in above.items()]
    return pd.DataFrame(rows)


def record(results: Results, part: Part) -> None:
    """Put into ``results`` what else the tables of the part "nulls" say, pooled over the crosscoders:
    beyond_null_nrn_base, beyond_null_nu_eps_base; about each crosscoder's own median (``centred_rates``)
    null_false_positive_rate_centred, beyond_null_nrn_centred_distilled; and unique_nu_eps_low, of the
    features above the threshold of NRN the share whose interval of nu lies within NEAR of zero."""
    scores, rates, limits = (part.tables[name] for name in ("scores", "rates", "thresholds"))
    base = rates.query("role == 'the pair' and side == 'base' and level == 0.01")
    base = base.set_index(["score", "seed"])
    centred = centred_rates(part.tables["null_scores"], scores, rates).set_index(["role", "seed"])
    wanted = {f"beyond_null_{score}_base": (base, score) for score in ("nrn", "nu_eps")}
    wanted["null_false_positive_rate_centred"] = centred, "false positives"
    wanted["beyond_null_nrn_centred_distilled"] = centred, "the pair"
    for own, seed in results.over(sorted(scores["seed"].unique())):
        for name, (table, key) in wanted.items():
            row = table.loc[(key, seed)]
            own.add(name, row["rate"], (row["low"], row["high"]), row["n"])
        table = scores[scores["seed"] == seed].reset_index(drop=True)
        above = table[beyond(table, limits[limits["seed"] == seed], "nrn") & table["nu_eps"].notna()]
        share = _share(int(above[["nu_eps_low", "nu_eps_high"]].abs().lt(NEAR).all(axis=1).sum()), len(above))
        own.add("unique_nu_eps_low", share["rate"], (share["low"], share["high"]), share["n"])


def plot_scaling(part: Part) -> tuple[go.Figure, pd.DataFrame]:
    """(figure, its data): NRN against nu of every alive feature of the first crosscoder of the pair; a unique
    one is low in nu."""
    first = lambda name: part.tables[name].query("seed == seed.min()").reset_index(drop=True)
    table, limits = first("scores").assign(label=""), first("thresholds")
    limit = limits.query("score == 'nrn' and side == 'distilled' and level == 0.01")["threshold"].item()
    return plots.scaling(table, beyond(table, limits, "nrn"), limit)


# --- the part "seeds" ---------------------------------------------------------------------------------------


@part_of_study("seeds", 3)
def compute_seeds(
    variant: Variant, ks: Sequence[int] = (4, 8, 16, 24), ce_tokens: int = 10_000
) -> tuple[dict, dict]:
    """The part "seeds": do the features of the run's crosscoders recur, and how does that depend on k?

    ``ks``: numbers of features per token for which as many crosscoders are trained, beside the run's own;
    ``ce_tokens``: tokens on which each model is run on its reconstruction. Tables: clusters
    (``crosscoder.recurrence.recurrent``), by_seed (what each crosscoder alone says of the categories), by_k
    (a row per k: recurrence, and how well the crosscoders describe the models, means and 95% over them)."""
    store, limits = variant.store, variant.needed("nulls").tables["thresholds"]
    models = {name: variant.pair.load(name) for name in store.models}
    rows, clusters, rows_of_k, own_k, over_k = [], None, [], variant.config().k, {}
    for k in sorted({*ks, own_k}):
        trained, of_k = variant.crosscoders, {s: variant.config(s, k=k) for s in variant.seeds}
        if k != own_k:
            trained = [train(store, c, variant.folder(f"k{k}_seed{s}")) for s, c in of_k.items()]
        alive = [firing_frequency(c, store) > 0 for c in trained]
        found = recurrent(trained, alive)
        cards = health_cards(trained, store, models, ce_tokens, n_boot=1)
        names = [name for name in cards[0] if name.startswith(("fve_", "ce_recovered_", "dead_"))]
        quality = {n: pooled_metric([metric(card[n]["value"]) for card in cards]) for n in names}
        again = metrics_of_recurrence(found, trained, alive)
        quality |= {"stability": again["stability_median"], "recurrent": again["recurrent_share"]}
        over_k[f"stability_median_k{k}"] = again["stability_median"]
        row = {"k": k, "chance": again["stability_chance"]["value"]}
        for name, m in quality.items():
            low, high = m["ci"] or (None, None)
            row |= {name: m["value"], f"{name}_low": low, f"{name}_high": high}
        rows_of_k.append(row)
        if k == own_k:
            clusters, metrics = found, again
    for s, crosscoder in zip(variant.seeds, variant.crosscoders):
        splits = [codes(crosscoder, store, split, variant.max_tokens) for split in ("choose", "report")]
        table = feature_table(crosscoder, store, *splits)
        scores = score_table(crosscoder, store, variant.max_tokens, n_boot=10)
        chosen, lives = category_detectors(table, variant.nrn_over), table["alive"].to_numpy(bool)
        unique = {score: beyond(scores, limits[limits["seed"] == s], score) for score in SCORES}
        nrn, row = table.loc[lives, "nrn"], {"seed": s, "alive": int(lives.sum())}
        row |= {"nrn_mean": nrn.mean(), "nrn_sd": nrn.std()}
        row |= {f"unique_{score}": int(hits.sum()) for score, hits in unique.items()}
        for c in CATEGORIES:
            known = c in chosen
            f = chosen[c].feature if known else None
            row[f"feature_{c}"], row[f"nrn_{c}"] = f, table["nrn"][f] if known else np.nan
            row[f"auroc_{c}"] = auroc_of(table, c, chosen[c]) if known else np.nan
            row[f"above_null_{c}"] = known and bool(unique["nrn"][f])
        rows.append(row)
        number = clusters["crosscoder"] == s - variant.seed
        clusters.loc[number, "unique"] = unique["nu_eps"][clusters.loc[number, "feature"]]
    unique = clusters["unique"].astype(bool)
    medians = clusters[unique].groupby("crosscoder")["stability"].median()
    if len(medians):
        metrics["stability_unique_median"] = pooled_metric([metric(v, n=unique.sum()) for v in medians])
    metrics |= over_k
    by_seed = pd.DataFrame(rows)
    for c in CATEGORIES:
        chosen = by_seed.set_index(by_seed["seed"] - variant.seed)[f"feature_{c}"].dropna()
        stability = clusters.set_index(["crosscoder", "feature"])["stability"]
        stable = stability.reindex(list(chosen.items())).dropna()
        if len(stable):
            metrics[f"stable_{c}"] = pooled_metric([metric(value) for value in stable])
    return metrics, {"clusters": clusters, "by_seed": by_seed, "by_k": pd.DataFrame(rows_of_k)}


def plot_stability(clusters: pd.DataFrame) -> go.Figure:
    """Distribution of the features' mean cosine with their matches in the other crosscoders."""
    names = {True: "at least 4 of 5 crosscoders", False: "fewer"}
    fig = px.histogram(
        clusters.assign(found=clusters["recurrent"].map(names)), x="stability", color="found", nbins=50,
        barmode="stack", title="Do features recur with another seed?", labels={"found": "found in"},
        color_discrete_map=dict(zip(names.values(), ("#222222", COLOURS["null"]))),
    )  # fmt: skip
    fig.update_xaxes(title_text="mean cosine with the matched features", range=[0, 1.02])
    return fig.update_yaxes(title_text="features of all crosscoders")


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
