"""The figures of notebook 03, and those that later notebooks draw of the same tables. Each function takes a
table and returns a plotly figure; ``figures.save`` shows and keeps it."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import plotly.express as px
import plotly.graph_objects as go

from ..figures import COLOURS, plain_titles
from ..labels import DETECTED
from .table import PLACES, Inspection

DOTTED = dict(line_dash="dot", line_color="#444444")
GROUPS = {"highest": COLOURS["distilled"], "middle": COLOURS["random"], "lowest": COLOURS["base"]}


def errors(by_place: pd.DataFrame) -> go.Figure:
    """How well wrong steps are known at the value and at the full stop (``detectors.errors_by_place``): small
    points are single crosscoders."""
    names = {"value": "at the value", "before": "at the full stop"}
    shown = by_place.assign(place=by_place["place"].map(names))
    colours = {"best feature": "#222222"}
    colours |= {f"probe of {m}": COLOURS[m] for m in ("base", "distilled")}
    fig = px.strip(
        shown, x="auroc", y="predictor", facet_col="place", color="predictor", color_discrete_map=colours,
        hover_data=["crosscoder"], category_orders={"predictor": list(colours)},
        title="Which steps are wrong? At the value, and at the full stop",
        labels={"auroc": "AUROC, wrong against right steps", "predictor": ""}, width=1000, height=300,
    )  # fmt: skip
    fig.add_vline(0.5, line_dash="dot", line_color=COLOURS["null"], layer="below")
    fig.update_traces(marker_size=8).update_xaxes(range=[0.4, 1.02]).update_yaxes(range=[2.5, -0.5])
    return plain_titles(fig).update_layout(showlegend=False, boxmode="overlay")


def labels(groups: Sequence[Mapping[str, pd.DataFrame]]) -> tuple[go.Figure, pd.DataFrame]:
    """E2: what the features of ``table.extremes`` of all crosscoders are about: (a bar per group with a
    segment per label, the shares)."""
    labelled = pd.concat([part.assign(group=name) for own in groups for name, part in own.items()])
    labelled = labelled.replace({"label": {"": "no label"}})
    shares = labelled.groupby("group", sort=False)["label"].value_counts(normalize=True)
    shares = shares.rename("share").reset_index()
    colours = {f"{p} {c}": COLOURS[c] for c in DETECTED for p in ("in", "before")}
    colours |= {"in general": "#F2F2F2", "mixed": "#DDDDDD", "in traces": "#555555"}
    colours |= {"in other": "#9A9A9A", "before other": "#9A9A9A", "at sentence ends": "#222222"}
    order = [f"{p} {c}" for c in (*DETECTED, "other", "general") for p in ("before", "in")]
    order += ["at sentence ends", "in traces", "mixed", "no label"]
    fig = px.bar(
        shares, x="share", y="group", color="label", pattern_shape="label",
        pattern_shape_map={x: "/" if x.startswith("before") else "" for x in order},
        color_discrete_map=colours, category_orders={"group": list(groups[0]), "label": order},
        title=f"What {len(groups[0]['highest'])} features of each kind, in each crosscoder, are about",
        labels={"group": "NRN", "label": "most of its activation is"}, width=1000,
    )  # fmt: skip
    fig.update_traces(marker_line=dict(color="#444444", width=0.5))
    for name, shape in (("in traces", "."), ("mixed", "x"), ("in other", "-")):  # greys are too alike
        fig.update_traces(marker_pattern_shape=shape, selector=dict(name=name))
    return fig.update_xaxes(tickformat=".0%", title_text="share of the features"), shares


def token_share(labelled: pd.DataFrame) -> go.Figure:
    """How much of each feature's variance the current token explains (``table.record_extremes``)."""
    explained = "share of variance explained by the token's identity, out of sample"
    fig = px.strip(
        labelled, x="token_r2", y="group", color="group",
        hover_data=["feature", "nrn", "label", "top_token"],
        title="How much the current token explains of each feature", color_discrete_map=GROUPS,
        category_orders={"group": list(GROUPS)}, labels={"token_r2": explained, "group": "NRN"},
    )  # fmt: skip
    low = min(0.0, labelled["token_r2"].min()) - 0.05
    return fig.update_xaxes(range=[low, 1.05]).update_layout(showlegend=False)


