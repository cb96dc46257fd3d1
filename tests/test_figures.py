"""Figures: the files that are written, that they say the same each time, and that nothing fails without a
browser.
"""

import struct
import zlib

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import plotly.io as pio
import pytest

from lib import figures


@pytest.fixture
def no_browser(monkeypatch):
    monkeypatch.setenv("BROWSER_PATH", "/nonexistent/chromium")
    monkeypatch.setitem(figures._browser, "state", "closed")


def figure(y=(1.0, 2.0)):
    return go.Figure(
        go.Scatter(y=list(y), name="base"),
        layout=dict(title_text="Loss <br> of base", yaxis_title_text="nats"),
    )


def test_without_a_browser_everything_but_the_png_is_written(run, no_browser, capsys):
    data = pd.DataFrame({"loss": [1.0, 2.0]}, index=pd.Index([0, 10], name="step"))
    for _ in range(2):
        assert figures.save(figure(), "02_loss", run, data) is None
    assert sorted(p.name for p in run.figures.iterdir()) == ["02_loss.csv", "02_loss.html", "plotly.min.js"]
    assert (run.figures / "02_loss.csv").read_text() == "step,loss\n0,1\n10,2\n"
    assert capsys.readouterr().err.count("no Chromium was found") == 1  # said once


def test_a_picture_is_kept_until_its_numbers_change(run, no_browser):
    figures.save(figure(), "02_x", run)
    assert "no PNG of 02_x" in figures.undrawn(run) and "BROWSER_PATH" in figures.undrawn(run, ["02"])
    picture = run.figures / "02_x.png"
    picture.write_bytes(b"drawn before")
    assert figures.undrawn(run) is None
    figures.save(figure(), "02_x", run)
    assert picture.exists()
    figures.save(figure((1.0005, 2.0)), "02_x", run)
    assert picture.exists() and "1.0005" in (run.figures / "02_x.csv").read_text(), (
        "nobody sees the difference"
    )
    figures.save(figure((1.0005, 2.1)), "02_x", run)
    assert not picture.exists()
    assert figures.undrawn(run, ["03"]) is None, "of another notebook"


@pytest.mark.parametrize(
    "other",
    [
        figure((1.0, 2.0, 2.0)),
        figure((1.0, float("nan"))),
        go.Figure(go.Scatter(y=[1.0, 2.0], name="distilled")),
        go.Figure(go.Scatter(x=[0, 1], y=[1.0, 2.0], name="base")),
    ],
    ids=["a point more", "a gap", "another name", "another column"],
)
def test_a_picture_of_another_table_is_not_left_behind(run, no_browser, other):
    figures.save(figure(), "x", run)
    (run.figures / "x.png").write_bytes(b"drawn before")
    figures.save(other, "x", run)
    assert not (run.figures / "x.png").exists()


def test_html_is_the_same_each_time_and_needs_no_network(run, no_browser):
    texts = []
    for _ in range(2):
        figures.save(figure(), "x", run)
        texts.append((run.figures / "x.html").read_text())
    assert texts[0] == texts[1]
    assert "plotly.min.js" in texts[0] and 'src="http' not in texts[0]


def test_png_with_a_browser(run, monkeypatch):
    if figures.find_browser() is None:
        pytest.skip("no Chromium here")
    monkeypatch.setitem(figures._browser, "state", "closed")
    figures.save(figure(), "x", run)
    first = (run.figures / "x.png").read_bytes()
    figures.save(figure(), "x", run)
    assert first.startswith(b"\x89PNG") and (run.figures / "x.png").read_bytes() == first


def test_summary_says_what_the_figure_shows():
    assert figures.summary(figure()) == 'Figure "Loss of base"; y: nats; scatter base (2 points)'


def test_numbers_behind_a_figure_come_from_its_traces():
    fig = go.Figure(
        [
            go.Bar(x=["a"], y=[1], error_y=dict(array=[0.5]), name="t"),
            go.Heatmap(x=["a", "b"], y=["r"], z=[[1, 2]]),
        ]
    )
    frame = figures.traces(fig)
    assert frame[["trace", "y", "error_y"]].iloc[0].tolist() == ["t", 1, 0.5]
    assert frame[["x", "y", "z"]].iloc[1:].values.tolist() == [["a", "r", 1], ["b", "r", 2]]


def test_the_look_is_on_by_default():
    assert pio.templates.default == "distilled"


