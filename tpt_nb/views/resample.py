"""Crops of an image resampled where the encoder is, all of them at once, as Pillow does it.

Resampling along an axis is a product with a small matrix: row i holds the weights with which the
pixels of the image enter pixel i of the view. Pillow resamples the rows first, rounds to grey
levels, and then the columns; so a crop is two products with a rounding behind each. (Pillow 13
takes the columns first where that is cheaper, which changes a rounding here and there.) A filter
that shrinks is stretched by the ratio (antialiasing). A crop ends at its border: nothing from
outside enters, and the weights at the border are scaled to add up to one.

It pays on a GPU. On a CPU Pillow, which skips the zeros of the matrices, is several times faster.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

BILINEAR, BICUBIC = 1.0, 2.0  # filters, by their reach in pixels
BUDGET = {"cuda": 2**28, "cpu": 2**24}  # bytes for intermediate results


class Plan(NamedTuple):
    """An image and how its views are cut from it; what a worker sends to the device.

    Attributes:
        pixels: ``[H,W,3]`` uint8, decoded once.
        axes: ``[2,V,6]`` float64, of the x axes of V views and of their y axes, see :func:`axis`.
    """

    pixels: Tensor
    axes: Tensor


def axis(low, high, out, first=0, mirror=False, reach=BILINEAR) -> np.ndarray:
    """An axis of views: the pixels low to high become ``out``, those from ``first`` on are kept.

    ``mirror``: the view is flipped. Numbers or arrays, one entry per view: ``[V,6]``.
    """
    columns = np.broadcast_arrays(low, high, out, first, mirror, reach)
    return np.stack([np.atleast_1d(column).astype(np.float64) for column in columns], axis=-1)


def weights(axes: Tensor, length: int, size: int) -> Tensor:
    """Resampling matrices ``[V,size,length]`` float32 of axes ``[V,6]``.

    The rows of a matrix add up to one and are zero outside of low to high.
    """
    low, high, out, first, mirror, reach = axes[..., None].unbind(1)  # [V,1]
    place = torch.arange(size, dtype=axes.dtype, device=axes.device)
    place = torch.where(mirror > 0, size - 1 - place, place) + first + 0.5
    scale = (high - low) / out
    centre = low + place * scale  # [V,size]
    stretch = scale.clamp_min(1)
    begin = torch.maximum((centre - reach * stretch + 0.5).floor(), low)[..., None]
    end = torch.minimum((centre + reach * stretch + 0.5).floor(), high)[..., None]
    pixel = torch.arange(length, dtype=torch.float32, device=axes.device)
    # the whole pixels apart, so that float32 has its digits for the fraction
    whole = centre.floor()
    distance = (pixel - whole[..., None].float()) + (0.5 - (centre - whole))[..., None].float()
    x = distance.abs() / stretch[..., None].float()
    cubic = torch.where(x < 1, (1.5 * x - 2.5) * x * x + 1, ((2.5 - 0.5 * x) * x - 4) * x + 2)
    cubic = torch.where(x < 2, cubic, 0)
    out = torch.where(reach[..., None] == BICUBIC, cubic, (1 - x).clamp_min(0))
    out = torch.where((pixel >= begin) & (pixel < end), out, 0)
    return out / out.sum(dim=-1, keepdim=True)


def fits(device: torch.device) -> bool:
    """Is this the faster way on this kind of device?"""
    return device.type == "cuda"


def render(plan: Plan, size: int, device: torch.device | str = "cpu") -> Tensor:
    """The views of a plan: ``[V,3,size,size]`` uint8 on the device.

    Within one grey level of Pillow's, nearly everywhere the same. Nothing waits for the device.
    """
    device = torch.device(device)
    pixels = plan.pixels.to(device, non_blocking=True)
    n, (height, width) = plan.axes.shape[1], pixels.shape[:2]
    # of a view: two matrices and what it takes to make them; the view before the second product
    each = 4 * size * (8 * (height + width) + 3 * height + 6 * size)
    step = max(1, BUDGET[device.type] // each)
    views = [_render(pixels, plan.axes[:, k : k + step], size) for k in range(0, n, step)]
    return torch.cat(views)


def resampled(pixels: Tensor, axes: Tensor, size: int) -> Tensor:
    """A view of a picture ``[H,W,3]`` in floats: ``[3,size,size]``, with gradients.

    Kept within 0..255 behind each axis, as Pillow does, but not rounded. ``axes``: ``[2,6]``, its x
    axis and its y axis.
    """
    height, width, _ = pixels.shape
    x, y = (
        weights(axes[k, None].to(pixels.device), length, size)[0].to(pixels)
        for k, length in enumerate((width, height))
    )
    return (y @ (pixels.permute(2, 0, 1) @ x.T).clamp(0, 255)).clamp(0, 255)


def _render(pixels: Tensor, axes: Tensor, size: int) -> Tensor:
    """Some of the views, ``[V,3,size,size]``, from the part of the image that they need."""
    starts = axes[..., 0].amin(dim=1).int().tolist()  # on the CPU
    ends = axes[..., 1].amax(dim=1).int().tolist()
    part = pixels[starts[1] : ends[1], starts[0] : ends[0]]
    height, width, _ = part.shape
    n = axes.shape[1]
    axes = axes.clone()
    axes[..., :2] -= torch.tensor(starts, dtype=axes.dtype)[:, None, None]
    axes = axes.to(pixels.device, non_blocking=True)
    rows = part.permute(0, 2, 1).flatten(0, 1).float()  # [height*3,width]
    wide = rows.expand(n, -1, -1) @ weights(axes[0], width, size).transpose(1, 2)
    wide = _levels(wide).view(n, height, 3 * size)
    views = _levels(weights(axes[1], height, size) @ wide)  # [V,size,3*size]
    return views.view(n, size, 3, size).to(torch.uint8).transpose(1, 2)


def _levels(x: Tensor) -> Tensor:
    """Rounded to grey levels as Pillow rounds, in place."""
    return x.add_(0.5).floor_().clamp_(0, 255)
