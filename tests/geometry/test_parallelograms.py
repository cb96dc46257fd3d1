"""E7's formulas against hand-computed values, enumeration and simulation; and what reading words must never
do.
"""

import itertools
import json

import numpy as np
import pandas as pd
import pytest
import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from lib.distil.organism import Recipe, build_model, build_tokenizer
from lib.geometry import parallelograms, plots, words
from lib.geometry.parallelograms import (
    analyse,
    bootstrap_scores,
    mean_square,
    offset_unexplained,
    parallelogram_exact,
    parallelogram_null,
    parallelogram_scores,
    pca,
    sample_rows,
    shuffled,
    trace_cov,
)
from lib.geometry.words import (
    CARRIERS,
    Relation,
    load_relations,
    read_models,
    read_words,
    vocabulary,
    word_tokens,
)
from lib.models.reader import capture
from lib.settings import UserError
from lib.stats import group_weights


def random_pairs(n=30, dims=20, seed=0, shift=0.0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, dims)), rng.normal(size=(n, dims)) + shift


def toy_relations(n=30):
    """Two relations of ``n`` pairs: "offset" (rows 0..n-1 -> n..2n-1) and "none" (2n.. -> 3n..)."""
    return [
        Relation(name, tuple((f"{name}{i}", f"{name}{i}_out") for i in range(n)))
        for name in ("offset", "none")
    ]


def toy_vectors(relations, noise=0.1, d=40, seed=0):
    rng = np.random.default_rng(seed)
    found = {}
    offset = rng.normal(size=d)
    for relation in relations:
        for left, right in relation.pairs:
            found[left] = rng.normal(size=d)
            found[right] = (
                found[left] + offset + noise * rng.normal(size=d)
                if relation.name == "offset"
                else rng.normal(size=d)
            )
    return np.stack([found[w] for w in vocabulary(relations)])


# --- the score ----------------------------------------------------------------------------------------------


def test_score_by_hand():
    # arrows (0, 2) and (3, 2): they differ by (3, 0)
    a, b = np.array([[0.0, 0.0], [1.0, 0.0]]), np.array([[0.0, 2.0], [4.0, 2.0]])
    rows = np.array([[0, 1], [1, 0]])
    assert parallelogram_scores(a, b, rows, sigma2=4.5).tolist() == [2.0, 2.0]  # 9 / 4.5
    assert parallelogram_exact(a, b, sigma2=4.5) == pytest.approx(2.0)
    # mean arrow (1.5, 2): |.|^2 = 6.25; mean |arrow|^2 = (4 + 13) / 2 = 8.5; left over 2.25
    assert offset_unexplained(a, b) == pytest.approx(2.25 / 8.5)


@pytest.mark.parametrize("seed", range(3))
def test_closed_form_is_the_mean_over_all_quadruples(seed):
    a, b = random_pairs(n=13, seed=seed)
    rows = np.array(list(itertools.permutations(range(13), 2)))
    scores = parallelogram_scores(a, b, rows, sigma2=7.0)
    by_hand = [np.linalg.norm(a[i] + b[j] - b[i] - a[j]) ** 2 / 7.0 for i, j in rows]
    assert scores == pytest.approx(by_hand, rel=1e-12)
    assert scores.mean() == pytest.approx(parallelogram_exact(a, b, 7.0), rel=1e-12)
    assert parallelogram_exact(a, b, 7.0) == pytest.approx(2 * np.trace(np.cov((b - a).T)) / 7.0, rel=1e-12)


def test_sampled_rows_are_never_the_same_twice_and_estimate_the_closed_form():
    rows = sample_rows(12, 20_000, seed=1)
    assert (rows[:, 0] != rows[:, 1]).all()
    counts = np.bincount(rows[:, 0] * 12 + rows[:, 1], minlength=144).reshape(12, 12)
    assert np.diag(counts).sum() == 0 and counts[~np.eye(12, dtype=bool)].min() > 90  # 151.5 expected of each
    a, b = random_pairs(n=12)
    assert parallelogram_scores(a, b, rows, 1.0).mean() == pytest.approx(
        parallelogram_exact(a, b, 1.0), rel=0.02
    )
    assert np.array_equal(rows, sample_rows(12, 20_000, seed=1))


