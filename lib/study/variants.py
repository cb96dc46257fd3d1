"""One run and its variants (other seeds, other checkpoints, other kinds of crosscoder), and the parts of the
study: long experiments on a run, each computed once.

    variant = open_variant(here)                # of a notebook's run: what notebooks 01 to 03 made in it
    nulls = compute_nulls(variant, boots=300)   # a Part: read where it is current, else computed and kept

A part is a folder figures/<pair>/study/<part>/: tables as CSV and a manifest with its metrics, the
fingerprint of all that decides them and the artefacts they were computed from. For ``tiny`` and ``smol`` they
are committed. Pieces that take minutes are kept in data/runs/<pair>/<run>/study/."""

import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, wraps
from inspect import signature
from pathlib import Path

import numpy as np
import pandas as pd

from ..activations.harvest import harvest_activations
from ..activations.store import Store, open_store
from ..crosscoder.model import CrossCoder
from ..crosscoder.sharing import open_all
from ..crosscoder.training import TrainConfig
from ..features.table import Inspection, inspect
from ..models.pairs import Pair, load_pair
from ..results import Part, Results, read_part, read_results
from ..runs import (
    MANIFEST,
    Run,
    fingerprint,
    is_current,
    read_manifest,
    table_text,
    versions,
    write_manifest,
    write_text,
)
from ..settings import UserError
from ..text.corpus import build, override

HARVEST, TRAINING, INSPECTION = "01_harvest_activations", "02_train_crosscoder", "03_inspect_features"
USED = {  # parameters of the notebooks on which every part depends
    HARVEST: ("seed", "tokens", "trace_share", "layer"),
    TRAINING: (
        *("seed", "variant", "n_features", "k", "tokens", "batch_size"),
        *("learning_rate", "precision", "l1_coefficient"),
    ),
    INSPECTION: ("seed", "max_tokens", "nrn_over", "top_contexts"),
}
TEXTS = ("traces", "general")  # parameters of notebook 01 that name another text than the pair's


class Variant:
    """One run of one pair, with the parameters that made it."""

    def __init__(self, run: Run, parameters: Mapping[str, Mapping]):
        """``parameters`` of notebooks 01 to 03 by file name: {"01_harvest_activations": {"tokens": ...}}."""
        self.run, self.pair = run, load_pair(run.pair)
        self.parameters = {
            notebook: {name: parameters[notebook][name] for name in names} for notebook, names in USED.items()
        }
        # named only where there was a choice: so fingerprints of parts from before it stay valid
        harvest, inspection = self.parameters[HARVEST], self.parameters[INSPECTION]
        harvest |= {name: parameters[HARVEST][name] for name in TEXTS if parameters[HARVEST].get(name)}
        if "crosscoders" in parameters[TRAINING]:  # else the results are from before a run had several
            self.parameters[TRAINING]["crosscoders"] = parameters[TRAINING]["crosscoders"]
        self.seed = self.parameters[TRAINING]["seed"]  # of the run's first crosscoder
        self.layer = None if harvest["layer"] < 0 else harvest["layer"]  # the decoder layer; None: half depth
        self.max_tokens = inspection["max_tokens"]  # of a split, on which features are measured
        self.nrn_over = inspection["nrn_over"]  # above it a feature may stand for a category

    @cached_property
    def store(self) -> Store:
        return open_store(self.run, self.pair)

    @cached_property
    def _opened(self) -> list[tuple[CrossCoder, str]]:
        return open_all(self.run, self.store)

    @property
    def crosscoders(self) -> list[CrossCoder]:
        """All of the run; they differ in their seed alone (``seeds``)."""
        return [crosscoder for crosscoder, _ in self._opened]

    @property
    def seeds(self) -> range:
        """The seeds of the run's crosscoders."""
        return range(self.seed, self.seed + len(self._opened))

    @property
    def crosscoder(self) -> CrossCoder:
        """The first one."""
        return self._opened[0][0]

    @property
    def crosscoder_fingerprint(self) -> str:
        return self._opened[0][1]

    def config(self, seed: int | None = None, **changes) -> TrainConfig:
        """The training of notebook 02, with another seed or other fields."""
        given = dict(self.parameters[TRAINING])
        given.pop("crosscoders", None)
        given |= {"rate": given.pop("learning_rate"), "l1": given.pop("l1_coefficient")}
        return TrainConfig(**given | ({} if seed is None else {"seed": seed}) | changes)

    def inspection(self) -> Inspection:
        """The feature table of notebook 03."""
        p, folder = self.parameters[INSPECTION], self.run.path("features")
        opened = (self.crosscoder, self.store, folder, self.crosscoder_fingerprint, self.pair.tokenizer())
        return inspect(*opened, p["max_tokens"], p["top_contexts"], p["nrn_over"], p["seed"])

    def harvested(self, *names: str) -> tuple[Pair, Store]:
        """A store of other checkpoints of the same family, on the corpus of notebook 01. UserError if the
        run's store holds another text."""
        p = self.parameters[HARVEST]
        family = override(self.pair, **{name: p.get(name, "") for name in TEXTS})
        pair, options = family.between(*names), {"trace_share": p["trace_share"], "seed": p["seed"]}
        documents = build(pair, p["tokens"], **options)
        if build(family, p["tokens"], **options).fingerprint != self.store.manifest["corpus"]["fingerprint"]:
            raise UserError(
                f"the store of the run {self.run.name!r} was harvested from another text than the results of"
                " notebook 01 say: run notebook 01 again, and then this one"
            )
        folder = self.folder("_".join(("store", *names)))
        return pair, harvest_activations(pair, documents, folder, layer=self.layer)

    def folder(self, name: str) -> Path:
        """Where a part keeps a piece that is not computed twice."""
        return self.run.path("study") / name

    def fingerprint(self, part: str, version: int, budget: Mapping, *more) -> str:
        """Of all that decides a part: weights, parameters, budget, version, and ``more``."""
        models = {name: self.pair.fingerprint(name) for name in self.pair.models | self.pair.others}
        return fingerprint("study", part, version, models, self.parameters, dict(budget), *more)

    def needed(self, part: str) -> Part:
        """A part on which another one builds. UserError if it is not there."""
        found = read_part(self.run, part, **self._inputs())
        if not found:
            raise UserError(f"this part builds on the part {part!r}, which comes first. {found.note}")
        return found

    def null_limits(self) -> pd.DataFrame:
        """The null's thresholds for the first crosscoder, of the part "nulls"."""
        return self.needed("nulls").tables["thresholds"].query("seed == @self.seed")

    def _inputs(self) -> dict:
        """Fingerprints of the store, of the first crosscoder's weights, and of all crosscoders'."""
        every = [fingerprint for _, fingerprint in self._opened]
        return {"store": self.store.fingerprint, "crosscoder": every[0], "crosscoders": every}

    def part(
        self, name: str, version: int, budget: Mapping, compute: Callable[[], tuple[dict, dict]], *more
    ) -> Part:
        """The part ``name``, read if its fingerprint is current, else computed: ``compute() -> (metrics,
        tables)``. ``version`` is raised when the meaning of a number changes."""
        expected, began = self.fingerprint(name, version, budget, *more), time.monotonic()
        folder = self.run.figures / "study" / name
        # a part that is committed can be read where nothing was trained; beside other crosscoders than those
        # it was made from it says nothing
        if not is_current(folder, expected) or (
            self.run.path("crosscoder").is_dir()
            and read_manifest(folder, name)["inputs"].get("crosscoders") != self._inputs()["crosscoders"]
        ):
            metrics, tables = compute()
            info = {"budget": dict(budget), "seconds": round(time.monotonic() - began, 1)}
            write_part(self.run, name, expected, metrics, tables, self._inputs(), **info)
        return read_part(self.run, name)


