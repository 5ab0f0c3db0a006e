"""RA-TTA: descriptions of the classes, an image database without labels, and optimal transport.

Lee et al., "RA-TTA: Retrieval-Augmented Test-Time Adaptation for Vision-Language Models", ICLR
2025. For one image: which descriptions fit its views best; which classes they belong to; which
images of the database look as these descriptions say; how well do the views match those images.
The answer is mixed with the prediction of the text classifier.

Two stages, as the authors' code has them: the views are encoded first (``encode``), then everything
here works on embeddings. One seed, that of the run, belongs to both.

faiss and POT are optional: without faiss the search is exact and blockwise, and the two transports
that the method needs are written out below (POT serves the tests as a second opinion).
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tpt_nb.datasets import iconshift
from tpt_nb.losses import entropy
from tpt_nb.methods.method import Adapted, _check_features
from tpt_nb.methods.ra_tta.build import embedded_database, style_of
from tpt_nb.methods.ra_tta.database import Database, read_database
from tpt_nb.methods.ra_tta.texts import DESCRIPTIONS, Texts, embed_texts, read_descriptions
from tpt_nb.methods.ra_tta.transport import TRANSPORTS, transport_plan
from tpt_nb.models import Clip, text_tower


@dataclass(frozen=True)
class Settings:
    """RA-TTA's settings (defaults are those of the authors' code) and the switches of its parts.

    Attributes:
        top_k_d: K_D, descriptions that are selected.
        top_k_s: K_S, images that are retrieved for each surviving class.
        q: quantile over the views, by which a description is ranked (0.9 for ImageNet).
        min_descriptions: a class with fewer selected descriptions is dropped.
        retrieval: "images"; "text": no image is looked at, the prototype that they were retrieved
            with stands in their place; "off": the text classifier alone.
        transport: see :func:`transport_plan`.
        reg: of the entropic transport.
        fusion: "entropy" as coded; "equal" halves; "retrieval": without the text classifier.
        lone: what happens if one class alone survives. "wins": always that class, as coded (its
            prediction is one-hot, its entropy 0); "abstains": nothing was compared, p0 stays.
    """

    top_k_d: int = 20
    top_k_s: int = 20
    q: float = 0.75
    min_descriptions: int = 5
    retrieval: str = "images"
    transport: str = "entropic"
    reg: float = 0.1
    fusion: str = "entropy"
    lone: str = "wins"

    def __post_init__(self) -> None:
        choices = {
            "retrieval": ("images", "text", "off"),
            "transport": TRANSPORTS,
            "fusion": ("entropy", "equal", "retrieval"),
            "lone": ("wins", "abstains"),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ValueError(
                    f"unknown {name} {getattr(self, name)!r}; known: {', '.join(known)}."
                )
        if not 0 <= self.q <= 1 or self.reg <= 0:
            raise ValueError(f"q must be in [0,1] and reg > 0; got {self.q} and {self.reg}.")
        if min(self.top_k_d, self.top_k_s, self.min_descriptions) < 1:
            raise ValueError("top_k_d, top_k_s and min_descriptions must be 1 or more.")


@dataclass
class Trace:
    """Everything that happened to one image; S classes survived.

    ``scores`` ``[T]`` of the descriptions, ``chosen`` the selected ones, best first; ``classes``
    ``[S]``; ``prototypes`` ``[S,D]``, ``rows`` ``[S,K]`` of the database, ``gaps`` ``[S,V,K]``,
    ``plans`` ``[S,V,K]``, ``distances`` ``[S]``; ``p0``, ``r`` and ``p`` ``[C]`` are the text
    classifier's, the retrieval's and the fused prediction, ``share`` the weight of ``p0``.
    """

    p0: Tensor
    scores: Tensor
    chosen: Tensor
    classes: Tensor
    prototypes: Tensor
    rows: Tensor
    gaps: Tensor
    plans: Tensor
    distances: Tensor
    r: Tensor | None
    share: float
    p: Tensor


def quantile_over_views(cosines: Tensor, q: float) -> Tensor:
    """``[V,T] -> [T]``: q-quantile over the views, linear interpolation."""
    # NumPy sorts such a matrix some twenty times faster than torch does on a CPU
    ordered = torch.from_numpy(np.sort(cosines.float().cpu().numpy(), axis=0))
    place = q * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def select_descriptions(
    views: Tensor, texts: Texts, settings: Settings
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores of all descriptions ``[T]``, the chosen ones ``[K_D]``, the surviving classes ``[S]``.

    Classes come in the order of their best description.
    """
    scores = quantile_over_views(views @ texts.vectors.T, settings.q)
    chosen = scores.argsort(descending=True, stable=True)[: settings.top_k_d]
    owners = texts.owner[chosen].tolist()
    classes = [c for c in dict.fromkeys(owners) if owners.count(c) >= settings.min_descriptions]
    return scores, chosen, torch.tensor(classes, dtype=torch.long)


