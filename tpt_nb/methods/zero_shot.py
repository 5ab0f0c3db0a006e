"""Zero-shot, and the mean of the confident views."""

import torch
from torch import Tensor

from tpt_nb.losses import entropy, log_mean_prob, marginal_entropy, select_confident
from tpt_nb.methods.method import Adapted, _as_mask, _back, _initial_logits
from tpt_nb.models import Prompts, TemplatePrompts


@torch.no_grad()
def zero_shot(features: Tensor, prompts: Prompts | TemplatePrompts) -> Adapted:
    """View 0 under the initial prompt; ``loss`` is the entropy of that prediction."""
    logits = _initial_logits(features[:, :1], prompts)[:, 0].to(features.device)
    selected = torch.zeros(features.shape[:2], dtype=torch.bool, device=features.device)
    selected[:, 0] = True
    return Adapted(logits, logits, entropy(logits), selected)


@torch.no_grad()
def confident_view(
    features: Tensor, prompts: Prompts | TemplatePrompts, rho: float = 0.1
) -> Adapted:
    """Mean prediction of the most confident views, without tuning.

    ``logits`` are log mean probabilities, ``loss`` is their entropy: the marginal entropy.
    """
    logits = _initial_logits(features, prompts)
    chosen = torch.vmap(lambda z: select_confident(z, rho))(logits)
    mean = torch.vmap(lambda z, i: log_mean_prob(z[i]))(logits, chosen)
    loss = torch.vmap(lambda z, i: marginal_entropy(z, rho, i))(logits, chosen)
    return Adapted(*_back(features, mean, logits[:, 0], loss, _as_mask(chosen, features)))
