"""Word or function? What a category's feature does where its words come without their function, and the
function without its words.

A "reasoning feature" may fire on a word and nothing else (arXiv 2601.05679: that holds for 45 to 90% of those
found by contrast). So words and function are taken apart, in texts of which each gives one place: texts are
independent, and Wilson's intervals hold. A feature *fires* if its joint code is above 0. It is tested where
it was chosen to fire: ``marker``, the first three tokens of a sentence of c ("wait , 9"), or ``before``, the
last token before the sentence, where the next category is decided, or the value before that token.

The texts are those of ``MEANINGS``.

**Real text** (``text_trials``) was not written to order: the three wordings are missing, and the rest is cut
out of documents of the split "report", as stretches of at most ``CONTEXT`` tokens. There an *opening* is one
of the commonest first two tokens of the category's sentences on the split "train" ("Wait,"), if its first
token opens sentences of this category more often than those of all others together. A category without such
a token is not injected.

Words put in cannot act on the position *before* them. A feature that fires before c is a token feature in two
other ways: it fires on the category's words as such (injected, decoys), or on the token at its own position
(full stops).

**Verdict** (``verdict``), the first that holds, "half" being half of the rate in context:

    hardly fires in context    a rate in context below 0.1
    fires anywhere             at least half in unrelated text
    token feature              at least half for injected words, for decoys, or at full stops
    bound to a wording         less than half of the telltale wording's rate for the other, or the new wording
    more than a token          none of these

The rule looks at rates, not at intervals, and was written before any were known."""

import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from transformers import PreTrainedTokenizerBase

from ..activations.store import SPLITS, Store
from ..crosscoder.model import CrossCoder, check_feature
from ..labels import CATEGORIES, DETECTED, LABELS
from ..models.pairs import Pair
from ..models.reader import capture
from ..results import Results
from ..settings import UserError, check
from ..stats import wilson
from ..text.corpus import encode
from ..text.curriculum import prose
from ..text.puzzles import FRAME, NUMBERS, OPERATIONS, PARAPHRASES, Sentence, Teacher, sample_puzzle, words_of
from ..text.tables import table as text_table
from .table import Detector, Inspection, as_shares, joined, over_crosscoders

WINDOW = 3  # tokens: a marker and the next two
NEAREST_WORDS, NEAREST_TOKENS = 5, 20  # of like frequency, of which one is drawn: on puzzles, in real text
CONTEXT = 96  # tokens of a real text, at most
LEAD = 8  # tokens of a real text that must stand before a place
OPENINGS = 3  # of a category in real text
SILENT, HALF = 0.1, 0.5  # of the rule above
PLAIN_OPENINGS = {  # of the teacher's paraphrases that do without the category's telltale words
    "reflection": ("that",),
    "deduction": NUMBERS,
    "alternative": ("perhaps", "next"),
    "contrast": ("this",),
    "verification": (),
}
NEW_WORDINGS = dict(text_table("puzzles")["new_wordings"])  # of known words, and in no training text
NEW_WORDINGS["start"] = NEW_WORDINGS["deduction"]
MEANINGS = {  # test: its texts; c is the category, *its place* the first three tokens, or the end before
    "in context": "new traces of the teacher: a sentence of c, chosen at random",
    "other sentences": "the same traces, at its place in a sentence of another kind",
    "telltale wording": "the sentence of c (before it: the one that ends there) opens with a telltale word",
    "other wording": "the same with one of the teacher's paraphrases without it ('that should be 4 .')",
    "new wording": "the same, worded as no model has ever seen ('look , 9 * 4 = 17 .')",
    "injected": "the telltale opening ('wait ,') put into unrelated prose, half of it at a sentence's start",
    "neutral": "the same places with words of like frequency that no trace contains, commas kept",
    "unrelated text": "the same places with nothing put in",
    "full stops": "before only: ends of sentences of that prose: the same token, another function",
    "decoys": "the telltale words where prose has them in another sense ('wait for the bus')",
}
TESTS = tuple(MEANINGS)
POSITIONS = ("before", "marker")
AT_ENDS = ("in context", "other sentences", "telltale wording", "other wording", "new wording", "full stops")
COLUMNS = ["category", "where", "feature", "test", "rate", "low", "high", "n"]
# metric: (where, test)
METRICS = {
    "injection_rate": ("before", "injected"),
    "injection_neutral": ("before", "neutral"),
    "injection_nothing": ("before", "unrelated text"),
    "full_stop_rate": ("before", "full stops"),
    "in_context_rate": ("before", "in context"),
    "injection_rate_marker": ("marker", "injected"),
    "decoy_rate_marker": ("marker", "decoys"),
}


