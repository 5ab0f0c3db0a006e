"""The cache of features: shards on disk, checked, written whole.

A folder per key, ``<cache>/features/<key>/``. The key hashes everything that the features depend on
(images, model, augmenter, seed; see :func:`cache_key`) and nothing else: it does not know which
images are asked for, so a run on 50 images reuses what a run on 20 left behind, and the other way
round. ``manifest.json`` spells the key out. Each shard is a safetensors file that lists its image
ids and a checksum; a file with a shard's name is complete. There is no index to fall out of step:
killed at any moment, the next run finds the finished shards and encodes the rest. Two processes on
the same images share the work, shard by shard (:class:`Claims`).

Features stay on the disk: 50,000 images of 64 views and 1024 numbers are 13 GB. A :class:`Store`
knows in which shard the row of an image is, and :meth:`Features.batches` reads group after group.
"""

import errno
import functools
import hashlib
import json
import time
import warnings
import zlib
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from tpt_nb import views
from tpt_nb.core.files import write_whole
from tpt_nb.core.machine import check_memory

FORMAT = 1  # raise it when shards change: older caches are then not used
TENSORS = ("features", "targets", "seconds")  # of a shard
STALE_SECONDS = 3600


@dataclass
class Features:
    """Features of the decodable images of a data set, in the data set's order.

    ``targets`` [N] long, ``ids`` the N image ids; ``failed`` has a dict (id, path, error) per image
    that could not be decoded. ``seconds`` is what encoding these N images took, whenever it was
    done, so that seconds / N does not depend on the state of the cache; ``encoded`` counts the
    images encoded by this call. ``store`` finds the rows, ``rows`` are their numbers there.
    """

    store: "Store"
    rows: list[int]
    targets: Tensor
    ids: list[str]
    failed: list[dict]
    seconds: float
    encoded: int

    def __len__(self) -> int:
        return len(self.ids)

    @functools.cached_property
    def features(self) -> Tensor:
        """All of them at once: [N,V,D] float32 unit norm, view 0 the un-augmented image.

        Raises ``ValueError`` if that is more than there is memory for.
        """
        size = 4 * len(self) * self.store.shape[0] * self.store.shape[1]
        check_memory(size, f"the features of all {len(self):,} images at once")
        return self.at(range(len(self)))

    def at(self, positions: Sequence[int]) -> Tensor:
        """Features [B,V,D] of the images at these positions. ``OSError``: a shard is gone."""
        return self.store.read([self.rows[i] for i in positions])

    def batches(self, size: int) -> Iterator[tuple[list[str], Tensor, Tensor]]:
        """Yield (ids, features [B,V,D], targets [B]) for consecutive groups of `size` images.

        Read when they are asked for: no more than a group is in memory.
        """
        for i in range(0, len(self), size):
            part = range(i, min(i + size, len(self)))
            yield self.ids[i : part.stop], self.at(part), self.targets[i : part.stop]


def device_of(clip) -> torch.device:
    """Where the encoder computes; one that does not say computes on the CPU."""
    return torch.device(getattr(clip, "device", "cpu"))


def planned(clip, augmenter) -> bool:
    """Are the crops cut where the encoder is?"""
    return views.fits(device_of(clip)) and getattr(augmenter, "only_crops", False)


