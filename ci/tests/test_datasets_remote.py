"""Folders that are elsewhere: fsspec's memory file system, and a web server on this machine."""

import functools
import io
import os
import pickle
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec.core
import numpy as np
import pytest
import torch
from PIL import Image
from test_folder import MeanColour

from tpt_nb import datasets
from tpt_nb.core.remote import Remote, is_remote
from tpt_nb.datasets import load_folder
from tpt_nb.features import encode
from tpt_nb.views import RandomViews

FILES = ["n01498041/a.png", "n01498041/b.png", "n07753592/x/c.png", "n07753592/d.png"]


def png(k: int) -> bytes:
    pixels = np.random.default_rng(k).integers(0, 256, (12, 20, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("TPT_NB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def bucket(cache):
    """``memory://bucket/a`` with class folders, and what else lies about in a bucket."""
    fs = fsspec.filesystem("memory")
    for k, name in enumerate(FILES):
        fs.pipe(f"/bucket/a/{name}", png(k))
    fs.pipe("/bucket/a/README.txt", b"about")
    fs.pipe("/bucket/a/n07753592/.hidden.png", b"x")
    fs.pipe("/bucket/a/__MACOSX/n07753592.png", b"x")
    yield fs
    fs.rm("/bucket", recursive=True)


class Web(SimpleHTTPRequestHandler):
    asked: list[str] = []

    def log_message(self, *args):
        pass

    def do_GET(self):
        self.asked.append(self.path)
        super().do_GET()


@pytest.fixture
def web(cache, tmp_path):
    """The same folder behind a web server that lists its folders."""
    for k, name in enumerate(FILES):
        path = tmp_path / "www" / "a" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(k))
    Web.asked.clear()
    handler = functools.partial(Web, directory=str(tmp_path / "www"))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/a"
    server.shutdown()
    thread.join()
    server.server_close()


def kept(cache: Path) -> list[str]:
    return sorted(
        path.relative_to(folder).as_posix()
        for folder in (cache / "remote").glob("*/files")
        for path in folder.rglob("*")
        if path.is_file()
    )


def same_images(data) -> None:
    expected = {name: png(k) for k, name in enumerate(FILES)}
    assert data.ids == sorted(FILES)
    for i, image_id in enumerate(data.ids):
        picture = Image.open(io.BytesIO(expected[image_id]))
        assert np.array_equal(np.asarray(data[i][0]), np.asarray(picture))


def test_a_bucket_is_a_folder(bucket, cache):
    data = datasets.load("folder", root="memory://bucket/a")
    assert data.classnames == ["n01498041", "n07753592"] and data.targets == [0, 0, 1, 1]
    assert data.paths[0] == "memory://bucket/a/n01498041/a.png" and data.name == "a"
    assert kept(cache) == []  # nothing is fetched before it is read
    data[1]
    assert kept(cache) == ["n01498041/b.png"]
    same_images(data)
    part = datasets.load("folder", n=2, root="memory://bucket/a/")
    assert len(part) == 2 and part.fingerprint == data.fingerprint


def test_a_web_server_that_lists_its_folders(web, cache):
    data = datasets.load("folder", root=web)
    same_images(data)
    asked = len(Web.asked)
    same_images(data)
    assert len(Web.asked) == asked  # the second time from the disk


def test_imagenet_a_in_a_bucket_keeps_its_label_space(bucket):
    data = datasets.load("imagenet-a", root="memory://bucket/a")
    assert len(data.classnames) == 200
    assert {data.classnames[t] for t in data.targets} == {"stingray", "banana"}
    bucket.pipe("/bucket/a/n01440764/x.png", png(9))
    with pytest.raises(ValueError, match="1 of 3 class folders .*n01440764"):
        datasets.load("imagenet-a", root="memory://bucket/a")


def test_images_are_kept_and_a_run_goes_on_without_the_net(bucket, cache, capsys, monkeypatch):
    data = datasets.load("folder", root="memory://bucket/a")
    same_images(data)

    def down(*args, **params):
        raise ConnectionError("the network is unreachable")

    with monkeypatch.context() as patch:
        patch.setattr(type(bucket), "find", down)
        patch.setattr(type(bucket), "cat_file", down)
        again = datasets.load("folder", root="memory://bucket/a")
        assert "cannot be reached" in capsys.readouterr().out
        assert again.fingerprint == data.fingerprint
        same_images(again)
        with pytest.raises(OSError, match="memory://other cannot be listed: .*unreachable"):
            datasets.load("folder", root="memory://other")


def test_an_image_that_cannot_be_fetched_fails_alone(bucket, cache, tmp_path):
    data = load_folder("memory://bucket/a")
    bucket.rm("/bucket/a/n01498041/b.png")
    with pytest.warns(UserWarning, match="1 of 4 images failed"):
        result = encode(
            pickle.loads(pickle.dumps(data)),
            MeanColour(),
            RandomViews(n_aug=1, size=16),
            cache=tmp_path / "features",
            workers=0,
            progress=False,
        )
    assert result.failed[0]["path"] == "memory://bucket/a/n01498041/b.png"
    assert "cannot be fetched" in result.failed[0]["error"]
    assert len(result) == 3 and torch.isfinite(result.features).all()


def test_a_transfer_that_breaks_leaves_nothing_under_the_final_name(bucket, cache, monkeypatch):
    data = load_folder("memory://bucket/a")
    monkeypatch.setattr(os, "replace", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        data[0]
    assert kept(cache) == []


def test_classnames_file_in_a_bucket(bucket):
    bucket.pipe("/bucket/a/classnames.txt", b"n01498041 ray\nn07753592 fruit\n")
    assert datasets.load("folder", root="memory://bucket/a").classnames == ["ray", "fruit"]


def test_what_is_left_out_there_is_said_too(bucket):
    ids = load_folder("memory://bucket/a").ids
    for name in ("@eaDir/x.png", "n07753592/lost+found/x.png", "n07753592/x.avif", "loose.png"):
        bucket.pipe(f"/bucket/a/{name}", png(1))
    data = load_folder("memory://bucket/a")
    assert data.ids == ids and data.classnames == ["n01498041", "n07753592"]
    assert data.note == (
        "memory://bucket/a: pictures of other kinds left out: 1 (the first: n07753592/x.avif); "
        "images in no class folder left out: 1 (the first: loose.png)"
    )


def test_the_fingerprint_is_of_names_and_sizes(bucket):
    first = load_folder("memory://bucket/a").fingerprint
    bucket.pipe("/bucket/a/n07753592/d.png", png(3) + b"!")
    assert load_folder("memory://bucket/a").fingerprint != first


def test_a_missing_package_is_named(cache, monkeypatch):
    def lacking(url):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", lacking)
    with pytest.raises(ValueError, match=r"s3:// needs a package .*Install s3fs"):
        datasets.load("folder", root="s3://bucket/x")


def test_addresses_that_lead_nowhere_say_what_to_do(bucket):
    with pytest.raises(ValueError, match="no one here knows addresses such as nonsense://x"):
        datasets.load("folder", root="nonsense://x")
    with pytest.raises(ValueError, match="holds no files"):
        datasets.load("folder", root="memory://bucket/nothing")
    with pytest.raises(ValueError, match="does not lie within"):
        Remote("memory://bucket/a").local("../../etc/passwd")
    assert not is_remote("/some/folder") and not is_remote(Path("s3:/x")) and is_remote("gs://b")
