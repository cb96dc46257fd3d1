"""Figures: one look, one way to save them.

    figures.save(fig, "02_nrn", run, data=frame)

shows the figure in the notebook and writes, below the run's figure folder, ``02_nrn.png`` (for README and
paper), ``02_nrn.html`` (to hover and zoom; all share one plotly.min.js beside them) and ``02_nrn.csv`` (the
numbers behind it). In the notebook the figure is shown twice in one output: as plotly's own data, which
JupyterLab draws, and as a PNG, which GitHub and nbconvert show. PNGs need kaleido and a Chromium; without
them everything else works, and PNGs whose numbers have not changed stay."""

import html
import io
import json
import os
import shutil
import struct
import sys
import threading
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import plotly.io as pio
from plotly.offline import get_plotlyjs

from .runs import Run, read_table, table_text, whole_file, write_text

# After Okabe & Ito, "Color universal design": they stay apart for the colour-blind, in hue or in lightness.
COLOURS = {
    "base": "#0072B2",
    "distilled": "#D55E00",
    "reflection": "#CC79A7",
    "deduction": "#009E73",
    "alternative": "#E69F00",
    "contrast": "#56B4E9",
    "verification": "#8C5A00",
    "random": "#6E6E6E",
    "null": "#B4B4B4",
}
SCALE = "Cividis"  # for continuous values; perceptually uniform, and the same for the colour-blind
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
PLOTLY_MIME = "application/vnd.plotly.v1+json"
_TIMEOUT = 40.0  # seconds for one PNG; the first one starts the browser (4 s)

_grid = dict(gridcolor="#E8E8E8", linecolor="#444444", zerolinecolor="#BBBBBB", ticks="outside")
_grid |= dict(title_standoff=8, automargin=True)
pio.templates["distilled"] = go.layout.Template(
    layout=dict(
        width=760,
        height=420,
        font=dict(family="Open Sans, Arial, sans-serif", size=13, color="#222222"),
        title=dict(x=0.02, xanchor="left", font=dict(size=16)),
        colorway=list(COLOURS.values()),
        colorscale=dict(sequential=SCALE),
        paper_bgcolor="white",
        plot_bgcolor="white",
        margin=dict(l=64, r=24, t=56, b=56),
        xaxis=_grid,
        yaxis=_grid,
        legend=dict(bgcolor="rgba(255,255,255,0.7)"),
        hoverlabel=dict(align="left"),
    )
)
pio.templates.default = "distilled"


def save(fig: go.Figure, name: str, run: Run, data: pd.DataFrame | None = None, about: str = "") -> None:
    """Write <figures>/<name>.csv, .html and .png, and show the figure.

    Its title names the pair, or what else it is ``about``. ``data`` are the numbers behind the figure (a
    named index is kept); without it the traces' own values are written. Where no browser can draw the PNG,
    the one that is there is kept if its numbers are still these, to the thousandth part; else it is removed,
    rather than left to contradict them (see ``undrawn``)."""
    file = run.figures / f"{name}.csv"
    frame = traces(fig) if data is None else data
    title = (
        f'{fig.layout.title.text or ""} <span style="color:#777777">({html.escape(about or run.pair)})</span>'
    )
    fig = go.Figure(fig).update_layout(title_text=title)
    text = table_text(frame, "%.6g", index=any(level is not None for level in frame.index.names))
    # a fixed div id: by default it is random, and the same figure would give another file each time
    options = dict(include_plotlyjs="directory", include_mathjax=False, config={"displaylogo": False})
    if not (library := file.with_name("plotly.min.js")).is_file():
        write_text(library, get_plotlyjs())
    write_text(file.with_suffix(".html"), fig.to_html(div_id=name, **options))
    picture = to_png(fig, scale=2)
    if picture is not None:
        with whole_file(file.with_suffix(".png")) as scratch:
            scratch.write_bytes(picture)
    elif not _same_numbers(file, text):
        file.with_suffix(".png").unlink(missing_ok=True)
    write_text(file, text)  # last: as long as the numbers are the old ones, the picture counts as old
    # on disk for print, in the notebook at most as wide as a standard figure: under 1 MB in all
    standard = pio.templates["distilled"].layout.width
    scale = min(1.0, standard / (fig.layout.width or standard))
    _display(fig, picture and to_png(fig, scale=scale))


