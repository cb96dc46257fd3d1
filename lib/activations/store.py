"""Activations on disk: shards, a manifest that vouches for them, shuffled batches out of them.

One row per token, of all models at once, in the order of the corpus::

    shard_00000.safetensors  acts_<model> [n, d_m], norm_<model> [n], tokens, documents, positions, split,
                             labels
    ...
    index.safetensors        kept [rows]: what the masks leave; mean_<model> [d_m] float64
    manifest.json            fingerprints, counts, statistics, the SHA-256 of every file: written last
    log.jsonl                a line per shard, with its time; not part of the content

A store may be larger than memory: activations are read every time. They are handed out raw, as the model
computed them; a crosscoder multiplies by ``store.scales``, so that every model has mean norm sqrt(d)."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..labels import LABEL_ARRAYS, SPLITS
from ..runs import MANIFEST, Run, read_manifest
from ..settings import UserError, check, path_shown
from .shuffle import (
    MEMORY,
    Shuffle,
    Table,
    Wanted,
    as_stored,
    check_reading,
    read_shuffled,
    ring_blocks,
    widened,
)

if TYPE_CHECKING:  # a process that trains needs no transformers, which takes seconds to import
    from ..models.pairs import Pair

MADE_BY = "01_harvest_activations"
INDEX = "index.safetensors"
FORMAT = 1
GAP = 16  # rows: what is no further apart is read at once
STRETCH = 4096  # rows that are read at once, at most
VERIFY_BYTES = 4 << 30  # checksums of a store up to this size are compared when it is opened: some seconds


def _per_token(name: str) -> cached_property:
    """An array of all shards, one after the other, read when it is first used."""
    return cached_property(lambda store: store._joined(name))


class Store:
    """A harvested store. Rows are numbered through all shards; everything per token has ``len(store)``
    entries.

    models      names, in the order in which activations are handed out
    widths      {model: d_m};  layers {model: index of the decoder layer that was read}
    scales      {model: sqrt(d_m) / mean norm}, over kept tokens of the train split, float64
    mean_norms  {model: mean norm of the residual stream}, over the same tokens: the unit of steering strength
    means       {model: float64 [d_m]}, over the same tokens: what mean ablation puts in place

    Read when first used, and then in memory, with so many bytes per token of the store:

    tokens, documents, positions   int32, 4 each: token id, number of the document, position in it
    split       int8, 1: index into SPLITS;  kept  bool, 1: False where a mask drops the token
    labels      {name: int8}, 1 each, as in ``corpus.LABEL_ARRAYS``
    norms       {model: float32}, 4 each: norm of every token's activation
    """

    raw_batches = True  # ``reader`` knows ``raw``
    tokens, documents, positions, split = map(_per_token, ("tokens", "documents", "positions", "split"))

    def __init__(self, path: Path, manifest: dict):
        self.path, self.manifest, self.fingerprint = Path(path), manifest, manifest["fingerprint"]
        self.models: tuple[str, ...] = tuple(manifest["models"])
        self.widths = {m: int(manifest["models"][m]["width"]) for m in self.models}
        self.layers = {m: int(manifest["models"][m]["layer"]) for m in self.models}
        self.scales = {m: float(manifest["statistics"][m]["scale"]) for m in self.models}
        self.mean_norms = {m: float(manifest["statistics"][m]["mean_norm"]) for m in self.models}
        self._shards = [Table(self.path / name) for name in manifest["shards"]]
        self._starts = np.cumsum([0, *(table.shape("tokens")[0] for table in self._shards)])
        self._index = Table(self.path / INDEX)
        self.means = {m: torch.from_numpy(self._index.read(f"mean_{m}")) for m in self.models}
        self.labels = _Lazy(LABEL_ARRAYS, self._joined)
        self.norms = _Lazy(self.models, lambda m: self._joined(f"norm_{m}"))
        self._wanted: dict[str, Wanted] = {}

    @cached_property
    def kept(self) -> np.ndarray:
        return self._index.read("kept")

    @classmethod
    def open(cls, path: str | Path, verify: bool | None = None) -> Store:
        """Open a store; UserError if it is missing, or names the file that is missing, truncated or damaged.

        Sizes of files are compared always; checksums, for which everything is read, if ``verify``, by default
        for a store of up to ``VERIFY_BYTES``."""
        path = Path(path)
        manifest, file = read_manifest(path, MADE_BY), path_shown(path / MANIFEST)
        again = f"remove {path_shown(path)} and run notebook {MADE_BY} again"
        damaged = UserError(f"{file} is damaged: {again}")
        if not all(isinstance(manifest.get(key), dict) for key in ("shards", "index")):
            raise damaged
        files = {**manifest["shards"], INDEX: manifest["index"]}
        if odd := next((name for name in files if Path(name).name != name), None):
            raise UserError(f"{file} names the shard {odd!r}, which lies outside of the store: {again}")
        if verify is None:
            verify = sum(expected.get("bytes", 0) for expected in files.values()) <= VERIFY_BYTES
        for name, expected in files.items():
            if problem := file_problem(path / name, expected, verify):
                raise UserError(
                    f"{path_shown(path / name)} is {problem}: run notebook {MADE_BY} again, it makes this"
                    " file anew"
                )
        if manifest.get("format") != FORMAT:
            raise UserError(f"{file} has format {manifest.get('format')}, this code reads {FORMAT}: {again}")
        try:
            return cls(path, manifest)
        except (KeyError, TypeError, AttributeError):
            raise damaged from None

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __repr__(self) -> str:
        widths = ", ".join(f"{m} [{w}]" for m, w in self.widths.items())
        kept = self.manifest["counts"]["kept"]
        return (
            f"Store({len(self):,} tokens, {kept:,} kept; {widths}; {len(self._shards)} shards,"
            f" {self.fingerprint})"
        )

    def count(self, split: str) -> int:
        return len(self._wanted_of(split))

    def rows(self, split: str) -> np.ndarray:
        """Sorted int64 numbers of the kept rows of a split: "train", "choose" or "report"; 8 bytes a row."""
        return self._wanted_of(split).rows()

    def activations(
        self, rows: Sequence[int] | np.ndarray | torch.Tensor, device: str = "cpu"
    ) -> list[torch.Tensor]:
        """Raw activations of any rows, in their order: a float32 tensor [n, d_m] per model. Fast for rows
        that are neighbours. On another ``device`` they are widened there."""
        rows = np.asarray(rows, dtype=np.int64).reshape(-1)
        if len(rows) and not (rows.min() >= 0 and rows.max() < len(self)):
            raise UserError(
                f"rows {rows.min()} to {rows.max()} are asked for: the store has rows 0 to {len(self) - 1}"
            )
        distinct, places = np.unique(rows, return_inverse=True)
        read = [[self._shards[0].read(f"acts_{m}", 0, 0)] for m in self.models]
        for shard, first, stop, wanted in self._stretches(distinct):
            for m, parts in zip(self.models, read):
                parts.append(self._shards[shard].read(f"acts_{m}", first, stop)[wanted])
        places = slice(None) if np.array_equal(rows, distinct) else places
        dtypes = [self._shards[0].dtype(f"acts_{m}") for m in self.models]
        read = [(np.concatenate(parts)[places], dtype) for parts, dtype in zip(read, dtypes)]
        return [widened(*one) if device == "cpu" else as_stored(*one).to(device).float() for one in read]

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
        """One epoch in shuffled batches: (row numbers int64 [B], raw float32 [B, d_m] per model); the last
        may be shorter. Every kept token of the split comes once.

        ``start`` skips that many batches: the rest of an interrupted epoch is the same to the bit. ``memory``
        (bytes) bounds what is resident at a time, two prefetched batches included, beside one bit per token
        of the store. It decides the order, as do split, seed and epoch, unless the whole split fits. ``part``
        (i, n): of each batch the rows i, i + n, i + 2n, ... ``raw``: in the dtype of the store, for a GPU,
        which widens them faster. UserError if ``memory`` is too small, unless it is the default."""
        memory = check_reading(batch_size, start, part, memory, sum(self.widths.values()))
        names, shuffle = [f"acts_{m}" for m in self.models], self._shuffle(split, seed, epoch, memory)
        return read_shuffled(self._shards, names, shuffle, batch_size, start, part, raw)

    def order(self, split: str, seed: int, epoch: int, memory: int = MEMORY) -> np.ndarray:
        """The rows of a split in the order in which ``reader`` hands them out: int64, 8 bytes for each."""
        return self._shuffle(split, seed, epoch, memory).rows()

    @property
    def tokens_per_second(self) -> float:
        """Speed of the harvest that wrote this store, by its log; a token has gone through all models."""
        lines = list(read_log(self.path).values())
        return sum(line["tokens"] for line in lines) / max(sum(line["seconds"] for line in lines), 1e-9)

    def _joined(self, name: str) -> np.ndarray:
        try:
            return np.concatenate([table.read(name) for table in self._shards])
        except KeyError:
            raise UserError(
                f"{path_shown(self.path)} has no labels {name!r}: an older version of this code made it;"
                f" remove it and run notebook {MADE_BY} again"
            ) from None

    def _wanted_of(self, split: str) -> Wanted:
        check("split", split, str, choices=SPLITS)
        if split not in self._wanted:
            number, bounds = SPLITS.index(split), zip(self._shards, self._starts, self._starts[1:])
            kept = ((table, self._index.read("kept", first, stop)) for table, first, stop in bounds)
            self._wanted[split] = Wanted(mask & (table.read("split") == number) for table, mask in kept)
        return self._wanted[split]

    def _shuffle(self, split: str, seed: int, epoch: int, memory: int) -> Shuffle:
        wanted = self._wanted_of(split)
        row_bytes = sum(self._shards[0].row_bytes(f"acts_{m}") for m in self.models)
        ring = ring_blocks(check("memory", memory, int, low=1), row_bytes, len(wanted.starts))
        return Shuffle(wanted, ring, (seed, epoch, SPLITS.index(split)))

    def _stretches(self, rows: np.ndarray) -> Iterator[tuple[int, int, int, np.ndarray]]:
        """Sorted rows as what is read at a time: (shard, first, stop, int64 [n] rows counted from first)."""
        shard_of = np.searchsorted(self._starts, rows, side="right") - 1
        local = rows - self._starts[shard_of]
        apart = (np.diff(local) > GAP) | (np.diff(shard_of) > 0) | (np.diff(local // STRETCH) > 0)
        for part in np.split(np.arange(len(rows)), np.flatnonzero(apart) + 1) if len(rows) else ():
            first, last = int(local[part[0]]), int(local[part[-1]])
            yield int(shard_of[part[0]]), first, last + 1, local[part] - first


class _Lazy(Mapping):
    """{name: array}, each read when it is first asked for, and then in memory."""

    def __init__(self, names: Iterable[str], read: Callable[[str], np.ndarray]):
        self._names, self._read = tuple(names), cache(read)

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._names:
            raise KeyError(name)
        return self._read(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def file_problem(file: Path, expected: dict, verify: bool = True) -> str | None:
    """What is wrong with a file of these {bytes, sha256}: missing, truncated, damaged; None if nothing is."""
    if not file.is_file():
        return "missing"
    if file.stat().st_size != expected.get("bytes"):
        return "truncated" if file.stat().st_size < expected.get("bytes", 0) else "damaged"
    return "damaged" if verify and sha256(file) != expected["sha256"] else None


def sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_log(path: Path) -> dict[str, dict]:
    """{shard: its last line in log.jsonl}. A line that an interruption cut short is passed over."""
    lines, file = {}, path / "log.jsonl"
    for line in file.read_text().splitlines() if file.is_file() else ():
        with contextlib.suppress(ValueError, KeyError):
            entry = json.loads(line)
            lines[entry["shard"]] = entry
    return lines


def open_store(run: Run, pair: Pair) -> Store:
    """The run's store; UserError if it is missing, damaged, or harvested from other weights."""
    store = Store.open(run.path("store"))
    for name in store.models:
        if name not in pair.models or store.manifest["models"][name]["fingerprint"] != pair.fingerprint(name):
            raise UserError(
                f"the store was harvested from other weights of {name!r} than the pair {pair.name!r} has now:"
                f" run notebook {MADE_BY} again (make figures ONLY=01)"
            )
    return store
