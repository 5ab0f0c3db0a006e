"""BCA: two running tables, where each class lies and which class is meant by it.

One setting, TTABC's (2026) for all data sets; it is also the authors' as far as that is printed.
"""

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
    initial_logits,
    positive,
    rho,
    share,
    take,
)
from tpt_nb.methods.streams import StreamOptions, in_place, orders_of
from tpt_nb.models import Prompts, TemplatePrompts

STATE = 2**19  # numbers in the class centres of streams that go together: they stay in cache


@dataclass(frozen=True)
class Options(StreamOptions):
    rho: float = rho()
    centre_above: float = share(0.05, "probability above which an image moves its centre")
    centre_count: float = positive(20_000.0, "images that a centre counts for at the start")
    prior_above: float = share(0.65, "probability above which an image moves its prior")
    prior_count: float = positive(1.0, "images that a prior counts for at the start")


@torch.no_grad()
def bca(
    features: Tensor,
    prompts: Prompts | TemplatePrompts,
    options: Options,
    orders: Tensor | None = None,
) -> Adapted:
    """BCA: Zhou et al., "Bayesian Test-Time Adaptation for Vision-Language Models", 2025.

    Two tables: centres ``mu`` [C,D], at the start the text features, and ``P`` [C,C], the
    probability of class j given centre k, at the start the identity. An image is f, the mean of its
    confident views, normalised: ``s = softmax(scale f.mu)`` says which centre, ``out = s P`` which
    class. Then, with k the largest of ``out``:

    - if ``out_k > 0.05``: ``mu_k = norm((n_k mu_k + f) / (n_k + 1))``, n_k = 20 000, 20 001, ...;
    - if ``out_k > 0.65``: ``P_k = (m_k P_k + out) / (m_k + 1)``, m_k = 1, 2, ...

    With 20 000 to begin with, centres hardly move in a stream of some thousand images; what BCA
    changes is mostly ``P``, and only of classes that are predicted with certainty.

    ``logits`` are the logarithm of ``out``. TTABC's port picks the confident views under the
    centres of the moment; here, as for the other methods, under the text features, so that
    ``selected`` belongs to the image. Its first version normalises the mean of the views, as here;
    its last does not. ``loss`` is the entropy of ``s`` at the start.
    """
    logits = initial_logits(features, prompts)
    x, text = features.to(logits), prompts.text_features().to(logits)
    rows = orders_of(len(x), options, orders)
    chosen = select_confident(logits, options.rho)
    f = F.normalize(take(x, chosen).mean(1), dim=-1)
    scale = prompts.clip.logit_scale.to(x)
    size = max(1, STATE // text.numel())
    parts = rows.to(x.device).split(size)
    after = in_place(torch.cat([_streams(f, text, scale, r, options) for r in parts]), rows, orders)
    loss = entropy(scale * f @ text.T)
    return Adapted(*back(features, after, logits[:, 0], loss, as_mask(chosen, features)))


def _streams(f: Tensor, text: Tensor, scale: Tensor, rows: Tensor, options: Options) -> Tensor:
    """Images ``[B,D]`` in orders ``[o,B]``, one of each stream at a time: log [o,B,C]."""
    o, c = len(rows), len(text)
    centres = text.repeat(o, 1, 1)
    prior = torch.eye(c).to(text).repeat(o, 1, 1)
    n = text.new_full((o, c), options.centre_count)
    m = text.new_full((o, c), options.prior_count)
    stream = torch.arange(o, device=text.device)
    logits = text.new_empty(*rows.shape, c)
    for i in range(rows.shape[1]):
        x = f[rows[:, i]]
        s = (scale * torch.bmm(centres, x[..., None])[..., 0]).softmax(-1)
        out = torch.bmm(s[:, None], prior)[:, 0]
        logits[:, i] = out
        top, k = out.max(-1)

        here = top > options.centre_above
        old, count = centres[stream, k], n[stream, k][:, None]
        new = F.normalize((count * old + x) / (count + 1), dim=-1)
        centres[stream, k] = torch.where(here[:, None], new, old)
        n[stream, k] += here

        here = top > options.prior_above
        old, count = prior[stream, k], m[stream, k][:, None]
        prior[stream, k] = torch.where(here[:, None], (count * old + out) / (count + 1), old)
        m[stream, k] += here
    return logits.clamp_min_(torch.finfo(logits.dtype).tiny).log_()


METHOD = Method(bca, Options, tunes="text", kind="online", paper="BCA, 2025")
