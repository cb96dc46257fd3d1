"""How good claims are.

precision     share of the first n claims that are right (n of the truth: the same for all finders)
recall        share of what is to be found that they find
f1            harmonic mean of both
calibration   mean distance of confidence from the share of right claims, over fifths of confidence
recurrence    share of the first n claims that another seed makes too (same side, cosine of at least LIMIT)
null_claims   how many of the first n claims on the null, all false, have a confidence of at least SURE
necessity     nats of log-probability that the behaviours' first words lose per unit of removed norm, when
              the span of the first n claims is taken out of the distilled model (mean ablation)
sufficiency   nats that they gain per unit of norm, when in the base what it has in that span is replaced
              by what the distilled model has there

Of necessity and sufficiency what random directions of the same norm do at the same positions is taken away.
The unit of norm is the mean norm of the residual stream. Both are of claims of the distilled side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import pandas as pd
import torch

from ..activations.store import Store
from ..crosscoder.recurrence import LIMIT
from ..stats import bootstrap, t_interval
from ..steering.ablation import Batch, batches, changed, hidden_at, logits_at, random_like, sample_targets
from .claims import SIDES, Claims
from .finder import Data
from .truths import Truth, opened

SURE = 0.5
FIFTHS = 5
SPAN = -1  # number of the span of all claims, among claims
SHARES = ("precision", "recall", "f1", "calibration", "recurrence")
SCORES = (*SHARES, "null_claims", "necessity", "sufficiency")


def score(truth: Truth, data: Data, claims: Claims, targets: int) -> dict[str, float]:
    """precision, recall, f1, calibration, claims (how many there are); where the outcome is causal also
    necessity and sufficiency, on ``targets`` positions per category of the split "report"."""
    row: dict[str, float] = {"claims": len(claims)}
    if truth.causal:  # what is in the base alone cannot be removed from the distilled model
        claims = claims.some(np.flatnonzero(claims.side == "distilled")[: truth.claims])
        models = [opened(truth.pair, m) for m in data.store.models]
        sites = sample_targets(data.store, targets, "report")
        effects = causal_effects(data.store, models, sites, claims.own("distilled"))
        row |= span_effects(effects)
        right, recall = causal_claims(effects, len(claims))
    else:
        right, recall = truth.judge(data, claims)
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
    shares = [[_again(one, other) for other in first if other is not one] for one in first]
    return [float(np.mean(own)) if own else float("nan") for own in shares]


def _again(one: Claims, other: Claims) -> float:
    cosines = (one.own(side) @ other.own(side).T for side in SIDES)
    found = sum((cosine.max(1, initial=-1) >= LIMIT).sum() for cosine in cosines)
    return found / len(one) if len(one) else float("nan")


def null_claims(claims: Claims, n: int) -> int:
    return int((claims.confidence[:n] >= SURE).sum())


def _log_probabilities(store: Store, models: Sequence, batch: Batch, number: int, added=None) -> np.ndarray:
    """Of a batch's targets in a model to whose residual stream ``added`` [kept tokens, d] is added."""
    text = models[number], store.layers[store.models[number]], batch.tokens, batch.mask
    if number not in batch.hidden:
        batch.hidden[number] = hidden_at(*text)
    hidden = batch.hidden[number]
    hidden = hidden if added is None else changed(hidden, batch.scatter(added))
    token = torch.from_numpy(batch.targets["token"].to_numpy(dtype=np.int64))
    return logits_at(*text, batch.at, targets=token, hidden=hidden)[:, 1].double().numpy()