def test_perfect_offset_is_zero_in_both_numbers():
    a, _ = random_pairs()
    b = a + np.arange(20.0)
    assert parallelogram_exact(a, b, 1.0) == pytest.approx(0, abs=1e-20)
    assert offset_unexplained(a, b) == pytest.approx(0, abs=1e-12)


def test_copy_map_is_zero_but_has_no_offset():
    a, _ = random_pairs()
    assert parallelogram_exact(a, a.copy(), 1.0) == 0
    assert np.isnan(offset_unexplained(a, a.copy()))
    assert np.isnan(offset_unexplained(a, a + 1e-9 * a))  # rounding is no arrow either
    replicates = bootstrap_scores(a, a.copy(), 1.0, group_weights(30, 50))
    assert (replicates["score"] == 0).all() and np.isnan(replicates["offset_unexplained"]).all()


def test_unrelated_words_give_about_4_and_less_with_an_offset():
    a, b = random_pairs(n=400, seed=2)
    both = np.concatenate([a, b])
    a, b, sigma2 = a - both.mean(0), b - both.mean(0), mean_square(both - both.mean(0))
    assert parallelogram_exact(a, b, sigma2) == pytest.approx(4, abs=0.15)
    assert offset_unexplained(a, b) == pytest.approx(1, abs=0.01)
    a, b = random_pairs(n=400, seed=2, shift=2.0)
    both = np.concatenate([a, b])
    a, b, sigma2 = a - both.mean(0), b - both.mean(0), mean_square(both - both.mean(0))
    assert parallelogram_exact(a, b, sigma2) < 2.5  # two clusters: low without any relation
    # the null sees through it
    assert parallelogram_exact(a, b, sigma2) == pytest.approx(parallelogram_null(a, b, sigma2), rel=0.05)


# --- the null -----------------------------------------------------------------------------------------------


def test_shuffled_null_is_the_score_of_shuffled_pairs():
    a, b = random_pairs(n=6)
    every = [
        (parallelogram_exact(a, b[list(p)], 3.0), offset_unexplained(a, b[list(p)]))
        for p in itertools.permutations(range(6))
    ]
    scores, offsets = shuffled(a, b, 3.0, n=4000, seed=0)
    for one, other in zip(scores[:200], offsets[:200]):
        assert min(abs(one - s) + abs(other - o) for s, o in every) < 1e-9
    # over all 720 pairings, exactly
    assert parallelogram_null(a, b, 3.0) == pytest.approx(np.mean([s for s, _ in every]), rel=1e-12)
    assert scores.mean() == pytest.approx(parallelogram_null(a, b, 3.0), rel=0.02)


def test_a_relation_is_below_its_null_and_unrelated_words_are_in_it():
    relations = toy_relations()
    found = analyse(
        {"base": toy_vectors(relations)}, vocabulary(relations), relations, shuffles=400, boots=200
    )
    table = found.table.set_index("relation")
    assert (
        table.loc["offset", "score"] < table.loc["offset", "null_low"]
        and table.loc["offset", "p_shuffled"] <= 1 / 401 + 1e-9
    )
    assert table.loc["none", "null_low"] < table.loc["none", "score"] < table.loc["none", "null_high"]
    assert (
        table.loc["none", "relative"] == pytest.approx(1, abs=0.15) and table.loc["offset", "relative"] < 0.1
    )


# --- the bootstrap ------------------------------------------------------------------------------------------


