"""Opening a crosscoder: the run's own, or one from anywhere, checked on data; and ours on the hub.

    crosscoder = open_crosscoder("org/name", store.models, store)          # one of ours; or another's:
    crosscoder = open_crosscoder("cc_weights.pt", store.models, store, ("base", "distilled"), store.scales)

At the wrong layer or scale, or with its models exchanged, a crosscoder runs without an error and gives NRNs
that mean nothing. FVE = 1 - sum of squared errors / sum of squares about the mean, per model, shows it. Where
it is low, the same tokens are tried with what is often wrong put right: scales and the order of the models.
If that helps, the error says so; if not, it is the layer, the tokens or the models."""

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import HfApi, ModelCard, ModelCardData, snapshot_download

from ..activations.store import Store
from ..activations.store import open_store as open_store
from ..models import sources
from ..models.pairs import load_pair as load_pair
from ..runs import Progress, Run, write_json, write_text
from ..settings import ROOT, UserError, check, user_path
from . import seeds
from .codes import sample_rows
from .exchange import ORIGIN, WEIGHTS, Foreign, json_beside, layers_by_name, read_foreign
from .model import CrossCoder

FACTS = ("order", "scales", "layer", "least")
OURS = "crosscoder.safetensors"
FILES = (OURS, "config.json", ORIGIN, "README.md")  # what goes to the hub
TEMPLATE = ROOT / "docs" / "templates" / "model_card.md"
FACTORS = tuple(2.0**e for e in range(-6, 7) if e)  # by which a scale is tried to be off
LEAST = 0.5  # FVE, where nothing says what to expect
FAR = 2.0  # so many times as much unexplained as the model card says is far from what is expected
# of the variance: a smaller remainder may be rounding alone, which differs from processor to processor
FLOOR = 1e-4
# an alternative is believed if less than this share of the unexplained remains, over all models
NAMED, FACTOR = 0.9, 0.5
_REPO = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?(:[\w./-]+)?")


def open_all(
    run: Run, store: Store, source: str = "", facts: Mapping | None = None
) -> list[tuple[CrossCoder, str]]:
    """The run's crosscoders (``seeds.open_all``), each with the fingerprint of its weights; or the one that
    was trained elsewhere, if there is a ``source``.

    ``source``: as ``open_crosscoder`` takes it (paths from the repository's root); it is checked on the
    store. ``facts``: what its file does not say, by name: order, scales, layer, least. UserError if the run
    has none or they were trained on another store than this one, or if the other does not fit the store."""
    facts = check("crosscoder_facts", facts or {}, dict)
    if unknown := sorted(facts.keys() - set(FACTS)):
        raise UserError(f"unknown fact {unknown[0]!r} about the crosscoder: there are {', '.join(FACTS)}")
    if source:
        path = ROOT / user_path(source)
        opened = [open_crosscoder(path if path.exists() else source, store.models, store, **facts)]
    elif facts:
        raise UserError(
            f"facts ({', '.join(facts)}) are given about a crosscoder from elsewhere, but not where it is:"
            " give crosscoder_source"
        )
    else:
        opened = seeds.open_all(run, store)
    return [(crosscoder, seeds.content(crosscoder)) for crosscoder in opened]


