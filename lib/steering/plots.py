"""The figures of notebooks 04 and 13. Each function takes tables and returns a plotly figure.

Single crosscoders are small points; lines and diamonds are their means, with intervals over crosscoders and
documents (or puzzles)."""

import html
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import plotly.express as px
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from ..distil.trials import labelled
from ..figures import COLOURS, error_bars, express_bars, plain_titles
from ..labels import CATEGORIES
from .ablation import REMOVED
from .report import LAYER_NAMES
from .search import REFERENCES

KINDS = {"features": "#222222", "matched": COLOURS["null"], "random": COLOURS["random"]}
WHO = {"features": "#222222", "gradient": "#7570B3", "mode": "#1B9E77", "random": COLOURS["random"]}
# lines where steering changes nothing
UNCHANGED = dict(line_dash="dot", line_width=1, line_color=COLOURS["random"], layer="below")
SMALL = {"size": 5, "opacity": 0.45}
SHAPES = ("circle", "square", "x", "triangle-up")  # of the groups of ``points``, in order
SETS = {"features": 0, "attributed": 1}  # sets of features of a category, in whole thoughts


def ablation(pooled: pd.DataFrame, singles: pd.DataFrame, value: str = "log_probability") -> go.Figure:
    """What the first token of a sentence loses without the frequent features, by k; a row of panels per
    model. ``pooled``: ``ablation.pool``; ``singles``: ``summarise`` of each crosscoder."""
    pooled, singles = (
        t[t["rule"] == "frequent"].sort_values("k").assign(k=lambda t: t["k"].map("top {:g}%".format))
        for t in (pooled, singles)
    )
    order = {"removed": list(REMOVED), "category": CATEGORIES, "k": list(pooled["k"].unique())}
    fig = points(
        singles, pooled, "k", value, "removed", KINDS, facet_col="category", facet_row="model", width=1100,
        height=560, category_orders=order,
        title="What the first token of a sentence loses without frequent features",
    )  # fmt: skip
    fig.update_layout(boxmode="group", scattermode="group", boxgap=0.3, scattergap=0.3)
    fig.update_xaxes(type="category").for_each_trace(lambda t: t.update(offsetgroup=t.name))
    fig.data[-1].offsetgroup = fig.data[0].name  # of the legend alone: no place of its own
    return fig.update_yaxes(title_text=f"change of its {value.replace('_', '-')}", col=1)


def points(
    singles: pd.DataFrame, pooled: pd.DataFrame, x: str, y: str, colour: str, colours: Mapping, **how
) -> go.Figure:
    """Small points of single crosscoders beside the mean (a diamond) with its interval, ``y``_low to
    ``y``_high. ``how``: of plotly.express."""
    panels = [how[facet] for facet in ("facet_row", "facet_col") if facet in how]
    if panels:  # also those in which no single crosscoder has a point
        alone = ~pd.MultiIndex.from_frame(pooled[panels]).isin(pd.MultiIndex.from_frame(singles[panels]))
        singles = pd.concat([singles, pooled[alone].assign(**{y: np.nan})])
    fig = px.strip(singles, x=x, y=y, color=colour, color_discrete_map=dict(colours), **how)
    fig.update_traces(marker=SMALL, jitter=0.6)
    fig.update_layout(boxmode="overlay", legend_itemsizing="constant")
    shapes = dict(zip(colours, SHAPES))
    fig.for_each_trace(lambda t: t.update(marker_symbol=shapes.get(t.name, "circle")))
    means = px.scatter(
        pooled, x=x, y=y, color=colour, color_discrete_map=dict(colours), **how, **express_bars(pooled, y)
    )
    means.update_traces(marker={"symbol": "diamond", "size": 9})
    known = set(singles[colour])
    means.for_each_trace(lambda t: t.update(showlegend=bool(t.showlegend) and t.name not in known))
    fig.add_traces(means.data)
    mean = dict(symbol="diamond", size=9, color="#222222")
    fig.add_scatter(x=[None], y=[None], mode="markers", name="mean, 95%", marker=mean)
    return plain_titles(fig.update_xaxes(title_text=""))


