"""Minutes and the one-hour path: counted, written where they are read, and checked."""

import re
import shutil
import sys
from pathlib import Path

import nbformat
import pytest

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO / "ci"))

import minutes  # noqa: E402

LINE = "*Run: some time. Read: 5 minutes.*"
COURSE = {
    "90": minutes.Part(("A start",), ("More",)),
    "91": minutes.Part(skip=("A start",), then="nothing later builds on it"),
}
README = f"""# A course

{minutes.BEGIN}
old
{minutes.END}

| | notebook | about | run | read | exercises |
| --- | --- | --- | ---: | ---: | ---: |
| 90 | [First](notebooks/90_a.ipynb) | a thing | 9 | 9 | 9 |
| 91 | [Second](notebooks/91_b.ipynb) | another | 9 | 9 | 9 |

After the table.
"""


def text(source: str):
    return nbformat.v4.new_markdown_cell(source)


def lesson(number: str, words: int = 850) -> nbformat.NotebookNode:
    code = nbformat.v4.new_code_cell
    hint = "<details><summary>Hint</summary>" + " much" * 900 + "</details>"
    return nbformat.v4.new_notebook(
        metadata={"tpt_nb": {"seconds": 95}},
        cells=[
            text(f"# {number} · A lesson\n\n{LINE}\n\nA question."),
            text("## 1. A start\n\n" + "word " * words),
            code("x = 1\n" * 30),
            text("## 2. More\n\nAnd more."),
            text(
                "**Exercise 90.1 · a sum** · difficulty ●○○ · importance ●●○ · 15 minutes\n" + hint
            ),
            code("y = 1\n" * 300, metadata={"tpt": {"q": "90.1", "points": 1}}),
            code("z = 1\n" * 300, metadata={"tpt": {"q": "90.1", "hidden": True}}),
            text("**Exercise 90.2 · two** · difficulty ●○○ · importance ●●○ · 5 minutes"),
            text("## References\n\n" + "paper " * 900),
        ],
    )


@pytest.fixture
def root(tmp_path):
    (tmp_path / "notebooks").mkdir()
    for name in ("90_a", "91_b"):
        path = tmp_path / "notebooks" / f"{name}.ipynb"
        path.write_text(nbformat.writes(lesson(name[:2])) + "\n")
    (tmp_path / "README.md").write_text(README)
    return tmp_path


@pytest.fixture
def written(root, monkeypatch):
    monkeypatch.setattr(minutes, "COURSE", COURSE)
    monkeypatch.setattr(minutes.rendered, "__defaults__", (COURSE,))
    assert minutes.main(["--root", str(root)]) == 0
    return root


def first(root: Path, name: str) -> str:
    return nbformat.read(root / "notebooks" / name, 4).cells[0].source


def test_reading_counts_text_and_code_without_hints_exercises_and_references():
    notebook = lesson("90", words=1700)
    assert minutes.reading(notebook.cells) == pytest.approx(10 + 2 + 0.35, abs=0.2)
    assert minutes.exercises(notebook) == 20


def test_the_first_cell_gets_the_minutes_and_its_part_of_the_path(written):
    source = first(written, "90_a.ipynb")
    assert "*Run: about 1.5 minutes on two CPU cores, no GPU, no network. Read: 5 min" in source
    assert "Read: 5 minutes. Exercises: 20 minutes.*" in source
    assert "*One-hour path: section 1, 7 minutes. May be skipped: section 2.*" in source
    assert source.endswith("A question.")
    other = first(written, "91_b.ipynb")
    assert "*One-hour path: not this notebook; nothing later builds on it. May be" in other


def test_the_readme_gets_the_path_and_three_columns(written):
    page = (written / "README.md").read_text()
    assert "| 90 | [First](notebooks/90_a.ipynb) | a thing | 1.5 | 5 | 20 |" in page
    assert "| [90](notebooks/student/90_a.ipynb) | 1 A start | 7 |" in page and "old" not in page
    assert "| | in all | 7 |" in page and page.endswith("After the table.\n")


def test_a_second_time_nothing_changes(written, capsys):
    assert minutes.main(["--root", str(written), "--check"]) == 0
    assert not capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("90_a.ipynb", "about 1.5", "about 0.5"),
        ("90_a.ipynb", '"seconds": 95', '"seconds": 300'),
        ("90_a.ipynb", "Exercises: 20", "Exercises: 25"),
        ("90_a.ipynb", "15 minutes", "10 minutes"),
        ("91_b.ipynb", "Read: 5", "Read: 15"),
        ("90_a.ipynb", "And more.", "word " * 900),
    ],
)
def test_a_number_that_is_not_true_is_found(written, capsys, name, old, new):
    path = written / "notebooks" / name
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    assert minutes.main(["--root", str(written), "--check"]) == 1
    assert name in capsys.readouterr().out
    assert path.read_text() == text.replace(old, new), "a check changes nothing"


def test_a_section_that_is_gone_is_named(written, capsys):
    path = written / "notebooks" / "90_a.ipynb"
    path.write_text(path.read_text().replace("A start", "A beginning"))
    assert minutes.main(["--root", str(written), "--check"]) == 2
    assert "'A start'" in capsys.readouterr().err


def test_a_notebook_without_its_line_or_its_time_is_named(written, capsys):
    path = written / "notebooks" / "90_a.ipynb"
    text = path.read_text()
    path.write_text(text.replace("*Run: about", "*About"))
    assert minutes.main(["--root", str(written), "--check"]) == 2
    assert "90_a.ipynb: the first cell has no line '*Run: ...*'" in capsys.readouterr().err
    path.write_text(text.replace('"seconds": 95', '"other": 95'))
    assert minutes.main(["--root", str(written), "--check"]) == 2
    assert "90_a.ipynb: it has no time to run yet" in capsys.readouterr().err


def test_the_path_of_this_course_takes_an_hour_and_its_sections_are_there():
    paths = sorted((REPO / "notebooks").glob("[0-9][0-9]_*.ipynb"))
    assert [path.name[:2] for path in paths] == list(minutes.COURSE)
    notebooks = {path: nbformat.read(path, 4) for path in paths}
    total = 0
    for path, notebook in notebooks.items():
        part = minutes.COURSE[path.name[:2]]
        minutes.listed(notebook, part.skip)
        assert bool(part.path) != bool(part.then)
        total += minutes.on_path(notebook, part) if part.path else 0
    assert 45 <= total <= 65
    [drawn] = [c.source for c in notebooks[paths[0]].cells if c.id == "map"]
    on_path = [number for number, part in minutes.COURSE.items() if part.path]
    assert re.findall(r'"(\d\d)"', drawn) == on_path, "the map's stars"


def test_this_course_says_what_is_counted(tmp_path):
    shutil.copytree(REPO / "notebooks", tmp_path / "notebooks")
    shutil.copy(REPO / "README.md", tmp_path)
    assert minutes.main(["--root", str(tmp_path), "--check"]) == 0
