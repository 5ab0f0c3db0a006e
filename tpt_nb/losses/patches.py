"""Losses of test-time adaptation: logits of the views of one image -> scalar.

Every loss has the signature ``loss(logits [V,C], rho, selected=None) -> scalar``. Row 0 is the
un-augmented image, the logits already carry the logit scale, entropies are in nats. ``selected``
holds the indices of the confident views; without it the loss selects them itself. Later steps on
the same image pass the selection of the first step, as TPT does. All run under ``torch.vmap``.

Losses that look at patches also need to know how the views lie: ``groups`` = (G, n), G = P+1 groups
of n views, group 0 the whole image and its copies, then the P patches row by row. An augmenter has
it as ``augmenter.groups``; ``get_loss(name, groups=...)`` binds it, and the result has the
signature above.

**The study's losses.** Its notebook "TPT with patches" describes nine losses and codes some of them
otherwise than it says. ``<name>_study`` is the code, ``<name>`` is what the text says. E_g is the
marginal entropy of the confident views of group g (a fraction ``rho_patch`` of them), c_g their
most frequent class, z_0 the logits of the un-augmented image.

==================  ==================================  ==========================================
loss                as the study coded it               corrected
==================  ==================================  ==========================================
patch_loss1         cross-entropy of z_0 with the       the same; of two equally frequent classes
                    patches' votes c_g, weights 1/E_g;  c_g is the more probable one
                    of two equally frequent classes
                    c_g is the smaller number
patch_loss2         cross-entropy of z_0 with the       the same, c_g as above
                    class that wins that vote
patch_loss3         mean of E_g with weights 1/E_g;     weights without gradient
                    the gradient flows through the
                    weights too, which makes it the
                    harmonic mean
patch_loss4         smallest E_g, that of the whole     smallest E_g among the patches
                    image (group 0) included
patch_loss5         product of experts: weights 1/H_g   entropy of the mean of the probabilities,
                    on log-probabilities, not           normalised weights 1/H_g without gradient
                    normalised, with gradient
patch_loss6         as 5, weights exp(-alpha H_g)       as 5, weights softmax(-alpha H_g)
crossentropy_soft   softmax of z_0 goes through a       -sum t log softmax(z_0); t is the mean of
                    second softmax; target t = softmax  the probabilities of the confident views,
                    of the mean logits, with gradient   without gradient
crossentropy_hard1  second softmax; t: the largest      t: the largest mean probability
                    mean logit
crossentropy_hard5  second softmax; t: the five         t: the five largest mean probabilities,
                    largest mean logits, divided by     divided by their sum
                    their sum (about 1/5 each)
all of them         fail or give NaN where a group      keep at least one view of each group;
                    keeps no view (n_aug=0); 1-4 fail   groups are counted on the views: any
                    unless n_patches is a square        number of patches and of copies
==================  ==================================  ==========================================

The first AdamW step is a sign step: a positive factor of a loss changes nothing, only the signs of
its gradient do. That is why the double softmax, whose gradient is tiny, still works.
"""

import math

import torch
from torch import Tensor

from tpt_nb.losses.marginal import check_rho, entropy, log_mean_prob
from tpt_nb.losses.study import _cross_entropy, _one_hot, _selects
from tpt_nb.views import patch_boxes

Groups = tuple[int, int]


EPSILON = 1e-6  # the study's


def _check_groups(logits: Tensor, groups: Groups) -> None:
    if logits.shape[-2] != math.prod(groups):
        raise ValueError(
            f"the loss was made for {groups[0]} groups of {groups[1]} views, "
            f"{math.prod(groups)} in all, but there are {logits.shape[-2]}; pass the groups of the "
            "augmenter that made them."
        )


def select_in_groups(
    logits: Tensor, rho: float, *, groups: Groups, rho_patch: float = 0.9
) -> Tensor:
    """Confident views of each group: ``[G*k]``, group by group; k = max(1, int(n * rho_patch))."""
    check_rho(rho_patch)
    _check_groups(logits, groups)
    count, size = groups
    k = max(1, int(size * rho_patch))
    h = entropy(logits.detach()).reshape(count, size)
    first = size * torch.arange(count, device=h.device)[:, None]
    return (h.argsort(dim=-1, stable=True)[:, :k] + first).reshape(count * k)


def select_in_groups_study(
    logits: Tensor, rho: float, *, groups: Groups, rho_patch: float = 0.9
) -> Tensor:
    """The same, but an error where the study's code keeps int(n * rho_patch) = 0 views."""
    if int(groups[1] * rho_patch) == 0:
        raise ValueError(
            f"the study's patch losses 1 to 4 keep int({groups[1]} * {rho_patch}) = 0 views of "
            "each patch and give NaN; use more copies (n_aug), a larger selection_p_patch, or the "
            "loss without _study."
        )
    return select_in_groups(logits, rho, groups=groups, rho_patch=rho_patch)


