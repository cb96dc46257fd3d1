"""The command line: ``python -m lib COMMAND``. ``python -m lib COMMAND --help`` says what a command takes.

Exit codes: 0 done; 1 a notebook failed, ``check`` found a number outside of its tolerance, or ``checkup`` a
fault; 2 wrong usage, or whatever one sentence can say; 130 interrupted. What was finished before an error is
kept."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer

from ..settings import REGISTRY, ROOT, UserError, path_shown, user_path

app = typer.Typer(
    help="What distillation changes inside a language model: every command of the study.",
    rich_markup_mode=None,
    add_completion=False,
    no_args_is_help=True,
)

# --- what several commands take -----------------------------------------------------------------------------


def _option(kind, metavar: str | None, words: str, *names: str, **more):
    return Annotated[kind, typer.Option(*names, metavar=metavar, help=words, **_path(kind), **more)]


def _argument(kind, metavar: str | None, words: str):
    return Annotated[kind, typer.Argument(metavar=metavar, help=words, **_path(kind))]


def _path(kind) -> dict:
    return {"parser": user_path} if kind in (Path, list[Path]) else {}


def _use_registry(file: Path | None) -> None:
    if file:  # for this process, and the kernels that it starts
        os.environ[REGISTRY] = str(file)


Pair = _option(str, "NAME", "entry of data/pairs.yaml")
_profiles = "of notebooks/profiles: smoke, default, paper, or a .yaml file of your own; names the run"
Profile = _option(str, "NAME", _profiles)
Only = _option(list[str], "NN ...", "notebooks by number or name")
Parameter = _option(list[str], "NAME VALUE", "a parameter of the one chosen notebook", "-p")
_registry = "a registry of your own for data/pairs.yaml (or PAIRS_REGISTRY)"
Registry = _option(Path, "FILE", _registry, callback=_use_registry)
Out = _option(Path, "FOLDER", "where to write (default: in the folder of the run)")
Timeout = _option(int, "SECONDS", "for one cell (default: the profile's)", min=1)
Workers = _option(
    int, "N", "notebooks at once (default: two on an embedded pair, if the machine allows)", min=1
)
Runs = _option(Path, "FOLDER", "of states and logs (default: below data/runs)")
Threads = _option(int, "N", "of torch", min=1)
PairFolder = _argument(Path, "OUT", "data/pairs/<pair>: its name is the pair's")
_Solutions = _option(bool, None, "answer the exercises, so that their checks run", "--solutions")
_Notebooks = Annotated[Path, typer.Option(hidden=True)]  # for the tests

# options that take any number of words; typer wants the option before each of them
_LISTS = {"--only", "--stages", "--seeds", "--truths"}


def _spelled_out(words: Sequence[str]) -> list[str]:
    """``--only 03 04`` as ``--only 03 --only 04``, and ``-p NAME VALUE`` as ``-p NAME=VALUE``. UserError for
    what is given twice, of which one would be lost."""
    words, out, given = list(words), [], []
    while words:
        word = words.pop(0)
        given.append(f"-p {words[0]}" if word == "-p" and words else word.partition("=")[0])
        if given[-1].startswith(("--", "-p ")) and given[-1] in given[:-1] and word not in _LISTS:
            raise UserError(f"{given[-1]} is given twice: give it once")
        if word in _LISTS:
            while words and not words[0].startswith("-"):
                out += [word, words.pop(0)]
        elif word == "-p":
            if len(words) < 2 or "=" in words[0] or words[1].startswith("--"):
                raise UserError("-p needs a name and a value: -p feature 17")
            out += [word, f"{words.pop(0)}={words.pop(0)}"]
        else:
            out.append(word)
    return out


def _texts(parameters: Sequence[str]) -> list[tuple[str, str]]:
    return [tuple(text.split("=", 1)) for text in parameters]


def _use(threads: int) -> None:
    import torch

    torch.set_num_threads(threads)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code; errors are one line on standard error."""
    registry = os.environ.get(REGISTRY, "")
    try:
        words = _spelled_out(sys.argv[1:] if arguments is None else arguments)
        code = app(words, prog_name="python -m lib", standalone_mode=False) or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return getattr(error, "code", 2)
    except typer.exceptions.TyperException as error:  # wrong usage, as typer sees it
        told = error.format_message()
        print(told if told.startswith("Usage") else f"error: {told}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    finally:
        os.environ.pop(REGISTRY, None)
        os.environ.update({REGISTRY: registry} if registry else {})
    if code == 130:
        print("\ninterrupted: what is finished is kept; the same command goes on from there", file=sys.stderr)
    return code


def _notebooks(row: str):
    """The command that runs the notebooks of a row."""

    def command(
        pair: Pair = "tiny",
        profile: Profile = "default",
        only: Only = (),
        p: Parameter = (),
        solutions: _Solutions = False,
        out: Out = None,
        registry: Registry = None,
        timeout: Timeout = None,
        workers: Workers = None,
        notebooks: _Notebooks = ROOT / "notebooks",
    ):
        from . import notebooks as driver

        row_of = getattr(driver, row)
        driver.run_all(row_of, pair, profile, only, _texts(p), solutions, out, timeout, workers, notebooks)

    return command


_figures = "Run notebooks 00 to 06, or those of --only, on a pair. They write figures, tables and numbers."
_study = """Run the long experiments, notebooks 10 to 13, 16 to 18. Hours; an interrupted run goes on.

Notebooks 14 and 15 are about the pair smol and read files of your own: --pair smol --only 15
"""
app.command("figures", help=_figures)(_notebooks("WALK"))
app.command("study", help=_study)(_notebooks("STUDY"))


@app.command()
def explore(pair: Pair = "tiny", profile: Profile = "default", registry: Registry = None):
    """Write a notebook that explores the features of a run. Prints where it is; make explore opens it."""
    from .notebooks import explorer_page

    print(explorer_page(pair, profile).relative_to(ROOT).as_posix())


@app.command()
def canonical(files: _argument(list[Path], "FILE ...", "notebooks")):
    """Strip notebooks of what does not belong in git."""
    from .notebooks import canonicalise

    for file in canonicalise(files):
        print(f"rewritten: {file}")


@app.command()
def check(
    here: _option(bool, None, "compare what the last runs left; run nothing", "--here") = False,
    verdicts: _option(bool, None, "only verdicts decide the exit code", "--verdicts") = False,
):
    """Compare a fresh run with the committed results. Exit code 1 if a verdict turned, or a number is out of
    its tolerance."""
    from .compare import report

    return report(here, verdicts)


@app.command()
def report(out: _option(Path, "FOLDER", "is replaced") = ROOT / "data" / "report"):
    """Write the whole study as HTML, to open without a network."""
    from .publish import build

    print(f"{build(out.resolve())} pages: open {out / 'index.html'}")


@app.command()
def publish():
    """Write the tables of README.md and docs/ from the results. After figures, study, or make bench."""
    from . import publish as pages

    pages.publish()


@app.command()
def distil(
    out: PairFolder,
    runs: Runs = None,
    stages: _option(
        list[str], "NAME ...", "train only these; ships nothing but distilled_1 and the like"
    ) = (),
    threads: Threads = 1,
):
    """Train an embedded pair, or go on with it. An hour on two cores for data/pairs/tiny."""
    from ..distil.organism import make_pair

    _use(threads)
    make_pair(out, runs, stages)


@app.command()
def adapters(
    out: PairFolder,
    traces: _option(Path, "FILE", "JSONL with question, thinking and answer") = None,
    text: _option(Path, "FILE", "text with a paragraph a line, for the null") = None,
    tokens: _option(int, "N", "to train on (default: the recipe's)", min=1) = None,
    stages: _option(list[str], "NAME ...", "also null_b, null_traces") = ("distilled", "null_a"),
    runs: Runs = None,
    registry: Registry = None,
    threads: Threads = 2,
):
    """Distil a real model by adapters, or go on with them. Without --traces: from OpenThoughts-114k."""
    from ..distil.adapters import make_adapters

    _use(threads)
    make_adapters(out, traces, text, tokens, stages, runs)


@app.command()
def writing(
    pair: _argument(str, None, "entry of data/pairs.yaml with a pretrained base"),
    out: _argument(Path, None, "folder of traces.jsonl.gz and general.jsonl.gz"),
    tokens: _option(int, "N", "of each kind", min=1) = 300_000,
    kind: _option(Literal["trace", "general"], None, "only this one") = None,
    runs: Runs = None,
    registry: Registry = None,
    threads: Threads = 2,
):
    """Let a pair write the corpus that is harvested from it. An interrupted run goes on."""
    from ..distil.writing import write_for

    _use(threads)
    write_for(pair, out, tokens, kind, runs)


@app.command()
def agreement(
    path: _argument(Path, None, "traces.jsonl(.gz) with annotations, or a folder of labels"),
    table: _argument(Path, None, "CSV file to write") = None,
):
    """Measure precision and recall of the lexicon. Against annotated traces or labelled sentences."""
    from ..text.lexicon_agreement import shown, table_of

    rows = table_of(path, table)
    if rows.attrs:
        print(", ".join(f"{value:,} {name.replace('_', ' ')}" for name, value in rows.attrs.items()))
    print(shown(rows))


@app.command()
def harvest(
    pair: Pair = "tiny",
    profile: Profile = "default",
    p: Parameter = (),
    out: Out = None,
    part: _option(str, "I/N", "only part I of N, from 0: one of N jobs") = "",
    merge: _option(bool, None, "make the shards of N jobs a store", "--merge") = False,
    registry: Registry = None,
):
    """Harvest activations as notebook 01 does. Whole, or as one of several jobs."""
    from .harvest_parts import harvest_for

    print(harvest_for(pair, profile, _texts(p), out, part, merge))


@app.command()
def checkup(
    source: _argument(str, None, "folder, file of weights, or org/name on the hub"),
    pair: Pair = "tiny",
    profile: Profile = "default",
    p: _option(
        list[str], "NAME VALUE", "a fact: layer, order, scales; a claim: fve, l0, shown, distinct", "-p"
    ) = (),
    log: _option(Path, "FILE", "of its training") = None,
    null: _option(str, "SOURCE", "a crosscoder of base and null_a, in our format") = "",
    seeds: _option(list[str], "SOURCE ...", "crosscoders with other seeds") = (),
    reach: _option(int, "N", "layers to try on each side", min=0) = 2,
    tokens: _option(int, "N", "to harvest, of which a tenth is looked at", min=1) = 100_000,
    out: _option(Path, "FILE", "the page as HTML (default: checkup.html in the folder of the run)") = None,
    registry: Registry = None,
):
    """Check a crosscoder, anybody's, on fresh tokens of a pair. Exit code 1 if it has a fault."""
    from ..runs import Run, write_text
    from ..study.checkup import page_of
    from .profiles import read_value, run_of

    run, facts = run_of(profile), {name: read_value(text, None) for name, text in _texts(p)}
    page = page_of(source, pair, run, facts, log, null, seeds, reach, tokens)
    out = write_text(out or Run(pair, run).path("checkup") / "checkup.html", page.html())
    print(f"{page}\n\nWith figures: {path_shown(out)}")
    return int(bool(page.named("fault")))


@app.command("bench-finders")
def bench_finders(
    names: _argument(list[str], "NAME ...", "of finders, or files of claims"),
    truths: _option(list[str], "NAME ...", "only these (default: all)") = (),
    seeds: _option(int, "N", "trainings on each truth", min=1) = 4,
    small: _option(bool, None, "a tiny budget, to see that it works", "--small") = False,
):
    """Test finders of what distillation changed. Minutes each; an interrupted test goes on.

    Prints their scores beside the committed ones of the others. docs/finders.md says how to enter one."""
    from ..finders.bench import report_on

    _use(1)
    print(report_on(names, truths, seeds, small))


@app.command(context_settings={"ignore_unknown_options": True, "allow_extra_args": True})
def train(
    context: typer.Context,
    store: _option(Path, "FOLDER", "of the activations"),
    folder: _option(Path, "FOLDER", "of the crosscoder and its checkpoints"),
    processes: _option(int, "N", "how many torchrun starts", min=1) = 1,
    share: _option(Literal["rows", "features"], None, "what the processes share out") = "rows",
    cpu: _option(bool, None, "even if there are GPUs", "--cpu") = False,
    timeout: _option(float, "SECONDS", "to wait for another process", min=1) = None,
    checkpoint_seconds: _option(float, "SECONDS", "between checkpoints", min=0) = 30,
):
    """Train a crosscoder, on several processes under torchrun.

    Every field of TrainConfig is an option as well: --n-features 32768 --k 50."""
    from ..crosscoder.launch import TIMEOUT, train_or_end

    options = {"share": share, "cpu": cpu, "timeout": timeout or TIMEOUT}
    options["checkpoint_seconds"] = checkpoint_seconds
    train_or_end(_config(context.args), processes, store=store, folder=folder, **options)


def _config(words: Sequence[str]):
    """TrainConfig from words like --n-features 32768."""
    from ..crosscoder.training import TrainConfig
    from .profiles import checked, read_value

    words = [part for word in words for part in word.split("=", 1)]
    if len(words) % 2 or not all(word.startswith("--") for word in words[::2]):
        raise UserError(f"{' '.join(words)!r} is not understood: give options as --n-features 32768 --k 50")
    names, defaults = [word[2:].replace("-", "_") for word in words[::2]], vars(TrainConfig())
    given = {name: read_value(text, defaults.get(name)) for name, text in zip(names, words[1::2])}
    return TrainConfig(**checked("TrainConfig", defaults, given))
