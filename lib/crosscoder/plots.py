"""The figures of notebook 02. Each function returns a figure and the numbers it shows."""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.express as px
import plotly.graph_objects as go

from ..figures import COLOURS

GREYS = ("#8A8A8A", "#B4B4B4", "#5E5E5E", "#CFCFCF")


def training_curves(log: pd.DataFrame) -> tuple[go.Figure, pd.DataFrame]:
    """FVE, dead share and L0 over the tokens shown, from the lines of ``read_log``."""
    names = {"fve": "FVE", "dead": "dead share"}
    names |= {"l0": "L0 in the batch", "l0_at_threshold": "L0 at the threshold"}
    curves = log.rename(columns=names).melt(["tokens"], list(names.values()), var_name="curve")
    curves["panel"] = np.where(curves.curve.str.startswith("L0"), "features per token", "share")
    fig = px.line(
        curves,
        x="tokens",
        y="value",
        color="curve",
        facet_col="panel",
        facet_col_spacing=0.09,
        title="Training the crosscoder",
    )
    fig.update_yaxes(matches=None, showticklabels=True, title_text="", rangemode="tozero")
    fig.update_xaxes(title_text="tokens shown").for_each_annotation(_value_only)
    return fig, curves


def nrn_histogram(alive: pd.DataFrame) -> tuple[go.Figure, pd.DataFrame]:
    """Histograms of NRN with p = 1 and p = 2, from the alive features of a census; square-root counts."""
    centres, edges = np.arange(0.01, 1, 0.02).round(2), np.linspace(0, 1, 51)
    norms = {"p = 1 (paper)": alive.nrn_p1, "p = 2": alive.nrn_p2}
    counts = pd.concat(
        pd.DataFrame({"norm": norm, "NRN": centres, "features": np.histogram(nrn, bins=edges)[0]})
        for norm, nrn in norms.items()
    )
    fig = px.bar(
        counts.assign(root=np.sqrt(counts.features)),
        x="NRN",
        y="root",
        facet_row="norm",
        hover_data=["features"],
        title="Whose are the alive features?",
        height=480,
    )
    ticks = [0, 1, 4, 16, 64, 256, 1024, 4096]
    top = 1.05 * np.sqrt(counts.features.max())
    fig.update_yaxes(
        tickvals=np.sqrt(ticks), ticktext=list(map(str, ticks)), range=[0, top], title_text="features"
    )
    fig.update_xaxes(range=[0, 1])
    fig.update_xaxes(title_text="NRN: 0 base only, 0.5 shared, 1 distilled only", row=1)
    fig.update_traces(marker_color=COLOURS["distilled"]).update_layout(bargap=0.05)
    return fig.for_each_annotation(_value_only), counts


def row_cosines(alive: pd.DataFrame) -> tuple[go.Figure, pd.DataFrame]:
    """Cosine of a feature's two rows against its NRN, beside rows of different features."""
    kinds = {"cosine_shuffled": "different features (null)", "cosine": "same feature"}
    points = alive.rename(columns=kinds).melt(
        ["feature", "nrn_p1"], list(kinds.values()), var_name="rows", value_name="cosine similarity"
    )
    fig = px.scatter(
        points,
        x="nrn_p1",
        y="cosine similarity",
        color="rows",
        color_discrete_map=dict(zip(kinds.values(), (COLOURS["null"], COLOURS["distilled"]))),
        opacity=0.6,
        title="Rows in base and distilled",
    )
    fig.update_traces(marker_size=4).update_yaxes(range=[-1, 1])
    return fig.update_xaxes(range=[0, 1], title_text="NRN (p = 1)"), alive.drop(columns="alive")


def nrn_beside_null(alive: pd.DataFrame, null) -> tuple[go.Figure, pd.DataFrame]:
    """Share of alive features below every NRN, of the pair and of the null's crosscoders, with the null's 1%
    thresholds. ``null``: the study's part "nulls" (empty: the pair's curve only).
    """
    values = {"this pair": alive.nrn_p1}
    if null:
        scores = null.tables["null_scores"].query("alive")
        values |= {f"{pair}, seed {s}": part.nrn for (pair, s), part in scores.groupby(["pair", "seed"])}
    curves = pd.concat(
        pd.DataFrame({"crosscoder": name, "NRN": np.sort(x), "share": (np.arange(len(x)) + 0.5) / len(x)})
        for name, x in values.items()
    )
    fig = px.line(
        curves,
        x="NRN",
        y="share",
        color="crosscoder",
        color_discrete_map=dict(zip(values, (COLOURS["distilled"], *GREYS))),
        title="NRN of this pair and of pairs between which nothing was learnt",
    )
    if null:
        for limit in null.tables["thresholds"].query("score == 'nrn' and level == 0.01").threshold:
            fig.add_vline(x=limit, line_dash="dot", line_color="#444444")
    fig.update_xaxes(range=[0, 1], title_text="NRN (p = 1)")
    return fig.update_yaxes(title_text="share of alive features below", range=[0, 1]), curves


def _value_only(label) -> None:
    """The label of a panel without the name of its variable."""
    label.update(text=label.text.partition("=")[2])
