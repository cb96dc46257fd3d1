import numpy as np
import torch
from scipy import sparse

from ...features.use import JOINT, SoloCodes
from ..claims import SIDES, Claims
from ..dictionary import View, by_change, trained
from ..finder import Data, finder


@finder("SAE of the base", "a sparse autoencoder of the base, read on both models; change of use")
def base_sae(data: Data) -> Claims:
    base, other = data.store.models
    view = View(data.store, "base", (1, 0))
    sae, codes = trained(data, "sae_base", view), {}
    with torch.no_grad():
        for name, x in zip((base, other), data.scaled(data.chosen)):
            codes[name] = sparse.csr_matrix(sae.encode([x]).numpy())
    solo = SoloCodes(data.chosen, data.store.documents[data.chosen], codes | {JOINT: codes[base]})
    second, confidence = by_change(data, solo)
    mass = sum(np.asarray(c.sum(0)).ravel() for c in codes.values()) * sae.strength_per_unit().numpy()
    order = np.argsort(-mass, kind="stable")[: int((mass > 0).sum())]
    rows = data.raw(sae.rows("base")[torch.from_numpy(order)])
    return Claims.of(*rows, np.array(SIDES, dtype=object)[second.astype(int)][order], confidence[order])
