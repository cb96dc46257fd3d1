"""Texts and traces in files, and in data sets of the hub: one reader for every command.

What a file holds says how it is read, its name only what is expected of it: JSON, an entry a line or an
array, never becomes text with braces. An entry is a text, or a trace in one of ``FORMS``. In some of them the
thought stands in the reply, before ``</think>``; a template may have written ``<think>``, so it may be
missing. Rows that have no thought, or were cut within it, are left out, and how many is said."""

import gzip
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

from ..models import sources
from ..settings import UserError, not_utf8
from .chat import Trace, plain

LINES = 100  # so many lines at the beginning of a text file without a blank one: every line is a text
ODD_SHARE = 0.01  # of a data set's rows: nobody can mend one, and it must not end a harvest of days
THOUGHTLESS = 10_000  # so many rows without a thought, and none with one: no others are waited for
JSON = (".jsonl", ".ndjson", ".jl", ".json")
OTHER = (
    ".csv", ".tsv", ".parquet", ".arrow", ".feather", ".xls", ".xlsx", ".npy", ".pkl", ".pt", ".html", ".xml",
    ".yaml", ".yml", ".pdf", ".docx", ".rtf", ".zip", ".tar", ".tgz", ".bz2", ".xz", ".zst", ".7z",
)  # fmt: skip
BEGINNINGS = {  # of files that are something else, whatever they are called
    "packed twice": rb"\x1f\x8b",
    "packed with zstd, and gzip alone is read": rb"\x28\xb5\x2f\xfd",
    "packed with bzip2, and gzip alone is read": rb"BZh\d",
    "packed with xz, and gzip alone is read": rb"\xfd7zXZ",
    "a zip archive": rb"PK\x03\x04",
    "a Parquet file": rb"PAR1",
    "an Arrow file": rb"ARROW1",
    "a PDF file": rb"%PDF-",
    "an RTF file": rb"\{\\rtf",
    "a web page": rb"(\xef\xbb\xbf)?\s*<(!doctype html|html|\?xml)",
    "a pointer of Git LFS (git lfs pull fetches the file)": rb"version https://git-lfs",
    "UTF-16 or UTF-32": rb"\xff\xfe|\xfe\xff|\0\0\xfe\xff",
}
# keys of an entry, the first that it has
QUESTION, ANSWER = ("question", "prompt", "problem"), ("answer", "response", "completion")
THOUGHT = ("thinking", "reasoning_content", "reasoning")
TURNS = ("conversations", "messages", "conversation")
ROLES = {"human": "user", "prompter": "user"} | dict.fromkeys(("gpt", "model", "bot", "chatgpt"), "assistant")
FORMS = (
    'an entry is {"text": "..."}, or a trace: {"question", "thinking" or "reasoning_content", "answer"}, or'
    ' {"conversations" or "messages": [turns]}, a turn with from and value, or role and content; where no'
    " field is the thought's own, it is what the reply has before </think>"
)
_TAG = re.compile(r"<(/?)(?:think|thinking|thoughts?|reasoning)>|\[(/?)THINK\]", re.IGNORECASE)
_MARKER = r"<(?:\|[^|<>]*\||｜[^｜<>]*｜)>"  # of a turn, or an end, as a template writes them
_MARKERS = re.compile(rf"^\s*(?:{_MARKER}\s*)+|(?:\s*{_MARKER})+\s*$")
_OPENTHOUGHTS = re.compile(r"<\|begin_of_thought\|>(.*?)<\|end_of_thought\|>(.*)", re.DOTALL)
_SOLUTION = re.compile(r"<\|(?:begin|end)_of_solution\|>|</?answer>")
_said: dict[str, int] = {}  # rows of each source after which it was last said how many were left out


def read_texts(path: Path) -> Iterator[str]:
    """The texts of a file (see ``read_items``), traces as plain text."""
    return (item if isinstance(item, str) else plain(item) for item in read_items(path))


