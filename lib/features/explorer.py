"""A feature explorer: one row per feature to sort and filter, and everything that is known about the one that
is chosen.

    explore = explorer.open_explorer(run)      # or Explorer(...) with what notebook 03 has in hand
    explore.view(17)                           # (figure, HTML): the same without a kernel
    explore.widget()                           # a table, filters, a number to type; arrow keys in "Row" step through the table

Of a feature it shows NRN among all others, what each model's activation contributes where it fires, its place
in the map, the texts in which it is strongest (shaded by activation, and below by which of the models it
comes from), its label with the evidence, and its nearest features.

**Large dictionaries.** Activations are kept on disk by feature (compressed columns as memory-mapped arrays),
and what a feature looks like is read from there when it is asked for: nothing grows with the dictionary but
one table of numbers (``benchmarks/explorer.py``). Whatever comes from a text is escaped.
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
import torch
from transformers import PreTrainedTokenizerBase

from ..activations.store import Store, open_store
from ..crosscoder.codes import SplitCodes, encoder_share
from ..crosscoder.model import CrossCoder, check_feature
from ..crosscoder.sharing import open_for_run
from ..figures import COLOURS, PLOTLY_MIME, shaded_tokens, summary
from ..labels import CATEGORIES
from ..models.pairs import load_pair
from ..results import read_part
from ..runs import Run, fingerprint, is_current, write_manifest
from ..settings import UserError, check
from .contexts import AFTER, BEFORE, headline, window
from .table import inspect

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
    def build(cls, coded: SplitCodes, folder: Path, mark: str) -> Columns:
        """Written below ``folder`` unless they are there already, made from what ``mark`` names."""
        mark = fingerprint("columns", mark)
        if not is_current(folder, mark):
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "manifest.json").unlink(missing_ok=True)
            columns = coded.codes.tocsc()
            columns.sort_indices()
            for name, array in (
                ("bounds", columns.indptr.astype(np.int64)),
                ("rows", coded.rows[columns.indices]),
                ("values", columns.data.astype(np.float32)),
            ):
                np.save(folder / f"{name}.npy", array, allow_pickle=False)
            write_manifest(folder, mark, features=columns.shape[1])
        return cls(
            *(
                np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
                for name in ("bounds", "rows", "values")
            )
        )

    def of(self, feature: int) -> tuple[np.ndarray, np.ndarray]:
        """(rows, values) where a feature fires."""
        span = slice(*self.bounds[feature : feature + 2])
        return np.asarray(self.rows[span]), np.asarray(self.values[span])

    def at(self, feature: int, rows: np.ndarray) -> np.ndarray:
        """Its activation at rows of the store; 0 where it does not fire."""
        mine, values = self.of(feature)
        if not len(mine):
            return np.zeros(len(rows), np.float32)
        place = np.minimum(np.searchsorted(mine, rows), len(mine) - 1)
        return np.where(mine[place] == rows, values[place], 0.0)

    def strongest(self, feature: int, documents: np.ndarray, n: int) -> list[tuple[int, float]]:
        """The ``n`` strongest activations, (row, value), one per document; of equal ones the earlier."""
        rows, values = self.of(feature)
        order = np.lexsort((rows, -values))
        first = np.sort(np.unique(documents[rows[order]], return_index=True)[1])[:n]
        return [(int(rows[i]), float(values[i])) for i in order[first]]


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
        self.crosscoder, self.store, self.columns, self.tokenizer, self.places = (
            crosscoder,
            store,
            columns,
            tokenizer,
            places,
        )
        table = table.reset_index(drop=True)
        extra = [] if stability is None else [stability.set_index("feature")["stability"]]
        self.table = (
            table.join(pd.concat(extra, axis=1), on="feature") if extra else table.assign(stability=np.nan)
        )
        self.named = {} if named is None else {int(row["feature"]): row for row in named.to_dict("records")}
        self.labels = sorted(
            str(label) for label in self.table["label"].unique() if isinstance(label, str) and label
        )
        self._of, self._against = crosscoder.names[-1], crosscoder.names[0]
        alive = self.table["alive"].astype(bool)
        self._heights, self._edges = np.histogram(self.table.loc[alive, "nrn"], bins=60, range=(0, 1))
        self._norms: torch.Tensor | None = None

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
        table = self.table
        keep = table["nrn"].between(low, high) & (table["frequency"].fillna(0) >= frequency)
        if alive:
            keep &= table["alive"].astype(bool)
        if label:
            keep &= table["label"] == label
        if stable > 0:
            keep &= table["stability"] >= stable
        if SORTS[sort] not in table:
            raise UserError(
                f"the table has no {sort}: this pair's text has no labels, or that part was not computed"
            )
        return table[keep].sort_values(
            [SORTS[sort], "feature"], ascending=[not descending, True], na_position="last", kind="stable"
        )

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
        mean activation adds.
        """
        found = {}
        for name, share in encoder_share(self.crosscoder, self.store, rows, [feature]).items():
            columns = self.crosscoder.columns(name)
            mean = float(self.crosscoder.W_enc[feature, columns].detach() @ self.crosscoder.means[columns])
            found[name] = share[:, 0] - mean
        return found

    def nearest(self, feature: int, n: int = 8) -> list[tuple[int, float]]:
        """The ``n`` features with the highest cosine to this one, (feature, cosine), by decoder rows: all
        models' side by side, scaled.
        """
        rows = self.crosscoder.W_dec.detach()
        if self._norms is None:
            self._norms = rows.norm(dim=1).clamp(min=1e-12)
        cosines = (rows @ rows[feature]) / (self._norms * self._norms[feature])
        cosines[feature] = -2
        best = cosines.topk(min(n, len(cosines) - 1))
        return [(int(i), float(c)) for c, i in zip(best.values, best.indices)]

    def _figure(self, feature: int) -> go.Figure:
        from plotly.subplots import make_subplots

        row, mapped = self.table.iloc[feature], self.places is not None and len(self.places)
        titles = ["NRN, among all alive features", "what each model contributes where it fires"] + [
            "place in the map"
        ] * bool(mapped)
        fig = make_subplots(1, len(titles), subplot_titles=titles, horizontal_spacing=0.08)
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
        fig.add_vline(float(row["nrn"]), line_color=COLOURS["distilled"], line_width=3, row=1, col=1)
        rows, _ = self.columns.of(feature)
        if len(rows):
            some = (
                np.sort(np.random.default_rng(feature).choice(rows, SAMPLE, replace=False))
                if len(rows) > SAMPLE
                else rows
            )
            found = self.contributions(feature, some)
            edges = np.histogram_bin_edges(np.concatenate(list(found.values())), bins=40)
            for name, values in found.items():
                fig.add_scatter(
                    x=(edges[1:] + edges[:-1]) / 2,
                    y=np.histogram(values, edges)[0] / len(some),
                    mode="lines",
                    name=name,
                    line=dict(
                        shape="hvh",
                        dash="solid" if name == self._of else "dot",
                        color=COLOURS.get(name, COLOURS["distilled" if name == self._of else "base"]),
                    ),
                    row=1,
                    col=2,
                )
        if mapped:
            back = self.places if len(self.places) <= POINTS else self.places.sample(POINTS, random_state=0)
            fig.add_scatter(
                x=back["x"],
                y=back["y"],
                mode="markers",
                marker=dict(size=4, color=COLOURS["null"]),
                showlegend=False,
                hovertext=[f"feature {f}" for f in back["feature"]],
                hoverinfo="text",
                row=1,
                col=3,
            )
            here = self.places[self.places["feature"] == feature]
            fig.add_scatter(
                x=here["x"],
                y=here["y"],
                mode="markers",
                marker=dict(size=13, symbol="x", color=COLOURS["distilled"]),
                showlegend=False,
                hovertext=f"feature {feature}",
                hoverinfo="text",
                row=1,
                col=3,
            )
            fig.update_xaxes(visible=False, row=1, col=3).update_yaxes(visible=False, row=1, col=3)
        ticks = [0, 1, 4, 16, 64, 256, 1024, 4096]
        fig.update_yaxes(
            tickvals=np.sqrt(ticks), ticktext=list(map(str, ticks)), title_text="features", row=1, col=1
        )
        fig.update_xaxes(title_text="above its mean, in the units of the activation", row=1, col=2)
        fig.update_yaxes(title_text="share of tokens", tickformat=".0%", row=1, col=2)
        fig.update_xaxes(title_text="0 base only, 1 distilled only", row=1, col=1)
        fig.update_layout(
            title=headline(self.table, feature), width=330 * len(titles), height=340, margin_t=90
        )
        return fig.update_layout(legend=dict(orientation="h", y=-0.3))

    def _evidence(self, feature: int) -> str:
        row = self.table.iloc[feature]
        number = lambda name, form: format(row[name], form) if name in row and pd.notna(row[name]) else None  # noqa: E731
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
        strongest = self.columns.strongest(feature, self.store.documents, n)
        if not strongest:
            return "<p>It never fires on these tokens.</p>"
        lines = []
        for row, value in strongest:
            rows = window(self.store, row, BEFORE, AFTER)
            words = self.tokenizer.convert_ids_to_tokens(self.store.tokens[rows].tolist())
            joint = shaded_tokens(words, self.columns.at(feature, rows), maximum=strongest[0][1]).data
            own = self.contributions(feature, rows)
            gap = own[self._of] - own[self._against]
            most = max(float(np.abs(gap).max()), 1e-9)
            whose = "".join(
                f'<span title="{g:+.3g}" style="border-bottom:3px solid'
                f' {_blend(g / most)}">{html.escape(str(w))}</span> '
                for w, g in zip(words, gap)
            )
            lines.append(
                '<div style="display:flex;white-space:nowrap;font-family:monospace"><span'
                f' style="min-width:4em;color:#555">{value:.2f}</span><div>{joint}<div'
                f' style="line-height:1.7">{whose}</div></div></div>'
            )
        one, other = (
            f'<span style="border-bottom:3px solid {_blend(sign)}">{html.escape(name)}</span>'
            for sign, name in ((1, self._of), (-1, self._against))
        )
        explained = (
            f"Above: where it fires. Below: which model's activation speaks for it, {one} or {other}; hover"
            " for numbers."
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

        wide, style = {"width": "auto"}, {"description_width": "initial"}
        sort = w.Dropdown(
            options=[s for s, c in SORTS.items() if c in self.table],
            value="NRN",
            description="Sort by",
            style=style,
        )
        order = w.ToggleButtons(
            options=[("highest first", True), ("lowest first", False)], style={"button_width": "8em"}
        )
        label = w.Dropdown(
            options=[("any label", ""), *((name, name) for name in self.labels)],
            description="Label",
            style=style,
        )
        nrn = w.FloatRangeSlider(
            value=(0, 1), min=0, max=1, step=0.01, description="NRN", continuous_update=False, style=style
        )
        field = {"min": 0, "style": style, "layout": {"width": "14em"}}
        frequency = w.BoundedFloatText(value=0, max=1, step=0.001, description="Fires on at least", **field)
        stable = w.BoundedFloatText(value=0, max=1, step=0.1, description="Comes back at least", **field)
        stable.disabled = bool(self.table["stability"].isna().all())
        page = w.BoundedIntText(
            value=1, min=1, max=1, description="Page", style=style, layout={"width": "9em"}
        )
        count = w.HTML()
        table = w.Select(rows=12, description="", layout=wide)
        table.add_class("feature-table")
        row = w.BoundedIntText(
            value=1,
            min=1,
            max=1,
            description="Row",
            continuous_update=False,
            style=style,
            layout={"width": "9em"},
        )
        number = w.BoundedIntText(
            value=0,
            max=self.crosscoder.n_features - 1,
            description="Feature number",
            continuous_update=False,
            **field,
        )
        near = w.Dropdown(options=[("nearest features", -1)], description="Go to", style=style)
        output = w.Output()
        mono = w.HTML("<style>.feature-table select { font-family: monospace; font-size: 12px }</style>")
        busy = {"on": False}

        def fill(_=None) -> None:
            found = self.select(
                label.value, nrn.value, frequency.value, stable.value, True, sort.value, order.value
            )
            page.max = max(1, -(-len(found) // PAGE))
            part = found.iloc[(page.value - 1) * PAGE : page.value * PAGE]
            where = f", page {page.value} of {page.max}" if page.max > 1 else ""
            count.value = f"{len(found):,} of {int(self.table['alive'].sum()):,} alive features{where}"
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
            near.options = [
                ("nearest features", -1),
                *((f"feature {f}, cosine {c:.2f}", f) for f, c in self.nearest(feature)),
            ]
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
        row.observe(
            lambda change: (
                None if busy["on"] or not table.options else show(table.options[change["new"] - 1][1])
            ),
            "value",
        )
        fill()
        if first is not None:
            show(check_feature(self.crosscoder, first))
        rows = [
            w.HBox(row)
            for row in ([sort, order, label], [nrn, frequency, stable], [page, row, count], [number, near])
        ]
        return w.VBox([mono, *rows[:3], table, rows[3], output])


def _blend(share: float) -> str:
    """From the base's colour (-1) over transparent (0) to the distilled model's (1)."""
    colour = COLOURS["distilled" if share > 0 else "base"]
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{min(abs(share), 1):.2f})"


def open_explorer(run: Run, parameters: Mapping) -> Explorer:
    """The explorer of a run, from what notebooks 01 to 03 left. UserError says which notebook is missing.

    ``parameters``: notebook 03's max_tokens, top_contexts, nrn_over and seed.
    """
    pair = load_pair(run.pair)
    store = open_store(run, pair)
    crosscoder, mark = open_for_run(run, store)
    names, tokenizer = ("max_tokens", "top_contexts", "nrn_over", "seed"), pair.tokenizer()
    found = inspect(
        crosscoder, store, run.path("features"), mark, tokenizer, *(parameters[name] for name in names)
    )
    return explorer_of(run, crosscoder, store, found.table, found.report, tokenizer, mark)


def explorer_of(
    run: Run,
    crosscoder: CrossCoder,
    store: Store,
    table: pd.DataFrame,
    report: SplitCodes,
    tokenizer: PreTrainedTokenizerBase,
    mark: str,
    named: pd.DataFrame | None = None,
) -> Explorer:
    """The explorer of what notebook 03 has in hand; map and seeds are read where the run has them. ``mark``:
    the crosscoder's.
    """
    columns = Columns.build(
        report, run.path("features") / "columns", fingerprint(mark, store.fingerprint, len(report.rows))
    )
    again = read_part(run, "seeds", crosscoder=mark)
    read = lambda name: (
        pd.read_csv(run.figures / name, keep_default_na=False) if (run.figures / name).is_file() else None
    )  # noqa: E731
    places = read("03_map.csv")
    if places is not None and not set(places["feature"]) <= set(table["feature"]):
        places = None  # of another crosscoder
    return Explorer(
        crosscoder, store, table, columns, tokenizer, places, again.tables.get("stability"), named
    )
