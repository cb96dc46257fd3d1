"""Use beside uniqueness: does one model activate a feature more often, or harder, than another on the same
text?

NRN asks in which model's decoder a feature stands; *use* asks in which model's activations it fires. A shared
feature (NRN 0.5) can be used differently. On the same token ids, every feature is encoded

- from each model alone, "slots": the model's activation stands in every slot of the crosscoder, times its own
  scale, as if all models were this one: its full input, hence the measure of use;
- from each model alone, "alone": its activation in its own slot, the others at their mean. It needs no equal
  widths, but about half of the input is missing;
- "joint": from both at once, the code that all other statistics are about.

The crosscoder was trained on neither of the first two: an encoder may take the models' *difference*, which
vanishes if one model stands in both slots (see ``explained``).

With S_m the sum of a feature's activation over the tokens as encoded from model m, n_m the number of tokens
on which it fires, and h half a typical activation::

    h                = (S_model + S_reference) / (n_model + n_reference) / 2
    change           = log (S_model + h) / (S_reference + h)             in nats; 0 alike, log 2 twice the use
    change_frequency = log (n_model + 1/2) / (n_reference + 1/2)
    difference       = (S_model - S_reference) / tokens

so that no log is infinite, and a feature that fires a handful of times cannot change by much. Intervals
resample documents; p is that of a t-test on the documents' differences, q its adjustment for all features
(Benjamini-Hochberg). With thousands of tokens nearly every difference is significant. Whether it is *large*
is judged against a pair in which nothing was distilled (``change_limit``, ``reweighted``).

Source: the question is that of 2026 crosscoder studies of distillation; the measures are ours."""

import warnings
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from scipy import sparse
from scipy.stats import false_discovery_control, ttest_1samp

from ..activations.positions import PHASES, groups_of
from ..activations.store import Store
from ..crosscoder.codes import check_models, encoded, sample_rows, sparse_codes
from ..crosscoder.model import CrossCoder
from ..device import the_device
from ..results import Results
from ..settings import UserError, check
from ..stats import bootstrap, group_weights, percentiles, ratio, wilson
from .auroc import sum_by
from .table import Inspection, record_difference
from .uniqueness import Uniqueness

SOLO = ("slots", "alone")
JOINT = "joint"


@dataclass(frozen=True)
class SoloCodes:
    """Features of the same tokens as encoded from each model alone, and from both: ``codes`` {model or
    "joint": sparse [n, F]}; ``rows`` [n] of the store, sorted; ``documents`` [n]."""

    rows: np.ndarray
    documents: np.ndarray
    codes: dict[str, sparse.csr_matrix]


@torch.no_grad()
def solo_codes(crosscoder: CrossCoder, store: Store, rows: np.ndarray, solo: str = "slots") -> SoloCodes:
    """Features of ``rows`` of the store, from each model alone (``solo``: "slots" or "alone", see above) and
    from both."""
    check("solo", solo, str, choices=SOLO)
    rows = np.sort(np.asarray(rows, dtype=np.int64))
    if len(rows) == 0:
        raise UserError("there are no rows to read: take a split that has tokens")
    parts: dict[str, list] = {name: [] for name in (*crosscoder.names, JOINT)}
    check_models(crosscoder, store)
    fill = "slots" if solo == "slots" else "mean"
    there = crosscoder.on(the_device())
    for _, acts, joint in encoded(crosscoder, store, rows, f"tokens read from each model ({solo})"):
        for name, own in zip(crosscoder.names, acts):
            parts[name].append(sparse_codes(there.encode_from(name, own, fill)))
        parts[JOINT].append(sparse_codes(joint))
    codes = {name: sparse.csr_matrix(sparse.vstack(part)) for name, part in parts.items()}
    return SoloCodes(rows, store.documents[rows], codes)


def explained(crosscoder: CrossCoder, store: Store, solo: SoloCodes) -> pd.DataFrame:
    """How much of each model's variance its own code, and the joint code, explain, in scaled space: columns
    model, reading ("solo" or "joint"), fve (share of the variance about the mean), l0.

    A solo code that explains much less than the joint one is off the crosscoder's usual input."""
    rows = []
    for m, name in enumerate(crosscoder.names):
        acts = store.activations(solo.rows)[store.models.index(name)].numpy()
        x = acts * float(crosscoder.scales[m])
        total = np.square(x - x.mean(0)).sum()
        for kind, codes in (("solo", solo.codes[name]), ("joint", solo.codes[JOINT])):
            x_hat = codes @ crosscoder.rows(name).numpy() + crosscoder.bias(name).numpy()
            rows.append((name, kind, 1 - np.square(x - x_hat).sum() / total, codes.nnz / len(solo.rows)))
    return pd.DataFrame(rows, columns=["model", "reading", "fve", "l0"])


