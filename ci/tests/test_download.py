"""Downloads against a server on this machine that misbehaves in the ways that servers do."""

import errno
import hashlib
import io
import os
import sys
import tarfile
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from tpt_nb import __main__ as cli
from tpt_nb.core import download
from tpt_nb.core.download import DownloadError, Source, fetch
from tpt_nb.core.unpack import ARCHIVES, unpack
from tpt_nb.datasets import BENCHMARKS, sources

DATA = np.random.default_rng(0).bytes(1_000_003)
SHA = hashlib.sha256(DATA).hexdigest()
QUOTA = b"<!DOCTYPE html><html><head><title>Google Drive - Quota exceeded</title></head></html>"


class Server(ThreadingHTTPServer):
    """Serves DATA; the path says how, ``asked`` is what was asked: (path, first byte)."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked, self.failures = [], {}

    def url(self, how: str) -> str:
        return f"http://127.0.0.1:{self.server_port}/{how}"


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        how, first = self.path.strip("/"), self.headers.get("Range", "")
        start = int(first.removeprefix("bytes=").split("-")[0]) if first else 0
        self.server.asked.append((how, start))
        times = self.server.failures.get(how, 0)
        self.server.failures[how] = times + 1
        body, etag = DATA, '"one"'
        if how.isdigit():
            return self.send_error(int(how))
        if how.startswith("busy") and times < 2:
            self.send_response(429)
            self.send_header("Retry-After", "0")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        if how == "moved":
            self.send_response(302)
            self.send_header("Location", "/good")
            return self.end_headers()
        if how == "quota":
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.end_headers()
            return self.wfile.write(QUOTA)
        if how == "wrong":
            body = bytes(len(DATA))
        if how == "short":
            body = DATA[:1000]
        if how == "new-version" and times:
            body, etag = DATA[::-1], '"two"'
            start = start if self.headers.get("If-Range") == etag else 0
        if how == "ignores-range":
            start = 0
        if start >= len(body):
            return self.send_error(416)
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        self.send_header("ETag", etag)
        self.send_header("Content-Type", "application/octet-stream")
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        cut = how.startswith("cut") or (how in ("new-version", "ignores-range") and not times)
        end = min(len(body), start + 400_000) if cut else len(body)
        self.wfile.write(body[start:end])
        self.wfile.flush()
        if cut:
            self.close_connection = True


@pytest.fixture(scope="module")
def running():
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def server(running):
    running.asked.clear()
    running.failures.clear()
    return running


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(download, "TRIES", 3)
    monkeypatch.setattr(download, "WAIT", 0)
    monkeypatch.setattr(download, "TIMEOUT", 5)


def get(server, folder, *hows, checked=True):
    source = Source(
        "data.bin",
        tuple(server.url(h) for h in hows),
        len(DATA) if checked else 0,
        SHA if checked else "",
    )
    return fetch(source, folder, progress=False)


def left(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if not p.name.endswith(".lock"))


# --- fetch ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("checked", [True, False])
@pytest.mark.parametrize("how", ["good", "moved", "busy", "cut", "ignores-range"])
def test_the_file_arrives_whole(server, tmp_path, how, checked):
    path = get(server, tmp_path, how, checked=checked)
    assert path == tmp_path / "data.bin" and path.read_bytes() == DATA
    assert left(tmp_path) == ["data.bin"]
    asked = len(server.asked)
    assert get(server, tmp_path, how, checked=checked) == path and len(server.asked) == asked


def test_a_cut_transfer_goes_on_where_it_stopped(server, tmp_path):
    get(server, tmp_path, "cut")
    starts = [start for _, start in server.asked]
    assert starts[0] == 0 < starts[1] <= 400_000 < starts[2] and starts == sorted(set(starts))


def test_progress_is_no_failure(server, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "TRIES", 1)
    get(server, tmp_path, "cut")  # each of three connections is cut, and each brings some


@pytest.mark.parametrize(
    "how, what",
    [
        ("403", r"403 \(forbidden\)"),
        ("404", r"404 \(not found\)"),
        ("429", r"429 \(too many requests\) \(3 times\)"),
        ("500", r"500 .*\(3 times\)"),
        ("quota", "a web page came in place of the file: 'Google Drive - Quota exceeded'"),
        ("wrong", f"wrong bytes .*should be {SHA[:12]}"),
        ("short", "has 1,000 bytes, but it should have 1,000,003"),
    ],
)
def test_after_a_fault_the_next_mirror_is_asked_and_the_last_one_is_told(
    server, tmp_path, how, what
):
    with pytest.raises(DownloadError, match=what) as error:
        get(server, tmp_path, how)
    text = str(error.value)
    assert server.url(how) in text and str(tmp_path / "data.bin") in text and "browser" in text
    assert left(tmp_path) in ([], ["data.bin.part"], ["data.bin.part", "data.bin.part.json"])
    assert not (tmp_path / "data.bin").exists()
    assert get(server, tmp_path, how, "good").read_bytes() == DATA


def test_nobody_there(tmp_path):
    source = Source("x.tar", ("http://127.0.0.1:9/x.tar",))
    with pytest.raises(DownloadError, match="no connection to the server"):
        fetch(source, tmp_path, progress=False)


def test_the_next_call_goes_on_even_from_another_mirror(server, tmp_path):
    (tmp_path / "data.bin.part").write_bytes(DATA[:300_000])
    get(server, tmp_path, "404", "good")
    assert server.asked == [("404", 300_000), ("good", 300_000)]


def test_pieces_that_do_not_fit_are_thrown_away(server, tmp_path):
    (tmp_path / "data.bin.part").write_bytes(b"from something else")
    assert get(server, tmp_path, "good").read_bytes() == DATA
    assert [start for _, start in server.asked] == [19, 0]


def test_too_long_a_piece_is_thrown_away(server, tmp_path):
    (tmp_path / "data.bin.part").write_bytes(DATA + b"more")
    assert get(server, tmp_path, "good").read_bytes() == DATA


def test_without_a_checksum_two_versions_are_not_put_together(server, tmp_path):
    assert get(server, tmp_path, "new-version", checked=False).read_bytes() == DATA[::-1]
    (tmp_path / "data.bin").unlink()
    (tmp_path / "data.bin.part").write_bytes(DATA[:300_000])  # nobody knows from where
    assert get(server, tmp_path, "good", checked=False).read_bytes() == DATA
    assert server.asked[-1] == ("good", 0)


def test_md5_where_that_is_all_there_is(server, tmp_path):
    good = Source("a", (server.url("good"),), md5=hashlib.md5(DATA).hexdigest())
    assert fetch(good, tmp_path, progress=False).read_bytes() == DATA
    bad = Source("b", (server.url("good"),), md5="0" * 32)
    with pytest.raises(DownloadError, match="wrong bytes .md5"):
        fetch(bad, tmp_path, progress=False)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_full_disk_says_so_and_keeps_what_is_there(server, tmp_path):
    (tmp_path / "data.bin.part").symlink_to("/dev/full")
    with pytest.raises(OSError, match="the disk is full .*make room") as error:
        get(server, tmp_path, "good")
    assert error.value.errno == errno.ENOSPC and not isinstance(error.value, DownloadError)
    assert not (tmp_path / "data.bin").exists()
    (tmp_path / "data.bin.part").unlink()
    assert get(server, tmp_path, "good").read_bytes() == DATA


def test_many_at_once_download_once(server, tmp_path):
    paths, errors = [], []

    def work():
        try:
            paths.append(get(server, tmp_path, "good"))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and len(paths) == 4 and server.asked == [("good", 0)]


class FakeDrive:
    """gdown's ``download`` with what Drive does."""

    def __init__(self, what):
        self.what = what

    def download(self, id, output, quiet, resume):
        assert id == "abc" and resume
        if isinstance(self.what, Exception):
            raise self.what
        if self.what is not None:
            Path(output).write_bytes(self.what)


