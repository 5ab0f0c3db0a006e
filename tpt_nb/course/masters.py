"""Masters: notebooks with solutions, and the versions of them that are given out."""

import functools
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from tpt_nb.course import kinds
from tpt_nb.course.cells import defined, names_of
from tpt_nb.course.kinds import BEGIN, END

LINK = re.compile(r"(\]\()(?![a-z]+:|#|/|\.\./|\d\d_\w+\.ipynb)([^()\s]+\))")
WITH_SOLUTIONS = re.compile(r" · \[with solutions\]\([^)]*\)")  # beside the badge (ci/badges.py)


class Mistake(Exception):
    """Something in what was asked for, or in a master; its text is for the user."""


@dataclass(frozen=True)
class Question:
    """An exercise of a master."""

    id: str
    points: float
    cell: str  # id of its cell
    source: str  # of its cell
    tests: tuple[str, ...]  # ids of its hidden cells
    result: str = ""  # of the run that it predicts

    @property
    def is_run(self) -> bool:
        """Is the answer a program, to be run (and not read)?"""
        return kinds.kind(self.id) in ("", "B")

    @functools.cached_property
    def stub(self) -> str:
        """The cell as the student gets it."""
        return kinds.stub(self.source, self.id)

    @functools.cached_property
    def solution(self) -> str:
        """The cell without the markers."""
        return kinds.solved(self.source)

    @functools.cached_property
    def rubric(self) -> list[tuple[float, str]]:
        """What a person gives points for: the points, and for what."""
        return kinds.rubric(self.source) if kinds.kind(self.id) in kinds.WRITTEN else []

    @functools.cached_property
    def checks(self) -> str:
        """The visible checks: what follows the solution."""
        lines = self.source.split("\n")
        last = max(i for i, line in enumerate(lines) if END.match(line))
        after = "\n".join(lines[last + 1 :])
        # a solution in the midst of a function: the checks begin with the next statement outside
        return re.sub(r"\A(?:[ \t]+.*\n|\s*\n)*", "", after)

    @functools.cached_property
    def names(self) -> set[str]:
        """The functions that the answer defines."""
        return defined(self.source)


@dataclass(frozen=True)
class Master:
    """A notebook with solutions, and its questions."""

    name: str
    notebook: NotebookNode = field(repr=False)
    questions: dict[str, Question] = field(repr=False)
    hash: str

    @functools.cached_property
    def names(self) -> set[str]:
        """What its cells bind: functions that are asked for, and all of the other cells."""
        code = [c for c in self.notebook.cells if c.cell_type == "code"]
        others = [names_of(c.source).may_bind for c in code if "tpt" not in c.metadata]
        return set().union(*others, *(q.names for q in self.questions.values()))


def load_master(path: Path) -> Master:
    """Read a master.

    Raises:
        Mistake: a marker, a number of points or a question is wrong; says in which cell.
    """
    content = path.read_bytes()
    notebook = nbformat.reads(content.decode(), as_version=4)
    cells, tests = {}, {}
    for i, cell in enumerate(notebook.cells, 1):
        tpt = cell.metadata.get("tpt", {})
        where = f"{path.name}, cell {i}"
        if "q" not in tpt:
            if _markers(cell):
                raise Mistake(f"{where}: a solution, but no metadata tpt: {{q, points}}")
            continue
        if tpt.get("hidden"):
            tests.setdefault(tpt["q"], []).append(cell.id)
            continue
        if tpt["q"] in cells:
            raise Mistake(f"{where}: question {tpt['q']} is there twice")
        if not isinstance(tpt.get("points"), int | float) or tpt["points"] <= 0:
            raise Mistake(f"{where}: points are {tpt.get('points')!r}, not a number above 0")
        if problem := _problem(cell):
            raise Mistake(f"{where}: {problem}")
        cells[tpt["q"]] = cell
    for q in tests.keys() - cells.keys():
        raise Mistake(f"{path.name}: a hidden test for {q}, which is no question here")
    found = kinds.results(notebook.cells)
    questions = {
        q: Question(
            q, c.metadata.tpt.points, c.id, c.source, tuple(tests.get(q, ())), found.get(q, "")
        )
        for q, c in cells.items()
    }
    return Master(path.stem, notebook, questions, hashlib.sha256(content).hexdigest()[:12])


