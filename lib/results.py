"""Numbers, folders, manifests and parameter checks: what every module and notebook shares, and nothing else.

A *run* is one pair of models with one set of budgets; everything it makes lies in
``data/runs/<pair>/<run>/``::

    run = Run("tiny")                                    # figures/tiny/ are the figures of the run "default"
    mark = fingerprint(config, store.fingerprint)        # parameters and inputs -> 16 hex digits
    if not is_current(run.path("crosscoder"), mark):     # made before, from the same? then nothing is recomputed
        ...                                              # compute, save, and at the very end:
        write_manifest(run.path("crosscoder"), mark)     # an artefact without a manifest does not exist

Every number that is shown anywhere goes through ``Results`` with its 95% interval and its n.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import math
import os
import pickle
import platform
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import numpy as np
import pandas as pd
from filelock import FileLock, Timeout
from scipy.stats import norm

from .progress import Progress as Progress, passing as passing  # part of this module's interface

# ends of the names of metrics that say how fast a machine was: no results, so not compared
TIMES = ("_per_second", "_seconds")
ROOT = Path(__file__).resolve().parents[1]
MANIFEST = "manifest.json"
# umap is compiled by numba at its first import (half a minute): once per workspace, not once per environment
os.environ.setdefault("NUMBA_CACHE_DIR", str(ROOT / ".cache" / "numba"))
_PACKAGES = (
    "torch",
    "transformers",
    "nnsight",
    "numpy",
    "scipy",
    "scikit-learn",
    "pandas",
    "plotly",
    "umap-learn",
)


class UserError(Exception):
    """One sentence for the user: what was wrong, and what would be right."""


# --- runs: where things are ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """The folders of one run. Folders are made when they are asked for. ``root`` is for tests."""

    pair: str
    name: str = "default"
    root: Path = ROOT

    def __post_init__(self) -> None:
        for what, value in (("pair", self.pair), ("run", self.name)):
            if not isinstance(value, str) or not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", value):
                raise UserError(
                    f"{what} is {value!r}: it must be a plain name of letters, digits, '-', '_' and '.'"
                )

    @property
    def folder(self) -> Path:
        return _made(self.root / "data" / "runs" / self.pair / self.name)

    @property
    def figures(self) -> Path:
        return _made(self.root / "figures" / self.pair if self.name == "default" else self.folder / "figures")

    @property
    def results(self) -> Path:
        return _made(self.figures / "results")

    def path(self, artefact: str) -> Path:
        """The folder of an artefact ("store", "crosscoder", ...). It is not made: whether it is there says
        something.
        """
        return self.folder / artefact


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


_DISK = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the quota of the disk is used up",
    errno.EFBIG: "files may not grow so large here",
    errno.EROFS: "the disk is read-only",
    errno.EACCES: "you may not write there",
    errno.EPERM: "you may not write there",
}


def disk_error(path: Path, error: Exception) -> Exception:
    """A UserError that says why ``path`` cannot be written, if ``error`` means that the disk does not take
    it; else the error itself.
    """
    cause = error  # torch and safetensors wrap the system's error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    number = (
        cause.errno
        if cause is not None
        else next((code for code in _DISK if os.strerror(code) in str(error)), None)
    )
    if number not in _DISK:
        return error
    return UserError(
        f"{_shown(path)} cannot be written: {_DISK[number]}. What was finished is kept, and the same command"
        " goes on"
    )


@contextlib.contextmanager
def _refused(path: Path) -> Iterator[None]:
    """What the disk does not take inside the block becomes a UserError about ``path``: full, read-only, not
    yours.
    """
    try:
        yield
    except Exception as error:
        if (found := disk_error(path, error)) is error:
            raise
        raise found from error


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Another name to write ``path`` under, whatever writes it: flushed to the disk and renamed at the end of
    the block, removed if it fails.

    UserError if the disk does not take it.
    """
    scratch = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with _refused(path):
            yield scratch
            _flush(scratch)
            os.replace(scratch, path)
    finally:
        with contextlib.suppress(OSError):
            scratch.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_files(folder: Path) -> Iterator[Path]:
    """Another folder to write into; at the end of the block its files, flushed to the disk, take their places
    in ``folder``.

    A block that fails changes nothing. UserError if the disk does not take it.
    """
    with _refused(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".", suffix=".part", dir=folder) as scratch:
            yield Path(scratch)
            files = list(Path(scratch).iterdir())
            for file in files:
                _flush(file)
            for file in files:
                os.replace(file, folder / file.name)


