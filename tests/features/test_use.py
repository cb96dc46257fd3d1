"""Use of features: readings, changes and their intervals by hand and in loops, planted changes, phases
against the words.
"""

import numpy as np
import pytest
import torch
from scipy import sparse
from scipy.stats import ttest_1samp
from toys import toy_store

from lib.activations import positions
from lib.crosscoder import codes as codes_module
from lib.crosscoder.model import CrossCoder
from lib.features import use
from lib.settings import UserError


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A store of two toy models of equal width, a crosscoder that fires on it, and the report split's rows,
    read.
    """
    store = toy_store(tmp_path_factory.mktemp("use"), tokens=6000, widths=(16, 16))
    crosscoder = CrossCoder([16, 16], 24, store.models, k=4, scales=[store.scales[m] for m in store.models])
    crosscoder.centre([store.means[m].float() for m in store.models])
    with torch.no_grad():
        crosscoder.W_enc[:, 16:] += 0.1 * torch.randn(24, 16, generator=torch.Generator().manual_seed(1))
        crosscoder.threshold.fill_(0.02)
    rows = store.rows("report")
    return store, crosscoder.requires_grad_(False), rows, use.solo_codes(crosscoder, store, rows)


@pytest.fixture(scope="module")
def words(toy):
    from lib.distil.organism import build_tokenizer

    return np.array(build_tokenizer().convert_ids_to_tokens(toy[0].tokens.tolist()))


def by_hand(base, distilled, documents):
    """Readings of dense codes [n, F]; the joint code is that of the distilled model."""
    codes = {"base": base, "distilled": distilled, "joint": distilled}
    codes = {name: sparse.csr_matrix(np.asarray(code, dtype=float)) for name, code in codes.items()}
    return use.SoloCodes(np.arange(len(documents)), np.asarray(documents), codes)


# --- reading ------------------------------------------------------------------------------------------------


def test_read_gives_every_model_its_own_and_the_joint_code(toy):
    store, crosscoder, rows, slots = toy
    joint = codes_module.codes(crosscoder, store, "report")
    assert np.array_equal(joint.rows, slots.rows) and abs(joint.codes - slots.codes["joint"]).max() < 1e-6
    alone = use.solo_codes(crosscoder, store, rows[::-1][:50], "alone")
    assert np.array_equal(alone.rows, np.sort(rows[::-1][:50])), "rows are put in order"
    for name, acts in zip(store.models, store.activations(alone.rows)):
        assert np.allclose(alone.codes[name].toarray(), crosscoder.encode_from(name, acts).numpy(), atol=1e-6)
    assert 0 < slots.codes["base"].nnz != slots.codes["distilled"].nnz > 0
    with pytest.raises(UserError, match="solo is 'both'"):
        use.solo_codes(crosscoder, store, rows, "both")
    with pytest.raises(UserError, match="no rows"):
        use.solo_codes(crosscoder, store, rows[:0])


def test_explained_against_decode(toy):
    store, crosscoder, rows, readings = toy
    found = use.explained(crosscoder, store, readings).set_index(["model", "reading"])
    f = torch.from_numpy(readings.codes["distilled"].toarray().astype(np.float32))
    x, x_hat = store.activations(rows)[1], crosscoder.decode(f)[1]
    expected = 1 - float((x - x_hat).square().sum() / (x - x.mean(0)).square().sum())
    assert found.at[("distilled", "solo"), "fve"] == pytest.approx(expected, abs=1e-4)
    assert found.at[("base", "joint"), "l0"] == pytest.approx(readings.codes["joint"].nnz / len(rows))


# --- the table of use ---------------------------------------------------------------------------------------


def test_table_by_hand(toy):
    # feature 0: twice the activation on the same tokens; 1: fires only in the distilled model; 2: dead; 3:
    # the same in both
    base = [[1, 0, 0, 1], [1, 0, 0, 0], [0, 0, 0, 1], [2, 0, 0, 0]]
    distilled = [[2, 0, 0, 1], [2, 3, 0, 0], [0, 0, 0, 1], [4, 0, 0, 0]]
    readings = by_hand(base, distilled, [5, 5, 7, 7])
    table = use.use_table(readings, n_boot=50)
    assert table["alive"].tolist() == [True, True, False, True]
    assert table["frequency_base"].tolist() == [0.75, 0, 0, 0.5] and table["mean_distilled"].tolist() == [
        2,
        0.75,
        0,
        0.5,
    ]
    assert table["firing_mean_base"][0] == pytest.approx(4 / 3) and np.isnan(table["firing_mean_base"][1])
    # half a typical activation: (4 + 8) / (3 + 3) / 2 = 1; and 3 / 1 / 2 = 1.5
    assert table["change"].tolist() == pytest.approx([np.log(9 / 5), np.log(4.5 / 1.5), 0, 0])
    assert table["change_frequency"].tolist() == pytest.approx([0, np.log(1.5 / 0.5), 0, 0])
    assert table["difference"].tolist() == pytest.approx([1, 0.75, 0, 0])
    # documents: sums of feature 0 change by 2 and 2, of feature 1 by 3 and 0; one resample of documents of
    # two lengths
    assert table["p"][0] == 0 and table["p"][1] == pytest.approx(ttest_1samp([3, 0], 0).pvalue)
    assert np.isnan(table["p"][2]) and table["p"][3] == 1, "dead is not tested, unchanged is no change"
    assert table["q"][[0, 1, 3]].tolist() == pytest.approx([0, 0.75, 1]), (
        "Benjamini-Hochberg over the three that are alive"
    )
    assert table["difference_low"][1] == 0 and table["difference_high"][1] == 1.5, (
        "resamples hold the first document 0, 1 or 2 times"
    )


def test_intervals_resample_documents_not_tokens():
    rng = np.random.default_rng(0)
    documents = np.repeat(np.arange(30), 40)
    level = rng.random(30)[documents]  # all tokens of a document alike
    readings = by_hand(np.ones((1200, 1)), (1 + level)[:, None], documents)
    table = use.use_table(readings, n_boot=2000)
    means = level.reshape(30, 40).mean(1)
    width = table["difference_high"][0] - table["difference_low"][0]
    assert width == pytest.approx(2 * 1.96 * means.std() / np.sqrt(30), rel=0.1)


def test_planted_changes_are_found_and_noise_is_not():
    rng = np.random.default_rng(1)
    documents = np.repeat(np.arange(100), 20)
    rate = 0.2 * rng.random((100, 300))[documents]  # features come in some documents more than in others
    draw = lambda: (rng.random(rate.shape) < rate) * rng.random(rate.shape)
    base, distilled = draw(), draw()
    distilled[:, :10] *= 3
    distilled[:, 10:20] *= rng.random((2000, 10)) < 1 / 3
    readings = by_hand(base, distilled, documents)
    table = use.use_table(readings, n_boot=100)
    assert (
        (table["q"][:20] < 0.01).all()
        and (table["change"][:10] > 0.7).all()
        and (table["change"][10:20] < -0.7).all()
    )
    noise = table[20:]
    assert (noise["q"] < 0.05).sum() <= 2, "corrected for as many features as there are"
    assert 0.01 < (noise["p"] < 0.05).mean() < 0.1, "p keeps its level where nothing changed"
    assert 0.85 < ((noise["change_low"] <= 0) & (noise["change_high"] >= 0)).mean() < 0.99
    # the null is another such draw; 1% of it may be above its own limit, and all planted changes are
    null = by_hand(base, draw(), documents)
    null = use.use_table(null, n_boot=2)
    changed = use.reweighted(table, null)
    assert changed[:20].all() and changed[20:].mean() < 0.05 and use.reweighted(null, null).sum() == 3
    unique = np.arange(300) < 5
    assert use.kinds_of_change(table, unique, changed)[[0, 9, 299]].tolist() == [
        "unique",
        "reweighted",
        "unchanged",
    ]


def test_a_limit_by_hand(toy):
    table = use.use_table(toy[3], n_boot=2)[:4].assign(
        alive=[True, True, True, False], change=[-2.0, 0.5, 1.0, 9.0]
    )
    assert use.change_limit(table, 0.5) == 1.0
    assert use.reweighted(table, 0.9).tolist() == [True, False, True, False], (
        "a fall counts, a dead feature does not"
    )
    with pytest.raises(UserError, match="nothing to compare"):
        use.change_limit(table.assign(alive=False))


def test_by_group_is_the_table_of_the_groups_rows(toy):
    store, crosscoder, rows, readings = toy
    table = use.use_table(readings, store, "phase", n_boot=5)
    thinking = rows[positions.phase_of(store, rows) == positions.PHASES.index("thinking")]
    same = use.use_table(use.solo_codes(crosscoder, store, thinking), n_boot=5)
    part = table[table["group"] == "thinking"].reset_index(drop=True)
    columns = ["frequency_base", "mean_distilled", "change", "change_low", "difference_high", "p"]
    assert np.allclose(part[columns], same[columns], equal_nan=True)
    assert (
        set(table["group"]) == set(positions.PHASES)
        and (table["q"].dropna() >= table["p"][table["q"].notna()] - 1e-12).all()
    )
    with pytest.raises(UserError, match="grouping is 'word'"):
        use.use_table(readings, store, "word")


# --- phases and events --------------------------------------------------------------------------------------


def test_phases_against_the_words(toy, words):
    store = toy[0]
    rows = np.random.default_rng(0).permutation(np.flatnonzero(store.kept))[:3000]  # any rows, in any order
    for row, phase in zip(rows, positions.phase_of(store, rows)):
        if store.labels["kind"][row] == 0:
            assert positions.PHASES[phase] == "general"
            continue
        document = np.flatnonzero(store.documents == store.documents[row])
        before = list(words[document[document <= row]])
        assert positions.PHASES[phase] == (
            "answer" if "answer" in before else "thinking" if "think" in before else "prompt"
        )


def test_traces_without_labels_have_no_phase(toy):
    class Unlabelled:
        documents, tokens = np.zeros(4, dtype=int), np.arange(4)
        labels = {"starts": np.zeros(4), "kind": np.ones(4)}
        manifest = {"corpus": {}}

    assert positions.phase_of(Unlabelled, np.arange(4)).tolist() == [-1] * 4


def test_in_real_text_the_tags_of_the_thought_tell_the_phase():
    """Tags 5 6 and 7 6; documents: whole, unfinished, a window that ends a thought, one without tags, general
    text.
    """
    texts = [[1, 5, 6, 2, 7, 6, 3], [1, 1, 5, 6, 2], [2, 2, 7, 6, 3], [1, 2, 5], [5, 6, 1]]

    class Real:
        documents, tokens = np.repeat(np.arange(5), [len(t) for t in texts]), np.concatenate(texts)
        labels = {"starts": np.zeros(23, int), "kind": (documents < 4).astype(int)}
        manifest = {"corpus": {"think_tags": [[5, 6], [7, 6]]}}

    general, prompt, thinking, answer = range(4)
    expected = [
        [prompt, *[thinking] * 3, *[answer] * 3],
        [prompt, prompt, *[thinking] * 3],
        [thinking, thinking, *[answer] * 3],
        [-1] * 3,
        [general] * 3,
    ]
    assert positions.phase_of(Real, np.arange(23)).tolist() == sum(expected, [])
    assert positions.phase_of(Real, np.array([3, 9, 21])).tolist() == [thinking, thinking, general]