def ablation_per_norm(pooled: pd.DataFrame, singles: pd.DataFrame) -> go.Figure:
    """The effect per unit of removed norm, of ``report.at_largest_k``; a row of panels per model."""
    fig = points(
        singles, pooled, "removed", "per_norm", "removed", KINDS, facet_col="category", facet_row="model",
        category_orders={"category": CATEGORIES, "removed": list(REMOVED)}, width=1000, height=560,
        title=f"Per unit of removed norm (top {pooled['k'].iloc[0]:g}%)",
    )  # fmt: skip
    return fig.update_yaxes(title_text="logit per mean norm", col=1)


def sets(pooled: pd.DataFrame, singles: pd.DataFrame, value: str = "log_probability") -> go.Figure:
    """What the sets that mean something cost, beside their controls; a panel per category."""
    pooled, singles = (t[t["rule"] != "frequent"] for t in (pooled, singles))
    order = {"category": CATEGORIES, "rule": sorted(pooled["rule"].unique()), "removed": list(REMOVED)}
    fig = points(
        singles, pooled, "removed", value, "removed", KINDS, facet_col="category", facet_row="rule",
        category_orders=order, width=1100, height=560,
        title="Without a set of features, equally frequent others, or random vectors",
    )  # fmt: skip
    return fig.update_yaxes(title_text=f"change of the {value.replace('_', '-')}", col=1)


def search(table: pd.DataFrame) -> go.Figure:
    """Every condition that was tried on the puzzles for choosing (``search.Found.table``): length of thought
    against accuracy; a panel per layer."""
    who = table["crosscoder"].map(REFERENCES).fillna("feature")
    fig = px.scatter(
        table.assign(direction_of=who, layer=table["layer"].replace(LAYER_NAMES)), x="length_ratio",
        y="accuracy_change", color="label", symbol="direction_of", facet_col="layer", opacity=0.6,
        color_discrete_map=COLOURS, width=1000,
        symbol_map={"gradient": "x", "mode": "diamond", "feature": "circle"},
        hover_data=["direction", "strength", "place"],
        title="The search on validation puzzles: each point is one direction at one strength",
        labels={
            "length_ratio": "length of thought (1 = unsteered)", "accuracy_change": "change of accuracy",
            "label": "raises", "direction_of": "direction of",
        },
    )  # fmt: skip
    return plain_titles(fig.add_vline(1, **UNCHANGED).add_hline(0, **UNCHANGED))


def steering(curves: pd.DataFrame, metrics: Mapping, names: Mapping) -> tuple[go.Figure, pd.DataFrame]:
    """(figure, its data): length of thought and accuracy on the puzzles for reporting, a column of panels per
    aim {metric: name}; features of all crosscoders, the references' directions, random directions.

    ``curves``: table "dose_response"; ``metrics``: of ``report.record_steering``."""
    rows, single = [], []
    measures = {"length_ratio": "length ratio", "accuracy_change": "change of accuracy"}
    unchanged = {"length ratio": 1, "change of accuracy": 0}
    for aim, label in names.items():
        prefixes = {"features": aim} | {name: f"{name}_{aim}" for name in REFERENCES.values()}
        prefixes["random"] = "random" if aim == "overthink" else f"random_{aim}"
        for layer in curves["layer"].unique():
            for value, measure in measures.items():
                for who, prefix in prefixes.items():
                    if (name := f"{prefix}_{value}_{layer}") not in metrics:  # no thought is careful
                        continue
                    metric = metrics[name]
                    what = f"{LAYER_NAMES[layer].removeprefix('the layer ')}: {who}"
                    key = {"aim": label, "measure": measure, "what": what, "who": who}
                    rows.append(
                        {
                            **key,
                            "value": metric["value"],
                            **dict(zip(("value_low", "value_high"), metric["ci"])),
                        }
                    )
                    single += [{**key, "value": own[0]} for own in metric.get("seeds", ())]
    data = pd.DataFrame(rows)
    fig = points(
        pd.DataFrame(single, columns=[*key, "value"]), data, "what", "value", "who", WHO, facet_col="aim",
        facet_row="measure", category_orders={"what": list(dict.fromkeys(data["what"]))}, width=1000,
        height=640, title="Steered on test puzzles, crosscoder by crosscoder",
    )  # fmt: skip
    # one scale for each measure that there is; plotly counts rows from below
    for row, measure in enumerate(reversed(data["measure"].unique()), 1):
        axis = fig.get_subplot(row, 1).yaxis.plotly_name.replace("axis", "")
        fig.update_yaxes(matches=axis, row=row).add_hline(unchanged[measure], row=row, **UNCHANGED)
    return fig.update_yaxes(title_text="").update_xaxes(tickangle=35), data


