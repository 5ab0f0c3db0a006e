"""Data sets: the registry, IconShift, folders here and remote, the field's sets, damage, downloads.

Never imported here: models, views, or anything that computes on images.
One more data set: a line in the table of ``registry.py``, or ``register`` in a notebook.
"""

from tpt_nb.datasets import iconshift
from tpt_nb.datasets.benchmarks import BENCHMARKS
from tpt_nb.datasets.damage import CORRUPTIONS, SEVERITIES, corrupt, corrupted
from tpt_nb.datasets.dataset import Dataset, balanced_subset, from_files, subset
from tpt_nb.datasets.folder import load_folder
from tpt_nb.datasets.imagenet import check_order, imagenet_classes
from tpt_nb.datasets.registry import ICONSHIFT, file_name, get, load, names, register, template
from tpt_nb.datasets.sources import SOURCES, download, how_to_get
from tpt_nb.datasets.tree import image_files
from tpt_nb.datasets.wording import known_classnames, reworded, wording_file

__all__ = [
    "BENCHMARKS",
    "CORRUPTIONS",
    "ICONSHIFT",
    "SEVERITIES",
    "SOURCES",
    "Dataset",
    "balanced_subset",
    "check_order",
    "corrupt",
    "corrupted",
    "download",
    "file_name",
    "from_files",
    "get",
    "how_to_get",
    "iconshift",
    "image_files",
    "imagenet_classes",
    "known_classnames",
    "load",
    "load_folder",
    "names",
    "register",
    "reworded",
    "subset",
    "template",
    "wording_file",
]