def use_table(
    solo: SoloCodes,
    store: Store | None = None,
    by: str | None = None,
    n_boot: int = 200,
    seed: int = 0,
    model: str = "distilled",
    reference: str = "base",
) -> pd.DataFrame:
    """How the use of every feature differs between two models. A row per feature, and per group with ``by``
    (which needs the store).

    feature, group, alive    group: "all", or phase or category (``groups_of``); alive: it fires in one code
    frequency_<r>, mean_<r>, firing_mean_<r>    share of tokens on which it fires; mean activation over all
                             tokens, and over those on which it fires (NaN if none); r: each model, "joint"
    change, change_frequency, difference        ``model`` against ``reference``, each with _low and _high
    p, q                     t-test on the documents' differences of activation; q: over all alive rows
    """
    masks = {"all": np.ones(len(solo.rows), dtype=bool)} if by is None else groups_of(store, solo.rows, by)
    tables = [_use_in(solo, group, mask, n_boot, seed, model, reference) for group, mask in masks.items()]
    table = pd.concat(tables, ignore_index=True).assign(q=np.nan)
    tested = table["alive"].to_numpy()
    if tested.any():
        table.loc[tested, "q"] = false_discovery_control(table.loc[tested, "p"])
    return table


def _use_in(
    solo: SoloCodes, group: str, mask: np.ndarray, n_boot: int, seed: int, model: str, reference: str
) -> pd.DataFrame:
    documents, document = np.unique(solo.documents[mask], return_inverse=True)
    n, tokens = len(documents), int(mask.sum())
    sums = {}  # of every document: tokens on which each feature fires, and summed activation, [n, F] each
    for name in (reference, model, JOINT):
        codes = solo.codes[name][mask]
        sums[name] = tuple(sum_by(document, x, n).toarray() for x in (sparse.csr_matrix(codes > 0), codes))
    alive = np.any([fired.any(0) for fired, _ in sums.values()], axis=0)
    columns = {"feature": np.arange(len(alive)), "group": group, "alive": alive}
    for name, (fired, mass) in sums.items():
        columns |= {
            f"frequency_{name}": fired.sum(0) / tokens,
            f"mean_{name}": mass.sum(0) / tokens,
            f"firing_mean_{name}": ratio(mass.sum(0), fired.sum(0)),
        }
    (fired_r, mass_r), (fired_m, mass_m) = sums[reference], sums[model]
    half = np.nan_to_num(ratio((mass_r + mass_m).sum(0), (fired_r + fired_m).sum(0)), nan=1.0) / 2
    weights = group_weights(n, check("n_boot", n_boot, int, low=1), seed).astype(float)
    lengths = np.bincount(document, minlength=n).astype(float)
    statistics = {
        "change": lambda w: np.log((w @ mass_m + half) / (w @ mass_r + half)),
        "change_frequency": lambda w: np.log((w @ fired_m + 0.5) / (w @ fired_r + 0.5)),
        "difference": lambda w: (w @ (mass_m - mass_r)) / (w @ lengths)[:, None],
    }
    for name, statistic in statistics.items():
        columns[name] = statistic(np.ones((1, n)))[0]
        columns[f"{name}_low"], columns[f"{name}_high"] = percentiles(statistic(weights))
    with warnings.catch_warnings():
        # documents that are all alike: p is 0, or not defined and set below
        warnings.simplefilter("ignore", RuntimeWarning)
        p = ttest_1samp(mass_m - mass_r, 0.0, axis=0).pvalue if n > 1 else np.full(len(half), np.nan)
    # alive in the joint code only, or a single document: nothing speaks for a change
    columns["p"] = np.where(np.isnan(p), np.where(alive, 1.0, np.nan), p)
    return pd.DataFrame(columns)


def change_limit(null_table: pd.DataFrame, level: float = 0.01) -> float:
    """The |change| that a share ``level`` of the alive features exceeds in a pair in which nothing was
    distilled."""
    check("level", level, float, low=0, high=1)
    changes = null_table.loc[null_table["alive"].astype(bool), "change"].abs().dropna()
    if changes.empty:
        raise UserError("no feature of the null's table of use is alive: there is nothing to compare with")
    return float(np.quantile(changes, 1 - level))


def reweighted(table: pd.DataFrame, null_table: pd.DataFrame | float) -> np.ndarray:
    """Which rows of ``use_table`` change by more than the null does: bool [rows], False where dead.
    ``null_table``: the null's own table of use, or its ``change_limit``."""
    limit = null_table if isinstance(null_table, (int, float)) else change_limit(null_table)
    return (table["alive"].astype(bool) & (table["change"].abs() > limit)).to_numpy()


