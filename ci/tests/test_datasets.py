"""The field's data sets on miniature trees of their true layout."""

import json
import pickle
import random
import shutil
from importlib import resources
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from tpt_nb import datasets
from tpt_nb.core.paths import DATA, cache_dir, datasets_dir
from tpt_nb.datasets import BENCHMARKS, imagenet_classes, registry

PNG = None


def image(path: Path) -> Path:
    """A small picture; the same bytes each time, so that many are cheap."""
    global PNG
    path.parent.mkdir(parents=True, exist_ok=True)
    if PNG is None:
        pixels = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path, "PNG")
        PNG = path.read_bytes()
    path.write_bytes(PNG)
    return path


def check(data, classes: int, expected: dict[str, int]) -> None:
    """The ids and labels are the expected ones, in a fixed order, and the images can be read."""
    assert len(data.classnames) == classes
    assert dict(zip(data.ids, data.targets, strict=True)) == expected
    assert data.ids == sorted(data.ids)
    picture, target = data[len(data) - 1]
    assert picture.size == (7, 9) and picture.mode == "RGB" and target == data.targets[-1]


# --- the table of classes ------------------------------------------------------------------------


def test_the_table_is_that_of_the_packages():
    info = resources.files("timm.data") / "_info"
    synsets = (info / "imagenet_synsets.txt").read_text().split()
    assert list(imagenet_classes()) == synsets == sorted(synsets)
    assert list(imagenet_classes().values()) == list(open_clip.IMAGENET_CLASSNAMES)
    for variant in "ar":
        listed = (info / f"imagenet_{variant}_synsets.txt").read_text().split()
        assert list(imagenet_classes(variant)) == listed
        assert all(imagenet_classes()[s] == n for s, n in imagenet_classes(variant).items())


def test_names_stand_beside_their_synsets():
    """WordNet's words for a synset; a list that slipped by one would agree on few of them."""
    known = {
        "n01440764": "tench",
        "n02007558": "flamingo",
        "n02012849": "crane bird",
        "n03126707": "construction crane",
        "n02123045": "tabby cat",
        "n04008634": "missile",
        "n03773504": "missile",
        "n07753592": "banana",
        "n15075141": "toilet paper",
    }
    names = imagenet_classes()
    assert {synset: names[synset] for synset in known} == known
    assert imagenet_classes("a")["n02007558"] == imagenet_classes("r")["n02007558"] == "flamingo"
    assert "n01440764" not in imagenet_classes("a")


# --- ImageNet and its variants -------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, place",
    [
        (name, place)
        for name in BENCHMARKS
        if name.startswith("imagenet") and name not in ("imagenet-v2", "imagenet-c")
        for place in BENCHMARKS[name].places
    ],
)
def test_class_folders_by_synset(tmp_path, name, place):
    names = imagenet_classes(name[-1] if name in ("imagenet-a", "imagenet-r") else "")
    rank = {synset: i for i, synset in enumerate(names)}
    some = random.Random(0).sample(list(names), 5)
    expected = {f"{s}/{s}_{i}.png": rank[s] for i, s in enumerate(some)}
    for image_id in expected:
        image(tmp_path / place / image_id)
    (tmp_path / place / "README.txt").write_text("about")
    data = datasets.load(name, root=tmp_path)
    check(data, len(names), expected)
    assert data.classnames == list(names.values()) and data.name == name
    assert f"{name}: 5 images of 5 classes are here; the whole set has" in data.note
    part = datasets.load(name, n=3, root=tmp_path)
    assert len(part) == 3 and set(part.ids) < set(expected) and part.note == data.note


@pytest.mark.parametrize("place", BENCHMARKS["imagenet-v2"].places)
def test_v2_folders_are_numbers_however_they_sort(tmp_path, place):
    for number in range(1000):
        (tmp_path / place / str(number)).mkdir(parents=True)
    expected = {f"{n}/x.png": n for n in (0, 1, 2, 9, 10, 11, 99, 100, 101, 999)}
    for image_id in expected:
        image(tmp_path / place / image_id)
    data = datasets.load("imagenet-v2", root=tmp_path)
    check(data, 1000, expected)
    assert data.classnames[10] == list(imagenet_classes().values())[10] == "brambling"


