"""Features of errors and of the mode, found by hand; thoughts without them; careful minus quick."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy import sparse
from toys import toy_pair, toy_store

from lib.crosscoder.codes import SplitCodes
from lib.crosscoder.model import CrossCoder
from lib.distil import trials
from lib.results import Results
from lib.runs import Run
from lib.steering import facts


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    folder = tmp_path_factory.mktemp("facts")
    pair = toy_pair(folder, widths=(16, 16))
    store = toy_store(folder, 4000, widths=(16, 16), corpus="modes")
    crosscoder = CrossCoder((16, 16), 12, store.models, k=3, scales=tuple(store.scales.values()), seed=1)
    crosscoder.centre(list(store.means.values()))
    parts = {"run": Run("tiny", "toy", folder), "pair": pair, "store": store, "fingerprint": "1", "number": 0}
    one = SimpleNamespace(crosscoder=crosscoder.requires_grad_(False), **parts)
    one.each = (one,)
    return one


def planted(opened, monkeypatch, columns: dict[int, np.ndarray]):
    """Codes of which some columns are given, for all tokens of the store."""

    def codes(crosscoder, store, split):
        rows = store.rows(split)
        dense = np.random.default_rng(0).random((len(rows), 12))
        for number, values in columns.items():
            dense[:, number] = values[rows]
        return SplitCodes(rows, sparse.csr_matrix(dense.astype(np.float32)))

    monkeypatch.setattr(facts, "codes", codes)


def test_features_of_errors_are_the_best_ones_above_a_limit(opened, monkeypatch):
    wrong = (opened.store.labels["error"] == 1).astype(float)
    noisy = np.where(np.random.default_rng(1).random(len(wrong)) < 0.2, 1 - wrong, wrong)
    planted(opened, monkeypatch, {4: wrong, 9: noisy, 2: 1 - wrong})
    assert facts.error_features(opened)[:2] == (4, 9), "the one that falls silent at errors is none"
    assert 2 not in facts.error_features(opened) and len(facts.error_features(opened)) <= facts.MOST


def test_the_direction_of_the_mode_is_careful_minus_quick(opened, monkeypatch):
    store = opened.store
    mode = (store.labels["mode"] == 1).astype(float)
    planted(opened, monkeypatch, {7: 1 - mode})
    (mean,), ((number, own),) = facts.mode_directions(opened, 2.0)
    means = {}
    for careful in (0, 1):
        rows = [
            r for r in store.rows("choose") if store.labels["ends"][r] and store.labels["mode"][r] == careful
        ]
        means[careful] = store.activations(np.array(rows))[1].double().mean(0)
    difference = (means[1] - means[0]).float()
    torch.testing.assert_close(mean.vector, 2 * difference / difference.norm(), rtol=1e-4, atol=1e-5)
    row = opened.crosscoder.rows("distilled", raw=True)[7]
    torch.testing.assert_close(own.vector, -2 * row / row.norm())  # it fires in quick thoughts
    assert number == 0 and own.label == mean.label == "verification"


def test_without_modes_there_is_no_direction(opened):
    silent = SimpleNamespace(labels={"mode": np.full(5, -1, np.int8)})
    assert facts.mode_directions(SimpleNamespace(store=silent, each=()), 1.0) == ([], [])


def test_thoughts_without_features_of_errors(opened, monkeypatch):
    results = Results("04", opened.run, {})
    monkeypatch.setattr(facts, "error_features", lambda one: (0, 3))
    assert facts.record_errors(results, opened, trials.puzzles(3, "test"), 6) == ""
    assert {"p_reflect_given_error_ablated", "p_reflect_given_error_random"} <= set(results.metrics)
    assert results.values["n_error_features"] == 2 and "features of errors" in facts.shows(results)
    nothing = Results("04", opened.run, {})
    monkeypatch.setattr(facts, "error_features", lambda one: ())
    facts.record_errors(nothing, opened, trials.puzzles(3, "test"), 6)
    assert nothing.values["ablate_error_accuracy_change"] == nothing.values["ablate_error_over_random"] == 0
    no_errors = SimpleNamespace(store=SimpleNamespace(labels={"error": np.zeros(4)}))
    assert facts.record_errors(nothing, no_errors, []) == "the text does not say which steps are wrong"
