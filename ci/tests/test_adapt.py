import math

import pytest
import torch
import torch.nn.functional as F

from tpt_nb import methods
from tpt_nb.losses import entropy, marginal_entropy, select_confident
from tpt_nb.models import Prompts, TemplatePrompts

NAMES = ["cat", "hot air balloon", "fire_engine", "dog", "bus"]


def views_of(prompts, images, views, seed=0):
    """Unit-norm features near the text features, so that entropies and predictions vary."""
    generator = torch.Generator().manual_seed(seed)
    text = prompts.text_features().float()
    centre = text[torch.randint(len(text), (images,), generator=generator)]
    noise = torch.randn(images, views, text.shape[1], generator=generator)
    return F.normalize(centre[:, None] + 0.05 * noise, dim=-1)


@pytest.fixture(scope="module")
def prompts64(mini64):
    return Prompts(mini64, NAMES)


@pytest.fixture(scope="module")
def prompts32(mini):
    return Prompts(mini, NAMES)


def assert_equal(a, b, atol=1e-7):
    torch.testing.assert_close(a.logits, b.logits, atol=atol, rtol=0)
    torch.testing.assert_close(a.logits_before, b.logits_before, atol=atol, rtol=0)
    torch.testing.assert_close(a.loss, b.loss, atol=atol, rtol=0)
    torch.testing.assert_close(a.ctx, b.ctx, atol=atol, rtol=0)
    assert torch.equal(a.selected, b.selected)


# --- the fast path equals the paper's ------------------------------------------------------------


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"lr": 0.05, "rho": 0.5},
        {"steps": 3},
        {"optimizer": "sgd", "lr": 1.0, "steps": 2},
        {"loss": "mean_entropy"},
        {"loss": lambda logits, rho: -logits[0].log_softmax(-1)[2]},
    ],
    ids=lambda p: (
        ",".join(f"{k}={v if isinstance(v, (str, int, float)) else 'own'}" for k, v in p.items())
        or "default"
    ),
)
def test_fast_equals_paper(prompts64, params):
    features = views_of(prompts64, 3, 12).double()
    fast = methods.get("tpt")(features, prompts64, **params)
    paper = methods.get("tpt")(features, prompts64, exact="paper", **params)
    assert (fast.logits - fast.logits_before).abs().max() > 1e-3
    assert_equal(fast, paper)


@pytest.mark.parametrize(
    "options",
    [
        {"class_token_position": "middle"},
        {"class_token_position": "front"},
        {"class_specific": True},
        {"ctx_init": None, "n_ctx": 7},
    ],
    ids=str,
)
def test_fast_equals_paper_for_other_prompts(mini64, options):
    prompts = Prompts(mini64, NAMES, **options)
    features = views_of(prompts, 2, 12).double()
    fast = methods.get("tpt")(features, prompts)
    assert fast.ctx.shape == (2, *prompts.ctx.shape)
    assert_equal(fast, methods.get("tpt")(features, prompts, exact="paper"))


def test_float32_gives_the_same_predictions(prompts32):
    features = views_of(prompts32, 8, 16, seed=4)
    fast = methods.get("tpt")(features, prompts32, lr=0.02)
    paper = methods.get("tpt")(features, prompts32, lr=0.02, exact="paper")
    assert torch.equal(fast.logits.argmax(dim=1), paper.logits.argmax(dim=1))
    assert torch.equal(fast.selected, paper.selected)
    torch.testing.assert_close(fast.logits, paper.logits, atol=5e-3, rtol=0)


# --- one step, by hand ---------------------------------------------------------------------------


def gradient_by_hand(prompts, views, rho=0.1):
    """Autograd through open_clip's own encoder for one image ``[V,D]``."""
    ctx = prompts.ctx.to(views).requires_grad_(True)
    scale = prompts.clip.logit_scale.to(views)
    logits = scale * views @ prompts.text_features(ctx, exact="paper").T
    return torch.autograd.grad(marginal_entropy(logits, rho), ctx)[0]


