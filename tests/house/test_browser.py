"""In a real JupyterLab, in a real Chromium: every notebook run as a reader runs it, and what can be moved
moved.

    python -m lib figures --profile smoke   # leaves the artefacts that the notebooks then only read
    python -m pytest -m browser                # make browser; two at a time

The notebooks are opened as copies with the parameters of the profile ``smoke``, each process of the tests in
its own copy of the run, with its own JupyterLab. Screenshots are left in data/runs/tiny/smoke/browser.
"""

import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.request

import nbformat
import pytest
from opened import PROFILE, STEMS, copied, copied_runs

from lib.runs import Run, made_folder
from lib.settings import ROOT

pytestmark = pytest.mark.browser

STEERING = "04_ablate_and_steer"
SETTINGS = {  # every cell is drawn, seen or not; nothing is asked at the start
    "@jupyterlab/notebook-extension/tracker": {"windowingMode": "none"},
    "@jupyterlab/apputils-extension/notification": {
        "fetchNews": "false",
        "checkForUpdates": False,
        "doNotDisturbMode": True,
    },
}
STATE = """() => {
  if (typeof jupyterapp === 'undefined') return null;
  const panel = jupyterapp.shell.currentWidget;
  if (!panel || !panel.content || !panel.content.model || !panel.sessionContext) return null;
  const isCode = w => w.model.type === 'code' && w.model.sharedModel.getSource().trim();
  const cells = panel.content.widgets.filter(isCode);
  return {kernel: panel.sessionContext.session?.kernel?.status,
          run: cells.filter(w => w.model.executionCount !== null).length, cells: cells.length,
          errors: cells.flatMap(w => w.model.outputs.toJSON())
            .filter(o => o.output_type === 'error').map(o => o.ename + ': ' + o.evalue)};
}"""


@pytest.fixture(scope="session")
def lab(tmp_path_factory):
    """The address of a JupyterLab with fresh folders, whose root is the repository."""
    home, port = tmp_path_factory.mktemp("jupyter"), _free_port()
    for name, content in SETTINGS.items():
        extension, plugin = name.rsplit("/", 1)
        file = home / "settings" / extension / f"{plugin}.jupyterlab-settings"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(content))
    folders = {f"JUPYTER_{name}_DIR": str(home / name.lower()) for name in ("CONFIG", "RUNTIME", "DATA")}
    folders |= {
        "JUPYTERLAB_SETTINGS_DIR": str(home / "settings"),
        "JUPYTERLAB_WORKSPACES_DIR": str(home / "workspaces"),
    }
    command = [
        sys.executable,
        "-m",
        "jupyterlab",
        "--no-browser",
        "--allow-root",
        f"--port={port}",
        "--ServerApp.port_retries=0",
        "--IdentityProvider.token=",
        f"--ServerApp.root_dir={ROOT}",
        "--LabApp.expose_app_in_browser=True",
    ]
    environment = {
        **os.environ,
        **folders,
        "IPYTHONDIR": str(home / "ipython"),
        "JUPYTER_PREFER_ENV_PATH": "1",
        "OMP_NUM_THREADS": "1",
    }
    with (home / "log").open("w") as log:
        server = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)
    address = f"http://127.0.0.1:{port}"
    try:
        _wait_for(address + "/api/status", server, home / "log")
        yield address
    finally:
        server.terminate()
        server.wait(timeout=30)


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _wait_for(address, server, log, seconds=90):
    for _ in range(seconds):
        assert server.poll() is None, log.read_text()[-2000:]
        try:
            return urllib.request.urlopen(address, timeout=5).read()
        except OSError:
            time.sleep(1)
    raise TimeoutError(log.read_text()[-2000:])


@pytest.fixture
def page(chromium):
    page = chromium.new_page(viewport={"width": 1400, "height": 1000})
    page.set_default_timeout(60_000)
    yield page
    # or the kernels of all notebooks stay in memory until the last one is done
    page.evaluate("globalThis.jupyterapp?.shell.currentWidget?.sessionContext?.shutdown()")
    page.close()


@pytest.fixture(scope="session")
def own():
    yield from copied_runs("browser")


@pytest.fixture(scope="session")
def screenshots():
    return made_folder(Run("tiny", PROFILE).folder / "browser")


