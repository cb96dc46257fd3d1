"""Feature statistics on a hand-labelled text, on a toy pair end to end, and on text without labels."""

from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse
from toys import toy_pair, toy_store

from lib.activations import positions as positions_module
from lib.crosscoder import exchange, sharing
from lib.crosscoder import model as model_module
from lib.crosscoder.codes import SplitCodes
from lib.crosscoder.model import CrossCoder
from lib.distil.organism import build_tokenizer
from lib.features import auroc, contexts
from lib.features import detectors as categories
from lib.features import table as features
from lib.features import table as table_module
from lib.features.table import Detector
from lib.labels import DETECTED, LABEL_ARRAYS, LABELS, SPLITS
from lib.results import Results
from lib.runs import table_text, write_manifest
from lib.settings import UserError

# (word, label, starts, ends, next label) of two traces and a general text; word numbers stand for token ids
TRACE = [
    ("so", "deduction", 1, 0, ""),
    ("9", "deduction", 0, 0, ""),
    (".", "deduction", 0, 1, "reflection"),
    ("wait", "reflection", 1, 0, ""),
    (".", "reflection", 0, 1, "contrast"),
    ("but", "contrast", 1, 0, ""),
    (".", "contrast", 0, 1, ""),
]
GENERAL = [("wait", "general", 1, 0, ""), ("bus", "general", 0, 0, ""), (".", "general", 0, 1, "general")]
TEXTS = [("trace", TRACE), ("general", GENERAL), ("trace", TRACE)]
WORDS = sorted({word for _, text in TEXTS for word, *_ in text})
REFLECTION, CONTRAST, DEDUCTION = (LABELS.index(c) for c in ("reflection", "contrast", "deduction"))


