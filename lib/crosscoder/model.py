"""The crosscoder: one dictionary of features for several models' activations at once.

A token is seen by every model m; its residual stream there is x_m in R^{d_m}. Activations are first scaled,
x_m <- scale_m * x_m with scale_m = sqrt(d_m) / mean norm, so that no model counts for more because its
numbers are larger. Then, for features i = 1..F::

    pre_i = sum_m  W_enc^m_i . x_m + b_enc_i
    f_i   = s(pre)_i                                          # >= 0, few of them above 0
    x̂_m   = sum_i f_i d_i^m + b_dec^m                         # d_i^m: the decoder row of feature i in model m

A feature has one activation for all models but a decoder row in each, so the lengths of its rows tell whose
it is. With RDN_i = ||d_i^distilled||_p / ||d_i^base||_p, the normalized relative norm is NRN_i = RDN_i / (1 +
RDN_i): 0 only in the base, 0.5 in both alike, 1 only in the distilled model.

Four sparsities s, where v_i = f_i * sum_m ||d_i^m||_2 is a feature's *strength*:

- ``l1``         f = ReLU(pre), and the loss charges  lambda * sum_i v_i  (the paper's).
- ``batchtopk``  f = ReLU(pre) where v_i is among the k*B largest of a batch of B tokens, else 0. After
  training a fixed threshold on v, an average over the training batches, stands for the batch: a token's
  result is its own.
- ``topk``       the same with the k largest strengths of each token, in training and after it.
- ``jumprelu``   f = ReLU(pre) where v_i > theta_i, else 0: a threshold per feature, learned. A step function
  has no gradient, so theta gets that of a smoothed one: H' is 1 / (h theta_i) where |v_i - theta_i| < h
  theta_i / 2, else 0. The loss holds L0 at k.

Thresholds are on the strength, not on pre: pre may be scaled up and the decoder rows down without changing a
reconstruction, and who fires should not change either. JumpReLU's is learned as log theta, and the kernel's
width is a share h of theta itself: nothing depends on the size of the activations.

Any variant may reserve blocks of the dictionary for one model each (``dedicated``): first come the shared
features, then as many for each model. A dedicated feature reads and writes its own model only: its rows in
the others are 0 and stay 0, so that its NRN is exactly 0 or 1.

Sources: Baek & Tegmark 2025 (2503.03730); Lindsey et al. 2024, "Sparse crosscoders"; Bussmann et al. 2024
(BatchTopK, 2412.06410); Gao et al. 2024 (auxiliary loss, 2406.04093); Minder et al. 2025 (BatchTopK
crosscoders, 2504.02922); Rajamanoharan et al. 2024 (JumpReLU, 2407.14435); Karvonen et al. 2025 (SAEBench,
its loss on L0, 2503.09532); Jiralerspong & Bricken 2026 (dedicated features, 2602.11729)."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from ..runs import write_json, write_tensors
from ..settings import UserError, check, integer
from . import fixed, sparse

VARIANTS = ("batchtopk", "topk", "l1", "jumprelu")
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_RESIDUAL = (
    "mean_batch [ sum_m ||x_m - x̂_m||_2^2 + alpha * sum_m ||e_m - ê_m||_2^2 ],  "
    "e = x - x̂ (held fixed), ê = its reconstruction by dead features"
)
LOSS_FORMULAS = {
    "l1": "mean_batch [ sum_m ||x_m - x̂_m||_2^2 + lambda * sum_i f_i * sum_m ||d_i^m||_2 ]",
    "batchtopk": _RESIDUAL,
    "topk": _RESIDUAL,
    "jumprelu": _RESIDUAL.replace(" ],", " ] + lambda * D * (L0 / k - 1)^2,") + ", D = sum_m d_m",
}
SHARED = -1  # owner of a feature that no model has to itself
INITIAL_NORM = 0.08  # of every decoder row; as in the replication that the paper adapted


class CrossCoder(nn.Module):
    """Encoder and decoder for models of any number and any widths.

    - ``widths``: d_m of each model; ``names``: of the models, in the order of their activations.
    - ``n_features``: F, the size of the dictionary; ``variant``: one of ``VARIANTS``.
    - ``k``: features per token (L0) that ``topk`` keeps, ``batchtopk`` on average, and ``jumprelu`` aims at.
    - ``scales``: scale_m of each model; 1 if not given. Inputs and outputs are always RAW.
    - ``seed``: of the initial decoder rows.
    - ``dedicated``: share of the dictionary reserved for each model: the last M blocks of round(share F).

    All in scaled space, the models side by side (D = sum of the widths): ``W_enc`` [F, D], ``b_enc`` [F],
    ``W_dec`` [F, D], ``b_dec`` [D]; jumprelu has ``log_theta`` [F]. Buffers: ``scales`` [M] float64;
    ``means`` [D], the mean activation; ``threshold`` on the strength (batchtopk); ``seen`` [2], tokens shown
    in training and how many distinct ones; not saved: ``owner`` [F], the model of a dedicated feature, else
    -1."""

    def __init__(
        self,
        widths: Sequence[int],
        n_features: int,
        names: Sequence[str] = ("base", "distilled"),
        variant: str = "batchtopk",
        k: int = 32,
        scales: Sequence[float] | None = None,
        seed: int = 0,
        dedicated: float = 0.0,
    ):
        super().__init__()
        check("n_features", n_features, int, low=1)
        check("widths", list(widths), list, low=1)
        check("variant", variant, choices=VARIANTS)
        check("k", k, int, low=1, high=n_features if variant != "l1" else None)
        if len(set(names)) != len(names) or len(names) != len(widths):
            raise UserError(
                f"names are {tuple(names)} for widths {tuple(widths)}: there must be one distinct name per"
                " model"
            )
        scales = [1.0] * len(widths) if scales is None else list(scales)
        if len(scales) != len(widths) or not all(0 < s < float("inf") for s in scales):
            raise UserError(
                f"scales are {scales}: there must be one positive number for each of {', '.join(names)}"
            )
        # features of each model
        own = round(check("dedicated", dedicated, float, low=0, high=1) * n_features)
        if own * len(widths) > n_features:
            raise UserError(
                f"dedicated is {dedicated}: {len(widths)} models can have at most 1/{len(widths)} of the"
                " dictionary each"
            )
        self.names, self.widths = tuple(names), tuple(map(int, widths))
        self.n_features, self.variant, self.k = int(n_features), variant, int(k)
        self.dedicated = float(dedicated)
        self.W_dec = nn.Parameter(initial_rows(self.widths, n_features, seed))
        owner = torch.arange(len(widths)).repeat_interleave(own)
        owner = functional.pad(owner, (n_features - len(owner), 0), value=SHARED)
        self.register_buffer("owner", owner, persistent=False)
        self._clear_foreign(self.W_dec.detach())
        self.W_enc = nn.Parameter(self.W_dec.detach().clone())  # the decoder, transposed
        self.b_enc = nn.Parameter(torch.zeros(n_features))
        self.b_dec = nn.Parameter(torch.zeros(sum(self.widths)))
        if variant == "jumprelu":
            self.log_theta = nn.Parameter(torch.zeros(n_features))
        self._known_factors: tuple = (None, [])
        self.register_buffer("scales", torch.tensor(scales, dtype=torch.float64))
        self.register_buffer("means", torch.zeros(sum(self.widths)))
        self.register_buffer("threshold", torch.zeros(()))
        self.register_buffer("seen", torch.zeros(2, dtype=torch.int64))

    @torch.no_grad()
    def centre(self, means: Sequence[Tensor]) -> None:
        """Begin at the mean (RAW), which features need not learn: b_dec = mean, b_enc = -W_enc mean."""
        self.means.copy_(self.scaled(means))
        self.b_dec.copy_(self.means)
        self.b_enc.copy_(-functional.linear(self.means, self.W_enc))

    @torch.no_grad()
    def independent_rows(self, seed: int) -> None:
        """Begin with another random direction in every model: a feature's rows have nothing in common."""
        for m, columns in enumerate(map(self.columns, self.names)):
            rows = initial_rows([self.widths[m]], self.n_features, seed + 1_000_003 * m)
            self.W_dec[:, columns] = rows
        self._clear_foreign(self.W_dec)
        self.W_enc.copy_(self.W_dec)

    # --- tokens to features and back ------------------------------------------------------------------------

    def scaled(self, acts: Sequence[Tensor]) -> Tensor:
        """RAW activations, one [B, d_m] per model, to the scaled and joined x [B, D]."""
        if (widths := [a.shape[-1] for a in acts]) != list(self.widths):
            raise UserError(f"activations have widths {widths}: this crosscoder reads {self.described()}")
        return torch.cat([a.to(self.W_dec.dtype) * s for a, s in zip(acts, self._factors())], dim=-1)

    def _factors(self) -> list[float]:
        """The scales as numbers, for which a device is asked once and not at every step."""
        key = self.scales.data_ptr(), self.scales._version
        if self._known_factors[0] != key:
            self._known_factors = key, self.scales.tolist()
        return self._known_factors[1]

    def split(self, x: Tensor, raw: bool = False) -> list[Tensor]:
        """Joined [..., D] in scaled space to one [..., d_m] per model; ``raw``: the scale is divided out."""
        parts = x.split(self.widths, dim=-1)
        return [p / s for p, s in zip(parts, self.scales.tolist())] if raw else list(parts)

    def gate(self, f: Tensor) -> Tensor:
        """What inference keeps of f = ReLU(pre) [B, F]; a feature that writes nothing does not fire."""
        per_unit = self.strength_per_unit()
        if self.variant == "l1":
            return f * (per_unit > 0)
        strength = f * per_unit
        if self.variant == "topk":
            least = strength.topk(self.k, dim=-1, sorted=False).values.amin(-1, keepdim=True)
            return f * ((strength >= least) & (per_unit > 0))
        return f * (strength > (self.log_theta.exp() if self.variant == "jumprelu" else self.threshold))

    def encode(self, acts: Sequence[Tensor]) -> Tensor:
        """RAW activations, one [B, d_m] per model, to f [B, F]; a token's do not depend on its batch."""
        return self.gate(torch.relu(functional.linear(self.scaled(acts), self.W_enc, self.b_enc)))

    @torch.no_grad()
    def encode_from(self, name: str, acts: Tensor, fill: str = "mean") -> Tensor:
        """f [..., F] as read from one model's RAW activations [..., d_m]. ``fill``: what stands for the
        others, their mean ("mean"), or this model's scaled activation ("slots"; UserError if widths differ).
        """
        check("fill", fill, choices=("mean", "slots"))
        i, columns = self._index(name), self.columns(name)
        if (width := acts.shape[-1]) != self.widths[i]:
            raise UserError(
                f"activations of {name} have width {width}: this crosscoder reads {self.described()}"
            )
        own, encoder, bias = acts.to(self.W_enc.dtype) * float(self.scales[i]), self.W_enc, self.b_enc
        if fill == "mean":
            encoder = self.W_enc[:, columns]
            own_mean = functional.linear(self.means[columns], encoder)
            bias = self.b_enc + (functional.linear(self.means, self.W_enc) - own_mean)
        elif len(set(self.widths)) > 1:
            raise UserError(
                f"the models have widths {', '.join(map(str, self.widths))}: an activation fits the slots of"
                " the others only where all are alike; take fill 'mean'"
            )
        else:
            own = torch.cat([own] * len(self.names), dim=-1)
        return self.gate(torch.relu(functional.linear(own, encoder, bias)))

    def decode(self, f: Tensor) -> list[Tensor]:
        """Features [B, F] to RAW reconstructions, one [B, d_m] per model."""
        return self.split(f @ self.W_dec + self.b_dec, raw=True)

    def on(self, device: str) -> CrossCoder:
        """This crosscoder on a device: itself, if it is there, else a copy."""
        if self.W_dec.device.type == torch.device(device).type:
            return self
        return copy.deepcopy(self).to(device)

    # --- what the decoder says of each feature --------------------------------------------------------------

    def rows(self, name: str, raw: bool = False) -> Tensor:
        """Decoder rows d_i^m [F, d_m] in scaled space; ``raw``: what one unit of f adds to the residual."""
        return self.split(self.W_dec.detach(), raw)[self._index(name)]

    def bias(self, name: str, raw: bool = False) -> Tensor:
        """Decoder bias b_dec^m [d_m], in scaled space or ``raw``."""
        return self.split(self.b_dec.detach(), raw)[self._index(name)]

    def mean(self, name: str, raw: bool = False) -> Tensor:
        """Mean activation [d_m] of the training tokens, in scaled space or ``raw``: for mean ablation."""
        return self.split(self.means, raw)[self._index(name)]

    def norms(self, p: float = 2) -> Tensor:
        """||d_i^m||_p of every decoder row, [n_models, F], in scaled space."""
        return torch.stack([rows.norm(p=p, dim=-1) for rows in self.split(self.W_dec.detach())])

    def strength_per_unit(self) -> Tensor:
        """sum_m ||d_i^m||_2 [F]: v = f * this is the length that a feature contributes."""
        return torch.stack([torch.linalg.vector_norm(rows, dim=-1) for rows in self.split(self.W_dec)]).sum(0)

    def nrn(self, p: float = 1, model: str = "distilled", reference: str = "base") -> Tensor:
        """Normalized relative norm [F] = ||d^model||_p / (||d^model||_p + ||d^reference||_p); NaN where both
        are 0. The paper takes p = 1; prefer p = 2 where widths differ. Dead features keep what they began
        with."""
        norms = self.norms(p)
        own, other = norms[self._index(model)], norms[self._index(reference)]
        return own / (own + other)

    def cosine(self, a: str = "base", b: str = "distilled") -> Tensor:
        """Cosine similarity [F] of a feature's rows in models a and b; UserError if these differ in width."""
        if self.widths[self._index(a)] != self.widths[self._index(b)]:
            raise UserError(
                f"{a} and {b} differ in width ({self.described()}): rows of unlike spaces have no cosine"
            )
        return functional.cosine_similarity(self.rows(a), self.rows(b), dim=-1)

    def save(self, folder: Path) -> None:
        """Write crosscoder.safetensors and config.json."""
        names = ("widths", "n_features", "names", "variant", "k", *["dedicated"] * bool(self.dedicated))
        write_tensors(Path(folder) / "crosscoder.safetensors", self.state_dict())
        write_json(Path(folder) / "config.json", {name: getattr(self, name) for name in names})

    @classmethod
    def load(cls, folder: Path) -> CrossCoder:
        """Read what ``save`` wrote, for use without gradients. UserError if it is not there."""
        folder = Path(folder)
        try:
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
            state = load_file(folder / "crosscoder.safetensors")
            if missing := {"widths", "n_features", "names", "variant", "k"} - config.keys():
                raise ValueError(f"no {min(missing)}: its default would be a guess")
            crosscoder = cls(**config)
            crosscoder.load_state_dict(state)
        except FileNotFoundError as error:
            raise UserError(
                f"no crosscoder in {folder} ({Path(error.filename or folder).name} is missing): "
                "run notebook 02_train_crosscoder first"
            ) from None
        except (UserError, SafetensorError, RuntimeError, TypeError, ValueError):
            raise UserError(
                f"the crosscoder in {folder} is damaged: remove it and run notebook 02_train_crosscoder again"
            ) from None
        return crosscoder.eval().requires_grad_(False)

    # --- dedicated features, and where a model's coordinates are --------------------------------------------

    @torch.no_grad()
    def mask_gradients(self) -> None:
        """Set to 0 what would give a dedicated feature weights in another model; Adam keeps them at 0."""
        if self.dedicated:
            self._clear_foreign(self.W_enc.grad)
            self._clear_foreign(self.W_dec.grad)

    def _clear_foreign(self, matrix: Tensor) -> None:
        """Set to 0 a model's dedicated features in every other model."""
        for m, other in itertools.permutations(range(len(self.names)), 2):
            matrix[:, self.columns(self.names[other])].masked_fill_((self.owner == m)[:, None], 0)

    def columns(self, name: str) -> slice:
        """Where a model's coordinates lie among the D joined ones."""
        i = self._index(name)
        return slice(sum(self.widths[:i]), sum(self.widths[: i + 1]))

    def _index(self, name: str) -> int:
        if name not in self.names:
            raise UserError(f"unknown model {name!r}: this crosscoder reads {self.described()}")
        return self.names.index(name)

    def described(self) -> str:
        """The models and their widths, for a sentence."""
        return ", ".join(f"{name} ({width})" for name, width in zip(self.names, self.widths))


