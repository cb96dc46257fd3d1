"""What grows with the model? The same measurements on every rung of a ladder of pairs: one recipe, several
widths (E6, E7).

    metrics, tables = measure(("tiny_small", "tiny", "tiny_large"), "default")
    tables["rungs"]          one row per pair and quantity: value, 95% interval, what the interval is over

The paper compares three sizes of pairs that differ in more than size, with one crosscoder each. Here each
rung has what is needed to read its numbers:

- **gates**: did distillation work at this size? Accuracy of the distilled model's thinking, of the base's
  direct answers, P(reflection |
  error) and its AUROC, on test puzzles. A difference between sizes can be one of size, or of how well the
  student learnt.
- **its own null**: base against null_a (the base trained on, on its own text) through the same crosscoder.
  Widths have noise of their own;
  the threshold for a unique feature is the 99% quantile of *this* rung's null, and base against null_b tells
  how many features such a threshold lets through by chance.
- **seeds**: several crosscoders of base and distilled. Intervals of what a crosscoder says are Student's t
  over seeds; those of what a
  model says are over puzzles, documents or words. None of them is over *training a pair again*: every rung is
  one pair.

Everything has the same budget on every rung: corpus, tokens, dictionary, sparsity. (The paper's dictionary
has one size for three widths, too.)

Long work is kept piece by piece under data/runs/<largest pair>/<run>/ladder/<pair>/, and stores and
crosscoders that notebooks 01 and 02, or other parts of the study, have made of the same are used where they
lie.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from sklearn.metrics import roc_auc_score

from .. import stats as stats_module
from ..activations.harvest import SHARD_TOKENS, harvest_activations, job_of
from ..activations.positions import is_category, positions
from ..activations.store import Store
from ..crosscoder.codes import codes, sample_rows
from ..crosscoder.health import health
from ..crosscoder.model import CrossCoder
from ..crosscoder.training import TrainConfig, train
from ..distil import trials
from ..features import auroc as detection
from ..features.table import category_features
from ..geometry import parallelograms as geometry
from ..geometry import similarity, words
from ..labels import CATEGORIES, DETECTED
from ..models.pairs import load_pair
from ..models.reader import BATCH_TOKENS, wrap
from ..runs import Progress, Run, fingerprint, is_current, kept_table
from ..settings import ROOT, UserError, check
from ..stats import bootstrap, t_interval, wilson
from ..steering import outcomes as responses
from ..steering import steer as steering
from ..text.corpus import build

VERSION = 1  # of the measurements: raised when a definition changes, so that what was kept is made anew
PAIRS = ("tiny_small", "tiny", "tiny_large")
LEVEL = 0.99  # quantile of the null's NRN above which a feature counts as unique
STEERED = ("reflection", "verification")  # what makes thoughts longer


@dataclass(frozen=True)
class Budget:
    """What a rung spends: the same on every rung. The defaults of corpus and crosscoder are those of
    notebooks 01 and 02.
    """

    tokens: int = 1_100_000  # harvested, half of them traces
    n_features: int = 1024
    k: int = 24
    train_tokens: int = 3_000_000
    batch_size: int = 1024
    seeds: int = 3  # crosscoders of base and distilled
    null_seeds: int = 2  # of base and null_a, which set the threshold
    check_seeds: int = 1  # of base and null_b, which tell what it lets through
    max_tokens: int = 60_000  # of a split, for what features do
    acts_tokens: int = 8_000  # of the report split, for similarity of activations
    puzzles: int = 300  # test puzzles for the gates
    probed: int = 100  # of them, read for P(reflection)
    choose_puzzles: int = 40  # validation puzzles on which the steered feature is chosen
    report_puzzles: int = 80  # test puzzles on which it is reported
    strength: float = 0.5  # of steering, in mean residual norms; half of it is used, too
    random_directions: int = 3
    max_new_tokens: int = 250
    boots: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if name == "strength":
                check(name, value, float, low=0)
            else:
                check(
                    name,
                    value,
                    int,
                    low=0 if name in ("seed", "check_seeds") else 2 if name == "seeds" else 1,
                )

    @classmethod
    def smoke(cls) -> Budget:
        """To see that everything works, in seconds. The numbers mean nothing."""
        return cls(
            tokens=8_000,
            n_features=64,
            k=8,
            train_tokens=8_000,
            batch_size=512,
            seeds=2,
            null_seeds=1,
            max_tokens=2_000,
            acts_tokens=800,
            puzzles=12,
            probed=10,
            choose_puzzles=3,
            report_puzzles=3,
            random_directions=1,
            max_new_tokens=30,
            boots=50,
        )

    def config(self, seed: int) -> TrainConfig:
        """The crosscoder's training, with another seed; on every rung the same."""
        return TrainConfig(
            n_features=self.n_features,
            k=self.k,
            tokens=self.train_tokens,
            batch_size=self.batch_size,
            seed=self.seed + seed,
        )


