"""The sandbox: what a command in it cannot do, with small commands that try."""

import os
import socket
import sys
import time
from pathlib import Path

import psutil
import pytest

from tpt_nb.course import sandbox
from tpt_nb.course.sandbox import Limits

REPORT = f"import os\nout = int(os.environ['{sandbox.REPORT}'])\n"


def works(way: str) -> bool:
    try:
        return sandbox.choose(way) == way
    except RuntimeError:
        return False


@pytest.fixture(params=sandbox.WAYS)
def way(request):
    if not works(request.param):
        pytest.skip(f"{request.param} does not work on this machine")
    return request.param


@pytest.fixture
def closed(way):
    """A way that also hides files, processes and the network."""
    if way == "rlimits":
        pytest.skip("rlimits hides nothing")
    return way


def python(code: str, way: str, **options) -> sandbox.Outcome:
    limits = options.pop("limits", Limits(seconds=60, memory=1 << 30))
    return sandbox.run([sys.executable, "-c", REPORT + code], way=way, limits=limits, **options)


def test_what_is_written_to_the_report_comes_back(way):
    outcome = python(
        "os.write(out, open('a.txt', 'rb').read() + os.environ['COLOUR'].encode())",
        way,
        files={"a.txt": b"blue "},
        env={"COLOUR": "green"},
    )
    assert (outcome.code, outcome.ended, outcome.report) == (0, "", b"blue green")


def test_the_environment_is_not_inherited(way, monkeypatch):
    monkeypatch.setenv("TOKEN", "secret")
    outcome = python("os.write(out, str('TOKEN' in os.environ).encode())", way)
    assert outcome.report == b"False"


def test_the_exit_code_and_the_log_come_back(way):
    outcome = python("print('hello')\nraise SystemExit(7)", way)
    assert outcome.code == 7 and "hello" in outcome.log


def test_time_is_limited_also_for_the_deaf(way):
    deaf = "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\ntime.sleep(600)"
    outcome = python(deaf, way, limits=Limits(seconds=2))
    assert outcome.code is None and "not finished within 2 s" in outcome.ended
    assert outcome.seconds < 30


def test_memory_is_limited(way):
    code = "try:\n    bytearray(2 << 30)\nexcept MemoryError:\n    os.write(out, b'refused')"
    assert python(code, way).report == b"refused"


def test_processes_are_limited_and_gone_afterwards(way):
    code = """
import time
made = 0
try:
    while made < 1000:
        if os.fork() == 0:
            os.setsid()
            time.sleep(600)
        made += 1
except OSError:
    os.write(out, b'refused')"""
    before = len(psutil.pids())
    # children share their parent's pages, which count for each of them: memory shall not end this
    outcome = python(code, way, limits=Limits(seconds=60, memory=4 << 30, processes=40))
    assert outcome.report == b"refused" or "processes" in outcome.ended
    time.sleep(1)
    assert len(psutil.pids()) < before + 30


def test_files_are_limited(way):
    code = """
try:
    with open('x', 'wb') as file:
        for _ in range(80):
            file.write(bytes(1 << 20))
except OSError:
    os.write(out, b'refused')"""
    assert python(code, way).report == b"refused"


def test_the_report_is_limited(way):
    code = "while True:\n    os.write(out, bytes(1 << 16))"
    outcome = python(code, way, limits=Limits(seconds=60, report=1 << 20))
    assert "reported more than 1 MB" in outcome.ended and len(outcome.report) <= 1 << 20


def test_nothing_is_left_in_the_temporary_folder(way, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    tmp_path.chmod(0o755)
    python("open('x', 'w').write('x')", way)
    assert list(tmp_path.iterdir()) == []


def test_only_what_is_named_can_be_read_and_nothing_else_written(closed, tmp_path):
    (tmp_path / "shown").mkdir()
    (tmp_path / "shown" / "a.txt").write_text("shown")
    (tmp_path / "hidden.txt").write_text("hidden")
    tmp_path.chmod(0o755)
    code = f"""
place = {str(tmp_path)!r}
seen = open(place + '/shown/a.txt').read()
for path in (place + '/hidden.txt', {str(Path(__file__))!r}, '/etc/shadow', '/etc/passwd'):
    assert not os.path.exists(path), path
for path in (place + '/shown/a.txt', '/usr/x', '/x', os.__file__):
    try:
        open(path, 'a')
    except OSError:
        continue
    raise SystemExit(path)
os.write(out, seen.encode())"""
    outcome = python(code, closed, readable=[tmp_path / "shown"])
    assert outcome.report == b"shown", outcome.log


def test_other_processes_and_all_rights_are_out_of_reach(closed):
    code = """
import ctypes
pids = [name for name in os.listdir('/proc') if name.isdigit()]
assert len(pids) < 4, pids
assert os.getuid() != 0
status = open('/proc/self/status').read()
assert 'CapEff:\\t0000000000000000' in status and 'NoNewPrivs:\\t1' in status
libc = ctypes.CDLL(None, use_errno=True)
assert libc.mount(b'tmpfs', b'/tmp', b'tmpfs', 0, None) < 0
assert libc.umount2(b'/usr', 2) < 0
os.write(out, b'none')"""
    assert python(code, closed).report == b"none"


def test_there_is_no_network_but_a_loopback_of_its_own(closed):
    with socket.socket() as outer:
        outer.bind(("127.0.0.1", 0))
        outer.listen()
        code = f"""
import socket
for place in (('127.0.0.1', {outer.getsockname()[1]}), ('1.1.1.1', 53)):
    try:
        socket.create_connection(place, timeout=5)
    except OSError:
        continue
    raise SystemExit('connected')
inner = socket.socket()
inner.bind(('127.0.0.1', 0))
inner.listen()
socket.create_connection(inner.getsockname())
os.write(out, b'alone')"""
        assert python(code, closed).report == b"alone"


def test_ends_with_its_parent(way, tmp_path):
    """Killing the grader leaves nothing behind."""
    code = f"""
import sys
sys.path.insert(0, {str(Path(sandbox.__file__).parents[2])!r})
from tpt_nb.course import sandbox
sandbox.run(['sleep', '987'], way={way!r})"""
    grader = psutil.Popen([sys.executable, "-c", code])
    try:
        began = time.monotonic()
        while not (sleepers := named("sleep", "987")) and time.monotonic() < began + 60:
            time.sleep(0.1)
        assert sleepers
    finally:
        grader.kill()
        grader.wait()
    gone, alive = psutil.wait_procs(sleepers, timeout=30)
    assert not alive


def named(*command: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.cmdline() == list(command):
                found.append(process)
        except psutil.Error:
            continue
    return found


def test_an_unknown_way_is_a_mistake_and_one_that_does_not_work_says_why(monkeypatch):
    with pytest.raises(ValueError, match="there are: auto, namespaces"):
        sandbox.choose("docker")
    monkeypatch.setenv("PATH", os.devnull)
    sandbox._probe.cache_clear()
    try:
        with pytest.raises(RuntimeError, match="bwrap is not installed"):
            sandbox.choose("bubblewrap")
    finally:
        sandbox._probe.cache_clear()


def test_an_isolation_that_hides_files_works_here():
    """Where this fails, the grader cannot hide its key, and says so: a fact about the machine."""
    if not works("namespaces") and not works("bubblewrap"):
        pytest.skip("neither namespaces nor bubblewrap work on this machine")
    assert sandbox.choose() in ("namespaces", "bubblewrap")
