"""The setup cell, the badges, and the driver that runs notebooks on Colab without a browser."""

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
import torch
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

from tpt_nb import runs
from tpt_nb.core import machine
from tpt_nb.lessons import setup
from tpt_nb.runs import profile

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO / "ci"))

import badges  # noqa: E402

START = """\
from tpt_nb.lessons import check, setup

setup.start()
from tpt_nb import datasets, features, figures, losses, methods, metrics, models, runs, views"""
CELL = badges.SETUP.format(repo="OWNER/NAME", ref="TAG") + START


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
    where = "https://colab.research.google.com/github/us/tta/blob/v1.0/notebooks"
    student, _, master = badge.partition(" · ")
    assert student.endswith(f"({where}/student/01_lesson.ipynb)")
    assert master == f"[with solutions]({where}/01_lesson.ipynb)"
    assert notebook.metadata.accelerator == "GPU" and notebook.metadata.colab.gpuType == "T4"
    source = notebook.cells[1].source
    assert " https://github.com/us/tta " in source and " -qb v1.0 " in source
    assert source.endswith(START)
    page = (root / "README.md").read_text()
    assert "github.com/us/tta" in page and "--branch v1.0" in page and "%cd tta" in page
    assert "OWNER/NAME/blob" not in page


def test_the_first_cell_is_eight_lines_and_imports_nothing_that_may_have_to_be_installed(root):
    assert sum(bool(line.strip()) for line in CELL.split("\n")) == 8
    start = CELL.index("setup.start()")
    for node in ast.walk(ast.parse(CELL[:start])):
        if isinstance(node, ast.Import):
            assert {a.name.split(".")[0] for a in node.names} <= sys.stdlib_module_names
    code = "import sys; from tpt_nb.lessons import check, findings, setup, widgets\n"
    code += "print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPO)
    loaded = set(done.stdout.split())
    assert "tpt_nb.lessons.widgets" in loaded
    listed = {line.split(">")[0].strip().replace("-", "_") for line in setup.LIST.open()}
    assert not loaded & {"torch", "open_clip", *listed}


def test_placeholders_are_marked_and_replaced(root):
    assert stamp(root) == 0
    notebook = lesson(root)
    assert "placeholder" in notebook.cells[0].source
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
    ("remote", "repo"),
    [
        ("git@github.com:us/tta.git", "us/tta"),
        ("https://github.com/us/tta.notes", "us/tta.notes"),
        ("https://gitlab.com/us/tta.git", "OWNER/NAME"),
        ("", "OWNER/NAME"),
    ],
)
def test_the_address_is_that_of_git_remote(remote, repo, root):
    def git(*words):
        subprocess.run(["git", *words], cwd=root, check=True, capture_output=True)

    git("init", "-b", "main")
    if remote:
        git("remote", "add", "origin", remote)
    assert stamp(root) == 0
    ref = "main" if repo.startswith("us") else "TAG"
    assert f"/github/{repo}/blob/{ref}/" in lesson(root).cells[0].source
    page = (root / "README.md").read_text()
    assert f"--branch {ref} https://github.com/{repo}\n" in page
    assert ("Placeholder" in page) == (repo == "OWNER/NAME") and page.count("Placeholder") <= 1
    if ref == "main":  # a tag is better, and is taken where there is one
        git("-c", "user.name=a", "-c", "user.email=a@b", "commit", "--allow-empty", "-m", "x")
        git("tag", "v7")
        assert stamp(root) == 0 and "/blob/v7/" in lesson(root).cells[0].source


@pytest.mark.parametrize(
    "options",
    [["--repo", "us"], ["--repo", "us/tta"], ["--ref", "v1"], ["--repo", "a/b", "--ref="]],
)
def test_half_an_address_is_refused(root, options):
    with pytest.raises(SystemExit):
        stamp(root, *options)
    assert "badge" not in (root / "notebooks" / "01_lesson.ipynb").read_text()


def test_an_older_first_cell_is_brought_up_to_date():
    older = badges.OLDER.format(repo="a/b", ref="v1") + START
    assert badges.setup_cell(older, "OWNER/NAME", "TAG") == CELL
    assert badges.setup_cell(CELL, "OWNER/NAME", "TAG") == CELL


