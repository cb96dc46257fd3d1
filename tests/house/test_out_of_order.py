"""Cells run again in any order, as one does while exploring: nothing breaks, and what is not there yet is
said in a sentence.

    python -m lib figures --profile smoke   # leaves the artefacts that the notebooks then only read
    python -m pytest -m slow tests/house/test_out_of_order.py
"""

import json
import random

import nbformat
import pytest
from nbclient import NotebookClient

from lib.runs import Run
from lib.settings import ROOT
from lib.tools.notebooks import own_kernel, prepared
from lib.tools.profiles import read_profile

pytestmark = pytest.mark.slow

STEMS = sorted(p.stem for p in (ROOT / "notebooks").glob("[0-9][0-9]_*.ipynb"))
MISSING = "Run > Run All Above Selected Cell"  # what Results says of a number whose cell has not been run


@pytest.mark.parametrize("stem", STEMS)
def test_after_a_whole_run_every_cell_can_be_run_again_in_any_order(stem):
    run = Run("tiny", "smoke")
    if not run.path("crosscoder").is_dir():
        pytest.skip("the notebooks' artefacts are not there: make figures PROFILE=smoke")
    given = {"pair": "tiny", "run": "smoke"} | read_profile(
        ROOT / "notebooks" / "profiles", "smoke", STEMS
    ).get(stem, {})
    notebook = nbformat.read(
        prepared(ROOT / "notebooks" / f"{stem}.ipynb", run.folder / "again" / f"{stem}.ipynb", given),
        as_version=4,
    )
    client = NotebookClient(
        notebook,
        timeout=600,
        kernel_name="python3",
        allow_errors=True,
        resources={"metadata": {"path": str(ROOT / "notebooks")}},
    )
    numbers = [i for i, cell in enumerate(notebook.cells) if cell.cell_type == "code"]

    def errors(order):
        for i in order:
            notebook.cells[i].outputs = []
            client.execute_cell(notebook.cells[i], i)
            yield from (
                f"cell {i}: {o.ename}: {o.evalue}"
                for o in notebook.cells[i].outputs
                if o.output_type == "error"
            )

    def written():
        return {
            file.name: sorted(json.loads(file.read_text())["metrics"]) for file in run.results.glob("*.json")
        }

    with own_kernel(), client.setup_kernel():
        assert list(errors(numbers)) == []
        whole = written()
        assert whole, "no results were written"
        said = list(errors(random.Random(0).sample(numbers, len(numbers))))
        assert [line for line in said if "UserError" not in line or MISSING not in line] == []
        assert list(errors(numbers)) == []
    assert written() == whole
