"""The dense reference: a crosscoder's training step as public trainers write it.

Every one of them multiplies the whole code [B, F] with the whole dictionary, though 50 of 16,384 entries of a
row are not zero: forward, gradient of the code and both weights' gradients together are five dense products,
10 B D F operations a step. Selection is one ``topk`` over the flattened batch, the optimiser
``torch.optim.Adam`` as it comes, the gradient clipped by its norm. This is BatchTopK without anything dead,
in the layout of those trainers: W_enc [model, d, F], W_dec [F, model, d].
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor, nn


class DenseCrossCoder(nn.Module):
    """``forward`` gives the loss of a batch x [B, models, d]; weights as those of
    ``lib.crosscoder.model.CrossCoder`` given to ``like``.
    """

    def __init__(self, models: int, width: int, n_features: int, k: int):
        super().__init__()
        self.k = k
        self.W_enc = nn.Parameter(torch.empty(models, width, n_features))
        self.W_dec = nn.Parameter(torch.empty(n_features, models, width))
        self.b_enc = nn.Parameter(torch.zeros(n_features))
        self.b_dec = nn.Parameter(torch.zeros(models, width))

    @classmethod
    def like(cls, crosscoder) -> DenseCrossCoder:
        models, width = len(crosscoder.widths), crosscoder.widths[0]
        dense = cls(models, width, crosscoder.n_features, crosscoder.k)
        with torch.no_grad():
            dense.W_enc.copy_(crosscoder.W_enc.T.reshape(models, width, -1))
            dense.W_dec.copy_(crosscoder.W_dec.reshape(-1, models, width))
            dense.b_enc.copy_(crosscoder.b_enc)
            dense.b_dec.copy_(crosscoder.b_dec.reshape(models, width))
        return dense

    def forward(self, x: Tensor) -> Tensor:
        f = torch.relu(torch.einsum("bmd,mdf->bf", x, self.W_enc) + self.b_enc)
        strength = (f * self.W_dec.norm(dim=-1).sum(-1)).flatten()
        kept = torch.topk(strength, self.k * len(x), sorted=False).indices
        f = torch.zeros_like(strength).scatter_(0, kept, f.flatten()[kept]).view_as(f)
        x_hat = torch.einsum("bf,fmd->bmd", f, self.W_dec) + self.b_dec
        return (x.float() - x_hat.float()).square().sum((1, 2)).mean()


class DenseTrainer:
    """Steps of the dense reference. ``fused`` and ``bfloat16`` give it what torch offers: a fused Adam,
    autocast.
    """

    def __init__(
        self, crosscoder, rate: float = 1e-4, clip: float = 1.0, fused: bool = False, bfloat16: bool = False
    ):
        self.crosscoder, self.clip, self.bfloat16 = DenseCrossCoder.like(crosscoder), clip, bfloat16
        self.crosscoder.to(crosscoder.W_enc.device)
        self.optimizer = torch.optim.Adam(self.crosscoder.parameters(), lr=rate, fused=fused or None)

    def step(self, x: Tensor) -> Tensor:
        self.optimizer.zero_grad()
        with torch.autocast(x.device.type, torch.bfloat16) if self.bfloat16 else contextlib.nullcontext():
            loss = self.crosscoder(x)
        loss.backward()
        nn.utils.clip_grad_norm_(self.crosscoder.parameters(), self.clip)
        self.optimizer.step()
        return loss.detach()
