"""What is true (TRUTHS, below), and which claims are right.

On planted data a claim is right if, of all directions that are planted in the model of its side, that of a
target of this side is the nearest, with a cosine of at least LIMIT. On the control: if most of its squared
norm lies in the planted dimensions. On tiny: see ``scores.causal_claims``. Each truth has a null, between
whose models nothing was distilled.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
from scipy import sparse

from ..activations.harvest import harvest_activations
from ..activations.store import Store
from ..crosscoder.recurrence import LIMIT
from ..crosscoder.training import TrainConfig
from ..features.control import MOSTLY, planted_share
from ..models.pairs import load_pair
from ..models.reader import open_models
from ..settings import Positive, UserError, check, parameters
from ..steering.ablation import sample_targets
from ..study.planted import KINDS, MODELS, Planted, PlantedStore
from ..text.corpus import build
from .claims import SIDES, Claims
from .finder import Data

# as notebook 12 measures it on the embedded pair; fixed, so that results stay comparable
REGIME = Planted(
    width=24, shared=22, rotated=22, rescaled=4, base_only=8, distilled_only=8, angle=49.0, l0=1.99,
    exponent=0.78, cv=0.571, spread=0.378, correlation=0.766, norm_ratio=0.916, mean_share=(0.1412, 0.1245),
    noise=0.0675, dead_directions=0.297,
)  # fmt: skip
EASY = replace(
    REGIME, shared=11, rotated=11, rescaled=2, base_only=4, distilled_only=4, l0=1.0, exponent=0.5,
    correlation=0.0, noise=0.01, dead_directions=0.0,
)  # fmt: skip
DRIFT = replace(REGIME, shared=0, rotated=36, rescaled=12, angle=70.0)
USED = 0.25  # of the tokens on which a reweighted feature fires it does so in the other model


class Rare(PlantedStore):
    """Each model's own features fire on a share ``often`` of the tokens."""

    name, often = "rare", 0.005

    def fired(self, frequencies: np.ndarray) -> np.ndarray:
        return np.where(self.kinds >= KINDS.index("base_only"), self.often, frequencies)


class Rarest(Rare):
    name, often = "rarest", 0.0005


class Reweighted(PlantedStore):
    """The features that would be one model's own are written alike by both; but the other model uses them on
    a random share USED of the tokens."""

    name = "reweighted"

    def written(self) -> np.ndarray:
        return np.where(self.kinds >= KINDS.index("base_only"), KINDS.index("shared"), self.kinds)

    def used(self, model: str) -> sparse.csr_matrix:
        (other,) = set(MODELS) - {model}
        codes = self.codes.copy()
        thinned = np.flatnonzero(self.kinds[codes.indices] == KINDS.index(f"{other}_only"))
        rng = np.random.default_rng([self.planted.seed, MODELS.index(model)])
        codes.data[thinned[rng.random(len(thinned)) > USED]] = 0
        return codes


@parameters
class Budget:
    """What a test of finders may take. ``planted_tokens`` of a planted store, ``tokens`` harvested of a pair;
    ``epochs``: how often a dictionary is shown the split "train"; ``targets``: positions per category, for
    choosing and for reporting."""

    planted_tokens: Positive = 200_000
    tokens: Positive = 150_000
    epochs: Positive = 2
    targets: Positive = 40


@dataclass(frozen=True)
class Truth:
    """``about``: what is to be found; ``claims``: how many of a finder are judged; ``planted`` and its
    ``store``, or a ``pair``, on which a dictionary has ``n_features`` and ``k``; ``causal``: what is right is
    measured in the models; ``numbers``: in a direction, where the base's configuration is not at hand."""

    name: str
    about: str
    claims: int
    planted: Planted | None = None
    store: type[PlantedStore] = PlantedStore
    pair: str = ""
    n_features: int = 256  # as notebook 02
    k: int = 8
    causal: bool = False
    numbers: int = 0

    @property
    def width(self) -> int:
        """Numbers in a direction: of the planted regime, or as the base's configuration says."""
        if self.planted or self.numbers:
            return self.numbers or self.planted.width
        return load_pair(self.pair).config("base").get_text_config().hidden_size

    def open(self, budget: Budget, seed: int, folder: Path, null: bool = False) -> Data:
        """The data, for a finder; whatever is made from them lies below ``folder``. With another seed
        dictionaries are others, and the data are the same."""
        if self.planted:
            store = _planted(self.store, replace(self.planted, tokens=budget.planted_tokens), null)
            # 1.5 times what is planted, with its L0
            number, k = round(1.5 * self.planted.features), max(1, round(self.planted.l0))
            size = {"n_features": number, "k": k, "batch_size": 512, "aux_k": 16, "dead_after": 0.1}
            labels, folder = {}, Path(folder) / store.fingerprint
        else:
            folder = Path(folder) / self.name / ("null" if null else "pair")
            store = harvested(self.pair, budget.tokens, null, folder)
            names, size = store.models, {"n_features": self.n_features, "k": self.k}
            labels = {"targets": sample_targets(store, budget.targets, "choose")}
            labels["open_model"] = lambda: opened(self.pair, names[1])
        config = TrainConfig(tokens=budget.epochs * store.count("train"), seed=seed, **size)
        return Data(store, config, folder / f"seed_{seed}", **labels)

    def judge(self, data: Data, claims: Claims) -> tuple[np.ndarray, Callable[[np.ndarray], float]]:
        """(is each claim right? bool [n], the recall of a mask of claims). UserError where the outcome is
        causal, which ``scores`` measures."""
        if self.planted:
            return _judge_planted(data.store, claims)
        if self.causal:
            raise UserError(f"claims on {self.name} are judged by their effects")
        return _judge_control(data, claims, load_pair(self.pair).planted)


