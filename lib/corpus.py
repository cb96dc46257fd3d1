"""The text that both models read: tokenised once, split by document, labelled token by token.

Half of the tokens are reasoning traces and half are general text (the paper's mixture, by default). For the
embedded pair both are generated, and every token knows what its sentence does::

    ... so   9  * 4   =  13   .   wait  ,   9  * 4   =  17   .   but  17 ...
        deduction, error=1       reflection                     contrast
        starts=1        ends=1   starts=1              ends=1
                  next_label=reflection          next_label=contrast

Labels are written down while the sentences are written, and a word is one token, so they align by construction;
the construction is checked against the tokenizer. Other pairs read text or JSONL files, without labels.
"""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerBase

from .distill import EASY_SHARE
from .pairs import Pair, check_vocabularies
from .prose import BASE_MIX, base_document
from .puzzles import LABELS, Sentence, Teacher, sample_puzzle, sample_question
from .results import UserError, check, fingerprint

KINDS = ("general", "trace")
SPLITS = ("train", "choose", "report")  # to train on; to choose features and strengths on; to report on
LABEL_ARRAYS = ("label", "starts", "ends", "next_label", "error", "kind")
_PUZZLE_SPLIT = {"train": "train", "choose": "validation", "report": "test"}
_GENERAL_MIX = {kind: share for kind, share in BASE_MIX.items() if kind != "direct"}
_MAX_REPEATS = 1000  # generated documents in a row that were there before: the corpus is exhausted


@dataclass(frozen=True)
class Document:
    """One text: token ids (with BOS, if the vocabularies share one), kind ("trace" or "general"), split, labels.

    ``labels`` has an int8 array [len(tokens)] for each name in ``LABEL_ARRAYS``:

    - ``label``: index into ``puzzles.LABELS`` of the token's sentence, -1 if unknown (BOS, text without labels)
    - ``starts``, ``ends``: 1 at the first and the last token of a sentence
    - ``next_label``: at the end of a sentence the label of the next one; -1 elsewhere, and at the last sentence
    - ``error``: 1 in a step whose value is wrong (not in the reflection that mends it)
    - ``kind``: 1 in a trace, 0 in general text
    """

    tokens: list[int]
    kind: str
    split: str
    labels: dict[str, np.ndarray] = field(repr=False)


@dataclass(frozen=True)
class Corpus:
    """Documents, in a fixed order; iterate as often as you like. ``tokens`` does not count BOS."""

    pair: Pair
    tokens: int
    trace_share: float
    seed: int
    splits: tuple[float, float, float]
    max_length: int
    tokenizer: PreTrainedTokenizerBase = field(repr=False)
    excluded: tuple[int, ...] = ()

    @property
    def parameters(self) -> dict:
        """What the documents are made from, as plain data, for manifests."""
        source = self.pair.corpus if self.pair.corpus == "generated" else [list(c) for c in self.pair.corpus]
        return {"source": source, "tokens": self.tokens, "trace_share": self.trace_share, "seed": self.seed,
                "splits": list(self.splits), "max_length": self.max_length, "excluded_ids": list(self.excluded)}

    @property
    def fingerprint(self) -> str:
        """Hash of the parameters, the vocabulary, and the text: whole files, or the first generated documents."""
        if self.pair.corpus == "generated":
            sample = [d.tokens for d, _ in zip(self, range(50))]
        else:
            sample = [Path(path) for path, _ in self.pair.corpus]
        parameters = {k: v for k, v in self.parameters.items() if k != "source"}  # content counts, not where it lies
        return fingerprint(parameters, self.tokenizer.get_vocab(), sample)

    def __iter__(self) -> Iterator[Document]:
        """Documents until the budget is met, traces and general text in turn, so that every stretch has both."""
        makers = {kind: (_generated if self.pair.corpus == "generated" else _from_files)(self, kind) for kind in KINDS}
        share = {"trace": self.trace_share, "general": 1 - self.trace_share}
        written = dict.fromkeys(KINDS, 0)
        while (total := sum(written.values())) < self.tokens:
            kind = max(KINDS, key=lambda k: share[k] * (total + 1) - written[k])  # the one that lags behind its share
            document = next(makers[kind], None)
            if document is None:
                possible = int(written[kind] / share[kind])
                raise UserError(f"the budget of {self.tokens:,} tokens is above the corpus: its {kind} text ends after "
                                f"{written[kind]:,} of {round(share[kind] * self.tokens):,} tokens; "
                                f"ask for at most {possible:,} or add text")
            written[kind] += len(document.tokens) - self._has_bos
            yield document

    def check_budget(self) -> None:
        """UserError if the files hold fewer tokens than the budget: now, not after hours of forward passes."""
        if self.pair.corpus != "generated":
            for _ in self:
                pass

    @property
    def _has_bos(self) -> bool:
        bos = self.tokenizer.bos_token_id
        return bos is not None and bos not in self.excluded


