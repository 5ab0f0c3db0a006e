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


def board_row(name: str, kind: str, accuracy: tuple[float, float], **more) -> dict:
    """A row of a leaderboard over A and R, both decisive; A is left out of the rest."""
    gains = {"zero_shot": [accuracy[1] - 0.4, -0.01, 0.3], "vote": [0.1, 0.02, 0.2]}
    cell = {"n": 1000, "gains": {"zero_shot": [-0.1, -0.2, 0.01]}}
    eces = (0.104, 0.3)
    return {
        "row": name, "kind": kind, "prompt": "single", "published": True, "settings": "one",
        "mean_shifted": sum(accuracy) / 2, "mean_shifted_rest": accuracy[1], "seconds": 0.001,
        "variants": {f"iconshift-{v}": cell | {"accuracy": a, "ece": e}
                     for v, a, e in zip("ar", accuracy, eces, strict=True)},
        "gains": {part: {"shifted": gain, "rest": gain} for part, gain in gains.items()},
    } | more  # fmt: skip


def board() -> dict:
    rows = [
        board_row("zero_shot", "episodic", (0.2, 0.4), gains={}),
        board_row("vote", "episodic", (0.5, 0.3), published=False, seconds=0.0005),
        board_row("contrast_vote", "episodic", (0.6, 0.45), published=False),
        board_row("new", "episodic", (0.3, 0.5), prompt="seven"),
        board_row("tda", "online", (0.45, 0.35)),
        board_row("stata", "transductive", (0.45, 0.35)),
    ]
    two = ["iconshift-a", "iconshift-r"]
    return {
        "rows": rows, "variants": two, "decisive": two, "rest": two[1:], "left_out": two[:1],
        "seeds": 3, "absent": ["slow"], "failed": {"dpe": "iconshift-a, seed 0: boom"},
        "wins": {"contrast_vote": {"zero_shot": [0.2, 0.1, 0.3]}},
    }  # fmt: skip


def test_the_leaderboard_has_a_part_for_each_kind_and_says_what_stands_out(monkeypatch, tmp_path):
    monkeypatch.setattr(readme, "STREAMS", tmp_path / "streams.json")
    text = readme.leaderboard(board())
    head = "| method | A | R | A and R | R | over zero-shot | over the vote | ECE | ms |"
    assert text.count(head) == 3 and "`new`" not in text  # under another prompt
    places = [text.index(f"| `{n}` |") for n in ("contrast_vote", "vote", "zero_shot", "tda")]
    assert places == sorted(places) < [text.index("| `stata` |")]
    assert places[2] < text.index("**Online: ") < places[3] < text.index("**Transductive: ")
    assert ("| `contrast_vote` | 60.0 | 45.0 | 52.5 | 45.0 | +5.0 [-1.0, +30.0] "
            "| +10.0 [+2.0, +20.0] | 10 30 | 1.0 |") in text  # fmt: skip
    assert "(`zero_shot`): +20.0 [+10.0, +30.0] points, at 2.00 times" in text
    assert "worst variant against zero-shot: A, -10.0 [-20.0, +1.0]." in text
    assert "`contrast_vote`, `vote`, `zero_shot`; without A: `contrast_vote`, `zero_shot`" in text
    assert "Not in this table yet: slow." in text
    assert "Failed: `dpe` (iconshift-a, seed 0: boom)." in text and "Tail" not in text
    assert "settings: one for all variants" in text


def test_the_tails_are_those_of_the_streams(monkeypatch, tmp_path):
    monkeypatch.setattr(readme, "STREAMS", tmp_path / "streams.json")
    found = {kind: {"mean": 0.5, "tail": t} for kind, t in (("shuffled", 0.4), ("sorted", 0.123))}
    readme.STREAMS.write_text(json.dumps({"rows": {"tda": found, "vote": found}}))
    text = readme.leaderboard(board())
    assert text.count("| tail |") == 1 and "| 10 30 | 40.0 / 12.3 | 1.0 |" in text
    assert text.count("40.0 / 12.3") == 1  # an episodic method knows no order
    assert "Tail: mean of the worst tenth" in text


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
    }  # fmt: skip
    text = readme.cost(measured)
    assert "| here | 4 | 0.05 | 0.75 | 4.8 | 1.20 |" in text
    assert "| as the paper's code does it | 4 | 0.05 | 40 | 44 | 11.01 |" in text
    assert "53 times less" in text and "2.0 of 8.0 GB" in text and "are the same" in text
    assert "**" not in text
    measured |= {"note": "other jobs ran", "memory_ratio": None, "memory_bytes": {"paper": None}}
    measured["agreement"]["same_selection"] = False
    text = readme.cost(measured)
    assert "runs, **other jobs ran**:" in text and "GB" not in text and "DIFFER" in text


def test_growth_has_a_row_of_each_model_and_a_column_of_each_number_of_views():
    def cell(n, views, over, in_run):
        keys = ("model", "classes", "views", "steps", "over_floor", "over_floor_run")
        return dict(zip(keys, ("RN50", n, views, 1, over, in_run), strict=True))

    measured = {
        "device": "cpu (x86_64, 1 threads)", "floors": {"RN50": {"16": {}, "64": {}}},
        "cells": [cell(50, 16, 1.5, 1.25), cell(50, 64, 1.125, None), cell(1000, 16, 9.0, None)],
        "left_out": [["RN50", 1000, 64, 1]],
    }  # fmt: skip
    text = readme.growth(measured)
    assert "| model | steps | classes | 16 views | 64 views |" in text
    assert "| RN50 | 1 | 50 | 1.50 / 1.25 | 1.12 |" in text
    assert "| RN50 | 1 | 1,000 | 9.00 | - |" in text and "RN50 1,000 × 64 × 1." in text


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
