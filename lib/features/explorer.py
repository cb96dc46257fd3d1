"""A feature explorer: one row per feature to sort and filter, and all that is known about the chosen one.

    explore = explorer.open_explorer(run, parameters)      # or explorer_of(inspection)
    explore.view(17)                           # (figure, HTML): the same without a kernel
    explore.widget()                           # a table, filters, a number to type; arrow keys in "Row"

Of a feature it shows NRN among all others, what each model's activation contributes where it fires, its place
in the map, the texts in which it is strongest (shaded by activation, and below by which of the models it
comes from), its label with the evidence, and its nearest features.

**Large dictionaries.** Activations are kept on disk by feature (compressed columns as memory-mapped arrays),
and a feature's are read when it is asked for: nothing grows with the dictionary but one table of numbers
(``benchmarks/explorer.py``). Whatever comes from a text is escaped.
"""

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
from transformers import PreTrainedTokenizerBase

from ..activations.store import Store
from ..crosscoder.codes import SplitCodes, encoder_share
from ..crosscoder.model import CrossCoder, check_feature
from ..figures import COLOURS, PLOTLY_MIME, shaded_tokens, summary
from ..labels import CATEGORIES
from ..results import read_part
from ..runs import Run, fingerprint, kept, kept_table
from ..settings import UserError, check
from .contexts import AFTER, BEFORE, headline, map_of_features, strongest, window
from .table import RunInspection, inspect_run

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
    "comes back (cosine)": "stability",
    **{f"AUROC, {c}": f"auroc_{c}" for c in CATEGORIES},
}


# --- activations by feature, on disk ------------------------------------------------------------------------


@dataclass(frozen=True)
class Columns:
    """Activations by feature: ``bounds`` [F + 1], ``rows`` [nnz] numbers in the store, sorted, and ``values``
    [nnz]; memory-mapped.
    """

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
            return cls(
                *(np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in ARRAYS)
            )

        return kept(folder, fingerprint("columns", source), write, read, features=coded.codes.shape[1])

    def of(self, feature: int) -> tuple[np.ndarray, np.ndarray]:
        """(rows, values) where a feature fires."""
        span = slice(*self.bounds[feature : feature + 2])
        return np.asarray(self.rows[span]), np.asarray(self.values[span])

    def at(self, feature: int, rows: np.ndarray) -> np.ndarray:
        """Its activation at rows of the store; 0 where it does not fire."""
        fires, values = self.of(feature)
        if not len(fires):
            return np.zeros(len(rows), np.float32)
        place = np.minimum(np.searchsorted(fires, rows), len(fires) - 1)
        return np.where(fires[place] == rows, values[place], 0.0)

    def strongest(self, feature: int, documents: np.ndarray, n: int) -> list[tuple[int, float]]:
        """The ``n`` strongest activations, (row, value), one per document; of equal ones the earlier."""
        rows, values = self.of(feature)
        return [(int(rows[i]), float(values[i])) for i in strongest(rows, values, documents, n)]


# --- the explorer -------------------------------------------------------------------------------------------


