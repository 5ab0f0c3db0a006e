"""The fifteen damages of ImageNet-C, for images of any size, and which of its archives has which.

Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and
Perturbations", ICLR 2019: noise, blur, weather and digital damage at five severities, restated here
from the published parameters. These are for pictures whose shorter side has 224 pixels; elsewhere
lengths are scaled with it, and noise on larger pictures has grains of several pixels.

Written by hand, as no library can be a requirement of everybody: ``imagecorruptions`` 1.1.2 fails
under numpy 2 (fog) and today's scikit-image (glass_blur); ``imagecorruptions-imaug`` 1.1.5 and
``imgcorr`` 1.1.3 work but bring OpenCV, scikit-image and numba (420 MB), ``corrupt-tta`` 0.1.7
OpenCV and scikit-image (220 MB); all draw from numpy's global random numbers, and three of them
refuse pictures below 32 pixels. What differs from the authors' code:

- *frost* draws ice crystals, where theirs lays one of six photographs over the picture;
- *glass_blur* moves every pixel at once, where theirs swaps neighbours one after the other;
- *elastic_transform* leaves out the random affine map, with the strengths of imagecorruptions
  (Michaelis et al., "Benchmarking Robustness in Object Detection", 2019): with it the first two
  of the published severities move pictures by far more than the other three;
- *fog* sums noise of octaves in place of the diamond-square recursion, with the same decay;
- JPEG's blocks have 8 pixels whatever the size of the picture.
"""

import io
import math
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from PIL import Image, ImageDraw

SIDE = 224  # pixels of the shorter side, for which the parameters were published
Pixels = np.ndarray  # [h,w,3] float in [0,1]

