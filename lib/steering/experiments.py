"""Are the features causes? Whole thoughts with features removed, exchanged between the models, or used as the
other model uses them (notebook 13), by ``lib.steering.generate``::

    ablate    h  ->  h - sum_{i in S_c} f_i d_i            f: joint; S_c: the features that predict category c
    swap      h  ->  h + sum_i (f_i^other - f_i^own) d_i   what the other model alone gives
    impose    h  ->  h + sum_i (g_i - 1) f_i^own d_i       g_i: the other model's mean use over the writer's
    place     h  ->  h + ... at full stops                 more of category c: does it come where it belongs?

with the writer's decoder; ``ablate`` while thinking, ``swap`` and ``impose`` everywhere. Sets, gains, vectors
and strengths come from the split "choose" and validation puzzles; what is reported is from test puzzles, all
of it sampled at temperature 1, where errors happen and reflection has something to mend.

**Thinking rate** (fixed before any intervention was looked at): given the question alone, without "think :"
or "answer :", the share of puzzles on which the model opens with "think :" *and* takes at least one step of
calculation (``opens``: the first half alone). A model that is merely broken thinks less too: so ``answers``,
the share that opens with "answer :" as the base does, is reported beside it.

Use is encoded from each model alone (the other at its mean), which is *not* what the crosscoder was trained
on; ``Use.fve`` says how much of its own model such a code still explains, and ``Reconstruct("own")`` what it
costs by itself. The paper (arXiv 2503.03730) asks for faithfulness by logits; these experiments are ours."""

import re
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from transformers import PreTrainedModel

from ..activations.positions import positions
from ..activations.store import Store
from ..crosscoder.codes import sample_rows
from ..crosscoder.model import CrossCoder
from ..features.table import best_aurocs, usable
from ..features.use import solo_codes
from ..labels import CATEGORIES, LABELS, REDUNDANT
from ..models.pairs import Pair, decoder_layers
from ..runs import fingerprint
from ..settings import UserError, check
from ..text.puzzles import Puzzle, apply, equation_of, first_words, label_of, sentences_of
from .ablation import matched_outside
from .effects import HEAD, METHODS, OTHER
from .generate import TranscriptFile, Treatment, kept_transcripts, transcripts
from .interventions import AddVector, LogitBias, RandomLike, Reconstruct, Scale, Swap, Transplant
from .outcomes import outcomes
from .tasks import PUZZLES

GAIN = 10.0  # the largest factor by which the use of a feature is changed; the smallest is 0
BIAS = 4.0  # of logits, in ablations
TEMPERATURE = 1.0  # of all thoughts
TRIED = (0.125, 0.25, 0.5, 1.0)  # strengths of adding more, of which one is chosen


# --- what is chosen, on the split "choose" ------------------------------------------------------------------


def category_sets(
    table: pd.DataFrame, n: int = 5, nrn_over: float = 0.5, categories: Sequence[str] = CATEGORIES
) -> dict[str, tuple[int, ...]]:
    """{category: the ``n`` features that predict it best on the choose split, at the value or the full stop},
    best first, among those that may stand for one (``features.table.usable``) and have an AUROC above 0.5; a
    category without is left out."""
    check("n", n, int, low=1)
    may_stand, sets = table[usable(table, nrn_over)].set_index("feature"), {}
    for c in categories:
        scores = best_aurocs(may_stand, c, "_choose").nlargest(n)
        sets[c] = tuple(scores[scores > 0.5].index.astype(int).tolist())
    return {c: features for c, features in sets.items() if features}


@dataclass(frozen=True)
class Use:
    """How both models use the features on the same tokens. ``table``: one row per feature; ``fve`` {model:
    the share of its variance that features encoded from it alone explain}."""

    table: pd.DataFrame
    fve: dict[str, float]

    def gains(self, features: Sequence[int], writer: str = "base") -> np.ndarray:
        """The other model's mean use over the writer's, from 0 to ``GAIN``; 1 where neither fires. A feature
        that the writer never uses has the largest gain, and no effect: a gain cannot create."""
        own, other = (self.table[f"use_{m}"].to_numpy()[list(features)] for m in (writer, OTHER[writer]))
        ratio = np.divide(other, own, out=np.full(len(own), GAIN), where=own > 0)
        return np.where((own == 0) & (other == 0), 1.0, np.clip(ratio, 0.0, GAIN))


