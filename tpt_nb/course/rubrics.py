"""Answers in words: a sheet with a line for each point of the rubric, filled in by a person.

``course grade`` writes ``grades_rubric.csv`` with the column ``points`` empty. Fill it in and
grade again: the points are added up and the sheet is kept. An answer that has changed since is
asked anew.
"""

import hashlib
from dataclasses import replace
from pathlib import Path

import pandas as pd

from tpt_nb.course.grading import WAITS, Row
from tpt_nb.course.masters import Master, Mistake
from tpt_nb.course.submissions import Submission, find_text

KEY = ["student", "notebook", "question", "answer", "item"]
COLUMNS = [*KEY, "max", "points"]


def sheet_of(out: Path) -> Path:
    """The sheet beside a table of grades."""
    return out.with_name(f"{out.stem}_rubric.csv")


def apply(
    out: Path,
    rows: list[Row],
    handed_in: dict[tuple[str, str], Submission],
    masters: dict[str, Master],
) -> list[Row]:
    """Rows with the points that a person gave; writes the sheet with what is still to be given.

    Raises:
        Mistake: points in the sheet are no number from 0 to the most that the item is worth.
    """
    sheet = sheet_of(out)
    given = _read(sheet)
    lines, graded = [], []
    for row in rows:
        if row.status != WAITS:
            graded.append(row)
            continue
        question = masters[row.notebook].questions[row.question]
        text = find_text(question, handed_in[row.student, row.notebook].texts).source
        answer = hashlib.sha256(text.encode(errors="replace")).hexdigest()[:8]
        keys = [
            (row.student, row.notebook, row.question, answer, item) for _, item in question.rubric
        ]
        points = [given.get(key) for key in keys]
        for key, (most, _), value in zip(keys, question.rubric, points, strict=True):
            if value is not None and not 0 <= value <= most:
                raise Mistake(f"{sheet}: {value:g} points of {most:g} for {key[0]}, {key[2]}")
            lines.append([*key, most, value])
        graded.append(row if None in points else _with_points(row, question.rubric, points))
    if lines:
        out.parent.mkdir(parents=True, exist_ok=True)
        pd.DataFrame(lines, columns=COLUMNS).to_csv(sheet, index=False)
    return graded


def _with_points(row: Row, rubric: list[tuple[float, str]], points: list[float]) -> Row:
    lost = [item for (most, item), value in zip(rubric, points, strict=True) if value < most]
    status = "passed" if not lost else "partial" if sum(points) else "failed"
    reason = f"not in full: {'; '.join(lost)}"[:500] if lost else ""
    return replace(row, points=sum(points), status=status, reason=reason)


def _read(sheet: Path) -> dict[tuple[str, ...], float]:
    """The points that were filled in: student, notebook, question, answer, item -> points."""
    if not sheet.is_file():
        return {}
    table = pd.read_csv(sheet, dtype=str, keep_default_na=False)
    if missing := [name for name in COLUMNS if name not in table]:
        raise Mistake(f"{sheet} lacks the columns {', '.join(missing)}; delete it to start anew")
    found = {}
    for line in table.to_dict("records"):
        if value := line["points"].strip():
            try:
                found[tuple(line[name] for name in KEY)] = float(value.replace(",", "."))
            except ValueError:
                where = f"{line['student']}, {line['question']}"
                raise Mistake(f"{sheet}: the points are {value!r} for {where}") from None
    return found
