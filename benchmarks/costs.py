"""What the paper's runs take, on paper: time, memory and disk, from formulas, stated rates, and what was
measured here.

    python -m benchmarks.costs [--write]

Prints the assumptions and the tables of docs/costs.md, and writes them there with ``--write``. Rates are
those of ``CARDS``; a last table is for this machine, whose rates are measured by a product of matrices and by
an Adam step. benchmarks/results.json, where it is, gives what harvesting costs beyond its forward passes.

Per token, with D the widths of all models together, F features, k of them active::

    harvest         2 * parameters of the layers that run + 4 * width * context / 2 a layer for attention, for
                    each model
    sparse step     2 D F + 8 D k     the encoder's product over all features; decoder and gradients over the
                    active ones
    dense step      10 D F            forward, gradient of the code, gradients of both weights: five dense
                    products
    either, a step  Adam passes over 2 D F parameters: reads weight, gradient, both moments, writes all but
                    the gradient
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass

import torch

from lib.runs import write_text
from lib.settings import ROOT

from .common import RESULTS

PAGE = ROOT / "docs" / "costs.md"
TRUE_SIZE = ROOT / "benchmarks" / "true_size.json"
TOKENS, FEATURES, ACTIVE, BATCH, CONTEXT = 400_000_000, 32_768, 50, 4_096, 1_024
ADAM_BYTES = 28  # moved per parameter and step: seven float32
MEMORY_SHARE = 0.8  # of the memory's peak, that Adam reaches
UTILISATION = 0.4  # of the peak in bfloat16, that products reach
CARDS = {"A100": (312e12, 2e12), "H100": (989e12, 3.35e12)}  # peaks: operations and bytes a second
KEPT_BYTES = 16  # held per parameter: weight, gradient, two moments


@dataclass(frozen=True)
class Model:
    """A decoder, as far as its cost goes. Two of them (base and distilled) are harvested at half depth."""

    name: str
    width: int
    layers: int
    ffn: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool

    @property
    def layer_parameters(self) -> int:
        """Query and output projections, keys and values, three matrices of the MLP; norms and biases are
        nothing beside them.
        """
        return (
            2 * self.width**2
            + 2 * self.width * self.width * self.kv_heads // self.heads
            + 3 * self.width * self.ffn
        )

    @property
    def parameters(self) -> int:
        return self.layers * self.layer_parameters + (1 if self.tied else 2) * self.vocabulary * self.width

    @property
    def harvest_flops(self) -> float:
        """Per token, both models, to half depth; each token attends to half of its context on average."""
        return 2 * (self.layers // 2) * (2 * self.layer_parameters + 4 * self.width * CONTEXT / 2)

    @property
    def dictionary(self) -> int:
        """Parameters of the crosscoder over both models: encoder and decoder."""
        return 2 * (2 * self.width) * FEATURES


MODELS = (
    Model("1.5B (Qwen2.5-Math-1.5B)", 1536, 28, 8960, 12, 2, 151_936, True),
    Model("7B (Qwen2.5-Math-7B)", 3584, 28, 18944, 28, 4, 152_064, False),
    Model("14B (Qwen2.5-14B)", 5120, 48, 13824, 40, 8, 152_064, False),
)


@dataclass(frozen=True)
class Rates:
    """What a machine reaches: float operations and bytes of memory traffic per second."""

    name: str
    flops: float
    bytes: float


def sparse_flops(model: Model) -> float:
    """Of a training step, per token."""
    return 2 * (2 * model.width) * FEATURES + 8 * (2 * model.width) * ACTIVE


def dense_flops(model: Model) -> float:
    return 10 * (2 * model.width) * FEATURES


def hours(flops_per_token: float, rates: Rates) -> float:
    return TOKENS * flops_per_token / rates.flops / 3600


def adam_hours(model: Model, rates: Rates) -> float:
    return TOKENS / BATCH * model.dictionary * ADAM_BYTES / rates.bytes / 3600


def training_gigabytes(model: Model) -> float:
    """Weights, gradients and Adam's moments in float32, a batch and its reconstruction, and the features
    before selection.
    """
    return (KEPT_BYTES * model.dictionary + 4 * BATCH * (3 * 2 * model.width + FEATURES)) / 1e9


def models_gigabytes(model: Model) -> float:
    """Both models, whole, in bfloat16."""
    return 2 * 2 * model.parameters / 1e9


def disk_terabytes(model: Model) -> float:
    """Float16 activations of both models."""
    return TOKENS * 2 * model.width * 2 / 1e12


def read_gigabytes_per_second(model: Model, rates: Rates) -> float:
    """What a disk must deliver, or training waits for it."""
    return (
        1000 * disk_terabytes(model) / 3600 / (hours(sparse_flops(model), rates) + adam_hours(model, rates))
    )


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of markdown."""
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


