"""Reading the ladder: one number over the sizes, what three of them can show, and how they are drawn.

``lib.study.ladder`` measures; this module takes its table "rungs" (pair, quantity, value, low, high, n, over) from
wherever it was kept::

    line = series(rungs, "nrn_mean")            # one row per pair, by size: parameters, value, low, high, n, over
    order(line)                                 # "rises", "falls" or "mixed", and whether the intervals tell neighbours apart
    plot(rungs, {"mean NRN": {"distilled": "nrn_mean"}})

Three sizes have six orders, all equally likely where size does not matter: one of them is "rises". So three
points in rising order are evidence of odds of six to one at best, before anything else differs between the
rungs; and something always does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from ..figures import COLOURS
from ..settings import UserError

SHOWN = {
    "parameters": "parameters (log scale)",
    "gain": "gain from distillation (accuracy)",
    "reflect_auc": "AUROC of reflection for errors",
}


def series(rungs: pd.DataFrame, quantity: str) -> pd.DataFrame:
    """One quantity over the rungs, by size: index pair, columns parameters, value, low, high, n, over.
    UserError if no rung has it.

    A rung without it has NaN.
    """
    found = rungs[rungs["quantity"] == quantity].set_index("pair")
    if found.empty:
        raise UserError(
            f"no rung has the quantity {quantity!r}: there are {', '.join(dict.fromkeys(rungs['quantity']))}"
        )
    size = rungs[rungs["quantity"] == "parameters"].set_index("pair")["value"].rename("parameters")
    return (
        pd.concat([size, found[["value", "low", "high", "n", "over"]]], axis=1)
        .loc[size.index]
        .sort_values("parameters")
    )


def order(line: pd.DataFrame) -> tuple[str, bool]:
    """("rises", "falls" or "mixed", is every step larger than the intervals?) of a ``series``. "mixed" where
    a value is missing, too.
    """
    values = line["value"].to_numpy(float)
    steps = np.diff(values)
    name = "rises" if (steps > 0).all() else "falls" if (steps < 0).all() else "mixed"
    low, high = line["low"].to_numpy(float), line["high"].to_numpy(float)
    apart = (low[1:] > high[:-1]) | (high[1:] < low[:-1])  # False where an interval is not known
    return ("mixed" if np.isnan(values).any() else name), bool(apart.all())


def ranks(rungs: pd.DataFrame, quantities: Sequence[str]) -> pd.DataFrame:
    """Rank of every rung (1: lowest) in every quantity, by size: does it follow size, or success? NaN where a
    rung has none.
    """
    return pd.DataFrame({q: series(rungs, q)["value"].rank() for q in quantities}).T.rename_axis("quantity")


def text(line: pd.DataFrame, digits: int = 2) -> str:
    """A ``series`` as prose shows it, from the smallest pair to the largest: ``0.50, 0.51, 0.52``."""
    return ", ".join("n/a" if pd.isna(v) else f"{v:.{digits}f}" for v in line["value"])


# --- figures ------------------------------------------------------------------------------------------------


def plot(
    rungs: pd.DataFrame,
    panels: Mapping[str, Mapping[str, str]],
    x: str = "parameters",
    flat: Mapping[str, float] | None = None,
    intervals: bool = True,
) -> go.Figure:
    """One panel per entry of ``panels`` {title: {curve: quantity}}, each quantity against ``x`` (a quantity,
    too) with its 95% interval.

    A curve has the colour of its first word (a model, a category, "null", "random"); the second one of a
    colour in a panel is dashed, and a control, which begins with "null" or "random", dotted. ``flat``: {panel
    title: height of a dotted line}. Against anything but size the points are not joined; those of the first
    curve are named.
    """
    fig = make_subplots(1, len(panels), subplot_titles=list(panels), horizontal_spacing=0.09)
    across, legend = series(rungs, x)["value"], set()
    for column, (title, curves) in enumerate(panels.items(), start=1):
        used = set()
        for name, quantity in curves.items():
            line, kind = series(rungs, quantity), name.split()[0].strip(",:")
            colour = COLOURS.get(kind, COLOURS["random"])
            dash = "dot" if kind in ("null", "random") else "dash" if colour in used else "solid"
            error = dict(
                type="data",
                symmetric=False,
                array=line["high"] - line["value"],
                arrayminus=line["value"] - line["low"],
            )
            named = not used and x != "parameters"
            fig.add_trace(
                go.Scatter(
                    x=across[line.index],
                    y=line["value"],
                    name=name,
                    legendgroup=name,
                    showlegend=name not in legend,
                    text=line.index,
                    mode="lines+markers" if x == "parameters" else "markers+text" if named else "markers",
                    textposition="top center",
                    line=dict(color=colour, dash=dash),
                    error_y=error if intervals else None,
                    textfont_size=11,
                    marker=dict(
                        color=colour,
                        size=9,
                        symbol={"solid": "circle", "dash": "circle-open", "dot": "diamond-open"}[dash],
                    ),
                ),
                row=1,
                col=column,
            )
            used.add(colour)
            legend.add(name)
        if title in (flat or {}):
            fig.add_hline(y=flat[title], line=dict(color="#444444", width=1, dash="dot"), row=1, col=column)
    if x == "parameters":
        fig.update_xaxes(type="log", tickvals=across, ticktext=[f"{n / 1e6:.2f}M" for n in across])
    else:  # room for the names
        room = 0.25 * max(float(across.max() - across.min()), 1e-3)
        fig.update_xaxes(range=[across.min() - room, across.max() + room])
    fig.update_xaxes(title_text=SHOWN.get(x, x))
    fig.update_layout(
        width=max(520, 420 * len(panels)), height=420, margin_t=90, legend=dict(orientation="h", y=-0.22)
    )
    return fig.update_annotations(font_size=13)


def plot_seeds(uniqueness: pd.DataFrame, rungs: pd.DataFrame, panels: Mapping[str, str]) -> go.Figure:
    """Every crosscoder as a point, for each panel {title: column of the table "uniqueness"}: base and
    distilled, and the two nulls; lines join means."""
    fig = make_subplots(1, len(panels), subplot_titles=list(panels), horizontal_spacing=0.09)
    size = series(rungs, "parameters")["parameters"]
    kinds = {
        "distilled": ("base, distilled", "solid", "circle", COLOURS["distilled"]),
        "null_a": ("null a (sets the threshold)", "dot", "diamond-open", COLOURS["null"]),
        "null_b": ("null b (checks it)", "dash", "square-open", COLOURS["random"]),
    }
    for column, measure in enumerate(panels.values(), start=1):
        for other, (name, dash, symbol, colour) in kinds.items():
            part = uniqueness[uniqueness["other"] == other]
            mean = part.groupby("pair")[measure].mean().reindex(size.index)
            both = dict(name=name, legendgroup=other)
            fig.add_trace(
                go.Scatter(
                    x=size,
                    y=mean,
                    mode="lines",
                    showlegend=False,
                    line=dict(color=colour, dash=dash),
                    hoverinfo="skip",
                    **both,
                ),
                row=1,
                col=column,
            )
            fig.add_trace(
                go.Scatter(
                    x=size[part["pair"]],
                    y=part[measure],
                    mode="markers",
                    showlegend=column == 1,
                    text=part["pair"],
                    marker=dict(color=colour, size=9, symbol=symbol),
                    **both,
                ),
                row=1,
                col=column,
            )
    fig.update_xaxes(
        type="log", tickvals=size, ticktext=[f"{n / 1e6:.2f}M" for n in size], title_text=SHOWN["parameters"]
    )
    fig.update_layout(
        width=max(520, 420 * len(panels)), height=420, margin_t=90, legend=dict(orientation="h", y=-0.22)
    )
    return fig.update_annotations(font_size=13)


def plot_overlaps(angles: pd.DataFrame, titles: Mapping[str, str]) -> go.Figure:
    """Rows of ``Rung.angles``, one panel per model of ``titles`` {components_of: title}: the overlap of each
    crosscoder's unique features, and a grey bar for 95% of random sets of as many features."""
    fig = make_subplots(
        1, len(titles), subplot_titles=list(titles.values()), shared_yaxes=True, horizontal_spacing=0.06
    )
    for column, model in enumerate(titles, start=1):
        part = angles[angles["components_of"] == model].reset_index(drop=True)
        x = part["pair"] + ", seed " + part["seed"].astype(str)
        bars = np.stack([part["null_low"], part["null_high"], np.full(len(part), np.nan)], axis=1).ravel()
        fig.add_trace(
            go.Scatter(
                x=np.repeat(x, 3),
                y=bars,
                mode="lines",
                line=dict(color=COLOURS["null"], width=12),
                name="random sets",
                legendgroup="null",
                showlegend=column == 1,
                hoverinfo="skip",
            ),
            row=1,
            col=column,
        )
        dots = dict(color=COLOURS["distilled"], size=9)
        fig.add_trace(
            go.Scatter(
                x=x,
                y=part["overlap"],
                mode="markers",
                marker=dots,
                text=part["features"],
                name="unique features",
                legendgroup="unique",
                showlegend=column == 1,
            ),
            row=1,
            col=column,
        )
    fig.update_yaxes(title_text="mean squared cosine", row=1, col=1)
    fig.update_layout(
        title="Do unique features write where the activations are?", width=1000, height=460, margin_t=90
    )
    return fig.update_annotations(font_size=13)