def open_crosscoder(
    source: str | Path,
    names: Sequence[str],
    store=None,
    order: Sequence[str] | None = None,
    scales: Mapping[str, float] | None = None,
    layer: int | Mapping[str, int] | None = None,
    least: float | None = None,
) -> CrossCoder:
    """A crosscoder in any of the formats, which are told apart by their files; its models in the order
    ``names``.

    ``source``: a folder, a file of weights, or a repository on the hub: "org/name", "org/name@revision",
    "org/name:folder/in/it". ``order``, ``scales`` and ``layer`` are needed where the file does not say them
    (see ``lib.crosscoder.exchange``). With ``store``, layers and widths must be the store's, mean activations
    that the file lacks are taken from it, and on its tokens FVE must be at least ``least``: if not given, 1 -
    2 (1 - FVE of the model card), or 0.5 where there is no card. Give what was published: 0.5 lets a
    neighbouring layer pass."""
    foreign = read(find(source), names, order, scales, layer)
    crosscoder = foreign.crosscoder
    if store is None:
        return crosscoder
    if tuple(store.models) != crosscoder.names or list(store.widths.values()) != list(crosscoder.widths):
        held = ", ".join(f"{name} ({width})" for name, width in store.widths.items())
        raise UserError(
            f"the crosscoder reads {crosscoder.described()}, and the store holds {held}: they must be the"
            " same"
        )
    if foreign.layers != dict(store.layers):
        raise UserError(
            f"the crosscoder was trained on the output of layer {foreign.layers}, and the store holds that"
            f" of {dict(store.layers)}: harvest at its layer (layer of the pair in data/pairs.yaml, then"
            " notebook 01_harvest_activations)"
        )
    if not foreign.has_means:
        crosscoder.means.copy_(crosscoder.scaled([store.means[name] for name in crosscoder.names]))
    if least is None:
        promised = foreign.fve or {}
        least = {name: 1 - FAR * (1 - value) for name, value in promised.items()} or LEAST
    check_on_data(crosscoder, store, least)
    return crosscoder


def find(source: str | Path) -> Path:
    """Where the crosscoder lies that ``open_crosscoder`` calls ``source``; UserError if nowhere."""
    path, _, inside = str(source).partition(":")
    if user_path(source).exists():
        return user_path(source)
    if _REPO.fullmatch(str(source)):
        repo, _, revision = path.partition("@")
        return pull(repo, revision, inside)[0] / inside
    raise UserError(
        f"there is no {source}, and it names no repository on the hub: give a folder, a file of weights,"
        " or org/name"
    )


def is_ours(path: Path) -> bool:
    """Whether it is a folder in our own format."""
    return path.is_dir() and (path / OURS).is_file()


def read(path: Path, names: Sequence[str], order=None, scales=None, layer=None) -> Foreign:
    """A crosscoder in any of the formats, with its layers; see ``open_crosscoder``."""
    if not is_ours(path):
        return read_foreign(path, order, scales, layer, names)
    crosscoder = CrossCoder.load(path)
    origin = json_beside(path / ORIGIN)
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
    return Foreign(crosscoder, layers_by_name(layers, names), has_means=True, fve=origin.get("fve"))


# --- does it fit? -------------------------------------------------------------------------------------------


@torch.no_grad()
def check_on_data(
    crosscoder: CrossCoder, store, least: float | Mapping[str, float] = LEAST, tokens: int = 1024
) -> dict[str, float]:
    """FVE {model: value} on so many random tokens of the split "report". UserError, naming the likely cause,
    where it is not what it should be.

    That is: below ``least`` (one for all, or {model: value}) in any model; or clearly higher over all models
    with the store's scales, another scale, or another order. Scales are told from FVE roughly, a factor of
    1.25 not at all: it hardly changes what is explained. Nor can the order of models that are nearly the same
    be told; and where 1 - FVE is below FLOOR either way, nothing is: such remainders are rounding."""
    least = {name: least[name] if isinstance(least, Mapping) else least for name in crosscoder.names}
    check("least", list(least.values()), list, high=1)
    acts = store.activations(sample(store, tokens))
    given = fve(crosscoder, acts)
    low = [name for name in least if not _reaches(given[name], least[name])]
    alternatives = _alternatives(crosscoder, store, thorough=bool(low))
    tried, believed = [], []
    with Progress("other scales and orders", len(alternatives)) if low else nullcontext() as progress:
        for i, (reason, order, factors, share) in enumerate(alternatives):
            values = fve(crosscoder, [acts[j] * c for j, c in zip(order, factors)])
            tried.append(min(values.values()))
            fits = all(_reaches(values[name], least[name]) for name in least)
            if fits if low else unexplained(values) < share * unexplained(given):
                believed.append((tried[-1], reason, values))
            if progress:
                progress.update(i + 1)
    shown = ", ".join(f"{_digits(value)} ({name})" for name, value in given.items())
    if believed:
        best = max(lowest for lowest, _, _ in believed)
        # the plainest reason first
        _, reason, values = next(entry for entry in believed if entry[0] >= best - 0.02)
        raise UserError(
            f"FVE is {shown} as given, but {', '.join(map(_digits, values.values()))} with {reason}"
        )
    if low:
        wanted = ", ".join(f"{least[name]:.2f} in {name}" for name in low)
        tail = f", and no other scale or order makes it good (at best {max(tried):.2f})" if tried else ""
        raise UserError(
            f"FVE is {shown}, below {wanted}{tail}: the crosscoder was trained on another layer, on other"
            " tokens (templates, first positions), or on other models"
        )
    return given


