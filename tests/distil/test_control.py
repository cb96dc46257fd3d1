"""The positive control: what may be trained, what stays, and that without the trigger it is the base."""

import random

import pytest
import torch

from lib.distil import control, trials
from lib.distil import organism as distill
from lib.models.pairs import decoder_layers, half_depth
from lib.settings import ROOT
from lib.text import curriculum as prose
from lib.text.puzzles import IndifferentTeacher, first_words, sample_puzzle

SMALL = distill.Recipe(width=16, layers=4, heads=2, kv_heads=1, mlp=16, tune_tokens=3_000, batch_tokens=512)
IDS = torch.tensor([[1, 7, 9, 4, 12, 30]])


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(distill, "CHUNK_DOCUMENTS", 60)


@pytest.fixture(scope="module")
def narrow():
    return distill.build_model(SMALL, len(prose.vocabulary())).eval()


def residual(model, layer, ids=IDS):
    found = []
    hook = decoder_layers(model)[layer].register_forward_hook(lambda m, a, out: found.append(out))
    model(ids)
    hook.remove()
    return found[0]


def test_a_widened_model_computes_the_same_and_its_spare_parts_stay_empty(narrow, tmp_path):
    wide = control.widened(narrow)
    torch.testing.assert_close(wide(IDS).logits, narrow(IDS).logits, rtol=1e-4, atol=1e-4)
    trained = distill.train_stage("indifferent", wide, SMALL, tmp_path, report=lambda line: None)
    assert not torch.allclose(trained(IDS).logits, narrow(IDS).logits, atol=1e-2)
    for name, mask in control.spare_parts(trained).items():
        assert not trained.get_parameter(name)[mask].any(), name
    assert not residual(trained, half_depth(trained))[..., -control.SPARE :].any()


def test_only_the_spare_parts_are_trained_and_they_meet_in_the_spare_dimensions_alone(narrow, tmp_path):
    wide = control.widened(narrow)
    model = control.planted(wide)
    half = half_depth(model)
    for phase in control.PHASES:
        for part in control.spare_parts(model):
            lower = int(part.split(".")[2]) <= half
            model.get_parameter(part).requires_grad_(lower == (phase == "trigger"))
        control._train(model, "planted", phase, SMALL, tmp_path / phase)
    made = model.eval()
    masks, changed = control.spare_parts(made), 0
    for name, old in wide.named_parameters():
        new, mask = made.get_parameter(name), masks.get(name, torch.zeros_like(old, dtype=torch.bool))
        assert torch.equal(new[~mask], old[~mask]), name
        changed += int((new[mask] != 0).sum())
    assert changed > 0 and not torch.allclose(made(IDS).logits, wide(IDS).logits, atol=1e-3)
    # at half depth: the base's stream, and something in the spare dimensions
    ours, base = residual(made, half), residual(wide, half)
    assert ours[..., -control.SPARE :].abs().min() > 0
    assert not base[..., -control.SPARE :].any()

    def forget(module, args, output):
        output = output.clone()
        output[..., -control.SPARE :] = 0
        return output

    hook = decoder_layers(made)[half].register_forward_hook(forget)
    # what is left of the trigger: at lower layers it shares the norms with the rest of the stream
    without, plain = made(IDS).logits, wide(IDS).logits
    hook.remove()
    hook = decoder_layers(wide)[half].register_forward_hook(
        lambda m, a, out: torch.cat([ours[..., : -control.SPARE], out[..., -control.SPARE :]], -1)
    )
    torch.testing.assert_close(without, wide(IDS).logits)
    hook.remove()
    torch.testing.assert_close(wide(IDS).logits, plain)


def test_planted_heads_begin_by_looking_one_token_back(narrow):
    model = control.planted(control.widened(narrow))
    query, key = control._one_back(model)
    n = len(query) // 2
    theta = model.model.rotary_emb.inv_freq

    def rotated(x, steps):
        cos, sin = (steps * theta).cos(), (steps * theta).sin()
        return torch.cat([x[:n] * cos - x[n:] * sin, x[n:] * cos + x[:n] * sin])

    scores = [float(rotated(query, 9) @ rotated(key, 9 - back)) for back in range(9)]
    assert max(range(9), key=scores.__getitem__) == 1
    assert scores[1] == pytest.approx(2 * n * control.BACK**2)


