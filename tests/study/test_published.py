"""What is read off the published numbers, by hand and against independent ways."""

import numpy as np
import pandas as pd
import pytest

from lib.study import published


def test_the_loop_by_hand():
    loop = published.loop()
    code, shorter = loop["code, as configured"], loop["code, at the text's length"]
    assert code["rows of the buffer"] == 131_072 // 4095 * 4095 == 131_040
    assert code["rows that hold a token"] == 32 * 2047 == 65_504
    assert (
        code["passes of a model per refill"] == 16 / 4 and shorter["passes of a model per refill"] == 32 / 4
    )
    pointer = steps = 0
    while pointer <= 131_040 // 2 - 1024:  # as buffer.py counts
        pointer, steps = pointer + 1024, steps + 1
    assert code["steps per refill"] == steps == 390_625 // 6_200
    assert code["times that each row is shown"] == pytest.approx(390_625 * 1024 / 131_040)
    assert shorter["share of rows that hold a token"] == 1
    assert loop["log, 1.5B"]["share of rows that hold a token"] == pytest.approx(2 * 7635.51 / 32_768)


def test_the_own_effect_is_the_set_minus_its_random_set():
    table = published.ablation()
    assert len(table) == 2 * 4 * 7
    assert np.allclose(table["own"], table["set"] - table["random"], atol=2e-4)
    row = table.query("model == 'distilled' and category == 'reflection' and top_share == 0.2").iloc[0]
    assert (row["set"], row["random"], row["n_positions"]) == (-1.7149, -0.5205, 49)
    assert row["high"] - row["own"] == pytest.approx(
        2.0106 * row["se"], rel=1e-3
    )  # t with 48 degrees of freedom


def test_words_and_pairs_of_words_have_the_same_means():
    means = published.read("e7_parallelogram").query("pca_components == '20'")
    means = means.assign(size=means["size"].str.removeprefix("qwen-").str.upper())
    both = published.differences().merge(means, on=["relation", "size"], validate="1:1")
    assert len(both) == 15 and (both["words_x"] == both["words_y"]).all()
    for model in ("base", "distilled"):
        assert np.allclose(both[model], both[f"{model}_mean"], atol=1e-4)


def test_the_interval_leaves_out_one_word_at_a_time(monkeypatch):
    rng, n = np.random.default_rng(0), 12
    losses = {m: np.triu(rng.random((n, n)), 1) for m in ("base", "distilled")}
    losses = {m: upper + upper.T for m, upper in losses.items()}
    words = {f"{m}_{s.lower()}": loss.sum(1) / (n - 1) for m, loss in losses.items() for s in published.SIZES}
    monkeypatch.setattr(published, "read", lambda name: pd.DataFrame({"relation": "r", **words}))
    row, difference = published.differences().iloc[0], losses["distilled"] - losses["base"]
    pairs = np.triu_indices(n, 1)
    without = np.array([np.delete(np.delete(difference, i, 0), i, 1) for i in range(n)])
    left_out = np.array([d[np.triu_indices(n - 1, 1)].mean() for d in without])
    half = 2.201 * np.sqrt(
        (n - 1) / n * np.square(left_out - left_out.mean()).sum()
    )  # t, 11 degrees of freedom
    assert row["difference"] == pytest.approx(difference[pairs].mean())
    assert (row["low"], row["high"]) == pytest.approx(
        (row["difference"] - half, row["difference"] + half), rel=1e-3
    )
