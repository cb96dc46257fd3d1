"""What rows write, and what features fire at beside their strongest contexts: by hand and planted."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse
from toys import COHERE, GEMMA2, toy_of, toy_store

from lib.activations.survey import openers
from lib.crosscoder.codes import SplitCodes
from lib.crosscoder.model import CrossCoder
from lib.distil.organism import build_tokenizer
from lib.features.contexts import by_strength, strengths
from lib.features.explorer import HEADS, Columns, Explorer
from lib.features.lens import Lens, openings, readout, readouts, record, shows
from lib.features.table import Detector
from lib.labels import LABELS
from lib.results import Results
from lib.runs import Run

WORDS = ("wait", "so", "but", "the")


class Words:
    def __len__(self):
        return len(WORDS)

    def convert_ids_to_tokens(self, ids):
        return [WORDS[i] for i in ids]


@pytest.fixture
def lens():
    """Four words, one dimension each; the base reads them in other places."""
    crosscoder = CrossCoder([4, 4], 3, names=["base", "distilled"], variant="l1")
    with torch.no_grad():
        crosscoder.W_dec.copy_(
            torch.tensor([[0.0, 0, 0, 0, 3, 0, 0, -1], [1, 0, 0, 0, 1, 0, 0, 0], [0, 1, 0, 0, 0, 2, 0, 0]])
        )
    readouts = {name: torch.eye(6)[:, :4] for name in crosscoder.names}  # two ids have no word
    return Lens(crosscoder, readouts, Words())


def test_scores_by_hand(lens):
    # logits 3, 0, 0, -1: mean 0.5, standard deviation 1.5
    found = lens.scores("distilled", [0])[0]
    assert torch.allclose(found, torch.tensor([2.5, -0.5, -0.5, -1.5]) / 2.25**0.5)
    assert lens.words("distilled", 0, 1) == (["wait"], ["the"])
    assert (lens.scores("base", [0]) == 0).all(), "no row, no score"
    assert lens.agreement(1) == pytest.approx(1) and lens.agreement(2) == pytest.approx(1)


def test_the_table_has_a_row_per_feature_and_model(lens):
    table = lens.table({"of doubt": 0, "of steps": 2}, n=1)
    assert table["what"].tolist() == ["of doubt"] * 2 + ["of steps"] * 2
    assert table.set_index(["feature", "model"])["promoted"].to_dict()[2, "distilled"] == "so"


@pytest.mark.parametrize(
    ("name", "norm", "width", "changes"),
    [
        ("Qwen2ForCausalLM", "model.norm", 16, {}),
        ("Gemma2ForCausalLM", "model.norm", 16, GEMMA2),
        ("CohereForCausalLM", "model.norm", 20, COHERE),
        ("GPT2LMHeadModel", "transformer.ln_f", 18, {}),
    ],
)
def test_the_readout_gives_the_logits_of_a_direction(name, norm, width, changes):
    model = toy_of(name, width=width, **changes)
    norm, direction = (
        model.get_submodule(norm),
        torch.randn(width, generator=torch.Generator().manual_seed(0)),
    )
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 2, width))
        if getattr(norm, "bias", None) is not None:
            norm.bias.normal_()
        # the norm divides by one number, which is the same for all tokens
        logits = model.lm_head(norm(direction) - norm(-direction))
    by_hand = readout(model) @ direction
    assert torch.allclose(logits / logits.norm(), by_hand / by_hand.norm(), atol=1e-5)
    assert readouts(SimpleNamespace(remote=True), ["base"]) == {}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return toy_store(tmp_path_factory.mktemp("lens"), tokens=8000, widths=(16, 16))


def test_a_row_that_writes_its_own_openings_is_told_from_one_that_does_not(store):
    tokenizer = build_tokenizer()
    ids = openings(store, "reflection")
    assert set(tokenizer.convert_ids_to_tokens(ids)) >= set(openers(store, tokenizer)[:1])
    vocabulary = torch.eye(512)
    crosscoder = CrossCoder([512, 512], 3, names=["base", "distilled"], variant="l1")
    with torch.no_grad():
        crosscoder.W_dec.zero_()
        crosscoder.W_dec[0, 512 + torch.tensor(ids)] = 1.0  # the distilled model's row alone
        crosscoder.W_dec[1:, :5] = crosscoder.W_dec[1:, 512:517] = torch.eye(2, 5)
    inspection = SimpleNamespace(
        crosscoder=crosscoder,
        tokenizer=tokenizer,
        store=store,
        alive=pd.DataFrame({"feature": [0, 1, 2]}),
        categories=["reflection"],
        detectors={"reflection": Detector(0, "before", 1)},
    )
    results = Results("03", Run("toy", "test"), {})
    assert record(results, inspection, {}) is None
    record(results, inspection, dict.fromkeys(crosscoder.names, vocabulary))
    assert results.values["lens_reflection_distilled"] > 3 > abs(results.values["lens_reflection_base"])
    inspection.detectors["reflection"] = Detector(0, "before", -1)  # it falls silent: its row suppresses
    record(results, inspection, dict.fromkeys(crosscoder.names, vocabulary))
    assert results.values["lens_reflection_distilled"] < -3
    assert "reflection" in shows(results, ["reflection"], crosscoder.names)


# --- contexts by strength -----------------------------------------------------------------------------------


def test_contexts_are_drawn_from_every_part_of_the_firings():
    tokens, documents = np.arange(20), np.repeat(np.arange(10), 2)
    values = np.arange(20, 0, -1.0)
    drawn = by_strength(tokens, values, documents, bins=4, each=2)
    assert [sorted(part // 5) for part in drawn] == [[i, i] for i in range(4)], "two of each fourth"
    assert all(len(set(documents[part])) == 2 for part in drawn), "of two documents"
    assert [len(part) for part in by_strength(tokens[:2], values[:2], documents, bins=5)] == [1, 1, 0, 0, 0]


def test_strengths_say_what_strong_and_weak_firings_stand_in(store):
    rows = store.rows("report")
    label = store.labels["label"][rows]
    values = np.where(
        label == LABELS.index("reflection"), 5.0, np.where(label == LABELS.index("deduction"), 1, 0)
    )
    coded = SplitCodes(rows, sparse.csr_matrix(values[:, None].astype(np.float32)))
    table = strengths(store, coded, 0, bins=2)
    n = (values > 0).sum()
    assert table["tokens"].tolist() == [n - n // 2, n // 2] and table["highest"].iloc[0] == 5
    assert table["label"].iloc[-1] == "deduction" and table["share"].iloc[-1] == 1


def test_the_explorer_shows_heads_the_lens_and_weak_firings(store, tmp_path):
    rows = store.rows("report")
    dense = np.zeros((len(rows), 2), np.float32)
    dense[:50, 0] = np.arange(50, 0, -1)
    crosscoder = CrossCoder([16, 16], 2, names=["base", "distilled"], variant="l1", seed=0)
    columns = Columns.build(SplitCodes(rows, sparse.csr_matrix(dense)), tmp_path, "mark")
    table = pd.DataFrame(
        {
            "feature": [0, 1],
            "alive": [True, False],
            "nrn": 0.5,
            "frequency": 0.02,
            "label": "",
            "top_token": "a",
        }
    )
    models = {name: torch.eye(16) for name in crosscoder.names}
    explore = Explorer(crosscoder, store, table, columns, build_tokenizer(), readouts=models)
    ((line, feature),) = explore.lines(explore.select())
    for head, entry in (("NRN", "0.50"), ("fires on", "2.00%"), ("token", "a")):
        end = (lambda text, word: text.index(word)) if head == "token" else (lambda t, w: t.index(w) + len(w))
        assert end(HEADS, head) == end(line, entry), "each column stands below its head"
    text = explore.view(feature)[1].data
    assert "logit lens" in text and "each fifth of its firings" in text
    assert "0.75)" in text, "the strongest token has the full shade"
    assert "never fires" in explore.view(1)[1].data
    assert "logit lens" not in Explorer(crosscoder, store, table, columns, build_tokenizer()).view(0)[1].data
