"""TPT with another prediction or another loss: tpt_confident, R-TPT, C-TPT."""

from dataclasses import dataclass

import torch
from torch import Tensor

from tpt_nb.losses import log_mean_prob
from tpt_nb.methods.method import Adapted, Method, at_least, option, positive, take
from tpt_nb.methods.tuning import (
    LossOptions,
    TuningOptions,
    loss_of,
    one_step,
    prepare_loss,
    resolve,
)
from tpt_nb.models import Prompts


@dataclass(frozen=True)
class RtptOptions(TuningOptions):
    neighbours: int = at_least(1, 20, "views that a view is compared with")
    temperature: float = positive(0.01, "of the weights of the views")


@dataclass(frozen=True)
class CtptOptions(TuningOptions):
    dispersion: float = option(20.0, "weight of the text features' spread")


MEAN_ENTROPY = loss_of(LossOptions(loss="mean_entropy"))
MARGINAL_ENTROPY = loss_of(LossOptions())


def tpt_confident(features: Tensor, prompts: Prompts, options: LossOptions) -> Adapted:
    """TPT, but the prediction is the mean of the confident views under the tuned prompt.

    What several course projects call TPT. One step; ``logits`` are log mean probabilities.
    """

    def predict(x: Tensor, text: Tensor, chosen: Tensor) -> Tensor:
        kept = take(x, chosen) @ text.transpose(1, 2)
        return torch.vmap(log_mean_prob)(prompts.clip.logit_scale.to(x) * kept)

    return one_step(features, prompts, options, loss_of(options), predict)


def rtpt(features: Tensor, prompts: Prompts, options: RtptOptions) -> Adapted:
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
            nearest = cosines.masked_fill(itself, -torch.inf).topk(min(options.neighbours, v - 1))
            near = nearest.values.mean(-1)
        else:
            near = cosines[..., 0]
        mixed = ((near / options.temperature).softmax(-1)[:, None] @ x)[
            :, 0
        ]  # logits are linear in x
        return prompts.clip.logit_scale.to(x) * (text @ mixed[..., None])[..., 0]

    return one_step(features, prompts, options, MEAN_ENTROPY, predict)


def ctpt(features: Tensor, prompts: Prompts, options: CtptOptions) -> Adapted:
    """C-TPT: Yoon et al., "C-TPT: Calibrated Test-Time Prompt Tuning for Vision-Language Models
    via Text Feature Dispersion", 2024.

    One step on TPT's loss minus ``dispersion`` times the mean distance of the text features from
    their centroid: text features that stay apart keep the confidence honest. The paper takes 20 on
    the natural shifts, 50 on the fine-grained sets. View 0 under the tuned prompt.

    ``loss`` is the whole of it, at the initial prompt.
    """

    def spread(text: Tensor) -> Tensor:
        return -options.dispersion * (text - text.mean(0)).norm(dim=-1).mean()

    def predict(x: Tensor, text: Tensor, chosen: Tensor) -> Tensor:
        return prompts.clip.logit_scale.to(x) * (text @ x[:, 0, :, None])[..., 0]

    return one_step(features, prompts, options, MARGINAL_ENTROPY, predict, of_text=spread)


TPT_CONFIDENT = Method(
    tpt_confident,
    LossOptions,
    tunes="context",
    prepare=prepare_loss(tpt_confident),
    resolve=resolve,
)
RTPT = Method(rtpt, RtptOptions, tunes="context", resolve=resolve, paper="R-TPT, 2025")
CTPT = Method(ctpt, CtptOptions, tunes="context", resolve=resolve, paper="C-TPT, 2024")
