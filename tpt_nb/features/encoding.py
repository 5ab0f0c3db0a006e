"""Stage 1: images -> views -> features, once, with a cache on disk (:mod:`tpt_nb.features.shards`).

Why the features do not depend on what was cached: in float32 the last bits of a feature depend on
the batch it was computed in. So every image is encoded as a batch of its own, its V views,
whatever the shard, the subset or the point of a resume. (On CUDA this also needs deterministic
kernels to hold to the last bit.)

On a GPU nothing waits for anything else: workers decode images and draw the crops, which are cut
where the encoder is (:mod:`tpt_nb.views.resample`); copies to the device and back go through pinned
memory; a few images are under way while the rows of the first come back; and a thread writes the
shards. On a CPU the workers cut the crops, which is faster there. The key of the cache says which.
"""

import os
import shutil
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tpt_nb import views
from tpt_nb.core.images import as_rgb, view_seed
from tpt_nb.core.messages import bar as progress_bar
from tpt_nb.core.messages import say_once
from tpt_nb.core.paths import cache_dir
from tpt_nb.features.shards import (
    Claims,
    Features,
    Store,
    cache_key,
    device_of,
    open_folder,
    planned,
    read_shards,
    write_shard,
)

AHEAD = 3  # images that a GPU works on while the rows of an earlier one come back


def encode(
    dataset,
    clip,
    augmenter,
    seed: int = 0,
    cache: Path | str | bool | None = None,
    workers: int | None = None,
    shard: int = 64,
    progress: bool = True,
) -> Features:
    """Features of all views of all images of a data set, from the cache where they are there.

    They stay there: :class:`Features` reads what it is asked for. Without a cache they are kept in
    memory. An image that cannot be decoded is recorded in ``failed``, and tried again next time.

    Args:
        dataset: map-style, of (PIL image, target), with ``name``, ``fingerprint`` (of all images),
            ``ids`` (unique) and, if there are files, ``paths``. If it has ``targets`` these count;
            otherwise targets are cached and ``classnames`` belongs to the key.
        clip: has ``encode_views(views [V,3,S,S]) -> [V,D]``, ``image_size`` and ``fingerprint``.
        augmenter: see :mod:`tpt_nb.views`.
        seed: of the views; image i gets ``view_seed(seed, ids[i])``.
        cache: folder; None for the usual one (``core.paths.cache_dir``), False for no cache.
        workers: processes that load images and make views; None picks. No effect on the result.
        shard: images per cache file; a kill costs no more than this many (on a GPU twice).
    Raises:
        ValueError: view size and model do not fit, ids not unique, no image could be decoded.
        OSError: the disk is full; the finished shards stay and the next call goes on from there.
    """
    ids = list(dataset.ids)
    _check(dataset, ids, clip, augmenter, shard)
    folder = None
    if cache is not False:
        folder = open_folder(Path(cache or cache_dir()), cache_key(dataset, clip, augmenter, seed))
    store, known = Store(ids), set()
    for record in read_shards(folder, store.position, known):
        store.found(**record)
    done = sum(store.there)
    name = f"encode {dataset.name}"
    with progress_bar(len(ids), done, name, progress and done < len(ids), "image") as bar:
        failed, encoded = _encode_missing(
            store, folder, known, dataset, clip, augmenter, seed, workers, bar, shard
        )
    good = [i for i, there in enumerate(store.there) if there]
    if failed:
        first = f"{failed[0]['path']}: {failed[0]['error']}"
        if not good:
            raise ValueError(f"none of the {len(ids)} images could be decoded; the first: {first}")
        warnings.warn(f"{len(failed)} of {len(ids)} images failed, first {first}", stacklevel=2)
    targets = getattr(dataset, "targets", None)
    targets = store.targets if targets is None else torch.as_tensor(targets)
    return Features(
        store=store,
        rows=good,
        targets=targets[good].long(),
        ids=[ids[i] for i in good],
        failed=failed,
        seconds=float(store.seconds.sum()),
        encoded=encoded,
    )


