"""The results of several pairs against their size: one table, what three sizes can show, and figures.

    table, crosscoders, thoughts = collect(pairs, "default", puzzles=300)
    line = series(table, "nrn_mean")    # one row per pair, by size: parameters, value, low, high, n, over
    order(line)                         # ("rises", "falls" or "mixed", are steps larger than intervals?)

Three sizes have six orders, all equally likely where size does not matter: so three points in rising order
are weak evidence, before anything else differs between the pairs; and something always does. No interval here
is over training a pair again: every size is one pair.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from ..distil import trials
from ..figures import COLOURS, error_bars
from ..labels import CATEGORIES
from ..models.pairs import Pair, load_pair
from ..results import Results, read_part, read_results
from ..runs import Run, fingerprint
from ..settings import ROOT, UserError
from ..stats import bootstrap, difference, pooled, wilson
from ..text.corpus import TEACHERS

PARTS = ("nulls", "seeds", "similarity")  # of the study, that are read
QUANTILES = (0.01, 0.5, 0.99)  # of NRN
OF_CROSSCODERS = {  # quantity: (model beside the base, column of ``uniqueness``)
    "nrn_mean": ("distilled", "nrn_mean"),
    "unique_above_null": ("distilled", "unique"),
    "unique_above_null_null_b": ("null_b", "unique"),
}
CHANGES = {  # of the geometry of words: quantity, metric of notebook 05
    "parallelogram_difference": "parallelogram_change",
    "parallelogram_relative_difference": "parallelogram_relative_change",
    "offset_unexplained_difference": "offset_unexplained_change",
}
READ = {  # quantity: (notebook, metric, what its interval is over)
    **{name: ("02", name, "documents") for name in ("fve_base", "fve_distilled", "l0", "dead_fraction")},
    **{
        quantity + end: ("05", f"{metric}_{model}", "words")
        for quantity, metric in CHANGES.items()
        for model, end in (("distilled", ""), ("null_a", "_null_a"))
    },
    **{f"parallelogram_{m}": ("05", f"parallelogram_{m}", "words") for m in ("base", "distilled", "null_a")},
    "length_ratio": ("04", "overthink_length_ratio", "puzzles"),
    "steered_accuracy_change": ("04", "overthink_accuracy_change", "puzzles"),
    "random_length_ratio": ("04", "random_length_ratio", "puzzles"),
}
SYMBOLS = ("circle", "diamond", "square", "triangle-up", "triangle-down", "star")  # of curves
SHOWN = {
    "parameters": "parameters (log scale)",
    "gain": "gain from distillation (accuracy)",
    "reflect_auc": "AUROC of reflection for errors",
}


# --- collecting ---------------------------------------------------------------------------------------------


def collect(
    pairs: Sequence[str], run: str, puzzles: int, folder: Path, seed: int = 0, root: Path = ROOT
) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """(table, crosscoders, thoughts) of several pairs: ``table`` one row per pair and quantity (pair,
    quantity, value, low, high, n, over), ``crosscoders`` one per crosscoder (``uniqueness``), ``thoughts``
    one per puzzle of a distilled model (``trials.transcript_table``).

    ``folder`` keeps transcripts. UserError names a pair for which notebooks 02, 05 and 10 have not run, or
    ran before a run had several crosscoders; without 04 its quantities are left out.
    """
    tables, crosscoders, thoughts = [], [], []
    for name in pairs:
        numbers, own = measured(Run(name, run, root))
        gates, solved = ask(load_pair(name), puzzles, folder / name, seed)
        columns = ["pair", "quantity", "value", "low", "high", "n", "over"]
        tables.append(pd.DataFrame([*gates, *numbers]).assign(pair=name)[columns])
        crosscoders.append(own.assign(pair=name))
        thoughts.append(solved.assign(pair=name))
    return tuple(pd.concat(frames, ignore_index=True) for frames in (tables, crosscoders, thoughts))


def measured(run: Run) -> tuple[list[dict], pd.DataFrame]:
    """Rows of numbers that the notebooks of one pair wrote, and its crosscoders (``uniqueness``)."""
    parts = [read_part(run, part) for part in PARTS]
    if not all(parts):
        raise UserError(
            f"{run.pair} has no results to compare: run make figures PAIR={run.pair}, then make study"
            f" PAIR={run.pair} ONLY=10"
        )
    nulls, seeds, similarity = (part.tables for part in parts)
    if "seed" not in nulls["thresholds"]:
        raise UserError(
            f"what was computed of {run.pair} is from before a run had several crosscoders, and cannot be"
            f" compared with other pairs: run make figures PAIR={run.pair}, then make study PAIR={run.pair}"
            " ONLY=10"
        )
    own = uniqueness(nulls)
    rows = over_seeds(own)
    for c in CATEGORIES:  # AUROC of the best feature of each category
        rows.append(_over_seeds(f"auroc_{c}", seeds["by_seed"][f"auroc_{c}"].dropna()))
    return [*rows, *_read(run), *_similarity(similarity["similarity"])], own


def ask(pair: Pair, n: int, folder: Path, seed: int = 0) -> tuple[list[dict], pd.DataFrame]:
    """How well distillation worked: rows of numbers, and the distilled model's thoughts on ``n`` puzzles.

    ``gain`` is thinking (every step right) minus the base's direct answers, puzzle by puzzle. P(reflection)
    is read on a third of the puzzles, after every step of the teacher's traces.
    """
    models, tasks = {name: pair.load(name) for name in ("base", "distilled")}, trials.puzzles(n, "test", seed)
    conditions = [trials.Condition("base", "direct"), trials.Condition("distilled")]
    weights = fingerprint(n, seed, *(pair.fingerprint(name) for name in models))
    answers = trials.battery(models, pair.tokenizer(), tasks, conditions, folder, weights, seed)
    direct, thought = (answers[condition] for condition in conditions)
    base, rows = models["base"], []

    def add(quantity: str, value: float, ci=None, n: int | None = None, over: str = "puzzles") -> None:
        rows.append(_row(quantity, value, ci, n, over))

    add("parameters", sum(p.numel() for p in base.parameters()), over="")
    add("width", base.config.hidden_size, over="")
    right = {"acc_base_direct": direct["correct"], "acc_distilled_think": thought["chain_correct"]}
    for name, hits in right.items():
        add(name, hits.mean(), wilson(int(hits.sum()), n), n)
    gain = thought["chain_correct"].astype(float) - direct["correct"].astype(float)
    add("gain", gain.mean(), bootstrap(gain, seed=seed), n)
    some = tasks[: max(1, n // 3)]
    teacher = TEACHERS[pair.corpus]
    steps = trials.reflection_probability(models["distilled"], pair.tokenizer(), some, seed, teacher)
    for name, wrong in (("p_reflect_given_error", True), ("p_reflect_given_correct", False)):
        part = steps[steps["error"] == wrong]
        interval = bootstrap(part["p_reflection"], groups=part["task"], seed=seed)
        add(name, part["p_reflection"].mean(), interval, len(part))
    values = steps[["error", "p_reflection"]].to_numpy(float)
    add("reflect_auc", _auroc(values), bootstrap(values, _auroc, steps["task"], 200, seed), len(steps))
    return rows, thought


def _auroc(rows: np.ndarray) -> float:
    """Of rows [n, 2]: is an error, probability of a reflection."""
    from sklearn.metrics import roc_auc_score

    return float(roc_auc_score(rows[:, 0], rows[:, 1])) if 0 < rows[:, 0].sum() < len(rows) else float("nan")


def uniqueness(nulls: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """One row per crosscoder of a pair and of its nulls, from the tables of the part "nulls": other (the
    model beside the base), seed, alive; for p = 1 and (``_p2``) p = 2 nrn_mean and nrn_sd over alive
    features, threshold (the null's 1%), unique (features above it; _low and _high: above the ends of its
    interval) and share (of the alive ones); nrn_q01, nrn_q50, nrn_q99."""
    limits = nulls["thresholds"].set_index(["seed", "score", "side", "level"])
    rows = []
    every = pd.concat([nulls["scores"], nulls["null_scores"]], ignore_index=True)
    for (pair, seed), frame in every.groupby(["pair", "seed"], sort=False):
        alive = frame[frame["alive"].astype(bool)]
        row = {"other": pair.removeprefix("base, "), "seed": seed, "alive": len(alive)}
        for score, end in (("nrn", ""), ("nrn_p2", "_p2")):
            limit = limits.loc[(seed, score, "distilled", 0.01)]
            unique, fewest, most = (
                int((alive[score] > limit[at]).sum()) for at in ("threshold", "high", "low")
            )
            row |= {f"nrn_mean{end}": alive[score].mean(), f"nrn_sd{end}": alive[score].std()}
            row[f"threshold{end}"] = limit["threshold"]
            for at, count in (("", unique), ("_low", fewest), ("_high", most)):
                row |= {f"unique{end}{at}": count, f"share{end}{at}": count / len(alive)}
        row |= {f"nrn_q{round(100 * q):02d}": alive["nrn"].quantile(q) for q in QUANTILES}
        rows.append(row)
    return pd.DataFrame(rows)


def over_seeds(crosscoders: pd.DataFrame) -> list[dict]:
    """Rows of numbers: means over the seeds of each model beside the base, with Student's intervals; those of
    features above the threshold hold the threshold's interval too (``stats.pooled``)."""
    names = {"unique": "unique_above_null", "unique_p2": "unique_above_null_p2", "share": "unique_share"}
    names |= {name: name for name in ("nrn_mean", "nrn_mean_p2", "nrn_sd", "alive")}
    rows = []
    for other, part in crosscoders.groupby("other", sort=False):
        end = "" if other == "distilled" else f"_{other}"
        for column, name in names.items():
            ends = [part[f"{column}_low"], part[f"{column}_high"]] if f"{column}_low" in part else None
            rows.append(_over_seeds(name + end, part[column], ends))
    return rows


