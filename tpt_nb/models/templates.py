"""Template ensembles: sentences in place of a context."""

import torch.nn.functional as F
from open_clip.zero_shot_metadata import OPENAI_IMAGENET_TEMPLATES
from torch import Tensor

from tpt_nb.models.clip import Clip

TEMPLATES = {
    "single": ["a photo of a {}."],
    "seven": [  # the selection of Tip-Adapter from OpenAI's 80 templates
        "itap of a {}.",
        "a bad photo of the {}.",
        "a origami {}.",
        "a photo of the large {}.",
        "a {} in a video game.",
        "art of the {}.",
        "a photo of the small {}.",
    ],
    "eighty": [template("{}") for template in OPENAI_IMAGENET_TEMPLATES],
}


class TemplatePrompts:
    """Fixed text features of a template ensemble, for the methods that tune nothing.

    Has the attributes of :class:`Prompts` that such methods use; ``ctx`` is None.
    """

    ctx = None

    def __init__(self, clip: Clip, classnames: list[str], templates: str | list[str]) -> None:
        self.clip = clip
        self.classnames = list(classnames)
        self.C = len(self.classnames)
        self._features = template_features(clip, self.classnames, templates)

    def text_features(self, ctx: None = None, exact: str = "fast") -> Tensor:
        """``[C,D]`` unit norm."""
        if ctx is not None:
            raise ValueError("a template ensemble has no context; use Prompts.")
        return self._features


def template_features(clip: Clip, classnames: list[str], templates: str | list[str]) -> Tensor:
    """Text features of an ensemble: ``[C,D]``, unit norm.

    Each sentence is encoded and normalised, then the mean over the templates is normalised.

    Args:
        templates: a key of ``TEMPLATES`` or sentences with one ``{}`` for the class name.
    """
    if isinstance(templates, str):
        if templates not in TEMPLATES:
            raise ValueError(f"unknown templates {templates!r}; known: {', '.join(TEMPLATES)}.")
        templates = TEMPLATES[templates]
    bad = [t for t in templates if t.count("{}") != 1]
    if bad or not templates:
        raise ValueError(f"each template needs one {{}} for the class name; got {bad or 'none'}.")
    names = [_clean(name) for name in classnames]
    _check_names(names)
    texts = [template.format(name) for name in names for template in templates]
    features = clip.encode_text(texts).unflatten(0, (len(names), len(templates)))
    return F.normalize(features.mean(dim=1), dim=-1)


def _clean(name: str) -> str:
    return name.replace("_", " ").strip()


def _check_names(names: list[str]) -> None:
    if not names:
        raise ValueError("there are no class names.")
    empty = [i for i, name in enumerate(names) if not name]
    if empty:
        raise ValueError(f"class names {empty[:5]} are empty.")
