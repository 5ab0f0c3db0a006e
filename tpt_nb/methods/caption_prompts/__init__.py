"""Prompts from an image's own caption (the study's second project): captioners, words, the method.

Nothing here may import a run. A repair goes into ``words.py``, a captioner into ``captioners.py``.
"""

from tpt_nb.methods.caption_prompts.adapt import (
    METHOD,
    Options,
    caption_prompts,
    caption_weight,
    mix,
)
from tpt_nb.methods.caption_prompts.captioners import ClipCaptioner, ViTGPT2, make_captioner
from tpt_nb.methods.caption_prompts.teachers import Teacher, from_answers, from_captions, teach
from tpt_nb.methods.caption_prompts.texts import (
    encode_once,
    known_share,
    known_words,
    quiet_tokens,
)
from tpt_nb.methods.caption_prompts.words import (
    REPAIRS,
    context_of,
    find_word,
    parse_repairs,
    personal_prompts,
    plain_name,
    with_article,
)

__all__ = [
    "METHOD", "Options", "caption_prompts", "caption_weight", "mix",
    "ClipCaptioner", "ViTGPT2", "make_captioner",
    "Teacher", "from_answers", "from_captions", "teach",
    "encode_once", "known_share", "known_words", "quiet_tokens",
    "REPAIRS", "context_of", "find_word", "parse_repairs", "personal_prompts",
    "plain_name", "with_article",
]  # fmt: skip
