"""Put puzzles to a model and read what it answers.

``generate`` decodes, ``read`` turns transcripts into one row of facts per puzzle, and
``reflection_probability`` asks the question that tells reflection from ritual: how likely is a reflection
after an error, and how likely after a correct step?
"""

from __future__ import annotations

import json
import random
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
from ..runs import write_text
from ..settings import check
from ..text.puzzles import (
    NUMBERS,
    OPERATIONS,
    Puzzle,
    Question,
    Teacher,
    first_words,
    read_transcript,
    sample_puzzle,
    sample_question,
)

Task = Puzzle | Question
MODES = {"think": ("think", ":"), "direct": ("answer", ":")}


def puzzles(n: int, split: str, seed: int = 0) -> list[Puzzle]:
    """``n`` distinct puzzles of a split, the same for the same seed."""
    rng = random.Random(f"{split}/{seed}")
    found: dict[Puzzle, None] = {}
    while len(found) < n:
        found[sample_puzzle(rng, split)] = None
    return list(found)


def easy_questions(n: int, seed: int = 0) -> list[Question]:
    """``n`` distinct questions of one step, "what is 5 - 1 ?" the first of them."""
    rng = random.Random(f"easy/{seed}")
    everything = len(NUMBERS) * len(OPERATIONS)
    check("n", n, int, low=1, high=everything)
    found = {Question(5, "- 1"): None}
    while len(found) < n:
        found[sample_question(rng)] = None
    return list(found)


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
    """Transcripts: the words after the prompt of each task, "think :" or "answer :" included, without
    padding.

    ``temperature`` 0 is greedy, 1 samples from the model's own distribution (no top-k, no top-p). ``forbid``
    names categories whose sentences may not be opened. Tasks are decoded in batches.
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
    """The words of generated ids, after those that opened thinking or the answer; what follows a padding
    token is left out.
    """
    # None: an id without a word
    words = [word or tokenizer.unk_token for word in tokenizer.convert_ids_to_tokens(ids)]
    end = words.index(tokenizer.pad_token) if tokenizer.pad_token in words else len(words)
    return [*MODES[mode], *words[:end]]


def read(tasks: Sequence[Task], transcripts: Sequence[Sequence[str]]) -> pd.DataFrame:
    """One row per task: ``puzzles.Reading`` flattened.

    Columns: answer, correct, chain_correct, thinks, closed (thinking came to its end), thinking_tokens (NaN
    if not closed), n_<label> and t_<label> (sentences and tokens while thinking), errors, errors_reflected,
    correct_steps, correct_steps_reflected.
    """
    rows = []
    for task, words in zip(tasks, transcripts, strict=True):
        reading = read_transcript(task, list(words))
        rows.append(
            {
                "answer": reading.answer,
                "correct": reading.correct,
                "chain_correct": reading.chain_correct,
                "thinks": reading.thinks,
                "closed": reading.thinking_tokens is not None,
                "thinking_tokens": np.nan if reading.thinking_tokens is None else reading.thinking_tokens,
                **{f"n_{label}": reading.counts[label] for label in LABELS[1:]},
                **{f"t_{label}": reading.tokens_by_label[label] for label in LABELS[1:]},
                "errors": reading.errors,
                "errors_reflected": reading.errors_reflected,
                "correct_steps": reading.correct_steps,
                "correct_steps_reflected": reading.correct_steps_reflected,
            }
        )
    return pd.DataFrame(rows)


@torch.no_grad()
def reflection_probability(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tasks: Sequence[Puzzle], seed: int = 0
) -> pd.DataFrame:
    """The probability that the next sentence is a reflection, after every step of the teacher's traces of
    ``tasks``.

    The traces contain errors at the teacher's rate. One row per step: task, error (bool), p_reflection (the
    summed probability of all first words of a reflection), right after the step's full stop.
    """
    rng = random.Random(f"reflection/{seed}")
    first = torch.tensor(tokenizer.convert_tokens_to_ids(list(first_words("reflection"))))
    rows = []
    for i, task in enumerate(tasks):
        sentences = [*task.prompt(), *Teacher(rng).solve(task)]
        ids = [
            tokenizer.bos_token_id,
            *tokenizer.convert_tokens_to_ids([w for s in sentences for w in s.words]),
        ]
        probabilities = model(torch.tensor([ids])).logits[0].softmax(-1)[:, first].sum(-1)
        end = 0
        for sentence in sentences:
            end += len(sentence.words)  # index of the sentence's last token, <bos> being 0
            if sentence.step >= 0 and sentence.label in ("deduction", "other"):
                rows.append({"task": i, "error": sentence.error, "p_reflection": float(probabilities[end])})
    return pd.DataFrame(rows)


# --- a battery of trials, kept on disk ----------------------------------------------------------------------


@dataclass(frozen=True)
class Condition:
    """One way of asking: which model, thinking or direct, how sampled, what forbidden."""

    model: str
    mode: str = "think"
    temperature: float = 0.0
    forbid: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return "-".join(
            [self.model, self.mode, f"t{self.temperature:g}", *(f"no_{label}" for label in self.forbid)]
        )


def battery(
    models: dict[str, PreTrainedModel],
    tokenizer,
    tasks: Sequence[Task],
    conditions: Sequence[Condition],
    folder: Path,
    fingerprint: str,
    seed: int = 0,
    progress=None,
) -> dict[Condition, pd.DataFrame]:
    """``read`` tables of all conditions. Transcripts are kept in ``folder`` under ``fingerprint``: asked
    once, read again.

    ``fingerprint`` stands for weights, tasks and seed; under another one everything is asked anew. An
    interrupted battery continues with the next condition.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tables = {}
    for i, condition in enumerate(conditions):
        file = folder / f"{condition.name}.json"
        kept = json.loads(file.read_text()) if file.is_file() else {}
        if kept.get("fingerprint") != fingerprint:
            transcripts = generate(
                models[condition.model],
                tokenizer,
                tasks,
                condition.mode,
                condition.temperature,
                condition.forbid,
                seed,
                max_new_tokens=4 if condition.mode == "direct" else 260,
            )
            kept = {"fingerprint": fingerprint, "transcripts": ["|".join(words) for words in transcripts]}
            write_text(file, json.dumps(kept))
        tables[condition] = read(tasks, [t.split("|") for t in kept["transcripts"]])
        if progress is not None:
            progress.update(i + 1, condition.name)
    return tables
