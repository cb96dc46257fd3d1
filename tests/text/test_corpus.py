"""Documents, their labels and their splits; text from files."""

import gzip
import json
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
from toys import toy_pair

from lib.distil.organism import build_tokenizer
from lib.labels import LABEL_ARRAYS, LABELS
from lib.models import sources
from lib.settings import UserError
from lib.text import lexicon
from lib.text.chat import Trace, plain
from lib.text.corpus import build, encode, label_arrays, override
from lib.text.files import read_items, read_texts
from lib.text.puzzles import Puzzle, Sentence, label_of, sentences_of


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return toy_pair(tmp_path_factory.mktemp("pair"))


def test_labels_by_hand():
    wrong = Sentence(("so", "9", "* 4", "=", "13", "."), "deduction", 0, error=True)
    sentences = [wrong, Sentence(("hmm", ","), "reflection", 0), Sentence(("done", "."), "other")]
    arrays = label_arrays(sentences, "trace")
    d, r, o = (LABELS.index(c) for c in ("deduction", "reflection", "other"))
    assert arrays["label"].tolist() == [-1, d, d, d, d, d, d, r, r, o, o]
    assert arrays["starts"].tolist() == [0, 1, 0, 0, 0, 0, 0, 1, 0, 1, 0]
    assert arrays["ends"].tolist() == [0, 0, 0, 0, 0, 0, 1, 0, 1, 0, 1]
    assert arrays["next_label"].tolist() == [-1, -1, -1, -1, -1, -1, r, -1, o, -1, -1]
    assert arrays["error"].tolist() == [0, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0]
    assert arrays["kind"].tolist() == [1] * 11
    assert arrays["mode"].tolist() == [-1] * 11
    assert label_arrays(sentences, "trace", mode=1)["mode"].tolist() == [1] * 11
    assert all(a.dtype == np.int8 for a in arrays.values()) and set(arrays) == set(LABEL_ARRAYS)


def test_a_text_says_which_thoughts_are_careful(pair):
    """Careful thoughts check most of their right steps, quick ones hardly any."""
    checks = {-1: [], 0: [], 1: []}
    for document in build(replace(pair, corpus="modes"), 20_000):
        (mode,) = set(document.labels["mode"].tolist())
        assert (mode == -1) == (document.kind == "general")
        follows = document.labels["next_label"][document.labels["ends"] == 1]
        checks[mode].append(np.mean(follows == LABELS.index("verification")))
    assert np.mean(checks[1]) > 0.3 > 0.1 > np.mean(checks[0]) and np.mean(checks[-1]) == 0
    assert all(d.labels["mode"].max() == -1 for d in build(pair, 2_000)), "the other teacher has no modes"


def test_labels_align_with_the_words_that_the_tokens_spell(pair):
    """Read traces back from their token ids, split and label them by an independent reader, and compare."""
    tokenizer, sentences_seen = pair.tokenizer(), 0
    for document in build(pair, 6000, trace_share=1.0):
        words = tokenizer.convert_ids_to_tokens(document.tokens)
        assert words[0] == "<bos>" and "<unk>" not in words
        start = 1
        for i, sentence in enumerate(sentences := sentences_of(words[1:])):
            labels = document.labels["label"][start : start + len(sentence)]
            if sentence[0] not in ("puzzle", "what"):
                assert set(labels) == {LABELS.index(label_of(sentence))}
                sentences_seen += 1
            if "?" not in sentence:  # a question runs into "think :" for this reader
                assert document.labels["starts"][start : start + len(sentence)].tolist() == [1] + [0] * (
                    len(sentence) - 1
                )
                assert document.labels["ends"][start : start + len(sentence)].tolist() == [0] * (
                    len(sentence) - 1
                ) + [1]
                if i + 1 < len(sentences):
                    assert document.labels["next_label"][start + len(sentence) - 1] == LABELS.index(
                        label_of(sentences[i + 1])
                    )
            start += len(sentence)
    assert sentences_seen > 500


def test_every_error_is_followed_by_a_reflection(pair):
    errors = 0
    for document in build(pair, 20_000, trace_share=1.0):
        ends = (document.labels["error"] == 1) & (document.labels["ends"] == 1)
        errors += ends.sum()
        assert (document.labels["next_label"][ends] == LABELS.index("reflection")).all()
    assert errors > 50


