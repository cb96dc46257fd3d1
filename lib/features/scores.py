"""Notebook 03's predictions as conditions on its metrics (``lib.verdicts``): one row each.

The predictions were written before the run and stay as they were; those on errors, and on what recurs, were
added after a trial run, and say so. One is called "held" only where it could have failed."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pandas as pd

from ..results import Results
from ..text.tables import table
from ..verdicts import Condition, above, below, judge
from .table import Inspection
from .uniqueness import Uniqueness

PREDICTIONS = table("predictions")
AT_LEAST_HALF = 0.49  # shares are of four categories at most, so that a half lies above it
FULL = 0.99  # AUROC of a control from which on nothing can be better than it


def scoreboard(
    results: Results, inspections: Sequence[Inspection], uniqueness: Sequence[Uniqueness]
) -> pd.DataFrame:
    """The scoreboard, also put into ``results`` as table scoreboard. A prediction about categories is about
    those that every crosscoder has a feature for (``Inspection.categories``)."""
    categories = [c for c in inspections[0].categories if all(c in i.categories for i in inspections)]
    conditions = _conditions(results, inspections, uniqueness[0], categories)
    tested = {name: own for name, own in conditions.items() if not isinstance(own, str)}
    observed = {name: _words(results, own, categories) for name, own in tested.items()}
    return judge(results, PREDICTIONS, conditions, observed)


def _conditions(
    results: Results, inspections: Sequence[Inspection], unique: Uniqueness, categories: Sequence[str]
) -> dict[str, list[Condition] | str]:
    def each(condition: Callable[..., Condition], name: str, limit: float = 0.0) -> list[Condition] | str:
        if not categories:
            return "no category has a feature in every crosscoder that could be tested"
        return [condition(f"{name}_{c}", limit) for c in categories]

    def with_null(conditions: list[Condition] | str) -> list[Condition] | str:
        return conditions if unique.null else "the null has not been computed"

    def known(name: str, conditions: list[Condition], why: str) -> list[Condition] | str:
        return conditions if _value(results, name) is not None else why

    several = len(inspections) > 1
    one = "there is only one crosscoder"
    sentence = {c: _value(results, f"sentence_only_auroc_{c}") for c in categories}
    first = {c: [_value(results, f"marker_{x}_{c}") for x in ("feature_auroc", "gain")] for c in categories}
    first = {c: None if None in pair else pair[0] - pair[1] for c, pair in first.items()}
    planted = [above("planted_precision", 0.9), above("planted_recall", 0.9)]
    no_errors = "the text does not say which steps are wrong"
    lasting = [c for c in categories if _value(results, f"stable_{c}") is not None]
    recurs = known("error_auroc", [above("error_recurrence", 0.79)], no_errors)
    spans = all(_value(results, f"subspace_gain_{c}") is not None for c in categories)
    conditions = {
        "aim": each(above, "auroc", 0.9),
        "token (control)": each(above, "gain_token"),
        "sentence (control)": _with_room(each(above, "gain"), sentence),
        "null": _both(each(above, "null_auroc", 0.45), each(below, "null_auroc", 0.55)),
        "unique": each(below, "any_nrn_gain", 0.02),
        "alone": each(above, "alone_gain"),
        "words": known("token_detectors_gap", [above("token_detectors_gap")], "too few features are alive"),
        "marker": _with_room(each(below, "marker_gain"), first),
        "use": with_null([above("use_gap")]),
        "use, where": known("use_thinking_gap", [above("use_thinking_gap")], "the text has no phases"),
        "injection": _injection(results, categories, each(below, "injection_rate", 0.5)),
        "verdict": each(above, "more_than_token", 0.5),
        "verdict, marker": known(
            "marker_token_features",
            [above("marker_token_features", AT_LEAST_HALF)],
            "no category has a feature at its first tokens",
        ),
        "above": with_null(each(above, "above_null", 0.5)),
        "stable": [above(f"stable_{c}", 0.7) for c in lasting] if several and lasting else one,
        "planted": planted if unique.planted else "the planted truth has not been computed",
        "error": known("error_auroc", [above("error_auroc", 0.9), above("error_gain")], no_errors),
        "error, unique": with_null(known("error_nu_eps", [above("error_beyond_null", 0.5)], no_errors)),
        "error, recurs": recurs if several else one,
        "subspace": each(above, "subspace_gain") if several and spans else one,
    }
    return {name: conditions[name] for name in PREDICTIONS}


def _value(results: Results, name: str) -> float | None:
    value = dict(results.metrics).get(name, {}).get("value")
    return None if value is None or np.isnan(value) else value


def _both(a: list[Condition] | str, b: list[Condition] | str) -> list[Condition] | str:
    return a if isinstance(a, str) else [*a, *b]


def _with_room(
    conditions: list[Condition] | str, control: Mapping[str, float | None]
) -> list[Condition] | str:
    """Without the categories whose control {category: AUROC} leaves nothing to be better at."""
    if isinstance(conditions, str):
        return conditions
    full = [c for c, auroc in control.items() if auroc is not None and auroc >= FULL]
    left = [x for x in conditions if not x.metric.endswith(tuple(f"_{c}" for c in full))]
    return left or f"the control's AUROC is {FULL} or more for {', '.join(full)}: nothing can be better"


def _injection(results: Results, categories: Sequence[str], conditions: list[Condition] | str):
    """A feature that fires before fewer than half of its own sentences would do so less at words put in."""
    if isinstance(conditions, str):
        return conditions
    rates = {c: _value(results, f"in_context_rate_{c}") for c in categories}
    rare = [c for c, rate in rates.items() if rate is None or rate < 0.5]
    tested = [x for x in conditions if not any(x.metric.endswith(f"_{c}") for c in rare)]
    failed = any(x.verdict(results.metrics[x.metric])[0] == "no" for x in tested)
    if failed or not rare:
        return tested
    return f"the features of {', '.join(rare)} fire before fewer than half of their own sentences"


def _words(results: Results, conditions: Sequence[Condition], categories: Sequence[str]) -> str:
    """The metrics of some conditions, with a category's name in place of the metric's where each has one, and
    the categories that are left out."""
    parts = []
    for metric in dict.fromkeys(c.metric for c in conditions):
        name = next((c for c in categories if metric.endswith(f"_{c}")), metric)
        parts.append(f"{name} {results.text(metric)}")
    about = {c for c in categories for x in conditions if x.metric.endswith(f"_{c}")}
    return "; ".join(parts + [f"{c} not testable" for c in categories if about and c not in about])
