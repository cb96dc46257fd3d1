"""Notebooks 01 to 05 on other pairs than the embedded one: a Llama pair, and two architectures of unlike width and depth. Slow."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
import yaml
from toys import toy_model
from transformers import LlamaConfig, LlamaForCausalLM

from lib.distill import build_tokenizer
from lib.results import ROOT


def llama(width, layers, seed):
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(vocab_size=512, hidden_size=width, num_hidden_layers=layers, num_attention_heads=2, num_key_value_heads=1,
                                        intermediate_size=2 * width, max_position_embeddings=512, tie_word_embeddings=True, bos_token_id=1,
                                        eos_token_id=2, pad_token_id=0, initializer_range=0.2))


PAIRS = {"toy_llama": lambda: (llama(32, 4, 0), llama(32, 4, 1)), "toy_unlike": lambda: (toy_model(32, 0, layers=4), llama(48, 6, 1))}


@pytest.mark.slow
@pytest.mark.parametrize("name", PAIRS)
def test_notebooks_run_on(name, tmp_path):
    build_tokenizer().save_pretrained(tmp_path / "tokenizer")
    for which, model in zip(("base", "distilled"), PAIRS[name]()):
        model.save_pretrained(tmp_path / which)
    registry = tmp_path / "pairs.yaml"
    entry = {"base": str(tmp_path / "base"), "distilled": str(tmp_path / "distilled"), "tokenizer": str(tmp_path / "tokenizer")}
    registry.write_text(yaml.safe_dump({name: {**entry, "dictionary": 128, "tokens": 30_000}}))
    folder = ROOT / "data" / "runs" / name
    try:
        done = subprocess.run([sys.executable, "-m", "lib.run", "--pair", name, "--profile", "smoke", "--registry", str(registry),
                               "--only", "01", "02", "03", "04", "05"], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        results = folder / "smoke" / "figures" / "results"
        found = {file.stem: json.loads(file.read_text())["metrics"] for file in results.glob("*.json")}
        assert sorted(found) == ["01", "02", "03", "04", "05"]
        assert all(found["02"][f"fve_{which}"]["value"] < 1 for which in ("base", "distilled"))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
