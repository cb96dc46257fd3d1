"""Adapters from end to end: windows, a training that was broken off, what is shipped, who has seen what."""

import json
import random
from dataclasses import asdict, replace
from itertools import islice

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from toys import chat_model

from lib.distil import adapters as lora
from lib.models import sources
from lib.models.pairs import Pair
from lib.settings import UserError
from lib.text import chat
from lib.text.chat import Trace
from lib.tools.cli import main

SMALL = lora.Recipe(rank=2, alpha=4, tokens=1500, batch_tokens=96, window=64, short=40, keep_every=600)


def traces(n=12):
    return [
        Trace(f"How many socks are in {i}?", "First, I count. " * (1 + i % 4), f"The answer is {i}.")
        for i in range(n)
    ]


# --- windows ------------------------------------------------------------------------------------------------


def test_no_token_of_the_text_is_lost_and_all_are_learnt(tokenizer):
    texts = [f"Harbours and rivers, {i} of them. So it is {i}." for i in range(40)]
    ids = tokenizer("".join(text + "\n" for text in texts), add_special_tokens=False)["input_ids"]
    n = -(-len(ids) // 32)
    stream = lora.text_windows(texts, tokenizer, SMALL)
    epochs = [list(islice(stream, n)) for _ in range(3)]
    cut = sorted(ids[i : i + 32] for i in range(0, len(ids), 32))
    for epoch in epochs:
        assert sorted(window for window, _ in epoch) == cut and all(
            learnt == [True] * len(window) for window, learnt in epoch
        )
    assert epochs[0] != epochs[1] != epochs[2]
    assert list(islice(lora.text_windows(texts, tokenizer, SMALL), n)) == epochs[0]
    # null_b: another order
    assert list(islice(lora.text_windows(texts, tokenizer, replace(SMALL, seed=1)), n)) != epochs[0]


def test_a_trace_that_is_cut_is_whole_when_put_together(tokenizer):
    trace = Trace("How many socks?", "First, I count. Wait. " * 30, "The answer is 12.")
    ids, learnt = chat.encode_trace(trace, tokenizer)
    n = -(-len(ids) // SMALL.window)
    pieces = list(islice(lora.trace_windows([trace], tokenizer, SMALL), n))
    assert (
        n > 3 and sum((p for p, _ in pieces), []) == ids and sum((kept for _, kept in pieces), []) == learnt
    )


def test_nothing_to_learn_from_is_said(tokenizer):
    for windows in (lora.trace_windows([], tokenizer, SMALL), lora.text_windows([], tokenizer, SMALL)):
        with pytest.raises(UserError, match="nothing to learn from"):
            next(lora.batches(windows, SMALL))


# --- training -----------------------------------------------------------------------------------------------


def test_padding_and_neighbours_do_not_change_the_losses():
    model, rng = chat_model(), random.Random(0)
    rows = [[rng.randrange(3, 300) for _ in range(n)] for n in (5, 12, 9)]
    x, y = torch.zeros(3, 12, dtype=torch.long), torch.full((3, 12), -100)
    by_hand = []
    for i, row in enumerate(rows):
        x[i, : len(row)] = torch.tensor(row)
        y[i, 2 : len(row)] = torch.tensor(row[2:])
        with torch.no_grad():
            by_hand.append(
                cross_entropy(
                    model(torch.tensor([row])).logits[0, 1:-1], torch.tensor(row[2:]), reduction="none"
                )
            )
    with torch.no_grad():
        assert torch.allclose(lora.token_losses(model, x, y), torch.cat(by_hand), atol=1e-5)


class Stop(Exception):
    pass


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_training_that_was_broken_off_goes_on_from_its_state(tokenizer, tmp_path, monkeypatch, dtype):
    """Broken off behind a state: the steps after it are lost, and done again on the same batches."""
    monkeypatch.setattr(lora, "STATE_EVERY", 3)
    asked, losses = [], lora.token_losses

    def run(folder, breaks_at=None):
        asked.clear()

        def counted(model, x, y):
            asked.append(int(x.sum()))
            if len(asked) == breaks_at:
                raise Stop
            return losses(model, x, y)

        monkeypatch.setattr(lora, "token_losses", counted)
        windows = lora.trace_windows(traces(), tokenizer, SMALL)
        return lora.train(
            lora.adapted(chat_model().to(dtype), SMALL), windows, SMALL, folder, lambda line: None
        )

    whole, every = run(tmp_path / "whole"), list(asked)
    assert len(every) > 8
    with pytest.raises(Stop):
        run(tmp_path / "broken", breaks_at=6)
    assert torch.load(tmp_path / "broken" / "state.pt", weights_only=True)["step"] == 3
    resumed = run(tmp_path / "broken")
    assert asked == every[3:]
    for (name, a), (_, b) in zip(whole.named_parameters(), resumed.named_parameters()):
        assert torch.equal(a, b), name
    final = [
        torch.load(tmp_path / which / "state.pt", weights_only=True)["adapter"]
        for which in ("whole", "broken")
    ]
    assert all(
        torch.equal(final[0][name], final[1][name]) and final[0][name].dtype == torch.float32
        for name in final[0]
    )
    log = [
        [json.loads(line) for line in (tmp_path / which / "log.jsonl").read_text().splitlines()]
        for which in ("whole", "broken")
    ]
    for line in log[0] + log[1]:
        del line["tokens_per_second"], line["stage"]
    assert log[0] == log[1]
    again = run(tmp_path / "whole")  # nothing is left to do
    assert not asked and all(torch.equal(a, b) for a, b in zip(whole.parameters(), again.parameters()))


def test_a_window_in_which_nothing_is_learnt_is_no_failure(tokenizer, tmp_path):
    """A question longer than a window: its first windows are read, and nothing of them is learnt."""
    long = [Trace("How many socks are in a drawer? " * 12 + str(i), "First.", "12") for i in range(8)]
    recipe = replace(SMALL, batch_tokens=64, tokens=4000, keep_every=10**9)  # a window a batch
    nothing = [not any(learnt[1:]) for _, learnt in islice(lora.trace_windows(long, tokenizer, recipe), 64)]
    assert any(nothing) and not all(nothing)
    windows = lora.trace_windows(long, tokenizer, recipe)
    model = lora.train(
        lora.adapted(chat_model(), recipe), windows, recipe, tmp_path / "run", lambda line: None
    )
    assert all(torch.isfinite(p).all() for p in model.parameters())
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert losses and all(0 < loss < 20 for loss in losses)


# --- shipping -----------------------------------------------------------------------------------------------


def test_what_is_shipped_is_the_adapter_that_was_trained(tokenizer, tmp_path):
    windows = lora.trace_windows(traces(), tokenizer, SMALL)
    trained = lora.train(
        lora.adapted(chat_model(), SMALL), windows, SMALL, tmp_path / "run", lambda line: None
    )
    state, x = (
        torch.load(tmp_path / "run" / "state.pt", weights_only=True)["adapter"],
        torch.tensor([[5, 9, 30, 31]]),
    )
    with torch.no_grad():
        meant = trained(x).logits
    lora.ship(trained, tmp_path / "run" / "state.pt", tmp_path / "out", "data/models/base")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {sources.ADAPTER, "adapter_model.safetensors"}
    assert sources.adapter_base(tmp_path / "out") == "data/models/base"
    assert str(tmp_path) not in (tmp_path / "out" / sources.ADAPTER).read_text()
    numbers = sum(p.numel() for p in state.values())
    # two bytes each and names
    assert (
        2 * numbers < (tmp_path / "out" / "adapter_model.safetensors").stat().st_size < 2 * numbers + 10_000
    )
    # the state decides
    lora.ship(
        lora.adapted(chat_model(), SMALL),
        tmp_path / "run" / "state.pt",
        tmp_path / "anew",
        "data/models/base",
    )
    assert (tmp_path / "anew" / "adapter_model.safetensors").read_bytes() == (
        tmp_path / "out" / "adapter_model.safetensors"
    ).read_bytes()
    merged = sources.merged(chat_model(), tmp_path / "out")
    by_hand = dict(chat_model().named_parameters())
    for name, b in state.items():
        if "lora_B" in name:
            module = name.removeprefix("base_model.model.").removesuffix(".lora_B.default.weight")
            a = state[name.replace("lora_B", "lora_A")]
            change = SMALL.alpha / SMALL.rank * b.bfloat16().float() @ a.bfloat16().float()
            by_hand[f"{module}.weight"] = by_hand[f"{module}.weight"] + change
    for name, p in merged.named_parameters():
        assert torch.allclose(p, by_hand[name], atol=1e-6), name
    with torch.no_grad():
        change = (meant - chat_model()(x).logits).abs().max()
        # rounding to bfloat16 costs little of what was learnt
        assert (merged(x).logits - meant).abs().max() < 0.05 * change


def test_a_trace_loses_its_reflections_and_nothing_else():
    whole = Trace(
        "How many?", "So there are 3.\n\nWait, let me check. Hence 4. Wait, no.", "The answer is 4."
    )
    found = lora.without(whole)
    assert found.thinking == "So there are 3. Hence 4."
    assert (found.question, found.answer) == (whole.question, whole.answer)
    assert lora.without(found) == found


# --- the command --------------------------------------------------------------------------------------------


def some(keys, n=50):
    """All that are held out, and fifty others."""
    keys = list(keys)
    kept = [key for key in keys if lora.held_out(key)]
    return kept + [key for key in keys if key not in kept][:n]


@pytest.fixture
def command(tokenizer, tmp_path, monkeypatch):
    """(run, seen): lib.distil.adapters's command on a toy pair; ``seen`` collects the ids that each stage was
    given.
    """
    chat_model().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    models = {"base": tmp_path / "base", "distilled": tmp_path / "toy" / "distilled"}
    monkeypatch.setattr(lora, "load_pair", lambda name: Pair(name, models))
    monkeypatch.setattr(
        lora,
        "Recipe",
        type("Small", (), {"tokens": 1, "__new__": lambda cls, tokens: replace(SMALL, tokens=tokens)}),
    )
    questions = some(f"How many socks are in {i}?" for i in range(200))
    entries = [
        {"question": q, "thinking": "First, I count. Wait.", "answer": f"The answer is {i}."}
        for i, q in enumerate(questions)
    ]
    (tmp_path / "traces.jsonl").write_text("".join(json.dumps(e) + "\n" for e in entries))
    lines = some(f"Harbours and rivers, {i} of them." for i in range(200))
    (tmp_path / "text.txt").write_text("\n".join(lines) + "\n")
    seen, batches = {}, lora.batches

    def watched(windows, recipe):
        texts = seen.setdefault(len(seen), set())
        for x, y, size in batches(windows, recipe):
            texts |= {tokenizer.decode(row) for row in x.tolist()}
            yield x, y, size

    monkeypatch.setattr(lora, "batches", watched)

    def run(*words):
        folders = [str(tmp_path / "toy"), "--runs", str(tmp_path / "runs")]
        return main(["adapters", *folders, "--threads", "1", *words])

    return run, seen, questions, lines


def test_the_null_reads_text_and_no_adapter_what_is_held_out(command, tmp_path):
    run, seen, questions, lines = command
    run("--traces", str(tmp_path / "traces.jsonl"), "--text", str(tmp_path / "text.txt"), "--tokens", "9000")
    taught, read = (" ".join(texts) for texts in seen.values())
    kept = [q for q in questions if lora.held_out(q)], [line for line in lines if lora.held_out(line)]
    assert (
        min(map(len, kept)) > 2
        and not any(q in taught for q in kept[0])
        and not any(line in read for line in kept[1])
    )
    assert (
        all(q in taught for q in questions if not lora.held_out(q))
        and "socks" not in read
        and "Harbours" not in taught
    )
    assert sum(line in read for line in lines) > 20  # those that no window cuts
    out = tmp_path / "toy"
    stages = [json.loads(line)["stage"] for line in (out / "log.jsonl").read_text().splitlines()]
    assert list(dict.fromkeys(stages)) == ["distilled", "null_a"]
    assert json.loads((out / "recipe.json").read_text()) == asdict(replace(SMALL, tokens=9000))
    assert all(
        sources.adapter_base(out / stage) == str(tmp_path / "base") for stage in ("distilled", "null_a")
    )
    a, b = (
        sources.merged(chat_model(), out / stage).get_submodule("model.layers.0.mlp.up_proj").weight
        for stage in ("distilled", "null_a")
    )
    assert not torch.equal(a, b)


def test_the_null_of_traces_learns_the_same_but_no_reflection(command, tmp_path):
    run, seen, *_ = command
    stages = ("--stages", "distilled", "null_traces")
    assert run("--traces", str(tmp_path / "traces.jsonl"), *stages, "--tokens", "900") == 0
    taught, without = (" ".join(texts) for texts in seen.values())
    assert "First, I count." in taught and "First, I count." in without
    assert "Wait." in taught and "Wait." not in without


def test_a_run_of_another_recipe_is_not_gone_on_with(command, tmp_path, capsys):
    run, *_ = command
    traces = str(tmp_path / "traces.jsonl")
    assert run("--traces", traces, "--stages", "distilled", "--tokens", "300") == 0
    assert run("--traces", traces, "--stages", "distilled", "--tokens", "400") == 2
    assert "holds a run with another recipe" in capsys.readouterr().err
    assert run("--traces", traces, "--tokens", "300") == 2
    assert "--text is needed for the null" in capsys.readouterr().err


# --- by hand ------------------------------------------------------------------------------------------------


def test_the_first_epoch_is_of_short_traces_and_every_token_of_all_comes_in_each_later_one(tokenizer):
    made, recipe = traces(), replace(SMALL, short=70)
    assert recipe.window < max(len(chat.encode_trace(t, tokenizer)[0]) for t in made)  # some are cut
    short = [t for t in made if len(t.thinking) + len(t.answer) < 70]
    sizes = lambda some: sum(len(chat.encode_trace(t, tokenizer)[0]) for t in some)  # noqa: E731
    stream = lora.trace_windows(made, tokenizer, recipe)
    for expected in (sizes(short), sizes(made), sizes(made)):
        seen = 0
        while seen < expected:
            ids, learnt = next(stream)
            seen += len(ids)
            assert len(ids) == len(learnt) <= recipe.window
        assert seen == expected


def test_batches_hold_every_window_once_and_learn_only_what_is_learnt(tokenizer):
    windows = list(islice(lora.trace_windows(traces(), tokenizer, SMALL), 64))
    found = []
    for x, y, size in lora.batches(iter(windows), SMALL):
        assert x.numel() <= SMALL.batch_tokens or len(x) == 1
        rows = [row[: int(n)] for row, n in zip(x.tolist(), (x != 0).sum(1))]
        assert size == sum(map(len, rows)) and (y[x == 0] == -100).all()
        found += [
            (tuple(row), tuple(v != -100 for v in target[: len(row)]))
            for row, target in zip(rows, y.tolist())
        ]
        if len(found) == 64:
            break
    assert sorted(found) == sorted((tuple(ids), tuple(learnt)) for ids, learnt in windows)


def test_held_out_is_a_function_of_the_text_and_about_a_twentieth():
    held = [lora.held_out(f"question {i}") for i in range(4000)]
    assert held == [lora.held_out(f"question {i}") for i in range(4000)] and 140 < sum(held) < 260


def test_paragraphs_are_lines_whether_blank_ones_part_them_or_not(tmp_path):
    (tmp_path / "a.txt").write_text("One.\nTwo.\n\nThree.\n  \nFour.\n")
    assert list(lora.paragraphs(tmp_path / "a.txt")) == ["One.", "Two.", "Three.", "Four."]


def test_training_learns_keeps_adapters_and_leaves_the_base_alone(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(lora, "STATE_EVERY", 3)
    windows = lora.trace_windows(traces(), tokenizer, SMALL)
    whole = lora.train(
        lora.adapted(chat_model(), SMALL), windows, SMALL, tmp_path / "whole", lambda line: None
    )
    losses = [
        json.loads(line)["loss"] for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()
    ]
    assert losses[-1] < losses[0] and all(np.isfinite(losses))
    assert len(list((tmp_path / "whole").glob("kept_*.pt"))) == 2
    untouched = dict(chat_model().named_parameters())
    for name, p in whole.get_base_model().named_parameters():  # the base itself is not trained
        if "lora" not in name:
            assert torch.equal(p, untouched[name.replace(".base_layer", "")])