def test_bootstrap_is_corrected_for_its_bias():
    a, b = random_pairs(n=8, seed=3)
    draws = group_weights(8, 40_000, seed=0)
    replicates = bootstrap_scores(a, b, 2.0, draws)
    exact = parallelogram_exact(a, b, 2.0)
    assert replicates["score"].mean() == pytest.approx(exact, rel=0.01)
    naive = np.mean([2 * trace_cov((b - a)[np.repeat(np.arange(8), d)]) / 2.0 for d in draws[:4000]])
    assert naive == pytest.approx(exact * 7 / 8, rel=0.02)  # what it would be without the correction
    one = np.repeat(np.arange(8), draws[0])  # and one sample, the slow way
    assert replicates["score"][0] == pytest.approx(2 * trace_cov((b - a)[one]) / 2.0 * 8 / 7)
    assert replicates["relative"][0] == pytest.approx(
        trace_cov((b - a)[one]) / (trace_cov(a[one]) + trace_cov(b[one]))
    )
    assert replicates["offset_unexplained"][0] == pytest.approx(offset_unexplained(a[one], b[one]) * 8 / 7)


def test_bootstrap_interval_covers_the_truth():
    """Simulation: 300 draws of 25 pairs; the true variance of the arrows is 2 * dims."""
    hits = []
    for seed in range(300):
        a, b = random_pairs(n=25, seed=100 + seed)
        low, high = np.quantile(
            bootstrap_scores(a, b, 1.0, group_weights(25, 400, seed))["score"], [0.025, 0.975]
        )
        hits.append(low <= 80 <= high)
    assert 0.88 <= np.mean(hits) <= 0.99  # a percentile interval of 25 pairs is a little narrow


# --- PCA ----------------------------------------------------------------------------------------------------


def test_pca_is_centred_and_invariant_to_rotation_shift_and_scale():
    relations = toy_relations()
    vectors = toy_vectors(relations)
    rotation = np.linalg.qr(np.random.default_rng(5).normal(size=(40, 40)))[0]
    models = {"base": vectors, "distilled": 3.0 * vectors @ rotation + 7.0}
    for scope in ("vocabulary", "relation"):
        found = analyse(models, vocabulary(relations), relations, scope=scope, shuffles=50, boots=100)
        numbers = found.differences[
            [c for c in found.differences if c not in ("relation", "model")]
        ].to_numpy(float)
        # same words, quadruples and samples: no difference is left, nor an interval
        assert np.abs(numbers).max() < 1e-9
    assert np.abs(found.points["distilled"].mean(0)).max() < 1e-9 and found.points["base"].shape == (120, 20)


def test_pca_keeps_the_largest_directions():
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(200, 5)) * [9, 5, 1, 1, 1]
    points, kept = pca(vectors, 2)
    expected = np.sort(np.linalg.eigvalsh(np.cov(vectors.T)))[::-1]
    assert np.diag(np.cov(points.T)) == pytest.approx(expected[:2]) and kept == pytest.approx(
        expected[:2].sum() / expected.sum()
    )


def test_too_few_distinct_vectors_are_refused():
    vectors = np.random.default_rng(0).normal(size=(20, 40))
    with pytest.raises(UserError, match="20 distinct vectors .* at least 21"):
        pca(vectors)
    with pytest.raises(UserError, match="20 distinct vectors"):
        pca(np.repeat(vectors, 3, axis=0))  # sixty rows, twenty words
    assert pca(np.random.default_rng(0).normal(size=(21, 40)))[0].shape == (21, 20)
    with pytest.raises(UserError, match="1 distinct"):
        pca(np.ones((30, 40)))


# --- the comparison -----------------------------------------------------------------------------------------


