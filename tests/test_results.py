"""Numbers of a notebook: checked parameters, strict JSON with intervals, scoreboards."""

import json

import numpy as np
import pandas as pd
import pytest

from lib.results import Count, Results, Share, begin, read_results, scoreboard
from lib.runs import Run
from lib.settings import UserError


def test_results_are_strict_json_with_intervals(run):
    numbers = Results("02", run, {"pair": "tiny", "seed": 7, "shares": (0.5, 0.5)})
    numbers.add("fve_base", np.float32(0.5), ci=(0.25, np.float64(0.75)), n=np.int64(10))
    numbers.add("undefined", float("nan"), ci=(float("nan"), float("nan")))
    numbers.table(
        "by_relation",
        pd.DataFrame({"score": [1.0, np.nan]}, index=pd.Index(["antonym", "capital"], name="relation")),
    )
    path = numbers.write()
    assert path == run.results / "02.json"
    content = json.loads(path.read_text(), parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    assert content["metrics"]["fve_base"] == {"value": 0.5, "ci": [0.25, 0.75], "n": 10}
    assert content["metrics"]["undefined"] == {"value": None, "ci": [None, None], "n": None}
    assert content["tables"]["by_relation"] == {
        "columns": ["relation", "score"],
        "rows": [["antonym", 1.0], ["capital", None]],
    }
    assert content["seed"] == 7 and content["parameters"]["shares"] == [0.5, 0.5]
    assert (
        content["wall_seconds"] >= 0
        and content["peak_memory_mb"] > 10
        and content["versions"]["torch"].startswith("2.13")
    )
    assert read_results(run, "02") == content
    assert numbers.text("fve_base") == "0.50 [0.25, 0.75]" and numbers.text("undefined") == "n/a [n/a, n/a]"
    assert list(numbers.frame().loc["fve_base"]) == [0.5, 0.25, 0.75, 10]
    with pytest.raises(UserError, match="03.json is missing"):
        read_results(run, "03")
    with pytest.raises(ValueError, match="low must not exceed high"):
        numbers.add("x", 1, ci=(2, 1))


def test_scoreboard_says_what_held():
    board = scoreboard(
        [
            {"prediction": "more", "observed": "2.0", "held": np.bool_(True), "why": "E1"},
            {"prediction": "null", "observed": "0.5", "held": None, "why": "E1"},
        ]
    )
    assert list(board.columns) == ["prediction", "observed", "held", "why"] and list(board.held) == [
        "yes",
        "undecided",
    ]
    with pytest.raises(ValueError, match="lacks held"):
        scoreboard([{"prediction": "", "observed": ""}])


def test_speeds_are_kept_and_not_shown(tmp_path):
    found = Results("01", Run("tiny", "smoke", tmp_path), {})
    found.add("tokens_per_second", 9512.0)
    found.add("tokens", 10)
    assert list(found.frame().index) == ["tokens"] and "per_second" not in repr(found)
    assert json.loads(found.write().read_text())["metrics"]["tokens_per_second"]["value"] == 9512.0


def test_begin_takes_the_named_parameters_and_checks_them(tmp_path, monkeypatch):
    cell = {"pair": "tiny", "run": "test", "share": 0.5, "kind": "a", "threads": 1, "np": np}
    here = begin("02", cell, share=Share, kind=("a", "b"), threads=Count)
    assert here.run == Run("tiny", "test") and here.notebook == "02"
    assert here.parameters == {"pair": "tiny", "run": "test", "share": 0.5, "kind": "a", "threads": 1}
    with pytest.raises(UserError, match="share is 2: it must be a number from 0 to 1"):
        begin("02", cell | {"share": 2}, share=Share)
    with pytest.raises(UserError, match="kind is 'c': it must be one of a, b"):
        begin("02", cell | {"kind": "c"}, kind=("a", "b"))


def test_what_was_found_stands_where_the_notebook_begins(monkeypatch):
    import IPython.display

    shown = []
    monkeypatch.setattr(IPython.display, "display", lambda text, **how: shown.append((text.data, how)))
    here = begin("02", {"pair": "tiny", "run": "test"})
    here.found("Half of them recur.")
    (before, placed), (after, written) = shown
    assert "when all cells have been run" in before and after.endswith("Half of them recur.")
    assert placed["display_id"] == written["display_id"] and not placed["update"] and written["update"]
    begin("02", {"pair": "mine", "run": "test"})
    assert "are about the pair tiny, not mine" in shown[-1][0] and shown[-1][1]["display_id"] != "found"
