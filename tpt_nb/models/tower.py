"""The text tower of CLIP for many prompts that share a prefix, without computing anything twice.

A prompt is a prefix (start token and context) that is the same for all classes, and a suffix (class
name, period, end-of-text token). The tower is causal, so the prefix does not see the suffix: it
runs once, and the tokens of the suffixes attend to its keys and values. Of the last block only the
end-of-text rows are asked for.

Two routes give the same numbers. :func:`causal_tower` is differentiable and takes suffixes of any
kind. :class:`Packed` is for contexts that need no gradient, and for suffixes that no context
changes: what the first block does with them is computed once, nothing is padded or copied to line
up heads, and nothing is kept for a backward pass.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

QUICK_GELU = 1.702  # x * sigmoid(1.702 x)
LONGEST = 16  # tokens of a suffix up to which Packed loops over pairs of positions


def blocks_of(tower: nn.Module) -> list[nn.Module]:
    """The residual blocks of open_clip's text tower."""
    return list(tower.transformer.resblocks)


def has_plain_attention(tower: nn.Module) -> bool:
    """Is the tower causal, and every attention torch's own, as in all of OpenAI's models?

    The code here assumes so.
    """
    causal = tower.attn_mask is not None
    return causal and all(
        isinstance(block.attn, nn.MultiheadAttention) for block in blocks_of(tower)
    )


def causal_tower(tower: nn.Module, prefix: Tensor, suffixes: list[Tensor]) -> Tensor:
    """The end-of-text rows of prompts that share a prefix, behind the last layer norm.

    Args:
        tower: open_clip's text tower, with torch's attention.
        prefix: ``[B,P,d]`` embedded tokens common to all classes, positions added.
        suffixes: for each group of equally long suffixes ``[B or 1,C_g,S_g,d]``; the last token
            is the end-of-text token.
    Returns:
        ``[B,C,d]``, classes in the order of the groups; the projection is still to come.
    """
    return suffix_rows(tower, prefix_states(tower, prefix), suffixes)


def prefix_states(tower: nn.Module, prefix: Tensor) -> list[Tensor]:
    """What enters each block at the prefix: ``[B,P,d]`` per block, ``prefix`` itself first."""
    states = [prefix]
    for block in blocks_of(tower)[:-1]:
        mixed = attend_causal(*_project(block, states[-1], "qkv"))
        states.append(_finish(block, states[-1], mixed))
    return states


def suffix_rows(tower: nn.Module, states: list[Tensor], suffixes: list[Tensor]) -> Tensor:
    """As :func:`causal_tower`, from the states of the prefix."""
    sizes = [(x.shape[1], x.shape[2]) for x in suffixes]
    x = torch.cat([s.flatten(1, 2).expand(max(map(len, suffixes)), -1, -1) for s in suffixes], 1)
    blocks = blocks_of(tower)
    for i, (block, prefix) in enumerate(zip(blocks, states, strict=True)):
        last = i == len(blocks) - 1  # there, only the end-of-text rows are asked for
        queries = _end_rows(x, sizes) if last else x
        k_prefix, v_prefix = _project(block, prefix, "kv")
        k, v = _project(block, x, "kv")
        q = _project(block, queries, "q")[0]
        mixed = _attend_suffix(q, k, v, k_prefix, v_prefix, sizes, last)
        x = _finish(block, queries, mixed)
    return tower.ln_final(x)


def _end_rows(x: Tensor, sizes: list[tuple[int, int]]) -> Tensor:
    """The last row of each suffix: ``[B,T,d] -> [B,C,d]``."""
    parts = x.split([c * s for c, s in sizes], dim=1)
    return torch.cat([p.unflatten(1, cs)[:, :, -1] for p, cs in zip(parts, sizes, strict=True)], 1)


