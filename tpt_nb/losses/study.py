"""The study's losses over views: soft, hard1, hard5; as written and as coded."""

import inspect
from collections.abc import Callable
from functools import wraps

import torch
from torch import Tensor

from tpt_nb.losses.marginal import Loss, log_mean_prob, select_confident


def select_augmented(logits: Tensor, rho: float) -> Tensor:
    """The confident ones among the augmented views, ``[k]``, k = max(1, int((V-1) * rho))."""
    if logits.shape[-2] < 2:
        raise ValueError(
            "a cross-entropy with the augmented views needs some; there is only the image itself "
            "(n_aug is 0 and there are no patches)."
        )
    return 1 + select_confident(logits[..., 1:, :], rho)


def select_augmented_study(logits: Tensor, rho: float) -> Tensor:
    """The same, but an error where the study's code keeps int((V-1) * rho) = 0 views."""
    views = logits.shape[-2] - 1
    if int(views * rho) == 0:
        raise ValueError(
            f"the study's cross-entropy losses keep int({views} * {rho}) = 0 of the augmented "
            "views and give NaN; use more views, a larger rho, or the loss without _study."
        )
    return select_augmented(logits, rho)


def _selects(rule: Callable[..., Tensor]) -> Callable[[Callable], Loss]:
    """Make a loss of a function of (logits, rho, selected): without ``selected``, the rule selects.

    The keywords of both (``layout``) become keywords of the loss; each gets those that it takes.
    """

    def make(function: Callable[..., Tensor]) -> Loss:
        takes = {f: list(inspect.signature(f).parameters)[2:] for f in (rule, function)}
        layout = [name for name in dict.fromkeys(sum(takes.values(), [])) if name != "selected"]

        @wraps(function)
        def loss(
            logits: Tensor, rho: float = 0.1, selected: Tensor | None = None, **given
        ) -> Tensor:
            unknown = sorted(set(given) - set(layout))
            if unknown:
                raise TypeError(f"{function.__name__} takes no {unknown}; it takes {layout}")
            if selected is None:
                selected = rule(logits, rho, **{k: given[k] for k in takes[rule] if k in given})
            given = {k: given[k] for k in takes[function] if k in given}
            return function(logits, rho, selected, **given)

        del loss.__wrapped__  # its signature has no **given
        loss.select, loss.layout = rule, layout
        return loss

    return make


def _cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """``-sum target * log softmax(logits[0])``; the target ``[C]`` is a constant."""
    return -(target.detach() * logits[0].log_softmax(dim=-1)).sum()


def _peaks(scores: Tensor, k: int) -> Tensor:
    """The k largest of ``[C]``, divided by their sum; 0 elsewhere."""
    best, where = scores.topk(min(k, scores.shape[-1]))
    return torch.zeros_like(scores).scatter(-1, where, best / best.sum())


@_selects(select_augmented)
def crossentropy_soft(logits: Tensor, rho: float, selected: Tensor) -> Tensor:
    """Cross-entropy of the image with the mean prediction of its confident augmented views."""
    return _cross_entropy(logits, log_mean_prob(logits[selected]).exp())


@_selects(select_augmented)
def crossentropy_hard1(logits: Tensor, rho: float, selected: Tensor) -> Tensor:
    """Cross-entropy with the class that is most probable on average in the confident views."""
    return _cross_entropy(logits, _peaks(log_mean_prob(logits[selected]).exp(), 1))


@_selects(select_augmented)
def crossentropy_hard5(logits: Tensor, rho: float, selected: Tensor) -> Tensor:
    """Cross-entropy with the five classes that are most probable on average, renormalised."""
    return _cross_entropy(logits, _peaks(log_mean_prob(logits[selected]).exp(), 5))


def _crossentropy_study(logits, selected, target: Callable[[Tensor], Tensor]) -> Tensor:
    twice = logits[0].softmax(dim=-1).log_softmax(dim=-1)
    return -(target(logits[selected].mean(dim=0)) * twice).sum()


@_selects(select_augmented_study)
def crossentropy_soft_study(logits: Tensor, rho: float, selected: Tensor) -> Tensor:
    """The study's code of :func:`crossentropy_soft`; see the table above."""
    return _crossentropy_study(logits, selected, lambda mean: mean.softmax(dim=-1))


@_selects(select_augmented_study)
def crossentropy_hard1_study(logits: Tensor, rho: float, selected: Tensor) -> Tensor:
    """The study's code of :func:`crossentropy_hard1`; see the table above."""
    return _crossentropy_study(
        logits, selected, lambda mean: _one_hot(mean.detach().argmax(dim=-1), mean)
    )


@_selects(select_augmented_study)
def crossentropy_hard5_study(logits: Tensor, rho: float, selected: Tensor) -> Tensor:
    """The study's code of :func:`crossentropy_hard5`; see the table above."""
    return _crossentropy_study(logits, selected, lambda mean: _peaks(mean, 5))


def _one_hot(classes: Tensor, like: Tensor) -> Tensor:
    """``[...] -> [...,C]`` of the dtype of ``like`` ``[...,C]``; F.one_hot does not run in vmap."""
    return (classes[..., None] == torch.arange(like.shape[-1], device=like.device)).to(like.dtype)