class Explorer:
    """See the module. ``table``: one row per feature (``features.feature_table``); ``columns``: activations
    of the report split.
    """

    def __init__(
        self,
        crosscoder: CrossCoder,
        store: Store,
        table: pd.DataFrame,
        columns: Columns,
        tokenizer: PreTrainedTokenizerBase,
        places: pd.DataFrame | None = None,
        stability: pd.DataFrame | None = None,
        named: pd.DataFrame | None = None,
    ):
        """``places``: feature, x, y of a map; ``stability``: feature, stability of the study's part "seeds";
        ``named``: feature, label and more, from a language model. All three are shown if they are there."""
        self.crosscoder, self.store, self.columns, self.tokenizer = crosscoder, store, columns, tokenizer
        self.places, table = places, table.reset_index(drop=True)
        if stability is None:
            self.table = table.assign(stability=np.nan)
        else:
            self.table = table.join(stability.set_index("feature")["stability"], on="feature")
        self.named = {} if named is None else {int(row["feature"]): row for row in named.to_dict("records")}
        self.labels = sorted({str(x) for x in self.table["label"] if isinstance(x, str) and x})
        self._model, self._reference = crosscoder.names[-1], crosscoder.names[0]
        alive = self.table["alive"].astype(bool)
        self._heights, self._edges = np.histogram(self.table.loc[alive, "nrn"], bins=60, range=(0, 1))
        self._norms = crosscoder.W_dec.detach().norm(dim=1).clamp(min=1e-12)

    # --- the table ------------------------------------------------------------------------------------------

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
        stability, alive only.

        ``sort`` is one of ``SORTS``; what has no number comes last. UserError for anything else.
        """
        check("sort", sort, choices=tuple(SORTS))
        low, high = check("nrn", list(nrn), list, low=0, high=1)
        table, column = self.table, SORTS[sort]
        if column not in table:
            raise UserError(
                f"the table has no {sort}: this pair's text has no labels, or that part was not computed"
            )
        passes = table["nrn"].between(low, high) & (table["frequency"].fillna(0) >= frequency)
        if alive:
            passes &= table["alive"].astype(bool)
        if label:
            passes &= table["label"] == label
        if stable > 0:
            passes &= table["stability"] >= stable
        order = dict(ascending=[not descending, True], na_position="last", kind="stable")
        return table[passes].sort_values([column, "feature"], **order)

    def lines(self, rows: pd.DataFrame) -> list[tuple[str, int]]:
        """(text, feature) for each row, in columns of a fixed width."""
        cosine = ["" if np.isnan(s) else f"{s:.2f}" for s in rows["stability"]]
        line = "{r.feature:>6}  NRN {r.nrn:.2f}  {r.frequency:>7.2%}  {c:>4}  {label:<24} {token}"
        return [
            (line.format(r=r, c=c, label=str(r.label)[:24], token=str(r.top_token)[:14]), int(r.feature))
            for r, c in zip(rows.itertuples(), cosine)
        ]

    # --- one feature ----------------------------------------------------------------------------------------

    def view(self, feature: int, n: int = 6) -> tuple[go.Figure, object]:
        """(figure, ``IPython.display.HTML``) of a feature with ``n`` contexts. UserError for a number that
        does not exist.
        """
        from IPython.display import HTML

        check_feature(self.crosscoder, feature)
        parts = [self._evidence(feature), self._contexts(feature, n)]
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
        fig.update_layout(
            title=headline(self.table, feature), width=330 * len(titles), height=340, margin_t=90
        )
        return fig.update_layout(legend=dict(orientation="h", y=-0.3))

    def _add_nrn(self, fig: go.Figure, feature: int) -> None:
        fig.add_bar(
            x=(self._edges[1:] + self._edges[:-1]) / 2,
            y=np.sqrt(self._heights),
            marker_color=COLOURS["null"],
            showlegend=False,
            customdata=self._heights,
            hovertemplate="NRN %{x:.2f}: %{customdata} features<extra></extra>",
            row=1,
            col=1,
        )
        nrn = float(self.table.iloc[feature]["nrn"])
        fig.add_vline(nrn, line_color=COLOURS["distilled"], line_width=3, row=1, col=1)
        ticks = [0, 1, 4, 16, 64, 256, 1024, 4096]
        axis = dict(tickvals=np.sqrt(ticks), ticktext=list(map(str, ticks)), title_text="features")
        fig.update_yaxes(**axis, row=1, col=1)
        fig.update_xaxes(title_text="0 base only, 1 distilled only", row=1, col=1)

    def _add_contributions(self, fig: go.Figure, feature: int) -> None:
        rows, _ = self.columns.of(feature)
        if len(rows) > SAMPLE:
            rows = np.sort(np.random.default_rng(feature).choice(rows, SAMPLE, replace=False))
        if len(rows):
            shares = self.contributions(feature, rows)
            edges = np.histogram_bin_edges(np.concatenate(list(shares.values())), bins=40)
            for name, values in shares.items():
                role = "distilled" if name == self._model else "base"
                dash = "solid" if name == self._model else "dot"
                line = dict(shape="hvh", dash=dash, color=COLOURS.get(name, COLOURS[role]))
                x, y = (edges[1:] + edges[:-1]) / 2, np.histogram(values, edges)[0] / len(rows)
                fig.add_scatter(x=x, y=y, mode="lines", name=name, line=line, row=1, col=2)
        fig.update_xaxes(title_text="above its mean, in the units of the activation", row=1, col=2)
        fig.update_yaxes(title_text="share of tokens", tickformat=".0%", row=1, col=2)

    def _add_map(self, fig: go.Figure, feature: int) -> None:
        few = len(self.places) <= POINTS
        background = self.places if few else self.places.sample(POINTS, random_state=0)
        here = self.places[self.places["feature"] == feature]
        marks = (
            (background, dict(size=4, color=COLOURS["null"])),
            (here, dict(size=13, symbol="x", color=COLOURS["distilled"])),
        )
        look = dict(mode="markers", showlegend=False, hoverinfo="text", row=1, col=3)
        for points, marker in marks:
            names = [f"feature {f}" for f in points["feature"]]
            fig.add_scatter(x=points["x"], y=points["y"], marker=marker, hovertext=names, **look)
        fig.update_xaxes(visible=False, row=1, col=3).update_yaxes(visible=False, row=1, col=3)

    def _evidence(self, feature: int) -> str:
        row = self.table.iloc[feature]

        def number(name: str, form: str) -> str | None:
            return format(row[name], form) if name in row and pd.notna(row[name]) else None

        facts = [
            ("NRN", number("nrn", ".3f")),
            ("fires on", number("frequency", ".2%")),
            ("explained by the token alone (R²)", number("token_r2", ".2f")),
            ("ν_ε", number("nu_eps", ".2f")),
            ("comes back with other seeds (cosine)", number("stability", ".2f")),
            *((f"AUROC before {c}", number(f"auroc_{c}", ".2f")) for c in CATEGORIES),
        ]
        shown = "; ".join(f"{name} <b>{value}</b>" for name, value in facts if value is not None)
        text = f"<p>{shown}.</p><p>By rule: <b>{html.escape(str(row['label']) or 'no label')}</b>"
        if number("label_share", ".0%"):
            text += (
                f" ({number('label_share', '.0%')} of its activation, {number('enrichment', '.1f')} times its"
                " share of tokens)"
            )
        if feature in self.named:
            entry = self.named[feature]
            text += f". By a language model: <b>{html.escape(str(entry.get('label', '')))}</b>"
        near = ", ".join(f"{f} ({c:.2f})" for f, c in self.nearest(feature, 5))
        return text + f". Nearest by decoder rows (cosine): {near}.</p>"

    def _contexts(self, feature: int, n: int) -> str:
        contexts, lines = self.columns.strongest(feature, self.store.documents, n), []
        if not contexts:
            return "<p>It never fires on these tokens.</p>"
        for row, value in contexts:
            rows = window(self.store, row, BEFORE, AFTER)
            words = self.tokenizer.convert_ids_to_tokens(self.store.tokens[rows].tolist())
            joint = shaded_tokens(words, self.columns.at(feature, rows), maximum=contexts[0][1]).data
            shares = self.contributions(feature, rows)
            gap = shares[self._model] - shares[self._reference]
            most = max(float(np.abs(gap).max()), 1e-9)
            by_model = " ".join(_underlined(w, g / most, f"{g:+.3g}") for w, g in zip(words, gap))
            lines.append(
                '<div style="display:flex;white-space:nowrap;font-family:monospace"><span'
                f' style="min-width:4em;color:#555">{value:.2f}</span><div>{joint}<div'
                f' style="line-height:1.7">{by_model}</div></div></div>'
            )
        one, other = (_underlined(name, sign) for sign, name in ((1, self._model), (-1, self._reference)))
        explained = (
            f"Above: where it fires. Below: which model's activation adds more, {one} or {other}; hover for"
            " numbers."
        )
        return f'<p style="color:#555">{explained}</p><div style="overflow-x:auto">{"".join(lines)}</div>'

    # --- widget ---------------------------------------------------------------------------------------------

    def widget(self, first: int | None = None):
        """An ipywidgets box. Everything has a name for screen readers, and everything is reached by keys.

        In the list box itself JupyterLab takes the arrow keys away (they choose the next cell), but not in
        fields: hence *Row*. The output's content is *assigned*: ``interact`` and the ``Output`` context can
        stall a headless run.
        """
        import ipywidgets as w

        style = {"description_width": "initial"}
        small, field = (
            {"style": style, "layout": {"width": "9em"}},
            {"style": style, "layout": {"width": "14em"}},
        )
        at_once = {"continuous_update": False}
        sorts, labels = (
            [s for s, c in SORTS.items() if c in self.table],
            [(name, name) for name in self.labels],
        )
        sort = w.Dropdown(options=sorts, value="NRN", description="Sort by", style=style)
        directions = [("highest first", True), ("lowest first", False)]
        order = w.ToggleButtons(options=directions, style={"button_width": "8em"})
        label = w.Dropdown(options=[("any label", ""), *labels], description="Label", style=style)
        nrn = w.FloatRangeSlider(
            value=(0, 1), min=0, max=1, step=0.01, description="NRN", style=style, **at_once
        )
        least = {"value": 0, "min": 0, "max": 1, **field}
        frequency = w.BoundedFloatText(step=0.001, description="Fires on at least", **least)
        stable = w.BoundedFloatText(step=0.1, description="Comes back at least", **least)
        stable.disabled = bool(self.table["stability"].isna().all())
        page = w.BoundedIntText(value=1, min=1, max=1, description="Page", **small)
        row = w.BoundedIntText(value=1, min=1, max=1, description="Row", **small, **at_once)
        number = w.BoundedIntText(
            min=0, max=self.crosscoder.n_features - 1, description="Feature number", **field, **at_once
        )
        near = w.Dropdown(options=[("nearest features", -1)], description="Go to", style=style)
        count, output = w.HTML(), w.Output()
        table = w.Select(rows=12, description="", layout={"width": "auto"})
        table.add_class("feature-table")
        mono = w.HTML("<style>.feature-table select { font-family: monospace; font-size: 12px }</style>")
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
            bundles = [
                {"text/html": text.data, "text/plain": headline(self.table, feature)},
                {PLOTLY_MIME: json.loads(figure.to_json()), "text/plain": summary(figure)},
            ]
            output.outputs = tuple(
                {"output_type": "display_data", "data": bundle, "metadata": {}} for bundle in bundles
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
        return w.VBox([mono, *map(w.HBox, above), table, w.HBox([number, near]), output])


def _underlined(word: str, share: float, title: str = "") -> str:
    """A word as HTML with a line below it, from the base's colour (-1) over transparent (0) to the distilled
    model's (1)."""
    colour = COLOURS["distilled" if share > 0 else "base"]
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    line = f"border-bottom:3px solid rgba({red},{green},{blue},{min(abs(share), 1):.2f})"
    return f'<span title="{title}" style="{line}">{html.escape(str(word))}</span>'


