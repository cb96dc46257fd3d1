"""The playground: the same tokens as the experiments' generation, at the positions that were asked for; a
widget
that stops and never raises.
"""

import asyncio
import html
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from toys import chat_model, chat_tokenizer, toy_model

from lib.crosscoder.model import CrossCoder
from lib.distil import trials
from lib.distil.organism import build_tokenizer
from lib.models import reader
from lib.settings import UserError
from lib.steering import generate
from lib.steering import playground as playground_module
from lib.steering import steer as steering
from lib.steering import tasks as media
from lib.steering.playground import FreeText, Playground, puzzle_of
from lib.text import puzzles, questions

LAYER, WIDTH, STEPS = 0, 16, 14
EASY, PUZZLE = puzzles.Question(5, "- 1"), trials.puzzles(1, "test")[0]


def opened(plain, tokenizer, medium, **changes):
    store = SimpleNamespace(
        layers={"base": 1, "distilled": LAYER},
        widths={"base": WIDTH, "distilled": WIDTH},
        mean_norms={"base": 2.0, "distilled": 5.0},
    )
    models = {name: reader.wrap(plain, tokenizer) for name in ("base", "distilled")}
    crosscoder = CrossCoder((WIDTH, WIDTH), 6, k=2)
    run = SimpleNamespace(
        models=models,
        store=store,
        crosscoder=crosscoder,
        chosen={"reflection": 4, "deduction": 1},
        medium=medium,
        pair=SimpleNamespace(remote=False),
    )
    return Playground(run, **{"max_new_tokens": STEPS} | changes)


@pytest.fixture(scope="module")
def plain():
    model = toy_model(WIDTH, 5, layers=2).requires_grad_(False)
    # the rows that only round off the vocabulary
    model.get_input_embeddings().weight[len(build_tokenizer()) :] = 0
    return model


@pytest.fixture(scope="module")
def playground(plain):
    return opened(plain, build_tokenizer(), media.PUZZLES)


@pytest.fixture(scope="module")
def chat_playground():
    # its vocabulary has no "</"
    return opened(chat_model(), chat_tokenizer(), replace(media.CHAT, end_of_thinking="<"))


def by_hand(plain, layer, task, push, where, end):
    """Greedy, the whole sequence anew at each step; the push at the positions that ``where`` names."""
    tokenizer = build_tokenizer()
    ids = tokenizer(" ".join(trials.prompt_words(task)), return_tensors="pt")["input_ids"]
    first = ids.shape[1]
    for _ in range(STEPS):
        words = tokenizer.convert_ids_to_tokens(ids[0].tolist())
        closed = next((i for i in range(first, len(words)) if words[i] == end), len(words))
        steered = {
            "prompt": range(first - 1),
            "thinking": range(first - 1, closed),
            "all": range(len(words)),
        }[where]
        added = torch.zeros(1, len(words), WIDTH)
        added[0, list(steered)] = push
        hook = plain.model.layers[layer].register_forward_hook(
            lambda module, inputs, out, added=added: out + added
        )
        newest = plain(ids).logits[0, -1].argmax()
        hook.remove()
        if newest == tokenizer.eos_token_id:
            break
        ids = torch.cat([ids, newest[None, None]], dim=1)
    return ["think", ":", *tokenizer.convert_ids_to_tokens(ids[0, first:].tolist())]


# --- the same as the experiments ----------------------------------------------------------------------------


@pytest.mark.parametrize("where", generate.STEERED)
def test_positions_against_a_loop_by_hand_padding_untouched(plain, playground, where):
    tasks = [EASY, PUZZLE]  # prompts of two lengths: the first is padded
    pushes = 4.0 * torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(1))
    model = playground.models["distilled"]
    free = generate.steered(model, LAYER, tasks, pushes, STEPS, end_of_thinking=None)
    end = free[0][4]  # a word that the first row says while it thinks: take it for the end
    found = generate.steered(model, LAYER, tasks, pushes, STEPS, end_of_thinking=end, place=where)
    assert found == [by_hand(plain, LAYER, task, push, where, end) for task, push in zip(tasks, pushes)]
    assert found != generate.steered(model, LAYER, tasks, 0 * pushes, STEPS)


