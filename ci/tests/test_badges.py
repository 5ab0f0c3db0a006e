"""The setup cell, the badges, and the driver that runs notebooks on Colab without a browser."""

import ast
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
import torch
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from tpt_nb.lessons import setup
from tpt_nb.runs import config

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO / "ci"))

import badges  # noqa: E402
import colab_driver  # noqa: E402

CELL = """\
import copy
import platform
import sys
from pathlib import Path

import pandas as pd
import torch

try:
    import tpt_nb
except ModuleNotFoundError:  # a clone without installation: look for the package above this folder
    folders = [Path.cwd(), *Path.cwd().parents]
    sys.path.insert(0, str(next(f for f in folders if (f / "tpt_nb" / "paths.py").is_file())))
    import tpt_nb

from tpt_nb import (
    adapt,
    datasets,
)
from tpt_nb.paths import DATA

figures.setup()
print(f"python {platform.python_version()}, torch {torch.__version__}, tpt_nb {tpt_nb.__version__}")
"""


@pytest.fixture
def root(tmp_path) -> Path:
    """A repository with a README and one notebook."""
    cells = [new_markdown_cell("# 01 · A lesson\n\nText."), new_code_cell(CELL)]
    (tmp_path / "notebooks").mkdir()
    nbformat.write(new_notebook(cells=cells), tmp_path / "notebooks" / "01_lesson.ipynb")
    shutil.copy(REPO / "README.md", tmp_path)
    return tmp_path


def lesson(root: Path) -> nbformat.NotebookNode:
    return nbformat.read(root / "notebooks" / "01_lesson.ipynb", as_version=4)


def stamp(root: Path, *options: str) -> int:
    return badges.main(["--root", str(root), *options])


# --- stamping ------------------------------------------------------------------------------------


def test_badge_setup_and_gpu(root):
    assert stamp(root, "--repo", "us/tta", "--ref", "v1.0") == 0
    notebook = lesson(root)
    heading, badge, text = notebook.cells[0].source.split("\n\n")
    assert (heading, text) == ("# 01 · A lesson", "Text.")
    where = "https://colab.research.google.com/github/us/tta/blob/v1.0/notebooks/01_lesson.ipynb"
    assert badge.endswith(f"({where})") and "placeholder" not in badge
    assert notebook.metadata.accelerator == "GPU" and notebook.metadata.colab.gpuType == "T4"
    source = notebook.cells[1].source
    assert '"https://github.com/us/tta"' in source and '"--branch=v1.0"' in source
    page = (root / "README.md").read_text()
    assert "github.com/us/tta" in page and "--branch v1.0" in page and "%cd tta" in page
    assert "OWNER/NAME/blob" not in page


def test_nothing_is_installed_or_imported_from_elsewhere_before_the_setup(root):
    stamp(root)
    tree = ast.parse(lesson(root).cells[1].source)
    block = next(i for i, node in enumerate(tree.body) if isinstance(node, ast.Try))
    for node in tree.body[:block]:
        name = node.module if isinstance(node, ast.ImportFrom) else node.names[0].name
        assert name.split(".")[0] in sys.stdlib_module_names
    kept = "\n".join(map(ast.unparse, tree.body[block + 1 :]))
    for line in ("import torch", "import pandas as pd", "from tpt_nb import adapt, datasets"):
        assert line in kept
    assert "platform" not in ast.unparse(tree) and "import copy" in ast.unparse(tree)
    assert kept.index("figures.setup()") < kept.index("tpt_nb.lessons.setup.ready()")


def test_placeholders_are_marked_and_replaced(root):
    assert stamp(root) == 0
    notebook = lesson(root)
    assert "placeholder" in notebook.cells[0].source and badges.MARK in notebook.cells[1].source
    assert stamp(root, "--check") == 0
    before = (root / "notebooks" / "01_lesson.ipynb").read_bytes()
    assert stamp(root) == 0 and (root / "notebooks" / "01_lesson.ipynb").read_bytes() == before
    assert stamp(root, "--check", "--repo", "us/tta", "--ref", "v2") == 1
    assert stamp(root, "--repo", "us/tta", "--ref", "v2") == 0
    text = (root / "notebooks" / "01_lesson.ipynb").read_text()
    assert "OWNER" not in text and "placeholder" not in text
    assert stamp(root, "--repo", "us/tta", "--ref", "v3") == 0
    assert "v2" not in (root / "notebooks" / "01_lesson.ipynb").read_text()
    assert stamp(root) == 0 and (root / "notebooks" / "01_lesson.ipynb").read_bytes() == before


@pytest.mark.parametrize(
    "options",
    [["--repo", "us"], ["--repo", "us/tta"], ["--ref", "v1"], ["--repo", "a/b", "--ref="]],
)
def test_half_an_address_is_refused(root, options):
    with pytest.raises(SystemExit):
        stamp(root, *options)
    assert "badge" not in (root / "notebooks" / "01_lesson.ipynb").read_text()