# archive of zenodo.org/record/2235448 -> what it holds; the four of "extra" are read, not made here
ARCHIVES = {
    "noise": ("gaussian_noise", "shot_noise", "impulse_noise"),
    "blur": ("defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    "weather": ("snow", "frost", "fog", "brightness"),
    "digital": ("contrast", "elastic_transform", "pixelate", "jpeg_compression"),
    "extra": ("speckle_noise", "gaussian_blur", "spatter", "saturate"),
}


# --- helpers -------------------------------------------------------------------------------------


def _scale(x: Pixels) -> float:
    """Pixels here for one pixel of a picture of the published size."""
    return min(x.shape[:2]) / SIDE


def _in_grains(x: Pixels, damage: Callable[[Pixels], Pixels]) -> Pixels:
    """Damage with grains of whole pixels, on large pictures of as many as two or more."""
    k = max(1, round(_scale(x)))
    coarse = x[::k, ::k]
    change = damage(coarse) - coarse
    return x + change.repeat(k, 0).repeat(k, 1)[: x.shape[0], : x.shape[1]]


def _convolve(x: np.ndarray, kernel: np.ndarray, mode: str = "edge") -> np.ndarray:
    """``[h,w]`` or ``[h,w,3]`` with a kernel of odd sides that sums to 1; borders by ``mode``."""
    margins = [(n // 2, n // 2) for n in kernel.shape] + [(0, 0)] * (x.ndim - 2)
    x = np.pad(x, margins, mode)
    across = x.shape[:2]
    spectrum = np.fft.rfft2(kernel, across)
    spectrum = np.fft.rfft2(x, axes=(0, 1)) * spectrum.reshape(*spectrum.shape, *[1] * (x.ndim - 2))
    whole = np.fft.irfft2(spectrum, across, axes=(0, 1))
    return whole[kernel.shape[0] - 1 :, kernel.shape[1] - 1 :]  # where the kernel lay inside


def _disk(radius: float) -> np.ndarray:
    """A disk as a kernel; each pixel weighs as much of its area as lies inside."""
    n, fine = math.ceil(radius + 0.5), 9
    at = (np.arange((2 * n + 1) * fine) + 0.5) / fine - n - 0.5
    inside = (at[:, None] ** 2 + at**2 <= radius**2).astype(float)
    kernel = inside.reshape(2 * n + 1, fine, 2 * n + 1, fine).sum((1, 3))
    return kernel / kernel.sum()


def _streak(radius: float, sigma: float, degrees: float, scale: float) -> np.ndarray:
    """Motion as a kernel: half a Gauss along a line of ``2 radius + 1`` pixels from the centre."""
    n = math.ceil(2 * radius * scale) + 1
    steps = np.linspace(0, 2 * radius, math.ceil(2 * radius * max(1, scale)) + 1)
    weights = np.exp(-(steps**2) / (2 * sigma**2))
    kernel = np.zeros((2 * n + 1, 2 * n + 1))
    angle = math.radians(degrees)
    y, x = n + steps * scale * math.sin(angle), n + steps * scale * math.cos(angle)
    top, left = np.floor(y).astype(int), np.floor(x).astype(int)
    for dy in (0, 1):  # each step falls on four pixels
        for dx in (0, 1):
            share = np.abs(1 - dy - (y - top)) * np.abs(1 - dx - (x - left))
            np.add.at(kernel, (top + dy, left + dx), weights * share)
    return kernel / kernel.sum()


def _plasma(shape: tuple[int, int], decay: float, rng: np.random.Generator) -> np.ndarray:
    """Clouds in [0,1]: octaves of noise, each of half the size and 1/decay^2 of the height."""
    unit = SIDE / min(shape)
    levels = math.ceil(math.log2(max(shape) * unit))
    total = np.zeros(shape)
    for k in range(1, levels + 1):
        grid = rng.uniform(-1, 1, (2**k, 2**k)) * decay ** (-2 * k)
        y, x = (np.arange(n) * unit * 2**k / 2**levels for n in shape)
        at = np.meshgrid(y, x, indexing="ij")
        total += _bilinear(grid, at, "grid-wrap")
    total -= total.min()
    return total / total.max()


def _grid_noise(shape: tuple[int, int], cell: float, noise: Callable) -> np.ndarray:
    """Noise on a grid of cells of so many pixels (at least one), interpolated between them."""
    cell = max(1.0, cell)
    grid = noise([math.ceil(n / cell) + 1 for n in shape])
    at = np.meshgrid(*(np.arange(n) / cell for n in shape), indexing="ij")
    return _bilinear(grid, at, "nearest")


def _bilinear(channel: np.ndarray, at: Sequence[np.ndarray], mode: str) -> np.ndarray:
    """``[h,w]`` read at (rows, columns); what lies outside by scipy's ``mode``."""
    from scipy.ndimage import map_coordinates  # takes long to import, for who damages nothing

    return map_coordinates(channel, at, order=1, mode=mode)


def _gauss(x: np.ndarray, sigma: Sequence[float], mode: str) -> np.ndarray:
    from scipy.ndimage import gaussian_filter

    return gaussian_filter(x, sigma, mode=mode, truncate=3)


def _picture(x: Pixels) -> Image.Image:
    return Image.fromarray(np.rint(np.clip(x, 0, 1) * 255).astype(np.uint8))


def _pixels(image: Image.Image) -> Pixels:
    return np.asarray(image, np.float64) / 255


# --- noise ---------------------------------------------------------------------------------------


def _gaussian_noise(x: Pixels, s: int, rng: np.random.Generator) -> Pixels:
    sigma = (0.08, 0.12, 0.18, 0.26, 0.38)[s]
    return _in_grains(x, lambda y: y + rng.normal(0, sigma, y.shape))


def _shot_noise(x: Pixels, s: int, rng: np.random.Generator) -> Pixels:
    photons = (60, 25, 12, 5, 3)[s]
    return _in_grains(x, lambda y: np.clip(rng.poisson(y * photons) / photons, 0, 1))


def _impulse_noise(x: Pixels, s: int, rng: np.random.Generator) -> Pixels:
    share = (0.03, 0.06, 0.09, 0.17, 0.27)[s]

    def salt_and_pepper(y: Pixels) -> Pixels:
        hit, white = rng.random((2, *y.shape))
        return np.where(hit < share, white < 0.5, y)

    return _in_grains(x, salt_and_pepper)


# --- blur ----------------------------------------------------------------------------------------


def _defocus_blur(x: Pixels, s: int, rng: np.random.Generator) -> Pixels:
    return _convolve(x, _disk((3, 4, 6, 8, 10)[s] * _scale(x)), "reflect")


def _glass_blur(x: Pixels, s: int, rng: np.random.Generator) -> Pixels:
    sigma, reach, rounds = ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2))[s]
    scale = _scale(x)
    smooth = (sigma * scale, sigma * scale, 0)
    x = _gauss(x, smooth, "nearest")
    moves = scale * rng.uniform(-reach, reach, (rounds, 2, *x.shape[:2])).sum(0)
    moves = np.floor(moves + rng.random(moves.shape)).astype(int)  # whole pixels, right on average
    rows, columns = np.indices(x.shape[:2]) + moves
    x = x[rows.clip(0, x.shape[0] - 1), columns.clip(0, x.shape[1] - 1)]
    return _gauss(x, smooth, "nearest")


def _motion_blur(x: Pixels, s: int, rng: np.random.Generator) -> Pixels:
    radius, sigma = ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15))[s]
    return _convolve(x, _streak(radius, sigma, rng.uniform(-45, 45), _scale(x)))


