"""Run the notebooks in order with papermill, keep them in a canonical form, and try their exercises.

Parameters come from the notebook's own cell, then from the pair's entry in the registry (``OF_A_PAIR``), then
from notebooks/profiles/<profile>.yaml (and <profile>.<pair>.yaml, if there is one), then from ``-p``; all are
checked before the first notebook runs (papermill itself only warns of unknown names).
A run with a notebook's own parameters is written to
notebooks/ itself, once it is complete; every other one to data/runs/<pair>/<run>/notebooks/. On an embedded
pair two notebooks run at once, where neither needs the other (``NEEDS``).

An exercise is two cells. The first, Markdown, is headed ``### Exercise 2 · medium, 10 minutes`` and holds the
question, a folded hint and a folded solution in Python. The second begins ``answer_2 = None  # what it must
be``; a check follows, which runs once there is an answer. ``solved`` answers with the solutions, so that the
checks are tested."""

import ast
import contextlib
import json
import os
import queue
import re
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import nbformat

from ..models.registry import read_entry, registry_file
from ..runs import ON_TERMINAL, PASSING, Run, made_folder, read_manifest, write_text
from ..settings import REGISTRY, ROOT, UserError, path_shown
from .profiles import checked, read_profile, read_value, run_of

# seconds for one cell; a profile or --timeout can give more. There always is one: a kernel can stall.
CELL_TIMEOUT = 3600
NOTEBOOKS = ROOT / "notebooks"
# numbers of the notebooks that a command runs when none is named: the walk, and the long experiments
WALK, STUDY = "0[0-9]_", "1[0-36-8]_"
EMBEDDED = ("tiny", "(0[06]|1[67])_")  # these notebooks are run with this pair, and with no other
# what a notebook of the walk reads of others; one that is not named here needs all that stand before it
NEEDS = {"00": (), "01": (), "02": ("01",), "03": ("02",), "04": ("03",), "05": ("01",)}
# {number: {parameter: key of a pair's entry that it takes its default from}}
OF_A_PAIR = {"01": {"tokens": "tokens"}, "02": {"n_features": "dictionary"}}
MEMORY = 2 << 30  # bytes that a notebook on an embedded pair may take
INJECTED = "injected-parameters"
_DROPPED_MIMES = ("application/vnd.plotly.v1+json", "application/vnd.jupyter.widget-view+json")


# --- parameters: checked before anything runs ---------------------------------------------------------------


def parameters_of(notebook: Path) -> dict:
    """Names and default values in the notebook's ``parameters`` cell, which must hold literals only."""
    cells = [c for c in _read(notebook).cells if _tagged(c, "parameters")]
    if len(cells) != 1:
        raise UserError(
            f"{notebook.name} has {len(cells)} cells tagged 'parameters': it must have exactly one"
        )
    values = {}
    for statement in ast.parse(cells[0].source).body:
        try:
            (target,) = statement.targets
            values[target.id] = ast.literal_eval(statement.value)
        except (AttributeError, TypeError, ValueError):
            raise UserError(
                f"the parameters cell of {notebook.name} holds {ast.unparse(statement)!r}: it must hold only"
                " name = literal"
            ) from None
    return values


def _read(notebook: Path) -> nbformat.NotebookNode:
    return nbformat.read(notebook, as_version=4)


def _tagged(cell, tag: str) -> bool:
    return tag in cell.metadata.get("tags", [])


def choose(stems: list[str], only: list[str]) -> list[str]:
    """The notebooks that are named by number ("3", "03") or by name, in their order."""
    chosen = set()
    for wish in " ".join(only).replace(",", " ").split():
        begins = f"{int(wish):02d}_" if wish.isdigit() else "no number"
        matches = [s for s in stems if s == wish.removesuffix(".ipynb") or s.startswith(begins)]
        if not matches:
            raise UserError(f"unknown notebook {wish!r}: there are {', '.join(stems)}")
        chosen.update(matches)
    return [s for s in stems if s in chosen]


