"""DiffTPT: generated variations of an image as views."""

import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from tpt_nb.core.paths import cache_dir
from tpt_nb.methods.difftpt.pictures import Pictures, pictures_of
from tpt_nb.methods.difftpt.pipeline import load_generator
from tpt_nb.methods.method import Adapted, _check_features, _initial_logits
from tpt_nb.methods.tpt import tpt
from tpt_nb.methods.votes import vote
from tpt_nb.views import center_view


@dataclass(frozen=True)
class _Stored:
    """Getter of an image's pictures, side by side in one picture; picklable."""

    pictures: Pictures
    ids: tuple[str, ...]
    n: int

    def __call__(self, i: int) -> Image.Image:
        got = self.pictures.read(self.ids[i], self.n)
        return Image.fromarray(torch.cat(list(got), 2).permute(1, 2, 0).numpy())


@dataclass(frozen=True)
class Row:
    """An "augmenter" that cuts a row of ``n`` square pictures into views; nothing is random."""

    n: int
    size: int

    @property
    def n_views(self) -> int:
        return self.n

    @property
    def groups(self) -> tuple[int, int]:
        return 1, self.n

    def spec(self) -> dict:
        return {"class": "Row", "version": 1, "n": self.n, "size": self.size}

    def __call__(self, image: Image.Image, seed: int = 0) -> Tensor:
        """Views ``[n,3,size,size]`` uint8: each picture resized (bicubic), its centre."""
        side = image.width // self.n
        cells = [image.crop((k * side, 0, (k + 1) * side, side)) for k in range(self.n)]
        views = np.stack([np.asarray(center_view(cell, self.size)) for cell in cells])
        return torch.from_numpy(views).permute(0, 3, 1, 2)


def generated_features(dataset, clip, pictures: Pictures, n: int, cache=None, progress=True):
    """Features ``[N,n,D]`` of the first ``n`` variations of each image, as ``encode.Features``.

    Kept in the feature cache like those of any views; ``ValueError`` if pictures are missing.
    """
    from tpt_nb.datasets import Dataset
    from tpt_nb.features import encode

    pictures.check(list(dataset.ids), n)
    digest = hashlib.sha256(json.dumps(pictures.key, sort_keys=True).encode()).hexdigest()[:16]
    rows = Dataset(
        name=f"{dataset.name}-generated",
        classnames=list(dataset.classnames),
        ids=list(dataset.ids),
        targets=list(dataset.targets),
        fingerprint=digest,
        fetch=_Stored(pictures, tuple(dataset.ids), n),
    )
    return encode(rows, clip, Row(n, clip.image_size), cache=cache, workers=0, progress=progress)


def most_similar(views: Tensor, original: Tensor, keep: float) -> Tensor:
    """Indices ``[B,k]`` of the views most similar to the original, in the order of the views.

    Args:
        views: ``[B,V,D]`` features or logits.
        original: ``[B,D]``.
        keep: fraction in [0,1]; k = int(V * keep), as the published code rounds.
    """
    if not 0 <= keep <= 1:
        raise ValueError(f"keep is {keep}; it must be a fraction in [0,1], DiffTPT has 0.8.")
    cosine = F.cosine_similarity(views, original[:, None], dim=-1)
    k = int(views.shape[1] * keep + 1e-9)  # 0.7 * 10 is a little less than 7
    best = cosine.argsort(dim=1, descending=True, stable=True)[:, :k]
    return best.sort(dim=1).values


def filter_views(
    features: Tensor,
    generated: Tensor,
    logits: Tensor | None = None,
    scope: str = "generated",
    keep: float = 0.8,
) -> Tensor:
    """Indices ``[B,k]`` into the views (features, then generated) that the cosine filter keeps.

    Args:
        features: ``[B,V,D]``, the original first, then its crops.
        generated: ``[B,G,D]``.
        logits: ``[B,V+G,C]``: compare these; None: compare the features.
        scope: "generated": crops are kept unseen (the paper); "all": every view but the original
            has to pass (the code). The original always stays, first.
    """
    if scope not in ("generated", "all"):
        raise ValueError(f"scope is {scope!r}; it must be 'generated' (the paper) or 'all' (code).")
    vectors = torch.cat([features, generated], 1) if logits is None else logits
    first = features.shape[1] if scope == "generated" else 1
    kept = first + most_similar(vectors[:, first:], vectors[:, 0], keep)
    always = torch.arange(first, device=kept.device).expand(len(kept), -1)
    return torch.cat([always, kept], 1)


