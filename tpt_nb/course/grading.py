"""Grading: answers run in the sandbox, what they gave is compared outside of it."""

import base64
import concurrent.futures
import csv
import hashlib
import html
import json
import os
import re
import secrets
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import nbformat
import numpy as np
from nbformat import NotebookNode

from tpt_nb.core.paths import DATA, REPO
from tpt_nb.course import sandbox
from tpt_nb.course.grafts import graft, test_cells
from tpt_nb.course.masters import Master, Mistake, Question
from tpt_nb.course.submissions import Submission, find_answer, find_submissions
from tpt_nb.lessons import check

PACKAGE = Path(check.__file__).resolve().parent
OUTCOMES = ("passed", "skipped", "error", "time-out", "died", "flood")
MISSING = "no value"
FATAL = ("time-out", "died", "flood")  # ends of a cell after which there is no kernel


@dataclass(frozen=True)
class Options:
    """How answers are run."""

    way: str
    cell_seconds: float = 20
    limits: sandbox.Limits = field(default_factory=sandbox.Limits)


def execute(notebook: NotebookNode, seed: int, options: Options) -> tuple[list[dict], str]:
    """Run a grafted notebook with nbval in the sandbox.

    Returns:
        What was reported of each cell that was started, in order, and why the run had to be ended
        ("" if it had not). Data from a hostile place: only its form is checked here.
    """
    threads = ("OMP", "MKL", "OPENBLAS", "NUMEXPR")
    outcome = sandbox.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=no", "--color=no"]
        + [
            "-p",
            "nbval.plugin",
            "-p",
            "tpt_nb.course.nbval_report",
            "--nbval-lax",
            "--nbval-current-env",
        ]
        + [f"--nbval-cell-timeout={options.cell_seconds}", "--nbval-kernel-startup-timeout=120"]
        + ["answers.ipynb"],
        files={"answers.ipynb": nbformat.writes(notebook).encode(), "pytest.ini": b"[pytest]\n"},
        readable=[PACKAGE, DATA],
        env={
            "PYTHONPATH": str(REPO),
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONHASHSEED": "0",
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
            "TPT_NB_HEADLESS": "1",
            "TPT_NB_DATA": str(DATA),
            "TQDM_DISABLE": "1",
            check.SEED: str(seed),
            **{f"{name}_NUM_THREADS": "1" for name in threads},
        },
        limits=options.limits,
        way=options.way,
    )
    runs: list[dict] = []
    for line in outcome.report.split(b"\n"):
        try:
            event = json.loads(line)
            cell, kind = str(event["cell"]), event["event"]
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
        if kind == "start":
            runs.append({"cell": cell, "outcome": "died", "detail": "the run ended", "values": []})
        elif runs and runs[-1]["cell"] == cell and event.get("outcome") in OUTCOMES:
            runs[-1] |= {key: event.get(key) for key in ("outcome", "detail", "values")}
    if not runs and not outcome.ended:
        lines = outcome.log.strip().splitlines()
        return runs, f"nothing ran: {lines[-1][:300] if lines else f'code {outcome.code}'}"
    return runs, outcome.ended


@dataclass(frozen=True)
class Reference:
    """What the reference solutions handed over: test cell -> values; and how they were run."""

    values: dict[str, list[dict]]
    level: str = "statements"  # see grafts.graft


def run_reference(master: Master, seed: int, options: Options) -> Reference:
    """Run the reference solutions: first what seems to be needed, more of the master if it is not
    enough.

    Raises:
        Mistake: a solution fails or hands over nothing; says which.
    """
    solutions = {q: question.solution for q, question in master.questions.items()}
    for level in ("statements", "cells", "all"):
        runs, ended = execute(graft(master, solutions, level), seed, options)
        failed = [run for run in runs if run["outcome"] != "passed"]
        if not failed or ended or failed[-1]["outcome"] in FATAL:
            break
    if failed or ended:
        why = ended or "; ".join(f"cell {run['cell']}: {run['detail']}" for run in failed[:3])
        raise Mistake(f"{master.name}: the reference solutions do not run: {why}")
    values = {run["cell"]: run["values"] for run in runs}
    for question in master.questions.values():
        for cell in test_cells(question):
            where = f"{master.name}, {question.id}, cell {cell}"
            if not values.get(cell):
                raise Mistake(f"{where}: the test reports no value")
            for value in values[cell]:
                if differs(value, value):
                    raise Mistake(f"{where}: {value['what']!r} is not finite with the reference")
    return Reference(values, level)


