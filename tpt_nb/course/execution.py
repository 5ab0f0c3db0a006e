"""The notebook that is run: the part of a master that tests need, with answers in it."""

import json
import sys
from dataclasses import dataclass, field, replace

import nbformat
from nbformat import NotebookNode

from tpt_nb.core.paths import DATA, REPO
from tpt_nb.course import sandbox
from tpt_nb.course.cells import as_reports, needed, pieces, without_checks
from tpt_nb.course.masters import Master, Mistake, Question
from tpt_nb.course.values import differs
from tpt_nb.lessons import check

PACKAGE = REPO / "tpt_nb"
OUT_DIR = "out_dir = __import__('os').path.abspath('out')  # the scratch folder of the sandbox"
OUTCOMES = ("passed", "error", "time-out", "died", "flood")
FATAL = ("time-out", "died", "flood")  # ends of a cell after which there is no kernel
PYTHON = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}


@dataclass(frozen=True)
class Options:
    """How answers are run."""

    way: str
    cell_seconds: float = 20
    limits: sandbox.Limits = field(default_factory=sandbox.Limits)

    def within(self, seconds: float) -> "Options":
        """The same with another limit on the time of a run."""
        return replace(self, limits=replace(self.limits, seconds=round(seconds, 1)))


def test_cells(question: Question) -> tuple[str, ...]:
    """Ids of the cells that test a question in a grafted notebook."""
    return question.tests or (f"{question.cell}-checks"[-64:],)


def graft(master: Master, answers: dict[str, str], level: str = "statements") -> NotebookNode:
    """The part of a master that the tests need, with these answers; no solution is in it.

    Args:
        answers: question -> source. Other questions get their stub and no tests.
        level: what is kept of the master's other cells: the ``statements`` that are needed, the
            ``cells`` that are needed, or ``all``.
    """
    parts: list[tuple[str, str, bool]] = []  # id of the cell, source, is it wanted?
    hidden = {test for q in answers for test in master.questions[q].tests}
    for cell in master.notebook.cells:
        tpt = cell.metadata.get("tpt", {})
        if cell.cell_type != "code" or (tpt.get("hidden") and cell.id not in hidden):
            continue
        if "q" in tpt and not master.questions[tpt["q"]].is_run:  # predictions
            continue
        if tpt.get("hidden"):
            parts.append((cell.id, cell.source, True))
        elif "q" in tpt:
            question = master.questions[tpt["q"]]
            is_given = question.id in answers
            source = answers.get(question.id, question.stub)
            parts.append((cell.id, without_checks(source, question.checks), is_given))
            if is_given and not question.tests:
                parts.append((test_cells(question)[0], as_reports(question.checks), True))
        elif "check.reveal(" not in cell.source:
            sources = pieces(cell.source) if level == "statements" else [cell.source]
            if "parameters" in cell.metadata.get("tags", []):
                sources.append(OUT_DIR)
            parts += [(cell.id, source, False) for source in sources]
    wanted = {i for i, (_, _, want) in enumerate(parts) if want or level == "all"}
    cells: dict[str, list[str]] = {}
    for i in needed([source for _, source, _ in parts], wanted):
        cells.setdefault(parts[i][0], []).append(parts[i][1])
    given = {master.questions[q].cell: {"tpt": {"q": q}} for q in answers}
    made = [
        nbformat.v4.new_code_cell("\n".join(sources), id=ident, metadata=given.get(ident, {}))
        for ident, sources in cells.items()
    ]
    return nbformat.v4.new_notebook(cells=made, metadata=PYTHON)


def execute(notebook: NotebookNode, seed: int, options: Options) -> tuple[list[dict], str]:
    """Run a grafted notebook in the sandbox.

    Returns:
        What was reported of each cell that was started, in order, and why the run had to be ended
        ("" if it had not). Data from a hostile place: only its form is checked here.
    """
    seconds = str(options.cell_seconds)
    outcome = sandbox.run(
        [sys.executable, "-m", "tpt_nb.course.kernel", "answers.ipynb", seconds],
        files={"answers.ipynb": nbformat.writes(notebook).encode()},
        readable=[PACKAGE, DATA],
        env={
            "PYTHONPATH": str(REPO),
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONHASHSEED": "0",
            "PIP_NO_INDEX": "1",  # "!pip install" shall not wait for a network
            "TPT_NB_HEADLESS": "1",
            "TPT_NB_DATA": str(DATA),
            "TQDM_DISABLE": "1",
            check.SEED: str(seed),
            **{f"{name}_NUM_THREADS": "1" for name in ("OMP", "MKL", "OPENBLAS", "NUMEXPR")},
        },
        limits=options.limits,
        way=options.way,
    )
    runs: list[dict] = []
    for line in outcome.report.split(b"\n"):
        try:
            event = json.loads(line)
            cell, kind = str(event["cell"]), event["event"]
        except (ValueError, KeyError, TypeError, RecursionError):
            continue
        if kind == "start":
            runs.append({"cell": cell, "outcome": "died", "detail": "the run ended", "values": []})
        elif runs and runs[-1]["cell"] == cell and event.get("outcome") in OUTCOMES:
            runs[-1] |= {key: event.get(key) for key in ("outcome", "detail", "values")}
    if not runs and not outcome.ended:
        lines = outcome.log.strip().splitlines()
        return runs, f"nothing ran: {lines[-1][:300] if lines else f'code {outcome.code}'}"
    return runs, outcome.ended


@dataclass(frozen=True)
class Reference:
    """What the reference solutions handed over: test cell -> values; and how they were run."""

    values: dict[str, list[dict]]
    level: str = "statements"  # see graft


def run_reference(master: Master, seed: int, options: Options) -> Reference:
    """Run the reference solutions: first what seems to be needed, more of the master if it is not
    enough.

    Raises:
        Mistake: a solution fails or hands over nothing; says which.
    """
    run = {q: question for q, question in master.questions.items() if question.is_run}
    solutions = {q: question.solution for q, question in run.items()}
    for level in ("statements", "cells", "all"):
        runs, ended = execute(graft(master, solutions, level), seed, options)
        failed = [run for run in runs if run["outcome"] != "passed"]
        if not failed or ended or failed[-1]["outcome"] in FATAL:
            break
    if failed or ended:
        why = ended or "; ".join(f"cell {run['cell']}: {run['detail']}" for run in failed[:3])
        raise Mistake(f"{master.name}: the reference solutions do not run: {why}")
    values = {run["cell"]: run["values"] for run in runs}
    for question in run.values():
        for cell in test_cells(question):
            where = f"{master.name}, {question.id}, cell {cell}"
            if not values.get(cell):
                raise Mistake(f"{where}: the test reports no value")
            for value in values[cell]:
                if differs(value, value):
                    raise Mistake(f"{where}: {value['what']!r} is not finite with the reference")
    return Reference(values, level)
