"""Training a crosscoder on a store of activations: ``train(store, TrainConfig(k=24), folder)``.

Adam with gradient clipping; the learning rate warms up, stays flat, and falls linearly to 0. A run is a
function of (config, store): batches depend on (seed, epoch, position) alone, so that an interrupted run,
resumed, ends with the same weights as an uninterrupted one (for the same number of threads)."""

from __future__ import annotations

import contextlib
import csv
import itertools
import json
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, fields, make_dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ..activations.shuffle import Prefetched
from ..activations.store import MADE_BY, MEMORY
from ..device import tf32, the_device
from ..runs import (
    Progress,
    exclusive,
    fingerprint,
    is_current,
    made_folder,
    write_manifest,
    write_state,
    write_text,
)
from ..settings import NotNegative, Positive, Share, UserError, check, integer, number, parameters
from . import fixed
from .model import (
    LOSS_FORMULAS,
    VARIANTS,
    CrossCoder,
    Forward,
    auxiliary_loss,
    l0_loss,
    sparsity_loss,
    squared_error,
)
from .processes import PER_FEATURE, SINGLE_PROCESS, SingleProcess

LOG_LINES = 100  # lines of log.jsonl in a run; checkpoints are written at lines only
# of the run: JumpReLU selects as BatchTopK until then, to find where its thresholds begin
THRESHOLDS_BEGIN = 0.2
MINUTE = 60.0  # seconds between two lines on the run's health
# when the health of a run is doubted: after so many steps, by waiting, FVE, dead features, crowded selections
SETTLED, STARVING, LEAST_FVE, MOST_DEAD, SHORT = 500, 0.5, 0.3, 0.5, 0.01
SAVING = 0.02  # share of the time that checkpoints may take: those of gigabytes come less often
CSV = "TRAINING_CSV"  # environment variable: a file to which the log goes, line by line
THRESHOLD_SHARE = 0.02  # of the run: horizon of the running average that becomes the inference threshold


@parameters
class TrainConfig:
    """All that decides the weights, beside the store. A share is one of the tokens of the run; ``tokens``
    counts tokens shown: beyond the store's number, epochs repeat it in new orders."""

    n_features: Positive = 1024
    variant: Literal[VARIANTS] = "batchtopk"
    k: Positive = 24  # batchtopk, jumprelu: mean number of features per token; topk: their number
    tokens: Positive = 2_000_000
    batch_size: Positive = 1024  # tokens
    rate: NotNegative = 3e-3  # Adam's peak learning rate
    warmup: Share = 0.02  # share: learning rate rises linearly
    decay: Share = 0.3  # share: learning rate falls linearly to 0
    clip: NotNegative = 1.0  # of the gradient's global norm; 0: never
    l1: NotNegative = 2.0  # l1: lambda, at its full value
    l1_warmup: Share = 0.05  # share: lambda rises linearly
    aux: NotNegative = 0.5  # all but l1: alpha, weight of the auxiliary loss
    aux_k: Positive = 64  # dead features per token that the auxiliary loss uses
    dead_after: Share = 0.01  # share without firing after which a feature counts as dead
    # of the encoder's product (l1: of all products): bfloat16 is faster on processors that have it
    precision: Literal["float32", "bfloat16"] = "float32"
    # bytes for shuffling: part of what decides the order of tokens in a store that is larger
    memory: Positive = MEMORY
    seed: int = 0
    # jumprelu: lambda, weight of (L0 / k - 1)^2 in units of D, which is about the mean squared norm of x
    l0: NotNegative = 1.0
    # jumprelu: h, width of the kernel about a threshold, as a share of it: below 2, or entries of no strength
    # would be within its reach
    bandwidth: number(0.01, 1.9) = 0.5
    dedicated: Share = 0.0  # share of the dictionary that is reserved for each model

    def __post_init__(self) -> None:
        if self.variant != "l1":
            check("k", self.k, integer(1, self.n_features))

    @property
    def loss_formula(self) -> str:
        """The loss of a batch, in words of ``lib.crosscoder.model``."""
        return LOSS_FORMULAS[self.variant]

    def learning_rate(self, done: float) -> float:
        """Learning rate when the share ``done`` of the run is over."""
        rise = done / self.warmup if self.warmup else 1.0
        fall = (1 - done) / self.decay if self.decay else 1.0
        return self.rate * max(0.0, min(1.0, rise, fall))

    def sparsity_weight(self, done: float) -> float:
        """lambda when the share ``done`` of the run is over."""
        return self.l1 * min(1.0, done / self.l1_warmup if self.l1_warmup else 1.0)

    def fingerprint(self, store) -> str:
        """Of a run on this store. An option that does nothing here does not count."""
        idle = {"l0", "bandwidth"} if self.variant != "jumprelu" else set()
        idle |= set() if self.dedicated else {"dedicated"}
        names = [f.name for f in fields(self) if f.name not in idle]
        used = make_dataclass("TrainConfig", names)(*(getattr(self, name) for name in names))
        return fingerprint(used, store.fingerprint)


