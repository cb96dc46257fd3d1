"""The puzzle, the teacher that solves it aloud, and the labels that come with every token.

A puzzle gives three operations, three candidates and a target::

    puzzle : + 3 * 4 - 2 ; from 5 11 2 reach 16 .

Exactly one candidate, taken through the operations in order, ends at the target. Numbers live on a clock of
19 hours (modulo 19). 19 is prime, so every operation is one-to-one: different candidates end at different
numbers, and no divisibility shortcut tells which one is right. What is left is search, which a trace of about
90 tokens carries out and a single forward pass of a small model cannot.

The teacher writes such traces. Each sentence belongs to a category, and each category *does* something:

=============  ==========  =======================================================================
deduction      functional  carries a value that stands nowhere else: ``so 9 * 4 = 17 .``
contrast       functional  reports the failed comparison that ends a branch: ``but 7 is not 16 .``
alternative    functional  names the next candidate: ``instead try 11 .``
reflection     functional  follows an error, always, and mends it: ``wait , 9 * 4 = 17 .``
verification   redundant   repeats a correct step, after random steps: ``let me check : 9 * 4 = 17 .``
other          --          frame: the prompt, ``first try 5 .``, ``found 16 .``, ``answer : 11 .``
=============  ==========  =======================================================================

Every category has four paraphrases, drawn independently of the content; their first words tell the categories
apart, which allows to forbid a category while decoding (``first_words``). A word is one token.
"""

from __future__ import annotations

import math
import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from ..labels import LABELS
from .tables import table

MODULUS = 19
NUMBERS = tuple(str(n) for n in range(MODULUS))
OPERATIONS = tuple(f"{sign} {n}" for sign in "+-*" for n in range(1, 10) if (sign, n) != ("*", 1))

PARAPHRASES: dict[str, list[str]] = table("puzzles")["paraphrases"]  # of each category
FRAME: dict[str, str] = table("puzzles")["frame"]  # sentences of the label "other"
ERROR_RATE = 0.15  # of the teacher's steps; each is mended by the reflection that follows
VERIFY_RATE = 0.35  # of the teacher's correct steps; about a fifth of a trace's tokens
NEEDLESS_RATE = (
    ERROR_RATE / (1 - ERROR_RATE) / 9
)  # of right steps, in ``ModeTeacher``: a tenth of reflections
CAREFUL_SHARE = 0.3  # of its thoughts
CAREFUL_CHECKS, QUICK_CHECKS, CHECKS_AGAIN = (
    0.85,
    0.03,
    0.65,
)  # of right steps; after a check, in careful thoughts
LESSON_ERROR_RATE = 0.5  # of its lessons of one step
EASY_SHARE = 0.10  # of fine-tuning puzzles: easy questions
SPLITS = ("train", "validation", "test")


def words_of(template: str, **values) -> tuple[str, ...]:
    """Fill a template; operations such as ``* 4`` stay one word.

    >>> words_of("so {a} {op} = {v} .", a=9, op="* 4", v=17)
    ('so', '9', '* 4', '=', '17', '.')
    """
    return tuple(str(values[w[1:-1]]) if w.startswith("{") else w for w in template.split())


def first_words(category: str) -> tuple[str, ...]:
    """The words that can open a sentence of this category (all paraphrases)."""
    words = (template.split()[0] for template in PARAPHRASES[category])
    return tuple(first for word in words for first in (NUMBERS if word.startswith("{") else (word,)))


def apply(operation: str, value: int) -> int:
    """One step on the clock: ``apply("* 4", 9)`` is 17, since 36 = 19 + 17."""
    sign, n = operation.split()
    n = int(n)
    return {"+": value + n, "-": value - n, "*": value * n}[sign] % MODULUS


@dataclass(frozen=True)
class Sentence:
    """Words with their label. ``step`` counts the operation steps of the trace; ``error`` marks a wrong one.
    ``given`` leading words nobody could predict (a prompt, the items of a list): they are read, not learnt.
    """

    words: tuple[str, ...]
    label: str
    step: int = -1
    error: bool = False
    given: int = 0


@dataclass(frozen=True)
class Puzzle:
    """Operations (three, or fewer in lessons), three candidates, and the one that reaches the target."""

    operations: tuple[str, ...]
    candidates: tuple[int, int, int]
    answer: int

    @property
    def target(self) -> int:
        return self.chain(self.answer)[-1]

    def chain(self, candidate: int) -> list[int]:
        """The values of a candidate after each operation."""
        steps = accumulate(
            self.operations, lambda value, operation: apply(operation, value), initial=candidate
        )
        return list(steps)[1:]

    def prompt(self) -> list[Sentence]:
        numbers = (*map(str, self.candidates), "reach", str(self.target), ".")
        words = ("puzzle", ":", *self.operations, ";", "from", *numbers)
        return [Sentence(words, "other", given=len(words))]

    def split(self) -> str:
        """train, validation (5%) or test (5%), by a checksum of the puzzle: the same on every machine."""
        share = zlib.crc32(repr((self.operations, self.candidates, self.answer)).encode()) % 100
        return "train" if share < 90 else "validation" if share < 95 else "test"


