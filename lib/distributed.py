"""Training one crosscoder on several processes or machines, started by torchrun or from a notebook.

    torchrun --nproc_per_node 2 -m lib.distributed --processes 2 --store STORE --folder FOLDER --n-features 32768 --k 50 ...
    crosscoder = launch(2, store, config, folder)              # in a notebook

The result is that of a single process, but for the rounding of sums: a batch of ``batch_size`` tokens is the
same batch, shared out.

- ``Rows``: every process keeps the whole crosscoder and takes a part of each batch; gradients are added up
  (data parallel).
- ``Features``: every process keeps a part of the dictionary, with its optimiser state, and takes all of each
  batch; what the parts
  reconstruct is added up. For a dictionary that outgrows a device. BatchTopK only.

In both, BatchTopK's selection, dead features, the auxiliary loss's choice among them, and the clipped norm
are over the whole batch and dictionary. Checkpoints are written by rank 0 as a single process would write
them, so that a run can go on with another number of processes, or the other way of sharing. The folder must
be one that all processes see.

If a process ends, so do all others, with a sentence; the same command goes on from the last checkpoint.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from .crosscoder import PRECISIONS, CrossCoder, Forward, forward
from .results import ROOT, UserError, check
from .sparse import Code, Encoded, encode, largest_of_rows, reconstruct, select_batch, select_rows
from .store import Store
from .training import PER_FEATURE, Alone, TrainConfig, checkpoint_file, train

TIMEOUT = 600  # seconds that a process waits for the others
SHARE = ("rows", "features")


class Lost(UserError):
    """Another process of the training has ended, or does not answer."""


def _collective(function):
    """What the backend raises when a process is missing, as ``Lost``."""

    @functools.wraps(function)
    def wrapped(*args):
        try:
            return function(*args)
        except RuntimeError as error:  # gloo's and NCCL's errors are of this class
            raise Lost(
                "another process of this training ended or does not answer"
                f" ({str(error).splitlines()[0][:120]})"
            ) from error

    return wrapped


class Together(Alone):
    """What rows and features have in common. The process group is made already; tensors are on ``device``."""

    def __init__(self, device: torch.device | str = "cpu"):
        self.rank, self.size, self.device = dist.get_rank(), dist.get_world_size(), torch.device(device)

    @_collective
    def add(self, partial: Tensor) -> Tensor:
        """The sum over all processes, the same in each; written into ``partial``."""
        dist.all_reduce(partial)
        return partial

    @_collective
    def gather(self, own: Tensor) -> Tensor:
        """The 1-d tensors of all processes, of any lengths, one after the other; the same in each."""
        lengths = torch.zeros(self.size, dtype=torch.int64, device=own.device)
        lengths[self.rank] = len(own)
        dist.all_reduce(lengths)
        lengths = lengths.tolist()
        padded = own.new_zeros(max(*lengths, 1))
        padded[: len(own)] = own
        parts = [torch.empty_like(padded) for _ in lengths]
        dist.all_gather(parts, padded)
        return torch.cat([part[:length] for part, length in zip(parts, lengths)])

    def agreed(self, flag: bool) -> bool:
        return bool(self.add(torch.tensor(int(flag and self.rank == 0), device=self.device)))

    def check_same(self, value: int, what: str) -> None:
        values = self.gather(torch.tensor([value], device=self.device)).tolist()
        if len(set(values)) > 1:
            raise UserError(
                f"processes differ in {what} ({', '.join(map(str, values))}): all of them must see the same"
                " folders"
            )


class Rows(Together):
    """Every process has all features, and rows rank, rank + size, ... of every batch."""

    def __init__(self, device: torch.device | str = "cpu"):
        super().__init__(device)
        self.part = (self.rank, self.size)

    def over_rows(self, partial: Tensor) -> Tensor:
        return self.add(partial.clone())

    def rows(self, own: int) -> int:
        return int(self.add(torch.tensor(own, device=self.device)))

    def any_row(self, flags: Tensor) -> Tensor:
        return self._any(flags.to(self.device, torch.uint8, copy=True)).to(flags.device, torch.bool)

    @_collective
    def _any(self, flags: Tensor) -> Tensor:
        dist.all_reduce(flags, dist.ReduceOp.MAX)
        return flags

    def forward(self, crosscoder: CrossCoder, acts: list[Tensor], *args, **options) -> Forward:
        if len(acts[0]):
            return forward(crosscoder, acts, *args, **options, gather=self.gather)
        # The last batch of an epoch had fewer rows than there are processes. The others wait for an answer,
        # which is: nothing.
        stand_in = crosscoder.split(crosscoder.means[None], raw=True)
        out = forward(crosscoder, stand_in, *args, **options, gather=lambda own: self.gather(own[:0]))
        nothing = dataclasses.replace(
            out.code.where(torch.zeros_like(out.code.features, dtype=torch.bool), out.code.floor),
            indptr=out.code.indptr[:1],
        )
        return Forward(
            out.x[:0],
            nothing,
            out.f[:0],
            out.x_hat[:0],
            None if out.aux_hat is None else out.aux_hat[:0],
            near=None if out.near is None else out.near * 0,
            entries=out.entries,
        )

    def gradient_norm(self, crosscoder: CrossCoder) -> Tensor:
        for parameter in crosscoder.parameters():
            self.add(parameter.grad)
        return super().gradient_norm(crosscoder)


class Features(Together):
    """Every process has all rows of every batch, and about F / size neighbouring features: its rows of W_enc,
    b_enc and W_dec.

    b_dec is in every process, with the same gradient, since all compute the same loss from the same sums.
    """

    def __init__(self, n_features: int, device: torch.device | str = "cpu"):
        super().__init__(device)
        self.bounds = [n_features * i // self.size for i in range(self.size + 1)]
        if n_features < self.size:
            raise UserError(
                f"n_features is {n_features}: there must be at least one for each of the {self.size}"
                " processes"
            )

    def over_features(self, partial: Tensor) -> Tensor:
        return self.add(partial.clone())

    def forward(
        self,
        crosscoder: CrossCoder,
        acts: list[Tensor],
        dead: Tensor,
        aux_k: int,
        precision: str,
        wanted: int,
        hint: float,
        buffers: dict,
    ) -> Forward:
        x, weights = crosscoder.scaled(acts), (crosscoder.W_enc, crosscoder.b_enc, crosscoder.W_dec)
        encoded = encode(
            x, crosscoder.W_enc, crosscoder.b_enc, PRECISIONS[precision], crosscoder.means, buffers
        )
        with torch.no_grad():
            per_unit = crosscoder.strength_per_unit()
        code = select_batch(encoded, per_unit, wanted, hint, self.gather)
        if aux_k == 0 or not self.over_features(dead.any().int()):
            f, sums = reconstruct(*weights, x, code, buffers)
            return Forward(x, code, f, _Sum.apply(sums, self) + crosscoder.b_dec)
        both = code.above(self.strongest(encoded, per_unit, aux_k, dead.nonzero().squeeze(-1)))
        f, sums = reconstruct(*weights, torch.cat([x, x]), both, buffers)
        sums = _Sum.apply(sums, self)
        return Forward(x, code, f[: len(code.features)], sums[: len(x)] + crosscoder.b_dec, sums[len(x) :])

    @torch.no_grad()
    def strongest(self, encoded: Encoded, per_unit: Tensor, k: int, among: Tensor) -> Code:
        """``select_rows`` over the features of all processes: the entries that are here.

        The k largest of all are among the k largest of each part: these are compared, [B, k] strengths a
        process.
        """
        best = per_unit.new_zeros(len(encoded), k)
        if len(among):
            code = select_rows(encoded, per_unit, k, among)
            strength = code.values * per_unit[code.features]
            best = largest_of_rows(code, strength, k)
        else:
            strength = per_unit[:0]
            code = Code(
                among.new_zeros(len(encoded) + 1), among, strength, per_unit.new_zeros(()), len(per_unit)
            )
        everyone = self.gather(best.flatten()).view(self.size, len(encoded), k)
        floors = everyone.transpose(0, 1).flatten(1).topk(k, dim=-1, sorted=False).values.amin(-1)
        return code.where(strength >= floors[code.rows], floors.mean())

    def gradient_norm(self, crosscoder: CrossCoder) -> Tensor:
        own = torch.nn.utils.get_total_norm(
            [p.grad for name, p in crosscoder.named_parameters() if name in PER_FEATURE]
        )
        return (self.over_features(own.square()) + crosscoder.b_dec.grad.square().sum()).sqrt()

    def own(self, whole: Tensor) -> Tensor:
        return whole[self.bounds[self.rank] : self.bounds[self.rank + 1]].clone()

    @_collective
    def whole(self, own: Tensor) -> Tensor:
        """In the memory of rank 0's host, where it comes part by part: no device has to hold it."""
        own = own.contiguous()
        if self.rank:
            dist.send(own, 0)
            return own.cpu()
        whole = torch.empty(self.bounds[-1], *own.shape[1:], dtype=own.dtype)
        whole[: self.bounds[1]] = own
        for rank in range(1, self.size):
            part = own.new_empty(self.bounds[rank + 1] - self.bounds[rank], *own.shape[1:])
            dist.recv(part, rank)
            whole[self.bounds[rank] : self.bounds[rank + 1]] = part
        return whole


