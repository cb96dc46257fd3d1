"""Capturing, masking, writing, resuming."""

import errno
import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from toys import toy_model, toy_pair, toy_store

from lib.activations import harvest as harvest_module
from lib.activations.harvest import harvest_activations
from lib.activations.store import Store
from lib.distil.organism import build_tokenizer
from lib.models.pairs import decoder_layers
from lib.models.reader import LayerReader, capture, cut, length_batches, masks
from lib.settings import UserError
from lib.text.corpus import Document, build, label_arrays
from lib.text.puzzles import Sentence

TEXTS = [[1, 5, 6, 7, 8, 9, 10, 11], [1, 40, 41], [1, 12, 13, 14, 15], [1, 100]]
CONTENT = ("*.safetensors", "manifest.json")


def content(path):
    return {f.name: f.read_bytes() for pattern in CONTENT for f in sorted(path.glob(pattern))}


# --- capture ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_capture_equals_a_plain_forward(layer):
    model = toy_model(16, 0)
    plain = [
        model(input_ids=torch.tensor([t]), output_hidden_states=True).hidden_states[layer + 1][0]
        for t in TEXTS
    ]
    captured = capture(model, build_tokenizer(), TEXTS, layer)
    assert captured.shape == (sum(map(len, TEXTS)), 16)
    torch.testing.assert_close(captured, torch.cat(plain), rtol=1e-4, atol=1e-5)


def test_without_nnsight_and_without_the_layers_above_the_same_is_read(monkeypatch):
    model, tokenizer = toy_model(16, 0), build_tokenizer()
    by_nnsight = LayerReader(model, tokenizer, 0, [1]).read(TEXTS)
    monkeypatch.setattr("lib.models.reader.find_spec", lambda name: None)
    by_hooks = LayerReader(model, tokenizer, 0, [1])
    assert by_hooks.nnsight is None and not by_hooks.model._forward_hooks
    assert all(map(torch.equal, by_hooks.read(TEXTS), by_nnsight))
    short = LayerReader(cut(model, 2), tokenizer, 0, [1])
    assert len(decoder_layers(short.model)) == 2 and all(map(torch.equal, short.read(TEXTS), by_nnsight))