def test_shares_splits_and_distinct_texts(pair):
    documents = list(build(pair, 30_000))
    size = sum(len(d.tokens) - 1 for d in documents)
    traces = sum(len(d.tokens) - 1 for d in documents if d.kind == "trace")
    assert 30_000 <= size < 30_300 and abs(traces / size - 0.5) < 0.01
    assert len({tuple(d.tokens) for d in documents}) == len(documents)
    share = np.mean([d.split == "train" for d in documents])
    assert abs(share - 0.8) < 0.02 and {d.split for d in documents} == {"train", "choose", "report"}
    assert all((d.labels["label"] == 0)[1:].all() for d in documents if d.kind == "general")


def test_puzzles_come_from_their_own_split(pair):
    tokenizer, seen = pair.tokenizer(), set()
    for document in build(pair, 20_000, trace_share=1.0):
        words = tokenizer.convert_ids_to_tokens(document.tokens)[1:]
        if words[0] == "puzzle":
            candidates = tuple(int(w) for w in words[7:10])
            puzzles = [Puzzle(tuple(words[2:5]), candidates, answer) for answer in candidates]
            puzzle = next(p for p in puzzles if p.target == int(words[11]))
            assert (
                puzzle.split() == {"train": "train", "choose": "validation", "report": "test"}[document.split]
            )
            seen.add(document.split)
    assert len(seen) == 3


def test_same_seed_same_corpus_and_a_larger_one_begins_alike(pair):
    small, large = list(build(pair, 2000)), list(build(pair, 4000))
    assert [d.tokens for d in small] == [d.tokens for d in large[: len(small)]]
    assert [d.tokens for d in build(pair, 2000, seed=1)] != [d.tokens for d in small]
    assert (
        build(pair, 2000).fingerprint
        == build(pair, 2000).fingerprint
        != build(pair, 2000, seed=1).fingerprint
    )


def test_words_that_are_not_tokens_are_refused():
    with pytest.raises(UserError, match="not single tokens"):
        encode([Sentence(("so", "unheard-of"), "other")], build_tokenizer())


def from_files(pair, folder, trace="so 9 * 4 = 17 .", general="anna is late .", copies=20):
    (folder / "traces.jsonl").write_text(
        "".join(json.dumps({"text": f"{trace} {i}"}) + "\n" for i in range(copies))
    )
    with gzip.open(folder / "general.txt.gz", "wt") as file:
        file.write("\n\n".join(f"{general}\n{i % 19}" for i in range(copies)))
    return replace(
        pair, corpus=((str(folder / "traces.jsonl"), "trace"), (str(folder / "general.txt.gz"), "general"))
    )


def test_files_are_labelled_by_the_lexicon_and_bos_by_nothing(pair, tmp_path):
    documents = list(build(from_files(pair, tmp_path), 100))
    assert {d.kind for d in documents} == {"trace", "general"}
    assert all(d.labels["label"][0] == -1 and d.labels["starts"][0] == 0 for d in documents)
    for d in documents:  # "so 9 * 4 = 17 .", a number; "anna is late .", a number on a line of its own
        found = [LABELS[i] for i in d.labels["label"][1:]]
        assert found == (
            ["deduction"] * 6 + ["other"] * (len(d.tokens) - 7)
            if d.kind == "trace"
            else ["general"] * (len(d.tokens) - 1)
        )
        assert d.labels["starts"].sum() == d.labels["ends"].sum() == 2
    assert all(set(d.labels["kind"]) == {int(d.kind == "trace")} for d in documents)
    assert build(from_files(pair, tmp_path), 100).parameters["lexicon"] == lexicon.VERSION
    assert next(read_texts(tmp_path / "general.txt.gz")) == "anna is late .\n0"


def test_windows_share_the_labels_of_the_whole_text(pair, tmp_path):
    text = "so 9 * 4 = 17 . wait , 9 * 4 = 17 . but 17 = 17 ."  # "* 4" is one token: 18
    (tmp_path / "one.txt").write_text(text)
    one = replace(pair, corpus=((str(tmp_path / "one.txt"), "trace"),))
    (whole,), windows = build(one, 18, trace_share=1.0), list(build(one, 18, trace_share=1.0, max_length=4))
    for name in ("label", "starts", "ends", "next_label", "error"):
        assert (
            np.concatenate([d.labels[name][1:] for d in windows]).tolist() == whole.labels[name][1:].tolist()
        ), name
    ends = whole.labels["ends"] == 1
    assert [LABELS[i] for i in whole.labels["label"][ends]] == ["deduction", "reflection", "contrast"]
    assert [LABELS[i] for i in whole.labels["next_label"][ends][:2]] == [
        "reflection",
        "contrast",
    ] and whole.labels["next_label"][ends][2] == -1


