"""Steering: against a loop with hooks written by hand, on a random model."""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from toys import toy_model, toy_pair, toy_store

from benchmarks.generate import margin
from lib.crosscoder.model import CrossCoder
from lib.distil import trials
from lib.distil.organism import build_tokenizer
from lib.models import decode as decode_module
from lib.models import decode as decoding
from lib.models import reader
from lib.settings import UserError
from lib.steering import generate, tasks
from lib.steering import steer as steering
from lib.text.puzzles import Question, first_words

LAYER, WIDTH, STEPS = 0, 16, 12
TASKS = [Question(5, "- 1"), *trials.puzzles(3, "test")]  # prompts of two lengths: the batch is padded


@pytest.fixture(scope="module")
def plain():
    model = toy_model(WIDTH, 5, layers=2).requires_grad_(False)
    # the rows that only round off the vocabulary
    model.get_input_embeddings().weight[len(build_tokenizer()) :] = 0
    return model


@pytest.fixture(scope="module")
def model(plain):
    return reader.wrap(plain, build_tokenizer())


@pytest.fixture(scope="module")
def pushes():
    return 3.0 * torch.randn(len(TASKS), WIDTH, generator=torch.Generator().manual_seed(0))


def opened(store, model, remote=False):
    """What ``influence`` needs of an open run."""
    pair = SimpleNamespace(remote=remote)
    return SimpleNamespace(store=store, models={"distilled": model}, medium=tasks.PUZZLES, pair=pair)


def by_hand(plain, task, push, end_of_thinking="", only_at=""):
    """One task at a time, without a cache, the whole sequence anew at each step."""
    tokenizer = build_tokenizer()
    ids = tokenizer(" ".join(trials.prompt_words(task)), return_tensors="pt")["input_ids"]
    first = ids.shape[1]
    for _ in range(STEPS):
        added, thinking = torch.zeros(1, ids.shape[1], WIDTH), True
        for position in range(first - 1, ids.shape[1]):
            word = tokenizer.convert_ids_to_tokens(int(ids[0, position]))
            thinking = thinking and word != end_of_thinking
            added[0, position] = push if thinking and only_at in ("", word) else 0
        hook = plain.model.layers[LAYER].register_forward_hook(
            lambda module, inputs, out, added=added: out + added
        )
        newest = plain(ids).logits[0, -1].argmax()
        hook.remove()
        if newest == tokenizer.eos_token_id:
            break
        ids = torch.cat([ids, newest[None, None]], dim=1)
    return ["think", ":", *tokenizer.convert_ids_to_tokens(ids[0, first:].tolist())]


def test_strength_zero_gives_the_tokens_of_the_unsteered_model(plain, model):
    found = generate.steered(model, LAYER, TASKS, torch.zeros(len(TASKS), WIDTH), STEPS)
    assert found == trials.generate(plain, build_tokenizer(), TASKS, max_new_tokens=STEPS)


def test_a_padded_batch_equals_one_at_a_time_by_hand(plain, model, pushes):
    together = generate.steered(model, LAYER, TASKS, pushes, STEPS)
    in_twos = generate.steered(model, LAYER, TASKS, pushes, STEPS, batch_size=2)
    assert together == in_twos == [by_hand(plain, task, push) for task, push in zip(TASKS, pushes)]
    assert together != generate.steered(model, LAYER, TASKS, 0 * pushes, STEPS)


@pytest.mark.parametrize(
    "how",
    [{}, {"temperature": 0.2, "seed": 1}, {"end_of_thinking": None}, {"place": "ends", "sentence_end": "="}],
)
def test_rows_that_end_leave_the_batch_and_nothing_changes(plain, model, pushes, monkeypatch, how):
    last = len(plain.model.layers) - 1
    stop = pushes.clone()
    stop[2] = 1e4 * plain.get_output_embeddings().weight[2]  # after the last layer this can only give <eos>
    whole = generate.steered(model, last, TASKS, stop, STEPS, **how)
    monkeypatch.setattr(decoding, "LEG", 3)
    monkeypatch.setattr(decoding, "ROOM", 2)
    seen, decode = [], decoding.decode

    def watched(step, *args, **kwargs):
        def leg(ids, mask, rows, cache, n):
            seen.append((rows.tolist(), ids.shape[1], cache.get_seq_length()))
            return step(ids, mask, rows, cache, n)

        return decode(leg, *args, **kwargs)

    monkeypatch.setattr(generate, "decode", watched)
    assert generate.steered(model, last, TASKS, stop, STEPS, **how) == whole
    if "place" not in how:
        assert any(rows == [0, 1, 3] for rows, _, _ in seen)
    # nothing is read twice
    assert len(seen) == STEPS / 3 and all(cached == length - 1 for _, length, cached in seen[1:])


