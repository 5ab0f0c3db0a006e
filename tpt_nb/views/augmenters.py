"""Augmenters: one image -> V views.

An augmenter is a frozen dataclass: its fields are its parameters. It is called as
``augmenter(image: PIL.Image, seed: int) -> Tensor [V,3,S,S]`` and has ``n_views``, ``size``,
``groups`` (G, V/G: the views come in G groups of equally many, first those of the whole image, then
those of each patch) and ``spec()``, a JSON-able description of everything its pixels depend on
(part of the key of the feature cache). View 0 is always the un-augmented image: shorter side
resized to S (bicubic), centre crop. Views are uint8, or float32 in [0,1] where mixing makes them
non-integer; normalisation with the model's mean and std is the encoder's business. The memory
layout is channels_last, which is what numpy gives and what the encoder wants: use ``reshape``, not
``view``, on them.

An augmenter whose views are crops and nothing else (``only_crops``) also has ``plan(image, seed)``,
which draws the same views and leaves the resampling to :mod:`tpt_nb.views.resample`.

Views are drawn from ``(seed, image id)`` through :func:`view_seed` alone: neither the order of the
images nor the number of worker processes matters, and torch's and numpy's global generators are
left as they were.
"""

import dataclasses
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from tpt_nb.core.images import as_rgb
from tpt_nb.core.messages import unknown
from tpt_nb.views import augmix as mixes
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
from tpt_nb.views.resample import Plan, axis

VERSION = 1  # raise it when the pixels change: cached features of the old are then not used


class _Mixing:
    """What the augmenters have in common: checks, and crops that are mixed with their likes."""

    autoaugment = False

    def _check(self) -> None:
        if self.n_aug < 0 or self.n_aug != int(self.n_aug):
            raise ValueError(f"n_aug is {self.n_aug!r}; it must be a whole number, 0 or more")
        if self.size < 1 or self.size != int(self.size):
            raise ValueError(f"size is {self.size!r}; it must be whole pixels, 1 or more")
        if not 1 <= self.severity <= 10 or self.severity != int(self.severity):
            raise ValueError(f"severity is {self.severity!r}; it must be whole, from 1 to 10")
        if self.augmix_ops not in mixes.AUGMIX:
            allowed = " or ".join(map(repr, mixes.AUGMIX))
            raise ValueError(f"augmix_ops is {self.augmix_ops!r}; it must be {allowed}")

    @property
    def n_views(self) -> int:
        return math.prod(self.groups)

    @property
    def only_crops(self) -> bool:
        """Are the views crops of the image, with nothing done to them but flips?"""
        return not (self.augmix or self.autoaugment)

    def _spec(self, **more) -> dict:
        """What the pixels depend on, and nothing else (no severity where there is no AugMix)."""
        own = {"class": type(self).__name__, "version": VERSION, "n_aug": self.n_aug}
        spec = own | {"size": self.size} | more
        if self.augmix:
            spec |= {"augmix": self.augmix_ops, "severity": self.severity}
        return spec | ({"autoaugment": "imagenet"} if self.autoaugment else {})

    def _views(self, image: Image.Image, seed: int) -> Iterator[tuple[Image.Image, list | None]]:
        """The views in order, with the seed of what is mixed into them, or None."""
        raise NotImplementedError

    def __call__(self, image: Image.Image, seed: int) -> Tensor:
        """Views [V,3,size,size] of a PIL image: uint8; float32 in [0,1] for real-valued mixes."""
        if self.only_crops:
            return self._crops(as_rgb(image), seed)
        drawn = list(self._views(as_rgb(image), seed))
        pixels = np.stack([np.asarray(view) for view, _ in drawn])
        rows = [k for k, (_, key) in enumerate(drawn) if key is not None]
        crops = [drawn[k][0] for k in rows]
        rngs = [np.random.default_rng(drawn[k][1]) for k in rows]
        torch_state = torch.get_rng_state()
        if self.augmix and self.augmix_ops == "torchvision":
            seeds = [int(rng.integers(2**63)) for rng in rngs]
            if rows:
                pixels[rows] = mixes.torchvision_augmix(crops, seeds, self.severity)
        else:
            mix = mixes.autoaugment if self.autoaugment else mixes.tpt_augmix
            pixels = pixels.astype(np.float32)
            for k, crop, rng in zip(rows, crops, rngs, strict=True):
                if self.draws_for_torch:
                    torch.default_generator.manual_seed(int(rng.integers(2**63)))
                pixels[k] = mix(crop, rng, self.severity)
            np.clip(pixels / np.float32(255), 0, 1, out=pixels)
        torch.set_rng_state(torch_state)
        return torch.from_numpy(pixels).permute(0, 3, 1, 2)

    def _crops(self, image: Image.Image, seed: int) -> Tensor:
        """The views of a call, uint8, where nothing is mixed in."""
        # one below the other on a sheet: Pillow's way to an array costs as much as a crop
        sheet = Image.new("RGB", (self.size, self.n_views * self.size))
        for k, (view, _) in enumerate(self._views(image, seed)):
            sheet.paste(view, (0, k * self.size))
        pixels = np.array(sheet).reshape(self.n_views, self.size, self.size, 3)
        return torch.from_numpy(pixels).permute(0, 3, 1, 2)


