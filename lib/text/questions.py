"""Questions for a real language model: word problems with a computed answer, and open ones.

The questions are templates (``data/text/questions.yaml``) with names, things and numbers drawn at random, in
the manner of grade-school problems; every answer is a whole number. They are written for this project, so
that what a model says about them may be kept and shared. The split of a question is that of its template:
what is reported is asked in words that nothing was chosen on."""

import random
import re
from dataclasses import dataclass

from .tables import table

TEMPLATES: list[dict] = table("questions")["word_problems"]


@dataclass(frozen=True)
class Question:
    """A question as a user would ask it; ``answer`` is the number it has, None for an open one; ``template``
    is the number of its wording in ``TEMPLATES``, -1 for an open one."""

    text: str
    answer: int | None
    template: int


def fill(template: dict, rng: random.Random) -> tuple[str, int | None]:
    """The text of a template with everything drawn, and its answer (None if it has none)."""
    values: dict = {}

    def value(expression: object):
        """A number, or an expression of the data file in the values so far."""
        if not isinstance(expression, str):
            return expression
        return eval(expression, {"__builtins__": {}, "min": min}, values)

    for names, source in template["draw"].items():
        names = names.split()
        if isinstance(source, list):
            drawn = [rng.randint(*map(value, source))]
        elif isinstance(source, dict):
            drawn = [rng.choice(source["one_of"])]
        else:
            words = table("questions")["lists"][source]
            drawn = rng.sample(words, len(names)) if len(names) > 1 else [rng.choice(words)]
        values |= zip(names, drawn)
    for name, expression in template.get("where", {}).items():
        values[name] = value(expression)
    return template["text"].format(**values), value(template.get("answer"))


def ask(split: str, n: int, open_share: float = 0.25, seed: int = 0) -> list[Question]:
    """``n`` distinct questions of a split (train, choose, report), the same for the same seed: open ones in
    the given share, word problems otherwise."""
    rng, questions = random.Random(f"{seed}/questions/{split}"), {}
    numbers = [i for i, template in enumerate(TEMPLATES) if template["split"] == split]
    while len(questions) < n:
        if rng.random() < open_share:
            question = Question(*fill(rng.choice(table("questions")["open_questions"]), rng), -1)
        else:
            number = rng.choice(numbers)
            question = Question(*fill(TEMPLATES[number], rng), number)
        questions.setdefault(question.text, question)
    return list(questions.values())


def final_number(text: str) -> float | None:
    """The number an answer ends with: the last \\boxed{...} if there is one, else the last number."""
    boxed = re.findall(r"\\boxed\{([^{}]*)\}", text)
    numbers = re.findall(r"-?\d+(?:\.\d+)?", (boxed[-1] if boxed else text).replace(",", ""))
    return float(numbers[-1]) if numbers else None
