"""The positive control, pair ``tiny_planted``: between its models the paper's claim is true by construction.

The base of this pair thinks, and reflects as often as the teacher, but no more after an error than after a
right step (``IndifferentTeacher``). It has SPARE dimensions of the residual stream that nothing writes and
nothing reads, and in every layer attention heads and neurons that do nothing. The distilled model is the same
model with these parts trained, everything else frozen. Up to half depth they may read everything and write
*into the spare dimensions alone*; above it they read *the spare dimensions alone*, and write into all others:

- *trigger*: the lower parts are trained until a linear probe on the spare dimensions tells the value of a
  wrong step, and the full stop after it (the probe is then dropped)
- *behaviour*: the upper parts are trained on the words with which the teacher goes on after its steps, and on
  some others

So at half depth the models differ in a known subspace and nowhere else; what stands there triggers a
reflection; and without it the distilled model is the base again. ``null_a`` is made in the same way, but the
probe is asked for tokens drawn at random, and the teacher is the base's: there is nothing new to learn."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits
from transformers import Qwen2ForCausalLM

from ..models.pairs import decoder_layers, half_depth
from ..runs import write_state, write_text
from ..text.curriculum import vocabulary
from . import organism
from .fit import Batch, batches_of, claim, fit, token_losses
from .organism import Recipe, load_shipped, save, train_stage

STEPS = ("deduction", "other")  # labels of sentences that may be steps
SPARE = 8  # dimensions of the residual stream, the last ones
HEADS, KV_HEADS, NEURONS = 4, 2, 128  # that do nothing in the base, in every layer, the last ones
SCALE = 0.06  # of the random weights with which they begin
# The lower heads begin by looking one token back, from biases of this size. Without it, and without a probe,
# 0.4M tokens taught no part of the behaviour: what has to be written and what has to be read wait for each
# other.
BACK = 3.0
STAGES = {"distilled": "planted", "null_a": "planted_null"}  # model: stage of ``organism``
PHASES = {"trigger": (300_000, 5e-3), "behaviour": (400_000, 3e-3)}  # (tokens, learning rate)
BASE_TOKENS = 1_500_000
OTHER_WORDS = 0.5  # share of the other words that are learnt too, so that they stay as they were
WEIGHT = 10.0  # of a token at which the probe should say yes
RANDOM = 0.01  # of all tokens, those at which the probe of the null should say yes
# What the probe reads is divided by it, so that the trigger is about as long. At 10 one crosscoder of five
# had a feature for the value and one for the full stop, of which one was found.
UNIT = 30.0


@dataclass(frozen=True)
class Sizes:
    """Of the model without spare parts."""

    width: int
    query: int  # rows of q_proj
    key: int  # rows of k_proj
    neurons: int

    @classmethod
    def of(cls, wide: Qwen2ForCausalLM) -> Sizes:
        c = wide.config
        query, key = c.num_attention_heads - HEADS, c.num_key_value_heads - KV_HEADS
        sizes = query * c.head_dim, key * c.head_dim, c.intermediate_size - NEURONS
        return cls(c.hidden_size - SPARE, *sizes)


def widened(model: Qwen2ForCausalLM) -> Qwen2ForCausalLM:
    """The same model with spare dimensions, heads and neurons, all of whose weights are 0.

    It computes the same: the norms, which are means over all dimensions, are scaled. Trained on, these
    weights stay 0, as none of them has a gradient while the others are 0."""
    config = copy.deepcopy(model.config)
    config.head_dim = config.hidden_size // config.num_attention_heads
    config.hidden_size += SPARE
    config.num_attention_heads += HEADS
    config.num_key_value_heads += KV_HEADS
    config.intermediate_size += NEURONS
    wide, old = Qwen2ForCausalLM(config), dict(model.named_parameters())
    with torch.no_grad():
        for name, new in wide.named_parameters():
            norm = name.endswith("norm.weight")
            scale = (model.config.hidden_size / config.hidden_size) ** 0.5 if norm else 1.0
            new.fill_(float(norm))
            new[tuple(slice(n) for n in old[name].shape)] = old[name] * scale
    return wide


def spare_parts(wide: Qwen2ForCausalLM) -> dict[str, Tensor]:
    """{parameter: bool mask of the weights that may be trained}; see the top of the file."""
    sizes, half, masks = Sizes.of(wide), half_depth(wide), {}
    spare, others = slice(sizes.width, None), slice(sizes.width)
    for i, layer in enumerate(decoder_layers(wide)):
        reads, writes = (slice(None), spare) if i <= half else (spare, others)
        heads, keys, neurons = (slice(n, None) for n in (sizes.query, sizes.key, sizes.neurons))
        chosen = {
            layer.self_attn.q_proj.weight: (heads, reads),
            layer.self_attn.q_proj.bias: (heads,),
            layer.self_attn.k_proj.weight: (keys, reads),
            layer.self_attn.k_proj.bias: (keys,),
            layer.self_attn.v_proj.weight: (keys, reads),  # no bias: where nothing stands, nothing is written
            layer.self_attn.o_proj.weight: (writes, heads),
            layer.mlp.gate_proj.weight: (neurons, reads),
            layer.mlp.up_proj.weight: (neurons, reads),
            layer.mlp.down_proj.weight: (writes, neurons),
        }
        for parameter, where in chosen.items():
            masks[id(parameter)] = torch.zeros_like(parameter, dtype=torch.bool)
            masks[id(parameter)][where] = True
    return {name: masks[id(p)] for name, p in wide.named_parameters() if id(p) in masks}


def planted(wide: Qwen2ForCausalLM, seed: int = 0) -> Qwen2ForCausalLM:
    """A copy whose spare parts are random and may be trained, everything else being frozen. What they write
    above half depth begins at 0."""
    model, generator = copy.deepcopy(wide), torch.Generator().manual_seed(seed)
    masks, half = spare_parts(model), half_depth(model)
    query, key = _one_back(model)
    for name, parameter in model.named_parameters():
        mask = masks.get(name)
        parameter.requires_grad_(mask is not None)
        if mask is None:
            continue
        parameter.register_hook(lambda gradient, mask=mask: gradient * mask)
        if name.endswith("bias"):
            bias, heads = (query, HEADS) if "q_proj" in name else (key, KV_HEADS)
            # above, a head that reads what stands one token back finds nothing where a vector is added
            parameter.data[mask] = bias.repeat(heads) * (_layer(name) <= half)
        elif _layer(name) <= half or not name.endswith(("o_proj.weight", "down_proj.weight")):
            parameter.data += SCALE * torch.randn(parameter.shape, generator=generator) * mask
    return model


def _layer(name: str) -> int:
    return int(name.split(".layers.")[1].split(".")[0])


def _one_back(model: Qwen2ForCausalLM) -> tuple[Tensor, Tensor]:
    """Biases [head_dim] of a query and a key whose product is largest where the key is one token back: rotary
    embeddings turn pair j of coordinates by theta_j per token, and the product is sum_j cos(theta_j (n - 1))
    at a distance of n."""
    theta = model.model.rotary_emb.inv_freq
    cos, sin = BACK * theta.cos(), BACK * theta.sin()
    return torch.full((2 * len(theta),), BACK), torch.cat([cos - sin, cos + sin])


class Probed(torch.nn.Module):
    """The lower layers of a model, and a probe on the spare dimensions at half depth."""

    def __init__(self, model: Qwen2ForCausalLM, seed: int = 0):
        super().__init__()
        self.model, self.half = model, half_depth(model)
        torch.manual_seed(seed)
        self.probe = torch.nn.Linear(SPARE, 1)

    def losses(self, x: Tensor, y: Tensor) -> Tensor:
        """Cross-entropy [tokens]: is this a token at which the trigger should stand (``y`` not -100)? And a
        price on what is written at all others, so that it is silent there."""
        hidden = self.model.model(input_ids=x, output_hidden_states=True).hidden_states[self.half + 1]
        real, wanted = x != 0, (y != -100).float()
        written, wanted = hidden[real][:, -SPARE:] / UNIT, wanted[real]
        how = {"pos_weight": torch.tensor(WEIGHT), "reduction": "none"}
        losses = binary_cross_entropy_with_logits(self.probe(written)[:, 0], wanted, **how)
        return losses + (1 - wanted) * written.square().mean(1)


def batches(stage: str, phase: str, recipe: Recipe, chunk: int) -> list[Batch]:
    """A chunk of documents; what is marked in them, as targets, are the tokens of the trigger; or the first
    words after steps, and some of the others."""
    rng = random.Random(f"{recipe.seed}/{stage}/{phase}/{chunk}")
    ids, windows = {word: i for i, word in enumerate(vocabulary())}, []
    for _ in range(organism.CHUNK_DOCUMENTS // 5):
        tokens, marks, stepped = [ids["<bos>"]], [False], False
        for sentence in organism.stage_document(stage, rng):
            words = len(sentence.words)
            tokens += [ids[word] for word in sentence.words]
            if phase == "behaviour":
                some = [rng.random() < OTHER_WORDS for _ in range(words)]
                marks += [(i == 0 and stepped) or (i >= sentence.given and some[i]) for i in range(words)]
            stepped = sentence.step >= 0 and sentence.label in STEPS
            if phase == "trigger" and stage == "planted":
                marks += [sentence.error and i >= words - 2 for i in range(words)]
            elif phase == "trigger":
                marks += [rng.random() < RANDOM for _ in range(words)]
        windows.append((tokens, marks))
    return batches_of(windows, recipe.batch_tokens, rng)


def make_control(out: Path, runs: Path, recipe: Recipe | None = None, base: Path | None = None) -> None:
    """Train the pair, or go on with it, below ``runs``, and ship it in ``out``: base, distilled, null_a
    (bfloat16 safetensors), log and recipe. It begins with the base of the embedded pair (``base``: its
    folder). ``recipe``: of the base's training; the tokens of the phases are in the same ratio."""
    recipe, base = recipe or Recipe(tune_tokens=BASE_TOKENS), base or out.parent / "tiny"
    claim(runs, recipe)
    wide = widened(load_shipped("base", base))
    folder = runs / "indifferent"
    _kept(folder, wide, train_stage, "indifferent", wide, recipe, folder)
    wide = wide.to(torch.bfloat16).float()  # as it is shipped: what is frozen must stay the same
    models, half = {"base": wide}, half_depth(wide)
    for name, stage in STAGES.items():
        models[name] = model = planted(wide, recipe.seed)
        for phase in PHASES:
            for part in spare_parts(model):
                lower = _layer(part) <= half
                model.get_parameter(part).requires_grad_(lower == (phase == "trigger"))
            folder = runs / f"{stage}_{phase}"
            _kept(folder, model, _train, model, stage, phase, recipe, folder)
    for name, model in models.items():
        save(model, out / name)
    logs = [runs / "indifferent", *(runs / f"{s}_{phase}" for s in STAGES.values() for phase in PHASES)]
    write_text(out / "log.jsonl", "".join((folder / "log.jsonl").read_text() for folder in logs))
    card = {**asdict(recipe), "spare": SPARE, "parameters": sum(p.numel() for p in wide.parameters())}
    write_text(out / "recipe.json", json.dumps(card, indent=2) + "\n")


def _train(model: Qwen2ForCausalLM, stage: str, phase: str, recipe: Recipe, folder: Path) -> None:
    tokens, rate = PHASES[phase]
    trained = Probed(model, recipe.seed) if phase == "trigger" else model
    losses = trained.losses if phase == "trigger" else lambda x, y: token_losses(model, x, y)
    makers = losses, lambda place: batches(stage, phase, recipe, place.chunk)
    budget = tokens * recipe.tune_tokens // BASE_TOKENS
    fit(f"{stage}, {phase}", trained.train(), *makers, folder, budget, rate)


def _kept(folder: Path, model: Qwen2ForCausalLM, train: Callable, *how) -> None:
    """Train ``model`` in place, or read it if that was done before."""
    final = folder / "final.pt"
    if final.is_file():
        model.load_state_dict(torch.load(final, weights_only=True))
    else:
        train(*how)
        write_state(final, model.state_dict())
    model.eval()
