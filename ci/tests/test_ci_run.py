"""ci/run against small notebooks that are broken on purpose, each in another way."""

import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import nbformat
import psutil
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO / "ci"))
import ran  # noqa: E402
from notebook_format import normalise, problems  # noqa: E402
from run_notebooks import Notebook, Running, finish, verdict  # noqa: E402
from run_options import as_text  # noqa: E402

SUMMARY = {
    "name": "iconshift-a_mini_tpt_naug=7_0a1b2c3d",
    "dataset": "iconshift-a",
    "model": "mini",
    "method": "tpt",
    "n": 100,
    "accuracy_before": 0.3,
    "accuracy_after": 0.35,
    "gain": 0.05,
    "gain_ci95": [-0.01, 0.11],
}
WRITE_RUN = f"""
import json, os, pathlib
folder = pathlib.Path(out_dir) / {SUMMARY["name"]!r}
folder.mkdir(parents=True, exist_ok=True)
summary = {SUMMARY!r} | {{"by": os.environ["TPT_NB_BY"]}}
_ = (folder / "summary.json").write_text(json.dumps(summary))
print("run in", folder)
"""
PICTURE = """
import base64
from IPython.display import display
dot = ("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNkYPhfDwAChwGA60e6kgAAAABJRU5E"
       "rkJggg==")
display({"image/png": dot, "text/plain": "a dot"}, raw=True,
        metadata={"image/png": {"alt": "one dot"}})
"""
PARAMETERS = 'profile: str = "auto"\nout_dir: str = "out/runs"\nn: int = 3'
NOTEBOOKS = {
    "01_fine": ["print(profile, n)", "", WRITE_RUN, PICTURE, "2 * n"],
    "02_raises": ["x = 1", "x / 0\nprint('not reached')", "print('later')"],
    "03_stops": ["x = 1", "import sys\nsys.exit(0)", "print('later')"],
    "04_dies": ["x = 1", "import os\nos._exit(1)", "print('later')"],
    "05_hangs": ["x = 1", "import time\ntime.sleep(300)", "print('later')"],
    # takes longer than the limit, but moves
    "06_slow": ["import time\nfor i in range(12):\n    print(i, flush=True)\n    time.sleep(2)"],
}


def write(path: Path, sources: list[str]) -> Path:
    """A notebook: a title, the parameters, then code cells."""
    tagged = new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]})
    cells = [new_markdown_cell("# Title"), tagged, *map(new_code_cell, sources)]
    notebook = new_notebook(cells=cells)
    notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3"}
    nbformat.write(notebook, path)
    return path


