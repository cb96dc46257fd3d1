"""A feature explorer: one row per feature to sort and filter, and all that is known about the chosen one.

    explore = explorer.open_explorer(run, parameters)      # or explorer_of(inspection)
    explore.view(17)                           # (figure, HTML): the same without a kernel
    explore.widget()                           # a table, filters, a number to type; arrow keys in "Row"

**Large dictionaries.** Activations are kept on disk by feature (compressed columns as memory-mapped arrays),
and a feature's are read when it is asked for: nothing grows with the dictionary but one table of numbers
(``benchmarks/explorer.py``). Whatever comes from a text is escaped."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ..activations.store import Store
from ..crosscoder.codes import SplitCodes, encoder_share
from ..crosscoder.model import CrossCoder, check_feature
from ..crosscoder.recurrence import MEMBERS
from ..figures import COLOURS, PLOTLY_MIME, faded, shaded_tokens, summary
from ..labels import CATEGORIES
from ..runs import Run, fingerprint, kept, kept_table
from ..settings import UserError, check
from . import lens as lens
from .contexts import activations_at, by_strength, headline, map_of_features, strongest, window
from .table import PLACES, Inspection, inspect_run

ARRAYS = ("bounds", "rows", "values")  # of ``Columns``
PAGE = 200  # rows of the table at a time
POINTS = 1500  # of the map, as background
SAMPLE = 2000  # tokens where it fires, for the histogram of contributions
SORTS = {
    "feature": "feature",
    "NRN": "nrn",
    "frequency": "frequency",
    "mean activation": "mean_activation",
    "ν_ε": "nu_eps",
    "recurs (cosine)": "stability",
    **{f"AUROC, {c}": f"auroc_{c}" for c in CATEGORIES},
}


@dataclass(frozen=True)
class Columns:
    """Activations by feature: ``bounds`` [F + 1], ``rows`` [nnz] numbers in the store, sorted, and ``values``
    [nnz]; memory-mapped."""

    bounds: np.ndarray
    rows: np.ndarray
    values: np.ndarray

    @classmethod
    def build(cls, coded: SplitCodes, folder: Path, source: str) -> Columns:
        """Written below ``folder`` unless they are there already, made from what ``source`` names."""

        def write(folder: Path) -> None:
            columns = coded.codes.tocsc()
            columns.sort_indices()
            tokens, values = coded.rows[columns.indices], columns.data.astype(np.float32)
            for name, array in zip(ARRAYS, (columns.indptr.astype(np.int64), tokens, values)):
                np.save(folder / f"{name}.npy", array, allow_pickle=False)

        def read(folder: Path) -> Columns:
            files = (folder / f"{name}.npy" for name in ARRAYS)
            return cls(*(np.load(file, mmap_mode="r", allow_pickle=False) for file in files))

        return kept(folder, fingerprint("columns", source), write, read, features=coded.codes.shape[1])

    def of(self, feature: int) -> tuple[np.ndarray, np.ndarray]:
        """(rows, values) where a feature fires."""
        span = slice(*self.bounds[feature : feature + 2])
        return np.asarray(self.rows[span]), np.asarray(self.values[span])

    def at(self, feature: int, rows: np.ndarray) -> np.ndarray:
        """Its activation at rows of the store; 0 where it does not fire."""
        return activations_at(*self.of(feature), rows)

    def strongest(self, feature: int, documents: np.ndarray, n: int) -> list[tuple[int, float]]:
        """The ``n`` strongest activations, (row, value), one per document; of equal ones the earlier."""
        rows, values = self.of(feature)
        return [(int(rows[i]), float(values[i])) for i in strongest(rows, values, documents, n)]


HEADS = f"{'feature':>7} {'NRN':>5} {'fires on':>9} {'recurs':>7}  {'label':<24} {'token'}"


class Explorer:
    """See the module. ``table``: one row per feature (``table.feature_table``); ``columns``: activations of
    the report split. Shown if they are there: the table's column stability; ``places``, feature, x, y of a
    map; ``named``, feature and label, from a language model; ``members``, the same features in other
    crosscoders (``crosscoder.recurrence.members_of``); ``readouts`` of the models (``lens.readouts``)."""

    def __init__(
        self,
        crosscoder: CrossCoder,
        store: Store,
        table: pd.DataFrame,
        columns: Columns,
        tokenizer: PreTrainedTokenizerBase,
        places: pd.DataFrame | None = None,
        named: pd.DataFrame | None = None,
        members: pd.DataFrame | None = None,
        readouts: Mapping[str, Tensor] | None = None,
    ):
        self.crosscoder, self.store, self.columns, self.tokenizer = crosscoder, store, columns, tokenizer
        self.places, self.table = places, table.reset_index(drop=True)
        if "stability" not in self.table:
            self.table["stability"] = np.nan
        self.members = pd.DataFrame(columns=MEMBERS) if members is None else members
        self.named = {} if named is None else {int(row["feature"]): row for row in named.to_dict("records")}
        self._lens = lens.Lens(crosscoder, readouts, tokenizer) if readouts else None
        self.labels = sorted({str(x) for x in self.table["label"] if isinstance(x, str) and x})
        self._model, self._reference = crosscoder.names[-1], crosscoder.names[0]
        alive = self.table["alive"].astype(bool)
        self._heights, self._edges = np.histogram(self.table.loc[alive, "nrn"], bins=60, range=(0, 1))
        self._norms = crosscoder.W_dec.detach().norm(dim=1).clamp(min=1e-12)

    def select(
        self,
        label: str = "",
        nrn: Sequence[float] = (0.0, 1.0),
        frequency: float = 0.0,
        stable: float = 0.0,
        alive: bool = True,
        sort: str = "NRN",
        descending: bool = True,
    ) -> pd.DataFrame:
        """Rows of the table that pass, sorted: a label or "" for all, a range of NRN, least frequency, least
        stability, alive only. ``sort`` is one of ``SORTS``; what has no number comes last."""
        check("sort", sort, choices=tuple(SORTS))
        low, high = check("nrn", list(nrn), list, low=0, high=1)
        table, column = self.table, SORTS[sort]
        if column not in table:
            raise UserError(
                f"the table has no {sort}: this pair's text has no labels, or that part was not computed"
            )
        passes = table["nrn"].between(low, high) & (table["frequency"].fillna(0) >= frequency)
        passes &= table["alive"].astype(bool) | (not alive)
        passes &= (table["label"] == label) | (label == "")
        passes &= (table["stability"] >= stable) | (stable <= 0)
        order = dict(ascending=[not descending, True], na_position="last", kind="stable")
        return table[passes].sort_values([column, "feature"], **order)

    def lines(self, rows: pd.DataFrame) -> list[tuple[str, int]]:
        """(text, feature) for each row, in columns of a fixed width, below HEADS."""
        cosine = ["" if np.isnan(s) else f"{s:.2f}" for s in rows["stability"]]
        line = "{r.feature:>7} {r.nrn:>5.2f} {r.frequency:>9.2%} {c:>7}  {label:<24} {token}"
        return [
            (line.format(r=r, c=c, label=str(r.label)[:24], token=str(r.top_token)[:14]), int(r.feature))
            for r, c in zip(rows.itertuples(), cosine)
        ]

    def view(self, feature: int, n: int = 6) -> tuple[go.Figure, object]:
        """(figure, ``IPython.display.HTML``) of a feature with ``n`` contexts; UserError if unknown."""
        from IPython.display import HTML

        check_feature(self.crosscoder, feature)
        parts = [self._evidence(feature), self._writes(feature), self._contexts(feature, n)]
        style = "color:#222;background:#fff;padding:6px 10px"
        return self._figure(feature), HTML(f'<div style="{style}">{"".join(parts)}</div>')

    def contributions(self, feature: int, rows: np.ndarray) -> dict[str, np.ndarray]:
        """{model: [n]} what each model's activation adds to the feature's encoder at ``rows``, above what its
        mean activation adds."""
        result = {}
        for name, share in encoder_share(self.crosscoder, self.store, rows, [feature]).items():
            columns = self.crosscoder.columns(name)
            mean = float(self.crosscoder.W_enc[feature, columns].detach() @ self.crosscoder.means[columns])
            result[name] = share[:, 0] - mean
        return result

    def nearest(self, feature: int, n: int = 8) -> list[tuple[int, float]]:
        """The ``n`` features with the highest cosine to this one, (feature, cosine), by decoder rows: all
        models' side by side, scaled."""
        rows = self.crosscoder.W_dec.detach()
        cosines = (rows @ rows[feature]) / (self._norms * self._norms[feature])
        cosines[feature] = -2
        best = cosines.topk(min(n, len(cosines) - 1))
        return [(int(i), float(c)) for c, i in zip(best.values, best.indices)]

    def _figure(self, feature: int) -> go.Figure:
        titles = ["NRN, among all alive features", "what each model contributes where it fires"]
        mapped = self.places is not None and len(self.places) > 0
        titles += ["place in the map"] * mapped
        fig = make_subplots(1, len(titles), subplot_titles=titles, horizontal_spacing=0.08)
        self._add_nrn(fig, feature)
        self._add_contributions(fig, feature)
        if mapped:
            self._add_map(fig, feature)
        size = dict(width=330 * len(titles), height=340, margin_t=90)
        legend = dict(orientation="h", y=-0.3)
        return fig.update_layout(title=headline(self.table, feature), legend=legend, **size)

    def _add_nrn(self, fig: go.Figure, feature: int) -> None:
        panel, look = dict(row=1, col=1), dict(marker_color=COLOURS["null"], showlegend=False)
        text = "NRN %{x:.2f}: %{customdata} features<extra></extra>"
        hover, middles = dict(customdata=self._heights, hovertemplate=text), _middles(self._edges)
        fig.add_bar(x=middles, y=np.sqrt(self._heights), **look, **hover, **panel)
        nrn = float(self.table.iloc[feature]["nrn"])
        fig.add_vline(nrn, line_color=COLOURS["distilled"], line_width=3, **panel)
        ticks = [0, 1, 4, 16, 64, 256, 1024, 4096]
        axis = dict(tickvals=np.sqrt(ticks), ticktext=list(map(str, ticks)), title_text="features")
        fig.update_yaxes(**axis, **panel).update_xaxes(title_text="0 base only, 1 distilled only", **panel)

    def _add_contributions(self, fig: go.Figure, feature: int) -> None:
        panel, (rows, _) = dict(row=1, col=2), self.columns.of(feature)
        if len(rows) > SAMPLE:
            rows = np.sort(np.random.default_rng(feature).choice(rows, SAMPLE, replace=False))
        if len(rows):
            shares = self.contributions(feature, rows)
            edges = np.histogram_bin_edges(np.concatenate(list(shares.values())), bins=40)
            for name, values in shares.items():
                role, dash = ("distilled", "solid") if name == self._model else ("base", "dot")
                line = dict(shape="hvh", dash=dash, color=COLOURS.get(name, COLOURS[role]))
                heights = np.histogram(values, edges)[0] / len(rows)
                fig.add_scatter(x=_middles(edges), y=heights, mode="lines", name=name, line=line, **panel)
        fig.update_xaxes(title_text="above its mean, in the units of the activation", **panel)
        fig.update_yaxes(title_text="share of tokens", tickformat=".0%", **panel)

    def _add_map(self, fig: go.Figure, feature: int) -> None:
        few = len(self.places) <= POINTS
        background = self.places if few else self.places.sample(POINTS, random_state=0)
        here, panel = self.places[self.places["feature"] == feature], dict(row=1, col=3)
        here_look = dict(size=13, symbol="x", color=COLOURS["distilled"])
        for points, marker in ((background, dict(size=4, color=COLOURS["null"])), (here, here_look)):
            hover = dict(hoverinfo="text", hovertext=[f"feature {f}" for f in points["feature"]])
            look = dict(mode="markers", showlegend=False, marker=marker, **hover)
            fig.add_scatter(x=points["x"], y=points["y"], **look, **panel)
        fig.update_xaxes(visible=False, **panel).update_yaxes(visible=False, **panel)

    def _evidence(self, feature: int) -> str:
        row = self.table.iloc[feature]

        def number(name: str, form: str) -> str | None:
            return format(row[name], form) if name in row and pd.notna(row[name]) else None

        facts = {
            "NRN": number("nrn", ".3f"),
            "fires on": number("frequency", ".2%"),
            "explained by the token alone (R²)": number("token_r2", ".2f"),
            "ν_ε": number("nu_eps", ".2f"),
            "recurs in other crosscoders (cosine)": number("stability", ".2f"),
            **{
                f"AUROC before {c}, at the {name}": number(f"{column}_{c}", ".2f")
                for c in CATEGORIES
                for name, column in (("value", PLACES["value"]), ("full stop", PLACES["before"]))
            },
        }
        shown = "; ".join(f"{name} <b>{value}</b>" for name, value in facts.items() if value is not None)
        text = f"<p>{shown}.</p><p>By rule: <b>{html.escape(str(row['label']) or 'no label')}</b>"
        if share := number("label_share", ".0%"):
            text += f" ({share} of its activation, {number('enrichment', '.1f')} times its share of tokens)"
        if name := self.named.get(feature):
            text += f". By a language model: <b>{html.escape(str(name.get('label', '')))}</b>"
        same = self.members[self.members["feature"] == feature]
        if len(same):
            listed = (f"crosscoder {m.crosscoder}: {m.match} ({m.cosine:.2f})" for m in same.itertuples())
            text += f". The same in other crosscoders (its number there, cosine): {'; '.join(listed)}"
        elif len(self.members):
            text += ". No feature of another crosscoder is the same"
        near = ", ".join(f"{f} ({c:.2f})" for f, c in self.nearest(feature, 5))
        return text + f". Nearest by decoder rows (cosine): {near}.</p>"

    def _writes(self, feature: int) -> str:
        if not self._lens:
            return ""
        lines = []
        for name in self.crosscoder.names:
            more, less = (html.escape(" ".join(words)) for words in self._lens.words(name, feature, 8))
            lines.append(f"{html.escape(name)} more <code>{more}</code>, less <code>{less}</code>")
        alike = f"the two rows' scores correlate at <b>{self._lens.agreement(feature):.2f}</b>"
        return f"<p>Its row makes likelier (logit lens), {'; '.join(lines)}; {alike}.</p>"

    def _contexts(self, feature: int, n: int) -> str:
        contexts = self.columns.strongest(feature, self.store.documents, n)
        if not contexts:
            return "<p>It never fires on these tokens.</p>"
        best = "".join(self._line(feature, *context, contexts[0][1]) for context in contexts)
        rows, values = self.columns.of(feature)
        drawn = np.concatenate(by_strength(rows, values, self.store.documents, seed=feature))
        random = "".join(self._line(feature, int(rows[i]), float(values[i]), contexts[0][1]) for i in drawn)
        one, other = (_underlined(name, sign) for sign, name in ((1, self._model), (-1, self._reference)))
        explained = (
            f"Above: where it fires. Below: which model's activation adds more, {one} or {other}; hover for"
            " numbers."
        )
        note, box = '<p style="color:#555">{}</p>', '<div style="overflow-x:auto">{}</div>'
        fifths = "One at random from each fifth of its firings, the strongest fifth first:"
        return note.format(explained) + box.format(best) + note.format(fifths) + box.format(random)

    def _line(self, feature: int, row: int, value: float, maximum: float) -> str:
        """A context in two lines: where the feature fires, and which model's activation adds more."""
        rows = window(self.store, row)
        words = self.tokenizer.convert_ids_to_tokens(self.store.tokens[rows].tolist())
        joint = shaded_tokens(words, self.columns.at(feature, rows), maximum=maximum).data
        shares = self.contributions(feature, rows)
        gap = shares[self._model] - shares[self._reference]
        most = max(float(np.abs(gap).max()), 1e-9)
        by_model = " ".join(_underlined(w, g / most, f"{g:+.3g}") for w, g in zip(words, gap))
        return (
            '<div style="display:flex;white-space:nowrap;font-family:monospace">'
            f'<span style="min-width:4em;color:#555">{value:.2f}</span>'
            f'<div>{joint}<div style="line-height:1.7">{by_model}</div></div></div>'
        )

    def widget(self, first: int | None = None):
        """An ipywidgets box. Everything has a name for screen readers, and everything is reached by keys.

        In the list box itself JupyterLab takes the arrow keys away (they choose the next cell), but not in
        fields: hence *Row*. The output's content is *assigned*: ``interact`` and the ``Output`` context can
        stall a headless run."""
        import ipywidgets as w

        style = {"description_width": "initial"}
        small, field = ({"style": style, "layout": {"width": width}} for width in ("9em", "14em"))
        at_once = {"continuous_update": False}
        sorts = [sort for sort, column in SORTS.items() if column in self.table]
        labels = [("any label", ""), *((name, name) for name in self.labels)]
        sort = w.Dropdown(options=sorts, value="NRN", description="Sort by", style=style)
        directions = [("highest first", True), ("lowest first", False)]
        order = w.ToggleButtons(options=directions, style={"button_width": "8em"})
        label = w.Dropdown(options=labels, description="Label", style=style)
        span = {"value": (0, 1), "min": 0, "max": 1, "step": 0.01}
        nrn = w.FloatRangeSlider(description="NRN", style=style, **span, **at_once)
        least = {"value": 0, "min": 0, "max": 1, **field}
        frequency = w.BoundedFloatText(step=0.001, description="Fires on at least", **least)
        unknown = bool(self.table["stability"].isna().all())
        stable = w.BoundedFloatText(step=0.1, description="Recurs at least", disabled=unknown, **least)
        page = w.BoundedIntText(value=1, min=1, max=1, description="Page", **small)
        row = w.BoundedIntText(value=1, min=1, max=1, description="Row", **small, **at_once)
        last = self.crosscoder.n_features - 1
        number = w.BoundedIntText(min=0, max=last, description="Feature number", **field, **at_once)
        near = w.Dropdown(options=[("nearest features", -1)], description="Go to", style=style)
        count, output = w.HTML(), w.Output()
        table = w.Select(rows=12, description="", layout={"width": "auto"})
        table.add_class("feature-table")
        style_of_list = "font-family: monospace; font-size: 12px"
        heads = w.HTML(
            f"<style>.feature-table select {{ {style_of_list} }}</style>"
            f'<pre style="{style_of_list}; margin: 0 0 0 4px">{HEADS}</pre>'
        )
        busy = {"on": False}  # controls are being set: what they report is no wish of the user

        def fill(_=None) -> None:
            rows = self.select(
                label.value, nrn.value, frequency.value, stable.value, True, sort.value, order.value
            )
            page.max = max(1, -(-len(rows) // PAGE))
            part = rows.iloc[(page.value - 1) * PAGE : page.value * PAGE]
            where = f", page {page.value} of {page.max}" if page.max > 1 else ""
            count.value = f"{len(rows):,} of {int(self.table['alive'].sum()):,} alive features{where}"
            busy["on"] = True  # a new list chooses its first row: that is shown once, below
            table.options = self.lines(part)
            row.max = max(1, len(part))
            busy["on"] = False
            if len(part):
                show(int(part["feature"].iloc[0]))

        def show(feature: int) -> None:
            busy["on"] = True
            number.value = feature
            if feature in (listed := [value for _, value in table.options]):
                table.value, row.value = feature, listed.index(feature) + 1
            nearest = [(f"feature {f}, cosine {c:.2f}", f) for f, c in self.nearest(feature)]
            near.options = [("nearest features", -1), *nearest]
            near.value = -1
            busy["on"] = False
            figure, text = self.view(feature)
            written = {"text/html": text.data, "text/plain": headline(self.table, feature)}
            drawn = {PLOTLY_MIME: json.loads(figure.to_json()), "text/plain": summary(figure)}
            output.outputs = tuple(
                {"output_type": "display_data", "data": data, "metadata": {}} for data in (written, drawn)
            )

        def chosen(change) -> None:
            if not busy["on"] and change["new"] is not None and change["new"] >= 0:
                show(int(change["new"]))

        def stepped(change) -> None:
            if not busy["on"] and table.options:
                show(table.options[change["new"] - 1][1])

        def filtered(change) -> None:
            busy["on"] = True
            page.value = 1
            busy["on"] = False
            fill()

        for control in (sort, order, label, nrn, frequency, stable):
            control.observe(filtered, "value")
        page.observe(lambda change: None if busy["on"] else fill(), "value")
        for control in (table, number, near):
            control.observe(chosen, "value")
        row.observe(stepped, "value")
        fill()
        if first is not None:
            show(check_feature(self.crosscoder, first))
        above = [sort, order, label], [nrn, frequency, stable], [page, row, count]
        return w.VBox([*map(w.HBox, above), heads, table, w.HBox([number, near]), output])


def _middles(edges: np.ndarray) -> np.ndarray:
    return (edges[1:] + edges[:-1]) / 2


def _underlined(word: str, share: float, title: str = "") -> str:
    """A word as HTML with a line below it, from the base's colour (-1) over transparent (0) to the distilled
    model's (1)."""
    colour = faded(COLOURS["distilled" if share > 0 else "base"], min(abs(share), 1))
    return f'<span title="{title}" style="border-bottom:3px solid {colour}">{html.escape(str(word))}</span>'


def open_explorer(run: Run, parameters: Mapping) -> Explorer:
    """The explorer of a run, from what notebooks 01 to 03 left. UserError says which notebook is missing.

    ``parameters``: notebook 03's max_tokens, top_contexts, nrn_over and seed."""
    numbers = (parameters[name] for name in ("max_tokens", "top_contexts", "nrn_over", "seed"))
    return explorer_of(inspect_run(run, "", None, *numbers), seed=parameters["seed"])


def explorer_of(
    inspection: Inspection,
    map_features: int = 3000,
    seed: int = 0,
    named: pd.DataFrame | None = None,
    readouts: Mapping[str, Tensor] | None = None,
) -> Explorer:
    """The explorer of a run that was inspected. The map (of at most ``map_features`` features) is computed
    once; ``named``: ``naming.label_features``; ``readouts``: ``lens.readouts``, unless they are at hand."""
    crosscoder, store, table = inspection.crosscoder, inspection.store, inspection.table
    folder = inspection.run.path("features")
    source = fingerprint(inspection.fingerprint, store.fingerprint, len(inspection.report.rows))
    columns = Columns.build(inspection.report, folder / "columns", source)
    key, made = fingerprint("map", source, map_features, seed), (crosscoder, table, map_features, seed)
    places = kept_table(folder / "map", key, lambda: map_of_features(*made))
    tokenizer, members = inspection.tokenizer, inspection.members
    if readouts is None:
        readouts = lens.readouts(inspection.pair, crosscoder.names)
    return Explorer(crosscoder, store, table, columns, tokenizer, places, named, members, readouts)