def needed_and_redundant(table: pd.DataFrame) -> go.Figure:
    """``report.needed_and_redundant``: tokens of needed and of redundant sentences, as ratios."""
    fig = px.bar(
        table, x="aim", y="ratio", color="tokens", barmode="group",
        color_discrete_map={"needed": COLOURS["random"], "redundant": "#DDDDDD"},
        title="Tokens of needed and of redundant sentences, against the unsteered model",
        labels={"aim": "", "ratio": "ratio (1 = unsteered)"}, **express_bars(table, "ratio"),
    )  # fmt: skip
    return fig.add_hline(1, line_dash="dot")


def specificity(grid: pd.DataFrame, strength: float) -> go.Figure:
    """Rates with a feature added, as powers of 2 of the unsteered rates; cut at 4."""
    return px.imshow(
        np.log2(grid.clip(lower=2**-4, upper=2**4)), text_auto=".1f", zmin=-4, zmax=4,
        color_continuous_scale="RdBu_r", aspect="auto",
        title=f"Rates with a feature added (strength {strength:g}), as powers of 2",
        labels={"x": "rate of", "y": "feature of", "color": "log2 of the<br>rate's ratio"},
    )  # fmt: skip


def gallery(written: Mapping[str, Mapping[str, Sequence[str]]], joiner: str, n: int = 120):
    """Thoughts side by side, {prompt: {condition: tokens}}, as HTML: of each ``n`` tokens,
    from before the first at which they differ if that comes late. Those of puzzles have a line per sentence
    in the colour of its label (hover for its name)."""
    from IPython.display import HTML

    def lines(words: Sequence[str]) -> str:
        if joiner != " ":  # free text
            return f"<div>{html.escape(joiner.join(words))}</div>"
        bar = '<div title="{}" style="border-left:5px solid {};padding-left:6px">{}</div>'
        return "".join(
            bar.format(label, COLOURS.get(label, "#999999"), html.escape(" ".join(sentence)))
            for label, sentence, _ in labelled(words)
        )

    parts = []
    for prompt, conditions in written.items():
        same = next((i for i, w in enumerate(zip(*conditions.values())) if len({*w}) > 1), 0)
        a = same - n // 4 if same > n // 2 else 0
        columns = "".join(
            f'<div style="flex:1"><b>{html.escape(name)}</b> ({len(words)} tokens){"… " if a else ""}'
            f"{lines(words[a : a + n])}{' …' if len(words) > a + n else ''}</div>"
            for name, words in conditions.items()
        )
        parts.append(f"<p>{html.escape(prompt)}</p><div style='display:flex;gap:16px'>{columns}</div>")
    style = "font-family:monospace;font-size:12px;color:#222;background:#fff"
    return HTML(f'<div style="{style}">{"".join(parts)}</div>')


# --- whole thoughts (notebook 13); singles: the same table with a row per crosscoder ------------------------


def removals(pooled: pd.DataFrame, singles: pd.DataFrame, measure: str = "accuracy") -> go.Figure:
    """Change of a measure when features are removed while the distilled model thinks, and under each control;
    a panel per category. Tables: ``effects.summarise``."""
    set_of = lambda t: t["kind"].where(t["kind"].isin(list(SETS)), "control")
    pooled, singles = (
        t[(t["family"] == "ablate") & (t["measure"] == measure)].assign(set=set_of) for t in (pooled, singles)
    )
    colours = {"features": "#222222", "attributed": COLOURS["distilled"], "control": COLOURS["random"]}
    # both sets, each followed by its controls, and the other controls
    order = sorted(pooled["kind"].unique(), key=lambda k: (SETS.get(k.split(",")[0], len(SETS)), len(k)))
    fig = points(
        singles, pooled, "kind", "change", "set", colours, facet_col="target", facet_col_wrap=2, width=1000,
        category_orders={"target": CATEGORIES, "kind": order}, height=640,
        title="Features removed while the distilled model thinks",
    )  # fmt: skip
    return fig.update_yaxes(title_text=f"change of {measure}", col=1).update_xaxes(tickangle=35)


