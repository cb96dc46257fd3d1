"""E3: is there a feature for each category of reasoning, and is it better than a predictor that sees less?

A feature with a high AUROC before sentences of a category is worth a name only if simpler explanations do
worse, at the same place and on the same documents:

- *token only*: P(c | current token), fitted on the choose split;
- *sentence only*: P(c | category of the sentence that has just ended), fitted likewise. In a trace a contrast
  always comes before an alternative: the form alone predicts much, and a feature has to predict more;
- *shuffled labels*: the same choice among as many features where there is nothing to find;
- *same word elsewhere*: for features of a category's first token, the same words where they do something
else.

Which model holds the information? The same feature is read from each model's activation alone; and a linear
*probe* of each model's activation, trained for the purpose, says how much there is at all.

**Errors.** A step that computes something false is known to the embedded pair's teacher. ``record_fact``
asks which feature fires at such steps and not at right ones.

Source: Baek & Tegmark 2025 (arXiv 2503.03730) for the categories; the controls are ours, after 2601.05679 for
token features."""

import warnings
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pandas as pd

from .. import stats
from ..activations.positions import is_category, positions
from ..activations.store import Store
from ..crosscoder.codes import SplitCodes, encoder_share
from ..labels import DETECTED, LABELS
from ..results import Results
from . import auroc
from .table import (
    PLACES,
    Detector,
    Inspection,
    as_shares,
    best_of_places,
    category_detectors,
    joined,
    over_crosscoders,
    share_of_crosscoders,
    usable,
)

DETECTOR_COLUMNS = ["category", "feature", "place", "sign", "predictor", "auroc", "low", "high"]
DETECTOR_COLUMNS += ["gain", "gain_low", "gain_high", "positives", "n"]
WORD_COLUMNS = ["category", "feature", "words", "inside", "outside", "auroc", "low", "high"]
WORD_COLUMNS += ["inside_n", "outside_n"]
FACTS = {"error": ("wrong", "right"), "mode": ("careful", "quick")}  # steps where it holds, and where not
# predictor: the metrics of its AUROC, and of what the feature's is more
CONTROLS = {"token only": ("token_only", "gain_token"), "sentence only": ("sentence_only", "gain")}


class Places:
    """Positions of a split at one place of its sentences, or of those of one ``kind``: ``index`` [n] among
    the split's tokens, ``tokens`` [n] of the store, ``following`` [n] (label of the next sentence; at the
    place "marker" of the token's own), ``documents`` [n]; ``codes`` [n, F]."""

    def __init__(self, store: Store, coded: SplitCodes, place: str, kind: str | None = None):
        index, following = positions(store, coded.rows, place)
        if kind is not None:
            wanted = store.labels["label"][coded.rows[index]] == LABELS.index(kind)
            index, following = index[wanted], following[wanted]
        self.index, self.following, self.tokens = index, following, coded.rows[index]
        self.documents, self._coded = store.documents[self.tokens], coded

    @property
    def codes(self):
        return self._coded.codes[self.index]

    def before(self, category: str) -> np.ndarray:
        """Which are followed by a sentence of the category, [n]."""
        return self.following == LABELS.index(category)

    def activation(self, feature: int, coded: SplitCodes | None = None) -> np.ndarray:
        """Of one feature, [n]; ``coded``: of another crosscoder, at the same tokens."""
        return (coded or self._coded).codes[self.index][:, [feature]].toarray().ravel()

    def resampled(
        self, score: np.ndarray, positive: np.ndarray, n_boot: int = 1000, seed: int = 0
    ) -> np.ndarray:
        """AUROC of a score [n] in resamples of the documents, [n_boot]."""
        return auroc.auroc_resamples(score, positive, self.documents, n_boot, seed)


