"""Many prompts decoded at once, such that a text that has ended costs nothing more.

A batch of prompts, one a row, is decoded in *legs* of ``LEG`` tokens. After each leg the rows that have ended
leave the batch, and the cache, whose layers (``RoomyLayer``) have room to grow: transformers' own copy all
keys and values at every token, 40% of a step at 800 rows of the embedded pair. ``generate`` decodes plainly;
in ``decode`` the caller runs the model, so that steered decoding shares the loop. The loop is ours, and not
transformers' ``generate``: that takes from a checkpoint's generation_config.json what is not set (penalties,
top-p, blocked n-grams, ends), and two models of a pair would write by different rules."""

import contextlib
import zlib
from collections.abc import Callable, Iterator, Sequence
from itertools import takewhile

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import LogitsProcessor, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicCache, DynamicLayer

from ..settings import UserError

LEG = 16  # tokens; shorter legs waste less on ended rows, but each has to be set up (8 and 32: as fast)
ROOM = 64  # positions by which the cache grows

Step = Callable[[Tensor, Tensor, Tensor, DynamicCache, int], Tensor]


def context_of(config: PretrainedConfig) -> int | None:
    """How many tokens a model can read; None if nothing limits them."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def ends_of(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Ids that end a text: the tokenizer's end, that of a turn as ``text.chat`` writes it, and the one that
    the chat template writes after an answer."""
    ends = {tokenizer.eos_token_id, tokenizer.get_vocab().get("<|im_end|>")}
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "ANSWER"}]
        with contextlib.suppress(TemplateError, ValueError, TypeError):  # a template for other conversations
            text = tokenizer.apply_chat_template(turns, tokenize=False).rpartition("ANSWER")[2]
            first = tokenizer(text.lstrip(), add_special_tokens=False)["input_ids"][:1]
            ends |= set(first) & set(tokenizer.added_tokens_decoder)
    return tuple(sorted(ends - {None}))


def padded(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], add_special_tokens: bool
) -> tuple[Tensor, Tensor]:
    """Ids and mask [rows, length] of prompts, padded on the left; the tokenizer need not know how."""
    lists = tokenizer(list(prompts), add_special_tokens=add_special_tokens)["input_ids"]
    length, pad = max(map(len, lists)), tokenizer.pad_token_id or 0
    ids = torch.tensor([[pad] * (length - len(row)) + row for row in lists])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in lists])
    return ids, mask


@torch.no_grad()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    max_new_tokens: int,
    processors: Sequence[LogitsProcessor] = (),
    add_special_tokens: bool = True,
    temperature: float = 0.0,
    top_k: int = 0,
) -> list[list[int]]:
    """The new token ids of every prompt (see ``decode``), decoded in one batch, padded on the left.

    Greedy, unless a ``RowNoise`` is among the ``processors`` of logits, or a ``temperature`` is given: then
    from the ``top_k`` likeliest tokens (0: all), by torch's own random numbers. ``add_special_tokens``:
    whether the tokenizer adds BOS."""
    ids, mask = padded(tokenizer, prompts, add_special_tokens)
    length, ends = ids.shape[1], ends_of(tokenizer)

    def step(ids, mask, rows, cache, n):
        for processor in processors:
            if isinstance(processor, RowNoise):
                processor.rows = rows

        def newest(ids, mask, inputs):
            inputs = {key: x.to(model.device) for key, x in inputs.items()}
            scores = model(**inputs, use_cache=True, past_key_values=cache, logits_to_keep=1).logits[:, -1]
            scores = scores.float().cpu()
            for processor in processors:
                scores = processor(ids, scores)
            if not temperature:
                return scores.argmax(-1)
            scores = scores / temperature
            if top_k:
                least = scores.topk(min(top_k, scores.shape[-1]))[0][:, -1:]
                scores = scores.masked_fill(scores < least, -torch.inf)
            return scores.softmax(-1).multinomial(1)[:, 0]

        return continued(newest, ids, mask, cache, n, length, ends)

    return decode(step, model.config, ids, mask, max_new_tokens, ends)


def continued(
    newest: Callable[[Tensor, Tensor, dict], Tensor],
    ids: Tensor,
    mask: Tensor,
    cache: DynamicCache,
    n: int,
    start: int,
    ends: Sequence[int],
) -> Tensor:
    """``ids`` [rows, length] and up to n more: ``newest(ids, mask, inputs)`` gives the next of every row
    from the ``inputs`` of a forward, those positions that the cache does not hold. Stops when an end stands
    in every row after ``start``."""
    for _ in range(n):
        seen, position = cache.get_seq_length(), (mask.cumsum(1) - 1).clamp(min=0)
        inputs = {"input_ids": ids[:, seen:], "attention_mask": mask, "position_ids": position[:, seen:]}
        ids = torch.cat([ids, newest(ids, mask, inputs)[:, None]], dim=1)
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        if torch.isin(ids[:, start:], torch.tensor(ends)).any(1).all():
            break
    return ids


def decode(step: Step, config: PretrainedConfig, *batch, leg: int | None = None) -> list[list[int]]:
    """The new token ids of every row, up to an end (left out); parameters as in ``legs``."""
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
    ends: Sequence[int],
    leg: int | None = None,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Decode leg by leg, to show a text while it is written: (numbers of the rows in this leg [rows], all
    their new ids so far [rows, new], which of them have ended and leave [rows] bool).

    ``ids`` and ``mask`` [rows, length] are the prompts, padded on the left. ``step(ids, mask, rows, cache,
    n)`` continues ids by up to n tokens and returns ids [rows, longer]; ``rows`` are the numbers of the rows
    that are left, and ``cache`` holds all their positions but the last (nothing, at first). A row ends at one
    of ``ends`` or after ``max_new_tokens``. UserError if so many do not fit in the model's context."""
    length, rows, cache = ids.shape[1], torch.arange(len(ids)), roomy_cache(config)
    if (context := context_of(config)) and length + max(max_new_tokens, 1) > context:
        raise UserError(
            f"max_new_tokens is {max_new_tokens} and the longest prompt has {length} tokens, and this model's"
            f" context is {context}: together they must fit in it"
        )
    while len(rows):
        ids = step(ids, mask, rows, cache, min(leg or LEG, max_new_tokens - (ids.shape[1] - length)))
        new = ids[:, length:]
        ended = torch.isin(new, torch.tensor(ends)).any(1) | (new.shape[1] >= max_new_tokens)
        yield rows, new, ended
        if ended.any():
            left = (~ended).nonzero().flatten()
            rows, ids, mask = rows[left], ids[left], mask[left]
            cache.reorder_cache(left)  # of layers with linear attention, too
        mask = torch.cat([mask, mask.new_ones(len(ids), ids.shape[1] - mask.shape[1])], dim=1)


def until(ids: list[int], ends: Sequence[int]) -> list[int]:
    """Ids up to the first end, which is left out."""
    return list(takewhile(lambda i: i not in ends, ids))


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

    def reorder_cache(self, beam_idx: Tensor) -> None:
        shown = self.get_seq_length()
        self.room = None if self.room is None else tuple(x[beam_idx] for x in self.room)
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

    Source: Gumbel 1954; Maddison et al. 2014, "A* sampling"."""

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
