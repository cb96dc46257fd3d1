"""The puzzle, the teacher, the reader of transcripts: hand-computed values and planted mistakes."""

import random
from types import SimpleNamespace

import pytest

from lib.text import curriculum as prose
from lib.text.puzzles import (
    FRAME,
    MODULUS,
    OPERATIONS,
    PARAPHRASES,
    ModeTeacher,
    Puzzle,
    Question,
    Teacher,
    apply,
    direct,
    first_words,
    label_of,
    parse_transcript,
    sample_puzzle,
    sentences_of,
)

PUZZLE = Puzzle(("+ 3", "* 4", "- 2"), (5, 11, 2), 11)  # 5: 8 13 11; 11: 14 18 16; 2: 5 1 18


def parsed(task, words):
    return SimpleNamespace(**parse_transcript(task, words))


def words(sentences):
    return [w for s in sentences for w in s.words]


def test_arithmetic_on_the_clock():
    assert apply("* 4", 9) == 17 and apply("- 9", 2) == 12 and apply("+ 9", 18) == 8
    assert (
        PUZZLE.chain(5) == [8, 13, 11] and PUZZLE.chain(11) == [14, 18, 16] and PUZZLE.chain(2) == [5, 1, 18]
    )
    assert PUZZLE.target == 16
    assert " ".join(words(PUZZLE.prompt())) == "puzzle : + 3 * 4 - 2 ; from 5 11 2 reach 16 ."


def test_every_operation_is_one_to_one():
    for operation in OPERATIONS:
        assert sorted(apply(operation, v) for v in range(MODULUS)) == list(range(MODULUS))


def test_exactly_one_candidate_reaches_the_target():
    rng = random.Random(1)
    for _ in range(300):
        puzzle = sample_puzzle(rng)
        assert sum(puzzle.chain(c)[-1] == puzzle.target for c in puzzle.candidates) == 1
        assert len(set(puzzle.operations)) == 3


def test_splits_are_disjoint_and_have_their_sizes():
    rng = random.Random(2)
    counts = {"train": 0, "validation": 0, "test": 0}
    for _ in range(4000):
        operations = tuple(rng.sample(OPERATIONS, 3))
        candidates = tuple(rng.sample(range(MODULUS), 3))
        counts[Puzzle(operations, candidates, candidates[0]).split()] += 1
    assert abs(counts["validation"] / 4000 - 0.05) < 0.015 and abs(counts["test"] / 4000 - 0.05) < 0.015
    assert {sample_puzzle(rng, "test").split() for _ in range(50)} == {"test"}
    with pytest.raises(ValueError, match="unknown split"):
        sample_puzzle(rng, "dev")


def test_first_words_tell_the_categories_apart():
    seen = {}
    for label in PARAPHRASES:
        for word in first_words(label):
            assert word not in seen, f"{word} opens {label} and {seen[word]}"
            seen[word] = label
    assert not {t.split()[0] for t in FRAME.values()} & set(seen)
    assert all(len(templates) == 4 for templates in PARAPHRASES.values())


@pytest.mark.parametrize("seed", range(5))
def test_teacher_is_right_and_its_labels_mean_what_they_say(seed):
    rng = random.Random(seed)
    for _ in range(100):
        puzzle = sample_puzzle(rng)
        trace = Teacher(rng).solve(puzzle)
        transcript = parsed(puzzle, words(trace))
        assert transcript.chain_correct and transcript.closed
        assert transcript.errors == transcript.errors_reflected and transcript.correct_steps_reflected == 0
        for sentence, following in zip(trace, trace[1:]):
            assert (following.label == "reflection") == sentence.error
            if sentence.label in PARAPHRASES:
                assert label_of(sentence.words) == sentence.label
        assert transcript.n_contrast == transcript.n_alternative == puzzle.candidates.index(puzzle.answer)
        assert transcript.n_reflection == sum(s.label == "reflection" for s in trace)
        assert transcript.t_deduction == sum(len(s.words) for s in trace if s.label == "deduction")


def test_shares_of_errors_and_checks():
    rng = random.Random(3)
    sentences = [s for _ in range(800) for s in Teacher(rng).solve(sample_puzzle(rng))]
    steps = [s for s in sentences if s.step >= 0 and s.label in ("deduction", "other")]
    tokens = sum(len(s.words) for s in sentences)
    assert 0.10 < sum(s.error for s in steps) / len(steps) < 0.15
    assert 0.15 < sum(len(s.words) for s in sentences if s.label == "verification") / tokens < 0.22


