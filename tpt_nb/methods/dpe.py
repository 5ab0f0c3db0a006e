"""DPE: text and image prototypes that evolve together along the stream."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tpt_nb.losses import entropy, log_mean_prob, select_confident
from tpt_nb.methods.method import (
    Adapted,
    Method,
    as_mask,
    at_least,
    back,
    initial_logits,
    not_negative,
    option,
    positive,
    rho,
    take,
)
from tpt_nb.methods.streams import StreamOptions, in_place, orders_of
from tpt_nb.models import Prompts, TemplatePrompts

TAU = 0.01  # temperature of the alignment
STATE = 2**19  # numbers in the text prototypes of streams that go together: they stay in cache
# The authors' settings, data set by data set, for reference; they also predict with the confident
# views on ImageNet-A alone, and use text of a language model. Not used here.
AUTHORS = {  # cache_alpha, cache_beta, residual_step, align
    "imagenet": (6.0, 5.0, 6e-4, 0.5),
    "imagenet-a": (6.0, 5.0, 3e-4, 2.5),
    "imagenet-r": (3.0, 8.0, 6e-4, 0.0),
    "imagenet-v2": (3.0, 8.0, 5e-4, 0.5),
    "imagenet-sketch": (7.0, 7.45, 6e-4, 0.2),
    "eurosat": (3.0, 8.0, 5e-5, 0.2),
}


@dataclass(frozen=True)
class Options(StreamOptions):
    rho: float = rho()
    capacity: int = at_least(1, 3, "entries per class of the cache")
    cache_alpha: float = option(6.0, "weight of the cache")
    cache_beta: float = option(5.0, "sharpness of the cache")
    residual_step: float = positive(5e-3, "AdamW step of the residuals, per coordinate")
    adam_eps: float = positive(1e-3, "eps of that AdamW: the authors' 1e-3, or TTABC's 1e-8")
    align: float = not_negative(0.5, "weight of the alignment")
    sure: float = option(0.1, "entropy, over log2 C, below which the text prototypes move on")
    predict: str = option(
        "image",
        "what is classified in the end: the image, or its confident views",
        choices=("image", "confident"),
    )


@dataclass
class State:
    """What o streams remember. In each, classes stand in the order in which they came.

    So those in the cache are the first few *places*, and a product with them is no larger.

    Attributes:
        classes, place: ``[o,C]`` the class at each place, and the place of each class.
        text: ``[o,C,D]`` running mean of text prototypes, not normalised; ``moves`` [o] of them.
        entries, entropy: ``[o,C,capacity,D]``, ``[o,C,capacity]`` the cache; infinity is empty.
        keys: ``[o,C,D]`` mean of each class's entries, not normalised; ``held`` [o] of them.
    """

    classes: Tensor
    place: Tensor
    text: Tensor
    moves: Tensor
    entries: Tensor
    entropy: Tensor
    keys: Tensor
    held: Tensor

    @property
    def mask(self) -> Tensor:
        """``[o,P]`` bool, which of the first P places are held; P is the most of any stream."""
        places = torch.arange(int(self.held.max()), device=self.held.device)
        return places < self.held[:, None]


@torch.no_grad()
def dpe(
    features: Tensor,
    prompts: Prompts | TemplatePrompts,
    options: Options,
    orders: Tensor | None = None,
) -> Adapted:
    """DPE: Zhang et al., "Dual Prototype Evolving for Test-Time Generalization of Vision-Language
    Models", 2024.

    Text prototypes t start as the class features. An image is the mean x of its confident views
    under t; with their marginal entropy it enters the cache of its predicted class, *before* it is
    classified (so does the published code; the paper tells it in another order), and the mean of a
    class's entries is its image prototype k. Residuals of all t and all k, from 0, take one AdamW
    step on the entropy of ``z = scale x.norm(t + r) + alpha exp(-beta (1 - x.norm(k + s)))`` plus
    ``align`` times InfoNCE (temperature 0.01) that each class's k finds its own t among those of
    the classes in the cache. With what they have become the image is classified: view 0, or
    (``predict="confident"``, the code on ImageNet-A) the mean of the views that are now confident.
    If the entropy of that, in nats over log2 C, is below ``sure``, t becomes the running mean of
    itself and norm(t + r), which is not normalised.

    The first AdamW step from 0 is ``-step g / (|g| + eps)``; weight decay has nothing to decay. The
    settings are those of TTABC (2026), one for all data sets. It leaves eps at 1e-8, which moves
    every coordinate by the full step, and divides by log C; the authors' eps is 1e-3.

    ``loss`` is the marginal entropy of the confident views under the class features, and
    ``selected`` are these; a stream selects anew under its own t.
    """
    logits = initial_logits(features, prompts)
    x, text = features.to(logits), prompts.text_features().to(logits)
    rows = orders_of(len(x), options, orders)
    chosen = select_confident(logits, options.rho)
    loss = entropy(log_mean_prob(take(logits, chosen)))
    scale = prompts.clip.logit_scale.to(x)
    size = max(1, STATE // text.numel())
    parts = rows.to(x.device).split(size)
    after = in_place(torch.cat([_streams(x, text, scale, r, options) for r in parts]), rows, orders)
    return Adapted(*back(features, after, logits[:, 0], loss, as_mask(chosen, features)))


def _streams(x: Tensor, text: Tensor, scale: Tensor, rows: Tensor, options: Options) -> Tensor:
    """Images ``[B,V,D]`` in orders ``[o,B]``, one of each stream at a time: logits [o,B,C]."""
    state = _start(text, len(rows), options.capacity)
    out = text.new_empty(*rows.shape, len(text))
    for i in range(rows.shape[1]):
        views = x[rows[:, i]]
        length = state.text.norm(dim=-1, keepdim=True)
        unit = state.text / length
        query, at, sure = _confident(views, unit, scale, options.rho)
        _remember(state, query, at, sure, unit, length)
        new_text, new_keys = _evolve(state, query, unit, length, scale, options)
        if options.predict == "confident":
            query, _, _ = _confident(views, new_text, scale, options.rho)
        else:
            query = views[:, 0]
        z = scale * torch.einsum("od,ocd->oc", query, new_text)
        z[:, : new_keys.shape[1]] += _cached(state, query, new_keys, options)
        out[:, i] = z.gather(1, state.place)
        moves = entropy(z) / math.log2(max(2, len(text))) < options.sure
        state.moves += moves
        state.text.lerp_(new_text, (moves / (state.moves + 1))[:, None, None])
    return out


def _start(text: Tensor, o: int, capacity: int) -> State:
    c, d = text.shape
    classes = torch.arange(c, device=text.device).repeat(o, 1)
    return State(
        classes=classes,
        place=classes.clone(),
        text=text.repeat(o, 1, 1),
        moves=text.new_zeros(o),
        entries=text.new_zeros(o, c, capacity, d),
        entropy=text.new_full((o, c, capacity), torch.inf),
        keys=text.new_zeros(o, c, d),
        held=classes.new_zeros(o),
    )


def _confident(
    views: Tensor, text: Tensor, scale: Tensor, share: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Of the confident among ``[o,V,D]``: mean feature [o,D], place [o], marginal entropy [o]."""
    logits = scale * torch.bmm(views, text.mT)
    chosen = select_confident(logits, share)
    kept = take(logits, chosen)
    return take(views, chosen).mean(1), kept.mean(1).argmax(-1), entropy(log_mean_prob(kept))


