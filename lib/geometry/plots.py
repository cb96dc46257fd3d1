"""The figures of notebook 05, from a ``parallelograms.Geometry``."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from ..figures import COLOURS
from ..settings import check
from .parallelograms import LABELS, STATISTICS, Geometry, pca
from .words import Relation


def flat_map(geometry: Geometry, relation: Relation, reference: str = "base") -> pd.DataFrame:
    """Coordinates of one relation for a picture: one row per model and pair, in units of sigma, with the
    score's parts.

    Each model's words are projected on their own two main directions (a second PCA). Those axes are arbitrary
    up to a turn, so every other model's map is turned (orthogonal Procrustes) to lie as well as possible on
    the reference's. Columns: model, input, output, x0, y0, x1, y1, shown (share of the relation's variance
    that the plane keeps).
    """
    index = {word: i for i, word in enumerate(geometry.words)}
    own = [index[w] for w in relation.words]
    place = {w: i for i, w in enumerate(relation.words)}
    flat, shown = {}, {}
    for model in (reference, *(m for m in geometry.points if m != reference)):
        flat[model], shown[model] = pca(geometry.points[model][own] / np.sqrt(geometry.sigma2[model]), 2)
        if model != reference:
            u, _, vt = np.linalg.svd(flat[model].T @ flat[reference])
            flat[model] = flat[model] @ (u @ vt)
    rows = []
    for model, xy in flat.items():
        for left, right in relation.pairs:
            (x0, y0), (x1, y1) = xy[place[left]], xy[place[right]]
            rows.append(
                {
                    "model": model,
                    "input": left,
                    "output": right,
                    "x0": x0,
                    "y0": y0,
                    "x1": x1,
                    "y1": y1,
                    "shown": shown[model],
                }
            )
    return pd.DataFrame(rows)


def arrows(
    geometry: Geometry, relation: Relation, models: Sequence[str] | None = None, labels: int = 8
) -> go.Figure:
    """One panel per model: an arrow from each input to its output, and the mean arrow in black; ``labels``
    pairs are named.
    """
    frame = flat_map(geometry, relation)
    models = list(models or geometry.points)
    table = geometry.table.set_index(["relation", "model"])
    titles = [
        f"{m}: relative loss {table.loc[(relation.name, m), 'relative']:.2f}, unexplained "
        f"{table.loc[(relation.name, m), 'offset_unexplained']:.2f}"
        for m in models
    ]
    fig = make_subplots(
        1, len(models), subplot_titles=titles, shared_xaxes="all", shared_yaxes="all", horizontal_spacing=0.04
    )
    named = set(np.linspace(0, len(relation.pairs) - 1, min(labels, len(relation.pairs))).astype(int))
    for column, model in enumerate(models, start=1):
        part = frame[frame["model"] == model].reset_index(drop=True)
        colour = COLOURS.get(model, COLOURS["random"])
        for i, row in part.iterrows():
            _arrow(
                fig,
                column,
                (row.x0, row.x1),
                (row.y0, row.y1),
                colour,
                1.2,
                (row.input, row.output),
                shown=i in named,
            )
        middle = part[["x0", "x1", "y0", "y1"]].mean()
        _arrow(
            fig,
            column,
            (middle.x0, middle.x1),
            (middle.y0, middle.y1),
            "black",
            4,
            ("mean input", "mean output"),
        )
        fig.update_xaxes(
            title_text=f"first direction (sigma); the plane shows {part['shown'].iloc[0]:.0%}",
            row=1,
            col=column,
        )
    fig.update_yaxes(title_text="second direction (sigma)", row=1, col=1)
    fig.update_layout(
        title_text=f"The relation '{relation.name}': arrows from input to output",
        showlegend=False,
        width=1000,
        height=520,
    )
    fig.update_layout(margin_t=90)
    return fig.update_annotations(font_size=13)


def _arrow(fig: go.Figure, column: int, x, y, colour: str, width: float, words, shown: bool = False) -> None:
    marker = dict(symbol=["circle", "arrow"], size=[4, 6 + 2 * width], angleref="previous", color=colour)
    fig.add_trace(
        go.Scatter(
            x=x,
            y=y,
            mode="lines+markers+text" if shown else "lines+markers",
            text=words,
            textposition="top center",
            textfont_size=11,
            line=dict(color=colour, width=width),
            marker=marker,
            hoverinfo="text",
            hovertext=words,
            opacity=1 if width > 2 else 0.7,
        ),
        row=1,
        col=column,
    )


def scores(geometry: Geometry, models: Sequence[str] | None = None) -> go.Figure:
    """Parallelogram loss per relation and model with its 95% interval; grey: 95% of random pairings of the
    same words.
    """
    fig = go.Figure()
    models = list(models or geometry.points)
    for i, model in enumerate(models):
        part = geometry.table[geometry.table["model"] == model].reset_index(drop=True)
        y = np.arange(len(part)) + 0.32 * (i - (len(models) - 1) / 2)
        bars = np.stack([part["null_low"], part["null_high"], np.full(len(part), np.nan)], axis=1).ravel()
        fig.add_trace(
            go.Scatter(
                x=bars,
                y=np.repeat(y, 3),
                mode="lines",
                line=dict(color=COLOURS["null"], width=9),
                name="95% of random pairings",
                legendgroup="null",
                showlegend=i == 0,
                hoverinfo="skip",
            )
        )
        fig.add_trace(_points(part, "score", y, model))
    names = part["relation"]
    fig.update_yaxes(tickvals=np.arange(len(names)), ticktext=names, autorange="reversed", zeroline=False)
    fig.update_xaxes(
        title_text="parallelogram loss (units of sigma\u00b2; 0 is a perfect parallelogram)",
        rangemode="tozero",
    )
    return fig.update_layout(
        title_text="Parallelogram loss, and the same words paired at random", height=120 + 52 * len(names)
    )


def differences(geometry: Geometry, statistic: str = "score") -> go.Figure:
    """Paired difference from the reference model per relation, and its mean over relations, with 95%
    intervals.
    """
    check("statistic", statistic, str, choices=STATISTICS)
    fig = go.Figure()
    models = list(dict.fromkeys(geometry.differences["model"]))
    for i, model in enumerate(models):
        part = geometry.differences[geometry.differences["model"] == model].reset_index(drop=True)
        fig.add_trace(
            _points(part, statistic, np.arange(len(part)) + 0.28 * (i - (len(models) - 1) / 2), model)
        )
    fig.add_vline(x=0, line=dict(color="#444444", width=1, dash="dot"))
    fig.update_yaxes(
        tickvals=np.arange(len(part)), ticktext=part["relation"], autorange="reversed", zeroline=False
    )
    label = LABELS[statistic]
    fig.update_xaxes(title_text=f"{label}, model minus base (left: lower than in the base)")
    return fig.update_layout(title_text=f"Change of the {label} from the base", height=120 + 46 * len(part))


def _points(part: pd.DataFrame, statistic: str, y: np.ndarray, model: str) -> go.Scatter:
    value = part[statistic]
    above, below = (
        (part[f"{statistic}_high"] - value).clip(lower=0),
        (value - part[f"{statistic}_low"]).clip(lower=0),
    )
    return go.Scatter(
        x=value,
        y=y,
        mode="markers",
        name=model,
        marker=dict(color=COLOURS.get(model, COLOURS["random"]), size=9),
        error_x=dict(type="data", symmetric=False, array=above, arrayminus=below, thickness=1.5),
        hovertext=part["relation"],
        hoverinfo="text+x",
    )
