"""Steering reaches exactly the tokens that it should: the residual stream after the layer, less what the
layer gave, is the vector there and nothing elsewhere, for the prompt and for each token that is written.
"""

import pytest
import torch
from toys import GEMMA2, LINEAR, toy_model, toy_of

from lib.distil import trials
from lib.distil.organism import build_tokenizer
from lib.models import decode as decoding
from lib.models.pairs import decoder_layers
from lib.models.reader import wrap
from lib.steering import generate
from lib.text.puzzles import Question

LAYER, STEPS, WIDTH = 1, 9, 16
TASKS = [Question(5, "- 1"), *trials.puzzles(3, "test")]  # prompts of unlike lengths
TOKENIZER = build_tokenizer()


@pytest.fixture(scope="module", params=["Qwen2", "Gemma2", "GPT2", "Qwen3Next"])
def model(request):
    made = {
        "Qwen2": lambda: toy_model(WIDTH, 4),
        "Gemma2": lambda: toy_of("Gemma2ForCausalLM", 4, **GEMMA2 | {"sliding_window": 5}),
        "GPT2": lambda: toy_of("GPT2LMHeadModel", 4),
        "Qwen3Next": lambda: toy_of("Qwen3NextForCausalLM", 4, **LINEAR),
    }[request.param]().requires_grad_(False)
    made.get_input_embeddings().weight[len(TOKENIZER) :] = 0
    return made


def watched(model, run):
    """(what ``run`` gives; for each row of the batch {position: what was added there}, positions counted from
    the first token of the text, each of them once), from every forward in which steering took part."""
    blocks, forwards = decoder_layers(model), []
    given = blocks[LAYER].register_forward_hook(lambda module, args, out: forwards.append([out.clone()]))
    # after the hook of steering, which is registered later
    taken = blocks[LAYER + 1].register_forward_pre_hook(
        lambda module, args, kwargs: forwards[-1].append((args or kwargs["hidden_states"])[0]),
        with_kwargs=True,
    )
    try:
        return run(), [after - before for before, after in forwards]
    finally:
        given.remove()
        taken.remove()


def expected(ids, mask, start, place, end, stop):
    """bool [rows, positions], by a loop over the tokens that each row has read."""
    where = torch.zeros(ids.shape, dtype=torch.bool)
    for row in range(len(ids)):
        thinking = True
        for i in range(ids.shape[1]):
            prompt = i < start - 1
            thinking = thinking and not (i >= start and ids[row, i] == end)
            where[row, i] = (
                mask[row, i] == 1
                and {
                    "prompt": prompt,
                    "all": True,
                    "thinking": thinking and not prompt,
                    "ends": thinking and not prompt and int(ids[row, i]) == stop,
                }[place]
            )
    return where


@pytest.mark.parametrize("place", ["prompt", "thinking", "all", "ends"])
def test_the_vector_is_added_there_and_nowhere_else(model, place, monkeypatch):
    monkeypatch.setattr(decoding, "LEG", 4)
    wrapped, vectors = wrap(model, TOKENIZER), 3 * torch.randn(len(TASKS), WIDTH)
    # the first word of the second text is a sentence's end, and a later one of the first ends thinking
    plain = generate.steered(wrapped, LAYER, TASKS, vectors, STEPS, end_of_thinking=None, place=place)
    stop = plain[1][2]
    end = next((word for word in plain[0][4:] if word != stop), "done")
    how = {"end_of_thinking": end, "sentence_end": stop, "place": place}
    words, added = watched(model, lambda: generate.steered(wrapped, LAYER, TASKS, vectors, STEPS, **how))

    prompts = [" ".join(trials.prompt_words(task)) for task in TASKS]
    ids, mask = decoding.padded(TOKENIZER, prompts, True)
    start = ids.shape[1]
    assert len(set(mask.sum(1).tolist())) > 1 and added[0].shape[1] == start
    assert len(added) == STEPS and all(x.shape[1] == 1 for x in added[1:])  # with a cache: each token once
    new = torch.tensor([TOKENIZER.convert_tokens_to_ids(row[2:]) for row in words])
    assert new.shape == (len(TASKS), STEPS)  # no row has ended
    ids = torch.cat([ids, new[:, :-1]], dim=1)  # the last one is not read
    mask = torch.cat([mask, torch.ones(len(TASKS), STEPS - 1)], dim=1)
    where = expected(ids, mask, start, place, *TOKENIZER.convert_tokens_to_ids([end, stop]))
    right = where[..., None] * vectors[:, None]
    torch.testing.assert_close(torch.cat(added, dim=1) * mask[..., None], right, atol=1e-4, rtol=1e-4)
    assert where.any() and (place == "all" or not where[mask == 1].all())

    # without a cache and without padding: one text at a time, all of it at once, the same vectors added
    for row in range(len(TASKS)):
        text, push = ids[row, mask[row] == 1], right[row, mask[row] == 1]
        hook = decoder_layers(model)[LAYER].register_forward_hook(lambda module, args, out, p=push: out + p)
        alone = model(text[None], use_cache=False).logits[0]
        hook.remove()
        likeliest = alone[-STEPS:].topk(2)
        sure = likeliest.values[:, 0] - likeliest.values[:, 1] > 1e-3  # no tie that rounding decides
        assert sure.any() and torch.equal(likeliest.indices[sure, 0], new[row][sure])
