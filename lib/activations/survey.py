"""A first look at a store, before anything is trained on it: contents, norms, how alike the models are.

Two models' residual streams can be compared entry by entry only if they share a width and an origin, as a
model and its fine-tuned copy do. Cosines are taken about each model's own mean, because a large common mean
makes any two activations look alike."""

import time
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import plotly.express as px
import plotly.graph_objects as go
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..figures import COLOURS, express_bars, labelled_lines
from ..labels import CATEGORIES, KINDS, LABELS, SPLITS
from ..models.pairs import GENERATED, Pair, decoder_layers
from ..models.reader import capture
from ..runs import passing
from ..settings import UserError
from ..stats import bootstrap, wilson
from ..text.puzzles import PARAPHRASES
from .store import Store

LARGEST_GROUP = 65_536  # tokens whose activations are compared at a time; of a larger group, random documents
GREYS = {"general": "#999999", "other": "#CCCCCC"}  # of tokens without a category
KIND_COLOURS = {"general": "#777777", "trace": COLOURS["distilled"]}


def describe_models(store: Store, models: Mapping[str, PreTrainedModel]) -> pd.DataFrame:
    """A column per model: architecture, size, the layer that is read."""
    columns = {}
    for name, model in models.items():
        columns[name] = {
            "architecture": type(model).__name__,
            "parameters": f"{model.num_parameters():,}",
            "decoder layers": len(decoder_layers(model)),
            "layer that is read": store.layers[name],
            "width of the residual stream": store.widths[name],
            "token ids": model.config.get_text_config().vocab_size,
        }
    return pd.DataFrame(columns)


def describe_store(store: Store) -> pd.DataFrame:
    """What a store hands out: name, shape, meaning."""
    n, widths = f"[{len(store):,}]", ", ".join(f"{m} d = {w}" for m, w in store.widths.items())
    splits = ", ".join(f"{s}: {n:,}" for s, n in store.manifest["counts"]["kept_by_split"].items())
    rows = [
        ("store.activations(rows)", f"one [n, d] per model: {widths}", "residual stream, raw"),
        ("store.tokens, .documents, .positions", n, "token id, number of its text, place in it"),
        ("store.labels[...]", f"{n} each: {', '.join(store.labels)}", "what its sentence does"),
        ("store.kept", f"{n}, {int(store.kept.sum()):,} of them True", "False where a mask drops the token"),
        ("store.rows('train')", splits, "kept tokens by split"),
    ]
    return pd.DataFrame(rows, columns=["what", "shape", "meaning"])


def contents(store: Store) -> pd.DataFrame:
    """Kept tokens of every split (columns) by the label of their sentence (rows), with its share of them."""
    labels, splits = store.labels["label"][store.kept], store.split[store.kept]
    names = [*LABELS, *(["(no label)"] if (labels < 0).any() else [])]  # the last has the index -1
    counts = np.zeros((len(names), len(SPLITS)), int)
    np.add.at(counts, (labels, splits), 1)
    frame = pd.DataFrame(counts, pd.Index(names, name="label"), list(SPLITS))
    return frame.assign(share=frame.sum(axis=1) / int(store.kept.sum()))


def contents_figure(shares: pd.DataFrame) -> go.Figure:
    """The table of ``contents`` as a bar per label."""
    title, labels = "What the tokens of the store belong to", {"share": "share of kept tokens", "label": ""}
    style = dict(color="label", color_discrete_map=COLOURS | GREYS, title=title, labels=labels)
    fig = px.bar(shares.reset_index(), x="share", y="label", **style)
    return fig.update_layout(showlegend=False, xaxis_tickformat=".0%")


def dropped(store: Store) -> tuple[float, tuple[float, float], pd.DataFrame]:
    """Share of tokens that the masks drop, its 95% interval, and a table of positions by reason."""
    counts = store.manifest["counts"]
    tokens, n = counts["tokens"], counts["tokens"] - counts["kept"]
    table = pd.Series(counts["dropped"], name="positions").rename_axis("reason").reset_index()
    return n / tokens, wilson(n, tokens), table.assign(**{"share of tokens": table.positions / tokens})


