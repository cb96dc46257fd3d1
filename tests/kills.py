"""Work on toys that can be killed: a process that has imported everything forks a child for each piece, and
the test kills the child.

``start(kind, folder, ...)`` begins one of ``WORK`` below ``folder``. The forking server never computes
anything, so a child inherits no threads of torch; a child that is killed (SIGKILL: no handler, no
``finally``, nothing is flushed) takes nothing else with it.
"""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import resource
import signal
import sys
import time
from pathlib import Path

import torch

from lib.activations.harvest import harvest_activations
from lib.activations.store import Store
from lib.crosscoder.training import TrainConfig, train
from lib.distil import organism
from lib.features.naming import Endpoint, label_features
from lib.runs import write_text
from lib.settings import UserError
from lib.text.corpus import build
from tests.toys import StopAt, toy_pair

RECIPE = organism.Recipe(
    width=16,
    layers=2,
    heads=2,
    kv_heads=1,
    mlp=16,
    base_tokens=6_000,
    mid_tokens=4_000,
    late_tokens=4_000,
    tune_tokens=8_000,
    batch_tokens=512,
)
QUESTIONS = 30


def prepare(folder: Path) -> None:
    """What the others read: ``folder``/pair, and a store harvested from it."""
    harvest_toys(folder, folder / "store")


def toys(folder: Path):
    from lib.models.pairs import Pair

    names = ("base", "distilled")
    if not (folder / "pair").is_dir():
        toy_pair(folder / "pair")
    return Pair(
        "toy",
        {n: folder / "pair" / n for n in names},
        tokenizer_source=folder / "pair" / "tokenizer",
        dictionary=32,
        tokens=6000,
    )


def harvest_toys(given: Path, out: Path) -> Store:
    pair = toys(given)
    return harvest_activations(pair, build(pair, 6000, seed=0), out, shard_tokens=400, batch_tokens=512)


def distilling(given: Path, out: Path, *_) -> None:
    organism.CHUNK_DOCUMENTS = 20
    organism.train_all(out, RECIPE, ("base", "midtrain", "latetrain", "distilled"), report=lambda line: None)


def harvesting(given: Path, out: Path, *_) -> None:
    harvest_toys(given, out)


def training(given: Path, out: Path, *_) -> None:
    config = TrainConfig(n_features=64, k=4, tokens=40_000, batch_size=64, aux_k=8, dead_after=0.05)
    train(Store.open(given / "store"), config, out, StopAt(1e9), checkpoint_seconds=0)


def labelling(given: Path, out: Path, url: str) -> None:
    import pandas as pd

    contexts = pd.DataFrame(
        [(f, 1, f"text of «feature{f}»") for f in range(QUESTIONS)], columns=["feature", "rank", "text"]
    )
    table = label_features(contexts, range(QUESTIONS), out, Endpoint(url, "judge", timeout=20.0))
    write_text(out / "labels.csv", table.to_csv(index=False))


WORK = {f.__name__: f for f in (distilling, harvesting, training, labelling)}


def _child(pipe, kind: str, given: str, out: str, url: str, file_bytes: int | None, falling: bool) -> None:
    torch.set_num_threads(1)
    if falling:  # the clock, by a day at every look
        looks, began = itertools.count(1), time.time()
        time.time = lambda: began - 86_400 * next(looks)
    sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115
    if file_bytes is not None:  # the system itself refuses to write on: OSError instead of a signal
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
    pipe.send("begun")
    report = "done"
    try:
        prepare(Path(given)) if kind == "prepare" else WORK[kind](Path(given), Path(out), url)
    except BaseException as error:
        report = f"{type(error).__name__}: {error}"
        if not isinstance(error, (UserError, OSError)):
            import traceback

            report += "\n" + traceback.format_exc()
    with contextlib.suppress(OSError):
        pipe.send(report)


def start(
    kind: str, given: Path, out: Path, url: str = "", file_bytes: int | None = None, falling: bool = False
):
    """(process, pipe); the pipe says "begun", and then "done" or what was raised. Returns when the work has
    begun. ``file_bytes``: the system lets no file grow larger; ``falling``: the clock goes backwards.
    """
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["tests.kills"])
    receiver, sender = server.Pipe(duplex=False)
    process = server.Process(
        target=_child, args=(sender, kind, str(given), str(out), url, file_bytes, falling), daemon=True
    )
    process.start()
    sender.close()
    assert receiver.poll(300) and receiver.recv() == "begun"
    return process, receiver


def finish(process, pipe) -> str:
    """The report of the work at its end, "done" or an error; "killed" if there is none."""
    try:
        report = pipe.recv() if pipe.poll(600) else "silent"
    except EOFError:
        report = "killed"
    process.join(20)
    return report
