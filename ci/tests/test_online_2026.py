"""DOTA, FreeTTA and BCA against restatements in loops, one image and one class at a time."""

import math

import pytest
import torch
import torch.nn.functional as F
from test_methods import FakePrompts

from tpt_nb import methods
from tpt_nb.methods import bca, dota, freetta, gaussian

NAMES = ("dota", "freetta", "bca")
SCALE, RHO = 6.0, 0.2
RANDOM = {"dota": {"rho": RHO}, "freetta": {}, "bca": {"rho": RHO, "centre_count": 3.0}}


def random_stream(images=24, views=20, classes=5, width=7, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    text = F.normalize(torch.randn(classes, width, generator=generator, dtype=dtype), dim=-1)
    centre = text[torch.randint(classes, (images,), generator=generator)]
    noise = torch.randn(images, views, width, generator=generator, dtype=dtype)
    return F.normalize(centre[:, None] + 1.5 / math.sqrt(width) * noise, dim=-1), text


def run(name, features, text, orders=None, scale=SCALE, **options):
    prompts = FakePrompts(text, scale)
    options = RANDOM[name] | options
    return methods.get(name)(features, prompts, inputs={"orders": orders}, **options)


def orders_of(images, n, seed=5):
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(images, generator=generator) for _ in range(n)])


def confident(image, text):
    """Logits, features and predictions of the int(rho V) surest views."""
    z = SCALE * image @ text.T
    p = z.softmax(-1)
    chosen = (-(p * p.log()).sum(-1)).argsort()[: int(len(z) * RHO)]
    return z[chosen], image[chosen], p[chosen]


def discriminant(x, mean, precision):
    return x @ precision @ mean - 0.5 * mean @ precision @ mean


def dota_by_hand(features, text, order, start, eps=1e-4, sigma=2e-3, eta=0.3, weight=0.02):
    c, one = len(text), torch.eye(text.shape[1], dtype=text.dtype)
    means = [t.clone() if start == "text" else torch.full_like(t, 0.001) for t in text]
    covariances, counts, out = [sigma * one for _ in range(c)], [1.0] * c, {}
    for i in order.tolist():
        z, views, labels = confident(features[i], text)
        precision = torch.linalg.inv((1 - eps) * sum(covariances) / c + eps * one)
        score = [discriminant(views.mean(0), mean, precision) for mean in means]
        share = min(weight * sum(counts) / c / len(views), eta)
        out[i] = z.mean(0) + share * torch.stack(score)
        for k in range(c):
            y = labels[:, k]
            spread = sum(
                a * torch.outer(v - means[k], v - means[k]) for a, v in zip(y, views, strict=True)
            )
            total = counts[k] + float(y.sum())
            covariances[k] = (counts[k] * covariances[k] + spread) / total
            means[k] = (
                sum(a * v for a, v in zip(y, views, strict=True)) + counts[k] * means[k]
            ) / total
            counts[k] = total
    return torch.stack([out[i] for i in range(len(features))])


@pytest.mark.parametrize("start", ["constant", "text"])
@pytest.mark.parametrize("width", [7, dota.SLAB + 6])
def test_dota_equals_the_published_algorithm(start, width):
    features, text = random_stream(images=29, width=width)
    for order in orders_of(29, 2):
        expected = dota_by_hand(features, text, order, start)
        out = run("dota", features, text, order, start=start).logits
        torch.testing.assert_close(out, expected, atol=1e-9, rtol=1e-9)
    other = run("dota", features, text, order, start={"text": "constant"}.get(start, "text"))
    assert (other.logits - expected).abs().max() > 1e-2


def test_dota_caps_the_weight_and_takes_parts(monkeypatch):
    features, text = random_stream(images=29)
    order = orders_of(29, 1)[0]
    capped = dota_by_hand(features, text, order, "constant", eta=0.01)
    assert (capped - dota_by_hand(features, text, order, "constant")).abs().max() > 1e-3
    for part in (1, 2**23):
        monkeypatch.setattr(dota, "PART", part)
        out = run("dota", features, text, order, eta=0.01).logits
        torch.testing.assert_close(out, capped, atol=1e-9, rtol=1e-9)


