"""The losses of the study "TPT with patches", as it describes them and as it coded them.

Its notebook describes nine losses and codes some of them otherwise than it says. ``<name>_study``
is the code, ``<name>`` is what the text says: here the three that are cross-entropies with the
augmented views, in :mod:`tpt_nb.losses.patches` the six that look at patches. E_g is the marginal
entropy of the confident views of group g (a fraction ``rho_patch`` of them), c_g their most
frequent class, z_0 the logits of the un-augmented image.

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

from collections.abc import Callable

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


def _select_augmented_study(logits: Tensor, rho: float) -> Tensor:
    """The same, but an error where the study's code keeps int((V-1) * rho) = 0 views."""
    views = logits.shape[-2] - 1
    if int(views * rho) == 0:
        raise ValueError(
            f"the study's cross-entropy losses keep int({views} * {rho}) = 0 of the augmented "
            "views and give NaN; use more views, a larger rho, or the loss without _study."
        )
    return select_augmented(logits, rho)


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """``-sum target * log softmax(logits[0])``; the target ``[C]`` is a constant."""
    return -(target.detach() * logits[0].log_softmax(dim=-1)).sum()


def one_hot(classes: Tensor, like: Tensor) -> Tensor:
    """``[...] -> [...,C]`` of the dtype of ``like`` ``[...,C]``; F.one_hot does not run in vmap."""
    return (classes[..., None] == torch.arange(like.shape[-1], device=like.device)).to(like.dtype)


def _peaks(scores: Tensor, k: int) -> Tensor:
    """The k largest of ``[C]``, divided by their sum; 0 elsewhere."""
    best, where = scores.topk(min(k, scores.shape[-1]))
    return torch.zeros_like(scores).scatter(-1, where, best / best.sum())


def _twins(about: str, written: Callable, coded: Callable) -> tuple[Loss, Loss]:
    """The loss as written, and as coded.

    ``written`` makes the target of the mean probability ``[C]`` of the confident augmented views,
    ``coded`` of their mean logits ``[C]``.
    """

    def once(logits: Tensor, selected: Tensor) -> Tensor:
        return cross_entropy(logits, written(log_mean_prob(logits[selected]).exp()))

    def twice(logits: Tensor, selected: Tensor) -> Tensor:
        log_probs = logits[0].softmax(dim=-1).log_softmax(dim=-1)
        return -(coded(logits[selected].mean(dim=0)) * log_probs).sum()

    as_coded = f"The study's code of: {about}"
    return Loss(once, select_augmented, about), Loss(twice, _select_augmented_study, as_coded)


crossentropy_soft, crossentropy_soft_study = _twins(
    "Cross-entropy of the image with the mean prediction of its confident augmented views.",
    written=lambda mean: mean,
    coded=lambda mean: mean.softmax(dim=-1),
)
crossentropy_hard1, crossentropy_hard1_study = _twins(
    "Cross-entropy with the class that is most probable on average in the confident views.",
    written=lambda mean: _peaks(mean, 1),
    coded=lambda mean: one_hot(mean.detach().argmax(dim=-1), mean),
)
crossentropy_hard5, crossentropy_hard5_study = _twins(
    "Cross-entropy with the five classes that are most probable on average, renormalised.",
    written=lambda mean: _peaks(mean, 5),
    coded=lambda mean: _peaks(mean, 5),
)
