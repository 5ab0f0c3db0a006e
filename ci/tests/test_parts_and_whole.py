"""Our method of parts and whole, and its online form: by the letter, and its limits."""

import math

import pytest
import torch
from test_methods import from_logits, views_of

from tpt_nb import methods
from tpt_nb.models import Prompts

NAMES = ["cat", "hot air balloon", "fire_engine", "dog", "bus"]
NEUTRAL = {"contrast": 0.0, "temperature": 1.0, "certainty": 0.0, "whole": 0.0, "sharpness": 1.0}


@pytest.fixture(scope="module")
def prompts(mini):
    return Prompts(mini, NAMES)


def softmax(z: list[float]) -> list[float]:
    e = [math.exp(x - max(z)) for x in z]
    return [x / sum(e) for x in e]


def by_hand(f, text, scale, contrast, temperature, certainty, whole, near, sharpness):
    """One image, view by view and class by class: f [V][D], text [C][D] -> [C]."""
    views, classes = range(len(f)), range(len(text))
    dot = lambda a, b: sum(x * y for x, y in zip(a, b, strict=True))  # noqa: E731
    z = [[scale * dot(f[i], text[c]) for c in classes] for i in views]
    mean = [sum(z[i][c] for i in views) / len(f) for c in classes]
    votes = [0.0 for _ in classes]
    for i in views:
        p = softmax([(z[i][c] - contrast * mean[c]) / temperature for c in classes])
        weight = math.exp(certainty * sum(q * math.log(q) for q in p if q))
        votes = [votes[c] + weight * p[c] for c in classes]
    u = softmax([dot(f[i], f[0]) / near for i in views])
    total = [sum(u[i] * z[i][c] for i in views) for c in classes]
    return [sharpness * (math.log(votes[c]) + whole * total[c]) for c in classes]


def test_parts_and_whole_by_hand(prompts):
    features = views_of(prompts, 3, 7, seed=1)
    values = dict(contrast=0.6, temperature=1.4, certainty=1.5, whole=0.4, near=0.2, sharpness=1.3)
    out = methods.get("parts_and_whole")(features, prompts, **values)
    text = prompts.text_features().double().tolist()
    scale = float(prompts.clip.logit_scale)
    wanted = [by_hand(f, text, scale, **values) for f in features.double().tolist()]
    torch.testing.assert_close(out.logits, torch.tensor(wanted), atol=1e-3, rtol=1e-4)
    p = out.logits.double().softmax(-1)
    torch.testing.assert_close(out.loss.double(), -(p * p.log()).sum(-1), atol=1e-5, rtol=1e-4)
    assert out.selected.all()


def test_only_view_0_has_a_place(prompts):
    """The other views may come in any order; which one is the image matters."""
    features = views_of(prompts, 4, 9, seed=2)
    method = methods.get("parts_and_whole")
    first = method(features, prompts).logits
    order = [0, 5, 3, 8, 1, 2, 7, 6, 4]
    torch.testing.assert_close(method(features[:, order], prompts).logits, first)
    order[0], order[1] = 5, 0
    assert not torch.allclose(method(features[:, order], prompts).logits, first, atol=1e-2)


@pytest.mark.parametrize("name", ["parts_and_whole", "parts_and_whole_online"])
def test_classes_have_no_order(name):
    logits = 4 * torch.randn(6, 5, 7, generator=torch.Generator().manual_seed(0))
    order = torch.tensor([3, 0, 6, 1, 5, 2, 4])
    features, plain = from_logits(logits)
    _, other = from_logits(logits)
    other.text = other.text[order]
    method = methods.get(name)
    torch.testing.assert_close(
        method(features, other).logits, method(features, plain).logits[:, order]
    )


def test_limits():
    """Without certainty, contrast and whole it is the mean of the predictions; a large weight of
    the whole, and nothing but the image counted as whole, is the image's own order of classes."""
    logits = 3 * torch.randn(5, 6, 4, generator=torch.Generator().manual_seed(3))
    features, prompts = from_logits(logits)
    method = methods.get("parts_and_whole")
    mean = logits.softmax(-1).mean(1)
    torch.testing.assert_close(method(features, prompts, **NEUTRAL).logits.softmax(-1), mean)
    far = method(features, prompts, **{**NEUTRAL, "whole": 1e4, "near": 1e-3})
    longest = (logits @ logits[:, 0, :, None])[..., 0].argmax(1)
    assert torch.equal(
        far.logits.argsort(1), logits[torch.arange(5), longest].argsort(1)
    )  # of unit vectors the image is the one most like itself


