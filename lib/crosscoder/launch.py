"""Training one crosscoder on several processes: what each of them does, and starting them by torchrun.

torchrun --nproc_per_node 2 -m lib train --processes 2 --store STORE --folder FOLDER --n-features 32768 ...
crosscoder = launch(2, store, config, folder)              # the same from a notebook
"""

import dataclasses
import os
import signal
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from ..activations.store import Store
from ..settings import ROOT, UserError, check
from .model import CrossCoder
from .processes import SHARE, TIMEOUT, ByFeatures, ByRows, Lost, SingleProcess
from .training import TrainConfig, checkpoint_file, train

SENTENCE = "training ended: "  # before what a process has to say


class _Silent:
    """Progress of all processes but the first: none."""

    def update(self, done: int, note: str = "") -> None: ...

    def close(self) -> None: ...


def launch(
    processes: int, store: str | Path | Store, config: TrainConfig, folder: str | Path, **options
) -> CrossCoder:
    """Train on several processes of this machine, started by torchrun; shows their output. ``options`` are
    those of ``train_here``. UserError with what the first process to end had to say."""
    check("processes", processes, int, low=1)
    options |= {"store": Path(getattr(store, "path", store)).resolve(), "folder": Path(folder).resolve()}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(processes), "-m", "lib", "train", "--processes", str(processes)]
    for name, value in {**options, **dataclasses.asdict(config)}.items():
        option = f"--{name.replace('_', '-')}"
        command += [option] * value if isinstance(value, bool) else [option, str(value)]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    variables = {"OMP_NUM_THREADS": str(max(cores // processes, 1)), **os.environ}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, cwd=ROOT, env=variables, **streams) as torchrun:
        ends = []
        try:
            for line in torchrun.stdout:
                print(line, end="", flush=True)
                ends += [line.split(SENTENCE)[1].strip()] if SENTENCE in line else []
        finally:
            torchrun.terminate()
    if torchrun.returncode:
        raise UserError(
            ends[0] if ends else f"torchrun ended with code {torchrun.returncode}: see its output"
        )
    return CrossCoder.load(Path(folder))


def train_or_end(config: TrainConfig, processes: int, **options) -> None:
    """``train_here`` as a process of its own, which ends with a sentence where it cannot go on.

    It ends without the interpreter's own end: destructors would wait for the others after an error, and
    torch's threads, which may still run then, abort it now and then ("terminate called without an active
    exception") when all is done."""
    code = 0
    try:
        train_here(config=config, processes=processes, **options)
    except UserError as error:
        print(f"{SENTENCE}{error}", file=sys.stderr)
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


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
    """This process's part of a training; called in each of ``processes`` that torchrun has started.
    ``share``: see ``lib.crosscoder.processes``. UserError if their number differs, or one ends."""
    from accelerate import PartialState  # seconds to import, and only needed here

    check("processes", processes, int, low=1)
    check("share", share, choices=SHARE)
    if share == "features" and config.variant != "batchtopk":
        raise UserError(
            f"variant is {config.variant!r}: features can be shared out with batchtopk only; share rows"
            " (--share rows)"
        )
    started = int(os.environ.get("WORLD_SIZE", 1))
    if started != processes:
        raise UserError(
            f"{processes} processes were asked for, {started} started: start them with torchrun"
            f" --nproc_per_node {processes} -m lib train ... (on CPUs, accelerate launch starts a single one)"
        )
    state = PartialState(cpu=cpu or not torch.cuda.is_available(), timeout=timedelta(seconds=timeout))
    if state.num_processes != processes:
        raise UserError(f"{processes} processes were asked for, {state.num_processes} found one another")
    if processes == 1:
        together = SingleProcess()
    else:
        together = ByRows(state.device) if share == "rows" else ByFeatures(config.n_features, state.device)
    first, folder = together.rank == 0, Path(folder)
    opened = Store.open(store, verify=None if first else False)
    before = signal.signal(signal.SIGTERM, _terminated)  # torchrun sends it to all when one has ended
    progress = None if first else _Silent()
    try:
        return train(opened, config, folder, progress, str(state.device), checkpoint_seconds, together)
    except Lost as error:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it may come only now, while the checkpoint is opened
        left = _checkpoint_left(opened, config, folder)
        raise Lost(f"process {together.rank} of {processes}: {error}; {left}") from error
    finally:
        signal.signal(signal.SIGTERM, before)
        if dist.is_initialized() and sys.exc_info()[0] is None:
            dist.destroy_process_group()


def _terminated(*_) -> None:
    raise Lost("the launcher ended this process, because another one ended or because it was told to")


def _checkpoint_left(store: Store, config: TrainConfig, folder: Path) -> str:
    """What there is to go on from, in words."""
    file = checkpoint_file(folder, config.fingerprint(store))
    if not file.is_file():
        return "there was no checkpoint yet, and the same command begins again"
    shown = torch.load(file, map_location="cpu", weights_only=True, mmap=True)["shown"]
    return f"the checkpoint of {shown:,} tokens is kept, and the same command goes on from there"
