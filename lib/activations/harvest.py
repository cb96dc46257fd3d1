"""Harvesting: all models read the same token ids, and the residual stream at one layer goes to disk.

Every model runs on every shard of documents, up to the layer that is read (lib.models.reader). At the end
tokens are masked, which needs medians over everything:

    first      position 0: BOS, or what stands there, is the attention sink (in Qwen 100 median norms)
    padding    never written; counted
    high_norm  norm above 10 times the model's median: massive activations inside a text

A token is dropped if **any** model says so, or the models would be compared on different tokens. A harvest
that was interrupted continues at the next shard and ends with the same bytes; so do any number of jobs that
share the shards out (docs/cluster.md)."""

import contextlib
import hashlib
import json
import math
import shutil
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..device import the_device, to_host
from ..labels import KINDS, LABEL_ARRAYS, LABELS, SPLITS
from ..models.pairs import DTYPES, Pair, layer_of, load_pair
from ..models.reader import BATCH_TOKENS, CHUNK, NORM_FACTOR, LayerReader, cut, masks, read_all, row_norms
from ..runs import (
    MANIFEST,
    Progress,
    Run,
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
from .shuffle import Prefetched, Table, as_stored
from .store import FORMAT, INDEX, Store, file_problem, read_log, sha256

SHARD_TOKENS = 131_072
BEGUN = "harvest.json"  # in the folder of a store: the fingerprint of what is being harvested into it
STALE = 3600  # seconds after which a file that is still being written belongs to a job that died


def open_text(
    name: str,
    tokens: int,
    trace_share: float = 0.5,
    seed: int = 0,
    traces: str = "",
    general: str = "",
    layer: int = -1,
) -> tuple[Pair, Corpus]:
    """A pair of the registry and its text (see ``corpus.build``), or other text (see ``corpus.override``).
    UserError for a ``layer`` (-1: the pair's own) that one of its models does not have."""
    pair = override(load_pair(name), traces, general)
    pair.check_folders()
    layer_of(min(pair.depths), pair.layer if layer < 0 else layer)
    return pair, build(pair, tokens, trace_share=trace_share, seed=seed)


def harvest_activations(
    pair: Pair,
    documents: Corpus | Iterable[Document],
    path: str | Path,
    layer: int | None = None,
    models: Mapping[str, PreTrainedModel] | None = None,
    device: str | None = None,
    **sizes: int,
) -> Store:
    """Read ``documents`` with every model of the pair and write a store to ``path``; returns it, opened.

    Nothing is done if the store is there, whole, and made from the same; what is damaged or missing is made
    anew. ``layer`` overrides the pair's (default: half depth of each model). ``models`` passes loaded models
    by name, with the pair's weights. ``sizes``: ``shard_tokens`` and ``batch_tokens``. Raises UserError for a
    full disk (finished shards stay), for activations that are not finite, and unknown token ids."""
    return harvest_layers(pair, documents, {path: layer}, models, device, **sizes)[0]


def harvest_layers(
    pair: Pair,
    documents: Corpus | Iterable[Document],
    paths: Mapping[str | Path, int | None],
    models: Mapping[str, PreTrainedModel] | None = None,
    device: str | None = None,
    **sizes: int,
) -> list[Store]:
    """``harvest_activations`` of several layers {path of the store: layer}: the models run once for all. The
    stores are those of single harvests."""
    documents = documents if isinstance(documents, Corpus) else list(documents)
    jobs = [job_of(pair, documents, path, layer, **sizes) for path, layer in paths.items()]
    stores = {}
    for job in jobs:
        if is_current(job.path, job.fingerprint):
            with contextlib.suppress(UserError):  # damaged: whole shards are kept below, the others made anew
                stores[job.path] = Store.open(job.path)
    if left := [job for job in jobs if job.path not in stores]:
        if isinstance(documents, Corpus):
            documents.check_budget()
        with contextlib.ExitStack() as locks:
            for job in left:
                job.path.mkdir(parents=True, exist_ok=True)
                locks.enter_context(exclusive(job.path, "harvesting"))
                _check_room(job)
                _claim(job, anew=True)
            for job, shards in zip(left, _make(left, range(sys.maxsize), models, device)):
                stores[job.path] = _finish(job, shards)
    return [stores[job.path] for job in jobs]


def harvest_run(
    run: Run,
    pair: Pair,
    documents: Corpus,
    layer: int | None = None,
    upper: bool = False,
    models: Mapping[str, PreTrainedModel] | None = None,
) -> Store:
    """The run's store (``harvest_activations``); with ``upper`` also that of the layer before the last block,
    in the run's folder ``store_upper``, where models have one (``upper_layer``). Otherwise there is none."""
    paths = layers_of(run.path("store"), pair, layer, upper)
    if len(paths) == 1:
        shutil.rmtree(run.path("store_upper"), ignore_errors=True)
    return harvest_layers(pair, documents, paths, models)[0]


def layers_of(
    path: Path, pair: Pair, layer: int | None = None, upper: bool = False
) -> dict[Path, int | None]:
    """{path of a store: layer} of a run: its store's, and that of the upper layer beside it, if wanted."""
    above = upper_layer(pair, layer) if upper else None
    return {path: layer} | ({} if above is None else {path.with_name(f"{path.name}_upper"): above})


def upper_layer(pair: Pair, layer: int | None = None) -> int | None:
    """Index of the decoder layer before the last block, where what comes next is nearly decided; None if the
    models differ in depth, or ``layer`` (None: the pair's own) is not below it."""
    depths = set(pair.depths)
    depth = depths.pop()
    layer = pair.layer if layer is None else layer
    read = layer_of(depth) if layer is None else layer
    return depth - 2 if not depths and read < depth - 2 else None


def harvest_part(
    pair: Pair,
    documents: Corpus | Iterable[Document],
    path: str | Path | Mapping[Path, int | None],
    part: tuple[int, int],
    layer: int | None = None,
    models: Mapping[str, PreTrainedModel] | None = None,
    device: str | None = None,
    **sizes: int,
) -> int:
    """Write part i of n, ``part`` = (i, n) with i from 0, of the shards of a harvest; returns how many shards
    the part has.

    Jobs for parts may run in any order or at once, wherever the folder can be seen; ``merge_parts`` makes
    their shards a store. Whole shards are not made again. ``path``: of the store, or {path: layer} of
    several. Other parameters and errors as in ``harvest_activations``; UserError if the folder holds a
    harvest of something else."""
    paths = path if isinstance(path, Mapping) else {path: layer}
    jobs = [job_of(pair, documents, path, layer, **sizes) for path, layer in paths.items()]
    numbers = _part(jobs[0], *part)
    for job in jobs:
        _claim(job)
        _check_room(job)
    return len(_make(jobs, numbers, models, device)[0])


def merge_parts(
    pair: Pair,
    documents: Corpus | Iterable[Document],
    path: str | Path,
    layer: int | None = None,
    **sizes: int,
) -> Store:
    """Write masks, statistics and manifest over the shards of all parts: the store of
    ``harvest_activations``, whose parameters these are.

    No model runs, but the text is gone through, to know which shards there must be. UserError names those
    that are missing or damaged; their parts, run again, make just these anew."""
    job = job_of(pair, documents, path, layer, **sizes)
    _claim(job)
    with ThreadPoolExecutor() as pool:  # checksums of several files at once
        log = _logged(job.path)
        plan = {name: (log.get(name), tokens) for _, name, tokens, _, _ in shards_of(job)}
        problems = list(pool.map(lambda name: _problem(job.path / name, *plan[name]), plan))
    if bad := [f"{name} is {problem}" for name, problem in zip(plan, problems) if problem]:
        more = f" and {len(bad) - 10} more" if len(bad) > 10 else ""
        raise UserError(
            f"{len(bad)} of {len(plan)} shards are not as they must be ({', '.join(bad[:10])}{more}): run"
            " their parts again"
        )
    _check_room(job)
    return _finish(job, {name: entry for name, (entry, _) in plan.items()})


@dataclass(frozen=True)
class Job:
    """What is read and where it goes. ``content``: all that decides the store, as plain data."""

    pair: Pair
    corpus: Corpus | list[Document]
    tokenizer: PreTrainedTokenizerBase
    path: Path
    content: dict
    fingerprint: str
    tokens: int  # expected; BOS is not counted, if the corpus is one


def job_of(
    pair: Pair,
    documents: Corpus | Iterable[Document],
    path: str | Path,
    layer: int | None = None,
    shard_tokens: int = SHARD_TOKENS,
    batch_tokens: int = BATCH_TOKENS,
) -> Job:
    check("shard_tokens", shard_tokens, int, low=1)
    check("batch_tokens", batch_tokens, int, low=1)
    layer = pair.layer if layer is None else layer
    models = {}
    for name in pair.models:
        config = pair.config(name).get_text_config()
        depth = config.num_hidden_layers
        models[name] = {
            "fingerprint": pair.fingerprint(name),
            "width": config.hidden_size,
            "layer": layer_of(depth, layer),
            "layers": depth,
            "vocabulary": config.vocab_size,
        }
    if isinstance(documents, Corpus):
        corpus, tokenizer, tokens = documents, documents.tokenizer, documents.tokens
        text = {**corpus.parameters, "fingerprint": corpus.fingerprint}
        if not isinstance(text["source"], str):
            text["source"] = [Path(source).name for source, _ in text["source"]]
    else:
        corpus, tokenizer = list(documents), pair.tokenizer()
        tokens = sum(len(d.tokens) for d in corpus)
        arrays = [np.concatenate([np.empty(0, np.int64), *(d.tokens for d in corpus)])]
        for name in LABEL_ARRAYS:
            arrays.append(np.concatenate([np.empty(0, np.int8), *(d.labels[name] for d in corpus)]))
        facts = [[len(d.tokens), d.kind, d.split] for d in corpus]
        text = {"source": "documents", "fingerprint": fingerprint(arrays, facts)}
    content = {
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
    return Job(pair, corpus, tokenizer, Path(path), content, fingerprint(content), tokens)


# --- the folder, in which several jobs may be at work -------------------------------------------------------


def _claim(job: Job, anew: bool = False) -> None:
    """The folder is for this harvest from now on; what is there of another one is removed, if ``anew``, or
    else a UserError: other jobs may be at work."""
    job.path.mkdir(parents=True, exist_ok=True)
    file = job.path / BEGUN
    if anew:
        (job.path / MANIFEST).unlink(missing_ok=True)
        if not file.is_file() or file.read_text(encoding="utf-8").strip() != job.fingerprint:
            for pattern in ("shard_*", ".shard_*", "log*.json*", INDEX, BEGUN):  # BEGUN last
                for old in job.path.glob(pattern):
                    old.unlink(missing_ok=True)
    if not file.is_file():
        write_text(file, job.fingerprint + "\n")
    if (begun := file.read_text(encoding="utf-8").strip()) != job.fingerprint:
        raise UserError(
            f"{job.path.name} holds the harvest of something else (fingerprint {begun}, this one is"
            f" {job.fingerprint}): give all jobs the same pair, weights, corpus, layer and sizes, or remove"
            " the folder"
        )


def _part(job: Job, i: int, n: int) -> range:
    """Numbers of the shards of part i of n. The last part has no end: how many shards there are turns out at
    the end of the text."""
    check("number of parts", n, int, low=1)
    check("part", i, int, low=0, high=n - 1)
    expected = math.ceil(job.tokens / job.content["shard_tokens"])
    return range(i * expected // n, (i + 1) * expected // n if i < n - 1 else sys.maxsize)


def _logged(path: Path) -> dict[str, dict]:
    """{shard: its line of the log}, from log.jsonl and from the files of single shards."""
    single = (json.loads(file.read_text(encoding="utf-8")) for file in sorted(path.glob("log_*.json")))
    return read_log(path) | {entry["shard"]: entry for entry in single}


def _problem(file: Path, entry: dict | None, tokens: int) -> str | None:
    """What is wrong with a shard that must have so many tokens; None if nothing is."""
    if entry is None or entry["tokens"] != tokens:
        return "damaged" if file.is_file() else "missing"
    return file_problem(file, entry)


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
    jobs: Sequence[Job], numbers: range, models: Mapping[str, PreTrainedModel] | None, device: str | None
) -> list[dict[str, dict]]:
    """Make those shards of these numbers that are not there and whole, for each job (they differ in their
    layer and folder alone) {shard: its line of the log}. While one is written, the next is computed."""
    readers: dict[str, LayerReader] = {}  # models are loaded when the first shard needs them
    writing: Future | None = None
    logs, shards, done = [_logged(job.path) for job in jobs], [{} for _ in jobs], 0
    with contextlib.ExitStack() as stack:
        progress = stack.enter_context(Progress("tokens harvested", jobs[0].tokens))
        writer = stack.enter_context(ThreadPoolExecutor(1))
        began = time.monotonic()
        texts = stack.enter_context(Prefetched(shards_of(jobs[0]), 1))  # read and tokenized by a thread
        for number, name, tokens, first, group in texts:
            if number >= numbers.stop:
                break
            if number < numbers.start:
                continue
            raw = None
            for job, log, own in zip(jobs, logs, shards):
                if _problem(job.path / name, log.get(name), tokens) is None:
                    own[name] = log[name]
                    continue
                readers = readers or readers_of(jobs, models, device)
                raw = raw or _read(job, readers, [d.tokens for d in group])
                tensors = _shard(job, group, first, readers, raw[0])
                facts = {"tokens": tokens, "documents": len(group), "padding": raw[1]}
                facts["seconds"] = round(time.monotonic() - began, 3)
                if writing:  # one shard at most, or memory would fill up
                    writing.result()
                writing = own[name] = writer.submit(_write_shard, job.path, name, tensors, facts)
                began = time.monotonic()
            done += tokens
            progress.update(min(done, jobs[0].tokens), f"{number - numbers.start + 1} shards")
    written = lambda line: line.result() if isinstance(line, Future) else line
    return [{name: written(line) for name, line in own.items()} for own in shards]


def shards_of(job: Job) -> Iterator[tuple[int, str, int, int, list[Document]]]:
    """(number, name, tokens, number of the first document, documents) of each shard."""
    for number, (first, group) in enumerate(groups(job.corpus, job.content["shard_tokens"])):
        yield number, f"shard_{number:05d}.safetensors", sum(len(d.tokens) for d in group), first, group


def groups(corpus: Iterable[Document], shard_tokens: int) -> Iterator[tuple[int, list[Document]]]:
    """(number of the first document, documents) of each shard: whole documents, at least ``shard_tokens``."""
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
    jobs: Sequence[Job], models: Mapping[str, PreTrainedModel] | None, device: str | None
) -> dict[str, LayerReader]:
    """A reader for each model, of the layers of all jobs."""
    device, pair, readers = the_device(device), jobs[0].pair, {}
    for name in pair.models:
        layers = [job.content["models"][name]["layer"] for job in jobs]
        # of a model that nobody else uses, the layers above are not kept: half of it
        model = models[name] if models else cut(pair.load(name), max(layers) + 1)
        readers[name] = LayerReader(model.to(device), jobs[0].tokenizer, layers[0], layers[1:])
    return readers


def _shard(
    job: Job,
    group: list[Document],
    first: int,
    readers: Mapping[str, LayerReader],
    raw: Mapping[str, torch.Tensor],
) -> dict[str, torch.Tensor]:
    """All that a shard holds, by name."""
    lengths = np.array([len(d.tokens) for d in group])
    numbers, splits = np.arange(first, first + len(group)), [SPLITS.index(d.split) for d in group]
    arrays = {
        "tokens": np.concatenate([d.tokens for d in group]).astype(np.int32),
        "documents": np.repeat(numbers, lengths).astype(np.int32),
        "positions": np.concatenate([np.arange(n, dtype=np.int32) for n in lengths]),
        "split": np.repeat(splits, lengths).astype(np.int8),
        **{label: np.concatenate([d.labels[label] for d in group]) for label in LABEL_ARRAYS},
    }
    tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
    acts, norms = _stored(job, readers, raw, first)
    tensors |= {f"acts_{m}": a for m, a in acts.items()} | {f"norm_{m}": n for m, n in norms.items()}
    return {name: to_host(tensor) for name, tensor in tensors.items()}


def read_models(
    job: Job, readers: Mapping[str, LayerReader], token_lists: Sequence[Sequence[int]], first: int = 0
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], int]:
    """{model: activations [tokens, d] in the dtype of a store}, {model: norms [tokens]}, padded positions;
    where the models are.

    UserError for unknown token ids, and activations that are not finite in documents from ``first`` on."""
    raw, padding = _read(job, readers, token_lists)
    return *_stored(job, readers, raw, first), padding


