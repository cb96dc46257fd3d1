"""Labels by a language model: against a server that answers what was planted, and a judge whose scores are
known beforehand.
"""

import json
import os
import re
import socket
import subprocess
import threading
import urllib.request
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from lib.crosscoder.codes import SplitCodes
from lib.features import naming as labelling
from lib.features.naming import (
    Endpoint,
    balanced_accuracy,
    label_features,
    read_label,
    read_numbers,
    score_labels,
    summary,
)
from lib.settings import UserError

GOOD = '{"label": "doubt", "category": "reflection", "confidence": 0.9}'
KEY = "key-that-must-not-be-written"


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    waits = []
    monkeypatch.setattr(labelling.time, "sleep", waits.append)
    return waits


class Fake:
    """A chat server. ``answer(messages)`` returns a text, a status (int), or (status, headers); ``asked`` are
    the conversations it got.
    """

    def __init__(self, answer):
        self.asked, self.headers, fake = [], [], self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                fake.asked.append((self.path, body))
                fake.headers.append(dict(self.headers))
                said = answer(body["messages"])
                status, headers = (
                    said if isinstance(said, tuple) else (said, {}) if isinstance(said, int) else (200, {})
                )
                content = (
                    {"choices": [{"message": {"role": "assistant", "content": said}}]}
                    if status == 200
                    else {"error": f"status {status}, you sent {self.headers.get('Authorization')}"}
                )
                text = json.dumps(content).encode()
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(text))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.handle_error = lambda *_: None  # a client that gave up is what some tests want
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(
            target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True
        ).start()


@pytest.fixture
def serve():
    made = []

    def start(answer, **options):
        made.append(Fake(answer))
        return made[-1], Endpoint(made[-1].url, "judge", **{"key": KEY, "timeout": 5.0, **options})

    yield start
    for fake in made:
        fake.server.shutdown()
        fake.server.server_close()


@pytest.mark.parametrize("refused", [(), ("max_tokens",), ("max_tokens", "temperature"), ("temperature",)])
def test_what_a_newer_model_refuses_is_renamed_or_left_out_once(monkeypatch, tmp_path, refused):
    bodies = []

    def post(url, json, **_):
        bodies.append(json)
        if odd := [name for name in refused if name in json]:
            told = f"Unsupported parameter: '{odd[0]}' is not supported with this model."
            return httpx.Response(400, json={"error": {"message": told, "code": "unsupported_parameter"}})
        return httpx.Response(200, json={"choices": [{"message": {"content": GOOD}}]})

    monkeypatch.setattr(labelling.httpx, "post", post)
    labels = label_features(contexts([1, 2, 3]), [1, 2, 3], tmp_path, Endpoint("http://here/v1", "new"))
    assert labels["label"].tolist() == ["doubt"] * 3 and len(bodies) == 3 + len(refused)
    wanted = {"max_completion_tokens" if "max_tokens" in refused else "max_tokens": 500}
    wanted |= {} if "temperature" in refused else {"temperature": 0}
    assert bodies[-1].items() >= wanted.items() and len(bodies[-1]) == 3 + len(wanted)


def contexts(features, n=2):
    rows = [(f, rank, f"text {rank} of «feature{f}»") for f in features for rank in range(1, n + 1)]
    return pd.DataFrame(rows, columns=["feature", "rank", "text"])


def in_turn(*answers):
    left = list(answers)
    return lambda messages: left.pop(0)


# --- reading answers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        GOOD,
        f"```json\n{GOOD}\n```",
        f"Sure! {{here}} it is:\n{GOOD}\nI hope {{this}} helps.",
        GOOD.replace("reflection", "Reflection").replace("0.9", '"0.9"'),
    ],
)
def test_a_label_is_read_whatever_stands_around_it(text):
    assert read_label(text) == ("doubt", "reflection", 0.9)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "doubt",
        "{",
        "{" * 2000,
        "[1]",
        GOOD[:-1],
        GOOD.replace("reflection", "poetry"),
        GOOD.replace("0.9", "90"),
        GOOD.replace("0.9", "NaN"),
        GOOD.replace("doubt", " "),
        GOOD.replace('"doubt"', "3"),
        '{"label": "doubt"}',
    ],
)
def test_what_is_no_label_is_not_read(text):
    assert read_label(text) is None


