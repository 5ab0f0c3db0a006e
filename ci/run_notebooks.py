"""Execute the notebooks with papermill, several beside each other, and collect what they computed.

Each notebook runs in a process of its own, with a log, on one thread: as many at a time as there
are cores. (A second thread gains this small model little, and with another number of threads the
last bits of a result would hang on how many notebooks ran.) It has passed only if papermill says so
*and* every code cell was executed: to papermill a notebook that stopped early in ``sys.exit`` is
fine. A notebook is ended when it has made no progress for a while, however long it takes in all.
Usually started by ``bash ci/run``.
"""

import argparse
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import nbformat
import psutil
from badges import students
from notebook_format import is_added, normalise
from ran import fingerprint
from run_options import REPO, Mistake, arguments, as_text, choose_parameters, find
from run_report import (
    Result,
    collect,
    earlier,
    print_tables,
    sentence,
    to_html,
    write_index,
)

PATIENCE = {"mini": 600, "full": 3600}  # seconds without progress
EVERY = 15  # seconds between two lines that say where it stands


def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit code: 1 if a notebook failed, 2 for a bad request."""
    args = arguments(argv)
    out = args.out.resolve()
    try:
        notebooks = find(args.notebooks, args.only)
        given = {name: value for name, value in args.param}
        todo = [Notebook(path, choose_parameters(path, args, out, given)) for path in notebooks]
    except Mistake as mistake:
        print(f"ci/run: {mistake}", file=sys.stderr)
        return 2
    if not notebooks:
        print(f"ci/run: there are no notebooks in {args.notebooks} yet; nothing to run.")
        return 0
    (out / "logs").mkdir(parents=True, exist_ok=True)
    began, old = time.perf_counter(), earlier(out)
    show = Progress(todo, out, old, jobs_of(args))
    results = []
    for notebook, result in execute(todo, out, args, show):
        results.append(result)
        if (out / notebook.path.name).is_file():
            to_html(out / notebook.path.name)
        if args.in_place and result.passed:
            write_back(out / notebook.path.name, notebook.path, out, result.seconds)
        show.finished(result)
    if args.in_place:
        students(args.notebooks)
    report = collect(out, results, old)
    write_index(out, report, {})
    print_tables(report, results, out)
    failed = [result for result in results if not result.passed]
    for result in sorted(failed, key=lambda result: result.name):
        print(f"FAILED: {result.name}, {result.cell}: {result.error} (logs/{result.name}.log)")
    passed, seconds = len(results) - len(failed), time.perf_counter() - began
    print(f"ci/run: {passed} passed, {len(failed)} failed, {seconds:.0f} s")
    return 1 if failed else 0


def jobs_of(args: argparse.Namespace) -> int:
    """Notebooks at a time: one per core, as far as memory goes; a GPU is not shared."""
    if args.jobs:
        return max(1, args.jobs)
    if args.profile == "full" or os.path.exists("/dev/nvidiactl"):
        return 1
    return max(1, min(cores(), int(psutil.virtual_memory().available / 2**30 // 3)))


def cores() -> int:
    """That this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on every system
        return os.cpu_count() or 1


# --- executing -----------------------------------------------------------------------------------


@dataclass
class Notebook:
    """A notebook to execute; ``seconds`` is what it took when it was last executed here."""

    path: Path
    params: dict[str, str]
    seconds: float = 60.0
    alone: bool = False  # it measures time
    cells: int = 0

    def __post_init__(self) -> None:
        notebook = nbformat.read(self.path, as_version=4)
        about = notebook.metadata.get("tpt_nb", {})
        self.seconds, self.alone = about.get("seconds", 60.0), about.get("alone", False)
        self.cells = len(notebook.cells)


@dataclass
class Running:
    """A notebook that is being executed."""

    notebook: Notebook
    process: subprocess.Popen
    target: Path
    log: Path
    of: str  # the fingerprint of what it is executed from
    began: float = field(default_factory=time.perf_counter)
    seen: object = None  # what its progress is told from, and since when that is so
    since: float = 0.0

    def cell(self) -> int:
        """The one it is in, from 1, after papermill's log."""
        found = re.findall(rb"Executing Cell (\d+)-", self.log.read_bytes())
        return min(int(found[-1]), self.notebook.cells) if found else 0  # papermill may add one


