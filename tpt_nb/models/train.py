"""CoOp: training a context on labelled images."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from tpt_nb.core.messages import bar
from tpt_nb.models.clip import Clip, text_tower
from tpt_nb.models.prompts import Prompts


def train_coop(
    clip: Clip,
    features: Tensor,
    targets: Tensor,
    classnames: list[str],
    n_ctx: int | None = None,
    ctx_init: str | None = "a photo of a",
    epochs: int = 50,
    lr: float = 0.002,
    batch: int = 32,
    seed: int = 0,
    progress: bool = True,
    class_token_position: str = "end",
    class_specific: bool = False,
) -> Tensor:
    """Train a context with CoOp's recipe on encoded images (the image encoder is frozen).

    SGD with momentum 0.9 and weight decay 5e-4; one warm-up epoch at 1e-5, then a cosine from
    ``lr``; cross-entropy over ``exp(scale) * cos``.

    Args:
        features: ``[N,D]`` unit norm, or ``[N,A,D]`` with A augmented views of each image, of
            which every epoch draws one.
        targets: ``[N]`` class indices.
        n_ctx, ctx_init and all from seed on: see :class:`Prompts`.
    Returns:
        the context, ``[M,d]`` or ``[C,M,d]``, float32 on the CPU.
    Raises:
        ValueError: shapes that do not fit together.
    """
    features = features.unsqueeze(1) if features.ndim == 2 else features
    _check(features, targets, len(classnames))
    place = {"class_token_position": class_token_position, "class_specific": class_specific}
    prompts = Prompts(clip, classnames, ctx_init, n_ctx, seed=seed, **place)
    weight = text_tower(clip.model).token_embedding.weight
    features, targets = features.to(weight), targets.to(weight.device)
    ctx = prompts.ctx.to(weight).clone().requires_grad_(True)
    optimizer = torch.optim.SGD([ctx], lr=lr, momentum=0.9, weight_decay=5e-4)
    generator = torch.Generator().manual_seed(seed)
    n, n_views = features.shape[:2]
    with bar(epochs, 0, "CoOp", progress, unit="epoch") as shown:
        for epoch in range(epochs):
            cosine = 0.5 * lr * (1 + math.cos(math.pi * (epoch - 1) / epochs))
            optimizer.param_groups[0]["lr"] = 1e-5 if epoch == 0 else cosine
            order = torch.randperm(n, generator=generator)
            view = torch.randint(n_views, (n,), generator=generator)
            losses = []
            for index in order.split(batch):
                if len(index) < batch and losses:  # a short last batch is dropped, as CoOp does
                    break
                x = features[index, view[index]]
                logits = clip.logit_scale * x @ prompts.text_features(ctx).T
                loss = F.cross_entropy(logits, targets[index.to(targets.device)])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
            shown.set_postfix(loss=f"{sum(losses) / len(losses):.3f}", refresh=False)
            shown.update()
    return ctx.detach().float().cpu()


def _check(features: Tensor, targets: Tensor, n_classes: int) -> None:
    if features.ndim != 3 or len(features) != len(targets) or len(features) == 0:
        raise ValueError(
            f"features are {list(features.shape)} and targets {list(targets.shape)}; expected "
            "[N,D] or [N,A,D] and [N] with N > 0."
        )
    if int(targets.min()) < 0 or int(targets.max()) >= n_classes:
        raise ValueError(
            f"targets span {int(targets.min())}..{int(targets.max())}, but there are "
            f"{n_classes} class names."
        )
