"""The numbers in README and cards come from the measurements and from nowhere else."""

import json
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO / "ci"))
import readme  # noqa: E402

PAGE = "before\n<!-- results:begin -->\nold\n<!-- results:end -->\nafter\n"


def evaluation() -> dict:
    plain = {"accuracy": 0.305, "ci95": [0.285, 0.325], "n": 2000}
    adapted = plain | {"accuracy": 0.4, "gain": -0.0123, "gain_ci95": [-0.02, 0.001]}
    row = {name: plain for name in readme.PLAIN} | {name: adapted for name in readme.ADAPTED}
    return {variant: row for variant in readme.VARIANTS}


def test_table_has_every_variant_and_method_with_intervals():
    lines = readme.table(evaluation()).splitlines()
    assert len(lines) == 2 + 5
    assert {line.count("|") for line in lines} == {9}
    assert "30.5 ± 2.0" in lines[2] and "-1.2 [-2.0, +0.1]" in lines[2] and "| 2000 |" in lines[2]


def test_rendering_is_stable_and_touches_nothing_else():
    new = readme.rendered(PAGE, "results", "new")
    assert new == PAGE.replace("old", "new")
    assert readme.rendered(new, "results", "new") == new


@pytest.mark.parametrize("text", ["no markers", PAGE + PAGE, "<!-- results:begin -->"])
def test_markers_must_be_there_once(text):
    with pytest.raises(ValueError, match="once each"):
        readme.rendered(text, "results", "new")


def test_check_fails_on_a_typed_number(tmp_path, monkeypatch):
    page, numbers = tmp_path / "README.md", tmp_path / "evaluation.json"
    sections = [(page, "results", numbers, readme.table)]
    monkeypatch.setattr(readme, "SECTIONS", sections)
    monkeypatch.setattr(readme, "REPO", tmp_path)
    page.write_text(PAGE)

    def run(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["readme.py", *arguments])
        return readme.main()

    assert run("--check") == 1
    assert page.read_text() == PAGE  # only compared
    assert run() == 0 and run("--check") == 0
    assert "evaluation.json is missing" in page.read_text()
    numbers.write_text(json.dumps(evaluation()))
    assert run("--check") == 1 and run() == 0
    page.write_text(page.read_text().replace("30.5", "31.5"))
    assert run("--check") == 1


def test_every_section_has_its_markers():
    assert len(readme.pages()) == 3


def test_cost_says_what_the_benchmark_measured():
    measured = {
        "model": "RN50", "classes": 200, "views": 64, "repeats": 3, "device": "cpu (x86_64)",
        "torch": "2.9.0+cu130", "floor_s": 4.0, "views_s": 0.05, "paper_s": 40.0, "fast_s": 0.75,
        "ratio_adapt": 53.3, "ratio_end_to_end": 9.2, "memory_ratio": 0.25,
        "memory_bytes": {"paper": 8 * 2**30, "fast": 2 * 2**30}, "once_s": 1.25,
        "agreement": {
            "images": 4, "same_prediction": True, "same_selection": True,
            "largest_logit_difference": 2e-5,
        },
        "growth": {"classes": {"1000": {"fast_s": 3.0, "over_floor": 1.76}}},
    }  # fmt: skip
    text = readme.cost(measured)
    assert "| here | 4 | 0.05 | 0.75 | 4.8 | 1.20 |" in text
    assert "| as the paper's code does it | 4 | 0.05 | 40 | 44 | 11.01 |" in text
    assert "53 times less" in text and "2.0 of 8.0 GB" in text and "are the same" in text
    assert "1.76 with 1,000 classes" in text and "**" not in text
    measured |= {"note": "other jobs ran", "memory_ratio": None, "memory_bytes": {"paper": None}}
    measured["agreement"]["same_selection"] = False
    text = readme.cost(measured)
    assert "runs, **other jobs ran**:" in text and "GB" not in text and "DIFFER" in text


def test_the_study_is_shown_as_measured_and_as_reported():
    rows = readme.read(readme.STUDY)
    text = readme.study(rows)
    for label in readme.SHOWN:
        (row,) = [r for r in rows if r["label"] == label]
        line = next(part for part in text.splitlines() if part.startswith(f"| {label} |"))
        assert f" {100 * float(row['accuracy']):.1f} " in line
        assert line.endswith(f" {float(row['reported']):.1f} |")
    turned = [{**r, "accuracy": str(-float(r["reported"]))} for r in rows]
    assert "two columns is -1.00" in readme.study(turned)
