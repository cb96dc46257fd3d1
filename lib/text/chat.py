"""Reasoning traces as token ids: a question, the thought, the answer, in the form of one chat template.

Templates delete thoughts: that of R1-Distill drops everything before ``</think>`` in past turns. So traces
are never passed through a template; they are written out here, with the markers of the tokenizer's own
vocabulary, once, and the ids are fed to both models::

    <|im_start|>user\\n{question}<|im_end|>\\n<|im_start|>assistant\\n<think>\\n{thinking}\\n</think>\\n\\n{answer}<|im_end|>\\n

``<think>`` is spelled in ordinary tokens where the vocabulary has no token of its own for it.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from ..settings import UserError

THINK, CLOSE = "<think>\n", "\n</think>\n\n"


@dataclass(frozen=True)
class Trace:
    """A question with the thought and the answer of a reasoning model; ``model`` and ``source`` say whose and
    from where.
    """

    question: str
    thinking: str
    answer: str
    model: str = ""
    source: str = ""

    @property
    def response(self) -> str:
        """What the model writes: the thought between its tags, then the answer."""
        return f"{THINK}{self.thinking.strip()}{CLOSE}{self.answer.strip()}"


def prompt(question: str) -> str:
    """The text up to where the model begins to write."""
    return f"<|im_start|>user\n{question.strip()}<|im_end|>\n<|im_start|>assistant\n"


def parts(trace: Trace) -> tuple[str, str]:
    """A whole trace in two texts that are tokenised one by one: what the model is asked, and what it writes,
    its end marker included.
    """
    return prompt(trace.question), trace.response + "<|im_end|>\n"


def encode_trace(trace: Trace, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[bool]]:
    """Token ids of a whole trace, and for each whether it belongs to what the model writes."""
    asked, written = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in parts(trace))
    return asked + written, [False] * len(asked) + [True] * len(written)


def think_tags(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The token ids with which <think> and </think> begin: of each those that stay the same when a line break
    follows.
    """
    bare, followed = (
        [tokenizer(tag, add_special_tokens=False)["input_ids"] for tag in tags]
        for tags in ((THINK.strip(), CLOSE.strip()), (THINK, CLOSE.lstrip()))
    )
    opening, closing = (
        [i for i, other in takewhile(lambda pair: pair[0] == pair[1], zip(*both))]
        for both in zip(bare, followed)
    )
    return opening, closing


def trace_in(entry) -> Trace | None:
    """The trace in an entry of a file: question, thinking, answer, and model and source if they are given.
    None if it is no such entry.
    """
    names = ("question", "thinking", "answer")
    if not isinstance(entry, dict) or not all(isinstance(entry.get(name), str) for name in names):
        return None
    return Trace(*(entry[name] for name in names), entry.get("model") or "", entry.get("source") or "")


def read_traces(path: Path) -> Iterator[Trace]:
    """Traces of a JSONL file (.gz or not) with the fields question, thinking and answer. UserError names the
    line that lacks one.
    """
    if not path.is_file():
        raise UserError(
            f"the file of traces {path} does not exist: give JSONL with the fields question, thinking and"
            " answer"
        )
    with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                trace = trace_in(json.loads(line))
            except ValueError:
                trace = None
            if trace is None:
                raise UserError(
                    f"line {number} of {path.name} is no trace: it must be JSON with question, thinking and"
                    " answer, each a text"
                )
            yield trace
