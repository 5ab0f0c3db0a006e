"""The book: what is on a page, links that lead somewhere, and a bibliography that is whole."""

import re
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO / "ci"))

import book  # noqa: E402

ANSWER = '''\
def f(x):
    """x + 1"""
    # BEGIN SOLUTION
    return x + 1  # secret
    # END SOLUTION


check.equal("f", f(1), 2)'''
BIB = """\
% a comment
@inproceedings{someone2020it,
  author = {Ada B. One and Carl Two},
  title = {It, a {B}ook},
  booktitle = {Conf},
  year = {2020},
  eprint = {2001.00001},
}

@article{other1950,
  author = {Old One},
  title = {A Method},
  year = {1950},
}
"""


@pytest.fixture
def folder(tmp_path):
    text, code = new_markdown_cell, new_code_cell
    picture = new_output(
        "display_data", {"image/png": "aGVs\nbG8="}, metadata={"image/png": {"alt": 'a "cat"'}}
    )
    table = {"text/html": "<style scoped>td{}</style><table><td>7</td></table>"}
    cells = [
        text("# 91 · First\n\nSee [two](92_second.ipynb#part) and [It](https://arxiv.org/abs/2001.00001)."),
        text("## Part <b>one</b>\n\nInline $\\frac{a}{b}$, and\n\n$$\\sum_i x_i < 3$$"),
        code("print('<b>')\n1 + 1", outputs=[
            new_output("stream", name="stdout", text="\x1b[31m<b>\x1b[0m\n"),
            picture,
            new_output("execute_result", table, execution_count=1),
            new_output("display_data", {"text/markdown": "so *many*"}),
        ]),
        code(ANSWER, metadata={"tpt": {"q": "91.1", "points": 1}}),
        code("check.report('x', f(7))", metadata={"tpt": {"q": "91.1", "hidden": True}}),
    ]  # fmt: skip
    nbformat.write(new_notebook(cells=cells), tmp_path / "91_first.ipynb")
    second = [text("# 92 · Second"), text("## Part\n\nBees."), text("## Part\n\nA Method, again")]
    nbformat.write(new_notebook(cells=second), tmp_path / "92_second.ipynb")
    (tmp_path / "references.bib").write_text(BIB)
    return tmp_path


@pytest.fixture
def site(folder, tmp_path, capsys):
    out = tmp_path / "book"
    assert book.main(["--notebooks", str(folder), "--out", str(out)]) == 0, capsys.readouterr()
    return {path.name: path.read_text() for path in out.iterdir()}


def test_a_page_has_text_formulas_code_and_outputs(site):
    page = site["91_first.html"]
    assert page.count("<math") == 2 and "$" not in page
    assert '<h2 id="part-one">Part <b>one</b>' in page
    assert '<img alt="a &quot;cat&quot;" src="data:image/png;base64,aGVsbG8=">' in page
    assert '<pre class="output">&lt;b&gt;\n</pre>' in page  # escaped, and without its colour
    assert "<td>7</td>" in page and "scoped" not in page
    assert "<em>many</em>" in page


def test_solutions_are_folded_and_hidden_tests_left_out(site):
    page = site["91_first.html"]
    stub, _, rest = page.partition("<details>")
    assert "NotImplementedError" in stub and "secret" not in stub
    folded = rest.partition("</details>")[0]
    assert "secret" in folded and "Solution 91.1" in folded
    assert "SOLUTION" not in page and "report" not in page


def test_pages_are_linked_and_nothing_is_loaded_from_elsewhere(site):
    assert 'href="92_second.html#part"' in site["91_first.html"]
    assert 'rel="next" href="92_second.html"' in site["91_first.html"]
    assert 'rel="prev" href="91_first.html"' in site["92_second.html"]
    assert 'href="#part-again"' in site["92_second.html"]  # two sections of one name
    for name, text in site.items():
        assert not re.findall(r'(?:src|<link[^>]*href)="(?:https?:)?//', text), name
        assert "url(" not in text and "@import" not in text


def test_every_section_can_be_found(site):
    index = site["search.js"]
    for words in ("Part one", "Bees.", '"id": "part-again"', "91_first.html"):
        assert words in index
    assert "frac" not in index


def test_the_bibliography_says_who_cites(site):
    page = site["bibliography.html"]
    first, second = re.findall(r"<li id=.*?</li>", page)
    assert 'href="https://arxiv.org/abs/2001.00001"' in first
    assert "Ada B. One, Carl Two" in first and '<a href="91_first.html">91</a>' in first
    assert "1950" in second and '<a href="92_second.html">92</a>' in second


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("other1950", "someone2020it", "is there twice"),
        ("  year = {1950},\n", "", "other1950 lacks year"),
        ("@article{other1950,", "@article{other 1950,", "2 entries, of which 1 can be read"),
    ],
)
def test_a_broken_bibliography_is_refused(old, new, message, folder, capsys):
    (folder / "references.bib").write_text(BIB.replace(old, new))
    assert book.main(["--notebooks", str(folder), "--out", str(folder / "out")]) == 2
    assert message in capsys.readouterr().err


def test_a_link_that_leads_nowhere_fails(folder, capsys):
    path = folder / "91_first.ipynb"
    path.write_text(path.read_text().replace("92_second.ipynb#part", "92_second.ipynb#gone"))
    assert book.main(["--notebooks", str(folder), "--out", str(folder / "out")]) == 1
    assert "92_second.html#gone: there is no such section" in capsys.readouterr().out


def test_the_real_book(tmp_path, capsys):
    assert book.main(["--out", str(tmp_path / "book")]) == 0
    assert capsys.readouterr().err == ""  # every formula of the lessons is MathML
    names = {path.stem for path in (REPO / "notebooks").glob("[0-9][0-9]_*.ipynb")}
    assert names <= {path.stem for path in (tmp_path / "book").glob("*.html")}
