"""From a caption to one prompt per class, as the study's second project (LuCazzola/TTA_DL-Project)
does it: every class name in the place of the caption's keyword; with repairs, switched on one by
one. Text alone.
"""

import functools
import re
from collections.abc import Sequence

REPAIRS = {
    "span": "replace the keyword where it was found, once; not every equal piece of a word",
    "limit": "shorten the context to the token limit; never the label, never at 70 characters",
    "article": "a or an, as the label asks for",
    "suffix": "a photo of a {label}, {context}: the caption without its subject, behind the label",
    "average": "mean of the features of the caption prompt and of the standard prompt",
    "weight": "as average, the weight by how well the caption fits the image",
}
CHARACTERS = 70  # the project cuts prompts there
TOKENS = 77  # and CLIP there
STANDARD = "a photo of a {}."
ARTICLES = ("a", "an", "the", "one", "two", "some", "this", "that")

Span = tuple[int, int]


def plain_name(name: str) -> str:
    """A class name as it stands in a sentence: "hot_dog" -> "hot dog"."""
    return name.replace("_", " ").strip()


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


def find_word(text: str, word: str) -> Span | None:
    """Span of the first occurrence of a whole word, whatever its case; None if it is not there."""
    match = re.search(rf"\b{re.escape(word)}\b", text, flags=re.IGNORECASE)
    return match.span() if match else None


def parse_repairs(repairs: str | Sequence[str]) -> tuple[str, ...]:
    """ "span+article", "all", "none" or names, in the order of ``REPAIRS``; else ``ValueError``."""
    if isinstance(repairs, str):
        if repairs in ("all", "none", ""):
            return tuple(REPAIRS) if repairs == "all" else ()
        repairs = re.split(r"[+,\s]+", repairs.strip())
    if bad := [r for r in repairs if r not in REPAIRS]:
        raise ValueError(
            f"unknown repairs {', '.join(map(repr, bad))}; known: all, none, or some of "
            f"{'+'.join(REPAIRS)}."
        )
    return tuple(r for r in REPAIRS if r in repairs)


def personal_prompts(
    caption: str, span: Span | None, classnames: Sequence[str], repairs: str | Sequence[str] = ()
) -> list[str]:
    """One prompt per class from one caption.

    Without repairs as the project does: ``caption.replace(keyword, label)``, the keyword in lower
    case as KeyBERT gives it, the result cut at 70 characters. It may well make all prompts the
    same (the keyword is not found again, the label is cut off).

    Args:
        span: of the keyword; None (or an empty caption) gives the standard prompts.
        repairs: see ``REPAIRS``; "average" and "weight" concern features and do nothing here.
    Raises:
        ValueError: a span outside the caption, unknown repairs.
    """
    repairs = parse_repairs(repairs)
    names = [plain_name(name) for name in classnames]
    if span is None or not caption.strip():
        return [STANDARD.format(name) for name in names]
    start, end = span
    if not 0 <= start < end <= len(caption):
        raise ValueError(f"span {span} lies outside the caption of {len(caption)} characters.")
    word = caption[start:end].lower()
    if not {"span", "limit", "article", "suffix"} & set(repairs):
        return [caption.replace(word, name)[:CHARACTERS] for name in names]
    if "suffix" in repairs:
        context = context_of(caption, span)
        parts = [("a photo of a ", name, f", {context}." if context else ".") for name in names]
    else:
        parts = [(caption[:start], name, caption[end:]) for name in names]
        if "span" not in repairs:  # every other occurrence too, as str.replace does
            parts = [(b.replace(word, n), n, a.replace(word, n)) for b, n, a in parts]
    if "article" in repairs:
        parts = [(_agree(before, name), name, after) for before, name, after in parts]
    if "limit" in repairs:
        return [_fit(*part) for part in parts]
    return ["".join(part)[:CHARACTERS] for part in parts]


def context_of(caption: str, span: Span) -> str:
    """The caption without the noun chunk around the keyword, to be put behind a label.

    "a cartoon of a large cat on the left" -> "a cartoon on the left". The chunk is the keyword,
    and up to four words before it if the first of them is an article; an "of" that is left over
    goes too, and "a photo" at the start.
    """
    start, end = span
    for word in list(re.finditer(r"[\w'-]+", caption[:start]))[:-5:-1]:
        if re.search(r"[.,;:!?]", caption[word.end() : start]):
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
    article = with_article(label).split(" ", 1)[0]

    def fitting(match: re.Match) -> str:
        return (article.capitalize() if match[1][0].isupper() else article) + match[2]

    return re.sub(r"\b(an?)(\s+)$", fitting, before, flags=re.IGNORECASE)


def _fit(before: str, label: str, after: str) -> str:
    """Drop words at the far end of the context until the prompt fits; the label stays whole."""
    while token_length(before + label + after) > TOKENS:
        if after.strip(" .,;:!?"):
            after = re.sub(r"\S+$", "", after.rstrip(" .,;:!?")).rstrip(" ,;:")
        elif before.strip():
            before, after = re.sub(r"^\s*\S+\s*", "", before), ""
        else:
            break  # the label alone is too long: the tokenizer will say so
    return before + label + after


def token_length(text: str) -> int:
    """Tokens of a text in CLIP's vocabulary, start and end included; never cut at 77."""
    return len(_tokenizer().encode(text)) + 2


@functools.cache
def _tokenizer():
    from open_clip.tokenizer import SimpleTokenizer

    return SimpleTokenizer()
