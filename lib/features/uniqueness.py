"""Which features are unique, and how far that can be believed: scores, the null's thresholds, other seeds.

The scores of one feature are NRN (p = 1 and 2) and latent scaling's nu (``latent_scaling``). A threshold is
a quantile of a score among the features of a *null* pair: the base, and a continuation of it that learnt no
thinking. ``lib.study.nulls`` computes it, and ``beyond`` applies it. ``record_all`` gathers what is known of
the features of a run's crosscoders: which lie beyond the null (nu_eps first, NRN beside it), which of them
recur, and how often the rule is right on planted data.

How many features lie beyond a limit by chance is said twice: level x features, and the share of another
null's crosscoder beyond the same limit, which also has the limit's error in it. The false-discovery rate is
that share over the share of the pair's features."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from ..activations.store import Store
from ..crosscoder.codes import codes
from ..crosscoder.model import CrossCoder
from ..crosscoder.recurrence import SHARE, chance
from ..labels import DETECTED
from ..results import Part, Results, read_part
from ..stats import wilson
from . import control
from .latent_scaling import latent_scaling
from .table import Inspection, as_shares, category_detectors, frequency, over_crosscoders, record_share

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
) -> pd.DataFrame:
    """Every score of uniqueness of every feature on tokens of "report": feature, alive, frequency, nrn,
    nrn_p2, and the columns of ``latent_scaling``; ``side`` "distilled" means that of ``model``."""
    coded = codes(crosscoder, store, "report", max_tokens)
    table = pd.DataFrame({"feature": np.arange(crosscoder.n_features), "frequency": frequency(coded)})
    table.insert(1, "alive", table["frequency"] > 0)
    for name, p in (("nrn", 1), ("nrn_p2", 2)):
        table[name] = crosscoder.nrn(p, model, reference).numpy()
    scaling = latent_scaling(crosscoder, store, coded.rows, model, reference, n_boot)
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
    """``unique`` [F]: nu_eps beyond the null's 1% threshold on the distilled model's side; ``above``,
    ``below`` [F]: NRN beyond it on the distilled model's, on the base's side (all False without a null);
    ``threshold`` of NRN (NaN); ``status``: one row per chosen feature; ``null``, ``planted``: parts of the
    study, empty where they were not computed."""

    unique: np.ndarray
    above: np.ndarray
    below: np.ndarray
    threshold: float
    status: pd.DataFrame
    null: Part
    planted: Part

    @property
    def outside(self) -> np.ndarray:
        """NRN beyond the null on either side, [F]."""
        return self.above | self.below

    def words(self, feature: int) -> str:
        """Whether a feature lies beyond the null, in words."""
        if not self.null:
            return "no null to compare with"
        sides = [name for name, hits in (("nu", self.unique), ("NRN", self.above)) if hits[feature]]
        return f"beyond the null by {' and '.join(sides)}" if sides else "not beyond the null"

    @property
    def use_limit(self) -> float:
        """The change of use that 1% of the null's features exceed (``use.change_limit``); or NaN."""
        return self.null.metrics["use_limit"]["value"] if self.null.metrics else np.nan


def of_seed(table: pd.DataFrame, number: int) -> pd.DataFrame:
    """The rows of a null's table that belong to the crosscoder ``number``: column "seed", counted from the
    lowest and from the beginning again; the whole table, if it has no such column."""
    if "seed" not in table:
        return table
    seeds = sorted(table["seed"].unique())
    return table[table["seed"] == seeds[number % len(seeds)]].reset_index(drop=True)


