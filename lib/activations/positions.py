"""Where in a text a token stands: sentence ends, categories, phases of a trace."""

from collections.abc import Sequence

import numpy as np

from ..labels import DETECTED, LABELS
from ..settings import check
from .store import Store

PHASES = ("general", "prompt", "thinking", "answer")
# place: (its boundary, whose label, tokens from the place to the boundary)
PLACES = {
    "before": ("ends", "next_label", 0),
    "value": ("ends", "next_label", 1),
    "marker": ("starts", "label", 0),
}


def positions(store: Store, rows: np.ndarray, place: str) -> tuple[np.ndarray, np.ndarray]:
    """Places of sentences in traces among ``rows``: (index into rows [n], label index [n]).

    ``place``: the last token of a sentence ("before", the full stop), the one before it ("value", what a step
    ends with), or the first ("marker"). The label is that of the *next* sentence for the first two (-1 at the
    last sentence of a text, a negative for all), and of the token's own at the marker. Text without labels
    has no such positions."""
    boundary, label, ahead = PLACES[place]
    at = np.minimum(rows + ahead, len(store.documents) - 1)
    here = (store.labels[boundary][at] == 1) & (store.labels["kind"][at] == 1) & (at == rows + ahead)
    index = np.flatnonzero(here & (store.documents[at] == store.documents[rows]))
    return index, store.labels[label][at[index]]


def is_category(labels: np.ndarray, categories: Sequence[str] = DETECTED) -> np.ndarray:
    """Label indices [n] to one boolean column per category, [n, C]."""
    return np.stack([labels == LABELS.index(c) for c in categories], axis=1)


def missing_labels(store: Store, rows: np.ndarray, categories: Sequence[str] = DETECTED) -> str | None:
    """A sentence about the categories that no labelled trace among ``rows`` has; None if all are there."""
    labels = positions(store, rows, "before")[1]
    missing = [c for c, occurs in zip(categories, is_category(labels, categories).any(0)) if not occurs]
    if not missing:
        return None
    return (
        f"No sentence of {', '.join(missing)} follows a labelled position in this split: the corpus has no"
        f" labels for {'it' if len(missing) == 1 else 'them'}, so AUROC, precision and recall are not defined"
        " (NaN)."
    )


def phase_of(store: Store, rows: np.ndarray) -> np.ndarray:
    """Index into PHASES of each of ``rows``, int8 [n]; -1 in traces without labels or without a think tag.

    In the embedded pair's traces the first sentence is the prompt, the last the answer, and all between them
    is thinking; in real text the think tags tell, whose token ids the store's manifest has."""
    rows = np.asarray(rows, dtype=np.int64)
    text_rows = np.flatnonzero(np.isin(store.documents, np.unique(store.documents[rows])))
    starts, documents = store.labels["starts"][text_rows].astype(np.int64), store.documents[text_rows]
    _, first, which, length = np.unique(documents, return_index=True, return_inverse=True, return_counts=True)
    if tags := store.manifest["corpus"].get("think_tags"):
        trace = _phase_by_tags(store.tokens[text_rows], which, *tags)
    else:
        ordinal = np.cumsum(starts)
        ordinal = ordinal - (ordinal[first] - starts[first])[which]  # 1 in the first sentence, 0 before it
        last = ordinal[first + length - 1][which]
        prompt, thinking, answer = (PHASES.index(p) for p in PHASES[1:])
        trace = np.select([last == 0, ordinal <= 1, ordinal == last], [-1, prompt, answer], thinking)
    phase = np.where(store.labels["kind"][text_rows] == 1, trace, PHASES.index("general")).astype(np.int8)
    return phase[np.searchsorted(text_rows, rows)]


def _phase_by_tags(
    tokens: np.ndarray, document: np.ndarray, opening: Sequence[int], closing: Sequence[int]
) -> np.ndarray:
    """Phase of each token: before the first opening tag of its document prompt, up to the closing one
    thinking, then answer; -1 without any tag. A document that only closes the thought (a window of a long
    trace) thinks from its beginning. ``document`` [n] numbers the documents from 0, in order."""

    def firsts(tag: Sequence[int]) -> np.ndarray:
        """Where the tag begins first in each document; ``n`` where it does not."""
        begins = np.all([np.roll(tokens, -i) == t for i, t in enumerate(tag)], axis=0)
        begins &= document == np.roll(document, 1 - len(tag))
        first = np.full(int(document[-1]) + 1, len(tokens))
        np.minimum.at(first, document[begins], np.flatnonzero(begins))
        return first

    at, n = np.arange(len(tokens)), len(tokens)
    opened, closed = firsts(opening), firsts(closing)
    begins = np.where(opened < n, opened, np.where(closed < n, 0, n))[document]
    known = ((opened < n) | (closed < n))[document]
    prompt, thinking, answer = (PHASES.index(phase) for phase in PHASES[1:])
    return np.select([~known, at < begins, at < closed[document]], [-1, prompt, thinking], answer)


def groups_of(store: Store, rows: np.ndarray, grouping: str) -> dict[str, np.ndarray]:
    """{name: mask over ``rows``}, of those that occur: "phase", or "category" of the token's own sentence."""
    groupings = {"phase": PHASES, "category": LABELS}
    names = groupings[check("grouping", grouping, str, choices=tuple(groupings))]
    index = phase_of(store, rows) if grouping == "phase" else store.labels["label"][rows]
    return {name: index == i for i, name in enumerate(names) if (index == i).any()}
