"""Latent scaling: does the other model contain a feature that the decoder calls unique?

A crosscoder may give feature j no row in a model although that model has it. Either the sparsity loss has
shrunk the row to nothing and the feature is left in the model's *error* (complete shrinkage), or *other
features* reconstruct it there (latent decoupling). So ask how much of the feature lies in each model m, along
the direction d_j of the model that has the longer row, its owner::

    beta_j^m = argmin_b sum_n || Y_n^m - b f_nj d_j ||^2  =  d_j . (Y^m)^T f_j / (||f_j||^2 ||d_j||^2)

    eps:  Y_n^m = x_n^m - x̂_n^m + f_nj d_j^m     the error, with the feature's own part added back
    r:    Y_n^m = x̂_n^m                          the reconstruction, decoder bias included (as the source has it)

    nu_j = beta_j^(other model) / beta_j^(owner)          near 0: unique to its owner;  near 1: in both alike

All features in one pass. With E = x - x̂ the numerator of eps is  d_j . (E^T F)_j + ||f_j||^2 (d_j^m . d_j);
an entry f_nj > 0 adds f_nj (E_n . d_j) to it. These sums are kept per document, so that a bootstrap over
documents is a weighted sum of rows. In nu the denominators cancel. Everything is in *scaled* space
(``crosscoder.scaled``: every model has mean norm sqrt(d)), where NRN lives too; in raw space nu would carry
the ratio of the models' norms.

In models of unlike widths d_j does not exist in the other one. There nu is NaN, and beside it stands, for
each model, the share of Y^m (eps) that f_j explains with any direction, on the tokens where it fires
(elsewhere it is 0 and explains nothing)::

    R2_j^m = 1 - min_v sum_n || Y_n^m - f_nj v ||^2 / sum_n || Y_n^m ||^2  =  || (Y^m)^T f_j ||^2 / (||f_j||^2
    sum_n || Y_n^m ||^2)

Source: Minder et al. 2025, "Overcoming Sparsity Artifacts in Crosscoders to Interpret Chat-Tuning"
(2504.02922).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from scipy import sparse

from ..activations.store import Store
from ..crosscoder.model import CrossCoder
from ..runs import Progress
from ..settings import UserError, check
from ..stats import group_weights, percentiles

CHUNK = 4_096  # tokens at a time that are encoded
# the source keeps as unique what has nu_eps under 0.2 and nu_r under 0.5
UNIQUE, SHRUNK, DECOUPLED = 0.9, 0.2, 0.5
SUMS = ("eps_own", "eps_other", "r_own", "r_other")  # numerators of beta, per document and feature

# codes [B, F], scaled x [B, d_m] per model, document of each token
Chunk = tuple[sparse.csr_matrix, dict[str, np.ndarray], np.ndarray]


def latent_scaling(
    crosscoder: CrossCoder,
    store: Store,
    rows: np.ndarray,
    of: str = "distilled",
    against: str = "base",
    n_boot: int = 200,
    seed: int = 0,
    unique: float = UNIQUE,
    shrunk: float = SHRUNK,
    decoupled: float = DECOUPLED,
) -> pd.DataFrame:
    """One row per feature, measured on the tokens ``rows`` [n] of the store.

    feature      its number
    side         ``of`` or ``against``: its owner, whose decoder row is the longer one (2-norm, scaled space;
    ``against`` if equal) nu_eps, nu_r the other model's beta over the owner's. NaN where f_j is 0 on all
    these tokens, d_j is 0, or the owner's own beta is
                 not positive (then there is nothing to compare with); and for models of unlike widths
    nu_..._low, nu_..._high    95% interval: ``n_boot`` resamples of documents (percentiles; NaN if ``n_boot``
    is 0) shrinkage    complete shrinkage: the owner's share of the row lengths (NRN, p = 2) is above
    ``unique``, but nu_eps above ``shrunk``
    decoupling   latent decoupling: the same, but nu_r above ``decoupled``
    r2_<model>   only for unlike widths: R2 of the module's text, for each of the two models
    """
    if tuple(crosscoder.names) != tuple(store.models):
        raise UserError(
            f"the crosscoder reads {', '.join(crosscoder.names)}, the store holds {', '.join(store.models)}: "
            "they must be the same models"
        )
    rows = np.asarray(rows)
    directions = {name: crosscoder.rows(name).numpy() for name in (of, against)}
    biases = {name: crosscoder.bias(name).numpy() for name in (of, against)}
    chunks = _encoded(crosscoder, store, rows, (of, against))
    return _scaling(
        chunks, directions, biases, len(rows), of, against, n_boot, seed, (unique, shrunk, decoupled)
    )


def latent_scaling_of(
    codes: sparse.spmatrix,
    x: Mapping[str, np.ndarray],
    directions: Mapping[str, np.ndarray],
    biases: Mapping[str, np.ndarray] | None = None,
    documents: np.ndarray | None = None,
    of: str = "distilled",
    against: str = "base",
    n_boot: int = 200,
    seed: int = 0,
    unique: float = UNIQUE,
    shrunk: float = SHRUNK,
    decoupled: float = DECOUPLED,
) -> pd.DataFrame:
    """``latent_scaling`` of plain matrices: any dictionary, no crosscoder or store needed.

    ``codes`` [n, F]; ``x`` {model: [n, d_m]}, ``directions`` {model: decoder rows [F, d_m]} and ``biases``
    {model: [d_m]} (0 if not given), all in one and the same scaling; ``documents`` [n] (every token its own
    if not given).
    """
    codes = sparse.csr_matrix(codes)
    directions = {name: np.asarray(directions[name], dtype=np.float64) for name in (of, against)}
    biases = {
        name: np.zeros(directions[name].shape[1]) if biases is None else np.asarray(biases[name])
        for name in (of, against)
    }
    shapes = {name: (x[name].shape, directions[name].shape) for name in (of, against)}
    if any(acts != (codes.shape[0], rows[1]) or rows[0] != codes.shape[1] for acts, rows in shapes.values()):
        raise UserError(
            f"codes are {codes.shape}, activations and decoder rows {shapes}: they must be [n, F], [n, d] and"
            " [F, d]"
        )
    documents = np.arange(codes.shape[0]) if documents is None else np.asarray(documents)

    def chunks() -> Iterator[Chunk]:
        for start in range(0, codes.shape[0], CHUNK):
            part = slice(start, start + CHUNK)
            yield codes[part], {name: np.asarray(x[name][part]) for name in (of, against)}, documents[part]

    return _scaling(
        chunks(), directions, biases, codes.shape[0], of, against, n_boot, seed, (unique, shrunk, decoupled)
    )


@torch.no_grad()
def _encoded(crosscoder: CrossCoder, store: Store, rows: np.ndarray, names: Sequence[str]) -> Iterator[Chunk]:
    documents = np.asarray(store.documents)
    for start in range(0, len(rows), CHUNK):
        part = rows[start : start + CHUNK]
        acts = store.activations(part)
        x = dict(zip(crosscoder.names, crosscoder.split(crosscoder.scaled(acts))))
        yield (
            sparse.csr_matrix(crosscoder.encode(acts).numpy()),
            {name: x[name].numpy() for name in names},
            documents[part],
        )


# --- one pass over the data ---------------------------------------------------------------------------------


def _scaling(
    chunks: Iterable[Chunk],
    directions: Mapping[str, np.ndarray],
    biases: Mapping[str, np.ndarray],
    n_tokens: int,
    of: str,
    against: str,
    n_boot: int,
    seed: int,
    cutoffs: tuple[float, float, float],
) -> pd.DataFrame:
    check("n_boot", n_boot, int, low=0)
    for name, cutoff in zip(("unique", "shrunk", "decoupled"), cutoffs):
        check(name, cutoff, float)
    if of == against:
        raise UserError(f"of and against are both {of!r}: a feature is compared between two models")
    if n_tokens == 0:
        raise UserError("no tokens are given: latent scaling needs the rows of at least one document")
    lengths = {name: np.linalg.norm(rows, axis=1) for name, rows in directions.items()}
    owned = lengths[of] > lengths[against]
    with np.errstate(invalid="ignore"):
        # NRN as seen from the owner
        share = np.maximum(lengths[of], lengths[against]) / (lengths[of] + lengths[against])
    frame = pd.DataFrame({"feature": np.arange(len(owned)), "side": np.where(owned, of, against)})
    if directions[of].shape == directions[against].shape:
        nus = _ratios(chunks, directions, biases, owned, n_tokens, of, against, n_boot, seed)
    else:
        nus = {
            f"nu_{form}{end}": np.full(len(owned), np.nan)
            for form in ("eps", "r")
            for end in ("", "_low", "_high")
        }
        nus |= _explained(chunks, directions, biases, n_tokens, of, against)
    unique, shrunk, decoupled = cutoffs
    flags = {
        "shrinkage": (share > unique) & (nus["nu_eps"] > shrunk),
        "decoupling": (share > unique) & (nus["nu_r"] > decoupled),
    }
    return frame.assign(
        **{name: nus[name] for name in nus if name.startswith("nu")},
        **flags,
        **{name: nus[name] for name in nus if name.startswith("r2")},
    )


def _ratios(
    chunks: Iterable[Chunk],
    directions: Mapping[str, np.ndarray],
    biases: Mapping[str, np.ndarray],
    owned: np.ndarray,
    n_tokens: int,
    of: str,
    against: str,
    n_boot: int,
    seed: int,
) -> dict[str, np.ndarray]:
    """nu_eps and nu_r [F] with their intervals, for models of one width."""
    d = np.where(owned[:, None], directions[of], directions[against])
    # rows of the owner and of the other model, feature by feature: what is added back to the error
    within = {model: (rows * d).sum(1, dtype=np.float64) for model, rows in directions.items()}
    entries = []  # (document, feature, one value for each of SUMS) of every chunk, summed within it
    numbers: dict[int, int] = {}  # document: its row in the sums
    for codes, x, documents in _counted(chunks, n_tokens):
        token = np.repeat(np.arange(codes.shape[0]), np.diff(codes.indptr))
        feature, f = codes.indices, codes.data.astype(np.float64)
        eps, r = {}, {}
        for model in (of, against):
            x_hat = codes @ directions[model] + biases[model]
            eps[model] = f * ((x[model] - x_hat) @ d.T)[token, feature] + f * f * within[model][feature]
            r[model] = f * (x_hat @ d.T)[token, feature]
        mine = owned[feature]
        values = [
            np.where(mine, one[of], one[against]) if own else np.where(mine, one[against], one[of])
            for one in (eps, r)
            for own in (True, False)
        ]
        found, index = np.unique(documents, return_inverse=True)
        row = np.array(
            [numbers.setdefault(document, len(numbers)) for document in found.tolist()], dtype=np.int64
        )[index][token]
        key, place = np.unique(row * len(owned) + feature, return_inverse=True)
        entries.append(
            (key // len(owned), key % len(owned), [np.bincount(place, v, len(key)) for v in values])
        )
    row, feature = (np.concatenate([e[i] for e in entries]) for i in (0, 1))
    sums = {
        name: sparse.csr_matrix(
            (np.concatenate([e[2][i] for e in entries]), (row, feature)), shape=(len(numbers), len(owned))
        )
        for i, name in enumerate(SUMS)
    }
    everything = {name: np.asarray(s.sum(0)).ravel() for name, s in sums.items()}
    draws = group_weights(len(numbers), n_boot, seed).astype(float)
    resampled = {name: (s.T @ draws.T).T for name, s in sums.items()} if n_boot else None
    nus = {}
    for form in ("eps", "r"):
        nus[f"nu_{form}"] = _ratio(everything[f"{form}_other"], everything[f"{form}_own"])
        low = high = np.full(len(owned), np.nan)
        if n_boot:
            found = _ratio(resampled[f"{form}_other"], resampled[f"{form}_own"])
            defined = ~np.isnan(nus[f"nu_{form}"])
            low, high = low.copy(), high.copy()
            if defined.any():  # resamples without the feature are left out
                low[defined], high[defined] = percentiles(found[:, defined])
        nus[f"nu_{form}_low"], nus[f"nu_{form}_high"] = low, high
    return nus


def _ratio(other: np.ndarray, own: np.ndarray) -> np.ndarray:
    return np.divide(other, own, out=np.full(own.shape, np.nan), where=own > 0)


def _explained(
    chunks: Iterable[Chunk],
    directions: Mapping[str, np.ndarray],
    biases: Mapping[str, np.ndarray],
    n_tokens: int,
    of: str,
    against: str,
) -> dict[str, np.ndarray]:
    """R2 [F] for each model: for models of unlike widths."""
    # E^T F; ||E||^2 where f_j > 0; ||f_j||^2
    products, errors, squares = {of: 0.0, against: 0.0}, {of: 0.0, against: 0.0}, 0.0
    for codes, x, _ in _counted(chunks, n_tokens):
        fires = (codes > 0).astype(np.float64)
        squares = squares + np.asarray(codes.multiply(codes).sum(0), dtype=np.float64).ravel()
        for model in (of, against):
            error = (x[model] - (codes @ directions[model] + biases[model])).astype(np.float64)
            products[model] = products[model] + codes.T @ error
            errors[model] = errors[model] + fires.T @ np.square(error).sum(1)
    found = {}
    for model in (against, of):
        d = directions[model].astype(np.float64)
        fit = products[model] + squares[:, None] * d
        whole = errors[model] + 2 * (products[model] * d).sum(1) + squares * np.square(d).sum(1)
        found[f"r2_{model}"] = _ratio(np.square(fit).sum(1), squares * whole)
    return found


def _counted(chunks: Iterable[Chunk], n_tokens: int) -> Iterator[Chunk]:
    with Progress("tokens scaled", n_tokens) as progress:
        done = 0
        for chunk in chunks:
            yield chunk
            done += chunk[0].shape[0]
            progress.update(done)
