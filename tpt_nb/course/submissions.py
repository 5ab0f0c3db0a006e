"""Submissions, read as data, and the answers in them."""

import ast
import builtins
import json
import os
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import nbformat

from tpt_nb.course import kinds
from tpt_nb.course.cells import names_of, needed, own_statements, parse, pieces, without_checks
from tpt_nb.course.masters import Master, Mistake, Question

SIZE = 200_000_000  # bytes of a submission; nearly all are outputs, which are not needed
VALUES = 10_000_000  # commas in it: so many small values would fill the memory
SYSTEM = {"__MACOSX", "$RECYCLE.BIN", "System Volume Information", "lost+found", "@eaDir"}
SYSTEM |= {"Thumbs.db", "desktop.ini", "__pycache__"}


@dataclass(frozen=True)
class Submission:
    """A file that a student handed in, or a folder without one."""

    student: str
    path: Path
    master: str = ""  # name of the notebook that it answers
    cells: tuple[dict, ...] = field(default=(), repr=False)
    texts: tuple[dict, ...] = field(default=(), repr=False)  # its cells of text
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
        content = path.read_bytes()
        if content.count(b",") > VALUES:
            return unreadable(f"the file has more than {VALUES // 1_000_000} million values")
        notebook = json.loads(content, object_hook=lambda d: d | {"outputs": []})
        if notebook.get("nbformat") != 4:
            notebook = nbformat.convert(nbformat.from_dict(notebook), 4)
        cells, texts = [], []
        for cell in notebook["cells"]:
            source = cell.get("source", "")
            source = source if isinstance(source, str) else "".join(source)
            tpt = cell.get("metadata", {}).get("tpt", {})
            q = tpt.get("q") if isinstance(tpt.get("q"), str) else None
            kept = {"id": str(cell.get("id", "")), "q": q, "source": source}
            if cell.get("cell_type") == "code":
                cells.append(kept | {"count": cell.get("execution_count")})
            elif cell.get("cell_type") == "markdown":
                texts.append(kept)
        meta = notebook.get("metadata", {}).get("tpt", {}).get("notebook")
    except (ValueError, RecursionError):
        return unreadable("not a notebook: it is not JSON")
    except OSError as error:
        return unreadable(f"cannot be read: {error.strerror}")
    except Exception as error:  # whatever else a file can be
        return unreadable(f"not a notebook ({type(error).__name__})")
    name = meta if isinstance(meta, str) and meta in masters else _by_cells(cells, masters) or guess
    if not name:
        return unreadable(f"answers none of the notebooks {', '.join(masters)}")
    return Submission(student, path, name, tuple(cells), tuple(texts))


def _by_file_name(path: Path, masters: dict[str, Master]) -> str:
    found = [name for name in masters if name in path.stem]
    return next(iter(found or (list(masters) if len(masters) == 1 else [])), "")


def _by_cells(cells: list[dict], masters: dict[str, Master]) -> str:
    """The master that shares most questions and cell ids with a submission, if any."""

    def shared(master: Master) -> int:
        ids = {q.cell for q in master.questions.values()}
        return sum((c["q"] in master.questions) + (c["id"] in ids) for c in cells)

    best = max(masters.values(), key=shared)
    return best.name if shared(best) else ""


# --- a folder of them ----------------------------------------------------------------------------


