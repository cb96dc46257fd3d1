"""Make models write, with an intervention: the one engine of steering and of whole thoughts.

A ``Treatment`` says who writes, from which prompt, what is done to its residual stream, and where. Where the
change depends on the other model as well, both run on the same ids, each with its own cache: the other model
is read up to its layer, then the writer runs with the edit, and its next token goes to both. Nothing below
the layer is ever changed, so what is read depends on the ids alone. Plain forward hooks rather than nnsight:
within one token the other model has to be read first. A model on a remote server is steered through nnsight.

A row of a batch is a task under one treatment and depends on no other row; rows of one task use the same
random numbers (``models.decode.TaskNoise``). ``transcripts`` makes them in any number, ``steered`` adds one
vector to each row, ``steered_stream`` is watched, and ``kept_transcripts`` keeps them on disk."""

from __future__ import annotations

import json
import warnings
import zlib
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from nnsight import TransformersModel
from torch import Tensor
from transformers import LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase

from ..crosscoder.model import CrossCoder
from ..models.decode import TaskNoise, continued, decode, ends_of, legs, padded, roomy_cache, until
from ..models.pairs import decoder_layers
from ..models.reader import embedding_envoy, layer_envoys, outputs_of
from ..runs import Progress, write_text
from ..settings import UserError, check
from .interventions import LogitBias, RowVectors, State
from .tasks import PUZZLES, Medium

# "think :" is given; or nothing after the question is, and the model may answer at once
MODES = ("think", "free")
PLACES = ("thinking", "ends", "everywhere", "prompt", "all")
STEERED = ("prompt", "thinking", "all")  # places for ``steered``; all experiments steer the thinking


@dataclass(frozen=True)
class Treatment:
    """Who writes, what is done to it (None: nothing), where (PLACES), and from which prompt (MODES).

    "thinking": from the last token of the prompt to the end of thinking; "ends": there, but only at full
    stops, where the next sentence is decided; "everywhere": at every token but the first, which crosscoders
    do not learn, the prompt included; "prompt": before the prompt's last token; "all": at every token."""

    writer: str
    intervention: object | None = None
    place: str = "thinking"
    mode: str = "think"


@torch.no_grad()
def transcripts(
    models: Mapping[str, PreTrainedModel],
    tokenizer: PreTrainedTokenizerBase,
    layers: Mapping[str, int],
    crosscoder: CrossCoder,
    tasks: Sequence,
    treatments: Sequence[Treatment],
    max_new_tokens: int = 250,
    temperature: float = 0.0,
    seed: int = 0,
    batch_size: int = PUZZLES.batch_rows,
) -> list[list[str]]:
    """Transcripts of puzzles, one per (task, treatment): the words after the prompt, "think :" included if it
    was given.

    ``models`` {name: model} for the crosscoder's names, ``layers`` {name: index of the decoder layer that it
    reads}. In mode "free" a row may have ``max_new_tokens`` + 2 tokens, so that thoughts are as long as in
    mode "think". Rows of one writer and mode are decoded together, in the given order. UserError for a model
    that is missing or that the crosscoder does not read, ValueError for unknown modes and places."""
    if len(tasks) != len(treatments):
        raise ValueError(f"{len(tasks)} tasks for {len(treatments)} treatments: must be one each")
    for treatment in treatments:
        if treatment.mode not in MODES or treatment.place not in PLACES:
            raise ValueError(
                f"mode {treatment.mode!r} at {treatment.place!r}: must be one of {', '.join(MODES)}, at one"
                f" of {', '.join(PLACES)}"
            )
        if treatment.writer not in crosscoder.names or set(crosscoder.names) - set(models):
            raise UserError(
                f"the models {', '.join(models)} are given: the crosscoder reads"
                f" {', '.join(crosscoder.names)}, and {treatment.writer} is to write"
            )
    written: dict[int, list[str]] = {}
    for writer, mode in dict.fromkeys((t.writer, t.mode) for t in treatments):
        chosen = [i for i, t in enumerate(treatments) if (t.writer, t.mode) == (writer, mode)]
        for start in range(0, len(chosen), batch_size):
            rows = chosen[start : start + batch_size]
            batch = _Batch(
                models, tokenizer, layers, [tasks[i] for i in rows], [treatments[i] for i in rows],
                temperature, seed, PUZZLES, crosscoder, rows,
            )  # fmt: skip
            written |= zip(rows, batch.decode(max_new_tokens if mode == "think" else max_new_tokens + 2))
    return [written[i] for i in range(len(tasks))]


