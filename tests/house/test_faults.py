"""Nothing is lost when a run is killed, the disk fills up, a file is damaged, two runs meet, or the clock
goes backwards.

Kills are real: SIGKILL to a process (``tests.kills``) at a random moment between its beginning and its end.
``python -m tests.faults`` counts the cases, by the marker ``fault``.
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
from filelock import FileLock, Timeout

from lib import runs as results
from lib.activations.store import Store
from lib.runs import read_state, write_state, write_text
from lib.settings import UserError
from tests import kills

KILLS = 8  # of each kind of work
# what a log says of the clock: the only thing that a kill may change
TIMES = ("tokens_per_second", "waiting", "seconds")


@pytest.fixture(scope="module")
def endpoint():
    """A chat server that answers each question in its own way, after some milliseconds; and how often it was
    asked.
    """
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
    """{name: bytes} of every file that a run leaves, but for locks and the unfinished files (hidden) of who
    was killed.

    Logs as lines without what they say of the clock. Of ``state.pt``, which a run keeps for itself to resume
    from, the values: torch writes a tensor that was loaded in other bytes than one that was computed.
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


# --- kill -9 ------------------------------------------------------------------------------------------------


def killed(kind: str, given: Path, out: Path, url: str, seconds: float, rng: random.Random) -> None:
    """Kill the work at a random moment; where it was over before, the draw is repeated from an earlier part
    of its time.
    """
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
@pytest.mark.parametrize(
    "seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, KILLS))]
)
@pytest.mark.parametrize("kind", sorted(kills.WORK))
def test_what_is_killed_resumes_to_the_same_bytes(kind, seed, whole, endpoint, tmp_path):
    """All artefacts byte for byte, no stray files; logs but for their clock. Of answers that were paid for,
    only the one under way is asked for again."""
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


# --- the disk -----------------------------------------------------------------------------------------------

# bytes a file; less than the largest of each
LIMITS = {"distilling": 6_000, "harvesting": 9_000, "training": 6_000, "labelling": 1_500}


@pytest.mark.fault("fault")
@pytest.mark.parametrize("kind", sorted(kills.WORK))
def test_a_disk_that_takes_no_more_is_named_and_what_was_finished_goes_on(kind, whole, endpoint, tmp_path):
    """The system itself refuses to let files grow; the sentence says so, no file is half there, and with room
    the run ends as usual.
    """
    wanted, _ = whole(kind)
    out = tmp_path / "out"
    said = kills.finish(*kills.start(kind, whole.given, out, endpoint[0], file_bytes=LIMITS[kind]))
    assert said.startswith("UserError: ") and ("may not grow so large" in said or "full" in said), said
    partly = {
        name: data
        for name, data in content(out).items()
        if name in wanted and name not in ("answers.jsonl", "state.pt")
    }
    assert all(data == wanted[name] or name.endswith("log.jsonl") for name, data in partly.items())
    assert not list(out.rglob("*.part"))
    assert kills.finish(*kills.start(kind, whole.given, out, endpoint[0])) == "done"
    found = content(out)
    if kind == "labelling":  # the line that the disk cut short stays, and is passed over
        known = [line for line in found.pop("answers.jsonl").split(b"\n") if line.endswith(b"}")]
        assert len(known) == kills.QUESTIONS
        wanted = {name: data for name, data in wanted.items() if name != "answers.jsonl"}
    alike(found, wanted)


@pytest.mark.fault("fault")
@pytest.mark.parametrize(
    "code, words",
    ((errno.ENOSPC, "the disk is full"), (errno.EROFS, "read-only"), (errno.EACCES, "may not write")),
)
@pytest.mark.parametrize(
    "write", (lambda path: write_text(path, "new"), lambda path: write_state(path, {"a": torch.zeros(2)}))
)
def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch, write, code, words):
    (tmp_path / "file").write_text("old")

    def refuse(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(results.os, "replace", refuse)
    with pytest.raises(UserError, match=words):
        write(tmp_path / "file")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("file", "old")]