class Controls:
    """What predicts a category, or an error, without any feature: computed once for all crosscoders of a run,
    which read the same tokens. ``inspection``: of one of them."""

    def __init__(self, inspection: Inspection, n_boot: int = 1000, seed: int = 0):
        self.store, self.n_boot, self.seed = inspection.store, n_boot, seed
        self._coded = {"choose": inspection.choose, "report": inspection.report}
        self._known: dict[tuple, object] = {}

    def places(self, split: str, place: str, kind: str | None = None) -> Places:
        made = lambda: Places(self.store, self._coded[split], place, kind)
        return self._once(("places", split, place, kind), made)

    def of(self, category: str, place: str) -> dict[str, tuple[np.ndarray, float, np.ndarray]]:
        """{predictor: (score [n], AUROC, AUROC in resamples)}: "token only", and at an end of a sentence
        "sentence only" and "probe of <model>"."""
        fit, at = (self.places(split, place) for split in ("choose", "report"))
        positive, fit_positive, store = at.before(category), fit.before(category), self.store

        def compute() -> dict:
            ids = store.tokens[fit.tokens], fit_positive, store.tokens[at.tokens]
            scores = {"token only": auroc.symbol_scores(*ids)}
            if place in PLACES:
                kind, fit_kind = (store.labels["label"][t].astype(int) + 1 for t in (at.tokens, fit.tokens))
                scores["sentence only"] = auroc.symbol_scores(fit_kind, fit_positive, kind)
                probes = probe(store, fit.tokens, fit_positive, at.tokens)
                scores |= {f"probe of {model}": score for model, score in probes.items()}
            return {name: (score, *self.judged(at, score, positive)) for name, score in scores.items()}

        return self._once((category, place), compute)

    def of_fact(self, place: str, fact: str = "error") -> dict[str, tuple[np.ndarray, float, np.ndarray]]:
        """The same of a fact (``holds``) among all steps: "probe of <model>"."""
        fit, at = (self.places(split, place, "deduction") for split in ("choose", "report"))

        def compute() -> dict:
            positive = holds(self.store, at, fact)
            probes = probe(self.store, fit.tokens, holds(self.store, fit, fact), at.tokens)
            return {f"probe of {m}": (s, *self.judged(at, s, positive)) for m, s in probes.items()}

        return self._once((fact, place), compute)

    def judged(self, at: Places, score: np.ndarray, positive: np.ndarray) -> tuple[float, np.ndarray]:
        """(AUROC, AUROC in resamples of documents)"""
        return auroc.auroc_of(score, positive), at.resampled(score, positive, self.n_boot, self.seed)

    def _once(self, key: tuple, compute: Callable):
        if key not in self._known:
            self._known[key] = compute()
        return self._known[key]


def holds(store: Store, at: Places, fact: str = "error") -> np.ndarray:
    """At which of the positions a fact of the text holds that no word tells, [n]: "error", the step computes
    something false; "mode", the thought is a careful one."""
    return store.labels[fact][at.tokens] == 1


def detectors(
    inspection: Inspection,
    chosen: Mapping[str, Detector | int],
    n_boot: int = 1000,
    seed: int = 0,
    controls: bool | Controls = True,
) -> pd.DataFrame:
    """E3: how well the chosen detectors (a number: the feature at the full stop), and the controls, predict
    their category, on the report split. A row per category and predictor.

    place, sign of the detector
    predictor   "feature" (before the sentence), "token only", "sentence only" (controls at the same place),
                "feature, marker", "token only, marker" (at the first token), "<model> alone": the feature as
                read from one model's activation, and "probe of <model>": logistic regression on that
                activation, fitted on choose
    auroc, low, high   with a 95% interval over resampled documents; ``positives`` of ``n`` positions
    gain, gain_low, gain_high   the feature's AUROC minus this one's, at the same positions, resampled in
                pairs; NaN for the feature itself

    ``controls``: False: the features only; ``Controls``: those that were computed before."""
    shared = controls if isinstance(controls, Controls) else Controls(inspection, n_boot, seed)
    rows = []
    for c, detector in chosen.items():
        feature, place, sign = detector = detector if isinstance(detector, Detector) else Detector(detector)
        for where, suffix in ((place, ""), ("marker", ", marker")):
            at = shared.places("report", where)
            positive = at.before(c)
            judged = _feature_alone(inspection, c, detector, where, shared, bool(controls))
            if controls:
                others = {name: (value, draws) for name, (_, value, draws) in shared.of(c, where).items()}
                first = {name: others.pop(name) for name in CONTROLS if name in others}
                judged = {"feature": judged.pop("feature")} | first | judged | others
            best, best_draws = judged["feature"]
            for name, (value, draws) in judged.items():
                gain = (np.nan, np.nan, np.nan)
                if name != "feature":
                    gain = (best - value, *stats.interval(best_draws - draws))
                row = (c, feature, place, sign, name + suffix, value, *stats.interval(draws), *gain)
                rows.append((*row, int(positive.sum()), len(positive)))
    return pd.DataFrame(rows, columns=DETECTOR_COLUMNS)


