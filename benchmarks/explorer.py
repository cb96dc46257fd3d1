"""How long does a click in the feature explorer take, on a dictionary of the paper's size?

    python -m benchmarks.explorer [--features 32768] [--width 1536] [--clicks 60]

A made-up crosscoder of two models, activations of 40 features a token on 20,000 tokens, and the explorer on
them as notebook 03 opens it. A click is all that happens between choosing a feature and what is sent to the
browser: reading its activations from disk, its texts, its nearest features, the figure as JSON. Records the
median in results.json, in milliseconds:

    explorer_click_ms, explorer_filter_ms     a click; another order of the whole table
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import torch
from scipy import sparse

from lib.crosscoder.codes import SplitCodes
from lib.crosscoder.model import CrossCoder
from lib.features.explorer import Columns, Explorer

from .common import record, spread

TOKENS, DOCUMENT, ACTIVE = 20_000, 500, 40


def made_up(features: int, width: int, folder: Path) -> Explorer:
    """An explorer on random activations."""
    rng = np.random.default_rng(0)
    crosscoder = CrossCoder([width, width], features, variant="l1")
    acts = torch.randn(2, TOKENS, width)
    store = SimpleNamespace(
        tokens=rng.integers(0, 500, TOKENS),
        documents=np.arange(TOKENS) // DOCUMENT,
        models=crosscoder.names,
        activations=lambda rows: [a[rows] for a in acts],
    )
    store = type("Sized", (SimpleNamespace,), {"__len__": lambda self: TOKENS})(**vars(store))
    places = (np.repeat(np.arange(TOKENS), ACTIVE), rng.integers(0, features, TOKENS * ACTIVE))
    codes = sparse.csr_matrix(
        (rng.exponential(size=TOKENS * ACTIVE).astype(np.float32), places), shape=(TOKENS, features)
    )
    table = pd.DataFrame(
        {
            "feature": range(features),
            "alive": True,
            "nrn": crosscoder.nrn().numpy(),
            "frequency": ACTIVE / features,
            "mean_activation": 1.0,
            "label": rng.choice(["before reflection", "mixed", "in traces"], features),
            "top_token": "wait",
        }
    )
    columns = Columns.build(SplitCodes(np.arange(TOKENS), codes), folder, "made up")
    tokenizer = SimpleNamespace(convert_ids_to_tokens=lambda ids: [f"word{i}" for i in ids])
    return Explorer(crosscoder, store, table, columns, tokenizer)


def main() -> None:
    parser = argparse.ArgumentParser(description="Time clicks in the feature explorer.")
    parser.add_argument("--features", type=int, default=32_768)
    parser.add_argument("--width", type=int, default=1_536, help="of each of the two models")
    parser.add_argument("--clicks", type=int, default=60)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        explore = made_up(args.features, args.width, Path(folder))
        clicks, filters = [], []
        for feature in np.random.default_rng(1).integers(0, args.features, args.clicks + 1):
            began = time.perf_counter()
            figure, _ = explore.view(int(feature))
            figure.to_json()
            clicks.append(1000 * (time.perf_counter() - began))
            began = time.perf_counter()
            explore.lines(explore.select(sort="NRN", descending=bool(feature % 2), label="mixed").head(200))
            filters.append(1000 * (time.perf_counter() - began))
    clicks, filters = clicks[1:], filters[1:]  # the first pays for imports and norms
    print(
        f"{args.features:,} features, D = 2 x {args.width}: a click {np.median(clicks):.0f} ms (worst"
        f" {max(clicks):.0f}), a filter {np.median(filters):.0f} ms"
    )
    record(explorer_click_ms=spread(clicks), explorer_filter_ms=spread(filters))


if __name__ == "__main__":
    main()