def build(pair: Pair, tokens: int | None = None, trace_share: float = 0.5, seed: int = 0, splits: Sequence[float] = (0.8, 0.1, 0.1),
          max_length: int = 1024) -> Corpus:
    """The corpus of a pair: an iterable of Documents with at least ``tokens`` tokens (BOS not counted).

    ``trace_share`` is the share of tokens in traces; ``splits`` are the shares of documents for train, choose and report.
    Texts are distinct; for the embedded pair the puzzles of the splits come from puzzles' own train, validation and
    test. From files, documents longer than ``max_length`` are cut into windows, all of which are used (late reasoning
    counts too), a text that occurs twice stays in one split, and ids that the vocabularies do not share are left out.
    Raises UserError for impossible values and vocabularies that differ; a budget above the corpus is found by ``check_budget``
    (or at the end of the iteration).
    """
    tokens = check("tokens", pair.tokens if tokens is None else tokens, int, low=1)
    check("trace_share", trace_share, float, low=0, high=1)
    check("seed", seed, int)
    check("max_length", max_length, int, low=2)
    check("splits", list(splits), list, low=0)
    if len(splits) != len(SPLITS) or abs(sum(splits) - 1) > 1e-6 or not splits[0]:
        raise UserError(f"splits are {tuple(splits)}: they must be three shares (train, choose, report) that sum to 1, train not 0")
    shared = pair.tokenizer_source is not None
    tokenizers = {name: pair.tokenizer(name) for name in (list(pair.models)[:1] if shared else pair.models)}
    excluded = check_vocabularies(tokenizers, pair.differing_ids)
    tokenizer = next(iter(tokenizers.values()))
    corpus = Corpus(pair, tokens, float(trace_share), seed, tuple(float(s) for s in splits), max_length, tokenizer, excluded)
    if pair.corpus != "generated":
        for path, _ in pair.corpus:
            if not Path(path).is_file():
                raise UserError(f"the corpus file {path} of pair {pair.name!r} does not exist: put text there, or change data/pairs.yaml")
    return corpus


# --- the embedded pair's text ----------------------------------------------------------------------------------


def label_arrays(sentences: Sequence[Sentence], kind: str, bos: bool = True) -> dict[str, np.ndarray]:
    """The arrays of ``LABEL_ARRAYS``, int8, one entry per token (BOS, then a token per word)."""
    n = bos + sum(len(s.words) for s in sentences)
    arrays = {name: np.zeros(n, np.int8) for name in LABEL_ARRAYS}
    arrays["kind"][:] = KINDS.index(kind)
    arrays["label"][:] = arrays["next_label"][:] = -1
    first = int(bos)
    for i, sentence in enumerate(sentences):
        last = first + len(sentence.words) - 1
        arrays["label"][first : last + 1] = LABELS.index(sentence.label)
        arrays["starts"][first] = arrays["ends"][last] = 1
        arrays["error"][first : last + 1] = sentence.error
        if i + 1 < len(sentences):
            arrays["next_label"][last] = LABELS.index(sentences[i + 1].label)
        first = last + 1
    return arrays


def encode(sentences: Sequence[Sentence], tokenizer: PreTrainedTokenizerBase, ids: dict[str, int] | None = None) -> list[int]:
    """Token ids, with BOS, of sentences, from their words; UserError unless the tokenizer sees exactly the same in their text."""
    ids = tokenizer.get_vocab() if ids is None else ids
    words = [word for s in sentences for word in s.words]
    tokens = [tokenizer.bos_token_id, *(ids.get(word, -1) for word in words)]
    if tokens != tokenizer(" ".join(words))["input_ids"]:
        raise UserError("the generated corpus has words that are not single tokens of this tokenizer: it is the embedded pair's own text; "
                        "give a corpus of text or JSONL files for another pair")
    return tokens


