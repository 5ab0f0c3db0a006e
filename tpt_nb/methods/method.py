"""What a method is, and what its files share."""

from dataclasses import dataclass

import torch
from torch import Tensor

from tpt_nb.models import Prompts, TemplatePrompts, text_tower


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


def _check_features(features: Tensor, prompts: Prompts | TemplatePrompts) -> None:
    d = prompts.clip.embed_dim
    if features.ndim != 3 or features.shape[-1] != d or 0 in features.shape:
        raise ValueError(
            f"features have shape {list(features.shape)}; expected [B,V,{d}] with B, V > 0: the "
            f"views of each image, encoded with the same model ({prompts.clip.name})."
        )


def _take(values: Tensor, chosen: Tensor) -> Tensor:
    """Rows of views: ``[B,V,C]``, ``[B,k]`` -> ``[B,k,C]``."""
    return values.gather(1, chosen[..., None].expand(-1, -1, values.shape[-1]))