class _Sum(torch.autograd.Function):
    """The sum of all processes' tensors, from which all compute one and the same loss: its gradient is each
    tensor's own.
    """

    @staticmethod
    def forward(ctx, partial: Tensor, together: Together) -> Tensor:
        return together.add(partial.clone())

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad, None


# --- one process's work -------------------------------------------------------------------------------------


def train_here(
    store: str | Path,
    config: TrainConfig,
    folder: str | Path,
    processes: int,
    share: str = "rows",
    cpu: bool = False,
    timeout: float = TIMEOUT,
    checkpoint_seconds: float = 30,
) -> CrossCoder:
    """This process's part of a training; called in each of ``processes``, which torchrun or the notebook
    launcher has started.

    ``share``: "rows" or "features". ``timeout``: seconds to wait for another process. Raises UserError if
    there are more or fewer processes, and if one of them ends.
    """
    from accelerate import PartialState  # seconds to import, and only needed here

    check("processes", processes, int, low=1)
    check("share", share, choices=SHARE)
    if share == "features" and config.variant != "batchtopk":
        raise UserError(
            f"variant is {config.variant!r}: features can be shared out with batchtopk only; share rows"
            " (--share rows)"
        )
    asked = int(os.environ.get("WORLD_SIZE", 1))
    if asked != processes:
        raise UserError(
            f"{processes} processes were asked for, {asked} started: start them with torchrun"
            f" --nproc_per_node {processes} -m lib.distributed ... (on CPUs, accelerate launch starts a"
            " single one)"
        )
    state = PartialState(cpu=cpu or not torch.cuda.is_available(), timeout=timedelta(seconds=timeout))
    if state.num_processes != processes:
        raise UserError(f"{processes} processes were asked for, {state.num_processes} found one another")
    together = (
        Alone()
        if processes == 1
        else Rows(state.device)
        if share == "rows"
        else Features(config.n_features, state.device)
    )
    opened, folder = Store.open(store, verify=None if together.rank == 0 else False), Path(folder)
    # torchrun sends it to the others when one process has ended
    before = signal.signal(signal.SIGTERM, _terminated)
    try:
        return train(
            opened,
            config,
            folder,
            None if together.rank == 0 else _Silent(),
            str(state.device),
            checkpoint_seconds,
            together,
        )
    except Lost as error:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it may come only now, while we look for what is kept
        raise Lost(
            f"process {together.rank} of {processes}: {error}; {_kept(opened, config, folder)}"
        ) from error
    finally:
        signal.signal(signal.SIGTERM, before)
        if dist.is_initialized() and sys.exc_info()[0] is None:
            dist.destroy_process_group()


