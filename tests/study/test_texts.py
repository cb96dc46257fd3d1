"""A crosscoder in one row, the adapters that were kept on the way, and another text."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from toys import TEXT, chat_model, chat_tokenizer, toy_store

from lib.crosscoder.model import CrossCoder
from lib.distil import adapters as lora
from lib.models.pairs import Pair
from lib.settings import UserError
from lib.study import texts


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return toy_store(tmp_path_factory.mktemp("texts"), widths=(16, 16))


def crosscoder_for(store) -> CrossCoder:
    torch.manual_seed(0)
    made = CrossCoder(list(store.widths.values()), 32, variant="l1", names=list(store.models))
    with torch.no_grad():  # NRN 3 / (1 + 3) for most features, 1 / (1 + 9) for four
        base, distilled = (made.W_dec[:, a:b] for a, b in ((0, 16), (16, 32)))
        base[:] = torch.nn.functional.normalize(torch.randn(32, 16), dim=1)
        distilled[:] = 3 * base
        distilled[:4] = base[:4] / 9
    return made


def test_spread_and_distance_are_what_they_are_called(store):
    made = crosscoder_for(store)
    row = texts.describe(made, store)
    nrn = made.nrn().numpy()
    assert row["nrn_q50"] == pytest.approx(0.75) and sorted(set(np.round(nrn.tolist(), 3))) == [0.1, 0.75]
    assert row["spread"] == pytest.approx(row["nrn_q99"] - row["nrn_q01"]) and 0 < row["alive"] <= 32
    base, distilled = (x.double().numpy() for x in store.activations(store.rows("report")))
    assert row["distance"] == pytest.approx(
        (np.linalg.norm(distilled - base, axis=1) / np.linalg.norm(base, axis=1)).mean(), rel=1e-5
    )
    assert row["fve_base_low"] <= row["fve_base"] <= row["fve_base_high"]


def test_a_kept_state_becomes_the_adapter_that_was_trained(tmp_path):
    chat_model().save_pretrained(tmp_path / "base")
    chat_tokenizer().save_pretrained(tmp_path / "base")
    pair = Pair("toy", {"base": tmp_path / "base", "distilled": tmp_path / "base"})
    recipe = lora.Recipe(rank=2, tokens=120, keep_every=60, window=32, batch_tokens=64)
    model = lora.adapted(pair.load("base"), recipe)
    windows = lora.text_windows(iter(TEXT * 40), chat_tokenizer(), recipe)
    trained = lora.train(model, windows, recipe, tmp_path / "runs" / "distilled", report=lambda line: None)
    (tmp_path / "runs" / "recipe.json").write_text(json.dumps(vars(recipe)))
    last = sorted((tmp_path / "runs" / "distilled").glob("kept_*.pt"))[-1]
    adapter = texts._adapter(pair, last, tmp_path / "adapter")
    whole = Pair("toy", {"base": tmp_path / "base", "distilled": adapter}).load("distilled")
    ids = torch.tensor([[5, 6, 7, 8]])
    ours, theirs, base = (m(input_ids=ids).logits for m in (whole, trained, pair.load("base")))
    assert (ours - theirs).abs().max() < 0.1 * (ours - base).abs().max()  # the state is kept in bfloat16


def test_a_file_that_is_no_kept_state_is_named(tmp_path):
    variant = SimpleNamespace(pair=SimpleNamespace(fingerprint=lambda name: name))
    for name in ("state.pt", "kept_000000010.pt"):
        with pytest.raises(UserError, match=f"{name} is not a state"):
            texts.compute_training(variant, [str(tmp_path / name)])