class Trial(NamedTuple):
    """A text, and the places in it (numbers of words, or of tokens, from 0) of which one must fire."""

    category: str
    where: str
    test: str
    words: tuple[str, ...] | tuple[int, ...]  # token ids, if it is real text
    places: tuple[int, ...]


def _window(place: int) -> tuple[int, ...]:
    return tuple(range(place, place + WINDOW))


def _window_trials(category: str, test: str, text: Sequence, place: int) -> list[Trial]:
    """A trial of each feature in the window at one place of a text."""
    return [Trial(category, where, test, tuple(text), _window(place)) for where in POSITIONS]


def _injection_trials(
    category: str,
    tokens: Sequence,
    cut: int,
    openings: Sequence[tuple],
    neutral: Mapping,
    rng: random.Random,
    context: int | None = None,
) -> list[Trial]:
    """Trials with nothing, with one of the ``openings``, if there are any, and with neutral tokens put in at
    ``cut``."""
    put_in = {"unrelated text": ()}
    if openings:
        put_in["injected"] = rng.choice(openings)
        put_in["neutral"] = [rng.choice(neutral[t]) if t in neutral else t for t in put_in["injected"]]
    trials = []
    for test, put in put_in.items():
        trials += _window_trials(category, test, *_cut([*tokens[:cut], *put, *tokens[cut:]], cut, context))
    return trials


def _cut(tokens: Sequence, place: int, context: int | None = None) -> tuple[tuple, int]:
    """The stretch of at most ``context`` tokens that ends ``WINDOW`` after the place, and the place in it."""
    first = max(0, place + WINDOW - context) if context else 0
    return tuple(tokens[first : place + WINDOW]), place - first


def openings(category: str) -> tuple[tuple[str, ...], ...]:
    """The telltale openings of a category: the words of its paraphrases before the first value, ("wait", ",")
    and so on."""
    beginnings = [tuple(template.partition("{")[0].split()) for template in PARAPHRASES[category]]
    return tuple(words for words in beginnings if words and words[0] not in PLAIN_OPENINGS[category])


def telltales(category: str) -> frozenset[str]:
    """The first words of ``openings``."""
    return frozenset(words[0] for words in openings(category))


@dataclass
class Recorder(Teacher):
    """A teacher that records what each sentence was made from, (kind, values), to be put in other words."""

    sources: list = field(default_factory=list)

    def say(self, label: str, step: int = -1, error: bool = False, **values) -> None:
        super().say(label, step, error, **values)
        self.sources.append((label, values))


def _joined(sentences: Sequence[Sentence]) -> tuple[str, ...]:
    return tuple(word for sentence in sentences for word in sentence.words)


def trace_trials(categories: Sequence[str], n: int, rng: random.Random) -> list[Trial]:
    """Trials in new traces of puzzles of the test split: up to ``n`` per category and test, at most one per
    category of a trace."""
    trials, counts = [], dict.fromkeys(categories, 0)
    for _ in range(10 * n):
        if min(counts.values()) >= n:
            break
        puzzle, teacher = sample_puzzle(rng, "test"), Recorder(rng)
        prompt, sentences = puzzle.prompt(), teacher.solve(puzzle)
        trace = _joined([*prompt, *sentences])
        starts = np.cumsum([len(prompt[0].words), *(len(s.words) for s in sentences)]).tolist()
        inner = range(2, len(sentences) - 2)  # what follows "think :" and the first try, up to "found"
        for c in categories:
            own = [i for i in inner if sentences[i].label == c]
            others = [i for i in inner if sentences[i].label != c]
            if counts[c] == n or not own or not others:
                continue
            counts[c] += 1
            i, other = rng.choice(own), rng.choice(others)
            for where, worded in (("before", i - 1), ("marker", i)):  # worded: the sentence whose words vary
                (kind, values), first_word = teacher.sources[worded], sentences[worded].words[0]
                wording = "other" if first_word in PLAIN_OPENINGS.get(kind, ()) else "telltale"
                for test, k in (("in context", i), ("other sentences", other), (f"{wording} wording", i)):
                    trials.append(Trial(c, where, test, trace, _places(starts[k], where)))
                if kind in NEW_WORDINGS:
                    new = Sentence(words_of(rng.choice(NEW_WORDINGS[kind]), **values), kind)
                    changed = [*prompt, *sentences[:worded], new, *sentences[worded + 1 :]]
                    first = starts[i] + (len(new.words) - len(sentences[worded].words)) * (worded < i)
                    words = _joined(changed[: len(prompt) + i + 1])
                    trials.append(Trial(c, where, "new wording", words, _places(first, where)))
    return trials