# --- one rung -----------------------------------------------------------------------------------------------


class Rung:
    """One pair of the ladder, with what is measured on it. ``folder`` keeps the pieces; ``known`` may hold a
    run of notebooks 01 and 02.
    """

    def __init__(self, name: str, folder: Path, budget: Budget, known: Path | None = None):
        self.name, self.folder, self.budget, self.known = name, Path(folder), budget, known
        self.pair = load_pair(name)
        if missing := {"null_a", "null_b"} - set(self.pair.others):
            raise UserError(
                f"pair {name!r} lacks {' and '.join(sorted(missing))}: a rung needs the base trained on, to"
                " know what is noise"
            )
        models = {m: self.pair.fingerprint(m) for m in (*self.pair.models, "null_a", "null_b")}
        self.mark = fingerprint("ladder", VERSION, models, budget)
        self._coded: tuple = (None, None)

    def kept(self, piece: str, make: Callable[[], pd.DataFrame]) -> pd.DataFrame:
        """A piece, made once for these weights and this budget."""
        return kept_table(self.folder / piece, fingerprint(self.mark, piece), make, "effects")

    # --- what other notebooks make, too ---------------------------------------------------------------------

    @cached_property
    def tokenizer(self):
        return self.pair.tokenizer()

    def store(self, other: str) -> Store:
        """Activations of base and ``other`` on the corpus of notebook 01."""
        if other not in self._stores:
            pair = self.pair.between("base", other)
            documents = build(pair, self.budget.tokens, seed=self.budget.seed)
            mark = job_of(pair, documents, self.folder, None, SHARD_TOKENS, BATCH_TOKENS).mark
            there = self._found(mark, "store" if other == "distilled" else f"study/store_base_{other}")
            self._stores[other] = (
                Store.open(there)
                if there
                else harvest_activations(pair, documents, self.folder / f"store_{other}")
            )
        return self._stores[other]

    def crosscoder(self, other: str, seed: int) -> CrossCoder:
        """The crosscoder of base and ``other``, the seed counted from the budget's."""
        config, store = self.budget.config(seed), self.store(other)
        if other == "distilled":
            name = "crosscoder" if seed == 0 else f"study/seed{config.seed}"
        else:
            name = f"study/{other}_seed{config.seed}"
        there = self._found(config.fingerprint(store), name)
        return (
            CrossCoder.load(there)
            if there
            else train(store, config, self.folder / f"crosscoder_{other}_{seed}")
        )

    @cached_property
    def _stores(self) -> dict[str, Store]:
        return {}

    def _found(self, mark: str, name: str) -> Path | None:
        return self.known / name if self.known is not None and is_current(self.known / name, mark) else None

    def comparisons(self) -> list[tuple[str, int]]:
        """(other model, seed) of every crosscoder of a rung. null_b takes a seed that the threshold does not
        come from, if there is one.
        """
        b = self.budget
        return [
            *(("distilled", s) for s in range(b.seeds)),
            *(("null_a", s) for s in range(b.null_seeds)),
            *(("null_b", s) for s in range(1, 1 + b.check_seeds)),
        ]

    # --- gates ----------------------------------------------------------------------------------------------

    def gates(self) -> pd.DataFrame:
        """How well distillation worked: quantity, value, low, high, n; on test puzzles. ``gain`` is thinking
        (every step right) minus the base's direct answers, puzzle by puzzle."""
        b, base, distilled = self.budget, self.pair.load("base"), self.pair.load("distilled")
        tasks = trials.puzzles(b.puzzles, "test", b.seed)
        direct = trials.read(tasks, trials.generate(base, self.tokenizer, tasks, "direct", max_new_tokens=4))[
            "correct"
        ]
        thought = trials.read(
            tasks, trials.generate(distilled, self.tokenizer, tasks, max_new_tokens=b.max_new_tokens)
        )
        rows = [
            {"quantity": "parameters", "value": sum(p.numel() for p in base.parameters())},
            {"quantity": "width", "value": base.config.hidden_size},
        ]
        for name, hits in (
            ("acc_base_direct", direct),
            ("acc_distilled_think", thought["chain_correct"]),
            ("acc_distilled_answer", thought["correct"]),
            ("thinks_to_the_end", thought["closed"]),
        ):
            low, high = wilson(int(hits.sum()), len(hits))
            rows.append({"quantity": name, "value": hits.mean(), "low": low, "high": high, "n": len(hits)})
        gain = thought["chain_correct"].astype(float) - direct.astype(float)
        rows.append(_row("gain", gain.mean(), bootstrap(gain, n_boot=b.boots, seed=b.seed), len(gain)))
        steps = trials.reflection_probability(distilled, self.tokenizer, tasks[: b.probed], b.seed)
        for name, wrong in (("p_reflect_given_error", True), ("p_reflect_given_correct", False)):
            part = steps[steps["error"] == wrong]
            interval = bootstrap(part["p_reflection"], groups=part["task"], n_boot=b.boots, seed=b.seed)
            rows.append(_row(name, part["p_reflection"].mean(), interval, len(part)))
        interval = bootstrap(
            steps[["error", "p_reflection"]].to_numpy(float), _auroc, steps["task"], min(b.boots, 200), b.seed
        )
        rows.append(
            _row(
                "reflect_auc", _auroc(steps[["error", "p_reflection"]].to_numpy(float)), interval, len(steps)
            )
        )
        return pd.DataFrame(rows, columns=["quantity", "value", "low", "high", "n"])

    # --- features -------------------------------------------------------------------------------------------

    def coded(self, other: str, seed: int) -> tuple[CrossCoder, Store, dict]:
        """(crosscoder, store, {split: codes}); the last one asked for stays in memory."""
        if self._coded[0] != (other, seed):
            crosscoder, store = self.crosscoder(other, seed), self.store(other)
            split = {
                name: codes(crosscoder, store, name, self.budget.max_tokens, self.budget.seed)
                for name in ("choose", "report")
            }
            self._coded = (other, seed), (crosscoder, store, split)
        return self._coded[1]

    def card(self, other: str, seed: int) -> pd.DataFrame:
        """Is this crosscoder any good? Explained variance, L0, dead share, on report documents."""
        found = health(
            self.crosscoder(other, seed),
            self.store(other),
            n_boot=min(self.budget.boots, 200),
            seed=self.budget.seed,
        )
        rename = {f"fve_{other}": "fve_other"}
        return pd.DataFrame(
            [
                _row(rename.get(name, name), m["value"], m["ci"] or (np.nan, np.nan), m["n"])
                for name, m in found.items()
                if name.startswith("fve") or name in ("l0", "dead_fraction")
            ]
        )

    def features(self, other: str, seed: int) -> pd.DataFrame:
        """One row per feature: feature, alive, frequency, nrn, nrn_p2, cosine, and how well it foretells each
        category (``auroc_c`` on report, ``auroc_c_choose``); the columns mean what they mean in
        ``features.feature_table``."""
        crosscoder, store, coded = self.coded(other, seed)
        table = {"feature": np.arange(crosscoder.n_features), "alive": None}
        for suffix, split in (("", "report"), ("_choose", "choose")):
            table[f"frequency{suffix}"] = np.asarray((coded[split].codes > 0).mean(axis=0)).ravel()
            index, labels = positions(store, coded[split].rows, "before")
            aurocs = detection.auroc(coded[split].codes[index], is_category(labels))
            table |= {f"auroc_{c}{suffix}": aurocs[:, i] for i, c in enumerate(DETECTED)}
        table["alive"] = table["frequency"] > 0
        table["nrn"], table["nrn_p2"] = (crosscoder.nrn(p, other, "base").numpy() for p in (1, 2))
        return pd.DataFrame(table | {"cosine": crosscoder.cosine("base", other).numpy()})

    def detectors(self, other: str, seed: int) -> pd.DataFrame:
        """The best feature of the other model's side for each category, chosen on choose, reported on report
        with intervals over documents.

        category, feature, nrn, auroc, low, high, token_only (the same from the current token's identity),
        positives.
        """
        table, rows = self.feature_table(other, seed), []
        chosen = category_features(table)
        _, store, coded = self.coded(other, seed)
        (fit_at, fit_labels), (at, labels) = (
            positions(store, coded[s].rows, "before") for s in ("choose", "report")
        )
        fit, found = is_category(fit_labels), is_category(labels)
        tokens, documents = store.tokens[coded["report"].rows[at]], store.documents[coded["report"].rows[at]]
        for i, category in enumerate(DETECTED):
            if category not in chosen:
                continue
            scores = coded["report"].codes[at][:, [chosen[category]]].toarray().ravel()
            resamples = detection.auroc_resamples(
                scores, found[:, i], documents, min(self.budget.boots, 300), self.budget.seed
            )
            low, high = stats_module.interval(resamples)
            by_token = detection.symbol_scores(store.tokens[coded["choose"].rows[fit_at]], fit[:, i], tokens)
            rows.append(
                {
                    "category": category,
                    "feature": chosen[category],
                    "nrn": table["nrn"][chosen[category]],
                    "auroc": detection.auroc_of(scores, found[:, i]),
                    "low": low,
                    "high": high,
                    "token_only": detection.auroc_of(by_token, found[:, i]),
                    "positives": int(found[:, i].sum()),
                }
            )
        return pd.DataFrame(
            rows, columns=["category", "feature", "nrn", "auroc", "low", "high", "token_only", "positives"]
        )

    def feature_table(self, other: str, seed: int) -> pd.DataFrame:
        return self.kept(f"features_{other}_{seed}", lambda: self.features(other, seed))

    def every(
        self,
        piece: str,
        make: Callable[[str, int], pd.DataFrame],
        only: Sequence[str] = ("distilled", "null_a", "null_b"),
    ) -> pd.DataFrame:
        """A piece of every crosscoder, one under the other, with columns ``other`` and ``seed``."""
        parts = []
        for other, seed in self.comparisons():
            if other in only:
                frame = self.kept(f"{piece}_{other}_{seed}", lambda other=other, seed=seed: make(other, seed))
                parts.append(frame.assign(other=other, seed=seed))
        return pd.concat(parts, ignore_index=True)

    # --- steering -------------------------------------------------------------------------------------------

    def steering(self) -> pd.DataFrame:
        """How much longer do thoughts get when a reflection or verification feature is added? Rows of
        ``responses.compare``, with ``role``.

        Candidates are for each behaviour the feature that reads it best and the one that writes it most
        (``steering.candidates``). At each of two strengths, the budget's and half of it, the one that makes
        thoughts longest on validation puzzles goes to test puzzles (role "chosen"), with random directions of
        the same norm (role "random"); role "none" is the unsteered model.
        """
        b, store, crosscoder = self.budget, self.store("distilled"), self.crosscoder("distilled", 0)
        model, layer, norm = (
            wrap(self.pair.load("distilled"), self.tokenizer),
            store.layers["distilled"],
            store.mean_norms["distilled"],
        )
        slopes = steering.influence(store, model, layer, STEERED, documents=min(64, b.probed), seed=b.seed)
        tried = steering.candidates(self.feature_table("distilled", 0), crosscoder, slopes, norm, n=1)
        columns = [
            "role",
            "direction",
            "label",
            "strength",
            "length",
            *(
                c + end
                for c in ("length_ratio", "accuracy_change", "runaway")
                for end in ("", "_low", "_high")
            ),
            "n",
        ]
        if tried.empty:
            return pd.DataFrame(columns=columns)
        features = [
            steering.feature_direction(crosscoder, f, norm, label)
            for label, f in zip(tried["label"], tried["feature"])
        ]
        noise = steering.random_directions(b.random_directions, store.widths["distilled"], norm, b.seed)
        bench = steering.Steering(
            model,
            layer,
            self.folder / "steered",
            fingerprint(self.mark, "steering"),
            b.max_new_tokens,
            seed=b.seed,
        )
        strengths = (b.strength / 2, b.strength)
        tasks = trials.puzzles(b.choose_puzzles, "validation", b.seed)
        search = responses.compare(
            bench.run("choose", tasks, [(d, s) for s in strengths for d in features]), 100, b.seed
        )
        best = {
            s: responses.choose(
                search[search["strength"] == s], "longer", STEERED, accuracy_loss=0.25, runaway=0.25
            )["direction"]
            for s in strengths
        }
        conditions = [
            (d, s) for s in strengths for d in (*(f for f in features if f.name == best[s]), *noise)
        ]
        tasks = trials.puzzles(b.report_puzzles, "test", b.seed)
        found = responses.compare(bench.run("report", tasks, conditions), b.boots, b.seed)
        role = found["label"].map({"none": "none", "random": "random"}).fillna("chosen")
        return found.assign(role=role)[columns]

    # --- geometry -------------------------------------------------------------------------------------------

    @cached_property
    def _geometry(self) -> geometry.Geometry:
        relations = words.load_relations(max_pairs=200, seed=self.budget.seed)
        vocabulary = words.vocabulary(relations)
        read = words.read_models(
            self.pair, ["base", "distilled", "null_a"], vocabulary, self.folder / "words"
        )
        boots = self.budget.boots
        return geometry.analyse(
            {m: r.mean(1) for m, r in read.items()},
            vocabulary,
            relations,
            quadruples=1000,
            shuffles=boots,
            boots=2 * boots,
            seed=self.budget.seed,
        )

    def similarity(self) -> pd.DataFrame:
        """``similarity.compare`` of the base with the distilled model and with null_a, on report tokens: all,
        of traces, of general text."""
        rows = []
        for other in ("distilled", "null_a"):
            store = self.store(other)
            chosen = sample_rows(store, "report", self.budget.acts_tokens, self.budget.seed)
            acts, kind, documents = (
                store.activations(chosen),
                store.labels["kind"][chosen],
                store.documents[chosen],
            )
            for text, wanted in (("all", kind >= 0), ("trace", kind == 1), ("general", kind == 0)):
                parts = [a.numpy()[wanted] for a in acts]
                found = stats_module.jackknife(
                    similarity.compare, parts, documents[wanted], seed=self.budget.seed
                )
                rows.append(found.assign(other=other, text=text))
        return pd.concat(rows, ignore_index=True)

    def angles(self, unique: dict[int, np.ndarray]) -> pd.DataFrame:
        """Do unique features ({seed: features}) write where the models' activations vary?
        ``similarity.feature_overlap`` of their rows in the distilled model with the leading quarter of each
        model's principal components; the null's sets come from all alive features."""
        store, rows = self.store("distilled"), []
        chosen = sample_rows(store, "report", self.budget.acts_tokens, self.budget.seed)
        acts, dims = dict(zip(store.models, store.activations(chosen))), store.widths["distilled"] // 4
        basis = {m: similarity.components(a.numpy(), dims) for m, a in acts.items()}
        for seed, features in unique.items():
            decoder = self.crosscoder("distilled", seed).rows("distilled").numpy()
            pool = np.flatnonzero(self.feature_table("distilled", seed)["alive"])
            for m in basis:
                found = similarity.feature_overlap(
                    decoder, features, basis[m], pool, dims, min(self.budget.boots, 300), self.budget.seed
                )
                rows.append({"seed": seed, "components_of": m, "dims": dims, **found})
        return pd.DataFrame(rows)

    def directions(self, seed: int) -> pd.DataFrame:
        """``similarity.category_cosines`` of the categories' features of one crosscoder."""
        table = self.feature_table("distilled", seed)
        chosen = {c: f for c, f in category_features(table).items() if c in CATEGORIES}
        return similarity.category_cosines(
            self.crosscoder("distilled", seed), chosen, table["alive"].to_numpy(bool), seed=self.budget.seed
        )


