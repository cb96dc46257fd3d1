"""The figures of notebook 00. Each function takes a table and returns a plotly figure."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from ..figures import COLOURS


def marker_words(rates: pd.DataFrame) -> go.Figure:
    """How often marker words occur in general text and in traces (``trials.marker_words``)."""
    colours = {"general text": COLOURS["null"], "traces": COLOURS["distilled"]}
    bars = [go.Bar(x=rates.index, y=rates[name], name=name, marker_color=c) for name, c in colours.items()]
    title = "Marker words in the base's text and in the teacher's traces"
    return _titled(
        bars, title, "word with which a trace's sentences begin, counted anywhere", "per 1,000 tokens"
    )


def loss_curves(logs: Mapping[str, pd.DataFrame]) -> go.Figure:
    """Training loss over tokens, a curve for each log."""
    curves = [go.Scatter(x=c.tokens, y=c.loss, name=n, mode="lines+markers") for n, c in logs.items()]
    title = "Distilling the base on traces"
    axis = dict(type="log", tickvals=[d * 10**e for e in (4, 5, 6) for d in (1, 2, 5)], tickformat="~s")
    return _titled(curves, title, "tokens (log scale)", "training loss (nats per token)", xaxis=axis)


def reflection(steps: Mapping[str, pd.DataFrame]) -> go.Figure:
    """How likely a reflection is after errors and after correct steps (``trials.reflection_probability``)."""
    lines = []
    for model, table in steps.items():
        colour = COLOURS["distilled" if model == "distilled" else "random"]
        for error, dash, name in ((True, "solid", "an error"), (False, "dot", "a correct step")):
            p = table.p_reflection[table.error == error]
            heights, edges = np.histogram(p, bins=np.linspace(0, 1, 26))
            style = dict(mode="lines", line=dict(dash=dash, shape="hv", color=colour))
            y = np.append(heights, heights[-1]) / len(p)  # the last bin has a right end, too
            lines.append(go.Scatter(x=edges, y=y, name=f"{model}, after {name}", **style))
    axes = "P(next sentence is a reflection)", "share of steps (log scale)"
    layout = dict(xaxis_range=[-0.01, 1.01], yaxis=dict(type="log", tickvals=[0.001, 0.01, 0.1, 1]))
    return _titled(lines, "How likely is a reflection?", *axes, **layout)


def forbidden(table: pd.DataFrame) -> go.Figure:
    """Puzzles solved with one behaviour forbidden: columns forbidden, decoding, solved, low, high."""
    bars = []
    for (decoding, part), pattern in zip(table.groupby("decoding", sort=False), ("", "/")):
        error = dict(array=part.high - part.solved, arrayminus=part.solved - part.low, type="data")
        style = dict(marker_pattern_shape=pattern, marker_color=COLOURS["distilled"])
        none = ["0" if v < 0.01 else "" for v in part.solved]  # a bar that is not seen
        style |= dict(text=none, textposition="outside")
        bars.append(go.Bar(x=part.forbidden, y=part.solved, name=decoding, error_y=error, **style))
    title = "Puzzles solved with one behaviour forbidden"
    fig = _titled(bars, title, "forbidden", "share solved (95% interval)", yaxis_range=[0, 1.02])
    return fig.add_hline(1 / 3, line_dash="dot", annotation_text="chance", annotation_position="right")


def _titled(traces: list, title: str, x: str, y: str, **layout) -> go.Figure:
    return go.Figure(traces).update_layout(title=title, xaxis_title=x, yaxis_title=y, **layout)
