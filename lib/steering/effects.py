"""What interventions on whole thoughts did (``experiments.run``): changes, shares of a gap, places, each with
an interval; and their figures.

    summary = summarise(rows)      # every measure of every condition, and its change against untouched
    shares = gap_shares(rows)      # how far the writer goes towards the other model
    placed = extra_placed(rows)    # do additional sentences of a category stand where they belong?
    metrics(summary, shares)       # the numbers that README and the notebooks read

All intervals are 95%, of a bootstrap over puzzles with the same resamples for all conditions, so that
differences are paired; a rate is a ratio of sums over puzzles. What has no denominator (P(reflection | error)
without errors) is NaN.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from ..figures import COLOURS
from ..labels import CATEGORIES, REDUNDANT
from ..stats import group_weights, interval

OTHER = {"distilled": "base", "base": "distilled"}
METHODS = ("feature", "amplify", "mean difference", "logit bias", "random")  # of adding more of a category
CONTROLS = ("random", "matched", "matched in traces")  # of ablation; they are pooled over the categories
ONE = "one"  # a denominator: per puzzle
MEASURES = {
    "thinking": ("thinking", ONE),
    "opens": ("thinks", ONE),
    "answers": ("answers", ONE),
    "accuracy": ("correct", ONE),
    "chain": ("chain_correct", ONE),
    "length": ("length", ONE),
    "runaway": ("runaway", ONE),
    "steps": ("steps", ONE),
    "error_rate": ("errors", "steps"),
    "p_reflection_error": ("errors_reflected", "errors"),
    "p_reflection_correct": ("correct_steps_reflected", "correct_steps"),
    **{f"rate_{c}": (f"n_{c}", ONE) for c in (*CATEGORIES, REDUNDANT)},
    **{f"met_{c}": (f"met_{c}", f"calls_{c}") for c in CATEGORIES},
    **{f"strays_{c}": (f"strays_{c}", f"rest_{c}") for c in CATEGORIES},
}
HEAD = ["condition", "family", "kind", "target", "speaker", "mode", "temperature", "strength"]


class _Resampled:
    """Every measure of every condition, in the data (entry 0) and in resamples of the puzzles, the same for
    all conditions.
    """

    def __init__(self, rows: pd.DataFrame, n_boot: int, seed: int):
        n = rows["task"].nunique()
        self.n, self.weights = n, np.concatenate([np.ones((1, n)), group_weights(n, n_boot, seed)])
        self.rows = rows.assign(**{ONE: 1.0})
        columns = sorted({name for pair in MEASURES.values() for name in pair})
        self.heads, self.sums = {}, {}
        for name, group in self.rows.groupby("condition", sort=False):
            self.heads[name] = group.iloc[0][HEAD].to_dict()
            self.sums[name] = dict(
                zip(columns, (self.weights @ group.sort_values("task")[columns].to_numpy(float)).T)
            )

    def draws(self, condition: str, measure: str) -> np.ndarray:
        above, below = (self.sums[condition][name] for name in MEASURES[measure])
        return np.divide(above, below, out=np.full(len(above), np.nan), where=below > 0)

    def untouched(self, head: Mapping, speaker: str | None = None) -> str | None:
        same = {
            "family": "untouched",
            "speaker": speaker or head["speaker"],
            "mode": head["mode"],
            "temperature": head["temperature"],
        }
        return next((name for name, other in self.heads.items() if same.items() <= other.items()), None)


def _interval(draws: np.ndarray) -> tuple[float, float, float]:
    """(value, low, high); NaN where undefined in the data, or in more than half of the resamples."""
    value, defined = float(draws[0]), draws[1:][~np.isnan(draws[1:])]
    if np.isnan(value) or len(defined) <= len(draws) / 2:
        return value, np.nan, np.nan
    return (value, *interval(defined))


def pooled(rows: pd.DataFrame, kind: str, family: str = "ablate") -> pd.DataFrame:
    """The conditions of a kind, over all targets, as one more: each puzzle's sums over them, so that rates
    are pooled ("all").
    """
    mine = rows[(rows["family"] == family) & (rows["kind"] == kind)]
    numbers = [c for c in mine.columns if c not in (*HEAD, "task", "answer")]
    keys = ["family", "kind", "speaker", "mode", "temperature", "task"]
    frame = mine.astype({c: float for c in numbers}).groupby(keys, sort=False)[numbers].mean().reset_index()
    name = (
        frame["family"]
        + " / "
        + frame["kind"]
        + " / pooled / "
        + frame["speaker"]
        + " / "
        + frame["mode"]
        + " / t"
    )
    return frame.assign(
        condition=name + frame["temperature"].map("{:g}".format), target="pooled", strength=np.nan
    )


def summarise(rows: pd.DataFrame, n_boot: int = 1000, seed: int = 0) -> pd.DataFrame:
    """Long table: one row per condition and measure (MEASURES), with 95% intervals of a paired bootstrap over
    puzzles.

    Columns HEAD, measure, value, low, high, change (against the same speaker, mode and temperature,
    untouched), change_low, change_high, n. ``met_c``: P(c follows | the sentence end calls for c);
    ``strays_c``: P(c follows | it does not); ``rate_c``: sentences per puzzle.
    """
    sample, found = _Resampled(rows, n_boot, seed), []
    for name, head in sample.heads.items():
        before = sample.untouched(head)
        for measure in MEASURES:
            after = sample.draws(name, measure)
            change = after - sample.draws(before, measure) if before else np.full(len(after), np.nan)
            found.append(
                {
                    **head,
                    "measure": measure,
                    **dict(zip(("value", "low", "high"), _interval(after))),
                    **dict(zip(("change", "change_low", "change_high"), _interval(change))),
                    "n": sample.n,
                }
            )
    return pd.DataFrame(found)


def gap_shares(
    rows: pd.DataFrame,
    measures: Sequence[str] = ("thinking", "opens", "answers", "length", "p_reflection_error", "accuracy"),
    n_boot: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """Share of the gap between the untouched models that a swap or an imposed use closes: one row per
    condition and measure.

    Columns HEAD, measure, value (of the speaker under the condition), speaker_value, listener_value, share,
    low, high, n. NaN where the gap's interval contains 0 or a rate has no denominator (no errors, no
    P(reflection | error)).
    """
    sample, found = _Resampled(rows, n_boot, seed), []
    for name, head in sample.heads.items():
        mine, other = sample.untouched(head), sample.untouched(head, OTHER[head["speaker"]])
        if head["family"] not in ("swap", "impose") or mine is None or other is None:
            continue
        for measure in measures:
            after, speaker, listener = (sample.draws(x, measure) for x in (name, mine, other))
            gap = listener - speaker
            _, low, high = _interval(gap)
            share = np.divide(after - speaker, gap, out=np.full(len(gap), np.nan), where=gap != 0)
            share = share if low > 0 or high < 0 else np.full(len(gap), np.nan)
            found.append(
                {
                    **head,
                    "measure": measure,
                    "value": after[0],
                    "speaker_value": speaker[0],
                    "listener_value": listener[0],
                    **dict(zip(("share", "low", "high"), _interval(share))),
                    "n": sample.n,
                }
            )
    return pd.DataFrame(found)


def extra_placed(rows: pd.DataFrame, n_boot: int = 1000, seed: int = 0) -> pd.DataFrame:
    """More of a category, at what places? One row per condition of "place".

    Columns HEAD, rate (sentences of the category per puzzle), met, strays (see ``summarise``), advantage =
    met - strays, each with _low and _high; extra (additional sentences per puzzle) and extra_placed: the
    share of them that stand where they belong (NaN unless there are more; it may leave 0 to 1 where sentences
    move). ``chance``: the share of sentence ends that call for it, untouched.
    """
    sample, found = _Resampled(rows, n_boot, seed), []
    for name, head in sample.heads.items():
        if (
            head["family"] not in ("place", "untouched")
            or head["mode"] != "think"
            or head["speaker"] != "distilled"
        ):
            continue
        before = sample.untouched(head)
        for c in CATEGORIES if head["family"] == "untouched" else (head["target"],):
            after, plain = sample.sums[name], sample.sums[before]
            extra = (
                after[f"met_{c}"] + after[f"strays_{c}"] - plain[f"met_{c}"] - plain[f"strays_{c}"]
            ) / sample.weights.sum(1)
            placed = (after[f"met_{c}"] - plain[f"met_{c}"]) / sample.weights.sum(1)
            row = {**head, "target": c}
            drawn = {key: sample.draws(name, f"{key}_{c}") for key in ("rate", "met", "strays")}
            drawn |= {
                "extra": extra,
                "extra_placed": np.divide(placed, extra, out=np.full(len(extra), np.nan), where=extra > 0),
            }
            drawn["advantage"] = drawn["met"] - drawn["strays"]
            for key, draws in drawn.items():
                row |= dict(zip((key, f"{key}_low", f"{key}_high"), _interval(draws)))
            row["chance"] = float(plain[f"calls_{c}"][0] / (plain[f"calls_{c}"][0] + plain[f"rest_{c}"][0]))
            found.append(row)
    return pd.DataFrame(found)


def specificity(
    summary: pd.DataFrame, kind: str = "features", speaker: str = "distilled", temperature: float = 1.0
) -> pd.DataFrame:
    """Features of c removed (rows) x relative change of the rate of c' (columns): -1 is all of them gone."""
    mine = summary[
        (summary["family"] == "ablate")
        & (summary["kind"] == kind)
        & (summary["speaker"] == speaker)
        & (summary["temperature"] == temperature)
    ]
    made = {
        c: {
            other: _relative(mine[(mine["target"] == c) & (mine["measure"] == f"rate_{other}")])
            for other in CATEGORIES
        }
        for c in CATEGORIES
    }
    return pd.DataFrame(made).T.rename_axis(index="removed", columns="rate of")