def rung(
    name: str, folder: Path, budget: Budget, known: Path | None = None, progress=None
) -> dict[str, pd.DataFrame]:
    """Everything that is measured on one pair, as tables; what was measured before, from the same weights and
    budget, is read again.

    gates, health, uniqueness, quantiles, detectors, steering, relations, parallelograms, similarity, angles,
    directions; see the methods of ``Rung``, ``uniqueness`` and ``quantiles``. ``known`` is the folder of a
    run of notebooks 01 and 02 of this pair.
    """
    r = Rung(name, folder, budget, known)
    step = (
        (lambda note: progress.update(progress.done + 1, f"{name}: {note}"))
        if progress is not None
        else (lambda note: None)
    )
    tables = {"gates": r.kept("gates", r.gates)}
    step("gates")
    tables["health"] = r.every("health", r.card)
    step("crosscoders")
    features = r.every("features", r.features)
    tables["uniqueness"], tables["quantiles"] = uniqueness(features), quantiles(features)
    tables["detectors"] = r.every("detectors", r.detectors, ("distilled", "null_a"))
    step("features")
    tables["steering"] = r.kept("doses", r.steering)
    step("steering")
    tables["relations"] = r.kept("relations", lambda: r._geometry.table)
    tables["parallelograms"] = r.kept("parallelograms", lambda: r._geometry.differences)
    step("words")
    tables["similarity"] = r.kept("similarity", r.similarity)
    unique = {seed: above(features, "distilled", seed) for seed in range(budget.seeds)}
    tables["angles"] = r.kept("angles", lambda: r.angles(unique))
    tables["directions"] = r.every("directions", lambda _, seed: r.directions(seed), ("distilled",))
    step("geometry")
    return tables


