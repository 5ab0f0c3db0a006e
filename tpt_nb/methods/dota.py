"""DOTA: a Gaussian per class, fitted to the confident views, beside CLIP's logits.

One setting for all data sets, TTABC's (2026).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tpt_nb.losses import entropy, select_confident
from tpt_nb.methods.gaussian import check_memory, gaussian_scores
from tpt_nb.methods.method import (
    Adapted,
    Method,
    as_mask,
    back,
    fraction,
    initial_logits,
    not_negative,
    option,
    positive,
    rho,
    take,
)
from tpt_nb.methods.streams import StreamOptions, in_place, orders_of
from tpt_nb.models import Prompts, TemplatePrompts

# The authors' eta and weight (their rho), data set by data set, for reference. Not used here.
AUTHORS = {
    "imagenet": (0.2, 0.005),
    "imagenet-a": (0.5, 0.02),
    "imagenet-r": (0.3, 0.0025),
    "imagenet-sketch": (0.8, 0.03),
    "imagenet-v2": (0.1, 0.01),
    "dtd": (0.3, 0.02),
    "eurosat": (3.0, 0.05),
}
CONSTANT = 1e-3  # where the code starts every coordinate of every mean
PART = 2**23  # numbers in the means and covariances of images that are scored together
BLOCK, SLAB = 8, 64  # images, and rows of the covariances, that are added in one go


@dataclass(frozen=True)
class Options(StreamOptions):
    rho: float = rho()
    sigma: float = positive(2e-3, "variance of every feature at the start")
    epsilon: float = fraction(1e-4, "share of the identity in the covariance")
    weight: float = not_negative(
        0.02, "rho of the paper: weight of the Gaussians' score, per confident view seen of a class"
    )
    eta: float = not_negative(0.3, "largest weight of that score")
    start: str = option(
        "constant",
        "of the means: constant (0.001, the code) or text (the text features, its comment)",
        choices=("constant", "text"),
    )


@torch.no_grad()
def dota(
    features: Tensor,
    prompts: Prompts | TemplatePrompts,
    options: Options,
    orders: Tensor | None = None,
) -> Adapted:
    """DOTA: Han et al., "DOTA: Distributional Test-Time Adaptation of Vision-Language Models",
    2025.

    Each class has a mean ``mu_k``, a covariance ``S_k = sigma I`` and a count ``c_k = 1``. An image
    is its confident views: base is the mean of their logits, x the mean of their features (not
    normalised). It is predicted first, with ``L = ((1 - eps) mean_k S_k + eps I)^-1``:

        ``logits = base + min(weight mean(c) / views, eta) (x L mu_k - mu_k L mu_k / 2)``

    and then fitted, each view v being y_vk of class k, the softmax of its own logits, with s_k and
    b_k the sums of y_vk and of y_vk x_v over the views:

        ``S_k = (c_k S_k + sum_v y_vk (x_v - mu_k)(x_v - mu_k)^T) / (c_k + s_k)``
        ``mu_k = (c_k mu_k + b_k) / (c_k + s_k)``,  ``c_k = c_k + s_k``.

    Nothing that is fitted depends on what was predicted: counts and means of a whole stream are
    known beforehand, and images are taken in groups (:class:`Stream`). The state, C covariances of
    D x D, is that of one order; orders go one after the other.

    ``start``: the code of 2026 starts the means at a constant; its comment, and its older versions,
    at the text features. ``loss`` is the entropy of the base.

    Raises:
        ValueError: the covariances do not fit in the memory that is free.
    """
    logits = initial_logits(features, prompts)
    x, text = features.to(logits), prompts.text_features().to(logits)
    rows = orders_of(len(x), options, orders)
    (c, d), bytes_each = text.shape, text.element_size()
    check_memory(
        f"The {c} covariances of {d} x {d} numbers that DOTA keeps",
        bytes_each * (c * d * (d + SLAB) // 2 + 8 * PART),
        x.device,
        "Take fewer classes, or a model with narrower features; freetta and tda need little.",
    )
    chosen = select_confident(logits, options.rho)
    kept, views = take(logits, chosen), take(x, chosen)  # [B,k,C], [B,k,D]
    base, labels = kept.mean(1), kept.softmax(-1)
    start = text if options.start == "text" else torch.full_like(text, CONSTANT)
    part = BLOCK * max(1, PART // (c * d + d * d) // BLOCK)
    after = []
    for row in rows.to(x.device):
        stream = Stream(start, options.sigma)
        for i in row.split(part):
            counts, means, covariance = stream.meet(views[i], labels[i])
            covariance *= 1 - options.epsilon
            covariance.diagonal(dim1=-2, dim2=-1).add_(options.epsilon)
            score = gaussian_scores(views[i].mean(1), means, covariance)
            weight = options.weight * counts.mean(-1, keepdim=True) / kept.shape[1]
            after.append(base[i] + weight.clamp(max=options.eta) * score)
    out = in_place(torch.cat(after).view(*rows.shape, c), rows, orders)
    return Adapted(*back(features, out, logits[:, 0], entropy(base), as_mask(chosen, features)))


class Stream:
    """Counts, means and covariances of C classes, fitted to the images of one stream.

    ``A_k = c_k S_k`` is a sum of outer products: what a class is given is added, and nothing that
    is there changes. So a block of images is added in one product, and the mean covariance before
    each of them is ``sum_k A_k / (C c_k)`` with the A_k before the block, plus what the images of
    the block before it gave. Only the upper triangles are kept, in slabs of rows small enough to
    stay in the processor's cache while a part of the stream passes.
    """

    def __init__(self, start: Tensor, sigma: float) -> None:
        c, d = start.shape
        self.counts, self.means = start.new_ones(c), start
        self.sums = []  # [C,r,D-a] of rows a to a + r and columns from a on
        for a in range(0, d, SLAB):
            slab = start.new_zeros(c, min(SLAB, d - a), d - a)
            slab.diagonal(dim1=-2, dim2=-1).fill_(sigma)
            self.sums.append(slab)

    def meet(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Take n images, in order: views ``[n,k,D]``, labels ``[n,k,C]``.

        Returns:
            As each image found them, counts ``[n,C]``, means ``[n,C,D]`` and the mean covariance
            ``[n,D,D]``, of which the upper triangle holds.
        """
        s, b = y.sum(1), y.mT @ x
        counts = torch.cat([self.counts[None], s]).cumsum(0)
        means = torch.cat([(self.counts[:, None] * self.means)[None], b]).cumsum_(0)
        means /= counts[..., None]
        self.counts, self.means = counts[-1], means[-1].clone()
        counts, means = counts[:-1], means[:-1]
        share = 1 / (counts.shape[1] * counts)

        blocks = [slice(i, i + BLOCK) for i in range(0, len(x), BLOCK)]
        gifts = [_gifts(x[p], y[p], means[p]) for p in blocks]
        covariance = x.new_empty(len(x), x.shape[-1], x.shape[-1])
        for a, sums in zip(range(0, x.shape[-1], SLAB), self.sums, strict=True):
            height = sums.shape[1]
            for p, (who, gift) in zip(blocks, gifts, strict=True):
                rows = share[p] @ sums.flatten(1)
                covariance[p, a : a + height, a:] = rows.view(-1, *sums.shape[1:])
                left, right = gift[..., a : a + height].mT, gift[..., a:]
                if len(who) == len(sums):
                    sums.baddbmm_(left, right)
                else:
                    sums[who] = torch.baddbmm(sums[who], left, right)
        for p in blocks:
            _add_within(covariance[p], x[p], y[p], s[p], b[p], means[p], share[p])
        return counts, means, covariance


