"""A harvest that several jobs share out: the same store as one job's, and nothing else passes for it."""

import multiprocessing
import os
import sys
from pathlib import Path

import pytest
from test_harvest import content
from toys import toy_pair, toy_store

from lib.activations import harvest as harvest_module
from lib.activations.harvest import harvest_activations, harvest_part, merge_parts
from lib.runs import Run
from lib.settings import UserError
from lib.text.corpus import build
from lib.tools.cli import main

SIZES = {"shard_tokens": 700, "batch_tokens": 2048}  # 6 shards of the toy corpus of 4,000 tokens


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return toy_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def whole(pair, tmp_path_factory):
    return content(
        harvest_activations(pair, build(pair), tmp_path_factory.mktemp("whole") / "store", **SIZES).path
    )


def job(pair, path, part):
    import torch

    torch.set_num_threads(1)
    harvest_part(pair, build(pair), path, part, **SIZES)


def test_parts_in_any_order_make_the_same_bytes(pair, whole, tmp_path):
    counts = [harvest_part(pair, build(pair), tmp_path / "store", (i, 3), **SIZES) for i in (2, 0, 1)]
    assert sum(counts) == len(whole) - 2 and min(counts) > 0
    assert (
        not (tmp_path / "store" / "manifest.json").exists()
        and not (tmp_path / "store" / "log.jsonl").exists()
    )
    store = merge_parts(pair, build(pair), tmp_path / "store", **SIZES)
    assert content(store.path) == whole and store.tokens_per_second > 0
    # it is found
    assert (
        harvest_activations(pair, build(pair), tmp_path / "store", **SIZES).fingerprint == store.fingerprint
    )
    assert content(merge_parts(pair, build(pair), tmp_path / "store", **SIZES).path) == whole
    assert sorted(f.name for f in store.path.iterdir()) == sorted([*whole, "harvest.json", "log.jsonl"])


def test_jobs_at_once_make_the_same_bytes_and_two_may_do_the_same(pair, whole, tmp_path):
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    jobs = [
        context.Process(target=job, args=(pair, tmp_path / "store", part))
        for part in [(0, 3), (1, 3), (1, 3), (2, 3)]
    ]
    for process in jobs:
        process.start()
    for process in jobs:
        process.join(120)
    assert [process.exitcode for process in jobs] == [0] * 4
    assert content(merge_parts(pair, build(pair), tmp_path / "store", **SIZES).path) == whole


def test_parts_are_neighbouring_shards_that_cover_all(pair):
    planned = harvest_module.job_of(pair, build(pair), "store", None, **SIZES)
    for n in (1, 2, 5, 50):
        ranges = [harvest_module._part(planned, i, n) for i in range(n)]
        assert ranges[0].start == 0 and ranges[-1].stop == sys.maxsize
        assert all(a.stop == b.start for a, b in zip(ranges, ranges[1:]))
    with pytest.raises(UserError, match="part is 3: it must be an integer from 0 to 2"):
        harvest_module._part(planned, 3, 3)


def test_shards_that_are_missing_or_damaged_are_named_and_their_part_mends_them(pair, whole, tmp_path):
    for i in (0, 2):
        harvest_part(pair, build(pair), tmp_path / "store", (i, 3), **SIZES)
    with pytest.raises(
        UserError,
        match=r"2 of 6 shards .*\(shard_00002.* is missing, shard_00003.safetensors is missing\): run their",
    ):
        merge_parts(pair, build(pair), tmp_path / "store", **SIZES)
    harvest_part(pair, build(pair), tmp_path / "store", (1, 3), **SIZES)
    shard = tmp_path / "store" / "shard_00003.safetensors"
    good = bytearray(shard.read_bytes())
    good[-3] ^= 1
    shard.write_bytes(good)
    with pytest.raises(UserError, match=r"1 of 6 shards .*\(shard_00003.safetensors is damaged\)"):
        merge_parts(pair, build(pair), tmp_path / "store", **SIZES)
    assert not (tmp_path / "store" / "manifest.json").exists()
    harvest_part(pair, build(pair), tmp_path / "store", (1, 3), **SIZES)
    assert content(merge_parts(pair, build(pair), tmp_path / "store", **SIZES).path) == whole


def test_a_harvest_makes_what_the_parts_have_left(pair, whole, tmp_path, monkeypatch):
    harvest_part(pair, build(pair), tmp_path / "store", (0, 3), **SIZES)
    made, write = [], harvest_module._write_shard
    monkeypatch.setattr(
        harvest_module,
        "_write_shard",
        lambda path, name, *rest: made.append(name) or write(path, name, *rest),
    )
    assert content(harvest_activations(pair, build(pair), tmp_path / "store", **SIZES).path) == whole
    assert made == [f"shard_{i:05d}.safetensors" for i in (2, 3, 4, 5)]


