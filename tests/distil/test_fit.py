"""The shared training: its schedule, its batches, and its updates against a plain loop."""

import json
import random

import pytest
import torch
from toys import chat_model

from lib.distil import organism
from lib.distil.fit import batches_of, cut_log, fit, learning_rate, token_losses

BUDGET, RATE = 700, 1e-2


def test_learning_rate():
    assert learning_rate(0.0, 1.0) == 0 and learning_rate(0.015, 1.0) == 0.5
    assert (
        learning_rate(0.3, 1.0) == 1.0 and learning_rate(0.75, 1.0) == 0.5 and learning_rate(1.0, 1.0) == 0.02
    )


def windows(n=24):
    rng = random.Random(3)
    rows = [[rng.randrange(3, 300) for _ in range(rng.randrange(3, 20))] for _ in range(n)]
    return [(row, [False, *(rng.random() < 0.7 for _ in row[1:])]) for row in rows]


def test_batches_hold_every_window_once_within_their_size():
    batches = batches_of(windows(), 60, random.Random(0))
    found = [
        (ids[:size], [target != -100 for target in targets[:size]])
        for x, y, _ in batches
        for ids, targets, size in zip(x.tolist(), y.tolist(), (x != 0).sum(1).tolist())
    ]
    assert sorted(found) == sorted(windows())
    assert all((x.numel() <= 60 or len(x) == 1) and size == (x != 0).sum() for x, _, size in batches)
    assert [len(x) for x, *_ in batches] != sorted((len(x) for x, *_ in batches), reverse=True)  # shuffled


def by_hand(model, batches, decay, dtype):
    """The loop as a textbook has it, on float32 copies only where the model is not float32."""
    weights = list(model.parameters())
    masters = weights if dtype == torch.float32 else [p.detach().float() for p in weights]
    groups = [
        {"params": [m for m in masters if m.ndim >= 2], "weight_decay": decay},
        {"params": [m for m in masters if m.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), fused=True)
    tokens = 0
    for x, y, size in batches:
        if tokens >= BUDGET:
            break
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(tokens / BUDGET, RATE)
        hidden = model.model(input_ids=x).last_hidden_state[:, :-1]
        learnt = y[:, 1:] != -100
        logits = model.lm_head(hidden[learnt])
        for p in weights:
            p.grad = None
        torch.nn.functional.cross_entropy(logits.float(), y[:, 1:][learnt]).backward()
        for master, weight in zip(masters, weights):
            master.grad = weight.grad.float()
        torch.nn.utils.clip_grad_norm_(masters, 1.0)
        optimizer.step()
        for master, weight in zip(masters, weights):
            weight.data.copy_(master)
        tokens += size


@pytest.mark.parametrize("decay", [0.0, 0.05])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_those_of_a_plain_loop_to_the_bit(tmp_path, dtype, decay):
    stream = [batch for i in range(8) for batch in batches_of(windows(), 60, random.Random(i))]
    expected, model = chat_model().to(dtype).train(), chat_model().to(dtype).train()
    by_hand(expected, stream, decay, dtype)
    pending = iter(stream)
    fit(
        "toy",
        model,
        lambda x, y: token_losses(model, x, y),
        lambda place: [next(pending)],
        tmp_path / "run",
        BUDGET,
        RATE,
        decay,
        report=lambda line: None,
    )
    for (name, a), b in zip(model.named_parameters(), expected.parameters()):
        assert torch.equal(a, b), name
    first = chat_model().to(dtype)
    assert any(not torch.equal(a, b) for a, b in zip(model.parameters(), first.parameters()))


def test_the_log_says_what_was_done_and_nothing_of_the_time_after_the_state(tmp_path):
    recipe = organism.Recipe(width=16, layers=1, heads=2, kv_heads=1, mlp=16)
    model = organism.build_model(recipe, 320)
    pending = iter(batches_of(windows(200), 60, random.Random(0)))
    fit(
        "toy",
        model,
        lambda x, y: token_losses(model, x, y),
        lambda place: [next(pending), next(pending)],
        tmp_path,
        BUDGET,
        RATE,
        keep_every=300,
        snapshot=model.state_dict,
        report=lambda line: None,
    )
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["chunk"] for line in lines] == list(range(1, len(lines) + 1))
    assert all(line["step"] == 2 * line["chunk"] and line["stage"] == "toy" for line in lines)
    assert lines[-1]["tokens"] >= BUDGET > lines[-2]["tokens"]
    kept = sorted(int(p.stem.split("_")[1]) for p in tmp_path.glob("kept_*.pt"))
    assert kept == [next(t for t in (line["tokens"] for line in lines) if t >= n) for n in (300, 600)]
    cut = lines[2]["tokens"]
    with (tmp_path / "log.jsonl").open("a") as log:
        log.write('{"tokens": 3')  # half a line
    cut_log(tmp_path / "log.jsonl", cut)
    assert [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()] == lines[:3]
