"""Writes the tables of results and of speed in README.md, docs/scoreboard*.md and docs/robustness_smol.md,
from files of results.

    python -m lib publish            # after make figures or make bench; a test holds them equal
"""

from __future__ import annotations

import csv
import json
import statistics
from collections.abc import Sequence
from pathlib import Path

from ..labels import CATEGORIES
from ..runs import write_text
from ..settings import ROOT, UserError

# notebook 06 writes to the largest pair's
RESULTS = [ROOT / "figures" / pair / "results" for pair in ("tiny",)]
MARKS = {
    name: (f"<!-- {name}: written by python -m lib publish -->", f"<!-- end of {name} -->")
    for name in ("results", "standing", "learnt", "real", "lexicon", "speed")
}
# question, notebook, metrics shown (name, words before the number)
ROWS = (
    (
        "Does thinking pay? Puzzles solved, every step right",
        "00",
        (
            ("acc_distilled_think", "distilled, thinking"),
            ("acc_control_direct", "control with as many tokens"),
            ("acc_base_direct", "base"),
        ),
    ),
    (
        "Reflection or ritual? Probability of a reflection",
        "00",
        (("p_reflect_given_error", "after an error"), ("p_reflect_given_correct", "after a correct step")),
    ),
    (
        "Does the crosscoder describe both models? Explained variance",
        "02",
        (("fve_base", "base"), ("fve_distilled", "distilled")),
    ),
    (
        (
            'How often does a "unique" feature appear where nothing was learnt? Share beyond the null\'s 1%'
            " threshold of NRN"
        ),
        "02",
        (
            ("null_false_positive_rate", "another null, another seed"),
            ("beyond_null_nrn_distilled", "this pair"),
        ),
    ),
    (
        "May the rule be believed? On planted data in the regime of ours",
        "03",
        (
            ("planted_precision", "chosen rule, precision"),
            ("planted_recall", "recall"),
            ("planted_precision_used", "NRN beyond the null (used here), precision"),
            ("planted_recall_used", "recall"),
        ),
    ),
    (
        "Does a feature come back with another seed? Cosine with its match",
        "02",
        (
            ("stability_median", "median feature"),
            ("stability_unique_median", "median feature beyond the null"),
            ("stability_chance", "chance"),
        ),
    ),
    (
        "Is a reflection announced before it is spoken? AUROC",
        "03",
        (
            ("auroc_reflection", "best distilled-side feature"),
            ("token_only_auroc_reflection", "a predictor that sees the token alone"),
        ),
    ),
    (
        "Is it causal? Change of the logit of a reflection when frequent distilled-side features are removed",
        "04",
        (
            ("ablate_reflection_distilled", "distilled"),
            ("ablate_reflection_base", "base"),
            ("ablate_reflection_random", "random directions of equal norm"),
        ),
    ),
    (
        (
            "Does the answer need them? Change of accuracy when a category's features are removed while the"
            " model thinks"
        ),
        "04",
        (
            ("ablate_accuracy_reflection", "reflection"),
            ("ablate_accuracy_deduction", "deduction"),
            ("ablate_accuracy_random", "random directions of equal norm"),
        ),
    ),
    (
        (
            "New features, or old ones used differently? Share of the gap in thinking rate that follows when"
            " the base is made to use features as the distilled model does"
        ),
        "04",
        (
            ("impose_unique", "unique alone"),
            ("impose_shared", "reweighted shared alone"),
            ("impose_random", "matched random"),
        ),
    ),
    (
        "Does thinking cross over? Share of the gap when one model's features are put into the other",
        "04",
        (("swap_forward", "distilled into base"), ("swap_backward", "base into distilled")),
    ),
    (
        "Over-thinking and incisive thinking: length of thought, steered against not",
        "04",
        (
            ("overthink_length_ratio", "over-thinking"),
            ("incisive_length_ratio", "incisive"),
            ("random_length_ratio", "random directions"),
        ),
    ),
    (
        "Did the geometry of words change? Parallelogram loss, mean over relations",
        "05",
        (("parallelogram_base", "base"), ("parallelogram_distilled", "distilled")),
    ),
    (
        "Do larger models grow more unique features? Features of 1,024 beyond the null's 1% threshold",
        "06",
        (
            ("unique_above_null_tiny_small", "0.18M"),
            ("unique_above_null_tiny", "0.66M"),
            ("unique_above_null_tiny_large", "2.07M parameters"),
        ),
    ),
)

