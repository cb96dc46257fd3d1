"""The token tests of ``lib.features.markers`` on real text: a category's words without its function, and the function
in its own place.

Nobody wrote this text to order, so nothing can be said again in other words; what is left of the tests is cut
out of documents of the split "report", and one text gives one place. Each text is a stretch of at most
``CONTEXT`` tokens that ends ``WINDOW`` tokens after it:

==================
================================================================================================================
in context          traces, before (at the first tokens of) a sentence that the lexicon gives the category
other sentences     the same traces, before (in) a sentence of another kind
injected            one of the category's openings ("Wait,") put into general text, half of the time where a
sentence begins
neutral             the same places with tokens of like frequency in general text, punctuation kept
unrelated text      the same places with nothing put in
full stops          ``before`` only: ends of sentences of general text
decoys              the first token of an opening, where general text has it by itself
==================
================================================================================================================

An *opening* is one of the commonest first two tokens of the category's sentences on the split "train", if its
first token opens sentences of this category more often than those of all others together. A category without
such a token is not injected.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from ..activations.store import SPLITS, Store
from ..labels import LABELS

CONTEXT = 96  # tokens of a text, at most
BEFORE = 8  # tokens that must stand before a place
OPENINGS, NEAREST = 3, 20  # openings of a category; tokens of like frequency, of which one is drawn


def openings(store: Store, category: str, split: str = "train") -> list[tuple[int, int]]:
    """The commonest first two token ids of a category's sentences, commonest first; [] if no first token is
    its own.
    """
    first = np.flatnonzero(
        (store.labels["starts"] == 1) & (store.labels["kind"] == 1) & (store.split == SPLITS.index(split))
    )
    first = first[
        (first + 1 < len(store)) & (store.labels["starts"][np.minimum(first + 1, len(store) - 1)] == 0)
    ]
    mine = store.labels["label"][first] == LABELS.index(category)
    size = int(store.tokens.max()) + 1
    here, elsewhere = (np.bincount(store.tokens[first[which]], minlength=size) for which in (mine, ~mine))
    own = first[mine][(here > elsewhere)[store.tokens[first[mine]]]]
    pairs, counts = np.unique(
        np.stack([store.tokens[own], store.tokens[own + 1]], axis=1), axis=0, return_counts=True
    )
    return [tuple(pair) for pair in pairs[np.argsort(-counts, kind="stable")][:OPENINGS].tolist()]


def text_trials(
    store: Store,
    tokenizer: PreTrainedTokenizerBase,
    categories: Sequence[str],
    n: int,
    rng: random.Random,
    window: int,
) -> list[tuple[str, str, str, tuple[int, ...], tuple[int, ...]]]:
    """(category, where, test, token ids, places) for up to ``n`` texts per category and test, from the split
    "report".
    """
    documents = _documents(store, "report")
    traces, general = ([d for d in documents if store.labels["kind"][d[0]] == k] for k in (1, 0))
    known = {c: openings(store, c) for c in categories}
    found = []
    for c in categories:
        found += _in_traces(store, c, n, rng, window, traces)
    neutral = _neutral(store, tokenizer, {pair[0] for pairs in known.values() for pair in pairs})
    rng.shuffle(general)
    for number, rows in enumerate(general[:n]):
        found += _in_general(store, known, number, rng, window, rows, neutral)
    for c in categories:
        firsts = {pair[0] for pair in known[c]}
        rng.shuffle(general)
        hits = (
            (rows, at)
            for rows in general
            if len(at := _usable(np.flatnonzero(np.isin(store.tokens[rows], list(firsts))), rows, window))
        )
        for _, (rows, at) in zip(range(n), hits):
            text, place = _cut(store.tokens[rows].tolist(), int(rng.choice(at.tolist())), window)
            found += [(c, where, "decoys", text, _window(place, window)) for where in ("before", "marker")]
    return found


def _documents(store: Store, split: str) -> list[np.ndarray]:
    rows = np.flatnonzero(store.split == SPLITS.index(split))
    return np.split(rows, np.flatnonzero(np.diff(store.documents[rows])) + 1) if len(rows) else []


def _usable(places: np.ndarray, rows: np.ndarray, window: int) -> np.ndarray:
    return places[(places >= BEFORE) & (places + window <= len(rows))]


def _cut(tokens: list[int], place: int, window: int) -> tuple[tuple[int, ...], int]:
    """The stretch that ends ``window`` tokens after the place, and the place in it."""
    first = max(0, place + window - CONTEXT)
    return tuple(tokens[first : place + window]), place - first


def _window(place: int, window: int) -> tuple[int, ...]:
    return tuple(range(place, place + window))


def _in_traces(
    store: Store, category: str, n: int, rng: random.Random, window: int, traces: Sequence[np.ndarray]
) -> list[tuple]:
    found, number = [], 0
    for rows in rng.sample(list(traces), len(traces)):
        starts = _usable(np.flatnonzero(store.labels["starts"][rows] == 1), rows, window)
        mine = store.labels["label"][rows[starts]] == LABELS.index(category)
        if number == n:
            break
        if not mine.any() or mine.all():
            continue
        number += 1
        for test, which in (("in context", mine), ("other sentences", ~mine)):
            text, place = _cut(store.tokens[rows].tolist(), int(rng.choice(starts[which].tolist())), window)
            found += [
                (category, "before", test, text, (place - 1,)),
                (category, "marker", test, text, _window(place, window)),
            ]
    return found


def _in_general(
    store: Store,
    known: Mapping[str, list[tuple[int, int]]],
    number: int,
    rng: random.Random,
    window: int,
    rows: np.ndarray,
    neutral: Mapping[int, list[int]],
) -> list[tuple]:
    tokens, found = store.tokens[rows].tolist(), []
    begins = _usable(np.flatnonzero(store.labels["starts"][rows] == 1), rows, window)
    inside = _usable(
        np.flatnonzero((store.labels["starts"][rows] == 0) & (store.labels["ends"][rows] == 0)), rows, window
    )
    if not len(begins) or not len(inside):
        return []
    # by turns where a sentence begins, and within one
    cut = int(rng.choice((begins if number % 2 == 0 else inside).tolist()))
    stop = int(rng.choice(begins.tolist())) - 1
    for c, pairs in known.items():
        plain, place = _cut(tokens, cut, window)
        texts = {"unrelated text": (plain, place)}
        if pairs:
            opening = rng.choice(pairs)
            other = tuple(rng.choice(neutral[i]) if i in neutral else i for i in opening)
            texts |= {
                test: _cut([*tokens[:cut], *put, *tokens[cut:]], cut, window)
                for test, put in (("injected", opening), ("neutral", other))
            }
        found += [
            (c, where, test, text, _window(at, window))
            for where in ("before", "marker")
            for test, (text, at) in texts.items()
        ]
        text, at = _cut(tokens, stop, window)
        found.append((c, "before", "full stops", text, (at,)))
    return found


def _neutral(store: Store, tokenizer: PreTrainedTokenizerBase, firsts: set[int]) -> dict[int, list[int]]:
    """{first token of an opening: the tokens of most like frequency in general text that open no category,
    spelled like it}.
    """
    counts = np.bincount(
        store.tokens[store.kept & (store.labels["kind"] == 0)], minlength=int(store.tokens.max()) + 1
    )
    spelled = {
        int(i): tokenizer.convert_ids_to_tokens(int(i)) for i in {*np.flatnonzero(counts).tolist(), *firsts}
    }
    word = lambda i: any(c.isalpha() for c in spelled[i])
    pool = np.array([i for i in np.flatnonzero(counts).tolist() if i not in firsts and word(i)], dtype=int)
    # both begin a word, or neither
    like = lambda i: np.array(
        [spelled[j][0].isalpha() == spelled[i][0].isalpha() for j in pool.tolist()], dtype=bool
    )
    found = {}
    for i in filter(word, firsts):
        same = pool[like(i)]
        distance = np.abs(np.log(counts[same]) - np.log(max(counts[i], 1)))
        found[i] = same[np.argsort(distance, kind="stable")][:NEAREST].tolist()
    return found
