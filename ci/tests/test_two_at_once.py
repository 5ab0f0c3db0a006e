"""Two processes on one folder, and environments that other people have."""

import errno
import os
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
    for name in ("ci/run", "ci/test", "ci/book", ".ci/run", "ci/env.sh"):
        shutil.copy(REPO / name, here / name)
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "at $(pwd -P) with [$CDPATH]"\n')
    python.chmod(0o755)
    environment = {**os.environ, "CDPATH": str(other), "TPT_NB_PYTHON": str(python)}
    done = subprocess.run(
        ["bash", script], cwd=here, env=environment, capture_output=True, text=True, timeout=60
    )
    said = re.findall(r"^at (.*) with \[(.*)\]$", done.stdout, re.M)
    assert done.returncode == 0 and set(said) == {(str(here.resolve()), "")}, done


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
