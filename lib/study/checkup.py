"""A check-up for a crosscoder: is it what its file and its log say, and what may be read off it?

    page = examine(crosscoder, {0: store}, claims)    # or page_of(source): file, fresh tokens, null, seeds
    print(page)                                       # a line per check: value, what is normal, what it means
    page.html()                                       # the same with figures

Everything is measured on the split "report", which training did not see. A verdict is "sound", "note" (worth
knowing before anything is read off), "fault" or "unknown"; all words are in data/text/checkup.yaml.

**What training has determined of the encoder.** A feature's pre-activation is W_b x_b + W_d x_d. Where both
models hold the same x, it is (W_b + W_d) x: data say nothing of D = (W_b - W_d) / 2, which stays what it was
drawn as. Rows drawn for each model by itself, at norm r, begin with ||D|| = r / sqrt 2; rows drawn once for
both with 0. With S = (W_b + W_d) / 2, training has determined of a row at least 1 - min(||D||, drawn)^2 /
(||S||^2 + ||D||^2).

**Zero rows.** A buffer that is not filled shows rows of zeros, and the crosscoder learns them: x̂(0) = 0. One
that never saw any gives its bias there, about as far from 0 as the mean activation is."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jinja2
import numpy as np
import pandas as pd
import plotly.express as px
import plotly.graph_objects as go
import torch

from ..activations.harvest import harvest_layers
from ..activations.store import Store
from ..crosscoder import recurrence, seeds, sharing
from ..crosscoder.claims import CLAIMS, Claims, claims_of
from ..crosscoder.codes import firing_frequency
from ..crosscoder.health import health_card
from ..crosscoder.model import CrossCoder
from ..crosscoder.plots import nrn_histogram
from ..crosscoder.recurrence import LIMIT as LIMIT  # named in the words, as are the constants below
from ..features.uniqueness import of_seed, score_table
from ..models.pairs import Pair, layer_of, load_pair
from ..results import read_part
from ..runs import Run
from ..settings import ROOT, Count, NotNegative, UserError, check, check_kinds, read_text
from ..text.corpus import build
from ..text.tables import table
from .nulls import rates, thresholds

GOOD, POOR = 0.8, 0.5  # FVE: below GOOD little means anything (docs/own_pair.md), below POOR nothing
NEAR = 0.05  # of an FVE, by which other text may lower it
OFF = 1.25  # factor by which an L0 may differ from what is claimed
ALIVE, HALF = 0.9, 0.5  # share of the dictionary
FILLED = 0.25  # of ||mean||^2: a crosscoder that learnt zero rows is off by less at 0
CENTRED = 0.02  # of the mean square: a smaller mean does not tell zero rows from others
ZEROS = 0.1  # share of zero rows in a log's first batch
SAME = 0.02  # spread over mean of encoder rows' lengths, below which they are as they were drawn
AS_DRAWN = (0.7, 1.4)  # ||D|| over what was drawn, where training has not changed it
OFTEN, TOO_OFTEN = 10, 100  # times that each token was shown
FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)  # of the scale, for the figure
TOKENS = 1024  # for one FVE
FACTS = {  # that may be given of a file
    "order": list[str],
    "scales": dict[str, NotNegative] | Literal["store"],
    "layer": Count | dict[str, Count],
    **CLAIMS,
}


@dataclass(frozen=True)
class Page:
    """``lines``: a table with check, value, normal, verdict, meaning; ``figures``."""

    subject: str
    lines: pd.DataFrame
    figures: Sequence[go.Figure]

    def named(self, verdict: str) -> list[str]:
        """The checks with this verdict."""
        return self.lines.check[self.lines.verdict == verdict].tolist()

    @property
    def summary(self) -> str:
        if faults := self.named("fault"):
            return f"Not sound: {', '.join(faults)}."
        words = {"worth knowing": self.named("note"), "not known": self.named("unknown")}
        rest = "; ".join(f"{word}: {', '.join(names)}" for word, names in words.items() if names)
        return "Sound in all that could be checked" + (f" ({rest})." if rest else ".")

    def __str__(self) -> str:
        lines = (
            f"{line.verdict:8}{line.check}: {line.value}\n{'':8}Normal: {line.normal}.\n{'':8}{line.meaning}"
            for line in self.lines.itertuples()
        )
        return "\n\n".join([f"{self.subject}\n{self.summary}", *lines])

    def html(self) -> str:
        """One file that needs no network: plotly is in it."""
        look = dict(full_html=False, config={"displaylogo": False, "displayModeBar": False})
        figures = enumerate(self.figures)
        parts = [fig.to_html(include_plotlyjs=not i, div_id=f"figure{i}", **look) for i, fig in figures]
        template = ROOT / "docs" / "templates" / "checkup.html.j2"
        style = template.with_name("report.css").read_text(encoding="utf-8")
        return jinja2.Template(read_text(template), autoescape=True).render(
            page=self, style=style, parts=parts
        )


def examine(
    crosscoder: CrossCoder,
    stores: Mapping[int, Store],
    claims: Claims | None = None,
    limits: pd.DataFrame | None = None,
    others: Sequence[CrossCoder] = (),
    subject: str = "Check-up",
) -> Page:
    """All checks. ``stores`` {layers above the stated one: store}, 0 among them; ``limits``: a null's
    ``thresholds``; ``others``: crosscoders that differ in their seed alone."""
    claims, store, lines = claims or Claims(), stores[0], []

    def line(key: str, outcome: str, value: str, **fields) -> None:
        texts = (table("checkup")[key][name] for name in ("check", "normal", outcome))
        name, normal, meaning = (text.format_map(globals() | fields) for text in texts)
        lines.append((name, value, normal, outcome.split(",")[0], meaning))

    card, scores = health_card(crosscoder, store), score_table(crosscoder, store, n_boot=0)
    alive, dead = scores["alive"].to_numpy(bool), card["dead_fraction"]["value"]
    for name in crosscoder.names:
        value, (low, high) = (card[f"fve_{name}"][key] for key in ("value", "ci"))
        said = claims.fve.get(name)
        short = said is not None and POOR <= value < said - NEAR
        outcome = "fault, claim" if short else _grade(value >= GOOD, value < POOR)
        line("fve", outcome, f"{value:.2f} [{low:.2f}, {high:.2f}]{_said(said)}", name=name)
    value, said = card["l0"]["value"], claims.l0
    said = crosscoder.k if said is None and crosscoder.variant != "l1" else said
    outcome = "unknown" if said is None else "fault, more" if value > said * OFF else "fault, fewer"
    outcome = "sound" if said and said / OFF <= value <= said * OFF else outcome
    line("l0", outcome, f"{value:.1f}{_said(said)}")
    value = f"{1 - dead:.0%}; {dead:.0%} fire on none of {len(store.rows('report')):,} tokens"
    line("alive", _grade(1 - dead >= ALIVE, 1 - dead < HALF), value)
    _fit(line, crosscoder, store, claims)
    at_layers = _by_layer(line, crosscoder, stores)
    acts = store.activations(sharing.sample(store, TOKENS))
    _zero_rows(line, crosscoder, acts, claims)
    if alive.any():
        _encoder(line, crosscoder, alive, claims)
    if claims.shown and claims.distinct:
        times = claims.shown / claims.distinct
        value = f"{claims.shown:,} shown, {claims.distinct:,} distinct: each {times:,.1f} times"
        line("tokens", _grade(times <= OFTEN, times > TOO_OFTEN), value)
    else:
        line("tokens", "unknown", "not told")
    _nrn(line, scores, limits)
    _recurrence(line, [crosscoder, *others], store, alive)
    nrn = nrn_histogram(scores[alive].rename(columns={"nrn": "nrn_p1"}))[0]
    columns = ["check", "value", "normal", "verdict", "meaning"]
    return Page(subject, pd.DataFrame(lines, columns=columns), [_plot_fit(crosscoder, acts, at_layers), nrn])


def _grade(good: bool, poor: bool) -> str:
    return "sound" if good else "fault" if poor else "note"


def _said(value: float | None) -> str:
    return "" if value is None else f" (said to be {value:.3g})"


def _fit(line, crosscoder: CrossCoder, store: Store, claims: Claims) -> None:
    least = {n: 1 - sharing.FAR * (1 - claims.fve[n]) if n in claims.fve else POOR for n in crosscoder.names}
    value = ", ".join(f"{n} times {s:.3g}" for n, s in zip(crosscoder.names, crosscoder.scales.tolist()))
    try:
        sharing.check_on_data(crosscoder, store, least)
    except UserError as reason:
        line("scales", "fault", value, reason=reason)
    else:
        line("scales", "sound", value)


def _by_layer(line, crosscoder: CrossCoder, stores: Mapping[int, Store]) -> pd.DataFrame:
    """A row per layer: layer, FVE of each model, what is left; with the given scales or the layer's own,
    whichever explain more."""
    rows, given = {}, crosscoder.scales.tolist()
    for above, store in sorted(stores.items()):
        acts = store.activations(sharing.sample(store, TOKENS))
        own = [store.scales[name] / scale for name, scale in zip(crosscoder.names, given)]
        ways = [sharing.fve(crosscoder, [a * c for a, c in zip(acts, cs)]) for cs in ([1.0] * len(acts), own)]
        best = min(ways, key=sharing.unexplained)
        rows[above] = {"layer": max(store.layers.values()), **best, "left": sharing.unexplained(best)}
    layers = pd.DataFrame.from_dict(rows, orient="index")
    best, share = layers.loc[layers["left"].idxmin(), "layer"], layers["left"].min() / layers.loc[0, "left"]
    outcome = "unknown" if len(rows) == 1 else "fault" if share < sharing.NAMED else "sound"
    tried = ", ".join(map(str, layers["layer"]))
    value = f"output of decoder layer {layers.loc[0, 'layer']}"
    line("layer", outcome, value, best=best, share=share, tried=tried)
    return layers


@torch.no_grad()
def _zero_rows(line, crosscoder: CrossCoder, acts: Sequence[torch.Tensor], claims: Claims) -> None:
    x = crosscoder.scaled(acts).double()
    mean, f = x.mean(0).square().sum(), crosscoder.encode([torch.zeros(1, w) for w in crosscoder.widths])
    off = float((f @ crosscoder.W_dec + crosscoder.b_dec).square().sum() / mean)
    value = f"at 0 it is off by {off:.2f} of the mean's square, and {int((f > 0).sum())} features fire"
    if claims.zero_rows is not None:
        value += f"; {claims.zero_rows:.0%} of the first rows in its log were zeros"
    centred = mean < CENTRED * x.square().sum(-1).mean()
    learnt = (claims.zero_rows or 0) > ZEROS or (off < FILLED and not centred)
    line("zeros", "fault" if learnt else "unknown" if centred else "sound", value)


def _encoder(line, crosscoder: CrossCoder, alive: np.ndarray, claims: Claims) -> None:
    parts = [part[torch.tensor(alive)] for part in crosscoder.split(crosscoder.W_enc.detach())]
    for name, part in zip(crosscoder.names, parts):
        lengths = part.norm(dim=-1)
        spread = float(lengths.std(correction=0) / lengths.mean())
        value = f"its rows are {lengths.median():.3g} long and differ by {spread:.0%}"
        line("encoder", "fault" if spread < SAME else "sound", value, name=name)
    if len(parts) != 2 or len(set(crosscoder.widths)) > 1:  # there is no W_b - W_d
        return
    sums, differences = (((parts[0] + sign * parts[1]) / 2).norm(dim=-1) for sign in (1, -1))
    left = differences.clamp(max=claims.drawn).square() / (sums.square() + differences.square())
    length, cosine = float(differences.median()), torch.cosine_similarity(*parts, dim=-1).median()
    value = f"at least {1 - left.median():.0%} of a row; ||W_b - W_d|| / 2 is {length:.3g}, drawn as"
    value += f" {claims.drawn:.3g}; cosine of the two parts {cosine:.2f}"
    drawn = AS_DRAWN[0] * claims.drawn < length < AS_DRAWN[1] * claims.drawn
    line("determined", "note" if drawn else "sound", value)


def _nrn(line, scores: pd.DataFrame, limits: pd.DataFrame | None) -> None:
    own = scores[scores["alive"]]
    over, under = (own["nrn"] > 0.9).mean(), (own["nrn"] < 0.1).mean()
    value = f"mean {own['nrn'].mean():.3f}, {over:.1%} over 0.9, {under:.1%} under 0.1"
    if hidden := int((own["shrinkage"] | own["decoupling"]).sum()):
        value += f"; {hidden} of these are in the other model too, by latent scaling"
    if limits is None:
        return line("nrn", "unknown", value)
    found = rates(scores, limits).query("side == 'distilled' and level == 0.01").set_index("score")
    value += f"; beyond the null {found.rate['nrn']:.1%} by NRN, {found.rate['nu_eps']:.1%} by nu"
    more = found.low[["nrn", "nu_eps"]].max() > 0.01  # whatever the null's limit may be in its interval
    return line("nrn", "sound" if more else "note", value)


def _recurrence(line, crosscoders: Sequence[CrossCoder], store: Store, alive: np.ndarray) -> None:
    if len(crosscoders) == 1:
        return line("recurrence", "unknown", "one seed")
    every = [alive, *(firing_frequency(other, store) > 0 for other in crosscoders[1:])]
    own = recurrence.recurrent(crosscoders, every).query("crosscoder == 0")
    share, chance = own["recurrent"].mean(), recurrence.chance(crosscoders, every)
    value = f"{share:.0%} recur in {len(crosscoders)} crosscoders; median cosine "
    value += f"{own['stability'].median():.2f}, by chance {chance:.2f}"
    return line("recurrence", "sound" if share > HALF else "note", value)


def _plot_fit(crosscoder: CrossCoder, acts: Sequence[torch.Tensor], layers: pd.DataFrame) -> go.Figure:
    names = list(crosscoder.names)
    scales = pd.DataFrame([{"at": c, **sharing.fve(crosscoder, [a * c for a in acts])} for c in FACTORS])
    at = f"output of decoder layer (stated: {layers.loc[0, 'layer']})"
    panels = {at: layers.rename(columns={"layer": "at"}), "times the scale": scales}
    frame = pd.concat(t.assign(panel=panel, at=t["at"].map("{:g}".format)) for panel, t in panels.items())
    frame = frame.melt(["at", "panel"], names, "model", "variance explained")
    look = dict(color="model", facet_col="panel", facet_col_spacing=0.08, markers=True)
    title = "Is it the layer and the scale of its training?"
    fig = px.line(frame, x="at", y="variance explained", title=title, **look)
    fig.update_xaxes(matches=None, type="category").update_yaxes(range=[-0.05, 1.02])
    for column, panel in enumerate(panels, 1):
        fig.update_xaxes(title_text=panel, col=column)
    return fig.for_each_annotation(lambda a: a.update(text=""))


# --- from a file --------------------------------------------------------------------------------------------


def page_of(
    source: str | Path,
    pair: str = "tiny",
    run: str = "default",
    facts: Mapping | None = None,
    log: Path | None = None,
    null: str = "",
    others: Sequence[str] = (),
    reach: int = 2,
    tokens: int = 100_000,
) -> Page:
    """``examine`` the crosscoder that ``sharing.open_crosscoder`` calls ``source``, on ``tokens`` of the
    pair's text (a tenth of them is "report"), at its layer and ``reach`` ones on each side.

    ``facts``: what its file does not say: order, scales ("store": those of these tokens), layer; and claims
    to be tested: fve (a number, or {model: number}), l0, shown, distinct. ``log``: of its training.
    ``null``: a crosscoder of base and null_a; without it the run's part "nulls", if it is about this very
    crosscoder. ``others``: with other seeds; of a run's crosscoder they are found."""
    facts = dict(facts or {})
    if unknown := sorted(facts.keys() - FACTS.keys()):
        raise UserError(f"unknown fact {unknown[0]!r} about the crosscoder: there are {', '.join(FACTS)}")
    check_kinds(facts, {name: FACTS[name] for name in facts})
    models, path = load_pair(pair), sharing.find(source)
    folder, from_store = Run(pair, run).path("checkup"), facts.get("scales") == "store"

    def opened(path: Path, *names: str) -> sharing.Foreign:
        scales = dict.fromkeys(names, 1.0) if from_store else facts.get("scales")
        own = layer_of(min(models.depths), models.layer) if sharing.is_ours(path) else None
        layer = facts.get("layer", own)
        return sharing.read(path, names, facts.get("order"), scales, layer)

    def fitted(foreign: sharing.Foreign, store: Store) -> CrossCoder:
        one = foreign.crosscoder
        if from_store:
            one.scales.copy_(torch.tensor([store.scales[name] for name in one.names]))
        if not foreign.has_means:
            one.means.copy_(one.scaled([store.means[name] for name in one.names]))
        return one

    foreign = opened(path, *models.models)
    stores = _harvested(models, foreign.layers, folder, reach, tokens)
    crosscoder, limits = fitted(foreign, stores[0]), None
    if sharing.is_ours(path) and not others:
        others = sorted(path.parent.glob(f"{path.name}_[0-9]"))
    seeded = [fitted(opened(sharing.find(other), *models.models), stores[0]) for other in others]
    if null:
        between = opened(sharing.find(null), "base", "null_a")
        store = _harvested(models.between("base", "null_a"), between.layers, folder / "null_a", 0, tokens)[0]
        limits = thresholds(score_table(fitted(between, store), store, None, "null_a", n_boot=0))
    elif part := read_part(Run(pair, run), "nulls", crosscoder=seeds.content(crosscoder)):
        limits = of_seed(part.tables["thresholds"], 0)
    subject = f"Check-up of {source} on {len(stores[0].rows('report')):,} fresh tokens of {pair}"
    return examine(crosscoder, stores, claims_of(foreign, path, log, facts), limits, seeded, subject)


def _harvested(
    pair: Pair, layers: Mapping[str, int], folder: Path, reach: int, tokens: int
) -> dict[int, Store]:
    """{layers above the stated one: store}."""
    stated, depth = min(layers.values()), min(pair.depths)
    if max(layers.values()) > stated:
        raise UserError(
            f"the crosscoder reads the layers {dict(layers)}: a check-up reads all models at one layer"
        )
    check("layer", stated, int, low=0, high=depth - 1)
    tried = range(max(stated - reach, 0), min(stated + reach, depth - 1) + 1)
    stores = harvest_layers(pair, build(pair, tokens), {folder / f"layer_{layer}": layer for layer in tried})
    return {layer - stated: store for layer, store in zip(tried, stores)}