def measure_use(
    crosscoder: CrossCoder, store: Store, split: str = "choose", max_tokens: int | None = 40_000
) -> Use:
    """Use on traces of a split (kept tokens of at most ``max_tokens``, whole documents).

    Columns feature, and for both models, as encoded from each alone, and "joint": use_<model> (mean
    activation) and frequency_<model>. UserError if the split has no traces."""
    rows = sample_rows(store, split, max_tokens, 0)
    rows = rows[store.labels["kind"][rows] == 1]
    if len(rows) == 0:
        raise UserError(f"the split {split!r} holds no traces: the corpus of this pair must carry labels")
    columns, fve = {"feature": np.arange(crosscoder.n_features)}, {}
    acts = dict(zip(store.models, store.activations(rows)))
    for name, f in solo_codes(crosscoder, store, rows, "alone").codes.items():
        columns[f"use_{name}"] = np.asarray(f.mean(0, dtype=np.float64)).ravel()
        columns[f"frequency_{name}"] = np.asarray((f > 0).mean(0)).ravel()
        if name in acts:
            x_hat = f @ crosscoder.rows(name, raw=True).numpy() + crosscoder.bias(name, raw=True).numpy()
            x, mean = acts[name].numpy(), crosscoder.mean(name, raw=True).numpy()
            error, variance = (np.square(x - y, dtype=np.float64).sum() for y in (x_hat, mean))
            fve[name] = float(1 - error / variance)
    return Use(pd.DataFrame(columns), fve)


def mean_differences(
    store: Store, model: str = "distilled", split: str = "choose", categories: Sequence[str] = CATEGORIES
) -> dict[str, tuple]:
    """{category: mean activation [d] at sentence ends before it, minus that at all other sentence ends of
    traces}."""
    rows = store.rows(split)
    index, following = positions(store, rows, "before")
    acts = store.activations(rows[index])[store.models.index(model)].double()
    vectors = {}
    for c in categories:
        before = torch.from_numpy(following == LABELS.index(c))
        if not before.any():
            raise UserError(
                f"no sentence of {c} in the split {split!r}: the corpus of this pair must carry labels"
            )
        vectors[c] = tuple((acts[before].mean(0) - acts[~before].mean(0)).tolist())
    return vectors


# --- conditions ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Condition:
    """A treatment with a name. ``family``: "untouched", "ablate", "swap", "impose", "place"; ``kind`` tells
    features from controls, ``target`` is a category or a set of features ("" if neither)."""

    family: str
    kind: str
    target: str
    treatment: Treatment
    strength: float = float("nan")

    @property
    def name(self) -> str:
        parts = (self.family, self.kind, self.target, "" if np.isnan(self.strength) else f"{self.strength:g}")
        return " / ".join([*filter(None, parts), self.treatment.writer, self.treatment.mode])

    @property
    def of_crosscoder(self) -> bool:
        """Does it ask the crosscoder? Else it is the same with every one."""
        what = self.treatment.intervention
        plain = what is None or isinstance(what, LogitBias)
        return not plain and not (isinstance(what, AddVector) and what.reference is None)


def untouched(writer: str, mode: str = "think") -> Condition:
    return Condition("untouched", "untouched", "", Treatment(writer, mode=mode))


def conditions(
    table: pd.DataFrame,
    sets: Mapping[str, Sequence[int]],
    attributed: Mapping[str, Sequence[int]],
    use: Use,
    vectors: Mapping[str, Sequence[float]],
    unique: Sequence[int],
    reweighted: Sequence[int],
    seed: int = 0,
) -> list[Condition]:
    """All conditions of ablation, swap and imposed use. ``sets`` and ``attributed``: features of the
    categories that predict them, and that their sentences are attributed to; ``unique`` and ``reweighted``:
    as nulls decide."""
    unique, reweighted = tuple(map(int, unique)), tuple(map(int, reweighted))
    every = ablations(table, sets, attributed, use, vectors, seed)
    kinds = swaps(table, unique, seed)
    every += _both_ways("swap", lambda writer: kinds)
    every += _both_ways("impose", impositions(table, use, unique, reweighted, seed))
    return list(dict.fromkeys(every))


