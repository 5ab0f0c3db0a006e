"""Values that papermill gives: refused in a line before anything runs, or made to fit."""

import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook

from tpt_nb.lessons import parameters

REPO = Path(__file__).resolve().parents[2]
CELL = """\
profile: str = "auto"  # a comment = with a sign
root: str = ""
n: int = 200
rho: float = 0.1
rate: float = None
fast: bool = False
rates: list = [1e-3]
twice = 2 * 3
"""
KNOWN = parameters.assigned(CELL)


@pytest.mark.parametrize(
    "name, value, fits",
    [
        ("root", 2024, "2024"),
        ("root", "x", "x"),
        ("root", 1.5, "1.5"),
        ("n", 3.0, 3),
        ("rho", 1, 1),
        ("rate", None, None),
        ("rate", 0.1, 0.1),
        ("fast", True, True),
        ("rates", [0.1], [0.1]),
        ("twice", "anything", "anything"),
    ],
)
def test_values_are_made_to_fit(name, value, fits):
    got = parameters.check(KNOWN, {name: value})[name]
    assert got == fits and type(got) is type(fits)


@pytest.mark.parametrize(
    "name, value, says",
    [
        ("roots", "x", "unknown parameter 'roots'; did you mean 'root'"),
        ("n", "ten", "n is 'ten' (str); it must be int (default 200)"),
        ("n", 2.5, "n is 2.5"),
        ("n", None, "n is None"),
        ("n", True, "n is True (bool)"),
        ("rho", "x", "it must be float"),
        ("rate", "x", "it must be float"),
        ("fast", 1, "it must be bool"),
        ("root", True, "it must be str"),
        ("rates", "[1]", "it must be list"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_line(name, value, says):
    with pytest.raises(parameters.WrongParameter) as error:
        parameters.check(KNOWN, {name: value})
    assert says in str(error.value) and "\n" not in str(error.value)
    assert error.value._render_traceback_() == [f"WrongParameter: {error.value}"]


def test_only_papermills_cell_behind_the_parameters_is_looked_at():
    injected = ["# Parameters\n", "root = 2024\n", "n = 3\n"]
    assert parameters.replaced(injected, CELL) == [*injected, "\n", "root = '2024'\n"]
    assert parameters.replaced(["x = 1\n"], CELL) == ["x = 1\n"]
    assert parameters.replaced(["# Parameters\n", "x = 1\n"], "print(1)") == [
        "# Parameters\n",
        "x = 1\n",
    ]
    with pytest.raises(parameters.WrongParameter):
        parameters.replaced(["# Parameters\n", "x = 1\n"], CELL)


def papermill(folder: Path, *options: str) -> subprocess.CompletedProcess:
    """A notebook of three cells through raw papermill; its last cell writes what it got."""
    cells = [
        new_code_cell("from tpt_nb.lessons import parameters\n\nparameters.watch()"),
        new_code_cell(CELL, metadata={"tags": ["parameters"]}),
        new_code_cell("open('got', 'w').write(repr((root, n)))"),
    ]
    kernel = {"kernelspec": {"name": "python3", "display_name": "x", "language": "python"}}
    nbformat.write(new_notebook(cells=cells, metadata=kernel), folder / "a.ipynb")
    command = [sys.executable, "-m", "papermill", "a.ipynb", "b.ipynb", "--no-progress-bar"]
    return subprocess.run([*command, *options], cwd=folder, capture_output=True, text=True)


def test_raw_papermill_refuses_an_unknown_name_and_takes_a_folder_named_like_a_number(tmp_path):
    done = papermill(tmp_path, "-p", "roots", "x")
    assert done.returncode == 1 and not (tmp_path / "got").exists()
    assert "WrongParameter: unknown parameter 'roots'; did you mean 'root'?" in done.stderr
    assert "Traceback" not in done.stderr.split("Exception encountered")[-1]
    done = papermill(tmp_path, "-p", "root", "2024", "-p", "n", "3")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "got").read_text() == "('2024', 3)"


@pytest.mark.parametrize(
    "options, says",
    [
        (["-p", "n_auf", "3", "--only", "02"], "did you mean 'n_aug'"),
        (["-p", "n", "many", "--only", "02"], "n is 'many' (str); it must be int"),
        (["--only", "77"], "there is no notebook 77"),
        (["--nothing"], "unrecognized arguments: --nothing"),
    ],
)
def test_a_mistake_is_answered_before_anything_is_installed(tmp_path, options, says):
    """Without packages: -S leaves site-packages out, as in a fresh clone."""
    command = [sys.executable, "-S", str(REPO / "ci" / "run_options.py"), *options]
    done = subprocess.run(command, capture_output=True, text=True, env={})
    assert done.returncode == 2 and says in done.stderr and "Traceback" not in done.stderr


def test_the_commands_answer_help_and_mistakes_before_they_install(tmp_path):
    for name in ("run", "test", "env.sh", "run_options.py"):
        (tmp_path / "ci").mkdir(exist_ok=True)
        (tmp_path / "ci" / name).write_text((REPO / "ci" / name).read_text())
    for name in ("tpt_nb", "notebooks", "requirements.txt"):
        (tmp_path / name).symlink_to(REPO / name)

    def bash(*command: str) -> subprocess.CompletedProcess:
        return subprocess.run(["bash", *command], cwd=tmp_path, capture_output=True, text=True)

    assert "usage: bash ci/run" in bash("ci/run", "--help").stdout
    assert bash("ci/run", "--only", "77").returncode == 2
    assert "--lowest" in bash("ci/test", "--help").stdout
    assert bash("ci/test", "--everything").returncode == 2
    assert not (tmp_path / ".venv").exists()
