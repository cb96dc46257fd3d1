"""The crosscoder against hand-computed values and an independent dense implementation."""

import numpy as np
import pytest
import torch

from lib.crosscoder.model import (
    CrossCoder,
    auxiliary_loss,
    forward,
    initial_rows,
    l0_loss,
    sparsity_loss,
    squared_error,
)
from lib.settings import UserError


def random_crosscoder(widths=(5, 7), n_features=12, seed=0, **options) -> CrossCoder:
    """Unequal rows, biases that matter: what training could arrive at."""
    names = ("base", "distilled", "third")[: len(widths)]
    crosscoder = CrossCoder(widths, n_features, names, **{"k": 3, **options})
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in crosscoder.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
        crosscoder.means.copy_(torch.randn(crosscoder.means.shape, generator=generator))
    return crosscoder


def random_acts(widths=(5, 7), n=9, seed=1) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, w, generator=generator) for w in widths]


def hand_made(variant="l1") -> CrossCoder:
    """Two models of width 2, two features: feature 0 has rows (3, 4) and (0, 1), feature 1 has (1, 0) and (0,
    0).
    """
    crosscoder = CrossCoder((2, 2), 2, variant=variant, k=1)
    with torch.no_grad():
        crosscoder.W_dec.copy_(torch.tensor([[3.0, 4, 0, 1], [1, 0, 0, 0]]))
        crosscoder.W_enc.copy_(torch.tensor([[1.0, 0, 0, 0], [0, 1, 1, 0]]))
        crosscoder.b_enc.copy_(torch.tensor([0.0, -1.0]))
        crosscoder.b_dec.copy_(torch.tensor([0.0, 0, 1, 0]))
    return crosscoder


HAND_ACTS = [torch.tensor([[1.0, 2.0], [-1.0, 0.0]]), torch.tensor([[1.0, 1.0], [0.0, 0.0]])]


def test_losses_by_hand():
    crosscoder = hand_made()
    out = forward(crosscoder, HAND_ACTS)
    # token 0: pre = (1, 2 + 1 - 1) = (1, 2); token 1: pre = (-1, -1)
    assert torch.equal(out.code.dense(out.f), torch.tensor([[1.0, 2.0], [0.0, 0.0]]))
    # token 0: x̂ = (3 + 2, 4, 0 + 1, 1), x = (1, 2, 1, 1): 16 + 4 + 0 + 0; token 1: x̂ = (0, 0, 1, 0), x =
    # (-1, 0, 0, 0): 1 + 1
    assert squared_error(out).item() == pytest.approx((20 + 2) / 2)
    # sum_m ||d_i^m||_2 = 5 + 1 and 1 + 0: token 0 costs 1 * 6 + 2 * 1, token 1 nothing
    assert sparsity_loss(crosscoder, out).item() == pytest.approx(8 / 2)


def test_auxiliary_loss_by_hand():
    crosscoder = hand_made("batchtopk")
    out = forward(crosscoder, HAND_ACTS, dead=torch.tensor([False, True]), aux_k=4)
    # strengths of token 0: 1 * 6 and 2 * 1, both among the two largest of the batch: e = (-4, -2, 0, 0) and
    # (-1, 0, -1, 0);
    # feature 1 offers 2 * (1, 0, 0, 0) and nothing: (-6, -2) and (-1, -1) are left
    assert auxiliary_loss(out).item() == pytest.approx((36 + 4 + 1 + 1) / 2)
    assert (
        auxiliary_loss(forward(crosscoder, HAND_ACTS, dead=torch.tensor([False, False]), aux_k=4)).item() == 0
    )


def test_nrn_and_cosine_by_hand():
    crosscoder = hand_made()
    assert crosscoder.norms(2).tolist() == [[5, 1], [1, 0]]
    assert crosscoder.norms(1).tolist() == [[7, 1], [1, 0]]
    assert crosscoder.nrn(p=1).tolist() == pytest.approx([1 / 8, 0])
    assert crosscoder.nrn(p=2).tolist() == pytest.approx([1 / 6, 0])
    assert crosscoder.nrn(p=2, model="base", reference="distilled").tolist() == pytest.approx([5 / 6, 1])
    relative = crosscoder.norms(1)[1] / crosscoder.norms(1)[0]  # the paper's two-step form, RDN / (1 + RDN)
    assert torch.allclose(relative / (1 + relative), crosscoder.nrn(p=1))
    assert crosscoder.cosine().tolist() == pytest.approx([4 / 5, 0])