REAL = ROOT / "figures" / "smol" / "results"
# the same for the real pair, with what it alone has
REAL_ROWS = (
    (
        "Does the crosscoder describe both models? Explained variance",
        "02",
        (("fve_base", "base"), ("fve_distilled", "distilled")),
    ),
    (
        "The same by what the model predicts: cross-entropy recovered",
        "02",
        (("ce_recovered_base", "base"), ("ce_recovered_distilled", "distilled")),
    ),
    (
        (
            'How often does a "unique" feature appear where no thinking was learnt? Share beyond the null\'s'
            " 1% threshold of NRN"
        ),
        "02",
        (
            ("null_false_positive_rate", "the null with another seed of the crosscoder"),
            ("beyond_null_nrn_distilled", "this pair"),
        ),
    ),
    (
        "The same about each crosscoder's own median",
        "02",
        (
            ("null_false_positive_rate_centred", "the null with another seed"),
            ("beyond_null_nrn_centred_distilled", "this pair"),
        ),
    ),
    (
        "The same by latent scaling: in the activations, not in the decoder",
        "02",
        (
            ("null_false_positive_rate_nu_eps", "the null with another seed"),
            ("beyond_null_nu_eps_distilled", "this pair"),
        ),
    ),
    (
        "Does a feature come back with another seed? Cosine with its match",
        "02",
        (
            ("stability_median", "median feature"),
            ("stability_unique_median", "median feature beyond the null"),
            ("stability_chance", "chance"),
        ),
    ),
    (
        "Shared features put to other use: share whose use changes by more than 99% of the null's do",
        "03",
        (("use_reweighted", "this pair"),),
    ),
    *(
        (
            f"Is a sentence of {c} announced before it is spoken? AUROC",
            "03",
            (
                (f"auroc_{c}", "best distilled-side feature"),
                (f"token_only_auroc_{c}", "the token alone"),
                (f"sentence_only_auroc_{c}", "the last sentence's kind"),
            ),
        )
        for c in CATEGORIES
    ),
    (
        "At the first token: does the feature tell a reflection from the same word elsewhere? AUROC",
        "03",
        (("same_word_auroc_reflection", "feature"),),
    ),
    *(
        (
            (
                f"Is it causal? Change of the logit of {c}'s first token when frequent distilled-side"
                " features are removed"
            ),
            "04",
            (
                (f"ablate_{c}_distilled", "distilled"),
                (f"ablate_{c}_base", "base"),
                (f"ablate_{c}_matched", "matched features, distilled"),
                (f"ablate_{c}_random", "random directions of equal norm"),
            ),
        )
        for c in CATEGORIES
    ),
    (
        "Over-thinking and incisive thinking: length of thought, steered against not",
        "04",
        (
            ("overthink_length_ratio", "over-thinking"),
            ("incisive_length_ratio", "incisive"),
            ("random_length_ratio", "random directions"),
        ),
    ),
    (
        "Did the geometry of words change? Parallelogram loss, mean over relations",
        "05",
        (
            ("parallelogram_base", "base"),
            ("parallelogram_distilled", "distilled"),
            ("parallelogram_null_a", "null"),
        ),
    ),
)
LEARNT = (  # name in evaluation.json, words
    ("loss_traces", "loss on held-out traces (nats per token)"),
    ("thinks", "answers that begin with a thought"),
    ("closes", "answers that close it"),
    ("waits_per_1000", '"wait" per 1,000 tokens'),
    ("accuracy", "word problems answered right"),
)

# mean cosine with the matches in other seeds from which a feature counts as the same; notebook 03 predicts
# with it
BACK = 0.7

