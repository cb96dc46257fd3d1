"""What interventions on whole thoughts did (``experiments.run``): changes against untouched (``summarise``),
shares of a gap (``gap_shares``), places (``extra_placed``), and their figures.

All intervals are 95%, of a bootstrap over puzzles with the same resamples for all conditions, so that
differences are paired; a rate is a ratio of sums over puzzles. What has no denominator (P(reflection | error)
without errors) is NaN. In the tables the model that writes is called ``speaker``, the other one ``listener``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import plotly.express as px
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from ..figures import COLOURS, error_bars, express_bars
from ..labels import CATEGORIES, REDUNDANT
from ..stats import group_weights, interval

OTHER = {"distilled": "base", "base": "distilled"}
METHODS = ("feature", "amplify", "mean difference", "logit bias", "random")  # of adding more of a category
CONTROLS = ("random", "matched", "matched in traces")  # of ablation; they are pooled over the categories
ONE = "one"  # a denominator: per puzzle
MEASURES = {  # name: (sum over puzzles, sum that it is divided by)
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
SWAPS = {  # end of a metric's name: kind and target
    "": ("swap", "all"),
    "_joint": ("joint", "all"),
    "_unique": ("swap", "unique"),
    "_random": ("random", "all"),
    "_transplant": ("transplant", "all"),
}
USES = {
    "_unique": ("gain", "unique"),
    "_shared": ("gain", "reweighted"),
    "_both": ("gain", "both"),
    "_random": ("matched", "both"),
}


def _where(table: pd.DataFrame, **wanted) -> pd.DataFrame:
    """The rows whose columns have the wanted values."""
    return table[(table[list(wanted)] == list(wanted.values())).all(axis=1)]


def _ratio(above: np.ndarray, below: np.ndarray, defined: np.ndarray) -> np.ndarray:
    return np.divide(above, below, out=np.full(len(above), np.nan), where=defined)


class _Resampled:
    """Every measure of every condition, in the data (entry 0) and in resamples of the puzzles, the same for
    all conditions."""

    def __init__(self, rows: pd.DataFrame, n_boot: int, seed: int):
        self.n = rows["task"].nunique()
        weights = np.concatenate([np.ones((1, self.n)), group_weights(self.n, n_boot, seed)])
        columns = sorted({name for pair in MEASURES.values() for name in pair})
        self.heads, self.sums = {}, {}
        for name, group in rows.assign(**{ONE: 1.0}).groupby("condition", sort=False):
            self.heads[name] = group.iloc[0][HEAD].to_dict()
            sums = weights @ group.sort_values("task")[columns].to_numpy(float)
            self.sums[name] = dict(zip(columns, sums.T))

    def draws(self, condition: str, measure: str) -> np.ndarray:
        above, below = (self.sums[condition][name] for name in MEASURES[measure])
        return _ratio(above, below, below > 0)

    def untouched(self, head: Mapping, writer: str | None = None) -> str | None:
        """The name of the untouched condition beside this one, of another writer if one is given."""
        same = {"family": "untouched", "speaker": writer or head["speaker"]}
        same |= {name: head[name] for name in ("mode", "temperature")}
        return next((name for name, other in self.heads.items() if same.items() <= other.items()), None)


def _bounds(draws: np.ndarray, value: str, low: str = "", high: str = "") -> dict[str, float]:
    """Value and interval under these names; NaN where undefined in the data, or in more than half of the
    resamples."""
    defined, ends = draws[1:][~np.isnan(draws[1:])], (np.nan, np.nan)
    if not np.isnan(draws[0]) and len(defined) > len(draws) / 2:
        ends = interval(defined)
    return {value: float(draws[0]), low or f"{value}_low": ends[0], high or f"{value}_high": ends[1]}


def pooled(rows: pd.DataFrame, kind: str) -> pd.DataFrame:
    """The ablations of a kind, over all targets, as one more condition: each puzzle's means over them, so
    that rates are pooled ("all")."""
    chosen = _where(rows, family="ablate", kind=kind)
    numbers = [c for c in chosen.columns if c not in (*HEAD, "task", "answer")]
    keys = ["family", "kind", "speaker", "mode", "temperature", "task"]
    frame = chosen.astype(dict.fromkeys(numbers, float)).groupby(keys, sort=False)[numbers].mean()
    frame = frame.reset_index()
    name = f"ablate / {kind} / pooled / " + frame["speaker"] + " / " + frame["mode"] + " / t"
    name += frame["temperature"].map("{:g}".format)
    return frame.assign(condition=name, target="pooled", strength=np.nan)


def summarise(rows: pd.DataFrame, n_boot: int = 1000, seed: int = 0) -> pd.DataFrame:
    """One row per condition and measure (MEASURES), with 95% intervals of a paired bootstrap over puzzles.

    Columns HEAD, measure, value, low, high, change (against the same writer, mode and temperature,
    untouched), change_low, change_high, n. ``met_c``: P(c follows | the sentence end calls for c);
    ``strays_c``: P(c follows | it does not); ``rate_c``: sentences per puzzle.
    """
    sample, found = _Resampled(rows, n_boot, seed), []
    for name, head in sample.heads.items():
        before = sample.untouched(head)
        for measure in MEASURES:
            after = sample.draws(name, measure)
            change = after - sample.draws(before, measure) if before else np.full(len(after), np.nan)
            bounds = _bounds(after, "value", "low", "high") | _bounds(change, "change")
            found.append({**head, "measure": measure, **bounds, "n": sample.n})
    return pd.DataFrame(found)


def gap_shares(
    rows: pd.DataFrame,
    measures: Sequence[str] = ("thinking", "opens", "answers", "length", "p_reflection_error", "accuracy"),
    n_boot: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """Share of the gap between the untouched models that a swap or an imposed use closes: one row per
    condition and measure.

    Columns HEAD, measure, value (of the writer under the condition), speaker_value, listener_value, share,
    low, high, n. NaN where the gap's interval contains 0 or a rate has no denominator.
    """
    sample, found = _Resampled(rows, n_boot, seed), []
    for name, head in sample.heads.items():
        own, other = sample.untouched(head), sample.untouched(head, OTHER[head["speaker"]])
        if head["family"] not in ("swap", "impose") or own is None or other is None:
            continue
        for measure in measures:
            after, writer, reader = (sample.draws(x, measure) for x in (name, own, other))
            gap = _bounds(reader - writer, "gap")
            known = gap["gap_low"] > 0 or gap["gap_high"] < 0
            share = _ratio(after - writer, reader - writer, known & (reader != writer))
            values = {"value": after[0], "speaker_value": writer[0], "listener_value": reader[0]}
            values |= _bounds(share, "share", "low", "high")
            found.append({**head, "measure": measure, **values, "n": sample.n})
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
        if (head["mode"], head["speaker"]) != ("think", "distilled"):
            continue
        targets = {"untouched": CATEGORIES, "place": (head["target"],)}.get(head["family"], ())
        for c in targets:
            after, plain = sample.sums[name], sample.sums[sample.untouched(head)]
            placed, elsewhere = (after[f"{key}_{c}"] - plain[f"{key}_{c}"] for key in ("met", "strays"))
            extra = placed + elsewhere
            drawn = {key: sample.draws(name, f"{key}_{c}") for key in ("rate", "met", "strays")}
            drawn |= {"extra": extra / sample.n, "extra_placed": _ratio(placed, extra, extra > 0)}
            drawn["advantage"] = drawn["met"] - drawn["strays"]
            row = {**head, "target": c}
            for key, draws in drawn.items():
                row |= _bounds(draws, key)
            calls, rest = plain[f"calls_{c}"][0], plain[f"rest_{c}"][0]
            found.append({**row, "chance": float(calls / (calls + rest))})
    return pd.DataFrame(found)


def specificity(summary: pd.DataFrame) -> pd.DataFrame:
    """Features of c removed (rows) x relative change of the rate of c' (columns), in the distilled model at
    temperature 1: -1 is all of them gone."""
    ablated = _where(summary, family="ablate", kind="features", speaker="distilled", temperature=1.0)
    before = ablated["value"] - ablated["change"]
    relative = ablated.assign(relative=ablated["change"] / before.where(before != 0))
    table = relative.pivot_table("relative", "target", "measure", aggfunc="first")
    table = table.reindex(index=CATEGORIES, columns=[f"rate_{c}" for c in CATEGORIES])
    return table.set_axis(CATEGORIES, axis=1).rename_axis(index="removed", columns="rate of")


def metrics(summary: pd.DataFrame, shares: pd.DataFrame) -> dict[str, dict]:
    """{name: {value, ci, n}}: ablate_accuracy_<c>, ablate_accuracy_random, ..._matched, ..._matched_in_traces
    (pooled over categories: ``pooled``; the last for each category too), swap_forward, swap_backward,
    impose_unique, impose_shared, impose_random (the same gains, permuted, on matched features), and others
    beside them; at temperature 1.

    Forward is what the distilled model's features do to the base, backward the base's to the distilled model;
    imposed use is forward, ``impose_back_...`` its reverse. Shares are of the thinking rate;
    ``swap_backward_answers`` is of ``answers``: not thinking is not yet answering.
    """
    found = {}

    def add(name: str, rows: pd.DataFrame, column: str, low: str, high: str) -> None:
        for row in rows.head(1).to_dict("records"):
            known = np.isfinite(row[column])
            ci = [float(row[low]), float(row[high])] if known and np.isfinite(row[low]) else None
            found[name] = {"value": float(row[column]) if known else None, "ci": ci, "n": int(row["n"])}

    cost = _where(summary, family="ablate", measure="accuracy", speaker="distilled", temperature=1.0)
    ablated = {c: ("features", c) for c in CATEGORIES}
    ablated |= {kind.replace(" ", "_"): (kind, "pooled") for kind in CONTROLS}
    ablated |= {f"matched_in_traces_{c}": ("matched in traces", c) for c in CATEGORIES}
    for name, (kind, target) in ablated.items():
        rows = _where(cost, kind=kind, target=target)
        add(f"ablate_accuracy_{name}", rows, "change", "change_low", "change_high")
    for prefix, writer, kinds in (
        ("swap_forward", "base", SWAPS),
        ("swap_backward", "distilled", SWAPS),
        ("impose", "base", USES),
        ("impose_back", "distilled", USES),
    ):
        free = _where(shares, mode="free", speaker=writer, family=prefix.split("_")[0])
        for end, (kind, target) in kinds.items():
            chosen = _where(free, kind=kind, target=target)
            add(prefix + end, _where(chosen, measure="thinking"), "share", "low", "high")
            if prefix + end == "swap_backward":
                add("swap_backward_answers", _where(chosen, measure="answers"), "share", "low", "high")
    return found


# --- figures ------------------------------------------------------------------------------------------------


def plot_ablations(
    summary: pd.DataFrame, measure: str = "accuracy", writer: str = "distilled", temperature: float = 1.0
) -> go.Figure:
    """Change of a measure when each category's features are removed (in the category's colour), and under
    each control (grey)."""
    rows = _where(summary, family="ablate", measure=measure, speaker=writer, temperature=temperature)
    fig, patterns = go.Figure(), ("", "/", ".", "", "\\", "x", "-", "+")
    for i, (kind, part) in enumerate(rows[rows["target"].isin(CATEGORIES)].groupby("kind", sort=False)):
        grey = COLOURS["random"] if kind == "random" else COLOURS["null"]
        colour = [COLOURS[c] for c in part["target"]] if kind == "features" else grey
        look = dict(name=kind, marker_color=colour, marker_pattern_shape=patterns[i % len(patterns)])
        fig.add_bar(x=part["target"], y=part["change"], error_y=error_bars(part, "change"), **look)
    how = "greedy" if temperature == 0 else f"temperature {temperature:g}"
    title = f"Features removed while the {writer} model thinks ({how})"
    fig.update_yaxes(title_text=f"change of {measure}").update_xaxes(title_text="features of")
    return fig.update_layout(barmode="group", title=title, width=1000)


def plot_specificity(matrix: pd.DataFrame) -> go.Figure:
    """Heatmap of ``specificity``; a diagonal that is darker than the rest says that each set carries its own
    category."""
    limit, table = max(1.0, float(np.nanmax(np.abs(matrix.to_numpy())))), matrix.astype(float)
    fig = px.imshow(
        table, text_auto=".2f", zmin=-limit, zmax=limit, color_continuous_scale="RdBu", aspect="auto",
        labels={"x": "rate of", "y": "features removed of", "color": "relative<br>change"},
        title="Which sentences go with which features?", width=620, height=480,
    )  # fmt: skip
    return fig


def plot_gap_shares(shares: pd.DataFrame, family: str) -> go.Figure:
    """Share of the gap in thinking rate that each condition of ``family`` closes, both directions side by
    side; 1 is the whole way."""
    rows = _where(shares, family=family, measure="thinking", mode="free")
    rows = rows.assign(condition=rows["kind"] + ": " + rows["target"], writer=rows["speaker"] + " writes")
    fig = px.bar(
        rows, x="condition", y="share", color="writer", barmode="group", width=1000,
        color_discrete_map={f"{name} writes": COLOURS[name] for name in OTHER},
        title="How much of the gap in thinking follows?",
        labels={"condition": "", "share": "share of the gap", "writer": ""},
        **express_bars(rows, "share", "low", "high"),
    )  # fmt: skip
    return fig.add_hline(y=1, line_dash="dot", line_color=COLOURS["random"])


def plot_placement(table: pd.DataFrame, temperature: float = 1.0) -> go.Figure:
    """``extra_placed``: P(c | called for) against P(c | not), a panel per category, a point per method; up
    and left is where markers belong."""
    table = table[np.isclose(table["temperature"].astype(float), temperature)]
    symbols = dict(zip(("untouched", *METHODS), ("star", "circle", "diamond", "square", "x", "cross")))
    fig = make_subplots(2, 2, subplot_titles=CATEGORIES, horizontal_spacing=0.09, vertical_spacing=0.13)
    for (c, kind), part in table.groupby(["target", "kind"], sort=False):
        panel = CATEGORIES.index(c)
        fig.add_scatter(
            x=part["strays"],
            y=part["met"],
            name=kind,
            legendgroup=kind,
            showlegend=panel == 0,
            mode="markers",
            marker=dict(color=COLOURS[c], size=11, symbol=symbols[kind], line=dict(width=1, color="#222222")),
            error_x=error_bars(part, "strays"),
            error_y=error_bars(part, "met"),
            row=panel // 2 + 1,
            col=panel % 2 + 1,
        )
    fig.update_xaxes(title_text="P(c follows | not called for)", row=2)
    fig.update_yaxes(title_text="P(c follows | called for)", col=1)
    title = "More of a category: where it belongs, or anywhere?"
    return fig.update_layout(title=title, width=1000, height=720)