def test_a_notebook_without_setup_is_named_and_nothing_is_written(root, capsys):
    cells = [new_markdown_cell("# 02 · Another"), new_code_cell("import torch")]
    nbformat.write(new_notebook(cells=cells), root / "notebooks" / "02_another.ipynb")
    assert stamp(root) == 2
    assert "02_another.ipynb: the first code cell does not begin with" in capsys.readouterr().err
    assert "badge" not in (root / "notebooks" / "01_lesson.ipynb").read_text()


@pytest.mark.parametrize("path", sorted((REPO / "notebooks").glob("[0-9][0-9]_*.ipynb")))
def test_the_notebooks_can_be_stamped(path):
    notebook = nbformat.read(path, as_version=4)
    badges.stamp(notebook, path.name, "us/tta", "v1.0")
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    ast.parse(first.source)
    again = json.dumps(notebook)
    badges.stamp(notebook, path.name, "us/tta", "v1.0")
    assert json.dumps(notebook) == again


# --- the setup cell ------------------------------------------------------------------------------

GIT = """#!{python}
import pathlib, sys
assert sys.argv[1:] == "clone -qb v1.0 --depth=1 https://github.com/us/tta tpt_nb_clone".split()
home = pathlib.Path(sys.argv[-1])
home.mkdir()
for name in ("tpt_nb", "ci", "data"):
    (home / name).symlink_to(pathlib.Path("{repo}") / name)
"""


def run_block(folder: Path, path: Path | None = None) -> subprocess.CompletedProcess:
    """The shared setup, run as it stands in a folder, with a package that is not installed."""
    code = badges.SETUP.format(repo="us/tta", ref="v1.0") + "import tpt_nb, pathlib\n"
    code += "print('from', pathlib.Path(tpt_nb.__file__).parent.parent.name)"
    # an editable installation is found by a path, or a finder, of site-packages
    hidden = f"import sys; sys.path = [p for p in sys.path if p not in ('', {str(REPO)!r})]\n"
    hidden += "sys.meta_path = [f for f in sys.meta_path if 'editable' not in str(f)]\n"
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    if path:
        env["PATH"] = f"{path}{os.pathsep}{env['PATH']}"
    command = [sys.executable, "-s", "-c", hidden + code]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)


def test_a_notebook_that_came_alone_makes_a_clone_once(tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "git").write_text(GIT.format(python=sys.executable, repo=REPO))
    (tmp_path / "bin" / "git").chmod(0o755)
    folder = tmp_path / "content"
    folder.mkdir()
    for _ in range(2):  # the second time the clone is there, and git would refuse
        done = run_block(folder, tmp_path / "bin")
        assert done.returncode == 0 and not done.stderr, done.stderr
        assert done.stdout == "from tpt_nb_clone\n"


def test_without_a_network_git_says_why_and_the_import_fails(tmp_path):
    (tmp_path / "git").write_text("#!/bin/sh\necho no network >&2\nexit 128\n")
    (tmp_path / "git").chmod(0o755)
    done = run_block(tmp_path, tmp_path)
    assert done.returncode and "no network" in done.stderr
    last = done.stderr.strip().splitlines()[-1]  # the hint, where the reader looks
    assert last.startswith("OSError: No network?") and "Kaggle" in last


@pytest.mark.parametrize("folder", ["notebooks", "notebooks/results"])  # masters, one level below
def test_a_notebook_in_a_clone_uses_that_one(folder):
    done = run_block(REPO / folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"from {REPO.name}\n"


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
    monkeypatch.setattr(machine, "gpu_problem", lambda: "no CUDA GPU here")
    monkeypatch.setattr(profile, "weights_here", lambda model: False)
    return monkeypatch


def gpu(monkeypatch):
    properties = SimpleNamespace(name="Tesla T4", total_memory=15 * 2**30)
    monkeypatch.setattr(machine, "gpu_problem", lambda: "")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: properties)


def test_start_says_versions_device_profile_and_why(plain, capsys):
    setup.start()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("python 3.") and f"torch {torch.__version__}" in lines[0]
    assert lines[1].startswith("device: CPU")
    assert lines[2] == "profile auto: mini, because no CUDA GPU here" and len(lines) == 3