@pytest.mark.parametrize(
    "what, says",
    [
        (
            RuntimeError("Too many users have viewed or downloaded this file\nmore"),
            "Too many users",
        ),
        (QUOTA, "a web page in place of the file"),
        (None, "gave no file"),
        (DATA[:-1], "1,000,002 bytes came, but the file has 1,000,003"),
    ],
)
def test_drive_is_the_last_resort_and_may_refuse(server, tmp_path, monkeypatch, what, says):
    source = Source("d", (server.url("404"), "gdrive:abc"), len(DATA), SHA)
    monkeypatch.setitem(sys.modules, "gdown", FakeDrive(what))
    with pytest.raises(DownloadError, match=says):
        fetch(source, tmp_path, progress=False)
    assert not (tmp_path / "d").exists()
    monkeypatch.setitem(sys.modules, "gdown", FakeDrive(DATA))
    assert fetch(source, tmp_path, progress=False).read_bytes() == DATA


# --- unpack --------------------------------------------------------------------------------------


def tar(path: Path, members: dict, mode: str = "w") -> Path:
    """Members: name -> bytes, or ("link" or "hard", where to)."""
    with tarfile.open(path, mode) as file:
        for name, what in members.items():
            info = tarfile.TarInfo(name)
            if isinstance(what, tuple):
                info.type = tarfile.SYMTYPE if what[0] == "link" else tarfile.LNKTYPE
                info.linkname = what[1]
                file.addfile(info)
            else:
                info.size = len(what)
                file.addfile(info, io.BytesIO(what))
    return path