def read_traces(path: Path) -> Iterator[Trace]:
    """The traces of a file. UserError names an entry that is none."""
    for place, item in _located(Path(path)):
        if isinstance(item, str):
            raise UserError(f"{place} is no trace but a text: {FORMS}")
        yield item


def read_items(path: Path) -> Iterator[str | Trace]:
    """The texts and traces of a file (packed with gzip or not): the entries of JSON; of other text the
    stretches between blank lines.

    A file that begins with ``LINES`` lines without a blank one is read line by line: some copies of WikiText
    are like that. UserError names an entry that is neither, and a file that is no text, or holds none."""
    return (item for _, item in _located(Path(path)))


def hub_items(source: str) -> Iterator[str | Trace]:
    """The texts and traces of a data set on the hub, in its order."""
    name, files = source.removeprefix(sources.HUB), sources.dataset(source).files

    def rows() -> Iterator[tuple[str, object]]:
        for number, row in enumerate(sources.dataset_rows(source), 1):
            if files and set(row) == {"text"}:  # a line of a file
                entry = json_of(row["text"])
                row = entry if isinstance(entry, dict) or any(end in files.lower() for end in JSON) else row
            yield f"row {number} of {name}", row

    return (item for _, item in _items(rows(), name, ODD_SHARE))


def numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    """(number from 1, line) of a text file in UTF-8, packed with gzip or not, without a byte order mark;
    UserError if it is no whole text."""
    try:
        with path.open("rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
        if path.suffix.lower() == ".gz" and not packed:
            raise gzip.BadGzipFile
        opened = gzip.open if packed else open
        with opened(path, "rb") as file:
            begin = file.read(100)
        for kind, pattern in BEGINNINGS.items():
            if re.match(pattern, begin, re.IGNORECASE):
                raise UserError(f"{path.name} is {kind}: give plain text or JSONL in UTF-8")
        with opened(path, "rt", encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if "\0" in line:
                    raise UserError(
                        f"{path.name} is not text: line {number} holds a zero byte; give plain text or JSONL"
                        " in UTF-8"
                    )
                yield number, line
    except UnicodeDecodeError as error:  # which does not know where in the file it is
        with opened(path, "rb") as file:
            odd = (i for i, line in enumerate(file, 1) if line.decode(errors="ignore").encode() != line)
            raise not_utf8(path, f"{error.reason} in line {next(odd, 1)}") from None
    except (gzip.BadGzipFile, EOFError, zlib.error):
        raise UserError(f"{path.name} is not a whole gzip file: fetch it again") from None
    except FileNotFoundError:
        raise UserError(
            f"the file {path} does not exist: give a file of text, or of JSON with an entry a line"
        ) from None
    except OSError as error:
        raise UserError(f"the file {path} cannot be read: {error.strerror}") from None


def json_of(line: str):
    """What a line of JSON holds; None if it is damaged."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def json_entries(path: Path) -> Iterator[tuple[str, object]]:
    """("line 7 of x.jsonl", what it holds) of the lines of JSON; or of an array's entries."""
    lines = ((number, line) for number, line in numbered_lines(path) if line.strip())
    if (first := next(lines, None)) is None:
        return
    value = json_of(first[1])
    begins = value is None and first[1].lstrip().startswith(("[", "{"))
    if begins or (isinstance(value, list) and not _is_turns(value)):
        for number, entry in enumerate(_values(path, chain([first], lines)), 1):
            yield f"entry {number} of {path.name}", entry
        return
    for number, line in chain([first], lines):
        if (entry := json_of(line)) is None:
            raise UserError(
                f"line {number} of {path.name} is not whole JSON: every line must be one entry, in UTF-8"
            )
        yield f"line {number} of {path.name}", entry


def _values(path: Path, lines: Iterable[tuple[int, str]]) -> list:
    """The entries of an array, or the objects of a file, whatever lines they stretch over."""
    text, decoder, values, at = "".join(line for _, line in lines).rstrip(), json.JSONDecoder(), [], 0
    try:
        while at < len(text):
            value, at = decoder.raw_decode(text, re.compile(r"\s*").match(text, at).end())
            values.append(value)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path.name} is not whole JSON ({error}): write one entry a line (.jsonl)") from None
    return [entry for value in values for entry in (value if isinstance(value, list) else [value])]


def _located(path: Path) -> Iterator[tuple[str, str | Trace]]:
    """(where it stands, text or trace) of a file."""
    kind = Path(path.name.lower().removesuffix(".gz")).suffix
    if kind in OTHER:
        raise UserError(
            f"{path.name} is not read: give plain text, or JSON with an entry a line (.jsonl), packed with"
            " gzip or not"
        )
    first = next((line for _, line in numbered_lines(path) if line.strip()), None)
    if first is None:
        raise UserError(f"{path.name} holds no text")
    if kind in JSON or isinstance(json_of(first) or None, dict) or _is_array(path, first):
        return _items(json_entries(path), path.name)
    return _paragraphs(path)


def _is_array(path: Path, first: str) -> bool:
    """Whether a file that is not called JSON is some all the same, over several lines."""
    if not re.match(r"\s*(\[\s*(\{.*)?|\{\s*)$", first, re.DOTALL):
        return False
    try:
        return bool(_values(path, numbered_lines(path)))
    except UserError:
        return False


def _paragraphs(path: Path) -> Iterator[tuple[str, str]]:
    by_line, paragraph = False, []
    for number, line in numbered_lines(path):
        place = f"line {number} of {path.name}"
        if by_line and line.strip():
            yield place, line.rstrip("\n")
        elif line.strip():
            paragraph.append(line.rstrip("\n"))
            if by_line := len(paragraph) == number >= LINES:  # no blank line so far
                yield from ((place, text) for text in paragraph)
                paragraph = []
        elif paragraph:
            yield place, "\n".join(paragraph)
            paragraph = []
    if paragraph:
        yield place, "\n".join(paragraph)


def _items(
    entries: Iterable[tuple[str, object]], name: str, odd_share: float = 0.0
) -> Iterator[tuple[str, str | Trace]]:
    """(where it stands, text or trace) of entries, but for empty texts and rows without a thought; and, up to
    a share, but for rows of no form that is read."""
    rows, without, given, example, odd, first = 0, 0, 0, "", 0, None
    try:
        for place, entry in entries:
            rows += 1
            try:
                item = item_of(entry, place)
            except UserError as error:
                odd, first = odd + 1, first or error
                if odd > odd_share * max(rows, LINES):
                    raise
                continue
            if item is None:
                without, example = without + 1, example or place
                if without == rows == THOUGHTLESS:
                    break
            elif not isinstance(item, str) or item.strip():
                given += 1
                yield place, item
        if without and without == rows:
            raise UserError(f"{example} has no thought, nor has any other of {rows}: {FORMS}")
        if not given:
            raise first or UserError(f"{name} holds no text")
    finally:
        if odd and rows > _said.get(f"{name} odd", 0):
            _said[f"{name} odd"] = rows
            print(f"{name}: {odd:,} of {rows:,} rows are of another form and are left out", flush=True)
        if 0 < without < rows > _said.get(name, 0):
            _said[name] = rows
            print(f"{name}: {without:,} of {rows:,} rows have no whole thought and are left out", flush=True)


def item_of(entry, place: str) -> str | Trace | None:
    """The text or the trace in an entry; None for what would be a trace, if it had a thought. UserError for
    an entry of another form, and for half a surrogate pair, which is no character."""
    turns, text = _turns(entry), entry.get("text") if isinstance(entry, dict) else None
    parts = _fields(entry) if turns is None else _conversation(turns, place)
    if parts is None and not isinstance(text, str):
        raise UserError(f"{place} is not of a form that is read: {FORMS}")
    item = (parts and _trace(*parts)) or (text if isinstance(text, str) else None)
    try:
        (item if isinstance(item, str) else "".join(vars(item).values()) if item else "").encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):04x}"
        raise UserError(
            f"{place} holds half a surrogate pair ({half}), which is no character: mend it"
        ) from None
    return item


