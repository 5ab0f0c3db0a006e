"""ImageNet-C on miniature trees, unpacked as it should be and as people do; damage by name."""

import pickle
import re
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tpt_nb import datasets, runs
from tpt_nb.core.remote import Remote
from tpt_nb.datasets import imagenet_classes
from tpt_nb.datasets.imagenet_c import ARCHIVES, DAMAGES
from tpt_nb.scale import planner

SOME = ("n01440764", "n07753592", "n15075141")  # labels 0, 954, 999
RANK = {synset: i for i, synset in enumerate(imagenet_classes())}
LAYOUTS = [  # where the tree lies below the root that is given
    "",
    "imagenet-c",
    "ImageNet-C",
    "weather",  # each archive unpacked in a folder of its own
    "imagenet-c/weather",
    "imagenet-c/imagenet-c",
    "imagenet-c/weather/weather",
    "imagenet-c/fog",
]


def tree(root: Path, damage: str = "fog", severity: int = 3, synsets=SOME) -> dict[str, int]:
    """One picture per class, another colour for each damage; returns ids and labels."""
    expected = {}
    for k, synset in enumerate(synsets):
        name = f"{synset}/ILSVRC2012_val_{k:08d}.JPEG"
        path = root / damage / str(severity) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 7), (40 * severity, len(damage), k)).save(path, "JPEG")
        expected[name] = RANK[synset]
    return expected


@pytest.mark.parametrize("place", LAYOUTS)
def test_labels_come_from_the_synset_wherever_it_was_unpacked(tmp_path, place):
    expected = tree(tmp_path / place)
    data = datasets.load("imagenet-c/fog/3", root=tmp_path)
    assert dict(zip(data.ids, data.targets, strict=True)) == expected
    assert data.name == "imagenet-c/fog/3" and data.classnames[954] == "banana"
    assert data[0][0].size == (9, 7) and len(data.classnames) == 1000
    assert "3 images of 3 classes are here; the whole set has 50,000" in data.note
    assert datasets.load("imagenet-c/fog/3", n=2, root=tmp_path).name == data.name
    again = pickle.loads(pickle.dumps(data))
    assert again[1][0].tobytes() == data[1][0].tobytes()


def test_the_folder_of_the_damage_itself_and_of_another(tmp_path):
    expected = tree(tmp_path)
    tree(tmp_path, severity=5)
    for root in (tmp_path / "fog" / "3", tmp_path / "fog"):
        assert datasets.load("imagenet-c/fog/3", root=root).ids == list(expected)
    with pytest.raises(ValueError, match="is the folder of fog/5, not of fog/3; give the folder"):
        datasets.load("imagenet-c/fog/3", root=tmp_path / "fog" / "5")
    tree(tmp_path, "frost")
    with pytest.raises(ValueError, match="is the folder of frost, not of fog/3"):
        datasets.load("imagenet-c/fog/3", root=tmp_path / "frost")


def test_each_damage_and_severity_is_a_data_set_of_its_own(tmp_path):
    """Files of the same sizes and names, as of one solid colour each, do not make them one."""
    for damage in ("fog", "snow", "spatter"):
        for severity in (1, 2):
            tree(tmp_path, damage, severity)
    every = [
        datasets.load(f"imagenet-c/{d}/{s}", root=tmp_path)
        for d in ("fog", "snow", "spatter")
        for s in (1, 2)
    ]
    assert len({data.fingerprint for data in every}) == 6
    reds = [int(np.asarray(data[0][0])[0, 0, 0]) for data in every]
    assert np.allclose(reds, [40, 80] * 3, atol=3)  # the files of this severity


def test_clean_images_are_not_taken_for_damaged_ones(tmp_path):
    """A root full of synsets is ImageNet's own, if its path does not say which damage it is."""
    for synset in SOME:
        (tmp_path / synset).mkdir()
        Image.new("RGB", (9, 7)).save(tmp_path / synset / "x.JPEG")
    with pytest.raises(FileNotFoundError, match=r"fog/3 is not in .*n01440764, n07753592"):
        datasets.load("imagenet-c/fog/3", root=tmp_path)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("imagenet-c", "imagenet-c is 75 data sets: say which damage"),
        ("imagenet-c/fog", "named <data set>/<damage>/<severity>"),
        ("imagenet-c/fog/", "named <data set>/<damage>/<severity>"),
        ("imagenet-c/fog/3/n01440764", "named <data set>/<damage>/<severity>"),
        ("imagenet-c/fog/three", "severity from 1 to 5, as imagenet-c/fog/3"),
        ("imagenet-c/fog/-1", "severity from 1 to 5"),
        ("imagenet-c/fog/0", "severity is 0; it must be a whole number from 1 to 5"),
        ("imagenet-c/fog/6", "severity is 6"),
        ("imagenet-c/gausian_noise/3", "did you mean 'gaussian_noise'"),
        ("imagenet-c/outline/3", "unknown corruption 'outline'"),  # ours, not theirs
        ("iconshift-v2/spatter/3", "unknown corruption 'spatter'"),  # read only, not made
        ("imagenet_c/fog/3", "unknown data set 'imagenet_c'; did you mean 'imagenet-c'"),
    ],
)
def test_wrong_names(tmp_path, name, said):
    tree(tmp_path)
    with pytest.raises(ValueError, match=re.escape(said)):
        datasets.load(name, root=tmp_path)


