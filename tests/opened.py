"""Copies of the notebooks for the tests that open them, each in a run of its own.

A test runs cells in an order in which half-measured results are written, and several tests run at once. So
each process of the tests has its own copy of the run: nothing that it writes is read by another one, and the
run itself stays as it was made.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from lib.runs import Run
from lib.settings import ROOT
from lib.tools.notebooks import parameters_of, prepared, stems_of
from lib.tools.profiles import read_profile

PROFILE = "smoke"
STEMS = stems_of()


def copied_runs(name: str) -> Iterator[str]:
    """For a fixture: copies of the pair tiny's run on the smoke budget, and of the committed results of smol,
    which notebooks 14 and 15 read; the name of the run that both have. Removed at the end.
    """
    made = Run("tiny", PROFILE).folder
    if not all((made / part / "manifest.json").is_file() for part in ("crosscoder", "features")):
        pytest.skip("the notebooks' artefacts are not there: make figures PROFILE=smoke")
    own = f"{name}_{os.environ.get('PYTEST_XDIST_WORKER', 'alone')}"
    runs = Run("tiny", own), Run("smol", own)
    for run in runs:
        shutil.rmtree(run.folder)
    shutil.copytree(
        made, runs[0].folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("*.lock", "*.part")
    )
    shutil.copytree(ROOT / "figures" / "smol", runs[1].figures, dirs_exist_ok=True)
    yield own
    for run in runs:
        shutil.rmtree(run.folder, ignore_errors=True)


def copied(stem: str, own: str) -> Path:
    """A copy of a notebook that works in the run ``own`` of its pair, with the parameters of the profile;
    explore.ipynb has those of notebook 03.
    """
    notebook = ROOT / "notebooks" / f"{stem}.ipynb"
    defaults, profile = parameters_of(notebook), read_profile(ROOT / "notebooks" / "profiles", PROFILE, STEMS)
    given = profile["03_inspect_features" if stem == "explore" else stem]
    given = {name: value for name, value in given.items() if name in defaults or stem != "explore"}
    target = Run(defaults["pair"], own).folder / "opened" / notebook.name
    return prepared(notebook, target, {"run": own, **given})
