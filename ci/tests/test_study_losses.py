"""The study's losses, as it coded them and corrected: by hand, by loops, by finite differences."""

import math

import numpy as np
import pytest
import torch
from test_adapt import assert_equal, views_of
from test_losses import random_logits

from tpt_nb import methods
from tpt_nb.losses import (
    LOSSES,
    Patches,
    entropy,
    get,
    names,
    needs_patches,
    neighbours,
    select_confident,
    select_in_groups,
    shared_area,
    with_selection,
)
from tpt_nb.models import Prompts

CROSS = ["crossentropy_soft", "crossentropy_hard1", "crossentropy_hard5"]
PATCH = [f"patch_loss{i}" for i in range(1, 7)]
PLACES = ["neighbour_agreement", "located_hard1", "overlap_affinity"]
CORRECTED = [*CROSS, *PATCH, *PLACES]
STUDY = [f"{name}_study" for name in (*CROSS, *PATCH)]
GROUPS = (5, 3)


def bound(name: str, groups=GROUPS, **options):
    return get(name, groups=groups, **options)


def H(*p: float) -> float:
    return -sum(x * math.log(x) for x in p)


def logits_of(probabilities) -> torch.Tensor:
    """Logits [V,C] with these probabilities; a shift per view must not matter to a softmax."""
    return torch.tensor(probabilities, dtype=torch.float64).log()


def test_the_names():
    assert set(CORRECTED + STUDY) | {"marginal_entropy", "defaultTPT", "mean_entropy"} == set(
        LOSSES
    )
    assert [n for n in LOSSES if needs_patches(n)] == [
        *PATCH, *PLACES, *(f"{n}_study" for n in PATCH)
    ]  # fmt: skip


# --- patches, by hand ----------------------------------------------------------------------------

# The image and four patches, two views each; with rho_patch=0.5 the first, more confident one of
# each is kept. So c = 0, 1, 1, 2 for the patches.
TWO_VIEWS = [
    [(0.5, 0.3, 0.2), (0.4, 0.3, 0.3)],
    [(0.8, 0.1, 0.1), (0.6, 0.2, 0.2)],
    [(0.1, 0.8, 0.1), (0.3, 0.5, 0.2)],
    [(0.2, 0.7, 0.1), (0.2, 0.6, 0.2)],
    [(0.05, 0.05, 0.9), (0.1, 0.1, 0.8)],
]
E0, E1, E2, E3, E4 = (H(*group[0]) for group in TWO_VIEWS)
# 1.0297, 0.6390, 0.6390, 0.8018, 0.3944


def small(name: str) -> float:
    logits = logits_of(TWO_VIEWS).reshape(10, 3)
    options = {"rho_patch": 0.5}
    return bound(name, (5, 2), **options)(logits).item()


@pytest.mark.parametrize("study", ["", "_study"])
class TestByHand:
    def test_1_is_the_cross_entropy_with_the_weighted_votes(self, study):
        votes = [1 / E1, 1 / E2 + 1 / E3, 1 / E4]  # 1.565, 2.812, 2.535
        q = [v / sum(votes) for v in votes]  # 0.226, 0.407, 0.367
        by_hand = -(q[0] * math.log(0.5) + q[1] * math.log(0.3) + q[2] * math.log(0.2))
        assert by_hand == pytest.approx(1.23706, abs=5e-6)
        assert small(f"patch_loss1{study}") == pytest.approx(by_hand, abs=1e-5)

    def test_2_is_the_cross_entropy_with_the_winner(self, study):
        # class 1 has two patches, 2.812; class 2 the most confident one, 2.535
        assert small(f"patch_loss2{study}") == pytest.approx(-math.log(0.3), abs=1e-9)

    def test_3_is_the_harmonic_mean_of_the_entropies(self, study):
        by_hand = 5 / (1 / E0 + 1 / E1 + 1 / E2 + 1 / E3 + 1 / E4)
        assert by_hand == pytest.approx(0.63423, abs=5e-6)
        assert small(f"patch_loss3{study}") == pytest.approx(by_hand, abs=1e-5)

    def test_4_is_the_smallest_entropy(self, study):
        assert small(f"patch_loss4{study}") == pytest.approx(E4, abs=1e-9)


