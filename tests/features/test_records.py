"""What the package puts into notebook 03's results: the null's threshold by hand, numbers against the tables
that they come from, and a scoreboard whose outcomes are known.
"""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse
from toys import toy_store

from lib.crosscoder.codes import SplitCodes
from lib.crosscoder.model import CrossCoder
from lib.distil.organism import build_tokenizer
from lib.features import (
    control,
    detectors,
    naming,
    plots,
    scores,
    subspaces,
    table,
    token_tests,
    uniqueness,
    use,
)
from lib.features.detectors import Places
from lib.features.table import Detector
from lib.labels import CATEGORIES, DETECTED
from lib.models.pairs import load_pair
from lib.results import Results
from lib.runs import Run
from lib.settings import UserError
from lib.stats import wilson
from lib.verdicts import above, below


@pytest.fixture(scope="module")
def inspection(tmp_path_factory):
    folder = tmp_path_factory.mktemp("records")
    store = toy_store(folder, tokens=6000, widths=(16, 16))
    crosscoder = CrossCoder([16, 16], 40, store.models, k=6, scales=list(store.scales.values()))
    crosscoder.centre([store.means[m].float() for m in store.models])
    crosscoder.threshold.fill_(0.02)
    crosscoder.W_dec.data[:20, 16:] *= 3  # the distilled model's rows are longer
    crosscoder, tokenizer = crosscoder.requires_grad_(False), build_tokenizer()
    inspected = table.inspect(crosscoder, store, folder / "features", "crosscoder-1", tokenizer)
    run = Run("tiny", "toy", folder)
    return replace(inspected, run=run)


@pytest.fixture
def results(inspection):
    return Results("03", inspection.run, {})


def write_null(run: Run, threshold: float, nu: float = 0.5, crosscoder: str = "crosscoder-1") -> None:
    """The part "nulls" with these thresholds, and the scores of a null of ten features: nu 0.0 to 0.9, NRN
    the same, all of the distilled side; a second null has them 0.05 higher."""
    folder = run.figures / "study" / "nulls"
    folder.mkdir(parents=True, exist_ok=True)
    limits = [("nrn", "distilled", threshold), ("nrn", "base", 0.1), ("nu_eps", "distilled", nu)]
    limits = pd.DataFrame(limits, columns=["score", "side", "threshold"]).assign(level=0.01)
    # a crosscoder of its own, with limits that nothing reaches
    second = limits.assign(seed=1, threshold=[9.0, -9.0, -9.0])
    scores = pd.DataFrame(
        {"feature": range(10), "alive": True, "nrn": np.arange(10) / 10, "side": "distilled"}
    )
    scores["nu_eps"] = scores["nrn"]
    nulls = [
        scores.assign(pair=pair, seed=seed) for seed in (0, 1) for pair in ("base, null_a", "base, null_b")
    ]
    nulls[1]["nu_eps"] += 0.05
    tables = {"thresholds": pd.concat([limits.assign(seed=0), second]), "null_scores": pd.concat(nulls)}
    for name, frame in tables.items():
        frame.to_csv(folder / f"{name}.csv", index=False)
    manifest = {
        "fingerprint": "x",
        "inputs": {"crosscoder": crosscoder},
        "seconds": 1,
        "tables": list(tables),
    }
    manifest["metrics"] = {"use_limit": {"value": 0.5, "ci": None, "n": 9}}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_unique_is_what_lies_beyond_the_null(inspection, results):
    frame = inspection.table
    (unknown,) = uniqueness.record_all(results, [inspection])
    assert not unknown.above.any() and np.isnan(unknown.threshold) and np.isnan(unknown.use_limit)
    assert results.values["unique_above_null"] is None and unknown.words(0) == "no null to compare with"
    threshold = float(frame["nrn"][frame["alive"]].sort_values().iloc[-4])
    side = frame[frame["alive"] & (frame["side"] == "distilled")]
    nu = float(side["nu_eps"].abs().sort_values().iloc[5])
    write_null(inspection.run, threshold, nu)
    (unique,) = uniqueness.record_all(results, [inspection])
    assert unique.above.tolist() == (frame["alive"] & (frame["nrn"] > threshold)).tolist()
    assert results.values["unique_above_null"] == 3 and results.values["nrn_threshold"] == threshold
    assert unique.below.tolist() == (frame["alive"] & (frame["nrn"] < 0.1)).tolist()
    expected = frame["alive"] & (frame["side"] == "distilled") & (frame["nu_eps"].abs() < nu)
    assert unique.unique.tolist() == expected.tolist() and results.values["unique_by_nu"] == 5
    assert unique.status["above the null"].tolist() == unique.above[list(inspection.chosen.values())].tolist()
    assert "NRN" in unique.words(int(np.flatnonzero(unique.above)[0])) and unique.use_limit == 0.5
    write_null(inspection.run, threshold, nu, "crosscoder-2")
    (other,) = uniqueness.record_all(results, [inspection])
    assert not other.above.any() and "Refused" in other.null.note
    figure, points = plots.scaling(frame, unique.above, threshold)
    assert (points["kind"] == "not above").sum() < len(points) and len(figure.data) == 2