def select_all(logits: Tensor, rho: float, *, groups: Groups) -> Tensor:
    """Every view: ``[V]``."""
    _check_groups(logits, groups)
    return torch.arange(logits.shape[-2], device=logits.device)


def _kept(logits: Tensor, selected: Tensor, groups: Groups) -> tuple[Tensor, Tensor]:
    """Logits ``[G,k,C]`` of the selected views and the marginal entropies ``[G]`` of the groups."""
    kept = logits[selected].reshape(groups[0], -1, logits.shape[-1])
    log_probs = log_mean_prob(kept)
    return kept, -(log_probs.exp() * log_probs).sum(dim=-1)


def _vote(kept: Tensor, entropies: Tensor, ties_by_probability: bool) -> tuple[Tensor, Tensor]:
    """Class of each patch ``[P]``, and the votes of the patches ``[C]``: 1/E_g for class c_g."""
    kept, entropies = kept[1:].detach(), entropies[1:].detach()  # the whole image does not vote
    counts = _one_hot(kept.argmax(dim=-1), kept).sum(dim=-2)
    if ties_by_probability:
        counts = counts + 0.5 * log_mean_prob(kept).exp()
    classes = counts.argmax(dim=-1)  # the first of equals, as torch.mode
    weights = 1 / (entropies.double() + EPSILON)
    return classes, (_one_hot(classes, counts) * weights[:, None]).sum(dim=0)


def _distribution_loss(logits, selected, groups, ties_by_probability: bool) -> Tensor:
    _, votes = _vote(*_kept(logits, selected, groups), ties_by_probability)
    return _cross_entropy(logits, (votes / votes.sum()).to(logits.dtype))


def _winner_loss(logits, selected, groups, ties_by_probability: bool) -> Tensor:
    classes, votes = _vote(*_kept(logits, selected, groups), ties_by_probability)
    best = votes.gather(0, classes).argmax(dim=0, keepdim=True)  # a tie: the first patch's class
    return -logits[0].log_softmax(dim=-1).gather(0, classes.gather(0, best)).sum()


@_selects(select_in_groups)
def patch_loss1(logits: Tensor, rho: float, selected: Tensor, *, groups: Groups) -> Tensor:
    """Cross-entropy of the image with the votes of its patches, weighted by 1/entropy."""
    return _distribution_loss(logits, selected, groups, True)


@_selects(select_in_groups)
def patch_loss2(logits: Tensor, rho: float, selected: Tensor, *, groups: Groups) -> Tensor:
    """Cross-entropy of the image with the class that wins the weighted vote of its patches."""
    return _winner_loss(logits, selected, groups, True)


@_selects(select_in_groups)
def patch_loss3(logits: Tensor, rho: float, selected: Tensor, *, groups: Groups) -> Tensor:
    """Mean of the groups' marginal entropies, weighted by 1/entropy (constant weights)."""
    _, entropies = _kept(logits, selected, groups)
    weights = 1 / (entropies.detach() + EPSILON)
    return (weights / weights.sum() * entropies).sum()


@_selects(select_in_groups)
def patch_loss4(logits: Tensor, rho: float, selected: Tensor, *, groups: Groups) -> Tensor:
    """Marginal entropy of the most confident patch; the whole image is not a patch."""
    return _kept(logits, selected, groups)[1][1:].min()


def _experts(logits: Tensor, selected: Tensor, groups: Groups) -> tuple[Tensor, Tensor]:
    """Per group: log-softmax of the mean logits ``[G,C]`` and its entropy ``[G]``."""
    means = logits[selected].reshape(groups[0], -1, logits.shape[-1]).mean(dim=1)
    log_probs = means.log_softmax(dim=-1)
    return log_probs, -(log_probs.exp() * log_probs).sum(dim=-1)


def _mixture_entropy(log_probs: Tensor, log_weights: Tensor) -> Tensor:
    """Entropy of the mean of probabilities ``[G,C]`` with constant weights ``[G]``."""
    log_weights = log_weights.detach().log_softmax(dim=-1)
    mean = (log_probs + log_weights[:, None]).logsumexp(dim=0)
    mean = mean.clamp(min=torch.finfo(mean.dtype).min)
    return -(mean.exp() * mean).sum()


@_selects(select_all)
def patch_loss5(logits: Tensor, rho: float, selected: Tensor, *, groups: Groups) -> Tensor:
    """Entropy of the groups' mean prediction, weighted by 1/entropy."""
    log_probs, entropies = _experts(logits, selected, groups)
    return _mixture_entropy(log_probs, -(entropies + EPSILON).log())


@_selects(select_all)
def patch_loss6(
    logits: Tensor, rho: float, selected: Tensor, *, groups: Groups, alpha: float = 1.0
) -> Tensor:
    """Entropy of the groups' mean prediction, weighted by exp(-alpha * entropy)."""
    log_probs, entropies = _experts(logits, selected, groups)
    return _mixture_entropy(log_probs, -alpha * entropies)


