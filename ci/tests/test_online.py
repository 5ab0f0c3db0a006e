import math

import pytest
import torch
import torch.nn.functional as F
from test_methods import NAMES, FakePrompts, views_of

from tpt_nb import methods
from tpt_nb.losses import marginal_entropy
from tpt_nb.methods.online import Cache
from tpt_nb.models import Prompts

ONLINE = [n for n in methods.names() if methods.get(n).kind == "online"]


def random_stream(images=12, views=20, classes=4, width=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    text = F.normalize(
        torch.randn(classes, width, generator=generator, dtype=torch.float64), dim=-1
    )
    noise = torch.randn(images, views, width, generator=generator, dtype=torch.float64)
    centre = text[torch.randint(classes, (images,), generator=generator)]
    return F.normalize(centre[:, None] + 0.7 * noise, dim=-1), FakePrompts(text, 5.0)


def by_hand(features, prompts, order, boost=0, alpha=2.0, beta=5.0, rho=0.2):
    """The published algorithm with lists, in the given order (negative cache as TDA's)."""
    text, scale = prompts.text, 5.0
    c = len(text)
    positive, negative, out = {}, {}, {}

    def update(cache, pred, item, capacity):
        cache.setdefault(pred, []).append(item)
        cache[pred] = sorted(cache[pred], key=lambda e: e[1])[:capacity]

    def read(cache, query, a, b, value):
        total = torch.zeros(c, dtype=torch.float64)
        for cls, items in cache.items():
            for item in items:
                weight = a * math.exp(-b * (1 - float(query @ item[0])))
                total += weight * value(cls, item).double()
        return total

    def onehot(cls, item):
        return F.one_hot(torch.tensor(cls), c)

    for i in order:
        logits = scale * features[i] @ text.T
        p = logits.softmax(-1)
        h = -(p * p.log()).sum(-1)
        chosen = h.argsort()[: int(len(h) * rho)]
        base, query = logits[chosen].mean(0), features[i][chosen].mean(0)
        loss, prob = float(marginal_entropy(logits[chosen], 1.0)), p[chosen].mean(0)
        update(positive, int(base.argmax()), (query, loss), 3)
        if 0.2 < loss / math.log2(c) < 0.5:
            update(negative, int(base.argmax()), (query, loss, prob), 2)
        cache = {cls: list(items) for cls, items in positive.items()}
        for v in chosen if boost else ():
            update(cache, int(logits[v].argmax()), (features[i][v], float(h[v])), 3 + boost)
        z = base + read(cache, query, alpha, beta, onehot)
        z -= read(negative, query, 0.117, 1.0, lambda cls, item: (item[2] > 0.03) & (item[2] < 1))
        out[i] = z
    return torch.stack([out[i] for i in range(len(features))]), negative


@pytest.mark.parametrize(("name", "boost"), [("tda", 0), ("boostadapter", 3)])
def test_equals_the_published_algorithm(name, boost):
    features, prompts = random_stream(images=30)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(4)).tolist()
    expected, negative = by_hand(features, prompts, order, boost)
    assert negative, "the case must reach the negative cache"
    out = methods.get(name)(features, prompts, rho=0.2, order=4)
    torch.testing.assert_close(out.logits, expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize("name", ONLINE)
def test_the_order_matters_and_is_an_option(name):
    features, prompts = random_stream(images=40)
    method = methods.get(name)
    assert method.kind == "online"
    a, again, other = (method(features, prompts, order=s).logits for s in (0, 0, 1))
    assert torch.equal(a, again)
    assert (a - other).abs().max() > 1e-3


@pytest.mark.parametrize("name", ONLINE)
def test_the_first_image_of_a_stream_sees_no_other(name):
    features, prompts = random_stream(images=10)
    first = int(torch.randperm(10, generator=torch.Generator().manual_seed(2))[0])
    whole = methods.get(name)(features, prompts, order=2).logits[first]
    alone = methods.get(name)(features[first : first + 1], prompts).logits[0]
    torch.testing.assert_close(whole, alone)


def test_a_cache_keeps_the_most_certain():
    cache = Cache(2, 2, torch.zeros(1, 3))
    eye = torch.eye(3)
    for key, h in zip(eye, (0.5, 0.2, 0.3), strict=True):
        cache.insert(1, key, torch.tensor(h))
    assert cache.entropy[1].sort().values.tolist() == pytest.approx([0.2, 0.3])
    cache.insert(1, eye[0], torch.tensor(0.4))
    assert (cache.keys[1] @ eye[0]).max() == 0
    assert cache.read(eye[1], 5.0)[0].tolist() == [0, 0]
    assert cache.read(eye[1], 5.0)[1].max() == 1


def test_a_cache_needs_room():
    features, prompts = random_stream(images=2)
    with pytest.raises(ValueError, match="capacity"):
        methods.get("tda")(features, prompts, capacity=0)


@pytest.mark.parametrize("name", ONLINE)
def test_runs_with_a_real_prompt(mini, name):
    prompts = Prompts(mini, NAMES)
    features = views_of(prompts, 5, 12)
    out = methods.get(name)(features, prompts)
    assert out.logits.shape == (5, 5) and out.logits.isfinite().all()
    torch.testing.assert_close(
        out.logits_before, methods.get("zero_shot")(features, prompts).logits
    )
