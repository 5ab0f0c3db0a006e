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
