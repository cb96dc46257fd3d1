"""General text for the embedded pair: what the base model knows before anything is distilled into it.

Five kinds of document, mixed by ``CURRICULUM``, then ``MID_MIX``, then ``LATE_MIX``:

- *prose*: short sentences from a grammar. They carry the word relations of notebook 05 and use every marker
  word of the traces in another sense ("wait for the bus", "it is late but we walked"), about as often as the
  traces do. So "wait" is no new word to the distilled model: what is new is what it does with it.
- *arithmetic*: single steps on the clock of 19 hours; the base is never shown a chain of them.
- *copying*: lists repeated and looked up, since a trace copies from its prompt all the time.
- *direct*: puzzles and easy questions with the answer alone.
- *comparing*: is this number the target, is this equation true? One word of answer, and no consequence."""

import json
import random
from functools import cache, partial

from ..settings import ROOT
from .puzzles import (
    FRAME,
    MODULUS,
    OPERATIONS,
    PARAPHRASES,
    Sentence,
    apply,
    direct,
    sample_puzzle,
    sample_question,
    words_of,
)
from .tables import table

RELATIONS_DIR = ROOT / "data" / "relations"
EMBEDDED_RELATIONS = ("antonym", "capital", "comparative", "language", "past", "plural", "successor")
BASE_MIX = {"prose": 0.30, "arithmetic": 0.20, "copying": 0.20, "direct": 0.30}  # shares of documents
# The base learns its two skills first: mixed with everything else, it had learnt neither after 4M tokens;
# alone, arithmetic takes 0.4M and copying 0.5M.
CURRICULUM = (  # (until this share of the base's tokens, mix)
    (0.12, {"arithmetic": 1.0}),
    (0.32, {"arithmetic": 0.4, "copying": 0.6}),
    (1.00, BASE_MIX),
)
# Mid-training adds comparing, until the base can tell a right equation and a target; late training moves the
# verdict past the full stop. Without the first, 4M tokens of traces taught every step, but no use for errors
# and misses; without the second, 3M tokens taught reflection, and still not contrast.
MID_MIX = {"prose": 0.08, "arithmetic": 0.08, "copying": 0.07, "direct": 0.07, "comparing": 0.70}
LATE_MIX = {"prose": 0.15, "arithmetic": 0.10, "copying": 0.10, "direct": 0.15, "judging": 0.50}
MARKER_SHARE = 0.5  # of prose sentences: those that use a trace's marker word in another sense

_PROSE = table("prose")
NAMES, PLACES, TIMES, THINGS = (_PROSE[name] for name in ("names", "places", "times", "things"))
PLAIN, DECOYS, DECOY_WEIGHTS = (_PROSE[name] for name in ("relations", "decoys", "decoy_weights"))


@cache
def relation_pairs(name: str) -> tuple[tuple[str, str], ...]:
    """The (input, output) word pairs of an embedded relation, in the order of its file."""
    path = RELATIONS_DIR / f"{name}.json"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in RELATIONS_DIR.glob("*.json")))
        raise FileNotFoundError(f"no relation {name!r}: data/relations/ has {known}")
    return tuple((row["input"], row["output"]) for row in json.loads(path.read_text()))


def _fill(rng: random.Random, template: str, relation: str | None) -> tuple[str, ...]:
    n, m = rng.sample(NAMES, 2)
    o, q = rng.sample(THINGS, 2)
    d, e = rng.sample(TIMES, 2)
    x, y = rng.choice(relation_pairs(relation)) if relation else ("", "")
    return words_of(template, n=n, m=m, o=o, q=q, d=d, e=e, p=rng.choice(PLACES), x=x, y=y)


def prose(rng: random.Random) -> list[Sentence]:
    """A document of 10 to 14 sentences."""
    sentences = []
    for _ in range(rng.randint(10, 14)):
        if rng.random() < MARKER_SHARE:
            kind = rng.choices(*zip(*DECOY_WEIGHTS.items()))[0]
            relation, template = None, rng.choice(DECOYS[kind])
        else:
            relation, template = rng.choice(PLAIN)
        sentences.append(Sentence(_fill(rng, template, relation), "general"))
    return sentences