def open_explorer(run: Run, parameters: Mapping) -> Explorer:
    """The explorer of a run, from what notebooks 01 to 03 left. UserError says which notebook is missing.

    ``parameters``: notebook 03's max_tokens, top_contexts, nrn_over and seed.
    """
    numbers = (parameters[name] for name in ("max_tokens", "top_contexts", "nrn_over", "seed"))
    return explorer_of(inspect_run(run, "", None, *numbers), seed=parameters["seed"])


def explorer_of(
    inspection: RunInspection, map_features: int = 3000, seed: int = 0, named: pd.DataFrame | None = None
) -> Explorer:
    """The explorer of a run that was inspected. The map (of at most ``map_features`` features) is computed
    once; stability over seeds is read where the study has it; ``named``: ``naming.label_features``."""
    crosscoder, store, table = inspection.crosscoder, inspection.store, inspection.table
    folder = inspection.run.path("features")
    source = fingerprint(inspection.fingerprint, store.fingerprint, len(inspection.report.rows))
    columns = Columns.build(inspection.report, folder / "columns", source)
    places = kept_table(
        folder / "map",
        fingerprint("map", source, map_features, seed),
        lambda: map_of_features(crosscoder, table, map_features, seed),
    )
    seeds = read_part(inspection.run, "seeds", crosscoder=inspection.fingerprint)
    stability = seeds.tables.get("stability")
    return Explorer(crosscoder, store, table, columns, inspection.tokenizer, places, stability, named)
