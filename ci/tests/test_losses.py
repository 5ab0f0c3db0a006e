import math

import pytest
import torch

from tpt_nb.losses import (
    LOSSES,
    entropy,
    get,
    log_mean_prob,
    marginal_entropy,
    mean_entropy,
    select_confident,
)


def random_logits(*shape, seed=0, scale=5.0, dtype=torch.float64):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("classes", [1, 2, 7, 200])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 100.0, 1e4])
def test_entropy_lies_between_0_and_log_c(classes, scale):
    h = entropy(random_logits(50, 3, classes, scale=scale, dtype=torch.float32))
    assert h.shape == (50, 3) and h.isfinite().all()
    assert h.min() >= -1e-6 and h.max() <= math.log(classes) + 1e-5


def test_entropy_reaches_its_bounds_and_ignores_a_shift():
    assert entropy(torch.zeros(10)) == pytest.approx(math.log(10))
    assert entropy(torch.tensor([0.0, 1000.0, 0.0])) == pytest.approx(0, abs=1e-6)
    logits = random_logits(20, 9)
    torch.testing.assert_close(entropy(logits + 37.0), entropy(logits))


@pytest.mark.parametrize(
    "views, rho, k", [(64, 0.1, 6), (64, 0.3, 19), (100, 0.29, 28), (8, 0.1, 1), (5, 1.0, 5)]
)
def test_selection_keeps_the_confident_views(views, rho, k):
    logits = random_logits(views, 11)
    chosen = select_confident(logits, rho)
    assert len(chosen) == k == max(1, int(views * rho))
    h = entropy(logits)
    rest = torch.ones(views, dtype=torch.bool)
    rest[chosen] = False
    assert (h[chosen].diff() >= 0).all()
    assert not rest.any() or h[chosen].max() <= h[rest].min()


def test_ties_go_to_the_first_view():
    logits = random_logits(1, 7).expand(40, 7)
    assert select_confident(logits, 0.2).tolist() == list(range(8))
    logits = torch.cat([logits, 10 * logits[:1]])  # the one more confident view comes last
    assert select_confident(logits, 0.1).tolist() == [40, 0, 1, 2]


@pytest.mark.parametrize("rho", [0, -0.1, 1.01, float("nan")])
def test_rho_out_of_range_is_named(rho):
    with pytest.raises(ValueError, match=r"\(0,1\], got"):
        select_confident(random_logits(4, 3), rho)


def test_marginal_entropy_is_the_entropy_of_the_mean_probability():
    logits = random_logits(64, 20)
    best = entropy(logits).argsort()[:6]
    mean = logits[best].softmax(dim=-1).mean(dim=0)
    expected = -(mean * mean.log()).sum()
    torch.testing.assert_close(marginal_entropy(logits, 0.1), expected)
    torch.testing.assert_close(log_mean_prob(logits[best]).exp(), mean)


def test_averaging_raises_entropy():
    for seed in range(20):
        logits = random_logits(32, 10, seed=seed, scale=2)
        assert marginal_entropy(logits, 0.5) >= mean_entropy(logits, 0.5) - 1e-12
    same = random_logits(1, 10).expand(32, 10)
    torch.testing.assert_close(marginal_entropy(same, 0.5), mean_entropy(same, 0.5))


ENTROPIES = [name for name in LOSSES if LOSSES[name] in (marginal_entropy, mean_entropy)]


@pytest.mark.parametrize("name", ENTROPIES)
class TestEveryEntropy:
    def test_order_of_the_augmented_views_is_nothing(self, name):
        logits = random_logits(24, 8)
        order = torch.cat([torch.zeros(1, dtype=torch.long), 1 + torch.randperm(23)])
        torch.testing.assert_close(get(name)(logits[order], 0.3), get(name)(logits, 0.3))

    def test_gradient_equals_finite_differences(self, name):
        logits = random_logits(10, 6, scale=1).requires_grad_(True)
        chosen = select_confident(logits, 0.3)
        assert torch.autograd.gradcheck(lambda z: get(name)(z, 0.3, chosen), (logits,))

    def test_given_selection_is_used(self, name):
        logits = random_logits(10, 6)
        chosen = select_confident(logits, 0.3)
        loss = get(name)
        torch.testing.assert_close(loss(logits, 0.3, chosen), loss(logits, 0.3))
        assert loss(logits, 0.3, torch.tensor([9, 8])) != loss(logits, 0.3)

    def test_runs_under_vmap(self, name):
        logits = random_logits(5, 12, 7)
        loss = get(name)
        values, gradients = torch.vmap(torch.func.grad_and_value(lambda z: loss(z, 0.2)))(logits)[
            ::-1
        ]
        for i in range(5):
            one = logits[i].clone().requires_grad_(True)
            value = loss(one, 0.2)
            value.backward()
            torch.testing.assert_close(values[i], value.detach())
            torch.testing.assert_close(gradients[i], one.grad)

    @pytest.mark.parametrize("classes", [1, 2, 200])
    def test_extreme_logits_stay_finite(self, name, classes):
        logits = random_logits(16, classes, scale=1e4, dtype=torch.float32).requires_grad_(True)
        value = get(name)(logits, 0.25)
        value.backward()
        assert value.isfinite() and logits.grad.isfinite().all()
        assert -1e-5 <= value <= math.log(classes) + 1e-5


def test_names():
    assert get("defaultTPT") is marginal_entropy
    with pytest.raises(ValueError, match="unknown loss 'entropie'.*marginal_entropy"):
        get("entropie")