def zipped(path: Path, members: dict) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, what in members.items():
            info = zipfile.ZipInfo(name)
            if isinstance(what, tuple):
                info.external_attr, what = 0o120777 << 16, what[1]
            file.writestr(info, what)
    return path


GOOD = {"set/a/1.png": b"one" * 50_000, "set/b/2.png": b"two"}


@pytest.mark.parametrize("kind", ["set.tar", "set.tar.gz", "set.zip"])
def test_unpacked_whole_and_once(tmp_path, kind):
    (tmp_path / "to" / "set" / "a").mkdir(parents=True)  # folders that are there are filled up
    make = zipped if kind.endswith("zip") else tar
    mode = ("w:gz",) if kind.endswith("gz") else ()
    archive = make(tmp_path / kind, GOOD, *mode)
    unpack(archive, tmp_path / "to")
    for name, data in GOOD.items():
        assert (tmp_path / "to" / name).read_bytes() == data
    assert left(tmp_path / "to") == [".unpacked", "set"]
    (tmp_path / "to" / "set" / "b" / "2.png").unlink()
    unpack(archive, tmp_path / "to")
    assert not (tmp_path / "to" / "set" / "b" / "2.png").exists()  # not a second time


@pytest.mark.parametrize(
    "members",
    [
        {"../evil": b"x"},
        {"set/../../evil": b"x"},
        {"/tmp/tpt-nb-evil": b"x"},
        {"..\\evil": b"x"},
        {"C:\\evil": b"x"},
        {"set/link": ("link", "/etc"), "set/link/evil": b"x"},
        {"set/link": ("link", "../.."), "set/link/evil": b"x"},
    ],
)
@pytest.mark.parametrize("kind", ["tar", "zip"])
def test_what_leads_out_is_refused(tmp_path, kind, members):
    archive = (tar if kind == "tar" else zipped)(tmp_path / f"x.{kind}", {**GOOD, **members})
    with pytest.raises(ValueError, match="cannot be unpacked"):
        unpack(archive, tmp_path / "in" / "to")
    assert left(tmp_path / "in" / "to") == [] and left(tmp_path / "in") == ["to"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in", archive.name]


def test_hard_links_that_lead_out_are_refused(tmp_path):
    archive = tar(tmp_path / "x.tar", {"set/passwords": ("hard", "../../etc/passwd")})
    with pytest.raises(ValueError, match="cannot be unpacked"):
        unpack(archive, tmp_path / "to")
    assert left(tmp_path / "to") == []


@pytest.mark.parametrize("kind", ["set.tar", "set.tar.gz", "set.zip"])
@pytest.mark.parametrize("keep", [0.3, 0.9, 0.999])
def test_cut_off_archives_are_noticed(tmp_path, kind, keep):
    make = zipped if kind.endswith("zip") else tar
    mode = ("w:gz",) if kind.endswith("gz") else ()
    rng = np.random.default_rng(1)
    members = {f"set/{i}.bin": rng.bytes(7_000) for i in range(9)}
    archive = make(tmp_path / kind, members, *mode)
    data = archive.read_bytes()
    archive.write_bytes(data[: int(keep * len(data.rstrip(b"\0")))])
    with pytest.raises(ValueError, match="cannot be unpacked"):
        unpack(archive, tmp_path / "to")
    assert left(tmp_path / "to") == []
    archive.write_bytes(data)
    unpack(archive, tmp_path / "to")
    assert len(list((tmp_path / "to" / "set").iterdir())) == 9


def test_a_tar_cut_between_two_members_is_noticed(tmp_path):
    archive = tar(tmp_path / "x.tar", {"a": b"x" * 512, "b": b"y" * 512})
    archive.write_bytes(archive.read_bytes()[:1024])  # header and content of the first
    with pytest.raises(ValueError, match="it ends early"):
        unpack(archive, tmp_path / "to")


def test_damage_within_is_noticed(tmp_path):
    archive = zipped(tmp_path / "x.zip", {"a": np.random.default_rng(2).bytes(100_000)})
    data = bytearray(archive.read_bytes())
    data[50_000] ^= 255
    archive.write_bytes(data)
    with pytest.raises(ValueError, match="cannot be unpacked"):
        unpack(archive, tmp_path / "to")
    archive.write_bytes(b"neither this nor that")
    with pytest.raises(ValueError, match="no tar or zip file"):
        unpack(archive, tmp_path / "to")


def test_what_a_killed_process_left_is_cleared(tmp_path):
    archive = tar(tmp_path / "set.tar", GOOD)
    (tmp_path / "to" / ".unpacking-set.tar" / "set").mkdir(parents=True)
    unpack(archive, tmp_path / "to")
    assert left(tmp_path / "to") == [".unpacked", "set"]


def test_a_full_disk_leaves_nothing_half_unpacked(tmp_path, monkeypatch):
    archive = tar(tmp_path / "set.tar", GOOD)
    write = tarfile.TarFile.makefile

    def full(self, member, *args):
        if member.name == "set/b/2.png":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(self, member, *args)

    monkeypatch.setattr(tarfile.TarFile, "makefile", full)
    with pytest.raises(OSError, match="the disk is full"):
        unpack(archive, tmp_path / "to")
    assert left(tmp_path / "to") == []
    monkeypatch.undo()
    unpack(archive, tmp_path / "to")
    assert (tmp_path / "to" / "set" / "b" / "2.png").read_bytes() == b"two"


# --- a data set ----------------------------------------------------------------------------------


@pytest.fixture
def archive_server(tmp_path):
    """Serves one archive: a tar in a zip, as Caltech101's is."""
    inner = tar(tmp_path / "inner.tar.gz", {"images/cat/1.png": b"cat"}, "w:gz").read_bytes()
    data = zipped(tmp_path / "outer.zip", {"outer/inner.tar.gz": inner}).read_bytes()

    class Files(BaseHTTPRequestHandler):
        asked = []

        def log_message(self, *args):
            pass

        def do_GET(self):
            self.asked.append(self.path)
            body = data if self.path.endswith("zip") else b"{}"
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Files)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield server.server_port, Files.asked, hashlib.sha256(data).hexdigest()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.parametrize("keep", [False, True])
def test_a_data_set_is_brought_and_unpacked_once(archive_server, tmp_path, monkeypatch, keep):
    port, asked, sha = archive_server
    files = (
        Source(
            "outer.zip",
            (f"http://127.0.0.1:{port}/outer.zip",),
            sha256=sha,
            inner=("outer/inner.tar.gz",),
        ),
        Source("split.json", (f"http://127.0.0.1:{port}/split.json",)),
    )
    monkeypatch.setitem(sources.SOURCES, "toy", files)
    monkeypatch.setenv("TPT_NB_DATASETS", str(tmp_path / "datasets"))
    if keep:
        monkeypatch.setenv("TPT_NB_ARCHIVES", str(tmp_path / "drive"))
    for _ in range(2):
        folder = sources.download("toy", progress=False)
        assert (folder / "outer" / "images" / "cat" / "1.png").read_bytes() == b"cat"
        assert (folder / "split.json").read_text() == "{}"
        assert not (folder / "outer" / "inner.tar.gz").exists()
    assert asked == ["/outer.zip", "/split.json"]
    assert (tmp_path / "drive" / "outer.zip").exists() == keep
    assert not (folder / "outer.zip").exists()
    if keep:  # a new machine with the same Drive: nothing is downloaded again
        monkeypatch.setenv("TPT_NB_DATASETS", str(tmp_path / "other"))
        sources.download("toy", progress=False)
        assert asked == ["/outer.zip", "/split.json", "/split.json"]


