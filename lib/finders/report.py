"""What the scores of finders say: the best of each truth, who beats the crosscoder by NRN, and figures."""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.express as px
import plotly.graph_objects as go

from ..figures import COLOURS, SCALE, plain_titles
from ..results import Part, interval_text, read_part
from ..runs import Run
from ..stats import t_interval
from ..study.variants import metric
from .scores import interval
from .truths import REAL

NRN = "BatchTopK crosscoder, NRN"
CONTROL = "random features"  # no finder
DECIDING = ("planted", "control", "tiny")  # truths on which a finder must beat NRN to be shown beside it
REPORTED = ("precision", "recall", "necessity", "sufficiency")
SHOWN = {  # score: what the figure says of it
    "precision": "precision",
    "recall": "recall",
    "calibration": "calibration error",
    "recurrence": "recurrence over seeds",
    "null_claims": "sure claims on the null",
    "necessity": "necessity,<br>nats per norm",
    "sufficiency": "sufficiency,<br>nats per norm",
}
SHOWN_REAL = ("precision", "recall", "null_claims", "necessity", "sufficiency")


def named(scores: pd.DataFrame) -> dict[str, dict]:
    """finders, truths; for each truth t best_precision_<t>, best_recall_<t>, null_claims_<t>, of the finder
    with the highest F1 of the first seed, over the other seeds (null_claims: over all that were tried); the
    same with nrn_ in front for the crosscoder by NRN. Where effects are measured, also necessity and
    sufficiency."""
    entered = scores[scores["finder"] != CONTROL]
    metrics = {"finders": metric(entered["finder"].nunique()), "truths": metric(scores["truth"].nunique())}
    for name, group in entered.groupby("truth", sort=False):
        for finder, front, of_null in ((best(group), "best_", ""), (NRN, "nrn_", "nrn_")):
            own = group[group["finder"] == finder]
            later = own[own["seed"] > 0] if len(own) > 1 else own
            found = [(front, score, later[score].dropna()) for score in REPORTED]
            for start, score, values in [*found, (of_null, "null_claims", own["null_claims"].dropna())]:
                if len(values) or score in ("precision", "recall"):
                    ci = interval(score, values) if len(values) > 1 else None
                    metrics[f"{start}{score}_{name}"] = metric(values.mean(), ci, len(values))
    return metrics


def best(group: pd.DataFrame) -> str:
    """The finder with the highest F1 of the first seed, of the scores at one truth."""
    first = group[(group["seed"] == 0) & (group["finder"] != CONTROL)]
    return first.set_index("finder")["f1"].idxmax()


def beats(scores: pd.DataFrame) -> pd.DataFrame:
    """F1 of each finder minus that of the crosscoder by NRN, seed by seed: truth, finder, gain, low, high
    (95%, over seeds), beats (low above 0)."""
    rows, by_nrn = [], scores["finder"] == NRN
    for (name, finder), part in scores[~by_nrn].groupby(["truth", "finder"], sort=False):
        other = scores[by_nrn & (scores["truth"] == name)].set_index("seed")["f1"]
        own = part.set_index("seed")["f1"]
        gain = own - other if len(own) > 1 else own.iloc[0] - other
        low, high = t_interval(gain)
        rows.append((name, finder, gain.mean(), low, high, bool(low > 0)))
    return pd.DataFrame(rows, columns=["truth", "finder", "gain", "low", "high", "beats"])


def winners(gains: pd.DataFrame) -> list[str]:
    """The finders that beat the crosscoder by NRN on all truths of DECIDING."""
    decided = gains[gains["truth"].isin(DECIDING) & gains["beats"] & (gains["finder"] != CONTROL)]
    counts = decided.groupby("finder", sort=False)["truth"].nunique()
    return list(counts.index[counts == len(DECIDING)])


def tried_on_all(scores: pd.DataFrame) -> int:
    """How many finders beside the crosscoder by NRN can be asked on all truths of DECIDING."""
    counts = scores[scores["truth"].isin(DECIDING)].groupby("finder")["truth"].nunique()
    return int((counts.drop([NRN, CONTROL], errors="ignore") == len(DECIDING)).sum())


