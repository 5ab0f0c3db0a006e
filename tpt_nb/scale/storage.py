"""A folder that many machines write to: here (a disk, NFS) or at any address that fsspec knows.

Files appear whole or not at all: under a temporary name that is then renamed, or, in object stores
(``s3://``, ``gs://`` ...), with one upload, of which nothing is seen before its end. What is
written twice is there once. An error that may pass is tried again after a pause that doubles;
``retried`` says what was.
"""

import contextlib
import errno
import os
import random
import secrets
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from tpt_nb.core.remote import Remote, is_remote

T = TypeVar("T")


TEMPORARY = ".tmp-"


WHOLE = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss")  # an upload is seen when it is complete


FULL = (errno.ENOSPC, errno.EDQUOT)


LASTING = (*FULL, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR,
           errno.EISDIR, errno.ENAMETOOLONG)  # fmt: skip


# what no second try mends; other exceptions than these come from the libraries behind fsspec
NO_USE = (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError, ValueError,
          TypeError, ImportError, NotImplementedError, AttributeError, KeyError)  # fmt: skip


@dataclass
class Storage:
    """A folder; ``url`` is a path or an address. Picklable.

    ``tries`` are made of every operation, the first pause is of ``pause`` seconds. ``retried`` has
    a line for every try that failed and was followed by another.
    """

    url: str
    tries: int = 6
    pause: float = 0.5
    retried: list[str] = field(default_factory=list)

    @property
    def remote(self) -> bool:
        return is_remote(self.url)

    def child(self, name: str) -> "Storage":
        """A folder in this one; what is retried there is listed here too."""
        url = f"{self.url.rstrip('/')}/{name}" if self.remote else str(Path(self.url) / name)
        return Storage(url, self.tries, self.pause, self.retried)

    def names(self) -> dict[str, int]:
        """Names and bytes of the files of the folder; none if there is no folder."""

        def local() -> dict[str, int]:
            with os.scandir(self.url) as entries:
                return {e.name: e.stat().st_size for e in entries if e.is_file()}

        def far() -> dict[str, int]:
            fs, base = self._open()
            fs.invalidate_cache()  # others write too
            found = fs.ls(base, detail=True)
            return {f["name"].rsplit("/", 1)[-1]: int(f["size"] or 0) for f in found
                    if f["type"] == "file"}  # fmt: skip

        try:
            found = self._again("list", "", far if self.remote else local)
        except FileNotFoundError:
            return {}
        return {name: size for name, size in found.items() if not name.startswith(TEMPORARY)}

    def read(self, name: str, start: int = 0, end: int | None = None) -> bytes:
        """The bytes of a file, or those from ``start`` to ``end``. Raises ``OSError``."""

        def local() -> bytes:
            with open(Path(self.url) / name, "rb") as file:
                file.seek(start)
                return file.read(-1 if end is None else end - start)

        def far() -> bytes:
            fs, base = self._open()
            return fs.cat_file(f"{base}/{name}", start=start or None, end=end)

        return self._again("read", name, far if self.remote else local)

    def write(self, name: str, data: bytes) -> None:
        """A file, whole or not at all. Raises ``OSError``, at once if the disk is full."""

        def local() -> None:
            folder = Path(self.url)
            folder.mkdir(parents=True, exist_ok=True)
            temporary = folder / self._temporary()
            try:
                with open(temporary, "xb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(temporary, folder / name)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise

        def far() -> None:
            fs, base = self._open()
            whole = self.url.split("://")[0] in WHOLE
            target = f"{base}/{name}"
            place = target if whole else f"{base}/{self._temporary()}"
            if not whole:
                fs.makedirs(base, exist_ok=True)
            try:
                fs.pipe_file(place, data)
                fs.invalidate_cache()
                size = fs.info(place)["size"]
                if size != len(data):  # an upload that was cut off and did not say so
                    raise OSError(f"{size} of {len(data)} bytes arrived")
                if not whole:
                    fs.mv(place, target)
            except BaseException:
                with contextlib.suppress(Exception):
                    fs.rm_file(place)
                raise

        self._again("write", name, far if self.remote else local)

    def delete(self, name: str) -> None:
        """Remove a file; no error if it is not there."""

        def far() -> None:
            fs, base = self._open()
            fs.rm_file(f"{base}/{name}")

        with contextlib.suppress(FileNotFoundError):
            self._again("delete", name, far if self.remote else (Path(self.url) / name).unlink)

    def free(self) -> int | None:
        """Bytes that are free where the folder is, or will be; None where nobody knows."""
        if self.remote:
            return None
        path = Path(self.url).absolute()
        while not path.exists():
            path = path.parent
        return shutil.disk_usage(path).free

    def _again(self, what: str, name: str, do: Callable[[], T]) -> T:
        for k in range(self.tries):
            try:
                return do()
            except NO_USE:
                raise
            except Exception as error:
                expected = isinstance(error, OSError)
                lasting = error.errno in LASTING if expected else not self.remote
                if lasting or k == self.tries - 1:
                    if expected:
                        raise
                    raise OSError(f"cannot {what} {self.url}/{name}: {_first(error)}") from error
                self.retried.append(f"{what} {name or self.url}: {_first(error)}")
                time.sleep(self.pause * 2**k * random.uniform(0.5, 1.5))
        raise ValueError(f"tries is {self.tries}; it must be 1 or more")

    def _open(self):
        fs, base = Remote(self.url)._open()
        return fs, base.rstrip("/")

    @staticmethod
    def _temporary() -> str:
        return f"{TEMPORARY}{os.getpid()}-{secrets.token_hex(4)}"


def _first(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