def _places(first: int, where: str) -> tuple[int, ...]:
    """The last word before a sentence that begins at ``first``, or its first three."""
    return (first - 1,) if where == "before" else _window(first)


def prose_trials(
    categories: Sequence[str], n: int, rng: random.Random, neutral: Mapping[str, Sequence[str]]
) -> list[Trial]:
    """Trials in ``n`` new documents of prose: nothing put in, each category's words, or neutral ones, at the
    same place of a document."""
    trials, number, all_telltales = [], 0, frozenset().union(*map(telltales, PARAPHRASES))
    while number < n:
        sentences = prose(rng)
        words, starts = _joined(sentences), np.cumsum([0, *(len(s.words) for s in sentences)]).tolist()
        # else the place would be a decoy
        free = [i for i in range(2, len(sentences) - 1) if all_telltales.isdisjoint(sentences[i].words)]
        if not free:
            continue
        number, sentence = number + 1, rng.choice(free)
        inside = rng.randrange(1, len(sentences[sentence].words) - WINDOW)  # no full stop within reach
        # by turns where a sentence begins, and within one
        cut = starts[sentence] + (0 if number % 2 == 0 else inside)
        for c in categories:
            trials += _injection_trials(c, words, cut, openings(c), neutral, rng)
            stop = (starts[sentence] - 1,)
            trials.append(Trial(c, "before", "full stops", words[: cut + WINDOW], stop))
    return trials


def decoy_trials(categories: Sequence[str], n: int, rng: random.Random) -> list[Trial]:
    """Trials at telltale words in new prose, where they do something else: up to ``n`` per category, at most
    one per document."""
    trials, counts = [], dict.fromkeys(categories, 0)
    for _ in range(20 * n):
        if min(counts.values()) >= n:
            break
        words = _joined(prose(rng))
        for c in categories:
            at = [i for i, word in enumerate(words[:-WINDOW]) if word in telltales(c)]
            if at and counts[c] < n:
                counts[c] += 1
                trials += _window_trials(c, "decoys", *_cut(words, rng.choice(at)))
    return trials


def neutral_words(
    store: Store, tokenizer: PreTrainedTokenizerBase, words: Sequence[str]
) -> dict[str, list[str]]:
    """{word: the few words of most like frequency in the store that no sentence of a trace contains};
    punctuation is left out."""
    templates = [*FRAME.values(), *(t for ts in (*PARAPHRASES.values(), *NEW_WORDINGS.values()) for t in ts)]
    of_traces = {word for template in templates for word in template.split()}
    of_traces |= {*NUMBERS, *OPERATIONS, "puzzle", "from", "reach"}
    counts, ids = np.bincount(store.tokens[store.kept], minlength=len(tokenizer)), tokenizer.get_vocab()
    pool = {w: counts[i] for w, i in ids.items() if w.isalpha() and w not in of_traces and counts[i]}

    def nearest(word: str) -> list[str]:
        wanted = np.log(max(counts[ids[word]], 1))
        return sorted(pool, key=lambda other: (abs(np.log(pool[other]) - wanted), other))[:NEAREST_WORDS]

    return {word: nearest(word) for word in words if word.isalpha()}


def text_openings(store: Store, category: str, split: str = "train") -> list[tuple[int, int]]:
    """The commonest first two token ids of a category's sentences, commonest first; [] if no first token
    opens its sentences more often than all others."""
    labels, tokens = store.labels, store.tokens
    in_split = store.split == SPLITS.index(split)
    first = np.flatnonzero((labels["starts"] == 1) & (labels["kind"] == 1) & in_split)
    next_starts = labels["starts"][np.minimum(first + 1, len(store) - 1)]
    first = first[(first + 1 < len(store)) & (next_starts == 0)]  # sentences of two tokens at least
    own = labels["label"][first] == LABELS.index(category)
    size = int(tokens.max()) + 1
    here, elsewhere = (np.bincount(tokens[first[side]], minlength=size) for side in (own, ~own))
    telltale = first[own][(here > elsewhere)[tokens[first[own]]]]
    pairs = np.stack([tokens[telltale], tokens[telltale + 1]], axis=1)
    pairs, counts = np.unique(pairs, axis=0, return_counts=True)
    return [tuple(pair) for pair in pairs[np.argsort(-counts, kind="stable")][:OPENINGS].tolist()]