def record_all(results: Results, inspections: Sequence[Inspection]) -> list[Uniqueness]:
    """What the study's parts "nulls" and "planted" say of the features of a run's crosscoders, put into
    ``results``; parts that were made from other crosscoders are refused.

    Metrics of ``record``, pooled; stability_median, stability_chance; recurrent_clusters; unique_recurrent:
    clusters of features that lie beyond the null by nu_eps in at least 4 of 5 crosscoders (n: of so many
    recurrent clusters), unique_recurrent_nrn the same by NRN; and those of "planted". For a pair in which
    something was planted also those of ``control.record_all``, and control_null_found: recurrent features
    beyond the null in a crosscoder of the null itself."""
    every = [i.fingerprint for i in inspections]
    made_from = {"crosscoder": every[0]} | ({"crosscoders": every} if len(every) > 1 else {})
    null, planted = (read_part(results.run, name, **made_from) for name in ("nulls", "planted"))
    unique = over_crosscoders(results, record, inspections, null, planted)
    as_shares(results, "unique", "above_null")
    if inspections[0].pair and inspections[0].pair.planted:
        recurrent = [i.table.get("recurrent", pd.Series(True, i.table.index)).to_numpy() for i in inspections]
        control.record_all(results, inspections, [u.unique & r for u, r in zip(unique, recurrent)])
        nothing = {"value": None, "ci": None, "n": None}
        results.metrics["control_null_found"] = null.metrics.get("control_null_found", nothing)
    results.take(planted)
    _record_used_rule(results, planted)
    if len(inspections) == 1:
        return unique
    tables = [i.table for i in inspections]
    median, alive = results.metrics["stability_median"], [t["alive"].to_numpy(bool) for t in tables]
    results.add("stability_chance", chance([i.crosscoder for i in inspections], alive), n=median["n"])
    judged = [t.assign(unique=u.unique, above=u.above) for t, u in zip(tables, unique)]
    clusters = pd.concat([t[t["recurrent"]] for t in judged]).groupby("cluster")
    n, least = len(clusters), np.ceil(SHARE * len(tables))
    results.add("recurrent_clusters", n)
    for name, column in (("unique_recurrent", "unique"), ("unique_recurrent_nrn", "above")):
        hits = int((clusters[column].sum() >= least).sum()) if null else np.nan
        results.add(name, hits, n=n)
    return unique


def record(results: Results, inspection: Inspection, null: Part, planted: Part) -> Uniqueness:
    """Put into ``results`` which features of one crosscoder lie beyond the ``null``.

    Metrics: nu_eps_threshold, nrn_threshold; unique_by_nu and its share of the alive features, unique_above_
    null (by NRN) and its share; for both ("nu", "nrn") <score>_chance, the count that level x features gives,
    <score>_false, the share of another null crosscoder beyond the same limit, with <score>_false_discovery,
    how much of the count that explains; of those above the null's NRN the shares whose nu says unique
    (unique_nu_eps_under_0_2), shrunk, decoupled. nu_median: of the alive features of the distilled side, nu_
    median_null of the null's. unique_<c>, above_null_<c>: 1 if the chosen feature lies beyond. stability_
    median; stable_<c>: of the feature that would be chosen if it need not recur. Table status: a row per
    chosen feature."""
    table, number, nowhere = inspection.table, inspection.number, np.zeros(len(inspection.table), dtype=bool)
    alive, limits = int(table["alive"].sum()), None
    scored = "nu_eps" in table and table["nu_eps"].notna().any()
    above, below, unique, by_nrn = nowhere, nowhere, nowhere, np.nan
    nu = extremity(table, "nu_eps", "distilled") if scored else pd.Series(dtype=float)
    results.add("nu_median", -nu.median() if len(nu) else np.nan, n=len(nu))
    if null:
        limits = of_seed(null.tables["thresholds"], number)
        above, below = (beyond(table, limits, "nrn", side) for side in SIDES)
        unique = beyond(table, limits, "nu_eps") if scored and _has(limits, "nu_eps") else nowhere
        by_nrn = results.add("nrn_threshold", threshold(limits, "nrn"))
    results.add("unique_above_null", above.sum() if null else np.nan, n=alive)
    results.add("unique_by_nu", unique.sum() if null else np.nan, n=alive)
    if null:
        results.add("unique_above_null_share", above.mean(), wilson(int(above.sum()), alive), alive)
        results.add("unique_by_nu_share", unique.mean(), wilson(int(unique.sum()), alive), alive)
        for score, short, hits in (("nu_eps", "nu", unique), ("nrn", "nrn", above)):
            if _has(limits, score):
                n = len(extremity(table, score, "distilled"))
                _record_chance(results, short, score, hits, n, limits, null, number)
        if scored:
            with_nu = table[above & table["nu_eps"].notna()]
            record_share(results, "unique_nu_eps_under_0_2", with_nu["nu_eps_high"] < 0.2)
            record_share(results, "unique_shrunk", with_nu["nu_eps_low"] > 0.2)
            record_share(results, "unique_decoupled", with_nu["nu_r_low"] > 0.5)
    chosen = inspection.chosen
    features = list(chosen.values())
    for c in DETECTED:
        known = null and c in chosen
        results.add(f"unique_{c}", float(unique[chosen[c]]) if known else np.nan)
        results.add(f"above_null_{c}", float(above[chosen[c]]) if known else np.nan)
    stability = table.get("stability", pd.Series(np.nan, table.index))
    if "stability" in table:
        results.add("stability_median", stability[table["alive"]].median(), n=alive)
        free = category_detectors(table.drop(columns="recurrent"))
        for c in DETECTED:
            results.add(f"stable_{c}", stability[free[c].feature] if c in free else np.nan)
        lasting = stability[unique]
        results.add("stability_unique_median", lasting.median(), n=len(lasting))
    status = {"category": list(chosen), "feature": features}
    for name, column in (("nu (error)", "nu_eps"), ("nu (reconstruction)", "nu_r")):
        status[name] = table.get(column, pd.Series(np.nan, table.index))[features].to_numpy()
    status |= {"beyond the null by nu": unique[features], "NRN": table["nrn"][features].to_numpy()}
    status |= {"above the null": above[features], "stability over seeds": stability[features].to_numpy()}
    status = results.table("status", pd.DataFrame(status))
    return Uniqueness(unique, above, below, by_nrn, status, null, planted)


