"""The methods: features of the views of images, and prompts, to logits. One signature, batched.

``method(features [B,V,D], prompts, **params) -> Adapted``. View 0 is the un-augmented image.

Test-time prompt tuning (Shu et al., "Test-Time Prompt Tuning for Zero-Shot Generalization in
Vision-Language Models", 2022) takes one optimiser step on the context per image and starts from
the same context for every image. The *paper* path does that literally. The *fast* path gives the
same result for many images at once: the text features of the initial context are computed once,
the gradient of each image at that point is a vector-Jacobian product through that one graph, and
each image's own context goes through the text tower in a batch. AdamW works on each number by
itself, so one optimiser over ``[B,M,d]`` equals B fresh optimisers over ``[M,d]``.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tpt_nb.clip import text_tower
from tpt_nb.losses import (
    Loss,
    check_rho,
    entropy,
    get_loss,
    log_mean_prob,
    marginal_entropy,
    select_confident,
)
from tpt_nb.prompts import Prompts, TemplatePrompts

OPTIMIZERS = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}


@dataclass
class Adapted:
    """What a method did to B images; on the device of the features.

    Attributes:
        logits: ``[B,C]`` after adaptation; their argmax is the prediction.
        logits_before: ``[B,C]`` of view 0 under the initial prompt.
        loss: ``[B]`` at the initial prompt (see each method).
        selected: ``[B,V]`` bool, the views that the method used.
        ctx: ``[B,M,d]`` tuned contexts, or None if none was tuned.
    """

    logits: Tensor
    logits_before: Tensor
    loss: Tensor
    selected: Tensor
    ctx: Tensor | None = None


@torch.no_grad()
def zero_shot(features: Tensor, prompts: Prompts | TemplatePrompts) -> Adapted:
    """View 0 under the initial prompt; ``loss`` is the entropy of that prediction."""
    logits = _initial_logits(features[:, :1], prompts)[:, 0].to(features.device)
    selected = torch.zeros(features.shape[:2], dtype=torch.bool, device=features.device)
    selected[:, 0] = True
    return Adapted(logits, logits, entropy(logits), selected)


@torch.no_grad()
def confident_view(
    features: Tensor, prompts: Prompts | TemplatePrompts, rho: float = 0.1
) -> Adapted:
    """Mean prediction of the most confident views, without tuning.

    ``logits`` are log mean probabilities, ``loss`` is their entropy: the marginal entropy.
    """
    logits = _initial_logits(features, prompts)
    chosen = torch.vmap(lambda z: select_confident(z, rho))(logits)
    mean = torch.vmap(lambda z, i: log_mean_prob(z[i]))(logits, chosen)
    loss = torch.vmap(lambda z, i: marginal_entropy(z, rho, i))(logits, chosen)
    return Adapted(*_back(features, mean, logits[:, 0], loss, _as_mask(chosen, features)))


def tpt(
    features: Tensor,
    prompts: Prompts,
    loss: str | Loss = "marginal_entropy",
    rho: float = 0.1,
    lr: float = 5e-3,
    steps: int = 1,
    optimizer: str = "adamw",
    exact: str = "fast",
    batch: int | None = None,
) -> Adapted:
    """Test-time prompt tuning: for each image, ``steps`` on its own copy of the context.

    The prediction is that of view 0 under the tuned prompt. The confident views are selected once,
    under the initial prompt, and kept for all steps.

    Args:
        features: ``[B,V,D]`` unit norm, view 0 first.
        prompts: with the initial context; a template ensemble has none.
        loss: a name in ``losses.LOSSES`` or a function with their signature.
        rho: selection ratio in (0,1].
        lr: learning rate; the first AdamW step is ``-lr * sign(gradient)`` in all but rounding.
        optimizer: "adamw" (weight decay 0.01) or "sgd" (none), fresh for every image.
        exact: "fast", or "paper" for 77 tokens, one image at a time and plain autograd.
        batch: images per pass of the fast path; None chooses by memory. It changes no result
            beyond rounding.
    Returns:
        ``loss`` is the value at the initial prompt.
    Raises:
        ValueError: unknown names, parameters out of range, prompts without a context.
    """
    loss_fn = _with_selection(get_loss(loss) if isinstance(loss, str) else loss)
    _check_tpt(features, prompts, rho, lr, steps, optimizer, batch)
    if exact == "paper":
        chunks = [_tpt_paper(one, prompts, loss_fn, rho, lr, steps, optimizer) for one in features]
    elif exact == "fast":
        initial = prompts.ctx.to(_weight(prompts)).clone().requires_grad_(True)
        text = prompts.text_features(initial)
        size = batch or _images_per_pass(prompts, steps)
        chunks = [
            _tpt_fast(chunk, prompts, initial, text, loss_fn, rho, lr, steps, optimizer)
            for chunk in features.split(size)
        ]
    else:
        raise ValueError(f"exact is {exact!r}; allowed: fast, paper.")
    return Adapted(*(torch.cat(parts) for parts in zip(*chunks, strict=True)))


def _tpt_paper(views, prompts, loss_fn, rho, lr, steps, optimizer) -> tuple[Tensor, ...]:
    """One image as the paper's code treats it; ``views`` is ``[V,D]``."""
    x = views.to(_weight(prompts))
    scale = prompts.clip.logit_scale.to(x)
    ctx = prompts.ctx.to(x).clone().requires_grad_(True)  # reset for every image
    step = OPTIMIZERS[optimizer]([ctx], lr=lr)
    for i in range(steps):
        logits = scale * x @ prompts.text_features(ctx, exact="paper").T
        if i == 0:
            before, chosen = logits[0].detach(), loss_fn.select(logits, rho)
        value = loss_fn(logits, rho, chosen)
        if i == 0:
            first = value.detach()
        step.zero_grad()
        value.backward()
        step.step()
    with torch.no_grad():
        after = scale * x[0] @ prompts.text_features(ctx, exact="paper").T
    mask = _as_mask(chosen[None], views[None])
    parts = (after[None], before[None], first[None], mask, ctx.detach()[None])
    return _back(views, *parts)


