"""Augmenters: one image -> V views.

An augmenter is a picklable callable ``augmenter(image: PIL.Image, seed: int) -> Tensor [V,3,S,S]``
with ``n_views``, ``size``, ``groups`` (G, V/G: the views come in G groups of equally many, first
those of the whole image, then those of each patch) and ``spec()``, a JSON-able description of
everything its pixels depend on (part of the key of the feature cache). View 0 is always the
un-augmented image: shorter side resized to S (bicubic), centre crop. Views are uint8, or float32 in
[0,1] where mixing makes them non-integer; normalisation with the model's mean and std is the
encoder's business. The memory layout is channels_last, which is what numpy gives and what the
encoder wants: use ``reshape``, not ``view``, on them.

An augmenter whose views are crops and nothing else (``only_crops``) also has ``plan(image, seed)``,
which draws the same views and leaves the resampling to :mod:`tpt_nb.resample`.

Views are drawn from ``(seed, image id)`` through :func:`view_seed` alone: neither the order of the
images nor the number of worker processes matters, and torch's and numpy's global generators are
left as they were.
"""

import hashlib
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from tpt_nb import resample

BILINEAR, BICUBIC = Image.Resampling.BILINEAR, Image.Resampling.BICUBIC
# torchvision's RandomResizedCrop defaults, which TPT keeps.
CROP_AREA, CROP_RATIO, CROP_TRIES = (0.08, 1.0), (3 / 4, 4 / 3), 10
STRIP = 16  # aspect ratio from which on the centre is cut out before it is resized
EXIF_ORIENTATION = 0x0112


