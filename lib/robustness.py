"""Does it depend on how long was distilled, and on the text that was read?

    python -m lib.robustness training --pair smol --states data/runs/distil_smol/*/kept_*.pt
    python -m lib.robustness texts --pair smol --traces TRACES.jsonl.gz --general TEXT.txt.gz

**Training.** A short fine-tuning moves little, so decoder rows hardly differ between the models and every NRN
lies near one half. For adapters that were kept on the way (``lib.lora``) the same small harvest and
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

import argparse
import json
import re
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch

from . import nulls
from .categories import detectors
from .corpus import Corpus, build, override
from .crosscoder import CrossCoder
from .features import Inspection, category_features, codes, feature_table
from .harvest import harvest
from .health import firing_frequency, health
from .lora import Recipe, adapted, ship
from .pairs import Pair
from .puzzles import CATEGORIES
from .results import UserError, check, fingerprint, versions, write_manifest, write_text
from .store import Store
from .study import NOTEBOOKS, Study, needed
from .training import train

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

    ``states``: files kept_<tokens>.pt of ``lib.lora``, in a folder named after their stage. Each adapter is
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
            raise UserError(f"{file} is not a state that lib.lora kept (kept_<tokens>.pt)")
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
        store = harvest(
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
    other = harvest(pair, corpus, folder / "store", layer=None if p["layer"] < 0 else p["layer"])
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


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m lib.robustness", description="How NRN depends on the training, or on the text."
    )
    parser.add_argument("what", choices=("training", "texts"))
    parser.add_argument(
        "--pair",
        default="smol",
        help="entry of data/pairs.yaml whose default run is compared with (default: smol)",
    )
    parser.add_argument(
        "--states",
        nargs="+",
        type=Path,
        default=[],
        metavar="FILE",
        help="training: states that lib.lora kept on the way",
    )
    parser.add_argument(
        "--tokens",
        type=int,
        default=120_000,
        help="training: tokens that are read for each state (default 120,000)",
    )
    parser.add_argument("--traces", default="", help="texts: JSONL of traces, or a data set on the hub")
    parser.add_argument("--general", default="", help="texts: text or JSONL, or a data set on the hub")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    try:
        if not (args.states if args.what == "training" else args.traces and args.general):
            raise UserError("training needs --states, texts needs --traces and --general")
        study, began = Study(args.pair), time.monotonic()
        if args.what == "training":
            table = along_training(study, args.states, args.tokens)
            folder = write(
                study,
                "training",
                {"training": table},
                base=study.pair.fingerprint("base"),
                tokens=args.tokens,
            )
        else:
            tables = on_another_text(study, args.traces, args.general)
            names = {"traces": Path(args.traces).name, "general": Path(args.general).name}
            folder = write(
                study, "texts", tables, store=study.store.fingerprint, crosscoder=study.mark, **names
            )
        print(f"{folder}: {time.monotonic() - began:.0f} s")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
