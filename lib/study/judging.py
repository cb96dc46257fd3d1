"""Verdicts on planted truth: which rule for calling a feature unique may be believed, and when.

A learned feature is called unique to one side by its row lengths (NRN, p = 1 or 2), by latent scaling
(nu_eps, nu_r), or by two of them at once. Thresholds are fixed conventional ones, the same in every setting,
or the 1% quantile in a *planted null*: the same regime without any unique feature. A rule is chosen on some
seeds (``recommend``) and judged on fresh ones (``judge``). Learned and planted features
(``lib.study.planted``) are compared by the cosine of their joined decoder rows, in scaled space::

    precision   share of the features called unique whose most similar planted feature is unique to that side
    recall      share of the planted unique features with which a feature that is called unique has a cosine
                above 0.7
    found       share of them that a one-to-one matching (Hungarian) gives a learned feature of cosine above
                0.7, whatever it is called: features that were not learned cannot be recalled
"""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import plotly.express as px
import plotly.graph_objects as go
import torch
from plotly.subplots import make_subplots
from scipy.optimize import linear_sum_assignment
from torch.nn.functional import normalize

from ..crosscoder.codes import encoded, firing_frequency, sample_rows
from ..crosscoder.model import CrossCoder
from ..crosscoder.recurrence import stability
from ..crosscoder.sharing import fve
from ..crosscoder.training import TrainConfig, train
from ..features.latent_scaling import latent_scaling
from ..figures import SCALE
from ..runs import Progress, fingerprint, read_table, table_text, write_text
from ..settings import UserError
from ..stats import t_interval
from .planted import KINDS, MODELS, VERSION, Planted, PlantedStore, from_regime, regime
from .variants import Variant, metric, part_of_study

# --- the methods --------------------------------------------------------------------------------------------

# score: does a larger one mean unique?
SCORES = {"nrn_p1": True, "nrn_p2": True, "nu_eps": False, "nu_r": False}
NULL_RATE = 0.01  # share of a planted null's living features that a calibrated threshold lets through

# {method: ((score, threshold), ...)}: all must hold; None is the threshold calibrated on the planted null
METHODS: dict[str, tuple[tuple[str, float | None], ...]] = {
    **{f"{p} > {t}": ((f"nrn_{p}", t),) for p in ("p1", "p2") for t in (0.9, 0.7)},
    **{f"{nu} < {t}": ((nu, t),) for nu in ("nu_eps", "nu_r") for t in (0.2, 0.3)},
    **{f"p2 > {t} and nu_eps < {u}": (("nrn_p2", t), ("nu_eps", u)) for t, u in ((0.9, 0.2), (0.7, 0.3))},
    **{f"nu_eps < {t} and nu_r < {u}": (("nu_eps", t), ("nu_r", u)) for t, u in ((0.2, 0.5), (0.3, 0.3))},
    **{f"{score} beyond null": ((score, None),) for score in SCORES},
    "nrn_p2 and nu_eps beyond null": (("nrn_p2", None), ("nu_eps", None)),
    "nu_eps and nu_r beyond null": (("nu_eps", None), ("nu_r", None)),
}


def scores(crosscoder: CrossCoder, store: PlantedStore, rows: np.ndarray) -> pd.DataFrame:
    """Every learned feature's scores, and what it is: one row per feature and side.

    feature, side, alive (it fires on some of ``rows``); nrn_p1, nrn_p2 as seen from the side; nu_eps, nu_r,
    NaN if the other side has the longer row; nearest (number of the most similar planted feature), cosine
    (with it), kind (of it), hits (planted features unique to the side with a cosine above 0.7, as text),
    matched and matched_cosine (one-to-one; -1 for none)."""
    table = latent_scaling(crosscoder, store, rows, n_boot=0)
    fires = np.zeros(crosscoder.n_features, dtype=bool)
    for _, _, f in encoded(crosscoder, store, rows):
        fires |= (f > 0).any(0).cpu().numpy()
    similarity = (normalize(crosscoder.W_dec.detach(), dim=1) @ store.joined().T).numpy()
    similarity[~fires] = -1  # a dead feature is not similar to any
    learned, planted = linear_sum_assignment(-similarity)
    nearest, alike = similarity.argmax(1), similarity > 0.7
    facts = pd.DataFrame({"nearest": nearest, "cosine": similarity.max(1)})
    facts["kind"] = np.array(KINDS)[store.kinds[nearest]]
    matched = pd.DataFrame({"matched": -1, "matched_cosine": -1.0}, index=facts.index)
    matched.loc[learned, "matched"] = planted
    matched.loc[learned, "matched_cosine"] = similarity[learned, planted]
    parts = []
    for side, other in (MODELS[::-1], MODELS):
        own = np.flatnonzero(store.kinds == KINDS.index(f"{side}_only"))
        nrn = {f"nrn_p{p}": crosscoder.nrn(p, side, other).numpy() for p in (1, 2)}
        nu = {name: table[name].where(table["side"] == side) for name in ("nu_eps", "nu_r")}
        hits = [" ".join(map(str, own[row])) for row in alike[:, own]]
        part = pd.DataFrame({"feature": table["feature"], "side": side, "alive": fires, **nrn, **nu})
        parts.append(pd.concat([part, facts.assign(hits=hits), matched], axis=1))
    return pd.concat(parts, ignore_index=True)


