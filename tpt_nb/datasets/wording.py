"""Other wordings of class names: of any data set, from a file or by a name that ships.

The labels stay what they are; only the words change, so features in the cache stay good. TPT's and
CoOp's lists differ from OpenAI's in some names; so does that of the study "TPT with patches", in
ten of the two hundred of ImageNet-A (``study``, see data/classnames/README.md).
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from tpt_nb.core.files import read_text
from tpt_nb.core.messages import unknown
from tpt_nb.core.paths import DATA
from tpt_nb.datasets.benchmarks import BENCHMARKS
from tpt_nb.datasets.dataset import Dataset
from tpt_nb.datasets.folder import spelling
from tpt_nb.datasets.imagenet import SYNSET, check_order, imagenet_classes

SHIPPED = {"study": DATA / "classnames" / "study.tsv"}


def wording_file(name: str) -> Path:
    """The file of a wording: one that ships, by its name, or the path of another."""
    return SHIPPED.get(name, Path(name))


def reworded(dataset: Dataset, wording: str) -> Dataset:
    """The data set with class names from a file.

    Args:
        wording: ``study``, or the path of a file: JSON (a list, or ``{known: new}``), or text with
            a tab between the known name and the new one, or with one name per line in label order.
            Known names are those of the data set (case and underscores do not count), or synsets
            for the ImageNet family. A pair for each class that shall be called otherwise is enough.
    Raises:
        ValueError: no such file, or it fits the classes of the data set in no way.
    """
    given, names = _read(wording), list(dataset.classnames)
    if not isinstance(given, Mapping):
        check_order(dataset.name, names, given)
        return dataclasses.replace(dataset, classnames=list(given))
    family = imagenet_classes()
    place = {spelling(name): i for i, name in enumerate(names)}
    changed = {}
    for known, new in given.items():
        old = family.get(known, known) if SYNSET.fullmatch(known) else known
        if spelling(old) in place:
            changed[place[spelling(old)]] = new
        elif known not in family:  # of ImageNet's a variant need not have all
            raise ValueError(f"{wording}: {unknown(f'class of {dataset.name}', known, names)}")
    if not changed:
        raise ValueError(f"{wording} names none of the {len(names)} classes of {dataset.name}.")
    names = [changed.get(i, name) for i, name in enumerate(names)]
    return dataclasses.replace(dataset, classnames=names)


def known_classnames(name: str, wording: str = "") -> list[str]:
    """The class names of a set that need not be here: of the ImageNet family, or a list in a file.

    Raises ``ValueError`` for others: their names come from the files that have the labels.
    """
    base = name.split("/")[0]
    if wording and not isinstance(given := _read(wording), Mapping):
        return list(given)
    if base not in BENCHMARKS or not BENCHMARKS[base].by_synset:
        raise ValueError(
            f"the class names of {name!r} are in the files of the data set, which is not here: "
            "give them with classnames=FILE, one per line in label order."
        )
    return list(imagenet_classes(base[-1] if base in ("imagenet-a", "imagenet-r") else "").values())


def _read(wording: str) -> Mapping[str, str] | Sequence[str]:
    path = wording_file(wording)
    if not path.is_file():
        raise ValueError(f"classnames: {unknown('wording, and no file', wording, SHIPPED)}")
    text = read_text(path)
    if path.suffix == ".json":
        value = json.loads(text)
        words = list(value.values()) if isinstance(value, dict) else value
        if not isinstance(words, list) or not all(isinstance(w, str) and w.strip() for w in words):
            raise ValueError(f"{path}: expected a list of names, or {{known: new}}.")
        return value
    rows = [line.split("\t") for line in text.splitlines() if line.strip()]
    if not rows:
        raise ValueError(f"{path} is empty.")
    if len(rows[0]) == 1:
        return [row[0].strip() for row in rows]
    if any(len(row) < 2 or not row[1].strip() for row in rows):
        raise ValueError(f"{path}: each line needs a known name, a tab and the new one.")
    return {row[0].strip(): row[1].strip() for row in rows if row[:2] != ["synset", "name"]}