def _zoom_blur(x: Pixels, s: int, rng: np.random.Generator) -> Pixels:
    stop, step = ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03))[s]
    image, total, zooms = _picture(x), x.copy(), np.arange(1, stop, step)
    for zoom in zooms:
        w, h = (n / zoom for n in image.size)
        left, top = (image.width - w) / 2, (image.height - h) / 2
        box = (left, top, left + w, top + h)
        total += _pixels(image.resize(image.size, Image.Resampling.BILINEAR, box))
    return total / (len(zooms) + 1)


# --- weather -------------------------------------------------------------------------------------


def _snow(x: Pixels, s: int, rng: np.random.Generator) -> Pixels:
    mean, sd, size, threshold, radius, sigma, keep = (
        (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
        (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
        (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
        (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
        (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
    )[s]
    scale = _scale(x)
    flakes = _grid_noise(x.shape[:2], size * scale, lambda shape: rng.normal(mean, sd, shape))
    flakes = np.where(flakes < threshold, 0, flakes.clip(0, 1))
    flakes = _convolve(flakes, _streak(radius, sigma, rng.uniform(-135, -45), scale))
    grey = x @ (0.299, 0.587, 0.114)
    x = keep * x + (1 - keep) * np.maximum(x, 1.5 * grey[..., None] + 0.5)
    return x + (flakes + np.rot90(flakes, 2))[..., None]


def _frost(x: Pixels, s: int, rng: np.random.Generator) -> Pixels:
    keep, ice = ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75))[s]
    return keep * x + ice * _ice(x.shape[:2], rng)


def _ice(shape: tuple[int, int], rng: np.random.Generator) -> Pixels:
    """A frozen window: feathers of ice, side by side and across each other, on a bluish haze."""
    h, w = (2 * n for n in shape)  # drawn at twice the size, for soft lines
    unit = min(h, w) / SIDE
    canvas = Image.new("L", (w, h))
    draw = ImageDraw.Draw(canvas)
    for _ in range(round(60 * max(shape) / min(shape))):
        y, x, turn = rng.uniform(0, h), rng.uniform(0, w), rng.uniform(0, 2 * math.pi)
        length, light = rng.uniform(20, 80) * unit, rng.integers(90, 255)
        for k in range(24):  # along the stem, branches that get shorter
            at = length * k / 24
            y0, x0 = y + at * math.sin(turn), x + at * math.cos(turn)
            branch = (length - at) * rng.uniform(0.2, 0.5)
            for side in (-1, 1):
                bend = turn + side * math.pi / 3
                end = (x0 + branch * math.cos(bend), y0 + branch * math.sin(bend))
                draw.line([(x0, y0), end], fill=int(light * rng.uniform(0.4, 1)))
        tip = (x + length * math.cos(turn), y + length * math.sin(turn))
        draw.line([(x, y), tip], fill=int(light), width=2)
    crystals = _pixels(canvas.resize(shape[::-1], Image.Resampling.BOX))
    haze = _plasma(shape, 1.6, rng)
    cover = (0.38 + 0.4 * haze + 0.5 * crystals).clip(0, 1)
    return cover[..., None] * (0.84, 0.93, 1.0)


def _fog(x: Pixels, s: int, rng: np.random.Generator) -> Pixels:
    thick, decay = ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4))[s]
    top = x.max()
    return (x + thick * _plasma(x.shape[:2], decay, rng)[..., None]) * top / (top + thick)


def _brightness(x: Pixels, s: int, rng: np.random.Generator) -> Pixels:
    """More of V in HSV: hue and saturation stay, so all three channels grow by one factor."""
    value = x.max(-1, keepdims=True)
    more = (value + (0.1, 0.2, 0.3, 0.4, 0.5)[s]).clip(0, 1)
    return np.where(value > 0, x * (more / np.where(value > 0, value, 1)), more)


# --- digital -------------------------------------------------------------------------------------


def _contrast(x: Pixels, s: int, rng: np.random.Generator) -> Pixels:
    mean = x.mean((0, 1))
    return (x - mean) * (0.4, 0.3, 0.2, 0.1, 0.05)[s] + mean


def _elastic_transform(x: Pixels, s: int, rng: np.random.Generator) -> Pixels:
    alpha, scale = 250 * (0.05, 0.065, 0.085, 0.1, 0.12)[s], _scale(x)
    sigma, reach = 0.01 * SIDE, 0.005 * SIDE
    moves = rng.uniform(-reach, reach, (2, *x.shape[:2]))
    # a wider Gauss averages more noise away: once more by the scale
    moves = alpha * scale**2 * _gauss(moves, (0, sigma * scale, sigma * scale), "reflect")
    at = np.indices(x.shape[:2]) + moves
    channels = [_bilinear(c, at, "reflect") for c in np.moveaxis(x, -1, 0)]
    return np.stack(channels, axis=-1)


def _pixelate(x: Pixels, s: int, rng: np.random.Generator) -> Pixels:
    share = (0.6, 0.5, 0.4, 0.3, 0.25)[s] / max(1, _scale(x))
    image = _picture(x)
    small = image.resize([max(1, int(n * share)) for n in image.size], Image.Resampling.BOX)
    return _pixels(small.resize(image.size, Image.Resampling.NEAREST))


def _jpeg_compression(x: Pixels, s: int, rng: np.random.Generator) -> Pixels:
    buffer = io.BytesIO()
    _picture(x).save(buffer, "JPEG", quality=(25, 18, 15, 10, 7)[s])
    return _pixels(Image.open(buffer))


_DAMAGES: dict[str, Callable[[Pixels, int, np.random.Generator], Pixels]] = {
    "gaussian_noise": _gaussian_noise,
    "shot_noise": _shot_noise,
    "impulse_noise": _impulse_noise,
    "defocus_blur": _defocus_blur,
    "glass_blur": _glass_blur,
    "motion_blur": _motion_blur,
    "zoom_blur": _zoom_blur,
    "snow": _snow,
    "frost": _frost,
    "fog": _fog,
    "brightness": _brightness,
    "contrast": _contrast,
    "elastic_transform": _elastic_transform,
    "pixelate": _pixelate,
    "jpeg_compression": _jpeg_compression,
}


def _on_picture(damage: Callable, image: Image.Image, severity: int, rng) -> Image.Image:
    return _picture(damage(_pixels(image), severity - 1, rng))


# name -> damage of an RGB image at a severity of 1 to 5, which draws from the generator alone
DAMAGES: dict[str, Callable[[Image.Image, int, np.random.Generator], Image.Image]] = {
    name: partial(_on_picture, damage) for name, damage in _DAMAGES.items()
}
