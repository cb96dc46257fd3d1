"""The figures of notebook 04. Each function takes a table and returns a plotly figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import plotly.express as px
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from ..figures import COLOURS, error_bars, express_bars, plain_titles
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


def ablation(summary: pd.DataFrame, value: str = "logit") -> go.Figure:
    """``ablation.summarise``: what the first token of a sentence loses, by k; a panel per category."""
    shares = sorted(summary["k"].unique())
    fig = px.line(
        summary, x="k", y=value, color="model", line_dash="removed", facet_col="category", log_x=True,
        markers=True, color_discrete_map=COLOURS, category_orders={"removed": list(REMOVED)},
        line_dash_map=dict(zip(REMOVED, ("solid", "dash", "dot"))), width=1100,
        title="What the first token of a sentence loses",
        labels={"k": "top k % of features", value: f"change of its {value.replace('_', '-')}"},
        **express_bars(summary, value),
    )  # fmt: skip
    return plain_titles(fig.update_xaxes(tickvals=shares, ticktext=[f"{k:g}" for k in shares]))


def ablation_per_norm(largest: pd.DataFrame) -> go.Figure:
    """``report.at_largest_k``: the same per unit of removed norm; a panel per model."""
    fig = px.bar(
        largest, x="category", y="per_norm", color="removed", facet_col="model", barmode="group",
        color_discrete_map={"features": "#222222", "matched": COLOURS["null"], "random": COLOURS["random"]},
        pattern_shape="removed", width=1000,
        title=f"The same per unit of removed norm (k = {largest['k'].iloc[0]:g} %)",
        labels={"per_norm": "change of the logit per mean residual norm", "category": ""},
        **express_bars(largest, "per_norm"),
    )  # fmt: skip
    return plain_titles(fig)


def dose_response(
    comparison: pd.DataFrame, measures: Mapping[str, str] = THINKING, title: str = ""
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
    rows, spacing = -(-len(measures) // 2), dict(horizontal_spacing=0.08, vertical_spacing=0.12)
    fig = make_subplots(rows, 2, subplot_titles=list(measures.values()), **spacing)
    for i, measure in enumerate(measures):
        panel = {"row": i // 2 + 1, "col": i % 2 + 1, "showlegend": i == 0}
        if len(noise):
            band = noise.groupby("strength")[measure].agg(["min", "max"])
            band.loc[0.0] = float(base[measure].iloc[0])
            band = pd.concat([band, band.drop(0.0).rename(index=lambda s: -s)]).sort_index()
            grey = dict(x=band.index, mode="lines", line_color=COLOURS["random"], line_width=0, **panel)
            fig.add_scatter(y=band["max"], hoverinfo="skip", name="", **grey | {"showlegend": False})
            fig.add_scatter(y=band["min"], fill="tonexty", name="random directions (mirrored)", **grey)
        for label, directions in steered.groupby("label", sort=False):
            for dash, (name, group) in enumerate(directions.groupby("direction", sort=False)):
                line = pd.concat([group, base]).sort_values("strength")
                fig.add_scatter(
                    x=line["strength"],
                    y=line[measure],
                    name=name,
                    legendgroup=name,
                    mode="lines+markers",
                    line_color=COLOURS.get(label, COLOURS["distilled"]),
                    line_dash=DASHES[dash % len(DASHES)],
                    error_y=error_bars(line, measure),
                    **panel,
                )
    fig.update_xaxes(title_text="strength (mean residual norms)")
    return fig.update_layout(title=title, width=1000, height=360 * rows)


def needed_and_redundant(table: pd.DataFrame) -> go.Figure:
    """``report.needed_and_redundant``: tokens of needed and of redundant sentences, as ratios."""
    fig = px.bar(
        table, x="aim", y="ratio", color="tokens", barmode="group", error_y="up", error_y_minus="down",
        color_discrete_map={"needed": COLOURS["deduction"], "redundant": COLOURS["verification"]},
        title="Tokens against the unsteered model",
        labels={"aim": "", "ratio": "ratio (1 = unsteered)"},
    )  # fmt: skip
    return fig.add_hline(1, line_dash="dot")


def specificity(grid: pd.DataFrame, strength: float) -> go.Figure:
    """Rates with a feature added, as powers of 2 of the unsteered rates; cut at 4."""
    return px.imshow(
        np.log2(grid.clip(lower=2**-4, upper=2**4)), text_auto=".1f", zmin=-4, zmax=4,
        color_continuous_scale="RdBu_r", aspect="auto",
        title=f"Rates with a feature added (strength {strength:g}), as powers of 2",
        labels={"x": "rate of", "y": "feature of", "color": "log2"},
    )  # fmt: skip


def side_by_side(transcripts: Mapping[str, Sequence[str]], joiner: str, n: int = 60):
    """Transcripts as a table, each cut to ``n`` tokens."""
    rows = {
        name: joiner.join(words[:n]) + (f" … ({len(words)} tokens)" if len(words) > n else "")
        for name, words in transcripts.items()
    }
    return pd.DataFrame({"transcript": rows}).style.set_properties(**{"text-align": "left"})
