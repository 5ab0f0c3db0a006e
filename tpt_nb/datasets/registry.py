"""Data sets by name: map-style sets of (PIL RGB image, target) with their class names.

The embedded IconShift variants are always there; ``folder`` reads any tree of class folders, here
or remote; the field's sets (ImageNet and its variants, the cross-domain ones) are read from where
they are kept, see :mod:`tpt_nb.benchmarks`, and downloaded where their authors let one.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from tpt_nb.core.paths import datasets_dir
from tpt_nb.datasets import benchmarks, iconshift
from tpt_nb.datasets.benchmarks import BENCHMARKS
from tpt_nb.datasets.folder import Folder, load_folder
from tpt_nb.datasets.sources import how_to_get


@dataclass
class Dataset:
    """Images with targets; ``ds[i]`` decodes or composes image i, and may raise on a damaged one.

    ``ids`` are stable and unique within ``fingerprint`` (a hash of what the images depend on),
    whatever subset was asked for, so that a cache can serve subsets. ``note`` is what a reader of
    numbers should know about the set, such as that it is not the whole one.
    """

    name: str
    classnames: list[str]
    ids: list[str]
    targets: list[int]
    fingerprint: str
    fetch: Callable[[int], Image.Image] = field(repr=False)
    paths: list[str] | None = field(default=None, repr=False)
    note: str = ""

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> tuple[Image.Image, int]:
        return self.fetch(i), self.targets[i]


@dataclass(frozen=True)
class _Scenes:
    """Picklable image getter, so that DataLoader workers can be spawned."""

    variant: str
    indices: tuple[int, ...]

    def __call__(self, i: int) -> Image.Image:
        return iconshift.scene(self.variant, self.indices[i])[0]


def balanced_subset(targets: list[int], n: int | None, seed: int) -> list[int]:
    """Positions of a class-balanced subset, ascending.

    Every class gives ``n // C`` images and as many classes as are left over give one more; which
    ones, the seed decides. A larger ``n`` with the same seed contains the smaller subset.
    ``None`` or 0: all.

    Raises:
        ValueError: ``n`` is negative or larger than the set.
    """
    total = len(targets)
    if not n:
        return list(range(total))
    if not 0 < n <= total:
        raise ValueError(
            f"asked for n={n} images, but the set has {total}; choose n from 1 to {total}"
        )
    order = np.random.default_rng(seed).permutation(total)
    rounds, seen = np.empty(total, int), {}
    for rank, i in enumerate(order):
        seen[targets[i]] = seen.get(targets[i], 0) + 1
        rounds[rank] = seen[targets[i]]
    return sorted(order[np.argsort(rounds, kind="stable")][:n].tolist())


def _iconshift(name: str, n: int | None, seed: int) -> Dataset:
    total, classes = iconshift.size(name), iconshift.classnames()
    indices = iconshift.kept(name) or range(total)
    targets = [i % len(classes) for i in indices]
    chosen = balanced_subset(targets, n, seed)
    return Dataset(
        name=name,
        classnames=list(classes),
        ids=[f"{name}/{i:05d}" for i in chosen],
        targets=[targets[i] for i in chosen],
        fingerprint=iconshift.fingerprint(name),
        fetch=_Scenes(name, tuple(chosen)),
    )


ICONSHIFT = tuple(v for v in iconshift.VARIANTS if v != "iconshift-train")


def known() -> list[str]:
    """Names that :func:`load` accepts."""
    return [*ICONSHIFT, "folder", *BENCHMARKS]


def template(name: str) -> str:
    """The sentence that CoOp (RA-TTA, where CoOp has none) uses for a data set."""
    return BENCHMARKS[name].template if name in BENCHMARKS else "a photo of a {}."


def load(
    name: str,
    n: int | None = None,
    seed: int = 0,
    root: str | Path | None = None,
    classnames: Mapping[str, str] | Sequence[str] | None = None,
) -> Dataset | Folder:
    """A data set by name, or a class-balanced subset of ``n`` images of it.

    Args:
        name: one of :func:`known`.
        n: how many images; None or 0 for all.
        seed: chooses the subset (and nothing else).
        root: for ``folder``: a folder with one folder of images per class. For the field's sets:
            the folder of the set, or one that holds many; by default the place where downloads go
            (:func:`tpt_nb.paths.datasets_dir`). Class folders may be remote (``s3://...``).
        classnames: for ``folder``: the expected class names; by default the folder names. For the
            field's sets: other wordings, in label order or as a mapping.

    Raises:
        ValueError: unknown name, ``n`` out of range, ``root`` missing or of the wrong layout,
            folders or labels that do not fit the class names.
        FileNotFoundError, OSError: the data set is not here (the message says how to get it); a
            shipped file is missing or damaged (the message says how to rebuild it).
    """
    if name in ICONSHIFT:
        return _iconshift(name, n, seed)
    if name in BENCHMARKS:
        whole = benchmarks.load(name, root or _default_root(name), classnames)
    elif name != "folder":
        raise ValueError(f"unknown data set {name!r}; known: {', '.join(known())}")
    elif root is None:
        raise ValueError("data set 'folder' needs root=PATH, a folder with one folder per class")
    else:
        whole = load_folder(root, classnames)
    chosen = balanced_subset(whole.targets, n, seed)
    return whole if len(chosen) == len(whole) else subset(whole, chosen)


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


@dataclass(frozen=True)
class _Subset:
    whole: Dataset
    positions: tuple[int, ...]

    def __call__(self, i: int) -> Image.Image:
        return self.whole[self.positions[i]][0]


def subset(whole: Dataset, positions: list[int]) -> Dataset:
    """The images of ``whole`` at ``positions``, with the same ids."""
    return Dataset(
        name=whole.name,
        classnames=whole.classnames,
        ids=[whole.ids[i] for i in positions],
        targets=[whole.targets[i] for i in positions],
        fingerprint=whole.fingerprint,
        fetch=_Subset(whole, tuple(positions)),
        paths=[whole.paths[i] for i in positions] if whole.paths else None,
        note=whole.note,
    )
