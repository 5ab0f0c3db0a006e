"""Features of many sentences, each encoded once; and which of their tokens a model knows."""

import contextlib
import warnings
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from tpt_nb.models import Clip, causal_tower, has_plain_attention, project_text, text_tower


@contextlib.contextmanager
def quiet_tokens() -> Iterator[None]:
    """No warning per token that MiniCLIP's training never saw; :func:`known_share` counts them."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the token .* was not in the training captions")
        warnings.filterwarnings("ignore", message="a text is longer than")
        yield


def _known(clip: Clip, texts: Sequence[str]) -> list[Tensor]:
    """Per text, of each token: has it an embedding? Those that MiniCLIP never saw are zeros."""
    known = (text_tower(clip.model).token_embedding.weight != 0).any(dim=1).cpu()
    with quiet_tokens():
        rows = clip.tokenizer(list(texts)) if texts else []
    return [known[row[1 : int(row.argmax())]] for row in rows]


def known_share(clip: Clip, texts: Sequence[str]) -> float:
    """Share of the tokens of these texts that the model knows (1 for a CLIP that saw all)."""
    known = torch.cat([torch.empty(0, dtype=torch.bool), *_known(clip, texts)])
    return float(known.float().mean()) if len(known) else 1.0


def known_words(clip: Clip, texts: Sequence[str]) -> list[str]:
    """The texts without the words that have a token of which the model knows nothing."""
    words = sorted({word for text in texts for word in text.split()})
    kept = {w for w, known in zip(words, _known(clip, words), strict=True) if known.all()}
    return [" ".join(word for word in text.split() if word in kept) for text in texts]


@torch.no_grad()
def encode_once(
    clip: Clip, lists: Sequence[Sequence[str]], memo: dict[str, Tensor] | None = None
) -> tuple[Tensor, int]:
    """Features of lists of sentences of one length, ``[B,C,D]``, and how many were encoded.

    A sentence is encoded once; ``memo`` holds those from before, and gets the new ones.
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
    with quiet_tokens():
        if len(texts) < 2 or not has_plain_attention(tower):
            return clip.encode_text(list(texts)).float()
        tokens = clip.tokenizer(list(texts))
    ends = tokens.argmax(dim=1)  # of the end-of-text token, which has the largest id
    alike = int((tokens == tokens[0]).all(dim=0).long().cumprod(0).sum())
    alike = min(alike, int(ends.min()))  # a rest has its end-of-text token at least
    inputs = tower.token_embedding(tokens[:, : int(ends.max()) + 1].to(clip.device))
    inputs = inputs + tower.positional_embedding[: inputs.shape[1]]
    members = [(ends == end).nonzero()[:, 0] for end in ends.unique()]
    rests = [inputs[m.to(inputs.device), alike : ends[m[0]] + 1][None] for m in members]
    rows = project_text(tower, causal_tower(tower, inputs[:1, :alike].contiguous(), rests))[0]
    return F.normalize(rows, dim=-1).float()[torch.cat(members).argsort().to(rows.device)]