def _markers(cell: NotebookNode) -> str:
    """The markers of solutions in a cell of code, in order: ``BE`` is one solution."""
    lines = cell.source.split("\n") if cell.cell_type == "code" else []
    marks = ["B" if BEGIN.match(x) else "E" for x in lines if BEGIN.match(x) or END.match(x)]
    return "".join(marks)


def _problem(cell: NotebookNode) -> str:
    """What is wrong with the cell of an exercise, or nothing."""
    q, letter = cell.metadata.tpt.q, kinds.kind(cell.metadata.tpt.q)
    if letter in kinds.WRITTEN:
        points = sum(number for number, _ in kinds.rubric(cell.source))
        if cell.cell_type != "markdown" or points != cell.metadata.tpt.points:
            return f"{q} is answered in a cell of text, whose rubric '- (1) ...' has all the points"
        return ""
    markers = _markers(cell)
    if not markers or markers != "BE" * (len(markers) // 2):
        return "# BEGIN SOLUTION and # END SOLUTION must come in pairs"
    if letter == "B" and "# BUG" not in cell.source:
        return f"{q} has no '# BUG' between # BEGIN SOLUTION and # END SOLUTION"
    try:
        return "" if letter != "P" or kinds.options(cell.source) else f"{q} has no options"
    except ValueError as error:
        return f"{q}: {error}"


def load_masters(folder: Path) -> dict[str, Master]:
    """The masters in a folder that have exercises, by name."""
    masters = {p.stem: load_master(p) for p in sorted(folder.glob("[0-9][0-9]_*.ipynb"))}
    masters = {name: master for name, master in masters.items() if master.questions}
    if not masters:
        raise Mistake(f"{folder} has no notebook with exercises (NN_name.ipynb)")
    return masters


def version(master: Master, kind: str) -> NotebookNode:
    """What is given out; hidden tests are in none.

    Args:
        kind: ``student`` (stubs in place of solutions, no outputs of exercises) or ``solution``
            (solutions with their outputs, no markers).
    Links lead where they should from ``notebooks/student``.
    """
    notebook = nbformat.from_dict(json.loads(json.dumps(master.notebook)))
    notebook.metadata["tpt"] = {"notebook": master.name, "version": master.hash, "copy": kind}
    cells = []
    for cell in notebook.cells:
        tpt = cell.metadata.get("tpt", {})
        tags = cell.metadata.get("tags", [])
        if tpt.get("hidden"):
            continue
        if cell.cell_type == "markdown":
            cell.source = LINK.sub(r"\1../\2", WITH_SOLUTIONS.sub("", cell.source))
        if kind == "student":
            if "solution" in tags:  # prose that only makes sense beside the solution
                continue
            if cell.cell_type == "code" and ("q" in tpt or "gives-away" in tags):
                cell.outputs, cell.execution_count = [], None
                if "nbval-check-output" in tags:
                    cell.metadata.tags = [tag for tag in tags if tag != "nbval-check-output"]
        if "q" in tpt:
            question = master.questions[tpt["q"]]
            cell.source = question.stub if kind == "student" else question.solution
        cells.append(cell)
    notebook.cells = cells
    for count, cell in enumerate((c for c in cells if c.get("execution_count")), 1):
        for part in (cell, *(o for o in cell.outputs if "execution_count" in o)):
            part.execution_count = count  # no gaps where something was left out
    return notebook


def release(
    masters: dict[str, Master],
    out: Path,
    versions: Sequence[str] = ("student", "solution"),
    compare: bool = False,
) -> list[str]:
    """Write versions of each master to ``out/student`` and ``out/solution``.

    Args:
        compare: write nothing; say what differs from what would be written.
    Returns:
        The files, or with ``compare`` those that differ or should not be there.
    """
    wanted = {
        f"{kind}/{name}.ipynb": nbformat.writes(version(master, kind)) + "\n"
        for kind in versions
        for name, master in masters.items()
    }
    there = {
        path.relative_to(out).as_posix()
        for kind in versions
        for path in (out / kind).glob("[0-9][0-9]_*.ipynb")
    }
    if not compare:
        for name, text in wanted.items():
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            (out / name).write_text(text, encoding="utf-8")
        return list(wanted)
    changed = [
        name
        for name, text in wanted.items()
        if name not in there or (out / name).read_text(encoding="utf-8") != text
    ]
    return changed + sorted(there - wanted.keys())
