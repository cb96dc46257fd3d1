"""Distil a real language model: low-rank adapters on reasoning traces, and on plain text as the null.

The base is a pretrained chat model. Adapters of one size are trained on it, on as many tokens, with one
schedule (hours on two cores each; what was interrupted goes on):

- *distilled*: next-token cross-entropy on a teacher's answers with their thoughts, between ``<think>`` and
  ``</think>``
- *null_a*: the same on encyclopedic text: how far any adapter moves the model, when nothing is taught
- *null_b*: null_a from another beginning and in another order (on request: ``--stages null_b``)
- *null_traces*: the traces of *distilled* without their reflections: how far an adapter moves the model that
  learns everything but these (on request)

Adapters are LoRA (Hu et al. 2021) on every linear layer, trained in bfloat16 with float32 master weights. A
run is deterministic given seed and threads."""

import json
import math
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from itertools import count, islice
from pathlib import Path

import peft
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..device import placed
from ..models.pairs import Pair, load_pair
from ..runs import read_state, whole_files, write_text
from ..settings import ROOT, Count, NotNegative, Positive, UserError, check, parameters
from ..text.chat import Trace, encode_trace
from ..text.files import hub_items, read_texts, read_traces
from ..text.lexicon import sentences
from .fit import Batch, Place, Window, batches_of, claim, fit, token_losses

STAGES = ("distilled", "null_a", "null_b", "null_traces")
OF_TRACES = {"distilled", "null_traces"}
HELD_OUT = 0.05  # share of questions, and of paragraphs, that no adapter sees
HUB_TRACES = "hub:open-thoughts/OpenThoughts-114k"
STATE_EVERY = 25  # steps between states to resume from: about three minutes


@parameters
class Recipe:
    """All that decides an adapter. Tokens are counted without padding; those of questions are not learnt."""

    rank: Positive = 40
    alpha: Positive = 80
    tokens: Positive = 900_000
    rate: NotNegative = 1e-3
    batch_tokens: Positive = 2_048
    window: Positive = 1_024  # longer traces are cut, and every piece is learnt: late reasoning too
    short: Count = 2_600  # characters: traces shorter than this come first, once
    keep_every: Positive = 150_000  # tokens between adapters that are kept, to ask how features grow
    seed: int = 0


def held_out(key: str, seed: int = 0) -> bool:
    """Whether a question or a paragraph is kept from training: a function of its text."""
    return random.Random(f"{seed}/held out/{key}").random() < HELD_OUT


def paragraphs(path: Path) -> Iterator[str]:
    """The lines of a text file that hold text: also where no blank lines part them, as in some copies of
    WikiText."""
    return (line for text in read_texts(path) for line in text.splitlines() if line.strip())


def shuffled(items: Sequence, key: str, epochs: float = math.inf, first: Sequence = ()) -> Iterator:
    """Items epoch after epoch, endless by default, each epoch shuffled; in the first only
    ``first``, if any."""
    epoch = 0
    while items and epoch < epochs:
        chosen = list(first if epoch == 0 and first else items)
        random.Random(f"{key}/{epoch}").shuffle(chosen)
        yield from chosen
        epoch += 1


def trace_windows(
    traces: Iterable[Trace], tokenizer: PreTrainedTokenizerBase, recipe: Recipe, epochs: float = math.inf
) -> Iterator[Window]:
    """Windows of at most ``recipe.window`` tokens: the short traces once, then all, epoch after epoch."""
    traces = list(traces)
    short = [t for t in traces if len(t.thinking) + len(t.answer) < recipe.short]
    for trace in shuffled(traces, f"{recipe.seed}/traces", epochs, short):
        ids, learnt = encode_trace(trace, tokenizer)
        for first in range(0, len(ids), recipe.window):
            yield ids[first : first + recipe.window], learnt[first : first + recipe.window]


def text_windows(
    texts: Iterable[str], tokenizer: PreTrainedTokenizerBase, recipe: Recipe, epochs: float = math.inf
) -> Iterator[Window]:
    """Windows of running text, half a trace window each, epoch after epoch; paragraphs keep their order
    within a window."""
    size, ids = recipe.window // 2, []
    for text in texts:
        ids += tokenizer(text + "\n", add_special_tokens=False)["input_ids"]
    windows = [ids[first : first + size] for first in range(0, len(ids), size)]
    for window in shuffled(windows, f"{recipe.seed}/text", epochs):
        yield window, [True] * len(window)


def batches(windows: Iterator[Window], recipe: Recipe) -> Iterator[Batch]:
    """Batches of at most ``batch_tokens`` tokens with padding, out of every 64 windows."""
    for group in count():
        if not (rows := list(islice(windows, 64))):
            raise UserError("there is nothing to learn from: no traces, or no text, but what is held out")
        yield from batches_of(rows, recipe.batch_tokens, random.Random(f"{recipe.seed}/order/{group}"))