def _over_seeds(quantity: str, values: pd.Series, ends: Sequence[pd.Series] | None = None) -> dict:
    value, *ci = pooled(values, None if ends is None else np.stack(ends, axis=1))
    return _row(quantity, value, ci, len(values), "seeds" if ends is None else "seeds and thresholds")


def _read(run: Run) -> list[dict]:
    numbers = ["02", "05", *(["04"] if (run.results / "04.json").is_file() else [])]
    files, rows = {number: read_results(run, number)["metrics"] for number in numbers}, []
    for quantity, (number, name, over) in READ.items():
        if found := files.get(number, {}).get(name):
            over = f"crosscoders and {over}" if "seeds" in found else over
            rows.append(_row(quantity, found["value"], found["ci"], found["n"], over))
    return rows


def _similarity(table: pd.DataFrame) -> list[dict]:
    """cka, procrustes_..., effective_rank and participation: of the base with the distilled model, with
    ``_null_a`` of the base with null_a; on all tokens, on traces (``_trace``), on general text."""
    rows = []
    for row in table.itertuples():
        name = row.statistic.removesuffix("_y")
        name = name.removesuffix("_x") + "_base" if name.endswith("_x") else name
        name += "" if row.other == "distilled" else f"_{row.other}"
        name += "" if row.text == "all" else f"_{row.text}"
        rows.append(_row(name, row.value, (row.low, row.high), row.n, "documents"))
    return rows