def text_trials(
    store: Store, tokenizer: PreTrainedTokenizerBase, categories: Sequence[str], n: int, rng: random.Random
) -> list[Trial]:
    """Up to ``n`` trials per category and test in documents of the split "report"."""
    rows = np.flatnonzero(store.split == SPLITS.index("report"))
    documents = np.split(rows, np.flatnonzero(np.diff(store.documents[rows])) + 1) if len(rows) else []
    traces, general = ([d for d in documents if store.labels["kind"][d[0]] == kind] for kind in (1, 0))
    known = {c: text_openings(store, c) for c in categories}
    trials = [trial for c in categories for trial in _in_traces(store, c, n, rng, traces)]
    neutral = _neutral_tokens(store, tokenizer, {pair[0] for pairs in known.values() for pair in pairs})
    rng.shuffle(general)
    for number, rows in enumerate(general[:n]):
        tokens, starts, ends = (x[rows] for x in (store.tokens, store.labels["starts"], store.labels["ends"]))
        begins, inside = _usable(starts == 1), _usable((starts == 0) & (ends == 0))
        if not begins or not inside:
            continue
        # by turns where a sentence begins, and within one
        cut, stop = rng.choice(begins if number % 2 == 0 else inside), rng.choice(begins) - 1
        for c, pairs in known.items():
            trials += _injection_trials(c, tokens.tolist(), cut, pairs, neutral, rng, CONTEXT)
            text, at = _cut(tokens.tolist(), stop, CONTEXT)
            trials.append(Trial(c, "before", "full stops", text, (at,)))
    for c in categories:
        rng.shuffle(general)
        is_telltale = np.isin(store.tokens, [pair[0] for pair in known[c]])
        places = ((rows, _usable(is_telltale[rows])) for rows in general)
        for rows, at in islice(((rows, at) for rows, at in places if at), n):
            trials += _window_trials(c, "decoys", *_cut(store.tokens[rows].tolist(), rng.choice(at), CONTEXT))
    return trials


def _usable(mask: np.ndarray) -> list[int]:
    """The places of a document that the mask admits, with enough tokens on both sides."""
    places = np.flatnonzero(mask)
    return places[(places >= LEAD) & (places + WINDOW <= len(mask))].tolist()


def _in_traces(
    store: Store, category: str, n: int, rng: random.Random, traces: Sequence[np.ndarray]
) -> list[Trial]:
    trials, number = [], 0
    for rows in rng.sample(list(traces), len(traces)):
        label = store.labels["label"][rows] == LABELS.index(category)
        own, others = (_usable((store.labels["starts"][rows] == 1) & side) for side in (label, ~label))
        if number == n:
            break
        if not own or not others:
            continue
        number += 1
        for test, places in (("in context", own), ("other sentences", others)):
            text, first = _cut(store.tokens[rows].tolist(), rng.choice(places), CONTEXT)
            trials += [Trial(category, where, test, text, _places(first, where)) for where in POSITIONS]
    return trials


def _neutral_tokens(
    store: Store, tokenizer: PreTrainedTokenizerBase, firsts: set[int]
) -> dict[int, list[int]]:
    """{first token of an opening: the tokens of most like frequency in general text that open no category,
    spelled like it: both begin a word, or neither}."""
    general = store.kept & (store.labels["kind"] == 0)
    counts = np.bincount(store.tokens[general], minlength=int(store.tokens.max()) + 1)
    used = np.flatnonzero(counts).tolist()
    spelled = {int(i): tokenizer.convert_ids_to_tokens(int(i)) for i in {*used, *firsts}}
    words = {i: text[0].isalpha() for i, text in spelled.items() if any(c.isalpha() for c in text)}
    result = {}
    for i in firsts & words.keys():
        similar = np.array([j for j in used if j not in firsts and words.get(j) == words[i]], dtype=int)
        distance = np.abs(np.log(counts[similar]) - np.log(max(counts[i], 1)))
        result[i] = similar[np.argsort(distance, kind="stable")][:NEAREST_TOKENS].tolist()
    return result