def dense(crosscoder, acts, keep, lam):
    """The definitions once more: a loop over tokens and models in float64, features kept where ``keep`` [B,
    F] says so.
    """
    c = {n: p.detach().double().requires_grad_() for n, p in crosscoder.named_parameters()}
    edges = np.cumsum([0, *crosscoder.widths])
    x = [a.double() * s for a, s in zip(acts, crosscoder.scales)]
    loss = torch.zeros((), dtype=torch.float64)
    fs = []
    for b in range(len(acts[0])):
        pre = c["b_enc"]
        for m, (start, stop) in enumerate(zip(edges, edges[1:])):
            pre = pre + c["W_enc"][:, start:stop] @ x[m][b]
        f = pre.clamp(min=0) * keep[b]
        fs.append(f)
        for m, (start, stop) in enumerate(zip(edges, edges[1:])):
            x_hat = c["b_dec"][start:stop] + sum(f[i] * c["W_dec"][i, start:stop] for i in range(len(f)))
            loss = loss + ((x[m][b] - x_hat) ** 2).sum()
            loss = loss + lam * sum(
                f[i] * (c["W_dec"][i, start:stop] ** 2).sum().sqrt() for i in range(len(f))
            )
    loss = loss / len(acts[0])
    loss.backward()
    return loss, torch.stack(fs), {n: p.grad for n, p in c.items()}


@pytest.mark.parametrize(
    "variant,lam,precision",
    [("l1", 0.7, "float32"), *((v, 0.0, p) for v in ("batchtopk", "topk") for p in ("float32", "bfloat16"))],
)
@pytest.mark.parametrize("widths", [(5, 5), (5, 7), (3, 4, 6)])
def test_forward_and_gradients_against_a_dense_implementation(variant, lam, widths, precision):
    crosscoder = random_crosscoder(widths, variant=variant, k=3, scales=[0.5, 2.0, 1.5][: len(widths)])
    acts = random_acts(widths)
    keep = torch.ones(9, 12, dtype=torch.float64)
    # the 27 largest of the batch, or the 3 largest of each row, chosen by sorting plain numbers
    if variant != "l1":
        x = np.concatenate([a.numpy() * s for a, s in zip(acts, crosscoder.scales.numpy())], axis=1)
        f = np.maximum(x @ crosscoder.W_enc.detach().numpy().T + crosscoder.b_enc.detach().numpy(), 0)
        parts = np.split(crosscoder.W_dec.detach().numpy(), np.cumsum(widths)[:-1], axis=1)
        strength = f * sum(np.linalg.norm(part, axis=1) for part in parts)
        ranks = np.argsort(np.argsort(-strength, axis=None if variant == "batchtopk" else 1)).reshape(9, 12)
        keep = torch.from_numpy(ranks < (3 * 9 if variant == "batchtopk" else 3)).double()
    expected, f, gradients = dense(crosscoder, acts, keep, lam)
    out = forward(crosscoder, acts, precision=precision)
    loss = squared_error(out) + lam * sparsity_loss(crosscoder, out)
    loss.backward()
    assert torch.allclose(out.code.dense(out.f).double(), f, atol=1e-5)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    for name, parameter in crosscoder.named_parameters():
        assert torch.allclose(parameter.grad.double(), gradients[name], rtol=1e-4, atol=1e-4), name


class Step(torch.autograd.Function):
    """H(v - theta) as in the appendix of 2407.14435: rectangle kernel, gradient to theta alone."""

    @staticmethod
    def forward(ctx, v, theta, width):
        ctx.save_for_backward(v, theta, width)
        return (v > theta).double()

    @staticmethod
    def backward(ctx, grad):
        v, theta, width = ctx.saved_tensors
        inside = ((v - theta).abs() < width / 2).double()
        return None, (-inside / width * grad).sum(0), None


