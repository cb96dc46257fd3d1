"""A playground for steering: ask one thing, add one feature, and read the two thoughts side by side.

    playground = Playground(models, store, crosscoder, chosen, medium)
    playground.compare("what is 5 - 1 ?", "reflection", 0.5)     # two transcripts, a table, HTML
    playground.widget()                                          # the same by hand, while it is generated

It steers by ``lib.steering.generate``, in the same unit (mean residual norms) and with the same random
numbers as the experiments of notebook 04, so it shows what they generated. The unsteered and the steered
thought are two rows of one batch, which use the same random numbers. **One thought is an anecdote**: it shows
what a vector does, not how often. "random" is a random direction of the same norm: what any vector of this
size does.

*Where.* "thinking": from the prompt's last position until the thought is closed, as in all experiments.
"prompt": the positions before it. "all": every position, the answer's too.

*The widget* needs no ``interact``, no ``Output`` and no thread. Generation is a task of the kernel's event
loop that yields every few tokens, so that the text grows and Stop works; a headless run, which presses no
button, waits for nothing. A user's mistake is shown as one sentence in the widget.
"""

from __future__ import annotations

import asyncio
import html
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import ipywidgets
import numpy as np
import pandas as pd
import torch
from nnsight import TransformersModel

from ..activations.store import Store
from ..crosscoder.model import CrossCoder
from ..figures import COLOURS, labelled_lines
from ..labels import CATEGORIES, REDUNDANT
from ..settings import UserError, check
from ..text import lexicon, questions
from ..text.puzzles import (
    NUMBERS,
    OPERATIONS,
    Puzzle,
    Question,
    Sentence,
    apply,
    equation_of,
    label_of,
    sentences_of,
)
from . import generate
from . import steer as steering
from .tasks import PUZZLES, Medium

RANDOM = "random"
SIDES = ("unsteered", "steered")
Feature = int | str | steering.Direction
STRONGEST = 100.0  # mean residual norms


# --- what is asked ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FreeText:
    """Words that are no puzzle, put to a puzzle model as they are, with thinking opened. Nobody knows the
    answer.
    """

    text: str
    answer: None = None
    value: None = None
    operation: str = ""

    def prompt(self) -> list[Sentence]:
        words = tuple(self.text.split())
        return [Sentence(words, "other", given=len(words))]


def puzzle_of(words: Sequence[str]) -> Puzzle | Question | FreeText:
    """The puzzle or the easy question that these words put; free text where they are neither, or where not
    exactly one candidate is right.

    >>> puzzle_of(["what", "is", "5", "- 1", "?"])
    Question(value=5, operation='- 1')
    """
    words = tuple(words[:-2] if tuple(words[-2:]) == ("think", ":") else words)
    if len(words) == 5 and words[2] in NUMBERS and words[3] in OPERATIONS:
        asked = [Question(int(words[2]), words[3])]
    elif (
        len(words) > 9
        and set(words[2:-8]) <= set(OPERATIONS)
        and set(words[-6:-3]) | {words[-2]} <= set(NUMBERS)
    ):
        candidates = tuple(int(w) for w in words[-6:-3])
        asked = [Puzzle(words[2:-8], candidates, c) for c in dict.fromkeys(candidates)]
    else:
        asked = []
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
    label.
    """

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
        underlined; then the table.
        """
        columns = []
        for side, lines in self.lines.items():
            row = self.table.loc[side]
            right = {True: ", right", False: ", wrong"}.get(row["right"], "")
            answer = "no answer" if row["answer"] is None else f"answer {row['answer']:g}{right}"
            title = f"{side}: {row['tokens']} tokens, {row['end']}, {answer}"
            columns.append(
                f'<section aria-label="{side} text" style="flex:1 1 24em;min-width:0;overflow-x:auto">'
                f'<h4 style="margin:4px 0">{html.escape(title)}</h4>{labelled_lines(lines).data}</section>'
            )
        # no theme styles a table inside a widget
        left = 'style="text-align:left;padding:2px 14px 2px 0;line-height:1.4"'
        table = (
            self.table.map(_shown)
            .to_html(border=0)
            .replace("<th>", f"<th {left}>")
            .replace("<td>", f"<td {left}>")
        )
        return (
            f'<p style="margin:4px 0">{html.escape(self.how)}<br><code>{html.escape(self.prompt)}</code></p>'
            '<div style="display:flex;flex-wrap:wrap;gap:12px;align-items:flex-start">'
            f"{''.join(columns)}</div>"
            f'<div style="overflow-x:auto">{table}</div>'
        )

    def _repr_html_(self) -> str:
        return self.html


