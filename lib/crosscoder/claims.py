"""What is said of a crosscoder by its file, the log of its training, and whoever gives it: to be checked."""

import ast
import contextlib
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from ..runs import read_table
from ..settings import NotNegative, Positive, UserError, number, read_text
from . import sharing
from .exchange import configuration, weights_file
from .model import INITIAL_NORM, CrossCoder

_FVE = number(high=1)
# may be given
CLAIMS = {"fve": _FVE | dict[str, _FVE], "l0": NotNegative, "shown": Positive, "distinct": Positive}
# names in logs: of this project, and of the replication
FVE = ("fve", "explained_variance")
L0 = ("l0_at_threshold", "l0", "l0_loss")
L1 = ("l1_coeff", "l1_coefficient")


@dataclass(frozen=True)
class Claims:
    """What is said of a crosscoder: ``fve`` {model: value}; ``l0``; tokens ``shown`` in training, and
    ``distinct`` ones; the share of ``zero_rows`` in its first batch; ``drawn``, ||D|| before training."""

    fve: Mapping[str, float] = field(default_factory=dict)
    l0: float | None = None
    shown: int | None = None
    distinct: int | None = None
    zero_rows: float | None = None
    drawn: float = 0.0


def claims_of(
    foreign: sharing.Foreign, path: Path, log: Path | None = None, facts: Mapping | None = None
) -> Claims:
    """What ``facts``, file and log say; of several that speak of the same, the first."""
    crosscoder, ours, facts = foreign.crosscoder, sharing.is_ours(path), dict(facts or {})
    shown, distinct = (count or None for count in crosscoder.seen.tolist())
    drawn = 0.0 if ours else configuration(weights_file(path)).get("dec_init_norm", INITIAL_NORM) / 2**0.5
    claims = Claims(foreign.fve or {}, None, shown, distinct, None, drawn)
    if log is None and ours and (path / "log.jsonl").is_file():
        log = path / "log.jsonl"
    if log is not None:
        claims = _logged(claims, log, crosscoder)
    if "fve" in facts and not isinstance(facts["fve"], Mapping):
        facts["fve"] = dict.fromkeys(crosscoder.names, facts["fve"])
    return replace(claims, **{name: facts[name] for name in CLAIMS if name in facts})


def _logged(claims: Claims, log: Path, crosscoder: CrossCoder) -> Claims:
    """The claims with the means over a log's last tenth (CSV, or dictionaries among other text), and with the
    share of zero rows in its first batch, where that is an untrained L1 crosscoder's: half of its features
    fire on any row, and none on zeros."""
    text, lines = read_text(log), []
    if log.suffix == ".csv":
        with contextlib.suppress(ValueError):  # no table: no lines
            lines = read_table(io.StringIO(text)).to_dict("records")
    for printed in re.findall(r"\{['\"]\w+['\"]: [^{}]*\}", text.replace(": null", ": None")):
        with contextlib.suppress(ValueError, SyntaxError):  # nan, or no dictionary
            lines.append(ast.literal_eval(printed))
    lines = [line for line in lines if line.keys() & {*FVE, *L0}]
    if not lines:
        raise UserError(f"{log} is no training log: it has no line with one of {', '.join((*FVE, *L0))}")

    def last(names: Sequence[str]) -> float | None:
        name = next((name for name in names if name in lines[-1]), None)
        return name and float(np.mean([line[name] for line in lines[-max(len(lines) // 10, 1) :]]))

    fve = {
        model: last([*(f"{name}_{end}" for name in FVE for end in (model, letter)), *FVE])
        for letter, model in zip("AB", crosscoder.names)
    }
    known = {model: value for model, value in fve.items() if value is not None}
    claims, first = replace(claims, fve=known | dict(claims.fve), l0=last(L0)), lines[0]
    if any(first.get(name) == 0 for name in L1):
        fired = next(first[name] for name in L0 if name in first)
        claims = replace(claims, zero_rows=max(0.0, 1 - 2 * fired / crosscoder.n_features))
    return claims
