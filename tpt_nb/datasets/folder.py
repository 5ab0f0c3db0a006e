"""A plain image folder as a data set: ``root/<class>/**/<image>``, one folder per class.

The layout of ImageNet and its variants (class folders named by synset, names in CoOp's
``classnames.txt``) and of any set that is sorted by hand. The root may be remote (``s3://...``, see
:mod:`tpt_nb.core.remote`): images are then fetched when they are read, and kept.
"""

import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path

from tpt_nb.core.files import read_text
from tpt_nb.core.images import EXTENSIONS
from tpt_nb.core.remote import Remote, is_remote
from tpt_nb.datasets.dataset import Dataset, from_files, from_remote, printable
from tpt_nb.datasets.tree import hidden, hidden_folder, is_image, others, some, walk

NAMES_FILE = "classnames.txt"


def load_folder(
    root: str | Path,
    classnames: Mapping[str, str] | Sequence[str] | None = None,
    order: Sequence[str] | None = None,
) -> Dataset:
    """Data set of the images in the class folders of `root`.

    ``ids`` are posix paths relative to the root, sorted. What was left out is in ``note``.

    Args:
        root: folder with one sub-folder per class, or the address of a remote one. Sub-folders of
            a class folder belong to the class; hidden ones are passed over.
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
        ValueError: no such folder, no class folder, no image, a folder that may not be read, or
            class folders that no class name matches.
        OSError: a remote root cannot be listed.
    """
    remote = Remote(str(root).rstrip("/")) if is_remote(root) else None
    folders, loose, found, notes = _far(remote) if remote else _here(root := Path(root))
    images = [name for name in loose if is_image(name)]
    if not folders:
        had = f"{len(images)} images but no class folder" if images else "no class folder"
        raise ValueError(f"{root} has {had}; expected images in {root}/<class name>/")
    names_file = None
    if NAMES_FILE in loose:
        names_file = remote.local(NAMES_FILE) if remote else root / NAMES_FILE
    names, label, twins = _match(root, folders, classnames, names_file, order)
    items = sorted((i, label[i.split("/")[0]], what) for i, what in found if "/" in i)
    if not items:
        raise ValueError(
            f"no image in the {len(folders)} class folders of {root} (the first: {folders[0]!r}); "
            f"known extensions: {', '.join(EXTENSIONS)}"
        )
    filled = {image_id.split("/")[0] for image_id, _, _ in items}
    notes += some(images, "images in no class folder left out")
    notes += some([f for f in folders if f not in filled], "class folders without images") + twins
    note = f"{root}: {'; '.join(notes)}" if notes else ""
    if remote:
        return from_remote(remote, names, items, note)
    return from_files(printable(root.resolve().name), names, items, note)


def _here(root: Path) -> tuple[list, list, list, list]:
    """Class folders, names of files beside them, (id, path) of the images, notes."""
    folders = class_folders(root)
    loose = sorted(p.name for p in root.iterdir() if p.is_file() and not hidden(p.name))
    paths, notes = walk(root)
    found = [(printable(path.relative_to(root).as_posix()), path) for path in paths]
    return folders, loose, found, notes


def _far(remote: Remote) -> tuple[list, list, list, list]:
    """The same at an address, with sizes in place of paths."""
    listing = [(path, size) for path, size in remote.files() if not hidden(path)]
    folders = sorted({path.split("/")[0] for path, _ in listing if "/" in path})
    loose = [path for path, _ in listing if "/" not in path]
    found = [(path, size) for path, size in listing if is_image(path)]
    return folders, loose, found, others([path for path, _ in listing])


def class_folders(root: Path) -> list[str]:
    """Names of the folders in a local root, sorted; ``ValueError`` if there is no such root."""
    if not root.is_dir():
        what = "is a file" if root.exists() else "does not exist"
        raise ValueError(f"{root} {what}; expected a folder that holds one folder per class")
    return sorted(
        printable(p.name) for p in root.iterdir() if p.is_dir() and not hidden_folder(p.name)
    )


def read_names(path: str | Path) -> dict[str, str]:
    """folder -> class name from lines of "folder name of the class" (CoOp's ``classnames.txt``).

    A file with one word on every line names the folders only, and these are the names.
    """
    lines = [line.split(maxsplit=1) for line in read_text(path).splitlines()]
    if all(len(line) < 2 for line in lines):
        return {line[0]: line[0].replace("_", " ") for line in lines if line}
    for number, line in enumerate(lines, start=1):
        if len(line) == 1:
            raise ValueError(
                f"{path}, line {number}: {line[0]!r} has no class name after the folder"
            )
    return {line[0]: line[1].strip() for line in lines if line}


def spelling(name: str) -> str:
    """A name as it compares with others: case, underscores and hyphens do not count."""
    name = unicodedata.normalize("NFC", name).casefold()
    return " ".join(name.replace("_", " ").replace("-", " ").split())


def _match(
    root, folders: list[str], classnames, names_file: Path | None, order
) -> tuple[list[str], dict[str, int], list[str]]:
    """Class names in label order, the label of each folder, notes of folders that read alike."""
    source, twins = "classnames", []
    if classnames is None and names_file:
        source = f"{root}/{NAMES_FILE}"
        classnames = read_names(names_file)
    if classnames is None:
        twins = _twins(folders)
        plain = {folder: unicodedata.normalize("NFC", folder) for folder in folders}
        classnames = {folder: name.replace("_", " ") for folder, name in plain.items()}
    if isinstance(classnames, Mapping):
        known = list(order or classnames)
        _refuse([f for f in folders if f not in known], folders, root, source, known)
        if order:
            return [classnames[f] for f in order], {f: i for i, f in enumerate(order)}, twins
        names = list(dict.fromkeys(classnames[folder] for folder in folders))
        return names, {folder: names.index(classnames[folder]) for folder in folders}, twins
    names = list(classnames)
    labels = {spelling(name): i for i, name in enumerate(names)}
    if len(labels) < len(names):
        twice = next(n for i, n in enumerate(names) if labels[spelling(n)] != i)
        raise ValueError(f"the list of class names spells {twice!r} more than once")
    _refuse([f for f in folders if spelling(f) not in labels], folders, root, source, names)
    return names, {folder: labels[spelling(folder)] for folder in folders}, _twins(folders)


def _twins(folders: list[str]) -> list[str]:
    alike: dict[str, list[str]] = {}
    for folder in folders:
        alike.setdefault(spelling(folder), []).append(ascii(folder))
    return some(
        [" and ".join(t) for t in alike.values() if len(t) > 1], "class names of two folders"
    )


def _refuse(bad: list[str], folders: list[str], root, source: str, known: list[str]) -> None:
    if bad:
        raise ValueError(
            f"{len(bad)} of {len(folders)} class folders in {root} match no class name: "
            f"{', '.join(map(repr, bad[:5]))}{' ...' if len(bad) > 5 else ''}. {source} has "
            f"{', '.join(map(repr, known[:5]))}{' ...' if len(known) > 5 else ''}. "
            "Rename the folders, or pass classnames as a mapping {folder: class name}"
        )