def _gifts(x: Tensor, y: Tensor, means: Tensor) -> tuple[Tensor, Tensor]:
    """Classes ``[m]`` that views ``[n,k,D]`` change, and the factors ``[m,n*k,D]`` of their sums.

    A label below the precision of 1 adds less than rounding does to a sum of one image.
    """
    who = (y > torch.finfo(y.dtype).eps).flatten(0, 1).any(0).nonzero()[:, 0]
    away = x[:, None] - means[:, who, None]  # [n,m,k,D]
    away *= y[..., who].mT.sqrt()[..., None]
    return who, away.transpose(0, 1).flatten(1, 2)


def _add_within(
    covariance: Tensor, x: Tensor, y: Tensor, s: Tensor, b: Tensor, means: Tensor, share: Tensor
) -> None:
    """Add to each image's covariance [n,D,D] what the images before it in its block gave.

    ``sum_k w_k sum_v y_vk (x_v - mu_k)(x_v - mu_k)^T``, multiplied out: a sum over views, and one
    over classes of ``(b_k - s_k mu_k / 2) mu_k^T``, which is subtracted with its transpose.
    """
    half = b - 0.5 * s[..., None] * means
    for t in range(1, len(x)):
        mixed = (share[t][:, None] * half[:t]).flatten(0, 1).T @ means[:t].flatten(0, 1)
        views, weight = x[:t].flatten(0, 1), (y[:t] @ share[t]).flatten()
        covariance[t] += (weight[:, None] * views).T @ views - mixed - mixed.T


METHOD = Method(dota, Options, kind="online", paper="DOTA, 2025")