def test_what_was_planted_is_measured_by_its_dimensions(inspection, results):
    crosscoder, store = inspection.crosscoder, inspection.store
    width, rows = 4, crosscoder.rows("distilled", raw=True).double()
    pair = replace(load_pair("tiny"), planted=width)
    given = replace(inspection, pair=pair)
    share = rows[:, -width:].square().sum(1) / rows.square().sum(1)
    found = np.zeros(len(rows), dtype=bool)
    found[inspection.alive["feature"][:5]] = True
    table = control.record(results, given, found)
    planted = (share > 0.5).numpy() & inspection.table["alive"].to_numpy()
    assert results.values["control_planted"] == planted.sum() and results.values["control_found"] == 5
    assert results.values["control_subspace_precision"] == pytest.approx((planted & found).sum() / 5)
    x = store.activations(given.report.rows)[1].double()
    f = torch.from_numpy(given.report.codes.toarray()).double()
    f[:, ~torch.from_numpy(found)] = 0
    error = (x - f @ rows - crosscoder.bias("distilled", raw=True).double())[:, -width:].square().sum()
    variance = (x - x.mean(0))[:, -width:].square().sum()
    recall = float(1 - error / variance)
    assert results.values["control_subspace_recall"] == pytest.approx(recall, abs=1e-6)
    low, high = results.metrics["control_subspace_recall"]["ci"]
    assert low < recall < high and set(table["feature"]) == set(np.flatnonzero(planted | found))
    # nothing found: nothing is explained, and there is no precision
    control.record_all(results, [given], [np.zeros(len(rows), dtype=bool)])
    assert results.values["control_subspace_precision"] is None
    assert results.values["control_subspace_precision_worst"] == 0
    assert results.values["control_subspace_recall_worst"] == results.values["control_subspace_recall"] <= 0


def test_false_discoveries_by_hand(inspection, results):
    alive = inspection.alive
    side = alive[alive["side"] == "distilled"]
    write_null(inspection.run, float(alive["nrn"].min()), 0.25)
    (unique,) = uniqueness.record_all(results, [inspection])
    assert results.values["nu_chance"] == pytest.approx(0.01 * len(side))
    # the null that tests has nu 0.05, 0.15, 0.25 and so on: two of ten lie below 0.25
    assert results.values["nu_false"] == pytest.approx(0.2) and results.metrics["nu_false"]["n"] == 10
    share = unique.unique.sum() / len(side)
    rate = results.values["nu_false_discovery"]
    assert rate == pytest.approx(min(1, 0.2 / share)) if share else rate is None
    assert results.values["nu_median_null"] == pytest.approx(0.5)
    # every crosscoder has the limits of its own number
    second = replace(inspection, number=1)
    uniqueness.record(results, second, unique.null, unique.planted)
    assert results.values["unique_by_nu"] == results.values["unique_above_null"] == 0
    assert results.values["nu_false_discovery"] is None


