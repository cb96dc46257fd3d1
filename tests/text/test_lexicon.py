"""The lexicon: where sentences end, what they are; every token gets the label of its sentence."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from lib import labels as labels_module
from lib.activations.positions import positions
from lib.labels import CATEGORIES, LABELS
from lib.settings import UserError
from lib.text import corpus, lexicon
from lib.text.puzzles import PARAPHRASES, Sentence, Teacher, sample_puzzle

TEXT = (
    "<think>\nOkay, so I need 3.5 litres, i.e. 7 cups. Hmm, wait, that's not right.\n\nSo x = 7. But 7 is not"
    " 9. So x = 7. Maybe I can try 5? Wait.\n\n- Wait. So x = 7.\n</think>\n\nSo the answer is 7."
)


def split(text):
    return [text[s.start : s.end] for s in lexicon.sentences(text)]


def label(sentence):
    return lexicon.tag(sentence)[0]


def byte_level(trim):
    """A byte-level BPE of 400 ids, the kind that Llama, Qwen and SmolLM2 use; offsets without leading spaces
    if ``trim``.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["<bos>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([TEXT] * 3, trainer)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>")


# --- sentences ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, expected",
    [
        ("It is 3.5. Then 2.", ["It is 3.5.", "Then 2."]),
        ("Take fruit, e.g. Granny Smith. Done.", ["Take fruit, e.g. Granny Smith.", "Done."]),
        (
            "See Fig. 3 and eq. 4. The answer is no. So stop.",
            ["See Fig. 3 and eq. 4.", "The answer is no.", "So stop."],
        ),
        (
            "Pens, ink, etc. are here. Pens, ink, etc. They are here.",
            ["Pens, ink, etc. are here.", "Pens, ink, etc.", "They are here."],
        ),
        ("one line\nanother line\n\n  third", ["one line", "another line", "third"]),
        (
            "1. First, add.\n2) Then stop.\n- **Bold** item. More.",
            ["1. First, add.", "2) Then stop.", "- **Bold** item.", "More."],
        ),
        ("Hmm... maybe so. Hmm... Then no.", ["Hmm... maybe so.", "Hmm...", "Then no."]),
        ('Really?! "Yes." (Or no.) Fine!', ["Really?!", '"Yes."', "(Or no.)", "Fine!"]),
        (
            "It is (right?) and good. 5! is 120. So it is 5! Then 6!",
            ["It is (right?) and good.", "5! is 120.", "So it is 5!", "Then 6!"],
        ),
        (
            "Let \\( a. b \\) be. \\begin{a}x. y\\end{a} z.",
            ["Let \\( a. b \\) be.", "\\begin{a}x. y\\end{a} z."],
        ),
        ("We have\n\\[\nx = 3. \ny = 4\n\\]\nThen.", ["We have\n\\[\nx = 3. \ny = 4\n\\]", "Then."]),
        ("Done.\n\\[ x = 3 \\]\nThen.", ["Done.", "\\[ x = 3 \\]", "Then."]),
        ("First.\n---\nSecond.", ["First.\n---", "Second."]),
        ("<think>\nSo.</think>Yes.<|im_end|>", ["<think>", "So.", "</think>", "Yes.", "<|im_end|>"]),
        ("我们试试。再来！", ["我们试试。", "再来！"]),
        ("", []),
        (" \n ", []),
        ("no stop", ["no stop"]),
        ("...", ["..."]),
    ],
)
def test_where_sentences_end(text, expected):
    assert split(text) == expected


def test_sentences_cover_everything_but_white_space_whatever_the_text():
    rng = random.Random(0)
    pieces = [
        "So",
        "wait",
        "3.5",
        ".",
        "!",
        "?",
        "...",
        " ",
        " ",
        "\n",
        "\\[",
        "\\]",
        "$$",
        "<think>",
        "</think>",
        "e.g.",
        "(",
        ")",
        "—",
        "é",
        "\t",
        "1.",
    ]
    for _ in range(500):
        text = "".join(rng.choice(pieces) for _ in range(rng.randrange(40)))
        spans = lexicon.sentences(text)
        assert all(a.end <= b.start for a, b in zip(spans, spans[1:]))
        assert all(text[s.start : s.end] == text[s.start : s.end].strip() != "" for s in spans)
        outside = set(range(len(text))) - {i for s in spans for i in range(s.start, s.end)}
        assert not any(text[i].strip() for i in outside)


