"""A plain class-folder data set, made on the disk for each test."""

import contextlib
import errno
import io
import os
import pickle
import random
import shutil
import struct
import subprocess
import sys
import tempfile
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tpt_nb.core.images import read_rgb
from tpt_nb.core.paths import REPO
from tpt_nb.datasets import image_files, load, load_folder
from tpt_nb.features import encode
from tpt_nb.views import RandomViews


def save(path: Path, seed: int = 0, mode: str = "RGB", **params) -> Image.Image:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (12, 20, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).convert(mode)
    image.save(path, **params)
    return image


@pytest.fixture
def root(tmp_path) -> Path:
    root = tmp_path / "pets"
    for k, name in enumerate(["cat/b.png", "cat/a.PNG", "great_dane/x/1.png", "cat-10/2.png"]):
        save(root / name, k)
    (root / "cat" / "notes.txt").write_text("not an image")
    save(root / ".cache" / "thumb.png")
    save(root / "__MACOSX" / "cat.png")
    save(root / "cat" / ".hidden.png")
    return root


def test_images_labels_and_names(root):
    data = load_folder(root)
    assert data.name == "pets" and len(data) == 4
    assert data.ids == ["cat-10/2.png", "cat/a.PNG", "cat/b.png", "great_dane/x/1.png"]
    assert data.ids == sorted(data.ids)
    assert data.classnames == ["cat", "cat-10", "great dane"]
    assert data.targets == [1, 0, 0, 2]
    for i in range(4):
        image, target = data[i]
        assert image.mode == "RGB" and target == data.targets[i]
        assert data.paths[i] == str(root / data.ids[i])
        assert np.array_equal(np.asarray(image), np.asarray(Image.open(root / data.ids[i])))


def test_mapping_names_folders_and_may_hold_more(root):
    names = {"fish": "goldfish", "great_dane": "Great Dane", "cat": "tabby", "cat-10": "tabby"}
    data = load_folder(str(root), names)
    assert data.classnames == ["tabby", "Great Dane"] and data.targets == [0, 0, 0, 1]


def test_list_is_the_label_space_in_its_order(root):
    data = load_folder(root, ["Great Dane", "goldfish", "Cat", "cat 10"])
    assert data.classnames == ["Great Dane", "goldfish", "Cat", "cat 10"]
    assert data.targets == [3, 2, 2, 0]


def test_classnames_file_in_coops_layout(root):
    lines = ["cat tabby cat", "great_dane great dane", "cat-10  old cat ", "", "n01 tench"]
    (root / "classnames.txt").write_text("\n".join(lines))
    assert load_folder(root).classnames == ["tabby cat", "old cat", "great dane"]
    assert load_folder(root, {"cat": "a", "cat-10": "b", "great_dane": "c"}).classnames == [*"abc"]
    (root / "classnames.txt").write_text("cat tabby\ngreat_dane\n")
    with pytest.raises(ValueError, match=r"classnames.txt, line 2: 'great_dane'"):
        load_folder(root)


@pytest.mark.parametrize("classnames", [["cat", "dog"], {"cat": "Cat", "dog": "Dog"}])
def test_folder_without_class_name(root, classnames):
    with pytest.raises(ValueError) as error:
        load_folder(root, classnames)
    text = str(error.value)
    assert "2 of 3 class folders" in text and "'cat-10', 'great_dane'" in text
    assert "'cat', 'dog'" in text and str(root) in text and "mapping" in text


def test_many_mismatches_show_the_first(tmp_path):
    for i in range(20):
        save(tmp_path / f"n{i:02d}" / "1.png")
    with pytest.raises(ValueError, match=r"20 of 20 .*'n00', 'n01', 'n02', 'n03', 'n04' \.\.\."):
        load_folder(tmp_path, ["tench"])


def test_list_that_repeats_a_name(root):
    with pytest.raises(ValueError, match="'great_dane' more than once"):
        load_folder(root, ["great_dane", "cat", "Great Dane", "cat-10"])


