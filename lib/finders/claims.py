"""What a finder says: directions that distillation changed, and the file in which anybody can say it.

A claim is a direction in each model's residual stream (RAW units; only its line matters), the side of the
model that has it, or uses it more, and a confidence from 0 to 1: how probable the finder thinks it is that
the claim is right. A file of claims is JSON, as docs/finders.md shows it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..runs import write_text
from ..settings import Count, Flag, Share, UserError, check, path_shown, read_text

SIDES = ("base", "distilled")
MOST = 64  # claims of one set that are read
KEYS = {"truth": str, "seed": Count, "null": Flag, "claims": list}  # of a set


@dataclass(frozen=True)
class Claims:
    """``directions`` {side: [n, d], zero where nothing is claimed of that model}; ``side`` [n];
    ``confidence`` [n]. In the order of confidence; of equals, the order in which they were given."""

    directions: dict[str, np.ndarray]
    side: np.ndarray
    confidence: np.ndarray

    @classmethod
    def of(cls, base, distilled, side, confidence) -> Claims:
        """Claims in any order, the MOST confident MOST of which are kept; NaN is no confidence."""
        confidence = np.nan_to_num(np.asarray(confidence, dtype=np.float64)).clip(0, 1)
        order = np.argsort(-confidence, kind="stable")[:MOST]
        rows = {s: np.asarray(v, dtype=np.float64)[order] for s, v in zip(SIDES, (base, distilled))}
        return cls(rows, np.asarray(side, dtype=object)[order], confidence[order])

    def __len__(self) -> int:
        return len(self.side)

    def some(self, chosen) -> Claims:
        """Those of a mask, a slice, or numbers."""
        rows = {s: v[chosen] for s, v in self.directions.items()}
        return Claims(rows, self.side[chosen], self.confidence[chosen])

    def own(self, side: str) -> np.ndarray:
        """The directions of the claims of a side in its own model, of unit length [claims of the side, d]."""
        rows = self.directions[side][self.side == side]
        return rows / np.linalg.norm(rows, axis=1, keepdims=True).clip(1e-12)

    def plain(self) -> list[dict]:
        """As in a file."""
        return [
            {"side": side, "confidence": round(float(c), 6)}
            | {s: [float(f"{x:.6g}") for x in v[i]] for s, v in self.directions.items() if v[i].any()}
            for i, (side, c) in enumerate(zip(self.side, self.confidence))
        ]


Place = tuple[str, int, bool]  # truth, seed, null


def write_claims(path: Path, finder: str, sets: Mapping[Place, Claims]) -> Path:
    """Write a file of claims."""
    rows = [dict(zip(KEYS, (*place, claims.plain()))) for place, claims in sets.items()]
    return write_text(Path(path), json.dumps({"finder": finder, "sets": rows}) + "\n")


def read_claims(path: Path, widths: Mapping[str, int] | None = None) -> tuple[str, dict[Place, Claims]]:
    """(the finder's name, its claims by truth, seed and null). ``widths`` {truth: d}: of the truths that
    there are; None where that is known. UserError for whatever is not as the file must be, with its place."""
    shown = path_shown(Path(path))
    try:
        content = json.loads(read_text(Path(path)))
    except ValueError as error:
        raise UserError(f"{shown} is not valid JSON: {error}") from None
    _has(content, shown, {"finder": str, "sets": list})
    if not content["sets"]:
        raise UserError(f"{shown} has no sets: it must have one for each truth and seed")
    found: dict[Place, Claims] = {}
    for number, one in enumerate(content["sets"]):
        where = f"{shown}, set {number}"
        _has(one, where, KEYS)
        place = one["truth"], one["seed"], one["null"]
        width = widths[check(f"{where}: truth", one["truth"], tuple(widths))] if widths else 0
        if place in found:
            raise UserError(f"{where}: truth {place[0]!r}, seed {place[1]}, null {place[2]} is there twice")
        found[place] = _claims(one["claims"], where, width)
    return content["finder"], found


def _claims(rows: list, where: str, width: int) -> Claims:
    parsed = {side: [] for side in SIDES}
    for number, row in enumerate(rows):
        here = f"{where}, claim {number}"
        _has(row, here, {"side": SIDES, "confidence": Share})
        for side in SIDES:
            vector = row.get(side, [])
            check(f"{here}: {side}", vector, list[float])
            width = width or len(vector)
            if side == row["side"] and not any(vector):
                raise UserError(
                    f"{here} has no direction in its own model: give {side!r}, a list that is not 0"
                )
            if vector and len(vector) != width:
                raise UserError(f"{here}: {side} has {len(vector)} numbers: it must have {width}")
            parsed[side].append(vector)
    full = (np.array([v or [0.0] * width for v in parsed[s]]).reshape(len(rows), width) for s in SIDES)
    return Claims.of(*full, [r["side"] for r in rows], [r["confidence"] for r in rows])


def _has(content, where: str, kinds: Mapping) -> None:
    """UserError unless ``content`` is a mapping with these entries, each of its kind."""
    names = ", ".join(kinds)
    if not isinstance(content, Mapping):
        raise UserError(f"{where} is a {type(content).__name__}: it must be a mapping with {names}")
    for name, kind in kinds.items():
        if name not in content:
            raise UserError(f"{where} has no {name!r}: it must have {names}")
        check(f"{where}: {name}", content[name], kind)
