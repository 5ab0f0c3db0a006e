"""The table of the losses."""

import math
from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from tpt_nb.core.messages import unknown
from tpt_nb.losses import marginal, patches, study
from tpt_nb.losses.marginal import Loss, Patches, check_rho, with_selection

LOSSES: dict[str, Callable[..., Tensor]] = {
    "marginal_entropy": marginal.marginal_entropy,
    "defaultTPT": marginal.marginal_entropy,  # the name that the study of patch losses uses
    "mean_entropy": marginal.mean_entropy,
    "crossentropy_soft": study.crossentropy_soft,
    "crossentropy_hard1": study.crossentropy_hard1,
    "crossentropy_hard5": study.crossentropy_hard5,
    "patch_loss1": patches.patch_loss1,
    "patch_loss2": patches.patch_loss2,
    "patch_loss3": patches.patch_loss3,
    "patch_loss4": patches.patch_loss4,
    "patch_loss5": patches.patch_loss5,
    "patch_loss6": patches.patch_loss6,
    "neighbour_agreement": patches.neighbour_agreement,
    "located_hard1": patches.located_hard1,
    "overlap_affinity": patches.overlap_affinity,
    "crossentropy_soft_study": study.crossentropy_soft_study,
    "crossentropy_hard1_study": study.crossentropy_hard1_study,
    "crossentropy_hard5_study": study.crossentropy_hard5_study,
    "patch_loss1_study": patches.patch_loss1_study,
    "patch_loss2_study": patches.patch_loss2_study,
    "patch_loss3_study": patches.patch_loss3_study,
    "patch_loss4_study": patches.patch_loss4_study,
    "patch_loss5_study": patches.patch_loss5_study,
    "patch_loss6_study": patches.patch_loss6_study,
}


def names() -> list[str]:
    """The losses that :func:`get` knows."""
    return list(LOSSES)


def needs_patches(name: str) -> bool:
    """Does the loss of that name look at patches?"""
    return with_selection(LOSSES[name]).needs_patches


def get(
    name: str,
    groups: tuple[int, int] | None = None,
    rho_patch: float = 0.9,
    alpha: float = 1.0,
    overlap: float = 0.0,
) -> Loss:
    """The loss of that name; the settings count for losses that look at patches.

    Args:
        name: one of :func:`names`.
        groups: (P+1, n): how the views lie, ``augmenter.groups``.
        rho_patch, alpha, overlap: see :class:`Patches`.
    Raises:
        ValueError: unknown name (the message lists the known ones), or patches are needed.
    """
    if name not in LOSSES:
        raise ValueError(unknown("loss", name, LOSSES))
    loss = with_selection(LOSSES[name])
    if not loss.needs_patches:
        return loss
    if groups is None:
        raise ValueError(
            f"loss {name!r} looks at patches and must know how the views lie: "
            f"losses.get({name!r}, groups=augmenter.groups)."
        )
    count = groups[0] - 1
    if count < 1 or groups[1] < 1:
        raise ValueError(
            f"loss {name!r} looks at patches, but the views have none (groups={groups}); use the "
            "patch augmenter with n_patches of 1 or more."
        )
    if math.isqrt(count) ** 2 != count:
        raise ValueError(f"groups={groups} has {count} patches, which make no square grid.")
    check_rho(rho_patch)
    return replace(loss, patches=Patches(tuple(groups), rho_patch, alpha, overlap))
