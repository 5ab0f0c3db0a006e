"""Two processes on one folder, and environments that other people have."""

import errno
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import filelock
import pytest
from test_runs import SERVER, child, records_of, undisturbed, world  # noqa: F401 (fixtures)

from tpt_nb.__main__ import main
from tpt_nb.core import messages
from tpt_nb.core.files import only_writer
from tpt_nb.runs import RunConfig, engine, load_run, resolve
from tpt_nb.runs.config import name_of

REPO = Path(__file__).resolve().parents[2]


# --- two at once ---------------------------------------------------------------------------------


def at_once(config: RunConfig, barrier) -> None:
    """A run that meets the other one before it takes the folder, and takes its time then."""
    take, to_records = engine.only_writer, engine.to_records
    engine.only_writer = lambda folder: (barrier.wait(60), take(folder))[1]
    engine.to_records = lambda *values: (time.sleep(0.05), to_records(*values))[1]
    child(config, None)


def test_the_same_run_started_twice_at_once(world, undisturbed, tmp_path, capsys):  # noqa: F811
    config = RunConfig.from_dict(world | {"out": str(tmp_path), "cache": str(tmp_path / "cache")})
    barrier = SERVER.Barrier(2)
    both = [SERVER.Process(target=at_once, args=(config, barrier)) for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(120)
    assert [process.exitcode for process in both] == [0, 0]
    assert records_of(config) == undisturbed  # once each, in order
    (folder,) = (path.parent for path in tmp_path.glob("*/summary.json"))
    assert len(load_run(folder).records) == undisturbed.count(b"\n")
    assert main(["compare", str(folder), str(folder)]) == 0
    assert "0" in capsys.readouterr().out


def test_the_second_goes_on_for_a_killed_one(world, undisturbed, tmp_path):  # noqa: F811
    config = RunConfig.from_dict(world | {"out": str(tmp_path)})
    half = undisturbed.index(b"\n") + 20  # in the middle of the second line
    first = SERVER.Process(target=child, args=(config, ("bytes", half)))
    second = SERVER.Process(target=child, args=(config, None))
    first.start()
    second.start()
    first.join(120)
    second.join(120)
    assert second.exitcode == 0
    assert first.exitcode in (-signal.SIGKILL, 0)  # 0: the second was there before it
    assert records_of(config) == undisturbed


HOLD = """
import pathlib, sys, time
from tpt_nb.core.files import only_writer
with only_writer(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def test_the_lock_of_a_killed_process_is_free(tmp_path):
    command = [sys.executable, "-c", HOLD, str(tmp_path)]
    with subprocess.Popen(command, cwd=REPO, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        with (
            pytest.raises(ValueError, match="another process is writing to"),
            only_writer(tmp_path, wait=False),
        ):
            pass
        process.kill()
    with only_writer(tmp_path, wait=False):
        pass


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOLCK, "No locks available"),
        OSError(errno.EOPNOTSUPP, "Operation not supported"),
        NotImplementedError("FileSystem does not appear to support flock"),
    ],
)
def test_a_file_system_without_locks(tmp_path, monkeypatch, capsys, error):
    def refuse(*_, **__):
        raise error

    monkeypatch.setattr(filelock.FileLock, "acquire", refuse)
    monkeypatch.setattr(messages, "_said", set())
    done = []
    for _ in range(2):
        with only_writer(tmp_path / "new"):
            done.append((tmp_path / "new").is_dir())
    assert done == [True, True]
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "cannot be locked" in said and str(error.args[-1]) in said
    with pytest.raises(OSError, match="of the work"), only_writer(tmp_path / "new"):
        raise OSError("of the work")  # is not taken for one of the lock


# --- the environment -----------------------------------------------------------------------------


@pytest.mark.parametrize("script", ["ci/run", "ci/test", "ci/book", ".ci/run"])
def test_cdpath_sends_nothing_elsewhere(tmp_path, script):
    """A copy of the scripts, with an interpreter that says where it was started."""
    here, other = tmp_path / "here", tmp_path / "other"
    for place in (here, other):
        (place / "ci").mkdir(parents=True)
        (place / ".ci").mkdir()
    for name in ("ci/run", "ci/test", "ci/book", ".ci/run", "ci/env.sh", "ci/run_options.py"):
        shutil.copy(REPO / name, here / name)
    (here / "tpt_nb").symlink_to(REPO / "tpt_nb")  # names the notebooks' parameters
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "at $(pwd -P) with [$CDPATH]"\n')
    python.chmod(0o755)
    environment = {**os.environ, "CDPATH": str(other), "TPT_NB_PYTHON": str(python)}
    done = subprocess.run(
        ["bash", script], cwd=here, env=environment, capture_output=True, text=True, timeout=60
    )
    said = re.findall(r"^at (.*) with \[(.*)\]$", done.stdout, re.M)
    assert done.returncode == 0 and set(said) == {(str(here.resolve()), "")}, done


FAKE = """#!/bin/sh
case "$*" in
  *"-c pass"*) exit 0 ;;
  "-V") echo Python 3.11.0; exit 0 ;;