def null_thresholds(null: pd.DataFrame, rate: float = NULL_RATE) -> dict[tuple[str, str], float]:
    """{(side, score): threshold} that the share ``rate`` of the living features of a planted null passes. NaN
    is never beyond it."""
    thresholds = {}
    for side, part in null[null["alive"]].groupby("side"):
        for score, larger in SCORES.items():
            values = part[score].fillna(-np.inf if larger else np.inf)
            share, method = (1 - rate, "higher") if larger else (rate, "lower")
            thresholds[side, score] = float(np.quantile(values, share, method=method))
    return thresholds


def called(table: pd.DataFrame, method: str, thresholds: Mapping[tuple[str, str], float]) -> np.ndarray:
    """Which rows of ``scores`` the method calls unique to their side; ``thresholds``: ``null_thresholds``."""
    if method not in METHODS:
        raise UserError(f"unknown method {method!r}: it must be one of {', '.join(METHODS)}")
    flagged = table["alive"].to_numpy(dtype=bool).copy()
    for score, fixed in METHODS[method]:
        limit = [thresholds[side, score] if fixed is None else fixed for side in table["side"]]
        # a NaN is never beyond
        flagged &= (table[score] > limit if SCORES[score] else table[score] < limit).to_numpy()
    return flagged


# --- the judgement ------------------------------------------------------------------------------------------


def precision_recall(table: pd.DataFrame, flagged: np.ndarray, planted: Planted) -> pd.DataFrame:
    """One row per side: precision (NaN if nothing is flagged), recall, found, n_flagged, n_planted, as
    defined at the top."""
    rows = []
    for side in MODELS[::-1]:
        kind, own = f"{side}_only", (table["side"] == side).to_numpy()
        unique, n = table[own & flagged], getattr(planted, kind)
        recalled = {number for hits in unique["hits"] for number in hits.split()}
        first = sum(getattr(planted, earlier) for earlier in KINDS[: KINDS.index(kind)])
        one_to_one = table[own & (table["matched_cosine"] > 0.7)]["matched"].between(first, first + n - 1)
        recall, found = (len(recalled) / n, int(one_to_one.sum()) / n) if n else (np.nan, np.nan)
        precision = (unique["kind"] == kind).mean() if len(unique) else np.nan
        rows.append((side, precision, recall, found, len(unique), n))
    return pd.DataFrame(rows, columns=["side", "precision", "recall", "found", "n_flagged", "n_planted"])


@dataclass(frozen=True)
class Setting:
    """One point of one axis: fields of ``Planted`` that differ from our regime, factors of fields of
    ``TrainConfig``, and factors of the number of features of every kind and of those active per token."""

    name: str
    value: str
    planted: Mapping = field(default_factory=dict)
    config: Mapping = field(default_factory=dict)
    features: float = 1.0
    active: float = 1.0

    def of(self, ours: Planted) -> Planted:
        """Our regime, changed to this setting."""
        counts = {kind: round(getattr(ours, kind) * self.features) for kind in KINDS}
        return replace(ours, **{**counts, "l0": ours.l0 * self.active, **self.planted})


