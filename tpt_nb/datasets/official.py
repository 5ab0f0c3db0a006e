"""Official test splits of the field's sets, each read from the files that its authors give.

A reader takes the folder of the set and returns class names in label order and the test images;
``FileNotFoundError`` if the set is not there.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tpt_nb.core.files import read_text
from tpt_nb.datasets.folder import class_folders

Items = list[tuple[str, int, Path]]  # (id, label, path)


def number_off(name: str) -> str:
    """ "012.binoculars" and "251.airplanes-101" as words."""
    return re.sub(r"^\d+\.|-101$", "", name)


def by_torchvision(kind: str, files: str, labels: str) -> Callable:
    """Through torchvision's class; its tree has its own folder name, which ``places`` lists."""

    def read(place: Path) -> tuple[list[str], Items]:
        from torchvision import datasets as tv

        root = place.parent
        if kind == "DTD":
            root = root.parent  # dtd/dtd
        try:
            data = getattr(tv, kind)(root, split="test", download=False)
        except (RuntimeError, FileNotFoundError) as error:
            raise FileNotFoundError(
                f"{place} is not as torchvision.datasets.{kind} has it ({str(error).split('.')[0]})"
            ) from error
        if files == labels:
            pairs = [(Path(path), int(label)) for path, label in getattr(data, files)]
        else:
            values = zip(getattr(data, files), getattr(data, labels), strict=True)
            pairs = [(Path(path), int(label)) for path, label in values]
        items = [(path.relative_to(place).as_posix(), label, path) for path, label in pairs]
        return list(data.classes), items

    return read


def aircraft(place: Path) -> tuple[list[str], Items]:
    """``variants.txt`` in label order; ``images_variant_test.txt`` with "number variant name"."""
    names = _lines(place / "variants.txt")
    label = {name: i for i, name in enumerate(names)}
    items = []
    for line in _lines(place / "images_variant_test.txt"):
        number, _, variant = line.partition(" ")
        if variant not in label:
            raise ValueError(
                f"{place / 'images_variant_test.txt'}: {variant!r} is not in variants.txt"
            )
        items.append((f"{number}.jpg", label[variant], place / "images" / f"{number}.jpg"))
    return names, items


def sun(place: Path) -> tuple[list[str], Items]:
    """``ClassName.txt`` and the first official partition, named as CoOp names them."""
    folders = [line.lstrip("/") for line in _lines(place / "ClassName.txt")]
    label = {folder: i for i, folder in enumerate(folders)}
    # the letter goes; what is indoor or outdoor says so first
    names = [" ".join(folder.split("/")[1:][::-1]) for folder in folders]
    images = [line.lstrip("/") for line in _lines(place / "Testing_01.txt")]
    inner = place / "SUN397" if (place / "SUN397").is_dir() else place
    return names, [(p, label[p.rsplit("/", 1)[0]], inner / p) for p in images]


def resisc(place: Path) -> tuple[list[str], Items]:
    """A list of test images; the class is the file name without its number."""
    listed = [f for f in ("test_splits.txt", "resisc45-test.txt") if (place / f).is_file()]
    if not listed:
        raise FileNotFoundError(f"no list of test images (resisc45-test.txt) in {place}")
    images = [line.rsplit("/", 1)[-1] for line in _lines(place / listed[0])]
    inner = next(
        (place / f for f in ("images", "NWPU-RESISC45", "") if (place / f / "airplane").is_dir()),
        place,
    )
    names = class_folders(inner)
    label = {name: i for i, name in enumerate(names)}
    classes = [re.sub(r"_\d+\.\w+$", "", image) for image in images]
    _refuse_unknown(place / listed[0], classes, label)
    return names, [
        (f"{c}/{image}", label[c], inner / c / image)
        for c, image in zip(classes, images, strict=True)
    ]


def cub(place: Path) -> tuple[list[str], Items]:
    """Tables joined by the number of the image; labels there count from 1."""

    def table(file: str) -> dict[str, str]:
        return dict(line.split(maxsplit=1) for line in _lines(place / file))

    names = [number_off(n).replace("_", " ") for n in table("classes.txt").values()]
    paths, labels = table("images.txt"), table("image_class_labels.txt")
    test = [i for i, training in table("train_test_split.txt").items() if training == "0"]
    return names, [(paths[i], int(labels[i]) - 1, place / "images" / paths[i]) for i in test]


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: without it the labels are not known")
    return [line.strip() for line in read_text(path).splitlines() if line.strip()]


def _refuse_unknown(path: Path, given: Sequence[str], known: Mapping[str, int]) -> None:
    bad = sorted(set(given) - set(known))
    if bad:
        raise ValueError(
            f"{path} names {len(bad)} classes that have no folder: {', '.join(bad[:5])}; the "
            f"folders are {', '.join(list(known)[:5])} ..."
        )