def _relative(row: pd.DataFrame) -> float:
    if row.empty:
        return np.nan
    value, change = float(row["value"].iloc[0]), float(row["change"].iloc[0])
    return change / (value - change) if value != change else np.nan


def metrics(summary: pd.DataFrame, shares: pd.DataFrame, temperature: float = 1.0) -> dict[str, dict]:
    """{name: {value, ci, n}}: ablate_accuracy_<c>, ablate_accuracy_random, ..._matched, ..._matched_in_traces
    (pooled over categories: ``pooled``; the last for each category too), swap_forward, swap_backward,
    impose_unique, impose_shared, impose_random (the same gains, permuted, on matched features), and others
    beside them.

    Forward is what the distilled model's features do to the base, backward the base's to the distilled model;
    imposed use is forward, ``impose_back_...`` its reverse. Shares are of the thinking rate;
    ``swap_backward_answers`` is of ``answers``: not thinking is not yet answering.
    """
    found = {}

    def add(name: str, frame: pd.DataFrame, column: str, low: str, high: str) -> None:
        if len(frame):
            row = frame.iloc[0]
            defined = np.isfinite(row[column])
            ci = [float(row[low]), float(row[high])] if np.isfinite(row[low]) else None
            found[name] = {
                "value": float(row[column]) if defined else None,
                "ci": ci if defined else None,
                "n": int(row["n"]),
            }

    ablated = summary[
        (summary["family"] == "ablate")
        & (summary["measure"] == "accuracy")
        & (summary["speaker"] == "distilled")
        & (summary["temperature"] == temperature)
    ]
    for name, kind, target in [
        *((f"ablate_accuracy_{c}", "features", c) for c in CATEGORIES),
        *((f"ablate_accuracy_{kind.replace(' ', '_')}", kind, "pooled") for kind in CONTROLS),
        *((f"ablate_accuracy_matched_in_traces_{c}", "matched in traces", c) for c in CATEGORIES),
    ]:
        add(
            name,
            ablated[(ablated["kind"] == kind) & (ablated["target"] == target)],
            "change",
            "change_low",
            "change_high",
        )
    free, forward, back = shares[shares["mode"] == "free"], "base", "distilled"
    wanted = [
        ("swap_forward", forward, "swap", "swap", "all"),
        ("swap_forward_joint", forward, "swap", "joint", "all"),
        ("swap_forward_unique", forward, "swap", "swap", "unique"),
        ("swap_forward_random", forward, "swap", "random", "all"),
        ("swap_forward_transplant", forward, "swap", "transplant", "all"),
    ]
    wanted += [(name.replace("forward", "backward"), back, *rest) for name, _, *rest in wanted]
    for prefix, speaker in (("impose", forward), ("impose_back", back)):
        wanted += [
            (f"{prefix}_{name}", speaker, "impose", kind, target)
            for name, kind, target in (
                ("unique", "gain", "unique"),
                ("shared", "gain", "reweighted"),
                ("both", "gain", "both"),
                ("random", "matched", "both"),
            )
        ]
    for name, speaker, *what in wanted:
        chosen = free[(free["speaker"] == speaker) & (free[["family", "kind", "target"]] == what).all(axis=1)]
        add(name, chosen[chosen["measure"] == "thinking"], "share", "low", "high")
        if name == "swap_backward":
            add("swap_backward_answers", chosen[chosen["measure"] == "answers"], "share", "low", "high")
    return found


