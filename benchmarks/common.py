"""What the benchmarks share: interleaved timing, ratios with their spread, and the file of results.

Two ways of doing the same are timed in turns, in one process, after a round that is not counted: a machine
that slows down for a while slows both, and the ratio of one round's times stays. ``value`` is the median of
the rounds' ratios, ``low`` and ``high`` their 25th and 75th percentiles, ``n`` the number of rounds.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch

from lib.runs import versions, write_text

RESULTS = Path(__file__).with_name("results.json")  # what was measured
MACHINE = Path(__file__).with_name("machine.json")  # where, last


def interleaved(
    ways: Mapping[str, Callable[[], object]], rounds: int = 7, warmup: int = 1
) -> dict[str, np.ndarray]:
    """Seconds [rounds] that each way takes, by name. Every round runs all of them, in an order that turns."""
    names, seconds = list(ways), {name: [] for name in ways}
    for number in range(-warmup, rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            began = time.perf_counter()
            ways[name]()
            if number >= 0:
                seconds[name].append(time.perf_counter() - began)
    return {name: np.array(times) for name, times in seconds.items()}


def spread(values: np.ndarray) -> dict[str, float]:
    """Median and quartiles of some measurements, as results.json holds them."""
    low, middle, high = np.quantile(np.asarray(values, dtype=float), [0.25, 0.5, 0.75])
    return {"value": float(middle), "low": float(low), "high": float(high), "n": len(values)}


def ratio(seconds: Mapping[str, np.ndarray], slow: str, fast: str) -> dict[str, float]:
    """How many times faster ``fast`` is than ``slow``, round by round."""
    return spread(seconds[slow] / seconds[fast])


def report(title: str, seconds: Mapping[str, np.ndarray], against: str) -> None:
    """Print a line per way: median milliseconds, quartiles, and its speed against one of them."""
    print(f"\n{title}\n{'':44s} {'median ms':>10s} {'quartiles':>17s} {'speed':>7s}")
    for name, times in seconds.items():
        s, r = spread(1e3 * times), ratio(seconds, against, name)
        print(f"{name:44s} {s['value']:10.1f} {s['low']:8.1f} {s['high']:8.1f} {r['value']:7.2f}")


def record(**measured: Mapping[str, float]) -> None:
    """Put measurements {value, low, high, n} into results.json, by name; what else it holds stays."""
    folder = os.open(RESULTS.parent, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)  # released when it is closed
        kept = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
        for name, entry in measured.items():
            kept[name] = {
                key: float(f"{entry[key]:.6g}") if key != "n" else int(entry[key])
                for key in ("value", "low", "high", "n")
            }
            print(f"{name}: {entry['value']:.4g} [{entry['low']:.4g}, {entry['high']:.4g}], n = {entry['n']}")
        write_text(RESULTS, json.dumps(dict(sorted(kept.items())), indent=1) + "\n")
        write_text(MACHINE, json.dumps(machine(), indent=1) + "\n")
    finally:
        os.close(folder)


def machine() -> dict:
    """Processor, cores, memory and versions: a ratio means nothing without them."""
    names = [
        line.split(":", 1)[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")
    ]
    memory = [
        int(line.split()[1]) // 2**20 for line in _lines("/proc/meminfo") if line.startswith("MemTotal")
    ]
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "memory_gb": memory[0] if memory else None,
        "bfloat16_instructions": any(
            "avx512_bf16" in line or "amx_bf16" in line for line in _lines("/proc/cpuinfo")
        ),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": versions(),
    }


def _lines(file: str) -> list[str]:
    return Path(file).read_text().splitlines() if Path(file).is_file() else []
