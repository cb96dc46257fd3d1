"""Word or function? What a category's feature does where its words come without their function, and the
function without its words.

A "reasoning feature" may fire on a word and nothing else (arXiv 2601.05679: that holds for 45 to 90% of those
found by contrast). So words and function are taken apart, in texts of which each gives one place: texts are
independent, and Wilson's intervals hold. A feature *fires* if its joint code is above 0.

Each feature is tested where it was chosen to fire:

- ``marker``: in the first three tokens of a sentence of c ("wait , 9"), the window in every other test too;
- ``before``: at the last token before the sentence, where the next category is decided.

======================  ======================================================================================
in context              new traces of the teacher: a sentence of c, chosen at random
other sentences         the same traces, before (in) a sentence of another kind
telltale wording,       ``marker``: the sentence of c opens with a telltale word; or is one of the teacher's
other wording,          paraphrases without it ("that should be 4 ."); or is worded as no model has ever seen
new wording             ("look , 9 * 4 = 17 ."). ``before``: the same of the sentence that *ends* there, for
that
                        is all that the feature can have read
injected                the telltale opening ("wait ,") put into unrelated prose, half of the time where a
                        sentence begins: at its first token or within the next two
neutral                 the same places with words of like frequency that no trace contains, commas kept
unrelated text          the same places with nothing put in
full stops              ``before`` only: ends of sentences of that prose: the same token, another function
decoys                  the telltale words where prose has them in another sense ("wait for the bus")
======================  ======================================================================================

**Real text** (``text_trials``) was not written to order, and nothing can be said in other words: the three
wordings are missing, and the rest is cut out of documents of the split "report", as stretches of at most
``CONTEXT`` tokens. There an *opening* is one of the commonest first two tokens of the category's sentences on
the split "train" ("Wait,"), if its first token opens sentences of this category more often than those of all
others together. A category without such a token is not injected.

Words put in cannot act on the position *before* them (the rates there are equal to the last digit). A feature
that fires before c is a token feature in two other ways: it fires on the category's words as such, which its
AUROC before the sentence cannot show (injected, decoys); or on the token at its own position (full stops).

**Verdict** (``verdicts``), the first that holds, "half" being half of the rate in context:

    hardly fires in context    a rate in context below 0.1
    fires anywhere             at least half in unrelated text
    token feature              at least half for injected words, for decoys, or at full stops
    bound to a wording         less than half of the telltale wording's rate for the other, or the new wording
    more than a token          none of these

The rule looks at rates, not at intervals, and was written before any were known.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..activations.store import SPLITS, Store
from ..crosscoder.model import CrossCoder, check_feature
from ..labels import DETECTED, LABELS
from ..models.pairs import Pair
from ..models.reader import capture
from ..results import Results
from ..settings import UserError, check
from ..stats import wilson
from ..text.corpus import encode
from ..text.curriculum import prose
from ..text.puzzles import FRAME, NUMBERS, OPERATIONS, PARAPHRASES, Sentence, Teacher, sample_puzzle, words_of
from ..text.tables import table

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
NEW_WORDINGS = dict(table("puzzles")["new_wordings"])  # in the vocabulary, and in nothing that was trained on
NEW_WORDINGS["start"] = NEW_WORDINGS["deduction"]
TESTS = (
    "in context",
    "other sentences",
    "telltale wording",
    "other wording",
    "new wording",
    "injected",
    "neutral",
    "unrelated text",
    "full stops",
    "decoys",
)
POSITIONS = ("before", "marker")
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


# --- puzzles: openings --------------------------------------------------------------------------------------


def openings(category: str) -> tuple[tuple[str, ...], ...]:
    """The telltale openings of a category: the words of its paraphrases before the first value, ("wait", ",")
    and so on."""
    result = []
    for template in PARAPHRASES[category]:
        words = template.split()
        fixed = next(i for i, word in enumerate(words) if word.startswith("{"))
        if fixed and words[0] not in PLAIN_OPENINGS[category]:
            result.append(tuple(words[:fixed]))
    return tuple(result)


def telltales(category: str) -> frozenset[str]:
    """The first words of ``openings``."""
    return frozenset(words[0] for words in openings(category))


# --- puzzles: traces with one sentence in other words -------------------------------------------------------


@dataclass
class Recorder(Teacher):
    """A teacher that records what each sentence was made from, (kind, values), so that it can be put in other
    words."""

    said: list = field(default_factory=list)

    def say(self, label: str, step: int = -1, error: bool = False, **values) -> None:
        super().say(label, step, error, **values)
        self.said.append((label, values))


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
        starts = np.cumsum([len(prompt[0].words), *(len(s.words) for s in sentences)])
        inner = range(2, len(sentences) - 2)  # what follows "think :" and the first try, up to "found"
        for c in categories:
            own = [i for i in inner if sentences[i].label == c]
            others = [i for i in inner if sentences[i].label != c]
            if counts[c] == n or not own or not others:
                continue
            counts[c] += 1
            i, other = rng.choice(own), rng.choice(others)
            for where, worded in (("before", i - 1), ("marker", i)):  # worded: the sentence whose words vary
                kind, values = teacher.said[worded]
                places = {
                    "in context": _places(starts, i, where),
                    "other sentences": _places(starts, other, where),
                    _wording(kind, sentences[worded]): _places(starts, i, where),
                }
                trials += [Trial(c, where, test, trace, at) for test, at in places.items()]
                if kind in NEW_WORDINGS:
                    new = Sentence(words_of(rng.choice(NEW_WORDINGS[kind]), **values), kind)
                    # what stands before sentence i, or its new form
                    before = [*prompt, *sentences[:worded], new, *sentences[worded + 1 : i]]
                    first = np.array([len(_joined(before)) - (len(new.words) if worded == i else 0)])
                    words = _joined([*before, *sentences[i : i + 1 if worded < i else i]])
                    trials.append(Trial(c, where, "new wording", words, _places(first, 0, where)))
    return trials


def _places(starts: np.ndarray, sentence: int, where: str) -> tuple[int, ...]:
    """The last word before a sentence of the trace, or its first three; ``starts`` [sentences] of the trace,
    prompt included."""
    first = int(starts[sentence])
    return (first - 1,) if where == "before" else _window(first)


def _wording(kind: str, sentence: Sentence) -> str:
    plain = kind in PLAIN_OPENINGS and sentence.words[0] in PLAIN_OPENINGS[kind]
    return "other wording" if plain else "telltale wording"


# --- puzzles: prose with words put in -----------------------------------------------------------------------


def prose_trials(
    categories: Sequence[str], n: int, rng: random.Random, neutral: Mapping[str, Sequence[str]]
) -> list[Trial]:
    """Trials in ``n`` new documents of prose: nothing put in, each category's words, or neutral ones, at the
    same place of a document."""
    trials, number, all_telltales = [], 0, frozenset().union(*map(telltales, PARAPHRASES))
    while number < n:
        sentences = prose(rng)
        words, starts = _joined(sentences), np.cumsum([0, *(len(s.words) for s in sentences)])
        # else the place would be a decoy
        free = [i for i in range(2, len(sentences) - 1) if all_telltales.isdisjoint(sentences[i].words)]
        if not free:
            continue
        number, sentence = number + 1, rng.choice(free)
        inside = rng.randrange(1, len(sentences[sentence].words) - WINDOW)  # no full stop within reach
        # by turns where a sentence begins, and within one
        cut = int(starts[sentence]) + (0 if number % 2 == 0 else inside)
        plain = words[: cut + WINDOW]
        for c in categories:
            opening = rng.choice(openings(c))
            other = tuple(rng.choice(neutral[word]) if word in neutral else word for word in opening)
            texts = {
                test: (*words[:cut], *put, *words[cut:])[: cut + WINDOW]
                for test, put in (("injected", opening), ("neutral", other), ("unrelated text", ()))
            }
            trials += [
                Trial(c, where, test, text, _window(cut))
                for where in POSITIONS
                for test, text in texts.items()
            ]
            trials.append(Trial(c, "before", "full stops", plain, (int(starts[sentence]) - 1,)))
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
                i = rng.choice(at)
                trials += [Trial(c, where, "decoys", words[: i + WINDOW], _window(i)) for where in POSITIONS]
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

    def distance(word: str):
        return lambda other: (abs(np.log(pool[other]) - np.log(max(counts[ids[word]], 1))), other)

    return {word: sorted(pool, key=distance(word))[:NEAREST_WORDS] for word in words if word.isalpha()}


# --- real text ----------------------------------------------------------------------------------------------


def text_openings(store: Store, category: str, split: str = "train") -> list[tuple[int, int]]:
    """The commonest first two token ids of a category's sentences, commonest first; [] if no first token
    opens its sentences more often than all others."""
    labels = store.labels
    first = np.flatnonzero(
        (labels["starts"] == 1) & (labels["kind"] == 1) & (store.split == SPLITS.index(split))
    )
    next_starts = labels["starts"][np.minimum(first + 1, len(store) - 1)]
    first = first[(first + 1 < len(store)) & (next_starts == 0)]  # sentences of two tokens at least
    own = labels["label"][first] == LABELS.index(category)
    size = int(store.tokens.max()) + 1
    here, elsewhere = (np.bincount(store.tokens[first[which]], minlength=size) for which in (own, ~own))
    telltale = first[own][(here > elsewhere)[store.tokens[first[own]]]]
    pairs, counts = np.unique(
        np.stack([store.tokens[telltale], store.tokens[telltale + 1]], axis=1), axis=0, return_counts=True
    )
    return [tuple(pair) for pair in pairs[np.argsort(-counts, kind="stable")][:OPENINGS].tolist()]


def text_trials(
    store: Store, tokenizer: PreTrainedTokenizerBase, categories: Sequence[str], n: int, rng: random.Random
) -> list[Trial]:
    """Up to ``n`` trials per category and test in documents of the split "report"."""
    rows = np.flatnonzero(store.split == SPLITS.index("report"))
    edges = np.flatnonzero(np.diff(store.documents[rows])) + 1
    documents = np.split(rows, edges) if len(rows) else []
    traces, general = ([d for d in documents if store.labels["kind"][d[0]] == kind] for kind in (1, 0))
    known = {c: text_openings(store, c) for c in categories}
    trials = [trial for c in categories for trial in _in_traces(store, c, n, rng, traces)]
    neutral = _neutral_tokens(store, tokenizer, {pair[0] for pairs in known.values() for pair in pairs})
    rng.shuffle(general)
    for number, rows in enumerate(general[:n]):
        trials += _in_general(store, known, number, rng, rows, neutral)
    for c in categories:
        firsts = [pair[0] for pair in known[c]]
        rng.shuffle(general)
        places = ((rows, _usable(np.isin(store.tokens[rows], firsts), rows)) for rows in general)
        for _, (rows, at) in zip(range(n), ((rows, at) for rows, at in places if len(at))):
            text, place = _cut(store.tokens[rows].tolist(), int(rng.choice(at.tolist())))
            trials += [Trial(c, where, "decoys", text, _window(place)) for where in POSITIONS]
    return trials


def _usable(mask: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The places of a document that the mask admits, with enough tokens on both sides."""
    places = np.flatnonzero(mask)
    return places[(places >= LEAD) & (places + WINDOW <= len(rows))]


