"""Losses that look at patches: the study's six, as written and as coded, and two that know places.

The table of what the study wrote and coded is in :mod:`tpt_nb.losses.study`.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from tpt_nb.losses.marginal import Loss, Patches, check_rho, entropy, entropy_of, log_mean_prob
from tpt_nb.losses.study import cross_entropy, one_hot
from tpt_nb.views import patch_boxes

EPSILON = 1e-6  # the study's


def _check_groups(logits: Tensor, groups: tuple[int, int]) -> None:
    if logits.shape[-2] != math.prod(groups):
        raise ValueError(
            f"the loss was made for {groups[0]} groups of {groups[1]} views, "
            f"{math.prod(groups)} in all, but there are {logits.shape[-2]}; pass the groups of the "
            "augmenter that made them."
        )


def select_in_groups(logits: Tensor, rho: float, patches: Patches) -> Tensor:
    """Confident views of each group: ``[G*k]``, group by group; k = max(1, int(n * rho_patch))."""
    check_rho(patches.rho_patch)
    _check_groups(logits, patches.groups)
    count, size = patches.groups
    k = max(1, int(size * patches.rho_patch))
    h = entropy(logits.detach()).reshape(count, size)
    first = size * torch.arange(count, device=h.device)[:, None]
    return (h.argsort(dim=-1, stable=True)[:, :k] + first).reshape(count * k)


def _select_in_groups_study(logits: Tensor, rho: float, patches: Patches) -> Tensor:
    """The same, but an error where the study's code keeps int(n * rho_patch) = 0 views."""
    size, rho_patch = patches.groups[1], patches.rho_patch
    if int(size * rho_patch) == 0:
        raise ValueError(
            f"the study's patch losses 1 to 4 keep int({size} * {rho_patch}) = 0 views of "
            "each patch and give NaN; use more copies (n_aug), a larger selection_p_patch, or the "
            "loss without _study."
        )
    return select_in_groups(logits, rho, patches)


def _select_all(logits: Tensor, rho: float, patches: Patches) -> Tensor:
    _check_groups(logits, patches.groups)
    return torch.arange(logits.shape[-2], device=logits.device)


def _kept(logits: Tensor, selected: Tensor, patches: Patches) -> tuple[Tensor, Tensor]:
    """Logits ``[G,k,C]`` of the selected views and the marginal entropies ``[G]`` of the groups."""
    kept = logits[selected].reshape(patches.groups[0], -1, logits.shape[-1])
    return kept, entropy_of(log_mean_prob(kept))


def _vote(kept: Tensor, entropies: Tensor, coded: bool) -> tuple[Tensor, Tensor]:
    """Class of each patch ``[P]``, and the votes of the patches ``[C]``: 1/E_g for class c_g."""
    kept, entropies = kept[1:].detach(), entropies[1:].detach()  # the whole image does not vote
    counts = one_hot(kept.argmax(dim=-1), kept).sum(dim=-2)
    if not coded:  # of equally frequent classes the more probable one
        counts = counts + 0.5 * log_mean_prob(kept).exp()
    classes = counts.argmax(dim=-1)  # the first of equals, as torch.mode
    weights = 1 / (entropies.double() + EPSILON)
    return classes, (one_hot(classes, counts) * weights[:, None]).sum(dim=0)


def _distribution(logits: Tensor, selected: Tensor, patches: Patches, coded: bool) -> Tensor:
    """Cross-entropy of the image with the votes of its patches, weighted by 1/entropy."""
    _, votes = _vote(*_kept(logits, selected, patches), coded)
    return cross_entropy(logits, (votes / votes.sum()).to(logits.dtype))


def _winner(logits: Tensor, selected: Tensor, patches: Patches, coded: bool) -> Tensor:
    """Cross-entropy of the image with the class that wins the weighted vote of its patches."""
    classes, votes = _vote(*_kept(logits, selected, patches), coded)
    best = votes.gather(0, classes).argmax(dim=0, keepdim=True)  # a tie: the first patch's class
    return -logits[0].log_softmax(dim=-1).gather(0, classes.gather(0, best)).sum()


