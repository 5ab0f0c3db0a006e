"""Runs a grafted notebook with nbclient: what each cell did, one JSON line per event.

It runs in the sandbox, next to code that nobody trusts, so nothing here decides anything: it sends
on what the cells handed over with ``check.report``, and ``course.grading`` compares that outside.
Cells in front of the first answer (imports, the model) are the master's own, and slow on a busy
machine: they get ``OWN`` seconds. After a cell that did not end nothing more is run.
"""

import json
import os
import sys
import threading
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbformat import NotebookNode

from tpt_nb.course.inside import PR_SET_DUMPABLE, REPORT, prctl
from tpt_nb.lessons.check import MIME

OWN = 120  # seconds that a cell in front of the first answer may take at least
PATIENCE = 15  # seconds that nbclient may need beyond the time limit of a cell
OUTPUT = 10 << 20  # bytes of output of one cell, more ends the run


class Client(NotebookClient):
    """Ends the run as soon as a cell prints without end."""

    printed = 0

    def process_message(self, msg: dict, cell: NotebookNode, cell_index: int):
        """Take a message of the kernel off the line, and count it."""
        content = msg["content"]
        self.printed += len(content.get("text", ""))
        self.printed += sum(len(str(value)) for value in content.get("data", {}).values())
        if self.printed > OUTPUT:
            end(cell, "flood", f"more than {OUTPUT >> 20} MB of output")
        return super().process_message(msg, cell, cell_index)


def send(**event: object) -> None:
    """One line for the grader."""
    os.write(int(os.environ[REPORT]), json.dumps(event).encode() + b"\n")


def end(cell: NotebookNode, outcome: str, detail: str) -> None:
    """A cell after which there is no kernel: end all, whatever threads and sockets wait for."""
    send(cell=cell.id, event="end", outcome=outcome, detail=detail, values=[])
    os._exit(1)


def run(client: Client, cell: NotebookNode, index: int, limit: float) -> None:
    """Run a cell, and say when it starts and how it ends."""
    send(cell=cell.id, event="start")
    client.printed, client.timeout = 0, limit
    late = f"not finished within {limit:g} s"
    # an answer that writes into the kernel's sockets can make nbclient wait forever
    watch = threading.Timer(limit + PATIENCE, end, (cell, "time-out", late))
    watch.daemon = True
    watch.start()
    outcome, detail = "passed", ""
    try:
        client.execute_cell(cell, index)
    except CellExecutionError as error:
        outcome, detail = "error", " ".join(f"{error.ename}: {error.evalue}".split())[:300]
    except CellTimeoutError:
        end(cell, "time-out", late)
    except (DeadKernelError, RuntimeError):
        end(cell, "died", "the kernel ended")
    except Exception as error:  # forged messages
        outcome, detail = "error", f"the cell failed ({type(error).__name__})"
    watch.cancel()
    datas = [output.get("data", {}) for output in cell.outputs]
    values = [data[MIME] for data in datas if MIME in data]
    send(cell=cell.id, event="end", outcome=outcome, detail=detail, values=values)


def main(path: Path, seconds: float) -> None:
    """Run all cells; the file is gone when the kernel, which shall not read it, starts."""
    prctl(PR_SET_DUMPABLE, 0)  # closes this process to the kernel: memory, open files
    notebook = nbformat.read(path, as_version=4)
    path.unlink()
    client = Client(notebook, kernel_name="python3", startup_timeout=120)
    with client.setup_kernel():
        is_own = True
        for index, cell in enumerate(notebook.cells):
            is_own = is_own and not cell.metadata.get("tpt")
            run(client, cell, index, max(seconds, OWN) if is_own else seconds)
        os._exit(0)  # the sandbox ends what is left


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]))
