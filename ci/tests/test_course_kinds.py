"""Predictions, bugs, tables and open questions: what is given out, and how it is graded."""

import copy

import nbformat
import pandas as pd
import pytest
from IPython.core.interactiveshell import InteractiveShell
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from tpt_nb.course import execution, feedback, grading, kinds, masters, rubrics, submissions
from tpt_nb.lessons import check

PREDICT = """\
# BEGIN SOLUTION
guess = "B"
# END SOLUTION
check.predict("91.P", guess, {
    "A": "it rises",
    "B": "it falls",
})"""
BUG = '''\
def halves(x: list) -> list:
    """The numbers, halved."""
    out = []
    for value in x:
        # BEGIN SOLUTION
        out.append(value / 2)
        # BUG
        # out.append(value // 2)
        #
        # END SOLUTION
    return out


check.equal("even", halves([2, 4]), [1, 2])'''
TEXT = """\
<details><summary>Answer</summary>

It is the mean of three numbers.

- (1) says what is averaged
- (0.5) says of how many
- (2) doubts it

</details>"""


@pytest.fixture
def master(tmp_path):
    cells = [
        new_markdown_cell("# 91 · Kinds", id="title"),
        new_code_cell("from tpt_nb.lessons import check", id="setup"),
        new_code_cell(PREDICT, id="p", metadata={"tpt": {"q": "91.P", "points": 1}}),
        new_code_cell('check.reveal("91.P", "B", "by 3")', id="r"),
        new_code_cell(BUG, id="b", metadata={"tpt": {"q": "91.B", "points": 2}}),
        new_code_cell(
            'check.report("odd", halves([1, check.seed()]))',
            id="bt",
            metadata={"tpt": {"q": "91.B", "hidden": True}},
        ),
        new_markdown_cell(TEXT, id="t", metadata={"tpt": {"q": "91.T", "points": 3.5}}),
    ]
    cells[3].metadata["tags"] = ["gives-away"]
    told = "Result of 91.P: B (by 3)\nThat is what you predicted.\n"
    cells[3].outputs = [new_output("stream", name="stdout", text=told)]
    for count, cell in enumerate((c for c in cells if c.cell_type == "code"), 1):
        cell.execution_count = count
    nbformat.write(new_notebook(cells=cells), tmp_path / "91_kinds.ipynb")
    return masters.load_master(tmp_path / "91_kinds.ipynb")


def cell(notebook, ident):
    return next(c for c in notebook.cells if c.id == ident)


def handed_in(master, tmp_path, name="ada", **sources):
    """A submission: the student version with these sources, by cell."""
    made = masters.version(master, "student")
    for ident, source in sources.items():
        cell(made, ident).source = source
    return read(made, master, tmp_path, name)


def read(notebook, master, tmp_path, name="ada"):
    nbformat.write(notebook, tmp_path / f"{name}.ipynb")
    return submissions.read_submission(name, tmp_path / f"{name}.ipynb", {master.name: master})


def test_each_kind_has_its_stub(master):
    student = masters.version(master, "student")
    assert cell(student, "p").source.startswith("guess = ...  # your answer")
    assert cell(student, "p").source.endswith(PREDICT[PREDICT.index("check.") :])
    bug = cell(student, "b").source
    assert "        out.append(value // 2)\n" in bug and "value / 2" not in bug
    assert (
        bug.startswith('check.symptom("91.B")')
        and "BUG" not in bug
        and "SOLUTION" not in bug
        and "# out" not in bug
    )
    assert cell(student, "t").source == f"**Answer 91.T**\n\n{kinds.WRITE_HERE}"
    assert cell(student, "r").outputs == [] and "mean of three" not in nbformat.writes(student)
    solution = masters.version(master, "solution")
    assert 'guess = "B"\n' in cell(solution, "p").source
    assert "value / 2" in cell(solution, "b").source and "//" not in cell(solution, "b").source
    assert cell(solution, "t").source == TEXT