STEPS = 6  # of a rung, for the progress line


# --- from features to numbers -------------------------------------------------------------------------------


def thresholds(features: pd.DataFrame, level: float = LEVEL) -> dict[str, float]:
    """{measure: the ``level`` quantile of the null's NRN}, over the alive features of all crosscoders of base
    and null_a; p = 1 and p = 2."""
    null = features[(features["other"] == "null_a") & features["alive"].astype(bool)]
    return {measure: float(null[measure].quantile(level)) for measure in ("nrn", "nrn_p2")}


def above(
    features: pd.DataFrame, other: str, seed: int, level: float = LEVEL, measure: str = "nrn"
) -> np.ndarray:
    """Numbers of the alive features of one crosscoder whose NRN is above the null's threshold."""
    own = features[(features["other"] == other) & (features["seed"] == seed) & features["alive"].astype(bool)]
    return own.loc[own[measure] > thresholds(features, level)[measure], "feature"].to_numpy(int)


def uniqueness(features: pd.DataFrame, level: float = LEVEL) -> pd.DataFrame:
    """One row per crosscoder: other, seed, alive; for p = 1 and (``_p2``) p = 2 nrn_mean and nrn_sd over
    alive features, threshold, unique (features above it) and share (of the alive ones); cosine: median over
    alive features with NRN from 0.3 to 0.7. For null_a the share is ``1 - level`` by construction."""
    limits, rows = thresholds(features, level), []
    for (other, seed), frame in features.groupby(["other", "seed"], sort=False):
        alive = frame[frame["alive"].astype(bool)]
        row = {
            "other": other,
            "seed": seed,
            "alive": len(alive),
            "cosine": alive.loc[alive["nrn"].between(0.3, 0.7), "cosine"].median(),
        }
        for measure, end in (("nrn", ""), ("nrn_p2", "_p2")):
            hits = int((alive[measure] > limits[measure]).sum())
            row |= {
                f"nrn_mean{end}": alive[measure].mean(),
                f"nrn_sd{end}": alive[measure].std(),
                f"threshold{end}": limits[measure],
                f"unique{end}": hits,
                f"share{end}": hits / len(alive) if len(alive) else np.nan,
            }
        rows.append(row)
    return pd.DataFrame(rows)


