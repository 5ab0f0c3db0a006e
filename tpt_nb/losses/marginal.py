"""TODO"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

Loss = Callable[..., Tensor]


def entropy(logits: Tensor) -> Tensor:
    """Shannon entropy of softmax(logits): ``[...,C] -> [...]``, in [0, log C]."""
    log_probs = logits.log_softmax(dim=-1)
    return -(log_probs.exp() * log_probs).sum(dim=-1)


def check_rho(rho: float) -> None:
    """Raise ValueError unless the selection ratio lies in (0,1]."""
    if not 0 < rho <= 1:
        raise ValueError(f"the selection ratio rho must lie in (0,1], got {rho}; TPT uses 0.1.")


def select_confident(logits: Tensor, rho: float) -> Tensor:
    """Indices of the views with the lowest entropy, most confident first.

    Args:
        logits: ``[V,C]``; view 0 is a candidate like the others.
        rho: selection ratio in (0,1].
    Returns:
        ``[k]`` long with ``k = max(1, int(V * rho))``; ties go to the view that comes first.
    """
    check_rho(rho)
    k = max(1, int(logits.shape[-2] * rho))
    return entropy(logits.detach()).argsort(dim=-1, stable=True)[..., :k]


def log_mean_prob(logits: Tensor) -> Tensor:
    """Log of the mean probability over views: ``[k,C] -> [C]``, computed in log space."""
    log_probs = logits.log_softmax(dim=-1)
    mean = log_probs.logsumexp(dim=-2) - math.log(logits.shape[-2])
    return mean.clamp(min=torch.finfo(logits.dtype).min)


def marginal_entropy(logits: Tensor, rho: float = 0.1, selected: Tensor | None = None) -> Tensor:
    """Entropy of the mean prediction over the confident views.

    Shu et al., "Test-Time Prompt Tuning for Zero-Shot Generalization in Vision-Language Models",
    2022.
    """
    selected = select_confident(logits, rho) if selected is None else selected
    log_probs = log_mean_prob(logits[selected])
    return -(log_probs.exp() * log_probs).sum()


def mean_entropy(logits: Tensor, rho: float = 0.1, selected: Tensor | None = None) -> Tensor:
    """Mean of the entropies of the confident views, each by itself.

    Unlike the marginal entropy it does not ask the views to agree. Sheng et al., "R-TPT", 2025,
    minimise entropy point by point in this way.
    """
    selected = select_confident(logits, rho) if selected is None else selected
    return entropy(logits[selected]).mean()
