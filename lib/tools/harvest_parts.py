"""A harvest without its notebook, whole or shared out among jobs (``python -m lib harvest``)."""

from collections.abc import Sequence
from pathlib import Path

from ..activations.harvest import harvest_layers, harvest_part, layers_of, merge_parts, open_text
from ..activations.store import MADE_BY
from ..runs import Run
from ..settings import UserError
from .notebooks import parameters_for

TEXT = ("tokens", "trace_share", "seed", "traces", "general")  # parameters of notebook 01 that choose it
USED = ("pair", "run", "layer", "upper_layer", *TEXT)


def harvest_for(
    pair: str,
    profile: str,
    texts: Sequence[tuple[str, str]] = (),
    out: Path | None = None,
    part: str = "",
    merging: bool = False,
) -> str:
    """What notebook 01 does, with its parameters: it finds the store and goes on from there. Returns text.

    ``out``: folder of the store; that of the upper layer is beside it, <name>_upper."""
    if part and merging:
        raise UserError("--part and --merge were both given: merge once, after all parts are done")
    values = parameters_for(MADE_BY, pair, profile, texts)
    if unused := [name for name, _ in texts if name not in USED]:
        raise UserError(
            f"a harvest does not use {unused[0]}: of notebook 01's parameters it uses {', '.join(USED)}"
        )
    models, corpus = open_text(values["pair"], **{name: values[name] for name in (*TEXT, "layer")})
    path = out or Run(values["pair"], values["run"]).path("store")
    layer = None if values["layer"] < 0 else values["layer"]
    paths = layers_of(path, models, layer, values["upper_layer"])
    if part:
        return f"part {part}: {harvest_part(models, corpus, paths, _read_part(part))} shards"
    if merging:
        return str([merge_parts(models, corpus, *each) for each in paths.items()][0])
    return str(harvest_layers(models, corpus, paths)[0])


def _read_part(text: str) -> tuple[int, int]:
    try:
        i, n = (int(number) for number in text.split("/"))
    except ValueError:
        raise UserError(f"part is {text!r}: it must be like 0/8, the first of eight") from None
    return i, n
