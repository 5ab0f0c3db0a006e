"""What ``bash ci/run`` has executed, ``bash ci/test`` need not execute again.

``bash ci/run`` notes for each notebook the :func:`fingerprint` of all that its outputs depend on.
As a plugin of pytest (``-p ran``) this module gives nbval, in place of a kernel, one that repeats
what the cells of a notebook said then, if the fingerprint is still the same. As a command it says
for which notebooks that is so.
"""

import hashlib
import json
import re
import sys
from importlib.metadata import distributions, version
from pathlib import Path

import nbformat
from nbformat import NotebookNode
from notebook_format import is_added
from run_report import RESULTS

REPO = Path(__file__).resolve().parent.parent
OUT = REPO / "out"
USED = ("tpt_nb", "data", "notebooks/sweeps", "notebooks/references.bib")  # by notebooks


def fingerprint(path: Path) -> str:
    """Of a notebook's code, of the package and the data, and of what requirements.txt installs."""
    return hashlib.sha256("\0".join([_surroundings(), *sources(path)]).encode()).hexdigest()


def sources(path: Path) -> list[str]:
    """The code of a notebook's cells, without the parameters that papermill adds."""
    return [cell.source for cell in _code(path)]


def _code(path: Path) -> list[NotebookNode]:
    cells = nbformat.read(path, as_version=4).cells
    return [cell for cell in cells if cell.cell_type == "code" and not is_added(cell)]


def _surroundings() -> str:
    # not of all that is installed: ci/test adds what only tests need
    names = re.findall(r"^[\w.-]+", (REPO / "requirements.txt").read_text(), re.MULTILINE)
    versions = [f"{name} {version(name)}" for name in names if list(distributions(name=name))]
    hashed = hashlib.sha256("\n".join([sys.version, *versions]).encode())
    for name in USED:
        below = [REPO / name, *(REPO / name).rglob("*")]
        for path in sorted(p for p in below if p.is_file() and "__pycache__" not in p.parts):
            content = hashlib.sha256(path.read_bytes()).hexdigest()
            hashed.update(f"{path.relative_to(REPO)} {content}\n".encode())
    return hashed.hexdigest()


def executed(path: Path, out: Path | None = None) -> list[NotebookNode] | None:
    """The code cells of a notebook as ``bash ci/run`` executed them from what lies here now.

    None if it did not, or not without an error, or with parameters of the caller's.
    """
    out = out or OUT
    try:
        ran = json.loads((out / RESULTS).read_text())["notebooks"]
        [entry] = [entry for entry in ran if entry["name"] == path.stem]
        if entry["passed"] and entry["of"] and entry["of"] == fingerprint(path):
            cells = _code(out / path.name)
            return cells if [cell.source for cell in cells] == sources(path) else None
    except (OSError, ValueError, KeyError, TypeError):
        pass  # nothing there, or of an older kind
    return None


class Repeated:
    """In nbval's eyes a kernel: it says what the executed cells said."""

    def __init__(self, cells: list[NotebookNode]) -> None:
        self.ahead, self.messages = iter(cells), iter(())

    def is_alive(self) -> bool:
        """There is nothing that could have died."""
        return True

    def execute_cell_input(self, source: str, allow_stdin: bool | None = None) -> str:
        """The next cell with this source (nbval leaves some out); its messages come next."""
        cell = next(cell for cell in self.ahead if cell.source == source)
        said = [(output.output_type, output) for output in cell.outputs]
        self.messages = iter([*said, ("status", {"execution_state": "idle"})])
        return "repeated"

    def await_reply(self, *args, **kwargs) -> None:
        """It is there already."""

    def get_message(self, stream: str, timeout: float | None = None) -> dict:
        """The next message of the cell."""
        kind, content = next(self.messages)
        return {"parent_header": {"msg_id": "repeated"}, "msg_type": kind, "content": content}

    def stop(self) -> None:
        """Nothing runs."""


def pytest_collectstart(collector) -> None:
    """nbval starts a kernel in the ``setup`` of a notebook; here it gets one that repeats."""
    if hasattr(collector, "setup_sanitize_files") and (cells := executed(collector.path)):

        def setup() -> None:
            collector.kernel = Repeated(cells)
            collector.setup_sanitize_files()

        collector.setup = setup


def main(paths: list[str]) -> int:
    """Say of how many of these notebooks the outputs are there."""
    there = [path.name[:2] for path in map(Path, paths) if executed(path)]
    if there:
        print(
            f"bash ci/run executed {len(there)} of {len(paths)} notebooks from these very files "
            f"({', '.join(there)}): nbval compares their outputs and does not execute them again."
        )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
