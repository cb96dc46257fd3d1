"""A crosscoder from anywhere, checked on data before anything is read off it; and ours on the hub, with a
model card.

    crosscoder = open_crosscoder("org/name", store.models, store)          # one of ours, from the hub; or another's:
    crosscoder = open_crosscoder("cc_weights.pt", store.models, store, order=("base", "distilled"), scales=store.scales)
    card(folder, "mine", layers, models, health(crosscoder, store), corpus="...", licence="mit")  # README.md and origin.json
    commit = push(folder, "org/name")

A crosscoder at the wrong layer or scale, or with its models exchanged, runs without an error and gives NRNs
that mean nothing (exchanged models turn every NRN round). What gives it away is FVE = 1 - sum of squared
errors / sum of squares about the mean, per model. Where it is low, the same tokens are tried again with what
is often wrong put right: a scale off by a factor, in all models or in one; a scale that the weights contain
already; the store's own scales; the models exchanged. If one of these mends it, the error says so; if none
does, it is the layer, the tokens or the models.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import HfApi, ModelCardData, snapshot_download

from ..activations.store import Store
from ..activations.store import open_store as open_store
from ..models import sources
from ..models.pairs import load_pair as load_pair
from ..runs import Progress, Run, fingerprint, read_manifest, write_text
from ..settings import ROOT, UserError, check
from .exchange import (
    DICTIONARY_LEARNING,
    ORIGIN,
    REPLICATION,
    WEIGHTS,
    Foreign,
    format_of,
    read_dictionary_learning,
    read_replication,
    tensors,
    weights_file,
)
from .model import CrossCoder

FACTS = ("order", "scales", "layer", "least")
OURS = "crosscoder.safetensors"
FILES = (OURS, "config.json", ORIGIN, "README.md")  # what goes to the hub
FACTORS = tuple(2.0**e for e in range(-6, 7) if e)  # by which a scale is tried to be off
LEAST = 0.5  # FVE, where nothing says what to expect
FAR = 2.0  # so many times as much unexplained as the model card says is far from what is expected
# of the variance: a smaller remainder may be rounding alone, which differs from processor to processor
FLOOR = 1e-4
NAMED, FACTOR = 0.9, 0.5  # an alternative is believed if less of the unexplained remains, over all models
_REPO = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?(:[\w./-]+)?")


def open_crosscoder(
    source: str | Path,
    names: Sequence[str],
    store=None,
    order: Sequence[str] | None = None,
    scales: Mapping[str, float] | None = None,
    layer: int | Mapping[str, int] | None = None,
    least: float | None = None,
) -> CrossCoder:
    """A crosscoder in any of the formats, its models in the order ``names``; what is there tells the format.

    ``source``: a folder, a file of weights, or a repository on the hub: "org/name", "org/name@revision",
    "org/name:folder/in/it". ``order``, ``scales`` and ``layer`` are needed where the file does not say them
    (see ``lib.crosscoder.exchange``). With ``store``, layers and widths must be the store's, mean activations that the
    file lacks are taken from it, and on its tokens FVE must be at least ``least``: if not given, 1 - 2 (1 -
    FVE of the model card), or 0.5 where there is no card. Give what was published: 0.5 lets a neighbouring
    layer pass.
    """
    path, _, inside = str(source).partition(":")
    if Path(source).exists():
        path = Path(source)
    elif _REPO.fullmatch(str(source)):
        repo, _, revision = path.partition("@")
        path = pull(repo, revision, inside)[0] / inside
    else:
        raise UserError(
            f"there is no {source}, and it names no repository on the hub: give a folder, a file of weights,"
            " or org/name"
        )
    found = _read(path, names, order, scales, layer)
    crosscoder = found.crosscoder
    if store is not None:
        if tuple(store.models) != crosscoder.names or list(store.widths.values()) != list(crosscoder.widths):
            raise UserError(
                f"the crosscoder reads {_listed(crosscoder.names, crosscoder.widths)}, and the store holds "
                f"{_listed(store.models, store.widths.values())}: they must be the same"
            )
        if found.layers != dict(store.layers):
            raise UserError(
                f"the crosscoder was trained on the output of layer {found.layers}, and the store holds that"
                f" of {dict(store.layers)}: harvest at its layer (layer of the pair in data/pairs.yaml, then"
                " notebook 01_harvest_activations)"
            )
        if not found.has_means:
            crosscoder.means.copy_(crosscoder.scaled([store.means[name] for name in crosscoder.names]))
        if least is None:
            least = {name: 1 - FAR * (1 - value) for name, value in found.fve.items()} if found.fve else LEAST
        check_on_data(crosscoder, store, least)
    return crosscoder


def _read(path: Path, names: Sequence[str], order, scales, layer) -> Foreign:
    if path.is_dir() and (path / OURS).is_file():
        crosscoder = CrossCoder.load(path)
        origin = json.loads((path / ORIGIN).read_text(encoding="utf-8")) if (path / ORIGIN).is_file() else {}
        if crosscoder.names != tuple(names):
            raise UserError(
                f"models {', '.join(names)} are wanted: this crosscoder has {', '.join(crosscoder.names)}, in"
                " this order"
            )
        if (layers := origin.get("layers", layer)) is None:
            raise UserError(
                f"{path} does not say at which layer the crosscoder was trained: give layer, the index of the"
                " decoder layer whose output it reads"
            )
        layers = {n: int(layers[n] if isinstance(layers, Mapping) else layers) for n in names}
        return Foreign(crosscoder, layers, "ours", has_means=True, fve=origin.get("fve"))
    file = weights_file(path)
    readers = {REPLICATION: read_replication, DICTIONARY_LEARNING: read_dictionary_learning}
    return readers[format_of(tensors(file), file)](file, order, scales, layer, names)


def mark_of(crosscoder: CrossCoder) -> str:
    """Fingerprint of all that decides what a crosscoder does: for what is made from it, as that of notebook
    02's manifest.
    """
    state = {name: t.cpu().numpy() for name, t in crosscoder.state_dict().items()}
    return fingerprint(
        "crosscoder", crosscoder.names, crosscoder.widths, crosscoder.variant, crosscoder.k, state
    )


def _listed(names, widths) -> str:
    return ", ".join(f"{name} ({width})" for name, width in zip(names, widths))


# --- does it fit? -------------------------------------------------------------------------------------------


@torch.no_grad()
def check_on_data(
    crosscoder: CrossCoder,
    store,
    least: float | Mapping[str, float] = LEAST,
    tokens: int = 1024,
    split: str = "report",
    seed: int = 0,
) -> dict[str, float]:
    """FVE {model: value} on so many random tokens of a split. UserError, naming the likely cause, where it is
    not what it should be.

    That is: below ``least`` (one for all, or {model: value}) in any model; or clearly higher over all models
    with the store's scales, another scale, or another order. Scales are told from FVE roughly, a factor of
    1.25 not at all: it hardly changes what is explained. Nor can the order of models that are nearly the same
    be told; and where 1 - FVE is below FLOOR either way, nothing is: such remainders are rounding.
    """
    least = {name: least[name] if isinstance(least, Mapping) else least for name in crosscoder.names}
    check("least", list(least.values()), list, high=1)
    rows = store.rows(split)
    if len(rows) < 2:
        raise UserError(
            f"the store has no tokens in its split {split!r}: harvest more documents (notebook"
            " 01_harvest_activations)"
        )
    drawn = np.random.default_rng(seed).choice(rows, min(tokens, len(rows)), replace=False)
    acts = store.activations(np.sort(drawn))
    given = fve(crosscoder, acts)
    low = not _reach(given, least)
    ways = _ways(crosscoder, store, thorough=low)
    found = []
    with Progress("other scales and orders", len(ways)) if low else _Silent() as progress:
        for i, way in enumerate(ways):
            tried = fve(crosscoder, [acts[j] * c for j, c in zip(way.order, way.factors)])
            found.append((min(tried.values()), way, tried))
            progress.update(i + 1)
    own = ", ".join(f"{_digits(value)} ({name})" for name, value in given.items())
    best = max(found, key=lambda way: way[0], default=None)
    unexplained = _unexplained(given)
    meant = [
        (lowest, way, tried)
        for lowest, way, tried in found
        if (_reach(tried, least) if low else _unexplained(tried) < way.enough * unexplained)
    ]
    if meant:
        top = max(lowest for lowest, _, _ in meant)
        _, way, tried = next(m for m in meant if m[0] >= top - 0.02)  # the plainest reason first
        raise UserError(
            f"FVE is {own} as given, but {', '.join(map(_digits, tried.values()))} with {way.said}"
        )
    if low:
        bad = ", ".join(
            f"{least[name]:.2f} in {name}"
            for name, value in given.items()
            if not _reaches(value, least[name])
        )
        tail = f", and no other scale or order makes it good (at best {best[0]:.2f})" if best else ""
        raise UserError(
            f"FVE is {own}, below {bad}{tail}: the crosscoder was trained on another layer, on other tokens "
            "(templates, first positions), or on other models"
        )
    return given


def _digits(value: float) -> str:
    """An FVE with as many digits as it takes to tell it from 1."""
    return f"{value:.2f}" if value < 0.995 else f"{value:.5f}"


def _unexplained(found: Mapping[str, float]) -> float:
    """Sum over models of 1 - FVE, each counted as FLOOR at least: below it, remainders cannot be compared."""
    return sum(float(np.maximum(1 - value, FLOOR)) for value in found.values())


def _reaches(value: float, least: float) -> bool:
    """Whether an FVE is as high as it must be; all above 1 - FLOOR count as equal, NaN is never enough."""
    return value >= min(least, 1 - FLOOR)


def _reach(found: Mapping[str, float], least: Mapping[str, float]) -> bool:
    return all(_reaches(found[name], least[name]) for name in least)


class _Silent:
    def __enter__(self):
        return self

    def __exit__(self, *error) -> None:
        pass

    def update(self, done: int) -> None:
        pass


@torch.no_grad()
def fve(crosscoder: CrossCoder, acts: Sequence[torch.Tensor]) -> dict[str, float]:
    """{model: 1 - sum of squared errors / sum of squares about the mean} of RAW activations, one [B, d_m] per
    model; float64 sums.
    """
    values = {}
    for name, x, x_hat in zip(crosscoder.names, acts, crosscoder.decode(crosscoder.encode(acts))):
        x = x.double()
        values[name] = float(1 - (x - x_hat).square().sum() / (x - x.mean(0)).square().sum())
    return values


@dataclass(frozen=True)
class _Way:
    """What is put right; whose activations stand in each place; what they are multiplied by; how much of the
    unexplained may then remain for this to be what was meant, even where FVE is not low."""

    said: str
    order: tuple[int, ...]
    factors: tuple[float, ...]
    enough: float


def _ways(crosscoder: CrossCoder, store, thorough: bool) -> list[_Way]:
    """Plainest first. Multiplying activations by c is giving c times the scale, and FVE is the same for both."""
    n, s = len(crosscoder.names), crosscoder.scales.tolist()
    straight, theirs = tuple(range(n)), [store.scales[name] for name in crosscoder.names]
    ways = [
        _Way(
            "scales of 1: the weights contain the scale already, give 1 for each model",
            straight,
            tuple(1 / x for x in s),
            NAMED,
        ),
        _Way(
            f"the store's own scales ({', '.join(f'{x:.4g}' for x in theirs)}): the scales are wrong",
            straight,
            tuple(t / x for t, x in zip(theirs, s)),
            NAMED,
        ),
    ]
    for order in itertools.permutations(straight) if n <= 3 else ():
        if order != straight and all(
            crosscoder.widths[i] == crosscoder.widths[j] for i, j in enumerate(order)
        ):
            said = (
                f"the models in the order {', '.join(crosscoder.names[j] for j in order)}: their order is"
                " wrong"
            )
            ways.append(_Way(said, order, (1.0,) * n, NAMED))
            # each keeps its scale
            ways.append(_Way(said, order, tuple(s[j] / s[i] for i, j in enumerate(order)), NAMED))
    for c in FACTORS if thorough else (0.5, 2.0):
        ways.append(_Way(f"{c:g} times the scale: the scale is wrong", straight, (c,) * n, FACTOR))
        for i, name in enumerate(crosscoder.names if thorough else ()):
            alone = tuple(c if i == j else 1.0 for j in range(n))
            ways.append(
                _Way(f"{c:g} times the scale of {name}: that scale is wrong", straight, alone, FACTOR)
            )
    return [way for way in ways if way.order != straight or any(not 0.8 < c < 1.25 for c in way.factors)]


# --- the hub ------------------------------------------------------------------------------------------------


def card(
    folder: Path,
    pair: str,
    layers: Mapping[str, int],
    models: Mapping[str, str],
    health: Mapping[str, Mapping],
    corpus: str,
    licence: str = "other",
) -> Path:
    """Write README.md, a model card, and origin.json beside a saved crosscoder; returns README.md.

    ``layers``: {name: index of the layer read}; ``models``: {name: hub id, or where else it is from};
    ``health``: the health card (``lib.crosscoder.health``); ``corpus``: what it was trained on, in a sentence;
    ``licence``: an identifier of the hub, such as mit.
    """
    folder = Path(folder)
    crosscoder = CrossCoder.load(folder)
    for what, given in (("layers", layers), ("models", models)):
        if set(given) != set(crosscoder.names):
            raise UserError(
                f"{what} are given for {', '.join(given)}: the crosscoder reads {', '.join(crosscoder.names)}"
            )
    if missing := [m for m in (*(f"fve_{name}" for name in crosscoder.names), "l0") if m not in health]:
        raise UserError(
            f"the health card lacks {', '.join(missing)}: measure it first (lib.crosscoder.health.health)"
        )
    on_hub = [m for m in models.values() if re.fullmatch(r"[\w.-]+/[\w.-]+", m)]
    tags = ["crosscoder", "model-diffing", "sparse-autoencoder"]
    data = ModelCardData(license=licence, library_name="pytorch", tags=tags, base_model=on_hub or None)
    rows = "\n".join(
        f"| {name} | {models[name]} | output of decoder layer {layers[name]} | {width} | {scale:.6g} "
        f"| {_shown(health[f'fve_{name}'])} |"
        for name, width, scale in zip(crosscoder.names, crosscoder.widths, crosscoder.scales.tolist())
    )
    shown, distinct = crosscoder.seen.tolist()
    wanted = f", k = {crosscoder.k}" if crosscoder.variant != "l1" else ""
    text = f"""---
{data.to_yaml()}
---