def sample(store, tokens: int) -> np.ndarray:
    """So many random tokens of the split "report", sorted."""
    candidates = sample_rows(store, "report")
    drawn = np.random.default_rng(0).choice(candidates, min(tokens, len(candidates)), replace=False)
    return np.sort(drawn)


@torch.no_grad()
def fve(crosscoder: CrossCoder, acts: Sequence[torch.Tensor]) -> dict[str, float]:
    """{model: 1 - sum of squared errors / sum of squares about the mean} of RAW activations, in float64."""
    values = {}
    for name, x, x_hat in zip(crosscoder.names, acts, crosscoder.decode(crosscoder.encode(acts))):
        x = x.double()
        values[name] = float(1 - (x - x_hat).square().sum() / (x - x.mean(0)).square().sum())
    return values


def _reaches(value: float, least: float) -> bool:
    """Whether an FVE is as high as it must be; all above 1 - FLOOR count as equal, NaN is never enough."""
    return value >= min(least, 1 - FLOOR)


def unexplained(values: Mapping[str, float]) -> float:
    """Sum over models of 1 - FVE, each counted as FLOOR at least: below it, remainders cannot be compared."""
    return sum(float(np.maximum(1 - value, FLOOR)) for value in values.values())


def _digits(value: float) -> str:
    """An FVE with as many digits as it takes to tell it from 1."""
    return f"{value:.2f}" if value < 0.995 else f"{value:.5f}"


def _alternatives(crosscoder: CrossCoder, store, thorough: bool) -> list[tuple]:
    """(what is put right, in words; whose activations stand in each place; what they are multiplied by; the
    share of the unexplained that may then remain, for this to be what was meant even if FVE is not low),
    plainest first. Multiplying activations by c is giving c times the scale; FVE is the same for both."""
    names, scales, widths, ways = crosscoder.names, crosscoder.scales.tolist(), crosscoder.widths, []
    straight, stored = tuple(range(len(names))), [store.scales[name] for name in names]

    def add(reason: str, factors, order=straight, share: float = NAMED) -> None:
        if order != straight or any(not 0.8 < c < 1.25 for c in factors):
            ways.append((reason, order, factors, share))

    reason = "scales of 1: the weights contain the scale already, give 1 for each model"
    add(reason, [1 / s for s in scales])
    reason = f"the store's own scales ({', '.join(f'{x:.4g}' for x in stored)}): the scales are wrong"
    add(reason, [x / s for x, s in zip(stored, scales)])
    for order in itertools.permutations(straight) if len(names) <= 3 else ():
        if order != straight and all(widths[i] == widths[j] for i, j in enumerate(order)):
            reason = f"the models in the order {', '.join(names[j] for j in order)}: their order is wrong"
            add(reason, [1.0] * len(names), order)
            add(reason, [scales[j] / scales[i] for i, j in enumerate(order)], order)  # each keeps its scale
    for c in FACTORS if thorough else (0.5, 2.0):
        add(f"{c:g} times the scale: the scale is wrong", [c] * len(names), share=FACTOR)
        for name in names if thorough else ():
            factors = [c if name == other else 1.0 for other in names]
            add(f"{c:g} times the scale of {name}: that scale is wrong", factors, share=FACTOR)
    return ways


# --- the hub ------------------------------------------------------------------------------------------------


