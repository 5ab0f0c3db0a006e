"""The grader: what submissions of every kind are worth, and that none harms another."""

import csv
import json
import os
import socket
from pathlib import Path

import course_world as world
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from tpt_nb.course import execution, feedback, grading, masters, sandbox, values
from tpt_nb.course.__main__ import main

QUICK = ("reference", "partly", "os_exit", "patches_everything", "forges_values", "reads_the_key")
QUICK += ("opens_a_socket", "blank", "not_json", "jupyter")
OPTIONS = {"cell_seconds": 60, "limits": sandbox.Limits(seconds=600)}


def hides() -> str:
    """A way that hides files and network, or skip."""
    try:
        way = sandbox.choose()
    except RuntimeError as error:
        pytest.skip(str(error))
    if way == "rlimits":
        pytest.skip("neither namespaces nor bubblewrap work on this machine")
    return way


class Class:
    """A class of students and their grades."""

    def __init__(self, folder: Path, names: tuple[str, ...] | None, jobs: int):
        self.masters = masters.load_masters(world.write_master(folder / "masters"))
        master = self.masters[world.NAME]
        key = folder / "masters" / f"{world.NAME}.ipynb"
        student, solution = masters.version(master, "student"), masters.version(master, "solution")
        (folder / "key.txt").write_text("THE KEY")
        kinds = world.submissions(student, solution, key)
        self.kinds = {name: kinds[name] for name in names or kinds}
        self.folder, self.cache = folder / "in", folder / "cache"
        self.folder.mkdir()
        self.options = execution.Options(way=hides(), **OPTIONS)
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            listener.listen()
            port = str(listener.getsockname()[1])
            for name, (text, *_) in self.kinds.items():
                (self.folder / f"{name}.ipynb").write_text(text.replace("PORT", port))
            self.rows, self.handed_in = self.grade(jobs)

    def grade(self, jobs: int = 1):
        return grading.grade(
            self.folder, self.masters, self.options, jobs, self.cache, say=lambda line: None
        )

    def of(self, name: str) -> list[grading.Row]:
        return [row for row in self.rows if row.student == name]

    def check(self, name: str) -> None:
        """Is a submission worth what it should be?"""
        _, expected, points = self.kinds[name]
        rows = self.of(name)
        assert [row.question for row in rows] == ["90.1", "90.2", "90.3"]
        for row, allowed in zip(rows, expected, strict=True):
            allowed = (allowed,) if isinstance(allowed, str) else allowed
            assert row.status in allowed, (row, expected)
            assert row.reason or row.status == "passed"
            assert row.points == row.max or row.status != "passed"
            assert row.points == 0 or row.status in ("passed", "partial")
        if points is not None:
            assert sum(row.points for row in rows) == points


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    return Class(tmp_path_factory.mktemp("quick"), QUICK, jobs=2)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return Class(tmp_path_factory.mktemp("whole"), None, jobs=os.cpu_count() or 1)


@pytest.mark.parametrize("name", QUICK)
def test_what_a_submission_is_worth(name, quick):
    quick.check(name)


def test_the_key_and_the_network_were_out_of_reach(quick):
    reasons = {name: quick.of(name)[1].reason for name in ("reads_the_key", "opens_a_socket")}
    assert "found []" in reasons["reads_the_key"]
    assert "no network" in reasons["opens_a_socket"]


def test_a_second_time_nothing_runs_and_a_changed_one_alone_runs(quick, monkeypatch):
    ran = []
    run = sandbox.run
    monkeypatch.setattr(sandbox, "run", lambda *a, **k: ran.append(1) or run(*a, **k))
    assert quick.grade()[0] == quick.rows and not ran
    text = (quick.folder / "reference.ipynb").read_text()
    try:
        (quick.folder / "reference.ipynb").write_text(text.replace("offset + x", "x + offset"))
        assert quick.grade()[0] == quick.rows and len(ran) == 2  # the reference solutions, and it
    finally:
        (quick.folder / "reference.ipynb").write_text(text)


