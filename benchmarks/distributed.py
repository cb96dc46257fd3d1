"""Two processes, started by torchrun, against one: how far apart are their losses?

    python -m benchmarks.distributed [--seeds 5]

On a store of 20,000 tokens, harvested from two random models of width 64, 200 steps of 128 tokens. Each
measurement is the largest relative difference of two lines of the log (means of two steps), a number for each
seed. Records, in results.json:

    accelerate_loss_difference           two processes that share out rows
    accelerate_loss_difference_features  two processes that share out features
    rounding_loss_difference             one process, its first encoder changed by a ten-millionth part: what
                                         rounding alone can do
    world_size                           number of processes that trained: they count themselves, and the
                                         manifest says it

Most runs agree in seven digits. In some, two entries at BatchTopK's border are so alike that rounding decides
between them; Adam makes much of a rare feature's one gradient, and 100 steps later losses differ by a
percent. One process does the same to itself.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

from lib.activations.store import Store
from lib.crosscoder.training import LOG_LINES, TrainConfig, Trainer, read_log
from lib.runs import read_manifest
from lib.settings import ROOT
from tests.toys import toy_store

from .common import record, spread

TOKENS, WIDTHS, BATCH, STEPS, PROCESSES = 20_000, (64, 64), 128, 200, 2
ROUNDING = 1e-7


def alone(store: Store, config: TrainConfig, change: float = 0.0) -> np.ndarray:
    """Losses of every line of the log, by this process; ``change``: of the first encoder, relative."""
    trainer = Trainer(store, config)
    with torch.no_grad():
        W_enc = trainer.crosscoder.W_enc
        W_enc.mul_(
            1 + change * torch.randn(W_enc.shape, generator=torch.Generator().manual_seed(config.seed))
        )
    while trainer.shown < config.tokens:
        trainer.run_until(trainer.shown + config.tokens / LOG_LINES)
    trainer.close()
    return np.array([line["loss"] for line in trainer.log])


def together(store: Store, config: TrainConfig, folder: Path, share: str) -> tuple[np.ndarray, int]:
    """The same by processes with one thread each, and their number."""
    fields = [
        word
        for name, value in dataclasses.asdict(config).items()
        for word in (f"--{name.replace('_', '-')}", str(value))
    ]
    subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            str(PROCESSES),
            "-m",
            "lib",
            "train",
            "--cpu",
            "--processes",
            str(PROCESSES),
            "--share",
            share,
            "--store",
            str(store.path),
            "--folder",
            str(folder),
            *fields,
        ],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        check=True,
    )
    return (
        np.array([line["loss"] for line in read_log(folder)]),
        read_manifest(folder, "02_train_crosscoder")["processes"],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    seeds = parser.parse_args().seeds
    torch.set_num_threads(1)
    found, sizes = {"rows": [], "features": [], "rounding": []}, []
    with tempfile.TemporaryDirectory() as scratch:
        store = toy_store(scratch, TOKENS, WIDTHS)
        for seed in range(seeds):
            config = TrainConfig(
                n_features=512, k=8, tokens=STEPS * BATCH, batch_size=BATCH, dead_after=0.05, seed=seed
            )
            expected = alone(store, config)
            losses = {"rounding": alone(store, config, ROUNDING)}
            for share in ("rows", "features"):
                losses[share], size = together(store, config, Path(scratch) / f"{share}_{seed}", share)
                sizes.append(size)
            for name, values in losses.items():
                found[name].append(float(np.max(np.abs(values - expected) / expected)))
                print(f"seed {seed}, {name}: {found[name][-1]:.2e}", flush=True)
    record(
        accelerate_loss_difference=spread(found["rows"]),
        accelerate_loss_difference_features=spread(found["features"]),
        rounding_loss_difference=spread(found["rounding"]),
        world_size=spread(sizes),
    )


if __name__ == "__main__":
    main()
