"""Images that were changed, by a few grey levels, so that zero-shot is wrong: the setting of R-TPT.

Projected gradient descent (Madry et al., "Towards Deep Learning Models Resistant to Adversarial
Attacks", 2018) on the image itself, at its full size, through the resampling that makes view 0: all
other views are then cut from the attacked picture. What comes out is a picture with whole grey
levels, as a file would hold it, and the gradient is taken at such pictures. (R-TPT attacks view 0
and rounds *down* when it writes the picture, which loses part of an attack of 1/255.)

The attack knows the model, the class names and the prompt, and not that somebody will adapt. An
attack that knows the method, too, is stronger: what survives here is no guarantee.
"""

import hashlib
import io
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from tpt_nb.core.files import write_json, write_whole
from tpt_nb.core.images import as_rgb, read_rgb, view_seed
from tpt_nb.core.messages import bar
from tpt_nb.core.paths import cache_dir
from tpt_nb.datasets import Dataset
from tpt_nb.models import Clip, template_features
from tpt_nb.views import first_view

VERSION = 1  # raise it when the pixels change


@dataclass(frozen=True)
class Pgd:
    """How far and how an image may be changed.

    Attributes:
        eps: grey levels, of 255: by how much a pixel may change (L-infinity).
        steps: of a quarter of eps each, from a random start; R-TPT has 7.
        seed: of the random start.
    """

    eps: int
    steps: int = 7
    seed: int = 0

    def __post_init__(self) -> None:
        whole = all(x == int(x) for x in (self.eps, self.steps))
        if not whole or not 0 <= self.eps <= 255 or self.steps < 1:
            raise ValueError(
                f"eps is {self.eps}, steps {self.steps}; eps must be whole grey levels from 0 to "
                "255 (4 for 4/255), steps 1 or more."
            )


def attack(
    pixels: Tensor, loss: Callable[[Tensor], Tensor], pgd: Pgd, generator: torch.Generator
) -> Tensor:
    """The picture whose loss is (locally) largest: ``[H,W,3]`` uint8, within eps of ``pixels``.

    Args:
        pixels: ``[H,W,3]`` uint8.
        loss: of a picture ``[H,W,3]``, float in 0..255, differentiable.
    """
    clean = pixels.float()
    change = pgd.eps * (2 * torch.rand(clean.shape, generator=generator).to(clean) - 1)
    for _ in range(pgd.steps):
        picture = (clean + change).round().clamp(0, 255).requires_grad_(True)
        (gradient,) = torch.autograd.grad(loss(picture), picture)
        change = (change + pgd.eps / 4 * gradient.sign()).clamp(-pgd.eps, pgd.eps)
    return (clean + change).round().clamp(0, 255).to(torch.uint8)


def zero_shot_loss(clip: Clip, text: Tensor, target: int) -> Callable[[Tensor], Tensor]:
    """Cross-entropy of zero-shot with the class ``target``, of a picture ``[H,W,3]`` in 0..255.

    The picture becomes view 0 by the same resampling as everywhere, without its rounding.
    """

    def loss(picture: Tensor) -> Tensor:
        view = first_view(picture, clip.image_size) / 255
        logits = clip.logit_scale.to(text) * clip.encode_pass(view[None]).to(text) @ text.T
        return F.cross_entropy(logits, torch.tensor([target], device=logits.device))

    return loss


@dataclass(frozen=True)
class _Pictures:
    places: tuple[str, ...]

    def __call__(self, i: int) -> Image.Image:
        return read_rgb(self.places[i])


def attacked(
    dataset: Dataset,
    clip: Clip,
    pgd: Pgd,
    template: str = "a photo of a {}.",
    cache: Path | str | None = None,
    progress: bool = True,
) -> Dataset:
    """The data set with every image attacked; same ids and targets, another fingerprint.

    All images are attacked now and kept as PNG files, one by one, so that it can be resumed; what
    becomes of an image does not depend on the others. With eps 0 it is the data set itself.

    Args:
        template: the prompt of the zero-shot classifier that is attacked.
        cache: folder; None for the usual one.
    """
    if not pgd.eps:
        return dataset
    key = {"version": VERSION, "data": dataset.fingerprint, "model": clip.fingerprint}
    key |= {"eps": pgd.eps, "steps": pgd.steps, "seed": pgd.seed, "template": template}
    key["classnames"] = list(dataset.classnames)
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    folder = Path(cache or cache_dir()) / "attacks" / name
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "manifest.json", key)
    files = [hashlib.sha256(f"{i}".encode(errors="surrogateescape")) for i in dataset.ids]
    places = [folder / f"{digest.hexdigest()[:20]}.png" for digest in files]
    missing = [i for i, place in enumerate(places) if not place.is_file()]
    if missing:
        text = template_features(clip, dataset.classnames, [template])
        with bar(len(missing), 0, f"attack, {pgd.eps}/255", progress) as shown:
            for i in missing:
                write_whole(places[i], _attacked(dataset, i, clip, text, pgd))
                shown.update(1)
    return replace(
        dataset,
        name=f"{dataset.name}+pgd{pgd.eps}",
        fingerprint=name,
        fetch=_Pictures(tuple(map(str, places))),
        paths=[str(place) for place in places],
    )


def _attacked(dataset: Dataset, i: int, clip: Clip, text: Tensor, pgd: Pgd) -> bytes:
    """An attacked image as PNG."""
    pixels = torch.from_numpy(np.array(as_rgb(dataset[i][0]))).to(clip.device)
    generator = torch.Generator().manual_seed(view_seed(pgd.seed, dataset.ids[i]))
    changed = attack(pixels, zero_shot_loss(clip, text, dataset.targets[i]), pgd, generator)
    file = io.BytesIO()
    Image.fromarray(changed.cpu().numpy()).save(file, "PNG")
    return file.getvalue()
