"""The feature explorer: what it lists, what it shows, and that it keeps to what is on disk."""

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse
from toys import toy_store

from lib.crosscoder.codes import SplitCodes, codes
from lib.crosscoder.model import CrossCoder
from lib.crosscoder.recurrence import MEMBERS
from lib.distil.organism import build_tokenizer
from lib.features import explorer
from lib.features.contexts import top_contexts
from lib.features.explorer import Columns, Explorer
from lib.figures import PLOTLY_MIME
from lib.settings import UserError

F = 24


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """(store, crosscoder, coded, columns) of a random pair."""
    folder = tmp_path_factory.mktemp("explorer")
    store = toy_store(folder, widths=(16, 24))
    crosscoder = CrossCoder(list(store.widths.values()), F, variant="l1", names=list(store.models), seed=1)
    with torch.no_grad():  # biased, so that a feature fires on some tokens and not on others
        crosscoder.b_enc.copy_(torch.linspace(-0.4, -0.01, F))
    coded = codes(crosscoder, store, "report")
    return store, crosscoder, coded, Columns.build(coded, folder / "columns", "mark")


def table_of(crosscoder, coded) -> pd.DataFrame:
    fires = np.asarray((coded.codes > 0).sum(axis=0)).ravel()
    return pd.DataFrame(
        {
            "feature": range(F),
            "alive": fires > 0,
            "nrn": crosscoder.nrn().numpy(),
            "frequency": fires / len(coded.rows),
            "mean_activation": 1.0,
            "label": ["before reflection", "mixed"] * (F // 2),
            "top_token": "wait",
        }
    )


@pytest.fixture
def explore(parts):
    store, crosscoder, coded, columns = parts
    table = table_of(crosscoder, coded).assign(stability=np.linspace(0, 1, F))
    members = pd.DataFrame([(3, 1, 17, 0.93), (3, 4, 8, 0.75)], columns=MEMBERS)
    places = pd.DataFrame({"feature": range(F), "x": np.arange(F), "y": 0.0})
    return Explorer(crosscoder, store, table, columns, build_tokenizer(), places, members=members)


def test_the_same_feature_in_other_crosscoders_is_named(explore):
    text = explore.view(3)[1].data
    assert "crosscoder 1: 17 (0.93); crosscoder 4: 8 (0.75)" in text
    assert "No feature of another crosscoder is the same" in explore.view(2)[1].data


def test_activations_on_disk_are_those_in_memory(parts):
    store, _, coded, columns = parts
    dense = coded.codes.toarray()
    assert isinstance(columns.values, np.memmap)
    for feature in range(F):
        rows, values = columns.of(feature)
        assert (rows == coded.rows[dense[:, feature] > 0]).all() and np.allclose(
            values, dense[dense[:, feature] > 0, feature]
        )
        assert np.allclose(columns.at(feature, coded.rows), dense[:, feature])
        expected = top_contexts(store, coded, build_tokenizer(), [feature], n=5)
        assert [r for r, _ in columns.strongest(feature, store.documents, 5)] == expected["row"].tolist()


def test_columns_are_made_anew_from_something_else_and_only_then(tmp_path):
    one, two = (
        SplitCodes(np.arange(2), sparse.csr_matrix(np.array(values, np.float32)))
        for values in ([[1, 0], [0, 2]], [[0, 3], [0, 0]])
    )
    Columns.build(one, tmp_path, "a")
    assert Columns.build(two, tmp_path, "a").of(0)[1].tolist() == [1], "the same mark: what is there is read"
    assert (
        Columns.build(two, tmp_path, "b").of(1)[1].tolist() == [3]
        and len(Columns.build(two, tmp_path, "b").of(0)[0]) == 0
    )


def test_the_list_is_filtered_and_sorted(explore):
    table = explore.table[explore.table.alive]
    assert (
        explore.select(sort="NRN")["feature"].tolist()
        == table.sort_values(["nrn", "feature"], ascending=[False, True])["feature"].tolist()
    )
    assert explore.select(sort="feature", descending=False, label="mixed")["feature"].tolist() == [
        f for f in table.feature if f % 2
    ]
    assert set(explore.select(stable=0.5)["feature"]) == {f for f in table.feature if f / (F - 1) >= 0.5}
    low, high = table["nrn"].quantile([0.25, 0.75])
    assert explore.select(nrn=(low, high))["nrn"].between(low, high).all() and len(
        explore.select(nrn=(low, high))
    ) < len(table)
    assert (explore.select(frequency=0.1)["frequency"] >= 0.1).all()
    assert len(explore.select(alive=False)) == F
    with pytest.raises(UserError, match="sort"):
        explore.select(sort="beauty")
    with pytest.raises(UserError, match="no labels"):
        explore.select(sort="AUROC, reflection")  # a column that this table does not have


def test_contributions_and_bias_add_up_to_the_activation(parts, explore):
    store, crosscoder, coded, columns = parts
    feature = int(np.argmax(np.diff(columns.bounds)))
    rows, values = columns.of(feature)
    found = explore.contributions(feature, rows)
    means = crosscoder.W_enc[feature].detach() @ crosscoder.means
    assert np.allclose(
        sum(found.values()) + float((means + crosscoder.b_enc[feature]).detach()), values, atol=1e-4
    )


def test_nearest_features_are_those_of_brute_force(parts, explore):
    crosscoder = parts[1]
    rows = torch.nn.functional.normalize(crosscoder.W_dec.detach(), dim=1)
    cosines = (rows @ rows.T).fill_diagonal_(-2)
    for feature in (0, 7):
        found = explore.nearest(feature, 3)
        assert [f for f, _ in found] == cosines[feature].topk(3).indices.tolist()
        assert np.allclose([c for _, c in found], cosines[feature].topk(3).values)


def test_a_view_has_the_feature_marked_and_the_words_escaped(explore, monkeypatch):
    feature = int(np.argmax(np.diff(explore.columns.bounds)))
    figure, text = explore.view(feature)
    assert figure.layout.title.text.startswith(f"Feature {feature}:")
    assert figure.layout.shapes[0].x0 == pytest.approx(float(explore.table.nrn[feature]))
    assert {t.name for t in figure.data} >= {"base", "distilled"} and figure.data[-1].x[0] == feature
    monkeypatch.setattr(
        explore.tokenizer, "convert_ids_to_tokens", lambda ids: ["<script>alert(1)</script>"] * len(ids)
    )
    explore.table.loc[feature, "label"] = "<img src=x onerror=alert(1)>"
    explore.named[feature] = {"label": "<b onclick=alert(1)>"}
    text = explore.view(feature)[1].data
    assert (
        "<script>" not in text
        and "<img" not in text
        and "<b onclick" not in text
        and "&lt;script&gt;" in text
    )
    for wrong in (-1, F, 1.5, True, "3"):
        with pytest.raises(UserError, match="does not exist"):
            explore.view(wrong)


def test_a_feature_that_never_fires_is_shown_all_the_same(parts):
    store, crosscoder, coded, _ = parts
    empty = Columns(np.zeros(F + 1, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32))
    table = table_of(crosscoder, coded).assign(alive=False)
    figure, text = Explorer(crosscoder, store, table, empty, build_tokenizer()).view(0)
    assert "never fires" in text.data and len(figure.data) == 1


def named(box, description):
    todo = [box]
    while todo:
        widget = todo.pop()
        if getattr(widget, "description", None) == description:
            return widget
        todo += getattr(widget, "children", ())


def test_the_widget_follows_clicks_filters_and_numbers(explore):
    box = explore.widget()
    table, output = next(w for w in box.children if type(w).__name__ == "Select"), box.children[-1]
    title = lambda: output.outputs[1]["data"][PLOTLY_MIME]["layout"]["title"]["text"].split(":")[0]  # noqa: E731
    first = explore.select().feature.iloc[0]
    assert title() == f"Feature {first}" and table.value == first
    table.value = table.options[2][1]
    assert (
        title() == f"Feature {explore.select().feature.iloc[2]}"
        and named(box, "Feature number").value == table.value
    )
    named(box, "Row").value = 2
    assert (
        title() == f"Feature {explore.select().feature.iloc[1]}"
        and table.value == explore.select().feature.iloc[1]
    )
    named(box, "Feature number").value = 5
    assert title() == "Feature 5"
    near = named(box, "Go to")
    near.value = near.options[1][1]
    assert title() == f"Feature {explore.nearest(5)[0][0]}"
    named(box, "Label").value = "mixed"
    assert (
        all(f % 2 for _, f in table.options)
        and title() == f"Feature {explore.select(label='mixed').feature.iloc[0]}"
    )
    named(box, "NRN").value = (0.0, 0.0)
    assert (
        table.options == ()
        and "0 of"
        in next(w for b in box.children for w in getattr(b, "children", ()) if "alive" in str(w.value)).value
    )


def test_more_rows_than_a_page(explore, monkeypatch):
    monkeypatch.setattr(explorer, "PAGE", 5)
    box = explore.widget()
    table, page = next(w for w in box.children if type(w).__name__ == "Select"), named(box, "Page")
    everything = explore.select().feature.tolist()
    assert page.max == -(-len(everything) // 5) and [f for _, f in table.options] == everything[:5]
    page.value = 2
    assert [f for _, f in table.options] == everything[5:10]
    named(box, "Sort by").value = "frequency"
    assert (
        page.value == 1
        and [f for _, f in table.options] == explore.select(sort="frequency").feature.tolist()[:5]
    )
