"""Two processes train what one does; they refuse to be one, start from a busy notebook, leave a checkpoint
behind.
"""

import dataclasses
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
import torch

from lib.activations.store import Store
from lib.crosscoder.launch import launch, train_here
from lib.crosscoder.model import CrossCoder
from lib.crosscoder.training import TrainConfig, read_log, train
from lib.settings import ROOT, UserError
from tests.toys import Interrupted, StopAt, toy_store

# 200 steps. An epoch of 1,379 tokens ends with a batch of a single one, of which the second process has
# nothing
CONFIG = TrainConfig(n_features=63, k=4, tokens=10_600, batch_size=53, aux_k=5, dead_after=0.02)
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Store:
    return toy_store(tmp_path_factory.mktemp("distributed"), tokens=1700)


@pytest.fixture(scope="module")
def alone(store, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    train(store, CONFIG, folder)
    return folder


def command(store, config, folder, *more, processes=2) -> list[str]:
    """torchrun, on a port of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    fields = [
        word
        for name, value in dataclasses.asdict(config).items()
        for word in (f"--{name.replace('_', '-')}", str(value))
    ]
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        str(processes),
        "--master-port",
        str(port),
        "-m",
        "lib",
        "train",
        "--cpu",
        "--store",
        str(store.path),
        "--folder",
        str(folder),
        *fields,
        *map(str, more),
    ]


def run(*words, **options):
    return subprocess.run(
        command(*words, **options), cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=600
    )


def assert_alike(a, b, tolerance=1e-3):
    first, second = read_log(a), read_log(b)
    assert len(first) == len(second)
    for name in (
        "loss",
        "squared_error",
        "auxiliary",
        "fve",
        "l0",
        "l0_at_threshold",
        "threshold",
        "dead",
        "gradient_norm",
    ):
        x, y = (np.array([line[name] for line in log]) for log in (first, second))
        assert np.abs(x - y).max() <= tolerance * np.abs(x).max(), (
            name,
            np.abs(x - y).max() / np.abs(x).max(),
        )
    assert [line["tokens"] for line in first] == [line["tokens"] for line in second]
    x, y = CrossCoder.load(a), CrossCoder.load(b)
    assert (x.W_dec - y.W_dec).norm() < tolerance * x.W_dec.norm() and torch.equal(x.seen, y.seen)


@pytest.mark.parametrize("share", ["rows", "features"])
def test_two_processes_train_what_one_does(store, alone, tmp_path, share):
    log = read_log(alone)
    assert store.count("train") % CONFIG.batch_size == 1
    assert (
        log[-1]["step"] >= 200
        and max(line["auxiliary"] for line in log) > 0
        and max(line["dead"] for line in log) > 0
    )
    done = run(store, CONFIG, tmp_path, "--processes", 2, "--share", share)
    assert done.returncode == 0, done.stderr
    assert_alike(alone, tmp_path)
    assert not list(tmp_path.glob("checkpoint-*"))
    assert json.loads((tmp_path / "manifest.json").read_text())["processes"] == 2


def test_a_killed_process_ends_the_run_which_goes_on_from_its_checkpoint(store, alone, tmp_path):
    words = command(store, CONFIG, tmp_path, "--processes", 2, "--checkpoint-seconds", 0, "--timeout", 600)
    with subprocess.Popen(
        words, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as running:
        while not list(tmp_path.glob("checkpoint-*.pt")):
            assert running.poll() is None, running.stderr.read()
            time.sleep(0.02)
        (worker,) = (p for p in psutil.Process(running.pid).children() if p.environ()["RANK"] == "1")
        began = time.monotonic()
        worker.send_signal(signal.SIGKILL)
        said = running.communicate(timeout=300)[1]
    assert running.returncode != 0 and time.monotonic() - began < 300
    (sentence,) = re.findall("training ended: (.*)", said)
    assert "process 0 of 2" in sentence and "another" in sentence and "SIGKILL" in said
    kept = int(
        re.search("the checkpoint of ([0-9,]+) tokens is kept, and the same command goes on", sentence)[
            1
        ].replace(",", "")
    )
    assert 0 < kept < CONFIG.tokens and not (tmp_path / "manifest.json").exists()
    assert run(store, CONFIG, tmp_path, "--processes", 2).returncode == 0
    assert_alike(alone, tmp_path)


def test_a_notebook_that_has_computed_launches_what_one_process_began(store, alone, tmp_path, monkeypatch):
    """And features are shared out from a checkpoint of all of them."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torch.set_num_threads(2)
    try:
        with pytest.raises(Interrupted):
            train(store, CONFIG, tmp_path, StopAt(4000), checkpoint_seconds=0)
        torch.randn(500, 500) @ torch.randn(500, 500)
        crosscoder = launch(2, store, CONFIG, tmp_path, share="features", cpu=True)
    finally:
        torch.set_num_threads(1)
    assert_alike(alone, tmp_path)
    assert torch.equal(crosscoder.W_enc, CrossCoder.load(tmp_path).W_enc)


def test_fewer_processes_than_asked_for_are_refused(store, tmp_path):
    """As accelerate's command line would start, on a CPU."""
    with pytest.raises(
        UserError, match=r"3 processes were asked for, 1 started: start them with torchrun --nproc_per_node 3"
    ):
        train_here(store.path, CONFIG, tmp_path, 3, cpu=True)
    with pytest.raises(UserError, match="share is 'tokens': it must be one of rows, features"):
        train_here(store.path, CONFIG, tmp_path, 1, share="tokens")
    with pytest.raises(UserError, match="features can be shared out with batchtopk only"):
        train_here(store.path, dataclasses.replace(CONFIG, variant="l1"), tmp_path, 1, share="features")


def test_what_goes_wrong_in_a_launched_process_is_said_in_the_notebook(store, tmp_path):
    with pytest.raises(UserError, match="lower the learning rate"):
        launch(2, store, dataclasses.replace(CONFIG, rate=1e30, warmup=0.0), tmp_path, cpu=True)
