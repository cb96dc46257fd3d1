"""Harvesting: both models read the same token ids, and the residual stream at one layer goes to disk.

Every model runs on every shard of documents, up to the layer that is read (lib.models.reader). While a shard
is written, the next one is computed. At the end tokens are masked, which needs medians over everything:

    first      position 0: BOS, or what stands there, is the attention sink (in Qwen 100 median norms)
    padding    never written; counted
    high_norm  norm above 10 times the model's median: massive activations inside a text

A token is dropped if **any** model says so, or the models would be compared on different tokens. Interrupted,
a harvest continues at the next shard, and ends with the same bytes. So do jobs, any number of them, that
share the shards out (docs/cluster.md)::

    python -m lib harvest --pair tiny --profile default --part 0/8   # 1/8, ... on one disk
    python -m lib harvest --pair tiny --profile default --merge
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..labels import KINDS, LABEL_ARRAYS, LABELS, SPLITS
from ..models.pairs import DTYPES, Pair, load_pair
from ..models.reader import BATCH_TOKENS, CHUNK, NORM_FACTOR, LayerReader, masks, read_all, row_norms
from ..runs import (
    Progress,
    exclusive,
    fingerprint,
    is_current,
    versions,
    whole_file,
    write_manifest,
    write_text,
)
from ..settings import UserError, check
from ..text.corpus import Corpus, Document, build, override
from .shuffle import Table, widened
from .store import FORMAT, INDEX, Store, file_problem, read_log, sha256

SHARD_TOKENS = 131_072
BEGUN = "harvest.json"  # in the folder of a store: the fingerprint of what is being harvested into it
STALE = 3600  # seconds after which a file that is still being written belongs to a job that died


# --- the harvest --------------------------------------------------------------------------------------------


def open_text(
    name: str, tokens: int, trace_share: float = 0.5, seed: int = 0, traces: str = "", general: str = ""
) -> tuple[Pair, Corpus]:
    """A pair of the registry and its text, of about ``tokens`` tokens; ``traces`` and ``general`` name other
    text than the pair's (a file, or a data set on the hub).
    """
    pair = override(load_pair(name), traces, general)
    return pair, build(pair, tokens, trace_share=trace_share, seed=seed)


def harvest_activations(
    pair: Pair,
    documents: Corpus | Iterable[Document],
    path: str | Path,
    layer: int | None = None,
    models: Mapping[str, PreTrainedModel] | None = None,
    shard_tokens: int = SHARD_TOKENS,
    batch_tokens: int = BATCH_TOKENS,
    device: str | None = None,
) -> Store:
    """Read ``documents`` with every model of the pair and write a store to ``path``; returns it, opened.

    Nothing is done if the store is there, whole, and made from the same; what is damaged or missing is made
    anew. ``layer`` overrides the pair's (default: half depth of each model). ``models`` passes loaded models
    by name, with the pair's weights. Raises UserError for a full disk (finished shards stay), for activations
    that are not finite, and for token ids that a model does not have.
    """
    job = job_of(pair, documents, path, layer, shard_tokens, batch_tokens)
    if is_current(job.path, job.fingerprint):
        try:
            return Store.open(job.path)
        except UserError:
            pass  # something is damaged: below, whole shards are kept and the others made anew
    if isinstance(job.corpus, Corpus):
        job.corpus.check_budget()
    job.path.mkdir(parents=True, exist_ok=True)
    with exclusive(job.path, "harvesting"):
        _check_room(job)
        _clear(job)
        shards = _make(job, range(sys.maxsize), models, device)
        if not shards:
            raise UserError("there are no documents to harvest: give a corpus of at least one")
        _finish(job, shards)
    return Store.open(job.path, verify=False)


def harvest_part(
    pair: Pair,
    documents: Corpus | Iterable[Document],
    path: str | Path,
    part: tuple[int, int],
    layer: int | None = None,
    models: Mapping[str, PreTrainedModel] | None = None,
    shard_tokens: int = SHARD_TOKENS,
    batch_tokens: int = BATCH_TOKENS,
    device: str | None = None,
) -> int:
    """Write part i of n, ``part`` = (i, n) with i from 0, of the shards of a harvest; returns how many shards
    the part has.

    Parts are ranges of neighbouring shards. Jobs for them may run in any order or at once, wherever the
    folder can be seen; ``merge_parts`` makes their shards a store. Whole shards are not made again. Two jobs
    with the same part do its work twice, and nothing worse. Other parameters and errors as in
    ``harvest_activations``; UserError if the folder holds a harvest of something else.
    """
    job = job_of(pair, documents, path, layer, shard_tokens, batch_tokens)
    numbers = _part(job, *part)
    _claim(job)
    _check_room(job)
    return len(_make(job, numbers, models, device))


def merge_parts(
    pair: Pair,
    documents: Corpus | Iterable[Document],
    path: str | Path,
    layer: int | None = None,
    shard_tokens: int = SHARD_TOKENS,
    batch_tokens: int = BATCH_TOKENS,
) -> Store:
    """Check that every shard of a harvest is there and whole, and write masks, statistics and manifest: the
    same store as ``harvest_activations``'s.

    Parameters as in ``harvest_activations``. No model runs, but the text is gone through again, to know which
    shards there must be. UserError names those that are missing or damaged; ``harvest_part`` or
    ``harvest_activations`` makes just these anew.
    """
    job = job_of(pair, documents, path, layer, shard_tokens, batch_tokens)
    _claim(job)
    log = _logged(job.path)
    plan = {
        _name(number): sum(len(d.tokens) for d in group)
        for number, (_, group) in enumerate(groups(job.corpus, shard_tokens))
    }
    with ThreadPoolExecutor() as pool:  # checksums of several files at once
        problems = list(pool.map(lambda name: _problem(job.path, name, log.get(name), plan[name]), plan))
    if bad := [f"{name} is {problem}" for name, problem in zip(plan, problems) if problem]:
        more = f" and {len(bad) - 10} more" if len(bad) > 10 else ""
        raise UserError(
            f"{len(bad)} of {len(plan)} shards are not as they must be ({', '.join(bad[:10])}{more}): run"
            " their parts again"
        )
    _check_room(job)
    _finish(job, {name: log[name] for name in plan})
    return Store.open(job.path, verify=False)


@dataclass(frozen=True)
class Job:
    """What is read and where it goes. ``content``: everything that decides the content of the store."""

    pair: Pair
    corpus: Corpus | list[Document]
    tokenizer: PreTrainedTokenizerBase
    path: Path
    content: dict
    fingerprint: str  # of the content
    tokens: int  # expected; BOS is not counted, if the corpus is one


def job_of(
    pair: Pair, documents, path: str | Path, layer: int | None, shard_tokens: int, batch_tokens: int
) -> Job:
    check("shard_tokens", shard_tokens, int, low=1)
    check("batch_tokens", batch_tokens, int, low=1)
    corpus = documents if isinstance(documents, Corpus) else list(documents)
    tokenizer = corpus.tokenizer if isinstance(corpus, Corpus) else pair.tokenizer()
    layer = pair.layer if layer is None else layer
    content = _content(pair, corpus, tokenizer, layer, shard_tokens, batch_tokens)
    tokens = corpus.tokens if isinstance(corpus, Corpus) else sum(len(d.tokens) for d in corpus)
    return Job(pair, corpus, tokenizer, Path(path), content, fingerprint(content), tokens)


def _content(pair: Pair, corpus, tokenizer, layer: int | None, shard_tokens: int, batch_tokens: int) -> dict:
    """Everything that decides the content of a store, as plain data: it is fingerprinted, and goes into the
    manifest.
    """
    models = {}
    for name in pair.models:
        config = pair.config(name).get_text_config()
        depth = config.num_hidden_layers
        at = max(depth // 2 - 1, 0) if layer is None else check("layer", layer, int, low=0, high=depth - 1)
        models[name] = {
            "fingerprint": pair.fingerprint(name),
            "width": config.hidden_size,
            "layer": at,
            "layers": depth,
            "vocabulary": config.vocab_size,
        }
    if isinstance(corpus, Corpus):
        text = {**corpus.parameters, "fingerprint": corpus.fingerprint}
        text["source"] = (
            text["source"] if isinstance(text["source"], str) else [Path(p).name for p, _ in text["source"]]
        )
    else:
        arrays = [np.concatenate([np.empty(0, np.int64), *(d.tokens for d in corpus)])]
        arrays += [
            np.concatenate([np.empty(0, np.int8), *(d.labels[label] for d in corpus)])
            for label in LABEL_ARRAYS
        ]
        documents = [[len(d.tokens), d.kind, d.split] for d in corpus]
        text = {"source": "documents", "fingerprint": fingerprint(arrays, documents)}
    return {
        "format": FORMAT,
        "models": models,
        "corpus": text,
        "tokenizer": fingerprint(tokenizer.get_vocab()),
        "hook": "output of the decoder layer",
        "dtype": pair.dtype,
        "store_dtype": pair.store_dtype,
        "scaling": "none (raw); statistics.scale = sqrt(width) / mean norm",
        "norm_factor": NORM_FACTOR,
        "shard_tokens": shard_tokens,
        "batch_tokens": batch_tokens,
    }


# --- the folder, in which several jobs may be at work -------------------------------------------------------


def _clear(job: Job) -> None:
    """Make the folder ready for a whole harvest: shards of the same stay, anything of another one goes."""
    job.path.mkdir(parents=True, exist_ok=True)
    (job.path / "manifest.json").unlink(missing_ok=True)
    if _begun(job.path) != job.fingerprint:
        for old in [
            *job.path.glob("shard_*"),
            *job.path.glob(".shard_*"),
            *job.path.glob("log*.json*"),
            job.path / INDEX,
        ]:
            old.unlink(missing_ok=True)
        write_text(job.path / BEGUN, job.fingerprint + "\n")


def _claim(job: Job) -> None:
    """The folder is for this harvest from now on; UserError if it is for another one. Nothing is removed:
    other jobs may be at work.
    """
    job.path.mkdir(parents=True, exist_ok=True)
    if _begun(job.path) is None:
        write_text(job.path / BEGUN, job.fingerprint + "\n")
    if (begun := _begun(job.path)) != job.fingerprint:
        raise UserError(
            f"{job.path.name} holds the harvest of something else (fingerprint {begun}, this one is"
            f" {job.fingerprint}): give all jobs the same pair, weights, corpus, layer and sizes, or remove"
            " the folder"
        )


def _begun(path: Path) -> str | None:
    """Fingerprint of the harvest that the folder is for."""
    file = path / BEGUN
    return file.read_text(encoding="utf-8").strip() if file.is_file() else None


def _part(job: Job, i: int, n: int) -> range:
    """Numbers of the shards of part i of n. How many there are turns out at the end of the text only: the
    last part has no end.
    """
    check("number of parts", n, int, low=1)
    check("part", i, int, low=0, high=n - 1)
    expected = math.ceil(job.tokens / job.content["shard_tokens"])
    return range(i * expected // n, (i + 1) * expected // n if i < n - 1 else sys.maxsize)


def _logged(path: Path) -> dict[str, dict]:
    """{shard: its line of the log}, from log.jsonl and from the files of single shards, which jobs write
    before there is a log.
    """
    lines = read_log(path)
    for file in sorted(path.glob("log_*.json")):
        entry = json.loads(file.read_text(encoding="utf-8"))
        lines[entry["shard"]] = entry
    return lines


def _problem(path: Path, name: str, entry: dict | None, tokens: int) -> str | None:
    """What is wrong with a shard that must have so many tokens; None if nothing is."""
    if entry is None or entry["tokens"] != tokens:
        return "damaged" if (path / name).is_file() else "missing"
    return file_problem(path / name, entry)


def _check_room(job: Job) -> None:
    """UserError if the disk has no room for what is still to come."""
    widths = sum(m["width"] for m in job.content["models"].values())
    total = int(1.02 * job.tokens * (24 + widths * DTYPES[job.pair.store_dtype].itemsize))
    free = shutil.disk_usage(job.path).free
    if free < total - sum(f.stat().st_size for f in job.path.glob("shard_*")):
        raise UserError(
            f"the disk is full: {job.tokens:,} tokens take about {total / 1e9:.2f} GB below {job.path.name},"
            f" of which {free / 1e9:.2f} GB are free; make room or ask for fewer tokens, finished shards are"
            " kept"
        )


# --- shards -------------------------------------------------------------------------------------------------


def _make(
    job: Job, numbers: range, models: Mapping[str, PreTrainedModel] | None, device: str | None
) -> dict[str, dict]:
    """Make the shards with these numbers, but for those that are there and whole; {shard: its line of the
    log}, in order.
    """
    readers: dict[str, LayerReader] = {}  # models are loaded when the first shard needs them
    writing: Future | None = None
    log, shards, done = _logged(job.path), {}, 0
    with Progress("tokens harvested", job.tokens) as progress, ThreadPoolExecutor(1) as writer:
        began = time.monotonic()
        for number, (first, group) in enumerate(groups(job.corpus, job.content["shard_tokens"])):
            if number >= numbers.stop:
                break
            if number < numbers.start:
                continue
            name, tokens = _name(number), sum(len(d.tokens) for d in group)
            if _problem(job.path, name, log.get(name), tokens) is None:
                shards[name] = log[name]
            else:
                readers = readers or readers_of(job, models, device)
                tensors, padding = _shard(
                    group, first, readers, job.pair.store_dtype, job.content["batch_tokens"]
                )
                facts = {"tokens": tokens, "documents": len(group), "padding": padding}
                facts["seconds"] = round(time.monotonic() - began, 3)
                if writing:  # one shard at most, or memory would fill up
                    writing.result()
                writing = shards[name] = writer.submit(_write_shard, job.path, name, tensors, facts)
            began = time.monotonic()
            done += tokens
            progress.update(min(done, job.tokens), f"{number - numbers.start + 1} shards")
    return {name: line.result() if isinstance(line, Future) else line for name, line in shards.items()}


def _name(number: int) -> str:
    return f"shard_{number:05d}.safetensors"


def groups(corpus: Iterable[Document], shard_tokens: int) -> Iterator[tuple[int, list[Document]]]:
    """(number of the first document, documents) of each shard: whole documents, at least ``shard_tokens``
    tokens (but the last).
    """
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


def readers_of(
    job: Job, models: Mapping[str, PreTrainedModel] | None, device: str | None
) -> dict[str, LayerReader]:
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    loaded = {name: (models[name] if models else job.pair.load(name)).to(device) for name in job.pair.models}
    return {
        name: LayerReader(model, job.tokenizer, job.content["models"][name]["layer"])
        for name, model in loaded.items()
    }


def _shard(
    group: list[Document], first: int, readers: Mapping[str, LayerReader], store_dtype: str, batch_tokens: int
) -> tuple[dict[str, torch.Tensor], int]:
    """All that a shard holds, by name, from running all models over its documents; and how many positions
    were padding.
    """
    token_lists = [d.tokens for d in group]
    lengths = torch.tensor([len(t) for t in token_lists])
    tensors = {
        "tokens": torch.tensor(np.concatenate(token_lists), dtype=torch.int32),
        "documents": torch.repeat_interleave(
            torch.arange(first, first + len(group), dtype=torch.int32), lengths
        ),
        "positions": torch.cat([torch.arange(n, dtype=torch.int32) for n in lengths.tolist()]),
        "split": torch.repeat_interleave(
            torch.tensor([SPLITS.index(d.split) for d in group], dtype=torch.int8), lengths
        ),
        **{
            label: torch.from_numpy(np.concatenate([d.labels[label] for d in group]))
            for label in LABEL_ARRAYS
        },
    }
    highest = int(tensors["tokens"].max())
    for model, reader in readers.items():
        vocabulary = reader.model.get_input_embeddings().num_embeddings
        if highest >= vocabulary:
            raise UserError(
                f"the corpus has token id {highest}, model {model!r} has {vocabulary} ids: the tokenizer must"
                " fit every model"
            )
        acts, padding = read_all(reader, token_lists, batch_tokens=batch_tokens)
        stored = acts.to(DTYPES[store_dtype])
        check_finite(acts, stored, model, reader.layer, store_dtype, first)
        tensors[f"acts_{model}"], tensors[f"norm_{model}"] = stored, row_norms(stored)
    return tensors, padding


def check_finite(
    acts: torch.Tensor, stored: torch.Tensor, model: str, layer: int, store_dtype: str, first: int
) -> None:
    if torch.isfinite(stored).all():
        return
    finite = torch.isfinite(acts).all(dim=1)
    if not finite.all():
        share = 1 - finite.double().mean().item()
        raise UserError(
            f"activations of {model!r} at layer {layer} are not finite in {share:.2%} of the tokens from"
            f" document {first} on: check the weights, or load the models in float32 or bfloat16 (dtype of"
            " the pair)"
        )
    raise UserError(
        f"activations of {model!r} reach {acts.abs().max().item():.0f}, which {store_dtype} cannot hold: set "
        "store_dtype of the pair to bfloat16"
    )


def _write_shard(path: Path, name: str, tensors: dict[str, torch.Tensor], facts: dict) -> dict:
    """Write a shard, and then its line of the log into a file of its own: no two jobs share one."""
    entry = {"shard": name, **_save_whole(tensors, path / name), **facts}
    log = path / name.replace("shard_", "log_").replace(".safetensors", ".json")
    write_text(log, json.dumps(entry) + "\n")
    return entry


def _save_whole(tensors: dict[str, torch.Tensor], file: Path) -> dict:
    """Write a safetensors file, whole or not at all; returns its size and checksum."""
    with whole_file(file) as scratch:
        save_file({name: t.contiguous() for name, t in tensors.items()}, scratch)
        return {"bytes": scratch.stat().st_size, "sha256": sha256(scratch)}


# --- the end ------------------------------------------------------------------------------------------------


def _finish(job: Job, shards: dict[str, dict]) -> None:
    """Draw the masks, take the statistics over kept train tokens in float64, write the index and, last, the
    manifest.

    Activations are read again, some thousand rows at a time; of the rest, some 40 bytes per token are in
    memory.
    """
    for stray in set(job.path.glob("shard_*")) - {job.path / name for name in shards}:
        stray.unlink()
    for dead in job.path.glob(".shard_*"):
        if time.time() - dead.stat().st_mtime > STALE:
            dead.unlink()
    tables = [Table(job.path / name) for name in shards]

    def joined(name: str) -> np.ndarray:
        return np.concatenate([table.read(name) for table in tables])

    norms = {m: joined(f"norm_{m}") for m in job.content["models"]}
    kept, dropped = masks(joined("positions"), norms)
    split, label, kind = joined("split"), joined("label"), joined("kind")
    train = kept & (split == SPLITS.index("train"))
    if not train.any():
        raise UserError(
            f"no token of the train split is left by the masks (dropped: {dropped}): harvest more text"
        )
    index, statistics, n = {"kept": torch.from_numpy(kept)}, {}, int(train.sum())
    for m, norm in norms.items():
        mean, squares = _moments(tables, f"acts_{m}", train)
        mean_norm = float(norm[train].mean(dtype=np.float64))
        if mean_norm == 0:
            raise UserError(
                f"all activations of {m} are zero at this layer, so there is nothing to scale or to train on:"
                " check its weights"
            )
        index[f"mean_{m}"] = mean
        statistics[m] = {
            "mean_norm": mean_norm,
            "median_norm": float(np.median(norm[kept])),
            "scale": math.sqrt(len(mean)) / mean_norm,
            "mean_square_norm": squares,
            "total_variance": squares - mean.square().sum().item(),
            "tokens": n,
        }
    counts = {
        "tokens": len(kept),
        "kept": int(kept.sum()),
        "documents": sum(e["documents"] for e in shards.values()),
        "distinct_tokens": _distinct(tables, kept),
        "kept_by_split": {s: int((kept & (split == i)).sum()) for i, s in enumerate(SPLITS)},
        "kept_by_kind": {k: int((kept & (kind == i)).sum()) for i, k in enumerate(KINDS)},
        "kept_by_label": {k: int((kept & (label == i)).sum()) for i, k in enumerate(LABELS)},
        "dropped": {**dropped, "padding": sum(e["padding"] for e in shards.values())},
    }
    entry = _save_whole(index, job.path / INDEX)
    write_text(job.path / "log.jsonl", "".join(json.dumps(e) + "\n" for e in shards.values()))
    for name in job.path.glob("log_*.json"):
        name.unlink(missing_ok=True)
    files = {
        name: {k: e[k] for k in ("bytes", "sha256", "tokens", "documents")} for name, e in shards.items()
    }
    write_manifest(
        job.path,
        job.fingerprint,
        **job.content,
        counts=counts,
        statistics=statistics,
        shards=files,
        index=entry,
        versions=versions(),
    )


def _moments(tables: Sequence[Table], name: str, wanted: np.ndarray) -> tuple[torch.Tensor, float]:
    """Mean [d] and mean square norm of the wanted rows of an array [n, d], in float64."""
    total, squares, at = 0, 0.0, 0
    for table in tables:
        rows = table.shape(name)[0]
        for first in range(0, rows, CHUNK):
            stop = min(first + CHUNK, rows)
            part = torch.from_numpy(wanted[at + first : at + stop])
            acts = widened(table.read(name, first, stop), table.dtype(name))[part].double()
            total = total + acts.sum(0)
            squares += torch.dot(acts.flatten(), acts.flatten()).item()
        at += rows
    return total / int(wanted.sum()), squares / int(wanted.sum())


def _distinct(tables: Sequence[Table], kept: np.ndarray) -> int:
    """Kept positions in distinct texts: a text that occurs again adds nothing."""
    seen, count, at = set(), 0, 0
    for table in tables:
        tokens = table.read("tokens")
        bounds = np.flatnonzero(np.diff(table.read("documents"), prepend=-1, append=-1))
        for first, stop in zip(bounds, bounds[1:]):
            text = hashlib.blake2b(tokens[first:stop].tobytes(), digest_size=16).digest()
            if text not in seen:
                seen.add(text)
                count += int(kept[at + first : at + stop].sum())
        at += len(tokens)
    return count
