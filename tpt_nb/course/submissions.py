"""Submissions, read as data, and the answers in them."""

import ast
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import nbformat

from tpt_nb.course.grafts import without_checks
from tpt_nb.course.masters import Master, Mistake, Question, defined_functions, parse

SIZE = 20_000_000  # bytes of a submission


@dataclass(frozen=True)
class Submission:
    """A file that a student handed in."""

    student: str
    path: Path
    master: str = ""  # name of the notebook that it answers
    cells: tuple[dict, ...] = field(default=(), repr=False)
    problem: str = ""  # why it cannot be read


def read_submission(student: str, path: Path, masters: dict[str, Master]) -> Submission:
    """Read a file as data. Never raises: what is wrong with it is in ``problem``."""
    guess = _by_file_name(path, masters)

    def unreadable(why: str) -> Submission:
        return Submission(student, path, guess, problem=why)

    try:
        if path.is_symlink() or not path.is_file():
            return unreadable("not a plain file")
        if path.stat().st_size > SIZE:
            return unreadable(f"the file has more than {SIZE // 1_000_000} MB")
        notebook = json.loads(path.read_bytes())
        if notebook.get("nbformat") != 4:
            notebook = nbformat.convert(nbformat.from_dict(notebook), 4)
        cells = []
        for cell in notebook["cells"]:
            source = cell.get("source", "")
            source = source if isinstance(source, str) else "".join(source)
            tpt = cell.get("metadata", {}).get("tpt", {})
            if cell.get("cell_type") == "code":
                q = tpt.get("q") if isinstance(tpt.get("q"), str) else None
                cells.append({"id": str(cell.get("id", "")), "q": q, "source": source})
        meta = notebook.get("metadata", {}).get("tpt", {}).get("notebook")
    except (ValueError, RecursionError):
        return unreadable("not a notebook: it is not JSON")
    except Exception as error:  # whatever else a file can be
        return unreadable(f"not a notebook ({type(error).__name__})")
    name = meta if isinstance(meta, str) and meta in masters else _by_cells(cells, masters) or guess
    if not name:
        return unreadable(f"answers none of the notebooks {', '.join(masters)}")
    return Submission(student, path, name, tuple(cells))


def _by_file_name(path: Path, masters: dict[str, Master]) -> str:
    found = [name for name in masters if name in path.stem] or (
        list(masters) if len(masters) == 1 else []
    )
    return found[0] if found else ""


def _by_cells(cells: list[dict], masters: dict[str, Master]) -> str:
    """The master that shares most questions and cell ids with a submission, if any."""

    def shared(master: Master) -> int:
        ids = {q.cell for q in master.questions.values()}
        return sum((c["q"] in master.questions) + (c["id"] in ids) for c in cells)

    best = max(masters.values(), key=shared)
    return best.name if shared(best) else ""


def find_submissions(folder: Path, masters: dict[str, Master]) -> list[Submission]:
    """``FOLDER/STUDENT.ipynb``, ``FOLDER/STUDENT/*.ipynb``; of two for one notebook the later."""
    if not folder.is_dir():
        raise Mistake(f"there is no folder {folder}")
    found: dict[tuple[str, str], Submission] = {}
    names: set[str] = set()
    for entry in sorted(folder.iterdir()):
        if entry.name.startswith("."):
            continue
        if entry.is_dir() and not entry.is_symlink():
            student, paths = entry.name, sorted(entry.glob("*.ipynb"))
        elif entry.suffix == ".ipynb":
            student, paths = entry.stem, [entry]
            for name in masters:
                if name in student:
                    student = student.replace(name, "").strip("_- ") or entry.stem
        else:
            continue
        # what spreadsheets would take for a formula, or a page for markup
        student = re.sub(r"[^\w.@ +-]|^[=+@-]", "_", student)
        while student in names:
            student += "_"
        names.add(student)
        for path in sorted(paths, key=lambda p: p.lstat().st_mtime):
            one = read_submission(student, path, masters)
            found[student, one.master] = one
    if not found:
        raise Mistake(f"{folder} has no notebooks: STUDENT.ipynb or STUDENT/NAME.ipynb")
    return list(found.values())


@dataclass(frozen=True)
class Answer:
    """What a submission has for a question: a source, or the reason why there is none."""

    source: str = ""
    status: str = ""
    reason: str = ""


def find_answer(question: Question, cells: Sequence[dict]) -> Answer:
    """Find the answer by question or cell id, else by the name of the function."""
    given = [
        c
        for c in cells
        if c["q"] == question.id or (c["id"] == question.cell and c["q"] in (None, question.id))
    ]
    if not given and question.names:
        given = [c for c in cells if question.names <= defined_functions(c["source"])]
    if not given:
        return Answer(status="missing", reason="the cell is not there")
    blank = _normal(question.stub, question.checks)
    sources = {_normal(c["source"], question.checks): c["source"] for c in given}
    sources.pop("", None)
    answers = {key: source for key, source in sources.items() if key != blank}
    if len(answers) > 1:
        reason = f"{len(answers)} different cells answer this question"
        return Answer(status="duplicate", reason=reason)
    if not answers:
        return Answer(status="blank", reason="not answered")
    return Answer(source=next(iter(answers.values())))


def _normal(source: str, checks: str) -> str:
    """Code without comments, layout and the visible checks; the text itself if it has no tree."""
    tree = parse(without_checks(source, checks))
    return ast.unparse(tree) if tree else source.strip()