def test_where_a_batch_differs_from_one_alone_the_two_top_logits_are_all_but_equal():
    """On a model with thoughts of 60 tokens and 40 rows: float addition in another order may tip a tie, and
    nothing else.
    """
    plain, tokenizer = toy_model(WIDTH, 7, layers=3).requires_grad_(False), build_tokenizer()
    plain.get_input_embeddings().weight[len(tokenizer) :] = 0
    tasks = [Question(5, "- 1"), *trials.puzzles(20, "test"), *trials.easy_questions(19)]
    pushes = torch.randn(len(tasks), WIDTH, generator=torch.Generator().manual_seed(1))
    wrapped = reader.wrap(plain, tokenizer)
    together = generate.steered(wrapped, LAYER, tasks, pushes, 60)
    for task, push, words in zip(tasks, pushes, together):
        alone = generate.steered(wrapped, LAYER, [task], push[None], 60)[0]
        if alone != words:
            assert margin(plain, tokenizer, LAYER, task, push, alone, words) < 1e-4


def test_margin_is_the_distance_of_the_two_top_logits(plain):
    tokenizer, push = build_tokenizer(), torch.zeros(WIDTH)
    words = by_hand(plain, TASKS[0], push)
    prompt = tokenizer(" ".join(trials.prompt_words(TASKS[0])), return_tensors="pt")["input_ids"]
    said = torch.tensor([tokenizer.convert_tokens_to_ids(words[2:5])])
    top = plain(torch.cat([prompt, said], dim=1)).logits[0, -1].topk(2).values
    assert margin(plain, tokenizer, LAYER, TASKS[0], push, words, [*words[:5], "x"]) == pytest.approx(
        float(top[0] - top[1]), abs=1e-5
    )
    assert margin(plain, tokenizer, LAYER, TASKS[0], push, words, words[:5], temperature=1.0) > 0


def test_steering_at_one_token_only(plain, model, pushes):
    word = by_hand(plain, TASKS[0], 0 * pushes[0])[3]  # a word that it says by itself
    found = generate.steered(model, LAYER, TASKS, pushes, STEPS, place="ends", sentence_end=word)
    assert found == [by_hand(plain, task, push, only_at=word) for task, push in zip(TASKS, pushes)]
    assert found != generate.steered(model, LAYER, TASKS, 0 * pushes, STEPS)
    with pytest.raises(UserError, match="sentence_end is 'nowhere'"):
        generate.steered(model, LAYER, TASKS, pushes, STEPS, place="ends", sentence_end="nowhere")


def test_samples_do_not_depend_on_the_batch_and_follow_the_softmax(model, pushes):
    together = generate.steered(model, LAYER, TASKS, pushes, STEPS, temperature=1.0, seed=3)
    alone = [
        generate.steered(model, LAYER, [task], push[None], STEPS, temperature=1.0, seed=3)[0]
        for task, push in zip(TASKS, pushes)
    ]
    assert together == alone
    assert together != generate.steered(model, LAYER, TASKS, pushes, STEPS, temperature=1.0, seed=4)
    logits = torch.log(torch.tensor([0.5, 0.3, 0.2])).expand(2, 3)
    noise = decode_module.TaskNoise(TASKS[:2], temperature=1.0, seed=0)
    drawn = torch.stack([noise(None, logits).argmax(-1) for _ in range(4000)])
    shares = torch.bincount(drawn.flatten(), minlength=3) / drawn.numel()
    assert shares.tolist() == pytest.approx([0.5, 0.3, 0.2], abs=0.02)
    cold = decode_module.TaskNoise(TASKS[:2], temperature=0.01, seed=0)
    assert (cold(None, logits).argmax(-1) == 0).all()


