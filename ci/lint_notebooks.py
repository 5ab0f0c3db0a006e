"""Check that the lessons look like lessons: what notebook_format.py checks, and more.

One heading, minutes to run and to read, one setup cell, parameters that papermill can read, cells
of a readable length, exercises with difficulty, minutes, stub, check and hint, sections in the
usual order, links that lead somewhere, papers in the bibliography, findings below charts and marks
behind numbers (lint_findings.py). Part of ``bash ci/test``.
"""

import argparse
import ast
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import nbformat
from badges import STAMPED
from lint_findings import unsaid, unsupported
from nbformat import NotebookNode
from notebook_format import problems

from tpt_nb.course import kinds
from tpt_nb.course.cells import names_of

REPO = Path(__file__).resolve().parent.parent
CELL, SETUP, ROW = 20, 8, 60  # lines of code: of any cell, of the setup, without a word between
ANSWER = 30  # of an exercise's cell: stub, solution and checks
EXERCISES = range(4, 9)
LAST = ("Limits", "Conclusion", "References")  # the last sections, in this order
HEADING = re.compile(r"^(#{1,6}) +(.+?)\s*$", re.MULTILINE)
LEVELS = r" · difficulty [●○]{3} · importance [●○]{3} · \d+ minutes$"
EXERCISE = re.compile(rf"^\*\*Exercise (\d\d\.\w+) · [^*]+\*\*{LEVELS}", re.MULTILINE)
LINK = re.compile(r"!?\[([^\]]*)\]\(([^()\s]*(?:\([^()\s]*\)[^()\s]*)*)([^)]*)\)")
ARXIV = re.compile(r"arxiv\.org/abs/(\d{4}\.\d{4,5})", re.IGNORECASE)


def main(argv: list[str] | None = None) -> int:
    """Print what is wrong with the notebooks; 1 if something is."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("notebooks", nargs="*", type=Path, help="default: all in notebooks/")
    args = parser.parse_args(argv)
    paths = args.notebooks or sorted((REPO / "notebooks").glob("[0-9][0-9]_*.ipynb"))
    bib = (REPO / "notebooks" / "references.bib").read_text(encoding="utf-8")
    sources = set(re.findall(r"^\s*eprint\s*=\s*\{([\d.]+)\}", bib, re.MULTILINE))
    found = [f"{p.name}: {text}" for p in paths for text in lint(p, sources)]
    print("\n".join(found) if found else f"{len(paths)} notebooks: nothing to complain about")
    return 1 if found else 0


def lint(path: Path, sources: set[str]) -> list[str]:
    """What is wrong with a notebook, a line each; ``sources``: the bibliography's arXiv numbers."""
    notebook = nbformat.read(path, as_version=4)
    found = problems(notebook, path.stat().st_size)
    counts = [text for text in found if ": execution count " in text]
    if len(counts) > 3:  # not executed, or in another order: one line says it
        found = [text for text in found if text not in counts]
        found.append(f"{counts[0]}, and {len(counts) - 1} more: run bash ci/run --in-place")
    found += header(notebook, path.name[:2])
    for rule in (order, parameters, lengths, reused, unsaid, unsupported):
        found += rule(notebook)
    return [*found, *exercises(notebook, path.name[:2]), *links(notebook, path.parent, sources)]


def header(notebook: NotebookNode, number: str) -> Iterator[str]:
    """The title; the minutes below it are those of ``ci/minutes.py``."""
    titles = len(headings(notebook, 1))
    if titles != 1:
        yield f"{titles} headings of the first level, not one"
    first = notebook.cells[0]
    if first.cell_type != "markdown" or not first.source.startswith(f"# {number} · "):
        yield f"the first cell does not begin with '# {number} · title'"


