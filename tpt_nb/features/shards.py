"""The cache of features: shards on disk, checked, written whole.

A folder per key, ``<cache>/features/<key>/``. The key hashes everything that the features depend on
(images, model, augmenter, seed; see :func:`cache_key`) and nothing else: it does not know which
images are asked for, so a run on 50 images reuses what a run on 20 left behind, and the other way
round. ``manifest.json`` spells the key out. Each shard is a safetensors file that lists its image
ids and a checksum; a file with a shard's name is complete. There is no index to fall out of step:
killed at any moment, the next run finds the finished shards and encodes the rest. Two processes on
the same images share the work, shard by shard (:class:`Claims`).
"""

import errno
import hashlib
import json
import time
import warnings
import zlib
from collections.abc import Container, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from tpt_nb import views
from tpt_nb.core.files import write_whole

FORMAT = 1  # raise it when shards change: older caches are then not used
TENSORS = ("features", "targets", "seconds")  # of a shard
STALE_SECONDS = 3600


@dataclass
class Features:
    """Features of the decodable images of a data set, in the data set's order.

    ``features`` [N,V,D] float32 unit norm (view 0 the un-augmented image), ``targets`` [N] long,
    ``ids`` the N image ids; ``failed`` has a dict (id, path, error) per image that could not be
    decoded. ``seconds`` is what encoding these N images took, whenever it was done, so that
    seconds / N does not depend on the state of the cache; ``encoded`` counts the images encoded by
    this call.
    """

    features: Tensor
    targets: Tensor
    ids: list[str]
    failed: list[dict]
    seconds: float
    encoded: int

    def __len__(self) -> int:
        return len(self.ids)

    def batches(self, size: int) -> Iterator[tuple[list[str], Tensor, Tensor]]:
        """Yield (ids, features [B,V,D], targets [B]) for consecutive groups of `size` images."""
        for i in range(0, len(self), size):
            part = slice(i, i + size)
            yield self.ids[part], self.features[part], self.targets[part]


def device_of(clip) -> torch.device:
    """Where the encoder computes; one that does not say computes on the CPU."""
    return torch.device(getattr(clip, "device", "cpu"))


def planned(clip, augmenter) -> bool:
    """Are the crops cut where the encoder is?"""
    return views.fits(device_of(clip)) and getattr(augmenter, "only_crops", False)


class Store:
    """Features, targets and seconds of the images, row i for image i, filled in any order."""

    def __init__(self, ids: list[str]):
        self.ids, self.position = ids, {image_id: i for i, image_id in enumerate(ids)}
        self.there = [False] * len(ids)
        self.features = torch.empty(0)
        self.targets = torch.full((len(ids),), -1)
        self.seconds = torch.zeros(len(ids), dtype=torch.float64)

    def put(self, i: int, features: Tensor, target: int, seconds: float) -> None:
        """Features ``[V,D]``, class and seconds of image i."""
        if not self.features.numel():
            self.features = torch.empty(len(self.ids), *features.shape)
        self.features[i], self.targets[i], self.seconds[i] = features, target, seconds
        self.there[i] = True


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


def pack_shard(store: Store, chosen: list[int]) -> tuple[str, bytes]:
    """File name and content of a shard with the images at these positions of the store."""
    tensors = {name: getattr(store, name)[chosen] for name in TENSORS}
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
    """What the shards hold of the wanted images (id -> i), as :meth:`Store.put` takes it.

    A damaged shard is dropped, with a warning. Files in ``known`` are left out; it grows by those
    that are read.
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
                row, target, seconds = (tensors[name][k] for name in TENSORS)
                about = {"target": int(target), "seconds": float(seconds)}
                yield {"i": wanted[image_id], "features": row, **about}


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
