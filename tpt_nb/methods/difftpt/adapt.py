"""DiffTPT: generated variations of an image as views, filtered, then TPT on what is left.

Feng et al., "Diverse Data Augmentation with Diffusions for Effective Test-time Prompt Tuning",
2023. The first filter keeps 0.8 of the views, by their cosine with the image; the second 0.3 of
what is left, by entropy. Paper and published code differ in the first (option ``rule``): *paper*
compares image features, and only generated views have to pass; *code* compares logits, of all views
but the image. With ``generator="crops"`` the generated views are as many further crops: the control
that the paper lacks.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from tpt_nb import datasets
from tpt_nb.core.paths import cache_dir
from tpt_nb.methods import tpt, tuning, votes
from tpt_nb.methods.difftpt.folder import PictureFolder
from tpt_nb.methods.difftpt.network import MiniGenerator, whole_view
from tpt_nb.methods.difftpt.pictures import Pictures, generate, part_of, pictures_of
from tpt_nb.methods.difftpt.pipeline import load_generator
from tpt_nb.methods.method import (
    Adapted,
    Method,
    Prepared,
    Setting,
    at_least,
    check_features,
    initial_logits,
    option,
    rho,
    take,
)
from tpt_nb.models import Prompts, TemplatePrompts
from tpt_nb.views import RandomViews

NAME = "difftpt"  # in the table of the methods
GENERATE = (  # the options of a run that the command generate has
    *("dataset", "root", "reduced_size", "subset_seed"),
    *("generator", "n_generated", "generator_seed", "cache", "device"),
)


@dataclass(frozen=True)
class ViewOptions:
    """Where the generated views come from."""

    generator: str = option(
        "mini",
        "mini, a diffusers pipeline (id@revision, folder), a folder of pictures "
        "<class>/<name>_<i>.jpg, or crops (the control)",
    )
    n_generated: int | None = at_least(
        1, None, "generated views of an image; default: 16 by mini, 63 by a pipeline"
    )
    generator_seed: int = option(0, "of the generated images")


@dataclass(frozen=True)
class Options(ViewOptions, tuning.TuningOptions):
    rule: str = option("paper", "which first filter: paper, or code", choices=("paper", "code"))
    keep: float = option(
        0.8,
        "fraction that passes the first filter; 1 is no filter",
        holds=lambda x: 0 <= x <= 1,
        allowed="a fraction in [0, 1]",
    )
    rho: float = rho(0.3)
    steps: int = at_least(1, 4, "optimiser steps per image", flat="tta_steps", shared=True)
    optimizer: str = option(
        "adamw", "as of tpt: adamw or sgd", shared=True, choices=tuple(tuning.OPTIMIZERS)
    )
    exact: str = option("fast", "as of tpt: fast, paper or tangent", shared=True, choices=tpt.EXACT)


@dataclass(frozen=True)
class VoteOptions(ViewOptions):
    rho: float = rho()


# --- generated pictures as features --------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """An "augmenter" that cuts a row of ``n`` square pictures into views; nothing is random."""

    n: int
    size: int

    @property
    def n_views(self) -> int:
        return self.n

    def spec(self) -> dict:
        return {"class": "Row", "version": 1, "n": self.n, "size": self.size}

    def __call__(self, image: Image.Image, seed: int = 0) -> Tensor:
        """Views ``[n,3,size,size]`` uint8: each picture resized (bicubic)."""
        s = image.width // self.n
        cells = (image.crop((k * s, 0, (k + 1) * s, s)) for k in range(self.n))
        return torch.cat([whole_view(cell, self.size) for cell in cells])


def as_row(pictures: Tensor) -> Image.Image:
    """Pictures uint8 ``[n,3,S,S]`` side by side, as :class:`Row` takes them."""
    return Image.fromarray(torch.cat(list(pictures), 2).permute(1, 2, 0).numpy())


def generated_features(dataset, clip, pictures: Pictures | PictureFolder, n: int, cache=None):
    """Features ``[N,n,D]`` of the first ``n`` variations of each image, as ``encode`` has them.

    Kept in the feature cache like those of any views; ``ValueError`` if pictures are missing.
    """
    from tpt_nb.features import encode

    pictures.check(dataset.ids, n)
    key = json.dumps(pictures.key, sort_keys=True).encode()
    rows = dataclasses.replace(
        dataset,
        name=f"{dataset.name}-generated",
        fingerprint=hashlib.sha256(key).hexdigest()[:16],
        fetch=lambda i: as_row(pictures.read(dataset.ids[i], n)),
        paths=None,
    )
    return encode(rows, clip, Row(n, clip.image_size), cache=cache, workers=0)


def pictures_for(options: ViewOptions, config, dataset) -> Pictures | PictureFolder:
    """The stored pictures of a (filled-in) run; ``ValueError`` says how to make missing ones."""
    values = vars(config) | vars(options) | {"device": ""}
    values |= {"cache": ""} if Path(config.cache) == cache_dir() else {}
    command = "".join(f" --{name} {values[name]}" for name in GENERATE if values[name])
    generator = load_generator(options.generator, config.device)
    if isinstance(generator, PictureFolder):
        pictures = generator
    else:
        pictures = pictures_of(dataset, generator, options.generator_seed, config.cache)
    pictures.check(dataset.ids, options.n_generated, f"python -m tpt_nb generate{command}")
    return pictures


def make_pictures(options: ViewOptions, config, part: str = "") -> str:
    """Make the pictures of a (filled-in) run, or a part of them; returns what was made, in words.

    ``part``: see :func:`generate`.
    """
    if options.generator == "crops":
        raise ValueError("generator crops is made of views of the run: there is nothing to make.")
    n, root = options.n_generated, config.root or None
    dataset = datasets.load(config.dataset, config.reduced_size, config.subset_seed, root)
    generator = load_generator(options.generator, config.device)
    made = generate(dataset, generator, n, options.generator_seed, config.cache, part)
    mine = part_of(dataset.ids, part)
    seconds = sum(made.seconds(image_id, n) for image_id in mine) / max(1, len(mine))
    of = f"{len(mine)} of {len(dataset)}" if part else f"{len(dataset)}"
    return f"{n} variations of each of {of} images, {seconds:.2f} s per image -> {made.folder}"


def _further_crops(setting: Setting, n: int):
    """In place of generated views: features, whose last ``n`` are the crops after the run's, and
    the seconds of these.
    """
    from tpt_nb.features import encode

    views, config = setting.augmenter, setting.config
    if not isinstance(views, RandomViews):
        raise ValueError(
            f"generator='crops' continues the random crops; augmenter {config.augmenter!r} makes "
            "no more views of the same kind."
        )
    more = dataclasses.replace(views, n_aug=views.n_aug + n)
    made = encode(setting.dataset, setting.clip, more, setting.seed, setting.cache, config.workers)
    share = n / more.n_views  # of the time for all of these views
    return made, {"encode": share * made.seconds}


# --- the methods ---------------------------------------------------------------------------------


def filter_views(vectors: Tensor, first: int = 1, keep: float = 0.8) -> Tensor:
    """Indices ``[B,k]``, ascending, of the views that the cosine filter keeps.

    Args:
        vectors: features ``[B,V,D]`` (the paper) or logits ``[B,V,C]`` (the code), the original
            first, then crops, then generated views.
        first: views before this one are kept unseen: 1 in the code, the number of the original and
            its crops in the paper.
        keep: fraction in [0,1] of the others.
    """
    if not 0 <= keep <= 1:
        raise ValueError(f"keep is {keep}; it must be a fraction in [0,1], DiffTPT has 0.8.")
    cosine = F.cosine_similarity(vectors[:, first:], vectors[:, :1], dim=-1)
    k = int(cosine.shape[1] * keep)  # as the published code rounds, in binary: 90 * 0.7 is 62
    kept = first + cosine.argsort(dim=1, descending=True, stable=True)[:, :k]
    always = torch.arange(first, device=kept.device).expand(len(kept), -1)
    return torch.cat([always, kept.sort(dim=1).values], 1)


def difftpt(
    features: Tensor, prompts: Prompts, options: Options, generated: Tensor | None = None
) -> Adapted:
    """DiffTPT: TPT on crops and generated views, filtered by similarity, then by entropy.

    The prediction is that of the original view under the tuned prompt; ``selected`` is over the
    views in the order original, crops, generated.

    Args:
        features: ``[B,V,D]``, the original first, then crops.
        generated: ``[B,G,D]``, features of variations of the same images.
    """
    every = _with_generated(features, prompts, generated)
    if options.rule == "paper":
        kept = filter_views(every, features.shape[1], options.keep)
    else:
        kept = filter_views(initial_logits(every, prompts).to(every.device), 1, options.keep)
    names = ("rho", "lr", "steps", "optimizer", "exact")
    of_tpt = tpt.Options(**{name: getattr(options, name) for name in names})
    done = tpt.tpt(take(every, kept), prompts, of_tpt)
    selected = torch.zeros(every.shape[:2], dtype=torch.bool, device=every.device)
    done.selected = selected.scatter(1, kept, done.selected)
    return done


def difftpt_vote(
    features: Tensor,
    prompts: Prompts | TemplatePrompts,
    options: VoteOptions,
    generated: Tensor | None = None,
) -> Adapted:
    """Votes of the confident ones among the same views: nothing tuned, no filter for similarity."""
    every = _with_generated(features, prompts, generated)
    return votes.vote(every, prompts, votes.Options(options.rho))


def _with_generated(features: Tensor, prompts, generated: Tensor | None) -> Tensor:
    """The views and the generated ones, ``[B,V+G,D]``."""
    check_features(features, prompts)
    if generated is None:
        raise ValueError(
            "DiffTPT needs generated views: pass inputs={'generated': [B,G,D]}, features of "
            "variations of the same images (generated_features)."
        )
    if generated.ndim != 3 or generated.shape[::2] != features.shape[::2]:
        raise ValueError(
            f"generated views have shape {list(generated.shape)}, the views {list(features.shape)};"
            " expected [B,G,D] and [B,V,D] with the same B and D."
        )
    return torch.cat([features, generated.to(features)], 1)


def _prepare(adapt: Callable, options: ViewOptions, setting: Setting) -> Prepared:
    """The method with the generated views that a run names."""
    n = options.n_generated
    if options.generator == "crops":
        made, seconds = _further_crops(setting, n)
    else:
        pictures = pictures_for(options, setting.config, setting.dataset)
        made = generated_features(setting.dataset, setting.clip, pictures, n, setting.cache)
        spent = sum(pictures.seconds(image_id, n) for image_id in made.ids)
        seconds = {"encode": made.seconds, "generate": spent}
    place = {image_id: i for i, image_id in enumerate(made.ids)}

    def adapt_to(features: Tensor, prompts, ids) -> Adapted:
        generated = made.at([place[image_id] for image_id in ids])[:, -n:]
        return adapt(features, prompts, options, generated)

    return Prepared(adapt_to, seconds)


def _resolve(options: ViewOptions, config) -> ViewOptions:
    """The number of variations that is usual for the generator, the learning rate of the model."""
    if isinstance(options, Options):
        options = tuning.resolve(options, config)
    crops = options.generator == "crops"
    made = MiniGenerator if crops else load_generator(options.generator)  # raises for bad names
    return dataclasses.replace(options, n_generated=options.n_generated or made.usual)


def _identity(options: ViewOptions, config) -> dict:
    """A generator counts with its weights."""
    if options.generator == "crops":
        return {}
    spec = load_generator(options.generator).spec()
    return {"options": dataclasses.asdict(options) | {"generator": spec}}


def _method(adapt: Callable, options: type, **more) -> Method:
    more |= {"needs": "generated views of the images", "prepare": partial(_prepare, adapt)}
    return Method(adapt, options, resolve=_resolve, identity=_identity, **more)


METHOD = _method(
    difftpt,
    Options,
    tunes="context",
    aliases={"difftpt_paper": {"rule": "paper"}, "difftpt_code": {"rule": "code"}},
    paper="DiffTPT, 2023",
)
VOTE = _method(difftpt_vote, VoteOptions)
