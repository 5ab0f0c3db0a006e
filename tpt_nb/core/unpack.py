"""Archives, unpacked whole or not at all, once, whoever asks; nothing lands outside the folder."""

import json
import os
import shutil
import stat
import tarfile
import zipfile
import zlib
from pathlib import Path, PurePosixPath, PureWindowsPath

from tpt_nb.core.download import explain_disk, mb
from tpt_nb.core.files import only_writer
from tpt_nb.core.messages import first_line

ARCHIVES = (".tar", ".tar.gz", ".tgz", ".zip", ".tar.bz2", ".tar.xz")


class _Damaged(Exception):
    pass


def is_unpacked(archive: str, folder: str | Path) -> bool:
    """Was the archive of this name unpacked here, all of it?"""
    return _mark(archive, Path(folder)).is_file()


def _mark(archive: str, folder: Path) -> Path:
    return folder / ".unpacked" / f"{archive}.json"


def unpack(archive: str | Path, folder: str | Path, inner: tuple[str, ...] = ()) -> None:
    """The content of a tar or zip file in ``folder``, all of it or nothing, once.

    Members that would land elsewhere (absolute paths, ``..``, links that lead out) are refused, and
    nothing is unpacked then. ``inner`` names archives within, which are unpacked where they lie.

    Raises:
        ValueError: not an archive, damaged, cut off, or refused.
        OSError: the disk is full; what was unpacked is removed again.
    """
    archive, folder = Path(archive), Path(folder)
    mark, room = _mark(archive.name, folder), folder / f".unpacking-{archive.name}"
    with only_writer(folder):
        if mark.is_file():
            return
        shutil.rmtree(room, ignore_errors=True)  # of a process that was killed: we have the lock
        try:
            room.mkdir()
            print(f"unpacking {archive.name} ...", flush=True)
            _extract(archive, room)
            for name in inner:
                _extract(room / name, (room / name).parent)
                (room / name).unlink()
            for entry in room.iterdir():
                _move(entry, folder / entry.name)
            mark.parent.mkdir(exist_ok=True)
            mark.write_text(json.dumps({"archive": archive.name, "entries": "complete"}))
        except (tarfile.TarError, zipfile.BadZipFile, EOFError, zlib.error, _Damaged) as error:
            raise ValueError(f"{archive} cannot be unpacked: {first_line(error)}") from error
        except OSError as error:
            raise explain_disk(error, folder) from error
        finally:
            shutil.rmtree(room, ignore_errors=True)


def _extract(archive: Path, room: Path) -> None:
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as zipped:
            for info in zipped.infolist():
                _refuse(info.filename)
                if stat.S_ISLNK(info.external_attr >> 16):
                    raise _Damaged(f"{info.filename!r} is a link")
            zipped.extractall(room)  # checks each member's CRC
    elif tarfile.is_tarfile(archive):
        with tarfile.open(archive) as tar:
            tar.extractall(room, filter=_safe)
            # a tar cut between two members looks whole, but has no block of zeros at its end
            if tar.fileobj.tell() <= tar.offset:
                raise _Damaged("it ends early")
    else:
        size = mb(archive.stat().st_size)
        raise _Damaged(f"no tar or zip file, or its beginning or end is missing ({size})")


def _safe(member: tarfile.TarInfo, room: str) -> tarfile.TarInfo:
    _refuse(member.name)
    return tarfile.data_filter(member, room)  # refuses links out and devices


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
