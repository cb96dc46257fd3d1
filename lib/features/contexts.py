"""Features to look at: the texts in which they are most active, a profile of what they fall on, and a map of
them all.

``lib.features.table`` computes; this module shows. Texts are shaded by activation, the strongest token framed, so
that a reader can judge a label instead of believing it.
"""

from __future__ import annotations

import html
from collections.abc import Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from transformers import PreTrainedTokenizerBase

from ..activations.store import Store
from ..crosscoder.model import CrossCoder
from ..figures import COLOURS, shaded_tokens
from ..labels import LABELS

COLUMNS = ["feature", "rank", "row", "document", "position", "activation", "label", "text"]
BEFORE, AFTER = 14, 6  # words shown on either side of the strongest token


def top_contexts(
    store: Store, coded, tokenizer: PreTrainedTokenizerBase, features: Sequence[int], n: int = 8
) -> pd.DataFrame:
    """The ``n`` strongest activations of each feature, one per document: columns ``COLUMNS``, sorted by
    feature and rank.

    ``row`` is the token's number in the store, ``label`` that of its sentence, ``text`` some words around it
    with the token in «». Of equal activations the earlier one counts. ``coded`` is a ``features.SplitCodes``.
    """
    columns, found = coded.codes.tocsc(), []
    for feature in features:
        span = slice(columns.indptr[feature], columns.indptr[feature + 1])
        index, values = columns.indices[span], columns.data[span]
        order = np.lexsort((index, -values))
        strongest = order[
            np.sort(np.unique(store.documents[coded.rows[index[order]]], return_index=True)[1])[:n]
        ]
        for rank, i in enumerate(strongest, 1):
            row = int(coded.rows[index[i]])
            label = int(store.labels["label"][row])
            found.append(
                (
                    int(feature),
                    rank,
                    row,
                    int(store.documents[row]),
                    int(store.positions[row]),
                    float(values[i]),
                    LABELS[label] if label >= 0 else "",
                    _text(store, tokenizer, row),
                )
            )
    return pd.DataFrame(found, columns=COLUMNS)


def window(store: Store, row: int, before: int = BEFORE, after: int = AFTER) -> np.ndarray:
    """Rows of the same document around ``row``, ``before`` to the left and ``after`` to the right at most."""
    rows = np.arange(max(row - before, 0), min(row + after + 1, len(store)))
    return rows[store.documents[rows] == store.documents[row]]


def _text(store: Store, tokenizer: PreTrainedTokenizerBase, row: int) -> str:
    rows = window(store, row)
    words = tokenizer.convert_ids_to_tokens(store.tokens[rows].tolist())
    return " ".join(f"«{w}»" if r == row else w for r, w in zip(rows, words))


def activations_at(coded, rows: np.ndarray, feature: int) -> np.ndarray:
    """Activation of one feature at rows of the store; 0 where a row is not among the coded ones (masked
    tokens).
    """
    place = np.minimum(np.searchsorted(coded.rows, rows), len(coded.rows) - 1)
    values = coded.codes[place][:, [feature]].toarray().ravel()
    return np.where(coded.rows[place] == rows, values, 0.0)


def contexts_html(
    store: Store,
    coded,
    tokenizer: PreTrainedTokenizerBase,
    contexts: pd.DataFrame,
    feature: int,
    before: int = BEFORE,
    after: int = AFTER,
):
    """The top contexts of a feature as HTML, one line each, tokens shaded on one scale; hover shows the
    activation.
    """
    from IPython.display import HTML

    mine = contexts[contexts["feature"] == feature].sort_values("rank")
    if mine.empty:
        return HTML(f"<p>Feature {feature} never fires on these tokens: it has no contexts.</p>")
    lines = []
    for context in mine.itertuples():
        rows = window(store, context.row, before, after)
        words = tokenizer.convert_ids_to_tokens(store.tokens[rows].tolist())
        shaded = shaded_tokens(words, activations_at(coded, rows, feature), maximum=mine["activation"].max())
        label = html.escape(context.label if isinstance(context.label, str) else "")
        note = (
            f'<span style="display:inline-block;width:12em;color:#555">{context.activation:.2f}'
            f" {label}</span>"
        )
        lines.append(
            "<div"
            f' style="display:flex;background:#fff;font-family:monospace;white-space:nowrap">{note}{shaded.data}</div>'
        )
    return HTML(f'<div style="overflow-x:auto">{"".join(lines)}</div>')


