"""E3: is there a feature for each category of reasoning, and is it better than a predictor that sees less?

A feature with a high AUROC before sentences of a category is worth a name only if simpler explanations do
worse, at the same positions and on the same documents:

- *token only*: P(c | current token), fitted on the choose split;
- *sentence only*: P(c | category of the sentence that has just ended), fitted likewise. In a trace a contrast
  always comes before an alternative: the form alone predicts much, and a feature has to predict more;
- *shuffled labels*: the same choice among as many features where there is nothing to find;
- *same word elsewhere*: for features of a category's first token, the same words where they do something
else.

Which model holds the information? The same feature is read from each model's activation alone; and a linear
*probe* of each model's activation, trained for the purpose, says how much there is at all.

Source: Baek & Tegmark 2025 (arXiv 2503.03730) for the categories; the controls are ours, after 2601.05679 for
token features.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import numpy as np
import pandas as pd

from .. import stats
from ..activations.positions import is_category, positions
from ..activations.store import Store
from ..crosscoder.codes import SplitCodes, encoder_share
from ..labels import DETECTED, LABELS
from ..results import Results
from . import auroc
from .table import Inspection, category_features

DETECTOR_COLUMNS = ["category", "feature", "predictor", "auroc", "low", "high"]
DETECTOR_COLUMNS += ["gain", "gain_low", "gain_high", "positives", "n"]
WORD_COLUMNS = ["category", "feature", "words", "inside", "outside", "auroc", "low", "high"]
WORD_COLUMNS += ["inside_n", "outside_n"]


def detectors(
    inspection: Inspection,
    chosen: Mapping[str, int],
    n_boot: int = 1000,
    seed: int = 0,
    controls: bool = True,
) -> pd.DataFrame:
    """E3: how well the chosen features, and the controls, predict their category, on the report split. A row
    per category and predictor.

    predictor   "feature" (before the sentence), "token only", "sentence only" (controls at the same
                positions), "feature, marker", "token only, marker" (at the first token), "<model> alone": the
                feature as read from one model's activation, and "probe of <model>": logistic regression on
                that activation, fitted on choose
    auroc, low, high   with a 95% interval over resampled documents; ``positives`` of ``n`` positions
    gain, gain_low, gain_high   the feature's AUROC minus this one's, at the same positions, resampled in
                pairs; NaN for the feature itself

    ``controls=False``: the features only.
    """
    store, rows = inspection.store, []
    for c, feature in chosen.items():
        for where, suffix in (("before", ""), ("marker", ", marker")):
            fit_index, fit_labels = positions(store, inspection.choose.rows, where)
            index, labels = positions(store, inspection.report.rows, where)
            fit_tokens, tokens = inspection.choose.rows[fit_index], inspection.report.rows[index]
            positive, fit_positive = labels == LABELS.index(c), fit_labels == LABELS.index(c)
            scores = {"feature": inspection.report.codes[index][:, [feature]].toarray().ravel()}
            if controls:
                ids = store.tokens[fit_tokens], fit_positive, store.tokens[tokens]
                scores["token only"] = auroc.symbol_scores(*ids)
            if controls and where == "before":
                kind, fit_kind = (store.labels["label"][t].astype(int) + 1 for t in (tokens, fit_tokens))
                scores["sentence only"] = auroc.symbol_scores(fit_kind, fit_positive, kind)
                shares = encoder_share(inspection.crosscoder, store, tokens, [feature])
                scores |= {f"{model} alone": share[:, 0] for model, share in shares.items()}
                probes = probe(store, fit_tokens, fit_positive, tokens)
                scores |= {f"probe of {model}": score for model, score in probes.items()}
            for name, score in scores.items():  # the feature comes first
                value = auroc.auroc_of(score, positive)
                draws = auroc.auroc_resamples(score, positive, store.documents[tokens], n_boot, seed)
                if name == "feature":
                    best, best_draws, gain = value, draws, (np.nan, np.nan, np.nan)
                else:
                    gain = (best - value, *stats.interval(best_draws - draws))
                row = (c, feature, name + suffix, value, *stats.interval(draws), *gain)
                rows.append((*row, int(positive.sum()), len(positive)))
    return pd.DataFrame(rows, columns=DETECTOR_COLUMNS)


def probe(
    store: Store, fit_rows: np.ndarray, fit_positive: np.ndarray, rows: np.ndarray
) -> dict[str, np.ndarray]:
    """{model: score [n] of ``rows``}: logistic regression on each model's standardised activation, L2 penalty
    C = 0.1; all 0 where the fit has only one kind of position."""
    from sklearn.exceptions import ConvergenceWarning  # here: opening a store does not load scikit-learn
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if len(np.unique(fit_positive)) < 2 or len(rows) == 0:
        return {model: np.zeros(len(rows)) for model in store.models}
    scores = {}
    for model, fit_acts, acts in zip(store.models, store.activations(fit_rows), store.activations(rows)):
        model_probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=200))
        with warnings.catch_warnings():
            # the ranking is settled long before the last digit
            warnings.simplefilter("ignore", ConvergenceWarning)
            model_probe.fit(fit_acts.numpy(), fit_positive)
        scores[model] = model_probe.decision_function(acts.numpy())
    return scores


def shuffled_detectors(inspection: Inspection, nrn_over: float = 0.5, seed: int = 0) -> dict[str, float]:
    """The null for "the best of a thousand": {category: AUROC on report} of the same choice, with the labels
    of the positions of both splits shuffled: 0.5 but for chance."""
    rng, aurocs, table = np.random.default_rng(seed), [], inspection.table
    for coded in (inspection.choose, inspection.report):
        index, labels = positions(inspection.store, coded.rows, "before")
        aurocs.append(auroc.auroc(coded.codes[index], is_category(rng.permutation(labels))))
    usable = (table["alive"] & (table["frequency_choose"] > 0) & (table["nrn"] > nrn_over)).to_numpy()
    if not usable.any():
        return dict.fromkeys(DETECTED, np.nan)
    best = np.flatnonzero(usable)[aurocs[0][usable].argmax(axis=0)]
    return {c: float(aurocs[1][best[i], i]) for i, c in enumerate(DETECTED)}


def word_or_function(
    store: Store, coded: SplitCodes, chosen: Mapping[str, int], n_boot: int = 1000, seed: int = 0
) -> pd.DataFrame:
    """The word, or what it does? For each category its feature at the same words in and out of it. A row per
    category.

    Positives are the first tokens of its sentences in traces ("wait"), negatives the same token ids anywhere
    else ("wait for the bus"; words that occur nowhere else take no part). Columns: category, feature, words
    (their ids), inside and outside (mean activation there), auroc with low and high (95%, over documents),
    inside_n, outside_n. An AUROC near 0.5: the word alone.
    """
    tokens, label, rows = store.tokens[coded.rows], store.labels["label"][coded.rows], []
    opens = (store.labels["starts"][coded.rows] == 1) & (store.labels["kind"][coded.rows] == 1)
    for c, feature in chosen.items():
        marker = opens & (label == LABELS.index(c))
        words = np.intersect1d(np.unique(tokens[marker]), np.unique(tokens[~marker]))
        index = np.flatnonzero(np.isin(tokens, words))
        f, positive = coded.codes[index][:, [feature]].toarray().ravel(), marker[index]
        draws = auroc.auroc_resamples(f, positive, store.documents[coded.rows[index]], n_boot, seed)
        means = (float(f[side].mean()) if side.any() else np.nan for side in (positive, ~positive))
        value, counts = auroc.auroc_of(f, positive), (positive.sum(), (~positive).sum())
        rows.append((c, feature, words.tolist(), *means, value, *stats.interval(draws), *counts))
    return pd.DataFrame(rows, columns=WORD_COLUMNS)


def record(
    results: Results, inspection: Inspection, nrn_over: float = 0.5, n_boot: int = 1000, seed: int = 0
) -> tuple[pd.DataFrame, pd.DataFrame, dict[str, float]]:
    """E3 of the chosen features, put into ``results``: (``detectors``, a row per chosen feature,
    ``shuffled_detectors``).

    Metrics for each category c: nrn_<c>; auroc_<c>, auroc_marker_<c> and <control>_auroc_<c>; null_auroc_<c>.
    Tables e3, e3_chosen.
    """
    table, chosen = inspection.table, inspection.chosen
    tests = detectors(inspection, chosen, n_boot, seed)
    null = shuffled_detectors(inspection, nrn_over, seed)
    rows = {(row.category, row.predictor): row for row in tests.itertuples()}
    names = {"auroc": "feature", "token_only_auroc": "token only", "sentence_only_auroc": "sentence only"}
    names["auroc_marker"] = "feature, marker"
    names |= {f"{model}_alone_auroc": f"{model} alone" for model in inspection.crosscoder.names}
    names |= {f"probe_{model}_auroc": f"probe of {model}" for model in inspection.crosscoder.names}
    for c in DETECTED:
        nrn = table["nrn"][chosen[c]] if c in chosen else np.nan
        results.add(f"nrn_{c}", nrn, n=int(table["alive"].sum()))
        for name, predictor in names.items():
            _add_auroc(results, f"{name}_{c}", rows.get((c, predictor)))
        results.add(f"null_auroc_{c}", null[c])
    results.table("e3", tests.round(4))
    by_category = pd.DataFrame({"category": list(chosen)})
    for name in ("feature", "nrn", "nrn_p2", "frequency", "label", "token_r2"):
        by_category[name] = table.loc[list(chosen.values()), name].to_numpy()
    for name in ("auroc", "precision", "recall", "threshold"):
        by_category[name] = [table.at[f, f"{name}_{c}"] for c, f in chosen.items()]
    by_category["positives"] = [rows[c, "feature"].positives for c in chosen]
    results.table("e3_chosen", by_category.round(4))
    return tests, by_category, null


def record_of_any_nrn(
    results: Results, inspection: Inspection, n_boot: int = 1000, seed: int = 0
) -> pd.DataFrame:
    """The best feature of each category among those of any NRN, beside the chosen one, put into ``results``:
    metrics any_nrn_<c>, any_nrn_auroc_<c>. A row per category."""
    table, alive, lines = inspection.table, inspection.alive, []
    best = category_features(table, nrn_over=-1)
    tests = detectors(inspection, best, n_boot, seed, controls=False)
    rows = {row.category: row for row in tests.itertuples() if row.predictor == "feature"}
    for c in DETECTED:
        nrn = table["nrn"][best[c]] if c in best else np.nan
        _add_auroc(results, f"any_nrn_auroc_{c}", rows.get(c))
        results.add(f"any_nrn_{c}", nrn)
        if c in best:
            chosen = inspection.chosen.get(c, -1), results.metrics[f"nrn_{c}"]["value"]
            rival = best[c], nrn, results.text(f"any_nrn_auroc_{c}"), int((alive[f"auroc_{c}"] > 0.9).sum())
            lines.append((c, *chosen, results.text(f"auroc_{c}"), *rival))
    names = ["category", "distilled-side feature", "its NRN", "its AUROC", "best of any NRN", "NRN", "AUROC"]
    return pd.DataFrame(lines, columns=[*names, "features above 0.9"])


def record_markers(
    results: Results, inspection: Inspection, markers: Mapping[str, int], n_boot: int = 1000, seed: int = 0
) -> pd.DataFrame:
    """``word_or_function`` of the features that are best at first tokens, put into ``results``: metrics
    marker_feature_auroc_<c> (against other first tokens), same_word_auroc_<c>; table e3_marker. A row per
    category."""
    table, tokenizer = inspection.table, inspection.tokenizer
    tests = word_or_function(inspection.store, inspection.report, markers, n_boot, seed)
    tests.insert(2, "NRN", tests["feature"].map(table["nrn"]))
    tests["auroc_marker"] = [table.at[f, f"auroc_marker_{c}"] for c, f in markers.items()]
    tests["words"] = [
        " ".join(tokenizer.convert_ids_to_tokens(ids)[:6]) + (" …" if len(ids) > 6 else "")
        for ids in tests["words"]
    ]
    for row in tests.itertuples():
        results.add(f"marker_feature_auroc_{row.category}", row.auroc_marker, n=row.inside_n)
        _add_auroc(results, f"same_word_auroc_{row.category}", row, row.inside_n + row.outside_n)
    results.table("e3_marker", tests.round(4))
    return tests


def _add_auroc(results: Results, name: str, row, n: int | None = None) -> None:
    """``row`` has auroc, low, high and n; None: there is no feature of this category."""
    if row is None:
        results.add(name, np.nan, n=0)
    else:
        results.add(name, row.auroc, (row.low, row.high), row.n if n is None else n)
