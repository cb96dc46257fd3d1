from torch import Tensor

from ...crosscoder.model import Forward
from ...crosscoder.training import Trainer
from ..claims import Claims
from ..dictionary import by_nrn, trained
from ..finder import Data, finder


class Bridge(Trainer):
    """||e_d||^2 + ||e_b||^2 + 2 lambda e_d . e_b, between a crosscoder (lambda 0) and a dictionary of the
    difference (-1)."""

    weight = -0.5

    def losses(self, out: Forward, done: float) -> tuple[Tensor, Tensor, Tensor]:
        loss, error, extra = super().losses(out, done)
        base, other = self.crosscoder.split(out.x - out.x_hat)
        return loss + 2 * self.weight * (base * other).sum() / out.tokens, error, extra


@finder("bridge, NRN", "errors of both models with lambda -1/2 between them: half way to the diff-SAE")
def bridge(data: Data) -> Claims:
    return by_nrn(data, trained(data, "bridge", trainer=Bridge))
