"""Files and folders of a run: where they are, that they are whole, and what they were made from.

A *run* is one pair of models with one set of budgets; everything it makes lies in
``data/runs/<pair>/<run>/``::

    run = Run("tiny")                                    # figures/tiny/ are the figures of the run "default"
    key = fingerprint(config, store.fingerprint)         # parameters and inputs -> 16 hex digits
    table = kept_table(run.path("scores"), key, make)    # make() is called only if it was not, from the same

A folder that holds an artefact holds manifest.json, with the artefact's fingerprint, written last: without it
the artefact does not exist, and with another fingerprint it is stale."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import errno
import hashlib
import io
import json
import math
import os
import pickle
import platform
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from filelock import FileLock, Timeout

from .settings import REGISTRY, ROOT, UserError, path_shown

if TYPE_CHECKING:  # imported where tables are: a machine that only trains has none
    import pandas as pd

Kept = TypeVar("Kept")
MANIFEST = "manifest.json"
# umap is compiled by numba at its first import (half a minute): once per workspace, not once per environment
os.environ.setdefault("NUMBA_CACHE_DIR", str(ROOT / ".cache" / "numba"))
_PACKAGES = ("torch", "transformers", "nnsight", "numpy", "scipy")
_PACKAGES += ("scikit-learn", "pandas", "plotly", "umap-learn")


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
        return made_folder(self.root / "data" / "runs" / self.pair / self.name)

    @property
    def figures(self) -> Path:
        own = self.root / "figures" / self.pair if self.name == "default" else self.folder / "figures"
        return made_folder(own)

    @property
    def results(self) -> Path:
        return made_folder(self.figures / "results")

    def path(self, artefact: str) -> Path:
        """The folder of an artefact ("store", "crosscoder", ...); it is not made."""
        return self.folder / artefact


def made_folder(folder: Path) -> Path:
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
    """A UserError that says why the disk does not take ``path``, if ``error`` means that; else the error."""
    cause = error  # torch and safetensors wrap the system's error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    named = (code for code in _DISK if os.strerror(code) in str(error))
    number = cause.errno if cause is not None else next(named, None)
    if number not in _DISK:
        return error
    return UserError(
        f"{path_shown(path)} cannot be written: {_DISK[number]}. What was finished is kept, and the same"
        " command goes on"
    )


@contextlib.contextmanager
def _refused(path: Path) -> Iterator[None]:
    """An error of the disk inside the block becomes a UserError about ``path``: see ``disk_error``."""
    try:
        yield
    except Exception as error:
        if (explained := disk_error(path, error)) is error:
            raise
        raise explained from error


@contextlib.contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Another name to write ``path`` under, in a folder that is made: flushed to the disk and renamed at the
    end of the block, removed if it fails. UserError if the disk does not take it."""
    scratch = path.with_name(f".{path.name}.{platform.node()}.{os.getpid()}.part")  # jobs may share a folder
    try:
        with _refused(path):
            made_folder(path.parent)
            yield scratch
            _flush(scratch)
            os.replace(scratch, path)
    finally:
        with contextlib.suppress(OSError):
            scratch.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_files(folder: Path) -> Iterator[Path]:
    """Another folder to write into; at the end of the block its files, flushed to the disk, take their places
    in ``folder``. A block that fails changes nothing. UserError if the disk does not take it."""
    in_folder = {"prefix": ".", "suffix": ".part"}
    with _refused(folder), tempfile.TemporaryDirectory(**in_folder, dir=made_folder(folder)) as scratch:
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


def write_json(path: Path, content) -> Path:
    """``write_text`` of plain data as indented JSON."""
    return write_text(path, json.dumps(content, indent=2) + "\n")


def write_tensors(path: Path, tensors: Mapping) -> Path:
    """A safetensors file that is whole or absent, from tensors of torch by name."""
    from safetensors.torch import save_file

    with whole_file(path) as scratch:
        save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, scratch)
    return path


def write_state(path: Path, state: Mapping) -> Path:
    """``torch.save`` to a file that is whole or absent."""
    import torch  # here: notebooks without a model do not wait for it

    with whole_file(path) as scratch, scratch.open("wb") as file:
        torch.save(state, file)
    return path


def read_state(path: Path) -> dict:
    """What ``write_state`` wrote; nothing is unpickled. UserError for a file that is damaged."""
    import torch

    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        raise UserError(
            f"{path_shown(path)} is damaged ({type(error).__name__}): remove it, and the run begins anew"
        ) from None


