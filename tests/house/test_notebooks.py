"""The notebooks as they are committed. (.ci/run executes them, on the smoke budget.)"""

import ast
import re
import symtable
from collections import defaultdict

import nbformat
import pytest
import yaml

from lib.settings import ROOT
from lib.tools import notebooks as driver
from lib.tools import profiles

NOTEBOOKS = driver.stems_of()
FIRST_ROW = [stem for stem in NOTEBOOKS if stem.startswith("0")]
SETUP = """\
import sys
from pathlib import Path
ROOT = next((p for p in (Path.cwd(), *Path.cwd().parents) if (p / "data" / "pairs.yaml").is_file()), None)
assert ROOT, "this notebook does not run in its repository: give papermill --cwd FOLDER"
sys.path.insert(0, str(ROOT))"""
each = pytest.mark.parametrize("stem", NOTEBOOKS)


def test_a_notebook_that_is_run_elsewhere_says_what_to_do(tmp_path, monkeypatch):
    (tmp_path / "environment.yml").write_text("name: of another project")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(AssertionError, match="does not run in its repository: give papermill --cwd"):
        exec(SETUP, {})
    monkeypatch.chdir(ROOT / "notebooks")
    exec(SETUP, found := {})
    assert found["ROOT"] == ROOT


def path(stem):
    return ROOT / "notebooks" / f"{stem}.ipynb"


def read(stem):
    return nbformat.read(path(stem), as_version=4)


def code(nb):
    return [c for c in nb.cells if c.cell_type == "code"]


@each
def test_is_there_valid_canonical_and_small(stem):
    nb = read(stem)
    nbformat.validate(nb)
    text = path(stem).read_text(encoding="utf-8")
    canonical = text == nbformat.writes(driver.canonical(nb)) + "\n"
    assert canonical, "not in canonical form: make canonical"
    assert len(text) < 1_000_000


@each
def test_was_executed_from_top_to_bottom_without_an_error(stem):
    cells = [c for c in code(read(stem)) if c.source.strip()]
    assert not [o for c in cells for o in c.outputs if o.output_type == "error"]
    assert [c.execution_count for c in cells] == list(range(1, len(cells) + 1)), (
        "not executed, or not in order: make figures"
    )


@each
def test_outputs_say_nothing_of_the_machine(stem):
    for cell in code(read(stem)):
        for output in cell.outputs:
            texts = [output.get("text", "")] + [
                v for mime, v in output.get("data", {}).items() if mime.startswith("text/")
            ]
            for text in texts:
                assert not re.search(r"(/home/\w|/Users/\w|/root/|/work/|/tmp/|[A-Z]:\\\\)", text), text[:300]
                assert "Traceback (most recent call last)" not in text


@each
def test_parameters_are_commented_literals(stem):
    parameters = driver.parameters_of(path(stem))
    assert list(parameters)[:2] == ["pair", "run"] and parameters.get("seed", 0) == 0
    assert (parameters["pair"], parameters["run"]) == (
        {"14": "smol", "15": "smol", "18": "tiny_medium"}.get(stem[:2], "tiny"),
        "default",
    )
    assert "seed" in parameters or stem not in FIRST_ROW
    (cell,) = [c for c in code(read(stem)) if "parameters" in c.metadata.get("tags", [])]
    lines = cell.source.splitlines()
    for statement in ast.parse(cell.source).body:
        commented = any("#" in line for line in lines[max(statement.lineno - 2, 0) : statement.end_lineno])
        assert commented or statement.targets[0].id == "seed", (
            f"no comment with unit or range: {lines[statement.lineno - 1]}"
        )
    first_code = code(read(stem))[0]
    assert first_code == cell, "the parameters come first"


@each
def test_setup_is_the_same_everywhere(stem):
    second = "\n".join(line for line in code(read(stem))[1].source.splitlines() if line.strip())
    assert second.startswith(SETUP), "the second code cell starts with the setup that all notebooks share"


@each
def test_opens_with_a_question_and_has_the_parts_of_the_template(stem):
    prose = [c.source for c in read(stem).cells if c.cell_type == "markdown"]
    assert prose[0].startswith("# ") and "?" in prose[0].splitlines()[0]
    everything = "\n".join(prose).lower()
    for part in (
        ("predict", "exercise", "does not show") if stem in FIRST_ROW else ("predict", "does not show")
    ):
        assert part in everything, f"nothing on {part!r}"
    sources = "\n".join(c.source for c in code(read(stem)))
    assert (
        ("scoreboard(" in sources or "judge(" in sources)
        and ("Results(" in sources or "begin(" in sources)
        and ".write()" in sources
    )


def is_table(statement):
    """Whether a statement gives a name to literals and calls nothing."""
    return isinstance(statement, ast.Assign) and not any(isinstance(n, ast.Call) for n in ast.walk(statement))


@each
def test_cells_are_short_and_hold_no_magic(stem):
    for cell in code(read(stem)):
        lines = [
            line for line in cell.source.splitlines() if line.strip() and not line.strip().startswith("#")
        ]
        # a table that is written out, such as the predictions, may be long
        tables = sum(node.end_lineno - node.lineno for node in ast.parse(cell.source).body if is_table(node))
        assert len(lines) - tables <= 40, cell.source[:200]
        assert not any(line.lstrip().startswith(("%", "!")) for line in lines), (
            "cell magics break headless runs"
        )
        assert "os.chdir" not in cell.source and "interact(" not in cell.source


@pytest.mark.parametrize("profile", ["default", "smoke", "paper"])
def test_profiles_fit_the_notebooks(profile):
    stems = sorted(p.stem for p in (ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
    content = profiles.read_profile(ROOT / "notebooks" / "profiles", profile, stems)
    for stem, values in content.items():
        if stem not in ("timeout", "workers"):
            profiles.checked(stem, driver.parameters_of(path(stem)), values or {})
    if profile == "smoke":
        assert set(content) - {"timeout"} == set(stems), "every notebook has a small budget"


def test_every_pair_has_an_entry_that_can_be_read():
    assert "tiny" in yaml.safe_load((ROOT / "data" / "pairs.yaml").read_text())


@each
def test_a_name_that_other_cells_read_is_made_by_one_cell(stem):
    """Otherwise a cell that is run again, out of order, reads what a later cell left under the same name."""
    made, read_from = defaultdict(set), defaultdict(set)
    for number, cell in enumerate(code(read(stem))):
        top = symtable.symtable(cell.source, stem, "exec")
        own = {s.get_name() for s in top.get_symbols() if s.is_assigned() or s.is_imported()}
        tables = [top]
        for table in tables:
            tables += table.get_children()
            for symbol in table.get_symbols():
                if (
                    symbol.is_referenced()
                    and (table is top or symbol.is_global())
                    and symbol.get_name() not in own
                ):
                    read_from[symbol.get_name()].add(number)
        for name in own:
            made[name].add(number)
    assert {name: sorted(cells) for name, cells in made.items() if len(cells) > 1 and read_from[name]} == {}
