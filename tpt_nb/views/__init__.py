"""TODO."""

from tpt_nb.views.augmenters import AUGMENTERS, PatchViews, RandomViews, make_augmenter
from tpt_nb.views.augmix import AUGMIX_OPS, tpt_augmix
from tpt_nb.views.crops import (
    BICUBIC,
    BILINEAR,
    CROP_AREA,
    CROP_RATIO,
    CROP_TRIES,
    as_plan,
    center_axes,
    center_view,
    crop_boxes,
    patch_boxes,
    side_boxes,
)
from tpt_nb.views.resample import BUDGET, Plan, axis, fits, render, weights

__all__ = [
    "AUGMENTERS",
    "AUGMIX_OPS",
    "BICUBIC",
    "BILINEAR",
    "BUDGET",
    "CROP_AREA",
    "CROP_RATIO",
    "CROP_TRIES",
    "PatchViews",
    "Plan",
    "RandomViews",
    "as_plan",
    "axis",
    "center_axes",
    "center_view",
    "crop_boxes",
    "fits",
    "make_augmenter",
    "patch_boxes",
    "render",
    "side_boxes",
    "tpt_augmix",
    "weights",
]
