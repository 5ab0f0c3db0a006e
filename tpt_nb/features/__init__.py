"""Stage 1: images -> views -> features, once, kept on disk.

Never import methods or runs here. Another way to make features ends in ``shards.write_shard``.
"""

from tpt_nb.features.attack import Pgd, attack, attacked, zero_shot_loss
from tpt_nb.features.encoding import encode
from tpt_nb.features.given import find_given, read_given, read_rows
from tpt_nb.features.shards import Features, cache_key, manifest, read_shards

__all__ = [
    "Features", "Pgd", "attack", "attacked", "cache_key", "encode", "find_given", "manifest",
    "read_given", "read_rows", "read_shards", "zero_shot_loss",
]  # fmt: skip
