"""Put puzzles to a model and read what it answers: transcripts, a row of facts per puzzle, and the question
that tells reflection from ritual: how likely is a reflection after an error, and after a correct step?
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from transformers import LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase

from ..labels import LABELS
from ..models import decode
from ..models.decode import BatchNoise
from ..runs import Progress, kept, write_text
from ..settings import check
from ..stats import bootstrap, wilson
from ..text.curriculum import comparing, prose
from ..text.puzzles import (
    NUMBERS,
    OPERATIONS,
    PARAPHRASES,
    Puzzle,
    Question,
    Teacher,
    apply,
    equation_of,
    first_words,
    label_of,
    parse_transcript,
    sample_puzzle,
    sample_question,
    sentences_of,
)

Task = Puzzle | Question
BEHAVIOURS = LABELS[2:]  # the categories of a trace, which can be forbidden
MODES = {"think": ("think", ":"), "direct": ("answer", ":")}


def puzzles(n: int, split: str, seed: int = 0) -> list[Puzzle]:
    """``n`` distinct puzzles of a split, the same for the same seed."""
    rng, drawn = random.Random(f"{split}/{seed}"), {}
    while len(drawn) < n:
        drawn[sample_puzzle(rng, split)] = None
    return list(drawn)


def easy_questions(n: int, seed: int = 0) -> list[Question]:
    """``n`` distinct questions of one step, "what is 5 - 1 ?" the first of them."""
    check("n", n, int, low=1, high=len(NUMBERS) * len(OPERATIONS))
    rng, drawn = random.Random(f"easy/{seed}"), {Question(5, "- 1"): None}
    while len(drawn) < n:
        drawn[sample_question(rng)] = None
    return list(drawn)


def prompt_words(task: Task, mode: str = "think") -> list[str]:
    """The prompt and the words that open thinking ("think :") or the answer ("answer :")."""
    if mode not in MODES:
        raise ValueError(f"unknown mode {mode!r}: it must be one of {', '.join(MODES)}")
    return [w for s in task.prompt() for w in s.words] + list(MODES[mode])


class ForbidCategories(LogitsProcessor):
    """Bans, at the start of a sentence, every first word of the given categories (all paraphrases)."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, categories: Sequence[str]):
        words = [w for category in categories for w in first_words(category)]
        self.banned = torch.tensor(sorted(set(tokenizer.convert_tokens_to_ids(words))))
        self.full_stop = tokenizer.convert_tokens_to_ids(".")

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """``input_ids`` [rows, length], ``scores`` [rows, vocabulary]."""
        starts = (input_ids[:, -1] == self.full_stop).nonzero().flatten()
        scores = scores.clone()
        scores[starts[:, None], self.banned[None, :]] = -torch.inf
        return scores


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[Task],
    mode: str = "think",
    temperature: float = 0.0,
    forbid: Sequence[str] = (),
    seed: int = 0,
    max_new_tokens: int = 260,
    batch_size: int = 250,
) -> list[list[str]]:
    """Transcripts: the words after the prompt of each task, "think :" or "answer :" included.

    ``temperature`` 0 is greedy, 1 samples from the model's own distribution (no top-k, no top-p). ``forbid``
    names categories whose sentences may not be opened.
    """
    transcripts = []
    for start in range(0, len(tasks), batch_size):
        prompts = [" ".join(prompt_words(task, mode)) for task in tasks[start : start + batch_size]]
        processors = [ForbidCategories(tokenizer, forbid)] if forbid else []
        if temperature > 0:
            processors.append(BatchNoise(len(prompts), temperature, seed + start))
        new = decode.generate(model, tokenizer, prompts, max_new_tokens, processors)
        transcripts += [transcript(tokenizer, ids, mode) for ids in new]
    return transcripts


def transcript(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], mode: str = "think") -> list[str]:
    """The words that opened thinking or the answer, and those of generated ids up to a padding token."""
    # None: an id without a word
    words = [word or tokenizer.unk_token for word in tokenizer.convert_ids_to_tokens(ids)]
    end = words.index(tokenizer.pad_token) if tokenizer.pad_token in words else len(words)
    return [*MODES[mode], *words[:end]]


def transcript_table(tasks: Sequence[Task], transcripts: Sequence[Sequence[str]]) -> pd.DataFrame:
    """``puzzles.parse_transcript``, one row per task."""
    return pd.DataFrame([parse_transcript(*pair) for pair in zip(tasks, transcripts, strict=True)])


def labelled(words: Sequence[str]) -> list[tuple[str, tuple[str, ...], bool]]:
    """The sentences of a transcript for ``figures.labelled_lines``."""
    return [(label_of(sentence), sentence, _wrong(sentence)) for sentence in sentences_of(list(words))]


def _wrong(sentence: tuple[str, ...]) -> bool:
    """Whether an equation in the sentence is not true."""
    if (equation := equation_of(sentence)) is None:
        return False
    a, operation, result = equation
    return apply(operation, a) != result


@torch.no_grad()
def right_verdicts(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, n: int = 500) -> list[bool]:
    """Whether the model prefers the right one of "true" and "false" after each of ``n`` equations, each read
    alone, as the base was trained to: "9 * 4 = 17 . true ." """
    rng = random.Random("verdicts")
    texts = (comparing(rng, stop=True) for _ in range(n))
    said = [s.words for text in texts if text[0].words[0] != "reach" for s in text][:n]
    ids = [tokenizer.convert_tokens_to_ids([tokenizer.bos_token, *words[:-2]]) for words in said]
    logits = model(torch.tensor(ids)).logits[:, -1, tokenizer.convert_tokens_to_ids(["true", "false"])]
    return [bool(true > false) == (words[-2] == "true") for (true, false), words in zip(logits, said)]