class _Silent:
    """Progress of all processes but the first."""

    def update(self, done: int, note: str = "") -> None:
        pass

    def close(self) -> None:
        pass


def _terminated(*_) -> None:
    raise Lost("the launcher ended this process, because another one ended or because it was told to")


def _kept(store: Store, config: TrainConfig, folder: Path) -> str:
    """What is there to go on from."""
    file = checkpoint_file(folder, config.fingerprint(store))
    if not file.is_file():
        return "there was no checkpoint yet, and the same command begins again"
    shown = torch.load(file, map_location="cpu", weights_only=True, mmap=True)["shown"]
    return f"the checkpoint of {shown:,} tokens is kept, and the same command goes on from there"


# --- starting processes -------------------------------------------------------------------------------------


def launch(
    processes: int, store: str | Path | Store, config: TrainConfig, folder: str | Path, **options
) -> CrossCoder:
    """Train on several processes of this machine, from a notebook; shows their output and returns the
    crosscoder.

    accelerate's notebook launcher forks, and neither compiled loops nor torch's threads nor CUDA survive a
    fork once they have been used. So it is not called here, where they may have been, but in a new process
    that has done nothing yet. ``options`` are those of ``train_here``. Raises UserError with the processes'
    last words.
    """
    check("processes", processes, int, low=1)
    options = {
        "store": str(Path(getattr(store, "path", store)).resolve()),
        "folder": str(Path(folder).resolve()),
        "config": dataclasses.asdict(config),
        **options,
    }
    with tempfile.TemporaryDirectory() as scratch:
        job = Path(scratch) / "job.json"
        job.write_text(json.dumps(options))
        child = subprocess.Popen(
            [sys.executable, "-m", "lib.distributed", "--launch", str(processes), "--job", str(job)],
            cwd=ROOT,
            env=_environment(processes),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        said = []
        try:
            for line in child.stdout:
                print(line, end="", flush=True)
                said.append(line.strip())
        finally:
            child.terminate()
            child.wait()
    if child.returncode:
        words = [line for line in said if line.startswith(SENTENCE)] or said[-1:]
        raise UserError(
            words[0].removeprefix(SENTENCE) if words else f"the processes ended with code {child.returncode}"
        )
    return CrossCoder.load(Path(folder))


SENTENCE = "training ended: "  # before what a process has to say


def _environment(processes: int) -> dict[str, str]:
    """The cores are shared out among the processes, unless the environment says otherwise."""
    threads = max(
        (os.process_cpu_count() if hasattr(os, "process_cpu_count") else os.cpu_count() or 1) // processes, 1
    )
    return {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads))}