def test_analyse_compares_paired_and_by_name():
    relations = toy_relations()
    # the order must not matter
    models = {"distilled": toy_vectors(relations, noise=0.1), "base": toy_vectors(relations, noise=0.6)}
    found = analyse(models, vocabulary(relations), relations, shuffles=100, boots=400)
    change = found.differences.set_index(["relation", "model"]).loc[("offset", "distilled")]
    assert change["score_high"] < 0 and change["offset_unexplained_high"] < 0
    table = found.table.set_index(["relation", "model"])
    assert change["score"] == pytest.approx(
        table.loc[("offset", "distilled"), "score"] - table.loc[("offset", "base"), "score"]
    )
    means = found.means.set_index("model")
    assert means.loc["base", "score"] == pytest.approx(table.xs("base", level="model")["score"].mean())
    assert (found.table["score_low"] < found.table["score"]).all() and (
        found.table["score"] < found.table["score_high"]
    ).all()
    assert found.table["sampled"].to_numpy() == pytest.approx(found.table["score"].to_numpy(), rel=0.05)
    # a relation's numbers are its own
    alone = analyse(models, vocabulary(relations), relations[1:], shuffles=100, boots=400)
    both = found.table[found.table["relation"] == "none"].drop(columns=["relation", "model"])
    assert alone.table.drop(columns=["relation", "model"]).to_numpy(float) == pytest.approx(
        both.to_numpy(float)
    )
    assert not found.warnings


def test_models_of_different_width_and_more_than_two():
    relations = toy_relations()
    models = {
        "base": toy_vectors(relations),
        "distilled": toy_vectors(relations, d=64),
        "null_a": toy_vectors(relations, seed=1),
    }
    found = analyse(models, vocabulary(relations), relations, shuffles=50, boots=50)
    assert list(found.means["model"]) == ["base", "distilled", "null_a"] and set(
        found.differences["model"]
    ) == {"distilled", "null_a"}


def test_copy_map_is_warned_about_and_has_no_offset_in_the_means():
    relations = toy_relations()
    vectors = toy_vectors(relations)
    place = {w: i for i, w in enumerate(vocabulary(relations))}
    for left, right in relations[0].pairs:
        vectors[place[right]] = vectors[place[left]]
    found = analyse({"base": vectors}, vocabulary(relations), relations, shuffles=50, boots=50)
    row = found.table.set_index("relation").loc["offset"]
    assert (
        row["score"] == pytest.approx(0, abs=1e-12)
        and row["copies"] == 1
        and np.isnan(row["offset_unexplained"])
    )
    assert len(found.warnings) == 1 and "offset in base is close to a copy map" in found.warnings[0]
    none = found.table.set_index("relation").loc["none", "offset_unexplained"]
    assert found.means["offset_unexplained"].iloc[0] == pytest.approx(none)  # the mean of what is defined


def test_analyse_refuses_what_makes_no_sense():
    relations = toy_relations()
    vectors, vocab = toy_vectors(relations), vocabulary(relations)
    with pytest.raises(UserError, match="same words"):
        analyse({"base": vectors, "distilled": vectors[:-1]}, vocab, relations)
    with pytest.raises(UserError, match="reference"):
        analyse({"a": vectors}, vocab, relations)
    with pytest.raises(UserError, match="scope"):
        analyse({"base": vectors}, vocab, relations, scope="all")
    with pytest.raises(UserError, match="dims"):
        analyse({"base": vectors}, vocab, relations, dims=0)


def test_pictures():
    relations = toy_relations()
    vectors = toy_vectors(relations)
    rotation = np.linalg.qr(np.random.default_rng(5).normal(size=(40, 40)))[0]
    found = analyse(
        {"base": vectors, "distilled": 2 * vectors @ rotation},
        vocabulary(relations),
        relations,
        shuffles=50,
        boots=50,
    )
    frame = plots.flat_map(found, relations[0])
    base, distilled = (
        frame[frame["model"] == m][["x0", "y0", "x1", "y1"]].to_numpy() for m in ("base", "distilled")
    )
    # turned back on the base's map, in units of each model's sigma
    assert distilled == pytest.approx(base, abs=1e-8)
    assert len(plots.arrows(found, relations[0]).data) == 2 * 31
    assert len(plots.scores(found).data) == 4 and len(plots.differences(found, "relative").data) == 1


