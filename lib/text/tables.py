"""Words, templates and rules that are data: ``data/text/<name>.yaml``."""

from functools import cache

from ..settings import ROOT, read_yaml

TEXT_DIR = ROOT / "data" / "text"


@cache
def table(name: str) -> dict:
    """The entries of ``data/text/<name>.yaml``, in the order of the file: random draws depend on it."""
    return read_yaml(TEXT_DIR / f"{name}.yaml")
