"""The exercises at the end of each notebook, and how their solutions are tested.

An exercise is two cells. The first, markdown, is headed ``### Exercise 2 · medium, 10 minutes`` and holds the
question, a folded hint and a folded solution in Python. The second begins ``answer_2 = None  # what it must
be``; a check follows, which runs once there is an answer::

    python -m lib.tools.notebooks --profile smoke --solutions       # the notebooks, with every solution as if a reader had typed it: checks must pass
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import nbformat

from ..settings import UserError

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
        checked = (
            after.cell_type == "code"
            and after.source.startswith(f"answer_{number} = None  # ")
            and "    assert " in after.source
        )
        for what, there in (
            ("level (easy, medium or hard)", level in LEVELS),
            ("hint", folded.get("Hint")),
            ("solution in Python", code),
            ("cell with a check", checked),
        ):
            if not there:
                raise UserError(f"exercise {number} has no {what}")
        found.append(Exercise(number, level, int(heading[3]), folded["Hint"], code[1], i + 1))
    return found


def solved(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """A copy of the notebook in which every exercise is answered with its solution."""
    answered = nbformat.from_dict(notebook)
    for exercise in exercises(answered):
        cell = answered.cells[exercise.cell]
        cell.source = "\n".join([exercise.solution, *cell.source.split("\n")[1:]])
    return answered
