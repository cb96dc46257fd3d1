"""The command line of a harvest in parts."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ..activations.harvest import harvest_activations, harvest_part, merge_parts
from ..activations.store import MADE_BY
from ..models.pairs import load_pair
from ..runs import Run
from ..settings import ROOT, UserError, checked, read_profile, read_value
from ..text.corpus import build
from .notebooks import parameters_of

# --- command line -------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> int:
    """What notebook 01 does, with its parameters, without the notebook; it then finds the store and goes on
    from there.
    """
    parser = argparse.ArgumentParser(
        prog="python -m lib.activations.harvest",
        description="Harvest the activations of a pair, whole or in parts.",
    )
    parser.add_argument("--pair", default="tiny", help="entry of data/pairs.yaml (default: tiny)")
    parser.add_argument(
        "--profile", default="default", help="file of notebooks/profiles; also the run's name"
    )
    parser.add_argument(
        "-p",
        dest="parameter",
        nargs=2,
        action="append",
        default=[],
        metavar=("NAME", "VALUE"),
        help="a parameter of notebook 01",
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="folder of the store (default: that of the run, where notebook 02 looks for it)",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--part", metavar="I/N", help="only part I of N, I from 0: one of N jobs")
    what.add_argument(
        "--merge",
        action="store_true",
        help="check the shards that N jobs have written, and make them a store",
    )
    args = parser.parse_args(argv)
    try:
        folder = ROOT / "notebooks"
        defaults = parameters_of(folder / f"{MADE_BY}.ipynb")
        profile = read_profile(
            folder / "profiles",
            args.profile,
            sorted(p.stem for p in folder.glob("[0-9][0-9]_*.ipynb")),
            args.pair,
        )
        given = {"pair": args.pair, "run": args.profile, **profile.get(MADE_BY, {})}
        given |= {name: read_value(text, defaults.get(name)) for name, text in args.parameter}
        chosen = defaults | checked(MADE_BY, defaults, given)
        pair = load_pair(chosen["pair"])
        corpus = build(pair, chosen["tokens"], trace_share=chosen["trace_share"], seed=chosen["seed"])
        path, layer = (
            args.out or Run(chosen["pair"], chosen["run"]).path("store"),
            (None if chosen["layer"] < 0 else chosen["layer"]),
        )
        if args.part:
            print(
                f"part {args.part}: {harvest_part(pair, corpus, path, _read_part(args.part), layer)} shards"
            )
        else:
            print((merge_parts if args.merge else harvest_activations)(pair, corpus, path, layer))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _read_part(text: str) -> tuple[int, int]:
    try:
        i, n = (int(number) for number in text.split("/"))
    except ValueError:
        raise UserError(f"part is {text!r}: it must be like 0/8, the first of eight") from None
    return i, n


if __name__ == "__main__":
    sys.exit(main())