def by_hand(labelled=True):
    """A stand-in for a store: 17 tokens, all kept, the same texts in the splits choose and report."""
    lines = [
        (d, p, kind, *line)
        for split in range(2)
        for d, (kind, text) in enumerate(TEXTS, 3 * split)
        for p, line in enumerate(text)
    ]
    labels = {name: np.full(len(lines), -1, np.int8) for name in LABEL_ARRAYS}
    if labelled:
        labels["kind"] = np.array([kind == "trace" for _, _, kind, *_ in lines], np.int8)
        labels["label"] = np.array([LABELS.index(line[4]) for line in lines], np.int8)
        labels["starts"], labels["ends"] = (np.array([line[i] for line in lines], np.int8) for i in (5, 6))
        labels["next_label"] = np.array([LABELS.index(line[7]) if line[7] else -1 for line in lines], np.int8)
    split = np.repeat([1, 2], len(lines) // 2).astype(np.int8)
    return SimpleNamespace(
        tokens=np.array([WORDS.index(line[3]) for line in lines]),
        documents=np.array([line[0] for line in lines]),
        positions=np.array([line[1] for line in lines]),
        labels=labels,
        split=split,
        models=("base", "distilled"),
        rows=lambda name: np.flatnonzero(split == SPLITS.index(name)),
        __len__=lambda: len(lines),
    )


def coded(store, split, columns):
    """Codes from {feature: function of (word, label, next label) -> activation}."""
    rows = store.rows(split)
    words = [WORDS[t] for t in store.tokens[rows]]
    named = [
        [LABELS[i] if i >= 0 else "" for i in store.labels[name][rows]] for name in ("label", "next_label")
    ]
    dense = np.array([[f(*x) for f in columns] for x in zip(words, *named)], dtype=np.float32)
    return SplitCodes(rows, sparse.csr_matrix(dense))


FORETELLS = lambda word, label, following: 2.0 * (following == "reflection")
MARKS = lambda word, label, following: 3.0 * (word == "wait" and label == "reflection")
WORD = lambda word, label, following: 1.0 * (word == "wait")
STOPS = lambda word, label, following: 1.0 * (word == ".") + 0.5 * (following == "contrast")
NOTHING = lambda word, label, following: 0.0
COLUMNS = (FORETELLS, MARKS, WORD, STOPS, NOTHING)


class Words:
    def convert_ids_to_tokens(self, ids):
        return [WORDS[i] for i in ids]


@pytest.fixture
def table():
    store = by_hand()
    crosscoder = CrossCoder((2, 2), len(COLUMNS), k=2)
    with torch.no_grad():  # NRN (p = 1): 0.75, 1, 0.5, 0, 0.5
        crosscoder.W_dec.copy_(
            torch.tensor([[1.0, 0, 3, 0], [0, 0, 1, 1], [1, 1, 0, 2], [2, 0, 0, 0], [1, 0, 1, 0]])
        )
    return features.feature_table(
        crosscoder, store, coded(store, "choose", COLUMNS), coded(store, "report", COLUMNS), Words()
    )


def test_positions_by_hand():
    store = by_hand()
    index, labels = positions_module.positions(store, store.rows("report"), "before")
    assert index.tolist() == [2, 4, 6, 12, 14, 16], "ends of sentences in traces, the last one of a text too"
    assert labels.tolist() == [REFLECTION, CONTRAST, -1] * 2
    index, labels = positions_module.positions(store, store.rows("report"), "value")
    assert index.tolist() == [1, 3, 5, 11, 13, 15], "one token earlier, whatever it is"
    assert labels.tolist() == [REFLECTION, CONTRAST, -1] * 2
    index, labels = positions_module.positions(store, store.rows("report"), "marker")
    assert (
        index.tolist() == [0, 3, 5, 10, 13, 15] and labels.tolist() == [DEDUCTION, REFLECTION, CONTRAST] * 2
    )


def test_table_by_hand(table):
    assert table["nrn"].tolist() == pytest.approx([0.75, 1, 0.5, 0, 0.5])
    assert table["nrn_p2"][2] == pytest.approx(2 / (2 + 2**0.5)) and table["cosine"][2] == pytest.approx(
        2**-0.5
    )
    assert table["alive"].tolist() == [True] * 4 + [False]
    assert table["frequency"].tolist() == pytest.approx([2 / 17, 2 / 17, 3 / 17, 7 / 17, 0])
    assert table["mean_activation"][0] == 2 and table["max_activation"].tolist() == [2, 3, 1, 1.5, 0]
    # foretelling: positives 2 of 6 ends. The third feature is silent at all ends, the fourth fires at all and
    # most before contrast
    assert table["auroc_reflection"].tolist() == pytest.approx([1, 0.5, 0.5, (0.5 + 0) / 2, 0.5])
    assert table["auroc_contrast"][3] == 1 and table["auroc_marker_reflection"].tolist() == pytest.approx(
        [0.5, 1, 1, 0.5, 0.5]
    )
    assert table.loc[0, ["threshold_reflection", "precision_reflection", "recall_reflection"]].tolist() == [
        2,
        1,
        1,
    ]
    assert table["auroc_alternative"].isna().all() and table["auroc_verification_choose"].isna().all()


def test_labels_and_tokens_by_hand(table):
    assert table["label"].tolist() == [
        "before reflection",
        "in reflection",
        "in reflection",
        "at sentence ends",
        "",
    ]
    assert table["label_share"][:3].tolist() == pytest.approx([1, 1, 2 / 3])
    assert table["enrichment"][0] == pytest.approx(17 / 2) and table["enrichment"][2] == pytest.approx(
        (2 / 3) / (4 / 17)
    )
    assert table["top_token"].tolist() == [".", "wait", "wait", ".", ""] and table["top_token_share"][2] == 1
    assert table["token_r2"][2] == pytest.approx(1), "a word feature is a token detector"
    assert table["token_r2"][1] < 0.8 and table["token_r2"][0] < 0.3 and np.isnan(table["token_r2"][4])


def test_choosing_uses_the_choose_split_and_the_side(table):
    assert features.category_features(table)["reflection"] == 0
    assert features.category_features(table, where="marker")["reflection"] == 1
    assert features.category_features(table, nrn_over=-1)["contrast"] == 3
    assert set(features.category_features(table)) == {"reflection", "contrast"}, (
        "what is not in the text cannot be chosen for"
    )
    swapped = table.assign(auroc_reflection_choose=[0.1, 0.9, 1, 1, 1])
    assert features.category_features(swapped)["reflection"] == 1, (
        "neither shared, nor base-side, nor dead features"
    )
    assert features.category_features(table.assign(auroc_reflection=[0, 1, 1, 1, 1]))["reflection"] == 0, (
        "the report split has no say"
    )


def test_places_and_directions_by_hand(table):
    # the values are "9", "wait", "but": "wait" stands before the contrast, so the other two are silent there
    assert table["auroc_value_reflection"].tolist() == [0.5, 0.25, 0.25, 0.5, 0.5]
    assert table["auroc_value_contrast"].tolist() == [0.5, 1, 1, 0.5, 0.5]
    assert features.category_detectors(table) == {
        "reflection": Detector(0, "before", 1),
        "contrast": Detector(1, "value", 1),
    }
    # NRN 0.75, 1: features 0 and 1 may be chosen; 3 would be the best for contrast, but is the base's
    at_value = table.assign(
        auroc_value_contrast_choose=[0.9, 0.6, 0.5, 0.5, 0.5], auroc_contrast_choose=[0.5, 0.2, 0.5, 1, 0.5]
    )
    assert features.category_detectors(at_value)["contrast"] == Detector(0, "value", 1)
    silent = at_value.assign(auroc_contrast_choose=[0.5, 0.05, 0.5, 1, 0.5])
    assert features.category_detectors(silent)["contrast"] == Detector(1, "before", -1)
    assert str(Detector(1, "value", -1)) == "feature 1 at the value, by falling silent"
    assert features.category_detectors(silent, nrn_over=-1)["contrast"].feature == 3
    values = {"value": pd.Series([-0.4, 0.1]), "before": pd.Series([0.2, 0.3])}
    assert features.best_of_places(values) == Detector(0, "value", -1)
    assert features.best_of_places(values, silent=False) == Detector(1, "before", 1)
    assert features.best_of_places({}) is None


def test_only_recurrent_features_are_chosen_where_crosscoders_were_compared(table):
    compared = table.assign(recurrent=[False, True, True, True, True])
    assert features.category_detectors(compared)["reflection"].feature == 1
    assert features.category_features(compared)["reflection"] == 1
    assert features.category_detectors(table.assign(recurrent=False)) == {}


def test_features_are_followed_through_crosscoders():
    draw = torch.Generator().manual_seed(0)
    truth = torch.randn(6, 32, generator=draw)
    crosscoders, orders = [], [torch.randperm(6, generator=draw) for _ in range(3)]
    for order in orders:
        crosscoder = CrossCoder((16, 16), 6, k=2)
        own = truth + 0.05 * torch.randn(6, 32, generator=draw)
        own[5] = torch.randn(32, generator=draw)  # one that no other has
        crosscoder.W_dec.data = own[order]
        crosscoders.append(crosscoder.requires_grad_(False))
    tables = [pd.DataFrame({"feature": range(6), "alive": True}) for _ in orders]
    tables[0].loc[orders[0].tolist().index(4), "alive"] = False
    followed, members = features.follow(crosscoders, tables)
    for number, (table, order) in enumerate(zip(followed, orders)):
        planted = order.numpy()
        assert table["recurrent"].tolist() == (planted < 4).tolist()
        assert (table["cluster"][~table["alive"]] == -1).all()
        for row in members[number].itertuples():
            assert orders[row.crosscoder][row.match] == planted[row.feature] and row.cosine > 0.9
        assert set(members[number]["crosscoder"]) == {0, 1, 2} - {number}
    # the dead feature is in the other two only
    assert (members[1]["feature"] == orders[1].tolist().index(4)).sum() == 1
    same, none = features.follow(crosscoders[:1], tables[:1])
    assert same[0] is tables[0] and none[0].empty


def test_measurements_of_crosscoders_are_pooled_and_their_tables_joined(run):
    def record(results, value, low, shift):
        results.add("a", value + shift, (low + shift, value + shift + 1), 10)
        results.table("t", pd.DataFrame({"x": [value]}))
        return value

    results = Results("03", run, {})
    assert features.over_crosscoders(results, record, [(1.0, 0.0), (3.0, 2.0)], 1) == [1.0, 3.0]
    assert results.values["a"] == 3 and results.metrics["a"]["seeds"] == [[2, 1, 3], [4, 3, 5]]
    assert results.tables["t"] == {"columns": ["crosscoder", "x"], "rows": [[0, 1.0], [1, 3.0]]}
    one = Results("03", run, {})
    features.over_crosscoders(one, record, [(1.0, 0.0)], 1)
    assert one.metrics["a"] == {"value": 2.0, "ci": [1.0, 3.0], "n": 10} and one.tables["t"]["columns"] == [
        "x"
    ]


def test_a_difference_by_hand():
    # half widths 0.3 down and 0.4 up; the distances add up as squares
    value, (low, high) = features.difference((0.9, (0.6, 0.9)), (0.5, (0.5, 0.9)))
    assert value == pytest.approx(0.4) and low == pytest.approx(0.4 - 0.5) and high == pytest.approx(0.4)
    assert features.difference((0.9, None), (0.5, (0, 1))) == (pytest.approx(0.4), None)
    assert np.isnan(features.difference((None, None), (0.5, None))[0])


def test_extremes_do_not_overlap():
    frame = pd.DataFrame(
        {
            "feature": range(10),
            "alive": [True] * 9 + [False],
            "nrn": [0.0, 0.1, 0.2, 0.45, 0.5, 0.6, 0.8, 0.9, 0.95, 1.0],
        }
    )
    found = features.extremes(frame, 100)
    assert {k: v["feature"].tolist() for k, v in found.items()} == {
        "highest": [8, 7, 6],
        "middle": [4, 3, 5],
        "lowest": [0, 1, 2],
    }
    assert features.extremes(frame, 1)["highest"]["feature"].tolist() == [8]


def test_word_or_function_by_hand():
    store = by_hand()
    found = categories.word_or_function(
        store, coded(store, "report", COLUMNS), {"reflection": 1, "contrast": 2}, n_boot=10
    ).set_index("category")
    assert (
        found.at["reflection", "auroc"] == 1
        and found.at["reflection", "inside"] == 3
        and found.at["reflection", "outside"] == 0
    )
    assert (found.at["reflection", "inside_n"], found.at["reflection", "outside_n"]) == (2, 1)
    assert np.isnan(found.at["contrast", "auroc"]), "'but' occurs nowhere else"
    word = categories.word_or_function(store, coded(store, "report", COLUMNS), {"reflection": 2}, n_boot=10)
    assert word["auroc"].item() == 0.5


def test_text_without_labels_is_said_to_have_none():
    store = by_hand(labelled=False)
    assert "reflection" in positions_module.missing_labels(store, store.rows("report"))
    assert (
        positions_module.missing_labels(by_hand(), by_hand().rows("report"), ("reflection", "contrast"))
        is None
    )
    frame = features.feature_table(
        CrossCoder((2, 2), len(COLUMNS), k=2),
        store,
        *(coded(store, s, COLUMNS) for s in ("choose", "report")),
    )
    assert (
        frame["auroc_reflection"].isna().all()
        and (frame["label"] == "").all()
        and features.category_features(frame) == {}
    )
    assert frame["top_token"][2] == WORDS.index("wait")


# --- a toy pair, from end to end ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    store = toy_store(tmp_path_factory.mktemp("toy"), tokens=12_000)
    crosscoder = CrossCoder([16, 24], 40, store.models, k=5, scales=[store.scales[m] for m in store.models])
    crosscoder.centre([store.means[m] for m in store.models])
    crosscoder.threshold.fill_(0.03)
    return store, crosscoder


def test_inspect_keeps_what_it_made_and_load_reads_it(toy, tmp_path, monkeypatch):
    store, crosscoder = toy
    made = features.inspect(crosscoder, store, tmp_path / "features", "mark", build_tokenizer())
    assert (
        len(made.table) == 40 and made.table["alive"].dtype == bool and made.table["cosine"].isna().all()
    ), "unlike widths"
    assert {f"{x}_{c}" for c in DETECTED for x in ("auroc", "precision", "recall", "auroc_marker")} <= set(
        made.table
    )
    monkeypatch.setattr(features, "codes", lambda *a, **k: pytest.fail("computed again"))
    again = features.inspect(crosscoder, store, tmp_path / "features", "mark", build_tokenizer())
    pd.testing.assert_frame_equal(made.table, again.table)
    assert (made.report.codes != again.report.codes).nnz == 0 and np.array_equal(
        made.report.rows, again.report.rows
    )
    for name in ("label", "top_token"):  # all of them numbers, or breaks: text, and a row for each feature
        for word in ("7", "\r", "a\rb"):
            changed = made.table.assign(**{name: word})
            (tmp_path / "features" / "table.csv").write_text(table_text(changed), newline="")
            read = features.load(tmp_path / "features")[0]
            assert read[name].tolist() == changed[name].tolist()
    (tmp_path / "features" / "table.csv").write_text(table_text(made.table, "%.7g"))
    text = (tmp_path / "features" / "table.csv").read_text().splitlines()
    first = dict(zip(text[0].split(","), text[1].split(",")))
    text[1] = text[1].replace(f",{first['label']},", ",,").replace(f",{first['top_token']},", ",null,")
    (tmp_path / "features" / "table.csv").write_text("\n".join(text) + "\n")
    table, chosen = features.load(tmp_path / "features", "mark")
    assert (table.at[0, "label"], table.at[0, "top_token"]) == ("", "null"), "text stays text"
    assert chosen == made.detectors == features.category_detectors(table)
    with pytest.raises(UserError, match="another crosscoder.*03_inspect_features"):
        features.load(tmp_path / "features", "other mark")
    with pytest.raises(UserError, match="run notebook 03_inspect_features first"):
        features.load(tmp_path / "nothing")
    (tmp_path / "features" / "table.csv").write_text("feature,nrn\n0,1\n")
    with pytest.raises(UserError, match="damaged"):
        features.load(tmp_path / "features")


def test_detectors_report_what_sklearn_finds(toy, tmp_path):
    from sklearn.metrics import roc_auc_score

    store, crosscoder = toy
    made = features.inspect(crosscoder, store, tmp_path / "features", "mark", build_tokenizer())
    c, feature = "deduction", features.category_features(made.table)["deduction"]
    found = categories.detectors(made, {c: feature}, n_boot=50).set_index("predictor")
    rows = made.report.rows[
        (store.labels["ends"][made.report.rows] == 1) & (store.labels["kind"][made.report.rows] == 1)
    ]
    positive = store.labels["next_label"][rows] == LABELS.index(c)
    f = crosscoder.encode(store.activations(rows)).detach().numpy()[:, feature]
    assert found.at["feature", "auroc"] == pytest.approx(roc_auc_score(positive, f), abs=1e-6)
    assert found.at["feature", "auroc"] == pytest.approx(made.table.at[feature, f"auroc_{c}"], abs=1e-6)
    assert found.at["feature", "positives"] == positive.sum() and found.at["feature", "n"] == len(rows)
    assert set(found.index) == {
        "feature",
        "token only",
        "sentence only",
        "base alone",
        "distilled alone",
        "probe of base",
        "probe of distilled",
        "feature, marker",
        "token only, marker",
    }
    others = found.drop(index=["feature", "feature, marker"])
    assert (others["gain_low"] <= others["gain"] + 0.05).all() and (
        others["gain_high"] >= others["gain"] - 0.05
    ).all()
    assert categories.detectors(made, {}).empty
    alone = categories.detectors(made, {c: feature}, n_boot=5, controls=False)
    assert alone["predictor"].tolist() == ["feature", "feature, marker"]


def test_a_probe_finds_what_is_there_and_nothing_else(toy):
    store, _ = toy
    fit, rows = store.rows("choose"), store.rows("report")
    known = {
        name: acts[:, 0].numpy() > acts[:, 0].median().item()
        for name, acts in zip(store.models, store.activations(rows))
    }
    fit_known = store.activations(fit)[0][:, 0]
    scores = categories.probe(store, fit, (fit_known > fit_known.median()).numpy(), rows)
    assert auroc.auroc_of(scores["base"], known["base"]) > 0.95
    shuffled = np.random.default_rng(0).random(len(fit)) < 0.3
    assert (
        abs(auroc.auroc_of(categories.probe(store, fit, shuffled, rows)["base"], known["base"]) - 0.5) < 0.3
    )
    assert not categories.probe(store, fit, np.zeros(len(fit), dtype=bool), rows)["base"].any()


def test_shuffled_labels_leave_chance_and_planted_ones_do_not(toy, tmp_path):
    store, crosscoder = toy
    made = features.inspect(crosscoder, store, tmp_path / "features", "mark", build_tokenizer())

    def with_perfect_detector(split):
        planted = (store.labels["next_label"][split.rows] == LABELS.index("deduction"))[:, None].astype(
            np.float32
        )
        return SplitCodes(split.rows, sparse.csr_matrix(sparse.hstack([planted, split.codes[:, 1:]])))

    table = made.table.assign(nrn=1.0, alive=True)
    choose, report = map(with_perfect_detector, (made.choose, made.report))
    planted = features.Inspection(table, {}, made.contexts, choose, report, store, crosscoder)
    found = categories.shuffled_detectors(planted)
    assert abs(found["deduction"] - 0.5) < 0.2
    assert categories.detectors(planted, {"deduction": 0}, n_boot=5)["auroc"][0] == 1
    assert np.isnan(categories.shuffled_detectors(planted, nrn_over=1.0)["deduction"]), (
        "nothing to choose from"
    )


def test_a_crosscoder_of_another_store_is_refused(toy, run):
    store, crosscoder = toy
    with pytest.raises(UserError, match="run notebook 02_train_crosscoder first"):
        sharing.open_all(run, store)[0]
    crosscoder.save(run.path("crosscoder"))
    write_manifest(run.path("crosscoder"), "mark", store=store.fingerprint)
    loaded, mark = sharing.open_all(run, store)[0]
    assert mark == sharing.seeds.content(crosscoder) and torch.equal(loaded.W_dec, crosscoder.W_dec)
    write_manifest(run.path("crosscoder"), "mark", store="another")
    with pytest.raises(UserError, match="another store.*02_train_crosscoder again"):
        sharing.open_all(run, store)[0]


def exact_crosscoder(store):
    """Rows are an orthonormal basis of both models' joint space and its negative, so every activation is
    explained, and NRNs differ.
    """
    basis = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(0)))[0]
    crosscoder = CrossCoder(
        [16, 16], 64, store.models, "l1", scales=list(store.scales.values())
    ).requires_grad_(False)
    for weights in (crosscoder.W_enc, crosscoder.W_dec):
        weights.copy_(torch.cat([basis, -basis]))
    for bias in (crosscoder.b_enc, crosscoder.b_dec):
        bias.zero_()
    crosscoder.means.copy_(crosscoder.scaled([store.means[name] for name in store.models]))
    return crosscoder