def test_long_documents_are_cut_into_windows_that_cover_them(pair, tmp_path):
    text = " ".join(str(i % 19) for i in range(50))
    (tmp_path / "long.txt").write_text(text)
    corpus = build(
        replace(pair, corpus=((str(tmp_path / "long.txt"), "trace"),)), 50, trace_share=1.0, max_length=11
    )
    documents = list(corpus)
    assert [len(d.tokens) for d in documents] == [11] * 5 and all(d.tokens[0] == 1 for d in documents)
    ids = [t for d in documents for t in d.tokens[1:]]
    assert (
        pair.tokenizer().convert_ids_to_tokens(ids) == text.split() and len({d.split for d in documents}) == 1
    )


def test_ids_on_which_vocabularies_differ_are_left_out(pair, tmp_path):
    source = from_files(pair, tmp_path)
    corpus = build(source, 100)
    excluded = (pair.tokenizer().bos_token_id, pair.tokenizer().get_vocab()["so"])
    tokens = {t for d in islice(replace(corpus, excluded=excluded), 10) for t in d.tokens}
    assert tokens and not tokens & set(excluded)


def test_a_budget_above_the_corpus_is_refused_with_what_is_possible(pair, tmp_path):
    source = from_files(pair, tmp_path)
    with pytest.raises(
        UserError,
        match="the budget of 10,000 tokens is above the corpus: its .* ends after .* ask for at most",
    ) as error:
        build(source, 10_000).check_budget()
    possible = int(str(error.value).split("at most ")[1].split(" ")[0].replace(",", ""))
    assert list(build(source, possible - 10))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": 0}, "tokens is 0"),
        ({"trace_share": 1.5}, "trace_share"),
        ({"splits": (0.5, 0.1, 0.1)}, "sum to 1"),
        ({"splits": (0.0, 0.5, 0.5)}, "train not 0"),
    ],
)
def test_impossible_values(pair, options, message):
    with pytest.raises(UserError, match=message):
        build(pair, **{"tokens": 100, **options})


def test_bad_files(pair, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"words": 3}\n')
    with pytest.raises(UserError, match="line 2 of bad.jsonl"):
        build(
            replace(pair, corpus=((str(tmp_path / "bad.jsonl"), "trace"),)), 100, trace_share=1.0
        ).check_budget()
    with pytest.raises(UserError, match="does not exist"):
        build(replace(pair, corpus=((str(tmp_path / "none.txt"), "trace"),)), 100)
    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    with pytest.raises(UserError, match="not UTF-8"):
        list(read_texts(tmp_path / "latin.txt"))
    (tmp_path / "cut.txt.gz").write_bytes(gzip.compress(b"words " * 1000)[:30])
    with pytest.raises(UserError, match="not a whole gzip"):
        list(read_texts(tmp_path / "cut.txt.gz"))


THOUGHT = (
    "<|begin_of_thought|>\n\nso 9 * 4 = 17 .\n\nwait , 9 * 4 = 16 .\n\n<|end_of_thought|>\n\n"
    "<|begin_of_solution|>\n\nit is 16 .\n\n<|end_of_solution|>"
)


def test_lines_of_jsonl_are_texts_or_traces(tmp_path):
    lines = [
        {"text": "anna is late ."},
        {"question": "what is 5 - 1 ?", "thinking": "so 5 - 1 = 4 .", "answer": "4", "model": None},
    ]
    (tmp_path / "mixed.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert list(read_items(tmp_path / "mixed.jsonl")) == [
        "anna is late .",
        Trace("what is 5 - 1 ?", "so 5 - 1 = 4 .", "4"),
    ]
    assert (
        list(read_texts(tmp_path / "mixed.jsonl"))[1]
        == "what is 5 - 1 ?\n\n<think>\nso 5 - 1 = 4 .\n</think>\n\n4\n"
    )
    (tmp_path / "half.jsonl").write_text('{"question": "what is 5 - 1 ?", "answer": "4"}\n')
    with pytest.raises(UserError, match="line 1 of half.jsonl has no thought"):
        list(read_items(tmp_path / "half.jsonl"))


