"""What a GPU must show: that it is right, how fast a training step, a harvest and both together are.

    bash benchmarks/gpu.sh                        # all parts, each in its time, into benchmarks/gpu.json
    bash benchmarks/gpu.sh --device cpu --small   # the same parts in small, on a CPU
    python -m benchmarks.gpu step                 # one part

    right     forward, loss, gradients, codes and one step of every variant on the device against the CPU; the
              kernels against torch at full size; bfloat16 against float32 over a run; a resumed run, a
              checkpoint that moves; how often a step waits for the device
    step      a step at the paper's size against the dense one of public trainers (fused Adam, bfloat16
              autocast), eai-sparsify's, and the floor: the encoder's product and the traffic of Adam and of
              the sparse products, at the rates that this card reaches
    harvest   both models of the 1.5B pair (configuration of Qwen2.5-1.5B, random weights, half depth) against
              two plain forwards
    whole     streamed straight into training; and from a store on disk; hours for 400 million tokens
    smol      the pair ``smol`` at a card's size, if the weights of its base are there (6 minutes; not among
              those of gpu.sh): adapters of high rank on all traces, and on traces without reflections, all
              text read, crosscoders of 16,384 features, five and two

It needs torch, transformers and safetensors, beside two small packages (``gpu.sh --wheels`` brings them).
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import cycle
from pathlib import Path

import numpy as np
import torch

from benchmarks.costs import BATCH, FEATURES, MODELS, TOKENS, sparse_flops
from benchmarks.dense import DenseTrainer
from benchmarks.step import Ours, crosscoder
from benchmarks.true_size import CONFIG
from lib.crosscoder import fixed, sparse
from lib.crosscoder.sparse import encode
from lib.crosscoder.training import TrainConfig, Trainer, read_log, train
from lib.device import tf32, to_host
from lib.models.pairs import Pair, load_pair
from lib.settings import ROOT, UserError

OUT = Path(__file__).with_name("gpu.json")
SIZES = {
    False: dict(width=1536, features=FEATURES, k=50, batches=(BATCH, 2 * BATCH, 4 * BATCH), layers=14)
    | dict(window=(1024, 2048), shard=131_072, steps=500, rounds=20, seconds=25),
    True: dict(width=32, features=256, k=8, batches=(64,), layers=2)
    | dict(window=(16, 40), shard=600, steps=60, rounds=3, seconds=2),
}


class Machine:
    """Where the parts run: the device, the sizes, and what a CPU has to pretend."""

    def __init__(self, device: str, small: bool, traces: Path | None = None, text: Path | None = None):
        self.device, self.size, self.cuda = device, SIZES[small], device.startswith("cuda")
        self.traces, self.text = traces, text or ROOT / "data/pairs/smol/corpus/general.jsonl.gz"
        self.small = small

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def seconds(self, work: Callable[[], object], rounds: int | None = None) -> float:
        """Median of some rounds, after a quarter as many that do not count."""
        rounds, times = rounds or self.size["rounds"], []
        for number in range(-(rounds // 4) - 1, rounds):
            self.wait()
            began = time.perf_counter()
            work()
            self.wait()
            if number >= 0:
                times.append(time.perf_counter() - began)
        return float(np.median(times))

    def peak(self) -> float | None:
        """GB at most since the last call; None on a CPU."""
        if not self.cuda:
            return None
        peak = torch.cuda.max_memory_allocated() / 1e9
        torch.cuda.reset_peak_memory_stats()
        return round(peak, 2)

    def known(self, yes: bool) -> None:
        """On a CPU, whether a step is that of a GPU."""
        if not self.cuda:
            sparse.COMPILED = not yes


# --- right --------------------------------------------------------------------------------------------------


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """Norm of the difference by the norm of b."""
    a, b = a.detach().cpu().double(), b.detach().cpu().double()
    return float((a - b).norm() / b.norm().clamp(min=1e-30))


def right(on: Machine) -> dict:
    found, width, features = {}, 96 if not on.small else 16, 1024 if not on.small else 64
    generator = torch.Generator().manual_seed(0)
    x = [torch.randn(512 if not on.small else 64, 2, width, generator=generator) for _ in range(4)]
    for variant in ("batchtopk", "topk", "l1", "jumprelu"):
        both = {}
        for name, device, known in (("cpu", "cpu", False), ("device", on.device, True)):
            on.known(known)
            trainer = Ours(width, features, 16, "float32", len(x[0]), device, variant=variant).trainer
            trainer.last_fired[:5] = -(10**9)  # dead
            trainer.among = trainer._dead().nonzero()[:, 0] if trainer.known else None
            values = [trainer.train_step([a.to(device) for a in part.unbind(1)]).cpu() for part in x]
            fired = trainer.last_fired.cpu() == trainer.shown
            gradients = [p.grad.cpu() for p in trainer.crosscoder.parameters()]
            both[name] = torch.stack(values), gradients, list(trainer.crosscoder.parameters()), fired
        (v, g, w, f), (v0, g0, w0, f0) = both["device"], both["cpu"]
        found[variant] = {
            "values": distance(v[:, :3], v0[:, :3]),
            "gradients": max(map(distance, g, g0)),
            "weights": max(map(distance, w, w0)),
            "features_apart": int((f != f0).sum()),
        }
    on.known(True)
    found["waits_in_a_step"] = waits(on)
    found["kernels"] = kernels(on)
    found["resumed_run_equal"], found["moved_checkpoint_equal"] = resumed(on)
    found["fve"] = {precision: run(on, precision) for precision in ("float32", "bfloat16")}
    return found


def waits(on: Machine) -> dict | None:
    """How often a step waits for the device, by variant; None on a CPU, where tests count otherwise."""
    if not on.cuda:
        return None
    counts = {}
    for variant in ("batchtopk", "topk", "l1", "jumprelu"):
        trainer = Ours(96, 1024, 16, "bfloat16", 512, on.device, variant=variant).trainer
        acts = [torch.randn(512, 96, device=on.device) for _ in range(2)]
        for _ in range(3):
            trainer.train_step(acts)
        torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.train_step(acts)
        torch.cuda.set_sync_debug_mode("default")
        counts[variant] = sum("synchroniz" in str(w.message) for w in caught)
    return counts


def kernels(on: Machine) -> dict | None:
    """Distance of each Triton kernel from torch at full size, and its milliseconds beside torch's."""
    if fixed._triton() is None or not on.cuda:
        return None
    B, F, D = on.size["batches"][0], on.size["features"], 2 * on.size["width"]
    generator = torch.Generator(on.device).manual_seed(0)
    W, x, g = (torch.randn(n, D, device=on.device, generator=generator) for n in (F, B, B))
    per_unit, bias = torch.ones(F, device=on.device), torch.zeros(F, device=on.device)
    encoded = encode(x, W, bias, torch.bfloat16)
    parts = encoded.products, encoded.offset, per_unit
    code = fixed.select_batch(encoded, per_unit, on.size["k"] * B)
    level = code.floor[None] * torch.ones(16, device=on.device)
    indptr = torch.nn.functional.pad(fixed.count(*parts, level)[:, 0].cumsum(0), (1, 0))
    entries = code.rows, code.features, code.values
    calls = {
        "count": (*parts, level),
        "write": (*parts, code.floor, indptr, 3 * len(code.values)),
        "dots": (*entries, x, W),
        "sums": (code.indptr, code.features, code.values, W),
        "weight_gradients": (*entries, code.values, x, g, F),
    }
    found = {}
    for name, arguments in calls.items():
        ours, theirs = getattr(fixed._triton(), name), getattr(fixed, name)
        a, b = ours(*arguments), theirs(*arguments)
        a, b = (a, b) if isinstance(a, tuple) else ((a,), (b,))
        found[name] = {
            "distance": max(map(distance, a, b)),
            "ms": 1e3 * on.seconds(partial(ours, *arguments), 8),
            "torch_ms": 1e3 * on.seconds(partial(theirs, *arguments), 4),
        }
    return found


