"""Activations that are never stored: both models read the text while a crosscoder trains on what they hold.

    stream = Stream(pair, corpus.build(pair))
    crosscoder = train(stream, config, folder)          # in place of a store

The text is read in *windows* of neighbouring documents of one split. All models run over a window, position 0
is dropped, and its rows wait as the blocks of a store do (``shuffle.released``): window t is computed at time
t, after time t + r all of it has left, and r windows are all that is held. Which row leaves when depends on
the lengths of the documents, on the seed and on the memory alone. So a run that is resumed in the middle of
an epoch computes no more than the windows that were held there, and goes on to the bit. Windows come in the
order of the text: a corpus that is sorted by subject has to be mixed first.

Compared with a store: no disk, but each epoch runs the models again. Scales, means and the limit on norms
come from the first ``sample_tokens`` tokens of the train split, not from all of it, and a norm above the
limit is noticed when it is met: such a token makes its batch shorter. Notebooks 03 to 05 look up tokens one
by one and need a store, though of fewer tokens."""

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import torch
from transformers import PreTrainedModel

from ..labels import SPLITS
from ..models.pairs import DTYPES, Pair
from ..models.reader import BATCH_TOKENS, masks, norm_limits
from ..runs import fingerprint
from ..settings import UserError, check
from ..text.corpus import Corpus, Document
from .harvest import SHARD_TOKENS, job_of, read_models, readers_of
from .shuffle import INDEX_BYTES, RING_SHARE, check_reading, cut_batches, released, too_little
from .store import MEMORY

SAMPLE_TOKENS = 100_000
WINDOWS = 8  # r
SOON = WINDOWS - 1e-6  # a little less: rounding must not make a row leave when its window is gone
LEAST_WINDOW = 1024  # tokens; with fewer, what is held would be a few texts


