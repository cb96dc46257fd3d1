import torch

from ...crosscoder.codes import encoded
from ..claims import Claims
from ..dictionary import View, strengths, trained
from ..finder import Data, finder, sided


@finder("diff-SAE", "a sparse autoencoder of x_d - x_b; how much of a feature is in one model alone")
def diff_sae(data: Data) -> Claims:
    view = View(data.store, "difference", (-1, 1))
    sae = trained(data, "sae_difference", view)
    f = torch.cat([f for _, _, f in encoded(sae, view, data.chosen)])
    strength = strengths(sae, view, data.chosen)
    alive = torch.from_numpy(strength > 0)
    return sided(data, data.chosen, sae.rows("difference")[alive], f[:, alive], strength[strength > 0])
