"""One training step: ours against the dense one of public trainers, and against eai-sparsify where it is
installed.

    python -m benchmarks.step                 # make bench; with PEERS=1 in an environment that has eai-
                                              sparsify too

The whole step is timed: encoding, selection, loss, gradients, clipping, optimiser, and for ours what training
keeps count of. Batches are Gaussian, so that nearly every feature fires in each of them: for sparse products
the hardest case. Dead features, whose auxiliary loss only ours has, do not occur. Recorded are

    step_vs_dense_default                       a step of each of the run's crosscoders: the dense steps as
                                                they are published, by ours, all in float32, one after another
    step_vs_dense_small, step_vs_dense_large    the dense step as it is published (float32, default Adam), by
                                                ours in bfloat16
    step_vs_dense_tuned_small                   the dense step with bfloat16 autocast and a fused Adam, by
                                                ours in bfloat16
    step_vs_sparsify_small                      eai-sparsify's fused kernels in float32, with a fused Adam, by
                                                ours in bfloat16
    step_vs_sparsify_autocast_small             the same with bfloat16 autocast
    step_vs_dense_equal_small                   the dense step in float32 with a fused Adam, by ours in
                                                float32
    memory_vs_dense_large                       peak memory of ours by that of the dense step; at most 1 is
                                                wanted
"""

from __future__ import annotations

import argparse
import multiprocessing
from types import SimpleNamespace

import numpy as np
import torch

from benchmarks.common import interleaved, ratio, record, report, spread
from benchmarks.dense import DenseTrainer
from lib.crosscoder.model import CrossCoder
from lib.crosscoder.training import TrainConfig, Trainer

# width of each of two models, features, k; "default" is what notebook 16 finds to recur in the embedded pair
SIZES = {"default": (96, 256, 8), "small": (512, 16_384, 50), "large": (1_536, 32_768, 50)}
BATCH = 1_024
# crosscoders of a run at the default size; as one batched problem their step takes as long (0.94 to 1.06)
SEEDS = 5
OURS = "ours, bfloat16 encoder"
SPARSIFY = "eai-sparsify, fused Adam"


def crosscoder(width: int, n_features: int, k: int) -> CrossCoder:
    return CrossCoder((width, width), n_features, k=k)


