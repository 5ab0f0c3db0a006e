import math

import pytest
import torch
import torch.nn.functional as F

from tpt_nb import methods
from tpt_nb.losses import entropy, marginal_entropy
from tpt_nb.models import Prompts, TemplatePrompts

NAMES = ["cat", "hot air balloon", "fire_engine", "dog", "bus"]
EPISODIC = [
    name
    for name in methods.names()
    if methods.get(name).kind == "episodic" and not methods.get(name).needs
]


class FakeClip:
    """A scale, a dtype and a width: what training-free methods ask of a model."""

    def __init__(self, width: int, scale: float, dtype=torch.float32) -> None:
        self.embed_dim, self.name = width, "fake"
        self.logit_scale = torch.tensor(scale)
        self.model = torch.nn.Module()  # what text_tower takes for a CLIP's
        self.model.token_embedding = torch.nn.Embedding(1, 1, dtype=dtype)
        self.model.text_pool_type, self.model.attn_mask = "argmax", torch.zeros(1, 1)


class FakePrompts:
    """Given text features."""

    ctx = None

    def __init__(self, text: torch.Tensor, scale: float = 1.0) -> None:
        self.clip, self.text = FakeClip(text.shape[1], scale, text.dtype), text

    def text_features(self) -> torch.Tensor:
        return self.text


def from_logits(logits: torch.Tensor) -> tuple[torch.Tensor, FakePrompts]:
    """Features and prompts that give exactly these logits [B,V,C]."""
    return logits, FakePrompts(torch.eye(logits.shape[-1], dtype=logits.dtype))


def favour(classes: list[int], sure: list[float], n: int = 4) -> torch.Tensor:
    """[1,V,C] logits: view i predicts classes[i], the surer the larger sure[i]."""
    return (F.one_hot(torch.tensor(classes), n) * torch.tensor(sure)[:, None])[None]


def views_of(prompts, images, views, seed=0):
    generator = torch.Generator().manual_seed(seed)
    text = prompts.text_features().float()
    centre = text[torch.randint(len(text), (images,), generator=generator)]
    noise = torch.randn(images, views, text.shape[1], generator=generator)
    return F.normalize(centre[:, None] + 0.05 * noise, dim=-1)


@pytest.fixture(scope="module")
def prompts(mini):
    return Prompts(mini, NAMES)


@pytest.fixture(scope="module")
def prompts64(mini64):
    return Prompts(mini64, NAMES)


# --- all episodic methods ------------------------------------------------------------------------


@pytest.mark.parametrize("name", EPISODIC)
def test_images_do_not_see_each_other(prompts, name):
    """Neither the order of the images nor what else is in the batch changes a prediction."""
    features = views_of(prompts, 6, 20, seed=1)
    method = methods.get(name)
    together = method(features, prompts)
    order = torch.tensor([4, 1, 5, 0, 3, 2])
    shuffled = method(features[order], prompts)
    alone = method(features[2:3], prompts)
    torch.testing.assert_close(shuffled.logits, together.logits[order], atol=2e-3, rtol=1e-3)
    torch.testing.assert_close(alone.logits, together.logits[2:3], atol=2e-3, rtol=1e-3)
    assert torch.equal(shuffled.selected, together.selected[order])
    for field, shape in (("logits", (6, 5)), ("logits_before", (6, 5)), ("loss", (6,))):
        value = getattr(together, field)
        assert value.shape == shape and value.isfinite().all(), field


@pytest.mark.parametrize("name", EPISODIC)
def test_the_prediction_before_is_zero_shot(prompts, name):
    features = views_of(prompts, 3, 20, seed=2)
    before = methods.get(name)(features, prompts).logits_before
    torch.testing.assert_close(before, methods.get("zero_shot")(features, prompts).logits)


@pytest.mark.parametrize("name", EPISODIC)
def test_one_view_and_identical_views(prompts, name):
    """V=1 and views that are all the same: finite, and the class of that view."""
    one = views_of(prompts, 4, 1, seed=3)
    expected = methods.get("zero_shot")(one, prompts).logits.argmax(1)
    for features in (one, one.expand(-1, 12, -1).contiguous()):
        out = methods.get(name)(features, prompts).logits
        assert out.isfinite().all()
        if name not in ("tps",):  # a step of fixed length may change a class by itself
            assert torch.equal(out.argmax(1), expected)


