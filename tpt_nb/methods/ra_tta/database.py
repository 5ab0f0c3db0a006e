"""An image database without labels: vectors, exact search, and reading what people have.

That is a folder of :func:`build`, or the pickled embeddings that the authors of RA-TTA publish.
Every search compares with every vector, about as fast as faiss does so; notebook 08 shows
approximate indexes and what they miss.
"""

import functools
import io
import json
import math
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.numpy import load_file
from torch import Tensor

from tpt_nb.core.messages import first_line


@dataclass
class Database:
    """Unit-norm embeddings of images that nobody labelled.

    ``features`` ``[M,D]`` float16 or float32; ``items`` names the images (paths, or "style/index"
    of a scene; may be empty); ``groups`` maps a name to the rows (start, stop) of its images, so
    that a search can leave a group out.
    """

    features: np.ndarray
    items: list[str] = field(default_factory=list)
    groups: dict[str, tuple[int, int]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.features)

    @functools.cached_property
    def _rows(self) -> Tensor:
        return torch.from_numpy(np.asarray(self.features, np.float32))

    def search(self, queries: Tensor, k: int, without: str | None = None) -> tuple[Tensor, Tensor]:
        """The k most similar images: cosines ``[Q,k]`` float32 and rows ``[Q,k]``, best first.

        Args:
            queries: ``[Q,D]`` unit norm.
            without: a group that is not looked at; a name that is no group leaves out nothing.
        Raises:
            ValueError: another width, or fewer than k images.
        """
        width = self.features.shape[1]
        if queries.ndim != 2 or queries.shape[1] != width:
            raise ValueError(
                f"queries have shape {list(queries.shape)}, the database has vectors of {width}: "
                "it was embedded with another model."
            )
        start, stop = self.groups.get(without, (0, 0))
        left = len(self) - (stop - start)
        if k < 1 or k > left:
            raise ValueError(f"k is {k}; the database has {left} images to choose from.")
        cosines = (self._rows @ queries.float().cpu().T).T  # this way round it is faster
        cosines[:, start:stop] = -math.inf
        return tuple(cosines.topk(k, dim=1))

    def vectors(self, rows: Tensor) -> Tensor:
        """Embeddings of these rows, ``[..., D]`` float32, unit norm."""
        picked = np.asarray(self.features[rows.flatten().numpy()], np.float32)
        return F.normalize(torch.from_numpy(picked), dim=-1).unflatten(0, tuple(rows.shape))

    def subset(self, rows: Sequence[int]) -> "Database":
        """A smaller database with these rows, in this order; the groups that stay contiguous."""
        rows = np.asarray(rows, int)
        groups = {}
        for name, (start, stop) in self.groups.items():
            at = np.flatnonzero((rows >= start) & (rows < stop))
            if len(at) and at[-1] - at[0] + 1 != len(at):
                raise ValueError(f"the rows of group {name!r} would not lie together; sort them.")
            groups[name] = (int(at[0]), int(at[-1]) + 1) if len(at) else (0, 0)
        items = [self.items[i] for i in rows] if self.items else []
        return Database(self.features[rows], items, groups)


def read_database(path: str | Path) -> Database:
    """A database: a folder that :func:`build` wrote, or a pickle of the authors.

    Raises:
        ValueError: nothing there, another layout, or a damaged file.
    """
    path = Path(path)
    if path.is_file():
        features = read_pickled_embeddings(path).astype(np.float32)
        norms = np.linalg.norm(features, axis=1, keepdims=True).clip(1e-12)
        return Database((features / norms).astype(np.float16))
    if not (path / "about.json").is_file():
        raise ValueError(
            f"{path} is no database: make one with python -m tpt_nb database, or name a file "
            "of embeddings of the authors of RA-TTA."
        )
    try:
        about = json.loads((path / "about.json").read_text("utf-8"))
        features = load_file(path / "vectors.safetensors")["embedding"]
        if (path / "items.json").is_file():
            items = json.loads((path / "items.json").read_text("utf-8"))
        else:  # of older ones, a name per line
            items = (path / "items.txt").read_text("utf-8").split("\n")[:-1]
        if len(items) != len(features):
            raise ValueError(f"{len(items)} names for {len(features)} vectors")
        groups = {k: tuple(span) for k, span in about["groups"].items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError, SafetensorError) as error:
        raise ValueError(
            f"the database {path} is damaged ({first_line(error)}): delete it and make it again."
        ) from error
    return Database(features, items, groups)


class _ArraysOnly(pickle.Unpickler):
    """Unpickles dicts, lists, numpy arrays and torch tensors; refuses every other object."""

    ALLOWED = {
        "numpy": ("ndarray", "dtype"),
        "numpy.core.multiarray": ("_reconstruct", "scalar"),
        "numpy._core.multiarray": ("_reconstruct", "scalar"),
        "numpy.core.numeric": ("_frombuffer",),
        "numpy._core.numeric": ("_frombuffer",),
        "collections": ("OrderedDict",),
        "torch._utils": ("_rebuild_tensor_v2",),
    }

    def find_class(self, module: str, name: str):
        if (module, name) == ("torch.storage", "_load_from_bytes"):
            # torch's own would run what the bytes say
            return lambda data: torch.load(io.BytesIO(data), "cpu", weights_only=True)
        if (module, name) == ("_codecs", "encode"):  # how protocol 2 stores bytes
            return lambda text, how="latin1": text.encode(how)
        if name not in self.ALLOWED.get(module, ()):
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is no array")
        return super().find_class(module, name)


def read_pickled_embeddings(path: str | Path) -> np.ndarray:
    """Embeddings ``[M,D]`` from a pickle as the authors publish them; no code in it is run.

    Raises:
        ValueError: the file holds anything but arrays, or no such array.
    """
    try:
        with open(path, "rb") as file:
            value = _ArraysOnly(file).load()
    except Exception as error:  # damaged bytes raise whatever they spell
        raise ValueError(f"{path} is not read: {first_line(error)}.") from error
    value = value.get("embedding") if isinstance(value, Mapping) else value
    value = value.numpy() if isinstance(value, Tensor) else value
    if not isinstance(value, np.ndarray) or value.ndim != 2 or value.dtype.kind != "f":
        raise ValueError(f"{path} has no array [M,D] of numbers under 'embedding'.")
    return value