def _tpt_fast(
    features, prompts, initial, text, loss_fn, rho, lr, steps, optimizer
) -> tuple[Tensor, ...]:
    """A chunk of images ``[b,V,D]``; ``text`` hangs on ``initial`` and is shared by all chunks."""
    x = features.to(_weight(prompts))
    scale = prompts.clip.logit_scale.to(x)
    logits = (scale * x @ text.detach().T).requires_grad_(True)
    chosen = torch.vmap(lambda z: loss_fn.select(z, rho))(logits.detach())
    each = torch.vmap(lambda z, i: loss_fn(z, rho, i))
    first = each(logits, chosen)
    (g_logits,) = torch.autograd.grad(first.sum(), logits)
    g_text = scale * g_logits.transpose(1, 2) @ x  # [b,C,D]
    (g_ctx,) = torch.autograd.grad(text, initial, g_text, is_grads_batched=True, retain_graph=True)

    ctx = initial.detach().expand_as(g_ctx).clone().requires_grad_(True)
    step = OPTIMIZERS[optimizer]([ctx], lr=lr)
    ctx.grad = g_ctx
    step.step()
    for _ in range(steps - 1):
        step.zero_grad()
        later = scale * x @ prompts.text_features(ctx).transpose(1, 2)
        each(later, chosen).sum().backward()
        step.step()
    with torch.no_grad(), torch.autocast("cuda", torch.float16, enabled=_amp(x)):
        tuned = prompts.text_features(ctx).to(x.dtype)
    after = scale * torch.einsum("bd,bcd->bc", x[:, 0], tuned)
    parts = (after, logits[:, 0].detach(), first.detach(), _as_mask(chosen, features), ctx.detach())
    return _back(features, *parts)


# --- helpers -------------------------------------------------------------------------------------


