"""Captions of an image: by retrieval with CLIP, or ViT-GPT2."""

import functools
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from tpt_nb.methods.caption_prompts.words import (
    STANDARD,
    Span,
    _extras,
    find_word,
    quiet_tokens,
    words_of,
)
from tpt_nb.models import Clip

NOUNS = ("photo", "drawing", "cartoon", "sticker", "emoji", "flat icon")


LOOKS = ("", "gray", "black and white", "inverted", "blurry", "dark", "bright", "outlined")


SIZES = ("", "tiny", "small", "large", "huge")


PLACES = ("", "on the left", "on the right", "at the top", "at the bottom", "in the center")


BACKGROUNDS = ("", "plain", "gradient", "striped", "checkered", "noisy", "textured")


PLAIN = {"noun": "photo", "look": "", "size": "", "place": "", "background": ""}


SLOTS = {"noun": NOUNS, "look": LOOKS, "size": SIZES, "place": PLACES, "background": BACKGROUNDS}


def sentence(thing: str, noun: str, look: str, size: str, place: str, background: str) -> str:
    """ "a bright cartoon of a large cat on the left, striped background"."""
    text = " ".join(w for w in ("a", look, noun, "of a", size, thing, place) if w)
    return text + (f", {background} background" if background else "")


class ClipCaptioner:
    """Captions by retrieval with CLIP over a grammar of style, look, size, place and background.

    The object is the class that the standard prompt finds; then, slot by slot, the word whose
    sentence fits the image best ("nothing" takes part). So a caption says what the model believes,
    true or not.

    Args:
        clip: the model.
        objects: names that a caption can have as its object.
    """

    def __init__(self, clip: Clip, objects: Sequence[str]) -> None:
        self.clip, self.objects = clip, [name.replace("_", " ").strip() for name in objects]
        self._slots: dict[int, dict[str, Tensor]] = {}
        self._keywords: dict[str, Span | None] = {}

    def caption(self, image) -> str:
        """Caption of a PIL image."""
        import numpy as np

        from tpt_nb.core.images import as_rgb
        from tpt_nb.views import center_view

        pixels = np.asarray(center_view(as_rgb(image), self.clip.image_size)).copy()
        view = torch.from_numpy(pixels).permute(2, 0, 1)[None]
        return self.captions(self.clip.encode_views(view))[0]

    @torch.no_grad()
    def captions(self, features: Tensor, ids: Sequence[str] | None = None) -> list[str]:
        """Captions of images by their features ``[N,D]``; ``ids`` are not needed."""
        x = features.to(self.clip.device).float()
        found = (x @ self._objects.T).argmax(1).tolist()
        out = []
        for row, thing in zip(x, found, strict=True):
            words = dict(PLAIN)
            for slot, vectors in self._slot_features(thing).items():
                words[slot] = SLOTS[slot][int((vectors @ row).argmax())]
            out.append(sentence(self.objects[thing], **words))
        return out

    def keyword(self, caption: str) -> Span | None:
        """The word that is most similar to the whole caption (KeyBERT's rule, CLIP's text tower).

        Like KeyBERT with unigrams and no stop words: of "birthday cake" one word at most. None if
        there is no word of two letters or more.
        """
        if caption not in self._keywords:
            spans = words_of(caption)
            if spans:
                texts = [caption, *(caption[a:b].lower() for a, b in spans)]
                with quiet_tokens():
                    features = self.clip.encode_text(texts)
                self._keywords[caption] = spans[int((features[1:] @ features[0]).argmax())]
            else:
                self._keywords[caption] = None
        return self._keywords[caption]

    @functools.cached_property
    def _objects(self) -> Tensor:
        with quiet_tokens():
            return self.clip.encode_text([STANDARD.format(name) for name in self.objects]).float()

    def _slot_features(self, thing: int) -> dict[str, Tensor]:
        if thing not in self._slots:
            name = self.objects[thing]
            texts = [
                sentence(name, **PLAIN | {slot: word}) + "."
                for slot, words in SLOTS.items()
                for word in words
            ]
            with quiet_tokens():
                parts = self.clip.encode_text(texts).float().split([len(w) for w in SLOTS.values()])
            self._slots[thing] = dict(zip(SLOTS, parts, strict=True))
        return self._slots[thing]