def test_v2_with_synset_folders_too(tmp_path):
    image(tmp_path / "n01440764" / "x.png")
    image(tmp_path / "n15075141" / "x.png")
    assert datasets.load("imagenet-v2", root=tmp_path).targets == [0, 999]


def test_two_classes_of_one_name_stay_two(tmp_path):
    for synset in ("n03773504", "n04008634"):
        image(tmp_path / synset / "x.png")
    data = datasets.load("imagenet", root=tmp_path)
    assert len(set(data.targets)) == 2
    assert {data.classnames[t] for t in data.targets} == {"missile"}


def test_folders_of_another_set_are_an_error_with_the_first_mismatches(tmp_path):
    only_r = [s for s in imagenet_classes("r") if s not in imagenet_classes("a")]
    both = next(s for s in imagenet_classes("r") if s in imagenet_classes("a"))
    for synset in [*only_r[:7], both]:
        image(tmp_path / synset / "x.png")
    with pytest.raises(ValueError) as error:
        datasets.load("imagenet-a", root=tmp_path)
    text = str(error.value)
    assert "7 of the 8 class folders" in text and "are no classes of imagenet-a" in text
    assert f"{only_r[0]}: 'goldfish', a class of imagenet and imagenet-r" in text
    assert only_r[4] in text and only_r[5] not in text and "..." in text
    image(tmp_path / "n99999999" / "x.png")
    with pytest.raises(ValueError, match="n99999999: no class of ImageNet"):
        datasets.load("imagenet", root=tmp_path)


def test_v2_with_a_folder_too_many(tmp_path):
    image(tmp_path / "0" / "x.png")
    image(tmp_path / "1000" / "x.png")
    with pytest.raises(ValueError, match="1000: no class of ImageNet"):
        datasets.load("imagenet-v2", root=tmp_path)


def test_names_in_another_order_are_an_error(tmp_path):
    image(tmp_path / "n07753592" / "x.png")
    names = list(imagenet_classes("a").values())
    with pytest.raises(ValueError, match="order must be that of the labels") as error:
        datasets.load("imagenet-a", root=tmp_path, classnames=sorted(names))
    assert "label 0 is 'stingray', but the list has" in str(error.value)
    with pytest.raises(ValueError, match="199 class names for the 200 classes"):
        datasets.load("imagenet-a", root=tmp_path, classnames=names[:-1])
    shifted = names[1:] + names[:1]
    with pytest.raises(ValueError, match="200 of 200 class names"):
        datasets.load("imagenet-a", root=tmp_path, classnames=shifted)
    worded = [f"{name} seen" for name in names]
    assert datasets.load("imagenet-a", root=tmp_path, classnames=worded).classnames == worded
    by_synset = dict(reversed(imagenet_classes("a").items()))
    assert datasets.load("imagenet-a", root=tmp_path, classnames=by_synset).classnames == names
    by_synset.pop("n07753592")
    with pytest.raises(ValueError, match=r"lacks 1 of the 200 .*n07753592 \(banana\)"):
        datasets.load("imagenet-a", root=tmp_path, classnames=by_synset)


def test_not_here_says_what_is_expected_and_how_to_get_it(tmp_path, monkeypatch):
    (tmp_path / "holiday").mkdir()
    with pytest.raises(FileNotFoundError, match="expected class folders .* It holds holiday"):
        datasets.load("imagenet-a", root=tmp_path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        datasets.load("imagenet-a", root=tmp_path / "nowhere")
    (tmp_path / "ILSVRC2012_val_00000001.JPEG").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="torchvision.datasets.ImageNet"):
        datasets.load("imagenet", root=tmp_path)
    monkeypatch.setenv("TPT_NB_DATASETS", str(tmp_path / "usual"))
    with pytest.raises(FileNotFoundError, match=r"tpt_nb download imagenet-a.* \(0.7 GB\)"):
        datasets.load("imagenet-a")
    with pytest.raises(FileNotFoundError, match="Register at image-net.org"):
        datasets.load("imagenet")
    image(tmp_path / "usual" / "imagenet-a" / "imagenet-a" / "n07753592" / "x.png")
    assert len(datasets.load("imagenet-a")) == 1
    shutil.move(tmp_path / "usual" / "imagenet-a", tmp_path / "usual" / "imagenet-adversarial")
    assert len(datasets.load("imagenet-a")) == 1


