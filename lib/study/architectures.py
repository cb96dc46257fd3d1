"""Crosscoders of several kinds on one store, and one crosscoder of three models.

Kinds of crosscoders may only be compared where they are equally sparse: BatchTopK and TopK have the L0 that
they are given, JumpReLU is trained to it, and for L1 lambda is searched (``match_l1``). ``origins`` reads a
crosscoder of three models, base -> style -> distilled (``style``: an earlier checkpoint of the distillation):
which models use a feature, by its share ||d_i^m|| / sum_n ||d_i^n||, says when it came and when it went."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import plotly.express as px
import plotly.graph_objects as go
import plotly.io as pio
import torch

from ..activations.store import Store
from ..crosscoder.codes import firing_frequency
from ..crosscoder.health import health_card
from ..crosscoder.model import CrossCoder
from ..crosscoder.training import TrainConfig, train
from ..figures import COLOURS, plain_titles
from ..results import Part, pooled_metric
from ..settings import UserError, check
from ..stats import bootstrap, difference, wilson
from ..steering.plots import points
from .nulls import null_crosscoder
from .variants import Variant, metric, part_of_study

OVER, UNDER = 0.7, 0.3  # NRN beyond which a feature counts as leaning to one model
QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
CURVE = np.linspace(0, 1, 129)  # quantiles of NRN that are kept for a figure
LEVEL = 0.01  # share of a null's features above its limit
LIMITS = ("threshold", "low", "high")  # a limit of a null, and the ends of its interval
SHARES = {  # metric: what the figure says of it
    "outside": "NRN outside 0.3 to 0.7",
    "outside_null": "the same in its null",
    "beyond_null": "above its null's limit",
}
NAMES = ("base", "style", "distilled")
ORIGINS = {  # does the first, the second, the third model use it?: (origin, colour)
    (True, True, True): ("in all", "null"),
    (False, True, True): ("came with style", "alternative"),
    (False, False, True): ("came with function", "distilled"),
    (True, False, False): ("lost with style", "contrast"),
    (True, True, False): ("lost with function", "base"),
    (False, True, False): ("in style alone", "reflection"),
    (True, False, True): ("in all but style", "deduction"),
    (False, False, False): ("in none", "random"),
}


@part_of_study("architectures", 3, tokens=0)
def compute_architectures(
    variant: Variant, boots: int = 300, dedicated: float = 0.05, tokens: int = 0
) -> tuple[dict, dict]:
    """The part "architectures": other kinds of crosscoders at the sparsity of the run's, on the pair and on
    base against null_a; and base, style, distilled in one.

    Every kind is trained with the seeds of all of the run's crosscoders, and has a null of its own
    (``compare``); tables have a column seed. The lambda of L1 is searched on the pair with the first seed,
    and is that of all other L1 crosscoders. ``boots``: resamples of documents; ``dedicated``: share of the
    dictionary that the dedicated crosscoder reserves for each model; ``tokens``: shown to what is trained
    here, 0 for as many as to the run's own crosscoders."""
    config, stores = variant.config(), {"pair": variant.store}
    config = replace(config, tokens=tokens or config.tokens)
    _, stores["null"] = variant.harvested("base", "null_a")
    found = match_l1(variant.store, config.k, config, variant.folder("match_l1"), tolerance=0.1, most=5)
    coefficient, tries = found
    kinds = {
        "batchtopk": {},
        "topk": {"variant": "topk"},
        "jumprelu": {"variant": "jumprelu"},
        "dedicated": {"dedicated": dedicated},
        "l1": {"variant": "l1", "precision": "float32", "l1": coefficient},
    }

    def trained(kind: str, pair: str, seed: int) -> CrossCoder:
        if kind == "batchtopk" and pair == "pair":
            return variant.crosscoders[seed - variant.seed]
        if kind == "batchtopk":
            return null_crosscoder(variant, "null_a", seed)
        in_search = (kind, pair, seed) == ("l1", "pair", variant.seed)
        folder = f"match_l1/l1_{coefficient:.4g}" if in_search else _numbered(f"{kind}_{pair}", variant, seed)
        return train(stores[pair], replace(config, seed=seed, **kinds[kind]), variant.folder(folder))

    rows, curves, nrns = [], [], {kind: {"pair": [], "null": []} for kind in kinds}
    each: list[dict] = [{} for _ in variant.seeds]
    for (kind, by_pair), (own, seed) in product(nrns.items(), zip(each, variant.seeds)):
        for pair, model in (("pair", "distilled"), ("null", "null_a")):
            crosscoder = trained(kind, pair, seed)
            frequency = firing_frequency(crosscoder, stores[pair])
            nrn = np.sort(crosscoder.nrn(1, model, "base").numpy()[frequency > 0])
            by_pair[pair].append(nrn)
            curve = {"architecture": kind, "pair": pair, "seed": seed, "nrn": np.quantile(nrn, CURVE)}
            curves.append(pd.DataFrame(curve | {"share": CURVE}))
            if pair == "null":
                own[f"l0_null_{kind}"] = metric(frequency.sum())
                continue
            row = describe(crosscoder, stores[pair], n_boot=boots, seed=config.seed)
            rows.append({"architecture": kind, "seed": seed} | row)
            for name in ("l0", "fve_base", "fve_distilled", "dead"):
                n = row["features" if name == "dead" else "documents"]
                own[f"{name}_{kind}"] = metric(row[name], (row[f"{name}_low"], row[f"{name}_high"]), n)
    limits, compared = compare(nrns)
    tables = {
        "architectures": pd.DataFrame(rows),
        "limits": limits,
        "nrn": pd.concat(curves, ignore_index=True),
        "match_l1": tries,
    }
    for own, more in zip(each, compared):
        own |= more
    if "style" in variant.pair.others:
        _, store = variant.harvested(*NAMES)
        limit = variant.null_limits().set_index(["score", "side", "level"]).loc[("nrn", "distilled", 0.01)]
        tables["origins"] = []
        for own, seed in zip(each, variant.seeds):
            folder = variant.folder(_numbered("three_models", variant, seed))
            crosscoder = train(store, replace(config, seed=seed), folder)
            alive = firing_frequency(crosscoder, store) > 0
            placed = [origins(crosscoder, threshold=least_share(limit[at])) for at in LIMITS]
            own |= origin_metrics([table[alive] for table in placed])
            tables["origins"].append(placed[0].assign(alive=alive, seed=seed))
        tables["origins"] = pd.concat(tables["origins"], ignore_index=True)
    return {name: pooled_metric([own[name] for own in each]) for name in each[0]}, tables


