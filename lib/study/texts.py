"""Does it depend on how long was distilled, and on the text that was read?

**Training.** For adapters that were kept on the way (``lib.distil.adapters``) the same small harvest and
crosscoder are made: does the spread of NRN grow with training, and does it outgrow the null's?

**Texts.** The corpus of ``smol`` was written by its models. Here the same models read another text, and
another crosscoder is trained on that, of the same size and on as many tokens: do NRN and the features come
out alike, and does the feature that predicts a category in the one text predict it in the other?

Both need files that are not in the repository (states of a training, another text); what they gave for
``smol`` is, and is read where the models and the crosscoder are still the same."""

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd
import plotly.express as px
import plotly.graph_objects as go

from ..activations.harvest import harvest_activations
from ..activations.store import Store
from ..crosscoder.codes import codes, firing_frequency
from ..crosscoder.health import health_card
from ..crosscoder.model import CrossCoder
from ..crosscoder.recurrence import match
from ..crosscoder.training import train
from ..features.detectors import detectors
from ..features.table import Inspection, category_features, feature_table
from ..features.uniqueness import SCORES, beyond, score_table
from ..figures import COLOURS, express_bars, plain_titles
from ..labels import CATEGORIES
from ..models.pairs import Pair
from ..results import Part, read_part
from ..runs import MANIFEST, fingerprint
from ..settings import UserError, check, user_path
from ..text.corpus import build, override
from . import architectures
from .variants import HARVEST, Variant, write_part

QUANTILES = ("nrn_q01", "nrn_q25", "nrn_q50", "nrn_q75", "nrn_q99")


def describe(crosscoder: CrossCoder, store: Store) -> dict[str, float]:
    """A crosscoder of a pair in one row, out of ``architectures.describe``: explained variance with interval,
    alive features, quantiles of their NRN and its spread.

    spread is q99 - q01; distance the mean of |distilled - base| / |base| over tokens of the report split, in
    the store's units."""
    every = architectures.describe(crosscoder, store)
    row = {name: value for name, value in every.items() if name.startswith("fve_")}
    alive = int((firing_frequency(crosscoder, store) > 0).sum())
    row |= {"l0": every["l0"], "alive": alive} | {name: every[name] for name in QUANTILES}
    base, distilled = (acts.float() for acts in store.activations(store.rows("report")))
    distance = ((distilled - base).norm(dim=1) / base.norm(dim=1)).mean().item()
    return row | {"spread": row["nrn_q99"] - row["nrn_q01"], "distance": distance}


def compute_training(
    variant: Variant, states: Sequence[str] = (), tokens: int = 120_000, epochs: int = 6
) -> Part:
    """The part "training": ``describe`` for each adapter that was kept on the way, a row per file, with stage
    and tokens trained on. Read where no ``states`` are given.

    ``states``: files kept_<tokens>.pt of ``lib.distil.adapters``, in a folder named after their stage. Each
    adapter is put on the pair's base; ``tokens`` of the run's corpus are read with both models, and a
    crosscoder of the run's size sees them ``epochs`` times."""
    check("tokens", tokens, int, low=1000)
    check("epochs", epochs, int, low=1)
    inputs = {"base": variant.pair.fingerprint("base"), "tokens": tokens}
    if states:
        table = _along_training(variant, [user_path(state) for state in states], tokens, epochs)
        write_part(variant.run, "training", fingerprint("training", inputs), {}, {"training": table}, inputs)
    return read_part(variant.run, "training", **inputs)


def _along_training(variant: Variant, states: list[Path], tokens: int, epochs: int) -> pd.DataFrame:
    for file in states:
        if not re.fullmatch(r"kept_\d+\.pt", file.name) or not file.is_file():
            raise UserError(f"{file} is not a state that lib.distil.adapters kept (kept_<tokens>.pt)")
    p, config, rows = variant.parameters[HARVEST], variant.config(tokens=epochs * tokens), []
    for file in states:
        stage, trained = file.resolve().parent.name, int(file.stem.removeprefix("kept_"))
        folder = variant.folder(f"along_{stage}_{trained}")
        adapter = _adapter(variant.pair, file, folder / "adapter")
        pair = replace(variant.pair, models={"base": variant.pair.source("base"), "distilled": adapter})
        corpus = build(pair, tokens, trace_share=p["trace_share"], seed=p["seed"])
        store = harvest_activations(pair, corpus, folder / "store", layer=variant.layer)
        row = describe(train(store, config, folder / "crosscoder"), store)
        rows.append({"stage": stage, "trained": trained, "tokens": len(store), **row})
        print(f"{stage} after {trained:,} tokens: spread of NRN {row['spread']:.3f}", flush=True)
    return pd.DataFrame(rows).sort_values(["stage", "trained"], ignore_index=True)


def _adapter(pair: Pair, file: Path, folder: Path) -> Path:
    """The adapter of a kept state as peft writes it."""
    from ..distil.adapters import Recipe, adapted, ship  # peft takes seconds, and is needed here alone

    if not (folder / "adapter_config.json").is_file():
        recipe = file.resolve().parent.parent / "recipe.json"
        own = Recipe(**json.loads(recipe.read_text(encoding="utf-8"))) if recipe.is_file() else Recipe()
        ship(adapted(pair.load("base"), own), file, folder, pair.shown("base"))
    return folder