def test_nothing_is_added_once_thinking_has_ended(plain, model, pushes):
    free = generate.steered(model, LAYER, TASKS, pushes, STEPS, end_of_thinking=None)
    word = free[0][4]  # the third word that the first row generates: take it for the end of thinking
    found = generate.steered(model, LAYER, TASKS, pushes, STEPS, end_of_thinking=word)
    assert found == [by_hand(plain, task, push, word) for task, push in zip(TASKS, pushes)]
    with pytest.raises(UserError, match="not a token"):
        generate.steered(model, LAYER, TASKS, pushes, STEPS, end_of_thinking="</think>")


def test_a_row_that_ends_early_does_not_disturb_the_others(plain, model, pushes):
    last = len(plain.model.layers) - 1
    stop = pushes.clone()
    stop[1] = 1e4 * plain.get_output_embeddings().weight[2]  # after the last layer this can only give <eos>
    found = generate.steered(model, last, TASKS, stop, STEPS)
    assert found[1] == ["think", ":"]
    undisturbed = generate.steered(model, last, TASKS, pushes, STEPS)
    assert [found[i] for i in (0, 2, 3)] == [undisturbed[i] for i in (0, 2, 3)]


@pytest.mark.parametrize("how", [{}, {"temperature": 1.0, "seed": 3}, {"place": "ends", "sentence_end": "="}])
def test_remote_execution_path_gives_the_same(model, pushes, how):
    here = generate.steered(model, LAYER, TASKS[:2], pushes[:2], 4, **how)
    assert generate.steered(model, LAYER, TASKS[:2], pushes[:2], 4, remote="local", **how) == here


def test_a_remote_pair_steers_and_is_probed_alike(tmp_path):
    store, pair = toy_store(tmp_path), replace(toy_pair(tmp_path), remote="local")
    layer = store.layers["distilled"]
    here, away = (
        reader.open_models(p, ["distilled"])["distilled"] for p in (replace(pair, remote=False), pair)
    )
    push = steering.Direction(
        "deduction 3", "deduction", 9 * torch.randn(24, generator=torch.Generator().manual_seed(0))
    )
    made = [
        steering.Steering(m, layer, tmp_path / str(remote), "weights", 6, remote=remote).run(
            "report", TASKS, [(push, 1.0)]
        )
        for m, remote in ((here, False), (away, "local"))
    ]
    pd.testing.assert_frame_equal(*made)
    slopes = [
        steering.influence(opened(store, m, remote), ("reflection",), split="train", documents=3)[
            "reflection"
        ]
        for m, remote in ((here, False), (away, "local"))
    ]
    torch.testing.assert_close(*slopes)
    assert slopes[0].norm() > 0


def test_directions_have_the_norm_of_strength_one():
    crosscoder = CrossCoder((8, WIDTH), 6, k=2, scales=(0.5, 3.0))
    direction = steering.feature_direction(crosscoder, 4, norm=2.5, label="reflection")
    assert direction.name == "reflection 4"
    assert direction.vector.norm().item() == pytest.approx(2.5)
    row = crosscoder.rows("distilled", raw=True)[4]
    assert torch.nn.functional.cosine_similarity(direction.vector, row, dim=0).item() == pytest.approx(1)
    controls = steering.random_directions(3, WIDTH, norm=2.5)
    assert [c.vector.norm().item() for c in controls] == pytest.approx([2.5] * 3)
    assert [c.label for c in controls] == ["random"] * 3
    with pytest.raises(UserError, match="feature 6 does not exist: this crosscoder has features 0 to 5"):
        steering.feature_direction(crosscoder, 6, norm=2.5)


def test_transcripts_are_made_once(model, pushes, tmp_path):
    direction = steering.Direction("deduction 3", "deduction", pushes[0])
    first = steering.Steering(model, LAYER, tmp_path, weights="weights", max_new_tokens=STEPS)
    made = first.run("report", TASKS, [(direction, 0.5), (direction, -0.5)])
    assert first.generated == 3  # the unsteered model too
    again = steering.Steering(model, LAYER, tmp_path, weights="weights", max_new_tokens=STEPS)
    pd.testing.assert_frame_equal(again.run("report", TASKS, [(direction, 0.5), (direction, -0.5)]), made)
    assert again.generated == 0
    again.transcripts("report", TASKS[:2], direction, 0.5)  # other tasks
    assert again.generated == 1
    (tmp_path / "report" / "none.json").write_text("{")
    assert again.transcripts("report", TASKS) == first.transcripts("report", TASKS)
    retrained = steering.Steering(model, LAYER, tmp_path, weights="other weights", max_new_tokens=STEPS)
    retrained.transcripts("report", TASKS)
    assert retrained.generated == 1
    assert json.loads((tmp_path / "report" / "deduction-3_-0.500.json").read_text())["strength"] == -0.5
    with pytest.raises(UserError, match="strength"):
        first.transcripts("report", TASKS, direction, float("nan"))