# --- running ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def own_kernel() -> Iterator[None]:
    """Let the kernel name "python3" mean this very interpreter, whatever kernels the user has installed."""
    with tempfile.TemporaryDirectory() as folder:
        # quiet: ipykernel warns at each start that it talks over local TCP, and at each stop that it was
        # interrupted
        words = "-m ipykernel_launcher -f {connection_file} --IPKernelApp.log_level=50"
        words += " --IPKernelApp.capture_fd_output=False"  # so that a kernel reaches the terminal
        kernel = {"argv": [sys.executable, *words.split()], "language": "python"}
        spec = made_folder(Path(folder) / "kernels" / "python3") / "kernel.json"
        spec.write_text(json.dumps({**kernel, "display_name": "Python 3 (ipykernel)"}))
        wanted = {
            "JUPYTER_PATH": os.pathsep.join(filter(None, [folder, os.environ.get("JUPYTER_PATH")])),
            "IPYTHONDIR": str(Path(folder) / "ipython"),  # no start-up files and no history of the user's
            "PYDEVD_DISABLE_FILE_VALIDATION": "1",  # a warning of the debugger, in every kernel
            ON_TERMINAL: "1",
        }
        with environment(**wanted):
            yield


@contextlib.contextmanager
def environment(**wanted: str) -> Iterator[None]:
    """Environment variables for as long as the block lasts; kernels that start in it have them."""
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.update({name: value})


def execute(
    source: Path,
    target: Path,
    failed: Path,
    parameters: dict,
    timeout: float = CELL_TIMEOUT,
    solutions: bool = False,
) -> None:
    """Execute a notebook (``solutions``: with its exercises answered) within ``own_kernel``, and write its
    canonical form to ``target``, which changes only if every cell succeeded. UserError with the reason if one
    fails; the notebook, with the full traceback if that says more, is then in ``failed``."""
    import papermill  # 1 s; not needed to refuse a wrong parameter
    from nbclient.exceptions import CellTimeoutError, DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    original, reason = source.read_bytes(), None
    made_folder(failed.parent)
    notebook = solved(_read(source)) if solutions else source
    options = {"kernel_name": "python3", "progress_bar": False, "execution_timeout": timeout}
    # the kernel's own folder: papermill's ``cwd`` changes that of this process, which other threads share
    options["resources"] = {"metadata": {"path": str(source.parent)}}
    try:
        executed = papermill.execute_notebook(notebook, failed, parameters, **options)
    except PapermillExecutionError as error:
        # Ctrl-C reaches the kernel as well, and it may be the first to say so
        if error.ename == "KeyboardInterrupt":
            raise KeyboardInterrupt from None
        first = (error.evalue.strip() or "no message").splitlines()[0]
        if error.ename == "UserError":  # it says all
            raise UserError(first) from None
        reason = f"{error.ename}: {first}"
    except CellTimeoutError:
        reason = (
            f"a cell took more than {timeout:g} s: raise the limit with --timeout, or use a smaller budget"
        )
    except DeadKernelError:
        reason = "the kernel died, probably for lack of memory: use a smaller budget"
    if reason is not None:
        raise UserError(f"{reason}\n  full traceback: {path_shown(failed)}")
    text = nbformat.writes(canonical(executed, keep_parameters=source != target)) + "\n"
    if source == target and source.read_bytes() != original:
        write_text(failed, text)
        raise UserError(
            f"{source.name} was edited while it ran, so it was left as it is\n  the executed notebook:"
            f" {path_shown(failed)}"
        )
    write_text(target, text)
    failed.unlink(missing_ok=True)


def prepared(notebook: Path, target: Path, given: dict) -> Path:
    """A copy of a notebook to be opened by hand: without outputs, its parameters as ``given``."""
    defaults, copy = parameters_of(notebook), _read(notebook)
    parameters = defaults | checked(notebook.stem, defaults, given)
    for cell in copy.cells:
        if _tagged(cell, "parameters"):
            cell.source = "\n".join(f"{name} = {value!r}" for name, value in parameters.items())
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    return write_text(target, nbformat.writes(copy) + "\n")


def explorer_page(pair: str, run_name: str) -> Path:
    """Write a copy of notebooks/explore.ipynb for a run, with the parameters of its notebook 03: the file."""
    from ..models.pairs import load_pair

    load_pair(pair)
    run, inspection = Run(pair, run_name), "03_inspect_features"
    read_manifest(run.path("features"), inspection)
    # a run of another name has the parameters of the default
    profile = run_name if (NOTEBOOKS / "profiles" / f"{run_name}.yaml").is_file() else "default"
    values = parameters_for(inspection, pair, profile)
    chosen = {name: values[name] for name in ("max_tokens", "top_contexts", "nrn_over", "seed")}
    page = NOTEBOOKS / "explore.ipynb"
    return prepared(page, run.folder / page.name, {"pair": pair, "run": run_name, **chosen})


