"""What takes longer than a newcomer waits: nulls, seeds, architectures, planted truth, causes, the ladder of
sizes.

    python -m lib study                              # make study: every part, on the embedded pair; hours of two cores, resumable
    python -m lib study --only nulls seeds --profile smoke

Each part leaves a folder figures/<pair>/study/<part>/: tables as CSV, and a manifest with its metrics ({name:
{value, ci, n}}), the fingerprint of all that decides them (weights of the models, parameters of notebooks 01
to 03 and of the study, version of the part) and the inputs they were computed from. For ``tiny`` these are
committed, and notebooks read them::

    nulls = read_part(run, "nulls", crosscoder=mark)      # refused if it was made from another crosscoder than the notebook's
    nulls.tables["thresholds"], nulls.metrics["null_false_positive_rate"]
    print(nulls.note)                                # says what was read, or why nothing was

A part needs the artefacts of notebooks 01 to 03 of its run (make figures ONLY="01 02 03"). Whatever takes
minutes is kept in data/runs/<pair>/<run>/study/ and is not computed twice.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd

from ..activations.harvest import harvest_activations
from ..activations.store import Store, open_store
from ..crosscoder.codes import codes, firing_frequency, sample_rows
from ..crosscoder.model import CrossCoder
from ..crosscoder.sharing import open_for_run
from ..crosscoder.training import TrainConfig, train
from ..distil.trials import puzzles
from ..features import use
from ..features.table import Inspection, category_features, feature_table, inspect
from ..labels import CATEGORIES
from ..models.pairs import Pair, load_pair
from ..results import Part, read_part
from ..runs import Run, fingerprint, is_current, versions, write_manifest, write_text
from ..settings import ROOT, Positive, UserError, integer, number, parameters
from ..stats import wilson
from ..steering import effects
from ..steering import experiments as causal
from ..text.corpus import build, override
from . import judging, ladder, nulls, planted
from .architectures import describe, match_l1, origins

USED = {  # parameters of the notebooks that the study shares
    "01_harvest_activations": ("seed", "tokens", "trace_share", "layer"),
    "02_train_crosscoder": (
        "seed",
        "variant",
        "n_features",
        "k",
        "tokens",
        "batch_size",
        "learning_rate",
        "precision",
        "l1_coefficient",
    ),
    "03_inspect_features": ("seed", "max_tokens", "nrn_over", "top_contexts"),
}
NOTEBOOKS = tuple(USED)
TEXTS = ("traces", "general")  # parameters of notebook 01 by which another text is taken than the pair's


@parameters
class Budget:
    """What the study spends; ``study:`` in a profile overrides it."""

    seeds: integer(2) = 3  # crosscoders of the pair, the run's own among them
    boots: integer(10) = 300  # resamples of documents behind an interval of nu
    features_per_category: Positive = 5  # that are removed together from whole thoughts
    choose_puzzles: integer(2) = 60  # validation puzzles on which strengths of placing are chosen
    report_puzzles: integer(2) = 200  # test puzzles on which whole thoughts are compared
    max_new_tokens: Positive = 250
    # share of the dictionary that the dedicated crosscoder reserves for each model
    dedicated: number(0, 0.5) = 0.05
    planted_width: integer(8) = 24  # of each model in planted data; numbers of features go with it
    planted_tokens: integer(2000) = 200_000
    # the smallest budget for the parts that have budgets of their own: to see that everything works
    small: bool = False


class Study:
    """One run of one pair, under study: its parameters, its artefacts, and the folders of the parts."""

    def __init__(
        self, pair: str, profile: str, parameters: dict[str, dict], budget: Budget, root: Path = ROOT
    ):
        """``parameters``: of notebooks 01 to 03, {stem: {name: value}}; only those of ``USED`` count."""
        self.run, self.pair, self.budget = Run(pair, profile, root), load_pair(pair), budget
        self.parameters = {
            stem: {name: parameters[stem][name] for name in names} for stem, names in USED.items()
        }
        texts = {name: text for name in TEXTS if (text := parameters[NOTEBOOKS[0]].get(name))}
        # named only where they are not the pair's own: older results stay what they are
        self.parameters[NOTEBOOKS[0]] |= texts

    # --- inputs ---------------------------------------------------------------------------------------------

    @cached_property
    def store(self) -> Store:
        return open_store(self.run, self.pair)

    @cached_property
    def _opened(self) -> tuple[CrossCoder, str]:
        return open_for_run(self.run, self.store)

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
        same = ("n_features", "variant", "k", "tokens", "batch_size", "precision")
        names = {"rate": "learning_rate", "l1": "l1_coefficient", **{name: name for name in same}}
        return TrainConfig(
            **{name: p[source] for name, source in names.items()}
            | {"seed": p["seed"] if seed is None else seed}
            | changes
        )

    def inspection(self) -> Inspection:
        """What notebook 03 made."""
        p = self.parameters[NOTEBOOKS[2]]
        return inspect(
            self.crosscoder,
            self.store,
            self.run.path("features"),
            self.mark,
            self.pair.tokenizer(),
            p["max_tokens"],
            p["top_contexts"],
            p["nrn_over"],
            p["seed"],
        )

    def harvested(self, *names: str) -> tuple[Pair, Store]:
        """A store of other checkpoints of the same family, on the corpus of notebook 01. UserError if its
        store holds another text.
        """
        p = self.parameters[NOTEBOOKS[0]]
        whole = override(self.pair, **{name: p.get(name, "") for name in TEXTS})
        pair, options = whole.between(*names), {"trace_share": p["trace_share"], "seed": p["seed"]}
        documents = build(pair, p["tokens"], **options)
        if build(whole, p["tokens"], **options).fingerprint != self.store.manifest["corpus"]["fingerprint"]:
            raise UserError(
                f"the store of the run {self.run.name!r} was harvested from another text than its profile"
                " says: put tokens, trace_share, traces, general and seed of notebook 01 into the profile,"
                " and run the notebook again"
            )
        return pair, harvest_activations(
            pair,
            documents,
            self.work("store_" + "_".join(names)),
            layer=None if p["layer"] < 0 else p["layer"],
        )

    def work(self, name: str) -> Path:
        """Where a part keeps what it would not compute twice."""
        return self.run.path("study") / name

    # --- results --------------------------------------------------------------------------------------------

    def fingerprint(self, part: str) -> str:
        """Of all that decides a part."""
        known = self.pair.models | self.pair.others
        models = {name: self.pair.fingerprint(name) for name in known}
        if part == "ladder":
            rungs = [load_pair(name) for name in ladder.PAIRS]
            models |= {
                f"{pair.name}/{name}": pair.fingerprint(name)
                for pair in rungs
                for name in pair.models | pair.others
            }
        budget = {name: getattr(self.budget, name) for name in PARTS[part].budget}
        # modules that keep pieces under versions of their own
        versions_of = {"ladder": ladder.VERSION, "planted": planted.VERSION}
        return fingerprint(
            "study",
            part,
            PARTS[part].version,
            models,
            self.parameters,
            budget,
            *filter(None, [versions_of.get(part)]),
        )

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
            write_text(
                folder / f"{name}.csv", table.to_csv(index=False, float_format="%.6g", lineterminator="\n")
            )
        inputs = {"store": self.store.fingerprint, "crosscoder": self.mark}
        write_manifest(
            folder,
            mark,
            part=part,
            inputs=inputs,
            metrics=metrics,
            tables=sorted(tables),
            budget=asdict(self.budget),
            versions=versions(),
            seconds=round(time.monotonic() - began, 1),
        )
        return True


def metric(value: float, ci: Sequence[float] | None = None, n: int | None = None) -> dict:
    """One number as results keep it: {value, ci, n}."""
    return {
        "value": None if value is None else float(value),
        "ci": None if ci is None else [float(b) for b in ci],
        "n": None if n is None else int(n),
    }


# --- nulls --------------------------------------------------------------------------------------------------


def compute_nulls(study: Study) -> tuple[dict, dict]:
    """Base against null_a sets thresholds, base against null_b with another crosscoder seed tells what they
    are worth.

    Both orders of roles and seeds are run, the second for the spread alone. The same two crosscoders say how
    much the *use* of features changes where nothing was distilled. A pair without a null_b has null_a in its
    place: then the false-positive rate covers the crosscoder's seed, but not the null's own training.
    """
    seed, tables, made, uses = study.config().seed, [], {}, []
    if "null_a" not in study.pair.others:
        raise UserError(
            f"the pair {study.pair.name!r} has no null_a among its others: nothing says how unique features"
            " look by chance"
        )
    sets = ("null_a", seed)
    tests = ("null_b" if "null_b" in study.pair.others else "null_a", seed + 1)
    spread = [(name, s) for name, s in (("null_b", seed), ("null_a", seed + 1)) if tests[0] == "null_b"]

    def used(crosscoder: CrossCoder, store: Store, of: str) -> pd.DataFrame:
        rows = sample_rows(store, "report", study.max_tokens)
        return use.use_table(use.solo_codes(crosscoder, store, rows), n_boot=10, model=of).assign(
            pair=f"base, {of}"
        )[["pair", "feature", "alive", "change"]]

    for name, s in (sets, tests, *spread):
        _, store = study.harvested("base", name)
        crosscoder = train(store, study.config(s), study.work(f"{name}_seed{s}"))
        made[name, s] = nulls.score_table(
            crosscoder, store, study.max_tokens, name, "base", n_boot=study.budget.boots
        )
        tables.append(made[name, s].assign(pair=f"base, {name}", seed=s))
        if (name, s) in (sets, tests):
            uses.append(used(crosscoder, store, name).assign(seed=s))
    uses.append(used(study.crosscoder, study.store, "distilled").assign(seed=seed))
    own = nulls.score_table(study.crosscoder, study.store, study.max_tokens, n_boot=study.budget.boots)
    limits = nulls.thresholds(made[sets])
    roles = {sets: "sets the thresholds", tests: "false positives"}
    rates = [
        nulls.rates(table, limits).assign(pair=f"base, {name}", seed=s, role=roles.get((name, s), "spread"))
        for (name, s), table in made.items()
    ]
    rates.append(nulls.rates(own, limits).assign(pair="base, distilled", seed=seed, role="the pair"))
    rates = pd.concat(rates, ignore_index=True)
    metrics = {}
    for score, prefix in (
        ("nrn", "null_false_positive_rate"),
        ("nrn_p2", "null_false_positive_rate_p2"),
        ("nu_eps", "null_false_positive_rate_nu_eps"),
        ("nu_r", "null_false_positive_rate_nu_r"),
    ):
        for level, suffix in ((0.01, ""), (0.05, "_at_5_percent")):
            row = rates[
                (rates.role == "false positives")
                & (rates.score == score)
                & (rates.side == "distilled")
                & (rates.level == level)
            ].iloc[0]
            metrics[prefix + suffix] = metric(row.rate, (row.low, row.high), row.n)
    limit = use.change_limit(uses[0])
    metrics["use_limit"] = metric(limit, n=int(uses[0].alive.sum()))
    for name, table in zip(("use_false_positive_rate", "use_reweighted_rate"), uses[1:]):
        hits, n = int(use.reweighted(table, limit).sum()), int(table.alive.sum())
        metrics[name] = metric(hits / n, wilson(hits, n), n)
    return metrics, {
        "thresholds": limits,
        "rates": rates,
        "scores": own,
        "null_scores": pd.concat(tables, ignore_index=True),
        "use": pd.concat(uses, ignore_index=True),
    }


# --- seeds --------------------------------------------------------------------------------------------------


def compute_seeds(study: Study) -> tuple[dict, dict]:
    """The run's crosscoder and others that differ in their seed alone: matches, and what each of them says of
    the categories.
    """
    first = study.config().seed
    crosscoders = [
        study.crosscoder,
        *(
            train(study.store, study.config(first + s), study.work(f"seed{first + s}"))
            for s in range(1, study.budget.seeds)
        ),
    ]
    nrn_over, tables, rows, alive = study.parameters[NOTEBOOKS[2]]["nrn_over"], [], [], []
    limits = needed(study, "nulls").tables["thresholds"]
    for s, crosscoder in enumerate(crosscoders):
        choose, report = (
            codes(crosscoder, study.store, split, study.max_tokens) for split in ("choose", "report")
        )
        table = feature_table(crosscoder, study.store, choose, report)
        scores = nulls.score_table(crosscoder, study.store, study.max_tokens, n_boot=10)
        chosen = category_features(table, nrn_over)
        alive.append(table["alive"].to_numpy(bool))
        unique = {score: nulls.beyond(scores, limits, score) for score in nulls.SCORES}
        row = {
            "seed": first + s,
            "alive": int(alive[-1].sum()),
            "nrn_mean": table.loc[alive[-1], "nrn"].mean(),
            "nrn_sd": table.loc[alive[-1], "nrn"].std(),
            **{f"unique_{score}": int(u.sum()) for score, u in unique.items()},
        }
        for c in CATEGORIES:
            f = chosen.get(c)
            known = f is not None
            row |= {
                f"feature_{c}": f,
                f"nrn_{c}": table["nrn"][f] if known else np.nan,
                f"auroc_{c}": table[f"auroc_{c}"][f] if known else np.nan,
                f"above_null_{c}": known and bool(unique["nrn"][f]),
            }
        rows.append(row)
        tables.append(
            scores.assign(seed=first + s)[
                ["seed", "feature", "alive", "frequency", "nrn", "nrn_p2", "side", "nu_eps", "nu_r"]
            ]
        )
    stable = nulls.stability(crosscoders, alive)
    unique = nulls.beyond(tables[0].reset_index(drop=True), limits, "nrn")
    above = stable["feature"].isin(np.flatnonzero(unique))
    metrics = {
        "stability_median": metric(stable["stability"].median(), n=len(stable)),
        "stability_chance": metric(stable["chance"].median(), n=len(stable)),
        "stability_unique_median": metric(
            stable.loc[above, "stability"].median() if above.any() else np.nan, n=int(above.sum())
        ),
    }
    for c in CATEGORIES:
        row = stable[stable["feature"] == rows[0][f"feature_{c}"]]
        cosines = row.filter(regex=r"^cosine_").to_numpy().ravel()
        found = (cosines.mean(), (cosines.min(), cosines.max())) if len(cosines) else (np.nan, None)
        # beside the mean: the lowest and the highest, not an interval
        metrics[f"stable_{c}"] = metric(*found, n=len(cosines))
    return metrics, {
        "stability": stable,
        "by_seed": pd.DataFrame(rows),
        "scores": pd.concat(tables, ignore_index=True),
    }


def needed(study: Study, part: str) -> Part:
    """Another part, which this one builds on. UserError if it is not there."""
    found = read_part(study.run, part, store=study.store.fingerprint, crosscoder=study.mark)
    if not found:
        raise UserError(f"this part builds on the part {part!r}, which comes first. {found.note}")
    return found


# --- architectures ------------------------------------------------------------------------------------------


def compute_architectures(study: Study) -> tuple[dict, dict]:
    """Other kinds of crosscoders at the sparsity of the run's, on the pair and on base against null_a; and
    base, style, distilled in one.

    Each architecture has a null of its own: what share of its features lies beyond the 99% quantile of its
    own null?
    """
    b, config = study.budget, study.config()
    _, null = study.harvested("base", "null_a")
    coefficient, tried = match_l1(
        study.store, config.k, config, study.work("match_l1"), tolerance=0.1, most=5
    )
    wanted = {
        "batchtopk": config,
        "topk": replace(config, variant="topk"),
        "jumprelu": replace(config, variant="jumprelu"),
        "dedicated": replace(config, dedicated=b.dedicated),
        "l1": replace(config, variant="l1", precision="float32", l1=coefficient),
    }
    # what other parts, and the search for lambda, have trained of the same
    there = {"batchtopk_null": f"null_a_seed{config.seed}", "l1_pair": f"match_l1/l1_{coefficient:.4g}"}
    work = lambda name: study.work(there.get(name, name))  # noqa: E731
    rows, curves = [], []
    for name, own in wanted.items():
        made = study.crosscoder if own == config else train(study.store, own, work(f"{name}_pair"))
        idle = train(null, own, work(f"{name}_null"))
        nrns = {}
        for what, crosscoder, s, of in (
            ("pair", made, study.store, "distilled"),
            ("null", idle, null, "null_a"),
        ):
            alive = firing_frequency(crosscoder, s) > 0
            nrns[what] = np.sort(crosscoder.nrn(1, of, "base").numpy()[alive])
            # a curve of 400 points is enough for a figure
            share = np.linspace(0, 1, 401)
            curves.append(
                pd.DataFrame(
                    {
                        "architecture": name,
                        "pair": what,
                        "nrn": np.quantile(nrns[what], share),
                        "share": share,
                    }
                )
            )
        outside = {what: float(((x < 0.3) | (x > 0.7)).mean()) for what, x in nrns.items()}
        limit = float(np.quantile(nrns["null"], 0.99))
        hits, n = int((nrns["pair"] > limit).sum()), len(nrns["pair"])
        low, high = wilson(hits, n)
        rows.append(
            {
                "architecture": name,
                **describe(made, study.store, n_boot=b.boots, seed=config.seed),
                "outside": outside["pair"],
                "outside_null": outside["null"],
                "null_limit": limit,
                "beyond_null": hits / n,
                "beyond_null_low": low,
                "beyond_null_high": high,
            }
        )
    metrics = {
        f"{name}_{row['architecture']}": metric(row[name], n=row["features"])
        for row in rows
        for name in ("l0", "outside", "outside_null", "beyond_null")
    }
    tables = {
        "architectures": pd.DataFrame(rows),
        "nrn": pd.concat(curves, ignore_index=True),
        "match_l1": tried,
    }
    if "style" in study.pair.others:
        _, store = study.harvested("base", "style", "distilled")
        crosscoder = train(store, config, study.work("three_models"))
        limits = (
            needed(study, "nulls").tables["thresholds"].set_index(["score", "side", "level"])["threshold"]
        )
        # a row so much shorter than others is absent
        short = (1 - limits["nrn", "distilled", 0.01]) / limits["nrn", "distilled", 0.01]
        table = origins(crosscoder, threshold=short / (2 + short))
        tables["origins"] = table.assign(alive=firing_frequency(crosscoder, store) > 0)
    return metrics, tables


# --- planted truth ------------------------------------------------------------------------------------------


def compute_planted(study: Study) -> tuple[dict, dict]:
    """Which method may be believed when: activations with known features, in the regime of ours, and one
    thing at a time changed.

    The regime is measured first, on the run's store through its crosscoder. Every architecture is tried in it
    (three seeds to choose a rule, five fresh ones to judge it); BatchTopK, which the notebooks train, is
    tried along the axes too.
    """
    b, report = study.budget, sample_rows(study.store, "report", study.max_tokens)
    measured = planted.regime(study.crosscoder, study.store, report)
    ours = planted.from_regime(measured, width=b.planted_width, tokens=b.planted_tokens)
    k = max(1, round(ours.l0))
    config = TrainConfig(
        n_features=256, k=k, tokens=3 * b.planted_tokens, batch_size=512, aux_k=16, dead_after=0.1
    )
    configs = {
        "batchtopk": config,
        "l1": replace(config, variant="l1"),
        "jumprelu": replace(config, variant="jumprelu"),
        "dedicated": replace(config, dedicated=0.125),
    }  # as many as there are unique features to find
    few = {"batchtopk": config}
    seeds, settings = judging.SEEDS, judging.SETTINGS
    if b.small:
        seeds, settings = {"choose": (0,), "report": (10,)}, judging.SETTINGS[:2]
        configs = {name: configs[name] for name in ("batchtopk", "l1")}
    table = judging.study(study.work("planted"), configs, ours, settings[:1], seeds)
    axes = judging.study(study.work("planted"), few, ours, settings, seeds)
    table = pd.concat([table, axes[axes["setting"] != judging.OURS.name]], ignore_index=True)
    rule = judging.recommend(table)
    # the best rule for the kind of crosscoder that the notebooks train
    own = judging.recommend(table, "batchtopk")
    metrics = judging.judge(table, rule) | {
        f"{name}_batchtopk": m for name, m in judging.judge(table, own).items()
    }
    rules = pd.DataFrame([{"for": "any architecture", **rule}, {"for": "batchtopk", **own}])
    regime = pd.DataFrame(
        [(name, str(value)) for name, value in asdict(measured).items()], columns=["quantity", "value"]
    )
    generator = pd.DataFrame(
        [(name, str(value)) for name, value in asdict(ours).items()], columns=["parameter", "value"]
    )
    return metrics, {
        "table": table,
        "summary": judging.summary(table),
        "rules": rules,
        "regime": regime,
        "generator": generator,
    }


# --- causes -------------------------------------------------------------------------------------------------


def compute_causal(study: Study) -> tuple[dict, dict]:
    """Whole thoughts of both models in lock-step: features removed, exchanged, used as the other model uses
    them, and placed.

    *Unique* are the features whose NRN lies beyond the null's 1% threshold on either side; *reweighted* are
    others whose use changes by more than 99% of the null's do. Strengths of placing are chosen on validation
    puzzles, everything is reported on test puzzles.
    """
    pair, store, crosscoder, b = study.pair, study.store, study.crosscoder, study.budget
    if pair.corpus != "generated":
        raise UserError(
            f'the part "causal" follows whole puzzles, which the pair {pair.name!r} was not made for: name'
            " other parts with --only"
        )
    table, null = study.inspection().table, needed(study, "nulls").tables
    unique = np.any(
        [nulls.beyond(null["scores"], null["thresholds"], "nrn", side) for side in nulls.SIDES], axis=0
    )
    used = {
        name: null["use"][null["use"]["pair"] == f"base, {name}"].reset_index(drop=True)
        for name in ("distilled", "null_a")
    }
    changed = use.reweighted(used["distilled"], used["null_a"]) & ~unique
    models, norm = {name: pair.load(name) for name in crosscoder.names}, store.mean_norms["distilled"]
    sets, vectors = causal.category_sets(table, b.features_per_category), causal.mean_differences(store)
    own_use, seed = causal.measure_use(crosscoder, store), study.config().seed
    mark = fingerprint(study.mark, *(pair.fingerprint(name) for name in crosscoder.names))

    def run(split: str, n: int, todo: list) -> pd.DataFrame:
        folder = study.work(f"causal_{split}")
        return causal.run(
            pair, models, crosscoder, store, puzzles(n, split), todo, folder, mark, b.max_new_tokens, seed
        )

    tried = run(
        "validation", b.choose_puzzles, causal.strengthenings(crosscoder, sets, vectors, norm, seed=seed)
    )
    placed = causal.strengthenings(
        crosscoder, sets, vectors, norm, causal.matching_strengths(tried), seed=seed
    )
    todo = causal.conditions(
        crosscoder, table, sets, own_use, vectors, np.flatnonzero(unique), np.flatnonzero(changed), seed=seed
    )
    rows = run("test", b.report_puzzles, list(dict.fromkeys([*todo, *placed])))
    rows = pd.concat([rows, *(effects.pooled(rows, kind) for kind in effects.CONTROLS)], ignore_index=True)
    summary, shares = effects.summarise(rows, seed=seed), effects.gap_shares(rows, seed=seed)
    metrics = effects.metrics(summary, shares) | {
        f"fve_alone_{name}": metric(value) for name, value in own_use.fve.items()
    }
    metrics |= {
        "unique_features": metric(unique.sum(), n=len(table)),
        "reweighted_features": metric(changed.sum(), n=len(table)),
    }
    removed = pd.DataFrame(
        [
            {
                "category": c,
                "feature": f,
                "nrn": table["nrn"][f],
                "unique": unique[f],
                "reweighted": changed[f],
            }
            for c, features in sets.items()
            for f in features
        ]
    )
    return metrics, {
        "summary": summary,
        "shares": shares,
        "placement": effects.extra_placed(rows, seed=seed),
        "sets": removed,
        "specificity": effects.specificity(summary).reset_index(),
    }


# --- the ladder ---------------------------------------------------------------------------------------------


def compute_ladder(study: Study) -> tuple[dict, dict]:
    """The same measurements on three sizes of the embedded pair."""
    budget = ladder.Budget.smoke() if study.budget.small else ladder.Budget()
    return ladder.measure(run_name=study.run.name, budget=budget, root=study.run.root)


# --- the parts ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Kind:
    compute: Callable[[Study], tuple[dict, dict]]
    version: int  # raised when the meaning of a number changes, so that older results are refused
    budget: tuple[str, ...] = ()  # fields of Budget that it depends on


PARTS = {
    "nulls": _Kind(compute_nulls, 1, ("boots",)),
    "seeds": _Kind(compute_seeds, 1, ("seeds",)),
    "architectures": _Kind(compute_architectures, 2, ("boots", "dedicated")),
    "planted": _Kind(compute_planted, 2, ("planted_width", "planted_tokens", "small")),
    "causal": _Kind(
        compute_causal, 2, ("features_per_category", "choose_puzzles", "report_puzzles", "max_new_tokens")
    ),
    "ladder": _Kind(compute_ladder, 1, ("small",)),
}
