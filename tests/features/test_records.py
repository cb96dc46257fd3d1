"""What the package puts into notebook 03's results: the null's threshold by hand, numbers against the tables
that they come from, and a scoreboard whose outcomes are known.
"""

import json
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from toys import toy_store

from lib.crosscoder.model import CrossCoder
from lib.distil.organism import build_tokenizer
from lib.features import detectors, naming, plots, scores, table, token_tests, uniqueness, use
from lib.labels import CATEGORIES, DETECTED
from lib.results import Results
from lib.runs import Run
from lib.settings import UserError


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


def write_null(run: Run, threshold: float, crosscoder: str = "crosscoder-1") -> None:
    folder = run.figures / "study" / "nulls"
    folder.mkdir(parents=True, exist_ok=True)
    limits = pd.DataFrame(
        [("nrn", side, 0.01, x) for side, x in (("distilled", threshold), ("base", 0.1))],
        columns=["score", "side", "level", "threshold"],
    )
    limits.to_csv(folder / "thresholds.csv", index=False)
    manifest = {
        "fingerprint": "x",
        "inputs": {"crosscoder": crosscoder},
        "seconds": 1,
        "tables": ["thresholds"],
    }
    manifest["metrics"] = {"use_limit": {"value": 0.5, "ci": None, "n": 9}}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_unique_is_what_lies_beyond_the_null(inspection, results):
    frame = inspection.table
    unknown = uniqueness.record(results, frame, inspection.chosen, "crosscoder-1")
    assert not unknown.above.any() and np.isnan(unknown.threshold) and np.isnan(unknown.use_limit)
    assert results.values["unique_above_null"] is None and unknown.words(0) == "no null to compare with"
    threshold = float(frame["nrn"][frame["alive"]].sort_values().iloc[-4])
    write_null(inspection.run, threshold)
    unique = uniqueness.record(results, frame, inspection.chosen, "crosscoder-1")
    assert unique.above.tolist() == (frame["alive"] & (frame["nrn"] > threshold)).tolist()
    assert results.values["unique_above_null"] == 3 and results.values["nrn_threshold"] == threshold
    assert unique.below.tolist() == (frame["alive"] & (frame["nrn"] < 0.1)).tolist()
    assert unique.status["above the null"].tolist() == unique.above[list(inspection.chosen.values())].tolist()
    assert unique.words(int(np.flatnonzero(unique.above)[0])) == "above the null" and unique.use_limit == 0.5
    other = uniqueness.record(results, frame, inspection.chosen, "crosscoder-2")
    assert not other.above.any() and "Refused" in other.null.note
    figure, points = plots.scaling(frame, unique.above, threshold)
    assert (points["kind"] == "not above").sum() < len(points) and len(figure.data) == 2


def test_numbers_are_those_of_the_tables(inspection, results):
    write_null(inspection.run, 0.6)
    frame = inspection.table
    table.record(results, frame)
    assert results.values["alive"] == frame["alive"].sum() == len(inspection.alive)
    assert results.values["nrn_over_0_9"] == (inspection.alive["nrn"] > 0.9).mean()
    labelled = table.record_extremes(results, inspection, groups := table.extremes(frame, 5))
    assert results.values["token_detectors_highest"] == (groups["highest"]["token_r2"] > 0.5).mean()
    assert len(labelled) == 15 and labelled["reasoning"].dtype == bool
    tests, by_category, shuffled = detectors.record(results, inspection, n_boot=5)
    for c in DETECTED:
        assert results.values[f"auroc_{c}"] == pytest.approx(
            frame[f"auroc_{c}"][inspection.chosen[c]], abs=1e-6
        )
    assert by_category["feature"].tolist() == list(inspection.chosen.values()) and set(shuffled) == set(
        DETECTED
    )
    best = detectors.record_of_any_nrn(results, inspection, n_boot=5).set_index("category")
    assert all(best["best of any NRN"] == [table.category_features(frame, -1)[c] for c in best.index])
    markers = table.category_features(frame, where="marker")
    detectors.record_markers(results, inspection, markers, n_boot=5)
    unique = uniqueness.record(results, frame, inspection.chosen, "crosscoder-1")
    measured = use.record(results, inspection, unique, 2000, 5)
    alive = measured[measured["alive"]]
    assert results.values["use_reweighted"] == (alive["kind"] == "reweighted").mean()
    assert results.values["use_change_median"] == alive["change"].median()
    rates = [("before", "injected", 0.2), ("before", "in context", 0.9), ("marker", "injected", 0.9)]
    given = [(c, w, inspection.chosen[c], t, r, r, r, 9) for c in CATEGORIES for w, t, r in rates]
    judged = token_tests.record(results, pd.DataFrame(given, columns=token_tests.COLUMNS), frame, tests)
    assert (
        results.values["injection_rate_contrast"] == 0.2
        and results.values["decoy_rate_marker_contrast"] is None
    )
    board = scores.scoreboard(results, inspection, unique, tests, shuffled, judged).set_index("prediction")
    held = {key: board["held"][text] for key, text in scores.PREDICTIONS.items()}
    assert held["injection"] == held["verdict"] == "yes" and held["planted"] == held["stable"] == "undecided"
    assert held["aim"] == ("yes" if all(results.values[f"auroc_{c}"] >= 0.9 for c in CATEGORIES) else "no")
    for figure in (plots.detectors(tests), plots.use(measured, 0.5)[0]):
        assert len(figure.data) >= 2
    results.write()


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
