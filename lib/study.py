"""What takes longer than a newcomer waits: nulls, seeds, architectures, planted truth, causes, the ladder of sizes.

    python -m lib.study                              # make study: every part, on the embedded pair; hours of two cores, resumable
    python -m lib.study --only nulls seeds --profile smoke

Each part leaves a folder figures/<pair>/study/<part>/: tables as CSV, and a manifest with its metrics ({name: {value, ci, n}}), the
fingerprint of all that decides them (weights of the models, parameters of notebooks 01 to 03 and of the study, version of the
part) and the inputs they were computed from. For ``tiny`` these are committed, and notebooks read them::

    nulls = load(run, "nulls", crosscoder=mark)      # refused if it was made from another crosscoder than the notebook's
    nulls.tables["thresholds"], nulls.metrics["null_false_positive_rate"]
    print(nulls.note)                                # says what was read, or why nothing was

A part needs the artefacts of notebooks 01 to 03 of its run (make figures ONLY="01 02 03"). Whatever takes minutes is kept in
data/runs/<pair>/<run>/study/ and is not computed twice.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from . import nulls
from .corpus import build
from .crosscoder import CrossCoder
from .features import Inspection, category_features, codes, feature_table, inspect, open_crosscoder
from .harvest import harvest
from .pairs import Pair, load_pair
from .puzzles import CATEGORIES
from .results import ROOT, Run, UserError, check, fingerprint, is_current, read_manifest, versions, wilson, write_manifest, write_text
from .run import parameters_of, read_profile
from .store import Store
from .training import TrainConfig, open_store, train

NOTEBOOKS = ("01_harvest_activations", "02_train_crosscoder", "03_inspect_features")


@dataclass(frozen=True)
class Budget:
    """What the study spends; ``study:`` in a profile overrides it."""

    seeds: int = 3  # crosscoders of the pair, the run's own among them
    boots: int = 300  # resamples of documents behind an interval of nu

    def __post_init__(self) -> None:
        check("seeds of the study", self.seeds, int, low=2)
        check("boots of the study", self.boots, int, low=10)


@dataclass
class Part:
    """Metrics and tables of one part, as a notebook reads them. ``note`` says what was read, or why there is nothing."""

    name: str
    note: str
    metrics: dict[str, dict] = field(default_factory=dict)
    tables: dict[str, pd.DataFrame] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.tables)


class Study:
    """One run of one pair, under study: its parameters, its artefacts, and the folders of the parts."""

    def __init__(self, pair: str, profile: str = "default", notebooks: Path = ROOT / "notebooks", root: Path = ROOT):
        self.run, self.pair = Run(pair, profile, root), load_pair(pair)
        stems = sorted(p.stem for p in notebooks.glob("[0-9][0-9]_*.ipynb"))
        known = (notebooks / "profiles" / f"{profile}.yaml").is_file()  # a run of another name has the default's parameters
        chosen = read_profile(notebooks / "profiles", profile if known else "default", stems)
        self.budget = Budget(**chosen.get("study", {}))
        self.parameters = {stem: parameters_of(notebooks / f"{stem}.ipynb") | chosen.get(stem, {}) for stem in NOTEBOOKS}

    # --- inputs ------------------------------------------------------------------------------------------------

    @cached_property
    def store(self) -> Store:
        return open_store(self.run, self.pair)

    @cached_property
    def _opened(self) -> tuple[CrossCoder, str]:
        return open_crosscoder(self.run, self.store)

    @property
    def crosscoder(self) -> CrossCoder:
        return self._opened[0]

    @property
    def mark(self) -> str:
        """Fingerprint of the run's crosscoder."""
        return self._opened[1]

    @property
    def max_tokens(self) -> int:
        return self.parameters[NOTEBOOKS[2]]["max_tokens"]

    def config(self, seed: int | None = None, **changes) -> TrainConfig:
        """The crosscoder of notebook 02, with another seed."""
        p = self.parameters[NOTEBOOKS[1]]
        names = dict(rate="learning_rate", l1="l1_coefficient") | {n: n for n in ("n_features", "variant", "k", "tokens", "batch_size", "precision")}
        return TrainConfig(**{name: p[source] for name, source in names.items()} | {"seed": p["seed"] if seed is None else seed} | changes)

    def inspection(self) -> Inspection:
        """What notebook 03 made."""
        p = self.parameters[NOTEBOOKS[2]]
        return inspect(self.crosscoder, self.store, self.run.path("features"), self.mark, self.pair.tokenizer(), p["max_tokens"],
                       p["top_contexts"], p["nrn_over"], p["seed"])

    def harvested(self, *names: str) -> tuple[Pair, Store]:
        """A store of other checkpoints of the same family, on the corpus of notebook 01."""
        p = self.parameters[NOTEBOOKS[0]]
        pair = self.pair.between(*names)
        documents = build(pair, p["tokens"], trace_share=p["trace_share"], seed=p["seed"])
        return pair, harvest(pair, documents, self.work("store_" + "_".join(names)), layer=None if p["layer"] < 0 else p["layer"])

    def work(self, name: str) -> Path:
        """Where a part keeps what it would not compute twice."""
        return self.run.path("study") / name

    # --- results -----------------------------------------------------------------------------------------------

    def fingerprint(self, part: str) -> str:
        """Of all that decides a part."""
        known = self.pair.models | self.pair.others
        models = {name: self.pair.fingerprint(name) for name in known}
        return fingerprint("study", part, PARTS[part].version, models, self.parameters, asdict(self.budget))

    def folder(self, part: str) -> Path:
        return self.run.figures / "study" / part

    def make(self, part: str) -> bool:
        """Compute a part unless it is there; True if it was computed."""
        mark, folder, began = self.fingerprint(part), self.folder(part), time.monotonic()
        if is_current(folder, mark):
            return False
        metrics, tables = PARTS[part].compute(self)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "manifest.json").unlink(missing_ok=True)
        for old in folder.glob("*.csv"):
            old.unlink()
        for name, table in tables.items():
            write_text(folder / f"{name}.csv", table.to_csv(index=False, float_format="%.6g", lineterminator="\n"))
        inputs = {"store": self.store.fingerprint, "crosscoder": self.mark}
        write_manifest(folder, mark, part=part, inputs=inputs, metrics=metrics, tables=sorted(tables), budget=asdict(self.budget),
                       versions=versions(), seconds=round(time.monotonic() - began, 1))
        return True