def test_templates_are_enough_for_what_tunes_no_context(mini):
    ensemble = TemplatePrompts(mini, NAMES, ["a photo of a {}.", "a {}."])
    features = views_of(ensemble, 2, 12)
    for name in ("vote", "zero", "zero_fp16", "mta", "tps"):
        assert methods.get(name)(features, ensemble).logits.shape == (2, 5)
    with pytest.raises(ValueError, match="context"):
        methods.get("ctpt")(features, ensemble)


# --- votes ---------------------------------------------------------------------------------------


def test_vote_counts_heads():
    """Two votes of moderate certainty beat one of great certainty; the mean says the opposite."""
    features, prompts = from_logits(favour([1, 1, 2, 0, 0], [5.0, 5.0, 60.0, 0.1, 0.1]))
    out = methods.get("vote")(features, prompts, rho=0.6)
    assert out.logits.argmax(1).tolist() == [1]
    torch.testing.assert_close(
        out.logits.exp()[0], torch.tensor([0, 2 / 3, 1 / 3, 0]), atol=1e-3, rtol=0
    )
    assert out.selected.tolist() == [[True, True, True, False, False]]
    assert out.loss.item() == pytest.approx(math.log(3) - 2 / 3 * math.log(2), abs=5e-3)


def test_equal_votes_go_to_the_more_probable_class():
    features, prompts = from_logits(favour([3, 1], [5.0, 4.0]))
    assert methods.get("vote")(features, prompts, rho=1.0).logits.argmax(1).tolist() == [3]


def test_zero_asks_the_next_confident_view():
    """Classes 3 and 1 have a vote each; the surest of the rest that predicts one of them decides,
    not the first in the list and not the more probable class."""
    sure = [9.0, 8.0, 1.0, 3.0, 2.0]
    features, prompts = from_logits(favour([3, 1, 3, 2, 1], sure))
    assert methods.get("zero")(features, prompts, rho=0.4).logits.argmax(1).tolist() == [1]
    nobody = from_logits(favour([3, 1, 2, 2, 0], sure))
    assert methods.get("zero")(*nobody, rho=0.4).logits.argmax(1).tolist() == [3]
    whole = from_logits(favour([3, 1], [9.0, 8.0]))
    assert methods.get("zero")(*whole, rho=1.0).logits.argmax(1).tolist() == [3]


def test_zero_and_vote_agree_where_there_is_no_tie(prompts):
    features = views_of(prompts, 20, 32, seed=5)
    a, b = (
        methods.get("vote")(features, prompts, rho=0.3),
        methods.get("zero")(features, prompts, rho=0.3),
    )
    shares = a.logits.exp().topk(2).values
    clear = shares[:, 0] - shares[:, 1] > 0.02
    assert clear.any()
    torch.testing.assert_close(a.logits[clear], b.logits[clear])


def test_half_precision_is_no_vote():
    """A cosine gap of 0.001 is worth odds of e^1.02 there, a whole vote in the paper."""
    cosines = torch.tensor([[[0.3000, 0.3010], [0.3100, 0.3000], [0.3000, 0.3010]]])
    features = F.pad(cosines, (0, 1))
    features[..., 2] = (1 - cosines.square().sum(-1)).sqrt()
    prompts = FakePrompts(torch.eye(3)[:2], 100.0)
    exact = methods.get("zero")(features, prompts, rho=1.0)
    half = methods.get("zero_fp16")(features, prompts, rho=1.0)
    assert exact.logits.argmax(1).tolist() == [1]
    assert half.logits.argmax(1).tolist() == [0]
    gap = torch.tensor([0.3010]).half().float() - torch.tensor([0.3000]).half().float()
    first = torch.sigmoid(gap / 2**-10)
    second = torch.sigmoid(-(torch.tensor(0.31).half().float() - 0.30004883) / 2**-10)
    expected = (2 * first + second) / 3
    torch.testing.assert_close(half.logits.exp()[0, 1:], expected, atol=1e-3, rtol=0)