def test_a_vague_whole_leaves_the_word_to_sure_parts_and_the_other_way_round():
    def decided(image: list[float], part: list[float]) -> int:
        features, prompts = from_logits(torch.tensor([[image, part, part]]))
        options = {"contrast": 0.0, "near": 1e-2}
        # the image is the longest vector here, so that it alone is the whole
        return int(methods.get("parts_and_whole")(features, prompts, **options).logits.argmax())

    assert decided([10.0, 9.8, 9.9], [0.0, 8.0, 0.0]) == 1
    assert decided([12.0, 0.0, 0.0], [0.0, 0.3, 0.0]) == 0


def test_sharpness_moves_no_class(prompts):
    features = views_of(prompts, 8, 12, seed=4)
    soft, hard = (
        methods.get("parts_and_whole")(features, prompts, sharpness=s).logits for s in (0.5, 2.0)
    )
    torch.testing.assert_close(4 * soft, hard)


@pytest.mark.parametrize("values", [{"temperature": 0.0}, {"near": 0.0}, {"certainty": -1.0}])
def test_refuses_nonsense(prompts, values):
    with pytest.raises(ValueError, match="must be"):
        methods.get("parts_and_whole")(views_of(prompts, 1, 3), prompts, **values)


# --- online --------------------------------------------------------------------------------------


def test_online_by_hand(prompts):
    features = views_of(prompts, 12, 5, seed=5)
    generator = torch.Generator().manual_seed(1)
    orders = torch.stack([torch.randperm(12, generator=generator) for _ in range(3)])
    alone = methods.get("parts_and_whole")(features, prompts).logits.double().tolist()
    out = methods.get("parts_and_whole_online")
    given = out(features, prompts, inputs={"orders": orders}, prior=2.0).logits
    assert given.shape == (3, 12, 5)
    for o, order in enumerate(orders.tolist()):
        count, lately = [2.0] * 5, [0.0] * 5
        for i in order:
            z = [alone[i][c] - math.log(count[c] / sum(count)) for c in range(5)]
            torch.testing.assert_close(given[o, i], torch.tensor(z), atol=1e-3, rtol=1e-4)
            q = softmax(z)
            new = 1 - sum(q[c] * lately[c] for c in range(5))
            count = [count[c] + new * q[c] for c in range(5)]
            lately = [0.7 * lately[c] + 0.3 * q[c] for c in range(5)]


def test_a_stream_knows_its_own_past_only(prompts):
    """The first image is predicted as if alone; orders given together do not see each other."""
    features = views_of(prompts, 10, 6, seed=6)
    method = methods.get("parts_and_whole_online")
    alone = methods.get("parts_and_whole")(features, prompts).logits.log_softmax(-1)
    orders = torch.stack([torch.arange(10), torch.arange(9, -1, -1)])
    both = method(features, prompts, inputs={"orders": orders}).logits
    for o, order in enumerate(orders):
        torch.testing.assert_close(both[o, order[0]].log_softmax(-1), alone[order[0]])
        one = method(features, prompts, inputs={"orders": order}).logits
        torch.testing.assert_close(one, both[o])
    assert not torch.allclose(both[0], both[1], atol=1e-3)


def test_what_comes_too_often_is_trusted_less_but_a_run_counts_little():
    """Two classes in turn, a hundred images, against a run of one: the run costs its class less."""
    sure = torch.tensor([[9.0, 0.0, 0.0], [0.0, 9.0, 0.0], [3.0, 3.0, 3.0]])
    method = methods.get("parts_and_whole_online")

    def log_odds(classes: list[int]) -> float:
        """Of class 0 against class 2 for a last image that says nothing."""
        features, prompts = from_logits(sure[[*classes, 2]][:, None])
        order = torch.arange(len(classes) + 1)
        last = method(features, prompts, inputs={"orders": order}).logits[-1]
        return float(last[0] - last[2])

    assert log_odds([]) == pytest.approx(0, abs=1e-5)
    assert log_odds([0, 1] * 20) < -1.5
    assert log_odds([0, 1] * 20) < log_odds([0] * 20) < 0
