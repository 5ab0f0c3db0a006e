"""Adversarial images: within their bound, whole grey levels, and worse for zero-shot."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from test_methods import NAMES

from tpt_nb import datasets, features, models, views
from tpt_nb.features import Pgd, attack, attacked, zero_shot_loss

N = 8


@pytest.fixture(scope="module")
def trained():
    return models.load("mini", device="cpu")


@pytest.fixture(scope="module")
def clean():
    return datasets.load("iconshift-v2", n=N)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


def pixels(data, i):
    return np.asarray(data[i][0]).astype(int)


def logits(data, clip):
    augmenter = views.RandomViews(n_aug=0, size=clip.image_size)
    found = features.encode(data, clip, augmenter, cache=False, progress=False)
    text = models.template_features(clip, data.classnames, "single")
    return clip.logit_scale * found.features[:, 0] @ text.T, found.targets


@pytest.mark.parametrize("eps", [1, 4])
def test_within_the_bound_and_worse(clean, trained, cache, eps):
    bad = attacked(clean, trained, Pgd(eps), cache=cache, progress=False)
    assert (bad.ids, bad.targets) == (clean.ids, clean.targets)
    assert bad.fingerprint != clean.fingerprint and bad.name == f"iconshift-v2+pgd{eps}"
    for i in range(N):
        image, target = bad[i]
        assert image.mode == "RGB" and target == clean.targets[i]
        assert np.abs(pixels(bad, i) - pixels(clean, i)).max() == eps
    (before, targets), (after, _) = logits(clean, trained), logits(bad, trained)
    assert (F.cross_entropy(after, targets, reduction="none")
            > F.cross_entropy(before, targets, reduction="none")).all()  # fmt: skip
    right, still = ((z.argmax(1) == targets).sum() for z in (before, after))
    assert right >= 3 and still < right


def test_the_attack_is_not_mere_noise(clean, trained):
    """Random changes of the same size do next to nothing to the loss."""
    text = models.template_features(trained, clean.classnames, "single")
    generator = torch.Generator().manual_seed(0)
    for i in range(3):
        picture = torch.from_numpy(np.asarray(clean[i][0]).copy())
        loss = zero_shot_loss(trained, text, clean.targets[i])
        worst = attack(picture, loss, Pgd(2), torch.Generator().manual_seed(0))
        noise = 2 * torch.randint(0, 2, picture.shape, generator=generator) * 2 - 2
        noisy = (picture + noise).clamp(0, 255)
        with torch.no_grad():
            base, bad, chance = (float(loss(x.float())) for x in (picture, worst, noisy))
        assert bad - base > 5 * abs(chance - base)


def test_nothing_is_changed_by_nothing(clean, trained, cache):
    assert attacked(clean, trained, Pgd(0), cache=cache) is clean


def test_the_same_again_whatever_else_is_there(clean, trained, cache, tmp_path):
    """Another folder, a part of the set, a resumed one: the same pictures; another seed: others."""
    bad = attacked(clean, trained, Pgd(1, steps=2), cache=cache, progress=False)
    part = datasets.subset(clean, [4, 1])
    alone = attacked(part, trained, Pgd(1, steps=2), cache=tmp_path, progress=False)
    assert alone.fingerprint == bad.fingerprint
    for k, i in enumerate([4, 1]):
        assert np.array_equal(pixels(alone, k), pixels(bad, i))
    kept = pixels(bad, 0)
    (cache / bad.paths[0]).unlink()
    untouched = (cache / bad.paths[1]).stat().st_mtime_ns
    again = attacked(clean, trained, Pgd(1, steps=2), cache=cache, progress=False)
    assert np.array_equal(pixels(again, 0), kept)
    assert (cache / bad.paths[1]).stat().st_mtime_ns == untouched
    other = attacked(part, trained, Pgd(1, steps=2, seed=1), cache=tmp_path, progress=False)
    assert other.fingerprint != bad.fingerprint
    assert not np.array_equal(pixels(other, 0), pixels(bad, 4))


def test_the_model_is_left_as_it_was(clean, trained, tmp_path):
    before = models.weights_fingerprint(trained.model)
    part = datasets.subset(clean, [0])
    attacked(part, trained, Pgd(1, steps=1), cache=tmp_path, progress=False)
    assert models.weights_fingerprint(trained.model) == before
    assert all(w.grad is None and not w.requires_grad for w in trained.model.parameters())


def test_the_gradient_is_that_of_finite_differences(mini64):
    """From the pixels of a picture that is no square through resampling, tower and softmax."""
    generator = torch.Generator().manual_seed(1)
    coarse = torch.rand(1, 3, 7, 5, generator=generator, dtype=torch.float64)
    picture = 60 + 120 * F.interpolate(coarse, (98, 75), mode="bilinear")[0].permute(1, 2, 0)
    text = models.template_features(mini64, NAMES, "single").double()
    loss = zero_shot_loss(mini64, text, 2)
    leaf = picture.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(loss(leaf), leaf)
    assert (gradient[[0, -1]] == 0).all()  # rows that the square in the middle leaves out
    directions = [gradient.sign(), torch.randn(picture.shape, generator=generator).double()]
    bump = torch.zeros_like(picture)
    bump[40:52, 30:45, 1] = 1  # some pixels of one colour
    for step in (*directions, bump):
        with torch.no_grad():
            up, down = (float(loss(picture + s * 0.05 * step)) for s in (1, -1))
        expected = float((gradient * step).sum())
        assert (up - down) / 0.1 == pytest.approx(expected, rel=0.02, abs=2e-4)


def test_the_first_view_with_gradients_is_that_without():
    rng = np.random.default_rng(0)
    for width, height in ((224, 224), (90, 131), (301, 64), (40, 50)):
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8))
        found = views.first_view(torch.from_numpy(np.asarray(image).copy()).float(), 64)
        expected = torch.from_numpy(np.asarray(views.center_view(image, 64)).copy())
        assert found.shape == (3, 64, 64)
        apart = (found - expected.permute(2, 0, 1)).abs()
        assert apart.max() < 2 and apart.mean() < 0.5  # Pillow rounds twice


def test_a_linear_loss_is_pushed_to_the_corner():
    """Enough steps: every pixel goes by eps to the side of its weight, inside of 0 to 255."""
    generator = torch.Generator().manual_seed(2)
    clean = torch.randint(0, 256, (6, 5, 3), generator=generator).to(torch.uint8)
    clean[0], clean[1] = 0, 255
    weight = torch.randn(clean.shape, generator=generator)
    for eps in (1, 3, 4):
        bad = attack(clean, lambda x: (weight * x).sum(), Pgd(eps, steps=8), generator)
        expected = (clean.int() + eps * weight.sign().int()).clamp(0, 255)
        assert bad.dtype == torch.uint8 and torch.equal(bad.int(), expected)
    assert torch.equal(attack(clean, lambda x: (weight * x).sum(), Pgd(0), generator), clean)


@pytest.mark.parametrize("values", [(0.5, 7), (-1, 7), (256, 7), (4, 0)])
def test_bad_bounds_are_named(values):
    with pytest.raises(ValueError, match="eps must be whole grey levels"):
        Pgd(*values)
