"""Notebook 03's predictions, and what was observed: one row each, from the numbers in its results.

The predictions were written before the run and stay as they were."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import pandas as pd

from ..activations.positions import PHASES
from ..results import Results
from ..results import scoreboard as as_table
from ..text.tables import table
from .table import Inspection
from .uniqueness import Uniqueness

PREDICTIONS = table("predictions")


def scoreboard(
    results: Results,
    inspection: Inspection,
    uniqueness: Uniqueness,
    tests: pd.DataFrame,
    shuffled: Mapping[str, float],
    judged: pd.DataFrame,
) -> pd.DataFrame:
    """The scoreboard, also put into ``results`` as table scoreboard. ``tests`` and
    ``shuffled``: ``detectors.record``; ``judged``: ``token_tests.record``. A prediction about categories is
    undecided where no category could be tested."""
    value, text, categories = results.values, results.text, inspection.categories
    row = {(r.category, r.predictor): r for r in tests.itertuples()}
    verdict = {(r.where, r.category): r.verdict for r in judged.itertuples()}
    at_first_token = [v for (where, c), v in verdict.items() if where == "marker" and c in categories]
    token_features = at_first_token.count("token feature")
    low, high = (results.metrics[f"token_detectors_{group}"] for group in ("lowest", "highest"))
    overlap = low["ci"][0] <= high["ci"][1] and high["ci"][0] <= low["ci"][1]
    sizes = {phase: value[f"use_size_{phase}"] for phase in PHASES if f"use_size_{phase}" in value}
    above = {c: bool(uniqueness.above[inspection.chosen[c]]) for c in categories}
    stability = {c: uniqueness.stability.get(inspection.chosen[c], np.nan) for c in categories}
    excess = {c: value[f"any_nrn_auroc_{c}"] - value[f"auroc_{c}"] for c in categories}
    by_model = {c: [row[c, f"{m} alone"].auroc for m in ("base", "distilled")] for c in categories}
    marker = {c: (value[f"marker_feature_auroc_{c}"], row[c, "token only, marker"].auroc) for c in categories}

    def each(describe: Callable[[str], str]) -> str:
        return "; ".join(f"{c} {describe(c)}" for c in categories) or "no labels"

    def every(holds: Callable[[str], bool]) -> bool | None:
        return all(map(holds, categories)) if categories else None

    def gain(control: str) -> tuple[str, bool | None]:
        return each(lambda c: f"{row[c, control].gain:+.2f}"), every(lambda c: row[c, control].gain_low > 0)

    outcomes = {
        "aim": (each(lambda c: text(f"auroc_{c}")), every(lambda c: value[f"auroc_{c}"] >= 0.9)),
        "token (control)": gain("token only"),
        "sentence (control)": gain("sentence only"),
        "null": (each(lambda c: f"{shuffled[c]:.2f}"), every(lambda c: abs(shuffled[c] - 0.5) <= 0.05)),
        "unique": (
            each(lambda c: f"{excess[c]:+.2f} at NRN {value[f'any_nrn_{c}']:.2f}"),
            every(lambda c: excess[c] <= 0.02),
        ),
        "alone": (
            each(lambda c: "{:.2f} base, {:.2f} distilled".format(*by_model[c])),
            every(lambda c: by_model[c][0] < by_model[c][1]),
        ),
        "words": (
            f"{text('token_detectors_lowest')} lowest, {text('token_detectors_highest')} highest",
            None if overlap else low["value"] > high["value"],
        ),
        "marker": (
            each(lambda c: "{:.2f}, token {:.2f}".format(*marker[c])),
            every(lambda c: marker[c][0] <= marker[c][1]),
        ),
        "use": (
            f"{text('use_reweighted')} used differently, {text('use_unique')} unique",
            value["use_reweighted"] > value["use_unique"] if uniqueness.null and categories else None,
        ),
        "use, where": (
            "; ".join(f"{phase} {text(f'use_size_{phase}')}" for phase in sizes),
            max(sizes, key=sizes.get) == "thinking" if "thinking" in sizes and categories else None,
        ),
        "injection": (
            each(lambda c: text(f"injection_rate_{c}")),
            every(lambda c: results.metrics[f"injection_rate_{c}"]["ci"][1] < 0.5),
        ),
        "verdict": (
            each(lambda c: verdict.get(("before", c), "not tested")),
            every(lambda c: verdict.get(("before", c)) == "more than a token"),
        ),
        "verdict, marker": (
            f"{token_features} of {len(at_first_token)}",
            2 * token_features >= len(at_first_token) if at_first_token and categories else None,
        ),
        "above": (each(lambda c: str(above[c])), every(above.get) if uniqueness.null else None),
        "stable": (
            each(lambda c: f"{stability[c]:.2f}"),
            every(lambda c: stability[c] >= 0.7) if uniqueness.seeds else None,
        ),
        "planted": ("not computed", None),
    }
    if uniqueness.planted:
        worst = min(value["planted_precision"] or 0, value["planted_recall"])
        observed = f"{text('planted_precision')}, {text('planted_recall')}"
        outcomes["planted"] = observed, worst >= 0.9 if categories else None
    rows = [
        {"prediction": PREDICTIONS[key], "observed": observed, "held": held}
        for key, (observed, held) in outcomes.items()
    ]
    return results.table("scoreboard", as_table(rows))
