"""The Triton kernels against torch: on a GPU, or in Triton's interpreter where it is installed.

Triton comes with torch's builds for CUDA, and not with those for CPUs.
"""

import os

import pytest
import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported
pytest.importorskip("triton")

from lib.crosscoder import fixed, triton_kernels  # noqa: E402
from lib.crosscoder.sparse import encode  # noqa: E402


@pytest.fixture(params=[(9, 40, 70, 50), (300, 700, 33, 900)], ids=["small", "chunks"])
def case(request):
    """A batch, weights, n entries: many of one feature, some without a value, some features without any."""
    B, D, F, n = request.param
    generator = torch.Generator().manual_seed(0)
    x, at_sums = (torch.randn(B, D, generator=generator) for _ in range(2))
    W, b_enc = torch.randn(F, D, generator=generator), torch.randn(F, generator=generator)
    features = torch.where(torch.rand(n, generator=generator) < 0.5, 3, torch.arange(n) % (F - 2))
    values = torch.rand(n, generator=generator) * (torch.arange(n) % 7 > 0)
    rows = torch.randint(B, (n,), generator=generator).sort().values
    return [t.to(DEVICE) for t in (x, at_sums, W, b_enc, rows, features, values)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_entries_are_counted_and_written_as_torch_does(case, dtype):
    x, _, W, b_enc, *_ = case
    encoded = encode(x, W, b_enc, dtype)
    parts = encoded.products, encoded.offset, torch.linspace(0.1, 2, len(W), device=DEVICE)
    levels = torch.tensor([30.0, 10.0, 1.0, 0.0], device=DEVICE)
    counts = triton_kernels.count(*parts, levels)
    assert torch.equal(counts, fixed.count(*parts, levels)) and counts.sum() > 0
    indptr = torch.nn.functional.pad(counts[:, 1].cumsum(0), (1, 0))
    for room in (int(indptr[-1]) + 5, int(indptr[-1]) // 2):
        found = triton_kernels.write(*parts, levels[1], indptr, room)
        there = fixed.write(*parts, levels[1], indptr, room)
        kept = slice(0, min(room, int(indptr[-1])))
        assert all(torch.equal(a[kept], b[kept]) for a, b in zip(found, there))
        assert not found[2][kept.stop :].any() and len(found[2]) == room


def test_products_are_those_of_torch(case):
    x, at_sums, W, _, rows, features, values = case
    there = values > 0
    found = triton_kernels.dots(rows, features, values, x, W)
    assert torch.allclose(found[there], fixed.dots(rows, features, values, x, W)[there], atol=1e-3)
    indptr = torch.searchsorted(rows, torch.arange(len(x) + 1, device=DEVICE))
    sums = triton_kernels.sums(indptr, features, values, W)
    assert torch.allclose(sums, fixed.sums(indptr, features, values, W), atol=1e-3)
    at_code = torch.where(there, found, 0)
    entries = rows, features, values, at_code, x, at_sums, len(W)
    for ours, theirs in zip(triton_kernels.weight_gradients(*entries), fixed.weight_gradients(*entries)):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-2)
    again = triton_kernels.weight_gradients(*entries)
    assert all(torch.equal(a, b) for a, b in zip(again, triton_kernels.weight_gradients(*entries)))


def test_a_batch_is_selected_alike(case, monkeypatch):
    x, _, W, b_enc, *_ = case
    per_unit = torch.linspace(0.1, 2, len(W), device=DEVICE)
    for dtype in (torch.float32, torch.bfloat16):
        encoded = encode(x, W, b_enc, dtype)
        monkeypatch.setattr(fixed, "_best", lambda name, tensor: getattr(fixed, name))
        there = fixed.select_batch(encoded, per_unit, 3 * len(x))
        monkeypatch.setattr(fixed, "_best", lambda name, tensor: getattr(triton_kernels, name))
        code = fixed.select_batch(encoded, per_unit, 3 * len(x), there.floor)
        assert torch.equal(code.features, there.features) and not code.short
        assert torch.allclose(code.values, there.values, rtol=1e-4, atol=1e-4)
