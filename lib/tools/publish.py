"""Result files as pages: README.md and docs/ (``publish``), and the study as HTML (``build``).

All words are in docs/templates (jinja2); a test holds the pages equal to what the results give. The HTML
needs no network: formulas are MathML, figures are frames of their own files, which share one copy of plotly.
"""

from __future__ import annotations

import csv
import functools
import html
import json
import re
import shutil
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import jinja2

from ..labels import CATEGORIES
from ..runs import Progress, made_folder, write_text
from ..settings import ROOT, UserError
from ..verdicts import SHARE, YES

TEMPLATES = ROOT / "docs" / "templates"
NUMBERS = (
    "metric",
    "value",
    "percent",
    "count",
    "lowered",
    "attributed",
    "by_training",
    "speed",
    "json",
    "csv",
)  # in templates
PAIRS = ("tiny", "smol")  # whose results are committed: the embedded pair, and the real one
TRAININGS = ("tiny", "tiny_1", "tiny_2")  # the embedded pair, distilled three times, on other documents
# page -> template
PAGES = {
    "README.md": "README.md.j2",
    "docs/results.md": "results.md.j2",
    "docs/scoreboard.md": "scoreboard.md.j2",
    "docs/scoreboard_smol.md": "scoreboard_smol.md.j2",
    "docs/robustness_smol.md": "robustness_smol.md.j2",
}
SIZES = ("tiny_small", "tiny_medium", "tiny_large")  # of notebook 06, and what each must reach
GATES = {"acc_distilled_think": 0.8, "reflect_auc": 0.85}
CROSSES = 0.1  # of the gap, that the whole residual stream must carry before features are asked about
# mean cosine with the matches under other seeds from which a feature counts as the same; notebook 03 predicts
# with it
SAME_FEATURE = 0.7
# of the crosscoders: has a category's feature nothing in the base, by nu; is it more than a token detector?
SHARES = {"unique": "unique", "more": "more_than_token"}


# --- numbers as text ----------------------------------------------------------------------------------------


def number(metric: Mapping | None) -> str:
    """A metric {value, ci, ...} with two decimals and its interval."""
    if metric is None or metric["value"] is None:
        return "not measured"
    low, high = metric["ci"] or (None, None)
    interval = f" [{low:.2f}, {high:.2f}]" if None not in (low, high) else ""
    return f"**{metric['value']:.2f}**{interval}"


def interval(row: Mapping, name: str, prefix: str | None = None) -> str:
    """The column ``name`` of a CSV row with its bounds, ``<prefix>_low`` and ``<prefix>_high``."""
    low, high = (f"{name if prefix is None else prefix}_{bound}".strip("_") for bound in ("low", "high"))
    return number({"value": float(row[name]), "ci": [float(row[low]), float(row[high])]})


