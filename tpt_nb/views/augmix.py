"""AugMix and AutoAugment on views."""

import functools
from collections import defaultdict
from collections.abc import Callable, Sequence

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


def torchvision_augmix(
    images: Sequence[Image.Image], seeds: Sequence[int], severity: int
) -> np.ndarray:
    """torchvision's AugMix (13 operations, colour too) of n images: uint8 [n,S,S,3].

    The pixels are those of ``torchvision.transforms.AugMix(severity)(image)`` after
    ``torch.manual_seed(seed)``, image by image. What is drawn is drawn first, and an operation is
    then done at once to all images that have it next, which takes half the time: most of a call on
    one small image is overhead. Leaves torch's generator of the CPU at another place.
    """
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image in images]))
    batch = pixels.permute(0, 3, 1, 2).contiguous()
    drawn = [_draw(seed, severity, tuple(batch.shape[2:])) for seed in seeds]
    weights = torch.stack([of_image for of_image, _ in drawn]).T[
        ..., None, None, None
    ]  # [4,n,1,1,1]
    chains = [chains[i] for i in range(3) for _, chains in drawn]
    mixed_in = _in_chains(batch.repeat(3, 1, 1, 1), chains).unflatten(0, (3, -1))
    mix = weights[0] * batch
    for weight, chain in zip(weights[1:], mixed_in, strict=True):
        mix.add_(weight * chain)
    return mix.to(torch.uint8).permute(0, 2, 3, 1).numpy()


@functools.cache
def _torchvisions(severity: int, size: tuple[int, int]) -> tuple:
    """torchvision's AugMix, and its operations with their magnitudes on images of that size."""
    from torchvision.transforms import AugMix

    mixer = AugMix(severity=severity)
    return mixer, list(mixer._augmentation_space(mixer._PARAMETER_MAX, size).items())


def _draw(seed: int, severity: int, size: tuple[int, int]) -> tuple[torch.Tensor, list[list]]:
    """What torchvision's AugMix draws for an image, in its order: weights [4] and three chains.

    The weights are of the image and of each chain; a chain is (operation, magnitude), one to three.
    """
    mixer, space = _torchvisions(severity, size)
    # torch's global generator is what torchvision draws from; seed that of the CPU alone, so that
    # worker processes stay away from CUDA
    torch.default_generator.manual_seed(seed)
    m = mixer._sample_dirichlet(torch.tensor([mixer.alpha] * 2).expand(1, -1))
    shares = mixer._sample_dirichlet(torch.tensor([mixer.alpha] * 3).expand(1, -1)) * m[:, 1:]
    chains = []
    for _ in range(3):
        chain = []
        for _ in range(int(torch.randint(1, 4, (1,)))):
            name, (magnitudes, signed) = space[int(torch.randint(len(space), (1,)))]
            level = float(magnitudes[torch.randint(severity, (1,))]) if magnitudes.ndim else 0.0
            chain.append((name, -level if signed and torch.randint(2, (1,)) else level))
        chains.append(chain)
    return torch.cat([m[0, :1], shares[0]]), chains


def _in_chains(batch: torch.Tensor, chains: Sequence[list]) -> torch.Tensor:
    """Images uint8 [n,3,S,S], each after the operations of its chain; changes ``batch``."""
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.autoaugment import _apply_op

    for step in range(max(map(len, chains))):
        alike = defaultdict(list)  # (operation, magnitude) -> images
        for k, chain in enumerate(chains):
            if step < len(chain):
                alike[chain[step]].append(k)
        for (name, level), rows in alike.items():
            batch[rows] = _apply_op(batch[rows], name, level, InterpolationMode.BILINEAR, None)
    return batch


def autoaugment(image: Image.Image, rng: np.random.Generator, severity: int) -> np.ndarray:
    """torchvision's AutoAugment (ImageNet policy) blended with the crop, float32 [S,S,3].

    ``m * crop + (1-m) * auto``, m ~ Beta(1,1).
    """
    from torchvision.transforms.v2 import AutoAugment

    m = np.float32(rng.beta(1.0, 1.0))
    auto = np.asarray(AutoAugment()(image), np.float32)
    return m * np.asarray(image, np.float32) + (1 - m) * auto


AUGMIX = ("tpt", "torchvision")  # whose operations