def _trace(question: str, thought: str, reply: str, model: str = "", source: str = "") -> Trace | None:
    """None if there is no question, or no whole thought, neither one of its own nor in the reply."""
    if re.search(r"</?think>", thought):
        thought = _split(thought if "</think>" in thought else f"{thought}</think>")[0]
    elif not thought.strip() or reply.lstrip().startswith(("<think>", "</think>")):
        inside, reply = _split(reply)
        thought = thought if thought.strip() else inside
    return Trace(question, thought, reply, model, source) if question.strip() and thought else None


def _split(reply: str) -> tuple[str, str]:
    """(thought, answer) of a reply, between OpenThoughts' or R1's tags, or others that mean the same; ("",
    reply) if it has no whole thought at its beginning, or more tags than that."""
    if match := _OPENTHOUGHTS.search(reply):
        thought, answer = match.groups()
    else:
        tagged = _MARKERS.sub("", reply if "</think>" in reply else _TAG.sub(r"<\1\2think>", reply))
        thought, close, answer = tagged.partition("</think>")
        thought = re.sub(r"^(\s*<think>)+", "", thought)  # a template may have written one more
        answer = re.sub(r"^(\s*</think>)+", "", answer)
        if not close or re.search(r"</?think>", thought + answer):
            return "", reply
    return thought.strip(), _SOLUTION.sub("", answer).strip()


