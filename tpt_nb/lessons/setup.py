"""What the first cells of every notebook do: ``start`` the machine, ``prepare`` model and images.

Both work without a network and without a front end (papermill, a Colab machine run from a shell).
On top level only what a bare Colab has is imported: ``start`` installs the rest.
"""

import dataclasses
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from tpt_nb import figures
from tpt_nb.core import machine
from tpt_nb.core.paths import DATA, REPO
from tpt_nb.lessons import check, parameters

__all__ = ["DATA", "REPO", "World", "install", "missing", "packages", "prepare", "start"]
__all__ += ["use_drive"]

LIST = REPO / "ci" / "requirements-colab.txt"
DRIVE = Path("/content/drive/MyDrive")
# loaded already in a running kernel, or pinned by Colab's own packages
KEEP = ("torch", "torchvision", "torchaudio", "numpy", "pandas", "scipy", "pillow", "matplotlib")
KEEP += ("ipykernel", "ipython", "ipywidgets", "jupyter-client", "jupyter-core", "traitlets")
KEEP += ("tornado", "pyzmq", "notebook", "nbclient", "nbformat", "nbconvert")


def start(drive: bool = False) -> None:
    """Install what is missing, set the style of figures; say versions, device and profile.

    On Colab and Kaggle profile "auto" may download what full needs, if there is a GPU. From here on
    parameters that papermill gives are checked (:mod:`tpt_nb.lessons.parameters`).

    Args:
        drive: on Colab, keep archives, features and results on Google Drive, so that they outlive
            the machine (see :func:`use_drive`).
    Raises:
        RuntimeError: something is missing and pip cannot install it.
    """
    parameters.watch()
    hosted = {"COLAB_RELEASE_TAG", "KAGGLE_KERNEL_RUN_TYPE"} & os.environ.keys()
    if hosted or not _version("tpt_nb"):  # an environment of the reader's own is left as it is
        install()
    import torch
    from IPython import get_ipython

    from tpt_nb import __version__

    figures.setup()
    check.go_on(get_ipython())
    print(f"python {platform.python_version()}, torch {torch.__version__}, tpt_nb {__version__}")
    if drive or os.environ.get("TPT_NB_DRIVE"):
        use_drive()
    if not (problem := machine.gpu_problem()):
        properties = torch.cuda.get_device_properties(0)
        print(f"device: {properties.name}, {properties.total_memory / 2**30:.0f} GB")
        if hosted:
            os.environ.setdefault("TPT_NB_DOWNLOAD", "1")
    else:
        print(f"device: CPU, {torch.get_num_threads()} threads")
        if torch.cuda.is_available():
            print(f"Going without the GPU: {problem}.")
        if os.environ.get("TPT_NB_PRETEND_GPU") == "1":
            print("TPT_NB_PRETEND_GPU: the profile is chosen as if there were a GPU.")
            if hosted:
                os.environ.setdefault("TPT_NB_DOWNLOAD", "1")
        elif "COLAB_RELEASE_TAG" in hosted:
            print("For a GPU: Runtime > Change runtime type > T4 GPU, then start again.")
    print(_profile())


def install(also: Sequence[str] = ()) -> None:
    """Install what is missing of Colab's list and of ``also``, but not torch, numpy and Jupyter.

    Their replacement would break the running kernel. Raises ``RuntimeError`` with pip's last words.
    """
    if wanted := missing() + [name for name in also if not _version(name)]:
        _pip(wanted)


def packages(*wanted: str) -> Callable[[], None]:
    """For ``prepare(needs=...)``: has these packages here, installed where downloads are allowed.

    ``wanted`` are lines of a list of requirements. What it returns raises ``ValueError`` with the
    command that installs them, or ``RuntimeError`` with pip's last words.
    """

    def bring() -> None:
        lacking = [line for line in wanted if not _version(re.split("[<>=[]", line)[0])]
        if lacking and os.environ.get("TPT_NB_DOWNLOAD") != "1":
            raise ValueError(f"not installed: pip install {' '.join(lacking)}")
        if lacking:
            print(f"installing {', '.join(lacking)} ...", flush=True)
            _pip(lacking)

    return bring


