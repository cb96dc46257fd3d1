"""The figures of notebook 02. Each function returns a figure and the numbers it shows."""

import numpy as np
import pandas as pd
import plotly.express as px
import plotly.graph_objects as go

from ..figures import COLOURS, express_bars, plain_titles
from ..results import Part

BY_K = tuple(COLOURS[name] for name in ("distilled", "null", "contrast", "base", "deduction"))
GREYS = ("#8A8A8A", "#B4B4B4", "#5E5E5E", "#CFCFCF")
ENDS = ("low", "high")


def training_curves(log: pd.DataFrame) -> tuple[go.Figure, pd.DataFrame]:
    """FVE, dead share and L0 over the tokens shown, from the lines of ``read_log``."""
    names = {"fve": "FVE", "dead": "dead share"}
    names |= {"l0": "L0 in the batch", "l0_at_threshold": "L0 at the threshold"}
    curves = log.rename(columns=names).melt(["tokens"], list(names.values()), var_name="curve")
    curves["panel"] = np.where(curves.curve.str.startswith("L0"), "features per token", "share")
    fig = px.line(
        curves, x="tokens", y="value", color="curve", facet_col="panel", facet_col_spacing=0.09,
        title="Training the crosscoder",
    )  # fmt: skip
    fig.update_yaxes(matches=None, showticklabels=True, title_text="", rangemode="tozero")
    return plain_titles(fig.update_xaxes(title_text="tokens shown")), curves


def nrn_histogram(alive: pd.DataFrame, null: Part | None = None) -> tuple[go.Figure, pd.DataFrame]:
    """Histograms of NRN with p = 1 and p = 2, from the alive features of a census; square-root counts. With
    the part "nulls": beside them those of the null pair that tests its thresholds, and these."""
    centres, edges = np.arange(0.01, 1, 0.02).round(2), np.linspace(0, 1, 51)
    norms, other = {"nrn": "p = 1 (paper)", "nrn_p2": "p = 2"}, pd.DataFrame(columns=["nrn", "nrn_p2"])
    if null:
        other = null.tables["null_scores"].query("alive")
        other = other[other["pair"] == other["pair"].iloc[-1]]
    counts = pd.DataFrame()
    for (column, norm), nrn in zip(norms.items(), (alive.nrn_p1, alive.nrn_p2)):
        own, noise = (np.histogram(x, bins=edges)[0] for x in (nrn, other[column].astype(float)))
        part = pd.DataFrame({"norm": norm, "NRN": centres, "features": own, "null": noise})
        counts = pd.concat([counts, part], ignore_index=True)
    fig = px.bar(
        counts.assign(root=np.sqrt(counts.features)),
        x="NRN",
        y="root",
        facet_row="norm",
        hover_data=["features"],
        title="Which model's are the alive features?",
        height=480,
    )
    fig.update_traces(marker_color=COLOURS["distilled"], name="this pair").update_layout(bargap=0.05)
    plain_titles(fig)
    if null:
        limits = (
            null.tables["thresholds"].query("level == 0.01").groupby(["score", "side"])["threshold"].mean()
        )
        for row, (column, norm) in enumerate(reversed(norms.items()), start=1):  # plotly counts from below
            part = counts[counts["norm"] == norm]
            look = dict(mode="lines", line=dict(shape="hvh", color="#222222", width=1.2), name="a null pair")
            fig.add_scatter(
                x=part["NRN"], y=np.sqrt(part["null"]), showlegend=row == 1, **look, row=row, col=1
            )
            for limit in limits[column]:
                fig.add_vline(x=limit, line_dash="dot", line_width=1, line_color="#444444", row=row, col=1)
        fig.data[0].showlegend = True
    most = int(counts[["features", "null"]].to_numpy().max())
    even = np.square(np.linspace(0, most**0.5, 5))  # as drawn
    ticks = sorted({round(float(f"{n:.1g}")) for n in even})
    look = dict(ticktext=list(map(str, ticks)), title_text="features (root scale)")
    fig.update_yaxes(tickvals=np.sqrt(ticks), **look)
    fig.update_yaxes(range=[0, 1.05 * most**0.5])
    fig.update_xaxes(range=[0, 1])
    fig.update_xaxes(title_text="NRN: 0 base only, 0.5 shared, 1 distilled only", row=1)
    return fig, counts if null else counts.drop(columns="null")


