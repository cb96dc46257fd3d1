r"""Labels for real language: a text is cut into sentences, and a lexicon says which category each belongs to.

In real traces each sentence is tagged by how it opens, or by what it says::

    So 9 * 4 is 36.   Hmm, wait, that's not right.   Let me try 11 instead.   But 7 is not 16.   I have 3.
    deduction         reflection                     alternative              contrast           other

**Categories.** *reflection*: the writer looks back at their reasoning, doubts, checks or mends it (redundant
"verification" is part of it here). *deduction*: something is concluded from what was said. *alternative*:
another way, candidate or possibility is taken up. *contrast*: something is set against what was said.
Everything else is ``other``; in general text every sentence is ``general``, whatever its words.

**Precedence.** The first that holds:

1. reflection, anywhere in the sentence: "But wait, ..." and "So x is 3, but that can't be right."
2. by the opening: alternative, then contrast, then deduction ("But maybe ..." is an alternative)
3. by a phrase inside: alternative, then contrast, then deduction ("x is 3, but y is not, ..." is a contrast)

The opening is what follows bullets, numbers, quotation marks and fillers ("okay", "now", "and", "well", ...).

**Sentences.** Cut at every line break; after ``. ! ? …`` (closing brackets and quotation marks included)
before white space; around think tags and special tokens, which are units of their own. Not cut: after
abbreviations ("e.g."), after the number of a list item ("1. First"), after "..." before a small letter, after
a factorial ("5! is 120"), inside ``\( \)``, ``\[ \]``, ``$$ $$`` and ``\begin \end``. A displayed formula
belongs to the unfinished sentence before it, and a line without letters and digits ("---") to whatever is
before it. Where the text has a thought between think tags, what stands outside is ``other``.

How far the tagger can be believed is measured in ``lib.text.lexicon_agreement``. Source: Baek & Tegmark 2025
(arXiv 2503.03730) for the categories; the lexicon is ours."""

import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..labels import KINDS, LABEL_ARRAYS, LABELS
from ..settings import check
from .tables import table

OTHER, GENERAL = "other", "general"
VERSION: int = table("lexicon")["version"]


def _compiled(expressions: str) -> re.Pattern:
    for name, fragment in table("lexicon")["fragments"].items():
        expressions = expressions.replace(name, fragment)
    return re.compile("|".join(f"(?:{line})" for line in expressions.splitlines()), re.IGNORECASE)


# (label, whether only the opening is looked at, expression), in the order of precedence
_RULES = tuple(
    (rule["label"], rule["place"] == "opening", _compiled(rule["expressions"]))
    for rule in table("lexicon")["rules"]
)
_STRAIGHT = str.maketrans("’‘“”", "''\"\"")
# what comes before a sentence's opening: marks, the number of an item, fillers
_LEAD = re.compile(
    r"(?:[\s>*_#•·~\"'(\[`-]+|\(?(?:\d{1,3}|[a-z]|[ivx]{1,4})[.)]\s+|step \d+[:.]\s*"
    r"|(?:okay|ok|alright|all right|right|well|oh|ah|yeah|yep|yes|and|now|um|uh|huh|sure|great|good|also|then"
    r" again)\b"
    r"[,.!:… ]*(?=\s|\w))*",
    re.IGNORECASE,
)

_TAG = re.compile(r"</?think(?:ing)?>|<\|[^|<>\s]{1,40}\|>")
_PROTECTED = re.compile(
    r"\\\[.{0,2000}?\\\]|\\\(.{0,500}?\\\)|\$\$.{1,2000}?\$\$|\\begin\{([a-z]+\*?)\}.{0,2000}?\\end\{\1\}",
    re.DOTALL,
)
_DISPLAY = re.compile(r"\\\[|\$\$|\\begin\{")
_STOP = re.compile(r"[.!?…]+[\"'”’)\]*_]*(?=\s|$)|[。！？]")
_ABBREVIATION = re.compile(
    r"(?:\b(?:e\.g|i\.e|cf|vs|approx|resp|et al|mr|mrs|ms|dr|prof)|\b[a-z]\.[a-z])\.$", re.IGNORECASE
)
_BEFORE_NUMBER = re.compile(r"\b(?:eqs?|figs?|nos?|secs?|ch|pp?|vol|thm)\.$", re.IGNORECASE)
_ITEM = re.compile(r"[\s>*_#•-]*\(?(?:\d{1,3}|[a-zA-Z]|[ivx]{1,4})\.$")


@dataclass(frozen=True)
class Span:
    """A sentence: ``text[start:end]``, its label, and the words that decided ("" for other)."""

    start: int
    end: int
    label: str
    cue: str = ""


def tag(sentence: str) -> tuple[str, str]:
    """(label, the words that decided) of one sentence; ("other", "") where no rule of the lexicon holds."""
    words = sentence.translate(_STRAIGHT)
    begin = _LEAD.match(words).end()
    for label, opening, expression in _RULES:
        match = expression.match(words, begin) if opening else expression.search(words, max(begin - 1, 0))
        if match:
            return label, match.group().strip()
    return OTHER, ""


def sentences(text: str) -> list[Span]:
    """The sentences of a text, in order and without overlap; rules and precedence as above."""
    pieces: list[list[int]] = []
    bounds = _bounds(text)
    for first, last in zip(bounds, bounds[1:]):
        piece = text[first:last]
        start, end = first + len(piece) - len(piece.lstrip()), first + len(piece.rstrip())
        if start >= end:
            continue
        before = text[slice(*pieces[-1])] if pieces else ""
        unfinished = _DISPLAY.match(text, start) and not before.endswith((".", "!", "?"))
        wordless = not any(c.isalnum() for c in text[start:end])
        if before and not _TAG.fullmatch(before) and (unfinished or wordless):
            pieces[-1][1] = end
        else:
            pieces.append([start, end])
    first, last = thought(text)
    spans = []
    for start, end in pieces:
        inside = first <= start < last and not _TAG.match(text, start)
        spans.append(Span(start, end, *(tag(text[start:end]) if inside else (OTHER, ""))))
    return spans


