"""How good claims are.

precision     share of the first n claims that are right (n of the truth: the same for all finders)
recall        share of what is to be found that they find
calibration   mean distance between confidence and the share of right claims, over fifths of confidence; 0 is best
recurrence    share of the first n claims that another seed makes too (same side, cosine of at least LIMIT)
null_claims   how many of the first n claims on the null have a confidence of at least SURE: all are false
necessity     nats of log-probability that the behaviours' first words lose per unit of removed norm, when the
              span of the first n claims is removed from the distilled model (mean ablation)
sufficiency   nats that they gain per unit of norm, when in the base what it has in that span is replaced by what
              the distilled model has there

Of necessity and sufficiency what random directions of the same norm do at the same positions is taken away. The
unit of norm is the mean norm of the residual stream. Both are of a span, of claims of the distilled side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch

from ..activations.store import Store
from ..crosscoder.recurrence import LIMIT
from ..stats import bootstrap, t_interval
from ..steering.ablation import batches, hidden_at, logits_at, random_like, sample_targets
from .claims import SIDES, Claims
from .finder import Data
from .truths import Truth, opened

SURE = 0.5
FIFTHS = 5
SPAN = -1  # number of the span of all claims, among claims
SCORES = ("precision", "recall", "f1", "calibration", "recurrence", "null_claims", "necessity", "sufficiency")
LABELS = ("category", "document", "row")


def score(truth: Truth, data: Data, claims: Claims, targets: int) -> dict[str, float]:
    """precision, recall, f1, calibration, claims (how many there are); with a pair's models also necessity and
    sufficiency, on ``targets`` positions per category of the split "report"."""
    row: dict[str, float] = {"claims": len(claims)}
    effects = None
    if truth.pair:
        if truth.causal:  # what is in the base alone cannot be removed from the distilled model
            claims = claims.some(np.flatnonzero(claims.side == "distilled")[: truth.claims])
        first = claims.some(np.flatnonzero(claims.side[: truth.claims] == "distilled"))
        models = [opened(truth.pair, m) for m in data.store.models]
        sites = sample_targets(data.store, targets, "report")
        effects = causal_effects(data.store, models, sites, first.own("distilled"), each=truth.causal)
        row |= span_effects(effects)
    right, recall = causal_claims(effects, len(claims)) if truth.causal else truth.judge(data, claims)
    some = np.arange(len(claims)) < truth.claims
    row["precision"] = right[some].mean() if some.any() else np.nan
    row["recall"] = recall(some)
    total = np.nan_to_num(row["precision"]) + row["recall"]
    row["f1"] = 2 * np.nan_to_num(row["precision"]) * row["recall"] / total if total else 0.0
    row["calibration"] = calibration(claims.confidence, right)
    return row


def calibration(confidence: np.ndarray, right: np.ndarray) -> float:
    """Expected calibration error over FIFTHS bins of equal width; NaN without claims."""
    if not len(right):
        return float("nan")
    bins = np.minimum((confidence * FIFTHS).astype(int), FIFTHS - 1)
    gaps = [abs((confidence[bins == b] - right[bins == b]).sum()) for b in np.unique(bins)]
    return float(sum(gaps) / len(right))


def recurrence(each: Sequence[Claims], n: int) -> list[float]:
    """Of each set of claims: the mean share of its first n that the first n of another set make too; NaN of a
    single set."""
    first = [claims.some(slice(n)) for claims in each]
    shares = []
    for one in first:
        own = [_again(one, other) for other in first if other is not one]
        shares.append(float(np.mean(own)) if own and len(one) else float("nan"))
    return shares


def _again(one: Claims, other: Claims) -> float:
    found = 0
    for side in SIDES:
        cosine = one.own(side) @ other.own(side).T
        found += int((cosine.max(1, initial=-1) >= LIMIT).sum())
    return found / max(len(one), 1)


def null_claims(claims: Claims, n: int) -> int:
    return int((claims.confidence[:n] >= SURE).sum())


@torch.no_grad()
def causal_effects(
    store: Store, models: Sequence, targets: pd.DataFrame, rows: np.ndarray, each: bool, seed: int = 0
) -> pd.DataFrame:
    """One row per target and claim (SPAN: of the span of all): category, document, row, claim; lost,
    lost_random, norm: change of the target's log-probability in the second model without the direction, or
    without a random one of the same norm, and that norm; of the span also gained, gained_random, norm_imposed,
    in the first model.

    ``rows`` [n, d] of unit length; ``each``: also claim by claim. ``models``: the first and the second.
    """
    v, generator, records = torch.from_numpy(rows).float(), torch.Generator().manual_seed(seed), []
    projectors = {SPAN: _projector(v)}
    if each:
        projectors |= {i: _projector(v[i : i + 1]) for i in range(len(v))}
    mean = store.means[store.models[1]].float()
    for batch in batches(store, targets, 64):
        token = torch.from_numpy(batch.targets["token"].to_numpy(dtype=np.int64))
        base, other = store.activations(batch.kept_rows)
        intact = {}

        def change(number: int, added: torch.Tensor) -> np.ndarray:
            """Of the log-probabilities, in a model, when something is added."""
            name = store.models[number]
            text = models[number], store.layers[name], batch.tokens, batch.mask
            if name not in batch.hidden:
                batch.hidden[name] = hidden_at(*text)
                intact[name] = logits_at(*text, batch.at, targets=token, hidden=batch.hidden[name])[:, 1]
            hidden = batch.hidden[name] + batch.scatter(added)
            after = logits_at(*text, batch.at, targets=token, hidden=hidden)[:, 1]
            return (after - intact[name]).double().numpy()

        def both(number: int, added: torch.Tensor, *names: str) -> dict[str, np.ndarray]:
            norm = batch.visible_mean(added.norm(dim=1)) / store.mean_norms[store.models[number]]
            values = change(number, added), change(number, random_like(added, generator)), norm
            return dict(zip(names, values))

        for claim, projector in projectors.items():
            removed = (other - mean) @ projector
            frame = both(1, -removed, "lost", "lost_random", "norm")
            if claim == SPAN:
                frame |= both(0, (other - base) @ projector, "gained", "gained_random", "norm_imposed")
            records.append(batch.targets[list(LABELS)].assign(claim=claim, **frame))
    return pd.concat(records, ignore_index=True)


def _projector(v: torch.Tensor) -> torch.Tensor:
    """Onto the span of some rows [d, d]; 0 of none."""
    _, values, basis = torch.linalg.svd(v, full_matrices=False)
    basis = basis[values > 1e-5 * values.max()] if len(v) else basis
    return basis.T @ basis


def span_effects(effects: pd.DataFrame) -> dict[str, float]:
    """necessity and sufficiency, of ``causal_effects``; NaN where nothing was removed or imposed."""
    span, found = effects[effects["claim"] == SPAN], {}
    names = {"necessity": ("lost", "norm", -1), "sufficiency": ("gained", "norm_imposed", 1)}
    for name, (what, norm, sign) in names.items():
        total = span[norm].sum()
        own = (span[what] - span[f"{what}_random"]).sum()
        found[name] = float(sign * own / total) if total > 1e-9 else float("nan")
    return found


def causal_claims(effects: pd.DataFrame, n: int) -> tuple[np.ndarray, object]:
    """(is each of n claims right? bool [n], the recall of a mask of claims). A claim is right if the targets of
    some category lose more without it than without a random direction of the same norm: the 95% interval over
    documents, divided by the number of categories (Bonferroni), lies below 0. Recall: the share of the
    categories of which this is true for some claim."""
    categories = effects["category"].unique()
    hits = np.zeros((n, len(categories)), dtype=bool)
    for (claim, category), part in effects[effects["claim"] != SPAN].groupby(["claim", "category"]):
        own, level = part["lost"] - part["lost_random"], 1 - 0.05 / len(categories)
        _, high = bootstrap(own, groups=part["document"], level=level)
        hits[claim, list(categories).index(category)] = high < 0
    return hits.any(1), lambda some: float(hits[some].any(0).mean())


def summary(scores: pd.DataFrame) -> pd.DataFrame:
    """Means over seeds, with 95% intervals over them (Student's t; none of a single seed): a row per truth and
    finder: seeds, and each of SCORES with _low and _high."""
    rows = []
    for (truth, finder), part in scores.groupby(["truth", "finder"], sort=False):
        row: dict = {"truth": truth, "finder": finder, "seeds": len(part)}
        for name in SCORES:
            values = part[name].dropna()
            low, high = t_interval(values)
            row |= {name: values.mean(), f"{name}_low": low, f"{name}_high": high}
        rows.append(row)
    return pd.DataFrame(rows)


def merge_null(rows: Sequence[Mapping], nulls: Sequence[Mapping]) -> pd.DataFrame:
    """Scores by truth, finder and seed, with the null_claims of the same seed (NaN where it was not run)."""
    table, keys = pd.DataFrame(rows), ["truth", "finder", "seed"]
    found = pd.DataFrame(nulls, columns=[*keys, "null_claims"])
    table = table.merge(found, "left", keys)
    for name in SCORES:
        table[name] = table.get(name, pd.Series(np.nan, index=table.index)).astype(float)
    return table