def _flush(file: Path) -> None:
    with file.open("rb") as written:
        os.fsync(written.fileno())


def write_text(path: Path, text: str) -> Path:
    """Write a file that is whole or absent: another name first, then renamed."""
    with whole_file(path) as scratch:
        scratch.write_text(text, encoding="utf-8")
    return path


def write_state(path: Path, state: Mapping) -> Path:
    """``torch.save`` to a file that is whole or absent."""
    import torch  # here: notebooks without a model do not wait for it

    with whole_file(path) as scratch, scratch.open("wb") as file:
        torch.save(state, file)
    return path


def read_state(path: Path) -> dict:
    """What ``write_state`` wrote, with weights only: nothing is unpickled. UserError for a file that is
    damaged.
    """
    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        raise UserError(
            f"{_shown(path)} is damaged ({type(error).__name__}): remove it, and the run begins anew"
        ) from None


@contextlib.contextmanager
def alone(folder: Path, what: str) -> Iterator[None]:
    """Nobody else does ``what`` in ``folder`` as long as the block lasts; UserError if somebody does. A run
    that is killed leaves no lock.

    The lock is beside the folder, .<name>.lock, and is kept by the system: the file itself says nothing.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder.parent / f".{folder.name}.lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(f"another run is {what} in {_shown(folder)}: wait for it, or stop it first") from None
    try:
        yield
    finally:
        lock.release()


# --- fingerprints and manifests: what was made from what ----------------------------------------------------


def fingerprint(*parts) -> str:
    """16 hex digits of the SHA-256 of all parts: dataclasses, dicts, lists, numbers, strings, arrays, paths.

    Dicts are hashed in sorted order. A ``Path`` is hashed by its content (of a folder: the names and contents
    of all files in it), so that a retrained model under an old name counts as new. Raises UserError for a
    path that does not exist and TypeError for an object whose content is not plain data.
    """
    text = json.dumps(_plain(parts), separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _plain(part):
    """Plain lists, strings and numbers, for json; each kind is marked, so that no two kinds look the same."""
    if part is None or isinstance(part, (str, bool, int, float)):
        return part
    if isinstance(part, np.generic):
        return _plain(part.item())
    if isinstance(part, np.ndarray):
        content = np.ascontiguousarray(part)
        return ["array", str(part.dtype), list(part.shape), hashlib.sha256(content.tobytes()).hexdigest()]
    if isinstance(part, Path):
        return ["path", _hash_path(part)]
    if dataclasses.is_dataclass(part) and not isinstance(part, type):
        fields = {f.name: getattr(part, f.name) for f in dataclasses.fields(part)}
        return ["dataclass", type(part).__name__, _plain(fields)]
    if isinstance(part, Mapping):
        return [
            "dict",
            *sorted(([_plain(k), _plain(v)] for k, v in part.items()), key=lambda pair: repr(pair[0])),
        ]
    if isinstance(part, (set, frozenset)):
        return ["set", *sorted((_plain(p) for p in part), key=repr)]
    if isinstance(part, (list, tuple)):
        return ["list", *(_plain(p) for p in part)]
    raise TypeError(
        f"cannot fingerprint a {type(part).__name__}: give its parameters, its file, or its own fingerprint"
    )


def _hash_path(path: Path) -> str:
    if not path.exists():
        raise UserError(f"{_shown(path)} does not exist: it cannot be fingerprinted")
    digest = hashlib.sha256()
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    for file in files:
        if path.is_dir():
            digest.update(f"\0{file.relative_to(path).as_posix()}\0{file.stat().st_size}\0".encode())
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def write_manifest(folder: Path, fingerprint: str, **info) -> Path:
    """Write ``folder``/manifest.json last: it is what says that the artefact is whole. ``info`` is plain
    data.
    """
    text = json.dumps({"fingerprint": fingerprint, **_jsonable(info)}, indent=2, allow_nan=False)
    return write_text(_made(Path(folder)) / MANIFEST, text + "\n")


def read_manifest(folder: Path, made_by: str, expected: str | None = None) -> dict:
    """The manifest of an artefact. UserError, naming the notebook that makes it, if it is missing or damaged.

    ``made_by`` is the notebook's stem, "01_harvest_activations". With ``expected`` (a fingerprint) an
    artefact that was made from other parameters or inputs is refused as stale.
    """
    file = Path(folder) / MANIFEST
    if not file.is_file():
        raise UserError(
            f"{_shown(folder)} is missing: run notebook {made_by} first ({_command(folder, made_by)})"
        )
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        found = manifest["fingerprint"]
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f"{_shown(file)} is damaged: remove {_shown(folder)} and run notebook {made_by} again "
            f"({_command(folder, made_by)})"
        ) from None
    if expected is not None and found != expected:
        raise UserError(
            f"{_shown(folder)} is stale, it was made from other parameters or inputs (fingerprint {found},"
            f" needed {expected}): run notebook {made_by} again ({_command(folder, made_by)})"
        )
    return manifest


def is_current(folder: Path, fingerprint: str) -> bool:
    """True if the artefact is whole and was made from exactly these parameters and inputs."""
    try:
        return json.loads((Path(folder) / MANIFEST).read_text(encoding="utf-8"))["fingerprint"] == fingerprint
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _command(folder: Path, made_by: str) -> str:
    """The make command for a notebook, in the run that ``folder`` belongs to."""
    try:
        pair, name = Path(folder).resolve().relative_to(ROOT / "data" / "runs").parts[:2]
    except ValueError:
        pair, name = "tiny", "default"
    chosen = (
        ["make figures"]
        + ([f"PAIR={pair}"] if pair != "tiny" else [])
        + ([f"PROFILE={name}"] if name != "default" else [])
    )
    return " ".join([*chosen, f"ONLY={made_by[:2]}"])


def _shown(path: Path) -> str:
    """A path below the repository without the machine's part of it."""
    path = Path(path)
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else str(path)


