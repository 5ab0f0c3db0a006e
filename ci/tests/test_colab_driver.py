"""ci/colab_driver.py as google-colab-cli runs it: its text in a cell, without a file beside it."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
DRIVER = REPO / "ci" / "colab_driver.py"
GIT = """#!{python}
import os, pathlib, sys
with open("git.log", "a") as log:
    log.write(" ".join(sys.argv[1:]) + "\\n")
if sys.argv[1] == "clone":
    home = pathlib.Path(sys.argv[-1])
    (home / "ci").mkdir(parents=True)
    (home / "tpt_nb").symlink_to("{repo}/tpt_nb")
    (home / "ci" / "run_notebooks.py").write_text(open("{stub}").read())
"""
STUB = """
import os, sys, time
from pathlib import Path

print("argv", *sys.argv[1:])
for name in ("MPLBACKEND", "TPT_NB_HEADLESS", "TQDM_DISABLE", "TPT_NB_DRIVE", "TPT_NB_CACHE"):
    print(name, os.environ.get(name))
out = Path(sys.argv[sys.argv.index("--out") + 1])
for name in ("01_x.ipynb", "logs/01_x.log", "runs/a/records.jsonl", "results.json"):
    (out / name).parent.mkdir(parents=True, exist_ok=True)
    (out / name).write_text("{}")
for name in ("cache/features/x/manifest.json", "model.safetensors"):
    (out / name).parent.mkdir(parents=True, exist_ok=True)
    (out / name).write_text("{}")
time.sleep(float(os.environ.get("STUB_SLEEP", 0)))
sys.exit(int(os.environ.get("STUB_CODE", 0)))
"""


def cell(options: list[str], change: tuple[str, str] = ("", "")) -> str:
    """What the tool sends to the kernel for ``colab run ... ci/colab_driver.py OPTIONS``."""
    prelude = f"import sys, warnings\nsys.argv = {[DRIVER.name, *options]!r}\n"
    prelude += "__name__ = '__main__'\n"
    return prelude + DRIVER.read_text().replace(*change)


@pytest.fixture
def colab(tmp_path):
    """A folder like /content, with a git that makes a clone; ``colab(options)`` runs the cell."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "stub.py").write_text(STUB)
    git = GIT.format(python=sys.executable, repo=REPO, stub=tmp_path / "stub.py")
    (tmp_path / "bin" / "git").write_text(git)
    (tmp_path / "bin" / "git").chmod(0o755)
    content = tmp_path / "content"
    content.mkdir()

    def run(*options: str, change=("", ""), **env) -> subprocess.CompletedProcess:
        (tmp_path / "cell").write_text(cell(list(options), change))
        # a namespace of its own, as a kernel's: no __file__, and nothing of the repository
        code = f"exec(compile(open({str(tmp_path / 'cell')!r}).read(), '<cell>', 'exec'), {{}})"
        path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
        env = os.environ | {"PATH": path, "MPLBACKEND": "module://inline"} | env
        env = {k: v for k, v in env.items() if k not in ("PYTHONPATH", "TPT_NB_CACHE")}
        command = [sys.executable, "-c", code]
        return subprocess.run(command, cwd=content, env=env, capture_output=True, text=True)

    run.content = content
    return run


ADDRESS = ("--repo", "us/tta", "--ref", "v1", "--cpu")


def test_the_driver_runs_as_a_cell_and_passes_everything_on(colab):
    done = colab(*ADDRESS, "--only", "01", "-p", "profile", "full", "-p", "n", "50", STUB_CODE="1")
    assert done.returncode == 1, done.stderr  # the run's own exit code
    assert "argv --out" in done.stdout and "--only 01 --profile full -p n 50" in done.stdout
    assert "TPT_NB_HEADLESS 1" in done.stdout and "MPLBACKEND None" in done.stdout
    assert "colab download -s NAME" in done.stdout and "exit code 1" in done.stdout
    with zipfile.ZipFile(colab.content / "tpt_nb-results.zip") as archive:
        names = set(archive.namelist())
    assert names == {"01_x.ipynb", "logs/01_x.log", "runs/a/records.jsonl", "results.json"}
    log = (colab.content / "git.log").read_text().splitlines()
    where = f"https://github.com/us/tta {colab.content}/tpt_nb_clone"
    assert log == [f"clone -q --depth=1 --branch v1 {where}"]


def test_a_second_call_takes_the_clone_that_is_there_and_the_tag_that_is_asked_for(colab):
    assert colab(*ADDRESS).returncode == 0
    done = colab("--repo", "us/tta", "--ref", "v2", "--cpu")
    assert done.returncode == 0 and "SystemExit" not in done.stderr
    *_, fetched, taken = (colab.content / "git.log").read_text().splitlines()
    assert fetched.endswith("fetch -q --depth=1 https://github.com/us/tta v2")
    assert taken.endswith("checkout -qf FETCH_HEAD")


def test_a_silent_phase_says_that_it_is_at_work(colab):
    """Older releases of the tool end a cell that says nothing for 30 seconds."""
    done = colab(*ADDRESS, change=("BEAT = 20", "BEAT = 0.2"), STUB_SLEEP="1")
    assert done.returncode == 0 and done.stdout.count("colab_driver: running, ") >= 2
    beat = next(line for line in DRIVER.read_text().splitlines() if line.startswith("BEAT = "))
    assert float(beat.split()[2]) < 30


def test_results_go_to_drive_if_asked_and_nothing_begins_without_it(colab, tmp_path):
    drive = tmp_path / "drive" / "MyDrive"
    change = ('Path("/content/drive/MyDrive")', f"Path({str(drive)!r})")
    done = colab(*ADDRESS, "--drive", change=change)
    assert done.returncode == 4 and "colab drivemount" in done.stdout
    assert not (colab.content / "git.log").exists()
    drive.mkdir(parents=True)
    done = colab(*ADDRESS, "--drive", change=change)
    assert done.returncode == 0, done.stderr
    assert (drive / "tpt_nb" / "out" / "results.json").is_file()
    assert "TPT_NB_DRIVE 1" in done.stdout
    assert f"TPT_NB_CACHE {drive}/tpt_nb/cache" in done.stdout
    assert (colab.content / "tpt_nb-results.zip").is_file()


def test_without_a_gpu_or_an_address_it_stops_and_says_why(colab):
    done = colab("--cpu")
    assert done.returncode == 1 and "say --repo OWNER/NAME and --ref TAG" in done.stderr
    done = colab(*ADDRESS[:-1], CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 3 and "--cpu goes on without one" in done.stdout
    assert colab("--nope").returncode == 2


def test_the_documented_commands_have_options_where_the_tool_looks_for_them():
    text = DRIVER.read_text().split('"""')[1].replace("\\\\\n", "")
    line = next(line for line in text.splitlines() if line.strip().startswith("colab run"))
    before, after = line.split("ci/colab_driver.py")
    assert "--keep" in before and "--timeout" in before and "--gpu" in before
    assert "--repo" in after and "-p profile full" in after
