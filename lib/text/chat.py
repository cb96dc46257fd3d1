"""Reasoning traces as token ids: a question, the thought, the answer, in the form of one chat template.

Templates delete thoughts: that of R1-Distill drops everything before ``</think>`` in past turns. So traces
are written out here, with the markers of the tokenizer's own vocabulary, and the ids are fed to both models::

    <|im_start|>user\\n{question}<|im_end|>\\n<|im_start|>assistant\\n<think>\\n{thinking}\\n</think>\\n\\n{answer}<|im_end|>\\n

``<think>`` is spelled in ordinary tokens where the vocabulary has no token of its own for it."""

from dataclasses import dataclass
from itertools import takewhile

from transformers import PreTrainedTokenizerBase

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
    """A whole trace in two texts, tokenised one by one: what the model is asked, and what it writes."""
    return prompt(trace.question), trace.response + "<|im_end|>\n"


def plain(trace: Trace) -> str:
    """A trace as plain text, for models that have no marker of a turn in common."""
    return f"{trace.question.strip()}\n\n{trace.response}\n"


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
