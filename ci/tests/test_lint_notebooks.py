"""The linter, on a notebook that it accepts and on that notebook broken once for each rule."""

import copy
import json
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO / "ci"))

import badges  # noqa: E402
import lint_notebooks  # noqa: E402

SETUP = badges.SETUP.format(repo="us/tta", ref="v1")
SETUP += "from tpt_nb.lessons import check, setup\n\nsetup.start()"
PICTURE = {"image/png": "aGVsbG8=", "text/plain": "a figure"}
EXERCISE = """\
**Exercise 91.{k} · a sum** · difficulty ●○○ · importance ●●○ · 5 minutes

<details><summary>Hint</summary>

Add.

</details>"""
ANSWER = '''\
def f(x: float) -> float:
    """x + {k}"""
    # BEGIN SOLUTION
    return x + {k}
    # END SOLUTION


check.equal("sum", f(1.0), {k} + 1.0)'''


PREDICT = """\
# BEGIN SOLUTION
guess = "A"
# END SOLUTION
check.predict("91.P", guess, {"A": "up", "B": "down"})"""


def other_kinds() -> list[nbformat.NotebookNode]:
    """One exercise of each kind but "write a function": the cells 13 to 22 of ``good``."""

    def head(kind: str) -> nbformat.NotebookNode:
        return new_markdown_cell(EXERCISE.format(k=kind))

    def code(source: str, q: str = "", **metadata) -> nbformat.NotebookNode:
        tpt = {"tpt": {"q": q, "points": 1}} if q else {}
        return new_code_cell(source, metadata=tpt | metadata)

    def told(q: str) -> nbformat.NotebookNode:
        source = f"<details><summary>Answer {q}</summary>\n\n- (1) says so\n\n</details>"
        return new_markdown_cell(source, metadata={"tpt": {"q": q, "points": 1}})

    bug = ANSWER.format(k=5).replace("    # END", "    # BUG\n    # return x\n    # END")
    return [
        *(head("P"), code(PREDICT, "91.P"), code('check.reveal("91.P", "A")', tags=["gives-away"])),
        *(head("B"), code(bug, "91.B"), head("T"), told("91.T")),
        *(head("O"), code("2 + 2"), told("91.O")),
    ]


def good() -> nbformat.NotebookNode:
    """A notebook that the linter accepts."""
    text, code = new_markdown_cell, new_code_cell
    cells = [
        text("# 91 · A lesson\n\n*Run: about two minutes. Read: 5 minutes.*"),
        code(SETUP),
        code("n: int = 3  # how many", metadata={"tags": ["parameters"]}),
        text("## 1. Body\n\nSee [CLIP](https://arxiv.org/abs/2103.00020) and [it](sub/x.png)."),
        code("1 + 1"),
    ]
    for k in range(1, 5):
        cells.append(text(EXERCISE.format(k=k)))
        tpt = {"q": f"91.{k}", "points": 1}
        cells.append(code(ANSWER.format(k=k), metadata={"tpt": tpt}))
    cells += other_kinds()
    cells += [text("## Limits\n\nx"), text("## Conclusion\n\nx"), text("## References\n\nx")]
    cells.append(text("*Text: CC BY 4.0. Code: MIT.*"))
    for count, cell in enumerate([c for c in cells if c.cell_type == "code"], 1):
        cell.execution_count = count
    figure = new_output("display_data", PICTURE, metadata={"image/png": {"alt": "a figure"}})
    finding = {"text/markdown": "**Finding.** 2.", "text/plain": "Finding. 2."}
    cells[4].outputs = [figure, new_output("display_data", finding)]
    kernel = {"name": "python3", "display_name": "Python 3"}
    return new_notebook(cells=cells, metadata={"kernelspec": kernel})


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "x.png").write_bytes(b"")
    return tmp_path


def lint(notebook, folder) -> list[str]:
    path = folder / "91_lesson.ipynb"
    path.write_text(json.dumps(notebook))
    return list(lint_notebooks.lint(path, {"2103.00020"}))


def test_a_good_notebook_passes(folder):
    assert lint(good(), folder) == []


