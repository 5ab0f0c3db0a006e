"""TPS: shifting the class prototypes."""

import torch
import torch.nn.functional as F
from torch import Tensor

from tpt_nb.losses import marginal_entropy, select_confident
from tpt_nb.methods.method import Adapted, _as_mask, _back, _initial_logits, _take
from tpt_nb.models import Prompts, TemplatePrompts


def tps(
    features: Tensor,
    prompts: Prompts | TemplatePrompts,
    rho: float = 0.1,
    shift: float = 5e-3,
    steps: int = 1,
) -> Adapted:
    """TPS: Sui et al., "Just Shift It: Test-Time Prototype Shifting for Zero-Shot Generalization
    with Vision-Language Models", 2024.

    TPT without the text encoder: what is tuned is a shift of each class's text feature, from 0, by
    AdamW steps of size ``shift`` (per coordinate; the paper's learning rate) on the marginal
    entropy of the confident views. View 0 is classified with the shifted, re-normalised features.
    The prototypes may come from a template ensemble, as in the paper.
    """
    if not shift > 0 or steps < 1:
        raise ValueError(f"shift must be > 0 and steps at least 1; got {shift} and {steps}.")
    logits = _initial_logits(features, prompts)
    x, text = features.to(logits), prompts.text_features().detach()
    scale = prompts.clip.logit_scale.to(x)
    chosen = select_confident(logits, rho)
    kept = _take(x, chosen)  # [B,k,D]
    outs, losses_ = [], []
    size = max(1, 2**24 // text.numel())
    for part, view0 in zip(kept.split(size), x[:, 0].split(size), strict=True):
        delta = text.new_zeros(len(part), *text.shape).requires_grad_(True)
        step = torch.optim.AdamW([delta], lr=shift)
        for i in range(steps):
            moved = F.normalize(text + delta, dim=-1)
            each = torch.vmap(lambda z: marginal_entropy(z, 1.0))
            loss = each(scale * part @ moved.transpose(1, 2))
            (delta.grad,) = torch.autograd.grad(loss.sum(), delta)
            step.step()
            if i == 0:
                losses_.append(loss.detach())
        with torch.no_grad():
            moved = F.normalize(text + delta, dim=-1)
            outs.append(scale * torch.einsum("bd,bcd->bc", view0, moved))
    parts = (torch.cat(outs), logits[:, 0], torch.cat(losses_), _as_mask(chosen, features))
    return Adapted(*_back(features, *parts))
