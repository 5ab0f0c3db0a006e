"""Render the stored notebooks to a static site: contents, lessons, bibliography, search.

Nothing is executed and nothing is loaded from elsewhere, so the pages work from ``file://`` and
offline: formulas are MathML, pictures are embedded, the search index is a script. Hidden tests are
left out; solutions are folded away behind the stub. Usually started by ``bash ci/book``.
"""

import argparse
import html
import json
import re
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import nbformat
from latex2mathml.converter import convert as to_mathml
from nbconvert.filters.ansi import strip_ansi
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from nbformat import NotebookNode
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

from tpt_nb.course.masters import BEGIN, END, replace_solution

REPO = Path(__file__).resolve().parent.parent
TITLE = "Test-time adaptation of CLIP"
ENTRY = re.compile(r"^@(\w+)\{([\w-]+),\n(.*?)^\}", re.MULTILINE | re.DOTALL)
FIELD = re.compile(r"^\s*(\w+)\s*=\s*\{(.*)\},?\s*$", re.MULTILINE)


@dataclass
class Page:
    """A page of the book."""

    file: str
    title: str
    body: str
    sections: list[tuple[str, str]] = field(default_factory=list)  # (id, text) of level 2
    index: list[dict] = field(default_factory=list)  # what the search finds
    cites: set[str] = field(default_factory=set)  # keys of the bibliography


class Renderer(IPythonRenderer):
    """Markdown with formulas as MathML and headings that can be linked to."""

    def __init__(self) -> None:
        super().__init__(escape=False, exclude_anchor_links=True)
        self.sections: list[tuple[int, str, str]] = []  # (level, id, text)
        self.failed: list[str] = []  # formulas that are shown as they are

    def inline_math(self, body: str) -> str:
        """A formula in a line."""
        return self._math(body, "inline")

    def block_math(self, body: str) -> str:
        """A formula of its own."""
        return self._math(body, "block")

    def _math(self, body: str, display: str) -> str:
        try:
            return to_mathml(html.unescape(body).strip(), display=display)
        except Exception:  # the converter raises what it likes
            self.failed.append(body)
            return f"<code>{html.escape(body)}</code>"

    def heading(self, text: str, level: int, **attrs: object) -> str:
        """A heading with an id; two of the same text get two ids."""
        plain = re.sub(r"<[^>]+>", "", text)
        ident = re.sub(r"[^\w]+", "-", plain.lower()).strip("-") or "section"
        known = {known for _, known, _ in self.sections}
        while ident in known:
            ident += "-again"
        self.sections.append((level, ident, plain))
        link = f'<a class="anchor" href="#{ident}" aria-label="Link to this section">#</a>'
        return f'<h{level} id="{ident}">{text} {link}</h{level}>\n'


def render(path: Path, bibliography: dict[str, dict]) -> Page:
    """One notebook as a page."""
    notebook = nbformat.read(path, as_version=4)
    renderer = Renderer()
    markdown = MarkdownWithMath(renderer=renderer)
    parts, index = [], []
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            first = len(renderer.sections)
            parts.append(f'<div class="text">{markdown.render(cell.source)}</div>')
            index += entries(cell.source, renderer.sections[first:], index)
        elif cell.cell_type == "code" and not cell.metadata.get("tpt", {}).get("hidden"):
            parts.append(code_cell(cell))
    for formula in renderer.failed:
        print(f"{path.name}: no MathML for {formula!r}", file=sys.stderr)
    text = "\n".join(cell.source for cell in notebook.cells)
    cites = {key for key, entry in bibliography.items() if cited(entry, text)}
    title = next((text for level, _, text in renderer.sections if level == 1), path.stem)
    sections = [(ident, text) for level, ident, text in renderer.sections if level == 2]
    return Page(f"{path.stem}.html", title, "\n".join(parts), sections, index, cites)


def entries(source: str, new: list[tuple[int, str, str]], before: list[dict]) -> list[dict]:
    """What the search knows of a cell: its text, under the section that it belongs to."""
    noise = r"\$\$.*?\$\$|\$[^$\n]*\$|<[^>]+>|[#*`|>]|\]\([^)]*\)|\["
    text = re.sub(noise, " ", source, flags=re.DOTALL)
    text = " ".join(text.split())
    if new:
        return [{"id": new[0][1], "title": new[0][2], "text": text}]
    if before:
        before[-1]["text"] += " " + text
    return []


