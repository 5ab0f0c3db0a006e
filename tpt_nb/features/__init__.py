"""TODO."""

from tpt_nb.features.encode import AHEAD, encode, fill
from tpt_nb.features.shards import (
    FORMAT,
    STALE_SECONDS,
    Features,
    Store,
    cache_key,
    manifest,
    pack_shard,
    planned,
    read_shard,
    read_shards,
)

__all__ = [
    "AHEAD",
    "FORMAT",
    "Features",
    "STALE_SECONDS",
    "Store",
    "cache_key",
    "encode",
    "fill",
    "manifest",
    "pack_shard",
    "planned",
    "read_shard",
    "read_shards",
]