def freetta_by_hand(features, text, order, unit, alpha=0.2, beta=4.5):
    c, one = len(text), torch.eye(text.shape[1], dtype=text.dtype)
    means, covariance = [t.clone() for t in text], one.clone()
    counts, n, out = [1 / c] * c, 1.0, {}
    for i in order.tolist():
        f = features[i, 0]
        z = SCALE * f @ text.T
        p = z.softmax(-1)
        precision = torch.linalg.inv(covariance)
        g = [discriminant(f, means[k], precision) + math.log(counts[k] / n) for k in range(c)]
        out[i] = z + alpha * torch.stack(g)
        gamma = torch.stack(g).softmax(-1).tolist()
        w = math.exp(-beta * float(-(p * p.log()).sum()) / (math.log(c) if unit == "share" else 1))
        n += w
        for k in range(c):
            old = counts[k]
            counts[k] = old + w * gamma[k]
            means[k] = (old * means[k] + w * gamma[k] * f) / (old + w * gamma[k])
        spread = sum(gamma[k] * torch.outer(f - means[k], f - means[k]) for k in range(c))
        covariance = ((n - 1) * covariance + w * spread) / (n - 1)
    return torch.stack([out[i] for i in range(len(features))])


@pytest.mark.parametrize("unit", ["nats", "share"])
def test_freetta_equals_the_published_algorithm(unit):
    features, text = random_stream(images=29)
    for order in orders_of(29, 2):
        expected = freetta_by_hand(features, text, order, unit)
        out = run("freetta", features, text, order, entropy_unit=unit).logits
        torch.testing.assert_close(out, expected, atol=1e-9, rtol=1e-9)
    other = run("freetta", features, text, order, entropy_unit={"nats": "share"}.get(unit, "nats"))
    assert (other.logits - expected).abs().max() > 1e-3


def test_freetta_survives_images_without_weight():
    """Of weight exp(-4.5 log 200), the sum of the weights is lost beside n = 1 in float32."""
    features, _ = random_stream(images=8, classes=200, width=16, dtype=torch.float32)
    text = F.normalize(torch.randn(200, 16, generator=torch.Generator().manual_seed(1)), dim=-1)
    for doubt in (4.5, 100.0):
        out = run("freetta", features, text, scale=0.01, doubt=doubt)
        assert out.logits.isfinite().all()


def bca_by_hand(features, text, order, count, centre_above=0.05, prior_above=0.65):
    c = len(text)
    centres, prior = [t.clone() for t in text], torch.eye(c, dtype=text.dtype)
    n, m, out, moved = [count] * c, [1.0] * c, {}, [0, 0]
    for i in order.tolist():
        _, views, _ = confident(features[i], text)
        f = views.mean(0) / views.mean(0).norm()
        s = torch.stack([SCALE * f @ centre for centre in centres]).softmax(-1)
        p = sum(s[k] * prior[k] for k in range(c))
        out[i] = p.log()
        k = int(p.argmax())
        if p[k] > centre_above:
            new = (n[k] * centres[k] + f) / (n[k] + 1)
            centres[k], n[k] = new / new.norm(), n[k] + 1
            moved[0] += 1
        if p[k] > prior_above:
            prior[k], m[k] = (m[k] * prior[k] + p) / (m[k] + 1), m[k] + 1
            moved[1] += 1
    return torch.stack([out[i] for i in range(len(features))]), moved


@pytest.mark.parametrize(("count", "centre_above"), [(20_000.0, 0.05), (3.0, 0.5)])
def test_bca_equals_the_published_algorithm(count, centre_above):
    features, text = random_stream(images=40)
    for order in orders_of(40, 2):
        expected, moved = bca_by_hand(features, text, order, count, centre_above)
        assert 0 < moved[1] < moved[0], "the case must reach both tables, and not always"
        out = run("bca", features, text, order, centre_count=count, centre_above=centre_above)
        torch.testing.assert_close(out.logits, expected, atol=1e-9, rtol=1e-9)


