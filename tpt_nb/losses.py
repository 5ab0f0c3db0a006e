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

import inspect
import math
from collections.abc import Callable
from functools import partial, wraps

import torch
from torch import Tensor

from tpt_nb.views import patch_boxes

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


# --- cross-entropy of the image with what its views say ------------------------------------------


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


# --- patches -------------------------------------------------------------------------------------

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


def _one_hot(classes: Tensor, like: Tensor) -> Tensor:
    """``[...] -> [...,C]`` of the dtype of ``like`` ``[...,C]``; F.one_hot does not run in vmap."""
    return (classes[..., None] == torch.arange(like.shape[-1], device=like.device)).to(like.dtype)


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


# --- patches have places -------------------------------------------------------------------------


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


# --- by name -------------------------------------------------------------------------------------

LOSSES: dict[str, Loss] = {
    "marginal_entropy": marginal_entropy,
    "defaultTPT": marginal_entropy,  # the name that the study of patch losses uses
    "mean_entropy": mean_entropy,
    "crossentropy_soft": crossentropy_soft,
    "crossentropy_hard1": crossentropy_hard1,
    "crossentropy_hard5": crossentropy_hard5,
    "patch_loss1": patch_loss1,
    "patch_loss2": patch_loss2,
    "patch_loss3": patch_loss3,
    "patch_loss4": patch_loss4,
    "patch_loss5": patch_loss5,
    "patch_loss6": patch_loss6,
    "neighbour_agreement": neighbour_agreement,
    "overlap_affinity": overlap_affinity,
    "crossentropy_soft_study": crossentropy_soft_study,
    "crossentropy_hard1_study": crossentropy_hard1_study,
    "crossentropy_hard5_study": crossentropy_hard5_study,
    "patch_loss1_study": patch_loss1_study,
    "patch_loss2_study": patch_loss2_study,
    "patch_loss3_study": patch_loss3_study,
    "patch_loss4_study": patch_loss4_study,
    "patch_loss5_study": patch_loss5_study,
    "patch_loss6_study": patch_loss6_study,
}


def needs_patches(name: str) -> bool:
    """Does the loss of that name look at patches?"""
    return "groups" in getattr(LOSSES[name], "layout", ())


def get_loss(
    name: str,
    groups: Groups | None = None,
    rho_patch: float = 0.9,
    alpha: float = 1.0,
    overlap: float = 0.0,
) -> Loss:
    """The loss of that name, ``loss(logits, rho, selected=None)``.

    Args:
        name: a key of ``LOSSES``.
        groups: (P+1, n): how the views lie, ``augmenter.groups``; for losses that look at patches.
        rho_patch: fraction of the views of a group that patch losses 1 to 4 keep, in (0,1].
        alpha: of patch_loss6.
        overlap: of the patches, for overlap_affinity.
    Returns:
        The function; its attribute ``select``, if it has one, is its rule for choosing views.
    Raises:
        ValueError: unknown name (the message lists the known ones), or patches are needed.
    """
    if name not in LOSSES:
        raise ValueError(f"unknown loss {name!r}; known: {', '.join(sorted(LOSSES))}.")
    loss = LOSSES[name]
    if not needs_patches(name):
        return loss
    if groups is None:
        raise ValueError(
            f"loss {name!r} looks at patches and must know how the views lie: "
            f"get_loss({name!r}, groups=augmenter.groups)."
        )
    patches = groups[0] - 1
    if patches < 1 or groups[1] < 1:
        raise ValueError(
            f"loss {name!r} looks at patches, but the views have none (groups={groups}); use the "
            "patch augmenter with n_patches of 1 or more."
        )
    if math.isqrt(patches) ** 2 != patches:
        raise ValueError(f"groups={groups} has {patches} patches, which make no square grid.")
    check_rho(rho_patch)
    given = {"groups": tuple(groups), "rho_patch": rho_patch, "alpha": alpha, "overlap": overlap}
    bound = partial(loss, **{name: given[name] for name in loss.layout})
    names = inspect.signature(loss.select).parameters
    bound.select = partial(loss.select, **{name: given[name] for name in given if name in names})
    return bound
