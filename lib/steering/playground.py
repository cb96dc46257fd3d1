"""A playground for steering: ask one thing, add one feature, and read the two thoughts side by side.

    playground = Playground(opened)                              # of ``artefacts.open_run``
    playground.compare("what is 5 - 1 ?", "reflection", 0.5)     # two transcripts, a table, HTML
    playground.widget()                                          # the same by hand, while it is generated

It steers by ``lib.steering.generate``, in the same unit and with the same random numbers as the experiments
of notebook 04. **One thought is an anecdote**: it shows what a vector does, not how often. "random" is a
random direction of the same norm. *Where*: "thinking", from the prompt's last position until the thought is
closed, as in all experiments; "prompt", the positions before it; "all", every position, the answer's too."""

from __future__ import annotations

import asyncio
import html
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import ipywidgets
import numpy as np
import pandas as pd
import torch

from ..figures import COLOURS, labelled_lines
from ..labels import CATEGORIES, REDUNDANT
from ..models.decode import context_of
from ..settings import UserError, check
from ..text import lexicon, puzzles, questions
from . import generate
from . import steer as steering
from .artefacts import RunArtefacts
from .tasks import PUZZLES, Medium

RANDOM = "random"
SIDES = ("unsteered", "steered")
Feature = int | str | steering.Direction
STRONGEST = 100.0  # mean residual norms


# --- what is asked ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FreeText:
    """Words that are no puzzle, put to a puzzle model as they are. Nobody knows the answer."""

    text: str
    answer: None = None
    value: None = None
    operation: str = ""

    def prompt(self) -> list[puzzles.Sentence]:
        words = tuple(self.text.split())
        return [puzzles.Sentence(words, "other", given=len(words))]


def puzzle_of(words: Sequence[str]) -> puzzles.Puzzle | puzzles.Question | FreeText:
    """The puzzle or the easy question that these words put; free text where they are neither, or where not
    exactly one candidate is right.

    >>> puzzle_of(["what", "is", "5", "- 1", "?"])
    Question(value=5, operation='- 1')
    """
    words = tuple(words[:-2] if tuple(words[-2:]) == ("think", ":") else words)
    operations, numbers, asked = words[2:-8], words[-6:-3], []
    if len(words) == 5 and words[2] in puzzles.NUMBERS and words[3] in puzzles.OPERATIONS:
        asked = [puzzles.Question(int(words[2]), words[3])]
    elif (
        len(words) > 9
        and set(operations) <= set(puzzles.OPERATIONS)
        and {*numbers, words[-2]} <= set(puzzles.NUMBERS)
    ):
        candidates = tuple(map(int, numbers))
        asked = [puzzles.Puzzle(operations, candidates, c) for c in dict.fromkeys(candidates)]
    # of a puzzle's three answers, those that end at the target
    matching = [task for task in asked if task.prompt()[0].words == words]
    return matching[0] if len(matching) == 1 else FreeText(" ".join(words))


