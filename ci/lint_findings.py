"""Check that the lessons say what they found: findings below charts, marks behind numbers.

``unsaid``: below each chart and table stands a finding, a sentence that code made of the numbers
(``tpt_nb.lessons.findings``), in the same cell or in one of the next two.

``unsupported``: each result in hand-written text carries a mark, which nobody sees on a page:

    41.0 %<!--=accuracy of TPT-->               a value that the notebook's code published
    23.14 %<!--source: data/reported/x.csv-->   stands in this file (csv or json)
    400 million<!--source: radford2021clip-->   reported there; the key is in references.bib
    crops of 8 to 100 % of the area<!--set-->   chosen, not measured; counts for its paragraph

A result is a number with a unit (%, points, times, nats, seconds), a count ("22 of 100"), a p-value
or another decimal. None are: formulas, code, links, exercises, the list of papers, the line with
the minutes, the 95 % of an interval, grids (4 x 4), the numbers of exercises and notebooks.
"""

import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path

from nbformat import NotebookNode

REPO = Path(__file__).resolve().parent.parent
KEY, MARK = "tpt_nb", "**Finding.**"  # as in tpt_nb.lessons.findings
NEXT = 2  # cells below a chart in which its finding may stand
PICTURES = {  # figures that show images or draw a method: nothing is measured
    "boxed", "clip_towers", "course_map", "image_grid", "labelled_boxes", "patch_sheet",
    "patch_views", "prediction", "ra_tta_stages", "tpt_loop",
}  # fmt: skip
NOTE = re.compile(r"<!--\s*(=|source:|set\b)\s*(.*?)\s*-->")
UNIT = r"%|per cent\b|percent\b|points?\b|times\b|x\b|×|nats\b|seconds?\b|ms\b|s\b|million\b"
UNIT += r"|of \d[\d,]*\b"
RESULT = re.compile(
    rf"(?<![\w.,/−+-])(?P<number>[+−-]?\d[\d,]*(?:\.\d+)?)"
    rf"(?:(?P<unit>[ \u00a0]?(?:{UNIT}))|(?<=\d\.\d)|(?<=\d\.\d\d)|(?<=\d\.\d\d\d))(?![\w.]*\d)",
)
SKIPPED = re.compile(  # what is no text, or no result
    r"```.*?```|`[^`\n]*`|\$\$.*?\$\$|\$[^$\n]*\$|<details>.*?</details>|!?\[[^\]]*\]\([^)]*\)"
    r"|https?://\S+|\b95 ?%|\b(?:Python|torch|notebooks?|sections?|Exercise) \d[\d.]*"
    r"|\b(?:0\d|10)\.(?:\d|[A-Z])\b|\b\d+ [x×] \d+\b",
    re.DOTALL,
)


def unsaid(notebook: NotebookNode) -> Iterator[str]:
    """Charts and tables without a finding below them."""
    cells = [(i, c) for i, c in enumerate(notebook.cells, 1) if not _tpt(c).get("hidden")]
    for k, (i, cell) in enumerate(cells):
        kind = shown(cell)
        if kind and not any(_has_finding(c) for _, c in cells[k : k + NEXT + 1]):
            yield f"cell {i}: no finding below this {kind} (tpt_nb.lessons.findings)"


def shown(cell: NotebookNode) -> str:
    """ "chart", "table" or "": what a cell shows that has to be put into words."""
    if cell.cell_type != "code" or "q" in _tpt(cell) or "widgets." in cell.source:
        return ""
    kinds = [o.get("data", {}) for o in cell.outputs]
    if any("<table" in "".join(data.get("text/html", "")) for data in kinds):
        return "table"
    drawn = set(re.findall(r"figures\.(\w+)\(", cell.source)) - {"show"}
    if any("image/png" in data for data in kinds) and not (drawn and drawn <= PICTURES):
        return "chart"
    return ""


