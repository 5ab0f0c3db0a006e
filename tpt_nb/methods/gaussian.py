"""Gaussians of the classes that share a covariance: what DOTA and FreeTTA have in common."""

import psutil
import torch
from torch import Tensor


def gaussian_scores(x: Tensor, means: Tensor, covariance: Tensor) -> Tensor:
    """Log densities of ``x`` under Gaussians, up to what all classes have in common: ``[N,C]``.

    ``x S^-1 mu_k - mu_k S^-1 mu_k / 2``, the linear discriminant. With ``S = U^T U`` both products
    are between rows of ``x U^-1`` and ``mu U^-1``: one Cholesky and one triangular solve, no
    inverse.

    Args:
        x: ``[N,D]``.
        means: ``[N,C,D]``, for each x its own.
        covariance: ``[N,D,D]``, likewise, of which only the upper triangles are read.
    """
    factor = torch.linalg.cholesky(covariance, upper=True)
    rows = torch.cat([x[:, None], means], 1)
    white = torch.linalg.solve_triangular(factor, rows, upper=True, left=False)
    x, means = white[:, :1], white[:, 1:]
    return (means @ x.mT)[..., 0] - 0.5 * means.square().sum(-1)


def free_bytes(device: torch.device) -> int:
    """Memory that is free where tensors of this device live."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def check_memory(what: str, needed: int, device: torch.device, advice: str) -> None:
    """Raise ``ValueError`` if so many bytes are not free, before anything is allocated."""
    free = free_bytes(device)
    if needed > free:
        raise ValueError(
            f"{what} take {needed / 2**30:.3g} GiB; {free / 2**30:.3g} GiB are free on {device}. "
            f"{advice}"
        )
