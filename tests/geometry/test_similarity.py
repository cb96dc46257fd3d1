"""Geometry between models: hand-computed values, slow independent versions, invariances, planted spaces."""

from itertools import permutations

import numpy as np
import pytest
import torch
from scipy.stats import ortho_group

from lib import stats as stats_module
from lib.crosscoder.model import CrossCoder
from lib.geometry import similarity
from lib.settings import UserError

RNG = np.random.default_rng(0)
X = RNG.normal(size=(60, 5)) * [3, 2, 1, 1, 0.5] + 4
Y = X @ RNG.normal(size=(5, 7)) + RNG.normal(size=(60, 7))


def turned(x, seed=1):
    return x @ ortho_group.rvs(x.shape[1], random_state=seed)


# --- CKA ----------------------------------------------------------------------------------------------------


def test_hsic_is_the_u_statistic_over_distinct_tokens():
    """The definition, term by term: averages over all ways to pick two, three and four different tokens."""
    x, y = X[:6], Y[:6]
    k, l = x @ x.T, y @ y.T
    two = np.mean([k[i, j] * l[i, j] for i, j in permutations(range(6), 2)])
    three = np.mean([k[i, j] * l[i, q] for i, j, q in permutations(range(6), 3)])
    four = np.mean([k[i, j] * l[q, r] for i, j, q, r in permutations(range(6), 4)])
    assert similarity.hsic(x, y) == pytest.approx(two + four - 2 * three)


def test_hsic_does_not_see_the_mean_and_needs_four_tokens():
    assert similarity.hsic(X + 7, Y - 3) == pytest.approx(similarity.hsic(X, Y))
    with pytest.raises(UserError, match="3 tokens"):
        similarity.hsic(X[:3], Y[:3])


def test_cka_is_one_up_to_rotation_scale_and_shift_and_no_further():
    assert similarity.cka(X, X) == pytest.approx(1)
    assert similarity.cka(X, 5 * turned(X) - 2) == pytest.approx(1)
    assert similarity.cka(X, np.pad(X, ((0, 0), (0, 3)))) == pytest.approx(1), (
        "a wider model that holds the same"
    )
    assert (
        similarity.cka(turned(X, 2), turned(Y, 3)) == pytest.approx(similarity.cka(X, Y))
        and similarity.cka(X, Y) < 0.99
    )
    assert similarity.cka(X, X * [1, 1, 10, 1, 1]) < 0.9, "stretching one direction is not a rotation"


def test_cka_of_unrelated_activations_is_zero_on_average_where_the_biased_one_is_not():
    rng, values, biased = np.random.default_rng(1), [], []
    for _ in range(200):
        x, y = rng.normal(size=(30, 10)), rng.normal(size=(30, 10))
        values.append(similarity.cka(x, y))
        x, y = x - x.mean(0), y - y.mean(0)
        biased.append(np.linalg.norm(x.T @ y) ** 2 / np.linalg.norm(x.T @ x) / np.linalg.norm(y.T @ y))
    assert abs(np.mean(values)) < 4 * np.std(values) / 200**0.5 + 0.01 and np.mean(biased) > 0.2


def test_what_does_not_vary_has_no_similarity():
    still = np.ones((60, 3))
    assert np.isnan(similarity.cka(X, still)) and all(
        np.isnan(v) for v in similarity.procrustes(X, still).values()
    )
    assert np.isnan(similarity.effective_rank(similarity.spectrum(still)))
    with pytest.raises(UserError, match="same tokens"):
        similarity.cka(X, Y[:-1])


# --- Procrustes ---------------------------------------------------------------------------------------------


def test_procrustes_by_hand():
    """A square's corners and its mirror image, and a square squeezed to half its height."""
    square = np.array([[1.0, 1], [1, -1], [-1, 1], [-1, -1]])
    mirrored = 3 * square[:, ::-1] + 5
    assert similarity.procrustes(square, mirrored) == pytest.approx(
        {"distance": 0, "unexplained": 0, "unexplained_unrotated": 1}, abs=1e-6
    )
    # of norm 1: columns (1, 1)/sqrt 2 and (2, 1)/sqrt 5 along the axes: s = 3 / sqrt 10
    found = similarity.procrustes(square, square * [1, 0.5])
    assert found["unexplained"] == pytest.approx(0.1) == found["unexplained_unrotated"]
    assert found["distance"] == pytest.approx((2 - 6 / 10**0.5) ** 0.5)


