"""The images below a folder: one walker for everything that reads a tree.

Each real folder is read once, however many links lead to it; what may not be read is an error;
hidden folders and those of systems (``.git``, ``__MACOSX``, ``@eaDir``) are passed over.
"""

import os
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from tpt_nb.core.images import EXTENSIONS
from tpt_nb.core.messages import say_once
from tpt_nb.datasets.dataset import printable

SYSTEM = ("@eadir", "$recycle.bin", "#recycle", "#snapshot", "lost+found")
SYSTEM += ("system volume information",)
# pictures to a person, but not read
OTHER = (".jfif", ".jpe", ".avif", ".heic", ".heif", ".jp2", ".j2k", ".jxl", ".svg", ".psd", ".tga")


def hidden(path: str) -> bool:
    """Does a path relative to a root lie in a hidden or system folder, or is it a hidden file?"""
    *folders, name = path.split("/")
    return name.startswith(".") or any(hidden_folder(folder) for folder in folders)


def hidden_folder(name: str) -> bool:
    """Is this folder hidden, or one that systems make?"""
    return name.startswith((".", "__")) or name.casefold() in SYSTEM


def is_image(name: str) -> bool:
    """Is this the name of an image of a kind that is read?"""
    return name.lower().endswith(EXTENSIONS)


def some(items: Sequence[str], what: str) -> list[str]:
    """A note with the number and the first of what was left out; none of nothing."""
    return [f"{what}: {len(items)} (the first: {printable(items[0])})"] if items else []


def others(names: Sequence[str]) -> list[str]:
    """A note of the pictures among these files that are of a kind that is not read."""
    return some([n for n in names if n.lower().endswith(OTHER)], "pictures of other kinds left out")


def image_files(root: str | Path) -> list[Path]:
    """All images below a folder, sorted; prints what is left out.

    Raises ``ValueError`` if there is no such folder, or one in it may not be read.
    """
    paths, notes = walk(Path(root))
    for note in notes:
        say_once(f"{root}: {note}")
    return paths


def walk(root: Path) -> tuple[list[Path], list[str]]:
    """All images below a folder, sorted, and notes of what was left out; see above."""
    if not root.is_dir():
        what = "is a file" if root.exists() else "does not exist"
        raise ValueError(f"{root} {what}; expected a folder of images")
    # links wait until all real folders are read: a folder is found under its own name
    folders, links, seen = deque([root]), deque(), set()
    files, again = [], []
    while folders or links:
        folder = (folders or links).popleft()
        about = folder.stat()
        if (about.st_dev, about.st_ino) in seen:
            again.append(folder.relative_to(root).as_posix())
            continue
        seen.add((about.st_dev, about.st_ino))
        for entry in _entries(folder):
            path = folder / entry.name
            if not _is_folder(entry):
                files += [] if entry.name.startswith(".") else [path]
            elif not hidden_folder(entry.name):
                (links if entry.is_symlink() else folders).append(path)
    images = sorted(path for path in files if is_image(path.name))
    rest = sorted(path.relative_to(root).as_posix() for path in files if not is_image(path.name))
    dead = [name for name in rest if not (root / name).exists()]
    return images, [
        *others(rest),
        *some(dead, "links that lead nowhere"),
        *some(sorted(again), "links to folders that are read already"),
    ]


def _entries(folder: Path) -> list[os.DirEntry]:
    try:
        if not os.access(folder, os.R_OK | os.X_OK):
            raise PermissionError("permission denied")
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError as error:
        raise _unreadable(folder, error) from error


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except PermissionError as error:
        raise _unreadable(entry.path, error) from error
    except OSError:  # a link to itself
        return False


def _unreadable(path: str | Path, error: OSError) -> ValueError:
    return ValueError(
        f"{printable(path)} cannot be read ({error.strerror or error}), and its images would be "
        "missing: make it readable, or move it elsewhere"
    )
