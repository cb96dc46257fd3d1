"""The text that both models read: tokenised once, split by document, labelled token by token.

Half of the tokens are reasoning traces and half are general text (the paper's mixture, by default). For the
embedded pair both are generated, and every token knows what its sentence does::

    ... so   9  * 4   =  13   .   wait  ,   9  * 4   =  17   .   but  17 ...
        deduction, error=1       reflection                     contrast
        starts=1        ends=1   starts=1              ends=1
                  next_label=reflection          next_label=contrast

Other pairs read text or JSONL files, or stream data sets from the hub, as plain text or as traces: a
question, a thought, an answer. There a lexicon labels the sentences (``lib.text.lexicon``), which errs.

Two models share a vocabulary only up to a few tokens that one of them redefined: 151648 is ``<think>`` in
R1-Distill-Qwen and ``<|box_start|>`` in Qwen. Both read the same ids, so these are never fed; what they stand
for in a text is spelled in ordinary tokens. BOS is prepended if all models have the same one, and only then.
"""

import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from ..labels import KINDS, LABELS, SPLITS
from ..models import sources
from ..models.pairs import Pair, check_vocabularies
from ..runs import fingerprint
from ..settings import ROOT, UserError, check, user_path
from . import chat, lexicon
from .chat import Trace, plain
from .curriculum import BASE_MIX, base_document
from .files import JSON, OTHER, hub_items, read_items
from .puzzles import EASY_SHARE, ModeTeacher, Sentence, Teacher, sample_puzzle, sample_question

_PUZZLE_SPLIT = {"train": "train", "choose": "validation", "report": "test"}
_GENERAL_MIX = {kind: share for kind, share in BASE_MIX.items() if kind != "direct"}
TEACHERS = {"generated": Teacher, "modes": ModeTeacher}  # by the corpus of a pair
_MAX_REPEATS = 1000  # generated documents in a row that were there before: the corpus is exhausted


