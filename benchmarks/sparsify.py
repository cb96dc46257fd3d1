"""The best public sparse kernels: eai-sparsify's fused encoder and its decoder, as a crosscoder on
concatenated activations.

Its encoder's backward adds up rows instead of a dense product, its decoder is an ``embedding_bag``. It
selects k features per row (TopK). Loss, clipping and optimiser are those of the other rows of the benchmark,
with the fused Adam.
"""

from __future__ import annotations

import contextlib

import torch
from sparsify.fused_encoder import fused_encoder
from sparsify.utils import decoder_impl
from torch import Tensor, nn


class SparsifyTrainer:
    def __init__(self, crosscoder, rate: float = 1e-4, clip: float = 1.0, bfloat16: bool = False):
        self.W_enc, self.b_enc, self.W_dec, self.b_dec = (
            nn.Parameter(p.detach().clone())
            for p in (crosscoder.W_enc, crosscoder.b_enc, crosscoder.W_dec, crosscoder.b_dec)
        )
        self.parameters, self.k, self.clip, self.bfloat16 = (
            (self.W_enc, self.b_enc, self.W_dec, self.b_dec),
            crosscoder.k,
            clip,
            bfloat16,
        )
        self.optimizer = torch.optim.Adam(self.parameters, lr=rate, fused=True)

    def step(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        self.optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16) if self.bfloat16 else contextlib.nullcontext():
            f, indices, _ = fused_encoder(x, self.W_enc, self.b_enc, self.k, "topk")
        x_hat = decoder_impl(indices, f.float(), self.W_dec.mT) + self.b_dec
        loss = (x - x_hat).square().sum(-1).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, self.clip)
        self.optimizer.step()
        return loss.detach()
