"""A first look at a store, before anything is trained on it: what is in it, how long the vectors are, how
alike.

Two models' residual streams can only be compared entry by entry if they share a width and an origin, as a
model and its fine-tuned copy do. Cosines are taken about each model's own mean, because a large common mean
makes any two activations look alike; and beside each stands the same cosine between a token and *another*
token, which is what "alike" has to beat.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import torch
from transformers import PreTrainedTokenizerBase

from ..figures import COLOURS, labelled_lines
from ..labels import CATEGORIES, KINDS, LABELS, SPLITS
from ..models.pairs import Pair
from ..models.reader import capture
from ..settings import UserError
from ..stats import bootstrap
from .store import Store


def contents(store: Store) -> pd.DataFrame:
    """Kept tokens of every split (columns) by the label of their sentence (rows), with the share of all kept
    tokens.
    """
    labels = store.labels["label"]
    values = {name: i for i, name in enumerate(LABELS)} | (
        {"(no label)": -1} if (labels[store.kept] < 0).any() else {}
    )
    rows = {
        name: [int((store.kept & (store.split == s) & (labels == i)).sum()) for s in range(len(SPLITS))]
        for name, i in values.items()
    }
    frame = pd.DataFrame.from_dict(rows, orient="index", columns=list(SPLITS)).rename_axis("label")
    frame["share"] = frame.sum(axis=1) / int(store.kept.sum())
    return frame


def labelled_text(document: int, store: Store, tokenizer: PreTrainedTokenizerBase):
    """One document of the store as HTML, a line per sentence, coloured by category; wrong steps are
    underlined.
    """
    rows = np.flatnonzero(store.documents == document)
    words = tokenizer.convert_ids_to_tokens(store.tokens[rows].tolist())
    lines, line = [], []
    for row, word in zip(rows, words):
        label = LABELS[store.labels["label"][row]] if store.labels["label"][row] >= 0 else "(no label)"
        wrong = store.labels["error"][row] == 1
        line.append(word)
        if (
            store.labels["ends"][row] == 1
            or row == rows[-1]
            or label == "(no label)"
            and word == tokenizer.bos_token
        ):
            lines.append((label, line, wrong))
            line = []
    return labelled_lines(lines)


def word_rates(store: Store, tokenizer: PreTrainedTokenizerBase, words: Sequence[str]) -> pd.DataFrame:
    """How often words occur per 1,000 tokens, in general text and in traces (all kept tokens)."""
    kinds = [store.kept & (store.labels["kind"] == k) for k in range(len(KINDS))]
    ids = tokenizer.convert_tokens_to_ids(list(words))
    rates = [
        [1000 * float((store.tokens[kind] == i).mean()) if kind.any() else float("nan") for kind in kinds]
        for i in ids
    ]
    return pd.DataFrame(rates, index=pd.Index(words, name="word"), columns=list(KINDS))


def openers(store: Store, tokenizer: PreTrainedTokenizerBase, per_category: int = 2) -> list[str]:
    """The commonest first tokens of each category's sentences on the train split, without repeats, as the
    vocabulary spells them.
    """
    rows, found = store.rows("train"), []
    rows = rows[store.labels["starts"][rows] == 1]
    for category in CATEGORIES:
        tokens, counts = np.unique(
            store.tokens[rows[store.labels["label"][rows] == LABELS.index(category)]], return_counts=True
        )
        found += tokenizer.convert_ids_to_tokens(
            tokens[np.argsort(-counts, kind="stable")][:per_category].tolist()
        )
    return list(dict.fromkeys(found))


def norms_by_position(store: Store, longest: int = 120, fewest: int = 20) -> pd.DataFrame:
    """Quantiles of the norm at each position: columns position, model, quantile ("10%", "median", "90%"),
    norm, n.

    All tokens count, dropped ones too: the point is to see why they are dropped. Positions with fewer than
    ``fewest`` tokens are left out.
    """
    order = np.argsort(store.positions, kind="stable")
    ends = np.searchsorted(store.positions[order], np.arange(longest + 1))
    rows = []
    for position in range(longest):
        here = order[ends[position] : ends[position + 1]]
        if len(here) >= fewest:
            for model in store.models:
                for name, value in zip(
                    ("10%", "median", "90%"), np.quantile(store.norms[model][here], (0.1, 0.5, 0.9))
                ):
                    rows.append(
                        {
                            "position": position,
                            "model": model,
                            "quantile": name,
                            "norm": float(value),
                            "n": len(here),
                        }
                    )
    return pd.DataFrame(rows, columns=["position", "model", "quantile", "norm", "n"])


def norms_figure(norms: pd.DataFrame) -> go.Figure:
    """The table of ``norms_by_position`` as a line for the median and a band from 10% to 90%, per model."""
    fig = go.Figure()
    fig.update_xaxes(title_text="position in the text").update_yaxes(
        title_text="norm of the residual stream (log scale)", type="log"
    )
    tables = {
        model: part.pivot(index="position", columns="quantile", values="norm")
        for model, part in norms.groupby("model", sort=False)
    }
    for model, wide in tables.items():
        around = dict(x=[*wide.index, *wide.index[::-1]], y=[*wide["90%"], *wide["10%"][::-1]])
        band = dict(
            fill="toself",
            fillcolor=COLOURS.get(model, COLOURS["null"]),
            opacity=0.2,
            line_width=0,
            mode="lines",
            hoverinfo="skip",
        )
        fig.add_scatter(**around, **band, name=f"{model}, 10% to 90%")
    for model, wide in tables.items():  # lines after bands, so that no band covers them
        colour = COLOURS.get(model, COLOURS["null"])
        fig.add_scatter(
            x=wide.index, y=wide["median"], mode="lines", line_color=colour, name=f"{model}, median"
        )
        diamond = dict(color=colour, size=11, symbol="diamond")
        fig.add_scatter(
            x=wide.index[:1],
            y=wide["median"][:1],
            mode="markers",
            marker=diamond,
            name=f"{model}, first position",
        )
    return fig


def norm_histogram(store: Store, bins: int = 60) -> pd.DataFrame:
    """Histogram of kept tokens' norms over a common logarithmic grid: columns model, norm (middle of the
    bin), share.
    """
    low = min(store.norms[m][store.kept].min() for m in store.models)
    high = max(store.norms[m][store.kept].max() for m in store.models)
    edges = np.geomspace(max(low, 1e-6), high * 1.001, bins + 1)
    frames = []
    for m in store.models:
        counts, _ = np.histogram(store.norms[m][store.kept], edges)
        frames.append(
            pd.DataFrame(
                {"model": m, "norm": np.sqrt(edges[:-1] * edges[1:]), "share": counts / max(counts.sum(), 1)}
            )
        )
    return pd.concat(frames, ignore_index=True)


def similarity(store: Store, by: str = "label", split: str = "report", seed: int = 0) -> pd.DataFrame:
    """How alike the first two models' activations of the same token are, by group: a row per value of the
    label array ``by``.

    Activations are taken about each model's mean over the group, so that what is compared is what tells the
    tokens of a group apart: at the end of sentences nearly all of the vector says "full stop", in both
    models. Columns: group, n, cosine with its 95% interval (low, high; bootstrap over documents), and
    ``other_token``, the cosine between the first model at a token and the second model at another token of
    the group. UserError for unlike widths.
    """
    first, second = store.models[:2]
    if store.widths[first] != store.widths[second]:
        raise UserError(
            f"{first} has width {store.widths[first]} and {second} has {store.widths[second]}: cosines need"
            " one width"
        )
    rows = store.rows(split)
    values = store.labels[by][rows]
    rng = np.random.default_rng(seed)
    names = LABELS if by in ("label", "next_label") else KINDS if by == "kind" else (f"not {by}", by)
    found = []
    for value in np.unique(values[values >= 0]):
        group = rows[values == value]
        if len(group) < 3:
            continue
        a, b = (acts - acts.mean(0) for acts in store.activations(group)[:2])
        same = torch.cosine_similarity(a, b, dim=1).numpy()
        mixed = rng.permutation(len(group))  # a rotation of a random order: no token meets itself
        other = torch.cosine_similarity(a[mixed], b[np.roll(mixed, 1)], dim=1).mean().item()
        low, high = bootstrap(same, groups=store.documents[group], seed=seed)
        found.append(
            {
                "group": names[value],
                "n": len(group),
                "cosine": float(same.mean()),
                "low": low,
                "high": high,
                "other_token": other,
            }
        )
    return pd.DataFrame(found, columns=["group", "n", "cosine", "low", "high", "other_token"])


def similarity_figure(table: pd.DataFrame, title: str, axis: str = "") -> go.Figure:
    """A table of ``similarity``: a point with its interval per group, and a grey cross for another token of
    the group.
    """
    grey = {"general": "#444444", "other": "#777777"}
    fig = go.Figure(layout_title_text=title)
    for row in table.itertuples():
        error = dict(type="data", array=[row.high - row.cosine], arrayminus=[row.cosine - row.low])
        marker = dict(color=COLOURS.get(row.group, grey.get(row.group, COLOURS["distilled"])), size=10)
        fig.add_scatter(
            x=[row.cosine],
            y=[row.group],
            error_x=error,
            marker=marker,
            mode="markers",
            name=row.group,
            showlegend=False,
        )
    cross = dict(color=COLOURS["null"], symbol="x", size=10)
    fig.add_scatter(x=table.other_token, y=table.group, mode="markers", marker=cross, name="another token")
    fig.update_yaxes(title_text=axis, autorange="reversed").update_xaxes(
        title_text="mean cosine about the group's mean (95% interval)"
    )
    return fig


def drift(
    pair: Pair, store: Store, names: Sequence[str], against: str = "base", documents: int = 200, seed: int = 0
) -> pd.DataFrame:
    """How far checkpoints of the pair have moved from ``against``: mean centred cosine at the same tokens, by
    kind of text.

    Reads ``documents`` random documents of the report split anew, since only the pair's own two models are in
    the store. Columns: model, kind, n, cosine, low, high (bootstrap over documents). Position 0 is left out.
    """
    chosen = np.unique(store.documents[store.rows("report")])
    chosen = np.sort(np.random.default_rng(seed).permutation(chosen)[:documents])
    rows = np.flatnonzero(np.isin(store.documents, chosen))
    bounds = np.flatnonzero(np.diff(store.documents[rows], prepend=-1))
    token_lists = [part.tolist() for part in np.split(store.tokens[rows], bounds[1:])]
    tokenizer, keep = pair.tokenizer(), store.kept[rows]

    def read(name: str) -> torch.Tensor:
        acts = capture(
            pair.load(name), tokenizer, token_lists, store.layers.get(name, store.layers[store.models[0]])
        )[keep]
        return acts - acts.mean(0)

    reference, kinds, ids = read(against), store.labels["kind"][rows][keep], store.documents[rows][keep]
    found = []
    for name in names:
        same = torch.cosine_similarity(reference, read(name), dim=1).numpy()
        for k, kind in enumerate(KINDS):
            values = same[kinds == k]
            if len(values):
                low, high = bootstrap(values, groups=ids[kinds == k], seed=seed)
                found.append(
                    {
                        "model": name,
                        "kind": kind,
                        "n": len(values),
                        "cosine": float(values.mean()),
                        "low": low,
                        "high": high,
                    }
                )
    return pd.DataFrame(found, columns=["model", "kind", "n", "cosine", "low", "high"])
