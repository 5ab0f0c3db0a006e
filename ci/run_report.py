"""What ``bash ci/run`` leaves behind: results.json, a page per notebook, and index.html.

The index is written again whenever something changes, so that a browser can be open all the time.
"""

import html
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

RESULTS = "results.json"
# nbconvert's lab template leaves out the alt text that is in the metadata of the output
PAGE = """{%- extends "lab/index.html.j2" -%}
{%- block data_png -%}
{%- set alt = (output | get_metadata("alt", "image/png")) or "" -%}
{{ super() | replace("<img ", '<img alt="' ~ (alt | escape_html) ~ '" ', 1) }}
{%- endblock data_png -%}
"""
NOTE = "Measured in the mini profile: MiniCLIP on IconShift, not CLIP on ImageNet."
STYLE = """body { font: 16px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 60em }
body { padding: 0 1em }
table { border-collapse: collapse; margin: 1em 0 }
th, td { border-bottom: 1px solid #ccc; padding: .3em .8em; text-align: left }"""


@dataclass
class Result:
    """How one notebook went; ``cell`` and ``error`` are empty if it passed.

    ``of`` is the fingerprint of what it was executed from (``ci/ran.py``), empty for parameters
    that are not its own.
    """

    name: str
    passed: bool
    seconds: float
    cell: str = ""
    error: str = ""
    of: str = ""


def to_html(path: Path) -> None:
    """A page beside the executed notebook."""
    from nbconvert import HTMLExporter

    page, _ = HTMLExporter(raw_template=PAGE).from_filename(str(path))
    path.with_suffix(".html").write_text(page, encoding="utf-8")


def earlier(out: Path) -> dict:
    """The report that an earlier call left in ``out``, or an empty one."""
    try:
        return json.loads((out / RESULTS).read_text())
    except (OSError, ValueError):
        return {"notebooks": [], "runs": []}


def collect(out: Path, results: Sequence[Result], old: dict) -> dict:
    """Put the notebooks' fates and the summaries of all runs under ``out/runs`` in results.json.

    What an earlier call with ``--only`` left there stays, under its notebook.
    """
    notebooks = {entry["name"]: entry for entry in old["notebooks"]}
    notebooks |= {result.name: asdict(result) for result in results}
    origin = {run["path"]: run["notebook"] for run in old["runs"]}
    runs = []
    for path in sorted((out / "runs").rglob("summary.json")):
        place = path.parent.relative_to(out).as_posix()
        summary = json.loads(path.read_text())
        # the engine notes who started it: notebooks run beside each other, times tell nothing
        notebook = summary.pop("by", None) or origin.get(place)
        runs.append({"path": place, "notebook": notebook, **summary})
    report = {
        "schema": 1,
        "notebooks": [notebooks[name] for name in sorted(notebooks)],
        "runs": runs,
    }
    (out / RESULTS).write_text(json.dumps(report, indent=1) + "\n")
    return report


def rows(report: dict) -> Iterator[list[str]]:
    """The table of the runs, as text: a header, then a row per run."""
    yield ["notebook", "data set", "model", "run", "n", "before", "after", "gain (points)"]
    for run in report["runs"]:
        low, high = (100 * x for x in run["gain_ci95"])
        yield [
            (run["notebook"] or "")[:2],
            run["dataset"],
            run["model"],
            # the method and what differs from the defaults; the hash at the end says nothing here
            run["name"].removeprefix(f"{run['dataset']}_{run['model']}_").rsplit("_", 1)[0],
            str(run["n"]),
            f"{100 * run['accuracy_before']:.1f} %",
            f"{100 * run['accuracy_after']:.1f} %",
            f"{100 * run['gain']:+.1f} [{low:+.1f}, {high:+.1f}]",
        ]


def print_tables(report: dict, results: Sequence[Result], out: Path) -> None:
    """The runs, then the seconds of each notebook."""
    table = list(rows(report))
    if len(table) > 1:
        widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
        print()
        for row in table:
            cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
            print("  ".join(cells).rstrip())
        if any(run["model"] == "mini" for run in report["runs"]):
            print(NOTE)
    print()
    for result in sorted(results, key=lambda result: result.name):
        state = "passed" if result.passed else "FAILED"
        print(f"{result.name:32} {state} {result.seconds:8.1f} s")
    print(f"\nPages, notebooks, logs and {RESULTS}: {out}/index.html")


def sentence(result: Result) -> str:
    """One line on a notebook."""
    if result.passed:
        return f"passed in {result.seconds:.1f} s"
    return f"FAILED after {result.seconds:.1f} s, {result.cell}: {result.error}"


def write_index(out: Path, report: dict, waiting: dict[str, str], about: str = "") -> None:
    """A page that links everything in ``out``.

    Args:
        report: of what is finished.
        waiting: notebook -> where it stands; while there are any, the page loads itself again.
        about: a sentence on top, such as how long it will still take.
    """
    done = {entry["name"]: entry for entry in report["notebooks"]}
    entries = []
    for name in sorted(done.keys() | waiting.keys()):
        if name in waiting:
            entries.append(f"<tr><td>{name}</td><td>{html.escape(waiting[name])}</td></tr>")
            continue
        entry = done[name]
        state = "passed" if entry["passed"] else f"failed: {entry['cell']}: {entry['error']}"
        entries.append(
            f'<tr><td><a href="{name}.html">{name}</a></td><td>{html.escape(state)}</td>'
            f'<td class="n">{entry["seconds"]:.0f} s</td><td><a href="{name}.ipynb">notebook</a>, '
            f'<a href="logs/{name}.log">log</a></td></tr>'
        )
    header, *body = list(rows(report))
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    lines = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in body
    )
    again = '<meta http-equiv="refresh" content="5">' if waiting else ""
    mini = NOTE if any(run["model"] == "mini" for run in report["runs"]) else ""
    temporary = out / ".index.tmp"
    temporary.write_text(
        f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">{again}
<title>Test-time adaptation of CLIP: executed notebooks</title>
<style>
{STYLE}
</style>
<h1>Executed notebooks</h1>
<p>{html.escape(about)}</p>
<table><tr><th>notebook</th><th>state</th><th>time</th><th>files</th></tr>
{chr(10).join(entries)}
</table>
<h2>Runs</h2>
<p>{html.escape(mini)}
Everything in <a href="{RESULTS}">{RESULTS}</a>; intervals are 95 %.</p>
<table><tr>{head}</tr>
{lines}
</table>
</html>
""",
        encoding="utf-8",
    )
    temporary.replace(out / "index.html")  # a browser never reads half of it