esac
echo "$*" >>"$LOG"
case "$*" in
  *"pip show"*) exit 1 ;;  # there is no torch yet
  *" uv") exit 1 ;;        # and no uv
  *+cpu*) exit $SMALL ;;   # the small one: there, or not
esac
"""


@pytest.mark.skipif(
    os.path.exists("/dev/nvidiactl") or platform.system() + platform.machine() != "Linuxx86_64",
    reason="the small torch is for Linux on x86_64 without a GPU",
)
@pytest.mark.parametrize("small", [0, 1])
def test_the_small_torch_is_tried_and_each_list_installed_once(tmp_path, small):
    """The lines that a fake Python gets: pip's, in their order, and none on the second call."""
    for name in ("ci/env.sh", "ci/constraints.txt", "requirements.txt", "ci/requirements-test.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(REPO / name, tmp_path / name)
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(FAKE)
    python.chmod(0o755)
    log = tmp_path / "log"
    environment = {k: v for k, v in os.environ.items() if k not in ("TPT_NB_PYTHON", "UV")}
    environment |= {"LOG": str(log), "SMALL": str(small), "PATH": "/usr/bin:/bin"}
    calls = []
    for lists in ("", "", "LISTS=ci/requirements-test.txt; "):
        log.write_text("")
        script = lists + ". ci/env.sh; echo $CORES cores"
        done = subprocess.run(
            ["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done
        assert re.fullmatch(r"[1-9]\d* cores", done.stdout.splitlines()[-1])
        calls.append(log.read_text())
    first, second, tests = calls
    pins = (REPO / "ci" / "constraints.txt").read_text()
    torch, vision = (re.search(rf"^{n}==(.*)$", pins, re.M)[1] for n in ("torch", "torchvision"))
    tried = first.index(f"torch=={torch}+cpu torchvision=={vision}+cpu")
    assert tried < first.index("-r requirements.txt") < first.index("-e .")
    assert ("import torchvision" in first) == (small == 0)  # what came is looked at
    assert "requirements-test" not in first and second == ""
    assert "-r ci/requirements-test.txt" in tests and "-r requirements.txt" not in tests


def test_run_names_fit_into_file_names(world, tmp_path):  # noqa: F811
    config = RunConfig.from_dict(world | {"out": str(tmp_path)})
    for text in ("测" * 120, "a" + "测" * 120, "ab" + "测" * 120, "😀" * 120, "ü" * 200, "-" * 300):
        name = name_of(resolve(config.replace(run_name=text))[0])
        assert len(name.encode()) <= 200 and "\ufffd" not in name and "/" not in name
        (tmp_path / name).mkdir()
    done = child_run(config.replace(run_name="测" * 120))
    assert "测" * 49 in done.name and (done / "summary.json").is_file()


def child_run(config: RunConfig) -> Path:
    process = SERVER.Process(target=child, args=(config, None))
    process.start()
    process.join(120)
    assert process.exitcode == 0
    (summary,) = Path(config.out).glob("*/summary.json")
    return summary.parent


@pytest.mark.skipif(os.name != "posix", reason="home folders of POSIX")
def test_no_home_folder(tmp_path):
    """A user without an entry in the list of users and without $HOME, as in containers."""
    code = f"""
import os, pwd, shutil, sys
pwd.getpwuid = lambda number: {{}}[number]
sys.path.insert(0, {str(REPO)!r})
from tpt_nb.__main__ import main
assert main(sys.argv[1:]) == 0
shutil.rmtree("runs")
os.environ["TPT_NB_CACHE"] = ""
sys.exit(main(sys.argv[1:]))
"""
    words = ["evaluate", "--method", "zero_shot", "--reduced_size", "4", "--profile", "mini"]
    words += ["--workers", "0", "--out", "runs"]
    bare = {k: v for k, v in os.environ.items() if k != "HOME"}
    done = subprocess.run(
        [sys.executable, "-c", code, *words], cwd=tmp_path, capture_output=True, text=True,
        env=bare | {"TPT_NB_CACHE": str(tmp_path / "cache")}, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert done.stderr.strip().endswith("no home folder: set TPT_NB_CACHE to a folder")
    assert "Traceback" not in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["cache"], "nothing in the current folder"
