"""Files from the net that survive what happens to downloads: mirrors, checks, resuming, unpacking.

``fetch`` brings one file. It tries the mirrors in order (Google Drive, which refuses busy files,
should be the last), goes on where a cut left it, checks size and checksum, and only then gives the
file its name: what has the name is whole. ``unpack`` fills a folder next to its place and moves the
content there when it is complete, once, whoever asks. A lock file keeps two processes from doing
the same work; a process that dies lets go of it.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import stat
import tarfile
import time
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

import requests
from filelock import FileLock, Timeout
from tqdm.auto import tqdm

CHUNK = 1 << 16


ARCHIVES = (".tar", ".tar.gz", ".tgz", ".zip", ".tar.bz2", ".tar.xz")


AGAIN = (408, 425, 429, 500, 502, 503, 504)  # the same address may answer later


class DownloadError(OSError):
    """No mirror gave the file; the text says what each did and what to do."""


class _Refused(Exception):
    """This mirror will not give the file; try the next."""


class _Broken(Exception):
    """The transfer broke; the same mirror may go on."""

    def __init__(self, text: str, wait: float = 0):
        super().__init__(text)
        self.wait = wait


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
    def is_archive(self) -> bool:
        return self.filename.endswith(ARCHIVES)


def fetch(
    source: Source,
    folder: str | Path,
    progress: bool = True,
    tries: int = 5,
    wait: float = 1.0,
    timeout: float = 30.0,
) -> Path:
    """The file in ``folder``, downloaded if it is not there.

    Args:
        tries: how often a mirror may break before the next one is asked; a try that brings
            something does not count.
        wait: seconds before the second try, doubled each time, at most a minute. A server that
            says how long to wait is heeded up to that.
        timeout: seconds without an answer.
    Returns:
        its path; a file of this name is whole and was checked.
    Raises:
        DownloadError: no mirror gave it. What was transferred stays, and the next call goes on.
        OSError: the disk is full, or the folder cannot be written.
    """
    folder = Path(folder)
    target = folder / source.filename
    if target.is_file():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder / f".{source.filename}.lock", f"downloads {source.filename}"):
        if target.is_file():  # another process brought it while we waited
            return target
        part = folder / f"{source.filename}.part"
        problems = []
        for url in source.urls:
            try:
                _whole(source, url, part, progress, tries, wait, timeout)
            except _Refused as refusal:
                problems.append(f"  {url}: {refusal}")
                continue
            except OSError as error:
                raise _explain_disk(error, part) from error
            os.replace(part, target)
            _memo(part).unlink(missing_ok=True)
            return target
        kept = part.stat().st_size if part.exists() else 0
        lines = [f"{source.filename} could not be downloaded:", *problems]
        if kept:
            lines.append(f"{_mb(kept)} of it are kept in {part}; the next try goes on from there.")
        lines.append(
            f"Try again later, or get the file with a browser and put it at {target}"
            + (f" ({_mb(source.size)})." if source.size else ".")
        )
        raise DownloadError("\n".join(lines))


def _whole(source, url, part, *how) -> None:
    """From one mirror, checked; if what an earlier try left is at fault, once more without it."""
    resumed = part.exists()
    _from_mirror(source, url, part, *how)
    try:
        _check(source, part)
    except _Refused:
        if not resumed:
            raise
        _from_mirror(source, url, part, *how)
        _check(source, part)


def _from_mirror(source, url, part, progress, tries, wait, timeout) -> None:
    """Bring ``part`` to its full length from one mirror, or raise ``_Refused``."""
    failures, last = 0, ""
    while failures < tries:
        before = part.stat().st_size if part.exists() else 0
        if source.size and before == source.size:
            return
        try:
            if url.startswith("gdrive:"):
                _from_drive(source, url.removeprefix("gdrive:"), part, progress)
            else:
                _from_http(source, url, part, progress, timeout)
            return
        except _Broken as broken:
            grown = (part.stat().st_size if part.exists() else 0) > before
            failures = 0 if grown else failures + 1
            last = str(broken)
            if failures < tries:
                pause = min(60.0, max(broken.wait, wait * 2 ** max(0, failures - 1)))
                time.sleep(pause if wait else 0)
    raise _Refused(f"{last} ({tries} times)")


def _from_http(source: Source, url: str, part: Path, progress: bool, timeout: float) -> None:
    have = part.stat().st_size if part.exists() else 0
    memo = _read_memo(part)
    known = bool(source.sha256 or source.md5)
    if have and not known and not (memo.get("url") == url and memo.get("etag")):
        have = 0  # without a checksum, pieces of what may be two versions are not put together
    headers = {"Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
        if not known:
            headers["If-Range"] = memo["etag"]
    try:
        with requests.get(url, headers=headers, stream=True, timeout=timeout) as answer:
            have = _accept(source, answer, have, part)
            etag = answer.headers.get("ETag", "")
            _memo(part).write_text(json.dumps({"url": url, "etag": etag}))
            total = have + int(answer.headers.get("Content-Length") or 0)
            got = _write(answer, part, have, source.filename, source.size or total, progress)
    except requests.RequestException as error:
        raise _Broken(_reason(error)) from error
    if answer.headers.get("Content-Length") and got < total:
        raise _Broken(f"the connection was cut after {_mb(got)} of {_mb(total)}")


def _accept(source: Source, answer: requests.Response, have: int, part: Path) -> int:
    """From which byte on the answer goes on; raises if it is not the file."""
    code = answer.status_code
    if code == 416:  # we have as much as there is, or more
        part.unlink()
        raise _Broken("the server has nothing behind what was there; starting anew")
    if code in AGAIN:
        after = answer.headers.get("Retry-After", "")
        raise _Broken(
            f"the server answers {_status(answer)}", float(after) if after.isdigit() else 0
        )
    if code not in (200, 206):
        raise _Refused(f"the server answers {_status(answer)}")
    if "text/html" in answer.headers.get("Content-Type", "") and not source.filename.endswith(
        "html"
    ):
        raise _Refused(f"a web page came in place of the file{_title(answer)}")
    start = 0
    if code == 206:
        match = re.match(r"bytes (\d+)-", answer.headers.get("Content-Range", ""))
        start = int(match[1]) if match else -1
        if start != have:
            part.unlink(missing_ok=True)
            raise _Broken("the server goes on at another place; starting anew")
    length = int(answer.headers.get("Content-Length") or 0)
    if source.size and length and start + length != source.size:
        raise _Refused(
            f"the file there has {start + length:,} bytes, but it should have {source.size:,}"
        )
    return start


def _status(answer: requests.Response) -> str:
    meaning = {403: "forbidden", 404: "not found", 410: "gone", 429: "too many requests"}
    return f"{answer.status_code} ({meaning.get(answer.status_code, answer.reason)})"


def _title(answer: requests.Response) -> str:
    page = next(answer.iter_content(4096), b"").decode("utf-8", "replace")
    match = re.search(r"<title>(.*?)</title>", page, re.IGNORECASE | re.DOTALL)
    return f": {' '.join(match[1].split())!r}" if match else ""


def _write(answer, part: Path, start: int, name: str, total: int, progress: bool) -> int:
    """Append what comes behind byte ``start``; returns how many bytes are there then."""
    off = {} if progress and not os.environ.get("TQDM_DISABLE") else {"disable": True}
    got = start
    bar = tqdm(total=total or None, initial=start, unit="B", unit_scale=True, desc=name, **off)
    with bar, open(part, "ab" if start else "wb") as file:
        for chunk in answer.iter_content(CHUNK):
            file.write(chunk)
            got += len(chunk)
            bar.update(len(chunk))
    return got


def _from_drive(source: Source, file_id: str, part: Path, progress: bool) -> None:
    """Through gdown, which knows Drive's pages; Drive refuses files that many ask for."""
    import gdown

    arrived = part.with_name(part.name + ".drive")
    try:
        gdown.download(id=file_id, output=str(arrived), quiet=not progress, resume=True)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise _Refused(f"Google Drive: {_reason(error)}") from error
    except Exception as error:  # gdown has exceptions of its own, which change with its versions
        raise _Refused(f"Google Drive: {_reason(error)}") from error
    if not arrived.is_file():
        raise _Refused("Google Drive gave no file")
    with open(arrived, "rb") as file:
        head = file.read(512).lstrip().lower()
    if head.startswith((b"<!doctype html", b"<html")):
        arrived.unlink()
        raise _Refused("Google Drive sent a web page in place of the file (its quota, probably)")
    os.replace(arrived, part)


