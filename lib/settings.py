"""What a user may set, and how a wrong setting is told: parameters, profiles, the error of one sentence."""

from __future__ import annotations

import ast
import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal, dataclass_transform, get_type_hints

import numpy as np
import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

ROOT = Path(__file__).resolve().parents[1]


class UserError(Exception):
    """One sentence for the user: what was wrong, and what would be right."""


def path_shown(path: Path) -> str:
    """A path below the repository without the machine's part of it."""
    path = Path(path)
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else str(path)


# --- parameter checks ---------------------------------------------------------------------------------------


def integer(low: int | None = None, high: int | None = None):
    """The kind of an integer from ``low`` to ``high``, both included."""
    return Annotated[int, Field(ge=low, le=high)]


def number(low: float | None = None, high: float | None = None):
    """The kind of a finite number from ``low`` to ``high``, both included; integers are numbers."""
    return Annotated[float, Field(ge=low, le=high)]


# Kinds of parameters. A kind is a type as pydantic reads it: int, bool, str, list[Share], Count | None,
# Literal["topk", "l1"]; or a tuple of choices.
Count = integer(0)
Positive = integer(1)
Number = number()
NotNegative = number(0)
Share = number(0, 1)
Shares = list[Share]
Text = str
Flag = bool

_NOUNS = {
    "integer": "an integer",
    "number": "a number",
    "boolean": "True or False",
    "string": "a string",
    "array": "a list",
    "object": "a mapping",
    "null": "None",
}


def check(name: str, value, kind=Any, low=None, high=None, choices=None):
    """Return ``value`` as it is, or raise a UserError that says what ``name`` must be.

    ``kind`` is a kind as above; ``low`` and ``high`` (inclusive) are bounds of a number, or of every entry of
    a list; ``choices`` are the values that there are. NaN and infinity are refused, tuples are lists, numbers
    of numpy are numbers.

    >>> check("k", 0, Positive)
    Traceback (most recent call last):
    lib.settings.UserError: k is 0: it must be an integer of at least 1
    """
    if choices is not None or isinstance(kind, tuple):
        kind = Literal[tuple(kind if choices is None else choices)]
    elif (low, high) != (None, None):
        bounds = Field(ge=low, le=high)
        kind = list[Annotated[float, bounds]] if kind is list else Annotated[kind, bounds]
    adapter = _adapter(kind)
    try:
        adapter.validate_python(_without_numpy(value))
    except ValidationError:
        raise UserError(f"{name} is {value!r}: it must be {_wanted(adapter.json_schema())}") from None
    return value


@lru_cache(maxsize=500)  # making one takes a millisecond
def _adapter(kind) -> TypeAdapter:
    return TypeAdapter(kind, config=ConfigDict(strict=True, allow_inf_nan=False))


def _without_numpy(value):
    if isinstance(value, (list, tuple)):
        return [_without_numpy(entry) for entry in value]
    return value.item() if isinstance(value, np.generic) else value


def _wanted(schema: Mapping) -> str:
    """A JSON schema in words: "an integer of at least 1"."""
    if choices := schema.get("enum", [schema["const"]] if "const" in schema else None):
        return "one of " + ", ".join(map(str, choices))
    if "anyOf" in schema:
        return " or ".join(map(_wanted, schema["anyOf"]))
    words = _NOUNS.get(schema.get("type"), "a value")
    if bounds := schema.get("items"):
        words += ", every entry"
        words += "" if {"minimum", "maximum"} & bounds.keys() else f" {_wanted(bounds)}"
    low, high = ((bounds or schema).get(key) for key in ("minimum", "maximum"))
    if low is not None and high is not None:
        return f"{words} from {low} to {high}"
    words += f" of at least {low}" if low is not None else ""
    return words + (f" of at most {high}" if high is not None else "")


def check_kinds(values: Mapping, kinds: Mapping) -> None:
    """UserError for the first of ``values`` that is not of its kind; both by name."""
    for name, kind in kinds.items():
        check(name, values[name], kind)


@dataclass_transform(frozen_default=True)
def parameters(cls):
    """A frozen dataclass whose values are checked when it is made, against the kinds that annotate them.

    Values are kept as they are given: 2 stays 2, where a number may be 2.0, so that fingerprints stay. A
    ``__post_init__`` of the class is called afterwards, for what concerns several values.
    """
    afterwards = cls.__dict__.get("__post_init__")
    kinds = cache(lambda: get_type_hints(cls, include_extras=True))

    def __post_init__(self) -> None:
        check_kinds(vars(self), kinds())
        if afterwards:
            afterwards(self)

    cls.__post_init__ = __post_init__
    return dataclass(frozen=True)(cls)


# environment variable by which ``lib.models.pairs`` is told of another registry, in kernels too
REGISTRY = "PAIRS_REGISTRY"


def checked(notebook: str, defaults: dict, given: dict) -> dict:
    """``given`` with values of the types of their defaults; UserError for an unknown name or another type."""
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
        if unknown := sorted(set(map(str, content)) - set(stems) - {"timeout"}):
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
