"""Use beside uniqueness: does the distilled model fire a feature more often, or harder, than the base, on the
same text?

NRN asks in whose decoder a feature stands; *use* asks in whose activations it fires. A shared feature (NRN
0.5) can be used differently: distillation need not add a feature to change what a model does. On the same
token ids, every feature is read

- from each model on its own, ``slots``: the model's activation stands in every slot of the crosscoder, times
  its own scale, as if
  all models were this one. "Would the feature fire if the other model held the same?" Its full input, hence
  the measure of use;
- from each model on its own, ``alone``: its activation in its own slot, the others at their mean
  (``CrossCoder.encode_from``).
  "Is this model's share enough to make it fire?" It needs no equal widths, but about half of the input is
  missing, and a feature whose encoder reads a model hardly at all cannot fire from it, whatever that model
  holds;
- ``joint``: both at once, the code that all other statistics are about.

Neither solo reading is what the crosscoder was trained on: an encoder may take the models' *difference*,
which vanishes if one model stands in both slots. How well each reading still explains its own model is
measured by ``explained``.

With S_m the sum of a feature's activation over the tokens as read from model m, n_m the number of tokens on
which it fires, and h half a typical activation, h = (S_of + S_against) / (n_of + n_against) / 2, the change
of use is

    change           = log (S_of + h) / (S_against + h)                   in nats; 0 alike, log 2 twice the use
    change_frequency = log (n_of + 1/2) / (n_against + 1/2)
    difference       = (S_of - S_against) / tokens

so that no log is infinite, and a feature that fires a handful of times cannot change by much. Intervals
resample documents; p is that of a t-test on the documents' differences, q its adjustment for all features
(Benjamini-Hochberg). With thousands of tokens nearly every difference is significant. Whether it is *large*
is judged against a pair in which nothing was distilled (``change_limit``, ``reweighted``).

Source: the question is that of 2026 crosscoder studies of distillation which found shared features
reweighted; the measures are ours.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from plotly.subplots import make_subplots
from scipy import sparse
from scipy.stats import false_discovery_control, ttest_1samp

from ..activations.positions import EVENTS, event_rows, groups_of
from ..activations.store import Store
from ..crosscoder.codes import encode_slots
from ..crosscoder.model import CrossCoder
from ..figures import COLOURS
from ..runs import Progress
from ..settings import UserError, check
from ..stats import group_weights, percentiles
from .auroc import sum_by

SOLO = ("slots", "alone")
JOINT = "joint"
CHUNK = 8_192  # tokens at a time that are encoded


@dataclass(frozen=True)
class Readings:
    """Codes of the same tokens in every reading: ``codes`` {model or "joint": sparse [n, F]}; ``rows`` [n] of
    the store, sorted.
    """

    rows: np.ndarray
    documents: np.ndarray
    codes: dict[str, sparse.csr_matrix]


@torch.no_grad()
def read(crosscoder: CrossCoder, store: Store, rows: np.ndarray, solo: str = "slots") -> Readings:
    """Every model on its own (``solo``: "slots" or "alone", see above) and the joint code, at ``rows`` of the
    store.
    """
    check("solo", solo, str, choices=SOLO)
    rows = np.sort(np.asarray(rows, dtype=np.int64))
    if len(rows) == 0:
        raise UserError("there are no rows to read: take a split that has tokens")
    parts: dict[str, list] = {name: [] for name in (*crosscoder.names, JOINT)}
    with Progress(f"tokens read from each model ({solo})", len(rows)) as progress:
        for start in range(0, len(rows), CHUNK):
            acts = dict(zip(store.models, store.activations(rows[start : start + CHUNK])))
            for name in crosscoder.names:
                solo_code = (
                    encode_slots(crosscoder, name, acts[name])
                    if solo == "slots"
                    else crosscoder.encode_from(name, acts[name])
                )
                parts[name].append(sparse.csr_matrix(solo_code.numpy()))
            parts[JOINT].append(
                sparse.csr_matrix(crosscoder.encode([acts[name] for name in crosscoder.names]).numpy())
            )
            progress.update(min(start + CHUNK, len(rows)))
    return Readings(
        rows,
        store.documents[rows],
        {name: sparse.csr_matrix(sparse.vstack(codes)) for name, codes in parts.items()},
    )


def explained(crosscoder: CrossCoder, store: Store, readings: Readings) -> pd.DataFrame:
    """How much of each model's variance its own reading, and the joint code, explain, in scaled space; and
    the L0 of the codes.

    Columns model, reading ("solo" or "joint"), fve (share of the variance about the mean), l0. A solo reading
    that explains much less than the joint one is off the crosscoder's usual input: its features are then not
    to be taken at their word.
    """
    found = []
    for m, name in enumerate(crosscoder.names):
        x = store.activations(readings.rows)[store.models.index(name)].numpy() * float(crosscoder.scales[m])
        total = np.square(x - x.mean(0)).sum()
        for reading in (name, JOINT):
            x_hat = readings.codes[reading] @ crosscoder.rows(name).numpy() + crosscoder.bias(name).numpy()
            l0 = readings.codes[reading].nnz / len(readings.rows)
            found.append(
                (name, "joint" if reading == JOINT else "solo", 1 - np.square(x - x_hat).sum() / total, l0)
            )
    return pd.DataFrame(found, columns=["model", "reading", "fve", "l0"])


# --- documents: sums, and resamples of them -----------------------------------------------------------------


def _weights(n: int, n_boot: int, seed: int) -> np.ndarray:
    """How often each of n documents is drawn in each resample, float [n_boot, n]."""
    check("n_boot", n_boot, int, low=1)
    return group_weights(n, n_boot, seed).astype(float)


def _sums(codes: sparse.spmatrix, which: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    """For every document 0 .. n - 1 the tokens on which each feature fires, and its summed activation: [n, F]
    each.
    """
    return sum_by(which, sparse.csr_matrix(codes > 0), n).toarray(), sum_by(which, codes, n).toarray()


# --- the table of use ---------------------------------------------------------------------------------------


def use_table(
    crosscoder: CrossCoder,
    store: Store,
    rows: np.ndarray,
    n_boot: int = 200,
    seed: int = 0,
    by: str | None = None,
    of: str = "distilled",
    against: str = "base",
    readings: Readings | None = None,
) -> pd.DataFrame:
    """How the use of every feature differs between two models, on the tokens ``rows``. A row per feature, and
    per group with ``by``.

    feature, group, alive    group: "all", or phase or category (``groups_of``); alive: it fires in one of the
    three readings frequency_<r>, mean_<r>, firing_mean_<r>    share of tokens on which it fires; mean
    activation over all tokens, and over those on
                             which it fires (NaN if none), for r of both models on their own and "joint"
    change, change_frequency, difference        ``of`` against ``against`` (see above), each with _low and
    _high (95%, documents) p, q                     t-test on the documents' differences of activation; q:
    Benjamini-Hochberg over all alive rows of the table

    ``readings`` (``read``) saves reading the same rows again, and says which solo reading; by default it is
    "slots".
    """
    readings = read(crosscoder, store, rows) if readings is None else readings
    masks = (
        {"all": np.ones(len(readings.rows), dtype=bool)}
        if by is None
        else groups_of(store, readings.rows, by)
    )
    frames = [_use_in(readings, group, mask, n_boot, seed, of, against) for group, mask in masks.items()]
    table = pd.concat(frames, ignore_index=True)
    tested = table["alive"].to_numpy()
    table["q"] = np.nan
    if tested.any():
        table.loc[tested, "q"] = false_discovery_control(table.loc[tested, "p"])
    return table


def _use_in(
    readings: Readings, group: str, mask: np.ndarray, n_boot: int, seed: int, of: str, against: str
) -> pd.DataFrame:
    documents, which = np.unique(readings.documents[mask], return_inverse=True)
    n, tokens = len(documents), int(mask.sum())
    sums = {name: _sums(readings.codes[name][mask], which, n) for name in (against, of, JOINT)}
    alive = np.any([fired.any(0) for fired, _ in sums.values()], axis=0)
    columns = {"feature": np.arange(len(alive)), "group": group, "alive": alive}
    for name, (fired, mass) in sums.items():
        total = fired.sum(0)
        columns |= {
            f"frequency_{name}": total / tokens,
            f"mean_{name}": mass.sum(0) / tokens,
            f"firing_mean_{name}": np.divide(
                mass.sum(0), total, out=np.full(len(total), np.nan), where=total > 0
            ),
        }
    weights = _weights(n, n_boot, seed)
    lengths = np.bincount(which, minlength=n).astype(float)
    (fired_a, mass_a), (fired_o, mass_o) = sums[against], sums[of]
    fires = fired_a.sum(0) + fired_o.sum(0)
    half = np.divide(mass_a.sum(0) + mass_o.sum(0), fires, out=np.ones(len(fires)), where=fires > 0) / 2
    with warnings.catch_warnings():
        # documents that are all alike: p is 0, or not defined and set below
        warnings.simplefilter("ignore", RuntimeWarning)
        p = ttest_1samp(mass_o - mass_a, 0.0, axis=0).pvalue if n > 1 else np.full(len(fires), np.nan)
    # alive in the joint code only, or a single document: nothing speaks for a change
    unsized = np.where(alive, 1.0, np.nan)

    def measure(name: str, statistic) -> None:
        columns[name] = statistic(np.ones((1, n)))[0]
        columns[f"{name}_low"], columns[f"{name}_high"] = percentiles(statistic(weights))

    measure("change", lambda w: np.log((w @ mass_o + half) / (w @ mass_a + half)))
    measure("change_frequency", lambda w: np.log((w @ fired_o + 0.5) / (w @ fired_a + 0.5)))
    measure("difference", lambda w: (w @ (mass_o - mass_a)) / (w @ lengths)[:, None])
    return pd.DataFrame(columns | {"p": np.where(np.isnan(p), unsized, p)})


def change_limit(null_table: pd.DataFrame, level: float = 0.01) -> float:
    """The |change| that a share ``level`` of the alive features exceeds in a pair in which nothing was
    distilled.
    """
    check("level", level, float, low=0, high=1)
    changes = null_table.loc[null_table["alive"].astype(bool), "change"].abs().dropna()
    if changes.empty:
        raise UserError("no feature of the null's table of use is alive: there is nothing to compare with")
    return float(np.quantile(changes, 1 - level))


def reweighted(table: pd.DataFrame, null_table: pd.DataFrame | float, level: float = 0.01) -> np.ndarray:
    """Which rows of ``use_table`` change by more than the null does: bool [rows], False where dead.

    ``null_table``: the table of use of base and null_a, over their own crosscoder, or the limit taken from it
    (``change_limit``).
    """
    limit = null_table if isinstance(null_table, (int, float)) else change_limit(null_table, level)
    return (table["alive"].astype(bool) & (table["change"].abs() > limit)).to_numpy()


def kinds_of_change(table: pd.DataFrame, unique: np.ndarray, changed: np.ndarray) -> np.ndarray:
    """ "unique", "reweighted" (changed, and not unique), "unchanged", or "dead" for every row; ``unique``,
    ``changed`` bool [rows].
    """
    dead, unique, changed = (
        np.asarray(mask, dtype=bool) for mask in (~table["alive"].astype(bool), unique, changed)
    )
    return np.select([dead, unique, changed], ["dead", "unique", "reweighted"], "unchanged")


# --- by phase, and around events ----------------------------------------------------------------------------


def firing_by_phase(
    crosscoder: CrossCoder,
    store: Store,
    rows: np.ndarray,
    features: Sequence[int] | None = None,
    by: str = "phase",
    n_boot: int = 200,
    seed: int = 0,
    readings: Readings | None = None,
) -> pd.DataFrame:
    """A row per feature, phase (or category, with ``by``) and reading: tokens, frequency and mean over all of
    them, with _low and _high (95%, documents)."""
    readings = read(crosscoder, store, rows) if readings is None else readings
    features, frames = (
        (np.arange(crosscoder.n_features) if features is None else np.asarray(features, dtype=int)),
        [],
    )
    codes = {name: readings.codes[name].tocsc()[:, features].tocsr() for name in readings.codes}
    for group, mask in groups_of(store, readings.rows, by).items():
        documents, which = np.unique(readings.documents[mask], return_inverse=True)
        weights, lengths = _weights(len(documents), n_boot, seed), np.bincount(which).astype(float)
        for name in readings.codes:
            columns = {"feature": features, by: group, "reading": name, "tokens": int(mask.sum())}
            for what, sums in zip(("frequency", "mean"), _sums(codes[name][mask], which, len(documents))):
                low, high = percentiles((weights @ sums) / (weights @ lengths)[:, None])
                columns |= {what: sums.sum(0) / mask.sum(), f"{what}_low": low, f"{what}_high": high}
            frames.append(pd.DataFrame(columns))
    return pd.concat(frames, ignore_index=True).sort_values("feature", kind="stable", ignore_index=True)


def around_events(
    crosscoder: CrossCoder,
    store: Store,
    rows: np.ndarray,
    features: Sequence[int],
    events: Sequence[str] = tuple(EVENTS),
    window: int = 4,
    n_boot: int = 200,
    seed: int = 0,
    readings: Readings | None = None,
) -> pd.DataFrame:
    """Averages aligned at events: a row per event, offset, feature and reading: n (events), mean with _low,
    _high (95%), frequency.

    Offset 0 is the first token after the boundary (``event_rows``), -1 the last before it, from -``window``
    to +``window``. Tokens beyond the document, and masked ones, take no part.
    """
    check("window", window, int, low=1)
    readings = read(crosscoder, store, rows) if readings is None else readings
    codes = {
        name: readings.codes[name].tocsc()[:, np.asarray(features, dtype=int)].tocsr()
        for name in readings.codes
    }
    found = []
    for event in events:
        centres = event_rows(store, readings.rows, event)
        for offset in range(-window, window + 1):
            at = centres + offset
            fits = (at >= 0) & (at < len(store))
            place = np.searchsorted(readings.rows, at).clip(max=len(readings.rows) - 1)
            fits &= (readings.rows[place] == at) & (readings.documents[place] == store.documents[centres])
            if not fits.any():
                continue
            documents, which = np.unique(store.documents[centres[fits]], return_inverse=True)
            weights, counts = _weights(len(documents), n_boot, seed), np.bincount(which).astype(float)
            for name in codes:
                fired, mass = _sums(codes[name][place[fits]], which, len(documents))
                low, high = percentiles((weights @ mass) / (weights @ counts)[:, None])
                mean, frequency, n = (
                    mass.sum(0) / counts.sum(),
                    fired.sum(0) / counts.sum(),
                    int(counts.sum()),
                )
                found += [
                    (event, offset, int(f), name, n, mean[i], low[i], high[i], frequency[i])
                    for i, f in enumerate(features)
                ]
    return pd.DataFrame(
        found,
        columns=["event", "offset", "feature", "reading", "n", "mean", "mean_low", "mean_high", "frequency"],
    )


def events_figure(
    averages: pd.DataFrame, names: Mapping[int, str] | None = None, title: str = "Around events"
) -> go.Figure:
    """``around_events`` as lines with bands: a row per feature (called ``names[feature]``), a column per
    event, a colour per model.
    """
    events, features = list(averages["event"].unique()), list(averages["feature"].unique())
    fig = make_subplots(
        len(features),
        len(events),
        shared_xaxes=True,
        shared_yaxes="rows",
        column_titles=events,
        vertical_spacing=0.04,
        horizontal_spacing=0.015,
        row_titles=[(names or {}).get(f, f"feature {f}") for f in features],
    )
    for (event, feature, reading), part in averages[averages["reading"] != JOINT].groupby(
        ["event", "feature", "reading"], sort=False
    ):
        colour, at = (
            COLOURS.get(reading, COLOURS["random"]),
            dict(row=features.index(feature) + 1, col=events.index(event) + 1),
        )
        red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
        band = dict(
            x=[*part["offset"], *part["offset"][::-1]],
            y=[*part["mean_high"], *part["mean_low"][::-1]],
            fill="toself",
        )
        look = dict(
            fillcolor=f"rgba({red},{green},{blue},0.2)",
            mode="lines",
            line_width=0,
            hoverinfo="skip",
            showlegend=False,
        )
        fig.add_scatter(**band, **look, **at)
        first = bool(event == events[0] and feature == features[0])
        line = dict(mode="lines+markers", marker_size=5, line_color=colour)
        fig.add_scatter(x=part["offset"], y=part["mean"], name=reading, showlegend=first, **line, **at)
    fig.add_vline(x=-0.5, line_dash="dot", line_color=COLOURS["null"])
    legend = dict(orientation="h", x=0.8, y=0.99, yanchor="top", yref="container")
    fig.update_layout(title=title, width=1100, height=170 + 150 * len(features), margin_t=100, legend=legend)
    fig.update_yaxes(rangemode="tozero").update_annotations(font_size=12)
    return fig.update_xaxes(dtick=2)