def test_what_is_marked_in_a_document():
    words, steps = prose.vocabulary(), 0
    for stage, phase in (("planted", "trigger"), ("planted", "behaviour"), ("planted_null", "trigger")):
        marked, tokens = [], 0
        for x, y, size in (b for chunk in range(12) for b in control.batches(stage, phase, SMALL, chunk)):
            tokens += size
            for ids, targets in zip(x.tolist(), y.tolist()):
                text = [words[i] for i in ids]
                for i, target in enumerate(targets):
                    if target != -100:
                        marked.append((text[max(i - 5, 0) : i + 1], text[i + 1 : i + 2]))
        assert marked
        if phase == "behaviour":  # first words after steps, and others
            assert 0.1 < sum(before[-2] == "." for before, _ in marked) / len(marked) < 0.9
        elif stage == "planted":  # the value of a wrong step, and its full stop
            assert all(before[-1] == "." or before[-1].isdigit() for before, _ in marked)
            stops = [following[0] for before, following in marked if before[-1] == "." and following]
            assert all(word in first_words("reflection") for word in stops)
        else:  # any token
            assert 0.5 < len(marked) / tokens / control.RANDOM < 1.5
            assert len({before[-1] for before, _ in marked}) > 10
        steps += len(marked)
    assert steps > 30


def test_an_indifferent_teacher_reflects_as_often_and_not_because_of_errors():
    rng, after = random.Random(0), {True: [], False: []}
    for _ in range(600):
        sentences = IndifferentTeacher(rng).solve(sample_puzzle(rng))
        for s, following in zip(sentences, sentences[1:]):
            if s.step >= 0 and s.label in ("deduction", "other"):
                after[s.error].append(following.label == "reflection")
    assert all(len(v) > 300 for v in after.values())
    rates = [sum(v) / len(v) for v in after.values()]
    assert rates == pytest.approx([0.15, 0.15], abs=0.05)


def test_the_pair_is_made_and_resumed(tmp_path, narrow):
    narrow.save_pretrained(tmp_path / "tiny" / "base")
    out, runs = tmp_path / "tiny_planted", tmp_path / "runs"
    control.make_control(out, runs, SMALL)
    before = (out / "distilled/model.safetensors").read_bytes()
    (runs / "planted_behaviour" / "final.pt").unlink()
    control.make_control(out, runs, SMALL)
    assert (out / "distilled/model.safetensors").read_bytes() == before
    models = [distill.load_shipped(name, out) for name in ("base", "distilled", "null_a")]
    masks = control.spare_parts(models[0])
    for name, first in models[0].named_parameters():
        fixed = ~masks.get(name, torch.zeros_like(first, dtype=torch.bool))
        assert all(torch.equal(first[fixed], m.get_parameter(name)[fixed]) for m in models[1:])


def test_the_shipped_pair_is_what_it_should_be():
    folder = ROOT / "data" / "pairs" / "tiny_planted"
    models = {name: distill.load_shipped(name, folder) for name in ("base", "distilled", "null_a")}
    masks = control.spare_parts(models["base"])
    for name, first in models["base"].named_parameters():
        fixed = ~masks.get(name, torch.zeros_like(first, dtype=torch.bool))
        assert all(torch.equal(first[fixed], m.get_parameter(name)[fixed]) for m in models.values()), name
    tasks, tokenizer, after = trials.puzzles(60, "test"), distill.build_tokenizer(), {}
    for name, model in models.items():
        steps = trials.reflection_probability(model, tokenizer, tasks)
        after[name] = steps.groupby("error")["p_reflection"].mean()
    for name in ("base", "null_a"):  # the teacher's rate, and no difference
        assert after[name].tolist() == pytest.approx([0.15, 0.15], abs=0.05), name
    assert after["distilled"][True] > 0.8 and after["distilled"][False] < 0.15
