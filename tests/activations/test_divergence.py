"""The divergence of two models' next-token distributions: by hand, and where it is planted."""

import numpy as np
import pandas as pd
import pytest
import torch
from toys import toy_pair

from lib.activations import divergence, harvest_activations
from lib.labels import LABELS
from lib.text.corpus import build


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return toy_pair(tmp_path_factory.mktemp("pair"), widths=(16, 16))


@pytest.fixture(scope="module")
def store(pair, tmp_path_factory):
    return harvest_activations(pair, build(pair, 4000), tmp_path_factory.mktemp("store") / "store")


def test_it_is_the_kl_of_each_text_read_alone(pair, store):
    models = {name: pair.load(name) for name in store.models}
    kl = divergence.divergence(models["distilled"], models["base"], store, documents=3)
    assert kl["document"].nunique() == 3 and np.isin(kl["row"], np.flatnonzero(store.kept)).all()
    document = kl["document"].iloc[-1]
    rows = np.flatnonzero(store.documents == document)
    ids = torch.from_numpy(store.tokens[rows].astype(np.int64))[None]
    with torch.no_grad():
        p, q = (models[name](ids).logits[0].double().softmax(-1) for name in ("distilled", "base"))
    by_hand = (p * (p / q).log()).sum(-1).numpy()[store.kept[rows]]
    assert np.allclose(kl[kl["document"] == document]["kl"], by_hand, rtol=1e-3, atol=1e-5)


def test_a_model_does_not_part_from_itself(pair, store):
    kl = divergence.divergence(pair.load("base"), pair.load("base"), store, documents=2)
    assert (kl["kl"] < 1e-6).all()


def test_planted_divergence_is_found_at_its_place(pair, store):
    rows = store.rows("report")
    ends = store.labels["ends"][rows] == 1
    decided = ends & (store.labels["next_label"][rows] == LABELS.index("deduction"))
    kl = pd.DataFrame({"row": rows, "document": store.documents[rows], "kl": np.where(decided, 2.0, 0.0)})
    table = divergence.by_place(kl, store)
    first = table.iloc[0]
    assert (first["sentence"], first["place"], first["kl"], first["share"]) == (
        "deduction", divergence.AT_END, 2, 1,
    )  # fmt: skip
    assert table["n"].sum() <= len(rows) and (table["kl"][1:] == 0).all()
    assert divergence.half_of_it(kl) == pytest.approx(np.ceil(decided.sum() / 2) / len(rows))
    kinds = divergence.by_kind(kl, store)
    assert sum(n for *_, n in kinds.values()) == len(rows)
    mean, (low, high), n = kinds["trace"]
    assert mean == pytest.approx(2 * decided.sum() / n) and low < mean < high and kinds["general"][0] == 0
    assert {t.name for t in divergence.figure(table).data} == {divergence.AT_END, divergence.INSIDE}
    text = divergence.shaded(int(kl["document"].iloc[0]), kl, store, pair.tokenizer()).data
    assert text.count("<span") == (kl["document"] == kl["document"].iloc[0]).sum()


def test_half_of_it_by_hand():
    assert divergence.half_of_it(pd.DataFrame({"kl": [1, 1, 2, 6, 0, 0, 0, 0, 0, 0]})) == 0.1
    assert divergence.half_of_it(pd.DataFrame({"kl": [1.0, 1, 1, 1]})) == 0.5
