"""What the features mean: one row of statistics per feature, labels from ground truth, and the best detector
of each category.

    made = inspect(crosscoder, store, folder, crosscoder_mark, tokenizer)     # or loaded, if it was made before
    made.table        one row per feature (``feature_table``)
    made.chosen       {category: feature}, chosen on the choose split (``category_features``)
    made.contexts     where each feature is most active (``contexts.top_contexts``)

**Two positions.** A sentence of category c is *foretold* at the position before it: the end of the sentence
that precedes it, where the model decides what comes next. Positives are sentence ends in traces that are
followed by a sentence of c, negatives all other sentence ends in traces. And it is *marked* at its first
token ("wait"), against the first tokens of all other sentences in traces; there the token itself gives the
answer away, so a high AUROC means little.

**Two splits.** Features and thresholds are chosen on the split "choose" (columns ``..._choose``) and reported
on "report"; the crosscoder was trained on neither.

How far a feature foretells its category, and whether anything simpler does too, is the business of
``lib.features.detectors``.

Source: Baek & Tegmark 2025 (arXiv 2503.03730), where a language model labels features from their contexts;
here the labels are known.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import sparse
from transformers import PreTrainedTokenizerBase

from ..activations.positions import is_category, positions
from ..activations.store import Store, open_store
from ..crosscoder.codes import Coded, codes
from ..crosscoder.model import CrossCoder
from ..crosscoder.sharing import open_for_run
from ..labels import DETECTED, LABELS
from ..models.pairs import Pair
from ..runs import Run, fingerprint, is_current, read_manifest, write_manifest, write_text
from ..settings import UserError, check
from . import auroc as detection
from .contexts import top_contexts
from .latent_scaling import latent_scaling

MADE_BY = "03_inspect_features"
VERSION = 2  # of the statistics: raised when their definition changes, so that older tables count as stale
# what the file of a crosscoder from elsewhere may not say (``sharing.open_crosscoder``)


@dataclass(frozen=True)
class Inspection:
    """All that notebook 03 computes and keeps."""

    table: pd.DataFrame
    chosen: dict[str, int]
    contexts: pd.DataFrame
    choose: Coded
    report: Coded


# --- the table ----------------------------------------------------------------------------------------------


def feature_table(
    crosscoder: CrossCoder,
    store: Store,
    choose: Coded,
    report: Coded,
    tokenizer: PreTrainedTokenizerBase | None = None,
    of: str = "distilled",
    against: str = "base",
) -> pd.DataFrame:
    """One row per feature.

    feature, alive       alive: it fires on at least one of the report tokens
    nrn, nrn_p2, cosine  decoder rows of the models ``of`` and ``against`` (p = 1, p = 2; cosine NaN for
    unlike widths) frequency            share of tokens on which it fires; mean_activation, max_activation:
    over the tokens on which it fires token_r2             share of its variance that the current token's
    identity explains (``detection.token_r2``) label ...            what it is about, from ground truth
    (``describe``); token ids as words if there is a ``tokenizer`` auroc_<c>, threshold_<c>, precision_<c>,
    recall_<c>     position before a sentence of c; the threshold is chosen on choose
    auroc_marker_<c>     first token of a sentence of c
    ..._choose           the same on the choose split
    """
    norms = crosscoder.norms(1)
    same = crosscoder.widths[crosscoder.names.index(of)] == crosscoder.widths[crosscoder.names.index(against)]
    columns = {
        "feature": np.arange(crosscoder.n_features),
        "alive": None,
        "nrn": crosscoder.nrn(1, of, against).numpy(),
        "nrn_p2": crosscoder.nrn(2, of, against).numpy(),
        "cosine": crosscoder.cosine(against, of).numpy() if same else np.full(crosscoder.n_features, np.nan),
    }
    columns |= {f"norm_{name}": norms[m].numpy() for m, name in enumerate(crosscoder.names)}
    for suffix, coded in (("", report), ("_choose", choose)):
        fired = np.asarray((coded.codes > 0).sum(axis=0)).ravel()
        columns[f"frequency{suffix}"] = fired / len(coded.rows)
        columns[f"mean_activation{suffix}"] = np.asarray(coded.codes.sum(axis=0)).ravel() / np.maximum(
            fired, 1
        )
    columns["alive"] = columns["frequency"] > 0
    columns["max_activation"] = _largest(report)
    columns["token_r2"] = detection.token_r2(
        choose.codes, store.tokens[choose.rows], report.codes, store.tokens[report.rows]
    )
    frame = pd.DataFrame(columns).join(describe(store, report, tokenizer))
    return frame.join(_detection_columns(store, choose, report))


def _largest(coded: Coded) -> np.ndarray:
    """Largest activation of every feature, [F]."""
    return coded.codes.max(axis=0).toarray().ravel()


def _detection_columns(store: Store, choose: Coded, report: Coded) -> pd.DataFrame:
    found = {}
    for where, infix in (("before", ""), ("marker", "marker_")):
        thresholds = None
        for suffix, coded in (("_choose", choose), ("", report)):
            index, labels = positions(store, coded.rows, where)
            at, positive = coded.codes[index], is_category(labels)
            aurocs = detection.auroc(at, positive)
            found |= {f"auroc_{infix}{c}{suffix}": aurocs[:, i] for i, c in enumerate(DETECTED)}
            if where == "before" and thresholds is None:
                thresholds = detection.best_thresholds(at, positive)
            elif where == "before":
                precision, recall = detection.precision_recall(at, positive, thresholds)
                for i, c in enumerate(DETECTED):
                    found |= {
                        f"threshold_{c}": thresholds[:, i],
                        f"precision_{c}": precision[:, i],
                        f"recall_{c}": recall[:, i],
                    }
    return pd.DataFrame(found)


def describe(store: Store, coded: Coded, tokenizer: PreTrainedTokenizerBase | None = None) -> pd.DataFrame:
    """What each feature's activation mass falls on, from ground truth; one row per feature.

    top_token, top_token_share   the token (a word, or its id) with most of the mass, and its share of it
    label_share, enrichment      for the label below: share of the mass that falls there, and this over the
    share of tokens there
                                 ("mixed": for the sentences with most of the mass)
    label   the first that holds:
            "before c"           at least half of the mass lies on sentence ends that are followed by c, and of the mass on
                                 sentence ends these hold at least twice their share
            "at sentence ends"   at least 0.8 of the mass lies on sentence ends in traces
            "in c"               at least half lies in sentences of c (c may be "general" or "other")
            "in traces"          at least 0.8 lies in traces
            "mixed";  "" where nothing fires or nothing is labelled
    """
    own, before = store.labels["label"][coded.rows].astype(int), np.full(len(coded.rows), -1)
    index, following = positions(store, coded.rows, "before")
    before[index] = following
    mass = np.maximum(np.asarray(coded.codes.sum(axis=0), dtype=float).ravel(), 1e-300)
    inside = detection.sum_by(own, coded.codes, len(LABELS)).toarray() / mass
    ahead = detection.sum_by(before, coded.codes, len(LABELS)).toarray() / mass
    share_inside = np.bincount(own[own >= 0], minlength=len(LABELS)) / max(len(own), 1)
    share_ahead = np.bincount(before[before >= 0], minlength=len(LABELS)) / max(len(before), 1)
    foretells, lies = ahead.argmax(0), inside.argmax(0)
    number = np.arange(len(mass))
    among_ends = ahead[foretells, number] / np.maximum(ahead.sum(0), 1e-300)
    usual = share_ahead / max(share_ahead.sum(), 1e-300)
    is_ahead = (ahead[foretells, number] >= 0.5) & (among_ends >= np.minimum(2 * usual[foretells], 0.99))
    ends, traces = np.zeros(len(before), dtype=int), (store.labels["kind"][coded.rows] == 1).astype(int)
    ends[index] = 1
    at_end, in_traces = (
        detection.sum_by(which, coded.codes, 2).toarray()[1] / mass for which in (ends, traces)
    )
    known = (mass > 1e-300) & (inside.sum(0) > 0)
    names = np.array(LABELS)
    cases = [is_ahead, at_end >= 0.8, inside[lies, number] >= 0.5, in_traces >= 0.8]
    words = [
        np.char.add("before ", names[foretells]),
        "at sentence ends",
        np.char.add("in ", names[lies]),
        "in traces",
    ]
    label = np.select(cases, words, "mixed")
    share = np.select(
        cases, [ahead[foretells, number], at_end, inside[lies, number], in_traces], inside[lies, number]
    )
    expected = np.select(
        cases, [share_ahead[foretells], ends.mean(), share_inside[lies], traces.mean()], share_inside[lies]
    )
    by_token = detection.sum_by(store.tokens[coded.rows], coded.codes, int(store.tokens.max()) + 1).tocsc()
    top = np.asarray(by_token.argmax(axis=0)).ravel()
    top_words = np.array(tokenizer.convert_ids_to_tokens(top.tolist()) if tokenizer else top, dtype=object)
    return pd.DataFrame(
        {
            "label": np.where(known, label, ""),
            "label_share": np.where(known, share, np.nan),
            "enrichment": np.where(known, share / np.maximum(expected, 1e-300), np.nan),
            "top_token": np.where(mass > 1e-300, top_words, ""),
            "top_token_share": np.where(mass > 1e-300, by_token.max(axis=0).toarray().ravel() / mass, np.nan),
        }
    )


# --- choosing -----------------------------------------------------------------------------------------------


def category_features(
    table: pd.DataFrame, nrn_over: float = 0.5, where: str = "before", categories: Sequence[str] = DETECTED
) -> dict[str, int]:
    """{category: the feature that foretells it best on the choose split}, among alive features with NRN above
    ``nrn_over``.

    ``where`` "marker": that tells its first tokens best. ``nrn_over`` -1 admits every NRN. A category for
    which nothing can be chosen is left out.
    """
    infix = {"before": "", "marker": "marker_"}[where]
    usable = table[table["alive"].astype(bool) & (table["frequency_choose"] > 0) & (table["nrn"] > nrn_over)]
    chosen = {}
    for c in categories:
        aurocs = usable.set_index("feature")[f"auroc_{infix}{c}_choose"].dropna()
        if len(aurocs):
            chosen[c] = int(aurocs.idxmax())
    return chosen


def extremes(table: pd.DataFrame, n: int = 100, by: str = "nrn") -> dict[str, pd.DataFrame]:
    """E2: {"highest", "middle", "lowest"}: the n alive features at each end of ``by``, and the n nearest to
    0.5 for comparison.

    With fewer than 3n alive features, a third of them each, so that the three do not overlap.
    """
    alive = table[table["alive"].astype(bool) & table[by].notna()].sort_values([by, "feature"])
    n = min(check("n", n, int, low=1), len(alive) // 3)
    lowest, highest = alive.head(n), alive.tail(n).iloc[::-1]
    rest = alive.drop(index=[*lowest.index, *highest.index])
    middle = rest.loc[(rest[by] - 0.5).abs().sort_values(kind="stable").index[:n]]
    return {"highest": highest, "middle": middle, "lowest": lowest}


def inspect(
    crosscoder: CrossCoder,
    store: Store,
    folder: Path,
    crosscoder_mark: str,
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int | None = None,
    n_contexts: int = 8,
    nrn_over: float = 0.5,
    seed: int = 0,
) -> Inspection:
    """Compute everything into ``folder``, or load it if it was made before from the same crosscoder, store
    and parameters.

    ``crosscoder_mark`` is the fingerprint in the crosscoder's manifest; ``max_tokens`` bounds the tokens of
    each split; ``nrn_over`` is where the distilled side begins, for ``chosen``.
    """
    check("n_contexts", n_contexts, int, low=1)
    check("nrn_over", nrn_over, float, low=-1, high=1)
    folder = Path(folder)
    mark = fingerprint(
        "features", VERSION, crosscoder_mark, store.fingerprint, max_tokens, n_contexts, nrn_over, seed
    )
    if is_current(folder, mark):
        table, chosen = load(folder)
        contexts = pd.read_csv(folder / "contexts.csv", keep_default_na=False)
        return Inspection(
            table, chosen, contexts, _load_codes(folder, "choose"), _load_codes(folder, "report")
        )
    choose, report = (codes(crosscoder, store, split, max_tokens, seed) for split in ("choose", "report"))
    table = feature_table(crosscoder, store, choose, report, tokenizer)
    # whose is it, by another measure than the length of its rows?
    if {"base", "distilled"} <= set(crosscoder.names):
        table = table.merge(
            latent_scaling(crosscoder, store, report.rows, seed=seed), on="feature", validate="1:1"
        )
    # use, beside uniqueness: does the feature fire when only this model is read?
    for name in crosscoder.names:
        fired = (codes(crosscoder, store, "report", max_tokens, seed, name).codes > 0).sum(axis=0)
        table[f"frequency_{name}_alone"] = np.asarray(fired).ravel() / len(report.rows)
    chosen = category_features(table, nrn_over)
    contexts = top_contexts(store, report, tokenizer, np.flatnonzero(table["alive"]), n_contexts)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "manifest.json").unlink(missing_ok=True)  # until all is written there is no artefact
    for split, coded in (("choose", choose), ("report", report)):
        sparse.save_npz(folder / f"codes_{split}.npz", coded.codes, compressed=False)
        np.save(folder / f"rows_{split}.npy", coded.rows, allow_pickle=False)
    write_text(folder / "table.csv", table.to_csv(index=False, float_format="%.7g", lineterminator="\n"))
    write_text(
        folder / "contexts.csv", contexts.to_csv(index=False, float_format="%.5g", lineterminator="\n")
    )
    write_text(folder / "chosen.json", json.dumps(chosen, indent=2) + "\n")
    tokens = {"choose": len(choose.rows), "report": len(report.rows)}
    write_manifest(folder, mark, crosscoder=crosscoder_mark, store=store.fingerprint, tokens=tokens)
    return inspect(
        crosscoder, store, folder, crosscoder_mark, tokenizer, max_tokens, n_contexts, nrn_over, seed
    )


def load(folder: Path, crosscoder_mark: str | None = None) -> tuple[pd.DataFrame, dict[str, int]]:
    """(feature table, {category: feature}). UserError if they are missing, or were made from another
    crosscoder than the one whose fingerprint is given."""
    folder = Path(folder)
    manifest = read_manifest(folder, MADE_BY)
    if crosscoder_mark is not None and manifest.get("crosscoder") != crosscoder_mark:
        raise UserError(
            f"the feature table was made from another crosscoder than there is now: run notebook {MADE_BY}"
            " again (make figures ONLY=03), with the same crosscoder_source if it is from elsewhere"
        )
    try:
        # "null" is a word here
        table = pd.read_csv(folder / "table.csv", keep_default_na=False, na_values=[""])
        table = table.assign(
            **{name: table[name].astype(object).fillna("") for name in ("label", "top_token")}
        )
        chosen = {
            str(c): int(f)
            for c, f in json.loads((folder / "chosen.json").read_text(encoding="utf-8")).items()
        }
    except (OSError, ValueError) as error:
        problem = f"the feature table is damaged ({type(error).__name__})"
        raise UserError(f"{problem}: remove its folder and run notebook {MADE_BY} again") from None
    return table.astype({"alive": bool}), chosen


def _load_codes(folder: Path, split: str) -> Coded:
    rows = np.load(folder / f"rows_{split}.npy", allow_pickle=False)
    return Coded(rows, sparse.csr_matrix(sparse.load_npz(folder / f"codes_{split}.npz")))


def open_artefacts(
    run: Run, pair: Pair, source: str = "", facts: Mapping | None = None
) -> tuple[Store, CrossCoder, pd.DataFrame, dict[str, int], str]:
    """(store, crosscoder, feature table, chosen features, fingerprint of the crosscoder) of a run.

    ``source`` and ``facts``: of a crosscoder that was trained elsewhere (``features.open_crosscoder``).
    UserError, naming the notebook that makes it, for what is missing or was made from something else than
    there is now.
    """
    store = open_store(run, pair)
    crosscoder, mark = open_for_run(run, store, source, facts)
    table, chosen = load(run.path("features"), mark)
    return store, crosscoder, table, chosen, mark