# --- labels -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "expected, sentence",
    [
        ("reflection", "Wait, the box is blue."),
        ("reflection", "Hmm."),
        ("reflection", "Hold on a second."),
        ("reflection", "But wait, is it blue?"),
        ("reflection", "So x is 3, but that can't be right."),
        ("reflection", "Let me double-check this."),
        ("reflection", "Now, let me quickly verify."),
        ("reflection", "I think I made a mistake."),
        ("reflection", "That’s not right."),
        ("reflection", "Actually, no."),
        ("reflection", "Oh no, the hens!"),
        ("reflection", "That doesn't seem right."),
        ("reflection", "- **Wait**, I misread the table."),
        ("reflection", "It is 5, no wait, 6."),
        ("deduction", "So the tank is full."),
        ("deduction", "Therefore, it holds."),
        ("deduction", "Okay, so x is 4."),
        ("deduction", "2. Thus it ends."),
        ("deduction", "It is even, which means it has a half."),
        ("deduction", "It follows that both are odd."),
        ("deduction", "That implies rain."),
        ("alternative", "Alternatively, take the bus."),
        ("alternative", "Another approach is by weight."),
        ("alternative", "Instead, use a rope."),
        ("alternative", "Or maybe it is the cook."),
        ("alternative", "But maybe it is the cook."),
        ("alternative", "What if it rains?"),
        ("alternative", "Let me try seven."),
        ("alternative", "I can use a different method."),
        ("contrast", "But seven is not nine."),
        ("contrast", "However, it rains."),
        ("contrast", "On the other hand, it is cheap."),
        ("contrast", "The train is fast, whereas the boat is slow."),
        ("contrast", "Although it rains, we go."),
        ("contrast", "x is 3, but y is not, so z is."),
        ("deduction", "So x is 3, but y is not."),
        ("other", "Wait times are long."),
        ("other", "Wait for the bus."),
        ("other", "So far we have two."),
        ("other", "Okay, so I need to find x."),
        ("other", "The waiter came."),
        ("other", "Let me check out the books."),
        ("other", "We add seven and nine."),
        ("other", "Hmm, where do I start?"),
        ("other", "The butter is soft."),
        ("other", "Check if it has right angles."),
        ("other", ""),
        ("other", "!!!"),
    ],
)
def test_what_a_sentence_is(expected, sentence):
    assert label(sentence) == expected


def test_telltale_paraphrases_of_the_embedded_pair_are_found_and_the_others_are_not():
    """The embedded pair's sentences have their labels by construction; four kinds carry no word that gives
    them away.
    """
    missed = set()
    for name, templates in PARAPHRASES.items():
        for template in templates:
            found = label(template.format(a=9, op="* 4", v=17, t=16, c=11))
            assert found in ("other", "reflection" if name == "verification" else name), template
            if found == "other":
                missed.add(template)
    assert missed == {
        "{a} {op} gives {v} .",
        "this is not {t} .",
        "next is {c} .",
        "that should be {v} .",
        "yes , {a} {op} = {v} .",
        "again {a} {op} = {v} .",
    }


def test_what_stands_outside_the_thought_is_other():
    spans = lexicon.sentences("Wait, so what? " + TEXT)
    assert spans[0].label == "other" and spans[-1].label == "other"
    assert {s.label for s in spans} == {*CATEGORIES, "other"}
    # the template opened the thought
    assert lexicon.sentences("Wait. </think> Wait.")[0].label == "reflection"
    assert [s.label for s in lexicon.sentences("<think> Wait. So")] == ["other", "reflection", "deduction"]


# --- tokens -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trim", [True, False])
def test_every_token_has_the_label_of_its_own_sentence(trim):
    """Character by character, for a tokenizer of the kind that real models have; sentences of TEXT repeat on
    purpose.
    """
    encoded = byte_level(trim)(TEXT, return_offsets_mapping=True)
    arrays = lexicon.label_arrays(TEXT, encoded["offset_mapping"], "trace")
    assert tuple(arrays) == labels_module.LABEL_ARRAYS and all(
        a.dtype == np.int8 and len(a) == len(encoded["input_ids"]) for a in arrays.values()
    )
    spans = lexicon.sentences(TEXT)
    by_character = [None] * len(TEXT)
    for i, span in enumerate(spans):
        by_character[span.start : span.end] = [i] * (span.end - span.start)
    last, owners = None, []
    for first, end in encoded["offset_mapping"]:
        inside = [by_character[c] for c in range(first, end) if by_character[c] is not None]
        last = inside[0] if inside else last  # white space alone belongs to the sentence before
        owners.append(last)
    assert [LABELS[x] for x in arrays["label"]] == [spans[o].label for o in owners]
    begins = [i for i, o in enumerate(owners) if i == 0 or owners[i - 1] != o]
    assert np.flatnonzero(arrays["starts"]).tolist() == begins
    assert np.flatnonzero(arrays["ends"]).tolist() == [b - 1 for b in begins[1:]] + [len(owners) - 1]
    assert len(begins) == len(spans) and not arrays["error"].any() and arrays["kind"].all()
    after = arrays["next_label"][arrays["ends"] == 1]
    assert after.tolist() == [LABELS.index(s.label) for s in spans[1:]] + [-1]
    assert (arrays["next_label"][arrays["ends"] == 0] == -1).all()