def headings(notebook: NotebookNode, level: int) -> list[str]:
    """The headings of a level, outside of code blocks."""
    texts = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    plain = re.sub(r"^```.*?^```", "", "\n\n".join(texts), flags=re.MULTILINE | re.DOTALL)
    return [text for marks, text in HEADING.findall(plain) if len(marks) == level]


def order(notebook: NotebookNode) -> Iterator[str]:
    """Setup, parameters, body, and the last sections."""
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    if not code or not STAMPED.match(code[0].source) or "\nsetup.start(" not in code[0].source:
        yield "the first code cell is not the setup (that of ci/badges.py, then setup.start)"
    elif length(code[0]) > SETUP:
        yield f"the setup has {length(code[0])} lines, more than {SETUP}"
    if len(code) < 2 or "parameters" not in code[1].metadata.get("tags", []):
        yield "the second code cell is not tagged 'parameters'"
    sections = headings(notebook, 2)[-len(LAST) :]
    if tuple(sections) != LAST:
        yield f"the last sections are not {', '.join(LAST)}, but {', '.join(sections)}"
    last = notebook.cells[-1]
    if "CC BY 4.0" not in last.source or "MIT" not in last.source:
        yield "the last cell does not name the licences of text and code"


def parameters(notebook: NotebookNode) -> Iterator[str]:
    """papermill reads the parameters line by line: name, type, literal, comment."""
    tagged = [c.source for c in notebook.cells if "parameters" in c.metadata.get("tags", [])]
    for line in "\n".join(tagged).split("\n"):
        code, _, comment = line.partition("#")
        where = f"parameter {code.strip()!r}"
        if not code.strip():
            continue
        if line.count("=") > 1:
            yield f"{where}: papermill cannot read a line with a second '='"
            continue
        try:
            statement = ast.parse(line.strip()).body[0]
            ast.literal_eval(statement.value)
        except (SyntaxError, ValueError, AttributeError, IndexError):
            yield f"{where} is not 'name: type = literal'"
            continue
        if not isinstance(statement, ast.AnnAssign):
            yield f"{where} has no type"
        if not comment:
            yield f"{where} has no comment that explains it"


def length(cell: NotebookNode) -> int:
    """Lines of a cell that are not empty."""
    return sum(bool(line.strip()) for line in cell.source.split("\n"))


def is_hidden(cell: NotebookNode) -> bool:
    """Is it a hidden test, which no student sees?"""
    return bool(cell.metadata.get("tpt", {}).get("hidden"))


def lengths(notebook: NotebookNode) -> Iterator[str]:
    """No cell of code is too long to be read at once, nor too much code without a word between."""
    row = 0  # lines since the last word
    for i, cell in enumerate(notebook.cells, 1):
        if is_hidden(cell):
            continue
        here = length(cell) if cell.cell_type == "code" else 0
        most = ANSWER if "q" in cell.metadata.get("tpt", {}) else CELL
        if here > most:
            yield f"cell {i} has {here} lines of code, more than {most}"
        before, row = row, row + here if here else 0
        if before <= ROW < row:
            yield f"cell {i}: {row} lines of code without a word between"


def reused(notebook: NotebookNode) -> Iterator[str]:
    """Names that the conclusion needs and two cells assign: it may tell the other one's numbers.

    What one of them binds in some branch alone is a choice, not a mistake.
    """
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    last = [names_of(source).needs for source in code if "findings.answers(" in source]
    bound = Counter(name for source in code for name in names_of(source).binds)
    for name in sorted(set().union(*last)):
        if bound[name] > 1:
            times = f"assigned in {bound[name]} cells"
            yield f"{name} is used in the conclusion and {times}: rename one"


