"""More than a token? What a category's feature does when its words come without their function, and the
function without its words.

A "reasoning feature" may fire on a word and nothing else (2601.05679: that holds for 45 to 90% of those found
by contrast). Here every category's words, and what its sentences do, can be taken apart. All rates are shares
of texts that no model and no crosscoder has seen, one place per text, so that texts are independent and
Wilson's intervals hold. A feature *fires* if its joint code is above 0.

Each feature is tested where it was chosen to fire:

- ``marker``: in the first three tokens of a sentence of c ("wait , 9"), the window also in every other test;
- ``before``: at the last token before the sentence, where the next category is decided.

====================
=============================================================================================================
in context            new traces of the teacher: a sentence of c, chosen at random
other sentences       the same traces, before (in) a sentence of another kind
telltale, other, new  ``marker``: the sentence of c opens with the category's telltale word; is one of the
teacher's paraphrases without wording               it ("that should be 4 ."); is worded as no model has ever
seen ("look , 9 * 4 = 17 ."). ``before``: the same of
                      the sentence that *ends* there, for that is all that the feature can have read
injected              the telltale opening ("wait ,") put into unrelated prose, half of the time where a
sentence begins: at its first
                      token or within the next two
neutral               the same places with words of like frequency that no trace contains, commas kept
unrelated text        the same places with nothing put in
full stops            ``before`` only: ends of sentences of that prose; the token is the same, the function is
not
decoys                the telltale words where prose has them in another sense ("wait for the bus")
====================
=============================================================================================================

What can injection say of a feature that fires *before* c? Nothing acts backwards: at the position before them
the words cannot be felt (and the rates there are equal to the last digit). A foreteller is a token feature in
two other ways: it fires on the category's words as such, which its AUROC before the sentence cannot see
(injected, decoys); or on the token at its own position (full stops).

**Verdict** (``verdicts``), the first that holds, "half" being half of the rate in context:

    hardly fires in context    a rate in context below 0.1
    fires anywhere             at least half in unrelated text
    token feature              at least half for injected words, for decoys, or at full stops
    bound to a wording         less than half of the telltale wording's rate for the other, or for the new wording
    more than a token          none of these

The rule looks at rates, not at intervals, and was written before any were seen.
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

from ..activations.store import Store
from ..crosscoder.model import CrossCoder, check_feature
from ..models.pairs import Pair
from ..models.reader import capture
from ..settings import UserError, check
from ..stats import wilson
from ..text.corpus import encode
from ..text.curriculum import prose
from ..text.puzzles import FRAME, NUMBERS, OPERATIONS, PARAPHRASES, Sentence, Teacher, sample_puzzle, words_of
from . import injection

WINDOW = 3  # tokens: a marker and the next two
NEAREST = 5  # words of like frequency, of which one is drawn
SILENT, HALF = 0.1, 0.5  # of the rule above
PLAIN_OPENINGS = {  # of the teacher's paraphrases that do without the category's telltale words
    "reflection": ("that",),
    "deduction": NUMBERS,
    "alternative": ("perhaps", "next"),
    "contrast": ("this",),
    "verification": (),
}
NEW_WORDINGS = {  # in the vocabulary, and in nothing that any model was trained on
    "reflection": ("look , {a} {op} = {v} .", "{a} {op} should be {v} .", "it is {v} , we see ."),
    "deduction": ("here {a} {op} is {v} .", "from {a} {op} comes {v} .", "take {a} {op} , it is {v} ."),
    "alternative": ("we try {c} .", "the other is {c} .", "take {c} ."),
    "contrast": ("{v} is not {t} .", "it is not {t} .", "the answer is not {v} ."),
    "verification": (
        "look again : {a} {op} = {v} .",
        "it is true , {a} {op} = {v} .",
        "here {a} {op} = {v} again .",
    ),
}
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


class Trial(NamedTuple):
    """A text, and the places in it (numbers of words, from 0) of which one must fire."""

    category: str
    where: str
    test: str
    words: tuple[str, ...] | tuple[int, ...]  # token ids, if it is real text
    places: tuple[int, ...]


def openings(category: str) -> tuple[tuple[str, ...], ...]:
    """The telltale openings of a category: the words of its paraphrases before the first value, ("wait", ",")
    and so on.
    """
    found = []
    for template in PARAPHRASES[category]:
        words = template.split()
        fixed = next(i for i, word in enumerate(words) if word.startswith("{"))
        if fixed and words[0] not in PLAIN_OPENINGS[category]:
            found.append(tuple(words[:fixed]))
    return tuple(found)


def telltales(category: str) -> frozenset[str]:
    """The first words of ``openings``."""
    return frozenset(words[0] for words in openings(category))


# --- texts: traces, with one sentence in other words --------------------------------------------------------


@dataclass
class Recorder(Teacher):
    """A teacher that keeps what each sentence was made from: (kind, values), so that it can be said again in
    other words.
    """

    said: list = field(default_factory=list)

    def say(self, label: str, step: int = -1, error: bool = False, **values) -> None:
        super().say(label, step, error, **values)
        self.said.append((label, values))


def _joined(sentences: Sequence[Sentence]) -> tuple[str, ...]:
    return tuple(word for sentence in sentences for word in sentence.words)


def trace_trials(categories: Sequence[str], n: int, rng: random.Random) -> list[Trial]:
    """Trials in new traces of puzzles of the test split: up to ``n`` per category and test, at most one per
    category of a trace.
    """
    trials, counts = [], dict.fromkeys(categories, 0)
    for _ in range(10 * n):
        if min(counts.values()) >= n:
            break
        puzzle, teacher = sample_puzzle(rng, "test"), Recorder(rng)
        prompt, sentences = puzzle.prompt(), teacher.solve(puzzle)
        whole, starts = (
            _joined([*prompt, *sentences]),
            np.cumsum([len(prompt[0].words), *(len(s.words) for s in sentences)]),
        )
        inner = range(2, len(sentences) - 2)  # what follows "think :" and the first try, up to "found"
        for c in categories:
            mine = [i for i in inner if sentences[i].label == c]
            others = [i for i in inner if sentences[i].label != c]
            if counts[c] == n or not mine or not others:
                continue
            counts[c] += 1
            i, other = rng.choice(mine), rng.choice(others)
            for where, said in (("before", i - 1), ("marker", i)):
                test_places = {
                    "in context": _places(starts, i, where),
                    "other sentences": _places(starts, other, where),
                }
                test_places[_wording(teacher.said[said][0], sentences[said])] = test_places["in context"]
                trials += [Trial(c, where, test, whole, places) for test, places in test_places.items()]
                kind, values = teacher.said[said]
                if kind in NEW_WORDINGS:
                    new = Sentence(words_of(rng.choice(NEW_WORDINGS[kind]), **values), kind)
                    # what stands before sentence i, or its new form
                    before = [*prompt, *sentences[:said], new, *sentences[said + 1 : i]]
                    first = np.array([len(_joined(before)) - (len(new.words) if said == i else 0)])
                    words = _joined([*before, *sentences[i : i + 1 if said < i else i]])
                    trials.append(Trial(c, where, "new wording", words, _places(first, 0, where)))
    return trials


def _places(starts: np.ndarray, sentence: int, where: str) -> tuple[int, ...]:
    """The last word before a sentence of the trace, or its first three; ``starts`` [sentences] of the trace,
    prompt included.
    """
    first = int(starts[sentence])
    return (first - 1,) if where == "before" else tuple(range(first, first + WINDOW))


def _wording(kind: str, sentence: Sentence) -> str:
    plain = kind in PLAIN_OPENINGS and sentence.words[0] in PLAIN_OPENINGS[kind]
    return "other wording" if plain else "telltale wording"


# --- texts: prose, with words put in ------------------------------------------------------------------------


def prose_trials(
    categories: Sequence[str], n: int, rng: random.Random, neutral: Mapping[str, Sequence[str]]
) -> list[Trial]:
    """Trials in ``n`` new documents of prose: nothing put in, each category's words, or neutral ones, at the
    same place of a document.
    """
    trials, number, told = [], 0, frozenset().union(*map(telltales, PARAPHRASES))
    while number < n:
        sentences = prose(rng)
        words, starts = _joined(sentences), np.cumsum([0, *(len(s.words) for s in sentences)])
        # else the place would be a decoy
        free = [i for i in range(2, len(sentences) - 1) if told.isdisjoint(sentences[i].words)]
        if not free:
            continue
        number, sentence = number + 1, rng.choice(free)
        inside = rng.randrange(1, len(sentences[sentence].words) - WINDOW)  # no full stop within reach
        # by turns where a sentence begins, and within one
        cut = int(starts[sentence]) + (0 if number % 2 == 0 else inside)
        window = tuple(range(cut, cut + WINDOW))
        plain = words[: cut + WINDOW]
        for c in categories:
            opening = rng.choice(openings(c))
            other = tuple(rng.choice(neutral[word]) if word in neutral else word for word in opening)
            texts = {
                "injected": (*words[:cut], *opening, *words[cut:]),
                "neutral": (*words[:cut], *other, *words[cut:]),
            }
            for where in ("before", "marker"):
                trials += [
                    Trial(c, where, test, text[: cut + WINDOW], window) for test, text in texts.items()
                ]
                trials.append(Trial(c, where, "unrelated text", plain, window))
            trials.append(Trial(c, "before", "full stops", plain, (int(starts[sentence]) - 1,)))
    return trials


def decoy_trials(categories: Sequence[str], n: int, rng: random.Random) -> list[Trial]:
    """Trials at telltale words in new prose, where they do something else: up to ``n`` per category, at most
    one per document.
    """
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
                trials += [
                    Trial(c, where, "decoys", words[: i + WINDOW], tuple(range(i, i + WINDOW)))
                    for where in ("before", "marker")
                ]
    return trials


def neutral_words(
    store: Store, tokenizer: PreTrainedTokenizerBase, words: Sequence[str]
) -> dict[str, list[str]]:
    """{word: the few words of most like frequency in the store that no sentence of a trace contains};
    punctuation is left out.
    """
    templates = (
        [t for ts in PARAPHRASES.values() for t in ts]
        + list(FRAME.values())
        + [t for ts in NEW_WORDINGS.values() for t in ts]
    )
    used = (
        {word for template in templates for word in template.split()}
        | set(NUMBERS)
        | set(OPERATIONS)
        | {"puzzle", "from", "reach"}
    )
    counts = np.bincount(store.tokens[store.kept], minlength=len(tokenizer))
    pool = {
        word: counts[i]
        for word, i in tokenizer.get_vocab().items()
        if word.isalpha() and word not in used and counts[i]
    }
    ids = tokenizer.get_vocab()
    distance = lambda word: (
        lambda other: (abs(np.log(pool[other]) - np.log(max(counts[ids[word]], 1))), other)
    )
    return {word: sorted(pool, key=distance(word))[:NEAREST] for word in words if word.isalpha()}


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
    models read the texts anew.

    ``models`` passes loaded models by name. UserError for words that are not single tokens of the tokenizer.
    """
    texts = {words: i for i, words in enumerate(dict.fromkeys(t.words for t in trials))}
    ids = tokenizer.get_vocab()
    real = [isinstance(words[0], int) for words in texts]
    tokens = [
        list(words) if r else encode([Sentence(words, "")], tokenizer, ids) for r, words in zip(real, texts)
    ]
    starts = np.cumsum([0, *map(len, tokens)])
    # 1: BOS, before words
    at = [starts[texts[t.words]] + (not real[texts[t.words]]) + np.array(t.places) for t in trials]
    used, place = np.unique(np.concatenate(at), return_inverse=True)
    acts = []
    for name in crosscoder.names:
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
    (95%, Wilson), n. ``n`` texts per test at most, in real text those of ``lib.features.injection``. Empty where no
    category was chosen (text without labels).
    """
    check("n", n, int, low=1)
    features = {("before", c): check_feature(crosscoder, f) for c, f in chosen.items()}
    features |= {("marker", c): check_feature(crosscoder, f) for c, f in (markers or {}).items()}
    columns = ["category", "where", "feature", "test", "rate", "low", "high", "n"]
    if not features:
        return pd.DataFrame(columns=columns)
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
        trials = [Trial(*t) for t in injection.text_trials(store, tokenizer, categories, n, rng, WINDOW)]
    trials = [t for t in trials if (t.where, t.category) in features]
    numbers = sorted(set(features.values()))
    fired = fire(pair, crosscoder, store, tokenizer, trials, numbers, models)
    mine = [fired[i, numbers.index(features[t.where, t.category])] for i, t in enumerate(trials)]
    frame = pd.DataFrame(
        {
            "category": [t.category for t in trials],
            "where": [t.where for t in trials],
            "test": [t.test for t in trials],
            "fired": mine,
        }
    )
    found = []
    for where, c in features:
        for test in TESTS:
            hits = frame.loc[
                (frame["category"] == c) & (frame["where"] == where) & (frame["test"] == test), "fired"
            ]
            if len(hits):
                found.append(
                    (
                        c,
                        where,
                        features[where, c],
                        test,
                        hits.mean(),
                        *wilson(int(hits.sum()), len(hits)),
                        len(hits),
                    )
                )
    return pd.DataFrame(found, columns=columns)


def verdict(rate: Mapping[str, float]) -> str:
    """The rule of this module, on {test: rate}; a test that is missing, or NaN, decides nothing."""
    context = rate.get("in context", np.nan)
    if np.isnan(context):
        return "not tested"
    reaches = lambda test, of=context: rate.get(test, np.nan) >= HALF * of  # False for NaN
    falls_short = lambda test: rate.get(test, np.nan) < HALF * rate.get("telltale wording", np.nan)
    if context < SILENT:
        return "hardly fires in context"
    if reaches("unrelated text"):
        return "fires anywhere"
    if any(reaches(test) for test in ("injected", "decoys", "full stops")):
        return "token feature"
    return (
        "bound to a wording"
        if falls_short("other wording") or falls_short("new wording")
        else "more than a token"
    )


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
