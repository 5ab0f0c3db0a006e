"""STS: one small shift of all class prototypes, within what the class features span."""

from dataclasses import dataclass

import torch
from torch import Tensor

from tpt_nb.methods import tps
from tpt_nb.methods.method import Adapted, Method, not_negative, option
from tpt_nb.models import Prompts, TemplatePrompts


@dataclass(frozen=True)
class Options(tps.Options):
    penalty: float = not_negative(
        0.0, "lambda_R: weight of the squared shift; counts from the second step on"
    )
    predict: str = option(
        "confident",
        "what is classified in the end: the image, or its confident views",
        choices=("image", "confident"),
    )


def sts(features: Tensor, prompts: Prompts | TemplatePrompts, options: Options) -> Adapted:
    """STS: Dafnis and Metaxas, "Test-Time Spectrum-Aware Latent Steering for Zero-Shot
    Generalization in Vision-Language Models", 2025.

    TPS with few parameters. B ``[D,k]`` are the leading right singular vectors of the class
    features ``[C,D]``, as many as :func:`rank` says. One vector gamma, shared by all classes and 0
    at the start, moves them: ``t_c = norm(t_c + B gamma)``, by one AdamW step of size ``shift`` on
    the marginal entropy of the confident views plus ``penalty |B gamma|^2``.

    Two things were not verified, as neither code nor paper could be read, but summaries of it.
    *lambda_R*: its value is unknown. With the published single step it cannot matter, since the
    gradient of the squared shift is 0 where the step is taken; here it is 0. *The prediction*: two
    summaries say the mean probability of the confident views, the default; ``predict="image"``
    classifies view 0 as TPS does.
    """
    basis = spectral_basis(prompts.text_features().detach())
    return tps.shifted(features, prompts, options, basis, options.penalty, options.predict)


def spectral_basis(text: Tensor) -> Tensor:
    """Class features ``[C,D]`` -> the leading right singular vectors ``[D,k]``."""
    _, values, right = torch.linalg.svd(text, full_matrices=False)
    return right[: rank(values, *text.shape)].T


def rank(values: Tensor, rows: int, columns: int) -> int:
    """How many singular values stand out of noise of unknown size; at least 1.

    Gavish and Donoho, "The Optimal Hard Threshold for Singular Values is 4/sqrt(3)", 2014: those
    above omega(beta) times their median, with ``beta = min / max`` of the two sides and their cubic
    for omega, which is within 0.02 of the exact factor.
    """
    beta = min(rows, columns) / max(rows, columns)
    omega = 0.56 * beta**3 - 0.95 * beta**2 + 1.82 * beta + 1.43
    return max(1, int((values > omega * values.quantile(0.5)).sum()))


METHOD = Method(sts, Options, tunes="text", paper="STS, 2025")
