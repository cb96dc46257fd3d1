"""Crosscoders trained elsewhere, in the two formats in which most are published, and ours written in these.

Read into ours, a crosscoder is the same function of raw activations: f and x̂ are equal for every token.
docs/formats.md has the layouts and formulas. Weights are read without running anything from the file. What
neither file nor caller says is asked for, never guessed: which model comes first, the scale, the layer. Our
exports say it in origin.json beside them."""

import json
import pickle
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..runs import write_json, write_state, write_tensors
from ..settings import Count, UserError, check, number, read_text
from .model import INITIAL_NORM, CrossCoder

ORIGIN = "origin.json"  # {format, order, layers, scales}: what the formats themselves do not say
REPLICATION, DICTIONARY_LEARNING = "replication", "dictionary_learning"
# numbered from 1 in code_normalization_id
CODE_NORMALIZATIONS = ("CROSSCODER", "SAE", "MIXED", "NONE", "DECOUPLED")
WEIGHTS = (".safetensors", ".pt", ".pth")  # endings of files that hold tensors
EPSILON = 1e-8  # that dictionary_learning adds to its scale when it decodes
# the tensors of each format; a letter is a dimension: models, width of their activations, features
_SHAPES = {
    REPLICATION: {"W_enc": "Mdf", "W_dec": "fMd", "b_enc": "f", "b_dec": "Md"},
    DICTIONARY_LEARNING: {"encoder.weight": "Mdf", "decoder.weight": "Mfd"}
    | {"encoder.bias": "f", "decoder.bias": "Md"},
}
_NORMALISER = ("activation_mean", "activation_std", "activation_global_scale", "target_rms")
_OPTIONAL = {
    REPLICATION: {"threshold", "k"},
    DICTIONARY_LEARNING: {"threshold", "k", "code_normalization_id", *_NORMALISER},
}
_HOOK = re.compile(r"blocks\.(\d+)\.hook_resid_(pre|post)")
# keys of a configuration that speak of another rule than ReLU, and values that name one
_OTHER_SPARSITY = re.compile(r"top_?k|k_sparsity|^k$|^l0$|target_l0|threshold|bandwidth|jump", re.IGNORECASE)
_OTHER_KIND = re.compile(r"top_?k|jump_?relu|gated|softplus|gelu|silu|sigmoid", re.IGNORECASE)
# keys whose values name something else
_NAMES = re.compile(r"name|path|dir|model|hook|data|repo", re.IGNORECASE)


@dataclass(frozen=True)
class Foreign:
    """A crosscoder from a file, in our form, and the layer whose output each model was read at.

    ``has_means``: the file knew the mean activations. If not, ``crosscoder.means`` are 0 until they are taken
    from a store. ``fve``: what its model card says of each model, if there is one."""

    crosscoder: CrossCoder
    layers: dict[str, int]
    has_means: bool = False
    fve: dict[str, float] | None = None