def train(
    store,
    config: TrainConfig,
    folder: Path,
    progress=None,
    device: str | None = None,
    checkpoint_seconds: float = 30,
    together: SingleProcess = SINGLE_PROCESS,
    trainer_class: type[Trainer] | None = None,
) -> CrossCoder:
    """Train on the store's "train" split, or resume, or load what was made from the same config and store.

    ``folder`` receives crosscoder.safetensors, config.json, log.jsonl and manifest.json; while training, a
    checkpoint named after the fingerprint. ``progress`` has ``update(done_tokens, note)`` and ``close()``.
    ``device`` None is a GPU if there is one. At least ``checkpoint_seconds`` lie between two checkpoints, and
    so many that saving takes ``SAVING`` of the time. Every minute a line says how the run is, and what is
    wrong with it (``doubts``); TRAINING_CSV names a file that gets the log as it grows. ``together``: the
    processes that train (``lib.crosscoder.processes``); all see the same folder, in which rank 0 writes what
    a single process would. ``trainer_class``: a ``Trainer`` that does something else; give it a folder of its
    own. UserError for activations or a loss that are not finite, and a store that repeats tokens early."""
    device = the_device(device)
    folder, fingerprint, first = Path(folder), config.fingerprint(store), together.rank == 0
    if is_current(folder, fingerprint):
        return CrossCoder.load(folder)
    with exclusive(folder, "training a crosscoder") if first else contextlib.nullcontext():
        checkpoint = checkpoint_file(made_folder(folder), fingerprint)
        trainer = (trainer_class or Trainer)(store, config, device, together)
        if checkpoint.is_file():
            partial = len(trainer.last_fired) < config.n_features  # only parts of the file are copied
            trainer.restore(torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=partial))
        together.check_same(trainer.shown, f"tokens shown, according to the checkpoint in {folder.name}")
        progress = progress or Progress("tokens trained on", config.tokens)
        saved, pause = time.monotonic(), checkpoint_seconds

        def tell(line: dict) -> None:
            note = [f"FVE {line['fve']:.3f}, dead {line['dead']:.1%}"]
            note += doubts(line, config) if time.monotonic() - began >= MINUTE else []
            progress.update(min(line["tokens"], config.tokens), "; ".join(note))

        began, each_minute = time.monotonic(), tell if together.size == 1 else None
        try:
            with tf32(config.precision == "bfloat16"):
                while trainer.shown < config.tokens:
                    line = trainer.run_until(trainer.shown + config.tokens / LOG_LINES, each_minute)
                    tell(line)
                    if first and CSV in os.environ:
                        _write_row(Path(os.environ[CSV]), {"folder": folder.name, **line})
                    due = together.agreed(time.monotonic() - saved >= pause)
                    if due and trainer.shown < config.tokens:
                        saving = time.monotonic()
                        state = trainer.state()  # from all processes
                        if first:
                            write_state(checkpoint, state)
                        saved = time.monotonic()
                        pause = max(checkpoint_seconds, (saved - saving) / SAVING)
        finally:
            trainer.close()
        progress.close()
        crosscoder = trainer.finish()
        if first:
            crosscoder.save(folder)
            write_text(folder / "log.jsonl", "".join(json.dumps(line) + "\n" for line in trainer.log))
            info = {"store": store.fingerprint, "config": asdict(config), "processes": together.size}
            write_manifest(folder, fingerprint, **info)
            checkpoint.unlink(missing_ok=True)
        together.agreed(True)  # the files are there
        return crosscoder if first else CrossCoder.load(folder)


