"""Execute the notebooks in order with papermill and collect what they computed.

Each notebook runs in a process of its own, with a log and a time limit. It has passed only if
papermill says so *and* every code cell was executed: to papermill a notebook that stopped early in
``sys.exit`` is fine. Usually started by ``bash ci/run``.
"""

import argparse
import difflib
import html
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import nbformat
import psutil
from notebook_format import is_added, normalise

REPO = Path(__file__).resolve().parent.parent
SECONDS = {"mini": 900, "full": 6 * 3600}  # time limit of a notebook
RESULTS = "results.json"
# nbconvert's lab template leaves out the alt text that is in the metadata of the output
PAGE = """{%- extends "lab/index.html.j2" -%}
{%- block data_png -%}
{%- set alt = (output | get_metadata("alt", "image/png")) or "" -%}
{{ super() | replace("<img ", '<img alt="' ~ (alt | escape_html) ~ '" ', 1) }}
{%- endblock data_png -%}
"""
NOTE = "Measured in the mini profile: MiniCLIP on IconShift, not CLIP on ImageNet."


@dataclass
class Result:
    """How one notebook went; ``cell`` and ``error`` are empty if it passed."""

    name: str
    passed: bool
    seconds: float
    cell: str = ""
    error: str = ""


class Mistake(Exception):
    """Something in what was asked for; its text is for the user."""


def main(argv: list[str] | None = None) -> int:
    """The command; returns the exit code: 1 if a notebook failed, 2 for a bad request."""
    args = arguments(argv)
    out = args.out.resolve()
    try:
        notebooks = find(args.notebooks, args.only)
        given = {name: value for name, value in args.param}
        params = {path: choose_parameters(path, args, out, given) for path in notebooks}
    except Mistake as mistake:
        print(f"ci/run: {mistake}", file=sys.stderr)
        return 2
    if not notebooks:
        print(f"ci/run: there are no notebooks in {args.notebooks} yet; nothing to run.")
        return 0
    (out / "logs").mkdir(parents=True, exist_ok=True)
    limit = args.timeout or SECONDS[args.profile or "mini"]
    results, started = [], {}
    for path in notebooks:
        print(f"{path.name} ...", flush=True)
        started[path.stem] = time.time()
        result = execute(path, out, params[path], limit)
        results.append(result)
        print("  " + sentence(result), flush=True)
        if (out / path.name).is_file():
            to_html(out / path.name)
        if args.in_place and result.passed:
            write_back(out / path.name, path, out)
    report = collect(out, results, started)
    write_index(out, report)
    print_tables(report, results, out)
    failed = [result for result in results if not result.passed]
    for result in failed:
        print(f"FAILED: {result.name}, {result.cell}: {result.error} (logs/{result.name}.log)")
    seconds = sum(result.seconds for result in results)
    print(f"ci/run: {len(results) - len(failed)} passed, {len(failed)} failed, {seconds:.0f} s")
    return 1 if failed else 0


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """The options of ``bash ci/run``."""
    parser = argparse.ArgumentParser(
        prog="bash ci/run",
        description="Execute the notebooks in order; results, pages and logs go to out/.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--only", action="append", default=[], metavar="NN", help="a notebook's number; repeatable")
    add("--profile", choices=["mini", "full"], help="default: the notebooks' own choice (auto)")
    add("--out", type=Path, default=REPO / "out", metavar="DIR", help="default: out")
    add(
        "-p",
        "--param",
        nargs=2,
        action="append",
        default=[],
        metavar=("NAME", "VALUE"),
        help="another value for a parameter of the notebooks that run; repeatable",
    )
    add("--in-place", action="store_true", help="write executed notebooks back, to be committed")
    add("--timeout", type=int, metavar="S", help="seconds per notebook (mini 900, full 21600)")
    add("--notebooks", type=Path, default=REPO / "notebooks", metavar="DIR", help="another folder")
    return parser.parse_args(argv)


