import numpy as np

from ..claims import Claims
from ..dictionary import features, trained
from ..finder import Data, finder


@finder("random features", "a control: features of the same crosscoder in a random order, with a random side")
def random_features(data: Data) -> Claims:
    crosscoder, rng = trained(data, "batchtopk"), np.random.default_rng(data.config.seed)
    second, confidence = rng.random((2, crosscoder.n_features))
    return features(data, crosscoder, second > 0.5, confidence)
