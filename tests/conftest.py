"""What all tests share: a run in a temporary folder, and one thread (the work is small, the machine may be
busy).
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a test that needs the network is a mistake

import pytest

from lib.runs import Run


def pytest_configure(config):
    config.addinivalue_line(
        "markers",
        'fault(kind, n=1): n cases of the kind "kill", "fault" or "bad input", counted by python -m'
        " tests.faults",
    )


def pytest_collection_modifyitems(items):
    for item in items:
        if mark := item.get_closest_marker("fault"):
            item.user_properties.append(("fault", [mark.args[0], mark.kwargs.get("n", 1)]))


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    import torch

    torch.set_num_threads(1)


@pytest.fixture
def run(tmp_path) -> Run:
    """A run named "test" of the pair "tiny" below a temporary root."""
    return Run("tiny", "test", root=tmp_path)


@pytest.fixture(scope="session")
def tokenizer():
    """That of the chat models in ``toys``, for tests that have none of their own."""
    from toys import chat_tokenizer

    return chat_tokenizer()


@pytest.fixture(scope="session")
def chromium():
    """A real browser, for tests marked ``browser``; they are skipped where there is none."""
    playwright = pytest.importorskip("playwright.sync_api")
    from lib.figures import find_browser

    if (path := find_browser()) is None:
        pytest.skip("no Chromium was found")
    quiet = [
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
    ]
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=path, args=quiet)
        yield browser
        browser.close()