def headline(table: pd.DataFrame, feature: int) -> str:
    """A feature in one line: number, NRN, firing frequency, label."""
    row = table.set_index("feature").loc[feature]
    if not row["alive"]:
        return f"Feature {feature}: NRN {row['nrn']:.2f}, never fires here (dead)"
    label = row["label"] if isinstance(row["label"], str) and row["label"] else "no label"
    return f"Feature {feature}: NRN {row['nrn']:.2f}, fires on {row['frequency']:.2%} of tokens, {label}"


def profile(store: Store, coded, feature: int) -> pd.DataFrame:
    """Where a feature's activation falls: columns panel, label, activation and tokens (shares of all there is
    of either).

    Panel "in a sentence of" counts every token by its own sentence, "before a sentence of" only sentence ends
    in traces.
    """
    values = coded.codes[:, [feature]].toarray().ravel()
    labels = {name: store.labels[name][coded.rows] for name in ("label", "next_label", "kind")}
    masks = {
        "in a sentence of": labels["label"],
        "before a sentence of": np.where(labels["kind"] == 1, labels["next_label"], -1),
    }
    share = values / max(values.sum(), 1e-300)
    rows = [
        {
            "panel": panel,
            "label": name,
            "activation": float(share[found == i].sum()),
            "tokens": float((found == i).mean()),
        }
        for panel, found in masks.items()
        for i, name in enumerate(LABELS)
    ]
    return pd.DataFrame(rows)


def profile_figure(store: Store, coded, table: pd.DataFrame, feature: int) -> go.Figure:
    """``profile`` as bars; the title is the feature's headline."""
    from plotly.subplots import make_subplots

    shares = profile(store, coded, feature)
    fig = make_subplots(
        1, 2, subplot_titles=list(shares["panel"].unique()), shared_yaxes=True, horizontal_spacing=0.06
    )
    for column, (_, part) in enumerate(shares.groupby("panel", sort=False), 1):
        for name, colour in (("activation", COLOURS["distilled"]), ("tokens", COLOURS["null"])):
            bars = dict(
                x=part["label"],
                y=part[name],
                name=f"share of {name}",
                marker_color=colour,
                showlegend=column == 1,
            )
            fig.add_bar(**bars, row=1, col=column)
    fig.update_layout(
        title=headline(table, feature),
        barmode="group",
        height=380,
        margin_t=90,
        legend=dict(orientation="h", y=-0.35),
    )
    return fig.update_yaxes(rangemode="tozero", tickformat=".0%")


def map_of_features(
    crosscoder: CrossCoder, table: pd.DataFrame, n: int = 3000, seed: int = 0, neighbours: int = 15
) -> tuple:
    """UMAP of the alive features' decoder rows: (DataFrame of feature, x, y, nrn, label, top_token; a
    sentence on what was mapped).

    Each feature is its decoder row, at unit length, in the model where that row is longer, so that NRN, the
    colour, is not built into the map; where widths differ, the rows of all models joined. Of more than ``n``
    alive features the 100 with the highest and the 100 with the lowest NRN are all kept (a tenth of ``n``
    each, if that is less), and the others drawn at random.
    """
    alive = table[table["alive"]].sort_values("nrn")
    if len(alive) < 10:
        empty = pd.DataFrame(columns=["feature", "x", "y", "nrn", "label", "top_token"])
        return empty, f"Only {len(alive)} features are alive: too few for a map."
    if len(alive) > n:
        ends = min(100, n // 10)
        inner = alive.iloc[ends : len(alive) - ends].sample(n - 2 * ends, random_state=seed)
        alive = pd.concat([alive.head(ends), inner, alive.tail(ends)])
    alive = alive.sort_values("feature")
    rows, norms = [crosscoder.rows(name).numpy() for name in crosscoder.names], crosscoder.norms(2).numpy()
    if same := len(set(crosscoder.widths)) == 1:
        vectors = np.stack(rows)[norms.argmax(0), np.arange(crosscoder.n_features)]
    else:
        vectors = np.concatenate(rows, axis=1)
    vectors = vectors[alive["feature"]]
    vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    import umap  # here: its first import compiles for half a minute

    reducer = umap.UMAP(
        n_neighbors=min(neighbours, len(alive) - 1),
        metric="cosine",
        min_dist=0.1,
        n_jobs=1,
        random_state=seed,
    )
    place = reducer.fit_transform(vectors)
    frame = (
        alive[["feature", "nrn", "label", "top_token"]]
        .assign(x=place[:, 0], y=place[:, 1])
        .reset_index(drop=True)
    )
    what = "its row in the model where it is longer" if same else "its rows in all models, joined"
    return (
        frame,
        f"{len(frame):,} of {int(table['alive'].sum()):,} alive features; each is {what}, at unit length.",
    )
