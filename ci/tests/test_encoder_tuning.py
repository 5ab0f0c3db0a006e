import pytest
import torch

from tpt_nb import datasets, methods
from tpt_nb.core.images import as_rgb, view_seed
from tpt_nb.features import encode
from tpt_nb.models import Prompts
from tpt_nb.runs import RunConfig, run
from tpt_nb.views import RandomViews

N, N_AUG = 3, 11


@pytest.fixture(scope="module")
def world(mini):
    """Images, features and prompts of few classes, and the pixels of the views."""
    data = datasets.load("iconshift-a", n=N)
    features = encode(data, mini, RandomViews(n_aug=N_AUG, size=mini.image_size), cache=False)
    names = [data.classnames[int(t)] for t in features.targets] + ["dog", "bus"]
    augmenter = RandomViews(n_aug=N_AUG, size=mini.image_size)

    def pixels(name):
        return augmenter(as_rgb(data[data.ids.index(name)][0]), view_seed(0, name))

    return data, features, Prompts(mini, names), pixels


def tune(features, prompts, pixels, ids, **options):
    inputs = {"pixels": pixels, "ids": ids}
    return methods.get("tune_encoder")(features, prompts, inputs=inputs, **options)


def test_a_tower_that_does_not_move_is_tpt(world):
    _, features, prompts, pixels = world
    tpt = methods.get("tpt")(features.features, prompts, rho=0.3, lr=0.02)
    out = tune(features.features, prompts, pixels, features.ids, rho=0.3, lr=0.02, encoder_lr=0.0)
    torch.testing.assert_close(out.logits, tpt.logits, atol=1e-3, rtol=0)
    # the project's bound for logits in float32: the initial text features are made in two ways
    torch.testing.assert_close(out.logits_before, tpt.logits_before, atol=1e-4, rtol=0)
    assert torch.equal(out.selected, tpt.selected)


def test_the_tower_takes_a_step_of_its_own_and_the_loss_falls(world, mini):
    data, features, prompts, pixels = world
    still, moved = (
        tune(features.features, prompts, pixels, features.ids, rho=0.3, lr=1e-12, encoder_lr=rate)
        for rate in (0.0, 1e-5)
    )
    assert (still.logits - moved.logits).abs().amax(1).min() > 1e-3
    assert (still.loss - moved.loss).abs().max() < 1e-6  # of the initial prompt and tower
    # view 0 alone, chosen: what the step lowers is the entropy of the prediction itself
    alone = features.features[:, :1]
    first = lambda name: pixels(name)[:1]  # noqa: E731
    out = tune(alone, prompts, first, features.ids, rho=1.0, lr=1e-12, encoder_lr=1e-6)
    entropy = torch.distributions.Categorical(logits=out.logits).entropy()
    assert (entropy < out.loss).all()


def test_images_do_not_see_each_other(world):
    _, features, prompts, pixels = world
    kwargs = {"rho": 0.3, "lr": 0.02, "encoder_lr": 1e-4}
    all_ = tune(features.features, prompts, pixels, features.ids, **kwargs)
    back = tune(features.features.flip(0), prompts, pixels, features.ids[::-1], **kwargs)
    assert torch.equal(all_.logits, back.logits.flip(0))


def test_the_model_comes_back_as_it_was(world, mini):
    _, features, prompts, pixels = world
    before = {k: v.clone() for k, v in mini.model.state_dict().items()}
    flags = [w.requires_grad for w in mini.model.parameters()]

    def breaks(name):
        if name == features.ids[-1]:
            raise OSError("gone")
        return pixels(name)

    with pytest.raises(OSError, match="gone"):
        tune(features.features, prompts, breaks, features.ids, encoder_lr=1e-2)
    assert all(torch.equal(v, before[k]) for k, v in mini.model.state_dict().items())
    assert [w.requires_grad for w in mini.model.parameters()] == flags


def test_bad_input_is_named(world):
    _, features, prompts, pixels = world
    with pytest.raises(ValueError, match="needs the pixels"):
        methods.get("tune_encoder")(features.features, prompts)
    with pytest.raises(ValueError, match="encoder_lr"):
        tune(features.features, prompts, pixels, features.ids, encoder_lr=-1.0)
    with pytest.raises(ValueError, match="not those of the features"):
        tune(features.features, prompts, pixels, features.ids[1:] + features.ids[:1])
    with pytest.raises(ValueError, match=f"gave 1 views, its features have {N_AUG + 1}"):
        one = lambda name: pixels(name)[:1]  # noqa: E731
        tune(features.features, prompts, one, features.ids)


def test_a_run_of_it(tmp_path):
    config = RunConfig(profile="mini", dataset="iconshift-a", method="tune_encoder", n_aug=3,
                       reduced_size=2, options={"encoder_lr": 1e-4}, cache=str(tmp_path / "cache"),
                       out=str(tmp_path / "runs"))  # fmt: skip
    done = run(config, progress=False)
    assert done.summary["n"] == 2 and "encoder_lr" in done.dir.name
