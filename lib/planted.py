"""Planted truth: paired activations whose features are known, to see which method may be believed when.

    ours = from_regime(regime(crosscoder, store, rows))        # what our data are like, written down before a rule is chosen
    table = study(folder, {"batchtopk": TrainConfig(...)}, ours)    # train on planted data, call features unique, compare with the truth
    rule = recommend(table);  judge(table, rule)               # chosen on some seeds, judged on fresh ones

**Generator.** Token n, model m: features i are active together in both models, and write a direction of their own in each::

    x_n^m = scale^m * ( mean^m + sum_i a_ni s_i^m d_i^m + noise ),    a_ni >= 0, mostly 0

    shared          d^base = d^distilled                       base_only       s^distilled = 0
    rotated         angle(d^base, d^distilled) = angle         distilled_only  s^base = 0
    rescaled        d^base = d^distilled, s^distilled / s^base = factor or 1 / factor

**Methods.** A learned feature is called unique to one side by its row lengths (NRN, p = 1 or 2), by latent scaling (nu_eps, nu_r), or by
two of them at once. Thresholds are fixed conventional ones, the same in every setting, or the 1% quantile in a *planted null*:
the same regime without any unique feature.

**Judgement.** Learned and planted features are compared by the cosine of their joined decoder rows, in scaled space::

    precision   share of the learned features called unique whose most similar planted feature is unique to that side
    recall      share of the planted unique features with which a learned feature that is called unique has a cosine above 0.7
    found       share of them that a one-to-one matching (Hungarian) gives a learned feature of cosine above 0.7, whatever it is
                called: features that were not learned cannot be recalled
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from plotly.subplots import make_subplots
from scipy import sparse, stats
from scipy.optimize import brentq, linear_sum_assignment, minimize_scalar
from scipy.special import ndtri
from torch.nn.functional import normalize

from .corpus import SPLITS
from .crosscoder import CrossCoder
from .figures import SCALE
from .results import Progress, UserError, check, fingerprint, write_text
from .scaling import latent_scaling
from .training import TrainConfig, train

MODELS = ("base", "distilled")
KINDS = ("shared", "rotated", "rescaled", "base_only", "distilled_only")
VERSION = 1  # of generator and scores: raised when they change, so that older cells count as stale
CHUNK = 16_384  # tokens at a time
MOST = 0.6  # no feature is active on a larger share of the tokens
SPLIT_SHARES = (0.8, 0.1, 0.1)


# --- the generator -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Planted:
    """What decides a planted data set. The defaults are the regime of the embedded pair (``from_regime``), at half its width.

    The mean activation has no field of its own: a common factor disappears when a store's scales are applied.
    """

    width: int = 48  # d of both models
    shared: int = 176  # numbers of features of each kind
    rotated: int = 176
    rescaled: int = 32
    base_only: int = 64
    distilled_only: int = 64
    angle: float = 60.0  # degrees between a rotated feature's rows
    factor: float = 3.0  # of a rescaled feature's row, distilled over base, in one half of them; its inverse in the other
    l0: float = 12.0  # features active per token, on average
    exponent: float = 1.0  # firing frequency of the feature of rank r is proportional to r^-exponent
    cv: float = 0.6  # standard deviation over mean of a feature's activation where it is active (gamma distributed)
    spread: float = 0.5  # standard deviation of the logarithm of the features' mean lengths
    correlation: float = 0.8  # of the normal variables behind the firing of features of one group (Gaussian copula)
    group: int = 4  # features per group; their frequencies are neighbours, their kinds random
    norm_ratio: float = 1.0  # raw norms, distilled over base: what scaling removes
    mean_share: tuple[float, float] = (0.14, 0.12)  # share of the mean vector in each model's mean square: scaling does not remove it
    noise: float = 0.015  # share of the variance that no feature explains
    dead_directions: float = 0.0  # share of the directions of the residual stream into which no feature writes
    tokens: int = 250_000
    document: int = 80  # tokens per document
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("width", "tokens", "document", "group"):
            check(name, getattr(self, name), int, low=1)
        for name in KINDS:
            check(name, getattr(self, name), int, low=0)
        check("l0", self.l0, float, low=0, high=MOST * self.features)
        check("angle", self.angle, float, low=0, high=180)
        for name in ("factor", "norm_ratio", "cv"):
            check(name, getattr(self, name), float, low=1e-6)
        for name in ("exponent", "spread"):
            check(name, getattr(self, name), float, low=0)
        for name in ("correlation", "noise", "dead_directions"):
            check(name, getattr(self, name), float, low=0, high=0.99)
        check("mean_share", list(self.mean_share), list, low=0, high=0.99)

    @property
    def features(self) -> int:
        return sum(getattr(self, kind) for kind in KINDS)

    def null(self) -> Planted:
        """The same regime without any unique feature: they become shared ones."""
        return replace(self, shared=self.shared + self.base_only + self.distilled_only, base_only=0, distilled_only=0)


class PlantedStore:
    """Planted activations in memory, with as much of the interface of ``lib.store.Store`` as training and statistics use.

    Beside it the truth: ``kinds`` [F] (index into ``KINDS``), ``frequencies`` [F], ``codes`` [n, F] sparse, and
    ``directions`` {model: [F, d]}, what one unit of a feature adds to the RAW activation.
    """

    models = MODELS

    def __init__(self, planted: Planted):
        self.planted, self.fingerprint = planted, fingerprint("planted", VERSION, planted)
        rng = np.random.default_rng(planted.seed)
        self.kinds = np.repeat(np.arange(len(KINDS)), [getattr(planted, kind) for kind in KINDS])
        rank = rng.permutation(planted.features)
        self.frequencies = frequencies(planted)[rank]
        self.codes = _codes(planted, rank, self.frequencies, rng)
        n = planted.tokens
        self.documents = np.arange(n) // planted.document
        borders = np.round(np.cumsum(SPLIT_SHARES) * (self.documents[-1] + 1))
        self.split = np.searchsorted(borders, self.documents, side="right").clip(max=len(SPLITS) - 1).astype(np.int8)
        self.kept = np.ones(n, dtype=bool)
        self.widths = {name: planted.width for name in MODELS}
        self._acts, self.directions = [], {}
        for name, rows, ratio, share in zip(MODELS, _rows(planted, self.kinds, rng), (1.0, planted.norm_ratio), planted.mean_share):
            x = self.codes @ rows.astype(np.float32)
            x -= x.mean(0)  # active features have a mean of their own: the mean vector stands for all of it
            variance = float(np.square(x, dtype=np.float64).sum(1).mean())
            noise = rng.standard_normal(x.shape, dtype=np.float32)
            noise *= np.sqrt(planted.noise / (1 - planted.noise) * variance / planted.width)
            mean = rng.standard_normal(planted.width)
            mean *= np.sqrt(share / (1 - share) * variance / (1 - planted.noise)) / np.linalg.norm(mean)
            self._acts.append(torch.from_numpy(((x + noise + mean) * ratio).astype(np.float32)))
            self.directions[name] = rows * ratio
        train_rows = torch.from_numpy(self.rows("train"))
        mean_norms = [float(a[train_rows].norm(dim=1).double().mean()) for a in self._acts]
        self.mean_norms = dict(zip(MODELS, mean_norms))
        self.scales = {name: planted.width**0.5 / norm for name, norm in self.mean_norms.items()}
        self.means = {name: a[train_rows].double().mean(0) for name, a in zip(MODELS, self._acts)}

    def __len__(self) -> int:
        return self.planted.tokens

    def rows(self, split: str) -> np.ndarray:
        return np.flatnonzero(self.split == SPLITS.index(check("split", split, str, choices=SPLITS)))

    def count(self, split: str) -> int:
        return len(self.rows(split))

    def activations(self, rows) -> list[torch.Tensor]:
        return [a[torch.as_tensor(rows)] for a in self._acts]

    def reader(self, split: str, batch_size: int, seed: int, epoch: int = 0, start: int = 0, memory: int | None = None,
               part: tuple[int, int] = (0, 1)) -> Iterator[tuple[np.ndarray, list[torch.Tensor]]]:
        order = np.random.default_rng([seed, epoch]).permutation(self.rows(split))
        for first in range(start * batch_size, len(order), batch_size):
            rows = order[first : first + batch_size][part[0] :: part[1]]
            yield rows, self.activations(rows)

    def joined(self) -> torch.Tensor:
        """Planted rows of both models side by side [F, 2d], of unit length, in scaled space: what decoder rows are compared with."""
        rows = [torch.as_tensor(self.directions[name] * self.scales[name], dtype=torch.float32) for name in MODELS]
        return normalize(torch.cat(rows, dim=1), dim=1)


def frequencies(planted: Planted) -> np.ndarray:
    """Firing frequency by rank [F]: a power law that adds up to ``l0``, none above ``MOST``."""
    law = np.arange(1, planted.features + 1) ** -planted.exponent
    if planted.l0 == 0:
        return np.zeros_like(law)
    low, high = np.log(planted.l0 / law.sum()), np.log(MOST / law[-1])  # where nothing, and where everything, is cut off
    if planted.l0 >= MOST * planted.features:
        return np.full_like(law, MOST)
    return np.minimum(law * np.exp(brentq(lambda t: np.minimum(law * np.exp(t), MOST).sum() - planted.l0, low - 1e-9, high)), MOST)


def _codes(planted: Planted, rank: np.ndarray, frequency: np.ndarray, rng: np.random.Generator) -> sparse.csr_matrix:
    """Activations [n, F]: which features fire by a Gaussian copula, how strongly by a gamma distribution."""
    length = np.exp(planted.spread * rng.standard_normal(planted.features))
    threshold = torch.from_numpy(ndtri(1 - frequency).astype(np.float32))
    group = torch.from_numpy(rank // planted.group)  # neighbours in frequency
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    own, common = (1 - planted.correlation) ** 0.5, planted.correlation**0.5
    parts = []
    for start in range(0, planted.tokens, CHUNK):
        n = min(CHUNK, planted.tokens - start)
        z = torch.randn(n, planted.features, generator=generator).mul_(own)
        if common:
            z += common * torch.randn(n, int(group.max()) + 1, generator=generator)[:, group]
        token, feature = (z > threshold).nonzero(as_tuple=True)
        shape = 1 / planted.cv**2
        strength = rng.gamma(shape, 1 / shape, len(feature)) * length[feature.numpy()]
        parts.append(sparse.csr_matrix((strength.astype(np.float32), (token.numpy(), feature.numpy())), shape=(n, planted.features)))
    return sparse.csr_matrix(sparse.vstack(parts))


def _rows(planted: Planted, kinds: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """s_i^m d_i^m [F, d] of base and distilled."""
    alive = max(2, round((1 - planted.dead_directions) * planted.width))
    into = np.linalg.qr(rng.standard_normal((planted.width, planted.width)))[0][:alive]

    def unit(a: np.ndarray) -> np.ndarray:
        return a / np.linalg.norm(a, axis=1, keepdims=True)

    base = unit(rng.standard_normal((planted.features, alive)) @ into)
    other = rng.standard_normal(base.shape[:1] + (alive,)) @ into
    other = unit(other - (other * base).sum(1, keepdims=True) * base)
    distilled, angle = base.copy(), np.radians(planted.angle)
    rotated, rescaled = (np.flatnonzero(kinds == KINDS.index(kind)) for kind in ("rotated", "rescaled"))
    distilled[rotated] = np.cos(angle) * base[rotated] + np.sin(angle) * other[rotated]
    distilled[rescaled[::2]] *= planted.factor
    base[rescaled[1::2]] *= planted.factor
    base[kinds == KINDS.index("distilled_only")] = 0
    distilled[kinds == KINDS.index("base_only")] = 0
    return base, distilled


# --- the regime: what the generator takes, measured ----------------------------------------------------------------------


@dataclass(frozen=True)
class Regime:
    """What data are like, in the generator's terms. Whatever depends on a dictionary is as the crosscoder sees it.

    Pairs are (``base``, ``distilled``). The crosscoder's own k decides ``l0``, and with it the frequencies: of the true number of active
    features they say no more than that so many suffice for ``1 - unexplained`` of the variance.
    """

    tokens: int
    width: int
    l0: float
    frequency_quantiles: tuple[float, ...]  # 5, 25, 50, 75, 95% of the features that fire
    exponent: float  # minus the slope of log frequency on log rank, over the middle 80% of the ranks
    cv: float  # median over features
    spread: float
    cofiring_mean: float  # mean phi coefficient of two features' firing, over all pairs
    cofiring_largest: float  # median over features of the largest phi with any other feature
    norm_ratio: float  # raw norms, distilled over base
    spread_ratio: float  # root of the variance after scaling, distilled over base: the imbalance that scaling leaves
    mean_share: tuple[float, float]
    unexplained: tuple[float, float]  # 1 - FVE
    alive: int  # features that fire
    dead_features: float
    dead_directions: tuple[float, float]  # share of principal directions with less variance than the mean unexplained one
    dimension: tuple[float, float]  # participation ratio (sum l)^2 / sum l^2 of the covariance, over the width
    agreement: float  # sum of the inner products of both models' centred activations over the geometric mean of their variances
    row_cosine: tuple[float, ...]  # between a feature's rows, 5, 25, 50, 75, 95%
    nrn_quantiles: tuple[float, ...]  # p = 2, likewise


QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@torch.no_grad()
def regime(crosscoder: CrossCoder, store, rows: np.ndarray, of: str = "distilled", against: str = "base") -> Regime:
    """Measure on tokens ``rows`` of a store what the generator needs to know. Models of one width."""
    m = [crosscoder.names.index(name) for name in (against, of)]
    width = crosscoder.widths[m[0]]
    if crosscoder.widths[m[1]] != width:
        raise UserError(f"{against} and {of} differ in width: planted data have one width")
    if len(rows) < 2:
        raise UserError("the regime is measured on at least two tokens")
    parts, sums, products, between, errors, norms = [], np.zeros((2, width)), np.zeros((2, width, width)), 0.0, np.zeros(2), np.zeros(2)
    with Progress("tokens measured", len(rows)) as progress:
        for start in range(0, len(rows), CHUNK):
            acts = [torch.as_tensor(a) for a in store.activations(rows[start : start + CHUNK])]
            f = crosscoder.encode(acts)
            parts.append(sparse.csr_matrix(f.numpy()))
            x, x_hat = crosscoder.split(crosscoder.scaled(acts)), crosscoder.split(f @ crosscoder.W_dec + crosscoder.b_dec)
            for i, model in enumerate(m):
                own = x[model].double()
                sums[i] += own.sum(0).numpy()
                products[i] += (own.T @ own).numpy()
                errors[i] += float((own - x_hat[model]).square().sum())
                norms[i] += float(acts[model].norm(dim=1).double().sum())
            between += float((x[m[0]].double() * x[m[1]].double()).sum())
            progress.update(start + len(acts[0]))
    codes, n = sparse.csc_matrix(sparse.vstack(parts)), len(rows)
    means = sums / n
    covariances = products / n - means[:, :, None] * means[:, None, :]
    variances = np.trace(covariances, axis1=1, axis2=2)
    spectra = np.linalg.eigvalsh(covariances).clip(min=0)
    fired = np.diff(codes.indptr)
    alive = np.flatnonzero(fired)
    frequency = fired[alive] / n
    ranked = np.sort(frequency)[::-1]
    middle = slice(len(ranked) // 10, len(ranked) - len(ranked) // 10)
    slope = np.polyfit(np.log(np.arange(1, len(ranked) + 1)[middle]), np.log(ranked[middle]), 1)[0]
    mean = np.asarray(codes.sum(0)).ravel()[alive] / fired[alive]
    square = np.asarray(codes.multiply(codes).sum(0)).ravel()[alive] / fired[alive]
    lengths = mean * crosscoder.strength_per_unit().numpy()[alive]
    fires = (codes[:, alive] > 0).astype(np.float64)
    spread = np.sqrt(frequency * (1 - frequency)).clip(1e-12)
    phi = ((fires.T @ fires).toarray() / n - np.outer(frequency, frequency)) / np.outer(spread, spread)
    apart = ~np.eye(len(alive), dtype=bool)

    def quantiles(values) -> tuple[float, ...]:
        return tuple(round(float(q), 4) for q in np.nanquantile(np.asarray(values), QUANTILES))

    def pair(values) -> tuple[float, float]:
        return tuple(round(float(v), 4) for v in values)

    return Regime(
        tokens=n, width=width, l0=round(float(fired.sum() / n), 3), frequency_quantiles=quantiles(frequency),
        exponent=round(float(-slope), 3), cv=round(float(np.median(np.sqrt(np.maximum(square / mean**2 - 1, 0)))), 3),
        spread=round(float(np.log(lengths).std()), 3),
        cofiring_mean=round(float(phi[apart].mean()), 4),
        cofiring_largest=round(float(np.median(np.where(apart, phi, -1).max(1))), 3),
        norm_ratio=round(float(norms[1] / norms[0]), 3), spread_ratio=round(float(np.sqrt(variances[1] / variances[0])), 3),
        mean_share=pair(np.square(means).sum(1) / (variances + np.square(means).sum(1))), unexplained=pair(errors / n / variances),
        alive=len(alive), dead_features=round(1 - len(alive) / crosscoder.n_features, 4),
        dead_directions=pair((spectra < (errors / n / width)[:, None]).mean(1)),
        dimension=pair(spectra.sum(1) ** 2 / np.square(spectra).sum(1) / width),
        agreement=round(float((between / n - means[0] @ means[1]) / np.sqrt(variances.prod())), 3),
        row_cosine=quantiles(crosscoder.cosine(against, of)[alive]), nrn_quantiles=quantiles(crosscoder.nrn(2, of, against)[alive]),
    )


def from_regime(measured: Regime, width: int = 48, unique: float = 1 / 8, rescaled: float = 1 / 16, factor: float = 3.0,
                **changes) -> Planted:
    """The generator's parameters for a measured regime, at another width: numbers per direction of the residual stream stay the same.

    What no measurement gives is set here: the shares of ``unique`` features (of each side) and of ``rescaled`` ones. As many features are
    planted as the crosscoder has living ones: nobody knows the true number, and a larger dictionary would have claimed more. The rest
    is half shared, half rotated; the angle is the one that gives the measured agreement of the two models' activations, which needs no
    dictionary. ``changes`` replace any field.
    """
    total = round(measured.alive * width / measured.width)
    if total == 0:
        raise UserError("no feature fires in this regime: there is nothing to plant")
    counts = {"rescaled": round(rescaled * total), "base_only": round(unique * total), "distilled_only": round(unique * total)}
    rest = total - sum(counts.values())
    counts |= {"shared": rest - rest // 2, "rotated": rest // 2}
    variance = rest + counts["base_only"] + counts["rescaled"] * (1 + factor**2) / 2
    cosine = (measured.agreement * variance - counts["shared"] - counts["rescaled"] * factor) / max(counts["rotated"], 1)
    ours = Planted(
        width=width, **counts, angle=round(float(np.degrees(np.arccos(np.clip(cosine, 0, 1))))), factor=factor,
        l0=round(measured.l0 * width / measured.width, 2), cv=measured.cv,
        spread=measured.spread, correlation=_copula(measured.cofiring_largest, measured.frequency_quantiles[2]),
        norm_ratio=measured.norm_ratio, mean_share=measured.mean_share, noise=round(float(np.mean(measured.unexplained)), 4),
        dead_directions=round(float(np.mean(measured.dead_directions)), 3),
    )
    return replace(ours, exponent=_exponent(ours, measured), **changes)


def _exponent(planted: Planted, measured: Regime) -> float:
    """The exponent whose frequencies have the measured quantiles: least squares of their logarithms."""
    def distance(exponent: float) -> float:
        found = np.quantile(frequencies(replace(planted, exponent=exponent)), QUANTILES)
        return float(np.square(np.log(found / np.maximum(measured.frequency_quantiles, 1e-4))).sum())

    return round(float(minimize_scalar(distance, bounds=(0, 3), method="bounded").x), 2)


def _copula(phi: float, frequency: float) -> float:
    """Correlation of two normal variables whose excesses, each with this frequency, have the correlation ``phi``."""
    threshold = ndtri(1 - frequency)

    def excess(rho: float) -> float:
        both = stats.multivariate_normal.cdf([-threshold, -threshold], cov=[[1, rho], [rho, 1]])
        return (both - frequency**2) / (frequency * (1 - frequency)) - phi

    return 0.0 if phi <= 0 else round(float(brentq(excess, 0, 0.99)), 3) if excess(0.99) > 0 else 0.99


# --- the methods -----------------------------------------------------------------------------------------------------------

# score: does a larger one mean unique?
SCORES = {"nrn_p1": True, "nrn_p2": True, "nu_eps": False, "nu_r": False}
NULL_RATE = 0.01  # share of a planted null's living features that a calibrated threshold lets through

# {method: ((score, threshold), ...)}: all must hold; None is the threshold calibrated on the planted null
METHODS: dict[str, tuple[tuple[str, float | None], ...]] = {
    **{f"{p} > {t}": ((f"nrn_{p}", t),) for p in ("p1", "p2") for t in (0.9, 0.7)},
    **{f"{nu} < {t}": ((nu, t),) for nu in ("nu_eps", "nu_r") for t in (0.2, 0.3)},
    **{f"p2 > {t} and nu_eps < {u}": (("nrn_p2", t), ("nu_eps", u)) for t, u in ((0.9, 0.2), (0.7, 0.3))},
    **{f"nu_eps < {t} and nu_r < {u}": (("nu_eps", t), ("nu_r", u)) for t, u in ((0.2, 0.5), (0.3, 0.3))},
    **{f"{score} beyond null": ((score, None),) for score in SCORES},
    "nrn_p2 and nu_eps beyond null": (("nrn_p2", None), ("nu_eps", None)),
    "nu_eps and nu_r beyond null": (("nu_eps", None), ("nu_r", None)),
}


def scores(crosscoder: CrossCoder, store: PlantedStore, rows: np.ndarray) -> pd.DataFrame:
    """Every learned feature's scores, and what it is: one row per feature and side.

    feature, side, alive (it fires on some of ``rows``); nrn_p1, nrn_p2 as seen from the side; nu_eps, nu_r, NaN if the other side has the
    longer row.  nearest (number of the most similar planted feature), cosine (with it), kind (of it), hits (planted features unique to
    the side with a cosine above 0.7, as text), matched and matched_cosine (one-to-one; -1 for none).
    """
    table = latent_scaling(crosscoder, store, rows, n_boot=0)
    fires = np.zeros(crosscoder.n_features, dtype=bool)
    for start in range(0, len(rows), CHUNK):
        fires |= (crosscoder.encode(store.activations(rows[start : start + CHUNK])) > 0).any(0).numpy()
    similarity = (normalize(crosscoder.W_dec.detach(), dim=1) @ store.joined().T).numpy()
    similarity[~fires] = -1  # the dead are like nothing
    learned, planted = linear_sum_assignment(-similarity)
    matched = np.full(len(fires), -1)
    matched[learned] = planted
    matched_cosine = np.where(matched >= 0, similarity[np.arange(len(fires)), matched], -1)
    nearest = similarity.argmax(1)
    parts = []
    for side, other in ((MODELS[1], MODELS[0]), MODELS):
        own = similarity[:, store.kinds == KINDS.index(f"{side}_only")] > 0.7
        numbers = np.flatnonzero(store.kinds == KINDS.index(f"{side}_only"))
        parts.append(pd.DataFrame({
            "feature": table["feature"], "side": side, "alive": fires,
            **{f"nrn_p{p}": crosscoder.nrn(p, side, other).numpy() for p in (1, 2)},
            **{nu: table[nu].where(table["side"] == side) for nu in ("nu_eps", "nu_r")},
            "nearest": nearest, "cosine": similarity.max(1), "kind": np.array(KINDS)[store.kinds[nearest]],
            "hits": [" ".join(map(str, numbers[row])) for row in own], "matched": matched, "matched_cosine": matched_cosine,
        }))
    return pd.concat(parts, ignore_index=True)


def null_thresholds(null: pd.DataFrame, rate: float = NULL_RATE) -> dict[tuple[str, str], float]:
    """{(side, score): threshold} that the share ``rate`` of the living features of a planted null passes. NaN is never beyond it."""
    found = {}
    for side, part in null[null["alive"]].groupby("side"):
        for score, larger in SCORES.items():
            values = part[score].fillna(-np.inf if larger else np.inf)
            found[side, score] = float(np.quantile(values, 1 - rate if larger else rate, method="higher" if larger else "lower"))
    return found


def called(table: pd.DataFrame, method: str, thresholds: Mapping[tuple[str, str], float]) -> np.ndarray:
    """Which rows of ``scores`` the method calls unique to their side; ``thresholds`` as from ``null_thresholds``."""
    if method not in METHODS:
        raise UserError(f"unknown method {method!r}: it must be one of {', '.join(METHODS)}")
    flagged = table["alive"].to_numpy(dtype=bool).copy()
    for score, fixed in METHODS[method]:
        limit = table["side"].map(lambda side, score=score, fixed=fixed: thresholds[side, score] if fixed is None else fixed)
        flagged &= (table[score] > limit if SCORES[score] else table[score] < limit).to_numpy()  # a NaN is never beyond
    return flagged


# --- the judgement ---------------------------------------------------------------------------------------------------------


def precision_recall(table: pd.DataFrame, flagged: np.ndarray, planted: Planted) -> pd.DataFrame:
    """One row per side: precision (NaN if nothing is flagged), recall, found, n_flagged, n_planted, as defined at the top."""
    rows = []
    for side in (MODELS[1], MODELS[0]):
        kind, own = f"{side}_only", (table["side"] == side).to_numpy()
        called_unique, n_planted = table[own & flagged], getattr(planted, kind)
        recalled = {number for hits in called_unique["hits"] for number in hits.split()}
        one_to_one = table[own & (table["matched_cosine"] > 0.7)]["matched"]
        first = sum(getattr(planted, earlier) for earlier in KINDS[: KINDS.index(kind)])
        found = int(one_to_one.between(first, first + n_planted - 1).sum())
        rows.append({"side": side, "precision": (called_unique["kind"] == kind).mean() if len(called_unique) else np.nan,
                     "recall": len(recalled) / n_planted if n_planted else np.nan, "found": found / n_planted if n_planted else np.nan,
                     "n_flagged": len(called_unique), "n_planted": n_planted})
    return pd.DataFrame(rows)


@dataclass(frozen=True)
class Setting:
    """One point of one axis: fields of ``Planted`` that differ from our regime, factors of fields of ``TrainConfig``, and a factor of the
    number of features of every kind."""

    name: str
    value: str
    planted: Mapping = field(default_factory=dict)
    config: Mapping = field(default_factory=dict)
    features: float = 1.0

    @property
    def key(self) -> tuple[str, str]:
        return self.name, self.value


OURS = Setting("our regime", "as measured")
SETTINGS = (  # one thing at a time
    OURS,
    Setting("sparsity", "a third as many active", {"l0": 4.0}, {"k": 1 / 3}),
    Setting("correlation", "none", {"correlation": 0.0}),
    Setting("norm imbalance", "raw norms x 3", {"norm_ratio": 3.0}),
    Setting("norm imbalance", "mean is 3/4 of distilled", {"mean_share": (0.14, 0.75)}),
    Setting("rescaling", "factor 10", {"factor": 10.0}),
    Setting("rotation", "0 degrees", {"angle": 0.0}),
    Setting("rotation", "90 degrees", {"angle": 90.0}),
    Setting("dead directions", "half", {"dead_directions": 0.5}),
    Setting("budget", "a quarter of the tokens", {}, {"tokens": 1 / 4}),
    Setting("budget", "half the dictionary", {}, {"n_features": 1 / 2}),
    Setting("crowding", "a fifth of the features", {}, {"n_features": 1 / 5}, features=1 / 5),
    # the positive control: where features can be learned, does the judgement say so? Everything that makes it hard is taken away at once
    Setting("easy", "few, sparse, independent", {"l0": 2.0, "correlation": 0.0, "exponent": 0.5}, {"n_features": 1 / 5, "k": 1 / 3}, 1 / 5),
)
SEEDS = {"choose": (0, 1, 2), "report": (10, 11, 12, 13, 14)}
NULL_SEED = 100  # of the planted null that calibrates thresholds: it belongs to neither split


def study(folder: Path, configs: Mapping[str, TrainConfig], ours: Planted = Planted(), settings: Sequence[Setting] = SETTINGS,
          seeds: Mapping[str, Sequence[int]] = SEEDS, axis_seeds: int = 2) -> pd.DataFrame:
    """Train every architecture on every setting and seed, and judge every method: one row per method and side.

    setting, value, architecture, seed, split, method, side, precision, recall, found, n_flagged, n_planted, fve (both models, report split)

    ``configs`` {name of the architecture: its config, for our regime}; the config's seed is replaced. ``seeds`` {split: seeds} hold for our
    regime (the first of ``settings``); the others are reported on the first ``axis_seeds`` of split "report" only, since nothing is chosen
    there. Each (setting, architecture, seed) is kept in ``folder`` as soon as it is done, and not computed again. The time is
    that of ``len(cells(...))`` trainings.
    """
    folder, made = Path(folder), []
    folder.mkdir(parents=True, exist_ok=True)
    wanted = cells(configs, ours, settings, seeds, axis_seeds)
    store: PlantedStore | None = None
    with Progress("crosscoders on planted data", len(wanted)) as progress:
        for number, cell in enumerate(wanted):
            file = folder / f"{cell.mark}.csv"
            if not file.is_file():
                if store is None or store.planted != cell.planted:
                    store = PlantedStore(cell.planted)
                write_text(file, _scored(store, cell.config).to_csv(index=False, float_format="%.6g", lineterminator="\n"))
            made.append(pd.read_csv(file, keep_default_na=False, na_values=[""], dtype={"hits": str}).fillna({"hits": ""}))
            progress.update(number + 1, f"{cell.setting.name}, {cell.architecture}")
    thresholds = {(*c.setting.key, c.architecture): null_thresholds(t) for c, t in zip(wanted, made) if c.split == "null"}
    rows = []
    for cell, table in zip(wanted, made):
        for method in METHODS if cell.split != "null" else ():
            found = precision_recall(table, called(table, method, thresholds[*cell.setting.key, cell.architecture]), cell.planted)
            rows.append(found.assign(setting=cell.setting.name, value=cell.setting.value, architecture=cell.architecture,
                                     seed=cell.planted.seed, split=cell.split, method=method, fve=table["fve"].iloc[0]))
    first = ["setting", "value", "architecture", "seed", "split", "method", "side"]
    frame = pd.concat(rows, ignore_index=True)
    return frame[[*first, *(c for c in frame.columns if c not in first)]]


@dataclass(frozen=True)
class Cell:
    """One training: ``split`` is that of its seed, or "null"."""

    setting: Setting
    architecture: str
    split: str
    planted: Planted
    config: TrainConfig

    @property
    def mark(self) -> str:
        return fingerprint("planted cell", VERSION, self.planted, self.config)


def cells(configs: Mapping[str, TrainConfig], ours: Planted, settings: Sequence[Setting] = SETTINGS,
          seeds: Mapping[str, Sequence[int]] = SEEDS, axis_seeds: int = 2) -> list[Cell]:
    """All trainings that ``study`` needs: those on the same data are neighbours."""
    if not settings or settings[0] != OURS:
        raise UserError("settings must begin with our regime (planted.OURS): the rule is chosen there")
    used = [seed for split in seeds.values() for seed in split]
    if set(seeds) != {"choose", "report"} or len(set(used)) < len(used) or NULL_SEED in used:
        raise UserError(f"seeds must be {{'choose': ..., 'report': ...}} without a seed in both, and without {NULL_SEED}, the null's")
    found = []
    for setting in settings:
        own = seeds if setting == OURS else {"report": tuple(seeds["report"])[:axis_seeds]}
        counts = {kind: round(getattr(ours, kind) * setting.features) for kind in KINDS}
        changed = replace(ours, **{**counts, **setting.planted})
        plan = [("null", replace(changed.null(), seed=NULL_SEED))]
        plan += [(split, replace(changed, seed=seed)) for split in own for seed in own[split]]
        for split, planted in plan:
            for name, config in configs.items():
                factors = {key: max(1, round(getattr(config, key) * factor)) for key, factor in setting.config.items()}
                found.append(Cell(setting, name, split, planted, replace(config, seed=planted.seed, **factors)))
    return found


def _scored(store: PlantedStore, config: TrainConfig) -> pd.DataFrame:
    """``scores`` of one crosscoder, on the report split, with its FVE."""
    with tempfile.TemporaryDirectory() as scratch:
        crosscoder = train(store, config, Path(scratch), progress=_Quiet())
    rows = store.rows("report")
    acts = store.activations(rows)
    with torch.no_grad():
        x = crosscoder.scaled(acts)
        error = (x - crosscoder.scaled(crosscoder.decode(crosscoder.encode(acts)))).square().sum()
    return scores(crosscoder, store, rows).assign(fve=1 - float(error / (x - x.mean(0)).square().sum()))


class _Quiet:
    """For trainings of some seconds, of which one line in all says how far they have come."""

    def update(self, done: int, note: str = "") -> None: ...

    def close(self) -> None: ...


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Means over seeds with 95% intervals (Student's t over seeds, cut to [0, 1]; none for a single seed), sides apart.

    setting, value, architecture, split, method, side; precision, precision_low, precision_high, the same for recall; found; seeds;
    silent: seeds in which nothing was flagged, so that precision is not defined.
    """
    keys = ["setting", "value", "architecture", "split", "method", "side"]
    rows = []
    for key, part in table.groupby(keys, sort=False):
        row = dict(zip(keys, key))
        for name in ("precision", "recall"):
            row |= dict(zip((name, f"{name}_low", f"{name}_high"), _interval(part[name].dropna())))
        rows.append(row | {"found": part["found"].mean(), "seeds": len(part), "silent": int(part["precision"].isna().sum())})
    return pd.DataFrame(rows)


