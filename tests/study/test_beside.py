"""The paper's measurements in its own form."""

import numpy as np
import pandas as pd
import pytest

from lib.results import Results
from lib.runs import Run
from lib.study import beside, published


def test_offset_losses_by_hand():
    a, b = np.array([[1.0, 0.0], [0.0, 2.0], [3.0, 0.0]]), np.array([[0.0, 0.0], [0.0, 0.0], [0.0, 4.0]])
    # offsets (1, 0), (0, 2), (3, -4); squared norms of a pair of words 1, 4, 25
    one, two, three = 5**0.5 / 5**0.5, 20**0.5 / 26**0.5, 45**0.5 / 29**0.5
    assert beside.offset_losses(a, b) == pytest.approx(
        [(one + two) / 2, (one + three) / 2, (two + three) / 2]
    )


def test_offset_losses_of_one_offset_and_of_none():
    rng = np.random.default_rng(0)
    a = rng.standard_normal((60, 400))
    assert beside.offset_losses(a, a + 1).max() < 1e-12
    assert beside.offset_losses(a, rng.standard_normal((60, 400))).mean() == pytest.approx(1, abs=0.02)


def test_over_words_is_the_mean_with_an_interval_that_covers_it():
    rng, hits = np.random.default_rng(1), 0
    for _ in range(200):
        x = rng.standard_normal(20)
        pairs = np.add.outer(x, x) / 2
        by_word = (pairs.sum(1) - pairs.diagonal()) / 19
        value, low, high = published.over_words(by_word)
        assert value == pytest.approx(x.mean())
        hits += low <= 0 <= high
    assert 180 <= hits <= 199  # 95% of 200, five standard errors


def test_every_number_of_the_paper_has_a_place(tmp_path, monkeypatch):
    monkeypatch.setattr(beside, "Run", lambda pair, run: Run(pair, run, tmp_path))
    table = beside.beside(["nothing"])
    assert set(table["experiment"]) == {"E1", "E2", "E4", "E5", "E6", "E7"}
    assert np.isfinite(table["paper"]).all() and (table["nothing"] == "").all()
    assert not table.duplicated(["experiment", "quantity", "size"]).any()
    assert list(table[table["experiment"] == "E6"]["paper"]) == [0.5042, 0.4924, 0.54, 0.0346]


def test_notebooks_show_the_rows_of_an_experiment_or_what_makes_them(tmp_path):
    run = Run("tiny", "default", tmp_path)
    assert "ONLY=16" in Results("04", run, {}).beside("E4")
    written = Results("16", run, {})
    written.write()
    assert "ONLY=16" in Results("04", run, {}).beside("E4")
    rows = [("E4", "own effect", 1.0), ("E6", "mean NRN", 0.5)]
    written.table("beside", pd.DataFrame(rows, columns=["experiment", "quantity", "paper"]))
    written.write()
    shown = Results("04", run, {}).beside("E4").to_html()
    assert "own effect" in shown and "mean NRN" not in shown
