"""Which features are unique, and how far that can be believed: scores, the null's thresholds, other seeds.

The scores of one feature are NRN (p = 1 and 2) and latent scaling's nu (``latent_scaling``). A threshold is
a quantile of a score among the features of a *null* pair: the base, and a continuation of it that learnt no
thinking. ``lib.study.nulls`` computes it, and ``beyond`` applies it. ``record`` gathers what the study says
of the features of one run: which lie beyond the null, which recur with other seeds of the crosscoder, and how
often the rule is right on planted data.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd

from ..activations.store import Store
from ..crosscoder.codes import codes
from ..crosscoder.model import CrossCoder
from ..results import Part, Results, read_part
from ..stats import wilson
from .latent_scaling import latent_scaling
from .table import frequency, record_share

LEVELS = (0.01, 0.05)
# score: does a unique feature of the distilled side have a high or a low one?
SCORES = {"nrn": "high", "nrn_p2": "high", "nu_eps": "low", "nu_r": "low"}
SIDES = ("distilled", "base")
REGIME = "our regime"  # the setting of the planted data that is like this pair's


def score_table(
    crosscoder: CrossCoder,
    store: Store,
    max_tokens: int | None = None,
    model: str = "distilled",
    reference: str = "base",
    n_boot: int = 200,
    seed: int = 0,
) -> pd.DataFrame:
    """Every score of uniqueness of every feature on tokens of "report": feature, alive, frequency, nrn,
    nrn_p2, and the columns of ``latent_scaling``; ``side`` "distilled" means that of ``model``."""
    coded = codes(crosscoder, store, "report", max_tokens, seed)
    table = pd.DataFrame({"feature": np.arange(crosscoder.n_features), "frequency": frequency(coded)})
    table.insert(1, "alive", table["frequency"] > 0)
    for name, p in (("nrn", 1), ("nrn_p2", 2)):
        table[name] = crosscoder.nrn(p, model, reference).numpy()
    scaling = latent_scaling(crosscoder, store, coded.rows, model, reference, n_boot, seed)
    # the roles, which all pairs have alike
    scaling["side"] = scaling["side"].replace(dict(zip((model, reference), SIDES)))
    return table.merge(scaling, on="feature", validate="1:1")


def sign(score: str, side: str) -> float:
    """1 where a larger score is more unique to the side, -1 where a smaller one is."""
    return 1.0 if SCORES[score] == "high" and side == "distilled" else -1.0


def extremity(table: pd.DataFrame, score: str, side: str) -> pd.Series:
    """The score of the alive features that a side has, with the sign for which larger is more unique; indexed
    like ``table``."""
    usable, values = table["alive"].astype(bool) & table[score].notna(), table[score]
    if score.startswith("nu"):
        # Of a side only the features whose longer row is there. What the other model does not have has a nu
        # of 0; below 0 it uses the opposite of the direction, which is no absence.
        usable, values = usable & (table["side"] == side), values.abs()
    return values[usable] * sign(score, side)


def beyond(
    table: pd.DataFrame, limits: pd.DataFrame, score: str, side: str = "distilled", level: float = LEVELS[0]
) -> np.ndarray:
    """Which features of a ``score_table`` (or a feature table with its columns) lie beyond the null's
    threshold, bool [F]."""
    values = extremity(table, score, side)
    limit = sign(score, side) * threshold(limits, score, side, level)
    return (values > limit).reindex(table.index, fill_value=False).to_numpy()


def threshold(limits: pd.DataFrame, score: str, side: str = "distilled", level: float = LEVELS[0]) -> float:
    """The null's threshold of one score. ``limits``: ``lib.study.nulls.thresholds``."""
    rows = limits[(limits["score"] == score) & (limits["side"] == side)]
    return rows.loc[np.isclose(rows["level"], level), "threshold"].iloc[0]


