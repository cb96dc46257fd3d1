"""Four numbers that say whether to believe anything read off a crosscoder's features.

Does it reconstruct what each model holds (FVE)? Is what it loses of no importance to the model itself
(cross-entropy recovered)? Does it use as few features per token as aimed at (L0), and all of its dictionary
(dead share)?"""

from collections.abc import Iterator, Mapping, Sequence
from operator import attrgetter

import numpy as np
import torch

from ..device import placed, tf32, the_device
from ..models.pairs import decoder_path
from ..stats import bootstrap, wilson
from .codes import activations, check_models, encoded, sample_rows
from .model import CrossCoder

KINDS = ("own", "reconstruction", "mean")  # what the rest of a model reads at the layer
# of one forward, all its copies of a batch: at most so many tokens with padding, and so many logits
BATCH_TOKENS, LOGITS = 24_576, 1 << 27


def health_card(crosscoder: CrossCoder, store, *args, **how) -> dict[str, dict]:
    """``health_cards`` of one crosscoder."""
    return health_cards([crosscoder], store, *args, **how)[0]


@torch.no_grad()
def health_cards(
    crosscoders: Sequence[CrossCoder],
    store,
    models: Mapping | None = None,
    max_tokens: int = 60_000,
    n_boot: int = 1000,
    seed: int = 0,
) -> list[dict[str, dict]]:
    """The health card of each crosscoder: {metric: {value, ci, n}}, on documents that training did not see.

    - ``fve_<model>``: 1 - sum of squared errors / sum of squares about the mean.
    - ``ce_recovered_<model>``: (CE_mean - CE_x̂) / (CE_mean - CE), from the model's next-token
      cross-entropies with its residual stream at the layer replaced by the reconstruction, and by the mean
      (at kept positions, of at most ``max_tokens`` tokens). 1: nothing lost; 0: no better than the mean;
      NaN: within its error the mean is as good as the model. Needs ``models`` {name: model}.
    - ``l0``, ``l0_target``: features per token at the inference threshold, and aimed at (batchtopk).
    - ``dead_fraction``: share of features that fire on no token (Wilson's interval).
    - ``distinct_tokens_seen``: in training; n is the number of tokens shown.

    Intervals are bootstraps over documents: tokens of a document are not independent."""
    for crosscoder in crosscoders:
        check_models(crosscoder, store)
    given, read = (models or {}).items(), (max_tokens, seed)
    entropies = {name: cross_entropies(crosscoders, store, name, model, *read) for name, model in given}
    each = ({name: entropies[name][i] for name in entropies} for i in range(len(crosscoders)))
    return [_card(c, store, ces, n_boot, seed) for c, ces in zip(crosscoders, each)]


def _card(crosscoder: CrossCoder, store, entropies: Mapping, n_boot: int, seed: int) -> dict[str, dict]:
    """One health card; ``entropies``: {model: ``cross_entropies``}."""
    rows = sample_rows(store, "report")
    documents, index = np.unique(np.asarray(store.documents)[rows], return_inverse=True)
    n_docs, names = len(documents), crosscoder.names
    device = the_device()
    there = crosscoder.on(device)
    sums = ([a.double().sum(0) for a in acts] for _, acts in activations(store, rows, device=device))
    means = [sum(chunks) / len(rows) for chunks in zip(*sums)]
    errors, spreads = np.zeros((len(names), n_docs)), np.zeros((len(names), n_docs))
    active, counts = np.zeros(n_docs), np.bincount(index, minlength=n_docs).astype(float)
    fired = torch.zeros(crosscoder.n_features, dtype=torch.bool, device=device)
    done = 0
    for part, acts, f in encoded(there, store, rows):
        where = index[done : done + len(part)]
        done += len(part)
        fired |= (f > 0).any(0)
        active += np.bincount(where, (f > 0).sum(-1).cpu(), n_docs)
        for m, (x, x_hat) in enumerate(zip(acts, there.decode(f))):
            errors[m] += np.bincount(where, (x.double() - x_hat.double()).square().sum(-1).cpu(), n_docs)
            spreads[m] += np.bincount(where, (x.double() - means[m]).square().sum(-1).cpu(), n_docs)

    def ratio(top: np.ndarray, bottom: np.ndarray, show=lambda r: r) -> dict:
        sums = np.stack([top, bottom], axis=1)
        ci = bootstrap(sums, lambda v: show(v[:, 0].sum() / v[:, 1].sum()), n_boot=n_boot, seed=seed)
        return {"value": float(show(top.sum() / bottom.sum())), "ci": ci, "n": len(top)}

    card = {f"fve_{name}": ratio(errors[m], spreads[m], lambda r: 1 - r) for m, name in enumerate(names)}
    for name, ce in entropies.items():
        lost_by_mean = ce["mean"] - ce["own"]
        n, recovered = len(lost_by_mean), f"ce_recovered_{name}"
        card[recovered] = {"value": float("nan"), "ci": None, "n": n}
        if lost_by_mean.sum() > 2 * lost_by_mean.std() * n**0.5:
            card[recovered] = ratio(ce["mean"] - ce["reconstruction"], lost_by_mean)
        card |= {f"ce_{kind}_{name}": ratio(ce[kind], ce["tokens"]) for kind in KINDS}
    card["l0"] = ratio(active, counts)
    if crosscoder.variant == "batchtopk":
        card["l0_target"] = {"value": crosscoder.k, "ci": None, "n": None}
    dead = int((~fired).sum())
    card["dead_fraction"] = {"value": dead / len(fired), "ci": wilson(dead, len(fired)), "n": len(fired)}
    shown, distinct = crosscoder.seen.tolist()
    card["distinct_tokens_seen"] = {"value": distinct, "ci": None, "n": shown}
    return card


