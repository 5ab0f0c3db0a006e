"""The methods: features of the views of images, and prompts, to logits. One signature, batched.

``method(features [B,V,D], prompts, **params) -> Adapted``. View 0 is the un-augmented image.

Test-time prompt tuning (Shu et al., "Test-Time Prompt Tuning for Zero-Shot Generalization in
Vision-Language Models", 2022) takes one optimiser step on the context per image and starts from
the same context for every image. The *paper* path does that literally. The *fast* path gives the
same result for many images at once: the text features of the initial context are computed once,
the gradient of each image at that point is a vector-Jacobian product with one Jacobian, a matrix
where there are enough images to pay for it and enough memory to hold it; the first AdamW step is
a formula; each image's own context goes through the text tower in a batch. The *tangent* path does
not even that: it takes the tuned text features from the same Jacobian, to first order. It is an
approximation.
"""

import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tpt_nb.clip import project_text, text_tower
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
EXACT = ("fast", "paper", "tangent")
WORTH = 1.5  # the Jacobian costs about as much as this many gradients per row, d rows per class


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


class _Start:
    """The text features of the initial context, and how to take gradients back to it.

    ``text`` is ``[C,D]``. By matrix: rows of the text tower, of width d, and the Jacobian
    ``[C*d,M*d]`` of these rows; gradients are one product with it. Else: the graph of one pass.
    """

    def __init__(self, prompts: Prompts, by_matrix: bool, cache: str | Path | None = None) -> None:
        self.ctx = prompts.ctx.to(_weight(prompts)).clone()
        self.tower = text_tower(prompts.clip.model)
        self.jacobian = prompts.jacobian(cache).flatten(0, 1) if by_matrix else None
        if by_matrix:
            self.rows, self.norm, self.text = prompts.once("start", lambda: self._at_start(prompts))
        else:
            self.ctx, self.graph = prompts.once("graph", lambda: self._with_graph(prompts))
            self.text = self.graph.detach()

    def _with_graph(self, prompts: Prompts) -> tuple[Tensor, Tensor]:
        """The context, and the text features with the graph that leads back to it."""
        with torch.enable_grad():
            ctx = self.ctx.requires_grad_(True)
            return ctx, prompts.text_features(ctx)

    @torch.no_grad()
    def _at_start(self, prompts: Prompts) -> tuple[Tensor, Tensor, Tensor]:
        """Rows ``[C,d]``, the length of their projections ``[C,1]``, text features ``[C,D]``."""
        rows = prompts.rows(self.ctx[None])[0]
        features = project_text(self.tower, rows)
        norm = features.norm(dim=-1, keepdim=True)
        return rows, norm, features / norm

    def pull_back(self, g_logits: Tensor, logits: Tensor, x: Tensor, scale: Tensor) -> Tensor:
        """Gradients in the logits ``[b,V,C]`` of views x ``[b,V,D]`` -> in the context ``[b,M,d]``.

        Logits are ``scale * x @ text.T``.
        """
        if self.jacobian is None:
            (out,) = torch.autograd.grad(
                self.graph,
                self.ctx,
                scale * g_logits.transpose(1, 2) @ x,
                is_grads_batched=True,
                retain_graph=True,
            )
            return out
        # Back through the projection and the normalisation: of the gradient g in a text feature t,
        # the part along t is lost, and g @ t is a sum over the logits.
        along = (g_logits * logits).sum(dim=1).unsqueeze(-1)  # [b,C,1]
        at_rows = scale * g_logits.transpose(1, 2) @ self._unproject(x)
        at_rows = (at_rows - along * self._unproject(self.text)) / self.norm  # [b,C,d]
        return (at_rows.flatten(1) @ self.jacobian).unflatten(1, self.ctx.shape)

    def _unproject(self, x: Tensor) -> Tensor:
        """The transpose of the text projection: ``[...,D] -> [...,d]``."""
        projection = self.tower.text_projection
        if projection is None:
            return x
        return x @ (projection.weight if isinstance(projection, nn.Linear) else projection.T)

    def tangent(self, ctx: Tensor) -> Tensor:
        """Text features ``[b,C,D]`` of contexts ``[b,M,d]``, the tower taken to first order."""
        moved = (ctx - self.ctx).flatten(1) @ self.jacobian.T
        rows = self.rows + moved.unflatten(1, self.rows.shape)
        return F.normalize(project_text(self.tower, rows), dim=-1)


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


def _first_step(ctx: Tensor, gradient: Tensor, lr: float, optimizer: str) -> Tensor:
    """The first step of a fresh optimiser, in closed form: ``[M,d]``, ``[b,M,d]`` -> ``[b,M,d]``.

    With empty state the bias-corrected moments of AdamW are g and g*g, and its step is
    -lr g / (|g| + eps), after the weight decay of the weights themselves.
    """
    if optimizer == "sgd":
        return ctx - lr * gradient
    defaults = torch.optim.AdamW([torch.zeros(1)]).defaults  # torch's, as the paper's code has them
    step = lr * gradient / (gradient.abs() + defaults["eps"])
    return ctx * (1 - lr * defaults["weight_decay"]) - step


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


def _worth_a_jacobian(prompts: Prompts, n_images: int) -> bool:
    """Is the Jacobian as a matrix cheaper than a gradient per image, and does it fit?

    A quarter of the free memory: the matrix is made in parts, but there are other things to hold.
    """
    if not prompts.has_jacobian or n_images < WORTH * prompts.clip.ctx_dim:
        return False
    weight = _weight(prompts)
    size = prompts.C * prompts.M * prompts.clip.ctx_dim**2 * weight.element_size()
    return size <= free_memory(weight.device) / 4


def free_memory(device: torch.device) -> int:
    """Bytes that can be had on a device; on the CPU within the limit of the container, if any."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    found = []
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        found += [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")]
        group = Path("/sys/fs/cgroup")
        limit = (group / "memory.max").read_text().strip()
        if limit != "max":
            found.append(int(limit) - int((group / "memory.current").read_text()))
    except (OSError, ValueError):
        pass  # not Linux, or not limited
    if not found:
        found = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2]
    return min(found)


def _images_per_pass(prompts: Prompts, steps: int) -> int:
    """So many images that the widest activation would stay small: of a few MB (CPU), or of 1 GB.

    On a CPU what is larger leaves the cache, and is fetched from the system anew, page by page.
    """
    weight = _weight(prompts)
    tokens = sum(len(name) + len(rest) + 1 for name, rest in prompts.tokens)
    if not prompts.fixed_suffixes:
        tokens += prompts.C * prompts.M
    widest = tokens * 4 * weight.shape[1] * weight.element_size()
    budget = 2**30 if weight.is_cuda else 2**23
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
import tpt_nb.diffusion  # noqa: E402
import tpt_nb.encoder_tuning  # noqa: E402
import tpt_nb.methods  # noqa: E402
import tpt_nb.online  # noqa: E402
import tpt_nb.retrieval  # noqa: E402, F401