def _cut(tokens: list[int], place: int) -> tuple[tuple[int, ...], int]:
    """The stretch that ends ``WINDOW`` tokens after the place, and the place in it."""
    first = max(0, place + WINDOW - CONTEXT)
    return tuple(tokens[first : place + WINDOW]), place - first


def _in_traces(
    store: Store, category: str, n: int, rng: random.Random, traces: Sequence[np.ndarray]
) -> list[Trial]:
    trials, number = [], 0
    for rows in rng.sample(list(traces), len(traces)):
        starts = _usable(store.labels["starts"][rows] == 1, rows)
        own = store.labels["label"][rows[starts]] == LABELS.index(category)
        if number == n:
            break
        if not own.any() or own.all():
            continue
        number += 1
        for test, which in (("in context", own), ("other sentences", ~own)):
            text, place = _cut(store.tokens[rows].tolist(), int(rng.choice(starts[which].tolist())))
            trials += [
                Trial(category, "before", test, text, (place - 1,)),
                Trial(category, "marker", test, text, _window(place)),
            ]
    return trials


def _in_general(
    store: Store,
    known: Mapping[str, list[tuple[int, int]]],
    number: int,
    rng: random.Random,
    rows: np.ndarray,
    neutral: Mapping[int, list[int]],
) -> list[Trial]:
    tokens, trials = store.tokens[rows].tolist(), []
    starts, ends = (store.labels[name][rows] for name in ("starts", "ends"))
    begins, inside = _usable(starts == 1, rows), _usable((starts == 0) & (ends == 0), rows)
    if not len(begins) or not len(inside):
        return []
    # by turns where a sentence begins, and within one
    cut = int(rng.choice((begins if number % 2 == 0 else inside).tolist()))
    stop = int(rng.choice(begins.tolist())) - 1
    for c, pairs in known.items():
        texts = {"unrelated text": _cut(tokens, cut)}
        if pairs:
            opening = rng.choice(pairs)
            other = tuple(rng.choice(neutral[i]) if i in neutral else i for i in opening)
            for test, put in (("injected", opening), ("neutral", other)):
                texts[test] = _cut([*tokens[:cut], *put, *tokens[cut:]], cut)
        for where in POSITIONS:
            trials += [Trial(c, where, test, text, _window(at)) for test, (text, at) in texts.items()]
        text, at = _cut(tokens, stop)
        trials.append(Trial(c, "before", "full stops", text, (at,)))
    return trials


