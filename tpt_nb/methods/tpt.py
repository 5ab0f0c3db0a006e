"""TPT: test-time prompt tuning."""

from dataclasses import dataclass

import torch
from torch import Tensor

from tpt_nb.methods.method import Adapted, Method, as_mask, at_least, back, option, weight_of
from tpt_nb.methods.tuning import (
    OPTIMIZERS,
    LossOptions,
    Start,
    check_tuning,
    first_step,
    images_per_pass,
    images_per_product,
    loss_of,
    mixed_precision,
    prepare_loss,
    resolve,
    worth_a_jacobian,
)
from tpt_nb.models import Prompts

EXACT = ("fast", "paper", "tangent")


@dataclass(frozen=True)
class Options(LossOptions):
    steps: int = at_least(
        1, 1, "optimiser steps per image; TPT has 1", flat="tta_steps", shared=True
    )
    optimizer: str = option(
        "adamw",
        "adamw (weight decay 0.01) or sgd (none), fresh for each image",
        shared=True,
        choices=tuple(OPTIMIZERS),
    )
    exact: str = option(
        "fast",
        "fast; paper (77 tokens, image by image, plain autograd); tangent (approximates)",
        shared=True,
        choices=EXACT,
    )
    batch: int | None = at_least(1, None, "images per pass of the fast path; default: by memory")


def tpt(features: Tensor, prompts: Prompts, options: Options) -> Adapted:
    """Test-time prompt tuning: for each image, ``steps`` on its own copy of the context.

    Shu et al., "Test-Time Prompt Tuning for Zero-Shot Generalization in Vision-Language Models",
    2022. The prediction is that of view 0 under the tuned prompt. The confident views are selected
    once, under the initial prompt, and kept for all steps. The first AdamW step is
    ``-lr * sign(gradient)`` in all but rounding.

    Args:
        features: ``[B,V,D]`` unit norm, view 0 first.
        prompts: with the initial context; a template ensemble has none.
    Returns:
        ``loss`` is the value at the initial prompt.
    Raises:
        ValueError: prompts without a context; "tangent" with prompts that have no Jacobian (see
            ``Prompts.jacobian``).
    """
    loss_fn, lr = loss_of(options), check_tuning(features, prompts, options)
    rho, steps, optimizer, exact = options.rho, options.steps, options.optimizer, options.exact
    if exact == "paper":
        chunks = [_tpt_paper(one, prompts, loss_fn, rho, lr, steps, optimizer) for one in features]
    else:
        by_matrix = exact == "tangent" or worth_a_jacobian(prompts, len(features))
        start = Start(prompts, by_matrix)
        text_of = start.tangent if exact == "tangent" else prompts.text_features
        size = options.batch or images_per_pass(prompts, steps)
        group = size if steps > 1 or options.batch else images_per_product(size, start)
        chunks = [
            _tpt_fast(chunk, prompts, start, text_of, loss_fn, rho, lr, steps, optimizer, size)
            for chunk in features.split(group)
        ]
    return Adapted(*(torch.cat(parts) for parts in zip(*chunks, strict=True)))


def _tpt_paper(views, prompts, loss_fn, rho, lr, steps, optimizer) -> tuple[Tensor, ...]:
    """One image as the paper's code treats it; ``views`` is ``[V,D]``."""
    x = views.to(weight_of(prompts))
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
    mask = as_mask(chosen[None], views[None])
    parts = (after[None], before[None], first[None], mask, ctx.detach()[None])
    return back(views, *parts)


def _tpt_fast(
    features, prompts, start, text_of, loss_fn, rho, lr, steps, optimizer, size
) -> tuple[Tensor, ...]:
    """A chunk of images ``[b,V,D]``, ``size`` at a time through the text tower."""
    x = features.to(weight_of(prompts))
    scale = prompts.clip.logit_scale.to(x)
    logits = (scale * x @ start.text.T).requires_grad_(True)
    chosen = torch.vmap(lambda z: loss_fn.select(z, rho))(logits.detach())
    each = torch.vmap(lambda z, i: loss_fn(z, rho, i))
    first = each(logits, chosen)
    (g_logits,) = torch.autograd.grad(first.sum(), logits)
    g_ctx = start.pull_back(g_logits, logits.detach(), x, scale)
    if steps == 1:
        ctx = first_step(start.ctx.detach(), g_ctx, lr, optimizer)
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
        with torch.no_grad(), torch.autocast("cuda", torch.float16, enabled=mixed_precision(x)):
            tuned = text_of(some)
        after.append(scale * (tuned.to(x.dtype) @ view)[..., 0])
    after = torch.cat(after)
    parts = (after, logits[:, 0].detach(), first.detach(), as_mask(chosen, features), ctx.detach())
    return back(features, *parts)


METHOD = Method(
    tpt, Options, tunes="context", prepare=prepare_loss(tpt), resolve=resolve, paper="TPT, 2022"
)