def _numbered(name: str, variant: Variant, seed: int) -> str:
    return name if seed == variant.seed else f"{name}_{seed - variant.seed}"


def compare(nrns: Mapping[str, Mapping[str, Sequence[np.ndarray]]]) -> tuple[pd.DataFrame, list[dict]]:
    """What the NRN of the alive features says of kinds of crosscoders: (limits, metrics of each seed).

    ``nrns`` {kind: {"pair": [an array per seed], "null": [an array per seed]}}. ``limits``: architecture,
    threshold, low, high: the NRN that LEVEL of the features of all of the kind's null crosscoders exceed,
    with an interval over these. Metrics, with intervals over features:

    outside_<kind>, outside_null_<kind>   share of the features with NRN below UNDER or above OVER
    beyond_null_<kind>    share of the pair's above the limit; its interval covers that of the limit
    outside_l1_minus_batchtopk, outside_null_l1_minus_batchtopk   of two crosscoders with the same seed
    """
    limits, each = [], [{} for _ in next(iter(nrns.values()))["pair"]]
    for kind, own in nrns.items():
        seeds = np.repeat(np.arange(len(own["null"])), [len(values) for values in own["null"]])
        null = np.concatenate(own["null"])
        ends = bootstrap(null, _limit, seeds)
        limits.append((kind, _limit(null), *ends))
        for metrics, pair, other in zip(each, own["pair"], own["null"]):
            for name, nrn in (("outside", pair), ("outside_null", other)):
                metrics[f"{name}_{kind}"] = _share((nrn < UNDER) | (nrn > OVER))
            metrics[f"beyond_null_{kind}"] = _share(*(pair > limit for limit in limits[-1][1:]))
    for metrics, name in product(each, ("outside", "outside_null")):
        one, other = (metrics[f"{name}_{kind}"] for kind in ("l1", "batchtopk"))
        both = ((m["value"], m["ci"]) for m in (one, other))
        metrics[f"{name}_l1_minus_batchtopk"] = metric(*difference(*both), one["n"])
    return pd.DataFrame(limits, columns=["architecture", *LIMITS]), each