def model_card(
    folder: Path,
    pair: str,
    layers: Mapping[str, int],
    models: Mapping[str, str],
    health: Mapping[str, Mapping],
    corpus: str,
    licence: str = "other",
) -> Path:
    """Write README.md (docs/templates/model_card.md) and origin.json beside a saved crosscoder; returns
    README.md.

    ``layers``: {name: index of the layer read}; ``models``: {name: hub id, or where else it is from};
    ``health``: the health card (``lib.crosscoder.health``); ``corpus``: what it was trained on, in a
    sentence; ``licence``: an identifier of the hub, such as mit."""
    folder = Path(folder)
    crosscoder = CrossCoder.load(folder)
    names = crosscoder.names
    for what, given in (("layers", layers), ("models", models)):
        if set(given) != set(names):
            raise UserError(
                f"{what} are given for {', '.join(given)}: the crosscoder reads {', '.join(names)}"
            )
    if missing := [m for m in (*(f"fve_{name}" for name in names), "l0") if m not in health]:
        raise UserError(
            f"the health card lacks {', '.join(missing)}: measure it first (lib.crosscoder.health_cards)"
        )
    data = ModelCardData(
        license=licence,
        library_name="pytorch",
        tags=["crosscoder", "model-diffing", "sparse-autoencoder"],
        base_model=[m for m in models.values() if re.fullmatch(r"[\w.-]+/[\w.-]+", m)] or None,
    )
    values = {"crosscoder": crosscoder, "layers": layers, "models": models, "health": health, "shown": _shown}
    card = ModelCard.from_template(data, template_path=str(TEMPLATE), pair=pair, corpus=corpus, **values)
    origin = {"format": "ours", "order": names, "layers": {name: int(layers[name]) for name in names}}
    origin |= {"models": dict(models), "pair": pair}
    origin["fve"] = {name: float(health[f"fve_{name}"]["value"]) for name in names}
    write_json(folder / ORIGIN, origin)
    return write_text(folder / "README.md", str(card))


def _shown(metric: Mapping) -> str:
    value, ci = metric["value"], metric.get("ci")
    if value is None or not math.isfinite(value):
        return "unknown"
    return f"{value:.3f}" + (f" [{ci[0]:.3f}, {ci[1]:.3f}]" if ci else "")


def push(folder: Path, repo_id: str, private: bool = True) -> str:
    """Upload a crosscoder with its card to the hub, privately unless told otherwise; returns the commit.
    UserError if there is no card, or the hub does not take it."""
    folder = Path(folder)
    CrossCoder.load(folder)  # what cannot be read is not shared
    if missing := [name for name in FILES if not (folder / name).is_file()]:
        raise UserError(
            f"{folder} has no {' and no '.join(missing)}: write the model card first"
            " (lib.crosscoder.sharing.model_card)"
        )
    advice = "check the name, and log in with write access (hf auth login)"
    with _hub_errors(f"the hub did not take {repo_id}", advice):
        api = HfApi()
        api.create_repo(repo_id, private=private, exist_ok=True)
        what = {"folder_path": folder, "allow_patterns": list(FILES)}
        return api.upload_folder(repo_id=repo_id, commit_message="Crosscoder with its model card", **what).oid


def pull(repo_id: str, revision: str = "", inside: str = "") -> tuple[Path, str]:
    """(folder, commit) of a repository on the hub; the commit is recorded in data/revisions.json, and from
    then on required. ``revision``: a branch, tag or commit; ``inside``: a folder or file in it, if only that
    is wanted. UserError if the hub fails."""
    repo, commit = sources.resolved(f"{repo_id}@{revision}" if revision else repo_id)
    kinds = ("*.safetensors", "*.pt", "*.json", "README.md")
    if inside.endswith(WEIGHTS):
        wanted = [f"{Path(inside).parent.as_posix()}/*.json".removeprefix("./"), inside]
    else:
        wanted = [f"{inside}/{kind}" if inside else kind for kind in kinds]
    with _hub_errors(f"the hub did not give {repo} at {commit[:8]}", "connect, or give a folder instead"):
        return Path(snapshot_download(repo, revision=commit, allow_patterns=wanted)), commit


@contextmanager
def _hub_errors(what: str, advice: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # the network fails in many ways, each with a class of its own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{what} ({reason}): {advice}") from None
