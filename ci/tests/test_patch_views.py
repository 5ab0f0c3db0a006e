"""The grid of patches: where the boxes lie, in which order the views come, odd images, names."""

import json
import math
import pickle
import warnings

import numpy as np
import pytest
import torch
import torchvision.transforms as T
import torchvision.transforms.functional as F
from PIL import Image
from test_views import picture

from tpt_nb.core.images import as_rgb
from tpt_nb.views import (
    PatchViews,
    RandomViews,
    center_view,
    make_augmenter,
    patch_boxes,
)
from tpt_nb.views.crops import side_boxes

rng = np.random.default_rng(0)
SHAPES = [(224, 224), (300, 200), (97, 301), (64, 65), *rng.integers(8, 700, (20, 2)).tolist()]


# --- boxes ---------------------------------------------------------------------------------------


def cover(width: int, height: int, boxes: np.ndarray) -> np.ndarray:
    """How many boxes each pixel is in."""
    count = np.zeros((height, width), int)
    for left, top, right, bottom in boxes:
        count[top:bottom, left:right] += 1
    return count


@pytest.mark.parametrize("grid", [1, 2, 3, 5, 8])
def test_without_overlap_the_patches_tile_all_but_the_remainder(grid):
    for width, height in SHAPES:
        boxes = patch_boxes(width, height, grid, 0.0)
        count = cover(width, height, boxes)
        inside = count[: height // grid * grid, : width // grid * grid]
        assert (inside == 1).all() and count.sum() == inside.size
        assert height - inside.shape[0] < grid and width - inside.shape[1] < grid


@pytest.mark.parametrize("overlap", [0.0, 0.2, 0.4, 0.6, 0.8, 1.0])
@pytest.mark.parametrize("grid", [3, 4, 5, 8])
def test_inner_and_border_patches_have_the_sides_that_the_overlap_gives(grid, overlap):
    side = grid * 60
    boxes = patch_boxes(side, side, grid, overlap).reshape(grid, grid, 4)
    widths, heights = boxes[..., 2] - boxes[..., 0], boxes[..., 3] - boxes[..., 1]
    reach = np.minimum(np.arange(grid), np.arange(grid)[::-1])  # cells to the nearer border
    for i in range(grid):
        full = min(overlap, reach[i]) + min(overlap, grid - 1 - reach[i]) + 1
        assert widths[:, i] == pytest.approx(full / grid * side, abs=1)
        assert heights[i] == pytest.approx(full / grid * side, abs=1)
    if overlap <= 1:
        assert widths[:, 1:-1] == pytest.approx((1 + 2 * overlap) / grid * side, abs=1)
        assert widths[:, [0, -1]] == pytest.approx((1 + overlap) / grid * side, abs=1)


def test_boxes_are_those_of_the_study():
    """The arithmetic of its notebook, patch by patch."""
    for (width, height), n, overlap in zip(
        SHAPES, [2, 3, 4, 5, 6] * 9, [0, 0.3, 0.8] * 9, strict=False
    ):
        w, h = width // n, height // n
        more_w, more_h = int(w * overlap), int(h * overlap)
        expected = [
            (
                max(j * w - more_w, 0),
                max(i * h - more_h, 0),
                min((j + 1) * w + more_w, width),
                min((i + 1) * h + more_h, height),
            )
            for i in range(n)
            for j in range(n)
        ]
        assert [tuple(box) for box in patch_boxes(width, height, n, overlap).tolist()] == expected


@pytest.mark.parametrize("shape", [(1, 1), (1, 4000), (4000, 1), (3, 2), (7, 5)])
@pytest.mark.parametrize("overlap", [0.0, 0.5, 1.0])
def test_boxes_of_tiny_images_have_pixels_and_lie_inside(shape, overlap):
    for grid in (1, 2, 8):
        left, top, right, bottom = patch_boxes(*shape, grid, overlap).T
        assert (left >= 0).all() and (top >= 0).all()
        assert (right > left).all() and (bottom > top).all()
        assert (right <= shape[0]).all() and (bottom <= shape[1]).all()
        assert cover(*shape, np.stack([left, top, right, bottom], 1))[0, 0] > 0


# --- views ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("params", [{}, {"augmix": True}, {"augmix": True, "augmix_ops": "tpt"}])
@pytest.mark.parametrize("n_aug, n_patches", [(0, 0), (0, 1), (0, 9), (2, 0), (2, 1), (3, 4)])
def test_order_and_number_of_the_views(n_aug, n_patches, params):
    params = {"augmix_ops": "torchvision", "severity": 2, **params}
    augmenter = PatchViews(n_aug=n_aug, n_patches=n_patches, overlap=0.25, size=24, **params)
    image = picture(90, 70)
    views = augmenter(image, 5)
    groups, per_group = augmenter.groups
    assert (groups, per_group) == (n_patches + 1, n_aug + 1)
    assert len(views) == augmenter.n_views == groups * per_group
    views = views.reshape(groups, per_group, 3, 24, 24)
    # PIL's resize and crop as the study has them: Resize(224, bicubic), CenterCrop(224)
    transform = T.Compose([T.Resize(24, T.InterpolationMode.BICUBIC), T.CenterCrop(24)])
    boxes = patch_boxes(90, 70, math.isqrt(n_patches), 0.25).tolist() if n_patches else []
    for g, crop in enumerate([image, *(image.crop(box) for box in boxes)]):
        plain = F.pil_to_tensor(transform(crop))
        if views.is_floating_point():
            torch.testing.assert_close(views[g, 0], plain / 255)
        else:
            assert torch.equal(views[g, 0], plain)
        for a in range(1, per_group):
            assert torch.equal(views[g, a], views[g, 0]) != bool(params.get("augmix"))


def test_augmix_of_the_study_is_torchvisions_on_the_resized_patch():
    augmenter = PatchViews(
        n_aug=2, n_patches=4, augmix=True, severity=4, augmix_ops="torchvision", size=24
    )
    views = augmenter(picture(60, 60), 7).reshape(5, 3, 3, 24, 24)
    for g in range(5):
        for a in (1, 2):
            torch.manual_seed(int(np.random.default_rng([7, g, a]).integers(2**63)))
            assert torch.equal(T.AugMix(severity=4)(views[g, 0].contiguous()), views[g, a])


@pytest.mark.parametrize("ops", ["tpt", "torchvision"])
def test_views_depend_on_the_seed_alone_and_not_on_the_number_of_copies(ops):
    make = {"n_patches": 4, "augmix": True, "augmix_ops": ops, "size": 16}
    image, augmenter = picture(50, 40), PatchViews(n_aug=3, **make)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    first = augmenter(image, 3)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(99)
    assert torch.equal(pickle.loads(pickle.dumps(augmenter))(image, 3), first)
    other = augmenter(image, 4).reshape(5, 4, 3, 16, 16)
    first = first.reshape(5, 4, 3, 16, 16)
    assert torch.equal(other[:, 0], first[:, 0]) and not torch.equal(other[:, 1:], first[:, 1:])
    fewer = PatchViews(n_aug=1, **make)(image, 3).reshape(5, 2, 3, 16, 16)
    assert torch.equal(fewer, first[:, :2])


def test_view_0_and_one_patch_are_the_image():
    image = picture(80, 60)
    one = PatchViews(n_aug=0, n_patches=1, overlap=0.5, size=32)(image, 0)
    random = RandomViews(n_aug=0, size=32)(image, 0)
    assert torch.equal(one, random.expand(2, -1, -1, -1))


def test_a_grid_that_is_not_square_says_what_it_has():
    with pytest.warns(UserWarning, match=r"n_patches=32.*5 x 5 = 25 patches.*78 views") as seen:
        augmenter = make_augmenter("patch", 16, n_aug=2, n_patches=32)
    assert len(seen) == 1 and augmenter.patches == 25 and augmenter.groups == (26, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for n_patches in (0, 1, 4, 25, 64):
            assert make_augmenter("patch", 16, n_patches=n_patches).patches == n_patches
        augmenter(picture(30, 30), 0)  # once is enough


# --- odd images ----------------------------------------------------------------------------------

ALL = [RandomViews(n_aug=3, size=32), PatchViews(n_aug=1, n_patches=64, overlap=0.3, size=32)]


@pytest.mark.parametrize("augmenter", ALL, ids=["random", "patch"])
@pytest.mark.parametrize("shape", [(1, 1), (1, 4000), (4000, 1), (2, 3), (5, 700)])
def test_any_shape_works(augmenter, shape):
    views = augmenter(picture(*shape), 0)
    assert views.shape == (augmenter.n_views, 3, 32, 32)
    if shape == (1, 1):
        assert (views == views[0, :, :1, :1]).all()


@pytest.mark.parametrize("augmenter", ALL, ids=["random", "patch"])
@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "RGBA", "LA", "YCbCr", "HSV"])
def test_any_mode_is_read_as_rgb(augmenter, mode):
    image = picture(40, 50, mode="L" if mode == "LA" else "RGB").convert(mode)
    assert torch.equal(augmenter(image, 0), augmenter(image.convert("RGB"), 0))