def test_the_first_adamw_step_is_a_sign_step(prompts64):
    features = views_of(prompts64, 2, 20).double()
    lr = 5e-3
    adapted = methods.get("tpt")(features, prompts64, lr=lr)
    for views, ctx in zip(features, adapted.ctx, strict=True):
        g = gradient_by_hand(prompts64, views)
        start = prompts64.ctx.double()
        closed_form = start * (1 - 0.01 * lr) - lr * g / (g.abs() + 1e-8)
        torch.testing.assert_close(ctx, closed_form, atol=1e-10, rtol=0)
        moved = ctx - start * (1 - 0.01 * lr)
        clear = g.abs() > 1e-5
        assert clear.float().mean() > 0.5
        torch.testing.assert_close(moved[clear], -lr * g.sign()[clear], atol=1.1e-3 * lr, rtol=0)

        reference = start.clone().requires_grad_(True)
        reference.grad = g
        torch.optim.AdamW([reference], lr=lr).step()
        torch.testing.assert_close(ctx, reference.detach(), atol=1e-10, rtol=0)


def test_sgd_moves_along_the_gradient(prompts64):
    features = views_of(prompts64, 2, 20).double()
    adapted = methods.get("tpt")(features, prompts64, optimizer="sgd", lr=0.3)
    for views, ctx in zip(features, adapted.ctx, strict=True):
        expected = prompts64.ctx.double() - 0.3 * gradient_by_hand(prompts64, views)
        torch.testing.assert_close(ctx, expected, atol=1e-10, rtol=0)


def test_a_small_step_lowers_the_loss(prompts64):
    features = views_of(prompts64, 4, 20).double()
    adapted = methods.get("tpt")(features, prompts64, optimizer="sgd", lr=1e-3)
    text = prompts64.text_features(adapted.ctx)
    scale = prompts64.clip.logit_scale.double()
    for i in range(4):
        logits = scale * features[i] @ text[i].T
        after = marginal_entropy(logits, 0.1, adapted.selected[i].nonzero().flatten())
        assert after < adapted.loss[i]


def test_a_positive_factor_of_the_loss_changes_nothing_in_adamw(prompts64):
    features = views_of(prompts64, 2, 12).double()
    a = methods.get("tpt")(features, prompts64)
    b = methods.get("tpt")(features, prompts64, loss=lambda z, rho: 1000 * marginal_entropy(z, rho))
    torch.testing.assert_close(a.logits, b.logits, atol=1e-3, rtol=0)


def test_later_steps_keep_the_selection_of_the_first(prompts64):
    seen = []

    def spy(logits, rho, selected):
        seen.append(selected)
        return marginal_entropy(logits, rho, selected)

    spy.select = select_confident
    features = views_of(prompts64, 1, 20).double()
    adapted = methods.get("tpt")(features, prompts64, loss=spy, steps=3, lr=0.1, exact="paper")
    assert len(seen) == 3 and all(torch.equal(s, seen[0]) for s in seen)
    assert adapted.selected[0].nonzero().flatten().tolist() == sorted(seen[0].tolist())


def test_a_loss_may_bring_its_own_selection(prompts64):
    def last_view(logits, rho, selected):
        return entropy(logits[selected]).mean()

    last_view.select = lambda logits, rho: torch.tensor([logits.shape[0] - 1])
    features = views_of(prompts64, 2, 6).double()
    fast = methods.get("tpt")(features, prompts64, loss=last_view)
    assert fast.selected.tolist() == [[False] * 5 + [True]] * 2
    assert_equal(fast, methods.get("tpt")(features, prompts64, loss=last_view, exact="paper"))


# --- images do not see each other ----------------------------------------------------------------


@pytest.mark.parametrize("params", [{}, {"steps": 2}])
def test_order_and_batch_size_change_nothing(prompts64, params):
    features = views_of(prompts64, 7, 10).double()
    whole = methods.get("tpt")(features, prompts64, **params)
    for batch in (1, 3, 100):
        assert_equal(
            methods.get("tpt")(features, prompts64, batch=batch, **params), whole, atol=1e-9
        )
    order = torch.randperm(7)
    permuted = methods.get("tpt")(features[order], prompts64, **params)
    torch.testing.assert_close(permuted.logits, whole.logits[order], atol=1e-9, rtol=0)
    assert torch.equal(permuted.selected, whole.selected[order])


def test_nothing_is_left_behind(prompts32):
    features = views_of(prompts32, 3, 10)
    start = prompts32.ctx.clone()
    first = methods.get("tpt")(features, prompts32, lr=0.1)
    again = methods.get("tpt")(features, prompts32, lr=0.1)
    assert torch.equal(first.logits, again.logits)
    assert torch.equal(prompts32.ctx, start) and not prompts32.ctx.requires_grad
    assert not first.logits.requires_grad and not first.ctx.requires_grad


