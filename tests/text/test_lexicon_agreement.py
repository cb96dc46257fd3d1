"""The lexicon against annotations: sections find their own place, rates are those counted by hand, weights
undo the strata.
"""

import gzip
import json

import numpy as np
import pandas as pd
import pytest

from lib.settings import UserError
from lib.stats import bootstrap
from lib.text import lexicon_agreement as agreement
from lib.text.lexicon_agreement import (
    align,
    half_of,
    labelled_agreement,
    labelled_sentences,
    sample_sentences,
    write_sample,
)
from lib.tools.cli import main

# what the lexicon calls them is beyond doubt (tests/text/test_lexicon.py)
WAIT, SO, MAYBE, BUT, PLAIN = (
    "Wait, stop.",
    "So it rains.",
    "Maybe it snows.",
    "But it is cold.",
    "The sun is up.",
)


def write(path, entries):
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "wt", encoding="utf-8") as file:
        file.write("".join(json.dumps(e) + "\n" for e in entries))
    return path


def trace(index, *sections):
    """Sections are (label, sentences)."""
    texts = [[label, " ".join(parts)] for label, *parts in sections]
    return {"index": index, "thinking": "\n\n".join(text for _, text in texts), "sections": texts}


def row_of(table, comparison):
    return table.set_index(["comparison", "unit", "half"]).loc[(comparison, "sentence", "all")]


# --- sections -----------------------------------------------------------------------------------------------


def test_a_section_that_repeats_goes_to_its_own_place():
    thinking = "So it rains. Wait. So it rains.\nSo it rains."
    sections = [
        ("deduction", "So it rains."),
        ("backtracking", "Wait."),
        ("deduction", "So it rains."),
        ("x", "So it rains."),
    ]
    places = [(0, 12, "deduction"), (13, 18, "backtracking"), (19, 31, "deduction"), (32, 44, "x")]
    assert align(thinking, sections) == (places, 0)


def test_white_space_is_of_no_account_and_what_is_not_there_is_lost():
    thinking = "A  b.\n\nC d.  E f."
    places, lost = align(
        thinking,
        [("one", "A b.\n"), ("gone", "not in it"), ("empty", "  "), ("two", "C\td."), ("three", "E f.")],
    )
    assert [thinking[a:b] for a, b, _ in places] == ["A  b.", "C d.", "E f."] and lost == 2


def test_a_section_is_not_looked_for_far_away():
    far = "filler text. " * 100
    assert align("Start. " + far + "End.", [("a", "Start."), ("b", "End.")])[1] == 1
    # but what was lost in between counts: the text goes on behind it
    assert (
        align("Start. " + far + "End.", [("a", "Start."), ("lost", far + "changed"), ("b", "End.")])[1] == 1
    )


# --- annotated traces ---------------------------------------------------------------------------------------


def test_rates_are_those_counted_by_hand(tmp_path):
    """Two traces, eight sentences with an annotation: every cell of the table by counting."""
    path = write(
        tmp_path / "traces.jsonl.gz",
        [
            trace(
                0,
                ("initializing", PLAIN),
                ("deduction", SO, PLAIN),
                ("backtracking", WAIT, PLAIN),
                ("deduction", PLAIN),
            ),
            trace(1, ("uncertainty-estimation", WAIT), ("adding-knowledge", SO), ("nonsense", SO, WAIT)),
        ],
    )
    table = agreement.agreement(path, n_boot=20)
    assert table.attrs == {
        "traces": 2,
        "sections": 7,
        "sections_lost": 0,
        "sentences": 10,
        "sentences_left_out": 2,
    }
    table = table.set_index(["comparison", "unit", "half"])
    columns = ["precision", "precision_base", "recall", "recall_base", "tagged", "annotated", "both", "n"]
    for name, expected in {
        ("reflection ~ backtracking", "sentence"): (1 / 2, 2 / 8, 1 / 2, 2 / 8, 2, 2, 1, 8),
        ("reflection ~ backtracking", "first of section"): (1 / 2, 1 / 6, 1, 2 / 6, 2, 1, 1, 6),
        ("reflection ~ backtracking or doubt", "sentence"): (1, 3 / 8, 2 / 3, 2 / 8, 2, 3, 2, 8),
        ("deduction ~ deduction", "sentence"): (1 / 2, 3 / 8, 1 / 3, 2 / 8, 2, 3, 1, 8),
        ("deduction ~ deduction", "first of section"): (1 / 2, 2 / 6, 1 / 2, 2 / 6, 2, 2, 1, 6),
    }.items():
        assert table.loc[(*name, "all"), columns].astype(float).tolist() == pytest.approx(expected), name


