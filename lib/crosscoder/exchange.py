"""Crosscoders trained elsewhere, in the two formats in which most are published, and ours written in these
formats.

A crosscoder is a function of raw activations. Read into ours, it is the same function: f and x̂ are equal for
every token.

**replication**: the state dict of the replication that the paper adapted, and of the paper's own code
(neelnanda-io/Crosscoders, ckkissane/crosscoder-model-diff-replication, david-baek/deepseek-diff): weights in
cc_weights.pt with cfg.json, or in qwen-1.5b_13.pt with qwen-1.5b_13_cfg.json; ``W_enc`` [M, d, F], ``W_dec``
[F, M, d], ``b_enc`` [F], ``b_dec`` [M, d], and for x scaled as ours::

    f = ReLU(sum_m x_m W_enc_m + b_enc),    x̂_m = sum_i f_i W_dec_im + b_dec_m

The scale, sqrt(d) / mean norm, is in neither file, so it must be given: 1 where it was folded into the
weights before they were published. (The paper's code takes the mean over all positions, the first of each
sequence with its giant norm too: its scale is a little below ours.) A later variant adds ``threshold`` and
``k``: f is kept where f_i * sum_m ||W_dec_im||_2 > threshold, which is our BatchTopK.

**dictionary_learning**: the fork by science-of-finetuning (jkminder/dictionary_learning), classes CrossCoder
and BatchTopKCrossCoder, as saved by PyTorchModelHubMixin (config.json, model.safetensors) or by its trainer
(a .pt): ``encoder.weight`` [M, d, F], ``encoder.bias`` [F], ``decoder.weight`` [M, F, d], ``decoder.bias``
[M, d]; BatchTopK has ``threshold`` and ``k``; most have ``code_normalization_id``, and since 2025
``activation_mean``, ``activation_std`` [M, d] (NaN: no normalisation), ``activation_global_scale`` [M] and
``target_rms``. With g that scale::

    f = ReLU(sum_m (x_m - mean_m) g_m W_enc_m + b_enc),    kept where f_i n_i > threshold
    x̂_m = (sum_i f_i W_dec_im + b_dec_m) / (g_m + 1e-8) + mean_m

Our scale is g + 1e-8, so the decoder rows stay what they are, NRN and strengths too, and the encoder takes up
the difference. n_i is the code normalisation: CROSSCODER (sum_m ||W_dec_im||) is our strength. For SAE (the
norm over all models), MIXED (a sum of both) and NONE (1) the rule f_i n_i > t is the same as: strength_i >
theta_i = t * strength per unit_i / n_i, our JumpReLU. DECOUPLED with thresholds gives each model an f of its
own, which no crosscoder here has, and is refused.

Weights are read without running anything from the file. What neither the file nor the caller says is asked
for, never guessed: which model comes first, the scale, the layer. Our exports say so themselves in
origin.json, beside the files of the format.
"""

from __future__ import annotations

import json
import pickle
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..runs import made_folder, whole_file, write_state, write_text
from ..settings import UserError
from .model import INITIAL_NORM, CrossCoder

ORIGIN = "origin.json"  # {format, order, layers, scales}: what the formats themselves do not say
REPLICATION, DICTIONARY_LEARNING = "replication", "dictionary_learning"
# numbered from 1 in code_normalization_id
CODE_NORMALIZATIONS = ("CROSSCODER", "SAE", "MIXED", "NONE", "DECOUPLED")
WEIGHTS = (".safetensors", ".pt", ".pth")  # endings of files that hold tensors
EPSILON = 1e-8  # that dictionary_learning adds to its scale when it decodes
_WEIGHTS = {
    REPLICATION: {"W_enc", "W_dec", "b_enc", "b_dec"},
    DICTIONARY_LEARNING: {"encoder.weight", "encoder.bias", "decoder.weight", "decoder.bias"},
}
_NORMALISER = {"activation_mean", "activation_std", "activation_global_scale", "target_rms"}
_ALSO = {
    REPLICATION: {"threshold", "k"},
    DICTIONARY_LEARNING: {"threshold", "k", "code_normalization_id", *_NORMALISER},
}
_HOOK = re.compile(r"blocks\.(\d+)\.hook_resid_(pre|post)")
# keys of a configuration that speak of another rule than ReLU
_OTHER_SPARSITY = re.compile(r"top_?k|k_sparsity|^k$", re.IGNORECASE)


