"""Transport plans between places on a line; the cost is the distance |x - y|."""

import torch
from torch import Tensor

from tpt_nb.core.messages import unknown

TRANSPORTS = ("entropic", "exact", "independent", "mean")


def sinkhorn(
    a: Tensor, b: Tensor, cost: Tensor, reg: float, iterations: int = 100, tol: float = 1e-2
) -> Tensor:
    """Entropic transport plans, a batch of POT's ``ot.sinkhorn`` (Cuturi 2013), float64.

    Args:
        a, b: marginals ``[...,V]`` and ``[...,K]``.
        cost: ``[...,V,K]``, as the plans.
        reg: weight of the entropy.
        iterations, tol: like POT's numItermax and stopThr; the error of the second marginal is
            looked at after the first iteration and then after every tenth.
    """
    a, b, cost = a.double(), b.double(), cost.double()
    kernel = torch.exp(-cost / reg)
    u = torch.full_like(cost[..., :, 0], 1 / cost.shape[-2])
    v = torch.full_like(cost[..., 0, :], 1 / cost.shape[-1])
    active = torch.ones_like(u[..., :1], dtype=torch.bool)
    for i in range(iterations):
        new_v = b / (kernel.transpose(-1, -2) @ u[..., None])[..., 0]
        new_u = a / (kernel @ new_v[..., None])[..., 0]
        u, v = torch.where(active, new_u, u), torch.where(active, new_v, v)
        if i % 10 == 0:
            column = (u[..., :, None] * kernel * v[..., None, :]).sum(-2)
            active = active & ((column - b).norm(dim=-1, keepdim=True) >= tol)
            if not active.any():
                break
    return u[..., :, None] * kernel * v[..., None, :]


def monotone_plan(x: Tensor, a: Tensor, y: Tensor, b: Tensor) -> Tensor:
    """The exact optimal plan ``[...,V,K]`` between places x ``[...,V]`` and y ``[...,K]``, float64.

    Where the cost is convex in x - y it is optimal to move mass in order: sort both sides, lay the
    masses a and b (each adds up to 1) end to end on [0,1]; what lies above each other belongs
    together.
    """
    x, a, y, b = (t.double() for t in (x, a, y, b))
    order_x, order_y = x.argsort(dim=-1, stable=True), y.argsort(dim=-1, stable=True)
    a, b = a.gather(-1, order_x), b.gather(-1, order_y)
    end_a, end_b = a.cumsum(-1), b.cumsum(-1)
    end = torch.minimum(end_a[..., :, None], end_b[..., None, :])
    start = torch.maximum((end_a - a)[..., :, None], (end_b - b)[..., None, :])
    plan = (end - start).clamp_min(0)  # sorted rows and columns
    back_x, back_y = order_x.argsort(dim=-1), order_y.argsort(dim=-1)
    plan = plan.gather(-2, back_x[..., :, None].expand_as(plan))
    return plan.gather(-1, back_y[..., None, :].expand_as(plan))


def transport_plan(kind: str, x: Tensor, a: Tensor, y: Tensor, b: Tensor, reg: float) -> Tensor:
    """Plans between places x ``[S,V]`` with masses a and y ``[S,K]`` with masses b.

    "entropic" is what the authors run (Sinkhorn, stopped early), "exact" the optimum,
    "independent" moves from everywhere to everywhere, "mean" too, and forgets the masses.
    """
    if kind not in TRANSPORTS:
        raise ValueError(unknown("transport", kind, TRANSPORTS))
    if kind == "entropic":
        return sinkhorn(a, b, (x[..., :, None] - y[..., None, :]).abs(), reg)
    if kind == "exact":
        return monotone_plan(x, a, y, b)
    if kind == "mean":
        a, b = torch.full_like(a, 1 / a.shape[-1]), torch.full_like(b, 1 / b.shape[-1])
    return a[..., :, None].double() * b[..., None, :].double()
