"""Numbers, manifests and checks: against values worked out by hand, and against what must be refused."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from lib import runs as results
from lib.results import Results, read_results, scoreboard
from lib.runs import Progress, Run, fingerprint, is_current, read_manifest, whole_files, write_manifest
from lib.settings import ROOT, UserError, check
from lib.stats import bootstrap, wilson


def test_wilson_against_values_worked_out_by_hand():
    # z = 1.96: (0.8 + z²/20 ± z sqrt(0.8 * 0.2 / 10 + z² / 400)) / (1 + z²/10)
    assert wilson(8, 10) == pytest.approx((0.4901625, 0.9433178), abs=1e-6)
    # z² / (n + z²): not the empty interval of p ± 1.96 se
    assert wilson(0, 10) == pytest.approx((0.0, 0.2775328), abs=1e-6)
    assert wilson(10, 10) == pytest.approx((0.7224672, 1.0), abs=1e-6)
    assert all(map(math.isnan, wilson(0, 0)))
    with pytest.raises(ValueError):
        wilson(11, 10)


def grouped(rng, n_groups, per_group):
    """Values whose groups differ (variance 1), with little noise inside a group; the true mean is 0."""
    groups = np.repeat(np.arange(n_groups), per_group)
    return rng.normal(size=n_groups)[groups] + 0.1 * rng.normal(size=len(groups)), groups


def test_bootstrap_covers_the_truth_only_if_groups_are_resampled():
    rng = np.random.default_rng(0)
    held = {"groups": 0, "tokens": 0}
    for trial in range(100):
        values, groups = grouped(rng, 40, 10)
        for kind, given in (("groups", groups), ("tokens", None)):
            low, high = bootstrap(values, groups=given, n_boot=200, seed=trial)
            held[kind] += low <= 0 <= high
    assert held["groups"] >= 85  # 95 expected
    assert held["tokens"] <= 65  # about 45: an interval over tokens claims far too much


def test_bootstrap_of_the_mean_equals_the_general_way():
    values, groups = grouped(np.random.default_rng(1), 30, 4)
    fast = bootstrap(values, groups=groups, n_boot=300, seed=3)
    slow = bootstrap(values, statistic=lambda v: v.mean(), groups=groups, n_boot=300, seed=3)
    assert fast == pytest.approx(slow, abs=1e-12)


def test_bootstrap_of_rows_unequal_groups_and_text_groups():
    pairs = np.c_[np.arange(50.0), 2 * np.arange(50.0)]
    assert bootstrap(
        pairs, statistic=lambda rows: rows[:, 1].sum() / rows[:, 0].sum(), n_boot=20
    ) == pytest.approx((2, 2))
    assert bootstrap([5.0, 5.0, 5.0], groups=["a", "b", "a"], n_boot=20) == (5, 5)
    assert all(map(math.isnan, bootstrap([])))
    with pytest.raises(ValueError, match="2 groups for 3 values"):
        bootstrap([1, 2, 3], groups=[0, 1])


@dataclass(frozen=True)
class Config:
    width: int = 8
    rate: float = 1e-3


def test_fingerprint_feels_every_change_and_nothing_else(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.bin").write_bytes(b"one")
    folder = tmp_path / "a"
    whole = fingerprint(Config(), {"b": 1, "a": [1, 2]}, folder)
    # order of keys, numpy, tuples
    assert whole == fingerprint(Config(), {"a": (1, 2), "b": np.int64(1)}, folder)
    assert len(whole) == 16 and int(whole, 16) >= 0
    others = [
        fingerprint(Config(width=9), {"a": [1, 2], "b": 1}, folder),
        fingerprint(Config(), {"a": [2, 1], "b": 1}, folder),
        fingerprint(Config(), {"a": [1, 2], "b": True}, folder),
        fingerprint(Config(), {"a": [1, 2], "b": "1"}, folder),
    ]
    (folder / "x.bin").write_bytes(b"two")
    others.append(fingerprint(Config(), {"b": 1, "a": [1, 2]}, folder))
    (folder / "x.bin").rename(folder / "y.bin")
    others.append(fingerprint(Config(), {"b": 1, "a": [1, 2]}, folder))
    assert len({whole, *others}) == 1 + len(others)


def test_fingerprint_of_a_folder_does_not_depend_on_where_it_is(tmp_path):
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "w").write_text("weights")
    assert fingerprint(tmp_path / "here") == fingerprint(tmp_path / "there")
    with pytest.raises(UserError, match="does not exist"):
        fingerprint(tmp_path / "nowhere")
    with pytest.raises(TypeError, match="cannot fingerprint"):
        fingerprint(object())


def test_arrays_of_other_shape_or_type_have_other_fingerprints():
    a = np.arange(6)
    assert len({fingerprint(x) for x in (a, a.reshape(2, 3), a.astype(np.int32), a[::-1])}) == 4


def test_manifest_is_whole_or_absent(tmp_path, monkeypatch):
    folder = tmp_path / "store"
    assert not is_current(folder, "f" * 16)
    write_manifest(folder, "f" * 16, tokens=np.int64(5), share=float("nan"), where=ROOT / "data")
    assert is_current(folder, "f" * 16) and not is_current(folder, "e" * 16)
    assert read_manifest(folder, "01_harvest_activations") == {
        "fingerprint": "f" * 16,
        "tokens": 5,
        "share": None,
        "where": "data",
    }

    monkeypatch.setattr(results.os, "replace", lambda *a: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError):
        write_manifest(folder, "0" * 16)
    assert is_current(folder, "f" * 16)  # the old one is untouched
    assert [p.name for p in folder.iterdir()] == ["manifest.json"]  # and no scratch file is left


def test_missing_damaged_and_stale_artefacts_name_the_notebook(tmp_path):
    with pytest.raises(
        UserError, match=r"is missing: run notebook 01_harvest_activations first \(make figures ONLY=01\)"
    ):
        read_manifest(tmp_path / "store", "01_harvest_activations")
    with pytest.raises(UserError, match="PAIR=other PROFILE=smoke ONLY=02"):
        read_manifest(ROOT / "data" / "runs" / "other" / "smoke" / "crosscoder", "02_train_crosscoder")
    write_manifest(tmp_path, "a" * 16)
    with pytest.raises(UserError, match="stale"):
        read_manifest(tmp_path, "02_train_crosscoder", expected="b" * 16)
    for damage in ("{", "[]", "{}", '"text"'):
        (tmp_path / "manifest.json").write_text(damage)
        assert not is_current(tmp_path, "a" * 16)
        with pytest.raises(UserError, match="damaged"):
            read_manifest(tmp_path, "02_train_crosscoder")


@pytest.mark.parametrize(
    "value, rule, sentence",
    [
        (0, dict(kind=int, low=1), "k is 0: it must be an integer of at least 1"),
        (2.0, dict(kind=int), "k is 2.0: it must be an integer"),
        (True, dict(kind=int), "k is True: it must be an integer"),
        ("3", dict(kind=float), "k is '3': it must be a number"),
        (float("nan"), dict(kind=float), "k is nan: it must be a number"),
        (float("inf"), dict(kind=float, low=0), "k is inf: it must be a number of at least 0"),
        (1.5, dict(kind=float, low=0, high=1), "k is 1.5: it must be a number from 0 to 1"),
        (1, dict(kind=bool), "k is 1: it must be True or False"),
        (None, dict(kind=int), "k is None: it must be an integer"),
        ("l2", dict(kind=str, choices=("l1", "batchtopk")), "k is 'l2': it must be one of l1, batchtopk"),
        ([1, -2], dict(kind=list, low=0), "k is [1, -2]: it must be a list, every entry of at least 0"),
        ("ab", dict(kind=list), "k is 'ab': it must be a list"),
    ],
)
def test_check_refuses_in_one_sentence(value, rule, sentence):
    with pytest.raises(UserError) as error:
        check("k", value, **rule)
    assert str(error.value) == sentence


def test_check_returns_what_is_right():
    assert check("k", 1, float, low=1) == 1
    assert check("k", np.int64(4), int, low=1, high=4) == 4
    assert check("k", None, (int, None), low=1) is None
    assert check("k", [0.1, 0.5], list, low=0, high=1) == [0.1, 0.5]


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


def test_folders_of_a_run(tmp_path):
    assert Run("tiny", "smoke", tmp_path).figures == tmp_path / "data" / "runs" / "tiny" / "smoke" / "figures"
    assert Run("tiny", root=tmp_path).results == tmp_path / "figures" / "tiny" / "results"
    assert (tmp_path / "figures" / "tiny" / "results").is_dir()
    assert not Run("tiny", root=tmp_path).path("store").exists()
    for name in ("../x", "", "a/b", ".hidden", 3):
        with pytest.raises(UserError, match="plain name"):
            Run("tiny", name)


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


def test_progress_is_a_few_lines_and_ends_with_done(capsys):
    progress = Progress("rows", 5000)
    for i in range(5001):
        progress.update(i, note="fast")
    progress.close()
    progress.close()
    assert capsys.readouterr().err.splitlines() == ["rows: 0/5,000, fast", "rows: 5,000/5,000 done"]
    with Progress("rows", 10) as progress:
        progress.update(3)
    assert capsys.readouterr().err.splitlines()[-1] == "rows: 3/10 stopped"


def test_no_module_but_results_and_its_progress_is_imported_by_results():
    source = Path(results.__file__).read_text()
    assert "from .progress import" in source and source.count("from .") == 1


def test_a_folder_gets_all_files_of_a_block_or_none(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "weights").write_text("old")
    with pytest.raises(ZeroDivisionError), whole_files(tmp_path / "model") as scratch:
        (scratch / "weights").write_text("half")
        raise ZeroDivisionError
    assert [p.name for p in (tmp_path / "model").iterdir()] == ["weights"] and (
        tmp_path / "model" / "weights"
    ).read_text() == "old"
    with whole_files(tmp_path / "model") as scratch:
        (scratch / "weights").write_text("new")
        (scratch / "config").write_text("c")
        assert (tmp_path / "model" / "weights").read_text() == "old", (
            "nothing moves before the block has ended"
        )
    assert {p.name: p.read_text() for p in (tmp_path / "model").iterdir()} == {
        "weights": "new",
        "config": "c",
    }


def test_speeds_are_kept_and_not_shown(tmp_path):
    found = Results("01", Run("tiny", "smoke", tmp_path), {})
    found.add("tokens_per_second", 9512.0)
    found.add("tokens", 10)
    assert list(found.frame().index) == ["tokens"] and "per_second" not in repr(found)
    assert json.loads(found.write().read_text())["metrics"]["tokens_per_second"]["value"] == 9512.0
