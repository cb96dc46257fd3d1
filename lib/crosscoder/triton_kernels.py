"""The five functions of ``fixed`` as Triton kernels. Every sum has its order: a run repeats to the bit.

Products are taken feature by feature: a row of weights is read once and stays in registers, and the rows of
the batch that it meets come from the cache. A feature of many tokens is cut into chunks of ``CHUNK`` entries,
whose partial sums a second kernel adds up."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 128  # entries of a feature that one program takes
BLOCK = 512  # columns at once
MANY = 8  # entries at once


@triton.jit
def _count(products, offset, per_unit, levels, out, F, N: tl.constexpr, BLOCK: tl.constexpr):
    b = tl.program_id(0).to(tl.int64)
    level = tl.load(levels + tl.arange(0, N))
    total = tl.zeros([N], tl.int32)
    for start in range(0, F, BLOCK):
        i = start + tl.arange(0, BLOCK)
        f = tl.load(products + b * F + i, mask=i < F, other=0.0).to(tl.float32)
        v = (f + tl.load(offset + i, mask=i < F, other=0.0)) * tl.load(per_unit + i, mask=i < F, other=0.0)
        found = (v[None, :] >= level[:, None]) & (v[None, :] > 0)
        total += tl.sum(found.to(tl.int32), axis=1)
    tl.store(out + b * N + tl.arange(0, N), total)


@triton.jit
def _write(products, offset, per_unit, low, indptr, rows, features, values, F, room, BLOCK: tl.constexpr):
    b = tl.program_id(0).to(tl.int64)
    least, place = tl.load(low), tl.load(indptr + b)
    for start in range(0, F, BLOCK):
        i = start + tl.arange(0, BLOCK)
        f = tl.load(products + b * F + i, mask=i < F, other=0.0).to(tl.float32)
        f += tl.load(offset + i, mask=i < F, other=0.0)
        v = f * tl.load(per_unit + i, mask=i < F, other=0.0)
        found = ((v >= least) & (v > 0)).to(tl.int32)
        at = place + tl.cumsum(found, 0) - 1
        kept = (found == 1) & (at < room)
        tl.store(rows + at, tl.zeros([BLOCK], tl.int64) + b, mask=kept)
        tl.store(features + at, i.to(tl.int64), mask=kept)
        tl.store(values + at, f, mask=kept)
        place += tl.sum(found, 0)


@triton.jit
def _dots(first, last, owner, order, rows, x, W, out, D, BLOCK: tl.constexpr, MANY: tl.constexpr):
    p = tl.program_id(0)
    i = tl.load(owner + p).to(tl.int64)
    end = tl.load(last + p)
    for start in range(tl.load(first + p), end, MANY):
        j = start + tl.arange(0, MANY)
        entry = tl.load(order + j, mask=j < end, other=0)
        b = tl.load(rows + entry, mask=j < end, other=0)
        total = tl.zeros([MANY, BLOCK], tl.float32)
        for at in range(0, D, BLOCK):
            d = at + tl.arange(0, BLOCK)
            w = tl.load(W + i * D + d, mask=d < D, other=0.0)
            there = (j < end)[:, None] & (d < D)[None, :]
            total += w[None, :] * tl.load(x + b[:, None] * D + d[None, :], mask=there, other=0.0)
        tl.store(out + entry, tl.sum(total, axis=1), mask=j < end)


@triton.jit
def _sums(indptr, features, values, W, out, D, BLOCK: tl.constexpr, MANY: tl.constexpr):
    b = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    end = tl.load(indptr + b + 1)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(tl.load(indptr + b), end, MANY):
        j = start + tl.arange(0, MANY)
        f = tl.load(values + j, mask=j < end, other=0.0)
        i = tl.load(features + j, mask=j < end, other=0)
        there = (f > 0)[:, None] & (d < D)[None, :]
        total += tl.sum(f[:, None] * tl.load(W + i[:, None] * D + d[None, :], mask=there, other=0.0), axis=0)
    tl.store(out + b * D + d, total, mask=d < D)


@triton.jit
def _gradients(first, last, target, order, rows, values, at_code, x, at_sums, enc, dec, bias, D,
               BLOCK: tl.constexpr, MANY: tl.constexpr):  # fmt: skip
    p = tl.program_id(0)
    d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    to, end = tl.load(target + p).to(tl.int64), tl.load(last + p)
    e, g, total = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32), 0.0
    for start in range(tl.load(first + p), end, MANY):
        j = start + tl.arange(0, MANY)
        entry = tl.load(order + j, mask=j < end, other=0)
        b = tl.load(rows + entry, mask=j < end, other=0)
        a = tl.load(at_code + entry, mask=j < end, other=0.0)
        f = tl.load(values + entry, mask=j < end, other=0.0)
        there = (j < end)[:, None] & (d < D)[None, :]
        place = b[:, None] * D + d[None, :]
        e += tl.sum(a[:, None] * tl.load(x + place, mask=there, other=0.0), axis=0)
        g += tl.sum(f[:, None] * tl.load(at_sums + place, mask=there, other=0.0), axis=0)
        total += tl.sum(a, axis=0)
    tl.store(enc + to * D + d, e, mask=d < D)
    tl.store(dec + to * D + d, g, mask=d < D)
    tl.store(bias + to, total, mask=tl.program_id(1) == 0)


@triton.jit
def _joined(begin, chunks, enc, dec, bias, F, D, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64)
    n, at = tl.load(chunks + i), tl.load(begin + i).to(tl.int64) + F
    if n > 1:
        d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        e, g, total = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32), 0.0
        for c in range(0, n):
            e += tl.load(enc + (at + c) * D + d, mask=d < D, other=0.0)
            g += tl.load(dec + (at + c) * D + d, mask=d < D, other=0.0)
            total += tl.load(bias + at + c)
        tl.store(enc + i * D + d, e, mask=d < D)
        tl.store(dec + i * D + d, g, mask=d < D)
        tl.store(bias + i, total, mask=tl.program_id(1) == 0)


@dataclass
class _Chunks:
    """Entries [n] in the order of their features, cut: chunk p has the entries first[p] to last[p] of
    ``order``, all of feature owner[p]. Every feature has a chunk, of entries or of none; entries of value 0
    are in none. Of a feature with several, their sums lie at target[p] >= F, from F + begin[feature] on."""

    first: Tensor
    last: Tensor
    owner: Tensor
    target: Tensor
    order: Tensor
    begin: Tensor
    chunks: Tensor
    extra: int

    @classmethod
    def of(cls, features: Tensor, values: Tensor, F: int) -> _Chunks:
        n, device = len(features), features.device
        key, order = torch.where(values > 0, features, F).sort(stable=True)
        columns = torch.searchsorted(key, torch.arange(F + 1, device=device))
        chunks = (columns.diff() + CHUNK - 1) // CHUNK
        several = torch.where(chunks > 1, chunks, 0)
        begin = several.cumsum(0) - several
        chunks = chunks.clamp(min=1)
        until = chunks.cumsum(0)
        number = torch.arange(F + n // CHUNK, device=device)  # as many as there may be
        owner = torch.searchsorted(until, number, right=True)
        none, owner = owner >= F, owner.clamp(max=F - 1)
        place = number - (until - chunks)[owner]
        first = columns[owner] + place * CHUNK
        last = torch.where(none, first, torch.minimum(first + CHUNK, columns[owner + 1]))
        extra = 2 * (n // CHUNK) + 3  # chunks of features with several, at most
        target = torch.where(chunks[owner] > 1, F + begin[owner] + place, owner)
        target = torch.where(none, F + extra - 1, target)  # where nobody reads
        return cls(first, last, owner, target, order, begin, chunks, extra)


def count(products: Tensor, offset: Tensor, per_unit: Tensor, levels: Tensor) -> Tensor:
    B, F = products.shape
    out = torch.empty(B, len(levels), dtype=torch.int32, device=products.device)
    _count[(B,)](products, offset, per_unit, levels, out, F, N=len(levels), BLOCK=BLOCK)
    return out


def write(
    products, offset, per_unit, low: Tensor, indptr: Tensor, room: int
) -> tuple[Tensor, Tensor, Tensor]:
    B, F = products.shape
    rows = torch.full((room,), B - 1, device=products.device)
    features, values = torch.zeros_like(rows), torch.zeros(room, device=products.device)
    _write[(B,)](products, offset, per_unit, low, indptr, rows, features, values, F, room, BLOCK=2 * BLOCK)
    return rows, features, values


def dots(rows: Tensor, features: Tensor, values: Tensor, x: Tensor, W: Tensor) -> Tensor:
    c, out = _Chunks.of(features, values, len(W)), torch.zeros(len(features), device=x.device)
    _dots[(len(c.owner),)](
        c.first, c.last, c.owner, c.order, rows, x, W, out, x.shape[1], BLOCK=BLOCK, MANY=MANY
    )
    return out


def sums(indptr: Tensor, features: Tensor, values: Tensor, W: Tensor) -> Tensor:
    (_, D), B = W.shape, len(indptr) - 1
    out = torch.empty(B, D, device=W.device)
    _sums[(B, triton.cdiv(D, BLOCK))](indptr, features, values, W, out, D, BLOCK=BLOCK, MANY=MANY)
    return out


def weight_gradients(
    rows: Tensor, features: Tensor, values: Tensor, at_code: Tensor, x: Tensor, at_sums: Tensor, F: int
) -> tuple[Tensor, Tensor, Tensor]:
    c, D = _Chunks.of(features, values, F), x.shape[1]
    # beyond F: sums of chunks
    enc, dec = (torch.empty(F + c.extra, D, device=x.device) for _ in range(2))
    bias, blocks = torch.empty(F + c.extra, device=x.device), triton.cdiv(D, BLOCK)
    parts = c.order, rows, values, at_code, x, at_sums, enc, dec, bias, D
    _gradients[(len(c.owner), blocks)](c.first, c.last, c.target, *parts, BLOCK=BLOCK, MANY=MANY)
    _joined[(F, blocks)](c.begin, c.chunks, enc, dec, bias, F, D, BLOCK=BLOCK)
    return enc[:F], bias[:F], dec[:F]