def execute(
    todo: list[Notebook], out: Path, args: argparse.Namespace, show: "Progress"
) -> Iterable[tuple[Notebook, Result]]:
    """Run the notebooks, several at a time; yield each with its result when it has ended.

    The first one comes first, so that there is soon something to look at; then the longest.
    """
    patience = args.timeout or PATIENCE[args.profile or "mini"]
    waiting = [*todo[:1], *sorted(todo[1:], key=lambda notebook: -notebook.seconds)]
    if args.in_place:  # seconds that are committed are measured undisturbed
        waiting.sort(key=lambda notebook: notebook.alone)
    running: list[Running] = []
    try:
        while waiting or running:
            while waiting and len(running) < show.jobs:
                apart = args.in_place and (
                    waiting[0].alone or any(job.notebook.alone for job in running)
                )
                if apart and running:
                    break
                running.append(start(waiting.pop(0), out, show.jobs))
            time.sleep(0.2)
            for job in list(running):
                stuck = not_moving(job, out, patience)
                if job.process.poll() is None and not stuck:
                    continue
                running.remove(job)
                yield job.notebook, finish(job, patience if stuck else None)
            show.now(running, len(waiting))
    finally:
        for job in running:
            end(job.process)


def start(notebook: Notebook, out: Path, jobs: int) -> Running:
    """Start a notebook in a process of its own; the executed one will be ``out/<name>``."""
    path = notebook.path
    target = out / path.name
    target.unlink(missing_ok=True)
    command = [sys.executable, "-m", "papermill", str(path), str(target), "--kernel", "python3"]
    # relative paths mean in every tool what they mean in Jupyter and nbval
    command += ["--cwd", str(path.parent), "--no-progress-bar", "--log-output"]
    command += ["--language", "python"]  # a notebook's own metadata may lack it
    for name, value in notebook.params.items():
        raw = as_text(path, name)
        command += ["--parameters_raw" if raw else "--parameters", name, value]
    env = os.environ | {"TPT_NB_BY": path.stem}  # the engine notes it in the runs' summaries
    if not os.path.exists("/dev/nvidiactl"):
        env = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"} | env
    of = "" if set(notebook.params) - {"out_dir"} else fingerprint(path)
    log_path = out / "logs" / f"{path.stem}.log"
    with open(log_path, "wb") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=env
        )
    return Running(notebook, process, target, log_path, of, since=time.perf_counter())


def not_moving(job: Running, out: Path, patience: float) -> bool:
    """Nothing new for so long: no line in its log, no cell, no record of a run, no features?"""
    now = time.perf_counter()
    seen = job.log.stat().st_size
    patience = patience if job.cell() else max(patience, 180)  # a kernel that starts says nothing
    if seen == job.seen and now - job.since > patience:  # looking at files takes longer
        cache = Path(os.environ.get("TPT_NB_CACHE", out / "cache"))
        files = [*(out / "runs").rglob("*"), *cache.rglob("*")]
        newest = max((path.stat().st_mtime for path in files if path.is_file()), default=0.0)
        idle = time.time() - newest
        if idle > patience:
            return True
        job.since = now - idle
    elif seen != job.seen:
        job.seen, job.since = seen, now
    return False


def finish(job: Running, patience: float | None) -> Result:
    """The result of a notebook that has ended, or is ended because it does not move."""
    end(job.process)
    code = None if patience else job.process.wait()
    seconds = time.perf_counter() - job.began
    cell, error = verdict(job.target, code)
    if b"NoSuchKernel" in job.log.read_bytes():
        install = f"{sys.executable} -m ipykernel install --sys-prefix --name python3"
        error = f"this environment has no Jupyter kernel named python3: {install}"
    if patience and (not error or "papermill ended" in error):  # and no cell says why
        error = f"no progress for {patience:g} s"
    of = job.of if job.of and job.of == fingerprint(job.notebook.path) else ""  # not edited since
    return Result(job.notebook.path.stem, not error, round(seconds, 1), cell, error, of)


def end(process: subprocess.Popen) -> None:
    """End a process and its kernel, which lives in a session of its own."""
    if process.poll() is not None:
        return
    family = [*psutil.Process(process.pid).children(recursive=True), process]
    for member in family:
        try:
            member.kill()
        except psutil.NoSuchProcess:
            continue
    process.wait()


def verdict(target: Path, code: int | None) -> tuple[str, str]:
    """Which cell failed and how; two empty strings if the notebook is fine.

    Args:
        target: the executed notebook.
        code: papermill's exit code, None if it had to be ended.
    """
    if not target.is_file():
        return "before the first cell", f"papermill ended with {code}, see the log"
    cells = [cell for cell in nbformat.read(target, as_version=4).cells if not is_added(cell)]
    todo = [
        (i, cell)
        for i, cell in enumerate(cells, 1)
        if cell.cell_type == "code" and cell.source.strip()
    ]
    for i, cell in todo:
        for output in cell.outputs:
            if output.output_type == "error":
                return name_cell(i, cell), first_line(f"{output.ename}: {output.evalue}")
    if code == 0 and all(cell.execution_count is not None for _, cell in todo):
        return "", ""
    # papermill's "completed" is on every cell after some failures; when a cell began is the truth
    begun = [name_cell(i, cell) for i, cell in todo if cell.metadata.papermill.get("start_time")]
    errors = {0: "stopped the notebook: later cells were not run", 138: "the kernel died"}
    error = errors.get(code, f"papermill ended with {code}, see the log")
    return begun[-1] if begun else "before the first cell", error