def labelled_text(document: int, store: Store, tokenizer: PreTrainedTokenizerBase):
    """One document as HTML, a line per sentence, coloured by category; wrong steps are underlined."""
    rows = np.flatnonzero(store.documents == document)
    words = np.array(tokenizer.convert_ids_to_tokens(store.tokens[rows].tolist()), object)
    label, ends, wrong = (store.labels[array][rows] for array in ("label", "ends", "error"))
    cuts = np.flatnonzero((ends == 1) | ((label < 0) & (words == tokenizer.bos_token))) + 1
    sentences = [part for part in np.split(np.arange(len(rows)), cuts) if len(part)]
    names = (*LABELS, "(no label)")  # the last has the index -1
    return labelled_lines([(names[label[part[-1]]], words[part], wrong[part[-1]] == 1) for part in sentences])


def example_trace(store: Store) -> int:
    """Number of a document of the report split: the first trace with a wrong step, if there is one."""
    rows = store.rows("report")
    traces = np.unique(store.documents[rows[store.labels["kind"][rows] == 1]])
    wrong = np.intersect1d(store.documents[store.labels["error"] == 1], traces)
    return int(np.concatenate([wrong, traces, store.documents[rows]])[0])


def marker_words(store: Store, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """First words of the four categories' sentences: the teacher's in generated text, else ``openers``."""
    if store.manifest["corpus"]["source"] not in GENERATED:
        return openers(store, tokenizer)
    return list(dict.fromkeys(PARAPHRASES[c][i].split()[0] for c in CATEGORIES for i in range(2)))


def word_rates(store: Store, tokenizer: PreTrainedTokenizerBase, words: Sequence[str]) -> pd.DataFrame:
    """How often words occur per 1,000 tokens, in general text and in traces (all kept tokens)."""
    kinds = {k: store.tokens[store.kept & (store.labels["kind"] == i)] for i, k in enumerate(KINDS)}
    ids = dict(zip(words, tokenizer.convert_tokens_to_ids(list(words))))
    rate = lambda tokens, i: 1000 * float((tokens == i).mean()) if len(tokens) else np.nan
    rates = {kind: {word: rate(t, i) for word, i in ids.items()} for kind, t in kinds.items()}
    return pd.DataFrame(rates).rename_axis("word")


def openers(store: Store, tokenizer: PreTrainedTokenizerBase, per_category: int = 2) -> list[str]:
    """The commonest first tokens of each category's sentences on the train split, without repeats, as the
    vocabulary spells them."""
    rows, words = store.rows("train"), []
    rows = rows[store.labels["starts"][rows] == 1]
    for category in CATEGORIES:
        sentences = rows[store.labels["label"][rows] == LABELS.index(category)]
        tokens, counts = np.unique(store.tokens[sentences], return_counts=True)
        commonest = tokens[np.argsort(-counts, kind="stable")][:per_category]
        words += tokenizer.convert_ids_to_tokens(commonest.tolist())
    return list(dict.fromkeys(words))


def check_labels(store: Store, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Words with which the reflections of generated text begin. AssertionError if labels have slipped against
    tokens: a wrong step without a reflection after it, or a reflection that begins with another word."""
    reflection, labels = LABELS.index("reflection"), store.labels
    wrong = (labels["error"] == 1) & (labels["ends"] == 1)
    assert (labels["next_label"][wrong] == reflection).all(), "a wrong step without a reflection after it"
    starts = (labels["starts"] == 1) & (labels["label"] == reflection)
    words = {tokenizer.decode([token]).strip() for token in np.unique(store.tokens[starts])}
    known = {paraphrase.split()[0] for paraphrase in PARAPHRASES["reflection"]}
    assert words <= known, f"sentences labelled reflection start with {words}"
    return sorted(words)


def words_figure(rates: pd.DataFrame) -> go.Figure:
    """The table of ``word_rates`` as two bars per word."""
    frame = (
        rates.rename(lambda word: word.replace("Ġ", "␣"))
        .reset_index()
        .melt("word", var_name="text", value_name="rate")
    )
    labels = {"word": "first word of a trace's sentences", "rate": "occurrences per 1,000 tokens", "text": ""}
    colours = KIND_COLOURS | {"general": GREYS["general"]}
    style = dict(color="text", color_discrete_map=colours, barmode="group", labels=labels)
    return px.bar(frame, x="word", y="rate", title="How often marker words occur, by kind of text", **style)


def norms_by_position(store: Store, longest: int = 120, fewest: int = 20) -> pd.DataFrame:
    """Quantiles of the norm at each position: columns position, model, quantile ("10%", "median", "90%"),
    norm, n.

    All tokens count, dropped ones too: the point is to see why they are dropped. Positions with fewer than
    ``fewest`` tokens are left out."""
    frame, rows = pd.DataFrame({"position": store.positions, **store.norms}), []
    for position, part in frame[frame.position < longest].groupby("position"):
        for model in store.models if len(part) >= fewest else ():
            values = np.quantile(part[model].to_numpy(), (0.1, 0.5, 0.9))
            for name, value in zip(("10%", "median", "90%"), values):
                rows.append((position, model, name, float(value), len(part)))
    return pd.DataFrame(rows, columns=["position", "model", "quantile", "norm", "n"])


def norms_figure(norms: pd.DataFrame) -> go.Figure:
    """The table of ``norms_by_position`` as a line for the median and a band from 10% to 90%, per model."""
    fig = go.Figure(layout_title_text="Norm of the residual stream at the layer that is read, by position")
    fig.update_xaxes(title_text="position in the text")
    fig.update_yaxes(title_text="norm of the residual stream (log scale)", type="log")
    wide = norms.pivot(index="position", columns=["model", "quantile"], values="norm")
    tables = {model: wide[model].dropna() for model in norms.model.unique()}
    colours = {model: COLOURS.get(model, COLOURS["null"]) for model in tables}
    for model, wide in tables.items():
        band = dict(fill="toself", fillcolor=colours[model], opacity=0.2, line_width=0, hoverinfo="skip")
        x, y = [*wide.index, *wide.index[::-1]], [*wide["90%"], *wide["10%"][::-1]]
        fig.add_scatter(x=x, y=y, mode="lines", name=f"{model}, 10% to 90%", **band)
    for model, wide in tables.items():  # lines after bands, so that no band covers them
        x, y, marker = wide.index, wide["median"], dict(color=colours[model], size=11, symbol="diamond")
        fig.add_scatter(x=x, y=y, mode="lines", line_color=colours[model], name=f"{model}, median")
        fig.add_scatter(x=x[:1], y=y[:1], mode="markers", marker=marker, name=f"{model}, first position")
    return fig


def sink_ratio(store: Store, model: str) -> float:
    """Median norm at position 0 over the median norm elsewhere, of all tokens."""
    norms, first = store.norms[model], store.positions == 0
    return float(np.median(norms[first]) / np.median(norms[~first]))


def norm_histogram(store: Store, bins: int = 60) -> pd.DataFrame:
    """Histogram of kept tokens' norms over one logarithmic grid: model, norm (middle of the bin), share."""
    low = min(store.norms[m][store.kept].min() for m in store.models)
    high = max(store.norms[m][store.kept].max() for m in store.models)
    edges = np.geomspace(max(low, 1e-6), high * 1.001, bins + 1)
    middle, frames = np.sqrt(edges[:-1] * edges[1:]), []
    for m in store.models:
        counts, _ = np.histogram(store.norms[m][store.kept], edges)
        frames.append(pd.DataFrame(dict(model=m, norm=middle, share=counts / max(counts.sum(), 1))))
    return pd.concat(frames, ignore_index=True)


def histogram_figure(histogram: pd.DataFrame, mean_norms: Mapping[str, float]) -> go.Figure:
    """The table of ``norm_histogram`` as a line per model, the means dashed."""
    title, style = "Norms of kept tokens, model by model", dict(color_discrete_map=COLOURS, line_shape="hvh")
    labels = {"norm": "norm of the residual stream (log scale)", "share": "share of tokens"}
    fig = px.line(
        histogram, x="norm", y="share", color="model", log_x=True, title=title, labels=labels, **style
    )
    for row, (model, norm) in enumerate(mean_norms.items()):
        fig.add_vline(x=norm, line_dash="dash", line_color=COLOURS.get(model))
        # an annotation of a log axis stands at the logarithm, unlike a line
        place = dict(x=np.log10(norm), y=1 - 0.06 * row, yref="paper", yanchor="bottom", showarrow=False)
        fig.add_annotation(text=f"mean, {model}", font_color=COLOURS.get(model), **place)
    ends = histogram.norm[histogram.share > 0].agg(["min", "max"])
    return fig.update_xaxes(range=np.log10(ends) + [-0.05, 0.05])


def comparable(store: Store) -> bool:
    """Whether the store has two models of one width, whose axes may be compared entry by entry."""
    return len(store.models) == 2 and len(set(store.widths.values())) == 1


def similarity(store: Store, array: str = "label", split: str = "report", seed: int = 0) -> pd.DataFrame:
    """How alike the first two models' activations of the same token are: a row per value of the label array.

    Activations are taken about each model's mean over the group: at the end of sentences nearly all of the
    vector says "full stop", in both models. Columns: group, n, cosine with its 95% interval (low, high;
    bootstrap over documents), and ``other_token``, the cosine between the first model at a token and the
    second model at another token of the group, the floor that "alike" has to exceed. Of a larger group,
    ``LARGEST_GROUP`` tokens are taken, in random documents. UserError for unlike widths."""
    first, second = store.models[:2]
    if store.widths[first] != store.widths[second]:
        raise UserError(
            f"{first} has width {store.widths[first]} and {second} has {store.widths[second]}: cosines need"
            " one width"
        )
    rows, rng, table = store.rows(split), np.random.default_rng(seed), []
    values = store.labels[array][rows]
    names = {"label": LABELS, "next_label": LABELS, "kind": KINDS}.get(array, (f"not {array}", array))
    for value in np.unique(values[values >= 0]):
        group = _some_documents(store, rows[values == value], [seed, int(value)])
        if len(group) < 3:
            continue
        a, b = (acts - acts.mean(0) for acts in store.activations(group)[:2])
        same = torch.cosine_similarity(a, b, dim=1).numpy()
        mixed = rng.permutation(len(group))  # a rotation of a random order: no token meets itself
        other = torch.cosine_similarity(a[mixed], b[np.roll(mixed, 1)], dim=1).mean().item()
        low, high = bootstrap(same, groups=store.documents[group], seed=seed)
        table.append((names[value], len(group), float(same.mean()), low, high, other))
    return pd.DataFrame(table, columns=["group", "n", "cosine", "low", "high", "other_token"])


def _some_documents(store: Store, rows: np.ndarray, seed: list[int]) -> np.ndarray:
    """About ``LARGEST_GROUP`` of ``rows``, of random documents; all, if there are no more."""
    if len(rows) <= LARGEST_GROUP:
        return rows
    documents, number, counts = np.unique(store.documents[rows], return_inverse=True, return_counts=True)
    order = np.random.default_rng(seed).permutation(len(documents))
    chosen = order[np.cumsum(counts[order]) <= LARGEST_GROUP]
    return rows[np.isin(number, chosen)]


def similarity_figure(table: pd.DataFrame, title: str, axis: str = "") -> go.Figure:
    """A table of ``similarity``: a point with its interval per group, and a grey cross for another token of
    the group."""
    greys = {"general": "#444444", "other": "#777777"}
    fig = go.Figure(layout_title_text=title)
    for row in table.itertuples():
        error = dict(type="data", array=[row.high - row.cosine], arrayminus=[row.cosine - row.low])
        marker = dict(color=COLOURS.get(row.group, greys.get(row.group, COLOURS["distilled"])), size=10)
        point = dict(marker=marker, mode="markers", name="the same token", showlegend=row.Index == 0)
        fig.add_scatter(x=[row.cosine], y=[row.group], error_x=error, **point)
    cross = dict(color=COLOURS["null"], symbol="x", size=10)
    fig.add_scatter(x=table.other_token, y=table.group, mode="markers", marker=cross, name="another token")
    fig.update_xaxes(title_text="mean cosine about the group's mean (95% interval)")
    return fig.update_yaxes(title_text=axis, autorange="reversed")


def random_documents(store: Store, n: int, seed: int = 0) -> tuple[np.ndarray, list[list[int]]]:
    """Rows and token ids of at most ``n`` random documents of the report split."""
    chosen = np.random.default_rng(seed).permutation(np.unique(store.documents[store.rows("report")]))
    rows = np.flatnonzero(np.isin(store.documents, chosen[:n]))
    bounds = np.flatnonzero(np.diff(store.documents[rows]))
    return rows, [part.tolist() for part in np.split(store.tokens[rows], bounds + 1)]


def drift(
    pair: Pair, store: Store, names: Sequence[str], documents: int = 200, seed: int = 0
) -> pd.DataFrame:
    """How far checkpoints of the pair have moved from the base: mean centred cosine at the same tokens, by
    kind of text.

    Runs the models on ``documents`` random documents of the report split: only the pair's own two are in the
    store. Columns: model, kind, n, cosine, low, high (bootstrap over documents). Position 0 is left out."""
    rows, token_lists = random_documents(store, documents, seed)
    tokenizer, keep = pair.tokenizer(), store.kept[rows]

    def centred(name: str) -> torch.Tensor:
        layer = store.layers.get(name, store.layers[store.models[0]])
        acts = capture(pair.load(name), tokenizer, token_lists, layer)[keep]
        return acts - acts.mean(0)

    start, table = centred("base"), []
    tokens = pd.DataFrame({"kind": store.labels["kind"][rows], "document": store.documents[rows]})[keep]
    for name in names:
        tokens["cosine"] = torch.cosine_similarity(start, centred(name), dim=1).numpy()
        for kind, part in tokens.groupby("kind"):
            values = part.cosine.to_numpy()
            low, high = bootstrap(values, groups=part.document, seed=seed)
            table.append((name, KINDS[kind], len(values), float(values.mean()), low, high))
    return pd.DataFrame(table, columns=["model", "kind", "n", "cosine", "low", "high"])


def drift_figure(moved: pd.DataFrame) -> go.Figure:
    """The table of ``drift`` as a point with its interval per checkpoint and kind of text."""
    axis = "mean cosine with the base at the same token (95% interval)"
    style = dict(color="kind", color_discrete_map=KIND_COLOURS)
    style |= dict(labels={"cosine": axis, "model": "", "kind": "text"})
    style |= express_bars(moved, "cosine", "low", "high", axis="x")
    title = "How far each checkpoint has moved from the base"
    return px.scatter(moved, x="cosine", y="model", title=title, **style).update_traces(marker_size=10)


def read_epoch(store: Store, split: str, seed: int, batch_size: int = 4096) -> tuple[np.ndarray, float]:
    """Read one epoch of a split in shuffled batches: rows in their order, and rows per second."""
    began = time.monotonic()
    order = np.concatenate([np.empty(0, np.int64), *(r for r, _ in store.reader(split, batch_size, seed))])
    speed = len(order) / max(time.monotonic() - began, 1e-9)
    passing(
        f"Harvested at {store.tokens_per_second:,.0f} tokens per second (each through {len(store.models)}"
        f" models), read back at {speed:,.0f}."
    )
    return order, speed
