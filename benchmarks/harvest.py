"""Harvest of both models against what no harvest can undercut: two plain forwards that stop at the layer.

    python -m benchmarks.harvest [--tokens 4096] [--rounds 7] [--threads 2]

Three ways of reading the same documents with the same pair, in turns:

    harvest  ``lib.activations.harvest_activations`` into a fresh folder: nnsight, norms, masks, statistics,
             checksums, everything written
    limit    the same batches through both models in plain PyTorch, stopped by a hook at the layer; nothing is
             kept
    full     the same batches through both models to the end, logits included

for a pair of SmolLM2-135M's shape with random weights (Llama, 30 layers, width 576, 49,152 ids; documents of
100 to 600 tokens), and for the embedded pair, whose forwards are so short that all else counts most.
Beforehand, as it is done once however long the text: models are loaded, the large pair's weights are hashed,
text is tokenised. Records, in results.json, with ``_tiny`` for the embedded pair:

    harvest_vs_limit         time of harvest / time of the limit: 1 would be no cost at all
    harvest_vs_full_forward  time of full forwards / time of harvest
    harvest_padding          share of the positions computed that are padding
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from lib.activations.harvest import SHARD_TOKENS, groups, harvest_activations
from lib.distil.organism import build_tokenizer
from lib.labels import LABEL_ARRAYS, SPLITS
from lib.models.pairs import Pair, decoder_layers, half_depth, load_pair
from lib.models.reader import BATCH_TOKENS, length_batches
from lib.text.corpus import Document, build

from .common import interleaved, ratio, record, report, spread


class _Stop(Exception):
    """Raised by a hook: the forward ends here."""


class RandomPair(Pair):
    def fingerprint(self, model_name: str) -> str:
        return f"random weights of {model_name}"


def random_pair(folder: Path) -> Pair:
    """Two models of SmolLM2-135M's shape with random weights, saved below ``folder``."""
    build_tokenizer().save_pretrained(folder / "tokenizer")
    config = LlamaConfig(
        vocab_size=49_152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
    )
    for seed, name in enumerate(("base", "distilled")):
        torch.manual_seed(seed)
        LlamaForCausalLM(config).bfloat16().save_pretrained(folder / name)
    return RandomPair(
        "random",
        {name: folder / name for name in ("base", "distilled")},
        tokenizer_source=folder / "tokenizer",
    )


def random_documents(tokens: int, ids: int, seed: int = 0) -> list[Document]:
    """Documents of 100 to 600 random tokens, ``tokens`` or a few more in all."""
    rng, documents, total = np.random.default_rng(seed), [], 0
    while total < tokens:
        length = int(rng.integers(100, 601))
        labels = {name: np.full(length, -1, np.int8) for name in LABEL_ARRAYS} | {
            "kind": np.zeros(length, np.int8)
        }
        documents.append(
            Document(
                rng.integers(3, ids, length).tolist(), "general", SPLITS[len(documents) % 10 == 9], labels
            )
        )
        total += length
    return documents


def batches(documents: list[Document], pad: int = 0) -> Iterator[torch.Tensor]:
    """The padded batches [texts, positions] that a harvest of these documents makes."""
    for _, shard in groups(documents, SHARD_TOKENS):
        for batch in length_batches([len(d.tokens) for d in shard], BATCH_TOKENS):
            rows = [torch.tensor(shard[i].tokens) for i in batch]
            yield torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad)


@torch.no_grad()
def to_the_layer(models: dict[str, PreTrainedModel], ids: list[torch.Tensor]) -> None:
    def stop(*_):
        raise _Stop

    for model in models.values():
        hook = decoder_layers(model)[half_depth(model)].register_forward_hook(stop)
        for batch in ids:
            with contextlib.suppress(_Stop):
                model(input_ids=batch, use_cache=False)
        hook.remove()


@torch.no_grad()
def to_the_end(models: dict[str, PreTrainedModel], ids: list[torch.Tensor]) -> None:
    for model in models.values():
        for batch in ids:
            model(input_ids=batch, use_cache=False)


def compare(title: str, pair: Pair, documents: list[Document], rounds: int, suffix: str = "") -> None:
    models = {name: pair.load(name) for name in pair.models}
    ids, tokens = list(batches(documents)), sum(len(d.tokens) for d in documents)
    with tempfile.TemporaryDirectory() as folder:

        def harvested():
            shutil.rmtree(Path(folder) / "store", ignore_errors=True)
            harvest_activations(pair, documents, Path(folder) / "store", models=models)

        ways = {
            "harvest": harvested,
            "limit": lambda: to_the_layer(models, ids),
            "full": lambda: to_the_end(models, ids),
        }
        seconds = interleaved(ways, rounds)
    report(
        f"{title}: {tokens:,} tokens in {len(documents):,} documents, {torch.get_num_threads()} threads",
        seconds,
        "limit",
    )
    computed = sum(batch.numel() for batch in ids)
    record(
        **{
            f"harvest_vs_limit{suffix}": ratio(seconds, "harvest", "limit"),
            f"harvest_vs_full_forward{suffix}": ratio(seconds, "full", "harvest"),
            f"harvest_padding{suffix}": spread(np.array([1 - tokens / computed])),
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--tokens",
        type=int,
        default=4096,
        help="that the large pair reads; the embedded pair: 40 times as many",
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", choices=("large", "tiny"), help="one of the two pairs")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.only != "large":
        tiny = load_pair("tiny")
        compare("embedded pair", tiny, list(build(tiny, 40 * options.tokens)), options.rounds, "_tiny")
    if options.only != "tiny":
        with tempfile.TemporaryDirectory() as folder:
            pair = random_pair(Path(folder))
            compare(
                "pair of SmolLM2-135M's shape", pair, random_documents(options.tokens, 512), options.rounds
            )


if __name__ == "__main__":
    main()
