"""What finders that train a dictionary share: the views that a dictionary of one model reads, features as
claims, and two of the rankings, by NRN and by change of use."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
from torch import Tensor

from ..crosscoder.codes import encoded, sample_rows
from ..crosscoder.model import CrossCoder
from ..crosscoder.training import Trainer, train
from ..features.use import SoloCodes, use_table
from .claims import SIDES, Claims
from .finder import CHOSEN, Data

QUIET = SimpleNamespace(update=lambda *_: None, close=lambda: None)  # one line of progress for all trainings


class View:
    """A store of one "model" ``name``, whose activations are a sum of the store's scaled ones: of the base
    (1, 0), of the difference (-1, 1)."""

    def __init__(self, store, name: str, weights: tuple[float, float]):
        self.store, self.models = store, (name,)
        self.weights = [w * store.scales[m] for w, m in zip(weights, store.models)]
        self.fingerprint = f"{store.fingerprint}, {name}"
        for attribute in ("documents", "rows", "count", "split", "kept"):
            setattr(self, attribute, getattr(store, attribute))
        (x,) = self.activations(sample_rows(store, "train", CHOSEN))
        self.widths, self.means = {name: x.shape[1]}, {name: x.double().mean(0)}
        self.mean_norms = {name: float(x.norm(dim=1).double().mean())}
        self.scales = {name: x.shape[1] ** 0.5 / max(self.mean_norms[name], 1e-12)}

    def __len__(self) -> int:
        return len(self.store)

    def mixed(self, acts: list[Tensor]) -> list[Tensor]:
        return [sum(w * a.float() for w, a in zip(self.weights, acts) if w)]

    def activations(self, rows) -> list[Tensor]:
        return self.mixed(self.store.activations(rows))

    def reader(self, *place, **how) -> Iterator[tuple[np.ndarray, list[Tensor]]]:
        for rows, acts in self.store.reader(*place, **how):
            yield rows, self.mixed(acts)


def trained(data: Data, name: str, store=None, trainer: type[Trainer] | None = None, **changes) -> CrossCoder:
    """A dictionary of the data's size and seed, trained once and kept in the data's folder."""
    config = replace(data.config, **changes)
    return train(store or data.store, config, data.folder / name, QUIET, trainer_class=trainer)


def strengths(crosscoder: CrossCoder, store, rows: np.ndarray) -> np.ndarray:
    """Mean length that each feature contributes on some rows [F]; 0 is dead."""
    total = sum(f.sum(0) for _, _, f in encoded(crosscoder, store, rows)) / len(rows)
    return (total.cpu() * crosscoder.strength_per_unit()).numpy()


def features(data: Data, crosscoder: CrossCoder, second, confidence) -> Claims:
    """The living features as claims. ``second`` [F]: is the feature the distilled model's? ``confidence``
    [F]; of equals the stronger feature comes first."""
    strength = strengths(crosscoder, data.store, data.chosen)
    order = np.argsort(-strength, kind="stable")[: int((strength > 0).sum())]
    side = np.array(SIDES, dtype=object)[np.asarray(second, dtype=int)]
    rows = (crosscoder.rows(m, raw=True).numpy()[order] for m in crosscoder.names)
    return Claims.of(*rows, side[order], np.asarray(confidence)[order])


def by_nrn(data: Data, crosscoder: CrossCoder) -> Claims:
    """Confidence 2 |NRN - 1/2| (p = 2)."""
    nrn = crosscoder.nrn(2, *data.store.models[::-1]).numpy()
    return features(data, crosscoder, nrn > 0.5, 2 * np.abs(nrn - 0.5))


def by_change(data: Data, solo: SoloCodes) -> tuple[np.ndarray, np.ndarray]:
    """(does the second model use the feature more? [F], confidence 1 - exp(-|change of use|) [F])."""
    base, other = data.store.models
    change = use_table(solo, n_boot=1, model=other, reference=base)["change"].to_numpy()
    return change > 0, 1 - np.exp(-np.abs(change))
