"""Masters, their two versions, and how answers are found and grafted; nothing is run."""

import ast
import copy
import dataclasses
import json
import os
import random
import re
import shutil
import tempfile
import time
import unicodedata
from pathlib import Path

import course_world as world
import nbformat
import pytest

from tpt_nb.course import cells as code
from tpt_nb.course import execution, grading, kinds, masters, submissions
from tpt_nb.course.__main__ import main
from tpt_nb.lessons import check

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
                assert new.source == masters.WITH_SOLUTIONS.sub("", old.source)
        assert "# BEGIN SOLUTION" not in nbformat.writes(version)
    for q in master.questions.values():
        if not q.is_run:  # see test_course_kinds.py
            continue
        source = next(c.source for c in student.cells if c.id == q.cell)
        count = 0 if kinds.kind(q.id) == "B" else q.source.count("# BEGIN SOLUTION")
        assert source.count("raise NotImplementedError") == count
        ast.parse(source)
        assert q.checks and source.endswith(q.checks)
        inside = re.findall(
            r"# BEGIN SOLUTION\n(.*?)\n\s*# (?:BUG|END SOLUTION)", q.source, re.DOTALL
        )
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
    assert skipped == [f"{tmp_path / 'notes.txt'}: not a notebook"]
    with pytest.raises(masters.Mistake, match="no folder"):
        submissions.find_submissions(tmp_path / "gone", {world.NAME: master})


def students(folder, master):
    """What is found in a folder: {student: path in it, or the problem}, and what is skipped."""
    found, skipped = submissions.find_submissions(folder, {world.NAME: master})
    names = [one.student for one in found]
    assert len(names) == len(set(names))
    shown = {o.student: o.problem or o.path.relative_to(folder).as_posix() for o in found}
    return shown, "\n".join(skipped).replace(f"{folder}/", "")


def put(path, content, age=0.0):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    os.utime(path, (time.time() - age,) * 2)


MAC = b"\0\5\x16\7\0\2\0\0Mac OS X        " + b"\0" * 80


def test_hidden_and_system_files_are_no_hand_ins_at_any_depth(tmp_path, master):
    text = world.text(masters.version(master, "solution"))
    put(tmp_path / "mac" / "90_tiny.ipynb", text, age=100)
    put(tmp_path / "mac" / "._90_tiny.ipynb", MAC)
    put(tmp_path / "__MACOSX" / "mac" / "._90_tiny.ipynb", MAC)
    put(tmp_path / "._ada.ipynb", MAC)
    put(tmp_path / "ada" / "deep" / "__MACOSX" / "x.ipynb", MAC)
    put(tmp_path / "ada" / "deep" / ".ipynb_checkpoints" / "90_tiny-checkpoint.ipynb", "{")
    put(tmp_path / "ada" / "deep" / "hand-in" / "90.ipynb", text, age=100)
    put(tmp_path / "@eaDir" / "90.ipynb", text)
    found, skipped = students(tmp_path, master)
    assert found == {"mac": "mac/90_tiny.ipynb", "ada": "ada/deep/hand-in/90.ipynb"}
    assert "__MACOSX: a hidden or system file" in skipped


def test_an_unreadable_file_never_displaces_a_readable_one(tmp_path, master):
    text = world.text(masters.version(master, "solution"))
    put(tmp_path / "torn" / "90_tiny.ipynb", text, age=100)
    put(tmp_path / "torn" / "90_tiny.partial.ipynb", '{"cells": [')
    put(tmp_path / "flat.ipynb", text, age=100)
    put(tmp_path / "flat_90_tiny.ipynb", "torn")
    put(tmp_path / "late" / "a.ipynb", text, age=100)
    put(tmp_path / "late" / "b.ipynb", text, age=50)
    found, skipped = students(tmp_path, master)
    assert found == {"torn": "torn/90_tiny.ipynb", "flat": "flat.ipynb", "late": "late/b.ipynb"}
    assert "torn/90_tiny.partial.ipynb: not a notebook: it is not JSON" in skipped
    assert "late/a.ipynb: an earlier file for 90_tiny; b.ipynb counts" in skipped


def test_nothing_that_was_handed_in_is_left_out_in_silence(tmp_path, master):
    text = world.text(masters.version(master, "solution"))
    put(tmp_path / "deep" / "hand-in" / "90.ipynb", text)
    put(tmp_path / "loud" / "A.IPYNB", text)
    put(tmp_path / "LOUD2.IPYNB", text)
    put(tmp_path / "packed" / "hand-in.zip", b"PK")
    put(tmp_path / "sent.zip", b"PK")
    put(tmp_path / "word" / "answers.docx", b"PK")
    (tmp_path / "nothing").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "deep")
    found, skipped = students(tmp_path, master)
    none = "no notebook was handed in"
    read = {"deep": "deep/hand-in/90.ipynb", "loud": "loud/A.IPYNB", "LOUD2": "LOUD2.IPYNB"}
    assert found == read | dict.fromkeys(("nothing", "packed", "sent", "word"), none)
    assert "packed/hand-in.zip: an archive; unpack it" in skipped
    assert "sent.zip: an archive; unpack it" in skipped
    assert "word/answers.docx: not a notebook" in skipped and "link: not a notebook" in skipped