def _pip(wanted: list[str]) -> None:
    pins = [f"{name}=={version}" for name in KEEP if (version := _version(name))]
    with tempfile.TemporaryDirectory() as folder:
        constraints = Path(folder) / "constraints.txt"
        constraints.write_text("\n".join(pins))
        pip = [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
        pip += ["-c", str(constraints), *wanted]
        done = subprocess.run(pip, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
        raise RuntimeError(
            f"pip could not install {', '.join(wanted)}: {last}. Is there a network? On Kaggle, "
            "switch on 'Internet' in the notebook's settings."
        )


def missing(path: Path = LIST) -> list[str]:
    """The lines of a list of requirements whose package is not installed."""
    lines = [line.split("#")[0].strip() for line in path.read_text().splitlines()]
    names = [line.split(">")[0].split("=")[0].split("[")[0].strip() for line in lines]
    return [line for line, name in zip(lines, names, strict=True) if name and not _version(name)]


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _profile() -> str:
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
            "first used (0.9 GB), if this notebook can have all it needs for that; profile=mini "
            "needs nothing"
        )
    return f"profile auto: {name}, because {why}"


def use_drive(folder: Path = DRIVE) -> bool:
    """Archives of data sets, cached features and ``out`` on Google Drive; whether that worked.

    One archive per data set is kept there and unpacked on the machine (Drive is slow with many
    small files). Records are written group by group, in a file that is closed after each: a run
    whose machine was taken away goes on. What lies in ``out`` already is copied to Drive.
    """
    if not folder.is_dir():
        if "google.colab" not in sys.modules or os.environ.get("TPT_NB_HEADLESS"):
            print("Google Drive is not mounted, and nobody can be asked to allow it; going on.")
            return False
        from google.colab import drive

        try:
            drive.mount(str(folder.parent))
        except Exception as error:  # google.colab raises plain ones: refused, timed out, in use
            print(f"Google Drive was not mounted ({error}). Nothing is kept there; going on.")
            print("To allow it, run this cell again, and say yes in the window that opens.")
            return False
    home = folder / "tpt_nb"
    try:
        for name in ("archives", "cache", "out"):
            (home / name).mkdir(parents=True, exist_ok=True)
        kept = _link(REPO / "out", home / "out")
    except OSError as error:
        print(f"Google Drive cannot be written ({error}). Nothing is kept there; going on.")
        return False
    os.environ.setdefault("TPT_NB_ARCHIVES", str(home / "archives"))
    os.environ.setdefault("TPT_NB_CACHE", str(home / "cache"))
    # unpacked images stay on the machine, whatever the cache is
    os.environ.setdefault("TPT_NB_DATASETS", str(Path.home() / "datasets"))
    print(f"Archives, features and results are kept in {home}, the folder tpt_nb of your Drive.")
    if kept:
        print(f"What was in out is there too; the old folder is {kept}.")
    return True


def _link(out: Path, home: Path) -> Path | None:
    """Make ``out`` a link to ``home``; a folder that was there is copied into it and renamed.

    A file that ``home`` has too stays as it is there if it is longer: records only grow.
    """
    if out.is_symlink():
        if out.resolve() == home.resolve():
            return None
        out.unlink()
    kept = None
    if out.exists():
        for path in sorted(path for path in out.rglob("*") if path.is_file()):
            target = home / path.relative_to(out)
            if "cache" in path.relative_to(out).parts[:1]:
                continue  # features are made again, or lie in the cache of Drive
            if not target.exists() or target.stat().st_size < path.stat().st_size:
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(path, target)
        kept = out.with_name(f"out-before-drive-{time.strftime('%Y%m%d-%H%M%S')}")
        out.rename(kept)
    out.symlink_to(home, target_is_directory=True)
    return kept


@dataclasses.dataclass(frozen=True)
class World:
    """What the cells of a notebook work with."""

    config: Any  # runs.RunConfig with every default filled in: profile, device, learning rate ...
    why: str  # why this profile
    images: Any  # the data set: (image, target), with classnames, targets and ids
    clip: Any  # models.Clip, on the device
    extra: Any = None  # what ``also`` returned


def prepare(
    *,
    coop: str = "",
    n: int | None = None,
    needs: Sequence[str | Callable[[], Any]] = (),
    lacking: str = "",
    also: Callable[[World], Any] | None = None,
    mini: dict | None = None,
    out_dir: str = "out/runs",
    **values,
) -> World:
    """Configuration, images and model for a notebook's parameters; says which.

    ``needs`` and ``lacking`` are where a notebook states what it takes for full. What can be
    downloaded is, where that is allowed; where full was asked for, or is what "auto" found, and
    something that it needs is not to be had, this says so and goes on with mini. An error of mini,
    or of a data set or model that was named under "auto", is raised.

    Args:
        coop: CoOp checkpoint to start from; "auto": the embedded one in mini, in full that of
            CoOp's authors for this model (:func:`tpt_nb.runs.coop_context`).
        n: images to load; default: ``reduced_size`` of the configuration.
        needs: beside weights and images, for full: names of other data sets, or functions that
            bring something (:func:`packages`). See :func:`tpt_nb.runs.bring`.
        lacking: in words, what only the reader can give for full and has not given.
        also: makes or checks what else this notebook needs; its ``ValueError``, ``OSError`` or
            ``RuntimeError`` means that the profile is not possible. Its result is ``extra``.
        mini: values that are others in mini: what is "auto", and all of them if it goes on with
            mini because full is not possible.
        out_dir: where runs are kept, from the top of the repository.
        values: of ``runs.RunConfig``, by the study's names too: profile, model, dataset, ...
    """
    from tpt_nb import runs

    values |= {"out": str(REPO / out_dir), "coop": coop}
    wanted = {"needs": needs, "lacking": lacking}
    asked = {name: values.get(name, "auto") for name in ("profile", "dataset", "model")}
    try:
        world = _world(n, also, values, wanted, mini)
    except (ValueError, OSError, RuntimeError) as error:
        guess, other = set(asked.values()) == {"auto"}, []
        if guess:
            asked["profile"], _ = runs.choose_profile(runs.RunConfig(coop=coop), **wanted)
            other = [k for k, v in (mini or {}).items() if values.get(k) not in (v, "auto", None)]
        if asked["profile"] == "full":
            print(f"PROFILE full IS NOT POSSIBLE HERE: {error}")
            print("Going on with mini; nothing is ImageNet-A.")
        elif other:
            print(f"profile mini cannot take {', '.join(other)}: {error}\nGoing on without.")
        else:
            raise
        values |= {"profile": "mini", "dataset": "auto", "model": "auto", "root": ""}
        values |= {"coop": coop and "auto"} | (mini or {})
        world = _world(n, also, values, {}, None, "full is not possible here")
    _announce(world, coop)
    return world


def _announce(world: World, coop: str) -> None:
    """Say which profile and why, on what, and what the prompt starts from."""
    config, images = world.config, world.images
    print(f"profile {config.profile} ({world.why}): {world.clip.name} on {images.name}", end=", ")
    print(f"device {config.device}\n{len(images)} images of {len(images.classnames)} classes")
    if coop:
        print(f"the prompt starts from {'CoOp' if config.coop else repr(config.ctx_init)}", end="")
        none = coop == "auto" and not config.coop
        print(f" (CoOp's authors published no context for {config.model})" if none else "")


def _world(
    n: int | None, also, values: dict, wanted: dict, mini: dict | None, why: str = ""
) -> World:
    from tpt_nb import datasets, models, runs

    names = ("profile", "dataset", "model", "root", "coop")
    asked = runs.RunConfig(**{name: values[name] for name in names if name in values})
    profile, reason = runs.choose_profile(asked, **wanted)
    if profile == "mini":
        values = values | {k: v for k, v in (mini or {}).items() if values.get(k) == "auto"}
    if asked.profile == "auto" and "auto" in (asked.dataset, asked.model):
        values = values | {"profile": profile}  # decided: a data set of `mini` is not a named one
        wanted = {} if profile == "mini" else wanted
    config, named = runs.resolve(runs.RunConfig.from_dict(values), **wanted)
    why = why or (reason if asked.profile == "auto" else named)
    n = config.reduced_size if n is None else n
    images = datasets.load(config.dataset, n=n, root=config.root or None)
    world = World(config, why, images, models.load(config.model, device=config.device))
    return dataclasses.replace(world, extra=also(world)) if also else world