def _judge_planted(store: PlantedStore, claims: Claims) -> tuple[np.ndarray, Callable]:
    right, hit = np.zeros(len(claims), dtype=bool), np.full(len(claims), -1)
    total = (store.kinds >= KINDS.index("base_only")).sum()
    for side in SIDES:
        rows, target = store.directions[side], store.kinds == KINDS.index(f"{side}_only")
        length = np.linalg.norm(rows, axis=1, keepdims=True)
        cosine = claims.own(side) @ np.where(length > 0, rows / length.clip(1e-12), 0).T
        of_side = claims.side == side
        if of_side.any():
            hit[of_side] = cosine.argmax(1)
            right[of_side] = target[cosine.argmax(1)] & (cosine.max(1) >= LIMIT)
    return right, lambda some: len(set(hit[right & some].tolist())) / total if total else float("nan")


def _judge_control(data: Data, claims: Claims, width: int) -> tuple[np.ndarray, Callable]:
    rows = claims.directions["distilled"]
    right = (claims.side == "distilled") & (planted_share(torch.from_numpy(rows), width) > MOSTLY)
    x = data.store.activations(data.store.rows("report"))[1][:, -width:].double().numpy()
    x = x - x.mean(0)

    def recall(some: np.ndarray) -> float:
        """Share of the variance in the planted dimensions that lies in the span of the right claims."""
        _, values, basis = np.linalg.svd(rows[right & some][:, -width:], full_matrices=False)
        inside = x @ basis[values > 1e-6 * max(values.max(initial=0), 1e-12)].T
        return float(np.square(inside).sum() / np.square(x).sum())

    return right, recall


@cache
def _planted(store: type[PlantedStore], planted: Planted, null: bool) -> PlantedStore:
    return PlantedStore(planted.null()) if null else store(planted)


@cache
def harvested(name: str, tokens: int, null: bool, folder: Path) -> Store:
    """Activations of base and distilled, or base and null_a."""
    pair = load_pair(name)
    pair = pair.between("base", "null_a") if null else pair
    return harvest_activations(pair, build(pair, tokens), folder / "store")


@cache
def opened(name: str, model: str):
    """A model of a pair as nnsight sees it."""
    return open_models(load_pair(name), [model])[model]


EVERY = (
    Truth("planted", "features of one model; the regime measured on the pair tiny_medium", 16, REGIME),
    Truth("easy", "the same, few, sparse and independent", 8, EASY),
    Truth("rare", "features of one model that fire on 0.5% of the tokens", 16, REGIME, Rare),
    Truth("rarest", "the same on 0.05%", 16, REGIME, Rarest),
    Truth("reweighted", "features that one model uses four times as often", 16, REGIME, Reweighted),
    Truth("drift", "features of one model; whatever both have is rotated or rescaled", 16, DRIFT),
    Truth(
        "control", "what is written into the last 8 dimensions (pair tiny_planted)", 8, pair="tiny_planted"
    ),
    Truth("tiny", "directions that the behaviours need (causal)", 8, pair="tiny", causal=True),
)
TRUTHS = {one.name: one for one in EVERY}
# asked for by name alone: the weights of its null are not shipped
REAL = Truth(
    "smol", "the same, in a real language model", 8, pair="smol_traces", n_features=1024, k=16, causal=True,
    numbers=576,
)  # fmt: skip
KNOWN = TRUTHS | {REAL.name: REAL}


def truth(name: str) -> Truth:
    """UserError for an unknown name."""
    return KNOWN[check("truth", name, tuple(KNOWN))]
