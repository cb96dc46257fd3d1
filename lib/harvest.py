"""Harvesting: both models read the same token ids, and the residual stream at half depth goes to disk.

For every shard of documents, for every model: an nnsight trace saves the output of one decoder layer and stops the
forward there (later layers do not run). Documents of like length are batched and padded on the right, which causal
attention never sees. At the end the masks are drawn, since they need medians over everything:

    first      position 0: BOS (or whatever stands there) is the attention sink, with 100 times the median norm in Qwen
    padding    never written; counted
    high_norm  norm above 10 times the model's median: massive activations inside a text

A token is dropped if **any** model says so, or the models would be compared on different tokens. Interrupted, a
harvest continues at the next shard, and ends with the same bytes.
"""

from __future__ import annotations

import errno
import functools
import json
import math
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from nnsight import TransformersModel
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from .corpus import KINDS, LABEL_ARRAYS, SPLITS, Corpus, Document
from .pairs import DTYPES, Pair, check_layer, decoder_path
from .puzzles import LABELS
from .results import Progress, UserError, check, fingerprint, is_current, versions, write_manifest, write_text
from .store import FORMAT, INDEX, Store, file_problem, read_log, sha256

NORM_FACTOR = 10.0
SHARD_TOKENS = 131_072
BATCH_TOKENS = 8_192


class Reader:
    """A model that is read at one decoder layer, through nnsight."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, layer: int | None = None):
        self.model, self.layer = model, check_layer(model, layer)
        self.width = model.config.get_text_config().hidden_size
        self.pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        self.nnsight = TransformersModel(model, tokenizer=tokenizer, task="text-generation")
        self.envoy = functools.reduce(getattr, decoder_path(model).split("."), self.nnsight)[self.layer]

    def read(self, token_lists: Sequence[Sequence[int]], side: str = "right") -> list[torch.Tensor]:
        """One padded batch; the residual stream [length, d] of each list, in the model's dtype, on the CPU, padding cut off."""
        lengths = [len(t) for t in token_lists]
        ids = torch.full((len(lengths), max(lengths)), self.pad)
        attention = torch.zeros_like(ids)
        spans = [slice(0, n) if side == "right" else slice(max(lengths) - n, None) for n in lengths]
        for i, (tokens, span) in enumerate(zip(token_lists, spans)):
            ids[i, span], attention[i, span] = torch.as_tensor(tokens), 1
        device = next(self.model.parameters()).device
        with torch.no_grad():
            with self.nnsight.trace({"input_ids": ids.to(device), "attention_mask": attention.to(device)}) as tracer:
                acts_bsd = self.envoy.output.save()
                tracer.stop()
        acts_bsd = acts_bsd.cpu()
        return [acts_bsd[i, span] for i, span in enumerate(spans)]


def capture(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, token_lists: Sequence[Sequence[int]], layer: int | None = None,
            side: str = "right", batch_tokens: int = BATCH_TOKENS) -> torch.Tensor:
    """Residual stream of some short texts: float32 [all tokens, d], list after list. Nothing is masked: position 0 is in it.

    ``layer`` None is half depth; ``side`` is where batches are padded ("right" or "left"; it makes no difference).
    """
    return _capture(Reader(model, tokenizer, layer), token_lists, side, batch_tokens)[0].float()


def _capture(
    reader: Reader, token_lists: Sequence[Sequence[int]], side: str = "right", batch_tokens: int = BATCH_TOKENS
) -> tuple[torch.Tensor, int]:
    """Activations [all tokens, d] in the order of the lists, and the number of padded positions that were computed in vain."""
    starts = np.cumsum([0, *map(len, token_lists)])
    out, padding = None, 0
    for batch in length_batches([len(t) for t in token_lists], batch_tokens):
        acts = reader.read([token_lists[i] for i in batch], side)
        padding += max(map(len, acts)) * len(acts) - sum(map(len, acts))
        if out is None:
            out = torch.empty(int(starts[-1]), acts[0].shape[-1], dtype=acts[0].dtype)
        for i, rows in zip(batch, acts):
            out[starts[i] : starts[i + 1]] = rows
    if out is None:
        raise UserError("there is nothing to read: give at least one list of tokens")
    return out, padding


