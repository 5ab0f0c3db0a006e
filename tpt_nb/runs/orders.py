"""Orders in which a stream meets the images of a data set: from their classes, or their domains.

Every function gives ``[O,B]``: O orders, each a permutation of the B images. Order o depends on the
seed and on o alone, so that ten orders are the first ten of a hundred.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

BATCH = 64  # images of a batch with few classes, at most


def shuffled(targets: Tensor, orders: int, seed: int = 0) -> Tensor:
    """Independent and identically distributed: what most papers report."""
    return _each(orders, seed, lambda rng: rng.permutation(len(targets)))


def class_by_class(targets: Tensor, orders: int, seed: int = 0) -> Tensor:
    """All images of a class, then all of the next; classes and images in random order."""
    classes = targets.numpy()

    def draw(rng: np.random.Generator) -> np.ndarray:
        images = rng.permutation(len(classes))
        rank = rng.permutation(classes.max() + 1)
        return images[np.argsort(rank[classes[images]], kind="stable")]

    return _each(orders, seed, draw)


def dirichlet(targets: Tensor, orders: int, seed: int = 0, gamma: float = 0.1) -> Tensor:
    """Classes come and go: the less ``gamma``, the more is a class there only for a while.

    As Gong et al., "NOTE: Robust Continual Test-time Adaptation Against Temporal Correlation",
    2022, and Yuan et al. (RoTTA, 2023): there are as many time slots as classes; the shares of a
    class that the slots get are drawn from a Dirichlet distribution whose parameters are all
    ``gamma``, and the images within a slot are shuffled. Towards infinity the stream is shuffled;
    towards 0 a class is in one slot, with those that have drawn the same one.
    """
    classes = targets.numpy()
    there = np.unique(classes)

    def draw(rng: np.random.Generator) -> np.ndarray:
        images = rng.permutation(len(classes))
        slot = np.empty(len(classes), int)  # of each entry of ``images``
        for c in there:
            mine = np.flatnonzero(classes[images] == c)
            ends = np.cumsum(rng.dirichlet(np.full(len(there), gamma))) * len(mine)
            # image i of a class belongs where its middle lies on the line of the shares
            slot[mine] = np.searchsorted(ends[:-1], np.arange(len(mine)) + 0.5)
        return images[np.lexsort((rng.random(len(images)), slot))]

    return _each(orders, seed, draw)


def one_after_another(sizes: Sequence[int], orders: int, seed: int = 0) -> Tensor:
    """Domains that lie one behind the other, in this sequence; shuffled within each."""
    firsts = np.cumsum([0, *sizes])

    def draw(rng: np.random.Generator) -> np.ndarray:
        parts = zip(firsts, sizes, strict=False)
        return np.concatenate([first + rng.permutation(n) for first, n in parts])

    return _each(orders, seed, draw)


def few_classes(
    targets: Tensor, orders: int, seed: int = 0, low: int = 1, high: int = 4, size: int = BATCH
) -> list[list[Tensor]]:
    """For each order its batches ``[n]``: images of ``low`` to ``high`` classes, ``size`` at most.

    As Zanella et al. (StatA, 2025) test transductive methods. How many classes a batch has is drawn
    for each, and which from those that have images left, so that every image comes once; the last
    batches can have fewer. Where classes are small, so are the batches.
    """
    classes = targets.numpy()
    out = []
    for o in range(orders):
        rng = np.random.default_rng([seed, o])
        left = {int(c): list(rng.permutation(np.flatnonzero(classes == c)))
                for c in np.unique(classes)}  # fmt: skip
        batches = []
        while left:
            count = min(int(rng.integers(low, high + 1)), len(left))
            chosen = [int(c) for c in rng.choice(list(left), count, replace=False)]
            pool = [(i, c) for c in chosen for i in left[c]]
            # one of each class first, so that the batch has all of them
            first = [left[c][0] for c in chosen][:size]
            rest = [i for i, _ in pool if i not in set(first)]
            batch = first + list(rng.permutation(rest))[: size - len(first)]
            taken = {int(i) for i in batch}
            for c in chosen:
                left[c] = [i for i in left[c] if int(i) not in taken]
                if not left[c]:
                    del left[c]
            batches.append(torch.tensor(sorted(taken)))
        out.append(batches)
    return out


def _each(orders: int, seed: int, draw: Callable[[np.random.Generator], np.ndarray]) -> Tensor:
    rows = [draw(np.random.default_rng([seed, o])) for o in range(orders)]
    return torch.from_numpy(np.stack(rows))