def load(run: Run, part: str, **inputs: str) -> Part:
    """The results of a part of a run, if they were made from what there is now; else a ``Part`` that is empty and says why.

    ``inputs``: fingerprints of the notebook's own artefacts (store, crosscoder) that the part must have been made from.
    """
    folder = run.figures / "study" / part
    again = " ".join(["make study"] + ([f"PAIR={run.pair}"] if run.pair != "tiny" else [])
                     + ([f"PROFILE={run.name}"] if run.name != "default" else []) + [f"ONLY={part}"])
    if not (folder / "manifest.json").is_file():
        return Part(part, f"Not computed for this run: the part \"{part}\" of the study ({again}).")
    manifest = read_manifest(folder, part)
    if manifest["fingerprint"] != Study(run.pair, run.name, root=run.root).fingerprint(part):
        return Part(part, f"Refused: the part \"{part}\" of the study was made from other weights, parameters or code than there are now ({again}).")
    for name, value in inputs.items():
        if manifest["inputs"].get(name) != value:
            return Part(part, f"Refused: the part \"{part}\" of the study was made from another {name} than this notebook has ({again}).")
    tables = {name: pd.read_csv(folder / f"{name}.csv", keep_default_na=False, na_values=[""]) for name in manifest["tables"]}
    note = f"Read, not computed here: the part \"{part}\" of the study ({again}; {manifest['seconds'] / 60:.0f} minutes)."
    return Part(part, note, manifest["metrics"], tables)


def metric(value: float, ci: Sequence[float] | None = None, n: int | None = None) -> dict:
    return {"value": None if value is None else float(value), "ci": None if ci is None else [float(b) for b in ci], "n": None if n is None else int(n)}


# --- nulls ---------------------------------------------------------------------------------------------------------


def compute_nulls(study: Study) -> tuple[dict, dict]:
    """Base against null_a sets thresholds, base against null_b with another crosscoder seed tells what they are worth.

    Both orders of roles and seeds are run, the second for the spread alone.
    """
    seed, tables, made = study.config().seed, [], {}
    for name, s in (("null_a", seed), ("null_b", seed + 1), ("null_b", seed), ("null_a", seed + 1)):
        _, store = study.harvested("base", name)
        crosscoder = train(store, study.config(s), study.work(f"{name}_seed{s}"))
        made[name, s] = nulls.score_table(crosscoder, store, study.max_tokens, name, "base", n_boot=study.budget.boots)
        tables.append(made[name, s].assign(pair=f"base, {name}", seed=s))
    own = nulls.score_table(study.crosscoder, study.store, study.max_tokens, n_boot=study.budget.boots)
    limits = nulls.thresholds(made["null_a", seed])
    rates = [nulls.rates(table, limits).assign(pair=f"base, {name}", seed=s, role="sets the thresholds" if (name, s) == ("null_a", seed) else
                                               "false positives" if (name, s) == ("null_b", seed + 1) else "spread")
             for (name, s), table in made.items()]
    rates.append(nulls.rates(own, limits).assign(pair="base, distilled", seed=seed, role="the pair"))
    rates = pd.concat(rates, ignore_index=True)
    metrics = {}
    for score, prefix in (("nrn", "null_false_positive_rate"), ("nrn_p2", "null_false_positive_rate_p2"),
                          ("nu_eps", "null_false_positive_rate_nu_eps"), ("nu_r", "null_false_positive_rate_nu_r")):
        for level, suffix in ((0.01, ""), (0.05, "_at_5_percent")):
            row = rates[(rates.role == "false positives") & (rates.score == score) & (rates.side == "distilled") & (rates.level == level)].iloc[0]
            metrics[prefix + suffix] = metric(row.rate, (row.low, row.high), row.n)
    return metrics, {"thresholds": limits, "rates": rates, "scores": own, "null_scores": pd.concat(tables, ignore_index=True)}


