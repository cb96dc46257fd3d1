"""Parameters of notebooks, from profiles and the command line: read, and checked against their defaults."""

import ast
import contextlib
from pathlib import Path

from ..settings import Positive, UserError, check, read_yaml, user_path

LIMITS = {"timeout": "seconds of a cell", "workers": "notebooks at once"}


def checked(notebook: str, defaults: dict, given: dict) -> dict:
    """``given`` with values of the types of their defaults; UserError for an unknown name or another type."""
    if unknown := [name for name in given if name not in defaults]:
        raise UserError(f"{notebook} has no parameter {unknown[0]!r}: it has {', '.join(sorted(defaults))}")
    return {name: _typed(notebook, name, value, defaults[name]) for name, value in given.items()}


def _typed(notebook: str, name: str, value, default):
    if isinstance(default, float) and not isinstance(value, bool):
        with contextlib.suppress(TypeError, ValueError):  # YAML reads 1e-3 as text
            return float(value)
    same = default is None or type(value) is type(default)
    if same and isinstance(default, (list, tuple)) and default:
        kinds = set(map(type, default))
        same = all(type(entry) in kinds | ({int} if float in kinds else set()) for entry in value)
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


def run_of(profile: str) -> str:
    """The name of a profile, which is that of its run: a file of one's own is called without its ending."""
    return Path(profile).stem if profile.endswith((".yaml", ".yml")) else profile


def read_profile(folder: Path, name: str, stems: list[str], pair: str = "") -> dict:
    """{notebook stem: {parameter: value}} of notebooks/profiles/<name>.yaml, or of a file of one's own,
    ``timeout`` (seconds a cell) and ``workers`` (notebooks at once); what <name>.<pair>.yaml says is laid
    over it: a pair may need another budget of the same name."""
    known = {p.stem: p for p in sorted(folder.glob("*.yaml"))}
    own, name = user_path(name), run_of(name)
    if own.name != name and own.is_file():
        if name in known and known[name].resolve() != own.resolve():
            raise UserError(f"{own} is called like a profile of the repository, and so is its run: rename it")
        known[name] = own
    if name not in known:
        raise UserError(
            f"unknown profile {str(own)!r}: there are {', '.join(k for k in known if '.' not in k)} (files in"
            " notebooks/profiles), or give a .yaml file of your own"
        )
    profile: dict = {}
    for layer in (name, f"{name}.{pair}"):
        content = read_yaml(known[layer]) if layer in known else {}
        if odd := next((stem for stem in stems if not isinstance(content.get(stem), dict | None)), None):
            raise UserError(
                f"profile {layer!r} has {content[odd]!r} for {odd}: it must be a mapping of name: value"
                " entries"
            )
        if unknown := sorted(set(content) - set(stems) - LIMITS.keys()):
            raise UserError(
                f"profile {layer!r} names {', '.join(unknown)}: the notebooks are {', '.join(stems)}"
            )
        for name, words in LIMITS.items():
            check(f"{name} of profile {layer!r} ({words})", content.get(name, 1), Positive)
        for key, value in content.items():
            mapping = isinstance(value, dict | None)
            profile[key] = profile.get(key, {}) | (value or {}) if mapping else value
    return profile