def test_a_recurrent_feature_is_unique_if_it_is_in_four_of_five(inspection, results):
    write_null(inspection.run, 9.0, 0.5)
    folder = inspection.run.figures / "study" / "nulls"
    limits = pd.read_csv(folder / "thresholds.csv")
    limits[limits["seed"] == 0].drop(columns="seed").to_csv(folder / "thresholds.csv", index=False)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["inputs"]["crosscoders"] = ["crosscoder-1"] * 5
    (folder / "manifest.json").write_text(json.dumps(manifest))
    table = inspection.table.assign(alive=True, side="distilled", nu_eps=1.0, cluster=-1, stability=0.5)
    table["recurrent"] = table.index < 3
    table.loc[:2, "cluster"] = [0, 1, 2]
    each = []
    for number in range(5):
        own = table.copy()
        own.loc[0, "nu_eps"] = 0.1  # unique in all five
        own.loc[1, "nu_eps"] = 0.1 if number < 4 else 0.9  # in four
        own.loc[2, "nu_eps"] = 0.1 if number < 3 else 0.9  # in three
        own.loc[9, "nu_eps"] = 0.1  # in all, but in no cluster
        each.append(replace(inspection, table=own, number=number))
    uniqueness.record_all(results, each)
    assert results.values["unique_recurrent"] == 2 and results.metrics["unique_recurrent"]["n"] == 3
    assert results.values["unique_recurrent_nrn"] == 0
    assert [seed[0] for seed in results.metrics["unique_by_nu"]["seeds"]] == [4, 4, 4, 3, 2]


def test_numbers_are_those_of_the_tables(inspection, results):
    write_null(inspection.run, 0.6)
    frame = inspection.table
    table.record(results, frame)
    assert results.values["alive"] == frame["alive"].sum() == len(inspection.alive)
    assert results.values["nrn_over_0_9"] == (inspection.alive["nrn"] > 0.9).mean()
    labelled = table.record_extremes(results, inspection, groups := table.extremes(frame, 5))
    assert results.values["token_detectors_highest"] == (groups["highest"]["token_r2"] > 0.5).mean()
    gap = results.values["token_detectors_lowest"] - results.values["token_detectors_highest"]
    assert results.values["token_detectors_gap"] == pytest.approx(gap)
    assert len(labelled) == 15 and labelled["reasoning"].dtype == bool
    controls = detectors.Controls(inspection, 5)
    tests, (of_first,), by_category = detectors.record_all(results, [inspection], controls)
    for c, d in inspection.detectors.items():
        value = frame[f"{table.PLACES[d.place]}_{c}"][d.feature]
        assert results.values[f"auroc_{c}"] == pytest.approx(value if d.sign > 0 else 1 - value, abs=1e-6)
        sentence = results.values[f"sentence_only_auroc_{c}"]
        assert results.values[f"gain_{c}"] == pytest.approx(results.values[f"auroc_{c}"] - sentence)
    assert by_category["feature"].tolist() == list(inspection.chosen.values())
    pd.testing.assert_series_equal(tests["auroc"], of_first["auroc"])
    assert all(f"null_auroc_{c}" in results.values for c in DETECTED)
    best = detectors.record_of_any_nrn(results, inspection, controls).set_index("category")
    assert all(
        best["best of any NRN"] == [table.category_detectors(frame, -1)[c].feature for c in best.index]
    )
    assert all(
        results.values[f"any_nrn_gain_{c}"] == best["AUROC"][c] - best["its AUROC"][c] for c in best.index
    )
    markers = table.category_features(frame, where="marker")
    detectors.record_markers(results, inspection, markers, controls)
    for c, f in markers.items():
        assert results.values[f"marker_feature_auroc_{c}"] == pytest.approx(
            frame[f"auroc_marker_{c}"][f], abs=1e-6
        )
    (unique,) = uniqueness.record_all(results, [inspection])
    measured = use.record(results, inspection, unique, 2000, 5)
    alive = measured[measured["alive"]]
    assert results.values["use_reweighted"] == (alive["kind"] == "reweighted").mean()
    assert results.values["use_change_median"] == alive["change"].median()
    rates = [("before", "injected", 0.2), ("before", "in context", 0.9), ("marker", "injected", 0.9)]
    given = [(c, w, inspection.chosen[c], t, r, r, r, 9) for c in CATEGORIES for w, t, r in rates]
    with_given = lambda *args: pd.DataFrame(given, columns=token_tests.COLUMNS)  # noqa: E731
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(token_tests, "token_tests", with_given)
        _, judged = token_tests.record(results, inspection, markers, of_first, "texts")
    assert results.values["injection_rate_contrast"] == 0.2
    assert results.values["decoy_rate_marker_contrast"] is None
    assert results.values["more_than_token_contrast"] == 1 and set(judged["where"]) == {"before", "marker"}
    detectors.record_fact_of_all(results, [inspection], [unique.unique], controls)
    board = scores.scoreboard(results, [inspection], [unique]).set_index("prediction")
    held = {key: board["held"][text] for key, text in scores.PREDICTIONS.items()}
    assert held["injection"] == held["verdict"] == "yes"
    assert held["planted"] == "not testable, because the planted truth has not been computed"
    assert held["stable"] == held["subspace"] == "not testable, because there is only one crosscoder"
    assert held["token (control)"] in ("no", "undecided", "yes") and len(board) == len(scores.PREDICTIONS)
    for figure in (plots.detectors(tests), plots.use(measured, 0.5)[0]):
        assert len(figure.data) >= 2
    results.write()