def test_4_corrected_leaves_out_the_whole_image():
    rows = [[(0.98, 0.01, 0.01)], *([g[0]] for g in TWO_VIEWS[1:])]
    logits = logits_of(rows).reshape(5, 3)
    assert bound("patch_loss4", (5, 1))(logits).item() == pytest.approx(E4)
    study = bound("patch_loss4_study", (5, 1), rho_patch=1.0)
    assert study(logits).item() == pytest.approx(H(0.98, 0.01, 0.01))


# One patch and the image, two classes, one view each: probabilities (3/4, 1/4) and (1/9, 8/9).
P0, P1 = (3 / 4, 1 / 4), (1 / 9, 8 / 9)


def test_5_and_6_of_the_study_multiply_powers_of_the_probabilities():
    logits = logits_of([P0, P1])
    for name, weights in {
        "patch_loss5_study": (1 / H(*P0), 1 / H(*P1)),  # 1.778, 2.866
        "patch_loss6_study": (math.exp(-H(*P0)), math.exp(-H(*P1))),  # 0.570, 0.705
    }.items():
        # the exponent is half the weight: the mean over two groups
        powers = [P0[c] ** (weights[0] / 2) * P1[c] ** (weights[1] / 2) for c in (0, 1)]
        o = [x / sum(powers) for x in powers]
        assert bound(name, (2, 1))(logits).item() == pytest.approx(H(*o), abs=1e-5)
    # 5: .75^.889 * (1/9)^1.433 = .033 and .25^.889 * (8/9)^1.433 = .246, so o = (.119, .881)
    assert bound("patch_loss5_study", (2, 1))(logits).item() == pytest.approx(0.3645, abs=5e-5)


def test_5_and_6_corrected_average_the_probabilities():
    logits = logits_of([P0, P1])
    for name, weights in {
        "patch_loss5": (1 / H(*P0), 1 / H(*P1)),
        "patch_loss6": (math.exp(-H(*P0)), math.exp(-H(*P1))),
    }.items():
        total = sum(weights)
        mean = [(weights[0] * P0[c] + weights[1] * P1[c]) / total for c in (0, 1)]
        assert bound(name, (2, 1))(logits).item() == pytest.approx(H(*mean), abs=1e-5)
    # alpha = 0: equal weights
    even = bound("patch_loss6", (2, 1), alpha=0.0)(logits).item()
    assert even == pytest.approx(H((3 / 4 + 1 / 9) / 2, (1 / 4 + 8 / 9) / 2))


def test_mean_logits_of_a_group_are_the_geometric_mean():
    """Two views (1/2, 1/2) and (4/5, 1/5): powers 1/2 of 0.4 and 0.1, so (2/3, 1/3)."""
    logits = logits_of([(0.5, 0.5), (0.8, 0.2), (2 / 3, 1 / 3), (2 / 3, 1 / 3)])
    for name in ("patch_loss5", "patch_loss6"):
        assert bound(name, (2, 2))(logits).item() == pytest.approx(H(2 / 3, 1 / 3), abs=1e-6)


# --- cross-entropies, by hand --------------------------------------------------------------------

# The image and four views; rho=0.5 keeps the first two of the four.
VIEWS = [(0.5, 0.3, 0.2), (0.9, 0.05, 0.05), (0.1, 0.8, 0.1), (0.4, 0.3, 0.3), (0.3, 0.4, 0.3)]


def doubled(target) -> float:
    """Cross-entropy after a second softmax over (0.5, 0.3, 0.2)."""
    e = [math.exp(p) for p in VIEWS[0]]
    return -sum(t * math.log(x / sum(e)) for t, x in zip(target, e, strict=True))


def single(target) -> float:
    return -sum(t * math.log(p) for t, p in zip(target, VIEWS[0], strict=True))