def read_foreign(
    source: Path,
    order: Sequence[str] | None = None,
    scales: Mapping[str, float] | None = None,
    layer: int | Mapping[str, int] | None = None,
    names: Sequence[str] | None = None,
) -> Foreign:
    """A crosscoder in one of the two formats; ``source``: its weights, or the folder with them.

    ``order``: names of the models as the file has them, such as ("base", "distilled"). ``scales``: {name:
    what raw activations are multiplied by}; dictionary_learning holds its own, or reads raw activations.
    ``layer``: index of the decoder layer whose output was read; the input of block n is the output of n - 1.
    ``names``: the order in which they are wanted. UserError if one of these is neither given nor in the file,
    or if the file is in no format known here."""
    file = weights_file(source)
    state, config, origin = tensors(file), configuration(file), json_beside(file.with_name(ORIGIN))
    form = _format_of(state, file)
    _check_sparsity(state, config, file)
    n_models, width, n_features = (_sizes(state, _SHAPES[form], file)[letter] for letter in "Mdf")
    order = _order(order, origin.get("order"), n_models, file, config | config["trainer"])
    read = _replication if form == REPLICATION else _dictionary_learning
    weights = read(state, config, order, scales, origin.get("scales"), file)
    layers = _layers(layer, origin.get("layers") or weights["layer"], order, file)
    names, means, theta = names or order, weights.get("means"), weights.get("theta")
    if sorted(names) != sorted(order):
        raise UserError(f"models {', '.join(names)} are wanted: this crosscoder has {', '.join(order)}")
    place = [order.index(name) for name in names]
    variant = "l1" if "threshold" not in state else "batchtopk" if theta is None else "jumprelu"
    told = config["trainer"] | config | state
    k = min(int(told["k"]), n_features) if isinstance(told.get("k"), int | Tensor) else 1
    ordered_scales = [weights["scales"][name] for name in names]
    crosscoder = CrossCoder([width] * n_models, n_features, names, variant, k, ordered_scales)
    with torch.no_grad():
        for parameter in ("W_enc", "W_dec"):  # from [M, F, d]
            joined = weights[parameter][place].permute(1, 0, 2).reshape(n_features, -1)
            getattr(crosscoder, parameter).copy_(joined)
        crosscoder.b_enc.copy_(weights["b_enc"])
        crosscoder.b_dec.copy_(weights["b_dec"][place].flatten())
        if means is not None:
            crosscoder.means.copy_(means[place].flatten())
        if variant == "jumprelu":
            crosscoder.log_theta.copy_(theta.log())
        elif variant == "batchtopk":
            crosscoder.threshold.fill_(_threshold(state, file))
    return Foreign(crosscoder.eval().requires_grad_(False), layers, means is not None)


def _replication(state, config: Mapping, order, scales, stated_scales, file: Path) -> dict:
    """Weights [M, F, d], biases, scales and layer of the replication's format."""
    advice = (
        "its format does not hold them. They are sqrt(d) / mean norm of the activations it was trained on"
        " (store.scales, if these were like yours), or 1 for each if they were folded into the weights"
    )
    scales = _scales(scales, stated_scales, order, file, advice)
    layer = None
    if (hook := config.get("hook_point")) is not None:
        if not (match := _HOOK.fullmatch(str(hook))) or match.groups() == ("0", "pre"):
            raise UserError(
                f"{file.name} was trained at {hook}: here activations are the output of a decoder layer"
                " (hook_resid_post of a block, or hook_resid_pre of the next one)"
            )
        layer = int(match[1]) - (match[2] == "pre")
    W_enc, W_dec = state["W_enc"].permute(0, 2, 1), state["W_dec"].permute(1, 0, 2)
    biases = {"b_enc": state["b_enc"], "b_dec": state["b_dec"]}
    return {"W_enc": W_enc, "W_dec": W_dec, **biases, "scales": scales, "layer": layer}


def _dictionary_learning(state, config: Mapping, order, scales, stated_scales, file: Path) -> dict:
    """Weights [M, F, d], biases, scales, layer, means and thresholds of the format dictionary_learning."""
    n_models, trainer = len(order), config["trainer"]
    understood = {"encoder_layers": list(range(n_models)), "num_decoder_layers": n_models}
    for key in (*understood, "latent_processor"):
        if config.get(key) not in (None, understood.get(key)):
            raise UserError(
                f"{file.name} has {key} = {config[key]}: only crosscoders that read and write all of their"
                " models, with nothing between, can be expressed here"
            )
    mean, g = _normaliser(state, file)
    W_enc, W_dec = state["encoder.weight"].permute(0, 2, 1), state["decoder.weight"]  # [M, F, d] both
    b_enc, b_dec, means = state["encoder.bias"], state["decoder.bias"], None
    if g is not None:
        if scales is not None:
            raise UserError(
                f"{file.name} holds the scales of its activations itself: scales must not be given"
            )
        scales, means = dict(zip(order, (g + EPSILON).tolist())), mean * (g + EPSILON)[:, None]
        b_enc = b_enc.double() - torch.einsum("mfd,md->f", W_enc.double(), mean * g[:, None])
        b_dec = b_dec.double() + means
        W_enc = W_enc.double() * (g / (g + EPSILON))[:, None, None]
    elif scales is not None or stated_scales:
        scales = _scales(scales, stated_scales, order, file, "")
    else:
        scales = dict.fromkeys(order, 1.0)
    weights = {"W_enc": W_enc, "W_dec": W_dec, "b_enc": b_enc, "b_dec": b_dec, "scales": scales}
    if "threshold" in state:
        weights["theta"] = _theta(_threshold(state, file), state, W_dec.double(), config, file)
    return weights | {"layer": trainer.get("layer"), "means": means}


