"""OnZeta, DPE and STS against restatements with loops, lists, autograd and torch's AdamW."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_methods import FakePrompts

from tpt_nb import methods
from tpt_nb.methods.sts import rank, spectral_basis

STEPPING = ("onzeta", "dpe")


def random_stream(images=14, views=20, classes=5, width=7, seed=0, noise=0.5):
    generator = torch.Generator().manual_seed(seed)
    text = F.normalize(torch.randn(classes, width, generator=generator).double(), dim=-1)
    centre = text[torch.randint(classes, (images,), generator=generator)]
    far = noise * torch.randn(images, views, width, generator=generator).double()
    return F.normalize(centre[:, None] + far, dim=-1), FakePrompts(text, 8.0)


def orders_of(images, n, seed=5):
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(images, generator=generator) for _ in range(n)])


def entropy_of(p):
    return -sum(float(q) * math.log(q) for q in p if q > 0)


def softmax(z):
    e = [math.exp(a - max(z)) for a in z]
    return [a / sum(e) for a in e]


# --- OnZeta --------------------------------------------------------------------------------------


def onzeta_by_hand(features, prompts, order, cw=0.5, cr=20.0, alpha=1.0, beta=0.8, tau_i=4 / 8):
    """Lists of numbers; the log of the output, by position."""
    images, text = features[:, 0].tolist(), prompts.text.tolist()
    c, n = len(text), len(images)
    w, rho, out = [list(t) for t in text], [0.0] * c, {}

    def dot(a, b):
        return sum(x * y for x, y in zip(a, b, strict=True))

    for step, at in enumerate(order, start=1):
        f = images[at]
        p = softmax([8 * dot(f, t) for t in text])
        p = [a * math.exp(r) for a, r in zip(p, rho, strict=True)]
        p = [a / sum(p) for a in p]
        price = cr / math.sqrt(step)
        rho = [max(0.0, r - price * (a - alpha / c)) for r, a in zip(rho, p, strict=True)]
        v = softmax([dot(f, k) / tau_i for k in w])
        b = beta * math.sqrt(step / n)
        out[at] = [math.log(b * y + (1 - b) * a) for y, a in zip(v, p, strict=True)]
        for j in range(c):
            pull = cw / math.sqrt(step) / tau_i * (v[j] - p[j])
            w[j] = [k - pull * x for k, x in zip(w[j], f, strict=True)]
            w[j] = [k / math.sqrt(dot(w[j], w[j])) for k in w[j]]
    return torch.tensor([out[i] for i in range(n)], dtype=torch.float64)


@pytest.mark.parametrize("alpha", [1.0, 0.3])
def test_onzeta_equals_the_published_algorithm(alpha):
    features, prompts = random_stream(images=40)
    order = orders_of(40, 1)
    out = methods.get("onzeta")(features, prompts, inputs={"orders": order[0]}, balance=alpha)
    expected = onzeta_by_hand(features, prompts, order[0].tolist(), alpha=alpha)
    torch.testing.assert_close(out.logits, expected, atol=1e-9, rtol=0)
    assert (expected - out.logits_before.log_softmax(-1)).abs().max() > 0.5


def test_onzeta_lifts_classes_that_come_too_rarely():
    """Images of all classes look most like class 0. Without the balance nearly all are taken for
    it; with it, their labels are spread."""
    generator = torch.Generator().manual_seed(1)
    text = torch.eye(4, dtype=torch.float64)
    label = torch.arange(80) % 4
    image = 0.5 * text[label] + 0.55 * text[0]
    image += 0.05 * torch.randn(80, 4, generator=generator).double()
    features, prompts = F.normalize(image, dim=-1)[:, None], FakePrompts(text, 8.0)
    only = {"mix": 0.0, "proxy_step": 0.0}  # the labels, without visual proxies
    with_balance = methods.get("onzeta")(features, prompts, **only).logits
    without = methods.get("onzeta")(features, prompts, balance_step=0.0, **only).logits
    torch.testing.assert_close(without.exp(), (8 * features[:, 0]).softmax(-1))
    share = [z.exp().mean(0)[0].item() for z in (without, with_balance)]
    assert share[0] > 0.4 and abs(share[1] - 0.25) < 0.05
    right = [(z.argmax(1) == label).double().mean().item() for z in (without, with_balance)]
    assert right[1] > right[0] + 0.2


def test_onzeta_knows_its_horizon():
    """A longer plan trusts the proxies later; a stream past its plan trusts them most."""
    features, prompts = random_stream(images=12)
    method = methods.get("onzeta")
    plain = method(features, prompts).logits
    assert torch.equal(method(features, prompts, horizon=12).logits, plain)
    longer, none = (method(features, prompts, **o) for o in ({"horizon": 10**9}, {"mix": 0.0}))
    torch.testing.assert_close(longer.logits.exp(), none.logits.exp(), atol=1e-3, rtol=0)
    over = method(features, prompts, horizon=1).logits
    assert (over - plain).abs().max() > 0.01 and over.isfinite().all()


# --- DPE -----------------------------------------------------------------------------------------


def dpe_by_hand(features, prompts, order, predict="image", eps=1e-3, lr=5e-3, align=0.5, sure=0.1):
    """Dictionaries, one image at a time, autograd and AdamW; logits by position, and what moved."""
    text, moves, cache, out = prompts.text.clone(), 0, {}, {}
    c, replaced = len(text), 0

    def confident(x, t):
        z = 8.0 * x @ t.T
        h = [entropy_of(softmax(row)) for row in z.tolist()]
        kept = sorted(range(len(x)), key=lambda v: h[v])[: int(0.1 * len(x))]
        mean = torch.stack([z[v].softmax(-1) for v in kept]).mean(0)
        return x[kept].mean(0), int(z[kept].mean(0).argmax()), entropy_of(mean.tolist())

    def logits(x, t, keys):
        z = 8.0 * t @ x
        for cls, key in keys.items():
            z = z + 6.0 * torch.exp(-5.0 * (1 - key @ x)) * F.one_hot(torch.tensor(cls), c)
        return z

    for at in order:
        x, cls, h = confident(features[at], F.normalize(text, dim=-1))
        items = cache.setdefault(cls, [])
        if len(items) < 3:
            items.append((x, h))
        elif h < max(e for _, e in items):
            items[max(range(3), key=lambda e: items[e][1])] = (x, h)
            replaced += 1
        keys = {k: torch.stack([e for e, _ in v]).mean(0) for k, v in sorted(cache.items())}
        r = torch.zeros_like(text, requires_grad=True)
        s = {k: torch.zeros_like(v, requires_grad=True) for k, v in keys.items()}
        new_t = F.normalize(text + r, dim=-1)
        new_k = {k: F.normalize(keys[k] + s[k], dim=0) for k in keys}
        z = logits(x, new_t, new_k)
        loss = -(z.softmax(-1) * z.log_softmax(-1)).sum()
        ours, theirs = torch.stack(list(new_k.values())), new_t[list(new_k)]
        target = torch.arange(len(keys))
        loss = loss + align * F.cross_entropy(ours @ theirs.T / 0.01, target)
        step = torch.optim.AdamW([r, *s.values()], lr=lr, eps=eps, weight_decay=0.1)
        loss.backward()
        step.step()
        with torch.no_grad():
            new_t = F.normalize(text + r, dim=-1)
            new_k = {k: F.normalize(keys[k] + s[k], dim=0) for k in keys}
            x = confident(features[at], new_t)[0] if predict == "confident" else features[at][0]
            out[at] = logits(x, new_t, new_k)
            if entropy_of(softmax(out[at].tolist())) / math.log2(c) < sure:
                moves += 1
                text = text * moves / (moves + 1) + new_t / (moves + 1)
    return torch.stack([out[i] for i in range(len(features))]), moves, replaced


@pytest.mark.parametrize("predict", ["image", "confident"])
@pytest.mark.parametrize("more", [{}, {"align": 2.0, "eps": 1e-8, "lr": 0.02}, {"align": 0.0}])
def test_dpe_equals_the_published_algorithm(predict, more):
    features, prompts = random_stream(images=40, seed=3)
    orders = orders_of(40, 2)
    options = {"adam_eps": more.get("eps", 1e-3), "residual_step": more.get("lr", 5e-3)}
    options |= {"align": more.get("align", 0.5), "predict": predict}
    out = methods.get("dpe")(features, prompts, inputs={"orders": orders}, **options)
    for row, logits in zip(orders.tolist(), out.logits, strict=True):
        expected, moves, replaced = dpe_by_hand(features, prompts, row, predict, **more)
        assert 5 < moves < 40 and replaced > 5, "the case must reach every branch"
        torch.testing.assert_close(logits, expected, atol=1e-6, rtol=0)


def test_dpe_that_never_moves_leaves_the_text_prototypes():
    """With no step and no cache it is zero-shot; with a threshold of 0 no image changes the text
    that the next one meets, so two images of different classes do not meddle."""
    features, prompts = random_stream(images=10)
    still = {"residual_step": 1e-12, "cache_alpha": 0.0}
    out = methods.get("dpe")(features, prompts, **still)
    torch.testing.assert_close(out.logits, out.logits_before, atol=1e-8, rtol=0)
    never = {"cache_alpha": 0.0, "align": 0.0, "sure": 0.0}
    a = methods.get("dpe")(features, prompts, order=1, **never).logits
    b = methods.get("dpe")(features, prompts, order=2, **never).logits
    torch.testing.assert_close(a, b, atol=1e-12, rtol=0)
    assert (a - out.logits_before).abs().max() > 1e-3


# --- both ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STEPPING)
def test_orders_at_once_equal_each_alone(name, monkeypatch):
    """Also where they are split: three at a time, and one."""
    features, prompts = random_stream(images=16)
    orders, method = orders_of(16, 7), methods.get(name)
    together = method(features, prompts, inputs={"orders": orders}).logits
    assert together.shape == (7, 16, 5)
    for row, logits in zip(orders, together, strict=True):
        alone = method(features, prompts, inputs={"orders": row}).logits
        torch.testing.assert_close(alone, logits, atol=1e-9, rtol=0)
    module = __import__(f"tpt_nb.methods.{name}", fromlist=[name])
    monkeypatch.setattr(module, "STATE", 3 * prompts.text.numel())
    split = method(features, prompts, inputs={"orders": orders}).logits
    torch.testing.assert_close(split, together, atol=1e-9, rtol=0)


@pytest.mark.parametrize("name", STEPPING)
def test_nothing_leaks(name):
    """Neither from call to call, nor into what was given, nor from later images to earlier ones."""
    features, prompts = random_stream(images=16)
    kept, text = features.clone(), prompts.text.clone()
    method, orders = methods.get(name), orders_of(16, 3)
    more = {"horizon": 16} if name == "onzeta" else {}
    first = method(features, prompts, inputs={"orders": orders}, **more)
    again = method(features, prompts, inputs={"orders": orders}, **more)
    assert torch.equal(first.logits, again.logits)
    assert torch.equal(features, kept) and torch.equal(prompts.text, text)
    # the first half of a stream, without its second half
    half = orders[0][:8]
    part = method(features[half], prompts, inputs={"orders": torch.arange(8)}, **more)
    torch.testing.assert_close(part.logits, first.logits[0][half], atol=1e-9, rtol=0)
    for field in ("loss", "selected", "logits_before"):
        one = method(features, prompts, order=9, **more)
        assert torch.equal(getattr(one, field), getattr(first, field)), field


def test_options_out_of_range():
    features, prompts = random_stream(images=2)
    with pytest.raises(ValueError, match="mix"):
        methods.get("onzeta")(features, prompts, mix=1.5)
    with pytest.raises(ValueError, match="predict"):
        methods.get("dpe")(features, prompts, predict="nothing")


# --- STS -----------------------------------------------------------------------------------------


def sts_by_hand(x, text, k, steps, penalty, predict, shift=0.02):
    """One image [V,D] with torch's AdamW on gamma; the basis from the Gram matrix."""
    _, vectors = torch.linalg.eigh(text.T @ text)
    basis = vectors.flip(1)[:, :k]
    h = [entropy_of(softmax(row)) for row in (8.0 * x @ text.T).tolist()]
    kept = sorted(range(len(x)), key=lambda v: h[v])[: int(0.3 * len(x))]
    gamma = torch.zeros(k, dtype=torch.float64, requires_grad=True)
    step = torch.optim.AdamW([gamma], lr=shift)
    for _ in range(steps):
        moved = F.normalize(text + basis @ gamma, dim=-1)
        mean = sum((8.0 * moved @ x[v]).softmax(-1) for v in kept) / len(kept)
        loss = -(mean * mean.log()).sum() + penalty * (basis @ gamma).square().sum()
        step.zero_grad()
        loss.backward()
        step.step()
    moved = F.normalize(text + basis @ gamma.detach(), dim=-1)
    if predict == "image":
        return 8.0 * moved @ x[0]
    return (sum((8.0 * moved @ x[v]).softmax(-1) for v in kept) / len(kept)).log()