class Memory:
    """A store in memory: sparse codes of a random dictionary, in two models."""

    fingerprint, models, raw_batches = "memory", ("base", "distilled"), False

    def __init__(self, n: int, width: int):
        rng = np.random.default_rng(0)
        codes = (rng.random((n, 4 * width)) < 6 / width / 4) * rng.random((n, 4 * width))
        self.acts = [
            torch.tensor(codes @ rng.standard_normal((4 * width, width)), dtype=torch.float32)
            for _ in self.models
        ]
        self.widths = dict.fromkeys(self.models, width)
        self.scales = {m: width**0.5 / float(a.norm(dim=1).mean()) for m, a in zip(self.models, self.acts)}
        self.means = {m: a.double().mean(0) for m, a in zip(self.models, self.acts)}

    def __len__(self) -> int:
        return len(self.acts[0])

    def count(self, split: str) -> int:
        return len(self)

    def reader(self, split, batch_size, seed, epoch=0, start=0, memory=None, part=(0, 1)):
        order = np.random.default_rng([seed, epoch]).permutation(len(self))
        for first in range(start * batch_size, len(self), batch_size):
            rows = order[first : first + batch_size]
            yield rows, [a[torch.from_numpy(rows)] for a in self.acts]


def config_of(on: Machine, precision: str = "float32") -> TrainConfig:
    batch = 512 if not on.small else 64
    tokens = on.size["steps"] * batch
    return TrainConfig(
        1024 if not on.small else 64, k=8, tokens=tokens, batch_size=batch, precision=precision
    )


