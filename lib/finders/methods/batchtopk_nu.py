from ...features.latent_scaling import latent_scaling
from ..claims import Claims
from ..dictionary import features, trained
from ..finder import Data, finder


@finder("BatchTopK crosscoder, latent scaling", "confidence 1 - nu_eps")
def batchtopk_nu(data: Data) -> Claims:
    base, other = data.store.models
    crosscoder = trained(data, "batchtopk")
    table = latent_scaling(crosscoder, data.store, data.chosen, other, base, n_boot=0)
    return features(data, crosscoder, table["side"] == other, 1 - table["nu_eps"])
