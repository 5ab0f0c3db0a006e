"""Transductive methods: the published formulas in loops, and what the order may not change."""

import math

import pytest
import torch
import torch.nn.functional as F
from test_methods import NAMES, FakePrompts, views_of

from tpt_nb import methods
from tpt_nb.models import Prompts

TRANSDUCTIVE = [  # those that need features alone
    name
    for name in methods.names()
    if methods.get(name).kind == "transductive" and not methods.get(name).needs
]


def world(images=24, classes=5, width=7, seed=0, views=2, scale=8.0, present=None):
    """Features around the text features of classes, of which only some may be there."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randn(classes, width, generator=generator, dtype=torch.float64)
    text = F.normalize(text, dim=-1)
    targets = torch.randint(present or classes, (images,), generator=generator)
    noise = torch.randn(images, views, width, generator=generator, dtype=torch.float64)
    features = F.normalize(text[targets][:, None] + 0.35 * noise, dim=-1)
    return features, FakePrompts(text, scale), targets


def unit(v):
    return v / math.sqrt(sum(float(a) ** 2 for a in v))


def by_hand(name, x, text, scale):
    """The formulas of the papers, number by number: z ``[n,C]`` for a batch ``[n,D]``."""
    n, c, d = len(x), len(text), x.shape[1]
    p = [[math.exp(scale * float(f @ t)) for t in text] for f in x]
    p = [[v / sum(row) for v in row] for row in p]
    near = []
    for i in range(n):
        others = sorted((j for j in range(n) if j != i), key=lambda j: -float(x[i] @ x[j]))[:3]
        near.append({j: float(x[i] @ x[j]) for j in others})
    z = [list(row) for row in p]
    start = [sum(z[i][k] * float(x[i][e] - text[k][e]) ** 2 for i in range(n) for k in range(c)) / n
             for e in range(d)]  # fmt: skip
    if name == "stata":
        mu, var = [t.clone() for t in text], [list(start) for _ in range(c)]
    else:
        surest = [sorted(range(n), key=lambda i: -p[i][k])[:8] for k in range(c)]
        mu = [unit(sum(x[i] for i in s) / len(s)) for s in surest]
        var = [[1 / d] * d for _ in range(c)]
    for _ in range(10):
        say = [[-0.5 * sum(float(f[e] - mu[k][e]) ** 2 / var[k][e] + math.log(var[k][e])
                           for e in range(d)) for k in range(c)] for f in x]  # fmt: skip
        for _ in range(5):
            new = []
            for i in range(n):
                pull = [sum(w * z[j][k] for j, w in near[i].items())
                        + sum(near[j][i] * z[j][k] for j in range(n) if i in near[j])
                        for k in range(c)]  # fmt: skip
                row = [(say[i][k] + 50 / 6 * pull[k]) / 50 for k in range(c)]
                row = [p[i][k] * math.exp(v - max(row)) for k, v in enumerate(row)]
                new.append([v / sum(row) for v in row])
            z = new
        mass = [sum(z[i][k] for i in range(n)) for k in range(c)]
        mean = [sum(z[i][k] * x[i] for i in range(n)) / mass[k] for k in range(c)]
        if name == "stata":
            hard = [sum(row.index(max(row)) == k for row in z) for k in range(c)]
            beta = [h / (1 + h) for h in hard]
            mu = [unit(b * unit(m) + (1 - b) * t) for b, m, t in zip(beta, mean, text, strict=True)]
        else:
            mu = [unit(m) for m in mean]
        around = [[sum(z[i][k] * float(x[i][e] - mu[k][e]) ** 2 for i in range(n))
                   for e in range(d)] for k in range(c)]  # fmt: skip
        if name == "stata":
            var = [[beta[k] * around[k][e] / mass[k]
                    + (1 - beta[k]) * (start[e] + float(text[k][e] - mu[k][e]) ** 2)
                    for e in range(d)] for k in range(c)]  # fmt: skip
        else:
            var = [[sum(around[k][e] for k in range(c)) / n for e in range(d)]] * c
    return torch.tensor(z, dtype=torch.float64)


@pytest.mark.parametrize("name", TRANSDUCTIVE)
@pytest.mark.parametrize("present", [None, 2])
def test_equals_the_published_formulas(name, present):
    features, prompts, _ = world(present=present)
    expected = by_hand(name, features[:, 0], prompts.text, 8.0)
    out = methods.get(name)(features, prompts)
    torch.testing.assert_close(out.logits.exp(), expected, atol=1e-9, rtol=0)
    before = 8.0 * features[:, 0] @ prompts.text.T
    torch.testing.assert_close(out.logits_before, before)
    assert (expected - before.softmax(-1)).abs().max() > 1e-2, "the case must change something"


@pytest.mark.parametrize("name", TRANSDUCTIVE)
def test_in_batches_no_batch_knows_of_another(name):
    """Each batch of the stream is what it is alone: in loops, the last one smaller."""
    features, prompts, _ = world(images=23)
    order = torch.randperm(23, generator=torch.Generator().manual_seed(3)).tolist()
    out = methods.get(name)(features, prompts, batch=9, order=3).logits.exp()
    for i in range(0, 23, 9):
        part = order[i : i + 9]
        expected = by_hand(name, features[part, 0], prompts.text, 8.0)
        torch.testing.assert_close(out[part], expected, atol=1e-9, rtol=0)


@pytest.mark.parametrize("name", TRANSDUCTIVE)
def test_many_orders_are_one_call(name, monkeypatch):
    features, prompts, _ = world(images=23)
    orders = torch.stack([torch.randperm(23) for _ in range(5)])
    method = methods.get(name)
    options = method.options(batch=6)
    together = method.adapt(features, prompts, options, orders=orders)
    assert together.logits.shape == (5, 23, 5) and together.logits_before.shape == (23, 5)
    monkeypatch.setattr("tpt_nb.methods.transductive.MEMORY", 0)  # one batch after another
    for o, order in enumerate(orders):
        alone = method.adapt(features, prompts, options, orders=order).logits
        torch.testing.assert_close(together.logits[o], alone, atol=1e-10, rtol=0)
    assert (together.logits[0] - together.logits[1]).abs().max() > 1e-3


@pytest.mark.parametrize("name", TRANSDUCTIVE)
def test_all_at_once_knows_no_order(name):
    features, prompts, _ = world(images=30)
    method = methods.get(name)
    assert method.kind == "transductive"
    whole = method(features, prompts)
    order = torch.randperm(30)
    torch.testing.assert_close(method(features[order], prompts).logits, whole.logits[order])
    for batch in (0, 30, 31):
        orders = torch.stack([torch.randperm(30) for _ in range(3)])
        out = method.adapt(features, prompts, method.options(batch=batch), orders=orders)
        torch.testing.assert_close(out.logits, whole.logits.expand(3, -1, -1))


@pytest.mark.parametrize("name", TRANSDUCTIVE)
@pytest.mark.parametrize("batch", [0, 7])
def test_the_order_of_the_classes_is_of_no_account(name, batch):
    features, prompts, _ = world(images=20)
    order = torch.tensor([3, 0, 4, 1, 2])
    renamed = FakePrompts(prompts.text[order], 8.0)
    a = methods.get(name)(features, prompts, batch=batch).logits
    b = methods.get(name)(features, renamed, batch=batch).logits
    torch.testing.assert_close(b, a[:, order])


@pytest.mark.parametrize("name", TRANSDUCTIVE)
@pytest.mark.parametrize("images", [1, 2, 3])
def test_few_images_and_only_view_0(name, images):
    features, prompts, _ = world(images=images)
    out = methods.get(name)(features, prompts)
    assert out.logits.isfinite().all()
    other = features.clone()
    other[:, 1:] = 0.5
    assert torch.equal(methods.get(name)(other, prompts).logits, out.logits)
    assert out.selected.tolist() == [[True, False]] * images


def test_the_anchor_is_what_survives_few_classes():
    """Two of sixty classes in a batch: without the anchor the others take images away."""
    right = {name: 0.0 for name in ("stata", "transclip")}
    for seed in range(4):
        scene = {"images": 60, "classes": 60, "width": 64, "present": 2, "scale": 25.0}
        features, prompts, targets = world(seed=seed, **scene)
        for name in right:
            logits = methods.get(name)(features, prompts).logits
            right[name] += float((logits.argmax(-1) == targets).double().mean()) / 4
    assert right["stata"] > right["transclip"] + 0.05


@pytest.mark.parametrize("name", TRANSDUCTIVE)
def test_runs_with_a_real_prompt(mini, name):
    prompts = Prompts(mini, NAMES)
    features = views_of(prompts, 9, 3)
    for batch in (0, 4):
        out = methods.get(name)(features, prompts, batch=batch)
        assert out.logits.shape == (9, 5) and out.logits.isfinite().all()
        zero_shot = methods.get("zero_shot")(features, prompts)
        torch.testing.assert_close(out.logits_before, zero_shot.logits)
        torch.testing.assert_close(out.loss, zero_shot.loss)
