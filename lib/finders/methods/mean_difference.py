import torch

from ...crosscoder.codes import sample_rows
from ..claims import Claims
from ..finder import CHOSEN, Data, finder, sided
from ..finder import differences as _differences


@finder("mean difference", "one direction: the mean of x_d - x_b over all tokens", seeded=False)
def mean_difference(data: Data) -> Claims:
    rows = sample_rows(data.store, "train", CHOSEN)
    v = _differences(data, rows).mean(0, keepdim=True)
    return sided(data, rows, v, torch.ones(len(rows), 1), side="distilled")
