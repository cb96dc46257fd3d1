"""Every number in README's and docs' tables comes from a result file."""

import json
import re

import pytest

from lib.labels import CATEGORIES
from lib.settings import ROOT, UserError
from lib.tools import publish


@pytest.mark.parametrize("page", publish.PAGES)
def test_committed_pages_show_the_committed_results(page):
    assert publish.pages()[page] == (ROOT / page).read_text(), "run: python -m lib publish"


def test_every_template_of_a_table_is_shown_somewhere():
    shown = "\n".join(publish.pages().values()) + "".join(
        p.read_text() for p in publish.TEMPLATES.glob("*.j2")
    )
    for file in (publish.TEMPLATES / "tables").glob("*.j2"):
        assert f"tables/{file.name}" in shown, f"nobody shows {file.name}"


def metric(value, low=None, high=None):
    return {"value": value, "ci": None if low is None else [low, high], "n": 9}


def put(root, path, content):
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    (root / path).write_text(content if isinstance(content, str) else json.dumps(content))


def test_a_number_that_no_benchmark_left_is_named(tmp_path):
    put(tmp_path, "benchmarks/results.json", {})
    put(tmp_path, "benchmarks/machine.json", {})
    with pytest.raises(UserError, match="step_vs_dense_small is missing .* make bench"):
        publish.render("tables/speed.md.j2", tmp_path)


def test_numbers_of_readme_by_hand(tmp_path):
    metrics = {f"x_{c}": metric(-0.5, -0.6, high) for c, high in zip(CATEGORIES, (-0.4, -0.1, 0.1, 0.2))}
    metrics |= {"share": metric(0.0413), "large": metric(0.98), "none": metric(None)}
    put(tmp_path, "figures/tiny/results/04.json", {"metrics": metrics})
    sources = publish.Sources(tmp_path)
    assert sources.lowered("tiny", "04", "x_{}") == f"2 of 4 ({', '.join(CATEGORIES[:2])})"
    assert sources.beyond_zero("tiny", "04", "x_{}", 1) == []
    assert (
        sources.percent("tiny", "04", "share") == "4.1%" and sources.percent("tiny", "04", "large") == "98%"
    )
    assert (
        sources.value("tiny", "04", "share") == "0.04"
        and sources.value("tiny", "04", "none") == "not measured"
    )


def test_a_scoreboard_of_hand_written_results(tmp_path):
    board = {
        "columns": ["prediction", "observed", "held"],
        "rows": [["a | b", "0.5", "yes"], ["null: c", "", "undecided"]],
    }
    put(tmp_path, "figures/tiny/results/02.json", {"tables": {"scoreboard": board}})
    needed = "contrast: without the features attributed to it"
    attributed = [[f"{needed}, it loses", "", "yes"], ["alternative: ", "", "yes"]]
    put(tmp_path, "figures/tiny/results/04.json", {"tables": {"scoreboard": board | {"rows": attributed}}})
    sources = publish.Sources(tmp_path)
    assert sources.attributed() == "contrast" and sources.held("04", "con") == [f"{needed}, it loses"]
    (tmp_path / "figures/tiny/results/04.json").unlink()
    put(tmp_path, "figures/tiny/results/05.json", {"tables": {}})
    put(tmp_path, "figures/tiny/results/06.json", {"tables": {"scoreboard": board}})
    text = publish.render("scoreboard.md.j2", tmp_path)
    assert (
        "(2 held, 0 did\nnot, 0 depend on the crosscoder, the rest could not be decided or tested), for the"
        " embedded pair" in text
    )
    assert "## Notebook 02" in text and "## Notebook 06" in text and "Notebook 05" not in text
    assert "| a \\| b | 0.5 | yes |\n| null: c |  | undecided |\n" in text


def test_numbers_of_the_pairs_and_what_is_missing(tmp_path):
    template = (publish.TEMPLATES / "tables" / "results.md.j2").read_text()
    asked = re.findall(r'tiny\("(\d\d)", "(\w+)"\)', template)
    for notebook in {notebook for notebook, _ in asked}:
        metrics = {name: metric(0.5, 0.25, 0.75) for number, name in asked if number == notebook}
        put(tmp_path, f"figures/tiny/results/{notebook}.json", {"metrics": metrics})
    text = publish.render("tables/results.md.j2", tmp_path)
    assert "distilled, thinking **0.50** [0.25, 0.75]" in text and "not measured" not in text
    assert "not testable" not in text
    gates = {"acc_distilled_think_tiny_small": metric(0.78), "reflect_auc_tiny_large": metric(0.86)}
    put(tmp_path, "figures/tiny/results/06.json", {"metrics": gates})
    put(tmp_path, "figures/tiny/results/13.json", {"metrics": {"swap_forward_transplant": metric(0.02)}})
    text = publish.render("tables/results.md.j2", tmp_path)
    assert "not testable: 1 of 3 sizes fail their gates." in text
    assert text.count("where the whole residual stream carries over 0.02") == 2
    put(tmp_path, "figures/tiny/results/00.json", {"metrics": {}})
    assert "distilled, thinking not measured" in publish.render("tables/results.md.j2", tmp_path)
    (tmp_path / "figures/tiny/results/05.json").unlink()
    with pytest.raises(UserError, match="figures/tiny/results/05.json is missing: run .*make figures"):
        publish.render("tables/results.md.j2", tmp_path)


