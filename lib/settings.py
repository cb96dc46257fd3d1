"""What a user may set, and how a wrong setting is told: parameters, profiles, the error of one sentence."""

from __future__ import annotations

import ast
import contextlib
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import yaml

ROOT = Path(__file__).resolve().parents[1]


class UserError(Exception):
    """One sentence for the user: what was wrong, and what would be right."""


def path_shown(path: Path) -> str:
    """A path below the repository without the machine's part of it."""
    path = Path(path)
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else str(path)


# --- parameter checks ---------------------------------------------------------------------------------------

_KINDS = {int: "an integer", float: "a number", bool: "True or False", str: "a string", list: "a list"}


def check(name: str, value, kind=None, low=None, high=None, choices=None):
    """Return ``value``, or raise a UserError that says what ``name`` must be. ``low`` and ``high`` are
    inclusive.

    ``kind`` is int, float (takes integers too), bool, str, list, or a tuple of kinds, with None in it if the
    parameter may be None. Of a list, every entry is checked against the bounds and choices. NaN and infinity
    are refused.

    >>> check("k", 0, int, low=1)
    Traceback (most recent call last):
    lib.settings.UserError: k is 0: it must be an integer of at least 1
    """
    kinds = kind if isinstance(kind, tuple) else () if kind is None else (kind,)
    if value is None and None in kinds:
        return value
    wanted = " or ".join(_KINDS[k] for k in kinds if k is not None) or "a value"
    if low is not None and high is not None:
        wanted += f" from {low} to {high}"
    elif low is not None or high is not None:
        wanted += f" of at least {low}" if low is not None else f" of at most {high}"
    if choices is not None:
        wanted = "one of " + ", ".join(map(str, choices))
    if list in kinds:
        wanted = (
            wanted.replace("a list", "a list, every entry", 1)
            if (low, high, choices) != (None, None, None)
            else wanted
        )
    fine = not kinds or any(k is not None and _is(value, k) for k in kinds)
    for entry in value if isinstance(value, (list, tuple)) else [value]:
        number = isinstance(entry, (int, float, np.number)) and not isinstance(entry, bool)
        fine = fine and not (number and not math.isfinite(entry))
        fine = fine and (choices is None or entry in choices)
        if low is not None or high is not None:
            fine = fine and number and (low is None or entry >= low) and (high is None or entry <= high)
    if not fine:
        raise UserError(f"{name} is {value!r}: it must be {wanted}")
    return value


# Kinds of parameters, as ``begin`` takes them: (type, lowest, highest), or the choices that there are.
Count = (int, 0, None)
Positive = (int, 1, None)
Share = (float, 0, 1)
Number = (float, None, None)
Shares = (list, 0, 1)
Text = (str, None, None)


def check_kinds(given: Mapping, kinds: Mapping[str, tuple]) -> None:
    """UserError for the first value of ``given`` that is not of its kind: (type, low, high), or a tuple of
    choices.
    """
    for name, kind in kinds.items():
        if isinstance(kind[0], str):
            check(name, given[name], choices=kind)
        else:
            check(name, given[name], *kind)


def _is(value, kind: type) -> bool:
    if kind is bool:
        return isinstance(value, (bool, np.bool_))
    if kind is int:
        return isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if kind is float:
        return isinstance(value, (int, float, np.number)) and not isinstance(value, bool)
    if kind is list:
        return isinstance(value, (list, tuple))
    return isinstance(value, kind)


# environment variable by which ``lib.models.pairs`` is told of another registry, in kernels too
REGISTRY = "PAIRS_REGISTRY"


def checked(notebook: str, defaults: dict, given: dict) -> dict:
    """``given`` with every value of the type of its default; UserError for an unknown name or another type."""
    return {name: _typed(notebook, name, value, defaults) for name, value in given.items()}


def _typed(notebook: str, name: str, value, defaults: dict):
    if name not in defaults:
        raise UserError(f"{notebook} has no parameter {name!r}: it has {', '.join(sorted(defaults))}")
    default = defaults[name]
    if isinstance(default, float) and not isinstance(value, bool):
        with contextlib.suppress(TypeError, ValueError):  # YAML reads 1e-3 as text
            return float(value)
    same = default is None or type(value) is type(default)
    if same and isinstance(default, (list, tuple)) and default:
        kinds = tuple({type(entry) for entry in default} | ({int} if float in map(type, default) else set()))
        same = all(type(entry) in kinds for entry in value)
    if not same:
        raise UserError(
            f"{name} of {notebook} is {value!r}: it must be of type {type(default).__name__}, like its"
            f" default {default!r}"
        )
    return value


def read_value(text: str, default):
    """A value from the command line: text stays text where the default is text, else a Python literal."""
    if isinstance(default, str):
        return text
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return {"true": True, "false": False, "none": None, "null": None}.get(text.lower(), text)


def read_profile(folder: Path, name: str, stems: list[str], pair: str = "") -> dict:
    """notebooks/profiles/<name>.yaml: {notebook stem: {parameter: value}}, and optionally ``timeout``
    (seconds a cell).

    What <name>.<pair>.yaml says is laid over it: a pair may need another budget of the same name.
    """
    known = sorted(p.stem for p in folder.glob("*.yaml"))
    if name not in known:
        raise UserError(
            f"unknown profile {name!r}: there are {', '.join(k for k in known if '.' not in k)} (files in"
            " notebooks/profiles)"
        )
    profile: dict = {}
    for layer in (name, f"{name}.{pair}"):
        content = read_yaml(folder / f"{layer}.yaml") if layer in known else {}
        if odd := next((stem for stem in stems if not isinstance(content.get(stem), dict | None)), None):
            raise UserError(
                f"profile {layer!r} has {content[odd]!r} for {odd}: it must be a mapping of name: value"
                " entries"
            )
        if unknown := sorted(set(map(str, content)) - set(stems) - {"timeout", "study"}):
            raise UserError(
                f"profile {layer!r} names {', '.join(unknown)}: the notebooks are {', '.join(stems)}"
            )
        profile |= {
            key: profile.get(key, {}) | (value or {}) if isinstance(value, dict | None) else value
            for key, value in content.items()
        }
    return profile


def known_pairs(registry: Path) -> list[str]:
    if not registry.is_file():
        raise UserError(
            f"the registry of pairs {registry} does not exist: give a YAML file like data/pairs.yaml"
        )
    return list(read_yaml(registry))


def read_yaml(file: Path) -> dict:
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise UserError(f"{path_shown(file)} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UserError(
            f"{path_shown(file)} holds a {type(content).__name__}: it must hold name: value entries"
        )
    return content
