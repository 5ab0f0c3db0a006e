"""Prompts from an image's own caption: with each class name as the caption's subject."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tpt_nb.losses import entropy
from tpt_nb.methods.caption_prompts.captioners import make_captioner
from tpt_nb.methods.caption_prompts.texts import encode_once
from tpt_nb.methods.caption_prompts.words import (
    STANDARD,
    parse_repairs,
    personal_prompts,
    plain_name,
)
from tpt_nb.methods.method import (
    Adapted,
    Method,
    Prepared,
    Setting,
    back,
    check_features,
    only_the_image,
    option,
)
from tpt_nb.models import Prompts, TemplatePrompts


@dataclass(frozen=True)
class Options:
    """What a run can choose."""

    repairs: str = option("none", "none (the project's procedure), all, or some, as span+article")
    captioner: str = option(
        "auto",
        "clip (retrieval with the model), vit-gpt2; auto: clip for the model mini",
        choices=("auto", "clip", "vit-gpt2"),
    )

    def __post_init__(self) -> None:
        parse_repairs(self.repairs)


@torch.no_grad()
def caption_prompts(
    features: Tensor,
    prompts: Prompts | TemplatePrompts,
    options: Options | None = None,
    captioner=None,
    ids: Sequence[str] | None = None,
    memo: dict[str, Tensor] | None = None,
) -> Adapted:
    """Classify view 0 of each image with prompts made from its own caption.

    ``logits_before`` are those of the initial prompt, ``loss`` is the entropy of the prediction.

    Args:
        features: ``[B,V,D]``; only view 0 is used.
        captioner: has ``captions(features [B,D], ids)`` and ``keyword(caption)``.
        memo: see :func:`encode_once`.
    """
    check_features(features, prompts)
    if captioner is None:
        raise ValueError("caption_prompts needs a captioner: ClipCaptioner(clip, classnames).")
    repairs = parse_repairs((options or Options()).repairs)
    clip, names = prompts.clip, prompts.classnames
    x = features[:, 0].to(clip.device).float()
    scale = clip.logit_scale.to(x)
    before = scale * x @ prompts.text_features().to(x).T
    captions = captioner.captions(x, ids)
    lists = [personal_prompts(c, captioner.keyword(c), names, repairs) for c in captions]
    text = encode_once(clip, lists, memo)[0].to(x)
    if "average" in repairs or "weight" in repairs:
        lists = [[STANDARD.format(plain_name(n)) for n in names]]
        standard = encode_once(clip, lists, memo)[0][0].to(x)
        weight = torch.full((len(x),), 0.5, device=x.device)
        if "weight" in repairs:
            own = encode_once(clip, [[c or STANDARD.format("")] for c in captions], memo)[0][:, 0]
            weight = caption_weight(x, own.to(x), standard, scale)
        text = mix(standard, text, weight)
    logits = scale * torch.einsum("bd,bcd->bc", x, text)
    return Adapted(*back(features, logits, before, entropy(logits), only_the_image(features)))


def mix(standard: Tensor, personal: Tensor, weight: Tensor) -> Tensor:
    """Text features between the standard prompts ``[C,D]`` and an image's ``[B,C,D]``, unit norm.

    weight: ``[B]`` share of the caption prompts.
    """
    w = weight[:, None, None]
    return F.normalize((1 - w) * standard + w * personal, dim=-1)


def caption_weight(image: Tensor, caption: Tensor, standard: Tensor, scale: Tensor) -> Tensor:
    """Share of the caption prompts ``[B]``: softmax of caption against best standard prompt.

    0.5 if the caption fits the image exactly as well as the best standard prompt does.

    Args:
        image: ``[B,D]``; caption: ``[B,D]`` features of the captions; standard: ``[C,D]``.
    """
    own = (image * caption).sum(-1)
    best = (image @ standard.T).amax(-1)
    return torch.sigmoid(scale * (own - best))


def _resolve(options: Options, config) -> Options:
    captioner = options.captioner
    if captioner == "auto":
        captioner = "clip" if config.model == "mini" else "vit-gpt2"
    repairs = "+".join(parse_repairs(options.repairs)) or "none"
    return dataclasses.replace(options, repairs=repairs, captioner=captioner)


def _prepare(options: Options, setting: Setting) -> Prepared:
    captioner = make_captioner(options.captioner, setting.clip, setting.dataset, setting.cache)
    return Prepared(lambda x, prompts, ids: caption_prompts(x, prompts, options, captioner, ids))


METHOD = Method(
    caption_prompts, Options, views="first", needs="a caption of each image",
    resolve=_resolve, prepare=_prepare,
)  # fmt: skip
