"""RA-TTA as its authors run it: what their two scripts set for each data set, and their files.

Read in ``ratta_after_extract.py`` and ``ratta_after_extract_imagenet.py`` (kaist-dmlab/RA-TTA at
9198bcb) and in their ``src/dataloader/templates.py``. Their files are found by name:
``db_embedding/LAION2B_<set>_aux_<net>`` and ``descriptions/CuPL_prompts_<set>.json``; their Drive
folder of databases is ``python -m tpt_nb download ra-tta-databases``.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tpt_nb import datasets
from tpt_nb.core.paths import datasets_dir
from tpt_nb.methods.ra_tta.database import Database, read_database

PRE_TEMPLATE = "a photo of the {}. "
DATABASES = "ra-tta-databases"  # as a download


@dataclass(frozen=True)
class Script:
    """What the scripts set: ``q``, the templates of the classifier, what leads a description.

    ``database`` is the set whose database is taken, ``part`` the share of its rows that is drawn
    (with replacement: "due to VRAM size").
    """

    q: float = 0.75
    templates: str | tuple[str, ...] = "single"
    pre_template: str = PRE_TEMPLATE
    database: str = ""
    part: float = 1.0


def _kind(noun: str, pre_template: str = "") -> Script:
    pair = tuple(f"a photo of {article} {{}}, a type of {noun}." for article in ("a", "the"))
    return Script(
        templates=pair, pre_template=pre_template or f"a photo of a {{}}, a type of {noun}. "
    )


_PLAIN = Script(templates="seven", pre_template="a photo of a {}. ")
_SHARED = {"q": 0.9, "templates": "eighty", "database": "imagenet", "part": 0.75}
SCRIPTS: dict[str, Script] = {
    "imagenet": Script(**_SHARED),
    "imagenet-v2": Script(**_SHARED),
    "imagenet-sketch": Script(**_SHARED, pre_template="a sketch photo of a {}. "),
    "imagenet-a": Script(0.9, "eighty"),
    "imagenet-r": Script(0.9, "eighty", "a rendition photo of the {}. "),
    "caltech101": _PLAIN,
    "caltech256": _PLAIN,
    "sun397": _PLAIN,
    "oxford-pets": _kind("pet"),
    "flowers102": _kind("flower"),
    "food101": _kind("food"),
    "cub200": _kind("bird"),
    "stanford-cars": _kind("car", "a photo of a {}. "),
    "fgvc-aircraft": _kind(
        "aircraft", "a photo of a {} from Fine-Grained Visual Classification of Aircraft. "
    ),
    "dtd": _kind("texture", "a photo of a {}, which is a type of texture, or a type of pattern. "),
    "ucf101": Script(
        templates=("a photo of a person doing {}.",), pre_template="a photo of a person doing {}. "
    ),
    "resisc45": Script(
        templates=("a satellite photo of {}.",), pre_template="a satellite photo of the {}. "
    ),
}


def script_of(dataset: str) -> Script:
    """What the authors' script sets for a data set; for one that they have not, its defaults."""
    return SCRIPTS.get(dataset, Script())


def net_of(model: str) -> str:
    """How their files spell a model: ``ViT-B_16``."""
    return model.split("@")[0].replace("/", "_")


def find_database(place: str, dataset: str, model: str) -> Path | None:
    """The database of a data set: ``place`` itself, or their file of it in a folder.

    Without a place, where the download puts it. None if there is none.
    """
    root = Path(place) if place else datasets_dir() / DATABASES
    of = script_of(dataset).database or dataset
    name = f"LAION2B_{datasets.file_name(of)}_aux_{net_of(model)}"
    for path in (root / name, root / "db_embedding" / name):
        if path.is_file():
            return path
    return root if place else None


def find_descriptions(place: str, dataset: str) -> Path | None:
    """The file of descriptions: ``place`` itself, or their file of the data set in a folder."""
    path = Path(place) / f"CuPL_prompts_{datasets.file_name(dataset)}.json"
    return path if path.is_file() else Path(place) if place else None


def open_database(path: Path, dataset: str) -> Database:
    """A database; of their file that several sets share, the part that their script draws.

    They draw from NumPy's global state after ``seed``; here the draw depends on the file's name
    alone, so that every run searches the same images.
    """
    whole, script = read_database(path), script_of(dataset)
    if script.part == 1 or not path.is_file():
        return whole
    seed = int.from_bytes(hashlib.sha256(path.name.encode()).digest()[:4], "big")
    rng = np.random.default_rng(seed)
    return whole.subset(rng.integers(len(whole), size=int(len(whole) * script.part)))
