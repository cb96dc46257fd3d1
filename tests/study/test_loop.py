"""The published loop's arms: what is shown, what is rounded, and E4 as it was published."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from lib.crosscoder.model import CrossCoder
from lib.crosscoder.training import TrainConfig, Trainer, train
from lib.study import loop
from lib.study.planted import Planted, PlantedStore

SMALL = Planted(width=12, shared=10, rotated=4, rescaled=2, base_only=2, distilled_only=2, l0=3, tokens=4_000)
CONFIG = TrainConfig(n_features=24, variant="l1", tokens=6_000, batch_size=64, l1=0.5)


@pytest.fixture(scope="module")
def store():
    return PlantedStore(SMALL)


def test_loop_shows_few_tokens_again_and_again_and_as_many_zeros(store):
    shown = loop.Loop(store, 48, zeros=True)
    order, acts = zip(*shown.reader("train", 32, seed=0))
    order = np.concatenate(order)
    assert shown.count("train") == 96 and sorted(order) == list(range(96))
    both, rows = torch.cat([torch.cat(a, dim=1) for a in acts]), shown.rows[order]
    assert (rows == -1).sum() == 48 and not both[rows == -1].any()
    assert torch.equal(both[rows >= 0], torch.cat(store.activations(rows[rows >= 0]), dim=1))
    assert set(rows[rows >= 0]) <= set(store.rows("train"))
    again, _ = zip(*shown.reader("train", 32, seed=0, epoch=1))
    assert sorted(np.concatenate(again)) == sorted(order)  # the same ones in every epoch
    assert (np.concatenate(again) != order).any()


def test_loop_without_zeros_is_trained_on_as_any_store(store, tmp_path):
    crosscoder = train(loop.Loop(store, 48, zeros=False), CONFIG, tmp_path)
    assert crosscoder.seen.tolist() == [6_000, 48]


def test_arms_change_one_thing_each():
    made = [(arm, trainer.independent, trainer.rounded, *data) for arm, trainer, *data in loop.arms()]
    assert [arm for arm, *_ in made] == list(loop.ARMS)
    assert made[0][1:] == (False,) * 4 and made[-1][1:] == (True,) * 4
    for (_, *before), (_, *after) in zip(made, made[1:]):
        assert sum(a != b for a, b in zip(before, after)) == 1


def arm(name):
    return next(trainer for own, trainer, *_ in loop.arms() if own == name)


def test_independent_rows_have_nothing_in_common(store):
    config = replace(CONFIG, n_features=400)
    same, apart = (arm(name)(store, config).crosscoder for name in ("l1", "independent rows"))
    plain = Trainer(store, config).crosscoder
    assert same.cosine("base", "distilled").min() > 0.999 and torch.equal(same.W_dec, plain.W_dec)
    assert abs(float(apart.cosine("base", "distilled").mean())) < 0.1
    assert torch.equal(apart.W_enc, apart.W_dec)
    assert torch.allclose(apart.b_enc, -apart.W_enc @ apart.means, atol=1e-5)
    assert torch.allclose(apart.rows("base").norm(dim=1), same.rows("base").norm(dim=1))


def test_bfloat16_weights_are_rounded_with_the_moments(store):
    trainer = arm("as written")(store, CONFIG)
    trainer.run_until(640)
    trainer.close()
    for parameter, own in trainer.optimizer.state.items():
        for values in (parameter.detach(), own["exp_avg"], own["exp_avg_sq"]):
            assert torch.equal(values, values.bfloat16().float())


def test_measured_on_known_rows(store):
    crosscoder = CrossCoder([12, 12], 20, ("base", "distilled"), "l1").requires_grad_(False)
    crosscoder.W_dec[:, 12:] = 0.25 * crosscoder.W_dec[:, :12]  # NRN .2 in all
    crosscoder.W_dec[:5, 12:] = crosscoder.W_dec[:5, :12]  # but five
    row = loop.measured(crosscoder, store, np.ones(20, dtype=bool), labelled=False)
    assert row["one_sided"] == pytest.approx(0.75) and row["nrn_mean"] == pytest.approx(
        0.75 * 0.2 + 0.25 * 0.5
    )
    assert row["alive"] == 20 and "reasoning_highest" not in row


def test_pooled_takes_the_category_with_the_largest_own_effect():
    table = pd.DataFrame({"store": "pair", "arm": "as run", "seed": [0, 1], "l0": [7.0, 9.0]})
    own = pd.DataFrame(
        [("pair", "as run", seed, c, model, value) for seed, values in enumerate([(-1.0, -3.0), (-2.0, 0.5)])
         for c, value in zip(("reflection", "contrast"), values) for model in ("base", "distilled")],
        columns=["store", "arm", "seed", "category", "model", "own"],
    )  # fmt: skip
    own.loc[own["model"] == "base", "own"] -= 100
    metrics = loop.pooled(table, own)
    assert metrics["pair_as_run_l0"]["value"] == pytest.approx(8.0)
    assert metrics["pair_as_run_own"]["value"] == pytest.approx(-2.5)
