"""Pictures that lie in a folder, as DiffTPT's published script leaves them, or made by any program.

``image_generator_R.py`` writes variation i of an image ``<class>/<name>.<ext>`` as
``<class>/<name>_<i>.<ext>`` below its output folder. Nothing says by which model or seed they were
made: they count by their names and sizes.
"""

import functools
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from tpt_nb.core.images import read_rgb
from tpt_nb.datasets import image_files
from tpt_nb.methods.difftpt.network import whole_view

PIPELINE = "model_index.json"  # which a folder of diffusers has


def is_folder_of_pictures(name: str) -> bool:
    """Is it a folder that holds no diffusers pipeline but, somewhere below, images?"""
    root = Path(name)
    return root.is_dir() and not (root / PIPELINE).is_file() and bool(image_files(root))


@dataclass
class PictureFolder:
    """A generator that makes nothing: what it has lies in a folder. Also its own ``Pictures``.

    ``side``: pictures are read as CLIP sees them, shorter side to 224, centre crop.
    """

    root: str
    side: int = 224
    device: str = "cpu"

    @functools.cached_property
    def files(self) -> dict[str, list[Path]]:
        """``<class>/<name>`` of an image -> its variations, by their number."""
        found: dict[str, list[tuple[int, Path]]] = {}
        for path in image_files(Path(self.root)):
            if match := re.fullmatch(r"(.+)_(\d+)", path.stem):
                folder = path.parent.relative_to(self.root).as_posix()
                found.setdefault(f"{folder}/{match[1]}", []).append((int(match[2]), path))
        return {name: [path for _, path in sorted(some)] for name, some in found.items()}

    @property
    def usual(self) -> int:
        """As many as every image has that has any."""
        return min(map(len, self.files.values()), default=0) or 1

    def spec(self) -> dict:
        """What the pictures are: their names and sizes."""
        lines = sorted(
            f"{path.relative_to(self.root).as_posix()} {path.stat().st_size}"
            for some in self.files.values()
            for path in some
        )
        digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]
        return {"generator": f"folder {digest}", "side": self.side}

    def make(self, image: Image.Image, seeds: Sequence[int]) -> Tensor:
        """Nothing is made; ``ValueError`` says so."""
        raise ValueError(
            f"{self.root} is a folder of pictures: a run reads them, there is nothing to make."
        )

    # --- as pictures.Pictures -----------------------------------------------------------------

    @property
    def key(self) -> dict:
        return {"generator": self.spec()}

    def _of(self, image_id: str) -> list[Path]:
        return self.files.get(image_id.rpartition(".")[0] or image_id, [])

    def read(self, image_id: str, n: int) -> Tensor | None:
        """The first ``n`` variations, uint8 ``[n,3,side,side]``; None if there are not as many."""
        paths = self._of(image_id)
        if len(paths) < n:
            return None
        return torch.cat([whole_view(read_rgb(path), self.side) for path in paths[:n]])

    def seconds(self, image_id: str, n: int) -> float:
        """Nobody knows what they took."""
        return 0.0

    def check(self, ids: Sequence[str], n: int, command: str = "") -> None:
        """Raise ``ValueError`` if an image has fewer than ``n`` variations, with an example."""
        missing = [image_id for image_id in ids if len(self._of(image_id)) < n]
        if missing:
            stem = missing[0].rpartition(".")[0] or missing[0]
            raise ValueError(
                f"{len(missing)} of {len(ids)} images have no {n} variations in {self.root}: it "
                f"should hold {stem}_0.jpg, {stem}_1.jpg and so on. Ask for fewer (n_generated), "
                "or for the images that have some (reduced_size)."
            )