def kinds_of_change(table: pd.DataFrame, unique: np.ndarray, changed: np.ndarray) -> np.ndarray:
    """ "unique", "reweighted" (changed, and not unique), "unchanged", or "dead" for every row; ``unique``,
    ``changed`` bool [rows]."""
    dead = ~table["alive"].to_numpy(dtype=bool)
    return np.select([dead, unique, changed], ["dead", "unique", "reweighted"], "unchanged")


def record(
    results: Results,
    inspection: Inspection,
    uniqueness: Uniqueness,
    max_tokens: int,
    n_boot: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """Measure the use of all features on at most ``max_tokens`` of "report", and put it into ``results``.
    Returns ``use_table`` with columns nrn and ``kind`` (of change).

    Metrics fve_solo_<model>, l0_solo_<model>; use_significant, use_unique, use_reweighted (of all alive
    features), the last also with the median change taken away (_centred), use_change_median, use_limit;
    use_change_<c> of the chosen features; use_size_<phase>, the median |change| there; use_gap, reweighted
    minus unique; use_thinking_gap, the size while thinking minus the largest of the other phases. Tables use_
    readings, use_chosen, use_by_group."""
    crosscoder, store, nrn = inspection.crosscoder, inspection.store, inspection.table["nrn"]
    rows = sample_rows(store, "report", max_tokens, seed)
    solo = solo_codes(crosscoder, store, rows, "slots" if len(set(crosscoder.widths)) == 1 else "alone")
    quality, limit, measured = explained(crosscoder, store, solo), uniqueness.use_limit, bool(uniqueness.null)
    for row in quality[quality["reading"] == "solo"].itertuples():
        results.add(f"fve_solo_{row.model}", row.fve, n=len(rows))
        results.add(f"l0_solo_{row.model}", row.l0, n=len(rows))
    results.table("use_readings", quality.round(4))

    table = use_table(solo, n_boot=n_boot, seed=seed)
    table["nrn"] = nrn
    table["kind"] = kinds_of_change(table, uniqueness.outside, reweighted(table, limit))
    alive = table[table["alive"]]
    n, change = len(alive), alive["change"]
    shares = {name: alive["kind"] == name for name in ("unique", "reweighted")}
    shares["reweighted_centred"] = ((change - change.median()).abs() > limit) & ~shares["unique"]
    for name, hits in ({"significant": alive["q"] < 0.05} | shares).items():
        known = n > 0 and (measured or name == "significant")
        interval = wilson(int(hits.sum()), n) if known else None
        results.add(f"use_{name}", hits.mean() if known else np.nan, interval, n)
    interval = bootstrap(change, np.median, n_boot=n_boot, seed=seed)
    results.add("use_change_median", change.median(), interval, n)
    results.add("use_limit", limit)

    columns = [f"frequency_{reading}" for reading in ("base", "distilled", JOINT)]
    columns += ["change", "change_low", "change_high", "q", "kind"]
    chosen = inspection.chosen.items()
    of_chosen = pd.DataFrame(
        [{"category": c, "feature": f, "NRN": nrn[f], **table.loc[f, columns]} for c, f in chosen]
    )
    for row in of_chosen.itertuples():
        results.add(f"use_change_{row.category}", row.change, (row.change_low, row.change_high), len(rows))
    results.table("use_chosen", of_chosen.round(4))

    tables = (use_table(solo, store, by, 2, seed).assign(by=by) for by in ("phase", "category"))
    by_group = pd.concat(tables, ignore_index=True).query("alive")
    by_group["size"] = by_group["change"].abs()
    summary = by_group.groupby(["by", "group"], sort=False).agg(
        features=("change", "size"),
        median=("change", "median"),
        median_size=("size", "median"),
        significant=("q", lambda q: (q < 0.05).mean()),
    )
    results.table("use_by_group", summary.reset_index().round(4))
    for phase, part in by_group[by_group["by"] == "phase"].groupby("group", sort=False):
        interval = bootstrap(part["size"], np.median, n_boot=n_boot, seed=seed)
        results.add(f"use_size_{phase}", part["size"].median(), interval, len(part))
    record_difference(results, "use_gap", "use_reweighted", "use_unique")
    sizes = {phase: results.values.get(f"use_size_{phase}") for phase in PHASES}
    rest = {phase: size for phase, size in sizes.items() if phase != "thinking" and size is not None}
    if sizes["thinking"] is not None and rest:
        largest = max(rest, key=rest.get)
        record_difference(results, "use_thinking_gap", "use_size_thinking", f"use_size_{largest}")
    return table
