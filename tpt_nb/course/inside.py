"""The other side of the sandbox: a script that shuts the doors and becomes the command.

``python inside.py enter|inside CONFIG`` is started by ``course.sandbox`` (there: what it does).
It imports the standard library alone, and psutil.
"""

import ctypes
import errno
import fcntl
import json
import os
import resource
import shutil
import signal
import socket
import struct
import sys
from pathlib import Path

REPORT = "TPT_NB_REPORT_FD"  # the file descriptor that what is reported goes to
SCRATCH = "/tmp/scratch"  # where the files are and the command runs; elsewhere for rlimits
DEVICES = ("null", "zero", "full", "random", "urandom")
LINKS = {"fd": "/proc/self/fd", "shm": "/tmp", "ptmx": "pts/ptmx"}  # in /dev

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
    _unshare(config)
    first = os.fork()
    if first:
        signal.signal(signal.SIGTERM, lambda *_: os.kill(first, signal.SIGKILL))
        return _wait(first)
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # and with the first process all others end
    prctl(PR_SET_DUMPABLE, 0)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:  # brings the loopback device up
        fcntl.ioctl(s, 0x8914, struct.pack("16sH14s", b"lo", 0x1 | 0x40, b""))  # SIOCSIFFLAGS
    _build_root(config)
    worker = os.fork()
    if worker == 0:
        _inside(config)
    os.close(config["report"])
    while True:
        pid, status = os.wait()
        if pid == worker:
            return os.waitstatus_to_exitcode(status)


def _unshare(config: dict) -> None:
    flags = NEWNS | NEWPID | NEWNET | NEWIPC | NEWUTS
    outer_uid, outer_gid = os.geteuid(), os.getegid()
    if outer_uid == 0:
        try:
            return _call("unshare", flags)
        except OSError as error:  # root of a container, say
            if error.errno != errno.EPERM:
                raise
    _call("unshare", flags | NEWUSER)
    Path("/proc/self/setgroups").write_text("deny")
    uid = config["uid"] = outer_uid or 65534  # not 0, so that exec drops all capabilities
    Path("/proc/self/uid_map").write_text(f"{uid} {outer_uid} 1")
    Path("/proc/self/gid_map").write_text(f"{uid} {outer_gid} 1")


def _build_root(config: dict) -> None:
    """A root file system in memory with what may be read; the old one is gone afterwards."""
    root, uid = config["root"], config["uid"]

    def mount(kind: str, place: str, flags: int, options: str | None = None) -> None:
        os.makedirs(root + place, exist_ok=True)
        _call("mount", kind, root + place, kind, MS_NOSUID | flags, options)

    _call("mount", None, "/", None, MS_REC | MS_PRIVATE, None)
    mount("tmpfs", "", MS_NODEV, "size=16m,mode=755")
    mount("tmpfs", "/tmp", MS_NODEV, f"size={config['limits']['scratch']},mode=1777")
    for path in config["readable"]:
        _bind(path, root + path)
    mount("devpts", "/dev/pts", MS_NOEXEC, "newinstance,ptmxmode=0666,mode=620")  # for !commands
    for name in DEVICES:
        _bind(f"/dev/{name}", f"{root}/dev/{name}", MS_NOSUID | MS_NOEXEC)
    for name, target in LINKS.items():
        os.symlink(target, f"{root}/dev/{name}")
    mount("proc", "/proc", MS_NODEV | MS_NOEXEC)
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
    import psutil

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
        for child in psutil.Process().children():
            os.kill(child.pid, signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return code


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
        limits = config["limits"]
        for kind, value in (
            (resource.RLIMIT_CPU, int(limits["seconds"]) + 5),
            (resource.RLIMIT_DATA, limits["memory"]),
            (resource.RLIMIT_AS, limits["memory"] + (24 << 30)),  # libraries of GPUs map a lot
            (resource.RLIMIT_FSIZE, limits["file_size"]),
            (resource.RLIMIT_NPROC, _threads_of_user() + limits["processes"]),
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
    import psutil

    processes = psutil.process_iter(["uids", "num_threads"])
    found = [p.info["num_threads"] for p in processes if p.info["uids"].real == os.getuid()]
    return sum(filter(None, found))


if __name__ == "__main__":
    try:
        result = {"enter": _enter, "inside": _supervise}[sys.argv[1]](json.loads(sys.argv[2]))
    except OSError as problem:
        print(f"{type(problem).__name__}: {problem}", file=sys.stderr, flush=True)
        result = 126
    sys.stderr.flush()
    os._exit(result if result >= 0 else 128 - result)