@dataclass(frozen=True)
class Foreign:
    """A crosscoder as it was found: in our form, the layer whose output each model was read at, and its
    format.

    ``has_means``: the file knew the mean activations. If not, ``crosscoder.means`` are 0 until they are taken
    from a store. ``fve``: what its model card says of each model, if there is one.
    """

    crosscoder: CrossCoder
    layers: dict[str, int]
    format: str
    has_means: bool = False
    fve: dict[str, float] | None = None


def read_replication(
    file: Path,
    order: Sequence[str] | None = None,
    scales: Mapping[str, float] | None = None,
    layer: int | None = None,
    names: Sequence[str] | None = None,
) -> Foreign:
    """A crosscoder in the format of the replication; ``file``: its weights, or the folder with them.

    ``order``: names of the models as the file has them, first to last, such as ("base", "distilled").
    ``scales``: {name: what raw activations are multiplied by}. ``layer``: index of the decoder layer whose
    output was read; the input of block n is the output of n - 1. ``names``: the order in which they are
    wanted. UserError if one of these is neither given nor in the file, or if the file is in another format.
    """
    file = weights_file(file)
    state, cfg = tensors(file), _configuration(file)
    _expect(state, REPLICATION, file)
    origin = _json(file.with_name(ORIGIN))
    n_models = _sizes(state, {"W_enc": "Mdf", "W_dec": "fMd", "b_enc": "f", "b_dec": "Md"}, file)["M"]
    order = _order(order, origin, n_models, file, cfg)
    thresholded = "threshold" in state
    other_rules = [
        f"{key} = {value}"
        for key, value in cfg.items()
        if (_OTHER_SPARSITY.search(key) and value not in (None, 0, False))
        or (key == "sparsity_type" and value not in ("l1", "relu", None))
    ]
    if other_rules and not thresholded:
        raise UserError(
            f"{file.name} was not trained with ReLU alone ({', '.join(other_rules)}), but has no threshold"
            " for single tokens: what it does at inference cannot be known from it"
        )
    scales = _scales(
        scales,
        origin.get("scales"),
        order,
        file,
        "its format does not hold them. They are sqrt(d) / mean norm of the activations it was trained on"
        " (store.scales, if these were like yours), or 1 for each if they were folded into the weights",
    )
    crosscoder = _build(
        order,
        names or order,
        scales,
        state["W_enc"].permute(0, 2, 1),
        state["W_dec"].permute(1, 0, 2),
        state["b_enc"],
        state["b_dec"],
        _threshold(state, file) if thresholded else None,
        state.get("k"),
    )
    stated = origin.get("layers") or _layer_of_hook(cfg.get("hook_point"), file)
    return Foreign(crosscoder, _layers(layer, stated, order, file), REPLICATION)


