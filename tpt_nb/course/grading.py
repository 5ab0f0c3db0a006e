"""Grading: answers run in the sandbox, what they gave is compared outside of it."""

import concurrent.futures
import hashlib
import json
import re
import secrets
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tpt_nb.core.files import write_whole
from tpt_nb.core.paths import DATA
from tpt_nb.course import kinds, sandbox
from tpt_nb.course.cells import parse
from tpt_nb.course.execution import (
    FATAL,
    PACKAGE,
    Options,
    Reference,
    execute,
    graft,
    run_reference,
    test_cells,
)
from tpt_nb.course.masters import Master, Question
from tpt_nb.course.submissions import (
    Submission,
    find_answer,
    find_submissions,
    find_text,
    harmless,
    is_late,
)
from tpt_nb.course.values import MISSING, differs

WAITS = "waits"  # the status of an answer that a person has to grade


@dataclass
class Row:
    """A question of a student, graded."""

    student: str
    notebook: str
    question: str
    points: float
    max: float
    status: str  # passed, partial, failed, error, blank, missing, duplicate, late, WAITS, FATAL ...
    reason: str


def score(question: Question, runs: list[dict], reference: Reference) -> Row:
    """Points for a question from what its cells reported, in a run that nothing ended early."""
    by_cell = {run["cell"]: run for run in runs}
    passed, total, reasons = 0, 0, []
    failed = [
        by_cell[cell]
        for cell in (question.cell, *test_cells(question))
        if cell in by_cell and by_cell[cell]["outcome"] != "passed"
    ]
    for cell in test_cells(question):
        expected = reference.values[cell]
        got = by_cell.get(cell, {}).get("values")
        got = got if isinstance(got, list) else []
        total += len(expected)
        if len(got) > len(expected):  # guesses
            reasons.append(f"{len(got)} values for {len(expected)} tests")
            continue
        for i, value in enumerate(expected):
            problem = differs(got[i] if i < len(got) else None, value)
            passed += not problem
            if problem and not (failed and problem == MISSING):
                reasons.append(f"{value['what']}: {problem}")
    points = round(question.points * passed / total, 2)
    status = "passed" if passed == total else "partial" if passed else "failed"
    if failed and passed < total:
        detail = str(failed[0]["detail"])
        reasons.insert(0, detail)
        if not passed:
            untouched = detail == f"NotImplementedError: exercise {question.id}"
            status = "blank" if untouched else "error"
    reason = clean("; ".join(dict.fromkeys(reasons)))
    return Row("", "", question.id, points, question.points, status, reason)


def clean(text: str) -> str:
    """Text without control characters and colours of a terminal, on one line."""
    text = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", text)
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())[:500]


def grade_one(
    submission: Submission, master: Master, reference: Reference, seed: int, options: Options
) -> list[Row]:
    """Grade one submission of one notebook. What it does, it does to itself alone."""
    rows: dict[str, Row] = {}

    def settle(q: str, status: str, reason: str) -> None:
        rows[q] = Row("", "", q, 0, master.questions[q].points, status, clean(reason))

    active: dict[str, str] = {}
    for q in master.questions:
        if submission.problem:
            settle(q, "unreadable", submission.problem)
            continue
        if not master.questions[q].is_run:
            rows[q] = read(master, q, submission)
            continue
        answer = find_answer(master, q, submission.cells)
        if answer.status:
            settle(q, answer.status, answer.reason)
        else:
            active[q] = answer.source
    deadline = time.monotonic() + options.limits.seconds
    while active:
        left = deadline - time.monotonic()
        if left < 5:
            for q in active:
                settle(q, "time-out", f"no time left of {options.limits.seconds:g} s")
            break
        notebook = graft(master, active, reference.level)
        runs, ended = execute(notebook, seed, options.within(left))
        last = runs[-1] if runs else {"outcome": "died", "detail": "nothing ran"}
        if not ended and last["outcome"] not in FATAL:
            for q in active:
                rows[q] = score(master.questions[q], runs, reference)
            break
        guilty = _guilty(master, active, runs)
        if ended:
            settle(guilty, "time-out" if "finished" in ended else "died", ended)
        else:
            settle(guilty, str(last["outcome"]), str(last["detail"]))
        del active[guilty]
    return [_named(rows[q], submission, master) for q in master.questions]


def read(master: Master, q: str, submission: Submission) -> Row:
    """Grade what is read and not run: a prediction; or a text, which waits for a person."""
    question = master.questions[q]
    if question.rubric:
        answer = find_text(question, submission.texts)
        status, reason = answer.status or WAITS, answer.reason or "for a person, with the rubric"
    else:
        answer = find_answer(master, q, submission.cells)
        status, reason = answer.status, answer.reason
    if not (status or question.rubric):
        status, reason = kinds.verdict(
            kinds.guessed(parse(answer.source)),
            is_late(question, submission.cells),
            kinds.options(question.source),
            question.result,
        )
    points = question.points if status == "passed" else 0
    return Row("", "", q, points, question.points, status, clean(reason))


