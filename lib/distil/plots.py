"""The figures of notebook 00. Each function takes a table and returns a plotly figure."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from ..figures import COLOURS


def marker_words(rates: pd.DataFrame) -> go.Figure:
    """How often marker words occur in general text and in traces (``trials.marker_words``)."""
    colours = {"general text": COLOURS["base"], "traces": COLOURS["distilled"]}
    bars = [go.Bar(x=rates.index, y=rates[name], name=name, marker_color=c) for name, c in colours.items()]
    return go.Figure(bars).update_layout(
        title="Marker words in the base's text and in the teacher's traces",
        yaxis_title="per 1,000 tokens",
        xaxis_title="first word of a sentence",
    )


def loss_curves(logs: Mapping[str, pd.DataFrame]) -> go.Figure:
    """Training loss over tokens, a curve for each log."""
    curves = [go.Scatter(x=c.tokens, y=c.loss, name=n, mode="lines+markers") for n, c in logs.items()]
    return go.Figure(curves).update_layout(
        title="Distilling the base on traces",
        xaxis_title="tokens",
        yaxis_title="training loss (nats per token)",
        xaxis_type="log",
    )


def reflection(steps: Mapping[str, pd.DataFrame]) -> go.Figure:
    """How likely a reflection is after errors and after correct steps (``trials.reflection_probability``), a
    pair of histograms for each model.
    """
    fig = go.Figure()
    for model, table in steps.items():
        for error, dash, name in ((True, "solid", "an error"), (False, "dot", "a correct step")):
            p = table.p_reflection[table.error == error]
            heights, edges = np.histogram(p, bins=np.linspace(0, 1, 26))
            colour = COLOURS["distilled" if model == "distilled" else "random"]
            fig.add_scatter(
                x=(edges[1:] + edges[:-1]) / 2,
                y=heights / len(p),
                mode="lines",
                line=dict(dash=dash, shape="hvh", color=colour),
                name=f"{model}, after {name}",
            )
    return fig.update_layout(
        title="How likely is a reflection?",
        xaxis_title="P(next sentence is a reflection)",
        yaxis_title="share of steps",
        yaxis_type="log",
    )


def forbidden(table: pd.DataFrame) -> go.Figure:
    """Puzzles solved with one behaviour forbidden: columns forbidden, decoding, solved, low, high."""
    fig = go.Figure()
    for (decoding, part), pattern in zip(table.groupby("decoding", sort=False), ("", "/")):
        fig.add_bar(
            x=part.forbidden,
            y=part.solved,
            name=decoding,
            marker_pattern_shape=pattern,
            marker_color=COLOURS["distilled"],
            error_y=dict(array=part.high - part.solved, arrayminus=part.solved - part.low, type="data"),
        )
    return fig.update_layout(
        title="Puzzles solved with one behaviour forbidden",
        yaxis_title="share solved (95% interval)",
        xaxis_title="forbidden",
        yaxis_range=[0, 1.02],
    )