@pytest.mark.parametrize(
    ("ident", "old", "new", "message"),
    [
        ("p", "check.predict(", "print(", "no check.predict"),
        ("b", "        # BUG\n", "", "has no '# BUG'"),
        ("t", "- (2) doubts it\n", "", "rubric"),
    ],
)
def test_a_wrong_master_is_refused(ident, old, new, message, master, tmp_path):
    notebook = copy.deepcopy(master.notebook)
    assert old in cell(notebook, ident).source
    cell(notebook, ident).source = cell(notebook, ident).source.replace(old, new)
    nbformat.write(notebook, tmp_path / "91_kinds.ipynb")
    with pytest.raises(masters.Mistake, match=message):
        masters.load_master(tmp_path / "91_kinds.ipynb")


@pytest.mark.parametrize(
    ("source", "status", "points", "reason"),
    [
        ('guess = "B"', "passed", 1, "as predicted"),
        ('guess = "A"  # or so', "passed", 1, "the result is 'B', predicted was 'A'"),
        ('guess = "C"', "failed", 0, "not one of 'A', 'B'"),
        ("guess = open('/etc/passwd').read()", "failed", 0, "not one of"),
        ("guess = ...", "blank", 0, "not answered"),
    ],
)
def test_a_prediction_is_read_and_counts_right_or_wrong(
    source, status, points, reason, master, tmp_path
):
    source = f"{source}\n{PREDICT[PREDICT.index('check.') :]}"
    row = grading.read(master, "91.P", handed_in(master, tmp_path, p=source))
    assert (row.status, row.points, row.max) == (status, points, 1) and reason in row.reason


def test_a_prediction_after_the_result_counts_nothing(master, tmp_path):
    made = masters.version(master, "solution")
    for counts, status in (((3, 5), "passed"), ((5, 3), "late"), ((None, 3), "passed")):
        cell(made, "p").execution_count, cell(made, "r").execution_count = counts
        row = grading.read(master, "91.P", read(made, master, tmp_path))
        assert (row.status, row.points) == (status, status == "passed")


def test_predictions_and_texts_are_never_run(master):
    right = {q: question.solution for q, question in master.questions.items() if question.is_run}
    assert set(right) == {"91.B"}
    for level in ("statements", "cells", "all"):
        assert [c.id for c in execution.graft(master, right, level).cells][-2:] == ["b", "bt"]
        text = nbformat.writes(execution.graft(master, right, level))
        assert "predict" not in text and "reveal" not in text and "mean of three" not in text


def test_an_unchanged_bug_is_no_answer(master, tmp_path):
    unchanged, mended = handed_in(master, tmp_path), handed_in(master, tmp_path, b=BUG)
    assert submissions.find_answer(master, "91.B", unchanged.cells).status == "blank"
    assert submissions.find_answer(master, "91.B", mended.cells).status == ""


@pytest.mark.parametrize("keeps_metadata", [True, False])
def test_a_text_is_found_by_its_cell_or_its_heading(keeps_metadata, master, tmp_path):
    made = masters.version(master, "student")
    cell(made, "t").source = "**Answer 91.T**\n\nA mean.\n\n*Of three.*"
    if not keeps_metadata:  # another tool wrote the file
        for c in made.cells:
            c.id, c.metadata = f"x{c.id}", {}
    one = read(made, master, tmp_path)
    question = master.questions["91.T"]
    assert submissions.find_text(question, one.texts).source == "A mean.\n\n*Of three.*"
    blank = handed_in(master, tmp_path)
    assert submissions.find_text(question, blank.texts).status == "blank"
    assert submissions.find_text(question, ()).status == "missing"


