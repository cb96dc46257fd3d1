"""The residual stream of texts at one layer, in batches of like length; and models as nnsight sees them.

An nnsight trace saves the output of one decoder layer and stops the forward there (later layers do not run);
where nnsight is not installed, as on a borrowed machine that only trains, hooks do the same.
Texts of like length are batched and padded on the right, which causal attention never sees."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..device import placed
from ..settings import UserError
from .checks import check_architecture
from .decode import context_of
from .pairs import DTYPES, Pair, check_layer, decoder_layers, decoder_path
from .sources import PACKAGE, first_line, is_adapter

if TYPE_CHECKING:
    from nnsight import TransformersModel

NORM_FACTOR = 10.0
BATCH_TOKENS = 8_192
BATCH_COST = 256  # positions: what a further batch costs, in padding that it would have to save
CHUNK = 8_192  # tokens that are held in float64 at a time


class LayerReader:
    """A model and one of its decoder layers, whose output is read through nnsight. With ``more`` layers that
    are read in the same pass, outputs stand side by side, [length, layers x d], in the order of
    ``layers``."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        layer: int | None = None,
        more: Sequence[int] = (),
    ):
        self.model, self.layer = model, check_layer(model, layer)
        self.layers = sorted({self.layer, *(check_layer(model, other) for other in more)})
        self.width = model.config.get_text_config().hidden_size
        self.pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        self.nnsight = wrap(model, tokenizer) if find_spec("nnsight") else None
        self.envoys = [layer_envoys(self.nnsight)[i] for i in self.layers] if self.nnsight else []

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def read(self, token_lists: Sequence[Sequence[int]], side: str = "right") -> list[torch.Tensor]:
        """The residual stream [length, d] of each list of one padded batch, in the model's dtype, where the
        model is."""
        lengths = [len(t) for t in token_lists]
        if (context := context_of(self.model.config)) and max(lengths) > context:
            raise UserError(
                f"a text has {max(lengths)} tokens, and this model's context is {context}: shorten it"
            )
        ids = torch.full((len(lengths), max(lengths)), self.pad)
        spans = [slice(0, n) if side == "right" else slice(max(lengths) - n, None) for n in lengths]
        for i, (tokens, span) in enumerate(zip(token_lists, spans)):
            ids[i, span] = torch.as_tensor(tokens)
        inputs = {"input_ids": ids.to(self.device), "use_cache": False}
        if side == "left":  # padding on the right needs no mask: no token sees what comes after it
            mask = torch.arange(max(lengths)) >= max(lengths) - torch.tensor(lengths)[:, None]
            inputs["attention_mask"] = mask.long().to(self.device)
        outputs = []
        if self.nnsight is None:
            outputs = outputs_of(self.model, self.layers, inputs)
        else:
            with torch.no_grad(), self.nnsight.trace(inputs) as tracer:
                for envoy in self.envoys:
                    outputs.append(envoy.output.save())
                tracer.stop()
        acts_bsd = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
        return [acts_bsd[i, span] for i, span in enumerate(spans)]


class _Stop(Exception):
    """Raised by a hook: the forward ends here."""


@torch.no_grad()
def outputs_of(
    model: PreTrainedModel, layers: Sequence[int], inputs: Mapping[str, torch.Tensor]
) -> list[torch.Tensor]:
    """Outputs of decoder layers, ascending, without nnsight; the forward ends at the last of them."""
    outputs: list[torch.Tensor] = []

    def keep(module, arguments, output) -> None:
        outputs.append(output)
        if len(outputs) == len(layers):
            raise _Stop

    blocks = decoder_layers(model)
    with contextlib.ExitStack() as hooks, contextlib.suppress(_Stop):
        for layer in layers:
            hooks.enter_context(blocks[layer].register_forward_hook(keep))
        model(**inputs)
    return outputs


def cut(model: PreTrainedModel, layers: int) -> PreTrainedModel:
    """The model with its first ``layers`` decoder layers only: enough to read the last of them."""
    del decoder_layers(model)[layers:]
    model.config.get_text_config().num_hidden_layers = layers
    return model


def capture(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    token_lists: Sequence[Sequence[int]],
    layer: int | None = None,
    side: str = "right",
    batch_tokens: int = BATCH_TOKENS,
) -> torch.Tensor:
    """Residual stream of some short texts: float32 [all tokens, d], list after list, position 0 included.
    ``layer`` None is half depth; batches are padded on the ``side`` "right" or "left". The result is on the
    CPU."""
    reader = LayerReader(placed(model), tokenizer, layer)
    return read_all(reader, token_lists, side, batch_tokens)[0].float().cpu()


def read_all(
    reader: LayerReader,
    token_lists: Sequence[Sequence[int]],
    side: str = "right",
    batch_tokens: int = BATCH_TOKENS,
) -> tuple[torch.Tensor, int]:
    """Activations [all tokens, d] in the order of the lists, where the model is, and the number of padded
    positions."""
    starts = np.cumsum([0, *map(len, token_lists)])
    out, padding = None, 0
    for batch in length_batches([len(t) for t in token_lists], batch_tokens):
        acts = reader.read([token_lists[i] for i in batch], side)
        padding += max(map(len, acts)) * len(acts) - sum(map(len, acts))
        if out is None:
            out = acts[0].new_empty(int(starts[-1]), acts[0].shape[-1])
        for i, text in zip(batch, acts):
            out[starts[i] : starts[i + 1]] = text
    if out is None:
        raise UserError("there is nothing to read: give at least one list of tokens")
    return out, padding


