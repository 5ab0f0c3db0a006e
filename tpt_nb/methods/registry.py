"""The table of the methods."""

import functools

from tpt_nb.methods.caption_prompts import adapt as _captions
from tpt_nb.methods.difftpt import adapt as _diffusion
from tpt_nb.methods.mta import mta
from tpt_nb.methods.online import boostadapter, tda
from tpt_nb.methods.ra_tta import adapt as _retrieval
from tpt_nb.methods.tps import tps
from tpt_nb.methods.tpt import tpt
from tpt_nb.methods.tpt_variants import ctpt, rtpt, tpt_confident
from tpt_nb.methods.tune_encoder import bind, tune_encoder
from tpt_nb.methods.votes import contrast_vote, vote, zero, zero_fp16
from tpt_nb.methods.zero_shot import confident_view, zero_shot

METHODS = {
    f.__name__: f
    for f in (
        zero_shot, confident_view, tpt, vote, zero, zero_fp16, mta, tps, tpt_confident, rtpt, ctpt,
        contrast_vote, tda, boostadapter, tune_encoder, _captions.caption_prompts,
        _retrieval.ra_tta, _diffusion.difftpt, _diffusion.difftpt_code, _diffusion.difftpt_paper,
        _diffusion.difftpt_vote,
    )
}  # fmt: skip
tda.online = boostadapter.online = True
tune_encoder.bind = bind
_captions.caption_prompts.bind = _captions.bind
_retrieval.ra_tta.bind = _retrieval.bind
for _name in _diffusion.NAMES:
    METHODS[_name].bind = functools.partial(_diffusion.bind, METHODS[_name])
    METHODS[_name].check = _diffusion.check_pictures
