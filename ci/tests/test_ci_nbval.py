"""nbval with the glue of notebooks/conftest.py: which parts of a stored output are compared."""

import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
from nbformat.v4 import new_code_cell, new_notebook, new_output

REPO = Path(__file__).resolve().parents[2]
SOURCE = """\
import sys
from IPython.display import HTML, display
print("fresh", file=sys.stderr)
display({"text/html": "fresh", "text/plain": "a table"}, raw=True)
print("41.5 %")"""


def checked(stdout: str) -> nbformat.NotebookNode:
    """An executed cell that is to be compared, with stale stderr and HTML."""
    cell = new_code_cell(SOURCE, execution_count=1, metadata={"tags": ["nbval-check-output"]})
    cell.outputs = [
        new_output("stream", name="stderr", text="stale\n"),
        new_output("display_data", {"text/html": "stale", "text/plain": "a table"}),
        new_output("stream", name="stdout", text=stdout),
    ]
    return cell


def test_only_portable_outputs_are_compared(tmp_path):
    shutil.copy(REPO / "notebooks" / "conftest.py", tmp_path)
    notebook = new_notebook(cells=[checked("41.5 %\n"), checked("41.4 %\n")])
    nbformat.write(notebook, tmp_path / "01_a.ipynb")
    command = [sys.executable, "-m", "pytest", "-q", "-rf", "-p", "no:cacheprovider", "01_a.ipynb"]
    command += ["--nbval-lax", "--nbval-current-env", "--nbval-cell-timeout", "60"]
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert process.returncode == 1
    assert "FAILED 01_a.ipynb::Cell 1" in process.stdout
    assert "1 failed, 1 passed" in process.stdout