class Stream:
    """What ``training.Trainer`` needs of a store. Rows have the numbers that they would have in a store of
    the same text.

    models, widths, layers, scales, mean_norms, means   as in ``store.Store``, from the sample
    norm_limits   {model: norm} above which a token is dropped
    sampled       number of tokens behind these estimates, after masking
    len()         tokens of the text, of all splits
    """

    raw_batches = True  # ``reader`` knows ``raw``

    def __init__(
        self,
        pair: Pair,
        documents: Corpus | Iterable[Document],
        layer: int | None = None,
        models: Mapping[str, PreTrainedModel] | None = None,
        sample_tokens: int = SAMPLE_TOKENS,
        batch_tokens: int = BATCH_TOKENS,
        device: str | None = None,
    ):
        """Parameters as in ``harvest_activations``. Goes through the text once for its lengths."""
        check("sample_tokens", sample_tokens, int, low=1)
        job = job_of(pair, documents, "", layer, SHARD_TOKENS, batch_tokens)
        self.fingerprint = fingerprint("stream", job.fingerprint, sample_tokens)
        self.models = tuple(pair.models)
        self.widths = {m: job.content["models"][m]["width"] for m in self.models}
        self.layers = {m: job.content["models"][m]["layer"] for m in self.models}
        self._job, self._readers = job, readers_of([job], models, device)
        self._dtype = DTYPES[pair.store_dtype]
        self._device = next(iter(self._readers.values())).device  # where windows are held
        sample, lengths, splits, sampled = [], [], [], 0
        for document in job.corpus:
            lengths.append(len(document.tokens))
            splits.append(SPLITS.index(document.split))
            if document.split == "train" and sampled < sample_tokens:
                sample.append(document.tokens)
                sampled += len(document.tokens)
        self._lengths, self._splits = np.array(lengths, np.int64), np.array(splits, np.int8)
        self._starts = np.cumsum([0, *lengths])
        self._high: set[int] = set()  # rows above the limit, as far as they have been met
        self._estimate(sample)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __repr__(self) -> str:
        widths = ", ".join(f"{m} [{w}]" for m, w in self.widths.items())
        return (
            f"Stream({len(self):,} tokens; {widths}; scales from {self.sampled:,} tokens; {self.fingerprint})"
        )

    def count(self, split: str) -> int:
        """Tokens of a split: all but the first of each text, and but those found to have too high a norm."""
        number = SPLITS.index(check("split", split, str, choices=SPLITS))
        high = np.fromiter(self._high, np.int64, len(self._high))
        high_splits = self._splits[np.searchsorted(self._starts, high, side="right") - 1]
        inner = np.maximum(self._lengths[self._splits == number] - 1, 0)
        return int(inner.sum()) - int((high_splits == number).sum())

    def reader(
        self,
        split: str,
        batch_size: int,
        seed: int,
        epoch: int = 0,
        start: int = 0,
        memory: int = MEMORY,
        part: tuple[int, int] = (0, 1),
        raw: bool = False,
    ) -> Iterator[tuple[np.ndarray, list[torch.Tensor]]]:
        """One epoch in shuffled batches, as ``Store.reader``: (row numbers int64 [B], raw float32 [B, d_m]
        per model); ``raw``: in the dtype of a store, where the models are.

        ``memory`` (bytes) bounds what is held beside the models and their forward passes. Of ``part`` (i, n)
        every process runs all forward passes. UserError if the memory is too small, for activations that are
        not finite, and if all norms of a batch are above the limit."""
        memory = check_reading(batch_size, start, part, memory, sum(self.widths.values()))
        index = SPLITS.index(check("split", split, str, choices=SPLITS))
        windows = self._windows(np.flatnonzero(self._splits == index), self._window_tokens(memory))
        texts, held, computed = (d.tokens for d in self._job.corpus if d.split == split), {}, 0
        for batch in cut_batches(self._pieces(windows, [seed, epoch, index]), batch_size, start):
            last = int(batch[3][-1])
            for number in range(computed, last + 1):
                lists = list(itertools.islice(texts, len(windows[number])))
                # or it had left before this epoch was resumed
                if number >= int(batch[1].min()) or number > last - WINDOWS:
                    held[number] = self._window(lists, self._rows(windows[number]))
            computed = last + 1
            rows, window, local = (values[part[0] :: part[1]] for values in batch[:3])
            good = np.ones(len(rows), bool)
            place = {"dtype": self._dtype, "device": self._device} if raw else {}
            acts = [torch.empty(len(rows), width, **place) for width in self.widths.values()]
            for number in np.unique(window):
                (at,) = np.nonzero(window == number)
                stored, kept = held[number]
                good[at] = kept[local[at]]
                for out, values in zip(acts, stored):
                    found = values[torch.from_numpy(local[at]).to(values.device)]
                    out[torch.from_numpy(at).to(out.device)] = found.to(out)
            if len(rows) and not good.any():
                raise UserError(
                    "all norms of a batch are above the limit, which comes from the beginning of the text:"
                    " mix the text first"
                )
            left = torch.from_numpy(good)
            yield (rows, acts) if good.all() else (rows[good], [a[left.to(a.device)] for a in acts])
            held = {number: content for number, content in held.items() if number > last - WINDOWS}

    def _pieces(self, windows: list[np.ndarray], key: list[int]) -> Iterator[list[np.ndarray]]:
        """The order of an epoch, a piece per unit of time, as arrays [n]: row, window, index in it, time."""
        last = len(windows) - 1

        def arrivals():
            for t, documents in enumerate(windows):
                rows = self._rows(documents)
                arrays = [rows, np.full(len(rows), t), np.arange(len(rows))]
                # if all windows can be held, rows wait for the last one: a uniform permutation
                yield t + 1 if t < last else np.inf, last if last < WINDOWS else t, arrays

        for t, piece in enumerate(released(arrivals(), SOON, np.random.default_rng(key))):
            yield [*piece[:3], np.full(len(piece[0]), t)]

    def _windows(self, documents: np.ndarray, tokens: int) -> list[np.ndarray]:
        """Documents (their numbers) of one split, cut into windows of about so many tokens."""
        place = (np.cumsum(self._lengths[documents]) - 1) // tokens
        return np.split(documents, np.flatnonzero(np.diff(place)) + 1) if len(documents) else []

    def _rows(self, documents: np.ndarray) -> np.ndarray:
        """Row numbers of all tokens but the first of each document."""
        inner = np.maximum(self._lengths[documents] - 1, 0)
        begin = np.repeat(self._starts[documents] + 1 - (np.cumsum(inner) - inner), inner)
        return begin + np.arange(len(begin))

    def _window_tokens(self, memory: int) -> int:
        row = sum(self.widths.values()) * DTYPES[self._job.pair.store_dtype].itemsize + INDEX_BYTES
        # of each token, the last term for the window that is being computed
        held = row * (WINDOWS + 1) + 4 * max(self.widths.values()) + row
        tokens = int(check("memory", memory, int, low=1) * RING_SHARE) // held
        if tokens < LEAST_WINDOW:
            raise too_little(memory, row, LEAST_WINDOW * held)
        return min(tokens, SHARD_TOKENS)

    def _window(self, lists: list[list[int]], rows: np.ndarray) -> tuple[list[torch.Tensor], np.ndarray]:
        """Activations [rows, d] of a window, per model; and which norms are not too high."""
        inner = np.concatenate([np.arange(len(t)) > 0 for t in lists])
        first = int(np.searchsorted(self._starts, rows[0], side="right")) - 1 if len(rows) else 0
        acts, norms, _ = read_models(self._job, self._readers, lists, first)
        norms = {m: norm.cpu().numpy()[inner] for m, norm in norms.items()}
        kept, _ = masks(np.ones(len(rows)), norms, self.norm_limits)
        self._high.update(rows[~kept].tolist())
        return [a[torch.from_numpy(inner).to(a.device)] for a in acts.values()], kept

    def _estimate(self, lists: list[list[int]]) -> None:
        """Limits on norms, scales and means, from the sample; means are over what the limits leave."""
        if not any(len(t) > 1 for t in lists):
            raise UserError(
                "the text has no token to train on: give documents of the train split, of two tokens or more"
            )
        positions = np.concatenate([np.arange(len(t)) for t in lists])
        parts = [lists[i : i + 64] for i in range(0, len(lists), 64)]
        norms = [read_models(self._job, self._readers, part)[1] for part in parts]
        norms = {m: torch.cat([n[m] for n in norms]).cpu().numpy() for m in self.models}
        self.norm_limits = norm_limits(positions, norms)
        kept, _ = masks(positions, norms, self.norm_limits)
        self.sampled = int(kept.sum())
        self.mean_norms = {m: float(norm[kept].mean(dtype=np.float64)) for m, norm in norms.items()}
        self.scales = {m: math.sqrt(self.widths[m]) / self.mean_norms[m] for m in self.models}
        self.means = {m: torch.zeros(width, dtype=torch.float64) for m, width in self.widths.items()}
        masks_of_parts = np.split(kept, np.cumsum([sum(map(len, part)) for part in parts])[:-1])
        for part, mask in zip(parts, masks_of_parts):
            for m, acts in read_models(self._job, self._readers, part)[0].items():
                kept_acts = acts[torch.from_numpy(mask).to(acts.device)]
                self.means[m] += kept_acts.double().sum(0).cpu() / self.sampled