def adapted(base: PreTrainedModel, recipe: Recipe) -> peft.PeftModel:
    """``base`` with a fresh adapter on every linear layer except the head."""
    torch.manual_seed(recipe.seed)
    options = dict(lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    config = peft.LoraConfig(r=recipe.rank, lora_alpha=recipe.alpha, **options)
    return peft.get_peft_model(base, config, autocast_adapter_dtype=False)


def train(
    model: peft.PeftModel, windows: Iterator[Window], recipe: Recipe, folder: Path, report=print
) -> peft.PeftModel:
    """Train one adapter, from ``folder``/state.pt if that exists (see ``fit``)."""
    stream, base = enumerate(batches(windows, recipe), 1), model.get_base_model().train()

    def chunk(place: Place) -> list[Batch]:
        part, tokens = [], place.tokens
        for step, batch in stream:
            if step <= place.step:
                continue  # a run that is resumed has learnt from it
            part.append(batch)
            tokens += batch[2]
            if step % STATE_EVERY == 0 or tokens >= min((place.kept + 1) * recipe.keep_every, recipe.tokens):
                break
        return part

    def losses(x, y):
        return token_losses(base, x, y)

    def snapshot():
        return {name: p.bfloat16() for name, p in model.named_parameters() if p.requires_grad}

    keeping = dict(keep_every=recipe.keep_every, snapshot=snapshot, key="adapter")
    fit(folder.name, model, losses, chunk, folder, recipe.tokens, recipe.rate, **keeping, report=report)
    return model.eval()


def ship(model: peft.PeftModel, state_file: Path, out: Path, trained_on: str) -> None:
    """Write the adapter of a state, the last or one that was kept, as bfloat16 safetensors, which say what
    model they belong to; never the optimiser's state."""
    state = read_state(state_file)
    state = state.get("adapter", state)
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            weight.data.copy_(state[name])
    model.peft_config["default"].base_model_name_or_path = trained_on
    with whole_files(out) as scratch:
        model.to("cpu", torch.bfloat16).save_pretrained(scratch)
        (scratch / "README.md").unlink(missing_ok=True)  # peft's own model card is an empty form


def without(trace: Trace, label: str = "reflection") -> Trace:
    """The trace without the sentences of its thought that have a label (``lib.text.lexicon``)."""
    kept, last = "", 0
    for span in sentences(trace.thinking):
        kept += trace.thinking[last : span.end] if span.label != label else ""
        last = span.end
    return replace(trace, thinking=kept)


def traces_of(file: Path | None, recipe: Recipe) -> list[Trace]:
    """The traces to learn from: no question that is held out; from the hub no more than the
    recipe can use."""
    if file:
        return [t for t in read_traces(file) if not held_out(t.question)]
    traces, characters = [], 0
    for trace in hub_items(HUB_TRACES):
        if not held_out(trace.question):
            traces.append(trace)
            characters += len(trace.response)
        if characters > 3 * recipe.tokens:  # two to four characters a token
            break
    return traces


def make_adapter(
    pair: Pair, stage: str, recipe: Recipe, source: Path | None, runs: Path, out: Path, report=print
) -> None:
    """Train the adapter of one stage on the pair's base, on a GPU if there is one, and ship it to
    ``out``/<stage>; ``source`` is the file with what it learns from, and ``runs``/<stage> has its state."""
    window = min(recipe.window, pair.context or recipe.window)
    recipe = replace(recipe, seed=recipe.seed + (stage == "null_b"), window=window)
    tokenizer, model = pair.tokenizer("base"), placed(adapted(pair.load("base"), recipe))
    if stage in OF_TRACES:
        read = traces_of(source, recipe)
        read = [without(trace) for trace in read] if stage == "null_traces" else read
        windows = trace_windows(read, tokenizer, recipe)
    else:
        windows = text_windows((t for t in paragraphs(source) if not held_out(t)), tokenizer, recipe)
    train(model, windows, recipe, runs / stage, report)
    ship(model, runs / stage / "state.pt", out / stage, pair.shown("base"))


def make_adapters(
    out: Path,
    traces: Path | None = None,
    text: Path | None = None,
    tokens: int | None = None,
    stages: Sequence[str] = STAGES[:2],
    runs: Path | None = None,
) -> None:
    """Train the adapters of the pair that is named like the folder ``out``, or go on with them, and ship them
    there.

    ``traces``: JSONL with question, thinking and answer; by default OpenThoughts-114k from the hub. ``text``:
    paragraphs for the null. ``tokens``: for each adapter. ``runs``: folder of states and logs."""
    pair, recipe = load_pair(out.name), Recipe(tokens=Recipe.tokens if tokens is None else tokens)
    for stage in stages:
        check("stage", stage, choices=STAGES)
    if not text and set(stages) - OF_TRACES:
        raise UserError(
            "--text is needed for the null: a text file with a paragraph a line (WikiText, say); or train"
            " --stages distilled"
        )
    used_by = ("traces", traces, OF_TRACES & set(stages)), ("text", text, set(stages) - OF_TRACES)
    for name, file, used in used_by:
        if file and not used:
            raise UserError(
                f"--{name} is not used by the stages {', '.join(stages)}: leave it out, or name others"
            )
        if file:
            next(read_texts(file), None)  # now, not after hours of another stage
    runs = runs or ROOT / "data" / "runs" / f"distil_{pair.name}"
    claim(runs, recipe)
    for stage in stages:
        make_adapter(pair, stage, recipe, traces if stage in OF_TRACES else text, runs, out)
    logs = [runs / stage / "log.jsonl" for stage in STAGES]
    write_text(out / "log.jsonl", "".join(log.read_text() for log in logs if log.is_file()))
    write_text(out / "recipe.json", json.dumps(asdict(recipe), indent=2) + "\n")
