"""Finders that train a dictionary: sparse autoencoders of the base and of the difference, and crosscoders
whose features are ranked by NRN, by latent scaling, by change of use, or by attribution."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from scipy import sparse

from ..crosscoder.codes import encoded
from ..crosscoder.model import CrossCoder
from ..features.latent_scaling import latent_scaling
from ..features.use import JOINT, SoloCodes, solo_codes, use_table
from ..steering.ablation import attribution
from ..study.architectures import match_l1
from .claims import SIDES, Claims
from .dictionary import Bridge, Delta, View, features, strengths, trained
from .finder import Data, finder, sided

DEDICATED = 0.125  # share of the dictionary that is reserved for each model


def by_nrn(data: Data, crosscoder: CrossCoder) -> Claims:
    """Confidence 2 |NRN - 1/2| (p = 2)."""
    nrn = crosscoder.nrn(2, *data.store.models[::-1]).numpy()
    return features(data, crosscoder, nrn > 0.5, 2 * np.abs(nrn - 0.5))


def by_change(data: Data, solo: SoloCodes) -> tuple[np.ndarray, np.ndarray]:
    """(does the second model use the feature more? [F], confidence 1 - exp(-|change of use|) [F])."""
    base, other = data.store.models
    change = use_table(solo, n_boot=1, model=other, reference=base)["change"].to_numpy()
    return change > 0, 1 - np.exp(-np.abs(change))


@finder("SAE of the base", "a sparse autoencoder of the base, read on both models; change of use")
def base_sae(data: Data) -> Claims:
    base, other = data.store.models
    view = View(data.store, "base", (1, 0))
    sae, codes = trained(data, "sae_base", view), {}
    with torch.no_grad():
        for name, x in zip((base, other), data.scaled(data.chosen)):
            codes[name] = sparse.csr_matrix(sae.encode([x]).numpy())
    solo = SoloCodes(data.chosen, data.store.documents[data.chosen], codes | {JOINT: codes[base]})
    second, confidence = by_change(data, solo)
    mass = sum(np.asarray(c.sum(0)).ravel() for c in codes.values()) * sae.strength_per_unit().numpy()
    order = np.argsort(-mass, kind="stable")[: int((mass > 0).sum())]
    rows = data.raw(sae.rows("base")[torch.from_numpy(order)])
    return Claims.of(*rows, np.array(SIDES, dtype=object)[second.astype(int)][order], confidence[order])


@finder("diff-SAE", "a sparse autoencoder of x_d - x_b; how much of a feature is in one model alone")
def diff_sae(data: Data) -> Claims:
    view = View(data.store, "difference", (-1, 1))
    sae = trained(data, "sae_difference", view)
    f = torch.cat([f for _, _, f in encoded(sae, view, data.chosen)])
    strength = strengths(sae, view, data.chosen)
    alive = torch.from_numpy(strength > 0)
    return sided(data, data.chosen, sae.rows("difference")[alive], f[:, alive], strength[strength > 0])


@finder("L1 crosscoder, NRN", "lambda at which it has the L0 of the others")
def l1_nrn(data: Data) -> Claims:
    first, folder = replace(data.config, seed=0), data.folder.parent / "match_l1"  # one lambda for all seeds
    weight, _ = match_l1(data.store, first.k, first, folder, tolerance=0.25, most=5)
    return by_nrn(data, trained(data, "l1", variant="l1", precision="float32", l1=weight))


@finder("BatchTopK crosscoder, NRN", "the crosscoder of notebook 02")
def batchtopk_nrn(data: Data) -> Claims:
    return by_nrn(data, trained(data, "batchtopk"))


@finder("random features", "a control: features of the same crosscoder in a random order, with a random side")
def random_features(data: Data) -> Claims:
    crosscoder, rng = trained(data, "batchtopk"), np.random.default_rng(data.config.seed)
    second, confidence = rng.random((2, crosscoder.n_features))
    return features(data, crosscoder, second > 0.5, confidence)


@finder("dedicated crosscoder, NRN", "an eighth of its features reserved for each model")
def dedicated_nrn(data: Data) -> Claims:
    return by_nrn(data, trained(data, "dedicated", dedicated=DEDICATED))


@finder("BatchTopK crosscoder, latent scaling", "confidence 1 - nu_eps")
def batchtopk_nu(data: Data) -> Claims:
    base, other = data.store.models
    crosscoder = trained(data, "batchtopk")
    table = latent_scaling(crosscoder, data.store, data.chosen, other, base, n_boot=0)
    return features(data, crosscoder, table["side"] == other, 1 - table["nu_eps"])


@finder("BatchTopK crosscoder, use", "how much more one model activates a feature than the other")
def batchtopk_use(data: Data) -> Claims:
    crosscoder = trained(data, "batchtopk")
    return features(data, crosscoder, *by_change(data, solo_codes(crosscoder, data.store, data.chosen)))


@finder("delta crosscoder, NRN", "a second loss: its dedicated features alone reconstruct x_d - x_b")
def delta(data: Data) -> Claims:
    return by_nrn(data, trained(data, "delta", trainer=Delta, dedicated=DEDICATED))


@finder("bridge, NRN", "errors of both models with lambda -1/2 between them: half way to the diff-SAE")
def bridge(data: Data) -> Claims:
    return by_nrn(data, trained(data, "bridge", trainer=Bridge))


@finder(
    "BatchTopK crosscoder, attribution",
    "to the log-probability of the behaviours' first words, on the split choose",
    labels=True,
)
def attributed(data: Data) -> Claims:
    crosscoder, other = trained(data, "batchtopk"), data.store.models[1]
    (found,) = attribution(data.store, [crosscoder], data.open_model(), data.targets, other)
    lost = -np.min(list(found.values()), axis=0)  # for the category that loses most
    return features(data, crosscoder, np.ones(len(lost), dtype=bool), 1 - np.exp(-lost.clip(0)))