def test_published_tie_break_asks_by_confidence():
    """View 3 decides, the surest of the rest; before cbd7949 it was view 2, the first after k=2."""
    eye = torch.eye(4)
    cosines = torch.stack([0.9 * eye[3], 0.9 * eye[1], 0.1 * eye[3], 0.3 * eye[1], 0.2 * eye[2]])[
        None
    ]
    prompts = FakePrompts(eye, 100.0)
    assert methods.get("zero_fp16")(cosines, prompts, rho=0.4).logits.argmax(1).tolist() == [1]
    assert methods.get("zero")(cosines, prompts, rho=0.4).logits.argmax(1).tolist() == [1]


def published_zero(cosines, scale, share, by_confidence=True):
    """Class for one image's cosines [V][C], as ZERO's code finds it, and how it came to it."""
    entropies = []
    for row in cosines:
        p = [math.exp(scale * (c - max(row))) for c in row]
        entropies.append(-sum(q / sum(p) * math.log(q / sum(p)) for q in p))
    views = range(len(cosines))
    order = sorted(views, key=lambda view: entropies[view])
    k = int(len(cosines) * share)
    bar = [0.0] * len(cosines[0])
    for view in order[:k]:
        p = [math.exp((c - max(cosines[view])) / 2**-10) for c in cosines[view]]
        bar = [b + (q / sum(p) if q > 1e-40 else 0.0) for b, q in zip(bar, p, strict=True)]
    ties = [c for c, b in enumerate(bar) if b == max(bar)]
    if len(ties) == 1:
        return ties[0], "vote"
    rest = order[k:] if by_confidence else list(views)[k:]
    for view in rest:
        prediction = cosines[view].index(max(cosines[view]))
        if prediction in ties:
            return prediction, "asked"
    row = list(cosines[rest[0]])
    for c in ties:
        row[~c] = -math.inf
    winner = row.index(max(row))
    bar[winner] += 1
    return bar.index(max(bar)), "slip"


def test_zero_fp16_is_the_published_code_in_loops():
    """Eighths of a cosine are whole votes in half precision; entropy falls with the length."""
    generator = torch.Generator().manual_seed(4)
    noise = torch.rand(300, 6, 8, generator=generator)
    length = 0.9 + torch.rand(300, 6, 1, generator=generator).argsort(1) / 60
    cosines = (noise.argsort(-1) / 8 * length).half().float()
    out = methods.get("zero_fp16")(cosines, FakePrompts(torch.eye(8), 8.0), rho=0.7)
    found = [published_zero(rows, 8.0, 0.7) for rows in cosines.tolist()]
    assert out.logits.argmax(1).tolist() == [c for c, _ in found]
    ways = [way for _, way in found]
    assert min(ways.count(way) for way in ("vote", "asked", "slip")) > 20
    before = [published_zero(rows, 8.0, 0.7, by_confidence=False)[0] for rows in cosines.tolist()]
    assert sum(a != b for (a, _), b in zip(found, before, strict=True)) > 20


def test_published_fallback_masks_the_wrong_classes():
    """Nobody predicts a tied class (1 and 3): ~1 = -2 and ~3 = -4 mask classes 2 and 0 of view 2,
    which predicts 2; what is left and best there is class 1 or 3 by its cosine."""
    eye = torch.eye(4)
    third = 0.5 * eye[2] + 0.2 * eye[3] + 0.1 * eye[1]
    cosines = torch.stack([0.9 * eye[3], 0.9 * eye[1], third])[None]
    out = methods.get("zero_fp16")(cosines, FakePrompts(eye, 100.0), rho=0.7)
    assert out.selected.tolist() == [[True, True, False]]
    assert out.logits.argmax(1).tolist() == [3]


# --- our own -------------------------------------------------------------------------------------


