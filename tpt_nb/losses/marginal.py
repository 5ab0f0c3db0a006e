"""What a loss is, which views it looks at, and the entropies that TPT and R-TPT minimise.

Every loss is called as ``loss(logits [V,C], rho, selected=None) -> scalar``. Row 0 is the
un-augmented image, the logits already carry the logit scale, entropies are in nats. ``selected``
holds the indices of the confident views; without it the loss selects them itself, by
``loss.select(logits, rho)``. Later steps on the same image pass the selection of the first step, as
TPT does. All run under ``torch.vmap``.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Patches:
    """How the views lie, and the settings of the losses that look at patches.

    ``groups`` = (G, n), an augmenter's ``groups``: G = P+1 groups of n views, group 0 the whole
    image and its copies, then the P patches row by row. ``rho_patch``: fraction of a group's views
    that is kept; ``alpha``: of patch_loss6; ``overlap``: of the patches.
    """

    groups: tuple[int, int]
    rho_patch: float = 0.9
    alpha: float = 1.0
    overlap: float = 0.0


@dataclass(eq=False)
class Loss:
    """A loss of the logits of one image's views.

    ``value(logits, selected)`` computes it and ``rule(logits, rho)`` selects; both get the
    :class:`Patches` too if the loss ``needs_patches``, and ``takes`` says which of its settings
    count.
    """

    value: Callable[..., Tensor]
    rule: Callable[..., Tensor]
    about: str = ""
    needs_patches: bool = False
    takes: tuple[str, ...] = ()
    patches: Patches | None = None

    def __post_init__(self) -> None:
        self.__doc__ = self.about or self.value.__doc__

    def select(self, logits: Tensor, rho: float) -> Tensor:
        """Indices ``[k]`` of the views that the loss looks at."""
        return self.rule(logits, rho, *self._where())

    def __call__(self, logits: Tensor, rho: float = 0.1, selected: Tensor | None = None) -> Tensor:
        """The loss, a scalar."""
        selected = self.select(logits, rho) if selected is None else selected
        return self.value(logits, selected, *self._where())

    def _where(self) -> tuple[Patches, ...]:
        if not self.needs_patches:
            return ()
        if self.patches is None:
            raise ValueError("this loss looks at patches: losses.get(name, groups=...) binds them.")
        return (self.patches,)


class _Own(Loss):
    """A reader's function, which gets ``rho`` too."""

    def __call__(self, logits: Tensor, rho: float = 0.1, selected: Tensor | None = None) -> Tensor:
        selected = self.select(logits, rho) if selected is None else selected
        return self.value(logits, rho, selected=selected)


def with_selection(loss: Callable[..., Tensor]) -> Loss:
    """A function of one's own as a :class:`Loss`; a loss stays as it is.

    A function of ``(logits, rho)`` selects for itself in every step. One of
    ``(logits, rho, selected)`` has its rule ``(logits, rho) -> indices`` as attribute ``select``.
    """
    if isinstance(loss, Loss):
        return loss
    rule = getattr(loss, "select", None)
    if rule is None:
        return _Own(lambda logits, rho, selected: loss(logits, rho), select_confident, loss.__doc__)
    return _Own(loss, rule)


def entropy(logits: Tensor) -> Tensor:
    """Shannon entropy of softmax(logits): ``[...,C] -> [...]``, in [0, log C]."""
    return entropy_of(logits.log_softmax(dim=-1))


def entropy_of(log_probs: Tensor) -> Tensor:
    """Entropy of log probabilities: ``[...,C] -> [...]``."""
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


marginal_entropy = Loss(
    lambda logits, selected: entropy_of(log_mean_prob(logits[selected])),
    select_confident,
    """Entropy of the mean prediction over the confident views.

    Shu et al., "Test-Time Prompt Tuning for Zero-Shot Generalization in Vision-Language Models",
    2022.
    """,
)

mean_entropy = Loss(
    lambda logits, selected: entropy(logits[selected]).mean(),
    select_confident,
    """Mean of the entropies of the confident views, each by itself.

    Unlike the marginal entropy it does not ask the views to agree. Sheng et al., "R-TPT", 2025,
    minimise entropy point by point in this way.
    """,
)