def name_cell(i: int, cell: nbformat.NotebookNode) -> str:
    """The cell in words: its place among all cells, from 1, and its first line."""
    return f"cell {i} `{first_line(cell.source)}`"


def first_line(text: str) -> str:
    return text.strip().split("\n")[0][:120]


def write_back(executed: Path, path: Path, out: Path, seconds: float) -> None:
    """Replace a notebook by its executed self, made fit to be committed."""
    notebook = nbformat.read(executed, as_version=4)
    normalise(notebook, {str(out): "out", str(REPO): ".", str(Path.home()): "~"})
    # for the next one's time left, and for the reader (ci/minutes.py)
    notebook.metadata["tpt_nb"] = notebook.metadata.get("tpt_nb", {}) | {"seconds": round(seconds)}
    temporary = path.with_suffix(".tmp")
    nbformat.write(notebook, temporary)
    os.replace(temporary, path)


# --- what is shown meanwhile ---------------------------------------------------------------------


class Progress:
    """Says what runs and how long it will take, and keeps ``index.html`` up to date."""

    def __init__(self, todo: list[Notebook], out: Path, old: dict, jobs: int) -> None:
        self.todo, self.out, self.old = todo, out, old
        self.jobs = min(jobs, len(todo))
        self.results: list[Result] = []
        self.began = self.said = time.perf_counter()
        for notebook in todo:  # what it took here, if it was ever executed here
            here = [e for e in old["notebooks"] if e["name"] == notebook.path.stem and e["passed"]]
            notebook.seconds = here[0]["seconds"] if here else notebook.seconds
        beside = f", {self.jobs} at a time" if self.jobs > 1 else ""
        left = text_of(sum(notebook.seconds for notebook in todo) / self.jobs)
        what = "1 notebook" if len(todo) == 1 else f"{len(todo)} notebooks"
        print(f"Executing {what}{beside}: {left} if this machine is as fast as it was.")
        print(f"Open {out}/index.html: it grows with each finished notebook.", flush=True)
        self._page([])

    def finished(self, result: Result) -> None:
        """A notebook has ended; its page is there."""
        self.results.append(result)
        minutes = (time.perf_counter() - self.began) / 60
        page = f": {self.out}/{result.name}.html" if result.passed else ""
        print(f"[{minutes:4.1f} min] {result.name} {sentence(result)}{page}", flush=True)
        self._page([])

    def now(self, running: list[Running], waiting: int) -> None:
        """A line now and then: what runs, in which cell, and what is left."""
        if time.perf_counter() - self.said < EVERY:
            return
        self.said = time.perf_counter()
        stands = [f"{job.notebook.path.stem} {self._stands(job)}" for job in running]
        about = f"{len(self.results)} of {len(self.todo)} finished, {text_of(self._left(running))}"
        print(f"[{(self.said - self.began) / 60:4.1f} min] {about}; running: {', '.join(stands)}")
        sys.stdout.flush()
        self._page(running, about)

    def _stands(self, job: Running) -> str:
        return f"(cell {job.cell()} of {job.notebook.cells})"

    def _left(self, running: list[Running]) -> float:
        """Seconds: what is expected of the rest, corrected by how fast it went so far."""
        ended = {result.name: result.seconds for result in self.results}
        expected, taken = 0.0, 0.0
        parts: dict[str, float] = {}
        for job in running:
            parts[job.notebook.path.stem] = min(0.95, job.cell() / max(1, job.notebook.cells))
        left = 0.0
        for notebook in self.todo:
            name = notebook.path.stem
            part = 1.0 if name in ended else parts.get(name, 0.0)
            expected += part * notebook.seconds
            taken += ended.get(name, 0.0)
            left += (1 - part) * notebook.seconds
        taken += sum(time.perf_counter() - job.began for job in running)
        pace = taken / expected if expected > 20 else 1.0
        return left * max(0.3, pace) / self.jobs

    def _page(self, running: list[Running], about: str = "") -> None:
        report = collect(self.out, self.results, self.old)
        done = {result.name for result in self.results}
        waiting = {n.path.stem: "waiting" for n in self.todo if n.path.stem not in done}
        waiting |= {job.notebook.path.stem: f"running {self._stands(job)}" for job in running}
        write_index(self.out, report, waiting, about)


def text_of(seconds: float) -> str:
    """A duration left, as people say it."""
    return f"about {seconds / 60:.0f} min left" if seconds > 90 else f"about {seconds:.0f} s left"


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that kernels are ended, too
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