def streams(monkeypatch, rows):
    """Let the hub have these rows; returns the list that says how far each stream was read."""
    read = []

    def fake(source):
        for number, row in enumerate(rows[source]):
            read.append((source, number))
            yield row

    monkeypatch.setattr(sources, "dataset_rows", fake)
    monkeypatch.setattr(sources, "resolved", lambda source, kind="model", file=None: (source, "c" * 40))
    return read


def on_the_hub(pair):
    return replace(pair, corpus=(("hub:org/thoughts", "trace"), ("hub:org/texts:*.jsonl", "general")))


def test_conversations_from_the_hub_become_traces_and_are_read_as_far_as_needed(pair, monkeypatch):
    reply = {"from": "assistant", "value": THOUGHT}
    rows = [
        {
            "system": "Use tags.",
            "conversations": [{"from": "user", "value": f"what is {i % 19} * 4 ?"}, reply],
        }
        for i in range(500)
    ]
    lines = [{"text": json.dumps({"text": f"anna is late . {i % 19}", "meta": {"n": i}})} for i in range(500)]
    read = streams(
        monkeypatch, {"hub:org/thoughts": rows, "hub:org/texts:*.jsonl": [{"text": '{"text": " "}'}, *lines]}
    )
    corpus = build(on_the_hub(pair), 300)
    corpus.check_budget()
    assert not read, "nothing is fetched before it is needed"
    documents = list(corpus)
    expected = Trace("what is 0 * 4 ?", "so 9 * 4 = 17 .\n\nwait , 9 * 4 = 16 .", "it is 16 .")
    tokenizer = pair.tokenizer()
    first = next(d for d in documents if d.kind == "trace")
    assert first.tokens == tokenizer(plain(expected))["input_ids"]
    assert (
        next(d for d in documents if d.kind == "general").tokens == tokenizer("anna is late . 0")["input_ids"]
    )
    assert len(read) < 60 and {d.kind for d in documents} == {"trace", "general"}
    assert [d.tokens for d in corpus] == [d.tokens for d in documents]
    assert corpus.parameters["commits"] == {"org/thoughts": "c" * 40, "org/texts": "c" * 40}
    monkeypatch.setattr(sources, "resolved", lambda source, kind="model", file=None: (source, "d" * 40))
    assert build(on_the_hub(pair), 300).fingerprint != corpus.fingerprint, "another commit is another text"


@pytest.mark.parametrize(
    "row",
    [
        {
            "conversations": [
                {"from": "user", "value": "what ?"},
                {"from": "assistant", "value": "no thought ."},
            ]
        },
        {"conversations": [{"from": "assistant", "value": THOUGHT}]},
        {"body": "of another name"},
    ],
)
def test_rows_of_another_form_are_named(pair, monkeypatch, row):
    streams(monkeypatch, {"hub:org/thoughts": [row]})
    with pytest.raises(UserError, match="row 1 of org/thoughts (has no thought|is not of a form)"):
        list(build(on_the_hub(pair), 100, trace_share=1.0))


def test_text_by_parameter(pair, tmp_path):
    (tmp_path / "mine.txt").write_text("anna is late .")
    registered = on_the_hub(pair)
    assert override(pair) is pair
    mine = str(tmp_path / "mine.txt")
    assert override(registered, general=mine).corpus == ((mine, "general"), ("hub:org/thoughts", "trace"))
    assert override(pair, traces="org/other@v1").corpus == (("hub:org/other@v1", "trace"),)
    assert override(pair, general="org/other:*.parquet").corpus == (("hub:org/other:*.parquet", "general"),)
    assert len(list(build(override(pair, general=mine), 4, trace_share=0.0))) == 1
    for wrong, message in (
        ("mine.jsonl", "is not there"),
        ("./mine", "is not there"),
        ("mine", "neither a file nor a data set"),
    ):
        with pytest.raises(UserError, match=message):
            override(pair, traces=wrong)


def test_a_text_file_without_blank_lines_is_read_line_by_line(tmp_path):
    lines = [f"anna is late {number} ." for number in range(150)]
    for size, expected in ((150, lines), (99, ["\n".join(lines[:99])])):
        (tmp_path / "text.txt").write_text("\n".join(lines[:size]))
        assert list(read_texts(tmp_path / "text.txt")) == expected
    # blank lines are there: they count
    (tmp_path / "text.txt").write_text("\n".join([lines[0], "", *lines[1:]]))
    assert list(read_texts(tmp_path / "text.txt")) == [lines[0], "\n".join(lines[1:])]
