"""Planted truth: paired activations whose features are known, and the regime that they imitate.

    ours = from_regime(regime(small, store, tokens))   # what our data are like, as a small crosscoder sees it
    store = PlantedStore(ours)    # read like a store of harvested activations; store.kinds is the truth

Token n, model m: features i are active together in both models, and write a direction of their own in each::

    x_n^m = scale^m * ( mean^m + sum_i a_ni s_i^m d_i^m + noise ),    a_ni >= 0, mostly 0

    shared          d^base = d^distilled                       base_only       s^distilled = 0
    rotated         angle(d^base, d^distilled) = angle         distilled_only  s^base = 0
    rescaled        d^base = d^distilled, s^distilled / s^base = factor or 1 / factor
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy import sparse, stats
from scipy.optimize import brentq, minimize_scalar
from scipy.special import ndtri
from torch.nn.functional import normalize

from ..crosscoder.codes import encoded
from ..crosscoder.model import CrossCoder
from ..labels import SPLITS
from ..runs import fingerprint
from ..settings import Count, NotNegative, Positive, UserError, check, number, parameters

MODELS = ("base", "distilled")
KINDS = ("shared", "rotated", "rescaled", "base_only", "distilled_only")
VERSION = 1  # of generator and scores: raised when they change, so that older cells count as stale
CHUNK = 16_384  # tokens at a time
MOST = 0.6  # no feature is active on a larger share of the tokens
SPLIT_SHARES = (0.8, 0.1, 0.1)


# --- the generator ------------------------------------------------------------------------------------------


@parameters
class Planted:
    """What decides a planted data set. The defaults are the embedded pair at half its width, as a crosscoder
    of 1,024 features and k 24 sees it (``from_regime``).

    The mean activation has no field of its own: a common factor disappears when a store's scales are applied.
    """

    width: Positive = 48  # d of both models
    shared: Count = 176  # numbers of features of each kind
    rotated: Count = 176
    rescaled: Count = 32
    base_only: Count = 64
    distilled_only: Count = 64
    angle: number(0, 180) = 60.0  # degrees between a rotated feature's rows
    # of a rescaled feature's row, distilled over base, in one half of them; its inverse in the other
    factor: number(1e-6) = 3.0
    l0: NotNegative = 12.0  # features active per token, on average
    exponent: NotNegative = 1.0  # firing frequency of the feature of rank r is proportional to r^-exponent
    # standard deviation over mean of a feature's activation where it is active (gamma distributed)
    cv: number(1e-6) = 0.6
    spread: NotNegative = 0.5  # standard deviation of the logarithm of the features' mean lengths
    # of the normal variables behind the firing of features of one group (Gaussian copula)
    correlation: number(0, 0.99) = 0.8
    group: Positive = 4  # features per group; their frequencies are neighbours, their kinds random
    norm_ratio: number(1e-6) = 1.0  # raw norms, distilled over base: what scaling removes
    # share of the mean vector in each model's mean square: scaling does not remove it
    mean_share: list[number(0, 0.99)] = (0.14, 0.12)
    noise: number(0, 0.99) = 0.015  # share of the variance that no feature explains
    # share of the directions of the residual stream into which no feature writes
    dead_directions: number(0, 0.99) = 0.0
    tokens: Positive = 250_000
    document: Positive = 80  # tokens per document
    seed: int = 0

    def __post_init__(self) -> None:
        check("l0", self.l0, float, low=0, high=MOST * self.features)

    @property
    def features(self) -> int:
        return sum(getattr(self, kind) for kind in KINDS)

    def null(self) -> Planted:
        """The same regime without any unique feature: they become shared ones."""
        shared = self.shared + self.base_only + self.distilled_only
        return replace(self, shared=shared, base_only=0, distilled_only=0)


class PlantedStore:
    """Planted activations in memory, with what training and statistics use of the interface of ``Store``.

    Beside it the truth: ``kinds`` [F] (index into ``KINDS``), ``frequencies`` [F], ``codes`` [n, F] sparse,
    and ``directions`` {model: [F, d]}, what one unit of a feature adds to the RAW activation."""

    models, name = MODELS, "planted"

    def __init__(self, planted: Planted):
        self.planted, self.fingerprint = planted, fingerprint(self.name, VERSION, planted)
        rng, n = np.random.default_rng(planted.seed), planted.tokens
        self.kinds = np.repeat(np.arange(len(KINDS)), [getattr(planted, kind) for kind in KINDS])
        rank = rng.permutation(planted.features)
        self.frequencies = self.fired(frequencies(planted)[rank])
        self.codes = _codes(planted, rank, self.frequencies, rng)
        self.documents, self.kept = np.arange(n) // planted.document, np.ones(n, dtype=bool)
        borders = np.round(np.cumsum(SPLIT_SHARES) * (self.documents[-1] + 1))
        split = np.searchsorted(borders, self.documents, side="right")
        self.split = split.clip(max=len(SPLITS) - 1).astype(np.int8)
        self.widths = dict.fromkeys(MODELS, planted.width)
        self._acts, self.directions, self.mean_norms, self.means = [], {}, {}, {}
        train_rows = torch.from_numpy(self.rows("train"))
        for name, rows, ratio, share in zip(
            MODELS, _rows(planted, self.written(), rng), (1.0, planted.norm_ratio), planted.mean_share
        ):
            x = self.used(name) @ rows.astype(np.float32)
            x -= x.mean(0)  # active features have a mean of their own: the mean vector stands for all of it
            variance = float(np.square(x, dtype=np.float64).sum(1).mean())
            noise = rng.standard_normal(x.shape, dtype=np.float32)
            noise *= np.sqrt(planted.noise / (1 - planted.noise) * variance / planted.width)
            mean = rng.standard_normal(planted.width)
            mean *= np.sqrt(share / (1 - share) * variance / (1 - planted.noise)) / np.linalg.norm(mean)
            acts = torch.from_numpy(((x + noise + mean) * ratio).astype(np.float32))
            self._acts.append(acts)
            self.directions[name] = rows * ratio
            self.mean_norms[name] = float(acts[train_rows].norm(dim=1).double().mean())
            self.means[name] = acts[train_rows].double().mean(0)
        self.scales = {name: planted.width**0.5 / norm for name, norm in self.mean_norms.items()}

    # what a subclass may plant otherwise, under a ``name`` of its own

    def fired(self, frequencies: np.ndarray) -> np.ndarray:
        """How often each feature fires [F], from the frequencies of the regime."""
        return frequencies

    def written(self) -> np.ndarray:
        """The kinds [F] that decide the features' rows."""
        return self.kinds

    def used(self, model: str) -> sparse.csr_matrix:
        """The activations [n, F] that a model writes."""
        return self.codes

    def __len__(self) -> int:
        return self.planted.tokens

    def rows(self, split: str) -> np.ndarray:
        return np.flatnonzero(self.split == SPLITS.index(check("split", split, str, choices=SPLITS)))

    def count(self, split: str) -> int:
        return len(self.rows(split))

    def activations(self, rows) -> list[torch.Tensor]:
        return [a[torch.as_tensor(rows)] for a in self._acts]

    def reader(
        self,
        split: str,
        batch_size: int,
        seed: int,
        epoch: int = 0,
        start: int = 0,
        memory: int | None = None,
        part: tuple[int, int] = (0, 1),
    ) -> Iterator[tuple[np.ndarray, list[torch.Tensor]]]:
        for rows in shuffled(self.rows(split), batch_size, [seed, epoch], start, part):
            yield rows, self.activations(rows)

    def joined(self) -> torch.Tensor:
        """Planted rows of both models side by side [F, 2d], of unit length, in scaled space: what decoder
        rows are compared with."""
        rows = [torch.as_tensor(self.directions[m] * self.scales[m], dtype=torch.float32) for m in MODELS]
        return normalize(torch.cat(rows, dim=1), dim=1)