def _neutral_tokens(
    store: Store, tokenizer: PreTrainedTokenizerBase, firsts: set[int]
) -> dict[int, list[int]]:
    """{first token of an opening: the tokens of most like frequency in general text that open no category,
    spelled like it}."""
    general = store.kept & (store.labels["kind"] == 0)
    counts = np.bincount(store.tokens[general], minlength=int(store.tokens.max()) + 1)
    used = np.flatnonzero(counts).tolist()
    spelled = {int(i): tokenizer.convert_ids_to_tokens(int(i)) for i in {*used, *firsts}}
    is_word = {i: any(c.isalpha() for c in text) for i, text in spelled.items()}
    pool = np.array([i for i in used if i not in firsts and is_word[i]], dtype=int)
    begins_alike = {  # both begin a word, or neither
        i: np.array([spelled[j][0].isalpha() == spelled[i][0].isalpha() for j in pool.tolist()], dtype=bool)
        for i in firsts
    }
    result = {}
    for i in firsts:
        if is_word[i]:
            similar = pool[begins_alike[i]]
            distance = np.abs(np.log(counts[similar]) - np.log(max(counts[i], 1)))
            result[i] = similar[np.argsort(distance, kind="stable")][:NEAREST_TOKENS].tolist()
    return result


# --- running the models, counting ---------------------------------------------------------------------------