def _row(quantity: str, value, ci=None, n: int | None = None, over: str = "") -> dict:
    low, high = (np.nan if bound is None else bound for bound in (ci or (None, None)))
    value = np.nan if value is None else value
    return {"quantity": quantity, "value": value, "low": low, "high": high, "n": n, "over": over}


# --- reading ------------------------------------------------------------------------------------------------


def series(table: pd.DataFrame, quantity: str) -> pd.DataFrame:
    """One quantity over the pairs, by size: index pair, columns parameters, value, low, high, n, over; NaN
    for a pair without it. UserError if no pair has it."""
    rows = table[table["quantity"] == quantity].set_index("pair")
    if rows.empty:
        names = ", ".join(dict.fromkeys(table["quantity"]))
        raise UserError(f"no pair has the quantity {quantity!r}: there are {names}")
    size = table[table["quantity"] == "parameters"].set_index("pair")["value"].rename("parameters")
    joined = pd.concat([size, rows[["value", "low", "high", "n", "over"]]], axis=1)
    return joined.loc[size.index].sort_values("parameters")


def order(line: pd.DataFrame) -> tuple[str, bool]:
    """("rises", "falls" or "mixed", is every step larger than the intervals?) of a ``series``. "mixed" where
    a value is missing, too."""
    values = line["value"].to_numpy(float)
    steps = np.diff(values)
    name = "rises" if (steps > 0).all() else "falls" if (steps < 0).all() else "mixed"
    low, high = line["low"].to_numpy(float), line["high"].to_numpy(float)
    apart = (low[1:] > high[:-1]) | (high[1:] < low[:-1])  # False where an interval is not known
    return ("mixed" if np.isnan(values).any() else name), bool(apart.all())


