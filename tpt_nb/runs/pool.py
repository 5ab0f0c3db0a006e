"""Many runs on this machine, in processes that each do one after the other.

A process keeps the model and the prompts of its last run for the next. A run that crashes ends its
process and no other; runs over the same views share their features through the cache.
"""

import contextlib
import json
import multiprocessing.connection
import multiprocessing.forkserver
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from tpt_nb.core.machine import has_gpu
from tpt_nb.core.paths import REPO
from tpt_nb.runs.config import RunConfig, augmenter_of
from tpt_nb.runs.engine import Session, run
from tpt_nb.runs.profile import resolve
from tpt_nb.runs.records import Run, load_run

PRELOAD = ["tpt_nb.runs"]  # what a run of the embedded model imports
SAME = ("dataset", "root", "model", "device", "seed", "reduced_size", "subset_seed", "cache")
Spread = Callable[[Sequence[RunConfig]], Iterator[tuple[int, Run | Exception]]]


def start_server() -> None:
    """Start the process that the workers are forked from; it imports while this one goes on."""
    paths = [str(REPO), os.environ.get("PYTHONPATH")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    if os.name == "posix":
        multiprocessing.set_forkserver_preload(PRELOAD)
        multiprocessing.forkserver.ensure_running()


def default_jobs() -> int:
    """A run per core; one at a time on a GPU, which a single run keeps busy."""
    return 1 if has_gpu() else os.cpu_count() or 1


def run_many(
    configs: Sequence[RunConfig], logs: Sequence[Path], jobs: int
) -> Iterator[tuple[int, Run | Exception]]:
    """Do the runs, ``jobs`` at a time; yields the position of each and its result, as they end.

    What a run prints goes to its log. A configuration that is wrong, an error and a crash are
    yielded as an exception that says why, in a line.
    """
    import torch

    threads = max(1, torch.get_num_threads() // jobs)
    ready, waiting, encoded = {}, [], set()
    for i, config in enumerate(configs):
        try:
            ready[i] = resolve(config)[0]
            waiting.append((i, views_of(ready[i])))
        except (ValueError, OSError) as error:
            yield i, error
    idle: list[_Worker] = []
    busy: dict[_Worker, tuple[int, str]] = {}
    try:
        while waiting or busy:
            while len(busy) < jobs and (task := startable(waiting, busy.values(), encoded)):
                waiting.remove(task)
                worker = idle.pop() if idle else _Worker(threads)
                busy[worker] = task
                logs[task[0]].parent.mkdir(parents=True, exist_ok=True)
                worker.pipe.send((ready[task[0]], logs[task[0]]))
            done = multiprocessing.connection.wait([worker.pipe for worker in busy])
            for worker in [worker for worker in busy if worker.pipe in done]:
                i, views = busy.pop(worker)
                try:
                    result = worker.pipe.recv()
                    idle.append(worker)
                except (EOFError, ConnectionError):
                    result = ValueError(worker.why(logs[i]))
                if isinstance(result, Path):
                    encoded.add(views)
                    result = load_run(result)
                yield i, result
    finally:
        for worker in busy:  # after an error here, or Ctrl-C
            worker.process.terminate()
        for worker in [*idle, *busy]:
            worker.pipe.close()
            worker.process.join()


def views_of(resolved: RunConfig) -> str:
    """What features depend on: runs that agree in this do not encode twice."""
    same = [getattr(resolved, name) for name in SAME]
    return json.dumps([*same, repr(augmenter_of(resolved, 32))])


def startable(waiting: Sequence[tuple], running: Sequence[tuple], encoded: set[str]):
    """The first (position, views) whose views nobody is encoding, or None.

    Those that start new views go first, so that the processes encode different ones.
    """
    encoding = {views for _, views in running} - encoded
    free = [task for task in waiting if task[1] not in encoding]
    return next((task for task in free if task[1] not in encoded), next(iter(free), None))


class _Worker:
    """A process that does the runs that come through its pipe, one after the other."""

    def __init__(self, threads: int) -> None:
        context = multiprocessing.get_context("forkserver" if os.name == "posix" else "spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, threads))
        self.process.start()
        theirs.close()  # so that the pipe ends with the process

    def why(self, log: Path) -> str:
        """Why the process ended, in a line."""
        self.process.join()
        code = self.process.exitcode
        if code < 0:
            return f"killed by signal {-code}"
        lines = log.read_text(errors="replace").strip().splitlines() if log.is_file() else []
        return (lines or [f"ended with exit code {code}"])[-1]


def _work(pipe, threads: int) -> None:
    import torch

    # a sweep that is killed must not leave a run behind that the next sweep would meet
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    torch.set_num_threads(threads)
    session = Session()
    with contextlib.suppress(EOFError):
        while True:
            config, log = pipe.recv()
            with open(log, "w") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            try:
                result = run(config, session).dir
            except (ValueError, OSError) as error:  # anything else ends the process, and is told
                result = ValueError(" ".join(str(error).split()))
                print(result)
            sys.stdout.flush()
            pipe.send(result)
