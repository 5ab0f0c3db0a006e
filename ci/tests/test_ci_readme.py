"""The README's table comes from the measurements and from nowhere else."""

import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO / "ci"))
import readme  # noqa: E402

README = f"before\n{readme.BEGIN}\nold\n{readme.END}\nafter\n"


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
    new = readme.rendered(README, evaluation())
    assert new.startswith("before\n") and new.endswith("\nafter\n") and "old" not in new
    assert readme.rendered(new, evaluation()) == new
    assert readme.MISSING in readme.rendered(README, None)


@pytest.mark.parametrize("text", ["no markers", README + README, readme.BEGIN])
def test_markers_must_be_there_once(text):
    with pytest.raises(ValueError, match="once each"):
        readme.rendered(text, None)


def test_check_fails_on_a_typed_number(tmp_path, monkeypatch):
    monkeypatch.setattr(readme, "README", tmp_path / "README.md")
    monkeypatch.setattr(readme, "EVALUATION", tmp_path / "none.json")
    readme.README.write_text(README)
    monkeypatch.setattr(sys, "argv", ["readme.py", "--check"])
    assert readme.main() == 1
    assert readme.README.read_text() == README  # only compared
    monkeypatch.setattr(sys, "argv", ["readme.py"])
    assert readme.main() == 0
    monkeypatch.setattr(sys, "argv", ["readme.py", "--check"])
    assert readme.main() == 0
