"""Has any number moved? A fresh run (``make check``, in a clone), or what the last runs left here
(``python -m lib check --here``), compared with the results that are committed.

same     equal to 1 part in 1,000: one machine and the pinned versions give the same bytes, others round
         differently
moved    further, but within the committed 95% interval, or within 5% (0.01 near zero) where there is none:
         training amplifies rounding
outside  beyond that, missing, or new
turned   the verdict on a prediction, from or to yes or no; between undecided and "depends" it has moved

Exit code 1 if anything is outside or turned; with ``--verdicts`` only if a verdict is: on another processor
numbers move, and no verdict may. That a notebook's canonical form differs is said, not judged."""

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import nbformat

from ..results import TIMES
from ..runs import versions
from ..settings import ROOT, UserError, path_shown
from ..verdicts import DEPENDS, UNDECIDED
from .notebooks import canonical

SAME = 1e-3  # relative
LOOSE, NEAR_ZERO = 0.05, 0.01  # relative, and absolute, for metrics without an interval
PAIRS = ("tiny",)  # whose results make figures writes
CLONE = ROOT / "data" / "runs" / "check"


@dataclass(frozen=True)
class Difference:
    """One number that is not the same. ``kind`` is "moved" or "outside", of a verdict "turned"."""

    notebook: str
    name: str
    before: float | str | None
    after: float | str | None
    kind: str

    def __str__(self) -> str:
        before, after = (f"{v:.6g}" if type(v) in (float, int) else str(v) for v in (self.before, self.after))
        return f"{self.kind:>8}  {self.notebook}  {self.name}: {before} -> {after}"


def compare(notebook: str, before: Mapping, after: Mapping) -> list[Difference]:
    """Differences between two contents of a results file NN.json, committed first."""
    differences = []

    def differ(name: str, was, now, kind: str = "outside") -> None:
        differences.append(Difference(notebook, name, was, now, kind))

    old, new = before["metrics"], after["metrics"]
    for name in sorted(n for n in set(old) | set(new) if not n.endswith(TIMES)):
        if name not in old or name not in new:
            differ(name, *("there" if name in metrics else "missing" for metrics in (old, new)))
        elif kind := _moved(old[name]["value"], new[name]["value"], old[name]["ci"]):
            differ(name, old[name]["value"], new[name]["value"], kind)
    verdicts = [
        {row["prediction"]: row["held"] for row in _scoreboard(content)} for content in (before, after)
    ]
    for prediction in sorted(set(verdicts[0]) | set(verdicts[1])):
        was, now = (v.get(prediction, "missing") for v in verdicts)
        if was != now:
            kind = "moved" if {was, now} <= {DEPENDS, UNDECIDED} else "turned"
            differ(f"prediction {prediction!r}", was, now, kind)
    return differences


def _moved(before: float | None, after: float | None, interval: list | None) -> str | None:
    if None in (before, after) or not (math.isfinite(before) and math.isfinite(after)):
        return None if str(before) == str(after) else "outside"  # None, nan, inf, -inf
    if abs(after - before) <= SAME * max(abs(before), 1e-6):
        return None
    if interval and None not in interval:
        return "moved" if min(interval) <= after <= max(interval) else "outside"
    return "moved" if abs(after - before) <= max(LOOSE * abs(before), NEAR_ZERO) else "outside"


def _scoreboard(content: Mapping) -> Iterator[dict]:
    table = content["tables"].get("scoreboard") or {"columns": [], "rows": []}
    return (dict(zip(table["columns"], row)) for row in table["rows"])


def cells_that_differ(before: str, after: str) -> list[str]:
    """Ids of the cells whose canonical form differs between two notebooks, given as JSON."""
    notebooks = [canonical(nbformat.reads(text, as_version=4)) for text in (before, after)]
    old, new = ({cell.id: cell for cell in notebook.cells} for notebook in notebooks)
    return [name for name in sorted(old | new) if old.get(name) != new.get(name)]


def _git(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, encoding="utf-8")


def committed(path: str) -> str | None:
    """A file of the last commit; None if it is not there. UserError outside of a git repository."""
    done = _git("show", f"HEAD:{path}")
    if done.returncode and "does not exist" not in done.stderr and "exists on disk" not in done.stderr:
        raise UserError(f"the committed results cannot be read: {done.stderr.strip() or 'git failed'}")
    return done.stdout if done.returncode == 0 else None


def check_folder(folder: Path) -> tuple[list[Difference], list[str], int]:
    """(differences, lines about notebooks, number of metrics) of the results below ``folder``."""
    differences, notebooks, count = [], [], 0
    for pair in PAIRS:
        for file in sorted((folder / "figures" / pair / "results").glob("[0-9][0-9].json")):
            path = f"figures/{pair}/results/{file.name}"
            if (text := committed(path)) is not None:
                before = json.loads(text)
                count += len(before["metrics"])
                try:
                    differences += compare(file.stem, before, json.loads(file.read_text(encoding="utf-8")))
                except (ValueError, KeyError, TypeError, AttributeError) as error:
                    raise UserError(
                        f"{file.name} of {pair} holds no results ({type(error).__name__}): run make figures"
                        " again"
                    ) from None
    if not count:
        raise UserError("there are no results to compare: run make figures first")
    for file in sorted((folder / "notebooks").glob("[0-9][0-9]_*.ipynb")):
        text = committed(f"notebooks/{file.name}")
        if text is None or (cells := cells_that_differ(text, file.read_text(encoding="utf-8"))):
            change = "new" if text is None else f"{len(cells)} cells differ ({', '.join(cells[:8])})"
            notebooks.append(f"{file.name}: {change}")
    return differences, notebooks, count


def fresh_run(clone: Path = CLONE) -> Path:
    """A clone of the last commit in which every notebook has been run; an interrupted one goes on."""
    head, shown = _git("rev-parse", "HEAD").stdout.strip(), path_shown(clone)
    marker = clone / ".git" / "checked"
    if clone.is_dir() and not (marker.is_file() and marker.read_text() == head):
        raise UserError(f"{shown} holds the run of another commit: remove it first (rm -r {shown})")
    if not clone.is_dir():
        done = _git("clone", "-q", str(ROOT), str(clone))
        if done.returncode:
            raise UserError(f"the repository could not be cloned: {done.stderr.strip()}")
        marker.write_text(head)
    environment = {**os.environ, "PYTHONPATH": str(clone)}
    done = subprocess.run([sys.executable, "-m", "lib", "figures"], cwd=clone, env=environment)
    if done.returncode:
        raise UserError("the fresh run did not end: see above; make check goes on with it")
    return clone


def report(here: bool = False, verdicts: bool = False) -> int:
    """Print what moved in a fresh run, or in what the last runs left ``here``; 1 if a verdict turned or,
    unless only ``verdicts`` count, anything is outside."""
    differences, notebooks, count = check_folder(ROOT if here else fresh_run())
    for line in [*map(str, differences), *notebooks]:
        print(line)
    kinds = [d.kind for d in differences]
    print(
        f"{count} numbers: {kinds.count('moved')} moved within their tolerance, {kinds.count('outside')} are"
        f" outside, the others are the same; {kinds.count('turned')} verdicts turned; {len(notebooks)}"
        " notebooks differ"
    )
    failed = "turned" in kinds or (not verdicts and "outside" in kinds)
    if failed:
        then = json.loads(committed("figures/tiny/results/02.json") or "{}").get("versions", {})
        now = versions()
        other = [f"{name} {then[name]} -> {now.get(name)}" for name in then if then[name] != now.get(name)]
        print("versions that differ: " + (", ".join(other) or "none"))
    return int(failed)