def test_soft():
    # mean logits: geometric mean sqrt(.9*.1), sqrt(.05*.8), sqrt(.05*.1) = .3, .2, .0707
    geometric = [math.sqrt(a * b) for a, b in zip(VIEWS[1], VIEWS[2], strict=True)]
    t = [x / sum(geometric) for x in geometric]  # 0.526, 0.350, 0.124
    logits = logits_of(VIEWS)
    assert get("crossentropy_soft_study")(logits, 0.5).item() == pytest.approx(doubled(t))
    assert doubled(t) == pytest.approx(1.0472, abs=5e-4)
    mean = [(a + b) / 2 for a, b in zip(VIEWS[1], VIEWS[2], strict=True)]  # 0.5, 0.425, 0.075
    assert get("crossentropy_soft")(logits, 0.5).item() == pytest.approx(single(mean))
    assert single(mean) == pytest.approx(0.9790, abs=5e-4)


def test_hard1():
    logits = logits_of(VIEWS)  # class 0 has the largest mean logit and the largest probability
    assert get("crossentropy_hard1_study")(logits, 0.5).item() == pytest.approx(doubled((1, 0, 0)))
    assert get("crossentropy_hard1")(logits, 0.5).item() == pytest.approx(-math.log(0.5))


def test_hard1_of_the_study_takes_the_largest_mean_logit():
    """A class that one view rules out loses by logits and can still win by probability."""
    # geometric means 0.044, 0.023, 0.010: class 0; mean probabilities 0.486, 0.024, 0.490: class 2
    kept = [(0.97, 0.0299, 0.0001), (0.002, 0.018, 0.98)]
    rows = [VIEWS[0], *kept, (0.34, 0.33, 0.33), (0.33, 0.34, 0.33)]
    logits = logits_of(rows)
    assert get("crossentropy_hard1_study")(logits, 0.5).item() == pytest.approx(doubled((1, 0, 0)))
    assert get("crossentropy_hard1")(logits, 0.5).item() == pytest.approx(-math.log(0.2))


def test_hard5():
    """Six classes; the mean logits of the two kept views are 10, 6, 5, 4, 3 and 1."""
    logits = torch.zeros(5, 6, dtype=torch.float64)
    logits[0] = torch.tensor([0.0, 1, 2, 3, 4, 5])
    logits[1] = torch.tensor([11.0, 6, 5, 4, 3, 1])
    logits[2] = torch.tensor([9.0, 6, 5, 4, 3, 1])
    t = [10 / 28, 6 / 28, 5 / 28, 4 / 28, 3 / 28, 0]
    p = [math.exp(z) for z in range(6)]
    p = [x / sum(p) for x in p]
    e = [math.exp(x) for x in p]
    by_hand = -sum(a * math.log(x / sum(e)) for a, x in zip(t, e, strict=True))
    assert get("crossentropy_hard5_study")(logits, 0.5).item() == pytest.approx(by_hand)
    mean = np.mean([np.exp(r) / np.exp(r).sum() for r in logits[1:3].numpy()], axis=0)
    target = mean[:5] / mean[:5].sum()
    by_hand = -sum(a * math.log(x) for a, x in zip(target, p, strict=False))
    assert get("crossentropy_hard5")(logits, 0.5).item() == pytest.approx(by_hand)


# --- by loops, on random logits ------------------------------------------------------------------


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def numpy_entropy(p):
    return -(p * np.log(np.maximum(p, 1e-300))).sum(-1)


def by_loops(name: str, z: np.ndarray, groups, rho_patch: float) -> float:
    """The study's patch losses, class by class and patch by patch."""
    count, size = groups
    z = z.reshape(count, size, -1)
    k, classes = int(size * rho_patch), z.shape[-1]
    kept = [group[np.argsort(numpy_entropy(softmax(group)), kind="stable")[:k]] for group in z]
    E = np.array([numpy_entropy(softmax(rows).mean(0)) for rows in kept])
    c = [np.bincount(rows.argmax(-1), minlength=classes).argmax() for rows in kept]
    log_p0 = np.log(softmax(z[0, 0]))
    votes: dict[int, float] = {}
    for g in range(1, count):
        votes[c[g]] = votes.get(c[g], 0) + 1 / (E[g] + 1e-6)
    if name == "patch_loss1_study":
        return -sum(v / sum(votes.values()) * log_p0[i] for i, v in votes.items())
    if name == "patch_loss2_study":
        return -log_p0[max(votes, key=votes.get)]
    if name == "patch_loss3_study":
        return (E / (E + 1e-6)).sum() / (1 / (E + 1e-6)).sum()
    if name == "patch_loss4_study":
        return E.min()
    log_p = np.log(softmax(z.mean(1)))
    h = numpy_entropy(np.exp(log_p))
    w = 1 / (h + 1e-6) if name == "patch_loss5_study" else np.exp(-h)
    return numpy_entropy(softmax((w[:, None] * log_p).mean(0)))


