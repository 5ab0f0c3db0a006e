"""IconShift-200: the same picture everywhere, the variants, bad input."""

import dataclasses
import hashlib
import json
import re
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tpt_nb import datasets
from tpt_nb.datasets import iconshift

FIVE = ("iconshift", "iconshift-v2", "iconshift-a", "iconshift-r", "iconshift-sketch")
# variant -> its version, and candidate -> SHA-256 of the pixels; running this file writes it, but
# no other pixels under an old version
PINNED = Path(__file__).parent / "iconshift_hashes.json"


def digest(variant: str, index: int) -> str:
    image = iconshift.compose(iconshift.spec(variant, index))
    return hashlib.sha256(np.asarray(image).tobytes()).hexdigest()[:16]


def pinned_scenes() -> list[tuple[str, int]]:
    return [(v, i) for v in iconshift.VARIANTS for i in range(0, 1200, 97)]


def pins() -> dict[str, dict[str, str]]:
    found = {name: {"version": v.version} for name, v in iconshift.VARIANTS.items()}
    for variant, i in pinned_scenes():
        found[variant][str(i)] = digest(variant, i)
    return found


def same_pixels_or_another_version(before: dict, now: dict) -> None:
    for name in before:
        same = before[name] == now.get(name)
        if not same and before[name]["version"] == now[name]["version"]:
            raise AssertionError(
                f"the scenes of {name} are other pictures: give it another version in iconshift.py "
                "and run `python ci/tests/test_iconshift.py`; what ships with it is made anew"
            )


def test_scenes_are_the_same_picture_on_every_machine_as_long_as_the_version_is():
    pinned = json.loads(PINNED.read_text())
    same_pixels_or_another_version(pinned, pins())
    assert pins() == pinned, "run `python ci/tests/test_iconshift.py`"


def test_another_drawing_needs_another_version(monkeypatch):
    pinned, paint = json.loads(PINNED.read_text()), iconshift.compose
    monkeypatch.setattr(
        iconshift,
        "compose",
        lambda s: paint({**s, "angle": s["angle"] + (s["sketch"] and not s["ink"])}),
    )
    with pytest.raises(AssertionError, match="scenes of iconshift-sketch are other pictures"):
        same_pixels_or_another_version(pinned, pins())
    sketch = dataclasses.replace(iconshift.VARIANTS["iconshift-sketch"], version="another")
    monkeypatch.setitem(iconshift.VARIANTS, "iconshift-sketch", sketch)
    same_pixels_or_another_version(pinned, pins())


def test_pinned_scenes_cover_every_texture_and_style():
    specs = [iconshift.spec(v, i) for v, i in pinned_scenes()]
    assert {s["texture"] for s in specs} == set(iconshift.TEXTURES)
    assert {s["style"] for s in specs} == set(iconshift.styles())


def test_two_hundred_distinct_names_and_a_sprite_for_each_claim():
    names = iconshift.classnames()
    assert len(names) == len(set(names)) == 200
    for style, about in iconshift.styles().items():
        for i, sprite in enumerate(iconshift.sprites(style)):
            drawn = sprite.getchannel("A").getbbox() is not None
            assert drawn == (i not in about["missing"]), (style, names[i])


def test_every_class_has_source_rendition_and_sketch():
    for target in range(200):
        assert len(iconshift._styles_of(("source",), target)) == 5
        assert iconshift._styles_of(("rendition",), target)
        assert iconshift._styles_of(("sketch",), target)


@pytest.mark.parametrize("name", FIVE)
def test_variants(name):
    data = datasets.load(name)
    assert len(data) >= (1000 if name == "iconshift-a" else 2000)
    assert len(set(data.ids)) == len(data)
    image, target = data[7]
    assert image.size == (224, 224) and image.mode == "RGB"
    assert target == data.targets[7]
    assert np.bincount(data.targets, minlength=200).min() > 0