def test_a_person_fills_the_rubric_in(master, tmp_path):
    known, out = {master.name: master}, tmp_path / "grades.csv"

    def graded(text):
        one = handed_in(master, tmp_path, t=f"**Answer 91.T**\n\n{text}")
        rows = [grading._named(grading.read(master, "91.T", one), one, master)]
        rows = rubrics.apply(out, rows, {("ada", master.name): one}, known)
        feedback.write_grades(out, rows, {("ada", master.name): one}, known)
        return rows[0]

    row = graded("=cmd")
    assert (row.status, row.points, row.max) == (grading.WAITS, 0, 3.5)
    assert feedback.totals([row]).to_dict("records")[0]["max"] == 0  # not counted yet
    page = (tmp_path / "grades_feedback" / "ada.html").read_text()
    assert "=cmd" in page and "(0.5) says of how many" in page
    sheet = pd.read_csv(rubrics.sheet_of(out), dtype=str, keep_default_na=False)
    assert list(sheet["item"]) == [text for _, text in master.questions["91.T"].rubric]
    sheet["points"] = ["1", "0,5", "0"]
    sheet.to_csv(rubrics.sheet_of(out), index=False)
    row = graded("=cmd")
    assert (row.status, row.points) == ("partial", 1.5) and row.reason == "not in full: doubts it"
    assert list(pd.read_csv(rubrics.sheet_of(out))["points"]) == [1, 0.5, 0]  # kept
    assert graded("another answer").status == grading.WAITS
    graded("=cmd")
    for wrong, message in (("3", "3 points of 1"), ("many", "the points are 'many'")):
        sheet["points"] = [wrong, "0", "0"]
        sheet.to_csv(rubrics.sheet_of(out), index=False)
        with pytest.raises(masters.Mistake, match=message):
            graded("=cmd")


# --- in the notebook -----------------------------------------------------------------------------


def test_the_result_is_shown_to_who_has_predicted(monkeypatch, capsys):
    monkeypatch.setattr(check, "_GUESSES", {})
    monkeypatch.setattr(check, "_SHOWN", {})
    options = {"A": "up", "B": "down"}
    check.reveal("91.P", "A", "by 3")
    assert capsys.readouterr().out.startswith("First predict (exercise 91.P")
    with pytest.raises(NotImplementedError, match="exercise 91.P"):
        check.predict("91.P", ..., options)
    with pytest.raises(AssertionError, match="expected one of 'A', 'B', got 'C'"):
        check.predict("91.P", "C", options)
    check.predict("91.P", "A", options)
    check.predict("91.P", "B", options)  # second thoughts, before the result
    check.reveal("91.P", "A", "by 3")
    said = capsys.readouterr().out
    assert "Result of 91.P: A (by 3)\nYou predicted B. Why?" in said
    assert kinds.RESULT.findall(said) == [("91.P", "A")]
    check.predict("91.P", "A", options)
    check.reveal("91.P", "A")
    assert "what you predicted is B" in (said := capsys.readouterr().out)
    assert said.endswith("You predicted B. Why?\n")


def test_run_all_passes_an_exercise_without_answer(capsys):
    shell = InteractiveShell()
    check.go_on(shell)
    check.go_on(None)  # a script has no shell
    open_ = shell.run_cell('def f():\n    raise NotImplementedError("exercise 02.B")\nf()')
    assert open_.success
    said = capsys.readouterr().out
    assert "Exercise 02.B is not answered yet." in said and "Traceback" not in said
    assert shell.run_cell("a = b = 1\nx, y = 0, f()").success  # it would have bound y
    assert shell.run_cell("%pwd\nz = y + 1").success and shell.run_cell("w = z").success
    assert capsys.readouterr().out.count("Exercise 02.B is not answered yet.") == 3
    assert shell.run_cell("rows, whole = {}, 7\nfor k in range(3):\n    rows[k] = f()").success
    assert shell.run_cell("rows[2]").success and shell.run_cell("assert whole == 7").success
    assert capsys.readouterr().out.count("Exercise 02.B is not answered yet.") == 2
    assert not shell.run_cell("yy").success  # a mistake of the reader's own is shown
    assert "NameError" in capsys.readouterr().out
    shell.run_cell("y, z = 2, a")  # answered meanwhile
    assert shell.run_cell("assert y + z == 3").success
    bug = shell.run_cell(
        'from tpt_nb.lessons import check\ncheck.symptom("02.B")\ncheck.equal("it", 1, 2)\nx = 5'
    )
    assert bug.success and "NOT RIGHT YET: it: expected 2, got 1." in capsys.readouterr().out
    assert not shell.run_cell('check.equal("it", x, 2)').success  # in that cell alone
    for code in ('raise NotImplementedError("exercise, later")', "1 / 0", "check.gone"):
        assert not shell.run_cell(code).success
    assert shell.run_cell("1 + 1").success