def test_a_crosscoder_from_elsewhere_gives_the_table_of_the_own_one(run):
    store = toy_store(run.folder, tokens=3000, widths=(16, 16))
    crosscoder, folder, layer = exact_crosscoder(store), run.folder / "elsewhere", store.layers["base"]
    crosscoder.save(run.path("crosscoder"))
    write_manifest(run.path("crosscoder"), "mark", store=store.fingerprint)
    own, own_mark = sharing.open_all(run, store)[0]
    expected = features.inspect(own, store, run.folder / "own", own_mark, build_tokenizer())
    assert expected.table["nrn"].std() > 0.05 and expected.table["alive"].all()
    crosscoder.save(folder / "ours")
    exchange.export_replication(crosscoder, folder / "replication", layer)
    exchange.export_dictionary_learning(crosscoder, folder / "dictionary_learning", layer)
    pair, facts = toy_pair(run.folder, (16, 16)), {"ours": {"layer": layer, "least": 0.99}}
    for name in ("ours", "replication", "dictionary_learning"):
        found, mark = sharing.open_all(run, store, str(folder / name), facts.get(name))[0]
        assert mark == sharing.seeds.content(found) and (mark == own_mark) == (name == "ours")
        made = features.inspect(found, store, run.path("features"), mark, build_tokenizer())
        pd.testing.assert_frame_equal(made.table, expected.table, rtol=1e-4, atol=1e-4, check_exact=False)
        opened = table_module.open_artefacts_of_all(run, pair, str(folder / name), facts.get(name))
        assert opened[1][0].fingerprint == mark
        if name == "ours":  # the same weights under another name
            assert table_module.open_artefacts_of_all(run, pair)[1][0].fingerprint == mark
            continue
        with pytest.raises(UserError, match="made from another crosscoder.*same crosscoder_source"):
            table_module.open_artefacts_of_all(run, pair)