def _interval(values: pd.Series) -> tuple[float, float, float]:
    if len(values) == 0:
        return np.nan, np.nan, np.nan
    if len(values) == 1:
        return float(values.iloc[0]), np.nan, np.nan
    half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
    return float(values.mean()), max(0.0, float(values.mean() - half)), min(1.0, float(values.mean() + half))


def recommend(table: pd.DataFrame, architecture: str | None = None) -> dict[str, str]:
    """{"architecture", "method"}: chosen on split "choose", in our regime, of all architectures or of the one that is given.

    The pair whose weaker side is best: both models' unique features, precision and recall, averaged over the seeds; the smallest of
    these four counts, their mean decides ties. A method that flags nothing has precision 0 here.
    """
    ours = table[(table["split"] == "choose") & (table["setting"] == OURS.name)]
    if architecture is not None:
        check("architecture", architecture, choices=sorted(ours["architecture"].unique()))
        ours = ours[ours["architecture"] == architecture]
    if ours.empty:
        raise UserError("the table has no seeds to choose on in our regime: run the study with them")
    means = ours.fillna({"precision": 0.0}).groupby(["architecture", "method", "side"], sort=False)[["precision", "recall"]].mean()
    four = means.unstack("side")
    best = pd.DataFrame({"least": four.min(axis=1), "mean": four.mean(axis=1)}).sort_values(["least", "mean"], kind="stable").index[-1]
    return {"architecture": best[0], "method": best[1]}