def test_alternatives_count_as_turns(tmp_path):
    path = write(
        tmp_path / "t.jsonl", [trace(0, ("backtracking", MAYBE), ("backtracking", WAIT), ("deduction", SO))]
    )
    row = row_of(agreement.agreement(path, n_boot=2), "turn ~ backtracking")
    assert (row["precision"], row["recall"], row["tagged"]) == (1, 1, 2)


def test_a_sentence_across_two_sections_goes_where_most_of_it_lies(tmp_path):
    thinking = "Wait, it is raining outside today."
    sections = [["backtracking", "Wait, it is raining outside"], ["deduction", "today."]]
    frame, counts = agreement.annotated_sentences(
        write(tmp_path / "t.jsonl", [{"index": 1, "thinking": thinking, "sections": sections}])
    )
    assert frame["annotated"].tolist() == ["backtracking"] and counts["sentences_left_out"] == 0
    sections[0][1] = "Wait, it"  # the rest of the sentence has no section: most of it is not annotated
    sections[1][1] = "today."
    with pytest.raises(UserError, match="nothing to compare"):
        agreement.annotated_sentences(
            write(tmp_path / "t.jsonl", [{"index": 1, "thinking": thinking, "sections": sections}])
        )


def test_halves_are_of_questions_and_add_up(tmp_path):
    traces = [trace(i % 30, ("deduction", SO, PLAIN), ("backtracking", WAIT)) for i in range(60)]
    frame, _ = agreement.annotated_sentences(write(tmp_path / "t.jsonl", traces))
    assert (frame.groupby("question")["half"].nunique() == 1).all() and set(frame["half"]) == set(
        agreement.HALVES
    )
    assert [half_of(q) for q in range(30)] == [half_of(str(q)) for q in range(30)]
    table = (
        agreement.agreement(tmp_path / "t.jsonl", n_boot=2)
        .set_index(["comparison", "unit", "half"])["n"]
        .unstack("half")
    )
    assert (table["development"] + table["held out"] == table["all"]).all()


def test_a_tagger_that_knows_nothing_reaches_the_base_rates(tmp_path):
    """Annotations at random: precision and recall are near the base rates, which lie inside the intervals."""
    rng = np.random.default_rng(0)
    names = ["backtracking", "deduction", "adding-knowledge"]
    texts = [WAIT, SO, PLAIN, PLAIN]
    traces = [
        trace(i, *((names[rng.integers(3)], texts[rng.integers(4)]) for _ in range(20))) for i in range(100)
    ]
    table = agreement.agreement(write(tmp_path / "t.jsonl", traces), n_boot=200)
    alike = table["comparison"].isin(["reflection ~ backtracking", "deduction ~ deduction"])
    for _, row in table[(table["half"] == "all") & alike].iterrows():
        for name in ("precision", "recall"):
            assert (
                row[f"{name}_low"] < row[f"{name}_base"] < row[f"{name}_high"]
                and row[f"{name}_high"] - row[f"{name}_low"] < 0.15
            )