@pytest.mark.parametrize("augmenter", ALL, ids=["random", "patch"])
def test_transparency_16_bits_and_rotation_are_seen_as_a_viewer_shows_them(augmenter):
    grey = picture(40, 30, mode="L")
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 256 + 7)
    assert deep.mode.startswith("I;16")
    assert torch.equal(augmenter(deep, 0), augmenter(grey, 0))
    assert torch.equal(augmenter(Image.new("RGBA", (20, 20), (9, 9, 9, 0)), 0).float().mean(),
                       torch.tensor(255.0))  # fmt: skip
    turned = picture(40, 30)
    exif = turned.getexif()
    exif[0x0112] = 6
    turned.info["exif"] = exif.tobytes()
    upright = picture(40, 30).transpose(Image.Transpose.ROTATE_270)
    assert np.array_equal(np.asarray(as_rgb(turned)), np.asarray(upright))
    assert torch.equal(augmenter(turned, 0), augmenter(upright, 0))


@pytest.mark.parametrize("augmenter", ALL, ids=["random", "patch"])
def test_what_cannot_be_seen_is_an_error_in_words(augmenter):
    with pytest.raises(ValueError, match="0 x 5 pixels"):
        augmenter(Image.new("RGB", (0, 5)), 0)
    with pytest.raises(ValueError, match="floating-point pixels"):
        augmenter(Image.new("F", (5, 5)), 0)


