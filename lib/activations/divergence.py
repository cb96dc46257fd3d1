"""Where two models differ in what they expect: the divergence of their next-token distributions, token by
token. Activations may differ where nothing is done with it; a distribution that differs is a difference of
behaviour."""

import numpy as np
import pandas as pd
import plotly.express as px
import plotly.graph_objects as go
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..device import placed
from ..figures import COLOURS, express_bars, shaded_tokens
from ..labels import KINDS, LABELS
from ..models.reader import length_batches
from ..stats import bootstrap
from .store import Store
from .survey import random_documents

LOGITS = 40_000_000  # numbers of one model's logits at a time: 160 MB
INSIDE, AT_END = "inside such a sentence", "before such a sentence"


@torch.no_grad()
def divergence(
    model: PreTrainedModel, reference: PreTrainedModel, store: Store, documents: int = 200, seed: int = 0
) -> pd.DataFrame:
    """KL(model || reference) in nats of the next token, at every kept token of random documents of the report
    split: columns row (of the store), document, kl; sorted by row. Where one vocabulary is longer, its
    further ids, which no text has, are left out of both."""
    rows, token_lists = random_documents(store, documents, seed)
    model, reference = placed(model), placed(reference)
    size = min(m.config.get_text_config().vocab_size for m in (model, reference))
    starts = np.cumsum([0, *map(len, token_lists)])
    found = np.zeros(len(rows))
    for batch in length_batches([len(t) for t in token_lists], max(LOGITS // size, 1)):
        texts = [torch.tensor(token_lists[i]) for i in batch]
        # padded on the right, where no earlier token sees it
        ids, mask = pad_sequence(texts, True), pad_sequence([torch.ones_like(t) for t in texts], True)
        each = (m(input_ids=ids.to(m.device), attention_mask=mask.to(m.device)) for m in (model, reference))
        log_p, log_q = (output.logits[..., :size].float().log_softmax(-1) for output in each)
        log_q = log_q.to(log_p.device)
        kl = (log_p.exp() * (log_p - log_q)).sum(-1).clamp(min=0)
        for i, own in zip(batch, kl):
            found[starts[i] : starts[i + 1]] = own[: len(token_lists[i])].cpu().numpy()
    table = pd.DataFrame({"row": rows, "document": store.documents[rows], "kl": found})
    return table[store.kept[rows]].reset_index(drop=True)


def by_place(kl: pd.DataFrame, store: Store, seed: int = 0) -> pd.DataFrame:
    """The mean divergence by kind of sentence: inside it, and at the last token before it, where it is still
    to be chosen. Columns sentence, place, n, kl, low, high (bootstrap over documents), share of all
    divergence; the largest mean first."""
    label, following, ends = (store.labels[name][kl["row"]] for name in ("label", "next_label", "ends"))
    table = []
    for place, labels, where in ((INSIDE, label, ends != 1), (AT_END, following, ends == 1)):
        for i in np.unique(labels[where & (labels >= 0)]):
            part = kl[where & (labels == i)]
            low, high = bootstrap(part["kl"].to_numpy(), groups=part["document"], seed=seed)
            share = part["kl"].sum() / kl["kl"].sum()
            table.append((LABELS[i], place, len(part), part["kl"].mean(), low, high, share))
    columns = ["sentence", "place", "n", "kl", "low", "high", "share"]
    return pd.DataFrame(table, columns=columns).sort_values("kl", ascending=False, ignore_index=True)


def by_kind(kl: pd.DataFrame, store: Store, seed: int = 0) -> dict[str, tuple]:
    """The mean divergence of each kind of text: {kind: (mean, interval over documents, tokens)}."""
    parts = {kind: kl[store.labels["kind"][kl["row"]] == i] for i, kind in enumerate(KINDS)}
    ends = lambda part: bootstrap(part["kl"].to_numpy(), groups=part["document"], seed=seed)
    return {kind: (part["kl"].mean(), ends(part), len(part)) for kind, part in parts.items()}


def half_of_it(kl: pd.DataFrame) -> float:
    """The smallest share of the tokens that holds half of all divergence."""
    largest = np.sort(kl["kl"].to_numpy())[::-1].cumsum()
    return float((np.searchsorted(largest, largest[-1] / 2) + 1) / len(largest))


def figure(table: pd.DataFrame, mean: float | None = None) -> go.Figure:
    """The table of ``by_place`` as a point with its interval per kind of sentence and place; dotted: the
    ``mean`` over all tokens of traces."""
    fig = px.scatter(
        table, x="kl", y="sentence", color="place", **express_bars(table, "kl", "low", "high", axis="x"),
        color_discrete_map={INSIDE: COLOURS["null"], AT_END: "#222222"},
        title="Where do the models expect something else?",
        labels={"kl": "KL(distilled || base), nats per token (95% interval)", "sentence": "", "place": ""},
    )  # fmt: skip
    fig.update_layout(scattermode="group", scattergap=0.5).update_traces(orientation="h", marker_size=10)
    if mean is not None:
        fig.add_vline(mean, line_dash="dot", layer="below", annotation_text="mean of traces")
    return fig.update_xaxes(rangemode="tozero")


def shaded(document: int, kl: pd.DataFrame, store: Store, tokenizer: PreTrainedTokenizerBase):
    """A text with every token shaded by the divergence of what the models expect next."""
    part = kl[kl["document"] == document]
    words = tokenizer.convert_ids_to_tokens(store.tokens[part["row"]].tolist())
    return shaded_tokens(words, part["kl"], colour=COLOURS["distilled"])