def replace(i, old, new):
    def change(nb):
        assert old in nb.cells[i].source
        nb.cells[i].source = nb.cells[i].source.replace(old, new)

    return change


def put(i, **values):
    return lambda nb: nb.cells[i].update(values)


def tag(i, *tags):
    return lambda nb: nb.cells[i].metadata.update(tags=list(tags))


def lines(n):
    return "\n".join(f"x{i} = {i}" for i in range(n))


def much_code_in_a_row(nb):
    nb.cells[4:5] = [new_code_cell(lines(16)) for _ in range(4)]
    renumber(nb)


def drop(*at):
    def change(nb):
        nb.cells = [cell for i, cell in enumerate(nb.cells) if i not in at]
        renumber(nb)

    return change


def renumber(nb):
    for count, cell in enumerate([c for c in nb.cells if c.cell_type == "code"], 1):
        cell.execution_count = count


def output(i, *outputs):
    return lambda nb: nb.cells[i].update(outputs=list(outputs))


def swap(i, j):
    def change(nb):
        nb.cells[i], nb.cells[j] = nb.cells[j], nb.cells[i]

    return change


def used_for_something_else(notebook: nbformat.NotebookNode) -> None:
    code = [c for c in notebook.cells if c.cell_type == "code"][2:]
    code[0].source, code[1].source = "best = 1", "best, second = 2, 3\n" + code[1].source
    code[-1].source = "findings.answers(best)"


