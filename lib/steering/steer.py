"""Steering: add a feature's decoder row to the residual stream while the model thinks, and read what becomes
of the thought.

The experiment of the paper (E5), on a model that can be marked. A direction is added to the output of one
decoder layer of the distilled model, at the last position of the prompt ("think :") and at every token it
generates after it, until it closes its thinking; nothing is added to the prompt or to the answer::

    h_t  ->  h_t + strength * (mean residual norm) * d_i / ||d_i||

Strengths are in units of the mean residual norm, so that features, random directions and models can be
compared; the sign says whether a feature is added or taken away. One strength per row of a batch is allowed,
so a whole dose-response curve fits into one batch.

Thoughts are sampled at temperature 1, with noise that belongs to the task and the step: unsteered and steered
thoughts roll the same dice, and no row depends on its batch. Greedy decoding would hide what steering is to
change: a check that follows one step in three is never the likeliest next sentence, so a greedy model never
says it.

*Over-thinking*: the thought grows and the answer does not get better. *Incisive thinking*: it shrinks and the
answer does not get worse. A thought that never ends counts with the longest length allowed, and is reported
apart. What is steered, and how strongly, is chosen on validation puzzles and reported on test puzzles.

Source: Baek & Tegmark 2025 (arXiv 2503.03730), section on steering; units, splits, controls and marks are
ours.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from nnsight import TransformersModel
from torch import Tensor
from torch.nn import functional
from transformers import LogitsProcessorList, PreTrainedTokenizerBase

from ..activations.positions import PHASES, phase_of
from ..activations.store import SPLITS, Store
from ..crosscoder.model import CrossCoder, check_feature
from ..distil.trials import Task
from ..models.decode import Step, TaskNoise, decode, legs, until
from ..runs import Progress, fingerprint, write_text
from ..settings import UserError, check
from .ablation import batches
from .outcomes import NO_STEERING
from .tasks import PUZZLES, Medium

# positions that can be steered; everything but the bench steers the thinking
WHERE = ("prompt", "thinking", "all")


@dataclass(frozen=True)
class Direction:
    """A named vector [d] whose norm is the mean residual norm: strength 1. ``label`` is its category, or
    "random".
    """

    name: str
    label: str
    vector: Tensor


def feature_direction(
    crosscoder: CrossCoder, feature: int, norm: float, label: str = "feature", model: str = "distilled"
) -> Direction:
    """The raw decoder row of a feature in ``model``, brought to ``norm``. UserError for a feature that does
    not exist.
    """
    row = crosscoder.rows(model, raw=True)[check_feature(crosscoder, feature)].detach().float()
    if row.norm() == 0:
        raise UserError(f"feature {feature} has no decoder row in {model}: it cannot steer")
    return Direction(f"{label} {feature}", label, row * (norm / row.norm()))


def random_directions(n: int, width: int, norm: float, seed: int = 0) -> list[Direction]:
    """``n`` random directions of the same norm: the control for "any push of this size would have done it"."""
    noise = torch.randn(n, width, generator=torch.Generator().manual_seed(seed))
    return [Direction(f"random {i}", "random", row * (norm / row.norm())) for i, row in enumerate(noise)]


# --- which features are worth trying ------------------------------------------------------------------------


def influence(
    store: Store,
    model: TransformersModel,
    layer: int,
    labels: Sequence[str],
    split: str = "choose",
    documents: int = 64,
    seed: int = 0,
    medium: Medium = PUZZLES,
    remote: bool | str = False,
) -> dict[str, Tensor]:
    """What a small push does to the next sentence: for each label the gradient [d] of the probability that it
    opens.

    The probability is the sum over all first words of the label, averaged over the sentence ends of
    ``documents`` traces of the split; the push is one vector added to the output of ``layer`` at every
    position of the thinking. Its scalar product with a direction is the change that this direction would
    make, to first order (attribution; Nanda 2023, "Attribution patching"). ``medium`` knows the first words;
    ``remote``: where the model runs.
    """
    check("documents", documents, int, low=1)
    ends = (store.labels["ends"] == 1) & (store.labels["kind"] == 1) & (store.split == SPLITS.index(split))
    frame = pd.DataFrame({"document": store.documents[ends], "row": np.flatnonzero(ends)})
    number = frame.groupby("document").cumcount()
    # the first ends the prompt, the second is "think :"
    frame = frame[(number >= 1) & (store.labels["next_label"][frame["row"]] >= 0)]
    if medium is not PUZZLES:
        frame = frame[phase_of(store, frame["row"]) == PHASES.index("thinking")]
    found = np.unique(frame["document"])
    if len(found) == 0:
        raise UserError(
            f"there is no labelled trace in the split {split!r}: the corpus of this pair must carry labels"
        )
    drawn = np.random.default_rng(seed).permutation(found)[:documents]
    frame = frame[frame["document"].isin(drawn)]
    words = {
        label: torch.tensor(medium.opens(store, model.tokenizer, label), dtype=torch.long) for label in labels
    }
    total = {label: torch.zeros(store.widths["distilled"]) for label in labels}
    for batch in batches(store, frame, batch_size=32):
        rows, columns = batch.at
        first = torch.full((len(batch.mask),), batch.mask.shape[1]).scatter_reduce(0, rows, columns, "amin")
        thinking = (torch.arange(batch.mask.shape[1]) >= first[:, None]).float()[..., None]
        inputs = {"input_ids": batch.tokens, "attention_mask": batch.mask}
        found = _gradients(model, layer, inputs, batch.at, thinking, list(words.values()), remote)
        for label, gradient in zip(labels, found):
            total[label] += gradient
    return {label: gradient / len(frame) for label, gradient in total.items()}


def _gradients(
    model: TransformersModel,
    layer: int,
    inputs: dict[str, Tensor],
    at: tuple[Tensor, Tensor],
    thinking: Tensor,
    openings: list[Tensor],
    remote: bool | str,
) -> Tensor:
    """[labels, d]: the gradients of ``influence`` for one batch, taken where the model runs. ``openings``:
    ids of first words.
    """
    rows, columns = at
    with torch.enable_grad():
        with model.trace(inputs, remote=remote) as tracer:
            h = model.model.layers[layer].output
            push = torch.zeros(h.shape[-1], device=h.device, requires_grad=True)
            model.model.layers[layer].output = h + (thinking.to(h.device) * push).to(h.dtype)
            hidden = model.model.norm.output[rows, columns]
            logits = functional.linear(hidden, model.lm_head.weight, model.lm_head.bias)
            probability = logits.float().softmax(-1)
            sums = [probability[:, ids.to(h.device)].sum() for ids in openings]
            found = torch.stack(
                [torch.autograd.grad(total, push, retain_graph=True)[0] for total in sums]
            ).save()
            tracer.stop()
    return found.cpu()


def candidates(
    table: pd.DataFrame,
    crosscoder: CrossCoder,
    gradients: Mapping[str, Tensor],
    norm: float,
    n: int = 2,
    nrn_over: float = 0.5,
) -> pd.DataFrame:
    """Features worth trying for each label of ``gradients``, among the alive ones with an NRN above
    ``nrn_over``.

    ``by`` "reads": the one that foretells the label's sentences best (``auroc_<label>_choose`` of the feature
    table; the paper's way). ``by`` "writes": the ``n`` whose decoder rows promote them most (``influence``).
    Columns label, feature, by, auroc, influence (first-order change of the sentence's probability at strength
    1), times_random (influence over that of a typical random direction of the same norm) and nrn. A feature
    is a candidate of one label only.
    """
    check("candidates", n, int, low=0)
    usable = table[table["alive"].astype(bool) & (table["nrn"] > nrn_over)].set_index("feature")
    if missing := [label for label in gradients if f"auroc_{label}_choose" not in usable]:
        raise UserError(
            f"the feature table has no AUROC of {', '.join(missing)}: run notebook 03_inspect_features again"
        )
    directions = functional.normalize(crosscoder.rows("distilled", raw=True), dim=-1)[usable.index.tolist()]
    measured = {
        label: pd.DataFrame(
            {
                "auroc": usable[f"auroc_{label}_choose"],
                "influence": norm * (directions @ gradient).numpy(),
                "nrn": usable["nrn"],
            }
        )
        for label, gradient in gradients.items()
    }
    rows, taken = [], set()
    for by, column, wanted in (("reads", "auroc", 1), ("writes", "influence", n)):
        for label, scores in measured.items():
            typical = norm * float(gradients[label].norm()) / directions.shape[1] ** 0.5
            for feature in scores.drop(index=list(taken))[column].dropna().nlargest(wanted).index:
                taken.add(feature)
                row = scores.loc[feature]
                rows.append(
                    {
                        "label": label,
                        "feature": int(feature),
                        "by": by,
                        "auroc": row["auroc"],
                        "influence": row["influence"],
                        "times_random": row["influence"] / typical if typical else np.nan,
                        "nrn": row["nrn"],
                    }
                )
    order = {label: i for i, label in enumerate(gradients)}
    frame = pd.DataFrame(
        rows, columns=["label", "feature", "by", "auroc", "influence", "times_random", "nrn"]
    )
    return frame.sort_values("label", key=lambda column: column.map(order), kind="stable", ignore_index=True)


@torch.no_grad()
def generate(
    model: TransformersModel,
    layer: int,
    tasks: Sequence[Task],
    vectors: Tensor,
    max_new_tokens: int = 260,
    temperature: float = 0.0,
    seed: int = 0,
    end_of_thinking: str | None = "done",
    only_at: str | None = None,
    batch_size: int | None = None,
    remote: bool | str = False,
    medium: Medium = PUZZLES,
    where: str = "thinking",
) -> list[list[str]]:
    """Transcripts, tokens as text, each row steered by its own vector. ``medium`` says how tasks are put;
    ``batch_size`` is its own unless told.

    ``vectors`` [tasks, d] is what is added (strength included; a row of zeros is not steered). It acts on the
    newest position of every step until the row has written ``end_of_thinking`` (None: to the end); with
    ``only_at``, only where that position holds this token (".": at the ends of sentences, where the next one
    is decided). ``temperature`` 0 is greedy; above it thoughts are sampled (``TaskNoise``). Rows are padded
    on the left and do not influence each other.

    ``where`` "thinking" is that: from the prompt's last position on. "prompt" steers the positions of the
    prompt before it, "all" every position, the answer's too; ``end_of_thinking`` and ``only_at`` have no say
    there.
    """
    if len(vectors) != len(tasks):
        raise ValueError(f"{len(vectors)} vectors for {len(tasks)} tasks: must be one each")
    transcripts, size = [], batch_size or medium.batch_rows
    for start in range(0, len(tasks), size):
        some, added = tasks[start : start + size], vectors[start : start + size]
        step, ids, mask = _stepper(
            model, layer, some, added, temperature, seed, end_of_thinking, only_at, remote, medium, where
        )
        # a distant server keeps no cache between two requests: there, one leg is the whole way
        eos, leg = model.tokenizer.eos_token_id, max_new_tokens if remote else None
        decoded = decode(step, model.config, ids, mask, max_new_tokens, eos, leg=leg)
        transcripts += [medium.transcript(model.tokenizer, row) for row in decoded]
    return transcripts


@torch.no_grad()
def stream(
    model: TransformersModel,
    layer: int,
    tasks: Sequence[Task],
    vectors: Tensor,
    max_new_tokens: int = 260,
    temperature: float = 0.0,
    seed: int = 0,
    end_of_thinking: str | None = "done",
    remote: bool | str = False,
    medium: Medium = PUZZLES,
    where: str = "thinking",
    leg: int = 4,
) -> Iterator[tuple[list[list[str]], list[bool]]]:
    """``generate`` in one batch, watched: every ``leg`` tokens (all transcripts so far, which of them have
    ended). What comes last is what ``generate`` returns. To stop, stop asking."""
    step, ids, mask = _stepper(
        model, layer, tasks, vectors, temperature, seed, end_of_thinking, None, remote, medium, where
    )
    said, ended, eos = [[] for _ in tasks], [False] * len(tasks), model.tokenizer.eos_token_id
    for rows, new, over in legs(
        step, model.config, ids, mask, max_new_tokens, eos, max_new_tokens if remote else leg
    ):
        for row, words, last in zip(rows.tolist(), new.tolist(), over.tolist()):
            said[row], ended[row] = medium.transcript(model.tokenizer, until(words, eos)), last
        yield list(said), list(ended)


def _stepper(
    model: TransformersModel,
    layer: int,
    tasks: Sequence[Task],
    added: Tensor,
    temperature: float,
    seed: int,
    end_of_thinking: str | None,
    only_at: str | None,
    remote: bool | str,
    medium: Medium,
    where: str,
) -> tuple[Step, Tensor, Tensor]:
    """How a batch is continued, and its prompts: (step of ``lib.models.decode``, ids [tasks, length], mask [tasks,
    length]).
    """
    tokenizer = model.tokenizer
    check("where", where, str, choices=WHERE)
    end, only = _token(tokenizer, "end_of_thinking", end_of_thinking), _token(tokenizer, "only_at", only_at)
    if where != "thinking":
        end = only = None
    prompts = [medium.prompt(task) for task in tasks]
    batch = tokenizer(
        prompts,
        return_tensors="pt",
        padding=True,
        padding_side="left",
        add_special_tokens=medium.special_tokens,
    )
    noise = [TaskNoise(tasks, temperature, seed)] if temperature > 0 else []
    thinking = torch.full((len(tasks), 1), where != "prompt")

    def step(ids, mask, rows, cache, n):
        for source in noise:
            source.rows = rows
        how = {
            "max_new_tokens": n,
            "do_sample": False,
            "logits_processor": LogitsProcessorList(noise),
            "remote": remote,
            "pad_token_id": tokenizer.pad_token_id,
            "eos_token_id": tokenizer.eos_token_id,
        }
        longer = _steered(
            model,
            layer,
            {"input_ids": ids, "attention_mask": mask},
            added[rows],
            thinking[rows],
            end,
            only,
            how if remote else how | {"past_key_values": cache},
            where != "thinking",
        )
        if end is not None:
            thinking[rows] &= (longer[:, ids.shape[1] :] != end).all(1, keepdim=True)
        return longer

    return step, batch["input_ids"], batch["attention_mask"]


def _steered(
    model: TransformersModel,
    layer: int,
    inputs: dict[str, Tensor],
    added: Tensor,
    thinking: Tensor,
    end: int | None,
    only: int | None,
    how: dict,
    prompt: bool = False,
) -> Tensor:
    """Ids [rows, longer] of one leg. ``added`` [rows, d] acts on the newest position while ``thinking``
    [rows, 1] holds, and with ``prompt`` on those before it, which only the first step of the first leg reads:
    later ones have them in the cache."""
    mask = inputs["attention_mask"]
    with warnings.catch_warnings():
        # how an open loop over the steps ends
        warnings.filterwarnings("ignore", message=".*was never reached.*")
        with model.generate(**how) as tracer:
            with tracer.invoke(inputs):
                for _ in tracer.iter[:]:
                    newest = model.model.embed_tokens.input[:, -1:]
                    thinking = thinking.to(newest.device)
                    if end is not None:
                        thinking = thinking & (newest != end)
                    where = thinking if only is None else thinking & (newest == only)
                    h = model.model.layers[layer].output
                    h[:, -1] += where.to(h.device) * added.to(h.device)
                    if prompt:
                        earlier = h.shape[1] - 1
                        h[:, :earlier] += mask[:, :earlier, None].to(h.device) * added[:, None].to(h.device)
            with tracer.invoke():  # what follows the loop must not stand in its body: it ends early
                ids = tracer.result.save()
    return ids.cpu()


def _token(tokenizer: PreTrainedTokenizerBase, name: str, word: str | None) -> int | None:
    """The id of a word that must be one token; None for None. UserError, naming the parameter, for anything
    else.
    """
    found = None if word is None else tokenizer.convert_tokens_to_ids(word)
    if word is not None and found in (None, tokenizer.unk_token_id):
        raise UserError(f"{name} is {word!r}, which is not a token of this model")
    return found


class Steering:
    """A model under steering, with a memory: every condition's transcripts are kept in ``folder``, and made
    only once.

    ``remote`` says where the model runs. ``mark`` is the fingerprint of its weights; directions, strengths,
    tasks and limits are added to it, so a transcript is used again only if all that decides it is the same.
    """

    def __init__(
        self,
        model: TransformersModel,
        layer: int,
        folder: Path,
        mark: str,
        max_new_tokens: int = 260,
        temperature: float = 1.0,
        seed: int = 0,
        end_of_thinking: str | None = "done",
        only_at: str | None = None,
        medium: Medium = PUZZLES,
        remote: bool | str = False,
    ):
        check("max_new_tokens", max_new_tokens, int, low=1)
        check("temperature", temperature, float, low=0)
        self.model, self.layer, self.folder, self.medium, self.remote = (
            model,
            layer,
            Path(folder),
            medium,
            remote,
        )
        self.how = {
            "max_new_tokens": max_new_tokens,
            "temperature": float(temperature),
            "seed": seed,
            "end_of_thinking": end_of_thinking,
        }
        # else the fingerprint stays that of transcripts made before there was a choice
        if only_at is not None:
            self.how["only_at"] = only_at
        self.mark = fingerprint(mark, layer, self.how)
        self.generated = 0  # conditions that were not found on disk

    def transcripts(
        self, name: str, tasks: Sequence[Task], direction: Direction | None = None, strength: float = 0.0
    ) -> list[list[str]]:
        """Transcripts of one condition; ``name`` is the folder they are kept in ("choose", "report")."""
        return self._all(name, tasks, [(direction, strength)])[0]

    def run(
        self, name: str, tasks: Sequence[Task], conditions: Sequence[tuple[Direction, float]]
    ) -> pd.DataFrame:
        """The unsteered model and every condition on the same tasks: the rows of ``outcomes``, one per task
        and condition.

        Columns direction, label, strength and task come first; the unsteered rows have direction ``"none"``.
        """
        # two batches are generated between two writings to disk: what an interruption can cost
        everything, at_once = [(None, 0.0), *conditions], max(1, 2 * self.medium.batch_rows // len(tasks))
        groups = [everything[:1], *(everything[i : i + at_once] for i in range(1, len(everything), at_once))]
        frames: list[pd.DataFrame] = []
        with Progress(f"steering, {name}: conditions of {len(tasks)} tasks", len(everything)) as progress:
            for group in groups:
                lengths = frames[0]["length"].to_numpy() if frames else None
                for (direction, strength), said in zip(group, self._all(name, tasks, group, lengths)):
                    frame = self.medium.outcomes(tasks, said, self.how["max_new_tokens"])
                    frame.insert(0, "task", range(len(tasks)))
                    frame.insert(0, "strength", strength)
                    frame.insert(0, "label", direction.label if direction else NO_STEERING)
                    frame.insert(0, "direction", direction.name if direction else NO_STEERING)
                    frames.append(frame)
                progress.update(len(frames), frames[-1]["direction"].iloc[0])
        return pd.concat(frames, ignore_index=True)

    def _all(
        self,
        name: str,
        tasks: Sequence[Task],
        conditions: Sequence[tuple[Direction | None, float]],
        lengths: np.ndarray | None = None,
    ) -> list[list[list[str]]]:
        """Transcripts of several conditions: what is on disk is read, the rest is generated in one go and
        written.

        A batch is decoded until its last row has ended, so tasks of like length ([tasks], the unsteered one
        where it is known) go together; and the conditions of one task share its dice.
        """
        kept, vectors = [], []
        for direction, strength in conditions:
            strength = float(check("strength", strength, float))
            steered = direction is not None and strength != 0
            vectors.append(
                strength * direction.vector if steered else torch.zeros(self.model.config.hidden_size)
            )
            slug = (
                f"{re.sub('[^a-z0-9]+', '-', direction.name.lower())}_{strength:+.3f}"
                if steered
                else NO_STEERING
            )
            mark = fingerprint(self.mark, vectors[-1].numpy(), [repr(t) for t in tasks])
            kept.append(
                _Kept(
                    self.folder / name / f"{slug}.json",
                    mark,
                    direction.name if steered else NO_STEERING,
                    strength,
                )
            )
        found = [file.read() for file in kept]
        missing = [i for i, said in enumerate(found) if said is None]
        if missing:
            order = np.argsort(np.zeros(len(tasks)) if lengths is None else lengths, kind="stable")
            rows = [(i, task) for task in order for i in missing]
            pushes = torch.stack([vectors[i] for i, _ in rows])
            said = generate(
                self.model,
                self.layer,
                [tasks[task] for _, task in rows],
                pushes,
                medium=self.medium,
                remote=self.remote,
                **self.how,
            )
            made = dict(zip(rows, said))
            for i in missing:
                found[i] = [made[i, task] for task in range(len(tasks))]
                kept[i].write(found[i])
            self.generated += len(missing)
        return found


@dataclass(frozen=True)
class _Kept:
    """The file of one condition, and the fingerprint of all that decides what is in it."""

    file: Path
    mark: str
    direction: str
    strength: float

    def read(self) -> list[list[str]] | None:
        """The transcripts; None if there are none, if they were made otherwise, or if the file is damaged."""
        try:
            kept = json.loads(self.file.read_text(encoding="utf-8"))
            return kept["transcripts"] if kept["fingerprint"] == self.mark else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def write(self, transcripts: list[list[str]]) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        info = {
            "fingerprint": self.mark,
            "direction": self.direction,
            "strength": self.strength,
            "transcripts": transcripts,
        }
        write_text(self.file, json.dumps(info))