def test_the_answer_names_the_part_that_further_training_has():
    def changes(**models):
        columns = [s + end for s in parallelograms.STATISTICS for end in ("", "_low", "_high")]
        rows = [("mean", m, *loss, *relative, 0, -1, 1) for m, (loss, relative) in models.items()]
        frame = pd.DataFrame(rows, columns=["relation", "model", *columns])
        return parallelograms.Geometry(None, frame, None, (), {}, {}, [])

    found = changes(
        distilled=((0.5, 0.3, 0.7), (0.09, 0.05, 0.13)), null_a=((0, -0.1, 0.1), (0.06, 0.03, 0.1))
    )
    beyond = changes(distilled=((0.5, 0.3, 0.7), (0.03, -0.01, 0.07)))
    said = parallelograms.answer(found, beyond)
    assert said.startswith("Distillation leaves arrows **less parallel**.")
    assert "beyond null_a +0.030 [-0.010, +0.070], not distinguishable: +0.060 of the +0.090 is" in said
    assert said.count("is what further training does") == 1, "the null's loss does not change"
    assert "null_a" not in parallelograms.answer(found)


# --- words --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    return build_model(Recipe(width=32, layers=4, heads=2, kv_heads=1, mlp=32), len(tokenizer)).eval()


def test_embedded_relations_are_single_known_tokens(tokenizer):
    relations = load_relations()
    assert {"antonym", "capital", "comparative", "language", "past", "plural", "successor"} <= {
        r.name for r in relations
    }
    for relation in relations:
        assert len(relation.words) >= 21 and len(set(relation.pairs)) == len(relation.pairs)
        for word in relation.words:
            assert len(tokenizer(word, add_special_tokens=False)["input_ids"]) == 1, word
    lists = word_tokens(vocabulary(relations), tokenizer)  # no word and no carrier is unknown
    assert tokenizer.unk_token_id not in {t for tokens in lists for t in tokens} and all(
        t[0] == tokenizer.bos_token_id for t in lists
    )


def test_unknown_words_are_named_and_refused(tokenizer):
    with pytest.raises(UserError, match=r"2 words are unknown .*<unk>.*: zebra, quark;"):
        word_tokens(["dog", "zebra", "cat", "quark"], tokenizer)
    with pytest.raises(UserError, match="unknown"):
        word_tokens(["dog"], tokenizer, ["behold thee {word}"])


def test_word_is_read_at_its_last_token_and_averaged_over_carriers(tokenizer, model):
    by_carrier = read_words(model, tokenizer, ["dog", "twenty-one"], layer=1)
    assert by_carrier.shape == (2, len(CARRIERS), 32)
    vectors = by_carrier.mean(1)
    expected = []
    for word in ("dog", "twenty-one"):
        texts = [carrier.format(word=word) for carrier in CARRIERS]
        hidden = [
            model(torch.tensor([tokenizer(t)["input_ids"]]), output_hidden_states=True).hidden_states[2][
                0, -1
            ]
            for t in texts
        ]
        expected.append(torch.stack(hidden).mean(0).detach().numpy())
    assert vectors.shape == (2, 32) and vectors.dtype == np.float64
    assert vectors == pytest.approx(np.stack(expected), abs=1e-5)


def test_words_of_several_tokens_are_read_at_the_last(tokenizer):
    lists = word_tokens(["dog cat"], tokenizer, ["this is {word}"])
    assert [tokenizer.decode([t]) for t in lists[0]] == ["<bos>", "this", "is", "dog", "cat"]