def exercises(notebook: NotebookNode, number: str) -> Iterator[str]:
    """Four to eight functions, numbered, and one of each other kind, with what a student needs."""
    cells = [cell for cell in notebook.cells if not is_hidden(cell)]
    at = {
        i: cell.metadata.tpt.q
        for i, cell in enumerate(cells)
        if "q" in cell.metadata.get("tpt", {})
    }
    functions = [q for q in at.values() if not kinds.kind(q)]
    if len(functions) not in EXERCISES:
        yield f"{len(functions)} exercises, not {EXERCISES[0]} to {EXERCISES[-1]}"
    for count, q in enumerate(functions, 1):
        if q != f"{number}.{count}":
            yield f"exercise {q} stands in the place of {number}.{count}"
    for letter, what in kinds.KINDS.items():
        if f"{number}.{letter}" not in at.values():
            yield f"there is no exercise {number}.{letter} ({what})"
    for i, q in at.items():
        where = f"exercise {q}"
        if not isinstance(cells[i].metadata.tpt.get("points"), int | float):
            yield f"{where} has no points"
        yield from (f"{where}: {text}" for text in answer_problems(q, cells[i].source))
        above = [i - 1, i - 2] if kinds.kind(q) == "O" else [i - 1]  # a cell to start with between
        texts = [cells[j].source for j in above if cells[j].cell_type == "markdown"]
        if q not in EXERCISE.findall("\n\n".join(texts)):
            yield f"{where}: above it must stand '**Exercise {q} · title** · difficulty ●○○ · ...'"
        after = cells[i + 1].source if i + 1 < len(cells) else ""
        texts.append("" if EXERCISE.search(after) else after)  # that hint is for the next one
        if not any("<details>" in text and "Hint" in text for text in texts):
            yield f"{where}: no folded hint (<details><summary>Hint</summary>)"
        results = [c for c in cells[i:] if kinds.calls(c.source, "reveal", q)]
        if kinds.kind(q) == "P" and [c.metadata.get("tags") for c in results] != [["gives-away"]]:
            yield f'{where}: below it must stand one cell with check.reveal("{q}", ...), gives-away'


def answer_problems(q: str, source: str) -> Iterator[str]:
    """What is wrong with the cell of an answer."""
    if kinds.kind(q) in kinds.WRITTEN:
        return
    start, end = source.find("# BEGIN SOLUTION"), source.find("# END SOLUTION")
    if not 0 <= start < end:
        yield "no solution between # BEGIN SOLUTION and # END SOLUTION"
        return
    if '"""' not in source[:start] and kinds.kind(q) != "P":
        yield "the stub has no docstring (what comes in and out, with shapes)"
    if "check." not in source[end:]:
        yield "no check in the same cell"


def links(notebook: NotebookNode, folder: Path, sources: set[str]) -> Iterator[str]:
    """Links have an address, files that they name are there, papers are in the bibliography."""
    for i, cell in enumerate(notebook.cells, 1):
        if cell.cell_type != "markdown":
            continue
        text = re.sub(r"`[^`]*`|\$\$.*?\$\$|\$[^$\n]*\$", "", cell.source, flags=re.DOTALL)
        for label, target, rest in LINK.findall(text):
            if problem := bad_link(label, target, rest, folder):
                yield f"cell {i}: link [{label}]({target}{rest}): {problem}"
        for paper in ARXIV.findall(cell.source):
            if paper not in sources:
                yield f"cell {i}: arXiv:{paper} is not in notebooks/references.bib"


def bad_link(label: str, target: str, rest: str, folder: Path) -> str:
    """What is wrong with a link, or nothing."""
    if not label.strip():
        return "no text"
    if rest.strip() and not re.fullmatch(r'\s+"[^"]*"', rest):
        return "a space in the address"
    parts = urlsplit(target)
    if parts.scheme in ("http", "https"):
        return "" if re.fullmatch(r"[\w-]+(\.[\w-]+)+(:\d+)?", parts.netloc) else "no host"
    if parts.scheme == "mailto" or (not parts.path and parts.fragment):
        return ""
    if parts.scheme or not parts.path:
        return "neither http nor a file"
    return "" if (folder / parts.path).exists() else "there is no such file"


if __name__ == "__main__":
    sys.exit(main())