def initial_rows(widths: Sequence[int], n_features: int, seed: int) -> Tensor:
    """First decoder rows [F, D]: for each feature one random direction, the same in every model (else the
    difference would be noise in NRN); a narrower model takes its first coordinates, at the same length."""
    directions = torch.randn(n_features, max(widths), generator=torch.Generator().manual_seed(seed))
    rows = [INITIAL_NORM * functional.normalize(directions[:, :width], dim=-1) for width in widths]
    return torch.cat(rows, dim=-1)


# --- training: forward, losses ------------------------------------------------------------------------------


@dataclass
class Forward:
    """One training batch in scaled space: x, x_hat [B, D], and the code f [n] at its places ``code``.

    ``aux_hat`` [B, D]: what dead features make of the batch, without bias; None if nothing is dead.
    ``tokens``: of the whole batch, of which these B may be a part; losses are means over the whole batch.
    Jumprelu: ``near`` [F], how many of these tokens have a strength within the kernel about theta;
    ``entries``, those of the code in the whole batch."""

    x: Tensor
    code: sparse.SparseBatch | fixed.DenseBatch
    f: Tensor
    x_hat: Tensor
    aux_hat: Tensor | None = None
    tokens: int = 0
    near: Tensor | None = None
    entries: int = 0

    def __post_init__(self) -> None:
        self.tokens = self.tokens or len(self.x)