def part_of_study(name: str, version: int, *more, **fixed) -> Callable:
    """A decorator: ``compute(variant, **budget) -> (metrics, tables)`` becomes the part ``name`` of the
    study, computed only if it is not current (``Variant.part``). All parameters but the variant are its
    budget; those of ``fixed`` only if they differ from this value, which they had before one could choose."""

    def decorate(compute: Callable[..., tuple[dict, dict]]) -> Callable[..., Part]:
        @wraps(compute)
        def read_or_compute(*args, **kwargs) -> Part:
            given = signature(compute).bind(*args, **kwargs)
            given.apply_defaults()
            (_, variant), *budget = given.arguments.items()
            chosen = {key: value for key, value in budget if fixed.get(key) != value}
            return variant.part(name, version, chosen, lambda: compute(*given.args), *more)

        return read_or_compute

    return decorate


def open_variant(here: Results | Run) -> Variant:
    """The run of a notebook, with the parameters that its notebooks 01 to 03 wrote into their results.
    UserError if one of these has not run."""
    run = here.run if isinstance(here, Results) else here
    return Variant(run, {notebook: read_results(run, notebook[:2])["parameters"] for notebook in USED})


def write_part(
    run: Run,
    name: str,
    fingerprint: str,
    metrics: dict,
    tables: Mapping[str, pd.DataFrame],
    inputs: dict,
    **info,
) -> None:
    """Tables as CSV, the manifest last: an interrupted part leaves nothing that could be read."""
    folder = run.figures / "study" / name
    folder.mkdir(parents=True, exist_ok=True)
    for old in (folder / MANIFEST, *folder.glob("*.csv")):
        old.unlink(missing_ok=True)
    for table, frame in tables.items():
        write_text(folder / f"{table}.csv", table_text(frame, "%.6g"))
    content = {"part": name, "inputs": inputs, "metrics": metrics, "tables": sorted(tables)}
    write_manifest(folder, fingerprint, **content, versions=versions(), **info)


def metric(value: float | None, ci: Sequence[float] | None = None, n: int | None = None) -> dict:
    """One number as results keep it: {value, ci, n}."""
    return {
        "value": None if value is None or np.isnan(value) else float(value),
        "ci": None if ci is None else [float(b) for b in ci],
        "n": None if n is None else int(n),
    }
