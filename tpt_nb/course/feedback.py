"""What a grading leaves: tables of questions and of students, and a page for each student."""

import html
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import pandas as pd

from tpt_nb.course.grading import WAITS, Row
from tpt_nb.course.masters import Master
from tpt_nb.course.submissions import Submission, find_answer, find_text

HandedIn = dict[tuple[str, str], Submission]
PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<meta name="color-scheme" content="light dark">
<title>Feedback: {student}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 50em; padding: 0 1em }}
section {{ border-left: 4px solid #d55e00; margin: 1em 0; padding: 0 1em }}
section.passed {{ border-color: #0072b2 }}
pre {{ overflow-x: auto; white-space: pre-wrap; padding: .5em; border: 1px solid #8888 }}
small {{ font-weight: normal }}
</style>
<h1>{student}: {points:g} of {max:g} points</h1>
{body}
</html>
"""
SECTION = """<section class="{status}">
<h2>{name} <small>{points:g} of {max:g} · {status}</small></h2>
<p>{reason}</p>{code}</section>"""


def totals(rows: Sequence[Row]) -> pd.DataFrame:
    """Points of each student over all notebooks: student, points, max, percent.

    Answers that wait for a person do not count yet.
    """
    table = pd.DataFrame(
        [asdict(row) | ({"max": 0} if row.status == WAITS else {}) for row in rows]
    )
    sums = table.astype({"points": float, "max": float}).groupby("student")[["points", "max"]].sum()
    sums["percent"] = (100 * sums["points"] / sums["max"]).fillna(0).round(1)
    return sums.round(2).reset_index()


def page(student: str, rows: Sequence[Row], handed_in: HandedIn, masters: dict[str, Master]) -> str:
    """A page for a student: points, reasons, and the answers that were graded."""
    parts = []
    for row in rows:
        submission, code = handed_in.get((student, row.notebook)), ""
        if row.notebook in masters and submission and not submission.problem:
            source = _answer(masters[row.notebook], row.question, submission)
            code = f"<pre>{html.escape(source[:20_000])}</pre>" if source else ""
        name, reason = html.escape(row.question or row.notebook), html.escape(row.reason)
        parts.append(SECTION.format_map(asdict(row) | dict(name=name, reason=reason, code=code)))
    total = totals(rows).iloc[0].to_dict() | {"student": html.escape(student)}
    return PAGE.format_map(total | {"body": "\n".join(parts)})


def _answer(master: Master, q: str, submission: Submission) -> str:
    """What was graded; below an answer in words what there are points for."""
    question = master.questions[q]
    if not question.rubric:
        return find_answer(master, q, submission.cells).source
    text = find_text(question, submission.texts).source
    items = [f"({points:g}) {item}" for points, item in question.rubric]
    return "\n".join([text, "", "Points are for:", *items]) if text else ""


def write_grades(
    out: Path, rows: list[Row], handed_in: HandedIn, masters: dict[str, Master]
) -> tuple[Path, Path]:
    """Write the CSV of the questions, ``*_totals.csv`` and ``*_feedback/STUDENT.html``."""
    out.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame([asdict(row) for row in rows]).to_csv(out, index=False)
    sums = out.with_name(f"{out.stem}_totals.csv")
    totals(rows).to_csv(sums, index=False)
    pages = out.with_name(f"{out.stem}_feedback")
    pages.mkdir(exist_ok=True)
    for student in {row.student for row in rows}:
        own = [row for row in rows if row.student == student]
        text = page(student, own, handed_in, masters)
        (pages / f"{student}.html").write_text(text, encoding="utf-8")
    return sums, pages
