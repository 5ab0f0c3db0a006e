"""The study's patch rows as it reported them: the rows of its sweep, and counts that fit."""

import csv

import pytest
import yaml

from tpt_nb.core.paths import DATA, REPO

PROMPT = 23.14  # per cent, the study's CoOp prompt before adaptation
with open(DATA / "reported" / "imagenet_a_rn50_patches.csv", newline="") as file:
    ROWS = list(csv.DictReader(file))
STUDY = yaml.safe_load((REPO / "notebooks" / "sweeps" / "study.yaml").read_text())


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row["label"])
def test_a_reported_row_is_a_row_of_the_sweep_with_consistent_counts(row):
    swept = {entry["label"]: entry for entry in STUDY["rows"]}[row["label"]]
    assert float(row["accuracy"]) == swept["reported"]
    assert int(row["grid"]) ** 2 <= swept["n_patches"] < (int(row["grid"]) + 1) ** 2
    assert int(row["n_aug"]) == swept["n_aug"]
    assert float(row["overlap"]) == swept.get("overlap", 0.0)
    # the study's counts and accuracies are of runs that differ by up to four images of 7,500
    from_counts = PROMPT + 100 * (int(row["improved"]) - int(row["worsened"])) / int(row["n"])
    assert from_counts == pytest.approx(float(row["accuracy"]), abs=0.06)


def test_all_patch_rows_with_the_loss_of_tpt_and_all_patch_losses_are_there():
    wanted = {
        entry["label"]
        for entry in STUDY["rows"]
        if entry.get("augmenter") == "patch" and "hard1" not in entry["loss"]
    }
    assert {row["label"] for row in ROWS} == wanted


# --- other papers' tables ------------------------------------------------------------------------

SHIFTS = ("A", "V2", "R", "Sketch")
TEN = ("Flowers", "DTD", "Pets", "Cars", "UCF", "Caltech", "Food", "SUN", "Aircraft", "EuroSAT")
MARKS = ("code", "pt", "note", "bench", "2nd")
SETTINGS = ("one", "per data set", "on test labels", "unknown")
FILES = {  # file -> the columns of one data set, their mean
    "natural_shifts.csv": (SHIFTS, "OOD"),
    "ttabc_b16.csv": (SHIFTS, "OOD"),
    "cross_dataset_b16.csv": (TEN, "mean"),
}


def read(name: str) -> list[dict]:
    with open(DATA / "reported" / name, newline="") as lines:
        return list(csv.DictReader(lines, strict=True))


@pytest.mark.parametrize("name", FILES)
def test_a_number_of_others_says_where_it_is_from_and_how_it_was_set(name):
    (sets, mean), seen = FILES[name], set()
    for row in read(name):
        assert None not in row and None not in row.values()  # as many cells as columns
        key = (row.get("backbone", "ViT-B/16"), row["method"])
        assert key not in seen, f"{key} is there twice"
        seen.add(key)
        assert row["kind"] in ("episodic", "online", "transductive")
        assert row["mark"] in MARKS and row["settings"] in SETTINGS and row["source"], key
        values = [float(row[s]) for s in sets if row[s]]
        assert all(0 < v < 100 for v in values)
        if len(values) == len(sets):  # printed means are rounded once more
            assert float(row[mean]) == pytest.approx(sum(values) / len(sets), abs=0.0051), key
        else:
            assert row[mean] or row.get("cross"), f"{key} says nothing"
        assert "unverified" not in " ".join(row.values()) and "memory," not in row["caveat"]


def test_every_mark_and_setting_is_explained():
    text = (DATA / "reported" / "README.md").read_text()
    for word in (*MARKS, *SETTINGS):
        assert f"\n| `{word}` | " in text
    for name in (DATA / "reported").glob("*.csv"):
        assert f"| `{name.name}` | " in text


def test_the_equal_protocol_has_one_setting_and_most_papers_lie_above_it():
    equal = {r["method"]: float(r["OOD"]) for r in read("ttabc_b16.csv") if r["OOD"]}
    assert {r["settings"] for r in read("ttabc_b16.csv")} == {"one"}
    own = {r["method"]: float(r["OOD"]) for r in read("natural_shifts.csv")
           if r["backbone"] == "ViT-B/16"}  # fmt: skip
    both = {m: own[m] - equal[m] for m in own if m in equal}
    assert set(both) == {"zero-shot", "TPT", "MTA", "ZERO", "DPE"}
    assert abs(both.pop("zero-shot")) < 0.05
    assert all(0.8 < over < 2.3 for over in both.values()), both


def test_settings_on_test_labels_are_flagged():
    rows = [r for r in read("natural_shifts.csv") if r["settings"] == "on test labels"]
    assert {r["method"] for r in rows} == {"DMN-ZS"}
    (mta,) = [r for r in read("natural_shifts.csv") if r["method"] == "MTA"]
    assert mta["OOD"] == "61.63" and not any(mta[s] for s in SHIFTS)  # per set nobody printed it
