"""The table of the methods: one line each. :func:`register` adds one for this process."""

from tpt_nb.core.messages import unknown
from tpt_nb.methods import (
    bca,
    dota,
    dpe,
    freetta,
    memo,
    mta,
    norms,
    online,
    onzeta,
    parts_and_whole,
    sts,
    tps,
    tpt,
    tpt_variants,
    transductive,
    tune_encoder,
    votes,
    zero_shot,
)
from tpt_nb.methods.caption_prompts import adapt as caption_prompts
from tpt_nb.methods.difftpt import adapt as difftpt
from tpt_nb.methods.method import Method
from tpt_nb.methods.ra_tta import adapt as ra_tta

METHODS: dict[str, Method] = {
    "zero_shot": zero_shot.ZERO_SHOT,
    "confident_view": zero_shot.CONFIDENT_VIEW,
    "tpt": tpt.METHOD,
    "vote": votes.VOTE,
    "zero": votes.ZERO,
    "zero_fp16": votes.ZERO_FP16,
    "mta": mta.METHOD,
    "tps": tps.METHOD,
    "sts": sts.METHOD,
    "tpt_confident": tpt_variants.TPT_CONFIDENT,
    "rtpt": tpt_variants.RTPT,
    "ctpt": tpt_variants.CTPT,
    "contrast_vote": votes.CONTRAST_VOTE,
    "parts_and_whole": parts_and_whole.METHOD,
    "tda": online.TDA,
    "boostadapter": online.BOOSTADAPTER,
    "dota": dota.METHOD,
    "freetta": freetta.METHOD,
    "bca": bca.METHOD,
    "onzeta": onzeta.METHOD,
    "dpe": dpe.METHOD,
    "parts_and_whole_online": parts_and_whole.ONLINE,
    "bn": norms.BN,
    "tent": norms.TENT,
    "memo": memo.METHOD,
    "stata": transductive.STATA,
    "transclip": transductive.TRANSCLIP,
    "tune_encoder": tune_encoder.METHOD,
    "caption_prompts": caption_prompts.METHOD,
    "ra_tta": ra_tta.METHOD,
    "difftpt": difftpt.METHOD,
    "difftpt_vote": difftpt.VOTE,
}


def names() -> list[str]:
    """The methods, in the order of the table."""
    return list(METHODS)


def get(name: str) -> Method:
    """A method by its name; ``ValueError`` names the closest known one."""
    if name not in METHODS:
        raise ValueError(unknown("method", name, METHODS))
    return METHODS[name]


def register(name: str, method: Method) -> None:
    """Add a method for this process: command line, sweep, planner and leaderboard then know it."""
    METHODS[name] = method


def translate(name: str) -> tuple[str, dict]:
    """The present name of a method, and the options that an older name stood for."""
    for present, method in METHODS.items():
        if name in method.aliases:
            return present, dict(method.aliases[name])
    get(name)
    return name, {}
