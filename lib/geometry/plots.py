"""The figures of notebook 05, from a ``parallelograms.Geometry``."""

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
    """Coordinates of one relation for a picture, in units of sigma: one row per model and pair.

    Each model's words are projected on their own two main directions (a second PCA). Those axes are arbitrary
    up to a turn, so every other model's map is turned (orthogonal Procrustes) to lie as well as possible on
    the reference's. Columns: model, input, output, x0, y0, x1, y1, shown (share of the relation's variance
    that the plane keeps)."""
    own = [geometry.words.index(word) for word in relation.words]
    sides = [[relation.words.index(pair[side]) for pair in relation.pairs] for side in (0, 1)]
    frames, turned_to = [], None
    for model in (reference, *(m for m in geometry.points if m != reference)):
        xy, shown = pca(geometry.points[model][own] / np.sqrt(geometry.sigma2[model]), 2)
        if turned_to is None:
            turned_to = xy
        else:
            u, _, vt = np.linalg.svd(xy.T @ turned_to)
            xy = xy @ (u @ vt)
        frame = pd.DataFrame(relation.pairs, columns=["input", "output"])
        frame[["x0", "y0"]], frame[["x1", "y1"]] = (xy[side] for side in sides)
        frame.insert(0, "model", model)
        frames.append(frame.assign(shown=shown))
    return pd.concat(frames, ignore_index=True)


def arrows(geometry: Geometry, relation: Relation, models: Sequence[str] | None = None) -> go.Figure:
    """One panel per model: an arrow from each input to its output, and the mean arrow in black; at most
    eight pairs are named, the same in all panels."""
    frame, models = flat_map(geometry, relation), list(models or geometry.points)
    table = geometry.table[geometry.table["relation"] == relation.name].set_index("model")
    title = "{}: relative loss {:.2f}, unexplained {:.2f}"
    titles = [title.format(m, *table.loc[m, ["relative", "offset_unexplained"]]) for m in models]
    shared = dict(shared_xaxes="all", shared_yaxes="all", horizontal_spacing=0.04)
    fig = make_subplots(1, len(models), subplot_titles=titles, **shared)
    maps = [frame[frame["model"] == model].reset_index(drop=True) for model in models]
    named = _apart(maps, 8)
    for column, (model, part) in enumerate(zip(models, maps), start=1):
        colour, panel = COLOURS.get(model, COLOURS["random"]), dict(row=1, col=column)
        for i, row in part.iterrows():
            fig.add_trace(_arrow(row, colour, 1.2, named=i in named), **panel)
        middle = part[["x0", "x1", "y0", "y1"]].mean()
        middle["input"], middle["output"] = "mean input", "mean output"
        fig.add_trace(_arrow(middle, "black", 4), **panel)
        title = f"first direction (sigma); the plane shows {part['shown'].iloc[0]:.0%}"
        fig.update_xaxes(title_text=title, **panel)
    fig.update_yaxes(title_text="second direction (sigma)", row=1, col=1)
    title = f"The relation '{relation.name}': arrows from input to output"
    fig.update_layout(title_text=title, showlegend=False, width=1000, height=520, margin_t=90)
    return fig.update_annotations(font_size=13)


def _apart(maps: Sequence[pd.DataFrame], most: int, room: tuple[float, float] = (0.35, 0.1)) -> set[int]:
    """At most so many pairs (row numbers, the same in all maps) whose words are not written over each other
    in any map."""
    ends = [part[["x0", "y0", "x1", "y1"]].to_numpy(float).reshape(-1, 2, 2) for part in maps]
    chosen: list[int] = []
    for i in range(len(ends[0])):
        # each map: the words of the chosen pairs and the first word of this one, against this pair's two
        placed = [np.concatenate([own[chosen].reshape(-1, 2), own[i, :1]]) for own in ends]
        near = [(np.abs(words[:, None] - own[i]) < room).all(axis=-1) for words, own in zip(placed, ends)]
        if len(chosen) < most and sum(map(np.sum, near)) == len(maps):  # a first word is near itself
            chosen.append(i)
    return set(chosen)


def _arrow(row: pd.Series, colour: str, width: float, named: bool = False) -> go.Scatter:
    words = (row["input"], row["output"])
    marker = dict(symbol=["circle", "arrow"], size=[4, 6 + 2 * width], angleref="previous", color=colour)
    return go.Scatter(
        x=(row.x0, row.x1), y=(row.y0, row.y1), mode="lines+markers+text" if named else "lines+markers",
        text=words, textposition="top center", textfont_size=11, line=dict(color=colour, width=width),
        marker=marker, hoverinfo="text", hovertext=words, opacity=1 if width > 2 else 0.7,
    )  # fmt: skip


def scores(geometry: Geometry, models: Sequence[str] | None = None) -> go.Figure:
    """Parallelogram loss per relation and model with its 95% interval; grey: 95% of random pairings of the
    same words."""
    fig = _by_relation(geometry.table, "score", list(models or geometry.points), 0.32, 52, null=True)
    title = "parallelogram loss (units of sigma\u00b2; 0 is a perfect parallelogram)"
    right = 1.03 * geometry.table[["null_high", "score_high"]].max(axis=None)
    fig.update_xaxes(title_text=title, range=[0, right])
    return fig.update_layout(title_text="Parallelogram loss, and the same words paired at random")


def differences(geometry: Geometry, statistic: str = "score") -> go.Figure:
    """Paired difference from the reference model per relation, and its mean over relations, with 95%
    intervals."""
    check("statistic", statistic, str, choices=STATISTICS)
    table, label = geometry.differences, LABELS[statistic]
    fig = _by_relation(table, statistic, list(table["model"].unique()), 0.28, 46)
    fig.add_vline(x=0, line=dict(color="#444444", width=1, dash="dot"))
    fig.update_xaxes(title_text=f"{label}, model minus base (left: lower than in the base)")
    return fig.update_layout(title_text=f"Change of the {label} from the base")


def _by_relation(
    table: pd.DataFrame, statistic: str, models: Sequence[str], step: float, height: int, null: bool = False
) -> go.Figure:
    """A line of the figure, ``height`` pixels, per relation; models lie ``step`` apart in it."""
    fig = go.Figure()
    for i, model in enumerate(models):
        part = table[table["model"] == model]
        y = np.arange(len(part)) + step * (i - (len(models) - 1) / 2)
        if null:
            bars = part[["null_low", "null_high"]].assign(gap=np.nan).to_numpy().ravel()
            look = dict(mode="lines", line=dict(color=COLOURS["null"], width=9), hoverinfo="skip")
            legend = dict(name="95% of random pairings", legendgroup="null", showlegend=i == 0)
            fig.add_scatter(x=bars, y=np.repeat(y, 3), **look, **legend)
        value, low, high = (part[statistic + end] for end in ("", "_low", "_high"))
        above, below = (high - value).clip(lower=0), (value - low).clip(lower=0)
        symbol = "circle" if model in COLOURS else "diamond"  # a null: black, since its bars are grey
        fig.add_scatter(
            x=value,
            y=y,
            mode="markers",
            name=model,
            marker=dict(color=COLOURS.get(model, "black"), symbol=symbol, size=9),
            error_x=dict(type="data", symmetric=False, array=above, arrayminus=below, thickness=1.5),
            hovertext=part["relation"], hoverinfo="text+x",
        )  # fmt: skip
    names = part["relation"]
    fig.update_yaxes(tickvals=np.arange(len(names)), ticktext=names, autorange="reversed", zeroline=False)
    return fig.update_layout(height=120 + height * len(names))