def ci_run(folder: Path, out: Path, *options: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(REPO / "ci" / "run_notebooks.py")]
    command += ["--notebooks", str(folder), "--out", str(out), *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("notebooks")
    for name, sources in NOTEBOOKS.items():
        write(folder / f"{name}.ipynb", sources)
    return folder


@pytest.fixture(scope="module")
def everything(folder, tmp_path_factory):
    """All of them run once, with twenty seconds without progress: (process, out)."""
    out = tmp_path_factory.mktemp("out")
    return ci_run(folder, out, "--profile", "mini", "--timeout", "20"), out


def test_exit_code_and_last_lines(everything):
    process, _ = everything
    assert process.returncode == 1
    assert process.stdout.splitlines()[-1].startswith("ci/run: 2 passed, 4 failed, ")


@pytest.mark.parametrize(
    "line",
    [
        # cells are counted from 1, as a reader counts them: the title is 1, the parameters 2
        "FAILED: 02_raises, cell 4 `x / 0`: ZeroDivisionError: division by zero",
        "FAILED: 03_stops, cell 4 `import sys`: SystemExit: 0",
        "FAILED: 04_dies, cell 4 `import os`: the kernel died",
        "FAILED: 05_hangs, cell 4 `import time`: no progress for 20 s",
    ],
)
def test_failures_name_notebook_and_cell(everything, line):
    process, _ = everything
    assert line in process.stdout


def test_out_has_pages_logs_and_results(everything):
    process, out = everything
    assert "mini 3" in (out / "logs" / "01_fine.log").read_text()  # the parameter arrived
    assert 'alt="one dot"' in (out / "01_fine.html").read_text()
    index = (out / "index.html").read_text()
    assert "01_fine.html" in index and "ZeroDivisionError" in index
    report = json.loads((out / "results.json").read_text())
    assert [entry["name"] for entry in report["notebooks"]] == list(NOTEBOOKS)
    assert [entry["passed"] for entry in report["notebooks"]] == [True] + 4 * [False] + [True]
    assert not any(entry["of"] for entry in report["notebooks"])  # with a parameter of ours
    assert "http-equiv" not in index  # nothing more to come
    (run,) = report["runs"]
    assert run["notebook"] == "01_fine" and run["accuracy_after"] == 0.35
    assert "+5.0 [-1.0, +11.0]" in process.stdout
    assert "not CLIP on ImageNet" in process.stdout and "not CLIP on ImageNet" in index


MEET = """
import os, pathlib, time
out = pathlib.Path(out_dir).parent
(out / NAME).touch()
end = time.monotonic() + 100
while not (out / OTHER).exists() and time.monotonic() < end:
    time.sleep(0.1)
assert (out / OTHER).exists(), "the other notebook does not run"
"""
LOOK = """
page = (out / "index.html").read_text()
while "running" not in page and time.monotonic() < end:
    time.sleep(0.5)
    page = (out / "index.html").read_text()
assert "http-equiv" in page and "running (cell" in page and "min left" in page or "s left" in page
print("threads:", os.environ["OMP_NUM_THREADS"])
"""


def test_notebooks_run_beside_each_other_and_the_page_grows(tmp_path):
    for name, other in (("a", "b"), ("b", "a")):
        source = MEET.replace("NAME", repr(name)).replace("OTHER", repr(other))
        write(tmp_path / f"0{'ab'.index(name) + 1}_{name}.ipynb", [source, LOOK])
    process = ci_run(tmp_path, tmp_path / "out", "--jobs", "2")
    assert process.returncode == 0, process.stdout + process.stderr
    assert "Executing 2 notebooks, 2 at a time" in process.stdout
    assert "running: 01_a (cell" in process.stdout
    for name in ("01_a", "02_b"):
        assert "threads: 1" in (tmp_path / "out" / "logs" / f"{name}.log").read_text()
        assert f"{tmp_path}/out/{name}.html" in process.stdout


def test_later_call_keeps_what_an_earlier_one_found(folder, everything):
    _, out = everything
    process = ci_run(folder, out, "--only", "2")
    assert process.returncode == 1
    report = json.loads((out / "results.json").read_text())
    assert [entry["name"] for entry in report["notebooks"]] == list(NOTEBOOKS)
    assert report["runs"][0]["notebook"] == "01_fine"


def test_in_place_leaves_a_notebook_fit_to_commit(folder, tmp_path):
    source = write(tmp_path / "01_fine.ipynb", NOTEBOOKS["01_fine"])
    out = tmp_path / "out"
    process = ci_run(tmp_path, out, "--in-place")
    assert process.returncode == 0, process.stdout + process.stderr
    notebook = nbformat.read(source, as_version=4)
    assert problems(notebook) == []
    assert ran.executed(source, out) is not None  # bash ci/test would not execute it again
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.source for cell in code] == [PARAMETERS, *NOTEBOOKS["01_fine"]]
    assert [cell.execution_count for cell in code] == [1, 2, None, 3, 4, 5]
    assert "run in out/runs/" in code[3].outputs[0].text
    assert code[4].outputs[0].metadata["image/png"]["alt"] == "one dot"
    assert "papermill" not in source.read_text() and str(tmp_path) not in source.read_text()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["-p", "profil", "mini"],
            "01_fine.ipynb: unknown parameter 'profil'; did you mean 'profile'?",
        ),
        (["-p", "n", "many"], "01_fine.ipynb: n is 'many' (str); it must be int (default 3)."),
        (["--only", "07"], "there is no notebook 07; there are: 01, 02, 03, 04, 05, 06"),
        (["--profile", "tiny"], "invalid choice: 'tiny'"),
    ],
)
def test_bad_requests_run_nothing(folder, tmp_path, options, message):
    process = ci_run(folder, tmp_path / "out", *options)
    assert process.returncode == 2
    assert message in process.stderr
    assert not (tmp_path / "out").exists()


def test_no_notebooks_yet(tmp_path):
    process = ci_run(tmp_path, tmp_path / "out")
    assert process.returncode == 0
    assert "there are no notebooks" in process.stdout


def test_quiet_stop_is_a_failure(tmp_path):
    """papermill may end with 0 though cells were not run."""
    path = write(tmp_path / "01_quiet.ipynb", ["first()", "second()"])
    notebook = nbformat.read(path, as_version=4)
    for count, cell in enumerate(notebook.cells):
        cell.metadata.papermill = {"start_time": "now" if count < 3 else None}
        if 0 < count < 3:
            cell.execution_count = count
    nbformat.write(notebook, path)
    stopped = "stopped the notebook: later cells were not run"
    assert verdict(path, 0) == ("cell 3 `first()`", stopped)
    notebook.cells[3].execution_count = 3
    nbformat.write(notebook, path)
    assert verdict(path, 0) == ("", "")


