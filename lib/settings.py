"""What a user may set: kinds of parameters, classes of parameters; and the error of one sentence."""

import os
import re
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

    def _render_traceback_(self) -> list[str]:
        """What IPython shows below a cell: the sentence, without the lines of code that noticed."""
        return [f"UserError: {self}"]


def path_shown(path: Path) -> str:
    """A path below the repository without the machine's part of it."""
    path = Path(path)
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else str(path)


def user_path(text: str | Path) -> Path:
    """A path as a user writes it: ~ is the home, $NAME a variable of the environment."""
    return Path(os.path.expandvars(os.path.expanduser(text)))


def read_text(file: Path) -> str:
    """The text of a file in UTF-8, without a byte order mark. UserError if there is none."""
    try:
        return Path(file).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise not_utf8(file, f"{error.reason} at byte {error.start}") from None
    except OSError as error:
        raise UserError(f"{path_shown(file)} cannot be read: {error.strerror}") from None


def not_utf8(file: Path, reason: str) -> UserError:
    return UserError(f"{path_shown(file)} is not UTF-8 text ({reason}): save it as UTF-8")


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
        schema = adapter.json_schema()
        literal = value == "None" or str(value)[:1] in "[{" or schema.get("type") == "object"
        literal = literal and isinstance(value, str)
        hint = " (papermill's -p makes text of it: give it with -y)" if literal else ""
        raise UserError(f"{name} is {value!r}: it must be {_wanted(schema)}{hint}") from None
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
    bounds = schema.get("items") or schema.get("additionalProperties")
    if bounds := bounds if isinstance(bounds, Mapping) else None:
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
    ``__post_init__`` of the class is called afterwards, for what concerns several values."""
    afterwards = cls.__dict__.get("__post_init__")
    kinds = cache(lambda: get_type_hints(cls, include_extras=True))

    def __post_init__(self) -> None:
        check_kinds(vars(self), kinds())
        if afterwards:
            afterwards(self)

    cls.__post_init__ = __post_init__
    return dataclass(frozen=True)(cls)


# the environment variable that names another registry of pairs than data/pairs.yaml, in kernels too
REGISTRY = "PAIRS_REGISTRY"


class _Loader(yaml.SafeLoader):
    """Safe, and strict: of a key that stands twice in a mapping, YAML would silently lose the first."""

    def construct_mapping(self, node, deep=False):
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        if twice := next((key for key in keys if keys.count(key) > 1), None):
            words = f"{twice!r} stands there twice: keep one of them"
            raise yaml.constructor.ConstructorError(None, None, words, node.start_mark)
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node):
        if not re.fullmatch(r"[-+]?(0|[1-9][\d_]*)", node.value):  # 0100 would be 64, and 1:30 90
            words = f"{node.value!r} is no decimal number: write it without a leading zero or colons"
            raise yaml.constructor.ConstructorError(None, None, words, node.start_mark)
        return super().construct_yaml_int(node)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def read_yaml(file: Path) -> dict[str, Any]:
    """The mapping in a YAML file, {} of an empty one. UserError if a name in it is no text, or stands there
    twice."""
    try:
        content = yaml.load(read_text(file), _Loader) or {}
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # a date may be none
        raise UserError(f"{path_shown(file)} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UserError(
            f"{path_shown(file)} holds a {type(content).__name__}: it must hold name: value entries"
        )
    if odd := [name for name in content if not isinstance(name, str)]:
        raise UserError(
            f'{path_shown(file)} has the name {odd[0]!r}, which is no text: put it in quotes, "7"'
        )
    return content