@torch.no_grad()
def fire(
    pair: Pair,
    crosscoder: CrossCoder,
    store: Store,
    tokenizer: PreTrainedTokenizerBase,
    trials: Sequence[Trial],
    features: Sequence[int],
    models: Mapping[str, PreTrainedModel] | None = None,
) -> np.ndarray:
    """For each trial whether each of ``features`` fires at one of its places, bool [trials, features]. Both
    models are run on the texts.

    ``models`` passes loaded models by name. UserError for words that are not single tokens of the tokenizer.
    """
    texts = {words: i for i, words in enumerate(dict.fromkeys(t.words for t in trials))}
    ids = tokenizer.get_vocab()
    real = [isinstance(words[0], int) for words in texts]
    tokens = [
        list(words) if is_real else encode([Sentence(words, "")], tokenizer, ids)
        for is_real, words in zip(real, texts)
    ]
    starts = np.cumsum([0, *map(len, tokens)])
    # 1: BOS, before words
    at = [starts[texts[t.words]] + (not real[texts[t.words]]) + np.array(t.places) for t in trials]
    used, place = np.unique(np.concatenate(at), return_inverse=True)
    acts = []
    for name in crosscoder.names:  # one model at a time in memory
        model = models[name] if models else pair.load(name)
        acts.append(capture(model, tokenizer, tokens, store.layers[name])[used])
    fires = crosscoder.encode(acts)[:, list(features)].numpy() > 0
    firsts = np.cumsum([0, *(len(t.places) for t in trials)])[:-1]
    return np.logical_or.reduceat(fires[place.ravel()], firsts, axis=0)


