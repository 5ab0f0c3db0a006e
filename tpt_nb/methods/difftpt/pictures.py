"""Views from a diffusion model, and DiffTPT, which filters them and tunes the prompt on them.

Feng et al., "Diverse Data Augmentation with Diffusions for Effective Test-time Prompt Tuning",
2023.

Three parts, in the order in which a run needs them:

- *Generators* make variations of an image, each from its own seed. ``mini`` is embedded: a small
  diffusion model of IconShift, conditioned on MiniCLIP's embedding of the image
  (``data/diffusion``). Any other name is a ``diffusers`` pipeline, on the hub or in a folder; the
  paper's is ``lambdalabs/sd-image-variations-diffusers@v2.0``. A name may carry options:
  ``mini:steps=4,guidance=1``.
- *The cache.* Variations cost far more than all the rest, so they are made once (:func:`generate`,
  ``python -m tpt_nb generate``), one PNG per image in a folder per (data set, generator, seed), and
  read from there; a killed generation goes on. What ships with the repository is read too.
- *The methods* filter the views by their similarity to the image, then by their entropy, and tune
  the prompt on what is left. Paper and published code differ in the first filter:

==================  ============================  ================================
..                  ``difftpt_paper``             ``difftpt_code``
==================  ============================  ================================
cosine of           image features                logit vectors
is asked of         generated views only          all views but the image itself
keeps               0.8 of them                   0.8 of them
then, by entropy    0.3 of what is left           0.3 of what is left
==================  ============================  ================================

With ``generator="crops"`` the generated views are as many further crops: the control that the paper
lacks. Only making new pictures needs ``diffusers``.
"""

import hashlib
import io
import json
import os
import re
import time
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image, PngImagePlugin
from torch import Tensor

from tpt_nb.core.paths import DATA, cache_dir
from tpt_nb.methods.difftpt.pipeline import load_generator

SHIPPED = DATA / "diffusion" / "pictures"


FORMAT = 1  # of the cache


COLUMNS = 8  # pictures in a row of a cached PNG


def picture_seed(seed: int, image_id: str, k: int) -> int:
    """Seed of variation k of an image; it does not depend on how many there are."""
    digest = hashlib.blake2b(f"{int(seed)}\0{image_id}\0{k}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def variations(
    image: Image.Image, n: int, generator="mini", seed: int = 0, image_id: str = ""
) -> Tensor:
    """``n`` variations of one image, online: uint8 ``[n,3,S,S]``."""
    if isinstance(generator, str):
        generator = load_generator(generator)
    return generator.make(image, [picture_seed(seed, image_id, k) for k in range(n)])


@dataclass
class Pictures:
    """Variations of images of one data set by one generator from one seed, on disk.

    ``folder`` is where they are written and looked for first; ``archive`` is a zip file of such a
    folder. The name of both has a hash of ``key``, which is also what ``manifest.json`` holds.
    """

    key: dict
    folder: Path
    archive: Path
    command: str = field(default="", repr=False)

    def read(self, image_id: str, n: int) -> Tensor | None:
        """The first ``n`` variations, uint8 ``[n,3,S,S]``; None if there are not as many."""
        data = self._data(image_id)
        if data is None:
            return None
        pictures, _ = unpack(data)
        return pictures[:n] if len(pictures) >= n else None

    def seconds(self, image_id: str, n: int) -> float:
        """What making the first ``n`` variations of an image took, when it was done."""
        pictures, seconds = unpack(self._data(image_id))
        return seconds * n / len(pictures)

    def missing(self, ids: Sequence[str], n: int) -> list[str]:
        """The ids of images that have fewer than ``n`` variations, or damaged ones."""

        def there(image_id: str) -> bool:
            try:
                return self.read(image_id, n) is not None
            except (OSError, ValueError):
                return False

        return [image_id for image_id in ids if not there(image_id)]

    def check(self, ids: Sequence[str], n: int) -> None:
        """Raise ``ValueError`` with the command that makes them unless all variations are there."""
        missing = self.missing(ids, n)
        if not missing:
            return
        about = f"{len(missing)} of {len(ids)} images of {self.key['dataset']['name']} have no " + (
            f"{n} variations by {self.key['generator']['generator']} (seed {self.key['seed']}) in "
            f"{self.folder}"
        )
        other = self._other()
        other = f". What is in {other[0].name} differs in {', '.join(other[1])}" if other else ""
        raise ValueError(f"{about}{other}. Make them with: {self.command}")

    def _data(self, image_id: str) -> bytes | None:
        name = file_name(image_id)
        if (self.folder / name).is_file():
            return (self.folder / name).read_bytes()
        if self.archive.is_file():
            with zipfile.ZipFile(self.archive) as archive:
                if name in archive.NameToInfo:
                    return archive.read(name)
        return None

    def _other(self) -> tuple[Path, list[str]] | None:
        """A cache of the same data set made otherwise, and in what it differs."""
        for path in sorted(self.folder.parent.glob("*/manifest.json")):
            try:
                theirs, mine = (_flat(k) for k in (json.loads(path.read_text())["key"], self.key))
            except (ValueError, KeyError, OSError):
                continue
            if theirs.get("dataset.name") != mine["dataset.name"]:
                continue
            differ = [k for k in {**theirs, **mine} if theirs.get(k) != mine.get(k)]
            if differ:
                return path.parent, differ
        return None


def _flat(values: Mapping, front: str = "") -> dict:
    out = {}
    for key, value in values.items():
        out |= (
            _flat(value, f"{front}{key}.") if isinstance(value, Mapping) else {front + key: value}
        )
    return out


