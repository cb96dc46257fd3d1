"""Many prompts decoded at once, such that a text that has ended costs nothing more.

A batch of prompts, one a row, is decoded in *legs* of ``LEG`` tokens. After each leg the rows that have ended
leave the batch, and the cache, whose layers (``RoomyLayer``) have room to grow: transformers' own copy all
keys and values at every token, 40% of a step at 800 rows of the embedded pair. ``generate`` decodes plainly;
in ``decode`` the caller runs the model, so that steered decoding shares the loop.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    LogitsProcessor,
    LogitsProcessorList,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.cache_utils import DynamicLayer

LEG = 16  # tokens; shorter legs waste less on ended rows, but each has to be set up (8 and 32: as fast)
ROOM = 64  # positions by which the cache grows

Step = Callable[[Tensor, Tensor, Tensor, DynamicCache, int], Tensor]


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    max_new_tokens: int,
    processors: Sequence[LogitsProcessor] = (),
    add_special_tokens: bool = True,
    **sampling,
) -> list[list[int]]:
    """The new token ids of every prompt (see ``decode``), decoded in one batch, padded on the left.

    Greedy, unless a ``RowNoise`` is among the ``processors`` of logits, or ``sampling`` (options of
    transformers' ``generate``) says otherwise. ``add_special_tokens``: whether the tokenizer adds BOS.
    """
    options = dict(padding=True, padding_side="left", return_tensors="pt")
    batch = tokenizer(list(prompts), add_special_tokens=add_special_tokens, **options)
    eos, processors = tokenizer.eos_token_id, LogitsProcessorList(processors)
    options = {"do_sample": False, "pad_token_id": eos, "eos_token_id": eos, **sampling}

    def step(ids, mask, rows, cache, n):
        for processor in processors:
            if isinstance(processor, RowNoise):
                processor.rows = rows
        inputs = dict(input_ids=ids, attention_mask=mask, past_key_values=cache)
        return model.generate(**inputs, max_new_tokens=n, logits_processor=processors, **options)

    return decode(step, model.config, batch["input_ids"], batch["attention_mask"], max_new_tokens, eos)


def decode(step: Step, config: PretrainedConfig, *batch, leg: int | None = None) -> list[list[int]]:
    """The new token ids of every row, up to its ``eos`` (left out); parameters as in ``legs``."""
    texts: dict[int, list[int]] = {}
    for rows, new, ended in legs(step, config, *batch, leg=leg):
        texts |= zip(rows[ended].tolist(), (until(text, batch[-1]) for text in new[ended].tolist()))
    return [texts[row] for row in range(len(texts))]


def legs(
    step: Step,
    config: PretrainedConfig,
    ids: Tensor,
    mask: Tensor,
    max_new_tokens: int,
    eos: int,
    leg: int | None = None,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Decode leg by leg, to show a text while it is written: (numbers of the rows in this leg [rows], all
    their new ids so far [rows, new], which of them have ended and leave [rows] bool).

    ``ids`` and ``mask`` [rows, length] are the prompts, padded on the left. ``step(ids, mask, rows, cache,
    n)`` continues ids by up to n tokens and returns ids [rows, longer]; ``rows`` are the numbers of the rows
    that are left, and ``cache`` holds all their positions but the last (nothing, at first). A row ends at
    ``eos`` or after ``max_new_tokens``.
    """
    length, rows, cache = ids.shape[1], torch.arange(len(ids)), roomy_cache(config)
    while len(rows):
        ids = step(ids, mask, rows, cache, min(leg or LEG, max_new_tokens - (ids.shape[1] - length)))
        new = ids[:, length:]
        ended = (new == eos).any(1) | (new.shape[1] >= max_new_tokens)
        yield rows, new, ended
        if ended.any():
            left = (~ended).nonzero().flatten()
            rows, ids, mask = rows[left], ids[left], mask[left]
            cache.batch_select_indices(left)
        mask = torch.cat([mask, mask.new_ones(len(ids), ids.shape[1] - mask.shape[1])], dim=1)


def until(ids: list[int], eos: int) -> list[int]:
    """Ids up to the first ``eos``, which is left out."""
    return ids[: ids.index(eos)] if eos in ids else ids


class RoomyLayer(DynamicLayer):
    """Keys and values of one layer, [rows, heads, positions, d], at the front of a larger tensor: a new token
    is written in place."""

    room: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args, **kwargs) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        before, new = self.get_seq_length(), (key_states, value_states)
        after = before + key_states.shape[-2]
        if self.room is None or after > self.room[0].shape[-2]:
            larger = tuple(x.new_empty(*x.shape[:-2], after + ROOM, x.shape[-1]) for x in new)
            for target, old in zip(larger, (self.keys, self.values)):
                if before:
                    target[..., :before, :] = old
            self.room = larger
        for target, x in zip(self.room, new):
            target[..., before:after, :] = x
        self._show(after)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        shown = self.get_seq_length()
        self.room = None if self.room is None else tuple(x[indices] for x in self.room)
        self._show(shown)

    def _show(self, positions: int) -> None:
        if self.room is not None:
            self.keys, self.values = (x[..., :positions, :] for x in self.room)


def roomy_cache(config: PretrainedConfig) -> DynamicCache:
    """An empty cache whose layers of full attention have room; others (sliding windows) are transformers'."""
    cache = DynamicCache(config=config)
    cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


class RowNoise(LogitsProcessor):
    """Noise for sampling, one call a step. ``rows``: numbers of the rows that are left, in the order of the
    scores [rows, vocabulary]."""

    rows: Tensor


class BatchNoise(RowNoise):
    """Sampling from softmax(logits / temperature), as ``torch.multinomial`` does it: the largest of p /
    exponential noise, drawn for the whole batch, so that rows that have left do not change it."""

    def __init__(self, size: int, temperature: float, seed: int):
        self.size, self.temperature, self.generator = size, temperature, torch.Generator().manual_seed(seed)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        noise = torch.empty(self.size, scores.shape[-1]).exponential_(generator=self.generator)
        return (scores / self.temperature).softmax(-1) / noise[self.rows].to(scores)


class TaskNoise(RowNoise):
    """Gumbel noise on the logits, of which the largest then *is* a sample from softmax(logits / temperature).

    Every task has its own generator, seeded by the task: it draws the same noise in every condition, which
    makes comparisons sharper, and in every batch. Rows of one task in a batch share each draw.

    Source: Gumbel 1954; Maddison et al. 2014, "A* sampling".
    """

    def __init__(self, tasks: Sequence, temperature: float, seed: int):
        names, self.temperature = list(dict.fromkeys(map(repr, tasks))), temperature
        seeds = (zlib.crc32(f"{seed}/{name}".encode()) for name in names)
        self.generators = [torch.Generator().manual_seed(number) for number in seeds]
        self.task = torch.tensor([names.index(repr(task)) for task in tasks])  # of every row
        self.rows = torch.arange(len(tasks))

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        tasks, row = self.task[self.rows].unique(return_inverse=True)
        size, drawn = scores.shape[-1], [self.generators[task] for task in tasks]
        exponential = torch.stack([torch.empty(size).exponential_(generator=g) for g in drawn])
        return scores.float() / self.temperature - exponential.log()[row].to(scores.device)