def test_colours_stay_apart_for_the_colour_blind():
    """Simulated deuteranopia and protanopia (Machado et al. 2009, severity 1), distance in CIELAB of the
    pairs that meet in a figure.
    """
    matrices = [
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    ]

    def lab(colour, matrix):
        rgb = np.array([int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)])
        linear = np.clip(matrix @ np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4), 0, 1)
        xyz = (
            np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
            @ linear
            / [0.9505, 1, 1.089]
        )
        f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
        return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])

    for together in (
        ("base", "distilled", "random", "null"),
        ("reflection", "deduction", "alternative", "contrast", "verification"),
    ):
        for matrix in map(np.array, matrices):
            points = [lab(figures.COLOURS[name], matrix) for name in together]
            distances = [np.linalg.norm(a - b) for i, a in enumerate(points) for b in points[:i]]
            assert min(distances) > 12, (together, min(distances))


def test_shaded_tokens_escapes_and_shades():
    text = figures.shaded_tokens(["<b>", "wait", "x"], [0.0, 2.0, float("nan")], label="7 & 8").data
    assert "&lt;b&gt;" in text and "<b>7 &amp; 8</b>" in text and "<b>wait" not in text
    assert text.count("background:rgba") == 1 and "rgba(213,94,0,0.75)" in text
    assert "0.38" in figures.shaded_tokens(["a"], [1.0], maximum=2.0).data
    assert "rgba" not in figures.shaded_tokens(["a"], [0.0]).data
    with pytest.raises(ValueError, match="1 words and 2 values"):
        figures.shaded_tokens(["a"], [1, 2])


def drawn(pixels, filters=2):
    """Pixels [h, w, 4] as a PNG like the browser's: every row as its difference to the one above."""
    h, w, _ = pixels.shape
    rows = np.diff(pixels.reshape(h, -1), axis=0, prepend=np.zeros((1, 4 * w), np.uint8)).astype(np.uint8)
    rows = np.concatenate([np.full((h, 1), filters, np.uint8), rows], axis=1)
    parts = {
        b"IHDR": struct.pack(">IIBBBBB", w, h, 8, 6, 0, 0, 0),
        b"IDAT": zlib.compress(rows.tobytes(), 1),
        b"IEND": b"",
    }
    chunks = (
        struct.pack(">I", len(b)) + k + b + struct.pack(">I", zlib.crc32(k + b)) for k, b in parts.items()
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def colours_of(png):
    """The pixels [h, w, 3] of a PNG with a palette; every checksum is looked at."""
    at, chunks = 8, {}
    while at < len(png):
        size, kind = struct.unpack(">I4s", png[at : at + 8])
        chunks[kind] = png[at + 8 : at + 8 + size]
        assert struct.unpack(">I", png[at + 8 + size : at + 12 + size])[0] == zlib.crc32(kind + chunks[kind])
        at += size + 12
    w, h = struct.unpack(">II", chunks[b"IHDR"][:8])
    index = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(h, w + 1)[:, 1:]
    return np.frombuffer(chunks[b"PLTE"], np.uint8).reshape(-1, 3)[index].astype(int)


def test_a_compact_picture_looks_the_same():
    rng = np.random.default_rng(0)
    pixels = np.full((60, 80, 4), 255, np.uint8)
    pixels[10:50, 5:75, :3] = rng.integers(0, 256, (5, 3), dtype=np.uint8)[rng.integers(0, 5, (40, 70))]
    found = colours_of(figures.compact(drawn(pixels)))
    assert abs(found - pixels[..., :3].astype(int)).max() <= 3 and (found[0] == 255).all(), (
        "white stays white"
    )
    assert len(figures.compact(drawn(pixels))) < len(drawn(pixels))
    # thousands of colours
    pixels[..., :3] = np.stack(np.meshgrid(np.arange(80) * 3, np.arange(60) * 4, [7]), -1)[:, :, 0]
    assert abs(colours_of(figures.compact(drawn(pixels))) - pixels[..., :3].astype(int)).max() <= 45, (
        "nothing is far from its colour"
    )


def test_what_the_browser_does_not_draw_comes_back_as_it_is():
    pixels = np.full((4, 5, 4), 255, np.uint8)
    assert figures.compact(drawn(pixels, filters=1)) == drawn(pixels, filters=1)
    pixels[2, 2, 3] = 0
    assert figures.compact(drawn(pixels)) == drawn(pixels), "transparent"
