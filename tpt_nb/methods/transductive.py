"""Transductive methods: all images of a batch at once. StatA, and TransCLIP, which it anchors.

Both fit a Gaussian to the features of each class and ask three things of the assignments z of the
images: near the prediction of CLIP, likely under the Gaussians, alike for images that are alike.
They take turns: z for given Gaussians, Gaussians for given z. Nothing but the image itself (view 0)
is looked at.

The images that are there together are everything here: with the option ``batch`` the stream's
images come so many at a time, and no batch knows of another. Without it the order is of no account.

Both papers have one setting for all data sets, which is the one here.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tpt_nb.losses import entropy
from tpt_nb.methods.method import Adapted, Method, at_least, back, initial_logits, only_the_image
from tpt_nb.methods.streams import StreamOptions, one_or_many, orders_of
from tpt_nb.models import Prompts, TemplatePrompts

ROUNDS, STEPS = 10, 5  # turns; updates of z in each
NEIGHBOURS = 3  # of an image, that pull its assignment to theirs
SOFTNESS = 50.0  # divides what the Gaussians say; half of the pull's weight, over NEIGHBOURS
CONFIDENT = 8  # images whose mean is where a class of TransCLIP starts
MEMORY = 2**28  # bytes of Gaussians that are in work at once, about
ROWS = 4096  # images whose neighbours are looked for at once

Gaussians = tuple[Tensor, Tensor]  # means [N,C,D]; variances [N,C,D], or [N,1,D] if all have one
Update = Callable[[Tensor], Gaussians]


@dataclass(frozen=True)
class Options(StreamOptions):
    batch: int = at_least(
        0, 0, "images of the stream that come together; 0: all of them", flat="stream_batch"
    )


@torch.no_grad()
def stata(
    features: Tensor,
    prompts: Prompts | TemplatePrompts,
    options: Options,
    orders: Tensor | None = None,
) -> Adapted:
    """StatA: Zanella et al., "Realistic Test-Time Adaptation of Vision-Language Models", 2025.

    Class k has a mean and a diagonal variance of its own. They start at its text feature t_k and at
    the variance of all images around the text features of their predictions. A class with n images
    (those whose z is largest there) is then, with ``beta = n / (1 + n)``, between its images and
    the start: the *anchor*, which keeps classes that are not there where the text has them.

    ``mean = norm(beta norm(m) + (1 - beta) t)``, m the mean of the images weighted with z;
    ``variance = beta v + (1 - beta) (v_0 + (t - mean)^2)``, v the weighted variance around the
    mean.

    ``logits`` are the logarithms of z, ``loss`` is the entropy of CLIP's prediction.
    """
    return _in_batches(features, prompts, options, orders, _anchored)


@torch.no_grad()
def transclip(
    features: Tensor,
    prompts: Prompts | TemplatePrompts,
    options: Options,
    orders: Tensor | None = None,
) -> Adapted:
    """TransCLIP (zero-shot): Zanella et al., "Boosting Vision-Language Models with Transduction",
    2024.

    As :func:`stata` without an anchor: the classes share one diagonal variance, which starts at
    1/D; a mean starts at the mean of the 8 images that are surest of the class, and is then that of
    all images weighted with z. So it takes for granted that every class is there.
    """
    return _in_batches(features, prompts, options, orders, _unanchored)


def _in_batches(
    features: Tensor, prompts, options: Options, orders: Tensor | None, gaussians: Callable
) -> Adapted:
    """Cut each stream into batches, and solve those of the same size together."""
    logits = initial_logits(features[:, :1], prompts)[:, 0]
    x, text = features[:, 0].to(logits), prompts.text_features().to(logits)
    b, c = logits.shape
    rows = orders_of(b, options, orders).to(x.device)
    if options.batch and options.batch < b:
        after = logits.new_empty(len(rows) * b, c)
        for part in _batches(rows, options.batch):
            place = part + b * torch.arange(len(part), device=x.device)[:, None, None]
            for at, i in zip(*(_chunks(t, text.numel()) for t in (place, part)), strict=True):
                after[at.flatten()] = _assign(x[i], logits[i], text, gaussians).flatten(0, 1)
        after = after.view(len(rows), b, c)
    else:  # the order is of no account
        after = _assign(x[None], logits[None], text, gaussians).expand(len(rows), -1, -1)
    after, mask = one_or_many(after, orders), only_the_image(features)
    return Adapted(*back(features, after, logits, entropy(logits), mask))


def _batches(rows: Tensor, size: int) -> list[Tensor]:
    """``[O,B]`` -> the full batches ``[O,n,size]``, and what is left ``[O,1,rest]``."""
    full = rows.shape[1] // size * size
    parts = rows[:, :full].unflatten(1, (-1, size)), rows[:, None, full:]
    return [part for part in parts if part.numel()]


def _chunks(part: Tensor, numbers: int) -> tuple[Tensor, ...]:
    """``[O,n,size]`` -> ``[N,size]`` of so many batches that their Gaussians fit into memory."""
    return part.flatten(0, 1).split(max(1, MEMORY // (4 * 8 * numbers)))


def _assign(x: Tensor, logits: Tensor, text: Tensor, gaussians: Callable) -> Tensor:
    """N batches at once: features ``[N,n,D]``, logits ``[N,n,C]`` -> log z ``[N,n,C]``.

    ``z_i`` is proportional to ``p_i exp((log N(f_i; mean, variance) + pull_i) / 50)`` with ``pull``
    = 50 / (2 * 3) times the z of the neighbours, weighted with their cosine: of the three that are
    nearest to i, and of all to which i is one of the three nearest.
    """
    prior, pull = logits.log_softmax(-1), _pull(x)
    start, update = gaussians(x, prior.exp(), text)
    z = prior
    for turn in range(ROUNDS):
        likely = _log_density(x, *(update(z.exp()) if turn else start))
        for _ in range(STEPS):
            z = (prior + likely / SOFTNESS + pull(z.exp())).log_softmax(-1)
    return z


def _anchored(x: Tensor, z: Tensor, text: Tensor) -> tuple[Gaussians, Update]:
    """StatA's Gaussians: where they start, and what they are for given z."""
    # The published code divides by the number of images inside its loop over parts of them, so that
    # with more than 2,500 images its start is the variance of the last part only; here it is of all
    spread = x.square().mean(1) - 2 * (x * (z @ text)).mean(1) + (z @ text.square()).mean(1)
    start = spread[:, None].clamp_min(torch.finfo(x.dtype).tiny)  # [N,1,D]

    def update(z: Tensor) -> Gaussians:
        count = torch.zeros_like(z).scatter_(-1, z.argmax(-1, keepdim=True), 1).sum(1)
        beta = (count / (1 + count))[..., None]  # [N,C,1]
        mean, square = _moments(x, z)
        centre = F.normalize(beta * F.normalize(mean, dim=-1) + (1 - beta) * text, dim=-1)
        own = (square - 2 * centre * mean + centre.square()).clamp_min_(0)
        return centre, beta * own + (1 - beta) * (start + (text - centre).square())

    return (text.expand(len(x), -1, -1), start.expand(-1, len(text), -1)), update


