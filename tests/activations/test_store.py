"""Reading activations back: order, completeness, damage."""

import json
import shutil

import numpy as np
import pytest
import torch
from toys import toy_store

from lib.activations import store as store_module
from lib.activations.shuffle import MEMORY, check_reading, ring_blocks
from lib.activations.store import SPLITS, Store
from lib.settings import UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toys")
    toy_store(folder)
    return folder


@pytest.fixture
def store(folder):
    return Store.open(folder / "store")


def test_shapes_widths_and_names(store):
    assert store.models == ("base", "distilled") and store.widths == {"base": 16, "distilled": 24}
    assert (
        len(store)
        == len(store.tokens)
        == len(store.kept)
        == len(store.labels["label"])
        == len(store.norms["base"])
    )
    acts = store.activations([3, 1, len(store) - 1, 3])
    assert [a.shape for a in acts] == [(4, 16), (4, 24)] and all(a.dtype == torch.float32 for a in acts)
    assert torch.equal(acts[0][0], acts[0][3])
    with pytest.raises(UserError, match="the store has rows 0 to"):
        store.activations([len(store)])


def test_rows_are_kept_sorted_and_split_by_document(store):
    rows = {split: store.rows(split) for split in SPLITS}
    assert sum(map(len, rows.values())) == store.kept.sum() == store.manifest["counts"]["kept"]
    assert all((np.diff(r) > 0).all() for r in rows.values())
    documents = [set(store.documents[r]) for r in rows.values()]
    assert (
        not documents[0] & documents[1]
        and not documents[0] & documents[2]
        and not documents[1] & documents[2]
    )
    assert (store.positions[store.kept] > 0).all()
    with pytest.raises(UserError, match="split is 'test'"):
        store.rows("test")


def test_every_kept_token_once_an_epoch(store):
    order = store.order("train", seed=3, epoch=0)
    assert np.array_equal(np.sort(order), store.rows("train")) and not np.array_equal(
        order, store.rows("train")
    )
    batches = [acts for _, acts in store.reader("train", 100, seed=3, epoch=0)]
    assert all(torch.equal(torch.cat([b[m] for b in batches]), store.activations(order)[m]) for m in (0, 1))
    assert {len(b[0]) for b in batches[:-1]} == {100}


def test_activations_of_any_rows_equal_those_of_all(store):
    everything = store.activations(range(len(store)))
    for rows in (
        [],
        [7],
        [5, 5, 4],
        np.arange(1000, 3000),
        np.random.default_rng(0).integers(0, len(store), 500),
    ):
        assert all(
            torch.equal(a, whole[torch.as_tensor(rows, dtype=torch.int64)])
            for a, whole in zip(store.activations(rows), everything)
        )
    assert [a.shape for a in store.activations([])] == [(0, 16), (0, 24)]


def test_a_large_store_is_opened_without_reading_it_all(folder, tmp_path, monkeypatch):
    shutil.copytree(folder / "store", tmp_path / "store")
    file = tmp_path / "store" / "shard_00001.safetensors"
    content = bytearray(file.read_bytes())
    content[-100] ^= 1
    file.write_bytes(content)
    monkeypatch.setattr(store_module, "VERIFY_BYTES", 1)
    assert len(Store.open(tmp_path / "store")) > 0
    with pytest.raises(UserError, match="is damaged"):
        Store.open(tmp_path / "store", verify=True)


def test_same_seed_same_order_and_resuming_inside_an_epoch(store):
    a, b = ([acts for _, acts in store.reader("train", 256, seed=5, epoch=2)] for _ in range(2))
    assert all(torch.equal(x[0], y[0]) and torch.equal(x[1], y[1]) for x, y in zip(a, b, strict=True))
    later = [acts for _, acts in store.reader("train", 256, seed=5, epoch=2, start=3)]
    assert len(later) == len(a) - 3 and torch.equal(later[0][1], a[3][1])
    assert not np.array_equal(store.order("train", 5, 2), store.order("train", 5, 3))
    assert not np.array_equal(store.order("train", 5, 2), store.order("train", 6, 2))