def run(on: Machine, precision: str) -> float:
    config = config_of(on, precision)
    with tempfile.TemporaryDirectory() as folder:
        train(Memory(4 * config.batch_size, 64 if not on.small else 8), config, folder, device=on.device)
        return read_log(Path(folder))[-1]["fve"]


def resumed(on: Machine) -> tuple[bool, bool]:
    """Whether a run that was resumed ends with the bits of one that was not; and whether a checkpoint of the
    device is taken by a CPU, and the reverse, without a change."""
    config = replace(config_of(on), tokens=20 * config_of(on).batch_size)
    store, half = Memory(4 * config.batch_size, 64 if not on.small else 8), config.tokens // 2
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "state.pt"
        whole = Trainer(store, config, on.device)
        whole.run_until(half)
        torch.save(whole.state(), file)
        whole.run_until(config.tokens)
        whole.close()
        state = torch.load(file, map_location="cpu")
    again, here = Trainer(store, config, on.device), Trainer(store, config, "cpu")
    again.restore(state)
    again.run_until(config.tokens)
    again.close()
    equal = all(
        map(torch.equal, whole.crosscoder.state_dict().values(), again.crosscoder.state_dict().values())
    )
    here.restore(state)
    back = Trainer(store, config, on.device)
    back.restore(here.state())
    weights = back.crosscoder.state_dict()
    moved = all(torch.equal(weights[name].cpu(), value.cpu()) for name, value in state["crosscoder"].items())
    return equal, moved


# --- step ---------------------------------------------------------------------------------------------------


def rates(on: Machine, D: int, F: int, B: int) -> dict[str, float]:
    """What this card reaches: operations a second of the encoder's product in bfloat16, bytes of a copy."""
    a, b = (torch.randn(n, D, device=on.device, dtype=torch.bfloat16) for n in (B, F))
    big = torch.empty(2**28 if on.cuda else 2**16, device=on.device)
    other = torch.empty_like(big)
    flops = 2 * B * D * F / on.seconds(lambda: a @ b.T)
    return {"flops": flops, "bytes": 8 * len(big) / on.seconds(lambda: other.copy_(big))}


def floor_of(reached: dict, D: int, F: int, B: int, k: int) -> dict[str, float]:
    """Milliseconds that a step takes at least: the encoder, Adam over 2 D F parameters (28 bytes each), and
    three passes of the sparse products over B k rows of D float32."""
    parts = {
        "encoder": 2 * B * D * F / reached["flops"],
        "adam": 28 * 2 * D * F / reached["bytes"],
        "sparse": 3 * B * k * D * 4 / reached["bytes"],
    }
    return {name: 1e3 * seconds for name, seconds in (parts | {"all": sum(parts.values())}).items()}


