"""DiffTPT: generators of variations, their pictures on disk, and the methods on them.

Never imported here: runs; nor, at import, diffusers or transformers: only making pictures needs
them. One more generator: a class with ``spec()`` and ``make(image, seeds)``, for load_generator.
"""

from tpt_nb.methods.difftpt.adapt import (
    GENERATE,
    METHOD,
    NAME,
    VOTE,
    Row,
    as_row,
    filter_views,
    generated_features,
    make_pictures,
    pictures_for,
)
from tpt_nb.methods.difftpt.folder import PictureFolder
from tpt_nb.methods.difftpt.network import (
    SIDE,
    MiniGenerator,
    Network,
    as_bytes,
    build_schedule,
    denoise,
    require_diffusers,
    start_noise,
)
from tpt_nb.methods.difftpt.pictures import (
    file_name,
    generate,
    part_of,
    picture_seed,
    pictures_of,
    variations,
)
from tpt_nb.methods.difftpt.pipeline import PAPER, PipelineGenerator, load_generator

__all__ = [
    "GENERATE", "METHOD", "NAME", "PAPER", "SIDE", "VOTE", "MiniGenerator", "Network",
    "PictureFolder", "PipelineGenerator", "Row", "as_bytes", "as_row", "build_schedule", "denoise",
    "file_name", "filter_views", "generate", "generated_features", "load_generator",
    "make_pictures", "part_of", "picture_seed", "pictures_for", "pictures_of", "require_diffusers",
    "start_noise", "variations",
]  # fmt: skip
