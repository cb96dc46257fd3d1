"""Latent scaling: does the other model contain a feature that the decoder calls unique?

A crosscoder may give feature j no row in a model although that model has it. Either the sparsity loss has
shrunk the row to nothing and the feature is left in the model's *error* (complete shrinkage), or *other
features* reconstruct it there (latent decoupling). So ask how much of the feature lies in each model m, along
the direction d_j of the model that has the longer row, its owner::

    beta_j^m = argmin_b sum_n || Y_n^m - b f_nj d_j ||^2  =  d_j . (Y^m)^T f_j / (||f_j||^2 ||d_j||^2)

    eps:  Y_n^m = x_n^m - x̂_n^m + f_nj d_j^m     the error, with the feature's own part added back
    r:    Y_n^m = x̂_n^m                          the reconstruction, decoder bias included (as in the source)

    nu_j = beta_j^(other model) / beta_j^(owner)          near 0: unique to its owner;  near 1: in both alike

All features in one pass. With E = x - x̂ the numerator of eps is  d_j . (E^T F)_j + ||f_j||^2 (d_j^m . d_j);
an entry f_nj > 0 adds f_nj (E_n . d_j) to it. These sums are kept per document, so that a bootstrap over
documents is a weighted sum of rows. In nu the denominators cancel. Everything is in *scaled* space
(``crosscoder.scaled``), where NRN lives too; in raw space nu would carry the ratio of the models' norms.

In models of unlike widths d_j does not exist in the other one. There nu is NaN, and beside it stands, for
each model, the share of Y^m (eps) that f_j explains with any direction, on the tokens where it fires::

    R2_j^m = 1 - min_v sum_n || Y_n^m - f_nj v ||^2 / sum_n || Y_n^m ||^2
           = || (Y^m)^T f_j ||^2 / (||f_j||^2 sum_n || Y_n^m ||^2)

Source: Minder et al. 2025, "Overcoming Sparsity Artifacts in Crosscoders to Interpret Chat-Tuning"
(2504.02922)."""

from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np
import pandas as pd
import torch
from scipy import sparse

from ..activations.store import Store
from ..crosscoder.codes import check_models, encoded, sparse_codes
from ..crosscoder.model import CrossCoder
from ..device import the_device
from ..settings import UserError, check
from ..stats import group_weights, percentiles, ratio

CHUNK = 4_096  # tokens at a time that are encoded
# the source keeps as unique what has nu_eps under 0.2 and nu_r under 0.5
UNIQUE, SHRUNK, DECOUPLED = 0.9, 0.2, 0.5
SUMS = ("eps_own", "eps_other", "r_own", "r_other")  # numerators of beta, per document and feature

# codes [B, F], scaled x [B, d_m] per model, document of each token
Chunk = tuple[sparse.csr_matrix, dict[str, np.ndarray], np.ndarray]
Decoders = Mapping[str, tuple[np.ndarray, np.ndarray]]  # {model: (rows [F, d_m], bias [d_m])}


def latent_scaling(
    crosscoder: CrossCoder,
    store: Store,
    rows: np.ndarray,
    model: str = "distilled",
    reference: str = "base",
    n_boot: int = 200,
    seed: int = 0,
) -> pd.DataFrame:
    """One row per feature, measured on the tokens ``rows`` [n] of the store.

    feature         its number
    side            ``model`` or ``reference``: its owner, whose decoder row is the longer one (2-norm, scaled
                    space; ``reference`` if equal)
    nu_eps, nu_r    the other model's beta over the owner's. NaN where f_j is 0 on all these tokens, d_j is 0,
                    or the owner's own beta is not positive (then there is nothing to compare with); and for
                    models of unlike widths
    nu_..._low, nu_..._high    95% interval: ``n_boot`` resamples of documents (NaN if ``n_boot`` is 0)
    shrinkage       complete shrinkage: the owner's share of the row lengths is over 0.9, but nu_eps over 0.2
    decoupling      latent decoupling: the same, but nu_r over 0.5
    r2_<model>      only for unlike widths: R2 of the module's text, for each of the two models
    """
    check_models(crosscoder, store)
    if model == reference:
        raise UserError(f"model and reference are both {model!r}: a feature is compared between two models")
    rows = np.asarray(rows)
    if len(rows) == 0:
        raise UserError("no tokens are given: latent scaling needs the rows of at least one document")
    decoders = {m: (crosscoder.rows(m).numpy(), crosscoder.bias(m).numpy()) for m in (reference, model)}

    def chunks() -> Iterator[Chunk]:
        for part, acts, f in encoded(crosscoder, store, rows, "tokens scaled", CHUNK):
            x = dict(zip(crosscoder.names, crosscoder.split(crosscoder.scaled(acts))))
            documents = np.asarray(store.documents)[part]
            yield sparse_codes(f), {m: x[m].cpu().numpy() for m in decoders}, documents

    return scaling(chunks(), decoders, n_boot, seed)