# what is measured, name in benchmarks/results.json, unit, what was aimed at
SPEED = (
    (
        "Training step, D = 2 x 512, F = 16,384, k = 50: the dense step of public trainers, by ours",
        "step_vs_dense_small",
        "times",
        "at least 8",
    ),
    ("the same at D = 2 x 1,536, F = 32,768", "step_vs_dense_large", "times", "at least 6"),
    (
        "eai-sparsify 1.3.3 in float32, by ours, at the first size",
        "step_vs_sparsify_small",
        "times",
        "at least 2.5",
    ),
    ("eai-sparsify with bfloat16 autocast, by ours", "step_vs_sparsify_autocast_small", "times", ""),
    (
        "the dense step with bfloat16 autocast and a fused Adam, by ours",
        "step_vs_dense_tuned_small",
        "times",
        "",
    ),
    (
        "equal precision: float32 in both, and both with a fused Adam",
        "step_vs_dense_equal_small",
        "times",
        "",
    ),
    ("Peak memory of training at the second size, ours by dense", "memory_vs_dense_large", "", "at most 1"),
    (
        "Harvest, by two plain forwards stopped at the layer (135M shape)",
        "harvest_vs_limit",
        "times as long",
        "at most 1.15",
    ),
    ("Full forwards of both models, by the harvest", "harvest_vs_full_forward", "times", "at least 1.7"),
    (
        "Shuffled reading from a store eight times its memory, D = 2 x 512",
        "read_pairs_per_second",
        "pairs a second",
        "at least 100,000",
    ),
    ("Share of training spent waiting for batches, reading from there", "wait_share", "", ""),
    (
        "Steered thoughts: one prompt at a time, by conditions together",
        "generate_vs_single",
        "times",
        "at least 10",
    ),
    ("one condition at a time, by conditions together", "generate_vs_condition", "times", "at least 0.9"),
    ("A click in the feature explorer, F = 32,768, D = 2 x 1,536", "explorer_click_ms", "milliseconds", ""),
    (
        "Two processes against one: largest difference of the loss, relative",
        "accelerate_loss_difference",
        "",
        "at most 0.001",
    ),
)


def speed(benchmarks: Path) -> str:
    """benchmarks/results.json as a Markdown table: medians and quartiles."""
    found, machine = (
        json.loads((benchmarks / name).read_text()) for name in ("results.json", "machine.json")
    )
    lines = ["| what | median | quartiles | aim |", "|---|---|---|---|"]
    for what, name, unit, aim in SPEED:
        if name not in found:
            raise UserError(f"{name} is missing in benchmarks/results.json: run make bench PEERS=1 first")
        value, low, high = (_figure(found[name][key]) for key in ("value", "low", "high"))
        lines.append(f"| {what} | **{value}** {unit} | {low} to {high} | {aim} |")
    bfloat = "with" if machine["bfloat16_instructions"] else "without"
    return (
        "\n".join(lines)
        + f"\n\nOn {machine['processor']}, {machine['cores']} cores, {bfloat} bfloat16 instructions,"
        f" {machine['memory_gb']} GB; torch {machine['versions']['torch']}."
    )


