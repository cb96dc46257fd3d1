"""Do the notebooks run on models of a pair's true size? Two models of its exact widths, with random weights.

    python -m benchmarks.true_size [--tokens 12000] [--features 32768] [--folder data/models/true_size]
    make figures PROFILE=dry CONFIG=FOLDER          # a dry run, without a hub, a GPU or weights

The weights mean nothing, so the numbers in the figures mean nothing: what is measured is that the notebooks
run as they are, in bfloat16, with the paper's number of features, in how much time and memory, and on how
much disk (benchmarks/true_size.json). A notebook that has run already is not run again: remove
data/runs/true_size to begin anew. The models take 6 GB of disk, saved like anybody's, in a folder that may be
removed afterwards. The text is that of the pair ``smol``, and its tokenizer: a vocabulary of 49,152 in models
that have room for 151,936.

The dry run reads config.json, and tokenizer.json if it is there, from the folder CONFIG (two folders, if the
models differ: ``--config BASE DISTILLED``), makes models of these widths with ``--layers`` layers, runs
notebooks 01 to 05 with the profile ``dry``, and prints what each took and the hours of the paper's run on one
A100 and one H100, by the formulas of ``benchmarks.costs``.

Source of the configuration: config.json of Qwen/Qwen2.5-Math-1.5B and of
deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B, which differ in the length they admit (4,096 and 131,072; the
latter here).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import yaml

from lib.models.pairs import load_pair
from lib.runs import write_text
from lib.settings import ROOT, UserError

from .common import machine

PAIR, DRY = "true_size", "dry"
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


def make(folder: Path, configs: Sequence[Path] = (), layers: int | None = None, name: str = PAIR) -> Path:
    """Both models below ``folder`` (unless they are there), and a registry that names them; its path.
    ``configs``: folders with a config.json, of the base and of the distilled model; ``layers``: instead of
    those of the configuration. UserError for a folder without one."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Qwen2Config

    smol, tokenizer = load_pair("smol"), None
    for seed, model in enumerate(("base", "distilled")):
        source = Path(configs[min(seed, len(configs) - 1)]) if configs else None
        if source and not (source / "config.json").is_file():
            raise UserError(
                f"{source} has no config.json: give the folder of a model, its weights are not needed"
            )
        config = AutoConfig.from_pretrained(source) if source else Qwen2Config(**CONFIG)
        if layers:
            config.num_hidden_layers = layers
            config.layer_types = getattr(config, "layer_types", None) and config.layer_types[:layers]
        if source and (source / "tokenizer.json").is_file():
            tokenizer = tokenizer or AutoTokenizer.from_pretrained(source)
        file = folder / model / "config.json"
        if not file.is_file():
            torch.manual_seed(seed)
            AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder / model)
    (tokenizer or smol.tokenizer()).save_pretrained(folder / "tokenizer")
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
    write_text(registry, yaml.safe_dump({name: entry}))
    return registry


def run(pair: str, profile: str, registry: Path, notebooks: dict[str, dict]) -> dict[str, dict]:
    """{notebook: {seconds, peak_memory_gb}} of each of ``notebooks`` {number: parameters}, run in turn."""
    found = {}
    for notebook, parameters in notebooks.items():
        file = ROOT / "data" / "runs" / pair / profile / "figures" / "results" / f"{notebook}.json"
        given = [word for name, value in parameters.items() for word in ("-p", name, str(value))]
        words = ["--pair", pair, "--profile", profile, "--registry", str(registry), "--only", notebook]
        if not file.is_file():
            done = subprocess.run([sys.executable, "-m", "lib", "figures", *words, *given], cwd=ROOT)
            if done.returncode:  # it has said why
                sys.exit(done.returncode)
        results = json.loads(file.read_text())
        found[notebook] = {
            "seconds": round(results["wall_seconds"]),
            "peak_memory_gb": round(results["peak_memory_mb"] / 1000, 1),
        }
        print(notebook, found[notebook], flush=True)
    return found


def hours(config) -> list[str]:
    """Lines: hours and gigabytes of the paper's run on a pair of this configuration, by arithmetic."""
    from . import costs

    config = config.get_text_config()
    model = costs.Model(
        "this pair",
        config.hidden_size,
        config.num_hidden_layers,
        config.intermediate_size,
        config.num_attention_heads,
        config.num_key_value_heads,
        config.vocab_size,
        config.tie_word_embeddings,
    )
    lines = [f"the paper's run, {costs.TOKENS / 1e6:.0f}M tokens and {costs.FEATURES:,} features, on paper:"]
    for rates in map(costs.card, costs.CARDS):
        training = costs.hours(costs.sparse_flops(model), rates) + costs.adam_hours(model, rates)
        harvest = costs.hours(model.harvest_flops, rates)
        lines.append(f"  {rates.name}: harvest {costs.shown(harvest)}, training {costs.shown(training)}")
    half, training = costs.models_gigabytes(model) / 2, costs.training_gigabytes(model)
    lines.append(
        f"  memory: models to half depth about {half:.0f} GB, training {training:.0f} GB;"
        f" disk, if stored, {costs.disk_terabytes(model):.1f} TB"
    )
    return lines


def dry(folder: Path, configs: Sequence[Path], layers: int) -> None:
    from transformers import AutoConfig

    if not configs:
        raise UserError(
            "a dry run needs the folder of a model's config.json: make figures PROFILE=dry CONFIG=FOLDER"
        )
    registry = make(folder, configs, layers, DRY)
    run(DRY, "dry", registry, {notebook: {} for notebook in ("01", "02", "03", "04", "05")})
    print("\n".join(hours(AutoConfig.from_pretrained(configs[0]))))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=12_000)
    parser.add_argument("--features", type=int, default=32_768)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--dry", action="store_true", help="the dry run")
    parser.add_argument("--config", type=Path, nargs="*", default=[], help="folders with a config.json")
    parser.add_argument("--layers", type=int, default=4, help="of the models of a dry run")
    args = parser.parse_args()
    pair = DRY if args.dry else PAIR
    folder = (args.folder or ROOT / "data" / "models" / pair).resolve()
    if args.dry:
        try:
            dry(folder, args.config, args.layers)
        except UserError as error:
            print(error, file=sys.stderr)
            return 2
        return 0
    registry = make(folder)
    notebooks = {
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
    found, here = run(PAIR, "smoke", registry, notebooks), ROOT / "data" / "runs" / PAIR / "smoke"
    disk = {
        name: round(sum(f.stat().st_size for f in place.rglob("*") if f.is_file()) / 1e9, 3)
        for name, place in (
            ("models", folder),
            ("store", here / "store"),
            ("crosscoder", here / "crosscoder"),
            ("features", here / "features"),
        )
    }
    facts = {"tokens": args.tokens, "features": args.features, "notebooks": found, "disk_gb": disk}
    file = Path(__file__).with_name("true_size.json")
    write_text(file, json.dumps(facts | {"machine": machine()}, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
