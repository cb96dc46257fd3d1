"""Four numbers that say whether to believe anything read off a crosscoder's features.

    card = health_card(crosscoder, store, {"base": base, "distilled": distilled})
    for name, metric in card.items():
        here.add(name, **metric)

Does it reconstruct what each model holds (FVE)? Is what it loses of no importance to the model itself
(cross-entropy recovered)? Does it use as few features per token as aimed at (L0), and all of its dictionary
(dead share)?
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from operator import attrgetter

import numpy as np
import torch
from nnsight import NNsight
from torch import Tensor

from ..models.pairs import decoder_path
from ..stats import bootstrap, wilson
from .codes import activations, check_models, encoded, sample_rows
from .model import CrossCoder

# of one forward: at most so many tokens with padding, and so many logits
BATCH_TOKENS, LOGITS = 8_192, 1 << 27


@torch.no_grad()
def health_card(
    crosscoder: CrossCoder,
    store,
    models: Mapping | None = None,
    split: str = "report",
    max_tokens: int = 60_000,
    n_boot: int = 1000,
    seed: int = 0,
) -> dict[str, dict]:
    """The health card: {metric: {value, ci, n}}, on documents that training did not see.

    - ``fve_<model>``: 1 - sum of squared errors / sum of squares about the mean, over the split's kept
      tokens.
    - ``ce_recovered_<model>``: (CE_mean - CE_x̂) / (CE_mean - CE), from the next-token cross-entropies of the
      model itself, with its residual stream at the layer replaced by the reconstruction, and by the mean
      activation (at kept positions only). 1: nothing lost; 0: no better than the mean. Needs ``models``
      {name: model}.
    - ``l0``, ``l0_target``: features per token, obtained at the inference threshold, and aimed at
      (batchtopk).
    - ``dead_fraction``: share of features that fire on no token of the split.
    - ``distinct_tokens_seen``: in training; n is the number of tokens shown.

    Intervals are bootstraps over documents (tokens of a document are not independent), for ``dead_fraction``
    Wilson's over features. ``max_tokens`` bounds the tokens used for the cross-entropy.
    """
    check_models(crosscoder, store)
    rows = sample_rows(store, split)
    documents, index = np.unique(np.asarray(store.documents)[rows], return_inverse=True)
    n_docs, names = len(documents), crosscoder.names
    means = _means(store, rows)
    errors, spreads = np.zeros((len(names), n_docs)), np.zeros((len(names), n_docs))
    active, counts = np.zeros(n_docs), np.bincount(index, minlength=n_docs).astype(float)
    fired = torch.zeros(crosscoder.n_features, dtype=torch.bool)
    done = 0
    for part, acts, f in encoded(crosscoder, store, rows):
        where = index[done : done + len(part)]
        done += len(part)
        fired |= (f > 0).any(0)
        active += np.bincount(where, (f > 0).sum(-1), n_docs)
        for m, (x, x_hat) in enumerate(zip(acts, crosscoder.decode(f))):
            errors[m] += np.bincount(where, (x.double() - x_hat.double()).square().sum(-1), n_docs)
            spreads[m] += np.bincount(where, (x.double() - means[m]).square().sum(-1), n_docs)

    def ratio(top: np.ndarray, bottom: np.ndarray, show) -> dict:
        ci = bootstrap(
            np.stack([top, bottom], axis=1),
            lambda v: show(v[:, 0].sum() / v[:, 1].sum()),
            n_boot=n_boot,
            seed=seed,
        )
        return {"value": float(show(top.sum() / bottom.sum())), "ci": ci, "n": len(top)}

    card = {f"fve_{name}": ratio(errors[m], spreads[m], lambda r: 1 - r) for m, name in enumerate(names)}
    for name, model in (models or {}).items():
        ce = cross_entropies(crosscoder, store, name, model, split, max_tokens, seed)
        card[f"ce_recovered_{name}"] = ratio(
            ce["mean"] - ce["reconstruction"], ce["mean"] - ce["own"], lambda r: r
        )
        for kind in ("own", "reconstruction", "mean"):
            card[f"ce_{kind}_{name}"] = ratio(ce[kind], ce["tokens"], lambda r: r)
    card["l0"] = ratio(active, counts, lambda r: r)
    if crosscoder.variant == "batchtopk":
        card["l0_target"] = {"value": crosscoder.k, "ci": None, "n": None}
    dead = int((~fired).sum())
    card["dead_fraction"] = {"value": dead / len(fired), "ci": wilson(dead, len(fired)), "n": len(fired)}
    card["distinct_tokens_seen"] = {
        "value": int(crosscoder.seen[1]),
        "ci": None,
        "n": int(crosscoder.seen[0]),
    }
    return card


def _means(store, rows: np.ndarray) -> list[Tensor]:
    """Mean RAW activation [d_m] float64 of each model over these rows."""
    sums = [0.0] * len(store.models)
    for _, acts in activations(store, rows):
        sums = [s + a.double().sum(0) for s, a in zip(sums, acts)]
    return [s / len(rows) for s in sums]


@torch.no_grad()
def cross_entropies(
    crosscoder: CrossCoder,
    store,
    name: str,
    model,
    split: str = "report",
    max_tokens: int = 60_000,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Next-token cross-entropy of one model, summed per document (nats): {own, reconstruction, mean, tokens},
    each [documents].

    One pass holds a batch three times: as it is, with the residual stream at the store's layer replaced by
    the reconstruction, and by the mean. Only positions that the store kept are replaced (others, such as BOS,
    were never fit). Documents are drawn without repetition until ``max_tokens`` are reached.
    """
    traced = NNsight(model)  # ids go in and logits come out: no tokenizer is needed
    envoy = attrgetter(decoder_path(model))(traced)[store.layers[name]]
    device = next(model.parameters()).device
    spans = _spans(store, split, max_tokens, seed)
    totals = {kind: [] for kind in ("own", "reconstruction", "mean", "tokens")}
    m, mean = crosscoder.names.index(name), crosscoder.mean(name, raw=True)
    vocabulary = model.config.get_text_config().vocab_size
    for batch in _batched(spans, min(BATCH_TOKENS, LOGITS // (3 * vocabulary))):
        length = max(stop - start for start, stop in batch)
        ids = torch.zeros(len(batch), length, dtype=torch.long)
        own = torch.zeros(len(batch), length, dtype=torch.bool)
        kept, x_hat = own.clone(), torch.zeros(len(batch), length, crosscoder.widths[m])
        for i, (start, stop) in enumerate(batch):
            ids[i, : stop - start] = torch.as_tensor(np.asarray(store.tokens[start:stop]).astype(np.int64))
            own[i, : stop - start] = True
            kept[i, : stop - start] = torch.as_tensor(np.asarray(store.kept[start:stop]))
        rows = np.concatenate(
            [np.arange(start, stop)[np.asarray(store.kept[start:stop])] for start, stop in batch]
        )
        x_hat[kept] = torch.cat([crosscoder.decode(f)[m] for _, _, f in encoded(crosscoder, store, rows)])
        replacement = torch.cat([torch.zeros_like(x_hat), x_hat, mean.expand_as(x_hat)])
        replaced = torch.cat([torch.zeros_like(kept), kept, kept])[..., None]
        replaced, replacement = replaced.to(device), replacement.to(device, model.dtype)
        with traced.trace(
            input_ids=ids.repeat(3, 1).to(device), attention_mask=own.long().repeat(3, 1).to(device)
        ):
            envoy.output = torch.where(replaced, replacement, envoy.output)
            logits = traced.output.logits.save()
        logits = logits.cpu()
        followed = own[:, 1:]
        for kind, part in zip(("own", "reconstruction", "mean"), logits.chunk(3)):
            losses = torch.nn.functional.cross_entropy(
                part[:, :-1].float().transpose(1, 2), ids[:, 1:], reduction="none"
            )
            totals[kind].append((losses * followed).sum(-1))
        totals["tokens"].append(followed.sum(-1))
    return {kind: torch.cat(parts).double().numpy() for kind, parts in totals.items()}


def _spans(store, split: str, max_tokens: int, seed: int) -> list[tuple[int, int]]:
    """(start, stop) rows of documents of a split, in random order until ``max_tokens``, then by length (less
    padding).
    """
    documents = np.asarray(store.documents)
    edges = np.flatnonzero(np.diff(documents, prepend=documents[0] - 1, append=documents[-1] + 1))
    spans = [(int(a), int(b)) for a, b in zip(edges[:-1], edges[1:])]
    wanted = set(np.unique(documents[store.rows(split)]).tolist())
    spans = [span for span in spans if int(documents[span[0]]) in wanted and span[1] - span[0] > 1]
    order = np.random.default_rng(seed).permutation(len(spans))
    lengths = np.cumsum([spans[i][1] - spans[i][0] for i in order])
    chosen = order[: max(1, int(np.searchsorted(lengths, max_tokens, side="right")))]
    return sorted((spans[i] for i in chosen), key=lambda span: span[1] - span[0])


def _batched(spans: list[tuple[int, int]], batch_tokens: int) -> Iterator[list[tuple[int, int]]]:
    """Consecutive spans (ascending by length) in batches of at most ``batch_tokens`` padded tokens."""
    batch: list[tuple[int, int]] = []
    for span in spans:
        if batch and (len(batch) + 1) * (span[1] - span[0]) > batch_tokens:
            yield batch
            batch = []
        batch.append(span)
    yield batch