def test_what_cannot_fail_is_not_testable(inspection, results):
    for c in CATEGORIES:
        results.add(f"injection_rate_{c}", 0.1, (0.05, 0.2), 50)
        results.add(f"in_context_rate_{c}", 0.4 if c == "contrast" else 0.9, None, 50)
    conditions = [below(f"injection_rate_{c}", 0.5) for c in CATEGORIES]
    rare = "the features of contrast fire before fewer than half of their own sentences"
    assert scores._injection(results, CATEGORIES, conditions) == rare
    results.add("injection_rate_reflection", 0.8, (0.7, 0.9), 50)
    assert len(scores._injection(results, CATEGORIES, conditions)) == 3, "it has failed for another category"
    results.add("in_context_rate_contrast", 0.6, None, 50)
    assert scores._injection(results, CATEGORIES, conditions) == conditions


def test_nothing_is_better_than_a_control_that_is_always_right(results):
    gains = [above(f"gain_{c}") for c in CATEGORIES]
    controls = dict.fromkeys(CATEGORIES, 0.8) | {"alternative": 1.0, "contrast": None}
    left = scores._with_room(gains, controls)
    assert [x.metric for x in left] == ["gain_reflection", "gain_deduction", "gain_contrast"]
    for c in CATEGORIES:
        results.add(f"gain_{c}", 0.1, (0.05, 0.2), 50)
    assert scores._words(results, left, CATEGORIES).endswith(
        "contrast 0.10 [0.05, 0.20]; alternative not testable"
    )
    why = scores._with_room(gains, dict.fromkeys(CATEGORIES, 1.0))
    assert why.endswith("for reflection, deduction, alternative, contrast: nothing can be better")


# --- errors, planted ----------------------------------------------------------------------------------------


def with_errors(inspection, number: int, noise: float = 0.0):
    """The same with one feature that fires at the values of wrong steps, ``number``, in the place of what it
    was."""
    rng = np.random.default_rng(number)

    def planted(coded):
        at = Places(inspection.store, coded, "value", "deduction")
        wrong = np.zeros(len(coded.rows))
        hit = detectors.holds(inspection.store, at)
        wrong[at.index] = hit * (rng.random(len(hit)) >= noise)
        dense = coded.codes.toarray()
        dense[:, number] = wrong
        return SplitCodes(coded.rows, sparse.csr_matrix(dense.astype(np.float32)))

    frame = inspection.table.copy()
    frame.loc[number, ["alive", "frequency_choose"]] = True, 0.1
    return replace(
        inspection, table=frame, choose=planted(inspection.choose), report=planted(inspection.report)
    )


def test_the_feature_of_errors_is_found_at_its_place(inspection, results):
    ours = with_errors(inspection, 7)
    controls = detectors.Controls(ours, 5)
    if not detectors.holds(ours.store, controls.places("report", "value", "deduction")).any():
        pytest.skip("the toy text has no errors")
    assert detectors.fact_detector(controls, ours.choose, ours.table) == Detector(7, "value", 1)
    assert detectors.fact_detector(controls, ours.choose, ours.table, ["before"]).feature != 7
    five = [replace(with_errors(inspection, f), number=s) for s, f in enumerate((7, 7, 3, 7, 7))]
    cluster = {7: 0, 3: 1}
    five = [
        replace(i, table=i.table.assign(cluster=i.table["feature"].map(cluster).fillna(-1), recurrent=True))
        for i in five
    ]
    nowhere = np.zeros(len(ours.table), dtype=bool)
    unique = [nowhere | (np.arange(len(nowhere)) == 7)] * 5
    found = detectors.record_fact_of_all(results, five, unique, controls)
    assert found["feature"].tolist() == [7, 7, 3, 7, 7] and (found["auroc"] == 1).all()
    assert results.values["error_auroc"] == results.values["error_fires_wrong"] == 1
    assert results.values["error_fires_right"] == 0 and results.values["error_at_value"] == 1
    assert results.values["error_recurrence"] == results.values["error_beyond_null"] == 0.8
    assert results.metrics["error_beyond_null"]["ci"] == list(wilson(4, 5))
    by_place = detectors.errors_by_place(five[:1], controls)
    best = by_place[by_place["predictor"] == "best feature"].set_index("place")["auroc"]
    assert best["value"] == 1 and best["before"] < 1