def test_contrast_vote_by_hand():
    generator = torch.Generator().manual_seed(3)
    logits = 3 * torch.randn(2, 7, 5, generator=generator, dtype=torch.float64)
    out = methods.get("contrast_vote")(
        *from_logits(logits), contrast=0.4, temperature=1.5, image=3.0
    )
    for i in range(2):
        score = [0.0] * 5
        mean = [sum(float(logits[i, v, c]) for v in range(7)) / 7 for c in range(5)]
        for v in range(7):
            z = [(float(logits[i, v, c]) - 0.4 * mean[c]) / 1.5 for c in range(5)]
            total = sum(map(math.exp, z))
            score = [s + (math.exp(x) / total) ** 2 for s, x in zip(score, z, strict=True)]
        z = [float(x) / 1.5 for x in logits[i, 0]]
        total = sum(map(math.exp, z))
        score = [s + 3.0 * (math.exp(x) / total) ** 2 for s, x in zip(score, z, strict=True)]
        expected = torch.tensor(score, dtype=torch.float64) / sum(score)
        torch.testing.assert_close(out.logits[i].exp(), expected)


def test_contrast_takes_off_what_all_views_say():
    """All views find class 0 likely; one in four is as sure of class 1. The vote says 0."""
    logits = torch.tensor([[4.0, 0, 0], [4.0, 5.0, 0], [4.0, 0, 0], [4.0, 0, 0]])[None]
    features, prompts = from_logits(logits)
    assert methods.get("vote")(features, prompts, rho=1.0).logits.argmax(1).tolist() == [0]
    plain = {"temperature": 1.0, "image": 0.0}
    assert (
        methods.get("contrast_vote")(features, prompts, contrast=0.0, **plain).logits.argmax() == 0
    )
    assert (
        methods.get("contrast_vote")(features, prompts, contrast=1.0, **plain).logits.argmax() == 1
    )


def test_the_image_has_votes():
    """A sure image against three sure crops."""
    features, prompts = from_logits(favour([2, 1, 1, 1], [9.0, 9.0, 9.0, 9.0]))
    few, many = (
        methods.get("contrast_vote")(features, prompts, contrast=0.0, image=v) for v in (0, 4)
    )
    assert few.logits.argmax() == 1 and many.logits.argmax() == 2
    with pytest.raises(ValueError, match="temperature"):
        methods.get("contrast_vote")(features, prompts, temperature=0.0)


# --- MTA -----------------------------------------------------------------------------------------


def mta_by_hand(x, text, scale, lambda_q=4.0, lambda_y=0.2):
    """The equations with loops over views, for one image [V,D]."""
    v = len(x)
    p = (scale * x @ text.T).softmax(-1)
    near = int(0.3 * (v - 1))
    h2 = [
        0.5
        * sum(sorted(float((x[i] - x[j]).square().sum()) for j in range(v))[1 : near + 1])
        / near
        for i in range(v)
    ]

    def kernel(m, i):
        return math.exp(-float((x[i] - m).square().sum()) / (2 * h2[i]))

    y, m = [1 / v] * v, x[0]
    for _ in range(5):
        density = [kernel(m, i) for i in range(v)]
        for _ in range(5):
            old = y
            z = [
                density[i] + lambda_q * sum(float(p[i] @ p[j]) * old[j] for j in range(v))
                for i in range(v)
            ]
            y = (torch.tensor(z, dtype=x.dtype) / lambda_y).softmax(0).tolist()
            if math.dist(old, y) < 1e-6:
                break
        for _ in range(5):
            old_m = m
            weights = torch.tensor([y[i] * kernel(m, i) for i in range(v)], dtype=x.dtype)
            m = F.normalize(weights @ x, dim=0)
            if float((old_m - m).norm()) < 1e-6:
                break
    return scale * m @ text.T


def test_mta_follows_its_equations():
    generator = torch.Generator().manual_seed(0)
    text = F.normalize(torch.randn(5, 8, generator=generator, dtype=torch.float64), dim=-1)
    noise = torch.randn(3, 12, 8, generator=generator, dtype=torch.float64)
    features = F.normalize(text[:3, None] + 0.4 * noise, dim=-1)
    out = methods.get("mta")(features, FakePrompts(text, 20.0))
    expected = torch.stack([mta_by_hand(x, text, 20.0) for x in features])
    torch.testing.assert_close(out.logits, expected, atol=1e-5, rtol=0)


