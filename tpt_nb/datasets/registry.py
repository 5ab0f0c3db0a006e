"""The table of data sets: name -> loader. One more is one more line of ``DATASETS``.

The embedded IconShift variants are always there; ``folder`` reads any tree of class folders, here
or remote; the field's sets (ImageNet and its variants, the cross-domain ones) are read from where
they are kept, and downloaded where their authors let one.

A name may be followed by a damage and its severity: ``iconshift-v2/fog/3`` is IconShift-V2 in fog,
``imagenet-c/fog/3`` the images that ImageNet-C has of it.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from PIL import Image

from tpt_nb.core.messages import unknown
from tpt_nb.core.paths import datasets_dir
from tpt_nb.datasets import benchmarks, iconshift
from tpt_nb.datasets.benchmarks import BENCHMARKS
from tpt_nb.datasets.damage import CORRUPTIONS, check_damage, corrupted
from tpt_nb.datasets.dataset import Dataset, balanced_subset, subset
from tpt_nb.datasets.folder import load_folder
from tpt_nb.datasets.imagenet import ARCHIVE_OF
from tpt_nb.datasets.sources import how_to_get

ICONSHIFT = tuple(v for v in iconshift.VARIANTS if v != "iconshift-train")


def _scene(variant: str, i: int) -> Image.Image:
    return iconshift.scene(variant, i)[0]


def _iconshift(variant: str, root, classnames) -> Dataset:
    names = list(iconshift.classnames())
    indices = iconshift.kept(variant) or range(iconshift.size(variant))
    ids = [f"{variant}/{i:05d}" for i in range(len(indices))]
    targets = [i % len(names) for i in indices]
    fetch = partial(_scene, variant)
    return Dataset(variant, names, ids, targets, iconshift.fingerprint(variant), fetch)


def _folder(root, classnames) -> Dataset:
    if root is None:
        raise ValueError("data set 'folder' needs root=PATH, a folder with one folder per class")
    return load_folder(root, classnames)


def _benchmark(name: str, root, classnames) -> Dataset:
    return benchmarks.load(name, root or _default_root(name), classnames)


def _imagenet_c(damage: str, severity: int, root, classnames) -> Dataset:
    root = root or _default_root("imagenet-c")
    return benchmarks.load_imagenet_c(damage, severity, root, classnames)


def _corrupted(name: str, damage: str, severity: int, root, classnames) -> Dataset:
    return corrupted(get(name)(root, classnames), damage, severity)


def _which_damage(root, classnames) -> Dataset:
    raise ValueError(
        "imagenet-c is 75 data sets: say which damage and which severity, 1 to 5, as in "
        "imagenet-c/fog/3."
    )


def _default_root(name: str) -> Path:
    """Where the data set is, if it was downloaded or put into the usual folder."""
    usual = datasets_dir()
    if (usual / name).is_dir():
        return usual / name
    if any((usual / place).is_dir() for place in BENCHMARKS[name].places if place):
        return usual
    raise FileNotFoundError(
        f"{name} is not on this machine (looked in {usual}). If you have it, give its folder as "
        f"root, or put it there; TPT_NB_DATASETS names another folder. {how_to_get(name)}"
    )


Loader = Callable[[str | Path | None, Mapping[str, str] | Sequence[str] | None], Dataset]

DATASETS: dict[str, Loader] = {
    **{name: partial(_iconshift, name) for name in ICONSHIFT},
    "folder": _folder,
    **{name: partial(_benchmark, name) for name in BENCHMARKS},
    "imagenet-c": _which_damage,
}


def names() -> list[str]:
    """Names that :func:`load` accepts."""
    return list(DATASETS)


def get(name: str) -> Loader:
    """``loader(root, classnames)`` of a data set, damaged if its name says so (see above).

    Raises ``ValueError`` with the closest known one for an unknown name, damage or severity.
    """
    base, *damage = name.split("/") if name not in DATASETS else [name]
    if base not in DATASETS:
        raise ValueError(unknown("data set", base, DATASETS))
    if not damage:
        return DATASETS[base]
    if len(damage) != 2 or not damage[1].isdecimal():
        raise ValueError(
            f"data set {name!r}: a damaged one is named <data set>/<damage>/<severity>, with a "
            f"severity from 1 to 5, as {base}/fog/3."
        )
    kind, severity = damage[0], int(damage[1])
    check_damage(kind, severity, ARCHIVE_OF if base == "imagenet-c" else CORRUPTIONS)
    if base == "imagenet-c":
        return partial(_imagenet_c, kind, severity)
    return partial(_corrupted, base, kind, severity)


def register(name: str, loader: Loader) -> None:
    """One more data set for this session, such as one's own in a notebook."""
    DATASETS[name] = loader


def load(
    name: str,
    n: int | None = None,
    seed: int = 0,
    root: str | Path | None = None,
    classnames: Mapping[str, str] | Sequence[str] | None = None,
) -> Dataset:
    """A data set by name, or a class-balanced subset of ``n`` images of it.

    Args:
        name: one of :func:`names`, or such a name with a damage (see the module's text).
        n: how many images; None or 0 for all.
        seed: chooses the subset (and nothing else).
        root: for ``folder``: a folder with one folder of images per class. For the field's sets:
            the folder of the set, or one that holds many; by default the place where downloads go
            (:func:`tpt_nb.core.paths.datasets_dir`). Class folders may be remote (``s3://...``).
        classnames: for ``folder``: the expected class names; by default the folder names. For the
            field's sets: other wordings, in label order or as a mapping.

    Raises:
        ValueError: unknown name, ``n`` out of range, ``root`` missing or of the wrong layout,
            folders or labels that do not fit the class names.
        FileNotFoundError, OSError: the data set is not here (the message says how to get it); a
            shipped file is missing or damaged (the message says how to rebuild it).
    """
    whole = get(name)(root, classnames)
    chosen = balanced_subset(whole.targets, n, seed)
    return whole if len(chosen) == len(whole) else subset(whole, chosen)


def file_name(name: str) -> str:
    """How the files of RA-TTA's authors spell a data set: ``imagenet_adversarial``."""
    known = {"imagenet": "imagenet_1k", "imagenet-a": "imagenet_adversarial"}
    return (known | {"imagenet-r": "imagenet_rendition"}).get(name, name.replace("-", "_"))


def template(name: str) -> str:
    """The sentence that CoOp (RA-TTA, where CoOp has none) uses for a data set."""
    base = name.split("/")[0]
    return BENCHMARKS[base].template if base in BENCHMARKS else "a photo of a {}."