def step(on: Machine) -> Iterator[dict]:
    size = on.size
    width, F, k = size["width"], size["features"], size["k"]
    found = {"sizes": {}}
    for B in size["batches"]:
        reached = rates(on, 2 * width, F, B)
        entry = {"rates": reached, "floor_ms": floor_of(reached, 2 * width, F, B, k)}
        x = [torch.randn(B, 2, width, device=on.device) for _ in range(2)]
        ways = {
            "ours": lambda B=B: Ours(width, F, k, "bfloat16", B, on.device).step,
            "ours_l1": lambda B=B: Ours(width, F, k, "bfloat16", B, on.device, variant="l1").step,
            "dense": lambda: (
                DenseTrainer(crosscoder(width, F, k).to(on.device), fused=True, bfloat16=True).step
            ),
            "ours_float32": lambda B=B: Ours(width, F, k, "float32", B, on.device).step,
            "sparsify": lambda: sparsify(crosscoder(width, F, k).to(on.device)),
        }
        for name, make in ways.items():
            if (name in ("sparsify", "ours_float32", "ours_l1")) and size["batches"][0] != B:
                continue
            try:
                with tf32(name != "ours_float32"):
                    on.peak()
                    one, turn = make(), cycle(x)
                    ms = 1e3 * on.seconds(lambda one=one, turn=turn: one(next(turn)))
                    entry[name] = {"ms": ms, "tokens_per_second": 1e3 * B / ms, "peak_gb": on.peak()}
                    if name == "ours":
                        began = time.perf_counter()
                        one(x[0])
                        entry[name]["host_ms"] = 1e3 * (time.perf_counter() - began)
                        on.wait()
                        entry[name]["share_of_floor"] = entry["floor_ms"]["all"] / ms
                        if on.cuda and size["batches"][0] == B:
                            entry[name]["profile"] = profile(partial(one, x[0]))
                    del one
            except (ImportError, torch.OutOfMemoryError) as error:
                entry[name] = {"not_run": str(error).splitlines()[0][:200]}
        for other in ("dense", "sparsify", "ours_float32"):
            if "ms" in entry.get(other, {}):
                entry[f"{other}_over_ours"] = entry[other]["ms"] / entry["ours"]["ms"]
        found["sizes"][B] = entry
        yield found


def sparsify(start):
    from benchmarks.sparsify import SparsifyTrainer

    return SparsifyTrainer(start, bfloat16=True).step


def profile(work: Callable[[], object]) -> dict[str, float]:
    """Milliseconds of the kernels that take longest in one step."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as watch

    with watch(activities=[ProfilerActivity.CUDA]) as watched:
        work()
        torch.cuda.synchronize()
    events = sorted(watched.key_averages(), key=lambda e: -e.self_device_time_total)[:20]
    return {e.key[:80]: round(e.self_device_time_total / 1e3, 3) for e in events}


# --- harvest, and both together -----------------------------------------------------------------------------


class RandomPair(Pair):
    """Two models of the 1.5B pair's configuration with random weights, made on the device."""

    def config(self, model_name: str):
        from transformers import Qwen2Config

        if self.name == "small":
            own = dict(hidden_size=32, intermediate_size=64, num_attention_heads=2, num_key_value_heads=1)
            return Qwen2Config(**CONFIG | own | dict(vocab_size=300, num_hidden_layers=4))
        return Qwen2Config(**CONFIG)

    def fingerprint(self, model_name: str) -> str:
        return f"random weights of {model_name}"

    def tokenizer(self, model_name: str | None = None):
        class Tokenizer:
            pad_token_id = 0

            def get_vocab(self):
                return {"none": 0}

        return Tokenizer()


def random_models(pair: RandomPair, on: Machine) -> dict:
    from transformers import AutoModelForCausalLM

    models = {}
    for seed, name in enumerate(pair.models):
        torch.manual_seed(seed)
        config = pair.config(name)
        config.num_hidden_layers = on.size["layers"]  # as of a model that is cut after the layer
        with torch.device(on.device):
            models[name] = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    return models


