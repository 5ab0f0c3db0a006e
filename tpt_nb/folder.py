"""A plain image folder as a data set: ``root/<class>/**/<image>``, one folder per class.

The layout of ImageNet and its variants (class folders named by synset, names in CoOp's
``classnames.txt``) and of any set that is sorted by hand.
"""

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from tpt_nb.views import as_rgb

EXTENSIONS = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
NAMES_FILE = "classnames.txt"


@dataclass(frozen=True)
class Folder:
    """Map-style data set of (PIL RGB image, target) over image files.

    ``ids`` are posix paths relative to the root, sorted; ``targets`` index ``classnames``;
    ``fingerprint`` hashes paths and sizes of the files (no times: a copy is the same data set). A
    file that cannot be decoded raises from ``__getitem__``.
    """

    name: str
    classnames: list[str]
    ids: list[str]
    targets: list[int]
    paths: list[Path]
    fingerprint: str

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> tuple[Image.Image, int]:
        return read_rgb(self.paths[i]), self.targets[i]


def load_folder(
    root: str | Path, classnames: Mapping[str, str] | Sequence[str] | None = None
) -> Folder:
    """Data set of the images in the class folders of `root`.

    Args:
        root: folder with one sub-folder per class. Sub-folders of a class folder belong to the
        class; names
            that begin with "." or "__" are skipped.
        classnames: None takes the names from ``root/classnames.txt`` ("folder name of the class"
        per line,
            CoOp's layout) if there is one, else the folder names, underscores read as spaces. A
            mapping gives folder -> class name and may hold more folders than there are here. A
            list gives all class names in label order; a folder belongs to the name that it spells
            (ignoring case, underscores and hyphens), and names without a folder stay in the label
            space. Folders mapped to one name are one class.

    Raises:
        ValueError: no such folder, no class folder, no image, or class folders that no class name
        matches.
    """
    root = Path(root)
    if not root.is_dir():
        what = "is a file" if root.exists() else "does not exist"
        raise ValueError(f"{root} {what}; expected a folder that holds one folder per class")
    folders = sorted(p.name for p in root.iterdir() if p.is_dir() and not _hidden(p.name))
    if not folders:
        loose = sum(p.suffix.lower() in EXTENSIONS for p in root.iterdir())
        found = f"{loose} images but no class folder" if loose else "no class folder"
        raise ValueError(f"{root} has {found}; expected images in {root}/<class name>/")
    names, label = _match(root, folders, classnames)

    files = sorted(
        (path.relative_to(root).as_posix(), label[folder], path)
        for folder in folders
        for path in _images(root / folder)
    )
    if not files:
        raise ValueError(
            f"no image in the {len(folders)} class folders of {root} (the first: {folders[0]!r}); "
            f"known extensions: {', '.join(EXTENSIONS)}"
        )
    ids, targets, paths = map(list, zip(*files, strict=True))
    digest = hashlib.sha256()
    for image_id, path in zip(ids, paths, strict=True):
        size = path.stat().st_size if path.exists() else -1  # a dangling link fails when it is read
        digest.update(f"{image_id}\0{size}\n".encode(errors="surrogateescape"))
    return Folder(root.resolve().name, names, ids, targets, paths, digest.hexdigest())


def read_rgb(path: str | Path) -> Image.Image:
    """The picture as a viewer shows it; see :func:`tpt_nb.views.as_rgb`."""
    with Image.open(path) as file:
        image = as_rgb(file)
        image.load()
    return image


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


def _images(folder: Path) -> list[Path]:
    found = []
    for base, inner, names in os.walk(folder, followlinks=True):
        inner[:] = [name for name in inner if not _hidden(name)]
        found += [
            Path(base, n) for n in names if Path(n).suffix.lower() in EXTENSIONS and n[0] != "."
        ]
    return found


def _spelling(name: str) -> str:
    return " ".join(name.replace("_", " ").replace("-", " ").casefold().split())


def _match(root: Path, folders: list[str], classnames) -> tuple[list[str], dict[str, int]]:
    """Class names in label order, and the label of each folder."""
    source = "classnames"
    if classnames is None and (root / NAMES_FILE).is_file():
        source = str(root / NAMES_FILE)
        classnames = read_names(source)
    if classnames is None:
        classnames = {folder: folder.replace("_", " ") for folder in folders}
    if isinstance(classnames, Mapping):
        _refuse(
            [f for f in folders if f not in classnames], folders, root, source, list(classnames)
        )
        names = list(dict.fromkeys(classnames[folder] for folder in folders))
        return names, {folder: names.index(classnames[folder]) for folder in folders}
    names = list(classnames)
    labels = {_spelling(name): i for i, name in enumerate(names)}
    if len(labels) < len(names):
        twice = next(n for i, n in enumerate(names) if labels[_spelling(n)] != i)
        raise ValueError(f"the list of class names spells {twice!r} more than once")
    _refuse([f for f in folders if _spelling(f) not in labels], folders, root, source, names)
    return names, {folder: labels[_spelling(folder)] for folder in folders}


def _refuse(bad: list[str], folders: list[str], root: Path, source: str, known: list[str]) -> None:
    if bad:
        raise ValueError(
            f"{len(bad)} of {len(folders)} class folders in {root} match no class name: "
            f"{', '.join(map(repr, bad[:5]))}{' ...' if len(bad) > 5 else ''}. {source} has "
            f"{', '.join(map(repr, known[:5]))}{' ...' if len(known) > 5 else ''}. "
            "Rename the folders, or pass classnames as a mapping {folder: class name}"
        )
