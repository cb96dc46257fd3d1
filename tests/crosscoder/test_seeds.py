"""The crosscoders of a run: trained, copied, removed, compared."""

import shutil
from dataclasses import replace

import pytest
import torch

from lib.crosscoder import seeds
from lib.crosscoder.sharing import open_all
from lib.crosscoder.training import TrainConfig, train
from lib.runs import Run
from lib.settings import UserError
from tests.toys import toy_store

CONFIG = TrainConfig(32, k=4, tokens=2000, batch_size=200, seed=3)


@pytest.fixture
def run(tmp_path):
    return Run("toy", "r", tmp_path)


@pytest.fixture
def store(tmp_path):
    return toy_store(tmp_path / "store", tokens=2000)


def test_they_differ_in_their_seed_alone_and_those_beyond_are_removed(run, store):
    trained = seeds.train_all(store, CONFIG, run, 3)
    assert [c.W_dec.shape for c in trained] == [trained[0].W_dec.shape] * 3
    assert not torch.equal(trained[0].W_dec, trained[1].W_dec)
    expected = train(store, replace(CONFIG, seed=4), run.folder / "other")
    assert torch.equal(trained[1].W_dec, expected.W_dec)
    opened = open_all(run, store)
    assert len({content for _, content in opened}) == len(opened) == 3
    seeds.train_all(store, CONFIG, run, 1)
    assert len(open_all(run, store)) == 1


def test_shipped_ones_are_read_unless_they_are_to_be_trained_anew(run, store, tmp_path, monkeypatch):
    monkeypatch.setattr(seeds, "shipped", lambda pair, config, name: tmp_path / name / str(config.seed))
    first = train(store, CONFIG, tmp_path / "crosscoder" / "3")
    with torch.no_grad():
        first.W_dec[0] += 1  # a mark by which it can be told from one that is trained here
    first.save(tmp_path / "crosscoder" / "3")
    read = seeds.train_all(store, CONFIG, run, 2)
    assert torch.equal(read[0].W_dec, first.W_dec)
    monkeypatch.setattr(
        seeds, "shipped", lambda pair, config, name="crosscoder": tmp_path / name / str(config.seed)
    )
    table = seeds.agreement(store, CONFIG, run, read)
    assert table["seed"].tolist() == [3] and table["median cosine"].item() == pytest.approx(1)
    anew = seeds.train_all(store, CONFIG, run, 2, anew=True)
    assert not torch.equal(anew[0].W_dec, first.W_dec) and torch.equal(anew[1].W_dec, read[1].W_dec)
    # what was trained here stays, and another configuration does not take what was shipped
    assert torch.equal(seeds.train_all(store, CONFIG, run, 2)[0].W_dec, anew[0].W_dec)
    other = seeds.train_all(store, replace(CONFIG, k=5), run, 1)
    assert other[0].k == 5 and seeds.agreement(store, replace(CONFIG, k=5), run, other).empty


def test_crosscoders_of_two_configurations_are_no_crosscoders_of_one_run(run, store):
    seeds.train_all(store, CONFIG, run, 2)
    shutil.rmtree(seeds.folder(run, 1))
    train(store, replace(CONFIG, k=5), seeds.folder(run, 1))
    with pytest.raises(UserError, match="different parameters.*ONLY=02"):
        open_all(run, store)