def _limit(nrn: np.ndarray) -> float:
    return float(np.quantile(nrn, 1 - LEVEL))


def _share(hits: np.ndarray, *ends: np.ndarray) -> dict:
    """The share of ``hits`` with Wilson's interval, over features; from end to end, if ``ends`` are the hits
    with a limit at the ends of its own interval."""
    bounds = np.array([wilson(int(flags.sum()), len(flags)) for flags in (hits, *ends)])
    return metric(hits.mean(), (bounds[:, 0].min(), bounds[:, 1].max()), len(hits))


def least_share(limit: float) -> float:
    """The share of a feature's three rows at which a model counts as having it: its row is shorter than those
    of two that have the feature alike by as much as between two models at an NRN of ``limit``."""
    short = (1 - limit) / limit
    return short / (2 + short)


def origin_metrics(tables: Sequence[pd.DataFrame]) -> dict[str, dict]:
    """The metrics of one crosscoder of three models: in_all, came_with_style, came_with_function, shares of
    its features; function_minus_style, the difference of the last two. ``tables``: ``origins`` of the alive
    features at the null's threshold and at both ends of its interval; intervals cover all three."""
    origins, metrics = [table["origin"] for table in tables], {}
    for origin in ("in all", "came with style", "came with function"):
        metrics[origin.replace(" ", "_")] = _share(*(own.to_numpy() == origin for own in origins))
    signs = {"came with function": 1.0, "came with style": -1.0}
    values = [own.map(signs).fillna(0.0) for own in origins]
    bounds = np.array([bootstrap(v) for v in values])
    ends = bounds[:, 0].min(), bounds[:, 1].max()
    metrics["function_minus_style"] = metric(values[0].mean(), ends, len(values[0]))
    return metrics


def plot_nrn(curves: pd.DataFrame) -> go.Figure:
    """Cumulative distributions of NRN by architecture, of the pair and of the null side by side: thin lines
    are single crosscoders, thick ones their mean at equal shares."""
    curves = curves.replace({"pair": {"pair": "base, distilled", "null": "base, null_a"}})
    keys = ["architecture", "pair", "share"]
    how = {"x": "nrn", "y": "share", "color": "architecture", "facet_col": "pair"}
    fig = px.line(
        curves.groupby(keys, sort=False, as_index=False)["nrn"].mean(), **how,
        title="NRN by architecture, at equal L0: this pair, and the null",
        labels={"share": "share of alive features below", "nrn": "NRN (p = 1)"},
    )  # fmt: skip
    single = px.line(curves, **how, line_group="seed")
    fig.add_traces(single.update_traces(line_width=0.7, opacity=0.4, showlegend=False).data)
    return plain_titles(fig.update_xaxes(range=[-0.02, 1.02], dtick=0.25).update_yaxes(range=[0, 1]))


