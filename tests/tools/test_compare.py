"""What counts as a number that moved."""

import copy
import json

import nbformat
import pytest

from lib.settings import UserError
from lib.tools import compare as check
from lib.tools.cli import main

BEFORE = {
    "metrics": {
        "fve": {"value": 0.9, "ci": [0.88, 0.92], "n": 10},
        "l0": {"value": 24.0, "ci": None, "n": 5},
        "gap": {"value": 0.0, "ci": None, "n": 5},
        "none": {"value": None, "ci": None, "n": None},
    },
    "tables": {
        "scoreboard": {"columns": ["prediction", "observed", "held"], "rows": [["it grows", "0.2", "yes"]]}
    },
}


def changed(**values):
    after = copy.deepcopy(BEFORE)
    for name, value in values.items():
        after["metrics"][name]["value"] = value
    return after


@pytest.mark.parametrize(
    "name, value, kind",
    (
        ("fve", 0.9005, None),
        ("fve", 0.902, "moved"),
        ("fve", 0.9199, "moved"),
        ("fve", 0.9201, "outside"),
        ("fve", None, "outside"),
        ("fve", float("nan"), "outside"),
        ("l0", 24.02, None),
        ("l0", 25.1, "moved"),
        ("l0", 25.3, "outside"),
        ("gap", 0.009, "moved"),
        ("gap", 0.011, "outside"),
        ("none", 1.0, "outside"),
    ),
)
def test_a_number_is_the_same_moved_or_outside(name, value, kind):
    found = check.compare("02", BEFORE, changed(**{name: value}))
    assert [(d.name, d.kind) for d in found] == ([(name, kind)] if kind else [])


def test_missing_and_new_numbers_are_outside_and_other_verdicts_turned():
    after = changed()
    after["metrics"]["new"] = after["metrics"].pop("l0")
    after["tables"]["scoreboard"]["rows"][0][2] = "no"
    found = check.compare("02", BEFORE, after)
    assert [(d.name, d.kind) for d in found] == [
        ("l0", "outside"),
        ("new", "outside"),
        ("prediction 'it grows'", "turned"),
    ]
    assert str(found[2]).endswith("02  prediction 'it grows': yes -> no")
    assert check.compare("02", BEFORE, copy.deepcopy(BEFORE)) == []


def test_cells_are_compared_without_what_differs_between_two_runs():
    new = nbformat.v4
    cell = new.new_code_cell(
        "1 + 1",
        execution_count=1,
        outputs=[new.new_output("execute_result", {"text/plain": "2"}, execution_count=1)],
    )
    first = new.new_notebook(
        cells=[cell, new.new_markdown_cell("text")],
        metadata={"kernelspec": {"name": "mine", "display_name": "mine"}},
    )
    second = copy.deepcopy(first)
    # another order of clicks: the same content
    second.cells[0].execution_count = second.cells[0].outputs[0].execution_count = 7
    second.metadata = {}
    assert check.cells_that_differ(nbformat.writes(first), nbformat.writes(second)) == []
    second.cells[0].outputs[0].data["text/plain"] = "3"
    assert check.cells_that_differ(nbformat.writes(first), nbformat.writes(second)) == ["c00"]


def repository(tmp_path, monkeypatch, before, after):
    folder = tmp_path / "figures" / "tiny" / "results"
    folder.mkdir(parents=True)
    (folder / "02.json").write_text(json.dumps(after))
    monkeypatch.setattr(check, "ROOT", tmp_path)
    monkeypatch.setattr(
        check, "committed", lambda path: json.dumps(before) if path.endswith("02.json") else None
    )


@pytest.mark.parametrize(
    "after, code, words",
    (
        (changed(), 0, "4 numbers: 0 moved"),
        (changed(fve=0.91), 0, "1 moved within"),
        (changed(fve=0.99), 1, "1 are outside"),
    ),
)
def test_the_command_says_what_moved_and_exits_1_if_anything_is_outside(
    tmp_path, monkeypatch, capsys, after, code, words
):
    repository(tmp_path, monkeypatch, BEFORE, after)
    assert main(["check", "--here"]) == code
    out = capsys.readouterr().out
    assert words in out and (("versions that differ" in out) == (code == 1))


def test_between_two_verdicts_that_are_no_answer_nothing_turned():
    before, after = changed(), changed()
    for content, word in ((before, "undecided"), (after, "depends on the crosscoder")):
        content["tables"]["scoreboard"]["rows"][0][2] = word
    assert [d.kind for d in check.compare("02", before, after)] == ["moved"]
    assert [d.kind for d in check.compare("02", BEFORE, after)] == ["turned"]


def test_where_verdicts_decide_numbers_may_move(tmp_path, monkeypatch, capsys):
    after = changed(fve=0.99)
    repository(tmp_path, monkeypatch, BEFORE, after)
    assert main(["check", "--here", "--verdicts"]) == 0 and "1 are outside" in capsys.readouterr().out
    assert check.compare("02", after, after) == []
    after["tables"]["scoreboard"]["rows"][0][2] = "no"
    (tmp_path / "figures" / "tiny" / "results" / "02.json").write_text(json.dumps(after))
    assert main(["check", "--here", "--verdicts"]) == 1 and "1 verdicts turned" in capsys.readouterr().out


def test_nothing_to_compare_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(check, "ROOT", tmp_path)
    with pytest.raises(UserError, match="make figures"):
        check.check_folder(tmp_path)
