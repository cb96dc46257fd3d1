"""Do notebooks 01 to 03 run on models of the paper's size? Two models of Qwen2.5-1.5B's exact configuration,
with random weights.

    python -m benchmarks.true_size [--tokens 12000] [--features 32768] [--folder data/models/true_size]

The weights mean nothing, so the numbers in the figures mean nothing: what is measured is that the notebooks
run as they are, in bfloat16, with the paper's number of features, in how much time and memory, and on how
much disk (benchmarks/true_size.json). A notebook that has run already is not run again: remove
data/runs/true_size to begin anew. The models take 6 GB of disk, saved like anybody's, in a folder that may be
removed afterwards. The text is that of the pair ``smol``, and its tokenizer: a vocabulary of 49,152 in models
that have room for 151,936.

Source of the configuration: config.json of Qwen/Qwen2.5-Math-1.5B and of
deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B, which differ in the length they admit (4,096 and 131,072; the
latter here).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch
import yaml
from transformers import AutoModelForCausalLM, Qwen2Config

from lib.models.pairs import load_pair
from lib.runs import write_text
from lib.settings import ROOT

from .common import machine

PAIR = "true_size"
CONFIG = dict(
    vocab_size=151_936,
    hidden_size=1_536,
    intermediate_size=8_960,
    num_hidden_layers=28,
    num_attention_heads=12,
    num_key_value_heads=2,
    max_position_embeddings=131_072,
    rope_theta=10_000.0,
    rms_norm_eps=1e-6,
    tie_word_embeddings=True,
    hidden_act="silu",
)


def make(folder: Path) -> Path:
    """Both models below ``folder`` (unless they are there), and a registry that names them; its path."""
    smol = load_pair("smol")
    for seed, name in enumerate(("base", "distilled")):
        if not (folder / name / "config.json").is_file():
            torch.manual_seed(seed)
            AutoModelForCausalLM.from_config(Qwen2Config(**CONFIG), dtype=torch.bfloat16).save_pretrained(
                folder / name
            )
    smol.tokenizer().save_pretrained(folder / "tokenizer")
    corpus = [{"path": str(Path(path).resolve()), "kind": kind} for path, kind in smol.corpus]
    entry = {
        "base": str(folder / "base"),
        "distilled": str(folder / "distilled"),
        "tokenizer": str(folder / "tokenizer"),
        "dtype": "bfloat16",
        "store_dtype": "bfloat16",
        "corpus": corpus,
        "dictionary": 32_768,
        "tokens": 12_000,
    }
    registry = folder / "registry.yaml"
    write_text(registry, yaml.safe_dump({PAIR: entry}))
    return registry


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=12_000)
    parser.add_argument("--features", type=int, default=32_768)
    parser.add_argument("--folder", type=Path, default=ROOT / "data" / "models" / PAIR)
    args = parser.parse_args()
    registry = make(args.folder.resolve())
    run = ROOT / "data" / "runs" / PAIR / "smoke"
    budgets = {
        "01": {"tokens": args.tokens, "drift_documents": 20},
        "02": {
            "n_features": args.features,
            "k": 50,
            "tokens": 2 * args.tokens,
            "batch_size": 1024,
            "ce_tokens": 500,
            "threads": torch.get_num_threads(),
        },
        "03": {},
    }
    found = {}
    for notebook, parameters in budgets.items():
        file = run / "figures" / "results" / f"{notebook}.json"
        given = [word for name, value in parameters.items() for word in ("-p", name, str(value))]
        if not file.is_file():
            subprocess.run(
                [
                    sys.executable,
                    "-m",
                    "lib",
                    "figures",
                    "--pair",
                    PAIR,
                    "--profile",
                    "smoke",
                    "--registry",
                    str(registry),
                    "--only",
                    notebook,
                    *given,
                ],
                cwd=ROOT,
                check=True,
            )
        results = json.loads(file.read_text())
        found[notebook] = {
            "seconds": round(results["wall_seconds"]),
            "peak_memory_gb": round(results["peak_memory_mb"] / 1000, 1),
        }
        print(notebook, found[notebook], flush=True)
    disk = {
        name: round(sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) / 1e9, 3)
        for name, folder in (
            ("models", args.folder),
            ("store", run / "store"),
            ("crosscoder", run / "crosscoder"),
            ("features", run / "features"),
        )
    }
    write_text(
        Path(__file__).with_name("true_size.json"),
        json.dumps(
            {
                "tokens": args.tokens,
                "features": args.features,
                "notebooks": found,
                "disk_gb": disk,
                "machine": machine(),
            },
            indent=2,
        )
        + "\n",
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
