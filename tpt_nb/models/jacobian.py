"""The derivative of the text tower in the context, as a matrix per class."""

import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tpt_nb.core.files import write_whole
from tpt_nb.models.tower import prefix_states, suffix_rows


def jacobian(tower: nn.Module, prefix: Tensor, suffixes: list[Tensor], order: Tensor) -> Tensor:
    """Derivative of the end-of-text rows in the context, as a matrix per class.

    Reverse mode in two parts that meet at the states of the prefix (what enters each block there):
    the rows of each class in its own copy of the states, and the states in the prefix.

    Args:
        prefix: ``[1+M,d]``, the start token and the context, positions added.
        suffixes: as in :func:`causal_tower`, with one batch entry.
        order: ``[C]``, where each class stands in the groups of suffixes.
    Returns:
        ``[C,d,M*d]`` for end-of-text rows behind the last layer norm.
    """
    m, d = len(prefix) - 1, prefix.shape[1]
    moving = prefix[1:].detach().clone().requires_grad_(True)
    states = prefix_states(tower, torch.cat([prefix[:1], moving])[None])
    by_state = [None]  # of the first state, which is the prefix: the identity
    for state in states[1:]:
        rows = state[0, 1:].flatten()
        eye = torch.eye(m * d, dtype=prefix.dtype, device=prefix.device)
        parts = [
            torch.autograd.grad(rows, moving, e, is_grads_batched=True, retain_graph=True)[0]
            for e in eye.split(256)
        ]
        by_state.append(torch.cat(parts).flatten(1))  # [M*d,M*d]
    members = order.argsort()  # the classes in the order of the groups
    out = prefix.new_empty(len(members), d, m * d)
    start = 0
    for x in suffixes:
        _, c, s, _ = x.shape
        own = [
            state.detach()[:, 1:].expand(c, -1, -1).clone().requires_grad_(True) for state in states
        ]
        fixed = [state.detach()[:, :1].expand(c, -1, -1) for state in states]
        full = [torch.cat(pair, dim=1) for pair in zip(fixed, own, strict=True)]
        rows = suffix_rows(tower, full, [x.transpose(0, 1)])[:, 0]  # [c,d]
        size = max(1, 2**22 // (c * (s + m) * 4 * d))  # rows at a time, for the cache
        for k in range(0, d, size):
            which = torch.arange(k, min(k + size, d), device=x.device)
            seeds = F.one_hot(which, d).to(x.dtype)[:, None].expand(-1, c, -1)
            grads = torch.autograd.grad(rows, own, seeds, is_grads_batched=True, retain_graph=True)
            total = grads[0].flatten(2)  # [r,c,M*d]
            for grad, matrix in zip(grads[1:], by_state[1:], strict=True):
                total = total + grad.flatten(2) @ matrix
            out[members[start : start + c, None], which] = total.transpose(0, 1)
        start += c
    return out


def kept(path: Path, make: Callable[[], Tensor], device: torch.device) -> Tensor:
    """The matrix in this file; made, and kept there, where there is none or it is damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file, save

    with suppress(OSError, SafetensorError, KeyError):
        return load_file(path)["jacobian"].to(device)
    out = make()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, save({"jacobian": out.cpu()}))
    except OSError as error:  # a full disk: it is only a cache
        warnings.warn(f"the Jacobian is not kept in {path.parent}: {error}", stacklevel=2)
    return out