def time_table(rates: Rates, overhead: float) -> list[str]:
    rows = []
    for model in MODELS:
        harvest, adam = overhead * hours(model.harvest_flops, rates), adam_hours(model, rates)
        sparse, dense = hours(sparse_flops(model), rates) + adam, hours(dense_flops(model), rates) + adam
        rows.append(
            [model.name, *map(shown, (harvest, sparse, dense, harvest + sparse, sparse, harvest + sparse))]
        )
    return table(
        [
            "pair",
            "harvest",
            "training, sparse",
            "training, dense",
            "harvest and training",
            "a further crosscoder, stored",
            "a further one, streamed",
        ],
        rows,
    )


def space_table(rates: Rates) -> list[str]:
    rows = []
    for model in MODELS:
        models, training = models_gigabytes(model), training_gigabytes(model)
        rows.append(
            [
                model.name,
                f"{disk_terabytes(model):.1f} TB",
                f"{read_gigabytes_per_second(model, rates):.1f} GB/s",
                "0",
                f"{models:.0f} GB",
                f"{training:.0f} GB",
                f"{models + training:.0f} GB",
            ]
        )
    return table(
        [
            "pair",
            "disk, stored",
            "read while training (A100)",
            "disk, streamed",
            "memory: harvest (both models)",
            "memory: training",
            "memory: streamed (all of it)",
        ],
        rows,
    )


def shown(amount: float) -> str:
    """Hours, or days where they are more than three."""
    return f"{amount:.1f} h" if amount < 72 else f"{amount / 24:,.0f} days"


def measured_rates(size: int = 1536, parameters: int = 20_000_000) -> Rates:
    """This machine's: the best of three products of float32 matrices, and of three Adam steps."""
    a, b = torch.randn(size, size), torch.randn(size, size)
    weight = torch.nn.Parameter(torch.zeros(parameters))
    weight.grad = torch.ones_like(weight)
    adam = torch.optim.Adam([weight], fused=True)
    adam.step()
    flops = 2 * size**3 / min(seconds(lambda: a @ b) for _ in range(4))
    return Rates("this machine", flops, ADAM_BYTES * parameters / min(seconds(adam.step) for _ in range(3)))


def seconds(work) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def card(name: str) -> Rates:
    """What a card of ``CARDS`` is taken to reach."""
    flops, memory = CARDS[name]
    return Rates(name, UTILISATION * flops, MEMORY_SHARE * memory)


