"""The whole study as a folder of HTML that opens from disk, without a network: ``make report``.

    python -m lib report                     # data/report: open data/report/index.html

The committed notebooks with their outputs, the pages of docs/, and every figure that they show, to hover and
zoom. Nothing is computed: what is not in figures/ is missing here too. Pictures in notebooks are replaced by
the interactive figures of the same name, which share one copy of plotly; formulas become MathML, which
browsers draw themselves. On pages made from notebooks no script runs, whatever a text may contain (a content
security policy); figures are frames of their own.
"""

from __future__ import annotations

import html
import re
import shutil
from pathlib import Path

import nbformat
from latex2mathml.converter import convert as mathml
from nbconvert import HTMLExporter
from nbconvert.filters import markdown2html
from plotly.offline import get_plotlyjs
from pygments.formatters import HtmlFormatter

from ..runs import Progress, write_text
from ..settings import ROOT, UserError

OUT = ROOT / "data" / "report"
PAIRS = ("tiny", "smol")  # whose figures are committed
PAGES = ("glossary", "scoreboard", "scoreboard_smol", "robustness_smol", "costs", "cluster")  # of docs/
_SAVED = re.compile(r"figures\.save\([^\n]*?\"(\d\d_\w+)\"")
_MATH = re.compile(r"```.*?```|`[^`\n]+`|\$\$(?P<block>.+?)\$\$|\$(?P<inline>[^$\n]+)\$", re.DOTALL)
_LINK = re.compile(r'(href|src)="([^"#:]+)(#[^"]*)?"')
_SIZE = re.compile(r'style="height:(\d+)px; width:(\d+)px;"')

CSS = """
:root { color-scheme: light dark; --back: #fff; --text: #222; --soft: #f6f6f6; --line: #ddd; --link: #0060a0; --quiet: #555; }
@media (prefers-color-scheme: dark) { :root { --back: #1b1b1d; --text: #e6e6e6; --soft: #262629; --line: #444; --link: #7cc4ff; --quiet: #b5b5b5; } }
body { margin: 0; background: var(--back); color: var(--text); font: 16px/1.6 "Open Sans", system-ui, sans-serif; }
nav { position: sticky; top: 0; background: var(--soft); border-bottom: 1px solid var(--line); padding: .5em 1.5em; z-index: 1; }
nav a { margin-right: 1.1em; white-space: nowrap; } a { color: var(--link); } a:focus-visible, summary:focus-visible { outline: 3px solid #D55E00; }
main { max-width: 62em; margin: 1.5em auto; padding: 0 1.5em; } img { max-width: 100%; background: #fff; } .anchor-link { display: none; }
pre, code { font: 13px/1.5 "DejaVu Sans Mono", monospace; } pre { overflow-x: auto; margin: 0; white-space: pre; }
.prompt { display: none; } .input_area { background: var(--soft); border-left: 3px solid var(--line); padding: .5em .8em; margin: .8em 0 .3em; }
.output_subarea { overflow-x: auto; } table { border-collapse: collapse; font-size: 14px; margin: .6em 0; display: block; overflow-x: auto; }
th, td { border-bottom: 1px solid var(--line); padding: .25em .7em; text-align: left; vertical-align: top; }
iframe { border: 1px solid var(--line); background: #fff; max-width: 100%; } details { margin: .4em 0; } summary { cursor: pointer; color: var(--quiet); }
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(17em, 1fr)); gap: 1em; } .gallery a { font-size: 13px; overflow-wrap: anywhere; }
math[display=block] { margin: .6em 0; overflow-x: auto; }
"""


def build(out: Path = OUT, root: Path = ROOT) -> int:
    """Write the report below ``out`` (which is replaced) from what stands in ``root``; returns the number of
    pages.

    UserError if there are no executed notebooks or no figures, or if ``out`` is a folder that is not a
    report.
    """
    notebooks = sorted((root / "notebooks").glob("[0-9][0-9]_*.ipynb"))
    figures = {
        f"{pair}/{f.stem}": f for pair in PAIRS for f in sorted((root / "figures" / pair).glob("*.html"))
    }
    if not notebooks or not figures:
        raise UserError("there are no notebooks or no figures to report on: run make figures first")
    if out.exists() and any(out.iterdir()) and not (out / "report.css").is_file():
        raise UserError(f"{out} is not empty and not a report: choose another folder with --out")
    shutil.rmtree(out, ignore_errors=True)
    (out / "figures").mkdir(parents=True)
    style = (
        HtmlFormatter(style="default").get_style_defs(".highlight")
        + "\n@media (prefers-color-scheme: dark) {\n"
        + HtmlFormatter(style="monokai").get_style_defs(".highlight")
        + "\n.highlight { background: none }\n}\n"
    )
    write_text(out / "report.css", CSS + style.replace(".highlight { background: #f8f8f8; }", ""))
    write_text(out / "figures" / "plotly.min.js", get_plotlyjs())
    for name, file in figures.items():
        (out / "figures" / name).parent.mkdir(exist_ok=True)
        text = file.read_text(encoding="utf-8").replace('src="plotly.min.js"', 'src="../plotly.min.js"')
        write_text(
            out / "figures" / f"{name}.html",
            text.replace("<head>", f"<head><title>{html.escape(file.stem)}</title>", 1),
        )
    pages = [
        (root / "docs" / f"{name}.md", Path("docs") / f"{name}.html")
        for name in PAGES
        if (root / "docs" / f"{name}.md").is_file()
    ]
    made = {source.relative_to(root).as_posix(): target.as_posix() for source, target in pages}
    made |= {f"notebooks/{n.name}": f"notebooks/{n.stem}.html" for n in notebooks} | {
        "README.md": "index.html"
    }
    for picture in [*(root / "figures").glob("*/*.png"), *(root / "docs").glob("*.svg")]:
        place = picture.relative_to(root)
        if place.parts[0] == "docs" or place.parts[1] in PAIRS:
            (out / place).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(picture, out / place)
            made[place.as_posix()] = place.as_posix()
    total, done = len(notebooks) + len(pages) + 1, 0
    with Progress("pages", total) as progress:
        for notebook in notebooks:
            body, title = from_notebook(notebook, figures)
            _write(
                out, Path("notebooks") / f"{notebook.stem}.html", title, body, made, notebooks, "notebooks"
            )
            progress.update(done := done + 1)
        for source, target in pages:
            text = source.read_text(encoding="utf-8")
            _write(
                out,
                target,
                text.split("\n")[0].lstrip("# "),
                markdown2html(with_mathml(text)),
                made,
                notebooks,
                "docs",
            )
            progress.update(done := done + 1)
        readme = markdown2html(with_mathml((root / "README.md").read_text(encoding="utf-8")))
        _write(
            out,
            Path("index.html"),
            "What does distillation do inside a reasoning model?",
            readme + _gallery(figures),
            made,
            notebooks,
            "",
        )
        progress.update(total)
    return total