class Texts:
    """The texts of some trials, and both models' activations on them, which all crosscoders share. UserError
    for words that are not single tokens of the tokenizer."""

    def __init__(self, pair: Pair, store: Store, tokenizer: PreTrainedTokenizerBase, trials: Sequence[Trial]):
        texts = {words: i for i, words in enumerate(dict.fromkeys(t.words for t in trials))}
        ids = tokenizer.get_vocab()
        real = [isinstance(words[0], int) for words in texts]
        tokens = [
            list(words) if is_real else encode([Sentence(words, "")], tokenizer, ids)
            for is_real, words in zip(real, texts)
        ]
        starts, self.trials, both = np.cumsum([0, *map(len, tokens)]), trials, []
        for t in trials:
            number, places = texts[t.words], np.array(t.places)
            first = starts[number] + (not real[number])  # words stand behind a BOS
            # an end of a sentence has two places, the full stop and the value before it
            both.append([first + places, first + np.maximum(places - (t.test in AT_ENDS), 0)])
        used = np.unique(np.concatenate([at for pair_of in both for at in pair_of]))
        self._at = [[np.searchsorted(used, at) for at in pair_of] for pair_of in both]
        self._acts = {}
        for name in store.layers:  # one model at a time in memory
            self._acts[name] = capture(pair.load(name), tokenizer, tokens, store.layers[name])[used]

    @torch.no_grad()
    def fire(self, crosscoder: CrossCoder, features: Sequence[int], place: str = "before") -> np.ndarray:
        """For each trial whether each of ``features`` fires at one of its places, bool [trials, features];
        ``place`` "value": at the token before, where the trial is about an end of a sentence."""
        fires = crosscoder.encode([self._acts[name] for name in crosscoder.names])[:, list(features)] > 0
        at = [both[place == "value" and t.where == "before"] for both, t in zip(self._at, self.trials)]
        firsts = np.cumsum([0, *map(len, at)])[:-1]
        return np.logical_or.reduceat(fires.numpy()[np.concatenate(at)], firsts, axis=0)


def make_trials(
    pair: Pair,
    store: Store,
    tokenizer: PreTrainedTokenizerBase,
    categories: Sequence[str],
    n: int = 100,
    seed: int = 0,
) -> list[Trial]:
    """All trials of some categories, in at most ``n`` texts each. UserError for a category that has no
    texts."""
    check("n", n, int, low=1)
    if unknown := set(categories) - set(PARAPHRASES):
        raise UserError(
            f"there are no texts for the category {sorted(unknown)[0]!r}: it must be one of"
            f" {', '.join(PARAPHRASES)}"
        )
    rng = random.Random(f"markers/{seed}")
    if not pair.generated:
        return text_trials(store, tokenizer, categories, n, rng)
    words = {word for c in categories for opening in openings(c) for word in opening}
    trials = trace_trials(categories, n, rng)
    trials += prose_trials(categories, n, rng, neutral_words(store, tokenizer, sorted(words)))
    return trials + decoy_trials(categories, n, rng)


def token_tests(
    texts: Texts,
    crosscoder: CrossCoder,
    chosen: Mapping[str, Detector | int],
    markers: Mapping[str, int] | None = None,
) -> pd.DataFrame:
    """All tests of the features ``chosen`` {category: detector, or feature at the full stop} before, and of
    ``markers`` {category: feature} at, the sentences of their categories.

    A row per category, position ("before": chosen, "marker": markers) and test: feature, rate, low, high
    (95%, Wilson), n. A detector is asked at its own place; one that falls silent "fires" where it is silent.
    """
    features = {("before", c): d if isinstance(d, Detector) else Detector(d) for c, d in chosen.items()}
    features |= {("marker", c): Detector(f) for c, f in (markers or {}).items()}
    rows = []
    for (where, c), (feature, place, sign) in features.items():
        fired = texts.fire(crosscoder, [check_feature(crosscoder, feature)], place)[:, 0]
        outcomes = defaultdict(list)
        for trial, hit in zip(texts.trials, fired):
            if (trial.where, trial.category) == (where, c):
                outcomes[trial.test].append(hit == (sign > 0))
        for test in TESTS:
            if hits := outcomes.get(test):
                rate = np.mean(hits), *wilson(sum(hits), len(hits)), len(hits)
                rows.append((c, where, feature, test, *rate))
    return pd.DataFrame(rows, columns=COLUMNS)


