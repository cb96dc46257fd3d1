"""Features of tokens in chunks: joint, and from one model."""

import numpy as np
import pytest
import torch
from toys import toy_store

from lib.crosscoder import codes as codes_module
from lib.crosscoder.model import CrossCoder
from lib.settings import UserError


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    store = toy_store(tmp_path_factory.mktemp("toy"), tokens=12_000)
    crosscoder = CrossCoder([16, 24], 40, store.models, k=5, scales=[store.scales[m] for m in store.models])
    crosscoder.centre([store.means[m] for m in store.models])
    crosscoder.threshold.fill_(0.03)
    return store, crosscoder


@pytest.mark.parametrize("chunk", [1, 7, 100, 1000])
def test_chunks_join_to_the_whole(toy, chunk):
    store, crosscoder = toy
    tokens = store.rows("report")[:100:2]
    parts = list(codes_module.encoded(crosscoder, store, tokens, chunk=chunk))
    assert [len(part) for part, _, _ in parts[:-1]] == [chunk] * (len(parts) - 1)
    assert np.array_equal(np.concatenate([part for part, _, _ in parts]), tokens)
    acts = store.activations(tokens)
    for m in range(2):
        assert torch.equal(torch.cat([part[m] for _, part, _ in parts]), acts[m])
    with torch.no_grad():
        assert torch.allclose(torch.cat([f for _, _, f in parts]), crosscoder.encode(acts), atol=1e-5)
    assert not any(f.requires_grad for _, _, f in parts)
    assert list(codes_module.encoded(crosscoder, store, tokens[:0])) == []


def test_progress_is_shown_under_a_label_and_ends_with_the_last_chunk(toy, capfd):
    store, crosscoder = toy
    for _ in codes_module.encoded(crosscoder, store, store.rows("report")[:50], "tokens", 20):
        pass
    assert capfd.readouterr().err.endswith("tokens: 50/50 done\n")
    list(codes_module.encoded(crosscoder, store, store.rows("report")[:50]))
    assert capfd.readouterr().err == ""


def test_codes_are_those_of_the_crosscoder(toy):
    store, crosscoder = toy
    found = codes_module.codes(crosscoder, store, "choose")
    expected = crosscoder.encode(store.activations(store.rows("choose"))).detach().numpy()
    assert np.allclose(found.codes.toarray(), expected, atol=1e-6) and found.codes.dtype == np.float32
    assert np.array_equal(found.rows, store.rows("choose")) and 0 < found.codes.nnz < expected.size
    alone = codes_module.codes(crosscoder, store, "choose", model="distilled")
    assert np.allclose(
        alone.codes.toarray(),
        crosscoder.encode_from("distilled", store.activations(found.rows)[1]).detach().numpy(),
        atol=1e-6,
    )


def test_shares_of_the_models_add_up_to_the_encoder(toy):
    store, crosscoder = toy
    rows = store.rows("report")[:50]
    shares = codes_module.encoder_share(crosscoder, store, rows, [3, 7])
    whole = crosscoder.scaled(store.activations(rows)) @ crosscoder.W_enc.detach()[[3, 7]].T
    assert np.allclose(shares["base"] + shares["distilled"], whole.numpy(), atol=1e-4)


def test_sampled_rows_are_whole_documents(toy):
    store, _ = toy
    rows = codes_module.sample_rows(store, "train", 500, seed=1)
    assert 250 < len(rows) <= 500 and np.array_equal(
        rows, codes_module.sample_rows(store, "train", 500, seed=1)
    )
    everything = store.rows("train")
    assert np.array_equal(rows, everything[np.isin(store.documents[everything], store.documents[rows])])
    assert len(codes_module.sample_rows(store, "train", 1)) > 1, "one document at least"
    with pytest.raises(UserError, match="max_tokens is 0"):
        codes_module.sample_rows(store, "train", 0)


def test_slots_are_a_pair_of_equal_models():
    crosscoder = CrossCoder([3, 3], 50, k=8, scales=[0.5, 2.0], variant="l1").requires_grad_(False)
    acts = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    # the same after each slot's own scale
    for name, other in (("base", [acts, acts / 4]), ("distilled", [4 * acts, acts])):
        assert torch.allclose(
            crosscoder.encode_from(name, acts, "slots"), crosscoder.encode(other), atol=1e-6
        )
    assert not torch.allclose(
        crosscoder.encode_from("base", acts, "slots"), crosscoder.encode_from("distilled", acts, "slots")
    )


def test_slots_need_equal_widths_and_a_known_name():
    with pytest.raises(UserError, match="widths 3, 4"):
        CrossCoder([3, 4], 5, k=2).encode_from("base", torch.zeros(2, 3), "slots")
    with pytest.raises(UserError, match="unknown model 'other'"):
        CrossCoder([3, 3], 5, k=2).encode_from("other", torch.zeros(2, 3), "slots")


def test_what_cannot_be_encoded_is_said(toy):
    store, crosscoder = toy
    with pytest.raises(UserError, match="same models"):
        codes_module.codes(CrossCoder([16, 24], 8, ("a", "b"), k=2), store, "report")
    broken = CrossCoder([16, 24], 8, store.models, k=2)
    broken.b_enc.data.fill_(float("nan"))
    with pytest.raises(UserError, match="not finite"):
        codes_module.codes(broken, store, "report")
    with pytest.raises(UserError, match="fill is 'zero': it must be one of mean, slots"):
        crosscoder.encode_from("base", torch.zeros(2, 16), "zero")
