"""Sparse products against dense ones of torch, compiled and not; selection against sorting."""

import subprocess
import sys

import numpy as np
import pytest
import torch

from lib.crosscoder import sparse
from lib.crosscoder.sparse import (
    SparseBatch,
    encode,
    jump,
    reconstruct,
    select_above,
    select_batch,
    select_positive,
    select_rows,
)
from lib.settings import ROOT

B, D, F = 37, 24, 130


@pytest.fixture(params=["compiled", "torch"])
def any_device(request, monkeypatch):
    """Both versions of every product: the compiled loops, and what other devices get."""
    monkeypatch.setattr(sparse, "COMPILED", request.param == "compiled")


@pytest.fixture
def weights():
    generator = torch.Generator().manual_seed(0)
    W_enc, W_dec, b_enc, x = (
        torch.randn(*shape, generator=generator) for shape in ((F, D), (F, D), (F,), (B, D))
    )
    return W_enc.requires_grad_(), b_enc.requires_grad_(), W_dec.requires_grad_(), x


def strengths(weights, per_unit):
    W_enc, b_enc, _, x = weights
    return (x @ W_enc.T + b_enc).relu().detach() * per_unit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("hint", [0.0, 0.5, 1.0, 3.0])
def test_the_batch_keeps_its_largest_strengths(weights, any_device, dtype, hint):
    W_enc, b_enc, _, x = weights
    per_unit = torch.linspace(0, 2, F)
    v = strengths(weights, per_unit)
    floor = v.flatten().sort(descending=True).values[4 * B - 1]
    # a guess, good or bad, changes nothing
    code = select_batch(encode(x, W_enc, b_enc, dtype), per_unit, 4 * B, hint * float(floor))
    assert torch.equal(code.dense() > 0, v >= floor) and (v >= floor).sum() == 4 * B
    assert code.floor.item() == pytest.approx(floor.item(), rel=1e-5)
    assert torch.allclose(code.dense(), (x @ W_enc.T + b_enc).relu().detach() * (v >= floor), atol=1e-5)
    assert all((np.diff(row) > 0).all() for row in np.split(code.features.numpy(), code.indptr[1:-1].numpy()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("among", [None, torch.tensor([3, 5, 50, 51, 52, 99, 129])])
def test_rows_keep_their_largest_strengths(weights, any_device, dtype, among):
    W_enc, b_enc, _, x = weights
    per_unit = torch.linspace(0.1, 2, F)
    v = strengths(weights, per_unit)
    if among is not None:
        v[:, [i for i in range(F) if i not in among.tolist()]] = 0
    floors = v.sort(descending=True, dim=1).values[:, 4]
    code = select_rows(encode(x, W_enc, b_enc, dtype), per_unit, 5, among)
    assert torch.equal(code.dense() > 0, (v >= floors[:, None]) & (v > 0))
    assert code.floor.item() == pytest.approx(floors.mean().item(), rel=1e-5)


# rounding is a share of a product: close to 0 bfloat16 cannot tell
@pytest.mark.parametrize(
    "dtype,low,expected",
    [
        (torch.float32, 0.01, 1),
        (torch.float32, 1.5, 50),
        (torch.bfloat16, 1.5, 50),
        (torch.float32, 1e6, 3),
        (torch.bfloat16, 1e6, 3),
    ],
)
def test_everything_above_a_strength(weights, any_device, dtype, low, expected):
    W_enc, b_enc, _, x = weights
    per_unit = torch.linspace(0, 2, F)
    v = strengths(weights, per_unit)
    code = select_above(encode(x, W_enc, b_enc, dtype), per_unit, low, expected)
    assert torch.equal(code.dense() > 0, v >= low) and ((v >= low).any() or low == 1e6)


@pytest.mark.parametrize("per_row", [3, 60])
def test_pseudo_gradients_of_thresholds_against_a_loop(weights, any_device, per_row):
    W_enc, b_enc, W_dec, x = weights
    edge = select_rows(encode(x, W_enc, b_enc), torch.ones(F), per_row)
    sums, log_theta, rise = (
        torch.randn(B, D, requires_grad=True),
        torch.zeros(F, requires_grad=True),
        torch.linspace(0.5, 3, F),
    )
    out = jump(sums, log_theta, W_dec, edge, rise)
    assert torch.equal(out, sums)
    at_out = torch.randn(B, D)
    for_sums, for_theta = torch.autograd.grad((out * at_out).sum(), (sums, log_theta))
    expected = torch.zeros(F)
    for row, feature in zip(edge.rows.tolist(), edge.features.tolist()):
        expected[feature] -= rise[feature] * (at_out[row] @ W_dec[feature].detach())
    assert torch.equal(for_sums, at_out) and torch.allclose(for_theta, expected, rtol=1e-4, atol=1e-4)


def test_fewer_positive_values_than_places(any_device):
    x, W = torch.tensor([[1.0], [2.0]]), torch.tensor([[1.0], [0.4], [-1.0]])
    encoded = encode(x, W, torch.zeros(3))
    per_unit = torch.tensor([0.1, 1.0, 9.0])
    assert select_batch(encoded, per_unit, 2).dense().tolist() == [
        [0, pytest.approx(0.4), 0],
        [0, pytest.approx(0.8), 0],
    ]
    everything = select_batch(encoded, per_unit, 5)
    assert torch.equal(everything.dense(), (x @ W.T).relu()) and everything.floor.item() == pytest.approx(0.1)
    nothing = select_batch(encode(x, -W.abs(), torch.zeros(3)), per_unit, 2)
    assert len(nothing.values) == 0 and nothing.floor.item() == 0 and nothing.fired().sum() == 0
    assert torch.equal(select_positive(encoded).dense(), (x @ W.T).relu())


def test_ties_are_all_kept(any_device):
    encoded = encode(torch.ones(3, 1), torch.ones(5, 1), torch.zeros(5))
    assert len(select_batch(encoded, torch.ones(5), 4).values) == 15
    assert len(select_rows(encoded, torch.ones(5), 2).values) == 15


@pytest.mark.parametrize("per_row", [3, 60])  # few: sparse products; many: dense ones
def test_products_and_gradients_against_dense_autograd(weights, any_device, per_row):
    W_enc, b_enc, W_dec, x = weights
    code = select_rows(encode(x, W_enc, b_enc), torch.ones(F), per_row)
    assert code.crowded == (per_row == 60)
    for_f, for_sums = torch.randn(len(code.values)), torch.randn(B, D)

    def gradients(f, sums):
        return torch.autograd.grad(
            (f * for_f).sum() + (sums * for_sums).square().sum(), (W_enc, b_enc, W_dec), retain_graph=True
        )

    dense = (x @ W_enc.T + b_enc).relu() * (code.dense() > 0)
    expected = gradients(dense[code.rows, code.features], dense @ W_dec)
    f, sums = reconstruct(W_enc, b_enc, W_dec, x, code)
    assert torch.allclose(f, dense[code.rows, code.features], atol=1e-5) and torch.allclose(
        sums, dense @ W_dec, atol=1e-4
    )
    for found, wanted in zip(gradients(f, sums), expected):
        assert torch.allclose(found, wanted, rtol=1e-4, atol=1e-3)
    only_f = torch.autograd.grad((f * for_f).sum(), (W_enc, W_dec))
    assert torch.allclose(
        only_f[0],
        torch.autograd.grad((dense[code.rows, code.features] * for_f).sum(), W_enc)[0],
        rtol=1e-4,
        atol=1e-4,
    )
    assert only_f[1].abs().sum() == 0


def test_kept_buffers_change_nothing_and_do_not_touch_a_gradient_in_use(weights):
    W_enc, b_enc, W_dec, x = weights
    code, buffers = select_rows(encode(x, W_enc, b_enc), torch.ones(F), 3), {}
    expected = torch.autograd.grad(reconstruct(W_enc, b_enc, W_dec, x, code)[1].square().sum(), W_dec)[0]
    reconstruct(W_enc, b_enc, W_dec, x, code, buffers)[1].square().sum().backward()
    assert torch.equal(W_dec.grad, expected) and W_dec.grad.data_ptr() == buffers["grad_dec"].data_ptr()
    reconstruct(W_enc, b_enc, W_dec, x, code, buffers)[1].square().sum().backward()  # accumulates
    assert torch.equal(W_dec.grad, 2 * expected)


def test_screening_far_from_zero_is_exact_with_a_centre(weights):
    """Activations whose mean is large lose their differences to bfloat16, unless they are centred."""
    W_enc, b_enc, _, x = weights
    mean = 300 * torch.randn(D, generator=torch.Generator().manual_seed(1))
    b_enc = b_enc.detach() - W_enc.detach() @ mean
    wanted = select_batch(encode(x + mean, W_enc, b_enc), torch.ones(F), 4 * B)
    found = select_batch(encode(x + mean, W_enc, b_enc, torch.bfloat16, mean), torch.ones(F), 4 * B)
    differ = ((wanted.dense() > 0) != (found.dense() > 0)).sum()
    assert differ <= 2  # float32 itself rounds at this size
    lost = select_batch(encode(x + mean, W_enc, b_enc, torch.bfloat16), torch.ones(F), 4 * B)
    assert ((wanted.dense() > 0) != (lost.dense() > 0)).sum() >= 5


def test_a_code():
    code = SparseBatch(
        torch.tensor([0, 2, 2, 3]),
        torch.tensor([0, 3, 1]),
        torch.tensor([1.0, 2.0, 5.0]),
        torch.tensor(1.0),
        4,
    )
    assert code.dense().tolist() == [[1, 0, 0, 2], [0, 0, 0, 0], [0, 5, 0, 0]] and code.rows.tolist() == [
        0,
        0,
        2,
    ]
    assert code.fired().tolist() == [True, True, False, True]
    some = code.where(torch.tensor([False, True, True]), torch.tensor(2.0))
    assert some.dense().tolist() == [[0, 0, 0, 2], [0, 0, 0, 0], [0, 5, 0, 0]] and some.floor == 2
    assert code.above(some).dense().tolist() == code.dense().tolist() + some.dense().tolist()


@pytest.mark.parametrize("threads", (1, 2))
def test_compiled_loops_leave_torch_its_number_of_threads(threads):
    """In a process of its own: numba starts its threads once, and would set OpenMP's number to all cores."""
    script = (
        "import torch; from lib.crosscoder import sparse\n"
        f"torch.set_num_threads({threads})\n"
        "encoded = sparse.encode(torch.ones(8, 4), torch.ones(6, 4), torch.zeros(6))\n"
        "code = sparse.select_batch(encoded, torch.ones(6), 16)\n"
        "sparse.reconstruct(torch.ones(6, 4), torch.zeros(6), torch.ones(6, 4), torch.ones(8, 4), code)\n"
        "print(torch.get_num_threads())"
    )
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.split() == [str(threads)]
