"""Token tests: the texts against their own claims, planted features of every verdict, causality, and a toy
pair from end to end.
"""

import random
import re
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from toys import toy_model, toy_store

from lib.crosscoder.model import CrossCoder
from lib.distil.organism import build_tokenizer
from lib.features import token_tests
from lib.features.table import Detector
from lib.labels import CATEGORIES, DETECTED
from lib.models.reader import capture
from lib.settings import UserError
from lib.stats import wilson
from lib.text.curriculum import prose, vocabulary
from lib.text.puzzles import NUMBERS, OPERATIONS, PARAPHRASES, first_words, label_of, sentences_of


def pair_of(models):
    """Of an embedded pair, all that is asked."""
    return SimpleNamespace(generated=True, load=models.get)


ALL_TELLTALES = {word for c in DETECTED for word in token_tests.telltales(c)}


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="module")
def frequencies(tokenizer):
    """What ``neutral_words`` needs of a store: kept tokens, here of prose."""
    rng, ids = random.Random(3), tokenizer.get_vocab()

    class Words:
        tokens = np.array([ids[w] for _ in range(100) for s in prose(rng) for w in s.words])
        kept = np.ones(len(tokens), dtype=bool)
        layers = {"base": 0, "distilled": 0}

    return Words


def matches(template, words):
    """Whether words fill a template, a value being one word."""
    pattern = re.escape(template).replace(r"\ ", " ")
    return re.fullmatch(re.sub(r"\\\{\w+\\\}", "(?:[-+*] )?[0-9]+", pattern), " ".join(words)) is not None


# --- texts --------------------------------------------------------------------------------------------------


def test_openings_by_hand():
    assert token_tests.openings("reflection") == (("wait", ","), ("hold", "on", ","), ("hmm", ","))
    assert token_tests.openings("deduction") == (("so",), ("therefore",), ("thus",))
    assert token_tests.openings("alternative") == (("instead", "try"), ("alternatively", "try"))
    assert token_tests.telltales("contrast") == {"but", "however", "yet"}
    for c in DETECTED:  # telltale and plain openings share out the paraphrases
        assert set(first_words(c)) == token_tests.telltales(c) | set(token_tests.PLAIN_OPENINGS[c])


def test_new_wordings_are_new_and_in_the_vocabulary():
    known = [t for ts in PARAPHRASES.values() for t in ts]
    for templates in token_tests.NEW_WORDINGS.values():
        for template in templates:
            words = template.split()
            assert template not in known and words[0] not in ALL_TELLTALES and words[-1] == "."
            assert {w for w in words if not w.startswith("{")} <= set(vocabulary())


def test_traces_are_tested_where_the_table_says():
    trials = token_tests.trace_trials(DETECTED, 40, random.Random(0))
    counts = pd.Series([(t.category, t.where, t.test) for t in trials]).value_counts()
    for c in DETECTED:
        for where in ("before", "marker"):
            assert (
                counts[c, where, "in context"]
                == counts[c, where, "other sentences"]
                == counts[c, where, "new wording"]
                == 40
            )
            both = counts.get((c, where, "telltale wording"), 0) + counts.get((c, where, "other wording"), 0)
            assert both == 40, "every sentence has a wording"
    for t in trials:
        sentences = sentences_of(list(t.words))
        begins = np.cumsum([0, *map(len, sentences)])
        # the sentence of c, or the other one
        number = int(np.searchsorted(begins, t.places[0] + (t.where == "before"), side="right")) - 1
        assert t.places == (
            (begins[number] - 1,) if t.where == "before" else tuple(begins[number] + np.arange(3))
        )
        own, read = sentences[number], sentences[number - (t.where == "before")]
        if t.test == "other sentences":
            assert label_of(own) != t.category
        elif t.test != "new wording" or t.where == "before":
            # the last is cut off by the text's end
            assert label_of(own) == t.category or number == len(sentences) - 1
        if t.test == "new wording":
            assert any(
                matches(template, read) for ts in token_tests.NEW_WORDINGS.values() for template in ts
            ), read
        if t.test == "telltale wording":
            assert read[0] in ALL_TELLTALES | {"start"}
        if t.test == "other wording":
            assert read[0] in {*NUMBERS, "that", "this", "perhaps", "next"}