def test_influence_is_the_slope_of_a_sentences_probability(tmp_path):
    store, pair = toy_store(tmp_path), toy_pair(tmp_path)
    plain, tokenizer = pair.load("distilled"), pair.tokenizer()
    layer, labels = store.layers["distilled"], ("reflection", "verification")
    run = opened(store, reader.wrap(plain, tokenizer))
    found = steering.influence(run, labels, split="train", documents=3)
    rows = np.flatnonzero((store.labels["kind"] == 1) & (store.split == 0))
    documents = np.random.default_rng(0).permutation(np.unique(store.documents[rows]))[:3]
    step, slopes, n = 0.05, dict.fromkeys(labels, 0.0), 0
    direction = torch.nn.functional.normalize(found["reflection"] + found["verification"], dim=0)
    for document in documents:
        mine = np.flatnonzero(store.documents == document)
        ids = torch.from_numpy(store.tokens[mine].astype(np.int64))[None]
        words = tokenizer.convert_ids_to_tokens(ids[0].tolist())
        start = words.index("think") + 1
        at = [i for i in np.flatnonzero(store.labels["next_label"][mine] >= 0) if i >= start]
        probability = {}
        for sign in (-1, 1):
            added = torch.zeros(1, len(mine), len(direction))
            added[0, start:] = sign * step * direction
            hook = plain.model.layers[layer].register_forward_hook(
                lambda module, inputs, out, added=added: out + added
            )
            probability[sign] = plain(ids).logits[0, at].softmax(-1)
            hook.remove()
        for label in labels:
            opening = sorted(set(tokenizer.convert_tokens_to_ids(list(first_words(label)))))
            slopes[label] += float((probability[1] - probability[-1])[:, opening].sum()) / (2 * step)
        n += len(at)
    for label in labels:
        assert float(found[label] @ direction) == pytest.approx(slopes[label] / n, rel=0.05, abs=1e-5)


def test_candidates_read_or_write_and_belong_to_one_label():
    crosscoder = CrossCoder((4, 4), 5, k=2)
    with torch.no_grad():
        crosscoder.W_dec[:, 4:] = torch.tensor(
            [[1.0, 0, 0, 0], [0, 2, 0, 0], [0, 0, 3, 0], [9, 0, 0, 0], [9, 0, 0, 0]]
        )
    features = pd.DataFrame(
        {
            "feature": range(5),
            "alive": [1, 1, 1, 0, 1],
            "nrn": [0.9, 0.8, 0.7, 0.9, 0.2],
            "auroc_reflection_choose": [0.6, 0.8, 0.6, 0.99, 1.0],
            "auroc_value_reflection_choose": [0.9, 0.5, 0.6, 0.5, 0.5],  # 0 knows it a token before its end
            "auroc_deduction_choose": [0.5, 0.7, 0.6, 0.99, 1.0],
            "auroc_value_deduction_choose": 0.5,
        }
    )
    gradients = {
        "reflection": torch.tensor([0.1, 0.1, 0.3, 0.0]),
        "deduction": torch.tensor([0.1, 0.2, -0.5, 0.0]),
    }
    # 3 is dead and 4 is the base's
    found = steering.candidates(features, crosscoder, gradients, norm=10.0, n=1)
    assert list(zip(found["label"], found["feature"], found["by"])) == [
        ("reflection", 0, "reads"),
        ("reflection", 2, "writes"),
        ("deduction", 1, "reads"),
    ]
    assert found["influence"].tolist() == pytest.approx([1.0, 3.0, 2.0])  # rows are brought to the norm
    assert found["times_random"].iloc[1] == pytest.approx(3.0 / (10 * 0.11**0.5 / 2))
    with pytest.raises(UserError, match="no AUROC of contrast"):
        steering.candidates(features, crosscoder, {"contrast": torch.ones(4)}, norm=1.0)


def test_easy_questions_are_distinct_and_begin_with_the_papers():
    questions = trials.easy_questions(50)
    assert questions[0] == Question(5, "- 1") and len(set(questions)) == 50
    with pytest.raises(UserError):
        trials.easy_questions(10_000)