def test_statistics_are_over_kept_train_tokens_in_float64(store):
    for m, acts in enumerate(store.activations(store.rows("train"))):
        name, acts = store.models[m], acts.double()
        norms = acts.norm(dim=1)
        assert np.isclose(store.scales[name], np.sqrt(acts.shape[1]) / norms.mean().item(), rtol=1e-6)
        assert np.isclose((norms * store.scales[name]).mean().item(), np.sqrt(acts.shape[1]), rtol=1e-6)
        assert (
            torch.allclose(store.means[name], acts.mean(0), rtol=1e-9)
            and store.means[name].dtype == torch.float64
        )
        variance = store.manifest["statistics"][name]["total_variance"]
        assert np.isclose(variance, (acts - acts.mean(0)).square().sum(1).mean().item(), rtol=1e-9)


@pytest.mark.parametrize(
    ("harm", "message"), [("remove", "missing"), ("truncate", "truncated"), ("flip", "damaged")]
)
@pytest.mark.parametrize("name", ["shard_00001.safetensors", "index.safetensors"])
def test_damage_is_detected_and_named(folder, tmp_path, harm, message, name):
    shutil.copytree(folder / "store", tmp_path / "store")
    file = tmp_path / "store" / name
    content = bytearray(file.read_bytes())
    if harm == "remove":
        file.unlink()
    elif harm == "truncate":
        file.write_bytes(content[:-7])
    else:
        content[-100] ^= 1
        file.write_bytes(content)
    with pytest.raises(UserError, match=f"{name} is {message}: run notebook 01_harvest_activations"):
        Store.open(tmp_path / "store")


def test_missing_store_and_damaged_manifest(folder, tmp_path):
    with pytest.raises(UserError, match="run notebook 01_harvest_activations first"):
        Store.open(tmp_path / "store")
    shutil.copytree(folder / "store", tmp_path / "store")
    manifest = tmp_path / "store" / "manifest.json"
    text = manifest.read_text()
    manifest.write_text(text[: len(text) // 2])
    with pytest.raises(UserError, match="manifest.json is damaged"):
        Store.open(tmp_path / "store")
    manifest.write_text(json.dumps({**json.loads(text), "format": 99}))
    with pytest.raises(UserError, match="format 99"):
        Store.open(tmp_path / "store")


def test_batches_for_a_gpu_are_those_of_the_cpu_as_they_are_stored(store):
    for part in ((0, 1), (1, 3)):
        wide = list(store.reader("train", 50, seed=1, part=part))
        raw = list(store.reader("train", 50, seed=1, part=part, raw=True))
        assert len(wide) == len(raw)
        for (rows, acts), (same, stored) in zip(wide, raw):
            assert np.array_equal(rows, same) and stored[0].dtype == torch.float16
            assert all(torch.equal(a, b.float()) for a, b in zip(acts, stored))


def test_the_default_memory_grows_with_the_batches_of_wide_pairs():
    for width, needed in ((2 * 1536, 0.9), (2 * 3584, 2.1), (2 * 5120, 3.0)):  # 1.5B, 7B, 14B and 32B
        memory = check_reading(4096, 0, (0, 1), MEMORY, width)
        assert memory == max(MEMORY, memory) and memory / 1e9 == pytest.approx(max(needed, 1.07), rel=0.02)
        assert ring_blocks(memory, 2 * width, 10**6) >= 16
    with pytest.raises(UserError, match="batches of 4,096 tokens need at least 2114 MB"):
        check_reading(4096, 0, (0, 1), 10**9, 7168)


def test_a_store_of_before_a_label_says_to_harvest_again(store):
    for table in store._shards:
        del table._entries["mode"]
    with pytest.raises(UserError, match="has no labels 'mode'.*run notebook"):
        store.labels["mode"]
