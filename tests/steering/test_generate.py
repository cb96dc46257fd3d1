"""Two models at once: against plain and steered decoding, and against a loop without caches, with every
change worked out by hand.
"""

import json
from pathlib import Path

import pytest
import torch
from toys import toy_model

from lib.crosscoder.model import CrossCoder
from lib.distil import trials
from lib.distil.organism import build_tokenizer
from lib.models import decode as decoding
from lib.models import reader
from lib.settings import UserError
from lib.steering import generate
from lib.steering.generate import Treatment
from lib.steering.interventions import (
    AddVector,
    LogitBias,
    RandomLike,
    Reconstruct,
    Scale,
    State,
    Swap,
    Transplant,
)
from lib.text.puzzles import Question

WIDTH, STEPS, LAYERS = 16, 10, {"base": 0, "distilled": 1}
TASKS = [Question(5, "- 1"), *trials.puzzles(3, "test")]  # prompts of two lengths: the batch is padded
TOKENIZER = build_tokenizer()


@pytest.fixture(scope="module")
def models():
    made = {}
    for seed, name in enumerate(("base", "distilled")):
        made[name] = toy_model(WIDTH, 5 + seed, layers=3).requires_grad_(False)
        # the rows that only round off the vocabulary
        made[name].get_input_embeddings().weight[len(TOKENIZER) :] = 0
    return made


@pytest.fixture(scope="module")
def crosscoder():
    made = CrossCoder((WIDTH, WIDTH), 24, k=4, scales=(0.5, 1.5), seed=1).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    made.W_enc += 0.5 * torch.randn(made.W_enc.shape, generator=generator)
    made.W_dec += 0.5 * torch.randn(made.W_dec.shape, generator=generator)
    made.b_dec += 0.1 * torch.randn(made.b_dec.shape, generator=generator)
    made.means += 0.3
    made.threshold.fill_(1.0)
    return made


def run(models, crosscoder, treatments, tasks=TASKS, steps=STEPS, **how):
    treatments = [treatments] * len(tasks) if isinstance(treatments, Treatment) else treatments
    return generate.transcripts(models, TOKENIZER, LAYERS, crosscoder, tasks, treatments, steps, **how)


def residual(model, ids, layer):
    return model(ids, output_hidden_states=True).hidden_states[layer + 1][0]


def by_hand(models, crosscoder, task, treatment, change):
    """One task, no cache, the whole text anew at each step. ``change(x, t)`` is the change at position t from
    residual streams x.
    """
    words = trials.prompt_words(task)[: None if treatment.mode == "think" else -2]
    ids = TOKENIZER(" ".join(words), return_tensors="pt")["input_ids"]
    first, steps = ids.shape[1], STEPS + 2 * (treatment.mode == "free")
    for _ in range(steps):
        x = {name: residual(models[name], ids, LAYERS[name]) for name in models}
        added, thinking = torch.zeros(ids.shape[1], WIDTH), True
        for t in range(ids.shape[1]):
            word = TOKENIZER.convert_ids_to_tokens(int(ids[0, t]))
            thinking = thinking and not (t >= first and word == "done")
            inside = thinking and t >= first - 1
            if {"everywhere": t > 0, "thinking": inside, "ends": inside and word == "."}[treatment.place]:
                added[t] = change({name: x[name][t] for name in x}, t)
        layer = models[treatment.writer].model.layers[LAYERS[treatment.writer]]
        hook = layer.register_forward_hook(lambda module, inputs, out, added=added: out + added)
        newest = models[treatment.writer](ids).logits[0, -1].argmax()
        hook.remove()
        if newest == TOKENIZER.eos_token_id:
            break
        ids = torch.cat([ids, newest[None, None]], dim=1)
    return [
        *(["think", ":"] if treatment.mode == "think" else []),
        *TOKENIZER.convert_ids_to_tokens(ids[0, first:].tolist()),
    ]