@pytest.mark.parametrize("groups", [(2, 1), (5, 3), (17, 5), (26, 3)], ids=str)
@pytest.mark.parametrize("number", range(1, 7))
def test_the_studys_patch_losses_equal_loops(number, groups):
    name = f"patch_loss{number}_study"
    rho_patch = 1.0 if groups[1] == 1 else 0.9
    for seed in range(10):
        logits = random_logits(math.prod(groups), 6, seed=seed, scale=2)
        value = bound(name, groups, rho_patch=rho_patch)(logits).item()
        expected = by_loops(name, logits.numpy(), groups, rho_patch)
        assert value == pytest.approx(expected, abs=1e-9), seed


def test_of_two_equally_frequent_classes_the_study_takes_the_smaller_number():
    """Patch with views (0.4, 0.6) and (0.55, 0.45): one vote each. The mean says class 1."""
    logits = logits_of([(0.7, 0.3), (0.7, 0.3), (0.4, 0.6), (0.55, 0.45)])
    assert torch.mode(torch.tensor([1, 0])).values == 0
    study, corrected = (
        bound(name, (2, 2), rho_patch=1.0)(logits).item()
        for name in ("patch_loss2_study", "patch_loss2")
    )
    assert study == pytest.approx(-math.log(0.7)) and corrected == pytest.approx(-math.log(0.3))


def test_a_tied_vote_goes_to_the_class_of_the_first_patch():
    rows = [(0.6, 0.3, 0.1), (0.1, 0.1, 0.8), (0.8, 0.1, 0.1), (0.1, 0.1, 0.8), (0.8, 0.1, 0.1)]
    logits = logits_of(rows)
    for name in ("patch_loss2_study", "patch_loss2"):
        value = bound(name, (5, 1), rho_patch=1.0)(logits).item()
        assert value == pytest.approx(-math.log(0.1))


# --- gradients -----------------------------------------------------------------------------------

FULL = ["patch_loss3_study", "patch_loss4_study", "patch_loss5_study", "patch_loss6_study",
        "crossentropy_soft_study", "crossentropy_hard1_study", "crossentropy_hard5_study",
        "patch_loss4"]  # fmt: skip


@pytest.mark.parametrize("name", FULL)
def test_gradient_equals_finite_differences(name):
    logits = random_logits(15, 6, scale=1)
    logits = (logits + 5 if "hard5" in name else logits).requires_grad_(True)
    loss = bound(name)
    chosen = loss.select(logits, 0.3)
    assert torch.autograd.gradcheck(lambda z: loss(z, 0.3, chosen), (logits,))


@pytest.mark.parametrize(
    "name", ["patch_loss1_study", "patch_loss2_study", "patch_loss1", "patch_loss2", *CROSS]
)
def test_a_constant_target_of_the_other_views_moves_only_the_image(name):
    logits = random_logits(15, 6, scale=1)
    loss = bound(name)
    image = logits[:1].clone().requires_grad_(True)
    assert torch.autograd.gradcheck(lambda z: loss(torch.cat([z, logits[1:]]), 0.3), (image,))
    logits.requires_grad_(True)
    loss(logits, 0.3).backward()
    assert (logits.grad[1:] == 0).all() and (logits.grad[0] != 0).any()


@pytest.mark.parametrize("name", ["patch_loss3", "patch_loss5", "patch_loss6"])
def test_weights_are_constants(name):
    """The gradient is that of the loss with its weights frozen at this point."""
    logits = random_logits(15, 6, scale=1)
    point, free = logits.clone().requires_grad_(True), logits.clone().requires_grad_(True)
    bound(name, rho_patch=1.0)(point).backward()
    rows = free.reshape(5, 3, 6)
    marginal = entropy(rows.softmax(-1).mean(1).log())
    expert = entropy(rows.mean(1)).detach()
    if name == "patch_loss3":
        w = 1 / marginal.detach()
        frozen = (w / w.sum() * marginal).sum()
    else:
        w = 1 / expert if name == "patch_loss5" else (-expert).exp()
        mean = w / w.sum() @ rows.mean(1).softmax(-1)
        frozen = -(mean * mean.log()).sum()
    frozen.backward()
    torch.testing.assert_close(point.grad, free.grad, atol=1e-5, rtol=1e-4)