def _weighted(logits: Tensor, selected: Tensor, patches: Patches, coded: bool) -> Tensor:
    """Mean of the groups' marginal entropies, weighted by 1/entropy (constant weights)."""
    _, entropies = _kept(logits, selected, patches)
    weights = 1 / ((entropies if coded else entropies.detach()) + EPSILON)
    return (weights / weights.sum() * entropies).sum()


def _smallest(logits: Tensor, selected: Tensor, patches: Patches, coded: bool) -> Tensor:
    """Marginal entropy of the most confident patch; the whole image is not a patch."""
    _, entropies = _kept(logits, selected, patches)
    return (entropies if coded else entropies[1:]).min()


def _experts(logits: Tensor, selected: Tensor, patches: Patches) -> tuple[Tensor, Tensor]:
    """Per group: log-softmax of the mean logits ``[G,C]`` and its entropy ``[G]``."""
    means = logits[selected].reshape(patches.groups[0], -1, logits.shape[-1]).mean(dim=1)
    log_probs = means.log_softmax(dim=-1)
    return log_probs, entropy_of(log_probs)


def _mixture_entropy(log_probs: Tensor, log_weights: Tensor) -> Tensor:
    """Entropy of the mean of probabilities ``[G,C]`` with constant weights ``[G]``."""
    log_weights = log_weights.detach().log_softmax(dim=-1)
    mean = (log_probs + log_weights[:, None]).logsumexp(dim=0)
    return entropy_of(mean.clamp(min=torch.finfo(mean.dtype).min))


def _product_entropy(log_probs: Tensor, weights: Tensor) -> Tensor:
    """Entropy of the normalised product of experts ``[G,C]`` with these exponents ``[G]``."""
    return entropy_of((log_probs * weights[:, None]).mean(dim=0).log_softmax(dim=-1))


def _by_entropy(logits: Tensor, selected: Tensor, patches: Patches, coded: bool) -> Tensor:
    """Entropy of the groups' mean prediction, weighted by 1/entropy."""
    log_probs, entropies = _experts(logits, selected, patches)
    if coded:
        return _product_entropy(log_probs, 1 / (entropies + EPSILON))
    return _mixture_entropy(log_probs, -(entropies + EPSILON).log())


def _by_exponential(logits: Tensor, selected: Tensor, patches: Patches, coded: bool) -> Tensor:
    """Entropy of the groups' mean prediction, weighted by exp(-alpha * entropy)."""
    log_probs, entropies = _experts(logits, selected, patches)
    if coded:
        return _product_entropy(log_probs, (-patches.alpha * entropies).exp())
    return _mixture_entropy(log_probs, -patches.alpha * entropies)


def _twins(value: Callable, rules: tuple[Callable, Callable], *takes: str) -> tuple[Loss, Loss]:
    """The loss as written, and as coded."""
    about = (value.__doc__, f"The study's code of: {value.__doc__}")
    return tuple(
        Loss(partial(value, coded=coded), rules[coded], about[coded], True, takes)
        for coded in (False, True)
    )


_CONFIDENT = (select_in_groups, _select_in_groups_study)
_ALL = (_select_all, _select_all)
patch_loss1, patch_loss1_study = _twins(_distribution, _CONFIDENT, "rho_patch")
patch_loss2, patch_loss2_study = _twins(_winner, _CONFIDENT, "rho_patch")
patch_loss3, patch_loss3_study = _twins(_weighted, _CONFIDENT, "rho_patch")
patch_loss4, patch_loss4_study = _twins(_smallest, _CONFIDENT, "rho_patch")
patch_loss5, patch_loss5_study = _twins(_by_entropy, _ALL)
patch_loss6, patch_loss6_study = _twins(_by_exponential, _ALL, "alpha")


