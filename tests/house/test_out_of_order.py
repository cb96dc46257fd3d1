"""Cells run again in any order, as one does while exploring: nothing breaks, and what is not there yet is
said in a sentence.

    python -m lib figures --profile smoke   # leaves the artefacts that the notebooks then only read
    python -m pytest -m slow --numprocesses 2 --dist load tests/house/test_out_of_order.py
"""

import json
import random

import nbformat
import pytest
from nbclient import NotebookClient
from opened import STEMS, copied, copied_runs

from lib.runs import Run
from lib.settings import ROOT
from lib.tools.notebooks import environment, own_kernel, parameters_of

pytestmark = pytest.mark.slow

MISSING = "Run > Run All Above Selected Cell"  # what Results says of a number whose cell has not been run


@pytest.fixture(scope="session")
def own():
    yield from copied_runs("again")


@pytest.mark.parametrize("stem", STEMS)
def test_after_a_whole_run_every_cell_can_be_run_again_in_any_order(own, stem):
    file = copied(stem, own)
    notebook = nbformat.read(file, as_version=4)
    client = NotebookClient(
        notebook,
        timeout=600,
        kernel_name="python3",
        allow_errors=True,
        resources={"metadata": {"path": str(ROOT / "notebooks")}},
    )
    numbers = [i for i, cell in enumerate(notebook.cells) if cell.cell_type == "code"]
    results = Run(parameters_of(file)["pair"], own).results / f"{stem[:2]}.json"
    results.unlink(missing_ok=True)

    def errors(order):
        for i in order:
            notebook.cells[i].outputs = []
            client.clear_display_id_mapping(i)  # what was found is an output that a later cell writes anew
            client.execute_cell(notebook.cells[i], i)
            yield from (
                f"cell {i}: {o.ename}: {o.evalue}"
                for o in notebook.cells[i].outputs
                if o.output_type == "error"
            )

    def written():
        return sorted(json.loads(results.read_text())["metrics"])

    with own_kernel(), environment(BROWSER_PATH="none"), client.setup_kernel():  # no PNGs
        assert list(errors(numbers)) == []
        whole = written()
        said = list(errors(random.Random(0).sample(numbers, len(numbers))))
        assert [line for line in said if "UserError" not in line or MISSING not in line] == []
        assert list(errors(numbers)) == []
    assert written() == whole
