from ..claims import Claims
from ..dictionary import by_nrn, trained
from ..finder import Data, finder


@finder("BatchTopK crosscoder, NRN", "the crosscoder of notebook 02")
def batchtopk_nrn(data: Data) -> Claims:
    return by_nrn(data, trained(data, "batchtopk"))
