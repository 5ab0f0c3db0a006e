"""Masters: notebooks with solutions, and the versions of them that are given out."""

import functools
import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path

import nbformat
from nbformat import NotebookNode

from tpt_nb.course.cells import defined, names_of

BEGIN = re.compile(r"^(\s*)# BEGIN SOLUTION\s*$")
END = re.compile(r"^\s*# END SOLUTION\s*$")


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

    @functools.cached_property
    def stub(self) -> str:
        """The cell as the student gets it."""
        return replace_solution(self.source, self.id)

    @functools.cached_property
    def solution(self) -> str:
        """The cell without the markers."""
        lines = self.source.split("\n")
        return "\n".join(line for line in lines if not (BEGIN.match(line) or END.match(line)))

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


def replace_solution(source: str, question: str) -> str:
    """The source of an exercise with every solution replaced by ``raise NotImplementedError``."""
    kept, inside = [], False
    for line in source.split("\n"):
        begin = BEGIN.match(line)
        if begin:
            inside = True
            kept.append(f"{begin[1]}# your code here")
            kept.append(f'{begin[1]}raise NotImplementedError("exercise {question}")')
        elif END.match(line):
            inside = False
        elif not inside:
            kept.append(line)
    return "\n".join(kept)


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
        markers = [
            "B" if BEGIN.match(line) else "E"
            for line in cell.source.split("\n")
            if BEGIN.match(line) or END.match(line)
        ]
        if cell.cell_type != "code" or "q" not in tpt:
            if markers:
                raise Mistake(f"{where}: a solution, but no metadata tpt: {{q, points}}")
            continue
        if tpt.get("hidden"):
            tests.setdefault(tpt["q"], []).append(cell.id)
            continue
        if not markers or "".join(markers) != "BE" * (len(markers) // 2):
            raise Mistake(f"{where}: # BEGIN SOLUTION and # END SOLUTION must come in pairs")
        if tpt["q"] in cells:
            raise Mistake(f"{where}: question {tpt['q']} is there twice")
        if not isinstance(tpt.get("points"), int | float) or tpt["points"] <= 0:
            raise Mistake(f"{where}: points are {tpt.get('points')!r}, not a number above 0")
        cells[tpt["q"]] = cell
    for q in tests.keys() - cells.keys():
        raise Mistake(f"{path.name}: a hidden test for {q}, which is no question here")
    questions = {
        q: Question(q, cell.metadata.tpt.points, cell.id, cell.source, tuple(tests.get(q, ())))
        for q, cell in cells.items()
    }
    return Master(path.stem, notebook, questions, hashlib.sha256(content).hexdigest()[:12])


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
    """
    notebook = nbformat.from_dict(json.loads(json.dumps(master.notebook)))
    notebook.metadata["tpt"] = {"notebook": master.name, "version": master.hash, "copy": kind}
    cells = []
    for cell in notebook.cells:
        tpt = cell.metadata.get("tpt", {})
        tags = cell.metadata.get("tags", [])
        if tpt.get("hidden"):
            continue
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
    return notebook


def release(masters: dict[str, Master], out: Path, compare: bool = False) -> list[str]:
    """Write both versions of each master to ``out/student`` and ``out/solution``.

    Args:
        compare: write nothing; say what differs from what would be written.
    Returns:
        The files, or with ``compare`` those that differ or should not be there.
    """
    wanted = {
        f"{kind}/{name}.ipynb": nbformat.writes(version(master, kind)) + "\n"
        for kind in ("student", "solution")
        for name, master in masters.items()
    }
    if not compare:
        for name, text in wanted.items():
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            (out / name).write_text(text, encoding="utf-8")
        return list(wanted)
    there = {p.relative_to(out).as_posix() for p in out.glob("*/[0-9][0-9]_*.ipynb")}
    changed = [
        name
        for name, text in wanted.items()
        if name not in there or (out / name).read_text(encoding="utf-8") != text
    ]
    return changed + sorted(there - wanted.keys())