class Jump(torch.autograd.Function):
    """v H(v - theta), from the same place."""

    @staticmethod
    def forward(ctx, v, theta, width):
        ctx.save_for_backward(v, theta, width)
        return v * (v > theta)

    @staticmethod
    def backward(ctx, grad):
        v, theta, width = ctx.saved_tensors
        inside = ((v - theta).abs() < width / 2).double()
        return (v > theta) * grad, (-theta / width * inside * grad).sum(0), None


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("widths,bandwidth,among", [((5, 5), 0.4, 0), ((5, 7), 1.0, 3), ((3, 4, 6), 1.9, 2)])
def test_jumprelu_against_the_papers_dense_functions(widths, bandwidth, among, precision):
    crosscoder = random_crosscoder(widths, variant="jumprelu", k=2, scales=[0.5, 2.0, 1.5][: len(widths)])
    crosscoder.log_theta.data.copy_(torch.linspace(0.3, 6, 12).log())
    acts = random_acts(widths, n=40)
    dead = torch.arange(12) < among
    c = {n: p.detach().double().requires_grad_() for n, p in crosscoder.named_parameters()}
    x = torch.cat([a.double() * s for a, s in zip(acts, crosscoder.scales)], dim=1)
    pre = (x @ c["W_enc"].T + c["b_enc"]).relu()
    unit = sum(part.norm(dim=1) for part in c["W_dec"].split(widths, dim=1))
    theta = c["log_theta"].exp()
    width = bandwidth * theta.detach()
    x_hat = (Jump.apply(pre * unit, theta, width) / unit) @ c["W_dec"] + c["b_dec"]
    error = (x - x_hat).square().sum() / 40
    l0 = Step.apply(pre * unit, theta, width).sum() / 40
    expected = error + 7.0 * (l0 / 2 - 1) ** 2
    if among:  # all of them are among the strongest
        expected = expected + 0.5 * ((x - x_hat).detach() - (pre * dead) @ c["W_dec"]).square().sum() / 40
    expected.backward()
    out = forward(crosscoder, acts, dead, aux_k=12, precision=precision, bandwidth=bandwidth)
    penalty = l0_loss(crosscoder, out, bandwidth)
    assert squared_error(out).item() == pytest.approx(error.item(), rel=1e-5)
    assert penalty.item() == pytest.approx((l0.item() / 2 - 1) ** 2, rel=1e-5) and penalty.item() > 0.01
    (squared_error(out) + 7.0 * penalty + 0.5 * auxiliary_loss(out)).backward()
    for name, parameter in crosscoder.named_parameters():
        assert torch.allclose(parameter.grad.double(), c[name].grad, rtol=1e-4, atol=1e-4), name
    assert (c["log_theta"].grad != 0).sum() > 6  # most thresholds have somebody near


def test_the_penalty_on_l0_of_parts_of_a_batch_adds_up():
    crosscoder = random_crosscoder(variant="jumprelu", k=2)
    acts = random_acts(n=30)
    whole = forward(crosscoder, acts, bandwidth=0.8)
    wanted = l0_loss(crosscoder, whole, 0.8)
    gradient = torch.autograd.grad(wanted, crosscoder.log_theta)[0]
    parts = [
        forward(crosscoder, [a[i::3] for a in acts], bandwidth=0.8, gather=lambda own: whole.code.indptr[-1:])
        for i in range(3)
    ]
    for part in parts:
        part.tokens = 30
    found = sum(l0_loss(crosscoder, part, 0.8) for part in parts)
    assert found.item() == pytest.approx(wanted.item(), rel=1e-5) and gradient.abs().sum() > 0
    assert torch.allclose(torch.autograd.grad(found, crosscoder.log_theta)[0], gradient, rtol=1e-5)


def test_who_fires_does_not_depend_on_how_a_features_scale_is_shared_out():
    """pre up, rows down: the same function, with a threshold on the strength."""
    crosscoder = random_crosscoder(variant="jumprelu")
    acts = random_acts(n=40)
    before = crosscoder.decode(crosscoder.encode(acts))
    assert 0.1 < (crosscoder.encode(acts) > 0).float().mean() < 0.9
    by = torch.linspace(0.2, 5, 12)
    with torch.no_grad():
        crosscoder.W_enc.mul_(by[:, None]), crosscoder.b_enc.mul_(by), crosscoder.W_dec.div_(by[:, None])
    for a, b in zip(crosscoder.decode(crosscoder.encode(acts)), before):
        assert torch.allclose(a, b, atol=1e-4)