def detectors(tests: pd.DataFrame) -> go.Figure:
    """E3: the AUROC of each category's feature and of its controls before the sentence, pooled over
    crosscoders (``detectors.record_all``); small points are single ones."""
    fig = _with_intervals(
        tests, x="auroc", y="predictor", color="category", color_discrete_map=COLOURS, height=400,
        title="Predicting the next sentence: the chosen features and their controls",
        labels={"auroc": "AUROC", "predictor": ""},
    )  # fmt: skip
    fig.add_vline(x=0.5, line_dash="dot", line_color=COLOURS["null"]).update_traces(marker_size=9)
    return _with_single_ones(fig, tests, "auroc", "predictor").update_layout(showlegend=False)


def token_tests(tests: pd.DataFrame) -> go.Figure:
    """How often each category's features fire in each test, pooled over crosscoders (``detectors.pooled``);
    small points are single ones."""
    names = {"before": "before the sentence", "marker": "at its first token"}
    ends = {end: tests[end].clip(0, 1) for end in ("low", "high")}  # of a rate
    tests = tests.assign(chosen=tests["where"].map(names), **ends)
    fig = _with_intervals(
        tests,
        x="rate",
        y="test",
        color="chosen",
        symbol="chosen",
        height=560,
        color_discrete_sequence=[COLOURS["distilled"], COLOURS["base"]],
        title="Do the features follow the word or its function?",
        labels={"rate": "fires", "test": "", "chosen": "chosen"},
    )  # fmt: skip
    fig.update_xaxes(range=[-0.05, 1.05], tickvals=[0, 0.5, 1], ticktext=["0", "50", "100%"])
    fig.update_yaxes(range=[-0.5, tests["test"].nunique() - 0.5])
    fig.update_layout(scattermode="group", scattergap=0.4).update_traces(orientation="h")  # side by side
    fig.for_each_trace(lambda t: t.update(offsetgroup=t.name))
    fig = _with_single_ones(fig, tests, "rate", "test", "chosen")
    return fig.update_layout(legend=dict(orientation="h", y=-0.2))


def _with_intervals(tests: pd.DataFrame, x: str, y: str, **options) -> go.Figure:
    """A panel per category: x with its interval (columns low, high) for every y."""
    tests = tests.assign(up=tests["high"] - tests[x], down=tests[x] - tests["low"])
    bars, order = dict(error_x="up", error_x_minus="down"), {y: list(tests[y].unique())}
    options |= dict(facet_col="category", width=1100, category_orders=order)
    return plain_titles(px.scatter(tests.drop(columns="each"), x=x, y=y, **bars, **options))


def _with_single_ones(fig: go.Figure, tests: pd.DataFrame, x: str, y: str, series: str = "") -> go.Figure:
    """Small points for the values of single crosscoders (column ``each``), if there are several: grey, or
    beside their ``series`` (a column) in its colour."""
    colours = {trace.name: trace.marker.color for trace in fig.data}
    for column, (_, panel) in enumerate(tests.groupby("category", sort=False), start=1):
        for name, part in panel.groupby(series, sort=False) if series else [("", panel)]:
            single = part.explode("each")
            if len(single) > len(part):
                points = dict(x=single["each"], y=single[y], mode="markers", hoverinfo="x", showlegend=False)
                points |= dict(offsetgroup=name, orientation="h") if series else {}
                look = dict(size=4, color=colours[name] if series else "#777777", opacity=0.6)
                fig.add_scatter(**points, marker=look, row=1, col=column)
    return fig


