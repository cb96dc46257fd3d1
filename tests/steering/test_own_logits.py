"""The logits that are measured are the model's own, whatever stands between the residual stream and them."""

import pandas as pd
import pytest
import torch
from toys import COHERE, GEMMA2, GRANITE, toy_of, toy_store

from lib.distil.fit import token_losses
from lib.distil.organism import build_tokenizer
from lib.models import reader
from lib.models.pairs import decoder_layers
from lib.steering import ablation

LAYER = 1
MODELS = {
    "GPT2LMHeadModel": {}, "Gemma2ForCausalLM": GEMMA2, "GraniteForCausalLM": GRANITE,
    "CohereForCausalLM": COHERE, "GPTNeoXForCausalLM": {}, "Qwen2ForCausalLM": {},
    "PhiForCausalLM": {},  # its head has a bias
}  # fmt: skip


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    made = toy_of(request.param, **MODELS[request.param]).requires_grad_(False)
    if (bias := made.get_output_embeddings().bias) is not None:
        bias.normal_()
    return made


IDS = torch.tensor([[1, 5, 6, 7, 8, 9, 10], [1, 50, 60, 70, 80, 0, 0]])
MASK = torch.tensor([[1] * 7, [1] * 5 + [0] * 2])
AT = (torch.tensor([0, 0, 1]), torch.tensor([5, 2, 4]))


def test_logits_with_and_without_a_removal_and_from_the_layer_on(model):
    wrapped, removed = reader.wrap(model, build_tokenizer()), torch.randn(2, 7, 16)
    right = model(IDS, attention_mask=MASK).logits[AT]
    torch.testing.assert_close(ablation.logits_at(wrapped, LAYER, IDS, MASK, AT), right)
    hook = decoder_layers(model)[LAYER].register_forward_hook(lambda module, args, out: out - removed)
    changed = model(IDS, attention_mask=MASK).logits[AT]
    hook.remove()
    assert (changed - right).abs().max() > 0.01
    torch.testing.assert_close(ablation.logits_at(wrapped, LAYER, IDS, MASK, AT, removed), changed)
    hidden = ablation.hidden_at(wrapped, LAYER, IDS, MASK) - removed
    found = ablation.logits_at(wrapped, LAYER, IDS, MASK, AT, hidden=hidden)
    torch.testing.assert_close(found, changed)
    targets = torch.tensor([3, 400, 7])
    found = ablation.logits_at(wrapped, LAYER, IDS, MASK, AT, targets=targets, remote="local")
    both = torch.stack([right, right.log_softmax(-1)], dim=-1)[torch.arange(3), targets]
    torch.testing.assert_close(found, both)


def test_gradients_are_slopes_of_the_models_own_log_probabilities(model, tmp_path):
    store = toy_store(tmp_path, 600, widths=(16, 16))
    targets = ablation.sample_targets(store, 3, "train")
    wrapped = reader.wrap(model, build_tokenizer())
    (batch, found), *_ = ablation.gradients(wrapped, LAYER, targets, store)
    category, gradient = next(iter(found.items()))
    chosen = batch.targets["category"].to_numpy() == category
    rows, columns, token = (
        torch.as_tensor(x)[torch.as_tensor(chosen)] for x in (*batch.at, batch.targets["token"].to_numpy())
    )
    direction = torch.randn(gradient.shape, generator=torch.Generator().manual_seed(0))

    def total(size):
        push = size * batch.scatter(direction)
        hook = decoder_layers(model)[LAYER].register_forward_hook(lambda module, args, out: out + push)
        logits = model(batch.tokens, attention_mask=batch.mask).logits[rows, columns].double()
        hook.remove()
        return float(logits.log_softmax(-1)[torch.arange(len(rows)), token].sum())

    slope = (total(1e-3) - total(-1e-3)) / 2e-3
    assert float((gradient * direction).sum()) == pytest.approx(slope, rel=0.02, abs=0.02)


def test_losses_of_training_are_the_models_own(model):
    y = torch.where(MASK == 1, IDS, -100)
    y[0, :3] = -100
    logits = model(IDS).logits[:, :-1].log_softmax(-1)
    right = pd.Series(
        [-float(logits[r, c, IDS[r, c + 1]]) for r in (0, 1) for c in range(6) if y[r, c + 1] != -100]
    )
    assert token_losses(model, IDS, y).tolist() == pytest.approx(right.tolist(), abs=1e-4)