# --- canonical form: what git sees --------------------------------------------------------------------------


def canonical(notebook: nbformat.NotebookNode, keep_parameters: bool = False) -> nbformat.NotebookNode:
    """The notebook without anything that differs between two runs of the same content, or that nobody reads:
    plotly's and widgets' data (their PNG and text stay), lines of progress, timings, papermill's metadata and
    injected cell (unless ``keep_parameters``), standard error of cells that succeeded, paths of this machine.
    """
    nb = nbformat.reads(nbformat.writes(notebook), as_version=4)  # a copy
    nb.cells = [c for c in nb.cells if keep_parameters or not _tagged(c, INJECTED)]
    nb.nbformat, nb.nbformat_minor = 4, 5
    kernel = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
    nb.metadata = nbformat.from_dict({"kernelspec": kernel, "language_info": {"name": "python"}})
    count, styles = 0, {}
    for i, cell in enumerate(nb.cells):
        metadata, cell.id = {}, f"c{i:02d}"
        if tags := cell.metadata.get("tags"):
            metadata["tags"] = tags
        if cell.metadata.get("jupyter", {}).get("source_hidden"):
            metadata["jupyter"] = {"source_hidden": True}
        cell.metadata = nbformat.from_dict(metadata)
        if cell.cell_type == "code":
            if cell.execution_count is not None:
                cell.execution_count = count = count + 1
            cell.outputs = _canonical_outputs(cell.outputs, cell.execution_count, styles)
    return nb


def _canonical_outputs(outputs: list, execution_count: int | None, styles: dict) -> list:
    failed = any(o.output_type == "error" for o in outputs)
    kept: list = []
    for output in outputs:
        output.pop("transient", None)
        if output.get("metadata", {}).get(PASSING):
            continue
        if output.output_type == "stream":
            if output.name == "stderr" and not failed:
                continue
            output.text = _neutral(output.text, styles)
            # how it was cut is timing
            if kept and kept[-1].output_type == "stream" and kept[-1].name == output.name:
                kept[-1].text += output.text
                continue
        elif output.output_type in ("display_data", "execute_result"):
            dropped = [output.data.pop(mime) for mime in _DROPPED_MIMES if mime in output.data]
            words = str(output.data.get("text/plain", "")).partition("(")[0]
            widget_only = set(output.data) <= {"text/plain"} and words.isidentifier()
            if not output.data or (dropped and widget_only):
                continue
            output.metadata = nbformat.from_dict({})
            for mime, value in output.data.items():
                if isinstance(value, str) and mime.startswith(("text/", "image/svg")):
                    output.data[mime] = _neutral(value, styles)
                elif mime == "image/png":
                    output.data[mime] = value.rstrip("\n")
            if output.output_type == "execute_result":
                output.execution_count = execution_count
        kept.append(output)
    return kept


def _neutral(text: str, styles: dict) -> str:
    """Text without this machine's paths, memory addresses and the random names of pandas' styled tables."""
    text = text.replace(f"{ROOT}{os.sep}", "").replace(str(ROOT), ".")
    text = re.sub(r"\bat 0x[0-9a-f]{6,}", "at 0x0", text)
    return re.sub(
        r"\bT_[0-9a-f]{5}(?=[_\s\"#{]|$)", lambda m: styles.setdefault(m[0], f"T_{len(styles):05d}"), text
    )


def canonicalise(files: list[Path]) -> list[Path]:
    """Rewrite notebooks in canonical form; the files that changed."""
    changed = []
    for file in files:
        try:
            text = nbformat.writes(canonical(_read(file))) + "\n"
        except (OSError, ValueError, nbformat.reader.NotJSONError) as error:
            raise UserError(
                f"{file} is not a notebook that can be read: {str(error).splitlines()[0][:120]}"
            ) from None
        if file.read_text(encoding="utf-8") != text:
            write_text(file, text)
            changed.append(file)
    return changed


# --- exercises ----------------------------------------------------------------------------------------------

LEVELS = ("easy", "medium", "hard")
_HEADING = re.compile(r"### Exercise (\d+) · (\w+), (\d+) minutes\n")
_FOLDED = re.compile(r"<details><summary>(Hint|Solution)</summary>\n\n(.*?)\n</details>", re.DOTALL)
_CODE = re.compile(r"```python\n(.*?)\n```", re.DOTALL)


