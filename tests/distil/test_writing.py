"""Corpora that models write: interrupted anywhere, with any character in them, and each text once."""

import gzip
import json
from itertools import islice
from types import SimpleNamespace

import pytest
import torch
from toys import chat_model

from lib.distil import writing


@pytest.fixture
def quick(monkeypatch):
    for name, value in (("BATCH", 4), ("TRACE_TOKENS", 10), ("GENERAL_TOKENS", 10)):
        monkeypatch.setattr(writing, name, value)


class Stop(Exception):
    pass


def test_a_writing_that_breaks_off_within_a_batch_goes_on_to_the_same_file(
    tokenizer, tmp_path, quick, monkeypatch
):
    whole, broken = tmp_path / "whole.jsonl", tmp_path / "broken.jsonl"
    writing.write_corpus("general", chat_model(), tokenizer, whole, 150)
    batches = [json.loads(line)["batch"] for line in whole.read_text(encoding="utf-8").split("\n")[:-1]]
    assert batches.count(2) == 4 and batches[-1] > 2
    before, seen = batches.index(2), []

    def full(entry, **options):  # the disk, say, with the second text of the third batch
        seen.append(entry["batch"])
        if seen.count(2) == 2:
            raise Stop
        return json.dumps(entry, **options)

    with monkeypatch.context() as patch:
        patch.setattr(writing, "json", SimpleNamespace(dumps=full, loads=json.loads))
        with pytest.raises(Stop):
            writing.write_corpus("general", chat_model(), tokenizer, broken, 150)
    assert [
        json.loads(line)["batch"] for line in broken.read_text(encoding="utf-8").split("\n")[:-1]
    ] == batches[:before]
    writing.write_corpus("general", chat_model(), tokenizer, broken, 150)
    assert broken.read_bytes() == whole.read_bytes()


def test_line_separators_of_unicode_are_characters_like_others(tokenizer, tmp_path, quick, monkeypatch):
    texts = iter([f"One\u2028two\x85{i}\u2029 three." for i in range(100)])
    monkeypatch.setattr(
        writing,
        "sample",
        lambda model, tokenizer, prompts, *_, **__: [(next(texts), False, 5) for _ in prompts],
    )
    file = tmp_path / "a.jsonl"
    assert writing.write_corpus("general", None, tokenizer, file, 20) == 20
    assert writing.write_corpus("general", None, tokenizer, file, 40) == 40
    writing.pack(file, tmp_path / "a.jsonl.gz")
    packed = [
        json.loads(line)
        for line in gzip.decompress((tmp_path / "a.jsonl.gz").read_bytes()).decode().split("\n")[:-1]
    ]
    assert len(packed) == 8 and packed[7]["text"].endswith("One\u2028two\x857\u2029 three.")


def test_a_text_comes_once_and_its_tokens_count_once(tokenizer, tmp_path, quick, monkeypatch):
    said = iter(
        [
            ("a", True, 3),
            ("b", True, 4),
            ("a", True, 3),
            ("c", False, 5),
            ("b", True, 4),
            ("d", True, 6),
            ("e", False, 7),
            ("e", False, 7),
        ]
    )
    monkeypatch.setattr(writing, "_prompts", lambda kind, number, seed: [("Say ", {"answer": number})] * 4)
    monkeypatch.setattr(
        writing, "sample", lambda model, tokenizer, prompts, *_, **__: [next(said) for _ in prompts]
    )
    assert writing.write_corpus("trace", None, tokenizer, tmp_path / "a.jsonl", 20) == 3 + 4 + 5 + 6 + 7
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [line["text"] for line in lines] == [
        "Say a<|im_end|>\n",
        "Say b<|im_end|>\n",
        "Say c",
        "Say d<|im_end|>\n",
        "Say e",
    ]
    assert [line["batch"] for line in lines] == [0, 0, 0, 1, 1] == [line["answer"] for line in lines]


