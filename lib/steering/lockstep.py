"""Two models in lock-step: a crosscoder reads both while one of them speaks, and what it reads changes what
is said.

The features of a crosscoder are functions of *both* residual streams, so removing one of them from a thought
that is being generated needs both models at every token. Base and distilled model run on the same ids, each
with its own cache; at every position t::

    x_m      the residual stream of each model m at its layer (intact: nothing below the layer is ever changed)
    f        = encode(x_base, x_distilled)            the joint code                  (``Moment.joint``)
    f^m      = encode_from(m, x_m)                    the code as m alone gives it    (``Moment.alone``)
    h_t  ->  h_t + change(f, f^base, f^distilled)     in the *speaker*, at the layer that the crosscoder reads

and the speaker's next token goes to both. All changes but ``Reconstruct`` preserve the error: what the
crosscoder does not explain stays where it is. The readings depend on the ids alone, so an intervention acts
on later layers and, through the tokens, on the future.

``encode_from`` leaves the other model at its mean; ``reading="slots"`` puts the speaker's scaled activation
in every model's slot instead (models of one width). Neither is what the crosscoder was trained on: compare
swaps with ``Reconstruct("own")``.

A row of a batch is a task under one condition, and depends on no other row; sampled rows roll their task's
dice (``steering.TaskNoise``). Plain forward hooks rather than nnsight: within one token the listener has to
be read, up to its layer, before the speaker runs with an edit made of both readings, step after step over two
caches; nnsight's generation runs one model at a time.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..crosscoder.codes import encode_slots
from ..crosscoder.model import CrossCoder
from ..distil.trials import Task, prompt_words, transcript
from ..models.decode import TaskNoise, decode, roomy_cache
from ..models.pairs import decoder_layers
from ..settings import UserError
from .tasks import PUZZLES

# "think :" is given; or nothing after the question is, and the model may answer at once
MODES = ("think", "free")
PLACES = ("thinking", "ends", "everywhere")
READINGS = ("mean", "slots")
DIRECTIONS = 4096  # random directions that ``RandomLike`` takes in turns


# --- what an intervention sees ------------------------------------------------------------------------------


@dataclass
class Moment:
    """Some rows at their newest positions: ``acts`` {model: raw [rows, positions, d_m]}, ``key`` [rows] (a
    number that belongs to the task) and ``position`` [rows, positions] in the text. Codes are computed when
    asked for, once.
    """

    crosscoder: CrossCoder
    speaker: str
    acts: Mapping[str, Tensor]
    key: Tensor
    position: Tensor
    made: dict = field(default_factory=dict)

    @property
    def listener(self) -> str:
        return next(name for name in self.crosscoder.names if name != self.speaker)

    def joint(self) -> Tensor:
        """f [rows, positions, F]."""
        if "joint" not in self.made:
            self.made["joint"] = self.crosscoder.encode([self.acts[name] for name in self.crosscoder.names])
        return self.made["joint"]

    def alone(self, name: str, reading: str = "mean") -> Tensor:
        """f [rows, positions, F] as read from one model alone."""
        if (name, reading) not in self.made:
            self.made[name, reading] = read_alone(self.crosscoder, name, self.acts[name], reading)
        return self.made[name, reading]

    def code(self, which: str, reading: str = "mean") -> Tensor:
        """``which``: "joint", "own" (the speaker alone) or "listener" (the other model alone)."""
        return (
            self.joint()
            if which == "joint"
            else self.alone({"own": self.speaker, "listener": self.listener}[which], reading)
        )


def read_alone(crosscoder: CrossCoder, name: str, acts: Tensor, reading: str = "mean") -> Tensor:
    """f [..., F] from one model's raw activations: the others at their mean ("mean"), or with this model's
    scaled activation ("slots").
    """
    if reading == "mean":
        return crosscoder.encode_from(name, acts)
    if len(set(crosscoder.widths)) > 1:
        raise UserError(
            f"reading 'slots' needs models of one width, these have {crosscoder.widths}: take reading 'mean'"
        )
    return encode_slots(crosscoder, name, acts)


# --- interventions: each gives a change [rows, positions, d] of the speaker's residual stream ---------------


@dataclass(frozen=True)
class Scale:
    """sum_{i in features} (weight_i f_i + offset_i) d_i^decoder.

    Weight -1 and offset 0 remove the features (zero-ablation); offset = mean activation replaces them by
    their mean; weight g - 1 turns their use up or down. ``code``: "joint" or "own" (see ``Moment.code``).
    ``decoder`` None is the speaker's own; the other model's needs the same width.
    """

    features: tuple[int, ...]
    weights: tuple[float, ...] | float = -1.0
    offsets: tuple[float, ...] | float = 0.0
    code: str = "joint"
    decoder: str | None = None
    reading: str = "mean"

    def change(self, moment: Moment) -> Tensor:
        chosen = list(self.features)
        f = moment.code(self.code, self.reading)[..., chosen]
        rows = _rows(moment, self.decoder)[chosen]
        return (
            f * torch.as_tensor(self.weights, dtype=f.dtype) + torch.as_tensor(self.offsets, dtype=f.dtype)
        ) @ rows


@dataclass(frozen=True)
class Swap:
    """sum_i (f_i^to - f_i^own) d_i^speaker: what ``to`` ("listener" or "joint") says of the features, in
    place of what the speaker alone says. ``features`` None: all.
    """

    to: str = "listener"
    features: tuple[int, ...] | None = None
    reading: str = "mean"

    def change(self, moment: Moment) -> Tensor:
        chosen = slice(None) if self.features is None else list(self.features)
        return (moment.code(self.to, self.reading) - moment.alone(moment.speaker, self.reading))[
            ..., chosen
        ] @ _rows(moment)[chosen]


@dataclass(frozen=True)
class Reconstruct:
    """decode(f)^speaker - h: the residual stream is *replaced*, error and all. ``code``: "joint", "own" or
    "listener".
    """

    code: str
    reading: str = "mean"

    def change(self, moment: Moment) -> Tensor:
        crosscoder, h = moment.crosscoder, moment.acts[moment.speaker]
        return (
            moment.code(self.code, self.reading) @ _rows(moment)
            + crosscoder.bias(moment.speaker, raw=True)
            - h
        )


@dataclass(frozen=True)
class Transplant:
    """x_listener - h, in the units of the speaker: the other model's activation in place of one's own. Models
    of one width only.
    """

    def change(self, moment: Moment) -> Tensor:
        scales = dict(zip(moment.crosscoder.names, moment.crosscoder.scales.tolist()))
        mine, other = moment.acts[moment.speaker], moment.acts[moment.listener]
        if mine.shape[-1] != other.shape[-1]:
            raise UserError(
                f"{moment.listener} has width {other.shape[-1]}, {moment.speaker} {mine.shape[-1]}: it has no"
                " place there"
            )
        return other * (scales[moment.listener] / scales[moment.speaker]) - mine


@dataclass(frozen=True)
class RandomLike:
    """Random directions with, at each position, the norm of what ``of`` would change there. Which one belongs
    to task and position.
    """

    of: object
    seed: int = 0

    def change(self, moment: Moment) -> Tensor:
        norms = self.of.change(moment).norm(dim=-1, keepdim=True)
        table = _directions(moment.acts[moment.speaker].shape[-1], self.seed)
        return norms * table[(moment.key[:, None] + 7919 * moment.position) % DIRECTIONS]


@dataclass(frozen=True)
class Along:
    """One direction, ``vector`` [d] as a tuple, with sign; its length is ``strength``, or the norm of what
    ``like`` would change there.
    """

    vector: tuple[float, ...]
    strength: float = 1.0
    like: object | None = None

    def change(self, moment: Moment) -> Tensor:
        h = moment.acts[moment.speaker]
        vector = torch.tensor(self.vector, dtype=h.dtype)
        unit = vector / vector.norm()
        size = 1.0 if self.like is None else self.like.change(moment).norm(dim=-1, keepdim=True)
        return (self.strength * size * unit).expand_as(h)


@dataclass(frozen=True)
class Bias:
    """No change of the residual stream: ``value`` is added to the logits of ``words`` where the intervention
    acts.
    """

    words: tuple[str, ...]
    value: float


def _rows(moment: Moment, decoder: str | None = None) -> Tensor:
    """Raw decoder rows [F, d] of the speaker or of ``decoder``; of another model in *its* units, so scaled to
    the speaker's.
    """
    crosscoder = moment.crosscoder
    name, speaker = decoder or moment.speaker, moment.speaker
    if ("rows", name) not in moment.made:
        widths = dict(zip(crosscoder.names, crosscoder.widths))
        if widths[name] != widths[speaker]:
            raise UserError(
                f"the decoder of {name} has width {widths[name]}, {speaker} has {widths[speaker]}: it cannot"
                " stand in for it"
            )
        moment.made["rows", name] = crosscoder.rows(name) / float(
            crosscoder.scales[crosscoder.names.index(speaker)]
        )
    return moment.made["rows", name]


_tables: dict[tuple[int, int], Tensor] = {}


def _directions(width: int, seed: int) -> Tensor:
    if (width, seed) not in _tables:
        noise = torch.randn(DIRECTIONS, width, generator=torch.Generator().manual_seed(seed))
        _tables[width, seed] = noise / noise.norm(dim=-1, keepdim=True)
    return _tables[width, seed]


@dataclass(frozen=True)
class Act:
    """Who speaks, from which prompt (MODES), what is done to it (None: nothing), and where (PLACES).

    "thinking": from the last token of the prompt to the end of thinking ("done"); "ends": there, but only at
    full stops, where the next sentence is decided; "everywhere": at every token but the first, which
    crosscoders do not learn, the prompt included.
    """

    speaker: str
    intervention: object | None = None
    where: str = "thinking"
    mode: str = "think"


# --- generating ---------------------------------------------------------------------------------------------


@torch.no_grad()
def generate(
    models: Mapping[str, PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    layers: Mapping[str, int],
    crosscoder: CrossCoder,
    tasks: Sequence[Task],
    acts: Sequence[Act],
    max_new_tokens: int = 250,
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int = PUZZLES.batch_rows,
) -> list[list[str]]:
    """Transcripts, one per (task, act): the words after the prompt, "think :" included if it was given
    (``trials.generate``).

    ``models`` {name: model} for the crosscoder's names, ``layers`` {name: index of the decoder layer that it
    reads}. In mode "free" a row may say ``max_new_tokens`` + 2 tokens, so that thoughts are as long as in
    mode "think". Rows of one speaker and mode are decoded together, in the given order. UserError for a model
    that is missing or that the crosscoder does not read, ValueError for unknown modes and places.
    """
    if len(tasks) != len(acts):
        raise ValueError(f"{len(tasks)} tasks for {len(acts)} acts: must be one each")
    for act in acts:
        if act.mode not in MODES or act.where not in PLACES:
            raise ValueError(
                f"mode {act.mode!r} at {act.where!r}: must be one of {', '.join(MODES)}, at one of"
                f" {', '.join(PLACES)}"
            )
        if act.speaker not in crosscoder.names or set(crosscoder.names) - set(models):
            raise UserError(
                f"the models {', '.join(models)} are given: the crosscoder reads"
                f" {', '.join(crosscoder.names)}, and {act.speaker} is to speak"
            )
    said: dict[int, list[str]] = {}
    for speaker, mode in dict.fromkeys((act.speaker, act.mode) for act in acts):
        mine = [i for i, act in enumerate(acts) if (act.speaker, act.mode) == (speaker, mode)]
        for start in range(0, len(mine), batch_size):
            rows = mine[start : start + batch_size]
            duet = _Duet(
                models,
                tokenizer,
                layers,
                crosscoder,
                [tasks[i] for i in rows],
                [acts[i] for i in rows],
                temperature,
                seed,
            )
            said |= zip(rows, duet.decode(max_new_tokens if mode == "think" else max_new_tokens + 2))
    return [said[i] for i in range(len(tasks))]


class _Stop(Exception):
    """The listener's forward is over: it has been read."""