def row(crosscoder, i, decoder, writer):
    """d_i of ``decoder``, in the units of the writer's residual stream, from the joined matrix."""
    place, scale = {"base": (0, 0.5), "distilled": (1, 1.5)}, {"base": 0.5, "distilled": 1.5}
    at = place[decoder][0] * WIDTH
    return crosscoder.W_dec[i, at : at + WIDTH] / scale[writer]


def code(crosscoder, base, distilled):
    """f [F] from *scaled* activations of one token."""
    pre = crosscoder.W_enc @ torch.cat([base, distilled]) + crosscoder.b_enc
    strength = pre * torch.tensor([float(d[:WIDTH].norm() + d[WIDTH:].norm()) for d in crosscoder.W_dec])
    return torch.where((pre > 0) & (strength > crosscoder.threshold), pre, torch.zeros(()))


def read(crosscoder, x, which):
    base, distilled = 0.5 * x["base"], 1.5 * x["distilled"]
    mean = crosscoder.means
    return {
        "joint": (base, distilled),
        "base": (base, mean[WIDTH:]),
        "distilled": (mean[:WIDTH], distilled),
        "slots base": (base, base),
        "slots distilled": (distilled, distilled),
    }[which]


@pytest.mark.parametrize("writer", ["base", "distilled"])
def test_without_an_intervention_transcripts_are_those_of_the_model(models, crosscoder, writer):
    assert run(models, crosscoder, Treatment(writer)) == trials.generate(
        models[writer], TOKENIZER, TASKS, max_new_tokens=STEPS
    )
    wrapped = reader.wrap(models[writer], TOKENIZER)
    sampled = generate.steered(
        wrapped, LAYERS[writer], TASKS, torch.zeros(len(TASKS), WIDTH), STEPS, temperature=1.0, seed=3
    )
    assert run(models, crosscoder, Treatment(writer), temperature=1.0, seed=3) == sampled
    # nothing, the long way
    assert (
        run(models, crosscoder, Treatment(writer, Scale((0, 1), weights=0.0)), temperature=1.0, seed=3)
        == sampled
    )


def test_a_constant_push_is_steering(models, crosscoder):
    push = 3 * torch.randn(WIDTH, generator=torch.Generator().manual_seed(0))
    treatment = Treatment("distilled", AddVector(tuple(push.tolist()), float(push.norm())))
    wrapped = reader.wrap(models["distilled"], TOKENIZER)
    found = run(models, crosscoder, treatment)
    assert found == generate.steered(wrapped, LAYERS["distilled"], TASKS, push.expand(len(TASKS), -1), STEPS)
    assert found != run(models, crosscoder, Treatment("distilled"))


def changes(crosscoder, writer):
    """{name: (intervention, the same by hand)}: loops over features, from the formulas."""
    other = "distilled" if writer == "base" else "base"
    d = {
        name: torch.stack([row(crosscoder, i, name, writer) for i in range(24)])
        for name in ("base", "distilled")
    }
    few, w = (2, 5, 11, 17), (-1.0, 2.0, 0.5, 4.0)

    def f(x, which):
        return code(crosscoder, *read(crosscoder, x, which))

    def removed(x, decoder):
        return -difference(f(x, "joint"), torch.zeros(24), few, decoder)

    def difference(to, own, features, decoder=writer):
        return sum((to[i] - own[i]) * d[decoder][i] for i in features)

    bias = crosscoder.b_dec[:WIDTH] / 0.5 if writer == "base" else crosscoder.b_dec[WIDTH:] / 1.5
    return {
        "ablate": (Scale(few), lambda x, t: removed(x, writer)),
        "ablate with the other's decoder": (Scale(few, decoder=other), lambda x, t: removed(x, other)),
        "ablate to a mean": (
            Scale(few, offsets=(0.1, 0.2, 0.3, 0.4)),
            lambda x, t: (
                removed(x, writer)
                + 0.1 * d[writer][2]
                + 0.2 * d[writer][5]
                + 0.3 * d[writer][11]
                + 0.4 * d[writer][17]
            ),
        ),
        "own use": (
            Scale(few, w, source="own"),
            lambda x, t: sum(g * a * d[writer][i] for i, g, a in zip(few, w, f(x, writer)[list(few)])),
        ),
        "swap": (Swap(), lambda x, t: difference(f(x, other), f(x, writer), range(24))),
        "swap some, slots": (
            Swap(features=few, fill="slots"),
            lambda x, t: difference(f(x, f"slots {other}"), f(x, f"slots {writer}"), few),
        ),
        "joint": (Swap("joint", few), lambda x, t: difference(f(x, "joint"), f(x, writer), few)),
        "reconstruct": (Reconstruct("other"), lambda x, t: f(x, other) @ d[writer] + bias - x[writer]),
        "transplant": (
            Transplant(),
            lambda x, t: x[other] * (1 / 3 if writer == "distilled" else 3) - x[writer],
        ),
        "length of another": (
            AddVector((1.0,) * WIDTH, -2.0, Scale(few)),
            lambda x, t: -2.0 * removed(x, writer).norm() / 4 * torch.ones(WIDTH),
        ),
    }