def error_bars(table: pd.DataFrame, value: str, low: str = "", high: str = "") -> dict:
    """Error bars of a trace, from columns ``low`` and ``high`` (default: ``value``_low, ``value``_high)."""
    low, high = table[low or f"{value}_low"], table[high or f"{value}_high"]
    return dict(array=(high - table[value]).to_numpy(), arrayminus=(table[value] - low).to_numpy())


def express_bars(table: pd.DataFrame, value: str, low: str = "", high: str = "", axis: str = "y") -> dict:
    """``error_bars`` as the functions of plotly.express take them, along an ``axis``."""
    bars = error_bars(table, value, low, high)
    return {f"error_{axis}": bars["array"], f"error_{axis}_minus": bars["arrayminus"]}


def plain_titles(fig: go.Figure, before: str = "") -> go.Figure:
    """Panels of plotly.express titled "reflection", not "category=reflection"; ``before`` goes first."""
    return fig.for_each_annotation(lambda a: a.update(text=before + a.text.split("=", 1)[-1]))


def _same_numbers(file: Path, text: str) -> bool:
    """Is the table in ``file`` that of ``text``, but for what another processor's rounding may change, and
    nobody sees: a thousandth of the largest number of a column?"""
    if not file.is_file():
        return False
    old, new = read_table(file), read_table(io.StringIO(text))
    return list(old) == list(new) and len(old) == len(new) and all(_alike(old[c], new[c]) for c in new)


def _alike(old: pd.Series, new: pd.Series) -> bool:
    if not (pd.api.types.is_numeric_dtype(old) and pd.api.types.is_numeric_dtype(new)):
        return old.equals(new)
    return np.allclose(old, new, rtol=0, atol=1e-3 * new.abs().max(), equal_nan=True)


def undrawn(run: Run, notebooks: Sequence[str] = ("",)) -> str | None:
    """One line that names the figures of these notebooks ("02") that have no PNG, and says how to get one;
    None if all have theirs."""
    files = sorted(file for number in notebooks for file in run.figures.glob(f"{number}*.html"))
    names = [file.stem for file in files if not file.with_suffix(".png").is_file()]
    if not names:
        return None
    return (
        f"no PNG of {', '.join(names)}: their numbers have changed, and no Chromium can draw them anew."
        " Install one (.venv/bin/plotly_get_chrome, or the system's chromium), or name it in BROWSER_PATH,"
        " and run again"
    )


def _display(fig: go.Figure, picture: bytes | None) -> None:
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if shell is None or not hasattr(shell, "kernel"):
        print(summary(fig), file=sys.stderr)
        return
    from base64 import b64encode

    from IPython.display import display

    bundle = {PLOTLY_MIME: json.loads(fig.to_json()), "text/plain": summary(fig)}
    if picture is not None:
        bundle["image/png"] = b64encode(compact(picture)).decode()
    display(bundle, raw=True)


def summary(fig: go.Figure) -> str:
    """A figure in words, for those who cannot see it: title, axes, and each trace with its number of points.

    >>> summary(go.Figure(go.Scatter(y=[1, 2], name="base"), {"title": {"text": "Loss"}}))
    'Figure "Loss"; scatter base (2 points)'
    """
    parts = [f'Figure "{_line(fig.layout.title.text)}"']
    parts += [f"{axis}: {_line(title)}" for axis in "xy" if (title := fig.layout[f"{axis}axis"].title.text)]
    for trace in fig.data[:12]:
        known = (trace[key] for key in ("y", "x", "z", "values") if key in trace)
        values = next((values for values in known if values is not None), ())
        parts.append(f"{trace.type} {_line(trace.name)}".strip() + f" ({len(values)} points)")
    return "; ".join(parts + ([f"{len(fig.data) - 12} more traces"] if len(fig.data) > 12 else []))