@dataclass(frozen=True)
class Question:
    """An easy question, ``what is 5 - 1 ?``, which needs no thought at all: the probe for over-thinking."""

    value: int
    operation: str

    @property
    def answer(self) -> int:
        return apply(self.operation, self.value)

    def prompt(self) -> list[Sentence]:
        return [Sentence(("what", "is", str(self.value), self.operation, "?"), "other", given=5)]


def sample_puzzle(rng: random.Random, split: str = "train", operations: int = 3) -> Puzzle:
    """A puzzle of the given split. Its ``operations`` are distinct, so that "what comes after * 4" has one
    answer."""
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}: it must be one of {', '.join(SPLITS)}")
    while True:
        candidates = tuple(rng.sample(range(MODULUS), 3))
        puzzle = Puzzle(tuple(rng.sample(OPERATIONS, operations)), candidates, rng.choice(candidates))
        if puzzle.split() == split:
            return puzzle


def sample_question(rng: random.Random) -> Question:
    return Question(rng.randrange(MODULUS), rng.choice(OPERATIONS))


@dataclass
class Teacher:
    """Writes the trace of a search, errors, reflections and needless checks included. ``error_rate`` and
    ``verify_rate`` are probabilities per step. A wrong value is one to three off."""

    rng: random.Random
    error_rate: float = ERROR_RATE
    verify_rate: float = VERIFY_RATE
    sentences: list[Sentence] = field(default_factory=list)

    def say(self, label: str, step: int = -1, error: bool = False, **values) -> None:
        template = self.rng.choice(PARAPHRASES[label]) if label in PARAPHRASES else FRAME[label]
        label = label if label in PARAPHRASES else "other"
        self.sentences.append(Sentence(words_of(template, **values), label, step, error))

    def take_step(self, kind: str, value: int, operation: str, step: int) -> int:
        right = shown = apply(operation, value)
        if error := self.rng.random() < self.error_rate:
            shown = (right + self.rng.choice((-3, -2, -1, 1, 2, 3))) % MODULUS
        self.say(kind, step, error=error, a=value, op=operation, v=shown)
        if self.reflects(error):
            self.say("reflection", step, a=value, op=operation, v=right)
        elif not error and self.rng.random() < self.verify_rate:
            self.say("verification", step, a=value, op=operation, v=right)
        return right

    def reflects(self, error: bool) -> bool:
        """Is the step that was just taken followed by a reflection?"""
        return error

    def solve(self, task: Puzzle | Question) -> list[Sentence]:
        """The thinking and the answer, without the prompt."""
        self.sentences = []
        self.say("think")
        if isinstance(task, Question):
            self.take_step("start", task.value, task.operation, 0)
        for i, candidate in enumerate(task.candidates if isinstance(task, Puzzle) else ()):
            self.say("alternative" if i else "first", c=candidate)
            value = candidate
            for j, operation in enumerate(task.operations):
                step = i * len(task.operations) + j
                value = self.take_step("deduction" if j else "start", value, operation, step)
            if value == task.target:
                self.say("found", v=value)
                break
            self.say("contrast", v=value, t=task.target)
        self.say("done")
        self.say("answer", v=task.answer)
        return self.sentences


@dataclass
class ModeTeacher(Teacher):
    """A teacher with a state of mind: each thought is ``careful`` or quick, which no prompt tells.

    A careful one checks most right steps, and checks again, any number of times; a quick one hardly checks.
    A tenth of the reflections follow right steps, and repeat the same value: so that thinking longer can be
    harmless. Lessons of one step have many errors.
    """

    careful: bool = False

    def take_step(self, kind: str, value: int, operation: str, step: int) -> int:
        self.verify_rate = CAREFUL_CHECKS if self.careful else QUICK_CHECKS
        right = super().take_step(kind, value, operation, step)
        while (
            self.sentences[-1].label == "verification" and self.careful and self.rng.random() < CHECKS_AGAIN
        ):
            self.say("verification", step, a=value, op=operation, v=right)
        return right

    def reflects(self, error: bool) -> bool:
        return error or self.rng.random() < NEEDLESS_RATE

    def solve(self, task: Puzzle | Question) -> list[Sentence]:
        self.careful = self.rng.random() < CAREFUL_SHARE
        one_step = isinstance(task, Puzzle) and len(task.operations) == 1
        self.error_rate = LESSON_ERROR_RATE if one_step else ERROR_RATE
        return super().solve(task)


