"""How a tokenizer lays a text out: what it puts before and behind it, and where the text is.

OpenAI's puts a start token before the text, an end token behind it, and fills up to 77 with zeros;
SigLIP's has no start token and fills up to 64, with its end token or with zeros.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

Tokenizer = Callable[[list[str]], Tensor]  # sentences -> token ids [N,L]


@dataclass(frozen=True)
class Frame:
    """What stands around a text: tokens before it, its end token, padding up to ``length``."""

    start: tuple[int, ...]
    end: int
    pad: int
    length: int


def frame_of(tokenizer: Tokenizer) -> Frame:
    """Found out by asking: an empty text and another one differ where the text begins."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        empty, some = tokenizer(["", "a"]).tolist()
    begin = next(i for i, (one, other) in enumerate(zip(empty, some, strict=True)) if one != other)
    return Frame(tuple(empty[:begin]), empty[begin], empty[-1], len(empty))


def token_lists(tokenizer: Tokenizer, texts: Sequence[str], frame: Frame) -> list[list[int]]:
    """Token ids of each text without start, end and padding."""
    rows = [row[len(frame.start) :] for row in tokenizer(list(texts)).tolist()]
    return [row[: row.index(frame.end)] if frame.end in row else row for row in rows]


def name_tokens(
    tokenizer: Tokenizer, names: Sequence[str], frame: Frame
) -> list[tuple[list[int], list[int]]]:
    """Tokens of "name." split behind the name, as CoOp does: the sentence decides.

    Without a start token a name may be spelled otherwise at the beginning of a text than behind a
    word, where it stands in a prompt; a word before it is then put there, and taken off again.
    """
    lead = "" if frame.start else "x "
    sentences = token_lists(tokenizer, [f"{lead}{name}." for name in names], frame)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the sentences have warned of the same tokens
        plain = token_lists(tokenizer, [f"{lead}{name}" for name in names], frame)
        skip = len(token_lists(tokenizer, ["x"], frame)[0]) if lead else 0
    return [(s[skip : len(p)], s[len(p) :]) for s, p in zip(sentences, plain, strict=True)]