def documents(on: Machine, pair: RandomPair, tokens: int) -> list:
    """Windows of random ids, nine of ten to train on."""
    from lib.labels import LABEL_ARRAYS, SPLITS
    from lib.text.corpus import Document

    rng, made, total = np.random.default_rng(0), [], 0
    ids = pair.config("base").vocab_size
    while total < tokens:
        n = int(rng.integers(on.size["window"][0], on.size["window"][1] + 1))
        labels = {name: np.zeros(n, np.int8) for name in LABEL_ARRAYS}
        made.append(
            Document(rng.integers(3, ids, n).tolist(), "general", SPLITS[len(made) % 10 == 9], labels)
        )
        total += n
    return made


def opened(on: Machine) -> tuple[RandomPair, dict]:
    from lib.models import reader

    reader.find_spec = lambda name: None  # hooks, as on a machine without nnsight
    sources = {"base": "random/base", "distilled": "random/distilled"}
    pair = RandomPair("small" if on.small else "random", sources, dtype="bfloat16", store_dtype="bfloat16")
    return pair, random_models(pair, on)


def harvest(on: Machine) -> Iterator[dict]:
    from lib.activations.harvest import job_of, read_models, readers_of
    from lib.models.reader import length_batches, outputs_of

    pair, models = opened(on)
    texts = documents(on, pair, on.size["shard"])
    lists, tokens = [d.tokens for d in texts], sum(len(d.tokens) for d in texts)
    layer = on.size["layers"] - 1
    size = on.size
    reached = rates(on, 2 * size["width"], size["features"], size["batches"][0])
    found = {"tokens": tokens, "rates": reached, "batch_tokens": {}}
    for batch_tokens in (8_192, 32_768, 65_536) if not on.small else (256,):
        job = job_of(pair, texts, "", layer, batch_tokens=batch_tokens)
        readers = readers_of([job], models, on.device)
        batches = [
            torch.nn.utils.rnn.pad_sequence([torch.tensor(lists[i]) for i in batch], True).to(on.device)
            for batch in length_batches([len(t) for t in lists], batch_tokens)
        ]

        def limit(batches=batches):
            for model in models.values():
                for ids in batches:
                    outputs_of(model, [layer], {"input_ids": ids, "use_cache": False})

        def ours(job=job, readers=readers):
            acts, norms, _ = read_models(job, readers, lists)
            for tensor in (*acts.values(), *norms.values()):
                to_host(tensor)

        on.peak()
        rounds = 3 if on.cuda else 1
        seconds, least = on.seconds(ours, rounds), on.seconds(limit, rounds)
        flops = MODELS[0].harvest_flops if not on.small else 0.0
        found["batch_tokens"][batch_tokens] = {
            "tokens_per_second": tokens / seconds,
            "limit_tokens_per_second": tokens / least,
            "times_the_limit": seconds / least,
            "share_of_product_rate": flops * tokens / seconds / reached["flops"],
            "peak_gb": on.peak(),
        }
        yield found


