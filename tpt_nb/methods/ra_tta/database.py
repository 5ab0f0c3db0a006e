"""The image database: vectors, search, reading."""

import functools
import json
import math
import pickle
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 65_536  # rows of the database that are compared at once


LARGE = 1_000_000  # vectors; above, an approximate index


FORMAT = 1  # of stored databases


@dataclass
class Database:
    """Unit-norm embeddings of images that nobody labelled.

    ``features`` ``[M,D]`` float16 or float32, in memory or memory-mapped; ``items`` names the
    images (paths, or "style/index" of a scene; may be empty); ``groups`` maps a name to the rows
    (start, stop) of its images, so that a search can leave a group out; ``kind`` is the index.
    """

    features: np.ndarray
    items: list[str] = field(default_factory=list)
    groups: dict[str, tuple[int, int]] = field(default_factory=dict)
    kind: str = "auto"

    def __len__(self) -> int:
        return len(self.features)

    @functools.cached_property
    def index(self) -> Callable:
        """``search(queries [Q,D], k, left_out (start, stop) or None)``; made when first used."""
        return make_index(self.features, self.kind)

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
        hidden = self.groups.get(without) if without else None
        left = len(self) - (hidden[1] - hidden[0] if hidden else 0)
        if k < 1 or k > left:
            raise ValueError(f"k is {k}; the database has {left} images to choose from.")
        scores, rows = self.index(np.ascontiguousarray(queries.float().cpu().numpy()), k, hidden)
        return torch.from_numpy(scores), torch.from_numpy(rows)

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
        return Database(np.asarray(self.features)[rows], items, groups, self.kind)


def make_index(features: np.ndarray, kind: str = "auto", seed: int = 0) -> Callable:
    """A search over ``features`` ``[M,D]`` (unit norm).

    Args:
        kind: "exact" (no faiss: blocks of rows, works on a memory map), "flat" (faiss, exact),
            "ivf" or "hnsw" (faiss, approximate), "auto": flat up to a million vectors, hnsw beyond;
            exact where there is no faiss.
    Returns:
        ``search(queries [Q,D], k, left_out) -> (cosines [Q,k], rows [Q,k])``; ``left_out`` is a
        range (start, stop) of rows that are not looked at, or None.
    """
    known = ("auto", "exact", "flat", "ivf", "hnsw")
    if kind not in known:
        raise ValueError(f"unknown index {kind!r}; known: {', '.join(known)}.")
    if kind == "auto":
        kind = "exact" if _faiss(needed=False) is None else "flat"
        if len(features) > LARGE:
            if kind == "exact":
                _say_once(
                    f"{len(features):,} vectors and no faiss: the search is exact and slow. "
                    "pip install faiss-cpu (ci/requirements-extras.txt) makes it fast."
                )
            else:
                kind = "hnsw"
    return _exact_index(features) if kind == "exact" else _faiss_index(features, kind, seed)


def _exact_index(features: np.ndarray) -> Callable:
    small = len(features) * features.shape[1] <= 2**28
    blocks = [features[i : i + BLOCK] for i in range(0, len(features), BLOCK)]
    if small:  # once, not at each search
        blocks = [torch.from_numpy(np.asarray(b, np.float32)) for b in blocks]

    def search(queries: np.ndarray, k: int, left_out=None) -> tuple[np.ndarray, np.ndarray]:
        q = torch.from_numpy(queries)
        best = torch.full((len(q), 0), -math.inf)
        rows = torch.empty(len(q), 0, dtype=torch.long)
        for i, block in enumerate(blocks):
            block = block if small else torch.from_numpy(np.asarray(block, np.float32))
            cosines = q @ block.T
            if left_out:
                start, stop = (min(max(x - i * BLOCK, 0), len(block)) for x in left_out)
                cosines[:, start:stop] = -math.inf
            top = cosines.topk(min(k, len(block)), dim=1)
            best = torch.cat([best, top.values], 1)
            rows = torch.cat([rows, top.indices + i * BLOCK], 1)
            top = best.topk(min(k, best.shape[1]), dim=1)
            best, rows = top.values, rows.gather(1, top.indices)
        return best.numpy(), rows.numpy()

    return search


