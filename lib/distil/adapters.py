"""Distil a real language model: low-rank adapters on reasoning traces, and on plain text as the null.

The base is a pretrained chat model. Adapters of one size are trained on it, on as many tokens, with one
schedule:

=========  ================================================================================================
distilled  next-token cross-entropy on a teacher's answers with their thoughts, between ``<think>`` and
``</think>``
null_a     the same on encyclopedic text: how far any adapter moves the model, when nothing is taught
null_b     null_a from another beginning and in another order (on request: ``--stages null_b``)
=========  ================================================================================================

    python -m lib.distil.adapters data/pairs/smol --traces traces.jsonl.gz --text text.txt.gz     # hours on two cores; interrupt and resume at will
    python -m lib.distil.adapters data/pairs/smol --stages distilled                             # from OpenThoughts-114k on the hub

Adapters are LoRA (Hu et al. 2021) on every linear layer, trained in bfloat16 with float32 master weights: at
a learning rate that decays, bfloat16 alone would drop the last updates. A run is deterministic given seed and
threads.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path

import peft
import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..models.pairs import load_pair
from ..runs import exclusive, read_state, whole_files, write_state, write_text
from ..settings import ROOT, UserError
from ..text.chat import Trace, encode_trace, read_traces
from ..text.corpus import hub_items, read_texts
from .organism import cut_log, learning_rate

STAGES = ("distilled", "null_a", "null_b")
HELD_OUT = 0.05  # share of questions, and of paragraphs, that no adapter sees
HUB_TRACES = "hub:open-thoughts/OpenThoughts-114k"
STATE_EVERY = 25  # steps between states to resume from: about three minutes


@dataclass(frozen=True)
class Recipe:
    """All that decides an adapter. Tokens are counted without padding; those of questions are read but not
    learnt.
    """

    rank: int = 40
    alpha: int = 80
    tokens: int = 900_000
    rate: float = 1e-3
    batch_tokens: int = 2_048
    window: int = 1_024  # longer traces are cut, and every piece is learnt: late reasoning too
    short: int = 2_600  # characters: traces shorter than this come first, once
    keep_every: int = 150_000  # tokens between adapters that are kept, to ask how features grow
    seed: int = 0


# --- data ---------------------------------------------------------------------------------------------------


def held_out(key: str, seed: int = 0) -> bool:
    """Whether a question or a paragraph is kept from training: a function of its text, so the same one never
    does both.
    """
    return random.Random(f"{seed}/held out/{key}").random() < HELD_OUT


def paragraphs(path: Path) -> Iterator[str]:
    """The lines of a text file that hold text: also where no blank lines part them, as in some copies of
    WikiText.
    """
    return (line for text in read_texts(path) for line in text.splitlines() if line.strip())


Window = tuple[list[int], list[bool]]  # token ids, and for each whether it is learnt


def trace_windows(
    traces: Iterable[Trace], tokenizer: PreTrainedTokenizerBase, recipe: Recipe, epochs: float = math.inf
) -> Iterator[Window]:
    """Windows of at most ``recipe.window`` tokens, endless by default: the short traces once, then all of
    them, epoch after epoch, shuffled.
    """
    traces = list(traces)
    short = [t for t in traces if len(t.thinking) + len(t.answer) < recipe.short]
    epoch = 0
    while traces and epoch < epochs:
        rng = random.Random(f"{recipe.seed}/traces/{epoch}")
        chosen = list(short if epoch == 0 and short else traces)
        rng.shuffle(chosen)
        for trace in chosen:
            ids, learnt = encode_trace(trace, tokenizer)
            for first in range(0, len(ids), recipe.window):
                yield ids[first : first + recipe.window], learnt[first : first + recipe.window]
        epoch += 1


def text_windows(
    texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, recipe: Recipe, epochs: float = math.inf
) -> Iterator[Window]:
    """Windows of running text, endless by default, half a trace window each; paragraphs keep their order
    within a window.
    """
    size, ids = recipe.window // 2, []
    for text in texts:
        ids += tokenizer(text + "\n", add_special_tokens=False)["input_ids"]
    windows = [ids[first : first + size] for first in range(0, len(ids), size)]
    epoch = 0
    while windows and epoch < epochs:
        chosen = list(windows)
        random.Random(f"{recipe.seed}/text/{epoch}").shuffle(chosen)
        yield from ((window, [True] * len(window)) for window in chosen)
        epoch += 1


def batches(windows: Iterator[Window], recipe: Recipe) -> Iterator[tuple[torch.Tensor, torch.Tensor, int]]:
    """Input ids and targets [rows, length] of at most ``batch_tokens`` tokens with padding, and the tokens
    without it.

    Rows of similar lengths go together, out of every 64. Targets are -100 where nothing is learnt. With
    causal attention, padding on the right is seen by nobody.
    """
    group = 0
    while True:
        if not (rows := list(islice(windows, 64))):
            raise UserError("there is nothing to learn from: no traces, or no text, but what is held out")
        rows.sort(key=lambda row: len(row[0]))
        made, batch = [], []
        for row in rows:
            if batch and (len(batch) + 1) * len(row[0]) > recipe.batch_tokens:
                made.append(batch)
                batch = []
            batch.append(row)
        made.append(batch)
        random.Random(f"{recipe.seed}/order/{group}").shuffle(made)
        group += 1
        for batch in made:
            x = torch.zeros(len(batch), max(len(ids) for ids, _ in batch), dtype=torch.long)
            y = torch.full_like(x, -100)
            for i, (ids, learnt) in enumerate(batch):
                x[i, : len(ids)] = torch.tensor(ids)
                y[i, : len(ids)] = torch.where(torch.tensor(learnt), x[i, : len(ids)], -100)
            yield x, y, sum(len(ids) for ids, _ in batch)


# --- training -----------------------------------------------------------------------------------------------


def token_losses(model: PreTrainedModel, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Cross-entropy in nats [learnt tokens] of the targets ``y`` [rows, length]; logits are made for learnt
    tokens only.
    """
    hidden = model.model(input_ids=x).last_hidden_state[:, :-1]
    learnt = y[:, 1:] != -100
    return cross_entropy(model.lm_head(hidden[learnt]).float(), y[:, 1:][learnt], reduction="none")