@pytest.mark.parametrize("widths", [(5, 7), (3, 4, 6)])
def test_dedicated_blocks(widths):
    crosscoder = CrossCoder(widths, 20, ("base", "distilled", "third")[: len(widths)], k=3, dedicated=0.15)
    assert crosscoder.owner.tolist() == [-1] * (20 - 3 * len(widths)) + [
        m for m in range(len(widths)) for _ in range(3)
    ]
    for m, name in enumerate(crosscoder.names):
        for features in range(20):
            own = crosscoder.owner[features] in (-1, m)
            for rows in (crosscoder.rows(name), crosscoder.W_enc[:, crosscoder.columns(name)]):
                assert (rows[features].norm() > 0) == own
    assert (
        crosscoder.nrn()[crosscoder.owner == 0].tolist() == [0] * 3
        and crosscoder.nrn()[crosscoder.owner == 1].tolist() == [1] * 3
    )
    with torch.no_grad():
        crosscoder.threshold.fill_(-1.0)
        acts = random_acts(widths)
        other = [acts[0], *(a + 1 for a in acts[1:])]  # the base's own features do not see it
        changed = (crosscoder.encode(acts) != crosscoder.encode(other)).any(0)
    assert not changed[crosscoder.owner == 0].any() and changed[crosscoder.owner == 1].any()


def test_a_dead_dedicated_feature_explains_its_own_model_alone():
    crosscoder = CrossCoder((5, 7), 20, k=3, dedicated=0.2)
    acts, dead = random_acts(n=50), torch.arange(20) >= 12  # all that are dedicated
    out = forward(crosscoder, acts, dead & (crosscoder.owner == 0), aux_k=8)
    base, distilled = crosscoder.split(out.aux_hat)
    assert base.abs().sum() > 0 and torch.equal(distilled, torch.zeros_like(distilled))
    auxiliary_loss(forward(crosscoder, acts, dead, aux_k=8)).backward()
    unmasked = crosscoder.W_dec.grad.clone()
    crosscoder.mask_gradients()
    for m in (0, 1):
        own, foreign = crosscoder.columns(crosscoder.names[m]), crosscoder.columns(crosscoder.names[1 - m])
        of = crosscoder.owner == m
        assert unmasked[of][:, foreign].abs().sum() > 0 and crosscoder.W_dec.grad[of][:, own].abs().sum() > 0
        assert torch.equal(crosscoder.W_dec.grad[of][:, own], unmasked[of][:, own])
        assert (
            crosscoder.W_dec.grad[of][:, foreign].count_nonzero()
            == crosscoder.W_enc.grad[of][:, foreign].count_nonzero()
            == 0
        )
    assert torch.equal(crosscoder.W_dec.grad[:12], unmasked[:12])


@pytest.mark.parametrize("aux_k", [2, 100])
def test_every_loss_term_moves_the_encoder(aux_k):
    for variant in ("l1", "batchtopk", "topk"):
        crosscoder = random_crosscoder(variant=variant, k=2)
        dead = torch.arange(12) >= 6
        out = forward(crosscoder, random_acts(n=40), dead, 0 if variant == "l1" else aux_k)
        terms = [squared_error(out)]
        if variant == "l1":
            terms.append(sparsity_loss(crosscoder, out))
        else:
            terms.append(auxiliary_loss(out))
        for term in terms:
            crosscoder.zero_grad()
            term.backward(retain_graph=True)
            assert crosscoder.W_enc.grad.abs().sum() > 0 and crosscoder.W_dec.grad.abs().sum() > 0
        if variant != "l1":  # and only the dead ones, since what is left over is held fixed
            assert crosscoder.W_enc.grad[:6].abs().sum() == 0 and crosscoder.W_enc.grad[6:].abs().sum() > 0
            assert crosscoder.W_dec.grad[:6].abs().sum() == 0 and crosscoder.b_dec.grad is None


