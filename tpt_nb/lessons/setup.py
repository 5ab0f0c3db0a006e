"""What the first cell of every notebook does: install what Colab lacks, and say what there is.

``install`` runs where the notebook came alone (Colab, Kaggle); it installs what is missing of
``ci/requirements-colab.txt`` and cannot touch torch, numpy and Jupyter, whose replacement breaks a
running kernel. ``ready`` prints versions, device and profile. Both work without a network and
without a front end (papermill, a Colab machine run from a shell).
"""

import os
import platform
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

from tpt_nb.core.paths import REPO

LIST = REPO / "ci" / "requirements-colab.txt"


DRIVE = Path("/content/drive/MyDrive")


# loaded already in a running kernel, or pinned by Colab's own packages
KEEP = ("torch", "torchvision", "torchaudio", "numpy", "pandas", "scipy", "pillow", "matplotlib")
KEEP += ("ipykernel", "ipython", "ipywidgets", "jupyter-client", "jupyter-core", "traitlets")
KEEP += ("tornado", "pyzmq", "notebook", "nbclient", "nbformat", "nbconvert")


def on_colab() -> bool:
    """Is this a Colab machine, with or without a front end?"""
    return "COLAB_RELEASE_TAG" in os.environ or "google.colab" in sys.modules


def on_kaggle() -> bool:
    return "KAGGLE_KERNEL_RUN_TYPE" in os.environ


def has_frontend() -> bool:
    """Can a cell ask its reader for something? Under papermill there is nobody to answer."""
    return "google.colab" in sys.modules and not os.environ.get("TPT_NB_HEADLESS")


def missing(path: Path = LIST) -> list[str]:
    """The lines of a list of requirements whose package is not installed."""
    out = []
    for line in path.read_text().splitlines():
        line = line.split("#")[0].strip()
        name = line.split(">")[0].split("=")[0].split("[")[0].strip()
        if name and not _version(name):
            out.append(line)
    return out


def install() -> None:
    """Install what is missing of Colab's list, and nothing else.

    Raises ``RuntimeError`` with pip's last words if it cannot (no network, for instance).
    """
    wanted = missing()
    if not wanted:
        return
    pins = [f"{name}=={version}" for name in KEEP if (version := _version(name))]
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder) / "constraints.txt"
        constraints.write_text("\n".join(pins))
        pip = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
        done = subprocess.run(
            [*pip, "-c", str(constraints), *wanted], capture_output=True, text=True
        )
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
        raise RuntimeError(
            f"pip could not install {', '.join(wanted)}: {last}. Is there a network? On Kaggle, "
            "switch on 'Internet' in the notebook's settings."
        )


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def ready(drive: bool = False) -> None:
    """Print python, torch, device and the profile that "auto" stands for, with the reason.

    On Colab and Kaggle "auto" may download what the full profile needs, if there is a GPU.

    Args:
        drive: on Colab, keep archives, features and results on Google Drive, so that they outlive
            the machine (see :func:`use_drive`).
    """
    import torch

    from tpt_nb import __version__

    print(f"python {platform.python_version()}, torch {torch.__version__}, tpt_nb {__version__}")
    if drive or os.environ.get("TPT_NB_DRIVE"):
        use_drive()
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        print(f"device: {properties.name}, {properties.total_memory / 2**30:.0f} GB")
        if on_colab() or on_kaggle():
            os.environ.setdefault("TPT_NB_DOWNLOAD", "1")
    else:
        print(f"device: CPU, {torch.get_num_threads()} threads")
        if on_colab():
            print("For a GPU: Runtime > Change runtime type > T4 GPU, then start again.")
    print(profile())


def profile() -> str:
    """A sentence: what ``profile="auto"`` will be and why. Downloads nothing."""
    from tpt_nb import runs

    asked = os.environ.pop("TPT_NB_DOWNLOAD", None)
    try:
        name, why = runs.choose_profile(runs.RunConfig())
    finally:
        if asked is not None:
            os.environ["TPT_NB_DOWNLOAD"] = asked
    if asked == "1" and name == "mini" and "not on this machine" in why:
        dataset, model = runs.PROFILES["full"]
        return (
            f"profile auto: full, CLIP {model} on {dataset}, which are downloaded when they are "
            "first used (0.9 GB); profile=mini needs nothing"
        )
    return f"profile auto: {name}, because {why}"


def use_drive(folder: Path = DRIVE) -> bool:
    """Archives of data sets, cached features and ``out`` on Google Drive; whether that worked.

    One archive per data set is kept there and unpacked on the machine (Drive is slow with many
    small files); features are some hundred files of 16 MB; results are appended image by image, so
    that a run whose machine was taken away goes on where it stopped.
    """
    if not folder.is_dir():
        if not has_frontend():
            print("Google Drive is not mounted, and nobody can be asked to allow it; going on.")
            return False
        from google.colab import drive

        drive.mount(str(folder.parent))
    home = folder / "tpt_nb"
    for variable, name in (("TPT_NB_ARCHIVES", "archives"), ("TPT_NB_CACHE", "cache")):
        (home / name).mkdir(parents=True, exist_ok=True)
        os.environ.setdefault(variable, str(home / name))
    # unpacked images stay on the machine, whatever the cache is
    os.environ.setdefault("TPT_NB_DATASETS", str(Path.home() / "datasets"))
    out = REPO / "out"
    (home / "out").mkdir(exist_ok=True)
    if not out.exists():
        out.symlink_to(home / "out", target_is_directory=True)
    print("Archives, features and results are kept in the folder tpt_nb of your Drive.")
    return True
