"""What a distilled language model has learnt, and what it has not: loss on held-out text, and what it says to
questions.

Everything here is measured on what no adapter was trained on: held-out traces and paragraphs, and word
problems of this project in wordings of the report split. All models get the same prompts, the same limit and
greedy decoding.

    python -m lib appraise data/pairs/smol --traces traces.jsonl.gz --text text.txt.gz     # goes on with the model it was interrupted at;
                                                                                          # remove evaluation.json after training anew
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..distil.adapters import Recipe, Window, held_out, paragraphs, text_windows, token_losses, trace_windows
from ..distil.writing import BATCH, read_lines, sample, write_lines
from ..models.pairs import load_pair
from ..runs import Progress, write_text
from ..settings import UserError
from ..stats import bootstrap, wilson
from ..text.chat import prompt, read_traces
from ..text.questions import Question, ask, final_number

WAIT = re.compile(r"\bwait\b", re.IGNORECASE)


def held_out_loss(model: PreTrainedModel, windows: Iterable[Window], limit: int = 60) -> dict:
    """Mean loss in nats per learnt token of ``limit`` windows: {value, ci (95%, over windows), n (tokens)}."""
    sums = []
    with torch.no_grad():
        for ids, learnt in islice(windows, limit):
            x = torch.tensor([ids])
            y = torch.where(torch.tensor([learnt]), x, -100)
            if (y[:, 1:] != -100).any():
                losses = token_losses(model, x, y)
                sums.append((float(losses.sum()), len(losses)))
    if not sums:
        raise UserError("there is nothing to measure the loss on: no traces, or no text, are held out")
    totals = np.array(sums)
    mean = lambda rows: rows[:, 0].sum() / rows[:, 1].sum()  # noqa: E731
    return {"value": mean(totals), "ci": bootstrap(totals, mean), "n": int(totals[:, 1].sum())}


def answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    max_new_tokens: int = 768,
) -> list[tuple[str, bool, int]]:
    """Greedy answers: (text, ended by itself, tokens) for each question."""
    found = []
    with Progress("questions", len(questions)) as progress:
        for first in range(0, len(questions), BATCH):
            found += sample(
                model,
                tokenizer,
                [prompt(q.text) for q in questions[first : first + BATCH]],
                max_new_tokens,
                temperature=0.0,
            )
            progress.update(len(found))
    return found


def measures(questions: Sequence[Question], said: Sequence[tuple[str, bool, int]]) -> dict[str, dict]:
    """Shares with Wilson intervals, and "wait" per 1,000 tokens with a bootstrap over answers.

    ``thinks``: the answer begins with <think>; ``closes``: it closes the thought too; ``ends``: by itself;
    ``accuracy``: of those questions that have a number, the answer (what follows the thought, if there is
    one) ends with it; an unfinished thought is wrong.
    """
    n = len(said)
    thinks = [text.lstrip().startswith("<think>") for text, _, _ in said]
    closes = [t and "</think>" in text for t, (text, _, _) in zip(thinks, said)]
    right = [
        final_number(text.split("</think>")[-1]) == q.answer and (c or not t)
        for q, (text, _, _), t, c in zip(questions, said, thinks, closes)
        if q.answer is not None
    ]
    waits = np.array([(len(WAIT.findall(text)), size) for text, _, size in said], float)
    rate = lambda rows: 1000 * rows[:, 0].sum() / max(rows[:, 1].sum(), 1)  # noqa: E731

    def share(hits: Sequence[bool]) -> dict:
        return {"value": sum(hits) / len(hits), "ci": wilson(sum(hits), len(hits)), "n": len(hits)}

    return {
        "thinks": share(thinks),
        "closes": share(closes),
        "ends": share([ended for _, ended, _ in said]),
        "accuracy": share(right),
        "waits_per_1000": {"value": rate(waits), "ci": bootstrap(waits, rate), "n": int(waits[:, 1].sum())},
        "tokens_per_answer": {"value": float(waits[:, 1].mean()), "ci": bootstrap(waits[:, 1]), "n": n},
    }


def asked_before(transcripts: Path, questions: Sequence[Question]) -> bool:
    """Whether a file of transcripts is of these very questions: an interrupted appraisal goes on with the
    next model.
    """
    return [line["question"] for line in read_lines(transcripts)] == [q.text for q in questions]


def appraise(
    out: Path, traces_file: Path | None = None, text_file: Path | None = None, n_questions: int = 200
) -> None:
    """Measure the models of the pair that is named like the folder ``out``: evaluation.json and transcripts
    there.

    ``traces_file``, ``text_file``: what the adapters were trained on; what was held out of it is used.
    """
    pair, found = load_pair(out.name), {}
    tokenizer, questions = pair.tokenizer("base"), ask("report", n_questions, open_share=0.0)
    once = Recipe(short=0)
    traces = [t for t in read_traces(traces_file) if held_out(t.question)] if traces_file else []
    texts = [t for t in paragraphs(text_file) if held_out(t)] if text_file else []
    evaluation, kept = out / "evaluation.json", out / "transcripts"
    kept.mkdir(parents=True, exist_ok=True)
    before = json.loads(evaluation.read_text()) if evaluation.is_file() else {}
    for name in (*pair.models, *pair.others):
        if name in before and asked_before(kept / f"{name}.jsonl", questions):
            found[name] = before[name]
            continue
        model = pair.load(name)
        found[name] = measures(questions, said := answers(model, tokenizer, questions))
        if traces:
            found[name]["loss_traces"] = held_out_loss(
                model, trace_windows(traces, tokenizer, once, epochs=1)
            )
        if texts:
            found[name]["loss_text"] = held_out_loss(model, text_windows(texts, tokenizer, once, epochs=1))
        rows = [
            {"question": q.text, "answer": q.answer, "said": text, "ended": ended}
            for q, (text, ended, _) in zip(questions, said)
        ]
        write_lines(kept / f"{name}.jsonl", rows)
        write_text(evaluation, json.dumps(found, indent=2) + "\n")
