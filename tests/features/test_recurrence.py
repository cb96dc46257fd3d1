"""Matches and clusters of features over several crosscoders, against a truth that was planted."""

import numpy as np
import pytest
import torch

from lib.crosscoder.model import CrossCoder
from lib.features.recurrence import chance, match, recurrent

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


def test_matches_by_hand_and_the_chance_level(five):
    (a, at_a), (b, at_b) = five[0], five[1]
    found = match(a, b, np.ones(F, bool), np.ones(F, bool)).set_index("feature")
    for row in range(6):
        assert found.loc[at_a[row], "match"] == at_b[row]
        rows = a.W_dec[at_a[row]], b.W_dec[at_b[row]]
        expected = torch.nn.functional.cosine_similarity(*rows, dim=0).item()
        assert found.loc[at_a[row], "cosine"] == pytest.approx(expected, abs=1e-5)
    assert chance([a, b], [np.ones(F, bool)] * 2) < 0.5 < found["cosine"].median()