def test_intervals_are_those_of_a_bootstrap_over_questions(tmp_path):
    """Against lib.stats.bootstrap over whole groups, an independent implementation; questions differ much,
    so groups matter.
    """
    rng = np.random.default_rng(1)
    traces = []
    for i in range(25):
        share = rng.random()
        traces += [
            trace(i, *(("backtracking" if rng.random() < share else "deduction", WAIT) for _ in range(12)))
            for _ in range(2)
        ]
    path = write(tmp_path / "t.jsonl", traces)
    row = row_of(agreement.agreement(path, n_boot=4000), "reflection ~ backtracking")
    frame, _ = agreement.annotated_sentences(path)
    low, high = bootstrap(
        (frame["annotated"] == "backtracking").to_numpy(float), groups=frame["question"], n_boot=4000, seed=9
    )
    assert (row["precision_low"], row["precision_high"]) == pytest.approx(
        (low, high), abs=0.02
    ) and high - low > 0.1


@pytest.mark.parametrize(
    "line, message",
    [
        ('{"thinking": "So."}', "line 1 of t.jsonl is not of the form"),
        ('{"thinking": 3, "sections": []}', "line 1 of t.jsonl is not"),
        ('{"thinking": "So.", "sections": ["deduction"]}', "line 1"),
        ("[1, 2]", "entry 1"),
        ('{"thinking": "So."', "not whole JSON"),
        ('{"thinking": "So.", "sections": []}', "nothing to compare"),
        ("", "nothing to compare"),
    ],
)
def test_a_file_of_another_form_is_refused_with_its_line(tmp_path, line, message):
    (tmp_path / "t.jsonl").write_text(line + "\n")
    with pytest.raises(UserError, match=message):
        agreement.agreement(tmp_path / "t.jsonl")


def test_the_command_prints_a_table_or_a_sentence(tmp_path, capsys):
    path = write(tmp_path / "t.jsonl", [trace(0, ("deduction", SO), ("backtracking", WAIT))])
    assert main(["agreement", str(path)]) == 0
    printed = capsys.readouterr().out
    assert (
        "1 traces, 2 sections, 0 sections lost" in printed
        and "deduction ~ deduction" in printed
        and "1.000 [1.000, 1.000]" in printed
    )
    assert main(["agreement"]) == 2 and main(["agreement", str(tmp_path / "none.jsonl")]) == 2
    errors = capsys.readouterr().err
    assert "Missing argument 'path'" in errors and "does not exist" in errors


# --- sentences labelled by reading --------------------------------------------------------------------------


def documents(n=400):
    """Sentences of which most are plain; one in twenty is a contrast."""
    rng = np.random.default_rng(2)
    kinds = [WAIT, SO, MAYBE, BUT, PLAIN]
    return [
        " ".join(kinds[k] for k in rng.choice(5, size=10, p=[0.1, 0.2, 0.05, 0.05, 0.6])) for _ in range(n)
    ]


def test_as_many_of_each_tag_and_weights_that_stand_for_all_of_them():
    texts = documents()
    sample = sample_sentences(texts, 100, seed=3)
    assert sample["stratum"].value_counts().to_dict() == dict.fromkeys(agreement.LABELLED, 20)
    population = pd.Series([s for text in texts for s in text.replace(". ", ".|").split("|")]).value_counts()
    for stratum, text in zip(
        ("reflection", "deduction", "alternative", "contrast", "other"), (WAIT, SO, MAYBE, BUT, PLAIN)
    ):
        assert sample.loc[sample["stratum"] == stratum, "weight"].sum() == pytest.approx(population[text])
        assert (sample.loc[sample["stratum"] == stratum, "text"] == text).all()
    for _, row in sample.iterrows():
        assert f"{row['before']} {row['text']}".strip() in texts[row["document"]]
    assert sample.equals(sample_sentences(texts, 100, seed=3)) and not sample.equals(
        sample_sentences(texts, 100, seed=4)
    )
    # in random order
    assert not sample["stratum"].is_monotonic_increasing and sample["stratum"].iloc[:20].nunique() > 2


def test_a_rare_tag_gives_what_it_has():
    sample = sample_sentences([" ".join([PLAIN] * 50 + [SO] * 50 + [BUT] * 2)], 22)
    assert sample["stratum"].value_counts().to_dict() == {"contrast": 2, "deduction": 10, "other": 10}
    assert sample.groupby("stratum")["weight"].first().to_dict() == {
        "contrast": 1,
        "deduction": 5,
        "other": 5,
    }
    with pytest.raises(UserError, match="hold 1 sentences, 10 were asked for"):
        sample_sentences([PLAIN + "\n12\n"], 10)