def test_each_place_is_another_place(playground):
    model, tasks = playground.models["distilled"], trials.puzzles(12, "test")
    pushes = torch.randn(12, WIDTH, generator=torch.Generator().manual_seed(1))
    said = {
        where: generate.steered(model, LAYER, tasks, pushes, STEPS, end_of_thinking=None, place=where)
        for where in generate.STEERED
    }
    assert said["prompt"] != said["thinking"] != said["all"] != said["prompt"]
    # above the last layer nobody reads the prompt's earlier positions any more
    last = {
        where: generate.steered(model, 1, tasks, pushes, STEPS, end_of_thinking=None, place=where)
        for where in generate.STEERED
    }
    assert (
        last["prompt"] == generate.steered(model, 1, tasks, 0 * pushes, STEPS)
        and last["all"] == last["thinking"] != last["prompt"]
    )
    with pytest.raises(UserError, match="where is 'answer': it must be one of prompt, thinking, all"):
        playground.compare(PUZZLE, 3, 1.0, "answer")


@pytest.mark.parametrize("model", ["base", "distilled"])
@pytest.mark.parametrize("task", [EASY, PUZZLE])
def test_both_texts_are_those_of_the_experiments(playground, tmp_path, task, model):
    direction = steering.feature_direction(
        playground.crosscoder, 4, playground.store.mean_norms[model], "reflection", model
    )
    layer = playground.store.layers[model]
    experiment = steering.Steering(
        playground.models[model], layer, tmp_path, "weights", STEPS, temperature=1.0, seed=3
    )
    found = playground.compare(task, "reflection", -1.5, model=model, seed=3)
    assert found.transcripts["unsteered"] == experiment.transcripts("report", [task])[0]
    assert found.transcripts["steered"] == experiment.transcripts("report", [task], direction, -1.5)[0]
    assert found.transcripts["steered"] != found.transcripts["unsteered"]
    assert (
        found.transcripts["steered"]
        != playground.compare(task, "reflection", -1.5, model=model, seed=4).transcripts["steered"]
    )


@pytest.mark.parametrize("where", generate.STEERED)
def test_strength_zero_is_unsteered(plain, playground, where):
    found = playground.compare(EASY, 2, 0.0, where).transcripts
    assert found["steered"] == found["unsteered"]
    cold = opened(plain, build_tokenizer(), media.PUZZLES, temperature=0.0).compare(EASY, 2, 0.0, where)
    assert (
        cold.transcripts["steered"]
        == trials.generate(plain, build_tokenizer(), [EASY], max_new_tokens=STEPS)[0]
    )


@pytest.mark.parametrize(
    "how", [{"temperature": 1.0, "seed": 2}, {"temperature": 0.0, "place": "all"}, {"end_of_thinking": "="}]
)
def test_streaming_ends_with_what_generate_returns_and_only_grows(plain, how):
    model, last = reader.wrap(plain, build_tokenizer()), len(plain.model.layers) - 1
    pushes = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(0))
    pushes[1] = 1e4 * plain.get_output_embeddings().weight[2]  # after the last layer this can only give <eos>
    tasks = [PUZZLE, EASY, PUZZLE]
    whole = generate.steered(model, last, tasks, pushes, STEPS, **how)
    seen = list(generate.steered_stream(model, last, tasks, pushes, STEPS, leg=3, **how))
    assert seen[-1] == (whole, [True] * 3)
    assert len(seen) == 5 and seen[0][1] == [False, True, False]
    for (before, _), (after, _) in zip(seen, seen[1:]):
        assert all(long[: len(short)] == short for short, long in zip(before, after)) and before != after


def test_random_is_a_direction_of_the_same_norm(playground):
    assert playground.direction("random", "base").vector.norm().item() == pytest.approx(2.0)
    control = steering.random_directions(1, WIDTH, 5.0, 7)[0]
    assert playground.direction(control) is control
    assert (
        playground.direction("5").name == "feature 5"
        and playground.direction("reflection").name == "reflection 4"
    )


# --- what is asked ------------------------------------------------------------------------------------------


def typed(text):
    tokenizer = build_tokenizer()
    return puzzle_of(tokenizer.convert_ids_to_tokens(tokenizer(text, add_special_tokens=False)["input_ids"]))


def test_typed_puzzles_are_the_puzzles():
    for task in [*trials.puzzles(30, "test"), *trials.easy_questions(30)]:
        text = " ".join(task.prompt()[0].words)
        assert typed(text) == typed(f"\n{text.replace(' ;', '   ;')} think : ") == task


@pytest.mark.parametrize(
    "text",
    [
        # 8 * 4 - 2 = 30 -> 11, 14 * 4 - 2 = 54 -> 16, 5 * 4 - 2 = 18: nobody reaches 17
        "puzzle : + 3 * 4 - 2 ; from 5 11 2 reach 17 .",
        "puzzle : + 3 * 4 - 2 ; from 5 11 2 reach",
        "what is 5 - 1",
        "what is 5 5 ?",
        "puzzle",
        "wait , 5 - 1 = 4 .",
    ],
)
def test_other_words_are_free_text(text):
    task = typed(text)
    assert isinstance(task, FreeText) and task.answer is None
    assert " ".join(trials.prompt_words(task)) == f"{text} think :"