def token_tests(
    pair: Pair,
    crosscoder: CrossCoder,
    store: Store,
    chosen: Mapping[str, int],
    tokenizer: PreTrainedTokenizerBase,
    markers: Mapping[str, int] | None = None,
    n: int = 100,
    seed: int = 0,
    models: Mapping[str, PreTrainedModel] | None = None,
) -> pd.DataFrame:
    """All tests of the features ``chosen`` {category: feature} before, and of ``markers`` at, the sentences
    of their categories.

    A row per category, position ("before": chosen, "marker": markers) and test: feature, rate, low, high
    (95%, Wilson), n. ``n`` texts per test at most. Empty where no category was chosen (text without labels).
    """
    check("n", n, int, low=1)
    features = {("before", c): check_feature(crosscoder, f) for c, f in chosen.items()}
    features |= {("marker", c): check_feature(crosscoder, f) for c, f in (markers or {}).items()}
    if not features:
        return pd.DataFrame(columns=COLUMNS)
    categories = list(dict.fromkeys(c for _, c in features))
    if unknown := set(categories) - set(PARAPHRASES):
        raise UserError(
            f"there are no texts for the category {sorted(unknown)[0]!r}: it must be one of"
            f" {', '.join(PARAPHRASES)}"
        )
    rng = random.Random(f"markers/{seed}")
    if pair.corpus == "generated":
        words = {word for c in categories for opening in openings(c) for word in opening}
        trials = [
            *trace_trials(categories, n, rng),
            *prose_trials(categories, n, rng, neutral_words(store, tokenizer, sorted(words))),
            *decoy_trials(categories, n, rng),
        ]
    else:
        trials = text_trials(store, tokenizer, categories, n, rng)
    trials = [t for t in trials if (t.where, t.category) in features]
    numbers = sorted(set(features.values()))
    fired = fire(pair, crosscoder, store, tokenizer, trials, numbers, models)
    outcomes: dict[tuple, list[bool]] = {}
    for i, t in enumerate(trials):
        column = numbers.index(features[t.where, t.category])
        outcomes.setdefault((t.where, t.category, t.test), []).append(fired[i, column])
    rows = [
        (c, where, feature, test, np.mean(hits), *wilson(int(np.sum(hits)), len(hits)), len(hits))
        for (where, c), feature in features.items()
        for test in TESTS
        if (hits := outcomes.get((where, c, test)))
    ]
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
    if tests.empty:
        return pd.DataFrame(columns=["category", "where", "feature", *TESTS, "verdict"])
    wide = tests.pivot(index=["category", "where", "feature"], columns="test", values="rate").reindex(
        columns=TESTS
    )
    order = tests[["category", "where", "feature"]].drop_duplicates()
    wide = wide.loc[list(order.itertuples(index=False, name=None))]
    wide["verdict"] = [verdict(row) for row in wide.to_dict("records")]
    return wide.rename_axis(columns=None).reset_index()


def record(
    results: Results, tests: pd.DataFrame, table: pd.DataFrame, detectors: pd.DataFrame
) -> pd.DataFrame:
    """Put ``tests`` into ``results``: the rates ``METRICS`` of every category, tables token_tests and
    token_verdicts. Returns the verdicts, with the AUROC of the feature and of the token alone beside them
    (from the feature table, and from ``detectors.detectors``)."""
    rates = {(r.category, r.where, r.test): r for r in tests.itertuples()}
    for c in DETECTED:
        for name, (where, test) in METRICS.items():
            r = rates.get((c, where, test))
            results.add(
                f"{name}_{c}", r.rate if r else np.nan, (r.low, r.high) if r else None, r.n if r else 0
            )
    judged = verdicts(tests)
    aurocs = {(r.category, r.predictor): r.auroc for r in detectors.itertuples()}
    feature, token = [], []
    for row in judged.itertuples():
        marker = row.where == "marker"
        token.append(aurocs[row.category, "token only, marker" if marker else "token only"])
        feature.append(
            table.at[row.feature, f"auroc_marker_{row.category}"]
            if marker
            else aurocs[row.category, "feature"]
        )
    judged.insert(3, "AUROC, token only", token)
    judged.insert(3, "AUROC", feature)
    results.table("token_tests", tests.round(4))
    results.table("token_verdicts", judged.round(4))
    return judged
