"""Every number in README's tables comes from a result file."""

import json

import pytest

from lib.settings import ROOT, UserError
from lib.tools import readme


def test_readme_shows_the_committed_results():
    text = (ROOT / "README.md").read_text()
    assert readme.written(text, readme.RESULTS, ROOT / "benchmarks") == text, "run: python -m lib publish"


def test_the_scoreboards_show_the_committed_predictions():
    assert (
        readme.scoreboard([readme.REAL], "the pair smol, a real language model")
        == (ROOT / "docs" / "scoreboard_smol.md").read_text()
    )
    assert readme.scoreboard(readme.RESULTS) == (ROOT / "docs" / "scoreboard.md").read_text(), (
        "run: python -m lib publish"
    )


def test_robustness_shows_the_committed_tables():
    assert readme.robustness(readme.REAL.parent) == (ROOT / "docs" / "robustness_smol.md").read_text(), (
        "run: python -m lib publish"
    )


def test_scoreboard_from_hand_written_results(tmp_path):
    board = {
        "columns": ["prediction", "observed", "held"],
        "rows": [["a | b", "0.5", "yes"], ["null: c", "", "undecided"]],
    }
    (tmp_path / "02.json").write_text(json.dumps({"tables": {"scoreboard": board}}))
    (tmp_path / "05.json").write_text(json.dumps({"tables": {}}))
    text = readme.scoreboard([tmp_path, tmp_path / "nowhere"])
    assert (
        "(1 held, 0 did\nnot, 1 could not be decided)" in text
        and "| a \\| b | 0.5 | yes |" in text
        and "Notebook 05" not in text
    )


def test_table_from_hand_written_results(tmp_path):
    for notebook in {row[1] for row in readme.ROWS}:
        metrics = {
            name: {"value": 0.5, "ci": [0.25, 0.75], "n": 4}
            for _, nb, ms in readme.ROWS
            if nb == notebook
            for name, _ in ms
        }
        (tmp_path / f"{notebook}.json").write_text(json.dumps({"metrics": metrics}))
    assert "distilled, thinking **0.50** [0.25, 0.75]" in readme.table([tmp_path])
    (tmp_path / "05.json").unlink()
    with pytest.raises(UserError, match="ONLY=05"):
        readme.table([tmp_path])


def test_standing_is_judged_by_intervals(tmp_path):
    metric = lambda value, low, high: {"value": value, "ci": [low, high], "n": 9}  # noqa: E731
    status = {
        "columns": ["category", "above the null"],
        "rows": [[c, c == "deduction"] for c in readme.CATEGORIES],
    }
    verdicts = {
        "columns": ["category", "where", "verdict"],
        "rows": [
            [c, w, "token feature" if w == "marker" else "more than a token"]
            for c in readme.CATEGORIES
            for w in ("marker", "before")
        ],
    }
    found = {f"auroc_{c}": metric(0.9, 0.8, 1) for c in readme.CATEGORIES}
    (tmp_path / "03.json").write_text(
        json.dumps({"metrics": found, "tables": {"status": status, "token_verdicts": verdicts}})
    )
    costs = {
        "reflection": metric(-0.3, -0.4, -0.2),
        "deduction": metric(-0.1, -0.2, 0.01),
        "random": metric(0, -0.02, 0.02),
        "matched_in_traces_reflection": metric(-0.2, -0.25, -0.15),
    }
    (tmp_path / "04.json").write_text(
        json.dumps({"metrics": {f"ablate_accuracy_{name}": m for name, m in costs.items()}})
    )
    reflection, deduction, alternative, _ = readme.standing(tmp_path).splitlines()[2:6]
    assert (
        reflection
        == "| reflection | **0.90** [0.80, 1.00] | no | not measured | yes | **-0.30** [-0.40, -0.20] | yes /"
        " no |"
    )
    assert (
        deduction.endswith("| **-0.10** [-0.20, 0.01] | no / no |") and "| yes | not measured |" in deduction
    )
    assert alternative.endswith("| not measured | no / no |") and readme.standing(tmp_path).endswith(
        "\n0 of 4 pass all of these (to come back: a mean cosine of at least 0.7)."
    )