def arithmetic(rng: random.Random) -> list[Sentence]:
    """Unrelated single steps, as statements and as questions."""
    sentences, templates = [], ["{a} {op} = {v} ."] * 2 + ["{a} {op} gives {v} .", "what is {a} {op} ? {v} ."]
    for _ in range(rng.randint(10, 14)):
        a, op = rng.randrange(MODULUS), rng.choice(OPERATIONS)
        template = rng.choice(templates)
        words = words_of(template, a=a, op=op, v=apply(op, a))
        sentences.append(Sentence(words, "general", given=len(words) - 2))  # what is learnt: the result
    return sentences


def copying(rng: random.Random) -> list[Sentence]:
    """A list, then the list again, then single successors looked up in it."""
    pool = [*OPERATIONS, *map(str, range(MODULUS)), *rng.sample(NAMES + THINGS + PLACES, 6)]
    items = rng.sample(pool, rng.randint(5, 12))
    sentences = [
        Sentence(("list", ":", *items, "."), "general", given=len(items) + 2),
        Sentence(("again", ":", *items, "."), "general"),
    ]
    for _ in range(rng.randint(4, 8)):
        i = rng.randrange(len(items) - 1)
        sentences.append(Sentence(("after", items[i], "comes", items[i + 1], "."), "general", given=3))
    return sentences


def comparing(rng: random.Random, stop: bool = False) -> list[Sentence]:
    """Verdicts. Is the equation true: "9 * 4 = 13 false ."; or, after "reach 16 .", is this the target: "7
    false ." With ``stop`` the verdict is a sentence of its own, "9 * 4 = 13 . false ."
    """
    sentences, target = [], rng.randrange(MODULUS)
    reaching = rng.random() < 0.4
    if reaching:
        sentences.append(Sentence(("reach", str(target), "."), "general", given=3))
    for _ in range(rng.randint(10, 14)):
        fine, operation, a = rng.random() < 0.5, rng.choice(OPERATIONS), rng.randrange(MODULUS)
        right = target if reaching else apply(operation, a)
        shown = right if fine else (right + rng.randint(1, MODULUS - 1)) % MODULUS
        if reaching:  # a number, bare or as the result of a right equation
            a = next(n for n in range(MODULUS) if apply(operation, n) == shown)
        words = (str(a), operation, "=", str(shown))
        if reaching and rng.random() >= 0.5:
            words = words[-1:]
        words = (*words, ".") if stop else words
        sentences.append(Sentence((*words, "true" if fine else "false", "."), "general", given=len(words)))
    return sentences


def direct_answers(rng: random.Random, split: str = "train", easy_share: float = 0.15) -> list[Sentence]:
    """A puzzle (or, for ``easy_share`` of documents, an easy question) and its answer, no thinking."""
    task = sample_question(rng) if rng.random() < easy_share else sample_puzzle(rng, split)
    return [*task.prompt(), *direct(task)]


def base_document(rng: random.Random, mix: dict[str, float] = BASE_MIX) -> list[Sentence]:
    """One document of the base model's training text; direct puzzles come from the training split."""
    kind = rng.choices(*zip(*mix.items()))[0]
    makers = {"prose": prose, "arithmetic": arithmetic, "copying": copying, "direct": direct_answers}
    makers |= {"comparing": comparing, "judging": partial(comparing, stop=True)}
    return makers[kind](rng)


@cache
def vocabulary() -> tuple[str, ...]:
    """Every word that any generator can write, in a fixed order, after the four special tokens."""
    words = {*map(str, range(MODULUS)), *OPERATIONS, *NAMES, *PLACES, *TIMES, *THINGS, "carries"}
    words |= {"puzzle", ":", ";", "from", "reach", ".", "what", "is", "?", "list", "again", "after", "comes"}
    templates = [t for wordings in (*PARAPHRASES.values(), *DECOYS.values()) for t in wordings]
    templates += [*FRAME.values(), *(template for _, template in PLAIN)]
    words |= {word for template in templates for word in template.split() if not word.startswith("{")}
    words |= {word for name in EMBEDDED_RELATIONS for pair in relation_pairs(name) for word in pair}
    return ("<pad>", "<bos>", "<eos>", "<unk>", *sorted(words))