# --- sets with a split file ----------------------------------------------------------------------

SPLIT = [n for n, b in BENCHMARKS.items() if b.split and n != "caltech256"]


def split_tree(root: Path, name: str, place: str, inner: str, shelf: str | None = None) -> dict:
    """A tree in CoOp's layout: all classes in "train" (no files), five images in "test"."""
    benchmark = BENCHMARKS[name]
    flat = name in ("flowers102", "oxford-pets")  # images in one folder
    classes = [f"Thing_{i}" for i in range(benchmark.classes)]

    def entry(i: int, k: int) -> list:
        path = f"image_{i:05d}_{k}.jpg" if flat else f"Thing_{i}/image_{k}.jpg"
        return [path, i, classes[i].lower()]

    test = [entry(i, 7) for i in random.Random(1).sample(range(benchmark.classes), 5)]
    split = {"train": [entry(i, 0) for i in range(benchmark.classes)], "val": [], "test": test}
    for path, _, _ in test:
        image(root / place / inner / path)
    shelf = place if shelf is None else shelf
    (root / shelf).mkdir(parents=True, exist_ok=True)
    (root / shelf / benchmark.split).write_text(json.dumps(split))
    return {path: label for path, label, _ in test}


@pytest.mark.parametrize("name", SPLIT)
def test_coops_layout(tmp_path, name):
    benchmark = BENCHMARKS[name]
    expected = split_tree(tmp_path, name, benchmark.places[1], benchmark.images[0])
    for root in (tmp_path, tmp_path / benchmark.places[1]):  # all data sets, or this one
        data = datasets.load(name, root=root)
        check(data, benchmark.classes, expected)
        assert data.classnames == [f"thing_{i}" for i in range(benchmark.classes)]
        assert f"5 images by {benchmark.split}; papers use {benchmark.size:,}" in data.note


@pytest.mark.parametrize("name", SPLIT)
def test_tpts_layout(tmp_path, name):
    """The content of the images' folder in the data set's, the split files in data_splits."""
    benchmark = BENCHMARKS[name]
    place = benchmark.places[min(2, len(benchmark.places) - 1)]
    inner = {"flowers102": "jpg", "dtd": "images", "food101": "images"}.get(name, "")
    expected = split_tree(tmp_path, name, place, inner, "data_splits")
    check(datasets.load(name, root=tmp_path), benchmark.classes, expected)


def edit_split(root: Path, name: str, change) -> None:
    path = root / BENCHMARKS[name].split
    split = json.loads(path.read_text())
    change(split)
    path.write_text(json.dumps(split))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda s: s["test"][0].__setitem__(1, 3), "contradicts itself"),
        (lambda s: s["test"][0].__setitem__(2, "other"), r"is 'thing_\d+' and 'other'"),
        (lambda s: [e.__setitem__(1, (e[1] + 1) % 47) for e in s["test"]], "contradicts itself 1"),
        (
            lambda s: [e.__setitem__(2, f"thing_{(e[1] + 1) % 47}") for p in s.values() for e in p],
            "its folder says another class",
        ),
        (lambda s: s.update(train=s["train"][:9]), "expected 47, labelled 0 to 46"),
        (lambda s: s.update(test=[]), "no test images"),
        (lambda s: s.pop("test"), "is no split file"),
        (lambda s: s["test"].append(["x.jpg", "tench"]), "is no split file"),
    ],
)
def test_a_split_that_contradicts_itself_is_an_error(tmp_path, change, message):
    split_tree(tmp_path, "dtd", "", "images")
    edit_split(tmp_path, "dtd", change)
    with pytest.raises(ValueError, match=message):
        datasets.load("dtd", root=tmp_path)


def test_a_split_without_its_images(tmp_path):
    split_tree(tmp_path, "eurosat", "", "2750")
    shutil.rmtree(tmp_path / "2750")
    with pytest.raises(ValueError, match="which is in none of"):
        datasets.load("eurosat", root=tmp_path)


