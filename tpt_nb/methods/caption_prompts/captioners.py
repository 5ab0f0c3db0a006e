"""Captions of an image and their keywords: by retrieval with CLIP, offline; or by ViT-GPT2.

A captioner has ``captions(features [B,D], ids) -> list[str]`` and ``keyword(caption) -> span``.
"""

import functools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tpt_nb.core.files import write_whole
from tpt_nb.core.images import as_rgb
from tpt_nb.core.messages import first_line, unknown
from tpt_nb.core.paths import cache_dir
from tpt_nb.methods.caption_prompts.texts import encode_once
from tpt_nb.methods.caption_prompts.words import STANDARD, Span, find_word, plain_name, words_of
from tpt_nb.models import Clip
from tpt_nb.views import center_view

SLOTS = {
    "noun": ("photo", "drawing", "cartoon", "sticker", "emoji", "flat icon"),
    "look": ("", "gray", "black and white", "inverted", "blurry", "dark", "bright", "outlined"),
    "size": ("", "tiny", "small", "large", "huge"),
    "place": ("", "on the left", "on the right", "at the top", "at the bottom", "in the center"),
    "background": ("", "plain", "gradient", "striped", "checkered", "noisy", "textured"),
}
PLAIN = {slot: words[0] for slot, words in SLOTS.items()}


def sentence(thing: str, noun: str, look: str, size: str, place: str, background: str) -> str:
    """ "a bright cartoon of a large cat on the left, striped background"."""
    text = " ".join(w for w in ("a", look, noun, "of a", size, thing, place) if w)
    return text + (f", {background} background" if background else "")


_NEEDS = (
    "the captioner vit-gpt2 needs {}: pip install -r ci/requirements-extras.txt. "
    "captioner=clip works without it."
)


class ClipCaptioner:
    """Captions by retrieval with CLIP over a grammar of style, look, size, place and background.

    The object is the one of ``objects`` that the standard prompt finds; then, slot by slot, the
    word whose sentence fits the image best ("nothing" takes part). So a caption says what the model
    believes, true or not.
    """

    def __init__(self, clip: Clip, objects: Sequence[str]) -> None:
        self.clip, self.objects = clip, [plain_name(name) for name in objects]
        self._memo: dict[str, Tensor] = {}

    def _encode(self, texts: Sequence[str]) -> Tensor:
        return encode_once(self.clip, [texts], self._memo)[0][0]

    def caption(self, image) -> str:
        """Caption of a PIL image."""
        pixels = np.array(center_view(as_rgb(image), self.clip.image_size))
        view = torch.from_numpy(pixels).permute(2, 0, 1)[None]
        return self.captions(self.clip.encode_views(view))[0]

    @torch.no_grad()
    def captions(self, features: Tensor, ids: Sequence[str] | None = None) -> list[str]:
        """Captions of images by their features ``[N,D]``; ``ids`` are not needed."""
        x = features.to(self.clip.device).float()
        objects = self._encode([STANDARD.format(name) for name in self.objects])
        out = []
        for row, found in zip(x, (x @ objects.T).argmax(1).tolist(), strict=True):
            thing, best = self.objects[found], {}
            for slot, words in SLOTS.items():
                texts = [sentence(thing, **PLAIN | {slot: word}) + "." for word in words]
                best[slot] = words[int((self._encode(texts) @ row).argmax())]
            out.append(sentence(thing, **best))
        return out

    def keyword(self, caption: str) -> Span | None:
        """The word that is most similar to the whole caption (KeyBERT's rule, CLIP's text tower).

        Like KeyBERT with unigrams and no stop words: of "birthday cake" one word at most. None if
        there is no word of two letters or more.
        """
        spans = words_of(caption)
        if not spans:
            return None
        features = self._encode([caption, *(caption[a:b].lower() for a, b in spans)])
        return spans[int((features[1:] @ features[0]).argmax())]


@dataclass
class ViTGPT2:
    """The project's captioner and keyword: ViT-GPT2 and KeyBERT, loaded when first used.

    ``name`` is one on the Hugging Face hub, or a folder; ``fetch`` gives the PIL image of an id,
    for :meth:`captions`; ``cache`` is a JSON file of captions by id; ``keybert`` None the usual.
    """

    device: str = "cpu"
    name: str = "nlpconnect/vit-gpt2-image-captioning"
    fetch: Callable | None = None
    cache: Path | None = None
    keybert: Any = None

    @functools.cached_property
    def _known(self) -> dict[str, str]:
        there = self.cache is not None and self.cache.is_file()
        return json.loads(self.cache.read_text("utf-8")) if there else {}

    @functools.cached_property
    def _parts(self) -> tuple:
        try:
            from transformers import AutoTokenizer, VisionEncoderDecoderModel, ViTImageProcessor
        except ImportError:
            raise ValueError(_NEEDS.format("transformers")) from None
        try:
            model = VisionEncoderDecoderModel.from_pretrained(self.name).to(self.device).eval()
            others = (ViTImageProcessor, AutoTokenizer)
            return model, *(kind.from_pretrained(self.name) for kind in others)
        except OSError as error:
            raise ValueError(
                f"the captioner {self.name} cannot be loaded ({first_line(error)}); it is "
                "downloaded once, about 1 GB. Without a network use captioner=clip."
            ) from error

    def caption(self, image) -> str:
        """Caption of a PIL image."""
        return self._write([image])[0]

    @torch.no_grad()
    def _write(self, images: Sequence) -> list[str]:
        model, processor, tokenizer = self._parts
        rgb = [as_rgb(image) for image in images]
        pixels = processor(images=rgb, return_tensors="pt").pixel_values.to(self.device)
        ids = model.generate(pixels, max_length=16, num_beams=4)  # as the project has it
        return [text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]

    def captions(self, features: Tensor, ids: Sequence[str]) -> list[str]:
        """Captions of images by id, from the cache where they are there."""
        missing = [i for i in ids if i not in self._known]
        if missing:
            if self.fetch is None:
                raise ValueError("this captioner needs the images: give it fetch.")
            texts = self._write([self.fetch(i) for i in missing])
            self._known.update(zip(missing, texts, strict=True))
            if self.cache is not None:
                self.cache.parent.mkdir(parents=True, exist_ok=True)
                write_whole(self.cache, json.dumps(self._known))
        return [self._known[i] for i in ids]

    def keyword(self, caption: str) -> Span | None:
        """Place of KeyBERT's best word in the caption; None if there is none."""
        if self.keybert is None:
            try:
                from keybert import KeyBERT
            except ImportError:
                raise ValueError(_NEEDS.format("keybert")) from None
            self.keybert = KeyBERT()
        found = self.keybert.extract_keywords(
            caption, keyphrase_ngram_range=(1, 1), stop_words=None
        )
        return find_word(caption, found[0][0]) if found else None


def make_captioner(name: str, clip: Clip, dataset, cache: str | Path | None = None):
    """The captioner "clip" or "vit-gpt2" for the images of a data set.

    Args:
        cache: folder in which ViT-GPT2's captions are kept; None for the usual one.
    """
    if name == "clip":
        return ClipCaptioner(clip, dataset.classnames)
    if name != "vit-gpt2":
        raise ValueError(unknown("captioner", name, ("clip", "vit-gpt2")))
    position = {image_id: i for i, image_id in enumerate(dataset.ids)}
    file = f"vit-gpt2-{dataset.name}-{dataset.fingerprint[:16]}.json"
    return ViTGPT2(
        str(clip.device),
        fetch=lambda image_id: dataset[position[image_id]][0],
        cache=Path(cache or cache_dir()) / "captions" / file,
    )