# --- ours, for others ---------------------------------------------------------------------------------------


def export_replication(crosscoder: CrossCoder, folder: Path, layer: int) -> None:
    """Write cc_weights.pt and cfg.json as the replication reads them, and origin.json. ``layer``: whose
    output the models were read at.

    As in the original, activations must be multiplied by the scales before; origin.json has them. UserError,
    with the reason, for what the format (ReLU, models of one width) cannot express."""
    if crosscoder.variant != "l1":
        raise UserError(
            f"this crosscoder is {crosscoder.variant}, and the replication's code applies ReLU alone: every"
            " feature would fire that is held back here"
            + (" (export_dictionary_learning takes it)" if crosscoder.variant == "batchtopk" else "")
        )
    W_enc, W_dec, b_dec = _stacked(crosscoder)
    state = {"W_enc": W_enc.permute(0, 2, 1), "W_dec": W_dec.permute(1, 0, 2), "b_dec": b_dec}
    state["b_enc"] = crosscoder.b_enc.detach()
    cfg = {"seed": 0, "dict_size": crosscoder.n_features, "d_in": crosscoder.widths[0], "device": "cpu"}
    cfg |= {"enc_dtype": "fp32", "dec_init_norm": INITIAL_NORM, "site": "resid_post"}
    cfg["hook_point"] = f"blocks.{int(layer)}.hook_resid_post"
    state = {name: t.clone(memory_format=torch.contiguous_format) for name, t in state.items()}
    write_state(Path(folder) / "cc_weights.pt", state)
    write_json(Path(folder) / "cfg.json", cfg)
    scales = dict(zip(crosscoder.names, crosscoder.scales.tolist()))
    _write_origin(crosscoder, folder, REPLICATION, layer, scales=scales)


def export_dictionary_learning(crosscoder: CrossCoder, folder: Path, layer: int) -> None:
    """Write model.safetensors and config.json as the fork's ``from_pretrained`` reads them, and origin.json.

    "l1" becomes a CrossCoder, "batchtopk" a BatchTopKCrossCoder; scales and mean activations become its
    normalisation. UserError, with the reason, for what the format cannot express."""
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
    encoder = W_enc.double() * (s / g.double())[:, None, None]
    shift = torch.einsum("mfd,md->f", encoder, means * g.double()[:, None])
    std = ((1 / g.double()) ** 2 - EPSILON).clamp(min=0).sqrt() / means.shape[1] ** 0.5
    state = {
        "encoder.weight": encoder.permute(0, 2, 1),
        "encoder.bias": crosscoder.b_enc.detach().double() + shift,
        "decoder.weight": W_dec,
        "decoder.bias": b_dec.double() - means * s[:, None],
        "activation_mean": means,
        "activation_std": std[:, None].expand_as(means),
        "activation_global_scale": g,
        "target_rms": torch.tensor(1.0),
    }
    state = {name: t.float().contiguous() for name, t in state.items()}
    state["code_normalization_id"] = torch.tensor(1)
    config = {"activation_dim": crosscoder.widths[0], "dict_size": crosscoder.n_features, "target_rms": 1.0}
    config |= {"num_layers": len(crosscoder.names), "code_normalization": "CROSSCODER"}
    if crosscoder.variant == "batchtopk":
        state["threshold"] = crosscoder.threshold.float().clone()
        state["k"] = torch.tensor(crosscoder.k, dtype=torch.int32)
        config["k"] = crosscoder.k
    write_tensors(Path(folder) / "model.safetensors", state)
    write_json(Path(folder) / "config.json", config)
    _write_origin(crosscoder, folder, DICTIONARY_LEARNING, layer)


