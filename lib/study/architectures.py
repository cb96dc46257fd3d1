"""Crosscoders of several kinds on one store, and one crosscoder of three models.

    configs = {"batchtopk": TrainConfig(k=24), "jumprelu": TrainConfig(k=24, variant="jumprelu"),
               "dedicated": TrainConfig(k=24, dedicated=0.05)}
    configs["l1"] = replace(configs["batchtopk"], variant="l1", l1=match_l1(store, 24, configs["batchtopk"], folder / "match")[0])
    table = compare(store, configs, folder)

Kinds of crosscoders may only be compared where they are equally sparse: a denser code reconstructs more, and
has other features. BatchTopK and TopK have the L0 that they are told, JumpReLU is trained to it, and for L1
lambda is searched.

``origins`` reads a crosscoder of three models that came one from another, as base -> style -> distilled
(``style``: an early checkpoint that has learnt how traces sound and not yet what they are for). With
share_i^m = ||d_i^m|| / sum_n ||d_i^n|| and "model m uses feature i" for a share above a threshold, the models
that use it say when it came and when it went.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch

from ..crosscoder.codes import firing_frequency
from ..crosscoder.health import health
from ..crosscoder.model import CrossCoder
from ..crosscoder.training import TrainConfig, train
from ..figures import COLOURS
from ..settings import UserError, check

OVER, UNDER = 0.7, 0.3  # NRN beyond which a feature counts as leaning to one model
QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
ORIGINS = {  # does the first, the second, the third model use it? ("base", "style", "distilled")
    (True, True, True): "in all",
    (False, True, True): "came with style",
    (False, False, True): "came with function",
    (True, False, False): "lost with style",
    (True, True, False): "lost with function",
    (False, True, False): "in style alone",
    (True, False, True): "in all but style",
    (False, False, False): "in none",
}
MARKERS = {
    "in all": COLOURS["null"],
    "came with style": COLOURS["alternative"],
    "came with function": COLOURS["distilled"],
    "lost with style": COLOURS["contrast"],
    "lost with function": COLOURS["base"],
    "in style alone": COLOURS["reflection"],
    "in all but style": COLOURS["deduction"],
    "in none": COLOURS["random"],
}


# --- kinds of crosscoders -----------------------------------------------------------------------------------


def compare(
    store,
    configs: Mapping[str, TrainConfig],
    folder: str | Path,
    of: str = "distilled",
    against: str = "base",
    p: float = 1,
    n_boot: int = 1000,
    seed: int = 0,
) -> pd.DataFrame:
    """Train each config in ``folder``/<name> (resumed, or loaded if it is there) and measure it on documents
    of the split "report".

    One row per config; columns are those of ``describe``. Raises UserError as ``lib.crosscoder.training.train`` does.
    """
    rows = {}
    for name, config in configs.items():
        rows[name] = describe(train(store, config, Path(folder) / name), store, of, against, p, n_boot, seed)
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("architecture")


def describe(
    crosscoder: CrossCoder,
    store,
    of: str = "distilled",
    against: str = "base",
    p: float = 1,
    n_boot: int = 1000,
    seed: int = 0,
) -> dict[str, float]:
    """What tells kinds of crosscoders apart, on the split "report".

    variant, features; l0, fve_<model> and dead (share of features that fire nowhere there), each with _low
    and _high: 95%, bootstrap over documents, for ``dead`` Wilson's over features. Of the alive features:
    nrn_mean, nrn_sd, nrn_over_0_7, nrn_under_0_3 (shares), nrn_q01 ... nrn_q99; cosine_median, of those with
    a row in both models (NaN if these differ in width). dedicated_<model>: number of features reserved for
    it, and used_<model>: how many of these are alive.
    """
    card = health(crosscoder, store, n_boot=n_boot, seed=seed)
    alive = torch.from_numpy(firing_frequency(crosscoder, store) > 0)
    found: dict = {"variant": crosscoder.variant, "features": crosscoder.n_features}
    for name, metric in {
        "l0": "l0",
        **{f"fve_{m}": f"fve_{m}" for m in crosscoder.names},
        "dead": "dead_fraction",
    }.items():
        found |= {
            name: card[metric]["value"],
            f"{name}_low": card[metric]["ci"][0],
            f"{name}_high": card[metric]["ci"][1],
        }
    nrn = crosscoder.nrn(p, of, against)[alive].double().numpy()
    nrn = nrn[~np.isnan(nrn)]  # a third model's own features are in neither
    empty = not len(nrn)
    found |= {
        "nrn_mean": np.nan if empty else nrn.mean(),
        "nrn_sd": nrn.std(ddof=1) if len(nrn) > 1 else np.nan,
        "nrn_over_0_7": np.nan if empty else (nrn > OVER).mean(),
        "nrn_under_0_3": np.nan if empty else (nrn < UNDER).mean(),
    }
    found |= {f"nrn_q{round(100 * q):02}": np.nan if empty else np.quantile(nrn, q) for q in QUANTILES}
    one, other = crosscoder.rows(against), crosscoder.rows(of)
    both = alive & (one.norm(dim=1) > 0) & (other.norm(dim=1) > 0)
    comparable = one.shape == other.shape and bool(both.any())
    found["cosine_median"] = float(crosscoder.cosine(against, of)[both].median()) if comparable else np.nan
    for m, name in enumerate(crosscoder.names):
        own = crosscoder.owner == m
        found |= {f"dedicated_{name}": int(own.sum()), f"used_{name}": int((own & alive).sum())}
    return found


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
    short ones is near, and what it gave is what ``compare`` reports.
    """
    check("k", k, float, low=1e-3, high=config.n_features)
    tries: dict[float, float] = {}
    guess = config.l1 or 1.0
    while True:
        short = replace(
            config,
            variant="l1",
            precision="float32",
            l1=guess,
            tokens=min(tokens or config.tokens, config.tokens),
        )
        crosscoder = train(store, short, Path(folder) / f"l1_{guess:.4g}")
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


