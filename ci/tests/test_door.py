"""The door: from the README's first link to a student's notebook that runs, with no solution."""

import ast
import re
import sys
from pathlib import Path
from urllib.parse import urlsplit

import nbformat
import pytest
from nbclient import NotebookClient

from tpt_nb.course import kinds, masters
from tpt_nb.course.cells import DEFINITIONS, names_of, statements

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO / "ci"))

import badges  # noqa: E402
import lint_notebooks  # noqa: E402

MASTERS = sorted((REPO / "notebooks").glob("[0-9][0-9]_*.ipynb"))
STUDENT = REPO / "notebooks" / "student"
README = (REPO / "README.md").read_text("utf-8")
OPEN = re.compile(r"Exercise (\d\d\.\w+) is not answered yet\.|First predict")
each = pytest.mark.parametrize("path", MASTERS, ids=lambda path: path.stem)


def first_link() -> Path:
    """The first notebook that the README links to."""
    return REPO / re.search(r"\]\(([^()\s]+\.ipynb)\)", README)[1]


@each
def test_the_students_copies_are_in_step(path):
    copy, folder = STUDENT / path.name, path.parent
    wanted = nbformat.writes(masters.version(masters.load_master(path), "student")) + "\n"
    in_step = copy.is_file() and copy.read_text("utf-8") == wanted
    assert in_step, f"{copy.relative_to(REPO)}: run python -m tpt_nb.course release"
    names = {p.name for p in folder.glob("[0-9][0-9]_*.ipynb")}
    assert {p.name for p in STUDENT.glob("*.ipynb")} == names


def test_the_readme_opens_the_students_copies_first():
    assert first_link() == STUDENT / MASTERS[0].name and first_link().is_file()
    rows = re.findall(r"^\| (\d\d) \| (\[.*?) \|", README, re.MULTILINE)
    assert [number for number, _ in rows] == [path.name[:2] for path in MASTERS]
    for (_, cell), path in zip(rows, MASTERS, strict=True):
        links = re.findall(r"\[([^]]*)\]\(([^)]*)\)", cell)
        assert [target for _, target in links] == [
            f"notebooks/student/{path.name}",
            f"notebooks/{path.name}",
        ]
        assert links[1][0] == "with solutions"
    badge = badges.BADGE.search(README)[0]
    assert badge.index(f"/notebooks/student/{MASTERS[0].name}") < badge.index("with solutions")


@each
def test_no_solution_is_in_sight(path):
    master = masters.load_master(path)
    made = masters.version(master, "student")
    text = "\n\n".join(cell.source for cell in made.cells)
    assert not re.search(r"SOLUTION|# BUG|hidden_test|with solutions|Rubric|^- \(\d", text, re.M)
    for question in master.questions.values():
        cell = next(c for c in made.cells if c.id == question.cell)
        assert cell.get("outputs", []) == [] and cell.source == question.stub != question.solution
        if kinds.kind(question.id) in kinds.WRITTEN:
            assert cell.source == f"**Answer {question.id}**\n\n{kinds.WRITE_HERE}"
            answer = max(question.source.split("\n\n"), key=len)
            assert answer not in text
    for cell in made.cells:
        if "check.reveal(" in cell.source:
            assert cell.outputs == [] and cell.execution_count is None


@each
def test_a_copy_has_its_own_badge_and_links_that_lead_somewhere(path):
    made = masters.version(masters.load_master(path), "student")
    badge = badges.BADGE.search(made.cells[0].source)[0]
    targets = re.findall(r"\]\((https://colab[^)]*)\)", badge)
    places = [urlsplit(target).path for target in targets if "/blob/" in target]
    assert len(places) == 1 and places[0].endswith(f"/notebooks/student/{path.name}")
    broken = [line for line in lint_notebooks.links(made, STUDENT, set()) if "arXiv" not in line]
    assert not broken
    code = next(cell for cell in made.cells if cell.cell_type == "code")
    ast.parse(code.source)


def asks_for(master: masters.Master, question: masters.Question) -> tuple[set[str], set[str]]:
    """What an unanswered exercise leaves bound, and what it does not get to."""
    bound, lost, stopped = set(), set(), False
    if not question.is_run:
        return bound, {"guess"}
    for node, text in statements(question.solution):
        names = names_of(text)
        stopped |= not isinstance(node, DEFINITIONS) and bool(names.needs & question.names)
        (lost if stopped else bound).update(names.may_bind)
    return bound, lost


@each
def test_no_cell_needs_what_only_an_answer_leaves_behind(path):
    """So that an exercise can be left out: what needs it says that it is not answered yet."""
    master, bound, lost = masters.load_master(path), set(), {}
    for cell in master.notebook.cells:
        tpt = cell.metadata.get("tpt", {})
        if cell.cell_type != "code" or tpt.get("hidden"):
            continue
        if "q" in tpt:
            here, gone = asks_for(master, master.questions[tpt["q"]])
            bound |= here
            lost |= {name: tpt["q"] for name in gone - bound}
            continue
        names = names_of(cell.source)
        needed = {n: lost[n] for n in names.needs - names.may_bind - bound if n in lost}
        assert not needed, f"cell {cell.id} needs {needed}: bind it above the first check"
        bound |= names.may_bind


@pytest.mark.slow
@each
def test_a_copy_runs_from_its_folder_with_every_exercise_open(path, tmp_path):
    notebook = nbformat.read(STUDENT / path.name, as_version=4)
    for cell in notebook.cells:
        if "parameters" in cell.metadata.get("tags", []) and "out_dir" in cell.source:
            cell.source += f'\nout_dir = "{tmp_path}"'
    resources = {"metadata": {"path": str(STUDENT)}}
    NotebookClient(notebook, timeout=900, kernel_name="python3", resources=resources).execute()
    said = "".join(o.get("text", "") for c in notebook.cells for o in c.get("outputs", []))
    asked = {cell.metadata.tpt.q for cell in notebook.cells if "q" in cell.metadata.get("tpt", {})}
    unanswered = {match[1] for match in OPEN.finditer(said) if match[1]}
    run = {q for q in asked if kinds.kind(q) not in (*kinds.WRITTEN, "B")}
    assert run <= unanswered