def compare(
    results: Results,
    name: str,
    table: pd.DataFrame,
    crosscoders: pd.DataFrame,
    one: tuple[str, str],
    other: tuple[str, str],
) -> None:
    """Put into ``results``, as ``name``, the difference between two numbers of ``collect``, ``one`` minus
    ``other``: (quantity, pair) each, with an interval from both of theirs (``stats.difference``). If both are
    means over crosscoders, the difference of every seed is in it too ("seeds")."""
    a, b = (series(table, quantity).loc[pair] for quantity, pair in (one, other))
    value, ci = difference(*((row["value"], (row["low"], row["high"])) for row in (a, b)))
    n = min(a["n"], b["n"])
    results.add(name, value, None if np.isnan(ci).any() else ci, None if pd.isna(n) else n)
    if {one[0], other[0]} <= OF_CROSSCODERS.keys():
        by_seed = []
        for quantity, pair in (one, other):
            model, column = OF_CROSSCODERS[quantity]
            rows = crosscoders[(crosscoders["pair"] == pair) & (crosscoders["other"] == model)]
            by_seed.append(rows.set_index("seed")[column])
        each = (by_seed[0] - by_seed[1]).dropna()
        results.metrics[name]["seeds"] = [[float(v)] * 3 for v in each]


def ranks(table: pd.DataFrame, quantities: Sequence[str]) -> pd.DataFrame:
    """Rank of every pair (1: lowest) in every quantity, pairs by size. NaN where a pair has none."""
    return pd.DataFrame({q: series(table, q)["value"].rank() for q in quantities}).T.rename_axis("quantity")


def text(line: pd.DataFrame, digits: int = 2) -> str:
    """A ``series`` as prose shows it, from the smallest pair to the largest: ``0.50 [0.48, 0.52], 0.51``."""
    show = lambda v: "n/a" if pd.isna(v) else f"{v:.{digits}f}"
    ends = ["" if pd.isna(a + b) else f" [{show(a)}, {show(b)}]" for a, b in zip(line["low"], line["high"])]
    return ", ".join(show(v) + e for v, e in zip(line["value"], ends))


# --- figures ------------------------------------------------------------------------------------------------


def plot(
    table: pd.DataFrame,
    panels: Mapping[str, Mapping[str, str]],
    title: str = "",
    x: str = "parameters",
    flat: Mapping[str, float] | None = None,
) -> go.Figure:
    """One panel per entry of ``panels`` {title: {curve: quantity}}, each quantity against ``x`` (a quantity,
    too) with its 95% interval.

    A curve has the colour of its first word (a model, a category, "null", "random") and a symbol of its own;
    the second one of a colour in a panel is dashed, and a control, which begins with "null" or "random",
    dotted. ``flat``: {panel title: height of a dotted line}. Against anything but size the points are not
    joined; those of the first curve are named.
    """
    fig = make_subplots(1, len(panels), subplot_titles=list(panels), horizontal_spacing=0.09)
    across, by_size = series(table, x)["value"], x == "parameters"
    names, legend = list(dict.fromkeys(name for curves in panels.values() for name in curves)), set()
    for column, (panel, curves) in enumerate(panels.items(), start=1):
        used = set()
        for name, quantity in curves.items():
            line, kind = series(table, quantity), name.split()[0].strip(",:")
            colour = COLOURS.get(kind, COLOURS["random"])
            dash = "dot" if kind in ("null", "random") else "dash" if colour in used else "solid"
            symbol = SYMBOLS[names.index(name) % len(SYMBOLS)] + ("" if dash == "solid" else "-open")
            mode = "lines+markers" if by_size else "markers" if used else "markers+text"
            fig.add_scatter(
                x=across[line.index], y=line["value"], text=line.index, name=name, legendgroup=name,
                showlegend=name not in legend, mode=mode, textposition="middle right", textfont_size=11,
                line=dict(color=colour, dash=dash), marker=dict(color=colour, size=9, symbol=symbol),
                error_y=error_bars(line, "value", "low", "high"), row=1, col=column,
            )  # fmt: skip
            used.add(colour)
            legend.add(name)
        if panel in (flat or {}):
            fig.add_hline(y=flat[panel], line=dict(color="#444444", width=1, dash="dot"), row=1, col=column)
    if by_size:
        fig.update_xaxes(type="log", tickvals=across, ticktext=[f"{n / 1e6:.2f}M" for n in across])
    else:  # room for the names
        room = 0.2 * max(float(across.max() - across.min()), 1e-3)
        fig.update_xaxes(range=[across.min() - room, across.max() + 2 * room])
    fig.update_xaxes(title_text=SHOWN.get(x, x)).update_annotations(font_size=13)
    fig.update_layout(title=title, width=max(560, 420 * len(panels)), height=440, margin_t=90)
    return fig.update_layout(legend=dict(orientation="h", y=-0.22))
