"""AUROC, thresholds and token-only predictors: by hand, against sklearn, and on what must not break them."""

import numpy as np
import pytest
from scipy import sparse
from sklearn.metrics import f1_score, precision_score, r2_score, recall_score, roc_auc_score

from lib import stats
from lib.features import auroc as detection


@pytest.fixture
def sample():
    """Sparse codes with many ties [300, 12] (columns 10 dense, 11 empty) and three kinds of positives [300,
    3].
    """
    rng = np.random.default_rng(0)
    dense = rng.integers(0, 4, (300, 12)) * (rng.random((300, 12)) < np.linspace(0.02, 0.9, 12)) / 4.0
    dense[:, 10] = rng.random(300) + 0.1
    dense[:, 11] = 0
    positive = np.stack(
        [rng.random(300) < 0.3, rng.random(300) < 0.02 + 0.5 * (dense[:, 9] > 0), np.arange(300) == 7], axis=1
    )
    return dense.astype(np.float32), positive


def test_auroc_by_hand():
    # values 0 0 0.5 2, positives at 0 and 2: pairs (0, 0) tie, (0, 0.5) lost, (2, 0) and (2, 0.5) won: (0.5 +
    # 0 + 1 + 1) / 4
    codes = sparse.csr_matrix(np.array([[0.0], [0.0], [0.5], [2.0]]))
    assert detection.auroc(codes, np.array([True, False, False, True])).tolist() == [0.625]


def test_auroc_equals_sklearn(sample):
    dense, positive = sample
    found = detection.auroc(sparse.csr_matrix(dense), positive)
    expected = [[roc_auc_score(positive[:, c], dense[:, f]) for c in range(3)] for f in range(12)]
    assert np.allclose(found, expected, atol=1e-12)
    assert found[11].tolist() == [0.5] * 3, "a feature that never fires is at chance"
    assert np.array_equal(detection.auroc(sparse.csr_matrix(dense), positive[:, 0]), found[:, 0])


def test_auroc_does_not_need_clean_storage(sample):
    dense, positive = sample
    stored = sparse.csr_matrix(dense)
    stored.data[::3] = 0  # explicit zeros
    shuffled = sparse.coo_matrix(stored)
    order = np.random.default_rng(1).permutation(shuffled.nnz)
    shuffled = sparse.coo_matrix(
        (shuffled.data[order], (shuffled.row[order], shuffled.col[order])), shape=shuffled.shape
    )
    assert np.allclose(
        detection.auroc(shuffled, positive), detection.auroc(sparse.csr_matrix(stored.toarray()), positive)
    )
    csc = sparse.csc_matrix(dense)
    before = csc.nnz
    detection.auroc(csc, positive)
    assert csc.nnz == before, "the argument is left alone"


def test_auroc_is_not_defined_without_both_kinds():
    codes = sparse.csr_matrix(np.array([[1.0], [0.0]]))
    assert np.isnan(detection.auroc(codes, np.array([False, False]))).all()
    assert np.isnan(detection.auroc(codes, np.array([True, True]))).all()
    assert np.isnan(detection.auroc(sparse.csr_matrix((0, 3)), np.zeros((0, 2), dtype=bool))).all()
    assert np.isnan(detection.auroc_of(np.zeros(0), np.zeros(0, dtype=bool)))


@pytest.mark.parametrize("bad", [-1.0, np.nan])
def test_nonsense_codes_are_refused(bad):
    with pytest.raises(ValueError, match="not negative"):
        detection.auroc(sparse.csr_matrix(np.array([[bad], [1.0]])), np.array([True, False]))


def test_threshold_by_hand():
    # in descending order 3+ 2- 2+ 1+ 0+: "f >= 2" has F1 = 4/7, "f >= 1" has 6/8; the positive at 0 cannot be
    # reached
    codes = sparse.csr_matrix(np.array([[3.0], [2.0], [2.0], [1.0], [0.0]]))
    positive = np.array([True, False, True, True, True])
    assert detection.best_thresholds(codes, positive).tolist() == [1.0]
    precision, recall = detection.precision_recall(codes, positive, np.array([2.0]))
    assert precision.tolist() == pytest.approx([2 / 3]) and recall.tolist() == [0.5]


def test_thresholds_and_precision_against_sklearn(sample):
    dense, positive = sample
    codes = sparse.csr_matrix(dense)
    found = detection.best_thresholds(codes, positive)
    precision, recall = detection.precision_recall(codes, positive, found)
    for f in range(11):
        for c in range(3):
            scores = {
                t: f1_score(positive[:, c], dense[:, f] >= t, zero_division=0)
                for t in np.unique(dense[:, f])
                if t > 0
            }
            assert scores[np.float32(found[f, c])] == pytest.approx(max(scores.values()))
            said = dense[:, f] >= np.float32(found[f, c])
            assert precision[f, c] == pytest.approx(precision_score(positive[:, c], said))
            assert recall[f, c] == pytest.approx(recall_score(positive[:, c], said))
    assert np.isnan(found[11]).all() and np.isnan(precision[11]).all() and recall[11].tolist() == [0, 0, 0]


