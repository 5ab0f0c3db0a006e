"""TODO."""

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
from tpt_nb.models.coop import load_coop, save_coop
from tpt_nb.models.load import (
    ARCHIVES_DIR,
    MINI_CONFIG,
    MINI_PATH,
    build_mini,
    fetch_weights,
    load,
    load_mini,
    restore_causal_mask,
    save_mini,
    to_openai_state_dict,
    weights_file,
)
from tpt_nb.models.packed import ROWS, FrozenBlock, Linear, Packed, jacobian, lay_out
from tpt_nb.models.prompts import POSITIONS, Prompts
from tpt_nb.models.templates import TEMPLATES, TemplatePrompts, template_features
from tpt_nb.models.tower import (
    LONGEST,
    QUICK_GELU,
    blocks_of,
    causal_tower,
    has_plain_attention,
    prefix_states,
    suffix_rows,
)
from tpt_nb.models.train import train_coop

__all__ = [
    "ARCHIVES_DIR",
    "Clip",
    "EOT",
    "FrozenBlock",
    "LONGEST",
    "Linear",
    "MINI_CONFIG",
    "MINI_PATH",
    "OPENAI_MODELS",
    "POSITIONS",
    "Packed",
    "Prompts",
    "QUICK_GELU",
    "ROWS",
    "SOT",
    "TEMPLATES",
    "TemplatePrompts",
    "blocks_of",
    "build_mini",
    "causal_tower",
    "fetch_weights",
    "has_plain_attention",
    "jacobian",
    "lay_out",
    "load",
    "load_coop",
    "load_mini",
    "prefix_states",
    "project_text",
    "restore_causal_mask",
    "run_text_tower",
    "save_coop",
    "save_mini",
    "suffix_rows",
    "template_features",
    "text_tower",
    "to_openai_state_dict",
    "train_coop",
    "weights_file",
    "weights_fingerprint",
    "wrap",
]