def test_names_of_ones_own_for_a_split(tmp_path):
    split_tree(tmp_path, "eurosat", "", "2750")
    names = [f"thing_{i}" for i in range(10)]
    with pytest.raises(ValueError, match="stand at the place of another class"):
        datasets.load("eurosat", root=tmp_path, classnames=names[::-1])
    own = {name: f"my {name}" for name in names[::-1]}
    data = datasets.load("eurosat", root=tmp_path, classnames=own)
    assert data.classnames == [f"my {name}" for name in names]


def test_caltech256_drops_faces_easy_and_closes_the_gap(tmp_path):
    raw = [f"{i + 1:03d}.thing-{i}" for i in range(257)]
    raw[252], raw[250] = "253.faces-easy-101", "251.airplanes-101"
    entries = [[f"{name}/{name[:3]}_0001.jpg", i, name] for i, name in enumerate(raw)]
    split = {"train": entries, "val": [], "test": [entries[i] for i in (0, 250, 252, 253, 256)]}
    for path, _, _ in split["test"]:
        image(tmp_path / "256_ObjectCategories" / path)
    (tmp_path / "split_Caltech256.json").write_text(json.dumps(split))
    data = datasets.load("caltech256", root=tmp_path)
    assert data.targets == [0, 250, 252, 255] and len(data.classnames) == 256
    assert [data.classnames[t] for t in data.targets] == [
        "thing-0",
        "airplanes",
        "thing-253",
        "thing-256",
    ]


# --- official test splits ------------------------------------------------------------------------


def test_aircraft(tmp_path):
    base = tmp_path / "fgvc-aircraft-2013b" / "data"
    names = [f"7{i:02d}-{i}00" for i in range(99)] + ["DC-9 of long name"]
    image(base / "images" / "1234567.jpg")
    image(base / "images" / "0000001.jpg")
    (base / "variants.txt").write_text("\n".join(names) + "\n")
    lines = base / "images_variant_test.txt"
    lines.write_text("1234567 DC-9 of long name\n0000001 703-300\n")
    data = datasets.load("fgvc-aircraft", root=tmp_path)
    check(data, 100, {"1234567.jpg": 99, "0000001.jpg": 3})
    lines.write_text("1234567 no such plane\n")
    with pytest.raises(ValueError, match="'no such plane' is not in variants.txt"):
        datasets.load("fgvc-aircraft", root=tmp_path)
    (base / "variants.txt").unlink()
    with pytest.raises(FileNotFoundError, match="fgvc-aircraft is not in .*without it the labels"):
        datasets.load("fgvc-aircraft", root=tmp_path)


def test_cub_counts_from_one(tmp_path):
    base = tmp_path / "CUB_200_2011"
    classes = [f"{i + 1:03d}.Black_footed_Bird_{i}" for i in range(200)]
    images = [f"{classes[4]}/a.jpg", f"{classes[0]}/b.jpg", f"{classes[199]}/c.jpg"]
    tables = {
        "classes.txt": classes,
        "images.txt": images,
        "image_class_labels.txt": [5, 1, 200],
        "train_test_split.txt": [0, 1, 0],
    }
    for path in images:
        image(base / "images" / path)
    for name, values in tables.items():
        (base / name).write_text("".join(f"{i + 1} {v}\n" for i, v in enumerate(values)))
    data = datasets.load("cub200", root=tmp_path)
    check(data, 200, {images[0]: 4, images[2]: 199})
    assert data.classnames[4] == "Black footed Bird 4"


@pytest.mark.parametrize("inner, listed", [("images", "test_splits.txt"), ("NWPU-RESISC45", "")])
def test_resisc45(tmp_path, inner, listed):
    classes = sorted(["airplane", "railway", "railway_station", *(f"place_{i}" for i in range(42))])
    for name in classes:
        (tmp_path / inner / name).mkdir(parents=True)
    files = ["railway_station_007.jpg", "railway_700.jpg"]
    for name in files:
        image(tmp_path / inner / name.rsplit("_", 1)[0] / name)
    path = tmp_path / (listed or "resisc45-test.txt")
    path.write_text("\n".join(files))
    data = datasets.load("resisc45", root=tmp_path)
    expected = {f"{f.rsplit('_', 1)[0]}/{f}": classes.index(f.rsplit("_", 1)[0]) for f in files}
    check(data, 45, expected)
    path.write_text("moon_001.jpg")
    with pytest.raises(ValueError, match="1 classes that have no folder: moon"):
        datasets.load("resisc45", root=tmp_path)


