"""Two processes, started by torchrun, against one: how far apart are their losses?

    python -m benchmarks.distributed [--seeds 5]

On a store of 20,000 tokens, harvested from two random models of width 64, 200 steps of 256 tokens. Records, in results.json:

    accelerate_loss_difference           rows shared out: the largest difference of two lines of the log, relative; a number for each seed
    accelerate_loss_difference_features  the same with features shared out
    world_size                           number of processes that trained: they count themselves, and the manifest says it
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

from lib.results import ROOT, read_manifest
from lib.store import Store
from lib.training import TrainConfig, read_log
from tests.toys import toy_store

from .common import record, spread

TOKENS, WIDTHS, BATCH, STEPS, PROCESSES = 20_000, (64, 64), 256, 200, 2


def losses(store: Store, config: TrainConfig, folder: Path, processes: int, share: str) -> np.ndarray:
    """Of every line of the log: the mean of two steps. Each run is a process of its own, with one thread per process."""
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes > 1 else []
    fields = [word for name, value in dataclasses.asdict(config).items() for word in (f"--{name.replace('_', '-')}", str(value))]
    subprocess.run([sys.executable, *start, "-m", "lib.distributed", "--cpu", "--processes", str(processes), "--share", share, "--store",
                    str(store.path), "--folder", str(folder), *fields], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True)
    log = read_log(folder)
    assert log[-1]["tokens"] >= STEPS * BATCH
    return np.array([line["loss"] for line in log])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=5)
    differences, sizes = {"rows": [], "features": []}, []
    with tempfile.TemporaryDirectory() as scratch:
        store = toy_store(scratch, TOKENS, WIDTHS)
        for seed in range(parser.parse_args().seeds):
            config = TrainConfig(n_features=1024, k=16, tokens=STEPS * BATCH, batch_size=BATCH, dead_after=0.05, seed=seed)
            alone = losses(store, config, Path(scratch) / f"alone_{seed}", 1, "rows")
            for share, found in differences.items():
                folder = Path(scratch) / f"{share}_{seed}"
                together = losses(store, config, folder, PROCESSES, share)
                found.append(float(np.max(np.abs(together - alone) / alone)))
                sizes.append(read_manifest(folder, "02_train_crosscoder")["processes"])
                print(f"seed {seed}, {share}: {found[-1]:.2e}")
    record(accelerate_loss_difference=spread(differences["rows"]), accelerate_loss_difference_features=spread(differences["features"]),
           world_size=spread(sizes))


if __name__ == "__main__":
    main()
