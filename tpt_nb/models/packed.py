"""The text tower on packed suffixes."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tpt_nb.models.tower import QUICK_GELU, attend_causal, blocks_of

ROWS = 640  # of the MLP at a time: its wide activation should not leave the cache


class Linear:
    """``x -> x @ weight.T + bias`` for weights ``[n,k]`` that stay as they are, ``bias [n]``.

    The weights are laid out once as oneDNN's matrix product wants them, which is then a sixth
    faster than a product that has to do so every time, and takes the activation along. Where there
    is no such product it is an ordinary one.
    """

    def __init__(self, weight: Tensor, bias: Tensor, silu: bool = False) -> None:
        self.bias, self.silu, self.laid_out = bias, silu, lay_out(weight)
        self.weight = weight if self.laid_out is None else None

    def __call__(self, x: Tensor) -> Tensor:
        """``[N,k] -> [N,n]``, and then ``x * sigmoid(x)`` if ``silu``."""
        if self.laid_out is not None:
            then = "swish" if self.silu else "none"
            return torch.ops.mkldnn._linear_pointwise(x, self.laid_out, self.bias, then, [], "")
        y = torch.addmm(self.bias, x, self.weight.T)
        return F.silu(y, inplace=True) if self.silu else y


def lay_out(weight: Tensor) -> Tensor | None:
    """A weight as oneDNN's product wants it; None if it is not float32 on a CPU or torch has none.

    These are the operations that torch's own compiler uses for linear layers on a CPU.
    """
    if weight.dtype != torch.float32 or weight.device.type != "cpu":
        return None
    try:
        out = torch.ops.mkldnn._reorder_linear_weight(weight)
        row = weight.new_zeros(1, weight.shape[1])
        torch.ops.mkldnn._linear_pointwise(row, out, None, "swish", [], "")
    except (AttributeError, RuntimeError, TypeError):  # another torch, or not for this processor
        return None
    return out


class FrozenBlock:
    """A residual block whose weights stay as they are, without gradient.

    The scale of the scores is in the weights of the queries, layer scale (if any) in those of the
    two projections back to the stream, and the factors that make QuickGELU a SiLU in those of the
    MLP.

    Args:
        block: of open_clip's text tower.
        split: project queries and keys with values apart, as the last block needs them.
    """

    def __init__(self, block: nn.Module, split: bool = False) -> None:
        attention, mlp = block.attn, block.mlp
        self.ln_1, self.ln_2, self.heads = block.ln_1, block.ln_2, attention.num_heads
        d = attention.embed_dim
        scale = torch.ones_like(attention.in_proj_bias)
        scale[:d] = 1 / math.sqrt(d // self.heads)
        weight, bias = attention.in_proj_weight * scale[:, None], attention.in_proj_bias * scale
        parts = {"q": slice(d), "kv": slice(d, None)} if split else {"qkv": slice(None)}
        self.project = {name: Linear(weight[rows], bias[rows]) for name, rows in parts.items()}
        quick = type(mlp.gelu).__name__ == "QuickGELU"
        a, self.activation = (QUICK_GELU, None) if quick else (1, mlp.gelu)
        g1, g2 = (getattr(s, "gamma", torch.ones_like(bias[:d])) for s in (block.ls_1, block.ls_2))
        out, up, down = attention.out_proj, mlp.c_fc, mlp.c_proj
        self.out = Linear(out.weight * g1[:, None], out.bias * g1)
        self.up = Linear(up.weight * a, up.bias * a, silu=quick)
        self.down = Linear(down.weight * g2[:, None] / a, down.bias * g2)

    def qkv(self, x: Tensor) -> Tensor:
        """Scaled queries, keys and values side by side: ``[B,T,d] -> [B,T,3d]``."""
        return self.project["qkv"](self.ln_1(x).flatten(0, 1)).unflatten(0, x.shape[:2])

    def finish(self, x: Tensor, mixed: Tensor) -> Tensor:
        """The rest of the block behind the attention; ``x`` may have one batch entry for all."""
        y = self.out(mixed.flatten(0, 1)).unflatten(0, mixed.shape[:2]).add_(x)
        for rows in y.flatten(0, 1).split(ROWS):  # few, so that the wide activation stays in cache
            hidden = self.up(self.ln_2(rows))
            rows.add_(self.down(self.activation(hidden) if self.activation else hidden))
        return y


class Packed:
    """Suffixes that no context changes, laid out for the tuned forward pass on a CPU.

    The tokens lie position by position: the first token of all classes, the second of all classes
    that have one, and so on, classes sorted by the length of their suffix, longest first. The
    tokens of one position, and the earlier tokens of the same classes, are then slices.

    Args:
        tower: open_clip's text tower, with torch's attention.
        suffixes: for each group ``[1,C_g,S_g,d]``, positions added, as in :func:`causal_tower`.
        order: ``[C]``, where each class stands in the groups.
    """

    @torch.no_grad()
    def __init__(self, tower: nn.Module, suffixes: list[Tensor], order: Tensor) -> None:
        *blocks, last = blocks_of(tower)
        self.blocks = [*map(FrozenBlock, blocks), FrozenBlock(last, split=True)]
        self.ln_final = tower.ln_final
        sizes = [x.shape[1] for x in suffixes]
        offsets = [sum(sizes[:g]) for g in range(len(sizes))]
        groups = sorted(range(len(sizes)), key=lambda g: -suffixes[g].shape[2])
        ranks = torch.cat([torch.arange(sizes[g]) + offsets[g] for g in groups])
        self.order = ranks.to(order.device).argsort()[order]  # rank of each class
        longest = suffixes[groups[0]].shape[2]
        rows = [
            torch.cat([suffixes[g][0, :, p] for g in groups if suffixes[g].shape[2] > p])
            for p in range(longest)
        ]
        self.counts = [*map(len, rows), 0]  # classes that have a token at this position
        self.starts = [sum(self.counts[:p]) for p in range(longest)]
        self.x = torch.cat(rows).unsqueeze(0)  # [1,T,d]
        # (first query, queries, first rank, position), of all tokens and of the last ones only
        self.all = [(self.starts[p], self.counts[p], 0, p) for p in range(longest)]
        self.ends = []
        for p in reversed(range(longest)):
            low, high = self.counts[p + 1], self.counts[p]
            if high > low:
                self.ends.append((low, high - low, low, p))
        self.first = self.blocks[0].qkv(self.x) if blocks else None  # [1,T,3d]

    @torch.no_grad()
    def __call__(self, prefix: Tensor) -> Tensor:
        """``[B,P,d]`` -> ``[B,C,d]``, as :func:`causal_tower`, without a graph, in class order."""
        *blocks, last = self.blocks
        x, batch = self.x, len(prefix)
        for block in blocks:
            q, k, v = (block.qkv(x) if block is not blocks[0] else self.first).chunk(3, dim=-1)
            own = block.qkv(prefix).chunk(3, dim=-1)
            mixed = self._attend(block.heads, q, k, v, *own[1:], self.all)
            x = block.finish(x, mixed)
            by_head = [t.unflatten(-1, (block.heads, -1)).transpose(1, 2) for t in own]
            prefix = block.finish(prefix, attend_causal(*by_head, scale=1))
        x = x.expand(batch, -1, -1)
        y = last.ln_1(x)
        q = last.project["q"](self._end_rows(y).flatten(0, 1)).unflatten(0, (batch, -1))
        kv = [last.project["kv"](t.flatten(0, 1)) for t in (y, last.ln_1(prefix))]
        (k, v), own = (t.unflatten(0, (batch, -1)).chunk(2, dim=-1) for t in kv)
        mixed = self._attend(last.heads, q, k, v, *own, self.ends)
        return self.ln_final(last.finish(self._end_rows(x), mixed))[:, self.order]

    def _end_rows(self, x: Tensor) -> Tensor:
        """End-of-text rows by rank: ``[B,T,d] -> [B,C,d]``."""
        parts = [x[:, self.starts[p] + low :][:, :n] for low, n, _, p in self.ends]
        return torch.cat(parts, dim=1)

    def _attend(self, h: int, q, k, v, k_prefix, v_prefix, plan) -> Tensor:
        """Scaled ``q [B or 1,Q,d]``, ``k, v [B or 1,T,d]``, those of the prefix ``[B,P,d]``.

        Returns ``[B,Q,d]``; ``h`` heads.
        """
        batch, n_prefix, d = k_prefix.shape
        slots = n_prefix + 1 + max(p for *_, p in plan)  # what a query can attend to
        # All heads in one product: per head and slot a row with the numbers of that head, else 0.
        # The slots of the suffix are left empty and filled in by the loop over pairs of positions.
        keys, values = q.new_zeros(2, batch, h, slots, h, d // h)
        for wide, own in ((keys, k_prefix), (values, v_prefix)):
            own = own.unflatten(-1, (h, -1)).permute(0, 1, 3, 2)  # [B,P,e,h]
            wide.diagonal(dim1=1, dim2=3)[:, :n_prefix].copy_(own)
        keys, values = keys.view(batch, -1, d), values.view(batch, -1, d)
        if len(q) == 1:
            scores = (keys.flatten(0, 1) @ q[0].T).view(batch, h, slots, -1)
        else:
            scores = torch.bmm(keys, q.transpose(1, 2)).view(batch, h, slots, -1)
        for start, n, low, p in plan:
            here = scores[..., start : start + n]  # [B,h,slots,n]
            here[:, :, n_prefix + p + 1 :] = float("-inf")
            for j in range(p + 1):
                k_j = k[:, self.starts[j] + low :][:, :n]
                own = (q[:, start : start + n] * k_j).unflatten(-1, (h, -1)).sum(dim=-1)
                here[:, :, n_prefix + j] = own.transpose(1, 2)
        weights = scores.softmax(dim=2)
        mixed = torch.bmm(weights.flatten(1, 2).transpose(1, 2), values)
        by_head = mixed.unflatten(-1, (h, -1))  # [B,Q,h,e]
        for start, n, low, p in plan:
            for j in range(p + 1):
                v_j = v[:, self.starts[j] + low :][:, :n].unflatten(-1, (h, -1))
                w_j = weights[:, :, n_prefix + j, start : start + n].transpose(1, 2)[..., None]
                by_head[:, start : start + n].addcmul_(w_j, v_j)
        return mixed
