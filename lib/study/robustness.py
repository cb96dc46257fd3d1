"""Does it depend on how long was distilled, and on the text that was read?

    python -m lib robustness training --pair smol --states data/runs/distil_smol/*/kept_*.pt
    python -m lib robustness texts --pair smol --traces TRACES.jsonl.gz --general TEXT.txt.gz

**Training.** A short fine-tuning moves little, so decoder rows hardly differ between the models and every NRN
lies near one half. For adapters that were kept on the way (``lib.distil.adapters``) the same small harvest and
crosscoder are made, with the null's beside them: does NRN's spread grow with training, and does it outgrow
the null's?

**Texts.** The default corpus was written by the models themselves. Here the same models are read on another
text, and another crosscoder is trained on that, of the same size and on as many tokens: do NRN and the
features come out alike, and does the feature that foretells a category in the one text foretell it in the
other?

Both write tables and a manifest to figures/<pair>/study/training and .../texts. They are no part of ``make
study``, since they need files that are not in the repository; what they were made from is in the manifest.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from ..activations.harvest import harvest_activations
from ..activations.store import Store
from ..crosscoder.codes import codes, firing_frequency
from ..crosscoder.health import health
from ..crosscoder.model import CrossCoder
from ..crosscoder.training import train
from ..distil.adapters import Recipe, adapted, ship
from ..features.detectors import detectors
from ..features.table import Inspection, category_features, feature_table
from ..labels import CATEGORIES
from ..models.pairs import Pair
from ..runs import fingerprint, versions, write_manifest, write_text
from ..settings import UserError, check
from ..text.corpus import Corpus, build, override
from . import nulls
from .variants import NOTEBOOKS, Study, needed

SPREAD = (0.01, 0.25, 0.5, 0.75, 0.99)  # quantiles of NRN that are reported


def described(crosscoder: CrossCoder, store: Store) -> dict[str, float]:
    """A crosscoder of a pair in one row: explained variance with interval, alive features, quantiles of their
    NRN and its spread.

    spread is q99 - q01; distance the mean of |distilled - base| / |base| over tokens of the report split, in
    the store's units.
    """
    card, row = health(crosscoder, store), {}
    for name in crosscoder.names:
        found = card[f"fve_{name}"]
        row |= {
            f"fve_{name}": found["value"],
            f"fve_{name}_low": found["ci"][0],
            f"fve_{name}_high": found["ci"][1],
        }
    nrn = crosscoder.nrn().numpy()[firing_frequency(crosscoder, store) > 0]
    row |= {
        "l0": card["l0"]["value"],
        "alive": len(nrn),
        **{f"nrn_q{round(100 * q):02d}": np.quantile(nrn, q) for q in SPREAD},
    }
    base, distilled = store.activations(store.rows("report"))
    distance = ((distilled.float() - base.float()).norm(dim=1) / base.float().norm(dim=1)).mean().item()
    return row | {"spread": row["nrn_q99"] - row["nrn_q01"], "distance": distance}


# --- along training -----------------------------------------------------------------------------------------


def along_training(study: Study, states: list[Path], tokens: int = 120_000, epochs: int = 6) -> pd.DataFrame:
    """``described`` for each adapter that was kept on the way: a row per file, with stage and tokens trained
    on.

    ``states``: files kept_<tokens>.pt of ``lib.distil.adapters``, in a folder named after their stage. Each adapter is
    put on the pair's base; ``tokens`` of the run's corpus are read with both, and a crosscoder of the run's
    size sees them ``epochs`` times.
    """
    check("tokens", tokens, int, low=1000)
    check("epochs", epochs, int, low=1)
    options = study.parameters[NOTEBOOKS[0]]
    config, rows = study.config(tokens=epochs * tokens), []
    for file in states:
        found = re.fullmatch(r"kept_(\d+)\.pt", file.name)
        if not found or not file.is_file():
            raise UserError(f"{file} is not a state that lib.distil.adapters kept (kept_<tokens>.pt)")
        stage, trained = file.resolve().parent.name, int(found[1])
        folder = study.work(f"along_{stage}_{trained}")
        pair = replace(
            study.pair,
            models={
                "base": study.pair.source("base"),
                "distilled": _adapter(study.pair, file, folder / "adapter"),
            },
        )
        corpus = build(pair, tokens, trace_share=options["trace_share"], seed=options["seed"])
        store = harvest_activations(
            pair, corpus, folder / "store", layer=None if options["layer"] < 0 else options["layer"]
        )
        crosscoder = train(store, config, folder / "crosscoder")
        rows.append(
            {"stage": stage, "trained": trained, "tokens": len(store), **described(crosscoder, store)}
        )
        print(f"{stage} after {trained:,} tokens: NRN's spread {rows[-1]['spread']:.3f}", flush=True)
    return pd.DataFrame(rows).sort_values(["stage", "trained"], ignore_index=True)


def _adapter(pair: Pair, file: Path, folder: Path) -> Path:
    """The adapter of a kept state as peft writes it."""
    if not (folder / "adapter_config.json").is_file():
        recipe = file.resolve().parent.parent / "recipe.json"
        own = Recipe(**json.loads(recipe.read_text(encoding="utf-8"))) if recipe.is_file() else Recipe()
        ship(adapted(pair.load("base"), own), file, folder, pair.shown("base"))
    return folder


# --- on another text ----------------------------------------------------------------------------------------


def on_another_text(study: Study, traces: str, general: str) -> dict[str, pd.DataFrame]:
    """The run's crosscoder and one that was trained on another text, each described and tried on both texts.

    crosscoders   text, the crosscoder that was trained on it: ``described``, and shares of features beyond
    the null's thresholds
    transfer      crosscoder's text, read on, FVE of either model with intervals
    detectors     crosscoder's text, read on, category, feature (chosen on its own text), AUROC before its
    sentences and controls, on report
    matches       feature by feature: cosine with the best one-to-one match, and the chance level

    Thresholds are those of the study's null, which was read on the run's own text.
    """
    p = study.parameters[NOTEBOOKS[0]]
    pair = override(study.pair, traces, general)
    corpus: Corpus = build(pair, p["tokens"], trace_share=p["trace_share"], seed=p["seed"])
    folder = study.work(f"text_{fingerprint(corpus.fingerprint)}")
    other = harvest_activations(pair, corpus, folder / "store", layer=None if p["layer"] < 0 else p["layer"])
    stores = {"own": study.store, "other": other}
    made = {"own": study.crosscoder, "other": train(other, study.config(), folder / "crosscoder")}
    limits = needed(study, "nulls").tables["thresholds"]
    rows, transfer, found, alive = [], [], [], []
    for text, crosscoder in made.items():
        scores = nulls.score_table(crosscoder, stores[text], study.max_tokens, n_boot=10)
        beyond = {
            f"beyond_{name}": float(nulls.beyond(scores, limits, name)[scores["alive"]].mean())
            for name in nulls.SCORES
        }
        rows.append({"text": text, **described(crosscoder, stores[text]), **beyond})
        alive.append(scores["alive"].to_numpy(bool))
        coded = {
            on: [codes(crosscoder, store, split, study.max_tokens) for split in ("choose", "report")]
            for on, store in stores.items()
        }
        table = feature_table(crosscoder, stores[text], *coded[text])
        chosen = category_features(table, study.parameters[NOTEBOOKS[2]]["nrn_over"])
        for on, store in stores.items():
            card = health(crosscoder, store)
            transfer += [
                {
                    "text": text,
                    "read_on": on,
                    "model": name,
                    "fve": card[f"fve_{name}"]["value"],
                    "low": card[f"fve_{name}"]["ci"][0],
                    "high": card[f"fve_{name}"]["ci"][1],
                }
                for name in crosscoder.names
            ]
            seen = Inspection(table, chosen, pd.DataFrame(), *coded[on])
            told = detectors(crosscoder, store, seen, {c: f for c, f in chosen.items() if c in CATEGORIES})
            found.append(told.assign(text=text, read_on=on))
    matches = nulls.match(made["own"], made["other"], *alive)
    matches["chance"] = nulls.match(made["own"], made["other"], *alive, shuffle=0)["cosine"]
    return {
        "crosscoders": pd.DataFrame(rows),
        "transfer": pd.DataFrame(transfer),
        "detectors": pd.concat(found, ignore_index=True),
        "matches": matches,
    }


# --- command ------------------------------------------------------------------------------------------------


def write(study: Study, name: str, tables: dict[str, pd.DataFrame], **inputs) -> Path:
    """Tables as CSV and a manifest to the run's figures/study/<name>; returns the folder."""
    folder = study.folder(name)
    folder.mkdir(parents=True, exist_ok=True)
    for table, frame in tables.items():
        write_text(
            folder / f"{table}.csv", frame.to_csv(index=False, float_format="%.6g", lineterminator="\n")
        )
    write_manifest(
        folder,
        fingerprint(name, inputs),
        part=name,
        inputs=inputs,
        tables=sorted(tables),
        versions=versions(),
    )
    return folder
