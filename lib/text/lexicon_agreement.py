"""How far can the lexicon's labels be believed? Precision and recall against annotations, and against labels
that were given by reading.

For a category c, over sentences (tp: tagged c and annotated c):

    precision = tp / tagged        recall = tp / annotated

A tagger that labels as many sentences at random has precision annotated / n and recall tagged / n: the *base
rates*, given beside.

**Annotated traces.** ``agreement(path)`` reads JSONL (.gz or not) of {thinking, sections: [[label, text],
...], index}. Sections are stretches of the thought, aligned in order by a cursor: a section is looked for
only just after the one before it, white space apart. A sentence has the label of the section that holds more
than half of it; what lies in no aligned section is left out, and counted. Decided before any outcome was
seen:

- "reflection ~ backtracking": primary; every other label is "not reflection"
- "reflection ~ backtracking or doubt": with "uncertainty-estimation", since the category is self-reflection,
  not only a change of course
- "deduction ~ deduction": primary; every other label is "not deduction"
- "turn ~ backtracking": reflection or alternative against backtracking ("changes the approach"), which lies
  across both

initializing, adding-knowledge and example-testing are negatives of all; unknown labels are left out.
Alternative and contrast have no counterpart there. Two *units*: every sentence, and only the first one of
each section (a section of ten sentences carries its marker once, so that recall over all sentences is bounded
by how the annotator cut). Traces are halved by a hash of their question: the lexicon was improved, if at all,
by reading errors of the half "development", so "held out" is what to quote. Intervals: bootstrap over
questions (traces of several models on one question are not independent).

**Labelled sentences.** ``sample_sentences`` draws sentences of each tag alike, since a plain sample of a
hundred would hold hardly a contrast; every sentence has as its weight the number of sentences that it stands
for, and ``labelled_agreement`` computes weighted precision, recall and base rates. Intervals: bootstrap
within the strata.

    python -m lib agreement traces.jsonl.gz    # the first table; a second name of a file: as CSV
    python -m lib agreement data/labelled      # the second

Source of the annotation's labels: Venhoff et al. 2025 (arXiv 2506.18167); they are a language model's, with
errors.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from ..labels import CATEGORIES
from ..runs import Progress, write_text
from ..settings import UserError, check
from ..stats import group_weights, interval
from .lexicon import OTHER, sentences, tag, thought

LABELLED = (*CATEGORIES, OTHER)
ANNOTATED = (
    "initializing",
    "deduction",
    "adding-knowledge",
    "example-testing",
    "uncertainty-estimation",
    "backtracking",
)
COMPARISONS = {  # name: (tags, annotated labels)
    "reflection ~ backtracking": (("reflection",), ("backtracking",)),
    "reflection ~ backtracking or doubt": (("reflection",), ("backtracking", "uncertainty-estimation")),
    "deduction ~ deduction": (("deduction",), ("deduction",)),
    "turn ~ backtracking": (("reflection", "alternative"), ("backtracking",)),
}
HALVES = ("development", "held out")
GAP = 400  # characters, white space apart, that may lie between two sections
COLUMNS = [
    "precision",
    "precision_low",
    "precision_high",
    "precision_base",
    "recall",
    "recall_low",
    "recall_high",
    "recall_base",
]


# --- annotated traces ---------------------------------------------------------------------------------------


def align(thinking: str, sections: Sequence[Sequence[str]]) -> tuple[list[tuple[int, int, str]], int]:
    """Where the sections lie in the thought: (start, end, label) in order, and how many are not found.

    Each is looked for from the end of the one before, at most ``GAP`` characters on (and the length of those
    lost since), so that of two equal sections each has its place. White space does not count.
    """
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
    another form.
    """
    rows, entries = [], list(_entries(Path(path)))
    counts = dict.fromkeys(("traces", "sections", "sections_lost", "sentences", "sentences_left_out"), 0)
    with Progress("traces compared", len(entries)) as progress:
        for number, (question, thinking, sections) in enumerate(entries):
            (places, lost), spans, opened = align(thinking, sections), sentences(thinking), set()
            sizes = (1, len(sections), lost, len(spans), 0)
            counts = {name: counts[name] + size for name, size in zip(counts, sizes)}
            for span in spans:
                section = next((s for s in places if _holds(s, span)), None)
                if section is None or section[2] not in ANNOTATED:
                    counts["sentences_left_out"] += 1
                    continue
                text, opens = thinking[span.start : span.end], section not in opened
                opened.add(section)
                rows.append(
                    (number, question, half_of(question), text, span.label, span.cue, section[2], opens)
                )
            progress.update(number + 1)
    if not rows:
        raise UserError(
            f"{Path(path).name} holds no sentence in a section labelled {', '.join(ANNOTATED)}: nothing to"
            " compare with"
        )
    columns = ["trace", "question", "half", "text", "tag", "cue", "annotated", "opens"]
    return pd.DataFrame(rows, columns=columns), counts