def from_notebook(file: Path, figures: dict[str, Path]) -> tuple[str, str]:
    """(HTML, title) of an executed notebook. ``figures``: {pair/name: file}; pictures of the same name become
    frames of them.
    """
    notebook = nbformat.read(file, as_version=4)
    title = next(
        line for c in notebook.cells for line in c.source.split("\n") if line.startswith("# ")
    ).lstrip("# ")
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = with_mathml(cell.source)
            continue
        names = iter(_SAVED.findall(cell.source))
        for output in cell.outputs:
            if "image/png" not in output.get("data", {}):
                continue
            place = next(
                (
                    f"{pair}/{name}"
                    for name in [next(names, "")]
                    for pair in PAIRS
                    if f"{pair}/{name}" in figures
                ),
                None,
            )
            words = html.escape(str(output.data.get("text/plain", "figure")), quote=True)
            if place:
                output.data = nbformat.from_dict(
                    {"text/html": _frame(figures[place], f"../figures/{place}.html", words)}
                )
            else:
                output.data = nbformat.from_dict(
                    {
                        "text/html": (
                            f'<img src="data:image/png;base64,{output.data["image/png"].strip()}"'
                            f' alt="{words}">'
                        )
                    }
                )
    return HTMLExporter(template_name="basic").from_notebook_node(notebook)[0], title


def _frame(figure: Path, place: str, words: str) -> str:
    size = _SIZE.search(figure.read_text(encoding="utf-8"))
    height, width = (int(size[1]) + 20, int(size[2]) + 20) if size else (460, 780)
    return f'<iframe src="{place}" width="{width}" height="{height}" loading="lazy" title="{words}"></iframe>'


def with_mathml(text: str) -> str:
    """Markdown in which formulas between dollar signs are MathML; code is left alone."""

    def drawn(match: re.Match) -> str:
        if match["block"] is None and match["inline"] is None:
            return match[0]
        return mathml(
            match["block"] or match["inline"], display="block" if match["block"] else "inline"
        ).replace("\n", " ")

    return _MATH.sub(drawn, text)


def _gallery(figures: dict[str, Path]) -> str:
    parts = ["<h2>All figures</h2>"]
    for pair in PAIRS:
        names = [
            name
            for name, file in figures.items()
            if name.startswith(f"{pair}/") and file.with_suffix(".png").is_file()
        ]
        if names:
            shown = "".join(
                f'<a href="figures/{n}.html"><img src="figures/{n}.png" loading="lazy"'
                f' alt="">{html.escape(n)}</a>'
                for n in names
            )
            parts.append(
                f"<details><summary>{pair}: {len(names)} figures</summary><div"
                f' class="gallery">{shown}</div></details>'
            )
    return "".join(parts)


def _write(
    out: Path, target: Path, title: str, body: str, made: dict[str, str], notebooks: list[Path], folder: str
) -> None:
    """One page. Links to what the report does not hold lose their address, those to what it holds are bent."""
    up = "../" * len(target.parent.parts)

    def bent(match: re.Match) -> str:
        attribute, address, anchor = match[1], match[2], match[3] or ""
        parts: list[str] = []
        for part in (folder + "/" + address).split("/"):
            parts = parts[:-1] if part == ".." else parts + [part] * (part not in ("", "."))
        place = "/".join(parts)
        if place in made or place.startswith("figures/") and (out / place).is_file():
            return f'{attribute}="{up}{made.get(place, place)}{anchor}"'
        return f'title="{html.escape(place)} in the repository"' if attribute == "href" else match[0]

    links = [("README", "index.html"), *((n.stem[:2], f"notebooks/{n.stem}.html") for n in notebooks)]
    links += [
        (name, made[f"docs/{key}.md"])
        for name, key in (
            ("glossary", "glossary"),
            ("scoreboard", "scoreboard"),
            ("scoreboard, real model", "scoreboard_smol"),
        )
        if f"docs/{key}.md" in made
    ]
    nav = "".join(f'<a href="{up}{address}">{html.escape(name)}</a>' for name, address in links)
    (out / target).parent.mkdir(exist_ok=True)
    write_text(
        out / target,
        f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="script-src 'none'; connect-src 'none'; object-src 'none'; base-uri 'none'">
<title>{html.escape(title)}</title><link rel="stylesheet" href="{up}report.css"></head>
<body><nav aria-label="pages">{nav}</nav><main>{_LINK.sub(bent, body)}</main></body></html>
""",
    )