def test_numbers_are_read_from_the_last_list():
    assert (
        read_numbers("[3, 1]", 4) == [1, 3]
        and read_numbers("```json\n[2,\n 2]\n```", 4) == [2]
        and read_numbers("[]", 4) == []
    )
    assert read_numbers("Text [1] does not fit, so: [2, 4].", 4) == [2, 4]
    for wrong in ("2, 4", "[5]", "[0]", "[1.5]", "[one]", "", "[1, 2"):
        assert read_numbers(wrong, 4) is None, wrong


# --- the endpoint -------------------------------------------------------------------------------------------


def test_labels_and_what_is_sent(serve, tmp_path):
    fake, endpoint = serve(lambda messages: GOOD)
    # 99 never fires: it has no contexts
    table = label_features(contexts([7, 3]), [7, 3, 99], tmp_path, endpoint)
    assert table.to_dict("records") == [
        {
            "feature": f,
            "label": "doubt",
            "category": "reflection",
            "confidence": 0.9,
            "parsed": True,
            "raw": GOOD,
        }
        for f in (7, 3)
    ]
    path, body = fake.asked[0]
    assert path == "/v1/chat/completions" and body["model"] == "judge" and body["stream"] is False
    assert "1. text 1 of «feature7»\n2. text 2 of «feature7»" in body["messages"][0]["content"]
    assert fake.headers[0]["Authorization"] == f"Bearer {KEY}"


def test_one_reminder_then_the_answer_is_kept_raw(serve, tmp_path):
    fake, endpoint = serve(in_turn("no idea", GOOD, "no", "still no"))
    table = label_features(contexts([1, 2]), [1, 2], tmp_path, endpoint)
    assert table["parsed"].tolist() == [True, False] and table["raw"].tolist() == [GOOD, "still no"]
    assert table["label"].tolist() == ["doubt", ""] and np.isnan(table["confidence"][1])
    reminder = fake.asked[1][1]["messages"]
    assert [m["role"] for m in reminder] == ["user", "assistant", "user"] and reminder[1][
        "content"
    ] == "no idea"


def test_thoughts_are_not_the_answer(serve, tmp_path):
    _, endpoint = serve(lambda messages: f"<think>{GOOD.replace('doubt', 'draft')}</think>{GOOD}")
    assert label_features(contexts([1]), [1], tmp_path, endpoint)["label"].tolist() == ["doubt"]


def test_garbage_for_all_is_an_error_before_everything_is_asked(serve, tmp_path):
    fake, endpoint = serve(lambda messages: "I am a teapot")
    with pytest.raises(UserError, match="none of 20 answers of judge can be read .*teapot"):
        label_features(contexts(range(30)), range(30), tmp_path, endpoint)
    assert len(fake.asked) == 40
    with pytest.raises(UserError, match="none of 2 answers"):
        label_features(contexts(range(2)), range(2), tmp_path, endpoint)
    assert len(fake.asked) == 40  # these were asked before


def test_what_passes_is_tried_again(serve, tmp_path, no_waiting):
    fake, endpoint = serve(in_turn((429, {"Retry-After": "9"}), 503, 500, GOOD))
    assert label_features(contexts([1]), [1], tmp_path, endpoint)["parsed"].all()
    assert len(fake.asked) == 4 and no_waiting == [9.0, 4.0, 8.0]


def test_what_does_not_pass_is_an_error_that_keeps_the_answers(serve, tmp_path):
    fake, endpoint = serve(lambda messages: GOOD if "feature1" in messages[0]["content"] else 503)
    with pytest.raises(UserError, match="failed 5 times.*status 503.*kept"):
        label_features(contexts([1, 2]), [1, 2], tmp_path, endpoint)
    assert len(fake.asked) == 6 and len((tmp_path / "answers.jsonl").read_text().splitlines()) == 1


def test_a_server_that_does_not_answer_in_time(serve, tmp_path):
    release = threading.Event()
    _, endpoint = serve(lambda messages: release.wait(5) and GOOD, timeout=0.05)
    with pytest.raises(UserError, match="no answer within 0.05 s"):
        label_features(contexts([1]), [1], tmp_path, endpoint)
    release.set()


@pytest.mark.parametrize(
    "status, words",
    [(401, "refuses the key"), (404, "LABEL_MODEL"), (400, "status 400"), (302, "status 302")],
)
def test_a_mistake_of_the_user_is_said_at_once_and_without_the_key(serve, tmp_path, status, words):
    fake, endpoint = serve(lambda messages: (status, {"Location": "http://localhost:1/"}))
    with pytest.raises(UserError, match=words) as error:
        label_features(contexts([1]), [1], tmp_path, endpoint)
    assert len(fake.asked) == 1 and KEY not in str(error.value)


