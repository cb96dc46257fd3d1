"""The test as a whole: cells that are kept, files of claims, and the command."""

import numpy as np
import pytest

from lib.finders import bench, truths
from lib.finders.claims import Claims, write_claims
from lib.finders.finder import FINDERS, finder
from lib.settings import UserError
from lib.tools.cli import main

BUDGET = truths.Budget(planted_tokens=6_000, epochs=1)


@pytest.fixture
def counted(monkeypatch):
    """A finder that claims random directions, and how often it was asked."""
    monkeypatch.setattr(bench, "FINDERS", dict(FINDERS))
    calls = []
    monkeypatch.setitem(FINDERS, "counted", None)

    @finder("counted", "random directions")
    def find(data):
        calls.append(data.config.seed)
        rows = np.random.default_rng(data.config.seed).normal(size=(20, 24))
        return Claims.of(rows, rows, ["distilled"] * 20, np.linspace(1, 0, 20))

    monkeypatch.setitem(bench.FINDERS, "counted", FINDERS["counted"])
    return calls


def test_a_test_goes_on_where_it_was_interrupted(counted, tmp_path):
    first = bench.bench(["counted"], ["easy"], BUDGET, 1, 1, tmp_path)
    assert counted == [0, 0]  # on the truth and on the null
    table = bench.bench(["counted"], ["easy"], BUDGET, 2, 1, tmp_path)
    assert counted == [0, 0, 1] and table["seed"].tolist() == [0, 1]
    assert table["f1"].iloc[0] == pytest.approx(first["f1"].iloc[0])
    assert table["null_claims"].iloc[0] == 8 and np.isnan(table["null_claims"].iloc[1])
    assert table["claims"].tolist() == [20, 20] and (table["recall"] <= 0.5).all()


def test_finders_that_need_labels_are_left_out_where_there_are_none(tmp_path):
    names = ["mean difference", "mean difference before behaviours"]
    table = bench.bench(names, ["easy"], BUDGET, 3, 0, tmp_path)
    assert table["finder"].tolist() == ["mean difference"] and table["seed"].tolist() == [0]
    with pytest.raises(UserError, match="none of .* can be tested on easy"):
        bench.bench(names[1:], ["easy"], BUDGET, 1, 0, tmp_path)


def right_claims(truth):
    store = truth.open(BUDGET, 0, None if truth.pair else "unused").store
    rows, sides = [], []
    for side in store.models:
        own = np.flatnonzero(store.kinds == 3 + (side != "base"))
        rows += [[store.directions[m][f] for m in store.models] for f in own]
        sides += [side] * len(own)
    return Claims.of(*np.array(rows).swapaxes(0, 1), sides, np.ones(len(sides)))


@pytest.mark.parametrize("name", ["planted", "easy", "rare", "rarest", "reweighted", "drift"])
def test_a_file_with_the_truth_has_a_precision_and_a_recall_of_one(name, tmp_path):
    claims = right_claims(truths.TRUTHS[name])
    path = write_claims(tmp_path / "mine.json", "oracle", {(name, 0, False): claims})
    table = bench.bench([str(path)], list(truths.TRUTHS), BUDGET, 1, 1, tmp_path)
    assert table[["finder", "precision", "recall", "calibration"]].values.tolist() == [["oracle", 1, 1, 0]]


def test_a_file_of_claims_may_not_take_the_name_of_a_finder(tmp_path):
    path = write_claims(
        tmp_path / "mine.json", "diff-SAE", {("easy", 0, True): right_claims(truths.TRUTHS["easy"])}
    )
    with pytest.raises(UserError, match="one of ours"):
        bench.bench([str(path)], ["easy"], BUDGET, 1, 1, tmp_path)


def test_the_command_says_what_there_is(capsys):
    assert main(["bench-finders", "nonsense"]) == 2
    assert "unknown finder 'nonsense': there are" in capsys.readouterr().err
    assert main(["bench-finders", "diff-SAE", "--truths", "hard"]) == 2
    assert "truth is 'hard': it must be one of planted, easy" in capsys.readouterr().err