# --- seeds -----------------------------------------------------------------------------------------------------------


def compute_seeds(study: Study) -> tuple[dict, dict]:
    """The run's crosscoder and others that differ in their seed alone: matches, and what each of them says of the categories."""
    first = study.config().seed
    crosscoders = [study.crosscoder, *(train(study.store, study.config(first + s), study.work(f"seed{first + s}"))
                                       for s in range(1, study.budget.seeds))]
    nrn_over, tables, rows, alive = study.parameters[NOTEBOOKS[2]]["nrn_over"], [], [], []
    limits = load(study.run, "nulls").tables.get("thresholds")
    if limits is None:
        raise UserError("seeds are judged by the thresholds of the nulls: run the part nulls first (make study ONLY=nulls)")
    for s, crosscoder in enumerate(crosscoders):
        choose, report = (codes(crosscoder, study.store, split, study.max_tokens) for split in ("choose", "report"))
        table = feature_table(crosscoder, study.store, choose, report)
        scores = nulls.score_table(crosscoder, study.store, study.max_tokens, n_boot=10)
        chosen = category_features(table, nrn_over)
        alive.append(table["alive"].to_numpy(bool))
        unique = {score: nulls.beyond(scores, limits, score) for score in nulls.SCORES}
        row = {"seed": first + s, "alive": int(alive[-1].sum()), "nrn_mean": table.loc[alive[-1], "nrn"].mean(),
               "nrn_sd": table.loc[alive[-1], "nrn"].std(), **{f"unique_{score}": int(u.sum()) for score, u in unique.items()}}
        for c in CATEGORIES:
            f = chosen.get(c)
            row |= {f"feature_{c}": f, f"nrn_{c}": table["nrn"][f] if f is not None else np.nan,
                    f"auroc_{c}": table[f"auroc_{c}"][f] if f is not None else np.nan, f"above_null_{c}": bool(unique["nrn"][f]) if f is not None else False}
        rows.append(row)
        tables.append(scores.assign(seed=first + s)[["seed", "feature", "alive", "frequency", "nrn", "nrn_p2", "side", "nu_eps", "nu_r"]])
    stable = nulls.stability(crosscoders, alive)
    unique = nulls.beyond(tables[0].reset_index(drop=True), limits, "nrn")
    above = stable["feature"].isin(np.flatnonzero(unique))
    metrics = {"stability_median": metric(stable["stability"].median(), n=len(stable)), "stability_chance": metric(stable["chance"].median(), n=len(stable)),
               "stability_unique_median": metric(stable.loc[above, "stability"].median() if above.any() else np.nan, n=int(above.sum()))}
    for c in CATEGORIES:
        row = stable[stable["feature"] == rows[0][f"feature_{c}"]]
        cosines = row.filter(regex=r"^cosine_").to_numpy().ravel()
        metrics[f"stable_{c}"] = metric(cosines.mean() if len(cosines) else np.nan, (cosines.min(), cosines.max()) if len(cosines) else None, len(cosines))
    return metrics, {"stability": stable, "by_seed": pd.DataFrame(rows), "scores": pd.concat(tables, ignore_index=True)}


# --- the parts -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Kind:
    compute: Callable[[Study], tuple[dict, dict]]
    version: int  # raised when the meaning of a number changes, so that older results are refused


PARTS = {"nulls": _Kind(compute_nulls, 1), "seeds": _Kind(compute_seeds, 1)}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m lib.study", description="Compute the long parts of the study, or go on with them.")
    parser.add_argument("--pair", default="tiny", help="entry of data/pairs.yaml (default: tiny)")
    parser.add_argument("--profile", default="default", help="file of notebooks/profiles, whose run is studied")
    parser.add_argument("--only", nargs="*", default=[], metavar="PART", help=f"of {', '.join(PARTS)} (default: all, in this order)")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    try:
        wanted = [part for text in args.only for part in text.replace(",", " ").split()] or list(PARTS)
        if unknown := [part for part in wanted if part not in PARTS]:
            raise UserError(f"unknown part {unknown[0]!r}: there are {', '.join(PARTS)}")
        study = Study(args.pair, args.profile)
        for part in PARTS:
            if part in wanted:
                began = time.monotonic()
                print(f"{part} ...", flush=True)
                done = study.make(part)
                print(f"{part}: {f'{time.monotonic() - began:.0f} s' if done else 'there already'}", flush=True)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted: what is finished is kept; the same command goes on from there", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
