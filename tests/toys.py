"""Toys for tests: a pair of tiny random models that share the embedded tokenizer, and a store harvested from them."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from lib.corpus import build
from lib.distill import build_tokenizer
from lib.harvest import harvest
from lib.pairs import Pair
from lib.store import Store


def toy_model(width: int, seed: int, layers: int = 4) -> Qwen2ForCausalLM:
    """A random Qwen2 for the embedded vocabulary; weights are large enough for tokens and contexts to differ."""
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=512, hidden_size=width, num_hidden_layers=layers, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=2 * width, max_position_embeddings=512, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
        pad_token_id=0, initializer_range=0.2,
    )
    return Qwen2ForCausalLM(config).eval()


def toy_pair(folder: str | Path, widths: tuple[int, ...] = (16, 24), names: tuple[str, ...] = ("base", "distilled")) -> Pair:
    """Save tiny random models and the tokenizer below ``folder``; by default two of unlike width."""
    folder = Path(folder)
    build_tokenizer().save_pretrained(folder / "tokenizer")
    for seed, (name, width) in enumerate(zip(names, widths)):
        toy_model(width, seed).save_pretrained(folder / name)
    models = {name: folder / name for name in names[: len(widths)]}
    return Pair("toy", models, tokenizer_source=folder / "tokenizer", dictionary=32, tokens=4000)


def toy_store(folder: str | Path, tokens: int = 4000, widths: tuple[int, ...] = (16, 24), seed: int = 0, **options) -> Store:
    """A store of about ``tokens`` tokens from ``toy_pair``, at ``folder``/store, in shards of 1,500 tokens."""
    pair = toy_pair(folder, widths, names=("base", "distilled", "third")[: len(widths)])
    return harvest(pair, build(pair, tokens, seed=seed), Path(folder) / "store", **{"shard_tokens": 1500, "batch_tokens": 2048, **options})


class Interrupted(Exception):
    pass


class StopAt:
    """A progress line that breaks off the run."""

    def __init__(self, at):
        self.at = at

    def update(self, done, note=""):
        if done >= self.at:
            raise Interrupted

    def close(self):
        pass