def plot_shares(part: Part) -> tuple[go.Figure, pd.DataFrame]:
    """(figure, its data): how many features of each architecture are one-sided. Small points are single
    crosscoders, diamonds their mean with its interval."""
    kinds, rows = part.tables["architectures"]["architecture"].unique(), []
    for (name, what), kind in product(SHARES.items(), kinds):
        m = part.metrics[f"{name}_{kind}"]
        numbers = {"all": [m["value"], *m["ci"]], **dict(enumerate(m.get("seeds", [])))}
        rows += [(what, kind, of, *number) for of, number in numbers.items()]
    columns = ["what", "architecture", "crosscoder", "share", "share_low", "share_high"]
    table = pd.DataFrame(rows, columns=columns)
    both = table["crosscoder"] == "all"
    fig = points(
        table[~both], table[both], "architecture", "share", "architecture",
        dict(zip(kinds, pio.templates["distilled"].layout.colorway)), facet_col="what", width=1000,
        category_orders={"what": list(SHARES.values()), "architecture": list(kinds)},
        title="One-sided features by architecture",
    )  # fmt: skip
    fig.update_yaxes(title_text="share of alive features", col=1).update_xaxes(tickangle=30)
    return fig.update_layout(showlegend=False), table


def describe(crosscoder: CrossCoder, store: Store, n_boot: int = 1000, seed: int = 0) -> dict[str, float]:
    """The quantities by which kinds of crosscoders are compared, on the split "report".

    variant, features, documents; l0, fve_<model> and dead (share of features that fire nowhere there), each
    with _low and _high: 95%, bootstrap over documents, for ``dead`` Wilson's over features. Of the alive:
    nrn_mean, nrn_sd, nrn_over_0_7, nrn_under_0_3 (shares), nrn_q01 ... nrn_q99; cosine_median, of those with
    a row in both models (NaN if these differ in width). dedicated_<model>: number of features reserved for
    it, and used_<model>: how many of these are alive."""
    quality = health_card(crosscoder, store, n_boot=n_boot, seed=seed)
    alive = torch.from_numpy(firing_frequency(crosscoder, store) > 0)
    row: dict = {"variant": crosscoder.variant, "features": crosscoder.n_features}
    row["documents"] = quality["l0"]["n"]
    for key in ("l0", *(f"fve_{m}" for m in crosscoder.names), "dead_fraction"):
        name, (low, high) = key.removesuffix("_fraction"), quality[key]["ci"]
        row |= {name: quality[key]["value"], f"{name}_low": low, f"{name}_high": high}
    # a third model's own features are in neither
    nrn = pd.Series(crosscoder.nrn()[alive].double().numpy()).dropna()
    row |= {"nrn_mean": nrn.mean(), "nrn_sd": nrn.std()}
    row |= {"nrn_over_0_7": (nrn > OVER).mean(), "nrn_under_0_3": (nrn < UNDER).mean()}
    row |= {f"nrn_q{round(100 * q):02}": nrn.quantile(q) for q in QUANTILES}
    one, other = crosscoder.rows("base"), crosscoder.rows("distilled")
    both = alive & (one.norm(dim=1) > 0) & (other.norm(dim=1) > 0)
    comparable = one.shape == other.shape and bool(both.any())
    row["cosine_median"] = float(crosscoder.cosine()[both].median()) if comparable else np.nan
    for m, name in enumerate(crosscoder.names):
        own = crosscoder.owner == m
        row |= {f"dedicated_{name}": int(own.sum()), f"used_{name}": int((own & alive).sum())}
    return row


