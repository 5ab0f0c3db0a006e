"""MTA: the mode of the views."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tpt_nb.losses import entropy
from tpt_nb.methods.method import Adapted, Method, at_least, back, initial_logits, option, positive
from tpt_nb.models import Prompts, TemplatePrompts


@dataclass(frozen=True)
class Options:
    lambda_q: float = option(4.0, "weight of the views' agreement")
    lambda_y: float = positive(0.2, "temperature of the inlierness")
    iterations: int = at_least(1, 5, "turns of the two updates")


@torch.no_grad()
def mta(features: Tensor, prompts: Prompts | TemplatePrompts, options: Options) -> Adapted:
    """MTA: Zanella and Ben Ayed, "On the Test-Time Zero-Shot Generalization of VLMs", 2024.

    A robust mean shift over the views' features: the mode m and the inlierness y of the views are
    found in turns. K_i = exp(-|f_i - m|^2 / 2h_i^2), with h_i^2 half the mean squared distance of
    view i to its nearest 30 % of the others; W = P P^T, how alike the views' predictions are;
    y = softmax((K + lambda_q W y) / lambda_y); m = the mean of the f_i with weights y_i K_i,
    normalised. Starts at view 0 and uniform y. Each of the two is repeated until it moves by less
    than 1e-6, at most five times, as in the published code.

    ``loss`` is the entropy of the prediction at the mode; every view is used.
    """
    logits = initial_logits(features, prompts)
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
    for _ in range(options.iterations):
        density = log_kernel(mode).exp()
        y = _settle(
            y,
            lambda y, d=density: (
                (d + options.lambda_q * (affinity @ y[..., None])[..., 0]) / options.lambda_y
            ).softmax(-1),
        )
        mode = _settle(mode, lambda m, y=y: mean_shift(m, y))
    out = prompts.clip.logit_scale.to(x) * mode @ prompts.text_features().T
    mask = torch.ones(b, v, dtype=torch.bool)
    return Adapted(*back(features, out, logits[:, 0], entropy(out), mask))


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


METHOD = Method(mta, Options, paper="MTA, 2024")
