"""The figures of notebook 04. Each function takes a table and returns a plotly figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import plotly.express as px
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from ..figures import COLOURS
from .ablation import REMOVED
from .outcomes import NO_STEERING, RATES

DASHES = ("solid", "dash", "dot", "dashdot")
THINKING = {
    "length_ratio": "length of thought (1 = unsteered)",
    "accuracy": "accuracy",
    "chain": "accuracy, every step right",
    "runaway": "thoughts that never end",
}
SENTENCES = {f"rate_{c}": f"{c} per 100 tokens" for c in RATES}


def _plain_titles(fig: go.Figure) -> go.Figure:
    """Panels titled "reflection", not "category=reflection"."""
    return fig.for_each_annotation(lambda a: a.update(text=a.text.split("=")[-1]))


def _bars(row, value: str) -> dict:
    """Error bars from ``value`` to its _low and _high."""
    return dict(array=row[f"{value}_high"] - row[value], arrayminus=row[value] - row[f"{value}_low"])


def ablation(summary: pd.DataFrame, value: str = "logit") -> go.Figure:
    """``ablation.summarise``: what the first token of a sentence loses, by k; a panel per category."""
    bars = _bars(summary, value)
    shares = sorted(summary["k"].unique())
    fig = px.line(
        summary.assign(up=bars["array"], down=bars["arrayminus"]),
        x="k",
        y=value,
        color="model",
        line_dash="removed",
        facet_col="category",
        error_y="up",
        error_y_minus="down",
        log_x=True,
        markers=True,
        color_discrete_map=COLOURS,
        category_orders={"removed": list(REMOVED)},
        line_dash_map={"features": "solid", "matched": "dash", "random": "dot"},
        width=1100,
        title="What the first token of a sentence loses",
        labels={"k": "top k % of features", value: f"change of its {value.replace('_', '-')}"},
    )
    return _plain_titles(fig.update_xaxes(tickvals=shares, ticktext=[f"{k:g}" for k in shares]))


def ablation_per_norm(largest: pd.DataFrame) -> go.Figure:
    """``report.at_largest_k``: the same per unit of removed norm; a panel per model."""
    fig = px.bar(
        largest,
        x="category",
        y="per_norm",
        color="removed",
        facet_col="model",
        barmode="group",
        error_y="up",
        error_y_minus="down",
        color_discrete_map={"features": "#222222", "matched": COLOURS["null"], "random": COLOURS["random"]},
        pattern_shape="removed",
        width=1000,
        title=f"The same per unit of removed norm (k = {largest['k'].iloc[0]:g} %)",
        labels={"per_norm": "change of the logit per mean residual norm", "category": ""},
    )
    return _plain_titles(fig)


def dose_response(
    comparison: pd.DataFrame, measures: Mapping[str, str] = THINKING, title: str = "", columns: int = 2
) -> go.Figure:
    """One panel per measure ({column of ``outcomes.compare``: title}) against strength: a line with 95%
    intervals for each direction.

    Directions of one label share its colour and differ in their dashes. Random directions are one grey band,
    from the lowest to the highest of them, mirrored at 0: their sign means nothing.
    """
    # free text has no verified chain
    measures = {name: label for name, label in measures.items() if comparison[name].notna().any()}
    base = comparison[comparison["direction"] == NO_STEERING]
    noise = comparison[comparison["label"] == "random"]
    steered = comparison[~comparison["label"].isin((NO_STEERING, "random"))]
    rows = -(-len(measures) // columns)
    fig = make_subplots(
        rows, columns, subplot_titles=list(measures.values()), horizontal_spacing=0.08, vertical_spacing=0.12
    )
    for i, measure in enumerate(measures):
        place = {"row": i // columns + 1, "col": i % columns + 1}
        if len(noise):
            band = noise.groupby("strength")[measure].agg(["min", "max"])
            band.loc[0.0] = float(base[measure].iloc[0])
            band = pd.concat([band, band.drop(0.0).rename(index=lambda s: -s)]).sort_index()
            grey = dict(x=band.index, mode="lines", line_color=COLOURS["random"], line_width=0, **place)
            fig.add_scatter(y=band["max"], showlegend=False, hoverinfo="skip", name="", **grey)
            name = "random directions (mirrored)"
            fig.add_scatter(y=band["min"], fill="tonexty", name=name, showlegend=i == 0, **grey)
        for (label, name), group in steered.groupby(["label", "direction"], sort=False):
            order = list(steered.loc[steered["label"] == label, "direction"].unique()).index(name)
            line = pd.concat([group, base]).sort_values("strength")
            fig.add_scatter(
                x=line["strength"],
                y=line[measure],
                name=name,
                showlegend=i == 0,
                legendgroup=name,
                mode="lines+markers",
                line_color=COLOURS.get(label, COLOURS["distilled"]),
                line_dash=DASHES[order % len(DASHES)],
                error_y=_bars(line, measure),
                **place,
            )
    fig.update_xaxes(title_text="strength (mean residual norms)")
    return fig.update_layout(title=title, width=1000, height=360 * rows)


def needed_and_redundant(table: pd.DataFrame) -> go.Figure:
    """``report.needed_and_redundant``: tokens of needed and of redundant sentences, as ratios."""
    fig = px.bar(
        table,
        x="aim",
        y="ratio",
        color="tokens",
        barmode="group",
        error_y="up",
        error_y_minus="down",
        title="Tokens against the unsteered model",
        color_discrete_map={"needed": COLOURS["deduction"], "redundant": COLOURS["verification"]},
        labels={"aim": "", "ratio": "ratio (1 = unsteered)"},
    )
    return fig.add_hline(1, line_dash="dot")


def specificity(grid: pd.DataFrame, strength: float) -> go.Figure:
    """Rates with a feature added, as powers of 2 of the unsteered rates; cut at 4."""
    return px.imshow(
        np.log2(grid.clip(lower=2**-4, upper=2**4)),
        text_auto=".1f",
        zmin=-4,
        zmax=4,
        color_continuous_scale="RdBu_r",
        aspect="auto",
        title=f"Rates with a feature added (strength {strength:g}), as powers of 2",
        labels={"x": "rate of", "y": "feature of", "color": "log2"},
    )


def side_by_side(transcripts: Mapping[str, Sequence[str]], joiner: str, n: int = 60):
    """Transcripts as a table, each cut to ``n`` tokens."""
    rows = {
        name: joiner.join(words[:n]) + (f" … ({len(words)} tokens)" if len(words) > n else "")
        for name, words in transcripts.items()
    }
    return pd.DataFrame({"transcript": rows}).style.set_properties(**{"text-align": "left"})