def _has(limits: pd.DataFrame, score: str) -> bool:
    return (limits["score"] == score).any()


def _record_chance(
    results: Results,
    short: str,
    score: str,
    hits: np.ndarray,
    n: int,
    limits: pd.DataFrame,
    null: Part,
    number: int,
) -> None:
    """How many of the ``n`` features with a score lie beyond the limit by chance, and how many of the
    ``hits`` that explains; see ``record``."""
    results.add(f"{score}_threshold", threshold(limits, score))
    results.add(f"{short}_chance", LEVELS[0] * n, n=n)
    others = null.tables.get("null_scores")
    if others is None:
        return
    pairs = others["pair"].unique()  # the last one tests the limits; if there is one, another seed of it does
    other = of_seed(others[others["pair"] == pairs[-1]], number + (len(pairs) == 1))
    hit, of = int(beyond(other, limits, score).sum()), len(extremity(other, score, "distilled"))
    false = hit / of if of else np.nan
    results.add(f"{short}_false", false, wilson(hit, of) if of else None, of)
    discovered = hits.sum() / n if n else 0
    rate = min(1.0, false / discovered) if discovered else np.nan
    results.add(f"{short}_false_discovery", rate, n=int(hits.sum()))
    if short == "nu":
        results.add("nu_median_null", -extremity(other, score, "distilled").median(), n=of)


def _record_used_rule(results: Results, planted: Part) -> None:
    """Precision and recall on planted data of the rules that are used, NRN (planted_<name>_used) and nu
    (planted_<name>_nu) beyond a null, if the part has them."""
    if "summary" not in planted.tables:
        return
    ours = planted.tables["summary"].query(
        "setting == @REGIME and split == 'report' and side == 'distilled' and architecture == 'batchtopk'"
    )
    for rule, score in (("used", "nrn_p1"), ("nu", "nu_eps")):
        for row in ours[ours["method"] == f"{score} beyond null"].to_dict("records"):
            for name in ("precision", "recall"):
                interval = row[f"{name}_low"], row[f"{name}_high"]
                results.add(f"planted_{name}_{rule}", row[name], interval, row["seeds"])
