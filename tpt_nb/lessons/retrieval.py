"""What notebook 08 needs beside its teaching cells: frames, sheets, searches, an honest database.

Nothing here classifies anything; the method is in ``methods.ra_tta``.
"""

import time
from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
from torch import Tensor

from tpt_nb import datasets, views
from tpt_nb.methods import ra_tta


def knowledge(descriptions: str, database: str) -> Callable:
    """For ``setup.prepare(also=...)``: RA-TTA needs texts and pictures of the classes.

    Raises:
        ValueError: the data set is not of IconShift, whose texts and pictures are embedded, and
            no file of descriptions or no database was given; what was given is not for these
            classes.
    """

    def check(world) -> None:
        embedded = world.images.name in datasets.iconshift.VARIANTS
        if not embedded and (needed := lacking(descriptions, database)):
            raise ValueError(f"{world.images.name} needs {needed}.")
        ra_tta.read_descriptions(descriptions or ra_tta.DESCRIPTIONS, world.images.classnames)

    return check


def lacking(descriptions: str, database: str) -> str:
    """For ``setup.prepare(lacking=...)``: what only the reader can give for full; "" if given."""
    needed = "the parameters descriptions and image_database (texts and pictures of the classes)"
    return "" if descriptions and database else needed


def frames(image, image_id: str, seed: int, n_aug: int) -> np.ndarray:
    """Boxes ``[V,4]`` (left, top, right, bottom) of an image's views; view 0 is the whole of it."""
    draws = np.random.default_rng(views.view_seed(seed, image_id))
    draws = draws.random((n_aug, 4 * views.CROP_TRIES + 1))[:, :-1]
    left, top, w, h = views.crop_boxes(*image.size, draws.reshape(n_aug, views.CROP_TRIES, 4)).T
    whole = [[0, 0, *image.size]]
    return np.concatenate([whole, np.stack([left, top, left + w, top + h], axis=1)])


def fired(
    bank, names: Sequence[str], chosen: Tensor, cosines: Tensor, scores: Tensor, count: int = 5
) -> list[tuple[int, str]]:
    """Selected descriptions, best first, each with another view: (view, what to write beside it).

    Args:
        chosen: indices of the selected descriptions, best first; three of a class at most.
        cosines: ``[V,T]``; ``scores`` ``[T]``, their quantile over the views.
    """
    owners, taken, shown = bank.owner.tolist(), [], []
    bare = [s.endswith(f"the {names[c]}.") for s, c in zip(bank.sentences, owners, strict=True)]
    for t in sorted(chosen.tolist(), key=lambda t: bare[t]):  # bare names last
        v = int(cosines[:, t].argmax())
        if taken.count(owners[t]) < 3 and v not in [view for view, _ in shown]:
            taken.append(owners[t])
            said = bank.sentences[t].partition(". ")[2] or bank.sentences[t]
            numbers = f"cosine {cosines[v, t]:.2f}; quantile over views {scores[t]:.2f}"
            shown.append((v, f"{said}\nbest on view {v}, {numbers}"))
    return shown[:count]


def found_shares(database, classes: Tensor, rows: Tensor, count: int) -> list[float]:
    """Of each class the share (%) of its retrieved images that show it.

    The labels of the embedded database are in its names; the method never asks for them.

    Args:
        classes: ``[S]``, their retrieved ``rows`` ``[S,K]``; ``count`` is the number of classes.
    """
    out = []
    for c, row in zip(classes.tolist(), rows.tolist(), strict=True):
        true = [int(database.items[r].split("/")[1]) % count for r in row]
        out.append(100 * float(np.mean([t == c for t in true])))
    return out


def overlap(variant: str, ids: Sequence[str], items: Sequence[str]) -> int:
    """How many of the database's scenes are one of the tested images: all are looked at.

    Two scenes are the same if they were composed with the same random numbers.
    """
    kept, tested = datasets.iconshift.kept(variant), set()
    for image_id in ids:
        index = int(image_id.split("/")[1])
        place = index if kept is None else kept[index]
        tested.add(tuple(datasets.iconshift.spec(variant, place)["paint"]))
    return sum(tuple(ra_tta.database_spec(item)["paint"]) in tested for item in items)


def halves(database, count: int) -> list:
    """The database without the upper half of the ``count`` classes, and without the lower half."""
    labels = np.array([int(item.split("/")[1]) % count for item in database.items])
    return [database.subset(np.flatnonzero(labels < count // 2)),
            database.subset(np.flatnonzero(labels >= count // 2))]  # fmt: skip


def index_of(kind: str, vectors: np.ndarray):
    """A faiss index of unit vectors ``[M,D]`` by inner product: flat (exact), ivf or hnsw."""
    import faiss

    cells = max(1, min(int(4 * len(vectors) ** 0.5), len(vectors) // 40))
    recipe = {"flat": "Flat", "ivf": f"IVF{cells},Flat", "hnsw": "HNSW32"}[kind]
    index = faiss.index_factory(vectors.shape[1], recipe, faiss.METRIC_INNER_PRODUCT)
    if kind == "ivf":
        index.nprobe = max(1, cells // 8)  # cells that are looked into
        index.cp.seed = 0  # of the k-means that finds the centroids
    if kind == "hnsw":
        index.hnsw.efConstruction, index.hnsw.efSearch = 80, 128  # width of the walk
    index.train(vectors)
    index.add(vectors)
    return index


def searches(database, queries: Tensor, k: int = 20) -> pd.DataFrame:
    """Exact and approximate search for the ``k`` nearest of each query ``[Q,D]``, one by one.

    Columns: recall against the exact search (%), ms per query, seconds to build. Without faiss the
    exact search alone.
    """
    ways, built = {"tpt_nb (exact)": lambda q: database.search(q, k)[1].numpy()}, {}
    vectors = np.ascontiguousarray(database.features, np.float32)
    try:
        for kind in ("flat", "ivf", "hnsw"):
            began = time.perf_counter()
            index = index_of(kind, vectors)
            built[kind] = time.perf_counter() - began
            ways[kind] = lambda q, index=index: index.search(q.numpy(), k)[1]
    except ImportError:
        print("faiss is not installed: the exact search alone (pip install faiss-cpu)")
    nearest, lines = database.search(queries, k)[1].tolist(), {}
    for kind, search in ways.items():
        began = time.perf_counter()
        rows = np.concatenate([search(q[None]) for q in queries]).tolist()
        each = (time.perf_counter() - began) / len(queries)
        hits = [len(set(a) & set(b)) / k for a, b in zip(rows, nearest, strict=True)]
        lines[kind] = {"recall (%)": 100 * float(np.mean(hits)), "ms per query": 1000 * each}
        lines[kind]["seconds to build"] = built.get(kind, 0.0)
    return pd.DataFrame(lines).T.rename_axis("index")