# Crosscoder of the pair {pair}

One dictionary of {crosscoder.n_features:,} features for the residual streams of {len(crosscoder.names)} models on the same tokens.

| model | weights | read at | width | scale | FVE |
|---|---|---|---|---|---|
{rows}

- Sparsity: {crosscoder.variant}{wanted}; L0 {_shown(health["l0"])}.
- Trained on {shown:,} tokens, {distinct:,} of them distinct: {corpus}
- The scale multiplies raw activations (sqrt(d) / mean norm) and is applied inside: inputs and outputs are raw.
- FVE is 1 - sum of squared errors / sum of squares about the mean, on documents that were not trained on; brackets are 95% intervals.

```python
from lib.crosscoder.sharing import open_crosscoder

# this repository's name, and a store: the activations of these models that notebook 01 harvests
crosscoder = open_crosscoder("org/name", {crosscoder.names!r}, store)
features = crosscoder.encode(activations)  # [B, {crosscoder.n_features}], from raw activations [B, d], one per model
```

`{OURS}`: W_enc and W_dec [feature, widths side by side], b_enc, b_dec (scaled space), scales, means, threshold; `config.json`: shape,
names, sparsity; `{ORIGIN}`: layers. Method: Baek & Tegmark 2025, [arXiv:2503.03730](https://arxiv.org/abs/2503.03730).
"""
    layers = {name: int(layers[name]) for name in crosscoder.names}
    origin = {
        "format": "ours",
        "order": crosscoder.names,
        "layers": layers,
        "models": dict(models),
        "pair": pair,
        "fve": {name: float(health[f"fve_{name}"]["value"]) for name in crosscoder.names},
    }
    write_text(folder / ORIGIN, json.dumps(origin, indent=2) + "\n")
    return write_text(folder / "README.md", text)


def _shown(metric: Mapping) -> str:
    value, ci = metric["value"], metric.get("ci")
    return (
        "unknown"
        if value is None or not math.isfinite(value)
        else f"{value:.3f}" + (f" [{ci[0]:.3f}, {ci[1]:.3f}]" if ci else "")
    )


def push(folder: Path, repo_id: str, private: bool = True) -> str:
    """Upload a crosscoder with its card to the hub, as a private repository unless told otherwise; returns
    the commit.

    Nothing else that lies in the folder is uploaded. UserError if there is no card, or the hub does not take
    it.
    """
    folder = Path(folder)
    CrossCoder.load(folder)  # what cannot be read is not shared
    if missing := [name for name in FILES if not (folder / name).is_file()]:
        raise UserError(
            f"{folder} has no {' and no '.join(missing)}: write the model card first (lib.crosscoder.sharing.card)"
        )
    try:
        api = HfApi()
        api.create_repo(repo_id, private=private, exist_ok=True)
        done = api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            allow_patterns=list(FILES),
            commit_message="Crosscoder with its model card",
        )
    except Exception as error:  # the network fails in many ways, each with a class of its own
        raise UserError(
            f"the hub did not take {repo_id} ({_reason(error)}): check the name, and log in with write access"
            " (hf auth login)"
        ) from None
    return done.oid


def pull(repo_id: str, revision: str = "", inside: str = "") -> tuple[Path, str]:
    """(folder, commit) of a repository on the hub; the commit is recorded in data/revisions.json, and from
    then on required.

    ``revision``: a branch, tag or commit; ``inside``: a folder or file in it, if only that is wanted. Only
    weights and their descriptions are downloaded. UserError if the hub fails.
    """
    repo, commit = sources.resolved(f"{repo_id}@{revision}" if revision else repo_id)
    kinds = ("*.safetensors", "*.pt", "*.json", "README.md")
    if inside.endswith(WEIGHTS):
        wanted = [f"{Path(inside).parent.as_posix()}/*.json".removeprefix("./"), inside]
    else:
        wanted = [f"{inside}/{kind}" if inside else kind for kind in kinds]
    try:
        return Path(snapshot_download(repo, revision=commit, allow_patterns=wanted)), commit
    except Exception as error:
        raise UserError(
            f"the hub did not give {repo} at {commit[:8]} ({_reason(error)}): connect, or give a folder"
            " instead"
        ) from None


def _reason(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


# --- the artefact -------------------------------------------------------------------------------------------


def open_for_run(
    run: Run, store: Store, source: str = "", facts: Mapping | None = None
) -> tuple[CrossCoder, str]:
    """The run's crosscoder and its fingerprint; or one that was trained elsewhere, if there is a ``source``.

    ``source``: a folder, a file of weights (from the repository's root) or org/name on the hub, in any of the
    formats of ``lib.crosscoder.sharing``, which checks it on the store. ``facts``: what its file does not say, by name:
    order, scales, layer, least. UserError if the run's is missing or was trained on another store than this
    one, or if the other does not fit the store.
    """
    if unknown := sorted(set(facts or {}) - set(FACTS)):
        raise UserError(f"unknown fact {unknown[0]!r} about the crosscoder: there are {', '.join(FACTS)}")
    if source:
        there = ROOT / source
        crosscoder = open_crosscoder(
            there if there.exists() else source, store.models, store, **(facts or {})
        )
        return crosscoder, mark_of(crosscoder)
    if facts:
        raise UserError(
            f"facts ({', '.join(facts)}) are given about a crosscoder from elsewhere, but not where it is:"
            " give crosscoder_source"
        )
    manifest = read_manifest(run.path("crosscoder"), "02_train_crosscoder")
    if manifest.get("store") != store.fingerprint:
        raise UserError(
            "the crosscoder was trained on another store than there is now: run notebook 02_train_crosscoder"
            " again (make figures ONLY=02)"
        )
    return CrossCoder.load(run.path("crosscoder")), manifest["fingerprint"]
