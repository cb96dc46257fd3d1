"""Reasoning traces as token ids: a question, the thought, the answer, in the form of one chat template.

Templates delete thoughts: that of R1-Distill drops everything before ``</think>`` in past turns. So traces
are written out here, with the markers of the tokenizer's own vocabulary, and the ids are fed to both models::

    <|im_start|>user\\n{question}<|im_end|>\\n<|im_start|>assistant\\n<think>\\n{thinking}\\n</think>\\n\\n{answer}<|im_end|>\\n

``<think>`` is spelled in ordinary tokens where the vocabulary has no token of its own for it.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from ..settings import UserError

THINK, CLOSE = "<think>\n", "\n</think>\n\n"


@dataclass(frozen=True)
class Trace:
    """A question with the thought and the answer of a reasoning model; whose, and from where."""

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
    """A whole trace in two texts that are tokenised one by one: what the model is asked, and what
    it writes."""
    return prompt(trace.question), trace.response + "<|im_end|>\n"


def encode_trace(trace: Trace, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[bool]]:
    """Token ids of a whole trace, and for each whether it belongs to what the model writes."""
    asked, written = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in parts(trace))
    return asked + written, [False] * len(asked) + [True] * len(written)


def think_tags(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The token ids with which <think> and </think> begin: those that stay when a line break follows."""

    def beginning(tag: str) -> list[int]:
        ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in (tag.strip(), tag)]
        return [i for i, _ in takewhile(lambda pair: pair[0] == pair[1], zip(*ids))]

    return beginning(THINK), beginning(CLOSE.lstrip())


def trace_in(entry) -> Trace | None:
    """The trace in an entry of a file, with model and source if they are given; None if it is no
    such entry."""
    names = ("question", "thinking", "answer")
    if not isinstance(entry, dict) or not all(isinstance(entry.get(name), str) for name in names):
        return None
    return Trace(*(entry[name] for name in names), entry.get("model") or "", entry.get("source") or "")


def numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    """(number from 1, line) of a text file (.gz or not); UserError if it is no whole text."""
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
            yield from enumerate(file, 1)
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path.name} is not UTF-8 text ({error.reason} at byte {error.start}): convert it first"
        ) from None
    except (gzip.BadGzipFile, EOFError, zlib.error):
        raise UserError(f"{path.name} is not a whole gzip file: fetch it again") from None


def json_of(line: str):
    """What a line of JSON holds; None if it is damaged."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def read_traces(path: Path) -> Iterator[Trace]:
    """Traces of a JSONL file with question, thinking and answer. UserError names the line that lacks one."""
    if not path.is_file():
        raise UserError(
            f"the file of traces {path} does not exist: give JSONL with the fields question, thinking and"
            " answer"
        )
    for number, line in numbered_lines(path):
        if (trace := trace_in(json_of(line))) is None:
            raise UserError(
                f"line {number} of {path.name} is no trace: it must be JSON with question, thinking and"
                " answer, each a text"
            )
        yield trace
