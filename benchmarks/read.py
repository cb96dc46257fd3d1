"""Shuffled reading from a store larger than memory, against a memory map read row by row; and does training
ever wait for it?

    python -m benchmarks.read [--gigabytes 2] [--memory 256]

Writes a synthetic store of two models of width 512 in float16 into a temporary folder. Before every round the
files are dropped from the system's cache, as far as one may without being root. Records, in results.json:

    read_pairs_per_second          of ``Store.reader``, a whole epoch: float32 activations of both models per
                                   second
    read_pairs_per_second_by_item  of the memory map, a row at a time
    read_memory_share              largest growth of the process while reading, as a share of the bound
    wait_share                     share of training's time that is spent waiting for batches (F 16,384, k 50,
                                   B 1024)
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from lib.activations.shuffle import Prefetched
from lib.activations.store import FORMAT, INDEX, Store, sha256
from lib.crosscoder.training import TrainConfig, Trainer
from lib.labels import LABEL_ARRAYS, SPLITS
from lib.runs import write_manifest

from .common import record, spread

BATCH = 1024  # tokens
ITEMS = 20_000  # rows that are read one by one in a round
STEPS, STEPS_A_ROUND = 48, 8  # of training
SHARD, DOCUMENT = 65_536, 512  # rows


def write_store(
    folder: Path,
    rows: int,
    widths: tuple[int, ...] = (512, 512),
    dtype: torch.dtype = torch.float16,
    shard_rows: int = SHARD,
) -> Store:
    """A store of random activations, in documents of 512 tokens: the first of each is masked, every tenth
    document is to report on.

    The first two entries of each activation, which the norms leave out, tell the row: its number modulo 2048,
    and divided by 2048.
    """
    folder.mkdir(parents=True, exist_ok=True)
    names = [f"model_{i}" for i in range(len(widths))]
    generator, shards, kept = torch.Generator().manual_seed(0), {}, []
    # of every shard
    noise = {
        n: torch.randn(min(shard_rows, rows), w, generator=generator).to(dtype) for n, w in zip(names, widths)
    }
    norms = {n: acts[:, 2:].float().norm(dim=1) for n, acts in noise.items()}
    for first in range(0, rows, shard_rows):
        row = torch.arange(first, min(first + shard_rows, rows))
        document, position = row // DOCUMENT, row % DOCUMENT
        tensors = {
            "tokens": row.int() % 1000,
            "documents": document.int(),
            "positions": position.int(),
            "split": (
                torch.where(document % 10 == 9, SPLITS.index("report"), SPLITS.index("train")).to(torch.int8)
            ),
            **{label: torch.full((len(row),), -1, dtype=torch.int8) for label in LABEL_ARRAYS},
        }
        for name in names:
            acts = noise[name][: len(row)]
            acts[:, 0], acts[:, 1] = row % 2048, row // 2048
            tensors[f"acts_{name}"], tensors[f"norm_{name}"] = acts, norms[name][: len(row)]
        file = folder / f"shard_{len(shards):05d}.safetensors"
        save_file(tensors, file)
        shards[file.name] = {"bytes": file.stat().st_size, "sha256": sha256(file), "tokens": len(row)}
        kept.append(position > 0)
    means = {f"mean_{n}": torch.zeros(w, dtype=torch.float64) for n, w in zip(names, widths)}
    save_file({"kept": torch.cat(kept), **means}, folder / INDEX)
    index = {"bytes": (folder / INDEX).stat().st_size, "sha256": sha256(folder / INDEX)}
    write_manifest(
        folder,
        "synthetic",
        format=FORMAT,
        models={n: {"width": w, "layer": 0} for n, w in zip(names, widths)},
        statistics={n: {"scale": 1.0, "mean_norm": w**0.5} for n, w in zip(names, widths)},
        counts={"kept": int(torch.cat(kept).sum())},
        shards=shards,
        index=index,
    )
    return Store.open(folder, verify=False)


def row_numbers(acts: torch.Tensor) -> np.ndarray:
    """Which rows of a store from ``write_store`` these activations [n, d] are."""
    return (acts[:, 0].long() + 2048 * acts[:, 1].long()).numpy()


def by_item(folder: Path, rows: np.ndarray) -> Iterator[list[torch.Tensor]]:
    """Batches made of single rows from memory-mapped files, as a dataset of items and a default collation
    would.
    """
    shards = [load_file(file) for file in sorted(folder.glob("shard_*"))]
    for first in range(0, len(rows), BATCH):
        items = [
            [shards[row // SHARD][name][row % SHARD].float() for name in ("acts_model_0", "acts_model_1")]
            for row in rows[first : first + BATCH].tolist()
        ]
        yield [torch.stack(column) for column in zip(*items)]


def forget(folder: Path) -> None:
    """Ask the system to drop the files from its cache."""
    for file in folder.iterdir():
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def resident() -> int:
    """Anonymous memory of this process in bytes: its own, without files in the system's cache."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) << 10 for line in status if line.startswith("RssAnon"))


