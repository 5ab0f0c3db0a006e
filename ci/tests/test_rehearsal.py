"""The rehearsal of the full profile: its parts, and (slow) all of it with small weights."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO / "ci"))

import rehearse  # noqa: E402
import rehearse_world  # noqa: E402


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    """An interpreter and the variables of a machine like Colab's."""
    room = tmp_path_factory.mktemp("room")
    (room / "home").mkdir()
    return rehearse.interpreter(room), rehearse.environment(room, "http://127.0.0.1:9"), room


def test_the_machine_has_the_packages_but_not_tpt_nb(machine):
    python, env, room = machine
    code = "from importlib.util import find_spec as f\n"
    code += "print([bool(f(m)) for m in ('torch', 'open_clip', 'papermill', 'tpt_nb')])"
    done = subprocess.run([str(python), "-c", code], cwd=room / "home", env=env, text=True,
                          capture_output=True)  # fmt: skip
    assert done.stdout.strip() == "[True, True, True, False]", done.stderr


def test_the_first_cell_of_a_notebook_alone_clones_what_is_here(machine, tmp_path):
    python, env, _ = machine
    for path in sorted((REPO / "notebooks").glob("[0-9][0-9]_*.ipynb")):
        assert rehearse.CLONED.search(path.read_text("utf-8")).groups() == rehearse.addresses()
    cells = nbformat.read(path, 4).cells
    source = next(c.source for c in cells if c.cell_type == "code")
    source = source[: source.index("from tpt_nb.lessons import")]
    source += "\nimport tpt_nb; print(tpt_nb.__file__)"
    done = subprocess.run([str(python), "-c", source], cwd=tmp_path, env=env, text=True,
                          capture_output=True)  # fmt: skip
    assert done.stdout.strip() == str(tmp_path / "tpt_nb_clone" / "tpt_nb" / "__init__.py"), done
    here = REPO / "tpt_nb" / "core" / "download.py"  # as it is now, committed or not
    assert (tmp_path / "tpt_nb_clone" / "tpt_nb" / "core" / "download.py").read_bytes() == (
        here.read_bytes()
    )


@pytest.mark.slow
def test_a_killed_notebook_and_its_kernel_are_gone_and_start_again(tmp_path):
    cells = [new_code_cell("import os; open('pid', 'w').write(str(os.getpid()))")]
    cells += [new_code_cell("print(2)"), new_code_cell("import time; time.sleep(60)")]
    nbformat.write(new_notebook(cells=cells), tmp_path / "x.ipynb")
    out = tmp_path / "executed.ipynb"
    command = [sys.executable, "-m", "papermill", "x.ipynb", out.name, "-k", "python3"]
    command += ["--no-progress-bar", "--autosave-cell-every", "0"]
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}
    assert rehearse.papermill(command, env, out, 0.5) is None
    assert rehearse.executed(out) == (2, 3)
    kernel = int((tmp_path / "pid").read_text())
    assert not Path(f"/proc/{kernel}").exists() or "Z" in Path(f"/proc/{kernel}/stat").read_text()
    cells[-1].source = "print(3)"
    nbformat.write(new_notebook(cells=cells), tmp_path / "x.ipynb")
    assert rehearse.papermill(command, env, out, 2.0) == 0 and rehearse.executed(out) == (3, 3)


def executed(folder: Path, *outputs) -> Path:
    path = folder / "executed.ipynb"
    nbformat.write(new_notebook(cells=[new_code_cell("x", outputs=list(outputs))]), path)
    return path


def test_success_is_no_error_and_what_should_be_said(tmp_path):
    case, said = rehearse.Case("03", "profile full ("), "profile full (asked for): RN50"
    text = new_output("stream", name="stdout", text=said)
    assert rehearse.verdict(case, executed(tmp_path, text), 0) == ""
    assert rehearse.verdict(case, executed(tmp_path, text), 1) == "exit code 1"
    error = new_output("error", ename="ValueError", evalue="no", traceback=["at line 3"])
    assert "ValueError: no" in rehearse.verdict(case, executed(tmp_path, text, error), 0)
    mini = new_output("stream", name="stdout", text="profile mini (no GPU)")
    found = rehearse.verdict(case, executed(tmp_path, mini), 0)
    assert "never says 'profile full ('" in found and "profile mini (no GPU)" in found


def test_records_of_a_killed_run_come_back_unchanged(tmp_path):
    path = tmp_path / "run" / "records.jsonl"
    path.parent.mkdir()
    path.write_text('{"id": 1}\n{"id": 2}\n{"id"')  # cut in the middle of a line
    before = rehearse.records(tmp_path)
    assert list(before.values()) == [b'{"id": 1}\n{"id": 2}\n'] and not rehearse.changed(before)
    path.write_text('{"id": 1}\n{"id": 2}\n{"id": 3}\n')
    assert rehearse.changed(before) == ""
    path.write_text('{"id": 2}\n{"id": 1}\n')
    assert "run" in rehearse.changed(before)


def test_every_notebook_is_rehearsed_in_full():
    numbers = {p.name[:2] for p in (REPO / "notebooks").glob("[0-9][0-9]_*.ipynb")}
    of_full = {
        c.number for c in rehearse.CASES if "mini" not in c.says and "for full" not in c.says
    }
    assert numbers <= of_full | {"00"}
    for path in (REPO / "notebooks").glob("[0-9][0-9]_*.ipynb"):
        cells = nbformat.read(path, 4).cells
        given = [c.source for c in cells if "parameters" in c.metadata.get("tags", [])]
        known = set(re.findall(r"^(\w+):", "\n".join(given), re.MULTILINE))
        for case in (c for c in rehearse.CASES if c.number == path.name[:2]):
            assert set(case.values) <= known, (case.title, set(case.values) - known)


@pytest.mark.slow
def test_the_rehearsal_passes(tmp_path, capsys):
    assert not rehearse.main(["--size", "quick", "--out", str(tmp_path / "room")]), (
        capsys.readouterr().out[-6000:]
    )
    report = json.loads((tmp_path / "room" / "rehearsal.json").read_text())
    assert not report["failed"] and len(report["cases"]) == len(rehearse.CASES)
    assert sum(case["records_kept"] for case in report["cases"]) > 0
    served = {"RN50.pt", "imagenet-a.tar", "coop-weights.zip"}
    assert served <= set(report["downloaded"])
    assert rehearse_world.LAYERS["whole"] == ((3, 4, 6, 3), 12)
