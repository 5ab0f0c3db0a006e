"""Prompts from a caption of the image itself: the caption, with each class name as its subject.

The second project of the study ("caption prompts", LuCazzola/TTA_DL-Project): caption the image,
find the caption's keyword, put every class name in its place, classify with these prompts. It
lost accuracy there. Here it is built as it was, and with repairs that can be switched on one by
one (``REPAIRS``).

A captioner has ``caption(image) -> str`` and ``keyword(caption) -> span``. ``ClipCaptioner`` finds
the caption by retrieval with the CLIP at hand, over a small grammar, so that everything runs
offline; ``ViTGPT2`` is the project's: a ViT-GPT2 captioner and KeyBERT (downloads, optional
packages).
"""

import contextlib
import functools
import json
import os
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from tpt_nb.adapt import METHODS, Adapted, _check_features
from tpt_nb.clip import Clip, project_text, text_tower
from tpt_nb.losses import entropy
from tpt_nb.paths import cache_dir
from tpt_nb.tower import causal_tower, has_plain_attention

REPAIRS = {
    "span": "replace the keyword where it was found, once; not every equal piece of a word",
    "limit": "shorten the context to the token limit; never the label, never at 70 characters",
    "article": "a or an, as the label asks for",
    "suffix": "a photo of a {label}, {context}: the caption without its subject, behind the label",
    "average": "mean of the features of the caption prompt and of the standard prompt",
    "weight": "as average, the weight by how well the caption fits the image",
}
CHARACTERS = 70  # the project cuts prompts there
STANDARD = "a photo of a {}."
ARTICLES = ("a", "an", "the", "one", "two", "some", "this", "that")

Span = tuple[int, int]


# --- words ---------------------------------------------------------------------------------------


def with_article(name: str) -> str:
    """ "an apple", "a cat", "an hourglass"; by the first letters, with the common exceptions."""
    first = name.strip().lower()
    silent_h = first.startswith(("hour", "honest", "heir", "honour", "honor"))
    like_you = re.match(r"(uni|eu|ut[ei]|us[ae]|one\b|once)", first)
    vowel = first[:1] in tuple("aeiou") and not like_you
    return f"{'an' if vowel or silent_h else 'a'} {name}"


def words_of(text: str) -> list[Span]:
    """Spans of the words that KeyBERT considers: two letters, digits or underscores, or more."""
    return [match.span() for match in re.finditer(r"\b\w\w+\b", text)]


