"""The fast path gives what the paper's gives: every loss, every kind of prompt, both gradients."""

import copy
import warnings

import open_clip
import pytest
import torch
import torch.nn.functional as F
from test_adapt import assert_equal, views_of

from tpt_nb import methods, models
from tpt_nb.core import machine
from tpt_nb.losses import LOSSES
from tpt_nb.losses import get as get_loss
from tpt_nb.methods import tuning
from tpt_nb.models import LONGEST, Packed, Prompts, causal_tower, prefix_states
from tpt_nb.models import packed as packed_module

NAMES = ["cat", "hot air balloon", "fire_engine", "St. Bernard", "U.S.", "X-ray of a b c", "cat"]
MANY = 10**6  # images: the Jacobian is worth it
FEW = 1


def tpt(features, prompts, n_images=None, cache=None, **options):
    """TPT on some of so many images."""
    prompts.expect(n_images, cache)
    try:
        return methods.get("tpt")(features, prompts, **options)
    finally:
        prompts.expect()


@pytest.fixture(scope="module")
def small() -> models.Clip:
    """A CLIP whose Jacobian is quick to make, float64."""
    config = models.MINI_CONFIG | {
        "embed_dim": 48,
        "text_cfg": models.MINI_CONFIG["text_cfg"] | {"width": 64, "heads": 2},
    }
    model = models.build_mini(seed=1, config=config)
    with torch.no_grad():
        model.token_embedding.weight.mul_(5)
        model.logit_scale.fill_(4.6)
    return models.wrap(model.double(), "small-random", device="cpu")


@pytest.fixture(scope="module")
def prompts(small) -> Prompts:
    return Prompts(small, NAMES)


def contexts(prompts, batch, seed=0):
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(batch, *prompts.ctx.shape, generator=generator, dtype=torch.float64)
    return prompts.ctx.double() + 0.05 * noise


# --- text features without a gradient ------------------------------------------------------------


def test_packed_rows_equal_the_differentiable_ones(prompts):
    ctx = contexts(prompts, 3)
    with torch.no_grad():
        packed = prompts.rows(ctx)
    plain = prompts.rows(ctx.requires_grad_(True))
    assert plain.requires_grad and not packed.requires_grad
    torch.testing.assert_close(packed, plain.detach(), atol=1e-12, rtol=0)


@pytest.mark.parametrize("laid_out", [True, False], ids=["oneDNN", "plain"])
def test_packed_rows_in_float32(mini, monkeypatch, laid_out):
    """Both matrix products, with rows that do not divide the blocks of the MLP."""
    if not laid_out:
        monkeypatch.setattr(packed_module, "lay_out", lambda weight: None)
    monkeypatch.setattr(packed_module, "ROWS", 7)
    prompts = Prompts(mini, NAMES)
    ctx = contexts(prompts, 3).float()
    with torch.no_grad():
        packed = prompts.rows(ctx)
    layer = prompts.once("packed", lambda: pytest.fail("not used")).blocks[0].up
    if layer.laid_out is None and laid_out:
        pytest.skip("this torch has no product with weights laid out")
    assert (layer.laid_out is not None) == laid_out
    plain = prompts.rows(ctx.requires_grad_(True)).detach()
    torch.testing.assert_close(packed, plain, atol=2e-5, rtol=0)


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu", "layer scale"])
def test_other_activations_and_layer_scale(activation):
    config = {
        "embed_dim": 32,
        "vision_cfg": {"layers": 1, "width": 64, "patch_size": 32, "image_size": 32},
        "text_cfg": {"width": 64, "heads": 2, "layers": 2},
        "quick_gelu": activation == "quick_gelu",
    }
    if activation == "layer scale":
        config["text_cfg"]["ls_init_value"] = 0.5
    torch.manual_seed(0)
    model = models.wrap(open_clip.CLIP(**config).double(), "other", device="cpu")
    prompts = Prompts(model, NAMES)
    ctx = contexts(prompts, 2)
    paper = prompts.text_features(ctx, exact="paper")
    torch.testing.assert_close(prompts.text_features(ctx), paper, atol=1e-12, rtol=0)
    features = views_of(prompts, 2, 10).double()
    fast = tpt(features, prompts, n_images=MANY)
    assert_equal(fast, methods.get("tpt")(features, prompts, exact="paper"))


@pytest.mark.parametrize("last", [1, LONGEST - 2, LONGEST - 1, 60])
def test_names_of_one_to_sixty_tokens(small, last):
    """Beyond LONGEST the other route takes over; both sides of the border give the same."""
    names = ["cat " * n for n in (1, 2, 3, last)]
    prompts = Prompts(small, names)
    assert max(len(name) for name, _ in prompts.tokens) == max(3, last)
    ctx = contexts(prompts, 2)
    paper = prompts.text_features(ctx, exact="paper")
    torch.testing.assert_close(prompts.text_features(ctx), paper, atol=1e-12, rtol=0)


