"""Reading from a store larger than memory: every row once, in an order that mixes, within its memory; and
prefetching.
"""

import gc
import json
import subprocess
import sys
import threading
import time
import traceback

import numpy as np
import pytest
import torch

from benchmarks.read import row_numbers, write_store
from lib.activations import shuffle as reading
from lib.activations.shuffle import BLOCK, Prefetched, Shuffle, Table, Wanted
from lib.activations.store import Store
from lib.settings import ROOT, UserError

WIDTHS = (16, 8)
ROW = 2 * sum(WIDTHS) + reading.INDEX_BYTES
LITTLE = 1_000_000  # bytes: a ring of 26 blocks; the store below has 63 blocks that are trained on


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return write_store(tmp_path_factory.mktemp("read") / "store", rows=17_000, widths=WIDTHS, shard_rows=3000)


def spied(monkeypatch) -> list[tuple]:
    """(file, array, first row) of all that is read from now on."""
    calls, original = [], Table.read_into

    def read_into(self, out, name, first):
        calls.append((self.file, name, first))
        original(self, out, name, first)

    monkeypatch.setattr(Table, "read_into", read_into)
    return calls


def epoch_of(store, memory=LITTLE, batch_size=100, **where):
    batches = list(store.reader("train", batch_size, **{"seed": 1, "memory": memory, **where}))
    rows = np.concatenate([rows for rows, _ in batches])
    for m in range(len(store.models)):
        assert np.array_equal(row_numbers(torch.cat([acts[m] for _, acts in batches])), rows)
    return rows, batches


@pytest.mark.parametrize("seed", range(20))
def test_any_rows_in_any_ring_come_once_and_no_place_is_taken_too_early(seed):
    rng = np.random.default_rng(seed)
    masks = [
        rng.random(rng.integers(1, 5000)) < rng.choice([0.01, 0.5, 1.0]) for _ in range(rng.integers(1, 6))
    ]
    wanted = Wanted(masks)
    expected = np.flatnonzero(np.concatenate(masks))
    assert np.array_equal(wanted.rows(), expected) and len(wanted) == len(expected)
    shuffle = Shuffle(wanted, ring=int(rng.integers(1, 40)), key=[seed])
    rows, places, due = (np.concatenate(parts) for parts in zip(*shuffle.pieces()))
    assert np.array_equal(np.sort(rows), expected) and np.array_equal(rows, shuffle.rows())
    number = np.empty(len(wanted.starts), int)
    number[shuffle.blocks] = np.arange(len(number))
    # of each row, when its block is read
    own = number[np.searchsorted(wanted.starts, rows, side="right") - 1]
    assert (np.diff(due) >= 0).all() and (due > own).all() and (due <= own + shuffle.ring).all()
    assert np.array_equal(places, own % shuffle.ring * BLOCK + rows - wanted.starts[shuffle.blocks[own]])


@pytest.mark.parametrize("memory", [LITTLE, 1 << 30])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_every_kept_row_once_an_epoch_with_its_activations(tmp_path, memory, dtype):
    store = write_store(tmp_path / "store", rows=9000, widths=WIDTHS, dtype=dtype, shard_rows=2000)
    batches = list(store.reader("train", 128, seed=3, memory=memory))
    rows = np.concatenate([rows for rows, _ in batches])
    assert np.array_equal(np.sort(rows), store.rows("train")) and np.array_equal(
        rows, store.order("train", 3, 0, memory)
    )
    assert len(rows) == store.count("train") and {len(r) for r, _ in batches[:-1]} == {128}
    for rows, acts in batches:
        assert all(
            torch.equal(a, b) and a.dtype == torch.float32
            for a, b in zip(acts, store.activations(rows), strict=True)
        )


