"""The features of tokens, chunk by chunk: of both models, of one alone, of each slot."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy import sparse
from torch import Tensor
from torch.nn import functional

from ..activations.store import Store
from ..runs import Progress
from ..settings import UserError, check
from .model import CrossCoder

CHUNK = 8_192  # tokens at a time that are encoded


@dataclass(frozen=True)
class SplitCodes:
    """Codes of some tokens of a split: ``codes`` [n, F] sparse float32, ``rows`` [n] their numbers in the
    store, sorted.
    """

    rows: np.ndarray
    codes: sparse.csr_matrix


# --- codes --------------------------------------------------------------------------------------------------


def sample_rows(store: Store, split: str, max_tokens: int | None = None, seed: int = 0) -> np.ndarray:
    """Kept rows of a split, sorted: all, or those of random whole documents, at most ``max_tokens`` (one
    document at least).
    """
    rows = store.rows(split)
    if max_tokens is None or len(rows) <= check("max_tokens", max_tokens, int, low=1):
        return rows
    documents, index, counts = np.unique(store.documents[rows], return_inverse=True, return_counts=True)
    order = np.random.default_rng(seed).permutation(len(documents))
    within = np.cumsum(counts[order]) <= max_tokens
    within[0] = True
    taken = np.zeros(len(documents), dtype=bool)
    taken[order[within]] = True
    return rows[taken[index]]


@torch.no_grad()
def codes(
    crosscoder: CrossCoder,
    store: Store,
    split: str,
    max_tokens: int | None = None,
    seed: int = 0,
    model: str | None = None,
) -> SplitCodes:
    """Features of a split's kept tokens (``sample_rows``), as inference computes them; read from one
    ``model`` alone if named.
    """
    if tuple(crosscoder.names) != tuple(store.models):
        raise UserError(
            f"the crosscoder reads {', '.join(crosscoder.names)}, the store holds {', '.join(store.models)}: "
            "they must be the same models"
        )
    rows = sample_rows(store, split, max_tokens, seed)
    if len(rows) == 0:
        raise UserError(
            f"the store has no tokens in its split {split!r}: harvest more documents (notebook"
            " 01_harvest_activations)"
        )
    parts = []
    with Progress(
        f"tokens encoded, {split}" + (f", from {model} alone" if model else ""), len(rows)
    ) as progress:
        for start in range(0, len(rows), CHUNK):
            acts = store.activations(rows[start : start + CHUNK])
            f = (
                crosscoder.encode(acts)
                if model is None
                else crosscoder.encode_from(model, acts[store.models.index(model)])
            )
            if not torch.isfinite(f).all():
                raise UserError(
                    "features are not finite, so the crosscoder is broken: run notebook 02_train_crosscoder"
                    " again"
                )
            parts.append(sparse.csr_matrix(f.numpy()))
            progress.update(start + len(acts[0]))
    return SplitCodes(rows, sparse.csr_matrix(sparse.vstack(parts)))


@torch.no_grad()
def encoded(
    crosscoder: CrossCoder, store, rows: np.ndarray
) -> Iterator[tuple[np.ndarray, list[Tensor], Tensor]]:
    """Yields (row numbers, RAW activations, f) of consecutive chunks."""
    for start in range(0, len(rows), CHUNK):
        part = rows[start : start + CHUNK]
        acts = [torch.as_tensor(a) for a in store.activations(part)]
        yield part, acts, crosscoder.encode(acts)


def firing_frequency(crosscoder: CrossCoder, store, split: str = "report") -> np.ndarray:
    """Share of a split's kept tokens on which each feature fires, [F]; 0 is dead there."""
    rows = store.rows(split)
    counts = sum((f > 0).sum(0) for _, _, f in encoded(crosscoder, store, rows))
    return (counts.double() / len(rows)).numpy()


@torch.no_grad()
def encoder_share(
    crosscoder: CrossCoder, store: Store, rows: np.ndarray, features: Sequence[int]
) -> dict[str, np.ndarray]:
    """{model: [n, len(features)]}: what each model's activation alone adds to the features' encoder, before
    ReLU and threshold.

    For ranking positions by one model's share: a share is often too small to fire by itself.
    """
    shares = {}
    for name, scale, acts in zip(crosscoder.names, crosscoder.scales.tolist(), store.activations(rows)):
        encoder = crosscoder.W_enc.detach()[list(features), crosscoder.columns(name)]
        shares[name] = (scale * acts @ encoder.T).numpy()
    return shares


# --- reading ------------------------------------------------------------------------------------------------


@torch.no_grad()
def encode_slots(crosscoder: CrossCoder, name: str, acts: Tensor) -> Tensor:
    """f [..., F] with one model's RAW activations [..., d] in every slot, times its own scale. UserError for
    models of unlike width.
    """
    if len(set(crosscoder.widths)) > 1:
        raise UserError(
            f"the models have widths {', '.join(map(str, crosscoder.widths))}: an activation fits the slots"
            ' of the others only where all are alike; read "alone"'
        )
    crosscoder.columns(name)  # an unknown name is an error
    x = acts.to(crosscoder.W_enc.dtype) * float(crosscoder.scales[crosscoder.names.index(name)])
    return crosscoder.gate(
        torch.relu(
            functional.linear(
                torch.cat([x] * len(crosscoder.names), dim=-1), crosscoder.W_enc, crosscoder.b_enc
            )
        )
    )
