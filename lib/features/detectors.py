"""E3: is there a feature for each category of reasoning, and does it know more than a predictor that knows
nothing?

A feature with a high AUROC before sentences of a category is worth a name only if simpler explanations do
worse, at the same positions and on the same documents:

- *token only*: P(c | current token), fitted on the choose split. The word itself gives the answer away.
- *sentence only*: P(c | category of the sentence that has just ended), fitted likewise. Whoever knows the
  form of a trace
  knows that a contrast comes before an alternative; a feature has to know more than that.
- *shuffled labels*: the same choice among as many features when there is nothing to find. The best of a
  thousand looks good.
- *same word elsewhere*: for features of a category's first token, the same words where they do something
  else.

And whose knowledge is it? The same feature is read from each model's activation alone; and a linear *probe*
of each model's activation, trained for the purpose, says how much there is to be found at all.

Source: Baek & Tegmark 2025 (arXiv 2503.03730) for the categories; the controls are ours, after 2601.05679 for
token features.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import numpy as np
import pandas as pd
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from .. import stats
from ..activations.positions import is_category, positions
from ..activations.store import Store
from ..crosscoder.codes import SplitCodes, encoder_share
from ..crosscoder.model import CrossCoder
from ..labels import DETECTED, LABELS
from . import auroc as detection
from .table import Inspection

DETECTOR_COLUMNS = [
    "category",
    "feature",
    "predictor",
    "auroc",
    "low",
    "high",
    "gain",
    "gain_low",
    "gain_high",
    "positives",
    "n",
]


def detectors(
    crosscoder: CrossCoder,
    store: Store,
    made: Inspection,
    chosen: Mapping[str, int],
    n_boot: int = 1000,
    seed: int = 0,
    controls: bool = True,
) -> pd.DataFrame:
    """E3: how well the chosen features, and the controls, tell their category, on the report split. A row per
    category and predictor.

    predictor   "feature" (before the sentence), "token only", "sentence only" (controls at the same
    positions), "feature, marker",
                "token only, marker" (at the first token), "<model> alone": the feature as read from one model's activation, and
                "probe of <model>": logistic regression on that activation, fitted on choose
    auroc, low, high   with a 95% interval over resampled documents; ``positives`` of ``n`` positions
    gain, gain_low, gain_high   the feature's AUROC minus this one's, at the same positions, resampled in
    pairs; NaN for the feature itself

    ``controls=False``: the features only.
    """
    found = []
    for c, feature in chosen.items():
        for where, suffix in (("before", ""), ("marker", ", marker")):
            fit_index, fit_labels = positions(store, made.choose.rows, where)
            index, labels = positions(store, made.report.rows, where)
            fit_rows, rows = made.choose.rows[fit_index], made.report.rows[index]
            positive, fit_positive = labels == LABELS.index(c), fit_labels == LABELS.index(c)
            scores = {"feature": made.report.codes[index][:, [feature]].toarray().ravel()}
            if controls:
                scores["token only"] = detection.symbol_scores(
                    store.tokens[fit_rows], fit_positive, store.tokens[rows]
                )
            if controls and where == "before":
                own, fit_own = (store.labels["label"][r].astype(int) + 1 for r in (rows, fit_rows))
                scores["sentence only"] = detection.symbol_scores(fit_own, fit_positive, own)
                shares = encoder_share(crosscoder, store, rows, [feature])
                scores |= {f"{model} alone": share[:, 0] for model, share in shares.items()}
                scores |= {
                    f"probe of {model}": s for model, s in probe(store, fit_rows, fit_positive, rows).items()
                }
            resamples = {
                name: detection.auroc_resamples(s, positive, store.documents[rows], n_boot, seed)
                for name, s in scores.items()
            }
            value = {name: detection.auroc_of(s, positive) for name, s in scores.items()}
            for name in scores:
                row = {"category": c, "feature": feature, "predictor": name + suffix, "auroc": value[name]}
                row["low"], row["high"] = stats.interval(resamples[name])
                if name != "feature":
                    row["gain"] = value["feature"] - value[name]
                    row["gain_low"], row["gain_high"] = stats.interval(resamples["feature"] - resamples[name])
                found.append(row | {"positives": int(positive.sum()), "n": len(positive)})
    return pd.DataFrame(found, columns=DETECTOR_COLUMNS)


def probe(
    store: Store, fit_rows: np.ndarray, fit_positive: np.ndarray, rows: np.ndarray
) -> dict[str, np.ndarray]:
    """{model: score [n] of ``rows``}: logistic regression on each model's standardised activation, L2 penalty
    C = 0.1.

    All scores are 0 where the fit has only one kind of position.
    """
    if len(np.unique(fit_positive)) < 2 or len(rows) == 0:
        return {model: np.zeros(len(rows)) for model in store.models}
    scores = {}
    for model, fit_acts, acts in zip(store.models, store.activations(fit_rows), store.activations(rows)):
        reader = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=200))
        with warnings.catch_warnings():
            # the ranking is settled long before the last digit
            warnings.simplefilter("ignore", ConvergenceWarning)
            reader.fit(fit_acts.numpy(), fit_positive)
        scores[model] = reader.decision_function(acts.numpy())
    return scores


def shuffled_detectors(
    store: Store, made: Inspection, nrn_over: float = 0.5, seed: int = 0
) -> dict[str, float]:
    """The null for "the best of a thousand": the same choice, with the labels of the positions shuffled.
    {category: AUROC on report}.

    The shuffled labels of choose pick the best feature before a sentence, those of report judge it: 0.5 but
    for chance.
    """
    rng, aurocs = np.random.default_rng(seed), []
    for coded in (made.choose, made.report):
        index, labels = positions(store, coded.rows, "before")
        aurocs.append(detection.auroc(coded.codes[index], is_category(rng.permutation(labels))))
    usable = (
        made.table["alive"] & (made.table["frequency_choose"] > 0) & (made.table["nrn"] > nrn_over)
    ).to_numpy()
    if not usable.any():
        return dict.fromkeys(DETECTED, np.nan)
    best = np.flatnonzero(usable)[aurocs[0][usable].argmax(axis=0)]
    return {c: float(aurocs[1][best[i], i]) for i, c in enumerate(DETECTED)}


def word_or_function(
    store: Store, coded: SplitCodes, chosen: Mapping[str, int], n_boot: int = 1000, seed: int = 0
) -> pd.DataFrame:
    """Is it the word or what the word does? For each category its feature at the same words in and out of it.
    A row per category.

    Positives are the first tokens of its sentences in traces ("wait"), negatives the same token ids anywhere
    else ("wait for the bus"; words that occur nowhere else take no part). Columns: category, feature, words
    (their ids), inside and outside (mean activation there), auroc with low and high (95%, over documents),
    inside_n, outside_n. An AUROC near 0.5: the word alone.
    """
    tokens, label, found = store.tokens[coded.rows], store.labels["label"][coded.rows], []
    opens = (store.labels["starts"][coded.rows] == 1) & (store.labels["kind"][coded.rows] == 1)
    for c, feature in chosen.items():
        marker = opens & (label == LABELS.index(c))
        words = np.intersect1d(np.unique(tokens[marker]), np.unique(tokens[~marker]))
        index = np.flatnonzero(np.isin(tokens, words))
        f, positive = coded.codes[index][:, [feature]].toarray().ravel(), marker[index]
        low, high = stats.interval(
            detection.auroc_resamples(f, positive, store.documents[coded.rows[index]], n_boot, seed)
        )
        inside, outside = (float(f[side].mean()) if side.any() else np.nan for side in (positive, ~positive))
        counts = positive.sum(), (~positive).sum()
        found.append(
            (c, feature, words.tolist(), inside, outside, detection.auroc_of(f, positive), low, high, *counts)
        )
    columns = [
        "category",
        "feature",
        "words",
        "inside",
        "outside",
        "auroc",
        "low",
        "high",
        "inside_n",
        "outside_n",
    ]
    return pd.DataFrame(found, columns=columns)