@torch.no_grad()
def reflection_probability(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[Puzzle],
    seed: int = 0,
    teacher: type[Teacher] = Teacher,
) -> pd.DataFrame:
    """How likely the next sentence is a reflection, after every step of a teacher's traces of ``tasks``.

    The traces contain errors at the teacher's rate. One row per step: task, error (bool), p_reflection (the
    summed probability of all first words of a reflection, right after the step's full stop).
    """
    rng = random.Random(f"reflection/{seed}")
    first = torch.tensor(tokenizer.convert_tokens_to_ids(list(first_words("reflection"))))
    rows = []
    for i, task in enumerate(tasks):
        sentences = [*task.prompt(), *teacher(rng).solve(task)]
        words = [tokenizer.bos_token, *(word for s in sentences for word in s.words)]
        ids = tokenizer.convert_tokens_to_ids(words)
        probabilities = model(torch.tensor([ids])).logits[0].softmax(-1)[:, first].sum(-1)
        end = 0
        for sentence in sentences:
            end += len(sentence.words)  # index of the sentence's last token, <bos> being 0
            if sentence.step >= 0 and sentence.label in ("deduction", "other"):
                rows.append({"task": i, "error": sentence.error, "p_reflection": float(probabilities[end])})
    return pd.DataFrame(rows)


def reflection_rates(steps: pd.DataFrame, seed: int = 0) -> dict[str, tuple]:
    """The table of ``reflection_probability`` as (value, 95% interval over tasks, steps): the mean
    probability after an error and after a correct step, and the AUROC with which it tells the two apart."""
    from sklearn.metrics import roc_auc_score

    rates = {}
    for error, name in ((True, "error"), (False, "correct")):
        part = steps[steps.error == error]
        interval = bootstrap(part.p_reflection, groups=part.task, seed=seed)
        rates[f"p_reflect_given_{name}"] = (part.p_reflection.mean(), interval, len(part))

    def auroc(rows: np.ndarray) -> float:
        return roc_auc_score(rows[:, 0], rows[:, 1]) if 0 < rows[:, 0].sum() < len(rows) else np.nan

    rows = steps[["error", "p_reflection"]].to_numpy(float)
    interval = bootstrap(rows, auroc, groups=steps.task, n_boot=200, seed=seed)
    return rates | {"reflect_auc": (auroc(rows), interval, len(steps))}


@dataclass(frozen=True)
class Condition:
    """One way of asking: which model, thinking or direct, how sampled, what forbidden."""

    model: str
    mode: str = "think"
    temperature: float = 0.0
    forbid: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        forbidden = (f"no_{label}" for label in self.forbid)
        return "-".join([self.model, self.mode, f"t{self.temperature:g}", *forbidden])


def battery(
    models: dict[str, PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[Task],
    conditions: Sequence[Condition],
    folder: Path,
    fingerprint: str,
    seed: int = 0,
) -> dict[Condition, pd.DataFrame]:
    """``transcript_table`` of each condition. Transcripts are kept in ``folder`` under ``fingerprint``, which
    stands for weights, tasks and seed."""
    tables, name = {}, "transcripts.txt"
    with Progress("conditions", len(conditions)) as progress:
        for condition in conditions:

            def ask(scratch: Path, condition=condition) -> None:
                limit = 4 if condition.mode == "direct" else 260
                asked = condition.mode, condition.temperature, condition.forbid, seed, limit
                texts = generate(models[condition.model], tokenizer, tasks, *asked)
                write_text(scratch / name, "\n".join("|".join(words) for words in texts))

            text = kept(folder / condition.name, fingerprint, ask, lambda made: (made / name).read_text())
            tables[condition] = transcript_table(tasks, [words.split("|") for words in text.split("\n")])
            progress.update(len(tables), condition.name)
    return tables


def share(hits: Sequence[bool]) -> tuple[float, tuple[float, float]]:
    """The share of hits and its Wilson interval."""
    return float(np.mean(hits)), wilson(int(np.sum(hits)), len(hits))


def difference(a: Sequence[bool], b: Sequence[bool], seed: int = 0) -> tuple[float, tuple[float, float]]:
    """How much larger the share of hits is in ``a`` than in ``b``, of the same tasks, with its interval."""
    gap = np.asarray(a, float) - np.asarray(b, float)
    return float(gap.mean()), bootstrap(gap, seed=seed)


def marker_words(documents: int, seed: int = 0) -> tuple[list[tuple[str, ...]], pd.DataFrame]:
    """The sentences of so many documents of general text, and how often the first words of the teacher's
    paraphrases occur in them and in half as many traces: per 1,000 tokens, a row a word."""
    rng = random.Random(seed)
    general = [s.words for _ in range(documents) for s in prose(rng)]
    traces = [s.words for _ in range(documents // 2) for s in Teacher(rng).solve(sample_puzzle(rng))]
    counts = {
        name: Counter(word for sentence in sentences for word in sentence)
        for name, sentences in (("general text", general), ("traces", traces))
    }
    words = [t.split()[0] for templates in PARAPHRASES.values() for t in templates if not t.startswith("{")]
    rates = {name: {w: 1000 * count[w] / count.total() for w in words} for name, count in counts.items()}
    return general, pd.DataFrame(rates).rename_axis("word")
