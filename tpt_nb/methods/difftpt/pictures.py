"""Generated pictures on disk: made once, read from there; those that ship are read too.

One PNG per image, in a folder per (data set, generator, seed). A killed generation goes on.
"""

import hashlib
import io
import json
import re
import time
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, PngImagePlugin
from torch import Tensor

from tpt_nb.core.files import write_json, write_whole
from tpt_nb.core.machine import device_name, versions
from tpt_nb.core.messages import bar
from tpt_nb.core.paths import DATA, cache_dir

SHIPPED = DATA / "diffusion" / "pictures"
FORMAT = 1  # of the cache
COLUMNS = 8  # pictures in a row of a PNG


def picture_seed(seed: int, image_id: str, k: int) -> int:
    """Seed of variation k of an image; it does not depend on how many there are."""
    digest = hashlib.blake2b(f"{int(seed)}\0{image_id}\0{k}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def variations(
    image: Image.Image, n: int, generator, seed: int = 0, image_id: str = "", first: int = 0
) -> Tensor:
    """Variations ``first`` to ``n - 1`` of one image, made now: uint8 ``[n-first,3,S,S]``."""
    return generator.make(image, [picture_seed(seed, image_id, k) for k in range(first, n)])


@dataclass
class Pictures:
    """Variations of images of one data set by one generator from one seed, on disk.

    ``folder`` is where they are written and looked for first; ``archive`` is a zip file of such a
    folder. The name of both has a hash of ``key``, which is also what ``manifest.json`` holds.
    """

    key: dict
    folder: Path
    archive: Path

    def load(self, image_id: str) -> tuple[Tensor, float]:
        """All variations of an image, uint8 ``[n,3,S,S]``, and the seconds that they took.

        Damaged ones count as none, ``[0]``: they are made again.
        """
        name, data = file_name(image_id), b""
        try:
            if (self.folder / name).is_file():
                data = (self.folder / name).read_bytes()
            elif self.archive.is_file():
                with zipfile.ZipFile(self.archive) as archive:
                    data = archive.read(name) if name in archive.NameToInfo else b""
            return unpack(data)
        except (OSError, ValueError, zipfile.BadZipFile):
            return torch.empty(0), 0.0

    def read(self, image_id: str, n: int) -> Tensor | None:
        """The first ``n`` variations, uint8 ``[n,3,S,S]``; None if there are not as many."""
        pictures, _ = self.load(image_id)
        return pictures[:n] if len(pictures) >= n else None

    def seconds(self, image_id: str, n: int) -> float:
        """What making the first ``n`` variations of an image took, when it was done."""
        pictures, seconds = self.load(image_id)
        return seconds * n / len(pictures)

    def missing(self, ids: Sequence[str], n: int) -> list[str]:
        """The ids of images that have fewer than ``n`` variations."""
        return [image_id for image_id in ids if self.read(image_id, n) is None]

    def check(self, ids: Sequence[str], n: int, command: str = "python -m tpt_nb generate") -> None:
        """Raise ``ValueError`` with the command that makes them unless all variations are there."""
        missing = self.missing(ids, n)
        if missing:
            raise ValueError(
                f"{len(missing)} of {len(ids)} images of {self.key['dataset']['name']} have no {n} "
                f"variations by {self.key['generator']['generator']} (seed {self.key['seed']}) in "
                f"{self.folder}{self._other()}. Make them with: {command}"
            )

    def _other(self) -> str:
        """A folder of the same data set made otherwise, and in what it differs."""
        import pandas as pd

        mine = pd.json_normalize(self.key).loc[0]
        for path in sorted(self.folder.parent.glob(f"{mine['dataset.name']}-*/manifest.json")):
            try:
                theirs = pd.json_normalize(json.loads(path.read_text())["key"]).loc[0]
            except (ValueError, KeyError, OSError):
                continue
            differ = [k for k in mine.index.union(theirs.index) if mine.get(k) != theirs.get(k)]
            if differ:
                return f". What is in {path.parent.name} differs in {', '.join(differ)}"
        return ""


