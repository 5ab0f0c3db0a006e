"""Views of an image: random crops, patches, AugMix and AutoAugment, resampling on the device.

Never import data sets or models here. One more augmenter: a dataclass in a file of its own and a
line in ``augmenters.AUGMENTERS``.
"""

from tpt_nb.core.images import view_seed
from tpt_nb.views.augmenters import AUGMENTERS, PatchViews, RandomViews, get, make_augmenter, names
from tpt_nb.views.crops import CROP_TRIES, center_view, crop_boxes, first_view, patch_boxes
from tpt_nb.views.resample import Plan, fits, render

__all__ = [
    "AUGMENTERS", "CROP_TRIES", "PatchViews", "Plan", "RandomViews", "center_view", "crop_boxes",
    "first_view", "fits", "get", "make_augmenter", "names", "patch_boxes", "render", "view_seed",
]  # fmt: skip