def _holds(section: tuple[int, int, str], span) -> bool:
    return 2 * (min(section[1], span.end) - max(section[0], span.start)) > span.end - span.start


def half_of(question: object) -> str:
    """ "development" or "held out", by a hash of the question."""
    return HALVES[zlib.crc32(f"lexicon/{question}".encode()) % 2]


def agreement(path: str | Path, n_boot: int = 1000, seed: int = 0) -> pd.DataFrame:
    """The lexicon against annotated traces. A row per comparison, unit ("sentence", "first of section") and
    half.

    Columns: comparison, unit, half, precision and recall with 95% intervals (..._low, ..._high) and base
    rates (..._base), and the counts tagged, annotated, both, n. ``frame.attrs`` holds the counts of
    ``annotated_sentences``.
    """
    frame, counts = annotated_sentences(path)
    rows = []
    for name, (tags, labels) in COMPARISONS.items():
        for unit in ("sentence", "first of section"):
            for half in (*HALVES, "all"):
                part = frame[(frame["half"] == half) | (half == "all")]
                part = part if unit == "sentence" else part[part["opens"]]
                cells = _cells(part["tag"].isin(tags).to_numpy(), part["annotated"].isin(labels).to_numpy())
                row = {"comparison": name, "unit": unit, "half": half}
                rows.append(row | _by_group(cells, part["question"], n_boot, seed) | _counts(cells))
    table = pd.DataFrame(rows)
    table.attrs.update(counts)
    return table


def _cells(tagged: np.ndarray, gold: np.ndarray) -> np.ndarray:
    """What each sentence adds to the counts (both, tagged, annotated, all), bool [4, sentences]."""
    return np.stack([tagged & gold, tagged, gold, np.ones(len(gold), bool)])


def _counts(cells: np.ndarray) -> dict[str, int]:
    both, tagged, gold, n = cells.sum(1).tolist()
    return {"tagged": tagged, "annotated": gold, "both": both, "n": n}


def _by_group(cells: np.ndarray, groups: pd.Series, n_boot: int, seed: int) -> dict[str, float]:
    """Precision and recall with base rates, and intervals over resampled groups."""
    if cells.shape[1] == 0:
        return dict.fromkeys(COLUMNS, np.nan)
    ids, names = pd.factorize(groups)
    counts = np.stack([np.bincount(ids, weights=cell, minlength=len(names)) for cell in cells])
    return _rates(counts.sum(1), counts @ group_weights(len(names), n_boot, seed).T)


def _rates(total: np.ndarray, resamples: np.ndarray) -> dict[str, float]:
    """From (both, tagged, annotated, all) [4] and their resamples [4, n_boot]."""
    with np.errstate(invalid="ignore", divide="ignore"):
        both, tagged, gold, n = total
        values = {
            "precision": (both / tagged, resamples[0] / resamples[1], gold / n),
            "recall": (both / gold, resamples[0] / resamples[2], tagged / n),
        }
    row = {}
    for name, (value, resampled, base) in values.items():
        low, high = interval(resampled)
        row |= {name: float(value), f"{name}_low": low, f"{name}_high": high, f"{name}_base": float(base)}
    return row


def _entries(path: Path) -> Iterator[tuple[object, str, list]]:
    """(question, thinking, sections) of each line; its number stands for a question that is not given."""
    for number, entry in _json_lines(path):
        try:
            thinking, sections = (
                entry["thinking"],
                [(str(label), str(text)) for label, text in entry["sections"]],
            )
        except (KeyError, TypeError, ValueError):
            thinking = None
        if not isinstance(thinking, str):
            raise UserError(
                f'line {number} of {path.name} is not of the form {{"thinking": "...", "sections": [["label",'
                ' "text"], ...]}'
            )
        yield entry.get("index", f"line {number}"), thinking, sections


