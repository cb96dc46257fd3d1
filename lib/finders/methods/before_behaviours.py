import numpy as np
import torch

from ...crosscoder.codes import sample_rows
from ..claims import Claims
from ..finder import CHOSEN, Data, finder, sided
from ..finder import differences as _differences


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