def find_submissions(
    folder: Path, masters: dict[str, Master]
) -> tuple[list[Submission], list[str]]:
    """``FOLDER/STUDENT.ipynb`` and ``FOLDER/STUDENT/**/*.ipynb``, and a line for what was skipped.

    Of two for one notebook the later counts, and one that can be read before one that cannot.

    Raises:
        Mistake: there is no such folder, or nothing in it that could be a submission.
    """
    if not folder.is_dir():
        raise Mistake(f"there is no folder {folder}")
    labels: dict[str, str] = {}  # name -> name without anything odd
    found: dict[tuple[str, str], Submission] = {}
    skipped, empty = [], {}
    for name, place, paths in _students(folder, masters, skipped):
        student = labels.setdefault(name, _label(name, {*labels.values()}))
        read = [read_submission(student, path, masters) for path in paths]
        read.sort(key=lambda one: (not one.problem, one.path.lstat().st_mtime, str(one.path)))
        for one in read:
            found[student, one.master] = _better(found.get((student, one.master)), one, skipped)
        if not read:
            empty[student] = place
    for student, place in empty.items():
        if student not in {known for known, _ in found}:
            problem = "no notebook was handed in"
            found[student, ""] = Submission(student, place, problem=problem)
    if not found:
        raise Mistake(f"{folder} has no notebooks: STUDENT.ipynb or STUDENT/NAME.ipynb")
    return list(found.values()), [harmless(line) for line in skipped]


def _better(old: Submission | None, new: Submission, skipped: list[str]) -> Submission:
    """The one of two that counts; the other is skipped."""
    if old is None:
        return new
    rank = [(not one.problem, one.path.lstat().st_mtime) for one in (old, new)]
    best, other = (old, new) if rank[0] > rank[1] else (new, old)
    what = other.problem or f"an earlier file for {other.master}"
    skipped.append(f"{other.path}: {what}; {best.path.name} counts")
    return best


def _students(
    folder: Path, masters: dict[str, Master], skipped: list[str]
) -> Iterator[tuple[str, Path, list[Path]]]:
    """Name of a student, its file or folder, and what may be notebooks."""
    for entry in sorted(folder.iterdir()):
        name = unicodedata.normalize("NFC", entry.name)
        if _is_system(name):
            skipped.append(f"{entry}: {_kind(entry)}")
        elif entry.is_dir() and not entry.is_symlink():
            yield name, entry, list(_notebooks(entry, skipped))
        elif entry.suffix.lower() == ".ipynb":
            yield _without_notebook(Path(name).stem, masters), entry, [entry]
        elif entry.suffix.lower() == ".zip":
            skipped.append(f"{entry}: {_kind(entry)}")
            yield _without_notebook(Path(name).stem, masters), entry, []
        else:
            skipped.append(f"{entry}: {_kind(entry)}")


def _notebooks(folder: Path, skipped: list[str]) -> Iterator[Path]:
    """What may be notebooks in a student's folder, at any depth."""

    def closed(error: OSError) -> None:
        skipped.append(f"{error.filename}: {error.strerror}")

    for place, folders, files in os.walk(folder, onerror=closed):
        for name in [name for name in folders if _is_system(name)]:
            folders.remove(name)
        for name in sorted(files):
            path = Path(place, name)
            if path.suffix.lower() == ".ipynb" and not _is_system(name):
                yield path
            else:
                skipped.append(f"{path}: {_kind(path)}")


def _is_system(name: str) -> bool:
    return name.startswith(".") or name in SYSTEM


def _kind(path: Path) -> str:
    """Why something is no submission."""
    if _is_system(path.name):
        return "a hidden or system file"
    return "an archive; unpack it" if path.suffix.lower() == ".zip" else "not a notebook"


def _without_notebook(stem: str, masters: dict[str, Master]) -> str:
    """``grace_02_baseline`` and ``grace_03_patches`` are files of grace."""
    for name in masters:
        if name in stem:
            return stem.replace(name, "").strip("_- ") or stem
    return stem


def _label(name: str, taken: set[str]) -> str:
    """A name without what spreadsheets would take for a formula, or a page for markup."""

    def fine(c: str) -> bool:
        return c.isalnum() or c in "_.@ +-" or unicodedata.category(c).startswith("M")

    label = re.sub(r"^[=+@-]", "_", "".join(c if fine(c) else "_" for c in name))
    label = label.encode()[:200].decode(errors="ignore")  # it becomes the name of a file
    while label in taken:
        label += "_"
    return label


def harmless(text: str) -> str:
    """Text that can be printed: names of files may be anything but UTF-8."""
    return text.encode(errors="backslashreplace").decode()


