"""How a model is asked, and how its transcript is read: puzzles for the embedded pair, chat for real language
models.

Steering and its statistics (``lib.steering.steer``, ``lib.steering.outcomes``) see tasks and tables with the
same columns either way::

    medium = medium_of(pair, tokenizer)
    tasks = medium.tasks("report", 200, seed)

A transcript is a list of tokens as text. In chat, sentences are labelled by the lexicon, a check cannot be
told from a reflection that was needed, and no step can be verified: what follows from those is NaN."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

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
from ..text.corpus import chat_markers
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
    that open the label's sentences; ``batch_rows`` are decoded together."""

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

    def end(self, tokenizer: PreTrainedTokenizerBase) -> int | None:
        """The id with which thinking ends: in chat the first of the closing tag."""
        if self.special_tokens:
            return tokenizer.convert_tokens_to_ids(self.end_of_thinking)
        return chat.think_tags(tokenizer)[1][0]


def medium_of(pair: Pair, tokenizer: PreTrainedTokenizerBase) -> Medium:
    """Puzzles where the pair's corpus is the generated one; else questions in the form of its traces: a chat
    where all models have its markers in common, plain text otherwise."""
    if pair.generated:
        return PUZZLES
    return CHAT if chat_markers(tokenizer, pair.differing_ids) else PLAIN


def chat_outcomes(
    tasks: Sequence[questions.Question], transcripts: Sequence[Sequence[str]], max_new_tokens: int
) -> pd.DataFrame:
    """The columns of ``responses.outcomes`` from free text, one row per question.

    ``length``: tokens up to the closing tag of the thought (``max_new_tokens`` and ``runaway`` where the
    limit came first); ``correct``: the thought was closed and the answer after it ends with the right number;
    n_c and t_c: sentences of category c in the thought, and their tokens. ``chain_correct``, redundant and
    needed counts are NaN: free text has no verifier."""
    rows, tag = [], chat.CLOSE.strip()
    for task, pieces in zip(tasks, transcripts, strict=True):
        ends, text = np.cumsum([len(p) for p in pieces], dtype=int), "".join(pieces)
        thought, closed, rest = text.partition(tag)
        length = int(np.searchsorted(ends, len(thought) + len(tag))) + 1 if closed else len(pieces)
        runaway = not closed and len(pieces) >= max_new_tokens
        counts = {f"{kind}_{label}": 0 for kind in "nt" for label in LABELS[1:]}
        for span in lexicon.sentences(thought):
            first = np.searchsorted(ends, span.start, side="right")
            counts[f"n_{span.label}"] += 1
            counts[f"t_{span.label}"] += int(np.searchsorted(ends, span.end) - first) + 1
        answer = questions.final_number(closed + rest) if closed else None
        correct = bool(closed) and task.answer is not None and answer == task.answer
        row = {"answer": answer, "correct": correct, "chain_correct": np.nan, "thinks": True}
        row |= {"closed": bool(closed), "thinking_tokens": length if closed else np.nan, **counts}
        row["length"] = float(max_new_tokens if runaway else max(length, 1))
        rows.append(row | {"runaway": runaway})
    unknown = ("redundant", "needed", "redundant_tokens", "needed_tokens")
    return pd.DataFrame(rows).assign(**dict.fromkeys(unknown, np.nan))


def _easy(n: int, seed: int) -> list[questions.Question]:
    rng, asked = random.Random(f"{seed}/easy"), {(5, 1): None}
    check("n", n, int, low=1, high=400)
    while len(asked) < n:
        a = rng.randint(2, 40)
        asked[a, rng.randint(1, a)] = None
    return [questions.Question(f"What is {a} - {b}?", a - b, -1) for a, b in asked]


CHAT = Medium(
    "chat",
    tasks=lambda split, n, seed: questions.ask(split, n, open_share=0.0, seed=seed),
    easy=_easy,
    prompt=lambda task: chat.prompt(task.text) + chat.THINK,
    transcript=lambda tokenizer, ids: [tokenizer.decode([i]) for i in ids],
    outcomes=chat_outcomes,
    behaviours=("reflection", "deduction"),
    opens=lambda store, tokenizer, label: sorted({first for first, _ in text_openings(store, label)}),
    end_of_thinking="</",
    special_tokens=False,
    batch_rows=64,
    joiner="",
)
PLAIN = replace(CHAT, name="plain", prompt=lambda task: f"{task.text}\n\n{chat.THINK}")
PUZZLES = Medium(
    "puzzles",
    tasks=lambda split, n, seed: trials.puzzles(n, _PUZZLE_SPLIT[split], seed),
    easy=trials.easy_questions,
    prompt=lambda task: " ".join(trials.prompt_words(task)),
    transcript=trials.transcript,
    outcomes=responses.outcomes,
    behaviours=("reflection", "verification", "deduction"),
    opens=lambda store, tokenizer, label: sorted(
        {*tokenizer.convert_tokens_to_ids(list(first_words(label)))}
    ),
    end_of_thinking="done",
    special_tokens=True,
    batch_rows=800,  # with fewer, one thread was slower (400: by 15%, 200: by 35%)
    joiner=" ",
)