def whole(on: Machine) -> Iterator[dict]:
    from lib.activations.harvest import harvest_activations
    from lib.activations.stream import Stream

    pair, models = opened(on)
    size, B = on.size, on.size["batches"][0]
    config = TrainConfig(
        size["features"], k=size["k"], tokens=10**9, batch_size=B, rate=1e-4, precision="bfloat16"
    )
    texts = documents(on, pair, (60 if on.cuda else 12) * size["shard"])
    options = {"batch_tokens": 32_768 if not on.small else 256, "device": on.device}
    stream = Stream(pair, texts, size["layers"] - 1, models, sample_tokens=size["shard"], **options)
    found = {"streamed": timed(on, Trainer(stream, config, on.device))}
    speed = found["streamed"]["tokens_per_second"]
    found["hours_for_400M"] = {MODELS[0].name: TOKENS / speed / 3600}
    for model in MODELS[1:]:  # by arithmetic: the operations of a token, of models and crosscoder
        times = (model.harvest_flops + sparse_flops(model)) / (
            MODELS[0].harvest_flops + sparse_flops(MODELS[0])
        )
        found["hours_for_400M"][model.name] = times * TOKENS / speed / 3600
    yield found
    del stream
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        store = harvest_activations(
            pair, texts[: len(texts) // 12], Path(folder) / "store", size["layers"] - 1, models, **options
        )
        found["to_disk_tokens_per_second"] = len(store) / (time.perf_counter() - began)
        found["from_disk"] = timed(on, Trainer(store, config, on.device))
    yield found


def timed(on: Machine, trainer: Trainer) -> dict:
    """Tokens a second of training for some seconds, the first batches not counted."""
    on.peak()
    B = trainer.config.batch_size
    with tf32(True):
        trainer.run_until(4 * B)
        began, before, waited = time.perf_counter(), trainer.shown, trainer.waiting()
        while time.perf_counter() - began < on.size["seconds"]:
            line = trainer.run_until(trainer.shown + 8 * B)
    seconds = time.perf_counter() - began
    found = {
        "tokens": trainer.shown - before,
        "tokens_per_second": (trainer.shown - before) / seconds,
        "waiting": (trainer.waiting() - waited) / seconds,
        "fve": line["fve"],
        "short": line.get("short"),
        "peak_gb": on.peak(),
    }
    trainer.close()
    return found


# --- smol at a card's size ----------------------------------------------------------------------------------

AT_SIZE = {
    False: dict(rank=256, learnt=4_000_000, batch=16_384, features=16_384, k=64, shown=20_000_000)
    | dict(read=20_000_000, seeds={"distilled": 5, "null_traces": 2}),
    True: dict(rank=2, learnt=400, batch=200, features=64, k=4, shown=2_000, read=2_000)
    | dict(seeds={"distilled": 2, "null_traces": 2}),
}
BEYOND, SAME = 0.99, 0.7  # quantile of the null's NRN; cosine of features that are the same


def base_of(on: Machine, folder: Path) -> Pair:
    """The pair ``smol``, its base alone; in small a random model with the vocabulary of ``tiny``."""
    if not on.traces:
        raise UserError("smol needs --traces: JSONL with question, thinking and answer")
    if not on.small:
        return replace(load_pair("smol"), dtype="bfloat16", others={})
    from transformers import Qwen2Config, Qwen2ForCausalLM

    tokenizer = load_pair("tiny").tokenizer()
    config = RandomPair("small", {}).config("base").to_dict() | {"vocab_size": len(tokenizer)}
    Qwen2ForCausalLM(Qwen2Config(**config)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Pair.of(folder, folder / "distilled", "small")


def smol(on: Machine) -> Iterator[dict]:
    """From a base to features that only its distilled model has, beside an adapter that learnt the same
    traces without their reflections. Text is read as far as it goes."""
    from lib.activations.harvest import harvest_activations
    from lib.distil.adapters import Recipe, make_adapter
    from lib.text.corpus import build

    size, found = AT_SIZE[on.small], {"seconds_of": {}}
    began = time.perf_counter()

    def done(what: str, **numbers) -> dict:
        nonlocal began
        found["seconds_of"][what] = round(time.perf_counter() - began, 1)
        found.update(numbers)
        began = time.perf_counter()
        return found

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        pair = base_of(on, folder / "base")
        recipe = Recipe(
            size["rank"], 2 * size["rank"], size["learnt"], batch_tokens=size["batch"], keep_every=10**9
        )
        for stage in ("distilled", "null_traces"):
            make_adapter(pair, stage, recipe, on.traces, folder / "states", folder)
            yield done(stage, **{f"loss_{stage}": read_log(folder / "states" / stage)[-1]["loss"]})
        own = {name: folder / name for name in ("distilled", "null_traces")}
        pair = replace(pair, models={"base": pair.models["base"], **own})
        pair = replace(pair, corpus=((str(on.traces), "trace"), (str(on.text), "general")))
        texts, corpus = [], build(pair, size["read"])
        with suppress(UserError):  # the text ends before the budget does
            texts.extend(corpus)
        options = dict(k=size["k"], tokens=size["shown"], batch_size=BATCH if not on.small else 64, rate=1e-3)
        config = TrainConfig(size["features"], precision="bfloat16", **options)
        crosscoders = {}
        for name in reversed(own):  # the null's first: what it says is asked of each of the others
            both, place = pair.between("base", name), folder / "store"
            store = harvest_activations(both, texts, place, device=on.device)
            yield done(f"harvest_{name}", tokens=len(store))
            for seed in range(size["seeds"][name]):
                at = folder / f"{name}_{seed}"
                crosscoder = train(store, replace(config, seed=seed), at, device=on.device)
                line = read_log(at)[-1]
                crosscoders[name, seed] = crosscoder, fired(crosscoder, store, on.device)
                numbers = {at.name: {key: line[key] for key in ("fve", "l0", "dead")}}
                yield done(at.name, **numbers, **unique_beside_null(crosscoders))
            shutil.rmtree(place)  # one of 20M tokens takes 46 GB


@torch.no_grad()
def fired(crosscoder, store, device: str) -> torch.Tensor:
    """Which features fire on the tokens kept for reports, [F]."""
    found = torch.zeros(crosscoder.n_features, dtype=torch.bool, device=device)
    crosscoder.to(device)
    for _, acts in store.reader("report", BATCH, 0):
        found |= (crosscoder.encode([a.to(device) for a in acts]) > 0).any(0)
    crosscoder.cpu()
    return found.cpu()


def unique_beside_null(crosscoders: dict) -> dict[str, list[float]]:
    """Of each crosscoder: the share of its alive features whose NRN lies beyond the null's first one, on the
    pair and on the null's others; and the share of the pair's first that another seed has, too."""
    nrn = {(name, s): c.nrn(1, name)[alive] for (name, s), (c, alive) in crosscoders.items()}
    limit = nrn.pop(("null_traces", 0)).quantile(BEYOND)
    rows = [c.W_dec.detach()[alive] for (name, _), (c, alive) in crosscoders.items() if name == "distilled"]
    rows = [torch.nn.functional.normalize(row, dim=1) for row in rows]
    share = lambda yes: float(yes.float().mean())  # noqa: E731
    return {
        "beyond_null": [share(x > limit) for (name, _), x in nrn.items() if name == "distilled"],
        "false_beyond_null": [share(x > limit) for (name, _), x in nrn.items() if name != "distilled"],
        "recurs": [share((rows[0] @ other.T).amax(1) >= SAME) for other in rows[1:]],
    }


PARTS = {"right": right, "step": step, "harvest": harvest, "whole": whole, "smol": smol}


def write(out: Path, name: str, found: dict) -> None:
    """Put a part's numbers into the file, beside the card and the others' numbers."""
    kept = json.loads(out.read_text()) if out.is_file() else {"parts": {}}
    kept |= {
        "card": "none",
        "driver": None,
        "torch": torch.__version__,
        "triton": fixed._triton() is not None,
    }
    if torch.cuda.is_available():
        kept["card"] = torch.cuda.get_device_name()
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        kept["driver"] = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    kept["parts"][name] = found
    scratch = out.with_suffix(".part")
    scratch.write_text(json.dumps(kept, indent=1) + "\n")
    scratch.replace(out)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="all but smol, if none is named")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--traces", type=Path, help="of smol: to learn from and to read")
    parser.add_argument("--text", type=Path, help="of smol: to read beside them (default: its corpus)")
    options = parser.parse_args(arguments)
    on, failed = Machine(options.device, options.small, options.traces, options.text), False
    for name in options.parts or [name for name in PARTS if name != "smol"]:
        began = time.perf_counter()
        try:
            found = PARTS[name](on)
            for some in [found] if isinstance(found, dict) else found:  # what is there if time is cut off
                found = some
                write(options.out, name, found | {"seconds": round(time.perf_counter() - began, 1)})
        except Exception as error:
            failed = True
            write(options.out, name, {"failed": f"{type(error).__name__}: {error}"[:500]})
            if not isinstance(error, (ImportError, OSError, UserError)):
                import traceback

                traceback.print_exc()
        finally:
            sparse.COMPILED = True
        print(name, json.dumps(json.loads(options.out.read_text())["parts"][name], indent=1), flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
