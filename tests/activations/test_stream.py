"""Activations straight into training: the tokens of a store, shuffled in bounded memory, resumable."""

import numpy as np
import pytest
import torch
from test_harvest import document
from toys import toy_pair

from lib.activations import stream as streaming
from lib.activations.harvest import harvest_activations
from lib.activations.stream import Stream
from lib.crosscoder.training import TrainConfig, train
from lib.models.pairs import load_pair
from lib.settings import UserError
from lib.text.corpus import build

MEMORY = 4_000_000  # bytes: for the toy pair more than enough
BATCH = 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("toys")


@pytest.fixture(scope="module")
def pair(folder):
    return toy_pair(folder)


@pytest.fixture(scope="module")
def store(pair, folder):
    return harvest_activations(pair, build(pair), folder / "store")


@pytest.fixture(scope="module")
def stream(pair):
    return Stream(pair, build(pair))


@pytest.fixture
def small_windows(monkeypatch):
    """About 13 windows of the 3,200 tokens to train on: more than are held at a time."""
    monkeypatch.setattr(Stream, "_window_tokens", lambda self, memory: 250)


def epoch(stream, **options):
    return list(stream.reader("train", BATCH, **{"seed": 0, "memory": MEMORY, **options}))


def same(one, other):
    return len(one) == len(other) and all(
        np.array_equal(r, s) and all(torch.equal(a, b) for a, b in zip(x, y))
        for (r, x), (s, y) in zip(one, other)
    )


def test_rows_scales_and_means_are_those_of_a_store(stream, store):
    assert (
        stream.models == store.models
        and stream.widths == store.widths
        and stream.layers == store.layers
        and len(stream) == len(store)
    )
    assert stream.sampled == stream.count("train") == store.count("train") and stream.count(
        "report"
    ) == store.count("report")
    assert stream.scales == pytest.approx(store.scales) and stream.mean_norms == pytest.approx(
        store.mean_norms
    )
    for m in store.models:
        torch.testing.assert_close(stream.means[m], store.means[m])


@pytest.mark.parametrize("split", ["train", "choose"])
def test_every_token_once_and_with_the_activations_of_a_store(stream, store, split, small_windows):
    read = list(stream.reader(split, BATCH, seed=0, memory=MEMORY))
    rows = np.concatenate([r for r, _ in read])
    assert np.array_equal(np.sort(rows), store.rows(split)) and not np.array_equal(rows, store.rows(split))
    assert {len(r) for r, _ in read[:-1]} == {BATCH}
    for m, expected in enumerate(store.activations(rows)):
        got = torch.cat([acts[m] for _, acts in read])
        assert got.dtype == torch.float32
        # other batches: the last bit of a float16 may differ
        torch.testing.assert_close(got, expected, rtol=2e-3, atol=2e-3)


def test_the_order_depends_on_seed_and_epoch_alone(stream, small_windows):
    first = epoch(stream)
    assert same(first, epoch(stream))
    assert not same(first, epoch(stream, seed=1)) and not same(first, epoch(stream, epoch=1))
    rows = np.concatenate([r for r, _ in first])
    apart = np.abs(np.diff(np.argsort(rows)))  # of tokens that are neighbours in the text
    assert np.median(apart) > 5 * BATCH


def test_the_rest_of_an_epoch_is_the_same_and_costs_what_is_held(stream, small_windows, monkeypatch):
    whole, computed = epoch(stream), []
    window = Stream._window
    monkeypatch.setattr(Stream, "_window", lambda self, *args: computed.append(1) or window(self, *args))
    for start in (1, 17, len(whole) - 1, len(whole)):
        computed.clear()
        assert same(whole[start:], epoch(stream, start=start))
    computed.clear()
    next(stream.reader("train", BATCH, 0, start=40, memory=MEMORY))
    assert len(computed) <= streaming.WINDOWS + 1


def test_parts_share_out_the_batches(stream):
    whole, parts = epoch(stream), [epoch(stream, part=(i, 2)) for i in (0, 1)]
    assert all(np.array_equal(r[i::2], part[0]) for i in (0, 1) for (r, _), part in zip(whole, parts[i]))


def test_what_is_held_is_bounded(pair, small_windows, monkeypatch):
    """Of 13 windows never more than nine are there: eight, and the one of which a batch has just begun."""
    stream, alive = Stream(pair, build(pair)), []
    window = Stream._window

    class Held(list):
        def __del__(self):
            alive.pop()

    def counted(self, *args):
        acts, kept = window(self, *args)
        alive.append(1)
        counted.most = max(counted.most, len(alive))
        return Held(acts), kept

    counted.most = 0
    monkeypatch.setattr(Stream, "_window", counted)
    epoch(stream)
    assert streaming.WINDOWS <= counted.most <= streaming.WINDOWS + 1


def test_high_norms_are_dropped_when_they_are_met(pair, tmp_path):
    models = {name: pair.load(name) for name in pair.models}
    sink = 7
    with torch.no_grad():
        models["distilled"].get_input_embeddings().weight[sink] *= 1e3
    corpus = [document([1, 300, 301, 302, 303 + i, sink if i == 50 else 304]) for i in range(60)]
    stream = Stream(pair, corpus, models=models, sample_tokens=100)
    store = harvest_activations(pair, corpus, tmp_path / "store", models=models)
    assert stream.count("train") == 300
    rows = np.concatenate([r for r, _ in epoch(stream)])
    assert np.array_equal(np.sort(rows), store.rows("train")) and stream.count("train") == 299 == store.count(
        "train"
    )


def test_a_users_mistakes(pair, stream):
    with pytest.raises(UserError, match="memory is 0.2 MB: shuffling rows of 144 bytes needs at least 3 MB"):
        next(stream.reader("train", 1, 0, memory=200_000))
    with pytest.raises(UserError, match="split is 'test'"):
        next(stream.reader("test", BATCH, 0))
    with pytest.raises(UserError, match="no token to train on"):
        Stream(pair, [document([1, 5, 6], split="report")])


def test_a_crosscoder_trains_on_the_stream_as_well_as_on_a_store(tmp_path, monkeypatch):
    tiny = load_pair("tiny")
    text = build(tiny, 12_000)
    models = {name: tiny.load(name) for name in tiny.models}
    store = harvest_activations(tiny, text, tmp_path / "store", models=models)
    stream = Stream(tiny, text, models=models, sample_tokens=3_000)
    config = TrainConfig(n_features=128, k=16, batch_size=256, tokens=40_000, rate=3e-3, memory=20_000_000)
    fves = {}
    for name, source in (("store", store), ("stream", stream)):
        crosscoder = train(source, config, tmp_path / name)
        acts = store.activations(store.rows("report"))
        decoded = crosscoder.decode(crosscoder.encode(acts))
        fves[name] = 1 - np.mean(
            [float((a - b).square().sum() / (a - a.mean(0)).square().sum()) for a, b in zip(acts, decoded)]
        )
        assert int(crosscoder.seen[1]) == store.count("train")
    assert fves["stream"] > 0.5 and abs(fves["stream"] - fves["store"]) < 0.03, fves
