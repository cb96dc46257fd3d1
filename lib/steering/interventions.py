"""What can be done to a residual stream while a model writes. ``lib.steering.generate`` applies it.

An intervention has ``change(state)``, what is added to the writer's residual stream, [rows, positions, d], at
the layer that the crosscoder reads, and ``reads_other``: whether the other model has to be run too. Features
are "joint" (encoded from both models), "own" (from the writer alone) or "other" (from the other alone). To
encode from one model alone, the other's slot is filled with its mean (``fill`` "mean") or, for models of one
width, with the same scaled activation ("slots"). Neither is what the crosscoder was trained on: compare swaps
with ``Reconstruct("own")``. All but ``Reconstruct`` and ``Transplant`` keep the crosscoder's error.

The names of the classes and their fields stand in fingerprints of transcripts that are kept on disk."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor

from ..crosscoder.model import CrossCoder
from ..settings import UserError

DIRECTIONS = 4096  # random directions that ``RandomLike`` uses in turn


@dataclass
class State:
    """Residual streams of some rows of a batch at their newest positions.

    ``acts`` {model: raw [rows, positions, d_m]}; ``position`` [rows, positions] in the text; ``key`` [rows],
    a number that belongs to the task; ``rows`` [rows], their numbers among all rows that are generated.
    Features are computed when they are asked for, once."""

    crosscoder: CrossCoder | None
    writer: str
    acts: Mapping[str, Tensor]
    position: Tensor
    key: Tensor
    rows: Tensor
    computed: dict = field(default_factory=dict)

    @property
    def other(self) -> str:
        return next(name for name in self.crosscoder.names if name != self.writer)

    def features(self, source: str, fill: str = "mean") -> Tensor:
        """f [rows, positions, F] from ``source``: "joint", "own" (the writer alone) or "other"."""
        if (source, fill) not in self.computed:
            if source == "joint":
                f = self.crosscoder.encode([self.acts[name] for name in self.crosscoder.names])
            else:
                name = self.writer if source == "own" else self.other
                f = self.crosscoder.encode_from(name, self.acts[name], fill)
            self.computed[source, fill] = f
        return self.computed[source, fill]

    def decoder(self, model: str | None = None) -> Tensor:
        """Raw decoder rows [F, d] of ``model`` (default: the writer's), in the writer's units."""
        crosscoder, model = self.crosscoder, model or self.writer
        if ("decoder", model) not in self.computed:
            width = dict(zip(crosscoder.names, crosscoder.widths))
            if width[model] != width[self.writer]:
                raise UserError(
                    f"the decoder of {model} has width {width[model]}, {self.writer} has"
                    f" {width[self.writer]}: it cannot be used in its place"
                )
            scale = float(crosscoder.scales[crosscoder.names.index(self.writer)])
            self.computed["decoder", model] = crosscoder.rows(model) / scale
        return self.computed["decoder", model]


@dataclass(frozen=True)
class Scale:
    """sum_{i in features} (weight_i f_i + offset_i) d_i^decoder.

    Weight -1 and offset 0 remove the features (zero-ablation); offset = mean activation replaces them by
    their mean; weight g - 1 multiplies their use by g. ``source``: "joint" or "own". ``decoder`` None is the
    writer's own; another model's must have the same width."""

    features: tuple[int, ...]
    weights: tuple[float, ...] | float = -1.0
    offsets: tuple[float, ...] | float = 0.0
    source: str = "joint"
    decoder: str | None = None
    fill: str = "mean"

    @property
    def reads_other(self) -> bool:
        return self.source != "own"

    def change(self, state: State) -> Tensor:
        chosen = list(self.features)
        f = state.features(self.source, self.fill)[..., chosen]
        weights, offsets = (torch.as_tensor(x, dtype=f.dtype) for x in (self.weights, self.offsets))
        return (f * weights + offsets) @ state.decoder(self.decoder)[chosen]


@dataclass(frozen=True)
class Swap:
    """sum_i (f_i^source - f_i^own) d_i^writer: the features as ``source`` ("other" or "joint") gives them, in
    place of those that the writer alone gives. ``features`` None: all."""

    source: str = "other"
    features: tuple[int, ...] | None = None
    fill: str = "mean"
    reads_other = True

    def change(self, state: State) -> Tensor:
        chosen = slice(None) if self.features is None else list(self.features)
        difference = state.features(self.source, self.fill) - state.features("own", self.fill)
        return difference[..., chosen] @ state.decoder()[chosen]


@dataclass(frozen=True)
class Reconstruct:
    """decode(f)^writer - h: the stream is replaced, with the error. ``source``: "joint", "own", "other"."""

    source: str
    fill: str = "mean"

    @property
    def reads_other(self) -> bool:
        return self.source != "own"

    def change(self, state: State) -> Tensor:
        bias = state.crosscoder.bias(state.writer, raw=True)
        return state.features(self.source, self.fill) @ state.decoder() + bias - state.acts[state.writer]


@dataclass(frozen=True)
class Transplant:
    """x_other - h, in the units of the writer: the other model's activation in place of the writer's. Models
    of one width only."""

    reads_other = True

    def change(self, state: State) -> Tensor:
        scales = dict(zip(state.crosscoder.names, state.crosscoder.scales.tolist()))
        h, x = state.acts[state.writer], state.acts[state.other]
        if h.shape[-1] != x.shape[-1]:
            raise UserError(
                f"{state.other} has width {x.shape[-1]}, {state.writer} has {h.shape[-1]}: a transplant needs"
                " models of one width"
            )
        return x * (scales[state.other] / scales[state.writer]) - h


@dataclass(frozen=True)
class RandomLike:
    """Random directions with, at each position, the norm of what ``reference`` would change there. The
    direction is decided by the task and the position."""

    reference: object
    seed: int = 0

    @property
    def reads_other(self) -> bool:
        return self.reference.reads_other

    def change(self, state: State) -> Tensor:
        norms = self.reference.change(state).norm(dim=-1, keepdim=True)
        table = _directions(state.acts[state.writer].shape[-1], self.seed)
        return norms * table[(state.key[:, None] + 7919 * state.position) % DIRECTIONS]


@cache
def _directions(width: int, seed: int) -> Tensor:
    noise = torch.randn(DIRECTIONS, width, generator=torch.Generator().manual_seed(seed))
    return noise / noise.norm(dim=-1, keepdim=True)


@dataclass(frozen=True)
class AddVector:
    """One direction, ``vector`` [d] as a tuple, times ``strength`` (with sign); its length is 1, or at each
    position the norm of what ``reference`` would change there."""

    vector: tuple[float, ...]
    strength: float = 1.0
    reference: object | None = None

    @property
    def reads_other(self) -> bool:
        return self.reference is not None and self.reference.reads_other

    def change(self, state: State) -> Tensor:
        h = state.acts[state.writer]
        vector = torch.tensor(self.vector, dtype=h.dtype)
        unit = vector / vector.norm()
        size = 1.0 if self.reference is None else self.reference.change(state).norm(dim=-1, keepdim=True)
        return (self.strength * size * unit).expand_as(h)


@dataclass(frozen=True, eq=False)
class RowVectors:
    """A vector of its own for every row that is generated, ``vectors`` [rows, d]: many directions and
    strengths in one batch."""

    vectors: Tensor
    reads_other = False

    def change(self, state: State) -> Tensor:
        return self.vectors[state.rows][:, None].expand(-1, state.position.shape[1], -1)


@dataclass(frozen=True)
class LogitBias:
    """No change of the residual stream: ``value`` is added to the logits of ``words`` where it acts."""

    words: tuple[str, ...]
    value: float
    reads_other = False
