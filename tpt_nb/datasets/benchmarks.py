"""The field's data sets, read from where people keep them: ImageNet and its variants, and the rest.

A root may be the folder of the images, the folder of the data set, or a folder that holds many data
sets as CoOp, TPT, ZERO and RA-TTA lay them out (``PLACES``). Labels and class names always come
from one source: for the ImageNet family from the synset that names the class folder, for the others
from the split file that papers share (CoOp's ``split_zhou_*.json``) or, without it, from the
official test split. A source that contradicts itself, or folders that no class fits, is an error
that shows the first mismatches: a shifted label map gives accuracy near chance, and nothing else
would tell.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tpt_nb.core.files import read_text
from tpt_nb.core.remote import is_remote
from tpt_nb.datasets.dataset import Dataset, from_files
from tpt_nb.datasets.folder import class_folders, load_folder
from tpt_nb.datasets.imagenet import (
    SYNSET,
    _check_synsets,
    _has_class_folders,
    check_order,
    imagenet_classes,
)
from tpt_nb.datasets.splits import (
    Benchmark,
    Items,
    _aircraft,
    _caltech256,
    _consistent,
    _cub,
    _resisc,
    _sun,
    _torchvision,
)


def _imagenet(name: str, root: str | Path, classnames) -> Dataset:
    """A set of the ImageNet family: class folders named by synset (V2: by number)."""
    benchmark = BENCHMARKS[name]
    names = imagenet_classes(name[-1] if name in ("imagenet-a", "imagenet-r") else "")
    if classnames is not None:
        names = _own_names(name, names, classnames)
    if is_remote(root):
        place, folders = root, None
    else:
        place = _place(name, Path(root), _has_class_folders)
        folders = class_folders(place)
    order = list(names)
    if name == "imagenet-v2" and not (folders and SYNSET.fullmatch(folders[0])):
        # sorted as strings "10" comes before "2": the number is the label, not the rank
        numbers = [str(i) for i in range(len(order))]
        names, order = dict(zip(numbers, names.values(), strict=True)), numbers
    if folders:
        _check_synsets(name, place, folders, names)
    data = load_folder(place, names, order)
    found = len(set(data.targets))
    note = ""
    if len(data) != benchmark.size:
        note = (
            f"{name}: {len(data):,} images of {found:,} classes are here; the whole set has "
            f"{benchmark.size:,} images of {benchmark.classes:,} classes"
        )
    note = "; ".join(text for text in (note, data.note) if text)
    return dataclasses.replace(data, name=name, note=note)


def _own_names(
    name: str, known: Mapping[str, str], given: Mapping[str, str] | Sequence[str]
) -> dict[str, str]:
    """Class names of one's own for the known folders; a list in another order is refused."""
    if isinstance(given, Mapping):
        missing = [folder for folder in known if folder not in given]
        if missing:
            raise ValueError(
                f"classnames lacks {len(missing)} of the {len(known)} classes of {name}: "
                f"{', '.join(f'{f} ({known[f]})' for f in missing[:5])}"
            )
        return {folder: given[folder] for folder in known}
    check_order(name, list(known.values()), list(given))
    return dict(zip(known, given, strict=True))


def _with_split(name: str, root: Path, classnames) -> Dataset:
    """A set whose labels are in a split file, or else in the files of its official test split."""
    benchmark = BENCHMARKS[name]
    places = [root / p for p in benchmark.places if (root / p).is_dir()]
    shelves = [*places, root / "data_splits", root / "data" / "data_splits"]
    splits = [shelf / benchmark.split for shelf in shelves if (shelf / benchmark.split).is_file()]
    missing = []
    if splits:
        names, items = _from_split(name, places, splits[0])
    else:
        for place in places if benchmark.read else ():
            try:
                names, items = benchmark.read(place, benchmark)
                break
            except FileNotFoundError as error:
                missing.append(str(error))
        else:
            raise _not_here(name, root, missing)
    if len(names) != benchmark.classes:
        raise ValueError(f"{root}: found {len(names)} classes of {name}, not {benchmark.classes}")
    if classnames is not None:
        known = dict(zip(names, names, strict=True))
        names = list(_own_names(name, known, classnames).values())
    note = ""
    if benchmark.size and len(items) != benchmark.size:
        source = splits[0].name if splits else "the official test split"
        note = f"{name}: {len(items):,} images by {source}; papers use {benchmark.size:,}"
        if benchmark.split and not splits:
            note += f" (CoOp's {benchmark.split})"
    return from_files(name, names, sorted(items), note)