def _json_lines(path: Path) -> Iterator[tuple[int, dict]]:
    if not path.is_file():
        raise UserError(f"the file {path} does not exist: give JSONL with one entry a line")
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield number, json.loads(line)
    except (gzip.BadGzipFile, EOFError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(
            f"{path.name} is not whole JSONL ({error}): every line must be one JSON object, in UTF-8"
        ) from None


# --- sentences labelled by reading --------------------------------------------------------------------------


def sample_sentences(documents: Iterable[str], n: int = 100, seed: int = 0) -> pd.DataFrame:
    """``n`` sentences of the documents for labelling: as many of each tag as there are tags, or all where
    there are fewer. In random order.

    Columns: document (number), before (the sentence before it, "" at the start), text, stratum (the tag) and
    weight (sentences of that tag in the documents, by sentences drawn). What stands outside the thought, and
    sentences without a letter, take no part. UserError if there are fewer than ``n``.
    """
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
    """sentences.jsonl, {before, text, label: null} for the reader to fill in, and strata.jsonl, {stratum,
    weight} of the same lines.

    Two files, so that whoever labels does not see the tag. UserError if there are labelled sentences: they
    are not written over.
    """
    folder = Path(folder)
    if (folder / "sentences.jsonl").is_file():
        raise UserError(
            f"{folder.name}/sentences.jsonl is there already: move it away before a new sample is drawn"
        )
    folder.mkdir(parents=True, exist_ok=True)
    for name, columns in (("strata", ["stratum", "weight"]), ("sentences", ["before", "text"])):
        entries = sample[columns].to_dict("records")
        entries = [e | {"label": None} for e in entries] if name == "sentences" else entries
        write_text(
            folder / f"{name}.jsonl", "".join(json.dumps(e, ensure_ascii=False) + "\n" for e in entries)
        )


def labelled_sentences(folder: str | Path) -> pd.DataFrame:
    """The labelled sample: before, text, label, stratum, weight, and tag (the lexicon's, now). UserError for
    what is not labelled.
    """
    folder = Path(folder)
    entries, strata = (
        [entry for _, entry in _json_lines(folder / name)] for name in ("sentences.jsonl", "strata.jsonl")
    )
    if len(entries) != len(strata):
        raise UserError(
            f"sentences.jsonl has {len(entries)} lines and strata.jsonl {len(strata)}: "
            "they must be of one sample"
        )
    for number, entry in enumerate(entries, 1):
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
    annotated, both and n are plain counts.
    """
    frame = labelled_sentences(folder)
    weight, tags, label = frame["weight"].to_numpy(float), frame["tag"].to_numpy(), frame["label"].to_numpy()
    rng, times = np.random.default_rng(seed), np.zeros((len(frame), n_boot))
    for stratum in frame["stratum"].unique():  # resampled each for itself
        members = np.flatnonzero(frame["stratum"] == stratum)
        times[members] = group_weights(len(members), n_boot, rng).T
    rows = []
    for c in CATEGORIES:
        cells = _cells(tags == c, label == c)
        weighted = cells * weight
        rows.append({"category": c} | _rates(weighted.sum(1), weighted @ times) | _counts(cells))
    return pd.DataFrame(rows)


# --- command line -------------------------------------------------------------------------------------------


def shown(table: pd.DataFrame) -> str:
    """A table of either kind as plain text, intervals in brackets."""
    text = table.drop(columns=COLUMNS)
    for name in ("recall", "precision"):
        values = [
            f"{r[name]:.3f} [{r[name + '_low']:.3f}, {r[name + '_high']:.3f}]" for _, r in table.iterrows()
        ]
        text.insert(
            text.columns.get_loc("tagged"), f"{name}_base", table[f"{name}_base"].map("{:.3f}".format)
        )
        text.insert(text.columns.get_loc(f"{name}_base"), name, values)
    return text.to_string(index=False)


def table_of(path: Path, file: Path | None = None) -> pd.DataFrame:
    """The agreement with annotated traces, or with a folder of labelled sentences; also written to a CSV."""
    table = labelled_agreement(path) if path.is_dir() else agreement(path)
    if file is not None:
        write_text(file, table.to_csv(index=False, float_format="%.6g", lineterminator="\n"))
    return table
