"""Would another crosscoder say the same? Predictions of notebooks 02 to 04, crosscoder by crosscoder, for two
dictionaries.

    part = compute_verdicts(variant)
    part.tables["verdicts"]     # one row per dictionary and prediction: mean, interval, verdict
    part.tables["by_seed"]      # one row per crosscoder and quantity

For each dictionary (DICTIONARIES) as many crosscoders as the run has are trained on the same activations, and
as many on the null pair (base and null_a), which set the thresholds of uniqueness. Each is asked everything
as if it were the only one, by the functions of notebooks 03 and 04, and chooses its own features on the split
"choose". What all of them say together is judged as everywhere (``lib.verdicts``)."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import plotly.express as px
import plotly.graph_objects as go

from ..crosscoder.model import CrossCoder
from ..crosscoder.recurrence import LIMIT, recurrent
from ..crosscoder.recurrence import metrics as metrics_of_recurrence
from ..crosscoder.seeds import content
from ..crosscoder.training import train
from ..features import detectors
from ..features.table import Inspection, category_detectors, follow, inspect
from ..features.uniqueness import beyond, score_table
from ..figures import COLOURS, plain_titles
from ..labels import CATEGORIES
from ..models.reader import open_models
from ..results import Part, Results
from ..runs import fingerprint, jsonable, kept, write_json
from ..steering import ablation, report
from ..verdicts import DEPENDS, NO, UNDECIDED, YES, Condition, above, below
from .nulls import null_crosscoder, thresholds
from .variants import Variant, metric, part_of_study

VERSION = 1  # of what is measured with one crosscoder
DICTIONARIES = {"1,024 features, k 24": (1024, 24), "256 features, k 8": (256, 8)}
BOOTS = 1000  # resamples of documents
TARGETS, TOP, MATCH_WIDTH = 200, 20.0, 0.1  # of the ablation, as in notebook 04: positions, percent, NRN
PAIR = [COLOURS["base"], COLOURS["distilled"]]  # colours of the two dictionaries
_FALLS, _MORE = "its logit falls without the features", "more than without matched ones"
PREDICTIONS: dict[str, tuple[str, Condition]] = {  # name: (meaning, condition)
    "shared": ("median NRN within 0.4 to 0.6", below("nrn_from_half", 0.1)),
    "tails": ("under 5% of the features have an NRN above 0.9", below("nrn_over_0_9", 0.05)),
    "beyond the null, NRN": ("over 5% of the features", above("beyond_nrn", 0.05)),
    "beyond the null, nu": ("over 5% of the features", above("beyond_nu_eps", 0.05)),
    **{f"{c}, predicted": ("better than *sentence only*", above(f"gain_{c}")) for c in CATEGORIES},
    **{f"{c}, needed": (_FALLS, below(f"ablate_{c}_distilled")) for c in CATEGORIES},
    **{f"{c}, specific": (_MORE, below(f"ablate_{c}_over_matched")) for c in CATEGORIES},
    "errors, known": ("a feature's AUROC is over 0.9", above("error_auroc", 0.9)),
    "errors, unique": ("its nu is below 0.2", below("error_nu_eps", 0.2)),
}


@part_of_study("verdicts", 3, targets=TARGETS)
def compute_verdicts(variant: Variant, targets: int = TARGETS) -> tuple[dict, dict]:
    """The part "verdicts", for each of DICTIONARIES; ``targets``: positions of each category at which
    features are taken out. Tables:

    verdicts   ``judged``, and dictionary
    by_seed    ``single``, and dictionary
    features   ``crosscoder.recurrence.recurrent`` of the crosscoders, and dictionary
    """
    models = open_models(variant.pair, variant.store.models)
    tables, metrics = {"verdicts": [], "by_seed": [], "features": []}, {}
    for name, (n_features, k) in DICTIONARIES.items():
        crosscoders, pooled, alive = _measured(variant, models, n_features, k, targets)
        verdicts, clusters = judged(pooled), recurrent(crosscoders, alive)
        tables["verdicts"].append(verdicts.assign(dictionary=name))
        tables["by_seed"].append(single(pooled).assign(dictionary=name))
        tables["features"].append(clusters.assign(dictionary=name))
        contradicted = (verdicts["holds"] > 0) & (verdicts["fails"] > 0)
        numbers = metrics_of_recurrence(clusters, crosscoders, alive)
        numbers["contradicted"] = metric(contradicted.sum(), n=len(verdicts))
        numbers["depends"] = metric((verdicts["verdict"] == DEPENDS).sum(), n=len(verdicts))
        numbers["error_recurrence"] = pooled.metrics["error_recurrence"]
        metrics |= {f"{x}_{n_features}_k{k}": number for x, number in numbers.items()}
    return metrics, {name: pd.concat(parts, ignore_index=True) for name, parts in tables.items()}


def _measured(
    variant: Variant, models: Mapping, n_features: int, k: int, targets: int
) -> tuple[list[CrossCoder], Results, list[np.ndarray]]:
    """The crosscoders of one dictionary, what they say together, and which features are alive [F] in each."""
    place, config = variant.folder(f"{n_features}_k{k}"), variant.config(n_features=n_features, k=k)
    if config == variant.config():
        crosscoders = variant.crosscoders
        nulls = [null_crosscoder(variant, "null_a", s) for s in variant.seeds]
    else:
        stores = {"pair": variant.store, "null": variant.harvested("base", "null_a")[1]}
        configs = [variant.config(s, n_features=n_features, k=k) for s in variant.seeds]
        crosscoders, nulls = (
            [train(store, one, place / f"{name}_{one.seed}") for one in configs]
            for name, store in stores.items()
        )
    null_store = variant.harvested("base", "null_a")[1]
    scores = [score_table(c, null_store, variant.max_tokens, "null_a", n_boot=0) for c in nulls]
    limits = thresholds(pd.concat([t.assign(seed=s) for s, t in enumerate(scores)], ignore_index=True))
    inspections = [_inspected(variant, c, place / f"features_{s}") for s, c in enumerate(crosscoders)]
    tables, _ = follow(crosscoders, [i.table for i in inspections])
    controls = detectors.Controls(inspections[0], BOOTS, variant.seed)
    pooled, errors = Results("18", variant.run, {}), []
    for number, (own, inspection) in enumerate(pooled.over(inspections)):
        more, contents = [targets] if targets != TARGETS else [], [content(c) for c in nulls]
        key = fingerprint("measured", VERSION, content(crosscoders[number]), contents, *more)

        def compute(folder: Path, inspection=inspection, own=own) -> None:
            measure(own, inspection, variant, models, limits, controls, targets)
            write_json(folder / "metrics.json", jsonable(own.metrics))

        own.metrics |= kept(place / f"measured_{number}", key, compute, _read)
        feature = int(own.metrics.pop("error_feature")["value"]) if "error_feature" in own.metrics else -1
        row = tables[number].loc[feature] if feature >= 0 else {}
        errors.append(row["cluster"] if row.get("recurrent", False) else -1 - number)
    recurring = [cluster for cluster in errors if cluster >= 0]
    share = max(map(recurring.count, recurring), default=0) / len(errors)
    pooled.add("error_recurrence", share, n=len(errors))
    return crosscoders, pooled, [t["alive"].to_numpy(bool) for t in tables]


def _inspected(variant: Variant, crosscoder: CrossCoder, folder: Path) -> Inspection:
    made_from = variant.store, folder, content(crosscoder), variant.pair.tokenizer()
    return inspect(crosscoder, *made_from, variant.max_tokens, 1, variant.nrn_over)


def _read(folder: Path) -> dict[str, dict]:
    return json.loads((folder / "metrics.json").read_text(encoding="utf-8"))


def measure(
    own: Results,
    inspection: Inspection,
    variant: Variant,
    models: Mapping,
    limits: pd.DataFrame,
    controls: detectors.Controls,
    targets: int = TARGETS,
) -> None:
    """All quantities of one crosscoder, put into ``own``: those of PREDICTIONS, what ``detectors.record``,
    ``detectors.record_fact`` and ``report.record_ablation`` add, and error_feature, its number. ``limits``:
    the thresholds of the null."""
    table, nrn = inspection.table, inspection.alive["nrn"]
    own.add("nrn_from_half", abs(nrn.median() - 0.5), n=len(nrn))
    own.add("nrn_over_0_9", (nrn > 0.9).mean(), n=len(nrn))
    for score in ("nrn", "nu_eps"):
        own.add(f"beyond_{score}", beyond(table, limits, score)[table["alive"]].mean(), n=len(nrn))
    alone = replace(inspection, detectors=category_detectors(table, variant.nrn_over))
    detectors.record(own, alone, controls, variant.nrn_over)
    known = detectors.record_fact(own, inspection, beyond(table, limits, "nu_eps"), controls)
    if known:
        own.add("error_feature", known["feature"])
        own.add("error_beyond_null", float(known["beyond the null"]))
    removed = ablation.plan(table, [TOP], variant.nrn_over, MATCH_WIDTH, "frequency_choose")
    sites = ablation.sample_targets(variant.store, targets)
    how = {"remote": variant.pair.remote}
    effects = ablation.measure(variant.store, inspection.crosscoder, models, sites, removed, 1, **how)
    report.record_ablation(own, effects)


# --- all of them --------------------------------------------------------------------------------------------


def single(pooled: Results) -> pd.DataFrame:
    """What each crosscoder says: seed, quantity, value, low, high (95%, over documents; the value itself for
    what depends on the weights alone)."""
    rows = []
    for name, m in pooled.metrics.items():
        rows += [(seed, name, *numbers) for seed, numbers in enumerate(m.get("seeds", []))]
    return pd.DataFrame(rows, columns=["seed", "quantity", "value", "low", "high"])


def answers(by_seed: pd.DataFrame) -> pd.DataFrame:
    """What each crosscoder alone would have said of PREDICTIONS: a row per prediction, a column per seed; 1
    holds, -1 does not hold, 0 where its interval contains the limit."""
    rows = {}
    for name, (_, condition) in PREDICTIONS.items():
        own = by_seed[by_seed["quantity"] == condition.metric].set_index("seed")
        beyond, short = own["low"] > condition.limit, own["high"] < condition.limit
        rows[name] = (beyond.astype(int) - short.astype(int)) * condition.side
    return pd.DataFrame(rows).T


def judged(pooled: Results) -> pd.DataFrame:
    """PREDICTIONS over several crosscoders, a row each: prediction, meaning, quantity, value, low, high,
    limit, agree, holds, fails (how many ``answers`` of single crosscoders say so), verdict."""
    rows, alone = [], answers(single(pooled))
    for name, (meaning, condition) in PREDICTIONS.items():
        m = pooled.metrics[condition.metric]
        verdict, agree = condition.verdict(m)
        row = {"prediction": name, "meaning": meaning, "quantity": condition.metric, "value": m["value"]}
        row |= {"low": m["ci"][0], "high": m["ci"][1], "limit": condition.limit, "agree": agree}
        row |= {"holds": int((alone.loc[name] > 0).sum()), "fails": int((alone.loc[name] < 0).sum())}
        rows.append(row | {"verdict": verdict})
    return pd.DataFrame(rows)


# --- figures ------------------------------------------------------------------------------------------------


def plot_answers(part: Part) -> tuple[go.Figure, pd.DataFrame]:
    """(figure, its data): what each crosscoder alone says of each prediction, and the verdict of all."""
    judged, columns = part.tables["verdicts"], {}
    words, colours = [NO, UNDECIDED, DEPENDS, YES], [PAIR[1], "#dddddd", "#F0E442", PAIR[0]]
    for dictionary, by_seed in part.tables["by_seed"].groupby("dictionary", sort=False):
        alone = answers(by_seed)
        for seed in alone:
            columns[dictionary, f"{seed}"] = alone[seed].map({1: YES, 0: UNDECIDED, -1: NO})
        own = judged[judged["dictionary"] == dictionary].set_index("prediction")
        columns[dictionary, "all"] = own["verdict"]
    table = pd.DataFrame(columns)
    steps = np.arange(5) / 4
    scale = [[x, colour] for i, colour in enumerate(colours) for x in steps[i : i + 2]]
    bar = {"tickvals": np.arange(4) * 0.75 + 0.375, "ticktext": words, "ticks": ""}
    heat = go.Heatmap(
        z=table.map(words.index).iloc[::-1].to_numpy(),
        x=[list(level) for level in zip(*table.columns)],
        y=table.index[::-1],
        **{"colorscale": scale, "zmin": 0, "zmax": 3, "xgap": 2, "ygap": 2, "colorbar": bar},
    )
    fig = go.Figure(heat)
    fig.update_xaxes(title_text="crosscoder (its seed), and all of them", tickangle=0)
    fig.update_layout(title="The same predictions, asked of one crosscoder at a time", height=620)
    table.columns = [f"{dictionary}, seed {seed}" for dictionary, seed in table.columns]
    return fig, table.rename_axis("prediction").reset_index()


def plot_values(part: Part, pattern: str, title: str, y: str) -> tuple[go.Figure, pd.DataFrame]:
    """(figure, its data): a quantity of each category, {} in ``pattern``, a panel each; one small point per
    crosscoder, and the mean with its interval over crosscoders and documents."""
    quantities = {pattern.format(c): c for c in CATEGORIES}
    judged, by_seed = (
        table.assign(category=table["quantity"].map(quantities)).dropna(subset="category")
        for table in (part.tables["verdicts"], part.tables["by_seed"])
    )
    names, categories = list(judged["dictionary"].unique()), list(judged["category"].unique())
    fig = px.strip(
        *(by_seed, "dictionary", "value"), color="dictionary", facet_col="category",
        category_orders={"category": categories, "dictionary": names}, color_discrete_sequence=PAIR,
        title=title,
    )  # fmt: skip
    for i, category in enumerate(categories, start=1):
        row = judged[judged["category"] == category].set_index("dictionary").loc[names]
        error = {"array": row["high"] - row["value"], "arrayminus": row["value"] - row["low"]}
        mark = {"symbol": "diamond", "size": 10, "color": "#444444"}
        mean = go.Scatter(x=names, y=row["value"], error_y=error, mode="markers", marker=mark)
        fig.add_trace(mean.update(showlegend=False), row=1, col=i)
        fig.add_hline(row["limit"].iloc[0], line_dash="dot", line_color="#444444", row=1, col=i)
    fig.update_xaxes(title_text="", showticklabels=False, ticks="")
    fig.update_yaxes(title_text=y, col=1)
    return plain_titles(fig), judged


def plot_recurrence(part: Part) -> go.Figure:
    """Distribution of the features' mean cosine with their matches in the other crosscoders."""
    look = dict(color="dictionary", color_discrete_sequence=PAIR)
    title = "Does a feature come back with another crosscoder?"
    fig = px.ecdf(part.tables["features"], x="stability", title=title, **look)
    fig.update_xaxes(title_text="mean cosine with its matches in the other crosscoders", range=[0, 1])
    fig.add_vline(LIMIT, line_dash="dot", annotation_text=f"{LIMIT:g}")
    return fig.update_yaxes(title_text="share of the features below")
