"""Prompt tuning, fast: what all methods that tune the context share.

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

import dataclasses
import json
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tpt_nb import losses
from tpt_nb.core.machine import free_memory
from tpt_nb.core.paths import DATA
from tpt_nb.losses import Loss
from tpt_nb.methods.method import (
    Adapted,
    Prepared,
    Setting,
    as_mask,
    back,
    check_features,
    fraction,
    option,
    positive,
    rho,
    weight_of,
)
from tpt_nb.models import Prompts, project_text, text_tower

OPTIMIZERS = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}
WORTH = 1.5  # the Jacobian costs about as much as this many gradients per row, d rows per class
PRODUCT = 32  # images per product with the Jacobian, at least
LR = 5e-3  # TPT's


@dataclass(frozen=True)
class TuningOptions:
    """What every method that tunes the context has."""

    rho: float = rho()
    lr: float | None = positive(
        None,
        "step of the context; default: 0.005, for mini that of its model card",
        flat="learning_rate",
        shared=True,
    )


@dataclass(frozen=True)
class LossOptions(TuningOptions):
    """The same, for any loss: a name in the table of losses, or a function like those."""

    loss: str | Callable = option(
        "marginal_entropy",
        "what the context is tuned for",
        shared=True,
        choices=losses.names,
        aliases={"defaultTPT": "marginal_entropy"},
    )
    rho_patch: float = fraction(
        0.9, "fraction kept within each patch, in (0, 1]", flat="selection_p_patch", shared=True
    )
    alpha: float = option(
        1.0,
        "alpha of the loss patch_loss6",
        flat="alpha_exponential_weightening",
        shared=True,
        holds=math.isfinite,
        allowed="a finite number",
    )


def loss_of(options: LossOptions, groups: tuple[int, int] | None = None, overlap: float = 0.0):
    """The loss as ``loss(logits, rho, selected)`` with ``.select``, for views in these groups."""
    if callable(options.loss):
        return losses.with_selection(options.loss)
    more = {"rho_patch": options.rho_patch, "alpha": options.alpha, "overlap": overlap}
    return losses.get(options.loss, groups=groups, **(more if groups else {}))


def resolve(options: TuningOptions, config) -> TuningOptions:
    """The learning rate of the model; ``ValueError`` if there is no context, or no such loss."""
    if config.templates:
        raise ValueError(
            f"templates={config.templates!r} is an ensemble of sentences, which has no context for "
            f"method {config.method!r} to tune; use zero_shot or confident_view, or no templates."
        )
    if isinstance(options, LossOptions):
        loss = loss_of(options, config.groups, config.overlap)
        loss.select(torch.zeros(math.prod(config.groups), 1), options.rho)
    if options.lr is None:
        options = dataclasses.replace(options, lr=usual_learning_rate(config.model))
    return options


def prepare_loss(adapt: Callable) -> Callable[..., Prepared]:
    """The ``prepare`` of a method with :class:`LossOptions`: its loss, for views as they lie."""

    def prepare(options: LossOptions, setting: Setting) -> Prepared:
        loss = loss_of(options, setting.augmenter.groups, setting.config.overlap)
        made = dataclasses.replace(options, loss=loss)
        return Prepared(lambda features, prompts, ids: adapt(features, prompts, made))

    return prepare


def usual_learning_rate(model: str) -> float:
    """TPT's 5e-3; for the embedded model the value chosen on its development data."""
    if model != "mini":
        return LR
    path = DATA / "miniclip" / "config.json"
    try:
        return float(json.loads(path.read_text())["tpt_lr"])
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"no learning rate for the model mini: {path} should hold the key 'tpt_lr' "
            f"({type(error).__name__}); restore it with `git checkout`, or give learning_rate."
        ) from None


class Start:
    """The text features of the initial context, and how to take gradients back to it.

    ``text`` is ``[C,D]``. By matrix: rows of the text tower, of width d, and the Jacobian
    ``[C*d,M*d]`` of these rows; gradients are one product with it. Else: the graph of one pass.
    """

    def __init__(self, prompts: Prompts, by_matrix: bool) -> None:
        self.ctx = prompts.ctx.to(weight_of(prompts)).clone()
        self.tower = text_tower(prompts.clip.model)
        self.jacobian = prompts.jacobian(prompts.cache).flatten(0, 1) if by_matrix else None
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


def mixed_precision(x: Tensor) -> bool:
    """Mixed precision for the tuned text features: on a GPU, as the paper's code does.

    The gradient stays in float32: it is computed once per image at little cost, and the sign step
    would turn its rounding noise into steps.
    """
    return x.is_cuda and x.dtype == torch.float32


# torch's defaults, as the paper's code has them; written down, because to make an optimiser is to
# import torch's compiler, which takes seconds
ADAMW = {"eps": 1e-8, "weight_decay": 1e-2}


