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

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pandas as pd
import torch

from ..activations.store import Store
from ..crosscoder.recurrence import LIMIT
from ..stats import bootstrap, t_interval
from ..steering.ablation import Batch, batches, hidden_at, logits_at, random_like, sample_targets
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


class _Batch:
    """What additions to the residual stream of a batch of documents do to the log-probabilities of its
    targets."""

    def __init__(self, store: Store, models: Sequence, batch: Batch, generator: torch.Generator):
        self.store, self.models, self.batch, self.generator = store, models, batch, generator
        self.token = torch.from_numpy(batch.targets["token"].to_numpy(dtype=np.int64))
        self.intact = [self._scores(number, None) for number in range(len(models))]

    def _scores(self, number: int, added: torch.Tensor | None) -> torch.Tensor:
        batch, layer = self.batch, self.store.layers[self.store.models[number]]
        text = self.models[number], layer, batch.tokens, batch.mask
        if number not in batch.hidden:
            batch.hidden[number] = hidden_at(*text)
        hidden = batch.hidden[number] if added is None else batch.hidden[number] + batch.scatter(added)
        return logits_at(*text, batch.at, targets=self.token, hidden=hidden)[:, 1].double()

    def change(self, number: int, added: torch.Tensor, *names: str) -> dict[str, np.ndarray]:
        """Under these names: the change in a model, that by random directions of the same norm, and this
        norm."""
        both = added, random_like(added, self.generator)
        norm = self.batch.visible_mean(added.norm(dim=1)) / self.store.mean_norms[self.store.models[number]]
        changes = [(self._scores(number, a) - self.intact[number]).numpy() for a in both]
        return dict(zip(names, (*changes, norm)))


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
        one = _Batch(store, models, batch, generator)
        for claim, projector in projectors.items():
            frame = one.change(1, (mean - other) @ projector, "lost", "lost_random", "norm")
            if claim == SPAN:
                imposed = (other - base) @ projector
                frame |= one.change(0, imposed, "gained", "gained_random", "norm_imposed")
            records.append(batch.targets[["category", "document", "row"]].assign(claim=claim, **frame))
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
        row: dict = {"truth": truth, "finder": finder, "seeds": len(part)}
        for name in SCORES:
            ends = (name, f"{name}_low", f"{name}_high")
            row |= dict(zip(ends, (part[name].mean(), *interval(name, part[name]))))
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
