"""Ablation: against hooks written by hand, on random models of unlike widths."""

import copy
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from nnsight import CONFIG
from toys import toy_model, toy_pair, toy_store

from lib import runs
from lib.activations.store import SPLITS
from lib.crosscoder.model import CrossCoder
from lib.distil.organism import build_tokenizer
from lib.features import table
from lib.labels import CATEGORIES, LABELS
from lib.models import reader
from lib.results import Results
from lib.runs import Run, write_manifest
from lib.settings import UserError
from lib.steering import ablation, report
from lib.text.puzzles import first_words
from lib.verdicts import judge

SPLIT = "train"  # of the toy store, whose other splits are too small


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Two random models, the store that is harvested from them, and a random crosscoder."""
    folder = tmp_path_factory.mktemp("toy")
    store, pair = toy_store(folder), toy_pair(folder)
    plain = {name: pair.load(name) for name in store.models}
    crosscoder = CrossCoder(
        list(store.widths.values()), 40, names=store.models, variant="l1", scales=list(store.scales.values())
    )
    crosscoder.requires_grad_(False)
    crosscoder.b_dec.normal_(generator=torch.Generator().manual_seed(3))
    tokenizer = pair.tokenizer()
    models = {name: reader.wrap(model, tokenizer) for name, model in plain.items()}
    acts = store.activations(np.arange(len(store)))
    return SimpleNamespace(
        store=store,
        pair=pair,
        plain=plain,
        models=models,
        crosscoder=crosscoder,
        acts=acts,
        tokenizer=tokenizer,
        layer=store.layers["base"],
    )


def test_removing_every_feature_leaves_bias_and_error(world):
    acts = [a[:50] for a in world.acts]
    codes = world.crosscoder.encode(acts)
    removed = ablation.removed_vectors(world.crosscoder, codes, range(40))
    for name, h, x_hat, vectors in zip(world.crosscoder.names, acts, world.crosscoder.decode(codes), removed):
        error = h - x_hat
        torch.testing.assert_close(
            h - vectors, world.crosscoder.bias(name, raw=True) + error, rtol=1e-4, atol=1e-4
        )


def test_logits_equal_those_of_a_hook_for_both_paddings(world):
    model, d = world.plain["distilled"], 24
    torch.manual_seed(0)
    lengths, tokens = (9, 14), torch.randint(4, 300, (2, 14))
    removed = torch.randn(2, 14, d)
    expected = []
    for row, length in enumerate(lengths):
        mine = removed[row : row + 1, :length]
        hook = model.model.layers[world.layer].register_forward_hook(
            lambda module, inputs, out, mine=mine: out - mine
        )
        expected.append(model(tokens[row : row + 1, :length]).logits[0, length - 2])
        hook.remove()
    for side in ("right", "left"):
        padded, mask, vectors, at = (
            torch.zeros(2, 14, dtype=torch.long),
            torch.zeros(2, 14, dtype=torch.long),
            torch.zeros(2, 14, d),
            [],
        )
        for row, n in enumerate(lengths):
            place = slice(0, n) if side == "right" else slice(14 - n, 14)
            padded[row, place], mask[row, place], vectors[row, place] = tokens[row, :n], 1, removed[row, :n]
            at.append(place.stop - 2)
        found = ablation.logits_at(
            world.models["distilled"], world.layer, padded, mask, (torch.arange(2), torch.tensor(at)), vectors
        )
        torch.testing.assert_close(found, torch.stack(expected), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["base", "distilled"])
def test_a_model_that_begins_above_the_layer_ends_the_same(world, name):
    tokens, at = torch.randint(4, 300, (2, 8)), (torch.arange(2), torch.tensor([7, 5]))
    text = (world.models[name], world.layer, tokens, torch.ones_like(tokens))
    hidden = ablation.hidden_at(*text)
    for change in (torch.zeros_like(hidden), torch.randn(hidden.shape)):
        assert torch.equal(
            ablation.logits_at(*text, at, hidden=hidden - change), ablation.logits_at(*text, at, change)
        )


def test_a_model_in_bfloat16_goes_on_from_a_change_in_float32():
    model = reader.wrap(toy_model(16, 0).bfloat16(), build_tokenizer())
    tokens, at = torch.randint(4, 300, (2, 8)), (torch.arange(2), torch.tensor([7, 5]))
    text = (model, 1, tokens, torch.ones_like(tokens))
    hidden, change = ablation.hidden_at(*text), torch.randn(2, 8, 16)
    found = ablation.logits_at(*text, at, hidden=ablation.changed(hidden, -change))
    assert torch.equal(found, ablation.logits_at(*text, at, change))
    assert not torch.allclose(found, ablation.logits_at(*text, at), atol=0.01)


def test_remote_execution_path_gives_the_same(world):
    tokens, at = torch.randint(4, 300, (2, 8)), (torch.arange(2), torch.tensor([7, 5]))
    removed = torch.randn(2, 8, 24)
    arguments = (world.models["distilled"], world.layer, tokens, torch.ones_like(tokens), at, removed)
    here = ablation.logits_at(*arguments)
    torch.testing.assert_close(ablation.logits_at(*arguments, remote="local"), here)
    of = torch.tensor([3, 77])
    expected = torch.stack([here[[0, 1], of], here.log_softmax(-1)[[0, 1], of]], dim=1)
    torch.testing.assert_close(ablation.logits_at(*arguments, remote="local", targets=of), expected)


def test_a_remote_pair_gives_the_same_effects(world):
    """Skeletons without weights, and the trace as it is sent; run here, since there is no server."""
    names, targets = world.crosscoder.names, ablation.sample_targets(world.store, n=3, split=SPLIT)
    removals = [ablation.Removal(20, "features", tuple(range(40)))]
    away = reader.open_models(replace(world.pair, remote="local"), names)
    assert not any(model.dispatched for model in away.values())
    found = ablation.measure(world.store, world.crosscoder, away, targets, removals, remote="local")
    here = ablation.measure(
        world.store, world.crosscoder, reader.open_models(world.pair, names), targets, removals
    )
    pd.testing.assert_frame_equal(found, here, rtol=1e-5)
    assert (found["logit"].abs() > 0).any()


def test_what_ndif_cannot_run_is_refused(world, monkeypatch):
    monkeypatch.setattr(CONFIG.API, "APIKEY", None)
    hub = replace(world.pair, models={"base": "org/one", "distilled": "org/two@v1"}, remote=True)
    with pytest.raises(UserError, match="no key for NDIF: .*NDIF_API_KEY"):
        reader.open_models(hub, hub.models)
    monkeypatch.setattr(CONFIG.API, "APIKEY", "mine")
    for wrong in (world.pair.models["base"], "pypi:some==1.0@sha256:0"):
        with pytest.raises(UserError, match="'base' is .*NDIF runs models of the hub"):
            reader.open_models(replace(hub, models={"base": wrong}), ["base"])
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(
        UserError, match="configuration of the remote model 'base' cannot be read from org/one"
    ):
        reader.open_models(hub, hub.models)
    asked = []
    monkeypatch.setattr(
        "nnsight.TransformersModel", lambda name, **how: asked.append((name, how["revision"]))
    )
    reader.open_models(hub, hub.models)
    assert asked == [("org/one", None), ("org/two", "v1")]


def test_random_vectors_have_the_norms_of_the_removed_ones():
    vectors = torch.randn(5, 7, 16)
    vectors[2, 3] = 0
    found = ablation.random_like(vectors, torch.Generator().manual_seed(0))
    torch.testing.assert_close(found.norm(dim=-1), vectors.norm(dim=-1))
    assert not torch.allclose(found, vectors)


TABLE = pd.DataFrame(
    {
        "feature": range(8),
        "alive": [1, 1, 1, 1, 1, 1, 0, 1],
        "nrn": [0.9, 0.5, 0.7, 0.52, 0.1, 0.48, 0.99, np.nan],
        "frequency": [0.30, 0.28, 0.20, 0.10, 0.40, 0.19, 0.9, 0.001],
    }
)


def test_frequent_features_by_hand():
    # 7 alive, by frequency: 4, 0, 1, 2, 5, 3, 7
    assert ablation.frequent_features(TABLE, 20).tolist() == [0]  # the top 2
    assert ablation.frequent_features(TABLE, 57).tolist() == [0, 2]  # the top 4
    assert ablation.frequent_features(TABLE, 100).tolist() == [0, 2, 3]
    assert ablation.frequent_features(TABLE, 10).tolist() == []  # the top 1 is the base's
    with pytest.raises(UserError, match="k is 150"):
        ablation.frequent_features(TABLE, 150)


def test_matched_features_by_hand():
    assert ablation.matched_features(TABLE, [0, 2]).tolist() == [1, 5]
    assert ablation.matched_features(TABLE, [0, 3]).tolist() == [1, 5]  # never one that is removed
    with pytest.raises(UserError, match="only 2 others"):
        ablation.matched_features(TABLE, [0, 2, 3])


def test_matched_outside_by_hand():
    assert ablation.matched_outside(TABLE, [0, 2], "frequency").tolist() == [1, 5]
    assert ablation.matched_outside(TABLE, [1], "frequency").tolist() == [0]  # whatever its NRN
    assert ablation.matched_outside(TABLE, [4, 0], "frequency").tolist() == [1, 2]
    with pytest.raises(UserError, match="7 features are removed, and only 0 others"):
        ablation.matched_outside(TABLE, [0, 1, 2, 3, 4, 5, 7], "frequency")


def test_sets_are_planned_with_features_outside_them():
    table = TABLE.rename(columns={"frequency": "frequency_choose"})
    planned = ablation.plan_sets(table, [2], {"reflection": np.array([1])})
    assert [(r.rule, r.category, r.kind, r.features) for r in planned] == [
        ("unique", "", "features", (2,)),
        ("unique", "", "matched", (5,)),
        ("attributed", "reflection", "features", (1,)),
        ("attributed", "reflection", "matched", (0,)),
    ]
    assert ablation.plan_sets(table, [], {}) == ablation.plan_sets(table, None, {}) == []


def planted(world, size: float, seed: int = 0):
    """A store that says that the last layer is read, and a crosscoder whose feature 7 writes the first token
    of the first reflection there, at every token."""
    store, crosscoder = copy.copy(world.store), copy.deepcopy(world.crosscoder)
    store.layers = dict.fromkeys(store.models, len(world.plain["distilled"].model.layers) - 1)
    targets = ablation.sample_targets(store, n=12, split=SPLIT, seed=seed)
    word = int(targets.query("category == 'reflection'")["token"].mode()[0])
    row = world.plain["distilled"].lm_head.weight[word].detach()
    crosscoder.W_enc[7], crosscoder.b_enc[7] = 0, 1.0
    i = crosscoder.names.index("distilled")
    start = sum(crosscoder.widths[:i])
    crosscoder.W_dec *= 1e-3
    crosscoder.W_dec[7, start : start + len(row)] = size * row / row.norm()
    return store, crosscoder, targets, word


def test_attribution_finds_a_feature_that_writes_the_token(world):
    store, crosscoder, targets, word = planted(world, 1.0)
    targets = targets[(targets["category"] != "reflection") | (targets["token"] == word)]
    found = ablation.attribution(store, [crosscoder, world.crosscoder], world.models["distilled"], targets)
    assert ablation.attributed_features(found[0], 1)["reflection"].tolist() == [7]
    assert found[0]["reflection"][7] < 0
    assert set(found[0]) == set(CATEGORIES) and len(found[1]["reflection"]) == 40
    few = ablation.attributed_features({"a": np.array([0.1, -0.2, -0.3, 0.0])}, 3)
    assert few["a"].tolist() == [1, 2]  # only those whose removal costs something


def test_attribution_is_the_slope_of_what_is_measured(world):
    """Over the whole context, at half depth: a thousandth of a feature is removed."""
    targets = ablation.sample_targets(world.store, n=6, split=SPLIT)
    small = copy.deepcopy(world.crosscoder)
    small.W_dec *= 1e-2
    predicted = ablation.attribution(world.store, [small], world.models["distilled"], targets)[0]
    for feature in (3, 20):
        removal = [ablation.Removal(0, "features", (feature,))]
        effects = ablation.measure(world.store, small, world.models, targets, removal)
        measured = effects.query("model == 'distilled' and removed == 'features'")
        for category, group in measured.groupby("category"):
            slope = predicted[category][feature]
            assert group["log_probability"].mean() == pytest.approx(slope, rel=0.05, abs=2e-6)


def test_a_set_is_removed_at_its_category_and_in_the_distilled_model_alone(world):
    targets = ablation.sample_targets(world.store, n=6, split=SPLIT)
    removals = [
        ablation.Removal(5, "features", (1, 2)),
        ablation.Removal(0, "features", (3, 4), "attributed", "contrast"),
        ablation.Removal(0, "matched", (5, 6), "attributed", "contrast"),
    ]
    intact = {}
    effects = ablation.measure(
        world.store, world.crosscoder, world.models, targets, removals, 1, intact=intact
    )
    own = effects[effects["rule"] == "attributed"]
    assert set(own["category"]) == {"contrast"} and set(own["model"]) == {"distilled"}
    assert set(own["removed"]) == {"features", "random", "matched"}
    assert set(effects.loc[effects["rule"] == "frequent", "category"]) == set(CATEGORIES)
    # alone, at all targets, it does the same there
    alone = ablation.measure(
        world.store, world.crosscoder, world.models, targets, [ablation.Removal(0, "features", (3, 4))], 1
    ).query("model == 'distilled' and removed == 'features' and category == 'contrast'")
    both = own.query("removed == 'features'").merge(alone, on=["document", "row"])
    np.testing.assert_allclose(both["logit_x"], both["logit_y"], atol=1e-4)
    # what the intact model says serves another crosscoder
    before = dict(intact)
    ablation.measure(world.store, world.crosscoder, world.models, targets, removals, 1, intact=intact)
    assert intact.keys() == before.keys() and len(before) > 0


def test_targets_are_first_words_of_their_category(world):
    targets = ablation.sample_targets(world.store, n=10, split=SPLIT)
    words = world.tokenizer.convert_ids_to_tokens(targets["token"].tolist())
    for category, row, token, word in zip(targets["category"], targets["row"], targets["token"], words):
        assert word in first_words(category)
        assert world.store.tokens[row + 1] == token
        assert world.store.split[row] == SPLITS.index(SPLIT)
        # the end of the sentence before
        assert world.tokenizer.convert_ids_to_tokens(int(world.store.tokens[row])) == "."
    assert set(targets["category"]) == set(CATEGORIES)
    assert targets.groupby("category").size().max() == 10
    without = np.where(
        world.store.labels["label"] == LABELS.index("contrast"), -1, world.store.labels["label"]
    )
    fewer = SimpleNamespace(**{**vars(world.store), "labels": {**world.store.labels, "label": without}})
    assert set(ablation.sample_targets(fewer, split=SPLIT)["category"]) == set(CATEGORIES) - {"contrast"}
    unlabelled = SimpleNamespace(
        **{**vars(world.store), "labels": {**world.store.labels, "label": np.full(len(world.store), -1)}}
    )
    with pytest.raises(UserError, match="harvest more traces"):
        ablation.sample_targets(unlabelled)


def test_measured_effects(world):
    targets = ablation.sample_targets(world.store, n=12, split=SPLIT)
    every = tuple(range(40))
    codes = world.crosscoder.encode(world.acts)
    world.crosscoder.b_enc[0] = -1e6  # a feature that never fires
    removals = [
        ablation.Removal(1, "features", (0,)),
        ablation.Removal(1, "matched", ()),
        ablation.Removal(20, "features", every),
    ]
    effects = ablation.measure(world.store, world.crosscoder, world.models, targets, removals, batch_size=5)
    world.crosscoder.b_enc[0] = 0
    assert len(effects) == len(targets) * 2 * 5
    nothing = effects[effects["k"] == 1]
    assert (nothing[["logit", "log_probability", "norm"]] == 0).all().all()
    everything = effects[effects["k"] == 20]
    assert (everything["logit"].abs() > 0).mean() > 0.9
    both = everything.pivot(index=["category", "row", "model"], columns="removed", values="norm")
    np.testing.assert_allclose(both["features"], both["random"])

    # one target by hand: the mean norm removed up to it, and the change of its logit
    codes[:, 0] = 0
    vectors = ablation.removed_vectors(world.crosscoder, codes, every)[1]
    target = targets.iloc[0]
    rows = np.flatnonzero(world.store.documents == target["document"])
    upto = rows[(rows <= target["row"]) & world.store.kept[rows]]
    keys = {"model": "distilled", "removed": "features", "row": target["row"], "category": target["category"]}
    mine = everything[(everything[list(keys)] == pd.Series(keys)).all(axis=1)].iloc[0]
    assert mine["norm"] == pytest.approx(
        vectors[upto].norm(dim=1).mean().item() / world.store.mean_norms["distilled"], rel=1e-4
    )
    model, tokens = world.plain["distilled"], torch.from_numpy(world.store.tokens[rows])[None]
    edit = torch.where(torch.from_numpy(world.store.kept[rows])[:, None], vectors[rows], 0.0)
    before = model(tokens).logits[0, target["row"] - rows[0], target["token"]]
    hook = model.model.layers[world.layer].register_forward_hook(lambda module, inputs, out: out - edit)
    after = model(tokens).logits[0, target["row"] - rows[0], target["token"]]
    hook.remove()
    assert mine["logit"] == pytest.approx((after - before).item(), abs=1e-3)


def test_wrong_feature_number_is_one_clear_sentence(world):
    for wrong in (40, -1, 2.5, True):
        with pytest.raises(UserError, match="does not exist: this crosscoder has features 0 to 39"):
            ablation.removed_vectors(world.crosscoder, torch.zeros(1, 40), [wrong])


def test_missing_and_stale_artefacts_name_the_notebook_that_makes_them(tmp_path):
    run = Run("toy", "test", root=tmp_path)
    with pytest.raises(UserError, match="01_harvest_activations"):
        table.open_artefacts_of_all(run, toy_pair(run.folder))
    toy_store(run.folder, tokens=1000)
    pair = toy_pair(run.folder)
    with pytest.raises(UserError, match="02_train_crosscoder"):
        table.open_artefacts_of_all(run, pair)
    write_manifest(run.path("crosscoder"), "mark", store="another")
    with pytest.raises(UserError, match="another store.*02_train_crosscoder"):
        table.open_artefacts_of_all(run, pair)


def test_summary_by_hand():
    effects = pd.DataFrame(
        {
            "category": "reflection",
            "document": [1, 1, 2],
            "row": [0, 1, 2],
            "model": "base",
            "rule": "frequent",
            "k": 1.0,
            "removed": "features",
            "logit": [-1.0, -3.0, -2.0],
            "log_probability": -0.5,
            "norm": [0.1, 0.3, 0.2],
        }
    )
    row = ablation.summarise(effects).iloc[0]
    assert (row["logit"], row["log_probability"], row["n"], row["documents"]) == (-2.0, -0.5, 3, 2)
    assert row["per_norm"] == pytest.approx(-10.0)
    assert row["logit_low"] == row["logit_high"] == -2.0  # both documents have the same mean
    assert np.isnan(ablation.summarise(effects.assign(norm=0.0)).iloc[0]["per_norm"])


def test_difference_is_paired():
    rows = pd.DataFrame({"document": range(6), "log_probability": -1.0, "norm": 0.5})
    one, other = (rows.assign(logit=-1.0 * rows["document"] - extra) for extra in (1, 0))
    assert ablation.estimates(one, other)["logit"] == pytest.approx((-1, -1, -1))
    assert ablation.estimates(one, other)["per_norm"] == pytest.approx((-2, -2, -2))
    assert ablation.estimates(one)["logit"][0] == -3.5
    for nothing in (ablation.estimates(one.head(0)), ablation.estimates(one, other.head(0))):
        assert np.isnan(list(nothing.values())).all() and list(nothing) == list(ablation.VALUES)


def summary_row(**values):
    row = {"category": "contrast", "model": "base", "rule": "frequent", "k": 5.0, "removed": "random"}
    for name in ablation.VALUES:
        value, half = values.get(name, (0.0, 0.0))
        row |= {name: value, f"{name}_low": value - half, f"{name}_high": value + half}
    return pd.DataFrame([{**row, "n": 10, "documents": 4}])


def test_pooled_summary_by_hand():
    first, second = summary_row(logit=(-1.0, 0.3)), summary_row(logit=(-3.0, 0.5))
    pooled = ablation.pool([first, second]).iloc[0]
    # Student's t of two: 12.706 x 1.4142 / 1.4142; documents: the mean half, 0.4
    half = np.hypot(12.7062, 0.4)
    assert pooled["logit"] == -2 and pooled["n"] == 10
    assert (pooled["logit_low"], pooled["logit_high"]) == pytest.approx((-2 - half, -2 + half), abs=1e-3)
    pd.testing.assert_frame_equal(ablation.pool([first]), first)


def test_recorded_ablation_has_the_names_that_predictions_ask_for():
    rng, rows = np.random.default_rng(0), []
    kinds = [("base", "frequent", 20.0, k) for k in ablation.REMOVED]
    kinds += [("distilled", "frequent", 20.0, k) for k in ablation.REMOVED]
    kinds += [("distilled", "attributed", 0.0, k) for k in ablation.REMOVED]
    for category in CATEGORIES:
        for model, rule, k, removed in kinds:
            for d in range(5):
                cost = -3.0 if rule == "attributed" and removed == "features" else -1.0
                effect = {"logit": cost + 0.1 * rng.random(), "log_probability": cost, "norm": 0.5}
                rows.append(
                    {"category": category, "document": d, "row": d, "model": model, "rule": rule, "k": k}
                    | {"removed": removed, **effect}
                )
    results = Results("04", Run("toy", "test"), {})
    pooled, singles = report.record_all_ablations(results, [pd.DataFrame(rows)] * 2)
    assert len(singles) == 2 * len(pooled)
    assert results.metrics["ablate_contrast_attributed_over_matched_log_probability"]["value"] == -2
    asked = report.conditions({}, "no null", "no layer")
    for name in ("distilled", "base", "random", "per norm", *(f"attributed, {c}" for c in CATEGORIES)):
        assert all(condition.metric in results.metrics for condition in asked[name]), name
    board = judge(
        results,
        {name: name for name in ("attributed, contrast", "unique", "over-thinking, upper")},
        asked,
        report.observed(results),
    )
    assert board["held"].tolist() == [
        "yes",
        "not testable, because no null",
        "not testable, because no layer",
    ]
    assert set(report.PREDICTIONS) == set(asked)
    never_right = report.conditions(dict.fromkeys(("half", "upper")), "", "", accuracy=0.02)
    assert never_right["incisive thinking, half"] == "only 2% of the unsteered answers are right"
    assert not isinstance(never_right["over-thinking, upper"], str), "length can still be asked about"


def test_effects_are_measured_once(tmp_path):
    frame, calls = pd.DataFrame({"logit": [0.1, 0.2]}), []
    make = lambda: calls.append(1) or frame  # noqa: E731
    for mark in ("a", "a", "b"):
        pd.testing.assert_frame_equal(runs.kept_table(tmp_path / "ablation", mark, make, "effects"), frame)
    assert len(calls) == 2


def test_own_effect_equals_that_of_hooks_which_replace_the_stream(world):
    """E4 as published, for single documents without a batch."""
    store, crosscoder = world.store, world.crosscoder
    targets = ablation.sample_targets(store, 4, SPLIT)
    found = ablation.own_effects(store, crosscoder, world.models, targets, [10.0, 40.0], seed=5)
    nrn, draws = crosscoder.nrn(1, "distilled", "base").numpy(), np.random.default_rng(5)
    codes = crosscoder.encode(world.acts)
    for category in targets["category"].unique():
        mine = targets[targets["category"] == category]
        often = (codes[mine["row"].tolist()] > 0).float().mean(0)
        for k, n in ((10.0, 4), (40.0, 16)):
            top = often.argsort(descending=True, stable=True)[:n].tolist()
            chosen = [f for f in top if nrn[f] > 0.5]
            sets = {"set": chosen, "random": draws.choice(40, len(chosen), replace=False).tolist()}
            for target in mine.itertuples():
                rows = np.flatnonzero(store.documents == target.document)
                rows, kept = rows[rows <= target.row], store.kept[rows[rows <= target.row]]
                text = torch.from_numpy(store.tokens[rows].astype(np.int64))[None]
                for name, model in world.plain.items():
                    logits = [model(text).logits[0, -1, target.token]]
                    for features in sets.values():
                        f = codes[rows].clone()
                        f[:, features] = 0
                        new = crosscoder.decode(f)[crosscoder.names.index(name)][torch.from_numpy(kept)]

                        def replace_stream(module, inputs, out, new=new, kept=kept):
                            out = out.clone()
                            out[0, torch.from_numpy(kept)] = new
                            return out

                        hook = model.model.layers[world.layer].register_forward_hook(replace_stream)
                        logits.append(model(text).logits[0, -1, target.token])
                        hook.remove()
                    where = (found["category"] == category) & (found["row"] == target.row)
                    row = found[where & (found["model"] == name) & (found["k"] == k)].iloc[0]
                    expected = [float(logits[i] - logits[0]) for i in (1, 2)]
                    assert [row["set"], row["random"]] == pytest.approx(expected, abs=2e-3)
                    assert row["own"] == pytest.approx(expected[0] - expected[1], abs=4e-3)
    assert found["own"].abs().max() > 0.01
