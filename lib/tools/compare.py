"""Has any number moved? A fresh run, compared with the results that are committed.

    make check                     # a clone in data/runs/check runs every notebook: 10 to 15 minutes
    python -m lib check --here     # what the last runs left in this folder: seconds

Every metric of figures/<pair>/results is put into one of three classes:

same     equal to 1 part in 1,000: one machine and the pinned versions give the same bytes, other processors
         round differently
moved    further, but within the committed 95% interval, or within 5% (0.01 near zero) where there is none:
         training amplifies rounding, and crosscoders that differ in nothing but rounding still differ in some
         features
outside  beyond that, missing, or new; and every prediction of a scoreboard that has another verdict

Exit code 1 if anything is outside. Notebooks are compared cell by cell in their canonical form; that one
differs is said, not judged.
"""

from __future__ import annotations

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
from ..settings import ROOT, UserError
from .notebooks import canonical

SAME = 1e-3  # relative
LOOSE, NEAR_ZERO = 0.05, 0.01  # relative, and absolute, for metrics without an interval
PAIRS = ("tiny",)  # whose results make figures writes
CLONE = ROOT / "data" / "runs" / "check"


@dataclass(frozen=True)
class Difference:
    """One number that is not the same. ``kind`` is "moved" or "outside"."""

    notebook: str
    name: str
    before: float | str | None
    after: float | str | None
    kind: str

    def __str__(self) -> str:
        shown = [
            f"{v:.6g}" if isinstance(v, float | int) and not isinstance(v, bool) else str(v)
            for v in (self.before, self.after)
        ]
        return f"{self.kind:>8}  {self.notebook}  {self.name}: {shown[0]} -> {shown[1]}"


def compare(notebook: str, before: Mapping, after: Mapping) -> list[Difference]:
    """Differences between two contents of a results file NN.json, committed first."""
    found = []
    old, new = before["metrics"], after["metrics"]
    for name in sorted(n for n in set(old) | set(new) if not n.endswith(TIMES)):
        if name not in old or name not in new:
            found.append(
                Difference(
                    notebook, name, *("there" if name in m else "missing" for m in (old, new)), "outside"
                )
            )
        elif kind := _moved(old[name]["value"], new[name]["value"], old[name]["ci"]):
            found.append(Difference(notebook, name, old[name]["value"], new[name]["value"], kind))
    verdicts = [{row["prediction"]: row["held"] for row in _rows(content)} for content in (before, after)]
    for prediction in sorted(set(verdicts[0]) | set(verdicts[1])):
        was, now = (v.get(prediction, "missing") for v in verdicts)
        if was != now:
            found.append(Difference(notebook, f"prediction {prediction!r}", was, now, "outside"))
    return found


def _moved(before: float | None, after: float | None, interval: list | None) -> str | None:
    if before is None or after is None or not (math.isfinite(before) and math.isfinite(after)):
        return (
            None
            if before == after
            or (before is not None and after is not None and math.isnan(before) and math.isnan(after))
            else "outside"
        )
    if abs(after - before) <= SAME * max(abs(before), 1e-6):
        return None
    if interval and None not in interval:
        return "moved" if min(interval) <= after <= max(interval) else "outside"
    return "moved" if abs(after - before) <= max(LOOSE * abs(before), NEAR_ZERO) else "outside"


def _rows(content: Mapping) -> Iterator[dict]:
    table = content["tables"].get("scoreboard") or {"columns": [], "rows": []}
    return (dict(zip(table["columns"], row)) for row in table["rows"])


def cells_that_differ(before: str, after: str) -> list[str]:
    """Ids of the cells whose canonical form differs between two notebooks, given as JSON."""
    cells = [
        {c.id: c for c in canonical(nbformat.reads(text, as_version=4)).cells} for text in (before, after)
    ]
    return [
        name for name in sorted(set(cells[0]) | set(cells[1])) if cells[0].get(name) != cells[1].get(name)
    ]


# --- against the last commit --------------------------------------------------------------------------------


def committed(path: str) -> str | None:
    """A file of the last commit; None if it is not there. UserError outside of a git repository."""
    done = subprocess.run(
        ["git", "show", f"HEAD:{path}"], cwd=ROOT, capture_output=True, text=True, encoding="utf-8"
    )
    if done.returncode and "does not exist" not in done.stderr and "exists on disk" not in done.stderr:
        raise UserError(f"the committed results cannot be read: {done.stderr.strip() or 'git failed'}")
    return done.stdout if done.returncode == 0 else None


def check_folder(folder: Path) -> tuple[list[Difference], list[str], int]:
    """(differences, lines about notebooks, number of metrics compared) of the results below ``folder`` and
    those of the last commit.
    """
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
            notebooks.append(
                f"{file.name}: "
                + ("new" if text is None else f"{len(cells)} cells differ ({', '.join(cells[:8])})")
            )
    return differences, notebooks, count


def fresh_run(clone: Path = CLONE) -> Path:
    """A clone of the last commit in which every notebook has been run from nothing; an interrupted one goes
    on.
    """
    head = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    marker = clone / ".git" / "checked"
    if clone.is_dir() and not (marker.is_file() and marker.read_text() == head):
        raise UserError(
            f"{clone.relative_to(ROOT)} holds the run of another commit: remove it first (rm -r"
            f" {clone.relative_to(ROOT)})"
        )
    if not clone.is_dir():
        done = subprocess.run(["git", "clone", "-q", str(ROOT), str(clone)], capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"the repository could not be cloned: {done.stderr.strip()}")
        marker.write_text(head)
    environment = {**os.environ, "PYTHONPATH": str(clone)}
    done = subprocess.run([sys.executable, "-m", "lib", "figures"], cwd=clone, env=environment)
    if done.returncode:
        raise UserError("the fresh run did not end: see above; make check goes on with it")
    return clone


def report(here: bool = False) -> int:
    """Print what moved in a fresh run, or in what the last runs left ``here``; 1 if anything is outside."""
    differences, notebooks, count = check_folder(ROOT if here else fresh_run())
    for line in [*map(str, differences), *notebooks]:
        print(line)
    kinds = [d.kind for d in differences]
    print(
        f"{count} numbers: {kinds.count('moved')} moved within their tolerance, {kinds.count('outside')} are"
        f" outside, the others are the same; {len(notebooks)} notebooks differ"
    )
    if "outside" in kinds:
        then = json.loads(committed("figures/tiny/results/02.json") or "{}").get("versions", {})
        now = versions()
        other = [f"{name} {then[name]} -> {now.get(name)}" for name in then if then[name] != now.get(name)]
        print("versions that differ: " + (", ".join(other) or "none"))
    return 1 if "outside" in kinds else 0