def _from_split(name: str, places: list[Path], path: Path) -> tuple[list[str], Items]:
    """Names and test images of a split file: lists of [path, label, class name]."""
    benchmark = BENCHMARKS[name]
    try:
        split = json.loads(read_text(path))
        entries = {part: [(str(p), int(y), str(c)) for p, y, c in split[part]] for part in split}
        test = entries["test"]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{path} is no split file ({type(error).__name__}: {error}); expected JSON with a list "
            '"test" of [path, label, class name]'
        ) from error
    everything = [entry for part in entries.values() for entry in part]
    if name == "caltech256":
        test, everything = _caltech256(test, everything)
    names = _consistent(path, everything, benchmark.classes)
    if not test:
        raise ValueError(f"{path} has no test images")
    folders = [p / f for p in places for f in benchmark.images if (p / f).is_dir()]
    # a few, since a single one may be missing
    inner = next((f for f in folders if any((f / p).exists() for p, _, _ in test[:20])), None)
    if inner is None:
        raise ValueError(
            f"{path} names the image {test[0][0]!r}, which is in none of "
            f"{', '.join(map(str, dict.fromkeys(folders)))}"
        )
    return names, [(p, label, inner / p) for p, label, _ in test]


def load(
    name: str,
    root: str | Path,
    classnames: Mapping[str, str] | Sequence[str] | None = None,
) -> Dataset:
    """The test images of a data set, in a fixed order, with labels and class names.

    Args:
        name: a key of ``BENCHMARKS``.
        root: see the module's text; for the ImageNet family also an address (``s3://...``).
        classnames: other wordings: a list in label order, or a mapping from synset (elsewhere:
            from the class name) to name.
    Raises:
        FileNotFoundError: the data set is not in this root; the message says where it was sought.
        ValueError: folders, labels or names that do not fit together, with the first mismatches.
    """
    if not BENCHMARKS[name].split and BENCHMARKS[name].read is None:
        return _imagenet(name, root, classnames)
    if is_remote(root):
        raise ValueError(
            f"{name} cannot be read from {root}: its labels are in files of its own. Remote roots "
            "are for folder and the ImageNet family; copy this data set to a disk here."
        )
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"{root} {'is a file' if root.exists() else 'does not exist'}")
    return _with_split(name, root, classnames)


def _place(name: str, root: Path, fits: Callable[[Path], bool]) -> Path:
    if not root.is_dir():
        raise FileNotFoundError(f"{root} {'is a file' if root.exists() else 'does not exist'}")
    for place in BENCHMARKS[name].places:
        if (root / place).is_dir() and fits(root / place):
            return root / place
    raise _not_here(name, root)


def _not_here(name: str, root: Path, why: Sequence[str] = ()) -> FileNotFoundError:
    benchmark = BENCHMARKS[name]
    what = f"{benchmark.split} and its images" if benchmark.split else "its labels and images"
    if not benchmark.split and benchmark.read is None:
        what = "class folders named " + ("0, 1, 2" if name == "imagenet-v2" else "n01440764 or so")
    here = sorted(p.name for p in root.iterdir())
    shown = ", ".join(here[:6]) + (" ..." if len(here) > 6 else "") if here else "nothing"
    text = (
        f"{name} is not in {root}: expected {what} there or in one of its folders "
        f"{', '.join(p for p in benchmark.places if p)}. It holds {shown}."
    )
    if name == "imagenet" and any(n.startswith("ILSVRC2012_") for n in here):
        text += (
            " These are the files as they are downloaded: "
            "torchvision.datasets.ImageNet(root, split='val') sorts them into class folders."
        )
    return FileNotFoundError(" ".join([text, *why[:1]]))