# --- what must hold for all corrected losses -----------------------------------------------------


@pytest.mark.parametrize("name", CORRECTED)
def test_order_of_the_views_inside_a_group_is_nothing(name):
    for seed in range(5):
        logits = random_logits(15, 7, seed=seed, scale=2)
        generator = torch.Generator().manual_seed(seed)
        order = torch.cat([3 * g + torch.randperm(3, generator=generator) for g in range(5)])
        order[:3] = torch.tensor([0, 2, 1])  # the first is the image itself
        loss = bound(name, overlap=0.3)
        torch.testing.assert_close(loss(logits[order], 0.3), loss(logits, 0.3))


@pytest.mark.parametrize("name", CORRECTED)
@pytest.mark.parametrize("groups", [(2, 1), (2, 4), (5, 1), (26, 3), (65, 1)], ids=str)
def test_any_number_of_patches_and_copies(name, groups):
    logits = random_logits(math.prod(groups), 7, scale=2).requires_grad_(True)
    value = bound(name, groups)(logits, 0.1)
    value.backward()
    assert value.isfinite() and value >= 0 and logits.grad.isfinite().all()


@pytest.mark.parametrize("name", ["patch_loss3", "patch_loss4", "patch_loss5", "patch_loss6"])
@pytest.mark.parametrize("study", ["", "_study"])
@pytest.mark.parametrize("classes", [1, 2, 200])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 100.0])
def test_entropies_lie_between_0_and_log_c(name, study, classes, scale):
    for seed in range(5):
        logits = random_logits(15, classes, seed=seed, scale=scale, dtype=torch.float32)
        value = bound(name + study)(logits)
        assert -1e-5 <= value <= math.log(classes) + 1e-5


@pytest.mark.parametrize("name", CORRECTED)
@pytest.mark.parametrize("classes", [1, 2, 200])
def test_extreme_logits_stay_finite(name, classes):
    logits = random_logits(15, classes, scale=1e4, dtype=torch.float32).requires_grad_(True)
    value = bound(name)(logits)
    value.backward()
    assert value.isfinite() and logits.grad.isfinite().all() and value >= -1e-5


def test_the_second_softmax_confines_the_loss_and_its_gradient():
    """-log softmax(softmax(z)) lies in [log(e+C-1) - 1, log(e+C-1)] and is flat at one-hots."""
    top = math.log(math.e + 199)
    loss, corrected = get("crossentropy_hard1_study"), get("crossentropy_hard1")
    for seed in range(20):
        value = loss(random_logits(64, 200, seed=seed, scale=3), 0.1)
        assert top - 1 <= value <= top
    wrong = torch.zeros(12, 200, dtype=torch.float64)
    wrong[0, 3], wrong[1:, 5] = 40, 40  # the image says 3, all its views say 5
    for fn, size in ((loss, 0.0), (corrected, 1.0)):
        z = wrong.clone().requires_grad_(True)
        fn(z, 0.1).backward()
        assert z.grad[0].abs().max() == pytest.approx(size, abs=1e-9)


# --- places --------------------------------------------------------------------------------------


def test_neighbours_of_a_grid():
    adjacent = neighbours((10, 1))
    assert torch.equal(adjacent, adjacent.T) and (adjacent.diagonal() == 0).all()
    assert (adjacent[0, 1:] == 1).all()  # the whole image sees every patch
    assert adjacent[5].nonzero().flatten().tolist() == [0, 2, 4, 6, 8]  # the middle of 3 x 3
    assert adjacent[1].nonzero().flatten().tolist() == [0, 2, 4]  # a corner
    assert neighbours((2, 1)).tolist() == [[0, 1], [1, 0]]


