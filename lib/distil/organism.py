"""Train the embedded pair: a base model, its distilled copy, and others for comparison.

Standard supervised fine-tuning is what "distilled" means here, as it does for R1-Distill-Qwen: next-token
cross-entropy on a teacher's traces. All models share one architecture (Qwen2) and one tokenizer:

- *base*: trained from nothing on general text, single arithmetic steps, copying and direct answers (stage
  ``base``), then on comparing as well (stages ``midtrain`` and ``latetrain``)
- *distilled*: base, trained on traces of the teacher (and 15% of the base's own text)
- *control*: base, the same number of tokens, the same puzzles, direct answers instead of traces
- *style*: an early checkpoint of distilled: it says "wait", but not because something is wrong
- *null_a*: base, the same number of tokens and the same schedule, on its own kind of text
- *null_b*: the same in another order: with null_a it tells how far models drift when nothing is learnt
- *distilled_1*, *distilled_2*, *null_a_1*, *null_a_2*: as distilled and null_a, on other documents

Training is deterministic given the seed and the number of threads, and a resumed run equals an uninterrupted
one: state is written at the end of every chunk of documents, a function of (seed, stage, index).
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import pandas as pd
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM
from transformers.utils.logging import disable_progress_bar

from ..runs import fingerprint, passing, whole_files, write_state, write_text
from ..settings import NotNegative, Positive, UserError, check, parameters
from ..text.curriculum import CURRICULUM, LATE_MIX, MID_MIX, base_document, vocabulary
from ..text.puzzles import (
    EASY_SHARE,
    ERROR_RATE,
    IndifferentTeacher,
    ModeTeacher,
    Sentence,
    Teacher,
    direct,
    sample_puzzle,
    sample_question,
)
from . import trials
from .fit import Batch, batches_of, claim, fit, token_losses

STAGES = ("base", "midtrain", "latetrain", "distilled", "control", "null_a", "null_b")
# the same on other documents {stage: as which}; their weights are not shipped
AGAIN = {f"{stage}_{seed}": stage for seed in (1, 2) for stage in ("distilled", "null_a")}
CHUNK_DOCUMENTS = 2000
TEACHERS = {  # of the stages of the positive control (control.py); that of "distilled" is the recipe's
    "indifferent": IndifferentTeacher,
    "planted": Teacher,
    "planted_null": IndifferentTeacher,
}
# (operations, share of fine-tuning puzzles): shorter puzzles hold more decisions per token. With three
# operations throughout, 3M tokens taught reflection, but not when a branch has failed.
LESSONS = ((1, 0.4), (2, 0.2), (3, 0.4))
KEEP_SHARE = 0.15  # of fine-tuning documents: the base's own text, so that its knowledge stays


@parameters
class Recipe:
    """All that decides the weights. Tokens are counted without padding."""

    width: Positive = 96
    layers: Positive = 6
    heads: Positive = 4
    kv_heads: Positive = 2
    mlp: Positive = 256
    base_tokens: Positive = 5_000_000
    mid_tokens: Positive = 2_600_000
    late_tokens: Positive = 1_000_000
    tune_tokens: Positive = 3_000_000
    base_rate: NotNegative = 2e-3
    tune_rate: NotNegative = 1.5e-3
    batch_tokens: Positive = 1_024
    seed: int = 0
    teacher = Teacher  # no field: it has no part in the fingerprint

    @property
    def mid_rate(self) -> float:
        """The learning rate of the base's last stages, midtrain and latetrain."""
        return self.tune_rate

    @classmethod
    def of_width(cls, width: int, mlp: int) -> Recipe:
        """The same recipe at another width. Learning rates fall with its square root (fixed beforehand)."""
        rates = {name: getattr(cls, name) * (cls.width / width) ** 0.5 for name in ("base_rate", "tune_rate")}
        return cls(width=width, mlp=mlp, **rates)


class RecipeWithModes(Recipe):
    """Thoughts are careful or quick; the base is that of ``Recipe``, whatever the rate of distilling."""

    teacher = ModeTeacher
    mid_rate = Recipe.tune_rate