def code_cell(cell: NotebookNode) -> str:
    """Source and outputs; of an exercise the stub, and solution and outputs folded away."""
    outputs = "".join(map(output, cell.outputs))
    question = cell.metadata.get("tpt", {}).get("q")
    if question:
        lines = cell.source.split("\n")
        solution = "\n".join(x for x in lines if not (BEGIN.match(x) or END.match(x)))
        folded = f"<summary>Solution {question}</summary>{code(solution)}{outputs}"
        return f"{code(replace_solution(cell.source, question))}<details>{folded}</details>"
    return code(cell.source) + outputs


def code(source: str) -> str:
    """Python in colours."""
    return highlight(source, PythonLexer(), HtmlFormatter()) if source.strip() else ""


def output(out: NotebookNode) -> str:
    """One output of a cell: the richest form that a page can show."""
    if out.output_type == "stream":
        return f'<pre class="output">{html.escape(strip_ansi(out.text))}</pre>'
    if out.output_type == "error":
        return f'<pre class="output">{html.escape(f"{out.ename}: {out.evalue}")}</pre>'
    data = out.get("data", {})
    if "image/png" in data:
        alt = out.metadata.get("image/png", {}).get("alt", "")
        source = "".join(data["image/png"].split())
        return (
            f'<figure><img alt="{html.escape(alt)}" src="data:image/png;base64,{source}"></figure>'
        )
    if "text/html" in data:
        table = re.sub(r"<style.*?</style>", "", data["text/html"], flags=re.DOTALL)
        return f'<div class="output wide">{table}</div>'
    if "text/markdown" in data:
        made = MarkdownWithMath(renderer=Renderer()).render(data["text/markdown"])
        return f'<div class="text">{made}</div>'
    return f'<pre class="output">{html.escape(data.get("text/plain", ""))}</pre>'


# --- bibliography --------------------------------------------------------------------------------


def read_bibliography(path: Path) -> dict[str, dict]:
    """key -> fields of a .bib file with one field per line.

    Raises:
        ValueError: a key is there twice, or an entry lacks author, title or year.
    """
    found: dict[str, dict] = {}
    text = path.read_text(encoding="utf-8")
    for kind, key, body in ENTRY.findall(text):
        entry = {"kind": kind, **{name.lower(): value for name, value in FIELD.findall(body)}}
        missing = {"author", "title", "year"} - entry.keys()
        if missing or key in found:
            what = f"lacks {', '.join(sorted(missing))}" if missing else "is there twice"
            raise ValueError(f"{path.name}: {key} {what}")
        found[key] = entry
    count = len(re.findall(r"^@", text, re.MULTILINE))
    if len(found) != count:
        raise ValueError(f"{path.name}: {count} entries, of which {len(found)} can be read")
    return found


def address(entry: dict) -> str:
    """Where an entry can be read, or nothing."""
    if "eprint" in entry:
        return f"https://arxiv.org/abs/{entry['eprint']}"
    return f"https://doi.org/{entry['doi']}" if "doi" in entry else entry.get("url", "")


def cited(entry: dict, text: str) -> bool:
    """Does a text name this entry, by its address or its title?"""
    link = address(entry)
    return bool(link and link.lower() in text.lower()) or entry["title"].lower() in text.lower()


def bibliography_page(entries: dict[str, dict], pages: list[Page]) -> Page:
    """All entries by author and year, each with the lessons that cite it."""
    rows = []
    for key, entry in sorted(entries.items(), key=lambda e: (e[1]["author"], e[1]["year"])):
        authors = entry["author"].split(" and ")
        who = ", ".join(authors[:6]) + (" et al." if len(authors) > 6 else "")
        title, link = html.escape(entry["title"]), address(entry)
        shown = f'<a href="{html.escape(link)}">{title}</a>' if link else title
        where = entry.get("booktitle") or entry.get("journal") or ""
        where = ", ".join(filter(None, [where, entry["year"]]))
        by = [f'<a href="{p.file}">{p.title.split(" ")[0]}</a>' for p in pages if key in p.cites]
        note = f" <small>Cited in {', '.join(by)}.</small>" if by else ""
        rows.append(f'<li id="{key}">{html.escape(who)}. {shown}. {html.escape(where)}.{note}</li>')
    body = f'<h1>Bibliography</h1>\n<ul class="bibliography">{"".join(rows)}</ul>'
    return Page("bibliography.html", "Bibliography", body)


# --- the site ------------------------------------------------------------------------------------