def _named(row: Row, submission: Submission, master: Master) -> Row:
    row.student, row.notebook = submission.student, master.name
    return row


def _guilty(master: Master, active: dict[str, str], runs: list[dict]) -> str:
    """The question whose answer ended a run: that of the last cell, or of the last answer."""
    questions = [master.questions[q] for q in active]
    owner = {cell: q.id for q in questions for cell in (q.cell, *test_cells(q))}
    ended = [owner[run["cell"]] for run in runs if run["cell"] in owner]
    return ended[-1] if ended else next(iter(active))


# --- a folder of submissions ---------------------------------------------------------------------


def grade(
    folder: Path,
    masters: dict[str, Master],
    options: Options,
    jobs: int = 1,
    cache: Path | None = None,
    say=print,
) -> tuple[list[Row], dict[tuple[str, str], Submission]]:
    """Grade a folder of submissions.

    Args:
        folder: see ``find_submissions``.
        jobs: how many at a time.
        cache: folder of earlier grades; an unchanged submission of an unchanged master is not run
            again. None: run all.
        say: what to call with a line on progress, and on what was skipped.
    """
    submissions, skipped = find_submissions(folder, masters)
    for line in skipped:
        say(f"skipped: {line}")
    seed = secrets.randbelow(2**31)
    todo: list[tuple[Submission, Master, Path | None]] = []
    rows: list[Row] = []
    for one in submissions:
        if not one.master:
            status = "missing" if one.path.is_dir() else "unreadable"
            rows.append(Row(one.student, harmless(one.path.name), "", 0, 0, status, one.problem))
            continue
        master = masters[one.master]
        key = cache / f"{_key(one, master, options)}.json" if cache else None
        known = _load_rows(key)
        rows += [_named(row, one, master) for row in known]
        if not known:
            todo.append((one, master, key))
    before = sum(bool(one.master) for one in submissions) - len(todo)
    say(f"{len(submissions)} submissions, {before} graded before")
    with concurrent.futures.ThreadPoolExecutor(max(1, jobs)) as pool:
        names = sorted({master.name for _, master, _ in todo})
        ran = pool.map(lambda name: run_reference(masters[name], seed, options), names)
        reference = dict(zip(names, ran, strict=True))
        futures = {
            pool.submit(grade_one, one, master, reference[master.name], seed, options): (one, key)
            for one, master, key in todo
        }
        for future in concurrent.futures.as_completed(futures):
            one, key = futures[future]
            new = future.result()
            rows += new
            if key:
                key.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                write_whole(key, json.dumps([asdict(row) for row in new]))
            points, best = sum(r.points for r in new), sum(r.max for r in new)
            say(f"  {one.student}, {one.master}: {points:g} of {best:g}")
    handed_in = {(one.student, one.master): one for one in submissions}
    rows += _not_handed_in(handed_in, masters)
    return sorted(rows, key=lambda r: (r.student, r.notebook, r.question)), handed_in


def _not_handed_in(handed_in: dict, masters: dict[str, Master]) -> Iterator[Row]:
    """Rows for the notebooks that others handed in and this student did not."""
    students = sorted({student for student, _ in handed_in})
    for name in {name for _, name in handed_in if name}:
        for student in students:
            if (student, name) not in handed_in:
                for q, question in masters[name].questions.items():
                    reason = "no notebook was handed in"
                    yield Row(student, name, q, 0, question.points, "missing", reason)


def _key(submission: Submission, master: Master, options: Options) -> str:
    """What a grade depends on: the answers, the master, the code and the limits."""
    code = [path.read_bytes() for path in sorted(PACKAGE.rglob("*.py"))]
    given = [submission.cells, submission.texts, submission.problem, asdict(options)]
    parts = [json.dumps(given), master.hash]
    parts += [sys.version, hashlib.sha256(b"\0".join(code)).hexdigest()]
    return hashlib.sha256("\0".join(parts).encode(errors="replace")).hexdigest()[:32]


def _load_rows(path: Path | None) -> list[Row]:
    try:
        return [Row(**row) for row in json.loads(path.read_text())] if path else []
    except (OSError, ValueError, TypeError):
        return []


def exposed(folders: Sequence[Path]) -> list[str]:
    """Those of these folders that answers could read: they lie in what the sandbox shows."""
    shown = [Path(path) for path in [*sandbox.python_paths(), PACKAGE, DATA]]
    places = [path.resolve() for path in folders]
    return [str(p) for p in places if any(p == s or s in p.parents for s in shown)]