@contextlib.contextmanager
def exclusive(folder: Path, what: str) -> Iterator[None]:
    """Hold the lock of ``folder`` as long as the block lasts; UserError if another process holds it.

    ``what`` the holder does, for the error: "training". The lock is beside the folder, .<name>.lock; the
    system holds it, so a process that is killed leaves none."""
    try:
        held = FileLock(made_folder(folder.parent) / f".{folder.name}.lock", timeout=0).acquire()
    except Timeout:
        raise UserError(
            f"another run is {what} in {path_shown(folder)}: wait for it, or stop it first"
        ) from None
    with held:
        yield


# --- fingerprints and manifests: what was made from what ----------------------------------------------------


def fingerprint(*parts) -> str:
    """16 hex digits of the SHA-256 of all parts: dataclasses, dicts, lists, numbers, strings, arrays, paths.

    A ``Path`` is hashed by its content (of a folder: all files in it), so that a retrained model under an old
    name counts as new. UserError for a path that does not exist, TypeError for what is no plain data."""
    text = json.dumps(_plain(parts), separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _plain(part):
    """Plain lists, strings and numbers, for json; each type is named, so that no two types look the same."""
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
        entries = ([_plain(key), _plain(value)] for key, value in part.items())
        return ["dict", *sorted(entries, key=lambda entry: repr(entry[0]))]
    if isinstance(part, (set, frozenset)):
        return ["set", *sorted((_plain(p) for p in part), key=repr)]
    if isinstance(part, (list, tuple)):
        return ["list", *(_plain(p) for p in part)]
    raise TypeError(
        f"cannot fingerprint a {type(part).__name__}: give its parameters, its file, or its own fingerprint"
    )


def _hash_path(path: Path) -> str:
    if not path.exists():
        raise UserError(f"{path_shown(path)} does not exist: it cannot be fingerprinted")
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
    """Write ``folder``/manifest.json last: it says that the artefact is whole. ``info`` is plain data."""
    text = json.dumps({"fingerprint": fingerprint, **jsonable(info)}, indent=2, allow_nan=False)
    return write_text(Path(folder) / MANIFEST, text + "\n")


def read_manifest(folder: Path, made_by: str, expected: str | None = None) -> dict:
    """The manifest of an artefact. UserError, naming the notebook that makes it (its stem,
    "01_harvest_activations"), if it is missing or damaged, or has another fingerprint than ``expected``."""
    file, shown = Path(folder) / MANIFEST, path_shown(folder)
    command = f"({_command(folder, made_by)})"
    if not file.is_file():
        raise UserError(f"{shown} is missing: run notebook {made_by} first {command}")
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        actual = manifest["fingerprint"]
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f"{path_shown(file)} is damaged: remove {shown} and run notebook {made_by} again {command}"
        ) from None
    if expected is not None and actual != expected:
        raise UserError(
            f"{shown} is stale, it was made from other parameters or inputs (fingerprint {actual}, needed"
            f" {expected}): run notebook {made_by} again {command}"
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
    return make_command("figures", pair, name, made_by[:2])


def make_command(goal: str, pair: str, run: str, only: str) -> str:
    """make <goal> for notebook ``only`` of a run."""
    own = os.environ.get(REGISTRY)
    options = {
        "PAIR": pair if pair != "tiny" else "",
        "PROFILE": run if run != "default" else "",
        "ONLY": only,
        "ARGS": f'"--registry {own}"' if own else "",
    }
    return " ".join([f"make {goal}", *(f"{name}={value}" for name, value in options.items() if value)])


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that can change a number."""
    installed = {"python": platform.python_version()}
    for package in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            installed[package] = metadata.version(package)
    return installed


def jsonable(value):
    """Plain data for strict JSON: NaN and infinity become null, numpy becomes Python, a Path its name."""
    if isinstance(value, Mapping):
        return {str(k): jsonable(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [jsonable(v) for v in value]
    if isinstance(value, np.ndarray):
        return jsonable(value.tolist())
    if isinstance(value, Path):
        return path_shown(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return jsonable(dataclasses.asdict(value))
    value = value.item() if isinstance(value, np.generic) else value
    if type(value).__name__ in ("NAType", "NaTType"):  # those of pandas
        return None
    return None if isinstance(value, float) and not math.isfinite(value) else value


# --- progress -----------------------------------------------------------------------------------------------

# in an output's metadata: true of this run alone, so that a notebook's canonical form leaves it out
ON_TERMINAL = "PROGRESS_ON_TERMINAL"  # in the environment of a kernel of the command line
PASSING = "passing"


class Progress:
    """One line that moves: ``rows: 12/50`` and at the end ``rows: 50/50 done``.

    In a kernel it is one display, updated at most twice a second (bars of tqdm freeze at 0% in executed
    notebooks); elsewhere a line on standard error, in place on a terminal, every ten seconds in a log, and so
    for a kernel that the command line has started."""

    _shown = time.monotonic()  # when a kernel last told the terminal

    def __init__(self, label: str, total: int):
        self.label, self.total, self.done, self._last, self._handle = label, int(total), 0, -math.inf, None
        shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
        self._kernel = shell is not None and hasattr(shell, "kernel")
        self._every = 0.5 if self._kernel or sys.stderr.isatty() else 10.0
        self._closed = False

    def update(self, done: int, note: str = "") -> None:
        """``done`` of ``total`` so far. ``note`` is shown while the line moves, and not kept."""
        self.done = int(done)
        if time.monotonic() - self._last >= self._every:
            self._last = time.monotonic()
            self._show(f"{self.label}: {self.done:,}/{self.total:,}" + (f", {note}" if note else ""))

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            end = "done" if self.done >= self.total else "stopped"
            self._show(f"{self.label}: {self.done:,}/{self.total:,} {end}", last=True)

    def _show(self, line: str, last: bool = False) -> None:
        if self._kernel and ON_TERMINAL in os.environ and time.monotonic() - Progress._shown >= 10:
            Progress._shown = time.monotonic()
            print(f"  {line}", file=sys.__stderr__, flush=True)
        if self._kernel and self._handle is None:
            self._handle = passing(line)
        elif self._kernel:
            self._handle.update({"text/plain": line}, raw=True, metadata={PASSING: True})
        elif sys.stderr.isatty():
            print(f"\r\033[K{line}", end="\n" if last else "", file=sys.stderr, flush=True)
        else:
            print(line, file=sys.stderr, flush=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *error) -> None:
        self.close()


def passing(line: str):
    """Show a line that is true of this run alone, such as a speed, and is not kept in git: its handle."""
    from IPython.display import display

    return display({"text/plain": line}, raw=True, display_id=True, metadata={PASSING: True})


# --- what is kept on disk -----------------------------------------------------------------------------------


def kept(
    folder: Path, fingerprint: str, make: Callable[[Path], None], read: Callable[[Path], Kept], **info
) -> Kept:
    """What ``read(folder)`` gives; ``make(folder)`` writes it first, unless it is there under this key.

    ``make`` writes into an empty folder, whose files take their places in ``folder`` when it is done."""
    folder = Path(folder)
    if not is_current(folder, fingerprint):
        with whole_files(folder) as scratch:
            make(scratch)
            (folder / MANIFEST).unlink(missing_ok=True)  # what it vouches for is about to change
        write_manifest(folder, fingerprint, **info)
    return read(folder)


def kept_table(
    folder: Path, fingerprint: str, make: Callable[[], pd.DataFrame], name: str = "table", **info
) -> pd.DataFrame:
    """The table that ``make`` computes, kept as ``folder``/``name``.csv under this fingerprint, and read back
    to the last digit; empty text becomes NaN, the words "null" and "None" stay text."""

    def make_file(scratch: Path) -> None:
        write_text(scratch / f"{name}.csv", table_text(make()))

    return kept(folder, fingerprint, make_file, lambda whole: read_table(whole / f"{name}.csv"), **info)


def table_text(frame: pd.DataFrame, float_format: str | None = None, index: bool = False) -> str:
    """A table as CSV, which ``read_table`` gives back row by row: csv leaves a carriage return without quotes
    on some versions of Python, and a reader takes it for the end of a row, so all is quoted where there is
    one."""
    options = dict(index=index, float_format=float_format, lineterminator="\n")
    text = frame.to_csv(**options)
    return frame.to_csv(**options, quoting=csv.QUOTE_ALL) if "\r" in text else text


def read_table(file: Path | io.StringIO, **options) -> pd.DataFrame:
    """A table as ``table_text`` writes it; ``options`` of ``pandas.read_csv``. Give text columns their type
    (``dtype``): one that happens to hold numbers alone would be read as numbers."""
    import pandas as pd

    usual = dict(keep_default_na=False, na_values=[""], float_precision="round_trip", skip_blank_lines=False)
    return pd.read_csv(file, **(usual | options))