def test_only_what_is_cached_was_graded_before(quick, tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.ipynb").write_text("torn")
        (tmp_path / f"{world.NAME}_{name}.ipynb").write_text("torn")
    (tmp_path / "ada.ipynb").write_text((quick.folder / "blank.ipynb").read_text())
    (tmp_path / "empty").mkdir()
    two = dict(quick.masters) | {"91_other": quick.masters[world.NAME]}  # no guess for a torn file
    lines = []
    rows, _ = grading.grade(tmp_path, two, quick.options, cache=quick.cache, say=lines.append)
    assert "6 submissions, 3 graded before" in lines  # three answer no notebook that is known
    status = {(row.student, row.question): row.status for row in rows if row.student != "ada"}
    assert status["a", "90.1"] == status["b", "90.1"] == "unreadable"
    assert {s for (name, _), s in status.items() if name == "empty"} == {"missing"}


def test_grades_and_feedback_are_written(quick, tmp_path):
    out = tmp_path / "grades.csv"
    sums, pages = feedback.write_grades(out, quick.rows, quick.handed_in, quick.masters)
    rows = list(csv.DictReader(out.open()))
    assert len(rows) == 3 * len(QUICK)
    assert list(rows[0]) == [
        *("student", "notebook", "question", "points", "max", "status", "reason"),
    ]
    total = {row["student"]: row for row in csv.DictReader(sums.open())}
    assert total["reference"]["percent"] == "100.0" and total["blank"]["percent"] == "0.0"
    assert (total["partly"]["points"], total["partly"]["max"]) == ("4.5", "6.0")
    page = (pages / "partly.html").read_text()
    assert "4.5 of 6 points" in page and "[0] * k" in page and "x.std() else" in page
    assert "argsort(-x, kind" not in page and "check.seed" not in page
    forged = (pages / "patches_everything.html").read_text()
    assert "lambda x: np.zeros(())" in forged and "&#x27;" in forged


def test_the_seed_is_new_each_time_and_reaches_the_answers(quick, monkeypatch):
    seeds = []

    def execute(notebook, seed, options):
        seeds.append(seed)
        return [], "stopped"

    monkeypatch.setattr(execution, "execute", execute)
    for _ in range(2):
        with pytest.raises(masters.Mistake, match="the reference solutions do not run: stopped"):
            grading.grade(quick.folder, quick.masters, quick.options, say=lambda line: None)
    assert len(set(seeds)) == 2


def test_the_command_grades_a_folder(quick, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TPT_NB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(grading, "grade_one", lambda one, master, *_: quick.of(one.student))
    monkeypatch.setattr(grading, "run_reference", lambda *_: execution.Reference({}))
    notebooks = str(quick.folder.parent / "masters")
    command = ["grade", str(quick.folder), "--out", str(tmp_path / "g.csv")]
    assert main([*command, "--notebooks", notebooks]) == 0
    shown = capsys.readouterr().out
    assert f"isolation: {quick.options.way}" in shown and "100.0 %" in shown
    assert (tmp_path / "g_feedback" / "blank.html").exists()
    assert main(["grade", str(tmp_path / "gone"), "--notebooks", notebooks]) == 2
    assert "there is no folder" in capsys.readouterr().err


def test_a_key_in_a_folder_that_answers_see_is_noticed(tmp_path):
    assert grading.exposed([tmp_path]) == []
    inside = Path(os.__file__).parent / "json"
    assert grading.exposed([tmp_path, inside]) == [str(inside.resolve())]


def value(what="v", **more):
    return {"what": what, "atol": 0.1, **more}


def array(*numbers, shape=None, **more):
    import base64

    import numpy as np

    data = base64.b64encode(np.array(numbers, "<f8").tobytes()).decode()
    return value(shape=[len(numbers)] if shape is None else shape, data=data, **more)


@pytest.mark.parametrize(
    ("got", "expected", "problem"),
    [
        (array(1.0, 2.05), array(1.0, 2.0), ""),
        (array(1.0, 2.2), array(1.0, 2.0), "largest difference is 0.2, allowed is 0.1"),
        (array(1.0, 2.2, atol=9), array(1.0, 2.0), "allowed is 0.1"),  # not the answer's to say
        (array(1.0, float("nan")), array(1.0, 2.0), "difference is nan"),
        (array(1.0), array(1.0, 2.0), "shape [1], not [2]"),
        (array(1.0, shape=[1, 1]), array(1.0), "shape [1, 1], not [1]"),
        (array(1.0, 2.0, shape=[1]), array(1.0), "not a number"),
        (value(shape=[1], data="?"), array(1.0), "not a number"),
        (value(shape=[1], data=None), array(1.0), "not a number"),
        (value(shape=[1]), array(1.0), "not a number"),
        (value(json="a"), array(1.0), "not a number"),
        (array(1.0, what="w"), array(1.0), "no value"),
        (None, array(1.0), "no value"),
        ([1], array(1.0), "no value"),
        (value(json={"a": [1]}), value(json={"a": [1]}), ""),
        (value(json={"a": [2]}), value(json={"a": [1]}), "not what it should be"),
        (array(1.0), value(json="a"), "not what it should be"),
    ],
)
def test_values_are_compared_outside(got, expected, problem):
    found = values.differs(got, expected)
    assert (problem in found) if problem else found == ""


def test_a_reference_that_is_not_finite_is_a_mistake(quick, monkeypatch):
    master = quick.masters[world.NAME]
    cells = [cell for q in master.questions.values() for cell in execution.test_cells(q)]
    runs = [
        {"cell": c, "outcome": "passed", "detail": "", "values": [array(float("inf"))]}
        for c in cells
    ]
    monkeypatch.setattr(execution, "execute", lambda *_: (runs, ""))
    with pytest.raises(masters.Mistake, match="is not finite"):
        execution.run_reference(master, 0, quick.options)


def test_a_report_of_any_form_is_read(quick, monkeypatch):
    lines = [b"[]", b"3", b"{", b"\xff", b"{}", b'{"cell": "a", "event": "end"}', b"[" * 9999]
    lines += [b'{"cell": "a", "event": "start"}', b'{"cell": "a", "event": "end", "outcome": []}']
    outcome = sandbox.Outcome(0, "", b"\n".join(lines), "")
    monkeypatch.setattr(sandbox, "run", lambda *a, **k: outcome)
    runs, ended = execution.execute(world.master(), 0, quick.options)
    assert ended == "" and [run["cell"] for run in runs] == ["a"]
    assert json.dumps(runs)


@pytest.mark.parametrize(("q", "status"), [("90.1", "blank"), ("90.2", "error")])
def test_a_stub_is_blank_where_it_is_not_another_one_that_an_answer_called(tmp_path, q, status):
    (master,) = masters.load_masters(world.write_master(tmp_path)).values()
    question = master.questions["90.1"]
    reference = execution.Reference({"ex1-test": [array(1.0)]})
    run = {"cell": "ex1-test", "outcome": "error", "values": []}
    run["detail"] = f"NotImplementedError: exercise {q}"
    row = grading.score(question, [run], reference)
    assert (row.status, row.points) == (status, 0) and q in row.reason


def test_the_master_s_own_cells_have_more_time_than_an_answer():
    sleep = "import time\ntime.sleep({})"
    cells = [new_code_cell(sleep.format(4), id="setup")]
    for name in ("quick", "slow", "never"):
        source = sleep.format(0 if name == "quick" else 4)
        cells.append(new_code_cell(source, id=name, metadata={"tpt": {"q": name}}))
    options = execution.Options(way=hides(), cell_seconds=2)
    runs, ended = execution.execute(new_notebook(cells=cells), 0, options)
    assert ended == ""
    found = [(run["cell"], run["outcome"]) for run in runs]
    assert found == [("setup", "passed"), ("quick", "passed"), ("slow", "time-out")]
    assert runs[-1]["detail"] == "not finished within 2 s"


@pytest.mark.slow
def test_what_every_submission_is_worth(whole):
    problems = []
    for name in whole.kinds:
        try:
            whole.check(name)
        except AssertionError as error:
            problems.append(f"{name}: {error}")
    assert not problems
    assert "found []" in whole.of("reads_the_key")[1].reason
    assert "no network" in whole.of("opens_a_socket")[1].reason
    assert Path("/usr").is_dir() and (whole.folder.parent / "key.txt").read_text() == "THE KEY"
