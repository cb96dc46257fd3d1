"""The features of tokens, chunk by chunk: the only loop over tokens through a crosscoder.

Features are joint, from the activations of all models as in training (``CrossCoder.encode``), or from one
model (``CrossCoder.encode_from``)."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from ..activations.store import Store
from ..device import the_device
from ..runs import Progress
from ..settings import UserError, check
from .model import CrossCoder

CHUNK = 8_192  # tokens at a time


@dataclass(frozen=True)
class SplitCodes:
    """Features of some tokens: ``codes`` [n, F] float32, ``rows`` [n] their numbers in the store, sorted."""

    rows: np.ndarray
    codes: sparse.csr_matrix


def sample_rows(store: Store, split: str, max_tokens: int | None = None, seed: int = 0) -> np.ndarray:
    """Kept tokens of a split, sorted: all, or those of random whole documents, at most ``max_tokens`` (one
    document at least). UserError if there are none."""
    tokens = store.rows(split)
    if len(tokens) == 0:
        raise UserError(
            f"the store has no tokens in its split {split!r}: harvest more documents (notebook"
            " 01_harvest_activations)"
        )
    if max_tokens is None or len(tokens) <= check("max_tokens", max_tokens, int, low=1):
        return tokens
    documents, index, counts = np.unique(store.documents[tokens], return_inverse=True, return_counts=True)
    order = np.random.default_rng(seed).permutation(len(documents))
    within = np.cumsum(counts[order]) <= max_tokens
    within[0] = True
    taken = np.zeros(len(documents), dtype=bool)
    taken[order[within]] = True
    return tokens[taken[index]]


def check_models(crosscoder: CrossCoder, store: Store) -> None:
    """UserError unless the crosscoder reads the models of the store, in this order."""
    if tuple(crosscoder.names) != tuple(store.models):
        raise UserError(
            f"the crosscoder reads {', '.join(crosscoder.names)}, the store holds {', '.join(store.models)}: "
            "they must be the same models"
        )


def activations(
    store: Store, tokens: np.ndarray, label: str = "", chunk: int = CHUNK, device: str = "cpu"
) -> Iterator[tuple[np.ndarray, list[Tensor]]]:
    """Yields (token numbers, RAW activations [B, d_m] of each model) of chunks; ``label``: of progress."""
    with Progress(label, len(tokens)) if label else contextlib.nullcontext() as progress:
        for start in range(0, len(tokens), chunk):
            part = tokens[start : start + chunk]
            there = {"device": device} if device != "cpu" and isinstance(store, Store) else {}
            yield part, [torch.as_tensor(a).to(device) for a in store.activations(part, **there)]
            if progress:
                progress.update(start + len(part))


@torch.no_grad()
def encoded(
    crosscoder: CrossCoder, store: Store, tokens: np.ndarray, label: str = "", chunk: int = CHUNK
) -> Iterator[tuple[np.ndarray, list[Tensor], Tensor]]:
    """Yields (token numbers, RAW activations, joint features f [B, F]) of consecutive chunks, on the GPU if
    there is one."""
    there = crosscoder.on(the_device())
    for part, acts in activations(store, tokens, label, chunk, the_device()):
        yield part, acts, there.encode(acts)


def encoder(crosscoder: CrossCoder) -> Callable[[Sequence[Tensor]], Tensor]:
    """Gives f [B, F] on the CPU of RAW activations [B, d_m] of each model, computed on the GPU if there is
    one, ``CHUNK`` tokens at a time."""
    device = the_device()
    there = crosscoder.on(device)

    @torch.no_grad()
    def encode(acts: Sequence[Tensor]) -> Tensor:
        chunks = zip(*(a.split(CHUNK) for a in acts))
        parts = [there.encode([a.to(device) for a in chunk]).cpu() for chunk in chunks]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    return encode


def sparse_codes(f: Tensor) -> sparse.csr_matrix:
    """f [B, F] of any device; from a GPU come only the entries that are not 0."""
    if not f.is_cuda:
        return sparse.csr_matrix(f.numpy())
    places = f.nonzero(as_tuple=True)
    values, *places = (part.cpu().numpy() for part in (f[places], *places))
    return sparse.csr_matrix((values, places), shape=f.shape)


@torch.no_grad()
def codes(
    crosscoder: CrossCoder,
    store: Store,
    split: str,
    max_tokens: int | None = None,
    seed: int = 0,
    model: str | None = None,
) -> SplitCodes:
    """Features of a split's kept tokens (``sample_rows``): joint, or from one ``model``."""
    check_models(crosscoder, store)
    tokens, parts = sample_rows(store, split, max_tokens, seed), []
    label = f"tokens encoded, {split}" + (f", from {model} alone" if model else "")
    there = crosscoder.on(the_device())
    for _, acts in activations(store, tokens, label, device=the_device()):
        joint = model is None
        f = there.encode(acts) if joint else there.encode_from(model, acts[store.models.index(model)])
        if not torch.isfinite(f).all():
            raise UserError(
                "features are not finite, so the crosscoder is broken: run notebook 02_train_crosscoder again"
            )
        parts.append(sparse_codes(f))
    return SplitCodes(tokens, sparse.csr_matrix(sparse.vstack(parts)))


def firing_frequency(crosscoder: CrossCoder, store: Store, split: str = "report") -> np.ndarray:
    """Share of a split's kept tokens on which each feature fires, [F]; 0 is dead there."""
    tokens = store.rows(split)
    counts = sum((f > 0).sum(0) for _, _, f in encoded(crosscoder, store, tokens))
    return (counts.double() / len(tokens)).cpu().numpy()


@torch.no_grad()
def encoder_share(
    crosscoder: CrossCoder, store: Store, tokens: np.ndarray, features: Sequence[int]
) -> dict[str, np.ndarray]:
    """{model: [n, len(features)]}: what each model's activation adds to the features' encoder, before ReLU
    and threshold: for ranking positions, as a share is often too small to fire by itself."""
    shares = {}
    for name, scale, acts in zip(crosscoder.names, crosscoder.scales.tolist(), store.activations(tokens)):
        encoder = crosscoder.W_enc.detach()[list(features), crosscoder.columns(name)]
        shares[name] = (scale * acts @ encoder.T).numpy()
    return shares
