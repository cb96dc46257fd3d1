"""The figures of notebook 03, and those that later notebooks draw of the same tables. Each function takes a
table and returns a plotly figure; ``figures.save`` shows and keeps it."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
import plotly.express as px
import plotly.graph_objects as go

from ..figures import COLOURS
from ..labels import DETECTED

DOTTED = dict(line_dash="dot", line_color="#444444")
GROUPS = {"highest": COLOURS["distilled"], "middle": COLOURS["random"], "lowest": COLOURS["base"]}


def _plain_titles(fig: go.Figure) -> go.Figure:
    """Panels titled "reflection", not "category=reflection"."""
    return fig.for_each_annotation(lambda a: a.update(text=a.text.split("=")[-1]))


def labels(groups: Mapping[str, pd.DataFrame]) -> tuple[go.Figure, pd.DataFrame]:
    """E2: what the features of ``table.extremes`` are about: (a bar per group with a segment per label, the
    shares)."""
    labelled = pd.concat([part.assign(group=name) for name, part in groups.items()])
    labelled = labelled.replace({"label": {"": "no label"}})
    shares = labelled.groupby("group", sort=False)["label"].value_counts(normalize=True)
    shares = shares.rename("share").reset_index()
    colours = {f"{p} {c}": COLOURS[c] for c in DETECTED for p in ("in", "before")}
    colours |= {"in general": "#F2F2F2", "mixed": "#DDDDDD", "in traces": "#555555"}
    colours |= {"in other": "#9A9A9A", "before other": "#9A9A9A", "at sentence ends": "#222222"}
    order = [f"{p} {c}" for c in (*DETECTED, "other", "general") for p in ("before", "in")]
    order += ["at sentence ends", "in traces", "mixed", "no label"]
    fig = px.bar(
        shares,
        x="share",
        y="group",
        color="label",
        pattern_shape="label",
        pattern_shape_map={x: "/" if x.startswith("before") else "" for x in order},
        color_discrete_map=colours,
        category_orders={"group": list(groups), "label": order},
        title=f"What {len(groups['highest'])} features of each kind are about",
        labels={"group": "NRN", "label": "most of its activation is"},
        width=1000,
    )
    fig.update_traces(marker_line=dict(color="#444444", width=0.5))
    return fig.update_xaxes(tickformat=".0%", title_text="share of the features"), shares


def token_share(labelled: pd.DataFrame) -> go.Figure:
    """How much of each feature's variance the current token explains (``table.record_extremes``)."""
    explained = "share of variance explained by the token's identity, out of sample"
    fig = px.strip(
        labelled,
        x="token_r2",
        y="group",
        color="group",
        hover_data=["feature", "nrn", "label", "top_token"],
        title="How much the current token explains of each feature",
        color_discrete_map=GROUPS,
        category_orders={"group": list(GROUPS)},
        labels={"token_r2": explained, "group": "NRN"},
    )
    return fig.update_xaxes(range=[-0.25, 1.05]).update_layout(showlegend=False)


def detectors(tests: pd.DataFrame) -> go.Figure:
    """E3: the AUROC of each category's feature and of its controls before the sentence
    (``detectors.detectors``)."""
    fig = _with_intervals(
        tests,
        x="auroc",
        y="predictor",
        color="category",
        height=400,
        color_discrete_map=COLOURS,
        title="Predicting the next sentence: the chosen feature and its controls",
        labels={"auroc": "AUROC", "predictor": ""},
    )
    fig.add_vline(x=0.5, line_dash="dot", line_color=COLOURS["null"]).update_traces(marker_size=9)
    return fig.update_layout(showlegend=False)


def token_tests(tests: pd.DataFrame) -> go.Figure:
    """How often each category's features fire in each test (``token_tests.token_tests``)."""
    names = {"before": "before the sentence", "marker": "at its first token"}
    fig = _with_intervals(
        tests.assign(chosen=tests["where"].map(names)),
        x="rate",
        y="test",
        color="chosen",
        symbol="chosen",
        height=440,
        color_discrete_sequence=[COLOURS["distilled"], COLOURS["base"]],
        title="Does the feature follow the word or its function?",
        labels={"rate": "fires", "test": "", "chosen": "chosen"},
    )
    fig.update_xaxes(range=[-0.05, 1.05], tickformat=".0%", dtick=0.5)
    fig.update_yaxes(range=[-0.5, tests["test"].nunique() - 0.5])
    return fig.update_layout(legend=dict(orientation="h", y=-0.2))