@contextlib.contextmanager
def quiet_tokens() -> Iterator[None]:
    """No warning per token that MiniCLIP's training never saw; :func:`known_share` counts them."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the token .* was not in the training captions")
        warnings.filterwarnings("ignore", message="a text is longer than")
        yield


def known_share(clip: Clip, texts: Sequence[str]) -> float:
    """Share of the tokens of these texts whose embedding is not zero (1 for a CLIP that saw all).

    MiniCLIP knows the tokens of its training captions only; the others are stored as zeros.
    """
    known = (text_tower(clip.model).token_embedding.weight != 0).any(dim=1).cpu()
    with quiet_tokens():
        rows = clip.tokenizer(list(texts))
    ids = torch.cat([row[1 : int(row.argmax())] for row in rows])
    return float(known[ids].float().mean()) if len(ids) else 1.0


def known_words(clip: Clip, texts: Sequence[str]) -> list[str]:
    """The texts without the words that have a token of which the model knows nothing."""
    words = sorted({word for text in texts for word in text.split()})
    known = (text_tower(clip.model).token_embedding.weight != 0).any(dim=1).cpu()
    with quiet_tokens():
        rows = clip.tokenizer(words) if words else []
    kept = {w for w, row in zip(words, rows, strict=True) if known[row[1 : row.argmax()]].all()}
    return [" ".join(word for word in text.split() if word in kept) for text in texts]


# --- prompts -------------------------------------------------------------------------------------


def parse_repairs(repairs: str | Sequence[str]) -> tuple[str, ...]:
    """ "span+article", "all", "none" or a sequence of names, in the order of ``REPAIRS``.

    Raises ``ValueError`` for a name that is not among them.
    """
    if isinstance(repairs, str):
        if repairs in ("all", "none", ""):
            return tuple(REPAIRS) if repairs == "all" else ()
        repairs = re.split(r"[+,\s]+", repairs.strip())
    unknown = [r for r in repairs if r not in REPAIRS]
    if unknown:
        raise ValueError(
            f"unknown repairs {', '.join(map(repr, unknown))}; known: all, none, or some of "
            f"{'+'.join(REPAIRS)}."
        )
    return tuple(r for r in REPAIRS if r in repairs)


def personal_prompts(
    caption: str,
    span: Span | None,
    classnames: Sequence[str],
    repairs: str | Sequence[str] = (),
    length: Callable[[str], int] | None = None,
    limit: int = 77,
) -> list[str]:
    """One prompt per class from one caption.

    Without repairs as the project does: ``caption.replace(keyword, label)``, the keyword in lower
    case as KeyBERT gives it, the result cut at 70 characters. It may well make all prompts the
    same (the keyword is not found again, the label is cut off).

    Args:
        span: place of the keyword, or None; then (also where the caption is empty) all prompts
            are the standard one.
        repairs: see ``REPAIRS``; "average" and "weight" concern features and do nothing here.
        length: tokens of a text, start and end included, for "limit"; default: an upper bound.
        limit: most tokens of a prompt.
    Raises:
        ValueError: a span outside the caption, unknown repairs.
    """
    repairs = parse_repairs(repairs)
    names = [name.replace("_", " ").strip() for name in classnames]
    if span is None or not caption.strip():
        return [STANDARD.format(name) for name in names]
    start, end = span
    if not 0 <= start < end <= len(caption):
        raise ValueError(f"span {span} lies outside the caption of {len(caption)} characters.")
    if "suffix" in repairs:
        context = context_of(caption, span)
        before, after = "a photo of a ", f", {context}." if context else "."
        parts = [(before, name, after) for name in names]
    elif "span" in repairs or "limit" in repairs or "article" in repairs:
        parts = [(caption[:start], name, caption[end:]) for name in names]
        if "span" not in repairs:  # every other occurrence too, as str.replace does
            word = caption[start:end].lower()
            parts = [(b.replace(word, n), n, a.replace(word, n)) for b, n, a in parts]
    else:
        word = caption[start:end].lower()
        return [caption.replace(word, name)[:CHARACTERS] for name in names]
    if "article" in repairs:
        parts = [(_agree(before, name), name, after) for before, name, after in parts]
    if "limit" in repairs:
        count = length or (lambda text: len(text.encode()) + 2)  # a token has a byte or more
        return [_fit(*part, count, limit) for part in parts]
    return ["".join(part)[:CHARACTERS] for part in parts]


def context_of(caption: str, span: Span) -> str:
    """The caption without the noun chunk around the keyword, to be put behind a label.

    "a cartoon of a large cat on the left" -> "a cartoon on the left". The chunk is the keyword,
    and up to four words before it if the first of them is an article; an "of" that is left over
    goes too, and "a photo" at the start.
    """
    start, end = span
    before = list(re.finditer(r"[\w'-]+", caption[:start]))
    for back in range(1, min(4, len(before)) + 1):
        word = before[-back]
        between = caption[word.end() : start]
        if re.search(r"[.,;:!?]", between):
            break
        if word.group().lower() in ARTICLES:
            start = word.start()
            break
    left = re.sub(r"\b(of|with)\s*$", "", caption[:start], flags=re.IGNORECASE)
    text = " ".join(f"{left} {caption[end:]}".split())
    text = re.sub(r"\s+([.,;:!?])", r"\1", text)
    text = re.sub(r"^(an?|the) (photo|picture|image)\b", "", text)  # the suffix has one in front
    return text.strip(" .,;:!?")


def _agree(before: str, label: str) -> str:
    """The text before a label with its article made to fit."""
    match = re.search(r"\b(an?)(\s+)$", before, flags=re.IGNORECASE)
    if not match:
        return before
    article = with_article(label).split(" ", 1)[0]
    article = article.capitalize() if match[1][0].isupper() else article
    return before[: match.start()] + article + match[2]


def _fit(before: str, label: str, after: str, length: Callable[[str], int], limit: int) -> str:
    """Drop words at the far end of the context until the prompt fits; the label stays whole."""
    while length(before + label + after) > limit:
        if after.strip(" .,;:!?"):
            after = after.rstrip(" .,;:!?")
            after = after[: len(after) - len(re.search(r"\S+$", after).group())].rstrip(" ,;:")
        elif before.strip():
            after = ""
            before = re.sub(r"^\s*\S+\s*", "", before)
        else:
            break  # the label alone is too long: the tokenizer will say so
    return before + label + after


def token_length(clip: Clip) -> Callable[[str], int]:
    """Tokens of a text in this model's tokenizer, start and end included; never cut at 77."""
    from open_clip.tokenizer import SimpleTokenizer

    tokenizer = _simple_tokenizer() if clip.name == "mini" else SimpleTokenizer()
    return lambda text: len(tokenizer.encode(text)) + 2