# --- all three -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_many_orders_are_each_alone(name, monkeypatch):
    """However many orders go together; and rows of orders are rows of logits."""
    features, text = random_stream()
    orders = orders_of(24, 5)
    together = run(name, features, text, orders)
    assert together.logits.shape == (5, 24, 5)
    for order, logits in zip(orders, together.logits, strict=True):
        alone = run(name, features, text, order)
        torch.testing.assert_close(alone.logits, logits, atol=1e-10, rtol=0)
        assert torch.equal(alone.loss, together.loss)
        assert torch.equal(alone.selected, together.selected)
    assert together.logits.std(0).max() > 1e-3, "orders must differ"
    rows = torch.tensor([3, 0, 4, 4, 1])
    for module in (freetta, bca):
        monkeypatch.setattr(module, "STATE", 1)
    again = run(name, features, text, orders[rows]).logits
    torch.testing.assert_close(again, together.logits[rows], atol=1e-10, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_the_last_images_of_a_stream_change_nothing_before_them(name):
    features, text = random_stream()
    order = orders_of(24, 1)[0]
    whole = run(name, features, text, order).logits
    other = features.clone()
    other[order[20:]] = other[order[20:]].flip(-1)
    changed = run(name, other, text, order).logits
    torch.testing.assert_close(changed[order[:20]], whole[order[:20]], atol=1e-10, rtol=0)
    assert (changed[order[20:]] - whole[order[20:]]).abs().min() > 0


@pytest.mark.parametrize("name", NAMES)
def test_a_call_remembers_nothing(name):
    features, text = random_stream()
    copy = features.clone(), text.clone()
    order = orders_of(24, 1)[0]
    first = run(name, features, text, order)
    run(name, features.flip(0), text, order)
    assert torch.equal(run(name, features, text, order).logits, first.logits)
    assert torch.equal(copy[0], features) and torch.equal(copy[1], text)


@pytest.mark.parametrize("name", NAMES)
def test_classes_have_no_order(name):
    features, text = random_stream()
    order, classes = orders_of(24, 1)[0], torch.tensor([2, 4, 0, 1, 3])
    plain = run(name, features, text, order).logits
    permuted = run(name, features, text[classes], order).logits
    torch.testing.assert_close(permuted, plain[:, classes], atol=1e-9, rtol=0)


def test_the_first_image_meets_the_start():
    features, text = random_stream()
    order = orders_of(24, 1)[0]
    image = features[order[0]]
    z, views, _ = confident(image, text)
    out = {name: run(name, features, text, order).logits[order[0]] for name in NAMES}
    f = F.normalize(views.mean(0), dim=-1)
    torch.testing.assert_close(out["bca"], (SCALE * text @ f).log_softmax(-1))
    # the covariance is the identity: all classes lie equally far, and are equally frequent
    g = text @ image[0] - 0.5 + math.log(1 / 5)
    torch.testing.assert_close(out["freetta"], SCALE * text @ image[0] + 0.2 * g)
    # equal means say nothing of the classes
    torch.testing.assert_close(out["dota"].log_softmax(-1), z.mean(0).log_softmax(-1))
    started = run("dota", features, text, order, start="text").logits[order[0]]
    variance = (1 - 1e-4) * 2e-3 + 1e-4
    g = (text @ views.mean(0) - 0.5) / variance
    torch.testing.assert_close(started, z.mean(0) + 0.02 / len(views) * g)


@pytest.mark.parametrize("name", NAMES)
def test_one_image_one_view_one_class(name):
    features, text = random_stream(images=1, views=1, classes=1)
    out = run(name, features, text, torch.zeros(2, 1, dtype=torch.long))
    assert out.logits.shape == (2, 1, 1) and out.logits.isfinite().all()
    assert out.selected.tolist() == [[True]]


# --- the Gaussians -------------------------------------------------------------------------------


def test_scores_are_log_densities():
    generator = torch.Generator().manual_seed(0)
    x, means = torch.randn(2, 3, generator=generator), torch.randn(2, 4, 3, generator=generator)
    root = torch.randn(2, 3, 3, generator=generator)
    covariance = root @ root.mT + torch.eye(3)
    density = torch.distributions.MultivariateNormal(means, covariance[:, None]).log_prob(
        x[:, None]
    )
    scores = gaussian.gaussian_scores(x, means, covariance.triu())
    torch.testing.assert_close(scores.log_softmax(-1), density.log_softmax(-1))


def test_labels_below_rounding_are_left_out(monkeypatch):
    """Sharp predictions, as of a CLIP: most classes are not touched, and nothing is lost."""
    features, text = random_stream(images=40, classes=120, width=20, dtype=torch.float32)
    x, y = features[:, :4], (300 * features[:, :4] @ text.T).softmax(-1)
    touched, gifts = [], dota._gifts

    def counted(*args):
        who, gift = gifts(*args)
        touched.append(len(who))
        return who, gift

    def everything(x, y, means):
        away = (x[:, None] - means[:, :, None]) * y.mT.sqrt()[..., None]
        return torch.arange(y.shape[-1]), away.transpose(0, 1).flatten(1, 2)

    found = []
    for function in (counted, everything):
        monkeypatch.setattr(dota, "_gifts", function)
        stream = dota.Stream(torch.full_like(text, 0.001), 2e-3)
        found.append(
            torch.cat([stream.meet(x[i], y[i])[2].triu() for i in torch.arange(40).split(16)])
        )
    assert 0 < max(touched) < 100
    torch.testing.assert_close(*found, rtol=2e-6, atol=1e-8)


def test_covariances_that_do_not_fit_are_refused_before_they_are_made(monkeypatch):
    features, text = random_stream(classes=9)
    monkeypatch.setattr(gaussian, "free_bytes", lambda device: 2**20)
    monkeypatch.setattr(dota, "Stream", None)
    with pytest.raises(ValueError, match=r"9 covariances of 7 x 7 .* GiB .* fewer classes"):
        run("dota", features, text)


def test_free_memory_is_what_the_machine_says():
    assert 2**20 < gaussian.free_bytes(torch.device("cpu")) < 2**50
