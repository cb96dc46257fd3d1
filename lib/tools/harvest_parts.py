"""A harvest without its notebook, whole or shared out among jobs (``python -m lib harvest``)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..activations.harvest import harvest_activations, harvest_part, merge_parts
from ..activations.store import MADE_BY
from ..models.pairs import load_pair
from ..runs import Run
from ..settings import UserError
from ..text.corpus import build
from .notebooks import parameters_for


def harvest_for(
    pair: str,
    profile: str,
    texts: Sequence[tuple[str, str]] = (),
    out: Path | None = None,
    part: str = "",
    merging: bool = False,
) -> str:
    """What notebook 01 does, with its parameters: it finds the store and goes on from there. Returns text."""
    if part and merging:
        raise UserError("--part and --merge were both given: merge once, after all parts are done")
    values = parameters_for(MADE_BY, pair, profile, texts)
    models = load_pair(values["pair"])
    corpus = build(models, values["tokens"], trace_share=values["trace_share"], seed=values["seed"])
    path = out or Run(values["pair"], values["run"]).path("store")
    layer = None if values["layer"] < 0 else values["layer"]
    if part:
        return f"part {part}: {harvest_part(models, corpus, path, _read_part(part), layer)} shards"
    return str((merge_parts if merging else harvest_activations)(models, corpus, path, layer))


def _read_part(text: str) -> tuple[int, int]:
    try:
        i, n = (int(number) for number in text.split("/"))
    except ValueError:
        raise UserError(f"part is {text!r}: it must be like 0/8, the first of eight") from None
    return i, n