def _line(text: str | None) -> str:
    return " ".join((text or "").replace("<br>", " ").split())


def traces(fig: go.Figure) -> pd.DataFrame:
    """The values of a figure's traces as one long table: trace, x, y (z), and error bars if there are any."""
    frames = []
    for i, trace in enumerate(fig.data):
        columns = {key: trace[key] for key in ("x", "y", "z") if key in trace and trace[key] is not None}
        for error in ("error_x", "error_y"):
            if error in trace and trace[error].array is not None:
                columns[error] = trace[error].array
        if "z" in columns and np.ndim(columns["z"]) == 2:  # a heat map: one row per cell
            grid = pd.DataFrame(np.asarray(columns["z"]), index=columns.get("y"), columns=columns.get("x"))
            long = grid.rename_axis(index="y", columns="x").stack().rename("z")
            columns = long.reset_index().to_dict("list")
        frame = pd.DataFrame({key: pd.Series(np.asarray(values)) for key, values in columns.items()})
        frame.insert(0, "trace", trace.name or str(i))
        frames.append(frame)
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame(columns=["trace"])


# --- PNG: one browser, kept open ----------------------------------------------------------------------------

_browser: dict = {"state": "closed"}  # closed -> open, or broken (said once, then skipped)


def find_browser() -> str | None:
    """A Chromium or Chrome: $BROWSER_PATH, the PATH, or where it usually is on this system."""
    if given := os.environ.get("BROWSER_PATH"):
        return given if Path(given).is_file() else None
    if found := next(filter(None, map(shutil.which, BROWSERS)), None):
        return found
    try:
        from choreographer.browsers.chromium import Chromium

        return Chromium.find_browser(skip_local=False)
    except Exception:  # a search that fails is a search that found nothing
        return None


def to_png(fig: go.Figure, scale: float = 2) -> bytes | None:
    """The figure as PNG, or None (with one line on standard error, once) where no browser can make it.

    One browser stays open for the life of the process: 0.3 s a figure instead of 4 s."""
    if _browser["state"] == "broken":
        return None
    try:
        import kaleido

        if _browser["state"] == "closed":
            path = find_browser()
            if path is None:
                raise RuntimeError("no Chromium was found (install one, or set BROWSER_PATH)")
            page = kaleido.PageGenerator(mathjax=False)  # by default it fetches MathJax from the network
            kaleido.start_sync_server(path=path, page_generator=page, timeout=_TIMEOUT, silence_warnings=True)
            _browser["state"] = "open"
        template = pio.templates["distilled"].layout
        size = {side: fig.layout[side] or template[side] for side in ("width", "height")}
        opts = dict(format="png", scale=scale, **size)
        return _bounded(lambda: kaleido.calc_fig_sync(fig.to_dict(), opts=opts), _TIMEOUT + 5)
    except Exception as error:
        _browser["state"] = "broken"
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        print(f"figures are not written as PNG: {reason}", file=sys.stderr)
        return None


def compact(png: bytes) -> bytes:
    """A PNG as the browser draws it with a palette of 256 colours (its most frequent ones, and some of all
    kinds): a third of the bytes.

    It keeps notebooks small. What is not opaque 8-bit RGBA, row by row as a browser writes it, comes back as
    it is."""
    chunks, at = {}, 8
    while at < len(png):
        size, kind = struct.unpack(">I4s", png[at : at + 8])
        chunks[kind] = chunks.get(kind, b"") + png[at + 8 : at + 8 + size]
        at += size + 12
    width, height, *form = struct.unpack(">IIBBBBB", chunks[b"IHDR"])
    rows = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(height, -1)
    # 2: each row is the difference to the one above
    if form != [8, 6, 0, 0, 0] or (rows[1:, 0] != 2).any() or rows[0, 0] not in (0, 2):
        return png
    pixels = np.cumsum(rows[:, 1:], axis=0, dtype=np.uint8).reshape(-1, 4)
    if (pixels[:, 3] != 255).any():
        return png
    rounded = pixels[:, :3] // 4 * 4 + pixels[:, :3] // 64  # to 6 bits
    colours, which, counts = np.unique(rounded, axis=0, return_inverse=True, return_counts=True)
    some = np.stack(np.meshgrid(*[np.arange(0, 256, 85, dtype=np.uint8)] * 3), axis=-1).reshape(-1, 3)
    palette = np.concatenate([colours[np.argsort(-counts, kind="stable")[: 256 - len(some)]], some])
    blocks = np.array_split(colours.astype(int), len(colours) // 4096 + 1)
    nearest = np.concatenate([np.square(block[:, None] - palette).sum(-1).argmin(1) for block in blocks])
    table = np.zeros((height, width + 1), np.uint8)
    table[:, 1:] = nearest[which.ravel()].reshape(height, width)
    header = struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)
    parts = {b"IHDR": header, b"PLTE": palette.tobytes()}
    parts |= {b"IDAT": zlib.compress(table.tobytes(), 9), b"IEND": b""}
    packed = lambda k, b: struct.pack(">I", len(b)) + k + b + struct.pack(">I", zlib.crc32(k + b))
    return png[:8] + b"".join(packed(k, b) for k, b in parts.items())


