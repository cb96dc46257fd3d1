"""The long parts of the study, computed one after the other; interrupted, they go on."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import torch

from ..settings import ROOT, UserError, read_profile
from ..study.robustness import along_training, on_another_text, write
from ..study.variants import NOTEBOOKS, PARTS, Budget, Study
from .notebooks import parameters_of


def open_study(
    pair: str, profile: str = "default", notebooks: Path = ROOT / "notebooks", root: Path = ROOT
) -> Study:
    """A run under study, with the parameters that its notebooks and its profile say."""
    stems = sorted(p.stem for p in notebooks.glob("[0-9][0-9]_*.ipynb"))
    # a run of another name has the default's parameters
    known = (notebooks / "profiles" / f"{profile}.yaml").is_file()
    chosen = read_profile(notebooks / "profiles", profile if known else "default", stems, pair)
    parameters = {
        stem: parameters_of(notebooks / f"{stem}.ipynb") | chosen.get(stem, {}) for stem in NOTEBOOKS
    }
    return Study(pair, profile, parameters, Budget(**chosen.get("study", {})), root)


def compute(pair: str, profile: str, only: Sequence[str] = ()) -> None:
    """The parts of the study that are not there yet, or those of ``only``."""
    torch.set_num_threads(1)
    wanted = [part for text in only for part in text.replace(",", " ").split()] or list(PARTS)
    if unknown := [part for part in wanted if part not in PARTS]:
        raise UserError(f"unknown part {unknown[0]!r}: there are {', '.join(PARTS)}")
    study = open_study(pair, profile)
    for part in PARTS:
        if part in wanted:
            began = time.monotonic()
            print(f"{part} ...", flush=True)
            done = study.make(part)
            print(f"{part}: {f'{time.monotonic() - began:.0f} s' if done else 'there already'}", flush=True)


def compute_robustness(
    what: str, pair: str, states: Sequence[Path], tokens: int, traces: str, general: str
) -> None:
    """How NRN depends on the training ("training"), or on the text ("texts")."""
    if not (states if what == "training" else traces and general):
        raise UserError("training needs --states, texts needs --traces and --general")
    study, began = open_study(pair), time.monotonic()
    if what == "training":
        tables = {"training": along_training(study, states, tokens)}
        about = {"base": study.pair.fingerprint("base"), "tokens": tokens}
    else:
        tables = on_another_text(study, traces, general)
        names = {"traces": Path(traces).name, "general": Path(general).name}
        about = {"store": study.store.fingerprint, "crosscoder": study.mark, **names}
    folder = write(study, what, tables, **about)
    print(f"{folder}: {time.monotonic() - began:.0f} s")