# --- answers -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    """What a submission has for a question: a source, or the reason why there is none."""

    source: str = ""
    status: str = ""
    reason: str = ""


def find_answer(master: Master, q: str, cells: Sequence[dict]) -> Answer:
    """Find the answer by question or cell id, else by the name of the function.

    Cells that define what is asked for count: a scratch pad beside them does not.
    """
    question = master.questions[q]
    marked = [c for c in cells if c["q"] == q or (c["id"] == question.cell and c["q"] is None)]
    marked = marked or [c for c in cells if kinds.calls(c["source"], "predict", q)]
    defining = [c for c in cells if question.names <= names_of(c["source"]).may_bind]
    groups = [[c for c in defining if c in marked], defining if question.names else [], marked]
    if not any(groups):
        return Answer(status="missing", reason="the cell is not there")
    blank = _definitions(question.stub, question)
    for group in groups:
        answers: dict[str, dict] = {}
        for cell in group:
            answers.setdefault(_definitions(cell["source"], question), cell)
        finished = {key: c for key, c in answers.items() if key not in ("", blank)}
        answers = {key: c for key, c in finished.items() if not _is_open(key, q)} or finished
        if len(answers) > 1:
            reason = f"{len(answers)} different cells answer this question"
            return Answer(status="duplicate", reason=reason)
        for cell in answers.values():
            return Answer(
                source="\n".join([*_helpers(master, question, cell, cells), cell["source"]])
            )
    return Answer(status="blank", reason="not answered")


def find_text(question: Question, texts: Sequence[dict]) -> Answer:
    """What was written in answer to a question: in its cell, or in one that names it."""
    head = kinds.ANSWER.format(question.id)
    named = [c for c in texts if c["source"].lstrip().startswith(head)]
    own = [c for c in texts if c["q"] == question.id or c["id"] == question.cell]
    if not (own or named):
        return Answer(status="missing", reason="the cell is not there")
    written = [
        c["source"].replace(head, "").replace(kinds.WRITE_HERE, "").strip() for c in own or named
    ]
    text = "\n\n".join(filter(None, dict.fromkeys(written)))
    return Answer(text) if text else Answer(status="blank", reason="not answered")


def is_late(question: Question, cells: Sequence[dict]) -> bool:
    """Was a prediction run after the cell with its result? The counts of the last runs say it."""
    counts = {True: [], False: []}
    for cell in cells:
        for is_result, call in ((True, "reveal"), (False, "predict")):
            is_run = type(cell["count"]) is int
            if is_run and kinds.calls(cell["source"], call, question.id):
                counts[is_result].append(cell["count"])
    return bool(counts[True] and counts[False]) and max(counts[False]) > max(counts[True])


def _is_open(code: str, q: str) -> bool:
    """Does it still hold the stub's exception?"""
    return f"raise NotImplementedError('exercise {q}')" in code


def _definitions(source: str, question: Question) -> str:
    """What defines the names that are asked for, without comments and layout; the text of a cell
    that has no tree or defines none of them."""
    if parse(source) is None:
        return source.strip()
    own = [node for node, _, is_own in own_statements(source, question.checks) if is_own]
    texts = [ast.unparse(node) for node in own]
    asked = {i for i, text in enumerate(texts) if question.names & names_of(text).may_bind}
    return "\n".join(texts[i] for i in needed(texts, asked or {*range(len(texts))}))


def _helpers(master: Master, question: Question, answer: dict, cells: Sequence[dict]) -> list[str]:
    """Statements of other cells that the answer needs and that the master does not have."""
    known = {*master.names, *dir(builtins), "get_ipython"}
    source = without_checks(answer["source"], question.checks)
    if names_of(source).needs <= known:
        return []
    others = []
    for piece in (piece for c in cells if c is not answer for piece in pieces(c["source"])):
        names = names_of(piece)
        touched = names.may_bind | names.changes
        if touched and not touched & known:
            others.append(piece)
    chosen = needed([*others, source], {len(others)})[:-1]
    return [others[i] for i in chosen]
