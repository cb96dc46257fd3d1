"""Every number in README's table of results comes from a result file."""

import json

import pytest

from lib import readme
from lib.results import ROOT, UserError


def test_readme_shows_the_committed_results():
    text = (ROOT / "README.md").read_text()
    assert readme.written(text, ROOT / "figures" / "tiny" / "results") == text, "run: python -m lib.readme"


def test_table_from_hand_written_results(tmp_path):
    for notebook in {row[1] for row in readme.ROWS}:
        metrics = {name: {"value": 0.5, "ci": [0.25, 0.75], "n": 4} for _, nb, ms in readme.ROWS if nb == notebook for name, _ in ms}
        (tmp_path / f"{notebook}.json").write_text(json.dumps({"metrics": metrics}))
    assert "distilled, thinking **0.50** [0.25, 0.75]" in readme.table(tmp_path)
    (tmp_path / "05.json").unlink()
    with pytest.raises(UserError, match="ONLY=05"):
        readme.table(tmp_path)
