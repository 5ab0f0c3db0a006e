"""Methods that change the image tower: batch-norm adaptation, TENT, MEMO.

Each against a literal restatement on a copy of the model, which sets what the paper says and calls
open_clip itself.
"""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from test_methods import NAMES
from torch import nn

from tpt_nb import methods, models
from tpt_nb.methods.image_tower import BATCH_NORMS, mixed_batch_norm, norm_parameters
from tpt_nb.models import Prompts
from tpt_nb.runs import RunConfig, run

TOWER = ("bn", "tent", "memo")
STREAMS = ("bn", "tent")
N, V = 7, 5


def world_of(clip):
    """Prompts, features [N,V,D], ids, and pixels that are coloured blobs, another for each id."""
    generator = torch.Generator().manual_seed(3)
    size, pictures = clip.image_size, {}
    for i in range(N):
        coarse = torch.rand(V, 3, 4, 4, generator=generator) * 0.5 + 0.5 * torch.rand(
            1, 3, 4, 4, generator=generator
        )
        pictures[f"image {i}"] = (255 * F.interpolate(coarse, size)).to(torch.uint8)
    features = torch.stack([clip.encode_views(x) for x in pictures.values()])
    return Prompts(clip, NAMES), features, list(pictures), pictures.__getitem__


def tiny(name, **vision):
    """An untrained CLIP with a small image tower, spread out as the fixture ``mini``."""
    model = models.build_mini(config=models.MINI_CONFIG | {"vision_cfg": vision})
    with torch.no_grad():
        model.token_embedding.weight.mul_(5)
        model.logit_scale.fill_(4.6)
    return models.wrap(model, name, "cpu")


@pytest.fixture(scope="module")
def resnet():
    return tiny("tiny-rn", layers=(1, 1, 1, 1), width=8, head_width=64, image_size=64)


@pytest.fixture(scope="module")
def vit():
    return tiny("tiny-vit", layers=2, width=64, head_width=32, patch_size=16, image_size=32)


@pytest.fixture(scope="module")
def world(resnet):
    return world_of(resnet)


def adapt(name, world, orders=None, **options):
    prompts, features, ids, pixels = world
    inputs = {"pixels": pixels, "ids": ids} | ({} if orders is None else {"orders": orders})
    return methods.get(name)(features, prompts, inputs=inputs, **options)


class ByHand:
    """A copy of the image tower, fed with normalised pictures."""

    def __init__(self, world) -> None:
        prompts, _, self.ids, self.pixels = world
        clip = prompts.clip
        self.tower = copy.deepcopy(clip.model.visual)
        self.text, self.scale = prompts.text_features().detach(), float(clip.logit_scale)
        self.mean, self.std = (torch.tensor(x).view(1, 3, 1, 1) for x in (clip.mean, clip.std))

    def norms(self):
        return [m for m in self.tower.modules() if isinstance(m, BATCH_NORMS)]

    def logits(self, views):
        f = self.tower((views.float() / 255 - self.mean) / self.std)
        return self.scale * f / f.norm(dim=1, keepdim=True) @ self.text.T

    def mix(self, prior, images=None):
        """Each batch norm normalises by the mixed statistics of what comes in."""

        def hook(layer, inputs, _):
            (x,) = inputs
            n, out = images or len(x), []
            for c in range(x.shape[1]):
                values = x[:, c]
                given = values.detach() if prior else values
                mean = given.sum() / given.numel()
                var = ((given - mean) ** 2).sum() / given.numel()
                mean = (prior * layer.running_mean[c] + n * mean) / (prior + n)
                var = (prior * layer.running_var[c] + n * var) / (prior + n)
                each = (values - mean) / torch.sqrt(var + layer.eps)
                out.append(layer.weight[c] * each + layer.bias[c])
            return torch.stack(out, dim=1)

        for layer in self.norms():
            layer.register_forward_hook(hook)


def order_of(seed):
    return torch.randperm(N, generator=torch.Generator().manual_seed(seed)).tolist()


