"""Run a command that nobody trusts: without network, without the other files, within limits.

Three ways, the first that works here is taken (``choose``):

``namespaces``  user, mount, process, network and IPC namespaces of its own (what unshare(1) makes).
                Its root holds Python, the packages and the files named ``readable``, all read-only,
                and a scratch folder in memory; it sees no other process and no network.
``bubblewrap``  the same through bwrap(1), for systems that allow namespaces to it alone.
``rlimits``     resource limits, a process group and a scratch folder. THE NETWORK AND EVERY FILE
                THAT THE USER MAY READ STAY OPEN. Where the caller is root, it runs as a user of
                its own that has nothing.

All three bound time, memory, processes, the size of files and of what comes back. What happens on
the other side is in ``course.inside``.
"""

import functools
import json
import os
import random
import shutil
import signal
import site
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tpt_nb.course import inside
from tpt_nb.course.inside import REPORT, SCRATCH

WAYS = ("namespaces", "bubblewrap", "rlimits")
HOME = "/tmp/home"
SCRIPT = os.path.abspath(inside.__file__)
SYSTEM = ("/bin", "/sbin", "/lib", "/lib32", "/lib64", "/usr")
SYSTEM += tuple(f"/etc/{name}" for name in ("alternatives", "fonts", "ld.so.cache", "localtime"))


@dataclass(frozen=True)
class Limits:
    """What a run may use."""

    seconds: float = 300  # by the clock, and of CPU time per process
    memory: int = 4 << 30  # bytes of data per process; all of them together twice that
    processes: int = 128  # and threads
    file_size: int = 64 << 20  # bytes of a file
    scratch: int = 512 << 20  # bytes of all files in memory (not for rlimits)
    report: int = 32 << 20  # bytes that come back


@dataclass
class Outcome:
    """How a run ended."""

    code: int | None  # exit code; None if it had to be ended
    ended: str  # "" or why it had to be ended
    report: bytes  # what was written to the descriptor $TPT_NB_REPORT_FD
    log: str  # the end of stdout and stderr
    seconds: float = field(default=0.0)


