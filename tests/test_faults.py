"""Nothing is lost when a run is killed, the disk fills up, a file is damaged, two runs meet, or the clock goes backwards.

Kills are real: SIGKILL to a process (``tests.kills``) at a random moment between its beginning and its end. ``python -m tests.faults``
counts the cases, by the marker ``fault``.
"""

import errno
import hashlib
import json
import os
import random
import shutil
import signal
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from toys import StopAt, toy_store

from lib import distill, results
from lib import harvest as harvest_module
from lib.results import Results, Run, UserError, alone, read_state, write_manifest, write_state, write_text
from lib.store import Store
from lib.training import TrainConfig, read_log, train
from tests import kills

KILLS = 8  # of each kind of work
TIMES = ("tokens_per_second", "waiting", "seconds")  # what a log says of the clock: the only thing that a kill may change


@pytest.fixture(scope="module")
def endpoint():
    """A chat server that answers each question in its own way, after some milliseconds; and how often it was asked."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"]))
            asked.append(hashlib.sha256(body).hexdigest())
            time.sleep(0.02)
            said = json.dumps({"label": asked[-1][:12], "category": "contrast", "confidence": 0.5})
            text = json.dumps({"choices": [{"message": {"role": "assistant", "content": said}}]}).encode()
            try:
                self.send_response(200)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)
            except OSError:
                pass  # whoever asked is dead

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1", asked
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def whole(tmp_path_factory, endpoint):
    """kind -> (what the work gives when nothing happens, seconds it took), each made once."""
    given = tmp_path_factory.mktemp("given")
    assert kills.finish(*kills.start("prepare", given, given)) == "done"
    made = {}

    def get(kind: str):
        if kind not in made:
            out = given / f"whole_{kind}"
            process, pipe = kills.start(kind, given, out, endpoint[0])
            began = time.monotonic()
            assert kills.finish(process, pipe) == "done"
            made[kind] = content(out), time.monotonic() - began
        return made[kind]

    get.given = given
    return get


def content(folder: Path) -> dict:
    """{name: bytes} of every file that a run leaves, but for locks and the unfinished files (hidden) of who was killed.

    Logs as lines without what they say of the clock. Of ``state.pt``, which a run keeps for itself to resume from, the values: torch
    writes a tensor that was loaded in other bytes than one that was computed.
    """
    found = {}
    for file in sorted(f for f in folder.rglob("*") if f.is_file() and f.suffix not in (".lock", ".part")):
        name = file.relative_to(folder).as_posix()
        found[name] = file.read_bytes()
        if file.name == "state.pt":
            found[name] = values(read_state(file))
        if file.name == "log.jsonl":
            lines = [json.loads(line) for line in file.read_text().splitlines()]
            found[name] = [{k: v for k, v in line.items() if k not in TIMES} for line in lines]
    return found


def values(part):
    """Nested dicts and lists with the bytes of tensors."""
    if isinstance(part, torch.Tensor):
        return tuple(part.shape), str(part.dtype), part.contiguous().numpy().tobytes()
    if isinstance(part, dict):
        return {key: values(value) for key, value in part.items()}
    return [values(p) for p in part] if isinstance(part, (list, tuple)) else part


def alike(found: dict, wanted: dict) -> None:
    assert sorted(found) == sorted(wanted)
    assert [name for name in wanted if found[name] != wanted[name]] == []


# --- kill -9 ---------------------------------------------------------------------------------------------------


def killed(kind: str, given: Path, out: Path, url: str, seconds: float, rng: random.Random) -> None:
    """Kill the work at a random moment; where it was over before, the draw is repeated from an earlier part of its time."""
    for attempt in range(12):
        process, pipe = kills.start(kind, given, out, url)
        process.join(rng.uniform(0, seconds * 0.8**attempt))
        process.kill()
        process.join()
        pipe.close()
        if process.exitcode == -signal.SIGKILL:
            return
        assert process.exitcode == 0
        shutil.rmtree(out)
    raise AssertionError(f"{kind} was always over before it was killed")


@pytest.mark.fault("kill")
@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, KILLS))])
@pytest.mark.parametrize("kind", sorted(kills.WORK))
def test_what_is_killed_resumes_to_the_same_bytes(kind, seed, whole, endpoint, tmp_path):
    """All artefacts byte for byte, no stray files; logs but for their clock. Of answers that were paid for, only the one under way is
    asked for again."""
    wanted, seconds = whole(kind)
    url, asked = endpoint
    out = tmp_path / "out"
    killed(kind, whole.given, out, url, seconds, random.Random(f"{kind}/{seed}"))
    answers, before = out / "answers.jsonl", len(asked)
    kept = len(answers.read_text().splitlines()) if answers.is_file() else 0
    assert kills.finish(*kills.start(kind, whole.given, out, url)) == "done"
    if kind == "labelling":  # a request of the dead may still have been under way
        assert len(asked) - before <= kills.QUESTIONS - kept + 1
    alike(content(out), wanted)
