"""Runs with patches: the loss learns how the views lie, and mistakes are named before any work."""

from pathlib import Path

import pytest
import torch
from test_runs import config, world  # noqa: F401 (fixtures)

from tpt_nb import methods, models, runs
from tpt_nb.features import encode
from tpt_nb.losses import LOSSES
from tpt_nb.losses import get as get_loss
from tpt_nb.runs import run
from tpt_nb.views import make_augmenter

PATCHES = {"augmenter": "PatchAugmenter", "n_aug": 2, "n_patches": 4, "reduced_size": 6}


def one_run(config, **changes) -> runs.Run:  # noqa: F811
    return run(config.replace(**changes), progress=False)


@pytest.mark.parametrize(
    "loss", ["marginal_entropy", "patch_loss1", "patch_loss6_study", "overlap_affinity"]
)
def test_a_run_with_patches_is_the_method_on_the_patches(config, loss):  # noqa: F811
    """Every option reaches its place: the records are those of the parts put together by hand."""
    options = {"overlap": 0.3, "selection_p_patch": 0.7, "alpha_exponential_weightening": 2.0}
    done = one_run(config, loss=loss, **PATCHES, **options)
    clip = models.load(config.model, device="cpu")
    augmenter = make_augmenter("patch", clip.image_size, n_aug=2, n_patches=4, overlap=0.3)
    from tpt_nb import datasets

    data = datasets.load("folder", n=6, root=config.root)
    features = encode(data, clip, augmenter, cache=False, workers=0, progress=False)
    prompts = runs.make_prompts(config, clip, data.classnames)
    fn = get_loss(loss, groups=(5, 3), rho_patch=0.7, alpha=2.0, overlap=0.3)
    adapted = methods.get("tpt")(features.features, prompts, loss=fn, rho=0.3)
    expected = runs.to_records(features.ids, features.targets, adapted)
    assert done.records == expected
    assert all(max(r["selected"]) < 15 for r in done.records)
    assert {"npatch=4", "overlap=0.3", "sppat=0.7", "alpha=2"} <= set(done.name.split("_"))


def test_a_grid_that_is_not_square_warns_once(config):  # noqa: F811
    with pytest.warns(UserWarning, match="2 x 2 = 4 patches") as seen:
        done = one_run(config, **PATCHES | {"n_patches": 8})
    assert sum("patches" in str(w.message) for w in seen) == 1
    assert len(done.records) == 6


def test_zero_shot_looks_at_the_image_only(config):  # noqa: F811
    plain = one_run(config, method="zero_shot", reduced_size=6)
    patched = one_run(config, method="zero_shot", overlap=0.2, augmix=True, **PATCHES)
    assert patched.name == plain.name


@pytest.mark.parametrize(
    "change, message",
    [
        ({"loss": "patch_loss1"}, "'patch_loss1' looks at patches.*have none.*n_patches"),
        ({"loss": "patch_loss1", "augmenter": "patch"}, "have none.*n_patches of 1 or more"),
        ({"loss": "patch_loss4_study", **PATCHES, "n_aug": 0}, r"int\(1 \* 0.9\) = 0.*_study"),
        ({"loss": "crossentropy_soft", "n_aug": 0}, "only the image itself"),
        ({"loss": "crossentropy_soft_study", "n_aug": 2}, r"int\(2 \* 0.3\) = 0"),
        ({"n_patches": 4}, "n_patches=4 means nothing to augmenter 'random'; it is for patch"),
        ({"overlap": 0.5}, "overlap=0.5 means nothing to augmenter 'random'"),
        ({"crop_side": 0.5, **PATCHES}, "crop_side=0.5 means nothing.*for random"),
        ({"autoaugment": True, **PATCHES}, "autoaugment=True means nothing"),
        ({**PATCHES, "overlap": 1.2}, "overlap is 1.2; it must be from 0"),
        ({"crop_side": 0.0}, r"crop_side is 0.0.*\(0, 1\]"),
        ({"loss": "patch_loss7"}, "unknown loss 'patch_loss7'; did you mean 'patch_loss"),
    ],
    ids=str,
)
def test_mistakes_are_named_and_leave_nothing_behind(config, change, message):  # noqa: F811
    with pytest.raises(ValueError, match=message):
        one_run(config, **change)
    assert not Path(config.out).exists()


def test_every_loss_runs(config):  # noqa: F811
    for loss in LOSSES:
        done = one_run(config, loss=loss, **PATCHES)
        assert all(r["loss"] is not None and r["loss"] >= 0 for r in done.records), loss
        assert torch.tensor([r["conf_after"] for r in done.records]).isfinite().all()


def test_random_crops_of_a_fixed_side(config):  # noqa: F811
    wide, narrow = (one_run(config, crop_side=s, reduced_size=6) for s in (0.9, 0.3))
    assert "crop_side=0.3" in narrow.name and wide.records != narrow.records
