"""Where crops and patches lie, and the un-augmented view."""

import numpy as np
import torch
from PIL import Image

from tpt_nb.core.images import STRIP
from tpt_nb.views import resample

BILINEAR, BICUBIC = Image.Resampling.BILINEAR, Image.Resampling.BICUBIC
# torchvision's RandomResizedCrop defaults, which TPT keeps.
CROP_AREA, CROP_RATIO, CROP_TRIES = (0.08, 1.0), (3 / 4, 4 / 3), 10


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


def first_view(pixels: torch.Tensor, size: int) -> torch.Tensor:
    """:func:`center_view` of a picture ``[H,W,3]`` in floats: ``[3,size,size]``, with gradients."""
    height, width, _ = pixels.shape
    axes = center_axes(np.array([(0, 0, width, height)]), size)[:, 0]
    return resample.resampled(pixels, torch.from_numpy(axes), size)


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
