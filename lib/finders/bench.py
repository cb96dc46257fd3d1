"""The test: every finder on every truth, with several seeds; kept cell by cell, so that it goes on where it was
interrupted.

    python -m lib bench-finders "diff-SAE"          # or a file of claims
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pandas as pd
import plotly.express as px
import plotly.graph_objects as go

from ..figures import COLOURS, plain_titles
from ..models.pairs import load_pair
from ..results import Part, interval_text
from ..runs import Progress, fingerprint, kept, write_json
from ..settings import UserError
from ..stats import t_interval
from ..study.variants import Variant, metric, open_variant, part_of_study
from . import dictionaries, means  # noqa: F401  (they enter their finders)
from .claims import Claims, Place, read_claims, write_claims
from .finder import FINDERS, fit
from .scores import SCORES, merge_null, null_claims, recurrence, score, summary
from .truths import TRUTHS, Budget, Truth, truth

VERSION = 1  # of finders and scores
NRN = "BatchTopK crosscoder, NRN"
CONTROL = "random features"  # no finder
DECIDING = ("planted", "control", "tiny")  # truths on which a finder must beat NRN to be shown beside it
SHOWN = {  # score: what the figure says of it
    "precision": "precision",
    "recall": "recall",
    "recurrence": "recurrence over seeds",
    "null_claims": "sure claims on the null",
}
EFFECTS = {"necessity": "nats lost per removed norm", "sufficiency": "nats gained per imposed norm"}


def cell(
    name: str, one: Truth, place: Place, budget: Budget, folder: Path, given: Claims | None = None
) -> tuple[Claims, dict]:
    """(claims, scores) of a finder, or of ``given`` claims, at a truth, seed and null; kept in ``folder``."""
    _, seed, null = place
    decided = one.planted or [load_pair(one.pair).fingerprint(m) for m in ("base", "distilled", "null_a")]
    key = fingerprint(
        "finders", VERSION, name, one.name, seed, null, decided, asdict(budget), given and given.plain()
    )
    slug = "".join(c if c.isalnum() else "_" for c in name)

    def make(scratch: Path) -> None:
        data = one.open(budget, seed, folder, null)
        claims = fit(name, data) if given is None else given
        write_claims(scratch / "claims.json", name, {place: claims})
        if null:
            row = {"null_claims": null_claims(claims, one.claims)}
        else:
            row = score(one, data, claims, budget.targets)
        write_json(scratch / "scores.json", {k: None if np.isnan(v) else float(v) for k, v in row.items()})

    def read(whole: Path) -> tuple[Claims, dict]:
        _, sets = read_claims(whole / "claims.json")
        row = json.loads((whole / "scores.json").read_text(encoding="utf-8"))
        return sets[place], {"truth": one.name, "finder": name, "seed": seed, **row}

    where = Path(folder) / one.name / "cells" / f"{slug}_{'null' if null else 'pair'}_{seed}"
    return kept(where, key, make, read)


def bench(
    names: Sequence[str], truths: Sequence[str], budget: Budget, seeds: int, null_seeds: int, folder: Path
) -> pd.DataFrame:
    """Scores of finders, or files of claims: a row per truth, finder and seed, with SCORES. ``null_seeds``: so
    many of the seeds are tried on the nulls too. A finder that depends on no seed is tried once; one that needs
    labels, where there are some."""
    chosen, files = [truth(name) for name in truths], {}
    for name in names:
        if name not in FINDERS:
            files[name] = _file(name)
    cells: list[tuple] = []
    for one in chosen:
        for name in names:
            label, given = files.get(name, (name, None))
            for place in _places(one, name, seeds, null_seeds, given):
                cells.append((label, one, place, budget, folder, given and given[place]))
    if not cells:
        raise UserError(f"none of {', '.join(names)} can be tested on {', '.join(truths)}")
    rows, nulls, claims = [], [], {}
    with Progress("finders, cells", len(cells)) as progress:
        for number, (label, one, place, *more) in enumerate(cells):
            progress.update(number, f"{label} on {one.name}, seed {place[1]}")
            found, row = cell(label, one, place, *more)
            (nulls if place[2] else rows).append(row)
            if not place[2]:
                claims.setdefault((one.name, label), []).append(found)
        progress.update(len(cells))
    for (name, label), each in claims.items():
        own = [row for row in rows if (row["truth"], row["finder"]) == (name, label)]
        for row, share in zip(own, recurrence(each, TRUTHS[name].claims)):
            row["recurrence"] = share
    return merge_null(rows, nulls)


def _file(name: str) -> tuple[str, dict[Place, Claims]]:
    if not Path(name).is_file():
        fit(name, None)  # says which finders there are
    label, sets = read_claims(Path(name), {one.name: one.width for one in TRUTHS.values()})
    if label in FINDERS:
        raise UserError(f"{name} calls its finder {label!r}, which is one of ours: give it another name")
    return label, sets


def _places(one: Truth, name: str, seeds: int, null_seeds: int, given: dict | None) -> list[Place]:
    if given is not None:
        return [place for place in given if place[0] == one.name]
    if FINDERS[name].labels and not one.pair:
        return []
    some = (seeds, null_seeds) if FINDERS[name].seeded else (1, min(1, null_seeds))
    return [(one.name, seed, null) for null, n in zip((False, True), some) for seed in range(n)]


# --- the part "finders" -------------------------------------------------------------------------------------


@part_of_study("finders", VERSION)
def compute_finders(
    variant: Variant, truths: tuple = tuple(TRUTHS), seeds: int = 4, null_seeds: int = 2,
    planted_tokens: int = 400_000, tokens: int = 300_000, epochs: int = 2, targets: int = 60,
) -> tuple[dict, dict]:  # fmt: skip
    """The part "finders": all of FINDERS on some truths (``bench``). Tables "scores", "summary"; metrics:
    ``named``."""
    budget = Budget(planted_tokens, tokens, epochs, targets)
    table = bench(list(FINDERS), truths, budget, seeds, null_seeds, variant.folder("finders"))
    return named(table), {"scores": table, "summary": summary(table)}


def named(scores: pd.DataFrame) -> dict[str, dict]:
    """finders, truths; for each truth t best_precision_<t>, best_recall_<t>, null_claims_<t>, and necessity_<t>,
    sufficiency_<t> where there are models: of the finder with the highest F1 of the first seed, over the other
    seeds; the same with nrn_ in front for the crosscoder by NRN, over the same seeds."""
    entered = scores[scores["finder"] != CONTROL]
    metrics = {"finders": metric(entered["finder"].nunique()), "truths": metric(scores["truth"].nunique())}
    for name, group in entered.groupby("truth", sort=False):
        for finder, nrn in ((best(group), ""), (NRN, "nrn_")):
            own = group[group["finder"] == finder]
            later = own[own["seed"] > 0] if len(own) > 1 else own
            for score_name in ("precision", "recall", "necessity", "sufficiency", "null_claims"):
                values = (own if score_name == "null_claims" else later)[score_name].dropna()
                if len(values) or score_name in ("precision", "recall", "null_claims"):
                    front = nrn if nrn or score_name == "null_claims" else "best_"
                    ci = t_interval(values) if len(values) > 1 else None
                    metrics[f"{front}{score_name}_{name}"] = metric(values.mean(), ci, len(values))
    return metrics


def best(group: pd.DataFrame) -> str:
    """The finder with the highest F1 of the first seed, of the scores at one truth."""
    first = group[(group["seed"] == 0) & (group["finder"] != CONTROL)]
    return first.set_index("finder")["f1"].idxmax()


def beats(scores: pd.DataFrame, reference: str = NRN) -> pd.DataFrame:
    """F1 of each finder minus that of the reference, seed by seed: truth, finder, gain, low, high (95%, over
    seeds), beats (low above 0)."""
    rows = []
    for (name, finder), part in scores.groupby(["truth", "finder"], sort=False):
        other = scores[(scores["truth"] == name) & (scores["finder"] == reference)].set_index("seed")["f1"]
        own = part.set_index("seed")["f1"]
        gain = own - other if len(own) > 1 else own.iloc[0] - other
        if finder != reference:
            low, high = t_interval(gain)
            rows.append((name, finder, gain.mean(), low, high, bool(low > 0)))
    return pd.DataFrame(rows, columns=["truth", "finder", "gain", "low", "high", "beats"])


def winners(gains: pd.DataFrame) -> list[str]:
    """The finders that beat the crosscoder by NRN on all truths of DECIDING."""
    decided = gains[gains["truth"].isin(DECIDING) & gains["beats"] & (gains["finder"] != CONTROL)]
    counts = decided.groupby("finder", sort=False)["truth"].nunique()
    return list(counts.index[counts == len(DECIDING)])


def shows(part: Part) -> str:
    """For each truth the best finder beside the crosscoder by NRN, in words."""
    lines, say = [], lambda name: interval_text(part.metrics[name])
    for name, group in part.tables["scores"].groupby("truth", sort=False):
        lines.append(
            f"*{name}*: {best(group)}, precision {say(f'best_precision_{name}')}, recall"
            f" {say(f'best_recall_{name}')} (by NRN {say(f'nrn_precision_{name}')} and"
            f" {say(f'nrn_recall_{name}')})"
        )
    return "Best finder of each truth: " + "; ".join(lines) + "."


def plot(scores: pd.DataFrame, name: str) -> go.Figure:
    """The scores of all finders at one truth: points are seeds, diamonds their mean."""
    group, causal = scores[scores["truth"] == name], {}
    if group["necessity"].notna().any():
        causal = EFFECTS
    shown = SHOWN | causal
    long = group.melt(["finder", "seed"], list(shown), "score").dropna()
    long["score"] = long["score"].map(shown)
    means = long.groupby(["score", "finder"], sort=False, as_index=False)["value"].mean()
    orders = {"finder": list(group["finder"].unique()), "score": list(shown.values())}
    look = dict(y="finder", x="value", facet_col="score", category_orders=orders)
    fig = px.scatter(
        means, **look, width=1300, height=540, facet_col_spacing=0.02, title=f"Finders where the truth is: {name}"
    )
    fig.update_traces(marker=dict(symbol="diamond", size=9, color=COLOURS["distilled"]))
    points = px.scatter(long, **look).update_traces(marker=dict(size=5, color=COLOURS["null"]))
    fig.add_traces(points.data)
    return plain_titles(fig.update_xaxes(matches=None, title_text="").update_yaxes(title_text=""))


__all__ = ["SCORES", "bench", "compute_finders", "open_variant"]
