from ..claims import Claims
from ..dictionary import by_nrn, trained
from ..finder import Data, finder

DEDICATED = 0.125  # share of the dictionary that is reserved for each model


@finder("dedicated crosscoder, NRN", "an eighth of its features reserved for each model")
def dedicated_nrn(data: Data) -> Claims:
    return by_nrn(data, trained(data, "dedicated", dedicated=DEDICATED))