def test_thresholds_of_nothing():
    assert np.isnan(detection.best_thresholds(sparse.csr_matrix((5, 2)), np.ones(5, dtype=bool))).all()
    codes = sparse.csr_matrix(np.ones((3, 1)))
    assert np.isnan(detection.best_thresholds(codes, np.zeros(3, dtype=bool))).all()
    assert np.isnan(detection.precision_recall(codes, np.zeros(3, dtype=bool), np.array([0.5]))[1]).all()


def test_weighted_auroc_counts_weights_as_copies():
    scores, up, down = np.array([0.0, 1, 1, 2]), np.array([0, 2, 0, 1]), np.array([3, 0, 1, 0])
    expected = roc_auc_score(np.repeat([0, 0, 0, 1, 1, 0, 1], 1), [0, 0, 0, 1, 1, 1, 2])
    assert float(detection.weighted_auroc(scores, up, down)) == pytest.approx(expected)


def test_resamples_draw_whole_documents_and_agree_with_copies():
    rng = np.random.default_rng(3)
    scores, positive, groups = (
        rng.integers(0, 5, 80) / 2,
        rng.random(80) < 0.4,
        np.sort(rng.integers(0, 9, 80)),
    )
    found = detection.auroc_resamples(scores, positive, groups, n_boot=20, seed=5)
    draw, ids = np.random.default_rng(5), np.unique(groups, return_inverse=True)[1]
    for value in found:
        rows = np.concatenate(
            [np.flatnonzero(ids == g) for g in draw.integers(ids.max() + 1, size=ids.max() + 1)]
        )
        assert value == pytest.approx(roc_auc_score(positive[rows], scores[rows]))
    assert np.array_equal(found, detection.auroc_resamples(scores, positive, groups, n_boot=20, seed=5))
    low, high = stats.interval(found)
    assert low < detection.auroc_of(scores, positive) < high
    assert np.isnan(
        detection.auroc_resamples(np.zeros(0), np.zeros(0, dtype=bool), np.zeros(0, dtype=int), n_boot=4)
    ).all()


def test_symbol_scores_by_hand():
    fit, positive = np.array([1, 1, 2, 2]), np.array([True, True, False, False])
    scores = detection.symbol_scores(fit, positive, np.array([1, 2, 7]))
    assert scores.tolist() == pytest.approx([2.5 / 3, 0.5 / 3, 0.5]), (
        "(hits + rate) / (count + 1); the overall rate for the unseen"
    )


def test_token_r2_equals_sklearn_and_tells_detectors_from_the_rest():
    rng = np.random.default_rng(0)
    tokens, fit_tokens = rng.integers(0, 6, 4000), rng.integers(0, 6, 4000)
    token_of = lambda t: np.stack(
        [
            (t == 2) * 1.5,
            rng.random(len(t)) * (rng.random(len(t)) < 0.2),
            (t == 3) * rng.random(len(t)),
            0.0 * t,
        ],
        axis=1,
    )
    fit_codes, codes = token_of(fit_tokens), token_of(tokens)
    found = detection.token_r2(sparse.csr_matrix(fit_codes), fit_tokens, sparse.csr_matrix(codes), tokens)
    means = np.stack([fit_codes[fit_tokens == t].mean(0) for t in range(6)])
    assert np.allclose(found[:3], [r2_score(codes[:, f], means[tokens, f]) for f in range(3)])
    assert (
        found[0] == pytest.approx(1) and abs(found[1]) < 0.02 and 0.5 < found[2] < 0.9 and np.isnan(found[3])
    )


def test_token_r2_out_of_sample_can_be_negative():
    codes, tokens = sparse.csr_matrix(np.array([[0.0], [1], [0], [1]])), np.array([0, 1, 0, 1])
    opposite = sparse.csr_matrix(np.array([[1.0], [0], [1], [0]]))
    assert detection.token_r2(opposite, tokens, codes, tokens)[0] < -1


def test_token_fires_auroc():
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 5, 3000)
    codes = sparse.csr_matrix(np.stack([tokens == 1, rng.random(3000) < 0.3], axis=1).astype(float))
    detector, noise = detection.token_fires_auroc(
        codes[:1500], tokens[:1500], codes[1500:], tokens[1500:], [0, 1]
    )
    assert detector == 1 and abs(noise - 0.5) < 0.05


def test_sum_by_leaves_out_negative_symbols():
    codes = sparse.csr_matrix(np.array([[1.0, 0], [2, 3], [4, 0]]))
    assert detection.sum_by(np.array([1, -1, 1]), codes, 3).toarray().tolist() == [[0, 0], [5, 0], [0, 0]]
