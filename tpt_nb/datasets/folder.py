"""A plain image folder as a data set: ``root/<class>/**/<image>``, one folder per class.

The layout of ImageNet and its variants (class folders named by synset, names in CoOp's
``classnames.txt``) and of any set that is sorted by hand. The root may be remote (``s3://...``, see
:mod:`tpt_nb.remote`): images are then fetched when they are read, and kept.
"""

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from tpt_nb.core.images import EXTENSIONS, read_rgb
from tpt_nb.core.remote import Remote, is_remote

NAMES_FILE = "classnames.txt"


@dataclass(frozen=True)
class Folder:
    """Map-style data set of (PIL RGB image, target) over image files.

    ``ids`` are posix paths relative to the root, sorted; ``targets`` index ``classnames``;
    ``fingerprint`` hashes paths and sizes of the files (no times: a copy is the same data set). A
    file that cannot be decoded raises from ``__getitem__``. ``remote`` fetches the files of a
    remote root, whose ``paths`` are addresses; ``note`` says what a reader of numbers should know
    about the set.
    """

    name: str
    classnames: list[str]
    ids: list[str]
    targets: list[int]
    paths: list[Path] | list[str]
    fingerprint: str
    remote: Remote | None = None
    note: str = ""

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> tuple[Image.Image, int]:
        path = self.remote.local(self.ids[i]) if self.remote else self.paths[i]
        return read_rgb(path), self.targets[i]


def from_files(
    name: str,
    classnames: Sequence[str],
    items: Sequence[tuple[str, int, Path]],
    note: str = "",
) -> Folder:
    """Data set of local files: (id, label, path) in the order that the images shall have."""
    ids, targets, paths = map(list, zip(*items, strict=True))
    # a dangling link fails when it is read
    sizes = [path.stat().st_size if path.exists() else -1 for path in paths]
    print_ = _fingerprint(zip(ids, sizes, strict=True))
    return Folder(name, list(classnames), ids, targets, paths, print_, note=note)


def _fingerprint(files) -> str:
    digest = hashlib.sha256()
    for image_id, size in files:
        digest.update(f"{image_id}\0{size}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def load_folder(
    root: str | Path,
    classnames: Mapping[str, str] | Sequence[str] | None = None,
    order: Sequence[str] | None = None,
) -> Folder:
    """Data set of the images in the class folders of `root`.

    Args:
        root: folder with one sub-folder per class, or the address of a remote one. Sub-folders of
            a class folder belong to the class; names that begin with "." or "__" are skipped.
        classnames: None takes the names from ``root/classnames.txt`` ("folder name of the class"
            per line, CoOp's layout) if there is one, else the folder names, underscores read as
            spaces. A mapping gives folder -> class name and may hold more folders than there are
            here. A list gives all class names in label order; a folder belongs to the name that it
            spells (ignoring case, underscores and hyphens), and names without a folder stay in the
            label space. Folders mapped to one name are one class.
        order: with a mapping: the folders of all classes in label order. These are the label
            space, whichever of them are here, and each is a class of its own, even where two have
            the same name.

    Raises:
        ValueError: no such folder, no class folder, no image, or class folders that no class name
            matches.
        OSError: a remote root cannot be listed.
    """
    if is_remote(root):
        remote = Remote(str(root).rstrip("/"))
        listing = [f for f in remote.files() if not any(map(_hidden, f[0].split("/")))]
        folders = sorted({rel.split("/")[0] for rel, _ in listing if "/" in rel})
        loose = [rel for rel, _ in listing if "/" not in rel]
        names_file = remote.local(NAMES_FILE) if NAMES_FILE in loose else None
    else:
        remote, root = None, Path(root)
        folders = class_folders(root)
        loose = [p.name for p in root.iterdir() if p.is_file()]
        names_file = root / NAMES_FILE if NAMES_FILE in loose else None
    if not folders:
        images = sum(_is_image(name) for name in loose)
        found = f"{images} images but no class folder" if images else "no class folder"
        raise ValueError(f"{root} has {found}; expected images in {root}/<class name>/")
    names, label = _match(root, folders, classnames, names_file, order)

    if remote:
        files = [(rel, size) for rel, size in listing if "/" in rel and _is_image(rel)]
        items = sorted((rel, label[rel.split("/")[0]], size) for rel, size in files)
    else:
        items = sorted(
            (path.relative_to(root).as_posix(), label[folder], path)
            for folder in folders
            for path in image_files(root / folder)
        )
    if not items:
        raise ValueError(
            f"no image in the {len(folders)} class folders of {root} (the first: {folders[0]!r}); "
            f"known extensions: {', '.join(EXTENSIONS)}"
        )
    if not remote:
        return from_files(root.resolve().name, names, items)
    ids, targets, sizes = map(list, zip(*items, strict=True))
    paths = [f"{remote.url}/{image_id}" for image_id in ids]
    print_ = _fingerprint(zip(ids, sizes, strict=True))
    return Folder(remote.url.split("/")[-1], names, ids, targets, paths, print_, remote)


