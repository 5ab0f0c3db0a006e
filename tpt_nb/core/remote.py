"""Image folders that are elsewhere: ``s3://``, ``gs://``, ``https://`` and what else fsspec knows.

Images are fetched one by one, when they are read, and kept in ``<cache>/remote``. Not with fsspec's
own caches: these take half a file, left by a transfer that broke, for the whole one.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from tpt_nb.core.files import write_whole
from tpt_nb.core.messages import first_line
from tpt_nb.core.paths import cache_dir


def _why(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"


def is_remote(root: str | Path) -> bool:
    """Is this an address such as ``s3://bucket/folder``, and not the path of a local folder?"""
    return isinstance(root, str) and "://" in root


@dataclass(frozen=True)
class Remote:
    """A folder at an address. Picklable: worker processes open connections of their own."""

    url: str

    def open(self) -> tuple:
        """fsspec's file system and the folder in it; ``ValueError`` if it knows no such address."""
        from fsspec.core import url_to_fs

        try:
            fs, base = url_to_fs(self.url)
        except ImportError as error:
            kind = self.url.split("://")[0]
            raise ValueError(f"{kind}:// needs a package that is not here: {error}") from error
        except ValueError as error:
            raise ValueError(f"no one here knows addresses such as {self.url}: {error}") from error
        return fs, base.rstrip("/")

    def files(self) -> list[tuple[str, int]]:
        """(path relative to the folder, size or -1) of all files, sorted, or as last listed.

        Raises ``ValueError`` for no address or no files; ``OSError`` if it was never reached.
        """
        (fs, base), listing = self.open(), self._kept("listing.json")
        try:
            found = fs.find(base, detail=True)
        except Exception as error:  # each file system has errors of its own
            if not listing.is_file():
                raise OSError(f"{self.url} cannot be listed: {_why(error)}") from error
            print(f"{self.url} cannot be reached ({_why(error)}); using its last listing")
            return [tuple(entry) for entry in json.loads(listing.read_text())]
        sizes = {path: info.get("size") for path, info in found.items()}
        files = sorted(
            (path.removeprefix(f"{base}/"), -1 if size is None else int(size))
            for path, size in sizes.items()
            if path.startswith(f"{base}/")
        )
        if not files:
            raise ValueError(f"{self.url} holds no files; is the address right?")
        listing.parent.mkdir(parents=True, exist_ok=True)
        write_whole(listing, json.dumps(files))
        return files

    def local(self, path: str) -> Path:
        """The copy of a file here, fetched if it is not there; ``OSError`` if that fails."""
        target = self._kept(f"files/{path}")
        if ".." in Path(path).parts or Path(path).is_absolute():
            raise ValueError(f"{path!r} does not lie within {self.url}")
        if not target.is_file():
            fs, base = self.open()
            try:
                data = fs.cat_file(f"{base}/{path}")
            except Exception as error:
                raise OSError(f"{self.url}/{path} cannot be fetched: {_why(error)}") from error
            target.parent.mkdir(parents=True, exist_ok=True)
            write_whole(target, data)
        return target

    def _kept(self, name: str) -> Path:
        key = hashlib.sha256(self.url.rstrip("/").encode()).hexdigest()[:16]
        return cache_dir() / "remote" / key / name
