"""Steered thoughts: one prompt at a time, one condition at a time, and conditions together as
``lib.steering.steer`` does it.

    python -m benchmarks.generate

The distilled model of the pair "tiny" thinks about test puzzles, sampled at temperature 1 as in notebook 04,
steered along a feature of the default run where there is one, else along a fixed random direction; no
artefact is needed. Recorded are

    generate_vs_single       seconds per thought one at a time, by seconds per thought of conditions together;
                             10 is wanted
    generate_vs_condition    seconds of one left-padded batch for each condition, by seconds of conditions
                             together; at least 0.9

Both others are nnsight's ``generate`` as it comes: the cache of transformers, every row to the end of the
longest. One at a time is timed on some thoughts of each round only (``--single``), evenly spread over puzzles
and conditions, and so per thought. Tokens are then compared, greedy and sampled; where a thought differs, how
far apart the two top scores were tells whether it was a tie.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.common import interleaved, ratio, record, report
from lib.crosscoder.model import CrossCoder
from lib.distil import trials
from lib.features.table import load
from lib.models import decode, reader
from lib.models.pairs import load_pair
from lib.runs import Run
from lib.settings import UserError
from lib.steering import steer as steering
from lib.steering.generate import steered

NORM = 68.0  # mean residual norm of the distilled model at half depth, from notebook 01: strength 1
STRENGTHS = (-0.5, -0.25, 0.25, 0.5)
LIMIT, SEED, END = 250, 0, "done"


def direction(width: int) -> tuple[str, Tensor]:
    """(name, vector [d] of strength 1): the reflection feature of the default run, or a fixed random
    direction.
    """
    run = Run("tiny", "default")
    try:
        feature = load(run.path("features"))[1]["reflection"]
        found = steering.feature_direction(CrossCoder.load(run.path("crosscoder")), feature, NORM)
        return found.name, found.vector
    except (UserError, OSError, KeyError):
        return "a random direction", steering.random_directions(1, width, NORM)[0].vector


@torch.no_grad()
def as_it_comes(
    model, layer: int, tasks: Sequence[trials.Task], vector: Tensor, temperature: float = 1.0
) -> list[list[str]]:
    """Transcripts of one batch by nnsight's and transformers' own ``generate``, every row steered by
    ``vector`` [d].
    """
    tokenizer = model.tokenizer
    end, noise = (
        tokenizer.convert_tokens_to_ids(END),
        (decode.TaskNoise(tasks, temperature, SEED) if temperature else None),
    )
    inputs = dict(
        tokenizer(
            [" ".join(trials.prompt_words(t)) for t in tasks],
            return_tensors="pt",
            padding=True,
            padding_side="left",
            return_token_type_ids=False,
        )
    )
    thinking = torch.ones(len(tasks), 1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*was never reached.*")
        with model.generate(
            max_new_tokens=LIMIT,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
            logits_processor=LogitsProcessorList([noise] if noise else []),
        ) as tracer:
            with tracer.invoke(inputs):
                for _ in tracer.iter[:]:
                    thinking = thinking * (model.model.embed_tokens.input[:, -1:] != end)
                    model.model.layers[layer].output[:, -1] += thinking * vector
            with tracer.invoke():
                ids = tracer.result.save()
    said = [
        row[: row.index(tokenizer.eos_token_id)] if tokenizer.eos_token_id in row else row
        for row in ids[:, inputs["input_ids"].shape[1] :].tolist()
    ]
    return [trials.transcript(tokenizer, row) for row in said]


@torch.no_grad()
def margin(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    layer: int,
    task: trials.Task,
    vector: Tensor,
    words: Sequence[str],
    others: Sequence[str],
    temperature: float = 0.0,
) -> float:
    """How far apart the two top scores are where transcript ``others`` first differs from ``words``, read
    anew without a cache.

    Scores are logits; at a temperature above 0 divided by it, with the task's noise added, as the choice was
    made.
    """
    shared = next((i for i, (a, b) in enumerate(zip(words, others)) if a != b), min(len(words), len(others)))
    prompt = tokenizer(" ".join(trials.prompt_words(task)), return_tensors="pt")["input_ids"]
    ids = torch.cat(
        [prompt, torch.tensor([tokenizer.convert_tokens_to_ids(list(words[2:shared]))], dtype=torch.long)],
        dim=1,
    )
    added, start = torch.zeros(1, ids.shape[1], len(vector)), prompt.shape[1] - 1
    open_ = (ids[0, start:] != tokenizer.convert_tokens_to_ids(END)).cumprod(0)
    added[0, start:] = open_[:, None] * vector
    hook = model.model.layers[layer].register_forward_hook(lambda module, inputs, out: out + added)
    scores = model(ids).logits[:, -1].float()
    hook.remove()
    if temperature:
        noise = decode.TaskNoise([task], temperature, SEED)
        # words begin with "think :", so this is the step of the difference
        scores = [noise(ids, scores) for _ in range(shared - 1)][-1]
    first, second = scores[0].topk(2).values
    return float(first - second)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompts", type=int, default=200, help="puzzles of each condition")
    parser.add_argument("--single", type=int, default=24, help="thoughts that are also made one at a time")
    parser.add_argument("--threads", type=int, default=1, help="of torch; notebook 04 uses one")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    pair = load_pair("tiny")
    plain, tokenizer = pair.load("distilled"), pair.tokenizer()
    model, layer = reader.wrap(plain, tokenizer), len(plain.model.layers) // 2 - 1
    name, vector = direction(plain.config.hidden_size)
    tasks = trials.puzzles(options.prompts, "test")
    rows = [(s * vector, task) for task in tasks for s in STRENGTHS]
    # all puzzles, all strengths
    pick = [i * len(rows) // options.single + i % len(STRENGTHS) for i in range(options.single)]
    some = [rows[i] for i in pick]
    said: dict[str, list] = {}

    def alone(temperature: float = 1.0):
        return [as_it_comes(model, layer, [task], push, temperature)[0] for push, task in some]

    def by_condition():
        return [as_it_comes(model, layer, tasks, s * vector) for s in STRENGTHS]

    def together(temperature: float = 1.0):
        return steered(
            model,
            layer,
            [t for _, t in rows],
            torch.stack([v for v, _ in rows]),
            LIMIT,
            temperature=temperature,
            seed=SEED,
        )

    def keep(way, key):
        return lambda: said.__setitem__(key, way())

    ways = {
        "one prompt": keep(alone, "alone"),
        "one condition": keep(by_condition, "condition"),
        "together": keep(together, "together"),
    }
    seconds = interleaved(ways, options.rounds)
    seconds = {
        "one prompt at a time": seconds["one prompt"] / len(some),
        "one condition at a time": seconds["one condition"] / len(rows),
        "conditions together": seconds["together"] / len(rows),
    }
    report(
        f"time per thought: {len(STRENGTHS)} conditions of {len(tasks)} puzzles along {name},"
        f" {options.threads} threads (one prompt at a time: {len(some)} thoughts a round)",
        seconds,
        "one prompt at a time",
    )
    record(
        generate_vs_single=ratio(seconds, "one prompt at a time", "conditions together"),
        generate_vs_condition=ratio(seconds, "one condition at a time", "conditions together"),
    )

    condition = [said["condition"][i % len(STRENGTHS)][i // len(STRENGTHS)] for i in range(len(rows))]
    greedy = together(0.0)
    for what, reference, found, chosen, temperature in (
        ("sampled, against one condition at a time", condition, said["together"], rows, 1.0),
        (
            "sampled, against one prompt at a time",
            said["alone"],
            [said["together"][i] for i in pick],
            some,
            1.0,
        ),
        ("greedy, against one prompt at a time", alone(0.0), [greedy[i] for i in pick], some, 0.0),
    ):
        margins = [
            margin(plain, tokenizer, layer, task, push, a, b, temperature)
            for (push, task), a, b in zip(chosen, reference, found)
            if a != b
        ]
        parted = ", ".join(f"{m:.1e}" for m in margins) or "none does"
        print(
            f"{what}: {1 - len(margins) / len(found):.4f} of {len(found)} thoughts have the same tokens; "
            f"distance of the top scores where the others part: {parted}"
        )


if __name__ == "__main__":
    main()