def test_a_notebook_without_setup_is_named_and_nothing_is_written(root, capsys):
    cells = [new_markdown_cell("# 02 · Another"), new_code_cell("import torch")]
    nbformat.write(new_notebook(cells=cells), root / "notebooks" / "02_another.ipynb")
    assert stamp(root) == 2
    assert "02_another.ipynb: the first code cell has 0 blocks" in capsys.readouterr().err
    assert "badge" not in (root / "notebooks" / "01_lesson.ipynb").read_text()


@pytest.mark.parametrize("path", sorted((REPO / "notebooks").glob("[0-9][0-9]_*.ipynb")))
def test_the_notebooks_can_be_stamped(path):
    notebook = nbformat.read(path, as_version=4)
    badges.stamp(notebook, f"notebooks/{path.name}", "us/tta", "v1.0")
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    ast.parse(first.source)
    again = json.dumps(notebook)
    badges.stamp(notebook, f"notebooks/{path.name}", "us/tta", "v1.0")
    assert json.dumps(notebook) == again


# --- the setup cell ------------------------------------------------------------------------------

GIT = """#!{python}
import pathlib, sys
assert sys.argv[1:5] == ["clone", "--quiet", "--depth=1", "--branch=v1.0"], sys.argv
assert sys.argv[5] == "https://github.com/us/tta", sys.argv
home = pathlib.Path(sys.argv[6])
home.mkdir()
for name in ("tpt_nb", "ci", "data"):
    (home / name).symlink_to(pathlib.Path("{repo}") / name)
"""


def run_block(folder: Path, path: Path | None = None) -> subprocess.CompletedProcess:
    """The shared setup, run as it stands in a folder with nothing else."""
    code = "\n".join([*badges.NEEDS, badges.BLOCK.format(repo="us/tta", ref="v1.0", mark="")])
    code += "\nimport tpt_nb.lessons.setup as s\nprint('from', Path(s.__file__).parent.parent.name, s.missing())"
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    if path:
        env["PATH"] = f"{path}{os.pathsep}{env['PATH']}"
    # -P and -s: only what is installed, and that has no tpt_nb unless the tests' environment has
    command = [sys.executable, "-s", "-c", code]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)


def test_a_notebook_that_came_alone_makes_a_clone_once(tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "git").write_text(GIT.format(python=sys.executable, repo=REPO))
    (tmp_path / "bin" / "git").chmod(0o755)
    folder = tmp_path / "content"
    folder.mkdir()
    for _ in range(2):  # the second time the clone is there, and git would refuse
        done = run_block(folder, tmp_path / "bin")
        assert done.returncode == 0, done.stderr
        assert done.stdout == "from tpt_nb []\n"


def test_a_notebook_in_a_clone_uses_that_one(tmp_path):
    done = run_block(REPO / "notebooks")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "from tpt_nb []\n"


def test_only_what_is_missing_is_installed_and_nothing_that_is_loaded(tmp_path, monkeypatch):
    listed = tmp_path / "list.txt"
    listed.write_text("# a comment\ntorch>=2.0\nno-such-package-here>=3.0  # why\n")
    assert setup.missing(listed) == ["no-such-package-here>=3.0"]
    asked = []

    def pip(command, **params):
        pins = Path(command[command.index("-c") + 1]).read_text()
        asked.append((command, pins))
        return SimpleNamespace(returncode=len(asked) - 1, stderr="a\nno network\n", stdout="")

    monkeypatch.setattr(setup.subprocess, "run", pip)
    setup.install()
    assert not asked  # the list of the repository is satisfied here
    monkeypatch.setattr(setup, "missing", lambda: ["no-such-package-here>=3.0"])
    setup.install()
    ((command, pins),) = asked
    assert command[-1] == "no-such-package-here>=3.0" and command[:3] == [
        sys.executable,
        "-m",
        "pip",
    ]
    assert f"torch=={setup._version('torch')}" in pins and "numpy==" in pins
    with pytest.raises(RuntimeError, match="could not install no-such-package.*no network"):
        setup.install()


def test_colabs_list_leaves_torch_numpy_and_jupyter_alone():
    names = [line.split(">")[0].strip() for line in setup.LIST.read_text().splitlines()]
    names = [name for name in names if name and not name.startswith("#")]
    assert names and not set(names) & {*setup.KEEP, "jupyterlab", "jupyter"}


