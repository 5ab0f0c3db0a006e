"""Run a command that nobody trusts: without network, without the other files, within limits.

Three ways, the first that works here is taken (``choose``):

``namespaces``  user, mount, process, network and IPC namespaces of its own (what unshare(1) makes).
                Its root holds Python, the packages and the files named ``readable``, all read-only,
                and a scratch folder in memory; it sees no other process and no network.
``bubblewrap``  the same through bwrap(1), for systems that allow namespaces to it alone.
``rlimits``     resource limits, a process group and a scratch folder. THE NETWORK AND EVERY FILE
                THAT THE USER MAY READ STAY OPEN. Where the caller is root, it runs as a user of
                its own that has nothing.

All three bound time, memory, processes, the size of files and of what comes back. This file is also
the script that runs on the other side, hence it imports the standard library alone.
"""

import ctypes
import errno
import functools
import json
import os
import random
import resource
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

WAYS = ("namespaces", "bubblewrap", "rlimits")
HOME = "/tmp/home"
SCRATCH = "/tmp/scratch"  # where the files are and the command runs; elsewhere for rlimits
REPORT = "TPT_NB_REPORT_FD"  # the file descriptor that what is reported goes to
SYSTEM = ("/bin", "/sbin", "/lib", "/lib32", "/lib64", "/usr")
SYSTEM += tuple(f"/etc/{name}" for name in ("alternatives", "fonts", "ld.so.cache", "localtime"))
DEVICES = ("null", "zero", "full", "random", "urandom")


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


