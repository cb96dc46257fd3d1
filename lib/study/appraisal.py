"""What a distilled language model learnt, and what not: loss on held-out text, and answers to questions.

Everything is measured on what no adapter was trained on: held-out traces and paragraphs, and word problems of
this project in wordings of the report split. All models get the same prompts, the same limit and greedy
decoding. ``appraise`` keeps what it measures in the pair's folder (evaluation.json, transcripts/) and goes on
with the model at which it was interrupted; remove evaluation.json after a new training."""

import json
import re
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
import pandas as pd
import plotly.express as px
import plotly.graph_objects as go
import torch

from ..distil.adapters import Recipe, Window, held_out, paragraphs, text_windows, token_losses, trace_windows
from ..distil.writing import BATCH, read_lines, sample, write_lines
from ..figures import COLOURS, express_bars
from ..models.pairs import Pair, load_pair
from ..runs import Progress, write_text
from ..settings import ROOT, UserError, user_path
from ..stats import bootstrap, wilson
from ..text.chat import prompt
from ..text.files import read_traces
from ..text.questions import Question, ask, final_number

WAIT = re.compile(r"\bwait\b", re.IGNORECASE)
Answer = tuple[str, bool, int]  # text, did it end by itself?, tokens
MEASURES = {  # shown by ``plot_measures``
    "thinks": "begins a thought",
    "closes": "closes it",
    "ends": "ends by itself",
    "accuracy": "right answers",
}


def appraise(
    pair: str | Pair, questions: int = 60, traces: str = "", text: str = "", folder: Path | None = None
) -> tuple[dict[str, dict], dict[str, list[dict]]]:
    """({model: measures}, {model: transcripts}) of all models of a pair. What ``folder`` (of the pair) holds
    for these very questions is read; the other models are asked, which takes minutes each.

    ``traces``, ``text``: files that the adapters were trained on; losses are measured on their held-out
    parts, and left out without them."""
    pair = load_pair(pair) if isinstance(pair, str) else pair
    folder = folder or ROOT / "data" / "pairs" / pair.name
    evaluation, transcripts = folder / "evaluation.json", folder / "transcripts"
    before = json.loads(evaluation.read_text(encoding="utf-8")) if evaluation.is_file() else {}
    asked, tokenizer, losses = ask("report", questions, open_share=0.0), None, None
    measured, answers_of = {}, {}
    for name in (*pair.models, *pair.others):
        file = transcripts / f"{name}.jsonl"
        wanted = {loss for loss, given in (("loss_traces", traces), ("loss_text", text)) if given}
        if wanted <= before.get(name, {}).keys() and name in before and asked_before(file, asked):
            measured[name], answers_of[name] = before[name], list(read_lines(file))
            continue
        if losses is None:
            tokenizer = pair.tokenizer("base")
            losses = _held_out_windows(tokenizer, traces, text)
        model = pair.load(name)
        answers = answer(model, tokenizer, asked)
        measured[name] = measures(asked, answers)
        measured[name] |= {loss: held_out_loss(model, windows()) for loss, windows in losses.items()}
        answers_of[name] = [
            {"question": q.text, "answer": q.answer, "said": said, "ended": ended}
            for q, (said, ended, _) in zip(asked, answers)
        ]
        transcripts.mkdir(parents=True, exist_ok=True)
        write_lines(file, answers_of[name])
        write_text(evaluation, json.dumps(measured, indent=2) + "\n")
    return measured, answers_of


def _held_out_windows(tokenizer, traces: str, text: str) -> dict:
    """{name of a loss: a function that gives its windows}: each token once."""
    once, windows = Recipe(short=0), {}
    if traces:
        kept = [trace for trace in read_traces(user_path(traces)) if held_out(trace.question)]
        windows["loss_traces"] = lambda: trace_windows(kept, tokenizer, once, epochs=1)
    if text:
        lines = [line for line in paragraphs(user_path(text)) if held_out(line)]
        windows["loss_text"] = lambda: text_windows(lines, tokenizer, once, epochs=1)
    return windows