def _figure(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def table(results: Sequence[Path], rows: Sequence[tuple] = ROWS) -> str:
    """The results of folders of NN.json files as a Markdown table, each number with its 95% interval."""
    lines = ["| question | notebook | found |", "|---|---|---|"]
    for question, notebook, metrics in rows:
        file = next(
            (folder / f"{notebook}.json" for folder in results if (folder / f"{notebook}.json").is_file()),
            None,
        )
        if file is None:
            raise UserError(
                f"{notebook}.json is missing in {results[0]}: run make figures ONLY={notebook} first"
            )
        found = json.loads(file.read_text())["metrics"]
        lines.append(
            f"| {question} | {notebook} |"
            f" {'; '.join(f'{words} {_text(found.get(name))}' for name, words in metrics)} |"
        )
    return "\n".join(lines)


def learnt(evaluation: Path) -> str:
    """evaluation.json of a pair with a pretrained base (``lib.study.appraisal``) as a Markdown table, a column per
    model.
    """
    found = json.loads(evaluation.read_text())
    lines = [
        "| measured on what no adapter was trained on | " + " | ".join(found) + " |",
        "|---" * (len(found) + 1) + "|",
    ]
    return "\n".join(
        lines
        + [
            f"| {words} | " + " | ".join(_text(of.get(name)) for of in found.values()) + " |"
            for name, words in LEARNT
        ]
    )


def lexicon(folder: Path) -> str:
    """Precision and recall of the lexicon's labels, from the two tables of ``lib.text.lexicon_agreement`` in a folder."""
    read, annotated = (
        list(csv.DictReader((folder / f"{name}_agreement.csv").open())) for name in ("sentences", "annotated")
    )
    rows = [(f"{r['category']}, 100 sentences of our own traces labelled by reading", r) for r in read]
    rows += [
        (f"{r['comparison'].replace('~', 'against annotated')}, sentences of held-out annotated traces", r)
        for r in annotated
        if r["unit"] == "sentence" and r["half"] == "held out" and r["comparison"].split()[0] in CATEGORIES
    ]
    lines = ["| label | precision | by chance | recall | by chance |", "|---|---|---|---|---|"]
    number = lambda row, name: _text(
        {"value": float(row[name]), "ci": [float(row[f"{name}_low"]), float(row[f"{name}_high"])]}
    )  # noqa: E731
    return "\n".join(
        lines
        + [
            f"| {words} | {number(r, 'precision')} | {float(r['precision_base']):.2f} | {number(r, 'recall')}"
            f" | {float(r['recall_base']):.2f} |"
            for words, r in rows
        ]
    )


ROBUSTNESS = """# The real pair: does it depend on the training, the text, the words?

Written by `python -m lib publish` from [figures/smol/study](../figures/smol/study) and [figures/smol/results](../figures/smol/results). Brackets are 95% intervals.

## NRN's spread against training

Adapters that were kept on the way were put on the base one after the other; the same text was read with each, and a crosscoder of the same size trained
(notebook 14 with the states of the training; smaller than the notebooks', so that only rows of this table can be compared). *Spread* is the 99% quantile
of NRN minus the 1% quantile; *distance* the mean of |distilled - base| / |base|, per token.

{training}

**What it shows.** The spread follows the distance from the base, not the number of tokens: both grow while the learning rate is high and fall a little when it is brought down at the end. The null moved as far with a smaller spread, so
the spread is not distance alone. But one adapter of either kind, read through one crosscoder each, does not say by how much such a difference would vary. The null's median is far from one half because its variance has grown: a matter of
scale (notebook 02).

## Generated text against real text

The notebooks read text that the two models wrote themselves. Here the same models were read on real traces of R1-like models and on paragraphs of an encyclopedia (the text that the adapters were trained on, which
is not part of this repository), and another crosscoder of the same size was trained on as many tokens (notebook 14 with another text).

{crosscoders}

Each crosscoder on the other's text, explained variance:

{transfer}

AUROC before a sentence, of the feature that was chosen on one text, reported on both (the last column is a predictor that sees the current token alone):

{detectors}

**What it shows.** NRN is spread alike on both texts, and few features lie beyond the null's thresholds on either. Two crosscoders on different text share fewer features (median cosine of matched rows {cosine}, chance {chance}) than two on the same text
with other seeds ({seeds}); what they explain of each other's text is less than of their own. The features that were chosen on generated text foretell reflections and deductions on real text about as well: they are no artefact of generated text.
Chosen on real text, **one and the same feature is the best for all four categories**. It fires where a sentence of the argument is about to begin, and not for a kind of sentence. Whoever looks for the best detector of each category by itself
and does not compare the categories would report four findings.

## Other words for the parallelogram

The published sets of word pairs of Todd et al. (function vectors; 15 relations, {pairs} pairs) in place of the repository's own (`make figures PAIR=smol ONLY=05 ARGS="-p relations FOLDER -p run function_vectors"`):

{relations}

**What it shows.** As with the repository's own relations: the distilled model's loss cannot be told from the base's, and the null's is higher than both.
"""


def robustness(folder: Path) -> str:
    """docs/robustness_smol.md from the tables of ``lib.study.texts`` and of notebook 05, below figures/smol."""
    read = lambda name: list(csv.DictReader((folder / "study" / name).open()))  # noqa: E731
    with_interval = lambda row, name, low, high: _text(
        {"value": float(row[name]), "ci": [float(row[low]), float(row[high])]}
    )  # noqa: E731

    def grid(head: Sequence[str], rows: Sequence[Sequence]) -> str:
        return "\n".join(
            [
                "| " + " | ".join(head) + " |",
                "|---" * len(head) + "|",
                *("| " + " | ".join(map(str, row)) + " |" for row in rows),
            ]
        )

    fve = lambda row, model: with_interval(row, f"fve_{model}", f"fve_{model}_low", f"fve_{model}_high")  # noqa: E731
    training = grid(
        (
            "adapter",
            "tokens trained on",
            "distance",
            "median NRN",
            "spread of NRN",
            "FVE base",
            "FVE adapted",
        ),
        [
            (
                r["stage"],
                f"{int(r['trained']):,}",
                f"{float(r['distance']):.3f}",
                f"{float(r['nrn_q50']):.3f}",
                f"**{float(r['spread']):.3f}**",
                fve(r, "base"),
                fve(r, "distilled"),
            )
            for r in read("training/training.csv")
        ],
    )
    words = {"own": "generated", "other": "real"}
    crosscoders = grid(
        (
            "text",
            "FVE base",
            "FVE distilled",
            "alive",
            "median NRN",
            "spread of NRN",
            "beyond the null, NRN",
            "beyond the null, latent scaling",
        ),
        [
            (
                words[r["text"]],
                fve(r, "base"),
                fve(r, "distilled"),
                r["alive"],
                f"{float(r['nrn_q50']):.3f}",
                f"{float(r['spread']):.3f}",
                f"{float(r['beyond_nrn']):.2%}",
                f"{float(r['beyond_nu_eps']):.2%}",
            )
            for r in read("texts/crosscoders.csv")
        ],
    )
    transfer = grid(
        ("trained on", "read on", "model", "FVE"),
        [
            (words[r["text"]], words[r["read_on"]], r["model"], with_interval(r, "fve", "low", "high"))
            for r in read("texts/transfer.csv")
        ],
    )
    found = {(r["category"], r["text"], r["read_on"], r["predictor"]): r for r in read("texts/detectors.csv")}
    detectors = grid(
        ("category", "chosen on", "reported on", "feature", "AUROC", "token alone"),
        [
            (
                c,
                words[text],
                words[on],
                r["feature"],
                with_interval(r, "auroc", "low", "high"),
                with_interval(found[c, text, on, "token only"], "auroc", "low", "high"),
            )
            for (c, text, on, predictor), r in found.items()
            if predictor == "feature"
        ],
    )
    matches = read("texts/matches.csv")
    cosine, chance = (
        f"{statistics.median(float(r[name]) for r in matches if r[name]):.2f}"
        for name in ("cosine", "chance")
    )
    seeds = json.loads((folder / "study" / "seeds" / "manifest.json").read_text())["metrics"][
        "stability_median"
    ]["value"]
    metrics = json.loads((folder / "results" / "05_function_vectors.json").read_text())["metrics"]
    relations = grid(
        ("model", "mean loss", "change from the base", "as a share of random pairings"),
        [
            (
                model,
                _text(metrics[f"parallelogram_{model}"]),
                _text(metrics.get(f"parallelogram_change_{model}")) if model != "base" else "",
                _text(metrics[f"parallelogram_relative_{model}"]),
            )
            for model in ("base", "distilled", "null_a")
        ],
    )
    return ROBUSTNESS.format(
        training=training,
        crosscoders=crosscoders,
        transfer=transfer,
        detectors=detectors,
        cosine=cosine,
        chance=chance,
        seeds=f"{seeds:.2f}",
        relations=relations,
        pairs=f"{metrics['parallelogram_base']['n']:,}",
    )


def standing(results: Path) -> str:
    """Which of the four categories has a feature that stands up? A Markdown table from 03.json and 04.json:
    one row per category.

    Causal: removing the category's features costs accuracy (interval below 0), by more than random directions
    of equal norm do, and by more than as many features that fire as often in traces do (intervals apart).
    """
    found = {name: json.loads((results / f"{name}.json").read_text()) for name in ("03", "04")}
    metrics = found["03"]["metrics"] | found["04"]["metrics"]
    rows = {
        key: [dict(zip(table["columns"], row)) for row in table["rows"]]
        for key in ("status", "token_verdicts")
        for table in [found["03"]["tables"][key]]
    }
    passed = 0
    lines = [
        (
            "| category | foretells (AUROC) | above the null | comes back (cosine) | more than a token |"
            " costs accuracy when removed | beyond random / matched features |"
        ),
        "|---|---|---|---|---|---|---|",
    ]
    for c in CATEGORIES:
        status = next(row for row in rows["status"] if row["category"] == c)
        verdict = next(
            row["verdict"]
            for row in rows["token_verdicts"]
            if row["category"] == c and row["where"] == "before"
        )
        cost, *controls = (
            metrics.get(f"ablate_accuracy_{name}") or {"value": None, "ci": None}
            for name in (c, "random", f"matched_in_traces_{c}")
        )
        beats = [
            "yes" if cost["ci"] and m["ci"] and cost["ci"][1] < min(0, m["ci"][0]) else "no" for m in controls
        ]
        back = metrics.get(f"stable_{c}") or {"value": None}
        passed += (
            status["above the null"]
            and (back["value"] or 0) >= BACK
            and verdict == "more than a token"
            and beats == ["yes", "yes"]
        )
        lines.append(
            f"| {c} | {_text(metrics[f'auroc_{c}'])} | {'yes' if status['above the null'] else 'no'} |"
            f" {_text(metrics.get(f'stable_{c}'))} | {'yes' if verdict == 'more than a token' else verdict} |"
            f" {_text(cost)} | {' / '.join(beats)} |"
        )
    return (
        "\n".join(lines)
        + f"\n\n{passed} of {len(CATEGORIES)} pass all of these (to come back: a mean cosine of at least"
        f" {BACK})."
    )


def _text(metric: dict | None) -> str:
    if metric is None or metric["value"] is None:
        return "not measured"
    interval = (
        f" [{metric['ci'][0]:.2f}, {metric['ci'][1]:.2f}]"
        if metric["ci"] and None not in metric["ci"]
        else ""
    )
    return f"**{metric['value']:.2f}**{interval}"


SCOREBOARD = """# Every prediction, and what became of it

Each notebook writes its predictions down before its experiment and scores them at the end. This page collects them all ({held} held, {failed} did
not, {open} could not be decided), for {pair}. Written by `python -m lib publish` from the result files; the notebooks have the context.
"""


def scoreboard(folders: Sequence[Path], pair: str = "the embedded pair") -> str:
    """docs/scoreboard.md: the table \"scoreboard\" of every NN.json in the folders, in the order of the walk."""
    lines, count = [], {"yes": 0, "no": 0, "undecided": 0}
    for file in sorted(
        (file for folder in folders for file in folder.glob("[0-9][0-9].json")), key=lambda file: file.name
    ):
        found = json.loads(file.read_text())["tables"].get("scoreboard")
        if found is None:
            continue
        lines += [
            "",
            f"## Notebook {file.stem}",
            "",
            "| claim and prediction | observed | held |",
            "|---|---|---|",
        ]
        for row in found["rows"]:
            row = dict(zip(found["columns"], row))
            count[row["held"]] += 1
            lines.append(
                "| "
                + " | ".join(
                    str(row[name]).replace("|", "\\|") for name in ("prediction", "observed", "held")
                )
                + " |"
            )
    return (
        SCOREBOARD.format(held=count["yes"], failed=count["no"], open=count["undecided"], pair=pair)
        + "\n".join(lines)
        + "\n"
    )


def written(text: str, results: Sequence[Path], benchmarks: Path) -> str:
    """README text with its tables replaced."""
    contents = {
        "results": table(results),
        "standing": standing(results[0]),
        "learnt": learnt(ROOT / "data" / "pairs" / "smol" / "evaluation.json"),
        "real": table([REAL], REAL_ROWS),
        "lexicon": lexicon(ROOT / "data" / "labelled"),
        "speed": speed(benchmarks),
    }
    for name, content in contents.items():
        begin, end = MARKS[name]
        before, rest = text.split(begin)
        text = f"{before}{begin}\n{content}\n{end}{rest.split(end)[1]}"
    return text


def publish() -> None:
    """Write every table again."""
    readme, docs = ROOT / "README.md", ROOT / "docs"
    write_text(readme, written(readme.read_text(), RESULTS, ROOT / "benchmarks"))
    write_text(docs / "scoreboard.md", scoreboard(RESULTS))
    write_text(docs / "robustness_smol.md", robustness(REAL.parent))
    write_text(docs / "scoreboard_smol.md", scoreboard([REAL], "the pair smol, a real language model"))
