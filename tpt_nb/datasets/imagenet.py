"""The ImageNet family: synsets, class folders, order, and where the damages of ImageNet-C lie."""

import csv
import functools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from tpt_nb.core.messages import unknown
from tpt_nb.core.paths import DATA
from tpt_nb.datasets.folder import spelling
from tpt_nb.datasets.imagenet_c import ARCHIVES

ARCHIVE_OF = {damage: archive for archive, damages in ARCHIVES.items() for damage in damages}

SYNSET = re.compile(r"n\d{8}")


@functools.cache
def imagenet_classes(variant: str = "") -> dict[str, str]:
    """synset -> class name in label order, of ImageNet or of its variant "a" or "r".

    Raises ``FileNotFoundError`` if the shipped table is missing.
    """
    path = DATA / "classnames" / "imagenet.tsv"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; restore it with `git checkout`.")
    with open(path, newline="", encoding="utf-8") as file:
        rows = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        return {row["synset"]: row["name"] for row in rows if variant in row["variants"]}


def has_class_folders(place: Path) -> bool:
    """Are there folders named by synset, or by number as in V2?"""
    return any(
        SYNSET.fullmatch(p.name) or (p.name.isdecimal() and len(p.name) < 4)
        for p in place.iterdir()
        if p.is_dir()
    )


def of_damage(root: Path, shelves: Sequence[str], damage: str, severity: int) -> Path:
    """The folder ``<damage>/<severity>`` of ImageNet-C below a root, or the root itself if it is.

    Args:
        shelves: folders of the root in which the damages may lie. The archives may have been
            unpacked side by side, as they are meant to, or each in a folder of its own.
    Raises:
        ValueError: no damage of ImageNet-C, or the root is the folder of another one.
        FileNotFoundError: it is not there; the message says which archive has it.
    """
    if damage not in ARCHIVE_OF:
        raise ValueError(unknown("damage of ImageNet-C", damage, ARCHIVE_OF))
    archive, wanted = ARCHIVE_OF[damage], f"{damage}/{severity}"
    *_, above, last = ("", *root.resolve().parts)
    if last in ARCHIVE_OF or (above in ARCHIVE_OF and last.isdecimal()):
        given = last if last in ARCHIVE_OF else f"{above}/{last}"
        if given not in (damage, wanted):
            raise ValueError(
                f"{root} is the folder of {given}, not of {wanted}; give the folder that holds all "
                "damages."
            )
        places = [root if given == wanted else root / str(severity)]
    else:
        inner = ("", archive, damage, f"{archive}/{archive}")
        places = [root / shelf / folder / wanted for shelf in shelves for folder in inner]
    for place in places:
        if place.is_dir() and has_class_folders(place):
            return place
    near = next((p for p in [*places, *(p.parent for p in places), root] if p.is_dir()), root)
    names = sorted(p.name for p in near.iterdir())
    shown = ", ".join(names[:6]) + (" ..." if len(names) > 6 else "") if names else "nothing"
    raise FileNotFoundError(
        f"imagenet-c/{wanted} is not in {root}: expected images in {wanted}/n01440764/ and so on, "
        f"there or in its folder imagenet-c; {near} holds {shown}. {damage} is in {archive}.tar of "
        "https://zenodo.org/record/2235448."
    )


def check_synsets(name: str, place: Path, folders: list[str], names: Mapping[str, str]) -> None:
    """Raise ``ValueError`` if class folders are not of this set, with whose they are."""
    bad = [folder for folder in folders if folder not in names]
    if not bad:
        return
    everything = imagenet_classes()
    lines = [f"  {f}: {_whose(f, everything)}" for f in bad[:5]]
    raise ValueError(
        f"{len(bad)} of the {len(folders)} class folders in {place} are no classes of {name}:\n"
        + "\n".join(lines)
        + ("\n  ..." if len(bad) > 5 else "")
        + f"\n{name} has {len(names)} classes, the first: {', '.join(list(names)[:3])}. Its images "
        "must lie in folders named so; is this the folder of another data set?"
    )


def _whose(folder: str, everything: Mapping[str, str]) -> str:
    if folder not in everything:
        return "no class of ImageNet"
    others = [f"imagenet-{v}" for v in "ar" if folder in imagenet_classes(v)]
    return f"{everything[folder]!r}, a class of {' and '.join(['imagenet', *others])}"


def check_order(name: str, known: Sequence[str], given: Sequence[str]) -> None:
    """Raise ``ValueError`` if ``given`` cannot be class names in the label order of ``known``.

    Names may be worded in other ways, but not be those of other labels.
    """
    if len(given) != len(known):
        raise ValueError(f"{len(given)} class names for the {len(known)} classes of {name}")
    where: dict[str, list[int]] = {}
    for i, text in enumerate(known):
        where.setdefault(spelling(text), []).append(i)
    moved = [
        (i, text)
        for i, text in enumerate(given)
        if i not in where.get(spelling(text), [i]) and spelling(known[i]) != spelling(text)
    ]
    if moved:
        lines = [f"  label {i} is {known[i]!r}, but the list has {text!r}" for i, text in moved[:5]]
        raise ValueError(
            f"{len(moved)} of {len(given)} class names stand at the place of another class of "
            f"{name}; the order must be that of the labels:\n" + "\n".join(lines)
        )
