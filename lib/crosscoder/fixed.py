"""Selection and sparse products with shapes known beforehand: a training step for which no GPU has to wait.

``sparse`` finds as many entries as there are, and a GPU would have to tell the processor how many at every
step. Here their number is fixed: BatchTopK keeps ``wanted`` entries, TopK k a row. Where fewer are positive
the rest have the value 0, add nothing and get no gradient. Among equal strengths at the floor, of which
``sparse`` keeps all, some are left out; nothing else differs from it but the rounding of sums.

Five functions do the work, ``count``, ``write``, ``dots``, ``sums`` and ``weight_gradients``: here and in
``sparse`` in torch, which runs anywhere and is the reference; on a GPU with Triton those of
``triton_kernels``."""

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from . import sparse
from .sparse import PreActivations, SparseBatch
from .sparse import dots as dots
from .sparse import sums as sums
from .sparse import weight_gradients as weight_gradients

ROOM = 3  # candidates that there is room for, in multiples of the entries wanted
# thresholds that are tried, in multiples of the last one
LEVELS = (2.2, 1.5, 1.2, 1.08, 1.03, 1.01, 0.99, 0.97, 0.94, 0.9, 0.84, 0.76, 0.64, 0.45, 0.2, 0.0)


@dataclass
class FixedBatch(SparseBatch):
    """A code whose number of entries does not depend on the data. ``features`` ascend in a row only as far as
    values are positive; ``short`` (bool): there were more candidates than room, and some were passed over."""

    short: Tensor | None = None

    crowded, padded = False, True

    @property
    def rows(self) -> Tensor:
        numbers = torch.arange(len(self.features), device=self.indptr.device)
        return torch.searchsorted(self.indptr[1:], numbers, right=True).clamp(max=len(self.indptr) - 2)

    @property
    def entries(self) -> Tensor:
        return (self.values > 0).sum()

    def fired(self) -> Tensor:
        found = torch.zeros(self.n_features, dtype=torch.int8, device=self.features.device)
        return found.scatter_reduce(0, self.features, (self.values > 0).to(torch.int8), "amax").bool()

    def sums(self, W: Tensor) -> Tensor:
        return _best("sums", W)(self.indptr, self.features, self.values, W)

    def gradients(self, at_f, x, at_sums, W_dec, buffers) -> tuple[Tensor, Tensor, Tensor]:
        rows = self.rows
        at_code = _best("dots", W_dec)(rows, self.features, self.values, at_sums, W_dec)
        at_code = torch.where(self.values > 0, at_code if at_f is None else at_f + at_code, 0)
        entries = rows, self.features, self.values, at_code
        return _best("weight_gradients", W_dec)(*entries, x, at_sums, self.n_features)


@dataclass
class DenseBatch:
    """A code f [B, F] with its zeros: the L1 variant's, in which much is positive."""

    f: Tensor
    short = None

    @property
    def entries(self) -> Tensor:
        return (self.f > 0).sum()

    @property
    def floor(self) -> Tensor:
        return self.f.new_zeros(())

    def fired(self) -> Tensor:
        return (self.f > 0).any(0)

    def totals(self, values: Tensor) -> Tensor:
        return values.sum(0, dtype=torch.float32)


def dense(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, narrow: bool
) -> tuple[DenseBatch, Tensor, Tensor]:
    """(code, f [B, F], f @ W_dec [B, D]) of positive pre-activations; ``narrow``: products in bfloat16."""
    with torch.autocast(x.device.type, torch.bfloat16, enabled=narrow):
        f = torch.relu(functional.linear(x, W_enc, b_enc))
        sums = f @ W_dec
    return DenseBatch(f.detach()), f, sums.float()


def wanted_here(tensor: Tensor) -> bool:
    """Whether a training step on this tensor's device takes this way."""
    return not sparse.on_cpu(tensor)


# --- who fires ----------------------------------------------------------------------------------------------