def test_a_new_wording_says_the_same():
    trials = token_tests.trace_trials(("reflection",), 30, random.Random(1))
    by_where = {where: [t for t in trials if t.where == where] for where in ("before", "marker")}
    for old, new in zip(
        *([t for t in by_where["before"] if t.test == test] for test in ("in context", "new wording"))
    ):
        end = old.places[0]
        was, now = (sentences_of(list(t.words[: t.places[0] + 1]))[-1] for t in (old, new))
        numbers = [[w for w in s if w in NUMBERS or w in OPERATIONS] for s in (was, now)]
        assert numbers[0] == numbers[1], "the same operands, the same wrong value"
        assert old.words[: end + 1 - len(was)] == new.words[: new.places[0] + 1 - len(now)], (
            "and the same trace up to there"
        )


def test_prose_is_left_alone_but_for_the_injection(frequencies, tokenizer):
    words = {w for c in DETECTED for opening in token_tests.openings(c) for w in opening}
    neutral = token_tests.neutral_words(frequencies, tokenizer, sorted(words))
    assert "," not in neutral and all(len(others) == token_tests.NEAREST_WORDS for others in neutral.values())
    assert not {w for others in neutral.values() for w in others} & {
        w for c in DETECTED for t in PARAPHRASES[c] for w in t.split()
    }
    trials = token_tests.prose_trials(DETECTED, 20, random.Random(0), neutral)
    plain = [
        t for t in trials if t.test == "unrelated text" and t.category == "reflection" and t.where == "marker"
    ]
    assert len(plain) == 20 and sum(t.words[t.places[0] - 1] == "." for t in plain) == 10, (
        "by turns at a sentence's beginning"
    )
    for c in DETECTED:
        mine = {
            test: [t for t in trials if (t.category, t.where, t.test) == (c, "marker", test)]
            for test in ("injected", "neutral")
        }
        for old, put, other in zip(plain, mine["injected"], mine["neutral"]):
            cut = old.places[0]
            assert old.places == put.places == other.places == (cut, cut + 1, cut + 2)
            assert old.words[:cut] == put.words[:cut] == other.words[:cut], "the text before is the same"
            assert any(put.words[cut : cut + len(o)] == o[:3] for o in token_tests.openings(c))
            assert other.words[cut] not in ALL_TELLTALES and not set(old.words[cut:]) & {*ALL_TELLTALES, "."}
            assert [w == "," for w in put.words[cut:]].count(True) == [
                w == "," for w in other.words[cut:]
            ].count(True)
    stops = [t for t in trials if t.test == "full stops"]
    assert {t.where for t in stops} == {"before"} and all(t.words[t.places[0]] == "." for t in stops)


def test_neutral_words_are_of_like_frequency(tokenizer):
    ids = tokenizer.get_vocab()

    class Counted:  # three words as frequent as "wait", many that are rarer
        tokens = np.repeat(
            [ids[w] for w in ("wait", "tea", "bus", "key", "cat", "dog", "cow", "bird")],
            [50, 50, 49, 51, 3, 2, 1, 1],
        )
        kept = np.ones(len(tokens), dtype=bool)

    assert set(token_tests.neutral_words(Counted, tokenizer, ["wait"])["wait"][:3]) == {"tea", "bus", "key"}


def test_decoys_are_telltale_words_outside_traces():
    trials = token_tests.decoy_trials(DETECTED, 15, random.Random(0))
    assert len(trials) == 2 * 15 * len(DETECTED)
    for t in trials:
        assert t.words[t.places[0]] in token_tests.telltales(t.category) and not {"=", ":"} & set(t.words)


# --- planted features, one of each verdict ------------------------------------------------------------------


def planted(words):
    """Activations [words, 5] of a model whose residual stream is known: what features 0 to 4 fire on."""
    acts, failed, thinking = np.zeros((len(words), 5), dtype=np.float32), False, False
    for i, word in enumerate(words):
        thinking |= words[max(i - 1, 0) : i + 1] == ["think", ":"]
        failed = (failed or words[i - 1 : i + 1] == ["is", "not"]) and words[i - 1] != "."
        acts[i, 0] = word in ("so", "therefore", "thus")  # a word
        # what a failed comparison has said, in any words
        acts[i, 1] = word == "." and failed and words[i - 1] in NUMBERS
        acts[i, 2] = thinking and word in ("but", "however", "yet")  # some of the wordings of a contrast
        acts[i, 3] = 1  # nothing in particular
        acts[i, 4] = word == "."  # a full stop
    return acts