# --- the layer -----------------------------------------------------------------------------------


def test_a_layer_without_prior_is_in_training_and_with_an_endless_one_as_it_was():
    layer = nn.BatchNorm2d(3).eval()
    with torch.no_grad():
        for values in (layer.running_mean, layer.running_var, layer.weight, layer.bias):
            values.uniform_(0.5, 2)
    x = torch.randn(4, 3, 5, 5) * 3 + 1
    expected = F.batch_norm(x, None, None, layer.weight, layer.bias, training=True)
    torch.testing.assert_close(mixed_batch_norm(layer, 0, None, x), expected)
    tiny = mixed_batch_norm(layer, 1e-9, None, x)  # the other branch
    torch.testing.assert_close(tiny, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(mixed_batch_norm(layer, 1e12, None, x), layer(x))
    as_one = mixed_batch_norm(layer, 4.0, 1, x)
    torch.testing.assert_close(as_one, mixed_batch_norm(layer, 16.0, None, x))
    # mixed statistics are given, as far as gradients go: a channel is x times a number
    x.requires_grad_(True)
    mixed = mixed_batch_norm(layer, 4.0, None, x)
    (gradient,) = torch.autograd.grad(mixed.sum(), x)
    for c in range(3):
        var = (layer.running_var[c] + x[:, c].var(correction=0)) / 2  # 4 images, a prior of 4
        slope = layer.weight[c] / torch.sqrt(var + layer.eps)
        torch.testing.assert_close(gradient[:, c], slope.expand_as(x[:, c]))


# --- against the papers --------------------------------------------------------------------------


@pytest.mark.parametrize("prior", [0.0, 6.0])
def test_bn_is_the_formula(world, prior):
    hand, order = ByHand(world), order_of(2)
    hand.mix(prior)
    out = adapt("bn", world, batch_size=3, prior=prior, order=2).logits
    with torch.no_grad():
        for start in range(0, N, 3):
            part = order[start : start + 3]
            views = torch.stack([hand.pixels(hand.ids[i])[0] for i in part])
            torch.testing.assert_close(out[part], hand.logits(views), atol=2e-3, rtol=1e-3)
    assert (out - adapt("bn", world, prior=1e9).logits).abs().max() > 0.02


@pytest.mark.parametrize("forget", [False, True])
def test_tent_is_the_algorithm(world, forget):
    hand, order, rate = ByHand(world), order_of(5), 3e-3
    tuned = []
    for layer in hand.norms():
        layer.train()
        layer.running_mean = layer.running_var = None  # the batch's own, always
        tuned += [layer.weight.requires_grad_(True), layer.bias.requires_grad_(True)]
    start = [w.detach().clone() for w in tuned]
    speed = [torch.zeros_like(w) for w in tuned]
    out = adapt(
        "tent", world, batch_size=3, norm_lr=rate, order=5, norm_steps=2, forget=forget
    ).logits
    for first in range(0, N, 3):
        part = order[first : first + 3]
        views = torch.stack([hand.pixels(hand.ids[i])[0] for i in part])
        if forget:
            for w, s, m in zip(tuned, start, speed, strict=True):
                w.data, m[...] = s.clone(), 0
        for _ in range(2):
            z = hand.logits(views)
            loss = 0
            for row in z:  # mean over the batch of -sum p log p
                p = row.softmax(0)
                loss = loss - (p * p.log()).sum() / len(z)
            for w, m, g in zip(tuned, speed, torch.autograd.grad(loss, tuned), strict=True):
                m[...] = 0.9 * m + g
                w.data -= rate * m
        expected = hand.logits(views) if forget else z
        torch.testing.assert_close(out[part], expected, atol=5e-3, rtol=1e-3)
    apart = out - adapt("tent", world, batch_size=3, norm_lr=1e-12, order=5).logits
    assert apart[order[-1]].abs().max() > 0.05  # the last image has seen steps


@pytest.mark.parametrize("part", ["all", "norms"])
def test_memo_is_the_algorithm(world, part):
    rate, prior = 1e-3, 4.0
    options = {"tower_lr": rate, "prior": prior, "tower_part": part}
    out = adapt("memo", world, **options)
    for i in (0, N - 1):
        hand = ByHand(world)
        hand.mix(prior, images=1)
        views = hand.pixels(hand.ids[i])
        if part == "all":
            tuned = list(hand.tower.parameters())
        else:
            tuned = [w for layer in hand.norms() for w in (layer.weight, layer.bias)]
        for w in tuned:
            w.requires_grad_(True)
        mean = hand.logits(views).softmax(1).mean(0)
        loss = -(mean * mean.log()).sum()
        torch.testing.assert_close(out.loss[i], loss, atol=1e-4, rtol=1e-4)
        for w, g in zip(tuned, torch.autograd.grad(loss, tuned, allow_unused=True), strict=True):
            w.data -= rate * (0 if g is None else g)
        with torch.no_grad():
            torch.testing.assert_close(
                out.logits[i], hand.logits(views[:1])[0], atol=5e-3, rtol=1e-3
            )
    still = adapt("memo", world, **options | {"tower_lr": 1e-12}).logits
    assert (still - out.logits).abs().max() > 0.05


def test_more_steps_of_memo_lower_the_marginal_entropy(world):
    """View 0 alone: what falls is the entropy of the prediction itself."""
    prompts, features, ids, pixels = world
    one = prompts, features[:, :1], ids, lambda name: pixels(name)[:1]
    entropies = []
    for steps in (1, 3):
        out = adapt("memo", one, tower_lr=1e-6, tower_optimizer="adamw", tower_steps=steps)
        entropies.append(torch.distributions.Categorical(logits=out.logits).entropy())
    assert (entropies[0] < out.loss).all() and (entropies[1] < entropies[0]).all()


# --- properties ----------------------------------------------------------------------------------


def state(clip):
    """Everything of a model that a method could leave changed: every bit, flags, gradients."""
    model = clip.model
    flags = [(w.requires_grad, w.grad) for w in model.parameters()]
    layers = [(m.training, "forward" in vars(m)) for m in model.modules()]
    return models.weights_fingerprint(model), flags, layers


@pytest.mark.parametrize("name", TOWER)
@pytest.mark.parametrize("breaks", [False, True])
def test_the_model_comes_back_as_it_was(world, resnet, name, breaks):
    prompts, features, ids, pixels = world
    before = state(resnet)
    rate = {"bn": {}, "tent": {"norm_lr": 0.1}, "memo": {"tower_lr": 0.1}}[name]
    rate |= {"batch_size": 2} if name in STREAMS else {}

    def some(name):
        if breaks and name == ids[-1]:
            raise OSError("gone")
        return pixels(name)

    if breaks:
        with pytest.raises(OSError, match="gone"):
            adapt(name, (prompts, features, ids, some), **rate)
    else:
        adapt(name, world, **rate)
    assert state(resnet) == before
    assert torch.equal(resnet.encode_views(pixels(ids[0])), features[0])


@pytest.mark.parametrize("name", TOWER)
def test_what_every_method_returns(world, name):
    prompts, features, *_ = world
    out = adapt(name, world)
    zero_shot = methods.get("zero_shot")(features, prompts)
    torch.testing.assert_close(out.logits_before, zero_shot.logits)
    assert out.logits.shape == (N, len(NAMES)) and out.logits.isfinite().all()
    assert torch.equal(out.selected, zero_shot.selected if name in STREAMS
                       else torch.ones_like(out.selected))  # fmt: skip
    if name in STREAMS:
        torch.testing.assert_close(out.loss, zero_shot.loss)


def test_memo_sees_one_image_and_bn_a_batch(world):
    prompts, features, ids, pixels = world
    few = prompts, features[2:4], ids[2:4], pixels
    memo = adapt("memo", world, tower_lr=1e-3).logits[2:4]
    assert torch.equal(adapt("memo", few, tower_lr=1e-3).logits, memo)
    assert (adapt("bn", few).logits - adapt("bn", world).logits[2:4]).abs().max() > 1e-3
    torch.testing.assert_close(  # but not the order inside a batch
        adapt("bn", world, order=1).logits, adapt("bn", world).logits, atol=1e-3, rtol=1e-3
    )


@pytest.mark.parametrize("name", STREAMS)
def test_many_orders_are_each_alone(world, name):
    rows = torch.stack([torch.tensor(order_of(s)) for s in (0, 4)])
    options = {"batch_size": 2} | ({"norm_lr": 1e-2} if name == "tent" else {})
    both = adapt(name, world, orders=rows, **options).logits
    assert both.shape == (2, N, len(NAMES))
    for k, seed in enumerate((0, 4)):
        assert torch.equal(both[k], adapt(name, world, order=seed, **options).logits)
        assert torch.equal(both[k], adapt(name, world, orders=rows[k], **options).logits)
    assert (both[0] - both[1]).abs().max() > 1e-3


def test_tent_that_forgets_does_not_know_earlier_batches(world):
    order = torch.tensor(order_of(0))
    swapped = torch.cat([order[3:6], order[:3], order[6:]])
    options = {"batch_size": 3, "norm_lr": 1e-2}
    one, other = (adapt("tent", world, orders=o, forget=True, **options).logits
                  for o in (order, swapped))  # fmt: skip
    assert torch.equal(one, other)
    one, other = (adapt("tent", world, orders=o, **options).logits for o in (order, swapped))
    assert (one - other).abs().max() > 1e-2


def test_a_transformer_has_its_layer_norms_tuned_and_no_statistics(vit):
    world = world_of(vit)
    before = state(vit)
    with pytest.raises(ValueError, match="^tiny-vit has no batch norm.*nothing to adapt") as error:
        adapt("bn", world)
    assert "\n" not in str(error.value)
    norms = [m for m in vit.model.visual.modules() if isinstance(m, nn.LayerNorm)]
    assert len(norm_parameters(vit.model.visual)) == 2 * len(norms) > 0
    plain = world[1][:, 0] @ world[0].text_features().T * vit.logit_scale
    tent = adapt("tent", world, batch_size=4, norm_lr=1.0).logits
    first = torch.tensor(order_of(0)[:4])
    torch.testing.assert_close(tent[first], plain[first], atol=1e-3, rtol=1e-3)
    assert (tent - plain).abs().max() > 1e-2
    assert (adapt("memo", world, tower_lr=1e-2, tower_part="norms").logits - plain).abs().max() > 0
    assert state(vit) == before


@pytest.mark.parametrize("name", TOWER)
def test_bad_input_is_named(world, name):
    prompts, features, ids, pixels = world
    with pytest.raises(ValueError, match=f"{name} needs the pixels"):
        methods.get(name)(features, prompts)
    with pytest.raises(ValueError, match=f"for each of the {N} images; .* 2 ids"):
        adapt(name, (prompts, features, ids[:2], pixels))
    with pytest.raises(ValueError, match="prior is -1"):
        adapt(name, world, prior=-1.0)


def test_memo_wants_the_views_of_the_features(world):
    prompts, features, ids, pixels = world
    with pytest.raises(ValueError, match=f"gave 1 views, its features have {V}"):
        adapt("memo", (prompts, features, ids, lambda name: pixels(name)[:1]))


@pytest.mark.parametrize("name", TOWER)
def test_a_run_of_it(tmp_path, name):
    done = run(RunConfig(profile="mini", dataset="iconshift-v2", method=name, n_aug=2,
                         reduced_size=3, cache=str(tmp_path / "cache"),
                         out=str(tmp_path / "runs")), progress=False)  # fmt: skip
    assert done.summary["n"] == 3
    assert all(math.isfinite(record["entropy_after"]) for record in done.records)
    assert done.config.n_aug == (2 if name == "memo" else 0)