@dataclass(frozen=True)
class Document:
    """One text: token ids (with BOS, if the vocabularies share one), kind ("trace" or "general"), split, and
    labels, an int8 array [len(tokens)] for each name in ``LABEL_ARRAYS``:

    - ``label``: index into ``LABELS`` of the token's sentence, -1 if unknown (BOS, text without labels)
    - ``starts``, ``ends``: 1 at the first and the last token of a sentence
    - ``next_label``: at the end of a sentence the label of the next one; else, and at the last, -1
    - ``error``: 1 in a step whose value is wrong (not in the reflection that mends it)
    - ``kind``: 1 in a trace, 0 in general text
    - ``mode``: 1 in a careful trace, 0 in a quick one, -1 where there is no such thing
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
    excluded: tuple[int, ...] = ()  # ids that are not the same token in all models
    # BOS of any of the models, as text: a template may have written it in front of a text
    openings: tuple[str, ...] = ()

    @property
    def parameters(self) -> dict:
        """What the documents are made from, as plain data, for manifests."""
        names = ("tokens", "trace_share", "seed", "max_length")
        known = {name: getattr(self, name) for name in names}
        known |= {"splits": list(self.splits), "excluded_ids": list(self.excluded)}
        if self.pair.generated:
            return {"source": self.pair.corpus, **known}
        known |= {"source": [list(entry) for entry in self.pair.corpus], "lexicon": lexicon.VERSION}
        known["think_tags"] = [list(tag) for tag in chat.think_tags(self.speller)]
        excluded = {str(i): self.tokenizer.convert_ids_to_tokens(i) for i in self.excluded}
        more = {"excluded_tokens": excluded, "commits": self.commits}
        return known | {key: value for key, value in more.items() if value}

    @cached_property
    def commits(self) -> dict[str, str]:
        """The commit of each data set on the hub that is read."""
        texts = [source for source, _ in self.pair.corpus if source.startswith(sources.HUB)]
        repos = [sources.dataset(source).repo for source in texts]
        return {repo: sources.resolved(repo, "dataset")[1] for repo in repos}

    @property
    def fingerprint(self) -> str:
        """Hash of the parameters, the vocabulary, and the text: files, or the first generated documents."""
        if self.pair.generated:
            sample = [d.tokens for d, _ in zip(self, range(50))]
        else:
            texts = (source for source, _ in self.pair.corpus)
            sample = [text if text.startswith(sources.HUB) else Path(text) for text in texts]
        # content counts, not where it lies
        parameters = {k: v for k, v in self.parameters.items() if k != "source"}
        return fingerprint(parameters, self.tokenizer.get_vocab(), sample)

    def __iter__(self) -> Iterator[Document]:
        """Documents until the budget is met: traces and general text in turn, so any stretch has both."""
        maker = _generated if self.pair.generated else _from_files
        makers = {kind: maker(self, kind) for kind in KINDS}
        share = {"trace": self.trace_share, "general": 1 - self.trace_share}
        written = dict.fromkeys(KINDS, 0)
        while (total := sum(written.values())) < self.tokens:
            # the one that lags behind its share
            kind = max(KINDS, key=lambda k: share[k] * (total + 1) - written[k])
            document = next(makers[kind], None)
            if document is None:
                possible = int(written[kind] / share[kind])
                raise UserError(
                    f"the budget of {self.tokens:,} tokens is above the corpus: its {kind} text ends after "
                    f"{written[kind]:,} of {round(share[kind] * self.tokens):,} tokens; ask for at most"
                    f" {possible:,}, add text, or give the other kind a larger share (trace_share)"
                )
            written[kind] += len(document.tokens) - self._has_bos
            yield document

    def check_budget(self) -> None:
        """UserError if the files hold fewer tokens than the budget: now, not after hours of forward passes
        (but for text from the hub, which is not read twice)."""
        if not self.pair.generated and not self.commits:
            for _ in self:
                pass

    @property
    def _has_bos(self) -> bool:
        bos = self.tokenizer.bos_token_id
        return bos is not None and bos not in self.excluded

    @cached_property
    def speller(self) -> PreTrainedTokenizerBase:
        """The tokenizer without the excluded tags, which it spells in ordinary tokens."""
        tags = {i for i in self.excluded if i in self.tokenizer.added_tokens_decoder}
        if not tags:
            return self.tokenizer
        content = json.loads(self.tokenizer.backend_tokenizer.to_str())
        vocabulary = content["model"]["vocab"]
        # renamed to what no text holds; without them the others would move up to other ids
        for token in content["added_tokens"]:
            if token["id"] in tags:
                name = f"\uf8ff{token['id']}\uf8ff"
                if token["content"] in vocabulary:
                    vocabulary[name] = vocabulary.pop(token["content"])
                token["content"] = name
        content["post_processor"] = None  # it may name what is gone; nothing is added to a text anyway
        speller = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(content)))
        before, after = self.tokenizer.get_vocab(), speller.get_vocab()
        if any(after.get(token) != i for token, i in before.items() if i not in tags):
            raise UserError(
                f"the tags with the ids {sorted(tags)} cannot be taken out of this tokenizer without moving"
                " other ids"
            )
        return speller

    @cached_property
    def _rules(self) -> tuple[bool, frozenset]:
        """Whether traces are written as a chat, and the ids that no text may have: BOS too, unless it marks
        turns, as in SmolLM2."""
        chats = chat_markers(self.tokenizer, self.excluded)
        return chats, frozenset({*self.excluded, *([] if chats else [self.tokenizer.bos_token_id])})

    def encoded(self, item: str | Trace) -> tuple[str, list[int], list[tuple[int, int]]]:
        """A text or a trace as it is read, its token ids, without BOS and without any id that is not the same
        token in all models, and where in the text each of them stands."""
        chats, banned = self._rules
        if isinstance(item, Trace) and chats:
            parts = chat.parts(item)
        else:
            text = plain(item) if isinstance(item, Trace) else item
            while start := next((o for o in self.openings if text.startswith(o)), None):
                text = text[len(start) :]
            parts = (text,)
        ids, offsets, before = [], [], 0
        for part in parts:
            encoding = self.speller(part, add_special_tokens=False, return_offsets_mapping=True)
            ids += encoding["input_ids"]
            offsets += [(before + first, before + last) for first, last in encoding["offset_mapping"]]
            before += len(part)
        places = [i for i, token in enumerate(ids) if token not in banned]
        return "".join(parts), [ids[i] for i in places], [offsets[i] for i in places]


def build(
    pair: Pair,
    tokens: int | None = None,
    trace_share: float = 0.5,
    seed: int = 0,
    splits: Sequence[float] = (0.8, 0.1, 0.1),
    max_length: int = 1024,
) -> Corpus:
    """The corpus of a pair: an iterable of Documents with at least ``tokens`` tokens (BOS not counted).

    ``trace_share`` is the share of tokens in traces; ``splits`` are the shares of documents for train, choose
    and report. Texts are distinct; for the embedded pair the puzzles of the splits come from puzzles' own
    train, validation and test. From files, documents longer than ``max_length``, or than the shortest context
    of the models, are cut into windows, all of which are used, and a text that occurs twice stays in one
    split. Raises UserError for impossible values and vocabularies that differ; a budget above the corpus is
    found by ``check_budget`` or at the end."""
    tokens = check("tokens", pair.tokens if tokens is None else tokens, int, low=1)
    check("trace_share", trace_share, float, low=0, high=1)
    check("seed", seed, int)
    check("max_length", max_length, int, low=2)
    check("splits", list(splits), list, low=0)
    if len(splits) != len(SPLITS) or abs(sum(splits) - 1) > 1e-6 or not splits[0]:
        raise UserError(
            f"splits are {tuple(splits)}: they must be three shares (train, choose, report) that sum to 1,"
            " train not 0"
        )
    if not pair.generated:
        max_length = min(max_length, pair.context or max_length)
    shared = pair.tokenizer_source is not None
    tokenizers = {name: pair.tokenizer(name) for name in (list(pair.models)[:1] if shared else pair.models)}
    excluded = check_vocabularies(tokenizers, pair.differing_ids)
    excluded = pair.differing_ids if shared else excluded
    tokenizer = next(iter(tokenizers.values()))
    beginnings = {t.bos_token_id for t in tokenizers.values()}
    # BOS in one of them, or another one: none for any, or the models would read different texts
    if len(beginnings) > 1:
        excluded = tuple(sorted({*excluded, *beginnings} - {None}))
    openings = tuple(dict.fromkeys(t.bos_token for t in tokenizers.values() if t.bos_token))
    for path, _ in pair.corpus if not pair.generated else ():
        if not path.startswith(sources.HUB) and not Path(path).is_file():
            raise UserError(
                f"the corpus file {path} of pair {pair.name!r} does not exist: put text there, or change"
                " data/pairs.yaml"
            )
    shares = float(trace_share), tuple(map(float, splits))
    return Corpus(pair, tokens, shares[0], seed, shares[1], max_length, tokenizer, excluded, openings)


def override(pair: Pair, traces: str = "", general: str = "") -> Pair:
    """The pair with other text: for each kind a file (text, JSONL, .gz or not) or a data set on the hub; ""
    keeps the registry's.

    A file is looked for from here, then from the repository's root; a data set is named as
    ``sources.dataset`` reads it. UserError for anything else."""
    given = {kind: text.strip() for kind, text in (("trace", traces), ("general", general)) if text.strip()}
    for kind, source in given.items():
        path = user_path(source)
        if file := next((p for p in (path, ROOT / path) if p.is_file()), None):
            given[kind] = str(file.resolve())
        elif (path.suffix.lower() in (".txt", ".md", ".gz", *JSON, *OTHER) and ":" not in source) or (
            path.is_dir() or source.startswith((".", "/", "~", "$"))
        ):
            there = "a folder" if path.is_dir() else "not there"
            raise UserError(
                f"the corpus {source!r} is {there}: give a file of text or JSONL, or a data set on the hub"
                " (org/name)"
            )
        else:
            given[kind] = sources.HUB + source.removeprefix(sources.HUB)
            sources.dataset(given[kind])
    if not given:
        return pair
    others = () if pair.generated else tuple(c for c in pair.corpus if c[1] not in given)
    return replace(pair, corpus=(*((source, kind) for kind, source in given.items()), *others))


def label_arrays(
    sentences: Sequence[Sentence], kind: str, bos: bool = True, mode: int = -1
) -> dict[str, np.ndarray]:
    """The arrays of ``LABEL_ARRAYS``, int8, one entry per token (BOS, then a token per word)."""
    owner = np.repeat(np.arange(len(sentences)), [len(s.words) for s in sentences])
    labels = [LABELS.index(s.label) for s in sentences]
    errors = [s.error for s in sentences]
    return lexicon.arrays_of(np.concatenate([[-1] * bos, owner]).astype(int), labels, kind, errors, mode)


def encode(
    sentences: Sequence[Sentence], tokenizer: PreTrainedTokenizerBase, ids: dict[str, int] | None = None
) -> list[int]:
    """Token ids, with BOS, of sentences, from their words; UserError unless the tokenizer sees the same."""
    ids = tokenizer.get_vocab() if ids is None else ids
    words = [word for s in sentences for word in s.words]
    tokens = [tokenizer.bos_token_id, *(ids.get(word, -1) for word in words)]
    if tokens != tokenizer(" ".join(words))["input_ids"]:
        raise UserError(
            "the generated corpus has words that are not single tokens of this tokenizer: it is the embedded"
            " pair's own text; give a corpus of text or JSONL files for another pair"
        )
    return tokens


def _generated(corpus: Corpus, kind: str) -> Iterator[Document]:
    """Endless distinct documents of one kind. They do not depend on the budget: a larger one begins alike."""
    ids, seen, counts, repeats = corpus.tokenizer.get_vocab(), set(), dict.fromkeys(SPLITS, 0), 0
    rng = random.Random(f"{corpus.seed}/{kind}")
    teacher = TEACHERS[corpus.pair.corpus](rng)
    while repeats < _MAX_REPEATS:
        split = _next_split(corpus.splits, counts)
        if kind == "trace":
            easy = rng.random() < EASY_SHARE
            task = sample_question(rng) if easy else sample_puzzle(rng, _PUZZLE_SPLIT[split])
            sentences = [*task.prompt(), *teacher.solve(task)]
        else:
            sentences = base_document(rng, _GENERAL_MIX)
        tokens = encode(sentences, corpus.tokenizer, ids)
        if (text := tuple(tokens)) in seen:
            repeats += 1
            continue
        seen.add(text)
        counts[split] += 1
        repeats = 0
        mode = int(teacher.careful) if kind == "trace" and isinstance(teacher, ModeTeacher) else -1
        yield Document(tokens, kind, split, label_arrays(sentences, kind, mode=mode))


def _next_split(shares: Sequence[float], counts: dict[str, int]) -> str:
    """The split that lags most behind its share: exact shares at every length, even of a dozen documents."""
    total = sum(counts.values()) + 1
    return max(SPLITS, key=lambda s: shares[SPLITS.index(s)] * total - counts[s])


def _from_files(corpus: Corpus, kind: str) -> Iterator[Document]:
    """Documents of one kind from the pair's sources, in their order, in windows that cover all of a text."""
    bos = [corpus.tokenizer.bos_token_id] if corpus._has_bos else []
    for source, source_kind in corpus.pair.corpus:
        if source_kind != kind:
            continue
        for text in hub_items(source) if source.startswith(sources.HUB) else read_items(Path(source)):
            written, tokens, offsets = corpus.encoded(text)
            if bos and tokens[:1] == bos:  # it is prepended below, once
                tokens, offsets = tokens[1:], offsets[1:]
            labels = lexicon.label_arrays(written, offsets, kind)
            # the split is a function of the text: a repeated text cannot be trained on and reported on
            key = text if isinstance(text, str) else plain(text)
            point = random.Random(f"{corpus.seed}/{key}").random()
            split = SPLITS[min(int(np.searchsorted(np.cumsum(corpus.splits), point, side="right")), 2)]
            size = corpus.max_length - len(bos)
            for first in range(0, len(tokens), size):
                window = {name: array[first : first + size] for name, array in labels.items()}
                if bos:  # no sentence's token, but of the same kind of text
                    begin = {"label": -1, "next_label": -1, "kind": KINDS.index(kind)}
                    window = {name: np.insert(a, 0, begin.get(name, 0)) for name, a in window.items()}
                yield Document(bos + tokens[first : first + size], kind, split, window)


def chat_markers(tokenizer: PreTrainedTokenizerBase, excluded: Sequence[int] = ()) -> bool:
    """Whether the markers of ``chat`` are single tokens, the same in all models."""
    ids = [tokenizer.get_vocab().get(marker) for marker in ("<|im_start|>", "<|im_end|>")]
    return all(i is not None and i not in excluded for i in ids)