class Store:
    """Where the features of the images are, their targets and seconds, filled in any order.

    The row of an image is in memory until it is in a shard (:meth:`move`), or for good where
    nothing is cached.
    """

    def __init__(self, ids: list[str]):
        self.ids, self.position = ids, {image_id: i for i, image_id in enumerate(ids)}
        self.there = [False] * len(ids)
        self.shape = torch.Size()  # of a row: [V,D]
        self.places: list[Tensor | tuple[Path, int] | None] = [None] * len(ids)
        self.targets = torch.full((len(ids),), -1)
        self.seconds = torch.zeros(len(ids), dtype=torch.float64)

    def put(self, i: int, features: Tensor, target: int, seconds: float) -> None:
        """Features ``[V,D]``, class and seconds of image i."""
        self._note(i, features.clone(), features.shape, target, seconds)

    def found(self, i: int, place: tuple[Path, int], shape: torch.Size, target: int,
              seconds: float) -> None:  # fmt: skip
        """Image i is row ``place[1]`` of the shard ``place[0]``; see :func:`read_shards`."""
        self._note(i, place, shape, target, seconds)

    def _note(self, i: int, place, shape: torch.Size, target: int, seconds: float) -> None:
        self.shape = self.shape or shape
        if shape != self.shape:
            raise ValueError(f"{self.ids[i]}: features {list(shape)}, others {list(self.shape)}")
        self.places[i], self.targets[i], self.seconds[i] = place, target, seconds
        self.there[i] = True

    def move(self, chosen: Sequence[int], path: Path) -> None:
        """These images are now the rows of a shard, in this order: memory lets go of them."""
        for row, i in enumerate(chosen):
            self.places[i] = path, row

    def read(self, rows: Sequence[int]) -> Tensor:
        """Features ``[B,V,D]`` of these images; each shard among them is opened once."""
        out = torch.empty(len(rows), *self.shape)
        shards: dict[Path, list[tuple[int, int]]] = {}
        for k, i in enumerate(rows):
            place = self.places[i]
            if isinstance(place, Tensor):
                out[k] = place
            else:
                shards.setdefault(place[0], []).append((k, place[1]))
        for path, pairs in shards.items():
            to, of = (torch.tensor(part) for part in zip(*pairs, strict=True))
            try:
                with safetensors.safe_open(path, framework="pt") as file:
                    out[to] = file.get_tensor("features")[of]
            except FileNotFoundError as error:
                text = "features have gone from the cache; start again, and they are made anew"
                raise OSError(errno.ENOENT, text, str(path)) from error
        return out


def cache_key(dataset, clip, augmenter, seed: int) -> dict:
    """Everything that the features (and the cached targets) depend on, as a JSON-able dict."""
    key = {
        "format": FORMAT,
        "dataset": {"name": dataset.name, "fingerprint": dataset.fingerprint},
        "model": {"name": getattr(clip, "name", "")},
        "augmenter": augmenter.spec(),
        "seed": int(seed),
    }
    # of the image tower alone, where it is known: features do not depend on the text tower
    known = getattr(clip, "image_fingerprint", "")
    key["model"]["fingerprint"] = known or clip.fingerprint
    key["model"]["image_size"] = clip.image_size
    for statistic in ("mean", "std"):
        key["model"][statistic] = [float(x) for x in getattr(clip, statistic, ())]
    # half precision on CUDA, and double() for tests, give other numbers than float32
    key["model"]["device"] = device_of(clip).type
    if isinstance(getattr(clip, "model", None), torch.nn.Module):
        key["model"]["dtype"] = str(next(clip.model.parameters()).dtype)
    if planned(clip, augmenter):  # within a grey level of Pillow's, but other pixels
        key["crops"] = "tensor"
    if getattr(dataset, "targets", None) is None:
        key["dataset"]["classnames"] = list(dataset.classnames)
    return key


def manifest(key: dict) -> tuple[str, str]:
    """Name of the folder of a key, below the cache, and the text of its manifest."""
    text = json.dumps(key, sort_keys=True, indent=1)
    return f"features/{hashlib.sha256(text.encode()).hexdigest()[:20]}", text


def open_folder(cache: Path, key: dict) -> Path:
    name, text = manifest(key)
    folder = cache / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for stale in folder.glob(".tmp-*"):  # left by a kill; a young one may be another process's
            with suppress(OSError):
                if time.time() - stale.stat().st_mtime > STALE_SECONDS:
                    stale.unlink()
        path = folder / "manifest.json"
        if not path.exists() or path.read_text() != text:
            write_whole(path, text)
    except OSError as error:
        raise explain_full_disk(error, folder) from error
    return folder


def write_shard(folder: Path | None, store: Store, chosen: list[int]) -> None:
    if folder is None:
        return
    name, data = pack_shard(store, chosen)
    try:
        write_whole(folder / name, data)
    except OSError as error:
        raise explain_full_disk(error, folder) from error
    store.move(chosen, folder / name)