def _unanchored(x: Tensor, z: Tensor, text: Tensor) -> tuple[Gaussians, Update]:
    """TransCLIP's Gaussians: where they start, and what they are for given z."""
    n, d = x.shape[1:]
    surest = z.topk(min(CONFIDENT, n), dim=1).indices  # [N,k,C]
    batch = torch.arange(len(x), device=x.device)[:, None, None]
    means = F.normalize(x[batch, surest].mean(1), dim=-1)

    def update(z: Tensor) -> Gaussians:
        mean, square = _moments(x, z)
        centre = F.normalize(mean, dim=-1)
        mass = z.mean(1)[..., None]
        own = mass * (square - 2 * centre * mean + centre.square())
        return centre, own.sum(1, keepdim=True).clamp_min_(torch.finfo(x.dtype).eps / d)

    return (means, x.new_full((len(x), 1, d), 1 / d)), update


def _moments(x: Tensor, z: Tensor) -> Gaussians:
    """Mean and mean square of the images of each class, weighted with z: [N,C,D]."""
    weight = (z / z.sum(1, keepdim=True).clamp_min(torch.finfo(z.dtype).tiny)).mT
    return weight @ x, weight @ x.square()


def _log_density(x: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    """Of the Gaussians, up to a constant: ``[N,n,D]``, ``[N,C,D]`` -> ``[N,n,C]``."""
    sure = 1 / variance
    distance = x.square() @ sure.mT - 2 * x @ (sure * mean).mT
    distance = distance + (sure * mean.square()).sum(-1)[:, None]
    return -0.5 * (distance + variance.log().sum(-1)[:, None])


def _pull(x: Tensor) -> Callable[[Tensor], Tensor]:
    """What the neighbours of an image say, over SOFTNESS: z ``[N,n,C]`` -> ``[N,n,C]``."""
    size, n = x.shape[:2]
    k = min(NEIGHBOURS, n - 1)
    if not k:
        return torch.zeros_like
    nearest, cosines = [], []
    for part in torch.arange(n, device=x.device).split(ROWS):
        cosine = x[:, part] @ x.mT
        cosine[:, torch.arange(len(part)), part] = -torch.inf  # nobody is a neighbour of oneself
        found = cosine.topk(k, -1)
        nearest.append(found.indices)
        cosines.append(found.values)
    first = n * torch.arange(size, device=x.device)[:, None, None]  # batches lie one after another
    to = (torch.cat(nearest, 1) + first).flatten(0, 1)  # [Nn,k]
    weight = torch.cat(cosines, 1).flatten(0, 1)[..., None] / (2 * k)

    def pull(z: Tensor) -> Tensor:
        flat = z.flatten(0, 1)
        out = torch.zeros_like(flat)
        for j in range(k):  # not [Nn,k,C] at once
            out += weight[:, j] * flat[to[:, j]]
            out.index_add_(0, to[:, j], weight[:, j] * flat)
        return out.view_as(z)

    return pull


STATA = Method(stata, Options, views="first", kind="transductive", paper="StatA, 2025")
TRANSCLIP = Method(transclip, Options, views="first", kind="transductive", paper="TransCLIP, 2024")
