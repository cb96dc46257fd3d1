"""Token tests on real text: what counts as an opening, where the places lie, and what is put in, against a
store made by hand.
"""

import random
from types import SimpleNamespace

import numpy as np
import pytest

from lib.features import token_tests
from lib.labels import LABELS

WORDS = [
    "_the",
    "_cat",
    "_sat",
    "_mat",
    ".",
    "_Wait",
    ",",
    "_so",
    "_it",
    "_is",
    "_then",
    "_dog",
    "_But",
    "Hm",
]
ID = {word: i for i, word in enumerate(WORDS)}


@pytest.fixture(autouse=True)
def short_window(monkeypatch):
    monkeypatch.setattr(token_tests, "WINDOW", 2)  # the sentences here are short


class Speller:
    def convert_ids_to_tokens(self, i):
        return WORDS[i]


def sentence(text, label):
    return [ID[word] for word in text.split()], label


def store_of(documents, splits):
    """A store of documents, each (kind, sentences); every sentence is (ids, label)."""
    columns = {name: [] for name in ("tokens", "documents", "split", "label", "starts", "ends", "kind")}
    for number, ((kind, sentences), split) in enumerate(zip(documents, splits)):
        for ids, label in sentences:
            n = len(ids)
            columns["tokens"] += ids
            columns["documents"] += [number] * n
            columns["split"] += [split] * n
            columns["label"] += [LABELS.index(label)] * n
            columns["starts"] += [1] + [0] * (n - 1)
            columns["ends"] += [0] * (n - 1) + [1]
            columns["kind"] += [int(kind == "trace")] * n
    arrays = {name: np.array(values) for name, values in columns.items()}
    labels = {name: arrays[name] for name in ("label", "starts", "ends", "kind")}

    class Made(SimpleNamespace):
        def __len__(self):
            return len(self.tokens)

    return Made(
        tokens=arrays["tokens"],
        documents=arrays["documents"],
        split=arrays["split"],
        labels=labels,
        kept=np.ones(len(arrays["tokens"]), bool),
    )


PLAIN = sentence("_the _cat _sat .", "other")
WAIT, SO = sentence("_Wait , _it _is .", "reflection"), sentence("_so _it _is .", "deduction")
TRACE = ("trace", [PLAIN, PLAIN, WAIT, SO, PLAIN, SO, sentence("_Wait _the _cat .", "reflection"), PLAIN])
GENERAL = (
    "general",
    [
        sentence("_the _dog _sat _then _it _sat .", "general"),
        sentence("_the _cat _is _so _the _mat .", "general"),
        sentence("_the _mat _is _it .", "general"),
        sentence("_the _cat _sat _then .", "general"),
    ],
)


@pytest.fixture(scope="module")
def store():
    return store_of([TRACE, TRACE, GENERAL, TRACE, GENERAL, GENERAL], [0, 0, 0, 2, 2, 2])


def test_openings_are_first_tokens_of_the_category_more_than_of_all_others(store):
    # as often: by number of the token
    assert token_tests.text_openings(store, "reflection") == [
        (ID["_Wait"], ID["_the"]),
        (ID["_Wait"], ID[","]),
    ]
    assert token_tests.text_openings(store, "deduction") == [(ID["_so"], ID["_it"])]
    shared = store_of([("trace", [PLAIN, PLAIN, sentence("_the _cat .", "contrast")])], [0])
    assert token_tests.text_openings(shared, "contrast") == []  # "the" opens other sentences more often
    assert token_tests.text_openings(shared, "alternative") == []  # which does not occur


def trials(store, n=5, categories=("reflection", "deduction"), seed=0):
    found = token_tests.text_trials(store, Speller(), categories, n, random.Random(seed))
    return [(c, where, test, [WORDS[i] for i in text], places) for c, where, test, text, places in found]


def test_places_lie_where_the_test_says(store):
    seen = set()
    for category, where, test, text, places in trials(store):
        seen.add((where, test))
        assert len(text) <= token_tests.CONTEXT and max(places) < len(text)
        at = text[places[0]]
        if where == "marker" and test == "in context":
            assert (
                at == {"reflection": "_Wait", "deduction": "_so"}[category]
                and len(places) == token_tests.WINDOW
            )
        if where == "before" and test in ("in context", "full stops"):
            assert at == "." and len(places) == 1
        if where == "before" and test == "in context":
            assert text[places[0] + 1] == {"reflection": "_Wait", "deduction": "_so"}[category]
        if test == "other sentences" and where == "marker":
            assert at != {"reflection": "_Wait", "deduction": "_so"}[category]
        if test == "decoys":
            assert (category, at) == ("deduction", "_so") and "_dog" in text  # general text has no "wait"
        if test == "injected":
            assert at == {"reflection": "_Wait", "deduction": "_so"}[category]
        if test in ("neutral", "unrelated text"):
            assert at not in ("_Wait",)
    everywhere = {"in context", "other sentences", "injected", "neutral", "unrelated text", "decoys"}
    assert seen == {(where, test) for where in ("before", "marker") for test in everywhere} | {
        ("before", "full stops")
    }


def test_neutral_text_differs_from_injected_in_words_only(store):
    by_test = {}
    for category, where, test, text, places in trials(store, n=2):
        if (
            where == "marker"
            and category == "reflection"
            and test in ("injected", "neutral", "unrelated text")
        ):
            by_test.setdefault(test, []).append((text, places))
    for (injected, at), (neutral, same), (plain, _) in zip(
        *(by_test[t] for t in ("injected", "neutral", "unrelated text"))
    ):
        assert at == same and injected[: at[0]] == neutral[: at[0]] == plain[: at[0]]
        assert neutral[at[0]] not in ("_Wait", "_so") and neutral[at[0]].startswith("_")
        assert (injected[at[1]] == ",") == (neutral[at[1]] == ",")  # punctuation stays


def test_documents_of_other_splits_and_short_ones_take_no_part(store):
    only_train = store_of([TRACE, GENERAL], [0, 0])
    assert trials(only_train) == []
    short = store_of([TRACE, ("trace", [PLAIN, WAIT])], [0, 2])
    assert not [t for t in trials(short) if t[2] == "in context"]  # fewer than eight tokens stand before it


def test_the_same_seed_gives_the_same_texts(store):
    assert trials(store) == trials(store) != trials(store, seed=1)