# --- figures ------------------------------------------------------------------------------------------------


def plot_ablations(
    summary: pd.DataFrame, measure: str = "accuracy", speaker: str = "distilled", temperature: float = 1.0
) -> go.Figure:
    """Change of a measure when each category's features are removed (in the category's colour), and under
    each control (grey).
    """
    mine = summary[
        (summary["family"] == "ablate")
        & (summary["measure"] == measure)
        & (summary["speaker"] == speaker)
        & (summary["temperature"] == temperature)
        & summary["target"].isin(CATEGORIES)
    ]
    fig = go.Figure()
    for i, kind in enumerate(mine["kind"].unique()):
        part = mine[mine["kind"] == kind]
        grey = COLOURS["random"] if kind == "random" else COLOURS["null"]
        colour = [COLOURS[c] for c in part["target"]] if kind == "features" else grey
        fig.add_bar(
            x=part["target"],
            y=part["change"],
            name=kind,
            marker_color=colour,
            marker_pattern_shape=("", "/", ".", "", "\\", "x", "-", "+")[i % 8],
            error_y=dict(
                array=part["change_high"] - part["change"], arrayminus=part["change"] - part["change_low"]
            ),
        )
    how = "greedy" if temperature == 0 else f"temperature {temperature:g}"
    return fig.update_layout(
        barmode="group",
        title=f"Features removed while the {speaker} model thinks ({how})",
        width=1000,
        yaxis_title=f"change of {measure}",
        xaxis_title="features of",
    )


