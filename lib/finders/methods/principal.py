import torch

from ...crosscoder.codes import sample_rows
from ..claims import Claims
from ..finder import CHOSEN, Data, finder, sided
from ..finder import differences as _differences


@finder("PCA of differences", "principal components of x_d - x_b", seeded=False)
def principal(data: Data) -> Claims:
    difference = _differences(data, sample_rows(data.store, "train", CHOSEN))
    values, vectors = torch.linalg.eigh(torch.cov(difference.T))
    v = vectors.T.flip(0)
    return sided(data, data.chosen, v, _differences(data, data.chosen) @ v.T, values.flip(0))