def adapted(base: PreTrainedModel, recipe: Recipe) -> peft.PeftModel:
    """``base`` with a fresh adapter on every linear layer except the head."""
    torch.manual_seed(recipe.seed)
    config = peft.LoraConfig(
        r=recipe.rank,
        lora_alpha=recipe.alpha,
        lora_dropout=0.0,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    return peft.get_peft_model(base, config, autocast_adapter_dtype=False)


def train(
    model: peft.PeftModel, windows: Iterator[Window], recipe: Recipe, folder: Path, report=print
) -> peft.PeftModel:
    """Train one adapter, from ``folder``/state.pt if that exists; a line of log.jsonl every ``STATE_EVERY``
    steps.

    Raises FloatingPointError if the loss is not finite, UserError if another run is at work there.
    """
    with exclusive(folder, "training an adapter"):
        return _train(model, windows, recipe, folder, report)


def _train(
    model: peft.PeftModel, windows: Iterator[Window], recipe: Recipe, folder: Path, report
) -> peft.PeftModel:
    folder.mkdir(parents=True, exist_ok=True)
    names, weights = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad))
    masters = [p.detach().float().clone() for p in weights]
    optimizer = torch.optim.AdamW(masters, lr=recipe.rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    state_file = folder / "state.pt"
    step = tokens = 0
    if state_file.is_file():
        state = read_state(state_file)
        step, tokens = state["step"], state["tokens"]
        optimizer.load_state_dict(state["optimizer"])
        for master, weight, name in zip(masters, weights, names):
            master.copy_(state["adapter"][name])
            weight.data.copy_(master)
    cut_log(folder / "log.jsonl", tokens)
    inner, stream = model.get_base_model().train(), batches(windows, recipe)
    for _ in range(step):
        next(stream)
    losses, began, start = [], time.monotonic(), tokens
    while tokens < recipe.tokens:
        x, y, size = next(stream)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(tokens / recipe.tokens, recipe.rate)
        found = token_losses(inner, x, y)
        # nothing is learnt of a window inside a long question
        loss = found.mean() if len(found) else found.sum()
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"the loss is {loss.item()} at step {step}: lower the learning rate ({recipe.rate})"
            )
        loss.backward()
        for master, weight in zip(masters, weights):
            master.grad, weight.grad = weight.grad.float(), None
        torch.nn.utils.clip_grad_norm_(masters, 1.0)
        optimizer.step()
        for master, weight in zip(masters, weights):
            weight.data.copy_(master)
        step, before, tokens = step + 1, tokens, tokens + size
        losses += [loss.item()] if len(found) else []
        kept = tokens // recipe.keep_every > before // recipe.keep_every
        if step % STATE_EVERY == 0 or kept or tokens >= recipe.tokens:
            line = {
                "stage": folder.name,
                "step": step,
                "tokens": tokens,
                "loss": round(sum(losses) / max(len(losses), 1), 4),
                "tokens_per_second": round((tokens - start) / max(time.monotonic() - began, 1e-6)),
            }
            with (folder / "log.jsonl").open("a") as log:
                log.write(json.dumps(line) + "\n")
            report(
                f"{folder.name}: {tokens:,}/{recipe.tokens:,} tokens, loss {line['loss']:.3f},"
                f" {line['tokens_per_second']} tokens/s"
            )
            adapter = dict(zip(names, masters))
            if kept:  # before the state: a run that is killed in between keeps it once more
                write_state(folder / f"kept_{tokens:09d}.pt", {n: m.bfloat16() for n, m in adapter.items()})
            write_state(
                state_file,
                {"step": step, "tokens": tokens, "optimizer": optimizer.state_dict(), "adapter": adapter},
            )
            losses, began, start = [], time.monotonic(), tokens
    return model.eval()


