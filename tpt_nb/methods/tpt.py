"""TPT: test-time prompt tuning."""

from pathlib import Path

import torch
from torch import Tensor

from tpt_nb.losses import Loss, get_loss
from tpt_nb.methods.method import Adapted, _amp, _as_mask, _back, _weight
from tpt_nb.methods.tuning import (
    EXACT,
    OPTIMIZERS,
    _check_tpt,
    _first_step,
    _images_per_pass,
    _Start,
    _with_selection,
    _worth_a_jacobian,
)
from tpt_nb.models import Prompts


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
    n_images: int | None = None,
    cache: str | Path | None = None,
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
        exact: "fast"; "paper" for 77 tokens, one image at a time and plain autograd; "tangent" for
            an approximation: text features of first order around the initial context.
        batch: images per pass of the fast path; None chooses by memory. It changes no result
            beyond rounding.
        n_images: how many images there are in all, if this is one of several calls; None: these.
            The more, the sooner the Jacobian is worth its price. No result depends on it beyond
            rounding.
        cache: folder in which a Jacobian is kept, so that the next run need not make it again.
    Returns:
        ``loss`` is the value at the initial prompt.
    Raises:
        ValueError: unknown names, parameters out of range, prompts without a context; "tangent"
            with prompts that have no Jacobian (see ``Prompts.jacobian``).
    """
    loss_fn = _with_selection(get_loss(loss) if isinstance(loss, str) else loss)
    _check_tpt(features, prompts, rho, lr, steps, optimizer, batch)
    if exact not in EXACT:
        raise ValueError(f"exact is {exact!r}; allowed: {', '.join(EXACT)}.")
    if exact == "paper":
        chunks = [_tpt_paper(one, prompts, loss_fn, rho, lr, steps, optimizer) for one in features]
    else:
        by_matrix = exact == "tangent" or _worth_a_jacobian(prompts, n_images or len(features))
        start = _Start(prompts, by_matrix, cache)
        text_of = start.tangent if exact == "tangent" else prompts.text_features
        size = batch or _images_per_pass(prompts, steps)
        # a product with the matrix reads all of it: for more images than fit the pass behind it
        group = max(size, 32) if by_matrix and steps == 1 and batch is None else size
        chunks = [
            _tpt_fast(chunk, prompts, start, text_of, loss_fn, rho, lr, steps, optimizer, size)
            for chunk in features.split(group)
        ]
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
    features, prompts, start, text_of, loss_fn, rho, lr, steps, optimizer, size
) -> tuple[Tensor, ...]:
    """A chunk of images ``[b,V,D]``, ``size`` at a time through the text tower."""
    x = features.to(_weight(prompts))
    scale = prompts.clip.logit_scale.to(x)
    logits = (scale * x @ start.text.T).requires_grad_(True)
    chosen = torch.vmap(lambda z: loss_fn.select(z, rho))(logits.detach())
    each = torch.vmap(lambda z, i: loss_fn(z, rho, i))
    first = each(logits, chosen)
    (g_logits,) = torch.autograd.grad(first.sum(), logits)
    g_ctx = start.pull_back(g_logits, logits.detach(), x, scale)
    if steps == 1:
        ctx = _first_step(start.ctx.detach(), g_ctx, lr, optimizer)
    else:
        ctx = start.ctx.detach().expand_as(g_ctx).clone().requires_grad_(True)
        step = OPTIMIZERS[optimizer]([ctx], lr=lr)
        ctx.grad = g_ctx
        step.step()
        for _ in range(steps - 1):
            step.zero_grad()
            later = scale * x @ text_of(ctx).transpose(1, 2)
            each(later, chosen).sum().backward()
            step.step()
    after = []
    for some, view in zip(ctx.split(size), x[:, 0, :, None].split(size), strict=True):
        with torch.no_grad(), torch.autocast("cuda", torch.float16, enabled=_amp(x)):
            tuned = text_of(some)
        after.append(scale * (tuned.to(x.dtype) @ view)[..., 0])
    after = torch.cat(after)
    parts = (after, logits[:, 0].detach(), first.detach(), _as_mask(chosen, features), ctx.detach())
    return _back(features, *parts)
