"""MEMO: the image tower takes a step for each image, so that its views agree."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tpt_nb.losses import marginal_entropy
from tpt_nb.methods.image_tower import (
    Pixels,
    check_pixels,
    lent,
    norm_parameters,
    own_statistics,
    pixels_of,
    prior_option,
    views_of,
)
from tpt_nb.methods.method import (
    Adapted,
    Method,
    Prepared,
    Setting,
    at_least,
    back,
    initial_logits,
    option,
    positive,
)
from tpt_nb.methods.tuning import OPTIMIZERS
from tpt_nb.models import Prompts, TemplatePrompts


@dataclass(frozen=True)
class Options:
    tower_lr: float = positive(2.5e-4, "step of the image tower")
    tower_optimizer: str = option(
        "sgd", "sgd (no weight decay) or adamw (0.01)", choices=tuple(OPTIMIZERS)
    )
    tower_steps: int = at_least(1, 1, "steps per image")
    tower_part: str = option(
        "all", "what is tuned: all of the tower, or its norms", choices=("all", "norms")
    )
    prior: float = prior_option(16.0)


def memo(
    features: Tensor,
    prompts: Prompts | TemplatePrompts,
    options: Options,
    pixels: Pixels | None = None,
    ids: Sequence[str] = (),
) -> Adapted:
    """MEMO: Zhang, Levine and Finn, "MEMO: Test Time Robustness via Adaptation and Augmentation",
    2022.

    Steps on the marginal entropy of *all* views of an image, through the whole image tower; then
    view 0 through the tuned tower. The tower is reset for each image. Of the statistics of batch
    norms 1/(prior+1) are the image's own, both in the step (of its views, which count as one image)
    and in the prediction. TPT is this loss with the prompt in place of the tower, and with the
    confident views only.

    Published for ImageNet: 64 AugMix views, one step; SGD 0.00025 for ResNet-50, AdamW 0.00001 with
    weight decay 0.01 for other towers; prior 16. Here the views are those of the run.

    ``loss`` is the marginal entropy before the step.

    Args:
        features: ``[B,V,D]`` of the frozen tower, view 0 first: the prediction before.
        pixels: image id -> its views, uint8 ``[V,3,S,S]``.
        ids: of the B images.
    Raises:
        ValueError: no pixels; pixels of other views than the features.
    """
    check_pixels("memo", features, prompts, pixels, ids)
    clip, before = prompts.clip, initial_logits(features[:, :1], prompts)[:, 0]
    tower = clip.model.visual
    tuned = norm_parameters(tower) if options.tower_part == "norms" else list(tower.parameters())
    with torch.no_grad():
        text = prompts.text_features()
    scale = clip.logit_scale.to(text)

    def predict(views: Tensor) -> Tensor:
        return scale * clip.encode_pass(views).to(text) @ text.T

    after, losses = [], []
    with lent(tuned) as reset, own_statistics(tower, options.prior, images=1):
        for name in ids:
            views = views_of(name, pixels, features)
            reset()
            optimizer = OPTIMIZERS[options.tower_optimizer](tuned, lr=options.tower_lr)
            for step in range(options.tower_steps):
                optimizer.zero_grad()
                with torch.enable_grad():
                    loss = marginal_entropy(predict(views), 1.0)
                loss.backward()
                optimizer.step()
                losses += [loss.detach()] if step == 0 else []
            with torch.no_grad():
                after.append(predict(views[:1])[0])
    selected = torch.ones(features.shape[:2], dtype=torch.bool, device=features.device)
    return Adapted(*back(features, torch.stack(after), before, torch.stack(losses), selected))


def prepare(options: Options, setting: Setting) -> Prepared:
    """Makes the views of the run again, image by image."""
    pixels = pixels_of(setting)
    return Prepared(lambda x, prompts, ids: memo(x, prompts, options, pixels, ids))


METHOD = Method(
    memo, Options, tunes="encoder", needs="the pixels of the views", prepare=prepare,
    paper="MEMO, 2022",
)  # fmt: skip
