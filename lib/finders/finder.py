"""What a finder is: a function of ``Data`` that returns ``Claims``, under a name.

    @finder("my method", "what it does, in a line")
    def mine(data: Data) -> Claims: ...

A finder sees activations of both models on the splits "train" and "choose", and where the text has labels,
positions before sentences of each category and the second model. It does not see the split "report", nor what
is true.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from ..crosscoder.codes import sample_rows
from ..crosscoder.training import TrainConfig
from ..settings import UserError
from .claims import SIDES, Claims

CHOSEN = 50_000  # tokens of a split that are looked at


@dataclass
class Data:
    """``store``: of two models of one width, the base first. ``config``: size and training of dictionaries,
    and the seed. ``folder``: for what is trained, the same for all finders. Where the text has labels:
    ``targets`` (``ablation.sample_targets`` on "choose") and ``open_model``, which gives the second model."""

    store: object
    config: TrainConfig
    folder: Path
    targets: pd.DataFrame | None = None
    open_model: Callable | None = None

    @cached_property
    def chosen(self) -> np.ndarray:
        """Rows of the split "choose"."""
        return sample_rows(self.store, "choose", CHOSEN)

    def scaled(self, rows: np.ndarray) -> list[torch.Tensor]:
        """Activations of both models, scaled: mean norm sqrt(d)."""
        store = self.store
        return [a.float() * store.scales[m] for m, a in zip(store.models, store.activations(rows))]

    def raw(self, rows: torch.Tensor) -> list[np.ndarray]:
        """Directions in scaled space [n, d] as directions in each model's raw space."""
        return [(rows / self.store.scales[m]).numpy() for m in self.store.models]


@dataclass(frozen=True)
class Finder:
    name: str
    about: str
    find: Callable[[Data], Claims]
    labels: bool  # does it need a text with labels?
    seeded: bool  # does it depend on a seed?


FINDERS: dict[str, Finder] = {}


def finder(name: str, about: str, labels: bool = False, seeded: bool = True) -> Callable:
    """A decorator that enters a finder under its name."""

    def enter(find: Callable[[Data], Claims]) -> Callable[[Data], Claims]:
        FINDERS[name] = Finder(name, about, find, labels, seeded)
        return find

    return enter


def fit(name: str, data: Data) -> Claims:
    """What a finder claims of the data. UserError for an unknown name, or a finder that needs labels."""
    if name not in FINDERS:
        raise UserError(f"unknown finder {name!r}: there are {', '.join(FINDERS)}, or a file of claims")
    if FINDERS[name].labels and data.targets is None:
        raise UserError(f"the finder {name!r} needs a text with labels, and these data have none")
    return FINDERS[name].find(data)


def differences(data: Data, rows: np.ndarray) -> torch.Tensor:
    """x_distilled - x_base on some rows of the store, both scaled [n, d]."""
    base, other = data.scaled(rows)
    return other - base


def sided(
    data: Data, rows: np.ndarray, v: torch.Tensor, f: torch.Tensor, order=None, side: str = ""
) -> Claims:
    """Claims of directions of the *difference* x_distilled - x_base, from how strongly each is present.

    ``v`` [n, d] in scaled space, ``f`` [tokens, n]: their strengths on ``rows`` of the store. beta_m is the
    slope of x_m . v on f: a direction that only the distilled model has gives (1, 0), one that only the base
    has (0, -1), a rotated one about (1/2, -1/2). The side is that of the larger |beta|, which also gives the
    sign; the confidence is 1 - |smaller| / |larger|. ``order`` [n]: of equal confidence, largest first.
    ``side``: where it is "distilled" by definition, as of a mean difference; then the confidence is |beta| of
    this model over the sum of both.
    """
    v, f = v / v.norm(dim=1, keepdim=True).clamp(min=1e-12), f.cpu()  # a GPU may have encoded
    f = f - f.mean(0) if len(f) > 1 and float(f.var(0).max()) > 0 else f  # a constant has a mean alone
    betas = torch.stack([(x @ v.T * f).sum(0) for x in data.scaled(rows)]).double()
    size, second = betas.abs(), betas[1].abs() > betas[0].abs()
    confidence = 1 - size.amin(0) / size.amax(0).clamp(min=1e-12)
    if side:
        second = torch.full_like(second, side == SIDES[1])
        confidence = torch.where(second, size[1], size[0]) / size.sum(0).clamp(min=1e-12)
    sign = torch.ones_like(betas[0]) if side else torch.where(second, betas[1].sign(), betas[0].sign())
    base, distilled = data.raw(v * sign[:, None].float())
    base[second.numpy()], distilled[~second.numpy()] = 0, 0  # of the other model nothing is claimed
    order = np.arange(len(v)) if order is None else np.argsort(-np.asarray(order), kind="stable")
    sides = np.array(SIDES, dtype=object)[second.numpy().astype(int)]
    return Claims.of(base[order], distilled[order], sides[order], confidence.numpy()[order])