def test_a_gpu_without_kernels_is_not_taken_and_it_is_said(plain, capsys):
    """Kaggle's P100 (sm_60) is available to a torch of CUDA 13, and fails when it is used."""
    plain.undo()
    plain.setattr(torch.cuda, "is_available", lambda: True)
    plain.setattr(torch.cuda, "get_device_capability", lambda i: (6, 0))
    plain.setattr(torch.cuda, "get_device_name", lambda i: "Tesla P100")
    plain.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_80", "sm_120"])
    setup.start()
    out = capsys.readouterr().out
    assert "device: CPU" in out and "Tesla P100 (sm_60), is not one that torch" in out
    assert profile.resolve(runs.RunConfig(profile="mini"))[0].device == "cpu"
    with pytest.raises(ValueError, match="device 'cuda'.*P100.*use cpu"):
        profile.resolve(runs.RunConfig(profile="mini", device="cuda"))
    plain.setattr(torch.cuda, "get_device_capability", lambda i: (7, 5))
    assert machine.has_gpu() and profile.resolve(runs.RunConfig(profile="mini"))[0].device == "cuda"


@pytest.mark.parametrize(
    "capability, archs, fits",
    [
        ((6, 0), ["sm_75", "sm_80"], False),
        ((7, 5), ["sm_75", "sm_80"], True),
        ((8, 9), ["sm_75", "sm_86"], True),  # a binary runs on later minor versions
        ((8, 0), ["sm_86"], False),
        ((9, 0), ["sm_80"], False),
        ((9, 0), ["sm_80", "compute_80"], True),  # PTX runs on all that is later
        ((9, 0), ["sm_90a"], True),
        ((12, 0), ["sm_90a"], False),
        ((12, 1), ["sm_120"], True),
    ],
)
def test_kernels_run_where_nvidia_says(capability, archs, fits):
    assert machine.runs_on(capability, archs) is fits


def test_start_on_colab_without_a_gpu_says_how_to_get_one(plain, capsys):
    plain.setenv("COLAB_RELEASE_TAG", "x")
    setup.start()
    assert "Change runtime type > T4" in capsys.readouterr().out
    assert "TPT_NB_DOWNLOAD" not in os.environ


def test_a_gpu_on_colab_means_full_and_elsewhere_nothing_is_downloaded_on_a_guess(plain, capsys):
    gpu(plain)
    setup.start()
    out = capsys.readouterr().out
    assert "device: Tesla T4, 15 GB" in out and "profile auto: mini, because the weights" in out
    assert "TPT_NB_DOWNLOAD" not in os.environ
    plain.setenv("KAGGLE_KERNEL_RUN_TYPE", "Interactive")
    setup.start()
    assert "profile auto: full, CLIP RN50 on imagenet-a" in capsys.readouterr().out
    assert os.environ["TPT_NB_DOWNLOAD"] == "1"
    plain.setenv("TPT_NB_DOWNLOAD", "0")
    setup.start()
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
    assert (tmp_path / "clone" / "out").is_symlink()
    (tmp_path / "clone" / "out" / "records.jsonl").write_text("{}")
    assert (drive / "tpt_nb" / "out" / "records.jsonl").read_text() == "{}"


def test_drive_takes_over_an_out_that_is_there(plain, tmp_path, capsys):
    clone, drive = tmp_path / "clone", tmp_path / "MyDrive"
    plain.setattr(setup, "REPO", clone)
    for name, text in (("runs/a/records.jsonl", "1\n2\n"), ("runs/b/records.jsonl", "1\n")):
        (clone / "out" / name).parent.mkdir(parents=True)
        (clone / "out" / name).write_text(text)
    there = drive / "tpt_nb" / "out" / "runs"
    for name, text in (("a", "1\n"), ("b", "1\n2\n3\n")):  # of an earlier machine
        (there / name).mkdir(parents=True)
        (there / name / "records.jsonl").write_text(text)
    assert setup.use_drive(drive)
    assert (clone / "out").is_symlink() and "old folder is" in capsys.readouterr().out
    assert (there / "a" / "records.jsonl").read_text() == "1\n2\n"  # the longer one is kept
    assert (there / "b" / "records.jsonl").read_text() == "1\n2\n3\n"
    (kept,) = clone.glob("out-before-drive-*")
    assert (kept / "runs" / "b" / "records.jsonl").read_text() == "1\n"