def _feature_alone(
    inspection: Inspection, c: str, detector: Detector, where: str, controls: Controls, by_model: bool
) -> dict[str, tuple[float, np.ndarray]]:
    """{"feature": (AUROC, in resamples)}, and at an end of a sentence "<model> alone", ``by_model``."""
    at, (feature, _, sign) = controls.places("report", where), detector
    sign = sign if where in PLACES else 1
    scores = {"feature": sign * at.activation(feature, inspection.report)}
    if by_model and where in PLACES:
        shares = encoder_share(inspection.crosscoder, inspection.store, at.tokens, [feature])
        scores |= {f"{model} alone": sign * share[:, 0] for model, share in shares.items()}
    return {name: controls.judged(at, score, at.before(c)) for name, score in scores.items()}


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
    """The null for "the best of many": {category: AUROC on report} of the same choice (places, firing or
    falling silent), with the labels of the positions of both splits shuffled: 0.5 but for chance."""
    rng, wanted = np.random.default_rng(seed), np.flatnonzero(usable(inspection.table, nrn_over))
    if not len(wanted):
        return dict.fromkeys(DETECTED, np.nan)
    aurocs = {}
    for place in PLACES:
        for split in ("choose", "report"):
            coded = getattr(inspection, split)
            index, labels = positions(inspection.store, coded.rows, place)
            values = auroc.auroc(coded.codes[index][:, wanted], is_category(rng.permutation(labels)))
            aurocs[place, split] = pd.DataFrame(values, wanted, DETECTED)
    result = {}
    for c in DETECTED:
        best = best_of_places({place: aurocs[place, "choose"][c].fillna(0.5) - 0.5 for place in PLACES})
        value = aurocs[best.place, "report"].at[best.feature, c]
        result[c] = float(value if best.sign > 0 else 1 - value)
    return result


def word_or_function(
    store: Store, coded: SplitCodes, chosen: Mapping[str, int], n_boot: int = 1000, seed: int = 0
) -> pd.DataFrame:
    """The word, or what it does? For each category its feature at the same words in and out of it. A row per
    category.

    Positives are the first tokens of its sentences in traces ("wait"), negatives the same token ids anywhere
    else ("wait for the bus"; words that occur nowhere else take no part). Columns: category, feature, words
    (their ids), inside and outside (mean activation there), auroc with low and high (95%, over documents),
    inside_n, outside_n. An AUROC near 0.5: the word alone."""
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
    results: Results, inspection: Inspection, controls: Controls, nrn_over: float = 0.5
) -> tuple[pd.DataFrame, pd.DataFrame, dict[str, float]]:
    """E3 of the chosen features of one crosscoder, put into ``results``: (``detectors``, a row per chosen
    feature, ``shuffled_detectors``).

    Metrics for each category c: nrn_<c>; auroc_<c>, at the better of two places and directions, auroc_marker_
    <c> and <control>_auroc_<c>; gain_<c>, gain_token_<c>: more than *sentence only*, than *token only*;
    alone_gain_<c>: the distilled model alone more than the base alone; null_auroc_<c>; at_value_<c>,
    silent_<c> (1 or 0). Tables e3, e3_chosen."""
    table, chosen = inspection.table, inspection.detectors
    tests = detectors(inspection, chosen, controls.n_boot, controls.seed, controls)
    null = shuffled_detectors(inspection, nrn_over, controls.seed)
    rows = {(row.category, row.predictor): row for row in tests.itertuples()}
    names = {"auroc": "feature", "auroc_marker": "feature, marker"}
    names |= {f"{metric}_auroc": predictor for predictor, (metric, _) in CONTROLS.items()}
    names |= {f"{model}_alone_auroc": f"{model} alone" for model in inspection.crosscoder.names}
    names |= {f"probe_{model}_auroc": f"probe of {model}" for model in inspection.crosscoder.names}
    for c in DETECTED:
        nrn = table["nrn"][chosen[c].feature] if c in chosen else np.nan
        results.add(f"nrn_{c}", nrn, n=int(table["alive"].sum()))
        for name, predictor in names.items():
            _add_auroc(results, f"{name}_{c}", rows.get((c, predictor)))
        for predictor, (_, name) in CONTROLS.items():
            row = rows.get((c, predictor))
            gain = (row.gain, (row.gain_low, row.gain_high), row.n) if row else (np.nan, None, 0)
            results.add(f"{name}_{c}", *gain)
        alone = [rows.get((c, f"{model} alone")) for model in inspection.crosscoder.names]
        results.add(f"alone_gain_{c}", *_mover(*alone))
        results.add(f"null_auroc_{c}", null[c])
        if c in chosen:
            results.add(f"at_value_{c}", float(chosen[c].place == "value"))
            results.add(f"silent_{c}", float(chosen[c].sign < 0))
    results.table("e3", tests.round(4))
    lines, names = [], ["nrn", "nrn_p2", "frequency", "label", "token_r2"]
    for c, (feature, place, sign) in chosen.items():
        own, at_threshold = rows[c, "feature"], _at_threshold(inspection, controls, c)
        known = (c, feature, place, sign > 0, *table.loc[feature, names])
        lines.append((*known, own.auroc, *at_threshold, own.positives))
    columns = ["category", "feature", "place", "fires", *names]
    columns += ["auroc", "precision", "recall", "threshold", "positives"]
    by_category = pd.DataFrame(lines, columns=columns)
    results.table("e3_chosen", by_category.round(4))
    return tests, by_category, null