def test_every_data_set_says_how_to_get_it():
    for name in BENCHMARKS:
        text = sources.how_to_get(name)
        assert (name in sources.BY_HAND) != (name in sources.SOURCES)
        assert f"download {name}" in text or name in sources.BY_HAND
    with pytest.raises(ValueError, match="image-net.org"):
        sources.download("imagenet")
    with pytest.raises(ValueError, match="known: imagenet-a"):
        sources.download("nonsense")


@pytest.mark.parametrize("name", sources.SOURCES)
def test_sources_are_well_formed_and_drive_is_asked_last(name):
    for source in sources.SOURCES[name]:
        assert len(source.sha256) in (0, 64) and len(source.md5) in (0, 32)
        drive = [url.startswith("gdrive:") for url in source.urls]
        assert drive == sorted(drive) and len(drive)
        assert all(url.startswith(("gdrive:", "http")) for url in source.urls)
        big = source.filename.endswith(ARCHIVES) and source.size > 1e9
        assert not big or source.sha256, "a large file has a checksum"


def test_the_command_line_downloads_and_says_where_to(
    archive_server, tmp_path, monkeypatch, capsys
):
    port, _, sha = archive_server
    toy = Source("outer.zip", (f"http://127.0.0.1:{port}/outer.zip",), sha256=sha)
    monkeypatch.setitem(sources.SOURCES, "toy", (toy,))
    monkeypatch.setenv("TQDM_DISABLE", "1")
    assert cli.main(["download", "toy", "--root", str(tmp_path / "to")]) == 0
    assert f"toy is in {tmp_path / 'to'}" in capsys.readouterr().out
    assert (tmp_path / "to" / "outer" / "inner.tar.gz").is_file()
    assert cli.main(["download", "stanford-cars"]) == 2
    assert "Kaggle" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        cli.main(["download", "toy", "--rot", "x"])
    assert "did you mean '--root'" in capsys.readouterr().err
