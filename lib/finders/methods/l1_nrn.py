from dataclasses import replace

from ...study.architectures import match_l1
from ..claims import Claims
from ..dictionary import by_nrn, trained
from ..finder import Data, finder


@finder("L1 crosscoder, NRN", "lambda at which it has the L0 of the others")
def l1_nrn(data: Data) -> Claims:
    first, folder = replace(data.config, seed=0), data.folder.parent / "match_l1"  # one lambda for all seeds
    weight, _ = match_l1(data.store, first.k, first, folder, tolerance=0.25, most=5)
    return by_nrn(data, trained(data, "l1", variant="l1", precision="float32", l1=weight))
