"""All that uses a GPU, on a device that refuses what a GPU refuses (``tests/other_device.py``)."""

import json
import os
import subprocess
import sys

import pytest

from lib.settings import ROOT

USE = """
import random
import sys
from pathlib import Path

from tests import other_device
sys.path.insert(0, "tests")
import torch
from toys import toy_pair, toy_store, toy_traces
from benchmarks import gpu
from lib.crosscoder import TrainConfig, health_cards, train
from lib.features.uniqueness import score_table
from lib.features.use import solo_codes, use_table
from lib.models.reader import open_models
from lib.steering import ablation, generate
from lib.steering.interventions import Scale
from lib.text.puzzles import sample_puzzle

folder = Path(sys.argv[1])
with other_device.Device():
    words = ["--device", other_device.NAME, "--small", "--out", str(folder / "gpu.json")]
    words += ["--traces", str(toy_traces(folder))]
    assert gpu.main(["right", "harvest", "whole", "smol", *words]) == 0

    store, pair = toy_store(folder, 2000, (16, 16)), toy_pair(folder, (16, 16))
    rows = store.rows("report")
    here = toy_store(folder / "cpu", 2000, (16, 16), device="cpu")
    for own, other in zip(store.activations(rows), here.activations(rows)):
        assert torch.allclose(own.float(), other.float(), rtol=1e-2, atol=1e-2)
    crosscoder = train(store, TrainConfig(32, k=4, tokens=2000, batch_size=256), folder / "crosscoder")
    models = open_models(pair, pair.models)
    assert {model._module.device.type for model in models.values()} == {other_device.NAME}
    plain = {name: pair.load(name) for name in pair.models}
    health_cards([crosscoder], store, plain, max_tokens=300, n_boot=5)
    score_table(crosscoder, store, 300, n_boot=5)
    use_table(solo_codes(crosscoder, store, rows), n_boot=5)
    model, layer = models["distilled"], store.layers["distilled"]
    tokens = torch.randint(4, 100, (2, 8))
    hidden = ablation.hidden_at(model, layer, tokens, torch.ones_like(tokens))
    at = torch.arange(2), torch.tensor([7, 5])
    ablation.logits_at(model, layer, tokens, torch.ones_like(tokens), at, 0 * hidden)
    tasks, scaled = [sample_puzzle(random.Random(0))], generate.Treatment("distilled", Scale((0, 1)))
    generate.steered(model, layer, tasks, torch.ones(1, 16), 4)
    generate.transcripts(models, pair.tokenizer(), store.layers, crosscoder, tasks, [scaled], 4)
    targets = ablation.sample_targets(store, 3)
    ablation.own_effects(store, crosscoder, models, targets, [50])
"""


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("device")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", USE, str(folder)], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
    return json.loads((folder / "gpu.json").read_text())["parts"]


def test_nothing_mixes_a_device_with_the_cpu_and_no_step_waits(parts):
    assert parts["right"]["waits_in_a_step"] | {"jumprelu": 0} == dict.fromkeys(
        ("batchtopk", "topk", "l1", "jumprelu"), 0
    )
    assert parts["right"]["waits_in_a_step"]["jumprelu"] > 0  # so waits are seen
    assert parts["right"]["resumed_run_equal"] and parts["right"]["moved_checkpoint_equal"]
    assert parts["whole"]["streamed"]["tokens"] > 0 and parts["smol"]["tokens"] > 0


def test_the_device_refuses_what_a_gpu_refuses():
    code = (
        "from tests import other_device as o; import torch\n"
        "with o.Device():\n"
        "    a = torch.ones(3, device=o.NAME)\n"
        "    for wrong in (lambda: a + torch.ones(3), lambda: a.numpy()):\n"
        "        try: wrong()\n"
        "        except (RuntimeError, TypeError) as error: print(type(error).__name__)\n"
        "    w = torch.nn.Parameter(2 * a); (w * a + torch.tensor(1.0)).sum().backward()\n"
        "    print(w.grad.device.type, w.grad.tolist())\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.stdout.split("\n")[:3] == ["RuntimeError", "TypeError", "cudax [1.0, 1.0, 1.0]"], done.stderr[
        -2000:
    ]