def test_ending_the_command_ends_the_kernel(tmp_path):
    pid = tmp_path / "pid"
    source = f"import os, time\nopen({str(pid)!r}, 'w').write(str(os.getpid()))\ntime.sleep(300)"
    write(tmp_path / "01_long.ipynb", [source])
    command = [sys.executable, str(REPO / "ci" / "run_notebooks.py"), "--out", str(tmp_path / "o")]
    process = subprocess.Popen([*command, "--notebooks", str(tmp_path)])
    wait_for(lambda: pid.is_file() and pid.read_text())
    process.terminate()
    assert process.wait(60) == 143
    wait_for(lambda: not psutil.pid_exists(int(pid.read_text())))


def wait_for(condition, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.1)


def test_a_kernel_that_is_not_there_is_said_in_words(folder, tmp_path):
    log = tmp_path / "log"
    log.write_text("jupyter_client.kernelspec.NoSuchKernel: No such kernel named python3")
    ended = SimpleNamespace(poll=lambda: 1, wait=lambda: 1)
    notebook = Notebook(folder / "01_fine.ipynb", {})
    result = finish(Running(notebook, ended, tmp_path / "none.ipynb", log, ""), None)
    assert not result.passed and "ipykernel install --sys-prefix" in result.error


def test_a_text_is_given_as_a_text(folder):
    assert as_text(folder / "01_fine.ipynb", "profile")
    assert not as_text(folder / "01_fine.ipynb", "n")


def test_papermill_that_never_started_is_a_failure(tmp_path):
    assert verdict(tmp_path / "none.ipynb", 1) == (
        "before the first cell",
        "papermill ended with 1, see the log",
    )


# --- what a committed notebook looks like --------------------------------------------------------


def executed(*sources: str) -> nbformat.NotebookNode:
    """A notebook as if it had been executed and normalised."""
    cells = [new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]})]
    return normalise(new_notebook(cells=[*cells, *map(new_code_cell, sources)]))


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("!ls", "shell command"),
        ("%pip install torch", "Colab"),
        ("if done:\n    sys.exit(0)", "stops a notebook"),
        ("from tqdm.notebook import tqdm", "tqdm.auto"),
        ("root = '/home/someone/data'", "absolute path"),
    ],
)
def test_forbidden_sources(source, text):
    (problem,) = problems(executed(source))
    assert text in problem and "cell 2" in problem


def test_allowed_sources():
    fine = ["%pip install -q -r ci/requirements-colab.txt", "a != b", "x = 'https://a.b/home/c'"]
    assert problems(executed(*fine)) == []


def test_problems_of_outputs_counts_and_metadata():
    notebook = executed("1", "2")
    notebook.cells[1].execution_count = 7
    notebook.cells[2].outputs = [
        nbformat.v4.new_output("display_data", {"image/png": "AAAA"}),
        nbformat.v4.new_output("stream", text="saved in /tmp/xyz/a.png"),
        nbformat.v4.new_output("error", ename="ValueError", evalue="", traceback=[]),
    ]
    notebook.metadata.widgets = {}
    del notebook.cells[0].metadata["tags"]
    found = "\n".join(problems(notebook, size=2_000_000))
    for text in (
        "2000000 bytes",
        "cell 2: execution count 7, not 2",
        "cell 3: a picture has no alt text",
        "cell 3: an absolute path: /tmp/xyz/a.png",
        "cell 3: stored an error: ValueError",
        "metadata of widgets",
        "0 cells are tagged 'parameters'",
    ):
        assert text in found


def test_normalise_joins_streams_and_drops_widgets():
    notebook = new_notebook(cells=[new_code_cell("f()")])
    widget = {"application/vnd.jupyter.widget-view+json": {"model_id": "1"}, "text/plain": "a box"}
    notebook.cells[0].outputs = [
        nbformat.v4.new_output("stream", text="in /a/b"),
        nbformat.v4.new_output("stream", text=" and /a\n"),
        nbformat.v4.new_output("display_data", widget),
    ]
    normalise(notebook, {"/a": ".", "/a/b": "out"})
    [first] = notebook.cells[0].outputs
    assert first.text == "in out and .\n"


COMMITTED = sorted((REPO / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_committed_notebooks(path):
    notebook = nbformat.read(path, as_version=4)
    assert problems(notebook, path.stat().st_size) == []