def test_what_was_learnt_has_a_column_per_model(tmp_path):
    measured = {name: {"value": 0.25, "ci": [0.125, 0.5], "n": 8} for name, _ in readme.LEARNT}
    (tmp_path / "evaluation.json").write_text(
        json.dumps({"base": measured, "null_a": {**measured, "thinks": {"value": None, "ci": None, "n": 0}}})
    )
    lines = readme.learnt(tmp_path / "evaluation.json").splitlines()
    assert lines[0].endswith("| base | null_a |") and len(lines) == 2 + len(readme.LEARNT)
    assert "| answers that begin with a thought | **0.25** [0.12, 0.50] | not measured |" in lines


def test_the_lexicon_is_shown_by_reading_and_by_held_out_annotations(tmp_path):
    numbers = (
        "precision,precision_low,precision_high,precision_base,recall,recall_low,recall_high,recall_base"
    )
    values = "0.5,0.25,0.75,0.1,0.6,0.5,0.7,0.2"
    (tmp_path / "sentences_agreement.csv").write_text(f"category,{numbers}\ncontrast,{values}\n")
    rows = [
        f"{c},{u},{h},{values}"
        for c in ("deduction ~ deduction", "turn ~ backtracking")
        for u in ("sentence", "first of section")
        for h in ("development", "held out", "all")
    ]
    (tmp_path / "annotated_agreement.csv").write_text(
        "\n".join([f"comparison,unit,half,{numbers}", *rows]) + "\n"
    )
    lines = readme.lexicon(tmp_path).splitlines()[2:]
    assert lines == [
        (
            "| contrast, 100 sentences of our own traces labelled by reading | **0.50** [0.25, 0.75] | 0.10 |"
            " **0.60** [0.50, 0.70] | 0.20 |"
        ),
        (
            "| deduction against annotated deduction, sentences of held-out annotated traces | **0.50**"
            " [0.25, 0.75] | 0.10 | **0.60** [0.50, 0.70] | 0.20 |"
        ),
    ]


def test_speed_from_hand_written_results(tmp_path):
    (tmp_path / "results.json").write_text(
        json.dumps(
            {name: {"value": 12345.6, "low": 0.01234, "high": 2, "n": 3} for _, name, *_ in readme.SPEED}
        )
    )
    (tmp_path / "machine.json").write_text(
        json.dumps(
            {
                "processor": "P",
                "cores": 2,
                "memory_gb": 3,
                "bfloat16_instructions": False,
                "versions": {"torch": "2"},
            }
        )
    )
    text = readme.speed(tmp_path)
    assert "| **12,346** times | 0.0123 to 2 | at least 8 |" in text and text.endswith(
        "On P, 2 cores, without bfloat16 instructions, 3 GB; torch 2."
    )


def test_the_benchmarks_results_are_complete():
    """Medians within their quartiles, and as many as other tools expect."""
    found = json.loads((ROOT / "benchmarks" / "results.json").read_text())
    expected = {
        "step_vs_dense_small",
        "step_vs_dense_large",
        "step_vs_sparsify_small",
        "step_vs_dense_tuned_small",
        "memory_vs_dense_large",
        "harvest_vs_limit",
        "harvest_vs_full_forward",
        "read_pairs_per_second",
        "wait_share",
        "generate_vs_single",
        "generate_vs_condition",
        "accelerate_loss_difference",
        "world_size",
    }
    assert expected <= set(found)
    for name, entry in found.items():
        assert (
            set(entry) == {"value", "low", "high", "n"}
            and entry["low"] <= entry["value"] <= entry["high"]
            and entry["n"] >= 1
        ), name