def _initial_logits(features: Tensor, prompts: Prompts | TemplatePrompts) -> Tensor:
    """``[B,V,D] -> [B,V,C]`` under the initial prompt, on the model's device."""
    _check_features(features, prompts)
    x = features.to(_weight(prompts))
    with torch.no_grad():
        return prompts.clip.logit_scale.to(x) * x @ prompts.text_features().T


def _weight(prompts: Prompts | TemplatePrompts) -> Tensor:
    """A tensor of the dtype and on the device in which the text tower computes."""
    return text_tower(prompts.clip.model).token_embedding.weight


def _amp(x: Tensor) -> bool:
    """Mixed precision for the tuned text features: on a GPU, as the paper's code does.

    The gradient stays in float32: it is computed once per image at little cost, and the sign step
    would turn its rounding noise into steps.
    """
    return x.is_cuda and x.dtype == torch.float32


def _as_mask(chosen: Tensor, features: Tensor) -> Tensor:
    """Indices ``[B,k]`` -> bool ``[B,V]``."""
    mask = torch.zeros(features.shape[:2], dtype=torch.bool, device=chosen.device)
    return mask.scatter(1, chosen, True)


def _back(features: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.to(features.device) for t in tensors)


def _with_selection(loss: Loss) -> Loss:
    """``loss(logits, rho, selected)`` with ``.select(logits, rho) -> indices``.

    A loss that selects by another rule carries it as its attribute ``select``; a function of
    ``(logits, rho)`` alone selects for itself in every step.
    """
    takes_selection = "selected" in inspect.signature(loss).parameters

    def call(logits: Tensor, rho: float, selected: Tensor) -> Tensor:
        return loss(logits, rho, selected=selected) if takes_selection else loss(logits, rho)

    call.select = getattr(loss, "select", select_confident)
    return call


def _images_per_pass(prompts: Prompts, steps: int) -> int:
    """So many images that the widest activation stays small: in the cache of a CPU, or in 1 GB."""
    weight = _weight(prompts)
    tokens = sum(len(name) + len(rest) + 1 for name, rest in prompts.tokens)
    if prompts.class_specific or prompts.class_token_position != "end":
        tokens += prompts.C * prompts.M
    widest = tokens * 4 * weight.shape[1] * weight.element_size()
    budget = 2**30 if weight.is_cuda else 2**24
    if steps > 1 and weight.is_cuda:  # the whole graph is kept
        budget //= len(text_tower(prompts.clip.model).transformer.resblocks)
    return max(1, budget // widest)


def _check_features(features: Tensor, prompts: Prompts | TemplatePrompts) -> None:
    d = prompts.clip.embed_dim
    if features.ndim != 3 or features.shape[-1] != d or 0 in features.shape:
        raise ValueError(
            f"features have shape {list(features.shape)}; expected [B,V,{d}] with B, V > 0: the "
            f"views of each image, encoded with the same model ({prompts.clip.name})."
        )


def _check_tpt(features, prompts, rho, lr, steps, optimizer, batch) -> None:
    _check_features(features, prompts)
    if prompts.ctx is None:
        raise ValueError("TPT tunes a context and a template ensemble has none; use Prompts.")
    if optimizer not in OPTIMIZERS:
        raise ValueError(f"unknown optimizer {optimizer!r}; known: {', '.join(OPTIMIZERS)}.")
    check_rho(rho)
    if not lr > 0 or steps < 1 or (batch is not None and batch < 1):
        raise ValueError(
            f"lr must be > 0, steps and batch at least 1; got lr={lr}, steps={steps}, "
            f"batch={batch}."
        )


METHODS: dict[str, Callable[..., Adapted]] = {
    "zero_shot": zero_shot,
    "confident_view": confident_view,
    "tpt": tpt,
}

# methods in modules of their own enter themselves
import tpt_nb.captions  # noqa: E402
import tpt_nb.methods  # noqa: E402
import tpt_nb.online  # noqa: E402
import tpt_nb.retrieval  # noqa: E402, F401