def _read(
    job: Job, readers: Mapping[str, LayerReader], token_lists: Sequence[Sequence[int]]
) -> tuple[dict[str, torch.Tensor], int]:
    """({model: what its reader gives, [tokens, layers x d]}, padded positions)."""
    highest, raw, padding = max(map(max, token_lists)), {}, 0
    for model, reader in readers.items():
        vocabulary = reader.model.get_input_embeddings().num_embeddings
        if highest >= vocabulary:
            raise UserError(
                f"the corpus has token id {highest}, model {model!r} has {vocabulary} ids: the tokenizer must"
                " fit every model"
            )
        raw[model], padding = read_all(reader, token_lists, batch_tokens=job.content["batch_tokens"])
    return raw, padding


def _stored(
    job: Job, readers: Mapping[str, LayerReader], read: Mapping[str, torch.Tensor], first: int
) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(activations at the job's layer in the dtype of a store, their norms) by model."""
    acts, norms, store_dtype = {}, {}, job.pair.store_dtype
    for model, reader in readers.items():
        layer = job.content["models"][model]["layer"]
        raw = read[model].tensor_split(len(reader.layers), dim=1)[reader.layers.index(layer)]
        acts[model] = raw.to(DTYPES[store_dtype])
        norms[model] = row_norms(acts[model])
        if not torch.isfinite(acts[model]).all():
            if share := 1 - torch.isfinite(raw).all(dim=1).double().mean().item():
                raise UserError(
                    f"activations of {model!r} at layer {layer} are not finite in {share:.2%} of the"
                    f" tokens from document {first} on: check the weights, or load the models in float32 or"
                    " bfloat16 (dtype of the pair)"
                )
            raise UserError(
                f"activations of {model!r} reach {raw.abs().max().item():.0f}, which {store_dtype} cannot"
                " hold: set store_dtype of the pair to bfloat16"
            )
    return acts, norms


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


def _finish(job: Job, shards: dict[str, dict]) -> Store:
    """Draw the masks, take the statistics over kept train tokens in float64, write the index and, last, the
    manifest; the store. Some 50 bytes per token are in memory, activations some thousand rows at a time."""
    if not shards:
        raise UserError("there are no documents to harvest: give a corpus of at least one")
    for stray in set(job.path.glob("shard_*")) - {job.path / name for name in shards}:
        stray.unlink()
    for dead in job.path.glob(".shard_*"):
        if time.time() - dead.stat().st_mtime > STALE:
            dead.unlink()
    tables = [Table(job.path / name) for name in shards]

    def joined(name: str) -> np.ndarray:
        return np.concatenate([table.read(name) for table in tables])

    def kept_by(array: str, names: Sequence[str]) -> dict[str, int]:
        values = joined(array)
        return {name: int((kept & (values == i)).sum()) for i, name in enumerate(names)}

    norms = {m: joined(f"norm_{m}") for m in job.content["models"]}
    kept, dropped = masks(joined("positions"), norms)
    train = kept & (joined("split") == SPLITS.index("train"))
    if not train.any():
        raise UserError(
            f"no token of the train split is left by the masks (dropped: {dropped}): harvest more text"
        )
    index, statistics = {"kept": torch.from_numpy(kept)}, {}
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
            "tokens": int(train.sum()),
        }
    counts = {
        "tokens": len(kept),
        "kept": int(kept.sum()),
        "documents": sum(e["documents"] for e in shards.values()),
        "distinct_tokens": _distinct(joined("tokens"), joined("documents"), kept),
        "kept_by_split": kept_by("split", SPLITS),
        "kept_by_kind": kept_by("kind", KINDS),
        "kept_by_label": kept_by("label", LABELS),
        "dropped": {**dropped, "padding": sum(e["padding"] for e in shards.values())},
    }
    info = {**job.content, "counts": counts, "statistics": statistics}
    facts = ("bytes", "sha256", "tokens", "documents")
    info["shards"] = {name: {fact: e[fact] for fact in facts} for name, e in shards.items()}
    info["index"] = _save_whole(index, job.path / INDEX)
    write_text(job.path / "log.jsonl", "".join(json.dumps(e) + "\n" for e in shards.values()))
    for file in job.path.glob("log_*.json"):
        file.unlink(missing_ok=True)
    write_manifest(job.path, job.fingerprint, **info, versions=versions())
    return Store.open(job.path, verify=False)