def length_batches(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Numbers of documents, like lengths together: at most ``batch_tokens`` a batch with its padding, or one
    document; such that the fewest positions are computed, a batch counting as ``BATCH_COST`` more."""
    lengths = np.asarray(lengths, np.int64)
    order = np.argsort(lengths, kind="stable")[np.count_nonzero(lengths == 0) :]
    best, cut = np.zeros(len(order) + 1, np.int64), np.zeros(len(order) + 1, np.int64)
    # best[stop]: the least cost of the first ``stop`` documents; the last batch begins at cut[stop]
    for stop in range(1, len(order) + 1):
        longest = int(lengths[order[stop - 1]])
        first = max(stop - max(batch_tokens // longest, 1), 0)
        costs = best[first:stop] + (stop - np.arange(first, stop)) * longest + BATCH_COST
        cut[stop] = first + int(costs.argmin())
        best[stop] = costs[cut[stop] - first]
    bounds = [len(order)]
    while bounds[-1]:
        bounds.append(int(cut[bounds[-1]]))
    for stop, first in zip(bounds[-2::-1], bounds[:0:-1]):
        yield order[first:stop].tolist()


def norm_limits(positions: np.ndarray, norms: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Above which norm a token is dropped: ``NORM_FACTOR`` times each model's median over all tokens but the
    first of each text."""
    inner = np.asarray(positions) != 0
    inner = inner if inner.any() else ~inner
    return {m: NORM_FACTOR * float(np.median(np.asarray(n, np.float64)[inner])) for m, n in norms.items()}


def masks(
    positions: np.ndarray, norms: Mapping[str, np.ndarray], limits: Mapping[str, float] | None = None
) -> tuple[np.ndarray, dict[str, int]]:
    """Which tokens are kept [n] bool, and how many are dropped by reason, from positions [n] and each model's
    norms [n]; ``limits`` as of ``norm_limits``. A token that one model drops is dropped from all, and
    ``high_norm`` counts those that ``first`` has not dropped."""
    first = np.asarray(positions) == 0
    limits = norm_limits(positions, norms) if limits is None else limits
    high = {model: ~first & (np.asarray(norm, np.float64) > limits[model]) for model, norm in norms.items()}
    either = np.logical_or.reduce(list(high.values()))
    dropped = {"first": int(first.sum()), "high_norm": int(either.sum())}
    dropped.update({f"high_norm_{model}": int(mask.sum()) for model, mask in high.items()})
    return ~(first | either), dropped


def row_norms(acts: torch.Tensor) -> torch.Tensor:
    """Norm of each row [n, d], taken in float64: float32 [n]."""
    return torch.cat([part.double().norm(dim=1).float() for part in acts.split(CHUNK)])


def wrap(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> TransformersModel:
    """The model as nnsight sees it, in which every module's output can be read and edited. UserError if it
    cannot be studied (``checks``)."""
    from nnsight import TransformersModel

    check_architecture(model, decoder_layers(model), "model")
    # without a device nnsight would move the model to the first GPU, also one that has no room for it
    options = dict(task="text-generation", device=model.device)
    return TransformersModel(model, tokenizer=tokenizer, **options)


def _envoy(model: TransformersModel, module: nn.Module):
    return attrgetter(next(name for name, m in model._module.named_modules() if m is module))(model)


def layer_envoys(model: TransformersModel):
    """The decoder layers as nnsight sees them, whatever the architecture calls them."""
    return attrgetter(decoder_path(model._module))(model)


def embedding_envoy(model: TransformersModel):
    """The embedding of tokens as nnsight sees it."""
    return _envoy(model, model._module.get_input_embeddings())


def head_envoy(model: TransformersModel):
    """The head as nnsight sees it: its input is the normed residual stream, and what the model makes of its
    output (soft caps, scales) gives the logits. In a trace::

        hidden = head.input[rows, columns].float()  # in float32: bfloat16 would round logits to a sixteenth
        head.skip(functional.linear(hidden, head.weight.float(), bias)[None])
        logits = model.output.logits[0].float()  # [positions, vocabulary]

    so that the vocabulary is only unembedded where it is asked for."""
    return _envoy(model, model._module.get_output_embeddings())


def open_models(pair: Pair, names: Sequence[str]) -> dict[str, TransformersModel]:
    """The models as nnsight sees them, each with the tokenizer by which it writes: loaded, or, if the pair's
    are run elsewhere (``pair.remote``), their skeletons without weights.

    NDIF (https://ndif.us) runs models of the hub at the commit that it has loaded. UserError for weights that
    no server has (folders, adapters, packages), and where there is no key for NDIF."""
    if pair.remote:
        return {name: _remote(pair, name) for name in names}
    return {name: wrap(placed(pair.load(name)), pair.tokenizer(name)) for name in names}


def _remote(pair: Pair, name: str) -> TransformersModel:
    from nnsight import CONFIG, TransformersModel

    source = pair.source(name)
    folder = isinstance(source, Path)  # on this machine only
    if is_adapter(source) or (pair.remote != "local" if folder else source.startswith(PACKAGE)):
        raise UserError(
            f"the pair {pair.name!r} is remote, and its {name!r} is {pair.shown(name)}: NDIF runs models of"
            " the hub; take remote out of its entry in the registry, or give org/name"
        )
    if pair.remote != "local" and not CONFIG.API.APIKEY:
        raise UserError(
            f"the pair {pair.name!r} is remote, and there is no key for NDIF: get one at"
            " https://login.ndif.us and set NDIF_API_KEY, or take remote out of its entry in the registry"
        )
    repo, _, revision = str(source).partition("@")
    options = dict(tokenizer=pair.tokenizer(name), task="text-generation", dtype=DTYPES[pair.dtype])
    try:
        return TransformersModel(repo, revision=revision or None, **options)
    except Exception as error:
        raise UserError(
            f"the configuration of the remote model {name!r} cannot be read from {pair.shown(name)}:"
            f" {first_line(error)}"
        ) from None