def test_how_numbers_are_written():
    assert publish.number(metric(0.125, -1, 2)) == "**0.12** [-1.00, 2.00]"
    assert publish.number({"value": 1, "ci": [None, None]}) == publish.number(metric(1)) == "**1.00**"
    assert publish.number(None) == publish.number(metric(None)) == "not measured"
    row = {"x": "0.5", "x_low": "0", "x_high": "1", "low": "0.25", "high": "0.75"}
    assert publish.interval(row, "x") == "**0.50** [0.00, 1.00]"
    assert publish.interval(row, "x", "") == "**0.50** [0.25, 0.75]"
    assert [publish.figure(x) for x in (12345.6, 0.01234, 2)] == ["12,346", "0.0123", "2"]
    assert publish.median(["1", "", "3", "2"]) == "2.00" and publish.cell("a|b") == "a\\|b"


def test_standing_is_judged_by_intervals_and_shares_of_crosscoders(tmp_path):
    inspected = {f"auroc_{c}": metric(0.9, 0.8, 1) for c in CATEGORIES}
    inspected |= {f"unique_{c}": metric(float(c == "deduction"), None, None) for c in CATEGORIES}
    inspected |= {f"more_than_token_{c}": metric(0.8, None, None) for c in CATEGORIES}
    inspected |= {f"gain_{c}": metric(0.1, 0.05, 0.15) for c in CATEGORIES}
    put(tmp_path, "figures/tiny/results/03.json", {"metrics": inspected, "tables": {}})
    costs = {
        "reflection": metric(-0.3, -0.4, -0.2),
        "deduction": metric(-0.1, -0.2, 0.01),
        "reflection_over_random": metric(-0.3, -0.4, -0.2),
        "reflection_over_matched": metric(-0.1, -0.25, 0.05),
        "deduction_over_random": metric(-0.1, -0.2, -0.05),
    }
    removed = {f"ablate_accuracy_{name}": m for name, m in costs.items()}
    put(tmp_path, "figures/tiny/results/13.json", {"metrics": removed})
    text = publish.render("tables/standing.md.j2", tmp_path)
    reflection, deduction, alternative, _ = text.splitlines()[2:6]
    assert reflection == (
        "| reflection | **0.90** [0.80, 1.00] | **0.10** [0.05, 0.15] | 0% | not measured | 80% |"
        " **-0.30** [-0.40, -0.20] | yes / no |"
    )
    assert (
        deduction.endswith("| **-0.10** [-0.20, 0.01] | no / no |") and "| 100% | not measured |" in deduction
    )
    assert alternative.endswith("| not measured | no / no |")
    assert "\n0 of 4 pass all of these" in text


def test_what_was_learnt_has_a_column_per_model(tmp_path):
    names = ("loss_traces", "thinks", "closes", "waits_per_1000", "accuracy")
    measured = {name: metric(0.25, 0.125, 0.5) for name in names}
    models = {"base": measured, "null_a": {**measured, "thinks": metric(None)}}
    put(tmp_path, "data/pairs/smol/evaluation.json", models)
    lines = publish.render("tables/learnt.md.j2", tmp_path).splitlines()
    assert lines[0].endswith("| base | null_a |") and len(lines) == 2 + len(names)
    assert "| answers that begin with a thought | **0.25** [0.12, 0.50] | not measured |" in lines


def test_the_lexicon_is_shown_by_reading_and_by_held_out_annotations(tmp_path):
    numbers = (
        "precision,precision_low,precision_high,precision_base,recall,recall_low,recall_high,recall_base"
    )
    values = "0.5,0.25,0.75,0.1,0.6,0.5,0.7,0.2"
    put(tmp_path, "data/labelled/sentences_agreement.csv", f"category,{numbers}\ncontrast,{values}\n")
    rows = [
        f"{c},{u},{h},{values}"
        for c in ("deduction ~ deduction", "turn ~ backtracking")
        for u in ("sentence", "first of section")
        for h in ("development", "held out", "all")
    ]
    annotated = "\n".join([f"comparison,unit,half,{numbers}", *rows]) + "\n"
    put(tmp_path, "data/labelled/annotated_agreement.csv", annotated)
    shown = "**0.50** [0.25, 0.75] | 0.10 | **0.60** [0.50, 0.70] | 0.20 |"
    assert publish.render("tables/lexicon.md.j2", tmp_path).splitlines()[2:] == [
        f"| contrast, 100 sentences of our own traces labelled by reading | {shown}",
        f"| deduction against annotated deduction, sentences of held-out annotated traces | {shown}",
    ]


def test_speed_from_hand_written_results(tmp_path):
    template = (publish.TEMPLATES / "tables" / "speed.md.j2").read_text()
    names = re.findall(r'row\(".*?", "(\w+)"', template)
    put(
        tmp_path,
        "benchmarks/results.json",
        {name: {"value": 12345.6, "low": 0.01234, "high": 2, "n": 3} for name in names},
    )
    machine = {"processor": "P", "cores": 2, "memory_gb": 3, "bfloat16_instructions": False}
    put(tmp_path, "benchmarks/machine.json", machine | {"versions": {"torch": "2"}})
    text = publish.render("tables/speed.md.j2", tmp_path)
    assert len(names) > 10 and "| **12,346** times | 0.0123 to 2 | at least 8 |" in text
    assert text.endswith("On P, 2 cores, without bfloat16 instructions, 3 GB; torch 2.\n")


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