def _mover(base, distilled) -> tuple:
    """(difference, interval, n) of the AUROC of two rows; the interval from both of theirs (MOVER)."""
    if base is None:
        return np.nan, None, 0
    return *stats.difference(*((r.auroc, (r.low, r.high)) for r in (distilled, base))), base.n


def _at_threshold(inspection: Inspection, controls: Controls, c: str) -> tuple[float, float, float]:
    """(precision, recall, threshold) of a category's feature, chosen on choose; NaN if it falls silent."""
    feature, place, sign = inspection.detectors[c]
    if sign < 0:
        return np.nan, np.nan, np.nan
    sides = {split: controls.places(split, place) for split in ("choose", "report")}
    f = {split: getattr(inspection, split).codes[p.index][:, [feature]] for split, p in sides.items()}
    positive = {split: p.before(c) for split, p in sides.items()}
    threshold = auroc.best_thresholds(f["choose"], positive["choose"])
    precision, recall = auroc.precision_recall(f["report"], positive["report"], threshold)
    return float(precision[0]), float(recall[0]), float(threshold[0])


def record_all(
    results: Results, inspections: Sequence[Inspection], controls: Controls, nrn_over: float = 0.5
) -> tuple[pd.DataFrame, list[pd.DataFrame], pd.DataFrame]:
    """``record`` of all crosscoders, pooled into ``results``: (``pooled`` predictors, ``detectors`` of each
    crosscoder, a row per crosscoder and chosen feature)."""
    parts = over_crosscoders(results, record, inspections, controls, nrn_over)
    as_shares(results, "at_value", "silent")
    tests, by_category, _ = zip(*parts)
    return pooled(joined(tests), ["category", "predictor"]), list(tests), joined(by_category)


def pooled(table: pd.DataFrame, keys: Sequence[str], value: str = "auroc") -> pd.DataFrame:
    """The mean of ``value`` over crosscoders for each combination of ``keys``, in the table's order: the
    keys, ``value``, low, high (``stats.pooled``), each ([crosscoders]); of one crosscoder its own interval.
    """
    rows = []
    for key, group in table.groupby(list(keys), sort=False):
        numbers = group[value].to_numpy(), group[["low", "high"]].to_numpy()
        number = stats.pooled(*numbers) if len(group) > 1 else (numbers[0][0], *numbers[1][0])
        rows.append((*key, *number, list(numbers[0])))
    return pd.DataFrame(rows, columns=[*keys, value, "low", "high", "each"])


def record_of_any_nrn(results: Results, inspection: Inspection, controls: Controls) -> pd.DataFrame:
    """The best feature of each category among those of any NRN, beside the chosen one: metrics any_nrn_<c>,
    any_nrn_auroc_<c>, any_nrn_gain_<c> (its AUROC minus the chosen one's). A row each."""
    table, alive, lines = inspection.table, inspection.alive, []
    best, chosen = category_detectors(table, nrn_over=-1), inspection.detectors
    tests = detectors(inspection, best, controls.n_boot, controls.seed, False)
    rows = {row.category: row for row in tests.itertuples() if row.predictor == "feature"}
    for c in DETECTED:
        nrn = table["nrn"][best[c].feature] if c in best else np.nan
        _add_auroc(results, f"any_nrn_auroc_{c}", rows.get(c))
        results.add(f"any_nrn_{c}", nrn)
        if c not in best or c not in chosen:
            results.add(f"any_nrn_gain_{c}", np.nan, n=0)
            continue
        judged = []
        for detector in (best[c], chosen[c]):
            at = controls.places("report", detector.place)
            score = detector.sign * at.activation(detector.feature, inspection.report)
            judged.append(controls.judged(at, score, at.before(c)))
        (value, draws), (own, own_draws) = judged
        results.add(f"any_nrn_gain_{c}", value - own, stats.interval(draws - own_draws), rows[c].n)
        by_place = (alive[f"{name}_{c}"].sub(0.5).abs() for name in PLACES.values())
        above = int((np.maximum(*by_place) > 0.4).sum())
        lines.append((c, *chosen[c], table["nrn"][chosen[c].feature], own, *best[c], nrn, value, above))
    names = ["feature", "place", "sign", "its NRN", "its AUROC", "best of any NRN", "its place", "its sign"]
    frame = pd.DataFrame(lines, columns=["category", *names, "NRN", "AUROC", "features above 0.9"])
    results.table("any_nrn", frame.round(4))
    return frame


