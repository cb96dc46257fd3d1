"""Products with sparse codes: the part of a crosscoder's training step that grows with k instead of F.

A code has B rows of F entries, of which about k a row are not zero. Dense, a training step multiplies B x F
with F x D five times: 10 B D F operations. Only the encoder needs that (2 B D F); the rest costs 8 B D k::

    encoded = encode(x, W_enc, b_enc)                           # every feature's pre-activation
    code = select_batch(encoded, per_unit, wanted)              # who fires
    f, sums = reconstruct(W_enc, b_enc, W_dec, x, code)         # sums = f @ W_dec; exact gradients

With ``dtype=torch.bfloat16`` the encoder only screens: whoever comes near the threshold is computed again in
float32, and selected by that value. Every product is there twice, with equal results: as compiled loops for a
CPU (numba), and in torch's own operations for other devices."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from types import ModuleType

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

MARGIN = 0.96  # of the last threshold: where screening begins. It decides the time, not the result
# share by which a strength may be misjudged: twice the last bit
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 1 / 128}
ROOM = 8  # places per row that screening begins with, in multiples of those wanted
CROWDED = 1 / 16  # share of entries that are not zero above which dense products are faster
CHUNK = 1 << 14  # entries at once in torch's versions: they gather a row of weights for each
COMPILED = True  # False takes torch's versions on the CPU too


def alone(own: Tensor) -> Tensor:
    """What all processes have, where there is one."""
    return own


@dataclass
class SparseBatch:
    """A sparse code [B, F], row by row: row b has the entries from ``indptr[b]`` to ``indptr[b + 1]``.

    indptr [B + 1] int64; features [n] int64, ascending in a row; values [n] float32, positive; floor:
    smallest strength kept."""

    indptr: Tensor
    features: Tensor
    values: Tensor
    floor: Tensor
    n_features: int
    padded = False  # whether entries of value 0 stand at places of others

    @property
    def rows(self) -> Tensor:
        """The row of each entry, [n]."""
        rows = torch.arange(len(self.indptr) - 1, device=self.indptr.device)
        return rows.repeat_interleave(self.indptr.diff(), output_size=len(self.features))

    @property
    def entries(self) -> int | Tensor:
        return len(self.features)

    @property
    def crowded(self) -> bool:
        return len(self.features) > CROWDED * (len(self.indptr) - 1) * self.n_features

    def totals(self, values: Tensor) -> Tensor:
        """The sum of ``values`` [n] of each feature's entries, [F], differentiable in them."""
        return values.new_zeros(self.n_features).index_add(0, self.features, values)

    def sums(self, W: Tensor) -> Tensor:
        """f @ W, [B, D]."""
        return _sums(self, W)

    def gradients(
        self, at_f: Tensor | None, x: Tensor, at_sums: Tensor, W_dec: Tensor, buffers: dict
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of W_enc, b_enc, W_dec from those of f [n] and of the sums [B, D]."""
        at_code = _dots(self, at_sums, W_dec)
        return _weight_gradients(self, at_code if at_f is None else at_f + at_code, x, at_sums, buffers)

    def fired(self) -> Tensor:
        """Which features have an entry, [F] bool."""
        found = torch.zeros(self.n_features, dtype=torch.bool, device=self.features.device)
        found[self.features] = True
        return found

    def dense(self, values: Tensor | None = None) -> Tensor:
        """[B, F] with its zeros; with ``values`` [n] in place of its own, differentiable in them."""
        values = self.values if values is None else values
        zeros = values.new_zeros(len(self.indptr) - 1, self.n_features)
        return zeros.index_put((self.rows, self.features), values, accumulate=self.padded)

    def where(self, kept: Tensor, floor: Tensor) -> SparseBatch:
        """The entries that a mask [n] leaves."""
        if not on_cpu(kept):
            left = {"features": self.features[kept], "values": self.values[kept], "floor": floor}
            return replace(self, indptr=functional.pad(kept.cumsum(0), (1, 0))[self.indptr], **left)
        # one thread: torch would wake all of them several times for what takes a tenth of a millisecond
        n = int(np.count_nonzero(kept.numpy()))
        new = torch.empty_like(self.indptr), torch.empty(n, dtype=torch.int64), torch.empty(n)
        old = self.indptr, self.features, self.values
        _loops().where_loop(kept.numpy(), *(t.numpy() for t in (*old, *new)))
        return SparseBatch(*new, floor, self.n_features)

    def above(self, other: SparseBatch) -> SparseBatch:
        """These rows, then those of ``other``."""
        both = {name: torch.cat([getattr(x, name) for x in (self, other)]) for name in ("features", "values")}
        return replace(self, indptr=torch.cat([self.indptr, other.indptr[1:] + self.indptr[-1]]), **both)


# --- who fires ----------------------------------------------------------------------------------------------


@dataclass
class PreActivations:
    """Pre-activations [B, F] of a batch, ``products`` + ``offset``, and what they come from, in float32:
    where products are narrower, a value that matters is computed again. ``names`` [F]: of the columns."""

    products: Tensor
    offset: Tensor
    x: Tensor
    W_enc: Tensor
    b_enc: Tensor
    names: Tensor | None = None

    @property
    def rounding(self) -> float:
        return ROUNDING[self.products.dtype]

    def __len__(self) -> int:
        return len(self.products)

    def floats(self, rows: slice = slice(None)) -> Tensor:
        """As float32 [rows, F]."""
        return self.products[rows].float() + self.offset

    def among(self, features: Tensor) -> PreActivations:
        """Of some features [n] only."""
        products, offset = self.products.index_select(1, features), self.offset[features]
        return replace(self, products=products, offset=offset, names=features)


@torch.no_grad()
def encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    dtype: torch.dtype = torch.float32,
    centre: Tensor | None = None,
    buffers: dict | None = None,
) -> PreActivations:
    """Pre-activations x W_enc^T + b_enc of x [B, D], in float32 or bfloat16 products.

    ``centre`` [D] is subtracted from x before rounding and made up for in the offset: activations far from 0
    would lose to it the bits that tell them apart. ``buffers`` is as in ``reconstruct``."""
    buffers = {} if buffers is None else buffers
    inputs, weights, offset = x, W_enc.detach(), b_enc.detach()
    if dtype != torch.float32:
        if centre is not None:
            inputs, offset = x - centre, offset + weights @ centre
        inputs = inputs.to(dtype)
        weights = _buffer(buffers, "weights", W_enc.shape, dtype, x.device).copy_(weights)
    products = _buffer(buffers, "products", (len(x), len(W_enc)), dtype, x.device)
    torch.mm(inputs, weights.T, out=products)
    return PreActivations(products, offset, x, W_enc.detach(), b_enc.detach())


def _buffer(buffers: dict, name: str, shape, dtype=torch.float32, device="cpu") -> Tensor:
    """Memory that is used again in the next step, if it has the right shape."""
    if name not in buffers or buffers[name].shape != torch.Size(shape) or buffers[name].dtype != dtype:
        buffers[name] = torch.empty(shape, dtype=dtype, device=device)
    return buffers[name]


@torch.no_grad()
def select_batch(
    encoded: PreActivations,
    per_unit: Tensor,
    wanted: int,
    hint: float = 0.0,
    gather: Callable[[Tensor], Tensor] = alone,
) -> SparseBatch:
    """BatchTopK: the ``wanted`` largest strengths v = f * per_unit of the batch, f = ReLU of the
    pre-activation. Values equal to the smallest one kept are kept too, zeros never.

    ``hint`` is a guess of that smallest value; it changes the time and not the result. ``gather`` joins the
    processes' 1-d tensors where each has a part of the batch or of the features: ``wanted`` counts over all.
    """
    precise, expected = 1 - encoded.rounding, max(wanted // len(encoded), 1)
    low = MARGIN * hint
    if low <= 0:
        low = float(gather(guess(encoded, per_unit, wanted)).mean())
    first = low
    while True:
        code = _above(encoded, per_unit, torch.full((len(encoded),), low, device=per_unit.device), expected)
        strength = code.values * per_unit[code.features]
        everyone = gather(strength)
        enough = len(everyone) >= wanted
        if enough:
            floor = torch.topk(everyone, wanted, sorted=False).values.min()
        else:
            floor = everyone.min() if len(everyone) else per_unit.new_zeros(())
        # Passed over was only what lies below low, give or take the rounding: no matter if all that was
        # wanted lies above.
        if low == 0 or (enough and float(floor) * precise >= low):
            return code.where(strength >= floor, floor)
        low = MARGIN * precise * float(floor) if enough else (low / 2 if low > first / 4 else 0.0)


@torch.no_grad()
def select_rows(
    encoded: PreActivations, per_unit: Tensor, k: int, among: Tensor | None = None
) -> SparseBatch:
    """TopK: the k largest strengths of each row, else as ``select_batch``; of the features ``among`` [n]
    only, if given. The floor is the mean of the rows' floors."""
    part, units = (encoded, per_unit) if among is None else (encoded.among(among), per_unit[among])
    k = min(k, len(units))
    code = _above(part, units, _row_floors(part, units, k) * (1 - 2 * encoded.rounding), k)
    strength = code.values * per_unit[code.features]
    floors = largest_of_rows(code, strength, k).amin(-1)
    return code.where(strength >= floors[code.rows], floors.mean())


def largest_of_rows(code: SparseBatch, strength: Tensor, k: int) -> Tensor:
    """The k largest of each row's strengths [n], in any order: [B, k], with zeros where a row has fewer."""
    counts = code.indptr.diff()
    columns = torch.arange(len(strength), device=strength.device) - code.indptr[:-1].repeat_interleave(counts)
    square = strength.new_zeros(len(counts), max(int(counts.max()), k))
    return square.index_put((code.rows, columns), strength).topk(k, dim=-1, sorted=False).values


@torch.no_grad()
def select_positive(encoded: PreActivations) -> SparseBatch:
    """Every positive entry, as the L1 variant has it: in float32, since rounding may change a sign."""
    sample = encoded.floats(slice(None, None, max(len(encoded) // 16, 1)))
    expected = int((sample > 0).sum(-1).max()) // ROOM * 2 + 1
    units = torch.ones_like(encoded.offset)
    return _above(encoded, units, torch.zeros(len(encoded), device=units.device), expected)


@torch.no_grad()
def select_above(encoded: PreActivations, per_unit: Tensor, low: float, expected: int) -> SparseBatch:
    """Every entry whose strength is at least ``low`` > 0, which must be well above the rounding of a product.
    ``expected``, in a row, changes the time and not the result."""
    least = torch.full((len(encoded),), low * (1 - 2 * encoded.rounding), device=per_unit.device)
    code = _above(encoded, per_unit, least, expected)
    return code.where(code.values * per_unit[code.features] >= low, code.floor) if encoded.rounding else code


def guess(encoded: PreActivations, per_unit: Tensor, wanted: int) -> Tensor:
    """A strength [1] that the wanted number of entries, and some more, exceed: from a sample of the rows."""
    step = max(len(encoded) // 32, 1)
    sample = (encoded.floats(slice(None, None, step)) * per_unit).flatten()
    n = min(max(int(1.2 * wanted / step), 1), len(sample))
    return torch.topk(sample, n, sorted=False).values.min().clamp(min=0)[None]


def _row_floors(encoded: PreActivations, per_unit: Tensor, k: int) -> Tensor:
    """A strength [B] that k entries of each row reach and not many more do."""
    if not on_cpu(per_unit):
        return torch.topk(encoded.floats().clamp(min=0) * per_unit, k, dim=-1, sorted=False).values.amin(-1)
    floors, arrays = torch.empty(len(encoded)), _arrays(encoded, per_unit)
    with _loops().threads(4 * encoded.products.numel()):
        _loops().row_floors_loop(*arrays, k, floors.numpy())
    return floors


def _above(encoded: PreActivations, per_unit: Tensor, low: Tensor, expected: int) -> SparseBatch:
    """Entries of positive strength, at least ``low`` [B], with float32 values; ``expected``: per row."""
    B, F = encoded.products.shape
    if on_cpu(per_unit):
        counts, room = np.zeros(B, dtype=np.int64), ROOM * expected
        while True:
            room = min(room, F)
            found, values = np.empty((B, room), dtype=np.int32), np.empty((B, room), dtype=np.float32)
            with _loops().threads(B * F):
                _loops().screen_loop(*_arrays(encoded, per_unit), low.numpy(), found, values, counts)
            if counts.max(initial=0) <= room:
                break
            room = int(counts.max())
        n, indptr = int(counts.sum()), torch.zeros(B + 1, dtype=torch.int64)
        features, f = torch.empty(n, dtype=torch.int64), torch.empty(n)
        _loops().flatten_loop(counts, found, values, indptr.numpy(), features.numpy(), f.numpy())
    else:
        pre = encoded.floats()
        strength = pre * per_unit
        rows, features = ((strength >= low[:, None]) & (strength > 0)).nonzero(as_tuple=True)
        indptr, f = functional.pad(torch.bincount(rows, minlength=B).cumsum(0), (1, 0)), pre[rows, features]
    if encoded.names is not None:
        features = encoded.names[features]
    code = SparseBatch(indptr, features, f, f.new_zeros(()), len(encoded.W_enc))
    if encoded.rounding:
        code.values = _dots(code, encoded.x, encoded.W_enc) + encoded.b_enc[features]
        code = code.where(code.values > 0, code.floor)
    return code


# --- the products -------------------------------------------------------------------------------------------


def reconstruct(
    W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, x: Tensor, code: SparseBatch, buffers: dict | None = None
) -> tuple[Tensor, Tensor]:
    """(f [n], sums [B, D]): the code's values, f = x W_enc^T + b_enc where it has entries, and f @ W_dec.

    Differentiable, exactly, in W_enc, b_enc and W_dec; x [B, D] is data. ``buffers``, a dict that the caller
    keeps, receives the memory of the weights' gradients for use in the next step, as large new arrays take
    longer to get than to fill: with it, a ``.grad`` is overwritten once it was set to None."""
    return _Reconstruct.apply(W_enc, b_enc, W_dec, x, code, buffers)


class _Reconstruct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, W_enc, b_enc, W_dec, x, code, buffers):
        ctx.save_for_backward(W_enc, W_dec, x)
        ctx.code, ctx.buffers = code, buffers
        ctx.set_materialize_grads(False)
        return code.values.clone(), code.sums(W_dec)

    @staticmethod
    def backward(ctx, grad_f, grad_sums):
        W_enc, W_dec, x = ctx.saved_tensors
        missing = grad_sums is None
        grad_sums = x.new_zeros(len(x), W_dec.shape[1]) if missing else grad_sums.contiguous()
        in_use = W_enc.grad is not None or W_dec.grad is not None  # then autograd adds to what is there
        buffers = {} if ctx.buffers is None or in_use else ctx.buffers
        return *ctx.code.gradients(grad_f, x, grad_sums, W_dec, buffers), None, None, None


def jump(sums: Tensor, log_theta: Tensor, W_dec: Tensor, edge: SparseBatch, rise: Tensor) -> Tensor:
    """``sums`` [B, D] unchanged, through which a loss reaches log theta [F]: JumpReLU's pseudo-gradient.

    An entry of ``edge`` [B, F], near its feature's threshold, would fall away if this rose: to log theta_i
    goes -rise_i times the gradient of every such entry's value, ``rise`` [F] its value at the threshold over
    the kernel's width (2407.14435, eq. 11, in log theta). W_dec gets no gradient here."""
    return _Jump.apply(sums, log_theta, W_dec.detach(), edge, rise)


class _Jump(torch.autograd.Function):
    @staticmethod
    def forward(ctx, sums, log_theta, W_dec, edge, rise):
        ctx.save_for_backward(W_dec, rise)
        ctx.edge = edge
        return sums.view_as(sums)

    @staticmethod
    def backward(ctx, grad_sums):
        W_dec, rise = ctx.saved_tensors
        at_value = _dots(ctx.edge, grad_sums.contiguous(), W_dec)
        at_theta = torch.zeros_like(rise).index_add_(0, ctx.edge.features, at_value) * -rise
        return grad_sums, at_theta, None, None, None


def _sums(code: SparseBatch, W: Tensor) -> Tensor:
    """f @ W, [B, D]."""
    if code.crowded:
        return code.dense() @ W
    if not on_cpu(W):
        return sums(code.indptr, code.features, code.values, W)
    out = torch.empty(len(code.indptr) - 1, W.shape[1])
    with _loops().threads(len(code.features) * W.shape[1]):
        entries = code.indptr.numpy(), code.features.numpy(), code.values.numpy()
        _loops().sums_loop(*entries, W.numpy(), out.numpy())
    return out


def _dots(code: SparseBatch, x: Tensor, W: Tensor) -> Tensor:
    """x_b . W_i for every entry (b, i) of the code, [n]."""
    if code.crowded:
        return (x @ W.T)[code.rows, code.features]
    if not on_cpu(W):
        return dots(code.rows, code.features, code.values, x, W)
    out = torch.empty(len(code.features))
    with _loops().threads(len(code.features) * W.shape[1]):
        _loops().dots_loop(code.indptr.numpy(), code.features.numpy(), x.numpy(), W.numpy(), out.numpy())
    return out


def _weight_gradients(
    code: SparseBatch, at_code: Tensor, x: Tensor, at_sums: Tensor, buffers: dict
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of W_enc, b_enc, W_dec from those of f [n] and of the sums [B, D]."""
    shape = (code.n_features, x.shape[1])
    if code.crowded:
        at_pre = code.dense(at_code)
        return at_pre.T @ x, at_pre.sum(0), code.dense().T @ at_sums
    if not on_cpu(x):
        entries = code.rows, code.features, code.values, at_code
        return weight_gradients(*entries, x, at_sums, code.n_features)
    # detach: autograd may keep these names
    enc, dec = (_buffer(buffers, name, shape).detach() for name in ("grad_enc", "grad_dec"))
    bias = torch.empty(code.n_features)
    columns, order = np.empty(code.n_features + 1, dtype=np.int64), np.empty(len(at_code), dtype=np.int64)
    rows = np.empty(len(at_code), dtype=np.int32)
    _loops().by_feature_loop(code.indptr.numpy(), code.features.numpy(), columns, order, rows)
    with _loops().threads(4 * (len(at_code) + code.n_features) * shape[1]):
        entries = columns, rows, code.values.numpy()[order], at_code.numpy()[order]
        dense = x, at_sums, enc, bias, dec
        _loops().weight_gradients_loop(*entries, *(t.numpy() for t in dense))
    return enc, bias, dec


# --- the same in torch --------------------------------------------------------------------------------------


def dots(rows: Tensor, features: Tensor, values: Tensor, x: Tensor, W: Tensor) -> Tensor:
    """x_b . W_i for every entry (b, i), [n]; where ``values`` are 0, anything."""
    parts = zip(rows.split(CHUNK), features.split(CHUNK))
    return torch.cat([x.new_empty(0), *((x[b] * W[i]).sum(-1) for b, i in parts)])


def sums(indptr: Tensor, features: Tensor, values: Tensor, W: Tensor) -> Tensor:
    """f @ W, [B, D]."""
    options = {"mode": "sum", "per_sample_weights": values, "include_last_offset": True}
    return functional.embedding_bag(features, W, indptr, **options)


def weight_gradients(
    rows: Tensor, features: Tensor, values: Tensor, at_code: Tensor, x: Tensor, at_sums: Tensor, F: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Over the entries of each feature: sum at_code x_b [F, D], sum at_code [F], sum f at_sums_b [F, D]."""
    order = torch.argsort(features, stable=True)
    columns = torch.searchsorted(features[order], torch.arange(F + 1, device=x.device))

    def transposed(entries: Tensor) -> Tensor:
        shape = F, len(x)
        return torch.sparse_csr_tensor(columns, rows[order], entries[order], shape, check_invariants=False)

    bias = at_code.new_zeros(F).index_add(0, features, at_code)
    return transposed(at_code) @ x, bias, transposed(values) @ at_sums


# --- where it runs ------------------------------------------------------------------------------------------


def on_cpu(tensor: Tensor) -> bool:
    """Whether the compiled loops take it."""
    return COMPILED and tensor.device.type == "cpu" and _loops() is not None


@cache
def _loops() -> ModuleType | None:
    """The compiled loops, where numba is installed; a machine that trains on its GPU needs none."""
    try:
        return importlib.import_module(".loops", __package__)
    except ImportError:
        return None


def _arrays(encoded: PreActivations, per_unit: Tensor) -> tuple:
    """Products as integers, the shift that makes these float32 (numpy has no bfloat16), offset, per_unit."""
    kind, shift = (torch.int16, 16) if encoded.products.dtype == torch.bfloat16 else (torch.int32, 0)
    return encoded.products.view(kind).numpy(), shift, encoded.offset.numpy(), per_unit.numpy()