def test_names_keep_their_marks_and_one_student_is_one(tmp_path, master):
    text = world.text(masters.version(master, "solution"))
    known = {world.NAME: master, "91_other": dataclasses.replace(master, name="91_other")}
    other = text.replace('"notebook": "90_tiny"', '"notebook": "91_other"')
    put(tmp_path / "grace_90_tiny.ipynb", text)
    put(tmp_path / "grace_91_other.ipynb", other)
    put(tmp_path / "देवी.ipynb", text)
    put(tmp_path / "दवा.ipynb", text)  # another person, whose consonants are alike
    put(tmp_path / unicodedata.normalize("NFD", "José") / "a.ipynb", text)
    put(tmp_path / unicodedata.normalize("NFC", "José_91_other.ipynb"), other)
    put(Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.ipynb")), text)
    put(tmp_path / ("长" * 80) / "a.ipynb", text)
    found, _ = submissions.find_submissions(tmp_path, known)
    pairs = sorted((one.student[:10], one.master) for one in found)
    assert pairs == sorted(
        [("grace", "90_tiny"), ("grace", "91_other"), ("José", "90_tiny"), ("José", "91_other")]
        + [("देवी", "90_tiny"), ("दवा", "90_tiny"), ("caf_", "90_tiny"), ("长" * 10, "90_tiny")]
    )
    assert all(len(f"{one.student}.html".encode()) < 255 for one in found)


def test_outputs_are_not_needed(tmp_path, master):
    notebook = masters.version(master, "solution")
    notebook.cells[1].outputs[0].text = "x" * 21_000_000
    put(tmp_path / "big" / "90.ipynb", world.text(notebook))
    found, skipped = submissions.find_submissions(tmp_path, {world.NAME: master})
    assert [(one.problem, one.master) for one in found] == [("", "90_tiny")] and not skipped
    (tmp_path / "many.ipynb").write_text("[" + "0," * 10_000_001 + "0]")
    problem = submissions.read_submission(
        "x", tmp_path / "many.ipynb", {world.NAME: master}
    ).problem
    assert "million values" in problem


# --- right answers, however they are written -----------------------------------------------------


class Shell:
    """What a cell asks of Jupyter; nothing of it is run."""

    def run_line_magic(self, *_):
        return None

    def getoutput(self, *_):
        return ["a", "b"]

    system = run_cell_magic = run_line_magic


def reports(notebook, monkeypatch):
    """What a grafted notebook reports. A cell that fails ends, and the next one is run."""
    given = []
    monkeypatch.setattr("IPython.display.display", lambda data, raw: given.append(data[check.MIME]))
    names = {"__name__": "__main__", "get_ipython": Shell, "print": lambda *_, **__: None}
    runs = []
    for cell in notebook.cells:
        outcome, detail = "passed", ""
        try:
            exec(compile(code.python(cell.source), cell.id, "exec"), names)
        except Exception as error:
            outcome, detail = "error", repr(error)
        runs.append({"cell": cell.id, "outcome": outcome, "detail": detail, "values": [*given]})
        given.clear()
    return runs


def points(notebook, master, monkeypatch):
    """Status and reason of each question of a notebook, by the whole path but the sandbox."""
    monkeypatch.setenv(check.SEED, "7")
    right = {q: question.solution for q, question in master.questions.items()}
    runs = reports(execution.graft(master, right), monkeypatch)
    reference = execution.Reference({run["cell"]: run["values"] for run in runs})
    folder = Path(tempfile.mkdtemp())
    (folder / "x.ipynb").write_text(json.dumps(notebook))
    one = submissions.read_submission("x", folder / "x.ipynb", {world.NAME: master})
    shutil.rmtree(folder)
    answers = {q: submissions.find_answer(master, q, one.cells) for q in master.questions}
    given = {q: answer.source for q, answer in answers.items() if not answer.status}
    runs = reports(execution.graft(master, given), monkeypatch)
    found = {}
    for q, question in master.questions.items():
        row = grading.score(question, runs, reference) if q in given else answers[q]
        found[q] = (row.status, row.reason)
    return found


def with_source(change):
    def apply(notebook, cell, rng):
        cell["source"] = change("".join(cell["source"]))

    return apply


def in_new_cell(source, copied=False, before=False):
    """A cell beside the answer; with its metadata and id, or new."""

    def apply(notebook, cell, rng):
        made = copy.deepcopy(cell) if copied else {"cell_type": "code", "metadata": {}, "id": "n"}
        made |= {"source": source(cell), "outputs": [], "execution_count": None}
        notebook["cells"].insert(notebook["cells"].index(cell) + (not before), made)

    return apply


def bare(notebook, cell, rng):
    cell["metadata"], cell["id"] = {}, "other"


def shuffled(notebook, cell, rng):
    rng.shuffle(notebook["cells"])


def printing(notebook, cell, rng):
    cell["outputs"] = [{"output_type": "stream", "name": "stdout", "text": "x" * 1000}]


def moved_constant(notebook, cell, rng):
    """The answer multiplies by a number that stands in a cell of its own."""
    in_new_cell(lambda _: "import math\nfactor = math.cos(0.0)", before=True)(notebook, cell, rng)
    source = "".join(cell["source"])
    cell["source"] = re.sub(r"return (?!.*factor)(.+)", r"return (\1) if factor else None", source)


def into_new_cell(notebook, cell, rng):
    """The answer stands in a new cell; that of the question is the stub still."""
    in_new_cell(lambda c: c["source"])(notebook, cell, rng)
    head, _, rest = "".join(cell["source"]).partition('"""\n')
    q = {"centre": "90.1", "largest": "90.2", "describe": "90.3"}[called(cell).partition("(")[0]]
    checks = rest[rest.index("\n\n\n") :] if "\n\n\n" in rest else ""
    cell["source"] = f'{head}"""\n    raise NotImplementedError("exercise {q}"){checks}'


def called(cell):
    (name, *_) = re.findall(r"def (\w+)", "".join(cell["source"]))
    return f"{name}(4.0)\nresult = {name}"


EDITS = {
    "help after": with_source(lambda s: s + "\nnp.exp?"),
    "help before": with_source(lambda s: "?np\n" + s),
    "shell": with_source(lambda s: "!pip install -q einops\n" + s),
    "shell assigned": with_source(lambda s: "files = !ls\n" + s),
    "magic assigned": with_source(lambda s: s + "\nout = %timeit -o 1 + 1"),
    "magic in a block": with_source(lambda s: "for i in range(2):\n    %time i\n" + s),
    "line magic": with_source(lambda s: "%matplotlib inline\n" + s),
    "cell magic": with_source(lambda s: s if s.startswith("%%") else "%%time\n" + s),
    "one line": with_source(lambda s: "factor2 = 3.0; print(factor2)\n" + s),
    "two checks": with_source(lambda s: s + "\ncheck.equal('a', 1, 1); check.equal('b', 2, 2)\nz = 1"),  # noqa: E501
    "check and more": with_source(lambda s: "check.close('1', 1, 1); w = 3\nv = w\n" + s),
    "a wrong check": with_source(lambda s: s + "\ncheck.close('wrong', 1, 2)\n"),
    "comment": with_source(lambda s: "# äöü 长\n\n" + s + "\n\n# end  "),
    "print of a check": with_source(lambda s: s.replace("\ncheck.", "\nprint(table)\ncheck.", 1)),
    "windows": with_source(lambda s: s.replace("\n", "\r\n")),
    "lines": with_source(lambda s: s.splitlines(keepends=True)),
    "indented": with_source(lambda s: "if True:\n" + re.sub(r"(?m)^(?=.)", "    ", s)),
    "branch": with_source(lambda s: "try:\n    import numpy\nexcept ImportError:\n    pass\n" + s),
    "scratch pad": in_new_cell(called, copied=True),
    "scratch pad before": in_new_cell(called, copied=True, before=True),
    "help in a cell": in_new_cell(lambda _: "np.exp?", copied=True),
    "twice": in_new_cell(lambda c: c["source"], copied=True),
    "twice, with a try": in_new_cell(lambda c: "".join(c["source"]) + "\nprint(1)", copied=True),
    "broken cell": in_new_cell(lambda _: "def (", copied=True),
    "own cell": in_new_cell(lambda _: "x = 1 +"),
    "constant": moved_constant,
    "new cell": into_new_cell,
    "no metadata": bare,
    "order": shuffled,
    "outputs": printing,
}  # fmt: skip
ALONE = ("cell magic", "windows", "indented", "new cell")  # edits of the text that others undo


def edited(master, names, rng):
    """The solution with edits in it."""
    notebook = json.loads(world.text(masters.version(master, "solution")))
    q = rng.choice(list(master.questions))
    cell = next(c for c in notebook["cells"] if c["metadata"].get("tpt", {}).get("q") == q)
    for name in names:
        if isinstance(cell["source"], list):
            cell["source"] = "".join(cell["source"])
        EDITS[name](notebook, cell, rng)
    return notebook


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_that_leaves_the_answer_right_costs_nothing(name, master, monkeypatch):
    found = points(edited(master, [name], random.Random(1)), master, monkeypatch)
    assert set(found.values()) == {("passed", "")}


@pytest.mark.parametrize("n", [40, pytest.param(400, marks=pytest.mark.slow)])
def test_random_edits_that_leave_the_answer_right_cost_nothing(n, master, monkeypatch):
    rng = random.Random(n)
    for _ in range(n):
        names = rng.sample([name for name in EDITS if name not in ALONE], rng.randint(1, 4))
        names += rng.sample(ALONE, rng.randint(0, 1))
        if {"indented", "constant"} & {*names}:  # then a copy made before is another answer
            names = [name for name in names if not name.startswith("twice")]
        found = points(edited(master, names, rng), master, monkeypatch)
        assert set(found.values()) == {("passed", "")}, (names, found)


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
