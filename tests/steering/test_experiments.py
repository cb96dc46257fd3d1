"""Interventions on whole thoughts: what is chosen, what is counted and how it is compared, by hand and on
toys.
"""

import random

import numpy as np
import pandas as pd
import pytest
import torch
from toys import toy_model, toy_pair, toy_store

from lib.crosscoder.model import CrossCoder
from lib.distil import trials
from lib.labels import CATEGORIES, LABELS
from lib.settings import UserError
from lib.stats import wilson
from lib.steering import effects, generate, plots
from lib.steering import experiments as causal
from lib.steering.experiments import Condition
from lib.steering.generate import Treatment
from lib.steering.interventions import LogitBias, Scale
from lib.text.puzzles import Puzzle, Teacher

PUZZLE = Puzzle(("+ 3", "* 4", "- 2"), (5, 11, 2), 11)  # 5: 8 13 11;  11: 14 18 16;  the target is 16


def table(n=12):
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"feature": range(n), "alive": True, "nrn": np.linspace(0.45, 0.9, n)})
    return frame.assign(
        frequency_choose=rng.uniform(0.01, 0.2, n),
        **{f"auroc_{c}_choose": rng.uniform(0.55, 1, n) for c in CATEGORIES},
        **{f"auroc_value_{c}_choose": 0.5 for c in CATEGORIES},
    )


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toys")
    store, pair = toy_store(folder, 3000, widths=(16, 16)), toy_pair(folder, widths=(16, 16))
    crosscoder = CrossCoder((16, 16), 12, k=3, scales=tuple(store.scales.values()), seed=1).requires_grad_(
        False
    )
    crosscoder.centre(list(store.means.values()))
    crosscoder.W_enc += 0.1 * torch.randn(crosscoder.W_enc.shape, generator=torch.Generator().manual_seed(0))
    return store, pair, crosscoder, {name: pair.load(name) for name in crosscoder.names}


# --- choosing -----------------------------------------------------------------------------------------------


def test_category_sets_take_the_best_alive_features_of_the_distilled_side():
    frame = pd.DataFrame(
        {"feature": [3, 4, 5, 6], "alive": [True, True, False, True], "nrn": [0.6, 0.4, 0.9, 0.8]}
    )
    frame = frame.assign(
        frequency_choose=0.1,
        auroc_reflection_choose=[0.7, 0.99, 0.99, 0.5],
        auroc_value_reflection_choose=[0.5, 0.9, 0.9, 0.8],  # at the better place 6 is ahead of 3
        auroc_contrast_choose=[0.4, 0.9, 0.9, 0.6],
        auroc_value_contrast_choose=0.4,
    )
    names = ("reflection", "contrast")
    assert causal.category_sets(frame, 2, categories=names) == {"reflection": (6, 3), "contrast": (6,)}
    # a category without one is left out
    without = frame.assign(auroc_contrast_choose=0.3)
    assert causal.category_sets(without, 2, 0.7, names) == {"reflection": (6,)}
    # of several crosscoders, only features that other ones have too
    followed = frame.assign(recurrent=[True, True, True, False])
    assert causal.category_sets(followed, 2, categories=names) == {"reflection": (3,)}