def file_name(image_id: str) -> str:
    """Name of an image's file: readable, and as unique as the id."""
    digest = hashlib.sha256(image_id.encode()).hexdigest()[:12]
    return f"{re.sub(r'[^A-Za-z0-9.-]+', '-', image_id)[-60:]}.{digest}.png"


def pictures_of(
    dataset, generator, seed: int = 0, cache: Path | str | None = None, command: str = ""
) -> Pictures:
    """Where the variations of a data set are, or will be; nothing is read or made."""
    key = {
        "format": FORMAT,
        "dataset": {"name": dataset.name, "fingerprint": dataset.fingerprint},
        "generator": generator.spec(),
        "seed": int(seed),
    }
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]
    name = f"{dataset.name}-{digest}"
    root = Path(cache or cache_dir()) / "generated"
    return Pictures(key, root / name, SHIPPED / f"{name}.zip", command)


def generate(
    dataset,
    generator,
    n: int,
    seed: int = 0,
    cache: Path | str | None = None,
    progress: bool = True,
) -> Pictures:
    """Make ``n`` variations of every image of a data set, those that are not there yet.

    A picture depends on (image, generator, seed, its number) alone. Each image's file is written
    whole or not at all, so a killed call is simply repeated. Where there are fewer than ``n``, only
    the further ones are made.

    Raises:
        ValueError: ``n`` < 1, or what the generator raises.
    """
    from tpt_nb.core.files import write_whole

    if n < 1:
        raise ValueError(f"n is {n}; at least one variation per image.")
    pictures = pictures_of(dataset, generator, seed, cache)
    missing = set(pictures.missing(list(dataset.ids), n))
    if not missing:
        return pictures
    pictures.folder.mkdir(parents=True, exist_ok=True)
    about = {"key": pictures.key, "made_with": _made_with(generator)}
    text = json.dumps(about, indent=1) + "\n"
    write_whole(pictures.folder / "manifest.json", text.encode())
    with _bar(len(dataset.ids), len(missing), generator.spec()["generator"], progress) as bar:
        for i, image_id in enumerate(dataset.ids):
            if image_id not in missing:
                continue
            old, seconds = torch.empty(0), 0.0
            try:
                data = pictures._data(image_id)
                if data is not None:
                    old, seconds = unpack(data)
            except (OSError, ValueError):
                pass  # damaged: made again
            image = dataset[i][0]
            start = time.perf_counter()
            fresh = generator.make(
                image, [picture_seed(seed, image_id, k) for k in range(len(old), n)]
            )
            seconds += time.perf_counter() - start
            whole = torch.cat([old, fresh]) if len(old) else fresh
            write_whole(pictures.folder / file_name(image_id), pack(whole, seconds))
            bar.update()
    return pictures


def pack(pictures: Tensor, seconds: float) -> bytes:
    """uint8 ``[n,3,S,S]`` as one PNG, eight in a row, with their number and what they took."""
    n, side = len(pictures), pictures.shape[-1]
    sheet = np.zeros((-(-n // COLUMNS) * side, COLUMNS * side, 3), np.uint8)
    for k, picture in enumerate(pictures.permute(0, 2, 3, 1).numpy()):
        y, x = k // COLUMNS * side, k % COLUMNS * side
        sheet[y : y + side, x : x + side] = picture
    text = PngImagePlugin.PngInfo()
    text.add_text("pictures", str(n))
    text.add_text("seconds", f"{seconds:.4f}")
    out = io.BytesIO()
    Image.fromarray(sheet).save(out, "PNG", pnginfo=text, optimize=True)
    return out.getvalue()


def unpack(data: bytes) -> tuple[Tensor, float]:
    """The reverse of :func:`pack`. Raises ``OSError`` or ``ValueError`` for damaged data."""
    with Image.open(io.BytesIO(data)) as sheet:
        try:
            n, seconds = int(sheet.text["pictures"]), float(sheet.text["seconds"])
        except KeyError:
            raise ValueError("a PNG without the number of its pictures") from None
        pixels = torch.from_numpy(np.array(sheet.convert("RGB"))).permute(2, 0, 1)
    side = pixels.shape[-1] // COLUMNS
    cells = pixels.unfold(1, side, side).unfold(2, side, side)  # [3,rows,8,S,S]
    return cells.flatten(1, 2).transpose(0, 1)[:n].contiguous(), seconds


def ship(pictures: Pictures, ids: Sequence[str]) -> Path:
    """Put the variations of these images into the archive that the repository ships."""
    pictures.archive.parent.mkdir(parents=True, exist_ok=True)
    temporary = pictures.archive.with_suffix(".tmp")
    with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
        names = ["manifest.json", *(file_name(image_id) for image_id in ids)]
        for name in names:  # a fixed date: the same pictures make the same file
            entry = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
            archive.writestr(entry, (pictures.folder / name).read_bytes())
    temporary.replace(pictures.archive)
    return pictures.archive


def _made_with(generator) -> dict:
    from tpt_nb.core.machine import device_name, versions

    out = versions()
    for name in ("diffusers", "transformers"):
        try:
            from importlib import metadata

            out[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return out | {"device": device_name(str(generator.device))}


def _bar(total: int, missing: int, name: str, progress: bool):
    from tqdm.auto import tqdm

    off = {} if progress and not os.environ.get("TQDM_DISABLE") else {"disable": True}
    return tqdm(total=total, initial=total - missing, desc=f"generate {name}", unit="image", **off)