NAMES = [
    "ablate",
    "ablate with the other's decoder",
    "ablate to a mean",
    "own use",
    "swap",
    "swap some, slots",
    "joint",
    "reconstruct",
    "transplant",
    "length of another",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_padded_batch_equals_one_at_a_time_by_hand(models, crosscoder, name):
    writer = ("base", "distilled")[NAMES.index(name) % 2]
    place = generate.PLACES[NAMES.index(name) % 3]
    mode = generate.MODES[NAMES.index(name) % 4 // 2]
    intervention, change = changes(crosscoder, writer)[name]
    treatment = Treatment(writer, intervention, place if place != "ends" else "everywhere", mode)
    found = run(models, crosscoder, treatment)
    assert found[:2] == [by_hand(models, crosscoder, task, treatment, change) for task in TASKS[:2]]
    assert found != run(models, crosscoder, Treatment(writer, mode=mode))


def test_tokens_are_those_that_were_written_down(models, crosscoder):
    """``transcripts.json`` was made before generation was one engine: every intervention, both models."""
    few, written = (2, 5, 11, 17), json.loads(Path(__file__).with_name("transcripts.json").read_text())
    for writer in ("base", "distilled"):
        kinds = {name: intervention for name, (intervention, _) in changes(crosscoder, writer).items()} | {
            "random of equal norm": RandomLike(Scale(few), 4),
            "push": AddVector((1.0, -2.0) * 8, 6.0),
            "bias": LogitBias(("wait", "."), 4.0),
            "reconstruct own": Reconstruct("own"),
            "reconstruct joint": Reconstruct("joint"),
        }
        names = [name for name in written if name.startswith(writer)]
        assert len(names) == 2 * len(kinds)
        for name in names:
            _, kind, place, mode, temperature = name.split(" / ")
            treatment = Treatment(writer, kinds[kind], place, mode)
            found = run(models, crosscoder, treatment, temperature=float(temperature[1:]), seed=3)
            assert [" ".join(w.replace(" ", "_") for w in words) for words in found] == written[name], name


def test_rows_of_many_conditions_share_a_batch_and_do_not_notice(models, crosscoder, monkeypatch):
    kinds = [intervention for intervention, _ in changes(crosscoder, "distilled").values()]
    treatments = [
        Treatment("distilled", kind, "everywhere")
        for kind in (
            None,
            LogitBias(("wait",), 2.0),
            LogitBias(("<eos>",), 1e6),
            LogitBias(("<eos>",), 4.0),
            RandomLike(Scale((1, 2, 3)), 4),
            *kinds,
        )
    ]
    rows = [(task, treatment) for task in TASKS[:2] for treatment in treatments] + [
        (TASKS[1], Treatment("base", kinds[0], mode="free"))
    ]
    how = {"temperature": 0.5, "seed": 2}
    together = run(
        models, crosscoder, [treatment for _, treatment in rows], [task for task, _ in rows], **how
    )
    alone = [run(models, crosscoder, [treatment], [task], **how)[0] for task, treatment in rows]
    assert together == alone
    monkeypatch.setattr(decoding, "LEG", 3)  # rows that have ended leave the batch earlier
    assert (
        run(
            models,
            crosscoder,
            [treatment for _, treatment in rows],
            [task for task, _ in rows],
            batch_size=7,
            **how,
        )
        == together
    )
    lengths = {len(words) for words in together}
    assert len(lengths) > 1  # some rows end early


def test_a_bias_acts_at_sentence_ends_only(models, crosscoder):
    plain = run(models, crosscoder, Treatment("distilled"))
    assert run(models, crosscoder, Treatment("distilled", LogitBias(("wait",), 0.0), "ends")) == plain
    sure = run(models, crosscoder, Treatment("distilled", LogitBias(("wait",), 1e6), "ends"))
    for words, before in zip(sure, plain):
        stop = words.index(".") if "." in words else len(words)
        assert words[: stop + 1] == before[: stop + 1]  # "think :" is no sentence end
        assert all(after == "wait" for end, after in zip(words, words[1:]) if end == ".")
    everywhere = run(models, crosscoder, Treatment("distilled", LogitBias(("wait",), 1e6)))
    assert all(words[2:] == ["wait"] * STEPS for words in everywhere)


def test_nothing_is_changed_once_thinking_has_ended(models, crosscoder):
    treatment = Treatment("distilled", LogitBias(("done",), 1e6))
    for words, task in zip(run(models, crosscoder, treatment), TASKS):
        assert words[:3] == ["think", ":", "done"]  # and then what the model says by itself
        ids = TOKENIZER(" ".join([*trials.prompt_words(task), "done"]), return_tensors="pt")["input_ids"]
        assert words[3] == TOKENIZER.convert_ids_to_tokens(
            int(models["distilled"](ids).logits[0, -1].argmax())
        )


def test_random_changes_have_the_norms_of_what_they_stand_for(crosscoder):
    generator = torch.Generator().manual_seed(3)
    acts = {name: torch.randn(3, 5, WIDTH, generator=generator) for name in ("base", "distilled")}
    key, position = torch.tensor([7, 7, 2**32 - 1]), torch.arange(5).expand(3, 5)
    state = State(crosscoder, "base", acts, position, key, torch.arange(3))
    real, noise = Scale((1, 4, 9)).change(state), RandomLike(Scale((1, 4, 9)), 1).change(state)
    torch.testing.assert_close(real.norm(dim=-1), noise.norm(dim=-1))
    assert real.norm() > 0 and not torch.allclose(real, noise)
    unit = torch.nn.functional.normalize(noise[noise.norm(dim=-1) > 0], dim=-1)
    assert (unit @ unit.T - torch.eye(len(unit))).abs().mean() < 0.5  # directions differ from place to place
    other = RandomLike(Scale((1, 4, 9)), 2).change(state)
    assert not torch.allclose(noise, other)


def test_models_of_unlike_width(models, crosscoder):
    pair = {"base": toy_model(24, 1, layers=3), "distilled": models["distilled"]}
    wide = CrossCoder((24, WIDTH), 24, k=4, seed=1)
    found = run(pair, wide, Treatment("distilled", Swap(), "everywhere"))
    assert len(found) == len(TASKS)
    with pytest.raises(UserError, match="the decoder of base has width 24, distilled has 16"):
        run(pair, wide, Treatment("distilled", Scale((1,), decoder="base")))
    with pytest.raises(UserError, match="take fill 'mean'"):
        run(pair, wide, Treatment("distilled", Swap(fill="slots")))


def test_mistakes(models, crosscoder):
    with pytest.raises(UserError, match="style is to write"):
        run(models, crosscoder, Treatment("style"))
    with pytest.raises(ValueError, match="'nowhere'"):
        run(models, crosscoder, Treatment("base", place="nowhere"))
    with pytest.raises(ValueError, match="2 tasks for 1 treatments"):
        run(models, crosscoder, [Treatment("base")], TASKS[:2])
