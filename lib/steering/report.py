"""What notebook 04 reports: its numbers by name, sentences that say what the tables show, its scoreboard."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd

from ..labels import CATEGORIES
from ..results import Part, Results
from . import outcomes
from .ablation import Removal, difference

ABLATED = {
    "distilled": ("distilled", "features"),
    "base": ("base", "features"),
    "random": ("distilled", "random"),
    "matched": ("distilled", "matched"),
}
STEERED = ("length_ratio", "accuracy_change", "chain_change", "runaway", "redundant_ratio", "needed_ratio")


def _and(names: Sequence[str]) -> str:
    return ", ".join(names) or "none"


def _add(results: Results, name: str, row, value: str, n: int | None = None) -> None:
    results.add(name, row[value], (row[f"{value}_low"], row[f"{value}_high"]), row["n"] if n is None else n)


# --- taking out ---------------------------------------------------------------------------------------------


def add_ablation(results: Results, summary: pd.DataFrame) -> None:
    """Metrics ablate_<category>_<ABLATED>, ..._log_probability and ..._per_norm at the largest k, and the
    table ``ablation``."""
    largest = at_largest_k(summary).set_index(["category", "model", "removed"])
    for c in CATEGORIES:
        for key, where in ABLATED.items():
            for value in ("logit", "log_probability", "per_norm"):
                suffix = "" if value == "logit" else f"_{value}"
                _add(results, f"ablate_{c}_{key}{suffix}", largest.loc[(c, *where)], value)
    results.table("ablation", summary.round(5))


def at_largest_k(summary: pd.DataFrame) -> pd.DataFrame:
    """The rows of the largest k, with the lengths of the error bars of per_norm: up, down."""
    largest = summary[summary["k"] == summary["k"].max()]
    return largest.assign(
        up=largest["per_norm_high"] - largest["per_norm"], down=largest["per_norm"] - largest["per_norm_low"]
    )


def ablation_shows(summary: pd.DataFrame, removals: Sequence[Removal], chosen: Mapping[str, int]) -> str:
    """Which categories lose support, by logit and by log-probability, and whose features were removed."""
    k, largest = summary["k"].max(), at_largest_k(summary).set_index(["model", "removed"])
    removed = next(r.features for r in removals if r.k == k and r.kind == "features")

    def falling(where: tuple[str, str], value: str) -> str:
        rows = largest.loc[[where]]
        return _and(list(rows.loc[rows[f"{value}_high"] < 0, "category"]))

    lines = [
        f"**What this run shows.** At k = {k:g} % ({len(removed)} features), the interval lies below 0 for"
        " these categories:"
    ]
    lines += [
        f"- {name}: {falling(where, 'logit')} by logit;"
        f" {falling(where, 'log_probability')} by log-probability"
        for name, where in ABLATED.items()
    ]
    inside = [f"{c} ({f})" for c, f in chosen.items() if c in CATEGORIES and f in removed]
    lines.append(
        "\nThe rule removes *frequent* features. Of the features chosen for the categories it removes:"
        f" {_and(inside)}. A logit has no zero: where the two disagree, believe the log-probability."
    )
    return "\n".join(lines)


def per_norm_shows(summary: pd.DataFrame) -> str:
    largest = at_largest_k(summary).set_index(["model", "removed", "category"])
    more = {
        m: [
            c
            for c in CATEGORIES
            if largest.loc[(m, "features", c), "per_norm_high"]
            < largest.loc[(m, "matched", c), "per_norm_low"]
        ]
        for m in ("distilled", "base")
    }
    return (
        "**What this run shows.** Per unit of removed norm the features cost more than equally frequent"
        f" shared ones, with intervals that do not touch, for: {_and(more['distilled'])} (distilled);"
        f" {_and(more['base'])} (base)."
    )


# --- adding -------------------------------------------------------------------------------------------------


def at(comparison: pd.DataFrame, condition: Mapping) -> pd.Series:
    """The row of ``comparison`` with the direction and strength of ``condition``."""
    same = (comparison["direction"] == condition["direction"]) & (
        comparison["strength"] == condition["strength"]
    )
    return comparison[same].iloc[0]


def choice_shows(search: pd.DataFrame, picked: pd.DataFrame) -> str:
    lines = [f"**What this run shows.** {len(search) - 1} conditions were tried."]
    for aim, row in picked.iterrows():
        limits = (
            "within the limits"
            if row["within_limits"]
            else "**outside the limits, which no condition kept to: the one that exceeds them least**"
        )
        lines.append(
            f"- {aim}: {row['direction']} at strength {row['strength']:g}: {row['length_ratio']:.2f} times as"
            f" long, accuracy {row['accuracy_change']:+.2f}, {limits}"
        )
    return "\n".join(lines)


def add_steering(results: Results, curves: pd.DataFrame, over: Mapping, incisive: Mapping) -> None:
    """Metrics overthink_... and incisive_... (STEERED) of the chosen conditions, and random_... and
    random_incisive_...: the mean over random directions of the same strength, its interval from the lowest
    lower end to the highest upper end."""
    for name, prefix, condition in (("overthink", "random", over), ("incisive", "random_incisive", incisive)):
        row = at(curves, condition)
        for value in STEERED:
            _add(results, f"{name}_{value}", row, value)
        noise = curves[(curves["label"] == "random") & (curves["strength"] == abs(condition["strength"]))]
        for value in ("length_ratio", "accuracy_change"):
            ends = noise[f"{value}_low"].min(), noise[f"{value}_high"].max()
            results.add(f"{prefix}_{value}", noise[value].mean(), ends, row["n"] * len(noise))


def add_easy(results: Results, comparison: pd.DataFrame, over: Mapping, incisive: Mapping) -> None:
    for name, condition in (("overthink", over), ("incisive", incisive)):
        for value in ("length_ratio", "accuracy_change"):
            _add(results, f"{name}_{value}_easy", at(comparison, condition), value)


def steering_shows(results: Results) -> str:
    names = {"over-thinking": ("overthink", "random"), "incisive thinking": ("incisive", "random_incisive")}
    lines = ["**What this run shows.** On test puzzles:"]
    lines += [
        f"- {aim}: {results.text(f'{name}_length_ratio')} times as long, accuracy"
        f" {results.text(f'{name}_accuracy_change')}, {results.text(f'{name}_runaway')} never end; random"
        f" directions: {results.text(f'{noise}_length_ratio')} times as long, accuracy"
        f" {results.text(f'{noise}_accuracy_change')}"
        for aim, (name, noise) in names.items()
    ]
    return "\n".join(lines)


def needed_and_redundant(curves: pd.DataFrame, over: Mapping, incisive: Mapping) -> pd.DataFrame:
    """Tokens of needed and of redundant sentences under the chosen conditions, as ratios: aim, tokens, ratio,
    up, down."""
    rows = []
    for aim, condition in (("over-thinking", over), ("incisive thinking", incisive)):
        row = at(curves, condition)
        for tokens in ("needed", "redundant"):
            ratio, low, high = (row[f"{tokens}_ratio{end}"] for end in ("", "_low", "_high"))
            rows.append((aim, tokens, ratio, high - ratio, ratio - low))
    return pd.DataFrame(rows, columns=["aim", "tokens", "ratio", "up", "down"])


def rates_grid(specific: pd.DataFrame, unsteered: Mapping) -> pd.DataFrame:
    """Rates of sentences with a category's feature added (rows) over the unsteered ones; columns that
    occur."""
    rows = specific[specific["direction"] != outcomes.NO_STEERING].set_index("label")
    present = [c for c in outcomes.RATES if unsteered[f"rate_{c}"] > 0]
    grid = rows[[f"rate_{c}" for c in present]].set_axis(present, axis=1)
    return (grid / [unsteered[f"rate_{c}"] for c in present]).rename_axis("feature")


def raises_most(grid: pd.DataFrame) -> dict[str, str]:
    """{category: the kind of sentence whose rate its feature raises most}."""
    return {c: grid.loc[c].idxmax() for c in grid.index if c in CATEGORIES and len(grid.columns)}


# --- whole thoughts, and the scoreboard ---------------------------------------------------------------------


def thoughts_show(part: Part) -> str:
    """One line of notebook 13: what removing the features costs in whole thoughts."""
    if not part:
        return part.note
    results = Results("04", None, {})
    results.metrics.update(part.metrics)
    costs = "; ".join(f"{c} {results.text(f'ablate_accuracy_{c}')}" for c in CATEGORIES)
    return (
        f"In whole thoughts, removing a category's features changes accuracy by: {costs}; random directions"
        f" of the same norm by {results.text('ablate_accuracy_random')}, features that fire as often in"
        f" traces by {results.text('ablate_accuracy_matched_in_traces')}. ({part.note})"
    )


def scores(
    results: Results,
    effects: pd.DataFrame,
    summary: pd.DataFrame,
    curves: pd.DataFrame,
    over: Mapping,
    incisive: Mapping,
    grid: pd.DataFrame,
    seed: int = 0,
) -> dict[str, tuple[str, bool]]:
    """{prediction: (what was observed, whether it held)} for the predictions of notebook 04."""
    k, unit = summary["k"].max(), at_largest_k(summary).query("model == 'distilled'").set_index("removed")
    features, matched = (unit.loc[kind].set_index("category") for kind in ("features", "matched"))
    cheaper = {
        name: difference(effects, k, ABLATED["distilled"], ABLATED[name], seed=seed)["high"] < 0
        for name in ("base", "random")
    }
    counts = {
        "distilled": (features["logit_high"] < 0).sum(),
        "base": cheaper["base"].sum(),
        "random (control)": cheaper["random"].sum(),
        "per norm": (features["per_norm_high"] < matched["per_norm_low"]).sum(),
    }
    values, best = results.values, raises_most(grid)
    rivals = outcomes.rivals(curves, over, incisive)
    directions = curves.loc[curves["label"] == "random", "direction"].nunique()
    return {
        name: (f"{n} of {len(CATEGORIES)} categories", bool(n == len(CATEGORIES)))
        for name, n in counts.items()
    } | {
        "over-thinking": (
            f"{results.text('overthink_length_ratio')} times as long",
            values["overthink_length_ratio"] >= 1.5,
        ),
        "incisive thinking": (
            f"{results.text('incisive_length_ratio')} times as long, accuracy"
            f" {results.text('incisive_accuracy_change')}",
            values["incisive_length_ratio"] <= 0.85 and values["incisive_accuracy_change"] >= -0.05,
        ),
        "random (control, steering)": (f"{rivals} of {directions} directions do", rivals == 0),
        "specific": (
            "; ".join(f"{c}: {column}" for c, column in best.items()) or "nothing of the kind is ever said",
            bool(best) and all(c == column for c, column in best.items()),
        ),
    }