def _stacked(crosscoder: CrossCoder) -> list[Tensor]:
    """W_enc, W_dec [M, F, d], b_dec [M, d] in scaled space; UserError for models of different widths."""
    if len(set(crosscoder.widths)) > 1:
        raise UserError(
            f"the models have widths {', '.join(map(str, crosscoder.widths))}: this format stacks them in one"
            " array, so they must be equal"
        )
    joined = (crosscoder.W_enc, crosscoder.W_dec, crosscoder.b_dec)
    return [torch.stack(crosscoder.split(parameter.detach())) for parameter in joined]


def _write_origin(crosscoder: CrossCoder, folder: Path, form: str, layer: int, **scales) -> None:
    layers = dict.fromkeys(crosscoder.names, int(layer))
    write_json(Path(folder) / ORIGIN, {"format": form, "order": crosscoder.names, "layers": layers, **scales})


# --- files --------------------------------------------------------------------------------------------------


def weights_file(source: Path) -> Path:
    """The one file of weights that ``source``, a file or a folder (or one folder below it), means."""
    source = Path(source)
    if source.is_file():
        return source
    candidates = (p for pattern in ("*", "*/*") for p in sorted(source.glob(pattern)))
    files = [p for p in candidates if p.name.endswith(WEIGHTS) and p.is_file()]
    if len(files) == 1:
        return files[0]
    listed = ", ".join(p.relative_to(source).as_posix() for p in files[:8])
    raise UserError(
        f"{source} has several files of weights ({listed}): name one of them"
        if files
        else f"no weights in {source}: there must be a .safetensors or a .pt file"
    )


def tensors(file: Path) -> dict[str, Tensor]:
    """Tensors of a file by name. UserError if it is damaged, or holds what would have to be run."""
    try:
        if file.suffix == ".safetensors":
            state = load_file(file)
        else:
            state = torch.load(file, map_location="cpu", weights_only=True)
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


def _format_of(state: Mapping[str, Tensor], file: Path) -> str:
    """The format that the names of tensors belong to. UserError if to none, or if a value is not finite."""
    form = next((form for form, shapes in _SHAPES.items() if shapes.keys() <= state.keys()), None)
    if form is None:
        known = " and ".join(", ".join(sorted(shapes)) for shapes in _SHAPES.values())
        raise UserError(
            f"{file.name} is in no format that is known here: it holds {', '.join(sorted(state)[:8])}; known"
            f" are {known}"
        )
    if unknown := state.keys() - _SHAPES[form].keys() - _OPTIONAL[form]:
        raise UserError(
            f"{file.name} also holds {', '.join(sorted(unknown))}: a variant that is not known here, and"
            " would be read wrongly without it"
        )
    for name in state.keys() & {*_SHAPES[form], *_NORMALISER}:
        tensor = state[name]
        plain = tensor.is_floating_point() and tensor.layout == torch.strided and not tensor.is_meta
        if not plain or tensor.itemsize < 2:
            raise UserError(
                f"{file.name}: {name} is {tensor.dtype}, {tensor.layout}: it must be a dense tensor of"
                " floating-point numbers of 16 bits or more"
            )
        if name in _SHAPES[form] and not torch.isfinite(tensor).all():
            raise UserError(f"{file.name}: {name} has values that are not finite")
    return form