def prototypes_of(texts: Texts, chosen: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    """Class prototypes ``[S,D]`` and the global one ``[D]``: normalised means of descriptions."""
    owners = texts.owner[chosen]
    each = torch.stack([texts.vectors[chosen[owners == c]].mean(0) for c in classes])
    surviving = torch.isin(owners, classes)
    overall = texts.vectors[chosen[surviving]].mean(0)
    return F.normalize(each, dim=-1), F.normalize(overall, dim=-1)


def trace(
    views: Tensor,
    texts: Texts,
    database: Database | None,
    scale: float,
    settings: Settings | None = None,
    without: str | None = None,
) -> Trace:
    """RA-TTA for one image.

    Args:
        views: ``[V,D]`` unit norm, view 0 the un-augmented image.
        database: may be None if ``settings.retrieval`` is not "images".
        scale: exp(logit_scale).
        without: group of the database that is not looked at.
    """
    settings = settings or Settings()
    views = views.float().cpu()
    p0 = (scale * views[0] @ texts.classifier.T).double().softmax(-1)
    scores, chosen, classes = select_descriptions(views, texts, settings)
    nothing = torch.empty(0)
    silent = (p0, scores, chosen, classes, *[nothing] * 5, None, 1.0, p0)
    if settings.retrieval == "off" or len(classes) == 0:
        return Trace(*silent)
    u, overall = prototypes_of(texts, chosen, classes)
    if settings.retrieval == "images":
        if database is None:
            raise ValueError("retrieval of images needs a database; see read_database and build.")
        rows = database.search(u, settings.top_k_s, without)[1]
        found = database.vectors(rows)  # [S,K,D]
    else:
        rows, found = torch.empty(len(u), 0, dtype=torch.long), u[:, None]
    x = (views @ u.T).T.double()  # [S,V], how far each view goes along the prototype
    y = (found * u[:, None]).sum(-1).double()  # [S,K]
    mu = (scale * views @ overall).double().softmax(-1).expand_as(x)
    nu = (scale * y).softmax(-1)
    gaps = (x[..., :, None] - y[..., None, :]).abs()
    plans = transport_plan(settings.transport, x, mu, y, nu, settings.reg)
    distances = (plans * gaps).sum((-1, -2))
    r = torch.zeros_like(p0)
    r[classes] = (scale / (1 + distances)).softmax(-1)
    share = _share(p0, r, settings, len(classes))
    p = share * p0 + (1 - share) * r
    return Trace(p0, scores, chosen, classes, u, rows, gaps, plans, distances, r, share, p)


def _share(p0: Tensor, r: Tensor, settings: Settings, survivors: int) -> float:
    """Weight of the text classifier: the larger, the surer it is; within (0.27, 0.73)."""
    if survivors == 1 and settings.lone == "abstains":
        return 1.0
    if settings.fusion == "retrieval":
        return 0.0
    if settings.fusion == "equal":
        return 0.5
    h0 = -(p0 * p0.clamp_min(1e-300).log()).sum()
    hr = -(r * (r + 1e-7).log()).sum()
    w0, wr = torch.exp(1 / (1 + h0)), torch.exp(1 / (1 + hr))
    return float(w0 / (w0 + wr))


@dataclass
class Knowledge:
    """What RA-TTA knows beside the model: the descriptions and the database.

    ``group_of`` tells for an image id which group of the database must not be looked at.
    """

    texts: Texts
    database: Database | None
    group_of: Callable[[str], str | None] = style_of


@torch.no_grad()
def ra_tta(
    features: Tensor,
    prompts,
    knowledge: Knowledge | None = None,
    ids: Sequence[str] | None = None,
    transport: str = "entropic",
    settings: Settings | None = None,
) -> Adapted:
    """RA-TTA on a batch: features ``[B,V,D]`` with view 0 first.

    ``logits`` are log probabilities, ``loss`` the entropy of the fused prediction;
    ``logits_before`` is the zero-shot prediction under the initial prompt. Every view is used.

    Args:
        ids: of the images, to leave out the group of the database that each belongs to.
        transport: shorthand for ``settings`` with that transport.
    """
    _check_features(features, prompts)
    if knowledge is None:
        raise ValueError("ra_tta needs descriptions and a database: pass knowledge=Knowledge(...).")
    settings = settings or Settings(transport=transport)
    weight = text_tower(prompts.clip.model).token_embedding.weight
    scale = float(prompts.clip.logit_scale)
    x = features.to(weight)
    before = scale * x[:, 0] @ prompts.text_features().T
    rows = []
    for i, views in enumerate(features):
        without = knowledge.group_of(ids[i]) if ids is not None else None
        done = trace(views, knowledge.texts, knowledge.database, scale, settings, without)
        rows.append(done.p.clamp_min(1e-300).log())
    logits = torch.stack(rows)
    selected = torch.ones(features.shape[:2], dtype=torch.bool)
    out = (logits.to(features), before.to(features), entropy(logits).to(features))
    return Adapted(*out, selected.to(features.device))


def bind(config, clip: Clip, dataset) -> Callable:
    """``ra_tta`` with what a (filled-in) run configuration names, or with what is embedded."""
    embedded = dataset.name in iconshift.VARIANTS
    if not (embedded or (config.descriptions and config.database)):
        raise ValueError(
            f"ra_tta on {dataset.name!r} needs descriptions=FILE ({{class: [sentences]}}) and "
            "database=FOLDER (python -m tpt_nb build-database); only IconShift has its own."
        )
    lists = read_descriptions(config.descriptions or DESCRIPTIONS, dataset.classnames)
    texts = embed_texts(clip, dataset.classnames, lists)
    if config.database:
        database = read_database(config.database)
    else:
        database = embedded_database(clip, cache=config.cache)
    if database.features.shape[1] != clip.embed_dim:
        raise ValueError(
            f"the database has vectors of {database.features.shape[1]}, {clip.name} makes "
            f"{clip.embed_dim}: it was embedded with another model."
        )
    return functools.partial(ra_tta, knowledge=Knowledge(texts, database))
