"""FreeTTA: a Gaussian per class, fitted to the stream by an online EM, beside CLIP's logits.

One setting, as published for all data sets. No code was found; this is the paper's algorithm as it
was printed where it was read.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from tpt_nb.losses import entropy
from tpt_nb.methods.gaussian import gaussian_scores
from tpt_nb.methods.method import (
    Adapted,
    Method,
    back,
    initial_logits,
    not_negative,
    only_the_image,
    option,
)
from tpt_nb.methods.streams import StreamOptions, in_place, orders_of
from tpt_nb.models import Prompts, TemplatePrompts

STATE = 2**21  # numbers in the means and covariances of streams that go together


@dataclass(frozen=True)
class Options(StreamOptions):
    gaussian: float = option(0.2, "alpha: weight of the Gaussians' score beside CLIP's logits")
    doubt: float = not_negative(4.5, "beta: how fast an image's weight falls with its entropy")
    entropy_unit: str = option(
        "nats",
        "of the entropy in that weight: nats, or share of the largest one, log C",
        choices=("nats", "share"),
    )


@torch.no_grad()
def freetta(
    features: Tensor,
    prompts: Prompts | TemplatePrompts,
    options: Options,
    orders: Tensor | None = None,
) -> Adapted:
    """FreeTTA: Dai et al., "Free on the Fly: Enhancing Flexibility in Test-Time Adaptation with
    Online EM", 2025. One view.

    At the start the means ``mu`` [C,D] are the text features, the shared covariance is I, the
    counts are ``N_k = 1/C`` and their sum is n = 1. An image f with CLIP's prediction p:

    - E: ``g_k = f S^-1 mu_k - mu_k S^-1 mu_k / 2 + log(N_k / n)`` and ``gamma = softmax(g)``;
      ``logits = scale f.t + alpha g``, so every image is predicted by the images before it;
    - M, with weight ``w = exp(-beta H(p))``: ``N_k += w gamma_k``, ``n += w``, each mean becomes
      ``mu_k + w gamma_k / N_k (f - mu_k)``, and, with the new means, the covariance
      ``S + w / (n - 1) sum_k gamma_k (f - mu_k)(f - mu_k)^T``.

    That is how the covariance is printed: a sum over what came, whose terms shrink with n, on top
    of I, and not a mean. So it stays of the order of I, where features have variances of 1/D, and
    ``g`` of the order of 1 beside logits that differ by tens.

    Not printed where it was read: whether H is in nats or divided by log C (``entropy_unit``).
    ``loss`` is the entropy of the base prediction.
    """
    base = initial_logits(features[:, :1], prompts)[:, 0]
    x, text = features[:, 0].to(base), prompts.text_features().to(base)
    rows = orders_of(len(x), options, orders)
    loss = entropy(base)
    unit = math.log(max(2, len(text))) if options.entropy_unit == "share" else 1.0
    weight = torch.exp(-options.doubt * loss / unit)
    size = max(1, STATE // (text.numel() + text.shape[1] ** 2))
    parts = rows.to(x.device).split(size)
    score = in_place(torch.cat([_streams(x, weight, text, r) for r in parts]), rows, orders)
    logits = base + options.gaussian * score
    return Adapted(*back(features, logits, base, loss, only_the_image(features)))


def _streams(x: Tensor, weight: Tensor, text: Tensor, rows: Tensor) -> Tensor:
    """Images ``[B,D]`` of weights ``[B]`` in orders ``[o,B]``, together: scores [o,B,C]."""
    o, (c, d) = len(rows), text.shape
    means, covariance = text.repeat(o, 1, 1), torch.eye(d).to(text).repeat(o, 1, 1)
    counts, seen = text.new_full((o, c), 1 / c), text.new_zeros(o)  # n is 1 + seen
    tiny = torch.finfo(text.dtype).tiny
    out = text.new_empty(*rows.shape, c)
    for i in range(rows.shape[1]):
        f, w = x[rows[:, i]], weight[rows[:, i]]
        g = gaussian_scores(f, means, covariance) + (counts / (1 + seen[:, None])).log()
        out[:, i] = g
        gamma = g.softmax(-1)
        step = w[:, None] * gamma
        counts += step
        seen += w
        away = f[:, None] - means
        share = step / counts
        means.addcmul_(share[..., None], away)
        # f - mu after the step is (1 - share) (f - mu before it)
        root = ((w / seen.clamp_min(tiny))[:, None] * gamma).sqrt() * (1 - share)
        away *= root[..., None]
        covariance.baddbmm_(away.mT, away)
    return out


METHOD = Method(freetta, Options, views="first", kind="online", paper="FreeTTA, 2025")