@pytest.mark.parametrize("shape", [(16 * 9 + 1, 9), (9, 500), (31, 1000), (1000, 31)])
def test_the_short_cut_for_strips_gives_the_same_pixels(shape):
    image, (width, height) = picture(*shape), shape
    long = int(32 * max(shape) / min(shape))
    wide, tall = (32, long) if width < height else (long, 32)
    left, top = round((wide - 32) / 2), round((tall - 32) / 2)
    bicubic = Image.Resampling.BICUBIC
    whole = image.resize((wide, height), bicubic).resize((wide, tall), bicubic)
    reference = np.asarray(whole.crop((left, top, left + 32, top + 32))).astype(int)
    difference = np.asarray(center_view(image, 32)) - reference
    assert abs(difference).max() <= 1 and (difference != 0).mean() < 0.02


# --- parameters and names ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "params, message",
    [
        ({"n_aug": -1}, "n_aug is -1"),
        ({"n_patches": -4}, "n_patches is -4"),
        ({"n_patches": 2.5}, "n_patches is 2.5"),
        ({"overlap": -0.1}, "overlap is -0.1; it must be from 0"),
        ({"overlap": 1.5}, "overlap is 1.5"),
        ({"overlap": float("nan")}, "overlap is nan"),
        ({"augmix": True, "severity": 11}, "severity is 11"),
        ({"augmix_ops": "google"}, "'google'"),
    ],
)
def test_bad_parameters_say_what_is_allowed(params, message):
    with pytest.raises(ValueError, match=message):
        PatchViews(**params)


def test_spec_names_what_the_pixels_depend_on_and_only_that():
    def spec(**params) -> str:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return json.dumps(PatchViews(**{"n_patches": 16, **params}).spec(), sort_keys=True)

    assert len({spec(), spec(n_aug=1), spec(n_patches=9), spec(overlap=0.2), spec(size=64),
                spec(augmix=True), spec(augmix=True, severity=2),
                spec(augmix=True, augmix_ops="torchvision")}) == 8  # fmt: skip
    assert spec(n_patches=17) == spec() and spec(severity=3) == spec()
    assert spec(overlap=0) == spec(overlap=0.0)
    assert spec(n_patches=1, overlap=0.5) == spec(n_patches=1)
    assert spec() != json.dumps(RandomViews().spec(), sort_keys=True)


def test_make_augmenter():
    made = make_augmenter("patch", 64, n_aug=2, n_patches=9, overlap=0.4)
    assert made == make_augmenter("PatchAugmenter", 64, n_aug=2, n_patches=9, overlap=0.4)
    assert made == PatchViews(n_aug=2, n_patches=9, overlap=0.4, size=64)
    with pytest.raises(ValueError, match="'autoaugment'.*n_patches"):
        make_augmenter("patch", 64, autoaugment=True)


# --- random crops of a fixed side ----------------------------------------------------------------


def test_crops_of_a_fixed_side():
    places = np.random.default_rng(0).random((2000, 2))
    for width, height in SHAPES[:6]:
        for side in (0.1, 0.45, 1.0):
            x, y, w, h = side_boxes(width, height, side, places).T
            assert (w == max(1, round(side * width))).all()
            assert (h == max(1, round(side * height))).all()
            assert x.min() == 0 and (x + w).max() == width
            assert y.min() == 0 and (y + h).max() == height
    image = picture(80, 60)
    whole = RandomViews(n_aug=8, size=16, crop_side=1.0)(image, 0)
    flipped = whole[1:].flip(3)
    same = [torch.equal(view, whole[1]) or torch.equal(view, flipped[0]) for view in whole[1:]]
    assert all(same)
    specs = [json.dumps(RandomViews(crop_side=s).spec()) for s in (None, 0.3, 0.5)]
    assert len(set(specs)) == 3 and "crop_side" not in specs[0]
    with pytest.raises(ValueError, match=r"crop_side is 0; it must be in \(0, 1\]"):
        RandomViews(crop_side=0)