def _generated(corpus: Corpus, kind: str) -> Iterator[Document]:
    """Endless distinct documents of one kind. They do not depend on the budget: a larger one begins alike."""
    ids, seen, counts, repeats = corpus.tokenizer.get_vocab(), set(), dict.fromkeys(SPLITS, 0), 0
    rng = random.Random(f"{corpus.seed}/{kind}")
    while repeats < _MAX_REPEATS:
        split = _next_split(corpus.splits, counts)
        if kind == "trace":
            easy = rng.random() < EASY_SHARE
            task = sample_question(rng) if easy else sample_puzzle(rng, _PUZZLE_SPLIT[split])
            sentences = [*task.prompt(), *Teacher(rng).solve(task)]
        else:
            sentences = base_document(rng, _GENERAL_MIX)
        tokens = encode(sentences, corpus.tokenizer, ids)
        if (text := tuple(tokens)) in seen:
            repeats += 1
            continue
        seen.add(text)
        counts[split] += 1
        repeats = 0
        yield Document(tokens, kind, split, label_arrays(sentences, kind))


def _next_split(shares: Sequence[float], counts: dict[str, int]) -> str:
    """The split that lags most behind its share: exact shares at every length, even of a dozen documents."""
    total = sum(counts.values()) + 1
    return max(SPLITS, key=lambda s: shares[SPLITS.index(s)] * total - counts[s])


# --- text from files -------------------------------------------------------------------------------------------


def _from_files(corpus: Corpus, kind: str) -> Iterator[Document]:
    """Documents of one kind from the pair's files, in the order of the files, in windows of at most ``max_length``."""
    tokenizer, excluded = corpus.tokenizer, set(corpus.excluded)
    bos = [tokenizer.bos_token_id] if corpus._has_bos else []
    for path, file_kind in corpus.pair.corpus:
        if file_kind != kind:
            continue
        for text in read_texts(Path(path)):
            tokens = [t for t in tokenizer(text, add_special_tokens=False)["input_ids"] if t not in excluded]
            # the split is a function of the text, so that a repeated text cannot be trained on and reported on
            point = random.Random(f"{corpus.seed}/{text}").random()
            split = SPLITS[min(int(np.searchsorted(np.cumsum(corpus.splits), point, side="right")), 2)]
            size = corpus.max_length - len(bos)
            for first in range(0, len(tokens), size):
                window = bos + tokens[first : first + size]
                labels = {name: np.full(len(window), -1, np.int8) for name in LABEL_ARRAYS}
                labels["kind"][:] = KINDS.index(kind)
                yield Document(window, kind, split, labels)


def read_texts(path: Path) -> Iterator[str]:
    """The texts of a file (.gz or not): of JSONL the field "text" of each line, of other files the stretches between blank lines."""
    opener = gzip.open if path.suffix == ".gz" else open
    jsonl = ".jsonl" in path.suffixes
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            paragraph: list[str] = []
            for number, line in enumerate(file, 1):
                if jsonl and line.strip():
                    yield _jsonl_text(line, f"line {number} of {path.name}")
                elif not jsonl and line.strip():
                    paragraph.append(line.rstrip("\n"))
                elif paragraph:
                    yield "\n".join(paragraph)
                    paragraph = []
            if paragraph:
                yield "\n".join(paragraph)
    except UnicodeDecodeError as error:
        raise UserError(f"{path.name} is not UTF-8 text ({error.reason} at byte {error.start}): convert it first") from None
    except (gzip.BadGzipFile, EOFError):
        raise UserError(f"{path.name} is not a whole gzip file: fetch it again") from None


def _jsonl_text(line: str, where: str) -> str:
    try:
        text = json.loads(line)["text"]
    except (ValueError, KeyError, TypeError):
        text = None
    if not isinstance(text, str):
        raise UserError(f'{where} is not of the form {{"text": "..."}}: every line of a JSONL corpus must be')
    return text