def test_empty_and_wrong_folders(tmp_path):
    with pytest.raises(ValueError, match="no class folder; expected images in"):
        load_folder(tmp_path)
    save(tmp_path / "loose.png")
    with pytest.raises(ValueError, match="1 images but no class folder"):
        load_folder(tmp_path)
    (tmp_path / "dog").mkdir()
    with pytest.raises(ValueError, match=r"no image in the 1 class folders.*'dog'.*\.jpg"):
        load_folder(tmp_path)
    with pytest.raises(ValueError, match="does not exist"):
        load_folder(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="is a file"):
        load_folder(tmp_path / "loose.png")


def test_a_subset_has_the_images_of_its_ids(root):
    part = load("folder", n=2, root=root)
    assert len(part) == 2 < len(load_folder(root))
    for i, image_id in enumerate(part.ids):
        assert np.array_equal(np.asarray(part[i][0]), np.asarray(read_rgb(root / image_id)))


def test_fingerprint_is_of_paths_and_sizes(root, tmp_path):
    first = load_folder(root).fingerprint
    shutil.copytree(root, tmp_path / "copy", copy_function=shutil.copyfile)  # new times
    assert load_folder(tmp_path / "copy").fingerprint == first
    names = {"cat": "a", "cat-10": "b", "great_dane": "c"}
    assert load_folder(root, names).fingerprint == first  # of the images, not of their labels
    path = root / "cat" / "b.png"
    path.write_bytes(path.read_bytes() + b"!")
    longer = load_folder(root).fingerprint
    path.rename(root / "cat" / "c.png")
    assert len({first, longer, load_folder(root).fingerprint}) == 3


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK", "RGB", "LA", "RGBA"])
def test_every_mode_is_read_as_rgb(tmp_path, mode):
    path = tmp_path / ("x.tif" if mode == "CMYK" else "x.png")
    image = save(path, mode=mode)
    read = read_rgb(path)
    assert read.mode == "RGB" and np.array_equal(np.asarray(read), np.asarray(image.convert("RGB")))


def test_transparency_lies_over_white(tmp_path):
    pixels = np.zeros((4, 4, 4), np.uint8)
    pixels[:2] = (10, 20, 30, 255)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    read = np.asarray(read_rgb(tmp_path / "x.png"))
    assert (read[:2] == (10, 20, 30)).all() and (read[2:] == 255).all()


def test_sixteen_bit_grey_is_scaled(tmp_path):
    values = np.array([[0, 256, 30000, 65535]], np.uint16)
    Image.fromarray(values).save(tmp_path / "x.png")
    assert np.asarray(read_rgb(tmp_path / "x.png"))[0, :, 0].tolist() == [0, 1, 117, 255]


def test_exif_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it rotated by 90 degrees clockwise
    image = save(tmp_path / "x.png", exif=exif)
    turned = image.transpose(Image.Transpose.ROTATE_270)
    assert np.array_equal(np.asarray(read_rgb(tmp_path / "x.png")), np.asarray(turned))


class MeanColour:
    """Encodes a view by its mean colour."""

    name, image_size, fingerprint = "mean", 16, "mean-0"

    def encode_views(self, views):
        return torch.nn.functional.normalize(views.float().mean(dim=(2, 3)), dim=-1)


