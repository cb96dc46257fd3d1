"""Two processes train what one does; they refuse to be one, survive a fork in a busy notebook, and leave a checkpoint behind."""

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
import pytest
import torch

from lib.crosscoder import CrossCoder
from lib.distributed import launch
from lib.results import ROOT, UserError
from lib.store import Store
from lib.training import TrainConfig, read_log, train
from tests.toys import toy_store

# 200 steps. An epoch of 1,379 tokens ends with a batch of a single one, of which the second process has nothing
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
    fields = [word for name, value in dataclasses.asdict(config).items() for word in (f"--{name.replace('_', '-')}", str(value))]
    return [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-port", str(port), "-m",
            "lib.distributed", "--cpu", "--store", str(store.path), "--folder", str(folder), *fields, *map(str, more)]


def run(*words, **options):
    return subprocess.run(command(*words, **options), cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)


def assert_alike(a, b, tolerance=1e-3):
    first, second = read_log(a), read_log(b)
    assert len(first) == len(second)
    for name in ("loss", "squared_error", "auxiliary", "fve", "l0", "l0_at_threshold", "threshold", "dead", "gradient_norm"):
        x, y = (np.array([line[name] for line in log]) for log in (first, second))
        assert np.abs(x - y).max() <= tolerance * np.abs(x).max(), (name, np.abs(x - y).max() / np.abs(x).max())
    assert [line["tokens"] for line in first] == [line["tokens"] for line in second]
    x, y = CrossCoder.load(a), CrossCoder.load(b)
    assert (x.W_dec - y.W_dec).norm() < tolerance * x.W_dec.norm() and torch.equal(x.seen, y.seen)


@pytest.mark.parametrize("share", ["rows", "features"])
def test_two_processes_train_what_one_does(store, alone, tmp_path, share):
    log = read_log(alone)
    assert store.count("train") % CONFIG.batch_size == 1
    assert log[-1]["step"] >= 200 and max(line["auxiliary"] for line in log) > 0 and max(line["dead"] for line in log) > 0
    done = run(store, CONFIG, tmp_path, "--processes", 2, "--share", share)
    assert done.returncode == 0, done.stderr
    assert_alike(alone, tmp_path)
    assert not list(tmp_path.glob("checkpoint-*"))

