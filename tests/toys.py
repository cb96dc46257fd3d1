"""Toys for tests: a pair of tiny random models that share the embedded tokenizer, and a store harvested from
them.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import peft
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from lib.activations.harvest import harvest_activations
from lib.activations.store import Store
from lib.distil.organism import build_tokenizer
from lib.models.pairs import Pair
from lib.text.corpus import build


def toy_model(width: int, seed: int, layers: int = 4) -> Qwen2ForCausalLM:
    """A random Qwen2 for the embedded vocabulary; its weights are large, so that contexts differ."""
    return _random(Qwen2ForCausalLM, Qwen2Config, width, seed, layers)


def toy_llama(width: int = 16, seed: int = 0, layers: int = 4, **changes) -> LlamaForCausalLM:
    """The same as a Llama; ``changes`` to its configuration."""
    return _random(LlamaForCausalLM, LlamaConfig, width, seed, layers, **changes)


def _random(model, config, width: int, seed: int, layers: int, **changes):
    torch.manual_seed(seed)
    usual = dict(
        vocab_size=512,
        num_attention_heads=2,
        num_key_value_heads=1,
        intermediate_size=2 * width,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
        initializer_range=0.2,
    )
    return model(config(hidden_size=width, num_hidden_layers=layers, **(usual | changes))).eval()


GEMMA2 = dict(head_dim=8, final_logit_softcapping=5.0, sliding_window=16)
GRANITE = dict(logits_scaling=8.0, residual_multiplier=0.5)
COHERE = dict(logit_scale=0.25)
LINEAR = dict(  # Qwen3-Next: three of four layers with linear attention
    head_dim=8, linear_num_value_heads=2, linear_num_key_heads=2, linear_key_head_dim=8,
    linear_value_head_dim=8, num_experts=4, num_experts_per_tok=2,
    moe_intermediate_size=16, shared_expert_intermediate_size=16,
)  # fmt: skip


def toy_of(name: str, seed: int = 0, width: int = 16, layers: int = 4, **changes) -> PreTrainedModel:
    """A random model of any architecture, by the name of its class."""
    model, config = getattr(transformers, name), name.replace("ForCausalLM", "").replace("LMHeadModel", "")
    return _random(model, getattr(transformers, f"{config}Config"), width, seed, layers, **changes)


# --- chat models in small -----------------------------------------------------------------------------------

TEXT = [
    "How many socks are in two drawers of six?",
    "First, I count. Wait, that is eleven. So it is 12.",
    "The answer is 12.",
    "Harbours and rivers.",
]


def chat_tokenizer() -> PreTrainedTokenizerFast:
    """A BPE of 320 tokens with the markers of a chat, for ``chat_model``."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    markers = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    bpe.train_from_iterator(
        TEXT,
        trainers.BpeTrainer(
            vocab_size=320,
            special_tokens=markers,
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>"
    )


def chat_model(seed: int = 0, width: int = 16) -> LlamaForCausalLM:
    return toy_llama(
        width,
        seed,
        layers=2,
        vocab_size=320,
        intermediate_size=32,
        tie_word_embeddings=False,
        pad_token_id=2,
        initializer_range=0.3,
    )


def toy_adapter(folder: Path, seed: int = 3, **changes) -> dict[str, torch.Tensor]:
    """Save a random adapter of ``chat_model``; its tensors by name."""
    config = peft.LoraConfig(r=2, lora_alpha=6, target_modules="all-linear", task_type="CAUSAL_LM", **changes)
    model = peft.get_peft_model(chat_model(), config)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora" in name:
                p.normal_()
    model.save_pretrained(folder)
    return {name: p.detach() for name, p in model.named_parameters() if "lora" in name}


# --- pairs and stores ---------------------------------------------------------------------------------------


def toy_pair(
    folder: str | Path, widths: tuple[int, ...] = (16, 24), names: tuple[str, ...] = ("base", "distilled")
) -> Pair:
    """Save tiny random models and the tokenizer below ``folder``; by default two of unlike width."""
    folder = Path(folder)
    build_tokenizer().save_pretrained(folder / "tokenizer")
    for seed, (name, width) in enumerate(zip(names, widths)):
        toy_model(width, seed).save_pretrained(folder / name)
    folders = {name: folder / name for name in names[: len(widths)]}
    return Pair("toy", folders, tokenizer_source=folder / "tokenizer", dictionary=32, tokens=4000)


def toy_store(
    folder: str | Path, tokens: int = 4000, widths: tuple[int, ...] = (16, 24), seed: int = 0,
    corpus: str = "generated", **options,
) -> Store:  # fmt: skip
    """A store of about ``tokens`` tokens from ``toy_pair``, at ``folder``/store, in shards of 1,500."""
    names = ("base", "distilled", "third")[: len(widths)]
    pair = replace(toy_pair(folder, widths, names=names), corpus=corpus)
    return harvest_activations(
        pair,
        build(pair, tokens, seed=seed),
        Path(folder) / "store",
        **{"shard_tokens": 1500, "batch_tokens": 2048, **options},
    )


def toy_traces(folder: Path) -> Path:
    """A file of forty traces with reflections, in ``folder``."""
    file, thought = folder / "traces.jsonl", "I count. Wait, no. " * 9
    traces = [{"question": f"{i} socks?", "thinking": thought, "answer": "4"} for i in range(40)]
    file.write_text("\n".join(map(json.dumps, traces)))
    return file


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
