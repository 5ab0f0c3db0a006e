"""A tiny master without torch, and submissions of every kind to it: for the tests of the course."""

import copy
import json
from pathlib import Path

import nbformat
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

NAME = "90_tiny"
SETUP = "import numpy as np\n\nfrom tpt_nb.lessons import check"
Q1 = '''\
def centre(x: np.ndarray) -> np.ndarray:
    """x [N,D] without its mean over N."""
    # BEGIN SOLUTION
    middle = x.mean(axis=0)
    return offset + x - middle
    # END SOLUTION


table = np.arange(6.0).reshape(3, 2)
check.close("a table", centre(table), table - table.mean(axis=0))'''
T1 = """\
rng = np.random.default_rng(check.seed())
check.report("random", centre(rng.normal(size=(5, 3))))
check.report("one row", centre(rng.normal(size=(1, 2))))"""
Q2 = '''\
def largest(x: np.ndarray, k: int) -> list[int]:
    """Indices of the k largest of x [N], the largest first."""
    # BEGIN SOLUTION
    order = np.argsort(-x, kind="stable")
    return order[:k].tolist()
    # END SOLUTION


numbers = np.array([3.0, 9.0, 5.0])
check.equal("two of three", largest(numbers, 2), [1, 2])'''
T2A = """\
check.report("random", largest(np.random.default_rng(check.seed()).normal(size=40), 10), atol=0)"""
T2B = """\
check.report("ties", largest(np.ones(7), 3), atol=0)"""
Q3 = '''\
def describe(x: np.ndarray) -> float:
    """Root of the mean square of x."""
    # BEGIN SOLUTION
    return float((x**2).mean() ** 0.5)
    # END SOLUTION


expected = [2.0, 5.0]
for value, want in zip((2.0, -5.0), expected, strict=True):
    check.close(f"all {value:g}", describe(np.full(4, value)), want)'''
WRONG = {"90.1": "    return x", "90.2": "    return [0] * k", "90.3": "    return 3.0"}


def master() -> NotebookNode:
    """Three questions: two hidden tests in one cell, in two cells, and none (visible checks)."""
    cells = [
        new_markdown_cell("# 90 · Tiny", id="title"),
        new_code_cell(SETUP, id="setup"),
        new_code_cell("offset = 0.0", id="offset"),
        new_code_cell("raise RuntimeError('no test needs this cell')", id="unneeded"),
        new_code_cell(Q1, id="ex1", metadata={"tpt": {"q": "90.1", "points": 2}}),
        new_code_cell(T1, id="ex1-test", metadata={"tpt": {"q": "90.1", "hidden": True}}),
        new_markdown_cell("<details><summary>Hint</summary>\n\nmean\n\n</details>", id="hint1"),
        new_code_cell(Q2, id="ex2", metadata={"tpt": {"q": "90.2", "points": 3}}),
        new_code_cell(T2A, id="ex2-random", metadata={"tpt": {"q": "90.2", "hidden": True}}),
        new_code_cell(T2B, id="ex2-ties", metadata={"tpt": {"q": "90.2", "hidden": True}}),
        new_code_cell(Q3, id="ex3", metadata={"tpt": {"q": "90.3", "points": 1}}),
        new_markdown_cell("The root of the mean square, as we saw.", id="after"),
    ]
    cells[-1].metadata["tags"] = ["solution"]
    for count, cell in enumerate([c for c in cells if c.cell_type == "code"], 1):
        cell.execution_count = count
        cell.outputs = [new_output("stream", name="stdout", text=f"output of {cell.id}\n")]
    notebook = new_notebook(cells=cells)
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3"}
    return notebook


def write_master(folder: Path) -> Path:
    """The master as a file; its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    nbformat.write(master(), folder / f"{NAME}.ipynb")
    return folder


def cell(notebook: NotebookNode, q: str) -> NotebookNode:
    """The cell of a question in a released copy."""
    return next(c for c in notebook.cells if c.metadata.get("tpt", {}).get("q") == q)


def with_body(notebook: NotebookNode, **bodies: str) -> NotebookNode:
    """A copy of the solution version with other bodies: ``q1="return 0"``."""
    made = copy.deepcopy(notebook)
    for key, body in bodies.items():
        source = cell(made, f"90.{key[1:]}").source
        head, _, rest = source.partition('"""\n')
        checks = rest[rest.index("\n\n\n") :]
        indented = "\n".join(f"    {line}" for line in body.split("\n"))
        cell(made, f"90.{key[1:]}").source = f'{head}"""\n{indented}{checks}'
    return made


def before(notebook: NotebookNode, q: str, code: str) -> NotebookNode:
    """A copy with code in front of an answer."""
    made = copy.deepcopy(notebook)
    cell(made, q).source = f"{code}\n{cell(made, q).source}"
    return made