@torch.no_grad()
def causal_effects(
    store: Store, models: Sequence, targets: pd.DataFrame, rows: np.ndarray, seed: int = 0
) -> pd.DataFrame:
    """One row per target and claim (SPAN: of the span of all): category, document, row, claim; lost,
    lost_random, norm: change of the target's log-probability in the second model without the direction, or
    without a random one of the same norm, and that norm; of the span also gained, gained_random,
    norm_imposed, in the first model.

    ``rows`` [n, d]: the claims' directions in the second model. ``models``: the first and the second.
    """
    v, generator, records = torch.from_numpy(rows).float(), torch.Generator().manual_seed(seed), []
    projectors = {SPAN: _projector(v)} | {i: _projector(v[i : i + 1]) for i in range(len(v))}
    mean = store.means[store.models[1]].float()
    for batch in batches(store, targets, 64):
        base, other = store.activations(batch.kept_rows)
        scores = partial(_log_probabilities, store, models, batch)
        intact = scores(0), scores(1)
        steps = [(1, mean - other, "lost", "norm"), (0, other - base, "gained", "norm_imposed")]
        for claim, projector in projectors.items():
            frame = batch.targets[["category", "document", "row"]].assign(claim=claim)
            for number, step, name, norm in steps if claim == SPAN else steps[:1]:
                added = step @ projector
                for column, vectors in ((name, added), (f"{name}_random", random_like(added, generator))):
                    frame[column] = scores(number, vectors) - intact[number]
                frame[norm] = batch.visible_mean(added.norm(dim=1)) / store.mean_norms[store.models[number]]
            records.append(frame)
    return pd.concat(records, ignore_index=True)


def _projector(v: torch.Tensor) -> torch.Tensor:
    """Onto the span of some rows [d, d]; 0 of none."""
    _, values, basis = torch.linalg.svd(v, full_matrices=False)
    basis = basis[values > 1e-5 * values.max()] if len(v) else basis
    return basis.T @ basis


def span_effects(effects: pd.DataFrame) -> dict[str, float]:
    """necessity and sufficiency, of ``causal_effects``; NaN where nothing was removed or imposed."""
    span = effects[effects["claim"] == SPAN]

    def per_norm(change: str, norm: str) -> float:
        own, total = (span[change] - span[f"{change}_random"]).sum(), span[norm].sum()
        return float(own / total) if total > 1e-9 else float("nan")

    return {"necessity": -per_norm("lost", "norm"), "sufficiency": per_norm("gained", "norm_imposed")}


def causal_claims(effects: pd.DataFrame, n: int) -> tuple[np.ndarray, Callable]:
    """(is each of n claims right? bool [n], the recall of a mask of claims). A claim is right if the targets
    of some category lose more without it than without a random direction of the same norm: the 95% interval
    over documents, divided by the number of categories (Bonferroni), lies below 0. Recall: the share of the
    categories of which this is true for some claim."""
    categories = effects["category"].unique()
    hits = np.zeros((n, len(categories)), dtype=bool)
    for (claim, category), part in effects[effects["claim"] != SPAN].groupby(["claim", "category"]):
        own, level = part["lost"] - part["lost_random"], 1 - 0.05 / len(categories)
        _, high = bootstrap(own, groups=part["document"], level=level)
        hits[claim, list(categories).index(category)] = high < 0
    return hits.any(1), lambda some: float(hits[some].any(0).mean())


def interval(name: str, values: pd.Series) -> tuple[float, float]:
    """95%, of the mean of a score over seeds (Student's t; NaN of a single seed), cut to what it can be."""
    most = 1.0 if name in SHARES else np.inf
    least = -np.inf if name in ("necessity", "sufficiency") else 0.0
    return tuple(np.clip(t_interval(values), least, most).tolist())


def summary(scores: pd.DataFrame) -> pd.DataFrame:
    """Means over seeds, with intervals over them (``interval``): a row per truth and finder: seeds, and each
    of SCORES with _low and _high."""
    rows = []
    for (truth, finder), part in scores.groupby(["truth", "finder"], sort=False):
        row = {"truth": truth, "finder": finder, "seeds": len(part)}
        for name in SCORES:
            ends = (name, f"{name}_low", f"{name}_high")
            row |= dict(zip(ends, (part[name].mean(), *interval(name, part[name]))))
        rows.append(row)
    return pd.DataFrame(rows)
