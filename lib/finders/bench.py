"""The test: every finder on every truth, with several seeds; kept cell by cell, so that it goes on where it
was interrupted.

    python -m lib bench-finders "diff-SAE"          # or a file of claims
"""

from __future__ import annotations

import contextlib
import inspect
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd

from ..models.pairs import load_pair
from ..results import read_part
from ..runs import Progress, Run, fingerprint, kept, write_json
from ..settings import UserError
from ..study.variants import Variant, part_of_study
from ..study.variants import open_variant as open_variant
from . import methods  # noqa: F401  (they enter themselves)
from .claims import Claims, Place, read_claims, write_claims
from .finder import FINDERS, fit
from .report import named
from .scores import SCORES, null_claims, recurrence, score, summary
from .truths import KNOWN, TRUTHS, Budget, Truth, truth

VERSION = 1  # of finders and scores
SMALL = Budget(planted_tokens=8_000, tokens=20_000, epochs=1, targets=12)


def cell(
    name: str, one: Truth, place: Place, budget: Budget, folder: Path, given: Claims | None = None
) -> tuple[Claims, dict]:
    """(claims, scores) of a finder, or of ``given`` claims, at a truth, seed and null; kept in ``folder``."""
    _, seed, null = place
    models = ("base", "null_a" if null else "distilled")
    decided = one.planted or [load_pair(one.pair).fingerprint(model) for model in models]
    how = _source(name) if given is None else given.plain()
    key = fingerprint("finders", VERSION, name, one.name, seed, null, decided, asdict(budget), how)
    slug = "".join(c if c.isalnum() else "_" for c in name)

    def make(scratch: Path) -> None:
        data = one.open(budget, seed, folder, null)
        claims = fit(name, data) if given is None else given
        write_claims(scratch / "claims.json", name, {place: claims})
        if null:
            row = {"null_claims": null_claims(claims, one.claims)}
        else:
            row = score(one, data, claims, budget.targets)
        write_json(scratch / "scores.json", {k: None if np.isnan(v) else float(v) for k, v in row.items()})

    def read(whole: Path) -> tuple[Claims, dict]:
        _, sets = read_claims(whole / "claims.json")
        row = json.loads((whole / "scores.json").read_text(encoding="utf-8"))
        return sets[place], {"truth": one.name, "finder": name, "seed": seed, **row}

    where = Path(folder) / one.name / "cells" / f"{slug}_{'null' if null else 'pair'}_{seed}"
    return kept(where, key, make, read)


def _source(name: str) -> str:
    """The text of a finder's function, so that a finder that is being written is tried anew, and with it the
    names that it uses; "" where it has none."""
    with contextlib.suppress(OSError):
        return inspect.getsource(FINDERS[name].find)
    return ""


def bench(
    names: Sequence[str], truths: Sequence[str], budget: Budget, seeds: int, null_seeds: int, folder: Path
) -> pd.DataFrame:
    """Scores of finders, or files of claims: a row per truth, finder and seed, with SCORES. ``null_seeds``:
    so many of the seeds are tried on the nulls too. A finder that depends on no seed is tried once; one that
    needs labels, where there are some."""
    chosen = [truth(name) for name in truths]
    finders = [(name, None) if name in FINDERS else _file(name) for name in names]
    cells = [
        (name, one, place, given and given[place])
        for one in chosen
        for name, given in finders
        for place in _places(one, name, seeds, null_seeds, given)
    ]
    if not cells:
        raise UserError(f"none of {', '.join(names)} can be tested on {', '.join(truths)}")
    found = defaultdict(lambda: ({}, {}))  # {(finder, truth): of the truth, of its null {seed: cell}}
    with Progress("finders, cells", len(cells)) as progress:
        for number, (name, one, place, given) in enumerate(cells):
            _, seed, null = place
            progress.update(number, f"{name} on {one.name}, seed {seed}")
            found[name, one][null][seed] = cell(name, one, place, budget, folder, given)
        progress.update(len(cells))
    rows = []
    for (_, one), (own, nulls) in found.items():
        shares = recurrence([claims for claims, _ in own.values()], one.claims)
        for (seed, (_, row)), share in zip(own.items(), shares):
            _, of_null = nulls.get(seed, (None, {}))
            rows.append(row | of_null | {"recurrence": share})
    table = pd.DataFrame(rows, columns=["truth", "finder", "seed", "claims", *SCORES])
    return table.astype(dict.fromkeys(SCORES, float))


def _file(name: str) -> tuple[str, dict[Place, Claims]]:
    if not Path(name).is_file():
        fit(name, None)  # says which finders there are
    label, sets = read_claims(Path(name), {one.name: one.width for one in KNOWN.values()})
    if label in FINDERS:
        raise UserError(f"{name} calls its finder {label!r}, which is one of ours: give it another name")
    if all(null for *_, null in sets):
        raise UserError(f"{name} has claims of nulls alone: give those of the truths, too")
    return label, sets


def _places(one: Truth, name: str, seeds: int, null_seeds: int, given: dict | None) -> list[Place]:
    if given is not None:
        return [place for place in given if place[0] == one.name]
    if FINDERS[name].labels and not one.pair:
        return []
    some = (seeds, null_seeds) if FINDERS[name].seeded else (1, min(1, null_seeds))
    return [(one.name, seed, null) for null, n in zip((False, True), some) for seed in range(n)]


def report_on(names: Sequence[str], truths: Sequence[str] = (), seeds: int = 4, small: bool = False) -> str:
    """The scores of finders or files of claims, as a table, beside those of all others that are committed."""
    budget, run = (SMALL if small else Budget()), Run("tiny", "small" if small else "default")
    chosen = list(truths or TRUTHS)
    table = summary(bench(names, chosen, budget, seeds, 1, run.path("study") / "finders"))
    known = read_part(Run("tiny", "default"), "finders").tables.get("summary")
    if known is not None and not small:
        others = known[known["truth"].isin(chosen) & ~known["finder"].isin(table["finder"])]
        table = pd.concat([table, others]).sort_values(["truth", "f1"], ascending=[True, False])
    return table[["truth", "finder", "seeds", *SCORES]].round(2).to_string(index=False, na_rep="")


@part_of_study("finders", VERSION)
def compute_finders(
    variant: Variant, truths: tuple, seeds: int, null_seeds: int, planted_tokens: int, tokens: int,
    epochs: int, targets: int,
) -> tuple[dict, dict]:  # fmt: skip
    """The part "finders": all of FINDERS on some truths (``bench``). Tables "scores", "summary"; metrics:
    ``report.named``."""
    budget = Budget(planted_tokens, tokens, epochs, targets)
    table = bench(list(FINDERS), truths, budget, seeds, null_seeds, variant.folder("finders"))
    return named(table), {"scores": table, "summary": summary(table)}
