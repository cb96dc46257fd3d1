"""Claims and their file: order, round trip, and a sentence for each mistake."""

import json

import numpy as np
import pytest

from lib.finders.claims import MOST, Claims, read_claims, write_claims
from lib.settings import UserError


def some():
    return Claims.of(
        [[0, 0], [1, 2], [0, 1]], [[3, 4], [0, 0], [0, 0]], ["distilled", "base", "base"], [0.2, 0.9, np.nan]
    )


def test_claims_stand_in_the_order_of_confidence_and_nan_is_none():
    claims = some()
    assert claims.confidence.tolist() == [0.9, 0.2, 0] and claims.side.tolist() == [
        "base",
        "distilled",
        "base",
    ]
    assert claims.own("distilled") == pytest.approx(np.array([[0.6, 0.8]]))
    assert claims.own("base")[1].tolist() == [0, 1]


def test_the_most_confident_are_kept_and_equals_stay_in_their_order():
    rows = np.arange(1, MOST + 11)[:, None]
    claims = Claims.of(0 * rows, rows, ["distilled"] * len(rows), np.full(len(rows), 0.5))
    assert claims.directions["distilled"][:, 0].tolist() == list(range(1, MOST + 1))


def test_a_file_gives_back_what_was_written(tmp_path):
    sets = {("easy", 0, False): some(), ("easy", 0, True): Claims.of(*np.empty((2, 0, 2)), [], [])}
    name, found = read_claims(write_claims(tmp_path / "claims.json", "mine", sets), {"easy": 2})
    assert name == "mine" and found.keys() == sets.keys() and len(found["easy", 0, True]) == 0
    for side, rows in some().directions.items():
        assert found["easy", 0, False].directions[side] == pytest.approx(rows)
    assert found["easy", 0, False].confidence == pytest.approx([0.9, 0.2, 0])


GOOD = {"side": "distilled", "confidence": 0.5, "distilled": [1.0, 0.0]}


def changed(**values):
    row = GOOD | values
    return [{name: value for name, value in row.items() if value is not None}]


@pytest.mark.parametrize(
    "claims, words",
    [
        (changed(side="both"), "set 0, claim 0: side is 'both': it must be one of base, distilled"),
        (changed(confidence=1.5), "claim 0: confidence is 1.5: it must be a number from 0 to 1"),
        (changed(confidence=None), "claim 0 has no 'confidence'"),
        (changed(distilled=None), "claim 0 has no direction in its own model"),
        (changed(distilled=[0.0, 0.0]), "claim 0 has no direction in its own model"),
        (changed(distilled=[1.0, 2.0, 3.0]), "distilled has 3 numbers: it must have 2"),
        (changed(distilled=[1.0, "x"]), "distilled is [1.0, 'x']: it must be a list"),
        (changed(distilled=[1.0, float("nan")]), "it must be a list"),
        (changed() + ["x"], "claim 1 is a str: it must be a mapping"),
        ({}, "claims is {}: it must be a list"),
    ],
)
def test_a_wrong_claim_costs_a_sentence_that_says_where_it_is(tmp_path, claims, words):
    path = tmp_path / "claims.json"
    place = {"truth": "easy", "seed": 0, "null": False, "claims": claims}
    path.write_text(json.dumps({"finder": "mine", "sets": [place]}))
    with pytest.raises(UserError) as error:
        read_claims(path, {"easy": 2})
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text, words",
    [
        ("{", "is not valid JSON"),
        ("[]", "is a list: it must be a mapping with finder, sets"),
        ('{"finder": "mine"}', "has no 'sets'"),
        ('{"finder": "mine", "sets": []}', "has no sets"),
        ('{"finder": 7, "sets": [{}]}', "finder is 7"),
        ('{"finder": "mine", "sets": [{"truth": "easy", "seed": 0, "claims": []}]}', "set 0 has no 'null'"),
        (
            '{"finder": "m", "sets": [{"truth": "hard", "seed": 0, "null": false, "claims": []}]}',
            "truth is 'hard': it must be one of easy",
        ),
        (
            '{"finder": "m", "sets": ['
            + ", ".join(2 * ['{"truth": "easy", "seed": 0, "null": false, "claims": []}'])
            + "]}",
            "set 1: truth 'easy', seed 0, null False is there twice",
        ),
    ],
)
def test_a_wrong_file_costs_a_sentence(tmp_path, text, words):
    path = tmp_path / "claims.json"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        read_claims(path, {"easy": 2})
    assert words in str(error.value)