@dataclass
class Generated:
    """Features of generated views by image id, and what they cost.

    ``features`` ``[N,G,D]``; ``seconds``: "encode" and "generate", of all N images.
    """

    ids: Sequence[str]
    features: Tensor
    seconds: dict[str, float] = field(default_factory=dict)

    def of(self, ids: Sequence[str]) -> Tensor:
        """``[B,G,D]`` of these images."""
        place = {image_id: i for i, image_id in enumerate(self.ids)}
        return self.features[[place[image_id] for image_id in ids]]


def difftpt(
    features: Tensor,
    prompts,
    generated: Generated | Tensor | None = None,
    ids: Sequence[str] | None = None,
    similar: str = "features",
    scope: str = "generated",
    keep: float = 0.8,
    rho: float = 0.3,
    steps: int = 4,
    lr: float = 5e-3,
    optimizer: str = "adamw",
    exact: str = "fast",
    n_images: int | None = None,
    cache: str | Path | None = None,
) -> Adapted:
    """DiffTPT: TPT on crops and generated views, filtered by similarity, then by entropy.

    The prediction is that of the original view under the tuned prompt; ``selected`` is over the
    views in the order original, crops, generated.

    Args:
        features: ``[B,V,D]``, the original first, then crops.
        generated: of the same images: features ``[B,G,D]``, or :class:`Generated` with ``ids``.
        similar: cosine of "features" (the paper) or of "logits" (the code).
        scope: which views have to pass, see :func:`filter_views`.
        keep: fraction that passes; 1 is no filter.
        rho: fraction of the rest that is kept for its low entropy.
        steps, lr, optimizer, exact, n_images, cache: as in :func:`tpt_nb.adapt.tpt`.
    """
    extra = _generated(features, generated, ids, prompts)
    if similar not in ("features", "logits"):
        raise ValueError(f"similar is {similar!r}; it must be 'features' (the paper) or 'logits'.")
    every = torch.cat([features, extra], 1)
    logits = _initial_logits(every, prompts).to(every.device) if similar == "logits" else None
    kept = filter_views(features, extra, logits, scope, keep)
    chosen = every.gather(1, kept[..., None].expand(-1, -1, every.shape[-1]))
    options = {"optimizer": optimizer, "exact": exact, "n_images": n_images, "cache": cache}
    done = tpt(chosen, prompts, rho=rho, lr=lr, steps=steps, **options)
    selected = torch.zeros(every.shape[:2], dtype=torch.bool, device=every.device)
    done.selected = selected.scatter(1, kept, done.selected)
    return done


def difftpt_code(
    features: Tensor,
    prompts,
    generated: Generated | Tensor | None = None,
    ids: Sequence[str] | None = None,
    keep: float = 0.8,
    rho: float = 0.3,
    steps: int = 4,
    lr: float = 5e-3,
    optimizer: str = "adamw",
    exact: str = "fast",
    n_images: int | None = None,
    cache: str | Path | None = None,
) -> Adapted:
    """:func:`difftpt` as the published code runs: cosine of logits, of all views; four steps."""
    options = {"keep": keep, "rho": rho, "steps": steps, "lr": lr, "optimizer": optimizer}
    options |= {"exact": exact, "n_images": n_images, "cache": cache}
    return difftpt(features, prompts, generated, ids, "logits", "all", **options)


def difftpt_paper(
    features: Tensor,
    prompts,
    generated: Generated | Tensor | None = None,
    ids: Sequence[str] | None = None,
    keep: float = 0.8,
    rho: float = 0.3,
    steps: int = 4,
    lr: float = 5e-3,
    optimizer: str = "adamw",
    exact: str = "fast",
    n_images: int | None = None,
    cache: str | Path | None = None,
) -> Adapted:
    """:func:`difftpt` as the paper says: cosine of image features, of generated views only."""
    options = {"keep": keep, "rho": rho, "steps": steps, "lr": lr, "optimizer": optimizer}
    options |= {"exact": exact, "n_images": n_images, "cache": cache}
    return difftpt(features, prompts, generated, ids, "features", "generated", **options)