def page(here: Rates) -> str:
    measured = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    entry = measured.get("harvest_vs_limit")
    overhead = max(entry["value"], 1.0) if entry else 1.15
    source = (
        "`harvest_vs_limit` of benchmarks/results.json" if entry else "the aim: it has not been measured here"
    )
    peaks = "; ".join(
        f"{name} {flops / 1e12:g} TFLOP/s, {memory / 1e9:,.0f} GB/s"
        for name, (flops, memory) in CARDS.items()
    )
    assumptions = [
        (
            f"{TOKENS / 1e6:.0f} million tokens in windows of {CONTEXT:,}, two models at half depth,"
            f" {FEATURES:,} features, {ACTIVE} active per token, batches of {BATCH:,} tokens, one epoch."
        ),
        (
            f"One card: {UTILISATION:.0%} of its peak in bfloat16, and for Adam {MEMORY_SHARE:.0%} of its"
            f" memory's ({peaks}). Nothing else bounds the time: not the disk, and not the tokenizer."
        ),
        f"A harvest takes {overhead:.2f} times its forward passes ({source}).",
        (
            '"Sparse" is a step with one dense product, the encoder\'s; "dense" is the step of public'
            f" trainers, with five. Both pass over all parameters once, for Adam ({ADAM_BYTES} bytes each)."
        ),
        (
            "Stored: activations are on disk in float16, and serve further crosscoders, seeds, and notebooks"
            " 03 to 05. Streamed: nothing is stored, and every epoch and every further crosscoder runs the"
            " models again."
        ),
        (
            f"Memory for training: weights, gradients and two moments in float32 ({KEPT_BYTES} bytes a"
            " parameter), a batch and its features. Models are whole, in bfloat16, without what a forward"
            " pass needs. Streaming takes 1 GB more for shuffling, in the host's memory."
        ),
    ]
    machine = f"{here.flops / 1e9:.0f} GFLOP/s in float32 and {here.bytes / 1e9:.0f} GB/s, as measured"
    return "\n".join(
        [
            "# What the paper's runs take",
            "",
            (
                "On paper, but for the last section. Written by `python -m benchmarks.costs --write`, whose"
                " docstring has the formulas."
            ),
            "",
            "Assumptions:",
            "",
            *(f"- {line}" for line in assumptions),
            "",
            *(
                line
                for name in CARDS
                for line in (f"## Time, {name}", "", *time_table(card(name), overhead), "")
            ),
            (
                "The harvest can be shared out among any number of jobs ([cluster.md](cluster.md)): its time"
                " is divided by their number."
            ),
            "",
            "## Disk and memory",
            "",
            *space_table(card("A100")),
            "",
            "## Time, the machine that wrote this page",
            "",
            f"With {machine}. This is why there is an embedded pair.",
            "",
            *time_table(here, overhead),
            "",
            *true_size(),
        ]
    )


def true_size() -> list[str]:
    """What ``benchmarks.true_size`` measured, if it did."""
    if not TRUE_SIZE.is_file():
        return []
    found = json.loads(TRUE_SIZE.read_text())
    disk = found["disk_gb"]
    rows = [
        [name, f"{entry['seconds'] / 60:.1f} min", f"{entry['peak_memory_gb']:.1f} GB"]
        for name, entry in found["notebooks"].items()
    ]
    return [
        "## What was run at true size",
        "",
        (
            "Two models of Qwen2.5-1.5B's exact configuration with random weights in bfloat16,"
            f" {found['tokens']:,} tokens, {found['features']:,} features, on {found['machine']['cores']}"
            f" cores of {found['machine']['processor']} (`python -m benchmarks.true_size`). It shows that the"
            " notebooks run at this size, and what they hold in memory; the numbers that they find mean"
            " nothing."
        ),
        "",
        *table(["notebook", "time", "peak memory"], rows),
        "",
        (
            f"Disk: models {disk['models']:.1f} GB, store {1e6 * disk['store'] / found['tokens']:.1f} kB a"
            f" token, crosscoder {disk['crosscoder']:.1f} GB, features {disk['features']:.2f} GB."
        ),
        "",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help=f"write docs/{PAGE.name}")
    options = parser.parse_args()
    text = page(measured_rates())
    print(text)
    if options.write:
        PAGE.parent.mkdir(exist_ok=True)
        write_text(PAGE, text)


if __name__ == "__main__":
    main()
