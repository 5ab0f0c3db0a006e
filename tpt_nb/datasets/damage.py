"""Damaged copies of a data set, at five severities.

Five kinds of our own (noise, blur, JPEG artefacts, lost colour, outlines), on which methods were
developed, and the fifteen of ImageNet-C (:mod:`tpt_nb.datasets.imagenet_c`). For images of any
size: strengths are relative to the shorter side. The damage of an image depends on its id, the kind
and the severity only.
"""

import hashlib
import io
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageFilter, ImageOps

from tpt_nb.core.images import as_rgb, view_seed
from tpt_nb.core.messages import unknown
from tpt_nb.datasets.dataset import Dataset
from tpt_nb.datasets.imagenet_c import DAMAGES

VERSION = 1  # raise it when the pixels change
SEVERITIES = (1, 2, 3, 4, 5)


def _noise(image: Image.Image, severity: int, rng: np.random.Generator) -> Image.Image:
    sigma = 255 * (0.06, 0.10, 0.16, 0.24, 0.34)[severity - 1]
    pixels = np.asarray(image, np.float32)
    pixels = pixels + sigma * rng.standard_normal(pixels.shape, np.float32)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def _blur(image: Image.Image, severity: int, rng: np.random.Generator) -> Image.Image:
    radius = min(image.size) * (0.006, 0.010, 0.015, 0.022, 0.030)[severity - 1]
    return image.filter(ImageFilter.GaussianBlur(radius))


def _jpeg(image: Image.Image, severity: int, rng: np.random.Generator) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=(25, 15, 10, 6, 3)[severity - 1])
    return Image.open(buffer).convert("RGB")


def _grey(image: Image.Image, severity: int, rng: np.random.Generator) -> Image.Image:
    grey = ImageOps.grayscale(image).convert("RGB")
    return Image.blend(image, grey, (0.4, 0.6, 0.8, 0.9, 1.0)[severity - 1])


def _outline(image: Image.Image, severity: int, rng: np.random.Generator) -> Image.Image:
    """Dark edges on white, as a drawing has them."""
    grey = ImageOps.grayscale(image).filter(ImageFilter.GaussianBlur(min(image.size) / 150))
    edges = np.asarray(grey.filter(ImageFilter.FIND_EDGES), np.float32)
    edges[[0, -1]], edges[:, [0, -1]] = 0, 0  # the filter copies the border as it is
    ink = np.clip(255 - 4 * edges, 0, 255).astype(np.uint8)
    drawing = Image.fromarray(ink).convert("RGB")
    return Image.blend(image, drawing, (0.5, 0.7, 0.8, 0.9, 1.0)[severity - 1])


CORRUPTIONS: dict[str, Callable[[Image.Image, int, np.random.Generator], Image.Image]] = {
    "noise": _noise,
    "blur": _blur,
    "jpeg": _jpeg,
    "grey": _grey,
    "outline": _outline,
    **DAMAGES,
}


def corrupt(image: Image.Image, kind: str, severity: int, seed: int = 0) -> Image.Image:
    """The damaged image, RGB, of the same size.

    Raises:
        ValueError: unknown kind (lists the known ones), severity other than 1 to 5.
    """
    check_damage(kind, severity)
    return CORRUPTIONS[kind](as_rgb(image), severity, np.random.default_rng(seed))


@dataclass(frozen=True)
class _Damaged:
    whole: Dataset
    kind: str
    severity: int

    def __call__(self, i: int) -> Image.Image:
        seed = view_seed(self.severity, f"{self.kind}/{self.whole.ids[i]}")
        return corrupt(self.whole[i][0], self.kind, self.severity, seed)


def corrupted(dataset: Dataset, kind: str, severity: int) -> Dataset:
    """The data set with every image damaged; same ids and targets, another name and fingerprint."""
    check_damage(kind, severity)
    text = f"{dataset.fingerprint}/{kind}/{severity}/{VERSION}"
    return replace(
        dataset,
        name=f"{dataset.name}+{kind}{severity}",
        fingerprint=hashlib.sha256(text.encode()).hexdigest()[:16],
        fetch=_Damaged(dataset, kind, severity),
        paths=None,
    )


def check_damage(kind: str, severity: int, known: Iterable[str] = CORRUPTIONS) -> None:
    """Raise ``ValueError`` for an unknown kind or another severity than 1 to 5."""
    if kind not in known:
        raise ValueError(unknown("corruption", kind, known))
    if severity not in SEVERITIES:
        raise ValueError(f"severity is {severity!r}; it must be a whole number from 1 to 5.")
