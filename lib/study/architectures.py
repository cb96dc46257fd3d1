"""Crosscoders of several kinds on one store, and one crosscoder of three models.

Kinds of crosscoders may only be compared where they are equally sparse: BatchTopK and TopK have the L0 that
they are given, JumpReLU is trained to it, and for L1 lambda is searched (``match_l1``). ``origins`` reads a
crosscoder of three models, base -> style -> distilled (``style``: an earlier checkpoint of the distillation):
which models use a feature, by its share ||d_i^m|| / sum_n ||d_i^n||, says when it came and when it went.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import plotly.express as px
import plotly.graph_objects as go
import torch

from ..activations.store import Store
from ..crosscoder.codes import firing_frequency
from ..crosscoder.health import health_card
from ..crosscoder.model import CrossCoder
from ..crosscoder.training import TrainConfig, train
from ..figures import COLOURS, plain_titles
from ..settings import UserError, check
from ..stats import wilson
from .variants import Variant, metric, part_of_study

OVER, UNDER = 0.7, 0.3  # NRN beyond which a feature counts as leaning to one model
QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
CURVE = np.linspace(0, 1, 401)  # quantiles of NRN that are kept for a figure
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


@part_of_study("architectures", 2)
def compute_architectures(variant: Variant, boots: int = 300, dedicated: float = 0.05) -> tuple[dict, dict]:
    """The part "architectures": other kinds of crosscoders at the sparsity of the run's, on the pair and on
    base against null_a; and base, style, distilled in one.

    Each architecture has a null of its own: what share of its features lies beyond the 99% quantile of its
    own null? ``boots``: resamples of documents; ``dedicated``: share of the dictionary that the dedicated
    crosscoder reserves for each model.
    """
    config, store = variant.config(), variant.store
    _, null = variant.harvested("base", "null_a")
    coefficient, tries = match_l1(store, config.k, config, variant.folder("match_l1"), tolerance=0.1, most=5)
    configs = {
        "batchtopk": config,
        "topk": replace(config, variant="topk"),
        "jumprelu": replace(config, variant="jumprelu"),
        "dedicated": replace(config, dedicated=dedicated),
        "l1": replace(config, variant="l1", precision="float32", l1=coefficient),
    }
    # trained by other parts, and in the search for lambda
    elsewhere = {"batchtopk_null": f"null_a_seed{config.seed}", "l1_pair": f"match_l1/l1_{coefficient:.4g}"}
    rows, curves, metrics = [], [], {}
    for name, own in configs.items():
        crosscoders, nrns, outside = {}, {}, {}
        for pair, (on, model) in {"pair": (store, "distilled"), "null": (null, "null_a")}.items():
            folder = variant.folder(elsewhere.get(f"{name}_{pair}", f"{name}_{pair}"))
            found = variant.crosscoder if (own, pair) == (config, "pair") else train(on, own, folder)
            nrn = np.sort(found.nrn(1, model, "base").numpy()[firing_frequency(found, on) > 0])
            curve = {"architecture": name, "pair": pair, "nrn": np.quantile(nrn, CURVE), "share": CURVE}
            curves.append(pd.DataFrame(curve))
            crosscoders[pair], nrns[pair] = found, nrn
            outside[pair] = float(((nrn < UNDER) | (nrn > OVER)).mean())
        limit = float(np.quantile(nrns["null"], 0.99))
        hits, n = int((nrns["pair"] > limit).sum()), len(nrns["pair"])
        low, high = wilson(hits, n)
        row = {"architecture": name, **describe(crosscoders["pair"], store, n_boot=boots, seed=config.seed)}
        row |= {"outside": outside["pair"], "outside_null": outside["null"], "null_limit": limit}
        row |= {"beyond_null": hits / n, "beyond_null_low": low, "beyond_null_high": high}
        for measure in ("l0", "outside", "outside_null", "beyond_null"):
            metrics[f"{measure}_{name}"] = metric(row[measure], n=row["features"])
        rows.append(row)
    curves = pd.concat(curves, ignore_index=True)
    tables = {"architectures": pd.DataFrame(rows), "nrn": curves, "match_l1": tries}
    if "style" in variant.pair.others:
        _, store = variant.harvested(*NAMES)
        crosscoder = train(store, config, variant.folder("three_models"))
        limits = variant.null_limits().set_index(["score", "side", "level"])
        # of two models' rows, how short is one at the null's threshold of NRN? So short counts as absent
        limit = limits["threshold"]["nrn", "distilled", 0.01]
        short = (1 - limit) / limit
        table = origins(crosscoder, threshold=short / (2 + short))
        tables["origins"] = table.assign(alive=firing_frequency(crosscoder, store) > 0)
    return metrics, tables


def plot_nrn(curves: pd.DataFrame) -> go.Figure:
    """Cumulative distributions of NRN by architecture, of the pair and of the null side by side."""
    fig = px.line(
        curves.replace({"pair": {"pair": "base, distilled", "null": "base, null_a"}}),
        x="nrn", y="share", color="architecture", facet_col="pair",
        title="NRN by architecture, at equal L0: this pair, and the null",
        labels={"share": "share of alive features below", "nrn": "NRN (p = 1)"},
    )  # fmt: skip
    return plain_titles(fig.update_xaxes(range=[-0.02, 1.02], dtick=0.25).update_yaxes(range=[0, 1]))


def describe(crosscoder: CrossCoder, store: Store, n_boot: int = 1000, seed: int = 0) -> dict[str, float]:
    """The quantities by which kinds of crosscoders are compared, on the split "report".

    variant, features; l0, fve_<model> and dead (share of features that fire nowhere there), each with _low
    and _high: 95%, bootstrap over documents, for ``dead`` Wilson's over features. Of the alive features:
    nrn_mean, nrn_sd, nrn_over_0_7, nrn_under_0_3 (shares), nrn_q01 ... nrn_q99; cosine_median, of those with
    a row in both models (NaN if these differ in width). dedicated_<model>: number of features reserved for
    it, and used_<model>: how many of these are alive.
    """
    quality = health_card(crosscoder, store, n_boot=n_boot, seed=seed)
    alive = torch.from_numpy(firing_frequency(crosscoder, store) > 0)
    row: dict = {"variant": crosscoder.variant, "features": crosscoder.n_features}
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
    row["cosine_median"] = (
        float(crosscoder.cosine("base", "distilled")[both].median()) if comparable else np.nan
    )
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
    short ones is near, and L0 is reported as reached.
    """
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
    out. With unlike widths take p = 2, as in ``CrossCoder.nrn``.
    """
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
                **{axis: part[f"share_{name}"] for axis, name in axes.items()},
                mode="markers",
                name=f"{origin} ({len(part)})",
                text=part["feature"],
                marker=dict(size=5, color=COLOURS[colour], opacity=0.7),
                hovertemplate=hover,
            )
    style = dict(ticks="outside", tickformat=".1f", gridcolor="#E8E8E8")
    styles = {f"{axis}axis": dict(title=name, **style) for axis, name in axes.items()}
    title = "Which model's feature is it? Shares of its decoder rows"
    return fig.update_layout(title=title, ternary=dict(sum=1, bgcolor="white", **styles), height=560)
