"""The book: what is on a page, links that lead somewhere, nothing from the net."""

import html
import re
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

for needed in ("sphinx", "myst_nb", "furo", "latex2mathml", "sphinxcontrib.bibtex"):
    pytest.importorskip(needed, reason=f"{needed} is not installed: bash ci/book installs it")

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO / "ci"))

import book  # noqa: E402

PYTHON = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
ANSWER = '''\
def f(x):
    """x + 1"""
    # BEGIN SOLUTION
    return x + 1  # secret
    # END SOLUTION


check.equal("f", f(1), 2)'''
PREDICT = """\
# BEGIN SOLUTION
guess = "B"
# END SOLUTION
check.predict("91.P", guess, {"A": "up", "B": "down"})"""
ANSWERED = """\
<details><summary>Answer 91.T</summary>

It is the mean.

- (1) says so

</details>"""
BIB = """\
% a comment
@inproceedings{someone2020it,
  author = {Ada B. One and Carl Two},
  title = {It, a {B}ook of CLIP},
  booktitle = {Conf},
  year = {2020},
  eprint = {2001.00001},
}

@article{other1950,
  author = {Old One},
  title = {A Method},
  journal = {Papers},
  year = {1950},
}
"""


def write(folder):
    text, code = new_markdown_cell, new_code_cell
    picture = new_output(
        "display_data", {"image/png": "aGVs\nbG8="}, metadata={"image/png": {"alt": 'a "cat"'}}
    )
    table = {"text/html": "<style scoped>td{}</style><table><td>7</td></table>"}
    cells = [
        text("# 91 · First\n\n[![Badge](https://a.org/b.svg)](https://a.org) *(none yet)*\n\n"
             "See [two](92_second.ipynb#part) and [It](https://arxiv.org/abs/2001.00001)."),
        text("## Part **one**\n\nInline $\\frac{a}{b}$, and\n\n$$\\sum_i x_i < 3$$"),
        text("<details><summary>Hint</summary>\n\n`mean` of $x$\n\n</details>"),
        code("print('<b>')\n1 + 1", outputs=[
            new_output("stream", name="stdout", text="\x1b[31m<b>\x1b[0m\n"),
            picture,
            new_output("execute_result", table, execution_count=1),
            new_output("display_data", {"text/markdown": "so *many*"}),
        ]),
        code("raise SystemError('executed')"),
        code(ANSWER, metadata={"tpt": {"q": "91.1", "points": 1}}, outputs=[
            new_output("stream", name="stdout", text="as stored\n"),
        ]),
        code("check.report('x', f(7))", metadata={"tpt": {"q": "91.1", "hidden": True}}),
        code(PREDICT, metadata={"tpt": {"q": "91.P", "points": 1}}),
        code("check.reveal('91.P', 'B')", outputs=[
            new_output("stream", name="stdout", text="Result of 91.P: B\n"),
        ]),
        text(ANSWERED, metadata={"tpt": {"q": "91.T", "points": 1}}),
    ]  # fmt: skip
    nbformat.write(new_notebook(cells=cells, metadata=PYTHON), folder / "91_first.ipynb")
    second = [text("# 92 · Second"), text("## Part\n\nBumblebees."), text("## Part\n\nA Method")]
    nbformat.write(new_notebook(cells=second, metadata=PYTHON), folder / "92_second.ipynb")
    (folder / "references.bib").write_text(BIB)
    return folder


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = write(tmp_path_factory.mktemp("book"))
    assert book.main(["--notebooks", str(folder), "--out", str(folder / "out")]) == 0
    return folder / "out"


def page(site, name):
    return (site / name).read_text()


def plain(text):
    return html.unescape(re.sub(r"<[^>]+>", "", text))


def test_a_page_has_text_formulas_code_and_outputs(site):
    text = page(site, "91_first.html")
    assert text.count("<math") == 3 and "\\frac" not in text and "<mfrac>" in text
    assert "<h2>Part <strong>one</strong>" in text
    assert '<img alt="a &quot;cat&quot;" src="data:image/png;base64,aGVsbG8=">' in text
    assert re.search(r'<span class="[^"]*Red">&lt;b&gt;', text) and "\x1b" not in text
    assert "<td>7</td>" in text and "<em>many</em>" in text
    assert "as stored" in text and "SystemError</span>: executed" not in text  # nothing is run
    assert "<summary>Hint</summary>" in text


