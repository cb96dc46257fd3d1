"""Features to look at: the texts in which they are most active, a profile of what they fall on, and a map of
them all: so that a reader can judge a label instead of believing it."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots
from scipy import sparse
from transformers import PreTrainedTokenizerBase

from ..activations.store import Store
from ..crosscoder.codes import SplitCodes
from ..crosscoder.model import CrossCoder
from ..figures import COLOURS
from ..labels import LABELS

COLUMNS = ["feature", "rank", "row", "document", "position", "activation", "label", "text"]
BEFORE, AFTER = 14, 6  # words shown on either side of the strongest token


def top_contexts(
    store: Store, coded: SplitCodes, tokenizer: PreTrainedTokenizerBase, features: Sequence[int], n: int = 8
) -> pd.DataFrame:
    """The ``n`` strongest activations of each feature, one per document: columns ``COLUMNS``, sorted by
    feature and rank. ``row`` is the token's number in the store, ``label`` that of its sentence, ``text``
    some words around it with the token in «»."""
    columns, lines = coded.codes.tocsc(), []
    for feature in features:
        rows, values = firings(coded.rows, columns, feature)
        for rank, i in enumerate(strongest(rows, values, store.documents, n), 1):
            row = int(rows[i])
            label, text = int(store.labels["label"][row]), _text(store, tokenizer, row)
            place = int(feature), rank, row, int(store.documents[row]), int(store.positions[row])
            lines.append((*place, float(values[i]), LABELS[label] if label >= 0 else "", text))
    return pd.DataFrame(lines, columns=COLUMNS)


def firings(rows: np.ndarray, columns: sparse.csc_matrix, feature: int) -> tuple[np.ndarray, np.ndarray]:
    """(numbers in the store, activations) where a feature fires; ``columns`` [n, F]: codes at ``rows``."""
    span = slice(columns.indptr[feature], columns.indptr[feature + 1])
    return rows[columns.indices[span]], columns.data[span]


def strongest(tokens: np.ndarray, values: np.ndarray, documents: np.ndarray, n: int) -> np.ndarray:
    """Indices of the ``n`` largest of ``values`` [m] at ``tokens`` [m] of the store, one per document,
    largest first; of equal values the earlier token. ``documents``: of the whole store."""
    order = np.lexsort((tokens, -values))
    first = np.unique(documents[tokens[order]], return_index=True)[1]
    return order[np.sort(first)[:n]]


def by_strength(
    tokens: np.ndarray, values: np.ndarray, documents: np.ndarray, bins: int = 5, each: int = 1, seed: int = 0
) -> list[np.ndarray]:
    """Indices of ``values`` [m] > 0 at ``tokens`` [m] of the store: ``each`` random ones of ``bins`` equally
    many, the strongest first, one per document. The strongest alone show a feature at its best."""
    order, rng = np.lexsort((tokens, -values)), np.random.default_rng(seed)
    drawn = []
    for part in np.array_split(order, bins):
        part = rng.permutation(part)
        first = np.unique(documents[tokens[part]], return_index=True)[1]
        drawn.append(part[np.sort(first)[:each]])
    return drawn


def strengths(store: Store, coded: SplitCodes, feature: int, bins: int = 5) -> pd.DataFrame:
    """What a feature fires at, by strength: a row for each of ``bins`` equal parts of its firings, strongest
    first: highest and lowest activation, tokens, label (of the sentence that most are in) and its share."""
    rows, values = firings(coded.rows, coded.codes.tocsc(), feature)
    order, table = np.lexsort((rows, -values)), []
    names = np.array([*LABELS, "(no label)"])  # the last has the index -1
    for part in np.array_split(order, bins):
        if len(part):
            labels, counts = np.unique(names[store.labels["label"][rows[part]]], return_counts=True)
            most = (labels[counts.argmax()], counts.max() / len(part))
            table.append((values[part].max(), values[part].min(), len(part), *most))
    return pd.DataFrame(table, columns=["highest", "lowest", "tokens", "label", "share"])


def window(store: Store, row: int, before: int = BEFORE, after: int = AFTER) -> np.ndarray:
    """Rows of the same document around ``row``, ``before`` to the left and ``after`` to the right at most."""
    rows = np.arange(max(row - before, 0), min(row + after + 1, len(store)))
    return rows[store.documents[rows] == store.documents[row]]


def _text(store: Store, tokenizer: PreTrainedTokenizerBase, row: int) -> str:
    rows = window(store, row)
    words = tokenizer.convert_ids_to_tokens(store.tokens[rows].tolist())
    return " ".join(f"«{w}»" if r == row else w for r, w in zip(rows, words))


def activations_at(fires: np.ndarray, values: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Activation of a feature at rows of the store, from its ``firings``; 0 elsewhere."""
    activations = np.zeros(len(rows), np.float32)
    _, at, place = np.intersect1d(rows, fires, assume_unique=True, return_indices=True)
    activations[at] = values[place]
    return activations


