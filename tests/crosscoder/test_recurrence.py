"""Matches and clusters of features over several crosscoders, against a truth that was planted."""

import itertools

import numpy as np
import pytest
import torch

from lib.crosscoder import recurrence
from lib.crosscoder.model import CrossCoder
from lib.crosscoder.recurrence import match, recurrent

F, WIDTH = 12, 16


def planted(seed: int, shared: torch.Tensor, noise: float = 0.05) -> tuple[CrossCoder, np.ndarray]:
    """(crosscoder, place [F] of each planted row): ``shared`` [n, 2 WIDTH] among rows of its own, in an order
    of its own."""
    draw = torch.Generator().manual_seed(seed)
    rows = torch.randn(F, 2 * WIDTH, generator=draw)
    rows[: len(shared)] = shared + noise * torch.randn(shared.shape, generator=draw)
    order = torch.randperm(F, generator=draw)
    crosscoder = CrossCoder((WIDTH, WIDTH), F, k=2)
    # a row's length says nothing of what it is
    crosscoder.W_dec.data = rows[order] * torch.rand(F, 1, generator=draw).add(0.5)
    return crosscoder, order.argsort().numpy()


@pytest.fixture(scope="module")
def five():
    """Five crosscoders: rows 0 to 3 are in all of them, row 4 in four, row 5 in three."""
    truth = torch.randn(6, 2 * WIDTH, generator=torch.Generator().manual_seed(99))
    return [planted(seed, truth[: 6 if seed < 3 else 5 if seed < 4 else 4]) for seed in range(5)]


def test_clusters_are_the_planted_features(five):
    crosscoders, places = zip(*five)
    table = recurrent(crosscoders, [np.ones(F, bool)] * 5)
    assert len(table) == 5 * F
    where = table.set_index(["crosscoder", "feature"])
    for row, members in ((0, 5), (1, 5), (2, 5), (3, 5), (4, 4), (5, 3)):
        found = [where.loc[(s, places[s][row])] for s in range(members)]
        assert len({x["cluster"] for x in found}) == 1
        assert all(x["members"] == members and x["recurrent"] == (members >= 4) for x in found)
    assert table["recurrent"].sum() == 4 * 5 + 4  # and nothing else
    assert where.loc[(0, places[0][0]), "stability"] > 0.95
    assert not table.duplicated(["cluster", "crosscoder"]).any()


def test_dead_features_take_no_part(five):
    crosscoders, places = zip(*five)
    alive = [np.ones(F, bool) for _ in range(5)]
    for s in (0, 1):
        alive[s][places[s][0]] = False
    table = recurrent(crosscoders, alive)
    assert len(table) == 5 * F - 2
    left = table[(table["crosscoder"] == 2) & (table["feature"] == places[2][0])].iloc[0]
    assert left["members"] == 3 and not left["recurrent"]


def test_two_features_alike_in_one_crosscoder_are_not_one():
    """The better match stays, the other one is a cluster of its own: nothing is counted twice."""
    truth = torch.randn(1, 2 * WIDTH, generator=torch.Generator().manual_seed(5))
    crosscoders = [planted(seed, truth.expand(2, -1), noise=0.3)[0] for seed in range(3)]
    table = recurrent(crosscoders, [np.ones(F, bool)] * 3)
    assert not table.duplicated(["cluster", "crosscoder"]).any()
    assert (table.groupby("cluster").size() <= 3).all()


def small(seed, n=6):
    crosscoder = CrossCoder((4, 4), n, k=2, seed=seed)
    with torch.no_grad():
        crosscoder.W_dec.copy_(torch.randn(n, 8, generator=torch.Generator().manual_seed(seed)))
    return crosscoder


def test_matching_finds_a_permuted_and_rescaled_copy():
    ours, order = small(0), [3, 1, 5, 0, 2, 4]
    theirs = small(1)
    with torch.no_grad():
        theirs.W_dec.copy_(ours.W_dec[order] * torch.linspace(0.5, 3, 6)[:, None])
    found = recurrence.match(ours, theirs, np.ones(6, bool), np.ones(6, bool))
    assert [order[m] for m in found.match] == list(range(6))
    assert found.cosine.to_numpy() == pytest.approx(1, abs=1e-6)


def test_matching_is_the_best_of_all_permutations():
    a, b = small(2, 5), small(3, 5)
    found = recurrence.match(a, b, np.ones(5, bool), np.ones(5, bool))
    rows = [torch.nn.functional.normalize(c.W_dec.detach(), dim=-1).numpy() for c in (a, b)]
    best = max(sum(rows[0][i] @ rows[1][p[i]] for i in range(5)) for p in itertools.permutations(range(5)))
    assert found.cosine.sum() == pytest.approx(best, abs=1e-5)


def test_dead_features_are_not_matched_and_leftovers_say_so():
    a, b = small(2), small(3)
    alive_b = np.array([True, False, True, False, False, True])
    found = recurrence.match(a, b, np.arange(6) != 4, alive_b)
    assert found.feature.tolist() == [0, 1, 2, 3, 5]
    assert set(found.match) - {-1} == {0, 2, 5} and (found.match == -1).sum() == 2
    assert found.cosine.isna().equals(found.match == -1)


def test_stability_averages_over_the_other_crosscoders():
    ours, copy, other = small(0), small(0), small(7)
    table = recurrence.stability([ours, copy, other], [np.ones(6, bool)] * 3)
    assert table.cosine_1.to_numpy() == pytest.approx(1, abs=1e-6)
    assert table.stability.to_numpy() == pytest.approx(((table.cosine_1 + table.cosine_2) / 2).to_numpy())
    assert (table.stability_low <= table.stability + 1e-9).all() and table.chance.mean() < 0.9


def test_other_seeds_have_less_in_common_by_chance(five):
    crosscoders = [five[0][0], five[1][0]]
    alive = [np.ones(F, bool)] * 2
    assert recurrence.chance(crosscoders, alive) < 0.5 < match(*crosscoders, *alive)["cosine"].median()