@functools.cache
def _simple_tokenizer():
    from open_clip.tokenizer import SimpleTokenizer

    return SimpleTokenizer()


# --- captioners ----------------------------------------------------------------------------------

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

        from tpt_nb.views import as_rgb, center_view

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


def find_word(text: str, word: str) -> Span | None:
    """Span of the first occurrence of a whole word, whatever its case; None if it is not there."""
    match = re.search(rf"\b{re.escape(word)}\b", text, flags=re.IGNORECASE)
    return match.span() if match else None


def _extras(package: str) -> str:
    return (
        f"the captioner vit-gpt2 needs {package}: pip install -r ci/requirements-extras.txt. "
        "captioner=clip works without it."
    )


# --- the method ----------------------------------------------------------------------------------


@torch.no_grad()
def encode_once(
    clip: Clip, lists: Sequence[Sequence[str]], memo: dict[str, Tensor] | None = None
) -> tuple[Tensor, int]:
    """Features of lists of sentences of one length, ``[B,C,D]``, and how many were encoded.

    A sentence that occurs in several lists is encoded once, and what the sentences of a list have
    in common at their beginning runs through the text tower once (:func:`encode_alike`).

    Args:
        memo: sentences that are known from before; new ones are added.
    """
    memo = {} if memo is None else memo
    known = len(memo)
    for some in lists:
        new = list(dict.fromkeys(text for text in some if text not in memo))
        if new:
            memo.update(zip(new, encode_alike(clip, new), strict=True))
    return torch.stack([torch.stack([memo[t] for t in some]) for some in lists]), len(memo) - known


@torch.no_grad()
def encode_alike(clip: Clip, texts: Sequence[str]) -> Tensor:
    """Features ``[N,D]`` as ``clip.encode_text``; cheaper if the texts begin with the same words.

    The tower is causal: the tokens that all texts have in common at the beginning do not see what
    follows, so they are computed once, and each text adds its own rest.
    """
    tower = text_tower(clip.model)
    if len(texts) < 2 or not has_plain_attention(tower):
        with quiet_tokens():
            return clip.encode_text(list(texts)).float()
    with quiet_tokens():
        tokens = clip.tokenizer(list(texts))
    ends = tokens.argmax(dim=1)  # of the end-of-text token, which has the largest id
    alike = int((tokens == tokens[0]).all(dim=0).long().cumprod(0).sum())
    alike = min(alike, int(ends.min()))  # a rest has its end-of-text token at least
    tokens = tokens[:, : int(ends.max()) + 1].to(clip.device)
    position = tower.positional_embedding
    prefix = (tower.token_embedding(tokens[:1, :alike]) + position[:alike]).contiguous()
    suffixes, order = [], []
    for end in sorted(set(ends.tolist())):
        members = (ends == end).nonzero()[:, 0]
        rest = tokens[members.to(tokens.device), alike : end + 1]
        suffixes.append((tower.token_embedding(rest) + position[alike : end + 1])[None])
        order.append(members)
    rows = project_text(tower, causal_tower(tower, prefix, suffixes))[0]
    return F.normalize(rows, dim=-1).float()[torch.cat(order).argsort().to(rows.device)]