@torch.no_grad()
def steered(
    model: TransformersModel,
    layer: int,
    tasks: Sequence,
    vectors: Tensor,
    max_new_tokens: int = 260,
    batch_size: int | None = None,
    medium: Medium = PUZZLES,
    **how,
) -> list[list[str]]:
    """Transcripts, tokens as text, each row steered by its own vector. ``medium`` says how tasks are put.

    ``vectors`` [tasks, d] is what is added to the output of ``layer`` (strength included; a row of zeros is
    not steered). ``how``: ``temperature`` (0, greedy, unless given; above it thoughts are sampled), ``seed``,
    ``remote``, and ``place``: "thinking" until the row has written ``end_of_thinking`` (None: to the end; "":
    the medium's), "ends" likewise, where the newest token is ``sentence_end``, "prompt" or "all"."""
    if len(vectors) != len(tasks):
        raise ValueError(f"{len(vectors)} vectors for {len(tasks)} tasks: must be one each")
    written, size = [], batch_size or medium.batch_rows
    for start in range(0, len(tasks), size):
        some = slice(start, start + size)
        batch = _steered_batch(model, layer, tasks[some], vectors[some], medium, **how)
        written += batch.decode(max_new_tokens)
    return written


@torch.no_grad()
def steered_stream(
    model: TransformersModel,
    layer: int,
    tasks: Sequence,
    vectors: Tensor,
    max_new_tokens: int = 260,
    medium: Medium = PUZZLES,
    leg: int = 4,
    **how,
) -> Iterator[tuple[list[list[str]], list[bool]]]:
    """``steered`` in one batch, watched: every ``leg`` tokens (all transcripts so far, which of them have
    ended). The last one is what ``steered`` returns. To stop, stop asking."""
    batch = _steered_batch(model, layer, tasks, vectors, medium, **how)
    written, ended = [[] for _ in tasks], [False] * len(tasks)
    for rows, new, over in batch.legs(max_new_tokens, leg):
        for row, ids, last in zip(rows.tolist(), new.tolist(), over.tolist()):
            written[row], ended[row] = batch.text(until(ids, batch.ends)), last
        yield list(written), list(ended)


def _steered_batch(
    model: TransformersModel,
    layer: int,
    tasks: Sequence,
    vectors: Tensor,
    medium: Medium,
    temperature: float = 0.0,
    seed: int = 0,
    end_of_thinking: str | None = "",
    remote: bool | str = False,
    place: str = "thinking",
    sentence_end: str = ".",
) -> _Batch:
    check("place", place, str, choices=(*STEERED, "ends"))
    tokenizer, treatment = model.tokenizer, Treatment("", RowVectors(vectors), place)
    batch = (_RemoteBatch if remote else _Batch)(
        {"": model}, tokenizer, {"": layer}, tasks, [treatment] * len(tasks), temperature, seed, medium
    )
    if end_of_thinking not in ("", medium.end_of_thinking):
        batch.end = _token(tokenizer, "end_of_thinking", end_of_thinking)
    batch.stop = _token(tokenizer, "sentence_end", sentence_end) if place == "ends" else None
    batch.remote = remote
    return batch


def _token(tokenizer: PreTrainedTokenizerBase, name: str, word: str | None) -> int | None:
    """The id of a word that must be one token; None for None. UserError, naming the parameter, for others."""
    token = None if word is None else tokenizer.convert_tokens_to_ids(word)
    if word is not None and token in (None, tokenizer.unk_token_id):
        raise UserError(f"{name} is {word!r}, which is not a token of this model")
    return token


