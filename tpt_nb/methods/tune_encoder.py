"""Tuning the image encoder too: the prompt and the image tower take a step for each image.

One of the course projects that started this work tunes the image encoder together with the prompt
(CLIP RN50 on ImageNet-A, reported: 24.64 % against 23.88 % for its TPT). It breaks the bargain that
all other methods here keep: the encoder is not frozen, so features cannot be computed once, and
every image costs a backward pass through the image tower for its confident views. The method below
starts from the same cached features as the others to choose the views, and makes their pixels
again, from the same seed.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tpt_nb.losses import marginal_entropy, select_confident
from tpt_nb.methods.image_tower import Pixels, check_pixels, lent, pixels_of, views_of
from tpt_nb.methods.method import (
    Adapted,
    Method,
    Prepared,
    Setting,
    as_mask,
    back,
    initial_logits,
    not_negative,
    weight_of,
)
from tpt_nb.methods.tuning import OPTIMIZERS, TuningOptions, check_tuning, resolve
from tpt_nb.models import Prompts


@dataclass(frozen=True)
class Options(TuningOptions):
    encoder_lr: float = not_negative(5e-6, "step of the image tower")


def tune_encoder(
    features: Tensor,
    prompts: Prompts,
    options: Options,
    pixels: Pixels | None = None,
    ids: Sequence[str] = (),
) -> Adapted:
    """One AdamW step on the context *and* on the image tower, per image; both are reset after it.

    The loss is TPT's marginal entropy of the confident views, the prediction that of view 0 under
    the tuned prompt and the tuned tower. Batch normalisation keeps its running statistics.

    Args:
        features: ``[B,V,D]`` of the frozen tower, view 0 first: they choose the views.
        pixels: image id -> its views, uint8 ``[V,3,S,S]``, the same that were encoded.
        ids: of the B images.
    Raises:
        ValueError: no pixels; parameters out of range; pixels that are not those of the features.
    """
    lr, rho = check_tuning(features, prompts, options), options.rho
    check_pixels("tune_encoder", features, prompts, pixels, ids)
    logits = initial_logits(features, prompts)
    chosen = torch.vmap(lambda z: select_confident(z, rho))(logits)
    model, x0 = prompts.clip, features.to(weight_of(prompts))
    weights = list(model.model.visual.parameters())
    after, losses, contexts = [], [], []
    with lent(weights) as reset:
        for i, name in enumerate(ids):
            views = views_of(name, pixels, features)
            ctx = prompts.ctx.to(x0).clone().requires_grad_(True)  # reset for every image
            reset()
            groups = [{"params": [ctx], "lr": lr}, {"params": weights, "lr": options.encoder_lr}]
            step = OPTIMIZERS["adamw"](groups)
            # encode_views with gradients, for the confident views: the loss sees no others
            some = model.encode_pass(views[chosen[i].cpu()])
            _check_same(name, some.detach(), x0[i, chosen[i]])
            z = model.logit_scale.to(x0) * some.to(x0) @ prompts.text_features(ctx).T
            loss = marginal_entropy(z, rho, torch.arange(len(z), device=z.device))
            loss.backward()
            step.step()
            with torch.no_grad():
                tuned, first = prompts.text_features(ctx), model.encode_pass(views[:1])
                after.append(model.logit_scale.to(x0) * first[0].to(x0) @ tuned.T)
            losses.append(loss.detach())
            contexts.append(ctx.detach())
    parts = (torch.stack(after), logits[:, 0], torch.stack(losses), as_mask(chosen, features))
    return Adapted(*back(features, *parts, torch.stack(contexts)))


def _check_same(name: str, now: Tensor, cached: Tensor) -> None:
    """Other views than the features are of would tune towards something that nobody chose."""
    apart = float((now - cached.to(now)).abs().max())
    if apart > 0.005:  # half precision moves a coordinate by some 1e-4
        raise ValueError(
            f"{name}: the views that pixels() made are not those of the features (they differ by "
            f"{apart:.2g}); use the augmenter and the seed that the features were made with."
        )


def prepare(options: Options, setting: Setting) -> Prepared:
    """Makes the views of the run again, image by image."""
    pixels = pixels_of(setting)
    return Prepared(lambda x, prompts, ids: tune_encoder(x, prompts, options, pixels, ids))


METHOD = Method(
    tune_encoder,
    Options,
    tunes="encoder",
    needs="the pixels of the views",
    prepare=prepare,
    resolve=resolve,
)