# --- parameter checks ---------------------------------------------------------------------------------------

_KINDS = {int: "an integer", float: "a number", bool: "True or False", str: "a string", list: "a list"}


def check(name: str, value, kind=None, low=None, high=None, choices=None):
    """Return ``value``, or raise a UserError that says what ``name`` must be. ``low`` and ``high`` are
    inclusive.

    ``kind`` is int, float (takes integers too), bool, str, list, or a tuple of kinds, with None in it if the
    parameter may be None. Of a list, every entry is checked against the bounds and choices. NaN and infinity
    are refused.

    >>> check("k", 0, int, low=1)
    Traceback (most recent call last):
    lib.results.UserError: k is 0: it must be an integer of at least 1
    """
    kinds = kind if isinstance(kind, tuple) else () if kind is None else (kind,)
    if value is None and None in kinds:
        return value
    wanted = " or ".join(_KINDS[k] for k in kinds if k is not None) or "a value"
    if low is not None and high is not None:
        wanted += f" from {low} to {high}"
    elif low is not None or high is not None:
        wanted += f" of at least {low}" if low is not None else f" of at most {high}"
    if choices is not None:
        wanted = "one of " + ", ".join(map(str, choices))
    if list in kinds:
        wanted = (
            wanted.replace("a list", "a list, every entry", 1)
            if (low, high, choices) != (None, None, None)
            else wanted
        )
    fine = not kinds or any(k is not None and _is(value, k) for k in kinds)
    for entry in value if isinstance(value, (list, tuple)) else [value]:
        number = isinstance(entry, (int, float, np.number)) and not isinstance(entry, bool)
        fine = fine and not (number and not math.isfinite(entry))
        fine = fine and (choices is None or entry in choices)
        if low is not None or high is not None:
            fine = fine and number and (low is None or entry >= low) and (high is None or entry <= high)
    if not fine:
        raise UserError(f"{name} is {value!r}: it must be {wanted}")
    return value


def _is(value, kind: type) -> bool:
    if kind is bool:
        return isinstance(value, (bool, np.bool_))
    if kind is int:
        return isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if kind is float:
        return isinstance(value, (int, float, np.number)) and not isinstance(value, bool)
    if kind is list:
        return isinstance(value, (list, tuple))
    return isinstance(value, kind)


# --- numbers ------------------------------------------------------------------------------------------------