def rates_of(pair, store, crosscoder, chosen, tokenizer, markers, n, seed=0):
    """All tests of one crosscoder's features on texts of its own."""
    categories = list(dict.fromkeys([*chosen, *markers]))
    trials = token_tests.make_trials(pair, store, tokenizer, categories, n, seed)
    texts = token_tests.Texts(pair, store, tokenizer, trials)
    return token_tests.token_tests(texts, crosscoder, chosen, markers)


def test_planted_features_get_their_verdicts(frequencies, tokenizer, monkeypatch):
    def read(model, tokenizer, token_lists, layer):
        return torch.from_numpy(
            np.concatenate([planted(tokenizer.convert_ids_to_tokens(list(t))) for t in token_lists])
        )

    monkeypatch.setattr(token_tests, "capture", read)
    crosscoder = CrossCoder([5, 5], 6, variant="l1").requires_grad_(False)
    crosscoder.W_enc.copy_(torch.eye(6)[:, :5].repeat(1, 2))  # feature 5 never fires
    models = {"base": None, "distilled": None}
    chosen = {"alternative": 1, "reflection": 4, "contrast": 5}
    opening = {"deduction": 0, "contrast": 2, "verification": 3}
    tests = rates_of(pair_of(models), frequencies, crosscoder, chosen, tokenizer, opening, 25)
    rates = token_tests.verdicts(tests).set_index(["where", "category"])
    assert rates.loc["before"]["verdict"].to_dict() == {
        "alternative": "more than a token",
        "reflection": "token feature",
        "contrast": "hardly fires in context",
    }
    assert rates.loc["marker"]["verdict"].to_dict() == {
        "deduction": "token feature",
        "contrast": "bound to a wording",
        "verification": "fires anywhere",
    }
    word = rates.loc["marker", "deduction"]
    assert word[["telltale wording", "injected", "decoys"]].tolist() == [1, 1, 1]
    assert word[["other wording", "new wording", "neutral", "unrelated text"]].tolist() == [0, 0, 0, 0]
    function = rates.loc["before", "alternative"]
    assert function[["in context", "telltale wording", "other wording", "new wording"]].tolist() == [
        1,
        1,
        1,
        1,
    ]
    assert function[["other sentences", "injected", "neutral", "full stops", "decoys"]].tolist() == [
        0,
        0,
        0,
        0,
        0,
    ]
    bound = rates.loc["marker", "contrast"]
    assert bound["telltale wording"] == 1 and bound[
        ["other wording", "new wording", "injected", "decoys"]
    ].tolist() == [0, 0, 0, 0]
    row = tests[
        (tests["category"] == "contrast") & (tests["where"] == "marker") & (tests["test"] == "in context")
    ].squeeze()
    assert row["n"] == 25 and (row["low"], row["high"]) == wilson(round(row["rate"] * 25), 25)


def test_the_rule_by_hand():
    fine = {"in context": 0.8, "unrelated text": 0.1, "injected": 0.3, "decoys": 0.3}
    fine |= {"telltale wording": 0.8, "other wording": 0.5, "new wording": 0.5}
    cases = [
        ({}, "more than a token"),
        ({"in context": 0.09}, "hardly fires in context"),
        ({"unrelated text": 0.4}, "fires anywhere"),
        ({"injected": 0.4}, "token feature"),
        ({"decoys": 0.41}, "token feature"),
        ({"full stops": 0.9}, "token feature"),
        ({"new wording": 0.39}, "bound to a wording"),
        ({"other wording": 0.0}, "bound to a wording"),
        ({"other wording": np.nan, "full stops": np.nan}, "more than a token"),
        ({"in context": np.nan}, "not tested"),
    ]
    assert [token_tests.verdict(fine | change) for change, _ in cases] == [expected for _, expected in cases]
    assert token_tests.verdict({}) == "not tested"


# --- a toy pair, from end to end ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    store = toy_store(tmp_path_factory.mktemp("markers"), tokens=4000)
    crosscoder = CrossCoder([16, 24], 20, store.models, k=4, scales=[store.scales[m] for m in store.models])
    crosscoder.threshold.fill_(0.01)
    models = {"base": toy_model(16, 0), "distilled": toy_model(24, 1)}  # those of toy_pair
    return store, crosscoder.requires_grad_(False), models