def test_mta_knows_no_order_but_that_view_0_is_the_start():
    generator = torch.Generator().manual_seed(4)
    text = F.normalize(torch.randn(5, 8, generator=generator, dtype=torch.float64), dim=-1)
    noise = torch.randn(2, 12, 8, generator=generator, dtype=torch.float64)
    features = F.normalize(text[:2, None] + 0.5 * noise, dim=-1)
    order = torch.tensor([0, 7, 3, 11, 1, 10, 2, 9, 4, 8, 6, 5])
    prompts = FakePrompts(text, 20.0)
    a, b = methods.get("mta")(features, prompts), methods.get("mta")(features[:, order], prompts)
    torch.testing.assert_close(a.logits, b.logits)
    assert (a.logits - a.logits_before).abs().max() > 0.1


# --- tuning --------------------------------------------------------------------------------------


def test_tps_is_a_sign_step_on_the_text_features():
    generator = torch.Generator().manual_seed(0)
    text = F.normalize(torch.randn(4, 6, generator=generator, dtype=torch.float64), dim=-1)
    noise = torch.randn(2, 20, 6, generator=generator, dtype=torch.float64)
    features = F.normalize(text[:2, None] + noise, dim=-1)
    out = methods.get("tps")(features, FakePrompts(text, 5.0), rho=0.3, shift=0.01)
    for i, x in enumerate(features):
        delta = torch.zeros_like(text, requires_grad=True)
        logits = 5.0 * x @ F.normalize(text + delta, dim=-1).T
        loss = marginal_entropy(logits, 0.3)
        loss.backward()
        g = delta.grad
        moved = F.normalize(text - 0.01 * g / (g.abs() + 1e-8), dim=-1)
        torch.testing.assert_close(out.logits[i], 5.0 * x[0] @ moved.T, atol=1e-9, rtol=0)
        assert out.loss[i].item() == pytest.approx(loss.item())


def test_tps_selects_the_views_anew_in_each_step():
    """Against AdamW in loops; with the views of the first step alone it ends elsewhere."""
    generator = torch.Generator().manual_seed(2)
    text = F.normalize(torch.randn(4, 6, generator=generator, dtype=torch.float64), dim=-1)
    noise = torch.randn(3, 20, 6, generator=generator, dtype=torch.float64)
    features = F.normalize(text[:3, None] + noise, dim=-1)
    out = methods.get("tps")(features, FakePrompts(text, 5.0), rho=0.3, shift=0.05, steps=4)

    def shifted(x, anew):
        delta, first, second = (torch.zeros_like(text) for _ in range(3))
        for t in range(1, 5):
            leaf = delta.clone().requires_grad_(True)
            logits = 5.0 * x @ F.normalize(text + leaf, dim=-1).T
            if anew or t == 1:
                entropies = [float(entropy(z)) for z in logits.detach()]
                chosen = sorted(range(20), key=lambda view: entropies[view])[:6]
            if t == 1:
                used = chosen
            mean = sum(logits[view].softmax(-1) for view in chosen) / 6
            g = torch.autograd.grad(-(mean * mean.log()).sum(), leaf)[0]
            first, second = 0.9 * first + 0.1 * g, 0.999 * second + 0.001 * g * g
            step = first / (1 - 0.9**t) / ((second / (1 - 0.999**t)).sqrt() + 1e-8)
            delta = delta * (1 - 0.05 * 0.01) - 0.05 * step
        return 5.0 * F.normalize(text + delta, dim=-1) @ x[0], used

    for i, x in enumerate(features):
        expected, used = shifted(x, anew=True)
        torch.testing.assert_close(out.logits[i], expected, atol=1e-7, rtol=0)
        assert out.selected[i].nonzero()[:, 0].tolist() == sorted(used)
    kept = torch.stack([shifted(x, anew=False)[0] for x in features])
    assert (out.logits - kept).abs().max() > 0.01