def test_sun397_without_the_split_file(tmp_path):
    folders = [f"/a/place_{i}" for i in range(396)] + ["/c/chapel/outdoor"]
    images = ["/a/place_3/sun_x.jpg", "/c/chapel/outdoor/sun_y.jpg"]
    for path in images:
        image(tmp_path / "SUN397" / path[1:])
    (tmp_path / "ClassName.txt").write_text("\n".join(folders))
    (tmp_path / "Testing_01.txt").write_text("\n".join(images))
    data = datasets.load("sun397", root=tmp_path)
    check(data, 397, {images[0][1:]: 3, images[1][1:]: 396})
    assert data.classnames[396] == "outdoor chapel"
    assert "by the official test split; papers use 19,850 (CoOp's" in data.note


def test_food101_by_torchvision(tmp_path):
    base = tmp_path / "food-101"
    classes = sorted(["apple_pie", "cheesecake", "cheese_plate", *(f"dish_{i}" for i in range(98))])
    test = {name: [f"{name}/1", f"{name}/2"] for name in classes}
    (base / "meta").mkdir(parents=True)
    (base / "meta" / "test.json").write_text(json.dumps(test))
    for name in classes:
        for k in (1, 2):
            image(base / "images" / name / f"{k}.jpg")
    data = datasets.load("food101", root=tmp_path)
    assert len(data) == 202 and data.classnames == classes
    assert all(data.classnames[t] == i.split("/")[1] for i, t in zip(*_pairs(data), strict=True))
    assert datasets.load("food101", root=base).ids == data.ids


def _pairs(data):
    return data.ids, data.targets


def test_pets_by_torchvision(tmp_path):
    base = tmp_path / "oxford-iiit-pet"
    breeds = [f"Breed_{i:02d}_Cat" for i in range(37)]
    lines = [f"{breed}_{k} {i + 1} 1 1" for i, breed in enumerate(breeds) for k in (1, 2)]
    (base / "annotations").mkdir(parents=True)
    (base / "annotations" / "test.txt").write_text("\n".join(lines) + "\n")
    for line in lines:
        image(base / "images" / f"{line.split()[0]}.jpg")
    data = datasets.load("oxford-pets", root=tmp_path)
    assert len(data) == 74 and data.classnames[3] == "Breed 03 Cat"
    assert data.targets == [i for i in range(37) for _ in range(2)]


def test_dtd_by_torchvision(tmp_path):
    base = tmp_path / "dtd" / "dtd"
    classes = [f"texture{i:02d}" for i in range(47)]
    files = [f"{name}/{name}_0001.jpg" for name in classes]
    for file in files:
        image(base / "images" / file)
    (base / "labels").mkdir()
    (base / "labels" / "test1.txt").write_text("\n".join(files))
    data = datasets.load("dtd", root=tmp_path)
    assert data.classnames == classes and data.targets == list(range(47))
    assert data.ids[0] == "images/texture00/texture00_0001.jpg"


def test_flowers_and_cars_by_torchvision(tmp_path, monkeypatch):
    from scipy.io import savemat
    from torchvision import datasets as tv

    base = tmp_path / "flowers-102"
    for i in (1, 2, 3):
        image(base / "jpg" / f"image_{i:05d}.jpg")
    savemat(base / "imagelabels.mat", {"labels": np.array([[102, 5, 1]])})
    savemat(base / "setid.mat", {"tstid": np.array([[1, 3]])})
    # torchvision compares these two files with the true ones by MD5
    monkeypatch.setattr(tv.flowers102, "check_integrity", lambda path, md5: Path(path).is_file())
    data = datasets.load("flowers102", root=tmp_path)
    check(data, 102, {"jpg/image_00001.jpg": 101, "jpg/image_00003.jpg": 0})
    assert data.classnames[0] == "pink primrose"

    base = tmp_path / "stanford_cars"
    for name in ("a.jpg", "b.jpg"):
        image(base / "cars_test" / name)
    (base / "devkit").mkdir()
    rows = np.array([("a.jpg", 196), ("b.jpg", 1)], [("fname", object), ("class", object)])
    savemat(base / "cars_test_annos_withlabels.mat", {"annotations": rows})
    cars = np.array([f"Maker Model {1800 + i}" for i in range(196)], object)
    savemat(base / "devkit" / "cars_meta.mat", {"class_names": cars})
    data = datasets.load("stanford-cars", root=tmp_path)
    check(data, 196, {"cars_test/a.jpg": 195, "cars_test/b.jpg": 0})
    assert data.classnames[195] == "Maker Model 1995"