def test_firing_against_one_text_at_a_time(toy, tokenizer):
    store, crosscoder, models = toy
    trials = token_tests.trace_trials(("deduction", "reflection"), 2, random.Random(0))[::4]
    texts = token_tests.Texts(pair_of(models), store, tokenizer, trials)
    found, at_value = (texts.fire(crosscoder, [3, 11, 0], place) for place in ("before", "value"))
    for trial, fires, value in zip(trials, found, at_value):
        ids = tokenizer.convert_tokens_to_ids(["<bos>", *trial.words])
        f = crosscoder.encode(
            [capture(models[m], tokenizer, [ids], store.layers[m]) for m in store.models]
        ).numpy()
        assert fires.tolist() == [any(f[p + 1, feature] > 0 for p in trial.places) for feature in (3, 11, 0)]
        # an end of a sentence is read one token earlier, first tokens where they are
        back = trial.where == "before"
        earlier = [any(f[p + 1 - back, feature] > 0 for p in trial.places) for feature in (3, 11, 0)]
        assert value.tolist() == earlier
    assert 0 < found.mean() < 1 and (found != at_value).any()


def test_words_do_not_act_backwards(toy, tokenizer):
    store, crosscoder, models = toy
    words = [w for s in prose(random.Random(5)) for w in s.words]
    cut = words.index(".") + 1
    trials = [
        token_tests.Trial("reflection", "before", "", tuple(text), (p,))
        for p in range(1, cut)
        for text in (words, [*words[:cut], "wait", ",", *words[cut:]])
    ]
    found = token_tests.Texts(pair_of(models), store, tokenizer, trials).fire(crosscoder, range(20))
    assert np.array_equal(found[::2], found[1::2]) and found.any()


def test_end_to_end_on_a_toy_pair(toy, tokenizer):
    store, crosscoder, models = toy
    chosen = dict(zip(CATEGORIES, (1, 2, 3, 3)))
    how = pair_of(models), store, crosscoder, chosen, tokenizer, {"reflection": 7}, 6
    tests = rates_of(*how)
    assert (
        (tests["n"] <= 6).all()
        and tests["rate"].between(0, 1).all()
        and (tests["low"] <= tests["rate"]).all()
    )
    assert set(tests["test"]) <= set(token_tests.TESTS) and len(
        tests.drop_duplicates(["category", "where", "test"])
    ) == len(tests)
    pd.testing.assert_frame_equal(tests, rates_of(*how))
    # a detector that falls silent "fires" where it is silent
    trials = token_tests.make_trials(how[0], store, tokenizer, ["contrast"], 6)
    texts = token_tests.Texts(how[0], store, tokenizer, trials)
    loud, silent = (
        token_tests.token_tests(texts, crosscoder, {"contrast": Detector(3, "before", sign)})
        for sign in (1, -1)
    )
    both = silent.merge(loud, on=["category", "where", "test"])
    assert len(both) and np.allclose(both["rate_x"] + both["rate_y"], 1)
    wide = token_tests.verdicts(tests)
    assert wide[["category", "where"]].values.tolist() == [
        *([c, "before"] for c in CATEGORIES),
        ["reflection", "marker"],
    ]
    assert wide["feature"].tolist() == [1, 2, 3, 3, 7]


def test_nothing_chosen_and_nonsense(toy, tokenizer):
    store, crosscoder, models = toy
    pair = pair_of(models)
    empty = token_tests.token_tests(None, crosscoder, {})
    assert empty.empty and token_tests.verdicts(empty).empty and "verdict" in token_tests.verdicts(empty)
    with pytest.raises(UserError, match="no texts for the category 'joy'"):
        rates_of(pair, store, crosscoder, {"joy": 1}, tokenizer, {}, 5)
    with pytest.raises(UserError, match="feature 99 does not exist"):
        rates_of(pair, store, crosscoder, {"contrast": 99}, tokenizer, {}, 5)
    with pytest.raises(UserError, match="n is 0"):
        rates_of(pair, store, crosscoder, {"contrast": 1}, tokenizer, {}, 0)
    with pytest.raises(UserError, match="not single tokens"):
        unknown = token_tests.Trial("contrast", "marker", "", ("xylophone",), (0,))
        token_tests.Texts(pair, store, tokenizer, [unknown])
