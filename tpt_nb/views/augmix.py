"""AugMix and AutoAugment on views."""

from collections.abc import Callable

import numpy as np
import torch
from PIL import Image, ImageOps

from tpt_nb.views.crops import BILINEAR


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


def torchvision_augmix(image: Image.Image, rng: np.random.Generator, severity: int) -> np.ndarray:
    """torchvision's AugMix (13 operations, colour too) on the uint8 tensor: uint8 [S,S,3]."""
    from torchvision.transforms import AugMix

    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    return AugMix(severity=severity)(pixels).permute(1, 2, 0).numpy()


def autoaugment(image: Image.Image, rng: np.random.Generator, severity: int) -> np.ndarray:
    """torchvision's AutoAugment (ImageNet policy) blended with the crop, float32 [S,S,3].

    ``m * crop + (1-m) * auto``, m ~ Beta(1,1).
    """
    from torchvision.transforms.v2 import AutoAugment

    m = np.float32(rng.beta(1.0, 1.0))
    auto = np.asarray(AutoAugment()(image), np.float32)
    return m * np.asarray(image, np.float32) + (1 - m) * auto


AUGMIX = {"tpt": tpt_augmix, "torchvision": torchvision_augmix}
REAL_VALUED = (tpt_augmix, autoaugment)  # the others give whole grey levels