def scaling(chunks: Iterable[Chunk], decoders: Decoders, n_boot: int = 200, seed: int = 0) -> pd.DataFrame:
    """``latent_scaling`` of ``chunks`` of tokens, of any two dictionaries: no crosscoder or store is needed.
    ``decoders``: of the reference and of the model, in this order, in the same scaling as x."""
    check("n_boot", n_boot, int, low=0)
    reference, model = decoders
    lengths = {name: np.linalg.norm(rows, axis=1) for name, (rows, _) in decoders.items()}
    owned = lengths[model] > lengths[reference]
    with np.errstate(invalid="ignore"):
        longer = np.maximum(lengths[model], lengths[reference])
        one_sided = longer / (lengths[model] + lengths[reference]) > UNIQUE  # NRN as seen from the owner
    columns, shares = {"feature": np.arange(len(owned)), "side": np.where(owned, model, reference)}, {}
    if decoders[model][0].shape == decoders[reference][0].shape:
        columns |= _ratios(chunks, decoders, owned, n_boot, seed)
    else:
        names = (f"nu_{form}{end}" for form in ("eps", "r") for end in ("", "_low", "_high"))
        columns |= {name: np.full(len(owned), np.nan) for name in names}
        shares = _explained(chunks, decoders)
    columns["shrinkage"] = one_sided & (columns["nu_eps"] > SHRUNK)
    columns["decoupling"] = one_sided & (columns["nu_r"] > DECOUPLED)
    return pd.DataFrame(columns | shares)


def _ratios(
    chunks: Iterable[Chunk], decoders: Decoders, owned: np.ndarray, n_boot: int, seed: int
) -> dict[str, np.ndarray]:
    """nu_eps and nu_r [F] with their intervals, for models of one width. ``owned`` [F]: by the model."""
    reference, model = decoders
    d = np.where(owned[:, None], decoders[model][0], decoders[reference][0])
    # rows of the owner and of the other model, feature by feature: what is added back to the error
    within = {name: (rows * d).sum(1, dtype=np.float64) for name, (rows, _) in decoders.items()}
    products = _products(d)
    entries = []  # (document, feature, one value for each of SUMS) of every chunk, summed within it
    numbers: dict[int, int] = {}  # document: its row in the sums
    for codes, x, documents in chunks:
        token = np.repeat(np.arange(codes.shape[0]), np.diff(codes.indptr))
        feature, f = codes.indices, codes.data.astype(np.float64)
        eps, r = {}, {}
        for name, (rows, bias) in decoders.items():
            x_hat = codes @ rows + bias
            eps[name] = f * products(x[name] - x_hat, token, feature) + f * f * within[name][feature]
            r[name] = f * products(x_hat, token, feature)
        values = []
        for form in (eps, r):
            for own in (True, False):
                values.append(np.where(owned[feature] == own, form[model], form[reference]))
        row = np.array([numbers.setdefault(document, len(numbers)) for document in documents.tolist()])
        key, place = np.unique(row[token] * len(owned) + feature, return_inverse=True)
        summed = (np.bincount(place, v, len(key)) for v in values)
        entries.append((key // len(owned), key % len(owned), *summed))
    row, feature, *values = map(np.concatenate, zip(*entries))
    shape = len(numbers), len(owned)
    sums = {name: sparse.csr_matrix((v, (row, feature)), shape=shape) for name, v in zip(SUMS, values)}
    weights = group_weights(len(numbers), n_boot, seed).astype(float) if n_boot else None
    nus = {}
    for form in ("eps", "r"):
        other, own = sums[f"{form}_other"], sums[f"{form}_own"]
        nu = ratio(np.asarray(other.sum(0)).ravel(), np.asarray(own.sum(0)).ravel())
        low, high = np.full((2, len(owned)), np.nan)
        if n_boot:  # resamples without the feature are left out
            ends = percentiles(ratio((other.T @ weights.T).T, (own.T @ weights.T).T))
            low, high = np.where(np.isnan(nu), np.nan, ends)
        nus |= {f"nu_{form}": nu, f"nu_{form}_low": low, f"nu_{form}_high": high}
    return nus


def _products(d: np.ndarray, device: str | None = None) -> Callable[..., np.ndarray]:
    """Gives a_n . d_j [entries] of vectors a [n, width] at entries (n, j): on the GPU if there is one."""
    device = device or the_device()
    if device == "cpu":
        return lambda a, n, j: (a @ d.T)[n, j]
    there = torch.from_numpy(d).to(device)

    def products(a: np.ndarray, n: np.ndarray, j: np.ndarray) -> np.ndarray:
        dense = torch.from_numpy(a).to(there) @ there.T
        places = (torch.from_numpy(places).to(device, torch.int64) for places in (n, j))
        return dense[tuple(places)].cpu().numpy()

    return products


def _explained(chunks: Iterable[Chunk], decoders: Decoders) -> dict[str, np.ndarray]:
    """R2 [F] for each model: for models of unlike widths."""
    # E^T F; ||E||^2 where f_j > 0; ||f_j||^2
    products, errors, squares = dict.fromkeys(decoders, 0.0), dict.fromkeys(decoders, 0.0), 0.0
    for codes, x, _ in chunks:
        fires = (codes > 0).astype(np.float64)
        squares = squares + np.asarray(codes.multiply(codes).sum(0), dtype=np.float64).ravel()
        for name, (rows, bias) in decoders.items():
            error = (x[name] - (codes @ rows + bias)).astype(np.float64)
            products[name] = products[name] + codes.T @ error
            errors[name] = errors[name] + fires.T @ np.square(error).sum(1)
    shares = {}
    for name, (rows, _) in decoders.items():
        d = rows.astype(np.float64)
        fit = products[name] + squares[:, None] * d
        total = errors[name] + 2 * (products[name] * d).sum(1) + squares * np.square(d).sum(1)
        shares[f"r2_{name}"] = ratio(np.square(fit).sum(1), squares * total)
    return shares