def test_what_is_missing_is_named_with_its_archive(tmp_path, monkeypatch):
    tree(tmp_path / "imagenet-c")
    near = r"imagenet-c/fog/4 is not in .*imagenet-c/fog holds 3\. fog is in weather\.tar of https"
    with pytest.raises(FileNotFoundError, match=near):
        datasets.load("imagenet-c/fog/4", root=tmp_path)
    for archive, damages in ARCHIVES.items():
        damage = damages[-1]
        with pytest.raises(FileNotFoundError, match=f"{damage} is in {archive}.tar of https://zen"):
            datasets.load(f"imagenet-c/{damage}/3", root=tmp_path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        datasets.load("imagenet-c/fog/3", root=tmp_path / "nowhere")
    (tmp_path / "weather.tar").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match="is a file"):
        datasets.load("imagenet-c/fog/3", root=tmp_path / "weather.tar")
    monkeypatch.setenv("TPT_NB_DATASETS", str(tmp_path / "usual"))
    with pytest.raises(FileNotFoundError, match=r"blur.tar, digital.tar, noise.tar and weather"):
        datasets.load("imagenet-c/fog/3")
    expected = tree(tmp_path / "usual" / "imagenet-c")
    assert datasets.load("imagenet-c/fog/3").ids == list(expected)
    with pytest.raises(ValueError, match="imagenet-c cannot be downloaded. Download blur.tar"):
        datasets.download("imagenet-c")


def test_pictures_without_class_folders_and_foreign_folders(tmp_path):
    flat = tmp_path / "fog" / "3"
    flat.mkdir(parents=True)
    Image.new("RGB", (9, 7)).save(flat / "ILSVRC2012_val_00000001.JPEG")
    with pytest.raises(FileNotFoundError, match="fog/3 holds ILSVRC2012_val_00000001.JPEG"):
        datasets.load("imagenet-c/fog/3", root=tmp_path)
    tree(tmp_path, synsets=SOME[:1])
    with pytest.raises(ValueError, match="n99999999: no class of ImageNet"):
        (flat / "n99999999").mkdir()
        datasets.load("imagenet-c/fog/3", root=tmp_path)


def test_a_remote_root(tmp_path, monkeypatch):
    expected = tree(tmp_path)
    seen = []

    def files(self):
        seen.append(self.url)
        return [(name, 9) for name in expected]

    monkeypatch.setattr(Remote, "files", files)
    for root in ("s3://bucket/c/", "s3://bucket/c/fog/3"):
        assert datasets.load("imagenet-c/fog/3", root=root).ids == list(expected)
    assert seen == ["s3://bucket/c/fog/3"] * 2


# --- any data set with a damage ------------------------------------------------------------------


def test_a_name_with_a_damage_is_the_damaged_data_set():
    data = datasets.load("iconshift-v2/fog/3", n=2)
    same = datasets.corrupted(datasets.load("iconshift-v2", n=2), "fog", 3)
    assert data.fingerprint == same.fingerprint and data.ids == same.ids
    assert data.targets == same.targets and data.name == "iconshift-v2+fog3"
    assert data[1][0].tobytes() == same[1][0].tobytes()
    assert data[1][0].tobytes() != datasets.load("iconshift-v2", n=2)[1][0].tobytes()
    assert datasets.load("iconshift-v2/outline/1", n=1).name == "iconshift-v2+outline1"


def test_runs_and_plans_take_such_names(tmp_path):
    config = runs.RunConfig(dataset="iconshift-v2/fog/3", model="mini", method="zero_shot")
    resolved, _ = runs.resolve(config)
    assert resolved.profile == "mini" and resolved.dataset == config.dataset
    with pytest.raises(ValueError, match="did you mean 'fog'"):
        runs.resolve(config.replace(dataset="iconshift-v2/fgo/3"))
    with pytest.raises(ValueError, match="did you mean 'iconshift-v2'"):
        runs.resolve(config.replace(dataset="iconshift-v3"))
    assert planner.sizes("imagenet-c/fog/3") == (50_000, 1000)
    assert planner.sizes("iconshift-v2/fog/3") == planner.sizes("iconshift-v2")
    assert datasets.template("dtd/fog/3") == datasets.template("dtd") == "{} texture."


def test_a_place_is_found_without_walking_through_images(tmp_path):
    """Missing data is said at once, also beside a thousand class folders."""
    for synset in RANK:
        (tmp_path / "imagenet" / "val" / synset).mkdir(parents=True)
    start = time.process_time()  # not that of other work on the machine
    with pytest.raises(FileNotFoundError):
        datasets.load("imagenet-c/fog/3", root=tmp_path)
    assert time.process_time() - start < 1


def test_archives_have_all_that_is_made_here():
    listed = [damage for archive in ARCHIVES.values() for damage in archive]
    assert set(DAMAGES) == set(listed) - set(ARCHIVES["extra"]) and len(listed) == 19
