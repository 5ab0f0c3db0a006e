"""Our own: what the parts of an image vote times what its whole says, and an online form of it.

The settings were chosen on development data only (``ci/attempts.py``) and then frozen.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tpt_nb.losses import entropy
from tpt_nb.methods.method import (
    Adapted,
    Method,
    back,
    check_features,
    not_negative,
    option,
    positive,
    weight_of,
)
from tpt_nb.methods.streams import StreamOptions, in_place, orders_of
from tpt_nb.models import Prompts, TemplatePrompts

MEMORY = 0.3  # share of the latest image in what the stream showed lately: about three images


@dataclass(frozen=True)
class Options:
    contrast: float = option(0.7, "share of the views' mean logits that is taken off each part's")
    temperature: float = positive(1.3, "softens the predictions of the parts")
    certainty: float = not_negative(1.6, "a part of entropy H has weight exp(-certainty * H)")
    whole: float = not_negative(0.5, "weight of the whole's logits beside the parts' votes")
    near: float = positive(0.1, "cosines by which a view may differ from the image and be whole")
    sharpness: float = positive(1.5, "of the final prediction; moves no class, only calibration")


@dataclass(frozen=True)
class OnlineOptions(Options, StreamOptions):
    prior: float = positive(3.0, "images of each class that count as seen before the stream")


@torch.no_grad()
def parts_and_whole(
    features: Tensor, prompts: Prompts | TemplatePrompts, options: Options
) -> Adapted:
    """A class needs both: parts that are certain of it, and a whole that does not exclude it.

    Crops find small objects in clutter and mislead where the whole is the evidence (a drawing, a
    blurred image); the image itself is the other way round. So the two are multiplied, not chosen
    between: an image that is vague about its classes leaves the word to the parts, and vague parts
    leave it to the image. No label and no threshold is needed.

    1. *Parts.* From each view's logits a share ``contrast`` of the views' mean is taken off, what
       every crop of the image says whatever it shows: ``p_i = softmax((z_i - contrast mean_j z_j) /
       temperature)``. A view votes with p_i, weighted by how sure it is: ``parts_c = sum_i
       exp(-certainty H(p_i)) p_ic``. The weights do not sum to one, nor need they.
    2. *Whole.* The image and the crops that look like it, a small ensemble of nearly whole views:
       ``whole = sum_i u_i z_i``, ``u = softmax(cos(f_i, f_0) / near)``.
    3. ``logits = sharpness (log parts + whole_weight * whole)``.

    One softmax over the views, no sorting, no gradient. ``selected`` is every view, ``loss`` the
    entropy of the result.
    """
    out, before = _scores(features, prompts, options)
    mask = torch.ones(features.shape[:2], dtype=torch.bool)
    return Adapted(*back(features, out, before, entropy(out), mask))


@torch.no_grad()
def parts_and_whole_online(
    features: Tensor,
    prompts: Prompts | TemplatePrompts,
    options: OnlineOptions,
    orders: Tensor | None = None,
) -> Adapted:
    """The same, and what it has predicted so far: classes that come too often are trusted less.

    In a style that a model does not know some classes attract images of all others. Kept is one
    number a class, n_c, the sum of its predicted probabilities, which starts at ``prior``; the
    logits of the next image lose ``log n_c``, up to a constant. Predict first, then count.

    So that a stream sorted by class is not taken for a model that loves a class, an image counts
    with the probability that it is of another class than those just before it: ``1 - sum_c q_c
    r_c``, r the running mean of the predictions q with weight ``MEMORY`` on the latest. A long run
    of one class so counts little more than once.

    ``loss`` is the entropy of the episodic prediction.
    """
    alone, before = _scores(features, prompts, options)
    rows = orders_of(len(features), options, orders)
    count = alone.new_full((len(rows), alone.shape[1]), options.prior)
    lately = torch.zeros_like(count)
    streamed = alone.new_empty(*rows.shape, alone.shape[1])
    for t, now in enumerate(rows.to(alone.device).T):
        streamed[:, t] = alone[now] - (count / count.sum(1, keepdim=True)).log()
        q = streamed[:, t].softmax(-1)
        count += (1 - (q * lately).sum(1, keepdim=True)) * q
        lately += MEMORY * (q - lately)
    out = in_place(streamed, rows, orders)
    mask = torch.ones(features.shape[:2], dtype=torch.bool)
    return Adapted(*back(features, out, before, entropy(alone), mask))


def _scores(features: Tensor, prompts, options: Options) -> tuple[Tensor, Tensor]:
    """``[B,C]`` after and before."""
    check_features(features, prompts)
    x, text = features.to(weight_of(prompts)), prompts.text_features()
    text = prompts.clip.logit_scale.to(x) * text
    # logits are linear in the features, so contrast and mean are taken there, where it is cheaper
    against = (x - options.contrast * x.mean(1, keepdim=True)) / options.temperature
    log_p = (against @ text.T).log_softmax(-1)
    p = log_p.exp()
    weight = (options.certainty * (p * log_p).sum(-1)).exp()
    # summed before the logarithm: a class that no part mentions has the least float, not -inf
    parts = (weight[:, None] @ p)[:, 0].clamp_min(torch.finfo(x.dtype).tiny).log()
    alike = ((x @ x[:, 0, :, None])[..., 0] / options.near).softmax(-1)
    whole = (alike[:, None] @ x)[:, 0] @ text.T
    return options.sharpness * (parts + options.whole * whole), x[:, 0] @ text.T


METHOD = Method(parts_and_whole, Options)
ONLINE = Method(parts_and_whole_online, OnlineOptions, kind="online")