def test_free_text_has_no_right_answer(playground, chat_playground):
    for found in (
        playground.compare("the puzzle", 0, 1.0),
        chat_playground.compare("How many socks?", 0, 1.0),
    ):
        assert found.table["right"].tolist() == [None, None]
    assert playground.compare("the puzzle", 0, 1.0).prompt == "the puzzle think :"


# --- what is shown ------------------------------------------------------------------------------------------


def test_table_and_lines_by_hand(playground, monkeypatch):
    task = typed("puzzle : + 3 * 4 - 2 ; from 5 11 2 reach 16 .")
    assert task.answer == 11
    good = (
        "think : first try 5 . start : 5 + 3 = 8 . so 8 * 4 = 12 . wait , 8 * 4 = 13 . so 13 - 2 = 11 . but"
        " 11 is not 16 . instead try 11 . start : 11 + 3 = 14 . so 14 * 4 = 18 . so 18 - 2 = 16 . found 16 ."
        " done . answer : 11 ."
    )
    words = [build_tokenizer().tokenize(text) for text in (good, good.replace("answer : 11", "answer : 5"))]
    monkeypatch.setattr(generate, "steered_stream", lambda *a, **k: iter([(words, [True, True])]))
    found = playground.compare(task, 0, 1.0)
    assert found.table["right"].tolist() == [True, False] and found.table["every step right"].tolist() == [
        True,
        False,
    ]
    assert found.table["answer"].tolist() == [11, 5] and set(found.table["end"]) == {"thought closed"}
    assert found.table.loc[
        "unsteered", ["reflection", "deduction", "alternative", "contrast", "verification"]
    ].tolist() == [1, 4, 1, 1, 0]
    assert found.table.loc["unsteered", "tokens"] == words[0].index("done")
    assert [" ".join(w) for _, w, wrong in found.lines["unsteered"] if wrong] == ["so 8 * 4 = 12 ."]
    assert [" ".join(w) for _, w, wrong in found.lines["steered"] if wrong] == [
        "so 8 * 4 = 12 .",
        "answer : 5 .",
    ]
    assert (
        "answer 11, right" in found.html
        and "answer 5, wrong" in found.html
        and "deduction (wrong)" in found.html
    )


def test_chat_is_labelled_by_the_lexicon_and_marked(chat_playground, monkeypatch):
    task = questions.Question("How many socks are in two drawers of six?", 12, 0)
    texts = ["Two drawers. Wait, that is eleven.\n</think>\n\nThe answer is 12.", "But six is less"]
    monkeypatch.setattr(
        generate, "steered_stream", lambda *a, **k: iter([([list(t) for t in texts], [True, False])])
    )
    found = chat_playground.compare(task, 0, 1.0)
    assert [label for label, _, _ in found.lines["unsteered"]][:2] == ["other", "reflection"]
    assert found.table["right"].tolist() == [True, None] and found.table["end"].tolist() == [
        "thought closed",
        "not ended",
    ]
    assert found.table.loc["steered", "contrast"] == 1 and "verification" not in found.table


def test_everything_shown_is_escaped(chat_playground, monkeypatch):
    bad = "<script>alert(1)</script><img src=x onerror=alert(1)>"
    monkeypatch.setattr(generate, "steered_stream", lambda *a, **k: iter([([[bad], [bad]], [True, True])]))
    for shown in (chat_playground.compare(bad, 0, 1.0).html, press(chat_playground, prompt=bad).output.value):
        assert "<script" not in shown and "<img" not in shown and shown.count("&lt;script&gt;") == 3
    assert "<script" not in press(chat_playground, prompt="").status.value


# --- what is wrong ------------------------------------------------------------------------------------------

WRONG = {
    "feature": (dict(number=6), "feature 6 does not exist: this crosscoder has features 0 to 5"),
    "negative": (dict(number=-1), "feature -1 does not exist"),
    "empty": (dict(prompt=" \n "), "the prompt is empty: give a puzzle or a question"),
    "marker": (
        dict(prompt="what is 5 - 1 ? <eos>"),
        "the prompt contains '<eos>', which is a marker of this model",
    ),
    "unknown": (dict(prompt="what is love ?"), "does not know ('love')"),
    "long": (
        dict(prompt="the puzzle " * 260),
        "and the thought may take 14, and this model's context is 512: shorten the prompt",
    ),
    "nan": (dict(strength=float("nan")), "strength is nan: it must be a number from -100.0 to 100.0"),
    "infinite": (dict(strength=float("inf")), "strength is inf"),
}