def match_l1(
    store,
    k: float,
    config: TrainConfig,
    folder: str | Path,
    tokens: int | None = None,
    tolerance: float = 0.05,
    most: int = 8,
) -> tuple[float, pd.DataFrame]:
    """The lambda at which an L1 crosscoder has an L0 of about k, and the tries: (lambda, frame with l1 and
    l0, in their order).

    Runs like ``config`` but for variant, l1 and ``tokens`` (default: all of the config's), in ``folder``,
    each resumed or loaded if it is there. L0 is that of inference, on the split "choose". It falls with
    lambda, about as a power of it: from config.l1 lambda moves by factors of 4 until k lies between two
    tries, then to where a straight line between their logarithms meets k. Ends within ``tolerance`` (share of
    k), or after ``most`` tries with the nearest. L0 depends on the length of a run too: a lambda found in
    short ones is near, and L0 is reported as reached."""
    check("k", k, float, low=1e-3, high=config.n_features)
    tries: dict[float, float] = {}
    guess, tokens = config.l1 or 1.0, min(tokens or config.tokens, config.tokens)
    while True:
        own = replace(config, variant="l1", precision="float32", l1=guess, tokens=tokens)
        crosscoder = train(store, own, Path(folder) / f"l1_{guess:.4g}")
        tries[guess] = float(firing_frequency(crosscoder, store, "choose").sum())
        best = min(tries, key=lambda lam: abs(np.log(max(tries[lam], 1e-6) / k)))
        if abs(tries[best] / k - 1) <= tolerance or len(tries) >= most:
            return best, pd.DataFrame({"l1": list(tries), "l0": list(tries.values())})
        dense, sparse = [lam for lam in tries if tries[lam] > k], [lam for lam in tries if tries[lam] <= k]
        if not dense or not sparse:
            guess = 4 * max(dense) if dense else min(sparse) / 4
        else:
            low, high = max(dense), min(sparse)
            between = np.log(tries[low] / k) / np.log(tries[low] / max(tries[high], 1e-6))
            guess = float(low * (high / low) ** np.clip(between, 0.1, 0.9))


def origins(
    crosscoder: CrossCoder, names: Sequence[str] = NAMES, threshold: float = 0.15, p: float = 1
) -> pd.DataFrame:
    """When each feature came, and when it went: one row per feature.

    feature; share_<model>, ||d^m||_p over the sum of the three (NaN where all are 0); uses_<model>, whether
    the share is above ``threshold``; origin, one of ``ORIGINS``. ``names``: three models of the
    crosscoder, each one made from the one before it. A threshold of 0.15 means: a row less than 0.35 times as
    long as those of two models that have the feature alike, which between two models is an NRN below 0.26.
    What noise of training does to these shares is for a null to say. Dead features have rows too: leave them
    out. With unlike widths take p = 2, as in ``CrossCoder.nrn``."""
    if len(names) != 3:
        raise UserError(
            f"names are {', '.join(names)}: there must be three models, each made from the one before it"
        )
    check("threshold", threshold, float, low=0, high=1 / 3)
    lengths = torch.stack([crosscoder.rows(name).norm(p=p, dim=-1) for name in names], dim=1).double().numpy()
    total = lengths.sum(1, keepdims=True)
    shares = np.divide(lengths, total, out=np.full_like(lengths, np.nan), where=total > 0)
    uses = shares > threshold  # False for NaN
    frame = pd.DataFrame({"feature": np.arange(len(shares))})
    for i, name in enumerate(names):
        frame[f"share_{name}"], frame[f"uses_{name}"] = shares[:, i], uses[:, i]
    frame["origin"] = [ORIGINS[tuple(map(bool, row))][0] for row in uses]
    return frame


def plot_origins(frame: pd.DataFrame, names: Sequence[str] = NAMES) -> go.Figure:
    """Features in the triangle of their shares, one corner per model, coloured by origin; those in all three
    lie in the middle. ``frame``: rows of ``origins``."""
    fig, axes = go.Figure(), dict(zip("bac", names))  # the middle model on top
    hover = "feature %{text}<br>" + "<br>".join(f"{name} %{{{axis}:.2f}}" for axis, name in axes.items())
    for origin, colour in ORIGINS.values():
        part = frame[frame["origin"] == origin]
        if len(part) and origin != "in none":
            fig.add_scatterternary(
                **{axis: part[f"share_{name}"] for axis, name in axes.items()}, mode="markers",
                name=f"{origin} ({len(part)})", text=part["feature"],
                marker=dict(size=5, color=COLOURS[colour], opacity=0.7), hovertemplate=hover,
            )  # fmt: skip
    style = dict(ticks="outside", tickformat=".1f", gridcolor="#E8E8E8")
    styles = {f"{axis}axis": dict(title=name, **style) for axis, name in axes.items()}
    title = "Which model's feature is it? Shares of its decoder rows"
    return fig.update_layout(
        title=title, ternary=dict(sum=1, bgcolor="white", **styles), height=560, margin_t=90
    )
