from ...features.use import solo_codes
from ..claims import Claims
from ..dictionary import by_change, features, trained
from ..finder import Data, finder


@finder("BatchTopK crosscoder, use", "how much more one model activates a feature than the other")
def batchtopk_use(data: Data) -> Claims:
    crosscoder = trained(data, "batchtopk")
    return features(data, crosscoder, *by_change(data, solo_codes(crosscoder, data.store, data.chosen)))
