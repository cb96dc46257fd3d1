"""The appraisal as a whole: what it measures on, and that nothing is counted twice."""

import json

import pytest
import torch
from torch.nn.functional import cross_entropy
from toys import chat_model

from lib.distil import adapters as lora
from lib.models.pairs import Pair
from lib.settings import UserError
from lib.study import appraisal
from lib.text.chat import encode_trace
from lib.text.files import read_traces
from lib.text.questions import Question


@pytest.fixture
def appraise(tokenizer, tmp_path, monkeypatch):
    for name, seed in (("base", 0), ("distilled", 1)):
        chat_model(seed).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    pair = Pair("toy", {name: tmp_path / name for name in ("base", "distilled")})
    said = ("It is 5.\u2028", True, 4)
    monkeypatch.setattr(appraisal, "answer", lambda model, tokenizer, questions: [said] * len(questions))
    entries = [
        {"question": f"How many socks are in {i}?", "thinking": "First, I count. Wait.", "answer": f"{i}."}
        for i in range(400)
    ]
    (tmp_path / "traces.jsonl").write_text("".join(json.dumps(e) + "\n" for e in entries))
    (tmp_path / "text.txt").write_text("".join(f"Harbours and rivers, {i} of them.\n" for i in range(3000)))
    return lambda *files: appraisal.appraise(pair, 6, *map(str, files), folder=tmp_path / "toy")


def test_losses_are_of_what_is_held_out_and_count_each_token_once(appraise, tokenizer, tmp_path):
    """Little is held out here: windows that were repeated up to the limit would shrink the interval."""
    found, _ = appraise(tmp_path / "traces.jsonl", tmp_path / "text.txt")
    kept = [t for t in read_traces(tmp_path / "traces.jsonl") if lora.held_out(t.question)]
    learnt = sum(sum(encode_trace(t, tokenizer)[1]) for t in kept)
    text = "".join(line + "\n" for line in lora.paragraphs(tmp_path / "text.txt") if lora.held_out(line))
    read = len(tokenizer(text, add_special_tokens=False)["input_ids"])
    windows = -(-read // 512)
    assert 3 < len(kept) < 60 and 1 < windows < 60
    for name in ("base", "distilled"):
        assert found[name]["loss_traces"]["n"] == learnt
        assert found[name]["loss_text"]["n"] == read - windows  # a first token has no loss
    assert found["base"]["loss_text"]["value"] != found["distilled"]["loss_text"]["value"]


def test_a_model_that_was_appraised_is_not_asked_again(appraise, tmp_path, monkeypatch):
    first = appraise()
    monkeypatch.setattr(appraisal, "answer", lambda *_: pytest.fail("it was asked before"))
    assert json.dumps(appraise()) == json.dumps(first) and {"base", "distilled"} == first[0].keys()
    rows = (tmp_path / "toy" / "transcripts" / "base.jsonl").read_text().split("\n")[:-1]
    assert (
        len({json.loads(row)["question"] for row in rows}) == 6
        and json.loads(rows[0])["said"] == "It is 5.\u2028"
    )


def test_nothing_to_measure_on_is_said(tokenizer):
    with pytest.raises(UserError, match="nothing to measure the loss on"):
        appraisal.held_out_loss(chat_model(), [([5], [True]), ([5, 6], [True, False])])


def test_shares_are_hits_of_all():
    questions = [Question(str(i), 4, 0) for i in range(8)]
    said = [("<think>a</think> 4", True, 2)] * 3 + [("4", True, 1)] * 2 + [("5", False, 9)] * 3
    found = appraisal.measures(questions, said)
    assert [found[name]["value"] for name in ("thinks", "closes", "ends", "accuracy")] == [
        3 / 8,
        3 / 8,
        5 / 8,
        5 / 8,
    ]
    for name in ("thinks", "closes", "ends", "accuracy"):
        assert 0 <= found[name]["ci"][0] < found[name]["value"] < found[name]["ci"][1] <= 1
    assert found["tokens_per_answer"]["value"] == (6 + 2 + 27) / 8 and found["waits_per_1000"]["value"] == 0


def test_measures_of_answers_by_hand():
    questions = [Question("a", 12, 0), Question("b", 5, 0), Question("c", 7, 0), Question("d", None, -1)]
    said = [
        ("<think>\nWait, 3? wait.\n</think>\n\nIt is \\boxed{12}, not 4.", True, 10),
        ("It is 5.", True, 4),
        ("<think>\nIt is 7", False, 20),
        ("Awaited.", True, 6),
    ]
    found = appraisal.measures(questions, said)
    values = {name: m["value"] for name, m in found.items()}
    # 7 stands in a thought that never closed
    assert values == {
        "thinks": 0.5,
        "closes": 0.25,
        "ends": 0.75,
        "accuracy": pytest.approx(2 / 3),
        "waits_per_1000": pytest.approx(1000 * 2 / 40),
        "tokens_per_answer": 10,
    }
    assert found["accuracy"]["n"] == 3 and found["thinks"]["n"] == 4 and found["waits_per_1000"]["n"] == 40


def test_held_out_loss_is_the_mean_over_learnt_tokens(tokenizer):
    model, windows = (
        chat_model(),
        [([5, 9, 30, 31, 7], [False, False, True, True, True]), ([8, 9], [True, True]), ([3], [True])],
    )
    total, n = 0.0, 0
    for ids, learnt in windows[:2]:
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0]
        for i in range(1, len(ids)):
            if learnt[i]:
                total, n = total + float(cross_entropy(logits[i - 1], torch.tensor(ids[i]))), n + 1
    found = appraisal.held_out_loss(model, windows)
    assert (
        found["n"] == n == 4
        and found["value"] == pytest.approx(total / n, rel=1e-5)
        and found["ci"][0] <= found["value"] <= found["ci"][1]
    )


def test_an_appraisal_goes_on_only_with_the_same_questions(tmp_path):
    questions = [Question("a", 1, 0), Question("b", 2, 0)]
    file = tmp_path / "base.jsonl"
    assert not appraisal.asked_before(file, questions)
    file.write_text('{"question": "a"}\n{"question": "b"}\n')
    assert appraisal.asked_before(file, questions) and not appraisal.asked_before(file, questions[:1])


def test_the_committed_answers_are_read():
    measured, transcripts = appraisal.appraise("smol")
    assert list(measured) == ["base", "distilled", "null_a"] and len(transcripts["distilled"]) == 60
    assert measured["distilled"]["loss_traces"]["value"] < measured["base"]["loss_traces"]["value"]
    assert len(appraisal.plot_measures(measured).data) == 3