def read_dictionary_learning(
    file: Path,
    order: Sequence[str] | None = None,
    scales: Mapping[str, float] | None = None,
    layer: int | None = None,
    names: Sequence[str] | None = None,
) -> Foreign:
    """A crosscoder in the format of the dictionary_learning fork; parameters and errors as in
    ``read_replication``.

    Its scales are in its buffers; a file without them reads raw activations. ``scales`` is for those that
    were trained on activations that somebody had scaled before.
    """
    file = weights_file(file)
    state, config = tensors(file), _configuration(file)
    _expect(state, DICTIONARY_LEARNING, file)
    origin = _json(file.with_name(ORIGIN))
    trainer = config.get("trainer") or {}
    shapes = {"encoder.weight": "Mdf", "decoder.weight": "Mfd", "encoder.bias": "f", "decoder.bias": "Md"}
    sizes = _sizes(state, shapes, file)
    n_models, width = sizes["M"], sizes["d"]
    understood = {
        "encoder_layers": (None, list(range(n_models))),
        "num_decoder_layers": (None, n_models),
        "latent_processor": (None,),
    }
    for key, fine in understood.items():
        if config.get(key) not in fine:
            raise UserError(
                f"{file.name} has {key} = {config[key]}: only crosscoders that read and write all of their"
                " models, with nothing between, can be expressed here"
            )
    order = _order(order, origin, n_models, file, trainer)
    means, g = _normaliser(state, n_models, width, file)
    W_enc, W_dec = state["encoder.weight"].permute(0, 2, 1), state["decoder.weight"]  # [M, F, d] both
    b_enc, b_dec, outer = state["encoder.bias"], state["decoder.bias"], {n: 1.0 for n in order}
    if g is not None:
        if scales is not None:
            raise UserError(
                f"{file.name} holds the scales of its activations itself: scales must not be given"
            )
        outer = dict(zip(order, (g + EPSILON).tolist()))
        b_enc = b_enc.double() - torch.einsum("mfd,md->f", W_enc.double(), means * g[:, None])
        b_dec = b_dec.double() + means * (g + EPSILON)[:, None]
        W_enc = W_enc.double() * (g / (g + EPSILON))[:, None, None]
    elif scales is not None or origin.get("scales"):
        outer = _scales(scales, origin.get("scales"), order, file, "")
    threshold = _threshold(state, file) if "threshold" in state else None
    theta = None
    if threshold is not None and (kind := _code_normalization(state, config, trainer, file)) != "CROSSCODER":
        theta = _theta(threshold, W_dec.double(), kind, config, file)
    crosscoder = _build(
        order,
        names or order,
        outer,
        W_enc,
        W_dec,
        b_enc,
        b_dec,
        threshold,
        state.get("k"),
        theta,
        None if means is None else means * (g + EPSILON)[:, None],
    )
    layers = _layers(layer, origin.get("layers") or trainer.get("layer"), order, file)
    return Foreign(crosscoder, layers, DICTIONARY_LEARNING, means is not None)


# --- ours, for others ---------------------------------------------------------------------------------------


def export_replication(crosscoder: CrossCoder, folder: Path, layer: int) -> None:
    """Write cc_weights.pt and cfg.json as the replication reads them, and origin.json. ``layer``: whose
    output the models were read at.

    The format knows ReLU and models of one width. As in the original, activations must be multiplied by the
    scales before; origin.json has them. UserError, with the reason, for what the format cannot express.
    """
    if crosscoder.variant != "l1":
        raise UserError(
            f"this crosscoder is {crosscoder.variant}, and the replication's code applies ReLU alone: every"
            " feature would fire that is held back here"
            + (" (export_dictionary_learning takes it)" if crosscoder.variant == "batchtopk" else "")
        )
    W_enc, W_dec, b_dec = _stacked(crosscoder)
    state = {
        "W_enc": W_enc.permute(0, 2, 1),
        "W_dec": W_dec.permute(1, 0, 2),
        "b_enc": crosscoder.b_enc.detach(),
        "b_dec": b_dec,
    }
    cfg = {
        "seed": 0,
        "dict_size": crosscoder.n_features,
        "d_in": crosscoder.widths[0],
        "enc_dtype": "fp32",
        "dec_init_norm": INITIAL_NORM,
        "device": "cpu",
        "site": "resid_post",
        "hook_point": f"blocks.{int(layer)}.hook_resid_post",
    }
    folder = made_folder(folder)
    write_state(
        folder / "cc_weights.pt",
        {name: t.clone(memory_format=torch.contiguous_format) for name, t in state.items()},
    )
    write_text(folder / "cfg.json", json.dumps(cfg, indent=2) + "\n")
    _write_origin(crosscoder, folder, REPLICATION, layer, scales=True)