def ablations(
    table: pd.DataFrame,
    sets: Mapping[str, Sequence[int]],
    attributed: Mapping[str, Sequence[int]],
    use: Use,
    vectors: Mapping[str, Sequence[float]],
    seed: int = 0,
) -> list[Condition]:
    """In the distilled model while it thinks: each category's features removed, and controls.

    Kinds: features (zero) and attributed, each with "..., matched" (as many others that fire as often on
    traces) and "..., random" (directions of the norm that is removed); of the former also mean (f_i set to
    its mean on choose), mean difference (subtracted, same norm) and logit bias (``BIAS`` off the first words'
    logits at sentence ends)."""
    frequency = table.assign(frequency_traces=use.table["frequency_joint"].to_numpy())
    means, every = use.table["use_joint"].to_numpy(), [untouched("distilled")]
    for c in dict.fromkeys((*sets, *attributed)):
        kinds = {}
        for kind, chosen in (("features", sets.get(c, ())), ("attributed", attributed.get(c, ()))):
            chosen = tuple(map(int, chosen))
            if chosen:
                matched = matched_outside(frequency, chosen, "frequency_traces")
                kinds[kind] = Scale(chosen)
                kinds[f"{kind}, matched"] = Scale(tuple(matched.tolist()))
                kinds[f"{kind}, random"] = RandomLike(kinds[kind], seed)
        if c in sets:
            removed = kinds["features"]
            offsets = tuple(means[list(removed.features)].tolist())
            kinds["mean"] = Scale(removed.features, offsets=offsets)
            kinds["mean difference"] = AddVector(tuple(vectors[c]), -1.0, removed)
        kinds["logit bias"] = LogitBias(first_words(c), -BIAS)
        for kind, what in kinds.items():
            place = "ends" if kind == "logit bias" else "thinking"
            every.append(Condition("ablate", kind, c, Treatment("distilled", what, place)))
    return every


def swaps(table: pd.DataFrame, unique: tuple[int, ...], seed: int = 0) -> dict[tuple[str, str], object]:
    """{(kind, target): intervention}. Targets: all, unique, matched, and random directions of the norms of
    "all"; kind "joint": the joint values; "reconstruct ..." and "transplant" (the other model's own
    activation): the stream replaced, with the error. Where the latter carries nothing over, no feature can.
    """
    kinds = {
        ("swap", "all"): Swap(),
        ("joint", "all"): Swap("joint"),
        ("random", "all"): RandomLike(Swap(), seed),
        ("reconstruct other", "all"): Reconstruct("other"),
        ("reconstruct own", "all"): Reconstruct("own"),
        ("transplant", "all"): Transplant(),
    }
    if unique:
        matched = random_set(table[table["alive"].astype(bool)], unique, seed)
        kinds |= {("swap", "unique"): Swap(features=unique), ("matched", "unique"): Swap(features=matched)}
    return kinds


def impositions(
    table: pd.DataFrame, use: Use, unique: tuple[int, ...], reweighted: tuple[int, ...], seed: int = 0
) -> Callable[[str], dict[tuple[str, str], object]]:
    """{(kind, target): intervention} for a writer, on whom the other model's use is imposed: kind "gain" (own
    features times g_i), "matched": the same gains, permuted, on other features of like frequency."""
    sets = {"unique": unique, "reweighted": reweighted, "both": tuple(dict.fromkeys((*unique, *reweighted)))}
    alive, rng = table[table["alive"].astype(bool)], np.random.default_rng(seed)
    matched = {name: random_set(alive, chosen, seed) for name, chosen in sets.items()}

    def kinds(writer: str) -> dict:
        every = {}
        for name, chosen in sets.items():
            if chosen:
                weights = use.gains(chosen, writer) - 1
                permuted = tuple(rng.permutation(weights).tolist())
                every["gain", name] = Scale(chosen, tuple(weights.tolist()), source="own")
                every["matched", name] = Scale(matched[name], permuted, source="own")
        return every

    return kinds


def _both_ways(family: str, kinds: Callable[[str], dict]) -> list[Condition]:
    """With either model as writer, from the question alone."""
    every = []
    for writer in OTHER:
        every.append(untouched(writer, "free"))
        for (kind, target), what in kinds(writer).items():
            every.append(Condition(family, kind, target, Treatment(writer, what, "everywhere", "free")))
    return every


def random_set(alive: pd.DataFrame, chosen: Sequence[int], seed: int = 0) -> tuple[int, ...]:
    """For each feature of ``chosen`` another of like firing frequency: one of the ten nearest (log
    scale) of those that are left. Where there are too few others, its own members may be drawn too."""
    log = np.log(alive.set_index("feature")["frequency_choose"].clip(lower=1e-9))
    pool = log.drop(index=list(chosen), errors="ignore")
    pool, rng, drawn = pool if len(pool) >= len(chosen) else log, np.random.default_rng(seed), []
    for feature in chosen:
        near = (pool - log.get(feature, np.log(1e-9))).abs().nsmallest(10).index
        drawn.append(int(rng.choice(near)))
        pool = pool.drop(index=drawn[-1])
    return tuple(drawn)


# --- more of a category: where does it go? ------------------------------------------------------------------