@dataclass(frozen=True)
class Exercise:
    """``solution`` is code that sets ``answer_<number>``; ``cell`` the index of the cell with the check."""

    number: int
    level: str
    minutes: int
    hint: str
    solution: str
    cell: int


def exercises(notebook: nbformat.NotebookNode) -> list[Exercise]:
    """The exercises of a notebook, in order. UserError names one that lacks a part."""
    found = []
    for i, cell in enumerate(notebook.cells):
        if cell.cell_type != "markdown" or not (heading := _HEADING.match(cell.source)):
            continue
        number, level, folded = int(heading[1]), heading[2], dict(_FOLDED.findall(cell.source))
        code = _CODE.search(folded.get("Solution", ""))
        after = notebook.cells[i + 1] if i + 1 < len(notebook.cells) else cell
        begins = after.cell_type == "code" and after.source.startswith(f"answer_{number} = None  # ")
        parts = {
            "level (easy, medium or hard)": level in LEVELS,
            "hint": folded.get("Hint"),
            "solution in Python": code,
            "cell with a check": begins and "    assert " in after.source,
        }
        if missing := [part for part, there in parts.items() if not there]:
            raise UserError(f"exercise {number} has no {missing[0]}")
        found.append(Exercise(number, level, int(heading[3]), folded["Hint"], code[1], i + 1))
    return found


