"""Prompts from an image's own caption."""

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from tpt_nb.core.paths import cache_dir
from tpt_nb.losses import entropy
from tpt_nb.methods.caption_prompts.captioners import ClipCaptioner, ViTGPT2
from tpt_nb.methods.caption_prompts.words import (
    STANDARD,
    _clean,
    parse_repairs,
    personal_prompts,
    quiet_tokens,
    token_length,
)
from tpt_nb.methods.method import Adapted, _check_features
from tpt_nb.models import Clip, causal_tower, has_plain_attention, project_text, text_tower


@torch.no_grad()
def encode_once(
    clip: Clip, lists: Sequence[Sequence[str]], memo: dict[str, Tensor] | None = None
) -> tuple[Tensor, int]:
    """Features of lists of sentences of one length, ``[B,C,D]``, and how many were encoded.

    A sentence that occurs in several lists is encoded once, and what the sentences of a list have
    in common at their beginning runs through the text tower once (:func:`encode_alike`).

    Args:
        memo: sentences that are known from before; new ones are added.
    """
    memo = {} if memo is None else memo
    known = len(memo)
    for some in lists:
        new = list(dict.fromkeys(text for text in some if text not in memo))
        if new:
            memo.update(zip(new, encode_alike(clip, new), strict=True))
    return torch.stack([torch.stack([memo[t] for t in some]) for some in lists]), len(memo) - known


@torch.no_grad()
def encode_alike(clip: Clip, texts: Sequence[str]) -> Tensor:
    """Features ``[N,D]`` as ``clip.encode_text``; cheaper if the texts begin with the same words.

    The tower is causal: the tokens that all texts have in common at the beginning do not see what
    follows, so they are computed once, and each text adds its own rest.
    """
    tower = text_tower(clip.model)
    if len(texts) < 2 or not has_plain_attention(tower):
        with quiet_tokens():
            return clip.encode_text(list(texts)).float()
    with quiet_tokens():
        tokens = clip.tokenizer(list(texts))
    ends = tokens.argmax(dim=1)  # of the end-of-text token, which has the largest id
    alike = int((tokens == tokens[0]).all(dim=0).long().cumprod(0).sum())
    alike = min(alike, int(ends.min()))  # a rest has its end-of-text token at least
    tokens = tokens[:, : int(ends.max()) + 1].to(clip.device)
    position = tower.positional_embedding
    prefix = (tower.token_embedding(tokens[:1, :alike]) + position[:alike]).contiguous()
    suffixes, order = [], []
    for end in sorted(set(ends.tolist())):
        members = (ends == end).nonzero()[:, 0]
        rest = tokens[members.to(tokens.device), alike : end + 1]
        suffixes.append((tower.token_embedding(rest) + position[alike : end + 1])[None])
        order.append(members)
    rows = project_text(tower, causal_tower(tower, prefix, suffixes))[0]
    return F.normalize(rows, dim=-1).float()[torch.cat(order).argsort().to(rows.device)]


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


@torch.no_grad()
def caption_prompts(
    features: Tensor,
    prompts,
    captioner=None,
    repairs: str | Sequence[str] = (),
    ids: Sequence[str] | None = None,
    memo: dict[str, Tensor] | None = None,
) -> Adapted:
    """Classify view 0 of each image with prompts made from its own caption.

    ``logits_before`` are those of the initial prompt, ``loss`` is the entropy of the prediction.

    Args:
        features: ``[B,V,D]``; only view 0 is used.
        captioner: has ``captions(features [B,D], ids)`` and ``keyword(caption)``.
        repairs: see ``REPAIRS``; none is the project's own procedure.
        memo: see :func:`encode_once`.
    """
    _check_features(features, prompts)
    if captioner is None:
        raise ValueError("caption_prompts needs a captioner: ClipCaptioner(clip, classnames).")
    repairs = parse_repairs(repairs)
    clip, names = prompts.clip, prompts.classnames
    x = features[:, 0].to(clip.device).float()
    scale = clip.logit_scale.to(x)
    before = scale * x @ prompts.text_features().to(x).T
    captions = captioner.captions(x, ids)
    length = token_length(clip) if "limit" in repairs else None
    lists = [
        personal_prompts(text, captioner.keyword(text), names, repairs, length) for text in captions
    ]
    text = encode_once(clip, lists, memo)[0].to(x)
    if "average" in repairs or "weight" in repairs:
        standard = encode_once(clip, [[STANDARD.format(_clean(n)) for n in names]], memo)[0][0]
        weight = torch.full((len(x),), 0.5, device=x.device)
        if "weight" in repairs:
            own = encode_once(clip, [[c or STANDARD.format("")] for c in captions], memo)[0][:, 0]
            weight = caption_weight(x, own.to(x), standard.to(x), scale)
        text = mix(standard.to(x), text, weight)
    logits = scale * torch.einsum("bd,bcd->bc", x, text)
    selected = torch.zeros(features.shape[:2], dtype=torch.bool, device=features.device)
    selected[:, 0] = True
    out = (t.to(features.device) for t in (logits, before, entropy(logits)))
    return Adapted(*out, selected)


def bind(config, clip: Clip, dataset) -> Callable:
    """``caption_prompts`` with the captioner that a (filled-in) run configuration names."""
    if config.captioner == "clip":
        captioner = ClipCaptioner(clip, dataset.classnames)
    else:
        position: Mapping[str, int] = {i: k for k, i in enumerate(dataset.ids)}
        name = f"vit-gpt2-{dataset.name}-{dataset.fingerprint[:16]}.json"
        captioner = ViTGPT2(
            config.device,
            fetch=lambda image_id: dataset[position[image_id]][0],
            cache=Path(config.cache or cache_dir()) / "captions" / name,
        )
    return functools.partial(caption_prompts, captioner=captioner)
