"""Steering (E5): add a feature's decoder row to the residual stream of the distilled model while it thinks,
and read what becomes of the thought.

From the last position of the prompt ("think :") until the thinking is closed, at one decoder layer::

    h_t  ->  h_t + strength * (mean residual norm) * d_i / ||d_i||

so that features, random directions and models can be compared; the sign says whether a feature is added or
taken away. Thoughts are sampled at temperature 1, with the same noise for unsteered and steered thoughts:
greedy decoding never says what is never the likeliest sentence. *Over-thinking*: the thought grows and the
answer does not get better. *Incisive thinking*: it shrinks and the answer does not get worse. What is
steered, and how strongly, is chosen on validation puzzles and reported on test puzzles.

Source: Baek & Tegmark 2025 (arXiv 2503.03730), section on steering; units, splits and controls are ours."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from nnsight import TransformersModel
from torch import Tensor
from torch.nn import functional

from ..activations.positions import PHASES, phase_of
from ..activations.store import SPLITS
from ..crosscoder.model import CrossCoder, check_feature
from ..distil.trials import Task
from ..features.table import best_aurocs
from ..models.reader import head_envoy, layer_envoys
from ..runs import fingerprint, write_manifest
from ..settings import UserError, check
from .ablation import Batch, batches
from .generate import TranscriptFile, kept_transcripts, steered
from .outcomes import NO_STEERING
from .tasks import PUZZLES, Medium

if TYPE_CHECKING:
    from .artefacts import RunArtefacts


@dataclass(frozen=True)
class Direction:
    """A named vector [d] whose norm is the mean residual norm: strength 1. ``label``: its category, or
    "random"."""

    name: str
    label: str
    vector: Tensor


def feature_direction(
    crosscoder: CrossCoder, feature: int, norm: float, label: str = "feature", model: str = "distilled"
) -> Direction:
    """The raw decoder row of a feature in ``model``, brought to ``norm``; UserError for an unknown one."""
    row = crosscoder.rows(model, raw=True)[check_feature(crosscoder, feature)].detach().float()
    if row.norm() == 0:
        raise UserError(f"feature {feature} has no decoder row in {model}: it cannot steer")
    return Direction(f"{label} {feature}", label, row * (norm / row.norm()))


def random_directions(n: int, width: int, norm: float, seed: int = 0) -> list[Direction]:
    """``n`` random directions of the same norm: the control for "any push would have done it"."""
    noise = torch.randn(n, width, generator=torch.Generator().manual_seed(seed))
    return [Direction(f"random {i}", "random", row * (norm / row.norm())) for i, row in enumerate(noise)]


def influence(
    opened: RunArtefacts, labels: Sequence[str], split: str = "choose", documents: int = 64, seed: int = 0
) -> dict[str, Tensor]:
    """What a small push does to the next sentence: for each label the gradient [d] of the probability that it
    opens.

    The probability is the sum over all first words of the label (the medium knows them), averaged over the
    sentence ends of ``documents`` traces of the split; the push is one vector added at every position of the
    thinking, in the distilled model. Its scalar product with a direction is the change that this direction
    would make, to first order (attribution; Nanda 2023, "Attribution patching")."""
    check("documents", documents, int, low=1)
    store, model, medium = opened.store, opened.models["distilled"], opened.medium
    ends = (store.labels["ends"] == 1) & (store.labels["kind"] == 1) & (store.split == SPLITS.index(split))
    frame = pd.DataFrame({"document": store.documents[ends], "row": np.flatnonzero(ends)})
    number = frame.groupby("document").cumcount()
    # the first ends the prompt, the second is "think :"
    frame = frame[(number >= 1) & (store.labels["next_label"][frame["row"]] >= 0)]
    if medium is not PUZZLES:
        frame = frame[phase_of(store, frame["row"]) == PHASES.index("thinking")]
    if frame.empty:
        raise UserError(
            f"there is no labelled trace in the split {split!r}: the corpus of this pair must carry labels"
        )
    drawn = np.random.default_rng(seed).permutation(np.unique(frame["document"]))[:documents]
    frame = frame[frame["document"].isin(drawn)]
    ids = (medium.opens(store, model.tokenizer, label) for label in labels)
    openings = [torch.tensor(own, dtype=torch.long) for own in ids]
    total = torch.zeros(len(labels), store.widths["distilled"])
    for batch in batches(store, frame, batch_size=32):
        total += _gradients(model, store.layers["distilled"], batch, openings, opened.pair.remote)
    return dict(zip(labels, total / len(frame)))


def _gradients(
    model: TransformersModel, layer: int, batch: Batch, openings: list[Tensor], remote: bool | str
) -> Tensor:
    """[labels, d]: the gradients of ``influence``, summed over one batch, taken where the model runs.
    ``openings``: ids of first words."""
    (rows, columns), length = batch.at, batch.mask.shape[1]
    first = torch.full((len(batch.mask),), length).scatter_reduce(0, rows, columns, "amin")
    thinking = (torch.arange(length) >= first[:, None]).float()[..., None]
    inputs = {"input_ids": batch.tokens, "attention_mask": batch.mask}
    block, head = layer_envoys(model)[layer], head_envoy(model)
    with torch.enable_grad(), model.trace(inputs, remote=remote):
        h = block.output
        push = torch.zeros(h.shape[-1], device=h.device, requires_grad=True)
        block.output = h + (thinking.to(h.device) * push).to(h.dtype)
        head.skip(functional.linear(head.input[rows, columns], head.weight, head.bias)[None])
        probability = model.output.logits[0].float().softmax(-1)
        sums = [probability[:, ids.to(h.device)].sum() for ids in openings]
        found = torch.stack([torch.autograd.grad(total, push, retain_graph=True)[0] for total in sums]).save()
    return found.cpu()


def candidates(
    table: pd.DataFrame, crosscoder: CrossCoder, gradients: Mapping[str, Tensor], norm: float, n: int = 2
) -> pd.DataFrame:
    """Features worth trying for each label of ``gradients``, among the alive ones with an NRN above 0.5.

    ``by`` "reads": the one that predicts the label's sentences best (``best_aurocs`` on the choose split; the
    paper's way). ``by`` "writes": the ``n`` whose decoder rows promote them most (``influence``).
    Columns label, feature, by, auroc, influence (first-order change of the sentence's probability at strength
    1), times_random (influence over that of a typical random direction of the same norm) and nrn. A feature
    is a candidate of one label only."""
    check("candidates", n, int, low=0)
    usable = table[table["alive"].astype(bool) & (table["nrn"] > 0.5)].set_index("feature")
    if missing := [label for label in gradients if f"auroc_{label}_choose" not in usable]:
        raise UserError(
            f"the feature table has no AUROC of {', '.join(missing)}: run notebook 03_inspect_features again"
        )
    directions = functional.normalize(crosscoder.rows("distilled", raw=True), dim=-1)[usable.index.tolist()]
    measured = {}
    for label, gradient in gradients.items():
        typical = norm * float(gradient.norm()) / directions.shape[1] ** 0.5
        columns = {
            "auroc": best_aurocs(usable, label, "_choose"),
            "influence": norm * (directions @ gradient).numpy(),
        }
        scores = pd.DataFrame(columns).assign(label=label, nrn=usable["nrn"])
        measured[label] = scores.assign(times_random=scores["influence"] / (typical or np.nan))
    chosen, taken = {label: [] for label in gradients}, set()
    for by, column, wanted in (("reads", "auroc", 1), ("writes", "influence", n)):
        for label, scores in measured.items():
            best = scores.drop(index=list(taken))[column].dropna().nlargest(wanted).index
            chosen[label].append(scores.loc[best].assign(by=by))
            taken |= set(best)
    frame = pd.concat([part for parts in chosen.values() for part in parts])
    frame = frame.rename_axis("feature").reset_index()
    return frame[["label", "feature", "by", "auroc", "influence", "times_random", "nrn"]]


class Steering:
    """A model under steering. The transcripts of every condition are kept in ``folder`` and made only once.

    ``remote`` says where the model runs, ``place`` where the vector is added (``generate.steered``).
    ``weights`` is the fingerprint of its weights; directions, strengths, tasks and limits are added to it, so
    a transcript is used again only if all that decides it is the same. The unsteered ones are those of every
    layer and place."""

    def __init__(
        self,
        model: TransformersModel,
        layer: int,
        folder: Path,
        weights: str,
        max_new_tokens: int = 260,
        temperature: float = 1.0,
        seed: int = 0,
        medium: Medium = PUZZLES,
        remote: bool | str = False,
        place: str = "thinking",
    ):
        check("max_new_tokens", max_new_tokens, int, low=1)
        check("temperature", temperature, float, low=0)
        self.model, self.layer, self.folder = model, layer, Path(folder)
        self.medium, self.remote = medium, remote
        self.options = {
            "max_new_tokens": max_new_tokens,
            "temperature": float(temperature),
            "seed": seed,
            "end_of_thinking": medium.end_of_thinking,
        }
        self.unsteered = fingerprint(weights, self.options)  # the same at every layer and place
        self.options["place"] = place
        self.fingerprint = fingerprint(weights, layer, self.options)
        self.generated = 0  # conditions that were not on disk

    def transcripts(
        self, name: str, tasks: Sequence[Task], direction: Direction | None = None, strength: float = 0.0
    ) -> list[list[str]]:
        """Transcripts of one condition; ``name`` is the folder they are kept in ("half/choose"), unsteered
        ones in that of its last part ("choose")."""
        return self._transcripts(name, tasks, [(direction, strength)])[0]

    def run(
        self, name: str, tasks: Sequence[Task], conditions: Sequence[tuple[Direction, float]]
    ) -> pd.DataFrame:
        """The unsteered model and every condition on the same tasks: the rows of ``outcomes``, one per task
        and condition.

        Columns direction, label, strength and task come first; the unsteered rows have direction ``"none"``.
        """
        conditions, frames = [(None, 0.0), *conditions], []
        for (direction, strength), words in zip(conditions, self._transcripts(name, tasks, conditions)):
            frame = self.medium.outcomes(tasks, words, self.options["max_new_tokens"])
            first = [direction.name, direction.label] if direction else [NO_STEERING, NO_STEERING]
            names = dict(zip(("direction", "label"), first), strength=strength, task=range(len(tasks)))
            frames.append(pd.concat([pd.DataFrame(names, index=frame.index), frame], axis=1))
        return pd.concat(frames, ignore_index=True)

    def _transcripts(
        self, name: str, tasks: Sequence[Task], conditions: Sequence[tuple[Direction | None, float]]
    ) -> list[list[list[str]]]:
        vectors, files, unsteered, limit = [], [], [], self.options["max_new_tokens"]
        for direction, strength in conditions:
            strength = float(check("strength", strength, float))
            plain = direction is None or strength == 0
            if plain:
                label = stem = NO_STEERING
                vector = torch.zeros(self.model.config.get_text_config().hidden_size)
                made_from, folder = self.unsteered, self.folder / Path(name).name
            else:
                label, vector = direction.name, strength * direction.vector
                stem = f"{re.sub('[^a-z0-9]+', '-', label.lower())}_{strength:+.3f}"
                made_from, folder = self.fingerprint, self.folder / name
            key = fingerprint(made_from, vector.numpy(), [repr(t) for t in tasks])
            info = {"direction": label, "strength": strength}
            files.append(TranscriptFile(folder / f"{stem}.json", key, info))
            unsteered.append(plain)
            vectors.append(vector)

        def write(rows: Sequence[tuple[int, int]]) -> list[list[str]]:
            chosen, pushes = [tasks[task] for task, _ in rows], torch.stack([vectors[i] for _, i in rows])
            how = {"medium": self.medium, "remote": self.remote, **self.options}
            return steered(self.model, self.layer, chosen, pushes, **how)

        def lengths(done: Mapping[int, list]) -> np.ndarray:
            known = next((i for i in done if unsteered[i]), None)
            if known is None:
                return np.zeros(len(tasks))
            return self.medium.outcomes(tasks, done[known], limit)["length"].to_numpy()

        found, n = kept_transcripts(
            files, len(tasks), write, lambda i: unsteered[i], lengths, self.medium.batch_rows,
            f"steering, {name}: conditions of {len(tasks)} tasks",
        )  # fmt: skip
        self.generated += n
        return found

    def finish(self, *decided_by, **info) -> None:
        """Write the manifest of the folder: all conditions that a notebook asks for have been generated."""
        write_manifest(self.folder, fingerprint(decided_by[0], self.fingerprint, *decided_by[1:]), **info)