def _sizes(state: Mapping[str, Tensor], shapes: Mapping[str, str], file: Path) -> dict[str, int]:
    """The size of each letter of ``shapes``; the first tensor says them, the others must agree."""
    sizes: dict[str, int] = {}
    for name, letters in shapes.items():
        shape = list(state[name].shape)
        if not sizes and len(shape) != len(letters):
            wanted = f"{len(letters)} dimensions, one of them the models"
            raise UserError(f"{file.name}: {name} has shape {shape}, it must have {wanted}")
        sizes = sizes or dict(zip(letters, shape))
        if shape != (wanted := [sizes[letter] for letter in letters]):
            raise UserError(f"{file.name}: {name} has shape {shape}, the encoder's weights ask for {wanted}")
    return sizes


def configuration(file: Path) -> dict:
    """All that JSON files beside the weights say; of several that speak of the same, the most particular."""
    merged: dict = {}
    for name in (f"{file.stem}_cfg.json", "cfg.json", "config.json", "trainer_config.json"):
        merged = json_beside(file.with_name(name)) | merged
    if not isinstance(trainer := merged.setdefault("trainer", {}), dict):
        merged |= {"trainer": {}, "trainer_class": trainer}
    return merged


def json_beside(file: Path) -> dict:
    if not file.is_file():
        return {}
    try:
        content = json.loads(read_text(file))
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise UserError(f"{file.name} is damaged: it must be a JSON object")
    return content


def _order(given, stated, n_models: int, file: Path, config: Mapping) -> tuple[str, ...]:
    if given is not None and stated is not None and list(given) != list(stated):
        raise UserError(
            f"order is {tuple(given)}, and {ORIGIN} beside {file.name} says {tuple(stated)}: one of them"
            " is wrong"
        )
    if (order := check("order", given or stated, list[str] | None)) is None:
        named = [k for k, v in config.items() if k.startswith(("model_", "lm_name")) and isinstance(v, str)]
        models = ", ".join(f"{key} = {config[key]}" for key in named)
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
    check("scales", scales, dict[str, number()])
    if set(scales) != set(order) or not all(s > 0 for s in scales.values()):
        raise UserError(
            f"scales are {dict(scales)}: there must be one positive number for each of {', '.join(order)}"
        )
    return {name: float(scales[name]) for name in order}


def _layers(given, stated, order: Sequence[str], file: Path) -> dict[str, int]:
    """{name: layer} from what the caller gives and the file says: one number for all models, or each."""
    given, stated = (None if layer is None else layers_by_name(layer, order) for layer in (given, stated))
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


def layers_by_name(layer: int | Mapping[str, int], names: Sequence[str]) -> dict[str, int]:
    """{name: layer} from one layer for all models, or one for each. UserError for anything else."""
    layers = check("layer", layer, Count | dict[str, Count])
    layers = layers if isinstance(layers, Mapping) else dict.fromkeys(names, layers)
    if not set(names) <= layers.keys():
        raise UserError(f"layer is {layer}: it must have one for each of {', '.join(names)}")
    return {name: layers[name] for name in names}


def _threshold(state: Mapping[str, Tensor], file: Path) -> float:
    if state["threshold"].numel() != 1:
        raise UserError(
            f"{file.name} has {state['threshold'].numel()} thresholds, one for each model (code normalisation"
            " DECOUPLED) or feature, which cannot be read here: one for all can"
        )
    value = float(state["threshold"])
    if not 0 <= value < float("inf"):
        raise UserError(
            f"{file.name} has the threshold {value}: it was never set in training, so all features would fire"
        )
    return value


def _entries(config: Mapping) -> Iterator[tuple[str, object]]:
    """The entries of a configuration, and of those within it."""
    for key, value in config.items():
        yield from _entries(value) if isinstance(value, Mapping) else [(key, value)]


