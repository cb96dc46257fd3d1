"""Text that real language models write themselves: traces by the distilled model, general text by the base.

What is harvested and shown for a real pair comes from here, so that it may be kept and shared: the distilled
model answers ``lib.text.questions``; the base continues short openings about everyday subjects. Both are
sampled, seeded and deduplicated; what was interrupted goes on (hours on two cores)."""

import gzip
import json
import os
import random
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..models import checks
from ..models.decode import context_of, generate
from ..models.pairs import load_pair
from ..runs import Progress, write_text
from ..text.chat import prompt
from ..text.questions import ask
from ..text.tables import table

BATCH = 64
TRACE_TOKENS, GENERAL_TOKENS = 640, 256  # new tokens per text, at most
# not nucleus sampling: its sort of the vocabulary took a third of a step on a CPU
TEMPERATURE, TOP_K = 0.8, 50

SUBJECTS: list[str] = table("openings")["subjects"]
OPENINGS: list[str] = table("openings")["openings"]


def openings(seed: int = 0) -> Iterator[str]:
    """Endless openings of general text, every combination once before any comes again."""
    rng = random.Random(f"{seed}/openings")
    every = [o.format(s=s, S=s[0].upper() + s[1:]) for o in OPENINGS for s in SUBJECTS]
    while True:
        rng.shuffle(every)
        yield from every


def sample(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    max_new_tokens: int,
    seed: int = 0,
    temperature: float = TEMPERATURE,
    top_k: int = TOP_K,
) -> list[tuple[str, bool, int]]:
    """For each prompt what the model writes, whether it came to an end by itself, and its number of tokens.

    Temperature 0 is greedy. Special tokens in a prompt are read as such; no BOS is added. The same prompts in
    the same order with the same seed give the same texts."""
    if context := context_of(model.config):  # a text ends where the context does
        longest = max(map(len, tokenizer(list(prompts), add_special_tokens=False)["input_ids"]))
        max_new_tokens = min(max_new_tokens, context - longest)
    torch.manual_seed(seed)
    how = {"add_special_tokens": False, "temperature": temperature, "top_k": top_k}
    new = generate(model, tokenizer, prompts, max_new_tokens, **how)
    return [(tokenizer.decode(ids), len(ids) < max_new_tokens, len(ids)) for ids in new]


def write_corpus(
    kind: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    file: Path,
    tokens: int,
    seed: int = 0,
) -> int:
    """Append texts of one kind ("trace", "general") to ``file`` (JSON lines) until it has ``tokens`` tokens;
    returns how many it has.

    A line has ``text`` (the prompt included), ``tokens`` and ``ended``; a trace the right ``answer`` too.
    Batches are functions of (seed, number) and written whole. A text that was there before is left out."""
    lines = read_lines(file)
    texts, written = {line["text"] for line in lines}, sum(line["tokens"] for line in lines)
    number = max((line["batch"] for line in lines), default=-1) + 1
    limit = TRACE_TOKENS if kind == "trace" else GENERAL_TOKENS
    with Progress(f"{kind} tokens", tokens) as progress:
        while written < tokens:
            prompts = _prompts(kind, number, seed)
            beginnings = [text for text, _ in prompts]
            answers = sample(model, tokenizer, beginnings, limit, seed=hash_of(seed, kind, number))
            for (beginning, facts), (text, ended, size) in zip(prompts, answers):
                text = beginning + text.rstrip() + ("<|im_end|>\n" if ended and kind == "trace" else "")
                if text not in texts:
                    texts.add(text)
                    written += size
                    lines.append({"text": text, "tokens": size, "ended": ended, "batch": number, **facts})
            write_lines(file, lines)
            number += 1
            progress.update(min(written, tokens))
    return written


def read_lines(file: Path) -> list[dict]:
    """The entries of a JSONL file that ``write_lines`` wrote; [] if there is none."""
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    # not splitlines: other separators may be in an entry
    return [json.loads(line) for line in text.split("\n") if line]


def write_lines(file: Path, entries: Iterable[dict]) -> None:
    """Write a JSONL file, whole or not at all."""
    write_text(file, "".join(map(_line, entries)))


def _line(entry: dict) -> str:
    return json.dumps(entry, ensure_ascii=False) + "\n"


def _prompts(kind: str, number: int, seed: int) -> list[tuple[str, dict]]:
    if kind == "trace":
        asked = ask("train", BATCH * (number + 1), seed=seed)[BATCH * number :]
        return [(prompt(q.text), {"answer": q.answer}) for q in asked]
    return [(text, {}) for text in islice(openings(seed), BATCH * number, BATCH * (number + 1))]


def hash_of(*parts) -> int:
    """A seed that depends on all parts, the same in every process."""
    return random.Random("/".join(map(str, parts))).getrandbits(31)


def pack(file: Path, out: Path) -> None:
    """The texts of a JSONL file, compressed, without a time stamp: the same texts give the same bytes."""
    scratch = out.with_suffix(".part")
    with scratch.open("wb") as raw, gzip.GzipFile(fileobj=raw, mode="wb", mtime=0) as packed:
        for entry in read_lines(file):
            packed.write(_line({key: value for key, value in entry.items() if key != "batch"}).encode())
    os.replace(scratch, out)


def write_for(
    name: str, out: Path, tokens: int = 300_000, kind: str | None = None, runs: Path | None = None
) -> None:
    """Let the models of the pair ``name`` write traces.jsonl.gz and general.jsonl.gz into the folder ``out``,
    or go on; with ``kind`` only one of them. ``runs``: folder of what is written so far."""
    pair, runs = load_pair(name), runs or Path("data/runs") / name / "writing"
    tokenizers = {model: pair.tokenizer(model) for model in pair.models}
    runs.mkdir(parents=True, exist_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    for each, model, stem in (("trace", "distilled", "traces"), ("general", "base", "general")):
        if kind not in (None, each):
            continue
        file = runs / f"{stem}.jsonl"
        write_corpus(each, pair.load(model), pair.tokenizer(model), file, tokens)
        checks.check_round_trip(tokenizers, "".join(line["text"] for line in read_lines(file)))
        pack(file, out / f"{stem}.jsonl.gz")