def _check(source: Source, part: Path) -> None:
    """Size and checksum; a file that fails is removed, so that the next mirror starts anew."""
    size = part.stat().st_size
    wrong = ""
    if source.size and size != source.size:
        wrong = f"{size:,} bytes came, but the file has {source.size:,}"
    kind = "sha256" if source.sha256 else "md5" if source.md5 else ""
    if kind and not wrong:
        with open(part, "rb") as file:
            found = hashlib.file_digest(file, kind).hexdigest()
        if found != getattr(source, kind):
            wrong = (
                f"wrong bytes ({kind} {found[:12]}..., should be {getattr(source, kind)[:12]}...)"
            )
    if wrong:
        part.unlink()
        _memo(part).unlink(missing_ok=True)
        raise _Refused(wrong)


def _memo(part: Path) -> Path:
    return part.with_name(part.name + ".json")


def _read_memo(part: Path) -> dict:
    try:
        return json.loads(_memo(part).read_text())
    except (OSError, ValueError):
        return {}


def unpack(archive: str | Path, folder: str | Path, inner: tuple[str, ...] = ()) -> None:
    """The content of a tar or zip file in ``folder``, all of it or nothing, once.

    Members that would land elsewhere (absolute paths, ``..``, links that lead out) are refused, and
    nothing is unpacked then. ``inner`` names archives within, which are unpacked where they lie.

    Raises:
        ValueError: not an archive, damaged, cut off, or refused.
        OSError: the disk is full; what was unpacked is removed again.
    """
    archive, folder = Path(archive), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    done = folder / ".unpacked" / f"{archive.name}.json"
    with _locked(folder / f".{archive.name}.lock", f"unpacks {archive.name}"):
        if done.is_file():
            return
        for left in folder.glob(".unpacking-*"):  # of a process that was killed: we have the lock
            if left.name.startswith(f".unpacking-{archive.name}-"):
                shutil.rmtree(left, ignore_errors=True)
        room = folder / f".unpacking-{archive.name}-{os.getpid()}"
        try:
            room.mkdir()
            print(f"unpacking {archive.name} ...", flush=True)
            _extract(archive, room)
            for name in inner:
                _extract(room / name, (room / name).parent)
                (room / name).unlink()
            for entry in room.iterdir():
                _move(entry, folder / entry.name)
            done.parent.mkdir(exist_ok=True)
            done.write_text(json.dumps({"archive": archive.name, "entries": "complete"}))
        except (tarfile.TarError, zipfile.BadZipFile, EOFError, zlib.error, _Damaged) as error:
            raise ValueError(f"{archive} cannot be unpacked: {_reason(error)}") from error
        except OSError as error:
            raise _explain_disk(error, folder) from error
        finally:
            shutil.rmtree(room, ignore_errors=True)


