"""The field's data sets, read from where people keep them: ImageNet and its variants, and the rest.

A root may be the folder of the images, the folder of the data set, or a folder that holds many data
sets as CoOp, TPT, ZERO and RA-TTA lay them out (``PLACES``). Labels and class names always come
from one source: for the ImageNet family from the synset that names the class folder, for the others
from the split file that papers share (CoOp's ``split_zhou_*.json``) or, without it, from the
official test split. A source that contradicts itself, or folders that no class fits, is an error
that shows the first mismatches: a shifted label map gives accuracy near chance, and nothing else
would tell.
"""

import csv
import dataclasses
import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tpt_nb.folder import Folder, class_folders, from_files, load_folder, spelling
from tpt_nb.paths import DATA
from tpt_nb.remote import is_remote

SYNSET = re.compile(r"n\d{8}")
Items = list[tuple[str, int, Path]]  # (id, label, path)


@dataclass(frozen=True)
class Benchmark:
    """What is known of a data set before it is read.

    ``places`` are the folders where it may lie within a root; ``split`` is CoOp's split file,
    ``images`` the folders that its paths may be relative to; ``read`` reads a place without it.
    ``template`` is the sentence that CoOp (for the last three: RA-TTA) uses for it.
    """

    title: str
    classes: int
    size: int
    places: tuple[str, ...]
    template: str = "a photo of a {}."
    split: str = ""
    images: tuple[str, ...] = ("",)
    read: "Callable[[Path, Benchmark], tuple[list[str], Items]] | None" = None


# --- ImageNet and its variants -------------------------------------------------------------------


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


def _imagenet(name: str, root: str | Path, classnames) -> Folder:
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
    return dataclasses.replace(data, name=name, note=note)


def _has_class_folders(place: Path) -> bool:
    return any(
        SYNSET.fullmatch(p.name) or (p.name.isdecimal() and len(p.name) < 4)
        for p in place.iterdir()
        if p.is_dir()
    )


def _check_synsets(name: str, place: Path, folders: list[str], names: Mapping[str, str]) -> None:
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


# --- sets with a split file ----------------------------------------------------------------------


def _with_split(name: str, root: Path, classnames) -> Folder:
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
        split = json.loads(path.read_text(encoding="utf-8"))
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


def _consistent(path: Path, entries: list[tuple[str, int, str]], classes: int) -> list[str]:
    """Names in label order; ``ValueError`` if a label, a name and a folder do not fit together."""
    names: dict[int, str] = {}
    labels: dict[str, set[int]] = {}  # two classes may have one name
    folders: dict[str, int] = {}
    bad = []
    for image, label, name in entries:
        if names.setdefault(label, name) != name:
            bad.append(f"label {label} is {names[label]!r} and {name!r} ({image})")
        labels.setdefault(spelling(name), set()).add(label)
        if "/" in image:
            folders.setdefault(image.rsplit("/", 1)[0], label)
    if len(folders) >= classes:  # class folders: they must say the same as the labels
        for image, label, name in entries:
            folder = image.rsplit("/", 1)[0]
            spelt = labels.get(spelling(folder.rsplit("/", 1)[-1]), {label})
            if folders[folder] != label or label not in spelt:
                bad.append(f"{image} has label {label} ({name!r}), its folder says another class")
    if bad:
        shown = "\n".join(f"  {text}" for text in bad[:5])
        raise ValueError(f"{path} contradicts itself {len(bad)} times:\n{shown}")
    if sorted(names) != list(range(classes)):
        raise ValueError(
            f"{path} has {len(names)} classes with labels {min(names)} to {max(names)}; expected "
            f"{classes}, labelled 0 to {classes - 1}. Is it the split of another data set?"
        )
    return [names[label] for label in range(classes)]


def _caltech256(*parts):
    """Without faces-easy, labels closed up, names without number and "-101"."""
    labels = sorted({y for _, y, name in parts[-1] if "faces-easy" not in name})
    rank = {label: i for i, label in enumerate(labels)}
    return tuple(
        [(p, rank[y], _number_off(name)) for p, y, name in part if "faces-easy" not in name]
        for part in parts
    )


def _number_off(name: str) -> str:
    """ "012.binoculars" and "251.airplanes-101" as words."""
    return re.sub(r"^\d+\.|-101$", "", name)


# --- where things are ----------------------------------------------------------------------------


def load(
    name: str,
    root: str | Path,
    classnames: Mapping[str, str] | Sequence[str] | None = None,
) -> Folder:
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


# --- official test splits ------------------------------------------------------------------------


def _torchvision(kind: str, files: str, labels: str) -> Callable:
    """Through torchvision's class; its tree has its own folder name, which ``places`` lists."""

    def read(place: Path, benchmark: Benchmark) -> tuple[list[str], Items]:
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


def _aircraft(place: Path, benchmark: Benchmark) -> tuple[list[str], Items]:
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


def _sun(place: Path, benchmark: Benchmark) -> tuple[list[str], Items]:
    """``ClassName.txt`` and the first official partition, named as CoOp names them."""
    folders = [line.lstrip("/") for line in _lines(place / "ClassName.txt")]
    label = {folder: i for i, folder in enumerate(folders)}
    # the letter goes; what is indoor or outdoor says so first
    names = [" ".join(folder.split("/")[1:][::-1]) for folder in folders]
    images = [line.lstrip("/") for line in _lines(place / "Testing_01.txt")]
    inner = place / "SUN397" if (place / "SUN397").is_dir() else place
    return names, [(p, label[p.rsplit("/", 1)[0]], inner / p) for p in images]


def _resisc(place: Path, benchmark: Benchmark) -> tuple[list[str], Items]:
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


def _cub(place: Path, benchmark: Benchmark) -> tuple[list[str], Items]:
    """Tables joined by the number of the image; labels there count from 1."""

    def table(file: str) -> dict[str, str]:
        return dict(line.split(maxsplit=1) for line in _lines(place / file))

    names = [_number_off(n).replace("_", " ") for n in table("classes.txt").values()]
    paths, labels = table("images.txt"), table("image_class_labels.txt")
    test = [i for i, training in table("train_test_split.txt").items() if training == "0"]
    return names, [(paths[i], int(labels[i]) - 1, place / "images" / paths[i]) for i in test]


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: without it the labels are not known")
    return [line.strip() for line in path.read_text("utf-8").splitlines() if line.strip()]


def _refuse_unknown(path: Path, given: Sequence[str], known: Mapping[str, int]) -> None:
    bad = sorted(set(given) - set(known))
    if bad:
        raise ValueError(
            f"{path} names {len(bad)} classes that have no folder: {', '.join(bad[:5])}; the "
            f"folders are {', '.join(list(known)[:5])} ..."
        )


# --- the registry --------------------------------------------------------------------------------

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