class Results:
    """The metrics and tables of one notebook, and the circumstances under which they were measured.

    >>> results = Results("02", run, {"seed": 0})               # doctest: +SKIP
    >>> results.add("l0", 31.8, ci=(31.2, 32.4), n=5000)         # doctest: +SKIP
    >>> results.write()                                          # doctest: +SKIP
    """

    def __init__(self, notebook: str, run: Run, parameters: Mapping):
        self.notebook, self.run, self.parameters = str(notebook), run, dict(parameters)
        self.metrics: dict[str, dict] = _Measured()
        self.tables: dict[str, dict] = {}
        self._began = time.monotonic()

    def add(self, name: str, value: float, ci: Sequence[float] | None = None, n: int | None = None) -> float:
        """Record one number with its 95% interval and the n behind it; returns it. Not finite becomes null."""
        if ci is not None:
            low, high = (_number(bound) for bound in ci)
            if low is not None and high is not None and low > high:
                raise ValueError(f"the interval of {name} is ({low}, {high}): low must not exceed high")
            ci = [low, high]
        self.metrics[name] = {"value": _number(value), "ci": ci, "n": None if n is None else int(n)}
        return value

    def table(self, name: str, frame: pd.DataFrame) -> pd.DataFrame:
        """Record a small DataFrame as {columns, rows}; a named index becomes columns. Returns the frame."""
        plain = frame.reset_index() if any(level is not None for level in frame.index.names) else frame
        self.tables[name] = {
            "columns": [str(c) for c in plain.columns],
            "rows": [list(row) for row in plain.itertuples(index=False)],
        }
        return frame

    @property
    def values(self) -> dict[str, float | None]:
        """The metrics without intervals: name -> value."""
        return _Measured({name: metric["value"] for name, metric in self.metrics.items()})

    def text(self, name: str, digits: int = 2) -> str:
        """A metric as prose shows it: ``0.85 [0.82, 0.88]``."""
        return _interval_text(self.metrics[name], digits)

    def write(self) -> Path:
        """Write <figures>/results/NN.json (atomic) and return its path."""
        content = {
            "notebook": self.notebook,
            "pair": self.run.pair,
            "run": self.run.name,
            "parameters": self.parameters,
            "versions": versions(),
            "seed": self.parameters.get("seed"),
            "wall_seconds": round(time.monotonic() - self._began, 1),
            "peak_memory_mb": peak_memory_mb(),
            "metrics": self.metrics,
            "tables": self.tables,
        }
        return write_text(
            self.run.results / f"{self.notebook}.json",
            json.dumps(_jsonable(content), indent=1, allow_nan=False) + "\n",
        )

    def frame(self) -> pd.DataFrame:
        """The metrics as a table for the notebook: one row per metric, without speeds, which differ from run
        to run.
        """
        rows = [
            {
                "metric": name,
                "value": m["value"],
                "low": (m["ci"] or [None])[0],
                "high": (m["ci"] or [None])[-1],
                "n": m["n"],
            }
            for name, m in self.metrics.items()
            if not name.endswith(TIMES)
        ]
        frame = pd.DataFrame(rows, columns=["metric", "value", "low", "high", "n"]).set_index("metric")
        return frame.astype({"value": float, "low": float, "high": float, "n": "Int64"}).round(4)

    def __repr__(self) -> str:
        return self.frame().to_string(na_rep="")

    def _repr_html_(self) -> str:
        return self.frame().to_html(na_rep="")


class _Measured(dict):
    """By name of the metric. What is missing was to be measured in a cell that has not been run since
    ``Results`` was made.
    """

    def __missing__(self, name: str):
        raise UserError(
            f"{name!r} has not been measured since the first cells were run: choose this cell, and Run > Run"
            " All Above Selected Cell"
        )


def read_results(run: Run, notebook: str) -> dict:
    """The results that a notebook ("02") wrote in this run."""
    file = run.results / f"{notebook}.json"
    if not file.is_file():
        raise UserError(
            f"{_shown(file)} is missing: run notebook {notebook} first ({_command(run.folder, notebook)})"
        )
    return json.loads(file.read_text(encoding="utf-8"))


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that can change a number."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            pass
    return found