def test_use_is_read_from_each_model_alone_token_by_token(toys):
    store, _, crosscoder, _ = toys
    use = causal.measure_use(crosscoder, store, "train", max_tokens=None)
    rows = [r for r in store.rows("train") if store.labels["kind"][r] == 1]
    acts = dict(zip(store.models, store.activations(rows)))
    for name in crosscoder.names:
        f = torch.stack([crosscoder.encode_from(name, x[None])[0] for x in acts[name]])
        np.testing.assert_allclose(use.table[f"use_{name}"], f.double().mean(0), rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(use.table[f"frequency_{name}"], (f > 0).double().mean(0), atol=1e-6)
        x_hat = dict(zip(crosscoder.names, crosscoder.decode(f)))[name]
        mean = store.means[name].float()
        assert use.fve[name] == pytest.approx(
            1 - float((acts[name] - x_hat).square().sum() / (acts[name] - mean).square().sum()), abs=1e-4
        )
    joint = crosscoder.encode([acts[name] for name in crosscoder.names]).double()
    np.testing.assert_allclose(use.table["use_joint"], joint.mean(0), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(use.table["frequency_joint"], (joint > 0).double().mean(0), atol=1e-6)


def test_gains_are_bounded_and_turn_around():
    use = causal.Use(
        pd.DataFrame({"use_base": [1.0, 2.0, 0.0, 0.0, 1.0], "use_distilled": [3.0, 1.0, 5.0, 0.0, 50.0]}), {}
    )
    assert use.gains(range(5)).tolist() == [3.0, 0.5, causal.GAIN, 1.0, causal.GAIN]
    assert use.gains([0, 1, 2, 4], "distilled").tolist() == pytest.approx([1 / 3, 2.0, 0.0, 0.02])


def test_mean_differences_are_those_of_sentence_ends(toys):
    store = toys[0]
    found = causal.mean_differences(store, "distilled", "train", ("contrast",))["contrast"]
    before, other = [], []
    for r in store.rows("train"):
        if store.labels["kind"][r] == 1 and store.labels["ends"][r] == 1:
            (before if store.labels["next_label"][r] == LABELS.index("contrast") else other).append(
                store.activations([r])[1][0]
            )
    np.testing.assert_allclose(found, torch.stack(before).mean(0) - torch.stack(other).mean(0), atol=1e-4)


def test_random_sets_have_like_frequencies_and_are_others():
    frame = pd.DataFrame({"feature": range(200), "frequency_choose": np.geomspace(1e-4, 0.5, 200)})
    chosen = (5, 60, 61, 180)
    drawn = causal.random_set(frame, chosen, seed=1)
    assert len(set(drawn)) == 4 and not set(drawn) & set(chosen)
    assert all(abs(a - b) <= 12 for a, b in zip(drawn, chosen))
    assert drawn != causal.random_set(frame, chosen, seed=2)
    # more than half of all: some are drawn again
    assert len(set(causal.random_set(frame, range(150)))) == 150


def test_conditions_have_names_of_their_own_and_the_reverse_has_the_inverse_gain():
    frame, crosscoder = table(), CrossCoder((4, 4), 12, k=2)
    use = causal.Use(
        pd.DataFrame(
            {
                "use_joint": 0.1,
                "frequency_joint": np.linspace(0.2, 0.01, 12),
                "use_base": 2.0,
                "use_distilled": 3.0,
            },
            index=range(12),
        ),
        {},
    )
    sets, vectors = causal.category_sets(frame, 2), {c: (1.0, 0, 0, 0) for c in CATEGORIES}
    attributed = {"contrast": [0, 1, 2]}
    frame["nrn"] = 0.5
    made = causal.conditions(frame, sets, attributed, use, vectors, unique=[1, 2], reweighted=[2, 4])
    assert len({c.name for c in made}) == len(made)
    both = [c for c in made if (c.family, c.kind, c.target) == ("impose", "gain", "both")]
    gains = {c.treatment.writer: c.treatment.intervention for c in both}
    assert (
        gains["base"].features == (1, 2, 4)
        and gains["base"].weights == pytest.approx((0.5,) * 3)
        and gains["base"].source == "own"
    )
    assert gains["distilled"].weights == pytest.approx((-1 / 3,) * 3)
    ablated = [c for c in made if c.family == "ablate"]
    assert {c.treatment.place for c in ablated if c.kind != "logit bias"} == {"thinking"}
    references = {(c.kind, c.treatment.intervention.reference) for c in ablated if "random" in c.kind}
    assert references == {("features, random", Scale(chosen)) for chosen in sets.values()} | {
        ("attributed, random", Scale((0, 1, 2)))
    }
    frequency = use.table["frequency_joint"]
    # falls with the number: the nearest are the neighbours
    for condition in (c for c in ablated if c.kind == "features, matched"):
        control, chosen = condition.treatment.intervention.features, sets[condition.target]
        assert len(control) == len(chosen) and not set(control) & set(chosen)
        assert abs(np.log(frequency[list(control)]).sum() - np.log(frequency[list(chosen)]).sum()) < 4
    assert {c.treatment.place for c in made if c.family in ("swap", "impose")} == {"everywhere"}
    # what is the same with every crosscoder
    placed = causal.strengthenings(crosscoder, sets, vectors, 1.0)
    same = {c.kind for c in (*made, *placed) if not c.of_crosscoder}
    assert same == {"untouched", "logit bias", "feature", "mean difference", "random"}
    assert {c.kind for c in placed if c.of_crosscoder} == {"amplify"}


# --- placement ----------------------------------------------------------------------------------------------


def test_what_each_sentence_end_calls_for():
    words = (
        "think : first try 5 . start : 5 + 3 = 9 . wait , 5 + 3 = 8 . so 8 * 4 = 13 . let me check : 8 * 4 ="
        " 13 . 13 - 2 gives 12 . but 12 is not 16 . that should be 11 . this is not 16 . instead try 11 ."
        " start : 11 + 3 = 14 . but 14 is not 16 . next is 2 . done . answer : 2 .".replace("+ 3", "+_3")
        .replace("* 4", "*_4")
        .replace("- 2", "-_2")
        .split()
    )
    found = causal.placements(PUZZLE, [w.replace("_", " ") for w in words])
    assert found == [
        ("other", "other"),
        ("other", "other"),
        ("reflection", "reflection"),
        ("deduction", "deduction"),
        ("deduction", "verification"),
        ("deduction", "deduction"),
        ("reflection", "contrast"),
        ("alternative", "reflection"),
        ("contrast", "contrast"),
        ("alternative", "alternative"),
        ("other", "other"),
        ("deduction", "contrast"),
        ("alternative", "alternative"),
        ("other", "other"),
    ]


def test_the_teacher_places_every_sentence_where_it_is_called_for():
    rng, ends = random.Random(0), []
    for task in trials.puzzles(40, "test"):
        ends += causal.placements(task, [w for s in Teacher(rng).solve(task) for w in s.words])
    assert all(call == label for call, label in ends if label in CATEGORIES)
    assert {label for call, label in ends if call == "reflection"} == {"reflection"}
    assert {call for call, _ in ends} == {*CATEGORIES, "other"}


# --- comparing ----------------------------------------------------------------------------------------------


def rows_of(name, family, speaker, values, **more):
    """Rows of one condition: ``values`` {column: one number per puzzle}."""
    columns = {column for pair in effects.MEASURES.values() for column in pair} - {effects.ONE}
    frame = pd.DataFrame({c: 1.0 for c in columns}, index=range(len(next(iter(values.values())))))
    head = {
        "condition": name,
        "family": family,
        "kind": name,
        "target": "",
        "speaker": speaker,
        "mode": "free",
        "strength": np.nan,
        **more,
    }
    return frame.assign(**values, **head, task=frame.index)


def test_changes_are_paired_and_rates_are_ratios_of_sums():
    n = 50
    errors = np.arange(n) % 3
    plain = rows_of(
        "untouched",
        "untouched",
        "base",
        {"correct": np.arange(n) % 2, "errors": errors, "errors_reflected": errors},
    )
    worse = rows_of(
        "ablated",
        "ablate",
        "base",
        {"correct": 0.0 * errors, "errors": errors, "errors_reflected": errors > 1},
    )
    shifted = rows_of("shifted", "ablate", "base", {"length": plain["length"] + 7.0, "errors": 0.0 * errors})
    summary = effects.summarise(pd.concat([plain, worse, shifted]), 200).set_index(["condition", "measure"])
    row = summary.loc["ablated", "accuracy"]
    assert (row["value"], row["change"]) == (0.0, -0.5) and row["change_low"] < -0.5 < row[
        "change_high"
    ] < -0.2
    assert summary.loc["ablated", "p_reflection_error"]["value"] == pytest.approx(
        (errors > 1).sum() / errors.sum()
    )
    every, names = pd.concat([plain, worse, shifted]), (("ablate", "shifted"), ("ablate", "ablated"))
    value, (low, high) = effects.difference(every, *names, "length")
    assert value == pytest.approx(float((shifted["length"] - worse["length"]).mean()))
    assert low <= value <= high
    assert effects.difference(every, names[0], ("ablate", "nothing"), "length") == (0.0, (0.0, 0.0))
    row = summary.loc["shifted", "length"]
    # paired: no spread at all
    assert row["change"] == row["change_low"] == row["change_high"] == pytest.approx(7.0)
    assert np.isnan(summary.loc["shifted", "p_reflection_error"]["value"])
    assert np.isnan(summary.loc["shifted", "p_reflection_error"]["change_low"])


def test_shares_of_a_gap_and_gaps_that_are_none():
    n = 100
    thinks = {"base": np.arange(n) < 10, "distilled": np.arange(n) < 90}
    plain = [
        rows_of(f"untouched {name}", "untouched", name, {"thinking": 1.0 * v, "correct": np.arange(n) % 2})
        for name, v in thinks.items()
    ]
    half = rows_of("half", "swap", "base", {"thinking": 1.0 * (np.arange(n) < 50)})
    back = rows_of("back", "swap", "distilled", {"thinking": 1.0 * (np.arange(n) < 70)})
    found = effects.gap_shares(pd.concat([*plain, half, back]), ("thinking", "accuracy"), 300).set_index(
        ["condition", "measure"]
    )
    assert found.loc["half", "thinking"]["share"] == pytest.approx(0.5)
    assert found.loc["back", "thinking"]["share"] == pytest.approx(0.25)
    low, high = found.loc["half", "thinking"][["low", "high"]]
    assert 0.3 < low < 0.5 < high < 0.7
    assert np.isnan(found.loc["half", "accuracy"]["share"])  # both models have half of them right: no gap

    numbers = effects.metrics(pd.concat([*plain, half]), 50)
    assert numbers["swap_forward"]["value"] is None  # kinds and targets are none of the study's
    swapped = rows_of("x", "swap", "base", {"thinking": 1.0 * (np.arange(n) < 50)}, kind="swap", target="all")
    answers = rows_of(
        "y", "swap", "distilled", {"answers": 1.0 * (np.arange(n) < 50)}, kind="swap", target="all"
    )
    plain[1]["answers"] = 0.0
    every = pd.concat([*plain, swapped, answers])
    numbers = effects.metrics(every, 50)
    assert numbers["swap_forward"]["value"] == pytest.approx(0.5)
    assert numbers["swap_backward_answers"]["value"] == pytest.approx(0.5)
    assert numbers["impose_shared_over_unique"] == {"value": None, "ci": None, "n": n}
    shares = effects.gap_shares(every, n_boot=100)
    # with "think :" given nobody answers at once: no gap
    drawn = plots.gap_shares(shares, shares, "swap")
    assert {a.text for a in drawn.layout.annotations} == {"base writes", "distilled writes"}


def test_categories_are_counted_by_both_intervals():
    n = 40
    right = np.arange(n) % 4 > 0
    plain = rows_of("untouched", "untouched", "distilled", {"correct": 1.0 * right})

    def removed(c, kind, correct):
        return rows_of(f"{kind} {c}", "ablate", "distilled", {"correct": correct}, kind=kind, target=c)

    fewer, none = 1.0 * (right & (np.arange(n) % 4 > 1)), np.zeros(n)
    rows = [plain]
    rows += [removed("reflection", "features", fewer), removed("reflection", "features, random", 1.0 * right)]
    # as much as random directions do: not counted
    rows += [removed("contrast", "features", none), removed("contrast", "features, random", none)]
    rows += [removed("contrast", "attributed", none)]  # without a control: not counted
    numbers = effects.metrics(pd.concat(rows), 200)
    assert numbers["ablate_accuracy_reflection"]["value"] == pytest.approx(-0.25)
    assert numbers["ablate_accuracy_reflection_over_random"]["value"] == pytest.approx(-0.25)
    assert numbers["ablate_accuracy_contrast"]["value"] == pytest.approx(-0.75)
    assert numbers["ablate_accuracy_contrast_over_random"]["ci"] == [0.0, 0.0]
    assert numbers["worse_categories"]["value"] == 1
    assert numbers["ablate_accuracy_random"]["value"] == pytest.approx(-0.375)  # of both categories
    assert numbers["worse_categories_attributed"]["value"] == 0


def test_shares_by_layers_are_of_the_gap_without_a_transplant():
    n, rows = 50, []
    for speaker, thinkers in {"base": (0, 10, 50), "distilled": (40, 20, 0)}.items():
        for layers, count in enumerate(thinkers):
            values = {"thinking": 1.0 * (np.arange(n) < count)}
            rows.append(rows_of(f"{speaker} {layers}", "untouched", speaker, values, kind=layers))
    rows = pd.concat(rows[::-1])  # in any order
    table = effects.by_layers(rows, ("thinking",)).set_index(["upper", "layers"])
    assert table.loc["base"]["share"].tolist() == pytest.approx([0, 0.25, 1.25])
    assert table.loc["distilled"]["share"].tolist() == pytest.approx([0, 0.5, 1.0])
    low, high = wilson(10, 50)
    assert table.loc[("base", 1), ["low", "high"]].tolist() == pytest.approx([low, high])
    assert table.loc[("base", 1), ["share_low", "share_high"]].tolist() == pytest.approx(
        [low / 0.8, high / 0.8]
    )
    low, high = wilson(20, 50)  # more thinkers is less of the gap
    assert table.loc[("distilled", 1), ["share_low", "share_high"]].tolist() == pytest.approx(
        [(0.8 - high) / 0.8, (0.8 - low) / 0.8]
    )


def test_pooled_controls_are_means_over_the_categories():
    parts = [
        rows_of(f"random {c}", "ablate", "distilled", {"correct": values}, kind="random", target=c)
        for c, values in (("reflection", [1.0, 0.0]), ("contrast", [1.0, 1.0]))
    ]
    made = effects.pooled(pd.concat(parts), "random")
    assert made.sort_values("task")["correct"].tolist() == [1.0, 0.5]
    assert made["target"].unique().tolist() == ["pooled"] and made["condition"].nunique() == 1


def test_specificity_is_a_relative_change():
    n = 20
    plain = rows_of(
        "untouched",
        "untouched",
        "distilled",
        {"n_reflection": np.full(n, 4.0), "n_contrast": np.full(n, 2.0)},
    )
    parts = [
        rows_of(
            c,
            "ablate",
            "distilled",
            {"n_reflection": np.full(n, 1.0), "n_contrast": np.full(n, 3.0)},
            kind="features",
            target=c,
        )
        for c in CATEGORIES
    ]
    matrix = effects.specificity(effects.summarise(pd.concat([plain, *parts]), 20))
    assert matrix.loc["deduction", "reflection"] == pytest.approx(-0.75) and matrix.loc[
        "reflection", "contrast"
    ] == pytest.approx(0.5)
    assert plots.specificity_of_removal(matrix).data[0].z.shape == (4, 4)


def test_additional_sentences_that_stand_where_they_belong():
    n, head = 30, {"mode": "think"}
    counts = {
        "met_reflection": 1.0,
        "calls_reflection": 2.0,
        "strays_reflection": 0.5,
        "rest_reflection": 8.0,
        "n_reflection": 1.5,
    }
    plain = rows_of(
        "untouched", "untouched", "distilled", {k: np.full(n, v) for k, v in counts.items()}, **head
    )
    more = counts | {"met_reflection": 1.75, "strays_reflection": 0.75, "n_reflection": 2.5}
    added = rows_of(
        "feature",
        "place",
        "distilled",
        {k: np.full(n, v) for k, v in more.items()},
        target="reflection",
        **head,
    )
    row = (
        effects.extra_placed(pd.concat([plain, added]), 50)
        .set_index(["kind", "target"])
        .loc["feature", "reflection"]
    )
    assert (
        row["extra"] == pytest.approx(1.0)
        and row["extra_placed"] == pytest.approx(0.75)
        and row["chance"] == pytest.approx(0.2)
    )
    assert row["met"] == pytest.approx(1.75 / 2) and row["strays"] == pytest.approx(0.75 / 8)


def test_strengths_are_matched_by_interpolation():
    def rows(family, kind, strength, rate):
        return pd.DataFrame(
            {
                "family": family,
                "kind": kind,
                "target": "contrast",
                "strength": strength,
                "n_contrast": [rate, rate],
            }
        )

    tried = pd.concat(
        [
            rows("untouched", "untouched", np.nan, 2.0),
            rows("place", "feature", 0.5, 2.0),
            rows("place", "feature", 1.0, 4.0),
            rows("place", "random", 0.5, 2.5),
            rows("place", "random", 1.0, 1.0),
        ]
    )
    assert causal.matching_strengths(tried, 1.5) == {
        ("contrast", "feature"): (0.75,),
        ("contrast", "random"): (0.5,),
    }


# --- running ------------------------------------------------------------------------------------------------


def test_thoughts_are_made_once_and_an_interrupted_run_goes_on(toys, tmp_path, monkeypatch):
    store, pair, crosscoder, models = toys
    tasks = trials.puzzles(3, "test")
    talk = LogitBias(("think",), 1e6)
    todo = [
        Condition("untouched", "untouched", "", Treatment("base", mode="free")),
        Condition("untouched", "untouched", "", Treatment("distilled")),
        Condition("ablate", "features", "contrast", Treatment("distilled", Scale((1, 2)))),
        Condition("swap", "words", "all", Treatment("base", talk, "everywhere", "free")),
    ]
    calls = []

    def counted(*args, **kwargs):
        calls.append(len(args[4]))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return generate.transcripts(*args, **kwargs)

    monkeypatch.setattr(causal, "transcripts", counted)
    with pytest.raises(KeyboardInterrupt):
        causal.run(pair, models, crosscoder, store, tasks, todo, tmp_path, "weights", 6)
    made = causal.run(pair, models, crosscoder, store, tasks, todo, tmp_path, "weights", 6)
    assert calls == [6, 6, 6] and len(made) == 12  # what was made before the interruption is not made again
    pd.testing.assert_frame_equal(
        causal.run(pair, models, crosscoder, store, tasks, todo, tmp_path, "weights", 6), made
    )
    assert len(calls) == 3
    causal.run(pair, models, crosscoder, store, tasks, todo[:1], tmp_path, "other weights", 6)
    assert len(calls) == 4
    assert (
        made["condition"].nunique() == 4
        and made.groupby("condition")["task"].apply(list).map(lambda t: t == [0, 1, 2]).all()
    )
    # it says "think think think": no step is taken
    assert not made.loc[made["kind"] == "words", "thinking"].any()
    summary = effects.summarise(made, 20)
    effects.gap_shares(made, n_boot=20)
    drawn = plots.removals(summary, summary)
    assert {trace.name for trace in drawn.data} == {"features", "mean, 95%"}


def test_a_transplant_is_one_model_up_to_a_layer_and_the_other_above(toys):
    _, pair, _, models = toys
    lower, upper = models["base"], models["distilled"]
    ids = torch.tensor([[1, 7, 9, 4]])
    n = len(upper.model.layers)
    before = {name: [p.clone() for p in model.parameters()] for name, model in models.items()}
    assert causal.transplanted(lower, upper, 0) is upper
    for layers in range(1, n):  # with all of them hidden_states has the norm in it
        made = causal.transplanted(lower, upper, layers)
        # by hand: the lower model's residual stream after so many layers, and the upper one's layers on it
        h = lower(ids, output_hidden_states=True).hidden_states[layers]
        position = torch.arange(ids.shape[1])[None]
        rotary = upper.model.rotary_emb(h, position)
        for layer in upper.model.layers[layers:]:
            h = layer(h, attention_mask=causal_mask(ids.shape[1]), position_embeddings=rotary)
        expected = upper.lm_head(upper.model.norm(h))
        torch.testing.assert_close(made(ids).logits, expected, rtol=1e-4, atol=1e-4)
    # both models are as they were
    for name, model in models.items():
        assert all(torch.equal(a, b) for a, b in zip(before[name], model.parameters()))
        assert pair.load(name)(ids).logits.equal(model(ids).logits)
    with pytest.raises(UserError, match="a transplant needs the same"):
        causal.transplanted(toy_model(24, 0), upper, 1)


def causal_mask(n):
    return torch.full((1, 1, n, n), -torch.inf).triu(1)