def view_seed(seed: int, image_id: str) -> int:
    """Seed of one image's views: a stable hash (not Python's salted ``hash``), in [0, 2**63)."""
    digest = hashlib.blake2b(f"{int(seed)}\0{image_id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def as_rgb(image: Image.Image) -> Image.Image:
    """The picture as a viewer shows it: EXIF rotation, white under transparency, 16 bits scaled.

    Raises:
        ValueError: no pixels, or floating-point pixels, whose range is anyone's guess.
    """
    if 0 in image.size:
        raise ValueError(f"the image has {image.width} x {image.height} pixels: nothing to see")
    if image.mode == "F":
        raise ValueError("the image has floating-point pixels (mode F); convert it to 8 bits first")
    if image.getexif().get(EXIF_ORIENTATION, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode == "I" or image.mode.startswith("I;16"):
        # convert("RGB") would clip 16-bit grey to white
        image = Image.fromarray((np.asarray(image).astype(np.int64) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def center_view(image: Image.Image, size: int) -> Image.Image:
    """View 0: shorter side to `size` (bicubic), centre crop; the same pixels as torchvision's."""
    width, height = image.size
    short, long = min(width, height), int(size * max(width, height) / min(width, height))
    shape = (size, long) if width == short else (long, size)
    left, top = (int(round((side - size) / 2)) for side in shape)
    if long > STRIP * size:
        # A strip of 1 x 4000 pixels would become one of 224 x 896000: resize only what is kept,
        # first the rows, then the columns.
        x, y = width / shape[0], height / shape[1]
        rows = (left * x, 0, (left + size) * x, height)
        columns = (0, top * y, size, (top + size) * y)
        image = image.resize((size, height), BICUBIC, box=rows)
        return image.resize((size, size), BICUBIC, box=columns)
    return image.resize(shape, BICUBIC).crop((left, top, left + size, top + size))


def center_axes(boxes: np.ndarray, size: int) -> np.ndarray:
    """:func:`center_view` of each box (left, top, right, bottom) of an image, as axes [2,n,6]."""
    (left, top, right, bottom) = boxes.T
    width, height = right - left, bottom - top
    short, long = np.minimum(width, height), np.maximum(width, height)
    out = np.where([width == short, height == short], size, (size * long / short).astype(int))
    first = np.rint((out - size) / 2)
    return np.stack(
        [
            resample.axis(low, high, out[k], first[k], reach=resample.BICUBIC)
            for k, (low, high) in enumerate([(left, right), (top, bottom)])
        ]
    )


def as_plan(image: Image.Image, axes: np.ndarray) -> resample.Plan:
    """An RGB image and the axes [2,V,6] of its views."""
    return resample.Plan(torch.from_numpy(np.array(image)), torch.from_numpy(axes))


def crop_boxes(width: int, height: int, uniforms: np.ndarray) -> np.ndarray:
    """Boxes (x, y, w, h), int [n,4], of torchvision's RandomResizedCrop from uniforms [n,10,4].

    Area uniform in 8-100 % of the image, log aspect ratio uniform between 3/4 and 4/3; the first
    of ten draws that fits inside the image counts, else the largest centred box of an allowed
    ratio.
    """
    area = width * height * (CROP_AREA[0] + (CROP_AREA[1] - CROP_AREA[0]) * uniforms[..., 0])
    low, high = np.log(CROP_RATIO)
    ratio = np.exp(low + (high - low) * uniforms[..., 1])
    w = np.rint(np.sqrt(area * ratio)).astype(np.int64)
    h = np.rint(np.sqrt(area / ratio)).astype(np.int64)
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    first = fits.argmax(axis=1)[:, None]
    drawn = (w, h, uniforms[..., 2], uniforms[..., 3])
    w, h, y, x = (np.take_along_axis(values, first, 1)[:, 0] for values in drawn)
    x, y = np.floor(x * (width - w + 1)), np.floor(y * (height - h + 1))
    boxes = np.stack([x, y, w, h], axis=1).astype(np.int64)
    if not fits.any(axis=1).all():
        w, h = width, height
        if width / height < CROP_RATIO[0]:
            h = int(round(width / CROP_RATIO[0]))
        elif width / height > CROP_RATIO[1]:
            w = int(round(height * CROP_RATIO[1]))
        boxes[~fits.any(axis=1)] = ((width - w) // 2, (height - h) // 2, w, h)
    return boxes


def side_boxes(width: int, height: int, side: float, places: np.ndarray) -> np.ndarray:
    """Boxes (x, y, w, h), int [n,4], with `side` times the image's width and height.

    `places` [n,2] are uniforms that say where (y, x), as in :func:`crop_boxes`.
    """
    w, h = max(1, round(side * width)), max(1, round(side * height))
    y, x = np.floor(places * (height - h + 1, width - w + 1)).astype(np.int64).T
    return np.stack([x, y, np.full_like(x, w), np.full_like(x, h)], axis=1)


def patch_boxes(width: int, height: int, grid: int, overlap: float) -> np.ndarray:
    """Boxes (left, top, right, bottom), int [grid*grid,4], of a grid of patches, row by row.

    Every cell has ``width // grid`` by ``height // grid`` pixels and grows on all four sides by
    the whole pixels of `overlap` times that, up to the border of the image. So an inner patch is
    (1 + 2*overlap)/grid of the image wide, one at the border (1 + overlap)/grid. Without overlap
    the up to ``grid - 1`` pixels that are left over on the right and at the bottom are in no patch.
    An image with fewer pixels than cells gets cells of one pixel, some of them the same.
    """
    ends = []
    for side in (width, height):
        i = np.arange(grid)
        cell = side // grid
        start, stop = i * cell, (i + 1) * cell
        if cell == 0:
            start = i * side // grid
            stop = start + 1
        more = int(cell * overlap)
        ends.append((np.maximum(start - more, 0), np.minimum(stop + more, side)))
    (left, right), (top, bottom) = ends
    column, row = np.tile(np.arange(grid), grid), np.repeat(np.arange(grid), grid)
    return np.stack([left[column], top[row], right[column], bottom[row]], axis=1)


def _affine(image: Image.Image, *matrix: float) -> Image.Image:
    return image.transform(image.size, Image.Transform.AFFINE, matrix, resample=BILINEAR)


# TPT's nine operations (Google's AugMix without those that overlap with ImageNet-C's corruptions):
# name -> f(image, level, sign), level uniform in [0.1, severity] out of 10, sign +1 or -1.
AUGMIX_OPS: dict[str, Callable[[Image.Image, float, int], Image.Image]] = {
    "autocontrast": lambda im, level, sign: ImageOps.autocontrast(im),
    "equalize": lambda im, level, sign: ImageOps.equalize(im),
    "posterize": lambda im, level, sign: ImageOps.posterize(im, 4 - int(level * 4 / 10)),
    "rotate": lambda im, level, sign: im.rotate(sign * int(level * 30 / 10), resample=BILINEAR),
    "solarize": lambda im, level, sign: ImageOps.solarize(im, 256 - int(level * 256 / 10)),
    "shear_x": lambda im, level, sign: _affine(im, 1, sign * level * 0.3 / 10, 0, 0, 1, 0),
    "shear_y": lambda im, level, sign: _affine(im, 1, 0, 0, sign * level * 0.3 / 10, 1, 0),
    "translate_x": lambda im, level, sign: _affine(
        im, 1, 0, sign * int(level * (im.width / 3) / 10), 0, 1, 0
    ),
    "translate_y": lambda im, level, sign: _affine(
        im, 1, 0, 0, 0, 1, sign * int(level * (im.height / 3) / 10)
    ),
}


def tpt_augmix(image: Image.Image, rng: np.random.Generator, severity: int) -> np.ndarray:
    """AugMix as TPT codes it: float32 [S,S,3] in 0..255 (Hendrycks et al. 2020, images only).

    ``m * image + (1-m) * sum_k w_k * chain_k(image)``; w ~ Dirichlet(1,1,1), m ~ Beta(1,1), chains
    of one to three operations. TPT mixes normalised tensors; the weights add up to one and
    normalisation is affine, so mixing before it gives the same view (up to rounding).
    """
    w, m = rng.dirichlet([1.0, 1.0, 1.0]), rng.beta(1.0, 1.0)
    names = list(AUGMIX_OPS)
    mix = np.float32(m) * np.asarray(image, np.float32)
    for weight in w:
        chain = image
        for _ in range(rng.integers(1, 4)):
            op = AUGMIX_OPS[names[rng.integers(len(names))]]
            chain = op(chain, rng.uniform(0.1, severity), 1 if rng.random() < 0.5 else -1)
        mix += np.float32((1 - m) * weight) * np.asarray(chain, np.float32)
    return mix


def _torchvision_augmix(image: Image.Image, rng: np.random.Generator, severity: int) -> np.ndarray:
    """torchvision's AugMix (13 operations, colour too) on the uint8 tensor: uint8 [S,S,3]."""
    from torchvision.transforms import AugMix

    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    return AugMix(severity=severity)(pixels).permute(1, 2, 0).numpy()


def _autoaugment(image: Image.Image, rng: np.random.Generator, severity: int) -> np.ndarray:
    """torchvision's AutoAugment (ImageNet policy) blended with the crop, float32 [S,S,3].

    ``m * crop + (1-m) * auto``, m ~ Beta(1,1).
    """
    from torchvision.transforms.v2 import AutoAugment

    m = np.float32(rng.beta(1.0, 1.0))
    auto = np.asarray(AutoAugment()(image), np.float32)
    return m * np.asarray(image, np.float32) + (1 - m) * auto


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
