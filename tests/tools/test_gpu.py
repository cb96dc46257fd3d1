"""The parts of benchmarks/gpu.py in small, on a CPU, where only torch and transformers are installed."""

import json
import os
import subprocess
import sys

import pytest
import torch
from toys import toy_traces
from transformers import Qwen2Config

from benchmarks import gpu, true_size
from lib.crosscoder import CrossCoder
from lib.distil.organism import build_tokenizer
from lib.models.pairs import decoder_layers, load_pair
from lib.settings import ROOT

BARE = """
import sys
from importlib.machinery import PathFinder

MISSING = {"nnsight", "numba", "umap", "pandas", "scipy", "sklearn", "plotly", "IPython", "ipywidgets"}
MISSING |= {"papermill", "datasets", "jupyterlab", "triton"}

class Bare(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in MISSING else super().find_spec(name, path, target)

sys.meta_path = [Bare if finder is PathFinder else finder for finder in sys.meta_path]
from benchmarks import gpu
code = gpu.main(sys.argv[1:])
assert not MISSING & {name.partition(".")[0] for name in sys.modules}
sys.exit(code)
"""


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    out = tmp_path_factory.mktemp("gpu") / "gpu.json"
    words = [sys.executable, "-c", BARE, *gpu.PARTS, "--device", "cpu", "--small", "--out", str(out)]
    words += ["--traces", str(toy_traces(out.parent))]
    done = subprocess.run(
        words, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    written = json.loads(out.read_text())
    assert {"card", "driver", "torch"} <= written.keys()
    return written["parts"]


def test_the_steps_of_a_gpu_are_those_of_the_cpu(parts):
    right = parts["right"]
    for variant in ("batchtopk", "topk", "l1", "jumprelu"):
        assert right[variant]["values"] < 1e-4 and right[variant]["gradients"] < 1e-3, variant
        assert right[variant]["features_apart"] == 0
    assert right["resumed_run_equal"] and right["moved_checkpoint_equal"]
    assert right["fve"]["float32"] == pytest.approx(right["fve"]["bfloat16"], abs=0.02)


def test_every_part_leaves_its_numbers(parts):
    (entry,) = parts["step"]["sizes"].values()
    floor = entry["floor_ms"]
    assert floor["all"] == pytest.approx(floor["encoder"] + floor["adam"] + floor["sparse"])
    assert entry["dense_over_ours"] == pytest.approx(entry["dense"]["ms"] / entry["ours"]["ms"])
    (harvest,) = parts["harvest"]["batch_tokens"].values()
    assert harvest["tokens_per_second"] > 0 and harvest["times_the_limit"] > 0
    for way in ("streamed", "from_disk"):
        assert parts["whole"][way]["tokens_per_second"] > 0 and -1 < parts["whole"][way]["fve"] < 1
    hours = list(parts["whole"]["hours_for_400M"].values())
    assert hours == sorted(hours) and len(hours) == 3


def test_smol_at_the_size_of_a_card_goes_from_a_base_to_features_beside_a_null(parts):
    smol = parts["smol"]
    assert smol["loss_distilled"] < 7 and smol["tokens"] > 0
    assert len(smol["beyond_null"]) == 2 and len(smol["false_beyond_null"]) == len(smol["recurs"]) == 1
    assert 0 < smol["distilled_1"]["fve"] < 1 and smol["distilled_1"]["l0"] == pytest.approx(4)


def test_features_beyond_a_null_and_those_that_recur_are_counted():
    def one(name, rows):
        crosscoder = CrossCoder([2, 2], len(rows), ("base", name), k=1)
        with torch.no_grad():
            crosscoder.W_dec.copy_(torch.tensor(rows))
        return crosscoder, torch.tensor([True] * (len(rows) - 1) + [False])

    shared, own, dead = [1.0, 0, 1, 0], [0.1, 0, 0, 1], [0.0, 0, 0, 9]
    crosscoders = {
        ("null_traces", 0): one("null_traces", [shared, shared, dead]),
        ("distilled", 0): one("distilled", [shared, own, dead]),
        ("null_traces", 1): one("null_traces", [shared, own, dead]),
        ("distilled", 1): one("distilled", [shared, shared, dead]),
    }
    found = gpu.unique_beside_null(crosscoders)
    assert found == {"beyond_null": [0.5, 0.0], "false_beyond_null": [0.5], "recurs": [0.5]}


def test_what_was_measured_before_a_part_was_cut_off_stays(tmp_path):
    out = tmp_path / "gpu.json"
    gpu.write(out, "right", {"a": 1})
    gpu.write(out, "step", {"b": 2})
    gpu.write(out, "right", {"a": 3})
    assert json.loads(out.read_text())["parts"] == {"right": {"a": 3}, "step": {"b": 2}}


@pytest.mark.slow
def test_one_command_runs_all_parts(tmp_path):
    out = tmp_path / "gpu.json"
    words = ["bash", "benchmarks/gpu.sh", "--device", "cpu", "--small", "--out", str(out)]
    done = subprocess.run(
        words, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHON": sys.executable}
    )
    assert done.returncode == 0, done.stderr
    assert set(json.loads(out.read_text())["parts"]) == set(gpu.PARTS) - {"smol"}


def test_a_dry_run_takes_widths_and_tokenizer_from_a_folder(tmp_path):
    config = Qwen2Config(hidden_size=32, intermediate_size=64, num_hidden_layers=6, num_attention_heads=4)
    config.num_key_value_heads, config.vocab_size = 2, 600
    config.save_pretrained(tmp_path / "given")
    build_tokenizer().save_pretrained(tmp_path / "given")
    registry = true_size.make(tmp_path / "made", [tmp_path / "given"], 2, "dry")
    pair = load_pair("dry", registry)
    models = {name: pair.load(name) for name in pair.models}
    for model in models.values():
        assert (model.config.hidden_size, len(decoder_layers(model))) == (32, 2)
        assert model.dtype == torch.bfloat16
    a, b = (model.get_input_embeddings().weight for model in models.values())
    assert not torch.equal(a, b)
    assert pair.tokenizer().get_vocab() == build_tokenizer().get_vocab()
    lines = true_size.hours(config)
    assert "A100: harvest" in lines[1] and "H100" in lines[2] and "GB" in lines[3]


def test_a_dry_run_without_a_configuration_says_what_it_needs(tmp_path, capsys, monkeypatch):
    for words in (["--dry"], ["--dry", "--config", str(tmp_path)]):
        monkeypatch.setattr(sys, "argv", ["true_size", *words, "--folder", str(tmp_path / "made")])
        assert true_size.main() == 2
        assert "config.json" in capsys.readouterr().err
