"""Template ensembles: sentences in place of a context."""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from tpt_nb.core.messages import unknown
from tpt_nb.models.clip import Clip

_SINGLE = ["a photo of a {}."]
_SEVEN = [  # the selection of Tip-Adapter from OpenAI's 80 templates
    "itap of a {}.",
    "a bad photo of the {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
]


def _eighty() -> list[str]:
    from open_clip.zero_shot_metadata import OPENAI_IMAGENET_TEMPLATES

    return [template("{}") for template in OPENAI_IMAGENET_TEMPLATES]


TEMPLATES = {"single": lambda: _SINGLE, "seven": lambda: _SEVEN, "eighty": _eighty}


def template_sentences(templates: str | Sequence[str]) -> list[str]:
    """The sentences of an ensemble, each with one ``{}`` for the class name.

    Args:
        templates: "single", "seven", "eighty", or such sentences, which are checked.
    """
    if isinstance(templates, str):
        if templates not in TEMPLATES:
            raise ValueError(unknown("templates", templates, TEMPLATES))
        return TEMPLATES[templates]()
    bad = [t for t in templates if t.count("{}") != 1]
    if bad or not templates:
        raise ValueError(f"each template needs one {{}} for the class name; got {bad or 'none'}.")
    return list(templates)


class TemplatePrompts:
    """Fixed text features of a template ensemble, for the methods that tune nothing.

    Has the attributes of :class:`Prompts` that such methods use; ``ctx`` is None.
    """

    ctx = None

    def __init__(self, clip: Clip, classnames: list[str], templates: str | Sequence[str]) -> None:
        self.clip = clip
        self.classnames = list(classnames)
        self.C = len(self.classnames)
        self._features = template_features(clip, self.classnames, templates)

    def text_features(self, ctx: None = None, exact: str = "fast") -> Tensor:
        """``[C,D]`` unit norm."""
        if ctx is not None:
            raise ValueError("a template ensemble has no context; use Prompts.")
        return self._features


def template_features(
    clip: Clip, classnames: Sequence[str], templates: str | Sequence[str]
) -> Tensor:
    """Text features of an ensemble (see :func:`template_sentences`): ``[C,D]``, unit norm.

    Each sentence is encoded and normalised, then the mean over the templates is normalised.
    """
    sentences = template_sentences(templates)
    names = clean_names(classnames)
    features = clip.encode_text([s.format(name) for name in names for s in sentences])
    return F.normalize(features.unflatten(0, (len(names), len(sentences))).mean(dim=1), dim=-1)


def clean_names(classnames: Sequence[str]) -> list[str]:
    """Class names as words; ``ValueError`` if there are none or one is empty."""
    names = [name.replace("_", " ").strip() for name in classnames]
    if not names:
        raise ValueError("there are no class names.")
    empty = [i for i, name in enumerate(names) if not name]
    if empty:
        raise ValueError(f"class names {empty[:5]} are empty.")
    return names