def test_procrustes_finds_a_rotation_and_pads_the_narrower_model():
    assert similarity.procrustes(X, turned(X))["unexplained"] == pytest.approx(0, abs=1e-9)
    assert similarity.procrustes(X, turned(X))["unexplained_unrotated"] > 0.1
    wide = turned(np.pad(X, ((0, 0), (0, 2))))
    found = similarity.procrustes(X, wide)
    assert found["distance"] == pytest.approx(0, abs=1e-6) and np.isnan(found["unexplained_unrotated"])


# --- rank ---------------------------------------------------------------------------------------------------


def test_ranks_by_hand():
    four = similarity.spectrum(np.vstack([np.eye(4), -np.eye(4)]))
    assert similarity.effective_rank(four) == pytest.approx(4) == similarity.participation_ratio(four)
    line = similarity.spectrum(np.outer([1.0, 2, 4], [3, 4]))
    assert similarity.effective_rank(line) == pytest.approx(1) == similarity.participation_ratio(line)
    uneven = np.array([0.5, 0.25, 0.25, 0])
    assert similarity.effective_rank(uneven) == pytest.approx(2**1.5) and similarity.participation_ratio(
        uneven
    ) == pytest.approx(1 / 0.375)


def test_ranks_do_not_change_with_rotation_scale_or_shift():
    shares = similarity.spectrum(X)
    assert (
        np.allclose(similarity.spectrum(9 * turned(X) + 1), shares)
        and (np.diff(shares) <= 0).all()
        and shares.sum() == pytest.approx(1)
    )
    assert 1 < similarity.participation_ratio(shares) < similarity.effective_rank(shares) < 5


# --- intervals ----------------------------------------------------------------------------------------------


def test_jackknife_of_a_mean_is_the_textbook_interval():
    values, documents = RNG.normal(size=20), np.arange(20)
    row = stats_module.jackknife(lambda v: {"mean": v.mean()}, [values], documents).iloc[0]
    se = values.std(ddof=1) / 20**0.5
    assert row["value"] == pytest.approx(values.mean()) and row["high"] - row["value"] == pytest.approx(
        2.0930240544 * se
    )
    assert row["n"] == 20


def test_jackknife_resamples_documents_not_tokens():
    values = np.repeat(RNG.normal(size=10), 50)
    by_document = stats_module.jackknife(
        lambda v: {"mean": v.mean()}, [values], np.repeat(np.arange(10), 50)
    ).iloc[0]
    by_token = stats_module.jackknife(lambda v: {"mean": v.mean()}, [values], np.arange(500)).iloc[0]
    assert by_document["high"] - by_document["low"] > 3 * (by_token["high"] - by_token["low"])
    alone = stats_module.jackknife(lambda v: {"mean": v.mean()}, [values], np.zeros(500)).iloc[0]
    assert np.isnan(alone["low"]) and alone["n"] == 1


def test_compare_has_every_number_and_intervals_hold_it():
    frame = stats_module.jackknife(similarity.compare, [X, Y], np.repeat(np.arange(30), 2)).set_index(
        "statistic"
    )
    assert frame["value"]["cka"] == pytest.approx(similarity.cka(X, Y))
    assert frame["value"]["effective_rank_y"] == pytest.approx(
        similarity.effective_rank(similarity.spectrum(Y))
    )
    defined = frame.dropna()
    assert set(frame.index) - set(defined.index) == {"procrustes_unexplained_unrotated"}
    assert (defined["low"] < defined["value"]).all() and (defined["value"] < defined["high"]).all()


# --- subspaces ----------------------------------------------------------------------------------------------


