"""RA-TTA: descriptions of the classes, an image database without labels, and optimal transport.

Lee et al., "RA-TTA: Retrieval-Augmented Test-Time Adaptation for Vision-Language Models", ICLR
2025. For one image: which descriptions fit its views best; which classes they belong to; which
images of the database look as these descriptions say; how well do the views match those images.
The answer is mixed with the prediction of the text classifier.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tpt_nb.core.files import sha256
from tpt_nb.datasets import iconshift
from tpt_nb.losses import entropy
from tpt_nb.methods.method import (
    Adapted,
    Method,
    Prepared,
    Setting,
    at_least,
    back,
    check_features,
    check_value,
    initial_logits,
    option,
    positive,
)
from tpt_nb.methods.ra_tta.authors import (
    DATABASES,
    Script,
    find_database,
    find_descriptions,
    open_database,
    script_of,
)
from tpt_nb.methods.ra_tta.build import embedded_database, style_of
from tpt_nb.methods.ra_tta.database import Database
from tpt_nb.methods.ra_tta.texts import DESCRIPTIONS, Texts, embed_texts, read_descriptions
from tpt_nb.methods.ra_tta.transport import TRANSPORTS, transport_plan
from tpt_nb.models import Prompts, TemplatePrompts


@dataclass(frozen=True)
class Options:
    """Files, numbers (those of the authors' code), and switches of the parts."""

    descriptions: str = option(
        "", "file {class: [sentences]}, or a folder of CuPL's files; default: IconShift's"
    )
    database: str = option(
        "", "image database: a folder that the command database made, a file, or db_embedding"
    )
    wording: str = option(
        "",
        "templates of the text classifier: single, seven, eighty; default: the authors' for it",
        choices=("", "single", "seven", "eighty"),
    )
    pre_template: str = option(
        "", "what leads a description, {} is the class; default: the authors' for the data set"
    )
    transport: str = option("entropic", "how views meet images", choices=TRANSPORTS)
    reg: float = positive(0.1, "of the entropic transport")
    top_k_d: int = at_least(1, 20, "K_D, descriptions that are selected")
    top_k_s: int = at_least(1, 20, "K_S, images that are retrieved for each surviving class")
    q: float | None = option(
        None,
        "quantile over the views, by which a description is ranked; default: the authors' for the "
        "data set (0.9 for the ImageNet family, else 0.75)",
        holds=lambda q: 0 <= q <= 1,
        allowed="a fraction from 0 to 1",
    )
    min_descriptions: int = at_least(1, 5, "a class with fewer selected descriptions is dropped")
    retrieval: str = option(
        "images",
        "images; text: in their place the prototype that finds them; off: the classifier alone",
        choices=("images", "text", "off"),
    )
    fusion: str = option(
        "entropy",
        "entropy as coded; equal halves; retrieval without the text classifier",
        choices=("entropy", "equal", "retrieval"),
    )
    lone: str = option(
        "wins",
        "a class that alone survives wins, as coded; or abstains, as nothing was compared",
        choices=("wins", "abstains"),
    )

    def __post_init__(self) -> None:
        for one in dataclasses.fields(self):  # whoever makes them, notebooks too
            check_value(one.name, getattr(self, one.name), one.metadata)


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
    views: Tensor, texts: Texts, options: Options
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores of all descriptions ``[T]``, the chosen ones ``[K_D]``, the surviving classes ``[S]``.

    Classes come in the order of their best description.
    """
    q = Script.q if options.q is None else options.q
    scores = quantile_over_views(views @ texts.vectors.T, q)
    chosen = scores.argsort(descending=True, stable=True)[: options.top_k_d]
    owners = texts.owner[chosen].tolist()
    classes = [c for c in dict.fromkeys(owners) if owners.count(c) >= options.min_descriptions]
    return scores, chosen, torch.tensor(classes, dtype=torch.long)


def prototypes_of(texts: Texts, chosen: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    """Class prototypes ``[S,D]`` and the global one ``[D]``: normalised means of descriptions."""
    owners = texts.owner[chosen]
    each = torch.stack([texts.vectors[chosen[owners == c]].mean(0) for c in classes])
    overall = texts.vectors[chosen[torch.isin(owners, classes)]].mean(0)
    return F.normalize(each, dim=-1), F.normalize(overall, dim=-1)


def trace(
    views: Tensor,
    texts: Texts,
    database: Database | None,
    scale: float,
    options: Options | None = None,
    without: str | None = None,
) -> Trace:
    """RA-TTA for one image: views ``[V,D]`` unit norm, view 0 the un-augmented image.

    ``scale`` is exp(logit_scale), ``without`` a group of the database that is not looked at; there
    may be no database if ``options.retrieval`` is not "images".
    """
    options = options or Options()
    views = views.float().cpu()
    p0 = (scale * views[0] @ texts.classifier.T).double().softmax(-1)
    scores, chosen, classes = select_descriptions(views, texts, options)
    if options.retrieval == "off" or len(classes) == 0:
        return Trace(p0, scores, chosen, classes, *[torch.empty(0)] * 5, None, 1.0, p0)
    u, overall = prototypes_of(texts, chosen, classes)
    if options.retrieval == "images":
        if database is None:
            raise ValueError("retrieval of images needs a database; see read_database and build.")
        rows = database.search(u, options.top_k_s, without)[1]
        found = database.vectors(rows)  # [S,K,D]
    else:
        rows, found = torch.empty(len(u), 0, dtype=torch.long), u[:, None]
    x = (views @ u.T).T.double()  # [S,V], how far each view goes along the prototype
    y = (found * u[:, None]).sum(-1).double()  # [S,K]
    mu = (scale * views @ overall).double().softmax(-1).expand_as(x)
    nu = (scale * y).softmax(-1)
    gaps = (x[..., :, None] - y[..., None, :]).abs()
    plans = transport_plan(options.transport, x, mu, y, nu, options.reg)
    distances = (plans * gaps).sum((-1, -2))
    r = torch.zeros_like(p0)
    r[classes] = (scale / (1 + distances)).softmax(-1)
    share = _share(p0, r, options, len(classes))
    p = share * p0 + (1 - share) * r
    return Trace(p0, scores, chosen, classes, u, rows, gaps, plans, distances, r, share, p)


def _share(p0: Tensor, r: Tensor, options: Options, survivors: int) -> float:
    """Weight of the text classifier: the larger, the surer it is; within (0.27, 0.73)."""
    if survivors == 1 and options.lone == "abstains":
        return 1.0
    if options.fusion != "entropy":
        return {"retrieval": 0.0, "equal": 0.5}[options.fusion]
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
    prompts: Prompts | TemplatePrompts,
    options: Options | None = None,
    knowledge: Knowledge | None = None,
    ids: Sequence[str] | None = None,
) -> Adapted:
    """RA-TTA on a batch: features ``[B,V,D]`` with view 0 first; every view is used.

    ``logits`` are log probabilities, ``loss`` the entropy of the fused prediction;
    ``logits_before`` is the zero-shot prediction under the initial prompt. With ``ids`` of the
    images, the group of the database that each belongs to is left out.
    """
    check_features(features, prompts)
    if knowledge is None:
        raise ValueError("ra_tta needs descriptions and a database: pass knowledge=Knowledge(...).")
    scale = float(prompts.clip.logit_scale)
    logits = []
    for i, views in enumerate(features):
        without = knowledge.group_of(ids[i]) if ids is not None else None
        done = trace(views, knowledge.texts, knowledge.database, scale, options, without)
        logits.append(done.p.clamp_min(1e-300).log())
    logits = torch.stack(logits)
    before = initial_logits(features[:, :1], prompts)[:, 0]
    selected = torch.ones(features.shape[:2], dtype=torch.bool)
    out = (logits.to(features), before.to(features), entropy(logits).to(features))
    return Adapted(*out, *back(features, selected))


def _prepare(options: Options, setting: Setting) -> Prepared:
    """With the files that the options name, or with what is embedded for IconShift."""
    clip, dataset = setting.clip, setting.dataset
    embedded = dataset.name in iconshift.VARIANTS
    words = find_descriptions(options.descriptions, dataset.name)
    place = find_database(options.database, dataset.name, clip.name)
    if not (embedded or (words and place)):
        raise ValueError(
            f"ra_tta on {dataset.name!r} needs descriptions=FILE ({{class: [sentences]}}) and "
            "database=FOLDER (python -m tpt_nb database; the authors' are python -m tpt_nb "
            f"download {DATABASES}); only IconShift has its own."
        )
    lists = read_descriptions(words or DESCRIPTIONS, dataset.classnames)
    script = _script(options, setting)
    texts = embed_texts(clip, dataset.classnames, lists, script.templates, script.pre_template)
    if place and not (embedded and not options.database):
        database = open_database(place, dataset.name)
    else:
        database = embedded_database(clip, cache=setting.cache)
    if database.features.shape[1] != clip.embed_dim:
        raise ValueError(
            f"the database has vectors of {database.features.shape[1]}, {clip.name} makes "
            f"{clip.embed_dim}: it was embedded with another model."
        )
    knowledge = Knowledge(texts, database)
    return Prepared(lambda x, prompts, ids: ra_tta(x, prompts, options, knowledge, ids))


def _script(options: Options, setting: Setting) -> Script:
    """What the authors set for the data set, where the options say nothing else."""
    script = script_of(setting.dataset.name)
    own = {"templates": options.wording, "pre_template": options.pre_template}
    return dataclasses.replace(script, **{k: v for k, v in own.items() if v})


def _resolve(options: Options, config) -> Options:
    q = script_of(config.dataset).q if options.q is None else options.q
    return dataclasses.replace(options, q=q)


def _identity(options: Options, config) -> dict:
    """Files count by name and content; a database of ``build`` by its description."""
    words, place = Path(options.descriptions or DESCRIPTIONS), Path(options.database)
    if config:
        words = find_descriptions(options.descriptions, config.dataset) or words
        place = find_database(options.database, config.dataset, config.model) or place
    about = place / "about.json"
    files = {"descriptions": words, "database": about if about.is_file() else place}
    return {k: [path.name, sha256(path)] for k, path in files.items() if path.is_file()}


METHOD = Method(
    ra_tta, Options, needs="descriptions of the classes and an image database",
    prepare=_prepare, resolve=_resolve, identity=_identity, paper="RA-TTA, 2025",
)  # fmt: skip
