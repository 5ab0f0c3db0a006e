"""The book: the stored notebooks as pages that work from ``file://``. Started by ``bash ci/book``.

Sphinx with myst-nb does the work (``ci/book_pages``); here the notebooks are made ready for it:
hidden tests go, an exercise becomes its stub and a folded solution (answers in words are folded in
the notebooks), the result of a prediction is folded, too, and what is cited gets its mark.
"""

import argparse
import html
import shutil
import sys
import tempfile
from pathlib import Path

import nbformat
from nbformat import NotebookNode
from pybtex.database import BibliographyData, Entry, parse_file
from pybtex.exceptions import PybtexError
from sphinx.cmd.build import main as sphinx

from tpt_nb.course import Question, load_master

REPO = Path(__file__).resolve().parent.parent


def cite(text: str, bibliography: BibliographyData, number: str) -> str:
    """Mark the lines that name an entry, by its address or its title, and note it in the entry."""
    lines = text.split("\n")
    for key, entry in bibliography.entries.items():
        names = [f"]({address(entry)})", entry.fields["title"][1:-1]]
        i = next((i for i, x in enumerate(lines) if any(n.lower() in x.lower() for n in names)), -1)
        note = entry.fields.get("note", "")
        if i >= 0 and number not in note:
            lines[i] += f" {{cite:p}}`{key}`"
            entry.fields["note"] = f"{note[:-1]}, {number}." if note else f"Cited in {number}."
    return "\n".join(lines)


def address(entry: Entry) -> str:
    """Where an entry can be read."""
    field = next((name for name in ("eprint", "doi", "url") if name in entry.fields), "")
    start = {"eprint": "https://arxiv.org/abs/", "doi": "https://doi.org/"}.get(field, "")
    return start + entry.fields[field] if field else "nowhere"


def exercise(cell: NotebookNode, question: Question) -> list[NotebookNode]:
    """The stub, and the solution with its outputs, folded."""
    if cell.cell_type == "markdown":
        return [cell]
    cell.source = question.solution
    return [nbformat.v4.new_code_cell(question.stub), folded(cell, f"Solution {question.id}")]


def folded(cell: NotebookNode, title: str) -> NotebookNode:
    """A cell of code with its outputs, below a title to click on."""
    cell.metadata = {"tags": ["hide-cell"], "mystnb": {"code_prompt_show": title}}
    return cell


def prepare(path: Path, bibliography: BibliographyData) -> NotebookNode:
    """A master as the book shows it."""
    master, cells = load_master(path), []
    for cell in master.notebook.cells:
        tpt = cell.metadata.get("tpt", {})
        if tpt.get("hidden"):
            continue
        if cell.cell_type == "markdown":  # without the badge, which is a picture on a server
            lines = [line for line in cell.source.split("\n") if not line.startswith("[![")]
            cell.source = cite("\n".join(lines), bibliography, path.name[:2])
        for output in cell.get("outputs", []):  # myst-nb leaves the alt text of pictures out
            alt = output.get("metadata", {}).get("image/png", {}).get("alt")
            if alt:
                source = "".join(output.data.pop("image/png").split())
                shown = f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{source}">'
                output.data["text/html"] = shown
        if "check.reveal(" in cell.source:
            cell = folded(cell, "The result")
        cells += exercise(cell, master.questions[tpt["q"]]) if "q" in tpt else [cell]
    master.notebook.cells = cells
    return master.notebook


def main(argv: list[str] | None = None) -> int:
    """Write the book; 1 if Sphinx warns (a link that leads nowhere, say), 2 for a mistake."""
    parser = argparse.ArgumentParser(prog="bash ci/book", allow_abbrev=False)
    parser.add_argument("--out", type=Path, default=REPO / "out" / "book", metavar="DIR")
    parser.add_argument("--notebooks", type=Path, default=REPO / "notebooks", metavar="DIR")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        pages = shutil.copytree(REPO / "ci" / "book_pages", Path(folder, "pages"))
        try:
            bibliography = parse_file(args.notebooks / "references.bib", "bibtex")
            for key, entry in bibliography.entries.items():
                missing = {"author", "title", "year"} - {*entry.persons, *entry.fields}
                if missing:
                    raise ValueError(f"references.bib: {key} lacks {', '.join(sorted(missing))}")
                entry.fields["title"] = f"{{{entry.fields['title']}}}"  # or CLIP becomes clip
            for path in sorted(args.notebooks.glob("[0-9][0-9]_*.ipynb")):
                nbformat.write(prepare(path, bibliography), pages / path.name)
            bibliography.to_file(pages / "references.bib", "bibtex")
            shutil.rmtree(args.out, ignore_errors=True)
        except (ValueError, OSError, PybtexError) as error:
            where = "references.bib: " if isinstance(error, PybtexError) else ""
            print(f"ci/book: {where}{error}", file=sys.stderr)
            return 2
        code = sphinx(["-q", "-W", "-d", f"{folder}/seen", str(pages), str(args.out)])
    print(args.out / "index.html")
    return code


if __name__ == "__main__":
    sys.exit(main())