def test_jobs_of_another_harvest_are_refused_and_leave_everything_alone(pair, tmp_path):
    harvest_part(pair, build(pair), tmp_path / "store", (0, 3), **SIZES)
    before = content(tmp_path / "store")
    other = toy_pair(tmp_path / "other", widths=(16, 16))
    for wrong in (dict(pair=pair, documents=build(pair, seed=1)), dict(pair=other, documents=build(other))):
        with pytest.raises(
            UserError, match="store holds the harvest of something else .*: give all jobs the same pair"
        ):
            harvest_part(**wrong, path=tmp_path / "store", part=(1, 3), **SIZES)
        with pytest.raises(UserError, match="something else"):
            merge_parts(**wrong, path=tmp_path / "store", **SIZES)
    assert content(tmp_path / "store") == before


def test_files_of_jobs_that_died_go_and_those_of_jobs_at_work_stay(pair, tmp_path):
    harvest_part(pair, build(pair), tmp_path / "store", (0, 1), **SIZES)
    dead, alive = (tmp_path / "store" / f".shard_00000.safetensors.{name}.part" for name in ("dead", "alive"))
    for file in (dead, alive):
        file.write_bytes(b"half a shard")
    os.utime(dead, (0, 0))
    merge_parts(pair, build(pair), tmp_path / "store", **SIZES)
    assert alive.exists() and not dead.exists()


def test_the_command_line_makes_what_the_notebook_looks_for(tmp_path, capsys):
    arguments = ["harvest", "--profile", "smoke", "-p", "tokens", "3000", "--out", str(tmp_path / "store")]
    for part in ("1/2", "0/2"):
        assert main([*arguments, "--part", part]) == 0
    assert main([*arguments, "--merge"]) == 0
    assert "Store(3," in capsys.readouterr().out
    from lib.models.pairs import load_pair

    tiny = load_pair("tiny")
    store = harvest_activations(tiny, build(tiny, 3000, trace_share=0.5, seed=0), tmp_path / "again")
    assert content(store.path) == content(tmp_path / "store")
    assert main([*arguments, "--part", "two"]) == 2
    assert "part is 'two': it must be like 0/8" in capsys.readouterr().err
    assert main([*arguments, "-p", "tonkens", "3"]) == 2
    assert "no parameter 'tonkens'" in capsys.readouterr().err


def test_the_command_line_uses_every_parameter_that_it_takes(tmp_path, capsys):
    """Other text, and the upper layer, in parts and whole; what it does not use it does not take."""
    text = str(tmp_path / "t.txt")
    Path(text).write_text("\n\n".join(f"anna is late . {i % 19} * {i % 7} = 9 ." for i in range(200)))
    words = ["harvest", "--profile", "smoke", "-p", "tokens", "900"]
    words += ["-p", "traces", text, "-p", "general", text]
    for part in ("0/2", "1/2"):
        assert main([*words, "--out", str(tmp_path / "parts"), "--part", part]) == 0
    assert main([*words, "--out", str(tmp_path / "parts"), "--merge"]) == 0
    assert main([*words, "--out", str(tmp_path / "whole")]) == 0
    tiny, corpus = harvest_module.open_text("tiny", 900, traces=text, general=text)
    run = Run("tiny", "test", root=tmp_path)
    notebook = harvest_module.harvest_run(run, tiny, corpus, upper=True)  # as notebook 01 does
    for name in ("parts", "whole"):
        assert content(tmp_path / name) == content(notebook.path)
        assert content(tmp_path / f"{name}_upper") == content(run.path("store_upper"))
    for name, value, sentence in (
        ("traces", "nowhere.jsonl", "the corpus 'nowhere.jsonl' is not there"),
        ("layer", "17", "layer is 17: it must be an integer from 0 to 5"),
        ("drift_documents", "3", "a harvest does not use drift_documents"),
        ("pair", "smol", "pair smol, by -p or in the profile, is not the pair tiny: give --pair"),
    ):
        assert main([*words[:6], "-p", name, value]) == 2
        assert sentence in capsys.readouterr().err


def test_shards_of_before_there_were_parts_are_kept(tmp_path):
    """Toy store, its log as a single file, as an interrupted harvest of an earlier version leaves it."""
    store = toy_store(tmp_path)
    before = content(store.path)
    (store.path / "manifest.json").unlink()
    assert content(toy_store(tmp_path).path) == before