# --- scoring --------------------------------------------------------------------------------------


@dataclass
class Row:
    """A question of a student, graded."""

    student: str
    notebook: str
    question: str
    points: float
    max: float
    status: str  # passed, partial, failed, error, blank, missing, duplicate, unreadable, FATAL ...
    reason: str


def differs(got: object, expected: dict) -> str:
    """How a value differs from the reference's, or nothing. ``got`` may be anything."""
    if not isinstance(got, dict) or got.get("what") != expected["what"]:
        return MISSING
    if "json" in expected:
        return "" if "json" in got and got["json"] == expected["json"] else "not what it should be"
    shape = expected["shape"]
    if "json" in got:
        return "not a number"
    if got.get("shape") != shape:
        return f"shape {got.get('shape')}, not {shape}"[:200]
    try:
        a = np.frombuffer(base64.b64decode(got["data"], validate=True), "<f8").reshape(shape)
    except (KeyError, TypeError, ValueError):
        return "not a number"
    b = np.frombuffer(base64.b64decode(expected["data"]), "<f8").reshape(shape)
    with np.errstate(invalid="ignore"):  # infinity minus infinity; NaN is no agreement
        worst, atol = float(np.abs(a - b).max(initial=0.0)), float(expected["atol"])
    if worst <= atol:
        return ""
    return f"the largest difference is {worst:.3g}, allowed is {atol:.3g}"


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
    reason = clean("; ".join(dict.fromkeys(reasons)))[:500]
    return Row("", "", question.id, points, question.points, status, reason)


def clean(text: str) -> str:
    """Text without control characters and colours of a terminal, on one line."""
    text = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", text)
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())


def grade_one(
    submission: Submission, master: Master, reference: Reference, seed: int, options: Options
) -> list[Row]:
    """Grade one submission of one notebook. What it does, it does to itself alone."""
    rows: dict[str, Row] = {}

    def settle(q: str, status: str, reason: str) -> None:
        rows[q] = Row("", "", q, 0, master.questions[q].points, status, clean(reason)[:500])

    active: dict[str, str] = {}
    for q, question in master.questions.items():
        if submission.problem:
            settle(q, "unreadable", submission.problem)
            continue
        answer = find_answer(question, submission.cells)
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
        limits = replace(options.limits, seconds=round(left, 1))
        notebook = graft(master, active, reference.level)
        runs, ended = execute(notebook, seed, replace(options, limits=limits))
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


def _named(row: Row, submission: Submission, master: Master) -> Row:
    row.student, row.notebook = submission.student, master.name
    return row