def test_damaged_files_fail_with_their_path_and_the_rest_is_encoded(root, tmp_path):
    (root / "cat" / "b.png").write_bytes(b"this is no picture")
    (root / "cat" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    data = load_folder(root)
    with pytest.warns(UserWarning, match="2 of 5 images failed"):
        result = encode(
            pickle.loads(pickle.dumps(data)),
            MeanColour(),
            RandomViews(n_aug=2, size=16),
            cache=tmp_path / "cache",
            workers=0,
            progress=False,
        )
    assert [f["path"] for f in result.failed] == [
        str(root / "cat" / n) for n in ("b.png", "gone.png")
    ]
    assert "UnidentifiedImageError" in result.failed[0]["error"]
    assert "FileNotFoundError" in result.failed[1]["error"]
    assert result.ids == ["cat-10/2.png", "cat/a.PNG", "great_dane/x/1.png"]
    assert result.targets.tolist() == [1, 0, 2]


# --- pixels --------------------------------------------------------------------------------------


def grey(path: Path, values, **params) -> list[int]:
    """What comes out of grey values that were saved."""
    Image.fromarray(np.array([values])).save(path, **params)
    read = np.asarray(read_rgb(path))
    assert (read == read[..., :1]).all()
    return read[0, :, 0].tolist()


def test_integers_of_32_bits_are_scaled_by_their_true_range(tmp_path):
    path = tmp_path / "x.tif"
    assert grey(path, np.array([0, 7, 200, 255], np.int32)) == [0, 7, 200, 255]
    assert grey(path, np.array([0, 7, 200], np.int32) * 257_000) == [0, 9, 255]
    assert grey(path, np.array([0, 100, 4095], np.int32)) == [0, 6, 255]
    assert grey(path, np.array([-100, 0, 155], np.int32)) == [0, 100, 255]
    assert grey(path, np.array([-(2**31), 0, 2**31 - 1], np.int32)) == [0, 128, 255]
    assert grey(path, np.zeros(3, np.int32)) == [0, 0, 0]


def test_dark_16_bits_stay_dark(tmp_path):
    for name in ("x.png", "x.tif"):
        assert grey(tmp_path / name, np.array([0, 255, 512, 1024], np.uint16)) == [0, 0, 2, 4]
    (tmp_path / "x.pgm").write_bytes(b"P5 2 1 65535\n" + bytes([0, 255, 4, 0]))
    assert np.asarray(read_rgb(tmp_path / "x.pgm"))[0, :, 0].tolist() == [0, 4]


def with_exif(png: bytes, junk: bytes) -> bytes:
    chunk = b"eXIf" + junk
    return (
        png[:33]
        + struct.pack(">I", len(junk))
        + chunk
        + struct.pack(">I", zlib.crc32(chunk))
        + png[33:]
    )


@pytest.mark.filterwarnings("ignore")
def test_a_damaged_exif_block_costs_no_image(tmp_path):
    path, rng = tmp_path / "x.png", np.random.default_rng(0)
    image = save(path)
    png = path.read_bytes()
    exif = Image.Exif()
    exif[0x0112] = 1
    whole = exif.tobytes()[6:]
    junk = [
        b"\x00\x08\x00\x02\x01\x12\x00\x03",
        b"",
        b"II*\0",
        b"II*\0\xff\xff\xff\xff",
        whole[:-3],
    ]
    for _ in range(100):
        block = bytearray(whole)
        for place in rng.integers(0, len(block), 3):
            block[place] = rng.integers(0, 256)
        junk.append(bytes(block[: rng.integers(1, len(block) + 1)]))
    for block in junk:
        path.write_bytes(with_exif(png, block))
        read = read_rgb(path)
        assert sorted(read.size) == sorted(image.size)  # a damaged block may still say "turned"
    path.write_bytes(with_exif(png, junk[0]))
    assert np.array_equal(np.asarray(read_rgb(path)), np.asarray(image))


# --- what a tree of images lists -----------------------------------------------------------------


def test_every_real_folder_counts_once(root, tmp_path):
    (root / "cat" / "again").symlink_to(root / "cat", target_is_directory=True)
    (root / "cat" / "up").symlink_to("..", target_is_directory=True)
    (root / "a-first").symlink_to(root / "great_dane", target_is_directory=True)  # sorts before
    elsewhere = tmp_path / "elsewhere"
    save(elsewhere / "3.png", 7)
    (elsewhere / "back").symlink_to(root)
    (root / "lynx").symlink_to(elsewhere, target_is_directory=True)
    (root / "self").symlink_to("self")
    data = load_folder(root)
    assert data.ids == [
        "cat-10/2.png", "cat/a.PNG", "cat/b.png", "great_dane/x/1.png", "lynx/3.png"
    ]  # fmt: skip
    assert "links to folders that are read already: 4 (the first: a-first)" in data.note
    assert "class folders without images: 1 (the first: a-first)" in data.note
    assert "links that lead nowhere: 1 (the first: self)" in data.note


def test_a_linked_root_and_twice_the_same_folder_elsewhere(root, tmp_path):
    (tmp_path / "link").symlink_to(root, target_is_directory=True)
    assert load_folder(tmp_path / "link").ids == load_folder(root).ids
    save(tmp_path / "more" / "x.png")
    for name in ("one", "two"):
        (root / name).symlink_to(tmp_path / "more")
    assert [i for i in load_folder(root).ids if i.endswith("x.png")] == ["one/x.png"]


def test_a_folder_that_may_not_be_read_is_an_error_that_names_it(root, monkeypatch):
    scan = os.scandir

    def sealed(path):
        if Path(path).name == "x":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", sealed)
    for read in (load_folder, image_files):
        with pytest.raises(ValueError, match=r"great_dane/x cannot be read \(Permission denied\)"):
            read(root)


@pytest.mark.skipif(os.name != "posix", reason="modes of POSIX")
def test_a_sealed_class_folder_for_another_user_than_root(root):
    sealed = []
    for mode in (0o000, 0o444, 0o300):
        sealed.append(shutil.copytree(root, root.with_name(f"pets-{mode:o}")) / "cat")
        sealed[-1].chmod(mode)
    for folder in [root, *root.parents]:  # pytest's own folders are for their user alone
        if folder == Path(tempfile.gettempdir()):
            break
        folder.chmod(0o755)
    code = (
        "import os, sys\n"
        "from tpt_nb.datasets import load_folder\n"
        "if os.getuid() == 0: os.setuid(65534)\n"
        "for root in sys.argv[1:]:\n"
        "    try: print(len(load_folder(root)), 'images')\n"
        "    except ValueError as error: print(error)\n"
    )
    command = [sys.executable, "-c", code, *(str(cat.parent) for cat in sealed)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPO)
    for cat in sealed:
        cat.chmod(0o755)
    lines = done.stdout.splitlines()
    assert len(lines) == 3, done.stderr
    for cat, line in zip(sealed, lines, strict=True):
        assert line.startswith(f"{cat} cannot be read (permission denied)")


def test_system_folders_are_no_classes_and_hold_no_images(root):
    for name in ("@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found", ".Trash"):
        save(root / name / "x.png")
        save(root / "cat" / name / "y.png")
    data = load_folder(root)
    assert data.classnames == ["cat", "cat-10", "great dane"] and len(data) == 4
    by_path = sorted(data.ids, key=Path)
    assert [p.relative_to(root).as_posix() for p in image_files(root)] == by_path


def test_what_is_left_out_is_said(root, capsys):
    assert load_folder(root).note == ""
    for name in ("cat/1.jfif", "cat/2.avif", "cat-10/x/3.jpe"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(b"x")
    (root / "empty").mkdir()
    save(root / "loose.png")
    save(root / "Great Dane" / "y.png")
    data = load_folder(root)
    assert data.note == (
        f"{root}: pictures of other kinds left out: 3 (the first: cat-10/x/3.jpe); "
        "images in no class folder left out: 1 (the first: loose.png); "
        "class folders without images: 1 (the first: empty); "
        "class names of two folders: 1 (the first: 'Great Dane' and 'great_dane')"
    )
    image_files(root)
    assert "pictures of other kinds left out: 3" in capsys.readouterr().out


def test_two_spellings_of_unicode_are_one_class(tmp_path):
    for k, name in enumerate(("caf\u00e9", "cafe\u0301")):
        save(tmp_path / name / f"{k}.png")
    data = load_folder(tmp_path)
    assert data.classnames == ["caf\u00e9"] and data.targets == [0, 0]
    assert "class names of two folders: 1" in data.note
    assert load_folder(tmp_path, ["CAFE\u0301", "tea"]).targets == [0, 0]


@pytest.mark.skipif(sys.platform != "linux", reason="such names are of Linux")
def test_names_that_are_not_utf8(root):
    cat = os.fsencode(root / "cat")
    os.rename(cat + b"/b.png", cat + b"/caf\xe9.png")
    os.rename(os.fsencode(root / "great_dane"), os.fsencode(root) + b"/d\xe4nisch")
    data = load_folder(root)
    assert data.ids == ["cat-10/2.png", "cat/a.PNG", "cat/caf\\xe9.png", "d\\xe4nisch/x/1.png"]
    assert data.classnames == ["cat", "cat-10", "d\\xe4nisch"]
    assert all(data[i][0].size == (20, 12) for i in range(4))
    "".join([*data.ids, *data.paths, *data.classnames, data.note]).encode()  # can be written
    assert len(image_files(root)) == 4


def test_text_files_with_a_mark_and_in_another_encoding(root):
    text = "cat Katze\ngreat_dane Dänische Dogge\ncat-10 zehn\n"
    expected = ["Katze", "zehn", "Dänische Dogge"]
    for encoding in ("utf-8", "utf-8-sig", "utf-16"):
        (root / "classnames.txt").write_bytes(text.encode(encoding))
        assert load_folder(root).classnames == expected
    (root / "classnames.txt").write_bytes(b"\xef\xbb\xbfcat\ngreat_dane\ncat-10\n")
    assert load_folder(root).classnames == ["cat", "cat-10", "great dane"]
    (root / "classnames.txt").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=r"classnames.txt, line 2: not UTF-8"):
        load_folder(root)


def test_random_trees_are_listed_as_they_were_made(tmp_path):
    """Folders, hidden ones, links back and across: every image that is there, once."""
    for seed in range(60):
        rng, root = random.Random(seed), tmp_path / str(seed)
        folders, expected = [root / name for name in "ab"], set()
        for _ in range(rng.randint(2, 12)):
            parent = rng.choice(folders)
            folders.append(parent / rng.choice(["x", "y", ".git", "@eaDir", "z z", "__MACOSX"]))
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
            inner = folder.relative_to(root).parts
            passed = any(part in (".git", "@eaDir", "__MACOSX") for part in inner)
            for name in rng.sample(["1.png", "2.JPG", ".3.png", "4.txt", "5.avif"], 3):
                (folder / name).write_bytes(b"x")
                if name in ("1.png", "2.JPG") and not passed:
                    expected.add((folder / name).relative_to(root).as_posix())
        for k in range(rng.randint(0, 6)):
            (rng.choice(folders) / f"link{k}").symlink_to(rng.choice([root, *folders]))
        found = [p.resolve().relative_to(root.resolve()).as_posix() for p in image_files(root)]
        visible = [f for f in found if not any(p in f for p in (".git", "@eaDir", "__MACOSX"))]
        assert len(found) == len(set(found)) and set(visible) == expected


@pytest.mark.parametrize("form", ["PNG", "JPEG", "TIFF", "GIF", "BMP", "WEBP"])
def test_random_damage_gives_an_image_or_an_ordinary_error(tmp_path, form):
    buffer, rng = io.BytesIO(), np.random.default_rng(0)
    save(tmp_path / "x.png").save(buffer, form)
    whole = buffer.getvalue()
    for _ in range(100):
        data = bytearray(whole)
        for place in rng.integers(0, len(data), rng.integers(1, 9)):
            data[place] = rng.integers(0, 256)
        (tmp_path / "y").write_bytes(data[: rng.integers(len(data) // 2, len(data) + 1)])
        with contextlib.suppress(Exception), warnings.catch_warnings(action="ignore"):
            assert read_rgb(tmp_path / "y").mode == "RGB"