def forward(
    crosscoder: CrossCoder,
    acts: Sequence[Tensor],
    dead: Tensor | None = None,
    aux_k: int = 0,
    precision: str = "float32",
    wanted: int | None = None,
    hint: float | Tensor = 0.0,
    gather: Callable[[Tensor], Tensor] = sparse.alone,
    buffers: dict | None = None,
    bandwidth: float = 0.0,
    strongest: Callable[..., sparse.SparseBatch | None] | None = None,
    add: Callable[[Tensor], Tensor] = sparse.alone,
    among: Tensor | None = None,
) -> Forward:
    """A batch of RAW activations through the crosscoder as training does it (BatchTopK looks at the whole
    batch).

    ``dead`` [F] bool: features of which the ``aux_k`` strongest of each token are decoded too, for
    ``auxiliary_loss``. ``precision`` is that of the encoder's product; ``wanted`` (entries that BatchTopK
    keeps; k for each token), ``hint``, ``gather`` and ``buffers`` are those of ``lib.crosscoder.sparse``.
    ``bandwidth``: JumpReLU's h; at 0 there are no thresholds yet, and it selects as BatchTopK. Where
    processes share out the features, ``strongest`` chooses among all that are dead, and ``add`` adds up what
    they decode. ``among`` [n]: the features to look among for dead ones, so that a GPU need not be asked."""
    x = crosscoder.scaled(acts)
    weights = crosscoder.W_enc, crosscoder.b_enc, crosscoder.W_dec
    # alone on a GPU, with shapes that are known beforehand (jumprelu's are not)
    known = gather is sparse.alone and crosscoder.variant != "jumprelu" and fixed.wanted_here(x)
    if crosscoder.variant == "l1":
        if known or (precision != "float32" and gather is sparse.alone):
            code, f, sums = fixed.dense(x, *weights, precision != "float32")
            return Forward(x, code, f, sums + crosscoder.b_dec)
        precision = "float32"  # rounding may change a sign
    encoded = sparse.encode(x, *weights[:2], PRECISIONS[precision], crosscoder.means, buffers)
    edge = None  # jumprelu: the entries within the kernel
    with torch.no_grad():
        per_unit = crosscoder.strength_per_unit()
    if crosscoder.variant == "l1":
        code = sparse.select_positive(encoded)
    elif crosscoder.variant == "topk":
        code = (fixed.select_rows if known else sparse.select_rows)(encoded, per_unit, crosscoder.k)
    elif crosscoder.variant == "jumprelu" and bandwidth:
        theta = crosscoder.log_theta.detach().exp()
        reached = sparse.select_above(encoded, per_unit / theta, 1 - bandwidth / 2, crosscoder.k)
        ratio = reached.values * (per_unit / theta)[reached.features]
        code = reached.where(ratio > 1, reached.floor)
        edge = reached.where((ratio - 1).abs() < bandwidth / 2, reached.floor)
    elif known:
        code = fixed.select_batch(encoded, per_unit, wanted or crosscoder.k * len(x), hint)
    else:
        code = sparse.select_batch(encoded, per_unit, wanted or crosscoder.k * len(x), hint, gather)
    if dead is None or not aux_k or among is not None and not len(among):
        chosen = None
    elif known and among is not None:
        chosen = fixed.select_rows(encoded, per_unit, aux_k, among, dead[among])
    elif strongest:
        chosen = strongest(encoded, per_unit, aux_k, dead)
    else:
        chosen = _strongest(encoded, per_unit, aux_k, dead, known)
    if chosen is None:
        f, sums = sparse.reconstruct(*weights, x, code, buffers)
        sums, aux_hat = add(sums), None
    else:  # in one pass over the weights
        f, sums = sparse.reconstruct(*weights, torch.cat([x, x]), code.above(chosen), buffers)
        f, (sums, aux_hat) = f[: len(code.features)], add(sums).split(len(x))
    out = Forward(x, code, f, sums + crosscoder.b_dec, aux_hat)
    if crosscoder.variant == "jumprelu":
        out.near, out.entries = torch.zeros_like(crosscoder.b_enc), int(gather(code.indptr[-1:]).sum())
        if edge is not None:
            out.near.index_add_(0, edge.features, torch.ones_like(edge.values))
            rise = theta / (bandwidth * per_unit)
            out.x_hat = sparse.jump(out.x_hat, crosscoder.log_theta, crosscoder.W_dec, edge, rise)
    return out