def batches(width: int, n: int = 4) -> list[torch.Tensor]:
    """[B, model, d] each."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(BATCH, 2, width, generator=generator) for _ in range(n)]


class NoStore(SimpleNamespace):
    """What a trainer asks of a store before it reads."""

    def __len__(self) -> int:
        return BATCH


class Ours:
    """Steps of ``lib.crosscoder.training.Trainer``, on batches that are in memory."""

    def __init__(
        self, width: int, n_features: int, k: int, precision: str, batch: int = BATCH, device="cpu", **options
    ):
        models = ("base", "distilled")
        store = NoStore(
            models=models,
            widths=dict.fromkeys(models, width),
            scales=dict.fromkeys(models, 1.0),
            means={m: torch.zeros(width) for m in models},
            fingerprint="none",
            count=lambda split: BATCH,
        )
        self.trainer = Trainer(
            store,
            TrainConfig(
                n_features, k=k, tokens=10**9, batch_size=batch, rate=1e-4, precision=precision, **options
            ),
            device,
        )

    def step(self, x: torch.Tensor) -> torch.Tensor:
        return self.trainer.train_step(list(x.unbind(1)))


class Several:
    """A step of several trainers of the same kind."""

    def __init__(self, trainers: list):
        self.trainers = trainers

    def step(self, x: torch.Tensor) -> None:
        for trainer in self.trainers:
            trainer.step(x)


def ways(size: str, peers: bool) -> dict:
    """Everything that is timed, by name. At the large size only what is recorded: each takes 3 GB or more."""
    start = crosscoder(*SIZES[size])
    if size == "default":
        make = {
            "dense": lambda: DenseTrainer(start),
            "dense, fused Adam": lambda: DenseTrainer(start, fused=True),
            "ours, float32": lambda: Ours(*SIZES[size], "float32"),
        }
        return {name: Several([one() for _ in range(SEEDS)]) for name, one in make.items()}
    found = {"dense": DenseTrainer(start), OURS: Ours(*SIZES[size], "bfloat16")}
    if size != "large":
        found["ours, float32"] = Ours(*SIZES[size], "float32")
        found["dense, fused Adam"] = DenseTrainer(start, fused=True)
        found["dense, fused Adam, bfloat16 autocast"] = DenseTrainer(start, fused=True, bfloat16=True)
    if peers:
        from benchmarks.sparsify import SparsifyTrainer

        found[SPARSIFY] = SparsifyTrainer(start)
        found[f"{SPARSIFY}, bfloat16 autocast"] = SparsifyTrainer(start, bfloat16=True)
    return found


def measure(size: str, rounds: int, peers: bool) -> None:
    width, n_features, k = SIZES[size]
    pool, trainers, turn = batches(width), ways(size, peers and size == "small"), {}

    def step(name: str):
        turn[name] = turn.get(name, -1) + 1
        return trainers[name].step(pool[turn[name] % len(pool)])

    seconds = interleaved({name: lambda name=name: step(name) for name in trainers}, rounds, warmup=2)
    of = f" of each of {SEEDS} crosscoders" if size == "default" else ""
    title = f"A training step{of}, D = 2 x {width}, F = {n_features:,}, k = {k}, B = {BATCH}"
    report(title, seconds, "dense")
    best = "ours, float32" if size == "default" else OURS  # as it is trained at this size
    record(**{f"step_vs_dense_{size}": ratio(seconds, "dense", best)})
    if size == "small":
        record(
            step_vs_dense_tuned_small=ratio(seconds, "dense, fused Adam, bfloat16 autocast", OURS),
            step_vs_dense_equal_small=ratio(seconds, "dense, fused Adam", "ours, float32"),
        )
    if SPARSIFY in seconds:
        record(
            step_vs_sparsify_small=ratio(seconds, SPARSIFY, OURS),
            step_vs_sparsify_autocast_small=ratio(seconds, f"{SPARSIFY}, bfloat16 autocast", OURS),
        )


def peak_megabytes(which: str, size: str, answers) -> None:
    """In a process of its own: the most memory that three steps take, weights and optimiser included."""
    pool = batches(SIZES[size][0], 1)
    ours = which == "ours"
    trainer = Ours(*SIZES[size], "bfloat16") if ours else DenseTrainer(crosscoder(*SIZES[size]))
    for _ in range(3):
        trainer.step(pool[0])
    # getrusage would count what the parent held when this process was made
    with open("/proc/self/status") as status:
        answers.put(next(int(line.split()[1]) / 1000 for line in status if line.startswith("VmHWM")))


def memory(size: str, rounds: int) -> None:
    context = multiprocessing.get_context("spawn")
    found: dict[str, list[float]] = {"dense": [], "ours": []}
    for _ in range(rounds):
        for which in found:
            answers = context.SimpleQueue()
            process = context.Process(target=peak_megabytes, args=(which, size, answers))
            process.start()
            process.join()
            found[which].append(answers.get())
    print(
        f"\nPeak memory, {size} size: dense {np.median(found['dense']):,.0f} MB, ours"
        f" {np.median(found['ours']):,.0f} MB"
    )
    record(**{f"memory_vs_dense_{size}": spread(np.array(found["ours"]) / np.array(found["dense"]))})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument(
        "--rounds", type=int, default=9, help="of the small size; the large one takes half as many"
    )
    parser.add_argument(
        "--peers", action="store_true", help="compare with eai-sparsify, which must be installed"
    )
    arguments = parser.parse_args()
    print(f"{torch.get_num_threads()} threads")
    for size in arguments.sizes:
        measure(
            size,
            {"default": 4 * arguments.rounds, "small": arguments.rounds}.get(
                size, (arguments.rounds + 1) // 2
            ),
            arguments.peers,
        )
    if "large" in arguments.sizes:
        memory("large", 3)


if __name__ == "__main__":
    main()
