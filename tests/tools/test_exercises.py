"""Exercises: three to a notebook, each with all its parts. (.ci/run executes the notebooks with their
solutions.)
"""

import nbformat
import pytest

from lib.settings import ROOT, UserError
from lib.tools.notebooks import LEVELS, exercises, solved

STEMS = sorted(p.stem for p in (ROOT / "notebooks").glob("0[0-9]_*.ipynb"))
TEXT = """### Exercise 1 · easy, 5 minutes

How many?

<details><summary>Hint</summary>

Count.
</details>
<details><summary>Solution</summary>

```python
x = 2
answer_1 = x
```
</details>"""
CHECK = "answer_1 = None  # a number\n\nif answer_1 is not None:\n    assert answer_1 == 2, 'not yet'"


def toy(text=TEXT, check=CHECK):
    new = nbformat.v4
    return new.new_notebook(cells=[new.new_markdown_cell(text), new.new_code_cell(check)])


@pytest.mark.parametrize("stem", STEMS)
def test_every_notebook_has_three_from_easy_to_hard(stem):
    found = exercises(nbformat.read(ROOT / "notebooks" / f"{stem}.ipynb", as_version=4))
    assert [e.number for e in found] == [1, 2, 3] and [e.level for e in found] == list(LEVELS)
    assert sorted(e.minutes for e in found) == [e.minutes for e in found]
    for e in found:
        assert f"answer_{e.number}" in e.solution


def test_a_solution_takes_the_place_of_the_open_answer():
    notebook = toy()
    names = {}
    exec(solved(notebook).cells[1].source, names)
    assert names["answer_1"] == 2
    assert notebook.cells[1].source == CHECK, "the notebook itself stays open"
    wrong = toy(TEXT.replace("x = 2", "x = 3"))
    with pytest.raises(AssertionError, match="not yet"):
        exec(solved(wrong).cells[1].source, {})


@pytest.mark.parametrize(
    "changed, lacks",
    (
        (toy(TEXT.replace("easy", "tricky")), "level"),
        (toy(TEXT.replace("Hint", "Help")), "hint"),
        (toy(TEXT.replace("```python", "```")), "solution"),
        (toy(check="answer_1 = None  # a number"), "check"),
        (toy(check=CHECK.replace("answer_1", "answer_2")), "check"),
    ),
)
def test_an_exercise_that_lacks_a_part_is_named(changed, lacks):
    with pytest.raises(UserError, match=f"exercise 1 has no .*{lacks}"):
        exercises(changed)
