"""TODO."""

from tpt_nb.methods.method import Adapted
from tpt_nb.methods.mta import mta
from tpt_nb.methods.online import ONLINE, Cache, boostadapter, tda
from tpt_nb.methods.registry import METHODS
from tpt_nb.methods.tps import tps
from tpt_nb.methods.tpt import tpt
from tpt_nb.methods.tpt_variants import ctpt, rtpt, tpt_confident
from tpt_nb.methods.tune_encoder import bind, tune_encoder
from tpt_nb.methods.tuning import EXACT, OPTIMIZERS, WORTH
from tpt_nb.methods.votes import TIE, contrast_vote, vote, zero, zero_fp16
from tpt_nb.methods.zero_shot import confident_view, zero_shot

__all__ = [
    "Adapted",
    "Cache",
    "EXACT",
    "METHODS",
    "ONLINE",
    "OPTIMIZERS",
    "TIE",
    "WORTH",
    "bind",
    "boostadapter",
    "confident_view",
    "contrast_vote",
    "ctpt",
    "mta",
    "rtpt",
    "tda",
    "tps",
    "tpt",
    "tpt_confident",
    "tune_encoder",
    "vote",
    "zero",
    "zero_fp16",
    "zero_shot",
]