def _remember(state: State, query: Tensor, at: Tensor, h: Tensor, *by_place: Tensor) -> None:
    """Put each stream's image in place of the worst of its class, if it is better.

    ``at`` [o] is where that class stands; if it is new, it changes places with the first that is
    not held, also in the tensors ``by_place`` [o,C,...].
    """
    stream = torch.arange(len(at), device=at.device)
    to = torch.minimum(at, state.held)
    for rows in (state.text, state.classes, *by_place):
        rows[stream, at], rows[stream, to] = rows[stream, to], rows[stream, at]
    state.place[stream, state.classes[stream, at]] = at
    state.place[stream, state.classes[stream, to]] = to
    state.held = torch.maximum(state.held, to + 1)

    highest, worst = state.entropy[stream, to].max(-1)
    better = h < highest
    old = state.entries[stream, to, worst]
    state.entries[stream, to, worst] = torch.where(better[:, None], query, old)
    state.entropy[stream, to, worst] = torch.where(better, h, highest)
    filled = state.entropy[stream, to].isfinite().sum(-1, keepdim=True)
    state.keys[stream, to] = state.entries[stream, to].sum(1) / filled  # empty ones are 0


def _cached(state: State, query: Tensor, keys: Tensor, options: Options) -> Tensor:
    """``[o,P]`` what the cache says of queries ``[o,D]``, with keys [o,P,D] of length 1."""
    affinity = torch.exp(-options.cache_beta * (1 - torch.einsum("od,ocd->oc", query, keys)))
    return options.cache_alpha * affinity * state.mask


def _evolve(
    state: State, query: Tensor, text: Tensor, length: Tensor, scale: Tensor, options: Options
) -> tuple[Tensor, Tensor]:
    """Text prototypes ``[o,C,D]`` and image prototypes ``[o,P,D]`` after the step, of length 1.

    The gradient in closed form, in the normalised prototypes: ``text`` are those of the text, and
    ``length`` [o,C,1] is what they were.
    """
    mask = state.mask
    p = mask.shape[1]
    size = state.keys[:, :p].norm(dim=-1, keepdim=True).clamp_min(1e-12)
    keys = state.keys[:, :p] / size
    cached = _cached(state, query, keys, options)
    z = scale * torch.einsum("od,ocd->oc", query, text)
    z[:, :p] += cached
    log_p = z.log_softmax(-1)
    g_z = -log_p.exp() * (log_p + entropy(z)[:, None])  # of the entropy
    g_text = (scale * g_z)[..., None] * query[:, None]
    g_keys = (options.cache_beta * cached * g_z[:, :p])[..., None] * query[:, None]

    if options.align:
        # InfoNCE: S_ij = key_i . text_j / tau; its gradient is softmax_j(S_ij) - [i = j], over n
        pull = torch.bmm(keys, text[:, :p].mT).div_(TAU)
        pull = pull.masked_fill_(~mask[:, None], -torch.inf).softmax(-1)
        pull.diagonal(dim1=-2, dim2=-1).sub_(1)
        pull *= (options.align / TAU / state.held[:, None] * mask)[..., None]
        g_text[:, :p].baddbmm_(pull.mT, keys)
        g_keys.baddbmm_(pull, text[:, :p])
    new_text = _step(state.text, text, length, g_text, options)
    return new_text, _step(state.keys[:, :p], keys, size, g_keys, options)


def _step(old: Tensor, unit: Tensor, length: Tensor, g: Tensor, options: Options) -> Tensor:
    """``norm(old + r)`` after AdamW's first step on r; g is the gradient in ``norm(old)``.

    Through norm it is (g - (g.u) u) / length; the length goes to the side of eps.
    """
    g.addcmul_(unit, torch.linalg.vecdot(g, unit)[..., None], value=-1)
    g.div_(g.abs().add_(options.adam_eps * length))
    moved = torch.add(old, g, alpha=-options.residual_step)
    return F.normalize(moved, dim=-1, out=moved)


METHOD = Method(dpe, Options, tunes="text", kind="online", paper="DPE, 2024")