def test_solutions_are_folded_and_hidden_tests_left_out(site):
    text = page(site, "91_first.html")
    stub, _, rest = text.partition('<details class="admonition hide')
    assert "NotImplementedError" in stub and "secret" not in stub and "as stored" not in stub
    folded = plain(rest.partition("</details>")[0])
    assert "secret" in folded and "Solution 91.1" in folded and "as stored" in folded
    assert "END SOLUTION" not in text and "report" not in plain(text)


def test_predictions_and_answers_in_words_are_folded(site):
    text = page(site, "91_first.html")
    after = text[text.index("Solution 91.1") :]
    stub, _, rest = after[after.index("guess") :].partition('<details class="admonition hide')
    assert "your answer in the place of the dots" in plain(stub) and "&quot;B&quot;" in stub
    assert "Solution 91.P" in plain(rest.partition("</details>")[0])
    result = rest.partition("</details>")[2].partition('<details class="admonition hide')
    assert "Result of" not in result[0] and "The result" in plain(result[2])
    answer = text[text.index("<summary>Answer 91.T") :]
    assert answer.index("It is the mean.") < answer.index("</details>")


def test_pages_are_linked_and_nothing_is_loaded_from_elsewhere(site):
    first, second = page(site, "91_first.html"), page(site, "92_second.html")
    assert re.search(r'href="92_second.html#part"', first) and 'id="part"' in second
    assert re.search(r'class="next-page" href="92_second.html"', first)
    assert re.search(r'class="prev-page" href="91_first.html"', second)
    for path in site.rglob("*.html"):
        remote = r'<(?:script|link|img|iframe)[^>]*(?:src|href)="(?:https?:)?//'
        assert not re.findall(remote, path.read_text()), path.name
    for path in site.rglob("*.css"):
        assert not re.findall(r"url\([\"']?(?:https?:)?//|@import", path.read_text()), path.name


def test_every_section_can_be_found_without_a_server(site):
    index = page(site, "searchindex.js")
    assert index.startswith("Search.setIndex(")  # a script: pages from file:// may load it
    for words in ("Part one", "bumblebe", "91_first"):
        assert words in index
    assert re.search(r'<script src="searchindex.js"', page(site, "search.html"))


def test_the_bibliography_says_who_cites(site):
    text = page(site, "bibliography.html")
    assert 'href="https://arxiv.org/abs/2001.00001"' in text
    said = " ".join(plain(text).split())
    assert re.search(r"Ada B\. One and Carl Two\. It, a Book of CLIP\..*Cited in 91\.", said)
    assert re.search(r"Old One\. A Method\..*1950\. Cited in 92\.", said)
    first, second = page(site, "91_first.html"), page(site, "92_second.html")
    assert re.search(r'href="bibliography.html#[^"]+"[^>]*>OT20', first)
    assert re.search(r'href="bibliography.html#[^"]+"[^>]*>One50', second)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("other1950", "someone2020it", "someone2020it"),
        ("  year = {1950},\n", "", "other1950 lacks year"),
        ("@article{other1950,", "@article{other 1950,", "syntax error in line 10"),
    ],
)
def test_a_broken_bibliography_is_refused(old, new, message, folder, capsys):
    (folder / "references.bib").write_text(BIB.replace(old, new))
    assert book.main(["--notebooks", str(folder), "--out", str(folder / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error and "references.bib" in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("92_second.ipynb#part", "92_second.ipynb#gone", "'gone'"),
        ("92_second.ipynb#part", "93_third.ipynb", "93_third.ipynb"),
        ("$\\\\frac{a}{b}$", "$\\\\left(a$", "no MathML"),
    ],
)
def test_a_link_or_a_formula_that_leads_nowhere_fails(old, new, message, folder, capsys):
    path = folder / "91_first.ipynb"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))
    assert book.main(["--notebooks", str(folder), "--out", str(folder / "out")]) == 1
    error = capsys.readouterr().err
    assert message in error and "91_first.ipynb" in error


@pytest.mark.slow
def test_the_real_book(tmp_path):
    assert book.main(["--out", str(tmp_path / "book")]) == 0  # no link, no formula is broken
    names = {path.stem for path in (REPO / "notebooks").glob("[0-9][0-9]_*.ipynb")}
    assert names <= {path.stem for path in (tmp_path / "book").glob("*.html")}
    for path in (tmp_path / "book").glob("*.html"):
        assert not re.findall(r'<(?:script|link|img)[^>]*(?:src|href)="https?:', path.read_text())