def test_a_seed_decides_the_texts_and_no_neighbour_changes_a_greedy_one(tokenizer):
    model, prompts = chat_model(), ["How many socks?", "Harbours and rivers. First, I count. So", "a"]
    drawn = writing.sample(model, tokenizer, prompts, 12, seed=3)
    assert (
        drawn
        == writing.sample(model, tokenizer, prompts, 12, seed=3)
        != writing.sample(model, tokenizer, prompts, 12, seed=4)
    )
    greedy = writing.sample(model, tokenizer, prompts, 12, temperature=0.0)
    assert greedy == writing.sample(model, tokenizer, prompts, 12, temperature=0.0, seed=9)
    # of one token, the likeliest is drawn
    assert greedy == writing.sample(model, tokenizer, prompts, 12, seed=5, top_k=1)
    # padding is not read
    assert greedy == [writing.sample(model, tokenizer, [p], 12, temperature=0.0)[0] for p in prompts]


def test_batches_of_prompts_follow_one_another(quick):
    for kind in ("trace", "general"):
        some = [text for number in range(5) for text, _ in writing._prompts(kind, number, 1)]
        assert len(set(some)) == len(some) == 20 and some[:4] != [
            text for text, _ in writing._prompts(kind, 0, 2)
        ]
    assert all(
        "answer" in facts and text.endswith("<|im_start|>assistant\n")
        for text, facts in writing._prompts("trace", 3, 1)
    )


def test_a_corpus_is_the_same_whether_it_was_interrupted_or_not(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "BATCH", 4)
    monkeypatch.setattr(writing, "TRACE_TOKENS", 12)
    monkeypatch.setattr(writing, "GENERAL_TOKENS", 12)
    for kind in ("trace", "general"):
        whole, parts = tmp_path / f"{kind}.jsonl", tmp_path / f"{kind}_parts.jsonl"
        assert writing.write_corpus(kind, chat_model(), tokenizer, whole, 120) >= 120
        for tokens in (30, 120):
            writing.write_corpus(kind, chat_model(), tokenizer, parts, tokens)
        assert whole.read_text() == parts.read_text()
        lines = [json.loads(line) for line in whole.read_text().splitlines()]
        assert len({line["text"] for line in lines}) == len(lines)
        assert all(("answer" in line) == (kind == "trace") for line in lines)
        if kind == "trace":
            assert all(
                line["text"].startswith("<|im_start|>user\n") and "<|im_start|>assistant\n" in line["text"]
                for line in lines
            )


def test_what_is_packed_is_the_same_to_the_byte(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "Wait – no.", "batch": 3}\n')
    found = []
    for _ in range(2):
        writing.pack(tmp_path / "a.jsonl", tmp_path / "a.jsonl.gz")
        found.append((tmp_path / "a.jsonl.gz").read_bytes())
        (tmp_path / "a.jsonl.gz").unlink()
    assert found[0] == found[1] and gzip.decompress(found[0]).decode() == '{"text": "Wait – no."}\n'


def test_greedy_writing_is_what_the_model_finds_likeliest(tokenizer):
    model, prompt = chat_model(), "How many socks"
    ((text, ended, size),) = writing.sample(model, tokenizer, [prompt], 6, temperature=0.0)
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    for _ in range(6):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == 2:
            break
    said = ids[len(tokenizer(prompt, add_special_tokens=False)["input_ids"]) :]
    said = said[: said.index(2)] if 2 in said else said
    assert text == tokenizer.decode(said) and size == len(said) and ended == (size < 6)


def test_openings_come_round_only_when_all_were_there():
    total = len(writing.OPENINGS) * len(writing.SUBJECTS)
    some = list(islice(writing.openings(1), total + 1))
    assert (
        len(set(some[:total])) == total
        and some[total] in some[:total]
        and some[:5] != list(islice(writing.openings(2), 5))
    )


def test_seeds_of_batches_differ():
    assert writing.hash_of(0, "trace", 1) == writing.hash_of(0, "trace", 1) != writing.hash_of(0, "trace", 2)