def checkpoint_file(folder: Path, fingerprint: str) -> Path:
    """The checkpoint of an unfinished run with this fingerprint."""
    return Path(folder) / f"checkpoint-{fingerprint}.pt"


def read_log(folder: Path) -> list[dict]:
    """The lines of log.jsonl; their names are in ``Trainer._line``."""
    lines = (Path(folder) / "log.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def _write_row(file: Path, line: dict) -> None:
    """Append a line to a CSV file, which gets its names first."""
    new = not file.is_file()
    with file.open("a", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, line)
        if new:
            writer.writeheader()
        writer.writerow(line)


_PLACE = ("step", "shown", "epoch", "position", "log")  # where a Trainer is


class Trainer:
    """Weights, optimiser and position of a run."""

    def __init__(
        self, store, config: TrainConfig, device: str = "cpu", together: SingleProcess = SINGLE_PROCESS
    ):
        self.store, self.config, self.device, self.together = store, config, device, together
        if store.count("train") == 0:
            raise UserError(f"the store has no training tokens: harvest more documents (notebook {MADE_BY})")
        widths, scales = ([sizes[name] for name in store.models] for sizes in (store.widths, store.scales))
        choices = config.variant, config.k, scales, config.seed, config.dedicated
        self.crosscoder = CrossCoder(widths, config.n_features, store.models, *choices)
        self._each_feature(together.part_of)
        self.crosscoder.to(device).centre([store.means[name].to(device) for name in store.models])
        self.optimizer = _optimizer(self.crosscoder, config)
        self.step = self.shown = self.epoch = self.position = 0  # position: batches done in this epoch
        # tokens shown when a feature last fired
        self.last_fired = torch.zeros(len(self.crosscoder.b_enc), dtype=torch.int64, device=device)
        self.seen = torch.zeros(len(store), dtype=torch.bool)  # rows of the store that were shown
        self.log: list[dict] = []
        self.batches: Prefetched | None = None  # what comes next, made by a thread beside training
        # smallest strength kept in the last batch, where the next selection begins to look; 0: none is known
        self.floor: float | Tensor = 0.0
        # steps have shapes known beforehand (``fixed``), and nothing asks the device before the log does
        alone = together.size == 1 and config.variant != "jumprelu"
        self.known = alone and fixed.wanted_here(self.last_fired)
        # where ``known``: the features that were dead at the last line of the log
        self.among: Tensor | None = self.last_fired[:0] if self.known else None
        self.short = torch.zeros((), dtype=torch.int64, device=device)  # steps that passed candidates over
        self.odd = torch.full((len(widths),), -1, device=device)  # a row with activations that are not finite
        self._sent: deque = deque()  # batches on their way to the device
        self.waited = 0.0  # seconds spent waiting for batches, without those of ``batches``
        self.buffers: dict = {}  # memory for the products and gradients of a step

    def _next_batch(self) -> tuple[np.ndarray, list[Tensor]]:
        """Row numbers [B] and RAW activations of the next batch; begins a new epoch where one is over."""
        if self.batches is None:
            place = self.epoch, self.position
            # in the store's dtype: they are widened over there
            raw = not self.device.startswith("cpu") and getattr(self.store, "raw_batches", False)
            self.batches = Prefetched(_batches(self.store, self.config, *place, self.together.part, raw))
        epoch, rows, acts = next(self.batches)
        if epoch != self.epoch:
            self.check_distinct()
            self.epoch, self.position = epoch, 0
        self.position += 1
        return rows, acts

    def close(self) -> None:
        """End the thread that reads ahead."""
        if self.batches is not None:
            self.waited += self.batches.waited
            self.batches.close()
            self.batches = None

    def run_until(self, tokens: float, tell: Callable[[dict], None] | None = None) -> dict:
        """Train until ``tokens`` have been shown; returns and logs a line of averages since the last one.
        Every minute ``tell`` gets such a line, which is not logged."""
        began, waited, before, means = time.monotonic(), self.waiting(), self.shown, []
        told = began
        if self.known:
            self.among = self._dead().nonzero().squeeze(-1)

        def line() -> dict:
            seconds = time.monotonic() - began
            speed, waiting = (self.shown - before) / seconds, (self.waiting() - waited) / seconds
            return self._line(sum(means) / len(means), acts, speed, waiting)

        while self.shown < min(tokens, self.config.tokens):
            acts = self._received(*self._next_batch())
            means.append(self.train_step(acts))
            if tell and time.monotonic() - told >= MINUTE:
                tell(line())
                told = time.monotonic()
        self.log.append(line())
        return self.log[-1]

    def _received(self, rows: np.ndarray, acts: list[Tensor]) -> list[Tensor]:
        """A batch on the device. UserError for activations that are not finite: at once on the CPU; a device
        is asked by the next line of the log."""
        self.seen[torch.as_tensor(rows)] = True
        if self.device.startswith("cpu"):
            for name, act in zip(self.store.models, acts):
                if not torch.isfinite(act.sum()):
                    raise _not_finite(name, rows[(~torch.isfinite(act).all(-1)).numpy()][:3])
            return acts
        there = [act.to(self.device, non_blocking=True) for act in acts]
        numbers = torch.from_numpy(rows).to(self.device, non_blocking=True)
        for m, act in enumerate(there):
            bad = ~torch.isfinite(act.sum(-1, dtype=torch.float32))
            self.odd[m] = torch.where(bad, numbers, -1).amax().clamp(min=self.odd[m])
        if there[0].is_cuda:  # what is read from must not be used again before it has been read
            arrived = torch.cuda.Event()
            arrived.record()
            self._sent.append((arrived, acts))
            if len(self._sent) > 2:
                self._sent.popleft()[0].synchronize()
        return there

    def waiting(self) -> float:
        """Seconds that training has spent waiting for batches."""
        return self.waited + (self.batches.waited if self.batches else 0.0)

    def train_step(self, acts: list[Tensor]) -> Tensor:
        """One batch. Returns [5] on the device: loss, error, extra term, L0, gradient norm."""
        config, crosscoder, together = self.config, self.crosscoder, self.together
        done, tokens = self.shown / config.tokens, together.rows(len(acts[0]))
        aux_k = config.aux_k if config.variant != "l1" and config.aux else 0
        # JumpReLU: its thresholds all begin where BatchTopK's lies after the first steps, in which strengths
        # grow many times over
        begins = config.variant == "jumprelu" and done < THRESHOLDS_BEGIN
        options = {"wanted": config.k * tokens, "buffers": self.buffers}
        options |= {"hint": self.floor, "among": self.among}
        if config.variant == "jumprelu" and not begins:
            options["bandwidth"] = config.bandwidth
        out = together.forward(crosscoder, acts, self._dead(), aux_k, config.precision, **options)
        out.tokens = tokens
        loss, error, extra = self.losses(out, done)
        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate(done)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        crosscoder.mask_gradients()
        norm = together.gradient_norm(crosscoder).detach()
        # The fused Adam divides gradients by this as it reads them: clipping costs no pass of its own.
        self.optimizer.grad_scale = (norm / config.clip).clamp(min=1.0) if config.clip else None
        self.optimizer.step()
        with torch.no_grad():
            self.shown += tokens
            self.last_fired.masked_fill_(together.any_row(out.code.fired()), self.shown)
            self.floor = out.code.floor if self.known else float(out.code.floor)
            if begins:
                crosscoder.log_theta.fill_(float(out.code.floor.clamp(min=1e-6).log()))
            elif config.variant == "batchtopk":
                weight = 1.0 if self.step == 0 else min(1.0, tokens / (THRESHOLD_SHARE * config.tokens))
                crosscoder.threshold.lerp_(out.code.floor, weight)
        self.step += 1
        if self.known and out.code.short is not None:
            self.short += out.code.short
        l0 = out.code.entries / tokens
        l0 = together.over_features(torch.as_tensor(l0, dtype=torch.float32, device=norm.device))
        means = together.over_rows(torch.stack([loss.detach(), error.detach(), extra.detach(), l0]))
        return torch.cat([means, norm[None]])

    def losses(self, out: Forward, done: float) -> tuple[Tensor, Tensor, Tensor]:
        """(loss, squared error, unweighted second term) of a batch, when the share ``done`` of the run is
        over: see ``crosscoder.LOSS_FORMULAS``."""
        crosscoder, config, error = self.crosscoder, self.config, squared_error(out)
        if config.variant == "l1":
            extra, weight = sparsity_loss(crosscoder, out), config.sparsity_weight(done)
        else:
            extra, weight = auxiliary_loss(out), config.aux
        loss = error + weight * extra
        if config.variant == "jumprelu":
            loss = loss + config.l0 * sum(crosscoder.widths) * l0_loss(crosscoder, out, config.bandwidth)
        return loss, error, extra

    def _dead(self) -> Tensor:
        """Which of the features kept here are dead."""
        return self.shown - self.last_fired > self.config.dead_after * self.config.tokens

    @torch.no_grad()
    def _line(self, means: Tensor, acts: list[Tensor], speed: float, waiting: float) -> dict:
        """A line of the log; UserError for what is not finite."""
        for name, row in zip(self.store.models, self.odd.tolist()):
            if row >= 0:
                raise _not_finite(name, [row])
        loss, error, extra, l0, norm = means.tolist()
        if not math.isfinite(loss):
            raise UserError(
                f"the loss is {loss} after {self.shown:,} tokens: lower the learning rate"
                f" ({self.config.rate})"
            )
        crosscoder, together, variant = self.crosscoder, self.together, self.config.variant
        spread = (crosscoder.scaled(acts) - crosscoder.means).square().sum()
        at_threshold = together.over_features((crosscoder.encode(acts) > 0).sum().float())
        sums = torch.stack([spread.new_tensor(len(acts[0])), spread, at_threshold])
        tokens, spread, at_threshold = together.over_rows(sums).tolist()
        dead = together.over_features(self._dead().float().sum()) / self.config.n_features
        thresholds = crosscoder.log_theta.exp() if variant == "jumprelu" else crosscoder.threshold
        line = {
            "step": self.step,
            "tokens": self.shown,
            "epoch": self.epoch,
            "rate": self.config.learning_rate(self.shown / self.config.tokens),
            "loss": loss,
            "squared_error": error,
            "sparsity" if variant == "l1" else "auxiliary": extra,
            "fve": 1 - error * tokens / spread,
            "l0": l0,
            "l0_at_threshold": at_threshold / tokens,
            "threshold": float(thresholds.mean()),
            "dead": float(dead),
            "gradient_norm": norm,
            "tokens_per_second": round(speed),
            "waiting": round(waiting, 4),
        }
        return line | ({"short": int(self.short)} if self.known else {})

    def check_distinct(self) -> int:
        """Distinct tokens seen so far; UserError if one came twice in an epoch, or an epoch left one out."""
        self.seen = self.together.any_row(self.seen)
        count = self.store.count("train")  # a stream finds tokens to leave out as it goes
        distinct, expected = int(self.seen.sum()), min(self.shown, count)
        if distinct != expected:
            raise UserError(
                f"{self.shown:,} tokens were shown, but only {distinct:,} distinct ones of the store's"
                f" {count:,}: it repeats itself before it has shown all (expected {expected:,})"
            )
        return distinct

    def finish(self) -> CrossCoder:
        """The trained crosscoder, for use without gradients."""
        self.crosscoder.seen.copy_(torch.tensor([self.shown, self.check_distinct()]))
        self._each_feature(self.together.joined)
        return self.crosscoder.cpu().eval().requires_grad_(False)

    def state(self) -> dict:
        """All that decides how the run goes on, of all processes, on rank 0."""
        self.seen = self.together.any_row(self.seen)
        states, joined = (self.crosscoder.state_dict(), self.optimizer.state_dict()), self.together.joined
        state = dict(zip(("crosscoder", "optimizer"), self._states(*states, joined)))
        state |= {"last_fired": joined(self.last_fired)} | {name: getattr(self, name) for name in _PLACE}
        return state | {"seen": torch.from_numpy(np.packbits(self.seen.numpy()))}

    def restore(self, state: dict) -> None:
        crosscoder, optimizer = self._states(state["crosscoder"], state["optimizer"], self.together.part_of)
        self.crosscoder.load_state_dict(crosscoder)
        self.optimizer.load_state_dict(optimizer)
        for name in _PLACE:
            setattr(self, name, state[name])
        self.last_fired = self.together.part_of(state["last_fired"]).clone().to(self.device)
        self.seen = torch.from_numpy(np.unpackbits(state["seen"].cpu().numpy(), count=len(self.seen))).bool()
        self.close()  # and go on reading from there

    @torch.no_grad()
    def _each_feature(self, change: Callable[[Tensor], Tensor]) -> None:
        """Put in place of every parameter [F, ...] what ``change`` makes of it."""
        for name, parameter in list(self.crosscoder.named_parameters()):
            if name in PER_FEATURE:
                setattr(self.crosscoder, name, torch.nn.Parameter(change(parameter.data)))
        self.crosscoder.owner = change(self.crosscoder.owner)

    def _states(
        self, crosscoder: dict, optimizer: dict, change: Callable[[Tensor], Tensor]
    ) -> tuple[dict, dict]:
        """State dicts of crosscoder and optimiser with the same done to whatever is [F, ...] in them."""
        names = [name for name, _ in self.crosscoder.named_parameters()]  # the optimiser numbers them

        def changed(name: str, value: Tensor) -> Tensor:
            return change(value) if name in PER_FEATURE and value.dim() else value.clone()

        moments = {
            number: {key: changed(names[number], value) for key, value in own.items()}
            for number, own in optimizer["state"].items()
        }
        weights = {name: changed(name, value) for name, value in crosscoder.items()}
        return weights, {**optimizer, "state": moments}


def _batches(
    store, config: TrainConfig, epoch: int, position: int, part: tuple[int, int], raw: bool
) -> Iterator[tuple[int, np.ndarray, list[Tensor]]]:
    """(epoch, row numbers, activations) without end. It knows no trainer: its thread must keep none alive."""
    for current in itertools.count(epoch):
        start = position if current == epoch else 0
        options = config.batch_size, config.seed, current, start, config.memory, part
        reader = store.reader("train", *options, **({"raw": True} if raw else {}))
        for rows, acts in reader:
            yield current, rows, acts


def _not_finite(name: str, rows) -> UserError:
    return UserError(
        f"activations of {name} are not finite (store rows {', '.join(map(str, rows))}, ...): "
        f"harvest again, in a wider dtype (notebook {MADE_BY})"
    )


def doubts(line: dict, config: TrainConfig) -> list[str]:
    """What a line of the log says against going on, once the learning rate has risen, in sentences."""
    found = []
    if line["waiting"] > STARVING:
        found.append(f"{line['waiting']:.0%} of the time training waits for activations")
    if line["step"] < SETTLED or line["tokens"] < config.warmup * config.tokens:
        return found
    if line["fve"] < LEAST_FVE:
        found.append(f"FVE is {line['fve']:.2f} after {line['step']:,} steps: try another learning rate")
    if line["dead"] > MOST_DEAD:
        found.append(f"{line['dead']:.0%} of the features are dead: fewer features, or a lower learning rate")
    if line.get("short", 0) > SHORT * line["step"]:
        found.append(f"{line['short']:,} steps had no room for all candidates: the threshold moves too fast")
    return found


def _optimizer(crosscoder: CrossCoder, config: TrainConfig) -> torch.optim.Optimizer:
    """Adam (0.9, 0.999), fused: several times faster than the default on a CPU.

    JumpReLU's thresholds forget sooner (0.9, 0.99): the first gradients of the penalty are many times the
    later ones, and a second moment that kept them for 1,000 steps would hold L0 where it happened to be."""
    groups = [{"params": [p for name, p in crosscoder.named_parameters() if name != "log_theta"]}]
    if crosscoder.variant == "jumprelu":
        # last, as among the crosscoder's parameters
        groups.append({"params": [crosscoder.log_theta], "betas": (0.9, 0.99)})
    return torch.optim.Adam(groups, lr=config.rate, betas=(0.9, 0.999), fused=True)
