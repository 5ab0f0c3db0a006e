"""A pytest plugin beside nbval: what each cell of a grafted notebook did, one JSON line per event.

It runs in the sandbox, next to code that nobody trusts, so nothing here decides anything: it sends
on what the cells handed over with ``tpt_nb.check.report``, and ``course.grading`` compares that
outside. It also mends habits of nbval that cost time: a kernel that died is noticed at once and not
after the cell's time limit, output without end is cut off, and after a cell that did not end
nothing more is run. Cells in front of the first answer (imports, the model) are the master's own,
and slow on a busy machine: they get ``OWN`` seconds.
"""

import json
import os
import threading
import time
from collections import deque
from queue import Empty

import pytest
from nbval.kernel import RunningKernel

from tpt_nb.course.sandbox import PR_SET_DUMPABLE, REPORT, prctl
from tpt_nb.lessons.check import MIME

OWN = 120  # seconds that a cell in front of the first answer may take at least
PATIENCE = 15  # seconds that nbval may need beyond the time limit of a cell
OUTPUT = 10 << 20  # bytes of output of one cell, more ends the run
FATAL = ("time-out", "died", "flood")  # after these there is no kernel to go on with


class Died(Exception):
    """The kernel is gone."""


class Flood(Exception):
    """The cell prints without end."""


def pytest_configure(config: pytest.Config) -> None:
    """Close this process to the kernel (memory, open files), and watch the kernel's messages."""
    prctl(PR_SET_DUMPABLE, 0)
    RunningKernel.get_message = get_message


def pytest_collection_finish(session: pytest.Session) -> None:
    """What is to come is in memory now; the kernel, which starts later, shall not read it."""
    limit, is_own = float(session.config.option.nbval_cell_timeout), True
    for item in session.items:
        is_own = is_own and not item.cell.metadata.get("tpt")
        item.seconds = max(limit, OWN) if is_own else limit
    for path in {item.path for item in session.items}:
        path.unlink()


def get_message(self: RunningKernel, stream: str, timeout: float | None = None) -> dict:
    """The next message of the kernel; takes what it prints meanwhile off the line, and counts it.

    Raises:
        Empty: none came in time.
        Died, Flood: none will come; too much came.
    """
    printed = self.__dict__.setdefault("printed", deque())
    deadline = time.monotonic() + (timeout if timeout is not None else 3600)
    while True:
        if stream == "iopub" and printed:
            return printed.popleft()
        left = deadline - time.monotonic()
        try:
            if stream == "shell":
                message = self.kc.get_shell_msg(timeout=max(0.01, min(0.2, left)))
            else:
                message = None
                _take(self, printed, max(0.01, min(0.2, left)))
        except Empty:
            if not self.is_alive():
                raise Died from None
            if left <= 0:
                raise
        else:
            if message is not None:
                return message
        if stream == "shell":
            try:
                while True:
                    _take(self, printed, 0)
            except Empty:
                pass


def _take(kernel: RunningKernel, printed: deque, timeout: float) -> None:
    """Put the next message of the iopub channel into the queue."""
    message = kernel.kc.get_iopub_msg(timeout=timeout)
    if message["msg_type"] == "execute_input":
        kernel.size = 0
    content = message["content"]
    kernel.size = getattr(kernel, "size", 0) + len(content.get("text", ""))
    kernel.size += sum(len(str(value)) for value in content.get("data", {}).values())
    if kernel.size > OUTPUT:
        raise Flood
    printed.append(message)


def send(**event: object) -> None:
    """One line for the grader."""
    os.write(int(os.environ[REPORT]), json.dumps(event).encode() + b"\n")


def give_up(cell: str, limit: float) -> None:
    """End all: an answer that writes into the kernel's sockets can make nbval wait forever."""
    detail = f"not finished within {limit:g} s"
    send(cell=cell, event="end", outcome="time-out", detail=detail, values=[])
    os._exit(1)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item):
    """Run a cell, and say when it starts and how it ends."""
    cell = item.cell.get("id", "")
    send(cell=cell, event="start")
    limit = item.config.option.nbval_cell_timeout = item.seconds
    watch = threading.Timer(limit + PATIENCE, give_up, (cell, limit))
    watch.daemon = True
    watch.start()
    outcome, detail = "passed", ""
    try:
        return (yield)
    except pytest.skip.Exception:
        outcome = "skipped"
        raise
    except (Died, RuntimeError):
        outcome, detail = "died", "the kernel ended"
        raise
    except Flood:
        outcome, detail = "flood", f"more than {OUTPUT >> 20} MB of output"
        raise
    except Exception:
        outcome, detail = "error", _error(item)
        if item.parent.timed_out:
            outcome, detail = "time-out", f"not finished within {limit:g} s"
        raise
    finally:
        watch.cancel()
        send(cell=cell, event="end", outcome=outcome, detail=detail, values=_values(item))
        if outcome in FATAL:
            item.session.shouldstop = outcome


def _error(item: pytest.Item) -> str:
    """The exception that a cell ended in, on one line."""
    for output in item.test_outputs or []:
        if output.output_type == "error":
            return " ".join(f"{output.ename}: {output.evalue}".split())[:300]
    return "the cell failed"


def _values(item: pytest.Item) -> list:
    """What the cell handed over, in order."""
    datas = [output.get("data", {}) for output in item.test_outputs or []]
    return [data[MIME] for data in datas if MIME in data]
