"""Masters, their two versions, and how answers are found and grafted; nothing is run."""

import ast
import copy
import json
import re
from pathlib import Path

import course_world as world
import nbformat
import pytest

from tpt_nb.course import cells as code
from tpt_nb.course import execution, masters, submissions
from tpt_nb.course.__main__ import main

REPO = Path(__file__).resolve().parents[2]
REAL = sorted((REPO / "notebooks").glob("[0-9][0-9]_*.ipynb"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return world.write_master(tmp_path_factory.mktemp("masters"))


@pytest.fixture(scope="module")
def master(folder):
    return masters.load_masters(folder)[world.NAME]


@pytest.fixture(scope="module")
def given(master, tmp_path_factory):
    """name -> submission, read from its file, for every kind of submission."""
    student, solution = masters.version(master, "student"), masters.version(master, "solution")
    place = tmp_path_factory.mktemp("submissions")
    read = {}
    for name, (text, *_) in world.submissions(student, solution, place).items():
        (place / f"{name}.ipynb").write_text(text)
        known = {world.NAME: master}
        read[name] = submissions.read_submission(name, place / f"{name}.ipynb", known)
    return read


# --- release -------------------------------------------------------------------------------------


def test_the_student_version_has_stubs_and_visible_checks_and_nothing_that_gives_them_away(master):
    notebook = masters.version(master, "student")
    nbformat.validate(notebook)
    text = nbformat.writes(notebook)
    for secret in ("SOLUTION", "middle", "kind=", "** 0.5", "ex1-test", "ties", "as we saw"):
        assert secret not in text
    answer = world.cell(notebook, "90.1")
    assert answer.source.startswith("def centre(x: np.ndarray) -> np.ndarray:\n")
    assert 'raise NotImplementedError("exercise 90.1")' in answer.source
    assert answer.source.endswith(world.Q1[world.Q1.index("\n\n\n") :])
    assert answer.outputs == [] and answer.execution_count is None
    assert "output of setup" in text and "output of ex" not in text
    assert notebook.metadata.tpt == {
        "notebook": world.NAME,
        "version": master.hash,
        "copy": "student",
    }


def test_the_solution_version_has_the_solutions_without_markers_and_hidden_tests(master):
    notebook = masters.version(master, "solution")
    nbformat.validate(notebook)
    text = nbformat.writes(notebook)
    assert "SOLUTION" not in text and "ex1-test" not in text
    assert "return offset + x - middle" in text and "output of ex1" in text
    assert "as we saw" in text


@pytest.mark.parametrize("path", REAL, ids=lambda path: path.stem)
def test_released_notebooks_differ_from_their_master_in_exercises_alone(path):
    master = masters.load_master(path)
    visible = [c for c in master.notebook.cells if not c.metadata.get("tpt", {}).get("hidden")]
    answers = {q.cell for q in master.questions.values()}
    student, solution = masters.version(master, "student"), masters.version(master, "solution")
    kept = [c for c in visible if "solution" not in c.metadata.get("tags", [])]
    for version, cells in ((student, kept), (solution, visible)):
        assert [c.id for c in version.cells] == [c.id for c in cells]
        for new, old in zip(version.cells, cells, strict=True):
            if old.id not in answers:
                assert new.source == old.source
        assert "# BEGIN SOLUTION" not in nbformat.writes(version)
    for q in master.questions.values():
        source = next(c.source for c in student.cells if c.id == q.cell)
        assert source.count("raise NotImplementedError") == q.source.count("# BEGIN SOLUTION")
        ast.parse(source)
        assert q.checks and source.endswith(q.checks)
        inside = re.findall(r"# BEGIN SOLUTION\n(.*?)\n\s*# END SOLUTION", q.source, re.DOTALL)
        for body in inside:
            assert body not in nbformat.writes(student)
            assert body in next(c.source for c in solution.cells if c.id == q.cell)
        ast.parse(code.as_reports(q.checks))


def test_release_writes_the_same_twice_and_check_names_what_differs(folder, tmp_path, capsys):
    command = ["release", "--notebooks", str(folder), "--out", str(tmp_path)]
    assert main(command) == 0
    first = {p: p.read_bytes() for p in tmp_path.rglob("*.ipynb")}
    assert sorted(p.parent.name for p in first) == ["solution", "student"]
    assert main(command) == 0
    assert {p: p.read_bytes() for p in tmp_path.rglob("*.ipynb")} == first
    assert main([*command, "--check"]) == 0
    capsys.readouterr()
    student = tmp_path / "student" / f"{world.NAME}.ipynb"
    student.write_text(student.read_text().replace("cell", "sell"))
    (tmp_path / "student" / "91_gone.ipynb").write_text("{}")
    assert main([*command, "--check"]) == 1
    shown = capsys.readouterr().out
    assert "student/90_tiny.ipynb" in shown and "91_gone" in shown and "solution" not in shown


def change(cell, **values):
    def apply(notebook):
        next(c for c in notebook.cells if c.id == cell).update(values)

    return apply


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (change("ex1", source="x = 1"), "must come in pairs"),
        (change("ex1", source="# BEGIN SOLUTION\n# BEGIN SOLUTION\n"), "must come in pairs"),
        (change("setup", source=world.Q1), "no metadata tpt"),
        (change("ex1", metadata={"tpt": {"q": "90.2", "points": 1}}), "is there twice"),
        (change("ex1", metadata={"tpt": {"q": "90.1", "points": 0}}), "not a number above 0"),
        (
            change("ex1-test", metadata={"tpt": {"q": "90.7", "hidden": True}}),
            "90.7, which is no question",
        ),
    ],
)
def test_a_wrong_master_is_refused(edit, message, tmp_path, capsys):
    notebook = world.master()
    edit(notebook)
    nbformat.write(notebook, tmp_path / "90_tiny.ipynb")
    assert main(["release", "--notebooks", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err


# --- answers -------------------------------------------------------------------------------------


def test_the_blank_version_has_no_answers_and_the_reference_has_all(given, master):
    for question in master.questions.values():
        assert submissions.find_answer(master, question.id, given["blank"].cells).status == "blank"
        answer = submissions.find_answer(master, question.id, given["reference"].cells)
        assert answer.source == question.solution


@pytest.mark.parametrize("name", ["moved", "renamed", "duplicated", "older_version", "format_3"])
def test_answers_are_found_wherever_they_are(name, given, master):
    assert given[name].problem == "" and given[name].master == world.NAME
    for question in master.questions.values():
        assert (
            submissions.find_answer(master, question.id, given[name].cells).source
            == question.solution
        )


@pytest.mark.parametrize(
    ("name", "question", "status"),
    [("deleted", "90.2", "missing"), ("contradictory", "90.1", "duplicate")],
)
def test_what_is_not_there_once_has_a_reason(name, question, status, given, master):
    answer = submissions.find_answer(master, question, given[name].cells)
    assert (answer.source, answer.status) == ("", status) and answer.reason
    others = [q for q in master.questions.values() if q.id != question]
    for q in others:
        assert submissions.find_answer(master, q.id, given[name].cells).source == q.solution


@pytest.mark.parametrize(
    ("name", "problem"),
    [("not_json", "not JSON"), ("deep_json", "not JSON"), ("other_json", "not a notebook")],
)
def test_what_is_no_notebook_is_said(name, problem, given):
    assert problem in given[name].problem


def test_a_stub_beside_an_answer_does_not_count(given, master):
    question = master.questions["90.1"]
    cells = [*given["reference"].cells, *given["blank"].cells]
    assert submissions.find_answer(master, question.id, cells).source == question.solution


def test_links_and_large_files_are_not_read(tmp_path, master, monkeypatch):
    known = {world.NAME: master}
    (tmp_path / "link.ipynb").symlink_to(tmp_path / "target")
    assert "plain" in submissions.read_submission("x", tmp_path / "link.ipynb", known).problem
    monkeypatch.setattr(submissions, "SIZE", 1000)
    (tmp_path / "big.ipynb").write_bytes(b" " * 1001)
    assert "0 MB" in submissions.read_submission("x", tmp_path / "big.ipynb", known).problem


def test_submissions_are_files_or_folders_and_names_are_made_harmless(tmp_path, master):
    text = world.text(masters.version(master, "solution"))
    for name in ("ada.ipynb", "=cmd().ipynb", "_cmd__.ipynb", f"{world.NAME}_grace.ipynb"):
        (tmp_path / name).write_text(text)
    (tmp_path / "linus").mkdir()
    (tmp_path / "linus" / "anything.ipynb").write_text(text)
    (tmp_path / "notes.txt").write_text("")
    found, skipped = submissions.find_submissions(tmp_path, {world.NAME: master})
    assert sorted(one.student for one in found) == ["_cmd__", "_cmd___", "ada", "grace", "linus"]
    with pytest.raises(masters.Mistake, match="no folder"):
        submissions.find_submissions(tmp_path / "gone", {world.NAME: master})


# --- grafts --------------------------------------------------------------------------------------


def test_a_graft_has_the_answers_the_tests_and_what_they_need(master, given):
    answers = {
        q.id: submissions.find_answer(master, q.id, given["reference"].cells).source
        for q in master.questions.values()
    }
    made = execution.graft(master, answers).cells
    assert [c.metadata.tpt.q for c in made if "tpt" in c.metadata] == ["90.1", "90.2", "90.3"]
    cells = {cell.id: cell.source for cell in made}
    assert list(cells) == [
        *("setup", "offset", "ex1", "ex1-test", "ex2", "ex2-random", "ex2-ties", "ex3"),
        "ex3-checks",
    ]
    assert "check.close" not in "".join(cells.values())
    assert "table" not in cells["ex1"] and "return offset + x - middle" in cells["ex1"]
    assert (
        "check.report(f'all {value:g}', describe(np.full(4, value)), 1e-06)" in cells["ex3-checks"]
    )


def test_no_solution_is_in_a_graft(master):
    cells = execution.graft(master, {"90.2": "def largest(x, k):\n    return centre(x)"}).cells
    text = "".join(cell.source for cell in cells)
    for secret in ("middle", "argsort", "** 0.5", "random.default_rng(check.seed())\ncheck"):
        assert secret not in text
    assert 'NotImplementedError("exercise 90.1")' in text  # called by the answer, so it is needed
    assert "describe" not in text


def test_an_answer_brings_the_cells_that_it_needs(master):
    ids = [c.id for c in execution.graft(master, {"90.3": "def describe(x):\n    return x"}).cells]
    assert ids == ["setup", "ex3", "ex3-checks"]
    ids = [c.id for c in execution.graft(master, {"90.3": "describe = lambda x: offset"}).cells]
    assert ids == ["setup", "offset", "ex3", "ex3-checks"]


@pytest.mark.parametrize(
    ("cells", "wanted", "needed"),
    [
        (["a = 1", "b = 2", "a"], {2}, [0, 2]),
        (["a = 1", "a = 2", "a"], {2}, [1, 2]),
        (["a = 1", "a += 2", "a"], {2}, [0, 1, 2]),
        (["a = []", "a.append(1)", "b.append(1)", "a"], {3}, [0, 1, 3]),
        (["a = {}", "a[1] = 2", "a"], {2}, [0, 1, 2]),
        (["import m", "m.show()", "m.x"], {2}, [0, 2]),
        (["a = 1", "def f():\n    return a", "f()"], {2}, [0, 1, 2]),
        (["a = 1", "def f(a):\n    return a", "f(3)"], {2}, [1, 2]),
        (["a = 1", "for a in range(3):\n    print(a)"], {1}, [1]),
        (["a = 1", "for i in b:\n    a[i] = 2", "b = 3", "a"], {3}, [0, 1, 3]),
        (["a = 1", "if b:\n    a = 2", "a"], {2}, [0, 1, 2]),
        (["a = 1", "with a as b:\n    c = b\n    d = c", "c = 3", "d"], {3}, [0, 1, 3]),
        (["a = 1", "try:\n    b = a\nexcept E:\n    a = b = 2", "b"], {2}, [0, 1, 2]),
        (["e = 1", "try:\n    b = 1\nexcept E as e:\n    print(e)", "b"], {2}, [1, 2]),
        (["a = 1", "while a:\n    b = 2\n    c = b", "b = 1", "c"], {3}, [0, 1, 3]),
        (["a = 1", "b = [a for _ in range(3)]", "b"], {2}, [0, 1, 2]),
        (["a = 1", "b = [a for a in range(3)]", "b"], {2}, [1, 2]),
        (["a = 1", "b: a = 2", "b"], {2}, [0, 1, 2]),
        (["a = 1", "this is not Python", "a"], {1, 2}, [0, 1, 2]),
        (["a = 1", "%time a\nb = 2", "b"], {2}, [1, 2]),
        (["a = 1", "class C:\n    x = a", "C"], {2}, [0, 1, 2]),
        (["a = 1", "def f(x=a):\n    return x", "f()"], {2}, [0, 1, 2]),
        (["a = 1", "def f():\n    return b\n\n\nb = 2", "f()"], {2}, [1, 2]),
    ],
)
def test_needed_cells_are_found_by_their_names(cells, wanted, needed):
    assert code.needed(cells, wanted) == needed


def test_visible_checks_become_reports_without_expected_values():
    checks = """\
expected = secret(3)
other, unused = secret(4), 5
for k, want in [(1, 2), (3, 4)]:
    check.close(f"{k}", f(k), want + other, atol=1e-3)
check.equal("list", f(0), expected)
check.close(what="named", got=f(1), expected=expected)"""
    source = code.as_reports(checks)
    assert "secret" not in source and "expected" not in source
    assert ast.dump(ast.parse(source)) == ast.dump(
        ast.parse(
            "for k, want in [(1, 2), (3, 4)]:\n    check.report(f'{k}', f(k), 0.001)\n"
            "check.report('list', f(0), 0)\ncheck.report('named', f(1), 1e-06)"
        )
    )


def test_only_the_given_checks_are_taken_from_an_answer(master):
    question = master.questions["90.1"]
    own = question.solution + "\nmine = centre(np.eye(2))\n"
    own += 'check.equal("mine", centre(np.ones(1)), 0)\n'  # another check, or a changed one
    kept = code.without_checks(own, question.checks)
    assert (
        "mine" in kept
        and "check.equal" not in kept
        and "check.close" not in kept
        and "table" not in kept
    )
    broken = "def centre(x:\n" + question.checks
    assert code.without_checks(broken, question.checks) == broken


def test_metadata_of_any_kind_is_read(tmp_path, master):
    notebook = json.loads(nbformat.writes(masters.version(master, "solution")))
    for cell, q in zip(notebook["cells"], [["90.1"], {}, 3, None, "x"], strict=False):
        cell["metadata"] = {"tpt": {"q": q}}
    (tmp_path / "a.ipynb").write_text(json.dumps(notebook))
    one = submissions.read_submission("a", tmp_path / "a.ipynb", {world.NAME: master})
    assert one.problem == ""
    for question in master.questions.values():
        assert submissions.find_answer(master, question.id, one.cells).source == question.solution


def test_a_graft_keeps_statements_cells_or_all(master):
    notebook = copy.deepcopy(master.notebook)
    notebook.cells[2].source = "# why\noffset = 0.0\nunneeded = 1\n\n\n@print\ndef f():\n    pass"
    wide = masters.Master(master.name, notebook, master.questions, master.hash)
    answers = {"90.1": "def centre(x):\n    return f(x, offset)"}
    sources = {
        level: {cell.id: cell.source for cell in execution.graft(wide, answers, level).cells}
        for level in ("statements", "cells", "all")
    }
    assert sources["statements"]["offset"] == "offset = 0.0\n@print\ndef f():\n    pass"
    assert sources["cells"]["offset"] == notebook.cells[2].source
    assert "unneeded" not in sources["cells"] and "unneeded" in sources["all"]
    assert "ex2-ties" not in sources["all"] and "argsort" not in str(sources)


def test_what_a_master_writes_goes_to_the_scratch_folder(master):
    notebook = copy.deepcopy(master.notebook)
    notebook.cells[2].source = "offset: float = 0.0  # none\nout_dir: str = 'out/runs'  # where"
    notebook.cells[2].metadata["tags"] = ["parameters"]
    given = masters.Master(master.name, notebook, master.questions, master.hash)
    for use, expected in (("offset", False), ("out_dir", True)):
        cells = execution.graft(given, {"90.3": f"describe = lambda x: {use}"}).cells
        source = next(cell.source for cell in cells if cell.id == "offset")
        assert ("abspath" in source) is expected
    names: dict = {}
    exec(source, names)
    assert names["out_dir"] == str(Path("out").absolute())
