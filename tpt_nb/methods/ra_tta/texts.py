"""Descriptions of the classes and their features."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from tpt_nb.core.paths import DATA
from tpt_nb.methods.caption_prompts import words
from tpt_nb.models import TEMPLATES, Clip

DESCRIPTIONS = DATA / "descriptions" / "iconshift.json"


PRE_TEMPLATE = "a photo of the {}. "  # of ImageNet, V2 and A in the authors' code


@dataclass
class Texts:
    """What the classes look like, as embeddings.

    ``classifier`` ``[C,D]`` is the mean of a class's templates and descriptions; ``vectors``
    ``[T,D]`` are the descriptions one by one (and the bare name of each class), ``owner`` ``[T]``
    the class of each, ``sentences`` their texts. All unit norm, float32.
    """

    classnames: list[str]
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
    try:
        raw = json.loads(path.read_text("utf-8"))
        by_name = {_plain(name): [str(s).strip() for s in some] for name, some in raw.items()}
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{path} is not {{class: [sentences]}} in JSON ({error}).") from None
    missing = [name for name in classnames if not by_name.get(_plain(name))]
    if missing:
        raise ValueError(
            f"{path} describes {len(by_name)} classes, but not {len(missing)} of the "
            f"{len(classnames)} that are asked for: {', '.join(missing[:5])} ..."
        )
    return [by_name[_plain(name)] for name in classnames]


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
    return [[f"{p.format(words.with_article(name))}." for p in patterns] for name in classnames]


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
        templates: a key of ``prompts.TEMPLATES`` or sentences with one ``{}``; they and the
            descriptions make the classifier (as CuPL: encode, normalise, mean, normalise).
        pre_template: put in front of each description for retrieval; alone, it is the bare name.
    """
    if len(descriptions) != len(classnames):
        raise ValueError(f"{len(descriptions)} lists of descriptions, {len(classnames)} classes.")
    templates = TEMPLATES[templates] if isinstance(templates, str) else templates
    names = [name.replace("_", " ").strip() for name in classnames]
    whole = [
        [t.format(n) for t in templates] + list(d) for n, d in zip(names, descriptions, strict=True)
    ]
    single = [
        [pre_template.format(n) + s for s in d] + [pre_template.format(n).strip()]
        for n, d in zip(names, descriptions, strict=True)
    ]
    flat = [s for some in (*whole, *single) for s in some]
    with words.quiet_tokens():
        features = clip.encode_text(flat).float().cpu()
    parts = features.split([len(some) for some in (*whole, *single)])
    c = len(names)
    classifier = torch.stack([p.mean(0) for p in parts[:c]])
    owner = [i for i, some in enumerate(single) for _ in some]
    return Texts(
        classnames=list(classnames),
        classifier=F.normalize(classifier, dim=-1),
        vectors=torch.cat(parts[c:]),
        owner=torch.tensor(owner),
        sentences=[s for some in single for s in some],
    )


def _plain(name: str) -> str:
    return " ".join(str(name).replace("_", " ").lower().split())