def _check_sparsity(state: Mapping[str, Tensor], config: Mapping, file: Path) -> None:
    """UserError unless the file says what fires: all that is positive (ReLU), or above its threshold."""
    if "threshold" in state:
        _threshold(state, file)
        return
    told = {"k": int(state["k"])} if "k" in state else {}
    for key, value in _entries(config):
        rule = _OTHER_SPARSITY.search(key) and value not in (None, 0, False)
        kind = isinstance(value, str) and _OTHER_KIND.search(value) and not _NAMES.search(key)
        if rule or kind or (key == "sparsity_type" and value not in ("l1", "relu", None)):
            told[key] = value
    if told:
        rules = ", ".join(f"{key} = {value}" for key, value in told.items())
        raise UserError(
            f"{file.name} was not trained with ReLU alone ({rules}), but has no threshold for single tokens:"
            " what it does at inference cannot be known from it"
        )


def _normaliser(state: Mapping[str, Tensor], file: Path) -> tuple[Tensor | None, Tensor | None]:
    """(mean [M, d], scale g [M]) in float64 of dictionary_learning's normalisation; None, None if none."""
    mean, std = state.get("activation_mean"), state.get("activation_std")
    # any NaN switches it off there as well
    if mean is None or std is None or torch.isnan(mean).any() or torch.isnan(std).any():
        return None, None
    if "activation_global_scale" not in state:
        raise UserError(
            f"{file.name} has activation_mean but no activation_global_scale: a version of"
            " dictionary_learning that is not known here"
        )
    g, (n_models, width) = state["activation_global_scale"].double(), state["decoder.bias"].shape
    fine = (g > 0).all() and torch.isfinite(g).all() and torch.isfinite(mean).all()
    if mean.shape != (n_models, width) or g.shape != (n_models,) or not fine:
        raise UserError(
            f"{file.name}: activation_mean must be [{n_models}, {width}] and activation_global_scale"
            f" {n_models} positive numbers, all finite"
        )
    return mean.double(), g


def _theta(threshold: float, state, W_dec: Tensor, config: Mapping, file: Path) -> Tensor | None:
    """JumpReLU's threshold on the strength [F] that says the same as f_i n_i > threshold; None if n_i is the
    strength already. W_dec [M, F, d] float64."""
    trainer = config["trainer"]
    kind = str(config.get("code_normalization") or trainer.get("code_normalization") or "").upper()
    number = int(state["code_normalization_id"]) if "code_normalization_id" in state else None
    numbers = range(1, len(CODE_NORMALIZATIONS) + 1)
    if kind not in ("", *CODE_NORMALIZATIONS) or number not in (None, *numbers):
        raise UserError(
            f"{file.name} has the code normalisation {number or kind}: known are"
            f" {', '.join(CODE_NORMALIZATIONS)}"
        )
    stored = CODE_NORMALIZATIONS[number - 1] if number is not None else ""
    if kind and stored and kind != stored:
        raise UserError(
            f"{file.name} has the code normalisation {stored}, and its configuration says {kind}: one of"
            " them is wrong"
        )
    kind = kind or stored or "CROSSCODER"  # older files name none, and mean this one
    strength, total = W_dec.norm(dim=2).sum(0), W_dec.norm(dim=(0, 2))
    if kind == "CROSSCODER":
        return None
    if kind == "DECOUPLED":
        raise UserError(
            f"{file.name} has the code normalisation DECOUPLED: each model gets features of its own, which a"
            " crosscoder here cannot express"
        )
    n = total if kind == "SAE" else torch.ones_like(total)
    if kind == "MIXED":
        weights = []
        for name, default in (("code_normalization_alpha_sae", 1.0), ("code_normalization_alpha_cc", 0.1)):
            weights.append(config.get(name, default))
            if (trained := trainer.get(name, weights[-1])) != weights[-1]:
                raise UserError(
                    f"{file.name} was trained with {name} = {trained}, and its configuration says"
                    f" {weights[-1]}: which one its threshold belongs to cannot be known from it"
                )
        n = weights[0] * total + weights[1] * strength
    # what writes nothing fires in neither
    return torch.where(strength > 0, threshold * strength / n, torch.ones_like(n))