def test_tps_steps_lower_what_they_minimise():
    """With one view the marginal entropy is the entropy of the prediction."""
    generator = torch.Generator().manual_seed(1)
    text = F.normalize(torch.randn(4, 6, generator=generator), dim=-1)
    features = F.normalize(torch.randn(5, 1, 6, generator=generator), dim=-1)
    prompts = FakePrompts(text, 5.0)
    far = methods.get("tps")(features, prompts, shift=0.01, steps=20)
    near = methods.get("tps")(features, prompts, shift=0.01, steps=1)
    assert (entropy(far.logits) < entropy(near.logits)).all()
    assert (entropy(near.logits) < near.loss).all()


def test_tps_refuses_nonsense(prompts):
    features = views_of(prompts, 1, 4)
    with pytest.raises(ValueError, match="shift"):
        methods.get("tps")(features, prompts, shift=0.0)


def test_tpt_confident_averages_under_the_tuned_prompt(prompts64):
    features = views_of(prompts64, 3, 20, seed=7).double()
    tuned = methods.get("tpt")(features, prompts64, lr=0.02)
    out = methods.get("tpt_confident")(features, prompts64, lr=0.02)
    scale = prompts64.clip.logit_scale.double()
    for i in range(3):
        text = prompts64.text_features(tuned.ctx[i])
        p = (scale * features[i][tuned.selected[i]] @ text.T).softmax(-1).mean(0)
        torch.testing.assert_close(out.logits[i].exp(), p, atol=1e-8, rtol=0)


def test_rtpt_by_hand(prompts64):
    """Mean entropy as the loss; reliability from the most similar other views."""
    features = views_of(prompts64, 2, 9, seed=8).double()
    out = methods.get("rtpt")(features, prompts64, rho=0.4, lr=0.02, neighbours=3)
    tuned = methods.get("tpt")(features, prompts64, loss="mean_entropy", rho=0.4, lr=0.02)
    scale = prompts64.clip.logit_scale.double()
    for i, x in enumerate(features):
        score = [
            sum(sorted((float(x[a] @ x[b]) for b in range(9) if b != a), reverse=True)[:3]) / 3
            for a in range(9)
        ]
        weight = (torch.tensor(score, dtype=torch.float64) / 0.01).softmax(0)
        text = prompts64.text_features(tuned.ctx[i])
        torch.testing.assert_close(out.logits[i], weight @ (scale * x @ text.T), atol=1e-7, rtol=0)


@pytest.mark.parametrize("dispersion", [0.0, 20.0])
def test_ctpt_by_autograd_through_the_paper_path(prompts64, dispersion):
    features = views_of(prompts64, 2, 20, seed=9).double()
    out = methods.get("ctpt")(features, prompts64, lr=0.02, dispersion=dispersion)
    scale = prompts64.clip.logit_scale.double()
    for i, x in enumerate(features):
        ctx = prompts64.ctx.double().clone().requires_grad_(True)
        text = prompts64.text_features(ctx, exact="paper")
        spread = (text - text.mean(0)).norm(dim=-1).mean()
        loss = marginal_entropy(scale * x @ text.T, 0.1) - dispersion * spread
        step = torch.optim.AdamW([ctx], lr=0.02)
        loss.backward()
        step.step()
        torch.testing.assert_close(out.ctx[i], ctx.detach(), atol=1e-7, rtol=0)
        assert out.loss[i].item() == pytest.approx(loss.item(), abs=1e-8)
    if not dispersion:
        tpt = methods.get("tpt")(features, prompts64, lr=0.02)
        torch.testing.assert_close(out.logits, tpt.logits, atol=1e-6, rtol=0)


def test_ctpt_keeps_the_text_features_further_apart(prompts64):
    features = views_of(prompts64, 3, 20, seed=10).double()

    def spread(dispersion):
        ctx = methods.get("ctpt")(features, prompts64, lr=0.02, dispersion=dispersion).ctx
        text = prompts64.text_features(ctx)
        return (text - text.mean(1, keepdim=True)).norm(dim=-1).mean()

    assert spread(50.0) > spread(0.0)