def headline(table: pd.DataFrame, feature: int) -> str:
    """A feature in one line: number, NRN, firing frequency, label."""
    row = table.set_index("feature").loc[feature]
    if not row["alive"]:
        return f"Feature {feature}: NRN {row['nrn']:.2f}, never fires here (dead)"
    label = row["label"] if isinstance(row["label"], str) and row["label"] else "no label"
    return f"Feature {feature}: NRN {row['nrn']:.2f}, fires on {row['frequency']:.2%} of tokens, {label}"


def profile(store: Store, coded: SplitCodes, feature: int) -> pd.DataFrame:
    """Where a feature's activation falls: columns panel, label, activation and tokens (shares of all).

    Panel "in a sentence of" counts every token by its own sentence, "before a sentence of" only sentence ends
    in traces."""
    values = coded.codes[:, [feature]].toarray().ravel()
    share = values / max(values.sum(), 1e-300)
    label, following, kind = (store.labels[name][coded.rows] for name in ("label", "next_label", "kind"))
    panels = {"in a sentence of": label, "before a sentence of": np.where(kind == 1, following, -1)}
    rows = []
    for panel, labels in panels.items():
        for i, name in enumerate(LABELS):
            rows.append((panel, name, float(share[labels == i].sum()), float((labels == i).mean())))
    return pd.DataFrame(rows, columns=["panel", "label", "activation", "tokens"])


def profile_figure(store: Store, coded: SplitCodes, table: pd.DataFrame, feature: int) -> go.Figure:
    """``profile`` as bars; the title is the feature's headline."""
    shares = profile(store, coded, feature)
    titles = list(shares["panel"].unique())
    fig = make_subplots(1, 2, subplot_titles=titles, shared_xaxes="all", shared_yaxes=True)
    for column, (_, part) in enumerate(shares.groupby("panel", sort=False), 1):
        for name, colour in (("activation", COLOURS["distilled"]), ("tokens", COLOURS["null"])):
            look = dict(name=f"share of {name}", marker_color=colour, showlegend=column == 1)
            fig.add_bar(x=part[name], y=part["label"], orientation="h", **look, row=1, col=column)
    legend = dict(orientation="h", y=-0.15)
    title = headline(table, feature)
    fig.update_layout(title=title, barmode="group", height=380, margin_t=90, legend=legend)
    fig.update_yaxes(autorange="reversed")
    return fig.update_xaxes(rangemode="tozero", tickformat=".0%")


def map_of_features(
    crosscoder: CrossCoder, table: pd.DataFrame, n: int = 3000, seed: int = 0
) -> pd.DataFrame:
    """UMAP of the alive features' decoder rows: feature, x, y, nrn, label, top_token; empty where fewer than
    ten features are alive. Only neighbourhoods mean something: axes have no unit.

    Each feature is its decoder row, at unit length, in the model where that row is longer, so that NRN is not
    built into the map; where widths differ, the rows of all models joined. Of more than ``n`` alive features
    the 100 with the highest and the 100 with the lowest NRN are all there (a tenth of ``n`` each, if that is
    less), and the others drawn at random."""
    alive = table[table["alive"]].sort_values("nrn")
    if len(alive) < 10:
        return pd.DataFrame(columns=["feature", "nrn", "label", "top_token", "x", "y"])
    if len(alive) > n:
        ends = min(100, n // 10)
        inner = alive.iloc[ends : len(alive) - ends].sample(n - 2 * ends, random_state=seed)
        alive = pd.concat([alive.head(ends), inner, alive.tail(ends)])
    alive = alive.sort_values("feature")
    rows, norms = [crosscoder.rows(name).numpy() for name in crosscoder.names], crosscoder.norms(2).numpy()
    if len(set(crosscoder.widths)) == 1:
        vectors = np.stack(rows)[norms.argmax(0), np.arange(crosscoder.n_features)]
    else:
        vectors = np.concatenate(rows, axis=1)
    vectors = vectors[alive["feature"]]
    vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    import umap  # here: its first import compiles for half a minute

    options = dict(metric="cosine", min_dist=0.1, n_jobs=1, random_state=seed)
    places = umap.UMAP(n_neighbors=min(15, len(alive) - 1), **options).fit_transform(vectors)
    frame = alive[["feature", "nrn", "label", "top_token"]]
    return frame.assign(x=places[:, 0], y=places[:, 1]).reset_index(drop=True)