def placements(task: Puzzle, words: Sequence[str]) -> list[tuple[str, str]]:
    """(what the sentence end calls for, label of the sentence that follows) for every sentence end of a
    thought.

    By the teacher's grammar: a wrong step calls for reflection until it is mended; a branch that is complete
    and misses the target for contrast; contrast for alternative; a branch that is not complete for deduction;
    everything else for "other"."""
    sentences, found = sentences_of(list(words)), []
    call, mended, value, taken = "other", None, None, 0
    for sentence, following in zip(sentences, sentences[1:]):
        label, step = label_of(sentence), equation_of(sentence)
        numbers = [int(w) for w in sentence if w.isdigit()]
        if sentence[0] in ("done", "answer"):
            break
        stepped = (label == "deduction" or sentence[0] == "start") and step
        corrected = label == "reflection" and numbers and value is not None
        if label == "alternative" or sentence[0] == "first":
            call, mended, value, taken = "other", None, numbers[0] if numbers else None, 0
        elif stepped or corrected:
            if stepped:
                before, operation, value = step
                right, taken = apply(operation, before), taken + 1
                mended = right if right != value else None
            else:
                value = numbers[-1]
                mended = None if value == mended else mended
            complete = "other" if value == task.target else "contrast"
            onwards = "deduction" if taken < len(task.operations) else complete
            call = onwards if mended is None else "reflection"
        elif label == "contrast":
            call = "alternative"
        elif label != REDUNDANT:
            call = "other"
        found.append((call, label_of(following)))
    return found


def strengthenings(
    crosscoder: CrossCoder,
    sets: Mapping[str, Sequence[int]],
    vectors: Mapping[str, Sequence[float]],
    norm: float,
    strengths: Mapping[tuple[str, str], Sequence[float]] | None = None,
    seed: int = 0,
) -> list[Condition]:
    """More of each category at sentence ends, by every one of METHODS, in the distilled model.

    feature: decoder row of the category's best feature; mean difference, random: a vector of the same length,
    ``strength`` x ``norm`` (mean residual norm); amplify: the set's own contribution once more, 8 x
    ``strength`` times; logit bias: 8 x ``strength``. ``strengths`` {(category, method): strengths}; TRIED for
    all by default."""
    width = crosscoder.widths[crosscoder.names.index("distilled")]
    noise = torch.randn(len(sets), width, generator=torch.Generator().manual_seed(seed))
    every = [untouched("distilled")]
    for (c, chosen), random in zip(sets.items(), noise.tolist()):
        row = crosscoder.rows("distilled", raw=True)[chosen[0]].tolist()
        for method in METHODS:
            for s in TRIED if strengths is None else strengths.get((c, method), ()):
                if method == "logit bias":
                    what = LogitBias(first_words(c), 8 * s)
                elif method == "amplify":
                    what = Scale(tuple(chosen), 8 * s)
                else:
                    vector = {"feature": row, "random": random}.get(method, vectors[c])
                    what = AddVector(tuple(vector), s * norm)
                treatment = Treatment("distilled", what, "ends")
                every.append(Condition("place", method, c, treatment, strength=float(s)))
    return every


def matching_strengths(rows: pd.DataFrame, factor: float = 1.5) -> dict[tuple[str, str], tuple[float, ...]]:
    """{(category, method): (strength,)} at which the rate of a category is ``factor`` times the untouched
    one, by interpolation; where no strength reaches it, the one that comes nearest. ``rows`` of ``run`` on
    puzzles for choosing."""
    before, chosen = rows[rows["family"] == "untouched"], {}
    for (c, method), group in rows[rows["family"] == "place"].groupby(["target", "kind"], sort=False):
        rate = pd.Series({0.0: before[f"n_{c}"].mean()})
        rate = pd.concat([rate, group.groupby("strength")[f"n_{c}"].mean()])
        wanted, s, r = factor * rate.iloc[0], rate.index.to_numpy(float), rate.to_numpy()
        above = np.flatnonzero(r[1:] >= wanted)  # a rate of 0 to begin with counts for nothing
        if len(above):
            ends = slice(above[0], above[0] + 2)
            chosen[c, method] = (float(round(np.interp(wanted, r[ends], s[ends]), 4)),)
        else:
            chosen[c, method] = (float(s[1:][np.abs(r[1:] - wanted).argmin()]),)
    return chosen


# --- one model above the other ------------------------------------------------------------------------------


