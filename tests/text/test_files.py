"""Files of texts and traces: the forms that are read, what is left out and said, and what gets a sentence."""

import bz2
import gzip
import json
import lzma

import pytest

from lib.settings import UserError
from lib.text import files
from lib.text.chat import Trace
from lib.text.files import read_items, read_texts, read_traces

THOUGHT, ASKED = "Start with 10. Wait, is it 3?\n\nSo it is 7.", "How many are left?"
TRACE = Trace(ASKED, THOUGHT, "7")
FIELDS = {"question": ASKED, "thinking": THOUGHT, "answer": "7"}
TAGGED = f"<think>\n{THOUGHT}\n</think>\n\n7"


def turns(reply=TAGGED, who="role", what="content", names=("user", "assistant"), **more):
    return [{who: names[0], what: ASKED}, {who: names[1], what: reply, **more}]


FORMS = {
    "fields": FIELDS,
    "reasoning_content": {"question": ASKED, "reasoning_content": THOUGHT, "answer": "7"},
    "a prompt and a response with its thought": {"prompt": ASKED, "response": TAGGED},
    "from and value": {"conversations": turns(TAGGED, "from", "value", ("human", "gpt"))},
    "role and content": {"conversations": turns()},
    "messages": {"messages": [{"role": "system", "content": "Be brief."}, *turns()]},
    "the closing tag alone": {"messages": turns(f"{THOUGHT}\n</think>\n\n7")},
    "OpenThoughts": {
        "conversations": turns(
            f"<|begin_of_thought|>\n\n{THOUGHT}\n\n<|end_of_thought|>\n\n<|begin_of_solution|>\n\n7\n\n"
            "<|end_of_solution|>"
        )
    },
    "messages with reasoning_content": {"messages": turns("7", reasoning_content=THOUGHT)},
    "reasoning_content and an empty thought before it": {
        "messages": turns("<think>\n\n</think>\n\n7", reasoning_content=THOUGHT)
    },
    "parts": {"messages": turns([{"type": "thinking", "thinking": THOUGHT}, {"type": "text", "text": "7"}])},
    "parts of another make": {
        "messages": turns([{"type": "reasoning", "text": THOUGHT}, {"type": "output_text", "text": "7"}])
    },
    "parts within parts": {
        "messages": turns([{"type": "thinking", "thinking": [{"type": "text", "text": THOUGHT}]}, "7"])
    },
    "a summary": {"messages": turns([{"type": "reasoning", "summary": [{"text": THOUGHT}]}, {"text": "7"}])},
    "thinking": {"messages": turns(f"<thinking>\n{THOUGHT}\n</thinking>\n\n7")},
    "Thought": {"messages": turns(f"<Thought>{THOUGHT}</Thought>7")},
    "reasoning, and tags of the answer": {
        "messages": turns(f"<reasoning>{THOUGHT}</reasoning>\n<answer>7</answer>")
    },
    "[THINK]": {"messages": turns(f"[THINK]{THOUGHT}[/THINK]7")},
    "an opening tag of the template's, too": {"messages": turns(f"<think>\n{TAGGED}")},
    "a closing tag twice": {"messages": turns(f"<think>{THOUGHT}</think></think>7")},
    "markers of turns": {"messages": turns(f"<｜Assistant｜>{TAGGED}<｜end▁of▁sentence｜>")},
    "a marker at the end": {"messages": turns(f"{TAGGED}<|im_end|>\n")},
    "tags around a thought of its own": {**FIELDS, "thinking": f"<think>{THOUGHT}</think>"},
    "a list of turns": turns(),
    "prompt and completion": {"prompt": turns()[:1], "completion": turns()[1:]},
    "a second question": {"messages": turns() + turns("<think>no</think>no")},
    "a text beside it": {"text": "templated", "messages": turns()},
}
THOUGHTLESS = {
    "no thought": {"messages": turns("7")},
    "cut within its thought": {"messages": turns(f"<think>\n{THOUGHT}")},
    "an empty thought": {"messages": turns("<think>\n\n</think>\n\n7")},
    "an empty field": {**FIELDS, "thinking": "", "answer": "7"},
    "no question": {"messages": turns()[1:]},
    "words before the tag": {"messages": turns(f"Sure. {TAGGED}")},
    "a thought within a thought": {"messages": turns("<think>a <think>b</think> c</think>7")},
    "a second thought": {"messages": turns(f"{TAGGED}<think>Or 8?</think>8")},
    "a call of a tool": {"messages": [turns()[0], {"role": "assistant", "content": None}, turns()[1]]},
}


def jsonl(*entries) -> str:
    return "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)


@pytest.mark.parametrize("form", FORMS)
def test_a_trace_is_read_in_every_form(tmp_path, form):
    (tmp_path / "a.jsonl").write_text(jsonl(FORMS[form]))
    assert list(read_items(tmp_path / "a.jsonl")) == list(read_traces(tmp_path / "a.jsonl")) == [TRACE]