def row_cosines(alive: pd.DataFrame) -> tuple[go.Figure, pd.DataFrame]:
    """Cosine of a feature's two rows against its NRN, beside rows of different features."""
    kinds = {"cosine_shuffled": "different features (null)", "cosine": "same feature"}
    points = alive.rename(columns=kinds).melt(
        ["feature", "nrn_p1"], list(kinds.values()), var_name="rows", value_name="cosine similarity"
    )
    fig = px.scatter(
        points, x="nrn_p1", y="cosine similarity", color="rows",
        color_discrete_map=dict(zip(kinds.values(), (COLOURS["null"], COLOURS["distilled"]))), opacity=0.6,
        title="How alike are a feature's rows in base and distilled?",
    )  # fmt: skip
    fig.update_traces(marker_size=4).update_yaxes(range=[-1, 1])
    return fig.update_xaxes(range=[0, 1], title_text="NRN (p = 1)"), alive.drop(columns="alive")


def nrn_beside_null(own: pd.DataFrame, null: Part) -> tuple[go.Figure, pd.DataFrame]:
    """Share of alive features below every NRN, a curve per crosscoder of the pair and of its nulls, with the
    nulls' 1% thresholds. ``own``: seed, alive, nrn of the pair's features; ``null``: the study's part "nulls"
    (empty: the pair's curves only)."""
    tables = [own.assign(pair="this pair")]
    if null:
        tables.append(null.tables["null_scores"])
    every, curves = pd.concat(tables).query("alive"), []
    for (pair, seed), part in every.groupby(["pair", "seed"], sort=False):
        share = (np.arange(len(part)) + 0.5) / len(part)
        curves.append(pd.DataFrame({"pair": pair, "seed": seed, "NRN": np.sort(part["nrn"]), "share": share}))
    curves = pd.concat(curves, ignore_index=True)
    fig = px.line(
        curves, x="NRN", y="share", color="pair", line_group="seed",
        color_discrete_map=dict(zip(curves["pair"].unique(), (COLOURS["distilled"], *GREYS))),
        title="NRN of this pair and of its nulls",
    )  # fmt: skip
    fig.update_traces(line_width=1.5)
    if null:
        limits = null.tables["thresholds"].query("score == 'nrn' and level == 0.01").threshold
        for limit in limits.unique():
            place = "bottom right" if limit > 0.5 else "top left"  # where no curve is
            line = dict(line_dash="dot", line_width=1, line_color="#444444")
            fig.add_vline(x=limit, **line, annotation_text="null's 1%", annotation_position=place)
    fig.update_xaxes(range=[0, 1], title_text="NRN (p = 1)")
    return fig.update_yaxes(title_text="share of alive features below", range=[0, 1]), curves


def by_k(table: pd.DataFrame) -> go.Figure:
    """Recurrence, and how well the crosscoders describe the models, over k: the table by_k of the study's
    part "seeds"."""
    cosine, share = "cosine with matches", "share"
    names = {"stability": ("median", cosine), "chance": ("median by chance", cosine)}
    names |= {"recurrent": ("recurrent features", share), "fve_distilled": ("FVE", share)}
    names |= {"ce_recovered_distilled": ("CE recovered", share)}
    rows = []
    for column, (name, panel) in names.items():
        low, high = (table.get(f"{column}_{end}", table[column]) for end in ("low", "high"))
        rows.append(table[["k"]].assign(value=table[column], low=low, high=high, curve=name, panel=panel))
    lines = pd.concat(rows, ignore_index=True)
    fig = px.line(
        lines,
        x="k",
        y="value",
        color="curve",
        facet_col="panel",
        color_discrete_map=dict(zip((name for name, _ in names.values()), BY_K)),
        **express_bars(lines, "value", "low", "high"),
        markers=True,
        log_x=True,
        width=900,
        title="Recurrence and description, by features per token",
    )
    fig.update_xaxes(title_text="k, features per token", tickvals=table["k"].tolist())
    return plain_titles(fig.update_yaxes(range=[0, 1.02], title_text=""))