def _with_intervals(tests: pd.DataFrame, x: str, y: str, **options) -> go.Figure:
    """A panel per category: x with its interval (columns low, high) for every y."""
    tests = tests.assign(up=tests["high"] - tests[x], down=tests[x] - tests["low"])
    bars, order = dict(error_x="up", error_x_minus="down"), {y: list(tests[y].unique())}
    options |= dict(facet_col="category", width=1100, category_orders=order)
    return _plain_titles(px.scatter(tests, x=x, y=y, **bars, **options))


def all_detectors(
    alive: pd.DataFrame, chosen: Mapping[str, int], sentence_only: Mapping[str, float], threshold: float
) -> tuple[go.Figure, pd.DataFrame]:
    """The AUROC of every alive feature along NRN: (figure, points). A circle is the chosen feature, the
    dotted horizontal line the sentence-only predictor, the vertical one the null's threshold of NRN."""
    columns = {f"auroc_{c}": c for c in DETECTED}
    points = alive.melt(["feature", "nrn", "frequency"], list(columns), "category", "auroc")
    points = points.replace({"category": columns}).dropna()
    fig = px.scatter(
        points,
        x="nrn",
        y="auroc",
        facet_col="category",
        color="category",
        color_discrete_map=COLOURS,
        hover_data=["feature"],
        opacity=0.5,
        width=1100,
        height=360,
        title="Every feature as a detector",
        labels={"nrn": "NRN", "auroc": "AUROC before a sentence"},
    )
    _plain_titles(fig.update_traces(marker_size=4).update_layout(showlegend=False))
    if np.isfinite(threshold):
        fig.add_vline(threshold, line_dash="dot", line_color="#BBBBBB")
    by_feature = alive.set_index("feature")
    for column, c in enumerate(points["category"].unique(), start=1):
        if c in chosen:
            fig.add_hline(y=sentence_only[c], col=column, **DOTTED)
            x, y = by_feature.loc[chosen[c], ["nrn", f"auroc_{c}"]]
            marker = dict(symbol="circle-open", size=14, color="black")
            fig.add_scatter(x=[x], y=[y], mode="markers", marker=marker, row=1, col=column)
    return fig, points


def scaling(table: pd.DataFrame, above: np.ndarray, threshold: float) -> tuple[go.Figure, pd.DataFrame]:
    """NRN against nu in its error form: (figure, points). The dotted lines are the null's threshold and
    0.2."""
    usable = table["alive"] & table["nu_eps"].notna()
    points = table[usable].assign(kind=np.where(above[usable], "above the null's 1%", "not above"))
    fig = px.scatter(
        points,
        x="nrn",
        y="nu_eps",
        color="kind",
        opacity=0.6,
        hover_data=["feature", "nu_r", "label"],
        color_discrete_map={"not above": COLOURS["null"], "above the null's 1%": COLOURS["distilled"]},
        title="Unique by its row, unique by its activation?",
        labels={"nrn": "NRN (p = 1)", "nu_eps": "nu, error form", "kind": ""},
    )
    if np.isfinite(threshold):
        fig.add_vline(threshold, **DOTTED)
    fig.add_hline(0.2, line_dash="dot", line_color="#BBBBBB")
    fig.update_yaxes(range=[-0.5, 1.2]).update_traces(marker_size=5)
    numbers = ["nu_eps", "nu_eps_low", "nu_eps_high", "nu_r", "nu_r_low", "nu_r_high"]
    return fig, points[["feature", "nrn", "nrn_p2", "side", *numbers, "shrinkage", "decoupling", "kind"]]


def use(table: pd.DataFrame, limit: float) -> tuple[go.Figure, pd.DataFrame]:
    """Change of use along NRN (``use.record``): (figure, points). The dotted lines hold 99% of the null's
    features."""
    kinds = {"unique": COLOURS["distilled"], "reweighted": COLOURS["base"], "unchanged": COLOURS["null"]}
    alive = table[table["alive"]]
    fig = px.scatter(
        alive,
        x="nrn",
        y="change",
        color="kind",
        color_discrete_map=kinds,
        category_orders={"kind": list(kinds)},
        opacity=0.6,
        hover_data=["feature", "q"],
        title="Use against uniqueness",
        labels={"nrn": "NRN", "change": "change of use, distilled against base (log)", "kind": ""},
    )
    for level in (limit, -limit) if np.isfinite(limit) else ():
        fig.add_hline(y=level, **DOTTED)
    columns = ["feature", "nrn", "kind", "change", "change_low", "change_high"]
    columns += ["change_frequency", "difference", "p", "q"]
    return fig.update_traces(marker_size=5), alive[columns]