def _faiss_index(features: np.ndarray, kind: str, seed: int) -> Callable:
    faiss = _faiss(needed=True)
    m, width = features.shape
    if kind == "flat":
        index = faiss.IndexFlatIP(width)
    elif kind == "hnsw":
        index = faiss.IndexHNSWFlat(width, 32, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction, index.hnsw.efSearch = 80, 128
    else:
        cells = max(1, min(int(4 * math.sqrt(m)), m // 40))
        index = faiss.IndexIVFFlat(
            faiss.IndexFlatIP(width), width, cells, faiss.METRIC_INNER_PRODUCT
        )
        index.cp.seed = seed
        rows = np.random.default_rng(seed).permutation(m)[: 64 * cells]
        index.train(np.ascontiguousarray(features[np.sort(rows)], np.float32))
        index.nprobe = max(1, cells // 8)
    for i in range(0, m, BLOCK):
        index.add(np.ascontiguousarray(features[i : i + BLOCK], np.float32))

    def search(queries: np.ndarray, k: int, left_out=None) -> tuple[np.ndarray, np.ndarray]:
        params = None
        if left_out and left_out[1] > left_out[0]:
            inside = faiss.IDSelectorRange(*left_out)
            select = {"sel": faiss.IDSelectorNot(inside)}
            if kind == "ivf":
                params = faiss.SearchParametersIVF(nprobe=index.nprobe, **select)
            elif kind == "hnsw":
                params = faiss.SearchParametersHNSW(efSearch=index.hnsw.efSearch, **select)
            else:
                params = faiss.SearchParameters(**select)
        return index.search(queries, k, params=params)

    return search


def recall(search: Callable, reference: Callable, queries: Tensor, k: int) -> float:
    """Share of the k nearest of ``reference`` that ``search`` finds too, over queries ``[Q,D]``."""
    q = np.ascontiguousarray(queries.float().cpu().numpy())
    found, true = search(q, k)[1], reference(q, k)[1]
    hits = [len(set(a) & set(b)) for a, b in zip(found.tolist(), true.tolist(), strict=True)]
    return sum(hits) / (k * len(q))


def _faiss(needed: bool):
    try:
        import faiss
    except ImportError:
        if needed:
            raise ValueError(
                "this index needs faiss: pip install faiss-cpu (ci/requirements-extras.txt); "
                "kind='exact' works without it."
            ) from None
        return None
    return faiss


_said: set[str] = set()


def _say_once(text: str) -> None:
    if text not in _said:
        _said.add(text)
        print(text)


def read_database(path: str | Path, kind: str = "auto") -> Database:
    """A database: a folder that :func:`build` wrote (memory-mapped), or a pickle of the authors.

    Raises:
        ValueError: nothing there, or another layout.
    """
    path = Path(path)
    if path.is_file():
        return Database(_unit(read_pickled_embeddings(path)), kind=kind)
    if not (path / "about.json").is_file():
        raise ValueError(
            f"{path} is no database: make one with python -m tpt_nb build-database, or name a file "
            "of embeddings of the authors of RA-TTA."
        )
    about = json.loads((path / "about.json").read_text())
    items = (path / "items.txt").read_text("utf-8").splitlines()
    features = map_tensor(path / "vectors.safetensors", "embedding")
    groups = {name: tuple(span) for name, span in about.get("groups", {}).items()}
    return Database(features, items, groups, kind)


def map_tensor(path: str | Path, name: str) -> np.memmap:
    """A tensor of a safetensors file as a read-only memory map: read from disk when it is used."""
    kinds = {"F16": np.float16, "F32": np.float32}
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        entry = json.loads(file.read(length))[name]
    offset = 8 + length + entry["data_offsets"][0]
    return np.memmap(path, kinds[entry["dtype"]], "r", offset, tuple(entry["shape"]))


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
            return _load_storage  # torch's own would run what the bytes say
        if (module, name) == ("_codecs", "encode"):  # how protocol 2 stores bytes
            return lambda text, how="latin1": text.encode(how)
        if name not in self.ALLOWED.get(module, ()):
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is no array")
        return super().find_class(module, name)


def _load_storage(data: bytes):
    import io

    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def read_pickled_embeddings(path: str | Path, key: str = "embedding") -> np.ndarray:
    """Embeddings ``[M,D]`` from a pickle as the authors publish them; no code in it is run.

    Raises:
        ValueError: the file holds anything but arrays, or no such array.
    """
    try:
        with open(path, "rb") as file:
            value = _ArraysOnly(file).load()
    except (pickle.UnpicklingError, EOFError, AttributeError, TypeError, RuntimeError) as error:
        raise ValueError(f"{path} is not read: {error}.") from error
    value = value.get(key) if isinstance(value, Mapping) else value
    value = value.numpy() if isinstance(value, Tensor) else value
    if not isinstance(value, np.ndarray) or value.ndim != 2 or value.dtype.kind != "f":
        raise ValueError(f"{path} has no array [M,D] of numbers under {key!r}.")
    return value


def read_test_embeddings(path: str | Path) -> tuple[Tensor, Tensor]:
    """The authors' extracted test set: features ``[N,V,D]`` (view 0 first) and targets ``[N]``.

    Their file is a list of (image ``[1,D]``, views ``[A,D]``, label); nothing in it is executed.
    """
    rows = torch.load(path, map_location="cpu", weights_only=True)
    features = torch.stack([torch.cat([o.reshape(1, -1), a]).float() for o, a, _ in rows])
    return F.normalize(features, dim=-1), torch.tensor([int(label) for _, _, label in rows])


def _unit(features: np.ndarray) -> np.ndarray:
    """float16, unit norm: the order by distance is then that by cosine."""
    out = np.empty(features.shape, np.float16)
    for i in range(0, len(features), BLOCK):
        block = features[i : i + BLOCK].astype(np.float32)
        out[i : i + BLOCK] = block / np.linalg.norm(block, axis=1, keepdims=True).clip(1e-12)
    return out
