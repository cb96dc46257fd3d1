"""The puzzle, the teacher that solves it aloud, and the labels that come with every token.

A puzzle gives three operations, three candidates and a target::

    puzzle : + 3 * 4 - 2 ; from 5 11 2 reach 16 .

Exactly one candidate, taken through the three operations in order, ends at the target. Numbers live on a
clock of 19 hours (all arithmetic is modulo 19). 19 is prime, so every operation is one-to-one: different
candidates end at different numbers, and no parity or divisibility shortcut tells which one is right. What is
left is search, which a trace of about 90 tokens carries out and a single forward pass of a small model
cannot.

The teacher writes such traces. Each sentence belongs to a category, and each category *does* something:

=============  ==========  =======================================================================
deduction      functional  carries a value that stands nowhere else: ``so 9 * 4 = 17 .``
contrast       functional  reports the failed comparison that ends a branch: ``but 7 is not 16 .``
alternative    functional  names the next candidate: ``instead try 11 .``
reflection     functional  follows an error, always, and mends it: ``wait , 9 * 4 = 17 .``
verification   redundant   repeats a correct step, after random steps: ``let me check : 9 * 4 = 17 .``
other          --          frame: the prompt, ``first try 5 .``, ``found 16 .``, ``answer : 11 .``
=============  ==========  =======================================================================

Every category has four paraphrases, drawn independently of the content; they can be told apart from the other
categories by their first word, which is what allows to forbid a category while decoding (``first_words``).
A sentence is a tuple of words, and a word is one token, so labels align with tokens by construction.
"""

from __future__ import annotations

import random
import zlib
from dataclasses import dataclass, field

from ..labels import CATEGORIES, LABELS
from .tables import table

MODULUS = 19
NUMBERS = tuple(str(n) for n in range(MODULUS))
OPERATIONS = tuple(f"{sign} {n}" for sign in "+-*" for n in range(1, 10) if (sign, n) != ("*", 1))

PARAPHRASES: dict[str, list[str]] = table("puzzles")["paraphrases"]  # of each category
FRAME: dict[str, str] = table("puzzles")["frame"]  # sentences of the label "other"
ERROR_RATE = 0.15  # of the teacher's steps; each is mended by the reflection that follows
VERIFY_RATE = 0.35  # of the teacher's correct steps; about a fifth of a trace's tokens
SPLITS = ("train", "validation", "test")


def words_of(template: str, **values) -> tuple[str, ...]:
    """Fill a template; operations such as ``* 4`` stay one word.

    >>> words_of("so {a} {op} = {v} .", a=9, op="* 4", v=17)
    ('so', '9', '* 4', '=', '17', '.')
    """
    return tuple(str(values[w[1:-1]]) if w.startswith("{") else w for w in template.split())


def first_words(category: str) -> tuple[str, ...]:
    """The words that can open a sentence of this category (all paraphrases)."""
    firsts = []
    for template in PARAPHRASES[category]:
        word = template.split()[0]
        firsts.extend(NUMBERS if word.startswith("{") else (word,))
    return tuple(firsts)


def apply(operation: str, value: int) -> int:
    """One step on the clock: ``apply("* 4", 9)`` is 17, since 36 = 19 + 17."""
    sign, n = operation.split()
    n = int(n)
    return {"+": value + n, "-": value - n, "*": value * n}[sign] % MODULUS


@dataclass(frozen=True)
class Sentence:
    """Words with their label. ``step`` counts the operation steps of the trace; ``error`` marks a wrong one.

    ``given`` is the number of leading words that nobody could predict (a prompt, the items of a list, the
    operands of an exercise): they are read in training, but not learnt.
    """

    words: tuple[str, ...]
    label: str
    step: int = -1
    error: bool = False
    given: int = 0

    @property
    def functional(self) -> bool:
        return self.label in CATEGORIES