# --- facts of the text: errors, and the mode ----------------------------------------------------------------


def fact_detector(
    controls: Controls,
    choose: SplitCodes,
    table: pd.DataFrame,
    places: Sequence[str] = tuple(PLACES),
    fact: str = "error",
) -> Detector | None:
    """Which feature tells steps with a fact from others best on the choose split, at one of the ``places``.
    Of any NRN, recurrent or not; an error is told by firing, a mode by falling silent too. None without
    such steps."""
    wanted = np.flatnonzero(table["alive"].astype(bool) & (table["frequency_choose"] > 0))
    values = {}
    for place in places:
        at = controls.places("choose", place, "deduction")
        aurocs = auroc.auroc(choose.codes[at.index][:, wanted], holds(controls.store, at, fact))
        if len(wanted) and not np.isnan(aurocs).all():
            values[place] = pd.Series(aurocs - 0.5, wanted)
    return best_of_places(values, silent=fact != "error")


def record_fact(
    results: Results,
    inspection: Inspection,
    beyond_null: np.ndarray | None,
    controls: Controls,
    fact: str = "error",
) -> dict:
    """The feature of a fact (``holds``) of one crosscoder, put into ``results``; returns what is known of it,
    {} if the text does not tell the fact. ``beyond_null`` [F]: nu_eps beyond the null, or None.

    Metrics, each with the fact in front: error_auroc, error_gain (more than the probe of the base's
    activation at the same place), error_probe_<model>_auroc, error_nrn, error_nrn_rank (share of the alive
    features with a lower NRN), error_nu_eps, error_at_value, error_fires_wrong, error_fires_right (shares of
    such steps; of a mode mode_fires_careful, mode_fires_quick)."""
    table = inspection.table
    detector = fact_detector(controls, inspection.choose, table, fact=fact)
    if detector is None:
        return {}
    feature, place, sign = detector
    at = controls.places("report", place, "deduction")
    positive, f = holds(inspection.store, at, fact), at.activation(feature, inspection.report)
    value, draws = controls.judged(at, sign * f, positive)
    row, alive, n = table.loc[feature], inspection.alive, len(positive)
    results.add(f"{fact}_auroc", value, stats.interval(draws), n)
    first, *_ = inspection.crosscoder.names
    for name in inspection.crosscoder.names:
        _, probed, probed_draws = controls.of_fact(place, fact)[f"probe of {name}"]
        results.add(f"{fact}_probe_{name}_auroc", probed, stats.interval(probed_draws), n)
        if name == first:
            results.add(f"{fact}_gain", value - probed, stats.interval(draws - probed_draws), n)
    results.add(f"{fact}_nrn", row["nrn"])
    results.add(f"{fact}_nrn_rank", (alive["nrn"] < row["nrn"]).mean(), n=len(alive))
    if "nu_eps" in table:
        results.add(f"{fact}_nu_eps", row["nu_eps"], (row["nu_eps_low"], row["nu_eps_high"]))
    results.add(f"{fact}_at_value", float(place == "value"))
    known = {"feature": feature, "place": place, "auroc": value, "NRN": row["nrn"]}
    known["nu"] = row.get("nu_eps", np.nan)
    known["beyond the null"] = beyond_null is not None and beyond_null[feature]
    for name, side in zip(FACTS[fact], (positive, ~positive)):
        known[f"fires at {name}"] = float((f[side] > 0).mean())
        results.add(f"{fact}_fires_{name}", known[f"fires at {name}"], n=int(side.sum()))
    known |= {"cluster": row.get("cluster", -1), "recurrent": row.get("recurrent", False)}
    known["stability"] = row.get("stability", np.nan)
    return known