OURS = Setting("our regime", "as measured")
QUARTER = {"setting": "budget", "value": "a quarter of the tokens"}  # what the others are compared with
# the warning: data of our regime, in a dictionary of four times the features that there are
OVERCOMPLETE = Setting("over-complete", "4 x the features, k x 3", {}, {"n_features": 8 / 3, "k": 3})
# where a dictionary of 1,024 features and k 24 puts the same data: its own numbers of features
CROWDED = Setting("crowding", "4 x the features, 3 x active", {}, {"n_features": 4, "k": 3}, 4, 3)
SETTINGS = (  # one thing at a time
    OURS,
    OVERCOMPLETE,
    CROWDED,
    Setting("dictionary", "as many as planted", {}, {"n_features": 2 / 3}),
    Setting("sparsity", "3 x active", {}, {"k": 3}, active=3),
    # the positive control: where features can be learned, does the judgement say so? Everything that makes it
    # hard is taken away at once
    Setting(
        *("easy", "few, sparse, independent", {"correlation": 0.0, "exponent": 0.5}),
        *({"n_features": 1 / 2, "k": 1 / 2}, 1 / 2, 1 / 2),
    ),
    Setting("correlation", "none", {"correlation": 0.0}),
    Setting("norm imbalance", "mean is 3/4 of distilled", {"mean_share": (0.14, 0.75)}),
    Setting("rescaling", "factor 10", {"factor": 10.0}),
    Setting("rotation", "0 degrees", {"angle": 0.0}),
    Setting("rotation", "90 degrees", {"angle": 90.0}),
    Setting("dead directions", "half", {"dead_directions": 0.5}),
)
FIRST = 6  # so many of them are always evaluated
SEEDS = {"choose": (0, 1, 2), "report": (10, 11, 12, 13, 14)}
NULL_SEED = 100  # of the planted null that calibrates thresholds: it belongs to neither split
RECURRENCE_SEED = 101  # of the data on which recurrence is compared
_QUIET = SimpleNamespace(update=lambda *_: None, close=lambda: None)  # one line of progress for all trainings
_CELL = ("setting", "value", "architecture", "seed", "split")


def evaluate(
    folder: Path,
    configs: Mapping[str, TrainConfig],
    ours: Planted,
    settings: Sequence[Setting] = SETTINGS,
    seeds: Mapping[str, Sequence[int]] = SEEDS,
    axis_seeds: int = 2,
) -> pd.DataFrame:
    """Train every architecture on every setting and seed, and judge every method: one row per method and
    side.

    setting, value, architecture, seed, split, method, side, precision, recall, found, n_flagged, n_planted,
    fve (both models, report split)

    ``configs`` {name of the architecture: its config, for our regime ``ours``}; the config's seed is
    replaced. ``seeds`` {split: seeds} hold for our regime (the first of ``settings``); the others are
    reported on the first ``axis_seeds`` of split "report" only, since nothing is chosen there. Each (setting,
    architecture, seed) is kept in ``folder`` as soon as it is done, and not computed again."""
    folder, tables = Path(folder), []
    folder.mkdir(parents=True, exist_ok=True)
    wanted = cells(configs, ours, settings, seeds, axis_seeds)
    store: PlantedStore | None = None
    with Progress("crosscoders on planted data", len(wanted)) as progress:
        for number, cell in enumerate(wanted):
            file = folder / f"{cell.fingerprint}.csv"
            if not file.is_file():
                if store is None or store.planted != cell.planted:
                    store = PlantedStore(cell.planted)
                scored = _scored(store, cell.config)
                write_text(file, table_text(scored, "%.6g"))
            table = read_table(file, float_precision=None, dtype={"hits": str})
            tables.append(table.fillna({"hits": ""}))
            progress.update(number + 1, f"{cell.setting.name}, {cell.architecture}")
    thresholds, rows = {}, []
    for cell, table in zip(wanted, tables):  # the null of a setting comes first
        key = (cell.setting.name, cell.setting.value, cell.architecture)
        if cell.split == "null":
            thresholds[key] = null_thresholds(table)
            continue
        known = dict(zip(_CELL, (*key, cell.planted.seed, cell.split)))
        for method in METHODS:
            flagged = called(table, method, thresholds[key])
            judged = precision_recall(table, flagged, cell.planted)
            rows.append(judged.assign(**known, method=method, fve=table["fve"].iloc[0]))
    frame = pd.concat(rows, ignore_index=True)
    first = [*_CELL, "method", "side"]
    return frame[[*first, *frame.columns.drop(first)]]


@dataclass(frozen=True)
class Cell:
    """One training: ``split`` is that of its seed, or "null"."""

    setting: Setting
    architecture: str
    split: str
    planted: Planted
    config: TrainConfig

    @property
    def fingerprint(self) -> str:
        return fingerprint("planted cell", VERSION, self.planted, self.config)


