"""TODO."""

from tpt_nb.datasets import benchmarks, damage, iconshift, sources, splits
from tpt_nb.datasets.benchmarks import BENCHMARKS, Benchmark
from tpt_nb.datasets.damage import CORRUPTIONS, SEVERITIES, corrupt, corrupted
from tpt_nb.datasets.folder import (
    NAMES_FILE,
    Folder,
    class_folders,
    from_files,
    image_files,
    load_folder,
    read_names,
    spelling,
)
from tpt_nb.datasets.imagenet import SYNSET, check_order, imagenet_classes
from tpt_nb.datasets.registry import (
    ICONSHIFT,
    Dataset,
    balanced_subset,
    known,
    load,
    subset,
    template,
)
from tpt_nb.datasets.sources import SOURCES, get, how_to_get

__all__ = [
    "BENCHMARKS",
    "Benchmark",
    "CORRUPTIONS",
    "SEVERITIES",
    "SOURCES",
    "benchmarks",
    "corrupt",
    "corrupted",
    "damage",
    "get",
    "how_to_get",
    "iconshift",
    "sources",
    "splits",
    "Dataset",
    "Folder",
    "ICONSHIFT",
    "NAMES_FILE",
    "SYNSET",
    "balanced_subset",
    "check_order",
    "class_folders",
    "from_files",
    "image_files",
    "imagenet_classes",
    "known",
    "load",
    "load_folder",
    "read_names",
    "spelling",
    "subset",
    "template",
]