def record_fact_of_all(
    results: Results,
    inspections: Sequence[Inspection],
    beyond_null: Sequence[np.ndarray | None],
    controls: Controls,
    fact: str = "error",
) -> pd.DataFrame:
    """``record_fact`` of all crosscoders, pooled into ``results``; a row per crosscoder, empty if no text
    tells it. Also <fact>_beyond_null (share of the crosscoders) and <fact>_recurrence (the largest share
    whose features are members of one recurrent cluster); table <fact>s."""
    known = over_crosscoders(results, record_fact, list(zip(inspections, beyond_null)), controls, fact)
    table = pd.DataFrame([row for row in known if row]).rename_axis("crosscoder").reset_index()
    if table.empty:
        return table
    n = len(table)
    if all(b is not None for b in beyond_null):
        share_of_crosscoders(results, f"{fact}_beyond_null", table["beyond the null"])
    if n > 1:
        most = table.loc[table["recurrent"], "cluster"].mode()[:1]
        share_of_crosscoders(results, f"{fact}_recurrence", table["cluster"].isin(most), interval=False)
    results.table(f"{fact}s", table.round(4))
    return table


def mode_shows(results: Results) -> str:
    """What is known of the feature that tells careful thoughts from quick ones, in words; "" without."""
    if "mode_auroc" not in results.metrics:
        return ""
    text = results.text
    return (
        "Whether the thought is a careful or a quick one is told by one feature with an AUROC of"
        f" {text('mode_auroc')}, by a probe of the base (which sees the checks that were written) with"
        f" {text('mode_probe_base_auroc')}; nu {text('mode_nu_eps')}; the same feature in"
        f" {results.values['mode_recurrence']:.0%} of the crosscoders."
    )


def errors_by_place(inspections: Sequence[Inspection], controls: Controls) -> pd.DataFrame:
    """How well errors are known at the value and at the full stop: place, predictor ("best feature", chosen
    on choose; "probe of <model>"), crosscoder, auroc. Empty if the text has no errors."""
    rows = []
    for place in PLACES:
        at = controls.places("report", place, "deduction")
        wrong = holds(controls.store, at)
        for i in inspections:
            if detector := fact_detector(controls, i.choose, i.table, [place]):
                value = auroc.auroc_of(at.activation(detector.feature, i.report), wrong)
                rows.append((place, "best feature", i.number, value))
        if rows:
            rows += [(place, name, -1, value) for name, (_, value, _) in controls.of_fact(place).items()]
    return pd.DataFrame(rows, columns=["place", "predictor", "crosscoder", "auroc"])


# --- at first tokens ----------------------------------------------------------------------------------------


def record_markers(
    results: Results, inspection: Inspection, markers: Mapping[str, int], controls: Controls
) -> pd.DataFrame:
    """``word_or_function`` of the features that are best at first tokens, put into ``results``: metrics
    marker_feature_auroc_<c> (against other first tokens), marker_gain_<c> (more than the token alone),
    same_word_auroc_<c>; table e3_marker. A row per category."""
    table, tokenizer = inspection.table, inspection.tokenizer
    options = controls.n_boot, controls.seed
    tests = word_or_function(inspection.store, inspection.report, markers, *options)
    tests.insert(2, "NRN", tests["feature"].map(table["nrn"]))
    tests["auroc_marker"] = [table.at[f, f"auroc_marker_{c}"] for c, f in markers.items()]
    words = [tokenizer.convert_ids_to_tokens(ids) for ids in tests["words"]]
    tests["words"] = [" ".join(each[:6]) + (" …" if len(each) > 6 else "") for each in words]
    at = controls.places("report", "marker")
    for row in tests.itertuples():
        c, score = row.category, at.activation(row.feature, inspection.report)
        value, draws = controls.judged(at, score, at.before(c))
        _, token, token_draws = controls.of(c, "marker")["token only"]
        results.add(f"marker_feature_auroc_{c}", value, stats.interval(draws), row.inside_n)
        results.add(f"marker_gain_{c}", value - token, stats.interval(draws - token_draws), row.inside_n)
        _add_auroc(results, f"same_word_auroc_{c}", row, row.inside_n + row.outside_n)
    results.table("e3_marker", tests.round(4))
    return tests


def _add_auroc(results: Results, name: str, row, n: int | None = None) -> None:
    """``row`` has auroc, low, high and n; None: there is no feature of this category."""
    if row is None:
        results.add(name, np.nan, n=0)
    else:
        results.add(name, row.auroc, (row.low, row.high), row.n if n is None else n)
