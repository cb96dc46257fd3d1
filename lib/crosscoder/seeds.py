"""The crosscoders of a run: several, which differ in their seed alone (first rows, order of batches).

    crosscoders = train_all(store, config, run, 5)      # or read, where they were trained or are shipped
    crosscoders, contents = open_all(run, store)        # what is there

They lie in the run's folders ``crosscoder`` (the first one, which is shown where one has to be shown),
``crosscoder_1``, ``crosscoder_2`` and so on. Those of the embedded pair come with the repository, in
data/pairs/<pair>/crosscoders/, so that everybody reads the same features; whoever trains them anew gets
others, and ``agreement`` says how far they are the same."""

import filecmp
import shutil
from collections.abc import Sequence
from dataclasses import replace
from itertools import count, takewhile
from pathlib import Path

import pandas as pd

from ..activations.store import Store
from ..runs import MANIFEST, Run, fingerprint, is_current, read_manifest, whole_files
from ..settings import ROOT, UserError
from .codes import firing_frequency
from .model import CrossCoder
from .recurrence import LIMIT, chance, match
from .training import TrainConfig, train

MADE_BY = "02_train_crosscoder"


def folder(run: Run, number: int, name: str = "crosscoder") -> Path:
    """Where a run keeps its crosscoder of this number; the first is 0."""
    return run.path(f"{name}_{number}" if number else name)


def shipped(pair: str, config: TrainConfig, name: str = "crosscoder") -> Path:
    """Where the crosscoder of this seed lies, if it came with the repository."""
    return ROOT / "data" / "pairs" / pair / name.replace("crosscoder", "crosscoders") / str(config.seed)


def content(crosscoder: CrossCoder) -> str:
    """Fingerprint of all that decides what a crosscoder does."""
    state = {name: t.cpu().numpy() for name, t in crosscoder.state_dict().items()}
    shape = crosscoder.names, crosscoder.widths, crosscoder.variant, crosscoder.k
    return fingerprint("crosscoder", *shape, state)


def train_all(
    store: Store, config: TrainConfig, run: Run, n: int, anew: bool = False, name: str = "crosscoder"
) -> list[CrossCoder]:
    """The ``n`` crosscoders of a run, with the seeds ``config.seed``, ``config.seed`` + 1, ...

    Each is read if the run has it, else copied from the repository if that was trained with the same
    configuration on the same store, else trained. ``anew``: shipped ones are not taken. Crosscoders of the
    run beyond ``n`` are removed."""
    for number in takewhile(lambda i: folder(run, i, name).is_dir(), count(n)):
        shutil.rmtree(folder(run, number, name))
    crosscoders = []
    for number in range(n):
        own, one = folder(run, number, name), replace(config, seed=config.seed + number)
        key, source = one.fingerprint(store), shipped(run.pair, one, name)
        if anew:
            files = [place / "crosscoder.safetensors" for place in (own, source)]
            if is_current(own, key) and is_current(source, key) and filecmp.cmp(*files, shallow=False):
                (own / MANIFEST).unlink()
        elif not is_current(own, key) and is_current(source, key):
            _copy(source, own)
        crosscoders.append(train(store, one, own))
    return crosscoders


def _copy(source: Path, target: Path) -> None:
    """All files of a crosscoder's folder, the manifest last."""
    (target / MANIFEST).unlink(missing_ok=True)
    with whole_files(target) as scratch:
        for file in source.iterdir():
            if file.name != MANIFEST:
                shutil.copyfile(file, scratch / file.name)
    with whole_files(target) as scratch:
        shutil.copyfile(source / MANIFEST, scratch / MANIFEST)


def open_all(run: Run, store: Store, name: str = "crosscoder") -> list[CrossCoder]:
    """The run's crosscoders. UserError if there is none, or one was trained on another store than this one,
    or with another configuration than the first."""
    crosscoders, expected = [], None
    for number in takewhile(lambda i: i == 0 or folder(run, i, name).is_dir(), count()):
        manifest = read_manifest(folder(run, number, name), MADE_BY)
        if manifest.get("store") != store.fingerprint:
            raise UserError(
                "the crosscoder was trained on another store than there is now: run notebook"
                f" {MADE_BY} again (make figures ONLY=02)"
            )
        config = manifest.get("config", {}) | {"seed": None}
        if config != (expected := expected or config):
            raise UserError(
                f"the crosscoders of the run {run.name!r} were trained with different parameters: run"
                f" notebook {MADE_BY} again (make figures ONLY=02)"
            )
        crosscoders.append(CrossCoder.load(folder(run, number, name)))
    return crosscoders


def agreement(store: Store, config: TrainConfig, run: Run, crosscoders: Sequence[CrossCoder]) -> pd.DataFrame:
    """How far crosscoders that were trained anew are those that came with the repository, seed by seed: seed,
    features (alive), median cosine with their matches, the share of at least LIMIT, chance (permuted
    coordinates). Empty if none came."""
    rows = []
    for number, crosscoder in enumerate(crosscoders):
        one = replace(config, seed=config.seed + number)
        if is_current(source := shipped(run.pair, one), one.fingerprint(store)):
            both = crosscoder, CrossCoder.load(source)
            alive = [firing_frequency(c, store) > 0 for c in both]
            cosine = match(*both, *alive)["cosine"].fillna(0.0)
            shares = cosine.median(), (cosine >= LIMIT).mean(), chance(both, alive)
            rows.append((one.seed, len(cosine), *shares))
    return pd.DataFrame(rows, columns=["seed", "features", "median cosine", f"at least {LIMIT}", "chance"])
