"""What the features mean: one row of statistics per feature, labels from ground truth, and the feature that
predicts each category best.

    inspections = inspect_all(run)       # the run's store, each of its crosscoders, and all that follows
    inspections[0].table                 # one row per feature (``feature_table``)
    inspections[0].detectors             # {category: Detector}, chosen on choose (``category_detectors``)

**Positions.** A sentence of category c is *predicted* at the end of the sentence that precedes it, against
the ends of all other sentences in traces: at its last token (place "before", the full stop), or at the one
before that (place "value", with which a step ends). And it is *marked* at its first token ("wait"), against
the first tokens of all other sentences in traces; there the token itself gives the answer away, so a high
AUROC means little.

**Several crosscoders.** A feature of one is the same as features of others if they are in one cluster
(``crosscoder.recurrence``). The categories' features are chosen among *recurrent* ones, which have a member
in at least 4 of 5 crosscoders.

**Two splits.** Features and thresholds are chosen on the split "choose" (columns ``..._choose``) and reported
on "report"; the crosscoder was trained on neither.

Source: Baek & Tegmark 2025 (arXiv 2503.03730), where a language model labels features from their contexts;
here the labels are known."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import sparse
from transformers import PreTrainedTokenizerBase

from ..activations.positions import is_category, missing_labels, positions
from ..activations.store import Store, open_store
from ..crosscoder.codes import SplitCodes, codes, sample_rows
from ..crosscoder.model import CrossCoder, check_feature
from ..crosscoder.recurrence import MEMBERS, members_of, recurrent
from ..crosscoder.seeds import folder as numbered
from ..crosscoder.sharing import open_all
from ..labels import CATEGORIES, DETECTED, LABELS
from ..models.pairs import Pair, load_pair
from ..results import Results
from ..runs import Run, fingerprint, kept, read_manifest, read_table, table_text, write_text
from ..settings import UserError, check
from ..stats import bootstrap, difference, wilson
from . import auroc
from .contexts import top_contexts
from .latent_scaling import latent_scaling

MADE_BY = "03_inspect_features"
VERSION = 3  # of the statistics: raised when their definition changes, so that older tables count as stale
# of the tables e2_highest and e2_lowest
E2_COLUMNS = ["feature", "nrn", "frequency", "label", "label_share", "enrichment"]
E2_COLUMNS += ["top_token", "top_token_share", "token_r2"]
PLACES = {"value": "auroc_value", "before": "auroc"}  # ends of sentences: the columns of their AUROC


class Detector(NamedTuple):
    """A feature that predicts a category at a ``place`` (one of PLACES) of the sentence before: ``sign`` 1
    where it fires, -1 where it falls silent."""

    feature: int
    place: str = "before"
    sign: int = 1

    def __str__(self) -> str:
        how = "" if self.sign > 0 else ", by falling silent"
        return f"feature {self.feature} at the {'value' if self.place == 'value' else 'full stop'}{how}"


@dataclass(frozen=True)
class Inspection:
    """The feature table, the features that were chosen for the categories, the strongest contexts of every
    feature, the features of the tokens of both splits; and what they were computed from. ``fingerprint`` is
    the crosscoder's content. ``inspect_all`` sets ``run``, ``pair`` and ``number`` (of the crosscoder), and
    ``members``: the same features in the other crosscoders (``crosscoder.recurrence.members_of``)."""

    table: pd.DataFrame
    detectors: dict[str, Detector]
    contexts: pd.DataFrame
    choose: SplitCodes
    report: SplitCodes
    store: Store
    crosscoder: CrossCoder
    fingerprint: str = ""
    tokenizer: PreTrainedTokenizerBase | None = None
    run: Run | None = None
    pair: Pair | None = None
    number: int = 0
    members: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=MEMBERS))

    @property
    def chosen(self) -> dict[str, int]:
        """{category: feature}"""
        return {c: detector.feature for c, detector in self.detectors.items()}

    @property
    def alive(self) -> pd.DataFrame:
        """The rows of the features that fire on the report split."""
        return self.table[self.table["alive"]]

    def sentence_ends(self, split: str, place: str = "before") -> tuple[np.ndarray, np.ndarray]:
        """Sentence ends in traces of "choose" or "report", the full stop or the "value" before it: (their
        rows in the split's codes [n], the category of the sentence that follows [n], "" where none does)."""
        index, labels = positions(self.store, getattr(self, split).rows, place)
        return index, np.array([*LABELS, ""])[labels]

    @property
    def categories(self) -> list[str]:
        """Those of the paper's four categories that have a feature, and whose AUROC is defined."""
        return [c for c in CATEGORIES if pd.notna(self.table.get(f"auroc_{c}", {}).get(self.chosen.get(c)))]

    @property
    def notice(self) -> str:
        """Which categories the report split lacks, in a sentence."""
        missing = missing_labels(self.store, self.store.rows("report"))
        return f"**{missing}**" if missing else "All categories occur in the report split."

    def feature_to_show(self, feature: int) -> int:
        """``feature``, checked; for -1 the chosen one of reflection, or else that with the highest NRN."""
        if feature != -1:
            return check_feature(self.crosscoder, feature)
        return self.chosen.get("reflection", int(self.alive.sort_values("nrn")["feature"].iloc[-1]))

    def activations(self, feature: int, split: str = "report") -> np.ndarray:
        """Activation of one feature on the tokens of a split, [n]."""
        return getattr(self, split).codes[:, [feature]].toarray().ravel()


def feature_table(
    crosscoder: CrossCoder,
    store: Store,
    choose: SplitCodes | None = None,
    report: SplitCodes | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> pd.DataFrame:
    """One row per feature, from the features of the tokens of both splits (computed, if they are not given).

    feature, alive        alive: it fires on at least one of the report tokens
    nrn, nrn_p2, cosine   of the decoder rows (p = 1, p = 2; cosine NaN for models of unlike width);
                          norm_<model>: the length of each row (p = 1)
    frequency             share of tokens on which it fires
    mean_activation, max_activation   over the tokens on which it fires
    token_r2              share of its variance that the current token explains (``auroc.token_r2``)
    label ...             what it is about, from ground truth (``describe``)
    auroc_<c>, threshold_<c>, precision_<c>, recall_<c>   full stop before a sentence of c; the threshold is
                          chosen on choose
    auroc_value_<c>       token before that full stop
    auroc_marker_<c>      first token of a sentence of c
    ..._choose            the same on the choose split
    """
    choose = codes(crosscoder, store, "choose") if choose is None else choose
    report = codes(crosscoder, store, "report") if report is None else report
    columns = {"feature": np.arange(crosscoder.n_features), "alive": frequency(report) > 0}
    columns |= {"nrn": crosscoder.nrn(1).numpy(), "nrn_p2": crosscoder.nrn(2).numpy()}
    base, distilled = (crosscoder.rows(name) for name in ("base", "distilled"))
    columns["cosine"] = crosscoder.cosine().numpy() if base.shape == distilled.shape else np.nan
    columns |= {f"norm_{name}": norms.numpy() for name, norms in zip(crosscoder.names, crosscoder.norms(1))}
    for suffix, coded in (("", report), ("_choose", choose)):
        fired, mass = (np.asarray(x.sum(axis=0)).ravel() for x in (coded.codes > 0, coded.codes))
        columns[f"frequency{suffix}"] = frequency(coded)
        columns[f"mean_activation{suffix}"] = mass / np.maximum(fired, 1)
    columns["max_activation"] = report.codes.max(axis=0).toarray().ravel()
    of_splits = (x for coded in (choose, report) for x in (coded.codes, store.tokens[coded.rows]))
    columns["token_r2"] = auroc.token_r2(*of_splits)

    def put(name: str, values: np.ndarray, suffix: str = "") -> None:
        detection.update({f"{name}_{c}{suffix}": values[:, i] for i, c in enumerate(DETECTED)})

    detection: dict[str, np.ndarray] = {}
    for where, name in (("before", "auroc"), ("value", "auroc_value"), ("marker", "auroc_marker")):
        for suffix, coded in (("_choose", choose), ("", report)):
            index, labels = positions(store, coded.rows, where)
            active, positive = coded.codes[index], is_category(labels)
            put(name, auroc.auroc(active, positive), suffix)
            if where == "before" and suffix:
                thresholds = auroc.best_thresholds(active, positive)
            elif where == "before":
                precision, recall = auroc.precision_recall(active, positive, thresholds)
                put("threshold", thresholds)
                put("precision", precision)
                put("recall", recall)
    return pd.DataFrame(columns).join(describe(store, report, tokenizer)).join(pd.DataFrame(detection))


def frequency(coded: SplitCodes) -> np.ndarray:
    """Share of the tokens on which each feature fires, [F]."""
    return np.asarray((coded.codes > 0).sum(axis=0)).ravel() / len(coded.rows)


def describe(
    store: Store, coded: SplitCodes, tokenizer: PreTrainedTokenizerBase | None = None
) -> pd.DataFrame:
    """What each feature's activation falls on, from ground truth; one row per feature. Shares are of the sum
    of its activation over all tokens.

    label   the first that holds:
            "before c"          at least half lies on sentence ends that are followed by c, and of what lies
                                on sentence ends these hold at least twice their share of sentence ends
            "at sentence ends"  at least 0.8 lies on sentence ends in traces
            "in c"              at least half lies in sentences of c (c may be "general" or "other")
            "in traces"         at least 0.8 lies in traces
            "mixed";  "" where nothing fires or nothing is labelled
    label_share, enrichment     the share that the label speaks of, and how many times the share of tokens
                                there it is ("mixed": of the kind of sentence with the largest share)
    top_token, top_token_share  the token (a word, or its id) with the largest share, and that share
    """
    kind, following = store.labels["label"][coded.rows].astype(int), np.full(len(coded.rows), -1)
    index, labels = positions(store, coded.rows, "before")
    following[index] = labels
    in_trace, is_end = (store.labels["kind"][coded.rows] == 1).astype(int), np.zeros(len(following), int)
    is_end[index] = 1
    mass = np.maximum(np.asarray(coded.codes.sum(axis=0), dtype=float).ravel(), 1e-300)
    number, names = np.arange(len(mass)), np.array(LABELS)

    def shares(groups: np.ndarray, size: int = len(LABELS)) -> tuple[np.ndarray, np.ndarray]:
        """Of the activation [size, F] and of the tokens [size] that lie in each group."""
        tokens = np.bincount(groups[groups >= 0], minlength=size) / max(len(groups), 1)
        return auroc.sum_by(groups, coded.codes, size).toarray() / mass, tokens

    inside, tokens_inside = shares(kind)
    ahead, tokens_ahead = shares(following)
    next_kind, own_kind = ahead.argmax(0), inside.argmax(0)
    most_ahead, most_inside = ahead[next_kind, number], inside[own_kind, number]
    at_end, in_traces = (shares(groups, 2)[0][1] for groups in (is_end, in_trace))
    of_ends, expected_of_ends = (x / np.maximum(x.sum(0), 1e-300) for x in (ahead, tokens_ahead))
    concentrated = of_ends[next_kind, number] >= np.minimum(2 * expected_of_ends[next_kind], 0.99)
    before, within = np.char.add("before ", names[next_kind]), np.char.add("in ", names[own_kind])
    # (what must hold, label, share of the activation, share of the tokens)
    rules = [
        ((most_ahead >= 0.5) & concentrated, before, most_ahead, tokens_ahead[next_kind]),
        (at_end >= 0.8, "at sentence ends", at_end, is_end.mean()),
        (most_inside >= 0.5, within, most_inside, tokens_inside[own_kind]),
        (in_traces >= 0.8, "in traces", in_traces, in_trace.mean()),
    ]
    holds, words, parts, expected = zip(*rules)
    label, share = np.select(holds, words, "mixed"), np.select(holds, parts, most_inside)
    enrichment = share / np.maximum(np.select(holds, expected, tokens_inside[own_kind]), 1e-300)
    by_token = auroc.sum_by(store.tokens[coded.rows], coded.codes, int(store.tokens.max()) + 1).tocsc()
    top = np.asarray(by_token.argmax(axis=0)).ravel()
    top_words = np.array(tokenizer.convert_ids_to_tokens(top.tolist()) if tokenizer else top, dtype=object)
    fires = mass > 1e-300
    known = fires & (inside.sum(0) > 0)
    return pd.DataFrame(
        {
            "label": np.where(known, label, ""),
            "label_share": np.where(known, share, np.nan),
            "enrichment": np.where(known, enrichment, np.nan),
            "top_token": np.where(fires, top_words, ""),
            "top_token_share": np.where(fires, by_token.max(axis=0).toarray().ravel() / mass, np.nan),
        }
    )


def usable(table: pd.DataFrame, nrn_over: float = 0.5) -> pd.Series:
    """Which features may stand for a category, bool [F]: alive on both splits, NRN above ``nrn_over``, and
    recurrent, where several crosscoders were compared (column "recurrent")."""
    alive = table["alive"].astype(bool) & (table["frequency_choose"] > 0) & (table["nrn"] > nrn_over)
    return alive & table["recurrent"] if "recurrent" in table else alive


def category_features(table: pd.DataFrame, nrn_over: float = 0.5, where: str = "before") -> dict[str, int]:
    """{category: the feature that predicts it best at the full stop on the choose split}, among ``usable``
    ones.

    ``where`` "marker": that is best at its first tokens. ``nrn_over`` -1 admits every NRN. A category for
    which nothing can be chosen is left out."""
    infix = {"before": "", "marker": "marker_"}[where]
    rows = table[usable(table, nrn_over)].set_index("feature")
    aurocs = {c: rows[f"auroc_{infix}{c}_choose"].dropna() for c in DETECTED}
    return {c: int(values.idxmax()) for c, values in aurocs.items() if len(values)}


def category_detectors(table: pd.DataFrame, nrn_over: float = 0.5) -> dict[str, Detector]:
    """{category: the feature that predicts it best on the choose split}, among ``usable`` ones: at the better
    of both PLACES, by firing or by falling silent (AUROC farthest from one half)."""
    rows, chosen = table[usable(table, nrn_over)].set_index("feature"), {}
    for c in DETECTED:
        values = {place: rows[f"{name}_{c}_choose"].dropna() - 0.5 for place, name in PLACES.items()}
        if best := best_of_places({place: v for place, v in values.items() if len(v)}):
            chosen[c] = best
    return chosen


def auroc_of(table: pd.DataFrame, category: str, detector: Detector) -> float:
    """AUROC of a detector on the report split."""
    value = table[f"{PLACES[detector.place]}_{category}"][detector.feature]
    return value if detector.sign > 0 else 1 - value


def best_aurocs(table: pd.DataFrame, category: str, suffix: str = "") -> pd.Series:
    """Each feature's AUROC before sentences of a category at the better of both PLACES, [F]. ``suffix``
    "_choose": on that split."""
    return table[[f"{name}_{category}{suffix}" for name in PLACES.values()]].max(axis=1)


def best_of_places(values: Mapping[str, pd.Series], silent: bool = True) -> Detector | None:
    """The detector with the AUROC farthest from one half. ``values`` {place: AUROC - 0.5, by feature}; one
    below 0, of a feature that falls silent, counts if ``silent``. None if there is none."""
    merit = {place: v.abs() if silent else v for place, v in values.items()}
    if not merit:
        return None
    place = max(merit, key=lambda p: merit[p].max())
    feature = int(merit[place].idxmax())
    return Detector(feature, place, 1 if values[place][feature] >= 0 else -1)


def extremes(table: pd.DataFrame, n: int = 100) -> dict[str, pd.DataFrame]:
    """E2: {"highest", "middle", "lowest"}: the n alive features at each end of NRN, and the n nearest to 0.5
    for comparison; with fewer than 3n, a third of them each."""
    alive = table[table["alive"].astype(bool) & table["nrn"].notna()].sort_values(["nrn", "feature"])
    n = min(check("n", n, int, low=1), len(alive) // 3)
    lowest, highest = alive.head(n), alive.tail(n).iloc[::-1]
    rest = alive.drop(index=[*lowest.index, *highest.index])
    middle = rest.loc[(rest["nrn"] - 0.5).abs().sort_values(kind="stable").index[:n]]
    return {"highest": highest, "middle": middle, "lowest": lowest}


def record(results: Results, table: pd.DataFrame, seed: int = 0) -> None:
    """Put into ``results``: how many features are alive, the mean of their NRN (p = 1; p = 2: names with
    _p2), and the shares above 0.9 and below 0.1."""
    alive = table[table["alive"]]
    results.add("alive", len(alive), n=len(table))
    for suffix in ("", "_p2"):
        nrn = alive[f"nrn{suffix}"]
        results.add(f"nrn_mean{suffix}", nrn.mean(), ci=bootstrap(nrn, seed=seed), n=len(nrn))
        for name, tail in (("over_0_9", nrn > 0.9), ("under_0_1", nrn < 0.1)):
            record_share(results, f"nrn_{name}{suffix}", tail)


def record_extremes(
    results: Results, inspection: Inspection, groups: Mapping[str, pd.DataFrame]
) -> pd.DataFrame:
    """Put into ``results`` what the features of ``extremes`` are about: tables e2_highest, e2_lowest and
    e2_token, metrics token_detectors_<group> (the token explains over half of the variance), token_detectors_
    gap (lowest minus highest), reasoning_<group> (the label names one of the four categories).

    Returns the features of all groups, with the columns group, fires_from_token (the AUROC with which the
    current token alone predicts *that* a feature fires) and reasoning (its label names a category)."""
    choose, report, store = inspection.choose, inspection.report, inspection.store
    labelled = pd.concat([part.assign(group=name) for name, part in groups.items()])
    labelled["fires_from_token"] = auroc.token_fires_auroc(
        choose.codes, store.tokens[choose.rows], report.codes, store.tokens[report.rows], labelled["feature"]
    )
    labelled["reasoning"] = labelled["label"].str.contains("|".join(CATEGORIES))
    for name in ("highest", "lowest"):
        results.table(f"e2_{name}", groups[name][E2_COLUMNS].round(4))
    for name, part in groups.items():
        record_share(results, f"token_detectors_{name}", part["token_r2"] > 0.5)
        record_share(results, f"reasoning_{name}", labelled.loc[labelled["group"] == name, "reasoning"])
    record_difference(results, "token_detectors_gap", "token_detectors_lowest", "token_detectors_highest")
    by_group = labelled.groupby("group", sort=False).agg(
        features=("feature", "size"),
        median_token_r2=("token_r2", "median"),
        median_fires_from_token=("fires_from_token", "median"),
    )
    results.table("e2_token", by_group.round(4))
    return labelled


def record_share(results: Results, name: str, hits: pd.Series) -> None:
    """The share of ``hits`` [n] that are true, with Wilson's interval."""
    n = len(hits)
    results.add(name, hits.mean() if n else np.nan, ci=wilson(int(hits.sum()), n), n=n)


def record_difference(results: Results, name: str, a: str, b: str) -> None:
    """Metric ``a`` minus metric ``b`` of ``results``, with an interval from both of theirs."""
    one, other = ((m["value"], m["ci"]) for m in (results.metrics[a], results.metrics[b]))
    value, ci = difference(one, other)
    results.add(name, value, ci, results.metrics[a]["n"])


def over_crosscoders(results: Results, record: Callable, items: Iterable, *args, **options) -> list:
    """``record(own, item, *args)`` for the ``items`` of every crosscoder, in results of its own, which are
    pooled into ``results`` (``Results.pool``); what it returned for each of them. An item that is a tuple is
    several arguments. Tables are joined, with a column "crosscoder" if there are several."""
    each, returned = [], []
    for own, item in results.over(list(items)):
        each.append(own)
        returned.append(record(own, *(item if isinstance(item, tuple) else (item,)), *args, **options))
    for name in dict.fromkeys(name for own in each for name in own.tables):
        frames = [pd.DataFrame(own.tables[name]["rows"], columns=own.tables[name]["columns"]) for own in each]
        results.table(name, joined(frames))
    return returned


def share_of_crosscoders(results: Results, name: str, hits: Sequence[bool], interval: bool = True) -> None:
    """The share of crosscoders of which something is true, and each one's 1 or 0; with Wilson's ``interval``
    if it is about crosscoders in general, and not about these."""
    hits = np.asarray(hits, dtype=bool)
    ci = wilson(int(hits.sum()), len(hits)) if interval else None
    results.add(name, float(hits.mean()), ci, len(hits))
    results.metrics[name]["seeds"] = [[float(hit)] * 3 for hit in hits]


def as_shares(results: Results, *names: str) -> None:
    """Metrics <name>_<category> that are 1 or 0 of each crosscoder, as ``share_of_crosscoders``."""
    for name in (f"{name}_{c}" for name in names for c in DETECTED):
        values = [seed[0] for seed in dict(results.metrics).get(name, {}).get("seeds", [])]
        if values and not any(value is None or np.isnan(value) for value in values):
            share_of_crosscoders(results, name, [value == 1 for value in values])


def joined(frames: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Tables of several crosscoders below each other, with a column "crosscoder"; a single one as it is."""
    if len(frames) == 1:
        return frames[0]
    return pd.concat(dict(enumerate(frames)), names=["crosscoder"]).reset_index(0).reset_index(drop=True)


def inspect_all(
    run: Run,
    source: str = "",
    facts: Mapping | None = None,
    max_tokens: int | None = None,
    n_contexts: int = 8,
    nrn_over: float = 0.5,
    seed: int = 0,
) -> list[Inspection]:
    """``inspect`` what notebooks 01 and 02 left in a run, crosscoder by crosscoder, in its folders
    ``features``, ``features_1`` and so on. ``source`` and ``facts``: of one that was trained elsewhere
    (``crosscoder.sharing.open_all``). UserError says which notebook is missing.

    If there are several, their tables have the columns of ``follow``, and categories' features are chosen
    among recurrent ones."""
    pair = load_pair(run.pair)
    store, tokenizer = open_store(run, pair), pair.tokenizer()
    options, inspections = (max_tokens, n_contexts, nrn_over, seed), []
    for number, (crosscoder, made_from) in enumerate(open_all(run, store, source, facts)):
        folder = numbered(run, number, "features")
        inspections.append(inspect(crosscoder, store, folder, made_from, tokenizer, *options))
    crosscoders = [i.crosscoder for i in inspections]
    tables, members = follow(crosscoders, [i.table for i in inspections])
    followed = []
    for number, (i, t, m) in enumerate(zip(inspections, tables, members)):
        made_from = dict(run=run, pair=pair, number=number)
        followed.append(
            replace(i, table=t, detectors=category_detectors(t, nrn_over), members=m, **made_from)
        )
    return followed


def inspect_run(run: Run, *args, **options) -> Inspection:
    """The first of ``inspect_all``, which has the same parameters."""
    return inspect_all(run, *args, **options)[0]


def follow(
    crosscoders: Sequence[CrossCoder], tables: Sequence[pd.DataFrame]
) -> tuple[list[pd.DataFrame], list[pd.DataFrame]]:
    """(feature tables, members): the features of several crosscoders, followed through all of them.

    The tables get the columns stability, cluster, members, recurrent of ``crosscoder.recurrence.recurrent``
    (dead features are in no cluster: -1); members: ``members_of`` each crosscoder. Of a single crosscoder the
    table stays as it is, and it has no members."""
    if len(crosscoders) == 1:
        return list(tables), [pd.DataFrame(columns=MEMBERS)]
    clusters = recurrent(crosscoders, [t["alive"].to_numpy(bool) for t in tables])
    followed = []
    for number, table in enumerate(tables):
        own = clusters[clusters["crosscoder"] == number].drop(columns="crosscoder")
        merged = table.merge(own, on="feature", how="left", validate="1:1")
        merged = merged.fillna({"cluster": -1, "members": 0}).astype({"cluster": int, "members": int})
        followed.append(merged.assign(recurrent=merged["recurrent"].eq(True)))
    return followed, [members_of(crosscoders, clusters, number) for number in range(len(tables))]


def inspect(
    crosscoder: CrossCoder,
    store: Store,
    folder: Path,
    crosscoder_fingerprint: str,
    tokenizer: PreTrainedTokenizerBase,
    max_tokens: int | None = None,
    n_contexts: int = 8,
    nrn_over: float = 0.5,
    seed: int = 0,
) -> Inspection:
    """Compute everything into ``folder``, or load it if it was computed before from the same crosscoder,
    store and parameters.

    ``crosscoder_fingerprint`` is that in the crosscoder's manifest; ``max_tokens`` bounds the tokens of each
    split; ``nrn_over`` is where the distilled side begins, for ``detectors``. Beside ``feature_table`` the
    table has the columns of ``latent_scaling``."""
    check("n_contexts", n_contexts, int, low=1)
    check("nrn_over", nrn_over, float, low=-1, high=1)
    tokens = {split: len(sample_rows(store, split, max_tokens, seed)) for split in ("choose", "report")}

    def compute(folder: Path) -> None:
        coded = {split: codes(crosscoder, store, split, max_tokens, seed) for split in tokens}
        report = coded["report"]
        table = feature_table(crosscoder, store, *coded.values(), tokenizer)
        if {"base", "distilled"} <= set(crosscoder.names):
            scaling = latent_scaling(crosscoder, store, report.rows, seed=seed)
            table = table.merge(scaling, on="feature", validate="1:1")
        contexts = top_contexts(store, report, tokenizer, np.flatnonzero(table["alive"]), n_contexts)
        for split, part in coded.items():
            sparse.save_npz(folder / f"codes_{split}.npz", part.codes, compressed=False)
            np.save(folder / f"rows_{split}.npy", part.rows, allow_pickle=False)
        write_text(folder / "table.csv", table_text(table, "%.7g"))
        write_text(folder / "contexts.csv", table_text(contexts, "%.5g"))

    def read(folder: Path) -> Inspection:
        texts, parts = dict.fromkeys(("label", "text"), str), []
        contexts = read_table(folder / "contexts.csv", na_values=None, float_precision=None, dtype=texts)
        for split in tokens:
            rows = np.load(folder / f"rows_{split}.npy", allow_pickle=False)
            parts.append(SplitCodes(rows, sparse.csr_matrix(sparse.load_npz(folder / f"codes_{split}.npz"))))
        made_from = store, crosscoder, crosscoder_fingerprint, tokenizer
        return Inspection(*load(folder), contexts, *parts, *made_from)

    parameters = max_tokens, n_contexts, nrn_over, seed
    key = fingerprint("features", VERSION, crosscoder_fingerprint, store.fingerprint, *parameters)
    info = dict(crosscoder=crosscoder_fingerprint, store=store.fingerprint, tokens=tokens, nrn_over=nrn_over)
    return kept(Path(folder), key, compute, read, **info)


def load(folder: Path, crosscoder_fingerprint: str | None = None) -> tuple[pd.DataFrame, dict[str, Detector]]:
    """(feature table, {category: detector}) of one crosscoder, chosen without looking at others. UserError if
    they are missing, or were computed from another crosscoder than the one whose fingerprint is given."""
    folder = Path(folder)
    manifest = read_manifest(folder, MADE_BY)
    if crosscoder_fingerprint is not None and manifest.get("crosscoder") != crosscoder_fingerprint:
        raise UserError(
            f"the feature table was made from another crosscoder than there is now: run notebook {MADE_BY}"
            " again (make figures ONLY=03), with the same crosscoder_source if it is from elsewhere"
        )
    try:
        texts = dict.fromkeys(("label", "top_token"), str)  # "null" is a word here, and "7"
        table = read_table(folder / "table.csv", float_precision=None, dtype=texts)
        text = {name: table[name].astype(object).fillna("") for name in texts}
        table = table.assign(**text).astype({"alive": bool})
        return table, category_detectors(table, manifest["nrn_over"])
    except (OSError, ValueError, KeyError) as error:
        problem = f"the feature table is damaged ({type(error).__name__})"
        raise UserError(f"{problem}: remove its folder and run notebook {MADE_BY} again") from None


class Artefacts(NamedTuple):
    """One crosscoder of a run, and what notebook 03 left of it."""

    crosscoder: CrossCoder
    table: pd.DataFrame
    detectors: dict[str, Detector]
    fingerprint: str

    @property
    def chosen(self) -> dict[str, int]:
        """{category: feature}"""
        return {c: detector.feature for c, detector in self.detectors.items()}


def open_artefacts_of_all(
    run: Run, pair: Pair, source: str = "", facts: Mapping | None = None
) -> tuple[Store, list[Artefacts]]:
    """The store of a run, and all its crosscoders with their feature tables (columns of ``follow`` included);
    ``source`` and ``facts`` as in ``inspect_all``.

    UserError, naming the notebook that makes it, for what is missing or made from something else."""
    store = open_store(run, pair)
    crosscoders, contents = zip(*open_all(run, store, source, facts))
    folders = [numbered(run, number, "features") for number in range(len(crosscoders))]
    tables, _ = follow(crosscoders, [load(f, content)[0] for f, content in zip(folders, contents)])
    nrn_over = read_manifest(folders[0], MADE_BY)["nrn_over"]
    chosen = [category_detectors(table, nrn_over) for table in tables]
    return store, [Artefacts(*parts) for parts in zip(crosscoders, tables, chosen, contents)]