def test_the_layout_has_no_padding_and_covers_every_token(prompts):
    with torch.no_grad():
        prefix, suffixes, order = prompts._split(contexts(prompts, 2))
        packed = Packed(prompts.clip.model, suffixes, order)
        rows = causal_tower(prompts.clip.model, prefix, suffixes)
    tokens = sum(len(name) + len(rest) + 1 for name, rest in prompts.tokens)
    assert packed.x.shape[1] == tokens == sum(n for _, n, _, _ in packed.all)
    assert sum(n for _, n, _, _ in packed.ends) == len(NAMES)
    torch.testing.assert_close(packed(prefix), rows[:, order], atol=1e-12, rtol=0)


def test_class_order_and_duplicates(prompts, small):
    ctx = contexts(prompts, 2)
    features = prompts.text_features(ctx)
    torch.testing.assert_close(features[:, 0], features[:, 6], atol=1e-14, rtol=0)
    order = [3, 0, 5, 1, 6, 2, 4]
    shuffled = Prompts(small, [NAMES[i] for i in order]).text_features(ctx)
    torch.testing.assert_close(shuffled, features[:, order], atol=1e-12, rtol=0)


def test_a_thousand_classes(small):
    words = ["cat", "dog", "bus", "hat", "cup", "pen", "key", "map", "box", "car"]
    names = [f"{a} {b} {c}" for a in words for b in words for c in words]
    prompts = Prompts(small, names)
    ctx = contexts(prompts, 1)
    some = [0, 123, 999]
    few = Prompts(small, [names[i] for i in some]).text_features(ctx, exact="paper")
    torch.testing.assert_close(prompts.text_features(ctx)[:, some], few, atol=1e-12, rtol=0)
    features = views_of(prompts, 2, 8).double()
    assert_equal(
        methods.get("tpt")(features, prompts),
        methods.get("tpt")(features, prompts, batch=1),
        atol=1e-9,
    )


def test_what_is_made_once_is_not_kept_while_the_model_trains(small):
    model = copy.copy(small)
    model.model = copy.deepcopy(small.model)
    model.model.requires_grad_(True)
    prompts = Prompts(model, NAMES)
    before = prompts.text_features()
    assert before.requires_grad
    with torch.no_grad():
        model.model.token_embedding.weight.mul_(1.5)
        after = prompts.text_features(prompts.ctx)
        paper = prompts.text_features(prompts.ctx, exact="paper")
    assert (after - before).abs().max() > 1e-3
    torch.testing.assert_close(after, paper, atol=1e-12, rtol=0)


# --- the Jacobian --------------------------------------------------------------------------------


def test_jacobian_equals_autograd(prompts):
    ctx = prompts.ctx.double().clone().requires_grad_(True)
    rows = prompts.rows(ctx[None])[0]
    matrix = prompts.jacobian()
    assert matrix.shape == (len(NAMES), 64, 4 * 64)
    for c, k in [(0, 0), (1, 63), (5, 17), (6, 0)]:
        (expected,) = torch.autograd.grad(rows[c, k], ctx, retain_graph=True)
        torch.testing.assert_close(matrix[c, k], expected.flatten(), atol=1e-11, rtol=0)