def solved(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """A copy of the notebook in which every exercise is answered with its solution."""
    answered = nbformat.from_dict(notebook)
    for exercise in exercises(answered):
        cell = answered.cells[exercise.cell]
        cell.source = "\n".join([exercise.solution, *cell.source.split("\n")[1:]])
    return answered


# --- all of them --------------------------------------------------------------------------------------------


class NotebookFailed(UserError):
    """A notebook did not run to its end: exit code 1. Any other UserError is wrong usage: exit code 2."""

    code = 1


def stems_of(folder: Path = NOTEBOOKS) -> list[str]:
    """Names of the notebooks in a folder, without the ending, in order."""
    stems = sorted(p.stem for p in folder.glob("[0-9][0-9]_*.ipynb"))
    if not stems:
        raise UserError(f"{path_shown(folder)} holds no notebooks: their names must be like 00_name.ipynb")
    return stems


def parameters_for(
    stem: str,
    pair: str,
    profile: str = "default",
    texts: Sequence[tuple[str, str]] = (),
    folder: Path = NOTEBOOKS,
) -> dict:
    """All parameters of a notebook: its own, then those in the pair's entry, then the profile's, then (name,
    text) of a command line."""
    content = read_profile(folder / "profiles", profile, stems_of(folder), pair)
    defaults = parameters_of(folder / f"{stem}.ipynb")
    texts = dict(texts)
    if (other := {**content.get(stem, {}), **texts}.get("pair", pair)) != pair:
        raise UserError(f"pair {other}, by -p or in the profile, is not the pair {pair}: give --pair")
    entry, names = read_entry(pair, _registry(folder)), OF_A_PAIR.get(stem[:2], {})
    given = {name: entry[key] for name, key in names.items() if key in entry and name in defaults}
    given |= {"pair": pair, "run": run_of(profile), **content.get(stem, {})}
    given |= {name: read_value(text, defaults.get(name)) for name, text in texts.items()}
    return defaults | checked(stem, defaults, given)


def _registry(folder: Path) -> Path:
    """The registry of a process, or that beside a folder of notebooks."""
    return registry_file(os.environ.get(REGISTRY) or folder.parent / "data" / "pairs.yaml")


def run_all(
    row: str = WALK,
    pair: str = "tiny",
    profile: str = "default",
    only: Sequence[str] = (),
    texts: Sequence[tuple[str, str]] = (),
    solutions: bool = False,
    out: Path | None = None,
    timeout: float | None = None,
    workers: int | None = None,
    folder: Path = NOTEBOOKS,
) -> None:
    """Check everything, then execute notebooks of ``folder`` in order: those that ``only`` names, or all
    whose number matches the pattern ``row``, but for those about another pair (``EMBEDDED``); at most
    ``workers`` at once (None: the profile's, or ``_workers``). UserError for wrong usage, NotebookFailed."""
    folder, root = folder.resolve(), folder.resolve().parent
    stems = stems_of(folder)
    own, registry = os.environ.get(REGISTRY), _registry(folder)
    read_entry(pair, registry)
    budget = read_profile(folder / "profiles", profile, stems, pair)
    timeout = budget.get("timeout", CELL_TIMEOUT) if timeout is None else timeout
    row = row if pair == EMBEDDED[0] else f"(?!{EMBEDDED[1]}){row}"
    chosen = choose(stems, only) if only else [s for s in stems if re.match(row, s)]
    if texts and len(chosen) != 1:
        raise UserError(f"-p sets a parameter of one notebook, and {len(chosen)} are chosen: add --only NN")
    tasks = {}
    for stem in chosen:
        source, values = folder / f"{stem}.ipynb", parameters_for(stem, pair, profile, texts, folder)
        defaults = parameters_of(source)
        changed = {name: value for name, value in values.items() if value != defaults[name]}
        run = Run(pair, values["run"], root)
        place = Path(out).resolve() if out else run.folder / ("solved" if solutions else "notebooks")
        # with other values, outputs would contradict the parameters cell: such a run is kept elsewhere
        usual = not (changed or own or out or solutions)
        target, failed = source if usual else place / source.name, place / f"{stem}.failed.ipynb"
        tasks[stem] = partial(execute, source, target, failed, changed, timeout, solutions)
    most = workers or budget.get("workers") or _workers(root / "data" / "pairs" / pair)
    workers = min(max(most, 1), len(tasks))
    variables = {REGISTRY: str(registry)} if own else {}
    if workers > 1:
        variables["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", str(max(_cores() // workers, 1)))
    began = time.monotonic()
    with environment(**variables), own_kernel():
        _run(tasks, workers)
    print(
        f"{len(tasks)} notebook{'s' * (len(tasks) != 1)} in {time.monotonic() - began:.0f} s; "
        f"figures: {path_shown(run.figures)}, numbers: {path_shown(run.results)}"
    )
    from ..figures import undrawn  # here: it loads plotly

    if line := undrawn(run, [stem[:2] for stem in chosen]):
        print(line)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _workers(folder: Path) -> int:
    """Two notebooks at once, if there is this folder of an embedded pair, whose models are small, and the
    machine has two cores and memory for both; else one."""
    return 2 if folder.is_dir() and _cores() > 1 and _memory() > 2 * MEMORY else 1


def _memory() -> int:
    """Bytes of memory that are available, as Linux tells; elsewhere all that there are, as far as known."""
    try:
        text = Path("/proc/meminfo").read_text()
        return 1024 * int(re.search(r"MemAvailable:\s+(\d+) kB", text)[1])
    except (OSError, TypeError):
        pages = getattr(os, "sysconf", lambda name: 0)
        return pages("SC_PHYS_PAGES") * pages("SC_PAGE_SIZE")


def _run(tasks: Mapping[str, Callable[[], None]], workers: int) -> None:
    """Do the tasks of notebooks {stem: task}, each once those that it needs are done, ``workers`` at once.
    When one fails no other begins: NotebookFailed, after those that run have ended."""
    waiting, running, ended, failure = dict(tasks), set(), queue.SimpleQueue(), None

    def do(stem: str) -> None:
        start, error = time.monotonic(), None
        try:
            tasks[stem]()
        except BaseException as reason:  # raised below, where one can wait for it
            error = reason
        ended.put((stem, time.monotonic() - start, error))

    while waiting or running:
        for stem in [s for s in waiting if not _needed(s, tasks) & (waiting.keys() | running)]:
            if len(running) < workers:
                del waiting[stem]
                running.add(stem)
                print(f"{stem} ...", flush=True)
                if workers == 1:
                    do(stem)  # in this thread, where the notebook's client sees Ctrl-C
                else:
                    threading.Thread(target=do, args=(stem,), daemon=True).start()
        stem, seconds, error = ended.get()
        running.remove(stem)
        if error is not None and not isinstance(error, UserError):
            raise error
        print(f"{stem} {'failed after ' if error else ''}{seconds:.0f} s", flush=True)
        if error:
            failure = failure or NotebookFailed(f"{stem}: {error}")
            waiting.clear()
    if failure:
        raise failure


def _needed(stem: str, stems: Iterable[str]) -> set[str]:
    """Those of ``stems`` that a notebook needs."""
    return {other for other in stems if other < stem and other[:2] in NEEDS.get(stem[:2], (other[:2],))}