def test_what_the_file_does_not_say_is_asked_for(run):
    store = toy_store(run.folder, tokens=3000, widths=(16, 16))
    crosscoder, folder, layer = exact_crosscoder(store), run.folder / "elsewhere", store.layers["base"]
    crosscoder.save(folder / "ours")
    exchange.export_replication(crosscoder, folder / "replication", layer)
    (folder / "replication" / "origin.json").unlink()
    crosscoder.W_dec.mul_(0.1)
    exchange.export_dictionary_learning(crosscoder, folder / "poor", layer)
    facts = {"order": ["base", "distilled"], "scales": store.scales}
    sharing.open_all(run, store, str(folder / "replication"), facts)[0]
    for name, given, message in (
        ("ours", {}, "give layer"),
        ("replication", {}, "give order"),
        ("replication", {"order": facts["order"]}, "needs scales"),
        ("ours", {"layer": layer + 1}, "trained on the output of layer"),
        ("ours", {"depth": 3}, "unknown fact 'depth'"),
        ("poor", {}, "FVE is"),
        ("", {"layer": 1}, "give crosscoder_source"),
        ("nowhere", {}, "there is no"),
    ):
        with pytest.raises(UserError, match=message):
            sharing.open_all(run, store, name and str(folder / name), given)[0]