def find(folder: Path, only: list[str]) -> list[Path]:
    """The numbered notebooks in order, or those asked for; ``Mistake`` for an unknown number."""
    known = {path.name[:2]: path for path in sorted(folder.glob("[0-9][0-9]_*.ipynb"))}
    wanted = [number.strip().zfill(2) for text in only for number in text.split(",")]
    for number in wanted:
        if number not in known:
            raise Mistake(f"there is no notebook {number}; there are: {', '.join(known) or 'none'}")
    return [path for number, path in known.items() if not wanted or number in wanted]


# --- parameters ----------------------------------------------------------------------------------


def declared(path: Path) -> list[str]:
    """Names in the notebook's ``parameters`` cell, as papermill reads them."""
    from papermill.translators import PythonTranslator

    for cell in nbformat.read(path, as_version=4).cells:
        if "parameters" in cell.metadata.get("tags", []):
            return [parameter.name for parameter in PythonTranslator.inspect(cell)]
    return []


def choose_parameters(
    path: Path, args: argparse.Namespace, out: Path, given: dict[str, str]
) -> dict[str, str]:
    """What to pass to this notebook. papermill only warns about a name that it does not know (and
    its value then changes nothing), so such a name is a ``Mistake`` here.
    """
    known = declared(path)
    params = {"out_dir": str(out / "runs")} if "out_dir" in known else {}
    wanted = ({"profile": args.profile} if args.profile else {}) | given
    for name in wanted:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]}?" if close else "."
            listed = ", ".join(known) or "nothing (no cell tagged 'parameters')"
            raise Mistake(f"{path.name} has no parameter {name!r}{hint} It declares: {listed}")
    return params | wanted


# --- one notebook --------------------------------------------------------------------------------


def execute(path: Path, out: Path, params: dict[str, str], limit: float) -> Result:
    """Run a notebook in a process of its own; the executed one is ``out/<name>``."""
    target = out / path.name
    target.unlink(missing_ok=True)
    command = [sys.executable, "-m", "papermill", str(path), str(target), "--kernel", "python3"]
    # relative paths mean in every tool what they mean in Jupyter and nbval
    command += ["--cwd", str(path.parent), "--no-progress-bar", "--log-output"]
    command += ["--language", "python"]  # a notebook's own metadata may lack it
    command += ["--execution-timeout", str(max(1, int(limit)))]
    for name, value in params.items():
        raw = name in ("out_dir", "profile")
        command += ["--parameters_raw" if raw else "--parameters", name, value]
    began = time.perf_counter()
    log_path = out / "logs" / f"{path.stem}.log"
    with open(log_path, "wb") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
        )
        try:
            # the limit on a cell comes first, because it leaves a notebook that shows where
            code = process.wait(limit + 30)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            end(process)
    seconds = time.perf_counter() - began
    cell, error = verdict(target, code)
    if code is None or (error and "CellTimeoutError" in log_path.read_text(errors="replace")):
        error = f"not finished within {limit:g} s"
    return Result(path.stem, not error, round(seconds, 1), cell, error)


def end(process: subprocess.Popen) -> None:
    """End a process and its kernel, which lives in a session of its own."""
    if process.poll() is not None:
        return
    family = [*psutil.Process(process.pid).children(recursive=True), process]
    for member in family:
        try:
            member.kill()
        except psutil.NoSuchProcess:
            continue
    process.wait()


def verdict(target: Path, code: int | None) -> tuple[str, str]:
    """Which cell failed and how; two empty strings if the notebook is fine.

    Args:
        target: the executed notebook.
        code: papermill's exit code, None if it had to be ended.
    """
    if not target.is_file():
        return "before the first cell", f"papermill ended with {code}, see the log"
    cells = [cell for cell in nbformat.read(target, as_version=4).cells if not is_added(cell)]
    todo = [
        (i, cell)
        for i, cell in enumerate(cells, 1)
        if cell.cell_type == "code" and cell.source.strip()
    ]
    for i, cell in todo:
        for output in cell.outputs:
            if output.output_type == "error":
                return name_cell(i, cell), first_line(f"{output.ename}: {output.evalue}")
    if code == 0 and all(cell.execution_count is not None for _, cell in todo):
        return "", ""
    # papermill's "completed" is on every cell after some failures; when a cell began is the truth
    begun = [name_cell(i, cell) for i, cell in todo if cell.metadata.papermill.get("start_time")]
    errors = {0: "stopped the notebook: later cells were not run", 138: "the kernel died"}
    error = errors.get(code, f"papermill ended with {code}, see the log")
    return begun[-1] if begun else "before the first cell", error


