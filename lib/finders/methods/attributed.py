import numpy as np

from ...steering.ablation import attribution
from ..claims import Claims
from ..dictionary import features, trained
from ..finder import Data, finder


@finder(
    "BatchTopK crosscoder, attribution",
    "to the log-probability of the behaviours' first words, on the split choose",
    labels=True,
)
def attributed(data: Data) -> Claims:
    crosscoder, other = trained(data, "batchtopk"), data.store.models[1]
    (found,) = attribution(data.store, [crosscoder], data.open_model(), data.targets, other)
    lost = -np.min(list(found.values()), axis=0)  # for the category that loses most
    return features(data, crosscoder, np.ones(len(lost), dtype=bool), 1 - np.exp(-lost.clip(0)))