def _project(block: nn.Module, x: Tensor, which: str) -> list[Tensor]:
    """Queries, keys or values: ``[B,T,d]`` -> one ``[B,h,T,e]`` per letter of ``which``."""
    attention = block.attn
    first = "qkv".index(which[0]) * attention.embed_dim
    rows = slice(first, first + len(which) * attention.embed_dim)
    y = F.linear(block.ln_1(x), attention.in_proj_weight[rows], attention.in_proj_bias[rows])
    y = y.unflatten(-1, (len(which), attention.num_heads, -1))  # [B,T,n,h,e]
    return [t.transpose(1, 2) for t in y.unbind(2)]


def attend_causal(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """Causal self-attention of ``[B,h,T,e]`` -> ``[B,T,h*e]``."""
    scores = q @ k.transpose(-1, -2) * (scale or 1 / math.sqrt(q.shape[-1]))
    scores = scores + _causal_mask(scores)
    return (scores.softmax(dim=-1) @ v).transpose(1, 2).flatten(2)


def _causal_mask(scores: Tensor) -> Tensor:
    return torch.full_like(scores[(0,) * (scores.ndim - 2)], float("-inf")).triu(1)


def _attend_suffix(q, k, v, k_prefix, v_prefix, sizes, last: bool) -> Tensor:
    """Each suffix attends to the prefix and causally to itself: -> ``[B,T,h*e]``.

    ``q, k, v`` are ``[B or 1,h,T,e]`` (``q`` is ``[.,h,C,e]`` in the last block), the prefix
    ``[B,h,P,e]``.
    """
    scale = 1 / math.sqrt(q.shape[-1])
    n_prefix = k_prefix.shape[2]
    to_prefix = (q * scale) @ k_prefix.transpose(-1, -2)  # [B,h,T,P]
    batch = to_prefix.shape[0]
    k_parts = k.split([c * s for c, s in sizes], dim=2)
    v_parts = v.split([c * s for c, s in sizes], dim=2)
    q_sizes = [(c, 1) if last else (c, s) for c, s in sizes]
    q_parts = q.split([c * s for c, s in q_sizes], dim=2)
    prefix_parts = to_prefix.split([c * s for c, s in q_sizes], dim=2)
    weights_prefix, from_suffix = [], []
    for q_g, k_g, v_g, p_g, size, q_size in zip(
        q_parts, k_parts, v_parts, prefix_parts, sizes, q_sizes, strict=True
    ):
        q_g, k_g, v_g = q_g.unflatten(2, q_size), k_g.unflatten(2, size), v_g.unflatten(2, size)
        own = (q_g * scale) @ k_g.transpose(-1, -2)  # [B,h,C,S,S]
        if not last:
            own = own + _causal_mask(own)
        scores = torch.cat([p_g.unflatten(2, q_size), own.expand(batch, -1, -1, -1, -1)], dim=-1)
        weights = scores.softmax(dim=-1)
        weights_prefix.append(weights[..., :n_prefix].flatten(2, 3))
        from_suffix.append((weights[..., n_prefix:] @ v_g).flatten(2, 3))
    out = torch.cat(weights_prefix, dim=2) @ v_prefix + torch.cat(from_suffix, dim=2)
    return out.transpose(1, 2).flatten(2)


def _finish(block: nn.Module, x: Tensor, mixed: Tensor) -> Tensor:
    """The rest of a residual block behind the attention."""
    x = x + block.ls_1(block.attn.out_proj(mixed))
    return x + block.ls_2(_mlp(block.mlp, block.ln_2(x)))


def _mlp(mlp: nn.Module, x: Tensor) -> Tensor:
    if type(mlp.gelu).__name__ != "QuickGELU":
        return mlp(x)
    # x sigmoid(a x) = silu(a x) / a, and silu is one operation, forwards and backwards
    fc, out, a = mlp.c_fc, mlp.c_proj, QUICK_GELU
    return F.linear(F.silu(F.linear(x, fc.weight * a, fc.bias * a)), out.weight / a, out.bias)