def test_places_that_were_computed_once_are_those_of_each_crosscoder(inspection):
    controls = detectors.Controls(inspection, 20)
    of_one = detectors.detectors(inspection, inspection.detectors, 20)
    of_all = detectors.detectors(inspection, inspection.detectors, controls=controls)
    pd.testing.assert_frame_equal(of_one, of_all)
    c, (feature, place, sign) = next(iter(inspection.detectors.items()))
    flipped = detectors.detectors(inspection, {c: Detector(feature, place, -sign)}, controls=controls)
    assert flipped["auroc"][0] == pytest.approx(1 - of_one["auroc"][0])


# --- subspaces ----------------------------------------------------------------------------------------------


def test_principal_angles_by_hand():
    x, y, z = np.eye(3)
    assert subspaces.principal_cosines([x, y], [y + x, x - y]).tolist() == pytest.approx([1, 1])
    assert subspaces.principal_cosines([x, y], [x, z]).tolist() == pytest.approx([1, 0])
    angle = np.radians(30)
    tilted = np.cos(angle) * y + np.sin(angle) * z
    assert subspaces.principal_cosines([x, y], [x, tilted]).tolist() == pytest.approx([1, np.cos(angle)])
    assert len(subspaces.principal_cosines([x, 2 * x], [x, y])) == 1, "a rank below the number of rows"


def test_a_rotated_group_spans_the_same_subspace(inspection, results):
    rng, chosen = np.random.default_rng(0), subspaces.groups(inspection)
    features = chosen["reflection"]
    turned = CrossCoder([16, 16], 40, inspection.crosscoder.names, k=6).requires_grad_(False)
    turned.W_dec.copy_(torch.from_numpy(rng.normal(size=(40, 32)).astype(np.float32)))
    mixed = (
        np.linalg.qr(rng.normal(size=(5, 5)))[0] @ inspection.crosscoder.rows("distilled").numpy()[features]
    )
    turned.W_dec[features, 16:] = torch.from_numpy(mixed.astype(np.float32))
    other = replace(inspection, crosscoder=turned, number=1)
    found = subspaces.record_all(results, [inspection, other]).set_index("category")
    assert found.at["reflection", "mean cosine"] == pytest.approx(1, abs=1e-4)
    assert found.at["reflection", "random groups"] < 0.9
    assert found.at["reflection", "best single match"] < 0.999, "no feature of one is one of the other"
    gain = results.values["subspace_reflection"] - results.values["subspace_random_reflection"]
    assert results.values["subspace_gain_reflection"] == pytest.approx(gain)
    assert subspaces.record_all(results, [inspection]).empty


def test_sentence_ends_and_features_to_show(inspection):
    index, following = inspection.sentence_ends("report")
    rows = inspection.report.rows[index]
    assert (inspection.store.labels["ends"][rows] == 1).all() and {"reflection", "deduction"} <= set(
        following
    )
    assert (
        inspection.feature_to_show(-1) == inspection.chosen["reflection"]
        and inspection.feature_to_show(7) == 7
    )
    with pytest.raises(UserError, match="feature"):
        inspection.feature_to_show(40)
    dense = inspection.report.codes.toarray()
    assert np.array_equal(inspection.activations(7), dense[:, 7]) and inspection.categories == list(
        CATEGORIES
    )


def test_without_an_endpoint_nothing_is_asked(inspection, results, monkeypatch):
    monkeypatch.delenv("LABEL_URL", raising=False)
    named, note = naming.record(results, inspection, table.extremes(inspection.table, 3))
    assert named is None and "no endpoint" in note
    monkeypatch.setenv("LABEL_URL", "http://127.0.0.1:1/v1")
    monkeypatch.setenv("LABEL_MODEL", "m")
    monkeypatch.setattr(naming.time, "sleep", lambda seconds: None)
    named, note = naming.record(results, inspection, table.extremes(inspection.table, 3))
    assert named is None and note.startswith("**No names:**")
