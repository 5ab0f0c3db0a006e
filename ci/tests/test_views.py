"""Augmenters against torchvision's own transforms and TPT's formulas."""

import json
import pickle
import time

import numpy as np
import pytest
import torch
import torchvision.transforms as T
import torchvision.transforms.functional as F
from PIL import Image

from tpt_nb import views as views_module
from tpt_nb.core.images import view_seed
from tpt_nb.views import (
    PatchViews,
    RandomViews,
    center_view,
    crop_boxes,
    make_augmenter,
    resample,
)
from tpt_nb.views.augmix import AUGMIX_OPS, tpt_augmix

VARIANTS = [
    {},
    {"augmix": True},
    {"augmix": True, "severity": 4, "augmix_ops": "torchvision"},
    {"autoaugment": True},
]


def picture(width: int, height: int, seed: int = 0, mode: str = "RGB") -> Image.Image:
    """Smooth colours under noise, so that resampling, flips and colour operations all show."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    base = np.stack([x * 255 / width, y * 255 / height, (x + 2 * y) % 256], axis=2)
    noisy = np.clip(base + rng.normal(0, 20, base.shape), 0, 255).astype(np.uint8)
    return Image.fromarray(noisy).convert(mode)


@pytest.mark.parametrize("size", [64, 224])
@pytest.mark.parametrize("shape", [(224, 224), (300, 200), (97, 301), (64, 64), (40, 31), (1, 1)])
def test_view_zero_is_torchvisions_resize_and_center_crop(shape, size):
    image = picture(*shape)
    reference = T.Compose([T.Resize(size, T.InterpolationMode.BICUBIC), T.CenterCrop(size)])(image)
    assert np.array_equal(np.asarray(center_view(image, size)), np.asarray(reference))
    assert torch.equal(
        RandomViews(n_aug=0, size=size)(image, 0)[0], F.pil_to_tensor(reference.convert("RGB"))
    )


class Draws:
    """Stands in for torch in RandomResizedCrop.get_params: rows of (area, ratio, y, x)."""

    def __init__(self, rows: np.ndarray):
        self.rows, self.next = rows, [0, 0]  # next row, next column

    def empty(self, *shape):
        return self

    def uniform_(self, low, high):
        if self.next[1] == 2:  # the last try did not fit, so its place was not drawn
            self.next = [self.next[0] + 1, 0]
        return low + (high - low) * torch.tensor([self.take()])

    def randint(self, low, high, size):
        return torch.tensor([int(low + (high - low) * self.take())])

    def take(self):
        row, column = self.next
        self.next[1] += 1
        return float(self.rows[row, column])


def boxes_of_torchvision(shape, uniforms: np.ndarray, monkeypatch) -> list:
    boxes = []
    for rows in uniforms:
        draws = Draws(rows)
        with monkeypatch.context() as patch:
            patch.setattr(torch, "empty", draws.empty)
            patch.setattr(torch, "randint", draws.randint)
            y, x, h, w = T.RandomResizedCrop.get_params(
                picture(*shape), scale=(0.08, 1), ratio=(3 / 4, 4 / 3)
            )
        boxes.append((x, y, w, h))
    return boxes


@pytest.mark.parametrize("shape", [(224, 224), (640, 480), (50, 400), (500, 31), (3, 2)])
def test_boxes_are_those_of_torchvision_for_the_same_draws(shape, monkeypatch):
    uniforms = np.random.default_rng(1).random((60, 10, 4))
    boxes = crop_boxes(*shape, uniforms)
    assert [tuple(b) for b in boxes.tolist()] == boxes_of_torchvision(shape, uniforms, monkeypatch)
    x, y, w, h = boxes.T
    assert (w > 0).all() and (h > 0).all() and (x >= 0).all() and (y >= 0).all()
    assert (x + w <= shape[0]).all() and (y + h <= shape[1]).all()


@pytest.mark.parametrize("shape", [(224, 224), (301, 97), (2, 500), (30, 20)])
def test_crops_have_the_pixels_of_torchvisions_resized_crop(shape):
    image, size, seed = picture(*shape), 64, 11
    views = RandomViews(n_aug=20, size=size)(image, seed)
    uniforms = np.random.default_rng(seed).random((20, 41))
    boxes = crop_boxes(*shape, uniforms[:, :40].reshape(20, 10, 4))
    flips = 0
    for view, (x, y, w, h), u in zip(views[1:], boxes.tolist(), uniforms[:, 40], strict=True):
        crop = F.resized_crop(image, y, x, h, w, [size, size], T.InterpolationMode.BILINEAR)
        crop = F.hflip(crop) if u < 0.5 else crop
        flips += u < 0.5
        assert torch.equal(view, F.pil_to_tensor(crop))
    assert 0 < flips < 20


@pytest.mark.parametrize("params", VARIANTS, ids=str)
def test_views_depend_on_the_seed_alone(params):
    image, augmenter = picture(120, 90), RandomViews(n_aug=6, size=32, **params)
    torch.manual_seed(5)
    np.random.seed(5)
    before, before_np = torch.get_rng_state(), np.random.get_state()[1].copy()
    first = augmenter(image, 3)
    assert torch.equal(before, torch.get_rng_state())
    assert np.array_equal(before_np, np.random.get_state()[1])
    torch.manual_seed(99)
    assert torch.equal(pickle.loads(pickle.dumps(augmenter))(image, 3), first)
    assert not torch.equal(augmenter(image, 4)[1:], first[1:])
    assert torch.equal(augmenter(image, 4)[0], first[0])
    fewer = RandomViews(n_aug=2, size=32, **params)(image, 3)
    assert torch.equal(fewer, first[:3])


@pytest.mark.parametrize("params", VARIANTS, ids=str)
def test_shape_type_and_range(params):
    augmenter = RandomViews(n_aug=5, size=32, **params)
    views = augmenter(picture(120, 90), 0)
    assert views.shape == (augmenter.n_views, 3, 32, 32) == (6, 3, 32, 32)
    real_valued = params.get("autoaugment") or (
        params.get("augmix") and params.get("augmix_ops", "tpt") == "tpt"
    )
    assert views.dtype == (torch.float32 if real_valued else torch.uint8)
    if real_valued:
        assert views.min() >= 0 and 0.5 < views.max() <= 1
        plain = RandomViews(n_aug=5, size=32)(picture(120, 90), 0)
        assert torch.allclose(views[0], plain[0] / 255)
        assert (views[1:] - plain[1:] / 255).abs().amax(dim=(1, 2, 3)).max() > 0.05


def test_tpt_augmix_is_tpts_mix_of_normalised_tensors():
    """The same draws, mixed after normalisation as TPT does it, give the same view."""
    image, severity = picture(48, 48), 3
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)

    def preprocess(x):
        return (F.to_tensor(x) - mean) / std

    for seed in range(5):
        rng = np.random.default_rng(seed)
        w, m = rng.dirichlet([1.0] * 3), rng.beta(1.0, 1.0)
        mix = torch.zeros(3, 48, 48)
        for k in range(3):
            chain = image.copy()
            for _ in range(rng.integers(1, 4)):
                op = list(AUGMIX_OPS.values())[rng.integers(9)]
                chain = op(chain, rng.uniform(0.1, severity), 1 if rng.random() < 0.5 else -1)
            mix += w[k] * preprocess(chain)
        expected = m * preprocess(image) + (1 - m) * mix
        view = tpt_augmix(image, np.random.default_rng(seed), severity).transpose(2, 0, 1) / 255
        assert torch.allclose((torch.from_numpy(view) - mean) / std, expected, atol=2e-5)


def test_tpt_augmix_has_tpts_nine_operations():
    assert set(AUGMIX_OPS) == {
        *("autocontrast", "equalize", "posterize", "rotate", "solarize"),
        *("shear_x", "shear_y", "translate_x", "translate_y"),
    }
    image = picture(60, 60)
    pixels = np.asarray(image)
    shifted = np.asarray(
        AUGMIX_OPS["translate_x"](image, 10.0, 1)
    )  # a third of the width, to the left
    assert np.array_equal(shifted[:, :40], pixels[:, 20:])
    shifted = np.asarray(AUGMIX_OPS["translate_y"](image, 5.0, -1))
    assert np.array_equal(shifted[10:], pixels[:50])
    assert np.array_equal(np.asarray(AUGMIX_OPS["posterize"](image, 5.0, 1)), pixels & 0b11000000)
    solarized = np.asarray(AUGMIX_OPS["solarize"](image, 5.0, 1))
    assert np.array_equal(solarized, np.where(pixels < 128, pixels, 255 - pixels))
    turned = np.asarray(AUGMIX_OPS["rotate"](image, 10.0, 1))
    assert np.array_equal(turned, np.asarray(image.rotate(30, resample=Image.BILINEAR)))


@pytest.mark.parametrize("severity", [1, 2, 5, 10])
@pytest.mark.parametrize("side", [15, 32])
def test_torchvision_augmix_is_torchvisions_on_each_crop(severity, side):
    """All at once give the pixels of one after the other, whatever was drawn."""
    image, seed = picture(100, 80), severity + side
    common = {"n_aug": 40, "size": side, "severity": severity}
    crops = RandomViews(**common)(image, seed)
    mixed = RandomViews(**common, augmix=True, augmix_ops="torchvision")(image, seed)
    assert torch.equal(crops[0], mixed[0])
    for k in range(1, 41):
        torch.manual_seed(int(np.random.default_rng([seed, k]).integers(2**63)))
        assert torch.equal(T.AugMix(severity=severity)(crops[k].contiguous()), mixed[k])


@pytest.mark.parametrize("ops, dtype", [("tpt", torch.float32), ("torchvision", torch.uint8)])
def test_nothing_to_mix_is_no_error(ops, dtype):
    views = RandomViews(n_aug=0, size=8, augmix=True, augmix_ops=ops)(picture(20, 20), 0)
    assert views.shape == (1, 3, 8, 8) and views.dtype == dtype


def test_images_of_other_modes_are_read_as_rgb():
    for mode in ("L", "RGBA", "P", "CMYK", "1"):
        image = picture(40, 50, mode=mode)
        augmenter = RandomViews(n_aug=2, size=16)
        assert torch.equal(augmenter(image, 0), augmenter(image.convert("RGB"), 0))


def test_view_seed_is_stable_and_distinct():
    assert view_seed(0, "goldfish/1.png") == 3573847282874615070
    seeds = {view_seed(s, i) for s in range(3) for i in ["a", "b", "1", "11", "a/b.png", "ä"]}
    assert len(seeds) == 18 and all(0 <= s < 2**63 for s in seeds)


def test_spec_names_what_the_pixels_depend_on_and_only_that():
    specs = [json.dumps(RandomViews(n_aug=3, size=8, **p).spec(), sort_keys=True) for p in VARIANTS]
    assert len(set(specs)) == len(VARIANTS)
    assert (
        RandomViews(severity=1).spec() == RandomViews(severity=4, augmix_ops="torchvision").spec()
    )
    assert RandomViews(augmix=True).spec() != RandomViews(augmix=True, severity=2).spec()
    assert RandomViews(n_aug=3).spec() != RandomViews(n_aug=4).spec()
    assert RandomViews(size=8).spec()["class"] == "RandomViews"


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"n_aug": -1}, "n_aug is -1"),
        ({"size": 0}, "size is 0"),
        ({"augmix": True, "severity": 0}, "severity is 0.*1 to 10"),
        ({"augmix": True, "severity": 11}, "severity is 11"),
        ({"augmix_ops": "google"}, "'google'.*'tpt' or 'torchvision'"),
        ({"augmix": True, "autoaugment": True}, "choose one"),
    ],
)
def test_bad_parameters_say_what_is_allowed(params, message):
    with pytest.raises(ValueError, match=message):
        RandomViews(**params)


def test_make_augmenter():
    made = make_augmenter("random", 64, n_aug=7, augmix=True)
    assert made == make_augmenter("AugmenterTPT", 64, n_aug=7, augmix=True)
    assert made == RandomViews(n_aug=7, augmix=True, size=64)
    with pytest.raises(ValueError, match="'patchwork'.*'patch'.*random, AugmenterTPT"):
        make_augmenter("patchwork", 64)
    with pytest.raises(ValueError, match="'overlap'.*n_aug"):
        make_augmenter("random", 64, overlap=0.5)


def test_views_are_fast(mini):
    """64 views of 64 px from 224 px cost at most 0.3 of encoding them, the larger part of stage 1.

    Processor seconds, the least of several: other work on the machine changes both alike.
    """
    image, augmenter = picture(224, 224), RandomViews(size=64)

    def seconds(work) -> float:
        times = []
        for _ in range(6):
            start = time.process_time()
            work()
            times.append(time.process_time() - start)
        return min(times)

    made = augmenter(image, 0)
    share = seconds(lambda: augmenter(image, 0)) / seconds(lambda: mini.encode_views(made))
    assert share < 0.3, f"making the views costs {share:.2f} of encoding them"
    assert views_module.RandomViews().n_views == 64


# --- resampled as matrix products ----------------------------------------------------------------

SHAPES = [(500, 375), (224, 224), (97, 301), (40, 31), (1, 1), (2000, 3), (3, 700), (65, 64)]


def agree(mine: torch.Tensor, pillow: torch.Tensor) -> None:
    """Within one grey level on 99.9 % of the pixels, and no pixel far away."""
    assert mine.shape == pillow.shape and mine.dtype == torch.uint8
    apart = (mine.int() - pillow.int()).abs()
    assert (apart > 1).float().mean() < 1e-3 and apart.max() < 16


def equal_but_for_ties(a: torch.Tensor, b: torch.Tensor) -> bool:
    """A product summed in another order may round a tie the other way, and no more."""
    apart = (a.int() - b.int()).abs()
    return bool(apart.max() <= 1 and (apart > 0).float().mean() < 1e-3)


@pytest.mark.parametrize("size", [64, 224])
@pytest.mark.parametrize("shape", SHAPES)
def test_planned_crops_are_pillows(shape, size):
    image = picture(*shape)
    for augmenter in (
        RandomViews(n_aug=9, size=size),
        RandomViews(n_aug=4, size=size, crop_side=0.3),
        PatchViews(n_aug=1, n_patches=9, overlap=0.4, size=size),
    ):
        assert augmenter.only_crops
        plan = augmenter.plan(image, 5)
        assert plan.pixels.shape == (shape[1], shape[0], 3)
        agree(resample.render(plan, size), augmenter(image, 5))


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "I;16"])
def test_planned_crops_of_any_mode(mode):
    image = picture(90, 70).convert("I") if mode == "I;16" else picture(90, 70, mode=mode)
    augmenter = RandomViews(n_aug=5, size=64)
    agree(resample.render(augmenter.plan(image, 1), 64), augmenter(image, 1))


def test_flips_and_prefixes_of_a_plan():
    image = picture(80, 60)
    plan = RandomViews(n_aug=20, size=32).plan(image, 3)
    views = resample.render(plan, 32)
    fewer = resample.render(RandomViews(n_aug=8, size=32).plan(image, 3), 32)
    assert equal_but_for_ties(views[:9], fewer)
    mirrored = plan.axes.clone()
    mirrored[0, :, 4] = 1 - mirrored[0, :, 4]
    again = resample.render(plan._replace(axes=mirrored), 32)
    assert equal_but_for_ties(again, views.flip(-1))
    assert 4 < plan.axes[0, :, 4].sum() < 16  # half of the crops


def test_a_plan_in_parts_is_the_same_and_stays_within_its_budget(monkeypatch):
    plan = RandomViews(n_aug=12, size=32).plan(picture(200, 150), 0)
    whole, parts = resample.render(plan, 32), []
    render = resample._render
    monkeypatch.setattr(resample, "_render", lambda *a: parts.append(len(a[1][0])) or render(*a))
    monkeypatch.setitem(resample.BUDGET, "cpu", 2**20)
    assert equal_but_for_ties(resample.render(plan, 32), whole)
    assert sum(parts) == 13 and max(parts) < 5


def test_weights_add_up_and_stay_inside():
    axes = np.concatenate(
        [
            resample.axis([3, 10], [50, 11], 16, mirror=[0, 1]),
            resample.axis(0, 57, 40, 12, reach=resample.BICUBIC),
        ]
    )
    weights = resample.weights(torch.from_numpy(axes), 57, 16)
    torch.testing.assert_close(weights.sum(-1), torch.ones(3, 16))
    assert not weights[0, :, :3].any() and not weights[0, :, 50:].any()
    assert torch.equal(weights[1].nonzero()[:, 1], torch.full((16,), 10))
    assert (weights[:2] >= 0).all() and (weights[2] < 0).any()  # the lobes of the cubic filter


def test_mixed_views_have_no_plan():
    for params in VARIANTS[1:]:
        assert not RandomViews(**params).only_crops
    assert not PatchViews(augmix=True).only_crops
