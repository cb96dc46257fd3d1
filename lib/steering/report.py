"""What notebook 04 reports: its numbers by name, sentences that say what the tables show, its scoreboard."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

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
SHOWS = "**What this run shows.** "


def _and(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"


def _add(results: Results, name: str, row: Mapping, value: str) -> None:
    results.add(name, row[value], (row[f"{value}_low"], row[f"{value}_high"]), row["n"])


def add_ablation(results: Results, summary: pd.DataFrame) -> None:
    """Metrics ablate_<category>_<ABLATED>, ..._log_probability and ..._per_norm at the largest k, and the
    table ``ablation``."""
    largest = at_largest_k(summary).set_index(["category", "model", "removed"])
    for c in CATEGORIES:
        for key, where in ABLATED.items():
            for value in ("logit", "log_probability", "per_norm"):
                end = "" if value == "logit" else f"_{value}"
                _add(results, f"ablate_{c}_{key}{end}", largest.loc[(c, *where)], value)
    results.table("ablation", summary.round(5))


def at_largest_k(summary: pd.DataFrame) -> pd.DataFrame:
    """The rows of the largest k, with the lengths of the error bars of per_norm: up, down."""
    largest = summary[summary["k"] == summary["k"].max()]
    up, down = largest["per_norm_high"] - largest["per_norm"], largest["per_norm"] - largest["per_norm_low"]
    return largest.assign(up=up, down=down)


def ablation_shows(summary: pd.DataFrame, removals: Sequence[Removal], chosen: Mapping[str, int]) -> str:
    """Which categories lose support, by logit and by log-probability, and whose features were removed."""
    k, largest = summary["k"].max(), at_largest_k(summary).set_index(["model", "removed"])
    removed = next(r.features for r in removals if r.k == k and r.kind == "features")
    inside = [f"{c} ({f})" for c, f in chosen.items() if c in CATEGORIES and f in removed]
    lines = [
        f"{SHOWS}At k = {k:g} % ({len(removed)} features), the interval lies below 0 for these categories:"
    ]
    for name, where in ABLATED.items():
        rows = largest.loc[[where]]
        logit, log_probability = (
            _and(rows.loc[rows[f"{value}_high"] < 0, "category"]) for value in ("logit", "log_probability")
        )
        lines.append(f"- {name}: {logit} by logit; {log_probability} by log-probability")
    lines.append(
        "\nThe rule removes *frequent* features. Of the features chosen for the categories it removes:"
        f" {_and(inside)}. A logit has no zero: where the two disagree, believe the log-probability."
    )
    return "\n".join(lines)


def per_norm_shows(summary: pd.DataFrame) -> str:
    more = {model: _and(_more_per_norm(summary, model)) for model in ("distilled", "base")}
    return (
        f"{SHOWS}Per unit of removed norm the features cost more than equally frequent shared ones, with"
        f" intervals that do not touch, for: {more['distilled']} (distilled); {more['base']} (base)."
    )


def _more_per_norm(summary: pd.DataFrame, model: str) -> list[str]:
    """Categories in which the features cost more than matched ones, with intervals that do not touch."""
    largest = at_largest_k(summary).set_index(["model", "removed", "category"])
    features, matched = (largest.loc[model, kind] for kind in ("features", "matched"))
    return [c for c in CATEGORIES if features.per_norm_high[c] < matched.per_norm_low[c]]


def at(comparison: pd.DataFrame, condition: Mapping) -> pd.Series:
    """The row of ``comparison`` with the direction and strength of ``condition``."""
    keys = ["direction", "strength"]
    return comparison[(comparison[keys] == [condition[key] for key in keys]).all(axis=1)].iloc[0]


def choice_shows(search: pd.DataFrame, picked: pd.DataFrame) -> str:
    lines = [f"{SHOWS}{len(search) - 1} conditions were tried."]
    limits = {
        True: "within the limits",
        False: "**outside the limits, which no condition kept to: the one that exceeds them least**",
    }
    lines += [
        f"- {aim}: {row['direction']} at strength {row['strength']:g}: {row['length_ratio']:.2f} times as"
        f" long, accuracy {row['accuracy_change']:+.2f}, {limits[bool(row['within_limits'])]}"
        for aim, row in picked.iterrows()
    ]
    return "\n".join(lines)


def add_steering(results: Results, curves: pd.DataFrame, over: Mapping, incisive: Mapping) -> None:
    """Metrics overthink_... and incisive_... (STEERED) of the chosen conditions, and random_... and
    random_incisive_...: the mean over random directions of the same strength, its interval from the lowest
    lower end to the highest upper end."""
    for name, condition in (("overthink", over), ("incisive", incisive)):
        row, prefix = at(curves, condition), "random" if name == "overthink" else "random_incisive"
        for value in STEERED:
            _add(results, f"{name}_{value}", row, value)
        noise = curves[(curves["label"] == "random") & (curves["strength"] == abs(condition["strength"]))]
        for value in STEERED[:2]:
            ends = noise[f"{value}_low"].min(), noise[f"{value}_high"].max()
            results.add(f"{prefix}_{value}", noise[value].mean(), ends, row["n"] * len(noise))


def add_easy(results: Results, comparison: pd.DataFrame, over: Mapping, incisive: Mapping) -> None:
    for name, condition in (("overthink", over), ("incisive", incisive)):
        for value in STEERED[:2]:
            _add(results, f"{name}_{value}_easy", at(comparison, condition), value)


def steering_shows(results: Results) -> str:
    def said(name: str) -> str:
        return (
            f"{results.text(f'{name}_length_ratio')} times as long, accuracy"
            f" {results.text(f'{name}_accuracy_change')}"
        )

    names = {"over-thinking": ("overthink", "random"), "incisive thinking": ("incisive", "random_incisive")}
    lines = [
        f"- {aim}: {said(name)}, {results.text(f'{name}_runaway')} never end;"
        f" random directions: {said(noise)}"
        for aim, (name, noise) in names.items()
    ]
    return "\n".join([f"{SHOWS}On test puzzles:", *lines])


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
    present = {c: unsteered[f"rate_{c}"] for c in outcomes.RATES if unsteered[f"rate_{c}"] > 0}
    grid = rows[[f"rate_{c}" for c in present]].set_axis(list(present), axis=1)
    return (grid / list(present.values())).rename_axis("feature")


def raises_most(grid: pd.DataFrame) -> dict[str, str]:
    """{category: the kind of sentence whose rate its feature raises most}."""
    return {c: grid.loc[c].idxmax() for c in grid.index if c in CATEGORIES and len(grid.columns)}


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
    k, largest = summary["k"].max(), at_largest_k(summary).set_index(["model", "removed"])
    counts = {"distilled": (largest.loc[[ABLATED["distilled"]], "logit_high"] < 0).sum()}
    for prediction, name in (("base", "base"), ("random (control)", "random")):
        cost = difference(effects, k, ABLATED["distilled"], ABLATED[name], seed=seed)
        counts[prediction] = (cost["high"] < 0).sum()
    counts["per norm"] = len(_more_per_norm(summary, "distilled"))
    every = len(CATEGORIES)
    held = {name: (f"{n} of {every} categories", bool(n == every)) for name, n in counts.items()}
    text, value, best = results.text, results.values, raises_most(grid)
    rivals = outcomes.rivals(curves, over, incisive)
    directions = curves.loc[curves["label"] == "random", "direction"].nunique()
    long, length = (f"{text(f'{name}_length_ratio')} times as long" for name in ("overthink", "incisive"))
    brief = value["incisive_length_ratio"] <= 0.85 and value["incisive_accuracy_change"] >= -0.05
    seen = "; ".join(f"{c}: {column}" for c, column in best.items()) or "nothing of the kind is ever said"
    return held | {
        "over-thinking": (long, value["overthink_length_ratio"] >= 1.5),
        "incisive thinking": (f"{length}, accuracy {text('incisive_accuracy_change')}", brief),
        "random (control, steering)": (f"{rivals} of {directions} directions do", rivals == 0),
        "specific": (seen, bool(best) and all(c == column for c, column in best.items())),
    }
