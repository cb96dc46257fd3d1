"""Activations on disk: shards that are memory-mapped, a manifest that vouches for them, shuffled batches out of them.

One row per token, of all models at once, in the order of the corpus::

    shard_00000.safetensors   acts_<model> [n, d_m], norm_<model> [n], tokens, documents, positions, split, labels
    ...
    index.safetensors         kept [rows]: what the masks leave; mean_<model> [d_m] float64
    manifest.json             fingerprints, counts, statistics in float64, the SHA-256 of every file: written last
    log.jsonl                 a line per shard, with its time; not part of the content

``lib.harvest`` writes a store; this module reads it. Activations are handed out raw, as the model computed them;
``store.scales`` are what a crosscoder multiplies by, once, so that every model has mean norm sqrt(d).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

from .corpus import LABEL_ARRAYS, SPLITS
from .results import ROOT, UserError, check, read_manifest

MADE_BY = "01_harvest_activations"
INDEX = "index.safetensors"
FORMAT = 1
WINDOW_BYTES = 1 << 30  # shuffling happens within this much of the store: disk pages that are read together stay warm


class Store:
    """A harvested store. Rows are numbered through all shards; everything per token has ``len(store)`` entries.

    models      names, in the order in which activations are handed out
    widths      {model: d_m};  layers {model: index of the decoder layer that was read}
    scales      {model: sqrt(d_m) / mean norm}, over kept tokens of the train split, float64
    mean_norms  {model: mean norm of the residual stream}, over the same tokens: the unit of steering strength
    means       {model: float64 [d_m]}, over the same tokens: what mean ablation puts in place of an activation
    tokens, documents, positions   int32: token id, number of the document, position in it
    split       int8, index into SPLITS;  kept  bool, False where a mask drops the token
    labels      {name: int8}, as in ``corpus.LABEL_ARRAYS``
    norms       {model: float32}: norm of every token's activation
    """

    def __init__(self, path: Path, manifest: dict):
        self.path, self.manifest, self.fingerprint = Path(path), manifest, manifest["fingerprint"]
        self.models: tuple[str, ...] = tuple(manifest["models"])
        self.widths = {m: int(manifest["models"][m]["width"]) for m in self.models}
        self.layers = {m: int(manifest["models"][m]["layer"]) for m in self.models}
        statistics = manifest["statistics"]
        self.scales = {m: float(statistics[m]["scale"]) for m in self.models}
        self.mean_norms = {m: float(statistics[m]["mean_norm"]) for m in self.models}
        self._shards = [load_file(self.path / name) for name in manifest["shards"]]  # memory-mapped: read when used
        self._starts = np.cumsum([0, *(len(s["tokens"]) for s in self._shards)])
        self.tokens, self.documents, self.positions = (self._joined(n) for n in ("tokens", "documents", "positions"))
        self.split = self._joined("split")
        self.labels = {name: self._joined(name) for name in LABEL_ARRAYS}
        self.norms = {m: self._joined(f"norm_{m}") for m in self.models}
        index = load_file(self.path / INDEX)
        self.kept = index["kept"].numpy()
        self.means = {m: index[f"mean_{m}"] for m in self.models}

    @classmethod
    def open(cls, path: str | Path, verify: bool = True) -> Store:
        """Open a store; UserError if it is missing, or names the file that is missing, truncated or damaged.

        ``verify=False`` skips the checksums (sizes are compared always): for stores that take long to read.
        """
        path = Path(path)
        manifest = read_manifest(path, MADE_BY)
        for name, expected in {**manifest.get("shards", {}), INDEX: manifest.get("index", {})}.items():
            if problem := file_problem(path / name, expected, verify):
                raise UserError(f"{_shown(path / name)} is {problem}: run notebook {MADE_BY} again, it makes just this file anew")
        if manifest.get("format") != FORMAT:
            raise UserError(f"{_shown(path)} has format {manifest.get('format')}, this code reads format {FORMAT}: remove it and run "
                            f"notebook {MADE_BY}")
        return cls(path, manifest)

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __repr__(self) -> str:
        widths = ", ".join(f"{m} [{w}]" for m, w in self.widths.items())
        return f"Store({len(self):,} tokens, {int(self.kept.sum()):,} kept; {widths}; {len(self._shards)} shards, {self.fingerprint})"

    def rows(self, split: str) -> np.ndarray:
        """Sorted int64 numbers of the kept rows of a split: "train", "choose" or "report"."""
        check("split", split, str, choices=SPLITS)
        return np.flatnonzero(self.kept & (self.split == SPLITS.index(split)))

    def activations(self, rows: Sequence[int] | np.ndarray | torch.Tensor) -> list[torch.Tensor]:
        """Raw activations of any rows, in their order: a float32 CPU tensor [n, d_m] per model, in the order of ``models``."""
        rows = np.asarray(rows, dtype=np.int64).reshape(-1)
        if len(rows) and not (0 <= rows.min() and rows.max() < len(self)):
            raise UserError(f"rows {rows.min()} to {rows.max()} are asked for: the store has rows 0 to {len(self) - 1}")
        shard_of = np.searchsorted(self._starts, rows, side="right") - 1
        order = np.argsort(shard_of, kind="stable")
        ends = np.searchsorted(shard_of[order], np.arange(len(self._shards) + 1))
        acts = [torch.empty(len(rows), self.widths[m], dtype=self._shards[0][f"acts_{m}"].dtype) for m in self.models]
        for s in np.unique(shard_of):
            places = order[ends[s] : ends[s + 1]]
            local = torch.from_numpy(rows[places] - self._starts[s])
            for m, out in zip(self.models, acts):
                out[torch.from_numpy(places)] = self._shards[s][f"acts_{m}"][local]
        return [out.float() for out in acts]

    def order(self, split: str, seed: int, epoch: int) -> np.ndarray:
        """The kept rows of a split in the order of an epoch: a permutation, the same for the same seed and epoch.

        Shards are drawn in random order and shuffled together, as many at a time as fit into ``WINDOW_BYTES``: for a
        small store that is a full shuffle, and for one larger than memory it reads the disk in stretches.
        """
        rng = np.random.default_rng([seed, epoch, SPLITS.index(split)])
        rows = self.rows(split)
        bounds = np.searchsorted(rows, self._starts)
        shard_bytes = max(e["bytes"] for e in self.manifest["shards"].values())
        at_once = max(WINDOW_BYTES // shard_bytes, 1)
        shards = rng.permutation(len(self._shards))
        windows = [shards[i : i + at_once] for i in range(0, len(shards), at_once)]
        return np.concatenate([rng.permutation(np.concatenate([rows[bounds[s] : bounds[s + 1]] for s in window])) for window in windows])

    def batches(self, split: str, batch_size: int, seed: int, epoch: int, start: int = 0) -> Iterator[list[torch.Tensor]]:
        """One epoch in shuffled batches: raw float32 [B, d_m] per model; every kept token once, the last batch may be shorter.

        ``start`` skips that many batches at no cost: training resumes in the middle of an epoch.
        """
        check("batch_size", batch_size, int, low=1)
        order = self.order(split, seed, epoch)
        for first in range(start * batch_size, len(order), batch_size):
            yield self.activations(order[first : first + batch_size])

    @property
    def tokens_per_second(self) -> float:
        """Speed of the harvest that wrote this store: tokens (each through all models) by the seconds in its log."""
        lines = list(read_log(self.path).values())
        return sum(line["tokens"] for line in lines) / max(sum(line["seconds"] for line in lines), 1e-9)

    def _joined(self, name: str) -> np.ndarray:
        return np.concatenate([s[name].numpy() for s in self._shards])


def file_problem(file: Path, expected: dict, verify: bool = True) -> str | None:
    """"missing", "truncated" or "damaged", against {bytes, sha256}; None if the file is as it was written."""
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
    lines = {}
    file = path / "log.jsonl"
    for line in file.read_text().splitlines() if file.is_file() else ():
        try:
            entry = json.loads(line)
            lines[entry["shard"]] = entry
        except (ValueError, KeyError):
            continue
    return lines


def _shown(path: Path) -> str:
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else str(path)