def unsupported(notebook: NotebookNode, repo: Path = REPO) -> Iterator[str]:
    """Results in hand-written text without a mark, or whose mark does not bear them out."""
    known, bib = published(notebook), repo / "notebooks" / "references.bib"
    keys = set(re.findall(r"@\w+\{([^,\s]+),", bib.read_text("utf-8"))) if bib.is_file() else set()
    references = False
    for i, cell in enumerate(notebook.cells, 1):
        if cell.cell_type != "markdown":
            continue
        references = references or bool(re.search(r"^## References", cell.source, re.MULTILINE))
        if references or "**Exercise " in cell.source:
            continue
        for block in re.split(r"\n\s*\n|\n(?=[-|] )", _plain(cell.source, first=i == 1)):
            for number, unit, note, target in results(block):
                if problem := doubt(number, note, target, known, keys, repo):
                    yield f"cell {i}: {number}{unit} {problem}"


def results(block: str) -> Iterator[tuple[str, str, str, str]]:
    """(number, unit, kind of mark or "", what it refers to) of each result of a paragraph."""
    everything = any(note[0] == "set" for note in NOTE.findall(block))
    for hit in RESULT.finditer(block):
        note = NOTE.match(block, hit.end())
        if note or not everything:
            kind, target = note.groups() if note else ("", "")
            yield hit["number"], hit["unit"] or "", kind, target


def doubt(number: str, note: str, target: str, known: dict, keys: set, repo: Path) -> str:
    """What speaks against a number with this mark, or nothing."""
    if note == "=":
        if target not in known:
            return f"refers to {target!r}, which no cell publishes"
        if not agree(number, known[target]):
            return f"is not what the notebook found: {target} is {known[target]:g}"
    elif note == "source:":
        path = repo / target
        if path.suffix not in (".csv", ".json"):
            return "" if target in keys else f"refers to {target!r}, not in references.bib"
        if not path.is_file():
            return f"refers to {target}, which is not there"
        if not any(agree(number, value) for value in numbers_in(path)):
            return f"does not stand in {target}"
    elif note != "set":
        return "is a result without a mark: publish it, name its source, or let code write it"
    return ""


def published(notebook: NotebookNode) -> dict[str, float]:
    """The values that the outputs of a notebook carry, by name; the last one counts."""
    values: dict[str, float] = {}
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            values |= output.get("metadata", {}).get(KEY, {}).get("values", {})
    return values


def agree(number: str, value: float) -> bool:
    """Is this what is printed of the value, with as many decimals? A sign may be left out."""
    text = number.replace(",", "").replace("−", "-")
    digits = len(text.partition(".")[2])
    value = value if text[0] in "+-" else abs(value)
    return abs(round(value, digits) - float(text)) < 10.0**-digits / 2


def numbers_in(path: Path) -> Iterator[float]:
    """Every number of a csv or json file."""
    if path.suffix == ".csv":
        with path.open(encoding="utf-8", newline="") as file:
            cells = [cell for row in csv.reader(file) for cell in row]
    else:
        cells, heap = [], [json.loads(path.read_text("utf-8"))]
        while heap:
            part = heap.pop()
            more = part.values() if isinstance(part, dict) else part
            heap += more if isinstance(part, dict | list) else []
            cells += [] if isinstance(part, dict | list) else [part]
    for cell in cells:
        try:
            yield float(cell)
        except (TypeError, ValueError):
            continue


def _plain(text: str, first: bool) -> str:
    """The text in which results are looked for; of the first cell not the line with the minutes."""
    lines = [s for s in text.split("\n") if not s.startswith("#")]
    if first:
        lines = [s for s in lines if not re.search(r"\b[Rr]ead\b|\bruns? in\b|^last verified", s)]
    return SKIPPED.sub(" ", "\n".join(lines))


def _has_finding(cell: NotebookNode) -> bool:
    outputs = cell.get("outputs", [])
    return any(
        "".join(o.get("data", {}).get("text/markdown", "")).startswith(MARK) for o in outputs
    )


def _tpt(cell: NotebookNode) -> dict:
    return cell.metadata.get("tpt", {})
