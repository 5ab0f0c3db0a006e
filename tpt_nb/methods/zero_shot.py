"""Zero-shot, and the mean of the confident views."""

from dataclasses import dataclass

import torch
from torch import Tensor

from tpt_nb.losses import entropy, log_mean_prob, marginal_entropy, select_confident
from tpt_nb.methods.method import (
    Adapted,
    Method,
    as_mask,
    back,
    initial_logits,
    only_the_image,
    rho,
)
from tpt_nb.models import Prompts, TemplatePrompts


@dataclass(frozen=True)
class NoOptions:
    """Nothing to choose."""


@dataclass(frozen=True)
class Options:
    rho: float = rho()


@torch.no_grad()
def zero_shot(features: Tensor, prompts: Prompts | TemplatePrompts, options=None) -> Adapted:
    """View 0 under the initial prompt; ``loss`` is the entropy of that prediction."""
    logits = initial_logits(features[:, :1], prompts)[:, 0].to(features.device)
    return Adapted(logits, logits, entropy(logits), only_the_image(features))


@torch.no_grad()
def confident_view(
    features: Tensor, prompts: Prompts | TemplatePrompts, options: Options
) -> Adapted:
    """Mean prediction of the most confident views, without tuning.

    ``logits`` are log mean probabilities, ``loss`` is their entropy: the marginal entropy.
    """
    logits = initial_logits(features, prompts)
    chosen = torch.vmap(lambda z: select_confident(z, options.rho))(logits)
    mean = torch.vmap(lambda z, i: log_mean_prob(z[i]))(logits, chosen)
    loss = torch.vmap(lambda z, i: marginal_entropy(z, options.rho, i))(logits, chosen)
    return Adapted(*back(features, mean, logits[:, 0], loss, as_mask(chosen, features)))


ZERO_SHOT = Method(zero_shot, NoOptions, views="first")
CONFIDENT_VIEW = Method(confident_view, Options)
