"""Features that somebody else extracted, in place of stage 1: RA-TTA's files of test embeddings.

Their layout is ``<root>/<net>/<seed>/<set>.pth``, a list of (image ``[1,D]``, views ``[A,D]``,
label). The files have no names of images and were written in a shuffled order: such a run is
compared with others by its accuracy, not image by image.
"""

import hashlib
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from tpt_nb.core.files import sha256
from tpt_nb.core.messages import first_line
from tpt_nb.datasets import Dataset, balanced_subset
from tpt_nb.features.shards import Features, Store


def find_given(root: str | Path, model: str, seed: int, name: str) -> Path:
    """The file itself, or where it lies in a folder ``test_embedding`` as the authors have it.

    ``model`` is written with ``_`` in place of ``/`` there; ``name`` is theirs of the data set.
    Raises ``ValueError`` that says what was looked for and what there is.
    """
    root = Path(root)
    path = root if root.is_file() else root / model.replace("/", "_") / str(seed) / f"{name}.pth"
    if path.is_file():
        return path
    here = sorted(p.relative_to(root).as_posix() for p in root.glob("*/*/*.pth"))
    raise ValueError(
        f"embeddings: there is no {path}. Expected <net>/<seed>/<set>.pth; {root} has "
        f"{', '.join(here[:6]) or 'no such file'}."
    )


def read_rows(path: str | Path) -> tuple[Tensor, Tensor]:
    """Features ``[N,V,D]`` unit norm (view 0 first) and targets ``[N]``; nothing is executed.

    Raises ``ValueError`` if the file is damaged or holds anything else.
    """
    try:
        rows = torch.load(path, map_location="cpu", weights_only=True)
        features = torch.stack([torch.cat([o.reshape(1, -1), a]).float() for o, a, _ in rows])
        targets = torch.tensor([int(label) for _, _, label in rows])
    except Exception as error:  # whatever damaged bytes spell
        raise ValueError(
            f"{path} is no list of (image [1,D], views [A,D], label): {first_line(error)}."
        ) from error
    return F.normalize(features, dim=-1), targets


def read_given(
    path: Path, name: str, classnames: list[str], n: int | None = None, seed: int = 0
) -> tuple[Features, Dataset]:
    """The features of the file, and a data set of its ids, labels and class names, no pictures.

    ``n`` and ``seed`` take a class-balanced part. ``ValueError`` if a label has no class name.
    """
    rows, targets = read_rows(path)
    if int(targets.max()) >= len(classnames) or int(targets.min()) < 0:
        raise ValueError(
            f"{path} has labels up to {int(targets.max())}, {name} has {len(classnames)} classes."
        )
    chosen = [int(i) for i in balanced_subset(targets.tolist(), n, seed)]
    ids = [f"{path.stem}/{i:05d}" for i in chosen]
    store = Store(ids)
    for k, i in enumerate(chosen):
        store.put(k, rows[i], int(targets[i]), 0.0)
    fingerprint = hashlib.sha256(f"given {sha256(path)}".encode()).hexdigest()[:16]
    data = Dataset(name, classnames, ids, store.targets.tolist(), fingerprint, _no_picture)
    found = Features(store, list(range(len(ids))), store.targets, ids, [], 0.0, 0)
    return found, data


def _no_picture(i: int):
    raise ValueError("this run has embeddings in place of pictures: there is none to show.")