def _moments(tables: Sequence[Table], name: str, wanted: np.ndarray) -> tuple[torch.Tensor, float]:
    """Mean [d] and mean square norm of the wanted rows of an array [n, d], in float64."""
    total, squares, at, device = 0, 0.0, 0, the_device()
    for table in tables:
        rows = table.shape(name)[0]
        for first in range(0, rows, CHUNK):
            stop = min(first + CHUNK, rows)
            part = torch.from_numpy(wanted[at + first : at + stop])
            acts = as_stored(table.read(name, first, stop), table.dtype(name)).to(device)
            acts = acts[part.to(device)].double()
            total = total + acts.sum(0)
            squares += torch.dot(acts.flatten(), acts.flatten()).item()
        at += rows
    return total.cpu() / int(wanted.sum()), squares / int(wanted.sum())


def _distinct(tokens: np.ndarray, documents: np.ndarray, kept: np.ndarray) -> int:
    """Kept positions in distinct texts: a text that occurs again adds nothing."""
    texts: dict[bytes, int] = {}
    for first, stop in pairwise(np.flatnonzero(np.diff(documents, prepend=-1, append=-1))):
        text = hashlib.blake2b(tokens[first:stop].tobytes(), digest_size=16).digest()
        texts.setdefault(text, int(kept[first:stop].sum()))
    return sum(texts.values())