def specificity_of_removal(matrix: pd.DataFrame) -> go.Figure:
    """Heatmap of ``effects.specificity``, red for more and blue for fewer, as in ``specificity``; a blue
    diagonal says that each set carries its own category. Colours end at -1 (all gone) and 1."""
    return px.imshow(
        matrix.astype(float), text_auto=".2f", zmin=-1, zmax=1, color_continuous_scale="RdBu_r",
        aspect="auto", labels={"x": "rate of", "y": "features removed of", "color": "relative<br>change"},
        title="Which sentences go with which removed features?", width=620, height=480,
    )  # fmt: skip


def gap_shares(pooled: pd.DataFrame, singles: pd.DataFrame, family: str) -> go.Figure:
    """Share of the gap in thinking rate that each condition of ``family`` closes, a panel per direction; 1 is
    the whole way. Tables: ``effects.gap_shares``."""
    names = lambda t: dict(condition=t["kind"] + ": " + t["target"], writer=t["speaker"] + " writes")
    pooled, singles = (
        t[(t["family"] == family) & (t["measure"] == "thinking")].assign(**names(t))
        for t in (pooled, singles)
    )
    pooled = pooled.rename(columns={"low": "share_low", "high": "share_high"})
    fig = points(
        singles, pooled, "condition", "share", "speaker", COLOURS, facet_col="writer", width=1000,
        title=f"How much of the gap in thinking follows? {family.capitalize()}",
    )  # fmt: skip
    fig.update_yaxes(title_text="share of the gap", col=1).update_layout(showlegend=False)
    return fig.add_hline(y=1, line_dash="dot", line_color=COLOURS["random"]).add_hline(y=0, line_width=1)


def placement(table: pd.DataFrame) -> go.Figure:
    """``effects.extra_placed``, pooled: P(c | called for) against P(c | not), a panel per category, a point
    per method; up and left is where sentences belong."""
    kinds = dict.fromkeys(("untouched", *table["kind"]))
    symbols = dict(zip(kinds, ("star", "circle", "diamond", "square", "x", "cross")))
    fig = make_subplots(2, 2, subplot_titles=CATEGORIES, horizontal_spacing=0.09, vertical_spacing=0.13)
    for (c, kind), part in table.groupby(["target", "kind"], sort=False):
        panel = CATEGORIES.index(c)
        fig.add_scatter(
            x=part["strays"], y=part["met"], name=kind, showlegend=False, mode="markers",
            marker=dict(color=COLOURS[c], size=11, symbol=symbols[kind], line=dict(width=1, color="#222222")),
            error_x=error_bars(part, "strays"), error_y=error_bars(part, "met"), row=panel // 2 + 1,
            col=panel % 2 + 1,
        )  # fmt: skip
    for kind, symbol in symbols.items():  # in no category's colour
        marker = dict(color="white", size=11, symbol=symbol, line=dict(width=1, color="#222222"))
        fig.add_scatter(x=[None], y=[None], name=kind, mode="markers", marker=marker, row=1, col=1)
    fig.update_xaxes(title_text="P(category follows | not called for)", row=2)
    fig.update_yaxes(title_text="P(category follows | called for)", col=1)
    title = "More of a category: where it belongs, or anywhere?"
    return fig.update_layout(title=title, width=1000, height=720)


def transplants(table: pd.DataFrame) -> go.Figure:
    """Thinking rate of one model's upper part on the other's lower part, by the number of layers that are the
    other's: ``study.thoughts.compute_transplants``; a panel per prompt."""
    table = table[table["measure"] == "thinking"].assign(
        who=table["upper"].map({"base": "base above distilled", "distilled": "distilled above base"}),
        prompt=table["mode"].map({"free": "the question alone", "think": '"think :" is given'}),
    )
    colours = {"base above distilled": COLOURS["base"], "distilled above base": COLOURS["distilled"]}
    fig = px.line(
        table, x="layers", y="value", color="who", facet_col="prompt", markers=True, width=1000,
        color_discrete_map=colours, title="Whose thinking is it, if the lower layers are the other model's?",
        labels={"layers": "layers of the other model, from below", "value": "share that thinks", "who": ""},
        **express_bars(table, "value", "low", "high"),
    )  # fmt: skip
    return plain_titles(fig.update_yaxes(range=[-0.03, 1.03]))