def cells(
    configs: Mapping[str, TrainConfig],
    ours: Planted,
    settings: Sequence[Setting] = SETTINGS,
    seeds: Mapping[str, Sequence[int]] = SEEDS,
    axis_seeds: int = 2,
) -> list[Cell]:
    """All trainings that ``evaluate`` needs: those on the same data are neighbours."""
    if not settings or settings[0] != OURS:
        raise UserError("settings must begin with our regime (judging.OURS): the rule is chosen there")
    used = [seed for split in seeds.values() for seed in split]
    if set(seeds) != {"choose", "report"} or len(set(used)) < len(used) or NULL_SEED in used:
        raise UserError(
            f"seeds must be {{'choose': ..., 'report': ...}} without a seed in both, and without {NULL_SEED},"
            " the null's"
        )
    wanted = []
    for setting in settings:
        own = seeds if setting == OURS else {"report": tuple(seeds["report"])[:axis_seeds]}
        changed = setting.of(ours)
        data = [("null", replace(changed.null(), seed=NULL_SEED))]
        data += [(split, replace(changed, seed=seed)) for split in own for seed in own[split]]
        for split, planted in data:
            for name, config in configs.items():
                changes = {f: max(1, round(getattr(config, f) * x)) for f, x in setting.config.items()}
                own_config = replace(config, seed=planted.seed, **changes)
                wanted.append(Cell(setting, name, split, planted, own_config))
    return wanted