def judge(table: pd.DataFrame, rule: Mapping[str, str], setting: str = OURS.name, value: str = OURS.value,
          side: str = "distilled") -> dict[str, dict]:
    """{"planted_precision", "planted_recall", "planted_found"}: {value, ci, n} of a rule on split "report", n seeds.

    A seed in which the rule flags nothing has no precision: it is left out there, and counts as recall 0.
    """
    part = table[(table["split"] == "report") & (table["setting"] == setting) & (table["value"] == value) & (table["side"] == side)
                 & (table["architecture"] == rule["architecture"]) & (table["method"] == rule["method"])]
    found = {}
    for name in ("precision", "recall", "found"):
        values = part[name].dropna()
        mean, low, high = _interval(values)
        found[f"planted_{name}"] = {"value": mean, "ci": None if np.isnan(low) else (low, high), "n": len(values)}
    return found


def plot(table: pd.DataFrame, architecture: str, side: str = "distilled") -> go.Figure:
    """Which method may be believed when: methods by settings, mean precision and recall over the seeds of split "report"."""
    means = summary(table[(table["architecture"] == architecture) & (table["side"] == side) & (table["split"] == "report")])
    if means.empty:
        raise UserError(f"the table has nothing to report on {architecture!r}, side {side!r}")
    means["where"] = np.where(means["setting"] == OURS.name, OURS.name, means["setting"] + ": " + means["value"])
    fig = make_subplots(1, 2, shared_yaxes=True, subplot_titles=("precision", "recall"), horizontal_spacing=0.02)
    for column, name in enumerate(("precision", "recall"), start=1):
        wide = means.pivot(index="method", columns="where", values=name)
        wide = wide.loc[list(METHODS)[::-1], list(dict.fromkeys(means["where"]))]
        text = wide.map(lambda v: "none" if np.isnan(v) else f"{v:.2f}")  # none: it called no feature unique
        fig.add_heatmap(z=wide.to_numpy(), x=wide.columns, y=wide.index, text=text.to_numpy(), texttemplate="%{text}", zmin=0, zmax=1,
                        name=name, colorscale=SCALE, showscale=column == 2, row=1, col=column)
    fig.update_xaxes(tickangle=-45)
    return fig.update_layout(title_text=f"Calling features {side}-only on planted data, {architecture}", width=1180, height=640)
