"""Findings below charts, marks behind numbers: small notebooks, broken once in each way."""

import sys
from pathlib import Path

import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO / "ci"))

import lint_findings  # noqa: E402

REPORTED = "data/reported/imagenet_a_rn50.csv"
TABLE = {"text/html": "<div><table></table></div>", "text/plain": "a table"}
CHART = {"image/png": "aGVsbG8=", "text/plain": "a figure"}
FINDING = {"text/markdown": "**Finding.** 2.", "text/plain": "Finding. 2."}
VALUES = {"tpt_nb": {"values": {"accuracy of TPT": 41.04, "gain": -2.5}}}


def cell(*data: dict, source: str = "f(x)", **tpt):
    outputs = [new_output("display_data", d, metadata=VALUES) for d in data]
    return new_code_cell(source, outputs=outputs, metadata={"tpt": tpt} if tpt else {})


def unsaid(*cells) -> list[str]:
    return list(lint_findings.unsaid(new_notebook(cells=list(cells))))


@pytest.mark.parametrize(("shown", "kind"), [(CHART, "chart"), (TABLE, "table")])
def test_a_finding_stands_in_the_same_cell_or_the_next_two(shown, kind):
    word = new_markdown_cell("So.")
    for below in ([cell(shown, FINDING)], [cell(shown), cell(FINDING)]):
        assert unsaid(*below) == []
    assert unsaid(cell(shown), word, cell(FINDING)) == []
    assert unsaid(cell(shown), word, cell(hidden=True), cell(FINDING)) == []
    (problem,) = unsaid(cell(shown), word, word, cell(FINDING))
    assert problem.startswith(f"cell 1: no finding below this {kind}")
    assert len(unsaid(cell(FINDING), cell(shown))) == 1  # above is not below


def test_pictures_explorers_exercises_and_plain_output_need_none():
    for source in ("figures.show(figures.boxed(x), '')", "widgets.tpt_explorer(few);"):
        assert unsaid(cell(CHART, source=source)) == []
    assert unsaid(cell(CHART, q="01.1")) == []
    assert unsaid(cell({"text/plain": "1"}), cell({"text/markdown": "Text."})) == []
    both = "figures.boxed(x); figures.show(figures.lines(y), '')"
    assert len(unsaid(cell(CHART, source=both))) == 1


def unsupported(text: str) -> list[str]:
    """What is wrong with the second cell, in a notebook that publishes VALUES."""
    cells = [new_markdown_cell("# 01 · A\n\nRead: 2.5 minutes."), new_markdown_cell(text)]
    return list(lint_findings.unsupported(new_notebook(cells=[*cells, cell(FINDING)])))


SUPPORTED = {
    "published": "TPT has 41.0 %<!--=accuracy of TPT-->, that is 41 %<!-- =accuracy of TPT -->.",
    "a loss": "It loses 2.5 points<!--=gain-->: −2.5 points<!--=gain-->.",
    "reported": f"CoOp has 23.14 %<!--source: {REPORTED}-->.",
    "a paper": "Trained on 400 million<!--source: radford2021clip--> pairs.",
    "chosen": "Crops of 8 to 100 % of the area, at 0.5.<!--set-->",
    "an interval": "With 95 % intervals on a 4 x 4 grid.",
    "formulas and code": "$0.5$ and `0.7` and\n\n$$\n0.25\n$$\n\n```\n41.0 %\n```",
    "links": "[41.0 %](https://a.org/2103.00020) and https://a.org/0.5",
    "numbers of things": "Exercise 01.1, notebook 02, section 3.2, Python 3.11, 05.4 and 10.2.",
    "an exercise": "**Exercise 01.1 · a sum** · difficulty ●○○\n\nMake 0.3 of it.",
    "a year": "In 2022, 64 views and 200 classes.",
    "papers": "## References\n\n- 41.0 % (2022)",
}
BARE = {
    "a share": ("TPT has 41.0 %.", "41.0 %"),
    "per cent": ("TPT has 41 per cent.", "41 per cent"),
    "points": ("It gains +2.5 points.", "+2.5 points"),
    "times": ("It is 3 times as fast.", "3 times"),
    "ratio": ("It is 1.2x as fast.", "1.2x"),
    "seconds": ("It takes 12 seconds.", "12 seconds"),
    "count": ("Right are 22 of 100 images.", "22 of 100"),
    "p": ("Not by chance (p = 0.03).", "0.03"),
    "interval": ("Between [6.8, 15.2].", "6.8"),
    "large": ("It saw 400 million pairs.", "400 million"),
    "in a list": ("- TPT: 41.0 %\n- CoOp: none", "41.0 %"),
    "quoted": ("> TPT has 41.0 %.", "41.0 %"),
}
DOUBTFUL = {
    "stale": ("41.1 %<!--=accuracy of TPT-->", "accuracy of TPT is 41.04"),
    "wrong sign": ("+2.5 points<!--=gain-->", "gain is -2.5"),
    "unpublished": ("41 %<!--=accuracy-->", "which no cell publishes"),
    "no file": ("41 %<!--source: data/x.csv-->", "refers to data/x.csv, which is not there"),
    "not there": (f"41.73 %<!--source: {REPORTED}-->", f"does not stand in {REPORTED}"),
    "no paper": ("4 million<!--source: me-->", "not in references.bib"),
}


@pytest.mark.parametrize("name", SUPPORTED)
def test_what_carries_a_mark_or_is_no_result_passes(name):
    assert unsupported(SUPPORTED[name]) == []


@pytest.mark.parametrize("name", BARE)
def test_a_result_without_a_mark_is_refused(name):
    text, number = BARE[name]
    assert f"cell 2: {number} is a result without a mark" in unsupported(text)[0]


@pytest.mark.parametrize("name", DOUBTFUL)
def test_a_mark_that_does_not_bear_out_its_number_is_refused(name):
    text, message = DOUBTFUL[name]
    (problem,) = unsupported(text)
    assert message in problem


def test_a_setting_counts_for_its_own_paragraph_and_not_for_other_marks():
    assert len(unsupported("At 0.5.<!--set-->\n\nThen 0.7.")) == 1
    assert len(unsupported("At 0.5<!--set--> it has 41.1 %<!--=accuracy of TPT-->.")) == 1


def test_numbers_in_json_count_as_reported(tmp_path):
    (tmp_path / "x.json").write_text('{"rows": [{"ece": 10.4}], "n": "7", "none": null}')
    assert set(lint_findings.numbers_in(tmp_path / "x.json")) == {10.4, 7.0}
    doubt = lint_findings.doubt("10.4", "source:", "x.json", {}, set(), tmp_path)
    assert doubt == ""