BROKEN = {
    # what notebook_format.py checks
    "count": (put(4, execution_count=9), "execution count 9, not 3"),
    "not_run": (put(4, execution_count=None), "execution count None"),
    "alt": (output(4, new_output("display_data", PICTURE)), "a picture has no alt text"),
    "svg": (
        output(4, new_output("display_data", {"image/svg+xml": "<svg/>"})),
        "stored as SVG or PDF",
    ),
    "error": (output(4, new_output("error", ename="E", evalue="", traceback=[])), "an error: E"),
    "size": (
        output(4, new_output("stream", name="stdout", text="x" * 10**6)),
        "bytes, more than 1000000",
    ),
    "widgets": (lambda nb: nb.metadata.update(widgets={}), "metadata of widgets"),
    "kernel": (lambda nb: nb.metadata.kernelspec.update(name="julia"), "the kernel is not python3"),
    "format": (lambda nb: nb.update(nbformat_minor=4), "nbformat is older than 4.5"),
    "shell": (replace(4, "1 + 1", "!ls"), "'!' in the source"),
    "install": (replace(4, "1 + 1", "%pip install torch"), "may break Colab's torch"),
    "tensorboard": (replace(4, "1 + 1", "%tensorboard --logdir x"), "leaves a process"),
    "exit": (replace(4, "1 + 1", "sys.exit(0)"), "stops a notebook silently"),
    "login": (replace(4, "1 + 1", "notebook_login()"), "waits for a person"),
    "progress": (replace(4, "1 + 1", "from tqdm.notebook import tqdm"), "stores a widget"),
    "path": (replace(4, "1 + 1", "open('/home/me/x')"), "an absolute path: /home/me/x"),
    "raises": (tag(4, "raises-exception"), "tagged raises-exception"),
    "papermill": (tag(4, "injected-parameters"), "was added by papermill"),
    # what lint_notebooks.py adds
    "no_parameters": (tag(2), "0 cells are tagged 'parameters'"),
    "late_parameters": (swap(2, 4), "the second code cell is not tagged 'parameters'"),
    "second_equals": (replace(2, "how many", "n = 3"), "a second '='"),
    "computed": (replace(2, "= 3", "= 3 * k"), "is not 'name: type = literal'"),
    "no_type": (replace(2, "n: int", "n"), "has no type"),
    "unexplained": (replace(2, "  # how many", ""), "has no comment"),
    "setup": (replace(1, "import importlib.util", "import numpy"), "is not the setup"),
    "start": (replace(1, "setup.start()", ""), "is not the setup"),
    "long_setup": (replace(1, "setup.start()", f"setup.start()\n{lines(3)}"), "setup has 10"),
    "title": (replace(0, "# 91 · A", "# A"), "does not begin with '# 91 · title'"),
    "two_titles": (replace(3, "## 1.", "# 1."), "2 headings of the first level"),
    "long_cell": (replace(4, "1 + 1", lines(21)), "21 lines of code, more than 20"),
    "long_answer": (replace(6, "# END SOLUTION", f"# END SOLUTION\n{lines(30)}"), "more than 30"),
    "row": (much_code_in_a_row, "without a word between"),
    "reused": (used_for_something_else, "best is used in the conclusion and assigned in 2 cells"),
    "order": (swap(-4, -3), "the last sections are not Limits, Conclusion, References"),
    "licence": (replace(-1, "CC BY 4.0", "free"), "the licences of text and code"),
    "few_exercises": (drop(11, 12), "3 exercises, not 4 to 8"),
    "numbering": (swap(6, 8), "exercise 91.2 stands in the place of 91.1"),
    "points": (lambda nb: nb.cells[6].metadata.tpt.pop("points"), "91.1 has no points"),
    "no_solution": (replace(6, "# BEGIN SOLUTION", "#"), "no solution between"),
    "no_docstring": (replace(6, '"""x + 1"""', "#"), "the stub has no docstring"),
    "no_check": (replace(6, "check.equal", "print"), "no check in the same cell"),
    "difficulty": (replace(5, "●○○", "easy"), "above it must stand '**Exercise 91.1"),
    "time": (replace(5, "5 minutes", "soon"), "above it must stand '**Exercise 91.1"),
    "hint": (replace(5, "Hint", "More"), "91.1: no folded hint"),
    "no_prediction": (drop(13, 14, 15), "no exercise 91.P (predict, then run)"),
    "no_bug": (drop(16, 17), "no exercise 91.B (find the bug)"),
    "no_question": (drop(20, 21, 22), "no exercise 91.O (investigate)"),
    "no_result": (drop(15), "91.P: below it must stand one cell with check.reveal"),
    "result_in_sight": (tag(15), "91.P: below it must stand one cell with check.reveal"),
    "no_heading": (replace(20, "91.O", "91.X"), "91.O: above it must stand"),
    "no_host": (replace(3, "https://arxiv.org", "https:///arxiv.org"), "no host"),
    "no_text": (replace(3, "[it]", "[]"), "no text"),
    "no_file": (replace(3, "sub/x.png", "sub/y.png"), "there is no such file"),
    "scheme": (replace(3, "sub/x.png", "htp:x.png"), "neither http nor a file"),
    "space": (replace(3, "sub/x.png", "sub/x y.png"), "a space in the address"),
    # what lint_findings.py adds; test_lint_findings.py has the rest
    "chart": (output(4, new_output("display_data", PICTURE)), "no finding below this chart"),
    "bare": (replace(3, "See", "TPT has 41.0 %. See"), "41.0 % is a result without a mark"),
    "unknown_paper": (replace(3, "2103.00020", "2103.00021"), "not in notebooks/references.bib"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_notebook_is_refused(name, folder):
    notebook = copy.deepcopy(good())
    change, message = BROKEN[name]
    change(notebook)
    found = lint(notebook, folder)
    assert any(message in text for text in found), found


def test_every_way_of_breaking_is_one(folder):
    for change, _ in BROKEN.values():
        before = good()
        notebook = copy.deepcopy(before)
        change(notebook)
        assert notebook != before


def test_a_notebook_that_was_not_executed_is_one_line(folder):
    notebook = good()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.execution_count = None
    assert lint(notebook, folder) == [
        "cell 2: execution count None, not 1, and 10 more: run bash ci/run --in-place"
    ]


def test_the_command_names_the_notebook_and_fails(folder, capsys):
    path = folder / "91_lesson.ipynb"
    notebook = good()
    path.write_text(json.dumps(notebook))
    assert lint_notebooks.main([str(path)]) == 0
    notebook.cells[0].source = notebook.cells[0].source.replace("91", "92", 1)
    path.write_text(json.dumps(notebook))
    assert lint_notebooks.main([str(path)]) == 1
    assert "91_lesson.ipynb: the first cell does not begin" in capsys.readouterr().out