@pytest.fixture
def plain(monkeypatch):
    """A machine that is neither Colab nor Kaggle and has no GPU."""
    for name in ("COLAB_RELEASE_TAG", "KAGGLE_KERNEL_RUN_TYPE", "TPT_NB_DRIVE", "TPT_NB_DOWNLOAD"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(config, "weights_here", lambda model: False)
    return monkeypatch


def gpu(monkeypatch):
    properties = SimpleNamespace(name="Tesla T4", total_memory=15 * 2**30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: properties)


def test_ready_says_versions_device_profile_and_why(plain, capsys):
    setup.ready()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("python 3.") and f"torch {torch.__version__}" in lines[0]
    assert lines[1].startswith("device: CPU")
    assert lines[2] == "profile auto: mini, because no CUDA GPU here" and len(lines) == 3


def test_ready_on_colab_without_a_gpu_says_how_to_get_one(plain, capsys):
    plain.setenv("COLAB_RELEASE_TAG", "x")
    setup.ready()
    assert "Change runtime type > T4" in capsys.readouterr().out
    assert "TPT_NB_DOWNLOAD" not in os.environ


def test_a_gpu_on_colab_means_full_and_elsewhere_nothing_is_downloaded_on_a_guess(plain, capsys):
    gpu(plain)
    setup.ready()
    out = capsys.readouterr().out
    assert "device: Tesla T4, 15 GB" in out and "profile auto: mini, because the weights" in out
    assert "TPT_NB_DOWNLOAD" not in os.environ
    plain.setenv("KAGGLE_KERNEL_RUN_TYPE", "Interactive")
    setup.ready()
    assert "profile auto: full, CLIP RN50 on imagenet-a" in capsys.readouterr().out
    assert os.environ["TPT_NB_DOWNLOAD"] == "1"
    plain.setenv("TPT_NB_DOWNLOAD", "0")
    setup.ready()
    assert "profile auto: mini" in capsys.readouterr().out


def test_drive_keeps_archives_features_and_results(plain, tmp_path, capsys):
    for name in ("TPT_NB_ARCHIVES", "TPT_NB_CACHE", "TPT_NB_DATASETS"):
        plain.delenv(name, raising=False)
    plain.setattr(setup, "REPO", tmp_path / "clone")
    (tmp_path / "clone").mkdir()
    assert not setup.use_drive(tmp_path / "nowhere")  # nobody to ask: say so and go on
    assert "not mounted" in capsys.readouterr().out and "TPT_NB_CACHE" not in os.environ
    drive = tmp_path / "MyDrive"
    drive.mkdir()
    for _ in range(2):
        assert setup.use_drive(drive)
    assert os.environ["TPT_NB_CACHE"] == str(drive / "tpt_nb" / "cache")
    assert os.environ["TPT_NB_ARCHIVES"] == str(drive / "tpt_nb" / "archives")
    assert not os.environ["TPT_NB_DATASETS"].startswith(str(drive))
    (tmp_path / "clone" / "out" / "records.jsonl").write_text("{}")
    assert (drive / "tpt_nb" / "out" / "records.jsonl").read_text() == "{}"
    for name in ("TPT_NB_ARCHIVES", "TPT_NB_CACHE", "TPT_NB_DATASETS"):
        plain.delenv(name)


# --- the driver ----------------------------------------------------------------------------------


@pytest.fixture
def driven(monkeypatch, tmp_path):
    """The driver without machine: what it runs, and the results it finds."""
    ran = []

    def run(command, env=None, cwd=None, **params):
        ran.append((command, env))
        out = Path(command[command.index("--out") + 1])
        for name in ("01_x.ipynb", "logs/01_x.log", "runs/a/records.jsonl", "results.json"):
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            (out / name).write_text("{}")
        for name in ("cache/features/x/manifest.json", "model.safetensors"):
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            (out / name).write_text("{}")
        return SimpleNamespace(returncode=1)

    monkeypatch.setattr(colab_driver, "prepare", lambda repo: None)
    monkeypatch.setattr(colab_driver, "device", lambda: "Tesla T4")
    monkeypatch.setattr(colab_driver.subprocess, "run", run)
    monkeypatch.setenv("MPLBACKEND", "module://inline")
    return ran


def test_the_driver_passes_parameters_on_and_packs_results(driven, tmp_path, capsys):
    options = ["--work", str(tmp_path), "--only", "01", "-p", "profile", "full", "-p", "n", "50"]
    assert colab_driver.main(options) == 1  # the run's own exit code
    ((command, env),) = driven
    assert command[1].endswith("run_notebooks.py") and command[-4:] == ["full", "-p", "n", "50"]
    assert command[command.index("--only") + 1] == "01" and "--profile" in command
    assert env["TPT_NB_HEADLESS"] == env["TQDM_DISABLE"] == "1" and "MPLBACKEND" not in env
    with zipfile.ZipFile(tmp_path / "tpt_nb-results.zip") as archive:
        names = set(archive.namelist())
    assert names == {"01_x.ipynb", "logs/01_x.log", "runs/a/records.jsonl", "results.json"}
    assert "Tesla T4" in capsys.readouterr().out


def test_without_a_gpu_the_driver_stops_unless_told(driven, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(colab_driver, "device", lambda: "")
    assert colab_driver.main(["--work", str(tmp_path)]) == 3 and not driven
    assert "no GPU was given" in capsys.readouterr().err
    assert colab_driver.main(["--work", str(tmp_path), "--cpu"]) == 1 and len(driven) == 1


def test_the_driver_alone_needs_an_address(tmp_path, monkeypatch):
    monkeypatch.setattr(colab_driver, "__file__", str(tmp_path / "ci" / "colab_driver.py"))
    args = colab_driver.arguments(["--work", str(tmp_path)])
    with pytest.raises(SystemExit, match="--repo OWNER/NAME"):
        colab_driver.repository(args)
    (tmp_path / "tpt_nb_clone").mkdir()  # a second call on the same machine
    assert colab_driver.repository(args) == tmp_path / "tpt_nb_clone"
