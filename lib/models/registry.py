"""The registry of pairs, data/pairs.yaml or a file of one's own: its entries, checked, without any model."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .. import settings
from ..settings import ROOT, Count, Positive, UserError, check, read_yaml, user_path

REGISTRY = ROOT / "data" / "pairs.yaml"
DTYPES = ("float32", "bfloat16", "float16")
KINDS = {  # of the keys of an entry
    "base": str,
    "distilled": str,
    "others": dict[str, str] | None,  # name: folder or hub id
    "tokenizer": str | None,
    "differing_ids": list[Count] | None,
    "layer": Count | None,
    "dtype": DTYPES,
    "store_dtype": DTYPES,
    "corpus": Any,  # checked by pairs.load_pair
    "dictionary": Positive,
    "tokens": Positive,
    "remote": (True, False, "local"),
    "planted": Count,
}


def registry_file(registry: str | Path | None = None) -> Path:
    """The registry that is given here or, for a whole process, by PAIRS_REGISTRY; else data/pairs.yaml."""
    named = user_path(registry or os.environ.get(settings.REGISTRY) or REGISTRY)
    file = named if named.is_file() else ROOT / named  # a notebook does not run where it is named
    if not file.is_file():
        raise UserError(
            f"the registry of pairs {named} does not exist: give a YAML file like data/pairs.yaml"
        )
    return file.resolve()


def read_entry(name: str, file: Path) -> dict[str, Any]:
    """The entry ``name`` of a registry, with what it is ``like``; None is as if it were not there."""
    if not (entries := read_yaml(file)):
        raise UserError(
            f"{file.name} holds no pairs: it must be a mapping, name of the pair: its entry, like"
            " data/pairs.yaml"
        )
    if name not in entries:
        raise UserError(
            f"unknown pair {name!r}: {file.name} has {', '.join(entries)} (another registry is named by"
            f" --registry FILE, or {settings.REGISTRY})"
        )
    if not isinstance(entry := entries[name], Mapping):
        raise UserError(
            f"pair {name!r} is {entry!r}: its entry must be a mapping with at least base: and distilled:"
        )
    if "like" in entry:
        entry = dict(entry)
        model = entry.pop("like")
        original = entries.get(model) if isinstance(model, str) else None
        if not isinstance(original, Mapping) or "like" in original:
            raise UserError(
                f"pair {name!r} is like {model!r}, which must be an entry of {file.name} that is like no"
                " other"
            )
        entry = {**original, **entry}
    if unknown := set(entry) - set(KINDS):
        raise UserError(
            f"pair {name!r} has the unknown key {min(unknown, key=str)!r}: known keys are"
            f" {', '.join(sorted(KINDS))}"
        )
    if missing := {"base", "distilled"} - set(entry):
        raise UserError(
            f"pair {name!r} lacks {' and '.join(sorted(missing))}: give a folder or a hub id with revision"
        )
    for key, value in entry.items():
        check(f"{key} of pair {name!r}", value, KINDS[key])
    for other in entry.get("others") or ():
        if other in ("base", "distilled") or not re.fullmatch(r"\w[\w.-]*", other):
            raise UserError(f"pair {name!r} has others called {other!r}: give each a plain name of its own")
    return {key: value for key, value in entry.items() if value is not None}