def pack_shard(store: Store, chosen: list[int]) -> tuple[str, bytes]:
    """File name and content of a shard with the images at these positions of the store."""
    tensors = {"features": store.read(chosen)}
    tensors |= {"targets": store.targets[chosen], "seconds": store.seconds[chosen]}
    ids = [store.ids[i] for i in chosen]
    about = {"ids": ids, "crc32": _crc32(ids, tensors)}
    # Serialised in memory and written by Python: a full disk is then an OSError with its errno.
    data = safetensors.torch.save(tensors, metadata={"shard": json.dumps(about)})
    # Named by its images: whoever encodes the same images writes the same features to this name.
    name = hashlib.sha256("\0".join(ids).encode()).hexdigest()[:16]
    return f"{name}.safetensors", data


def explain_full_disk(error: OSError, folder: Path | str) -> OSError:
    """An error of writing the cache, which says what to do where the disk is full."""
    text = f"cannot write the feature cache: {error.strerror}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        text = (
            f"the disk is full while caching features; the "
            f"{len(list(Path(folder).glob('*.safetensors')))} finished shards are kept. Make room "
            "or set TPT_NB_CACHE to a larger disk, then run again: it goes on from there"
        )
    return OSError(error.errno, text, str(folder))


def _crc32(ids: list[str], tensors: dict[str, Tensor]) -> int:
    crc = zlib.crc32("\0".join(ids).encode())
    for name in TENSORS:
        crc = zlib.crc32(tensors[name].contiguous().numpy(), crc)
    return crc


def read_shard(path: Path, wanted: Container[str]) -> tuple[list[str], dict]:
    """The image ids and the tensors of a shard; nothing if it has none of the ``wanted`` ids.

    Raises what safetensors raises, or ``ValueError``, for a damaged file.
    """
    with safetensors.safe_open(path, framework="pt") as file:
        about = json.loads(file.metadata()["shard"])
        if not any(image_id in wanted for image_id in about["ids"]):
            return [], {}
        tensors = {name: file.get_tensor(name) for name in TENSORS}
    if _crc32(about["ids"], tensors) != about["crc32"]:
        raise ValueError("the checksum does not match")
    return about["ids"], tensors


def read_shards(
    folder: Path | None, wanted: Mapping[str, int], known: set[str] | None = None
) -> Iterator[dict]:
    """What the shards hold of the wanted images (id -> i), as :meth:`Store.found` takes it.

    Each is read once, for its checksum, and nothing of its features is kept. A damaged shard is
    dropped, with a warning. Files in ``known`` are left out; it grows by those that are read.
    """
    known = set() if known is None else known
    for path in sorted(folder.glob("*.safetensors")) if folder else ():
        if path.name in known:
            continue
        known.add(path.name)
        try:
            ids, tensors = read_shard(path, wanted)
        except FileNotFoundError:  # another process dropped it
            continue
        except Exception as error:
            why = f"{type(error).__name__}: {error}"
            warnings.warn(
                f"damaged cache shard {path} ({why}); its images are encoded again", stacklevel=3
            )
            with suppress(OSError):
                path.unlink()
            continue
        for k, image_id in enumerate(ids):
            if image_id in wanted:
                about = {"place": (path, k), "shape": tensors["features"].shape[1:]}
                about |= {"target": int(tensors["targets"][k])}
                yield {"i": wanted[image_id], "seconds": float(tensors["seconds"][k]), **about}


class Claims:
    """Which images this process encodes, while others want the same ones.

    A claim is a lock on one byte of a file beside the shards. The operating system gives it back
    when the process ends, however it ends. Where there are no such locks everything is ours: work
    is then done twice, and harms nothing.
    """

    def __init__(self, folder: Path | None) -> None:
        self.file = None
        with suppress(ImportError, OSError):  # Windows; a folder that may only be read
            import fcntl

            self.lock = fcntl.lockf
            self.mode = {False: fcntl.LOCK_EX | fcntl.LOCK_NB, True: fcntl.LOCK_EX}
            self.file = open(folder / ".claims", "ab") if folder else None  # noqa: SIM115

    def take(self, ids: list[str], wait: bool = False) -> bool:
        """Claim these images, or say that they are another's; ``wait`` until they are not."""
        if self.file is None:
            return True
        place = int(hashlib.sha256("\0".join(ids).encode()).hexdigest()[:12], 16)
        try:
            self.lock(self.file, self.mode[wait], 1, place)
        except OSError as error:
            return error.errno not in (errno.EAGAIN, errno.EACCES)  # else: there are no locks here
        return True

    def close(self) -> None:
        """Give all of them back."""
        if self.file:
            self.file.close()
