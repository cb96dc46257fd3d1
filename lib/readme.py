"""Writes the table of results in README.md from the result files, so that no number there was typed by hand.

    python -m lib.readme            # after make figures; a test holds the two equal
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from .results import ROOT, UserError, write_text

BEGIN, END = "<!-- results: written by python -m lib.readme -->", "<!-- end of results -->"
# question, notebook, metrics shown (name, words before the number)
ROWS = (
    ("Does thinking pay? Puzzles solved, every step right", "00",
     (("acc_distilled_think", "distilled, thinking"), ("acc_control_direct", "control with as many tokens"), ("acc_base_direct", "base"))),
    ("Reflection or ritual? Probability of a reflection", "00",
     (("p_reflect_given_error", "after an error"), ("p_reflect_given_correct", "after a correct step"))),
    ("Does the crosscoder describe both models? Explained variance", "02", (("fve_base", "base"), ("fve_distilled", "distilled"))),
    ("Are there features of the distilled model alone? Share of alive features", "03",
     (("nrn_over_0_9", "NRN over 0.9"), ("nrn_under_0_1", "NRN under 0.1"))),
    ("Is a reflection announced before it is spoken? AUROC", "03",
     (("auroc_reflection", "best distilled-side feature"), ("token_only_auroc_reflection", "a predictor that sees the token alone"))),
    ("Is it causal? Change of the logit of a reflection when frequent distilled-side features are removed", "04",
     (("ablate_reflection_distilled", "distilled"), ("ablate_reflection_base", "base"),
      ("ablate_reflection_random", "random directions of equal norm"))),
    ("Over-thinking and incisive thinking: length of thought, steered against not", "04",
     (("overthink_length_ratio", "over-thinking"), ("incisive_length_ratio", "incisive"), ("random_length_ratio", "random directions"))),
    ("Did the geometry of words change? Parallelogram loss, mean over relations", "05",
     (("parallelogram_base", "base"), ("parallelogram_distilled", "distilled"))),
)


def table(results: Path) -> str:
    """The results of a folder of NN.json files as a Markdown table, each number with its 95% interval."""
    lines = ["| question | notebook | found |", "|---|---|---|"]
    for question, notebook, metrics in ROWS:
        file = results / f"{notebook}.json"
        if not file.is_file():
            raise UserError(f"{file.name} is missing in {results}: run make figures ONLY={notebook} first")
        found = json.loads(file.read_text())["metrics"]
        lines.append(f"| {question} | {notebook} | {'; '.join(f'{words} {_text(found[name])}' for name, words in metrics)} |")
    return "\n".join(lines)


def _text(metric: dict) -> str:
    if metric["value"] is None:
        return "not measured"
    interval = f" [{metric['ci'][0]:.2f}, {metric['ci'][1]:.2f}]" if metric["ci"] and None not in metric["ci"] else ""
    return f"**{metric['value']:.2f}**{interval}"


def written(text: str, results: Path) -> str:
    """README text with its table replaced by the results'."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{table(results)}\n{END}{rest.split(END)[1]}"


def main() -> int:
    readme = ROOT / "README.md"
    try:
        write_text(readme, written(readme.read_text(), ROOT / "figures" / "tiny" / "results"))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
