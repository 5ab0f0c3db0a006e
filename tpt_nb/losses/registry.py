"""The table of the losses."""

import inspect
import math
from functools import partial

from tpt_nb.losses.marginal import Loss, check_rho, marginal_entropy, mean_entropy
from tpt_nb.losses.patches import (
    Groups,
    neighbour_agreement,
    overlap_affinity,
    patch_loss1,
    patch_loss1_study,
    patch_loss2,
    patch_loss2_study,
    patch_loss3,
    patch_loss3_study,
    patch_loss4,
    patch_loss4_study,
    patch_loss5,
    patch_loss5_study,
    patch_loss6,
    patch_loss6_study,
)
from tpt_nb.losses.study import (
    crossentropy_hard1,
    crossentropy_hard1_study,
    crossentropy_hard5,
    crossentropy_hard5_study,
    crossentropy_soft,
    crossentropy_soft_study,
)

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