def test_no_server_and_another_server(serve, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(UserError, match="nothing answers"):
        label_features(contexts([1]), [1], tmp_path, Endpoint(f"http://127.0.0.1:{port}/v1", "judge"))
    _, endpoint = serve(lambda messages: None)
    with pytest.raises(UserError, match="none of 1 answers"):  # content null: an empty answer
        label_features(contexts([1]), [1], tmp_path, endpoint)
    for body in (b"<html>", b"{}", b'{"choices": []}', b"[]", b"\xff"):
        with pytest.raises(UserError, match="not as an OpenAI-compatible"):
            labelling._content(body, endpoint)


def test_a_run_goes_on_where_it_stopped(serve, tmp_path):
    fake, endpoint = serve(lambda messages: GOOD)
    label_features(contexts([1, 2]), [1, 2], tmp_path, endpoint)
    file = tmp_path / "answers.jsonl"
    file.write_text(file.read_text()[:-20])  # cut within the second line
    numbers = [1, 2, 3]
    first = label_features(contexts(numbers), numbers, tmp_path, endpoint)
    assert len(fake.asked) == 4 and "feature2" in str(fake.asked[2]) and "feature3" in str(fake.asked[3])
    pd.testing.assert_frame_equal(label_features(contexts(numbers), numbers, tmp_path, endpoint), first)
    assert len(fake.asked) == 4
    other = Endpoint(endpoint.url, "another")
    label_features(contexts([1]), [1], tmp_path, other)
    # another model is asked anew, without a key
    assert len(fake.asked) == 5 and "Authorization" not in fake.headers[4]


def test_the_key_is_in_no_file_and_no_text(serve, tmp_path):
    _, endpoint = serve(lambda messages: GOOD)
    label_features(contexts([1]), [1], tmp_path, endpoint)
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert files and not any(KEY in p.read_text() for p in files) and KEY not in repr(endpoint)


def test_endpoint_from_the_environment(monkeypatch, tmp_path):
    for name in ("LABEL_URL", "LABEL_MODEL", "LABEL_KEY"):
        monkeypatch.delenv(name, raising=False)
    assert labelling.endpoint_from_environment() is None
    with pytest.raises(UserError, match="set LABEL_URL"):
        label_features(contexts([1]), [1], tmp_path, None)
    monkeypatch.setenv("LABEL_URL", "http://localhost:8000/v1 ")
    with pytest.raises(UserError, match="LABEL_MODEL is not set"):
        labelling.endpoint_from_environment()
    monkeypatch.setenv("LABEL_MODEL", "m")
    monkeypatch.setenv("LABEL_KEY", KEY + "\n")
    assert labelling.endpoint_from_environment(timeout=3.0) == Endpoint(
        "http://localhost:8000/v1", "m", KEY, 3.0
    )
    monkeypatch.setenv("LABEL_KEY", "two words")
    with pytest.raises(UserError, match="LABEL_KEY") as error:
        labelling.endpoint_from_environment()
    assert "two words" not in str(error.value)
    with pytest.raises(UserError, match="such as http"):
        Endpoint("localhost:8000", "m")


# --- scores -------------------------------------------------------------------------------------------------


def judged(n_features, k=4):
    """Texts of feature f that fires hold the word "word<f>", silent ones do not; the first of the firing
    texts of feature 0 lacks it.
    """
    rows = []
    for f in range(n_features):
        for i in range(2 * k):
            fires = i % 2 == 0
            rows.append(
                (
                    f,
                    100 * f + i,
                    i,
                    fires,
                    f"{f} {i} " + (f"word{f}" if fires and (f, i) != (0, 0) else "nothing"),
                )
            )
    return pd.DataFrame(rows, columns=labelling.JUDGED)


def rule(messages):
    """Picks the texts that hold the label as a word."""
    label = re.search(r"described as: (\S+)", messages[0]["content"])[1]
    return str(
        [
            int(i)
            for i, text in re.findall(r"^(\d+)\. (.*)$", messages[0]["content"], re.MULTILINE)
            if label in text.split()
        ]
    )


def labelled(words):
    rows = [(f, w, "none", 0.5, w != "", "") for f, w in enumerate(words)]
    return pd.DataFrame(rows, columns=labelling.LABELLED)


def test_balanced_accuracy_by_hand():
    fires = np.array([True, False, True, False, False])
    assert balanced_accuracy(fires, [1, 2]) == pytest.approx((1 / 2 + 2 / 3) / 2)
    assert (
        balanced_accuracy(fires, []) == 0.5
        and balanced_accuracy(fires, [1, 3]) == 1
        and balanced_accuracy(fires, [2, 4, 5]) == 0
    )
    assert np.isnan(balanced_accuracy(fires, None)) and np.isnan(balanced_accuracy(np.array([True]), [1]))


def test_scores_of_a_judge_that_follows_a_rule(serve, tmp_path):
    fake, endpoint = serve(rule)
    scores = score_labels(labelled([f"word{f}" for f in range(6)]), judged(6), tmp_path, endpoint, seed=1)
    assert scores["score"].tolist() == [0.875, 1, 1, 1, 1, 1]  # feature 0: three of four found, none too many
    assert scores["control"].tolist() == [0.5] * 6  # another's word stands in none of the texts
    assert sorted(scores["other"]) == list(range(6)) and (scores["other"] != scores["feature"]).all()
    assert len(fake.asked) == 12
    table = summary(scores)
    assert table.loc["own label", "value"] == pytest.approx(5.875 / 6) and table.loc["difference", "n"] == 6
    assert table.loc["difference", "low"] > 0.4 and table.loc[
        "another's label", ["low", "high"]
    ].tolist() == [0.5, 0.5]
    pd.testing.assert_frame_equal(
        score_labels(labelled([f"word{f}" for f in range(6)]), judged(6), tmp_path, endpoint, seed=1), scores
    )
    assert len(fake.asked) == 12


def test_a_judge_that_guesses_scores_one_half_with_both_labels(serve, tmp_path):
    rng = np.random.default_rng(0)
    _, endpoint = serve(lambda messages: str((np.flatnonzero(rng.random(8) < 0.5) + 1).tolist()))
    table = summary(score_labels(labelled([f"word{f}" for f in range(60)]), judged(60), tmp_path, endpoint))
    assert (table["low"] - 0.02 < [0.5, 0.5, 0]).all() and (table["high"] + 0.02 > [0.5, 0.5, 0]).all()
    assert (table["high"] - table["low"]).max() < 0.2


def test_what_has_no_label_or_no_readable_answer_is_left_out_of_means(serve, tmp_path):
    _, endpoint = serve(lambda messages: "well" if "described as: word1" in str(messages) else rule(messages))
    scores = score_labels(labelled(["word0", "word1", "word2", ""]), judged(4), tmp_path, endpoint)
    assert scores["feature"].tolist() == [0, 1, 2] and scores["parsed"].tolist() == [True, False, True]
    assert scores["parsed_control"].sum() == 2 and np.isnan(scores["score"][1])
    assert summary(scores).loc["own label", ["value", "n"]].tolist() == [0.9375, 2]
    alone = score_labels(labelled(["word0"]), judged(1), tmp_path, endpoint)
    assert alone["other"].tolist() == [-1] and np.isnan(summary(alone).loc["difference", "value"])


# --- what is shown ------------------------------------------------------------------------------------------


class Words:
    """A tokenizer whose pieces carry their own spaces, as those of real models do; token 9 is half a
    character.
    """

    pieces = ["<s>", " so", " the", " answer", "s", ",", "\n", " 7", " wait", "\ufffd"]

    def decode(self, ids, **_):
        return re.sub("\ufffd\ufffd", "é", "".join(self.pieces[i] for i in ids))

    def convert_ids_to_tokens(self, ids):
        return [self.pieces[i] for i in ids]


class Texts:
    """The part of a store that is needed: documents of 60 tokens, traces (kind 1) and general text (0) by
    turns.
    """

    def __init__(self, n=40, length=60):
        rng = np.random.default_rng(3)
        self.tokens = rng.integers(1, 8, n * length).astype(np.int32)
        self.documents, self.positions = np.repeat(np.arange(n), length), np.tile(np.arange(length), n)
        self.labels = {
            "kind": (self.documents % 2).astype(np.int8),
            "label": np.full(n * length, -1, dtype=np.int8),
        }

    def __len__(self):
        return len(self.tokens)


def test_an_excerpt_marks_the_token_and_no_space():
    store = Texts(1, 6)
    store.tokens[:] = [0, 1, 2, 3, 4, 6]
    shown = [labelling.excerpt(store, Words(), row, marked=True) for row in range(6)]
    assert shown[0] == "«<s>» so the answers⏎" and shown[1] == "<s> «so» the answers⏎"
    assert shown[4] == "<s> so the answer«s»⏎" and shown[5] == "<s> so the answers«⏎»"
    assert labelling.excerpt(store, Words(), 1, marked=False) == "<s> so the answers⏎"
    store.tokens[:2] = 9  # the first half is not the beginning of the whole: token by token instead
    assert labelling.excerpt(store, Words(), 0, marked=True).startswith("«\ufffd» \ufffd  the")


def planted(store):
    """Feature 0 fires on every token 7 of even documents, feature 1 never, feature 2 everywhere."""
    values = np.zeros((len(store), 3), dtype=np.float32)
    values[(store.tokens == 7) & (store.documents % 4 < 2) & (store.positions > 30), 0] = 1.0
    values[:, 2] = 1.0
    return SplitCodes(np.arange(len(store)), sparse.csr_matrix(values))


def test_texts_to_judge_are_balanced_matched_and_truly_silent():
    store = Texts()
    coded = planted(store)
    table = labelling.contexts_to_judge(store, coded, Words(), [0, 1, 2], k=5, seed=4)
    # 1 never fires, 2 is never silent
    assert set(table["feature"]) == {0} and table["fires"].sum() == 5 and len(table) == 10
    assert (
        table["text"].is_unique
        and table[table["fires"]]["document"].is_unique
        and not table["text"].str.contains("«").any()
    )
    kind = store.labels["kind"][table["row"]]
    assert sorted(kind[table["fires"]]) == sorted(kind[~table["fires"]])
    fired = np.asarray(coded.codes[:, [0]].todense()).ravel() > 0
    for row in table.itertuples():
        near = [
            r
            for r in range(row.row - labelling.BEFORE, row.row + labelling.AFTER + 1)
            if 0 <= r < len(store) and store.documents[r] == store.documents[row.row]
        ]
        assert fired[row.row] if row.fires else not fired[near].any()
    assert not table["fires"].is_monotonic_decreasing and not table["fires"].is_monotonic_increasing
    pd.testing.assert_frame_equal(
        table, labelling.contexts_to_judge(store, coded, Words(), [2, 0], k=5, seed=4)
    )
    assert not table["row"].equals(
        labelling.contexts_to_judge(store, coded, Words(), [0], k=5, seed=5)["row"]
    )


def test_texts_to_label_are_the_strongest():
    store = Texts()
    table = labelling.contexts_to_label(store, planted(store), Words(), [0], n=3)
    assert table["rank"].tolist() == [1, 2, 3] and (store.tokens[table["row"]] == 7).all()
    assert table["text"].str.contains(" «7»").all() and (table["text"].str.count("«") == 1).all()


@pytest.mark.slow
def test_against_transformers_serve(tmp_path):
    """The real server: TRANSFORMERS_SERVE names its executable (of an environment with
    transformers[serving]), SERVED_MODEL a folder.
    """
    program, model = os.environ.get("TRANSFORMERS_SERVE"), os.environ.get("SERVED_MODEL")
    if not program or not model:
        pytest.skip(
            "set TRANSFORMERS_SERVE to the program transformers and SERVED_MODEL to the folder of a chat"
            " model"
        )
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [program, "serve", model, "--port", str(port), "--device", "cpu"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        for _ in range(120):
            with suppress(OSError):
                urllib.request.urlopen(f"http://localhost:{port}/health", timeout=1)
                break
            threading.Event().wait(1)  # time.sleep is taken
        endpoint = labelling.Endpoint(f"http://localhost:{port}/v1", model, max_tokens=12, timeout=300.0)
        read = lambda text: text or None  # noqa: E731
        questions = [(prompt, "Say it again.", read) for prompt in ("Say hello.", "What is 2 + 2?")]
        asked = (questions, tmp_path, endpoint)
        first = labelling._ask_all("asked", *asked)
        assert all(isinstance(answer, str) and answer == raw for answer, raw in first)
        # an answer that is no label, and is said to be none
        with pytest.raises(UserError, match="can be read"):
            labelling._ask_all("asked", [("Say hello.", "Again.", labelling.read_label)], tmp_path, endpoint)
    finally:
        server.terminate()
        server.wait(30)
    assert labelling._ask_all("asked", *asked) == first  # from the file: nobody answers any more
    with pytest.raises(UserError, match="nothing answers at"):
        labelling._ask_all("asked", [("Something new.", "Again.", read)], tmp_path, endpoint)
