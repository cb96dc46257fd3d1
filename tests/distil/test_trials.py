"""Decoding and reading: forbidden sentences do not appear, padding changes nothing, probabilities are
probabilities.
"""

import pytest
import torch

from lib.distil import organism as distill
from lib.distil import trials
from lib.models import decode as decoding
from lib.settings import ROOT
from lib.text.puzzles import Question, first_words


@pytest.fixture(scope="module")
def toy():
    tokenizer = distill.build_tokenizer()
    recipe = distill.Recipe(width=32, layers=2, heads=2, kv_heads=1, mlp=32)
    return distill.build_model(recipe, len(tokenizer)).eval(), tokenizer


def test_puzzles_are_distinct_and_reproducible():
    tasks = trials.puzzles(50, "test", seed=3)
    assert (
        len(set(tasks)) == 50
        and tasks == trials.puzzles(50, "test", seed=3)
        and tasks != trials.puzzles(50, "test", seed=4)
    )
    assert {t.split() for t in tasks} == {"test"}


def test_prompt_words():
    assert trials.prompt_words(Question(5, "- 1"), "direct") == ["what", "is", "5", "- 1", "?", "answer", ":"]
    with pytest.raises(ValueError, match="unknown mode"):
        trials.prompt_words(Question(5, "- 1"), "loud")


def test_forbidden_words_cannot_open_a_sentence(toy):
    _, tokenizer = toy
    stop, comma = tokenizer.convert_tokens_to_ids([".", ","])
    processor = trials.ForbidCategories(tokenizer, ["contrast", "deduction"])
    scores = processor(torch.tensor([[5, stop], [5, comma]]), torch.zeros(2, len(tokenizer)))
    banned = set(tokenizer.convert_tokens_to_ids([*first_words("contrast"), *first_words("deduction")]))
    assert {i for i, s in enumerate(scores[0].tolist()) if s == -float("inf")} == banned
    assert torch.isfinite(scores[1]).all()  # in the middle of a sentence nothing is forbidden


def test_batches_and_padding_do_not_change_greedy_transcripts(toy):
    model, tokenizer = toy
    tasks = [*trials.puzzles(3, "test"), Question(5, "- 1")]  # prompts of different lengths: left padding
    together = trials.generate(model, tokenizer, tasks, max_new_tokens=12)
    alone = [trials.generate(model, tokenizer, [t], max_new_tokens=12)[0] for t in tasks]
    assert together == alone and all(t[:2] == ["think", ":"] for t in together)


def test_sampling_is_seeded(toy):
    model, tokenizer = toy
    tasks = trials.puzzles(2, "test")
    a, b, c = (
        trials.generate(model, tokenizer, tasks, temperature=1.0, seed=s, max_new_tokens=10)
        for s in (0, 0, 1)
    )
    assert a == b != c


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_tokens_are_those_of_transformers_own_generate(toy, monkeypatch, temperature):
    model, tokenizer = toy[0], distill.build_tokenizer()
    monkeypatch.setattr(decoding, "LEG", 4)
    monkeypatch.setattr(decoding, "ROOM", 3)
    tasks = [*trials.puzzles(3, "test"), Question(5, "- 1")]
    batch = tokenizer(
        [" ".join(trials.prompt_words(t)) for t in tasks],
        return_tensors="pt",
        padding=True,
        padding_side="left",
    )
    plain = {
        "input_ids": batch["input_ids"],
        "attention_mask": batch["attention_mask"],
        "max_new_tokens": 40,
        "pad_token_id": 0,
    }
    sampling = (
        {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        if temperature
        else {"do_sample": False}
    )
    torch.manual_seed(0)
    end = int(model.generate(**plain, **sampling)[0, batch["input_ids"].shape[1] + 5])
    # a word that a row says: rows leave at different times
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)
    torch.manual_seed(0)
    expected = model.generate(**plain, eos_token_id=end, **sampling)[
        :, batch["input_ids"].shape[1] :
    ].tolist()
    found = trials.generate(model, tokenizer, tasks, temperature=temperature, max_new_tokens=40)
    expected = [row[: row.index(end)] if end in row else row for row in expected]
    assert found == [trials.transcript(tokenizer, row) for row in expected]
    assert len({len(row) for row in found}) > 1


def test_reading_gives_a_row_per_task():
    tasks = [Question(5, "- 1"), Question(5, "- 1")]
    table = trials.transcript_table(
        tasks,
        [
            ["think", ":", "start", ":", "5", "- 1", "=", "4", ".", "done", ".", "answer", ":", "4", "."],
            ["so"],
        ],
    )
    assert table.correct.tolist() == [True, False] and table.chain_correct.tolist() == [True, False]
    assert table.thinking_tokens[0] == 9 and table.closed.tolist() == [True, False]
    with pytest.raises(ValueError):
        trials.transcript_table(tasks, [["so"]])


def test_reflection_probability_is_the_mass_of_its_first_words(toy):
    model, tokenizer = toy
    tasks = trials.puzzles(6, "validation")
    steps = trials.reflection_probability(model, tokenizer, tasks)
    assert steps.p_reflection.between(0, 1).all() and steps.error.any() and not steps.error.all()
    assert steps.groupby("task").size().between(3, 9).all()  # three steps per candidate tried

    class AlwaysWait(torch.nn.Module):
        def forward(self, ids):
            logits = torch.full((*ids.shape, len(tokenizer)), -30.0)
            logits[..., tokenizer.convert_tokens_to_ids("wait")] = 30.0
            return type("Out", (), {"logits": logits})

    assert trials.reflection_probability(AlwaysWait(), tokenizer, tasks).p_reflection.min() > 0.999


def test_a_wrong_equation_in_a_transcript_is_marked():
    text = "think : first try 9 . start : 9 *_4 = 13 . wait , 9 *_4 is 17 . so 17 +_1 gives 18 . done ."
    lines = trials.labelled([word.replace("_", " ") for word in text.split(" ")])  # an operation is one word
    assert [wrong for _, _, wrong in lines] == [False, False, True, False, False, False]


def test_the_base_tells_right_equations_from_wrong_ones(toy):
    base = distill.load_shipped("base", ROOT / "data" / "pairs" / "tiny")
    assert sum(trials.right_verdicts(base, toy[1], 100)) >= 95
    assert 20 < sum(trials.right_verdicts(toy[0], toy[1], 100)) < 80, "an untrained model guesses"
