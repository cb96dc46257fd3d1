import torch
from torch import Tensor

from ...crosscoder.model import SHARED, Forward
from ...crosscoder.training import Trainer
from ..claims import Claims
from ..dictionary import by_nrn, trained
from ..finder import Data, finder
from .dedicated_nrn import DEDICATED


class Delta(Trainer):
    """A second loss: dedicated features alone must reconstruct x_distilled - x_base, about its mean."""

    def losses(self, out: Forward, done: float) -> tuple[Tensor, Tensor, Tensor]:
        loss, error, extra = super().losses(out, done)
        own = self.crosscoder.owner[out.code.features] != SHARED
        parts = out.f[own, None] * self.crosscoder.W_dec[out.code.features[own]]
        x_hat = torch.zeros_like(out.x).index_add(0, out.code.rows[own], parts)
        base, other = self.crosscoder.split(out.x - self.crosscoder.b_dec.detach() - x_hat)
        return loss + (other - base).square().sum() / out.tokens, error, extra


@finder("delta crosscoder, NRN", "a second loss: its dedicated features alone reconstruct x_d - x_b")
def delta(data: Data) -> Claims:
    return by_nrn(data, trained(data, "delta", trainer=Delta, dedicated=DEDICATED))