def _encode_missing(
    store: Store, folder: Path | None, known: set[str], dataset, clip, augmenter, seed: int,
    workers: int | None, bar, shard: int,
) -> tuple[list[dict], int]:  # fmt: skip
    """Fill the store, together with other processes that want the same; see :func:`_fill`."""
    if workers is None:
        workers = _auto_workers(store.there.count(False), clip, augmenter)
    failed, encoded, later = [], 0, []
    for others in (False, True):  # then what others had claimed, if it is still missing
        claims = Claims(None if all(store.there) else folder)
        todo = _todo(store, folder, known, claims, shard, bar, later, others)
        try:
            if (first := next(todo, None)) is not None:
                some, count = _fill(
                    store, dataset, clip, augmenter, seed, chain([first], todo), workers,
                    bar, shard, lambda chosen: write_shard(folder, store, chosen),
                )  # fmt: skip
                failed, encoded = failed + some, encoded + count
        finally:
            claims.close()
    return failed, encoded


def _todo(
    store: Store, folder: Path | None, known: set[str], claims: Claims, shard: int, bar,
    later: list[range], others: bool,
) -> Iterator[int]:  # fmt: skip
    """The missing images of a data set, in its order, that are this process's to encode.

    Two processes that want the same features share them, ``shard`` images at a time. Those that
    another one has claimed are put into ``later``; with ``others`` these are waited for, and what
    is then still missing is encoded here.
    """
    n = len(store.ids)
    chunks = later if others else [range(i, min(n, i + shard)) for i in range(0, n, shard)]
    for chunk in chunks:
        if all(store.there[i] for i in chunk):
            continue
        ids = store.ids[chunk.start : chunk.stop]
        if not claims.take(ids):
            if not others:
                later.append(chunk)
                continue
            say_once("another process is encoding the same images: waiting for it")
            claims.take(ids, wait=True)
        for record in read_shards(folder, store.position, known):  # another's, meanwhile
            bar.update(not store.there[record["i"]])
            store.found(**record)
        yield from (i for i in chunk if not store.there[i])


def _fill(
    store: Store, dataset, clip, augmenter, seed: int, todo: Iterable[int], workers: int,
    bar, shard: int, write: Callable[[list[int]], None],
) -> tuple[list[dict], int]:  # fmt: skip
    """Encode images of a data set into the store, image by image, in this order.

    ``write`` gets the positions of every ``shard`` encoded images, and of the rest at the end or
    when it is interrupted. Returns a dict (id, path, error) per image that cannot be decoded, and
    how many were encoded.
    """
    failed, buffer, count = [], [], 0
    start = time.perf_counter()
    loaded = _load(dataset, augmenter, seed, todo, clip, workers)
    writer = _Writer(write) if device_of(clip).type == "cuda" else None
    write = writer.put if writer else write
    try:
        for i, row, target, error in _encode_ahead(loaded, clip):
            if error is None:
                now = time.perf_counter()
                store.put(i, row, target, now - start)
                start = now
                count += 1
                buffer.append(i)
            else:
                paths = getattr(dataset, "paths", None)
                path = str(paths[i]) if paths is not None else store.ids[i]
                failed.append({"id": store.ids[i], "path": path, "error": error})
                bar.set_postfix(failed=len(failed))
            if len(buffer) == shard:
                full, buffer = buffer, []
                write(full)
            bar.update()
    finally:  # also when a notebook cell is stopped: what is encoded is kept
        if buffer:
            write(buffer)
        if writer:
            writer.close()
    return failed, count


class _Writer:
    """Calls ``write`` in a thread, one call at a time; an error surfaces in the next call."""

    def __init__(self, write: Callable[[list[int]], None]) -> None:
        self.write, self.pool, self.last = write, ThreadPoolExecutor(max_workers=1), None

    def put(self, chosen: list[int]) -> None:
        if self.last:
            self.last.result()
        self.last = self.pool.submit(self.write, chosen)

    def close(self) -> None:
        self.pool.shutdown()
        if self.last:
            self.last.result()