def all_detectors(
    inspections: Sequence[Inspection], sentence_only: Mapping[str, float], threshold: float
) -> tuple[go.Figure, pd.DataFrame]:
    """The AUROC of every alive feature of all crosscoders along NRN, at the better place and direction:
    (figure, points). Circles are the chosen features, the dotted horizontal line the sentence-only predictor
    {category: AUROC}, the vertical one the null's threshold of NRN."""
    parts = []
    for i in inspections:
        for c in DETECTED:
            sides = [i.alive[f"{name}_{c}"].sub(0.5).abs() for name in PLACES.values()]
            part = i.alive[["feature", "nrn", "frequency"]].assign(category=c, auroc=0.5 + np.maximum(*sides))
            parts.append(part.assign(crosscoder=i.number, chosen=part["feature"] == i.chosen.get(c)))
    points = pd.concat(parts, ignore_index=True).dropna()
    fig = px.scatter(
        points, x="nrn", y="auroc", facet_col="category", color="category", color_discrete_map=COLOURS,
        hover_data=["feature", "crosscoder"], opacity=0.5, width=1100, height=360,
        title="Every feature of every crosscoder as a detector of the next sentence",
        labels={"nrn": "NRN", "auroc": "AUROC"},
    )  # fmt: skip
    plain_titles(fig.update_traces(marker_size=4).update_layout(showlegend=False))
    if np.isfinite(threshold):
        fig.add_vline(threshold, line_dash="dot", line_color="#BBBBBB", layer="below")
    for column, c in enumerate(points["category"].unique(), start=1):
        if c in sentence_only:
            fig.add_hline(y=sentence_only[c], col=column, layer="below", **DOTTED)
        ours = points[points["chosen"] & (points["category"] == c)]
        marker = dict(symbol="circle-open", size=12, color="black")
        fig.add_scatter(x=ours["nrn"], y=ours["auroc"], mode="markers", marker=marker, row=1, col=column)
    return fig, points


def scaling(table: pd.DataFrame, above: np.ndarray, threshold: float) -> tuple[go.Figure, pd.DataFrame]:
    """NRN against nu in its error form: (figure, points). Dotted: the null's threshold, 0.2."""
    usable = table["alive"] & table["nu_eps"].notna()
    points = table[usable].assign(kind=np.where(above[usable], "above the null's 1%", "not above"))
    fig = px.scatter(
        points, x="nrn", y="nu_eps", color="kind", opacity=0.6, hover_data=["feature", "nu_r", "label"],
        color_discrete_map={"not above": COLOURS["null"], "above the null's 1%": COLOURS["distilled"]},
        title="Unique by its row, unique by its activation?",
        labels={"nrn": "NRN (p = 1)", "nu_eps": "nu, error form", "kind": ""},
    )  # fmt: skip
    if np.isfinite(threshold):
        fig.add_vline(threshold, annotation_text="the null's 1%", **DOTTED)
    fig.add_hline(0.2, line_dash="dot", line_color="#BBBBBB", annotation_text="nu 0.2")
    fig.update_traces(marker_size=5)
    numbers = ["nu_eps", "nu_eps_low", "nu_eps_high", "nu_r", "nu_r_low", "nu_r_high"]
    return fig, points[["feature", "nrn", "nrn_p2", "side", *numbers, "shrinkage", "decoupling", "kind"]]


def use(table: pd.DataFrame, limit: float) -> tuple[go.Figure, pd.DataFrame]:
    """Change of use along NRN (``use.record``): (figure, points). The dotted lines hold 99% of the null's
    features."""
    kinds = {"unique": ("NRN beyond the null", "#222222")}
    kinds |= {"reweighted": ("used differently", COLOURS["verification"])}
    kinds |= {"unchanged": ("neither", COLOURS["null"])}
    alive, names = table[table["alive"]], {kind: name for kind, (name, _) in kinds.items()}
    fig = px.scatter(
        alive.assign(kind=alive["kind"].replace(names)),
        x="nrn",
        y="change",
        color="kind",
        color_discrete_map=dict(kinds.values()),
        category_orders={"kind": list(names.values())},
        opacity=0.6,
        hover_data=["feature", "q"],
        title="How differently do the models use each feature?",
        labels={"nrn": "NRN", "change": "change of use, distilled against base (log)", "kind": ""},
    )  # fmt: skip
    for level in (limit, -limit) if np.isfinite(limit) else ():
        fig.add_hline(y=level, annotation_text="99% of the null", annotation_position="top left", **DOTTED)
    columns = ["feature", "nrn", "kind", "change", "change_low", "change_high"]
    columns += ["change_frequency", "difference", "p", "q"]
    return fig.update_traces(marker_size=5), alive[columns]
