"""What a data set is: images with targets, class names and a fingerprint; subsets of it."""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from PIL import Image

from tpt_nb.core.images import read_rgb
from tpt_nb.core.remote import Remote


@dataclass
class Dataset:
    """Images with targets; ``ds[i]`` decodes or composes image i, and may raise on a damaged one.

    ``ids`` are stable and unique within ``fingerprint`` (a hash of what the images depend on),
    whatever subset was asked for, so that a cache can serve subsets. ``targets`` index
    ``classnames``. ``fetch(i)`` gives image i as RGB and can be pickled; ``paths`` say where the
    images are. ``note`` is what a reader of numbers should know about the set, such as that it is
    not the whole one.
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
class _Files:
    places: list[Path] | list[str]
    remote: Remote | None

    def __call__(self, i: int) -> Image.Image:
        return read_rgb(self.remote.local(self.places[i]) if self.remote else self.places[i])


def from_files(
    name: str,
    classnames: Sequence[str],
    items: Sequence[tuple[str, int, Path]],
    note: str = "",
) -> Dataset:
    """Data set of local files: (id, label, path) in the order that the images shall have.

    Its fingerprint is of ids and sizes of the files (no times: a copy is the same data set).
    """
    ids, targets, paths = map(list, zip(*items, strict=True))
    # a dangling link fails when it is read
    sizes = [path.stat().st_size if path.exists() else -1 for path in paths]
    where = [printable(path) for path in paths]
    print_ = _fingerprint(zip(ids, sizes, strict=True))
    return Dataset(name, list(classnames), ids, targets, print_, _Files(paths, None), where, note)


def from_remote(
    remote: Remote, classnames: Sequence[str], items: Sequence[tuple[str, int, int]], note: str
) -> Dataset:
    """Data set of files at an address: (path there, label, size); see :func:`from_files`."""
    ids, targets, sizes = map(list, zip(*items, strict=True))
    print_ = _fingerprint(zip(ids, sizes, strict=True))
    name, where = remote.url.split("/")[-1], [f"{remote.url}/{path}" for path in ids]
    return Dataset(name, list(classnames), ids, targets, print_, _Files(ids, remote), where, note)


def _fingerprint(files: Iterable[tuple[str, int]]) -> str:
    digest = hashlib.sha256()
    for image_id, size in files:
        digest.update(f"{image_id}\0{size}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def printable(path: str | Path) -> str:
    """A path as text that can be written: bytes that are not UTF-8 appear as ``\\xe9``."""
    return str(path).encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


@dataclass(frozen=True)
class _Part:
    whole: Dataset
    positions: tuple[int, ...]

    def __call__(self, i: int) -> Image.Image:
        return self.whole[self.positions[i]][0]


def subset(whole: Dataset, positions: Sequence[int]) -> Dataset:
    """The images of ``whole`` at ``positions``, with the same ids."""
    return replace(
        whole,
        ids=[whole.ids[i] for i in positions],
        targets=[whole.targets[i] for i in positions],
        fetch=_Part(whole, tuple(positions)),
        paths=[whole.paths[i] for i in positions] if whole.paths else None,
    )


def balanced_subset(targets: Sequence[int], n: int | None, seed: int) -> list[int]:
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