@torch.no_grad()
def _encode_ahead(loaded: Iterator, clip, ahead: int | None = None) -> Iterator[tuple]:
    """Encode what :func:`_load` gives: (index, row [V,D] float32 on the CPU, target, error).

    A GPU gets the next ``ahead`` images before the row of the first is waited for.
    """
    device = device_of(clip)
    ahead = AHEAD * (device.type == "cuda") if ahead is None else ahead
    under_way: deque = deque()
    for i, made, target, error in loaded:
        if isinstance(made, views.Plan):
            made = views.render(made, clip.image_size, device)
        under_way.append((i, None if error else _start(clip, made), target, error))
        while len(under_way) > ahead:
            yield _arrived(clip, *under_way.popleft())
    while under_way:
        yield _arrived(clip, *under_way.popleft())


def _start(clip, made: Tensor) -> tuple:
    """The row on its way to the CPU, an event that says that it is there, and its views."""
    if device_of(clip).type != "cuda":
        return clip.encode_views(made).to("cpu", torch.float32), None, made
    row = clip.encode_views(made, checked=False).float()
    here = torch.empty(row.shape, pin_memory=True)
    here.copy_(row, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return here, event, made


def _arrived(clip, i: int, under_way: tuple | None, target: int, error: str | None) -> tuple:
    """Wait for a row; one that overflowed in half precision is encoded again, in another."""
    if under_way is None:
        return i, None, target, error
    row, event, made = under_way
    if event is not None:
        event.synchronize()
        if not row.isfinite().all():
            row = clip.encode_views(made).to("cpu", torch.float32)
    return i, row, target, None


def _check(dataset, ids: list[str], clip, augmenter, shard: int) -> None:
    if not ids or len(ids) != len(dataset):
        raise ValueError(
            f"the data set has {len(dataset)} images and {len(ids)} ids; need one id each"
        )
    if len(set(ids)) != len(ids):
        twice = next(i for k, i in enumerate(ids) if i in set(ids[:k]))
        raise ValueError(f"image ids must be unique; {twice!r} appears more than once")
    if augmenter.size != clip.image_size:
        raise ValueError(
            f"the augmenter makes views of {augmenter.size} px but the model takes "
            f"{clip.image_size} px; pass size={clip.image_size} to the augmenter"
        )
    if shard < 1:
        raise ValueError(f"shard is {shard}; it must be 1 image or more")


class _Views(Dataset):
    """(index, views or their plan, target, error) per image; picklable, for any kind of worker."""

    def __init__(self, dataset, augmenter, seed: int, plan: bool = False):
        self.dataset, self.seed, self.ids = dataset, seed, dataset.ids
        self.make = augmenter.plan if plan else augmenter

    def __getitem__(self, i: int) -> tuple[int, Tensor | views.Plan | None, int, str | None]:
        try:
            image, target = self.dataset[i]
            image = as_rgb(image)  # PIL decodes here, not when it opens the file
        except Exception as error:
            return i, None, -1, f"{type(error).__name__}: {error}"
        # An error of the augmenter is a bug, not a damaged image: it surfaces.
        return i, self.make(image, view_seed(self.seed, self.ids[i])), int(target), None

    def __len__(self) -> int:
        return len(self.dataset)


def _load(dataset, augmenter, seed: int, indices: Iterable[int], clip, workers: int) -> Iterator:
    return iter(
        DataLoader(
            _Views(dataset, augmenter, seed, planned(clip, augmenter)),
            sampler=indices,
            batch_size=None,
            num_workers=workers,
            pin_memory=device_of(clip).type == "cuda",
            # a generator of its own: DataLoader would draw from (and so change) the global one
            generator=torch.Generator(),
        )
    )


def _auto_workers(n: int, clip, augmenter) -> int:
    """On two cores the encoder itself keeps both busy; a GPU waits for the views."""
    if n < 32:  # not worth starting processes
        return 0
    cores = os.cpu_count() or 1
    with suppress(AttributeError):  # not on every system
        cores = len(os.sched_getaffinity(0))
    workers = min(8, cores - 1) if device_of(clip).type == "cuda" else int(cores > 2)
    with suppress(OSError):
        # Views travel through shared memory, which a container may have little of; a worker that
        # runs out of it dies of a bus error. Three sets of float views per worker are under way at
        # most.
        room = shutil.disk_usage("/dev/shm").free
        workers = min(workers, room // (3 * 4 * augmenter.n_views * 3 * clip.image_size**2))
    return max(0, workers)