def _scored(store: PlantedStore, config: TrainConfig) -> pd.DataFrame:
    """``scores`` of one crosscoder, on the report split, with its FVE."""
    with tempfile.TemporaryDirectory() as scratch:
        crosscoder = train(store, config, Path(scratch), progress=_QUIET)
    rows = store.rows("report")
    acts = store.activations(rows)
    with torch.no_grad():
        x = crosscoder.scaled(acts)
        error = (x - crosscoder.scaled(crosscoder.decode(crosscoder.encode(acts)))).square().sum()
    return scores(crosscoder, store, rows).assign(fve=1 - float(error / (x - x.mean(0)).square().sum()))


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Means over seeds with 95% intervals (Student's t over seeds, cut to [0, 1]; none for a single seed),
    sides apart.

    setting, value, architecture, split, method, side; precision, precision_low, precision_high, the same for
    recall; found; seeds; silent: seeds in which nothing was flagged, so that precision is not defined."""
    keys, rows = ["setting", "value", "architecture", "split", "method", "side"], []
    for key, part in table.groupby(keys, sort=False):
        row = dict(zip(keys, key))
        for name in ("precision", "recall"):
            row |= dict(zip((name, f"{name}_low", f"{name}_high"), _interval(part[name].dropna())))
        silent = int(part["precision"].isna().sum())
        rows.append({**row, "found": part["found"].mean(), "seeds": len(part), "silent": silent})
    return pd.DataFrame(rows)


def _interval(values: pd.Series) -> tuple[float, float, float]:
    """(mean, low, high) of a share over seeds; NaN where there is none."""
    low, high = np.clip(t_interval(values), 0, 1)
    return float(values.mean()), float(low), float(high)


def recommend(table: pd.DataFrame) -> dict[str, str]:
    """{"architecture", "method"}: chosen on split "choose", in our regime.

    The pair whose weaker side is best: both models' unique features, precision and recall, averaged over the
    seeds; the smallest of these four counts, their mean decides ties. Nothing flagged: precision 0."""
    ours = table[(table["split"] == "choose") & (table["setting"] == OURS.name)]
    if ours.empty:
        raise UserError("the table has no seeds to choose on in our regime: evaluate it with them")
    by_side = ours.fillna({"precision": 0.0}).groupby(["architecture", "method", "side"], sort=False)
    four = by_side[["precision", "recall"]].mean().unstack("side")
    merit = pd.DataFrame({"least": four.min(axis=1), "mean": four.mean(axis=1)})
    best = merit.sort_values(["least", "mean"], kind="stable").index[-1]
    return {"architecture": best[0], "method": best[1]}


def judge(
    table: pd.DataFrame, rule: Mapping[str, str], setting: Setting = OURS, side: str = "distilled"
) -> dict[str, dict]:
    """{"precision", "recall", "found"}: {value, ci, n} of a rule on split "report" of a setting; n seeds.

    A seed in which the rule flags nothing has no precision: it is left out there, and counts as recall 0."""
    wanted = {"split": "report", "setting": setting.name, "value": setting.value, "side": side, **rule}
    part = table[(table[list(wanted)] == list(wanted.values())).all(axis=1)]
    metrics = {}
    for name in ("precision", "recall", "found"):
        values = part[name].dropna()
        mean, low, high = _interval(values)
        metrics[name] = metric(mean, None if np.isnan(low) else (low, high), len(values))
    return metrics


# --- the regime without its circle --------------------------------------------------------------------------

KS = (4, 8, 16, 24)  # of the dictionaries whose recurrence is compared
MEASURED = 8  # k of the one through which the regime is measured


def recurrence(
    store, config: TrainConfig, folder: Path, ks: Sequence[int] = KS
) -> tuple[pd.DataFrame, list[CrossCoder]]:
    """How far features come back with another seed, by k: (one row per k, the first seed's crosscoders).

    k, n_features, alive (on the report split), fve (mean of the models), recurrence and its chance level
    (medians of ``stability`` over the living features). Each crosscoder is kept in ``folder``.

    Living features, L0 and FVE do not tell how many features there are: an over-complete dictionary has its
    own. But what it splits, it splits otherwise with another seed."""
    rows, first = [], []
    acts = store.activations(sample_rows(store, "report", 20_000))
    for k in ks:
        configs = (replace(config, k=k, seed=config.seed + s) for s in (0, 1))
        pair = [train(store, c, Path(folder) / f"k{k}_seed{c.seed}", progress=_QUIET) for c in configs]
        alive = [firing_frequency(crosscoder, store) > 0 for crosscoder in pair]
        row = {"k": k, "n_features": config.n_features, "alive": int(alive[0].sum())}
        row["fve"] = np.mean([*fve(pair[0], acts).values()])
        medians = stability(pair, alive)[["stability", "chance"]].median()
        rows.append(row | {"recurrence": medians["stability"], "chance": medians["chance"]})
        first.append(pair[0])
    return pd.DataFrame(rows), first


def plot_recurrence(table: pd.DataFrame) -> go.Figure:
    """Median recurrence by k: the run's store, and planted data (their k is shown at the store's width)."""
    title = "Do features recur with another seed, as in data of known truth?"
    fig = px.line(table, "k", "recurrence", color="data", markers=True, title=title)
    fig.update_xaxes(title_text="features active per token (k, at the store's width)", tickvals=KS)
    return fig.update_yaxes(title_text="median cosine with the matched feature", range=[0, 1.02])


# --- the part "planted" -------------------------------------------------------------------------------------


@part_of_study("planted", 3, VERSION)
def compute_planted(
    variant: Variant,
    planted_width: int = 24,
    planted_tokens: int = 800_000,
    dictionary_tokens: int = 1_500_000,
    everything: bool = False,
    small: bool = False,
) -> tuple[dict, dict]:
    """The part "planted": which method may be believed when, on activations with known features, in the
    regime of the run and with one thing at a time changed.

    The regime is measured first, on the run's store, through a dictionary of 256 features and k 8 that is
    trained for this on ``dictionary_tokens``: the run's own may be over-complete, and gives back its own
    numbers. Table ``recurrence``: the store, what is planted, and what is planted if 1,024 features and k 24
    are believed, each through the same dictionaries (at the width of the planted data, with numbers in
    proportion). Numbers of features go with ``planted_width``, the width of both models. BatchTopK, which the
    notebooks train, is evaluated with 1.5 times the planted features and three epochs of ``planted_tokens``
    (three seeds to choose a rule, five fresh ones to judge it). With a quarter of the tokens, stored and
    shown, follow the over-complete dictionary and other settings, one seed each: the FIRST of SETTINGS.
    ``everything``: all of them, and other architectures. ``small``: two architectures, two settings and two
    seeds, to see that everything works."""
    folder, size = variant.folder("planted"), {"batch_size": 512, "aux_k": 16, "dead_after": 0.1}
    dictionary = TrainConfig(n_features=256, tokens=dictionary_tokens, seed=variant.seed)
    curve, crosscoders = recurrence(variant.store, dictionary, variant.folder("dictionaries"))
    report, curves = sample_rows(variant.store, "report", variant.max_tokens), [curve.assign(data="this run")]
    quarter = planted_tokens // 4
    measured = regime(crosscoders[KS.index(MEASURED)], variant.store, report)
    ours, share = from_regime(measured, planted_width, tokens=planted_tokens), planted_width / measured.width
    ks = [max(1, round(k * share)) for k in KS]
    dictionary = TrainConfig(n_features=round(256 * share), tokens=3 * quarter, **size)
    for setting in (OURS, CROWDED):
        planted = replace(setting.of(ours), tokens=quarter, seed=RECURRENCE_SEED)
        place = variant.folder("dictionaries") / f"planted_{planted.features}"
        curve, _ = recurrence(PlantedStore(planted), dictionary, place, ks)
        name = f"planted, {setting.name}: {planted.features} features, L0 {planted.l0:.1f}"
        curves.append(curve.assign(k=KS, data=name))
    n_features, k = round(1.5 * ours.features), max(1, round(ours.l0))
    config = TrainConfig(n_features=n_features, k=k, tokens=3 * planted_tokens, **size)
    quick = replace(config, tokens=3 * quarter)
    seeds, settings, others = SEEDS, SETTINGS[: None if everything else FIRST], {}
    if small or everything:
        others["l1"] = replace(quick, variant="l1")
    if small:
        seeds, settings = {"choose": (0,), "report": (10,)}, SETTINGS[:2]
    elif everything:
        others["jumprelu"] = replace(quick, variant="jumprelu")
        others["dedicated"] = replace(quick, dedicated=0.125)  # as many as there are unique ones to find
    table = evaluate(folder, {"batchtopk": config}, ours, settings[:1], seeds)
    rule, ours_quick = recommend(table), replace(ours, tokens=quarter)
    one = {"choose": (), "report": seeds["report"][:1]}
    axes = [evaluate(folder, {"batchtopk": quick}, ours_quick, settings, one)]
    if others:
        axes.append(evaluate(folder, others, ours_quick, settings[:1], one))
    axes = pd.concat(axes, ignore_index=True)
    axes.loc[axes["setting"] == OURS.name, list(QUARTER)] = list(QUARTER.values())
    table = pd.concat([table, axes], ignore_index=True)
    judged = {"": judge(table, rule), "_base": judge(table, rule, side="base")}
    judged["_overcomplete"] = judge(table, rule, OVERCOMPLETE)
    metrics = {f"planted_{name}{end}": m for end, ms in judged.items() for name, m in ms.items()}

    def listed(data, first: str) -> pd.DataFrame:
        return pd.DataFrame([(n, str(v)) for n, v in asdict(data).items()], columns=[first, "value"])

    chosen = rule | {f"{'chosen' if s == 'choose' else 'judged'} on seeds": str(seeds[s]) for s in seeds}
    return metrics, {
        "table": table,
        "summary": summary(table),
        "recurrence": pd.concat(curves, ignore_index=True),
        "rules": pd.DataFrame([chosen]),
        "regime": listed(measured, "quantity"),
        "generator": listed(ours, "parameter"),
    }


def plot(table: pd.DataFrame, architecture: str, side: str = "distilled") -> go.Figure:
    """Methods by settings: mean precision and recall over the seeds of split "report"."""
    wanted = {"architecture": architecture, "side": side, "split": "report"}
    means = summary(table[(table[list(wanted)] == list(wanted.values())).all(axis=1)])
    if means.empty:
        raise UserError(f"the table has nothing to report on {architecture!r}, side {side!r}")
    other = means["setting"] + ": " + means["value"]
    means["where"] = other.where(means["setting"] != OURS.name, OURS.name)
    names = ("precision", "recall")
    fig = make_subplots(1, 2, shared_yaxes=True, subplot_titles=names, horizontal_spacing=0.02)
    for column, name in enumerate(names, start=1):
        wide = means.pivot(index="method", columns="where", values=name)
        wide = wide.loc[list(METHODS)[::-1], list(dict.fromkeys(means["where"]))]
        text = wide.map(lambda v: "none" if np.isnan(v) else f"{v:.2f}")  # none: it called no feature unique
        fig.add_heatmap(
            z=wide.to_numpy(), x=wide.columns, y=wide.index, text=text.to_numpy(), texttemplate="%{text}",
            zmin=0, zmax=1, name=name, colorscale=SCALE, showscale=column == 2, row=1, col=column,
        )  # fmt: skip
    title = f"Calling features {side}-only on planted data, {architecture}"
    return fig.update_xaxes(tickangle=-45).update_layout(title_text=title, width=1180, height=640)