@pytest.mark.parametrize("predict", ["image", "confident"])
@pytest.mark.parametrize(("steps", "penalty"), [(1, 0.0), (3, 0.0), (3, 40.0)])
def test_sts_equals_its_formulas(steps, penalty, predict):
    features, prompts = random_stream(images=6, classes=12, width=7)
    k = spectral_basis(prompts.text).shape[1]
    more = {"steps": steps, "penalty": penalty, "predict": predict, "shift": 0.02, "rho": 0.3}
    out = methods.get("sts")(features, prompts, **more)
    for x, logits in zip(features, out.logits, strict=True):
        expected = sts_by_hand(x, prompts.text, k, steps, penalty, predict)
        torch.testing.assert_close(logits, expected, atol=1e-6, rtol=0)


def test_permuted_classes_permute_the_logits_of_sts():
    """Singular vectors stay, but for their sign."""
    features, prompts = random_stream(images=6)
    order = torch.tensor([3, 0, 4, 1, 2])
    out = methods.get("sts")(features, prompts).logits
    permuted = methods.get("sts")(features, FakePrompts(prompts.text[order], 8.0)).logits
    torch.testing.assert_close(permuted, out[:, order], atol=1e-8, rtol=0)


def test_the_penalty_of_sts_says_nothing_in_the_first_step():
    features, prompts = random_stream(images=6)
    sts = methods.get("sts")
    one, bound = (sts(features, prompts, penalty=w, steps=1).logits for w in (0.0, 100.0))
    assert torch.equal(one, bound)
    one, bound = (sts(features, prompts, penalty=w, steps=5).logits for w in (0.0, 100.0))
    assert (one - bound).abs().max() > 1e-3