class _Batch:
    """One batch of rows with one writer. ``end``, ``stop``: ids that end thinking, sentences."""

    remote: bool | str = False

    def __init__(
        self, models, tokenizer, layers, tasks, treatments, temperature, seed, medium, crosscoder=None,
        numbers=None,
    ):  # fmt: skip
        """``numbers``: of the rows, among all that are generated."""
        self.models, self.layers, self.crosscoder = models, layers, crosscoder
        self.tokenizer, self.medium, self.ends = tokenizer, medium, ends_of(tokenizer)
        self.end, self.stop = medium.end(tokenizer), tokenizer.convert_tokens_to_ids(".")
        self.writer, self.mode = treatments[0].writer, treatments[0].mode
        prompts = [medium.prompt(task) for task in tasks]
        if self.mode == "free":
            prompts = [prompt.removesuffix(" think :") for prompt in prompts]
        ids, mask = padded(tokenizer, prompts, medium.special_tokens)
        self.prompt = ids.shape[1]
        self.key = torch.tensor([zlib.crc32(repr(task).encode()) for task in tasks])
        self.numbers = torch.tensor(list(range(len(tasks)) if numbers is None else numbers))
        self.noise = TaskNoise(tasks, temperature, seed) if temperature > 0 else None
        self.thinking = torch.ones(len(tasks), dtype=torch.bool)
        self.distinct = list(dict.fromkeys(treatments))
        self.kind = torch.tensor([self.distinct.index(t) for t in treatments])  # of every row
        edits = [t.intervention for t in self.distinct if t.intervention is not None]
        self.edits = any(not isinstance(edit, LogitBias) for edit in edits)
        others = [name for name in models if name != self.writer and any(e.reads_other for e in edits)]
        self.bias_ids = {
            i: torch.tensor(sorted(set(tokenizer.convert_tokens_to_ids(list(t.intervention.words)))))
            for i, t in enumerate(self.distinct)
            if isinstance(t.intervention, LogitBias)
        }
        self.caches = {name: roomy_cache(models[name].config) for name in others}
        self.cached = torch.arange(len(tasks))  # the rows that the other models' caches hold
        self.start = (self.leg, models[self.writer].config, ids, mask)

    def decode(self, max_new_tokens: int) -> list[list[str]]:
        leg = max_new_tokens if self.remote else 0  # a server keeps no cache between two requests
        return [self.text(row) for row in decode(*self.start, max_new_tokens, self.ends, leg=leg)]

    def legs(self, max_new_tokens: int, leg: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        return legs(*self.start, max_new_tokens, self.ends, max_new_tokens if self.remote else leg)

    def text(self, ids: Sequence[int]) -> list[str]:
        words = self.medium.transcript(self.tokenizer, ids)
        return words if self.mode == "think" else words[2:]  # "think :" was not given

    def leg(self, ids: Tensor, mask: Tensor, rows: Tensor, cache, n: int) -> Tensor:
        """``ids`` continued by up to n tokens: a ``Step`` of ``models.decode``."""
        if len(rows) < len(self.cached):
            left = torch.isin(self.cached, rows).nonzero().flatten()
            for other in self.caches.values():
                other.reorder_cache(left)
            self.cached = rows

        def newest(ids, mask, inputs):
            where = self._where(ids, mask, inputs["position_ids"], rows)
            read = {name: self._read(name, inputs, other) for name, other in self.caches.items()}
            logits = self._write(inputs, cache, read, where, rows)
            for i, words in self.bias_ids.items():
                treatment, chosen = self.distinct[i], (self.kind[rows] == i).nonzero().flatten()
                value = treatment.intervention.value * where[treatment.place][chosen, -1:].float()
                logits[chosen[:, None], words] += value
            if self.noise is not None:
                self.noise.rows = rows
                logits = self.noise(ids, logits)
            tokens = logits.argmax(-1)
            if self.end is not None:
                self.thinking[rows] &= tokens != self.end
            return tokens

        return continued(newest, ids, mask, cache, n, self.prompt, self.ends)

    def _where(self, ids, mask, position, rows) -> dict[str, Tensor]:
        """{place: bool [rows, new positions]}: where each kind of place is among the new positions, whose
        numbers in each text are ``position`` [rows, new positions]."""
        seen = ids.shape[1] - position.shape[1]
        new = torch.arange(seen, ids.shape[1])
        thinking = self.thinking[rows][:, None] & (new >= self.prompt - 1)
        return {
            "thinking": thinking,
            "ends": thinking & (ids[:, seen:] == self.stop),
            "everywhere": mask[:, seen:] * position > 0,
            "prompt": (mask[:, seen:] > 0) & (new < self.prompt - 1),
            "all": mask[:, seen:] > 0,
        }

    def _prepared(self, name: str, inputs: dict, cache) -> tuple[PreTrainedModel, dict]:
        """A model, and the inputs of its forward."""
        model = self.models[name]
        model = model._module if isinstance(model, TransformersModel) else model
        inputs = {key: x.to(model.device) for key, x in inputs.items()}
        return model, {**inputs, "use_cache": True, "past_key_values": cache}

    def _read(self, name: str, inputs: dict, cache) -> Tensor:
        model, inputs = self._prepared(name, inputs, cache)
        return outputs_of(model, [self.layers[name]], inputs)[0]

    def _write(self, inputs, cache, read, where, rows) -> Tensor:
        """Logits [rows, vocabulary] after the newest token."""

        def edit(module, args, output):
            if not self.edits:
                return None
            acts, kinds, edited = {**read, self.writer: output}, self.kind[rows], output.clone()
            for i in kinds.unique().tolist():
                treatment, chosen = self.distinct[i], (kinds == i).nonzero().flatten()
                place = where[treatment.place][chosen]
                if treatment.intervention is None or i in self.bias_ids or not place.any():
                    continue
                state = State(  # on the CPU, where the crosscoder and the random draws are
                    self.crosscoder, self.writer,
                    {name: x[chosen].float().cpu() for name, x in acts.items()},
                    inputs["position_ids"][chosen], self.key[rows][chosen], self.numbers[rows][chosen],
                )  # fmt: skip
                change = treatment.intervention.change(state) * place[..., None]
                edited[chosen] += change.to(edited.device)
            return edited

        model, given = self._prepared(self.writer, inputs, cache)
        with decoder_layers(model)[self.layers[self.writer]].register_forward_hook(edit):
            return model(**given, logits_to_keep=1).logits[:, -1].float().cpu()


# of transformers' ``generate``: without them a checkpoint's generation_config.json would decide
PLAIN = {
    "do_sample": False, "num_beams": 1, "num_return_sequences": 1, "use_cache": True,
    **dict.fromkeys((
        "guidance_scale", "repetition_penalty", "encoder_repetition_penalty", "no_repeat_ngram_size",
        "encoder_no_repeat_ngram_size", "penalty_alpha", "min_new_tokens", "min_length", "suppress_tokens",
        "begin_suppress_tokens", "renormalize_logits", "remove_invalid_values", "token_healing", "max_time",
        "return_dict_in_generate", "sequence_bias", "bad_words_ids", "force_words_ids", "forced_bos_token_id",
        "forced_eos_token_id", "exponential_decay_length_penalty", "watermarking_config", "stop_strings",
        "dola_layers", "cache_implementation", "prompt_lookup_num_tokens",
    )),
}  # fmt: skip


class _RemoteBatch(_Batch):
    """Steering where the model runs on a server: one request, through nnsight."""

    def leg(self, ids: Tensor, mask: Tensor, rows: Tensor, cache, n: int) -> Tensor:
        model, treatment = self.models[self.writer], self.distinct[0]
        added, place, layer = treatment.intervention.vectors[rows], treatment.place, self.layers[self.writer]
        end = self.end if place in ("thinking", "ends") else None
        thinking = torch.full((len(rows), 1), place != "prompt")
        earlier = place in ("prompt", "all")  # read by the first step only: later ones have it in the cache
        stop = self.stop if place == "ends" else None
        options = {**PLAIN, "max_new_tokens": n, "remote": self.remote, "eos_token_id": list(self.ends)}
        options["logits_processor"] = LogitsProcessorList([self.noise] if self.noise is not None else [])
        options["pad_token_id"] = self.tokenizer.pad_token_id or 0
        embedding, block = embedding_envoy(model), layer_envoys(model)[layer]
        with warnings.catch_warnings():
            # how an open loop over the steps ends
            warnings.filterwarnings("ignore", message=".*was never reached.*")
            with model.generate(**options) as tracer:
                with tracer.invoke({"input_ids": ids, "attention_mask": mask}):
                    for _ in tracer.iter[:]:
                        newest = embedding.input[:, -1:]
                        thinking = thinking.to(newest.device)
                        if end is not None:
                            thinking = thinking & (newest != end)
                        where = thinking if stop is None else thinking & (newest == stop)
                        h = block.output
                        h[:, -1] += where.to(h.device) * added.to(h.device)
                        if earlier:
                            before = h.shape[1] - 1
                            h[:, :before] += mask[:, :before, None].to(h.device) * added[:, None].to(h.device)
                with tracer.invoke():  # what follows the loop must not stand in its body: it ends early
                    longer = tracer.result.save()
        return longer.cpu()


# --- kept on disk -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TranscriptFile:
    """The file of one condition, and the fingerprint of all that decides what is in it."""

    file: Path
    fingerprint: str
    info: Mapping

    def read(self) -> list[list[str]] | None:
        """The transcripts; None if there are none, if they were made otherwise, or if the file is damaged."""
        try:
            content = json.loads(self.file.read_text(encoding="utf-8"))
            return content["transcripts"] if content["fingerprint"] == self.fingerprint else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def write(self, transcripts: list[list[str]]) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        content = {"fingerprint": self.fingerprint, **self.info, "transcripts": transcripts}
        write_text(self.file, json.dumps(content))


def kept_transcripts(
    files: Sequence[TranscriptFile],
    n_tasks: int,
    write: Callable[[Sequence[tuple[int, int]]], list[list[str]]],
    group: Callable[[int], Hashable],
    lengths: Callable[[Mapping[int, list]], np.ndarray],
    batch_rows: int,
    label: str,
) -> tuple[list[list[list[str]]], int]:
    """(transcripts of every condition, how many conditions were generated): what is on disk is read.

    The rest is generated, as many conditions at a time as fill two batches (which is what an interruption can
    cost), those of one ``group`` together. A batch is decoded until its last row has ended, so tasks of
    similar length go together: ``lengths`` gives them [tasks] from the conditions that are there.
    ``write(rows)`` makes transcripts for rows (task, condition)."""
    done = {i: read for i, file in enumerate(files) if (read := file.read()) is not None}
    groups: dict[Hashable, list[int]] = {}
    for i in range(len(files)):
        if i not in done:
            groups.setdefault(group(i), []).append(i)
    if groups:
        at_once = max(1, 2 * batch_rows // n_tasks)
        chunks = [w[start : start + at_once] for w in groups.values() for start in range(0, len(w), at_once)]
        with Progress(label, len(files)) as progress:
            progress.update(len(done))
            for some in chunks:
                order = np.argsort(lengths(done) if done else np.zeros(n_tasks), kind="stable")
                rows = [(int(task), i) for task in order for i in some]
                by_row = dict(zip(rows, write(rows)))
                for i in some:
                    done[i] = [by_row[task, i] for task in range(n_tasks)]
                    files[i].write(done[i])
                progress.update(len(done), files[some[-1]].file.stem)
    return [done[i] for i in range(len(files))], sum(map(len, groups.values()))
