"""How a model is asked, and how its transcript is read: puzzles for the embedded pair, chat for real language
models.

Steering and its statistics (``lib.steering.steer``, ``lib.steering.outcomes``) see tasks and tables with the
same columns either way::

    medium = medium_of(pair)
    tasks = medium.tasks("report", 200, seed)

A transcript is a list of tokens as text. In chat, sentences are labelled by the lexicon, a check cannot be
told from a reflection that was needed, and no step can be verified: what follows from those is NaN.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from transformers import PreTrainedTokenizerBase

from ..activations.store import Store
from ..distil import trials
from ..features.token_tests import text_openings
from ..labels import LABELS
from ..models.pairs import Pair
from ..settings import check
from ..text import chat, lexicon, questions
from ..text.puzzles import first_words
from . import outcomes as responses

_PUZZLE_SPLIT = {"choose": "validation", "report": "test"}


@dataclass(frozen=True)
class Medium:
    """A way of asking.

    ``tasks(split, n, seed)`` and ``easy(n, seed)``, of one step, "5 - 1" the first; ``prompt`` makes the text
    that a task begins with, thinking opened; ``special_tokens``: whether the tokenizer adds its own to it;
    ``transcript`` makes tokens as text from generated ids; ``outcomes`` one row of facts per task;
    ``behaviours``: labels whose features are tried; ``opens(store, tokenizer, label)``: ids of the tokens
    that open the label's sentences; ``batch_rows`` are decoded together.
    """

    name: str
    tasks: Callable[[str, int, int], list]
    easy: Callable[[int, int], list]
    prompt: Callable[[object], str]
    transcript: Callable[[PreTrainedTokenizerBase, Sequence[int]], list[str]]
    outcomes: Callable[[Sequence, Sequence[Sequence[str]], int], pd.DataFrame]
    behaviours: tuple[str, ...]
    opens: Callable[[Store, PreTrainedTokenizerBase, str], list[int]]
    end_of_thinking: str
    special_tokens: bool
    batch_rows: int
    joiner: str  # of a transcript's tokens


def medium_of(pair: Pair) -> Medium:
    """Puzzles where the pair's corpus is the generated one, chat otherwise."""
    return PUZZLES if pair.corpus == "generated" else CHAT


# --- chat ---------------------------------------------------------------------------------------------------


def chat_outcomes(
    tasks: Sequence[questions.Question], transcripts: Sequence[Sequence[str]], max_new_tokens: int
) -> pd.DataFrame:
    """The columns of ``responses.outcomes`` from free text, one row per question.

    ``length``: tokens up to the closing tag of the thought (``max_new_tokens`` and ``runaway`` where the
    limit came first); ``correct``: the thought was closed and the answer after it ends with the right number;
    n_c and t_c: sentences of category c in the thought, and their tokens. ``chain_correct``, redundant and
    needed counts are NaN: free text has no verifier.
    """
    rows = []
    for task, pieces in zip(tasks, transcripts, strict=True):
        ends = np.cumsum([len(p) for p in pieces]) if pieces else np.zeros(0, int)
        text = "".join(pieces)
        at = text.find(chat.CLOSE.strip())
        closed, thought = at >= 0, text[: at if at >= 0 else len(text)]
        length = int(np.searchsorted(ends, at + len(chat.CLOSE.strip()))) + 1 if closed else len(pieces)
        runaway = not closed and len(pieces) >= max_new_tokens
        found = {f"{what}_{label}": 0 for what in "nt" for label in LABELS[1:]}
        for span in lexicon.sentences(thought):
            found[f"n_{span.label}"] += 1
            found[f"t_{span.label}"] += (
                int(np.searchsorted(ends, span.end) - np.searchsorted(ends, span.start, side="right")) + 1
            )
        answer = questions.final_number(text[at:]) if closed else None
        rows.append(
            {
                "answer": answer,
                "correct": closed and task.answer is not None and answer == task.answer,
                "chain_correct": np.nan,
                "thinks": True,
                "closed": closed,
                "thinking_tokens": length if closed else np.nan,
                **found,
                "length": float(max_new_tokens if runaway else max(length, 1)),
                "runaway": runaway,
            }
        )
    frame = pd.DataFrame(rows)
    for column in ("redundant", "needed", "redundant_tokens", "needed_tokens"):
        frame[column] = np.nan
    return frame


def _chat_tasks(split: str, n: int, seed: int) -> list[questions.Question]:
    return questions.ask(split, n, open_share=0.0, seed=seed)


def _easy(n: int, seed: int) -> list[questions.Question]:
    rng, found = random.Random(f"{seed}/easy"), {(5, 1): None}
    check("n", n, int, low=1, high=400)
    while len(found) < n:
        a = rng.randint(2, 40)
        found[a, rng.randint(1, a)] = None
    return [questions.Question(f"What is {a} - {b}?", a - b, -1) for a, b in found]


def _pieces(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    return [tokenizer.decode([i]) for i in ids]


def _first_of_openings(store: Store, tokenizer: PreTrainedTokenizerBase, label: str) -> list[int]:
    return sorted({first for first, _ in text_openings(store, label)})


def _first_of_paraphrases(store: Store, tokenizer: PreTrainedTokenizerBase, label: str) -> list[int]:
    return sorted(set(tokenizer.convert_tokens_to_ids(list(first_words(label)))))


CHAT = Medium(
    "chat",
    _chat_tasks,
    _easy,
    lambda task: chat.prompt(task.text) + chat.THINK,
    _pieces,
    chat_outcomes,
    ("reflection", "deduction"),
    _first_of_openings,
    "</",
    False,
    batch_rows=64,
    joiner="",
)
PUZZLES = Medium(
    "puzzles",
    lambda split, n, seed: trials.puzzles(n, _PUZZLE_SPLIT[split], seed),
    trials.easy_questions,
    lambda task: " ".join(trials.prompt_words(task)),
    trials.transcript,
    responses.outcomes,
    # with less, one thread
    ("reflection", "verification", "deduction"),
    _first_of_paraphrases,
    "done",
    True,
    batch_rows=800,
    joiner=" ",
)  # was slower (400: by 15%, 200: by 35%)