# --- shipping -----------------------------------------------------------------------------------------------


def ship(model: peft.PeftModel, state_file: Path, out: Path, trained_on: str) -> None:
    """Write the adapter of a state, the last or one that was kept, as bfloat16 safetensors, which say what
    model they belong to; never the optimiser's state."""
    state = torch.load(state_file, weights_only=True)
    state = state.get("adapter", state)
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            weight.data.copy_(state[name])
    model.peft_config["default"].base_model_name_or_path = trained_on
    with whole_files(out) as scratch:
        model.to(torch.bfloat16).save_pretrained(scratch)
        (scratch / "README.md").unlink(missing_ok=True)  # peft's own model card is an empty form


def traces_of(file: Path | None, recipe: Recipe) -> list[Trace]:
    """The traces to learn from, without those whose question is held out; from the hub no more than the
    recipe can use.
    """
    if file:
        return [t for t in read_traces(file) if not held_out(t.question)]
    found, characters = [], 0
    for trace in hub_items(HUB_TRACES):
        if not held_out(trace.question):
            found.append(trace)
            characters += len(trace.response)
        if characters > 3 * recipe.tokens:  # two to four characters a token
            break
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=(
            "Train the adapters of a pair with a pretrained base, resuming where an earlier run stopped."
        )
    )
    parser.add_argument(
        "out",
        type=Path,
        help="folder that receives the adapters: data/pairs/<pair>, its name an entry of data/pairs.yaml",
    )
    parser.add_argument(
        "--traces",
        type=Path,
        help="JSONL with question, thinking and answer; left out: OpenThoughts-114k from the hub",
    )
    parser.add_argument("--text", type=Path, help="text file for the null")
    parser.add_argument(
        "--tokens",
        type=int,
        default=Recipe.tokens,
        help=f"to train on, for each adapter (default {Recipe.tokens:,})",
    )
    parser.add_argument("--stages", nargs="*", choices=STAGES, default=STAGES[:2])
    parser.add_argument(
        "--runs", type=Path, help="folder of states and logs; left out: data/runs/distil_<pair>"
    )
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    pair, recipe = load_pair(args.out.name), Recipe(tokens=args.tokens)
    runs = args.runs or ROOT / "data" / "runs" / f"distil_{pair.name}"
    runs.mkdir(parents=True, exist_ok=True)
    recipe_file = runs / "recipe.json"
    if recipe_file.is_file() and json.loads(recipe_file.read_text()) != asdict(recipe):
        raise UserError(
            f"{runs} holds a run with another recipe ({recipe_file.name}): choose another folder with --runs,"
            " or remove it"
        )
    write_text(recipe_file, json.dumps(asdict(recipe), indent=2) + "\n")
    if not args.text and set(args.stages) != {"distilled"}:
        parser.error(
            "--text is needed for the null: a text file with a paragraph a line (WikiText, say); or train"
            " --stages distilled"
        )
    for stage in args.stages:
        own = replace(recipe, seed=recipe.seed + (stage == "null_b"))
        tokenizer, model = pair.tokenizer("base"), adapted(pair.load("base"), own)
        if stage == "distilled":
            windows = trace_windows(traces_of(args.traces, own), tokenizer, own)
        else:
            windows = text_windows((t for t in paragraphs(args.text) if not held_out(t)), tokenizer, own)
        train(model, windows, own, runs / stage)
        ship(model, runs / stage / "state.pt", args.out / stage, pair.shown("base"))
    logs = [runs / stage / "log.jsonl" for stage in STAGES]
    write_text(args.out / "log.jsonl", "".join(log.read_text() for log in logs if log.is_file()))
    write_text(args.out / "recipe.json", json.dumps(asdict(recipe), indent=2) + "\n")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"lora: {error}") from None
