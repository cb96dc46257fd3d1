"""Finders that train nothing: means and principal components of x_distilled - x_base.

A mean difference says what the distilled model adds at some tokens, and not whose it is: its claims are of
the distilled side."""

from __future__ import annotations

import numpy as np
import torch

from ..crosscoder.codes import sample_rows
from .claims import Claims
from .finder import CHOSEN, Data, finder, sided


def _differences(data: Data, rows: np.ndarray) -> torch.Tensor:
    base, other = data.scaled(rows)
    return other - base


@finder("mean difference", "one direction: the mean of x_d - x_b over all tokens", seeded=False)
def mean_difference(data: Data) -> Claims:
    rows = sample_rows(data.store, "train", CHOSEN)
    v = _differences(data, rows).mean(0, keepdim=True)
    return sided(data, rows, v, torch.ones(len(rows), 1), side="distilled")


@finder(
    "mean difference before behaviours",
    "for each category: the mean of x_d - x_b right before its sentences, minus that of all tokens",
    labels=True,
    seeded=False,
)
def before_behaviours(data: Data) -> Claims:
    rows = np.union1d(sample_rows(data.store, "choose", CHOSEN), data.targets["row"])
    difference, names = _differences(data, rows), data.targets["category"].unique()
    before = [np.isin(rows, data.targets.loc[data.targets["category"] == c, "row"]) for c in names]
    f = torch.from_numpy(np.stack(before, axis=1)).float()
    v = f.T @ difference / f.sum(0)[:, None] - difference.mean(0)
    return sided(data, rows, v, f, side="distilled")


@finder("PCA of differences", "principal components of x_d - x_b", seeded=False)
def principal(data: Data) -> Claims:
    difference = _differences(data, sample_rows(data.store, "train", CHOSEN))
    values, vectors = torch.linalg.eigh(torch.cov(difference.T))
    v = vectors.T.flip(0)
    return sided(data, data.chosen, v, _differences(data, data.chosen) @ v.T, values.flip(0))