@torch.no_grad()
def cross_entropies(
    crosscoders: Sequence[CrossCoder], store, name: str, model, max_tokens: int = 60_000, seed: int = 0
) -> list[dict[str, np.ndarray]]:
    """Next-token cross-entropy of one model, summed per document (nats), for each crosscoder: {own,
    reconstruction, mean, tokens}, each [documents]. One pass holds a batch several times: as it is, and with
    the residual stream at the store's layer replaced, where the store kept a position, by the mean of what
    the first crosscoder was trained on, and by each reconstruction. Documents: up to ``max_tokens``."""
    from nnsight import NNsight

    traced = NNsight(placed(model))  # ids go in and logits come out: no tokenizer is needed
    crosscoders = [crosscoder.on(the_device()) for crosscoder in crosscoders]
    envoy = attrgetter(decoder_path(model))(traced)[store.layers[name]]
    device = next(model.parameters()).device
    spans = _spans(store, max_tokens, seed)
    m, mean = crosscoders[0].names.index(name), crosscoders[0].mean(name, raw=True)
    copies = 2 + len(crosscoders)
    totals, counts = [[] for _ in range(copies)], []
    vocabulary = model.config.get_text_config().vocab_size
    for batch in _batched(spans, min(BATCH_TOKENS, LOGITS // vocabulary) // copies):
        length = max(stop - start for start, stop in batch)
        ids = torch.zeros(len(batch), length, dtype=torch.long)
        own = torch.zeros(len(batch), length, dtype=torch.bool)
        kept = own.clone()
        for i, (start, stop) in enumerate(batch):
            ids[i, : stop - start] = torch.as_tensor(np.asarray(store.tokens[start:stop]).astype(np.int64))
            own[i, : stop - start] = True
            kept[i, : stop - start] = torch.as_tensor(np.asarray(store.kept[start:stop]))
        rows = np.concatenate([np.arange(*span)[np.asarray(store.kept[slice(*span)])] for span in batch])
        replacement = torch.zeros(copies, *ids.shape, len(mean), device=mean.device)
        replacement[1] = mean
        for x_hat, crosscoder in zip(replacement[2:], crosscoders):
            decoded = [crosscoder.decode(f)[m] for _, _, f in encoded(crosscoder, store, rows)]
            x_hat[kept.to(mean.device)] = torch.cat(decoded)
        replaced = torch.cat([torch.zeros_like(kept), *[kept] * (copies - 1)])[..., None].to(device)
        replacement = replacement.flatten(0, 1).to(device, model.dtype)
        inputs = {"input_ids": ids.repeat(copies, 1), "attention_mask": own.long().repeat(copies, 1)}
        inputs = {name: value.to(device) for name, value in inputs.items()}
        with tf32(model.dtype != torch.float32), traced.trace(**inputs):
            envoy.output = torch.where(replaced, replacement, envoy.output)
            logits = traced.output.logits.save()
        followed, next_ids = own[:, 1:], ids[:, 1:].to(device)
        for total, part in zip(totals, logits.chunk(copies)):
            predicted = part[:, :-1].float().transpose(1, 2)
            losses = torch.nn.functional.cross_entropy(predicted, next_ids, reduction="none").cpu()
            total.append((losses * followed).sum(-1))
        counts.append(followed.sum(-1))
    untouched, by_mean, *each, tokens = (torch.cat(p).double().numpy() for p in (*totals, counts))
    shared = {"own": untouched, "mean": by_mean, "tokens": tokens}
    return [{**shared, "reconstruction": one} for one in each]


def _spans(store, max_tokens: int, seed: int) -> list[tuple[int, int]]:
    """(start, stop) rows of random documents of the split "report", by length (less padding)."""
    documents = np.asarray(store.documents)
    edges = np.flatnonzero(np.diff(documents, prepend=documents[0] - 1, append=documents[-1] + 1))
    spans = [(int(a), int(b)) for a, b in zip(edges[:-1], edges[1:])]
    wanted = set(np.unique(documents[store.rows("report")]).tolist())
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