def opened(page, lab, notebook):
    page.goto(f"{lab}/lab/tree/{notebook.relative_to(ROOT).as_posix()}?reset")
    page.wait_for_function(
        f"() => {{ const s = ({STATE})(); return s && s.cells > 0 && s.kernel === 'idle'; }}"
    )


def run_all(page, seconds=420) -> dict:
    """Run all cells of the current notebook; its state when the last one is done, or one has failed."""
    page.evaluate("jupyterapp.commands.execute('notebook:run-all-cells')")
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        time.sleep(1)
        state = page.evaluate(STATE)
        if state["errors"] or (state["run"] == state["cells"] and state["kernel"] == "idle"):
            return state
    raise TimeoutError(f"after {seconds} s: {state}")


def drawn(page) -> int:
    """How many figures are drawn by plotly. They begin as pictures, and come to life when the pointer enters
    them.
    """
    page.wait_for_function(
        """() => {
      const figures = [...document.querySelectorAll('.jp-RenderedPlotly')];
      figures.forEach(f => f.querySelector('.main-svg')
        || f.querySelector('.plot-img')?.dispatchEvent(new Event('mouseenter')));
      return figures.length && figures.every(f => f.querySelector('.main-svg'));
    }""",
        polling=1000,
    )
    return page.locator(".jp-RenderedPlotly:has(.main-svg)").count()


def check_all(page, lab, notebook):
    """Every cell runs without an error, and every figure is drawn by plotly."""
    opened(page, lab, notebook)
    state = run_all(page)
    assert state["errors"] == [] and state["run"] == state["cells"]
    shown = page.locator(".jp-RenderedPlotly")
    assert drawn(page) == shown.count()
    cells = nbformat.read(notebook, as_version=4).cells
    expected = sum(bool(re.search(r"\bsave\(", c.source)) for c in cells if c.cell_type == "code")
    assert shown.count() >= 0.5 * expected  # some are drawn only where a part of the study was computed
    shown.last.scroll_into_view_if_needed()


def test_the_explorer_follows_the_keyboard_and_a_typed_number(page, lab, own, screenshots):
    opened(page, lab, copied("explore", own))
    assert run_all(page)["errors"] == []
    title = lambda: page.locator(".jp-RenderedPlotly .gtitle").first.text_content()  # noqa: E731
    drawn(page)
    options = page.locator(".feature-table select option")
    assert title().startswith("Feature ") and options.count() > 10
    second = options.nth(1).text_content().split()[0]
    page.get_by_role("spinbutton", name="Row").focus()
    page.keyboard.press("ArrowUp")  # a field that counts: row 2
    _until(page, lambda: title().startswith(f"Feature {second}:"))
    number = page.get_by_role("spinbutton", name="Feature number")
    number.fill("7")
    number.press("Enter")
    _until(page, lambda: title().startswith("Feature 7:"))
    before = options.all_text_contents()
    page.get_by_role("combobox", name="Sort by").select_option("frequency")
    _until(page, lambda: options.all_text_contents() != before)
    shares = [float(text.split("%")[0].split()[-1]) for text in options.all_text_contents()[:5]]
    assert shares == sorted(shares, reverse=True)
    page.screenshot(path=screenshots / "explore.png")


def _until(page, condition, seconds: float = 60):
    """Wait for what a change of the explorer brings; figures come to life again after it."""
    end = time.monotonic() + seconds
    while True:
        drawn(page)
        if condition():
            return
        assert time.monotonic() < end, "the explorer did not follow"
        time.sleep(0.2)


def test_the_steering_notebook_runs_and_its_playground_generates(page, lab, own, screenshots):
    check_all(page, lab, copied(STEERING, own))
    page.screenshot(path=screenshots / f"{STEERING}.png")
    page.get_by_role("button", name="Generate").click()
    status = page.locator(".jupyter-widgets [role=status]")
    status.filter(has_text="Done:").wait_for()
    texts = page.locator(".jupyter-widgets section").all_text_contents()
    assert len(texts) >= 2 and all(len(text.split()) > 5 for text in texts[:2])
    page.locator(".jupyter-widgets section").first.scroll_into_view_if_needed()
    page.screenshot(path=screenshots / "playground.png")


@pytest.mark.parametrize("stem", [stem for stem in STEMS if stem != STEERING])
def test_every_cell_runs_and_figures_are_drawn(page, lab, own, screenshots, stem):
    check_all(page, lab, copied(stem, own))
    page.screenshot(path=screenshots / f"{stem}.png")