def quantiles(features: pd.DataFrame) -> pd.DataFrame:
    """Quantiles of NRN (p = 1 and 2) over the alive features of every crosscoder: other, seed, quantile, nrn,
    nrn_p2.
    """
    alive = features[features["alive"].astype(bool)]
    found = alive.groupby(["other", "seed"], sort=False)[["nrn", "nrn_p2"]].quantile(
        [0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1]
    )
    return found.rename_axis(["other", "seed", "quantile"]).reset_index()


def over_seeds(values) -> tuple[float, tuple[float, float], int]:
    """(mean, 95% interval, n) of one number per seed, by Student's t; the interval is NaN for a single seed.
    NaN values are left out.
    """
    values = np.asarray(values, dtype=float)
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else float("nan"), t_interval(values), len(values)


UNIQUENESS = {
    "nrn_mean": "nrn_mean",
    "nrn_mean_p2": "nrn_mean_p2",
    "nrn_sd": "nrn_sd",
    "unique": "unique_above_null",
    "unique_p2": "unique_above_null_p2",
    "share": "unique_share",
    "alive": "alive",
    "cosine": "cosine_shared",
}
GEOMETRY = {
    "score": "parallelogram",
    "relative": "parallelogram_relative",
    "offset_unexplained": "offset_unexplained",
}


