"""Kinds of parameters: what is refused, in which words, and that nothing is changed."""

from dataclasses import FrozenInstanceError, fields, replace
from typing import Literal

import numpy as np
import pytest

from lib.runs import fingerprint
from lib.settings import Count, Positive, Share, UserError, check, integer, parameters


@pytest.mark.parametrize(
    "value, rule, sentence",
    [
        (0, dict(kind=int, low=1), "k is 0: it must be an integer of at least 1"),
        (2.0, dict(kind=int), "k is 2.0: it must be an integer"),
        (True, dict(kind=int), "k is True: it must be an integer"),
        ("3", dict(kind=float), "k is '3': it must be a number"),
        (float("nan"), dict(kind=float), "k is nan: it must be a number"),
        (float("inf"), dict(kind=float, low=0), "k is inf: it must be a number of at least 0"),
        (1.5, dict(kind=float, low=0, high=1), "k is 1.5: it must be a number from 0 to 1"),
        (1, dict(kind=bool), "k is 1: it must be True or False"),
        (None, dict(kind=int), "k is None: it must be an integer"),
        ("l2", dict(kind=str, choices=("l1", "batchtopk")), "k is 'l2': it must be one of l1, batchtopk"),
        ([1, -2], dict(kind=list, low=0), "k is [1, -2]: it must be a list, every entry of at least 0"),
        ("ab", dict(kind=list), "k is 'ab': it must be a list"),
    ],
)
def test_check_refuses_in_one_sentence(value, rule, sentence):
    with pytest.raises(UserError) as error:
        check("k", value, **rule)
    assert str(error.value) == sentence


def test_check_returns_what_is_right():
    assert check("k", 1, float, low=1) == 1
    assert check("k", np.int64(4), int, low=1, high=4) == 4
    assert check("k", None, integer(1) | None) is None
    assert check("k", [0.1, 0.5], list, low=0, high=1) == [0.1, 0.5]


@parameters
class Recipe:
    width: Positive = 8
    rate: Share = 0.5
    variant: Literal["topk", "l1"] = "topk"
    layer: Count | None = None

    def __post_init__(self) -> None:
        check("rate", self.rate, float, high=1 / self.width)


@pytest.mark.parametrize(
    "wrong, sentence",
    [
        (dict(width=0), "width is 0: it must be an integer of at least 1"),
        (dict(width=True), "width is True: it must be an integer of at least 1"),
        (dict(variant="l2"), "variant is 'l2': it must be one of topk, l1"),
        (dict(layer=-1), "layer is -1: it must be an integer of at least 0 or None"),
        (
            dict(layer="None"),
            "layer is 'None': it must be an integer of at least 0 or None (papermill's -p makes text of it:"
            " give it with -y)",
        ),
        (dict(width=1, rate=2), "rate is 2: it must be a number from 0 to 1"),
        (dict(width=4, rate=0.5), "rate is 0.5: it must be a number of at most 0.25"),
    ],
)
def test_a_class_of_parameters_refuses_in_one_sentence(wrong, sentence):
    with pytest.raises(UserError) as error:
        Recipe(**{"width": 1} | wrong)
    assert str(error.value) == sentence


def test_a_class_of_parameters_is_a_frozen_dataclass_that_changes_no_value():
    recipe = Recipe(np.int64(1), 1)
    assert [f.name for f in fields(Recipe)] == ["width", "rate", "variant", "layer"]
    assert type(recipe.width) is np.int64 and type(recipe.rate) is int
    assert fingerprint(recipe) == fingerprint(Recipe(1, 1)) != fingerprint(Recipe(1, 1.0))
    with pytest.raises(FrozenInstanceError):
        recipe.width = 2
    with pytest.raises(UserError, match="width is 0"):
        replace(recipe, width=0)


def test_a_notebook_shows_the_sentence_alone():
    assert UserError("k is 0: it must be 1")._render_traceback_() == ["UserError: k is 0: it must be 1"]
    assert check("facts", {"layer": 1}, dict[str, int]) == {"layer": 1}
    with pytest.raises(UserError, match="facts is 'layer: 1': it must be a mapping, .* give it with -y"):
        check("facts", "layer: 1", dict[str, int])