def test_components_and_span_find_planted_directions():
    axes = turned(np.eye(6))
    acts = RNG.normal(size=(400, 6)) * [9, 5, 0.1, 0.1, 0.1, 0.1] @ axes
    assert similarity.overlap(similarity.components(acts, 2), axes[:2].T) == pytest.approx(1, abs=1e-3)
    rows = np.vstack([RNG.normal(size=(30, 2)) @ axes[2:4], np.zeros((1, 6))])
    assert similarity.overlap(similarity.span(rows, 2), axes[2:4].T) == pytest.approx(1)
    assert similarity.span(rows, 5).shape == (6, 2), "not more directions than there are"
    assert similarity.overlap(axes[:2].T, axes[2:].T) == pytest.approx(0)
    assert similarity.overlap(axes[:1].T, (axes[:1].T + axes[1:2].T) / 2**0.5) == pytest.approx(0.5)
    with pytest.raises(UserError, match="length above 0"):
        similarity.span(np.zeros((3, 6)), 2)


def test_features_outside_a_subspace_are_told_from_random_sets():
    axes = np.eye(12)
    rows = RNG.normal(size=(200, 12))
    rows[:10] = RNG.normal(size=(10, 3)) @ axes[9:]  # ten features write where nothing else is
    found = similarity.feature_overlap(rows, range(10), axes[:, :6], range(200), dims=3)
    assert found["overlap"] == pytest.approx(0) and found["smallest_angle"] == pytest.approx(90)
    assert (
        found["p"] < 0.01
        and found["null"] == pytest.approx(0.5, abs=0.1)
        and found["overlap"] < found["null_low"]
    )
    inside = similarity.feature_overlap(
        rows @ np.diag([1] * 6 + [1e-9] * 6), range(20, 30), axes[:, :6], range(200), dims=3
    )
    assert inside["overlap"] == pytest.approx(1) and inside["largest_angle"] == pytest.approx(0, abs=1e-4)


def test_a_random_set_is_no_discovery():
    rows = np.random.default_rng(3).normal(size=(150, 12))
    sets = [np.random.default_rng(s).choice(150, 8, replace=False) for s in range(40)]
    p = [
        similarity.feature_overlap(rows, chosen, np.eye(12)[:, :6], range(150), 3, 60, s)["p"]
        for s, chosen in enumerate(sets)
    ]
    assert np.mean(np.array(p) < 0.05) < 0.2 and np.median(p) > 0.2


def test_an_empty_set_has_no_angle():
    found = similarity.feature_overlap(X, [], np.eye(5)[:, :2], range(60), 2)
    assert found["features"] == 0 and np.isnan(found["overlap"]) and np.isnan(found["p"])


def test_category_cosines_by_hand():
    crosscoder = CrossCoder((2, 2), 40, k=2)
    with torch.no_grad():
        crosscoder.W_dec[0] = torch.tensor([1.0, 0, 0, 2])
        crosscoder.W_dec[1] = torch.tensor([0.0, 3, 0, 1])
        crosscoder.W_dec[2] = torch.tensor([1.0, 1, 0, -1])
    frame = similarity.category_cosines(
        crosscoder, {"reflection": 0, "contrast": 1, "deduction": 2, "alternative": 2}, np.ones(40, bool)
    )
    value = frame.set_index(["model", "a", "b"])["cosine"]
    assert value["base", "reflection", "contrast"] == pytest.approx(0) and value[
        "distilled", "reflection", "contrast"
    ] == pytest.approx(1)
    assert value["base", "reflection", "deduction"] == pytest.approx(0.5**0.5)
    assert value["distilled", "contrast", "deduction"] == pytest.approx(-1)
    assert frame[frame["a"] == "deduction"]["cosine"].isna().all(), (
        "one feature for two categories says nothing"
    )
    assert len(frame) == 12 and (frame["null_low"] < frame["null_high"]).all()
    with pytest.raises(UserError, match="at least two"):
        similarity.category_cosines(crosscoder, {"reflection": 0, "contrast": 1}, np.arange(40) == 3)