def peak_memory_mb() -> float | None:
    """Peak resident memory of this process in MB (10^6 bytes); None where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak * (1 if sys.platform == "darwin" else 1024) / 1e6, 1)


def _number(value) -> float | int | None:
    value = value.item() if hasattr(value, "item") else value
    return None if value is None or not math.isfinite(value) else value


def _jsonable(value):
    """Plain data for a strict JSON file: NaN and infinity become null, numpy becomes Python, a Path its name."""
    if isinstance(value, Mapping):
        return {str(k): _jsonable(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_jsonable(v) for v in value]
    if isinstance(value, np.ndarray):
        return _jsonable(value.tolist())
    if isinstance(value, Path):
        return _shown(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _jsonable(dataclasses.asdict(value))
    value = value.item() if isinstance(value, np.generic) else value
    if value is pd.NA or value is pd.NaT:
        return None
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _interval_text(metric: Mapping, digits: int) -> str:
    def show(x):
        return "n/a" if x is None else f"{x:,}" if isinstance(x, int) else f"{x:,.{digits}f}"

    low_high = f" [{show(metric['ci'][0])}, {show(metric['ci'][1])}]" if metric["ci"] else ""
    return show(metric["value"]) + low_high


def wilson(successes: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a proportion; (nan, nan) for n = 0. Holds its level at 0 and 1, unlike p ±
    1.96 se.

    Source: Wilson 1927, "Probable inference, the law of succession, and statistical inference".
    """
    if not 0 <= successes <= n:
        raise ValueError(f"{successes} successes of {n}: must be from 0 to n")
    if n == 0:
        return math.nan, math.nan
    z = float(norm.ppf(0.5 + level / 2))
    p, scale = successes / n, 1 + z * z / n
    middle = (p + z * z / (2 * n)) / scale
    half = z / scale * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    # exact at the ends, whatever rounding says
    return 0.0 if successes == 0 else middle - half, 1.0 if successes == n else middle + half


def bootstrap(
    values, statistic: Callable = np.mean, groups=None, n_boot: int = 1000, seed: int = 0, level: float = 0.95
) -> tuple[float, float]:
    """Percentile bootstrap interval of ``statistic(values)``; values [n] or [n, columns], resampled by row.

    ``groups`` [n] (document ids, say) resamples whole groups: tokens of one document are not independent, and
    an interval over tokens would be far too narrow. Resamples in which the statistic is NaN are left out.
    """
    values = np.asarray(values)
    if len(values) == 0:
        return math.nan, math.nan
    if groups is not None and len(groups) != len(values):
        raise ValueError(f"{len(groups)} groups for {len(values)} values: must be one each")
    rng = np.random.default_rng(seed)
    ids = (
        np.arange(len(values))
        if groups is None
        else np.unique(np.asarray(groups), return_inverse=True)[1].ravel()
    )
    n_groups = int(ids.max()) + 1
    # sums and counts of the groups suffice: no copying of tokens
    if statistic is np.mean and values.ndim == 1:
        sums, counts = (
            np.bincount(ids, weights=values.astype(float), minlength=n_groups),
            np.bincount(ids, minlength=n_groups),
        )
        draws = (rng.integers(n_groups, size=n_groups) for _ in range(n_boot))
        found = [sums[draw].sum() / counts[draw].sum() for draw in draws]
    else:
        order = np.argsort(ids, kind="stable")
        members = np.split(order, np.cumsum(np.bincount(ids, minlength=n_groups))[:-1])
        draws = (rng.integers(n_groups, size=n_groups) for _ in range(n_boot))
        found = [statistic(values[np.concatenate([members[g] for g in draw])]) for draw in draws]
    found = np.asarray(found, dtype=float)
    if np.isnan(found).all():
        return math.nan, math.nan
    low, high = np.nanquantile(found, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def scoreboard(rows: Sequence[Mapping]) -> pd.DataFrame:
    """Predictions against what was observed. ``held``: True, False, or None for what could not be decided."""
    words = {True: "yes", False: "no", None: "undecided"}
    for row in rows:
        if missing := {"prediction", "observed", "held"} - set(row):
            raise ValueError(f"a row of the scoreboard lacks {', '.join(sorted(missing))}")
    frame = pd.DataFrame(
        [{**row, "held": words[None if row["held"] is None else bool(row["held"])]} for row in rows]
    )
    return frame[
        [
            "prediction",
            "observed",
            "held",
            *(c for c in frame.columns if c not in ("prediction", "observed", "held")),
        ]
    ]
