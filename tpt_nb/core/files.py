"""Writing a file whole or not at all, and one writer per folder."""

import codecs
import contextlib
import hashlib
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path


def write_whole(path: str | Path, data: bytes | str) -> None:
    """Whole or not at all: to a temporary name beside it, to the disk, then renamed.

    A reader never sees half a file, and two writers do not mix theirs. Text is UTF-8.
    """
    path = Path(path)
    temporary = path.parent / f".tmp-{os.getpid()}-{secrets.token_hex(4)}"
    try:
        with open(temporary, "xb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path: str | Path, value: Mapping) -> None:
    """:func:`write_whole` of a value as JSON."""
    write_whole(path, json.dumps(value, indent=1) + "\n")


def read_text(path: str | Path) -> str:
    """A text file, with or without a byte order mark; ``ValueError`` names one that is no text."""
    data = Path(path).read_bytes()
    marks = {"utf-32": (codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)}  # first: it begins as utf-16
    marks |= {"utf-16": (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)}
    coding = next((name for name, mark in marks.items() if data.startswith(mark)), "utf-8")
    try:
        text = data.decode(coding).removeprefix("\ufeff")
        bad = text.find("\0")  # UTF-16 without its mark, or no text at all
        before = text[:bad] if bad >= 0 else None
    except UnicodeDecodeError as error:
        before = data[: error.start].decode(coding, "ignore")
    if before is None:
        return text
    place, coding = before.count("\n") + 1, coding.upper()
    raise ValueError(f"{path}, line {place}: not {coding}; save the file as UTF-8")


def read_json(path: str | Path):
    """The value in a JSON file, read as :func:`read_text`; ``ValueError`` names what is none."""
    text = read_text(path)
    try:
        value = json.loads(text)
        if "\\ud" in text.lower():
            json.dumps(value, ensure_ascii=False).encode()  # half a pair cannot be written again
        return value
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON: {error}") from error


def sha256(path: str | Path) -> str:
    """Of a file's content, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def only_writer(folder: Path, wait: bool = True) -> Iterator[None]:
    """Hold a folder for this process: a second one waits, and says so, or is refused.

    The operating system gives the lock back when its process ends, however it ends. Where the file
    system has no locks, a line says so and the work goes on.

    Raises:
        ValueError: another process holds it and ``wait`` is False.
    """
    from filelock import FileLock, Timeout

    from tpt_nb.core.messages import say_once

    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            if not wait:
                raise ValueError(f"another process is writing to {folder}; wait for it.") from None
            say_once(f"another process is writing to {folder}: waiting for it")
            lock.acquire()
    except (OSError, NotImplementedError) as error:  # NFS without its lock service, FUSE ...
        say_once(
            f"warning: {folder} cannot be locked ({error}): see to it that no second process "
            "writes there at the same time"
        )
    try:
        yield
    finally:
        lock.release()