def plot_specificity(matrix: pd.DataFrame) -> go.Figure:
    """Heatmap of ``specificity``; a diagonal that is darker than the rest says that each set carries its own
    category.
    """
    limit = max(1.0, float(np.nanmax(np.abs(matrix.to_numpy()))))
    fig = go.Figure(
        go.Heatmap(
            z=matrix.to_numpy(),
            x=list(matrix.columns),
            y=list(matrix.index),
            zmin=-limit,
            zmax=limit,
            colorscale="RdBu",
            texttemplate="%{z:.2f}",
            colorbar_title="relative<br>change",
        )
    )
    fig.update_yaxes(autorange="reversed", title_text="features removed of")
    return fig.update_layout(
        title="Which sentences go with which features?", xaxis_title="rate of", width=620, height=480
    )


def plot_gap_shares(
    shares: pd.DataFrame, family: str, measure: str = "thinking", mode: str = "free"
) -> go.Figure:
    """Share of the gap that each condition of ``family`` closes, both directions side by side; 1 is the whole
    way.
    """
    mine = shares[(shares["family"] == family) & (shares["measure"] == measure) & (shares["mode"] == mode)]
    fig = go.Figure()
    for speaker, part in mine.groupby("speaker", sort=False):
        fig.add_bar(
            x=part["kind"] + ": " + part["target"],
            y=part["share"],
            name=f"{speaker} speaks",
            marker_color=COLOURS[speaker],
            error_y=dict(array=part["high"] - part["share"], arrayminus=part["share"] - part["low"]),
        )
    fig.add_hline(y=1, line_dash="dot", line_color=COLOURS["random"])
    title = f"How much of the gap in {measure} follows?"
    return fig.update_layout(barmode="group", width=1000, title=title, yaxis_title="share of the gap")


def plot_placement(table: pd.DataFrame, temperature: float = 1.0) -> go.Figure:
    """``extra_placed``: P(c | called for) against P(c | not), a panel per category, a point per method; up
    and left is where markers belong."""
    table = table[np.isclose(table["temperature"].astype(float), temperature)]
    symbols = dict(zip(("untouched", *METHODS), ("star", "circle", "diamond", "square", "x", "cross")))
    fig = make_subplots(2, 2, subplot_titles=CATEGORIES, horizontal_spacing=0.09, vertical_spacing=0.13)
    for i, c in enumerate(CATEGORIES):
        for part in table[table["target"] == c].itertuples():
            fig.add_scatter(
                x=[part.strays],
                y=[part.met],
                name=part.kind,
                legendgroup=part.kind,
                showlegend=i == 0,
                mode="markers",
                marker=dict(
                    color=COLOURS[c], size=11, symbol=symbols[part.kind], line=dict(width=1, color="#222222")
                ),
                error_x=dict(
                    array=[part.strays_high - part.strays], arrayminus=[part.strays - part.strays_low]
                ),
                error_y=dict(array=[part.met_high - part.met], arrayminus=[part.met - part.met_low]),
                row=i // 2 + 1,
                col=i % 2 + 1,
            )
    fig.update_xaxes(title_text="P(c follows | not called for)", row=2).update_yaxes(
        title_text="P(c follows | called for)", col=1
    )
    return fig.update_layout(
        title="More of a category: where it belongs, or anywhere?", width=1000, height=720
    )
