"""The strong baselines, episodic: every image starts from the same state and leaves none behind.

``method(features [B,V,D], prompts, **params) -> Adapted``, like those in ``adapt``, into whose
``METHODS`` they are entered at the end of this file. View 0 is the un-augmented image; whatever the
method, all see the same views. Where published code has a defect there are two versions: the one
that does what the code does, and the repaired one; their docstrings say what differs.

==============  ==========  =======================================================  ==============
method          tunes       predicts with                                            paper
==============  ==========  =======================================================  ==============
vote            nothing     votes of the confident views
zero            nothing     the same; ties go to the next confident view             ZERO, 2024
zero_fp16       nothing     softmax at the temperature that half precision leaves    ZERO's code
mta             nothing     the mode of the views' features                          MTA, 2024
tps             a shift of  view 0 under the shifted text features                   TPS, 2024
                the text
                features
tpt_confident   context     mean of the confident views under the tuned prompt       (student work)
rtpt            context     all views, weighted by how alike they are to others      R-TPT, 2025
ctpt            context     view 0; the loss keeps the text features apart           C-TPT, 2024
contrast_vote   nothing     votes of all views, against what all of them say         (ours)
==============  ==========  =======================================================  ==============

Tuning the image encoder is not here but in ``encoder_tuning``: it needs pixels and a pass of the
encoder per image and step, and these methods start from features.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from tpt_nb.adapt import (
    METHODS,
    Adapted,
    _as_mask,
    _back,
    _check_features,
    _check_tpt,
    _first_step,
    _images_per_pass,
    _initial_logits,
    _Start,
    _weight,
    _with_selection,
    _worth_a_jacobian,
)
from tpt_nb.losses import (
    Loss,
    entropy,
    get_loss,
    log_mean_prob,
    marginal_entropy,
    select_confident,
)
from tpt_nb.prompts import Prompts, TemplatePrompts

TIE = 1e-3  # weight of the mean probability beside whole votes: it decides between equal counts


# --- votes ---------------------------------------------------------------------------------------


@torch.no_grad()
def vote(features: Tensor, prompts: Prompts | TemplatePrompts, rho: float = 0.1) -> Adapted:
    """The class that most of the confident views predict; ties go to the more probable class.

    ``logits`` are the logarithms of the shares of the votes (a class without votes keeps a trace of
    its mean probability), so that their softmax is the share and not a certainty; ``loss`` is the
    entropy of that.
    """
    logits = _initial_logits(features, prompts)
    chosen = select_confident(logits, rho)
    counts, mean = _votes(logits, chosen)
    return _voted(features, logits, chosen, counts, mean)


@torch.no_grad()
def zero(features: Tensor, prompts: Prompts | TemplatePrompts, rho: float = 0.3) -> Adapted:
    """ZERO with exact votes: Farina et al., "Frustratingly Easy Test-Time Adaptation", 2024.

    The limit that the paper describes, temperature to 0: every confident view casts one vote. Equal
    counts: the remaining views are asked in order of their confidence, and the first that predicts
    one of the tied classes decides; if none does, the more probable class. (The published code
    asks them in the order in which they were made, see :func:`zero_fp16`.)
    """
    logits = _initial_logits(features, prompts)
    order = entropy(logits).argsort(dim=-1, stable=True)
    k = select_confident(logits, rho).shape[-1]
    chosen, rest = order[:, :k], order[:, k:]
    counts, mean = _votes(logits, chosen)
    tied = counts == counts.amax(-1, keepdim=True)
    winner = _first_among(_take(logits, rest).argmax(-1), tied)
    undecided = (tied.sum(-1) > 1) & (winner >= 0)
    counts += F.one_hot(winner.clamp_min(0), counts.shape[-1]) * undecided[:, None]
    return _voted(features, logits, chosen, counts, mean)


@torch.no_grad()
def zero_fp16(features: Tensor, prompts: Prompts | TemplatePrompts, rho: float = 0.3) -> Adapted:
    """ZERO as its code runs: in half precision, where "temperature 0" is not 0.

    The code divides cosines by the smallest step of their type. Under mixed precision that is
    2^-10, about ten times CLIP's inverse scale: a sharpened mean, no vote. Cosines are rounded to
    half precision, from features in half precision, as a GPU does it. Exactly equal sums: the
    views ``k, k+1, ...`` in the order in which they were made (confident or not) are asked; if
    none predicts a tied class, the code masks the wrong classes (``~i`` of a number is ``-1-i``)
    and takes the best of the others in view k. All of that is kept here.

    ``logits`` are the log of the mean of the sharpened predictions.
    """
    logits = _initial_logits(features, prompts)
    x, text = features.to(_weight(prompts)), prompts.text_features()
    cosines = (x.half().float() @ text.half().float().T).half()
    scaled = (cosines * prompts.clip.logit_scale.to(cosines.device)).half().float()
    chosen = select_confident(scaled, rho)
    k, c = chosen.shape[-1], logits.shape[-1]
    sharp = (cosines.float() / torch.finfo(torch.float16).eps).softmax(-1)
    mean = _take(sharp, chosen).mean(1)
    tied = mean == mean.amax(-1, keepdim=True)
    several = tied.sum(-1) > 1
    rest = cosines[:, k:]
    if rest.shape[1] and several.any():
        winner = _first_among(rest.argmax(-1), tied)
        wrong = rest[:, 0].float().masked_fill(tied.flip(-1), -torch.inf)  # ~i counts from the end
        winner = torch.where(winner < 0, wrong.argmax(-1), winner)
        mean = mean + F.one_hot(winner, c) * several[:, None]
    out = (mean / mean.sum(-1, keepdim=True)).clamp_min(torch.finfo(mean.dtype).tiny).log()
    mask = _as_mask(chosen, features)
    return Adapted(*_back(features, out, logits[:, 0], entropy(out), mask))


@torch.no_grad()
def contrast_vote(
    features: Tensor,
    prompts: Prompts | TemplatePrompts,
    contrast: float = 0.4,
    temperature: float = 2.0,
    image: float = 2.0,
) -> Adapted:
    """Our own: every view votes, against what all views say, and the whole image votes too.

    1. *Contrast.* What every crop of an image says, whatever it shows, tells of its background,
       its style and the classes that the model likes anyway, not of the object. So a share
       ``contrast`` of the mean of the views' logits is taken off each view's.
    2. *Certainty as weight.* A view votes for class c with p_c times p_c: with its prediction, as
       much as it is sure of it. No view is selected, so nothing hangs on how many; the
       ``temperature`` softens predictions that are surer than they should be.
    3. *The whole image.* Crops are enlarged parts: where they mislead (noise, lines, a style that
       is made of its whole), the image is the safer witness. It has ``image`` votes beside those of
       the views, by the same rule, without the contrast.

    ``score = sum_i softmax((z_i - contrast mean_j z_j) / T)^2 + image softmax(z_0 / T)^2``, class
    by class; ``logits`` are the logarithms of the scores, normalised to sum to 1. One softmax over
    the views, no sorting, no gradient. Its three numbers were chosen on ``iconshift-v2``,
    ``iconshift-dev`` and damaged copies of V2; see notebook 10.
    """
    if not temperature > 0 or image < 0:
        raise ValueError(f"temperature must be > 0 and image >= 0; got {temperature} and {image}.")
    _check_features(features, prompts)
    x, text = features.to(_weight(prompts)), prompts.text_features()
    scale = prompts.clip.logit_scale.to(x)
    # logits are linear in the features, so the contrast is taken there, where it is cheaper
    against = x - contrast * x.mean(1, keepdim=True)
    score = (scale / temperature * against @ text.T).softmax(-1).square_().sum(1)
    before = scale * x[:, 0] @ text.T
    score += image * (before / temperature).softmax(-1).square_()
    out = (score / score.sum(-1, keepdim=True)).clamp_min(torch.finfo(score.dtype).tiny).log()
    mask = torch.ones(x.shape[:2], dtype=torch.bool)
    return Adapted(*_back(features, out, before, entropy(out), mask))


# --- the mode of the views -----------------------------------------------------------------------


@torch.no_grad()
def mta(
    features: Tensor,
    prompts: Prompts | TemplatePrompts,
    lambda_q: float = 4.0,
    lambda_y: float = 0.2,
    iterations: int = 5,
) -> Adapted:
    """MTA: Zanella and Ben Ayed, "On the Test-Time Zero-Shot Generalization of VLMs", 2024.

    A robust mean shift over the views' features: the mode m and the inlierness y of the views are
    found in turns. K_i = exp(-|f_i - m|^2 / 2h_i^2), with h_i^2 half the mean squared distance of
    view i to its nearest 30 % of the others; W = P P^T, how alike the views' predictions are;
    y = softmax((K + lambda_q W y) / lambda_y); m = the mean of the f_i with weights y_i K_i,
    normalised. Starts at view 0 and uniform y. Each of the two is repeated until it moves by less
    than 1e-6, at most five times, as in the published code.

    ``loss`` is the entropy of the prediction at the mode; every view is used.
    """
    logits = _initial_logits(features, prompts)
    x = features.to(logits)  # [B,V,D]
    b, v = x.shape[:2]
    squared = torch.cdist(x, x).square()
    near = max(1, int(0.3 * (v - 1)))
    width = 0.5 * squared.sort(-1).values[..., 1 : near + 1].mean(-1) if v > 1 else x.new_ones(b, 1)
    width = width.clamp_min(torch.finfo(x.dtype).tiny)  # of views that are all the same
    probs = logits.softmax(-1)
    affinity = probs @ probs.transpose(1, 2)

    def log_kernel(mode: Tensor) -> Tensor:
        return -(x - mode[:, None]).square().sum(-1) / (2 * width)

    def mean_shift(mode: Tensor, y: Tensor) -> Tensor:
        weights = (y.log() + log_kernel(mode)).softmax(-1)  # in logs: far views underflow
        return F.normalize((weights[:, None] @ x)[:, 0], dim=-1)

    y, mode = x.new_full((b, v), 1 / v), x[:, 0]
    for _ in range(iterations):
        density = log_kernel(mode).exp()
        y = _settle(
            y,
            lambda y, d=density: (
                (d + lambda_q * (affinity @ y[..., None])[..., 0]) / lambda_y
            ).softmax(-1),
        )
        mode = _settle(mode, lambda m, y=y: mean_shift(m, y))
    out = prompts.clip.logit_scale.to(x) * mode @ prompts.text_features().T
    mask = torch.ones(b, v, dtype=torch.bool)
    return Adapted(*_back(features, out, logits[:, 0], entropy(out), mask))


def _settle(value: Tensor, update, times: int = 5, small: float = 1e-6) -> Tensor:
    """``update`` repeated, for each image until it moves by less than ``small``; ``[B,...]``."""
    moving = torch.ones(len(value), 1, dtype=torch.bool, device=value.device)
    for _ in range(times):
        new = torch.where(moving, update(value), value)
        moving = moving & ((new - value).norm(dim=-1, keepdim=True) >= small)
        value = new
        if not moving.any():
            break
    return value


# --- tuning --------------------------------------------------------------------------------------


def tps(
    features: Tensor,
    prompts: Prompts | TemplatePrompts,
    rho: float = 0.1,
    shift: float = 5e-3,
    steps: int = 1,
) -> Adapted:
    """TPS: Sui et al., "Just Shift It: Test-Time Prototype Shifting for Zero-Shot Generalization
    with Vision-Language Models", 2024.

    TPT without the text encoder: what is tuned is a shift of each class's text feature, from 0, by
    AdamW steps of size ``shift`` (per coordinate; the paper's learning rate) on the marginal
    entropy of the confident views. View 0 is classified with the shifted, re-normalised features.
    The prototypes may come from a template ensemble, as in the paper.
    """
    if not shift > 0 or steps < 1:
        raise ValueError(f"shift must be > 0 and steps at least 1; got {shift} and {steps}.")
    logits = _initial_logits(features, prompts)
    x, text = features.to(logits), prompts.text_features().detach()
    scale = prompts.clip.logit_scale.to(x)
    chosen = select_confident(logits, rho)
    kept = _take(x, chosen)  # [B,k,D]
    outs, losses_ = [], []
    size = max(1, 2**24 // text.numel())
    for part, view0 in zip(kept.split(size), x[:, 0].split(size), strict=True):
        delta = text.new_zeros(len(part), *text.shape).requires_grad_(True)
        step = torch.optim.AdamW([delta], lr=shift)
        for i in range(steps):
            moved = F.normalize(text + delta, dim=-1)
            each = torch.vmap(lambda z: marginal_entropy(z, 1.0))
            loss = each(scale * part @ moved.transpose(1, 2))
            (delta.grad,) = torch.autograd.grad(loss.sum(), delta)
            step.step()
            if i == 0:
                losses_.append(loss.detach())
        with torch.no_grad():
            moved = F.normalize(text + delta, dim=-1)
            outs.append(scale * torch.einsum("bd,bcd->bc", view0, moved))
    parts = (torch.cat(outs), logits[:, 0], torch.cat(losses_), _as_mask(chosen, features))
    return Adapted(*_back(features, *parts))


def tpt_confident(
    features: Tensor,
    prompts: Prompts,
    loss: str | Loss = "marginal_entropy",
    rho: float = 0.1,
    lr: float = 5e-3,
    n_images: int | None = None,
) -> Adapted:
    """TPT, but the prediction is the mean of the confident views under the tuned prompt.

    What several course projects call TPT. One step; ``logits`` are log mean probabilities.
    """

    def predict(x: Tensor, text: Tensor, chosen: Tensor) -> Tensor:
        kept = _take(x, chosen) @ text.transpose(1, 2)
        return torch.vmap(log_mean_prob)(prompts.clip.logit_scale.to(x) * kept)

    return _one_step(features, prompts, loss, rho, lr, predict, n_images=n_images)


def rtpt(
    features: Tensor,
    prompts: Prompts,
    rho: float = 0.1,
    lr: float = 5e-3,
    neighbours: int = 20,
    temperature: float = 0.01,
    n_images: int | None = None,
) -> Adapted:
    """R-TPT: Sheng et al., "R-TPT: Improving Adversarial Robustness of Vision-Language Models
    through Test-Time Prompt Tuning", 2025.

    One step on the mean of the confident views' entropies, each by itself (agreement is not asked
    for); then the mean of the logits of *all* views under the tuned prompt, weighted by how
    reliable they are: softmax over views of the mean cosine to the ``neighbours`` most similar
    other views, divided by ``temperature``. (The published code leaves out cosines >= 1 to leave
    out the view itself; whether it does then hangs on rounding. Here it goes by its place.)
    """

    def predict(x: Tensor, text: Tensor, chosen: Tensor) -> Tensor:
        v = x.shape[1]
        cosines = x @ x.transpose(1, 2)
        if v > 1:
            itself = torch.eye(v, dtype=torch.bool, device=x.device)
            nearest = cosines.masked_fill(itself, -torch.inf).topk(min(neighbours, v - 1))
            near = nearest.values.mean(-1)
        else:
            near = cosines[..., 0]
        mixed = ((near / temperature).softmax(-1)[:, None] @ x)[:, 0]  # logits are linear in x
        return prompts.clip.logit_scale.to(x) * (text @ mixed[..., None])[..., 0]

    return _one_step(features, prompts, "mean_entropy", rho, lr, predict, n_images=n_images)


def ctpt(
    features: Tensor,
    prompts: Prompts,
    rho: float = 0.1,
    lr: float = 5e-3,
    dispersion: float = 20.0,
    n_images: int | None = None,
) -> Adapted:
    """C-TPT: Yoon et al., "C-TPT: Calibrated Test-Time Prompt Tuning for Vision-Language Models
    via Text Feature Dispersion", 2024.

    One step on TPT's loss minus ``dispersion`` times the mean distance of the text features from
    their centroid: text features that stay apart keep the confidence honest. The paper takes 20 on
    the natural shifts, 50 on the fine-grained sets. View 0 under the tuned prompt.

    ``loss`` is the whole of it, at the initial prompt.
    """

    def spread(text: Tensor) -> Tensor:
        return -dispersion * (text - text.mean(0)).norm(dim=-1).mean()

    def predict(x: Tensor, text: Tensor, chosen: Tensor) -> Tensor:
        return prompts.clip.logit_scale.to(x) * (text @ x[:, 0, :, None])[..., 0]

    return _one_step(
        features, prompts, "marginal_entropy", rho, lr, predict, of_text=spread, n_images=n_images
    )


def _one_step(
    features: Tensor,
    prompts: Prompts,
    loss: str | Loss,
    rho: float,
    lr: float,
    predict: Callable[[Tensor, Tensor, Tensor], Tensor],
    of_text: Callable[[Tensor], Tensor] | None = None,
    n_images: int | None = None,
) -> Adapted:
    """TPT's first step, with another prediction: the text tower runs once per image.

    Args:
        loss: of the logits of an image's views, as in :func:`tpt`.
        predict: views [b,V,D], text features of each image's tuned context [b,C,D] and the chosen
            views [b,k] to logits [b,C].
        of_text: a second term of the loss, of the text features [C,D] alone: the same for all
            images.
    """
    _check_tpt(features, prompts, rho, lr, 1, "adamw", None)
    loss_fn = _with_selection(get_loss(loss) if isinstance(loss, str) else loss)
    start = _Start(prompts, _worth_a_jacobian(prompts, n_images or len(features)))
    weight = _weight(prompts)
    scale = prompts.clip.logit_scale.to(weight)
    extra, g_extra = torch.zeros_like(scale), 0.0
    if of_text:
        leaf = prompts.ctx.to(weight).clone().requires_grad_(True)
        extra = of_text(prompts.text_features(leaf))
        (g_extra,) = torch.autograd.grad(extra, leaf)
    outs: list[tuple[Tensor, ...]] = []
    for x in features.to(weight).split(_images_per_pass(prompts, 1)):
        logits = (scale * x @ start.text.T).requires_grad_(True)
        chosen = torch.vmap(lambda z: loss_fn.select(z, rho))(logits.detach())
        each = torch.vmap(lambda z, i: loss_fn(z, rho, i))(logits, chosen)
        (g_logits,) = torch.autograd.grad(each.sum(), logits)
        g_ctx = start.pull_back(g_logits, logits.detach(), x, scale) + g_extra
        ctx = _first_step(start.ctx.detach(), g_ctx, lr, "adamw").detach()
        with torch.no_grad():
            after = predict(x, prompts.text_features(ctx).to(x.dtype), chosen)
        value = (each + extra).detach()
        outs.append((after, logits[:, 0].detach(), value, _as_mask(chosen, x), ctx))
    return Adapted(*_back(features, *(torch.cat(t) for t in zip(*outs, strict=True))))


# --- helpers -------------------------------------------------------------------------------------


def _take(values: Tensor, chosen: Tensor) -> Tensor:
    """Rows of views: ``[B,V,C]``, ``[B,k]`` -> ``[B,k,C]``."""
    return values.gather(1, chosen[..., None].expand(-1, -1, values.shape[-1]))


def _votes(logits: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
    """Votes and mean probabilities of the chosen views, both ``[B,C]``."""
    kept = _take(logits, chosen)
    counts = F.one_hot(kept.argmax(-1), logits.shape[-1]).sum(1).to(logits)
    return counts, kept.softmax(-1).mean(1)


def _voted(features, logits, chosen, counts, mean) -> Adapted:
    score = counts + TIE * mean
    out = score / score.sum(-1, keepdim=True)
    out = out.clamp_min(torch.finfo(out.dtype).tiny).log()
    mask = _as_mask(chosen, features)
    return Adapted(*_back(features, out, logits[:, 0], entropy(out), mask))


def _first_among(predictions: Tensor, allowed: Tensor) -> Tensor:
    """The first of each row's predictions ``[B,n]`` that is allowed ``[B,C]``, or -1: ``[B]``."""
    if not predictions.shape[1]:
        return predictions.new_full((len(predictions),), -1)
    hit = allowed.gather(1, predictions)
    first = predictions.gather(1, hit.int().argmax(1, keepdim=True))[:, 0]
    return torch.where(hit.any(1), first, -1)


METHODS |= {
    "vote": vote,
    "zero": zero,
    "zero_fp16": zero_fp16,
    "mta": mta,
    "tps": tps,
    "tpt_confident": tpt_confident,
    "rtpt": rtpt,
    "ctpt": ctpt,
    "contrast_vote": contrast_vote,
}
