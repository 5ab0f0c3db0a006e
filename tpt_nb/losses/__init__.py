"""Losses of test-time adaptation: logits ``[V,C]`` of the views of one image -> scalar.

Never import methods or runs here. One more loss: a :class:`Loss` in a file of its own and a line in
``registry.LOSSES``.
"""

from tpt_nb.losses.marginal import (
    Loss,
    Patches,
    check_rho,
    entropy,
    log_mean_prob,
    marginal_entropy,
    mean_entropy,
    select_confident,
    with_selection,
)
from tpt_nb.losses.patches import neighbours, select_in_groups, shared_area
from tpt_nb.losses.registry import LOSSES, get, names, needs_patches
from tpt_nb.losses.study import crossentropy_hard1, select_augmented

__all__ = [
    "LOSSES", "Loss", "Patches", "check_rho", "crossentropy_hard1", "entropy", "get",
    "log_mean_prob", "marginal_entropy", "mean_entropy", "names", "needs_patches", "neighbours",
    "select_augmented", "select_confident", "select_in_groups", "shared_area", "with_selection",
]  # fmt: skip