def test_the_arrays_mean_what_those_of_the_embedded_pair_mean():
    """Its own traces as plain text, a token a word: the two ways agree, but for what the lexicon calls a
    sentence.
    """
    rng = random.Random(1)
    for _ in range(20):
        known = [s for s in Teacher(rng).solve(sample_puzzle(rng)) if s.words[-1] == "."]
        tagged = [Sentence(s.words, label(" ".join(s.words))) for s in known]
        words = [w for s in known for w in s.words]
        ends = np.cumsum([len(w) + 1 for w in words]) - 1
        # BOS stands for no text
        offsets = [(0, 0)] + [(int(e) - len(w), int(e)) for w, e in zip(words, ends)]
        arrays = lexicon.label_arrays(" ".join(words), offsets, "trace")
        for name, expected in corpus.label_arrays(tagged, "trace").items():
            assert np.array_equal(arrays[name], expected), name


def test_positions_before_and_at_a_sentence():
    """By hand: tokens are words here; BOS, five sentences, a white-space token after the second."""
    text = "A hen. Wait.\n\nSo two. But no. So two."
    offsets = [
        (0, 0),
        (0, 1),
        (2, 6),
        (7, 12),
        (12, 14),
        (14, 16),
        (17, 21),
        (22, 25),
        (26, 29),
        (30, 32),
        (33, 37),
        (0, 0),
    ]
    arrays = lexicon.label_arrays(text, offsets, "trace")
    store = SimpleNamespace(labels=arrays, documents=np.zeros(len(offsets), int))
    index, found = positions(store, np.arange(len(offsets)), "before")
    assert index.tolist() == [2, 4, 6, 8, 10]
    assert [LABELS[x] if x >= 0 else None for x in found] == [
        "reflection",
        "deduction",
        "contrast",
        "deduction",
        None,
    ]
    index, found = positions(store, np.arange(len(offsets)), "marker")
    assert index.tolist() == [1, 3, 5, 7, 9] and [LABELS[x] for x in found] == [
        "other",
        "reflection",
        "deduction",
        "contrast",
        "deduction",
    ]
    assert arrays["label"][0] == arrays["label"][-1] == -1


def test_a_sentence_without_a_token_of_its_own_is_passed_over():
    text = "Go. So! Wait."
    arrays = lexicon.label_arrays(text, [(0, 8), (8, 12), (12, 13)], "trace")  # "Go. So! " is one token
    assert [LABELS[x] for x in arrays["label"]] == ["other", "reflection", "reflection"]
    assert arrays["starts"].tolist() == [1, 1, 0] and arrays["ends"].tolist() == [1, 0, 1]
    assert arrays["next_label"].tolist() == [LABELS.index("reflection"), -1, -1]


def test_general_text_is_general_whatever_its_words():
    arrays = lexicon.label_arrays(
        "Wait. So it rains.", [(0, 4), (4, 5), (6, 8), (9, 11), (12, 17), (17, 18)], "general"
    )
    assert {LABELS[x] for x in arrays["label"]} == {"general"} and not arrays["kind"].any()
    assert arrays["starts"].tolist() == [1, 0, 1, 0, 0, 0] and arrays["next_label"][1] == LABELS.index(
        "general"
    )


def test_offsets_of_another_text_are_refused():
    with pytest.raises(ValueError, match="made from this text"):
        lexicon.label_arrays("Short.", [(0, 5), (5, 9)], "trace")
    with pytest.raises(ValueError, match="made from this text"):
        lexicon.label_arrays("So. Wait.", [(4, 9), (0, 3)], "trace")
    with pytest.raises(UserError, match="kind"):
        lexicon.label_arrays("Short.", [(0, 5)], "thoughts")
    assert (lexicon.label_arrays("", [(0, 0)], "trace")["label"] == -1).all()
    assert all(len(a) == 0 for a in lexicon.label_arrays("Text.", [], "trace").values())


def test_letters_of_several_bytes_keep_the_alignment():
    text = "Größe 😀 zählt. Wait, 😀😀!"
    encoded = byte_level(True)(text, return_offsets_mapping=True)
    arrays = lexicon.label_arrays(text, encoded["offset_mapping"], "trace")
    boundary = text.index("Wait")
    for (first, end), found in zip(encoded["offset_mapping"], arrays["label"]):
        if text[first:end].strip():
            assert LABELS[found] == ("reflection" if first + (text[first] == " ") >= boundary else "other")
    assert arrays["starts"].sum() == arrays["ends"].sum() == 2
