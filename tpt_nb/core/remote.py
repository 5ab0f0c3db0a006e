"""Image folders that are elsewhere: ``s3://``, ``gs://``, ``https://`` and what else fsspec knows.

A remote folder is listed once per load; its images are fetched one by one, when they are read, into
``<cache>/remote/<hash of the address>/``, and stay there. Each comes under a temporary name and is
renamed when it is whole, so a run that is killed leaves nothing half-written and goes on with what
is there. Where the folder cannot be reached, its last listing and the images that are there serve.
"""

import hashlib
import json
import os
import secrets
from dataclasses import dataclass
from pathlib import Path

from tpt_nb.core.paths import cache_dir

PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs"}
PACKAGES |= {"http": "aiohttp", "https": "aiohttp", "az": "adlfs", "abfs": "adlfs"}


def is_remote(root: str | Path) -> bool:
    """Is this an address such as ``s3://bucket/folder``, and not the path of a local folder?"""
    return isinstance(root, str) and "://" in root


@dataclass(frozen=True)
class Remote:
    """A folder at an address. Picklable: worker processes open connections of their own."""

    url: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "url", self.url.rstrip("/"))

    @property
    def cache(self) -> Path:
        """Where the local copies are."""
        return cache_dir() / "remote" / hashlib.sha256(self.url.encode()).hexdigest()[:16]

    def files(self) -> list[tuple[str, int]]:
        """(path relative to the folder, size or -1) of all files, sorted.

        Raises:
            ValueError: nobody knows such an address, or a package for it is missing.
            OSError: it cannot be reached, and was never listed.
        """
        listing = self.cache / "listing.json"
        try:
            fs, base = self._open()
            found = fs.find(base, detail=True)
        except (ValueError, ImportError):
            raise
        except Exception as error:  # each file system has errors of its own
            if listing.is_file():
                print(f"{self.url} cannot be reached ({_first(error)}); using its last listing")
                return [tuple(entry) for entry in json.loads(listing.read_text())]
            raise OSError(f"{self.url} cannot be listed: {_first(error)}") from error
        base = base.rstrip("/") + "/"
        files = sorted(
            (path.removeprefix(base), -1 if info.get("size") is None else int(info["size"]))
            for path, info in found.items()
            if path.startswith(base)
        )
        if not files:
            raise ValueError(f"{self.url} holds no files; is the address right?")
        _write(listing, json.dumps(files).encode())
        return files

    def local(self, path: str) -> Path:
        """The local copy of a file of the folder, fetched if it is not there.

        Raises ``OSError`` if it cannot be fetched.
        """
        target = self.cache / "files" / path
        if ".." in Path(path).parts or not target.is_relative_to(self.cache):
            raise ValueError(f"{path!r} does not lie within {self.url}")
        if target.is_file():
            return target
        try:
            fs, base = self._open()
            data = fs.cat_file(f"{base.rstrip('/')}/{path}")
        except (ValueError, ImportError):
            raise
        except Exception as error:
            raise OSError(f"{self.url}/{path} cannot be fetched: {_first(error)}") from error
        _write(target, data)
        return target

    def _open(self):
        from fsspec.core import url_to_fs

        kind = self.url.split("://")[0]
        try:
            return url_to_fs(self.url)
        except ImportError as error:
            package = PACKAGES.get(kind)
            hint = f"pip install {package}" if package else str(error)
            raise ValueError(f"{kind}:// needs a package that is not here: {hint}") from error
        except ValueError as error:
            raise ValueError(f"no one here knows addresses such as {self.url}: {error}") from error


def _first(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"


def _write(target: Path, data: bytes) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name[:100]}.{os.getpid()}-{secrets.token_hex(3)}")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
