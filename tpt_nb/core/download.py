"""One file from the net, whole or not at all: mirrors, checks, resuming.

:func:`fetch` tries the mirrors in order (Google Drive, which refuses busy files, should be the
last); ``TPT_NB_MIRROR`` names a server that is asked in place of all of them. ``pooch`` compares
the checksum and gives the file its name; ours is what it has not: going on where a cut left it,
waiting for busy servers, noticing that a web page came in place of the file, Google Drive.
Archives: :mod:`tpt_nb.core.unpack`.
"""

import errno
import json
import os
import re
import shutil
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from urllib.parse import quote, urlsplit

from tpt_nb.core.files import only_writer
from tpt_nb.core.messages import bar

AGAIN = (408, 425, 429, 500, 502, 503, 504)  # the same address may answer later
TRIES = 5  # that bring nothing, before the next mirror is asked
WAIT = 1.0  # seconds before the second try, doubled each time, at most a minute
TIMEOUT = 30.0  # seconds without an answer


class DownloadError(OSError):
    """No mirror gave the file; the text says what each did and what to do."""


class _Refused(Exception):
    """This mirror will not give the file; try the next."""


class _Broken(Exception):
    """The transfer broke; the same mirror may go on, after ``wait`` seconds."""

    def __init__(self, text: str, wait: float = 0):
        super().__init__(text)
        self.wait = wait


class _WrongSize(ValueError):
    pass


@dataclass(frozen=True)
class Source:
    """A file to download.

    ``urls`` are mirrors in order, ``gdrive:ID`` for a file on Google Drive; ``size`` in bytes and
    ``sha256`` (or ``md5`` where that is all there is) are checked where they are known. ``inner``
    are archives within the archive.
    """

    filename: str
    urls: tuple[str, ...]
    size: int = 0
    sha256: str = ""
    md5: str = ""
    inner: tuple[str, ...] = ()

    @property
    def checksum(self) -> str | None:
        """As pooch writes it."""
        return f"sha256:{self.sha256}" if self.sha256 else f"md5:{self.md5}" if self.md5 else None


def fetch(source: Source, folder: str | Path, progress: bool = True) -> Path:
    """The file in ``folder``, downloaded if it is not there.

    Returns:
        its path; a file of this name is whole and was checked.
    Raises:
        DownloadError: no mirror gave it. What was transferred stays, and the next call goes on.
        OSError: the disk is full, or the folder cannot be written.
    """
    folder = Path(folder)
    target, part = folder / source.filename, folder / f"{source.filename}.part"
    if target.is_file():
        return target
    source, problems = mirrored(source), []
    with only_writer(folder):
        for url in source.urls:
            if target.is_file():  # another process brought it while we waited
                break
            try:
                _from_mirror(source, url, target, part, progress)
            except _Refused as refusal:
                problems.append(f"  {url}: {refusal}")
            except OSError as error:
                raise explain_disk(error, folder) from error
    if target.is_file():
        return target
    lines = [f"{source.filename} could not be downloaded:", *problems]
    if kept := _size(part):
        lines.append(f"{mb(kept)} of it are kept in {part}; the next try goes on from there.")
    size = f" ({mb(source.size)})" if source.size else ""
    lines.append(f"Try again later, or get the file with a browser and put it at {target}{size}.")
    raise DownloadError("\n".join(lines))


def mirrored(source: Source) -> Source:
    """The source at the address that ``TPT_NB_MIRROR`` names, if it does: ``<address>/<file>``.

    A classroom's server, say: checksums are compared all the same. A server on this machine alone
    may hold other files under these names (the rehearsal's stand-ins, ``ci/rehearse.py``); its file
    ``SHA256SUMS`` then says what they are. Raises :class:`DownloadError` if that cannot be had.
    """
    mirror = os.environ.get("TPT_NB_MIRROR", "").rstrip("/")
    if not mirror:
        return source
    source = replace(source, urls=(f"{mirror}/{quote(source.filename)}",))
    if urlsplit(mirror).hostname not in ("127.0.0.1", "localhost", "::1"):
        return source
    import requests

    try:
        answer = requests.get(f"{mirror}/SHA256SUMS", timeout=TIMEOUT)
        answer.raise_for_status()
    except requests.RequestException as error:
        raise DownloadError(f"TPT_NB_MIRROR is {mirror}, but: {_reason(error)}") from error
    lines = (line.split(maxsplit=1) for line in answer.text.splitlines() if line)
    sums = {name: sha for sha, name in lines}
    return replace(source, size=0, md5="", sha256=sums.get(source.filename, ""))


def _from_mirror(source: Source, url: str, target: Path, part: Path, progress: bool) -> None:
    """From one mirror, checked; if what an earlier try left is at fault, once more without it."""
    import pooch

    pooch.get_logger().setLevel("WARNING")
    download = partial(_download, source, part, progress)
    resumed = _size(part) > 0
    while True:
        try:
            pooch.retrieve(url, source.checksum, target.name, target.parent, downloader=download)
            return
        except ValueError as error:  # what came is gone
            if not resumed:
                kind, _, right = (source.checksum or "").partition(":")
                wrong = f"wrong bytes ({kind} should be {right[:12]}...)"
                raise _Refused(error if isinstance(error, _WrongSize) else wrong) from error
            resumed = False