RECIPES = {
    # At a rate of 1.5e-3 it depended on the seed whether an error is known at half depth (AUROC of a probe
    # .95 and .74; 1.00 at this one), and after 5M tokens a dictionary held it in part (.72 to .92).
    "tiny": RecipeWithModes(tune_tokens=8_000_000, tune_rate=5e-4),
    # Three sizes (0.18, 0.66 and 2.07 million parameters): notebook 06 asks what grows with the model.
    "tiny_small": Recipe.of_width(48, 128),
    "tiny_medium": Recipe(),
    "tiny_large": Recipe.of_width(176, 448),
}


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word, and per operation with its number ("* 4"). Text is words joined by spaces."""
    vocab = {word: i for i, word in enumerate(vocabulary())}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[+*-] \d+|\S+"), behavior="removed", invert=True)
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=False)  # joins words by spaces
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    special = {f"{name}_token": f"<{name}>" for name in ("pad", "bos", "eos", "unk")}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special, padding_side="left")


def build_model(recipe: Recipe, vocab_size: int) -> Qwen2ForCausalLM:
    """A fresh Qwen2 with tied embeddings, float32."""
    torch.manual_seed(recipe.seed)
    sizes = dict(hidden_size=recipe.width, intermediate_size=recipe.mlp, num_hidden_layers=recipe.layers)
    sizes |= dict(num_attention_heads=recipe.heads, num_key_value_heads=recipe.kv_heads)
    sizes |= dict(vocab_size=math.ceil(vocab_size / 64) * 64, max_position_embeddings=512)
    ids = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
    return Qwen2ForCausalLM(Qwen2Config(**sizes, **ids, initializer_range=0.06, tie_word_embeddings=True))


def stage_document(
    stage: str, rng: random.Random, progress: float = 1.0, teacher: type[Teacher] = Teacher
) -> list[Sentence]:
    """One training document of a stage; ``progress`` in [0, 1] is how far the base is in its curriculum,
    ``teacher`` that of the stage "distilled"."""
    stage, teachers = AGAIN.get(stage, stage), {**TEACHERS, "distilled": teacher}
    if stage == "base":
        return base_document(rng, next(mix for end, mix in CURRICULUM if progress <= end))
    if stage == "midtrain":
        return base_document(rng, MID_MIX)
    if stage in ("latetrain", "null_a", "null_b") or rng.random() < KEEP_SHARE:
        return base_document(rng, LATE_MIX)
    operations = rng.choices(*zip(*LESSONS))[0]
    task = sample_question(rng) if rng.random() < EASY_SHARE else sample_puzzle(rng, "train", operations)
    return [*task.prompt(), *(teachers[stage](rng).solve(task) if stage in teachers else direct(task))]


def encode(sentences: list[Sentence], ids: dict[str, int]) -> tuple[list[int], list[bool]]:
    """Token ids with <bos> and <eos>, and for each whether it is learnt: ``Sentence.given`` words are not."""
    tokens, learnt = [ids["<bos>"]], [False]
    for sentence in sentences:
        tokens += [ids[word] for word in sentence.words]
        learnt += [i >= sentence.given for i in range(len(sentence.words))]
    return [*tokens, ids["<eos>"]], [*learnt, True]


def chunk_batches(stage: str, recipe: Recipe, chunk: int, progress: float = 1.0) -> list[Batch]:
    """The batches of one chunk of documents."""
    rng = random.Random(f"{recipe.seed}/{stage}/{chunk}")
    ids = {word: i for i, word in enumerate(vocabulary())}
    documents = [
        encode(stage_document(stage, rng, progress, recipe.teacher), ids) for _ in range(CHUNK_DOCUMENTS)
    ]
    return batches_of(documents, recipe.batch_tokens, rng)


def train_stage(
    stage: str, model: Qwen2ForCausalLM, recipe: Recipe, folder: Path, report=print, keep_every: float = 0.02
) -> Qwen2ForCausalLM:
    """Train one stage, from ``model`` as it stands, or from ``folder``/state.pt if that exists (see ``fit``).

    For ``distilled``, weights are kept every ``keep_every`` of the run: ``style`` is chosen among them.
    """
    budgets = dict(base=recipe.base_tokens, midtrain=recipe.mid_tokens, latetrain=recipe.late_tokens)
    rates = dict(base=recipe.base_rate, midtrain=recipe.mid_rate, latetrain=recipe.mid_rate)
    budget = budgets.get(stage, recipe.tune_tokens)
    fit(
        stage,
        model.train(),
        lambda x, y: token_losses(model, x, y),  # float32: at this size bfloat16 is slower
        lambda place: chunk_batches(stage, recipe, place.chunk, min(1.0, place.tokens / budget)),
        folder,
        budget,
        rates.get(stage, recipe.tune_rate),
        decay=0.05,
        keep_every=keep_every * budget if stage == "distilled" else math.inf,
        snapshot=model.state_dict,
        report=report,
    )
    return model.eval()


def stages_of(name: str) -> tuple[str, ...]:
    """The stages of a pair: only notebook 00 asks for ``control``, only ``tiny`` is trained with other seeds,
    and ``tiny_medium`` begins with its base."""
    if name == "tiny":
        return *STAGES, *AGAIN
    stages = tuple(stage for stage in STAGES if stage != "control")
    return stages[3:] if name == "tiny_medium" else stages


def train_all(
    out: Path, recipe: Recipe, stages: Sequence[str] = STAGES, report=print, base: Path | None = None
) -> None:
    """Train the stages in order, each resumable, below ``out`` (checkpoints and logs). ``base``: the folder
    of a pair whose base they begin with; None: they train their own."""
    tokenizer = build_tokenizer()
    claim(out, recipe)
    for stage in stages:
        final = out / stage / "final.pt"
        if final.is_file():
            report(f"{stage}: done before")
            continue
        if base:
            model = load_shipped("base", base)
        else:
            before = {"base": None, "midtrain": "base", "latetrain": "midtrain"}.get(stage, "latetrain")
            start = out / before / "final.pt" if before else None
            if start and not start.is_file():
                raise FileNotFoundError(f"{start} is missing: train the stage {before!r} first")
            model = _trained(start, recipe, tokenizer)
        train_stage(stage, model, recipe, out / stage, report)
        write_state(final, model.state_dict())


def _trained(file: Path | None, recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> Qwen2ForCausalLM:
    """The model of a checkpoint; a fresh one without."""
    model = build_model(recipe, len(tokenizer))
    if file:
        model.load_state_dict(torch.load(file, weights_only=True))
    return model


def choose_style(folder: Path, recipe: Recipe, tokenizer: PreTrainedTokenizerFast, report=print) -> Path:
    """The ``style`` checkpoint: says reflection words as often as the teacher, but not because of errors.

    On validation puzzles: the first kept checkpoint whose mean P(reflection) after a step is at least half of
    the teacher's rate of errors; the AUROC of P(reflection) for errors must be at most 0.65 there.
    """
    from sklearn.metrics import roc_auc_score

    tasks = trials.puzzles(100, "validation")
    for path in sorted(folder.glob("kept_*.pt")):
        model = _trained(path, recipe, tokenizer).eval()
        steps = trials.reflection_probability(model, tokenizer, tasks, teacher=recipe.teacher)
        mean, auc = steps.p_reflection.mean(), roc_auc_score(steps.error, steps.p_reflection)
        report(f"{path.name}: mean P(reflection) {mean:.3f}, AUROC for errors {auc:.3f}")
        if auc > 0.65:
            break
        if mean >= ERROR_RATE / 2:
            return path
    raise ValueError(
        f"no checkpoint in {folder} says reflection words at random: train longer, or keep checkpoints"
        " earlier"
    )


def ship(runs: Path, out: Path, recipe: Recipe, stages: Sequence[str] = STAGES, report=print) -> None:
    """Write the models of ``stages`` (bfloat16 safetensors), the log and the recipe below ``out``; where
    there is a ``control``, the ``style`` checkpoint too, and beside a base of its own the tokenizer, which
    other pairs share."""
    tokenizer = build_tokenizer()
    sources = {stage: runs / stage / "final.pt" for stage in stages if stage not in ("midtrain", "latetrain")}
    style = {}
    if "latetrain" in stages:
        sources["base"] = runs / "latetrain" / "final.pt"
    if {"control", "latetrain"} <= set(stages):
        with whole_files(out / "tokenizer") as scratch:
            tokenizer.save_pretrained(scratch)
    if "control" in stages:
        sources["style"] = choose_style(runs / "distilled", recipe, tokenizer, report)
        style = {"style_checkpoint": sources["style"].stem}
    for name, source in sources.items():
        model = _trained(source, recipe, tokenizer)
        save(model, out / name)
    lines = [line for stage in stages for line in (runs / stage / "log.jsonl").read_text().splitlines()]
    write_text(out / "log.jsonl", "\n".join(lines) + "\n")
    card = {**asdict(recipe), **style, "parameters": sum(p.numel() for p in model.parameters())}
    write_text(out / "recipe.json", json.dumps(card, indent=2) + "\n")
    report(f"shipped {', '.join(sources)} to {out}")


def save(model: Qwen2ForCausalLM, folder: Path) -> None:
    """Write a model as it is shipped: bfloat16 safetensors and its configuration."""
    with whole_files(folder) as scratch:
        model.to(torch.bfloat16).save_pretrained(scratch)
        (scratch / "generation_config.json").unlink(missing_ok=True)


def load_shipped(name: str, folder: Path) -> Qwen2ForCausalLM:
    """A shipped model as float32, ready to use. FileNotFoundError with the names that exist."""
    if not (folder / name / "model.safetensors").is_file():
        known = sorted(p.parent.name for p in folder.glob("*/model.safetensors"))
        raise FileNotFoundError(f"no model {name!r} in {folder}: there are {', '.join(known) or 'none'}")
    disable_progress_bar()  # it freezes at 0% in an executed notebook
    return Qwen2ForCausalLM.from_pretrained(folder / name, dtype=torch.float32, local_files_only=True).eval()


def weights_fingerprint(folder: Path, names: Sequence[str], *parts) -> str:
    """The fingerprint of other ``parts`` and of the weights of shipped models."""
    return fingerprint(*parts, *(folder / name / "model.safetensors" for name in names))


def distil_briefly(
    folder: Path, runs: Path, tokens: int, seed: int, report=passing
) -> tuple[Qwen2ForCausalLM, dict[str, pd.DataFrame]]:
    """The shipped base, distilled on so many tokens by the shipped recipe, and the logs of the shipped run
    and of this one. It resumes if it was interrupted."""
    shipped = json.loads((folder / "recipe.json").read_text())
    fields = {field: shipped[field] for field in Recipe.__dataclass_fields__}
    recipe = RecipeWithModes(**{**fields, "tune_tokens": tokens, "seed": seed})
    run = runs / weights_fingerprint(folder, ["base"], recipe)
    torch.set_num_threads(1)  # fastest for a model of this size
    student = train_stage("distilled", load_shipped("base", folder), recipe, run, report)
    shipped, small = (pd.read_json(where / "log.jsonl", lines=True) for where in (folder, run))
    return student, {"shipped run": shipped[shipped.stage == "distilled"], "small run, just now": small}


def make_pair(out: Path, runs: Path | None = None, stages: Sequence[str] = ()) -> None:
    """Train the embedded pair that is named like the folder ``out``, or go on with it, and ship it there.
    ``stages``: train these only, and ship nothing; but those of ``AGAIN`` begin with the shipped base, and
    their weights are written beside it. ``runs``: folder of checkpoints and logs."""
    if out.name == "tiny_planted":
        from .control import make_control

        return make_control(out, runs or Path("data/runs") / f"distil_{out.name}")
    if out.name not in RECIPES:
        raise UserError(
            f"there is no recipe for {out.name!r}: the last part of OUT must be one of {', '.join(RECIPES)}"
        )
    recipe, known = RECIPES[out.name], stages_of(out.name)
    for stage in stages:
        check("stage", stage, choices=known)
    runs = runs or Path("data/runs") / f"distil_{out.name}"
    again, known = [s for s in stages if s in AGAIN], [s for s in known if s not in AGAIN]
    train_all(runs, recipe, again, base=out)
    for stage in again:
        save(_trained(runs / stage / "final.pt", recipe, build_tokenizer()), out / stage)
    if others := tuple(s for s in stages or known if s not in again):
        train_all(runs, recipe, others, base=None if "base" in known else out.parent / "tiny")
    if not stages:
        ship(runs, out, recipe, known)