class _Duet:
    """One batch of rows with one speaker."""

    def __init__(self, models, tokenizer, layers, crosscoder, tasks, acts, temperature, seed):
        self.models, self.tokenizer, self.crosscoder = models, tokenizer, crosscoder
        self.speaker, self.mode = acts[0].speaker, acts[0].mode
        keep = {"think": None, "free": -2}[self.mode]
        prompts = [" ".join(prompt_words(task)[:keep]) for task in tasks]
        self.batch = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left")
        self.prompt = self.batch["input_ids"].shape[1]
        self.key = torch.tensor([zlib.crc32(repr(task).encode()) for task in tasks])
        self.noise = TaskNoise(tasks, temperature, seed) if temperature > 0 else None
        self.stop, self.done = tokenizer.convert_tokens_to_ids([".", "done"])
        self.thinking = torch.ones(len(tasks), dtype=torch.bool)
        names = list(dict.fromkeys(acts))
        self.kind = torch.tensor([names.index(act) for act in acts])  # of every row
        self.distinct = names
        self.listens = any(
            act.intervention is not None and not isinstance(act.intervention, Bias) for act in acts
        )
        self.bias_ids = {
            i: torch.tensor(sorted(set(tokenizer.convert_tokens_to_ids(list(act.intervention.words)))))
            for i, act in enumerate(names)
            if isinstance(act.intervention, Bias)
        }
        self.caches = {
            name: roomy_cache(models[name].config) for name in crosscoder.names if name != self.speaker
        }
        self.cached = torch.arange(len(tasks))  # the rows that the listeners' caches hold
        # the layers
        self.read = {name: decoder_layers(models[name])[layers[name]] for name in crosscoder.names}

    def decode(self, max_new_tokens: int) -> list[list[str]]:
        config, eos = self.models[self.speaker].config, self.tokenizer.eos_token_id
        said = decode(
            self._leg, config, self.batch["input_ids"], self.batch["attention_mask"], max_new_tokens, eos
        )
        words = [transcript(self.tokenizer, row) for row in said]
        return words if self.mode == "think" else [row[2:] for row in words]  # "think :" was not given

    def _leg(self, ids: Tensor, mask: Tensor, rows: Tensor, cache, n: int) -> Tensor:
        if len(rows) < len(self.cached):
            left = torch.isin(self.cached, rows).nonzero().flatten()
            for other in self.caches.values():
                other.batch_select_indices(left)
            self.cached = rows
        for _ in range(n):
            seen = cache.get_seq_length()
            position = (mask.cumsum(1) - 1).clamp(min=0)
            inputs = {
                "input_ids": ids[:, seen:],
                "attention_mask": mask,
                "position_ids": position[:, seen:],
                "use_cache": True,
            }
            where = self._where(ids, mask, position, rows, seen)
            heard = (
                {name: self._listen(name, inputs, other) for name, other in self.caches.items()}
                if self.listens
                else {}
            )
            logits = self._speak(inputs, cache, heard, position[:, seen:], where, rows)
            self._add_bias(logits, where, rows)
            if self.noise is not None:
                self.noise.rows = rows
                logits = self.noise(ids, logits)
            newest = logits.argmax(-1, keepdim=True)
            ids, mask = torch.cat([ids, newest], dim=1), torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            self.thinking[rows] &= newest[:, 0] != self.done
            if (ids[:, self.prompt :] == self.tokenizer.eos_token_id).any(1).all():
                break
        return ids

    def _where(self, ids, mask, position, rows, seen) -> dict[str, Tensor]:
        """{place: bool [rows, new positions]}: where each kind of place is among the positions that are read
        now.
        """
        new = torch.arange(seen, ids.shape[1])
        thinking = self.thinking[rows][:, None] & (new >= self.prompt - 1)
        return {
            "everywhere": (mask * position)[:, seen:] > 0,
            "thinking": thinking,
            "ends": thinking & (ids[:, seen:] == self.stop),
        }

    def _listen(self, name: str, inputs: dict, cache) -> Tensor:
        found = []

        def stop(module, args, output):
            found.append(output)
            raise _Stop

        handle = self.read[name].register_forward_hook(stop)
        try:
            self.models[name](**inputs, past_key_values=cache)
        except _Stop:
            pass
        finally:
            handle.remove()
        return found[0]

    def _speak(self, inputs, cache, heard, position, where, rows) -> Tensor:
        """Logits [rows, vocabulary] after the newest token."""

        def edit(module, args, output):
            if not self.listens:
                return None
            everything, kinds, edited = {**heard, self.speaker: output}, self.kind[rows], output.clone()
            for i in kinds.unique().tolist():
                act, mine = self.distinct[i], (kinds == i).nonzero().flatten()
                if act.intervention is None or i in self.bias_ids or not where[act.where][mine].any():
                    continue
                acts = {name: x[mine] for name, x in everything.items()}
                moment = Moment(self.crosscoder, self.speaker, acts, self.key[rows][mine], position[mine])
                edited[mine] += act.intervention.change(moment) * where[act.where][mine, :, None]
            return edited

        handle = self.read[self.speaker].register_forward_hook(edit)
        try:
            return (
                self.models[self.speaker](**inputs, past_key_values=cache, logits_to_keep=1)
                .logits[:, -1]
                .float()
            )
        finally:
            handle.remove()

    def _add_bias(self, logits: Tensor, where: dict[str, Tensor], rows: Tensor) -> None:
        for i, words in self.bias_ids.items():
            act, mine = self.distinct[i], (self.kind[rows] == i).nonzero().flatten()
            logits[mine[:, None], words] += act.intervention.value * where[act.where][mine, -1:].float()