def test_same_seed_same_order_another_seed_or_epoch_another(store):
    rows, _ = epoch_of(store)
    assert np.array_equal(rows, epoch_of(store)[0])
    assert np.array_equal(rows, epoch_of(store, batch_size=333)[0])  # batches do not decide the order
    for other in ({"seed": 2}, {"epoch": 1}, {"memory": 2 * LITTLE // 3}):
        assert not np.array_equal(rows, epoch_of(store, **other)[0])
    # both hold the whole split
    assert np.array_equal(epoch_of(store, memory=10**7)[0], epoch_of(store, memory=10**8)[0])


@pytest.mark.parametrize("memory", [LITTLE, 1 << 30])
def test_resuming_equals_going_on_and_reads_no_more_than_a_ring(store, memory, monkeypatch):
    _, whole = epoch_of(store, memory)
    read = spied(monkeypatch)
    for start in (1, 70, len(whole) - 1, len(whole)):
        read.clear()
        rest = list(store.reader("train", 100, 1, 0, start, memory))
        assert len(rest) == len(whole) - start
        for (rows, acts), (again, acts_again) in zip(whole[start:], rest):
            assert np.array_equal(rows, again) and all(map(torch.equal, acts, acts_again))
        if start == len(whole) - 1 and memory == LITTLE:
            assert len(read) <= 2 * int(LITTLE * reading.RING_SHARE / (BLOCK * ROW)) and len(
                set(read)
            ) == len(read)


def test_neighbours_in_a_text_are_apart(store):
    rows, batches = epoch_of(store)
    place = np.empty(len(store), int)
    place[rows] = np.arange(len(rows))
    pairs = rows[np.isin(rows + 1, rows)]
    apart = np.abs(place[pairs] - place[pairs + 1])
    # the ring has 26 blocks, and 29% of it would be the median, but for the ends of the epoch
    assert np.median(apart) > 5 * BLOCK
    texts = [len(np.unique(store.documents[r])) for r, _ in batches[20:-20]]
    assert min(texts) > 12  # of 100 rows; a ring holds parts of 26 or more
    full = store.order("train", 1, 0)
    assert abs(np.corrcoef(full[:-1], full[1:])[0, 1]) < 0.05


def test_parts_share_out_the_same_batches(store):
    whole, _ = epoch_of(store)
    parts = [list(store.reader("train", 100, seed=1, memory=LITTLE, part=(i, 3))) for i in range(3)]
    for number, three in enumerate(zip(*parts, strict=True)):
        batch = whole[number * 100 : (number + 1) * 100]
        assert all(
            np.array_equal(rows, batch[i::3]) and np.array_equal(row_numbers(acts[0]), rows)
            for i, (rows, acts) in enumerate(three)
        )


def test_what_is_too_little_memory_is_said(store):
    with pytest.raises(UserError, match="memory is 0.1 MB: shuffling rows of 48 bytes needs at least 1 MB"):
        store.reader("train", 8, seed=0, memory=100_000)
    with pytest.raises(UserError, match="memory is 1 MB: batches of 20,000 tokens need at least 35 MB"):
        store.reader("train", 20_000, seed=0, memory=LITTLE)
    with pytest.raises(UserError, match="part is 2: it must be an integer from 0 to 1"):
        store.reader("train", 8, seed=0, part=(2, 2))


def test_a_shard_that_shrinks_or_goes_is_named(tmp_path):
    store = write_store(tmp_path / "store", rows=5000, widths=WIDTHS, shard_rows=3000)
    file = tmp_path / "store" / "shard_00000.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 8])
    with pytest.raises(UserError, match="shard_00000.safetensors is truncated: .* bytes are missing"):
        list(store.reader("train", 64, seed=0))
    file.unlink()
    with pytest.raises(UserError, match="shard_00000.safetensors is missing"):
        store.activations([1, 2])
    file.write_bytes(b"\xff" * 100)
    with pytest.raises(UserError, match="shard_00000.safetensors cannot be read"):
        Table(file)


def test_opening_reads_no_activations_and_arrays_come_when_asked_for(store, monkeypatch):
    calls = spied(monkeypatch)

    def read():
        return [name for _, name, _ in calls]

    opened = Store.open(store.path, verify=False)
    assert set(read()) == {"mean_model_0", "mean_model_1"}
    assert opened.count("train") + opened.count("report") == opened.manifest["counts"]["kept"]
    assert set(read()) == {"mean_model_0", "mean_model_1", "kept", "split"}
    assert list(opened.labels) and "tokens" not in read()
    assert (
        opened.tokens is opened.tokens
        and opened.norms["model_0"] is opened.norms["model_0"]
        and len(opened.norms) == 2
    )
    assert read().count("tokens") == read().count("norm_model_0") == 6 and "norm_model_1" not in read()
    with pytest.raises(KeyError):
        opened.labels["nothing"]


MEASURE = """
import json, sys, torch
from lib.activations.store import Store
from lib.activations.shuffle import Prefetched

def resident(kind):
    return next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith(kind))

torch.set_num_threads(1)
store, memory = Store.open(sys.argv[1], verify=False), int(sys.argv[2])
next(store.reader("report", 8, seed=0, memory=memory))
before, peak, seen = [resident("RssAnon"), resident("RssFile")], [0, 0], 0
with Prefetched(store.reader("train", 512, seed=0, memory=memory)) as batches:
    for rows, acts in batches:
        peak, seen = [max(peak[0], resident("RssAnon")), max(peak[1], resident("RssFile"))], seen + len(rows)
print(json.dumps([peak[0] - before[0], peak[1] - before[1], seen]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_resident_memory_stays_within_the_bound(tmp_path):
    memory = 32_000_000
    store = write_store(tmp_path / "store", rows=180_000, widths=(256, 256), shard_rows=40_000)
    size = sum(entry["bytes"] for entry in store.manifest["shards"].values())
    assert size > 5 * memory
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, store.path, str(memory)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    anonymous, files, seen = json.loads(done.stdout)
    assert 0.5 * memory < anonymous < memory and files < 0.1 * memory and seen == store.count("train")


def threads():
    return [t for t in threading.enumerate() if t.name.startswith("prefetch")]


def test_prefetching_changes_nothing_but_when(store):
    plain = [rows for rows, _ in store.reader("train", 100, seed=1, memory=LITTLE)]
    with Prefetched(store.reader("train", 100, seed=1, memory=LITTLE), ahead=3) as batches:
        assert all(np.array_equal(a, rows) for a, (rows, _) in zip(plain, batches, strict=True))
        assert next(batches, None) is None
    assert not threads()


def test_no_more_is_made_than_asked_for_and_waiting_is_counted():
    made = []

    def slow():
        for i in range(6):
            if i >= 4:
                time.sleep(0.1)
            made.append(i)
            yield i

    with Prefetched(slow(), ahead=2) as items:
        assert next(items) == 0
        time.sleep(0.05)
        assert made == [0, 1, 2, 3]  # one taken, two waiting, one made that finds no room
        assert [next(items) for _ in range(3)] == [1, 2, 3] and items.waited < 0.09
        assert list(items) == [4, 5] and 0.15 < items.waited < 1


def test_a_failure_comes_out_where_the_item_is_taken_with_its_traceback():
    def failing():
        yield 1
        raise UserError("the disk is gone")

    items = Prefetched(failing())
    assert next(items) == 1
    with pytest.raises(UserError, match="the disk is gone") as caught:
        next(items)
    assert "failing" in [frame.name for frame in traceback.extract_tb(caught.value.__traceback__)]
    with pytest.raises(StopIteration):
        next(items)
    items.close()
    assert not threads()


@pytest.mark.parametrize("way", ["close", "with", "error", "forgotten"])
def test_no_thread_is_left_when_the_consumer_stops_early(way):
    closed = []

    def endless():
        try:
            while True:
                yield np.zeros(10)
        finally:
            closed.append(True)

    items = Prefetched(endless())
    next(items)
    if way == "close":
        items.close()
        items.close()
        assert next(items, None) is None
    elif way == "with":
        with items:
            next(items)
    elif way == "error":
        with pytest.raises(ZeroDivisionError), items:
            raise ZeroDivisionError
    else:
        for _ in items:
            break
        del items, _
        gc.collect()
        for thread in threads():
            thread.join(timeout=5)
    assert not threads() and closed == [True]
