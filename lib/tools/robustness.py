"""The command line of lib.study.robustness."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

from ..settings import UserError
from ..study.robustness import along_training, on_another_text, write
from .study import open_study


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m lib.tools.robustness", description="How NRN depends on the training, or on the text."
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
        help="training: states that lib.distil.adapters kept on the way",
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
        study, began = open_study(args.pair), time.monotonic()
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