@pytest.mark.parametrize("lack", THOUGHTLESS)
def test_rows_without_a_thought_are_left_out_and_counted(tmp_path, capsys, lack):
    (tmp_path / f"{lack}.jsonl").write_text(jsonl(THOUGHTLESS[lack], FIELDS, FIELDS))
    for _ in range(2):
        assert list(read_items(tmp_path / f"{lack}.jsonl")) == [TRACE, TRACE]
    assert capsys.readouterr().out == (
        f"{lack}.jsonl: 1 of 3 rows have no whole thought and are left out\n"  # once
    )
    (tmp_path / "b.jsonl").write_text(jsonl(*[THOUGHTLESS[lack]] * 2))
    with pytest.raises(
        UserError, match="line 1 of b.jsonl has no thought, nor has any other of 2: an entry is"
    ):
        list(read_items(tmp_path / "b.jsonl"))


def test_a_stream_without_thoughts_is_not_read_to_its_end(monkeypatch):
    monkeypatch.setattr(files, "THOUGHTLESS", 20)
    read = []
    rows = ({"messages": turns("7")} for _ in range(10**9) if not read.append(1))
    monkeypatch.setattr(files.sources, "dataset_rows", lambda source: rows)
    with pytest.raises(UserError, match="row 1 of org/name has no thought, nor has any other of 20"):
        list(files.hub_items("hub:org/name"))
    assert len(read) == 20


def test_all_that_a_trace_says_of_itself_is_kept(tmp_path):
    made = [Trace("How many – exactly?", "First.\n\nWait.", "12", "teacher", "book"), TRACE]
    (tmp_path / "a.jsonl").write_text(jsonl(*map(vars, made)), encoding="utf-8")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    for name in ("a.jsonl", "a.jsonl.gz"):
        assert list(read_traces(tmp_path / name)) == made


LINES = jsonl(*[FIELDS] * 30)
PACKAGES = {  # name of the file: its bytes; each holds 30 traces
    "bom.jsonl": b"\xef\xbb\xbf" + LINES.encode(),
    "bom.jsonl.gz": gzip.compress(b"\xef\xbb\xbf" + LINES.encode()),
    "blank.jsonl": b"\n" + LINES.replace("\n", "\n\n").encode() + b"  \n\n",
    "windows.jsonl": LINES.replace("\n", "\r\n").encode(),
    "CAPITALS.JSONL": LINES.encode(),
    "CAPITALS.JSONL.GZ": gzip.compress(LINES.encode()),
    "packed.jsonl": gzip.compress(LINES.encode()),  # whatever it is called
    "array.json": json.dumps([FIELDS] * 30, indent=2).encode(),
    "array_on_a_line.jsonl": json.dumps([FIELDS] * 30).encode(),
    "array_of_lists.json": json.dumps([turns()] * 30).encode(),
    "over_several_lines.jsonl": "\n".join([json.dumps(FIELDS, indent=2)] * 30).encode(),
    "lines.ndjson": LINES.encode(),
    "lines.json": LINES.encode(),
    "lines.txt": LINES.encode(),
    "array.txt": json.dumps([FIELDS] * 30, indent=2).encode(),
    "array_without_an_ending": json.dumps([FIELDS] * 30).encode(),
}


@pytest.mark.parametrize("name", PACKAGES)
def test_json_is_read_as_json_however_it_is_packed(tmp_path, name):
    (tmp_path / name).write_bytes(PACKAGES[name])
    assert list(read_items(tmp_path / name)) == list(read_traces(tmp_path / name)) == [TRACE] * 30