def reading(store: Store, memory: int, rounds: int) -> None:
    rates, item_rates, shares = [], [], []
    for number in range(-1, rounds):
        order = np.random.default_rng(number + 1).permutation(store.rows("train"))[:ITEMS]
        forget(store.path)
        began = time.perf_counter()
        for _ in by_item(store.path, order):
            pass
        item_seconds = time.perf_counter() - began
        forget(store.path)
        before, peak, count, began = resident(), 0, 0, time.perf_counter()
        for rows, acts in store.reader("train", BATCH, seed=0, epoch=number + 1, memory=memory):  # noqa: B007
            count, peak = count + len(rows), max(peak, resident())
        seconds = time.perf_counter() - began
        assert count == store.count("train") and np.array_equal(row_numbers(acts[1]), rows)
        print(
            f"round {number}: {count / seconds:10,.0f} pairs a second, {len(order) / item_seconds:8,.0f} by"
            f" item; {(peak - before) / 1e6:.0f} MB more resident, {memory / 1e6:.0f} allowed"
        )
        if number >= 0:
            rates.append(count / seconds)
            item_rates.append(len(order) / item_seconds)
            shares.append((peak - before) / memory)
    record(
        read_pairs_per_second=spread(rates),
        read_pairs_per_second_by_item=spread(item_rates),
        read_memory_share=spread(shares),
    )


def waiting(store: Store, memory: int) -> None:
    """Train while reading. The first step is not counted; of every eight after it, the share of time in which
    no batch was there.
    """
    config = TrainConfig(n_features=16_384, k=50, batch_size=BATCH, tokens=10**9, rate=1e-4)
    trainer, shares = Trainer(store, config), []

    def step() -> None:
        _, acts = next(batches)
        for act in acts:
            act[:, :2] = 0  # the number of a row is no activation
        trainer.train_step(acts)

    forget(store.path)
    with Prefetched(store.reader("train", BATCH, seed=0, memory=memory)) as batches:
        step()
        for _ in range(STEPS // STEPS_A_ROUND):
            began, waited = time.perf_counter(), batches.waited
            for _ in range(STEPS_A_ROUND):
                step()
            seconds = time.perf_counter() - began
            shares.append((batches.waited - waited) / seconds)
            print(
                f"{STEPS_A_ROUND * BATCH / seconds:,.0f} pairs a second trained on, {shares[-1]:.2%} of the"
                " time waiting"
            )
    record(wait_share=spread(shares))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=2, help="size of the store, 10^9 bytes")
    parser.add_argument("--memory", type=int, default=256, help="bound of the reader's memory, 10^6 bytes")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        store = write_store(Path(folder) / "store", int(options.gigabytes * 1e9 / 2048))
        print(store)
        reading(store, options.memory * 1_000_000, options.rounds)
        waiting(store, options.memory * 1_000_000)


if __name__ == "__main__":
    main()
