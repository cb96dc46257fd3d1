"""What a feature writes: the tokens that its two decoder rows promote and suppress (logit lens), each row
read by its own model's last norm and unembedding.

A row d of model m moves the logits by a multiple of W (g * d), with W the unembedding and g the gain of the
last norm, as far as the layers in between pass it on. So the lens says what a row writes by itself, not all
that it causes (notebook 04). Scores are in standard deviations over the vocabulary, about its mean: the
length of d is free, and what is added to all logits changes nothing."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..activations.store import Store
from ..crosscoder.model import CrossCoder
from ..labels import LABELS
from ..models.pairs import Pair, decoder_layers
from ..results import Results
from .table import Inspection

USUAL = 0.05  # of a category's sentences that begin with a token: then it counts as one of its openings


@torch.no_grad()
def readout(model: PreTrainedModel) -> Tensor:
    """What turns a direction of the residual stream into logits: W (g * .), [vocabulary, d] in float32; g is
    seen from what reaches the head, for norms differ (1 + weight in Gemma; others centre first)."""
    layers, head = decoder_layers(model), model.get_output_embeddings()
    signs = torch.ones(model.config.get_text_config().hidden_size)
    signs[1::2] = -1
    signs -= signs.mean()
    streams, caught = 1e3 * torch.stack([signs, -signs, torch.ones_like(signs), -torch.ones_like(signs)]), []
    with (
        layers[-1].register_forward_hook(lambda module, args, output: streams[None].to(output)),
        head.register_forward_pre_hook(lambda module, args: caught.append(args[0][0].float().cpu())),
    ):
        model(input_ids=torch.zeros(1, 4, dtype=torch.long, device=model.device), use_cache=False)
    varied, constant = caught[0][::2] - caught[0][1::2]  # a bias cancels
    weights = head.weight.detach().float().cpu() * (varied / (2 * signs))
    centres = constant.norm() < 1e-3 * varied.norm()
    return weights - weights.mean(dim=1, keepdim=True) if centres else weights


def readouts(pair: Pair, names: Sequence[str]) -> dict[str, Tensor]:
    """``readout`` of each model, {} where they are not on this machine."""
    return {} if pair.remote else {name: readout(pair.load(name)) for name in names}


class Lens:
    """The rows of a crosscoder's features as tokens. ``readouts``: of its models, by name."""

    def __init__(
        self, crosscoder: CrossCoder, readouts: Mapping[str, Tensor], tokenizer: PreTrainedTokenizerBase
    ):
        self.crosscoder, self.tokenizer = crosscoder, tokenizer
        self.readouts = {name: w[: len(tokenizer)] for name, w in readouts.items()}  # what has a word

    def scores(self, name: str, features: Sequence[int]) -> Tensor:
        """[features, vocabulary]: how far each token is promoted by the rows in model ``name``."""
        logits = self.crosscoder.rows(name)[list(features)].detach().float() @ self.readouts[name].T
        centred = logits - logits.mean(dim=1, keepdim=True)
        return centred / centred.square().mean(dim=1, keepdim=True).sqrt().clamp(min=1e-12)

    def agreement(self, feature: int) -> float:
        """Correlation of the two models' scores: 1 where both rows write the same, 0 where one is nothing."""
        a, b = (self.scores(name, [feature])[0] for name in self.crosscoder.names[:2])
        n = min(len(a), len(b))
        return float((a[:n] * b[:n]).mean())

    def words(self, name: str, feature: int, n: int = 5) -> tuple[list[str], list[str]]:
        """(promoted, suppressed): ``n`` tokens each, the furthest first."""
        scores = self.scores(name, [feature])[0]
        ends = (scores.topk(n).indices, (-scores).topk(n).indices)
        return tuple(self.tokenizer.convert_ids_to_tokens(ids.tolist()) for ids in ends)

    def table(self, features: Mapping[str, int], n: int = 5) -> pd.DataFrame:
        """A row per feature {what: number} and model: feature, model, promoted, suppressed, agreement."""
        rows = []
        for what, feature in features.items():
            agreement = self.agreement(feature)
            for name in self.crosscoder.names:
                promoted, suppressed = (" ".join(words) for words in self.words(name, feature, n))
                rows.append((what, feature, name, promoted, suppressed, agreement))
        return pd.DataFrame(rows, columns=["what", "feature", "model", "promoted", "suppressed", "agreement"])


def openings(store: Store, category: str) -> list[int]:
    """The tokens with which at least USUAL of a category's sentences begin, on the split "choose"."""
    rows = store.rows("choose")
    own = (store.labels["starts"][rows] == 1) & (store.labels["label"][rows] == LABELS.index(category))
    tokens, counts = np.unique(store.tokens[rows[own]], return_counts=True)
    return tokens[counts >= max(USUAL * counts.sum(), 1)].tolist()


def record(results: Results, inspection: Inspection, readouts: Mapping[str, Tensor]) -> Lens | None:
    """Metrics lens_<c>_<model>: how far the row of a category's feature promotes the openings of its own
    sentences (suppresses, if it predicts them by falling silent), above what the rows of all alive features
    do; lens_agreement_<c>, and lens_agreement, the median of alive features. None without readouts."""
    if not readouts:
        return None
    lens, alive = Lens(inspection.crosscoder, readouts, inspection.tokenizer), inspection.alive["feature"]
    every = {name: lens.scores(name, alive) for name in inspection.crosscoder.names}
    for category in inspection.categories:
        detector, ids = inspection.detectors[category], openings(inspection.store, category)
        for name, scores in every.items():
            own, usual = lens.scores(name, [detector.feature])[:, ids].mean(), scores[:, ids].mean()
            results.add(f"lens_{category}_{name}", float(detector.sign * (own - usual)), n=len(ids))
        results.add(f"lens_agreement_{category}", lens.agreement(detector.feature))
    results.add("lens_agreement", float(np.median([lens.agreement(f) for f in alive])), n=len(alive))
    return lens


def shows(results: Results, categories: Sequence[str], names: Sequence[str]) -> str:
    """What ``record`` found, in a sentence."""
    measured = [c for c in categories if f"lens_{c}_{names[-1]}" in results.metrics]
    each = "; ".join(
        f"{c} " + ", ".join(f"{results.text(f'lens_{c}_{name}')} ({name})" for name in names)
        for c in measured
    )
    writes = [c for c in measured if (results.metrics[f"lens_{c}_{names[-1]}"]["ci"] or [0])[0] > 0]
    return (
        "Above all other features, in standard deviations, the row of a category's feature promotes the first"
        f" words of its own sentences by: {each}. Beyond chance in the {names[-1]} model:"
        f" {', '.join(writes) or 'none'}. Both rows of a feature write alike to"
        f" {results.text('lens_agreement')} (median correlation)."
    )
