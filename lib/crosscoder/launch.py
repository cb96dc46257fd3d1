"""Several processes that train one crosscoder, started from here or by torchrun."""

from __future__ import annotations

import argparse
import dataclasses
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

from ..activations.store import Store
from ..settings import ROOT, UserError, check
from .model import CrossCoder
from .processes import SHARE, TIMEOUT, Features, Lost, Rows, SingleProcess
from .training import TrainConfig, checkpoint_file, train

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
            f" --nproc_per_node {processes} -m lib train ... (on CPUs, accelerate launch starts a"
            " single one)"
        )
    state = PartialState(cpu=cpu or not torch.cuda.is_available(), timeout=timedelta(seconds=timeout))
    if state.num_processes != processes:
        raise UserError(f"{processes} processes were asked for, {state.num_processes} found one another")
    together = (
        SingleProcess()
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
            [sys.executable, "-m", "lib.crosscoder.launch", "--launch", str(processes), "--job", str(job)],
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
    """In each process that the notebook launcher has started."""
    if "OMP_NUM_THREADS" in os.environ:
        # torch read it at its start, which may have been before a fork
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    options = {name: value for name, value in job.items() if name != "config"}
    train_or_end(TrainConfig(**job["config"]), processes, **options)


def train_or_end(config: TrainConfig, processes: int, **options) -> None:
    """``train_here`` in a process of its own, which ends with a sentence if it cannot go on."""
    try:
        train_here(config=config, processes=processes, **options)
    except UserError as error:
        print(f"{SENTENCE}{error}", file=sys.stderr, flush=True)
        os._exit(1)  # not through destructors that would wait for the others


def main() -> None:
    """What ``launch`` starts: --launch N --job FILE."""
    parser = argparse.ArgumentParser(prog="lib.crosscoder.launch")
    parser.add_argument("--launch", type=int)
    parser.add_argument("--job", type=Path)
    options = parser.parse_args()
    os.environ.update(_environment(options.launch))
    _fork(options.launch, json.loads(options.job.read_text()))


if __name__ == "__main__":
    main()
