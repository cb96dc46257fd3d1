"""The house: one way of data, faces of at most a dozen names, notebooks that import from their package."""

import ast
import importlib
import json
import os
import re
import subprocess
import sys

import nbformat
import pytest

from lib.settings import ROOT

PACKAGES = sorted(p.parent.name for p in (ROOT / "lib").glob("*/__init__.py"))
NOTEBOOKS = sorted(p.stem for p in (ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
PACKAGE_OF = {
    "00": "distil",
    "01": "activations",
    "02": "crosscoder",
    "03": "features",
    "04": "steering",
    "05": "geometry",
    "17": "finders",
}  # all others: study

faces = pytest.mark.parametrize("package", PACKAGES)
each = pytest.mark.parametrize("stem", NOTEBOOKS)


def python(*words):
    """Python with these arguments, run in the repository: (exit code, what it prints)."""
    done = subprocess.run(
        [sys.executable, *words],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    return done.returncode, done.stdout + done.stderr


def test_a_package_imports_only_what_stands_before_it():
    command = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
    code, text = python("-c", command)
    assert code == 0 and "1 kept, 0 broken" in text, text


def test_the_contract_names_every_package_and_allows_no_exception():
    text = (ROOT / "pyproject.toml").read_text()
    for name in [*PACKAGES, *(p.stem for p in (ROOT / "lib").glob("*.py") if not p.stem.startswith("__"))]:
        assert f'"lib.{name}"' in text, f"pyproject.toml does not say where lib.{name} stands"
    assert "ignore_imports" not in text


def test_ruff_finds_no_mistake():
    code, text = python("-m", "ruff", "check", "--no-cache", "--output-format=concise", ".")
    assert code == 0, text


def test_everything_has_the_form_of_ruff():
    code, text = python("-m", "ruff", "format", "--check", "--no-cache", ".")
    assert code == 0, text


def test_opening_a_store_loads_no_adapters_no_statistics_and_no_notebooks():
    heavy = {"transformers", "peft", "sklearn", "papermill", "nbformat", "nnsight"}
    script = """
import importlib, json, sys
face = importlib.import_module("lib.activations")
from_store = [name for name in dir(face) if "store" in name.lower()]
for name in from_store:
    getattr(face, name)
print(json.dumps([from_store, sorted(sys.modules)]))
"""
    code, text = python("-c", script)
    assert code == 0, text
    names, loaded = json.loads(text.splitlines()[-1])
    assert names and "lib.activations.store" in loaded
    assert heavy & set(loaded) == set()


# --- faces --------------------------------------------------------------------------------------------------


@faces
def test_a_face_says_what_the_room_is_for_and_has_at_most_twelve_names(package):
    face = importlib.import_module(f"lib.{package}")
    assert face.__doc__ and len(face.__doc__.split()) >= 15, "what is the room for, which file comes first?"
    assert 1 <= len(face.__all__) <= 12, face.__all__
    files = {p.stem for p in (ROOT / "lib" / package).glob("*.py")} - {"__init__"}
    for file in files:
        assert re.search(rf"\b{file}\b", face.__doc__), (
            f"the docstring of lib/{package} has no line on {file}"
        )
    for name in face.__all__:
        assert getattr(face, name) is not None
    # a name that is a file and something else would mean one or the other, by the order of imports
    tree = ast.parse((ROOT / "lib" / package / "__init__.py").read_text())
    given = {k.arg: k.value for n in ast.walk(tree) if isinstance(n, ast.Call) for k in n.keywords}
    attributes = ast.literal_eval(given["submod_attrs"]) if "submod_attrs" in given else {}
    assert files & {name for names in attributes.values() for name in names} == set()


@faces
def test_a_face_opens_nothing_before_it_is_asked(package):
    tree = ast.parse((ROOT / "lib" / package / "__init__.py").read_text())
    imports = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    assert imports == ["import lazy_loader as lazy"], imports


# --- notebooks ----------------------------------------------------------------------------------------------


def cells(stem, kind):
    notebook = nbformat.read(ROOT / "notebooks" / f"{stem}.ipynb", as_version=4)
    return [c for c in notebook.cells if c.cell_type == kind], notebook.cells


def imported(node):
    """The modules that ``from MODULE import ...`` names; ``from lib import results`` names lib.results."""
    return [f"lib.{a.name}" for a in node.names] if node.module == "lib" else [node.module]


@each
def test_a_notebook_imports_from_its_own_package_the_results_and_the_figures_only(stem):
    allowed = {f"lib.{PACKAGE_OF.get(stem[:2], 'study')}", "lib.results", "lib.figures", "lib.verdicts"}
    found, importing = set(), set()
    for number, cell in enumerate(cells(stem, "code")[0]):
        for node in ast.walk(ast.parse(cell.source)):
            modules = imported(node) if isinstance(node, ast.ImportFrom) else []
            modules += [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if ours := {m for m in modules if m.split(".")[0] == "lib"}:
                found |= ours
                importing.add(number)
    assert found <= allowed, f"{stem} imports {sorted(found - allowed)}"
    assert importing == {1}, "lib is imported in one cell, the setup"


@each
def test_a_notebook_is_short(stem):
    code, everything = cells(stem, "code")
    headings = (
        i
        for i, c in enumerate(everything)
        if c.cell_type == "markdown"
        and re.search(r"^#+ .*\bexercise", c.source, re.IGNORECASE | re.MULTILINE)
    )
    exercises = next(headings, len(everything))  # the second row has none
    before = [c for c in everything[:exercises] if c.cell_type == "code"]
    words = sum(len(c.source.split()) for c in everything if c.cell_type == "markdown")
    assert len(before) <= 20, f"{len(before)} code cells before the exercises"
    assert words <= 1500, f"{words} words of prose"