def _shown(value) -> str:
    if value is None or isinstance(value, bool):
        return {None: "–", True: "yes", False: "no"}[value]
    return f"{value:g}" if isinstance(value, float) else str(value)


def lines_of(task, transcript: Sequence[str], medium: Medium) -> list[tuple[str, Sequence[str], bool]]:
    """(label, words, wrong) of every sentence, for ``figures.labelled_lines``. In chat the lexicon labels;
    nothing is marked wrong.
    """
    if medium is not PUZZLES:
        text = medium.joiner.join(transcript)
        return [(span.label, [text[span.start : span.end]], False) for span in lexicon.sentences(text)]
    lines = []
    for words in sentences_of(list(transcript)):
        equation = equation_of(words)
        wrong = equation is not None and apply(equation[1], equation[0]) != equation[2]
        if words[:2] == ("answer", ":") and len(words) > 2 and task.answer is not None:
            wrong = words[2] != str(task.answer)
        lines.append((label_of(words), words, wrong))
    return lines


# --- the playground -----------------------------------------------------------------------------------------


class Playground:
    """Models that are open, a crosscoder, and the features that were chosen for the categories.

    ``models`` by name, as ``ablation.open_models`` gives them, ``chosen`` {category: feature}; layers, widths
    and mean residual norms are the store's. Thoughts are sampled at ``temperature`` and end after
    ``max_new_tokens``.
    """

    def __init__(
        self,
        models: Mapping[str, TransformersModel],
        store: Store,
        crosscoder: CrossCoder,
        chosen: Mapping[str, int],
        medium: Medium = PUZZLES,
        max_new_tokens: int = 250,
        temperature: float = 1.0,
        seed: int = 0,
        remote: bool | str = False,
    ):
        self.models, self.store, self.crosscoder, self.chosen, self.medium = (
            dict(models),
            store,
            crosscoder,
            dict(chosen),
            medium,
        )
        self.max_new_tokens = check("max_new_tokens", max_new_tokens, int, low=1)
        self.temperature = float(check("temperature", temperature, float, low=0))
        self.seed, self.remote = seed, remote
        asked = [*medium.easy(1, seed), *medium.tasks("report", 5, seed)]
        self.examples = {self._text(task): task for task in asked}

    def _text(self, task) -> str:
        """A task as a user would type it."""
        return " ".join(task.prompt()[0].words) if self.medium is PUZZLES else task.text

    def task(self, prompt, model: str = "distilled"):
        """What ``prompt`` asks: a task is itself, a text is read. UserError if it is empty, too long, or not
        in the model's words.
        """
        if isinstance(prompt, str):
            if not prompt.strip():
                raise UserError("the prompt is empty: give a puzzle or a question")
            tokenizer, text = self.models[model].tokenizer, prompt.strip()
            if marker := next((token for token in tokenizer.all_special_tokens if token in text), None):
                raise UserError(
                    f"the prompt contains {marker!r}, which is a marker of this model and no text: leave"
                    " it out"
                )
            if self.medium is PUZZLES:
                found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
                unknown = [
                    text[a:b]
                    for i, (a, b) in zip(found["input_ids"], found["offset_mapping"])
                    if i == tokenizer.unk_token_id
                ]
                if unknown:
                    words = ", ".join(map(repr, list(dict.fromkeys(unknown))[:5]))
                    raise UserError(
                        f"the prompt has words that this model does not know ({words}): it knows those of its"
                        f" puzzles, such as {next(iter(self.examples))!r}"
                    )
                prompt = puzzle_of(tokenizer.convert_ids_to_tokens(found["input_ids"]))
            else:
                prompt = self.examples.get(text, questions.Question(text, None, -1))
        asked = self.models[model].tokenizer(
            self.medium.prompt(prompt), add_special_tokens=self.medium.special_tokens
        )
        length, context = (
            len(asked["input_ids"]),
            getattr(self.models[model].config, "max_position_embeddings", None) or np.inf,
        )
        if length + self.max_new_tokens > context:
            raise UserError(
                f"the prompt has {length} tokens and the thought may take {self.max_new_tokens}, and this"
                f" model's context is {context}: shorten the prompt"
            )
        return prompt

    def direction(self, feature: Feature, model: str = "distilled") -> steering.Direction:
        """A feature by number, a category's chosen feature by its name, or "random": in ``model``, of its
        mean residual norm.
        """
        check("model", model, str, choices=tuple(self.models))
        if isinstance(feature, steering.Direction):
            return feature
        norm = self.store.mean_norms[model]
        if feature == RANDOM:
            return steering.random_directions(1, self.store.widths[model], norm, self.seed)[0]
        label = feature if isinstance(feature, str) else "feature"
        number = self.chosen.get(feature) if isinstance(feature, str) else feature
        if isinstance(feature, str) and feature.strip().isdecimal():
            label, number = "feature", int(feature)
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
        """``compare`` while it grows: the last one that comes is the whole. To stop, stop asking."""
        direction = self.direction(feature, model)
        strength = float(check("strength", strength, float, low=-STRONGEST, high=STRONGEST))
        check("where", where, str, choices=generate.STEERED)
        seed = check("seed", self.seed if seed is None else seed, int)
        task = self.task(prompt, model)
        vector = strength * direction.vector
        growing = generate.steered_stream(
            self.models[model],
            self.store.layers[model],
            [task, task],
            torch.stack([torch.zeros_like(vector), vector]),
            self.max_new_tokens,
            self.temperature,
            seed,
            self.medium.end_of_thinking,
            self.remote,
            self.medium,
            where,
        )
        how = f"{model} model, {direction.name} at strength {strength:g}, where: {where}, seed {seed}"
        for said, ended in growing:
            lines = {side: lines_of(task, words, self.medium) for side, words in zip(SIDES, said)}
            yield Comparison(
                task,
                self.medium.prompt(task),
                how,
                dict(zip(SIDES, said)),
                dict(zip(SIDES, ended)),
                self._table(task, said, ended),
                lines,
            )

    def compare(
        self,
        prompt,
        feature: Feature,
        strength: float,
        where: str = "thinking",
        model: str = "distilled",
        seed: int | None = None,
    ) -> Comparison:
        """The unsteered and the steered thought about ``prompt`` (a task, or a text).

        ``feature``: a number, a category with a chosen feature, "random", or a direction; ``strength`` in
        mean residual norms, negative to take away; ``where``: "prompt", "thinking" or "all"; ``seed``: of the
        random numbers, the playground's by default. UserError for what does not exist.
        """
        *_, last = self.stream(prompt, feature, strength, where, model, seed)
        return last

    def _table(self, task, said: Sequence[Sequence[str]], ended: Sequence[bool]) -> pd.DataFrame:
        read = self.medium.outcomes([task] * len(said), said, self.max_new_tokens)
        known, rows = task.answer is not None, []
        # in chat a check is a reflection
        labels = (*CATEGORIES, REDUNDANT) if self.medium is PUZZLES else CATEGORIES
        for (_, row), over in zip(read.iterrows(), ended):
            open_end = (
                "not ended" if not over else "limit reached" if row["runaway"] else "thought not closed"
            )
            answer = None if pd.isna(row["answer"]) else row["answer"]
            rows.append(
                {
                    "tokens": int(row["length"]),
                    "end": "thought closed" if row["closed"] else open_end,
                    "answer": answer,
                    "right": bool(row["correct"]) if known and over else None,
                    "every step right": (
                        bool(row["chain_correct"])
                        if known and over and pd.notna(row["chain_correct"])
                        else None
                    ),
                    **{label: int(row[f"n_{label}"]) for label in labels},
                }
            )
        return pd.DataFrame(rows, index=list(SIDES), dtype=object)  # None stays None

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
    """Fields, two buttons and the two growing texts. ``Generate`` while something is generated begins
    anew."""

    def __init__(self, playground: Playground):
        self.playground, self._turn, self._stopped, self._task = playground, 0, False, None
        try:
            # the kernel's, on its main thread; buttons may be heard on another one
            self._loop = asyncio.get_running_loop()
        except RuntimeError:
            self._loop = None
        texts, wide = list(playground.examples), ipywidgets.Layout(width="98%")
        pushes = {f"{label} (feature {feature})": label for label, feature in playground.chosen.items()}
        pushes |= {"a random direction": RANDOM, "a feature by its number": _BY_NUMBER}
        shown = [("(your own text)", ""), *((text, text) for text in texts)]
        self.example = _field(ipywidgets.Dropdown, "Example", texts[1], options=shown, layout=wide)
        self.prompt = _field(ipywidgets.Textarea, "Prompt", texts[1], rows=3, layout=wide)
        self.feature = _field(
            ipywidgets.Dropdown, "Add", next(iter(pushes.values())), options=list(pushes.items())
        )
        self.number = _field(ipywidgets.IntText, "Feature number", next(iter(playground.chosen.values()), 0))
        self.strength = _field(
            ipywidgets.FloatText,
            "Strength",
            0.5,
            step=0.25,
            tooltip="in mean residual norms; negative: taken away",
        )
        self.where = _field(ipywidgets.Dropdown, "Where", "thinking", options=generate.STEERED)
        self.model = _field(
            ipywidgets.Dropdown, "Model", list(playground.models)[-1], options=list(playground.models)
        )
        self.seed = _field(
            ipywidgets.IntText,
            "Seed",
            playground.seed,
            tooltip="of the random numbers that both thoughts use",
        )
        self.generate = ipywidgets.Button(
            description="Generate", button_style="primary", tooltip="the unsteered and the steered text"
        )
        self.stop = ipywidgets.Button(description="Stop", tooltip="stop generating")
        self.status, self.output = ipywidgets.HTML(), ipywidgets.HTML(layout=wide)
        self._say(
            "Choose, then press Generate. Strength is in mean residual norms; negative takes the feature"
            " away."
        )
        self.example.observe(
            lambda change: change["new"] and setattr(self.prompt, "value", change["new"]), "value"
        )
        self.prompt.observe(
            lambda change: setattr(self.example, "value", change["new"] if change["new"] in texts else ""),
            "value",
        )
        self.number.observe(lambda change: setattr(self.feature, "value", _BY_NUMBER), "value")
        self.generate.on_click(lambda _: self._begin())
        self.stop.on_click(lambda _: setattr(self, "_stopped", True))
        rows = [
            [self.feature, self.number, self.strength],
            [self.where, self.model, self.seed],
            [self.generate, self.stop],
        ]
        boxes = [ipywidgets.HBox(row, layout=ipywidgets.Layout(flex_flow="row wrap")) for row in rows]
        super().__init__([self.example, self.prompt, *boxes, self.status, self.output])

    def _say(self, text: str, failed: bool = False) -> None:
        self.status.value = _MESSAGE.format(
            colour=COLOURS["distilled" if failed else "base"], text=html.escape(text)
        )

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
        start, first, last = time.monotonic(), None, None
        feature = self.number.value if self.feature.value == _BY_NUMBER else self.feature.value
        asked = (
            self.prompt.value,
            feature,
            self.strength.value,
            self.where.value,
            self.model.value,
            self.seed.value,
        )
        try:
            growing = self.playground.stream(*asked)
            self._say("Generating ...")
            self.output.value = ""
            while (
                turn == self._turn and not self._stopped and (comparison := next(growing, None)) is not None
            ):
                first, last = first or time.monotonic() - start, comparison
                self.output.value = last.html
                await asyncio.sleep(0.01)  # the kernel hears Stop
            message, failed = (
                (
                    f"{_length(last)} tokens in {time.monotonic() - start:.1f} s, the first after"
                    f" {first or 0:.2f} s."
                ),
                False,
            )
            message = f"{'Done' if last and all(last.ended.values()) else 'Stopped'}: {message}"
        except UserError as error:
            message, failed = str(error), True
        except Exception as error:
            message, failed = f"{type(error).__name__}: {error}", True
        if turn == self._turn:
            self._say(message, failed)


def _field(kind: type, description: str, value, **options) -> ipywidgets.DOMWidget:
    return kind(description=description, value=value, style={"description_width": "8em"}, **options)


def _length(comparison: Comparison | None) -> int:
    return sum(map(len, comparison.transcripts.values())) if comparison else 0
