"""The first look at a store: counts, text, norms, cosines."""

import html
import re
from collections import Counter

import numpy as np
import pytest
import torch
from toys import toy_pair, toy_store

from lib.activations import harvest_activations
from lib.activations.survey import (
    contents,
    drift,
    histogram_figure,
    labelled_text,
    norm_histogram,
    norms_by_position,
    norms_figure,
    openers,
    similarity,
    similarity_figure,
    word_rates,
)
from lib.labels import CATEGORIES, LABELS, SPLITS
from lib.models.pairs import Pair
from lib.settings import UserError
from lib.text.corpus import build


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return toy_pair(tmp_path_factory.mktemp("pair"), widths=(16, 16))


@pytest.fixture(scope="module")
def store(pair, tmp_path_factory):
    return harvest_activations(pair, build(pair, 8000), tmp_path_factory.mktemp("store") / "store")


def test_contents_count_every_kept_token(store):
    frame = contents(store)
    assert frame[list(SPLITS)].to_numpy().sum() == store.kept.sum() and np.isclose(frame["share"].sum(), 1)
    reflections = store.labels["label"] == LABELS.index("reflection")
    assert frame.loc["reflection", "train"] == (store.kept & (store.split == 0) & reflections).sum()


def test_text_has_every_word_once_and_says_what_is_wrong(store, pair):
    document = int(store.documents[np.flatnonzero(store.labels["error"] == 1)[0]])
    text = labelled_text(document, store, pair.tokenizer()).data
    shown = Counter(html.unescape(re.sub("<[^>]*>", " ", text)).split())
    words = Counter(
        " ".join(
            pair.tokenizer().convert_ids_to_tokens(store.tokens[store.documents == document].tolist())
        ).split()
    )
    assert not words - shown and set(shown - words) <= {*LABELS, "(wrong)", "(no", "label)"}
    assert "(wrong)" in text and "reflection" in text and "&lt;bos&gt;" in text


def test_openers_are_the_commonest_first_words_of_each_category(store, pair):
    words = pair.tokenizer().convert_ids_to_tokens(store.tokens.tolist())
    expected = []
    for category in CATEGORIES:
        first = Counter(
            word
            for word, start, label, split in zip(
                words, store.labels["starts"], store.labels["label"], store.split
            )
            if start == 1 and label == LABELS.index(category) and split == 0
        )
        counts = sorted(first.values(), reverse=True)
        mine = openers(store, pair.tokenizer(), 2)[len(expected) : len(expected) + min(2, len(first))]
        assert [first[word] for word in mine] == counts[:2]  # ties may go either way
        expected += mine
    assert expected == openers(store, pair.tokenizer(), 2)


def test_word_rates_by_hand(store, pair):
    rate = word_rates(store, pair.tokenizer(), ["wait"]).loc["wait", "trace"]
    traces = store.tokens[store.kept & (store.labels["kind"] == 1)]
    assert np.isclose(rate, 1000 * np.mean(traces == pair.tokenizer().get_vocab()["wait"]))


def test_norms(store):
    frame = norms_by_position(store, longest=10)
    median = frame[
        (frame.position == 4) & (frame.model == "distilled") & (frame["quantile"] == "median")
    ].norm.item()
    assert np.isclose(median, np.median(store.norms["distilled"][store.positions == 4]))
    histogram = norm_histogram(store)
    assert np.allclose(histogram.groupby("model").share.sum(), 1)
    fig = histogram_figure(histogram, {"base": 5.0, "distilled": 7.0})
    low, high = fig.layout.xaxis.range  # of a log axis: logarithms
    present = np.log10(histogram.norm[histogram.share > 0])
    assert low < present.min() < low + 0.1 and high - 0.1 < present.max() < high
    assert [a.x for a in fig.layout.annotations] == pytest.approx([np.log10(5), np.log10(7)])


def test_cosines_of_a_model_with_itself_are_one_and_with_another_token_about_zero(pair, tmp_path):
    twin = Pair(
        "twin",
        {"base": pair.models["base"], "distilled": pair.models["base"]},
        tokenizer_source=pair.tokenizer_source,
    )
    frame = similarity(harvest_activations(twin, build(twin, 8000), tmp_path / "store"))
    assert np.allclose(frame.cosine, 1, atol=1e-5) and (frame.other_token.abs() < 0.5).all()
    assert (frame.low <= frame.cosine + 1e-6).all()


def test_unrelated_models_are_not_alike_and_groups_are_named(store):
    frame = similarity(store, "next_label")
    assert set(frame.group) <= set(LABELS) and (frame.cosine.abs() < 0.5).all()
    assert set(similarity(store, "kind").group) == {"general", "trace"}


def test_unlike_widths_have_no_cosine(tmp_path):
    with pytest.raises(UserError, match="cosines need one width"):
        similarity(toy_store(tmp_path, 500))


def test_drift_reads_checkpoints_anew(store, pair):
    torch.manual_seed(0)
    frame = drift(pair, store, ["base", "distilled"], documents=20).set_index(["model", "kind"])
    assert (
        np.allclose(frame.loc["base", "cosine"], 1, atol=1e-5)
        and (frame.loc["distilled", "cosine"] < 0.5).all()
    )


def test_figures_show_the_numbers_of_their_tables(store):
    table = similarity(store)
    fig = similarity_figure(table, "title")
    assert [t.x[0] for t in fig.data[:-1]] == table.cosine.tolist() and list(
        fig.data[-1].x
    ) == table.other_token.tolist()
    norms = norms_by_position(store, longest=8)
    lines = {t.name: list(t.y) for t in norms_figure(norms).data}
    assert (
        lines["base, median"]
        == norms[(norms.model == "base") & (norms["quantile"] == "median")].norm.tolist()
    )
