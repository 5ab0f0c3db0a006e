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
import re
import warnings
from collections.abc import Callable, Iterator, Sequence

import torch

from tpt_nb.models import Clip, text_tower

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


def find_word(text: str, word: str) -> Span | None:
    """Span of the first occurrence of a whole word, whatever its case; None if it is not there."""
    match = re.search(rf"\b{re.escape(word)}\b", text, flags=re.IGNORECASE)
    return match.span() if match else None


def _extras(package: str) -> str:
    return (
        f"the captioner vit-gpt2 needs {package}: pip install -r ci/requirements-extras.txt. "
        "captioner=clip works without it."
    )


def _clean(name: str) -> str:
    return name.replace("_", " ").strip()