# --- three models -------------------------------------------------------------------------------------------


def origins(
    crosscoder: CrossCoder,
    names: Sequence[str] = ("base", "style", "distilled"),
    threshold: float = 0.15,
    p: float = 1,
) -> pd.DataFrame:
    """When each feature came, and when it went: one row per feature.

    feature; share_<model>, ||d^m||_p over the sum of the three (NaN where all are 0); uses_<model>, whether
    the share is above ``threshold``; origin, one of ``ORIGINS``' values. ``names``: three models of the
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
    frame["origin"] = [ORIGINS[tuple(map(bool, row))] for row in uses]
    return frame


def origins_figure(frame: pd.DataFrame, names: Sequence[str] = ("base", "style", "distilled")) -> go.Figure:
    """Features in the triangle of their shares, one corner per model, coloured by origin; those in all three
    lie in the middle.

    ``frame``: what ``origins`` made, or some of its rows. Save it with ``data=frame``.
    """
    fig = go.Figure()
    for origin in MARKERS:
        part = frame[frame["origin"] == origin]
        if len(part) and origin != "in none":
            # the middle model on top
            corners = {axis: part[f"share_{name}"] for axis, name in zip("bac", names)}
            fig.add_scatterternary(
                **corners,
                mode="markers",
                name=f"{origin} ({len(part)})",
                text=part["feature"],
                marker=dict(size=5, color=MARKERS[origin], opacity=0.7),
                hovertemplate="feature %{text}<br>"
                + "<br>".join(f"{n} %{{{x}:.2f}}" for x, n in zip("bac", names)),
            )
    axes = {
        f"{axis}axis": dict(title=name, ticks="outside", tickformat=".1f", gridcolor="#E8E8E8")
        for axis, name in zip("bac", names)
    }
    fig.update_layout(
        title="Whose feature is it? Shares of its decoder rows",
        ternary=dict(sum=1, bgcolor="white", **axes),
        height=560,
    )
    return fig