def test_object_sizes_follow_the_variants():
    for name in iconshift.VARIANTS:
        low, high = iconshift.VARIANTS[name].side
        sides = [iconshift.spec(name, i)["side"] for i in range(300)]
        assert low <= min(sides) and max(sides) <= high
        groups = {iconshift.styles()[iconshift.spec(name, i)["style"]]["group"] for i in range(60)}
        assert groups == set(iconshift.VARIANTS[name].groups)


def test_training_and_test_share_no_photograph():
    train = {bytes(p.tobytes()) for p in iconshift._photos("train")}
    test = {bytes(p.tobytes()) for p in iconshift._photos("test")}
    assert train and test and not train & test


def test_subset_is_balanced_nested_and_seeded():
    small, large = datasets.load("iconshift", n=150), datasets.load("iconshift", n=450)
    assert set(small.ids) <= set(large.ids)
    counts = np.bincount(large.targets, minlength=200)
    assert counts.min() == 2 and counts.max() == 3
    assert small.ids == datasets.load("iconshift", n=150).ids
    assert small.ids != datasets.load("iconshift", n=150, seed=1).ids
    assert small.fingerprint == large.fingerprint


def test_subset_images_are_the_images_of_the_whole():
    whole, part = datasets.load("iconshift-r"), datasets.load("iconshift-r", n=30)
    for i in (0, 11, 29):
        j = whole.ids.index(part.ids[i])
        assert part[i][0].tobytes() == whole[j][0].tobytes() and part[i][1] == whole[j][1]


def test_unknown_name_lists_the_known():
    with pytest.raises(ValueError, match="iconshift-sketch"):
        datasets.load("iconshift-x")


@pytest.mark.parametrize("n", [-1, 10**6])
def test_n_out_of_range_says_the_size(n):
    with pytest.raises(ValueError, match=str(len(datasets.load("iconshift")))):
        datasets.load("iconshift", n=n)


@pytest.fixture
def copied_data(tmp_path, monkeypatch):
    """IconShift's files in a folder of the test's own, caches emptied around it."""
    shutil.copytree(iconshift.DATA / "iconshift", tmp_path / "iconshift")
    caches = [f for f in vars(iconshift).values() if hasattr(f, "cache_clear")]
    [f.cache_clear() for f in caches]
    monkeypatch.setattr(iconshift, "DATA", tmp_path)
    yield tmp_path / "iconshift"
    [f.cache_clear() for f in caches]


@pytest.mark.parametrize("file", ["noto.png", "classes.json", "photos-test.png"])
@pytest.mark.parametrize("damage", ["missing", "damaged"])
def test_broken_file_names_itself_and_the_remedy(copied_data, file, damage):
    path = copied_data / file
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(OSError, match=re.escape(file) + ".*" + damage + ".*build.py"):
        for i in range(40):  # some of the first scenes need each of the files
            iconshift.scene("iconshift", i)


def test_the_fingerprint_is_the_version_and_sees_files_of_ones_own(copied_data):
    before = {name: v.version for name, v in iconshift.VARIANTS.items()}
    assert {name: iconshift.fingerprint(name) for name in before} == before
    sheet = Image.open(copied_data / "noto.png").convert("RGBA")
    sheet.putpixel((5, 5), (1, 2, 3, 255))
    sheet.save(copied_data / "noto.png")
    others = {iconshift.fingerprint(name) for name in before}
    assert len(others) == len(before) and not others & set(before.values())


def test_the_shipped_pictures_are_of_the_present_version():
    shipped = list((iconshift.DATA / "diffusion" / "pictures").glob("*.zip"))
    for path in shipped:
        with zipfile.ZipFile(path) as archive:
            about = json.loads(archive.read("manifest.json"))["key"]["dataset"]
        assert about["fingerprint"] == iconshift.fingerprint(about["name"])
    assert shipped


if __name__ == "__main__":
    if PINNED.exists():
        same_pixels_or_another_version(json.loads(PINNED.read_text()), pins())
    PINNED.write_text(json.dumps(pins(), indent=0) + "\n")