def test_a_refused_mount_is_said_and_the_notebook_goes_on(plain, tmp_path, capsys):
    def mount(place):
        raise ValueError("mount failed")

    drive = SimpleNamespace(mount=mount)
    plain.setitem(sys.modules, "google", SimpleNamespace(colab=SimpleNamespace(drive=drive)))
    plain.setitem(sys.modules, "google.colab", SimpleNamespace(drive=drive))
    plain.delenv("TPT_NB_HEADLESS", raising=False)
    plain.delenv("TPT_NB_CACHE", raising=False)
    assert not setup.use_drive(tmp_path / "drive" / "MyDrive")
    out = capsys.readouterr().out
    assert "was not mounted (mount failed)" in out and "run this cell again" in out
    assert "TPT_NB_CACHE" not in os.environ


def test_a_drive_that_cannot_be_written_is_said(plain, tmp_path, capsys):
    plain.setattr(setup, "REPO", tmp_path / "clone")
    plain.delenv("TPT_NB_CACHE", raising=False)
    (tmp_path / "MyDrive").mkdir()
    (tmp_path / "MyDrive" / "tpt_nb").write_text("a file in its place")
    assert not setup.use_drive(tmp_path / "MyDrive")
    assert "cannot be written" in capsys.readouterr().out and "TPT_NB_CACHE" not in os.environ


# --- model and images ----------------------------------------------------------------------------

VALUES = {"device": "cpu", "reduced_size": 8, "n_aug": 3, "selection_p_all": 0.3}


def test_prepare_gives_configuration_images_and_model(plain, capsys):
    world = setup.prepare(profile="auto", coop="auto", out_dir="out/x", seed=5, **VALUES)
    config = world.config
    assert (config.profile, config.model, config.seed, config.n_aug) == ("mini", "mini", 5, 3)
    assert config.options["rho"] == 0.3 and config.coop and config.out == str(REPO / "out" / "x")
    assert len(world.images) == 8 and world.clip.name == "mini" and world.extra is None
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "profile mini (no CUDA GPU here): mini on iconshift-a, device cpu",
        "8 images of 200 classes",
        "the prompt starts from CoOp",
    ]
    other = setup.prepare(dataset="iconshift-r", n=4, **VALUES)
    assert len(other.images) == 4 and other.config.reduced_size == 8 and not other.config.coop


def test_prepare_goes_on_with_mini_where_full_was_asked_for(plain, capsys):
    plain.setenv("TPT_NB_DOWNLOAD", "0")
    also = {"mini": {"seed": 3}, "also": lambda world: world.config.seed}
    world = setup.prepare(profile="full", root="/nowhere", seed=1, **also, **VALUES)
    assert world.config.profile == "mini" and world.extra == 3 and world.config.root == ""
    out = capsys.readouterr().out
    assert "PROFILE full IS NOT POSSIBLE HERE: not everything for the full profile is here" in out
    assert "Going on with mini; nothing is ImageNet-A.\nprofile mini (full is not possible" in out


def test_what_else_a_notebook_needs_decides_too(plain, capsys):
    def also(world):
        if world.config.model != "mini":
            raise OSError("no captions")
        return "captions"

    real, mini = setup._world, {"profile": "mini", "model": "mini", "dataset": "auto"}

    def pretend(n, also, values, *rest):  # a full profile that only lacks the captions
        if values.get("profile", "auto") == "auto":
            raise OSError("no captions")
        return real(n, also, values, *rest)

    plain.setattr(setup, "_world", pretend)
    plain.setattr("tpt_nb.runs.choose_profile", lambda config, **needs: ("full", "all is here"))
    assert setup.prepare(also=also, **VALUES).extra == "captions"  # auto never ends in an error
    assert "NOT POSSIBLE HERE: no captions" in capsys.readouterr().out
    with pytest.raises(OSError, match="no captions"):  # but what was named is not exchanged
        setup.prepare(dataset="imagenet-r", also=also, **VALUES)
    with pytest.raises(ValueError, match="closest|did you mean|unknown parameter|no_such"):
        setup.prepare(**mini, no_such=1)
