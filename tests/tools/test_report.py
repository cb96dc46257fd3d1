"""The report: it holds what it links to, asks nothing of a network, and runs no script of a text's."""

import re
from urllib.parse import urlsplit

import nbformat
import plotly.graph_objects as go
import pytest

from lib.settings import UserError
from lib.tools import publish as report

new = nbformat.v4
PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAAAABJRU5ErkJggg=="


@pytest.fixture
def root(tmp_path):
    """A repository in small: one notebook with a saved figure, an unsaved one and a text that would run a
    script.
    """
    for folder in ("notebooks", "docs", "figures/tiny"):
        (tmp_path / folder).mkdir(parents=True)
    picture = lambda words: new.new_output("display_data", {"image/png": PIXEL, "text/plain": words})  # noqa: E731
    notebook = new.new_notebook(
        cells=[
            new.new_markdown_cell(
                "# 00 · What is it?\n\nWith $\\frac{a}{b}$ and `$HOME` as code. Next: [01](01_missing.ipynb),"
                " [README](../README.md), [web](https://example.org/)"
            ),
            new.new_code_cell('figures.save(fig, "00_loss", run)', outputs=[picture('Figure "Loss"')]),
            new.new_code_cell(
                "show()",
                outputs=[
                    picture('Figure "Other" <b>'),
                    new.new_output("stream", text="<script>alert(1)</script>"),
                ],
            ),
        ]
    )
    nbformat.write(notebook, tmp_path / "notebooks" / "00_what.ipynb")
    go.Figure(go.Scatter(y=[1, 2]), layout=dict(height=420, width=760)).write_html(
        tmp_path / "figures/tiny/00_loss.html", include_plotlyjs="directory"
    )
    (tmp_path / "figures/tiny/00_loss.png").write_bytes(b"png")
    (tmp_path / "docs/glossary.md").write_text(
        "# Glossary\n\nBack to [notebook](../notebooks/00_what.ipynb);"
        " code is in [lib](../lib/tools/publish.py)."
    )
    (tmp_path / "README.md").write_text(
        "# Study\n\n[first](notebooks/00_what.ipynb) ![loss](figures/tiny/00_loss.png)"
        " [words](docs/glossary.md) [part](#below)"
    )
    return tmp_path


def test_pages_link_to_what_is_there_and_to_nothing_else_on_disk(root):
    out = root / "out"
    assert report.build(out, root) == 3
    assert sorted(p.relative_to(out).as_posix() for p in out.rglob("*.html")) == [
        "docs/glossary.html",
        "figures/tiny/00_loss.html",
        "index.html",
        "notebooks/00_what.html",
    ]
    for page in out.rglob("*.html"):
        for address in re.findall(r'(?:href|src)="([^"]+)"', page.read_text()):
            parts = urlsplit(address)
            assert parts.scheme in ("", "https", "data"), address
            if not parts.scheme and parts.path:
                assert (page.parent / parts.path).is_file(), (page, address)
    text = (out / "notebooks" / "00_what.html").read_text()
    assert "01_missing" in text and 'href="01_missing' not in text, "what is not in the report has no address"
    assert 'href="https://example.org/"' in text


def test_a_saved_figure_becomes_a_frame_and_another_stays_a_picture_with_words(root):
    report.build(root / "out", root)
    text = (root / "out" / "notebooks" / "00_what.html").read_text()
    (frame,), (picture,) = re.findall("<iframe [^>]*>", text), re.findall("<img [^>]*>", text)
    for part in (
        'src="../figures/tiny/00_loss.html"',
        'width="780"',
        'height="440"',
        "title='Figure \"Loss\"'",
    ):
        assert part in frame
    assert "alt='Figure \"Other\" &lt;b&gt;'" in picture
    assert 'src="../plotly.min.js"' in (root / "out" / "figures/tiny/00_loss.html").read_text()
    assert (root / "out" / "figures" / "plotly.min.js").stat().st_size > 1_000_000


def test_a_pair_of_ones_own_is_in_it_with_its_notebooks(root):
    for folder, file in (
        ("figures/mine", "00_loss.html"),
        ("data/runs/mine/default/notebooks", "00_what.ipynb"),
    ):
        (root / folder).mkdir(parents=True)
        source = root / ("figures/tiny" if file.endswith("html") else "notebooks") / file
        (root / folder / file).write_bytes(source.read_bytes())
    (root / "figures/mine/00_loss.png").write_bytes(b"png")
    assert report.build(root / "out", root) == 4
    text = (root / "out/notebooks/mine/00_what.html").read_text()
    assert 'src="../../figures/mine/00_loss.html"' in text and "figures/tiny" not in text
    index = (root / "out/index.html").read_text()
    assert "mine: 1 figures" in index and 'href="notebooks/mine/00_what.html"' in index


def test_no_script_runs_on_a_page(root):
    report.build(root / "out", root)
    for name in ("index.html", "notebooks/00_what.html", "docs/glossary.html"):
        text = (root / "out" / name).read_text()
        assert "script-src 'none'" in text and "<script" not in text
    assert "&lt;script&gt;alert(1)" in (root / "out" / "notebooks/00_what.html").read_text()


def test_formulas_are_mathml_and_code_is_left_alone():
    text = report.with_mathml("$x_i$, `$x$`, and\n```\n$y$\n```\n$$a = b$$")
    assert text.count("<math") == 2 and 'display="block"' in text and "`$x$`" in text and "\n$y$\n" in text


def test_nothing_is_replaced_that_is_no_report(root):
    (root / "mine").mkdir()
    (root / "mine" / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match="not a report"):
        report.build(root / "mine", root)
    assert (root / "mine" / "thesis.tex").read_text() == "years of work"
    report.build(root / "out", root)
    report.build(root / "out", root)  # a report is replaced
    with pytest.raises(UserError, match="make figures"):
        report.build(root / "other", root / "nowhere")


@pytest.mark.browser
def test_it_opens_from_disk_with_every_figure_and_no_request(chromium, tmp_path):
    """The report on the committed notebooks, in a real Chromium."""
    report.build(tmp_path / "report")
    pages = [*(tmp_path / "report").glob("*.html"), *(tmp_path / "report").glob("[dn]*/*.html")]
    assert len(pages) > 8
    page, asked, said = chromium.new_page(), [], []
    page.on("request", lambda request: asked.append(request.url))
    page.on("pageerror", lambda error: said.append(str(error)))
    for file in pages:
        page.goto(file.as_uri())
        page.evaluate("document.querySelectorAll('iframe').forEach(frame => frame.loading = 'eager')")
        for frame in page.frames[1:]:
            frame.wait_for_selector(".main-svg", state="attached")
        assert page.locator("iframe").count() == len(page.frames) - 1
        assert not page.evaluate(
            "[...document.images].filter(i => i.loading !== 'lazy' && !i.naturalWidth).map(i => i.src)"
        ), file
    assert [url for url in asked if not url.startswith(("file:", "data:", "blob:"))] == [] and said == []
