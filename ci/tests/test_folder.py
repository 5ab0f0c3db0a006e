"""A plain class-folder data set, made on the disk for each test."""

import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tpt_nb.core.images import read_rgb
from tpt_nb.datasets import load, load_folder
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
