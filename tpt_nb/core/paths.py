"""Where things are: the repository, the data that ships with it, the cache."""

import os
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("TPT_NB_DATA") or REPO / "data")


def cache_dir() -> Path:
    """Folder for what can be computed again: ``$TPT_NB_CACHE``, else ``~/.cache/tpt_nb``.

    Raises ``OSError`` if there is neither the variable nor a home folder.
    """
    if named := os.environ.get("TPT_NB_CACHE"):
        return Path(named)
    try:
        return Path.home() / ".cache" / "tpt_nb"
    except RuntimeError as error:
        raise OSError("there is no home folder: set TPT_NB_CACHE to a folder") from error


def datasets_dir() -> Path:
    """Folder of real data sets: ``$TPT_NB_DATASETS``, else ``datasets`` in the cache."""
    return Path(os.environ.get("TPT_NB_DATASETS") or cache_dir() / "datasets")