# --- what came of it ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """An unsteered and a steered thought about one task.

    ``transcripts`` {"unsteered" | "steered": tokens as text}; ``ended`` says of each whether it has come to
    its end; ``how`` is what was asked, in words; ``table`` has a row for each: tokens (length of the
    thought), end, answer, right (None: nobody knows), every step right, and the number of sentences of each
    label; ``lines``: of ``lines_of``."""

    task: object
    prompt: str
    how: str
    transcripts: dict[str, list[str]]
    ended: dict[str, bool]
    table: pd.DataFrame
    lines: dict[str, list[tuple[str, Sequence[str], bool]]]

    @property
    def html(self) -> str:
        """Both thoughts side by side, a sentence a line, its category named and coloured; wrong ones
        underlined; then the table."""
        columns = []
        for side, row in self.table.iterrows():
            right = {True: ", right", False: ", wrong"}.get(row["right"], "")
            answer = "no answer" if row["answer"] is None else f"answer {row['answer']:g}{right}"
            title = html.escape(f"{side}: {row['tokens']} tokens, {row['end']}, {answer}")
            columns.append(
                f'<section aria-label="{side} text" style="flex:1 1 24em;min-width:0;overflow-x:auto">'
                f'<h4 style="margin:4px 0">{title}</h4>{labelled_lines(self.lines[side]).data}</section>'
            )
        table = self.table.map(_shown).to_html(border=0)
        for cell in ("th", "td"):  # no theme styles a table inside a widget
            style = "text-align:left;padding:2px 14px 2px 0;line-height:1.4"
            table = table.replace(f"<{cell}>", f'<{cell} style="{style}">')
        return (
            f'<p style="margin:4px 0">{html.escape(self.how)}<br><code>{html.escape(self.prompt)}</code></p>'
            '<div style="display:flex;flex-wrap:wrap;gap:12px;align-items:flex-start">'
            f'{"".join(columns)}</div><div style="overflow-x:auto">{table}</div>'
        )

    def _repr_html_(self) -> str:
        return self.html


def _shown(value) -> str:
    if value is None or isinstance(value, bool):
        return {None: "–", True: "yes", False: "no"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)


def lines_of(task, transcript: Sequence[str], medium: Medium) -> list[tuple[str, Sequence[str], bool]]:
    """(label, words, wrong) of every sentence. In chat the lexicon labels; nothing is marked wrong."""
    if medium is not PUZZLES:
        text = medium.joiner.join(transcript)
        return [(span.label, [text[span.start : span.end]], False) for span in lexicon.sentences(text)]
    lines = []
    for words in puzzles.sentences_of(list(transcript)):
        equation = puzzles.equation_of(words)
        wrong = equation is not None and puzzles.apply(equation[1], equation[0]) != equation[2]
        if words[:2] == ("answer", ":") and len(words) > 2 and task.answer is not None:
            wrong = words[2] != str(task.answer)
        lines.append((puzzles.label_of(words), words, wrong))
    return lines


# --- the playground -----------------------------------------------------------------------------------------


class Playground:
    """The open models of a run, its crosscoder, and the features that were chosen for the categories.
    Thoughts are sampled at ``temperature`` and end after ``max_new_tokens``."""

    def __init__(
        self, opened: RunArtefacts, max_new_tokens: int = 250, temperature: float = 1.0, seed: int = 0
    ):
        self.models, self.chosen, self.medium = dict(opened.models), dict(opened.chosen), opened.medium
        self.store, self.crosscoder, self.remote = opened.store, opened.crosscoder, opened.pair.remote
        self.max_new_tokens = check("max_new_tokens", max_new_tokens, int, low=1)
        self.temperature, self.seed = float(check("temperature", temperature, float, low=0)), seed
        asked = [*self.medium.easy(1, seed), *self.medium.tasks("report", 5, seed)]
        # as a user would type it
        typed = lambda task: " ".join(task.prompt()[0].words) if self.medium is PUZZLES else task.text
        self.examples = {typed(task): task for task in asked}

    def task(self, prompt, model: str = "distilled"):
        """What ``prompt`` asks: a task is itself, a text is read. UserError if it is empty, too long, or not
        in the model's words."""
        tokenizer = self.models[model].tokenizer
        task = self._typed(prompt.strip(), tokenizer) if isinstance(prompt, str) else prompt
        asked = tokenizer(self.medium.prompt(task), add_special_tokens=self.medium.special_tokens)
        length = len(asked["input_ids"])
        context = context_of(self.models[model].config) or np.inf
        if length + self.max_new_tokens > context:
            raise UserError(
                f"the prompt has {length} tokens and the thought may take {self.max_new_tokens}, and this"
                f" model's context is {context}: shorten the prompt"
            )
        return task

    def _typed(self, text: str, tokenizer):
        if not text:
            raise UserError("the prompt is empty: give a puzzle or a question")
        if marker := next((token for token in tokenizer.all_special_tokens if token in text), None):
            raise UserError(
                f"the prompt contains {marker!r}, which is a marker of this model and no text: leave it out"
            )
        if self.medium is not PUZZLES:
            return self.examples.get(text, questions.Question(text, None, -1))
        found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        spans = zip(found["input_ids"], found["offset_mapping"])
        unknown = dict.fromkeys(text[a:b] for i, (a, b) in spans if i == tokenizer.unk_token_id)
        if unknown:
            words = ", ".join(map(repr, list(unknown)[:5]))
            raise UserError(
                f"the prompt has words that this model does not know ({words}): it knows those of its"
                f" puzzles, such as {next(iter(self.examples))!r}"
            )
        return puzzle_of(tokenizer.convert_ids_to_tokens(found["input_ids"]))

    def direction(self, feature: Feature, model: str = "distilled") -> steering.Direction:
        """A feature by number, a category's chosen feature by its name, or "random": in ``model``, of its
        mean residual norm."""
        check("model", model, str, choices=tuple(self.models))
        if isinstance(feature, steering.Direction):
            return feature
        norm, label, number = self.store.mean_norms[model], "feature", feature
        if feature == RANDOM:
            return steering.random_directions(1, self.store.widths[model], norm, self.seed)[0]
        if isinstance(feature, str) and feature.strip().isdecimal():
            number = int(feature)
        elif isinstance(feature, str):
            label, number = feature, self.chosen.get(feature)
        if number is None:
            raise UserError(
                f"feature is {feature!r}: it must be a number, {RANDOM}, or one of {', '.join(self.chosen)}"
            )
        return steering.feature_direction(self.crosscoder, number, norm, label, model)

    def stream(
        self,
        prompt,
        feature: Feature,
        strength: float,
        where: str = "thinking",
        model: str = "distilled",
        seed: int | None = None,
    ) -> Iterator[Comparison]:
        """The unsteered and the steered thought about ``prompt`` (a task, or a text) while they grow: the
        last one that comes is the whole. To stop, stop asking.

        ``feature``: a number, a category with a chosen feature, "random", or a direction; ``strength`` in
        mean residual norms, negative to take away; ``where``: "prompt", "thinking", "ends" (its full stops)
        or "all"; ``seed``: of the random numbers, the playground's by default. UserError for what does not
        exist.
        """
        direction = self.direction(feature, model)
        strength = float(check("strength", strength, float, low=-STRONGEST, high=STRONGEST))
        check("where", where, str, choices=(*generate.STEERED, "ends"))
        seed = check("seed", self.seed if seed is None else seed, int)
        task, vector = self.task(prompt, model), strength * direction.vector
        how = f"{model} model, {direction.name} at strength {strength:g}, where: {where}, seed {seed}"
        vectors, asked = torch.stack([torch.zeros_like(vector), vector]), self.medium.prompt(task)
        for written, ended in generate.steered_stream(
            self.models[model], self.store.layers[model], [task, task], vectors, self.max_new_tokens,
            self.medium, temperature=self.temperature, seed=seed, end_of_thinking=self.medium.end_of_thinking,
            remote=self.remote, place=where,
        ):  # fmt: skip
            table = self._table(task, written, ended)
            lines = {side: lines_of(task, words, self.medium) for side, words in zip(SIDES, written)}
            thoughts = dict(zip(SIDES, written))
            yield Comparison(task, asked, how, thoughts, dict(zip(SIDES, ended)), table, lines)

    def compare(
        self,
        prompt,
        feature: Feature,
        strength: float,
        where: str = "thinking",
        model: str = "distilled",
        seed: int | None = None,
    ) -> Comparison:
        """Both thoughts as they end; the parameters are those of ``stream``."""
        *_, last = self.stream(prompt, feature, strength, where, model, seed)
        return last

    def _table(self, task, written: Sequence[Sequence[str]], ended: Sequence[bool]) -> pd.DataFrame:
        facts, rows = self.medium.outcomes([task] * len(written), written, self.max_new_tokens), []
        # in chat a check is a reflection
        labels = (*CATEGORIES, REDUNDANT) if self.medium is PUZZLES else CATEGORIES
        for (_, row), over in zip(facts.iterrows(), ended):
            end = "not ended" if not over else "limit reached" if row["runaway"] else "thought not closed"
            known, chain = over and task.answer is not None, row["chain_correct"]
            answer = None if pd.isna(row["answer"]) else row["answer"]
            right = bool(row["correct"]) if known else None
            every_step = bool(chain) if known and pd.notna(chain) else None
            end = "thought closed" if row["closed"] else end
            counts = (int(row[f"n_{label}"]) for label in labels)
            rows.append((int(row["length"]), end, answer, right, every_step, *counts))
        columns = ["tokens", "end", "answer", "right", "every step right", *labels]
        return pd.DataFrame(rows, list(SIDES), columns, dtype=object)  # None stays None

    def widget(self) -> Panel:
        """The playground with fields and buttons, to be shown as a cell's last line."""
        return Panel(self)