def test_shared_area():
    """2 x 2, overlap 0.5: a patch is 3/4 wide; two side by side share 1/2 x 3/4 of the image."""
    assert torch.equal(shared_area((5, 1), 0.0)[1:, 1:], torch.eye(4, dtype=torch.float64))
    share = shared_area((5, 1), 0.5)
    assert (share[0] == 1).all() and torch.equal(share, share.T)
    assert share[1, 2] == pytest.approx(2 / 3) and share[1, 4] == pytest.approx(4 / 9)
    for overlap in (0.0, 0.3, 1.0):
        share = shared_area((17, 2), overlap)
        assert (share >= 0).all() and (share <= 1).all() and (share.diagonal() == 1).all()


def test_neighbour_agreement_by_loops():
    logits = random_logits(10 * 2, 5, scale=2)
    p = logits.softmax(-1).reshape(10, 2, 5).mean(1).numpy()
    grid = {g: divmod(g - 1, 3) for g in range(1, 10)}
    support = []
    for g in range(10):
        near = [
            h
            for h in range(10)
            if h != g
            and (0 in (g, h) or sum(abs(a - b) for a, b in zip(grid[g], grid[h], strict=True)) == 1)
        ]
        support.append(np.mean([p[g] @ p[h] for h in near]) + 1e-6)
    target = np.array(support) / sum(support) @ p
    expected = -(target * np.log(softmax(logits[0].numpy()))).sum()
    value = bound("neighbour_agreement", (10, 2), rho_patch=1.0)(logits)
    assert value.item() == pytest.approx(expected)


def test_a_crop_that_neighbours_confirm_counts_more():
    """Two crops say 0, two say 1, all equally sure; those that say 0 lie side by side."""

    def says(*classes):
        return torch.stack(
            [8.0 * torch.eye(5)[c] if c is not None else torch.zeros(5) for c in classes]
        )

    #      0 0 .      places of the patches; the whole image knows nothing
    #      . . 1
    #      1 . .
    rows = says(None, 0, 0, None, None, None, 1, 1, None, None).double()
    z = rows.requires_grad_(True)
    bound("neighbour_agreement", (10, 1))(z).backward()
    target = (rows[0].softmax(-1) - z.grad[0]).detach()  # the gradient is softmax - target
    assert target[0] > 1.5 * target[1]
    z.grad = None
    bound("patch_loss1", (10, 1))(z).backward()  # which does not know places
    target = (rows[0].softmax(-1) - z.grad[0]).detach()
    assert target[0] == pytest.approx(target[1].item(), abs=0.02)