def test_a_teacher_with_a_mode_checks_and_reflects_as_its_mode_and_its_rates_say():
    rng, teacher, checks = random.Random(4), ModeTeacher(random.Random(5)), {True: [], False: []}
    careful, steps, errors, needless, chains = 0, 0, 0, 0, []
    for _ in range(2500):
        puzzle = sample_puzzle(rng)
        trace = teacher.solve(puzzle)
        assert parsed(puzzle, words(trace)).chain_correct
        careful += teacher.careful
        for sentence, following in zip(trace, trace[1:]):
            if sentence.step < 0 or sentence.label not in ("deduction", "other"):
                continue
            steps, errors = steps + 1, errors + sentence.error
            assert not sentence.error or following.label == "reflection"
            needless += following.label == "reflection" and not sentence.error
            if following.label != "reflection":
                checks[teacher.careful].append(following.label == "verification")
        if teacher.careful:
            runs = "".join("v" if s.label == "verification" else " " for s in trace).split()
            chains += [len(run) for run in runs]
    assert careful / 2500 == pytest.approx(0.3, abs=0.04)
    assert errors / steps == pytest.approx(0.15, abs=0.01)
    assert needless / (needless + errors) == pytest.approx(0.1, abs=0.02)
    assert sum(checks[True]) / len(checks[True]) == pytest.approx(0.85, abs=0.03)
    assert sum(checks[False]) / len(checks[False]) == pytest.approx(0.03, abs=0.01)
    assert sum(chains) / len(chains) == pytest.approx(1 / 0.35, abs=0.2) and max(chains) > 8
    lessons = [s for _ in range(1500) for s in teacher.solve(sample_puzzle(rng, operations=1)) if s.step >= 0]
    first = [s for s in lessons if s.label in ("deduction", "other")]
    assert sum(s.error for s in first) / len(first) == pytest.approx(0.5, abs=0.04)


RIGHT = (
    "think : first try 5 . start : 5 + 3 = 8 . so 8 * 4 = 13 . 13 - 2 gives 11 . but 11 is not 16 . instead"
    " try 11 . start : 11 + 3 = 14 . thus 14 * 4 = 17 . wait , 14 * 4 = 18 . so 18 - 2 = 16 . found 16 . done"
    " . answer : 11 ."
)


def split(text):
    out, parts = [], text.split()
    while parts:
        joined = " ".join(parts[:2])
        out.append(joined if joined in OPERATIONS else parts[0])
        parts = parts[2:] if joined in OPERATIONS else parts[1:]
    return out


def test_a_transcript_written_by_hand():
    transcript = parsed(PUZZLE, [*split(RIGHT), "<eos>", "so"])
    assert transcript.answer == 11 and transcript.correct and transcript.chain_correct
    assert (
        transcript.errors,
        transcript.errors_reflected,
        transcript.correct_steps,
        transcript.correct_steps_reflected,
    ) == (1, 1, 5, 0)
    assert transcript.n_deduction == 4 and transcript.n_reflection == 1 and transcript.n_contrast == 1
    assert transcript.thinking_tokens == split(RIGHT).index("done")


@pytest.mark.parametrize(
    ("old", "new", "correct"),
    [
        ("wait , 14 * 4 = 18 . so 18 - 2 = 16", "so 17 - 2 = 15", True),  # an error that is not mended
        ("wait , 14 * 4 = 18", "wait , 14 * 4 = 15", True),  # mended wrongly
        ("answer : 11", "answer : 5", False),  # the wrong candidate
        ("thus 14 * 4 = 17 . wait , 14 * 4 = 18 . ", "", True),  # a step left out
        ("so 18 - 2 = 16", "so 3 - 2 = 1", True),  # a value that comes from nowhere
        ("think : ", "", True),  # an answer without thinking
    ],
)
def test_a_lucky_answer_is_no_solution(old, new, correct):
    assert old in RIGHT
    transcript = parsed(PUZZLE, split(RIGHT.replace(old, new)))
    assert transcript.correct == correct and not transcript.chain_correct


def test_runaway_thought_has_no_length():
    transcript = parsed(PUZZLE, split(RIGHT.replace("done . answer : 11 .", "so 1 + 3 = 4 .")))
    assert not transcript.closed and transcript.answer is None and not transcript.correct


def test_a_garbled_end_is_read_all_the_same():
    transcript = parsed(PUZZLE, split(RIGHT.replace("done .", "done so .")))
    assert transcript.thinking_tokens == split(RIGHT).index("done") and transcript.correct


def test_easy_question():
    question = Question(5, "- 1")
    assert words(question.prompt()) == ["what", "is", "5", "- 1", "?"] and question.answer == 4
    transcript = parsed(
        question, split("think : start : 5 - 1 = 4 . let me check : 5 - 1 = 4 . done . answer : 4 .")
    )
    assert transcript.chain_correct and transcript.n_verification == 1
    assert words(direct(question)) == ["answer", ":", "4", "."]
    assert parsed(question, words(Teacher(random.Random(0)).solve(question))).chain_correct


def test_sentences_are_split_after_full_stops():
    assert sentences_of(split("think : first try 5 . so")) == [
        ("think", ":"),
        ("first", "try", "5", "."),
        ("so",),
    ]


def test_every_word_of_every_generator_is_in_the_vocabulary():
    rng, known = random.Random(4), set(prose.vocabulary())
    for _ in range(300):
        puzzle = sample_puzzle(rng)
        for sentence in [*puzzle.prompt(), *Teacher(rng).solve(puzzle), *prose.base_document(rng)]:
            assert set(sentence.words) <= known
