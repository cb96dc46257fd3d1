"""What is written depends on nothing that the study did not set."""

import json
from dataclasses import replace

import pytest
import torch
from toys import TEXT, chat_model, chat_tokenizer, toy_pair
from transformers import PreTrainedTokenizerFast

from lib.distil import trials, writing
from lib.models import decode
from lib.models.reader import open_models
from lib.settings import UserError
from lib.steering import generate

HOSTILE = {
    "repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "top_p": 0.5, "top_k": 3, "temperature": 0.3,
    "min_p": 0.2, "typical_p": 0.5, "do_sample": True, "num_beams": 3, "min_new_tokens": 20,
    "suppress_tokens": list(range(40, 200)), "begin_suppress_tokens": [7], "eos_token_id": [5, 6, 7, 8, 9],
    "sequence_bias": [[[40], -50.0]], "bad_words_ids": [[41]], "forced_eos_token_id": 9, "max_time": 1e-9,
    "exponential_decay_length_penalty": [1, 5.0], "watermarking_config": {"bias": 50.0}, "min_length": 90,
    "stop_strings": ["a"], "cache_implementation": "quantized", "num_return_sequences": 2,
    "token_healing": True,
    "max_new_tokens": 3, "encoder_repetition_penalty": 1.5, "epsilon_cutoff": 0.1, "penalty_alpha": 0.6,
}  # fmt: skip


def written(folder, hostile: dict):
    """All ways of writing, by one pair."""
    pair = toy_pair(folder, (16, 16))
    for source in pair.models.values():
        (source / "generation_config.json").write_text(json.dumps(hostile))
    model, tokenizer, tasks = pair.load("distilled"), pair.tokenizer(), trials.puzzles(3, "test")
    for name, value in hostile.items():
        setattr(model.generation_config, name, value)  # and what was set after it was loaded
    opened, push = open_models(pair, ["distilled"])["distilled"], torch.ones(3, 16)
    away = open_models(replace(pair, remote="local"), ["distilled"])["distilled"]
    torch.manual_seed(0)
    return {
        "greedy": trials.generate(model, tokenizer, tasks, max_new_tokens=30),
        "sampled": trials.generate(model, tokenizer, tasks, temperature=1.0, max_new_tokens=30),
        "texts": writing.sample(model, tokenizer, TEXT, 30),
        "steered": generate.steered(opened, 1, tasks, push, 8),
        "steered elsewhere": generate.steered(away, 1, tasks, push, 8, remote="local"),
    }


def test_no_default_of_a_checkpoint_reaches_what_is_written(tmp_path):
    plain = written(tmp_path / "a", {})
    assert written(tmp_path / "b", HOSTILE) == plain
    assert plain["steered"] == plain["steered elsewhere"]
    assert len({json.dumps(text) for text in plain.values()}) == 4


def by_hand(model, tokenizer, prompt, n, draw):
    ids, new = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)["input_ids"], []
    while len(new) < n and (token := draw(model(ids).logits[0, -1])) not in decode.ends_of(tokenizer):
        new.append(token)
        ids = torch.cat([ids, torch.tensor([[token]])], dim=1)
    return new


def test_sampling_is_from_the_softmax_of_the_likeliest():
    model, tokenizer = chat_model(1).requires_grad_(False), chat_tokenizer()
    greedy = decode.generate(model, tokenizer, TEXT, 12, add_special_tokens=False)
    assert greedy == [by_hand(model, tokenizer, text, 12, lambda x: int(x.argmax())) for text in TEXT]

    def draw(logits):
        kept = logits / 0.8
        kept[logits < logits.sort().values[-5]] = -torch.inf
        return int(kept.softmax(0).multinomial(1))

    torch.manual_seed(4)
    right = by_hand(model, tokenizer, TEXT[0], 12, draw)
    torch.manual_seed(4)
    how = {"temperature": 0.8, "top_k": 5, "add_special_tokens": False}
    assert decode.generate(model, tokenizer, TEXT[:1], 12, **how) == [right]


# --- ends ---------------------------------------------------------------------------------------------------

TURNS = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}MARK\n{% endfor %}"


@pytest.mark.parametrize(
    ("eos", "template", "expected"),
    [
        ("<|im_end|>", None, ["<|im_end|>"]),
        ("<|endoftext|>", None, ["<|endoftext|>", "<|im_end|>"]),  # a chat ends with its turn
        (
            "<|endoftext|>",
            TURNS.replace("MARK", "<|im_start|>"),
            ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        ),
        ("<|im_end|>", TURNS.replace("MARK", "."), ["<|im_end|>"]),  # that is text
        ("<|im_end|>", "{{ raise_exception('no') }}", ["<|im_end|>"]),
        (None, None, ["<|im_end|>"]),
    ],
)
def test_a_text_ends_where_tokenizer_or_template_say(eos, template, expected):
    content = chat_tokenizer().backend_tokenizer
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=content, eos_token=eos, chat_template=template)
    assert tokenizer.convert_ids_to_tokens(decode.ends_of(tokenizer)) == expected


def test_prompts_are_padded_also_by_a_tokenizer_that_cannot():
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=chat_tokenizer().backend_tokenizer)
    assert tokenizer.pad_token is None
    ids, mask = decode.padded(tokenizer, TEXT, False)
    assert [tokenizer.decode(row[seen == 1]) for row, seen in zip(ids, mask)] == TEXT
    assert (mask.diff(dim=1) >= 0).all() and mask[:, -1].all() and mask.sum(1).max() == ids.shape[1]


# --- contexts -----------------------------------------------------------------------------------------------


def test_what_does_not_fit_in_the_context_is_refused_before_it_is_written():
    model, tokenizer, how = chat_model(), chat_tokenizer(), {"add_special_tokens": False}
    length = decode.padded(tokenizer, TEXT, False)[0].shape[1]
    model.config.max_position_embeddings = length + 5
    assert len(decode.generate(model, tokenizer, TEXT, 5, **how)) == len(TEXT)
    with pytest.raises(
        UserError, match=f"max_new_tokens is 6 and .* {length} tokens, .* context is {length + 5}"
    ):
        decode.generate(model, tokenizer, TEXT, 6, **how)
    # a text that is written for a corpus ends there
    assert max(size for *_, size in writing.sample(model, tokenizer, TEXT, 640, top_k=1)) <= 5
    model.config.max_position_embeddings = length
    with pytest.raises(UserError, match="together they must fit in it"):
        writing.sample(model, tokenizer, TEXT, 640)