def layout(page: Page, pages: list[Page]) -> str:
    """A whole page: navigation, contents, neighbours."""
    items = []
    for other in pages:
        here = ' aria-current="page"' if other is page else ""
        items.append(f'<li><a href="{other.file}"{here}>{html.escape(other.title)}</a>')
        if other is page and page.sections:
            inner = "".join(
                f'<li><a href="#{ident}">{html.escape(text)}</a></li>'
                for ident, text in page.sections
            )
            items.append(f"<ul>{inner}</ul>")
        items.append("</li>")
    at = pages.index(page)
    before = pages[at - 1] if at else None
    after = pages[at + 1] if at + 1 < len(pages) else None
    steps = [
        f'<a rel="{rel}" href="{p.file}">{arrow.format(html.escape(p.title))}</a>'
        for rel, p, arrow in (("prev", before, "← {}"), ("next", after, "{} →"))
        if p
    ]
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{html.escape(page.title)} · {TITLE}</title>
<link rel="stylesheet" href="style.css">
</head>
<body>
<a class="skip" href="#content">To the content</a>
<nav aria-label="Lessons"><strong>{TITLE}</strong>
<form action="search.html"><input name="q" type="search" aria-label="Search" placeholder="Search">
</form><ul>{"".join(items)}</ul></nav>
<main id="content">
{page.body}
<footer>{" ".join(steps)}<p>Text and figures: CC BY 4.0. Code: MIT.</p></footer>
</main>
</body>
</html>
"""


def index_page(lessons: list[Page]) -> Page:
    """The first page: the lessons and their sections."""
    rows = "".join(f'<li><a href="{p.file}">{html.escape(p.title)}</a></li>' for p in lessons)
    body = f"""<h1>{TITLE}</h1>
<p>These are the lessons as they were executed. To run and change them, and to work on the
exercises, open the notebooks themselves; the README says how.</p>
<ul class="lessons">{rows}</ul>"""
    return Page("index.html", "Contents", body)


def search_page() -> Page:
    """Finds sections whose text has all the words."""
    body = """<h1>Search</h1>
