"""The study in ten lines, as README shows it: from two folders to a table of features, by the faces alone."""

import json
import re
import subprocess
import sys

from toys import chat_model, chat_tokenizer

from lib.settings import ROOT


def script() -> str:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    return next(block for block in blocks if "feature_table" in block)


def test_it_has_ten_lines_and_uses_the_faces_alone():
    lines = [line for line in script().splitlines() if line.strip() and not line.startswith("#")]
    assert len(lines) <= 10
    imports = [line for line in lines if line.startswith("from lib")]
    assert imports and all(re.match(r"from lib\.[a-z]+ import ", line) for line in imports)


def test_it_runs_in_an_empty_folder_and_prints_features(tmp_path):
    for seed, name in enumerate(("base", "distilled")):
        chat_model(seed).save_pretrained(tmp_path / name)
        chat_tokenizer().save_pretrained(tmp_path / name)
    lines = [f"There are {i} socks in drawer {i * i}. Wait, count them again: {i + 7}." for i in range(300)]
    (tmp_path / "text.txt").write_text("\n\n".join(lines[:150]))
    traces = [{"question": f"{i}?", "thinking": line, "answer": "It is."} for i, line in enumerate(lines)]
    (tmp_path / "traces.jsonl").write_text("\n".join(map(json.dumps, traces)))
    text = script().replace("path/to/this/repository", str(ROOT)).replace("path/to/", "")
    text = re.sub(r"tokens=[\d_]+", "tokens=4_000", text)
    done = subprocess.run([sys.executable, "-c", text], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "nrn" in done.stdout and (tmp_path / "work" / "store" / "manifest.json").is_file()