def neighbours(groups: tuple[int, int]) -> Tensor:
    """``[G,G]`` of 0 and 1: patches that share an edge, and every patch with the whole image."""
    patches = groups[0] - 1
    side = math.isqrt(patches)
    place = torch.arange(patches)
    row, column = place // side, place % side
    distance = (row[:, None] - row).abs() + (column[:, None] - column).abs()
    adjacent = torch.ones(patches + 1, patches + 1)
    adjacent[1:, 1:] = distance == 1
    adjacent[0, 0] = 0
    return adjacent


def shared_area(groups: tuple[int, int], overlap: float) -> Tensor:
    """``[G,G]``: the share of the smaller crop that the other one sees too, in [0,1]."""
    side = math.isqrt(groups[0] - 1)
    unit = 10_000  # pixels of a cell, so that the boxes are exact
    boxes = torch.from_numpy(patch_boxes(side * unit, side * unit, side, overlap))
    whole = torch.tensor([[0, 0, side * unit, side * unit]])
    low, high = torch.cat([whole, boxes]).double().split(2, dim=1)
    inside = torch.minimum(high[:, None], high) - torch.maximum(low[:, None], low)
    area = (high - low).prod(dim=1)
    return inside.clamp(min=0).prod(dim=-1) / torch.minimum(area[:, None], area)


def _neighbour_agreement(logits: Tensor, selected: Tensor, patches: Patches) -> Tensor:
    """Cross-entropy of the image with its groups' predictions, as far as neighbours confirm them.

    A group weighs as much as the chance that it and a neighbour (:func:`neighbours`), each drawing
    a class from its prediction, draw the same: a confident crop that nothing around it confirms
    counts little. The study names this as future work.
    """
    return cross_entropy(logits, _confirmed(logits, selected, patches))


def _confirmed(logits: Tensor, selected: Tensor, patches: Patches) -> Tensor:
    """Mean prediction ``[C]`` of the groups, each as far as its neighbours confirm it."""
    probs = log_mean_prob(_kept(logits, selected, patches)[0].detach()).exp()
    adjacent = neighbours(patches.groups).to(logits)
    support = (adjacent * (probs @ probs.T)).sum(dim=1) / adjacent.sum(dim=1) + EPSILON
    return support / support.sum() @ probs


def _located_hard1(logits: Tensor, selected: Tensor, patches: Patches) -> Tensor:
    """Cross-entropy with the one class that the groups name, as far as neighbours confirm them.

    The study's future work: its best loss, hard1, with the places of the patches. The class is the
    most probable one of the mean that :func:`_neighbour_agreement` has as its target.
    """
    mean = _confirmed(logits, selected, patches)
    return cross_entropy(logits, one_hot(mean.argmax(dim=-1), mean))


def _overlap_affinity(logits: Tensor, selected: Tensor, patches: Patches) -> Tensor:
    """Cross-entropy of the image with its views' predictions, weighted as inliers.

    The weights y solve y = softmax(W y * 4 / 0.2) in five steps from uniform, as the inlierness
    scores of MTA (Zanella and Ben Ayed, "On the test-time zero-shot generalization of
    vision-language models", 2024), without its density term, which needs the features. The affinity
    of two views is that of MTA, the inner product of their predictions, times the share of the
    smaller crop that the other one sees (:func:`shared_area`): views of the same place support one
    another.
    """
    probs = logits.detach()[selected].softmax(dim=-1)
    share, n = shared_area(patches.groups, patches.overlap).to(logits), patches.groups[1]
    affinity = probs @ probs.T * share.repeat_interleave(n, 0).repeat_interleave(n, 1)
    weights = torch.full_like(probs[:, 0], 1 / len(probs))
    for _ in range(5):
        weights = (affinity @ weights * (4 / 0.2)).softmax(dim=0)
    return cross_entropy(logits, weights @ probs)


neighbour_agreement = Loss(
    _neighbour_agreement, select_in_groups, needs_patches=True, takes=("rho_patch",)
)
located_hard1 = Loss(_located_hard1, select_in_groups, needs_patches=True, takes=("rho_patch",))
overlap_affinity = Loss(_overlap_affinity, _select_all, needs_patches=True, takes=("overlap",))