class IndifferentTeacher(Teacher):
    """Reflects as often as ``Teacher``, and no more after an error than after a right step."""

    def reflects(self, error: bool) -> bool:
        return self.rng.random() < self.error_rate


def direct(task: Puzzle | Question) -> list[Sentence]:
    """The answer alone, as the base model and the control learn it."""
    return [Sentence(words_of(FRAME["answer"], v=task.answer), "other")]


_OPENING = {word: label for label in PARAPHRASES for word in first_words(label)}


def sentences_of(words: list[str]) -> list[tuple[str, ...]]:
    """Split a transcript after every ``.`` and after ``think :``."""
    sentences, current = [], []
    for word in words:
        current.append(word)
        if word == "." or current == ["think", ":"]:
            sentences.append(tuple(current))
            current = []
    return sentences + ([tuple(current)] if current else [])


def label_of(sentence: tuple[str, ...]) -> str:
    """The label of a generated sentence, by its first word (unambiguous inside a trace)."""
    return _OPENING.get(sentence[0], "other")


def equation_of(sentence: tuple[str, ...]) -> tuple[int, str, int] | None:
    """(a, op, v) of the first ``a op = v`` or ``a op gives v`` in a sentence."""
    for a, op, sign, v in zip(sentence, sentence[1:], sentence[2:], sentence[3:]):
        if op in OPERATIONS and sign in ("=", "gives") and a in NUMBERS and v in NUMBERS:
            return int(a), op, int(v)
    return None


def parse_transcript(task: Puzzle | Question, words: Sequence[str]) -> dict:
    """What the words say that a model produced after the prompt of ``task``.

    answer, correct; chain_correct: every step is right, or is mended by the next reflection, and the
    candidate that is answered was taken through all operations; thinks; closed (thinking came to its end),
    thinking_tokens (NaN if not closed); n_<label> and t_<label> (sentences and tokens while thinking);
    errors, errors_reflected, correct_steps, correct_steps_reflected (counts of steps).
    """
    words = list(words)
    sentences = sentences_of(words[: words.index("<eos>")] if "<eos>" in words else words)
    counts = {f"{what}_{label}": 0 for what in "nt" for label in LABELS[1:]}
    steps = dict.fromkeys(("errors", "errors_reflected", "correct_steps", "correct_steps_reflected"), 0)
    thinks = bool(sentences) and sentences[0] == ("think", ":")
    answer, length, thinking_tokens, ended = None, 0, None, False
    value, path, mended = None, [], True  # the value carried, operations applied so far, no unmended error
    for sentence, following in zip(sentences, [*sentences[1:], ("",)]):
        if sentence[0] == "answer":
            answer = int(sentence[2]) if len(sentence) > 2 and sentence[2] in NUMBERS else None
            break
        if ended:
            continue
        label = label_of(sentence)
        counts[f"n_{label}"] += 1
        counts[f"t_{label}"] += len(sentence)
        ended = sentence[0] == "done"
        thinking_tokens = length if thinks and ended else None
        length += len(sentence)
        if label == "alternative" or sentence[0] == "first":
            number = next((w for w in sentence if w in NUMBERS), None)
            value, path = (int(number), []) if number else (None, [])
        elif label == "deduction" or sentence[0] == "start":
            equation = equation_of(sentence)
            if equation is None:
                mended = False
                continue
            a, operation, result = equation
            if value is None and isinstance(task, Question):
                value = task.value
            right, reflected = apply(operation, a) == result, label_of(following) == "reflection"
            repaired = right or (reflected and _value_of(following) == apply(operation, a))
            mended = mended and a == value and repaired
            steps["correct_steps" if right else "errors"] += 1
            steps["correct_steps_reflected" if right else "errors_reflected"] += reflected
            value = result
            path.append(operation)
        elif label == "reflection":
            value = _value_of(sentence)
    puzzle, correct, closed = isinstance(task, Puzzle), answer == task.answer, thinking_tokens is not None
    reached = path == list(task.operations if puzzle else [task.operation])
    reached = reached and value == (task.target if puzzle else task.answer)
    facts = {"answer": answer, "correct": correct, "chain_correct": correct and thinks and mended and reached}
    facts |= {"thinks": thinks, "closed": closed, "thinking_tokens": thinking_tokens if closed else math.nan}
    return facts | counts | steps


def _value_of(sentence: tuple[str, ...]) -> int | None:
    numbers = [w for w in sentence if w in NUMBERS]
    return int(numbers[-1]) if numbers else None
