"""How far can the lexicon's labels be believed? Precision and recall against annotations, and against labels
that were given by reading.

For a category c, over sentences: precision = both / tagged c, recall = both / annotated c. A tagger that
labels as many sentences at random has precision annotated / n and recall tagged / n: the *base rates*, given
beside.

**Annotated traces** (``agreement``). A sentence has the label of the section that holds more than half of it;
what lies in no aligned section is left out, and counted. Decided before any outcome was seen:

- "reflection ~ backtracking": primary; every other label is "not reflection"
- "reflection ~ backtracking or doubt": with "uncertainty-estimation", since the category is self-reflection,
  not only a change of course
- "deduction ~ deduction": primary; every other label is "not deduction"
- "turn ~ backtracking": reflection or alternative against backtracking ("changes the approach"), which lies
  across both

The other labels are negatives of all, unknown ones are left out; alternative and contrast have no counterpart
there. Two *units*: every sentence, and only the first one of each section (a section of ten sentences carries
its marker once). Traces are halved by a hash of their question: the lexicon was improved, if at all, by
reading errors of the half "development", so "held out" is what to quote. Intervals: bootstrap over questions
(traces of several models on one question are not independent).

**Labelled sentences** (``labelled_agreement``). As many sentences of each tag are labelled, since a plain
sample of a hundred would hold hardly a contrast; every sentence has as its weight the number of sentences
that it stands for. Intervals: bootstrap within the strata.

Source of the annotation's labels: Venhoff et al. 2025 (arXiv 2506.18167); they are a language model's, with
errors."""

import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd

from ..labels import CATEGORIES
from ..runs import Progress, table_text, write_text
from ..settings import UserError, check
from ..stats import group_weights, interval
from .files import json_entries
from .lexicon import OTHER, sentences, tag, thought

LABELLED = (*CATEGORIES, OTHER)
ANNOTATED = ("initializing", "deduction", "adding-knowledge", "example-testing")
ANNOTATED += ("uncertainty-estimation", "backtracking")
COMPARISONS = {  # name: (tags, annotated labels)
    "reflection ~ backtracking": (("reflection",), ("backtracking",)),
    "reflection ~ backtracking or doubt": (("reflection",), ("backtracking", "uncertainty-estimation")),
    "deduction ~ deduction": (("deduction",), ("deduction",)),
    "turn ~ backtracking": (("reflection", "alternative"), ("backtracking",)),
}
HALVES = ("development", "held out")
GAP = 400  # characters, white space apart, that may lie between two sections
COLUMNS = [name + end for name in ("precision", "recall") for end in ("", "_low", "_high", "_base")]


def align(thinking: str, sections: Sequence[Sequence[str]]) -> tuple[list[tuple[int, int, str]], int]:
    """Where the sections lie in the thought: (start, end, label) in order, and how many are not found. Each
    is looked for from the end of the one before, at most ``GAP`` characters on (and the length of those lost
    since). White space does not count."""
    solid = [i for i, c in enumerate(thinking) if not c.isspace()]
    squeezed = "".join(thinking[i] for i in solid)
    places, lost, cursor, slack = [], 0, 0, 0
    for label, text in sections:
        piece = "".join(text.split())
        first = squeezed.find(piece, cursor, cursor + slack + GAP + len(piece)) if piece else -1
        if first < 0:
            lost += 1
            slack += len(piece)
            continue
        places.append((solid[first], solid[first + len(piece) - 1] + 1, label))
        cursor, slack = first + len(piece), 0
    return places, lost


def annotated_sentences(path: str | Path) -> tuple[pd.DataFrame, dict[str, int]]:
    """Every sentence of the traces that has an annotation, one a row, and counts of what has none.

    Columns: trace (line number), question, half, text, tag, cue, annotated, opens (first sentence of its
    section). Counts: traces, sections, sections_lost, sentences, sentences_left_out. UserError for a file of
    another form."""
    rows, entries = [], list(_entries(Path(path)))
    counts = dict.fromkeys(("traces", "sections", "sections_lost", "sentences", "sentences_left_out"), 0)
    with Progress("traces compared", len(entries)) as progress:
        for number, (question, thinking, sections) in enumerate(entries):
            (places, lost), spans, opened = align(thinking, sections), sentences(thinking), set()
            sizes = (1, len(sections), lost, len(spans), 0)
            counts = {name: counts[name] + size for name, size in zip(counts, sizes)}
            for span in spans:
                half = (span.end - span.start) / 2
                inside = (p for p in places if min(p[1], span.end) - max(p[0], span.start) > half)
                section = next(inside, (0, 0, None))
                if section[2] not in ANNOTATED:
                    counts["sentences_left_out"] += 1
                    continue
                facts = (number, question, half_of(question), thinking[span.start : span.end])
                rows.append((*facts, span.label, span.cue, section[2], section not in opened))
                opened.add(section)
            progress.update(number + 1)
    if not rows:
        raise UserError(
            f"{Path(path).name} holds no sentence in a section labelled {', '.join(ANNOTATED)}: nothing to"
            " compare with"
        )
    columns = ["trace", "question", "half", "text", "tag", "cue", "annotated", "opens"]
    return pd.DataFrame(rows, columns=columns), counts