def name_cell(i: int, cell: nbformat.NotebookNode) -> str:
    """The cell in words: its place among all cells, from 1, and its first line."""
    return f"cell {i} `{first_line(cell.source)}`"


def first_line(text: str) -> str:
    return text.strip().split("\n")[0][:120]


def to_html(path: Path) -> None:
    """A page beside the executed notebook."""
    from nbconvert import HTMLExporter

    page, _ = HTMLExporter(raw_template=PAGE).from_filename(str(path))
    path.with_suffix(".html").write_text(page, encoding="utf-8")


def write_back(executed: Path, path: Path, out: Path) -> None:
    """Replace a notebook by its executed self, made fit to be committed."""
    notebook = nbformat.read(executed, as_version=4)
    normalise(notebook, {str(out): "out", str(REPO): ".", str(Path.home()): "~"})
    temporary = path.with_suffix(".tmp")
    nbformat.write(notebook, temporary)
    os.replace(temporary, path)


# --- what was computed ---------------------------------------------------------------------------


def collect(out: Path, results: list[Result], started: dict[str, float]) -> dict:
    """Put the notebooks' fates and the summaries of all runs under ``out/runs`` in results.json.

    What an earlier call with ``--only`` left there stays, under its notebook.
    """
    try:
        old = json.loads((out / RESULTS).read_text())
    except (OSError, ValueError):
        old = {"notebooks": [], "runs": []}
    notebooks = {entry["name"]: entry for entry in old["notebooks"]}
    notebooks |= {result.name: asdict(result) for result in results}
    origin = {run["path"]: run["notebook"] for run in old["runs"]}
    runs = []
    for path in sorted((out / "runs").rglob("summary.json")):
        place = path.parent.relative_to(out).as_posix()
        written = path.stat().st_mtime
        now = [name for name, when in started.items() if when <= written]
        notebook = now[-1] if now else origin.get(place)
        runs.append({"path": place, "notebook": notebook, **json.loads(path.read_text())})
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


def print_tables(report: dict, results: list[Result], out: Path) -> None:
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
    for result in results:
        state = "passed" if result.passed else "FAILED"
        print(f"{result.name:32} {state} {result.seconds:8.1f} s")
    print(f"\nPages, notebooks, logs and {RESULTS}: {out}/index.html")


def sentence(result: Result) -> str:
    """One line on a notebook."""
    if result.passed:
        return f"passed in {result.seconds:.1f} s"
    return f"FAILED after {result.seconds:.1f} s, {result.cell}: {result.error}"


def write_index(out: Path, report: dict) -> None:
    """A page that links everything in ``out``."""
    entries = []
    for entry in report["notebooks"]:
        name = entry["name"]
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
    (out / "index.html").write_text(
        f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>Test-time adaptation of CLIP: executed notebooks</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 60em; padding: 0 1em }}
table {{ border-collapse: collapse; margin: 1em 0 }}
th, td {{ border-bottom: 1px solid #ccc; padding: .3em .8em; text-align: left }}
</style>
<h1>Executed notebooks</h1>
<table><tr><th>notebook</th><th>state</th><th>time</th><th>files</th></tr>
{chr(10).join(entries)}
</table>
<h2>Runs</h2>
<p>{html.escape(NOTE) if any(run["model"] == "mini" for run in report["runs"]) else ""}
Everything in <a href="{RESULTS}">{RESULTS}</a>; intervals are 95 %.</p>
<table><tr>{head}</tr>
{lines}
</table>
</html>
""",
        encoding="utf-8",
    )


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that kernels are ended, too
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
