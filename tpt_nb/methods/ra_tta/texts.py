"""Descriptions of the classes and their features."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from tpt_nb.core.files import read_json
from tpt_nb.core.paths import DATA
from tpt_nb.methods.caption_prompts import plain_name, quiet_tokens, with_article
from tpt_nb.methods.ra_tta.authors import PRE_TEMPLATE
from tpt_nb.models import Clip, template_sentences

DESCRIPTIONS = DATA / "descriptions" / "iconshift.json"


@dataclass
class Texts:
    """What the classes look like, as embeddings: unit norm, float32.

    ``classifier`` ``[C,D]`` is the mean of a class's templates and descriptions; ``vectors``
    ``[T,D]`` are the descriptions one by one (and the bare name of each class), ``owner`` ``[T]``
    the class of each, ``sentences`` their texts.
    """

    classifier: Tensor
    vectors: Tensor
    owner: Tensor
    sentences: list[str]


def read_descriptions(path: str | Path, classnames: Sequence[str]) -> list[list[str]]:
    """Sentences per class from a JSON file ``{class: [sentences]}`` (the layout of CuPL's files).

    Case and underscores of the names do not count. Raises ``ValueError`` if a class has none.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"there is no file of descriptions at {path}.")
    raw = read_json(path)
    lists = raw.values() if isinstance(raw, dict) else [raw]
    if not all(isinstance(some, list) and all(isinstance(s, str) for s in some) for some in lists):
        raise ValueError(f"{path} is not {{class: [sentences]}} in JSON.")
    by_name = {_spelt(name): [s.strip() for s in some] for name, some in raw.items()}
    missing = [name for name in classnames if not by_name.get(_spelt(name))]
    if missing:
        raise ValueError(
            f"{path} describes {len(by_name)} classes, but not {len(missing)} of the "
            f"{len(classnames)} that are asked for: {', '.join(missing[:5])} ..."
        )
    return [by_name[_spelt(name)] for name in classnames]


def _spelt(name: str) -> str:
    return " ".join(plain_name(name).lower().split())


def depictions(classnames: Sequence[str]) -> list[list[str]]:
    """Ten sentences per class in the words of MiniCLIP's training captions: how it may be drawn.

    They do not say what the thing looks like, only how a picture of it may: the most that can be
    said in a vocabulary of a few dozen words.
    """
    patterns = (
        "a drawing of {}", "a cartoon of {}", "a sticker of {}", "an emoji of {}",
        "a flat icon of {}", "a large photo of {}", "a small picture of {}",
        "a black and white image of {}", "a sketch photo of {}", "a bright picture of {}",
    )  # fmt: skip
    return [[f"{p.format(with_article(name))}." for p in patterns] for name in classnames]


@torch.no_grad()
def embed_texts(
    clip: Clip,
    classnames: Sequence[str],
    descriptions: Sequence[Sequence[str]],
    templates: str | Sequence[str] = "single",
    pre_template: str = PRE_TEMPLATE,
) -> Texts:
    """Embed templates and descriptions as RA-TTA does.

    Args:
        descriptions: for each class any number of sentences, none too.
        templates: see ``models.template_sentences``; they and the descriptions make the
            classifier (as CuPL: encode, normalise, mean, normalise). For retrieval each description
            stands behind the ``pre_template``, which alone is the bare name.
    """
    if len(descriptions) != len(classnames):
        raise ValueError(f"{len(descriptions)} lists of descriptions, {len(classnames)} classes.")
    names = [plain_name(name) for name in classnames]
    each = list(zip(names, descriptions, strict=True))
    whole = [[t.format(n) for t in template_sentences(templates)] + list(d) for n, d in each]
    single = [[pre_template.format(n) + s for s in (*d, "")] for n, d in each]
    single = [[s.strip() for s in some] for some in single]
    lists = whole + single
    with quiet_tokens():
        features = clip.encode_text([s for some in lists for s in some]).float().cpu()
    parts = features.split([len(some) for some in lists])
    c = len(names)
    return Texts(
        classifier=F.normalize(torch.stack([p.mean(0) for p in parts[:c]]), dim=-1),
        vectors=torch.cat(parts[c:]),
        owner=torch.tensor([i for i, some in enumerate(single) for _ in some]),
        sentences=[s for some in single for s in some],
    )