def python_paths() -> list[str]:
    """What must be readable for this interpreter and its packages."""
    paths = [sys.prefix, sys.base_prefix, os.path.dirname(os.path.realpath(sys.executable))]
    paths += [sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")]
    # not all of sys.path: that holds the folder of whatever script was started
    paths += [*site.getsitepackages(), site.getusersitepackages()]
    paths = [path for path in paths if os.path.exists(path)]
    return [path for path in SYSTEM if os.path.exists(path)] + _outermost(
        path for given in paths for path in (os.path.abspath(given), os.path.realpath(given))
    )


def _outermost(paths) -> list[str]:
    """Paths that are in no other one, nor in the system's folders."""
    kept: list[str] = []
    for path in sorted(set(paths), key=len):
        if not any(path == one or path.startswith(one + "/") for one in (*SYSTEM, *kept)):
            kept.append(path)
    return kept


def choose(wanted: str = "auto") -> str:
    """The way of isolation that works here: the one asked for, or the best.

    Raises:
        RuntimeError: it does not work here; says what was tried.
    """
    if wanted not in ("auto", *WAYS):
        raise ValueError(f"isolation is {wanted!r}; there are: auto, {', '.join(WAYS)}")
    tried = []
    for way in WAYS if wanted == "auto" else [wanted]:
        problem = _probe(way)
        if not problem:
            return way
        tried.append(f"{way}: {problem}")
    raise RuntimeError("no isolation works here (" + "; ".join(tried) + ")")


@functools.cache
def _probe(way: str) -> str:
    """Why a way does not work here, or nothing."""
    if way == "bubblewrap" and not shutil.which("bwrap"):
        return "bwrap is not installed"
    code = "import ssl, socket; s = socket.socket(); s.bind(('127.0.0.1', 0)); s.listen()"
    outcome = run([sys.executable, "-I", "-c", code], way=way, limits=Limits(seconds=60))
    if outcome.code == 0:
        return ""
    lines = outcome.log.strip().splitlines() or [outcome.ended or f"exit code {outcome.code}"]
    hint = " (root should let an ordinary user do this)" if os.geteuid() == 0 else ""
    return lines[-1][:200] + (hint if way == "rlimits" else "")


def run(
    command: Sequence[str],
    files: Mapping[str, bytes] | None = None,
    readable: Sequence[str | Path] = (),
    env: Mapping[str, str] | None = None,
    limits: Limits | None = None,
    way: str = "namespaces",
) -> Outcome:
    """Run a command in isolation and wait for it.

    Args:
        command: the program and its arguments; its folder is the scratch folder.
        files: name -> content, put into the scratch folder.
        readable: what else it may read, besides Python and its packages; read-only.
        env: its environment, added to a small one of its own; nothing is inherited.
        limits, way: see above.
    """
    limits = limits or Limits()
    read_end, write_end = os.pipe()
    with tempfile.TemporaryDirectory(prefix="tpt-sandbox-") as folder:
        place = Path(folder)
        for name in ("input", "root", "scratch"):
            (place / name).mkdir()
        for name, content in (files or {}).items():
            (place / "input" / name).write_bytes(content)
        os.chmod(place, 0o755)
        config = _config(place, way, write_end, limits, env or {})
        config["command"] = list(command)
        shown = _outermost(map(os.path.abspath, readable))
        config["readable"] += [path for path in shown if path not in config["readable"]]
        argv = _bubblewrap(config, place) if way == "bubblewrap" else []
        argv += [sys.executable, "-I", SCRIPT, "enter" if way == "namespaces" else "inside"]
        with open(place / "log", "wb") as log:
            began = time.monotonic()
            process = subprocess.Popen(
                [*argv, json.dumps(config)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=folder,
                env={},
                pass_fds=[write_end],
                start_new_session=True,
            )
            os.close(write_end)
            report = _Reader(read_end, limits.report)
            try:
                ended = _watch(process, limits, report)
            finally:
                _end(process)
            report.join(10)
        with open(place / "log", "rb") as log:
            log.seek(max(0, (place / "log").stat().st_size - 8000))
            tail = log.read().decode(errors="replace")
        seconds = time.monotonic() - began
        code = None if ended else process.returncode
        return Outcome(code, ended, bytes(report.data), tail, round(seconds, 2))


def _config(place: Path, way: str, report: int, limits: Limits, env: Mapping[str, str]) -> dict:
    """What ``course.inside`` is told."""
    scratch = str(place / "scratch") if way == "rlimits" else SCRATCH
    return {
        "readable": python_paths(),
        "input": "/tmp/input" if way == "bubblewrap" else str(place / "input"),
        "root": str(place / "root"),
        "scratch": scratch,
        "report": report,
        "limits": asdict(limits),
        "uid": random.SystemRandom().randrange(60000, 65000),
        "env": {
            "PATH": os.pathsep.join([os.path.dirname(sys.executable), "/usr/bin", "/bin"]),
            "HOME": scratch if way == "rlimits" else HOME,
            "LANG": "C.UTF-8",
            "USER": "student",
            REPORT: str(report),
            **env,
        },
    }


class _Reader(threading.Thread):
    """Reads what is reported until the last writer is gone; what is too much is thrown away."""

    def __init__(self, descriptor: int, limit: int):
        super().__init__(daemon=True)
        self.descriptor, self.limit, self.data, self.full = descriptor, limit, bytearray(), False
        self.start()

    def run(self) -> None:
        with open(self.descriptor, "rb", buffering=0) as pipe:
            while block := pipe.read(1 << 16):
                if len(self.data) + len(block) > self.limit:
                    self.full = True
                else:
                    self.data += block


def _watch(process: subprocess.Popen, limits: Limits, report: _Reader) -> str:
    """Wait for the end; why it has to be ended, if it has to."""
    import psutil

    deadline = time.monotonic() + limits.seconds
    while True:
        try:
            process.wait(0.2)
            return ""
        except subprocess.TimeoutExpired:
            pass
        if time.monotonic() > deadline:
            return f"not finished within {limits.seconds:g} s"
        if report.full:
            return f"reported more than {limits.report >> 20} MB"
        used = count = 0
        try:
            for member in psutil.Process(process.pid).children(recursive=True):
                used += member.memory_info().rss
                count += 1
        except psutil.Error:
            continue
        if used > 2 * limits.memory:
            return f"used more than {2 * limits.memory >> 30} GB of memory"
        if count > 2 * limits.processes:
            return f"started more than {2 * limits.processes} processes"


def _end(process: subprocess.Popen) -> None:
    """End the supervisor, which ends everything below it; then its group, for good measure."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _bubblewrap(config: dict, place: Path) -> list[str]:
    """The beginning of a command that goes on inside of bwrap."""
    argv = ["bwrap", "--unshare-all", "--die-with-parent", "--new-session", "--cap-drop", "ALL"]
    argv += ["--uid", str(config["uid"]), "--gid", str(config["uid"])]
    argv += ["--proc", "/proc", "--dev", "/dev"]
    argv += ["--size", str(config["limits"]["scratch"]), "--tmpfs", "/tmp"]
    for path in config["readable"]:
        if os.path.islink(path):
            argv += ["--symlink", os.readlink(path), path]
        else:
            argv += ["--ro-bind", path, path]
    argv += ["--ro-bind", str(place / "input"), "/tmp/input"]
    return [*argv, "--ro-bind", SCRIPT, SCRIPT, "--remount-ro", "/", "--"]