def press(playground, **values):
    """A panel with these values in its fields, after Generate; there is no event loop here."""
    panel = playground.widget()
    for name, value in values.items():
        getattr(panel, name).value = value
    panel.generate.click()
    return panel


@pytest.mark.parametrize("fields, sentence", WRONG.values(), ids=WRONG)
def test_a_mistake_is_a_sentence_in_the_widget_and_nothing_is_raised(playground, fields, sentence):
    panel = press(playground, **fields)
    assert sentence in html.unescape(panel.status.value) and panel.output.value == ""
    asked = {"prompt": "what is 5 - 1 ?", "feature": fields.get("number", 0), "strength": 1.0}
    asked |= {name: value for name, value in fields.items() if name != "number"}
    with pytest.raises(UserError, match="prompt|feature|strength"):
        playground.compare(**asked)
    panel.prompt.value, panel.strength.value, panel.feature.value = "what is 5 - 1 ?", 0.5, "reflection"
    panel.generate.click()
    assert "Done" in panel.status.value and "unsteered" in panel.output.value  # nothing is lost


def test_names_that_do_not_exist(playground):
    with pytest.raises(
        UserError, match="feature is 'doubt': it must be a number, random, or one of reflection, deduction"
    ):
        playground.compare(EASY, "doubt", 1.0)
    with pytest.raises(UserError, match="model is 'null': it must be one of base, distilled"):
        playground.compare(EASY, 0, 1.0, model="null")


def test_a_fault_of_ours_is_said_too(playground, monkeypatch):
    monkeypatch.setattr(playground_module.Comparison, "html", property(lambda self: 1 / 0))
    assert "ZeroDivisionError" in press(playground).status.value


# --- the widget ---------------------------------------------------------------------------------------------


def test_the_widget_shows_what_compare_returns(playground):
    panel = press(
        playground, prompt="what is 5 - 1 ?", number=3, strength=-2.0, where="all", model="base", seed=7
    )
    assert panel.output.value == playground.compare("what is 5 - 1 ?", 3, -2.0, "all", "base", 7).html
    assert panel.feature.value == "number" and panel.example.value == "what is 5 - 1 ?"


def test_text_grows_while_the_kernel_is_free_and_stop_stops(plain):
    slow = opened(plain, build_tokenizer(), media.PUZZLES, max_new_tokens=80)

    async def session(stop_after):
        panel, seen = slow.widget(), []
        panel.output.observe(lambda change: seen.append(change["new"]), "value")
        panel.generate.click()
        assert seen == []  # the click comes back at once
        for _ in range(5000):
            await asyncio.sleep(0.002)  # the kernel has other things to do
            if len(seen) >= stop_after:
                panel.stop.click()
                break
            if "Done" in panel.status.value:
                break
        await asyncio.wait_for(panel._task, 30)
        return panel, seen

    panel, seen = asyncio.run(session(3))
    assert "Stopped" in panel.status.value and len(seen) == 3
    panel, seen = asyncio.run(session(10**9))
    assert "Done" in panel.status.value and len(seen) > 10
    assert seen[-1] == slow.compare(panel.prompt.value, "reflection", 0.5).html


def test_generate_again_begins_anew(plain):
    slow = opened(plain, build_tokenizer(), media.PUZZLES, max_new_tokens=60)

    async def session():
        panel = slow.widget()
        panel.generate.click()
        await asyncio.sleep(0.05)
        first, panel.strength.value = panel._task, -3.0
        panel.generate.click()
        await first
        await asyncio.wait_for(panel._task, 30)
        return panel

    panel = asyncio.run(session())
    assert panel.output.value == slow.compare(panel.prompt.value, "reflection", -3.0).html
    assert "Done" in panel.status.value


def test_every_field_has_a_name_and_examples_fill_the_prompt(playground):
    panel = playground.widget()
    fields = [
        panel.example,
        panel.prompt,
        panel.feature,
        panel.number,
        panel.strength,
        panel.where,
        panel.model,
        panel.seed,
        panel.generate,
        panel.stop,
    ]
    assert all(field.description for field in fields) and len({field.description for field in fields}) == len(
        fields
    )
    panel.example.value = "what is 5 - 1 ?"
    assert panel.prompt.value == "what is 5 - 1 ?"
    panel.prompt.value = "the puzzle"
    assert panel.example.value == ""