# --- outside -------------------------------------------------------------------------------------


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
    paths = python_paths()
    paths += [p for p in _outermost(map(os.path.abspath, readable)) if p not in paths]
    read_end, write_end = os.pipe()
    with tempfile.TemporaryDirectory(prefix="tpt-sandbox-") as folder:
        place = Path(folder)
        scratch = str(place / "scratch") if way == "rlimits" else SCRATCH
        for name in ("input", "root", "scratch"):
            (place / name).mkdir()
        for name, content in (files or {}).items():
            (place / "input" / name).write_bytes(content)
        os.chmod(place, 0o755)
        config = {
            "command": list(command),
            "readable": paths,
            "input": str(place / "input"),
            "root": str(place / "root"),
            "scratch": scratch,
            "report": write_end,
            "limits": asdict(limits),
            "uid": random.SystemRandom().randrange(60000, 65000),
            "env": {
                "PATH": os.pathsep.join([os.path.dirname(sys.executable), "/usr/bin", "/bin"]),
                "HOME": scratch if way == "rlimits" else HOME,
                "LANG": "C.UTF-8",
                "USER": "student",
                REPORT: str(write_end),
                **(env or {}),
            },
        }
        argv = [sys.executable, "-I", os.path.abspath(__file__)]
        if way == "bubblewrap":
            config["input"] = "/tmp/input"
            argv = _bubblewrap(config, place) + argv
        argv += ["enter" if way == "namespaces" else "inside", json.dumps(config)]
        with open(place / "log", "wb") as log:
            began = time.monotonic()
            process = subprocess.Popen(
                argv,
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
    here = os.path.abspath(__file__)
    return [*argv, "--ro-bind", here, here, "--remount-ro", "/", "--"]


# --- inside --------------------------------------------------------------------------------------

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC, MS_REMOUNT, MS_BIND = 1, 2, 4, 8, 32, 4096
MS_REC, MS_PRIVATE, MNT_DETACH = 1 << 14, 1 << 18, 2
KEPT_FLAGS = {2: 2, 4: 4, 8: 8, 1024: 1024, 2048: 2048, 4096: 1 << 21}  # of statvfs -> of mount
NEWNS, NEWUTS, NEWIPC, NEWUSER = 0x20000, 0x4000000, 0x8000000, 0x10000000
NEWPID, NEWNET = 0x20000000, 0x40000000
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 4, 36, 38
PIVOT_ROOT = {"x86_64": 155, "aarch64": 41, "riscv64": 41, "ppc64le": 203, "s390x": 217}


def _call(name: str, *args) -> None:
    """A function of the C library; ``OSError`` if it fails."""
    libc = ctypes.CDLL(None, use_errno=True)
    given = [os.fsencode(arg) if isinstance(arg, str) else arg for arg in args]
    if getattr(libc, name)(*given) < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def prctl(option: int, value: int) -> None:
    """Set an attribute of this process."""
    _call("prctl", option, ctypes.c_ulong(value), 0, 0, 0)


def _enter(config: dict) -> int:
    """In new namespaces: their first process builds the root, starts the command and reaps."""
    prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    is_root = os.geteuid() == 0
    _unshare(is_root, config)
    first = os.fork()
    if first:
        signal.signal(signal.SIGTERM, lambda *_: os.kill(first, signal.SIGKILL))
        return _wait(first)
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # and with the first process all others end
    prctl(PR_SET_DUMPABLE, 0)
    _loopback()
    _build_root(config)
    worker = os.fork()
    if worker == 0:
        _inside(config)
    os.close(config["report"])
    while True:
        pid, status = os.wait()
        if pid == worker:
            return os.waitstatus_to_exitcode(status)


def _unshare(is_root: bool, config: dict) -> None:
    flags = NEWNS | NEWPID | NEWNET | NEWIPC | NEWUTS
    if is_root:
        try:
            return _call("unshare", flags)
        except OSError as error:  # root of a container, say
            if error.errno != errno.EPERM:
                raise
    outer_uid, outer_gid = os.geteuid(), os.getegid()
    _call("unshare", flags | NEWUSER)
    Path("/proc/self/setgroups").write_text("deny")
    uid = config["uid"] = outer_uid or 65534  # not 0, so that exec drops all capabilities
    Path("/proc/self/uid_map").write_text(f"{uid} {outer_uid} 1")
    Path("/proc/self/gid_map").write_text(f"{uid} {outer_gid} 1")


def _loopback() -> None:
    """Bring up the loopback device, through which the kernel of a notebook is talked to."""
    import fcntl
    import socket
    import struct

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        fcntl.ioctl(s, 0x8914, struct.pack("16sH14s", b"lo", 0x1 | 0x40, b""))  # SIOCSIFFLAGS


def _build_root(config: dict) -> None:
    """A root file system in memory with what may be read; the old one is gone afterwards."""
    root, uid = config["root"], config["uid"]
    _call("mount", None, "/", None, MS_REC | MS_PRIVATE, None)
    _call("mount", "tmpfs", root, "tmpfs", MS_NOSUID | MS_NODEV, "size=16m,mode=755")
    os.mkdir(root + "/tmp")
    size = f"size={config['limits']['scratch']},mode=1777"
    _call("mount", "tmpfs", root + "/tmp", "tmpfs", MS_NOSUID | MS_NODEV, size)
    for path in config["readable"]:
        _bind(path, root + path)
    os.makedirs(root + "/dev", exist_ok=True)
    for name in DEVICES:
        _bind(f"/dev/{name}", f"{root}/dev/{name}", MS_NOSUID | MS_NOEXEC)
    for name, target in (("fd", "/proc/self/fd"), ("shm", "/tmp")):
        os.symlink(target, f"{root}/dev/{name}")
    os.makedirs(root + "/proc")
    _call("mount", "proc", root + "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, None)
    shutil.copytree(config["input"], root + SCRATCH)
    for folder, _, names in os.walk(root + SCRATCH):
        for path in [folder, *(os.path.join(folder, name) for name in names)]:
            os.chown(path, uid, uid)
    config["input"] = None
    os.chdir(root)
    machine = os.uname().machine
    if machine not in PIVOT_ROOT:
        raise OSError(errno.ENOSYS, f"pivot_root is not known for {machine}")
    _call("syscall", PIVOT_ROOT[machine], ".", ".")
    _call("umount2", ".", MNT_DETACH)
    os.chdir("/")
    flags = MS_REMOUNT | MS_BIND | MS_RDONLY | MS_NOSUID | MS_NODEV
    _call("mount", None, "/", None, flags, None)


def _bind(source: str, target: str, flags: int = MS_RDONLY | MS_NOSUID | MS_NODEV) -> None:
    """Show a file or a folder at another place; links to places that are shown stay links."""
    os.makedirs(os.path.dirname(target), exist_ok=True)
    if os.path.islink(source):
        os.symlink(os.readlink(source), target)
        return
    if os.path.isdir(source):
        os.makedirs(target, exist_ok=True)
    else:
        open(target, "ab").close()
    _call("mount", source, target, None, MS_BIND | MS_REC, None)
    is_set = os.statvfs(source).f_flag  # flags that were set may not be taken away again
    flags |= sum(new for old, new in KEPT_FLAGS.items() if is_set & old)
    _call("mount", None, target, None, MS_REMOUNT | MS_BIND | flags, None)


def _supervise(config: dict) -> int:
    """Without namespaces: start the command and, when it is done, end what it left behind."""
    prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    prctl(PR_SET_SUBREAPER, 1)  # orphans become children of this process
    worker = os.fork()
    if worker == 0:
        if os.geteuid() == 0:
            os.chown(config["scratch"], config["uid"], config["uid"])
        _inside(config)
    os.close(config["report"])
    signal.signal(signal.SIGTERM, lambda *_: os.kill(worker, signal.SIGKILL))
    code = _wait(worker)
    while True:  # until none is left
        for pid in _children():
            os.kill(pid, signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return code


def _children() -> list[int]:
    """The processes whose parent this one is."""
    found = []
    for name in os.listdir("/proc"):
        try:
            if name.isdigit():
                stat = Path("/proc", name, "stat").read_text()
                if int(stat.rpartition(")")[2].split()[1]) == os.getpid():
                    found.append(int(name))
        except OSError:
            continue
    return found


def _wait(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _inside(config: dict) -> None:
    """Take the files along, give up all rights, set the limits, and become the command."""
    try:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if config["input"]:
            shutil.copytree(config["input"], config["scratch"], dirs_exist_ok=True)
        if os.geteuid() == 0:
            os.setgroups([])
            os.setgid(config["uid"])
            os.setuid(config["uid"])
        prctl(PR_SET_NO_NEW_PRIVS, 1)
        os.makedirs(config["env"]["HOME"], exist_ok=True)
        os.chdir(config["scratch"])
        limits = Limits(**config["limits"])
        seconds = int(limits.seconds) + 5
        for kind, value in (
            (resource.RLIMIT_CPU, seconds),
            (resource.RLIMIT_DATA, limits.memory),
            (resource.RLIMIT_AS, limits.memory + (24 << 30)),  # libraries of GPUs map a lot
            (resource.RLIMIT_FSIZE, limits.file_size),
            (resource.RLIMIT_NPROC, _threads_of_user() + limits.processes),
            (resource.RLIMIT_NOFILE, 1024),
            (resource.RLIMIT_CORE, 0),
        ):
            hard = resource.getrlimit(kind)[1]
            value = value if hard == resource.RLIM_INFINITY else min(value, hard)
            resource.setrlimit(kind, (value, value))
        os.set_inheritable(config["report"], True)
        os.execvpe(config["command"][0], config["command"], config["env"])
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        os._exit(126)


def _threads_of_user() -> int:
    """The processes and threads that count already: RLIMIT_NPROC is one of the user."""
    total = 0
    for name in os.listdir("/proc"):
        try:
            if name.isdigit() and os.stat(f"/proc/{name}").st_uid == os.getuid():
                total += len(os.listdir(f"/proc/{name}/task"))
        except OSError:
            continue
    return total


if __name__ == "__main__":
    given = json.loads(sys.argv[2])
    try:
        result = {"enter": _enter, "inside": _supervise}[sys.argv[1]](given)
    except OSError as problem:
        print(f"{type(problem).__name__}: {problem}", file=sys.stderr, flush=True)
        result = 126
    sys.stderr.flush()
    os._exit(result if result >= 0 else 128 - result)
