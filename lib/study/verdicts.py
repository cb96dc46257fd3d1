"""Would another crosscoder say the same? The predictions of notebooks 02 to 04, crosscoder by crosscoder.

    part = compute_verdicts(variant, seeds=5)
    part.tables["verdicts"]     # one row per dictionary and prediction: mean, interval, verdict
    part.tables["by_seed"]      # one row per crosscoder and quantity

For each dictionary (DICTIONARIES) ``seeds`` crosscoders are trained on the same activations; they differ in
their first rows and in the order of batches. As many are trained on the null pair (base and null_a). Each is
asked everything as if it were the only one, and chooses its own features on the split "choose". A *verdict*
is about all of them:

    holds                       the interval over crosscoders and documents (``stats.pooled``) lies on the
                                side of the prediction, and so do at least 4 of 5 crosscoders
    does not hold               the same on the other side
    undecided                   no single crosscoder has an answer, by its interval over documents
    depends on the crosscoder   anything else

Thresholds of uniqueness are those of the null's crosscoder of the same seed, so that their scatter is in the
interval too; the null's next crosscoder says how many features lie beyond them by chance.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import plotly.express as px
import plotly.graph_objects as go

from ..activations.positions import positions
from ..activations.store import Store
from ..crosscoder.codes import SplitCodes, codes
from ..crosscoder.health import health_card
from ..crosscoder.model import CrossCoder
from ..crosscoder.training import train
from ..features import auroc
from ..features.recurrence import SHARE, chance, recurrent
from ..features.table import category_features, feature_table
from ..features.uniqueness import beyond, score_table
from ..figures import COLOURS, plain_titles
from ..labels import CATEGORIES, LABELS
from ..models.reader import open_models
from ..results import Part
from ..runs import fingerprint, kept
from ..stats import group_weights, interval, pooled
from ..steering import ablation
from .nulls import thresholds
from .variants import Variant, metric, part_of_study

DICTIONARIES = {"1,024 features, k 24": (1024, 24), "256 features, k 8": (256, 8)}
BOOTS = 1000  # resamples of documents
TARGETS, TOP, MATCH_WIDTH = 200, 20.0, 0.1  # of the ablation, as in notebook 04: positions, percent, NRN
PLACES = ("before", "value")  # the full stop of a sentence, and the value before it
PAIR = [COLOURS["base"], COLOURS["distilled"]]  # colours of the two dictionaries
HOLDS, FAILS, DEPENDS, UNDECIDED = "holds", "does not hold", "depends on the crosscoder", "undecided"
PREDICTIONS = {  # name: (meaning, quantity, side of the limit, limit)
    "shared": ("median NRN within 0.4 to 0.6", "nrn_from_half", "below", 0.1),
    "tails": ("under 5% of the features have an NRN above 0.9", "nrn_over_0_9", "below", 0.05),
    "beyond the null, NRN": ("over 5% of the features", "beyond_nrn", "above", 0.05),
    "beyond the null, nu": ("over 5% of the features", "beyond_nu_eps", "above", 0.05),
    **{f"{c}, predicted": ("better than *sentence only*", f"gain_{c}", "above", 0.0) for c in CATEGORIES},
    **{
        f"{c}, needed": ("its logit falls without the features", f"loss_{c}", "below", 0.0)
        for c in CATEGORIES
    },
    **{f"{c}, specific": ("more than without matched ones", f"excess_{c}", "below", 0.0) for c in CATEGORIES},
    "errors, known": ("a feature's AUROC is over 0.9", "error_auroc", "above", 0.9),
    "errors, unique": ("its nu_eps is below 0.2", "error_nu_eps", "below", 0.2),
}


@part_of_study("verdicts", 1)
def compute_verdicts(variant: Variant, seeds: int = 5) -> tuple[dict, dict]:
    """The part "verdicts", of ``seeds`` crosscoders for each of DICTIONARIES. Tables:

    verdicts   ``judge``, and dictionary
    by_seed    ``single``, and dictionary
    features   ``features.recurrence.recurrent`` of the five crosscoders, and dictionary
    """
    models = open_models(variant.pair, variant.store.models, variant.pair.tokenizer())
    tables, metrics = {"verdicts": [], "by_seed": [], "features": []}, {}
    for name, (n_features, k) in DICTIONARIES.items():
        crosscoders, measured = _members(variant, models, n_features, k, seeds)
        judged, clusters = judge(measured), recurrent(crosscoders, [m.alive for m in measured])
        tables["verdicts"].append(judged.assign(dictionary=name))
        tables["features"].append(clusters.assign(dictionary=name))
        tables["by_seed"].append(single(measured).assign(dictionary=name))
        known = clusters.set_index(["crosscoder", "feature"])["recurrent"]
        of_error = [bool(known[seed, m.error_feature]) for seed, m in enumerate(measured)]
        contradicted = (judged["holds"] > 0) & (judged["fails"] > 0)
        numbers = {
            "stability_median": (clusters["stability"].median(), len(clusters)),
            "stability_chance": (chance(crosscoders, [m.alive for m in measured]), None),
            "recurrent_share": (clusters["recurrent"].mean(), len(clusters)),
            "error_recurrence": (np.mean(of_error), seeds),
            "contradicted": (contradicted.sum(), len(judged)),
            "depends": ((judged["verdict"] == DEPENDS).sum(), len(judged)),
        }
        metrics |= {f"{x}_{n_features}_k{k}": metric(value, n=n) for x, (value, n) in numbers.items()}
    return metrics, {name: pd.concat(parts, ignore_index=True) for name, parts in tables.items()}


def _members(
    variant: Variant, models: Mapping, n_features: int, k: int, seeds: int
) -> tuple[list[CrossCoder], list[Measured]]:
    """The crosscoders of one dictionary, and what each of them says."""
    place, null_store = variant.folder(f"{n_features}_k{k}"), variant.harvested("base", "null_a")[1]
    configs = [variant.config(seed, n_features=n_features, k=k) for seed in range(seeds)]

    @cache
    def null_scores(seed: int) -> pd.DataFrame:
        null = train(null_store, configs[seed], place / f"null_{seed}")
        return score_table(null, null_store, variant.max_tokens, "null_a", n_boot=0)

    crosscoders, measured = [], []
    for seed, config in enumerate(configs):
        crosscoder = train(variant.store, config, place / f"pair_{seed}")

        def compute(folder: Path, seed=seed, crosscoder=crosscoder) -> None:
            nulls = null_scores(seed), null_scores((seed + 1) % seeds)
            measure(crosscoder, variant, models, *nulls).write(folder)

        key = fingerprint("verdicts", 1, config, variant.parameters)
        measured.append(kept(place / f"measured_{seed}", key, compute, Measured.read))
        crosscoders.append(crosscoder)
    return crosscoders, measured


# --- one crosscoder -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """What one crosscoder says. ``values`` {quantity: number}; ``draws`` {quantity: [BOOTS]}: the same in
    resampled documents, where it depends on them; ``alive`` [F]; ``error_feature``: its number."""

    values: dict[str, float]
    draws: dict[str, np.ndarray]
    alive: np.ndarray
    error_feature: int

    def write(self, folder: Path) -> None:
        values = {f"value/{name}": value for name, value in self.values.items()}
        draws = {f"draws/{name}": draw for name, draw in self.draws.items()}
        np.savez(folder / "measured.npz", alive=self.alive, error=self.error_feature, **values, **draws)

    @classmethod
    def read(cls, folder: Path) -> Measured:
        with np.load(folder / "measured.npz") as file:
            parts = {
                x: {n.split("/")[1]: file[n] for n in file if n.startswith(x)} for x in ("value/", "draws/")
            }
            values = {name: float(value) for name, value in parts["value/"].items()}
            return cls(values, parts["draws/"], file["alive"], int(file["error"]))


def measure(
    crosscoder: CrossCoder, variant: Variant, models: Mapping, null: pd.DataFrame, other_null: pd.DataFrame
) -> Measured:
    """All quantities of one crosscoder of the variant's store. ``null`` (a ``score_table``) sets the
    thresholds of uniqueness, ``other_null`` says how many features lie beyond them by chance."""
    store = variant.store
    coded = {split: codes(crosscoder, store, split, variant.max_tokens) for split in ("choose", "report")}
    scores = score_table(crosscoder, store, variant.max_tokens, n_boot=0)
    table = feature_table(crosscoder, store, coded["choose"], coded["report"])
    alive, limits = table["alive"].to_numpy(bool), thresholds(null, n_boot=1)
    card, nrn = health_card(crosscoder, store, n_boot=1), table["nrn"][alive]
    values = {name: card[name]["value"] for name in ("fve_base", "fve_distilled", "l0", "dead_fraction")}
    values |= {"nrn_from_half": abs(nrn.median() - 0.5), "nrn_over_0_9": (nrn > 0.9).mean()}
    for score in ("nrn", "nu_eps"):
        by_chance = beyond(other_null, limits, score)[other_null["alive"]].mean()
        values |= {
            f"beyond_{score}": beyond(scores, limits, score)[alive].mean(),
            f"false_{score}": by_chance,
        }
    feature, errors, draws = error_detector(store, coded, table)
    values |= errors | {"error_nrn": table["nrn"][feature], "error_nu_eps": scores["nu_eps"][feature]}
    values["error_beyond_null"] = float(beyond(scores, limits, "nu_eps")[feature])
    for numbers, resampled in (
        predictors(store, coded, table, variant.nrn_over),
        removals(crosscoder, variant, models, table),
    ):
        values, draws = values | numbers, draws | resampled
    return Measured(values, draws, alive, feature)


class Places:
    """Positions of a split at one place of its sentences, or of those of one kind: ``tokens`` [n] of the
    store, ``codes`` [n, F], ``following`` [n] (label of the next sentence), ``documents`` [n]."""

    def __init__(self, store: Store, coded: SplitCodes, place: str, kind: str | None = None):
        index, following = positions(store, coded.rows, place)
        if kind is not None:
            wanted = store.labels["label"][coded.rows[index]] == LABELS.index(kind)
            index, following = index[wanted], following[wanted]
        self.following, self.tokens, self.codes = following, coded.rows[index], coded.codes[index]
        self.documents = store.documents[self.tokens]

    def before(self, category: str) -> np.ndarray:
        """Which are followed by a sentence of the category, [n]."""
        return self.following == LABELS.index(category)

    def activation(self, feature: int) -> np.ndarray:
        """[n]"""
        return self.codes[:, [feature]].toarray().ravel()

    def resampled(self, score: np.ndarray, positive: np.ndarray) -> np.ndarray:
        """AUROC of a score [n] in resamples of the documents, [BOOTS]."""
        return auroc.auroc_resamples(score, positive, self.documents, BOOTS)


def predictors(
    store: Store, coded: Mapping[str, SplitCodes], table: pd.DataFrame, nrn_over: float
) -> tuple[dict, dict]:
    """(values, draws) of the feature that predicts a category c best at the full stop, chosen as in notebook
    03: auroc_<c>; gain_<c>, its AUROC minus that of *sentence only*. And two_places_<c>: AUROC of the best
    feature at the value or at the full stop, by firing or by falling silent."""
    values, draws, chosen = {}, {}, category_features(table, nrn_over)
    usable = table["alive"] & (table["frequency_choose"] > 0) & (table["nrn"] > nrn_over)
    fit, report = ({p: Places(store, coded[split], p) for p in PLACES} for split in ("choose", "report"))
    for c, feature in chosen.items():
        if c not in CATEGORIES:
            continue
        at, fit_at = report["before"], fit["before"]
        positive, f = at.before(c), at.activation(feature)
        kind, fit_kind = (store.labels["label"][x.tokens].astype(int) + 1 for x in (at, fit_at))
        simple = auroc.symbol_scores(fit_kind, fit_at.before(c), kind)
        values[f"auroc_{c}"], draws[f"auroc_{c}"] = auroc.auroc_of(f, positive), at.resampled(f, positive)
        values[f"gain_{c}"] = values[f"auroc_{c}"] - auroc.auroc_of(simple, positive)
        draws[f"gain_{c}"] = draws[f"auroc_{c}"] - at.resampled(simple, positive)
        labels = {p: fit[p].before(c) for p in PLACES}
        best, place, sign = best_of_places({p: fit[p].codes for p in PLACES}, labels, usable.to_numpy())
        f, positive = sign * report[place].activation(best), report[place].before(c)
        values[f"two_places_{c}"] = auroc.auroc_of(f, positive)
        draws[f"two_places_{c}"] = report[place].resampled(f, positive)
    return values, draws


def best_of_places(
    coded: Mapping[str, object], positive: Mapping[str, np.ndarray], usable: np.ndarray, silent: bool = True
) -> tuple[int, str, int]:
    """(feature, place, sign) with the AUROC farthest from one half: ``coded`` {place: codes [n, F]},
    ``positive`` {place: [n]}, ``usable`` [F]; sign -1: it falls silent, which counts if ``silent``."""
    values = {p: np.where(usable, auroc.auroc(coded[p], positive[p]) - 0.5, 0.0) for p in coded}
    merit = {p: np.abs(v) if silent else v for p, v in values.items()}
    place = max(merit, key=lambda p: merit[p].max())
    best = int(merit[place].argmax())
    return best, place, 1 if values[place][best] >= 0 else -1


def error_detector(
    store: Store, coded: Mapping[str, SplitCodes], table: pd.DataFrame
) -> tuple[int, dict, dict]:
    """(feature, values, draws): which feature tells wrong steps from right ones, at the value or the full
    stop; error_auroc on the split "report". It fires at errors: a feature that falls silent is not taken."""
    usable = (table["alive"] & (table["frequency_choose"] > 0)).to_numpy()
    wrong = lambda x: store.labels["error"][x.tokens] == 1
    fit = {p: Places(store, coded["choose"], p, "deduction") for p in PLACES}
    fit_codes, fit_wrong = {p: fit[p].codes for p in PLACES}, {p: wrong(fit[p]) for p in PLACES}
    feature, place, _ = best_of_places(fit_codes, fit_wrong, usable, silent=False)
    at = Places(store, coded["report"], place, "deduction")
    positive, f = wrong(at), at.activation(feature)
    values = {"error_auroc": auroc.auroc_of(f, positive), "error_at_value": float(place == "value")}
    return feature, values, {"error_auroc": at.resampled(f, positive)}


def removals(
    crosscoder: CrossCoder, variant: Variant, models: Mapping, table: pd.DataFrame
) -> tuple[dict, dict]:
    """(values, draws) of the paper's ablation (``steering.ablation``) at its largest k: loss_<c>, the change
    of the logit in the distilled model; loss_base_<c>; excess_<c>, the change minus that without matched
    features."""
    removed = ablation.plan(table, [TOP], variant.nrn_over, MATCH_WIDTH, "frequency_choose")
    targets = ablation.sample_targets(variant.store, TARGETS)
    effects = ablation.measure(
        variant.store, crosscoder, models, targets, removed, 1, remote=variant.pair.remote
    )
    values, draws = {}, {}
    for c, group in effects.groupby("category", sort=False):
        change = group.pivot_table("logit", ["document", "row"], ["model", "removed"])
        distilled = change["distilled"]["features"]
        numbers = {
            f"loss_{c}": distilled,
            f"loss_base_{c}": change["base"]["features"],
            f"excess_{c}": distilled - change["distilled"]["matched"],
        }
        for name, number in numbers.items():
            by_document = number.groupby("document").agg(["sum", "size"])
            weights = group_weights(len(by_document), BOOTS)
            values[name] = number.mean()
            draws[name] = weights @ by_document["sum"] / (weights @ by_document["size"])
    return values, draws


# --- all of them --------------------------------------------------------------------------------------------


def single(measured: Sequence[Measured]) -> pd.DataFrame:
    """What each crosscoder says: seed, quantity, value, low, high (95%, over documents; the value itself for
    what depends on the weights alone)."""
    columns = ["seed", "quantity", "value", "low", "high"]
    rows = [
        (seed, name, value, *(interval(m.draws[name]) if name in m.draws else (value, value)))
        for seed, m in enumerate(measured)
        for name, value in m.values.items()
    ]
    return pd.DataFrame(rows, columns=columns)


def answers(by_seed: pd.DataFrame) -> pd.DataFrame:
    """What each crosscoder alone would have said of PREDICTIONS: a row per prediction, a column per seed; 1
    holds, -1 does not hold, 0 where its interval contains the limit."""
    rows = {}
    for name, (_, quantity, side, limit) in PREDICTIONS.items():
        of = by_seed[by_seed["quantity"] == quantity].set_index("seed")
        above, below = of["low"] > limit, of["high"] < limit
        rows[name] = (above.astype(int) - below.astype(int)) * (1 if side == "above" else -1)
    return pd.DataFrame(rows).T


def judge(measured: Sequence[Measured]) -> pd.DataFrame:
    """PREDICTIONS over several crosscoders, a row each: prediction, meaning, quantity, value, low, high
    (``stats.pooled``), side, limit, agree (share of the crosscoders on the side of the limit where the mean
    is), holds, fails (how many ``answers`` of single crosscoders say so), verdict."""
    rows, alone = [], answers(single(measured))
    for name, (meaning, quantity, side, limit) in PREDICTIONS.items():
        values = np.array([m.values.get(quantity, np.nan) for m in measured])
        draws = [m.draws[quantity] for m in measured if quantity in m.draws]
        value, low, high = pooled(values, [interval(d) for d in draws] if len(draws) == len(values) else None)
        agree = float(((values > limit) == (value > limit)).mean())
        true = (value > limit) == (side == "above")
        holds, fails = int((alone.loc[name] > 0).sum()), int((alone.loc[name] < 0).sum())
        verdict = HOLDS if true else FAILS
        if agree < SHARE or low <= limit <= high:
            verdict = DEPENDS if holds or fails else UNDECIDED
        row = {"prediction": name, "meaning": meaning, "quantity": quantity, "value": value}
        row |= {"low": low, "high": high, "side": side, "limit": limit, "agree": agree}
        row |= {"holds": holds, "fails": fails}
        rows.append(row | {"verdict": verdict})
    return pd.DataFrame(rows)


# --- figures ------------------------------------------------------------------------------------------------


def plot_answers(part: Part) -> tuple[go.Figure, pd.DataFrame]:
    """(figure, its data): what each crosscoder alone says of each prediction, and the verdict of all."""
    judged, columns = part.tables["verdicts"], {}
    words, colours = [FAILS, UNDECIDED, DEPENDS, HOLDS], [PAIR[1], "#dddddd", "#F0E442", PAIR[0]]
    for dictionary, by_seed in part.tables["by_seed"].groupby("dictionary", sort=False):
        alone = answers(by_seed)
        for seed in alone:
            columns[dictionary, f"{seed}"] = alone[seed].map({1: HOLDS, 0: UNDECIDED, -1: FAILS})
        own = judged[judged["dictionary"] == dictionary].set_index("prediction")
        columns[dictionary, "all"] = own["verdict"]
    table = pd.DataFrame(columns)
    steps = np.arange(5) / 4
    scale = [[x, colour] for i, colour in enumerate(colours) for x in steps[i : i + 2]]
    bar = {"tickvals": np.arange(4) * 0.75 + 0.375, "ticktext": words, "ticks": ""}
    heat = go.Heatmap(
        z=table.map(words.index).iloc[::-1].to_numpy(),
        x=[list(level) for level in zip(*table.columns)],
        y=table.index[::-1],
        **{"colorscale": scale, "zmin": 0, "zmax": 3, "xgap": 2, "ygap": 2, "colorbar": bar},
    )
    fig = go.Figure(heat)
    fig.update_xaxes(title_text="crosscoder (its seed), and all of them", tickangle=0)
    fig.update_layout(title="The same predictions, asked of one crosscoder at a time", height=620)
    table.columns = [f"{dictionary}, seed {seed}" for dictionary, seed in table.columns]
    return fig, table.rename_axis("prediction").reset_index()


def plot_values(part: Part, kind: str, title: str, y: str) -> tuple[go.Figure, pd.DataFrame]:
    """(figure, its data): the quantities <kind>_<category>, a panel each; one small point per crosscoder, and
    the mean with its interval over crosscoders and documents."""
    judged, by_seed = (
        part.tables[name][part.tables[name]["quantity"].str.startswith(f"{kind}_")].assign(
            category=lambda t: t["quantity"].str.removeprefix(f"{kind}_")
        )
        for name in ("verdicts", "by_seed")
    )
    by_seed = by_seed[by_seed["category"].isin(CATEGORIES)]
    names, categories = list(judged["dictionary"].unique()), list(judged["category"].unique())
    fig = px.strip(
        *(by_seed, "dictionary", "value"),
        color="dictionary",
        facet_col="category",
        category_orders={"category": categories, "dictionary": names},
        color_discrete_sequence=PAIR,
        title=title,
    )
    for i, category in enumerate(categories, start=1):
        row = judged[judged["category"] == category].set_index("dictionary").loc[names]
        error = {"array": row["high"] - row["value"], "arrayminus": row["value"] - row["low"]}
        mark = {"symbol": "diamond", "size": 10, "color": "#444444"}
        mean = go.Scatter(x=names, y=row["value"], error_y=error, mode="markers", marker=mark)
        fig.add_trace(mean.update(showlegend=False), row=1, col=i)
        fig.add_hline(row["limit"].iloc[0], line_dash="dot", line_color="#444444", row=1, col=i)
    fig.update_xaxes(title_text="", showticklabels=False, ticks="")
    fig.update_yaxes(title_text=y, col=1)
    return plain_titles(fig), judged


def plot_recurrence(part: Part) -> go.Figure:
    """Distribution of the features' mean cosine with their matches in the other crosscoders."""
    fig = px.ecdf(
        *(part.tables["features"], "stability", None, "dictionary"),
        color_discrete_sequence=PAIR,
        title="Does a feature come back with another crosscoder?",
    )
    fig.update_xaxes(title_text="mean cosine with its matches in the other crosscoders", range=[0, 1])
    return fig.update_yaxes(title_text="share of the features below")