class ViTGPT2:
    """The project's captioner and keyword: ViT-GPT2 and KeyBERT, loaded when first used.

    Args:
        device: of the captioner.
        name: on the Hugging Face hub, or a folder.
        fetch: image id -> PIL image, for :meth:`captions`.
        cache: JSON file of captions by image id; None keeps none.
        keywords: a KeyBERT; None makes the default one.
    """

    def __init__(
        self,
        device: str = "cpu",
        name: str = "nlpconnect/vit-gpt2-image-captioning",
        fetch: Callable | None = None,
        cache: Path | None = None,
        keywords=None,
    ) -> None:
        self.device, self.name, self.fetch, self.cache = device, name, fetch, cache
        self._keyword_model = keywords
        self._known: dict[str, str] = {}
        if cache is not None and cache.is_file():
            self._known = json.loads(cache.read_text("utf-8"))

    @functools.cached_property
    def _parts(self) -> tuple:
        try:
            from transformers import AutoTokenizer, VisionEncoderDecoderModel, ViTImageProcessor
        except ImportError:
            raise ValueError(_extras("transformers")) from None
        try:
            model = VisionEncoderDecoderModel.from_pretrained(self.name).to(self.device).eval()
            return (
                model,
                ViTImageProcessor.from_pretrained(self.name),
                AutoTokenizer.from_pretrained(self.name),
            )
        except OSError as error:
            first = str(error).strip().split("\n")[0]
            raise ValueError(
                f"the captioner {self.name} cannot be loaded ({first}); it is downloaded once, "
                "about 1 GB. Without a network use captioner=clip."
            ) from error

    def caption(self, image) -> str:
        """Caption of a PIL image."""
        return self.caption_batch([image])[0]

    @torch.no_grad()
    def caption_batch(self, images: Sequence) -> list[str]:
        """Captions of PIL images: beam search, 4 beams, at most 16 tokens, as the project has."""
        model, processor, tokenizer = self._parts
        rgb = [image.convert("RGB") for image in images]
        pixels = processor(images=rgb, return_tensors="pt").pixel_values.to(self.device)
        ids = model.generate(pixels, max_length=16, num_beams=4)
        return [text.strip() for text in tokenizer.batch_decode(ids, skip_special_tokens=True)]

    def captions(self, features: Tensor, ids: Sequence[str]) -> list[str]:
        """Captions of images by id, from the cache where they are there."""
        missing = [i for i in ids if i not in self._known]
        if missing:
            if self.fetch is None:
                raise ValueError("this captioner needs the images: give it fetch.")
            texts = self.caption_batch([self.fetch(i) for i in missing])
            self._known.update(zip(missing, texts, strict=True))
            if self.cache is not None:
                self.cache.parent.mkdir(parents=True, exist_ok=True)
                temporary = self.cache.with_suffix(f".{os.getpid()}.tmp")
                temporary.write_text(json.dumps(self._known), "utf-8")
                os.replace(temporary, self.cache)
        return [self._known[i] for i in ids]

    def keyword(self, caption: str) -> Span | None:
        """Place of KeyBERT's best word in the caption; None if there is none."""
        if self._keyword_model is None:
            try:
                from keybert import KeyBERT
            except ImportError:
                raise ValueError(_extras("keybert")) from None
            self._keyword_model = KeyBERT()
        found = self._keyword_model.extract_keywords(
            caption, keyphrase_ngram_range=(1, 1), stop_words=None
        )
        return find_word(caption, found[0][0]) if found else None
