"""Intervals: against values worked out by hand, and against a truth that they must cover."""

import math

import numpy as np
import pandas as pd
import pytest

from lib.stats import (
    bootstrap,
    group_weights,
    interval,
    percentiles,
    pooled,
    pooled_table,
    t_interval,
    wilson,
)


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


def test_resamples_are_counts_of_whole_groups_and_the_same_each_time():
    weights = group_weights(5, 200, seed=1)
    assert weights.shape == (200, 5) and (weights.sum(1) == 5).all() and weights.min() == 0
    assert (weights == np.random.default_rng(1).multinomial(5, [0.2] * 5, size=200)).all()
    rng = np.random.default_rng(1)  # a generator goes on, so that several tables get different resamples
    assert (group_weights(5, 200, rng) == weights).all() and (group_weights(5, 200, rng) != weights).any()


def test_weights_and_copies_give_the_same_interval_of_a_mean():
    values = np.random.default_rng(2).normal(size=60)
    low, high = interval(group_weights(60, 4000) @ values / 60)
    assert (low, high) == pytest.approx(bootstrap(values, n_boot=4000), abs=0.03)
    assert (high - low) / 2 == pytest.approx(1.96 * values.std() / 60**0.5, rel=0.06)


def test_percentiles_leave_out_what_is_not_defined():
    resampled = np.array([[0.0, np.nan, 5.0], [10.0, np.nan, np.nan], [20.0, np.nan, np.nan]])
    low, high = percentiles(resampled, level=0.5)
    assert low == pytest.approx([5, np.nan, 5], nan_ok=True)
    assert high == pytest.approx([15, np.nan, 5], nan_ok=True)
    assert percentiles(resampled.T, level=0.5, axis=1)[0] == pytest.approx(low, nan_ok=True)
    assert interval([0, 100]) == pytest.approx((2.5, 97.5))
    assert all(map(math.isnan, (*interval([]), *interval([np.nan]))))


def test_students_interval_by_hand():
    # mean 2, standard deviation 1, t of 2 degrees of freedom: 4.302653
    assert t_interval([1, 2, 3, np.nan]) == pytest.approx((2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5))
    assert all(map(math.isnan, (*t_interval([0.5]), *t_interval([]))))


def test_pooled_by_hand():
    # t(0.975, 4) = 2.776; standard deviation of 1..5 is 1.5811: half a width of 1.9632
    assert pooled([1, 2, 3, 4, 5]) == pytest.approx((3, 3 - 1.96324, 3 + 1.96324), abs=1e-4)
    # documents that move each by -3 to +4: sqrt(1.9632² + 3²) below, sqrt(1.9632² + 4²) above
    intervals = [[v - 3, v + 4] for v in (1, 2, 3, 4, 5)]
    assert pooled([1, 2, 3, 4, 5], intervals) == pytest.approx((3, 3 - 3.58527, 3 + 4.45583), abs=1e-4)
    # one crosscoder without the number takes no part
    nan = math.nan
    assert pooled([1, 2, 3, 4, 5, nan], [*intervals, [nan, nan]]) == pytest.approx(
        pooled([1, 2, 3, 4, 5], intervals)
    )
    assert pooled([2.0])[0] == 2 and all(map(math.isnan, pooled([2.0])[1:]))
    assert all(map(math.isnan, pooled([])))


def test_tables_of_several_crosscoders_become_one():
    tables = [
        pd.DataFrame({"c": ["a", "b"], "x": [1.0 + s, 5.0], "low": [0.0, 4.0], "high": [9.0, 6.0]})
        for s in range(3)
    ]
    tables[2] = tables[2][:1]  # this one has no b
    table = pooled_table(tables, ["c"], {"x": ("low", "high")})
    assert table["c"].tolist() == ["a", "b"] and table.columns.tolist() == ["c", "x", "low", "high"]
    for key, values, ends in (("a", [1, 2, 3], [[0, 9]] * 3), ("b", [5, 5], [[4, 6]] * 2)):
        row = table.set_index("c").loc[key]
        assert tuple(row) == pytest.approx(pooled(values, ends))
    pd.testing.assert_frame_equal(pooled_table(tables[:1], ["c"], {"x": ("low", "high")}), tables[0])


@pytest.mark.parametrize("between, within", ((1.0, 0.1), (0.1, 1.0), (0.5, 0.5)))
def test_pooled_covers_what_other_crosscoders_and_documents_would_say(between, within):
    """The truth is 0; a crosscoder adds its own error, and the documents one that all crosscoders share."""
    rng, covered, by_documents_alone = np.random.default_rng(0), 0, 0
    for _ in range(200):
        documents = within * rng.normal(size=60)  # in units of the standard error of 60
        values = between * rng.normal(size=5) + documents.mean() * 60**0.5
        weights = group_weights(60, 200, rng)
        draws = values[:, None] + (weights @ documents / 60 - documents.mean()) * 60**0.5
        _, low, high = pooled(values, [interval(d) for d in draws])
        covered += low <= 0 <= high
        low, high = interval(draws[0])
        by_documents_alone += low <= 0 <= high
    assert covered >= 180  # 190 expected
    assert between < within or by_documents_alone < 170