def test_plain_text_stays_text(tmp_path):
    for text in ("[1] A footnote.", "{a set}", "[\n\n", "{\n  int x;\n}"):
        (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
        assert "\n\n".join(read_texts(tmp_path / "a.txt")) == text.strip()


REFUSED = {  # name of the file: its bytes, and what is said
    "latin1.jsonl": (jsonl({"text": "café"}).encode("latin-1"), "is not UTF-8 text"),
    "latin1_further_down.jsonl": (
        (LINES + jsonl({"text": "café"})).encode("latin-1"),
        "invalid continuation byte in line 31",
    ),
    "utf16.jsonl": (LINES.encode("utf-16"), "is UTF-16 or UTF-32: give plain text or JSONL in UTF-8"),
    "utf32.txt": ("words".encode("utf-32"), "is UTF-16 or UTF-32"),
    "twice.jsonl.gz": (gzip.compress(gzip.compress(LINES.encode())), "is packed twice"),
    "packed.txt": (bz2.compress(LINES.encode()), "is packed with bzip2, and gzip alone is read"),
    "packed_otherwise.txt": (lzma.compress(LINES.encode()), "is packed with xz"),
    "zstd.jsonl": (b"\x28\xb5\x2f\xfd" + bytes(40), "is packed with zstd"),
    "zip.jsonl": (b"PK\x03\x04" + bytes(40), "is a zip archive"),
    "parquet.jsonl": (b"PAR1" + bytes(40), "is a Parquet file"),
    "page.txt": (b"\n<!DOCTYPE html>\n<html>404</html>", "is a web page"),
    "page.jsonl": (b"<html><body>Sign in</body></html>", "is a web page"),
    "pdf.txt": (b"%PDF-1.4\nwords", "is a PDF file"),
    "rich.txt": (b"{\\rtf1\\ansi words}", "is an RTF file"),
    "pointer.txt": (b"version https://git-lfs.github.com/spec/v1\n", "is a pointer of Git LFS"),
    "garbage.jsonl.gz": (gzip.compress(LINES.encode()) + b"garbage", "is not a whole gzip file"),
    "trailing.jsonl": (LINES.encode() + b"\0\0", "line 31 holds a zero byte"),
    "nothing.json": (b"[]", "nothing.json holds no text"),
    "blank.jsonl": (jsonl({"text": ""}, {"text": " "}).encode(), "blank.jsonl holds no text"),
    "commas.jsonl": (LINES.replace("\n", ",\n").encode(), "commas.jsonl is not whole JSON"),
    "quotes.jsonl": (str(FIELDS).encode(), "quotes.jsonl is not whole JSON"),
    "comment.jsonl": (b"# made by\n" + LINES.encode(), "line 1 of comment.jsonl is not whole JSON"),
    "twice_encoded.jsonl": (
        jsonl(json.dumps(FIELDS)).encode(),
        "line 1 of twice_encoded.jsonl is not of a form",
    ),
    "utf16.txt": ("words".encode("utf-16-le"), "is not text: line 1 holds a zero byte"),
    "cut.jsonl.gz": (gzip.compress(LINES.encode())[:-20], "is not a whole gzip file: fetch it again"),
    "empty.jsonl.gz": (b"", "is not a whole gzip file"),
    "empty.jsonl": (b"\n \n", "holds no text"),
    "surrogate.jsonl": (
        b'{"text": "a"}\n{"text": "\\ud83d"}\n',
        r"line 2 of surrogate.jsonl holds half a .*\\ud83d",
    ),
    "surrogate_in_a_trace.jsonl": (
        jsonl(FIELDS).replace("7", "\\udc00").encode(),
        "line 1 .* half a surrogate",
    ),
    "cut_array.json": (json.dumps([FIELDS] * 3, indent=1).encode()[:-40], "cut_array.json is not whole JSON"),
    "wrapped.json": (json.dumps({"data": [FIELDS]}).encode(), "line 1 of wrapped.json is not of a form"),
    "columns.json": (json.dumps({"text": ["a", "b"]}, indent=1).encode(), "entry 1 of columns.json is not"),
    "words.jsonl": (b"anna is late\n", "line 1 of words.jsonl is not whole JSON"),
    "null.jsonl": (b'{"text": "a"}\nnull\n', "line 2 of null.jsonl is not whole JSON"),
    "table.csv": (b"question,thinking\na,b\n", "table.csv is not read: give plain text, or JSON"),
    "table.CSV.gz": (gzip.compress(b"a,b\n"), "is not read"),
}


@pytest.mark.fault("bad input")
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_read_gets_a_sentence_from_every_reader(tmp_path, name):
    content, words = REFUSED[name]
    (tmp_path / name).write_bytes(content)
    for read in (read_items, read_texts, read_traces):
        if read is read_traces and b'"text": "a"' in content:
            words = "line 1 .* is no trace but a text"
        with pytest.raises(UserError, match=words):
            list(read(tmp_path / name))


@pytest.mark.parametrize(
    "entry",
    [
        {"question": None, "thinking": "t", "answer": "a"},
        {"question": "q", "thinking": ["t"], "answer": "a"},
        {"question": "q", "thinking": "t", "answer": 12},
        {"question": "q", "thinking": "t"},
        {"messages": [{"role": "user", "content": {"a": 1}}]},
        {"messages": [{"content": "who says so?"}]},
        ["q", "t", "a"],
        "q t a",
    ],
)
def test_an_entry_of_another_form_is_named(tmp_path, entry):
    (tmp_path / "a.jsonl").write_text(jsonl(FIELDS, entry))
    with pytest.raises(UserError, match="line 2 of a.jsonl is .* form that is read: an entry is"):
        list(read_items(tmp_path / "a.jsonl"))


def test_a_file_that_is_not_there(tmp_path):
    for read in (read_items, read_texts, read_traces):
        with pytest.raises(UserError, match="none.jsonl does not exist"):
            list(read(tmp_path / "none.jsonl"))
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        list(read_items(tmp_path))


def test_a_few_rows_of_the_hub_without_a_form_are_left_out(monkeypatch, capsys):
    rows = [{"text": f"text {i}"} for i in range(300)]
    rows[7] = rows[250] = {"other": 3}
    monkeypatch.setattr(files.sources, "dataset_rows", lambda source: rows)
    found = list(files.hub_items("hub:org/odd"))
    assert len(found) == 298 and "text 7" not in found
    assert "org/odd: 2 of 300 rows are of another form and are left out" in capsys.readouterr().out
    rows[8] = rows[9] = {"other": 3}
    with pytest.raises(UserError, match="row 9 of org/odd is not of a form that is read"):
        list(files.hub_items("hub:org/odd"))