def half_of(question: object) -> str:
    """ "development" or "held out", by a hash of the question."""
    return HALVES[zlib.crc32(f"lexicon/{question}".encode()) % 2]


def agreement(path: str | Path, n_boot: int = 1000, seed: int = 0) -> pd.DataFrame:
    """The lexicon against annotated traces. A row per comparison, unit ("sentence", "first of section") and
    half.

    Columns: comparison, unit, half, precision and recall with 95% intervals (..._low, ..._high) and base
    rates (..._base), and the counts tagged, annotated, both, n. ``frame.attrs`` holds the counts of
    ``annotated_sentences``."""
    frame, counts = annotated_sentences(path)
    rows = []
    for name, (tags, labels) in COMPARISONS.items():
        for unit, half in product(("sentence", "first of section"), (*HALVES, "all")):
            in_half, in_unit = frame["half"].eq(half) | (half == "all"), frame["opens"] | (unit == "sentence")
            part = frame[in_half & in_unit]
            cells = _cells(part["tag"].isin(tags), part["annotated"].isin(labels))
            by_question = cells.groupby(part["question"].to_numpy(), sort=False).sum().to_numpy().T
            weights = np.zeros((n_boot, 0))
            if len(part):
                weights = group_weights(by_question.shape[1], n_boot, seed)
            row = {"comparison": name, "unit": unit, "half": half}
            rows.append(row | _rates(by_question, weights.T) | cells.sum().astype(int).to_dict())
    table = pd.DataFrame(rows)
    table.attrs.update(counts)
    return table


def _cells(tagged: pd.Series, annotated: pd.Series) -> pd.DataFrame:
    """What each sentence adds to the counts, a row each: tagged, annotated, both, n."""
    return pd.DataFrame({"tagged": tagged, "annotated": annotated, "both": tagged & annotated, "n": True})


def _rates(cells: np.ndarray, times: np.ndarray) -> dict[str, float]:
    """Precision and recall with base rates and intervals, from (tagged, annotated, both, n) of each group [4,
    groups], and how often each resample draws the group [groups, n_boot]."""
    tagged, annotated, both, n = np.column_stack([cells.sum(1), cells @ times])  # the data, then resamples
    row = {}
    with np.errstate(invalid="ignore", divide="ignore"):
        for name, part, base in (("precision", tagged, annotated), ("recall", annotated, tagged)):
            values = both / part
            low, high = interval(values[1:])
            row |= {name: float(values[0]), f"{name}_low": low, f"{name}_high": high}
            row[f"{name}_base"] = float(base[0] / n[0])
    return row


def _entries(path: Path) -> Iterator[tuple[object, str, list]]:
    """(question, thinking, sections) of each line; its number stands for a question that is not given."""
    for place, entry in json_entries(path):
        try:
            sections = [(str(label), str(text)) for label, text in entry["sections"]]
            thinking = entry["thinking"]
        except (KeyError, TypeError, ValueError):
            thinking = None
        if not isinstance(thinking, str):
            raise UserError(
                f'{place} is not of the form {{"thinking": "...", "sections": [["label", "text"], ...]}}'
            )
        yield entry.get("index", place), thinking, sections


