"""Votes of the views: vote, ZERO, and our own."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tpt_nb.losses import entropy, select_confident
from tpt_nb.methods.method import (
    Adapted,
    Method,
    as_mask,
    back,
    check_features,
    initial_logits,
    not_negative,
    option,
    positive,
    rho,
    take,
    weight_of,
)
from tpt_nb.models import Prompts, TemplatePrompts

TIE = 1e-3  # weight of the mean probability beside whole votes: it decides between equal counts


@dataclass(frozen=True)
class Options:
    rho: float = rho()


@dataclass(frozen=True)
class ZeroOptions:
    rho: float = rho(0.3)


@dataclass(frozen=True)
class ContrastOptions:
    contrast: float = option(0.4, "share of the views' mean logits that is taken off each view's")
    temperature: float = positive(2.0, "softens the predictions")
    image: float = not_negative(2.0, "votes of the whole image")


@torch.no_grad()
def vote(features: Tensor, prompts: Prompts | TemplatePrompts, options: Options) -> Adapted:
    """The class that most of the confident views predict; ties go to the more probable class.

    ``logits`` are the logarithms of the shares of the votes (a class without votes keeps a trace of
    its mean probability), so that their softmax is the share and not a certainty; ``loss`` is the
    entropy of that.
    """
    logits = initial_logits(features, prompts)
    chosen = select_confident(logits, options.rho)
    counts, mean = _votes(logits, chosen)
    return _voted(features, logits, chosen, counts, mean)


@torch.no_grad()
def zero(features: Tensor, prompts: Prompts | TemplatePrompts, options: ZeroOptions) -> Adapted:
    """ZERO with exact votes: Farina et al., "Frustratingly Easy Test-Time Adaptation", 2024.

    The limit that the paper describes, temperature to 0: every confident view casts one vote. Equal
    counts: the remaining views are asked in order of their confidence, and the first that predicts
    one of the tied classes decides; if none does, the more probable class. (The published code
    slips then, and its votes are not whole, see :func:`zero_fp16`.)
    """
    logits = initial_logits(features, prompts)
    chosen, rest = _by_confidence(logits, options.rho)
    counts, mean = _votes(logits, chosen)
    tied = counts == counts.amax(-1, keepdim=True)
    winner = _first_among(take(logits, rest).argmax(-1), tied)
    undecided = (tied.sum(-1) > 1) & (winner >= 0)
    counts += F.one_hot(winner.clamp_min(0), counts.shape[-1]) * undecided[:, None]
    return _voted(features, logits, chosen, counts, mean)


@torch.no_grad()
def zero_fp16(
    features: Tensor, prompts: Prompts | TemplatePrompts, options: ZeroOptions
) -> Adapted:
    """ZERO as its code runs: in half precision, where "temperature 0" is not 0.

    The code divides cosines by the smallest step of their type. Under mixed precision that is
    2^-10, about ten times CLIP's inverse scale: a sharpened mean, no vote. Cosines are rounded to
    half precision, from features in half precision, as a GPU does it. Exactly equal sums: the
    remaining views are asked in order of their confidence, and the first that predicts a tied class
    gets one vote more; if none does, the code masks the wrong classes (``~i`` of a number is
    ``-1-i``) and gives the vote to the best of the others in the first of those views, which may be
    too little to win. All of that is kept here.

    This is the code since its commit cbd7949 (2 November 2024). Before, it asked the views
    ``k, k+1, ...`` in the order in which they were made: some of them had voted already.

    ``logits`` are the log of the mean of the sharpened predictions.
    """
    logits = initial_logits(features, prompts)
    x, text = features.to(weight_of(prompts)), prompts.text_features()
    cosines = (x.half().float() @ text.half().float().T).half()
    scaled = (cosines * prompts.clip.logit_scale.to(cosines.device)).half().float()
    chosen, others = _by_confidence(scaled, options.rho)
    sharp = (cosines.float() / torch.finfo(torch.float16).eps).softmax(-1)
    sums = take(sharp, chosen).sum(1)
    tied = sums == sums.amax(-1, keepdim=True)
    several = tied.sum(-1) > 1
    rest = take(cosines, others)
    if rest.shape[1] and several.any():
        winner = _first_among(rest.argmax(-1), tied)
        wrong = rest[:, 0].float().masked_fill(tied.flip(-1), -torch.inf)  # ~i counts from the end
        winner = torch.where(winner < 0, wrong.argmax(-1), winner)
        sums = sums + F.one_hot(winner, sums.shape[-1]) * several[:, None]
    mean = sums / chosen.shape[-1]
    out = (mean / mean.sum(-1, keepdim=True)).clamp_min(torch.finfo(mean.dtype).tiny).log()
    mask = as_mask(chosen, features)
    return Adapted(*back(features, out, logits[:, 0], entropy(out), mask))


@torch.no_grad()
def contrast_vote(
    features: Tensor, prompts: Prompts | TemplatePrompts, options: ContrastOptions
) -> Adapted:
    """Our own: every view votes, against what all views say, and the whole image votes too.

    1. *Contrast.* What every crop of an image says, whatever it shows, tells of its background,
       its style and the classes that the model likes anyway, not of the object. So a share
       ``contrast`` of the mean of the views' logits is taken off each view's.
    2. *Certainty as weight.* A view votes for class c with p_c times p_c: with its prediction, as
       much as it is sure of it. No view is selected, so nothing hangs on how many; the
       ``temperature`` softens predictions that are surer than they should be.
    3. *The whole image.* Crops are enlarged parts: where they mislead (noise, lines, a style that
       is made of its whole), the image is the safer witness. It has ``image`` votes beside those of
       the views, by the same rule, without the contrast.

    ``score = sum_i softmax((z_i - contrast mean_j z_j) / T)^2 + image softmax(z_0 / T)^2``, class
    by class; ``logits`` are the logarithms of the scores, normalised to sum to 1. One softmax over
    the views, no sorting, no gradient. Its three numbers were chosen on ``iconshift-v2``,
    ``iconshift-dev`` and damaged copies of V2; see notebook 10.
    """
    contrast, temperature, image = options.contrast, options.temperature, options.image
    check_features(features, prompts)
    x, text = features.to(weight_of(prompts)), prompts.text_features()
    scale = prompts.clip.logit_scale.to(x)
    # logits are linear in the features, so the contrast is taken there, where it is cheaper
    against = x - contrast * x.mean(1, keepdim=True)
    score = (scale / temperature * against @ text.T).softmax(-1).square_().sum(1)
    before = scale * x[:, 0] @ text.T
    score += image * (before / temperature).softmax(-1).square_()
    out = (score / score.sum(-1, keepdim=True)).clamp_min(torch.finfo(score.dtype).tiny).log()
    mask = torch.ones(x.shape[:2], dtype=torch.bool)
    return Adapted(*back(features, out, before, entropy(out), mask))


def _by_confidence(logits: Tensor, share: float) -> tuple[Tensor, Tensor]:
    """The confident views ``[B,k]`` and the others ``[B,V-k]``, the surest first in both."""
    k = select_confident(logits, share).shape[-1]
    order = select_confident(logits, 1.0)
    return order[:, :k], order[:, k:]


def _votes(logits: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Votes and mean probabilities of the chosen views, both ``[B,C]``."""
    kept = take(logits, chosen)
    counts = F.one_hot(kept.argmax(-1), logits.shape[-1]).sum(1).to(logits)
    return counts, kept.softmax(-1).mean(1)


def _voted(features, logits, chosen, counts, mean) -> Adapted:
    score = counts + TIE * mean
    out = score / score.sum(-1, keepdim=True)
    out = out.clamp_min(torch.finfo(out.dtype).tiny).log()
    mask = as_mask(chosen, features)
    return Adapted(*back(features, out, logits[:, 0], entropy(out), mask))


def _first_among(predictions: Tensor, allowed: Tensor) -> Tensor:
    """The first of each row's predictions ``[B,n]`` that is allowed ``[B,C]``, or -1: ``[B]``."""
    if not predictions.shape[1]:
        return predictions.new_full((len(predictions),), -1)
    hit = allowed.gather(1, predictions)
    first = predictions.gather(1, hit.int().argmax(1, keepdim=True))[:, 0]
    return torch.where(hit.any(1), first, -1)


VOTE = Method(vote, Options)
ZERO = Method(zero, ZeroOptions, paper="ZERO, 2024")
ZERO_FP16 = Method(zero_fp16, ZeroOptions, paper="ZERO's code, 2024")
CONTRAST_VOTE = Method(contrast_vote, ContrastOptions)
