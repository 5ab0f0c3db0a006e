"""CLIP by name, the prompts around it, and its text tower computed without doing anything twice.

Never import data sets or views here. One more way to load a model: a branch of ``loading.load``.
"""

from tpt_nb.models.clip import (
    EOT,
    OPENAI_MODELS,
    SOT,
    Clip,
    project_text,
    run_text_tower,
    text_tower,
    weights_fingerprint,
    wrap,
)
from tpt_nb.models.coop import BACKBONES, find_coop, load_coop, save_coop
from tpt_nb.models.loading import (
    MINI_CONFIG,
    MINI_PATH,
    build_mini,
    fetch_weights,
    load,
    load_mini,
    save_mini,
    weights_file,
)
from tpt_nb.models.packed import Packed
from tpt_nb.models.prompts import POSITIONS, Prompts
from tpt_nb.models.templates import TemplatePrompts, template_features, template_sentences
from tpt_nb.models.tower import LONGEST, causal_tower, has_plain_attention, prefix_states
from tpt_nb.models.train import train_coop

__all__ = [
    "BACKBONES", "EOT", "LONGEST", "MINI_CONFIG", "MINI_PATH", "OPENAI_MODELS", "POSITIONS", "SOT",
    "Clip", "Packed", "Prompts", "TemplatePrompts", "build_mini", "causal_tower", "fetch_weights",
    "find_coop", "has_plain_attention", "load", "load_coop", "load_mini", "prefix_states",
    "project_text", "run_text_tower", "save_coop", "save_mini", "template_features",
    "template_sentences", "text_tower", "train_coop", "weights_file", "weights_fingerprint",
    "wrap",
]  # fmt: skip