@torch.no_grad()
def select_batch(
    encoded: PreActivations, per_unit: Tensor, wanted: int, hint: Tensor | float = 0.0
) -> FixedBatch:
    """``sparse.select_batch``: the ``wanted`` largest strengths. ``hint`` [] is a guess of the smallest of
    them; a number is none.

    At one of ``LEVELS`` times the guess enough entries are found in the encoder's products. With twice their
    rounding below it, no entry that belongs to the largest is passed over, unless room ends (``short``)."""
    B, F = encoded.products.shape
    wanted = min(wanted, B * F)
    guess = hint if isinstance(hint, Tensor) else sparse.guess(encoded, per_unit, wanted)[0]
    levels = guess * _levels(guess.device)
    parts = encoded.products, encoded.offset, per_unit
    counts = _best("count", per_unit)(*parts, levels).sum(0)
    reached = counts >= wanted
    # the first that enough entries reach; the last, which is 0, if none does
    first = torch.where(reached.any(), reached.int().argmax(), len(levels) - 1)
    low = levels.gather(0, first[None])[0] * (1 - 2 * encoded.rounding)
    of_rows = _best("count", per_unit)(*parts, low[None])[:, 0]
    room = min(max(ROOM * wanted, 1024), B * F)
    indptr = functional.pad(of_rows.cumsum(0), (1, 0))
    rows, features, values = _best("write", per_unit)(*parts, low, indptr, room)
    if encoded.rounding:
        values = _best("dots", per_unit)(rows, features, values, encoded.x, encoded.W_enc)
        values = (values + encoded.b_enc[features]).clamp(min=0)
    there = torch.arange(room, device=values.device) < indptr[-1]
    values = torch.where(there, values, 0)
    strength, best = torch.topk(values * per_unit[features], wanted, sorted=False)
    best = best.sort().values  # in the order of the rows
    floor = torch.where(strength > 0, strength, torch.inf).amin()
    floor = torch.where(floor.isinf(), 0, floor)
    code = _batch(rows[best], features[best], values[best], floor, B, encoded)
    code.short = indptr[-1] > room
    return code


@cache
def _levels(device: torch.device) -> Tensor:
    return torch.tensor(LEVELS, device=device)


@torch.no_grad()
def select_rows(
    encoded: PreActivations,
    per_unit: Tensor,
    k: int,
    among: Tensor | None = None,
    allowed: Tensor | None = None,
) -> FixedBatch:
    """``sparse.select_rows``; of ``among`` [n] those that are ``allowed`` [n] bool. Of rounded products the
    2 k largest of each row are computed again."""
    part, units = (encoded, per_unit) if among is None else (encoded.among(among), per_unit[among])
    units = units if allowed is None else units * allowed
    (B, n), k = part.products.shape, min(k, len(units))
    pre, candidates = part.floats().clamp(min=0), min(2 * k, n) if encoded.rounding else k
    columns = torch.topk(pre * units, candidates, dim=-1, sorted=False).indices.sort(dim=-1).values
    f = pre.gather(1, columns) * (units[columns] > 0)
    features = columns if among is None else among[columns]
    if encoded.rounding:
        rows = torch.arange(B, device=f.device).repeat_interleave(f.shape[1])
        exact = _best("dots", per_unit)(rows, features.flatten(), f.flatten(), encoded.x, encoded.W_enc)
        f = (exact.view_as(f) + encoded.b_enc[features]).clamp(min=0) * (f > 0)
        best = torch.topk(f * per_unit[features], k, dim=-1, sorted=False).indices.sort(dim=-1).values
        features, f = features.gather(1, best), f.gather(1, best)
    floor = (f * per_unit[features]).amin(-1).mean()
    rows = torch.arange(B, device=f.device).repeat_interleave(k)
    return _batch(rows, features.flatten(), f.flatten(), floor, B, encoded)


def _batch(rows, features, values, floor, B: int, encoded: PreActivations) -> FixedBatch:
    indptr = torch.searchsorted(rows, torch.arange(B + 1, device=rows.device))
    return FixedBatch(indptr, features, values, floor, len(encoded.W_enc))


# --- in torch -----------------------------------------------------------------------------------------------


def count(products: Tensor, offset: Tensor, per_unit: Tensor, levels: Tensor) -> Tensor:
    """How many entries of each row have a positive strength of at least each level: int32 [B, levels]."""
    strength = (products.float() + offset) * per_unit
    positive = strength > 0
    return torch.stack([((strength >= level) & positive).sum(-1, dtype=torch.int32) for level in levels], -1)


def write(
    products, offset, per_unit, low: Tensor, indptr: Tensor, room: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, features and values [room] of the entries of positive strength, at least ``low`` []; ``indptr``
    [B + 1]: where those of each row begin. What is beyond them is 0, of the last row."""
    pre = products.float() + offset
    strength = pre * per_unit
    found = ((strength >= low) & (strength > 0)).flatten()
    place = torch.where(found, found.cumsum(0) - 1, room).clamp(max=room)
    B, F = products.shape
    rows = torch.full((room + 1,), B - 1, device=low.device)
    features, values = torch.zeros_like(rows), torch.zeros(room + 1, device=low.device)
    numbers = torch.arange(B * F, device=low.device)
    rows.scatter_(0, place, numbers // F)
    features.scatter_(0, place, numbers % F)
    values.scatter_(0, place, pre.flatten())
    return rows[:room], features[:room], values[:room]


# --- which of both ------------------------------------------------------------------------------------------


def _best(name: str, tensor: Tensor):
    kernels = _triton() if tensor.is_cuda else None
    return globals()[name] if kernels is None else getattr(kernels, name)


@cache
def _triton():
    """The kernels, where Triton is installed: it comes with torch's builds for CUDA."""
    try:
        from . import triton_kernels
    except ImportError:
        return None
    return triton_kernels