def sample_sentences(documents: Iterable[str], n: int = 100, seed: int = 0) -> pd.DataFrame:
    """``n`` sentences of the documents for labelling, in random order: as many of each tag as there are tags,
    or all where there are fewer.

    Columns: document (number), before (the sentence before it, "" at the start), text, stratum (the tag) and
    weight (sentences of that tag in the documents, by sentences drawn). What stands outside the thought, and
    sentences without a letter, take no part. UserError if there are fewer than ``n``."""
    check("n", n, int, low=len(LABELLED))
    rows = []
    for number, text in enumerate(documents):
        before, (first, last) = "", thought(text)
        for span in sentences(text):
            sentence = text[span.start : span.end]
            if first <= span.start < last and any(c.isalpha() for c in sentence):
                rows.append((number, before, sentence, span.label))
            before = sentence
    frame = pd.DataFrame(rows, columns=["document", "before", "text", "stratum"])
    if len(frame) < n:
        raise UserError(
            f"the documents hold {len(frame)} sentences, {n} were asked for: give more documents, or ask for"
            " fewer"
        )
    rng = np.random.default_rng(seed)
    sizes = frame["stratum"].value_counts()
    drawn, left = [], n
    # the rarest first: others take what it cannot give
    for i, stratum in enumerate(sorted(sizes.index, key=lambda s: (sizes[s], s))):
        size = min(int(sizes[stratum]), left // (len(sizes) - i))
        members = frame.index[frame["stratum"] == stratum].to_numpy()
        part = frame.loc[rng.choice(members, size, replace=False)]
        drawn.append(part.assign(weight=sizes[stratum] / size))
        left -= size
    return pd.concat(drawn).sample(frac=1, random_state=seed).reset_index(drop=True)


def write_sample(sample: pd.DataFrame, folder: str | Path) -> None:
    """sentences.jsonl, {before, text, label: null} for the reader to fill in, and, so that whoever labels
    does not see the tag, strata.jsonl, {stratum, weight} of the same lines. UserError if there are labelled
    sentences already."""
    folder = Path(folder)
    if (folder / "sentences.jsonl").is_file():
        raise UserError(
            f"{folder.name}/sentences.jsonl is there already: move it away before a new sample is drawn"
        )
    folder.mkdir(parents=True, exist_ok=True)
    parts = (sample[["stratum", "weight"]], sample[["before", "text"]].assign(label=None))
    for name, frame in zip(("strata", "sentences"), parts):
        lines = (json.dumps(entry, ensure_ascii=False) + "\n" for entry in frame.to_dict("records"))
        write_text(folder / f"{name}.jsonl", "".join(lines))


def labelled_sentences(folder: str | Path) -> pd.DataFrame:
    """The labelled sample: before, text, label, stratum, weight, and tag (the lexicon's, now). UserError for
    what is not labelled."""
    files = (Path(folder) / f"{name}.jsonl" for name in ("sentences", "strata"))
    entries, strata = ([entry for _, entry in json_entries(file)] for file in files)
    if len(entries) != len(strata):
        raise UserError(
            f"sentences.jsonl has {len(entries)} lines and strata.jsonl {len(strata)}: "
            "they must be of one sample"
        )
    for number, entry in enumerate(entries, 1):
        entry = entry if isinstance(entry, dict) else {}
        if not isinstance(entry.get("text"), str) or entry.get("label") not in LABELLED:
            raise UserError(
                f"line {number} of sentences.jsonl has the label {entry.get('label')!r}: "
                f"it must be one of {', '.join(LABELLED)}"
            )
    frame = pd.DataFrame([a | b for a, b in zip(entries, strata)])
    return frame.assign(tag=[tag(text)[0] for text in frame["text"]])


def labelled_agreement(folder: str | Path, n_boot: int = 1000, seed: int = 0) -> pd.DataFrame:
    """The lexicon against sentences labelled by reading. A row per category, and columns as in ``agreement``.

    Every sentence counts by its weight, so that rates are those of the documents that were sampled; tagged,
    annotated, both and n are plain counts."""
    frame, rng = labelled_sentences(folder), np.random.default_rng(seed)
    times, rows = np.zeros((len(frame), n_boot)), []
    for stratum in frame["stratum"].unique():  # resampled each for itself
        members = np.flatnonzero(frame["stratum"] == stratum)
        times[members] = group_weights(len(members), n_boot, rng).T
    for c in CATEGORIES:
        cells = _cells(frame["tag"] == c, frame["label"] == c)
        rates = _rates(cells.to_numpy(float).T * frame["weight"].to_numpy(float), times)
        rows.append({"category": c} | rates | cells.sum().astype(int).to_dict())
    return pd.DataFrame(rows)


def shown(table: pd.DataFrame) -> str:
    """A table of either kind as plain text, intervals in brackets."""
    text = table.drop(columns=COLUMNS)
    at = text.columns.get_loc("tagged")
    for name in ("precision", "recall"):
        ends = zip(*(table[f"{name}{end}"].map("{:.3f}".format) for end in ("", "_low", "_high")))
        text.insert(at, f"{name}_base", table[f"{name}_base"].map("{:.3f}".format))
        text.insert(at, name, [f"{value} [{low}, {high}]" for value, low, high in ends])
    return text.to_string(index=False)


def table_of(path: Path, file: Path | None = None) -> pd.DataFrame:
    """The agreement with annotated traces, or with a folder of labelled sentences; also written to a CSV."""
    table = labelled_agreement(path) if path.is_dir() else agreement(path)
    if file is not None:
        write_text(file, table_text(table, "%.6g"))
    return table