def _bounded(work, seconds: float):
    """Call ``work`` in a thread. kaleido waits for ever if its browser dies, and a figure must not stop a
    run."""
    answer: list = []

    def call() -> None:
        try:
            answer.append((work(), None))
        except BaseException as error:
            answer.append((None, error))

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
    if not answer:
        raise TimeoutError(f"the browser did not answer within {seconds:.0f} s")
    value, error = answer[0]
    if error is not None:
        raise error
    return value


# --- text ---------------------------------------------------------------------------------------------------


def faded(colour: str, opacity: float) -> str:
    """A colour "#rrggbb" at an opacity from 0 to 1, as CSS."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{opacity:.2f})"


def shaded_tokens(
    words: Sequence[str],
    values: Sequence[float],
    colour: str = COLOURS["distilled"],
    maximum: float | None = None,
    label: str = "",
):
    """Tokens shaded by activation: an ``IPython.display.HTML`` whose ``data`` is the HTML, to be joined with
    others.

    ``values`` [n] >= 0, one for each of ``words`` [n]; ``maximum`` (default: the largest) is the full shade,
    so that several lines can share a scale. ``label`` stands before the line. Words are escaped."""
    from IPython.display import HTML

    values = np.nan_to_num(np.asarray(values, dtype=float), nan=0.0)
    if len(words) != len(values):
        raise ValueError(f"{len(words)} words and {len(values)} values: must be one each")
    top = float(values.max(initial=0.0)) if maximum is None else float(maximum)
    spans = [f"<b>{html.escape(label)}</b>"] if label else []
    for word, value in zip(words, values):
        shade = min(max(value / top, 0.0), 1.0) if top > 0 else 0.0
        style = f' style="background:{faded(colour, 0.75 * shade)}"' if shade >= 0.01 else ""
        spans.append(f'<span title="{value:.3g}"{style}>{html.escape(str(word))}</span>')
    return HTML(
        "<div"
        f' style="font-family:monospace;line-height:1.7;color:#222;background:#fff">{" ".join(spans)}</div>'
    )


def labelled_lines(lines: Sequence[tuple[str, Sequence[str], bool]]):
    """Sentences as HTML, one a line: (label, words, wrong). The bar has the label's colour, wrong ones are
    underlined."""
    from IPython.display import HTML

    rows = []
    for label, words, wrong in lines:
        text = html.escape(" ".join(words))
        text = f'<span style="text-decoration:underline wavy #C00">{text}</span>' if wrong else text
        name = f"{label} (wrong)" if wrong else label
        colour = COLOURS.get(label, "#999999")
        bar = f"border-left:6px solid {colour};padding-left:8px;color:#222;background:#fff"
        column = "display:inline-block;width:13em;white-space:nowrap;color:#555"
        rows.append(f'<div style="{bar}"><span style="{column}">{name}</span>{text}</div>')
    return HTML(f'<div style="font-family:monospace;line-height:1.6">{"".join(rows)}</div>')