class _Damaged(Exception):
    pass


def _extract(archive: Path, room: Path) -> None:
    if zipfile.is_zipfile(archive):
        _extract_zip(archive, room)
    elif tarfile.is_tarfile(archive):
        _extract_tar(archive, room)
    else:
        size = archive.stat().st_size
        raise _Damaged(f"no tar or zip file, or its beginning or end is missing ({_mb(size)})")


def _extract_tar(archive: Path, room: Path) -> None:
    with tarfile.open(archive) as tar:
        for member in tar:
            _refuse(member.name)
            tar.extract(member, room, filter="data")  # refuses links out and devices
        # a tar that was cut between two members looks whole, but has no block of zeros at the end
        if tar.fileobj.tell() <= tar.offset:
            raise _Damaged("it ends early")


def _extract_zip(archive: Path, room: Path) -> None:
    with zipfile.ZipFile(archive) as zipped:
        for info in zipped.infolist():
            _refuse(info.filename)
            if stat.S_ISLNK(info.external_attr >> 16):
                raise _Damaged(f"{info.filename!r} is a link")
        zipped.extractall(room)  # checks each member's CRC


def _refuse(name: str) -> None:
    parts = PurePosixPath(name.replace("\\", "/"))
    if parts.is_absolute() or ".." in parts.parts or PureWindowsPath(name).drive:
        raise _Damaged(f"{name!r} would land outside of the folder")


def _move(entry: Path, target: Path) -> None:
    """Rename, merging folders that are there already."""
    if entry.is_dir() and not entry.is_symlink() and target.is_dir():
        for inner in entry.iterdir():
            _move(inner, target / inner.name)
    else:
        os.replace(entry, target)


@contextmanager
def _locked(path: Path, doing: str) -> Iterator[None]:
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"another process {doing}; waiting for it", flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _explain_disk(error: OSError, where: Path) -> OSError:
    if error.errno not in (errno.ENOSPC, errno.EDQUOT):
        return error
    folder = where if where.is_dir() else where.parent
    free = shutil.disk_usage(folder).free
    return OSError(
        error.errno,
        f"the disk is full ({_mb(free)} free); make room, or set TPT_NB_DATASETS to a folder on a "
        "larger disk, and run again: a download goes on where it stopped",
        str(where),
    )


def _reason(error: BaseException) -> str:
    text = str(error).strip()
    if isinstance(error, requests.Timeout):
        return "no answer in time"
    if isinstance(error, requests.ConnectionError):
        cut = "IncompleteRead" in text or "Connection broken" in text or "aborted" in text
        return "the connection was cut" if cut else "no connection to the server"
    if isinstance(error, requests.exceptions.ChunkedEncodingError):
        return "the connection was cut"
    return text.splitlines()[0][:200] if text else type(error).__name__


def _mb(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"