def test_jacobian_equals_finite_differences(prompts):
    generator = torch.Generator().manual_seed(0)
    start = prompts.ctx.double()
    for _ in range(3):
        step = 1e-6 * torch.randn(start.shape, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            both = prompts.rows(torch.stack([start + step, start - step]))
        expected = (both[0] - both[1]) / 2
        torch.testing.assert_close(
            prompts.jacobian() @ step.flatten(), expected, atol=1e-5 * float(expected.abs().max()),
            rtol=0,
        )  # fmt: skip


def test_a_kept_jacobian_is_read_again(small, prompts, tmp_path, monkeypatch):
    few = Prompts(small, NAMES[:2])
    made = few.jacobian(tmp_path)
    (path,) = (tmp_path / "jacobians").iterdir()
    with monkeypatch.context() as patch:
        patch.setattr(Prompts, "_make_jacobian", lambda self: pytest.fail("made again"))
        assert torch.equal(Prompts(small, NAMES[:2]).jacobian(tmp_path), made)
        features = views_of(few, 2, 8).double()
        tpt(features, Prompts(small, NAMES[:2]), n_images=MANY, cache=tmp_path)
    path.write_bytes(path.read_bytes()[:1000])  # damaged
    assert torch.equal(Prompts(small, NAMES[:2]).jacobian(tmp_path), made)
    # another context, other names: another file
    Prompts(small, NAMES[:2], None, 2, seed=1).jacobian(tmp_path)
    Prompts(small, NAMES[1:3]).jacobian(tmp_path)
    assert len(list((tmp_path / "jacobians").iterdir())) == 3
    (tmp_path / "file").write_text("no folder")
    with pytest.warns(UserWarning, match="not kept"):
        assert torch.equal(Prompts(small, NAMES[:2]).jacobian(tmp_path / "file"), made)


def test_states_of_the_prefix_do_not_see_the_suffix(prompts):
    ctx = contexts(prompts, 1)
    other = Prompts(prompts.clip, ["a wholly different name"])
    mine, theirs = (
        prefix_states(p.clip.model, p._split(ctx)[0]) for p in (prompts, other)
    )  # what makes sharing the prefix exact
    assert all(torch.equal(a, b) for a, b in zip(mine, theirs, strict=True))


@pytest.mark.parametrize("options", [{"class_token_position": "front"}, {"class_specific": True}])
def test_prompts_without_a_jacobian_say_so_and_still_adapt(small, options):
    prompts = Prompts(small, NAMES, **options)
    features = views_of(prompts, 2, 8).double()
    with pytest.raises(ValueError, match=next(iter(options))):
        methods.get("tpt")(features, prompts, exact="tangent")
    fast = tpt(features, prompts, n_images=MANY)
    assert_equal(fast, methods.get("tpt")(features, prompts, exact="paper"))


def test_a_matrix_that_does_not_fit_is_not_made(prompts, monkeypatch):
    assert tuning.worth_a_jacobian(prompts, MANY) and not tuning.worth_a_jacobian(prompts, FEW)
    monkeypatch.setattr(tuning, "free_memory", lambda device: 10**6)
    assert not tuning.worth_a_jacobian(prompts, MANY)


def test_free_memory_is_plausible():
    free = machine.free_memory(torch.device("cpu"))
    assert 10**6 < free < 10**15


# --- adaptation ----------------------------------------------------------------------------------


@pytest.mark.parametrize("n_images", [FEW, MANY], ids=["by vjp", "by matrix"])
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("loss", sorted(LOSSES))
def test_every_loss_equals_the_papers_path(prompts, loss, steps, n_images):
    groups = (5, 6)  # the image and a grid of four patches, each with five copies
    loss_fn = get_loss(loss, groups=groups, rho_patch=0.9, alpha=1.0, overlap=0.2)
    features = views_of(prompts, 2, 30).double()
    params = {"loss": loss_fn, "rho": 0.2, "steps": steps, "lr": 0.01}
    fast = tpt(features, prompts, n_images=n_images, **params)
    paper = methods.get("tpt")(features, prompts, exact="paper", **params)
    assert (fast.logits - fast.logits_before).abs().max() > 1e-3
    assert_equal(fast, paper)


@pytest.mark.parametrize("n_images", [FEW, MANY], ids=["by vjp", "by matrix"])
def test_another_start_is_noticed_and_the_old_one_kept(prompts, n_images):
    views = views_of(prompts, 2, 6).double()
    options = {"rho": 0.5, "lr": 0.05}
    first = tpt(views, prompts, n_images=n_images, **options)
    moved = copy.copy(prompts)
    moved.ctx = first.ctx[0]  # as TPT without a reset
    fast = tpt(views, moved, n_images=n_images, **options)
    assert_equal(fast, methods.get("tpt")(views, moved, exact="paper", **options))
    assert not torch.allclose(fast.ctx, first.ctx, atol=1e-3)
    assert_equal(tpt(views, prompts, n_images=n_images, **options), first, 1e-12)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_the_closed_form_equals_the_optimiser(optimizer):
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(4, 8, generator=generator, dtype=torch.float64)
    gradient = torch.randn(5, 4, 8, generator=generator, dtype=torch.float64)
    gradient *= 10.0 ** torch.randint(-12, 3, gradient.shape, generator=generator)  # around eps
    gradient[0, 0] = 0
    closed = tuning.first_step(start, gradient, 0.03, optimizer)
    for i in range(5):
        ctx = start.clone().requires_grad_(True)
        ctx.grad = gradient[i]
        tuning.OPTIMIZERS[optimizer]([ctx], lr=0.03).step()
        torch.testing.assert_close(closed[i], ctx.detach(), atol=1e-14, rtol=0)


@pytest.mark.parametrize("n_images", [FEW, MANY], ids=["by vjp", "by matrix"])
def test_neither_order_nor_batch_size_changes_anything_in_float32(mini, n_images):
    prompts = Prompts(mini, NAMES)
    features = views_of(prompts, 7, 16, seed=3)
    params = {"optimizer": "sgd", "lr": 0.1, "n_images": n_images}  # no sign of a rounding error
    whole = tpt(features, prompts, **params)
    assert (whole.logits - whole.logits_before).abs().max() > 1e-2
    order = torch.tensor([4, 2, 6, 0, 1, 3, 5])
    for batch in (1, 3):
        again = tpt(features[order], prompts, batch=batch, **params)
        assert torch.equal(again.selected, whole.selected[order])
        scale = float(whole.logits.abs().max())
        torch.testing.assert_close(again.logits, whole.logits[order], atol=1e-5 * scale, rtol=0)


def test_float32_equals_paper_but_for_gradients_below_rounding(mini):
    """Where no coordinate of the gradient is lost in rounding, logits agree within 1e-4."""
    prompts = Prompts(mini, NAMES[:6])  # without the second cat: equal logits have no order
    features = views_of(prompts, 6, 16, seed=5)
    fast = tpt(features, prompts, lr=0.01, n_images=MANY)
    paper = methods.get("tpt")(features, prompts, lr=0.01, exact="paper")
    assert torch.equal(fast.selected, paper.selected)
    assert torch.equal(fast.logits.argmax(1), paper.logits.argmax(1))
    apart = ((fast.ctx - paper.ctx).abs() > 1e-6).flatten(1).sum(1)
    same = apart == 0
    difference = (fast.logits - paper.logits).abs().amax(1)
    assert same.any()
    assert float(difference[same].max()) < 1e-4
    assert int(apart.max()) < 8  # of 768 coordinates


def test_full_size_text_towers():
    """RN50's and ViT-B/16's text tower has 12 layers of width 512; the image tower is not used."""
    torch.manual_seed(0)
    config = {
        "embed_dim": 512,
        "vision_cfg": {"layers": 1, "width": 64, "patch_size": 32, "image_size": 32},
        "text_cfg": {"width": 512, "heads": 8, "layers": 12},
        "quick_gelu": True,
    }
    model = open_clip.CLIP(**config)
    model.logit_scale.data.fill_(4.6)
    prompts = Prompts(models.wrap(model.double(), "text-512", device="cpu"), NAMES[:3])
    generator = torch.Generator().manual_seed(0)
    shape = (1, 8, 512)
    text = prompts.text_features()
    near = text[:2].mean(0) + 0.05 * torch.randn(shape, generator=generator).double()
    features = F.normalize(near, dim=-1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fast = methods.get("tpt")(features, prompts)
    assert_equal(fast, methods.get("tpt")(features, prompts, exact="paper"))


# --- the tangent ---------------------------------------------------------------------------------


def test_tangent_is_of_first_order(prompts):
    """Halving the step quarters the error of the text features, and the gradient is exact."""
    start = tuning.Start(prompts, by_matrix=True)
    direction = torch.randn(1, *prompts.ctx.shape, dtype=torch.float64)
    errors = []
    for size in (1e-3, 5e-4):
        ctx = start.ctx + size * direction
        with torch.no_grad():
            errors.append(float((start.tangent(ctx) - prompts.text_features(ctx)).norm()))
    assert 3.5 < errors[0] / errors[1] < 4.5
    features = views_of(prompts, 3, 12).double()
    tangent = methods.get("tpt")(features, prompts, exact="tangent")
    fast = methods.get("tpt")(features, prompts)
    torch.testing.assert_close(tangent.ctx, fast.ctx, atol=1e-9, rtol=0)
    assert torch.equal(tangent.selected, fast.selected)
    assert not torch.equal(tangent.logits, fast.logits)


def test_tangent_takes_several_steps_on_the_linear_tower(prompts):
    features = views_of(prompts, 2, 12).double()
    params = {"steps": 3, "optimizer": "sgd", "lr": 1e-5}
    tangent = methods.get("tpt")(features, prompts, exact="tangent", **params)
    fast = methods.get("tpt")(features, prompts, **params)
    moved = (fast.logits - fast.logits_before).abs().max()
    assert 0 < (tangent.logits - fast.logits).abs().max() < 0.05 * moved
    assert not torch.equal(tangent.ctx, fast.ctx)


# --- the pictures of it --------------------------------------------------------------------------


def test_stacked_bars_and_waterfall_show_the_values():
    from tpt_nb import figures

    parts = {name: [1.0, 2.0] for name in "abcdef"}
    fig = figures.stacked(["before", "after"], parts, "seconds")
    bars = fig.axes[0].containers
    assert [bar.get_width() for bar in bars[0]] == [1, 2]
    assert [text.get_text() for text in fig.axes[0].texts] == ["6", "12"]
    assert len({(bar[0].get_facecolor(), bar[0].get_hatch()) for bar in bars}) == len(parts)
    steps = [("start", 800.0), ("cut", 100.0), ("slower", 120.0)]
    fig = figures.waterfall(steps, "ms")
    left, saved = fig.axes[0].containers
    assert [bar.get_width() for bar in left] == [800, 100, 120]
    assert [bar.get_width() for bar in saved] == [0, 700, 0]
    assert "8.0 times less" in fig.axes[0].texts[1].get_text()
