"""The search over crosscoders and layers: choices and differences by hand."""

from types import SimpleNamespace

import pandas as pd
import pytest
import torch

from lib.steering import plots, search
from lib.steering.steer import Direction


def found(ratios: dict[str, list[float]], within: bool = True):
    """A search of which only the chosen conditions matter: {aim: length ratio of each crosscoder}, and a
    reference that does far more."""
    rows = [
        {"aim": aim, "crosscoder": number, "length_ratio": ratio, "within_limits": within}
        for aim, values in ratios.items()
        for number, ratio in zip((search.REFERENCE, 0, 1), (9.0, *values))
    ]
    return search.Found("", None, {}, {}, {}, pd.DataFrame(), pd.DataFrame(rows), pd.DataFrame())


def test_the_better_layer_is_that_of_the_mean_over_crosscoders():
    half = found({"overthink": [1.2, 1.2], "incisive": [0.9, 0.9]})
    upper = found({"overthink": [1.1, 1.2], "incisive": [0.8, 0.95]})
    assert half.score("overthink") == pytest.approx(1.2)  # the reference does not count
    assert search.best_layer({"half": half, "upper": upper}, "overthink") == "half"
    assert search.best_layer({"half": half, "upper": upper}, "incisive") == "upper"
    beyond = found({"overthink": [3.0, 3.0], "incisive": [0.1, 0.1]}, within=False)
    assert beyond.score("overthink") == 1.0
    assert search.best_layer({"upper": beyond, "half": half}, "overthink") == "half"


def test_each_label_is_tried_with_the_signs_that_an_aim_has_for_it():
    directions = [Direction(c, c, torch.ones(2)) for c in ("reflection", "deduction", "contrast")]
    longer, shorter = (
        [(d.name, s) for d, s in search.signed(directions, [0.2, 0.4], aim)] for aim in search.AIMS
    )
    assert longer == [("reflection", 0.2), ("reflection", 0.4)]
    assert shorter == [("reflection", -0.2), ("reflection", -0.4), ("deduction", 0.2), ("deduction", 0.4)]


def test_length_difference_is_paired():
    lengths = {("none", 0.0): [10, 20], ("a", 0.2): [8, 18], ("b", -0.2): [9, 19]}
    thoughts = pd.DataFrame(
        [
            {"direction": name, "strength": strength, "task": task, "length": float(length)}
            for (name, strength), values in lengths.items()
            for task, length in enumerate(values)
        ]
    )
    a, b = ({"direction": d, "strength": s} for d, s in (("a", 0.2), ("b", -0.2)))
    value, low, high = search.length_difference(thoughts, a, b)
    assert value == pytest.approx(-1 / 15)
    assert (low, high) == pytest.approx((-1 / 10, -1 / 20))  # twice the first task, twice the second


def test_the_gallery_shows_the_extremes_and_the_median_beside_the_unsteered_and_noise():
    feature = Direction("feature 7", "reflection", torch.tensor([3.0, 4.0]))
    lengths = {("none", 0.0): [10, 10, 10, 10, 10], ("feature 7", 0.2): [12, 30, 10, 4, 11]}
    thoughts = pd.DataFrame(
        [
            {"direction": name, "strength": strength, "task": task, "length": float(length)}
            for (name, strength), values in lengths.items()
            for task, length in enumerate(values)
        ]
    )
    asked = []

    def transcripts(folder, tasks, direction, strength):
        asked.append((folder, direction, strength))
        return [[f"{direction and direction.name}", str(task)] for task in tasks]

    chosen = pd.DataFrame([{"aim": "overthink", "crosscoder": 0, "direction": "feature 7", "strength": 0.2}])
    steering = SimpleNamespace(transcripts=transcripts)
    at = search.Found(
        "half", None, {"stops": steering}, {"overthink": "stops"}, {"feature 7": feature}, None, chosen, None
    )
    written = search.gallery(at, "overthink", range(5), thoughts)
    assert list(written) == [3, 4, 1], "the shortest, the median, the longest"
    assert [list(texts.values()) for texts in written.values()][0] == [
        ["None", "3"], ["feature 7", "3"], ["random 0", "3"],
    ]  # fmt: skip
    (_, _, noise) = asked
    assert noise[0] == "half/stops/report" and noise[1].vector.norm() == pytest.approx(5) and noise[2] == 0.2
    thought = "so 4 + 5 = 10 . wait , 4 + 5 = 9 ."
    written = {"a < b": {"unsteered": thought.split(), "with <it>": ["so"] * 3}}
    text = plots.gallery(written, " ", n=2).data
    assert "a &lt; b" in text and "with &lt;it&gt;" in text and "(15 tokens)" in text and text.count("…") == 2
    text = plots.gallery(written, " ").data
    assert 'title="reflection"' in text and "wait , 4 + 5 = 9 ." in text
    alike = ["so"] * 30
    late = plots.gallery({"": {"unsteered": alike + ["10"], "steered": alike + ["9"]}}, " ", n=8).data
    assert "10" in late and "9" in late and late.count("… ") == 2, "cut around the first difference"
    assert "so4+5=10." in plots.gallery(written, "").data, "free text is joined as it was cut"


def test_limits_choose_by_aim():
    columns = {"direction": ["a", "b", "c"], "label": ["reflection", "reflection", "deduction"]}
    columns |= {"strength": [0.2, 0.4, 0.4], "length_ratio": [1.3, 1.9, 0.7], "runaway": [0.0, 0.6, 0.6]}
    table = pd.DataFrame(columns | {"accuracy_change": [0.0, 0.0, -0.02], "chain_change": 0.0})
    limits = search.Limits(0.25, 0.05, 0.25)
    assert limits.choose(table, "overthink")["direction"] == "a"
    assert limits.choose(table, "incisive")["direction"] == "c"  # thoughts that never end count in length


def test_directions_are_named_after_their_crosscoder():
    crosscoder = SimpleNamespace(rows=lambda model, raw: torch.eye(3), n_features=3)
    names = [
        search.direction_of(SimpleNamespace(crosscoder=crosscoder, number=n), 2, "contrast", 5.0).name
        for n in (0, 3)
    ]
    assert names == ["contrast 2", "contrast 2 of 3"]


def test_a_measure_that_no_thought_gives_has_no_panel():
    one = {"value": 1.2, "ci": [1.1, 1.3], "seeds": [[1.2, 1.1, 1.3]]}
    metrics = {"overthink_length_ratio_half": one, "random_length_ratio_half": one}
    curves, names = pd.DataFrame({"layer": ["half"]}), {"overthink": "over-thinking"}
    panels = {"length ratio": 1, "change of accuracy": 0}
    alone = {"value": 0.1, "ci": [0.0, 0.2]}  # of no single crosscoder
    for more in ({}, {"overthink_accuracy_change_half": one}, {"overthink_accuracy_change_half": alone}):
        fig, data = plots.steering(curves, metrics | more, names)
        drawn = [panels[measure] for measure in data["measure"].unique()]
        assert [line.y0 for line in fig.layout.shapes] == drawn[::-1]