def test_a_model_against_itself_has_nrn_one_half():
    crosscoder = CrossCoder((6, 6), 16, k=4)
    assert torch.equal(crosscoder.nrn(p=1), torch.full((16,), 0.5)) and torch.equal(
        crosscoder.nrn(p=2), torch.full((16,), 0.5)
    )
    optimizer = torch.optim.Adam(crosscoder.parameters(), lr=0.01)
    for step in range(20):
        acts = random_acts((6,), n=64, seed=step)[0]
        optimizer.zero_grad()
        squared_error(forward(crosscoder, [acts, acts])).backward()
        optimizer.step()
    # it has learnt something
    assert (crosscoder.rows("base") - initial_rows((6, 6), 16, 0)[:, :6]).abs().max() > 0.01
    assert torch.allclose(crosscoder.nrn(p=1), torch.full((16,), 0.5), atol=1e-6)
    assert torch.allclose(crosscoder.cosine(), torch.ones(16), atol=1e-6)


def test_initial_rows():
    rows = initial_rows((4, 6, 6), 10, seed=3)
    narrow, wide, again = rows.split((4, 6, 6), dim=1)
    assert torch.equal(wide, again) and torch.allclose(
        torch.nn.functional.cosine_similarity(narrow, wide[:, :4]), torch.ones(10)
    )
    for part in (narrow, wide):
        assert torch.allclose(part.norm(dim=1), torch.full((10,), 0.08))
    crosscoder = CrossCoder((4, 6, 6), 10, ("a", "b", "c"), k=2, seed=3)
    assert torch.equal(crosscoder.W_enc, crosscoder.W_dec) and torch.equal(crosscoder.W_dec, rows)


@pytest.mark.parametrize("variant", ["l1", "batchtopk", "jumprelu"])
def test_at_inference_a_token_does_not_depend_on_its_batch(variant):
    crosscoder = random_crosscoder(variant=variant, k=2)
    crosscoder.threshold.fill_(1.0)
    if variant == "jumprelu":
        crosscoder.log_theta.data.copy_(torch.linspace(0.5, 3, 12).log())
    acts = random_acts(n=30)
    together = crosscoder.encode(acts)
    assert 0 < (together > 0).float().mean() < 1
    for i in (0, 17, 29):
        assert torch.allclose(crosscoder.encode([a[i : i + 1] for a in acts])[0], together[i], atol=1e-6)
    loud = [torch.cat([a, 100 * a[:5]]) for a in acts]
    assert torch.allclose(crosscoder.encode(loud)[:30], together, atol=1e-6)
    strength = together * crosscoder.strength_per_unit()
    if variant == "batchtopk":
        assert strength[together > 0].min() > 1.0
    if variant == "jumprelu":
        assert ((strength > torch.linspace(0.5, 3, 12)) == (together > 0)).all()


def test_raw_and_scaled_space():
    plain, scaled = random_crosscoder(), random_crosscoder(scales=[10.0, 0.1])
    acts = random_acts()
    raw = [acts[0] / 10.0, acts[1] / 0.1]
    assert torch.allclose(scaled.encode(raw), plain.encode(acts), atol=1e-5)
    f = plain.encode(acts)
    for m, (a, b) in enumerate(zip(scaled.decode(f), plain.decode(f))):
        assert torch.allclose(a * scaled.scales[m].item(), b, atol=1e-4)
    assert torch.equal(scaled.nrn(), plain.nrn())  # NRN lives in scaled space
    for m, name in enumerate(scaled.names):
        by_rows = f @ scaled.rows(name, raw=True) + scaled.bias(name, raw=True)
        assert torch.allclose(by_rows, scaled.decode(f)[m], rtol=1e-4, atol=1e-4)
        assert torch.equal(scaled.rows(name), plain.rows(name)) and not scaled.rows(name).requires_grad


