"""Minutes to run, to read and for the exercises, and the one-hour path.

``python ci/minutes.py`` writes into each notebook's first cell the minutes and what it has of the
one-hour path, into notebook 00 and the README the path, and into the README's table the minutes.
``--check`` changes nothing and says what is not as it would be written; ``bash ci/test`` does that
too. Reading and exercises are counted; the minutes to *run* are the seconds that ``bash ci/run
--in-place`` measured and stored in the notebook. What is on the path stands in ``COURSE``.
"""

import argparse
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import nbformat
from nbformat import NotebookNode

REPO = Path(__file__).resolve().parent.parent
WORDS, LINE = 170, 4  # words of text in a minute, seconds for a line of code
ROUND = 5  # minutes of reading are said in steps of so many
TIMES = re.compile(r"^\*Run: .*\*$", re.MULTILINE)
PATH = re.compile(r"\n\n\*One-hour path: .*?\*(?=\n\n|\Z)", re.DOTALL)
EXERCISE = re.compile(r"^\*\*Exercise .* · (\d+) minutes$", re.MULTILINE)
SECTION = re.compile(r"^## (?:(\d+)\. )?(.+?)\s*$", re.MULTILINE)
BEGIN, END = "<!-- hour:begin -->", "<!-- hour:end -->"


@dataclass(frozen=True)
class Part:
    """What of a notebook is on the one-hour path, and what may be skipped; titles of sections."""

    path: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    then: str = ""  # for one that is not on the path: who needs it


COURSE = {
    "00": Part(
        ("What shifts", "New statistics: batch-norm adaptation", "The collapse",
         "Why CLIP and one image change the game"),
        ("One image",),
    ),
    "01": Part(
        ("How CLIP was trained: a contrastive step by hand", "Zero-shot classification"),
        ("What the wording does", "What helps where"),
    ),
    "02": Part(
        ("Eight views and three classes", "One gradient step on the context",
         "Reset before every image"),
        ("The first AdamW step is a sign step", "What improved, what worsened"),
    ),
    "03": Part(skip=("The budget of views", "Is it the code?"), then="04 builds on it"),
    "04": Part(skip=("The best scale, and for whom",), then="nothing later builds on it"),
    "05": Part(("One softmax too many",), ("The same on patches",)),
    "06": Part(skip=("Reported numbers",), then="nothing later builds on it"),
    "07": Part(skip=("What personal prompts cost",), then="nothing later builds on it"),
    "08": Part(
        skip=("How large must the database be?", "What we found in the method, and checked"),
        then="nothing later builds on it",
    ),
    "09": Part(skip=("A cost model",), then="nothing later builds on it"),
    "10": Part(
        ("The same views for everyone", "Let the views vote", "Where adaptation hurts"),
        ("Damage, and sensitivity",),
    ),
}  # fmt: skip


def reading(cells: list[NotebookNode]) -> float:
    """Minutes to read cells: text without hints and references, code that is no exercise."""
    minutes = 0.0
    for cell in cells:
        tpt = cell.metadata.get("tpt", {})
        if cell.cell_type == "markdown":
            text = re.sub(r"<details>.*?</details>", "", PATH.sub("", cell.source), flags=re.DOTALL)
            text = between(text, "")  # nor what is written here: it must not count itself
            minutes += len(text.split("## References")[0].split()) / WORDS
        elif not tpt.get("hidden") and "q" not in tpt:
            minutes += sum(bool(line.strip()) for line in cell.source.split("\n")) * LINE / 60
    return minutes


def exercises(notebook: NotebookNode) -> int:
    """Minutes that the exercises' headings add up to."""
    texts = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    return sum(int(minutes) for text in texts for minutes in EXERCISE.findall(text))


def sections(notebook: NotebookNode) -> dict[str, tuple[str, list[NotebookNode]]]:
    """Title of a section -> its number ("" if it has none) and its cells."""
    found: dict[str, tuple[str, list[NotebookNode]]] = {}
    here: list[NotebookNode] = []
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            for number, title in SECTION.findall(cell.source):
                here = []
                found[title] = (number, here)
        here.append(cell)
    return found


def listed(notebook: NotebookNode, titles: tuple[str, ...]) -> str:
    """ "sections 1, 3 and 5", by the numbers that they have in the notebook.

    Raises ``ValueError`` for a section that is not there.
    """
    there = sections(notebook)
    if missing := [title for title in titles if title not in there]:
        raise ValueError(f"COURSE in ci/minutes.py names the section {missing[0]!r}: there is none")
    numbers = [there[title][0] for title in titles]
    *most, last = numbers
    return f"sections {', '.join(most)} and {last}" if most else f"section {last}"


def on_path(notebook: NotebookNode, part: Part) -> int:
    """Minutes that a notebook's sections on the path take to read."""
    there = sections(notebook)
    listed(notebook, part.path)
    return max(1, round(sum(reading(there[title][1]) for title in part.path)))


