"""The benchmarks begin: each reads its options, and the shortest runs on a small size."""

import importlib
import sys

import pytest

from lib.settings import ROOT

MODULES = sorted(p.stem for p in (ROOT / "benchmarks").glob("*.py") if "def main" in p.read_text())


@pytest.mark.parametrize("name", MODULES)
def test_a_benchmark_says_what_it_takes(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(f"benchmarks.{name}").main()
    assert ended.value.code == 0 and "usage:" in capsys.readouterr().out


def test_clicks_of_the_explorer_are_timed(monkeypatch):
    explorer = importlib.import_module("benchmarks.explorer")
    recorded = {}
    monkeypatch.setattr(explorer, "record", lambda **measured: recorded.update(measured))
    monkeypatch.setattr(explorer, "TOKENS", 1000)
    monkeypatch.setattr(sys, "argv", ["explorer", "--features", "64", "--width", "8", "--clicks", "2"])
    explorer.main()
    assert recorded["explorer_click_ms"]["n"] == 2 and recorded["explorer_filter_ms"]["value"] > 0