@_selects(select_in_groups_study)
def patch_loss1_study(logits: Tensor, rho: float, selected: Tensor, *, groups: Groups) -> Tensor:
    """The study's code of :func:`patch_loss1`; see the table above."""
    return _distribution_loss(logits, selected, groups, False)


@_selects(select_in_groups_study)
def patch_loss2_study(logits: Tensor, rho: float, selected: Tensor, *, groups: Groups) -> Tensor:
    """The study's code of :func:`patch_loss2`; see the table above."""
    return _winner_loss(logits, selected, groups, False)


@_selects(select_in_groups_study)
def patch_loss3_study(logits: Tensor, rho: float, selected: Tensor, *, groups: Groups) -> Tensor:
    """The study's code of :func:`patch_loss3`; see the table above."""
    _, entropies = _kept(logits, selected, groups)
    weights = 1 / (entropies + EPSILON)
    return (weights / weights.sum() * entropies).sum()


@_selects(select_in_groups_study)
def patch_loss4_study(logits: Tensor, rho: float, selected: Tensor, *, groups: Groups) -> Tensor:
    """The study's code of :func:`patch_loss4`; see the table above."""
    return _kept(logits, selected, groups)[1].min()


def _product_entropy(log_probs: Tensor, weights: Tensor) -> Tensor:
    """Entropy of the normalised product of experts ``[G,C]`` with these exponents ``[G]``."""
    product = (log_probs * weights[:, None]).mean(dim=0).log_softmax(dim=-1)
    return -(product.exp() * product).sum()


@_selects(select_all)
def patch_loss5_study(logits: Tensor, rho: float, selected: Tensor, *, groups: Groups) -> Tensor:
    """The study's code of :func:`patch_loss5`; see the table above."""
    log_probs, entropies = _experts(logits, selected, groups)
    return _product_entropy(log_probs, 1 / (entropies + EPSILON))


@_selects(select_all)
def patch_loss6_study(
    logits: Tensor, rho: float, selected: Tensor, *, groups: Groups, alpha: float = 1.0
) -> Tensor:
    """The study's code of :func:`patch_loss6`; see the table above."""
    log_probs, entropies = _experts(logits, selected, groups)
    return _product_entropy(log_probs, (-alpha * entropies).exp())


def neighbours(groups: Groups) -> Tensor:
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


def shared_area(groups: Groups, overlap: float) -> Tensor:
    """``[G,G]``: the share of the smaller crop that the other one sees too, in [0,1]."""
    side = math.isqrt(groups[0] - 1)
    unit = 10_000  # pixels of a cell, so that the boxes are exact
    boxes = torch.from_numpy(patch_boxes(side * unit, side * unit, side, overlap))
    whole = torch.tensor([[0, 0, side * unit, side * unit]])
    low, high = torch.cat([whole, boxes]).double().split(2, dim=1)
    inside = torch.minimum(high[:, None], high) - torch.maximum(low[:, None], low)
    area = (high - low).prod(dim=1)
    return inside.clamp(min=0).prod(dim=-1) / torch.minimum(area[:, None], area)


@_selects(select_in_groups)
def neighbour_agreement(logits: Tensor, rho: float, selected: Tensor, *, groups: Groups) -> Tensor:
    """Cross-entropy of the image with its groups' predictions, as far as neighbours confirm them.

    A group weighs as much as the chance that it and a neighbour (:func:`neighbours`), each drawing
    a class from its prediction, draw the same: a confident crop that nothing around it confirms
    counts little. The study names this as future work.
    """
    probs = log_mean_prob(_kept(logits, selected, groups)[0].detach()).exp()
    adjacent = neighbours(groups).to(logits)
    support = (adjacent * (probs @ probs.T)).sum(dim=1) / adjacent.sum(dim=1) + EPSILON
    return _cross_entropy(logits, support / support.sum() @ probs)


@_selects(select_all)
def overlap_affinity(
    logits: Tensor, rho: float, selected: Tensor, *, groups: Groups, overlap: float = 0.0
) -> Tensor:
    """Cross-entropy of the image with its views' predictions, weighted as inliers.

    The weights y solve y = softmax(W y * 4 / 0.2) in five steps from uniform, as the inlierness
    scores of MTA (Zanella and Ben Ayed, "On the test-time zero-shot generalization of
    vision-language models", 2024), without its density term, which needs the features. The affinity
    of two views is that of MTA, the inner product of their predictions, times the share of the
    smaller crop that the other one sees (:func:`shared_area`): views of the same place support one
    another.
    """
    probs = logits.detach()[selected].softmax(dim=-1)
    share = shared_area(groups, overlap).to(logits)
    affinity = (
        probs @ probs.T * share.repeat_interleave(groups[1], 0).repeat_interleave(groups[1], 1)
    )
    weights = torch.full_like(probs[:, 0], 1 / len(probs))
    for _ in range(5):
        weights = (affinity @ weights * (4 / 0.2)).softmax(dim=0)
    return _cross_entropy(logits, weights @ probs)
