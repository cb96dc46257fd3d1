"""Notebooks 01 to 05 on other pairs than the embedded one: a Llama pair, and two architectures of unlike
width and depth. Slow.
"""

import json
import shutil
import subprocess
import sys

import pytest
import yaml
from toys import toy_llama, toy_model

from lib.distil.organism import build_tokenizer
from lib.settings import ROOT

PAIRS = {
    "toy_llama": lambda: (toy_llama(32, 0), toy_llama(32, 1)),
    "toy_unlike": lambda: (toy_model(32, 0, layers=4), toy_llama(48, 1, layers=6)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PAIRS)
def test_notebooks_run_on(name, tmp_path):
    build_tokenizer().save_pretrained(tmp_path / "tokenizer")
    for which, model in zip(("base", "distilled"), PAIRS[name]()):
        model.save_pretrained(tmp_path / which)
    registry = tmp_path / "pairs.yaml"
    entry = {
        "base": str(tmp_path / "base"),
        "distilled": str(tmp_path / "distilled"),
        "tokenizer": str(tmp_path / "tokenizer"),
    }
    registry.write_text(yaml.safe_dump({name: {**entry, "dictionary": 128, "tokens": 30_000}}))
    folder = ROOT / "data" / "runs" / name
    try:
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "lib",
                "figures",
                "--pair",
                name,
                "--profile",
                "smoke",
                "--registry",
                str(registry),
                "--only",
                "01",
                "02",
                "03",
                "04",
                "05",
            ],
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        results = folder / "smoke" / "figures" / "results"
        found = {file.stem: json.loads(file.read_text())["metrics"] for file in results.glob("*.json")}
        assert sorted(found) == ["01", "02", "03", "04", "05"]
        assert all(found["02"][f"fve_{which}"]["value"] < 1 for which in ("base", "distilled"))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