def test_both_paddings_and_all_batch_sizes_give_the_same():
    model, tokenizer = toy_model(24, 1), build_tokenizer()
    right, left = (capture(model, tokenizer, TEXTS, side=side) for side in ("right", "left"))
    one_by_one = capture(model, tokenizer, TEXTS, batch_tokens=1)
    torch.testing.assert_close(right, left, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(right, one_by_one, rtol=1e-4, atol=1e-5)


def test_the_forward_stops_at_the_layer():
    model, ran = toy_model(16, 0), []
    for i, layer in enumerate(decoder_layers(model)):
        layer.register_forward_pre_hook(lambda *_, i=i: ran.append(i))
    capture(model, build_tokenizer(), TEXTS[:1], layer=1)
    assert ran == [0, 1]


def test_length_batches_cover_every_document_within_the_budget():
    lengths = [9, 3, 30, 4, 0, 8, 3]
    batches = list(length_batches(lengths, 20))
    assert sorted(i for b in batches for i in b) == [0, 1, 2, 3, 5, 6]
    assert all(len(b) == 1 or len(b) * max(lengths[i] for i in b) <= 20 for b in batches)


# --- masks --------------------------------------------------------------------------------------------------


def test_masks_on_hand_made_norms():
    positions = np.array([0, 1, 2, 3, 0, 1, 2, 3])
    base = np.array([900.0, 1, 1, 10.5, 900, 1, 1, 1])  # 10.5: too high; the median without the sinks is 1
    # 21: too high; 20 is exactly 10 times the median, and stays
    distilled = np.array([5.0, 2, 2, 2, 5, 2, 21, 20])
    kept, dropped = masks(positions, {"base": base, "distilled": distilled})
    assert kept.tolist() == [False, True, True, False, False, True, False, True]
    assert dropped == {"first": 2, "high_norm": 2, "high_norm_base": 1, "high_norm_distilled": 1}


def test_a_token_that_both_models_drop_counts_once():
    kept, dropped = masks(
        np.arange(6), {"a": np.array([1.0, 1, 1, 1, 50, 1]), "b": np.array([1.0, 1, 1, 1, 50, 1])}
    )
    assert dropped["high_norm"] == 1 and kept.sum() == 4


def test_high_norms_are_dropped_from_a_harvest_and_from_its_statistics(tmp_path):
    pair = toy_pair(tmp_path)
    models = {name: pair.load(name) for name in pair.models}
    sink = 7
    corpus = [document([1, 300, 301, 302, 303 + i, sink if i == 3 else 304]) for i in range(20)]
    with torch.no_grad():
        models["distilled"].get_input_embeddings().weight[sink] *= 1e3
    store = harvest_activations(pair, corpus, tmp_path / "store", models=models)
    assert store.manifest["counts"]["dropped"] == {
        "first": 20,
        "high_norm": 1,
        "high_norm_base": 0,
        "high_norm_distilled": 1,
        "padding": 0,
    }
    assert not store.kept[store.tokens == sink].any()
    acts = store.activations(store.rows("train"))[1].double()
    assert np.isclose(store.mean_norms["distilled"], acts.norm(dim=1).mean().item(), rtol=1e-6)


def document(tokens, split="train"):
    return Document(
        tokens, "general", split, label_arrays([Sentence(tuple(map(str, tokens[1:])), "general")], "general")
    )


# --- the store that is written ------------------------------------------------------------------------------


def test_the_store_holds_what_the_models_computed(tmp_path):
    pair = toy_pair(tmp_path)
    corpus = build(pair, 2000)
    store = harvest_activations(
        replace(pair, store_dtype="float32"), corpus, tmp_path / "store", shard_tokens=700
    )
    documents = list(corpus)
    assert store.tokens.tolist() == [t for d in documents for t in d.tokens]
    assert store.documents.tolist() == [i for i, d in enumerate(documents) for _ in d.tokens]
    assert store.positions.tolist() == [p for d in documents for p in range(len(d.tokens))]
    for name in store.labels:
        assert np.array_equal(store.labels[name], np.concatenate([d.labels[name] for d in documents]))
    for m, name in enumerate(store.models):
        plain = capture(pair.load(name), pair.tokenizer(), [d.tokens for d in documents])
        torch.testing.assert_close(store.activations(range(len(store)))[m], plain, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(store.norms[name], plain.norm(dim=1).numpy(), rtol=1e-4)


def test_two_layers_in_one_pass_are_the_stores_of_two_passes(tmp_path, monkeypatch):
    pair = toy_pair(tmp_path)
    corpus = build(pair, 2000)
    paths = {tmp_path / "low": 0, tmp_path / "high": 1}
    passes, read_all = [], harvest_module.read_all
    monkeypatch.setattr(harvest_module, "read_all", lambda *a, **k: passes.append(1) or read_all(*a, **k))
    stores = harvest_module.harvest_layers(pair, corpus, paths, shard_tokens=700)
    once = len(passes)
    for store, (path, layer) in zip(stores, paths.items()):
        alone = harvest_activations(pair, corpus, tmp_path / f"{path.name}_alone", layer, shard_tokens=700)
        assert content(store.path) == content(alone.path)
        assert set(store.layers.values()) == {layer}
    assert len(passes) == 3 * once
    # what is there is not read again; what is missing is read alone
    assert harvest_module.harvest_layers(pair, corpus, paths, shard_tokens=700)[1].path == tmp_path / "high"
    assert len(passes) == 3 * once
    (tmp_path / "high" / "manifest.json").unlink()
    (tmp_path / "high" / "shard_00001.safetensors").unlink()
    stores = harvest_module.harvest_layers(pair, corpus, paths, shard_tokens=700)
    assert content(stores[1].path) == content(tmp_path / "high_alone")
    assert len(passes) == 3 * once + len(pair.models)


def test_the_layer_before_the_last_block(tmp_path):
    def of(layer=None, **depths):
        return harvest_module.upper_layer(SimpleNamespace(depths=[*depths.values()], layer=None), layer)

    assert of(base=6, distilled=6) == 4
    assert of(4, base=6, distilled=6) is None  # it is read already
    assert of(base=2, distilled=2) is None and of(base=6, distilled=8) is None
    assert harvest_module.upper_layer(toy_pair(tmp_path), 0) == 2  # of four layers


@pytest.mark.parametrize("widths", [(16,), (16, 24, 16)])
def test_any_number_of_models_of_any_width(tmp_path, widths):
    store = toy_store(tmp_path, tokens=500, widths=widths)
    assert tuple(store.widths.values()) == widths
    assert [a.shape[1] for a in next(store.reader("train", 8, 0))[1]] == list(widths)


def test_distinct_tokens_count_a_repeated_text_once(tmp_path):
    pair = toy_pair(tmp_path)
    corpus = [document([1, 5, 6, 7]), document([1, 5, 6, 7]), document([1, 5, 6])]
    counts = harvest_activations(pair, corpus, tmp_path / "store").manifest["counts"]
    assert counts["kept"] == 8 and counts["distinct_tokens"] == 5


def test_a_killed_harvest_resumes_to_the_same_bytes(tmp_path, monkeypatch):
    whole = toy_store(tmp_path / "whole").path
    write, written = harvest_module._write_shard, []

    def dies(path, name, *rest):
        if len(written) == 2:
            (path / (name + ".part")).write_bytes(b"half a shard")
            raise KeyboardInterrupt
        written.append(name)
        return write(path, name, *rest)

    monkeypatch.setattr(harvest_module, "_write_shard", dies)
    with pytest.raises(KeyboardInterrupt):
        toy_store(tmp_path / "cut")
    assert not (tmp_path / "cut" / "store" / "manifest.json").exists()
    with pytest.raises(UserError, match="run notebook 01"):
        Store.open(tmp_path / "cut" / "store")
    again = []
    monkeypatch.setattr(
        harvest_module,
        "_write_shard",
        lambda path, name, *rest: again.append(name) or write(path, name, *rest),
    )
    toy_store(tmp_path / "cut")
    assert len(written) == 2 and again == ["shard_00002.safetensors"]
    assert content(whole) == content(tmp_path / "cut" / "store") and len(content(whole)) == 5


def test_a_harvest_that_is_there_is_not_repeated_and_a_damaged_shard_is_mended(tmp_path, monkeypatch):
    store = toy_store(tmp_path)
    before = content(store.path)
    made, write = [], harvest_module._write_shard
    monkeypatch.setattr(
        harvest_module,
        "_write_shard",
        lambda path, name, *rest: made.append(name) or write(path, name, *rest),
    )
    toy_store(tmp_path)
    assert made == []
    shard = store.path / "shard_00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-5])
    toy_store(tmp_path)
    assert made == ["shard_00001.safetensors"] and content(store.path) == before


def test_other_parameters_make_another_store(tmp_path):
    first = toy_store(tmp_path)
    second = toy_store(tmp_path, seed=1, tokens=1000)
    assert first.fingerprint != second.fingerprint
    assert sorted(f.name for f in second.path.glob("shard_*")) == sorted(second.manifest["shards"])
    assert toy_store(tmp_path, seed=1, tokens=1000, layer=2).layers == {"base": 2, "distilled": 2}


def test_the_manifest_says_where_everything_comes_from(tmp_path):
    manifest = json.loads((toy_store(tmp_path).path / "manifest.json").read_text())
    pair = toy_pair(tmp_path)
    assert manifest["models"]["base"]["fingerprint"] == pair.fingerprint("base")
    assert {
        "corpus",
        "tokenizer",
        "hook",
        "scaling",
        "counts",
        "statistics",
        "shards",
        "versions",
        "norm_factor",
    } <= set(manifest)
    assert str(tmp_path) not in json.dumps(manifest)
    counts = manifest["counts"]
    assert counts["tokens"] == counts["kept"] + counts["dropped"]["first"] + counts["dropped"]["high_norm"]


# --- a user's mistakes --------------------------------------------------------------------------------------


def test_activations_that_are_not_finite(tmp_path):
    pair = toy_pair(tmp_path)
    models = {name: pair.load(name) for name in pair.models}
    models["distilled"].model.layers[0].mlp.down_proj.weight[0, 0] = float("nan")
    with pytest.raises(
        UserError, match="activations of 'distilled' at layer 1 are not finite in 100.00% of the tokens"
    ):
        harvest_activations(pair, build(pair, 500), tmp_path / "store", models=models)


def test_activations_that_the_store_cannot_hold(tmp_path):
    pair = toy_pair(tmp_path)
    models = {name: pair.load(name) for name in pair.models}
    models["base"].get_input_embeddings().weight *= 1e6
    with pytest.raises(UserError, match="float16 cannot hold: set store_dtype of the pair to bfloat16"):
        harvest_activations(pair, build(pair, 500), tmp_path / "store", models=models)
    assert harvest_activations(
        replace(pair, store_dtype="bfloat16"), build(pair, 500), tmp_path / "store", models=models
    )


def test_a_full_disk_keeps_what_is_finished(tmp_path, monkeypatch):
    save, saved = harvest_module.save_file, []

    def full(tensors, file):
        if len(saved) == 1:
            file.write_bytes(b"some of it")
            raise OSError(errno.ENOSPC, "No space left on device")
        saved.append(file)
        save(tensors, file)

    monkeypatch.setattr(harvest_module, "save_file", full)
    with pytest.raises(
        UserError,
        match="shard_00001.safetensors cannot be written: the disk is full. What was finished is kept",
    ):
        toy_store(tmp_path)
    assert [f.name for f in (tmp_path / "store").glob("shard_*")] == ["shard_00000.safetensors"]
    monkeypatch.setattr(harvest_module, "save_file", save)
    assert len(toy_store(tmp_path)) > 4000


def test_a_disk_that_is_too_small_is_noticed_before_the_work(tmp_path, monkeypatch):
    monkeypatch.setattr(harvest_module.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(UserError, match="the disk is full"):
        toy_store(tmp_path)


def test_tokens_that_a_model_does_not_have_and_layers_that_do_not_exist(tmp_path):
    pair = toy_pair(tmp_path)
    with pytest.raises(UserError, match="token id 600, model 'base' has 512"):
        harvest_activations(pair, [document([1, 5, 600])], tmp_path / "store")
    with pytest.raises(UserError, match="layer is 9: it must be an integer from 0 to 3"):
        harvest_activations(pair, build(pair, 100), tmp_path / "store", layer=9)
    with pytest.raises(UserError, match="no documents"):
        harvest_activations(pair, [], tmp_path / "store")