def mix(standard: Tensor, personal: Tensor, weight: Tensor) -> Tensor:
    """Text features between the standard prompts ``[C,D]`` and an image's ``[B,C,D]``, unit norm.

    weight: ``[B]`` share of the caption prompts.
    """
    w = weight[:, None, None]
    return F.normalize((1 - w) * standard + w * personal, dim=-1)


def caption_weight(image: Tensor, caption: Tensor, standard: Tensor, scale: Tensor) -> Tensor:
    """Share of the caption prompts ``[B]``: softmax of caption against best standard prompt.

    0.5 if the caption fits the image exactly as well as the best standard prompt does.

    Args:
        image: ``[B,D]``; caption: ``[B,D]`` features of the captions; standard: ``[C,D]``.
    """
    own = (image * caption).sum(-1)
    best = (image @ standard.T).amax(-1)
    return torch.sigmoid(scale * (own - best))


@torch.no_grad()
def caption_prompts(
    features: Tensor,
    prompts,
    captioner=None,
    repairs: str | Sequence[str] = (),
    ids: Sequence[str] | None = None,
    memo: dict[str, Tensor] | None = None,
) -> Adapted:
    """Classify view 0 of each image with prompts made from its own caption.

    ``logits_before`` are those of the initial prompt, ``loss`` is the entropy of the prediction.

    Args:
        features: ``[B,V,D]``; only view 0 is used.
        captioner: has ``captions(features [B,D], ids)`` and ``keyword(caption)``.
        repairs: see ``REPAIRS``; none is the project's own procedure.
        memo: see :func:`encode_once`.
    """
    _check_features(features, prompts)
    if captioner is None:
        raise ValueError("caption_prompts needs a captioner: ClipCaptioner(clip, classnames).")
    repairs = parse_repairs(repairs)
    clip, names = prompts.clip, prompts.classnames
    x = features[:, 0].to(clip.device).float()
    scale = clip.logit_scale.to(x)
    before = scale * x @ prompts.text_features().to(x).T
    captions = captioner.captions(x, ids)
    length = token_length(clip) if "limit" in repairs else None
    lists = [
        personal_prompts(text, captioner.keyword(text), names, repairs, length) for text in captions
    ]
    text = encode_once(clip, lists, memo)[0].to(x)
    if "average" in repairs or "weight" in repairs:
        standard = encode_once(clip, [[STANDARD.format(_clean(n)) for n in names]], memo)[0][0]
        weight = torch.full((len(x),), 0.5, device=x.device)
        if "weight" in repairs:
            own = encode_once(clip, [[c or STANDARD.format("")] for c in captions], memo)[0][:, 0]
            weight = caption_weight(x, own.to(x), standard.to(x), scale)
        text = mix(standard.to(x), text, weight)
    logits = scale * torch.einsum("bd,bcd->bc", x, text)
    selected = torch.zeros(features.shape[:2], dtype=torch.bool, device=features.device)
    selected[:, 0] = True
    out = (t.to(features.device) for t in (logits, before, entropy(logits)))
    return Adapted(*out, selected)


def _clean(name: str) -> str:
    return name.replace("_", " ").strip()


def bind(config, clip: Clip, dataset) -> Callable:
    """``caption_prompts`` with the captioner that a (filled-in) run configuration names."""
    if config.captioner == "clip":
        captioner = ClipCaptioner(clip, dataset.classnames)
    else:
        position: Mapping[str, int] = {i: k for k, i in enumerate(dataset.ids)}
        name = f"vit-gpt2-{dataset.name}-{dataset.fingerprint[:16]}.json"
        captioner = ViTGPT2(
            config.device,
            fetch=lambda image_id: dataset[position[image_id]][0],
            cache=Path(config.cache or cache_dir()) / "captions" / name,
        )
    return functools.partial(caption_prompts, captioner=captioner)


caption_prompts.bind = bind
METHODS["caption_prompts"] = caption_prompts