def transplanted(lower: PreTrainedModel, upper: PreTrainedModel, layers: int) -> PreTrainedModel:
    """A model whose embedding and first ``layers`` decoder layers are those of ``lower``; everything above,
    with the final norm and the unembedding, is ``upper``'s. 0 layers: ``upper`` as it is, its embedding
    included.

    At each token it is ``upper`` with the whole residual stream of ``lower`` in place of its own: the most
    that anything which is carried over at that layer can do. Modules are shared, not copied. UserError for
    models of other shapes."""
    stacks = [decoder_layers(model) for model in (lower, upper)]
    check("layers", layers, int, low=0, high=min(map(len, stacks)))
    shapes = [(model.config.hidden_size, len(stack)) for model, stack in zip((lower, upper), stacks)]
    if shapes[0] != shapes[1]:
        raise UserError(
            f"the models have (width, layers) {shapes[0]} and {shapes[1]}: a transplant needs the same"
        )
    if layers == 0:
        return upper
    # parameters stay where they are: only the modules that hold them are new
    shared = {id(parameter): parameter for model in (lower, upper) for parameter in model.parameters()}
    made = deepcopy(upper, shared)
    made.set_input_embeddings(lower.get_input_embeddings())
    stack = decoder_layers(made)
    for i in range(layers):
        stack[i] = stacks[0][i]
    return made


# --- running ------------------------------------------------------------------------------------------------


def run(
    pair: Pair,
    models: Mapping[str, PreTrainedModel],
    crosscoder: CrossCoder,
    store: Store,
    tasks: Sequence[Puzzle],
    conditions: Sequence[Condition],
    folder: Path,
    weights: str,
    max_new_tokens: int = 250,
    seed: int = 0,
) -> pd.DataFrame:
    """One row per condition and task: the columns of ``outcomes``, and

    family, kind, target, speaker (who writes), mode, strength, condition (its name), task; steps
    (of calculation), thinking (opens with "think :" and takes a step), answers (opens with "answer :"); and
    for every category c: calls_c, met_c (sentence ends that call for c; and c follows), rest_c, strays_c (all
    other sentence ends; and c follows).

    Transcripts are kept in ``folder``, one file per condition, under a fingerprint of ``weights`` (of models
    and crosscoder), condition, tasks and limits: what is there is read, an interrupted run goes on."""
    conditions, tokenizer, files = list(dict.fromkeys(conditions)), pair.tokenizer(), []
    for condition in conditions:
        decided_by = (weights, condition.treatment, TEMPERATURE, [repr(t) for t in tasks])
        key = fingerprint(*decided_by, max_new_tokens, seed)
        stem = re.sub("[^a-z0-9.]+", "-", condition.name.lower())
        files.append(TranscriptFile(Path(folder) / f"{stem}_{key}.json", key, {"condition": condition.name}))

    def write(rows: Sequence[tuple[int, int]]) -> list[list[str]]:
        return transcripts(
            models, tokenizer, store.layers, crosscoder, [tasks[task] for task, _ in rows],
            [conditions[i].treatment for _, i in rows], max_new_tokens, TEMPERATURE, seed,
        )  # fmt: skip

    def group(i: int) -> tuple:
        return conditions[i].treatment.writer, conditions[i].treatment.mode

    def lengths(done: Mapping[int, list]) -> np.ndarray:
        return np.mean([[len(words) for words in written] for written in done.values()], axis=0)

    label = f"conditions of {len(tasks)} puzzles"
    found, _ = kept_transcripts(files, len(tasks), write, group, lengths, PUZZLES.batch_rows, label)
    frames = [_rows(condition, tasks, words, max_new_tokens) for condition, words in zip(conditions, found)]
    return pd.concat(frames, ignore_index=True)


def _rows(
    condition: Condition, tasks: Sequence[Puzzle], written: Sequence[Sequence[str]], max_new_tokens: int
) -> pd.DataFrame:
    frame = outcomes(tasks, written, max_new_tokens)
    frame["steps"] = frame["errors"] + frame["correct_steps"]
    frame["answers"] = [list(words[:2]) == ["answer", ":"] for words in written]
    frame["thinking"] = frame["thinks"].astype(bool) & (frame["steps"] > 0)
    ends = [placements(task, words) for task, words in zip(tasks, written)]
    for c in CATEGORIES:
        frame[f"calls_{c}"] = [sum(call == c for call, _ in row) for row in ends]
        frame[f"met_{c}"] = [sum(call == c == label for call, label in row) for row in ends]
        frame[f"rest_{c}"] = [sum(call != c for call, _ in row) for row in ends]
        frame[f"strays_{c}"] = [sum(call != c and label == c for call, label in row) for row in ends]
    treatment = condition.treatment
    head = {**vars(condition), **vars(treatment), "condition": condition.name, "speaker": treatment.writer}
    first = pd.DataFrame({name: head[name] for name in HEAD} | {"task": range(len(tasks))}, index=frame.index)
    return pd.concat([first, frame], axis=1)