def test_only_thoughts_are_sampled_and_the_tag_is_that_of_the_sentence_alone(tmp_path):
    thinking = " ".join([WAIT, SO, MAYBE, BUT, PLAIN])
    sample = sample_sentences(
        [f"Wait, is it Monday? But why?\n<think>\n{thinking} 12.\n</think>\nSo it is Monday."] * 5, 25
    )
    assert sorted(sample["text"]) == sorted([WAIT, SO, MAYBE, BUT, PLAIN] * 5)
    write_sample(sample, tmp_path)
    fill(tmp_path, ["other"] * 25)
    frame = labelled_sentences(tmp_path)
    assert (frame["tag"] == frame["stratum"]).all() and (frame["weight"] == 1).all()


def fill(folder, labels):
    entries = [json.loads(line) for line in (folder / "sentences.jsonl").read_text().splitlines()]
    write(folder / "sentences.jsonl", [e | {"label": label} for e, label in zip(entries, labels)])


def test_weighted_recall_is_that_of_the_text_and_not_of_the_sample(tmp_path):
    """Planted truth: a fifth of the plain sentences are contrasts that no word gives away, and half of the
    "but" sentences are none.

    The text has 44 "but" and 604 plain sentences of 1,000, so recall of contrast is 0.5 * 44 / (0.5 * 44 +
    0.2 * 604) = 0.154; over the plain counts of a sample by strata it would be 0.71.
    """
    texts, found = documents(100), []
    for seed in range(20):
        rng = np.random.default_rng(seed)
        folder = tmp_path / str(seed)
        write_sample(sample_sentences(texts, 100, seed), folder)
        truth = {WAIT: "reflection", SO: "deduction", MAYBE: "alternative"}
        lines = [json.loads(line) for line in (folder / "sentences.jsonl").read_text().splitlines()]
        assert all(set(line) == {"before", "text", "label"} and line["label"] is None for line in lines)
        hidden = {BUT: 0.5, PLAIN: 0.2}
        fill(
            folder,
            [
                truth.get(e["text"]) or ("contrast" if rng.random() < hidden[e["text"]] else "other")
                for e in lines
            ],
        )
        found.append(labelled_agreement(folder, n_boot=200).set_index("category"))
    contrast = pd.DataFrame([f.loc["contrast"] for f in found])
    assert (
        contrast["recall"].mean() == pytest.approx(0.154, abs=0.05)
        and (contrast["both"] / contrast["annotated"]).mean() > 0.6
    )
    assert contrast["precision"].mean() == pytest.approx(0.5, abs=0.06)
    assert contrast["precision_base"].mean() == pytest.approx(0.143, abs=0.03)
    assert contrast["recall_base"].tolist() == pytest.approx([0.044] * 20)
    covered = (contrast["recall_low"] <= 0.154) & (contrast["recall_high"] >= 0.154)
    assert covered.mean() > 0.75
    for c in ("reflection", "deduction", "alternative"):
        assert all(f.loc[c, "precision"] == f.loc[c, "recall"] == 1 for f in found)


def test_an_unlabelled_or_mixed_up_sample_is_refused(tmp_path):
    write_sample(sample_sentences(documents(40), 20), tmp_path)
    with pytest.raises(
        UserError, match="line 1 of sentences.jsonl has the label None: it must be one of reflection"
    ):
        labelled_sentences(tmp_path)
    fill(tmp_path, ["other"] * 20)
    assert set(labelled_sentences(tmp_path)) == {"before", "text", "label", "stratum", "weight", "tag"}
    with pytest.raises(UserError, match="there already"):
        write_sample(sample_sentences(documents(40), 20), tmp_path)
    strata = (tmp_path / "strata.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "strata.jsonl").write_text("".join(strata[1:]))
    with pytest.raises(UserError, match="20 lines and strata.jsonl 19"):
        labelled_sentences(tmp_path)