def file_name(image_id: str) -> str:
    """Name of an image's file: readable, and as unique as the id."""
    digest = hashlib.sha256(image_id.encode()).hexdigest()[:12]
    return f"{re.sub(r'[^A-Za-z0-9.-]+', '-', image_id)[-60:]}.{digest}.png"


def pictures_of(dataset, generator, seed: int = 0, cache: Path | str | None = None) -> Pictures:
    """Where the variations of a data set are, or will be; nothing is read or made."""
    key = {
        "format": FORMAT,
        "dataset": {"name": dataset.name, "fingerprint": dataset.fingerprint},
        "generator": generator.spec(),
        "seed": int(seed),
    }
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:12]
    name = f"{dataset.name}-{digest}"
    return Pictures(key, Path(cache or cache_dir()) / "generated" / name, SHIPPED / f"{name}.zip")


def generate(
    dataset, generator, n: int, seed: int = 0, cache: Path | str | None = None, part: str = ""
) -> Pictures:
    """Make ``n`` variations of every image of a data set, those that are not there yet.

    ``part`` "3/8" makes the third of eight parts only: as many processes, GPUs or machines with one
    cache between them make all.

    A picture depends on (image, generator, seed, its number) alone. Each image's file is written
    whole or not at all, so a killed call is simply repeated.

    Raises:
        ValueError: ``n`` < 1, no such part, or what the generator raises.
    """
    if n < 1:
        raise ValueError(f"n is {n}; at least one variation per image.")
    pictures = pictures_of(dataset, generator, seed, cache)
    mine = part_of(dataset.ids, part)
    missing = set(pictures.missing(mine, n))
    if not missing:
        return pictures
    pictures.folder.mkdir(parents=True, exist_ok=True)
    made = {p: metadata.version(p) for p in ("diffusers", "transformers") if util.find_spec(p)}
    made = versions() | made | {"device": device_name(str(generator.device))}
    write_json(pictures.folder / "manifest.json", {"key": pictures.key, "made_with": made})
    text, total = f"generate {pictures.key['generator']['generator']} {part}".strip(), len(mine)
    with bar(total, total - len(missing), text, unit="image") as shown:
        for i, image_id in enumerate(dataset.ids):
            if image_id in missing:
                old, seconds = pictures.load(image_id)
                image, start = dataset[i][0], time.perf_counter()
                fresh = variations(image, n, generator, seed, image_id, first=len(old))
                seconds += time.perf_counter() - start
                whole = torch.cat([old, fresh]) if len(old) else fresh
                write_whole(pictures.folder / file_name(image_id), pack(whole, seconds))
                shown.update()
    return pictures


def part_of(ids: Sequence[str], part: str) -> list[str]:
    """The ids of a part, "3/8" being the third of eight: 3, 11, 19 ... of them; "" is all.

    ``ValueError`` for anything else, and for parts that there are not.
    """
    if not part:
        return list(ids)
    match = re.fullmatch(r"(\d+)/(\d+)", part)
    k, of = (int(match[1]), int(match[2])) if match else (0, 0)
    if not 1 <= k <= of:
        raise ValueError(f"part is {part!r}; 3/8 is the third of eight, 1/1 is all.")
    return list(ids)[k - 1 :: of]


def pack(pictures: Tensor, seconds: float) -> bytes:
    """uint8 ``[n,3,S,S]`` as one PNG, eight in a row, with their number and what they took."""
    n = len(pictures)
    filled = F.pad(pictures, (0, 0, 0, 0, 0, 0, 0, -n % COLUMNS)).unflatten(0, (-1, COLUMNS))
    sheet = filled.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)  # [rows*S,8*S,3]
    text = PngImagePlugin.PngInfo()
    text.add_text("pictures", str(n))
    text.add_text("seconds", f"{seconds:.4f}")
    out = io.BytesIO()
    Image.fromarray(sheet.numpy()).save(out, "PNG", pnginfo=text, optimize=True)
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
