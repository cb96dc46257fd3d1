"""Corpora that models write: interrupted anywhere, with any character in them, and each text once."""

# ruff: noqa: F401, F811 (fixtures that are shared)

import gzip
import json
from types import SimpleNamespace

import pytest
from test_real_models import llama, tokenizer

from lib import writing


@pytest.fixture
def quick(monkeypatch):
    for name, value in (("BATCH", 4), ("TRACE_TOKENS", 10), ("GENERAL_TOKENS", 10)):
        monkeypatch.setattr(writing, name, value)


class Stop(Exception):
    pass


def test_a_writing_that_breaks_off_within_a_batch_goes_on_to_the_same_file(tokenizer, tmp_path, quick, monkeypatch):
    whole, broken = tmp_path / "whole.jsonl", tmp_path / "broken.jsonl"
    writing.write_corpus("general", llama(), tokenizer, whole, 150)
    batches = [json.loads(line)["batch"] for line in whole.read_text(encoding="utf-8").split("\n")[:-1]]
    assert batches.count(2) == 4 and batches[-1] > 2
    before, seen = batches.index(2), []

    def full(*args, **options):  # the disk, say, with the second text of the third batch
        seen.append(args)
        if len(seen) == before + 2:
            raise Stop
        return json.dumps(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(writing, "json", SimpleNamespace(dumps=full, loads=json.loads))
        with pytest.raises(Stop):
            writing.write_corpus("general", llama(), tokenizer, broken, 150)
    assert [json.loads(line)["batch"] for line in broken.read_text(encoding="utf-8").split("\n")[:-1]] == batches[:before]
    writing.write_corpus("general", llama(), tokenizer, broken, 150)
    assert broken.read_bytes() == whole.read_bytes()


def test_line_separators_of_unicode_are_characters_like_others(tokenizer, tmp_path, quick, monkeypatch):
    texts = iter([f"One\u2028two\x85{i}\u2029 three." for i in range(100)])
    monkeypatch.setattr(writing, "sample", lambda model, tokenizer, prompts, *_, **__: [(next(texts), False, 5) for _ in prompts])
    file = tmp_path / "a.jsonl"
    assert writing.write_corpus("general", None, tokenizer, file, 20) == 20
    assert writing.write_corpus("general", None, tokenizer, file, 40) == 40
    writing.pack(file, tmp_path / "a.jsonl.gz")
    packed = [json.loads(line) for line in gzip.decompress((tmp_path / "a.jsonl.gz").read_bytes()).decode().split("\n")[:-1]]
    assert len(packed) == 8 and packed[7]["text"].endswith("One\u2028two\x857\u2029 three.")


def test_a_text_comes_once_and_its_tokens_count_once(tokenizer, tmp_path, quick, monkeypatch):
    said = iter([("a", True, 3), ("b", True, 4), ("a", True, 3), ("c", False, 5),
                 ("b", True, 4), ("d", True, 6), ("e", False, 7), ("e", False, 7)])
    monkeypatch.setattr(writing, "_prompts", lambda kind, number, seed: [("Say ", {"answer": number})] * 4)
    monkeypatch.setattr(writing, "sample", lambda model, tokenizer, prompts, *_, **__: [next(said) for _ in prompts])
    assert writing.write_corpus("trace", None, tokenizer, tmp_path / "a.jsonl", 20) == 3 + 4 + 5 + 6 + 7
    lines = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert [line["text"] for line in lines] == ["Say a<|im_end|>\n", "Say b<|im_end|>\n", "Say c", "Say d<|im_end|>\n", "Say e"]
    assert [line["batch"] for line in lines] == [0, 0, 0, 1, 1] == [line["answer"] for line in lines]


def test_a_seed_decides_the_texts_and_no_neighbour_changes_a_greedy_one(tokenizer):
    model, prompts = llama(), ["How many socks?", "Harbours and rivers. First, I count. So", "a"]
    drawn = writing.sample(model, tokenizer, prompts, 12, seed=3)
    assert drawn == writing.sample(model, tokenizer, prompts, 12, seed=3) != writing.sample(model, tokenizer, prompts, 12, seed=4)
    greedy = writing.sample(model, tokenizer, prompts, 12, temperature=0.0)
    assert greedy == writing.sample(model, tokenizer, prompts, 12, temperature=0.0, seed=9)
    assert greedy == writing.sample(model, tokenizer, prompts, 12, seed=5, top_k=1)  # of one token, the likeliest is drawn
    assert greedy == [writing.sample(model, tokenizer, [p], 12, temperature=0.0)[0] for p in prompts]  # padding is not read


def test_batches_of_prompts_follow_one_another(quick):
    for kind in ("trace", "general"):
        some = [text for number in range(5) for text, _ in writing._prompts(kind, number, 1)]
        assert len(set(some)) == len(some) == 20 and some[:4] != [text for text, _ in writing._prompts(kind, 0, 2)]
    assert all("answer" in facts and text.endswith("<|im_start|>assistant\n") for text, facts in writing._prompts("trace", 3, 1))