def difftpt_vote(
    features: Tensor,
    prompts,
    generated: Generated | Tensor | None = None,
    ids: Sequence[str] | None = None,
    rho: float = 0.1,
) -> Adapted:
    """Votes of the confident ones among the same views: nothing tuned, no filter for similarity."""
    extra = _generated(features, generated, ids, prompts)
    return vote(torch.cat([features, extra], 1), prompts, rho)


def _generated(features: Tensor, generated, ids, prompts) -> Tensor:
    """Features of the generated views of a batch, ``[B,G,D]``."""
    _check_features(features, prompts)
    if generated is None:
        raise ValueError(
            "DiffTPT needs generated views: pass generated=[B,G,D], features of variations of the "
            "same images (generated_features)."
        )
    if isinstance(generated, Generated):
        if ids is None:
            raise ValueError("generated views by image id need ids=..., those of the features.")
        generated = generated.of(ids)
    if generated.ndim != 3 or generated.shape[::2] != features.shape[::2]:
        raise ValueError(
            f"generated views have shape {list(generated.shape)}, the views {list(features.shape)};"
            " expected [B,G,D] and [B,V,D] with the same B and D."
        )
    return generated.to(features)


def bind(method: Callable, config, clip, dataset) -> Callable:
    """A method with the generated views that a (filled-in) run configuration names."""
    n = config.n_generated
    if config.generator == "crops":
        made = _further_crops(config, clip, dataset, n)
    else:
        generator = load_generator(config.generator, config.device)
        pictures = pictures_of(
            dataset, generator, config.generator_seed, config.cache, command_of(config)
        )
        features = generated_features(dataset, clip, pictures, n, config.cache)
        seconds = sum(pictures.seconds(image_id, n) for image_id in features.ids)
        seconds = {"encode": features.seconds, "generate": seconds}
        made = Generated(features.ids, features.features, seconds)
    bound = functools.partial(method, generated=made)
    bound.seconds = made.seconds
    return bound


def _further_crops(config, clip, dataset, n: int) -> Generated:
    """In place of generated views: the crops that come after those of the run."""
    from tpt_nb.features import encode
    from tpt_nb.views import AUGMENTERS, RandomViews, make_augmenter

    kind = AUGMENTERS[config.augmenter]
    if kind is not RandomViews:
        raise ValueError(
            f"generator='crops' continues the random crops; augmenter {config.augmenter!r} makes "
            "no more views of the same kind."
        )
    params = {name: getattr(config, name) for name in kind.__dataclass_fields__ if name != "size"}
    params["n_aug"] = config.n_aug + n
    augmenter = make_augmenter(config.augmenter, clip.image_size, **params)
    features = encode(dataset, clip, augmenter, config.seed, Path(config.cache), config.workers)
    share = n / (config.n_aug + n + 1)  # of the time for all of these views
    crops = features.features[:, config.n_aug + 1 :]
    return Generated(features.ids, crops, {"encode": share * features.seconds})


def command_of(config) -> str:
    """The command that makes the pictures of a run."""
    words = ["python -m tpt_nb generate", f"--dataset {config.dataset}"]
    words += [f"--root {config.root}"] if config.root else []
    words += [f"--reduced_size {config.reduced_size}"] if config.reduced_size else []
    words += [f"--subset_seed {config.subset_seed}"] if config.subset_seed else []
    words += [f"--generator {config.generator}", f"--n_generated {config.n_generated}"]
    words += [f"--generator_seed {config.generator_seed}"] if config.generator_seed else []
    if Path(config.cache) != cache_dir():
        words.append(f"--cache {config.cache}")
    return " ".join(words)


def check_pictures(config, dataset) -> None:
    """Raise ``ValueError`` if pictures that a run needs are not there, before it starts."""
    if config.generator != "crops":
        generator = load_generator(config.generator, config.device)
        made = pictures_of(
            dataset, generator, config.generator_seed, config.cache, command_of(config)
        )
        made.check(list(dataset.ids), config.n_generated)


NAMES = tuple(m.__name__ for m in (difftpt, difftpt_code, difftpt_paper, difftpt_vote))