def verdict(rate: Mapping[str, float]) -> str:
    """The rule of this module, on {test: rate}; a test that is missing, or NaN, decides nothing."""
    context, telltale = (rate.get(test, np.nan) for test in ("in context", "telltale wording"))

    def reaches_half(test: str) -> bool:
        return rate.get(test, np.nan) >= HALF * context  # False for NaN

    if np.isnan(context):
        return "not tested"
    if context < SILENT:
        return "hardly fires in context"
    if reaches_half("unrelated text"):
        return "fires anywhere"
    if any(map(reaches_half, ("injected", "decoys", "full stops"))):
        return "token feature"
    if any(rate.get(test, np.nan) < HALF * telltale for test in ("other wording", "new wording")):
        return "bound to a wording"
    return "more than a token"


def verdicts(tests: pd.DataFrame) -> pd.DataFrame:
    """``token_tests`` with a row per category and position, a column of rates per test, and the verdict."""
    names = ["category", "where", "feature"]
    if tests.empty:
        return pd.DataFrame(columns=[*names, *TESTS, "verdict"])
    wide = tests.pivot(index=names, columns="test", values="rate").reindex(columns=TESTS)
    wide = wide.loc[pd.MultiIndex.from_frame(tests[names]).unique()]
    wide["verdict"] = [verdict(row) for row in wide.to_dict("records")]
    return wide.rename_axis(columns=None).reset_index()


def record(
    results: Results,
    inspection: Inspection,
    markers: Mapping[str, int],
    detectors: pd.DataFrame,
    texts: Texts | None,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """``token_tests`` of one crosscoder, put into ``results``: (tests, verdicts). ``markers``: its features
    at first tokens; ``detectors``: ``detectors.detectors`` of its other ones; ``texts``: None if there is no
    category.

    Metrics: the rates ``METRICS`` of every category; more_than_token_<c>: 1 if that is the verdict, else 0;
    marker_token_features: share of the paper's categories whose feature at first tokens is a token feature.
    Tables token_tests, token_verdicts, the latter with the AUROC of the feature and of the token alone."""
    table, tests = inspection.table, pd.DataFrame(columns=COLUMNS)
    if texts is not None:
        tests = token_tests(texts, inspection.crosscoder, inspection.detectors, markers)
    rates = {(r.category, r.where, r.test): (r.rate, (r.low, r.high), r.n) for r in tests.itertuples()}
    for c in DETECTED:
        for name, (where, test) in METRICS.items():
            results.add(f"{name}_{c}", *rates.get((c, where, test), (np.nan, None, 0)))
    judged = verdicts(tests)
    aurocs = {(r.category, r.predictor): r.auroc for r in detectors.itertuples()}
    feature, token = [], []
    for row in judged.itertuples():
        suffix = ", marker" if row.where == "marker" else ""
        own = table.at[row.feature, f"auroc_marker_{row.category}"] if suffix else None
        feature.append(aurocs[row.category, "feature"] if own is None else own)
        token.append(aurocs[row.category, "token only" + suffix])
    judged.insert(3, "AUROC, token only", token)
    judged.insert(3, "AUROC", feature)
    before, at_first = (judged[judged["where"] == where] for where in ("before", "marker"))
    for row in before.itertuples():
        results.add(f"more_than_token_{row.category}", float(row.verdict == "more than a token"))
    of_paper = at_first[at_first["category"].isin(CATEGORIES)]["verdict"] == "token feature"
    results.add("marker_token_features", of_paper.mean() if len(of_paper) else np.nan, n=len(of_paper))
    results.table("token_tests", tests.round(4))
    results.table("token_verdicts", judged.round(4))
    return tests, judged


def record_all(
    results: Results,
    inspections: Sequence[Inspection],
    markers: Sequence[Mapping[str, int]],
    detectors: Sequence[pd.DataFrame],
    n: int = 100,
    seed: int = 0,
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """``record`` of all crosscoders on the same texts, pooled into ``results``: (tests, verdicts), of all."""
    first, texts = inspections[0], None
    categories = [c for c in DETECTED if any(c in i.chosen or c in m for i, m in zip(inspections, markers))]
    if categories:
        trials = make_trials(first.pair, first.store, first.tokenizer, categories, n, seed)
        texts = Texts(first.pair, first.store, first.tokenizer, trials)
    parts = over_crosscoders(results, record, list(zip(inspections, markers, detectors)), texts)
    as_shares(results, "more_than_token")
    return tuple(joined(frames) for frames in zip(*parts))
