"""OnZeta: labels kept in balance, and class proxies learned from the images themselves.

One setting, as published (for all data sets, with seven templates). Published temperatures are
tau_t = 0.01, which is CLIP's own, and tau_i = 0.04; here they follow the model's scale.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tpt_nb.losses import entropy
from tpt_nb.methods.method import (
    Adapted,
    Method,
    at_least,
    back,
    fraction,
    initial_logits,
    not_negative,
    only_the_image,
    positive,
    share,
)
from tpt_nb.methods.streams import StreamOptions, in_place, orders_of
from tpt_nb.models import Prompts, TemplatePrompts

STATE = 2**19  # numbers in the proxies of streams that go together: they stay in cache


@dataclass(frozen=True)
class Options(StreamOptions):
    proxy_step: float = not_negative(0.5, "c_w: step of the visual proxies")
    balance_step: float = not_negative(20.0, "c_r: step of the balance of classes")
    balance: float = fraction(1.0, "alpha: share of the balanced stream that each class must get")
    mix: float = share(0.8, "beta: weight of the visual proxies at the end of the stream")
    softer: float = positive(4.0, "tau_i / tau_t: temperature of the visual proxies")
    horizon: int | None = at_least(
        1, None, "images that the stream is planned for; default: those that it has"
    )


@torch.no_grad()
def onzeta(
    features: Tensor,
    prompts: Prompts | TemplatePrompts,
    options: Options,
    orders: Tensor | None = None,
) -> Adapted:
    """OnZeta: Qian and Hu, "Online Zero-Shot Classification with CLIP", 2024. One view.

    Image i of n, with feature f: the text features' prediction p is multiplied by ``exp(rho)`` and
    normalised; then ``rho = max(0, rho - c_r / sqrt(i) (p - alpha / C))`` class by class, a
    price that lifts classes predicted too rarely (their dual variables; ``alpha < 1`` asks for
    less). Visual proxies w start as the text features and give ``v = softmax(f.w / tau_i)``. The
    output is ``b v + (1 - b) p`` with ``b = beta sqrt(i / n)``, p as lifted; ``logits`` are its
    logarithm. Then every proxy takes a step on the cross-entropy of v against p and is normalised:
    ``w = norm(w - c_w / sqrt(i) / tau_i (v - p) f)``.

    What it assumes: the *length* n of the stream is known when it begins (``horizon``; here the
    number of images that come, as in the published code), and the stream is *balanced* over the
    classes of the prompt. A stream sorted by class, or one with few of the classes, breaks the
    second. ``loss`` is the entropy of the base prediction.
    """
    base = initial_logits(features[:, :1], prompts)[:, 0]
    x, text = features[:, 0].to(base), prompts.text_features().to(base)
    rows = orders_of(len(x), options, orders)
    scale, p = prompts.clip.logit_scale.to(x), base.softmax(-1)
    size = max(1, STATE // text.numel())
    outs = [_streams(x, p, text, scale, part, options) for part in rows.to(x.device).split(size)]
    logits = in_place(torch.cat(outs), rows, orders)
    return Adapted(*back(features, logits, base, entropy(base), only_the_image(features)))


def _streams(
    x: Tensor, p: Tensor, text: Tensor, scale: Tensor, rows: Tensor, options: Options
) -> Tensor:
    """Images ``[B,D]`` and their base predictions ``[B,C]`` in orders ``[o,B]``: log [o,B,C]."""
    o, n = rows.shape
    c, sharp, horizon = len(text), scale / options.softer, options.horizon or n
    rho, proxies = x.new_zeros(o, c), text.repeat(o, 1, 1)  # [o,C], [o,C,D]
    out = x.new_empty(o, n, c)
    for i in range(n):
        f, root = x[rows[:, i]], math.sqrt(i + 1)
        label = p[rows[:, i]] * rho.exp()
        label /= label.sum(-1, keepdim=True)
        rho = (rho - options.balance_step / root * (label - options.balance / c)).clamp_min_(0)
        seen = (sharp * torch.bmm(proxies, f[..., None])[..., 0]).softmax(-1)
        b = options.mix * math.sqrt(min(1.0, (i + 1) / horizon))
        out[:, i] = b * seen + (1 - b) * label
        step = options.proxy_step / root * sharp * (seen - label)
        proxies.baddbmm_(step[..., None], f[:, None], alpha=-1)
        proxies = F.normalize(proxies, dim=-1, out=proxies)
    return out.clamp_min_(torch.finfo(out.dtype).tiny).log_()


METHOD = Method(onzeta, Options, views="first", kind="online", paper="OnZeta, 2024")