def first_cell(notebook: NotebookNode, part: Part) -> str:
    """The first cell as it should be.

    Raises ``ValueError`` if it has no line on minutes, or ``COURSE`` does not fit the notebook.
    """
    source, wanted = notebook.cells[0].source, counted(notebook)
    line = f"*Run: about {wanted[0]} minute{'s' * (wanted[0] != '1')} on two CPU cores, no GPU, "
    line += f"no network. Read: {wanted[1]} minutes. Exercises: {wanted[2]} minutes.*"
    source, found = TIMES.subn(line, PATH.sub("", source))
    if not found:
        raise ValueError("the first cell has no line '*Run: ...*' for its minutes")
    if part.path:
        text = f"{listed(notebook, part.path)}, {on_path(notebook, part)} minutes"
    else:
        text = f"not this notebook; {part.then}"
    text = f"*One-hour path: {text}. May be skipped: {listed(notebook, part.skip)}.*"
    return source.replace(line, f"{line}\n\n{text}", 1)


def counted(notebook: NotebookNode) -> tuple[str, str, str]:
    """Minutes to run (in halves), to read and for the exercises.

    Raises ``ValueError`` if the notebook was never executed in place.
    """
    seconds = notebook.metadata.get("tpt_nb", {}).get("seconds")
    if seconds is None:
        raise ValueError("it has no time to run yet: bash ci/run --in-place measures it")
    run, read = max(1, round(seconds / 30)) / 2, round(reading(notebook.cells) / ROUND)
    return f"{run:g}", str(ROUND * max(1, read)), str(exercises(notebook))


def hour(notebooks: dict[Path, NotebookNode], course: dict[str, Part]) -> str:
    """The path as a table, between its markers, with links from the folder of the notebooks."""
    lines, total = ["| notebook | read | minutes |", "| --- | --- | ---: |"], 0
    for path, notebook in notebooks.items():
        part = course[path.name[:2]]
        if not part.path:
            continue
        minutes, there = on_path(notebook, part), sections(notebook)
        total += minutes
        titles = "; ".join(f"{there[title][0]} {title}" for title in part.path)
        lines.append(f"| [{path.name[:2]}]({path.name}) | {titles} | {minutes} |")
    lines.append(f"| | in all | {total} |")
    return "\n".join([BEGIN, *lines, END])


def between(text: str, new: str) -> str:
    """A text with what stands between the markers of the path replaced."""
    start, end = text.find(BEGIN), text.find(END)
    return text if not 0 <= start < end else text[:start] + new + text[end + len(END) :]


def readme(text: str, notebooks: dict[Path, NotebookNode], table: str) -> str:
    """The README: the path, and the last three columns of each notebook's row in its table."""
    text = between(text, re.sub(r"\]\((\d\d_)", r"](notebooks/student/\1", table))
    for path, notebook in notebooks.items():
        row = re.compile(rf"^(\| {path.name[:2]} \|.*?)(?:\| [^|\n]* ){{3}}\|$", re.MULTILINE)
        text = row.sub(rf"\1| {' | '.join(counted(notebook))} |", text)
    return text


def rendered(root: Path, course: dict[str, Part] = COURSE) -> Iterator[tuple[Path, str]]:
    """Each file as it should be; ``ValueError`` names a notebook that does not fit ``COURSE``."""
    paths = sorted((root / "notebooks").glob("[0-9][0-9]_*.ipynb"))
    notebooks = {path: nbformat.read(path, as_version=4) for path in paths}
    if {path.name[:2] for path in paths} != set(course):
        raise ValueError(f"COURSE in ci/minutes.py has {', '.join(course)}, not these notebooks")
    table = hour(notebooks, course)
    for path, notebook in notebooks.items():
        try:
            notebook.cells[0].source = first_cell(notebook, course[path.name[:2]])
        except ValueError as error:
            raise ValueError(f"{path.name}: {error}") from None
        for cell in notebook.cells[1:]:
            if cell.cell_type == "markdown":
                cell.source = between(cell.source, table)
        yield path, nbformat.writes(notebook) + "\n"
    page = root / "README.md"
    yield page, readme(page.read_text("utf-8"), notebooks, table)


def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--check", action="store_true", help="only compare; exit 1 if one differs")
    parser.add_argument("--root", type=Path, default=REPO, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    bad = 0
    try:
        for path, new in list(rendered(args.root)):
            if new == path.read_text("utf-8"):
                continue
            bad += 1
            if args.check:
                print(f"{path.relative_to(args.root)}: run python ci/minutes.py")
            else:
                path.write_text(new, encoding="utf-8")
                print(f"{path.relative_to(args.root)}: minutes written")
    except ValueError as error:
        print(f"ci/minutes.py: {error}", file=sys.stderr)
        return 2
    return int(bool(bad and args.check))


if __name__ == "__main__":
    sys.exit(main())
