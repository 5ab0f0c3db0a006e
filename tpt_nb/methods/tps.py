"""TPS: shifting the class prototypes."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tpt_nb.losses import marginal_entropy, select_confident
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
    logits = initial_logits(features, prompts)
    x, text = features.to(logits), prompts.text_features().detach()
    scale = prompts.clip.logit_scale.to(x)
    chosen = select_confident(logits, options.rho)
    outs, losses_ = [], []
    size = max(1, 2**24 // text.numel())
    each = torch.vmap(lambda z: marginal_entropy(z, 1.0))
    for part, views in zip(x.split(size), chosen.split(size), strict=True):
        delta = text.new_zeros(len(part), *text.shape).requires_grad_(True)
        step = torch.optim.AdamW([delta], lr=options.shift)
        for i in range(options.steps):
            moved = F.normalize(text + delta, dim=-1)
            if i:
                views = select_confident(scale * part @ moved.detach().mT, options.rho)
            loss = each(scale * take(part, views) @ moved.mT)
            (delta.grad,) = torch.autograd.grad(loss.sum(), delta)
            step.step()
            if i == 0:
                losses_.append(loss.detach())
        with torch.no_grad():
            moved = F.normalize(text + delta, dim=-1)
            outs.append(scale * torch.einsum("bd,bcd->bc", part[:, 0], moved))
    parts = (torch.cat(outs), logits[:, 0], torch.cat(losses_), as_mask(chosen, features))
    return Adapted(*back(features, *parts))


METHOD = Method(tps, Options, tunes="text", paper="TPS, 2024")
