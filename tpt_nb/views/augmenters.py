"""The augmenters: random crops and patches."""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from tpt_nb.core.images import as_rgb
from tpt_nb.views import resample
from tpt_nb.views.augmix import _autoaugment, _torchvision_augmix, tpt_augmix
from tpt_nb.views.crops import (
    BILINEAR,
    CROP_TRIES,
    as_plan,
    center_axes,
    center_view,
    crop_boxes,
    patch_boxes,
    side_boxes,
)


@dataclass(frozen=True)
class RandomViews:
    """TPT's view generator: the image and `n_aug` random resized crops, half of them flipped.

    Crops are taken from the full-resolution image (area 8-100 %, ratio 3/4-4/3, bilinear), as in
    TPT. With neither `augmix` nor `autoaugment` this is also the "PreAugment" of some course
    projects. View k does not depend on `n_aug`: fewer views are a prefix of more.

    Args:
        n_aug: number of augmented views; V = n_aug + 1.
        augmix: apply AugMix to the crops: `augmix_ops` "tpt" (9 PIL operations, real-valued mix) or
            "torchvision" (13 operations). TPT has it off for ImageNet and its variants.
        severity: AugMix severity, 1 to 10 (TPT: 1).
        autoaugment: blend each crop with its AutoAugment (ImageNet policy); excludes `augmix`.
        size: side of the views in pixels.
        crop_side: None for TPT's random areas and ratios; a number in (0,1] gives every crop this
            share of the image's width and of its height, at a random place.
    """

    n_aug: int = 63
    augmix: bool = False
    severity: int = 1
    autoaugment: bool = False
    size: int = 224
    augmix_ops: str = "tpt"
    crop_side: float | None = None

    VERSION = (
        1  # raise it when the pixels change: cached features of the old version are then not used
    )

    def __post_init__(self) -> None:
        if self.n_aug < 0 or self.n_aug != int(self.n_aug):
            raise ValueError(f"n_aug is {self.n_aug!r}; it must be a whole number, 0 or more")
        if self.size < 1 or self.size != int(self.size):
            raise ValueError(f"size is {self.size!r}; it must be whole pixels, 1 or more")
        if not 1 <= self.severity <= 10 or self.severity != int(self.severity):
            raise ValueError(f"severity is {self.severity!r}; it must be whole, from 1 to 10")
        if self.augmix_ops not in ("tpt", "torchvision"):
            raise ValueError(
                f"augmix_ops is {self.augmix_ops!r}; it must be 'tpt' or 'torchvision'"
            )
        if self.crop_side is not None and not 0 < self.crop_side <= 1:
            raise ValueError(f"crop_side is {self.crop_side!r}; it must be in (0, 1], or None")
        if self.augmix and self.autoaugment:
            raise ValueError("augmix and autoaugment are both on; choose one of them")

    @property
    def n_views(self) -> int:
        return self.n_aug + 1

    @property
    def groups(self) -> tuple[int, int]:
        """(1, V): one group, the whole image."""
        return 1, self.n_views

    def spec(self) -> dict:
        """What the pixels depend on, and nothing else (no severity where there is no AugMix)."""
        spec = {
            "class": "RandomViews",
            "version": self.VERSION,
            "n_aug": self.n_aug,
            "size": self.size,
        }
        if self.augmix:
            spec |= {"augmix": self.augmix_ops, "severity": self.severity}
        if self.autoaugment:
            spec |= {"autoaugment": "imagenet"}
        if self.crop_side is not None:
            spec |= {"crop_side": float(self.crop_side)}
        return spec

    def __call__(self, image: Image.Image, seed: int) -> Tensor:
        """Views [V,3,size,size] of a PIL image: uint8; float32 in [0,1] for real-valued mixes."""
        image = as_rgb(image)
        size = self.size
        boxes, flips = self.draw(*image.size, seed)
        mix, is_float = self._mixer()
        pixels = np.empty((self.n_views, size, size, 3), np.float32 if is_float else np.uint8)
        pixels[0] = np.asarray(center_view(image, size))
        torch_state = torch.get_rng_state()
        for k, (x, y, w, h) in enumerate(boxes.tolist(), start=1):
            # crop, then resize: resize(box=...) would let pixels outside the box bleed into the
            # border and so differ from torchvision's RandomResizedCrop.
            crop = image.crop((x, y, x + w, y + h)).resize((size, size), BILINEAR)
            crop = ImageOps.mirror(crop) if flips[k - 1] else crop
            if mix is None:
                pixels[k] = np.asarray(crop)
            else:
                rng = np.random.default_rng([seed, k])
                # torchvision's mixes draw from torch's global generator. Seed the CPU one only, so
                # that worker processes stay away from CUDA.
                torch.default_generator.manual_seed(int(rng.integers(2**63)))
                pixels[k] = mix(crop, rng, self.severity)
        torch.set_rng_state(torch_state)
        if is_float:
            np.clip(pixels / np.float32(255), 0, 1, out=pixels)
        return torch.from_numpy(pixels).permute(0, 3, 1, 2)

    def draw(self, width: int, height: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
        """Boxes (x, y, w, h) of the crops, int [n_aug,4], and which are flipped, bool [n_aug]."""
        # One block of uniforms for all crops, row k for view k: fast, and a prefix for a smaller
        # n_aug.
        uniforms = np.random.default_rng(seed).random((self.n_aug, 4 * CROP_TRIES + 1))
        draws = uniforms[:, :-1].reshape(self.n_aug, CROP_TRIES, 4)
        if self.crop_side is None:
            boxes = crop_boxes(width, height, draws)
        else:
            boxes = side_boxes(width, height, self.crop_side, draws[:, 0, 2:])
        return boxes, uniforms[:, -1] < 0.5

    @property
    def only_crops(self) -> bool:
        """Are the views crops of the image, with nothing done to them but flips?"""
        return not (self.augmix or self.autoaugment)

    def plan(self, image: Image.Image, seed: int) -> resample.Plan:
        """The views of :meth:`__call__`, drawn but not resampled; for ``only_crops``."""
        image = as_rgb(image)
        (x, y, w, h), flips = (a.T for a in self.draw(*image.size, seed))
        crops = [
            resample.axis(x, x + w, self.size, mirror=flips),
            resample.axis(y, y + h, self.size),
        ]
        whole = center_axes(np.array([(0, 0, *image.size)]), self.size)
        return as_plan(image, np.concatenate([whole, np.stack(crops)], axis=1))

    def _mixer(self) -> tuple[Callable | None, bool]:
        """The function applied to each crop, and whether its pixels are real numbers."""
        if self.autoaugment:
            return _autoaugment, True
        if self.augmix:
            return (tpt_augmix, True) if self.augmix_ops == "tpt" else (_torchvision_augmix, False)
        return None, False


@dataclass(frozen=True)
class PatchViews:
    """The image and the patches of a grid laid over it, each with `n_aug` AugMix copies.

    The augmenter of the study "TPT with patches". V = (P+1)(n_aug+1) views: the image, its copies,
    then patch by patch in row-major order the patch and its copies. ``groups`` is (P+1, n_aug+1).
    Patches are cut from the full-resolution image (:func:`patch_boxes`) and treated like view 0:
    shorter side to `size` (bicubic), centre crop. Nothing is random but AugMix, so that without it
    the copies are equal to their patch.

    Args:
        n_aug: AugMix copies of the image and of each patch.
        n_patches: how many patches are wanted. A square grid has P = floor(sqrt(n_patches))**2 of
            them (``patches``): 25 for 32, with a warning. 0: none, only the image and its copies.
        overlap: by how much a patch grows on each side, as a fraction of its cell, 0 to 1.
        augmix: apply AugMix to the copies; `augmix_ops` and `severity` as in :class:`RandomViews`.
            The study has torchvision's operations and severity 2.
        size: side of the views in pixels.
    """

    n_aug: int = 4
    n_patches: int = 16
    overlap: float = 0.0
    augmix: bool = False
    severity: int = 1
    size: int = 224
    augmix_ops: str = "tpt"

    VERSION = 1  # raise it when the pixels change

    def __post_init__(self) -> None:
        RandomViews(
            n_aug=self.n_aug,
            augmix=self.augmix,
            severity=self.severity,
            size=self.size,
            augmix_ops=self.augmix_ops,
        )  # checks what the two have in common
        if self.n_patches < 0 or self.n_patches != int(self.n_patches):
            raise ValueError(f"n_patches is {self.n_patches!r}; it must be a whole number, from 0")
        if not 0 <= self.overlap <= 1:
            raise ValueError(
                f"overlap is {self.overlap!r}; it must be from 0 (patches touch) to 1 (each grows "
                "on every side by its own size)"
            )
        if self.patches != self.n_patches:
            warnings.warn(
                f"n_patches={self.n_patches} is no square number: the grid has {self.grid} x "
                f"{self.grid} = {self.patches} patches, which makes {self.n_views} views",
                stacklevel=3,
            )

    @property
    def grid(self) -> int:
        """Patches per row and per column."""
        return math.isqrt(self.n_patches)

    @property
    def patches(self) -> int:
        """P, the patches that there really are."""
        return self.grid**2

    @property
    def groups(self) -> tuple[int, int]:
        """(P+1, n_aug+1): groups, and views in each; group 0 is the whole image."""
        return self.patches + 1, self.n_aug + 1

    @property
    def n_views(self) -> int:
        return math.prod(self.groups)

    def spec(self) -> dict:
        """What the pixels depend on, and nothing else (the grid, not how many were asked for)."""
        spec = {
            "class": "PatchViews",
            "version": self.VERSION,
            "n_aug": self.n_aug,
            "grid": self.grid,
            "size": self.size,
        }
        if self.grid > 1:  # one patch is the image, whatever the overlap
            spec["overlap"] = float(self.overlap)
        if self.augmix:
            spec |= {"augmix": self.augmix_ops, "severity": self.severity}
        return spec

    def boxes(self, width: int, height: int) -> np.ndarray:
        """Boxes (left, top, right, bottom), int [P+1,4]: the image, then its patches."""
        whole = np.array([(0, 0, width, height)])
        if not self.grid:
            return whole
        return np.concatenate([whole, patch_boxes(width, height, self.grid, self.overlap)])

    @property
    def only_crops(self) -> bool:
        """Are the views crops of the image, with nothing done to them?"""
        return not self.augmix

    def plan(self, image: Image.Image, seed: int) -> resample.Plan:
        """The views of :meth:`__call__`, not resampled yet; for ``only_crops``."""
        image = as_rgb(image)
        axes = center_axes(self.boxes(*image.size), self.size)
        return as_plan(image, axes.repeat(self.n_aug + 1, axis=1))

    def __call__(self, image: Image.Image, seed: int) -> Tensor:
        """Views [V,3,size,size] of a PIL image: uint8; float32 in [0,1] with TPT's AugMix."""
        image, size = as_rgb(image), self.size
        crops = [image.crop(box) for box in self.boxes(*image.size).tolist()]
        is_float = self.augmix and self.augmix_ops == "tpt"
        shape = (*self.groups, size, size, 3)
        pixels = np.empty(shape, np.float32 if is_float else np.uint8)
        torch_state = torch.get_rng_state()
        for g, crop in enumerate(crops):
            plain = center_view(crop, size)
            pixels[g] = np.asarray(plain)
            for a in range(1, self.n_aug + 1) if self.augmix else ():
                rng = np.random.default_rng([seed, g, a])
                if is_float:
                    pixels[g, a] = tpt_augmix(plain, rng, self.severity)
                else:
                    torch.default_generator.manual_seed(int(rng.integers(2**63)))
                    pixels[g, a] = _torchvision_augmix(plain, rng, self.severity)
        torch.set_rng_state(torch_state)
        if is_float:
            np.clip(pixels / np.float32(255), 0, 1, out=pixels)
        return torch.from_numpy(pixels.reshape(-1, size, size, 3)).permute(0, 3, 1, 2)


AUGMENTERS: dict[str, Callable] = {
    "random": RandomViews,
    "AugmenterTPT": RandomViews,  # the names in the study that this course follows
    "patch": PatchViews,
    "PatchAugmenter": PatchViews,
}


def make_augmenter(name: str, size: int, **params) -> RandomViews | PatchViews:
    """Augmenter by name ("random", "patch" or the study's names) for views of `size` pixels.

    Raises:
        ValueError: unknown name (lists the known ones) or parameter (lists the known ones).
    """
    if name not in AUGMENTERS:
        raise ValueError(f"unknown augmenter {name!r}; known: {', '.join(sorted(AUGMENTERS))}")
    known = [f for f in AUGMENTERS[name].__dataclass_fields__ if f != "size"]
    unknown = sorted(set(params) - set(known))
    if unknown:
        raise ValueError(
            f"augmenter {name!r} has no parameter {unknown}; it has {', '.join(known)}"
        )
    return AUGMENTERS[name](size=size, **params)
