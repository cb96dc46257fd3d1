"""What the scores of finders say: the best one of each truth, who beats the crosscoder by NRN, and
figures."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
import plotly.express as px
import plotly.graph_objects as go

from ..figures import COLOURS, SCALE, plain_titles
from ..results import Part, interval_text
from ..stats import t_interval
from ..study.variants import metric
from .finder import FINDERS
from .truths import truth

NRN, NU = "BatchTopK crosscoder, NRN", "BatchTopK crosscoder, latent scaling"
DIFFERENCE, MEANS = "diff-SAE", "mean difference before behaviours"
CONTROL = "random features"  # no finder
DECIDING = ("planted", "control", "tiny")  # truths on which a finder must beat NRN to be shown beside it
SHOWN = {  # score: what the figure says of it
    "precision": "precision",
    "recall": "recall",
    "calibration": "calibration error",
    "recurrence": "recurrence over seeds",
    "null_claims": "sure claims on the null",
    "necessity": "necessity, nats per norm",
    "sufficiency": "sufficiency, nats per norm",
}


def named(scores: pd.DataFrame) -> dict[str, dict]:
    """finders, truths; for each truth t best_precision_<t>, best_recall_<t>, null_claims_<t>, and
    necessity_<t>, sufficiency_<t> where there are models: of the finder with the highest F1 of the first
    seed, over the other seeds; the same with nrn_ in front for the crosscoder by NRN, over the same seeds."""
    entered = scores[scores["finder"] != CONTROL]
    metrics = {"finders": metric(entered["finder"].nunique()), "truths": metric(scores["truth"].nunique())}
    for name, group in entered.groupby("truth", sort=False):
        for finder, nrn in ((best(group), ""), (NRN, "nrn_")):
            own = group[group["finder"] == finder]
            later = own[own["seed"] > 0] if len(own) > 1 else own
            for score_name in ("precision", "recall", "necessity", "sufficiency", "null_claims"):
                values = (own if score_name == "null_claims" else later)[score_name].dropna()
                if len(values) or score_name in ("precision", "recall", "null_claims"):
                    front = nrn if nrn or score_name == "null_claims" else "best_"
                    ci = t_interval(values) if len(values) > 1 else None
                    metrics[f"{front}{score_name}_{name}"] = metric(values.mean(), ci, len(values))
    return metrics


def best(group: pd.DataFrame) -> str:
    """The finder with the highest F1 of the first seed, of the scores at one truth."""
    first = group[(group["seed"] == 0) & (group["finder"] != CONTROL)]
    return first.set_index("finder")["f1"].idxmax()


def beats(scores: pd.DataFrame, reference: str = NRN) -> pd.DataFrame:
    """F1 of each finder minus that of the reference, seed by seed: truth, finder, gain, low, high (95%, over
    seeds), beats (low above 0)."""
    rows = []
    for (name, finder), part in scores.groupby(["truth", "finder"], sort=False):
        other = scores[(scores["truth"] == name) & (scores["finder"] == reference)].set_index("seed")["f1"]
        own = part.set_index("seed")["f1"]
        gain = own - other if len(own) > 1 else own.iloc[0] - other
        if finder != reference:
            low, high = t_interval(gain)
            rows.append((name, finder, gain.mean(), low, high, bool(low > 0)))
    return pd.DataFrame(rows, columns=["truth", "finder", "gain", "low", "high", "beats"])


def winners(gains: pd.DataFrame) -> list[str]:
    """The finders that beat the crosscoder by NRN on all truths of DECIDING."""
    decided = gains[gains["truth"].isin(DECIDING) & gains["beats"] & (gains["finder"] != CONTROL)]
    counts = decided.groupby("finder", sort=False)["truth"].nunique()
    return list(counts.index[counts == len(DECIDING)])


def shows(part: Part) -> str:
    """For each truth the best finder beside the crosscoder by NRN, in words."""
    lines, say = [], lambda name: interval_text(part.metrics[name])
    for name, group in part.tables["scores"].groupby("truth", sort=False):
        lines.append(
            f"*{name}*: {best(group)}, precision {say(f'best_precision_{name}')}, recall"
            f" {say(f'best_recall_{name}')} (by NRN {say(f'nrn_precision_{name}')} and"
            f" {say(f'nrn_recall_{name}')})"
        )
    return "Best finder of each truth: " + "; ".join(lines) + "."


def listed(names: Sequence[str]) -> str:
    return ", ".join(names) or "no finder"


def decided(scores: pd.DataFrame, gains: pd.DataFrame) -> dict[str, tuple[str, bool | None]]:
    """What was observed of notebook 17's predictions, and whether they held; None where an interval leaves it
    open, or a truth was not computed."""
    means = scores.groupby(["truth", "finder"], sort=False).mean(numeric_only=True)
    there, at = set(scores["truth"]), gains.set_index(["truth", "finder"])
    missing = ("not computed", None)

    def gain(name: str, finder: str) -> tuple[str, bool | None]:
        row = at.loc[(name, finder)]
        text = f"{name} {row.gain:.2f} [{row.low:.2f}, {row.high:.2f}]"
        return text, True if row.low > 0 else False if row.high < 0 else None

    held = {"difference": gain("planted", DIFFERENCE) if "planted" in there else missing}
    some = [gain(name, NU) for name in ("planted", "easy", "rare") if name in there]
    at_least = None if any(yes is None for _, yes in some) else all(yes for _, yes in some)
    held["latent scaling"] = ("; ".join(text for text, _ in some), at_least) if len(some) == 3 else missing
    held["rare"] = missing
    if "rarest" in there:
        recall = means.loc["rarest", "recall"]
        held["rare"] = f"at most {recall.max():.2f} ({recall.idxmax()})", bool(recall.max() < 0.5)
    sure = means["null_claims"].unstack("finder")[[NRN, DIFFERENCE]].dropna()
    text = "; ".join(f"{name} {a:.1f} and {b:.1f}" for name, a, b in sure.itertuples())
    held["null"] = (text, bool((sure[NRN] < sure[DIFFERENCE]).all())) if len(sure) == len(there) else missing
    held["means"] = missing
    if "tiny" in there:
        needed = means.loc["tiny", "necessity"].dropna().nlargest(2)
        held["means"] = "; ".join(f"{f} {v:.2f}" for f, v in needed.items()), needed.index[0] == MEANS
    held["one winner"] = listed(winners(gains)), bool(winners(gains))
    if not there.issuperset(DECIDING):
        held["one winner"] = missing
    return held


def finders_table() -> pd.DataFrame:
    """finder, what it does, whether it needs a text with labels."""
    rows = [(f.name, f.about, "yes" if f.labels else "") for f in FINDERS.values()]
    return pd.DataFrame(rows, columns=["finder", "what it does", "needs labels"])


def truths_table(names: Sequence[str]) -> pd.DataFrame:
    """truth, what is true there, how many claims of a finder are judged."""
    rows = [(one.name, one.about, one.claims) for one in map(truth, names)]
    return pd.DataFrame(rows, columns=["truth", "what is to be found", "claims judged"])


def plot_f1(summary: pd.DataFrame) -> go.Figure:
    """Mean F1 by finder and truth; empty where a finder cannot be asked."""
    wide = summary.pivot(index="finder", columns="truth", values="f1")
    wide = wide.loc[summary["finder"].unique()[::-1], summary["truth"].unique()]
    fig = px.imshow(
        wide, zmin=0, zmax=1, text_auto=".2f", aspect="auto", color_continuous_scale=SCALE, width=900,
        height=560, title="F1 of finders, where the truth is known", labels={"color": "F1"},
    )  # fmt: skip
    return fig.update_yaxes(title_text="").update_xaxes(title_text="")


def plot(scores: pd.DataFrame, name: str) -> go.Figure:
    """The scores of all finders at one truth: grey points are seeds, diamonds their means."""
    group = scores[scores["truth"] == name]
    long = group.melt(["finder", "seed"], list(SHOWN), "score").dropna()
    long["score"] = long["score"].map(SHOWN)
    means = long.groupby(["score", "finder"], sort=False, as_index=False)["value"].mean()
    kinds = [label for label in SHOWN.values() if label in set(long["score"])]
    orders = {"finder": list(group["finder"].unique()), "score": kinds}
    look = dict(y="finder", x="value", facet_col="score", category_orders=orders)
    fig = px.scatter(
        long, **look, width=1300, height=520, facet_col_spacing=0.02, title=f"Finders on the truth {name}"
    ).update_traces(marker=dict(size=5, color=COLOURS["random"]))
    diamonds = px.scatter(means, **look)
    fig.add_traces(
        diamonds.update_traces(marker=dict(symbol="diamond", size=9, color=COLOURS["distilled"])).data
    )
    return plain_titles(fig.update_xaxes(matches=None, title_text="").update_yaxes(title_text=""))