def test_the_basis_lies_in_what_the_class_features_span():
    generator = torch.Generator().manual_seed(0)
    text = F.normalize(torch.randn(6, 3, generator=generator).double(), dim=-1)
    text = F.pad(text, (0, 4))  # three of seven dimensions
    basis = spectral_basis(text)
    assert basis.shape[1] <= 3 and basis[3:].abs().max() < 1e-12
    torch.testing.assert_close(basis.T @ basis, torch.eye(basis.shape[1]).double())


@pytest.mark.parametrize(("rows", "columns"), [(200, 200), (300, 100), (60, 400)])
def test_rank_finds_the_low_rank_in_noise(rows, columns):
    """Five directions well above the noise's edge sigma (sqrt m + sqrt n), two well below."""
    generator = torch.Generator().manual_seed(rows)
    left = torch.linalg.qr(torch.randn(rows, 7, generator=generator).double())[0]
    right = torch.linalg.qr(torch.randn(columns, 7, generator=generator).double())[0]
    edge = math.sqrt(rows) + math.sqrt(columns)
    sizes = edge * torch.tensor([9, 7, 5, 4, 3, 0.3, 0.2]).double()
    noise = torch.randn(rows, columns, generator=generator).double()
    for sigma in (0.01, 1.0, 30.0):  # the size of the noise is not told
        noisy = sigma * (left * sizes @ right.T + noise)
        assert rank(torch.linalg.svdvals(noisy), rows, columns) == 5
    assert rank(torch.linalg.svdvals(noise), rows, columns) == 1  # never an empty basis
    clear = torch.linalg.svd(left[:, :5] * sizes[:5] @ right[:, :5].T + 1e-3 * noise)
    basis = spectral_basis(left[:, :5] * sizes[:5] @ right[:, :5].T + 1e-3 * noise)
    assert basis.shape == (columns, 5) and clear.S[5] < 0.1
    torch.testing.assert_close(basis @ basis.T, right[:, :5] @ right[:, :5].T, atol=1e-3, rtol=0)


@pytest.mark.parametrize("beta", [0.1, 0.5, 1.0])
def test_the_threshold_is_that_of_the_marchenko_pastur_law(beta):
    """omega = lambda(beta) / sqrt(median of the law), integrated here."""
    low, high = (1 - math.sqrt(beta)) ** 2, (1 + math.sqrt(beta)) ** 2
    half = np.linspace(0, np.pi, 200001)  # x = mid - r cos: no singular ends
    x = (low + high) / 2 - (high - low) / 2 * np.cos(half)
    density = ((high - low) / 2 * np.sin(half)) ** 2 / (2 * np.pi * beta * np.maximum(x, 1e-12))
    share = np.cumsum(density) / density.sum()
    median = x[np.searchsorted(share, 0.5)]
    best = math.sqrt(2 * (beta + 1) + 8 * beta / ((beta + 1) + math.sqrt(beta**2 + 14 * beta + 1)))
    omega = best / math.sqrt(median)
    ones = torch.ones(101, dtype=torch.float64)  # median 1
    for factor, kept in ((omega - 0.03, 1), (omega + 0.03, 2)):
        values = torch.cat([torch.tensor([99.0, factor], dtype=torch.float64), ones])
        assert rank(values, round(1000 * beta), 1000) == kept