def export_dictionary_learning(crosscoder: CrossCoder, folder: Path, layer: int) -> None:
    """Write model.safetensors and config.json as the fork's ``from_pretrained`` reads them, and origin.json.

    "l1" becomes a CrossCoder, "batchtopk" a BatchTopKCrossCoder; scales and mean activations become its
    normalisation. UserError, with the reason, for what the format cannot express.
    """
    if crosscoder.variant not in ("l1", "batchtopk"):
        raise UserError(
            f"this crosscoder is {crosscoder.variant}: the format has ReLU and one threshold for all"
            " features, "
            + ("not one for each" if crosscoder.variant == "jumprelu" else "not the k largest of a token")
        )
    W_enc, W_dec, b_dec = _stacked(crosscoder)
    s = crosscoder.scales.double()
    g = (s - EPSILON).float()
    means = torch.stack(crosscoder.split(crosscoder.means.double())) / s[:, None]  # raw
    shift = means * g.double()[:, None]
    encoder = W_enc.double() * (s / g.double())[:, None, None]
    b_enc = crosscoder.b_enc.detach().double() + torch.einsum("mfd,md->f", encoder, shift)
    state = {
        "encoder.weight": encoder.permute(0, 2, 1),
        "encoder.bias": b_enc,
        "decoder.weight": W_dec,
        "decoder.bias": b_dec.double() - means * s[:, None],
        "activation_mean": means,
        "activation_std": (
            ((1 / g.double()) ** 2 - EPSILON).clamp(min=0).sqrt()[:, None].expand_as(means)
            / means.shape[1] ** 0.5
        ),
        "activation_global_scale": g,
        "target_rms": torch.tensor(1.0),
    }
    state = {name: t.float().contiguous() for name, t in state.items()}
    state["code_normalization_id"] = torch.tensor(1)
    config = {
        "activation_dim": crosscoder.widths[0],
        "dict_size": crosscoder.n_features,
        "num_layers": len(crosscoder.names),
        "code_normalization": "CROSSCODER",
        "target_rms": 1.0,
    }
    if crosscoder.variant == "batchtopk":
        state |= {
            "threshold": crosscoder.threshold.float().clone(),
            "k": torch.tensor(crosscoder.k, dtype=torch.int32),
        }
        config["k"] = crosscoder.k
    folder = made_folder(folder)
    with whole_file(folder / "model.safetensors") as scratch:
        save_file(state, scratch)
    write_text(folder / "config.json", json.dumps(config, indent=2) + "\n")
    _write_origin(crosscoder, folder, DICTIONARY_LEARNING, layer, scales=False)


def _stacked(crosscoder: CrossCoder) -> tuple[Tensor, Tensor, Tensor]:
    """W_enc, W_dec [M, F, d], b_dec [M, d] in scaled space; UserError for models of different widths."""
    if len(set(crosscoder.widths)) > 1:
        raise UserError(
            f"the models have widths {', '.join(map(str, crosscoder.widths))}: this format stacks them in one"
            " array, so they must be equal"
        )
    return tuple(
        torch.stack(crosscoder.split(t.detach()))
        for t in (crosscoder.W_enc, crosscoder.W_dec, crosscoder.b_dec)
    )


def _write_origin(crosscoder: CrossCoder, folder: Path, form: str, layer: int, scales: bool) -> None:
    origin = {
        "format": form,
        "order": crosscoder.names,
        "layers": {name: int(layer) for name in crosscoder.names},
    }
    if scales:
        origin["scales"] = dict(zip(crosscoder.names, crosscoder.scales.tolist()))
    write_text(folder / ORIGIN, json.dumps(origin, indent=2) + "\n")


# --- files --------------------------------------------------------------------------------------------------


def weights_file(source: Path) -> Path:
    """The one file of weights that ``source``, a file or a folder, means; one folder below is looked into as
    well.
    """
    source = Path(source)
    if source.is_file():
        return source
    files = [
        p
        for pattern in ("*", "*/*")
        for p in sorted(source.glob(pattern))
        if p.name.endswith(WEIGHTS) and p.is_file()
    ]
    if len(files) == 1:
        return files[0]
    listed = ", ".join(p.relative_to(source).as_posix() for p in files[:8])
    raise UserError(
        f"{source} has several files of weights ({listed}): name one of them"
        if files
        else f"no weights in {source}: there must be a .safetensors or a .pt file"
    )


def tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a file, by name, on the CPU. UserError if it is damaged, or holds anything that would
    have to be run.
    """
    try:
        state = (
            load_file(file)
            if file.suffix == ".safetensors"
            else torch.load(file, map_location="cpu", weights_only=True)
        )
    except pickle.UnpicklingError:
        raise UserError(
            f"{file.name} holds more than tensors, or is damaged: reading it whole could run code of whoever"
            " wrote it, so it is not read; ask for safetensors, or for a plain state dict"
        ) from None
    except (SafetensorError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise UserError(
            f"{file.name} is damaged ({(str(error).splitlines() or [''])[0][:100]}): download it again"
        ) from None
    for wrapped in ("model_state_dict", "state_dict"):
        state = state[wrapped] if isinstance(state, dict) and isinstance(state.get(wrapped), dict) else state
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
        raise UserError(f"{file.name} is no state dict: it must hold tensors by their names")
    # compiled, or trained on several GPUs
    return {name.removeprefix("_orig_mod.").removeprefix("module."): t for name, t in state.items()}


def format_of(state: Mapping[str, Tensor], file: Path) -> str:
    """Which of the formats the names of tensors belong to. UserError if to none."""
    for form, names in _WEIGHTS.items():
        if names <= state.keys():
            return form
    raise UserError(
        f"{file.name} is in no format that is known here: it holds {', '.join(sorted(state)[:8])}; known are "
        + " and ".join(", ".join(sorted(names)) for names in _WEIGHTS.values())
    )


def _expect(state: Mapping[str, Tensor], form: str, file: Path) -> None:
    if (actual := format_of(state, file)) != form:
        raise UserError(f"{file.name} is in the format {actual}, not {form}")
    if unknown := state.keys() - _WEIGHTS[form] - _ALSO[form]:
        raise UserError(
            f"{file.name} also holds {', '.join(sorted(unknown))}: a variant that is not known here, and"
            " would be read wrongly without it"
        )
    for name in _WEIGHTS[form]:
        if not torch.isfinite(state[name]).all():
            raise UserError(f"{file.name}: {name} has values that are not finite")


def _sizes(state: Mapping[str, Tensor], shapes: Mapping[str, str], file: Path) -> dict[str, int]:
    """The size that each letter of ``shapes`` {name: one letter a dimension} stands for; the first tensor
    says them, the others must agree.
    """
    sizes: dict[str, int] = {}
    for name, letters in shapes.items():
        shape = list(state[name].shape)
        if not sizes and len(shape) != len(letters):
            raise UserError(f"{file.name}: {name} has shape {shape}, it must have {len(letters)} dimensions")
        sizes = sizes or dict(zip(letters, shape))
        if shape != (wanted := [sizes[letter] for letter in letters]):
            raise UserError(f"{file.name}: {name} has shape {shape}, the encoder's weights ask for {wanted}")
    return sizes


def _configuration(file: Path) -> dict:
    """All that JSON files beside the weights say; of several that speak of the same, the most particular."""
    merged: dict = {}
    for name in (f"{file.stem}_cfg.json", "cfg.json", "config.json", "trainer_config.json"):
        merged = {**_json(file.with_name(name)), **merged}
    return merged


def _json(file: Path) -> dict:
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise UserError(f"{file.name} is damaged: it must be a JSON object")
    return content


# --- what the file does not say -----------------------------------------------------------------------------


def _order(given, origin: Mapping, n_models: int, file: Path, cfg: Mapping) -> tuple[str, ...]:
    stated = origin.get("order")
    if given is not None and stated is not None and list(given) != list(stated):
        raise UserError(
            f"order is {tuple(given)}, and {ORIGIN} beside {file.name} says {tuple(stated)}: one of them"
            " is wrong"
        )
    if (order := given or stated) is None:
        models = ", ".join(
            f"{k} = {v}" for k, v in cfg.items() if k.startswith(("model_", "lm_name")) and isinstance(v, str)
        )
        raise UserError(
            f"{file.name} does not say which of its {n_models} models is "
            f"which{f' (its configuration has {models})' if models else ''}: give "
            'order, their names from first to last, such as ("base", "distilled")'
        )
    if len(order) != n_models or len(set(order)) != n_models:
        raise UserError(
            f"order is {tuple(order)}: {file.name} has {n_models} models, and each needs a name of its own"
        )
    return tuple(order)


def _scales(given, stated, order: Sequence[str], file: Path, advice: str) -> dict[str, float]:
    if (scales := given if given is not None else stated) is None:
        raise UserError(f"{file.name} needs scales, {{name: factor}} for {', '.join(order)}: {advice}")
    if set(scales) != set(order) or not all(0 < float(s) < float("inf") for s in scales.values()):
        raise UserError(
            f"scales are {dict(scales)}: there must be one positive number for each of {', '.join(order)}"
        )
    return {name: float(scales[name]) for name in order}


def _layer_of_hook(hook, file: Path) -> int | None:
    if hook is None:
        return None
    if not (match := _HOOK.fullmatch(str(hook))) or (match[1], match[2]) == ("0", "pre"):
        raise UserError(
            f"{file.name} was trained at {hook}: here activations are the output of a decoder layer"
            " (hook_resid_post of a block, or hook_resid_pre of the next one)"
        )
    return int(match[1]) - (match[2] == "pre")


def _layers(given, stated, order: Sequence[str], file: Path) -> dict[str, int]:
    """{name: layer} from what the caller gives and the file says: one number for all models, or each."""
    given, stated = (
        None if layer is None else {n: int(layer[n] if isinstance(layer, Mapping) else layer) for n in order}
        for layer in (given, stated)
    )
    if given and stated and given != stated:
        raise UserError(
            f"layer is {given}, and {file.name} was trained on the output of {stated}: one of them is wrong"
        )
    if not (given or stated):
        raise UserError(
            f"{file.name} does not say at which layer it was trained: give layer, the index of the decoder"
            " layer whose output it reads"
        )
    return given or stated


# --- from their tensors to ours -----------------------------------------------------------------------------


def _build(
    order,
    names,
    scales: Mapping[str, float],
    W_enc: Tensor,
    W_dec: Tensor,
    b_enc: Tensor,
    b_dec: Tensor,
    threshold: float | None,
    k: Tensor | None,
    theta: Tensor | None = None,
    means: Tensor | None = None,
) -> CrossCoder:
    """Ours, its models in the order ``names``, from weights [M, F, d] in the order ``order``; W and b for
    activations times ``scales``.
    """
    if sorted(names) != sorted(order):
        raise UserError(f"models {', '.join(names)} are wanted: this crosscoder has {', '.join(order)}")
    place = [tuple(order).index(name) for name in names]
    n_models, n_features, width = W_dec.shape
    variant = "l1" if threshold is None else "batchtopk" if theta is None else "jumprelu"
    crosscoder = CrossCoder(
        [width] * n_models,
        n_features,
        names,
        variant,
        min(int(k), n_features) if k is not None else 1,
        [scales[name] for name in names],
    )
    with torch.no_grad():
        for ours, theirs in ((crosscoder.W_enc, W_enc), (crosscoder.W_dec, W_dec)):
            ours.copy_(theirs[place].permute(1, 0, 2).reshape(n_features, -1))
        crosscoder.b_enc.copy_(b_enc)
        crosscoder.b_dec.copy_(b_dec[place].flatten())
        if means is not None:
            crosscoder.means.copy_(means[place].flatten())
        if theta is not None:
            crosscoder.log_theta.copy_(theta.log())
        elif threshold is not None:
            crosscoder.threshold.fill_(threshold)
    return crosscoder.eval().requires_grad_(False)


def _threshold(state: Mapping[str, Tensor], file: Path) -> float:
    if state["threshold"].numel() != 1:
        raise UserError(
            f"{file.name} has {state['threshold'].numel()} thresholds, one for each model (code normalisation"
            " DECOUPLED): a feature then fires in one model and not in the other, which a crosscoder here"
            " cannot express"
        )
    value = float(state["threshold"])
    if not 0 <= value < float("inf"):
        raise UserError(
            f"{file.name} has the threshold {value}: it was never set in training, so all features would fire"
        )
    return value


def _normaliser(
    state: Mapping[str, Tensor], n_models: int, width: int, file: Path
) -> tuple[Tensor | None, Tensor | None]:
    """(mean [M, d], scale g [M]) in float64 of dictionary_learning's normalisation; (None, None) if it has
    none.
    """
    mean, std = state.get("activation_mean"), state.get("activation_std")
    # any NaN switches it off there as well
    if mean is None or std is None or torch.isnan(mean).any() or torch.isnan(std).any():
        return None, None
    if "activation_global_scale" not in state:
        raise UserError(
            f"{file.name} has activation_mean but no activation_global_scale: a version of"
            " dictionary_learning that is not known here"
        )
    g = state["activation_global_scale"].double()
    if mean.shape != (n_models, width) or g.shape != (n_models,) or not (g > 0).all():
        raise UserError(
            f"{file.name}: activation_mean must be [{n_models}, {width}] and activation_global_scale"
            f" {n_models} positive numbers"
        )
    return mean.double(), g


def _code_normalization(state: Mapping[str, Tensor], config: Mapping, trainer: Mapping, file: Path) -> str:
    named = str(config.get("code_normalization") or trainer.get("code_normalization") or "").upper()
    number = int(state["code_normalization_id"]) if "code_normalization_id" in state else None
    known = named in ("", *CODE_NORMALIZATIONS)
    if not known or number is not None and not 1 <= number <= len(CODE_NORMALIZATIONS):
        raise UserError(
            f"{file.name} has the code normalisation {named or number}: known are"
            f" {', '.join(CODE_NORMALIZATIONS)}"
        )
    stored = CODE_NORMALIZATIONS[number - 1] if number is not None else ""
    if named and stored and named != stored:
        raise UserError(
            f"{file.name} has the code normalisation {stored}, and its configuration says {named}: one of"
            " them is wrong"
        )
    return named or stored or "CROSSCODER"  # older files name none, and mean this one


def _theta(threshold: float, W_dec: Tensor, kind: str, config: Mapping, file: Path) -> Tensor:
    """JumpReLU's threshold on the strength [F] that says the same as f_i n_i > threshold; W_dec [M, F, d]
    float64.
    """
    strength, whole = W_dec.norm(dim=2).sum(0), W_dec.norm(dim=(0, 2))
    if kind == "DECOUPLED":
        raise UserError(
            f"{file.name} has the code normalisation DECOUPLED: each model gets features of its own, which a"
            " crosscoder here cannot express"
        )
    if kind == "MIXED":
        kept = {
            a: config.get(a, default)
            for a, default in (("code_normalization_alpha_sae", 1.0), ("code_normalization_alpha_cc", 0.1))
        }
        for a, value in kept.items():
            if (trained := (config.get("trainer") or {}).get(a, value)) != value:
                raise UserError(
                    f"{file.name} was trained with {a} = {trained}, and its configuration says {value}: which"
                    " one its threshold belongs to cannot be known from it"
                )
        n = kept["code_normalization_alpha_sae"] * whole + kept["code_normalization_alpha_cc"] * strength
    else:
        n = whole if kind == "SAE" else torch.ones_like(whole)
    if kind == "NONE" and (strength == 0).any():
        raise UserError(
            f"{file.name} has features that write nothing, and a threshold that lets them fire: their firing"
            " cannot be expressed by strength"
        )
    # what writes nothing fires in neither
    return torch.where(strength > 0, threshold * strength / n, torch.ones_like(n))
