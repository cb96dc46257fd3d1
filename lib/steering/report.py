"""What notebook 04 reports: its numbers by name, sentences that say what they show, its predictions."""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pandas as pd

from ..labels import CATEGORIES
from ..results import Part, Results
from ..stats import wilson
from ..text.tables import table
from ..verdicts import Condition, above, below
from . import control as control
from . import facts as facts
from . import outcomes
from .ablation import RULES, VALUES, estimates, pool, summarise
from .search import AIMS, PLACES, Found, best_layer, record, record_references

ABLATED = {
    "distilled": ("distilled", "features"),
    "base": ("base", "features"),
    "random": ("distilled", "random"),
    "matched": ("distilled", "matched"),
}
LOSS = 0.05  # of accuracy, that incisive thinking may cost by its prediction
AIM_NAMES = {"overthink": "over-thinking", "incisive": "incisive thinking"}
LAYER_NAMES = {"half": "half depth", "upper": "the layer before the last block"}


def _and(names: Iterable[str]) -> str:
    return ", ".join(names) or "none"


# --- ablation -----------------------------------------------------------------------------------------------


def record_ablation(results: Results, effects: pd.DataFrame, seed: int = 0) -> pd.DataFrame:
    """What the removals of one crosscoder do, put into ``results``; returns ``ablation.summarise``.

    Of the rule "frequent", at the largest k: ablate_<category>_<key> for the keys of ABLATED, and
    ablate_<category>_over_<key>, the cost in the distilled model minus that under the key (base, random,
    matched). Of the others ablate_<category>_<rule>, ..._<rule>_<kind> and ..._<rule>_over_<kind> (kinds
    random, matched). Each in logits, and with the endings _log_probability and _per_norm."""

    def add(name: str, rows: pd.DataFrame, other: pd.DataFrame | None = None) -> None:
        for value, (mean, *ends) in estimates(rows, other, seed=seed).items():
            if value != "norm":
                end = "" if value == "logit" else f"_{value}"
                results.add(f"ablate_{name}{end}", mean, ends, len(rows))

    frequent = effects[effects["rule"] == "frequent"]
    for c in CATEGORIES:
        rows = frequent[(frequent["category"] == c) & (frequent["k"] == frequent["k"].max())]
        cells = {}
        for key, (model, kind) in ABLATED.items():
            cells[key] = rows[(rows["model"] == model) & (rows["removed"] == kind)]
        for key, cell in cells.items():
            add(f"{c}_{key}", cell)
            if key != "distilled":
                add(f"{c}_over_{key}", cells["distilled"], cell)
        for rule in RULES[1:]:
            rows = effects[(effects["category"] == c) & (effects["rule"] == rule)]
            if rule not in set(effects["rule"]):
                continue
            features = rows[rows["removed"] == "features"]
            add(f"{c}_{rule}", features)
            for kind in ("random", "matched"):
                cell = rows[rows["removed"] == kind]
                add(f"{c}_{rule}_{kind}", cell)
                add(f"{c}_{rule}_over_{kind}", features, cell)
    return summarise(effects, seed=seed)