def _guilty(master: Master, active: dict[str, str], runs: list[dict]) -> str:
    """The question whose answer ended a run: that of the last cell, or of the last answer."""
    owner = {}
    for q in active:
        question = master.questions[q]
        owner |= dict.fromkeys([question.cell, *test_cells(question)], q)
    for run in reversed(runs):
        if run["cell"] in owner:
            return owner[run["cell"]]
    return next(iter(active))


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
        say: what to call with a line on progress.
    """
    submissions = find_submissions(folder, masters)
    seed = secrets.randbelow(2**31)
    todo: list[tuple[Submission, Master, Path | None]] = []
    rows: list[Row] = []
    for one in submissions:
        if not one.master:
            rows.append(Row(one.student, one.path.name, "", 0, 0, "unreadable", one.problem))
            continue
        master = masters[one.master]
        key = cache / f"{_key(one, master, options)}.json" if cache else None
        known = _load_rows(key)
        if known:
            rows += [_named(row, one, master) for row in known]
        else:
            todo.append((one, master, key))
    say(f"{len(submissions)} submissions, {len(submissions) - len(todo)} graded before")
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
            _save_rows(key, new)
            points, best = sum(r.points for r in new), sum(r.max for r in new)
            say(f"  {one.student}, {one.master}: {points:g} of {best:g}")
    handed_in = {(one.student, one.master): one for one in submissions}
    rows += _not_handed_in(handed_in, masters)
    return sorted(rows, key=lambda r: (r.student, r.notebook, r.question)), handed_in


def _not_handed_in(handed_in: dict, masters: dict[str, Master]) -> Iterator[Row]:
    """Rows for the notebooks that others handed in and this student did not."""
    students = {student for student, _ in handed_in}
    for name in {name for _, name in handed_in if name}:
        for student in sorted(students):
            if (student, name) not in handed_in:
                for q, question in masters[name].questions.items():
                    reason = "no notebook was handed in"
                    yield Row(student, name, q, 0, question.points, "missing", reason)


def _key(submission: Submission, master: Master, options: Options) -> str:
    """What a grade depends on: the answers, the master, the code and the limits."""
    code = [path.read_bytes() for path in sorted(PACKAGE.rglob("*.py"))]
    parts = [json.dumps([submission.cells, submission.problem, asdict(options)]), master.hash]
    parts += [sys.version, hashlib.sha256(b"\0".join(code)).hexdigest()]
    return hashlib.sha256("\0".join(parts).encode(errors="replace")).hexdigest()[:32]


def _load_rows(path: Path | None) -> list[Row]:
    try:
        return [Row(**row) for row in json.loads(path.read_text())] if path else []
    except (OSError, ValueError, TypeError):
        return []


def _save_rows(path: Path | None, rows: list[Row]) -> None:
    if path:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        temporary = path.with_suffix(f".{os.getpid()}")
        temporary.write_text(json.dumps([asdict(row) for row in rows]))
        os.replace(temporary, path)


def totals(rows: Sequence[Row]) -> list[dict]:
    """Points of each student over all notebooks."""
    table: dict[str, list[float]] = {}
    for row in rows:
        sums = table.setdefault(row.student, [0.0, 0.0])
        sums[0] += row.points
        sums[1] += row.max
    return [
        {
            "student": student,
            "points": round(points, 2),
            "max": round(best, 2),
            "percent": round(100 * points / best, 1) if best else 0.0,
        }
        for student, (points, best) in sorted(table.items())
    ]


def write_csv(path: Path, rows: Sequence[dict]) -> None:
    """Write rows with the same keys."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def feedback(student: str, rows: Sequence[Row], handed_in: dict, masters: dict[str, Master]) -> str:
    """A page for a student: points, reasons, and the answers that were graded."""
    total = totals(rows)[0]
    parts = []
    for row in rows:
        master = masters.get(row.notebook)
        submission = handed_in.get((student, row.notebook))
        source = ""
        if master and submission and not submission.problem:
            source = find_answer(master.questions[row.question], submission.cells).source
        code = f"<pre>{html.escape(source[:20_000])}</pre>" if source else ""
        parts.append(
            f'<section class="{row.status}"><h2>{html.escape(row.question or row.notebook)} '
            f"<small>{row.points:g} of {row.max:g} · {row.status}</small></h2>"
            f"<p>{html.escape(row.reason)}</p>{code}</section>"
        )
    return f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<meta name="color-scheme" content="light dark">
<title>Feedback: {html.escape(student)}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 50em; padding: 0 1em }}
section {{ border-left: 4px solid #d55e00; margin: 1em 0; padding: 0 1em }}
section.passed {{ border-color: #0072b2 }}
pre {{ overflow-x: auto; padding: .5em; border: 1px solid #8888 }}
small {{ font-weight: normal }}
</style>
<h1>{html.escape(student)}: {total["points"]:g} of {total["max"]:g} points</h1>
{chr(10).join(parts)}
</html>
"""


def write_grades(
    out: Path, rows: list[Row], handed_in: dict, masters: dict[str, Master]
) -> tuple[Path, Path]:
    """Write the CSV of the questions, ``*_totals.csv`` and ``*_feedback/STUDENT.html``."""
    write_csv(out, [asdict(row) for row in rows])
    sums = out.with_name(f"{out.stem}_totals.csv")
    write_csv(sums, totals(rows))
    pages = out.with_name(f"{out.stem}_feedback")
    pages.mkdir(exist_ok=True)
    for student in {row.student for row in rows}:
        own = [row for row in rows if row.student == student]
        page = feedback(student, own, handed_in, masters)
        (pages / f"{student}.html").write_text(page, encoding="utf-8")
    return sums, pages


def exposed(folders: Sequence[Path]) -> list[str]:
    """Those of these folders that answers could read: they lie in what the sandbox shows."""
    shown = [Path(path) for path in [*sandbox.python_paths(), PACKAGE, DATA]]
    places = [path.resolve() for path in folders]
    return [str(p) for p in places if any(p == s or s in p.parents for s in shown)]