@pytest.mark.fault("fault")
def test_a_run_that_ends_at_any_rename_leaves_whole_files_only(whole, tmp_path, monkeypatch):
    """A harvest that breaks off before its first, second, third ... file appears: what is there is as in the
    end, and it goes on to that.
    """
    wanted, _ = whole("harvesting")
    replace, ended = os.replace, False

    class Broken(BaseException):
        pass

    for number in range(0, 60, 7):
        seen, out = [], tmp_path / str(number)

        def broken(source, target, number=number, seen=seen):
            seen.append(target)
            if len(seen) > number:
                raise Broken
            replace(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", broken)
            try:
                kills.harvesting(whole.given, out)
                ended = True
            except Broken:
                assert not (out / "manifest.json").exists()
        found = content(out)
        assert all(found[name] == wanted[name] for name in found if name in wanted and name != "log.jsonl")
        kills.harvesting(whole.given, out)
        alike(content(out), wanted)
    assert ended, "the last one was not broken off: all renames were tried"


# --- damaged files ------------------------------------------------------------------------------------------


def flipped(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


DAMAGE = {
    "cut": lambda file: file.write_bytes(file.read_bytes()[:-7]),
    "one bit": flipped,
    "missing": lambda file: file.unlink(),
    "empty": lambda file: file.write_bytes(b""),
}


@pytest.mark.fault("fault")
@pytest.mark.parametrize("which", ("shard_00003.safetensors", "index.safetensors"))
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_of_a_store_is_named_and_mended(damage, which, whole, tmp_path):
    wanted, _ = whole("harvesting")
    out = tmp_path / "store"
    shutil.copytree(whole.given / "whole_harvesting", out)
    DAMAGE[damage](out / which)
    with pytest.raises(UserError, match=f"{which} is .*run notebook 01"):
        Store.open(out)
    kills.harvesting(whole.given, out)
    alike(content(out), wanted)


@pytest.mark.fault("fault")
@pytest.mark.parametrize("damage", ("cut", "one bit", "empty"))
def test_a_damaged_state_is_named_and_nothing_else_is_touched(damage, tmp_path):
    write_state(tmp_path / "state.pt", {"a": torch.arange(1000.0)})
    DAMAGE[damage](tmp_path / "state.pt")
    before = (tmp_path / "state.pt").read_bytes()
    try:
        # one bit of a number is no format's business
        assert read_state(tmp_path / "state.pt") and damage == "one bit"
    except UserError as error:
        assert "is damaged" in str(error) and "begins anew" in str(error)
    assert (tmp_path / "state.pt").read_bytes() == before


@pytest.mark.fault("fault")
def test_a_store_of_another_version_is_refused_and_left(whole, tmp_path):
    out = tmp_path / "store"
    shutil.copytree(whole.given / "whole_harvesting", out)
    manifest = json.loads((out / "manifest.json").read_text())
    (out / "manifest.json").write_text(json.dumps(manifest | {"format": 99}))
    before = content(out)
    with pytest.raises(UserError, match="format 99"):
        Store.open(out)
    alike(content(out), before)


# --- two at once, and the clock -----------------------------------------------------------------------------


def held(folder: Path) -> bool:
    """Whether somebody holds a lock below the folder."""
    for file in folder.rglob(".*.lock"):
        lock = FileLock(file, timeout=0)
        try:
            lock.acquire()
        except Timeout:
            return True
        lock.release()
    return False


@pytest.mark.fault("fault")
@pytest.mark.parametrize("kind", sorted(kills.WORK))
def test_a_second_run_in_the_same_folder_is_turned_away(kind, whole, endpoint, tmp_path):
    """The first is stopped in the middle of its work, the second told so; the first is killed, which frees
    the folder.
    """
    wanted, _ = whole(kind)
    out = tmp_path / "out"
    for _ in range(20):
        first, pipe = kills.start(kind, whole.given, out, endpoint[0])
        while first.is_alive() and not held(tmp_path):
            time.sleep(0.001)
        if first.is_alive():
            os.kill(first.pid, signal.SIGSTOP)
            if held(tmp_path):
                break
            first.kill()
        first.join()  # it was over before it could be stopped: once more
        shutil.rmtree(out, ignore_errors=True)
    said = kills.finish(*kills.start(kind, whole.given, out, endpoint[0]))
    first.kill()
    first.join()
    pipe.close()
    assert said.startswith("UserError: another run is ") and "wait for it, or stop it first" in said, said
    assert kills.finish(*kills.start(kind, whole.given, out, endpoint[0])) == "done"
    alike(content(out), wanted)


@pytest.mark.fault("fault")
@pytest.mark.parametrize("kind", ("harvesting", "training"))
def test_a_clock_that_goes_backwards_changes_nothing(kind, whole, tmp_path):
    """A run that was killed, files from next year, and a clock that falls by a day at every look. In a
    process of its own, as all others: the last bits of a product may depend on where its memory is.
    """
    wanted, seconds = whole(kind)
    out, later = tmp_path / "out", time.time() + 3e7
    killed(kind, whole.given, out, "", seconds, random.Random(kind))
    for file in out.rglob("*"):
        os.utime(file, (later, later))
    assert kills.finish(*kills.start(kind, whole.given, out, falling=True)) == "done"
    alike(content(out), wanted)
