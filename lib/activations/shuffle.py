"""Shuffled batches out of a store that is larger than memory.

Neighbouring rows of a store are tokens of one text, and single rows are slow to read. So the disk is read in
*blocks* of 256 neighbouring rows, the blocks in random order, and every row then waits for a random time:

    1. all blocks of the store that hold wanted rows are permuted; block number p arrives at time p
    2. each of its rows leaves at time p + r * u, u uniform in [0, 1); rows are handed out as they leave
    3. at time r + p all of block p has left, and block p + r takes its place: a ring of r blocks is held

The order is a function of (rows wanted, seed, r) alone; an epoch that is continued in its middle reads at
most the r blocks before that place. A batch draws on all blocks of the ring, but at both ends of an epoch,
where it is not full, on fewer: the first n rows come from about sqrt(2 r n / 256) blocks. If all blocks fit
into the ring, all of them arrive first, and the order is a uniform permutation."""

from __future__ import annotations

import contextlib
import json
import math
import mmap
import os
import time
import weakref
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from ..settings import UserError, check

BLOCK = 256  # rows; a multiple of 8
EXPECTED = 8  # blocks that the system is asked to fetch before they are read: a disk answers several at once
INDEX_BYTES = 64  # for each row of the ring: number, place and time, and copies while they are sorted
RING_SHARE = 0.75  # of the memory; the rest is for batches
LEAST_BLOCKS = 16  # in a ring that is smaller than the store: with fewer, a batch would be a few texts
MEMORY = 1 << 30  # bytes that reading shuffled batches takes, where nothing else is said
GATHERING = 4  # threads that gather batches for a GPU
SERIAL = 32_767  # elements up to which torch works in the calling thread alone: threads are for training
# names of safetensors; bfloat16, which numpy lacks, as integers
DTYPES = dict(
    F64="<f8", F32="<f4", F16="<f2", BF16="<i2", I64="<i8", I32="<i4", I16="<i2", I8="i1", U8="u1", BOOL="?"
)
FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class Table:
    """The arrays of one safetensors file, [n, ...] each, read in stretches of rows; UserError if it is
    damaged.

    By plain reads: through safetensors' memory map shuffled reading takes twice the time."""

    def __init__(self, file: str | Path):
        self.file = Path(file)
        try:
            with self.file.open("rb") as stream:
                length = int.from_bytes(stream.read(8), "little")
                header = json.loads(stream.read(length if length < self.file.stat().st_size else 0))
            self._entries = {
                name: (e["dtype"], tuple(e["shape"]), 8 + length + e["data_offsets"][0])
                for name, e in header.items()
                if name != "__metadata__"
            }
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(
                f"{self.file.name} cannot be read: it is missing or its header is damaged"
            ) from None

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entries[name][1]

    def row_bytes(self, name: str) -> int:
        code, shape, _ = self._entries[name]
        return np.dtype(DTYPES[code]).itemsize * math.prod(shape[1:])

    def dtype(self, name: str) -> str:
        """A name of safetensors: a key of ``DTYPES``."""
        return self._entries[name][0]

    def read(self, name: str, first: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows ``first`` to ``stop`` of an array, as they are on disk (bfloat16: its bits as int16)."""
        shape = self.shape(name)
        stop = shape[0] if stop is None else stop
        out = np.empty((stop - first, *shape[1:]), DTYPES[self.dtype(name)])
        self.read_into(out, name, first)
        return out

    def read_into(self, out: np.ndarray, name: str, first: int) -> None:
        """Fill ``out`` (contiguous, of the array's dtype) with the rows from ``first`` on."""
        at, size = self._span(name, first, first + len(out))
        try:
            with self.file.open("rb", buffering=0) as stream:
                stream.seek(at)
                left = memoryview(out.reshape(-1).view(np.uint8))
                while len(left) and (count := stream.readinto(left)):
                    left = left[count:]
        except FileNotFoundError:
            raise UserError(f"{self.file.name} is missing: it was removed while it was in use") from None
        if len(left):
            raise UserError(f"{self.file.name} is truncated: {len(left):,} of {size:,} bytes are missing")

    def expect(self, name: str, first: int, stop: int) -> None:
        """Tell the system that these rows are read soon, where it can be told."""
        if hasattr(os, "posix_fadvise"):
            with contextlib.suppress(OSError), self.file.open("rb", buffering=0) as stream:
                os.posix_fadvise(stream.fileno(), *self._span(name, first, stop), os.POSIX_FADV_WILLNEED)

    def _span(self, name: str, first: int, stop: int) -> tuple[int, int]:
        """(offset, length) in bytes."""
        row = self.row_bytes(name)
        return self._entries[name][2] + first * row, (stop - first) * row


class Wanted:
    """Which rows of a store are wanted, from a bool array per shard: 1 bit a row, block by block of one
    shard.

    bits           uint8 [blocks, BLOCK / 8]: which rows of a block; blocks without any are left out
    starts         int64 [blocks]: number of the block's first row in the store
    shards, local  int64 [blocks]: its place on disk
    """

    def __init__(self, masks: Iterable[np.ndarray]):
        bits, starts, shards, local, base = [], [], [], [], 0
        for number, mask in enumerate(masks):
            packed = np.packbits(np.pad(mask, (0, -len(mask) % BLOCK))).reshape(-1, BLOCK // 8)
            (used,) = packed.any(axis=1).nonzero()
            bits.append(packed[used])
            local.append(used * BLOCK)
            starts.append(base + local[-1])
            shards.append(np.full(len(used), number))
            base += len(mask)
        self.bits, self.starts, self.shards, self.local = (
            np.concatenate(parts) for parts in (bits, starts, shards, local)
        )

    def __len__(self) -> int:
        """Number of rows."""
        return int(np.bitwise_count(self.bits).sum(dtype=np.int64))

    def rows(self) -> np.ndarray:
        """Sorted row numbers, int64: 8 bytes a row."""
        parts = (np.arange(i, min(i + 4096, len(self.starts))) for i in range(0, len(self.starts), 4096))
        return np.concatenate([np.empty(0, np.int64), *(self.of(part)[0] for part in parts)])

    def of(self, blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """All rows of some blocks: (row number, index into ``blocks``, offset in the block) of each."""
        index, offset = np.unpackbits(self.bits[blocks], axis=1).nonzero()
        return self.starts[blocks[index]] + offset, index, offset


def released(
    arrivals: Iterable[tuple[float, np.ndarray | int, list[np.ndarray]]],
    delay: float,
    rng: np.random.Generator,
) -> Iterator[list[np.ndarray]]:
    """Rows that wait for a random time: of each arrival (until, time, arrays [n]) every entry leaves at time
    + delay * u, u uniform in [0, 1). Those that leave before ``until``, in their order: arrays [m], and when.
    """
    waiting = None
    for until, arrived, arrays in arrivals:
        coming = [*arrays, arrived + delay * rng.random(len(arrays[0]))]
        waiting = coming if waiting is None else [np.concatenate(both) for both in zip(waiting, coming)]
        leaves = waiting[-1] < until
        order = np.flatnonzero(leaves)[np.argsort(waiting[-1][leaves], kind="stable")]
        yield [values[order] for values in waiting]
        waiting = [values[~leaves] for values in waiting]


class Shuffle:
    """The order of an epoch for a ring of ``ring`` blocks, random in ``key``."""

    def __init__(self, wanted: Wanted, ring: int, key: Sequence[int]):
        self.wanted, self.ring, self.key = wanted, ring, list(key)
        # in the order in which they are read
        self.blocks = np.random.default_rng(self.key).permutation(len(wanted.starts))

    def pieces(self) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """The epoch in pieces of three int64 arrays [n]: row numbers; places in the ring; how many blocks
        have to be read first."""
        n, fits = len(self.blocks), len(self.blocks) <= self.ring
        group = max(n if fits else self.ring // 4, 1)

        def arrivals():
            for first in range(0, n, group):
                last = min(first + group, n)
                rows, index, offset = self.wanted.of(self.blocks[first:last])
                number = first + index
                places = number % self.ring * BLOCK + offset
                yield last if last < n else np.inf, n - 1 if fits else number, [rows, places]

        # a little less than the ring: rounding must not make a row leave when its place is taken
        delay, rng = self.ring - 1 / BLOCK, np.random.default_rng([*self.key, 1])
        for rows, places, leaves in released(arrivals(), delay, rng):
            yield rows, places, np.minimum(leaves.astype(np.int64), n - 1) + 1

    def rows(self) -> np.ndarray:
        """The whole epoch's row numbers, int64: 8 bytes a row."""
        return np.concatenate([np.empty(0, np.int64), *(rows for rows, _, _ in self.pieces())])


def ring_blocks(memory: int, row_bytes: int, blocks: int) -> int:
    """Blocks in the ring for so many bytes; UserError if that is too few of the store's ``blocks``."""
    block_bytes = BLOCK * (row_bytes + INDEX_BYTES)
    ring, least = int(memory * RING_SHARE) // block_bytes, min(LEAST_BLOCKS, max(blocks, 1))
    if ring < least:
        raise too_little(memory, row_bytes, least * block_bytes)
    return ring


def too_little(memory: int, row_bytes: int, needed: int) -> UserError:
    return UserError(
        f"memory is {memory / 1e6:.3g} MB: shuffling rows of {row_bytes:,} bytes needs at least"
        f" {math.ceil(needed / RING_SHARE / 1e6)} MB"
    )


def check_reading(batch_size: int, start: int, part: tuple[int, int], memory: int, width: int) -> int:
    """The memory to read with: ``memory``, but of the default as much more as the batches need. UserError for
    impossible parameters of ``Store.reader``, and if the batches that exist at once, float32
    [batch_size, width], do not fit into the memory beside the ring: two that wait, one in use, one being
    made, with its rows as they are on disk."""
    check("batch_size", batch_size, int, low=1)
    check("start", start, int, low=0)
    check("part", part[0], int, low=0, high=check("part", part[1], int, low=1) - 1)
    held = 4.5 * 4 * batch_size * width
    if memory == MEMORY:
        return max(memory, math.ceil(held / (1 - RING_SHARE)))
    if held > memory * (1 - RING_SHARE):
        raise UserError(
            f"memory is {memory / 1e6:.3g} MB: batches of {batch_size:,} tokens need at least "
            f"{math.ceil(held / (1 - RING_SHARE) / 1e6)} MB"
        )
    return memory


def read_shuffled(
    tables: Sequence[Table],
    names: Sequence[str],
    shuffle: Shuffle,
    batch_size: int,
    start: int = 0,
    part: tuple[int, int] = (0, 1),
    raw: bool = False,
) -> Iterator[tuple[np.ndarray, list[torch.Tensor]]]:
    """Batches of an epoch, as ``Store.reader`` hands them out, of the arrays ``names``."""
    ring = _Ring(tables, names, shuffle)
    shapes = [((batch_size, *held.shape[1:]), held.dtype) for held in ring.held]
    batches = [_Recycled(shape, dtype if raw else np.dtype("<f4"), raw) for shape, dtype in shapes]
    buffers = [None if raw else np.empty(*each) for each in shapes]
    # a GPU takes more rows a second than one thread of the processor gathers
    pool = ThreadPoolExecutor(GATHERING, "gather") if raw else None
    for batch in cut_batches(shuffle.pieces(), batch_size, start):
        rows, places, due = (values[part[0] :: part[1]] for values in batch)
        out = [made.take(len(rows)) for made in batches]
        read = out if raw else [buffer[: len(rows)] for buffer in buffers]
        at = 0
        while at < len(rows):
            # no further than this row needs: what is read next may take the place of rows after it
            ring.fill(int(due[at]))
            stop = int(np.searchsorted(due, due[at], side="right"))
            for held, some in zip(ring.held, read):
                _gather(held, places[at:stop], some[at:stop], pool)
            at = stop
        if raw:
            yield rows, [as_stored(some, code) for some, code in zip(out, ring.codes)]
        else:
            parts = zip(read, ring.codes, map(torch.from_numpy, out))
            yield rows, [widened(*each) for each in parts]


def _gather(held: np.ndarray, places: np.ndarray, out: np.ndarray, pool: ThreadPoolExecutor | None) -> None:
    """The rows at some places, by the threads of a pool, if there is one."""
    size = len(places) if pool is None else math.ceil(len(places) / GATHERING)

    def some(first: int) -> None:
        part = slice(first, first + size)
        # "raise", the default, takes a detour
        np.take(held, places[part], axis=0, out=out[part], mode="clip")

    list((map if pool is None else pool.map)(some, range(0, len(places), max(size, 1))))


class _Ring:
    """The blocks that are in memory: ``held`` has an array [blocks * BLOCK, width] per name, as on disk."""

    def __init__(self, tables: Sequence[Table], names: Sequence[str], shuffle: Shuffle):
        self.tables, self.names, self.shuffle = tables, names, shuffle
        self.codes = [tables[0].dtype(name) for name in names] if tables else []
        rows = min(shuffle.ring, len(shuffle.blocks)) * BLOCK
        shapes = [(rows, *tables[0].shape(name)[1:]) for name in names]
        self.held = [_pages(shape, DTYPES[code]) for shape, code in zip(shapes, self.codes)]
        self._read = self._expected = 0  # numbers of the blocks that come next

    def fill(self, count: int) -> None:
        """Read up to block number ``count``, without blocks whose place is taken by then."""
        for number in range(max(self._read, count - self.shuffle.ring), count):
            for later in range(max(self._expected, number), min(number + EXPECTED, len(self.shuffle.blocks))):
                table, first, stop = self._where(later)
                for name in self.names:
                    table.expect(name, first, stop)
            self._expected = number + EXPECTED
            table, first, stop = self._where(number)
            place = number % self.shuffle.ring * BLOCK + first % BLOCK
            for name, held in zip(self.names, self.held):
                table.read_into(held[place : place + stop - first], name, first)
        self._read = count

    def _where(self, number: int) -> tuple[Table, int, int]:
        """The shard of a block, and the stretch of its rows that holds what is wanted."""
        wanted, block = self.shuffle.wanted, self.shuffle.blocks[number]
        offsets = np.unpackbits(wanted.bits[block]).nonzero()[0] + wanted.local[block]
        return self.tables[wanted.shards[block]], int(offsets[0]), int(offsets[-1]) + 1


class _Recycled:
    """Memory for batches, used again when nobody holds the batch any more: between two threads malloc would
    keep twice as much, and fresh memory costs as much time as reading."""

    def __init__(self, shape: tuple[int, int], dtype: np.dtype, pinned: bool = False):
        self._shape, self._dtype, self._free = shape, dtype, []
        self._pinned = pinned and torch.cuda.is_available()  # a GPU copies from it by itself

    def take(self, rows: int) -> np.ndarray:
        pages = self._free.pop() if self._free else self._new()
        lent = pages[:rows]
        # a tensor of it holds it, and so does whatever is made of the tensor
        weakref.finalize(lent, self._free.append, pages).atexit = False
        return lent

    def _new(self) -> np.ndarray:
        if not self._pinned:
            return _pages(self._shape, self._dtype)
        size = math.prod(self._shape) * self._dtype.itemsize
        memory = torch.empty(max(size, 1), dtype=torch.uint8, pin_memory=True).numpy()
        return memory[:size].view(self._dtype).reshape(self._shape)


def _pages(shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """An array straight from the system, to which it goes back at once: malloc would keep it."""
    count = math.prod(shape)
    pages = mmap.mmap(-1, max(count * np.dtype(dtype).itemsize, 1), access=mmap.ACCESS_COPY)
    return np.frombuffer(pages, dtype, count).reshape(shape)


def cut_batches(
    pieces: Iterable[tuple[np.ndarray, ...]], size: int, start: int
) -> Iterator[list[np.ndarray]]:
    """Pieces of any length cut anew into batches of ``size`` rows, from batch ``start`` on."""
    skip, held = start * size, None
    for piece in pieces:
        if skip >= len(piece[0]):
            skip -= len(piece[0])
            continue
        piece, skip = [values[skip:] for values in piece], 0
        held = piece if held is None else [np.concatenate(both) for both in zip(held, piece)]
        whole = len(held[0]) // size * size
        for first in range(0, whole, size):
            yield [values[first : first + size] for values in held]
        held = [values[whole:] for values in held]
    if held is not None and len(held[0]):
        yield held


def as_stored(raw: np.ndarray, code: str) -> torch.Tensor:
    """What was read from a table, as a tensor of its dtype ``code``, without a copy. It holds this array: a
    view of it in numpy would hold the memory alone, which ``_Recycled`` would lend again."""
    return torch.from_numpy(raw).view(FLOATS[code])


def widened(raw: np.ndarray, code: str, out: torch.Tensor | None = None) -> torch.Tensor:
    """float32 [n, d] of what was read from a table with dtype ``code``; by one thread only."""
    stored = as_stored(raw, code)
    out = torch.empty(stored.shape, dtype=torch.float32) if out is None else out
    step = max(SERIAL // max(stored.shape[1], 1), 1)
    for first in range(0, len(out), step):
        out[first : first + step].copy_(stored[first : first + step])
    return out


class Prefetched:
    """An iterator whose next items are made by a thread of its own while the present one is used.

        with Prefetched(store.reader("train", 1024, seed=0)) as batches:
            for rows, acts in batches: ...
        batches.waited   # seconds that ``next`` was blocked, the first items included

    At most ``ahead`` items wait, and one more is being made. What fails in the thread is raised where the
    item is taken. ``close``, or the end of "with", ends the thread and closes the source; what was prefetched
    is lost. One that nobody holds any more ends too."""

    def __init__(self, source: Iterable, ahead: int = 2):
        check("ahead", ahead, int, low=1)
        self._source, self._pool, self.waited = iter(source), ThreadPoolExecutor(1, "prefetch"), 0.0
        self._items = deque(self._pool.submit(next, self._source) for _ in range(ahead + 1))

    def __iter__(self) -> Prefetched:
        return self

    def __next__(self):
        if not self._items:
            raise StopIteration
        began = time.perf_counter()
        try:
            item = self._items.popleft().result()
        finally:
            self.waited += time.perf_counter() - began
        self._items.append(self._pool.submit(next, self._source))
        return item

    def close(self) -> None:
        """End the thread, and wait for that; ``next`` then raises StopIteration."""
        self._items.clear()
        self._pool.shutdown(cancel_futures=True)
        if hasattr(self._source, "close"):
            self._source.close()

    def __enter__(self) -> Prefetched:
        return self

    def __exit__(self, *error) -> None:
        self.close()
