"""The long parts of the study, computed one after the other; interrupted, they go on."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch

from ..settings import ROOT, UserError, read_profile
from ..study.variants import NOTEBOOKS, PARTS, Budget, Study
from .notebooks import parameters_of


def open_study(
    pair: str, profile: str = "default", notebooks: Path = ROOT / "notebooks", root: Path = ROOT
) -> Study:
    """A run under study, with the parameters that its notebooks and its profile say."""
    stems = sorted(p.stem for p in notebooks.glob("[0-9][0-9]_*.ipynb"))
    # a run of another name has the default's parameters
    known = (notebooks / "profiles" / f"{profile}.yaml").is_file()
    chosen = read_profile(notebooks / "profiles", profile if known else "default", stems, pair)
    parameters = {
        stem: parameters_of(notebooks / f"{stem}.ipynb") | chosen.get(stem, {}) for stem in NOTEBOOKS
    }
    return Study(pair, profile, parameters, Budget(**chosen.get("study", {})), root)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m lib.tools.study",
        description="Compute the long parts of the study, or go on with them.",
    )
    parser.add_argument("--pair", default="tiny", help="entry of data/pairs.yaml (default: tiny)")
    parser.add_argument(
        "--profile", default="default", help="file of notebooks/profiles, whose run is studied"
    )
    parser.add_argument(
        "--only",
        nargs="*",
        default=[],
        metavar="PART",
        help=f"of {', '.join(PARTS)} (default: all, in this order)",
    )
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    try:
        wanted = [part for text in args.only for part in text.replace(",", " ").split()] or list(PARTS)
        if unknown := [part for part in wanted if part not in PARTS]:
            raise UserError(f"unknown part {unknown[0]!r}: there are {', '.join(PARTS)}")
        study = open_study(args.pair, args.profile)
        for part in PARTS:
            if part in wanted:
                began = time.monotonic()
                print(f"{part} ...", flush=True)
                done = study.make(part)
                print(
                    f"{part}: {f'{time.monotonic() - began:.0f} s' if done else 'there already'}", flush=True
                )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted: what is finished is kept; the same command goes on from there", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
