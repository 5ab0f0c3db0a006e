import math

import pytest
import torch
import torch.nn.functional as F
from test_methods import NAMES, FakePrompts, views_of

from tpt_nb import methods
from tpt_nb.losses import marginal_entropy
from tpt_nb.methods.online import Cache
from tpt_nb.models import Prompts

ONLINE = [  # those that need features alone
    name
    for name in methods.names()
    if methods.get(name).kind == "online" and not methods.get(name).needs
]


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
    more = {"horizon": 10} if name == "onzeta" else {}  # it asks how long the stream will be
    whole = methods.get(name)(features, prompts, order=2, **more).logits[first]
    alone = methods.get(name)(features[first : first + 1], prompts, **more).logits[0]
    torch.testing.assert_close(whole, alone)


@pytest.mark.parametrize("name", ONLINE)
def test_many_orders_are_one_call_and_streams_know_nothing_of_each_other(name):
    features, prompts = random_stream(images=25)
    orders = torch.stack([torch.randperm(25) for _ in range(4)])
    method = methods.get(name)
    together = method.adapt(features, prompts, method.options(), orders=orders)
    assert together.logits.shape == (4, 25, 4) and together.logits_before.shape == (25, 4)
    for o, order in enumerate(orders):
        alone = method.adapt(features, prompts, method.options(), orders=order)
        torch.testing.assert_close(together.logits[o], alone.logits, atol=1e-9, rtol=0)
        torch.testing.assert_close(together.loss, alone.loss)
    drawn = torch.randperm(25, generator=torch.Generator().manual_seed(7))
    a = method(features, prompts, order=7).logits
    b = method.adapt(features, prompts, method.options(), orders=drawn[None]).logits[0]
    torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ONLINE)
def test_the_order_of_the_classes_is_of_no_account(name):
    features, prompts = random_stream(images=20)
    order = torch.tensor([2, 0, 3, 1])
    a = methods.get(name)(features, prompts).logits
    b = methods.get(name)(features, FakePrompts(prompts.text[order], 5.0)).logits
    torch.testing.assert_close(b, a[:, order], atol=1e-7, rtol=0)


@pytest.mark.parametrize("bad", [[[0, 1, 1]], [[0, 1]], [[1, 2, 3]]])
def test_an_order_that_is_no_permutation_is_refused(bad):
    features, prompts = random_stream(images=3)
    method = methods.get("tda")
    with pytest.raises(ValueError, match="each of the 3 images once"):
        method.adapt(features, prompts, method.options(), orders=torch.tensor(bad))


@pytest.mark.parametrize("name", ["tda", "boostadapter"])
def test_without_a_matrix_of_similarities_the_same(name, monkeypatch):
    features, prompts = random_stream(images=30)
    stored = methods.get(name)(features, prompts, rho=0.2).logits
    monkeypatch.setattr("tpt_nb.methods.online.STORED", 5)
    torch.testing.assert_close(methods.get(name)(features, prompts, rho=0.2).logits, stored)


def test_a_cache_keeps_the_most_certain():
    """Two streams: class 1 of the first meets five images, the second only what it may."""
    cache = Cache(2, 2, 2, torch.zeros(1))
    for image, h in enumerate((0.5, 0.2, 0.3, 0.4, 0.3)):
        here = torch.tensor([image, image])
        entropies, allowed = torch.tensor([h, h]), torch.tensor([True, image == 3])
        cache.insert(torch.tensor([1, 0]), here, entropies, allowed)
    assert cache.entropy[0, 1].sort().values.tolist() == pytest.approx([0.2, 0.3])
    assert sorted(cache.image[0, 1].tolist()) == [1, 2], "an equal one does not come in"
    assert cache.entropy[0, 0].isinf().all() and cache.entropy[1, 1].isinf().all()
    assert cache.image[1, 0][~cache.entropy[1, 0].isinf()].tolist() == [3]
    read = cache.read(torch.ones(2, 2, 2))
    assert read[0].tolist() == [[0, 0], [1, 1]] and read[1].sum() == 1


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
