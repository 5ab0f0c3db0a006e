"""ci/test does not execute again what ci/run has just executed, and notices all that differs."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO / "ci"))
import ran  # noqa: E402

CODE = "open('executed', 'a').close()\nprint('41.5 %')"


def notebook(said: str = "41.5 %\n", code: str = CODE) -> nbformat.NotebookNode:
    """A cell to be compared, one that shows something, and an empty one."""
    cell = new_code_cell(code, execution_count=1, metadata={"tags": ["nbval-check-output"]})
    cell.outputs = [new_output("stream", name="stdout", text=said)]
    shown = new_code_cell("1 + 1", execution_count=2)
    shown.outputs = [new_output("execute_result", {"text/plain": "2"}, execution_count=2)]
    return new_notebook(cells=[cell, shown, new_code_cell("")])


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A repository with one notebook, as ci/run leaves it after executing it."""
    for name in ("notebooks/sweeps", "tpt_nb/rooms", "data", "out"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "tpt_nb" / "rooms" / "a.py").write_text("x = 1")
    (tmp_path / "data" / "b.bin").write_bytes(b"\0")
    shutil.copy(REPO / "notebooks" / "conftest.py", tmp_path / "notebooks")
    (tmp_path / "requirements.txt").write_text("# a list\ntorch>=2\nno-such-package\n")
    monkeypatch.setattr(ran, "REPO", tmp_path)
    monkeypatch.setattr(ran, "OUT", tmp_path / "out")
    path = tmp_path / "notebooks" / "01_a.ipynb"
    nbformat.write(notebook(), path)
    nbformat.write(notebook(), tmp_path / "out" / "01_a.ipynb")
    report(tmp_path, of=ran.fingerprint(path))
    return tmp_path


def report(root: Path, **values) -> None:
    entry = {"name": "01_a", "passed": True, "of": "", **values}
    (root / "out" / "results.json").write_text(json.dumps({"notebooks": [entry]}))


def there(root: Path) -> bool:
    return ran.executed(root / "notebooks" / "01_a.ipynb") is not None


def test_what_was_executed_from_these_files_is_there(root, capsys):
    assert there(root)
    assert ran.main([str(root / "notebooks" / "01_a.ipynb"), "02_b.ipynb"]) == 0
    assert "1 of 2 notebooks" in capsys.readouterr().out


def edit(name: str, text: str):
    return lambda root: (root / name).write_text(text)


CHANGES = {
    "package": edit("tpt_nb/rooms/a.py", "x = 2"),
    "new_file": edit("tpt_nb/rooms/b.py", ""),
    "moved": lambda root: (root / "tpt_nb/rooms/a.py").rename(root / "tpt_nb/a.py"),
    "data": edit("data/b.bin", "other"),
    "sweep": edit("notebooks/sweeps/c.yaml", "a: 1"),
    "code": lambda root: nbformat.write(
        notebook(code=CODE + "\n"), root / "notebooks" / "01_a.ipynb"
    ),
    "failed": lambda root: report(root, passed=False, of=ran.fingerprint(root / "out/01_a.ipynb")),
    "own_parameters": report,
    "older_report": edit("out/results.json", '{"notebooks": [{"name": "01_a", "passed": true}]}'),
    "damaged_report": edit("out/results.json", "{"),
    "other_report": edit("out/results.json", "[]"),
    "no_report": lambda root: (root / "out/results.json").unlink(),
    "no_output": lambda root: (root / "out/01_a.ipynb").unlink(),
    "other_output": lambda root: nbformat.write(
        notebook(code="1"), root / "out" / "01_a.ipynb"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_anything_that_differs_is_executed_again(root, name):
    CHANGES[name](root)
    assert not there(root)


def test_another_version_of_what_is_required_counts_and_of_nothing_else(root, monkeypatch):
    """bash ci/test installs more than bash ci/run: pytest, ruff ..."""
    versions = {"torch": ran.version("torch"), "pytest": "0.0"}
    monkeypatch.setattr(ran, "version", versions.__getitem__)
    assert there(root)
    versions["torch"] = "0.0"
    assert not there(root)


def test_the_text_and_the_outputs_of_a_notebook_do_not_count(root):
    path = root / "notebooks" / "01_a.ipynb"
    changed = notebook("another %\n")
    changed.cells.insert(0, nbformat.v4.new_markdown_cell("# A title"))
    nbformat.write(changed, path)
    assert there(root)


def nbval(root: Path, *options: str) -> subprocess.CompletedProcess:
    """pytest with the plugin, on the notebook, as ci/test calls it."""
    code = "import sys, pytest, ran; from pathlib import Path; ran.REPO = Path(sys.argv[1]); "
    code += "ran.OUT = ran.REPO / 'out'; sys.exit(pytest.main(sys.argv[2:]))"
    command = [sys.executable, "-c", code, str(root), "-p", "ran", "-q", "-rf"]
    command += ["-p", "no:cacheprovider", "--nbval-lax", "--nbval-current-env", *options]
    env = os.environ | {"PYTHONPATH": str(REPO / "ci")}
    return subprocess.run(
        [*command, "01_a.ipynb"],
        cwd=root / "notebooks",
        capture_output=True,
        text=True,
        timeout=200,
        env=env,
    )


def test_outputs_are_compared_and_nothing_is_executed(root):
    done = nbval(root)
    assert done.returncode == 0 and "3 passed" in done.stdout, done.stdout
    assert not (root / "notebooks" / "executed").exists()
    nbformat.write(notebook("41.4 %\n"), root / "notebooks" / "01_a.ipynb")
    done = nbval(root)
    assert done.returncode == 1 and "FAILED 01_a.ipynb::Cell 0" in done.stdout, done.stdout
    assert not (root / "notebooks" / "executed").exists()


def test_what_has_changed_since_is_executed(root):
    (root / "tpt_nb" / "rooms" / "a.py").write_text("x = 2")
    done = nbval(root)
    assert done.returncode == 0 and "3 passed" in done.stdout, done.stdout
    assert (root / "notebooks" / "executed").exists()