def _fields(entry) -> tuple[str, str, str, str, str] | None:
    """(question, thought, reply, model, source) of an entry with fields for them; None if it has none."""
    if not isinstance(entry, dict):
        return None
    keys, optional = (QUESTION, THOUGHT, ANSWER, ("model",), ("source",)), {1: "", 3: "", 4: ""}
    known = ([entry[k] for k in names if entry.get(k) is not None] for names in keys)
    given = [values[0] if values else optional.get(i) for i, values in enumerate(known)]
    return tuple(given) if all(isinstance(value, str) for value in given) else None


def _turns(entry) -> list | None:
    """The turns of a conversation; None if an entry is none."""
    if isinstance(entry, dict):
        prompt, completion = entry.get("prompt"), entry.get("completion")
        both = prompt + completion if isinstance(prompt, list) and isinstance(completion, list) else None
        return next((entry[key] for key in TURNS if isinstance(entry.get(key), list)), both)
    return entry if _is_turns(entry) else None


def _is_turns(value) -> bool:
    turn = lambda t: isinstance(t, dict) and ("role" in t or "from" in t)
    return isinstance(value, list) and bool(value) and all(map(turn, value))


def _conversation(turns: list, place: str) -> tuple[str, str, str]:
    """(question, thought, reply) of a conversation: the first question, and the first reply to it."""
    question = ""
    for turn in turns:
        given = turn if isinstance(turn, dict) else {}
        role, said = (given.get(a) or given.get(b) for a, b in (("from", "role"), ("value", "content")))
        own = next((given[key] for key in THOUGHT if given.get(key)), "")
        if isinstance(said, list):  # in parts
            thoughts = [p for p in said if isinstance(p, dict) and p.get("type") in ("thinking", "reasoning")]
            own, said = own or _words(thoughts), _words([part for part in said if part not in thoughts])
        if not role or not all(isinstance(text, str) for text in (role, said or "", own)):
            raise UserError(
                f"{place} is a conversation with a turn that is not of a form that is read: {FORMS}"
            )
        role = ROLES.get(role.lower(), role.lower())
        if role == "user" and not question:
            question = said or ""
        elif role == "assistant" and question:
            return question, own, said or ""
    return question, "", ""


def _words(content) -> str:
    """The text of a turn's content: parts may have parts."""
    if isinstance(content, list):
        return "".join(map(_words, content))
    if isinstance(content, dict):
        keys = ("thinking", "text", "summary", "content")
        return _words(next((content[key] for key in keys if content.get(key)), ""))
    return content if isinstance(content, str) else ""