@dataclass(frozen=True)
class RandomViews(_Mixing):
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

    draws_for_torch = True  # before every mix, even where nothing is drawn with torch

    def __post_init__(self) -> None:
        self._check()
        if self.crop_side is not None and not 0 < self.crop_side <= 1:
            raise ValueError(f"crop_side is {self.crop_side!r}; it must be in (0, 1], or None")
        if self.augmix and self.autoaugment:
            raise ValueError("augmix and autoaugment are both on; choose one of them")

    @property
    def groups(self) -> tuple[int, int]:
        """(1, V): one group, the whole image."""
        return 1, self.n_aug + 1

    def spec(self) -> dict:
        """What the pixels depend on."""
        return self._spec() | (
            {} if self.crop_side is None else {"crop_side": float(self.crop_side)}
        )

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

    def _views(self, image: Image.Image, seed: int) -> Iterator[tuple[Image.Image, list | None]]:
        yield center_view(image, self.size), None
        boxes, flips = self.draw(*image.size, seed)
        for k, ((x, y, w, h), flip) in enumerate(zip(boxes.tolist(), flips, strict=True), start=1):
            # crop, then resize: resize(box=...) would let pixels outside the box bleed into the
            # border and so differ from torchvision's RandomResizedCrop.
            crop = image.crop((x, y, x + w, y + h)).resize((self.size, self.size), BILINEAR)
            yield ImageOps.mirror(crop) if flip else crop, [seed, k]

    def plan(self, image: Image.Image, seed: int) -> Plan:
        """The views of a call, drawn but not resampled; for ``only_crops``."""
        image = as_rgb(image)
        (x, y, w, h), flips = (a.T for a in self.draw(*image.size, seed))
        crops = [axis(x, x + w, self.size, mirror=flips), axis(y, y + h, self.size)]
        whole = center_axes(np.array([(0, 0, *image.size)]), self.size)
        return as_plan(image, np.concatenate([whole, np.stack(crops)], axis=1))


@dataclass(frozen=True)
class PatchViews(_Mixing):
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

    draws_for_torch = False

    def __post_init__(self) -> None:
        self._check()
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

    def spec(self) -> dict:
        """What the pixels depend on (the grid, not how many patches were asked for)."""
        # one patch is the image, whatever the overlap
        overlap = {"overlap": float(self.overlap)} if self.grid > 1 else {}
        return self._spec(grid=self.grid, **overlap)

    def boxes(self, width: int, height: int) -> np.ndarray:
        """Boxes (left, top, right, bottom), int [P+1,4]: the image, then its patches."""
        whole = np.array([(0, 0, width, height)])
        if not self.grid:
            return whole
        return np.concatenate([whole, patch_boxes(width, height, self.grid, self.overlap)])

    def _views(self, image: Image.Image, seed: int) -> Iterator[tuple[Image.Image, list | None]]:
        for g, box in enumerate(self.boxes(*image.size).tolist()):
            plain = center_view(image.crop(box), self.size)
            yield plain, None
            for a in range(1, self.n_aug + 1):
                yield plain, [seed, g, a]

    def plan(self, image: Image.Image, seed: int) -> Plan:
        """The views of a call, not resampled yet; for ``only_crops``."""
        image = as_rgb(image)
        axes = center_axes(self.boxes(*image.size), self.size)
        return as_plan(image, axes.repeat(self.n_aug + 1, axis=1))


AUGMENTERS: dict[str, type] = {
    "random": RandomViews,
    "AugmenterTPT": RandomViews,  # the names in the study that this course follows
    "patch": PatchViews,
    "PatchAugmenter": PatchViews,
}


def names() -> list[str]:
    """The augmenters that :func:`get` knows."""
    return list(AUGMENTERS)


def get(name: str) -> type:
    """The augmenter of that name, a dataclass; ``ValueError`` lists the known ones."""
    if name not in AUGMENTERS:
        raise ValueError(unknown("augmenter", name, AUGMENTERS))
    return AUGMENTERS[name]


def make_augmenter(name: str, size: int, **params) -> RandomViews | PatchViews:
    """Augmenter by name ("random", "patch" or the study's names) for views of `size` pixels.

    Raises:
        ValueError: unknown name (lists the known ones) or parameter (lists the known ones).
    """
    known = [f.name for f in dataclasses.fields(get(name)) if f.name != "size"]
    wrong = sorted(set(params) - set(known))
    if wrong:
        raise ValueError(f"augmenter {name!r} has no parameter {wrong}; it has {', '.join(known)}")
    return get(name)(size=size, **params)
