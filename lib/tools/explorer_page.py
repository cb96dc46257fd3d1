"""A notebook with the explorer of a run, for JupyterLab."""

from __future__ import annotations

import argparse
import sys

from ..features.table import MADE_BY
from ..models.pairs import load_pair
from ..runs import Run, read_manifest
from ..settings import ROOT, UserError
from ..study.variants import NOTEBOOKS
from .notebooks import prepared
from .study import open_study


def main(argv: list[str] | None = None) -> int:
    """Write a copy of notebooks/explore.ipynb for a pair and a run, and say where it is (``make explore``
    opens it).
    """
    parser = argparse.ArgumentParser(
        prog="python -m lib.tools.explorer_page",
        description="A notebook with the explorer of a run, for JupyterLab.",
    )
    parser.add_argument("--pair", default="tiny", help="entry of data/pairs.yaml (default: tiny)")
    parser.add_argument("--profile", default="default", help="name of the run")
    args = parser.parse_args(argv)
    try:
        load_pair(args.pair)
        run = Run(args.pair, args.profile)
        read_manifest(run.path("features"), MADE_BY)
        # what notebook 03 inspected
        everything = open_study(args.pair, args.profile).parameters[NOTEBOOKS[2]]
        asked = {name: everything[name] for name in ("max_tokens", "top_contexts", "nrn_over", "seed")}
        made = prepared(
            ROOT / "notebooks" / "explore.ipynb",
            run.folder / "explore.ipynb",
            {"pair": args.pair, "run": args.profile, **asked},
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(made.relative_to(ROOT).as_posix())
    return 0


if __name__ == "__main__":
    sys.exit(main())