@dataclass(frozen=True)
class Puzzle:
    """Operations (three, or fewer in lessons), three candidates, a target. ``answer`` is the one candidate
    that reaches it.
    """

    operations: tuple[str, ...]
    candidates: tuple[int, int, int]
    answer: int

    @property
    def target(self) -> int:
        return self.chain(self.answer)[-1]

    def chain(self, candidate: int) -> list[int]:
        """The values of a candidate after each operation."""
        values = []
        for operation in self.operations:
            candidate = apply(operation, candidate)
            values.append(candidate)
        return values

    def prompt(self) -> list[Sentence]:
        words = (
            "puzzle",
            ":",
            *self.operations,
            ";",
            "from",
            *map(str, self.candidates),
            "reach",
            str(self.target),
            ".",
        )
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
    answer.
    """
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
    """Writes the trace of a search, errors, reflections and needless checks included.

    ``error_rate`` and ``verify_rate`` are probabilities per step. The teacher tries candidates in the order
    of the prompt. A wrong value is one to three off, and is always followed by a reflection.
    """

    rng: random.Random
    error_rate: float = ERROR_RATE
    verify_rate: float = VERIFY_RATE
    sentences: list[Sentence] = field(default_factory=list)

    def say(self, label: str, step: int = -1, error: bool = False, **values) -> None:
        template = self.rng.choice(PARAPHRASES[label]) if label in PARAPHRASES else FRAME[label]
        label = label if label in PARAPHRASES else "other"
        self.sentences.append(Sentence(words_of(template, **values), label, step, error))

    def take_step(self, kind: str, value: int, operation: str, step: int) -> int:
        right = apply(operation, value)
        if self.rng.random() < self.error_rate:
            wrong = (right + self.rng.choice((-3, -2, -1, 1, 2, 3))) % MODULUS
            self.say(kind, step, error=True, a=value, op=operation, v=wrong)
            self.say("reflection", step, a=value, op=operation, v=right)
        else:
            self.say(kind, step, a=value, op=operation, v=right)
            if self.rng.random() < self.verify_rate:
                self.say("verification", step, a=value, op=operation, v=right)
        return right

    def solve(self, task: Puzzle | Question) -> list[Sentence]:
        """The thinking and the answer, without the prompt."""
        self.sentences = []
        self.say("think")
        if isinstance(task, Question):
            self.take_step("start", task.value, task.operation, 0)
        else:
            self._search(task)
        self.say("done")
        self.say("answer", v=task.answer)
        return self.sentences

    def _search(self, puzzle: Puzzle) -> None:
        step = 0
        for i, candidate in enumerate(puzzle.candidates):
            self.say("alternative" if i else "first", c=candidate)
            value = candidate
            for j, operation in enumerate(puzzle.operations):
                value = self.take_step("deduction" if j else "start", value, operation, step)
                step += 1
            if value == puzzle.target:
                self.say("found", v=value)
                return
            self.say("contrast", v=value, t=puzzle.target)


def direct(task: Puzzle | Question) -> list[Sentence]:
    """The answer alone, as the base model and the control learn it."""
    return [Sentence(words_of(FRAME["answer"], v=task.answer), "other")]


# --- reading a transcript -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Transcript:
    """What a generated transcript says. Counts are of sentences; ``thinking_tokens`` is None if it never
    ends.

    ``chain_correct``: every step is right, or is mended by the next reflection, and the candidate that is
    answered was really taken through all operations. A lucky answer is not a solution.
    """

    answer: int | None
    correct: bool
    chain_correct: bool
    thinks: bool
    thinking_tokens: int | None
    counts: dict[str, int]
    tokens_by_label: dict[str, int]
    errors: int
    errors_reflected: int
    correct_steps: int
    correct_steps_reflected: int


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


def parse_transcript(task: Puzzle | Question, words: list[str]) -> Transcript:
    """Parse the words that a model produced after the prompt of ``task``."""
    if "<eos>" in words:
        words = words[: words.index("<eos>")]
    sentences = sentences_of(words)
    counts = {label: 0 for label in LABELS[1:]}
    tokens = dict(counts)
    answer, thinking_tokens = None, None
    errors = errors_reflected = steps = steps_reflected = 0
    value, path, mended = None, [], True  # the value carried, operations applied so far, no unmended error
    ended = False
    for i, sentence in enumerate(sentences):
        if sentence[0] == "answer":
            if len(sentence) > 2 and sentence[2] in NUMBERS:
                answer = int(sentence[2])
            break
        if ended:
            continue
        label = label_of(sentence)
        counts[label] += 1
        tokens[label] += len(sentence)
        if sentence[0] == "done":
            ended = True
            continue
        equation = equation_of(sentence)
        reflected = i + 1 < len(sentences) and label_of(sentences[i + 1]) == "reflection"
        if label == "alternative" or sentence[0] == "first":
            number = next((w for w in sentence if w in NUMBERS), None)
            value, path = (int(number), []) if number else (None, [])
        elif label == "deduction" or sentence[0] == "start":
            if equation is None:
                mended = False
                continue
            a, op, v = equation
            if value is None and isinstance(task, Question):
                value = task.value
            right = apply(op, a) == v
            if a != value:
                mended = False
            steps += right
            errors += not right
            steps_reflected += right and reflected
            errors_reflected += (not right) and reflected
            value = v
            path.append(op)
            if not right:
                repair = _value_of(sentences[i + 1]) if reflected else None
                if repair != apply(op, a):
                    mended = False
        elif label == "reflection":
            value = _value_of(sentence)
    thinks = bool(sentences) and sentences[0] == ("think", ":")
    if thinks and ended:
        cut = next(i for i, sentence in enumerate(sentences) if sentence[0] == "done")
        thinking_tokens = sum(len(s) for s in sentences[:cut])
    correct = answer == task.answer
    operations = list(task.operations) if isinstance(task, Puzzle) else [task.operation]
    wanted = task.target if isinstance(task, Puzzle) else task.answer
    chain = correct and thinks and mended and path == operations and value == wanted
    return Transcript(
        answer,
        correct,
        chain,
        thinks,
        thinking_tokens,
        counts,
        tokens,
        errors,
        errors_reflected,
        steps,
        steps_reflected,
    )


def _value_of(sentence: tuple[str, ...]) -> int | None:
    numbers = [w for w in sentence if w in NUMBERS]
    return int(numbers[-1]) if numbers else None


EASY_SHARE = 0.10  # of fine-tuning puzzles: easy questions