def test_subword_tokenizer_without_bos():
    """As Qwen's: words of several tokens, no BOS, no unknown token."""
    inner = Tokenizer(BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    inner.train_from_iterator(["this is not paris", "this is paris"] * 5, trainer)
    inner.decoder = decoders.ByteLevel()
    bpe = PreTrainedTokenizerFast(tokenizer_object=inner)
    short, long = word_tokens(["paris", "N'Djamena"], bpe, ["this is not {word}"])
    assert (
        bpe.decode(short[-1:]) == " paris"
        and bpe.decode(long) == "this is not N'Djamena"
        and bpe.decode(long[-1:]) == "a"
    )


def test_position_0_is_never_read(tokenizer, model, monkeypatch):
    def spoiled(model, tokenizer, lists, layer):
        acts = capture(model, tokenizer, lists, layer).numpy().copy()
        acts[np.cumsum([0, *map(len, lists[:-1])])] = 1e6
        return acts

    clean = read_words(model, tokenizer, ["dog", "cats"], 1)
    monkeypatch.setattr(words, "capture", spoiled)
    assert np.array_equal(read_words(model, tokenizer, ["dog", "cats"], 1), clean)
    without_bos = {"differing_ids": [tokenizer.bos_token_id]}
    assert np.abs(read_words(model, tokenizer, ["dog", "cats"], 1, **without_bos)).max() < 1e5
    with pytest.raises(UserError, match="position 0"):
        word_tokens(["dog"], tokenizer, ["{word}"], **without_bos)
    with pytest.raises(UserError, match="ends with"):
        word_tokens(["dog"], tokenizer, ["the {word} is"])
    with pytest.raises(UserError, match="carriers"):
        word_tokens(["dog"], tokenizer, "the {word}")


class ToyPair:
    """Just what ``read_models`` asks of a pair."""

    layer, dtype, differing_ids = None, "float32", ()

    def __init__(self, models, tokenizer):
        self.models, self._tokenizer, self.loaded = models, tokenizer, []

    def load(self, name):
        self.loaded.append(name)
        return self.models[name]

    def tokenizer(self):
        return self._tokenizer

    def fingerprint(self, name):
        return f"weights of {name}"


def test_vectors_are_read_once(tokenizer, model, tmp_path):
    pair = ToyPair({"base": model, "distilled": model}, tokenizer)
    first = read_models(pair, ["base", "distilled"], ["dog", "cat"], tmp_path)
    again = read_models(pair, ["base", "distilled"], ["dog", "cat"], tmp_path)
    assert pair.loaded == ["base", "distilled"] and np.array_equal(first["base"], again["base"])
    read_models(pair, ["base"], ["dog", "cats"], tmp_path)
    assert pair.loaded == ["base", "distilled", "base"]  # other words
    file = tmp_path / "distilled" / "vectors.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    mended = read_models(pair, ["distilled"], ["dog", "cat"], tmp_path)
    assert pair.loaded[-1] == "distilled" and np.array_equal(mended["distilled"], first["distilled"])


def test_relation_files(tmp_path):
    with pytest.raises(UserError, match="has no relations"):
        load_relations(tmp_path)
    rows = [{"input": f" a{i}", "output": f"b{i} "} for i in range(40)]
    (tmp_path / "toy.json").write_text(json.dumps(rows + rows[:3]))
    (relation,) = load_relations(tmp_path)
    # repeated rows once, words without spaces around them
    assert len(relation.pairs) == 40 and relation.pairs[0] == ("a0", "b0")
    some = load_relations(tmp_path, max_pairs=10)[0]
    assert (
        len(some.pairs) == 10
        and set(some.pairs) <= set(relation.pairs)
        and some == load_relations(tmp_path, max_pairs=10)[0]
    )
    (tmp_path / "short.json").write_text(json.dumps(rows[:3]))
    with pytest.raises(UserError, match="'short' has 3 distinct pairs"):
        load_relations(tmp_path)
    (tmp_path / "short.json").write_text(json.dumps({"a": "b"}))
    with pytest.raises(UserError, match="short.json is not a relation"):
        load_relations(tmp_path)


def test_words_that_would_be_written_over_each_other_are_not_named():
    rows = [(0, 0, 1, 1), (0.1, 0.05, 2, 2), (0.5, 0, 0.5, 0.05), (-1, -1, 2, -1)]
    one = pd.DataFrame(rows, columns=["x0", "y0", "x1", "y1"])
    assert plots._apart([one], 8) == {0, 3}, "the second's first word hides a word, the third's two are one"
    assert plots._apart([one], 1) == {0}
    other = one.assign(x0=[0, 5, 6, 0.1], y0=[0, 5, 6, 0.01])
    assert plots._apart([one, other], 8) == {0}, "apart in one map is not enough"