<form><input id="q" name="q" type="search" aria-label="Search for" autofocus></form>
<ul id="found" aria-live="polite"></ul>
<script src="search.js"></script>"""
    return Page("search.html", "Search", body)


SEARCH = """
const box = document.getElementById("q"), list = document.getElementById("found");
function search() {
  const words = box.value.toLowerCase().split(/\\s+/).filter(Boolean);
  list.replaceChildren();
  if (!words.length) return;
  const all = e => (e.title + " " + e.text).toLowerCase();
  const hits = INDEX.filter(e => words.every(w => all(e).includes(w)));
  const rank = e => words.filter(w => e.title.toLowerCase().includes(w)).length;
  hits.sort((a, b) => rank(b) - rank(a));
  for (const e of hits.slice(0, 40)) {
    const item = document.createElement("li"), link = document.createElement("a");
    link.href = e.file + "#" + e.id;
    link.textContent = e.page + ": " + e.title;
    const at = Math.max(0, e.text.toLowerCase().indexOf(words[0]) - 60);
    const text = document.createElement("p");
    text.textContent = (at ? "… " : "") + e.text.slice(at, at + 200) + " …";
    item.append(link, text);
    list.append(item);
  }
  if (!hits.length) list.textContent = "Nothing found.";
}
box.value = new URLSearchParams(location.search).get("q") || "";
box.addEventListener("input", search);
search();
"""

STYLE = """
:root { --page: #fff; --text: #1a1a1a; --dim: #555; --line: #d8d8d8; --soft: #f5f5f3;
        --link: #00598c; }
@media (prefers-color-scheme: dark) {
  :root { --page: #16181b; --text: #e4e4e2; --dim: #a5a5a0; --line: #3a3d42; --soft: #1f2226;
          --link: #7cc0f0; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text); font: 17px/1.6 system-ui, sans-serif;
       display: grid; grid-template-columns: 19rem minmax(0, 1fr); }
a { color: var(--link); }
nav { position: sticky; top: 0; height: 100vh; overflow-y: auto; padding: 1.2rem;
      border-right: 1px solid var(--line); font-size: .9rem; }
nav ul { list-style: none; padding-left: 0; } nav ul ul { padding-left: 1rem; }
nav li { margin: .3rem 0; } nav a { text-decoration: none; }
nav a[aria-current] { font-weight: 700; }
input { font: inherit; width: 100%; padding: .3rem .5rem; color: inherit; background: var(--soft);
        border: 1px solid var(--line); border-radius: 4px; }
main { max-width: 52rem; padding: 1.5rem 2rem 4rem; }
h1 { line-height: 1.25; } .anchor { visibility: hidden; text-decoration: none; }
:is(h1, h2, h3, h4):hover .anchor, .anchor:focus { visibility: visible; }
pre { overflow-x: auto; font-size: .84rem; line-height: 1.45; margin: .6rem 0; }
.highlight pre { background: var(--soft); padding: .7rem .9rem; border-radius: 6px; }
.highlight { background: none; } pre.output { padding: 0 .9rem; color: var(--dim); }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-size: .9rem; border: 0; }
th, td { border: 0; border-bottom: 1px solid var(--line); padding: .25rem .7rem; text-align: left; }
figure { margin: 1rem 0; } img { max-width: 100%; background: #fff; border-radius: 6px; }
details { border: 1px solid var(--line); border-radius: 6px; padding: .4rem .9rem;
          margin: .8rem 0; }
summary { cursor: pointer; color: var(--link); } blockquote { border-left: 4px solid var(--line);
  margin-left: 0; padding-left: 1rem; } math[display=block] { overflow-x: auto; margin: .8rem 0; }
footer { margin-top: 3rem; border-top: 1px solid var(--line); padding-top: 1rem; font-size: .9rem; }
footer a + a { float: right; } .skip { position: absolute; left: -99rem; }
.skip:focus { left: 1rem; top: 1rem; background: var(--page); padding: .5rem; }
.bibliography li { margin: .6rem 0; }
@media (max-width: 60rem) {
  body { display: block; }
  nav { position: static; height: auto; border-right: 0; border-bottom: 1px solid var(--line); }
  main { padding: 1rem; }
}
@media print { nav { display: none; } body { display: block; } }
"""


def build(notebooks: Path, out: Path) -> list[Page]:
    """Write the site; its pages."""
    bibliography = read_bibliography(notebooks / "references.bib")
    paths = sorted(notebooks.glob("[0-9][0-9]_*.ipynb"))
    lessons = [render(path, bibliography) for path in paths]
    pages = [index_page(lessons), *lessons, bibliography_page(bibliography, lessons)]
    pages.append(search_page())
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    for page in pages:
        # links among the notebooks are links among the pages
        text = re.sub(r'href="(\d\d_\w+)\.ipynb', r'href="\1.html', layout(page, pages))
        (out / page.file).write_text(text, encoding="utf-8")
    light = HtmlFormatter(style="tango").get_style_defs(".highlight")
    dark = HtmlFormatter(style="github-dark").get_style_defs(".highlight")
    dark = f"@media (prefers-color-scheme: dark) {{\n{dark}\n}}\n"
    (out / "style.css").write_text(f"{light}\n{dark}{STYLE}", encoding="utf-8")
    index = [{"file": p.file, "page": p.title, **entry} for p in lessons for entry in p.index]
    script = f"const INDEX = {json.dumps(index, ensure_ascii=False)};\n{SEARCH}"
    (out / "search.js").write_text(script, encoding="utf-8")
    return pages


def broken(out: Path) -> Iterator[str]:
    """Links and anchors of the written site that lead nowhere."""
    texts = {path.name: path.read_text(encoding="utf-8") for path in out.glob("*.html")}
    ids = {name: set(re.findall(r'\bid="([^"]+)"', text)) for name, text in texts.items()}
    for name, text in texts.items():
        for target in set(re.findall(r'<a [^>]*href="([^"]*)"', text)):
            if re.match(r"(https?|mailto):", target):
                continue
            file, _, anchor = target.partition("#")
            file = file or name
            if file not in texts:
                yield f"{name}: {target}: there is no such page"
            elif anchor and anchor not in ids[file]:
                yield f"{name}: {target}: there is no such section"


def main(argv: list[str] | None = None) -> int:
    """Write the book; 1 if a link in it leads nowhere."""
    parser = argparse.ArgumentParser(prog="bash ci/book", allow_abbrev=False)
    parser.add_argument("--out", type=Path, default=REPO / "out" / "book", metavar="DIR")
    parser.add_argument("--notebooks", type=Path, default=REPO / "notebooks", metavar="DIR")
    args = parser.parse_args(argv)
    try:
        pages = build(args.notebooks, args.out)
    except (ValueError, OSError) as error:
        print(f"ci/book: {error}", file=sys.stderr)
        return 2
    found = sorted(broken(args.out))
    print("\n".join(found + [f"{len(pages)} pages: {args.out / 'index.html'}"]))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
