"""What online and transductive methods share: the order in which they meet the images.

Such a method is ``adapt(features [B,V,D], prompts, options, orders=None)``. Row o of ``orders``
``[O,B]`` lists positions of images in the order of one stream; the logits are then ``[O,B,C]``, in
the order of the *images*, so that they stand beside those of other streams. Without ``orders``
there is one, drawn by the option ``order``, and the logits are ``[B,C]``. Streams know nothing of
each other: a hundred orders are one call, whose state has a leading dimension.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from tpt_nb.methods.method import option


@dataclass(frozen=True)
class StreamOptions:
    """Options of every method that depends on the order of the images."""

    order: int = option(0, "seed of the order of the stream")


def shuffled(n: int, seed: int) -> Tensor:
    """``[n]`` positions in a random order."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))


def orders_of(n: int, options: StreamOptions, orders: Tensor | None) -> Tensor:
    """``[O,n]``: the orders given, or the one that the option ``order`` draws.

    Raises:
        ValueError: a row that is not a permutation of the n images.
    """
    if orders is None:
        return shuffled(n, options.order)[None]
    rows = orders.reshape(-1, orders.shape[-1]).cpu()
    if rows.shape[1] != n or not (rows.sort(1).values == torch.arange(n)).all():
        raise ValueError(
            f"orders have shape {list(orders.shape)}; each row must list each of the {n} images "
            "once."
        )
    return rows


def in_place(streamed: Tensor, rows: Tensor, orders: Tensor | None) -> Tensor:
    """``[O,B,C]`` in the order of the streams -> in that of the images, as the caller wants it."""
    index = rows.to(streamed.device)[..., None].expand_as(streamed)
    return one_or_many(torch.empty_like(streamed).scatter_(1, index, streamed), orders)


def one_or_many(logits: Tensor, orders: Tensor | None) -> Tensor:
    """``[O,B,C]``, or ``[B,C]`` where there were no ``orders``, or one without its dimension."""
    return logits[0] if orders is None or orders.ndim == 1 else logits
