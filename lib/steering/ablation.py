"""Ablation (E4): take features out of the residual stream, and see which tokens lose their support.

All features with NRN above 0.5 whose firing frequency is among the top k% of the alive features are removed
at once, in the forward pass, at the layer that the crosscoder reads::

    h_m  ->  h_m - sum_i f_i d_i^m            for every kept position, in each model m on its own

This form *preserves the error*: what the crosscoder does not explain stays where it is. (Replacing h by a
reconstruction without the features also removes the error, and has eight times the effect: never mix them.) f
is the code of the intact activations of all models; d_i^m are decoder rows in the units of the residual
stream. What is measured is the logit, and the log-probability, of the first token of a sentence of each
category, at the position before it, in documents that were used neither for training nor for choosing.

With NRN > 0.5 the vector removed from the distilled model is the longer one *by construction*. Hence three
controls at the same positions: ``matched``, as many features of the same frequency whose NRN is near 0.5;
``random``, a direction of exactly the norm that is removed there; and the effect per unit of removed norm
(unit: the model's mean residual norm).

That rule cuts through a crowd of features at 0.5. Two other sets mean something; their matched features have
the same frequency and are *outside the set*, whatever their NRN:

    unique       features that recur in other crosscoders and lie beyond the null's limit
    attributed   for each category the features whose removal is predicted to cost it most (``attribution``),
                 chosen on the split "choose"

Source: Baek & Tegmark 2025 (arXiv 2503.03730), section on faithfulness; the controls are ours."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import torch
from nnsight import TransformersModel
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from ..activations.store import SPLITS, Store
from ..crosscoder.codes import encoder
from ..crosscoder.model import CrossCoder, check_feature
from ..labels import CATEGORIES, LABELS
from ..models.reader import head_envoy, layer_envoys
from ..runs import Progress
from ..settings import UserError, check
from ..stats import group_weights, interval, pooled_table

REMOVED = ("features", "matched", "random")
RULES = ("frequent", "unique", "attributed")
HEAD = ["category", "document", "row"]  # of a target


# --- which features, which positions ------------------------------------------------------------------------


@dataclass(frozen=True)
class Removal:
    """Features to be removed together. ``k``: percent of the alive features; ``kind``: one of REMOVED;
    ``rule``: how they were chosen, one of RULES; ``category``: at the targets of this one only ("": at
    all)."""

    k: float
    kind: str
    features: tuple[int, ...]
    rule: str = "frequent"
    category: str = ""


def frequent_features(
    table: pd.DataFrame, k: float, nrn_over: float = 0.5, frequency: str = "frequency"
) -> np.ndarray:
    """The features with NRN above ``nrn_over`` among the k% of alive features that fire most often, sorted by
    number.

    ``table`` has columns feature, alive, nrn and ``frequency``. The k% are counted over all alive features,
    whatever their NRN: with few of them (0.5% of 400 is 2) the result may well be empty."""
    check("k", k, float, low=0.0, high=100.0)
    alive = table[table["alive"].astype(bool)].sort_values([frequency, "feature"], ascending=[False, True])
    top = alive.head(int(np.ceil(len(alive) * k / 100)))
    return np.sort(top.loc[top["nrn"] > nrn_over, "feature"].to_numpy(int))


def matched_features(
    table: pd.DataFrame, removed: Sequence[int], width: float = 0.1, frequency: str = "frequency"
) -> np.ndarray:
    """For each removed feature another one of the nearest firing frequency (on a log scale), with |NRN - 0.5|
    <= ``width``, without replacement, the most frequent first. UserError if there are too few."""
    near = (table["nrn"] - 0.5).abs() <= width
    if (n := int((near & table["alive"] & ~table["feature"].isin(list(removed))).sum())) < len(removed):
        raise UserError(
            f"{len(removed)} features are removed but only {n} others have an NRN within {width} of 0.5:"
            " widen match_width, or take smaller k"
        )
    return matched_outside(table[near | table["feature"].isin(list(removed))], removed, frequency)


def matched_outside(
    table: pd.DataFrame, removed: Sequence[int], frequency: str = "frequency_choose"
) -> np.ndarray:
    """For each removed feature another alive one of the nearest firing frequency (on a log scale) that is not
    removed, without replacement, the most frequent first. UserError if there are too few."""
    pool = table[table["alive"].astype(bool) & ~table["feature"].isin(list(removed))]
    if len(pool) < len(removed):
        raise UserError(f"{len(removed)} features are removed, and only {len(pool)} others are alive")
    log = np.log(table.set_index("feature")[frequency].clip(lower=1e-9))
    free = log[sorted(pool["feature"])]
    chosen = []
    for feature in sorted(removed, key=lambda f: -log[f]):
        chosen.append((free - log[feature]).abs().idxmin())
        free = free.drop(chosen[-1])
    return np.sort(np.array(chosen, dtype=int))


def plan(
    table: pd.DataFrame,
    shares: Sequence[float],
    nrn_over: float = 0.5,
    match_width: float = 0.1,
    frequency: str = "frequency",
) -> list[Removal]:
    """For each k of ``shares`` the frequent features with high NRN, and their matched controls."""
    check("k", list(shares), list, low=0.0, high=100.0)
    removals = []
    for k in sorted(shares):
        features = frequent_features(table, k, nrn_over, frequency)
        matched = matched_features(table, features, match_width, frequency)
        removals.append(Removal(k, "features", tuple(features.tolist())))
        removals.append(Removal(k, "matched", tuple(matched.tolist())))
    return removals


def plan_sets(
    table: pd.DataFrame, unique: Sequence[int] | None, attributed: Mapping[str, Sequence[int]]
) -> list[Removal]:
    """The two sets that mean something, each with matched features outside it: ``unique`` (None or empty: not
    tested), and the features ``attributed`` {category: features}, at targets of that category alone."""
    sets = [("unique", "", unique)] if unique is not None and len(unique) else []
    sets += [("attributed", category, features) for category, features in attributed.items()]
    removals = []
    for rule, category, features in sets:
        for kind, chosen in (("features", features), ("matched", matched_outside(table, features))):
            removals.append(Removal(0.0, kind, tuple(sorted(int(f) for f in chosen)), rule, category))
    return removals


def sample_targets(store: Store, n: int = 100, split: str = "report", seed: int = 0) -> pd.DataFrame:
    """Up to ``n`` positions per category, each right before a sentence of it. One row per position.

    Columns: category, document, row (of the store; the position that predicts) and token (id of the
    sentence's first token, the one predicted). Whole documents are drawn until every category has enough, or
    none is left. A category that does not occur has none; UserError if no category does."""
    check("n", n, int, low=1)
    check("split", split, str, choices=SPLITS)
    label, starts = store.labels["label"], store.labels["starts"] == 1
    first = starts[1:] & (store.documents[1:] == store.documents[:-1]) & store.kept[:-1]
    after = np.flatnonzero(first) + 1
    after = after[store.split[after] == SPLITS.index(split)]
    documents = np.random.default_rng(seed).permutation(np.unique(store.documents[after]))
    order = pd.Series(np.arange(len(documents)), index=documents)
    frames = []
    for category in CATEGORIES:
        rows = after[label[after] == LABELS.index(category)]
        rows = rows[np.argsort(order[store.documents[rows]].to_numpy(), kind="stable")][:n]
        columns = {"document": store.documents[rows], "row": rows - 1, "token": store.tokens[rows]}
        frames.append(pd.DataFrame({"category": category, **columns}))
    if not sum(map(len, frames)):
        raise UserError(
            f"no sentence of the categories {', '.join(CATEGORIES)} in the split {split!r}: harvest more"
            " traces (tokens, trace_share of notebook 01)"
        )
    return pd.concat(frames, ignore_index=True)


# --- the intervention ---------------------------------------------------------------------------------------


def removed_vectors(crosscoder: CrossCoder, codes: Tensor, numbers: Sequence[int]) -> list[Tensor]:
    """What the features write: sum_i f_i d_i^m for each model, [tokens, d_m], in units of its residual
    stream; ``codes`` [tokens, F]. UserError for a feature that the crosscoder does not have."""
    chosen = [check_feature(crosscoder, f) for f in numbers]
    return [codes[:, chosen] @ crosscoder.rows(name, raw=True)[chosen].to(codes) for name in crosscoder.names]


@torch.no_grad()
def logits_at(
    model: TransformersModel,
    layer: int,
    tokens: Tensor,
    mask: Tensor,
    at: tuple[Tensor, Tensor],
    removed: Tensor | None = None,
    remote: bool | str = False,
    targets: Tensor | None = None,
    hidden: Tensor | None = None,
) -> Tensor:
    """Next-token logits [targets, vocabulary] at the positions ``at`` (rows, columns) of a padded batch.

    ``tokens`` and ``mask`` [batch, length], padded on either side; ``removed`` [batch, length, d] is
    subtracted from the output of decoder layer ``layer``. The logits are the model's own, caps and scales
    included, unembedded only where they are asked for (``reader.head_envoy``): at 150,000 tokens those of a
    whole batch would not fit. With ``targets`` [targets], ids of
    tokens: [targets, 2], the logit and the log-probability of these alone, which is all that then comes back
    from where the model runs (``remote``: as nnsight has it). ``hidden`` [batch, length, d] is what the layer
    gives (``hidden_at``), where it is known: then the model begins above it."""
    rows, columns = at
    blocks, head = layer_envoys(model), head_envoy(model)
    with model.trace({"input_ids": tokens, "attention_mask": mask}, remote=remote):
        if hidden is not None:
            for block in blocks[: layer + 1]:
                block.skip(hidden)
        if removed is not None:
            h = blocks[layer].output
            h[:] = h - removed.to(h.device)
        hidden, bias = head.input[rows, columns].float(), head.bias
        bias = None if bias is None else bias.float()
        head.skip(functional.linear(hidden, head.weight.float(), bias)[None])
        found = model.output.logits[0].float()
        if targets is not None:
            token = targets.to(found.device)[:, None]
            found = torch.cat([found.gather(1, token), found.log_softmax(-1).gather(1, token)], dim=1)
        found = found.save()
    return found.cpu()


@torch.no_grad()
def hidden_at(model: TransformersModel, layer: int, tokens: Tensor, mask: Tensor) -> Tensor:
    """Output of decoder layer ``layer`` on a padded batch, [batch, length, d]."""
    with model.trace({"input_ids": tokens, "attention_mask": mask}) as tracer:
        hidden = layer_envoys(model)[layer].output.save()
        tracer.stop()
    return hidden


def changed(hidden: Tensor, by: Tensor) -> Tensor:
    """``hidden`` + ``by``, where ``hidden`` is, and rounded to its dtype once."""
    return (hidden + by.to(hidden.device)).to(hidden.dtype)


def random_like(vectors: Tensor, generator: torch.Generator) -> Tensor:
    """A random direction for every vector of ``vectors`` [..., d], with the norm of that vector."""
    noise = torch.randn(vectors.shape, generator=generator)
    return noise * (vectors.norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True))


def gradients(
    model: TransformersModel,
    layer: int,
    targets: pd.DataFrame,
    store: Store,
    batch_size: int = 32,
    remote: bool | str = False,
) -> Iterator[tuple[Batch, dict[str, Tensor]]]:
    """For each batch of documents and each category with targets in it: the gradient of the sum of its
    targets' log-probabilities with respect to the residual stream at the kept positions, [kept tokens, d]."""
    for batch in batches(store, targets, batch_size):
        rows, columns = batch.at
        token = torch.from_numpy(batch.targets["token"].to_numpy(dtype=np.int64))
        names = list(dict.fromkeys(batch.targets["category"]))
        category = batch.targets["category"].to_numpy()
        chosen = [torch.from_numpy(np.flatnonzero(category == name)) for name in names]
        inputs = {"input_ids": batch.tokens, "attention_mask": batch.mask}
        block, head = layer_envoys(model)[layer], head_envoy(model)
        with torch.enable_grad(), model.trace(inputs, remote=remote):
            h = block.output
            push = torch.zeros(h.shape, device=h.device, requires_grad=True)
            block.output = h + push.to(h.dtype)
            head.skip(functional.linear(head.input[rows, columns], head.weight, head.bias)[None])
            logits = model.output.logits[0].float()
            target = logits.log_softmax(-1).gather(1, token.to(h.device)[:, None])[:, 0]
            sums = [target[some.to(h.device)].sum() for some in chosen]
            each = [torch.autograd.grad(total, push, retain_graph=True)[0] for total in sums]
            found = torch.stack(each).save()
        yield batch, {name: g[batch.kept_at].cpu() for name, g in zip(names, found)}


@torch.no_grad()
def attribution(
    store: Store,
    crosscoders: Sequence[CrossCoder],
    model: TransformersModel,
    targets: pd.DataFrame,
    name: str = "distilled",
    batch_size: int = 32,
    remote: bool | str = False,
) -> list[dict[str, np.ndarray]]:
    """What the removal of each feature is predicted to do to the log-probability of a category's targets, to
    first order: - sum over positions of f_i (d_i . gradient), mean over targets. For each crosscoder
    {category: [F]}; negative: the targets lose. All positions that a target can see count.

    Source: attribution patching (Nanda 2023); for features, Marks et al. 2024 (arXiv 2403.19647)."""
    sizes = targets.groupby("category", sort=False).size()
    totals = [{c: torch.zeros(crosscoder.n_features) for c in sizes.index} for crosscoder in crosscoders]
    rows = [(encoder(crosscoder), crosscoder.rows(name, raw=True)) for crosscoder in crosscoders]
    with Progress("attribution, documents", targets["document"].nunique()) as progress:
        for batch, by_category in gradients(model, store.layers[name], targets, store, batch_size, remote):
            acts = dict(zip(store.models, store.activations(batch.kept_rows)))
            for crosscoder, (encode, decoder), total in zip(crosscoders, rows, totals):
                codes = encode([acts[m] for m in crosscoder.names])
                for category, gradient in by_category.items():
                    total[category] -= (codes * (gradient @ decoder.T)).sum(0)
            progress.update(progress.done + len(batch.mask))
    return [{c: (values / sizes[c]).numpy() for c, values in total.items()} for total in totals]


def attributed_features(attributions: Mapping[str, np.ndarray], n: int) -> dict[str, np.ndarray]:
    """{category: the ``n`` features whose removal is predicted to cost its targets most}, sorted by number;
    fewer, where fewer are predicted to cost anything."""
    check("n", n, int, low=1)
    best = {c: np.argsort(values, kind="stable")[:n] for c, values in attributions.items()}
    return {c: np.sort(f[attributions[c][f] < 0]) for c, f in best.items()}


def measure(
    store: Store,
    crosscoder: CrossCoder,
    models: Mapping[str, TransformersModel],
    targets: pd.DataFrame,
    removals: Sequence[Removal],
    random_draws: int = 2,
    seed: int = 0,
    batch_size: int = 32,
    remote: bool | str = False,
    intact: dict | None = None,
) -> pd.DataFrame:
    """Run every removal in every model (where ``remote`` says). One row per target, model, k and kind of
    removal.

    Columns: category, document, row, model, rule (RULES), k, removed (REMOVED), ``logit`` and
    ``log_probability`` (change against the intact model, of the true next token; negative means that it lost
    support) and ``norm``: the mean norm that was removed over the kept positions that the target can see, in
    units of the model's mean residual norm. ``random`` is the mean over ``random_draws`` draws, with the
    norms of the ``features`` removal of the same rule and k. Removals by other rules than "frequent" are made
    in the distilled model alone. ``intact``: where the intact model's scores are kept for another crosscoder.
    """
    records, generator, encode = [], torch.Generator().manual_seed(seed), encoder(crosscoder)
    intact, categories = {} if intact is None else intact, dict.fromkeys(r.category for r in removals)

    def scores(name: str, batch: Batch, removed: Tensor | None = None) -> np.ndarray:
        """Logit and log-probability of the true next tokens, [targets, 2]."""
        token = torch.from_numpy(batch.targets["token"].to_numpy(dtype=np.int64))
        text = (models[name], store.layers[name], batch.tokens, batch.mask)
        if not remote and name not in batch.hidden:  # the layers below are run once for all removals
            batch.hidden[name] = hidden_at(*text)
        hidden, removed = batch.hidden.get(name), None if removed is None else batch.scatter(removed)
        if hidden is not None and removed is not None:
            hidden, removed = changed(hidden, -removed), None
        found = logits_at(*text, batch.at, removed, remote, token, hidden)
        if not torch.isfinite(found).all():
            raise UserError("a logit is not finite: the model or the crosscoder is damaged")
        return found.double().numpy()

    def known(name: str, batch: Batch) -> np.ndarray:
        key = name, tuple(batch.targets["row"]), tuple(batch.targets["category"])
        if key not in intact:
            intact[key] = scores(name, batch)
        return intact[key]

    parts = {c: targets if c == "" else targets[targets["category"] == c] for c in categories}
    documents = sum(part["document"].nunique() for part in parts.values())
    with Progress("ablation, documents", documents) as progress:
        for category, batch in ((c, b) for c in parts for b in batches(store, parts[c], batch_size)):
            acts = dict(zip(store.models, store.activations(batch.kept_rows)))
            codes = encode([acts[name] for name in crosscoder.names])
            for removal in (r for r in removals if r.category == category):
                kinds = ("features", "random") if removal.kind == "features" else (removal.kind,)
                by_model = zip(crosscoder.names, removed_vectors(crosscoder, codes, removal.features))
                for name, vectors in by_model:
                    if removal.rule != "frequent" and name != "distilled":
                        continue
                    norm = batch.visible_mean(vectors.norm(dim=-1)) / store.mean_norms[name]
                    before = known(name, batch)
                    for kind in kinds:
                        draws, change = [vectors], np.zeros_like(before)
                        if kind == "random":
                            draws = [random_like(vectors, generator) for _ in range(random_draws)]
                        if removal.features:
                            change = np.mean([scores(name, batch, d) for d in draws], axis=0) - before
                        values = dict(logit=change[:, 0], log_probability=change[:, 1], norm=norm)
                        what = dict(model=name, rule=removal.rule, k=removal.k, removed=kind)
                        records.append(batch.targets[HEAD].assign(**what, **values))
            progress.update(progress.done + len(batch.mask))
    return pd.concat(records, ignore_index=True)


@torch.no_grad()
def own_effects(
    store: Store,
    crosscoder: CrossCoder,
    models: Mapping[str, TransformersModel],
    targets: pd.DataFrame,
    shares: Sequence[float],
    seed: int = 0,
    batch_size: int = 32,
) -> pd.DataFrame:
    """E4 as it was published: what stands before a target is replaced by its reconstruction, in which a set
    of features is 0. One row per target, model and k.

    The set: NRN (p = 1, of the second model) above 0.5 and among the k% that fire most often *on the targets*
    of that category; beside it as many random features of the whole dictionary. Columns: category, document,
    row, model, k, set and random (change of the target's logit against the intact model), own (set minus
    random). Not kept positions, such as the first, stay as they are."""
    generator, records, encode = np.random.default_rng(seed), [], encoder(crosscoder)
    nrn = crosscoder.nrn(1, *crosscoder.names[::-1]).numpy()
    decoders = {name: (crosscoder.rows(name, raw=True), crosscoder.bias(name, raw=True)) for name in models}
    for _, part in targets.groupby("category", sort=False):
        often = (encode(store.activations(part["row"].to_numpy())) > 0).float().mean(0)
        order, sets = often.argsort(descending=True, stable=True).numpy(), {}
        for k in shares:
            top = order[: int(np.ceil(crosscoder.n_features * k / 100))]
            chosen = top[nrn[top] > 0.5]
            random = generator.choice(crosscoder.n_features, len(chosen), replace=False)
            sets[k] = {"set": torch.from_numpy(chosen), "random": torch.from_numpy(random)}
        for batch in batches(store, part, batch_size):
            acts = dict(zip(store.models, store.activations(batch.kept_rows)))
            codes = encode([acts[name] for name in crosscoder.names])
            token = torch.from_numpy(batch.targets["token"].to_numpy(dtype=np.int64))
            for name, (rows, bias) in decoders.items():
                text = (models[name], store.layers[name], batch.tokens, batch.mask, batch.at)
                hidden, error = hidden_at(*text[:-1]), acts[name] - codes @ rows - bias
                intact = logits_at(*text, targets=token, hidden=hidden)[:, 0]
                for k, both in sets.items():
                    changes = {}
                    for kind, some in both.items():
                        change = batch.scatter(error + codes[:, some] @ rows[some])
                        replaced = changed(hidden, -change)
                        found = logits_at(*text, targets=token, hidden=replaced)[:, 0]
                        changes[kind] = (found - intact).numpy()
                    frame = batch.targets[HEAD].assign(model=name, k=k, **changes)
                    records.append(frame.assign(own=changes["set"] - changes["random"]))
    return pd.concat(records, ignore_index=True)


def removal_table(table: pd.DataFrame, removals: Sequence[Removal]) -> pd.DataFrame:
    """One row per removal: how many features, their mean frequency (split "choose") and NRN."""
    columns = table.set_index("feature")[["frequency_choose", "nrn"]]
    means = pd.DataFrame([columns.loc[list(r.features)].mean() for r in removals])
    means.columns = ["mean firing frequency", "mean NRN"]
    first = [
        {
            "rule": f"{r.rule} {r.category}".strip(),
            "top %": r.k,
            "removed": r.kind,
            "features": len(r.features),
        }
        for r in removals
    ]
    return pd.concat([pd.DataFrame(first), means], axis=1).round(3)


@dataclass
class Batch:
    """Documents up to their last target, padded on the right. ``kept_at``: (rows, columns) of the kept
    tokens, in the order of ``kept_rows``; ``at``: of the targets. ``hidden`` {model: what its layer gives},
    for who keeps it."""

    tokens: Tensor
    mask: Tensor
    kept_rows: np.ndarray
    kept_at: tuple[np.ndarray, np.ndarray]
    targets: pd.DataFrame
    at: tuple[Tensor, Tensor]
    hidden: dict[str, Tensor] = field(default_factory=dict)

    def scatter(self, vectors: Tensor) -> Tensor:
        """[kept tokens, d] -> [batch, length, d], zero where nothing is kept."""
        full = torch.zeros(*self.tokens.shape, vectors.shape[-1])
        full[self.kept_at] = vectors
        return full

    def visible_mean(self, values: Tensor) -> np.ndarray:
        """Of values [kept tokens]: the mean up to and including each target's position, [targets]."""
        full, count = np.zeros(self.tokens.shape), np.zeros(self.tokens.shape)
        full[self.kept_at], count[self.kept_at] = values.numpy(), 1
        return (full.cumsum(1) / np.maximum(count.cumsum(1), 1))[self.at[0].numpy(), self.at[1].numpy()]


def batches(store: Store, targets: pd.DataFrame, batch_size: int) -> Iterator[Batch]:
    """The documents of ``targets`` (columns document and row, at least), each up to its last target: no model
    sees what comes after it. Those of like length together."""
    edges = np.flatnonzero(np.diff(store.documents)) + 1  # the tokens of a document are consecutive rows
    first = {int(store.documents[start]): int(start) for start in [0, *edges]}
    last = targets.groupby("document")["row"].max()
    rows_of = {int(d): range(first[d], int(row) + 1) for d, row in last.items()}
    documents = sorted(rows_of, key=lambda d: (len(rows_of[d]), d))
    for i in range(0, len(documents), batch_size):
        chosen = documents[i : i + batch_size]
        spans = (slice(rows_of[d].start, rows_of[d].stop) for d in chosen)
        texts = [torch.from_numpy(np.asarray(store.tokens[span], dtype=np.int64)) for span in spans]
        tokens = pad_sequence(texts, batch_first=True)
        mask = pad_sequence([torch.ones_like(text) for text in texts], batch_first=True)
        rows = np.concatenate([rows_of[d] for d in chosen])
        places, kept = mask.nonzero(), np.asarray(store.kept[rows], dtype=bool)  # both in the order of rows
        kept_at = tuple(places[torch.from_numpy(kept)].T.numpy())
        some = targets[targets["document"].isin(chosen)]
        at = places[pd.Series(np.arange(len(rows)), index=rows)[some["row"]].tolist()].T
        yield Batch(tokens, mask, rows[kept], kept_at, some, (at[0], at[1]))


# --- summary ------------------------------------------------------------------------------------------------

VALUES = ("logit", "log_probability", "norm", "per_norm")


def estimates(
    effects: pd.DataFrame, other: pd.DataFrame | None = None, n_boot: int = 1000, seed: int = 0
) -> dict[str, tuple[float, float, float]]:
    """{value: (mean, low, high)} of some rows of ``measure``, or of their difference from ``other`` rows at
    the same positions; intervals over documents.

    ``per_norm`` is the sum of logit changes over the sum of removed norms: a ratio of means, stable where
    single norms are near 0; NaN if nothing is removed. Without any rows all are NaN."""
    if effects.empty or (other is not None and other.empty):
        return dict.fromkeys(VALUES, (float("nan"),) * 3)
    drawn = []
    for rows in (effects, other):
        if rows is not None:
            by_document = rows.groupby("document")[list(VALUES[:3])]
            sums = by_document.sum().assign(n=by_document.size()).to_numpy()
            weights = group_weights(len(sums), n_boot, seed)  # the same for both
            total = np.concatenate([sums.sum(0)[None], weights @ sums])
            means = {name: total[:, i] / total[:, 3] for i, name in enumerate(VALUES[:3])}
            per_norm = np.full(len(total), np.nan)
            np.divide(total[:, 0], total[:, 2], out=per_norm, where=total[:, 2] > 0)
            drawn.append(means | {"per_norm": per_norm})
    if other is not None:
        drawn = [{name: drawn[0][name] - drawn[1][name] for name in VALUES}]
    return {name: (float(draws[0]), *interval(draws[1:])) for name, draws in drawn[0].items()}


def summarise(effects: pd.DataFrame, n_boot: int = 1000, seed: int = 0) -> pd.DataFrame:
    """Means of ``measure`` with 95% intervals over documents (``estimates``): one row per category, model,
    rule, k and kind of removal, with columns <value>, _low and _high for VALUES; n, documents."""
    rows, keys = [], ["category", "model", "rule", "k", "removed"]
    for key, group in effects.groupby(keys, sort=False):
        row = dict(zip(keys, key))
        for name, numbers in estimates(group, None, n_boot, seed).items():
            row |= dict(zip((name, f"{name}_low", f"{name}_high"), numbers))
        rows.append({**row, "n": len(group), "documents": group["document"].nunique()})
    return pd.DataFrame(rows)


def pool(summaries: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """``summarise`` of several crosscoders: the mean over them of each value, with an interval over
    crosscoders and documents (``stats.pooled``). Of one: its own. A rule that cannot be applied to a
    crosscoder is pooled over the others."""
    if len(summaries) == 1:
        return summaries[0]
    keys, counts = ["category", "model", "rule", "k", "removed"], ["n", "documents"]
    table = pooled_table(summaries, keys, {name: (f"{name}_low", f"{name}_high") for name in VALUES})
    means = pd.concat(summaries).groupby(keys, sort=False)[counts].mean().round().astype(int)
    return table.join(means, on=keys)