def _fork(processes: int, job: dict) -> None:
    """Start the processes by accelerate's notebook launcher, from this one, which has computed nothing yet."""
    from accelerate import notebook_launcher
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    try:
        notebook_launcher(_work, (job, processes), num_processes=processes, use_port=port)
    except ChildFailedError as error:
        sys.exit(f"{SENTENCE}{_failures(error)}")


def _failures(error) -> str:
    rank, failure = error.get_first_failure()
    return (
        f"process {rank} ended first, with {'signal' if failure.exitcode < 0 else 'code'}"
        f" {abs(failure.exitcode)}"
    )


def _work(job: dict, processes: int) -> None:
    """In each process: train, or end with a sentence."""
    if "OMP_NUM_THREADS" in os.environ:
        # torch read it at its start, which may have been before a fork
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    config, options = (
        TrainConfig(**job["config"]),
        {name: value for name, value in job.items() if name != "config"},
    )
    try:
        train_here(config=config, processes=processes, **options)
    except UserError as error:
        print(f"{SENTENCE}{error}", file=sys.stderr, flush=True)
        os._exit(1)  # not through destructors that would wait for the others


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="lib.distributed", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--processes", type=int, default=1, help="how many there must be; fewer or more is an error"
    )
    parser.add_argument(
        "--launch", type=int, metavar="N", help="start N processes on this machine, without torchrun"
    )
    parser.add_argument("--job", type=Path, help=argparse.SUPPRESS)  # what follows, as a file: for ``launch``
    parser.add_argument("--store", help="folder of the activations")
    parser.add_argument("--folder", help="where the crosscoder is written, and checkpoints")
    parser.add_argument("--share", choices=SHARE, default="rows", help="what the processes share out")
    parser.add_argument("--cpu", action="store_true", help="even if there are GPUs")
    parser.add_argument("--timeout", type=float, default=TIMEOUT, help="seconds to wait for another process")
    parser.add_argument("--checkpoint-seconds", type=float, default=30)
    for field in dataclasses.fields(TrainConfig):
        parser.add_argument(
            f"--{field.name.replace('_', '-')}",
            type=type(field.default),
            default=field.default,
            help=f"{field.default}",
        )
    options = vars(parser.parse_args(arguments))
    launched, processes, job = (options.pop(name) for name in ("launch", "processes", "job"))
    if job is None:
        if not options["store"] or not options["folder"]:
            parser.error("--store and --folder are needed")
        config = {field.name: options.pop(field.name) for field in dataclasses.fields(TrainConfig)}
        job = {**options, "config": config}
    else:
        job = json.loads(job.read_text())
    if launched:
        os.environ.update(_environment(launched))
        _fork(launched, job)
    else:
        _work(job, processes)


if __name__ == "__main__":
    main()