def label_arrays(text: str, offsets: Sequence[tuple[int, int]], kind: str) -> dict[str, np.ndarray]:
    """The arrays of ``LABEL_ARRAYS``, int8 [tokens], for a tokenised text; their meaning as in
    ``corpus.Document``, but ``error`` is 0: nobody knows.

    ``offsets`` holds each token's (start, end) in ``text``, as fast tokenizers return them. A token belongs
    to the sentence that holds its first character which is no white space; a token of white space alone to
    the sentence before it, whose end is then the position that predicts the next sentence. ``label`` is -1
    before the first sentence and for tokens that stand for no text, (0, 0). ``kind`` "trace": one of the four
    categories or "other"; "general": "general" throughout. ValueError if the offsets do not go forward, or
    leave the text."""
    check("kind", kind, str, choices=("general", "trace"))
    spans = sentences(text)
    labels = [LABELS.index(GENERAL if kind == "general" else span.label) for span in spans]
    return arrays_of(_owners(text, offsets, [span.start for span in spans]), labels, kind)


def arrays_of(
    owner: np.ndarray, labels: Sequence[int], kind: str, errors: Sequence[bool] | None = None, mode: int = -1
) -> dict[str, np.ndarray]:
    """The arrays of ``LABEL_ARRAYS``, int8 [tokens], from the number of each token's sentence (``owner``
    [tokens], not falling, -1 for none), each sentence's label and whether it is wrong, and the
    text's kind and mode."""
    arrays = {name: np.zeros(len(owner), np.int8) for name in LABEL_ARRAYS}
    arrays["kind"][:], arrays["mode"][:] = KINDS.index(kind), mode
    arrays["label"][:] = arrays["next_label"][:] = -1
    rows = np.flatnonzero(owner >= 0)
    if len(rows):
        owner, index = owner[rows], np.array(labels, np.int8)
        change = np.flatnonzero(owner[1:] != owner[:-1])
        first, last = rows[[0, *(change + 1)]], rows[[*change, len(rows) - 1]]
        arrays["label"][rows] = index[owner]
        arrays["starts"][first] = arrays["ends"][last] = 1
        arrays["next_label"][last[:-1]] = index[owner[change + 1]]  # of the next sentence that has a token
        if errors is not None:
            arrays["error"][rows] = np.array(errors, np.int8)[owner]
    return arrays


def _owners(text: str, offsets: Sequence[tuple[int, int]], starts: list[int]) -> np.ndarray:
    """Number of the sentence of each token, -1 for none, [tokens]."""
    owner, position = np.full(len(offsets), -1), 0
    for i, (first, last) in enumerate(offsets):
        if first == last == 0:
            continue
        if not position <= last <= len(text) or first > last:
            raise ValueError(
                f"offset {i} is ({first}, {last}) after {position} in a text of {len(text)} characters: "
                "were they made from this text?"
            )
        position = first
        piece = text[first:last]
        blank = len(piece) - len(piece.lstrip()) if piece.strip() else 0
        owner[i] = bisect_right(starts, first + blank) - 1
    return owner


def thought(text: str) -> tuple[int, int]:
    """Where the thought lies: between think tags, up to the end if it is not closed; else the whole text."""
    first, last = 0, len(text)
    if opened := re.search(r"<think(?:ing)?>", text):
        first = opened.end()
    if closed := re.compile(r"</think(?:ing)?>").search(text, first):
        last = closed.start()
    return first, last


def _bounds(text: str) -> list[int]:
    """Where the text may be cut, sorted, with 0 and its length."""
    protected = [match.span() for match in _PROTECTED.finditer(text)]
    begins = [first for first, _ in protected]

    def free(position: int) -> bool:
        i = bisect_right(begins, position) - 1
        return i < 0 or position >= protected[i][1]

    cuts = {0, len(text)}
    cuts.update(match.end() for match in re.finditer(r"[\n\r]+", text) if free(match.start()))
    for match in _TAG.finditer(text):
        cuts.update(match.span())
    cuts.update(m.end() for m in _STOP.finditer(text) if free(m.start()) and _is_stop(text, m))
    return sorted(cuts)


def _is_stop(text: str, match: re.Match) -> bool:
    """Does the punctuation end a sentence?"""
    stop = match.group()
    after = text[match.end() : match.end() + 20].lstrip(" \t")[:1]
    # nothing below looks further back, and a line may have millions of characters
    near = max(0, match.start() - 200)
    line = text[max(near, text.rfind("\n", near, match.start()) + 1) : match.start() + 1]
    if stop == ".":
        before_number = after.isdigit() and _BEFORE_NUMBER.search(line[-12:])
        if _ITEM.fullmatch(line) or _ABBREVIATION.search(line[-12:]) or before_number:
            return False
        return not (after.islower() and line.endswith("etc."))
    if after.islower() and (len(stop) > 1 or stop == "…"):  # "Hmm... maybe", "(right?) and"
        return stop[-1] in "!?"
    if stop[0] == "!" and re.search(r"(?:\d|\b[a-zA-Z]|\))!$", line):  # a factorial
        return not (after.islower() or after in "=+-*/×÷·^<>≤≥)")
    return True