def test_wrong_requests_get_one_sentence(toy):
    store, crosscoder = toy
    for wrong in (40, -2, 1.5, True):
        with pytest.raises(UserError, match="features 0 to 39"):
            model_module.check_feature(crosscoder, wrong)
    assert model_module.check_feature(crosscoder, np.int64(39)) == 39


# --- what is shown ------------------------------------------------------------------------------------------


def test_top_contexts_by_hand():
    store = by_hand()
    found = contexts.top_contexts(_sized(store), coded(store, "report", COLUMNS), Words(), [0, 3, 4], n=2)
    assert found["feature"].tolist() == [0, 0, 3, 3], "a dead feature has none"
    assert found["rank"].tolist() == [1, 2, 1, 2] and found["activation"].tolist() == [2, 2, 1.5, 1.5]
    assert found["document"].tolist() == [3, 5, 3, 5], "one per document"
    assert found["text"][0] == "so 9 «.» wait . but ." and found["label"][0] == "deduction"


def test_activations_at_masked_tokens_are_zero():
    store = by_hand()
    some = coded(store, "report", COLUMNS)
    some = SplitCodes(some.rows[1:], some.codes[1:])
    rows = np.arange(some.rows[0] - 1, some.rows[0] + 3)
    fires = contexts.firings(some.rows, some.codes.tocsc(), 0)
    assert contexts.activations_at(*fires, rows).tolist() == [0, 0, 2, 0]
    assert contexts.activations_at(*fires, np.array([10_000])).tolist() == [0]


def test_profile_and_headline(table):
    store = by_hand()
    shares = contexts.profile(store, coded(store, "report", COLUMNS), 0).set_index(["panel", "label"])
    assert shares.at[("before a sentence of", "reflection"), "activation"] == 1
    assert shares.at[("before a sentence of", "reflection"), "tokens"] == pytest.approx(2 / 17)
    assert shares.at[("in a sentence of", "deduction"), "activation"] == 1
    assert contexts.headline(table, 0) == "Feature 0: NRN 0.75, fires on 11.76% of tokens, before reflection"
    assert "never fires" in contexts.headline(table, 4)


def test_a_map_of_too_few_features_is_empty(toy):
    _, crosscoder = toy
    frame = pd.DataFrame(
        {"feature": range(40), "alive": [True] * 5 + [False] * 35, "nrn": 0.5, "label": "", "top_token": ""}
    )
    assert contexts.map_of_features(crosscoder, frame).empty


def _sized(store):
    """The stand-in with a length (``len`` looks at the class)."""
    return type("Sized", (SimpleNamespace,), {"__len__": lambda self: len(self.tokens)})(**vars(store))