def figure(value: float) -> str:
    """Three digits, or a whole number from a thousand on."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def decimals(value: str | float, places: int = 2) -> str:
    return f"{float(value):.{places}f}"


def median(values: Sequence[str]) -> str:
    return decimals(statistics.median(float(value) for value in values if value))


def share(value: float | None) -> str:
    """A share as a percentage."""
    return "not measured" if value is None else f"{value:.0%}"


def cell(text) -> str:
    """Text in a cell of a Markdown table."""
    return str(text).replace("|", "\\|")


# --- what templates may ask for -----------------------------------------------------------------------------


class Sources:
    """The result files below a folder, as the templates see them."""

    def __init__(self, root: Path = ROOT) -> None:
        self.root = root

    def text(self, path: str) -> str:
        if not (self.root / path).is_file():
            advice = "run what writes it first (make figures, make study, make bench)"
            raise UserError(f"{path} is missing: {advice}")
        return (self.root / path).read_text(encoding="utf-8")

    def json(self, path: str) -> dict:
        return json.loads(self.text(path))

    def csv(self, path: str) -> list[dict]:
        return list(csv.DictReader(self.text(path).splitlines()))

    def metrics(self, pair: str, notebook: str) -> dict:
        return self.json(f"figures/{pair}/results/{notebook}.json")["metrics"]

    def metric(self, pair: str, notebook: str, name: str) -> str:
        """A number of a pair, as text."""
        return number(self.metrics(pair, notebook).get(name))

    def value(self, pair: str, notebook: str, name: str, places: int = 2) -> str:
        """A number without its interval."""
        value = self.metrics(pair, notebook)[name]["value"]
        return "not measured" if value is None else f"{value:.{places}f}"

    def percent(self, pair: str, notebook: str, name: str) -> str:
        """A share as a percentage, with one decimal below ten."""
        share = 100 * self.metrics(pair, notebook)[name]["value"]
        return f"{share:.1f}%" if share < 10 else f"{share:.0f}%"

    def count(self, pair: str, notebook: str, name: str, part: str = "value") -> str:
        """A whole number, or how many it is out of (part "n")."""
        return f"{self.metrics(pair, notebook)[name][part]:.0f}"

    def by_crosscoder(self) -> dict[str, list[dict]]:
        """The verdicts of notebook 18: {dictionary: rows}."""
        rows, dictionaries = _rows(self.json("figures/tiny_medium/results/18.json")["tables"]["verdicts"]), {}
        for row in rows:
            dictionaries.setdefault(row["dictionary"], []).append(row)
        return dictionaries

    def beyond_zero(self, pair: str, notebook: str, pattern: str, side: int = -1) -> list[str]:
        """The categories whose interval lies below 0, or above (``side`` 1); {} in ``pattern`` is the
        category."""
        intervals = {c: self.metrics(pair, notebook)[pattern.format(c)]["ci"] for c in CATEGORIES}
        return [c for c, ci in intervals.items() if ci and (ci[1] < 0 if side < 0 else ci[0] > 0)]

    def held(self, notebook: str, beginning: str, pair: str = "tiny") -> list[str]:
        """The predictions of a notebook on an embedded pair that begin so and are said to hold."""
        rows = self.boards(pair)[notebook]
        return [r["prediction"] for r in rows if r["prediction"].startswith(beginning) and r["held"] == YES]

    def attributed(self, *pairs: str) -> str:
        """The categories whose attributed features are said to be needed (notebook 04), in all ``pairs``."""
        test = "{}: without the features attributed to it"
        needed = (c for c in CATEGORIES if all(self.held("04", test.format(c), p) for p in pairs or ["tiny"]))
        return listed(list(needed))

    def in_trainings(self, notebook: str, beginning: str) -> int:
        """In how many of TRAININGS a prediction that begins so is said to hold."""
        return sum(bool(self.held(notebook, beginning, pair)) for pair in TRAININGS)

    def lowered(self, pair: str, notebook: str, pattern: str) -> str:
        """Of how many of the four categories the interval of a change lies below 0, and which."""
        found = self.beyond_zero(pair, notebook, pattern)
        return f"{len(found)} of 4" + (f" ({', '.join(found)})" if found else "")

    def by_training(self) -> list[dict]:
        """The predictions of 02 to 04 that were tested in all three trainings: their verdicts, and whether
        these are the same."""
        boards, rows = [self.boards(pair) for pair in TRAININGS], []
        for notebook in ("02", "03", "04"):
            first, *others = ({row["prediction"]: row["held"] for row in board[notebook]} for board in boards)
            for prediction in first:
                held = [first[prediction], *(board.get(prediction) for board in others)]
                if not any(verdict is None or verdict.startswith("not testable") for verdict in held):
                    same = len(set(held)) == 1
                    rows.append(dict(notebook=notebook, prediction=prediction, held=held, same=same))
        return rows

    def speed(self, name: str) -> dict:
        content = self.json("benchmarks/results.json")
        if name not in content:
            raise UserError(f"{name} is missing in benchmarks/results.json: run make bench PEERS=1 first")
        return content[name]

    def boards(self, pair: str) -> dict[str, list[dict]]:
        """The predictions of every notebook that has some: {number: rows}."""
        boards = {}
        for file in sorted((self.root / "figures" / pair / "results").glob("[0-9][0-9].json")):
            content = self.json(file.relative_to(self.root).as_posix())
            if table := content["tables"].get("scoreboard"):
                boards[file.stem] = _rows(table)
        return boards

    def nothing_crosses(self) -> str:
        """Why nothing can be said of crossing over at half depth, where that is so; else ""."""
        most = self.metrics("tiny", "13").get("swap_forward_transplant", {}).get("value")
        if most is None or most >= CROSSES:
            return ""
        return f"not testable at this layer, where the whole residual stream carries over {most:.2f}"

    def sizes_fail(self) -> str:
        """How many sizes do not pass their gates, so that size cannot be told from success; "" if none."""
        metrics = self.metrics("tiny", "06")
        failed = [
            size
            for size in SIZES
            if any(
                metrics.get(f"{name}_{size}", {"value": 1})["value"] < least for name, least in GATES.items()
            )
        ]
        return f"not testable: {len(failed)} of {len(SIZES)} sizes fail their gates. " if failed else ""

    def standing(self) -> list[dict]:
        """For each category, over the crosscoders: does its feature predict, more than the kind of sentence,
        lie beyond the null, recur under other seeds, say more than a token, and does removing the category's
        features cost accuracy, more than the controls? ``unique`` and ``more`` are shares of crosscoders."""
        metrics, nothing = (
            self.metrics("tiny", "03") | self.metrics("tiny", "13"),
            {"value": None, "ci": None},
        )
        rows = []
        for c in CATEGORIES:
            names = (c, f"{c}_over_random", f"{c}_over_matched")
            cost, *over = (metrics.get(f"ablate_accuracy_{name}") or nothing for name in names)
            beyond = [all(m["ci"] and m["ci"][1] < 0 for m in (cost, more)) for more in over]
            row = {"category": c, "auroc": metrics[f"auroc_{c}"], "cost": cost}
            row |= {"gain": metrics.get(f"gain_{c}") or nothing}
            row |= {"stability": metrics.get(f"stable_{c}") or nothing}
            row |= {name: (metrics.get(f"{key}_{c}") or nothing)["value"] for name, key in SHARES.items()}
            row |= {"beyond_random": beyond[0], "beyond_matched": beyond[1]}
            shares = all((row[name] or 0) >= SHARE for name in SHARES)
            stable = (row["stability"]["value"] or 0) >= SAME_FEATURE
            more = bool(row["gain"]["ci"]) and row["gain"]["ci"][0] > 0
            rows.append(row | {"all": shares and more and stable and all(beyond)})
        return rows


def listed(categories: Sequence[str]) -> str:
    return "all four" if len(categories) == len(CATEGORIES) else ", ".join(categories) or "no category"


def _rows(table: Mapping) -> list[dict]:
    return [dict(zip(table["columns"], row)) for row in table["rows"]]


def render(template: str, root: Path = ROOT, **values) -> str:
    """A template with the result files below ``root``. UserError names the file or number that is missing."""
    sources = Sources(root)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES),
        autoescape=jinja2.select_autoescape(["html.j2"]),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {
        f.__name__: f for f in (number, interval, figure, decimals, median, share, cell, listed)
    }
    environment.globals |= {
        "categories": CATEGORIES,
        "same_feature": SAME_FEATURE,
        "sources": sources,
        "trainings": TRAININGS,
        **{pair: functools.partial(sources.metric, pair) for pair in PAIRS},
        **{name: getattr(sources, name) for name in NUMBERS},
    }
    return environment.get_template(template).render(**values)


def pages(root: Path = ROOT) -> dict[str, str]:
    """Every page that is written from results: {path below the repository: text}."""
    return {page: render(template, root) for page, template in PAGES.items()}


def publish(root: Path = ROOT) -> None:
    """Write README.md and the pages in docs/ anew."""
    for page, text in pages(root).items():
        write_text(root / page, text)


# --- the study as HTML --------------------------------------------------------------------------------------

# pages beside README; the first four are linked on every page
DOCS = ("architecture", "glossary", "own_pair", "formats", "results", "scoreboard")
DOCS += ("scoreboard_smol", "robustness_smol", "costs", "cluster")
_NAME = re.compile(r"\"(\d\d_\w+)\"")
_MATH = re.compile(r"```.*?```|`[^`\n]+`|\$\$(?P<block>.+?)\$\$|\$(?P<inline>[^$\n]+)\$", re.DOTALL)
_LINK = re.compile(r'(href|src)="([^"#:]+)(#[^"]*)?"')
_SIZE = re.compile(r'style="height:(\d+)px; width:(\d+)px;"')


def build(out: Path = ROOT / "data" / "report", root: Path = ROOT) -> int:
    """Write the study as HTML below ``out`` (which is replaced) from ``root``; returns the number of pages.
    UserError if there are no executed notebooks or no figures, or if ``out`` holds something else.
    """
    from nbconvert.filters import markdown2html
    from plotly.offline import get_plotlyjs

    numbered = "[0-9][0-9]_*.ipynb"
    notebooks = sorted((root / "notebooks").glob(numbered))
    own = sorted({file.parent.name for file in (root / "figures").glob("*/*.html")} - {*PAIRS})
    pairs = (*PAIRS, *own)  # a pair of one's own, too, with its executed notebooks
    theirs = sorted(n for pair in own for n in root.glob(f"data/runs/{pair}/default/notebooks/{numbered}"))
    files = ((pair, file) for pair in pairs for file in sorted((root / "figures" / pair).glob("*.html")))
    figures = {f"{pair}/{file.stem}": file for pair, file in files}
    if not notebooks or not figures:
        raise UserError("there are no notebooks or no figures to report on: run make figures first")
    if out.is_file() or (out.is_dir() and any(out.iterdir()) and not (out / "report.css").is_file()):
        raise UserError(f"{out} is not empty and not a report: choose another folder with --out")
    shutil.rmtree(out, ignore_errors=True)
    write_text(out / "report.css", (TEMPLATES / "report.css").read_text() + _code_colours())
    write_text(out / "figures" / "plotly.min.js", get_plotlyjs())
    for name, file in figures.items():
        text = file.read_text(encoding="utf-8").replace('src="plotly.min.js"', 'src="../plotly.min.js"')
        titled = text.replace("<head>", f"<head><title>{html.escape(file.stem)}</title>", 1)
        write_text(out / "figures" / f"{name}.html", titled)
    docs = [name for name in DOCS if (root / "docs" / f"{name}.md").is_file()]
    places = {"README.md": "index.html"}  # file of the repository -> file of the report
    places |= {f"notebooks/{n.name}": f"notebooks/{n.stem}.html" for n in notebooks}
    places |= {n.relative_to(root).as_posix(): f"notebooks/{n.parts[-4]}/{n.stem}.html" for n in theirs}
    places |= {f"docs/{name}.md": f"docs/{name}.html" for name in docs}
    for picture in [*(root / "figures").glob("*/*.png"), *(root / "docs").glob("*.svg")]:
        place = picture.relative_to(root)
        if place.parts[0] == "docs" or place.parts[1] in pairs:
            shutil.copyfile(picture, made_folder((out / place).parent) / place.name)
            places[place.as_posix()] = place.as_posix()
    pictured = [name for name, file in figures.items() if file.with_suffix(".png").is_file()]
    gallery = {pair: [n for n in pictured if n.startswith(f"{pair}/")] for pair in pairs}
    links = [(n.stem[:2], places[f"notebooks/{n.name}"]) for n in notebooks]
    links += [(name.replace("_", " "), places[f"docs/{name}.md"]) for name in docs[:4]]
    links += [(f"{n.parts[-4]} {n.stem[:2]}", places[n.relative_to(root).as_posix()]) for n in theirs]
    pages_of = {source: target for source, target in places.items() if target.endswith(".html")}
    with Progress("pages", len(pages_of)) as progress:
        for written, (source, target) in enumerate(pages_of.items(), 1):
            up = "../" * (len(Path(target).parts) - 1)
            if source.endswith(".ipynb"):
                these = PAIRS if source.startswith("notebooks/") else (source.split("/")[2],)
                body, title = _from_notebook(root / source, figures, these, up)
            else:
                text = (root / source).read_text(encoding="utf-8")
                title, body = text.split("\n")[0].lstrip("# "), markdown2html(with_mathml(text))
            if source == "README.md":
                body += render("gallery.html.j2", root, gallery=gallery)
            page = render("page.html.j2", root, title=title, up=up, links=links, body=body)
            page = _LINK.sub(functools.partial(_link, source, up, places, out), page)
            write_text(out / target, page)
            progress.update(written)
    return len(pages_of)


def _from_notebook(file: Path, figures: Mapping, pairs: Sequence, up: str) -> tuple[str, str]:
    """(HTML, title) of an executed notebook; pictures of the figures of ``pairs`` become frames of them."""
    import nbformat
    from nbconvert import HTMLExporter

    notebook = nbformat.read(file, as_version=4)
    lines = [line for c in notebook.cells for line in c.source.split("\n")]
    title = next(line for line in lines if line.startswith("# ")).lstrip("# ")
    for content in notebook.cells:
        if content.cell_type == "markdown":
            content.source = with_mathml(content.source)
            continue
        named = (f"{pair}/{name}" for name in _NAME.findall(content.source) for pair in pairs)
        places = iter(dict.fromkeys(place for place in named if place in figures))
        for output in content.outputs:
            if "image/png" not in output.get("data", {}):
                continue
            png = output.data["image/png"].strip()
            values = {"words": output.data.get("text/plain", "figure"), "png": png}
            if place := next(places, None):
                size = _SIZE.search(figures[place].read_text(encoding="utf-8")) or (0, 440, 760)
                values |= {"place": f"{up}figures/{place}.html", "size": [int(size[i]) + 20 for i in (2, 1)]}
            output.data = nbformat.from_dict({"text/html": render("figure.html.j2", **values)})
    return HTMLExporter(template_name="basic").from_notebook_node(notebook)[0], title


def with_mathml(text: str) -> str:
    """Markdown in which formulas between dollar signs are MathML; code is left alone."""
    from latex2mathml.converter import convert

    def drawn(match: re.Match) -> str:
        formula = match["block"] or match["inline"]
        if formula is None:
            return match[0]
        return convert(formula, display="block" if match["block"] else "inline").replace("\n", " ")

    return _MATH.sub(drawn, text)


def _code_colours() -> str:
    from pygments.formatters import HtmlFormatter

    light, dark = (HtmlFormatter(style=s).get_style_defs(".highlight") for s in ("default", "monokai"))
    light = light.replace(".highlight { background: #f8f8f8; }", "")
    return f"{light}\n@media (prefers-color-scheme: dark) {{\n{dark}\n.highlight {{ background: none }}\n}}\n"


def _link(source: str, up: str, places: Mapping[str, str], out: Path, match: re.Match) -> str:
    """An address of the page made from ``source``: the report's own file, or none if the report lacks it."""
    attribute, address, anchor = match[1], match[2], match[3] or ""
    if address in (f"{up}report.css", *(f"{up}{target}" for target in places.values())):
        return match[0]  # the page's own frame
    parts: list[str] = []
    for part in f"{Path(source).parent.as_posix()}/{address}".split("/"):
        parts = parts[:-1] if part == ".." else parts + [part] * (part not in ("", "."))
    place = "/".join(parts)
    if place in places or (place.startswith("figures/") and (out / place).is_file()):
        return f'{attribute}="{up}{places.get(place, place)}{anchor}"'
    return f'title="{html.escape(place)} in the repository"' if attribute == "href" else match[0]