# --- the methods without tuning ------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["prompts", "templates"])
def test_zero_shot_and_confident_view(mini, prompts32, kind):
    prompts = prompts32 if kind == "prompts" else TemplatePrompts(mini, NAMES, "seven")
    features = views_of(prompts, 6, 20)
    logits = mini.logit_scale * features @ prompts.text_features().T
    zero = methods.get("zero_shot")(features, prompts)
    torch.testing.assert_close(zero.logits, logits[:, 0])
    torch.testing.assert_close(zero.loss, entropy(logits[:, 0]))
    assert zero.selected[:, 0].all() and zero.selected.sum() == 6 and zero.ctx is None
    votes = methods.get("confident_view")(features, prompts, rho=0.3)
    torch.testing.assert_close(votes.logits_before, zero.logits)
    for i in range(6):
        chosen = select_confident(logits[i], 0.3)
        mean = logits[i, chosen].softmax(dim=-1).mean(dim=0)
        torch.testing.assert_close(votes.logits[i].exp(), mean, atol=1e-5, rtol=1e-4)
        assert votes.selected[i].nonzero().flatten().tolist() == sorted(chosen.tolist())


def test_tpt_starts_where_zero_shot_ends(prompts32):
    features = views_of(prompts32, 6, 20)
    tuned, zero = (
        methods.get("tpt")(features, prompts32),
        methods.get("zero_shot")(features, prompts32),
    )
    votes = methods.get("confident_view")(features, prompts32)
    torch.testing.assert_close(tuned.logits_before, zero.logits, atol=1e-4, rtol=0)
    torch.testing.assert_close(tuned.loss, votes.loss, atol=1e-4, rtol=0)
    assert torch.equal(tuned.selected, votes.selected)


@pytest.mark.parametrize("loss", ["marginal_entropy", "mean_entropy"])
def test_one_view_one_class_one_image(mini, loss):
    prompts = Prompts(mini, ["cat"])
    features = views_of(prompts, 1, 1)
    adapted = methods.get("tpt")(features, prompts, loss=loss)
    assert adapted.logits.shape == (1, 1) and adapted.logits.isfinite().all()
    assert adapted.loss == pytest.approx(0, abs=1e-6) and adapted.selected.tolist() == [[True]]
    assert adapted.ctx.isfinite().all()


def test_duplicate_classes_share_the_probability(mini64):
    prompts = Prompts(mini64, ["cat", "dog", "cat"])
    features = views_of(prompts, 2, 10).double()
    adapted = methods.get("tpt")(features, prompts)
    torch.testing.assert_close(adapted.logits[:, 0], adapted.logits[:, 2], atol=1e-10, rtol=0)
    assert adapted.loss.max() <= math.log(3)


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "params, message",
    [
        ({"loss": "entropie"}, "unknown loss .*Known: .*marginal_entropy"),
        ({"rho": 0}, r"rho is 0; it must be a fraction in \(0, 1\]"),
        ({"rho": 1.5}, r"rho is 1.5; it must be a fraction in \(0, 1\]"),
        ({"lr": 0}, "lr is 0; it must be a positive number"),
        ({"steps": 0}, "steps is 0; it must be 1 or more"),
        ({"batch": 0}, "batch is 0; it must be 1 or more"),
        ({"optimizer": "adam"}, "did you mean 'adamw'.*Known: adamw, sgd"),
        ({"step": 3}, "unknown option 'step'; did you mean 'steps'"),
        ({"exact": "yes"}, "Known: fast, paper, tangent"),
        ({"rho": True}, "rho is True \\(bool\\); it must be float"),
    ],
)
def test_bad_parameters_are_named(prompts32, params, message):
    with pytest.raises(ValueError, match=message):
        methods.get("tpt")(views_of(prompts32, 1, 4), prompts32, **params)


@pytest.mark.parametrize("method", sorted(methods.names()))
@pytest.mark.parametrize("shape", [(3, 256), (1, 3, 512), (0, 3, 256), (1, 0, 256)])
def test_bad_features_are_named(prompts32, method, shape):
    with pytest.raises(ValueError, match=r"expected \[B,V,256\].*mini-random"):
        methods.get(method)(torch.zeros(shape), prompts32)


def test_templates_cannot_be_tuned(mini):
    prompts = TemplatePrompts(mini, NAMES, "single")
    with pytest.raises(ValueError, match="a template ensemble has none"):
        methods.get("tpt")(views_of(prompts, 1, 4), prompts)
