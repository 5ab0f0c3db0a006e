"""Writing a file whole or not at all."""

import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path


def _write_atomically(path: Path, data: bytes) -> None:
    temporary = path.parent / f".tmp-{os.getpid()}-{secrets.token_hex(4)}"
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _write_json(path: Path, value: Mapping) -> None:
    """Whole or not at all: to a temporary name first."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(temporary, path)