# --- the widget ---------------------------------------------------------------------------------------------

_BY_NUMBER = "number"
_MESSAGE = (
    '<div role="status" aria-live="polite" style="border-left:6px solid {colour};padding:2px'
    ' 8px;color:#222;background:#fff">{text}</div>'
)


class Panel(ipywidgets.VBox):
    """Fields, two buttons and the two growing texts. ``Generate`` while it generates begins anew."""

    def __init__(self, playground: Playground):
        self.playground, self._turn, self._stopped, self._task = playground, 0, False, None
        try:
            # the kernel's, on its main thread; buttons may be heard on another one
            self._loop = asyncio.get_running_loop()
        except RuntimeError:
            self._loop = None
        texts, wide = list(playground.examples), ipywidgets.Layout(width="98%")
        features = {f"{label} (feature {feature})": label for label, feature in playground.chosen.items()}
        features |= {"a random direction": RANDOM, "a feature by its number": _BY_NUMBER}
        shown = [("(your own text)", ""), *((text, text) for text in texts)]
        choice, models = ipywidgets.Dropdown, list(playground.models)
        self.example = _field(choice, "Example", texts[1], options=shown, layout=wide)
        self.prompt = _field(ipywidgets.Textarea, "Prompt", texts[1], rows=3, layout=wide)
        first = next(iter(features.values()))
        self.feature = _field(choice, "Add", first, options=list(features.items()))
        number = next(iter(playground.chosen.values()), 0)
        self.number = _field(ipywidgets.IntText, "Feature number", number)
        tip = "in mean residual norms; negative: taken away"
        self.strength = _field(ipywidgets.FloatText, "Strength", 0.5, step=0.25, tooltip=tip)
        self.where = _field(choice, "Where", "thinking", options=generate.STEERED)
        self.model = _field(choice, "Model", models[-1], options=models)
        tip = "of the random numbers that both thoughts use"
        self.seed = _field(ipywidgets.IntText, "Seed", playground.seed, tooltip=tip)
        tip = "the unsteered and the steered text"
        self.generate = ipywidgets.Button(description="Generate", button_style="primary", tooltip=tip)
        self.stop = ipywidgets.Button(description="Stop", tooltip="stop generating")
        self.status, self.output = ipywidgets.HTML(), ipywidgets.HTML(layout=wide)
        self._say(
            "Choose, then press Generate. Strength is in mean residual norms; negative takes the feature"
            " away."
        )

        def follows(field, value: Callable) -> Callable:
            return lambda change: setattr(field, "value", value(change["new"]))

        self.example.observe(follows(self.prompt, lambda text: text or self.prompt.value), "value")
        self.prompt.observe(follows(self.example, lambda text: text if text in texts else ""), "value")
        self.number.observe(follows(self.feature, lambda _: _BY_NUMBER), "value")
        self.generate.on_click(lambda _: self._begin())
        self.stop.on_click(lambda _: setattr(self, "_stopped", True))
        rows = [(self.feature, self.number, self.strength), (self.where, self.model, self.seed)]
        rows.append((self.generate, self.stop))
        boxes = [ipywidgets.HBox(row, layout=ipywidgets.Layout(flex_flow="row wrap")) for row in rows]
        super().__init__([self.example, self.prompt, *boxes, self.status, self.output])

    def _say(self, text: str, failed: bool = False) -> None:
        colour = COLOURS["distilled" if failed else "base"]
        self.status.value = _MESSAGE.format(colour=colour, text=html.escape(text))

    def _begin(self) -> None:
        self._turn, self._stopped = self._turn + 1, False
        if self._loop is None or self._loop.is_closed():
            asyncio.run(self._run(self._turn))
        else:
            self._say("Waiting for the kernel ...")  # until the cell that is running has ended
            self._loop.call_soon_threadsafe(self._schedule, self._turn)

    def _schedule(self, turn: int) -> None:
        self._task = self._loop.create_task(self._run(turn))  # kept, or it might be collected while it runs

    async def _run(self, turn: int) -> None:
        """One press of the button, silent once there is a later one. Whatever goes wrong is said, and nothing
        is raised into the kernel."""
        start, first, last, failed = time.monotonic(), 0.0, None, True
        feature = self.number.value if self.feature.value == _BY_NUMBER else self.feature.value
        fields = (self.strength, self.where, self.model, self.seed)
        try:
            growing = self.playground.stream(self.prompt.value, feature, *(field.value for field in fields))
            self._say("Generating ...")
            self.output.value = ""
            while turn == self._turn and not self._stopped and (new := next(growing, None)) is not None:
                first, last = first or time.monotonic() - start, new
                self.output.value = last.html
                await asyncio.sleep(0.01)  # the kernel hears Stop
            tokens = sum(map(len, last.transcripts.values())) if last else 0
            message = "Done" if last and all(last.ended.values()) else "Stopped"
            took = time.monotonic() - start
            message += f": {tokens} tokens in {took:.1f} s, the first after {first:.2f} s."
            failed = False
        except UserError as error:
            message = str(error)
        except Exception as error:
            message = f"{type(error).__name__}: {error}"
        if turn == self._turn:
            self._say(message, failed)


def _field(kind: type, description: str, value, **options) -> ipywidgets.DOMWidget:
    return kind(description=description, value=value, style={"description_width": "8em"}, **options)
