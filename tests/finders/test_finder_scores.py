"""Scores by hand, and causal effects against the models themselves."""

import numpy as np
import pandas as pd
import pytest
import torch
from toys import toy_pair, toy_store

from lib.finders import report, scores
from lib.finders.claims import Claims
from lib.models import reader
from lib.steering.ablation import batches, hidden_at, logits_at, sample_targets


def claims(rows, confidence=1.0, side="distilled"):
    rows = np.atleast_2d(np.array(rows, dtype=float))
    return Claims.of(rows, rows, [side] * len(rows), np.broadcast_to(confidence, len(rows)))


def test_calibration_by_hand():
    # in the fifth from .8: two claims, one right; in the lowest: one, wrong
    error = scores.calibration(np.array([0.9, 0.9, 0.1]), np.array([True, False, False]))
    assert error == pytest.approx((abs(1.8 - 1) + 0.1) / 3)
    assert np.isnan(scores.calibration(np.empty(0), np.empty(0)))


def test_recurrence_by_hand():
    one, other = claims([[1, 0, 0], [0, 1, 0]]), claims([[0.8, 0.6, 0], [0, 0, 1]])
    assert scores.recurrence([one, other], 2) == [0.5, 0.5]  # .8 with the first alone; .6 is not enough
    assert scores.recurrence([one, claims([[1, 0, 0]], side="base")], 2) == [0, 0]
    assert np.isnan(scores.recurrence([one], 2)).all()


def test_sure_claims_on_a_null_are_counted_among_the_first():
    assert scores.null_claims(claims(np.eye(4), [0.9, 0.5, 0.6, 0.2]), 2) == 2
    assert scores.null_claims(claims(np.eye(4), [0.9, 0.5, 0.6, 0.2]), 4) == 3


def effects(lost, claim=0, category="reflection", random=0.0):
    n = len(lost)
    return pd.DataFrame(
        {"category": category, "document": np.arange(n), "row": 0, "claim": claim, "lost": lost}
    ).assign(lost_random=random, norm=0.5, gained=1.0, gained_random=0.5, norm_imposed=0.25)


def test_a_claim_is_right_if_some_category_loses_more_than_by_random_directions():
    table = pd.concat(
        [
            effects(np.full(20, -1.0), scores.SPAN),
            effects(np.full(20, -1.0), 0),
            effects(np.full(20, -1.0), 0, "contrast", random=-1.0),
            effects(np.full(20, 1.0), 1),
            effects(np.tile([-1.0, 1.0], 10), 1, "contrast"),
        ]
    )
    right, recall = scores.causal_claims(table, 3)
    assert right.tolist() == [True, False, False]
    assert recall(np.ones(3, bool)) == 0.5 and recall(np.array([False, True, True])) == 0
    assert scores.span_effects(table) == {"necessity": 2.0, "sufficiency": 2.0}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    store, pair = toy_store(folder, widths=(16, 16)), toy_pair(folder, (16, 16))
    models = [reader.wrap(pair.load(name), pair.tokenizer()) for name in store.models]
    return store, models, sample_targets(store, 5, "train")


def test_removing_nothing_changes_nothing(world):
    table = scores.causal_effects(*world, np.empty((0, 16)))
    assert set(table["claim"]) == {scores.SPAN} and table["lost"].abs().max() < 1e-4
    assert table["norm"].max() == 0 and np.isnan(scores.span_effects(table)["necessity"])


def test_imposing_all_directions_puts_the_other_model_in_place(world):
    """In every kept position the base then has what the distilled model has."""
    store, models, targets = world
    table = scores.causal_effects(store, models, targets, np.eye(16))
    assert len(table) == 17 * len(targets)
    (batch,) = batches(store, targets, 64)
    token = torch.from_numpy(batch.targets["token"].to_numpy(dtype=np.int64))
    text = models[0], store.layers["base"], batch.tokens, batch.mask
    hidden = hidden_at(*text)
    before = logits_at(*text, batch.at, targets=token, hidden=hidden)[:, 1]
    base, other = store.activations(batch.kept_rows)
    put = hidden.clone()
    put[batch.kept_at] = other + (hidden[batch.kept_at] - base)  # the store is rounded
    after = logits_at(*text, batch.at, targets=token, hidden=put)[:, 1]
    span = table[table["claim"] == scores.SPAN]
    assert span["gained"].to_numpy() == pytest.approx((after - before).numpy(), abs=1e-3)


def test_removing_one_direction_leaves_its_mean(world):
    store, models, targets = world
    v = torch.nn.functional.normalize(torch.randn(16, generator=torch.Generator().manual_seed(1)), dim=0)
    table = scores.causal_effects(store, models, targets, v[None].numpy())
    (batch,) = batches(store, targets, 64)
    token = torch.from_numpy(batch.targets["token"].to_numpy(dtype=np.int64))
    text = models[1], store.layers["distilled"], batch.tokens, batch.mask
    hidden = hidden_at(*text)
    before = logits_at(*text, batch.at, targets=token, hidden=hidden)[:, 1]
    x, mean = store.activations(batch.kept_rows)[1], store.means["distilled"].float()
    along = (x - mean) @ v
    hidden[batch.kept_at] -= along[:, None] * v
    after = logits_at(*text, batch.at, targets=token, hidden=hidden)[:, 1]
    one = table[table["claim"] == 0]
    assert one["lost"].to_numpy() == pytest.approx((after - before).numpy(), abs=1e-3)
    norm = batch.visible_mean(along.abs()) / store.mean_norms["distilled"]
    assert one["norm"].to_numpy() == pytest.approx(norm, rel=1e-4)


def table_of(values):
    rows = [
        {"truth": truth, "finder": finder, "seed": seed, "f1": f1, "precision": f1, "recall": f1}
        for (truth, finder), each in values.items()
        for seed, f1 in enumerate(each)
    ]
    table = pd.DataFrame(rows).reindex(columns=["truth", "finder", "seed", *scores.SCORES])
    return table.assign(null_claims=np.where(table["seed"] == 0, 3.0, np.nan))


def test_the_best_is_chosen_on_the_first_seed_and_reported_on_the_others():
    table = table_of({("easy", "lucky"): [0.9, 0.1, 0.3], ("easy", report.NRN): [0.5, 0.5, 0.5]})
    found = report.named(table)
    assert found["best_precision_easy"]["value"] == pytest.approx(0.2)
    assert found["nrn_recall_easy"]["value"] == 0.5 and found["null_claims_easy"]["value"] == 3
    assert found["finders"]["value"] == 2 and found["truths"]["value"] == 1


def test_a_winner_beats_nrn_on_all_deciding_truths():
    values = {}
    for truth in report.DECIDING:
        values[truth, report.NRN] = [0.2, 0.3, 0.25]
        values[truth, "good"] = [0.7, 0.8, 0.75]
        values[truth, "single"] = [0.9] if truth == "tiny" else [0.1]
        values[truth, report.CONTROL] = [0.9, 0.9, 0.9]
    gains = report.beats(table_of(values))
    assert report.winners(gains) == ["good"]
    own = gains.set_index(["truth", "finder"])
    assert own.loc[("tiny", "good"), "gain"] == pytest.approx(0.5) and own.loc[("tiny", "single"), "beats"]
    assert not own.loc[("control", "single"), "beats"]