def edited(notebook: NotebookNode, edit) -> NotebookNode:
    """A copy that ``edit`` has changed."""
    made = copy.deepcopy(notebook)
    edit(made)
    return made


def text(notebook: NotebookNode) -> str:
    """A notebook as the text of a file."""
    return nbformat.writes(notebook)


def submissions(student: NotebookNode, solution: NotebookNode, secrets: Path) -> dict:
    """name -> (text of the file, statuses of 90.1 to 90.3, points).

    Args:
        student, solution: the released versions.
        secrets: a file that must not be readable.
    """
    right = ("passed", "passed", "passed")

    def move(nb: NotebookNode) -> None:
        nb.cells.reverse()

    def rename(nb: NotebookNode) -> None:
        for c in nb.cells:  # another tool wrote the file: no ids of ours, no metadata of ours
            c.id, c.metadata = f"colab-{c.id}", {}
        nb.metadata.pop("tpt")

    def delete(nb: NotebookNode) -> None:
        nb.cells.remove(cell(nb, "90.2"))

    def duplicate(nb: NotebookNode) -> None:
        again = copy.deepcopy(cell(nb, "90.1"))
        again.id = "copy"
        nb.cells.append(again)

    def contradict(nb: NotebookNode) -> None:
        duplicate(nb)
        nb.cells[-1].source = nb.cells[-1].source.replace("offset + x - middle", "x")

    def older(nb: NotebookNode) -> None:
        nb.nbformat_minor = 4
        for c in nb.cells:
            c.pop("id")
        nb.metadata["tpt"]["version"] = "of last year"

    def ancient(nb: NotebookNode) -> str:
        cells = [
            {"cell_type": "code", "language": "python", "input": c.source, "outputs": []}
            for c in nb.cells
            if c.cell_type == "code"
        ]
        old = {"nbformat": 3, "nbformat_minor": 0, "metadata": {"name": ""}}
        return json.dumps(old | {"worksheets": [{"cells": cells, "metadata": {}}]})

    def hostile(q: int, body: str) -> str:
        return text(with_body(solution, **{f"q{q}": body}))

    scan = f"""\
import glob, os
found = []
for place in ("{secrets}", "{secrets.parent}", "/tmp/tpt-sandbox-*", "/proc/1/environ", "."):
    for path in glob.glob(place + "/**", recursive=True) + [place]:
        try:
            text = open(path).read()
        except Exception:
            continue
        if "BEGIN SOLUTION" in text or "THE KEY" in text or "ex2-ties" in text:
            found.append(path)
raise Exception(f"found {{sorted(found)}}")"""
    forge = """\
from IPython.display import display
real = check.report
check.report = lambda what, got, atol=0: [real(what, [i, i + 1], atol) for i in range(99)]
check.close = check.equal = lambda *a, **k: print("correct")"""
    patch = """\
import builtins, sys
print = builtins.print = lambda *a, **k: None
np.allclose = np.array_equal = lambda *a, **k: True
np.abs = lambda x: np.zeros(())
sys.modules["tpt_nb.lessons.check"].differs = lambda *a: ''
import tpt_nb.course.values as values
values.differs = lambda *a: ''
class AssertionError(Exception): pass"""
    report = """\
import os, json
for fd in range(3, 64):
    try:
        os.write(fd, b'{"cell": "ex2-random", "event": "start"}\\n')
        os.write(fd, b'{"cell": "ex2-random", "event": "end", "outcome": "passed"}\\n')
    except OSError:
        pass
return [0] * k"""
    jupyter = """\
!pip install -q einops
files = !ls
np.mean?
for _ in range(2):
    %time np.ones(3)
"""
    wrong_2 = ("passed", "error", "passed")
    return {
        "jupyter": (text(before(solution, "90.1", jupyter)), right, 6),
        "reference": (text(solution), right, 6),
        "blank": (text(student), ("blank",) * 3, 0),
        "other_answers": (
            text(with_body(solution, q1="return x - np.mean(x, 0)", q2="return [1] * k")),
            ("passed", "failed", "passed"),
            3,
        ),
        "partly": (
            text(with_body(solution, q2="return list(np.argsort(-x)[:k]) if x.std() else [0] * k")),
            ("passed", "partial", "passed"),
            4.5,
        ),
        "moved": (text(edited(solution, move)), right, 6),
        "renamed": (text(edited(solution, rename)), right, 6),
        "deleted": (text(edited(solution, delete)), ("passed", "missing", "passed"), 3),
        "duplicated": (text(edited(solution, duplicate)), right, 6),
        "contradictory": (
            text(edited(solution, contradict)),
            ("duplicate", "passed", "passed"),
            4,
        ),
        "older_version": (text(edited(solution, older)), right, 6),
        "format_3": (ancient(solution), right, 6),
        "not_json": ("this is not JSON", ("unreadable",) * 3, 0),
        "deep_json": ("[" * 100_000, ("unreadable",) * 3, 0),
        "other_json": ('{"cells": 3}', ("unreadable",) * 3, 0),
        "renamed_function": (
            text(edited(solution, lambda nb: _replace(nb, "90.1", "centre", "center"))),
            ("error", "passed", "passed"),
            4,
        ),
        "syntax_error": (hostile(2, "return ]"), wrong_2, 3),
        "exception": (hostile(2, "raise ValueError('no')"), wrong_2, 3),
        "returns_nothing": (hostile(2, "pass"), wrong_2, 3),
        "not_a_number": (hostile(1, "return x * np.nan"), ("failed", "passed", "passed"), 4),
        "reads_input": (hostile(2, "return input()"), wrong_2, 3),
        "sys_exit": (hostile(2, "import sys\nsys.exit(0)"), wrong_2, 3),
        "os_exit": (hostile(2, "import os\nos._exit(0)"), ("passed", "died", "passed"), 3),
        "kills_kernel": (
            hostile(2, "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)"),
            ("passed", "died", "passed"),
            3,
        ),
        "kills_parent": (
            hostile(2, "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)"),
            ("passed", "died", "passed"),
            3,
        ),
        "kills_all": (
            hostile(2, "import os, signal\nos.kill(-1, signal.SIGKILL)"),
            ("passed", "died", "passed"),
            3,
        ),
        "endless": (hostile(2, "while True:\n    pass"), ("passed", "time-out", "passed"), 3),
        "deaf_and_endless": (
            hostile(
                2,
                "import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n"
                "while True:\n    pass",
            ),
            ("passed", "time-out", "passed"),
            3,
        ),
        "prints_500_mb": (
            hostile(2, "for _ in range(500):\n    print('x' * 1_000_000)"),
            ("passed", "flood", "passed"),
            3,
        ),
        "prints_500_mb_at_once": (
            hostile(2, "print('x' * 500_000_000)\nreturn [0] * k"),
            ("passed", ("flood", "died", "error", "failed"), "passed"),
            3,
        ),
        "fork_bomb": (
            hostile(2, "import os\nwhile True:\n    os.fork()"),
            ("passed", ("error", "died", "time-out", "flood"), "passed"),
            3,
        ),
        "quiet_fork_bomb": (
            hostile(
                2,
                "import os\nwhile True:\n    try:\n        os.fork()\n"
                "    except OSError:\n        pass",
            ),
            ("passed", ("died", "time-out"), "passed"),
            3,
        ),
        "allocates_8_gb": (
            hostile(2, "return [int(np.ones(2**30).sum())] * k"),
            wrong_2,
            3,
        ),
        "fills_the_disk": (
            hostile(
                2,
                "block = b'x' * 2**20\nfor i in range(100):\n"
                "    with open(f'/tmp/{i}', 'wb') as file:\n"
                "        for _ in range(60):\n            file.write(block)",
            ),
            wrong_2,
            3,
        ),
        "deletes_files": (
            hostile(
                2,
                "import shutil\nfor place in ('/', '/usr', '/tmp', '/work', '/home', '.'):\n"
                "    shutil.rmtree(place, ignore_errors=True)\nreturn [0] * k",
            ),
            ("passed", ("failed", "died", "error"), ("passed", "error", "died")),
            None,
        ),
        "reads_the_key": (hostile(2, scan), wrong_2, 3),
        "opens_a_socket": (
            hostile(
                2,
                "import socket\nfor place in (('1.1.1.1', 53), ('127.0.0.1', PORT)):\n"
                "    try:\n        socket.create_connection(place, timeout=3)\n"
                "    except OSError:\n        continue\n    raise Exception('CONNECTED')\n"
                "raise Exception('no network')",
            ),
            wrong_2,
            3,
        ),
        "patches_everything": (
            text(before(with_body(solution, q2="return [0] * k"), "90.1", patch)),
            ("passed", "failed", "passed"),
            None,
        ),
        "forges_values": (
            text(before(with_body(solution, q1="return x", q2="return [0] * k"), "90.1", forge)),
            ("failed", "failed", "failed"),
            0,
        ),
        "forges_the_report": (
            hostile(2, report),  # it also writes into the kernel's own sockets
            ("passed", ("failed", "error", "died", "time-out"), "passed"),
            3,
        ),
        "formula": (
            hostile(2, "raise Exception('=cmd|calc')"),
            wrong_2,
            3,
        ),
    }


def _replace(notebook: NotebookNode, q: str, old: str, new: str) -> None:
    cell(notebook, q).source = cell(notebook, q).source.replace(old, new)