def first_step(ctx: Tensor, gradient: Tensor, lr: float, optimizer: str) -> Tensor:
    """The first step of a fresh optimiser, in closed form: ``[M,d]``, ``[b,M,d]`` -> ``[b,M,d]``.

    With empty state the bias-corrected moments of AdamW are g and g*g, and its step is
    -lr g / (|g| + eps), after the weight decay of the weights themselves.
    """
    if optimizer == "sgd":
        return ctx - lr * gradient
    step = lr * gradient / (gradient.abs() + ADAMW["eps"])
    return ctx * (1 - lr * ADAMW["weight_decay"]) - step


def worth_a_jacobian(prompts: Prompts, n: int) -> bool:
    """Is the Jacobian as a matrix cheaper than a gradient for each of n images, and does it fit?

    ``prompts.expect`` says how many there are if these are some of them. It may take a quarter of
    the free memory: the matrix is made in parts, but there are other things to hold.
    """
    if not prompts.has_jacobian or (prompts.n_images or n) < WORTH * prompts.clip.ctx_dim:
        return False
    weight = weight_of(prompts)
    size = prompts.C * prompts.M * prompts.clip.ctx_dim**2 * weight.element_size()
    return size <= free_memory(weight.device) / 4


def images_per_pass(prompts: Prompts, steps: int) -> int:
    """So many images that the widest activation would stay small: of a few MB (CPU), or of 1 GB.

    On a CPU what is larger leaves the cache, and is fetched from the system anew, page by page.
    """
    weight = weight_of(prompts)
    tokens = sum(len(name) + len(rest) + 1 for name, rest in prompts.tokens)
    if not prompts.fixed_suffixes:
        tokens += prompts.C * prompts.M
    widest = tokens * 4 * weight.shape[1] * weight.element_size()
    budget = 2**30 if weight.is_cuda else 2**23
    if steps > 1 and weight.is_cuda:  # the whole graph is kept
        budget //= len(text_tower(prompts.clip.model).transformer.resblocks)
    return max(1, budget // widest)


def images_per_product(size: int, start: Start) -> int:
    """So many images whose gradients are taken at once, where ``size`` pass the tower at once.

    A product with the Jacobian reads all of the matrix, so it waits for more images than that.
    """
    return size if start.jacobian is None else max(size, PRODUCT)


def check_tuning(features: Tensor, prompts: Prompts, options: TuningOptions) -> float:
    """The learning rate; ``ValueError`` for wrong features and prompts without a context."""
    check_features(features, prompts)
    if prompts.ctx is None:
        raise ValueError("TPT tunes a context and a template ensemble has none; use Prompts.")
    return LR if options.lr is None else options.lr


def one_step(
    features: Tensor,
    prompts: Prompts,
    options: TuningOptions,
    loss: Loss,
    predict: Callable[[Tensor, Tensor, Tensor], Tensor],
    of_text: Callable[[Tensor], Tensor] | None = None,
) -> Adapted:
    """TPT's first step, with another prediction: the text tower runs once per image.

    Args:
        loss: ``loss(logits, rho, selected)`` with ``.select``, of the logits of an image's views.
        predict: views [b,V,D], text features of each image's tuned context [b,C,D] and the chosen
            views [b,k] to logits [b,C].
        of_text: a second term of the loss, of the text features [C,D] alone: the same for all
            images.
    """
    lr, rho_ = check_tuning(features, prompts, options), options.rho
    start = Start(prompts, worth_a_jacobian(prompts, len(features)))
    weight = weight_of(prompts)
    scale = prompts.clip.logit_scale.to(weight)
    extra, g_extra = torch.zeros_like(scale), 0.0
    if of_text:
        leaf = prompts.ctx.to(weight).clone().requires_grad_(True)
        extra = of_text(prompts.text_features(leaf))
        (g_extra,) = torch.autograd.grad(extra, leaf)
    outs: list[tuple[Tensor, ...]] = []
    size = images_per_pass(prompts, 1)
    for x in features.to(weight).split(images_per_product(size, start)):
        logits = (scale * x @ start.text.T).requires_grad_(True)
        chosen = torch.vmap(lambda z: loss.select(z, rho_))(logits.detach())
        each = torch.vmap(lambda z, i: loss(z, rho_, i))(logits, chosen)
        (g_logits,) = torch.autograd.grad(each.sum(), logits)
        g_ctx = start.pull_back(g_logits, logits.detach(), x, scale) + g_extra
        ctx = first_step(start.ctx.detach(), g_ctx, lr, "adamw").detach()
        parts = zip(x.split(size), ctx.split(size), chosen.split(size), strict=True)
        with torch.no_grad():
            text = prompts.text_features
            after = torch.cat([predict(f, text(c).to(x.dtype), i) for f, c, i in parts])
        value = (each + extra).detach()
        outs.append((after, logits[:, 0].detach(), value, as_mask(chosen, x), ctx))
    return Adapted(*back(features, *(torch.cat(t) for t in zip(*outs, strict=True))))