def record_all_ablations(
    results: Results, effects: Sequence[pd.DataFrame], seed: int = 0
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """``record_ablation`` for every crosscoder, pooled into ``results``; (table "ablation": the pooled
    summary, table "ablation_by_crosscoder": each one's)."""
    summaries = [record_ablation(own, frame, seed) for own, frame in results.over(effects)]
    singles = pd.concat(dict(enumerate(summaries)), names=["crosscoder"]).reset_index(0)
    singles = singles.reset_index(drop=True)
    pooled = results.table("ablation", pool(summaries).round(5))
    short = singles[["crosscoder", "category", "model", "rule", "k", "removed", *VALUES]]
    results.table("ablation_by_crosscoder", short.round(5))
    return pooled, singles


def at_largest_k(summary: pd.DataFrame) -> pd.DataFrame:
    """The rows of the rule "frequent" with the largest k."""
    frequent = summary[summary["rule"] == "frequent"]
    return frequent[frequent["k"] == frequent["k"].max()]


def _lowered(results: Results, names: str, end: str = "") -> list[str]:
    """Categories whose metric ablate_<name><end> has its interval below 0; {}: the category."""
    found = []
    for c in CATEGORIES:
        metric = results.metrics[f"ablate_{names.format(c)}{end}"]
        if metric["ci"] and metric["ci"][1] is not None and metric["ci"][1] < 0:
            found.append(c)
    return found


def ablation_shows(results: Results) -> str:
    """Which categories lose support, by logit and by log-probability."""
    table = results.tables["ablation"]
    k = max(row[table["columns"].index("k")] for row in table["rows"])
    lines = [f"The top {k:g}%: the interval lies below 0 for these categories:"]
    for key in ABLATED:
        logit, log_probability = (_and(_lowered(results, f"{{}}_{key}", e)) for e in ("", "_log_probability"))
        lines.append(f"- {key}: {logit} by logit; {log_probability} by log-probability")
    more = _and(_lowered(results, "{}_over_matched", "_per_norm"))
    lines.append(
        f"\nPer unit of removed norm the features cost the distilled model more than matched ones for:"
        f" {more}. A logit has no zero: where the two disagree, believe the log-probability."
    )
    return "\n".join(lines)


def sets_show(results: Results, why_not: str) -> str:
    """What the sets that mean something cost, beside their controls, in log-probability."""
    lines = ["Change of the log-probability, mean over crosscoders:"]
    for rule in RULES[1:]:
        if f"ablate_{CATEGORIES[0]}_{rule}" not in results.metrics:
            lines.append(f"- {rule}: not testable, because {why_not}")
            continue
        for c in CATEGORIES:
            own, beside = _beside_controls(results, c, rule)
            lines.append(f"- {rule}, {c}: **{own}**; {beside}")
    return "\n".join(lines)


def _beside_controls(results: Results, c: str, rule: str) -> tuple[str, str]:
    """(what a set costs a category in log-probability, the same of its controls), as text."""
    name = f"ablate_{c}_{rule}{{}}_log_probability"
    own, matched, noise = (results.text(name.format(kind)) for kind in ("", "_matched", "_random"))
    return own, f"matched {matched}; random {noise}"


# --- steering -----------------------------------------------------------------------------------------------


def choice_shows(found: Mapping[str, Found]) -> str:
    """How much was tried, and how often something within the limits was found."""
    lines = [f"On the puzzles for choosing, {sum(len(f.table) for f in found.values())} conditions:"]
    for name, f in found.items():
        for aim, label in AIM_NAMES.items():
            own = f.chosen[(f.chosen["crosscoder"] >= 0) & (f.chosen["aim"] == aim)]
            lines.append(
                f"- {LAYER_NAMES[name]}, {label}, steered at {PLACES[f.place[aim]]}:"
                f" {own['length_ratio'].min():.2f} to {own['length_ratio'].max():.2f} times as long;"
                f" {int(own['within_limits'].sum())} of {len(own)} crosscoders within the limits"
            )
    layers = ", ".join(f"{AIM_NAMES[aim]} at {LAYER_NAMES[best_layer(found, aim)]}" for aim in AIMS)
    return "\n".join([*lines, f"\nThe better layer there, which the test is about: {layers}."])


def record_steering(
    results: Results,
    found: Mapping[str, Found],
    reported: Mapping[tuple[str, str], tuple[pd.DataFrame, pd.DataFrame]],
    seed: int = 0,
) -> pd.DataFrame:
    """``search.record`` for every crosscoder, pooled: at each layer with the ending _<layer>, and at the
    better one (``best_layer``) without; gradient_<aim>_... and mode_<aim>_... likewise;
    unsteered_accuracy. Returns table "dose_response": all conditions on the puzzles for reporting."""
    where = [(aim, layer, f"_{layer}") for aim in AIMS for layer in found]
    where += [(aim, best_layer(found, aim), "") for aim in AIMS]
    untouched = next(iter(reported.values()))[1].iloc[0]
    results.add("unsteered_accuracy", *outcomes.estimate(untouched, "accuracy"), untouched["n"])
    for aim, layer, suffix in where:
        record_references(results, found[layer], reported[layer, aim][1], aim, suffix)
    for own, number in results.over(range(1 + len(next(iter(found.values())).opened.others))):
        for aim, layer, suffix in where:
            record(own, found[layer], *reported[layer, aim], number, aim, suffix, seed)
    curves = pd.concat([curves for _, curves in reported.values()], ignore_index=True)
    return results.table("dose_response", curves.round(4))


def record_easy(results: Results, found: Mapping[str, Found], tasks: Sequence, seed: int = 0) -> None:
    """<aim>_length_ratio_easy and <aim>_accuracy_change_easy, pooled: the chosen conditions of the better
    layer on ``tasks``."""
    curves = {}
    for aim in AIMS:
        f = found[best_layer(found, aim)]
        conditions = f.conditions(aim, [one.number for one in f.opened.each])
        thoughts = f.steering(aim).run(f.folder(aim, "easy"), tasks, conditions)
        curves[aim] = outcomes.compare(thoughts, seed=seed)
    for own, one in results.over(f.opened.each):
        for aim in AIMS:
            row = outcomes.at(curves[aim], found[best_layer(found, aim)].choice(one.number, aim))
            for value in outcomes.STEERED[:2]:
                own.add(f"{aim}_{value}_easy", *outcomes.estimate(row, value), row["n"])


def record_specificity(results: Results, grids: Sequence[pd.DataFrame]) -> None:
    """specific_share: share of the categories whose feature raises the rate of its own sentences most."""
    for own, grid in results.over(grids):
        best = raises_most(grid)
        own.add("specific_share", np.mean([c == x for c, x in best.items()]) if best else np.nan, n=len(best))


def specificity_shows(results: Results, grids: Sequence[pd.DataFrame], mean: pd.DataFrame) -> str:
    """How often a category's feature raises its own sentences most, and of which categories; the strongest
    effect in the ``mean`` of the grids, if any sentence was written at all."""
    best = [raises_most(grid) for grid in grids]
    counts = {c: sum(own.get(c) == c for own in best) for c in CATEGORIES}
    each = "; ".join(f"{c} {n} of {len(grids)}" for c, n in counts.items())
    share = results.text("specific_share")
    text = f"Share of the categories whose feature raises its own sentences most: {share}. ({each})"
    power = np.log2(mean.clip(lower=2**-4)).stack()
    if not len(power):
        return text
    feature_of, rate = power.abs().idxmax()
    return (
        f"{text} The strongest effect, mean over crosscoders: the feature of {feature_of} multiplies the rate"
        f" of {rate} by {2 ** power[feature_of, rate]:.2f}."
    )


def raises_most(grid: pd.DataFrame) -> dict[str, str]:
    """{category: the kind of sentence whose rate its feature raises most}."""
    return {c: grid.loc[c].idxmax() for c in grid.index if c in CATEGORIES and len(grid.columns)}


def steering_shows(results: Results, found: Mapping[str, Found]) -> str:
    def said(name: str, suffix: str) -> str:
        return (
            f"{results.text(f'{name}_length_ratio{suffix}')} times as long, accuracy"
            f" {results.text(f'{name}_accuracy_change{suffix}')}"
        )

    lines = ["On puzzles that were not used for choosing, mean over crosscoders:"]
    for layer in found:
        for aim, label in AIM_NAMES.items():
            noise, mode = "random" if aim == "overthink" else "random_incisive", ""
            if f"mode_{aim}_length_ratio_{layer}" in results.metrics:
                mode = f"from quick to careful thoughts: {said(f'mode_{aim}', f'_{layer}')}; "
            lines.append(
                f"- {LAYER_NAMES[layer]}, {label}: **{said(aim, f'_{layer}')}**; the gradient's direction:"
                f" {said(f'gradient_{aim}', f'_{layer}')}; {mode}random directions:"
                f" {said(noise, f'_{layer}')}"
            )
    return "\n".join(lines)


def needed_and_redundant(results: Results) -> pd.DataFrame:
    """Tokens of needed and of redundant sentences as ratios: aim, tokens, ratio, ratio_low, ratio_high."""
    rows = []
    for aim, label in AIM_NAMES.items():
        for tokens in ("needed", "redundant"):
            metric = results.metrics[f"{aim}_{tokens}_ratio"]
            rows.append((label, tokens, metric["value"], *(metric["ci"] or (None, None))))
    columns = ["aim", "tokens", "ratio", "ratio_low", "ratio_high"]
    return pd.DataFrame(rows, columns=columns).astype(dict.fromkeys(columns[2:], float))


def needed_shows(results: Results) -> str:
    """What was saved or added, in a sentence."""
    each = "; ".join(
        f"{label}, needed {results.text(f'{aim}_needed_ratio')} and redundant"
        f" {results.text(f'{aim}_redundant_ratio')} times as many tokens"
        for aim, label in AIM_NAMES.items()
    )
    return f"{each[0].upper()}{each[1:]}."


def finding(results: Results, part: Part) -> str:
    """The strongest result first: which behaviours lose what they are attributed to, and what adding does.
    ``part``: of notebook 13, "causal"."""
    end, rule = "_log_probability", "attributed"
    own, matched, noise = (
        _lowered(results, f"{{}}_{rule}{kind}", end) for kind in ("", "_over_matched", "_over_random")
    )
    sure = [c for c in own if c in matched and c in noise]
    costs = "; ".join(f"{c} {results.text(f'ablate_{c}_{rule}{end}')}" for c in sure)
    lines = [
        "Behaviours that lose log-probability without the features attributed to them, and more than without"
        f" matched features or random vectors: {costs or 'none'}."
    ]
    if part:
        lines.append(thoughts_show(part).partition(" (Read")[0])
    steered = "; ".join(f"{label} {results.text(f'{aim}_length_ratio')}" for aim, label in AIM_NAMES.items())
    lines.append(f"Added, single features change the length of thoughts by these factors: {steered}.")
    return " ".join(lines)


def thoughts_show(part: Part) -> str:
    """One line of notebook 13: what removing the features costs in whole thoughts."""
    if not part:
        return part.note
    results = Results("04", None, {})
    results.metrics.update(part.metrics)
    costs, noise, matched = (
        "; ".join(f"{c} {results.text(f'ablate_accuracy_attributed_{c}{end}')}" for c in CATEGORIES)
        for end in ("", "_over_random", "_over_matched")
    )
    return (
        f"In whole thoughts, removing the features that a category is attributed to changes accuracy by:"
        f" {costs}. Minus what random directions of equal norm do: {noise}. Minus what features that fire as"
        f" often do: {matched}. ({part.note})"
    )


# --- predictions --------------------------------------------------------------------------------------------

PREDICTIONS = table("predictions_04")


def conditions(
    found: Mapping[str, Found],
    no_unique: str,
    no_upper: str,
    accuracy: float = 1.0,
    no_errors: str = "",
    random_directions: int = 4,
) -> dict[str, list[Condition] | str]:
    """What PREDICTIONS mean in metrics. ``no_unique``, ``no_upper``, ``no_errors``: why these cannot be
    tested; "" if they can. ``accuracy``: of the unsteered model, which cannot fall by more. The gradient has
    to be beaten at both layers, as each method has a better one of its own."""
    most = wilson(0, random_directions)[1]
    too_few = (
        f"none of {random_directions} random directions may still mean {most:.0%} of all"
        if most > 0.5
        else ""
    )
    lose = "ablate_{}_{}{}_log_probability"
    kinds = ("", "_over_matched", "_over_random")
    less = lambda c, rule: [below(lose.format(c, rule, kind)) for kind in kinds]
    made = {
        "distilled": [below(f"ablate_{c}_distilled") for c in CATEGORIES],
        "base": [below(f"ablate_{c}_over_base") for c in CATEGORIES],
        "random": [below(f"ablate_{c}_over_random") for c in CATEGORIES],
        "per norm": [below(f"ablate_{c}_over_matched_per_norm") for c in CATEGORIES],
        "unique": no_unique or [condition for c in CATEGORIES for condition in less(c, "unique")],
        **{f"attributed, {c}": less(c, "attributed") for c in CATEGORIES},
        "errors": no_errors or [below("ablate_error_reflection_change"), below("ablate_error_over_random")],
        "random, steering": too_few or [below(f"{aim}_rivals", 0.5) for aim in AIMS],
        "gradient": [below(f"incisive_over_gradient_{layer}") for layer in found],
        "specific": [above("specific_share", 0.99)],
    }
    for layer in ("", *LAYER_NAMES):
        end, name = (f"_{layer}", f", {layer}") if layer else ("", "")
        longer = [above(f"overthink_length_ratio{end}", 1.5)]
        shorter = [below(f"incisive_length_ratio{end}", 0.85), above(f"incisive_accuracy_change{end}", -LOSS)]
        untested = no_upper if layer == "upper" and layer not in found else ""
        no_room = f"only {accuracy:.0%} of the unsteered answers are right" if accuracy < LOSS else ""
        made[f"over-thinking{name}"] = untested or longer
        made[f"incisive thinking{name}"] = untested or no_room or shorter
    return made


def observed(results: Results) -> dict[str, str]:
    """What the scoreboard shows in place of long lists of metrics."""

    def shown(names: str, end: str = "", digits: int = 2) -> str:
        return "; ".join(
            f"{c} {results.text(f'ablate_{names.format(c)}{end}', digits)}"
            for c in CATEGORIES
            if f"ablate_{names.format(c)}{end}" in results.metrics
        )

    end = "_log_probability"
    seen = {
        "distilled": f"{shown('{}_distilled')}; log-probability: {shown('{}_distilled', end)}",
        **{
            key: f"difference: {shown(f'{{}}_over_{key}')}; log-probability: {shown(f'{{}}_over_{key}', end)}"
            for key in ("base", "random")
        },
        "per norm": f"difference: {shown('{}_over_matched', '_per_norm')}; log-probability, not per norm:"
        f" {shown('{}_over_matched', end)}",
        "unique": f"{shown('{}_unique', end)}; minus matched: {shown('{}_unique_over_matched', end)}",
    }
    for c in CATEGORIES:
        own, matched, noise = (
            results.text(f"ablate_{c}_attributed{kind}{end}") for kind in ("", "_matched", "_random")
        )
        seen[f"attributed, {c}"] = f"{own}; matched {matched}; random {noise}"
    if all((name := f"{aim}_rivals") in results.metrics for aim in AIMS):
        of = f"of {results.metrics[name]['n']} directions"
        each = (f"{label} {results.text(f'{aim}_rivals')} {of}" for aim, label in AIM_NAMES.items())
        seen["random, steering"] = "; ".join(each)
    return seen