def shuffled(
    rows: np.ndarray, batch_size: int, seed: list[int], start: int = 0, part: tuple[int, int] = (0, 1)
) -> Iterator[np.ndarray]:
    """Batches of rows in a random order, from batch ``start`` on; of each its ``part`` (i, of n)."""
    order = np.random.default_rng(seed).permutation(rows)
    for first in range(start * batch_size, len(order), batch_size):
        yield order[first : first + batch_size][part[0] :: part[1]]


def frequencies(planted: Planted) -> np.ndarray:
    """Firing frequency by rank [F]: a power law that adds up to ``l0``, none above ``MOST``."""
    law = np.arange(1, planted.features + 1) ** -planted.exponent
    if planted.l0 == 0:
        return np.zeros_like(law)
    if planted.l0 >= MOST * planted.features:
        return np.full_like(law, MOST)
    cut = lambda t: np.minimum(law * np.exp(t), MOST)
    # where nothing, and where everything, is cut off
    low, high = np.log(planted.l0 / law.sum()), np.log(MOST / law[-1])
    return cut(brentq(lambda t: cut(t).sum() - planted.l0, low - 1e-9, high))


def _codes(
    planted: Planted, rank: np.ndarray, frequency: np.ndarray, rng: np.random.Generator
) -> sparse.csr_matrix:
    """Activations [n, F]: which features fire by a Gaussian copula, how strongly by a gamma distribution."""
    length = np.exp(planted.spread * rng.standard_normal(planted.features))
    threshold = torch.from_numpy(ndtri(1 - frequency).astype(np.float32))
    group = torch.from_numpy(rank // planted.group)  # neighbours in frequency
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    own, common = (1 - planted.correlation) ** 0.5, planted.correlation**0.5
    shape, parts = 1 / planted.cv**2, []
    for start in range(0, planted.tokens, CHUNK):
        n = min(CHUNK, planted.tokens - start)
        z = torch.randn(n, planted.features, generator=generator).mul_(own)
        if common:
            z += common * torch.randn(n, int(group.max()) + 1, generator=generator)[:, group]
        token, feature = (x.numpy() for x in (z > threshold).nonzero(as_tuple=True))
        strength = (rng.gamma(shape, 1 / shape, len(feature)) * length[feature]).astype(np.float32)
        parts.append(sparse.csr_matrix((strength, (token, feature)), shape=(n, planted.features)))
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


# --- the regime: what the generator takes, measured ---------------------------------------------------------


@dataclass(frozen=True)
class Regime:
    """What data are like, in the generator's terms. Whatever depends on a dictionary is as the crosscoder
    sees it; pairs are (``base``, ``distilled``); quantiles are those of QUANTILES.

    The crosscoder's own k decides ``l0``, and with it the frequencies: of the true number of active features
    they say no more than that so many suffice for ``1 - unexplained`` of the variance."""

    tokens: int
    width: int
    l0: float
    frequency_quantiles: tuple[float, ...]  # of the features that fire
    exponent: float  # minus the slope of log frequency on log rank, over the middle 80% of the ranks
    cv: float  # median over features
    spread: float
    cofiring_mean: float  # mean phi coefficient of two features' firing, over all pairs
    cofiring_largest: float  # median over features of the largest phi with any other feature
    norm_ratio: float  # raw norms, distilled over base
    spread_ratio: float  # root of the variance after scaling, distilled over base
    mean_share: tuple[float, float]
    unexplained: tuple[float, float]  # 1 - FVE
    alive: int  # features that fire
    dead_features: float
    dead_directions: tuple[float, float]  # principal directions with less variance than the unexplained mean
    dimension: tuple[float, float]  # (sum l)^2 / sum l^2 of the covariance, over the width
    agreement: float  # sum of inner products of both centred activations over the geometric mean variance
    row_cosine: tuple[float, ...]  # between a feature's rows
    nrn_quantiles: tuple[float, ...]  # p = 2


QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@torch.no_grad()
def regime(crosscoder: CrossCoder, store, tokens: np.ndarray) -> Regime:
    """Measure on tokens (numbers, [n]) of a store what the generator needs to know. Models of one width."""
    slots = [crosscoder.names.index(name) for name in MODELS]
    width, n = crosscoder.widths[slots[0]], len(tokens)
    if crosscoder.widths[slots[1]] != width:
        raise UserError(f"{' and '.join(MODELS)} differ in width: planted data have one width")
    if n < 2:
        raise UserError("the regime is measured on at least two tokens")
    parts, between, errors, norms = [], 0.0, np.zeros(2), np.zeros(2)
    sums, products = np.zeros((2, width)), np.zeros((2, width, width))
    for _, acts, f in encoded(crosscoder, store, tokens, "tokens measured", CHUNK):
        acts, f = [a.cpu() for a in acts], f.cpu()
        parts.append(sparse.csr_matrix(f.numpy()))
        x = crosscoder.split(crosscoder.scaled(acts))
        x_hat = crosscoder.split(f @ crosscoder.W_dec + crosscoder.b_dec)
        for i, slot in enumerate(slots):
            own = x[slot].double()
            sums[i] += own.sum(0).numpy()
            products[i] += (own.T @ own).numpy()
            errors[i] += float((own - x_hat[slot]).square().sum())
            norms[i] += float(acts[slot].norm(dim=1).double().sum())
        between += float((x[slots[0]].double() * x[slots[1]].double()).sum())
    codes, means = sparse.csc_matrix(sparse.vstack(parts)), sums / n
    covariances = products / n - means[:, :, None] * means[:, None, :]
    variances = np.trace(covariances, axis1=1, axis2=2)
    spectra = np.linalg.eigvalsh(covariances).clip(min=0)
    fired = np.diff(codes.indptr)
    alive = np.flatnonzero(fired)
    codes, fired, frequency = codes[:, alive], fired[alive], fired[alive] / n
    ranked = np.sort(frequency)[::-1]
    middle = slice(len(ranked) // 10, len(ranked) - len(ranked) // 10)
    slope = np.polyfit(np.log(np.arange(1, len(ranked) + 1)[middle]), np.log(ranked[middle]), 1)[0]
    mean = np.asarray(codes.sum(0)).ravel() / fired
    square = np.asarray(codes.multiply(codes).sum(0)).ravel() / fired
    lengths = mean * crosscoder.strength_per_unit().numpy()[alive]
    fires = (codes > 0).astype(np.float64)
    spread = np.sqrt(frequency * (1 - frequency)).clip(1e-12)
    phi = ((fires.T @ fires).toarray() / n - np.outer(frequency, frequency)) / np.outer(spread, spread)
    apart = ~np.eye(len(alive), dtype=bool)

    def rounded(values, digits: int = 4) -> tuple[float, ...]:
        return tuple(round(float(v), digits) for v in np.asarray(values))

    def quantiles(values) -> tuple[float, ...]:
        return rounded(np.nanquantile(np.asarray(values), QUANTILES))

    numbers = {
        "l0": fired.sum() / n,
        "exponent": -slope,
        "cv": np.median(np.sqrt(np.maximum(square / mean**2 - 1, 0))),
        "spread": np.log(lengths).std(),
        "cofiring_largest": np.median(np.where(apart, phi, -1).max(1)),
        "norm_ratio": norms[1] / norms[0],
        "spread_ratio": np.sqrt(variances[1] / variances[0]),
        "agreement": (between / n - means[0] @ means[1]) / np.sqrt(variances.prod()),
    }
    return Regime(
        tokens=n,
        width=width,
        frequency_quantiles=quantiles(frequency),
        cofiring_mean=round(float(phi[apart].mean()), 4),
        mean_share=rounded(np.square(means).sum(1) / (variances + np.square(means).sum(1))),
        unexplained=rounded(errors / n / variances),
        alive=len(alive),
        dead_features=round(1 - len(alive) / crosscoder.n_features, 4),
        dead_directions=rounded((spectra < (errors / n / width)[:, None]).mean(1)),
        dimension=rounded(spectra.sum(1) ** 2 / np.square(spectra).sum(1) / width),
        row_cosine=quantiles(crosscoder.cosine(*MODELS)[alive]),
        nrn_quantiles=quantiles(crosscoder.nrn(2, *MODELS[::-1])[alive]),
        **dict(zip(numbers, rounded(list(numbers.values()), 3))),
    )


def from_regime(measured: Regime, width: int = 48, **changes) -> Planted:
    """The generator's parameters for a measured regime, at another width: numbers per direction of the
    residual stream stay the same.

    What no measurement gives is set here: the shares of unique features (of each side, 1/8) and of rescaled
    ones (1/16, by a factor of 3). As many features are planted, and as many active, as the crosscoder has: a
    larger one would have claimed more, so measure through one whose features recur (``judging.recurrence``).
    The rest is half shared, half rotated; the angle is the one that gives the measured agreement of the two
    models' activations, which needs no dictionary. ``changes`` replace any field."""
    total = round(measured.alive * width / measured.width)
    if total == 0:
        raise UserError("no feature fires in this regime: there is nothing to plant")
    factor, n_rescaled, n_unique = 3.0, round(total / 16), round(total / 8)
    rest = total - n_rescaled - 2 * n_unique
    rotated, shared = rest // 2, rest - rest // 2
    variance = rest + n_unique + n_rescaled * (1 + factor**2) / 2
    cosine = (measured.agreement * variance - shared - n_rescaled * factor) / max(rotated, 1)
    ours = Planted(
        width=width,
        shared=shared,
        rotated=rotated,
        rescaled=n_rescaled,
        base_only=n_unique,
        distilled_only=n_unique,
        angle=round(float(np.degrees(np.arccos(np.clip(cosine, 0, 1))))),
        factor=factor,
        l0=round(measured.l0 * width / measured.width, 2),
        correlation=_copula(measured.cofiring_largest, measured.frequency_quantiles[2]),
        noise=round(float(np.mean(measured.unexplained)), 4),
        dead_directions=round(float(np.mean(measured.dead_directions)), 3),
        **{name: getattr(measured, name) for name in ("cv", "spread", "norm_ratio", "mean_share")},
    )
    return replace(ours, exponent=_exponent(ours, measured), **changes)


def _exponent(planted: Planted, measured: Regime) -> float:
    """The exponent whose frequencies have the measured quantiles: least squares of their logarithms."""

    def distance(exponent: float) -> float:
        planned = np.quantile(frequencies(replace(planted, exponent=exponent)), QUANTILES)
        return float(np.square(np.log(planned / np.maximum(measured.frequency_quantiles, 1e-4))).sum())

    return round(float(minimize_scalar(distance, bounds=(0, 3), method="bounded").x), 2)


def _copula(phi: float, frequency: float) -> float:
    """Correlation of two normal variables whose excesses, of this frequency, have the correlation ``phi``."""
    threshold = ndtri(1 - frequency)

    def excess(rho: float) -> float:
        both = stats.multivariate_normal.cdf([-threshold, -threshold], cov=[[1, rho], [rho, 1]])
        return (both - frequency**2) / (frequency * (1 - frequency)) - phi

    if phi <= 0:
        return 0.0
    return round(float(brentq(excess, 0, 0.99)), 3) if excess(0.99) > 0 else 0.99