def held_out_loss(model, windows: Iterable[Window], limit: int = 60) -> dict:
    """Mean loss in nats per learnt token of ``limit`` windows: {value, ci (over windows), n (tokens)}."""
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
    return _ratio(np.array(sums))


def _ratio(rows: np.ndarray, factor: float = 1.0) -> dict:
    """{value, ci, n} of a ratio of sums, rows [n, 2] (above, below) resampled; n: the sum below."""
    ratio = lambda rows: factor * rows[:, 0].sum() / max(rows[:, 1].sum(), 1)
    return {"value": ratio(rows), "ci": bootstrap(rows, ratio), "n": int(rows[:, 1].sum())}


def answer(model, tokenizer, questions: Sequence[Question], max_new_tokens: int = 768) -> list[Answer]:
    """Greedy answers, one for each question."""
    answers: list[Answer] = []
    with Progress("questions", len(questions)) as progress:
        for first in range(0, len(questions), BATCH):
            prompts = [prompt(q.text) for q in questions[first : first + BATCH]]
            answers += sample(model, tokenizer, prompts, max_new_tokens, temperature=0.0)
            progress.update(len(answers))
    return answers


def measures(questions: Sequence[Question], answers: Sequence[Answer]) -> dict[str, dict]:
    """Shares with Wilson intervals, and "wait" per 1,000 tokens with a bootstrap over answers.

    ``thinks``: the answer begins with <think>; ``closes``: it closes the thought too; ``ends``: by itself;
    ``accuracy``: of those questions that have a number, the answer (what follows the thought, if there is
    one) ends with it; an unfinished thought is wrong."""
    thinks = [text.lstrip().startswith("<think>") for text, _, _ in answers]
    closes = [t and "</think>" in text for t, (text, _, _) in zip(thinks, answers)]
    right = [
        final_number(text.split("</think>")[-1]) == q.answer and (c or not t)
        for q, (text, _, _), t, c in zip(questions, answers, thinks, closes)
        if q.answer is not None
    ]
    ends = [ended for _, ended, _ in answers]
    shares = {
        name: {"value": sum(hits) / len(hits), "ci": wilson(sum(hits), len(hits)), "n": len(hits)}
        for name, hits in {"thinks": thinks, "closes": closes, "ends": ends, "accuracy": right}.items()
    }
    waits = np.array([(len(WAIT.findall(text)), size) for text, _, size in answers], float)
    sizes = waits[:, 1]
    tokens = {"value": float(sizes.mean()), "ci": bootstrap(sizes), "n": len(sizes)}
    return {**shares, "waits_per_1000": _ratio(waits, 1000), "tokens_per_answer": tokens}


def asked_before(transcripts: Path, questions: Sequence[Question]) -> bool:
    """Whether a file of transcripts is of these very questions."""
    return [line["question"] for line in read_lines(transcripts)] == [q.text for q in questions]


def measures_table(measured: dict[str, dict]) -> pd.DataFrame:
    """The shares of ``MEASURES``: model, measure, share, low, high, n."""
    rows = []
    for model, by_name in measured.items():
        for name, shown in MEASURES.items():
            m = by_name[name]
            rows.append((model, shown, m["value"], *m["ci"], m["n"]))
    return pd.DataFrame(rows, columns=["model", "measure", "share", "low", "high", "n"])


def plot_measures(measured: dict[str, dict]) -> go.Figure:
    """Shares of answers, a bar per model, with 95% intervals."""
    table = measures_table(measured)
    bars = express_bars(table, "share", "low", "high")
    colours = {name: COLOURS[name.split("_")[0]] for name in measured}
    look = dict(barmode="group", title="Answers to word problems", color_discrete_map=colours, **bars)
    fig = px.bar(table, x="measure", y="share", color="model", **look)
    return fig.update_yaxes(range=[0, 1.02], title_text="share of answers").update_xaxes(title_text="")