@dataclass(frozen=True)
class Uniqueness:
    """``above``, ``below`` [F]: NRN beyond the null's 1% threshold on the distilled model's, on the base's
    side (False everywhere without a null); ``threshold``: the former's (NaN); ``status``: one row per chosen
    feature; ``null``, ``seeds``, ``planted``: parts of the study, empty where they were not computed."""

    above: np.ndarray
    below: np.ndarray
    threshold: float
    status: pd.DataFrame
    stability: pd.Series
    null: Part
    seeds: Part
    planted: Part

    @property
    def outside(self) -> np.ndarray:
        """Beyond the null on either side, [F]."""
        return self.above | self.below

    def words(self, feature: int) -> str:
        """Whether a feature lies above the null, in words."""
        if not self.null:
            return "no null to compare with"
        return "above the null" if self.above[feature] else "not above the null"

    @property
    def use_limit(self) -> float:
        """The change of use that 1% of the null's features exceed (``use.change_limit``); or NaN."""
        return self.null.metrics["use_limit"]["value"] if self.null.metrics else np.nan


def record(results: Results, table: pd.DataFrame, chosen: Mapping[str, int], crosscoder: str) -> Uniqueness:
    """Put into ``results`` what the study's parts "nulls", "seeds" and "planted" say of the features of
    ``table``, and of those ``chosen`` {category: feature}. ``crosscoder`` is its fingerprint: parts that were
    made from another one are refused.

    Metrics: nrn_threshold; unique_above_null and its share of the alive features; of those above it the
    shares whose nu says unique (nu_eps_under_0_2), shrunk, decoupled; and those of "seeds" and "planted".
    Table status: a row per chosen feature.
    """
    parts = (read_part(results.run, name, crosscoder=crosscoder) for name in ("nulls", "seeds", "planted"))
    null, seeds, planted = parts
    limits, alive, limit = null.tables.get("thresholds"), int(table["alive"].sum()), np.nan
    above, below = (
        beyond(table, limits, "nrn", side) if null else np.zeros(len(table), dtype=bool) for side in SIDES
    )
    results.add("unique_above_null", above.sum() if null else np.nan, n=alive)
    if null:
        limit = threshold(limits, "nrn")
        results.add("unique_above_null_share", above.mean(), wilson(int(above.sum()), alive), alive)
        results.add("nrn_threshold", limit)
        with_nu = table[above & table["nu_eps"].notna()]
        record_share(results, "unique_nu_eps_under_0_2", with_nu["nu_eps_high"] < 0.2)
        record_share(results, "unique_shrunk", with_nu["nu_eps_low"] > 0.2)
        record_share(results, "unique_decoupled", with_nu["nu_r_low"] > 0.5)
    for name, m in (seeds.metrics | planted.metrics).items():
        results.add(name, m["value"], m["ci"], m["n"])
    if planted:
        rule = planted.tables["summary"].query(
            "setting == @REGIME and split == 'report' and side == 'distilled'"
            " and architecture == 'batchtopk' and method == 'nrn_p1 beyond null'"
        )
        rule = rule.iloc[0]
        for name in ("precision", "recall"):
            interval = rule[f"{name}_low"], rule[f"{name}_high"]
            results.add(f"planted_{name}_used", rule[name], interval, rule["seeds"])
    stability = (
        seeds.tables["stability"].set_index("feature")["stability"] if seeds else pd.Series(dtype=float)
    )
    features = list(chosen.values())
    status = {"category": list(chosen), "feature": features, "NRN": table["nrn"][features].to_numpy()}
    status["above the null"] = above[features]
    for name, column in (("nu (error)", "nu_eps"), ("nu (reconstruction)", "nu_r")):
        status[name] = table.get(column, pd.Series(np.nan, table.index))[features].to_numpy()
    status["stability over seeds"] = stability.reindex(features).to_numpy()
    status = results.table("status", pd.DataFrame(status))
    return Uniqueness(above, below, limit, status, stability, null, seeds, planted)
