"""Numbers of a notebook: each with its 95% interval and its n, written to one file and read back."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import pandas as pd

from .runs import Progress, Run, jsonable, make_command, read_manifest, read_table, versions, write_text
from .settings import (
    Count,
    Flag,
    Number,
    Positive,
    Share,
    Shares,
    Text,
    UserError,
    check_kinds,
    integer,
    number,
    path_shown,
)
from .stats import pooled

__all__ = ["Results", "UserError", "begin", "read_part", "read_results", "scoreboard"]
__all__ += ["Count", "Flag", "Number", "Positive", "Share", "Shares", "Text", "integer", "number"]
Kind = TypeVar("Kind")
FOUND = "**What this run found.** "
NOT_YET = "*What this run found will stand here when all cells have been run.*"
# ends of the names of metrics that say how fast a machine was: no results, so not compared
TIMES = ("_per_second", "_seconds")


# --- numbers ------------------------------------------------------------------------------------------------


def begin(notebook: str, names: Mapping, **kinds) -> Results:
    """Check a notebook's parameters, and begin its results: ``here = begin("02", globals(), k=Positive)``.

    ``names`` are the notebook's variables; its parameters are pair, run, and those that ``kinds`` names: a
    kind of ``lib.settings`` (``Count``, ``Share``, ``integer(10)``, ``Count | None``, ``list[int]``), or a
    tuple of choices. UserError says which parameter must be what. If ``threads`` is one of them, torch takes
    so many. Leaves a place for what will be ``found``."""
    parameters = {name: names[name] for name in ("pair", "run", *kinds)}
    run = Run(names["pair"], names["run"])
    check_kinds(parameters, kinds)
    if "threads" in parameters:
        import torch  # here: notebooks without a model do not wait for it

        torch.set_num_threads(parameters["threads"])
    if notebook.isdigit():  # not the explorer, which finds nothing by itself
        _show_found(NOT_YET)
        if not run.pair.startswith(("tiny", "smol")):
            words = f"*Words and predictions of this notebook are about the pair tiny, not {run.pair}.*"
            _show_found(words, name="another")
    return Results(notebook, run, parameters)


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
        """Record one number with its 95% interval and the n behind it; returns it. NaN becomes null."""
        if ci is not None:
            low, high = (_number(bound) for bound in ci)
            if low is not None and high is not None and low > high:
                raise ValueError(f"the interval of {name} is ({low}, {high}): low must not exceed high")
            ci = [low, high]
        self.metrics[name] = {"value": _number(value), "ci": ci, "n": None if n is None else int(n)}
        return value

    def apart(self) -> Results:
        """Results of one crosscoder of several, which ``pool`` puts together; they are not written."""
        return Results(self.notebook, self.run, self.parameters)

    def pool(self, each: Sequence[Results]) -> None:
        """Record every metric that was measured ``apart`` with several crosscoders (``pooled_metric``)."""
        for name in dict.fromkeys(name for results in each for name in results.metrics):
            self.metrics[name] = pooled_metric([dict(results.metrics).get(name) for results in each])

    def over(self, crosscoders: Sequence[Kind]) -> Iterator[tuple[Results, Kind]]:
        """(results ``apart``, crosscoder) of each; what is put into them is pooled when all are done."""
        each = []
        with Progress("crosscoders", len(crosscoders)) as progress:
            for crosscoder in crosscoders:
                each.append(self.apart())
                yield each[-1], crosscoder
                progress.update(len(each))
        self.pool(each)

    def worst(self, name: str, direction: int = 1) -> float:
        """Record <name>_worst: a metric's value for the crosscoder in which it is least, or greatest where
        ``direction`` is -1; what could not be measured counts as 0."""
        metric = self.metrics[name]
        values = [own[0] or 0.0 for own in metric.get("seeds", [[metric["value"]]])]
        return self.add(f"{name}_worst", direction * min(direction * v for v in values), n=len(values))

    def shows(self, text: str):
        """A sentence that was computed, below its figure: an ``IPython.display.Markdown``."""
        from IPython.display import Markdown

        return Markdown(f"**What this run shows.** {text}")

    def beside(self, *experiments: str):
        """The paper's numbers of some experiments beside ours in the paper's own form: rows of the table of
        notebook 16 on the embedded pair, for a notebook; a sentence where that has not run."""
        embedded = Run("tiny", "default", self.run.root)
        made = (embedded.figures / "results" / "16.json").is_file()
        table = read_results(embedded, "16")["tables"].get("beside") if made else None
        if not table:
            return f"Beside the paper's numbers: {make_command('study', 'tiny', 'default', '16')}"
        frame = pd.DataFrame(table["rows"], columns=table["columns"])
        what = f"{' and '.join(experiments)} in the paper's own form: its numbers, and ours (notebook 16)"
        shown = frame[frame["experiment"].isin(experiments)].style.hide(axis="index")
        return shown.set_caption(what).format(precision=3)

    def found(self, text: str) -> None:
        """Say what this run found, in a sentence or two: where ``begin`` left a place for it, on the first
        screen of the notebook."""
        _show_found(FOUND + text, update=True)

    def take(self, part: Part) -> Part:
        """Record the metrics of a part of the study; returns it."""
        self.metrics.update(part.metrics)
        return part

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
        return interval_text(self.metrics[name], digits)

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
        text = json.dumps(jsonable(content), indent=1, allow_nan=False) + "\n"
        return write_text(self.run.results / f"{self.notebook}.json", text)

    def frame(self) -> pd.DataFrame:
        """The metrics as a table for the notebook: one row per metric, without speeds, which differ from run
        to run."""
        shown = [(name, m) for name, m in self.metrics.items() if not name.endswith(TIMES)]
        rows = [(name, m["value"], *(m["ci"] or (None, None)), m["n"]) for name, m in shown]
        frame = pd.DataFrame(rows, columns=["metric", "value", "low", "high", "n"]).set_index("metric")
        return frame.astype({"value": float, "low": float, "high": float, "n": "Int64"}).round(4)

    def __repr__(self) -> str:
        return self.frame().to_string(na_rep="")

    def _repr_html_(self) -> str:
        return self.frame().to_html(na_rep="")


def pooled_metric(each: Sequence[Mapping | None]) -> dict:
    """One metric of several crosscoders {value, ci, n}, None for one that has no such number: the mean, an
    interval over crosscoders and documents (``stats.pooled``), the mean n, and what each of them says under
    "seeds": [value, low, high]. Of one crosscoder: its own metric."""
    if len(each) == 1:
        return dict(each[0])
    each = [m or {"value": None, "ci": None, "n": None} for m in each]
    own = [[m["value"], *(m["ci"] or (m["value"],) * 2)] for m in each]
    numbers = pd.DataFrame(own, dtype=float).to_numpy()
    value, *ci = pooled(numbers[:, 0], numbers[:, 1:])
    sizes = [m["n"] for m in each if m["n"] is not None]
    n = round(sum(sizes) / len(sizes)) if sizes else None
    return {"value": _number(value), "ci": [_number(bound) for bound in ci], "n": n, "seeds": own}


def _show_found(text: str, update: bool = False, name: str = "found") -> None:
    if "IPython" in sys.modules:  # in a notebook: an output that a later cell may write anew
        from IPython.display import Markdown, display

        display(Markdown(text), display_id=name, update=update)


class _Measured(dict):
    """By name of the metric; one that is missing was to be measured in a cell that has not been run."""

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
            f"{path_shown(file)} is missing: run notebook {notebook} first"
            f" ({make_command('figures', run.pair, run.name, notebook)})"
        )
    return json.loads(file.read_text(encoding="utf-8"))


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


def interval_text(metric: Mapping, digits: int = 2) -> str:
    def show(x):
        return "n/a" if x is None else f"{x:,}" if isinstance(x, int) else f"{x:,.{digits}f}"

    low_high = f" [{show(metric['ci'][0])}, {show(metric['ci'][1])}]" if metric["ci"] else ""
    return show(metric["value"]) + low_high


def scoreboard(rows: Sequence[Mapping]) -> pd.DataFrame:
    """Predictions beside what was observed. ``held``: True, False, or None for what could not be decided."""
    first = ["prediction", "observed", "held"]
    for row in rows:
        if missing := set(first) - set(row):
            raise ValueError(f"a row of the scoreboard lacks {', '.join(sorted(missing))}")
    words = {True: "yes", False: "no", None: "undecided"}
    frame = pd.DataFrame(
        [{**row, "held": words[None if row["held"] is None else bool(row["held"])]} for row in rows]
    )
    return frame[[*first, *(column for column in frame if column not in first)]]


# --- parts of the study, which other notebooks compute ------------------------------------------------------


PARTS = {  # part of the study: the notebook that computes it
    **dict.fromkeys(("nulls", "seeds", "similarity"), "10"),
    **{"architectures": "11", "planted": "12", "finders": "17", "verdicts": "18"},
    **dict.fromkeys(("causal", "transplants"), "13"),
    **dict.fromkeys(("training", "texts"), "14"),
    **dict.fromkeys(("paper", "loop"), "16"),
}


@dataclass
class Part:
    """Metrics {name: {value, ci, n}} and tables of one part; false if there are no tables.

    ``note`` says what was read, or why there is nothing."""

    name: str
    note: str
    metrics: dict[str, dict] = field(default_factory=dict)
    tables: dict[str, pd.DataFrame] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.tables)


def read_part(run: Run, part: str, **inputs: str) -> Part:
    """A part of the study ("nulls"), if it was made in this run and from ``inputs``; else an empty one.

    ``inputs``: fingerprints of the notebook's own artefacts, by name (store, crosscoder)."""
    folder = run.figures / "study" / part
    again = make_command("study", run.pair, run.name, PARTS.get(part, part))
    if not (folder / "manifest.json").is_file():
        return Part(part, f'Not computed for this run: the part "{part}" of the study ({again}).')
    manifest = read_manifest(folder, part)
    for name, value in inputs.items():
        if manifest["inputs"].get(name) != value:
            whose = "; of the run's own crosscoder, not of one from elsewhere" if name == "crosscoder" else ""
            return Part(
                part,
                f'Refused: the part "{part}" of the study was made from another {name} than this notebook has'
                f" ({again}{whose}).",
            )
    tables = {name: read_table(folder / f"{name}.csv") for name in manifest["tables"]}
    seconds = manifest.get("seconds", 0)
    took = f"; {seconds / 60:.0f} minutes" if seconds >= 90 else ""
    note = f'Read, not computed here: the part "{part}" of the study ({again}{took}).'
    return Part(part, note, manifest.get("metrics", {}), tables)