def _strongest(
    encoded: sparse.PreActivations, per_unit: Tensor, k: int, dead: Tensor, known: bool = False
) -> sparse.SparseBatch | None:
    """The k strongest dead features of each token; None if nothing is dead."""
    among = dead.nonzero().squeeze(-1)
    select = fixed.select_rows if known else sparse.select_rows
    return select(encoded, per_unit, k, among) if len(among) else None


def squared_error(out: Forward) -> Tensor:
    """mean_batch sum_m ||x_m - x̂_m||_2^2, in scaled space."""
    return (out.x - out.x_hat).square().sum(-1).sum() / out.tokens


def sparsity_loss(crosscoder: CrossCoder, out: Forward) -> Tensor:
    """mean_batch sum_i f_i sum_m ||d_i^m||_2: what lambda multiplies in the L1 variant."""
    return (out.code.totals(out.f) * crosscoder.strength_per_unit()).sum() / out.tokens


def l0_loss(crosscoder: CrossCoder, out: Forward, bandwidth: float) -> Tensor:
    """(L0 / k - 1)^2, L0 that of the whole batch: JumpReLU's penalty, with SAEBench's aim (2503.09532).

    Its pseudo-gradient reaches log theta alone: dL0 / dlog theta_i = - near_i / (h tokens) (2407.14435, eq.
    12)."""
    excess = out.entries / (crosscoder.k * out.tokens) - 1
    without_value = (out.near * (crosscoder.log_theta - crosscoder.log_theta.detach())).sum()
    slope = -2 * excess / (crosscoder.k * out.tokens * bandwidth) if bandwidth else 0.0
    return slope * without_value + excess**2 * len(out.x) / out.tokens


def auxiliary_loss(out: Forward) -> Tensor:
    """mean_batch sum_m ||e_m - ê_m||_2^2: the dead features' share in explaining what is left over.

    e = x - x̂ without gradient; ê = ``aux_hat``, from ReLU(pre) before selection, so that dead features'
    encoder *and* decoder rows get a gradient. 0 if nothing is dead. Source: Gao et al. 2024, section 2.4."""
    if out.aux_hat is None:
        return out.x_hat.new_zeros(())
    return ((out.x - out.x_hat).detach() - out.aux_hat).square().sum(-1).sum() / out.tokens


def check_feature(crosscoder: CrossCoder, feature: int) -> int:
    """The number of a feature; UserError if there is none of that number."""
    last = crosscoder.n_features - 1
    try:
        return int(check("feature", feature, integer(0, last)))
    except UserError:
        raise UserError(
            f"feature {feature!r} does not exist: this crosscoder has features 0 to {last}"
        ) from None