BENCHMARKS = {
    "imagenet": Benchmark(
        "ImageNet, validation",
        1000,
        50_000,
        ("", "val", "images/val", "imagenet/images/val", "imagenet/val", "ImageNet/val"),
    ),
    "imagenet-v2": Benchmark(
        "ImageNet-V2, matched frequency",
        1000,
        10_000,
        (
            "",
            "imagenetv2-matched-frequency-format-val",
            "imagenetv2/imagenetv2-matched-frequency-format-val",
            "imagenetv2",
        ),
    ),
    "imagenet-a": Benchmark(
        "ImageNet-A", 200, 7_500, ("", "imagenet-a", "imagenet-adversarial/imagenet-a")
    ),
    "imagenet-r": Benchmark(
        "ImageNet-R", 200, 30_000, ("", "imagenet-r", "imagenet-rendition/imagenet-r")
    ),
    "imagenet-sketch": Benchmark(
        "ImageNet-Sketch",
        1000,
        50_889,
        (
            "",
            "sketch",
            "images",
            "imagenet-sketch/images",
            "imagenet-sketch/sketch",
            "imagenet-sketch",
            "ImageNet-Sketch/sketch",
            "ImageNet-Sketch",
        ),
    ),
    "caltech101": Benchmark(
        "Caltech101",
        100,
        2_465,
        ("", "caltech-101", "caltech101", "Caltech101"),
        split="split_zhou_Caltech101.json",
        images=("101_ObjectCategories", "caltech-101/101_ObjectCategories", "images", ""),
    ),
    "oxford-pets": Benchmark(
        "OxfordPets",
        37,
        3_669,
        ("", "oxford_pets", "OxfordPets", "oxford-iiit-pet"),
        "a photo of a {}, a type of pet.",
        "split_zhou_OxfordPets.json",
        ("images", ""),
        _torchvision("OxfordIIITPet", "_images", "_labels"),
    ),
    "stanford-cars": Benchmark(
        "StanfordCars",
        196,
        8_041,
        ("", "stanford_cars", "StanfordCars"),
        split="split_zhou_StanfordCars.json",
        images=("", "images"),
        read=_torchvision("StanfordCars", "_samples", "_samples"),
    ),
    "flowers102": Benchmark(
        "Flowers102",
        102,
        2_463,
        ("", "oxford_flowers", "Flower102", "flower102", "flowers-102"),
        "a photo of a {}, a type of flower.",
        "split_zhou_OxfordFlowers.json",
        ("jpg", ""),
        _torchvision("Flowers102", "_image_files", "_labels"),
    ),
    "food101": Benchmark(
        "Food101",
        101,
        30_300,
        ("", "food-101", "food101", "Food101"),
        "a photo of {}, a type of food.",
        "split_zhou_Food101.json",
        ("images", ""),
        _torchvision("Food101", "_image_files", "_labels"),
    ),
    "fgvc-aircraft": Benchmark(
        "FGVCAircraft",
        100,
        3_333,
        ("", "data", "fgvc_aircraft", "fgvc-aircraft-2013b/data"),
        "a photo of a {}, a type of aircraft.",
        read=_aircraft,
    ),
    "sun397": Benchmark(
        "SUN397",
        397,
        19_850,
        ("", "sun397", "SUN397"),
        split="split_zhou_SUN397.json",
        images=("SUN397", "images", ""),
        read=_sun,
    ),
    "dtd": Benchmark(
        "DTD",
        47,
        1_692,
        ("", "dtd", "DTD", "dtd/dtd"),
        "{} texture.",
        "split_zhou_DescribableTextures.json",
        ("images", ""),
        _torchvision("DTD", "_image_files", "_labels"),
    ),
    "eurosat": Benchmark(
        "EuroSAT",
        10,
        8_100,
        ("", "eurosat", "EuroSAT"),
        "a centered satellite photo of {}.",
        "split_zhou_EuroSAT.json",
        ("2750", "images", ""),
    ),
    "ucf101": Benchmark(
        "UCF101",
        101,
        3_783,
        ("", "ucf101", "UCF101"),
        "a photo of a person doing {}.",
        "split_zhou_UCF101.json",
        ("UCF-101-midframes", "images", ""),
    ),
    "caltech256": Benchmark(
        "Caltech256",
        256,
        0,
        ("", "caltech-256", "caltech256"),
        split="split_Caltech256.json",
        images=("256_ObjectCategories", ""),
    ),
    "resisc45": Benchmark(
        "RESISC45",
        45,
        6_300,
        ("", "resisc45"),
        "a satellite photo of {}.",
        read=_resisc,
    ),
    "cub200": Benchmark(
        "CUB-200-2011",
        200,
        5_794,
        ("", "CUB_200_2011"),
        "a photo of a {}, a type of bird.",
        read=_cub,
    ),
}
