"""Other wordings of class names: from a file, or those that ship, for every data set."""

import json

import pytest
from test_runs import CLASSES, world  # noqa: F401 (a fixture)

from tpt_nb import datasets, runs
from tpt_nb.datasets import Dataset, imagenet_classes


def data(names, name="iconshift-a") -> Dataset:
    return Dataset(name, list(names), ["0"], [0], "f", lambda i: None)


def test_the_study_calls_ten_classes_of_imagenet_a_otherwise():
    known = list(imagenet_classes("a").values())
    new = datasets.reworded(data(known, "imagenet-a"), "study").classnames
    differ = {a: b for a, b in zip(known, new, strict=True) if a != b}
    assert len(differ) == 10
    assert differ["cherimoya (custard apple)"] == "custard apple"
    assert differ["carved pumpkin"] == "jack-o'-lantern"
    # the whole of ImageNet has these classes too; a set of other things has none of them
    whole = datasets.reworded(data(imagenet_classes().values(), "imagenet"), "study").classnames
    assert sum(a != b for a, b in zip(imagenet_classes().values(), whole, strict=True)) == 10
    with pytest.raises(ValueError, match="names none of the 2 classes"):
        datasets.reworded(data(["red", "blue"]), "study")


@pytest.mark.parametrize(
    "name, text",
    [
        ("pairs.tsv", "Hot_dog\tfrankfurter\n"),
        ("pairs.json", json.dumps({"hot dog": "frankfurter"})),
        ("list.txt", "cat\nfrankfurter\n"),
        ("list.json", json.dumps(["cat", "frankfurter"])),
    ],
)
def test_files_of_ones_own(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    new = datasets.reworded(data(["cat", "hot dog"]), str(tmp_path / name))
    assert new.classnames == ["cat", "frankfurter"] and new.fingerprint == "f"


@pytest.mark.parametrize(
    "text, message",
    [
        ("cat\tfeline\nhot dgo\tx\n", "unknown class.*'hot dgo'.*did you mean 'hot dog'"),
        ("one\n", "1 class names for the 2 classes"),
        ("hot dog\ncat\n", "stand at the place of another class"),
        ("cat\t\n", "needs a known name, a tab and the new one"),
        ("\n", "is empty"),
    ],
)
def test_files_that_do_not_fit_are_named(tmp_path, text, message):
    (tmp_path / "names.txt").write_text(text)
    with pytest.raises(ValueError, match=message):
        datasets.reworded(data(["cat", "hot dog"]), str(tmp_path / "names.txt"))
    with pytest.raises(ValueError, match="'studdy'; did you mean 'study'"):
        datasets.reworded(data(["cat"]), "studdy")


def test_a_run_uses_the_words_and_the_same_features(world, tmp_path, monkeypatch):  # noqa: F811
    path = tmp_path / "names.tsv"
    path.write_text("disc\tdrawing\n")
    plain = {**world, "out": str(tmp_path / "runs"), "cache": str(tmp_path / "cache")}
    plain |= {"method": "vote", "n_aug": 2, "device": "cpu"}
    first = runs.run(plain, progress=False)
    other = runs.run({**plain, "classnames": str(path)}, progress=False)
    assert first.dir != other.dir and other.summary["encoded"] == 0
    words = json.loads((other.dir / "config.json").read_text())["classnames"]
    assert words == ["drawing" if name == "disc" else name for name in sorted(CLASSES)]
    assert [r["target"] for r in first.records] == [r["target"] for r in other.records]
    assert [r["loss"] for r in first.records] != [r["loss"] for r in other.records]
    path.write_text("disc\tdrawings\n")  # it counts by content
    assert runs.run_name(runs.RunConfig.from_dict({**plain, "classnames": str(path)})) != other.name
