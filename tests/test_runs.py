"""Folders, whole files, fingerprints, manifests, what is kept: nothing half, nothing stale."""

import csv
import re
from dataclasses import dataclass

import numpy as np
import pandas as pd
import pytest

from lib import runs
from lib.runs import (
    Progress,
    Run,
    fingerprint,
    is_current,
    kept,
    kept_table,
    read_manifest,
    read_table,
    table_text,
    whole_files,
    write_manifest,
)
from lib.settings import ROOT, UserError


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

    monkeypatch.setattr(runs.os, "replace", lambda *a: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError):
        write_manifest(folder, "0" * 16)
    assert is_current(folder, "f" * 16)  # the old one is untouched
    assert [p.name for p in folder.iterdir()] == ["manifest.json"]  # and no scratch file is left


def test_commands_that_are_proposed_name_a_registry_of_ones_own(monkeypatch):
    monkeypatch.setenv("PAIRS_REGISTRY", "/elsewhere/mine.yaml")
    wanted = 'make study PAIR=mine ONLY=10 ARGS="--registry /elsewhere/mine.yaml"'
    assert runs.make_command("study", "mine", "default", "10") == wanted


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


def test_folders_of_a_run(tmp_path):
    assert Run("tiny", "smoke", tmp_path).figures == tmp_path / "data" / "runs" / "tiny" / "smoke" / "figures"
    assert Run("tiny", root=tmp_path).results == tmp_path / "figures" / "tiny" / "results"
    assert (tmp_path / "figures" / "tiny" / "results").is_dir()
    assert not Run("tiny", root=tmp_path).path("store").exists()
    for name in ("../x", "", "a/b", ".hidden", 3):
        with pytest.raises(UserError, match="plain name"):
            Run("tiny", name)


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


def test_what_is_kept_is_made_once_and_anew_under_another_fingerprint(tmp_path):
    made = []

    def make(folder):
        made.append(1)
        (folder / "number").write_text(str(len(made)))

    def wanted(mark):
        return kept(tmp_path / "part", mark, make, lambda folder: (folder / "number").read_text(), rows=3)

    assert [wanted("a"), wanted("a"), wanted("b"), wanted("b")] == ["1", "1", "2", "2"]
    assert read_manifest(tmp_path / "part", "02") == {"fingerprint": "b", "rows": 3}

    def broken(folder):
        (folder / "number").write_text("half")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        kept(tmp_path / "part", "c", broken, lambda folder: None)
    assert wanted("b") == "2", "what was there stays"


def test_a_kept_table_reads_as_it_was_made(tmp_path):
    table = pd.DataFrame({"feature": [1, 2], "nrn": [0.123456789012345, np.nan], "text": ["null", "a, b"]})
    for make in (lambda: table, lambda: pytest.fail("made again")):
        again = kept_table(tmp_path / "t", "f", make, name="scores")
        pd.testing.assert_frame_equal(again, table)
    assert (tmp_path / "t" / "scores.csv").is_file()


BREAKS = ["\r", "a\rb", "a\r\nb", "\n", '"', 'a "b", c', " ", ",", "\u2028", "\x85", "null", "NA"]


@pytest.mark.parametrize("csv_of", ["now", "before 3.11.9"])
@pytest.mark.parametrize("more", [{"nrn": [0.5] * len(BREAKS)}, {}])
def test_a_table_has_as_many_rows_on_disk_as_in_memory(tmp_path, monkeypatch, csv_of, more):
    """Older versions of csv do not quote a carriage return, which a reader takes for the end of a row."""
    table = pd.DataFrame({"token": BREAKS, **more})
    if csv_of != "now":
        to_csv, row = pd.DataFrame.to_csv, re.compile(r'"([^"\n,]*\r[^"\n,]*)"')

        def older(frame, quoting=csv.QUOTE_MINIMAL, **options):
            text = to_csv(frame, quoting=quoting, **options)
            return row.sub(r"\1", text) if quoting == csv.QUOTE_MINIMAL else text

        monkeypatch.setattr(pd.DataFrame, "to_csv", older)
    again = kept_table(tmp_path / "t", "f", lambda: table)
    pd.testing.assert_frame_equal(again, table)
    numbers = pd.DataFrame({"token": ["7", "08"]})
    file = tmp_path / "numbers.csv"
    file.write_text(table_text(numbers))
    pd.testing.assert_frame_equal(read_table(file, dtype={"token": str}), numbers)