def _download(source: Source, part: Path, progress: bool, url: str, output: str, _: object) -> None:
    """A downloader for pooch that goes on: fills ``part``, hands it over when it is complete."""
    failures, step = 0, _from_drive if url.startswith("gdrive:") else _from_http
    while True:
        before = _size(part)
        try:
            if not source.size or before != source.size:
                step(source, url, part, progress)
            break
        except _Broken as broken:
            failures = 0 if _size(part) > before else failures + 1
            if failures >= TRIES:
                raise _Refused(f"{broken} ({TRIES} times)") from broken
            time.sleep(min(60.0, max(broken.wait, WAIT * 2 ** max(0, failures - 1))))
    size = _size(part)
    os.replace(part, output)
    _note(part).unlink(missing_ok=True)
    if source.size and size != source.size:
        raise _WrongSize(f"{size:,} bytes came, but the file has {source.size:,}")


def _note(part: Path) -> Path:
    """Beside ``part``: the address it is from and the version (ETag) it had there."""
    return part.with_name(part.name + ".json")


def _from_http(source: Source, url: str, part: Path, progress: bool) -> None:
    """Append to ``part`` what the server has behind its end."""
    import requests  # here: most who know where files are fetch none

    have, headers = _size(part), {"Accept-Encoding": "identity"}
    if have and not source.checksum:
        try:
            note = json.loads(_note(part).read_text())
        except (OSError, ValueError):
            note = {}
        # without a checksum, pieces of what may be two versions are not put together
        have = have if note.get("url") == url and note.get("etag") else 0
        headers |= {"If-Range": note["etag"]} if have else {}
    headers |= {"Range": f"bytes={have}-"} if have else {}
    try:
        with requests.get(url, headers=headers, stream=True, timeout=TIMEOUT) as answer:
            have = _accept(source, answer, have, part)
            _note(part).write_text(json.dumps({"url": url, "etag": answer.headers.get("ETag")}))
            length = int(answer.headers.get("Content-Length") or 0)
            total = have + length if length else None
            shown = bar(total, have, source.filename, progress, unit="B")
            shown.unit_scale = True
            with shown, open(part, "ab" if have else "wb") as file:
                for chunk in answer.iter_content(1 << 16):
                    file.write(chunk)
                    shown.update(len(chunk))
    except requests.RequestException as error:
        raise _Broken(_reason(error)) from error
    if total and _size(part) < total:
        raise _Broken(f"the connection was cut after {mb(_size(part))} of {mb(total)}")


def _accept(source: Source, answer: "requests.Response", have: int, part: Path) -> int:  # noqa: F821
    """From which byte on the answer goes on; raises if it is not the file."""
    code, head = answer.status_code, answer.headers
    said = f"the server answers {code} ({(answer.reason or 'no reason').lower()})"
    if code == 416:  # we have as much as there is, or more
        part.unlink()
        raise _Broken("the server has nothing behind what was there; starting anew")
    if code in AGAIN:
        after = head.get("Retry-After", "")
        raise _Broken(said, float(after) if after.isdigit() else 0)
    if code not in (200, 206):
        raise _Refused(said)
    if "text/html" in head.get("Content-Type", "") and not source.filename.endswith("html"):
        page = next(answer.iter_content(4096), b"").decode("utf-8", "replace")
        title = re.search(r"<title>(.*?)</title>", page, re.IGNORECASE | re.DOTALL)
        title = f": {' '.join(title[1].split())!r}" if title else ""
        raise _Refused(f"a web page came in place of the file{title}")
    start = 0
    if code == 206:
        match = re.match(r"bytes (\d+)-", head.get("Content-Range", ""))
        start = int(match[1]) if match else -1
        if start != have:
            part.unlink(missing_ok=True)
            raise _Broken("the server goes on at another place; starting anew")
    length = start + int(head.get("Content-Length") or 0)
    if source.size and length > start and length != source.size:
        raise _Refused(f"the file there has {length:,} bytes, but it should have {source.size:,}")
    return start


def _from_drive(source: Source, url: str, part: Path, progress: bool) -> None:
    """Through gdown, which knows Drive's pages; Drive refuses files that many ask for."""
    import gdown

    arrived, file_id = Path(f"{part}.drive"), url.removeprefix("gdrive:")
    try:
        gdown.download(id=file_id, output=str(arrived), quiet=not progress, resume=True)
    except Exception as error:  # gdown's own exceptions change with its versions
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise _Refused(f"Google Drive: {_reason(error)}") from error
    if not arrived.is_file():
        raise _Refused("Google Drive gave no file")
    with open(arrived, "rb") as file:
        head = file.read(512).lstrip().lower()
    if head.startswith((b"<!doctype html", b"<html")):
        arrived.unlink()
        raise _Refused("Google Drive sent a web page in place of the file (its quota, probably)")
    os.replace(arrived, part)


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _reason(error: BaseException) -> str:
    import requests

    text = str(error).strip()
    if isinstance(error, requests.Timeout):
        return "no answer in time"
    if isinstance(error, requests.ConnectionError | requests.exceptions.ChunkedEncodingError):
        cut = re.search("IncompleteRead|Connection broken|aborted", text)
        return "the connection was cut" if cut else "no connection to the server"
    return text.splitlines()[0][:200] if text else type(error).__name__


def mb(size: int) -> str:
    """A number of bytes for people."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def explain_disk(error: OSError, folder: Path) -> OSError:
    """The error; where it says that the disk is full, with what to do."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return error
    text = (
        f"the disk is full ({mb(shutil.disk_usage(folder).free)} free); make room, or set "
        "TPT_NB_DATASETS to a folder on a larger disk, and run again: a download goes on where it "
        "stopped"
    )
    return OSError(error.errno, text, str(folder))