def class_folders(root: Path) -> list[str]:
    """Names of the folders in a local root, sorted; ``ValueError`` if there is no such root."""
    if not root.is_dir():
        what = "is a file" if root.exists() else "does not exist"
        raise ValueError(f"{root} {what}; expected a folder that holds one folder per class")
    return sorted(p.name for p in root.iterdir() if p.is_dir() and not _hidden(p.name))


def read_names(path: str | Path) -> dict[str, str]:
    """folder -> class name from lines of "folder name of the class" (CoOp's ``classnames.txt``)."""
    lines = [line.split(maxsplit=1) for line in Path(path).read_text("utf-8").splitlines()]
    for number, line in enumerate(lines, start=1):
        if len(line) == 1:
            raise ValueError(
                f"{path}, line {number}: {line[0]!r} has no class name after the folder"
            )
    return {line[0]: line[1].strip() for line in lines if line}


def _hidden(name: str) -> bool:
    return name.startswith((".", "__"))


def image_files(folder: Path) -> list[Path]:
    found = []
    for base, inner, names in os.walk(folder, followlinks=True):
        inner[:] = [name for name in inner if not _hidden(name)]
        found += [Path(base, n) for n in names if _is_image(n) and n[0] != "."]
    return found


def _is_image(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS)


def spelling(name: str) -> str:
    """A name as it compares with others: case, underscores and hyphens do not count."""
    return " ".join(name.replace("_", " ").replace("-", " ").casefold().split())


def _match(
    root, folders: list[str], classnames, names_file: Path | None, order
) -> tuple[list[str], dict[str, int]]:
    """Class names in label order, and the label of each folder."""
    source = "classnames"
    if classnames is None and names_file:
        source = f"{root}/{NAMES_FILE}"
        classnames = read_names(names_file)
    if classnames is None:
        classnames = {folder: folder.replace("_", " ") for folder in folders}
    if isinstance(classnames, Mapping):
        known = list(order or classnames)
        _refuse([f for f in folders if f not in known], folders, root, source, known)
        if order:
            return [classnames[folder] for folder in order], {f: i for i, f in enumerate(order)}
        names = list(dict.fromkeys(classnames[folder] for folder in folders))
        return names, {folder: names.index(classnames[folder]) for folder in folders}
    names = list(classnames)
    labels = {spelling(name): i for i, name in enumerate(names)}
    if len(labels) < len(names):
        twice = next(n for i, n in enumerate(names) if labels[spelling(n)] != i)
        raise ValueError(f"the list of class names spells {twice!r} more than once")
    _refuse([f for f in folders if spelling(f) not in labels], folders, root, source, names)
    return names, {folder: labels[spelling(folder)] for folder in folders}


def _refuse(bad: list[str], folders: list[str], root, source: str, known: list[str]) -> None:
    if bad:
        raise ValueError(
            f"{len(bad)} of {len(folders)} class folders in {root} match no class name: "
            f"{', '.join(map(repr, bad[:5]))}{' ...' if len(bad) > 5 else ''}. {source} has "
            f"{', '.join(map(repr, known[:5]))}{' ...' if len(known) > 5 else ''}. "
            "Rename the folders, or pass classnames as a mapping {folder: class name}"
        )
