"""The field's data sets, read from where people keep them: ImageNet and its variants, and the rest.

A root may be the folder of the images, the folder of the data set, or a folder that holds many data
sets as CoOp, TPT, ZERO and RA-TTA lay them out (``folders``). Labels and class names always come
from one source: for the ImageNet family from the synset that names the class folder, for the others
from the split file that papers share (CoOp's ``split_zhou_*.json``) or, without it, from the
official test split. A source that contradicts itself, or folders that no class fits, is an error
that shows the first mismatches: a shifted label map gives accuracy near chance, and nothing else
would tell.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tpt_nb.core.messages import first_line
from tpt_nb.core.remote import is_remote
from tpt_nb.datasets.dataset import Dataset, from_files
from tpt_nb.datasets.folder import class_folders, load_folder
from tpt_nb.datasets.imagenet import (
    SYNSET,
    check_order,
    check_synsets,
    has_class_folders,
    imagenet_classes,
    of_damage,
)
from tpt_nb.datasets.official import Items, aircraft, by_torchvision, cub, resisc, sun
from tpt_nb.datasets.splits import from_split


@dataclass(frozen=True)
class Benchmark:
    """What is known of a data set before it is read: numbers of classes and of test images.

    ``folders`` are where it may lie within a root; ``split`` is CoOp's split file, ``images`` the
    folders that its paths may be relative to; ``read`` reads a place without it. ``template`` is
    the sentence that CoOp (for the last three: RA-TTA) uses for it.
    """

    classes: int
    size: int
    folders: str
    template: str = "a photo of a {}."
    split: str = ""
    images: tuple[str, ...] = ("",)
    read: Callable[[Path], tuple[list[str], Items]] | None = None

    @property
    def places(self) -> tuple[str, ...]:
        """The root itself, and the folders."""
        return ("", *self.folders.split())

    @property
    def by_synset(self) -> bool:
        """Is it one of the ImageNet family, whose folders are its labels?"""
        return not self.split and self.read is None


# fmt: off
BENCHMARKS = {
    "imagenet": Benchmark(1000, 50_000,
        "val images/val imagenet/images/val imagenet/val ImageNet/val"),
    "imagenet-v2": Benchmark(1000, 10_000,
        "imagenetv2-matched-frequency-format-val "
        "imagenetv2/imagenetv2-matched-frequency-format-val imagenetv2"),
    "imagenet-a": Benchmark(200, 7_500, "imagenet-a imagenet-adversarial/imagenet-a"),
    "imagenet-r": Benchmark(200, 30_000, "imagenet-r imagenet-rendition/imagenet-r"),
    "imagenet-sketch": Benchmark(1000, 50_889,
        "sketch images imagenet-sketch/images imagenet-sketch/sketch imagenet-sketch "
        "ImageNet-Sketch/sketch ImageNet-Sketch"),
    "imagenet-c": Benchmark(1000, 50_000,
        "imagenet-c imagenet-c/imagenet-c ImageNet-C imagenet_c ImageNet-C/imagenet-c"),
    "caltech101": Benchmark(100, 2_465, "caltech-101 caltech101 Caltech101",
        split="split_zhou_Caltech101.json",
        images=("101_ObjectCategories", "caltech-101/101_ObjectCategories", "images", "")),
    "oxford-pets": Benchmark(37, 3_669, "oxford_pets OxfordPets oxford-iiit-pet",
        template="a photo of a {}, a type of pet.", split="split_zhou_OxfordPets.json",
        images=("images", ""), read=by_torchvision("OxfordIIITPet", "_images", "_labels")),
    "stanford-cars": Benchmark(196, 8_041, "stanford_cars StanfordCars",
        split="split_zhou_StanfordCars.json", images=("", "images"),
        read=by_torchvision("StanfordCars", "_samples", "_samples")),
    "flowers102": Benchmark(102, 2_463,
        "oxford_flowers Flower102 flower102 flowers-102",
        template="a photo of a {}, a type of flower.", split="split_zhou_OxfordFlowers.json",
        images=("jpg", ""), read=by_torchvision("Flowers102", "_image_files", "_labels")),
    "food101": Benchmark(101, 30_300, "food-101 food101 Food101",
        template="a photo of {}, a type of food.", split="split_zhou_Food101.json",
        images=("images", ""), read=by_torchvision("Food101", "_image_files", "_labels")),
    "fgvc-aircraft": Benchmark(100, 3_333,
        "data fgvc_aircraft fgvc-aircraft-2013b/data",
        template="a photo of a {}, a type of aircraft.", read=aircraft),
    "sun397": Benchmark(397, 19_850, "sun397 SUN397", split="split_zhou_SUN397.json",
        images=("SUN397", "images", ""), read=sun),
    "dtd": Benchmark(47, 1_692, "dtd DTD dtd/dtd", template="{} texture.",
        split="split_zhou_DescribableTextures.json", images=("images", ""),
        read=by_torchvision("DTD", "_image_files", "_labels")),
    "eurosat": Benchmark(10, 8_100, "eurosat EuroSAT",
        template="a centered satellite photo of {}.", split="split_zhou_EuroSAT.json",
        images=("2750", "images", "")),
    "ucf101": Benchmark(101, 3_783, "ucf101 UCF101",
        template="a photo of a person doing {}.", split="split_zhou_UCF101.json",
        images=("UCF-101-midframes", "images", "")),
    "caltech256": Benchmark(256, 0, "caltech-256 caltech256",
        split="split_Caltech256.json", images=("256_ObjectCategories", "")),
    "resisc45": Benchmark(45, 6_300, "resisc45", template="a satellite photo of {}.",
        read=resisc),
    "cub200": Benchmark(200, 5_794, "CUB_200_2011",
        template="a photo of a {}, a type of bird.", read=cub),
}
# fmt: on


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
    if is_remote(root):
        if BENCHMARKS[name].by_synset:
            return _imagenet(name, root, None, classnames)
        raise ValueError(
            f"{name} cannot be read from {root}: its labels are in files of its own. Remote roots "
            "are for folder and the ImageNet family; copy this data set to a disk here."
        )
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"{root} {'is a file' if root.exists() else 'does not exist'}")
    if not BENCHMARKS[name].by_synset:
        return _with_split(name, root, classnames)
    places = [root / place for place in BENCHMARKS[name].places if (root / place).is_dir()]
    place = next(filter(has_class_folders, places), None)
    if place is None:
        raise _not_here(name, root)
    return _imagenet(name, place, class_folders(place), classnames)


def load_imagenet_c(
    damage: str,
    severity: int,
    root: str | Path,
    classnames: Mapping[str, str] | Sequence[str] | None = None,
) -> Dataset:
    """One damage of ImageNet-C at one severity, from the JPEG files that its authors made.

    The name is ``imagenet-c/<damage>/<severity>``; labels are the synsets that name the class
    folders. Arguments and errors: see :func:`load` and :func:`tpt_nb.datasets.imagenet.of_damage`.
    """
    path = f"{damage}/{severity}"
    if is_remote(root):
        root = str(root).rstrip("/")
        place, folders = (root if root.endswith(f"/{path}") else f"{root}/{path}"), None
    else:
        root = Path(root)
        if not root.is_dir():
            raise FileNotFoundError(f"{root} {'is a file' if root.exists() else 'does not exist'}")
        place = of_damage(root, BENCHMARKS["imagenet-c"].places, damage, severity)
        folders = class_folders(place)
    data = _imagenet("imagenet-c", place, folders, classnames)
    # two damages of few images might have files of the same sizes
    print_ = hashlib.sha256(f"{data.fingerprint}/{path}".encode()).hexdigest()
    return dataclasses.replace(data, name=f"imagenet-c/{path}", fingerprint=print_)


def _imagenet(name: str, place: str | Path, folders: list[str] | None, classnames) -> Dataset:
    """A set of the ImageNet family: class folders named by synset (V2: by number).

    ``folders`` are those of a place on this machine, which are checked before they are read.
    """
    benchmark = BENCHMARKS[name]
    names = imagenet_classes(name[-1] if name in ("imagenet-a", "imagenet-r") else "")
    if classnames is not None:
        names = _own_names(name, names, classnames)
    order = list(names)
    if name == "imagenet-v2" and not (folders and SYNSET.fullmatch(folders[0])):
        # sorted as strings "10" comes before "2": the number is the label, not the rank
        numbers = [str(i) for i in range(len(order))]
        names, order = dict(zip(numbers, names.values(), strict=True)), numbers
    if folders:
        check_synsets(name, place, folders, names)
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
        folders = [p / f for p in places for f in benchmark.images if (p / f).is_dir()]
        names, items = from_split(splits[0], benchmark.classes, folders)
    else:
        for place in places if benchmark.read else ():
            try:
                names, items = benchmark.read(place)
                break
            except FileNotFoundError as error:
                missing.append(str(error))
            except Exception as error:  # torchvision reads some: damaged files raise anything
                if str(place) in str(error):
                    raise
                why = f"{type(error).__name__}: {first_line(error)}"
                raise ValueError(f"{place}: the lists of {name} are damaged ({why})") from error
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


def _not_here(name: str, root: Path, why: Sequence[str] = ()) -> FileNotFoundError:
    benchmark = BENCHMARKS[name]
    what = f"{benchmark.split} and its images" if benchmark.split else "its labels and images"
    if benchmark.by_synset:
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
