"""Word problems: every answer worked out again from the words of the question alone; splits, chat and
transcripts.
"""

import hashlib
import random
import re

import pytest
from toys import chat_tokenizer

from lib.distil.organism import build_tokenizer
from lib.models.pairs import Pair
from lib.steering import tasks as media
from lib.text import chat, lexicon
from lib.text.questions import TEMPLATES, Question, ask, fill, final_number


def numbers(text):
    return [int(n) for n in re.findall(r"\d+", text)]


def search(condition, limit=5000):
    """The only whole number below ``limit`` for which the condition holds: the problem solved backwards."""
    found = [x for x in range(-limit, limit) if condition(x)]
    assert len(found) == 1
    return found[0]


SOLVED = {  # from the numbers in the text, in their order, by another way than the template's
    "shares": lambda n, t: n[0] % n[1],
    "shop": lambda n, t: search(lambda x: x + sum([n[1]] * n[0]) == n[2]),
    "two_days": lambda n, t: (lambda tuesday: n[0] + tuesday + (tuesday - n[2]))(words_times(t) * n[0]),
    "speed": lambda n, t: sum([n[1]] * n[0]) + sum([n[3]] * n[2]),
    "age": lambda n, t: sum([n[0]] * words_times(t)) + n[-1],
    "fence": lambda n, t: sum(n[2] for _ in range(n[0] + n[1] + n[0] + n[1])),
    "percent": lambda n, t: search(lambda x: 100 * x == n[0] * (100 - n[1])),
    "work": lambda n, t: n[2] - n[0] * n[1] * n[3],
    "eggs": lambda n, t: (n[0] * n[1] - n[2]) / n[3] * n[4],
    "difference": lambda n, t: search(lambda x: x + (x + n[1]) == n[0]),
    "rows": lambda n, t: n[3] * sum(n[1] for _ in range(n[0])) - n[3] * n[2],
    "savings": lambda n, t: (n[0] * n[1] - n[2]) / 2 - (0.5 if "further" in t else 0),
    "tank": lambda n, t: n[0] + sum(n[1] - n[2] for _ in range(n[3])),
    "average": lambda n, t: search(lambda x: (n[0] + n[1] + x) == 3 * n[2]),
    "clock": lambda n, t: sum(n[0] for _ in range(n[3])),
    "equation": lambda n, t: search(lambda x: x * n[0] + n[1] == n[2]),
    "order": lambda n, t: len(range(n[1] + 2, n[0] + 1)),
    "digits": lambda n, t: eval(re.search(r"is (.*)\?", t)[1]),
}


def words_times(text):
    return int(re.search(r"(\d+) times as", text)[1])


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda t: t["id"])
def test_answers_are_right(template):
    rng = random.Random(template["id"])
    for _ in range(300):
        text, answer = fill(template, rng)
        assert SOLVED[template["id"]](numbers(text), text) == answer and type(answer) is int, text


def test_splits_share_no_wording_and_no_question():
    asked = {split: ask(split, 60, seed=1) for split in ("train", "choose", "report")}
    for split, some in asked.items():
        assert {TEMPLATES[q.template]["split"] for q in some if q.template >= 0} == {split}
        assert len({q.text for q in some}) == 60 and any(q.answer is None for q in some)
    assert ask("train", 60, seed=1) == asked["train"] != ask("train", 60, seed=2)
    assert ask("train", 30, seed=1) == asked["train"][:30]
    assert all(q.answer is not None for q in ask("report", 40, open_share=0.0))


def test_a_seed_asks_the_same_questions_as_ever():
    """What was written and measured from these questions is committed: an edit of the data file must not move
    them.
    """
    texts = [f"{q.text}/{q.answer}" for split in ("train", "choose", "report") for q in ask(split, 200)]
    assert hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16] == "d3e45de3388342d6"


@pytest.mark.parametrize(
    "text, number",
    [
        ("It is \\boxed{12}, not 4.", 12),
        ("So 1,250 litres.", 1250),
        ("3 and then 4.5", 4.5),
        ("It is -3.", -3),
        ("none", None),
        ("\\boxed{x} 5", None),
        ("\\boxed{1} and \\boxed{2}", 2),
    ],
)
def test_the_number_that_an_answer_ends_with(text, number):
    assert final_number(text) == number


# --- chat as a medium ---------------------------------------------------------------------------------------


def pieces(text):
    return re.findall(r"\s?\w+|[^\w\s]|\s", text)


def test_a_transcript_is_counted_by_hand():
    thought = "First, I add. So it is 7.\nWait, let me check again. But 7 is odd."
    said = [
        pieces(f"{thought}\n</think>\n\nThe answer is 7."),
        pieces("So it is 7. Or is it"),
        pieces(f"{thought}\n</think>\n\nIt is 8."),
    ]
    tasks = [Question("a", 7, 0)] * 3
    frame = media.chat_outcomes(tasks, said, max_new_tokens=len(said[1]))
    assert frame.correct.tolist() == [True, False, False] and frame.runaway.tolist() == [False, True, False]
    labels = [span.label for span in lexicon.sentences(thought)]
    for label in ("reflection", "deduction", "contrast", "other", "alternative"):
        assert frame.loc[0, f"n_{label}"] == labels.count(label)
    assert labels == ["other", "deduction", "reflection", "contrast"]
    in_thought = pieces(thought + "\n</think>")
    assert frame.length[0] == len(in_thought) == frame.length[2] and frame.length[1] == len(said[1])
    assert frame.chain_correct.isna().all() and frame.redundant.isna().all()  # nobody can verify free text
    assert frame.t_deduction[0] == len(pieces(" So it is 7."))


def test_every_pair_is_asked_in_its_own_medium():
    files = {"corpus": (("x.txt", "trace"),)}
    chats, plain = chat_tokenizer(), build_tokenizer()
    markers = chats.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assert media.medium_of(Pair("a", {}, corpus="generated"), plain) is media.PUZZLES
    assert media.medium_of(Pair("b", {}, **files), chats) is media.CHAT
    assert media.medium_of(Pair("c", {}, **files), plain) is media.PLAIN
    # the markers are other tokens in one of the models
    assert media.medium_of(Pair("d", {}, differing_ids=markers, **files), chats) is media.PLAIN
    trace = chat.Trace("What is 5 - 1?", "", "")
    assert chat.plain(trace).startswith(media.PLAIN.prompt(media.PLAIN.easy(1, 0)[0]))
    task = media.CHAT.tasks("report", 3, 0)[0]
    assert task.answer is not None and media.CHAT.prompt(task) == chat.prompt(task.text) + "<think>\n"
    easy = media.CHAT.easy(50, 0)
    assert len({q.text for q in easy}) == 50 and easy[0].text == "What is 5 - 1?"
    assert all(q.answer == eval(q.text[8:-1]) >= 0 for q in easy)