def test_overlap_affinity_by_loops():
    logits = random_logits(5 * 2, 4, scale=2)
    p, share = softmax(logits.numpy()), shared_area((5, 1), 0.4).numpy()
    y = [0.1] * 10
    for _ in range(5):
        scores = [
            20 * sum(p[i] @ p[j] * share[i // 2, j // 2] * y[j] for j in range(10))
            for i in range(10)
        ]
        y = [math.exp(s) / sum(math.exp(t) for t in scores) for s in scores]
    target = np.array(y) @ p
    expected = -(target * np.log(p[0])).sum()
    value = bound("overlap_affinity", (5, 2), overlap=0.4)(logits)
    assert value.item() == pytest.approx(expected)


# --- in use --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CORRECTED + STUDY)
def test_runs_under_vmap(name):
    logits = random_logits(4, 15, 7)
    loss = bound(name, overlap=0.3)
    gradients, values = torch.vmap(torch.func.grad_and_value(lambda z: loss(z, 0.2)))(logits)
    chosen = torch.vmap(lambda z: loss.select(z, 0.2))(logits)
    for i in range(4):
        one = logits[i].clone().requires_grad_(True)
        value = loss(one, 0.2)
        value.backward()
        torch.testing.assert_close(values[i], value.detach())
        torch.testing.assert_close(gradients[i], one.grad)
        assert chosen[i].tolist() == loss.select(logits[i], 0.2).tolist()
        torch.testing.assert_close(loss(logits[i], 0.2, chosen[i]), value.detach())


@pytest.mark.parametrize("steps", [1, 2])
@pytest.mark.parametrize("name", [
    "patch_loss1", "patch_loss4_study", "patch_loss5_study", "crossentropy_hard1_study",
    "crossentropy_soft", "neighbour_agreement", "overlap_affinity",
])  # fmt: skip
def test_fast_equals_paper(mini64, name, steps):
    prompts = Prompts(mini64, ["cat", "hot air balloon", "dog"])
    features = views_of(prompts, 2, 10).double()
    loss = bound(name, (5, 2), rho_patch=0.5, overlap=0.2)
    options = {"loss": loss, "rho": 0.3, "steps": steps, "lr": 0.02}
    fast = methods.get("tpt")(features, prompts, **options)
    assert_equal(fast, methods.get("tpt")(features, prompts, exact="paper", **options))
    if name.startswith("crossentropy"):
        assert fast.selected.sum(dim=1).tolist() == [2, 2] and not fast.selected[:, 0].any()
    if name in ("patch_loss1", "neighbour_agreement"):
        assert fast.selected.reshape(2, 5, 2).sum(-1).unique().tolist() == [1]


def test_selection_in_groups():
    logits = random_logits(15, 7)
    chosen = select_in_groups(logits, 0.1, Patches(GROUPS, rho_patch=0.7)).reshape(5, 2)
    for g in range(5):
        best = select_confident(logits[3 * g : 3 * g + 3], 0.7) + 3 * g
        assert chosen[g].tolist() == best.tolist()


# --- mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda z: get("patch_loss7"), "unknown loss 'patch_loss7'.*patch_loss6_study"),
        (lambda z: get("patch_loss1"), "'patch_loss1' looks at patches.*groups=augmenter"),
        (lambda z: get("patch_loss1", (1, 64)), r"views have none \(groups=\(1, 64\)\)"),
        (lambda z: get("patch_loss1", (4, 2)), "3 patches, which make no square"),
        (lambda z: get("patch_loss1", (5, 2), rho_patch=0), r"\(0,1\], got 0"),
        (lambda z: get("patch_loss3", (5, 2))(z), "5 groups of 2 views, 10.*there are 15"),
        (lambda z: get("patch_loss5", (5, 2))(z), "5 groups of 2 views, 10.*there are 15"),
        (lambda z: get("patch_loss1_study", (15 + 2, 1))(z), r"int\(1 \* 0.9\) = 0.*_study"),
        (lambda z: get("crossentropy_soft_study")(z[:9]), r"int\(8 \* 0.1\) = 0.*_study"),
        (lambda z: get("crossentropy_soft")(z[:1]), "only the image itself"),
    ],
)
def test_mistakes_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(random_logits(15, 4))


def test_an_unknown_option_is_named():
    with pytest.raises(TypeError, match="beta"):
        get("patch_loss6", groups=GROUPS, beta=2)


def test_a_loss_says_what_it_takes():
    takes = {name: LOSSES[name].takes for name in names()}
    assert takes["patch_loss6"] == takes["patch_loss6_study"] == ("alpha",)
    assert takes["overlap_affinity"] == ("overlap",) and not takes["marginal_entropy"]
    many = [random_logits(15, 4, scale=1, seed=seed) for seed in range(12)]
    values = {"rho_patch": 0.4, "alpha": 3.0, "overlap": 0.5}
    for name in (*PATCH, *PLACES):
        moved = {  # a loss with one winner moves only where the winner does
            k
            for logits in many
            for k, v in values.items()
            if bound(name, **{k: v})(logits) != bound(name)(logits)
        }
        assert moved == set(takes[name]), name
    with pytest.raises(ValueError, match="looks at patches: losses.get"):
        LOSSES["patch_loss6"](many[0])


def test_a_function_of_ones_own():
    logits = random_logits(15, 4)
    plain = with_selection(lambda z, rho: z.sum() * rho)
    assert plain(logits, 0.5, torch.tensor([3])) == logits.sum() * 0.5
    assert plain.select(logits, 0.3).tolist() == select_confident(logits, 0.3).tolist()

    def chosen(z, rho, selected):
        return z[selected].sum()

    chosen.select = lambda z, rho: torch.tensor([2])
    loss = with_selection(chosen)
    assert loss(logits, 0.1) == logits[2].sum() and loss(logits, 0.1, [1]) == logits[1].sum()
    assert with_selection(loss) is loss