def summary(tables: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """The numbers of a rung that go up the ladder: quantity, value, low, high, n, over (what the interval is
    taken over).
    """
    rows = tables["gates"].assign(over="puzzles").to_dict("records")

    def add(name: str, value: float, interval, n: int, over: str) -> None:
        rows.append(_row(name, value, interval, n) | {"over": over})

    unique = tables["uniqueness"]
    for other, end in (("distilled", ""), ("null_a", "_null_a"), ("null_b", "_null_b")):
        part = unique[unique["other"] == other]
        for column in UNIQUENESS if len(part) else ():
            add(UNIQUENESS[column] + end, *over_seeds(part[column]), "seeds")
    detectors = tables["detectors"]
    for category in DETECTED:
        for other, end in (("distilled", ""), ("null_a", "_null_a")):
            part = detectors[(detectors["other"] == other) & (detectors["category"] == category)]
            add(f"auroc_{category}{end}", *over_seeds(part["auroc"]), "seeds")
    for (role, strength), part in tables["steering"].query("role != 'none'").groupby(["role", "strength"]):
        end = "" if strength == tables["steering"].query("role != 'none'")["strength"].min() else "_strong"
        for column, name in (
            ("length_ratio", "length_ratio"),
            ("accuracy_change", "steered_accuracy_change"),
        ):
            interval = part[f"{column}_low"].min(), part[f"{column}_high"].max()  # of several: their envelope
            add(
                ("random_" if role == "random" else "") + name + end,
                part[column].mean(),
                interval,
                int(part["n"].iloc[0]),
                "puzzles",
            )
    for model in ("distilled", "null_a"):
        mean = tables["parallelograms"].query("relation == 'mean' and model == @model").iloc[0]
        end = "" if model == "distilled" else f"_{model}"
        for statistic, name in GEOMETRY.items():
            add(
                f"{name}_difference{end}",
                mean[statistic],
                (mean[f"{statistic}_low"], mean[f"{statistic}_high"]),
                int(tables["relations"].query("model == 'base'")["pairs"].sum()),
                "words",
            )
    for model, part in tables["relations"].groupby("model", sort=False):
        for statistic, name in GEOMETRY.items():
            add(
                f"{name}_{model}", part[statistic].mean(), (np.nan, np.nan), int(part["pairs"].sum()), "words"
            )
    for row in tables["similarity"].itertuples():
        name = (
            row.statistic.removesuffix("_x") + "_base"
            if row.statistic.endswith("_x")
            else row.statistic.removesuffix("_y")
        )
        name += {"distilled": "", "null_a": "_null_a"}[row.other] + (
            "" if row.text == "all" else f"_{row.text}"
        )
        add(name, row.value, (row.low, row.high), row.n, "documents")
    return pd.DataFrame(rows, columns=["quantity", "value", "low", "high", "n", "over"])


def _row(quantity: str, value: float, interval: Sequence[float], n: int | None) -> dict:
    return {"quantity": quantity, "value": value, "low": interval[0], "high": interval[1], "n": n}


def _auroc(rows: np.ndarray) -> float:
    """Of rows [n, 2]: is an error, probability of a reflection."""
    return float(roc_auc_score(rows[:, 0], rows[:, 1])) if 0 < rows[:, 0].sum() < len(rows) else float("nan")


# --- the ladder ---------------------------------------------------------------------------------------------


def measure(
    pairs: Sequence[str] = PAIRS, run_name: str = "default", budget: Budget | None = None, root: Path = ROOT
) -> tuple[dict[str, dict], dict[str, pd.DataFrame]]:
    """All rungs, from the smallest to the largest pair: (metrics, tables).

    metrics {<quantity>_<pair>: {value, ci, n}}, nrn_mean_<pair>, unique_above_null_<pair> and
    parallelogram_difference_<pair> among them; tables as in ``rung``, with a column ``pair``, and "rungs"
    (``summary`` of each). Interrupted, it goes on with the next piece.
    """
    budget, where = budget or Budget(), Run(pairs[-1], run_name, root).path("ladder")
    found: dict[str, list[pd.DataFrame]] = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # small models: a second thread only gets in the way
    try:
        with Progress("the ladder, steps", STEPS * len(pairs)) as progress:
            for name in pairs:
                tables = rung(name, where / name, budget, root / "data" / "runs" / name / run_name, progress)
                for key, frame in {"rungs": summary(tables), **tables}.items():
                    found.setdefault(key, []).append(frame.assign(pair=name))
    finally:
        torch.set_num_threads(threads)
    tables = {key: pd.concat(frames, ignore_index=True) for key, frames in found.items()}
    tables = {key: frame[["pair", *frame.columns.drop("pair")]] for key, frame in tables.items()}
    return {f"{row.quantity}_{row.pair}": _metric(row) for row in tables["rungs"].itertuples()}, tables


def _metric(row) -> dict:
    ci = None if pd.isna(row.low) else [float(row.low), float(row.high)]
    return {
        "value": None if pd.isna(row.value) else float(row.value),
        "ci": ci,
        "n": None if pd.isna(row.n) else int(row.n),
    }