def plot_training(training: pd.DataFrame) -> go.Figure:
    """Spread of NRN and distance of the activations against tokens trained on, a line per stage."""
    names = {"spread": "spread of NRN (q99 - q01)", "distance": "distance of the activations"}
    lines = training.melt(["stage", "trained"], list(names), var_name="measure").replace({"measure": names})
    fig = px.line(
        lines, x="trained", y="value", color="stage", facet_col="measure", markers=True,
        facet_col_spacing=0.1, color_discrete_map=COLOURS,
        title="Along training", labels={"trained": "tokens trained on", "value": ""},
    )  # fmt: skip
    return plain_titles(fig.update_yaxes(matches=None, showticklabels=True, rangemode="tozero"))


def compute_texts(variant: Variant, traces: str = "", general: str = "") -> Part:
    """The part "texts": the run's crosscoder and one that was trained on another text (files or data sets of
    the hub), each described and applied to both texts. Read where no text is given.

    crosscoders   text, the crosscoder that was trained on it: ``describe``, and shares of features beyond
    the null's thresholds
    transfer      crosscoder's text, read on, FVE of either model with intervals
    detectors     crosscoder's text, read on, category, feature (chosen on its own text), AUROC before its
    sentences and controls, on report
    matches       feature by feature: cosine with the best one-to-one match, and the chance level

    Thresholds are those of the study's null, which was read on the run's own text."""
    if bool(traces) != bool(general):
        raise UserError("another text needs both traces and general: give both, or neither")
    if traces:
        tables = _on_another_text(variant, traces, general)
        names = {"traces": Path(traces).name, "general": Path(general).name}
        inputs = {"store": variant.store.fingerprint, "crosscoder": variant.crosscoder_fingerprint} | names
        write_part(variant.run, "texts", fingerprint("texts", inputs), {}, tables, inputs)
    manifest = variant.run.path("crosscoder") / MANIFEST  # absent in a fresh clone: then nothing contradicts
    known = {"crosscoder": json.loads(manifest.read_text())["fingerprint"]} if manifest.is_file() else {}
    return read_part(variant.run, "texts", **known)


def _on_another_text(variant: Variant, traces: str, general: str) -> dict[str, pd.DataFrame]:
    p = variant.parameters[HARVEST]
    pair = override(variant.pair, traces, general)
    corpus = build(pair, p["tokens"], trace_share=p["trace_share"], seed=p["seed"])
    folder = variant.folder(f"text_{fingerprint(corpus.fingerprint)}")
    other = harvest_activations(pair, corpus, folder / "store", layer=variant.layer)
    stores = {"own": variant.store, "other": other}
    crosscoders = {"own": variant.crosscoder, "other": train(other, variant.config(), folder / "crosscoder")}
    limits = variant.null_limits()
    rows, transfer, predictors, alive = [], [], [], []
    for text, crosscoder in crosscoders.items():
        scores = score_table(crosscoder, stores[text], variant.max_tokens, n_boot=10)
        alive.append(scores["alive"].to_numpy(bool))
        shares = {f"beyond_{s}": float(beyond(scores, limits, s)[alive[-1]].mean()) for s in SCORES}
        rows.append({"text": text, **describe(crosscoder, stores[text]), **shares})
        coded = {
            on: [codes(crosscoder, store, split, variant.max_tokens) for split in ("choose", "report")]
            for on, store in stores.items()
        }
        table = feature_table(crosscoder, stores[text], *coded[text])
        chosen = category_features(table, variant.nrn_over)
        wanted = {c: f for c, f in chosen.items() if c in CATEGORIES}
        for on, store in stores.items():
            quality, both = health_card(crosscoder, store), {"text": text, "read_on": on}
            for name in crosscoder.names:
                fve, (low, high) = (quality[f"fve_{name}"][key] for key in ("value", "ci"))
                transfer.append({**both, "model": name, "fve": fve, "low": low, "high": high})
            inspection = Inspection(table, chosen, pd.DataFrame(), *coded[on], store, crosscoder)
            predictors.append(detectors(inspection, wanted).assign(**both))
    pair_of = (*crosscoders.values(), *alive)
    return {
        "crosscoders": pd.DataFrame(rows),
        "transfer": pd.DataFrame(transfer),
        "detectors": pd.concat(predictors, ignore_index=True),
        "matches": match(*pair_of).assign(chance=match(*pair_of, shuffle=0)["cosine"]),
    }


def plot_transfer(predictors: pd.DataFrame) -> go.Figure:
    """AUROC of each category's feature, on the text that it was chosen on and on the other, a panel per text
    that the crosscoder was trained on."""
    rows = predictors[predictors["predictor"] == "feature"]
    fig = px.bar(
        rows, x="category", y="auroc", color="read_on", facet_col="text", barmode="group",
        title="A feature chosen on one text, on both texts",
        labels={"auroc": "AUROC before a sentence", "read_on": "read on", "category": ""},
        **express_bars(rows, "auroc", "low", "high"),
    )  # fmt: skip
    fig.add_hline(y=0.5, line_dash="dot").update_yaxes(range=[0, 1])
    return plain_titles(fig, "trained on: ")
