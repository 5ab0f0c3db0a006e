"""TPS: shifting the class prototypes."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tpt_nb.losses import log_mean_prob, marginal_entropy, select_confident
from tpt_nb.methods.method import (
    Adapted,
    Method,
    as_mask,
    at_least,
    back,
    initial_logits,
    positive,
    rho,
    take,
)
from tpt_nb.models import Prompts, TemplatePrompts


@dataclass(frozen=True)
class Options:
    rho: float = rho()
    shift: float = positive(5e-3, "step of the shift, per coordinate")
    steps: int = at_least(1, 1, "AdamW steps per image", flat="tta_steps", shared=True)


def tps(features: Tensor, prompts: Prompts | TemplatePrompts, options: Options) -> Adapted:
    """TPS: Sui et al., "Just Shift It: Test-Time Prototype Shifting for Zero-Shot Generalization
    with Vision-Language Models", 2024.

    TPT without the text encoder: what is tuned is a shift of each class's text feature, from 0, by
    AdamW steps of size ``shift`` (per coordinate; the paper's learning rate) on the marginal
    entropy of the confident views. As in the published code, each step selects these anew under the
    features moved so far; ``selected`` and ``loss`` are of the first step. View 0 is classified
    with the shifted, re-normalised features. The prototypes may come from a template ensemble, as
    in the paper.
    """
    return shifted(features, prompts, options)


def shifted(
    features: Tensor,
    prompts: Prompts | TemplatePrompts,
    options: Options,
    basis: Tensor | None = None,
    penalty: float = 0.0,
    predict: str = "image",
) -> Adapted:
    """TPS, and what else shifts the text features.

    Args:
        basis: ``[D,k]``; the shift is ``basis @ gamma``, the same for all classes, and AdamW steps
            go to gamma. The views are then those of the first step. None: free, for each class.
        penalty: weight of the squared length of that shift in the loss.
        predict: "image", view 0; "confident", the mean probability of the first step's views.
    """
    logits = initial_logits(features, prompts)
    x, text = features.to(logits), prompts.text_features().detach()
    scale = prompts.clip.logit_scale.to(x)
    chosen = select_confident(logits, options.rho)
    outs, losses_ = [], []
    size = max(1, 2**24 // text.numel())
    each = torch.vmap(lambda z: marginal_entropy(z, 1.0))
    for part, first in zip(x.split(size), chosen.split(size), strict=True):
        shape = text.shape if basis is None else basis.shape[1:]
        delta, views = text.new_zeros(len(part), *shape).requires_grad_(True), first
        step = torch.optim.AdamW([delta], lr=options.shift)
        for i in range(options.steps):
            shift = delta if basis is None else (delta @ basis.T)[:, None]
            moved = F.normalize(text + shift, dim=-1)
            if i and basis is None:
                views = select_confident(scale * part @ moved.detach().mT, options.rho)
            loss = each(scale * take(part, views) @ moved.mT)
            loss = loss + penalty * shift.square().sum((1, 2)) if penalty else loss
            (delta.grad,) = torch.autograd.grad(loss.sum(), delta)
            step.step()
            if i == 0:
                losses_.append(loss.detach())
        with torch.no_grad():
            shift = delta if basis is None else (delta @ basis.T)[:, None]
            moved = F.normalize(text + shift, dim=-1)
            if predict == "image":
                outs.append(scale * torch.einsum("bd,bcd->bc", part[:, 0], moved))
            else:
                outs.append(log_mean_prob(scale * take(part, first) @ moved.mT))
    parts = (torch.cat(outs), logits[:, 0], torch.cat(losses_), as_mask(chosen, features))
    return Adapted(*back(features, *parts))


METHOD = Method(tps, Options, tunes="text", paper="TPS, 2024")