def length_batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Numbers of documents, like lengths together, each batch at most ``batch_tokens`` with its padding (or one document)."""
    batch: list[int] = []
    for i in sorted((i for i, n in enumerate(lengths) if n), key=lambda i: lengths[i]):
        if batch and (len(batch) + 1) * lengths[i] > batch_tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


# --- masks -----------------------------------------------------------------------------------------------------


def masks(positions: np.ndarray, norms: Mapping[str, np.ndarray], factor: float = NORM_FACTOR) -> tuple[np.ndarray, dict[str, int]]:
    """Which tokens are kept [n] bool, and how many are dropped by reason, from positions [n] and each model's norms [n].

    A norm is too high above ``factor`` times that model's median over all tokens but the first of each text. A token
    is dropped from all models if it is dropped for one. ``high_norm`` counts tokens that ``first`` has not dropped.
    """
    first = np.asarray(positions) == 0
    high = {}
    for model, norm in norms.items():
        norm = np.asarray(norm, dtype=np.float64)
        high[model] = ~first & (norm > factor * np.median(norm[~first] if (~first).any() else norm))
    either = np.logical_or.reduce(list(high.values()))
    dropped = {"first": int(first.sum()), "high_norm": int(either.sum())}
    dropped.update({f"high_norm_{model}": int(mask.sum()) for model, mask in high.items()})
    return ~(first | either), dropped


# --- the harvest -----------------------------------------------------------------------------------------------


def harvest(pair: Pair, documents: Corpus | Iterable[Document], path: str | Path, layer: int | None = None,
            models: Mapping[str, PreTrainedModel] | None = None, shard_tokens: int = SHARD_TOKENS, batch_tokens: int = BATCH_TOKENS,
            device: str | None = None) -> Store:
    """Read ``documents`` with every model of the pair and write a store to ``path``; returns it, opened.

    Nothing is done if the store is there, whole, and made from the same; what is damaged or missing is made anew.
    ``layer`` overrides the pair's (default: half depth of each model). ``models`` passes loaded models by name, with
    the pair's weights. Raises UserError for a full disk (finished shards stay), for activations that are not finite, and
    for token ids that a model does not have.
    """
    path = Path(path)
    check("shard_tokens", shard_tokens, int, low=1)
    check("batch_tokens", batch_tokens, int, low=1)
    corpus = documents if isinstance(documents, Corpus) else list(documents)
    tokenizer = corpus.tokenizer if isinstance(corpus, Corpus) else pair.tokenizer()
    about = _about(pair, corpus, tokenizer, pair.layer if layer is None else layer, shard_tokens, batch_tokens)
    mark = fingerprint(about)
    if is_current(path, mark):
        try:
            return Store.open(path)
        except UserError:
            pass  # something is damaged: below, whole shards are kept and the others made anew
    if isinstance(corpus, Corpus):
        corpus.check_budget()
    _prepare(path, mark, corpus, about)
    readers: dict[str, Reader] = {}  # models are loaded when the first shard needs them
    shards = {}
    total = corpus.tokens if isinstance(corpus, Corpus) else sum(len(d.tokens) for d in corpus)
    done = 0
    try:
        with Progress("tokens harvested", total) as progress:
            for number, (first, group) in enumerate(_groups(corpus, shard_tokens)):
                name = f"shard_{number:05d}.safetensors"
                entry = read_log(path).get(name)
                if entry is None or file_problem(path / name, entry):
                    if not readers:
                        readers = _readers(pair, about, tokenizer, models, device)
                    entry = _write_shard(path, name, group, first, readers, pair.store_dtype, batch_tokens)
                shards[name] = entry
                done += entry["tokens"]
                progress.update(min(done, total), f"{number + 1} shards")
            if not shards:
                raise UserError("there are no documents to harvest: give a corpus of at least one")
            _finish(path, mark, about, shards)
            progress.update(total)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise UserError(_full(path, about, total)) from None
    return Store.open(path, verify=False)


def _about(pair: Pair, corpus, tokenizer, layer: int | None, shard_tokens: int, batch_tokens: int) -> dict:
    """Everything that decides the content of a store, as plain data: it is fingerprinted, and goes into the manifest."""
    models = {}
    for name in pair.models:
        config = pair.config(name).get_text_config()
        depth = config.num_hidden_layers
        at = max(depth // 2 - 1, 0) if layer is None else check("layer", layer, int, low=0, high=depth - 1)
        models[name] = {"fingerprint": pair.fingerprint(name), "width": config.hidden_size, "layer": at, "layers": depth,
                        "vocabulary": config.vocab_size}
    if isinstance(corpus, Corpus):
        text = {**corpus.parameters, "fingerprint": corpus.fingerprint}
        text["source"] = text["source"] if isinstance(text["source"], str) else [Path(p).name for p, _ in text["source"]]
    else:
        text = {"source": "documents", "fingerprint": fingerprint([[d.tokens, d.kind, d.split, d.labels] for d in corpus])}
    return {"format": FORMAT, "models": models, "corpus": text, "tokenizer": fingerprint(tokenizer.get_vocab()),
            "hook": "output of the decoder layer", "dtype": pair.dtype, "store_dtype": pair.store_dtype,
            "scaling": "none (raw); statistics.scale = sqrt(width) / mean norm", "norm_factor": NORM_FACTOR,
            "shard_tokens": shard_tokens, "batch_tokens": batch_tokens}


def _prepare(path: Path, mark: str, corpus, about: dict) -> None:
    """Make the folder ready: shards of this very harvest stay, anything of another one goes; and is there room?"""
    path.mkdir(parents=True, exist_ok=True)
    (path / "manifest.json").unlink(missing_ok=True)
    begun = path / "harvest.json"
    if not begun.is_file() or begun.read_text().strip() != mark:
        for old in [*path.glob("shard_*"), *path.glob("*.part"), path / INDEX, path / "log.jsonl"]:
            old.unlink(missing_ok=True)
        write_text(begun, mark + "\n")
    tokens = corpus.tokens if isinstance(corpus, Corpus) else 0
    there = sum(f.stat().st_size for f in path.glob("shard_*"))
    if shutil.disk_usage(path).free < _bytes(about, tokens) - there:
        raise UserError(_full(path, about, tokens))


def _bytes(about: dict, tokens: int) -> int:
    per_token = sum(m["width"] for m in about["models"].values()) * DTYPES[about["store_dtype"]].itemsize + 24
    return int(tokens * per_token * 1.02)


def _full(path: Path, about: dict, tokens: int) -> str:
    return (f"the disk is full: {tokens:,} tokens take about {_bytes(about, tokens) / 1e9:.2f} GB below {path.name}, of which "
            f"{shutil.disk_usage(path).free / 1e9:.2f} GB are free; make room or ask for fewer tokens, finished shards are kept")


def _groups(corpus: Iterable[Document], shard_tokens: int) -> Iterator[tuple[int, list[Document]]]:
    """(number of the first document, documents) of each shard: whole documents, at least ``shard_tokens`` tokens (but the last)."""
    group: list[Document] = []
    size = first = 0
    for number, document in enumerate(corpus):
        group.append(document)
        size += len(document.tokens)
        if size >= shard_tokens:
            yield first, group
            group, size, first = [], 0, number + 1
    if group:
        yield first, group


def _readers(pair: Pair, about: dict, tokenizer, models: Mapping[str, PreTrainedModel] | None, device: str | None) -> dict[str, Reader]:
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    loaded = {name: (models[name] if models else pair.load(name)).to(device) for name in pair.models}
    return {name: Reader(model, tokenizer, about["models"][name]["layer"]) for name, model in loaded.items()}


def _write_shard(
    path: Path, name: str, group: list[Document], first: int, readers: dict[str, Reader], store_dtype: str, batch_tokens: int
) -> dict:
    """Run all models over the documents of one shard and write it, whole or not at all; returns its line of the log."""
    began = time.monotonic()
    token_lists = [d.tokens for d in group]
    lengths = [len(t) for t in token_lists]
    tensors = {
        "tokens": torch.tensor(np.concatenate(token_lists), dtype=torch.int32),
        "documents": torch.repeat_interleave(torch.arange(first, first + len(group), dtype=torch.int32), torch.tensor(lengths)),
        "positions": torch.cat([torch.arange(n, dtype=torch.int32) for n in lengths]),
        "split": torch.repeat_interleave(torch.tensor([SPLITS.index(d.split) for d in group], dtype=torch.int8), torch.tensor(lengths)),
        **{label: torch.from_numpy(np.concatenate([d.labels[label] for d in group])) for label in LABEL_ARRAYS},
    }
    highest = int(tensors["tokens"].max())
    for model, reader in readers.items():
        vocabulary = reader.model.get_input_embeddings().num_embeddings
        if highest >= vocabulary:
            raise UserError(f"the corpus has token id {highest}, model {model!r} has {vocabulary} ids: the tokenizer must fit every model")
        acts, padding = _capture(reader, token_lists, batch_tokens=batch_tokens)
        stored = acts.to(DTYPES[store_dtype])
        _check_finite(acts, stored, model, reader.layer, store_dtype, first)
        tensors[f"acts_{model}"] = stored
        tensors[f"norm_{model}"] = stored.double().norm(dim=1).float()
    entry = {"shard": name, **_save_whole(tensors, path / name), "tokens": len(tensors["tokens"]), "documents": len(group),
             "padding": padding, "seconds": round(time.monotonic() - began, 3)}
    with (path / "log.jsonl").open("a") as log:
        log.write(json.dumps(entry) + "\n")
    return entry


def _check_finite(acts: torch.Tensor, stored: torch.Tensor, model: str, layer: int, store_dtype: str, first: int) -> None:
    if not torch.isfinite(acts).all():
        share = 1 - torch.isfinite(acts).all(dim=1).double().mean().item()
        raise UserError(f"activations of {model!r} at layer {layer} are not finite in {share:.2%} of the tokens from document {first} on: "
                        "check the weights, or load the models in float32 or bfloat16 (dtype of the pair)")
    if not torch.isfinite(stored).all():
        raise UserError(f"activations of {model!r} reach {acts.abs().max().item():.0f}, which {store_dtype} cannot hold: set "
                        "store_dtype of the pair to bfloat16")


def _save_whole(tensors: dict[str, torch.Tensor], file: Path) -> dict:
    """Write under another name, flush to the disk, rename: the file is whole or absent. Returns its size and checksum."""
    scratch = file.with_name(file.name + ".part")
    try:
        save_file({name: t.contiguous() for name, t in tensors.items()}, scratch)
        with scratch.open("rb") as stream:
            os.fsync(stream.fileno())
        entry = {"bytes": scratch.stat().st_size, "sha256": sha256(scratch)}
        os.replace(scratch, file)
    except Exception as error:
        if "No space left" in str(error) and not isinstance(error, OSError):  # safetensors wraps the error of the system
            raise OSError(errno.ENOSPC, "No space left on device") from None
        raise
    finally:
        scratch.unlink(missing_ok=True)
    return entry


def _finish(path: Path, mark: str, about: dict, shards: dict[str, dict]) -> None:
    """Draw the masks, take the statistics over kept train tokens in float64, write the index and, last, the manifest."""
    for stray in set(path.glob("shard_*")) - {path / name for name in shards}:
        stray.unlink()
    opened = [load_file(path / name) for name in shards]
    names = list(about["models"])

    def joined(name: str) -> np.ndarray:
        return np.concatenate([s[name].numpy() for s in opened])

    norms = {m: joined(f"norm_{m}") for m in names}
    split, labels, documents = joined("split"), {n: joined(n) for n in LABEL_ARRAYS}, joined("documents")
    kept, dropped = masks(joined("positions"), norms)
    train = kept & (split == SPLITS.index("train"))
    if not train.any():
        raise UserError(f"no token of the train split is left by the masks (dropped: {dropped}): harvest more text")
    index, statistics = {"kept": torch.from_numpy(kept)}, {}
    starts = np.cumsum([0, *(len(s["tokens"]) for s in opened)])
    for m in names:
        total, squares = torch.zeros(about["models"][m]["width"], dtype=torch.float64), 0.0
        for s, start in zip(opened, starts):
            acts = s[f"acts_{m}"][torch.from_numpy(train[start : start + len(s["tokens"])])].double()
            total += acts.sum(0)
            squares += acts.square().sum().item()
        n = int(train.sum())
        mean, mean_norm = total / n, float(norms[m][train].mean(dtype=np.float64))
        index[f"mean_{m}"] = mean
        statistics[m] = {"mean_norm": mean_norm, "median_norm": float(np.median(norms[m][kept])), "scale": math.sqrt(len(mean)) / mean_norm,
                         "mean_square_norm": squares / n, "total_variance": squares / n - mean.square().sum().item(), "tokens": n}
    counts = {"tokens": len(kept), "kept": int(kept.sum()), "documents": int(documents[-1]) + 1,
              "distinct_tokens": _distinct(joined("tokens"), documents, kept),
              "kept_by_split": {s: int((kept & (split == i)).sum()) for i, s in enumerate(SPLITS)},
              "kept_by_kind": {k: int((kept & (labels["kind"] == i)).sum()) for i, k in enumerate(KINDS)},
              "kept_by_label": {k: int((kept & (labels["label"] == i)).sum()) for i, k in enumerate(LABELS)},
              "dropped": {**dropped, "padding": sum(e["padding"] for e in shards.values())}}
    entry = _save_whole(index, path / INDEX)
    files = {name: {k: e[k] for k in ("bytes", "sha256", "tokens", "documents")} for name, e in shards.items()}
    write_manifest(path, mark, **about, counts=counts, statistics=statistics, shards=files, index=entry, versions=versions())


def _distinct(tokens: np.ndarray, documents: np.ndarray, kept: np.ndarray) -> int:
    """Kept positions in distinct texts: a text that occurs again adds nothing."""
    bounds = np.flatnonzero(np.diff(documents, prepend=-1, append=-1))
    seen, count = set(), 0
    for first, end in zip(bounds, bounds[1:]):
        text = tokens[first:end].tobytes()
        if text not in seen:
            seen.add(text)
            count += int(kept[first:end].sum())
    return count