@pytest.mark.parametrize("name", [n for n in BENCHMARKS if not n.startswith("imagenet")])
def test_an_empty_folder_says_what_is_expected(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=f"{name} is not in .*It holds nothing"):
        datasets.load(name, root=tmp_path)
    with pytest.raises(ValueError, match="cannot be read from s3://"):
        datasets.load(name, root="s3://bucket/x")


def test_the_card_has_a_line_for_each_set():
    text = (DATA / "README.md").read_text()
    for name, benchmark in BENCHMARKS.items():
        line = next(line for line in text.splitlines() if line.startswith(f"| `{name}` |"))
        assert f"| {benchmark.classes:,} |" in line
        assert f"| {benchmark.size:,} |" in line or not benchmark.size
        assert line.count("|") == 7


def test_order_check_lets_other_wordings_pass():
    known = ["cat", "dog", "tabby cat", "cat"]
    datasets.check_order("toy", known, ["Cat", "hound", "tabby_cat", "kitten"])
    with pytest.raises(ValueError, match="label 1 is 'dog', but the list has 'cat'"):
        datasets.check_order("toy", known, ["dog", "cat", "tabby cat", "cat"])


def test_templates_of_the_data_sets(mini):
    from tpt_nb.models import template_features
    from tpt_nb.runs import RunConfig, make_prompts

    assert datasets.template("dtd") == "{} texture."
    assert datasets.template("imagenet-a") == datasets.template("folder") == "a photo of a {}."
    assert all(b.template.count("{}") == 1 for b in BENCHMARKS.values())
    prompts = make_prompts(
        RunConfig(dataset="dtd", templates="dataset"), mini, ["banded", "dotted"]
    )
    expected = template_features(mini, ["banded", "dotted"], ["{} texture."])
    assert torch.equal(prompts.text_features(), expected)


# --- the registry --------------------------------------------------------------------------------


def test_names_get_and_register(monkeypatch, tmp_path):
    assert datasets.names()[0] == "iconshift" and {"folder", "dtd"} < set(datasets.names())
    for broken in (datasets.get, datasets.load):
        with pytest.raises(ValueError, match="unknown data set 'imagenet_a'; did you mean 'imagen"):
            broken("imagenet_a")
    monkeypatch.setattr(registry, "DATASETS", dict(registry.DATASETS))
    image(tmp_path / "cat" / "1.png")
    image(tmp_path / "dog" / "2.png")
    datasets.register("pets", lambda root, classnames: datasets.load_folder(tmp_path, classnames))
    assert datasets.load("pets").classnames == ["cat", "dog"] and "pets" in datasets.names()
    assert datasets.load("pets", n=1, classnames=["Dog", "Cat"]).ids == ["cat/1.png"]


def test_every_data_set_can_be_pickled_for_workers():
    for name in datasets.ICONSHIFT:
        part = datasets.load(name, n=3)
        again = pickle.loads(pickle.dumps(part))
        assert again[2][0].tobytes() == part[2][0].tobytes() and again.ids == part.ids


def test_where_the_cache_is(monkeypatch):
    monkeypatch.setenv("TPT_NB_CACHE", "/somewhere")
    assert cache_dir() == Path("/somewhere")
    for name in ("TPT_NB_CACHE", "TPT_NB_DATASETS"):
        monkeypatch.setenv(name, "")  # as if it were not set, and not the current folder
    monkeypatch.setenv("HOME", "/home/x")
    assert datasets_dir() == Path("/home/x/.cache/tpt_nb/datasets")
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("no home")))
    with pytest.raises(OSError, match="no home folder: set TPT_NB_CACHE"):
        cache_dir()
    monkeypatch.setenv("TPT_NB_CACHE", "/somewhere")
    assert cache_dir() == Path("/somewhere")
