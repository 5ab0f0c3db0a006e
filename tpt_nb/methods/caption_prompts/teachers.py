"""Teachers from outside: something that is not the model itself says what is in the picture.

The study planned LLaVA as one. A teacher is a function ``teacher(image, classnames) ->
probabilities [C]``, and that is all that is asked of it. :func:`from_captions` makes one of a
captioner of this folder, :func:`from_answers` one of any vision-language model that answers a
question about a picture in words.
"""

from collections.abc import Callable, Sequence

import torch
from PIL import Image
from torch import Tensor

from tpt_nb.methods.caption_prompts.texts import encode_once
from tpt_nb.methods.caption_prompts.words import find_word, plain_name
from tpt_nb.models import Clip

Teacher = Callable[[Image.Image, Sequence[str]], Tensor]
QUESTION = "Which of these is in the picture? Answer with one of them and nothing else: {}."


def from_captions(write: Callable[[Image.Image], str], clip: Clip) -> Teacher:
    """A teacher that reads a caption: the text tower compares it with "a photo of a <class>.".

    ``write`` is any function from a picture to a caption, such as ``ViTGPT2().caption``.
    """
    scale, memo = float(clip.logit_scale), {}

    def teacher(image: Image.Image, classnames: Sequence[str]) -> Tensor:
        sentences = [f"a photo of a {plain_name(name)}." for name in classnames]
        classes = encode_once(clip, [sentences], memo)[0][0]  # unit norm
        caption = encode_once(clip, [[write(image)]], memo)[0][0, 0]
        return (scale * classes @ caption).cpu().softmax(-1)

    return teacher


def from_answers(ask: Callable[[Image.Image, str], str], trust: float = 0.9) -> Teacher:
    """A teacher that is asked: ``ask(image, question) -> answer`` is the slot of a larger model.

    With transformers that is ``lambda image, text: pipe(image, text)[0]["generated_text"]``, where
    ``pipe = pipeline("image-text-to-text", "llava-hf/...")``. A class that the answer names gets
    ``trust`` (several share it), the others what is left; an answer that names none says nothing.
    """
    if not 0 < trust <= 1:
        raise ValueError(f"trust is {trust}; it must be a fraction in (0, 1].")

    def teacher(image: Image.Image, classnames: Sequence[str]) -> Tensor:
        answer = ask(image, QUESTION.format(", ".join(map(plain_name, classnames))))
        named = torch.tensor([find_word(answer, plain_name(c)) is not None for c in classnames])
        count, k = len(classnames), int(named.sum())
        if k in (0, count):
            return torch.full((count,), 1 / count)
        return torch.where(named, trust / k, (1 - trust) / (count - k))

    return teacher


def teach(teacher: Teacher, images: Sequence[Image.Image], classnames: Sequence[str]) -> Tensor:
    """What a teacher says of some pictures: ``[N,C]``, checked and normalised.

    Raises ``ValueError`` if it says something that is no distribution over the classes.
    """
    said = []
    for i, image in enumerate(images):
        p = torch.as_tensor(teacher(image, classnames)).float()
        if p.shape != (len(classnames),) or not (p >= 0).all() or not p.isfinite().all():
            raise ValueError(
                f"image {i}: the teacher returns {list(p.shape)} values from {float(p.min()):.3g}; "
                f"expected probabilities [{len(classnames)}], one per class."
            )
        if not p.sum() > 0:
            raise ValueError(f"image {i}: the teacher gives every class the probability 0.")
        said.append(p / p.sum())
    return torch.stack(said)