def shows(part: Part) -> str:
    """For each truth the finder that is best with the first seed, as it is with the others, beside the
    crosscoder by NRN, in words."""
    say = lambda name: interval_text(part.metrics[name])
    lines = [
        f"*{name}*: {best(group)}, precision {say(f'best_precision_{name}')}, recall"
        f" {say(f'best_recall_{name}')} (by NRN {say(f'nrn_precision_{name}')} and"
        f" {say(f'nrn_recall_{name}')})"
        for name, group in part.tables["scores"].groupby("truth", sort=False)
    ]
    return "Best with the first seed, and what it gives with the others: " + "; ".join(lines) + "."


def real(run: str = "default") -> tuple[pd.DataFrame, str] | None:
    """(scores by finder on the truth smol as text, means and 95% over seeds; what they say) if they were
    computed."""
    found = read_part(Run("smol", run), "finders").tables.get("summary")
    if found is None:
        return None
    table = found.set_index("finder")

    def say(finder: str, name: str) -> str:
        ends = [float(table.loc[finder, f"{name}_{end}"]) for end in ("low", "high")]
        value = float(table.loc[finder, name])
        return interval_text({"value": value, "ci": None if np.isnan(ends).any() else ends})

    first = table.drop(CONTROL)["necessity"].idxmax()
    needed = table.index[table["necessity_low"] > 0]
    text = (
        f"In `smol` the claims of *{first}* are the most necessary: {say(first, 'necessity')} nats per norm"
        f" (by NRN {say(NRN, 'necessity')}, {CONTROL} {say(CONTROL, 'necessity')}). The interval over seeds"
        f" lies above 0 for {'; '.join(needed) or 'no finder'}. The share of its first {REAL.claims}"
        f" claims that have an effect is {say(first, 'precision')} (by NRN {say(NRN, 'precision')}, {CONTROL}"
        f" {say(CONTROL, 'precision')}); {table.loc[first, 'null_claims']:.0f} (by NRN"
        f" {table.loc[NRN, 'null_claims']:.0f}) are as sure where the traces had no reflections."
    )
    scores = {name: [say(finder, name) for finder in table.index] for name in SHOWN_REAL}
    return pd.DataFrame(scores, index=table.index), text


def plot_f1(summary: pd.DataFrame) -> go.Figure:
    """Mean F1 by finder and truth; empty where a finder cannot be asked."""
    wide = summary.pivot(index="finder", columns="truth", values="f1")
    wide = wide.loc[summary["finder"].unique(), summary["truth"].unique()]
    fig = px.imshow(
        wide, zmin=0, zmax=1, text_auto=".2f", aspect="auto", color_continuous_scale=SCALE, width=900,
        height=560, title="F1 of finders, where the truth is known", labels={"color": "F1"},
    )  # fmt: skip
    return fig.update_yaxes(title_text="").update_xaxes(title_text="")


def plot(scores: pd.DataFrame, name: str) -> go.Figure:
    """The scores of all finders at one truth: grey points are seeds, diamonds their means."""
    long = scores[scores["truth"] == name].melt(["finder", "seed"], list(SHOWN), "score").dropna()
    long["score"] = long["score"].map(SHOWN)
    means = long.groupby(["score", "finder"], sort=False, as_index=False)["value"].mean()
    orders = {"finder": list(long["finder"].unique()), "score": list(long["score"].unique())}
    look = dict(y="finder", x="value", facet_col="score", category_orders=orders, facet_col_spacing=0.02)
    fig = px.scatter(long, **look, width=1300, height=520, title=f"Finders, scored on '{name}'")
    fig.update_traces(marker=dict(size=5, color=COLOURS["random"]), name="a seed")
    diamonds = dict(symbol="diamond", size=9, color=COLOURS["distilled"])
    fig.add_traces(px.scatter(means, **look).update_traces(marker=diamonds, name="mean").data)
    for one in ("a seed", "mean"):
        next(fig.select_traces({"name": one})).showlegend = True
    return plain_titles(fig.update_xaxes(matches=None, title_text="").update_yaxes(title_text=""))