def test_each_model_read_on_its_own():
    crosscoder = random_crosscoder(scales=[2.0, 3.0])
    acts = random_acts()
    others_at_mean = [acts[0], crosscoder.mean("distilled", raw=True).expand_as(acts[1])]
    assert torch.allclose(
        crosscoder.encode_from("base", acts[0]), crosscoder.encode(others_at_mean), atol=1e-5
    )
    assert not torch.allclose(
        crosscoder.encode_from("distilled", acts[1]), crosscoder.encode(others_at_mean), atol=1e-2
    )


def test_centred_start():
    crosscoder = CrossCoder((3, 4), 6, scales=[2.0, 1.0], k=2)
    means = [torch.tensor([1.0, 2, 3]), torch.ones(4)]
    crosscoder.centre(means)
    with torch.no_grad():
        assert torch.allclose(crosscoder.encode([m[None] for m in means]), torch.zeros(1, 6), atol=1e-6)
        for decoded, mean in zip(crosscoder.decode(torch.zeros(1, 6)), means):
            assert torch.allclose(decoded[0], mean)


def test_a_jumprelu_with_blocks_is_saved_and_loaded(tmp_path):
    crosscoder = CrossCoder((5, 7), 20, variant="jumprelu", k=3, dedicated=0.2)
    crosscoder.log_theta.data.copy_(torch.linspace(-8, -3, 20))
    crosscoder.save(tmp_path)
    loaded = CrossCoder.load(tmp_path)
    acts = random_acts()
    assert torch.equal(loaded.log_theta, crosscoder.log_theta) and torch.equal(loaded.owner, crosscoder.owner)
    assert (
        torch.equal(loaded.encode(acts), crosscoder.encode(acts)) and loaded.encode(acts).count_nonzero() > 0
    )


@pytest.mark.parametrize("widths", [(5, 7), (3, 4, 6)])
def test_save_and_load(tmp_path, widths):
    crosscoder = random_crosscoder(widths, variant="batchtopk", k=3, scales=[0.1, 3.0, 1.0][: len(widths)])
    crosscoder.threshold.fill_(0.7)
    crosscoder.seen.copy_(torch.tensor([70, 50]))
    crosscoder.save(tmp_path / "made" / "here")
    loaded = CrossCoder.load(tmp_path / "made" / "here")
    acts = random_acts(widths)
    assert torch.equal(loaded.encode(acts), crosscoder.encode(acts).detach())
    assert (loaded.names, loaded.widths, loaded.variant, loaded.k) == (
        crosscoder.names,
        crosscoder.widths,
        "batchtopk",
        3,
    )
    assert loaded.seen.tolist() == [70, 50] and not loaded.W_enc.requires_grad
    assert all(
        torch.equal(a, b) for a, b in zip(loaded.state_dict().values(), crosscoder.state_dict().values())
    )


def test_errors_say_what_would_be_right(tmp_path):
    with pytest.raises(
        UserError, match="variant is 'gated': it must be one of batchtopk, topk, l1, jumprelu"
    ):
        CrossCoder((2, 2), 4, variant="gated", k=1)
    with pytest.raises(UserError, match="k is 9: it must be an integer from 1 to 4"):
        CrossCoder((2, 2), 4, k=9)
    with pytest.raises(UserError, match="one distinct name per model"):
        CrossCoder((2, 2, 2), 4, k=1)
    with pytest.raises(UserError, match="one positive number for each of base, distilled"):
        CrossCoder((2, 2), 4, k=1, scales=[1.0, 0.0])
    with pytest.raises(
        UserError, match="dedicated is 0.4: 3 models can have at most 1/3 of the dictionary each"
    ):
        CrossCoder((2, 2, 2), 10, ("a", "b", "c"), k=1, dedicated=0.4)
    crosscoder = CrossCoder((2, 3), 4, k=1)
    with pytest.raises(
        UserError, match=r"widths \[3, 2\]: this crosscoder reads base \(2\), distilled \(3\)"
    ):
        crosscoder.encode([torch.zeros(1, 3), torch.zeros(1, 2)])
    with pytest.raises(UserError, match="unknown model 'chat'"):
        crosscoder.rows("chat")
    with pytest.raises(UserError, match="differ in width"):
        crosscoder.cosine()
    with pytest.raises(UserError, match="run notebook 02_train_crosscoder first"):
        CrossCoder.load(tmp_path / "nowhere")
